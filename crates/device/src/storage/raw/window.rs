//! The bytes of a file that is nowhere but in memory, mapped: a copy in place of a system call.
//!
//! A mapping differs from a call in three ways, and each has its answer here. To look at a hole would fill it: what is
//! not known to be all data goes by a call. A page that can't be had, or that was cut off, is a signal and not an error:
//! the mapping is then lost (`hostmem` sees to that), and the transfer is made again by a call, which says what is
//! wrong. And a write through it can't be made durable; there is nothing that memory could be made durable in.

use super::super::Operation;
use ringfence_dma::DetachedSlice;
use ringfence_hostmem::FileMemory;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What is known to be all data is known in units of this.
const CHUNK: u64 = 2 << 20;

/// One transfer of so many that go by a call looks whether the next could do without. A sparse file has many that can't.
const LOOKS: u32 = 8;

pub(super) struct Window {
    memory: FileMemory,
    len: u64,
    /// A bit a chunk: there was no hole in it.
    solid: Box<[AtomicU64]>,
    /// Transfers that could not be made here.
    passed_on: AtomicU32,
}

impl Window {
    /// Over the first `len` bytes of `file`, if it is such a file.
    pub(super) fn over(file: &File, len: u64) -> Option<Self> {
        // What ramfs would do was not looked into: nobody has images there.
        rustix::fs::fstatfs(file).ok().filter(|about| about.f_type == libc::TMPFS_MAGIC)?;
        let memory = FileMemory::new(file.as_fd(), usize::try_from(len).ok()?).ok()?;
        let words = len.div_ceil(CHUNK).div_ceil(64);
        let solid = (0..words).map(|_| AtomicU64::new(0)).collect();
        Some(Self { memory, len, solid, passed_on: AtomicU32::new(0) })
    }

    /// Moves all of `len` bytes between the file and `pieces`; `false`, and perhaps a part moved, where a call has to do
    /// it.
    ///
    /// # Safety
    /// The pieces are good until this returns.
    #[inline]
    pub(super) unsafe fn transfer(&self, offset: u64, pieces: &[DetachedSlice], len: u64, way: Way) -> bool {
        if self.memory.is_lost() || !self.is_solid(offset, len) {
            return false;
        }
        let all = self.memory.slice();
        let mut at = offset as usize;
        for piece in pieces {
            let here = all.sub(at, piece.len());
            let (from, to) = match way {
                Way::Out => (here.as_ptr(), piece.as_ptr()),
                Way::In => (piece.as_ptr(), here.as_ptr()),
            };
            // SAFETY: both are mapped, by `sub` above and by this function's own contract, and no reference to a byte of
            // either exists. They are mappings of their own, so the addresses don't overlap. Others may write to both:
            // each byte arrives as one of those that it was meanwhile.
            unsafe { to.copy_from_nonoverlapping(from, piece.len()) };
            at += piece.len();
        }
        // What was copied after the mapping was lost is not the file's.
        !self.memory.is_lost()
    }

    #[cfg(test)]
    pub(super) fn is_lost(&self) -> bool {
        self.memory.is_lost()
    }

    /// There may be holes in this range from now on.
    pub(super) fn forget(&self, offset: u64, len: u64) {
        let last = offset.saturating_add(len).min(self.len).div_ceil(CHUNK);
        for chunk in offset / CHUNK..last {
            self.word(chunk).fetch_and(!bit(chunk), Ordering::Relaxed);
        }
    }

    #[inline]
    fn is_solid(&self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len).filter(|&end| end <= self.len) else { return false };
        let (first, last) = (offset / CHUNK, (end - 1) / CHUNK);
        let known = |chunk| self.word(chunk).load(Ordering::Relaxed) & bit(chunk) != 0;
        if (first..=last).all(known) {
            return true;
        }
        self.look(first, last)
    }

    /// Looks whether chunks are all data, now and then: what is in memory is no hole.
    #[cold]
    fn look(&self, first: u64, last: u64) -> bool {
        if !self.passed_on.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOKS) {
            return false;
        }
        (first..=last).all(|chunk| {
            let start = chunk * CHUNK;
            let (at, len) = (start as usize, CHUNK.min(self.len - start) as usize);
            let solid = self.memory.is_resident(at, len);
            if solid {
                self.memory.populate(at, len);
                self.word(chunk).fetch_or(bit(chunk), Ordering::Relaxed);
            }
            solid
        })
    }

    fn word(&self, chunk: u64) -> &AtomicU64 {
        &self.solid[(chunk / 64) as usize]
    }
}

fn bit(chunk: u64) -> u64 {
    1 << (chunk % 64)
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// From the file.
    Out,
    /// Into it.
    In,
}

impl Way {
    /// Of an operation that has data, and where in the file.
    #[inline]
    pub(super) fn of(operation: Operation) -> Option<(Way, u64)> {
        match operation {
            Operation::Read { offset } => Some((Way::Out, offset)),
            Operation::Write { offset, .. } => Some((Way::In, offset)),
            Operation::Flush | Operation::Discard { .. } | Operation::WriteZeroes { .. } => None,
        }
    }
}
