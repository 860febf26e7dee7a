use crate::{Format, LayoutError};

/// Where a queue goes on: the next entry to take, and the next to give back.
///
/// Split: two free-running indices. Packed: in each, bits 0 to 14 are an index into the ring and bit 15 is the wrap
/// counter that belongs to it (§2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Position {
    /// The next entry that the driver makes available.
    pub avail: u16,
    /// The next entry that the device uses.
    pub used: u16,
}

impl Position {
    /// Where a queue is that has not run.
    pub const fn start(format: Format) -> Self {
        match format {
            Format::Split => Self { avail: 0, used: 0 },
            // Both wrap counters begin at 1.
            Format::Packed => Self { avail: 1 << 15, used: 1 << 15 },
        }
    }

    /// From the number of vhost-user's `SET_VRING_BASE`.
    ///
    /// A split base says nothing of the used index: where the queue had been drained, everything before it was used. A
    /// packed base without its upper half comes from a front-end that sends one half for both.
    ///
    /// # Errors
    /// [`LayoutError::Base`] where a split base has more than 16 bits.
    pub const fn from_vring_base(format: Format, base: u32) -> Result<Self, LayoutError> {
        let (low, high) = (base as u16, (base >> 16) as u16);
        match (format, high) {
            (_, 0) => Ok(Self { avail: low, used: low }),
            (Format::Split, _) => Err(LayoutError::Base { base }),
            (Format::Packed, _) => Ok(Self { avail: low, used: high }),
        }
    }

    /// As the number that answers vhost-user's `GET_VRING_BASE`.
    pub const fn vring_base(self, format: Format) -> u32 {
        match format {
            Format::Split => self.avail as u32,
            Format::Packed => self.avail as u32 | (self.used as u32) << 16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vring_bases() {
        for (format, base, expected) in [
            (Format::Split, 0, Ok(Position { avail: 0, used: 0 })),
            (Format::Split, 0xffff, Ok(Position { avail: 0xffff, used: 0xffff })),
            (Format::Split, 0x1_0000, Err(LayoutError::Base { base: 0x1_0000 })),
            (Format::Packed, 0x8000_8000, Ok(Position::start(Format::Packed))),
            (Format::Packed, 0x0003_8005, Ok(Position { avail: 0x8005, used: 3 })),
            (Format::Packed, 0x0000_8005, Ok(Position { avail: 0x8005, used: 0x8005 })),
        ] {
            assert_eq!(Position::from_vring_base(format, base), expected, "{format:?} {base:#x}");
        }
        for (format, position, base) in [
            (Format::Split, Position { avail: 7, used: 5 }, 7),
            (Format::Packed, Position { avail: 0x8005, used: 3 }, 0x0003_8005),
            (Format::Packed, Position::start(Format::Packed), 0x8000_8000),
        ] {
            assert_eq!(position.vring_base(format), base, "{format:?} {position:?}");
        }
    }
}
