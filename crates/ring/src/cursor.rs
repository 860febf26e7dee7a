//! Where one is in a packed ring.

use crate::wire::{AVAIL, USED};

/// A place in the ring, with the wrap counter of whoever goes there (§2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) index: u16,
    pub(crate) wrap: bool,
}

impl Cursor {
    pub(crate) const START: Self = Self { index: 0, wrap: true };

    pub(crate) fn from_bits(bits: u16) -> Self {
        Self { index: bits & 0x7fff, wrap: bits >> 15 == 1 }
    }

    pub(crate) fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// The place `entries` further on; no more than `size`.
    #[inline]
    pub(crate) fn advance(self, entries: u16, size: u16) -> Self {
        // 32768 and a bit: up to 65535.
        let index = self.index + entries;
        if index < size { Self { index, ..self } } else { Self { index: index - size, wrap: !self.wrap } }
    }

    /// The place `entries` before this one; no more than `size`.
    pub(crate) fn retreat(self, entries: u16, size: u16) -> Self {
        match self.index.checked_sub(entries) {
            Some(index) => Self { index, ..self },
            None => Self { index: size - (entries - self.index), wrap: !self.wrap },
        }
    }

    /// How far this place is ahead of `behind`; `None` where one can't be ahead of the other.
    pub(crate) fn ahead_of(self, behind: Self, size: u16) -> Option<u16> {
        if self.index >= size || behind.index >= size {
            return None;
        }
        match self.wrap == behind.wrap {
            true => self.index.checked_sub(behind.index),
            false => (size - behind.index).checked_add(self.index).filter(|&ahead| ahead <= size),
        }
    }

    /// Whether the driver made a descriptor with these flags available here (§2.8.1).
    #[inline]
    pub(crate) fn is_available(self, flags: u16) -> bool {
        (flags & AVAIL != 0) == self.wrap && (flags & USED != 0) != self.wrap
    }

    /// The flags that make a descriptor used here.
    #[inline]
    pub(crate) fn used_flags(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }

    /// The flags that make a descriptor available here.
    #[inline]
    pub(crate) fn available_flags(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let at = |index, wrap| Cursor { index, wrap };
        for (ahead, behind, size, expected) in [
            (at(0, true), at(0, true), 4, Some(0)),
            (at(3, true), at(1, true), 4, Some(2)),
            (at(1, true), at(3, true), 4, None),
            (at(1, false), at(3, true), 4, Some(2)),
            (at(3, false), at(3, true), 4, Some(4)),
            (at(3, false), at(2, true), 4, None),
            (at(4, true), at(0, true), 4, None),
            (at(0, true), at(4, true), 4, None),
            (at(0x7fff, false), at(0x7fff, true), 0x8000, Some(0x8000)),
            (at(0x7fff, false), at(0, true), 0x8000, None),
        ] {
            assert_eq!(ahead.ahead_of(behind, size), expected, "{ahead:?} {behind:?} {size}");
            assert_eq!(Cursor::from_bits(ahead.bits()), ahead);
            if let Some(distance) = expected {
                assert_eq!(behind.advance(distance, size), ahead);
                assert_eq!(ahead.retreat(distance, size), behind);
            }
        }
    }
}
