//! Eventfds, ours and a stranger's, which are read without ever waiting.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the kernel calls an eventfd, whatever its file system is called.
const NAME: &[u8] = b"anon_inode:[eventfd]";

/// How many descriptors that are none may wait for being closed. Those that come then are never.
const MOST_CLOSING: usize = 16;

static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// What a stranger gave for an eventfd, if it is one.
///
/// Only of an eventfd is it known that looking at it, or closing it, waits for nobody: both can mean a question to whoever
/// serves the file system, who may be the stranger and does not answer. So what is none is closed by a thread that has the
/// time. Where there is no `/proc` the stranger is believed.
///
/// # Errors
/// It is none.
pub fn of_stranger(fd: OwnedFd) -> io::Result<OwnedFd> {
    // The kernel has the link's content without asking anybody, as it has the file's state not.
    match rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()) {
        Ok(link) if link.as_bytes() != NAME => {
            let found = link.to_string_lossy().into_owned();
            close_aside(fd);
            Err(io::Error::new(io::ErrorKind::InvalidInput, format!("no eventfd but {found}")))
        }
        Ok(_) | Err(_) => Ok(fd),
    }
}

fn close_aside(fd: OwnedFd) {
    if CLOSING.fetch_add(1, Ordering::Relaxed) < MOST_CLOSING {
        let close = move || {
            drop(fd);
            CLOSING.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().name("closing".to_owned()).spawn(close).is_ok() {
            return;
        }
    } else {
        std::mem::forget(fd);
    }
    CLOSING.fetch_sub(1, Ordering::Relaxed);
}

/// Adds one to an eventfd of our own. One that is full already says what it should.
pub fn ring(ours: BorrowedFd<'_>) {
    let _ = rustix::io::write(ours, &1u64.to_ne_bytes());
}

/// Empties an eventfd, whether or not it is one that waits where it is empty: whoever else has it decides that, and may
/// empty it before us. `false`: it was empty.
pub fn hush(fd: BorrowedFd<'_>) -> bool {
    loop {
        let mut count = [0; 8];
        // From where the file is: it is no file with places.
        match preadv2(fd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT) {
            Err(Errno::INTR) => {}
            // Linux before 5.8: a stranger then needs luck.
            Err(Errno::OPNOTSUPP) => {
                let mut filled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                return poll(&mut filled, Some(&now)) == Ok(1) && rustix::io::read(fd, &mut count).is_ok();
            }
            done => return done.is_ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_eventfd_is_told_from_all_else() {
        assert!(of_stranger(eventfd(0, EventfdFlags::empty()).unwrap()).is_ok());
        let file = tempfile::Builder::new().prefix("anon_inode:[eventfd]").tempfile().unwrap();
        let (read, write) = io::pipe().unwrap();
        let others: [OwnedFd; 4] =
            [file.into_file().into(), read.into(), write.into(), UnixStream::pair().unwrap().0.into()];
        for other in others {
            let error = of_stranger(other).unwrap_err();
            assert!(error.to_string().starts_with("no eventfd but "), "{error}");
        }
    }

    /// Whoever waits here waits for ever.
    #[test]
    fn one_that_blocks_and_is_empty_is_not_waited_for() {
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        assert!(!hush(fd.as_fd()));
        ring(fd.as_fd());
        ring(fd.as_fd());
        assert!(hush(fd.as_fd()));
        assert!(!hush(fd.as_fd()), "it was not emptied");
    }
}
