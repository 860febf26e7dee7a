use ringfence_ring::{Format, Indirect, Notifications, Rules};

/// What a peer does, read from the front. After the end everything is 0.
pub(crate) struct Bytes<'d>(&'d [u8]);

impl<'d> Bytes<'d> {
    pub(crate) fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn take(&mut self, len: usize) -> &'d [u8] {
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.take(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Whether it is one of `of` that are alike.
    pub(crate) fn one_in(&mut self, of: u8) -> bool {
        self.u8().is_multiple_of(of)
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `bound`, which is at most 65536.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        match bound {
            0..=256 => usize::from(self.u8()) % bound.max(1),
            _ => usize::from(self.u16()) % bound,
        }
    }

    /// What a queue's two sides agreed on, and a size that it can have.
    pub(crate) fn rules(&mut self) -> (Rules, u16) {
        let choice = self.u8();
        let rules = Rules {
            format: if choice & 1 == 0 { Format::Split } else { Format::Packed },
            notifications: if choice & 2 == 0 { Notifications::Flags } else { Notifications::EventIdx },
            indirect: if choice & 4 == 0 { Indirect::Refused } else { Indirect::Allowed },
        };
        let size = match rules.format {
            Format::Split => 1 << self.below(8),
            Format::Packed => 1 + self.below(128) as u16,
        };
        (rules, size)
    }
}
