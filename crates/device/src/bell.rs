//! An eventfd that a stranger has too.

use io_uring::{IoUring, opcode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Rings somebody who shares the eventfd, and may do to it whatever he likes.
///
/// Both flags and count of an eventfd belong to all who have it. A stranger can make it blocking and fill it, and whoever
/// writes to it then waits until the stranger reads, which may be never; a look before the write, or a read, leaves him the
/// time between. So nothing is ever written: the kernel itself counts a completion of an `io_uring` on it, and that neither
/// waits nor fails where the count is full.
#[derive(Debug)]
pub struct Bell {
    fd: OwnedFd,
    with: With,
}

/// What a bell is rung with.
#[derive(Debug)]
enum With {
    /// Not rung yet: many never are.
    Nothing,
    Ring(Box<Ringer>),
    /// Where the kernel gives no `io_uring`, as in some containers.
    Write,
}

struct Ringer(IoUring);

impl std::fmt::Debug for Ringer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ringer")
    }
}

impl Bell {
    /// Rings `fd`. Where `io_uring` is not to be had it is looked at before each write: a stranger then needs luck.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, with: With::Nothing }
    }

    /// Adds one. One that is full already says what it should.
    pub fn ring(&mut self) {
        if let With::Nothing = self.with {
            self.with = Ringer::new(self.fd.as_fd()).map_or_else(
                |error| {
                    tracing::debug!("no io_uring to ring with: {error}");
                    With::Write
                },
                |ring| With::Ring(Box::new(ring)),
            );
        }
        match &mut self.with {
            With::Ring(ring) => ring.ring(),
            With::Nothing | With::Write => {
                let mut room = [PollFd::new(&self.fd, PollFlags::OUT)];
                if poll(&mut room, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1) {
                    let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
                }
            }
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Ringer {
    fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(2)?;
        ring.submitter().register_eventfd(fd.as_raw_fd())?;
        Ok(Self(ring))
    }

    fn ring(&mut self) {
        // SAFETY: a no-op refers to no memory and to no file.
        let pushed = unsafe { self.0.submission().push(&opcode::Nop::new().build()) };
        // One that is still there from a try that failed rings as well.
        let _ = pushed;
        // The kernel may be short of something, or a signal come: as often as a bound, for what is lost is a wake-up.
        for _ in 0..TRIES {
            let submitted = self.0.submit();
            self.0.completion().for_each(drop);
            if submitted.is_ok() {
                break;
            }
        }
    }
}

const TRIES: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{OFlags, fcntl_setfl};

    fn bells() -> [Bell; 2] {
        let bell = || Bell::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        [bell(), Bell { with: With::Write, ..bell() }]
    }

    fn count(bell: &Bell) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(&bell.fd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }

    #[test]
    fn each_ring_counts() {
        for mut bell in bells() {
            assert_eq!(count(&bell), 0);
            for times in 1..20 {
                (0..times).for_each(|_| bell.ring());
                assert_eq!(count(&bell), times);
            }
        }
    }

    /// Whoever waits here waits for ever.
    #[test]
    fn one_that_was_filled_and_made_to_block_holds_nobody_up() {
        for mut bell in bells() {
            fcntl_setfl(&bell.fd, OFlags::empty()).unwrap();
            rustix::io::write(&bell.fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            (0..20).for_each(|_| bell.ring());
            assert!(count(&bell) >= u64::MAX - 1);
            bell.ring();
            assert_eq!(count(&bell), 1);
        }
    }
}
