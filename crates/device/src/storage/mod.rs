//! What holds a disk's bytes: one file a back-end, behind [`Storage`].
//!
//! Knows bytes, where they lie, and when they are durable. Knows no virtqueues, no requests and no status bytes.
//!
//! Memory comes as pieces that are good during one call and not a moment longer. What can be done at once is done on
//! them. What has to wait is done on memory of our own (`bounce`), and its bytes are moved when it has ended: so
//! neither a disk that is slow nor one that hangs ever keeps memory from being taken away, and no kernel, file system or
//! thread that it is stuck in has an address of somebody else's to write to.
//!
//! [`open()`] finds the back-end from what an operator wrote; [`Raw`] is files and block devices, [`Imago`] is the
//! qcow2 family, [`Memory`] a RAM disk, and [`Null`] keeps nothing, for measuring the rest.

mod bounce;
#[cfg(test)]
mod exercise;
mod imago;
mod lock;
mod memory;
mod null;
mod open;
mod raw;
mod threads;

pub use imago::Imago;
pub use memory::Memory;
pub use null::Null;
pub use open::{Format, OpenError, UnknownFormat, VirtualFormat, open};
pub use raw::Raw;

use ringfence_dma::DetachedSlice;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicI32, Ordering};

/// The unit of a disk's capacity, whatever its block size.
pub const SECTOR: u64 = 512;

/// What holds a disk's bytes. Shared by all queues.
pub trait Storage: Send + Sync {
    /// The disk's size and what it can do; never changes.
    fn geometry(&self) -> Geometry;

    /// A way in for one thread, with up to `depth` operations under way: 1 to 32768, as a virtqueue has.
    ///
    /// # Errors
    /// What the kernel would not give: memory, descriptors, threads.
    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn StorageQueue>>;
}

/// One thread's way into a [`Storage`].
///
/// Dropping it waits until the operations that are under way have ended, for as long as that takes; they may or may not
/// have been carried out. It touches no piece meanwhile.
pub trait StorageQueue: Send {
    /// Starts an operation. `token` is below the queue's depth and not under way.
    ///
    /// Reads fill `pieces` and writes take from them, in order; the other operations come without any. What does not
    /// lie within the disk is refused with [`io::ErrorKind::InvalidInput`] and what would change a read-only disk with
    /// `EROFS`, before a byte moves. After any other error a part may have moved.
    ///
    /// The bytes of a write may change while they are being taken: what is then stored is some mixture, in these
    /// sectors alone.
    ///
    /// # Safety
    /// Every piece is good, as in [`DetachedSlice::attach`], until this returns.
    unsafe fn start(&mut self, token: u16, operation: Operation, pieces: &[DetachedSlice]) -> Started;

    /// Hands on what was started since the last call: one system call for a batch, none where nothing waits.
    ///
    /// # Errors
    /// What the kernel answered. Nothing is lost: what was not handed on goes with the next call of this or of
    /// [`Self::completed`].
    fn submit(&mut self) -> io::Result<()>;

    /// Calls `each` with the token of every operation that has come to its end, or to where it needs its pieces again,
    /// each once. Makes no system call where there is none.
    fn completed(&mut self, each: &mut dyn FnMut(u16, Came));

    /// Goes on with an operation that came back as [`Came::Data`]: `pieces` are those of its data that are left, from
    /// as many bytes on as it said were done.
    ///
    /// # Safety
    /// As in [`Self::start`].
    unsafe fn go_on(&mut self, token: u16, pieces: &[DetachedSlice]) -> Started;

    /// Gives up an operation that came back as [`Came::Data`]: its pieces are not to be had any more.
    fn forget(&mut self, token: u16);

    /// Is readable whenever [`Self::completed`] has something to tell, for a thread with nothing else to do. `None`
    /// where every operation is done when it was started.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Asks for an operation to be given up. It still comes back from [`Self::completed`]: with `ECANCELED`, or as it
    /// would have where it could not be stopped. A token that is not under way is ignored.
    fn cancel(&mut self, token: u16);

    /// Nobody waits any more for what is under way: this queue is about to be dropped, and somebody may go on with
    /// another of the same storage before that is over. Until it is, whatever would change the disk is refused with
    /// `EIO` if a change is among what was given up: it may still come, and would undo what came after it.
    fn abandon(&mut self) {}
}

/// How far an operation came.
#[derive(Debug)]
pub enum Came {
    /// To its end: its token is free.
    End(io::Result<()>),
    /// To where bytes have to be moved from or to its pieces: [`StorageQueue::go_on`], or [`StorageQueue::forget`].
    Data {
        /// How many bytes are done and need their pieces no more.
        done: u64,
    },
}

/// The shape of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The size in bytes: a multiple of [`SECTOR`], not 0.
    pub capacity: u64,
    /// The smallest unit that a driver should address, in bytes: a power of two from 512 up. Smaller accesses work.
    pub block_size: u32,
    /// The unit that the medium writes without having to read, in bytes: a power of two, at least `block_size`.
    pub physical_block_size: u32,
    /// A good size for large transfers, in bytes; 0 where unknown.
    pub optimal_size: u32,
    /// Whether every operation that changes the disk is refused.
    pub read_only: bool,
    /// Whether [`Operation::Discard`] may free something; where not, it succeeds and does nothing.
    pub discard: bool,
    /// What a discard should start and end at in order to free all of its range, in bytes.
    pub discard_alignment: u32,
    /// Whether [`Operation::WriteZeroes`] is worth more than writing zeroes. It works either way.
    pub write_zeroes: bool,
}

