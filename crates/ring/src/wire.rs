//! The standard's numbers, and the two forms of a descriptor.

use core::sync::atomic::Ordering;
use ringfence_dma::{BusAddr, HostSlice};

/// `VIRTQ_DESC_F_NEXT`: the chain goes on (§2.7.5, §2.8.6).
pub(crate) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes; in a used packed descriptor: the device has written.
pub(crate) const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the bytes are a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;
/// `VIRTQ_DESC_F_AVAIL` of a packed descriptor (§2.8.1).
pub(crate) const AVAIL: u16 = 1 << 7;
/// `VIRTQ_DESC_F_USED` of a packed descriptor (§2.8.1).
pub(crate) const USED: u16 = 1 << 15;

/// How long a descriptor is, in either form.
pub(crate) const DESCRIPTOR: u32 = 16;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` and `VIRTQ_USED_F_NO_NOTIFY`: do not tell me (§2.7.6, §2.7.8).
pub(crate) const SPLIT_SILENT: u16 = 1;

/// `RING_EVENT_FLAGS_…` of a packed ring (§2.8.14).
pub(crate) const EVENT_ENABLE: u16 = 0;
pub(crate) const EVENT_DISABLE: u16 = 1;
pub(crate) const EVENT_DESC: u16 = 2;

/// Where things lie in the avail ring: flags, index, `size` entries, then `used_event` (§2.7.6).
pub(crate) mod avail {
    pub(crate) const FLAGS: u32 = 0;
    pub(crate) const INDEX: u32 = 2;

    #[inline]
    pub(crate) fn entry(slot: u16) -> u32 {
        4 + 2 * slot as u32
    }

    #[inline]
    pub(crate) fn used_event(size: u16) -> u32 {
        entry(size)
    }
}

/// Where things lie in the used ring: flags, index, `size` pairs of id and length, then `avail_event` (§2.7.8).
pub(crate) mod used {
    pub(crate) const FLAGS: u32 = 0;
    pub(crate) const INDEX: u32 = 2;

    #[inline]
    pub(crate) fn id(slot: u16) -> u32 {
        4 + 8 * slot as u32
    }

    #[inline]
    pub(crate) fn len(slot: u16) -> u32 {
        id(slot) + 4
    }

    #[inline]
    pub(crate) fn avail_event(size: u16) -> u32 {
        id(size)
    }
}

/// Where things lie in a packed descriptor.
pub(crate) mod packed {
    pub(crate) const LEN: usize = 8;
    pub(crate) const ID: usize = 12;
    pub(crate) const FLAGS: usize = 14;
}

/// A descriptor as it was read, nothing of it checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw {
    pub(crate) addr: BusAddr,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    /// Split: where the chain goes on. Packed: the buffer's id.
    pub(crate) link: u16,
}

impl Raw {
    /// A split descriptor.
    #[inline]
    pub(crate) fn split(addr: u64, rest: u64) -> Self {
        Self { addr: BusAddr(addr), len: rest as u32, flags: (rest >> 32) as u16, link: (rest >> 48) as u16 }
    }

    #[inline]
    pub(crate) fn packed(addr: u64, rest: u64) -> Self {
        Self { addr: BusAddr(addr), len: rest as u32, link: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }

    #[inline]
    pub(crate) fn split_words(self) -> (u64, u64) {
        (self.addr.0, u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.link) << 48)
    }

    #[inline]
    pub(crate) fn packed_words(self) -> (u64, u64) {
        (self.addr.0, u64::from(self.len) | u64::from(self.link) << 32 | u64::from(self.flags) << 48)
    }

    #[inline]
    pub(crate) fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The two words of a descriptor, each read once.
#[inline]
pub(crate) fn load_words(descriptor: &HostSlice<'_>) -> (u64, u64) {
    (descriptor.load_u64(0, Ordering::Relaxed), descriptor.load_u64(8, Ordering::Relaxed))
}

/// Writes the two words of the descriptor of that index in `table`.
#[inline]
pub(crate) fn store_words(table: &HostSlice<'_>, index: u16, (addr, rest): (u64, u64)) {
    let descriptor = descriptor(table, index);
    descriptor.store_u64(0, addr, Ordering::Relaxed);
    descriptor.store_u64(8, rest, Ordering::Relaxed);
}

/// The descriptor of that index in `table`.
#[inline]
pub(crate) fn descriptor<'m>(table: &HostSlice<'m>, index: u16) -> HostSlice<'m> {
    table.sub(usize::from(index) * DESCRIPTOR as usize, DESCRIPTOR as usize)
}

/// Whether a notification is due by `VIRTIO_F_EVENT_IDX`: the other side asked to be told once entry `event` is done,
/// and it is among the `count` entries that end before `new` (§2.7.10). Indices are free-running and wrap.
#[inline]
pub(crate) fn event_passed(event: u16, new: u16, count: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < count
}

/// The same for a packed ring of `size`: `event` holds an offset and, in bit 15, a wrap counter (§2.8.14).
#[inline]
pub(crate) fn packed_event_passed(event: u16, new: u16, new_wrap: bool, count: u32, size: u16) -> bool {
    let new = i64::from(new);
    // On the number line of the lap that `new` is in; an event of the lap before lies below 0.
    let offset = i64::from(event & 0x7fff);
    let event = if (event >> 15 == 1) == new_wrap { offset } else { offset - i64::from(size) };
    (new - i64::from(count)..new).contains(&event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_descriptor_survive_a_round_trip() {
        let raw = Raw { addr: BusAddr(0x1122_3344_5566_7788), len: 0x99aa_bbcc, flags: 0xddee, link: 0x0123 };
        let (addr, rest) = raw.split_words();
        assert_eq!(rest, 0x0123_ddee_99aa_bbcc);
        let back = Raw::split(addr, rest);
        assert_eq!((back.addr, back.len, back.flags, back.link), (raw.addr, raw.len, raw.flags, raw.link));
        let (addr, rest) = raw.packed_words();
        assert_eq!(rest, 0xddee_0123_99aa_bbcc);
        let back = Raw::packed(addr, rest);
        assert_eq!((back.addr, back.len, back.flags, back.link), (raw.addr, raw.len, raw.flags, raw.link));
    }

    #[test]
    fn split_events() {
        for (event, new, count, due, why) in [
            (0, 1, 1, true, "the very entry"),
            (1, 1, 1, false, "the next entry is asked for, and is not done"),
            (0, 2, 1, false, "the entry was done before this batch"),
            (0, 2, 2, true, "the first of a batch"),
            (1, 2, 2, true, "the last of a batch"),
            (2, 2, 2, false, "just past a batch"),
            (0xffff, 0, 1, true, "the last entry before the index wraps"),
            (0xffff, 1, 2, true, "a batch over the wrap, its first"),
            (0, 1, 2, true, "a batch over the wrap, its last"),
            (1, 1, 2, false, "a batch over the wrap, just past it"),
            (0xfffe, 1, 2, false, "a batch over the wrap, just before it"),
            (0x8000, 0, 0x8000, true, "the largest queue in one batch, its first"),
            (0x7fff, 0, 0x8000, false, "the largest queue in one batch, just before it"),
            (5, 5, 0, false, "nothing was done"),
            (4, 5, 0, false, "nothing was done since"),
        ] {
            assert_eq!(event_passed(event, new, count), due, "{why}: event {event} new {new} count {count}");
        }
    }

    #[test]
    fn packed_events() {
        const WRAP: u16 = 0x8000;
        for (event, new, new_wrap, count, size, due, why) in [
            (WRAP, 1, true, 1, 8, true, "the very entry"),
            (WRAP | 1, 1, true, 1, 8, false, "the next entry"),
            (WRAP, 2, true, 1, 8, false, "done before this batch"),
            (WRAP, 2, true, 2, 8, true, "the first of a batch"),
            (0, 2, true, 2, 8, false, "the same offset a lap ago"),
            (WRAP | 7, 0, false, 1, 8, true, "the last of the lap before"),
            (WRAP | 7, 1, false, 2, 8, true, "a batch over the wrap, its first"),
            (0, 1, false, 2, 8, true, "a batch over the wrap, its last"),
            (1, 1, false, 2, 8, false, "a batch over the wrap, just past it"),
            (WRAP | 6, 1, false, 2, 8, false, "a batch over the wrap, just before it"),
            (7, 0, false, 1, 8, false, "the end of the lap just begun"),
            (WRAP, 0, false, 8, 8, true, "a whole ring in one batch"),
            (2, 3, true, 7, 7, false, "a size that is no power of two: an entry of the lap before, before the batch"),
            (3, 3, true, 7, 7, true, "a size that is no power of two: a whole ring"),
            (WRAP | 0x7ffe, 0x7fff, true, 1, 0x8000, true, "the largest ring"),
            (WRAP | 0x7fff, 0, false, 0x8000, 0x8000, true, "the largest ring in one batch"),
            (WRAP | 0x7fff, 9, true, 9, 8, false, "an offset beyond the ring"),
            (WRAP, 1, true, 0, 8, false, "nothing was done"),
        ] {
            assert_eq!(packed_event_passed(event, new, new_wrap, count, size), due, "{why}");
        }
    }
}
