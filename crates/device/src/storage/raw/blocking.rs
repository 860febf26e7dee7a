//! Plain system calls: at once where nothing waits, and in threads for everything where there is no io_uring.

use super::super::threads::Carry;
use super::super::{Durability, Operation};
use super::window::Way;
use super::work::{Call, Next, Work, ZEROES};
use super::{Image, Now};
use ringfence_dma::{DetachedSlice, HostSlice};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// Copying more bytes than this would keep all others waiting, and who takes memory away too.
const LONGEST_NOW: u64 = 1 << 20;

impl Carry for Image {
    #[inline]
    unsafe fn now(&self, operation: Operation, pieces: &[DetachedSlice], len: u64) -> io::Result<u64> {
        // SAFETY: by this function's own contract.
        unsafe { move_now(self, &mut Work::new(), operation, pieces, len) }
    }

    fn carry_out(&self, operation: Operation, memory: &mut [u8]) -> io::Result<()> {
        let piece = NonNull::new(memory.as_mut_ptr()).filter(|_| !memory.is_empty());
        // SAFETY: `memory` is borrowed, and not used by its name any more.
        let piece = piece.map(|start| unsafe { HostSlice::new(start, memory.len()) }.detach());
        let mut work = Work::new();
        let mut next = work.begin(self, operation, piece.as_slice(), memory.len() as u64);
        loop {
            match next {
                Next::End(result) => return result,
                // Ends: each call moves bytes, or counts as a stall, or gives way to another kind of call.
                Next::Call => {
                    // SAFETY: the memory is good during this very call.
                    let result = unsafe { make(self, work.call(), 0) };
                    // SAFETY: as above.
                    next = unsafe { work.returned(self, result) };
                }
            }
        }
    }
}

/// Moves as many bytes between the image and `pieces`, which are `len` bytes, as can be without waiting, and says how
/// many.
///
/// # Safety
/// The pieces are good until this returns.
#[inline]
pub(super) unsafe fn move_now(
    image: &Image,
    work: &mut Work,
    operation: Operation,
    pieces: &[DetachedSlice],
    len: u64,
) -> io::Result<u64> {
    if len > LONGEST_NOW {
        return Ok(0);
    }
    if let (Some(window), Some((way, offset))) = (&image.window, Way::of(operation)) {
        // SAFETY: by this function's own contract.
        if unsafe { window.transfer(offset, pieces, len, way) } {
            return Ok(len);
        }
    }
    if let Next::End(result) = work.begin(image, operation, pieces, len) {
        return result.map(|()| len);
    }
    // May take several calls, for many pieces; each moves bytes, or counts as a stall.
    // SAFETY: the pieces are good by this function's own contract.
    while let Some(result) = unsafe { make_now(image, work.call()) } {
        // SAFETY: as above.
        if let Next::End(result) = unsafe { work.returned(image, result) } {
            return result.map(|()| len);
        }
    }
    Ok(len - work.left())
}

/// Whether the file's file system knows RWF_NOWAIT.
pub(super) fn knows_nowait(file: &File) -> bool {
    let mut byte = 0_u8;
    let piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: writes to one byte of this function's own.
    let result = unsafe { libc::preadv2(file.as_raw_fd(), &piece, 1, 0, libc::RWF_NOWAIT) };
    let unknown = [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL];
    result >= 0 || !unknown.contains(&io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

/// Makes a transfer as far as that needs no waiting. `None` where somebody has to wait.
///
/// # Safety
/// The call's pieces are good until this returns.
#[inline]
unsafe fn make_now(image: &Image, call: Call<'_>) -> Option<i32> {
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
        // EAGAIN: it would have to wait. Whoever does finds any other error again, if it is one.
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
