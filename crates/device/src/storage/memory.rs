use super::{Came, Geometry, Operation, Started, Storage, StorageQueue, total};
use ringfence_dma::DetachedSlice;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// A disk in anonymous memory, gone with the process. It takes memory as it is written, and gives it back as it is
/// discarded.
///
/// Operations that overlap, from one queue or several, leave each byte as one of them has it, as on any disk.
pub struct Memory {
    mapping: Arc<Mapping>,
    geometry: Geometry,
}

impl Memory {
    /// A disk of `capacity` bytes, all zero: a multiple of 512, not 0.
    ///
    /// # Errors
    /// The address space is not to be had.
    pub fn new(capacity: u64, read_only: bool) -> io::Result<Self> {
        let geometry = Geometry {
            read_only,
            physical_block_size: PAGE as u32,
            discard_alignment: PAGE as u32,
            ..Geometry::plain(capacity)
        };
        Ok(Self { mapping: Arc::new(Mapping::new(capacity)?), geometry })
    }
}

impl Storage for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue(&self, _depth: u16) -> io::Result<Box<dyn StorageQueue>> {
        Ok(Box::new(MemoryQueue { mapping: Arc::clone(&self.mapping), geometry: self.geometry }))
    }
}

struct MemoryQueue {
    mapping: Arc<Mapping>,
    geometry: Geometry,
}

impl StorageQueue for MemoryQueue {
    #[inline]
    unsafe fn start(&mut self, _token: u16, operation: Operation, pieces: &[DetachedSlice]) -> Started {
        if let Err(refused) = self.geometry.admit(&operation, total(pieces)) {
            return Started::Done(Err(refused));
        }
        match operation {
            Operation::Read { offset } => {
                let mut from = self.mapping.at(offset);
                for piece in pieces {
                    // SAFETY: within the mapping because admitted; the piece is good by this function's own contract,
                    // and is nobody's disk.
                    unsafe {
                        copy(from, piece.as_ptr(), piece.len());
                        from = from.add(piece.len());
                    }
                }
            }
            Operation::Write { offset, .. } => {
                let mut to = self.mapping.at(offset);
                for piece in pieces {
                    // SAFETY: as above.
                    unsafe {
                        copy(piece.as_ptr(), to, piece.len());
                        to = to.add(piece.len());
                    }
                }
            }
            Operation::Flush => {}
            Operation::Discard { offset, len } | Operation::WriteZeroes { offset, len, .. } => {
                self.mapping.zero(offset as usize, len as usize);
            }
        }
        Started::Done(Ok(()))
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completed(&mut self, _each: &mut dyn FnMut(u16, Came)) {}

    unsafe fn go_on(&mut self, _token: u16, _pieces: &[DetachedSlice]) -> Started {
        unreachable!("every operation is done when it was started")
    }

    fn forget(&mut self, _token: u16) {}

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn cancel(&mut self, _token: u16) {}
}

/// What the kernel gives back at the least: a multiple of the page size of every machine this runs on.
const PAGE: usize = 1 << 16;

/// Copies `len` bytes between memories that others may be reading and writing, as [`HostSlice`](ringfence_dma::HostSlice)
/// does: each byte arrives as one of those that it was meanwhile.
///
/// # Safety
/// Both ranges are mapped, they do not overlap, and no Rust reference to any byte of them exists.
#[inline]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by this function's own contract.
    unsafe { to.copy_from_nonoverlapping(from, len) };
}

/// Pages of our own, zero until written.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; every access is a `copy`, a fill or a system call, all of which may race.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever there is room.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping just made. Large pages are a wish; random access is several times slower without.
        unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
        let start = NonNull::new(start.cast()).expect("the kernel does not map what it was not asked to at 0");
        Ok(Self { start, len })
    }

    /// The address of the byte at `offset`, which is not beyond the end.
    #[inline]
    fn at(&self, offset: u64) -> *mut u8 {
        let offset = offset as usize;
        assert!(offset <= self.len, "{offset} of {}", self.len);
        // SAFETY: within the mapping, or its end.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Makes a range that was admitted read as zeroes, and gives its whole pages back.
    fn zero(&self, offset: usize, len: usize) {
        assert!(offset <= self.len && len <= self.len - offset);
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(PAGE), end / PAGE * PAGE);
        let freed = first < last && {
            // SAFETY: pages within our mapping; they read as zeroes from then on.
            unsafe { libc::madvise(self.at(first as u64).cast(), last - first, libc::MADV_DONTNEED) == 0 }
        };
        let edges = if freed { [(offset, first), (last, end)] } else { [(offset, end), (end, end)] };
        for (from, to) in edges {
            // SAFETY: within the mapping; as for racing, see `copy`.
            unsafe { self.at(from as u64).write_bytes(0, to - from) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made in `new` with this length; every queue held a share of it and is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::exercise::{CAPACITY, Driver, exercise, refuses_every_change};
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn behaves_as_a_disk() {
        exercise(&Memory::new(CAPACITY as u64, false).unwrap());
    }

    #[test]
    fn read_only_stays_as_it_is() {
        refuses_every_change(&Memory::new(CAPACITY as u64, true).unwrap());
    }

    #[test]
    fn zeroing_is_exact_at_both_ends() {
        let disk = Memory::new(16 * PAGE as u64, false).unwrap();
        let mut driver = Driver::new(disk.open_queue(1).unwrap(), 16 * PAGE);
        let full = vec![1; 16 * PAGE];
        for (offset, len) in [(512, 512), (PAGE - 512, 1024), (PAGE - 512, 5 * PAGE), (PAGE, PAGE), (0, 16 * PAGE)] {
            driver.write(0, &full).unwrap();
            let (from, bytes) = (offset as u64, len as u64);
            driver.run(Operation::WriteZeroes { offset: from, len: bytes, unmap: true }, &[]).unwrap();
            let mut expected = full.clone();
            expected[offset..offset + len].fill(0);
            assert!(driver.read(0, full.len()).unwrap() == expected, "{len} bytes at {offset}");
        }
    }

    #[test]
    fn overlapping_writes_of_two_queues_leave_bytes_of_either() {
        let disk = Memory::new(4096, false).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for value in [1, 2] {
                let (disk, stop) = (&disk, &stop);
                scope.spawn(move || {
                    let mut driver = Driver::new(disk.open_queue(1).unwrap(), 4096);
                    while !stop.load(Ordering::Relaxed) {
                        driver.write(0, &[value; 4096]).unwrap();
                    }
                });
            }
            let mut driver = Driver::new(disk.open_queue(1).unwrap(), 4096);
            while driver.read(0, 4096).unwrap().contains(&0) {}
            for _ in 0..1000 {
                assert!(driver.read(0, 4096).unwrap().iter().all(|byte| matches!(byte, 1 | 2)));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
