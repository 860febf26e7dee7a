//! The device's half of a packed ring (§2.8).

use crate::area::{Area, View};
use crate::chain::Tally;
use crate::cursor::Cursor;
use crate::wire::{
    DESCRIPTOR, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, INDIRECT, NEXT, Raw, WRITE, load_words, packed,
    packed_event_passed,
};
use crate::{
    Chain, Format, Head, Indirect, Layout, LayoutError, Notifications, Position, RingArea, RingError, RingStop, Rules,
};
use core::sync::atomic::{Ordering, fence};
use ringfence_dma::{Access, HostSlice, Visit};

#[derive(Debug)]
pub(super) struct Queue {
    state: State,
    /// The ring as the device reads it, and as the device writes it: rights may differ, and which is needed does.
    available: Area,
    used: Area,
    driver: Area,
    device: Area,
}

#[derive(Debug)]
struct State {
    size: u16,
    notifications: Notifications,
    indirect: Indirect,
    /// The next descriptor to take.
    next: Cursor,
    /// The next descriptor to write over with a used one.
    pushed: Cursor,
    /// The same as far as the driver sees.
    published: Cursor,
    /// Descriptors taken and not given back. Counted, because equal cursors mean none as well as all.
    under_way: u16,
    /// The first descriptor of the batch that was not published; what its flags will be.
    first: Option<(u16, u16)>,
    /// How many descriptors were pushed since the last publication.
    unpublished: u16,
    /// How many were published since the driver was last told or found not to care; `None`: nobody knows.
    untold: Option<u32>,
}

pub(super) struct Open<'q, 'v, V> {
    state: &'q mut State,
    available: View<'q, 'v, V>,
    used: View<'q, 'v, V>,
    driver: View<'q, 'v, V>,
    device: View<'q, 'v, V>,
}

impl Queue {
    pub(super) fn new(rules: Rules, layout: Layout, position: Position) -> Result<Self, LayoutError> {
        let Layout { size, .. } = layout;
        let (next, pushed) = (Cursor::from_bits(position.avail), Cursor::from_bits(position.used));
        let under_way = next.ahead_of(pushed, size).ok_or(LayoutError::Position { position, size })?;
        let Rules { format: _, notifications, indirect } = rules;
        Ok(Self {
            state: State {
                size,
                notifications,
                indirect,
                next,
                pushed,
                published: pushed,
                under_way,
                first: None,
                unpublished: 0,
                untold: None,
            },
            available: Area::new(RingArea::Descriptors, &rules, &layout, Access::Read),
            used: Area::new(RingArea::Descriptors, &rules, &layout, Access::Write),
            driver: Area::new(RingArea::Driver, &rules, &layout, Access::Read),
            device: Area::new(RingArea::Device, &rules, &layout, Access::Write),
        })
    }

    #[inline]
    pub(super) fn open<'q, 'v, V: Visit>(&'q mut self, visit: &'v V) -> Open<'q, 'v, V> {
        Open {
            state: &mut self.state,
            available: self.available.view(visit),
            used: self.used.view(visit),
            driver: self.driver.view(visit),
            device: self.device.view(visit),
        }
    }

    pub(super) fn position(&self) -> Position {
        Position { avail: self.state.next.bits(), used: self.state.pushed.bits() }
    }

    pub(super) fn rewound(&self, entries: u16) -> Position {
        let State { size, next, published, .. } = self.state;
        Position { avail: next.retreat(entries, size).bits(), used: published.bits() }
    }

    pub(super) fn under_way(&self) -> u16 {
        self.state.under_way
    }
}

