//! The device's half of a split ring (§2.7).

use crate::area::{Area, View};
use crate::chain::Tally;
use crate::wire::{DESCRIPTOR, INDIRECT, NEXT, Raw, SPLIT_SILENT, avail, event_passed, load_words, used};
use crate::{
    Chain, Format, Head, Indirect, Layout, LayoutError, Notifications, Position, RingArea, RingError, RingStop, Rules,
};
use core::sync::atomic::{Ordering, fence};
use ringfence_dma::{Access, Visit};

#[derive(Debug)]
pub(super) struct Queue {
    state: State,
    descriptors: Area,
    avail: Area,
    used: Area,
}

/// All indices are free-running; `published`, `pushed`, `next`, `seen` follow each other, and from the first to the last
/// it is `size` at the most.
#[derive(Debug)]
struct State {
    size: u16,
    notifications: Notifications,
    indirect: Indirect,
    /// The avail index as last read.
    seen: u16,
    /// The next avail entry to take.
    next: u16,
    /// The next used entry to write.
    pushed: u16,
    /// The used index that the driver sees.
    published: u16,
    /// It is still to be read from the ring: nothing was popped yet.
    adopts: bool,
    /// How many entries were published since the driver was last told or found not to care; `None`: nobody knows.
    untold: Option<u16>,
}

pub(super) struct Open<'q, 'v, V> {
    state: &'q mut State,
    descriptors: View<'q, 'v, V>,
    avail: View<'q, 'v, V>,
    used: View<'q, 'v, V>,
}

impl Queue {
    pub(super) fn new(rules: Rules, layout: Layout, position: Position) -> Result<Self, LayoutError> {
        let Layout { size, .. } = layout;
        let Position { avail, used } = position;
        if avail.wrapping_sub(used) > size {
            return Err(LayoutError::Position { position, size });
        }
        let Rules { format: _, notifications, indirect } = rules;
        Ok(Self {
            state: State {
                size,
                notifications,
                indirect,
                seen: avail,
                next: avail,
                pushed: used,
                published: used,
                adopts: false,
                untold: None,
            },
            descriptors: Area::new(RingArea::Descriptors, &rules, &layout, Access::Read),
            avail: Area::new(RingArea::Driver, &rules, &layout, Access::Read),
            used: Area::new(RingArea::Device, &rules, &layout, Access::Write),
        })
    }

    /// The used index is what the ring says, before anything is popped.
    pub(super) fn adopt(&mut self) {
        self.state.adopts = true;
    }

    #[inline]
    pub(super) fn open<'q, 'v, V: Visit>(&'q mut self, visit: &'v V) -> Open<'q, 'v, V> {
        Open {
            state: &mut self.state,
            descriptors: self.descriptors.view(visit),
            avail: self.avail.view(visit),
            used: self.used.view(visit),
        }
    }

    pub(super) fn position(&self) -> Position {
        Position { avail: self.state.next, used: self.state.pushed }
    }

    pub(super) fn rewound(&self, entries: u16) -> Position {
        Position { avail: self.state.next.wrapping_sub(entries), used: self.state.published }
    }

    pub(super) fn under_way(&self) -> u16 {
        self.state.under_way()
    }
}

impl State {
    #[inline]
    fn under_way(&self) -> u16 {
        self.next.wrapping_sub(self.pushed)
    }

    /// The slot of the entry with this index: the size is a power of two.
    #[inline]
    fn slot(&self, index: u16) -> u16 {
        index & (self.size - 1)
    }
}

