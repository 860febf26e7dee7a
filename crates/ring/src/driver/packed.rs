//! The driver's half of a packed ring (§2.8).

use super::{Chains, Given, IndirectTable, Used, access_flag, store, write_table};
use crate::cells::RingCells;
use crate::cursor::Cursor;
use crate::wire::{DESCRIPTOR, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, INDIRECT, NEXT, Raw, packed_event_passed};
use crate::{Descriptor, DeviceError, Notifications};
use alloc::boxed::Box;
use core::sync::atomic::{Ordering, fence};

#[derive(Debug)]
pub(super) struct Ring {
    notifications: Notifications,
    /// From each free id to the next.
    links: Box<[u16]>,
    /// The first free id, where there is one.
    free: u16,
    /// The next descriptor to write.
    added: Cursor,
    /// The same as far as the device sees.
    published: Cursor,
    /// The head of the first chain that was not published, and its second word, in which its flags are.
    first: Option<(u16, u64)>,
    /// How many descriptors were added since the last publication.
    unpublished: u32,
    /// How many were published since the device was last told or found not to care.
    untold: u32,
    /// Where the device writes its next used descriptor.
    taken: Cursor,
}

impl Ring {
    pub(super) fn new(size: u16, notifications: Notifications) -> Self {
        Self {
            notifications,
            // The last links to an id that is not there, and is never followed: `Chains` counts the free ones.
            links: (1..=size).collect(),
            free: 0,
            added: Cursor::START,
            published: Cursor::START,
            first: None,
            unpublished: 0,
            untold: 0,
            taken: Cursor::START,
        }
    }

    #[inline]
    pub(super) fn next_id(&self) -> u16 {
        self.free
    }

    /// There is room, and the table is large enough. The second word of a batch's first head is left to `publish`: until
    /// its flags are there the device does not look at the rest.
    #[inline]
    pub(super) fn add(
        &mut self,
        cells: &RingCells<'_>,
        buffers: &[Descriptor],
        table: Option<&IndirectTable<'_>>,
        writable: u32,
    ) -> (u16, Given) {
        let id = self.free;
        self.free = self.links[usize::from(id)];
        let head = self.added;
        let (head_words, entries) = match table {
            Some(table) => {
                // The id and all other flags mean nothing here (§2.8.7).
                write_table(table, buffers, |_, buffer| {
                    Raw { addr: buffer.addr, len: buffer.len, flags: access_flag(buffer), link: 0 }.packed_words()
                });
                // As many as fit a queue, so their length fits too.
                let len = DESCRIPTOR * buffers.len() as u32;
                let flags = INDIRECT | head.available_flags();
                (Raw { addr: table.addr, len, flags, link: id }.packed_words(), 1)
            }
            None => {
                let words = |at: Cursor, number, buffer: &Descriptor| {
                    let next = if number == buffers.len() { 0 } else { NEXT };
                    let flags = next | access_flag(buffer) | at.available_flags();
                    Raw { addr: buffer.addr, len: buffer.len, flags, link: id }.packed_words()
                };
                let mut at = head;
                for (number, buffer) in (1..).zip(buffers).skip(1) {
                    at = at.advance(1, self.size());
                    store(&cells.descriptors[usize::from(at.index)], words(at, number, buffer));
                }
                (words(head, 1, &buffers[0]), buffers.len() as u16)
            }
        };
        let cell = &cells.descriptors[usize::from(head.index)];
        match self.first {
            Some(_) => store(cell, head_words),
            None => {
                cell[0].store(head_words.0.to_le(), Ordering::Relaxed);
                self.first = Some((head.index, head_words.1));
            }
        }
        self.added = head.advance(entries, self.size());
        self.unpublished += u32::from(entries);
        (id, Given { entries, last: id, writable })
    }

