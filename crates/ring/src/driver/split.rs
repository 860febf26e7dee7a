//! The driver's half of a split ring (§2.7).

use super::{Chains, IndirectTable, RingMemory, Used, access_flag};
use crate::wire::{DESCRIPTOR, INDIRECT, NEXT, Raw, SPLIT_SILENT, avail, event_passed, store_words, used};
use crate::{Descriptor, DeviceError, Notifications, RingArea};
use alloc::boxed::Box;
use core::sync::atomic::{Ordering, fence};
use ringfence_dma::HostSlice;

/// All indices are free-running.
#[derive(Debug)]
pub(super) struct Ring {
    notifications: Notifications,
    /// From each descriptor to the next, of a chain or of the free ones: what the ring says too, and is not asked.
    links: Box<[u16]>,
    /// The first free descriptor, where there is one.
    free: u16,
    /// The next avail entry to write.
    added: u16,
    /// The avail index that the device sees.
    published: u16,
    /// How many entries were published since the device was last told or found not to care; `None`: too many.
    untold: Option<u16>,
    /// The next used entry to take.
    taken: u16,
    /// The used index as last read.
    seen: u16,
}

impl Ring {
    pub(super) fn new(size: u16, notifications: Notifications) -> Self {
        // The last links to a descriptor that is not there, and is never followed: `Chains` counts the free ones.
        let links = (1..=size).collect();
        Self { notifications, links, free: 0, added: 0, published: 0, untold: Some(0), taken: 0, seen: 0 }
    }

    /// There is room, and the table is large enough.
    #[inline]
    pub(super) fn add<M: RingMemory>(
        &mut self,
        memory: &M,
        chains: &Chains,
        buffers: &[Descriptor],
        table: Option<&IndirectTable<'_>>,
    ) -> u16 {
        let descriptors = memory.area(RingArea::Descriptors);
        let head = self.free;
        match table {
            Some(table) => {
                write_chain(&table.memory, buffers, |index| (index, index + 1));
                // As many as fit a queue, so their length fits too.
                let len = DESCRIPTOR * buffers.len() as u32;
                let raw = Raw { addr: table.addr, len, flags: INDIRECT, link: 0 };
                store_words(&descriptors, head, raw.split_words());
                self.free = self.links[usize::from(head)];
            }
            None => write_chain(&descriptors, buffers, |_| {
                let index = self.free;
                self.free = self.links[usize::from(index)];
                (index, self.free)
            }),
        }
        let slot = self.added & (chains.size() - 1);
        memory.area(RingArea::Driver).store_u16(avail::entry(slot) as usize, head, Ordering::Relaxed);
        self.added = self.added.wrapping_add(1);
        head
    }

    #[inline]
    pub(super) fn publish<M: RingMemory>(&mut self, memory: &M) {
        if self.added == self.published {
            return;
        }
        // Release: orders the stores of entries, descriptors and buffers before this one.
        memory.area(RingArea::Driver).store_u16(avail::INDEX as usize, self.added, Ordering::Release);
        self.untold = self.untold.and_then(|untold| untold.checked_add(self.added.wrapping_sub(self.published)));
        self.published = self.added;
    }

    #[inline]
    pub(super) fn needs_kick<M: RingMemory>(&mut self, memory: &M) -> bool {
        let untold = self.untold;
        if untold == Some(0) {
            return false;
        }
        self.untold = Some(0);
        // Orders the store of the avail index before the load of what the device wants; the device does the opposite
        // before it sleeps.
        fence(Ordering::SeqCst);
        let device = memory.area(RingArea::Device);
        match self.notifications {
            Notifications::Flags => device.load_u16(used::FLAGS as usize, Ordering::Relaxed) & SPLIT_SILENT == 0,
            Notifications::EventIdx => {
                let event = device.load_u16(used::avail_event(self.size()) as usize, Ordering::Relaxed);
                untold.is_none_or(|untold| event_passed(event, self.published, untold))
            }
        }
    }

