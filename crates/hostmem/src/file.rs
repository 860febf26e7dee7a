use crate::MapError;
use crate::mapping::Mapping;
use ringfence_dma::HostSlice;
use std::os::fd::BorrowedFd;

/// How many pages are asked about at once.
const PAGES: usize = 512;

/// A file of this machine's, the first so many bytes of it: for who would rather copy than call the kernel.
///
/// Others may write to it, and may shorten it: then all of it reads as zeroes from then on, what is written goes
/// nowhere, and [`Self::is_lost`] says so. Whoever has copied looks at that afterwards.
#[derive(Debug)]
pub struct FileMemory(Mapping);

impl FileMemory {
    /// The first `len` bytes of the file behind `fd`, which is not needed afterwards. `len` is not 0.
    ///
    /// # Errors
    /// A file that is shorter, or not open for reading and writing, or that can't be mapped.
    pub fn new(fd: BorrowedFd<'_>, len: usize) -> Result<Self, MapError> {
        Mapping::new(fd, 0, len).map(Self)
    }

    /// The bytes.
    #[inline]
    pub fn slice(&self) -> HostSlice<'_> {
        self.0.slice()
    }

    /// Whether all pages of a range, whose `offset` is one of whole pages, are in memory now: then no hole is among
    /// them. Out of bounds panics.
    pub fn is_resident(&self, offset: usize, len: usize) -> bool {
        let page = rustix::param::page_size();
        assert!(offset.is_multiple_of(page), "{offset:#x} is within a page");
        let mut at = offset;
        while at < offset + len {
            let mut pages = [0_u8; PAGES];
            let part = self.slice().sub(at, (offset + len - at).min(PAGES * page));
            // SAFETY: asks about mapped pages, touches none, and writes a byte for each.
            if unsafe { libc::mincore(part.as_ptr().cast(), part.len(), pages.as_mut_ptr()) } != 0 {
                return false;
            }
            if pages[..part.len().div_ceil(page)].iter().any(|page| page & 1 == 0) {
                return false;
            }
            at += part.len();
        }
        true
    }

    /// Has the pages of a range, which begins with a whole one, at hand for reading and writing, so that whoever touches
    /// them first does not have to take each one in by a fault of its own. Would fill holes. Where the kernel does not
    /// know how, faults do it after all.
    pub fn populate(&self, offset: usize, len: usize) {
        let part = self.slice().sub(offset, len);
        // SAFETY: maps pages of our own mapping, and changes no byte of them.
        let _ = unsafe { libc::madvise(part.as_ptr().cast(), part.len(), libc::MADV_POPULATE_WRITE) };
    }

    /// Whether a part of the file has gone, and with it all of this. Says so of every byte that was seen after that.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.0.is_lost()
    }
}
