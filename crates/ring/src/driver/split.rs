//! The driver's half of a split ring (§2.7).

use super::{Chains, Returned, Standing, access_flag, store};
use crate::cells::RingCells;
use crate::wire::{INDIRECT, NEXT, Raw, SPLIT_SILENT, avail, event_passed, used};
use crate::{Descriptor, DeviceError, Notifications};
use core::sync::atomic::{AtomicU16, Ordering, fence};
use ringfence_dma::BusAddr;

/// All indices are free-running.
#[derive(Debug)]
pub(super) struct Ring {
    notifications: Notifications,
    /// A mask for slots.
    mask: u16,
    /// How many entries were ever added: the last 16 bits are the next avail entry to write.
    added: u64,
    /// How many of them the device sees.
    published: u64,
    /// How many had been added when the device was last told or found not to care.
    told: u64,
    /// The next used entry to take.
    taken: u16,
    /// The used index as last read.
    seen: u16,
    /// Nothing is taken any more.
    broken: bool,
}

impl Ring {
    pub(super) fn new(size: u16, notifications: Notifications) -> Self {
        Self { notifications, mask: size - 1, added: 0, published: 0, told: 0, taken: 0, seen: 0, broken: false }
    }

    /// A descriptor of a table, in which each is followed by the next.
    #[inline(always)]
    pub(super) fn in_table(buffer: &Descriptor, number: usize, goes_on: bool) -> (u64, u64) {
        linked(buffer, goes_on, number as u16 + 1)
    }

    /// Adds chain `id`, which lies in a table of `len` bytes at `addr`.
    #[inline(always)]
    pub(super) fn add_table(&mut self, cells: &RingCells<'_>, id: u16, addr: BusAddr, len: u32) {
        store(&cells.descriptors[usize::from(id)], Raw { addr, len, flags: INDIRECT, link: 0 }.split_words());
        self.add_head(cells, id);
    }

    /// Adds a chain, and says its id. There is room.
    #[inline(always)]
    pub(super) fn add<T>(
        &mut self,
        cells: &RingCells<'_>,
        chains: &mut Chains<T>,
        buffers: &[Descriptor],
        writable: u32,
    ) -> u16 {
        let head = chains.next;
        let (mut last, mut next) = (head, head);
        for number in 0..buffers.len() {
            last = next;
            next = chains.links[usize::from(last)];
            chains.entries[usize::from(last)].standing = Standing::Nowhere;
            store(&cells.descriptors[usize::from(last)], linked(&buffers[number], number + 1 < buffers.len(), next));
        }
        chains.next = next;
        chains.give(head, last, buffers.len() as u16, writable);
        self.add_head(cells, head);
        head
    }

    /// Another buffer in the middle of a chain that is there.
    #[inline(always)]
    pub(super) fn replace(cells: &RingCells<'_>, middle: u16, buffer: &Descriptor, last: u16) {
        store(&cells.descriptors[usize::from(middle)], linked(buffer, true, last));
    }

    #[inline(always)]
    pub(super) fn add_head(&mut self, cells: &RingCells<'_>, head: u16) {
        cells.avail_entry(self.added as u16 & self.mask).store(head.to_le(), Ordering::Relaxed);
        self.added = self.added.wrapping_add(1);
    }

    #[inline]
    pub(super) fn publish(&mut self, cells: &RingCells<'_>) {
        if self.added == self.published {
            return;
        }
        // Release: orders the stores of entries, descriptors and buffers before this one.
        cells.avail_index.store((self.added as u16).to_le(), Ordering::Release);
        self.published = self.added;
    }

    /// Everything is published.
    #[inline(always)]
    pub(super) fn needs_kick(&mut self, cells: &RingCells<'_>) -> bool {
        if self.added == self.told {
            return false;
        }
        self.ask(cells)
    }

    /// There is something to publish.
    #[inline(always)]
    pub(super) fn tell(&mut self, cells: &RingCells<'_>) -> bool {
        // Release: as in `publish`.
        cells.avail_index.store((self.added as u16).to_le(), Ordering::Release);
        self.published = self.added;
        self.ask(cells)
    }

