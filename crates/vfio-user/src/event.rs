//! Eventfds, ours and the client's.

use ringfence_device::{Bell, eventfd as eventfds};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// An eventfd that nobody waits on when it is written or read.
#[derive(Debug)]
pub(crate) struct Event {
    fd: OwnedFd,
    /// What rings it, where the client has it too and may do to it what it likes.
    theirs: Option<Mutex<Bell>>,
}

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { fd: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?, theirs: None })
    }

    /// One that the client is given too.
    pub(crate) fn shared() -> io::Result<Self> {
        Self::both(Self::new()?.fd)
    }

    /// One that the client made.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn of(fd: OwnedFd) -> io::Result<Self> {
        Self::both(eventfds::of_stranger(fd)?)
    }

    fn both(fd: OwnedFd) -> io::Result<Self> {
        let bell = Bell::new(fd.try_clone()?);
        Ok(Self { fd, theirs: Some(Mutex::new(bell)) })
    }

    /// Adds one. One that is full already says what it should.
    pub(crate) fn ring(&self) {
        match &self.theirs {
            Some(bell) => bell.lock().unwrap_or_else(PoisonError::into_inner).ring(),
            None => eventfds::ring(self.as_fd()),
        }
    }

    /// Whether it was rung since the last time.
    pub(crate) fn take(&self) -> bool {
        eventfds::hush(self.as_fd())
    }

    /// Whether it was rung and not taken.
    pub(crate) fn is_rung(&self) -> bool {
        crate::server::is_readable(self.as_fd())
    }

    pub(crate) fn try_clone(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{OFlags, fcntl_setfl};

    /// Whoever waits here waits for ever.
    #[test]
    fn what_the_client_has_too_holds_nobody_up() {
        let theirs = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let lines = [Event::of(theirs.try_clone().unwrap()).unwrap(), Event::shared().unwrap()];
        for line in lines {
            fcntl_setfl(&line, OFlags::empty()).unwrap();
            assert!(!line.take());
            rustix::io::write(&line, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            (0..3).for_each(|_| line.ring());
            assert!(line.is_rung() && line.take());
            assert!(!line.take());
        }
        assert!(Event::of(io::pipe().unwrap().1.into()).is_err(), "a pipe can be full");
    }
}