impl Geometry {
    /// A plain disk of `capacity` bytes.
    fn plain(capacity: u64) -> Self {
        Self {
            capacity,
            block_size: SECTOR as u32,
            physical_block_size: SECTOR as u32,
            optimal_size: 0,
            read_only: false,
            discard: true,
            discard_alignment: SECTOR as u32,
            write_zeroes: true,
        }
    }

    /// Refuses what lies beyond the disk or would change one that is read-only. `len` is that of the pieces.
    fn admit(&self, operation: &Operation, len: u64) -> io::Result<()> {
        let (offset, len) = match *operation {
            Operation::Read { offset } | Operation::Write { offset, .. } => (offset, len),
            Operation::Flush => (0, 0),
            Operation::Discard { offset, len } | Operation::WriteZeroes { offset, len, .. } => (offset, len),
        };
        if operation.changes() && self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.capacity => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// What a queue is asked to do. Positions and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills the pieces from the disk.
    Read {
        /// Where the first byte lies.
        offset: u64,
    },
    /// Stores the pieces' bytes.
    Write {
        /// Where the first byte goes.
        offset: u64,
        /// What the end of the operation promises.
        durability: Durability,
    },
    /// Makes durable all that ended before this started. Once one has failed every later one fails too: what was lost
    /// then is lost, though the kernel tells of it only once.
    Flush,
    /// Tells that the content of a range is of no use any more; it reads as anything afterwards.
    Discard {
        /// Where the range starts.
        offset: u64,
        /// How long it is.
        len: u64,
    },
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// Where the range starts.
        offset: u64,
        /// How long it is.
        len: u64,
        /// Whether the range's space may be given back.
        unmap: bool,
    },
}

impl Operation {
    /// Whether it changes the disk.
    fn changes(&self) -> bool {
        match self {
            Operation::Read { .. } | Operation::Flush => false,
            Operation::Write { .. } | Operation::Discard { .. } | Operation::WriteZeroes { .. } => true,
        }
    }
}

/// What the end of a write promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Later reads see the bytes; a power cut before the next flush may lose them.
    Cached,
    /// The bytes outlive a power cut.
    Durable,
}

/// What became of an operation that was started.
#[derive(Debug)]
pub enum Started {
    /// It has ended already, and its token does not come back.
    Done(io::Result<()>),
    /// It is under way without its pieces, and its token comes back from [`StorageQueue::completed`].
    Pending,
}

/// Whether an image lost writes that it had taken: the error of the first flush that failed, or 0. The kernel tells of
/// the loss once and marks the lost pages clean, so that asking again would answer that all is well.
#[derive(Debug, Default)]
struct Lost(AtomicI32);

impl Lost {
    fn remember(&self, error: &io::Error) {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        if self.0.compare_exchange(0, errno, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            tracing::error!(%error, "the image lost writes when they were flushed; every flush will fail from now on");
        }
    }

    /// What a flush that succeeded may answer.
    fn verdict(&self) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// How many bytes `pieces` are.
fn total(pieces: &[DetachedSlice]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_that_failed_once_fails_for_ever() {
        let lost = Lost::default();
        assert!(lost.verdict().is_ok());
        lost.remember(&io::Error::from_raw_os_error(libc::ENOSPC));
        lost.remember(&io::ErrorKind::Other.into());
        for _ in 0..2 {
            assert_eq!(lost.verdict().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        }
    }

    #[test]
    fn only_what_lies_within_the_disk_and_may_change_it_is_admitted() {
        let disk = Geometry::plain(4096);
        let read_only = Geometry { read_only: true, ..disk };
        let write = |offset| Operation::Write { offset, durability: Durability::Cached };
        let beyond = Some(io::ErrorKind::InvalidInput);
        let forbidden = Some(io::ErrorKind::ReadOnlyFilesystem);
        for (geometry, operation, len, refusal) in [
            (disk, Operation::Read { offset: 0 }, 4096, None),
            (disk, Operation::Read { offset: 4095 }, 1, None),
            (disk, Operation::Read { offset: 4096 }, 0, None),
            (disk, Operation::Read { offset: 1 }, 4096, beyond),
            (disk, Operation::Read { offset: u64::MAX }, 512, beyond),
            (disk, write(4096), 512, beyond),
            (disk, Operation::Discard { offset: 512, len: 3584 }, 0, None),
            (disk, Operation::Discard { offset: 512, len: u64::MAX }, 0, beyond),
            (disk, Operation::WriteZeroes { offset: 4096, len: 1, unmap: true }, 0, beyond),
            (read_only, Operation::Read { offset: 0 }, 4096, None),
            (read_only, Operation::Flush, 0, None),
            (read_only, write(0), 512, forbidden),
            (read_only, Operation::Discard { offset: 0, len: 512 }, 0, forbidden),
            (read_only, Operation::WriteZeroes { offset: 0, len: 512, unmap: false }, 0, forbidden),
        ] {
            let refused = geometry.admit(&operation, len).err().map(|error| error.kind());
            assert_eq!(refused, refusal, "{operation:?} of {len} bytes, read-only {}", geometry.read_only);
        }
    }
}
