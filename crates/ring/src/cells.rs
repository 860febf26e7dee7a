//! A ring's coherent memory as what lies in it.

use crate::layout::check_size;
use crate::wire::{avail, used};
use crate::{Format, RingArea};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use ringfence_dma::{Cell, HostSlice};

/// Three slices that are a ring's memory.
#[derive(Clone, Copy, Debug)]
pub struct RingSlices<'m> {
    /// The descriptor table, or ring.
    pub descriptors: HostSlice<'m>,
    /// What the driver writes.
    pub driver: HostSlice<'m>,
    /// What the device writes.
    pub device: HostSlice<'m>,
}

/// A ring in memory that driver and device share, its bounds and alignment looked at once.
#[derive(Clone, Copy, Debug)]
pub struct RingCells<'m> {
    format: Format,
    /// Two words each, as many as the ring has.
    pub(crate) descriptors: &'m [[AtomicU64; 2]],
    /// Split: the words that are looked at most.
    pub(crate) avail_index: &'m AtomicU16,
    pub(crate) used_flags: &'m AtomicU16,
    pub(crate) used_index: &'m AtomicU16,
    /// Split: the avail ring, word by word.
    pub(crate) avail: &'m [AtomicU16],
    /// Split: the used ring, word by word, for its head and its tail.
    pub(crate) used: &'m [AtomicU16],
    /// Split: the used ring's entries, id and length each.
    pub(crate) used_entries: &'m [[AtomicU32; 2]],
    /// Packed: the driver's event suppression, and the device's.
    pub(crate) events: [&'m [AtomicU32]; 2],
}

impl<'m> RingCells<'m> {
    /// A ring of `format` with `size` descriptors in `slices`.
    ///
    /// # Panics
    /// Where there is no such ring, or a slice is too short ([`RingArea::len`]) or not aligned ([`RingArea::align`]).
    pub fn new(format: Format, size: u16, slices: &RingSlices<'m>) -> Self {
        assert!(check_size(format, size).is_ok(), "a ring of {size} descriptors");
        let RingSlices { descriptors, driver, device } = *slices;
        let count = usize::from(size);
        let len = |area: RingArea| area.len(format, size) as usize;
        let descriptors = cells(descriptors, RingArea::Descriptors, 0, count);
        match format {
            Format::Split => Self {
                format,
                descriptors,
                avail_index: word(driver, RingArea::Driver, avail::INDEX),
                used_flags: word(device, RingArea::Device, used::FLAGS),
                used_index: word(device, RingArea::Device, used::INDEX),
                avail: cells(driver, RingArea::Driver, 0, len(RingArea::Driver) / 2),
                used: cells(device, RingArea::Device, 0, len(RingArea::Device) / 2),
                used_entries: cells(device, RingArea::Device, used::id(0) as usize, count),
                events: [&[]; 2],
            },
            Format::Packed => Self {
                format,
                descriptors,
                avail_index: &NOWHERE,
                used_flags: &NOWHERE,
                used_index: &NOWHERE,
                avail: &[],
                used: &[],
                used_entries: &[],
                events: [cells(driver, RingArea::Driver, 0, 1), cells(device, RingArea::Device, 0, 1)],
            },
        }
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    pub(crate) fn size(&self) -> u16 {
        // 32768 at the most.
        self.descriptors.len() as u16
    }

    /// Sets all of it to zero.
    pub(crate) fn clear(&self) {
        use core::sync::atomic::Ordering::Relaxed;
        let Self { descriptors, avail, used, used_entries, events, .. } = self;
        descriptors.iter().flatten().for_each(|word| word.store(0, Relaxed));
        avail.iter().chain(*used).for_each(|word| word.store(0, Relaxed));
        used_entries.iter().flatten().chain(events.iter().copied().flatten()).for_each(|word| word.store(0, Relaxed));
    }

    /// Split: the entry of that slot of the avail ring.
    #[inline]
    pub(crate) fn avail_entry(&self, slot: u16) -> &'m AtomicU16 {
        &self.avail[avail::entry(slot) as usize / 2]
    }

    /// Split: a word of the head or the tail of the avail ring, by its offset.
    #[inline]
    pub(crate) fn avail_word(&self, offset: u32) -> &'m AtomicU16 {
        &self.avail[offset as usize / 2]
    }

    /// Split: a word of the head or the tail of the used ring, by its offset.
    #[inline]
    pub(crate) fn used_word(&self, offset: u32) -> &'m AtomicU16 {
        &self.used[offset as usize / 2]
    }
}

/// A word that a packed ring does not have.
static NOWHERE: AtomicU16 = AtomicU16::new(0);

fn word(slice: HostSlice<'_>, area: RingArea, offset: u32) -> &AtomicU16 {
    &cells::<AtomicU16>(slice, area, offset as usize, 1)[0]
}

fn cells<'m, T: Cell>(slice: HostSlice<'m>, area: RingArea, offset: usize, count: usize) -> &'m [T] {
    match slice.cells(offset, count) {
        Some(cells) => cells,
        None => panic!("the {area} is misaligned"),
    }
}
