//! Memory as an old driver takes it: the address of a buffer is its physical one, and the device may use that.

use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// For one queue of 16 entries: two pages.
const PAGES: usize = 16;
/// What `entry.s` maps.
const MAPPED: u64 = 1 << 32;

#[repr(C, align(4096))]
struct Memory<const SIZE: usize>(UnsafeCell<[u8; SIZE]>);

// SAFETY: one processor and no threads; each byte is handed out once.
unsafe impl<const SIZE: usize> Sync for Memory<SIZE> {}

static DMA: Memory<{ PAGES * PAGE_SIZE }> = Memory(UnsafeCell::new([0; _]));
static BUFFER: Memory<{ 1 << 20 }> = Memory(UnsafeCell::new([0; _]));

/// The one buffer for data.
///
/// # Panics
///
/// At the second call.
pub(crate) fn buffer() -> &'static mut [u8; 1 << 20] {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    assert!(!TAKEN.swap(true, Ordering::Relaxed), "there is one buffer");
    // SAFETY: taken once, see above.
    unsafe { &mut *BUFFER.0.get() }
}

/// Physical is virtual.
pub(crate) struct Flat;

// SAFETY: pages come from a static array, each once, zeroed and aligned; `entry.s` maps
// all of memory below 4 GiB to itself, devices' included.
unsafe impl Hal for Flat {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        static USED: AtomicUsize = AtomicUsize::new(0);
        let first = USED.fetch_add(pages, Ordering::Relaxed);
        assert!(first + pages <= PAGES, "{PAGES} pages are too few");
        let start = DMA.0.get().cast::<u8>();
        let start = NonNull::new(start.wrapping_add(first * PAGE_SIZE)).expect("a static is not at zero");
        (start.as_ptr() as PhysAddr, start)
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        // A driver is started once: what it gives back is not given out again.
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, size: usize) -> NonNull<u8> {
        assert!(address + size as u64 <= MAPPED, "the device's registers at {address:#x} are above 4 GiB");
        NonNull::new(address as *mut u8).expect("the firmware has placed the device's registers")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
