//! The driver's half of a split ring (§2.7).

use super::{Chains, Given, IndirectTable, Used, access_flag, store, write_table};
use crate::cells::RingCells;
use crate::wire::{DESCRIPTOR, INDIRECT, NEXT, Raw, SPLIT_SILENT, avail, event_passed, used};
use crate::{Descriptor, DeviceError, Notifications};
use alloc::boxed::Box;
use core::sync::atomic::{Ordering, fence};

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

    #[inline]
    pub(super) fn next_id(&self) -> u16 {
        self.free
    }

    /// There is room, and the table is large enough.
    #[inline]
    pub(super) fn add(
        &mut self,
        cells: &RingCells<'_>,
        buffers: &[Descriptor],
        table: Option<&IndirectTable<'_>>,
        writable: u32,
    ) -> (u16, Given) {
        let head = self.free;
        let given = match table {
            Some(table) => {
                write_table(table, buffers, |number, buffer| words(buffer, number + 1, buffers.len()));
                // As many as fit a queue, so their length fits too.
                let len = DESCRIPTOR * buffers.len() as u32;
                let raw = Raw { addr: table.addr, len, flags: INDIRECT, link: 0 };
                store(&cells.descriptors[usize::from(head)], raw.split_words());
                self.free = self.links[usize::from(head)];
                Given { entries: 1, last: head, writable }
            }
            None => {
                let (mut last, mut next) = (head, head);
                for (number, buffer) in (1..).zip(buffers) {
                    last = next;
                    next = self.links[usize::from(last)];
                    let link = if usize::from(number) == buffers.len() { 0 } else { next };
                    let (addr, rest) = words(buffer, number, buffers.len());
                    store(&cells.descriptors[usize::from(last)], (addr, rest & LINKLESS | u64::from(link) << 48));
                }
                self.free = next;
                Given { entries: buffers.len() as u16, last, writable }
            }
        };
        let slot = self.added & (self.size() - 1);
        cells.avail_entry(slot).store(head.to_le(), Ordering::Relaxed);
        self.added = self.added.wrapping_add(1);
        (head, given)
    }

    #[inline]
    pub(super) fn publish(&mut self, cells: &RingCells<'_>) {
        if self.added == self.published {
            return;
        }
        // Release: orders the stores of entries, descriptors and buffers before this one.
        cells.avail_word(avail::INDEX).store(self.added.to_le(), Ordering::Release);
        self.untold = self.untold.and_then(|untold| untold.checked_add(self.added.wrapping_sub(self.published)));
        self.published = self.added;
    }

    #[inline]
    pub(super) fn needs_kick(&mut self, cells: &RingCells<'_>) -> bool {
        let untold = self.untold;
        if untold == Some(0) {
            return false;
        }
        self.untold = Some(0);
        // Orders the store of the avail index before the load of what the device wants; the device does the opposite
        // before it sleeps.
        fence(Ordering::SeqCst);
        let load = |offset| u16::from_le(cells.used_word(offset).load(Ordering::Relaxed));
        match self.notifications {
            Notifications::Flags => load(used::FLAGS) & SPLIT_SILENT == 0,
            Notifications::EventIdx => {
                let event = load(used::avail_event(self.size()));
                untold.is_none_or(|untold| event_passed(event, self.published, untold))
            }
        }
    }

    #[inline]
    pub(super) fn take_used(
        &mut self,
        cells: &RingCells<'_>,
        chains: &mut Chains,
    ) -> Result<Option<Used>, DeviceError> {
        if self.taken == self.seen && !self.look(cells)? {
            return Ok(None);
        }
        let slot = self.taken & (self.size() - 1);
        let [id, written] = &cells.used_entries[usize::from(slot)];
        let id = u32::from_le(id.load(Ordering::Relaxed));
        let written = u32::from_le(written.load(Ordering::Relaxed));
        let (used, given) = chains.take(id, written)?;
        // The chain goes before the free ones, by our own links.
        self.links[usize::from(given.last)] = self.free;
        self.free = used.token.0;
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(used))
    }

    /// Reads the used index; `true` if there is something to take.
    #[inline]
    fn look(&mut self, cells: &RingCells<'_>) -> Result<bool, DeviceError> {
        // Acquire: orders this load before those of the entries, and of the buffers that came back.
        let index = u16::from_le(cells.used_word(used::INDEX).load(Ordering::Acquire));
        // A ring has no more than half as many entries as there are indices.
        let (next, under_way) = (self.taken, self.added.wrapping_sub(self.taken));
        if index.wrapping_sub(next) > under_way {
            return Err(DeviceError::UsedIndex { index, next, under_way });
        }
        self.seen = index;
        Ok(index != next)
    }

    #[inline]
    pub(super) fn has_used(&self, cells: &RingCells<'_>) -> bool {
        // A hint: `look` loads it again with the order that it needs.
        self.taken != u16::from_le(cells.used_word(used::INDEX).load(Ordering::Relaxed))
    }

    pub(super) fn disable_callbacks(&mut self, cells: &RingCells<'_>) {
        match self.notifications {
            Notifications::Flags => cells.avail_word(avail::FLAGS).store(SPLIT_SILENT.to_le(), Ordering::Relaxed),
            // An entry that was used already: the device does not pass it for a lap of the index.
            Notifications::EventIdx => self.ask_for(cells, self.taken.wrapping_sub(1)),
        }
    }

    pub(super) fn enable_callbacks(&mut self, cells: &RingCells<'_>, _: &Chains) -> Result<bool, DeviceError> {
        match self.notifications {
            Notifications::Flags => cells.avail_word(avail::FLAGS).store(0, Ordering::Relaxed),
            Notifications::EventIdx => self.ask_for(cells, self.taken),
        }
        // Orders the store above before the load of the used index; the device does the opposite.
        fence(Ordering::SeqCst);
        self.look(cells)
    }

    fn ask_for(&self, cells: &RingCells<'_>, event: u16) {
        cells.avail_word(avail::used_event(self.size())).store(event.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn size(&self) -> u16 {
        self.links.len() as u16
    }
}

/// A descriptor without where its chain goes on.
const LINKLESS: u64 = u64::MAX >> 16;

/// The descriptor of the buffer that is number `number`, counted from 1, of `count`, where each is followed by the next.
#[inline]
fn words(buffer: &Descriptor, number: u16, count: usize) -> (u64, u64) {
    let (flags, link) = if usize::from(number) == count { (0, 0) } else { (NEXT, number) };
    Raw { addr: buffer.addr, len: buffer.len, flags: flags | access_flag(buffer), link }.split_words()
}
