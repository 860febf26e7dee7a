//! A queue as whoever looks after the connection sees it, while the queue's own thread serves it.

use crate::link::Incarnation;
use ringfence_device::eventfd as eventfds;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// One queue that runs.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) index: u16,
    /// How many descriptors its ring at the back-end has.
    pub(crate) size: u16,
    /// Wakes the queue's thread. Nobody else has it: a back-end could swallow what we say on one that it shares.
    pub(crate) bell: OwnedFd,
    /// A ring at another back-end, for the thread to move to.
    next: Mutex<Option<Incarnation>>,
    /// Changes when there is one.
    moves: AtomicU64,
    /// The number of the oldest request that the back-end has to answer; 0 for none.
    pub(crate) oldest: AtomicU64,
}

impl Seat {
    pub(crate) fn new(index: u16, size: u16) -> io::Result<Self> {
        Ok(Self {
            index,
            size,
            bell: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            next: Mutex::new(None),
            moves: AtomicU64::new(0),
            oldest: AtomicU64::new(0),
        })
    }

    /// Has the queue's thread move to `ring`.
    pub(crate) fn move_to(&self, ring: Incarnation) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring);
        // Release: who sees the number finds the ring.
        self.moves.fetch_add(1, Ordering::Release);
        self.ring();
    }

    /// How often it was to move.
    #[inline]
    pub(crate) fn moves(&self) -> u64 {
        self.moves.load(Ordering::Acquire)
    }

    /// The ring that it is to move to, once.
    pub(crate) fn take_next(&self) -> Option<Incarnation> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Wakes the queue's thread.
    pub(crate) fn ring(&self) {
        eventfds::ring(self.bell.as_fd());
    }
}
