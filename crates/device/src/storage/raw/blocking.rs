//! Plain system calls: at once where nothing waits, and for everything where there is no io_uring.

use super::super::{Durability, Operation, Started, StorageQueue, total};
use super::work::{Call, Next, Work, ZEROES};
use super::{Image, Now};
use ringfence_dma::DetachedSlice;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Does one thing at a time, to its end.
pub(super) struct BlockingQueue {
    image: Arc<Image>,
    work: Work,
}

impl BlockingQueue {
    pub(super) fn new(image: Arc<Image>) -> Self {
        Self { image, work: Work::new() }
    }
}

impl StorageQueue for BlockingQueue {
    unsafe fn start(&mut self, _token: u16, operation: Operation, pieces: &[DetachedSlice]) -> Started {
        let len = total(pieces);
        if let Err(refused) = self.image.geometry.admit(&operation, len) {
            return Started::Done(Err(refused));
        }
        let mut next = self.work.begin(&self.image, operation, pieces, len);
        loop {
            match next {
                Next::End(result) => return Started::Done(result),
                // Ends: each call moves bytes, or counts as a stall, or gives way to another kind of call.
                Next::Call => {
                    // SAFETY: the pieces are good during this very call.
                    let result = unsafe { make(&self.image, self.work.call(), 0) };
                    // SAFETY: as above.
                    next = unsafe { self.work.returned(&self.image, result) };
                }
            }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completed(&mut self, _each: &mut dyn FnMut(u16, io::Result<()>)) {}

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn cancel(&mut self, _token: u16) {}
}

/// Makes a transfer as far as that needs no waiting. `None` where the ring has to.
///
/// # Safety
/// The call's pieces are good until this returns.
#[inline]
pub(super) unsafe fn make_now(image: &Image, call: Call<'_>) -> Option<i32> {
    let now = match call {
        Call::Read { .. } => &image.read_now,
        Call::Write { durability: Durability::Cached, .. } => &image.write_now,
        _ => return None,
    };
    let unsupported = match now {
        // SAFETY: by this function's own contract.
        Now::Always => return Some(unsafe { make(image, call, 0) }),
        Now::Unless { unsupported } => unsupported,
    };
    if unsupported.load(Ordering::Relaxed) {
        return None;
    }
    // SAFETY: by this function's own contract.
    let result = unsafe { make(image, call, libc::RWF_NOWAIT) };
    match -result {
        ..=0 => Some(result),
        libc::EOPNOTSUPP | libc::ENOSYS => {
            unsupported.store(true, Ordering::Relaxed);
            None
        }
        // EAGAIN: it would have to wait. The ring finds any other error again, if it is one.
        _ => None,
    }
}

/// Makes the call, and returns a count or an error's number made negative.
///
/// # Safety
/// The call's pieces are good until this returns.
unsafe fn make(image: &Image, call: Call<'_>, flags: i32) -> i32 {
    let fd = image.file.as_raw_fd();
    let at = |offset: u64| offset as libc::off_t;
    let result = match call {
        Call::Read { offset, pieces: &[piece] } if flags == 0 => {
            // SAFETY: writes to one piece, which is good by this function's own contract.
            unsafe { libc::pread(fd, piece.as_ptr().cast(), piece.len(), at(offset)) }
        }
        Call::Read { offset, pieces } => {
            // SAFETY: as above; a `DetachedSlice` is laid out as an `iovec`, and `batch` bounds their number.
            unsafe { libc::preadv2(fd, pieces.as_ptr().cast(), pieces.len() as i32, at(offset), flags) }
        }
        Call::Write { offset, pieces: &[piece], durability: Durability::Cached } if flags == 0 => {
            // SAFETY: reads one piece, which is good by this function's own contract.
            unsafe { libc::pwrite(fd, piece.as_ptr().cast(), piece.len(), at(offset)) }
        }
        Call::Write { offset, pieces, durability } => {
            let flags = flags | rw_flags(durability);
            // SAFETY: as above, for many.
            unsafe { libc::pwritev2(fd, pieces.as_ptr().cast(), pieces.len() as i32, at(offset), flags) }
        }
        Call::Zeroes { offset, len } => {
            // SAFETY: reads a static that is at least as long.
            unsafe { libc::pwrite(fd, ZEROES.as_ptr().cast(), len as usize, at(offset)) }
        }
        Call::Allocate { offset, len, mode } => {
            // SAFETY: takes no memory.
            (unsafe { libc::fallocate(fd, mode, at(offset), len as libc::off_t) }) as isize
        }
        // SAFETY: takes no memory.
        Call::Sync => (unsafe { libc::fdatasync(fd) }) as isize,
    };
    match result {
        // The kernel transfers less than 2^31 bytes in one call.
        0.. => result as i32,
        _ => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
    }
}

pub(super) fn rw_flags(durability: Durability) -> i32 {
    match durability {
        Durability::Cached => 0,
        Durability::Durable => libc::RWF_DSYNC,
    }
}