    #[inline]
    pub(super) fn take_used<M: RingMemory>(
        &mut self,
        memory: &M,
        chains: &mut Chains,
    ) -> Result<Option<Used>, DeviceError> {
        if self.taken == self.seen && !self.look(memory, chains)? {
            return Ok(None);
        }
        let (slot, device) = (self.taken & (self.size() - 1), memory.area(RingArea::Device));
        let id = device.load_u32(used::id(slot) as usize, Ordering::Relaxed);
        let written = device.load_u32(used::len(slot) as usize, Ordering::Relaxed);
        let (used, entries) = chains.take(id, written)?;
        self.release(used.token.0, entries);
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(used))
    }

    /// Puts the `entries` descriptors of the chain at `head` before the free ones, by our own links.
    #[inline]
    fn release(&mut self, head: u16, entries: u16) {
        let mut last = head;
        for _ in 1..entries {
            last = self.links[usize::from(last)];
        }
        self.links[usize::from(last)] = self.free;
        self.free = head;
    }

    /// Reads the used index; `true` if there is something to take.
    fn look<M: RingMemory>(&mut self, memory: &M, chains: &Chains) -> Result<bool, DeviceError> {
        // Acquire: orders this load before those of the entries, and of the buffers that came back.
        let index = memory.area(RingArea::Device).load_u16(used::INDEX as usize, Ordering::Acquire);
        let (next, under_way) = (self.taken, chains.under_way);
        if index.wrapping_sub(next) > under_way {
            return Err(DeviceError::UsedIndex { index, next, under_way });
        }
        self.seen = index;
        Ok(index != next)
    }

    #[inline]
    pub(super) fn has_used<M: RingMemory>(&self, memory: &M) -> bool {
        // A hint: `look` loads it again with the order that it needs.
        self.taken != memory.area(RingArea::Device).load_u16(used::INDEX as usize, Ordering::Relaxed)
    }

    pub(super) fn disable_callbacks<M: RingMemory>(&mut self, memory: &M) {
        let driver = memory.area(RingArea::Driver);
        match self.notifications {
            Notifications::Flags => driver.store_u16(avail::FLAGS as usize, SPLIT_SILENT, Ordering::Relaxed),
            // An entry that was used already: the device does not pass it for a lap of the index.
            Notifications::EventIdx => {
                let event = self.taken.wrapping_sub(1);
                driver.store_u16(avail::used_event(self.size()) as usize, event, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn enable_callbacks<M: RingMemory>(&mut self, memory: &M, chains: &Chains) -> Result<bool, DeviceError> {
        let driver = memory.area(RingArea::Driver);
        match self.notifications {
            Notifications::Flags => driver.store_u16(avail::FLAGS as usize, 0, Ordering::Relaxed),
            Notifications::EventIdx => {
                driver.store_u16(avail::used_event(self.size()) as usize, self.taken, Ordering::Relaxed);
            }
        }
        // Orders the store above before the load of the used index; the device does the opposite.
        fence(Ordering::SeqCst);
        self.look(memory, chains)
    }

    #[inline]
    fn size(&self) -> u16 {
        self.links.len() as u16
    }
}

/// Writes a descriptor for each buffer. `place` gives, for the buffer of that number, its index and the next one's.
#[inline]
fn write_chain(table: &HostSlice<'_>, buffers: &[Descriptor], mut place: impl FnMut(u16) -> (u16, u16)) {
    let last = buffers.len() - 1;
    for (number, buffer) in buffers.iter().enumerate() {
        let (index, next) = place(number as u16);
        let (flags, link) = if number == last { (0, 0) } else { (NEXT, next) };
        let raw = Raw { addr: buffer.addr, len: buffer.len, flags: flags | access_flag(buffer), link };
        store_words(table, index, raw.split_words());
    }
}
