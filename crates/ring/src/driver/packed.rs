//! The driver's half of a packed ring (§2.8).

use super::{Chains, IndirectTable, RingMemory, Used, access_flag};
use crate::cursor::Cursor;
use crate::wire::{
    DESCRIPTOR, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, INDIRECT, NEXT, Raw, descriptor, packed, packed_event_passed,
    store_words,
};
use crate::{Descriptor, DeviceError, Notifications, RingArea};
use alloc::boxed::Box;
use core::sync::atomic::{Ordering, fence};
use ringfence_dma::HostSlice;

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
    /// The head of the first chain that was not published; what its flags will be.
    first: Option<(u16, u16)>,
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

    /// There is room, and the table is large enough. The flags of a batch's first head are left to `publish`: until
    /// they are there the device does not look at the rest.
    #[inline]
    pub(super) fn add<M: RingMemory>(
        &mut self,
        memory: &M,
        chains: &Chains,
        buffers: &[Descriptor],
        table: Option<&IndirectTable<'_>>,
    ) -> u16 {
        let descriptors = memory.area(RingArea::Descriptors);
        let id = self.free;
        self.free = self.links[usize::from(id)];
        let size = chains.size();
        let entries = match table {
            Some(table) => {
                for (number, buffer) in buffers.iter().enumerate() {
                    // The id and all other flags mean nothing here (§2.8.7).
                    let raw = Raw { addr: buffer.addr, len: buffer.len, flags: access_flag(buffer), link: 0 };
                    store_words(&table.memory, number as u16, raw.packed_words());
                }
                // As many as fit a queue, so their length fits too.
                let len = DESCRIPTOR * buffers.len() as u32;
                let flags = INDIRECT | self.added.available_flags();
                self.put(&descriptors, self.added, Raw { addr: table.addr, len, flags, link: id });
                1
            }
            None => {
                let mut at = self.added;
                for (number, buffer) in buffers.iter().enumerate() {
                    let next = if number + 1 == buffers.len() { 0 } else { NEXT };
                    let flags = next | access_flag(buffer) | at.available_flags();
                    self.put(&descriptors, at, Raw { addr: buffer.addr, len: buffer.len, flags, link: id });
                    at = at.advance(1, size);
                }
                buffers.len() as u16
            }
        };
        self.added = self.added.advance(entries, size);
        self.unpublished += u32::from(entries);
        id
    }

    /// Writes a descriptor; of the first since the last publication all but the flags.
    #[inline]
    fn put(&mut self, descriptors: &HostSlice<'_>, at: Cursor, raw: Raw) {
        if self.first.is_some() {
            store_words(descriptors, at.index, raw.packed_words());
            return;
        }
        self.first = Some((at.index, raw.flags));
        let descriptor = descriptor(descriptors, at.index);
        descriptor.store_u64(0, raw.addr.0, Ordering::Relaxed);
        descriptor.store_u32(packed::LEN, raw.len, Ordering::Relaxed);
        descriptor.store_u16(packed::ID, raw.link, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn publish<M: RingMemory>(&mut self, memory: &M) {
        let Some((index, flags)) = self.first.take() else { return };
        let descriptor = descriptor(&memory.area(RingArea::Descriptors), index);
        // Release: orders the stores of the whole batch, and of the buffers behind it, before this one.
        descriptor.store_u16(packed::FLAGS, flags, Ordering::Release);
        self.published = self.added;
        self.untold = self.untold.saturating_add(self.unpublished);
        self.unpublished = 0;
    }

    #[inline]
    pub(super) fn needs_kick<M: RingMemory>(&mut self, memory: &M) -> bool {
        let untold = self.untold;
        if untold == 0 {
            return false;
        }
        self.untold = 0;
        // Orders the store of the head's flags before the load of what the device wants; the device does the opposite
        // before it sleeps.
        fence(Ordering::SeqCst);
        let wanted = memory.area(RingArea::Device).load_u32(0, Ordering::Relaxed);
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
    pub(super) fn take_used<M: RingMemory>(
        &mut self,
        memory: &M,
        chains: &mut Chains,
    ) -> Result<Option<Used>, DeviceError> {
        if !self.look(memory, chains)? {
            return Ok(None);
        }
        let descriptor = descriptor(&memory.area(RingArea::Descriptors), self.taken.index);
        let id = descriptor.load_u16(packed::ID, Ordering::Relaxed);
        let written = descriptor.load_u32(packed::LEN, Ordering::Relaxed);
        let (used, entries) = chains.take(id.into(), written)?;
        self.links[usize::from(id)] = self.free;
        self.free = id;
        self.taken = self.taken.advance(entries, chains.size());
        Ok(Some(used))
    }

    /// Whether there is something to take.
    #[inline]
    fn look<M: RingMemory>(&self, memory: &M, chains: &Chains) -> Result<bool, DeviceError> {
        let descriptor = descriptor(&memory.area(RingArea::Descriptors), self.taken.index);
        // Acquire: orders this load before those of the rest, and of the buffers that came back.
        let flags = descriptor.load_u16(packed::FLAGS, Ordering::Acquire);
        match (self.taken.is_used(flags), chains.under_way) {
            (false, _) => Ok(false),
            (true, 0) => Err(DeviceError::NothingUnderWay),
            (true, _) => Ok(true),
        }
    }

    #[inline]
    pub(super) fn has_used<M: RingMemory>(&self, memory: &M) -> bool {
        // A hint: `look` loads it again with the order that it needs.
        let descriptor = descriptor(&memory.area(RingArea::Descriptors), self.taken.index);
        self.taken.is_used(descriptor.load_u16(packed::FLAGS, Ordering::Relaxed))
    }

    pub(super) fn disable_callbacks<M: RingMemory>(&mut self, memory: &M) {
        set_event(memory, 0, EVENT_DISABLE);
    }

    pub(super) fn enable_callbacks<M: RingMemory>(&mut self, memory: &M, chains: &Chains) -> Result<bool, DeviceError> {
        match self.notifications {
            Notifications::Flags => set_event(memory, 0, EVENT_ENABLE),
            Notifications::EventIdx => set_event(memory, self.taken.bits(), EVENT_DESC),
        }
        // Orders the store above before the load of the next descriptor's flags; the device does the opposite.
        fence(Ordering::SeqCst);
        self.look(memory, chains)
    }

    #[inline]
    fn size(&self) -> u16 {
        self.links.len() as u16
    }
}

/// Both halves in one store, so that the device never sees a new flag with an old offset.
fn set_event<M: RingMemory>(memory: &M, event: u16, flags: u16) {
    let event = u32::from(event) | u32::from(flags) << 16;
    memory.area(RingArea::Driver).store_u32(0, event, Ordering::Relaxed);
}