    /// Whether the device wants to be told. There is something that it was not told of.
    #[inline(always)]
    fn ask(&mut self, cells: &RingCells<'_>) -> bool {
        let untold = self.added.wrapping_sub(self.told);
        self.told = self.added;
        // Orders the store of the avail index before the load of what the device wants; the device does the opposite
        // before it sleeps.
        fence(Ordering::SeqCst);
        let load = |word: &AtomicU16| u16::from_le(word.load(Ordering::Relaxed));
        match self.notifications {
            Notifications::Flags => load(cells.used_flags) & SPLIT_SILENT == 0,
            Notifications::EventIdx => {
                let event = load(cells.used_word(used::avail_event(self.size())));
                // More than all indices are all of them.
                u16::try_from(untold).map_or(true, |untold| event_passed(event, self.added as u16, untold))
            }
        }
    }

    /// Takes back the next chain that the device has used. After an error nothing is taken any more.
    #[inline(always)]
    pub(super) fn pop_used<'c, T>(
        &mut self,
        cells: &RingCells<'_>,
        chains: &'c mut Chains<T>,
    ) -> Result<Option<(Returned, &'c mut T)>, DeviceError> {
        if self.taken == self.seen && !self.look(cells, &mut chains.free)? {
            return Ok(None);
        }
        let [id, written] = &cells.used_entries[usize::from(self.taken & self.mask)];
        let id = u32::from_le(id.load(Ordering::Relaxed));
        let written = u32::from_le(written.load(Ordering::Relaxed));
        match chains.take(id, written) {
            Ok((returned, _, record)) => {
                self.taken = self.taken.wrapping_add(1);
                Ok(Some((returned, record)))
            }
            Err(error) => {
                self.break_down();
                Err(error)
            }
        }
    }

    #[cold]
    fn break_down(&mut self) {
        (self.seen, self.broken, self.told) = (self.taken, true, self.added);
    }

    /// Reads the used index; `true` if there is something to take.
    #[inline]
    fn look(&mut self, cells: &RingCells<'_>, free: &mut u16) -> Result<bool, DeviceError> {
        // Acquire: orders this load before those of the entries, and of the buffers that came back.
        let index = u16::from_le(cells.used_index.load(Ordering::Acquire));
        // A ring has no more than half as many entries as there are indices.
        let (next, under_way) = (self.taken, (self.added as u16).wrapping_sub(self.taken));
        if self.broken {
            return Ok(false);
        }
        if index.wrapping_sub(next) > under_way {
            self.break_down();
            *free = 0;
            return Err(DeviceError::UsedIndex { index, next, under_way });
        }
        self.seen = index;
        Ok(index != next)
    }

    #[inline]
    pub(super) fn has_used(&self, cells: &RingCells<'_>) -> bool {
        // A hint: `look` loads it again with the order that it needs.
        self.taken != u16::from_le(cells.used_index.load(Ordering::Relaxed))
    }

    pub(super) fn disable_callbacks(&mut self, cells: &RingCells<'_>) {
        match self.notifications {
            Notifications::Flags => cells.avail_word(avail::FLAGS).store(SPLIT_SILENT.to_le(), Ordering::Relaxed),
            // An entry that was used already: the device does not pass it for a lap of the index.
            Notifications::EventIdx => self.ask_for(cells, self.taken.wrapping_sub(1)),
        }
    }

    pub(super) fn enable_callbacks<T>(
        &mut self,
        cells: &RingCells<'_>,
        chains: &mut Chains<T>,
    ) -> Result<bool, DeviceError> {
        match self.notifications {
            Notifications::Flags => cells.avail_word(avail::FLAGS).store(0, Ordering::Relaxed),
            Notifications::EventIdx => self.ask_for(cells, self.taken),
        }
        // Orders the store above before the load of the used index; the device does the opposite.
        fence(Ordering::SeqCst);
        self.look(cells, &mut chains.free)
    }

    fn ask_for(&self, cells: &RingCells<'_>, event: u16) {
        cells.avail_word(avail::used_event(self.size())).store(event.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn size(&self) -> u16 {
        self.mask + 1
    }
}

/// The descriptor of a buffer, in a chain that goes on at `next` or ends.
#[inline(always)]
fn linked(buffer: &Descriptor, goes_on: bool, next: u16) -> (u64, u64) {
    let (flags, link) = if goes_on { (NEXT, next) } else { (0, 0) };
    Raw { addr: buffer.addr, len: buffer.len, flags: flags | access_flag(buffer), link }.split_words()
}