impl<'v, V: Visit> Open<'_, 'v, V> {
    #[inline]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingStop> {
        let Some(first) = self.look()? else { return Ok(false) };
        let head = self.walk(first, chain)?;
        chain.set_head(head);
        self.state.next = self.state.next.advance(head.entries, self.state.size);
        self.state.under_way += head.entries;
        Ok(true)
    }

    /// The descriptor at `next`, if it is available.
    #[inline]
    fn look(&mut self) -> Result<Option<HostSlice<'v>>, RingStop> {
        let State { size, under_way, next, .. } = *self.state;
        // With all of the ring under way, what lies at `next` is what was taken there a lap ago.
        if under_way == size {
            return Ok(None);
        }
        let first = self.available.at(DESCRIPTOR * u32::from(next.index), DESCRIPTOR)?;
        // Acquire: orders this load before those of the rest of the chain, whose head's flags the driver wrote last.
        Ok(next.is_available(first.load_u16(packed::FLAGS, Ordering::Acquire)).then_some(first))
    }

    /// Reads the chain that begins with `first`, at `next`. Its flags are read a second time and count only as read then.
    #[inline]
    fn walk(&mut self, first: HostSlice<'v>, chain: &mut Chain) -> Result<Head, RingStop> {
        chain.begin();
        let State { size, under_way, next, .. } = *self.state;
        let (mut descriptor, mut at, mut tally) = (first, next, Tally::default());
        let mut entries = 1;
        loop {
            let (addr, rest) = load_words(&descriptor);
            let raw = Raw::packed(addr, rest);
            if !at.is_available(raw.flags) {
                return Err(RingError::NotAvailable { index: at.index }.into());
            }
            if raw.has(INDIRECT) {
                self.fold(raw, entries, chain, tally)?;
                return Ok(Head { id: raw.link, entries });
            }
            chain.add(raw, &mut tally)?;
            if !raw.has(NEXT) {
                chain.complete(tally)?;
                return Ok(Head { id: raw.link, entries });
            }
            // The driver owns what is not under way.
            if entries == size - under_way {
                return Err(RingError::ChainTooLong { limit: entries.into() }.into());
            }
            entries += 1;
            at = at.advance(1, size);
            descriptor = self.available.at(DESCRIPTOR * u32::from(at.index), DESCRIPTOR)?;
        }
    }

    /// A table is alone in its chain (§2.8.17).
    fn fold(&self, raw: Raw, entries: u16, chain: &mut Chain, tally: Tally) -> Result<(), RingError> {
        if self.state.indirect == Indirect::Refused {
            return Err(RingError::IndirectRefused);
        }
        if raw.has(NEXT) || entries != 1 {
            return Err(RingError::IndirectInChain);
        }
        chain.fold(raw, Format::Packed, self.state.size, tally)
    }

    /// One used descriptor stands for the whole chain; the others are skipped (§2.8.5). The flags of a batch's first
    /// are left to `publish`: until they are there the driver does not look at the rest.
    #[inline]
    pub(super) fn push(&mut self, head: Head, written: u32) -> Result<(), RingStop> {
        let State { size, pushed, under_way, first, unpublished, .. } = *self.state;
        if head.entries == 0 || under_way < head.entries {
            return Err(RingError::NothingUnderWay.into());
        }
        let descriptor = self.used.at(DESCRIPTOR * u32::from(pushed.index), DESCRIPTOR)?;
        descriptor.store_u32(packed::LEN, written, Ordering::Relaxed);
        descriptor.store_u16(packed::ID, head.id, Ordering::Relaxed);
        let flags = pushed.used_flags() | if written == 0 { 0 } else { WRITE };
        match first {
            None => self.state.first = Some((pushed.index, flags)),
            Some(_) => descriptor.store_u16(packed::FLAGS, flags, Ordering::Relaxed),
        }
        self.state.pushed = pushed.advance(head.entries, size);
        self.state.under_way = under_way - head.entries;
        self.state.unpublished = unpublished + head.entries;
        Ok(())
    }

    #[inline]
    pub(super) fn publish(&mut self) -> Result<(), RingStop> {
        let Some((index, flags)) = self.state.first else { return Ok(()) };
        let descriptor = self.used.at(DESCRIPTOR * u32::from(index), DESCRIPTOR)?;
        // Release: orders the stores of the whole batch, and of the buffers behind it, before this one.
        descriptor.store_u16(packed::FLAGS, flags, Ordering::Release);
        let State { pushed, published, first, unpublished, untold, .. } = &mut *self.state;
        *first = None;
        *published = *pushed;
        *untold = untold.and_then(|untold| untold.checked_add((*unpublished).into()));
        *unpublished = 0;
        Ok(())
    }

    #[inline]
    pub(super) fn needs_notification(&mut self) -> Result<bool, RingStop> {
        let State { size, notifications, published, untold, .. } = *self.state;
        if untold == Some(0) {
            return Ok(false);
        }
        let driver = self.driver.at(0, 4)?;
        // Orders the store of the used flags before the load of what the driver wants. The driver does the opposite
        // before it sleeps; with less than a full fence both could miss each other.
        fence(Ordering::SeqCst);
        let wanted = driver.load_u32(0, Ordering::Relaxed);
        self.state.untold = Some(0);
        let (event, flags) = (wanted as u16, (wanted >> 16) as u16 & 3);
        Ok(match (flags, notifications) {
            (EVENT_DISABLE, _) => false,
            (EVENT_DESC, Notifications::EventIdx) => {
                untold.is_none_or(|untold| packed_event_passed(event, published.index, published.wrap, untold, size))
            }
            // Whatever else it says, being told too often does no harm.
            _ => true,
        })
    }

    #[inline]
    pub(super) fn disable_notifications(&mut self) -> Result<(), RingStop> {
        self.set_event(0, EVENT_DISABLE)
    }

    pub(super) fn enable_notifications(&mut self) -> Result<bool, RingStop> {
        match self.state.notifications {
            Notifications::Flags => self.set_event(0, EVENT_ENABLE)?,
            Notifications::EventIdx => self.set_event(self.state.next.bits(), EVENT_DESC)?,
        }
        // Orders the store above before the load of the next descriptor's flags: the driver does the opposite, so
        // either it sees that it is to tell, or its chain is seen here.
        fence(Ordering::SeqCst);
        Ok(self.look()?.is_some())
    }

    /// Both halves in one store, so that the driver never sees a new flag with an old offset.
    fn set_event(&mut self, event: u16, flags: u16) -> Result<(), RingStop> {
        let event = u32::from(event) | u32::from(flags) << 16;
        self.device.at(0, 4)?.store_u32(0, event, Ordering::Relaxed);
        Ok(())
    }
}