impl<V: Visit> Open<'_, '_, V> {
    #[inline]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingStop> {
        if self.state.next == self.state.seen && !self.look()? {
            return Ok(false);
        }
        let head = self.avail.at(avail::entry(self.state.slot(self.state.next)), 2)?.load_u16(0, Ordering::Relaxed);
        self.walk(head, chain)?;
        chain.set_head(Head { id: head, entries: 1 });
        self.state.next = self.state.next.wrapping_add(1);
        Ok(true)
    }

    /// Reads the avail index; `true` if there is something to take.
    fn look(&mut self) -> Result<bool, RingStop> {
        if self.state.adopts {
            self.adopt()?;
        }
        let avail = self.avail.at(avail::INDEX, 2)?;
        // Acquire: orders this load before those of the entries and descriptors that it makes known.
        let index = avail.load_u16(0, Ordering::Acquire);
        let State { size, next, .. } = *self.state;
        // The driver owns what is not under way.
        let room = size - self.state.under_way();
        if index.wrapping_sub(next) > room {
            return Err(RingError::AvailIndex { index, next, room }.into());
        }
        self.state.seen = index;
        Ok(index != next)
    }

    #[cold]
    fn adopt(&mut self) -> Result<(), RingStop> {
        let used = self.used.at(used::INDEX, 2)?.load_u16(0, Ordering::Relaxed);
        let State { size, next, .. } = self.state;
        // No ring is further behind: it is no used index, and whoever gave the other one is to be believed.
        if next.wrapping_sub(used) <= *size {
            (self.state.pushed, self.state.published) = (used, used);
        }
        self.state.adopts = false;
        Ok(())
    }

    #[inline]
    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingStop> {
        chain.begin();
        let size = self.state.size;
        let (mut index, mut tally) = (head, Tally::default());
        for _ in 0..size {
            if index >= size {
                return Err(RingError::NoSuchDescriptor { index, count: size.into() }.into());
            }
            let (addr, rest) = load_words(&self.descriptors.at(DESCRIPTOR * u32::from(index), DESCRIPTOR)?);
            let raw = Raw::split(addr, rest);
            if raw.has(INDIRECT) {
                return Ok(self.fold(raw, chain, tally)?);
            }
            chain.add(raw, &mut tally)?;
            if !raw.has(NEXT) {
                return Ok(chain.complete(tally)?);
            }
            index = raw.link;
        }
        Err(RingError::ChainTooLong { limit: size.into() }.into())
    }

    /// A table ends its chain and may have direct descriptors before it (§2.7.5.3.2).
    fn fold(&self, raw: Raw, chain: &mut Chain, tally: Tally) -> Result<(), RingError> {
        if self.state.indirect == Indirect::Refused {
            return Err(RingError::IndirectRefused);
        }
        if raw.has(NEXT) {
            return Err(RingError::IndirectInChain);
        }
        chain.fold(raw, Format::Split, self.state.size, tally)
    }

    #[inline]
    pub(super) fn push(&mut self, head: Head, written: u32) -> Result<(), RingStop> {
        if self.state.under_way() == 0 {
            return Err(RingError::NothingUnderWay.into());
        }
        let slot = self.state.slot(self.state.pushed);
        let (id, len) = match self.used.seen(used::id(slot), 8) {
            Some(entry) => (entry.sub(0, 4), entry.sub(4, 4)),
            // An entry has 8 bytes and is aligned to 4, so its halves may lie on two pages.
            None => (self.used.at(used::id(slot), 4)?, self.used.at(used::len(slot), 4)?),
        };
        id.store_u32(0, head.id.into(), Ordering::Relaxed);
        len.store_u32(0, written, Ordering::Relaxed);
        self.state.pushed = self.state.pushed.wrapping_add(1);
        Ok(())
    }

    #[inline]
    pub(super) fn publish(&mut self) -> Result<(), RingStop> {
        let State { pushed, published, untold, .. } = *self.state;
        if pushed == published {
            return Ok(());
        }
        let used = self.used.at(used::INDEX, 2)?;
        // Release: orders the stores of the entries, and of the buffers behind them, before this one.
        used.store_u16(0, pushed, Ordering::Release);
        self.state.published = pushed;
        self.state.untold = untold.and_then(|untold| untold.checked_add(pushed.wrapping_sub(published)));
        Ok(())
    }

    #[inline]
    pub(super) fn needs_notification(&mut self) -> Result<bool, RingStop> {
        let State { size, notifications, published, untold, .. } = *self.state;
        if untold == Some(0) {
            return Ok(false);
        }
        let offset = match notifications {
            Notifications::Flags => avail::FLAGS,
            Notifications::EventIdx => avail::used_event(size),
        };
        let avail = self.avail.at(offset, 2)?;
        // Orders the store of the used index before the load of what the driver wants. The driver does the opposite
        // before it sleeps; with less than a full fence both could miss each other.
        fence(Ordering::SeqCst);
        let wanted = avail.load_u16(0, Ordering::Relaxed);
        self.state.untold = Some(0);
        Ok(match notifications {
            Notifications::Flags => wanted & SPLIT_SILENT == 0,
            Notifications::EventIdx => untold.is_none_or(|untold| event_passed(wanted, published, untold)),
        })
    }

    #[inline]
    pub(super) fn disable_notifications(&mut self) -> Result<(), RingStop> {
        match self.state.notifications {
            Notifications::Flags => self.set_flags(SPLIT_SILENT),
            // `avail_event` stays behind, where the driver will not pass it for a lap of the index.
            Notifications::EventIdx => Ok(()),
        }
    }

    pub(super) fn enable_notifications(&mut self) -> Result<bool, RingStop> {
        match self.state.notifications {
            Notifications::Flags => self.set_flags(0)?,
            Notifications::EventIdx => {
                let event = self.used.at(used::avail_event(self.state.size), 2)?;
                event.store_u16(0, self.state.next, Ordering::Relaxed);
            }
        }
        // Orders the store above before the load of the avail index in `look`: the driver does the opposite, so
        // either it sees that it is to tell, or its chain is seen here.
        fence(Ordering::SeqCst);
        self.look()
    }

    fn set_flags(&mut self, flags: u16) -> Result<(), RingStop> {
        self.used.at(used::FLAGS, 2)?.store_u16(0, flags, Ordering::Relaxed);
        Ok(())
    }
}
