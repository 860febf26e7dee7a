use crate::sys::Mapping;
use ringfence_dma::{Buffer, Gpa, HostSlice};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Memory of this process that devices may be shown.
///
/// Its "physical" address, where buffers are to have one, is its virtual one: the kernel finds the rest. One huge page
/// ([`huge`](Self::huge)) has a physical address, which a privileged process may know.
#[derive(Debug)]
pub struct Memory {
    mapping: Mapping,
    base: u64,
}

/// The size of a huge page.
const HUGE: usize = 2 << 20;

const PAGE: u64 = 4096;

impl Memory {
    /// `len` bytes, a whole number of pages.
    ///
    /// # Errors
    /// Those of mmap.
    pub fn new(len: usize) -> io::Result<Self> {
        let mapping = Mapping::anonymous(len, 0)?;
        let base = mapping.start().as_ptr().addr() as u64;
        Ok(Self { mapping, base })
    }

    /// A huge page of 2 MiB, at its physical address.
    ///
    /// # Errors
    /// Those of mmap, where there are no huge pages (vm.nr_hugepages), and of looking up where it is: that takes
    /// CAP_SYS_ADMIN.
    pub fn huge() -> io::Result<Self> {
        let mapping = Mapping::anonymous(HUGE, libc::MAP_HUGETLB | libc::MAP_POPULATE)?;
        let page = mapping.start().as_ptr().addr() as u64 / PAGE;
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * 8)?;
        // Documentation/admin-guide/mm/pagemap.rst: bits 0 to 54 are the frame, 63 says that there is one.
        let entry = u64::from_le_bytes(entry);
        let frame = entry & ((1 << 55) - 1);
        if entry >> 63 == 0 || frame == 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "this process may not know where its memory is",
            ));
        }
        Ok(Self { mapping, base: frame * PAGE })
    }

    /// All of it.
    pub fn buffer(&self) -> Buffer<'_> {
        // SAFETY: mapped for as long as `self` is borrowed, and there is no reference into it, now or ever.
        let memory = unsafe { HostSlice::new(self.mapping.start(), self.mapping.len()) };
        Buffer::new(memory, Gpa(self.base))
    }

    /// This process' address for `len` bytes at a "physical" one; `None` where that is not of this memory.
    pub(crate) fn address(&self, physical: Gpa, len: usize) -> Option<u64> {
        let offset = usize::try_from(physical.0.checked_sub(self.base)?).ok()?;
        let inside = offset <= self.mapping.len() && len <= self.mapping.len() - offset;
        inside.then(|| (self.mapping.start().as_ptr().addr() + offset) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_within_its_bounds() {
        let memory = Memory::new(0x3000).unwrap();
        let buffer = memory.buffer();
        let (start, len) = (buffer.physical().0, buffer.len());
        assert_eq!((start, len), (buffer.memory().as_ptr().addr() as u64, 0x3000));
        for (physical, len, found) in [
            (start, 0x3000, true),
            (start + 0x2000, 0x1000, true),
            (start + 0x2000, 0x1001, false),
            (start - 1, 1, false),
            (start + 0x3000, 0, true),
            (start + 0x3001, 0, false),
            (u64::MAX, 1, false),
        ] {
            assert_eq!(memory.address(Gpa(physical), len), found.then_some(physical));
        }
    }
}