    #[inline]
    pub(super) fn publish(&mut self, cells: &RingCells<'_>) {
        let Some((index, rest)) = self.first.take() else { return };
        // Release: orders the stores of the whole batch, and of the buffers behind it, before this one.
        cells.descriptors[usize::from(index)][1].store(rest.to_le(), Ordering::Release);
        self.published = self.added;
        self.untold = self.untold.saturating_add(self.unpublished);
        self.unpublished = 0;
    }

    #[inline]
    pub(super) fn needs_kick(&mut self, cells: &RingCells<'_>) -> bool {
        let untold = self.untold;
        if untold == 0 {
            return false;
        }
        self.untold = 0;
        // Orders the store of the head's flags before the load of what the device wants; the device does the opposite
        // before it sleeps.
        fence(Ordering::SeqCst);
        let wanted = u32::from_le(cells.events[1][0].load(Ordering::Relaxed));
        let (event, flags) = (wanted as u16, (wanted >> 16) as u16 & 3);
        match (flags, self.notifications) {
            (EVENT_DISABLE, _) => false,
            (EVENT_DESC, Notifications::EventIdx) => {
                let Cursor { index, wrap } = self.published;
                packed_event_passed(event, index, wrap, untold, self.size())
            }
            _ => true,
        }
    }

    #[inline]
    pub(super) fn take_used(
        &mut self,
        cells: &RingCells<'_>,
        chains: &mut Chains,
    ) -> Result<Option<Used>, DeviceError> {
        let Some(Raw { len: written, link: id, .. }) = self.look(cells, chains)? else { return Ok(None) };
        let (used, given) = chains.take(id.into(), written)?;
        self.links[usize::from(id)] = self.free;
        self.free = id;
        self.taken = self.taken.advance(given.entries, self.size());
        Ok(Some(used))
    }

    /// The next used descriptor, if the device has written it: all of it in one load, so that its flags speak of the rest.
    #[inline]
    fn look(&self, cells: &RingCells<'_>, chains: &Chains) -> Result<Option<Raw>, DeviceError> {
        // Acquire: orders this load before those of the buffers that came back.
        let raw = self.next(cells, Ordering::Acquire);
        match self.taken.is_used(raw.flags) {
            false => Ok(None),
            true if chains.are_all_back() => Err(DeviceError::NothingUnderWay),
            true => Ok(Some(raw)),
        }
    }

    /// What the device used next, or did not.
    #[inline]
    fn next(&self, cells: &RingCells<'_>, order: Ordering) -> Raw {
        let rest = cells.descriptors[usize::from(self.taken.index)][1].load(order);
        Raw::packed(0, u64::from_le(rest))
    }

    #[inline]
    pub(super) fn has_used(&self, cells: &RingCells<'_>) -> bool {
        // A hint: `look` loads it again with the order that it needs.
        self.taken.is_used(self.next(cells, Ordering::Relaxed).flags)
    }

    pub(super) fn disable_callbacks(&mut self, cells: &RingCells<'_>) {
        set_event(cells, 0, EVENT_DISABLE);
    }

    pub(super) fn enable_callbacks(&mut self, cells: &RingCells<'_>, chains: &Chains) -> Result<bool, DeviceError> {
        match self.notifications {
            Notifications::Flags => set_event(cells, 0, EVENT_ENABLE),
            Notifications::EventIdx => set_event(cells, self.taken.bits(), EVENT_DESC),
        }
        // Orders the store above before the load of the next descriptor's flags; the device does the opposite.
        fence(Ordering::SeqCst);
        Ok(self.look(cells, chains)?.is_some())
    }

    #[inline]
    fn size(&self) -> u16 {
        self.links.len() as u16
    }
}

/// Both halves in one store, so that the device never sees a new flag with an old offset.
fn set_event(cells: &RingCells<'_>, event: u16, flags: u16) {
    let event = u32::from(event) | u32::from(flags) << 16;
    cells.events[0][0].store(event.to_le(), Ordering::Relaxed);
}
