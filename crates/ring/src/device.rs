//! The device's half of a queue of either format.

mod packed;
mod split;

use crate::{Chain, Format, Head, Layout, LayoutError, Position, RingStop, Rules};
use ringfence_dma::Visit;

/// The device's half of a queue: where it is, and nothing of what the ring holds.
#[derive(Debug)]
pub struct DeviceQueue(Queue);

#[derive(Debug)]
enum Queue {
    Split(split::Queue),
    Packed(packed::Queue),
}

/// A queue for as long as a visit to memory lasts. Opening one costs nothing; what it finds of the ring it remembers
/// until it is dropped, so a batch is best done with one.
///
/// Every method either does all it says or changes nothing and says why: after [`RingStop::Wait`] it is called again
/// when translations have arrived.
pub struct OpenQueue<'q, 'v, V>(Open<'q, 'v, V>);

enum Open<'q, 'v, V> {
    Split(split::Open<'q, 'v, V>),
    Packed(packed::Open<'q, 'v, V>),
}

impl DeviceQueue {
    /// A queue that goes on at `position` of the ring at `layout`.
    ///
    /// # Errors
    /// A size, place or position that no ring of that format has.
    pub fn new(rules: Rules, layout: Layout, position: Position) -> Result<Self, LayoutError> {
        layout.check(rules.format)?;
        Ok(Self(match rules.format {
            Format::Split => Queue::Split(split::Queue::new(rules, layout, position)?),
            Format::Packed => Queue::Packed(packed::Queue::new(rules, layout, position)?),
        }))
    }

    /// A queue that goes on where vhost-user's `SET_VRING_BASE` says. Of a split ring that says nothing of the used index,
    /// which is read from the ring: it is behind the other where somebody else took chains and did not end them.
    ///
    /// # Errors
    /// As [`DeviceQueue::new`]; a number that is no position.
    pub fn at_vring_base(rules: Rules, layout: Layout, base: u32) -> Result<Self, LayoutError> {
        let mut queue = Self::new(rules, layout, Position::from_vring_base(rules.format, base)?)?;
        if let Queue::Split(split) = &mut queue.0 {
            split.adopt();
        }
        Ok(queue)
    }

    /// The queue during `visit`.
    #[inline]
    pub fn open<'q, 'v, V: Visit>(&'q mut self, visit: &'v V) -> OpenQueue<'q, 'v, V> {
        OpenQueue(match &mut self.0 {
            Queue::Split(queue) => Open::Split(queue.open(visit)),
            Queue::Packed(queue) => Open::Packed(queue.open(visit)),
        })
    }

    /// Where the queue is: behind what was popped and what was pushed, published or not.
    pub fn position(&self) -> Position {
        match &self.0 {
            Queue::Split(queue) => queue.position(),
            Queue::Packed(queue) => queue.position(),
        }
    }

    /// Where the queue is as far as the driver sees, behind what was published, if the last `entries` of the ring that were
    /// popped had not been. A queue that goes on from here pops those again, and pushes again what was pushed and not
    /// published.
    ///
    /// None of those may have been pushed: a packed ring has what was pushed where a chain was.
    pub fn rewound(&self, entries: u16) -> Position {
        assert!(entries <= self.under_way(), "{entries} entries, of {} that are under way", self.under_way());
        match &self.0 {
            Queue::Split(queue) => queue.rewound(entries),
            Queue::Packed(queue) => queue.rewound(entries),
        }
    }

    /// How many entries of the ring are popped and not pushed: chains in a split ring, descriptors in a packed one.
    pub fn under_way(&self) -> u16 {
        match &self.0 {
            Queue::Split(queue) => queue.under_way(),
            Queue::Packed(queue) => queue.under_way(),
        }
    }
}

macro_rules! either {
    ($self:ident, $queue:ident => $call:expr) => {
        match &mut $self.0 {
            Open::Split($queue) => $call,
            Open::Packed($queue) => $call,
        }
    };
}

impl<V: Visit> OpenQueue<'_, '_, V> {
    /// Takes the next chain; `false` if there is none. An indirect table is left to [`Chain::expand`].
    ///
    /// # Errors
    /// Those of [`RingStop`]; `chain` then holds nothing of use.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingStop> {
        either!(self, queue => queue.pop(chain))
    }

    /// Gives a chain back, in any order, of whose writable bytes the first `written` were written. The driver sees it
    /// after [`Self::publish`].
    ///
    /// # Errors
    /// Those of [`RingStop`].
    #[inline]
    pub fn push(&mut self, head: Head, written: u32) -> Result<(), RingStop> {
        either!(self, queue => queue.push(head, written))
    }

    /// Shows the driver, all at once, what was pushed since the last time.
    ///
    /// # Errors
    /// Those of [`RingStop`], `Broken` apart.
    #[inline]
    pub fn publish(&mut self) -> Result<(), RingStop> {
        either!(self, queue => queue.publish())
    }

    /// Whether the driver wants to be told of what was published since this was last answered. Where that is not known,
    /// as for a queue that goes on after somebody else, it is told.
    ///
    /// # Errors
    /// Those of [`RingStop`], `Broken` apart.
    #[inline]
    pub fn needs_notification(&mut self) -> Result<bool, RingStop> {
        either!(self, queue => queue.needs_notification())
    }

    /// Lets the driver know that it need not tell of new chains. It may all the same.
    ///
    /// # Errors
    /// Those of [`RingStop`], `Broken` apart.
    #[inline]
    pub fn disable_notifications(&mut self) -> Result<(), RingStop> {
        either!(self, queue => queue.disable_notifications())
    }

    /// Asks the driver to tell of the next chain. `true`: there is one already, so go on instead of sleeping.
    ///
    /// # Errors
    /// Those of [`RingStop`]; notifications may be enabled all the same.
    #[inline]
    pub fn enable_notifications(&mut self) -> Result<bool, RingStop> {
        either!(self, queue => queue.enable_notifications())
    }
}
