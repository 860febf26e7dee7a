//! A heap that only grows: drivers allocate when they start, and not while they run.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicUsize, Ordering};

const SIZE: usize = 1 << 20;

#[repr(C, align(4096))]
struct Heap {
    memory: UnsafeCell<[u8; SIZE]>,
    used: AtomicUsize,
}

// SAFETY: each byte is handed out once.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap { memory: UnsafeCell::new([0; _]), used: AtomicUsize::new(0) };

// SAFETY: what is handed out is aligned, in bounds, and never handed out again.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // The heap starts on a page, and nobody wants more alignment than that.
        let place = |used: usize| {
            let start = used.next_multiple_of(layout.align());
            start.checked_add(layout.size()).filter(|&end| end <= SIZE && layout.align() <= 4096)
        };
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, place) {
            Ok(used) => self.memory.get().cast::<u8>().wrapping_add(used.next_multiple_of(layout.align())),
            Err(_) => null_mut(),
        }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}
