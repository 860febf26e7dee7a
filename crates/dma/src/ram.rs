use crate::{Gpa, HostSlice, Physical};
use alloc::alloc::{alloc_zeroed, dealloc, handle_alloc_error};
use core::alloc::Layout;
use core::ptr::NonNull;

/// Memory of our own that a device and a driver in one process share: zeroed, page-aligned, at guest-physical 0.
#[derive(Debug)]
pub struct Ram {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owns its allocation; all access goes through `HostSlice`, which is made for sharing.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// `len` bytes. `len` is not 0.
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, 4096).expect("a length that fits the address space");
        assert!(len > 0, "memory without a byte");
        // SAFETY: the layout's size is not zero, checked above.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, layout }
    }

    /// How many bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty, see `new`")]
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// `len` bytes from `offset`; out of bounds panics.
    pub fn slice(&self, offset: usize, len: usize) -> HostSlice<'_> {
        // SAFETY: the allocation lives as long as `self`, which the slice borrows, and is never referenced otherwise.
        unsafe { HostSlice::new(self.start, self.layout.size()) }.sub(offset, len)
    }
}

impl Physical for Ram {
    fn slice(&self, gpa: Gpa, len: usize) -> Option<HostSlice<'_>> {
        let offset = usize::try_from(gpa.0).ok().filter(|&offset| offset < self.len())?;
        Some(Ram::slice(self, offset, len.min(self.len() - offset)))
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; every slice borrowed `self` and is gone.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
