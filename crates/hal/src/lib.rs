//! For a project that has a [`Hal`] of `virtio-drivers` and moves over: the `Hal` as a [`Mapper`].
//!
//! What the `Hal` can't say stays unsaid: it has one address space for all devices, and can't refuse a buffer. What it
//! does when it has no room (a panic, mostly) it still does. A project that has moved implements [`Mapper`] itself.

#![no_std]

extern crate alloc;

use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr::NonNull;
use ringfence_dma::{Buffer, BusAddr, DmaError, HostSlice, Lock, Mapped, Mapper, Permission};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// A [`Hal`] as a [`Mapper`].
///
/// Memory for rings is kept when a driver gives it back, for the next driver, and returned to the `Hal` when this is
/// dropped: a [`Mapper`]'s memory outlives the rings in it.
#[derive(Debug)]
pub struct HalMapper<H: Hal> {
    /// Given back by drivers.
    spare: Lock<Vec<Allocation>>,
    hal: PhantomData<fn() -> H>,
}

/// The `Hal` had no memory for a ring.
pub const NO_MEMORY: i32 = -12;

/// What [`Hal::dma_alloc`] handed out.
#[derive(Clone, Copy, Debug)]
struct Allocation {
    addr: PhysAddr,
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: an address of memory that belongs to whoever has this; nothing about it is a thread's.
unsafe impl Send for Allocation {}

impl<H: Hal> HalMapper<H> {
    /// Any number of these may share a `Hal`.
    ///
    /// # Safety
    /// While a driver lends a buffer through this, or takes it back, no other thread touches the buffer: a [`Hal`] may
    /// copy it with ordinary accesses. And nobody calls the methods of [`Mapper`] but through
    /// [`Streaming`](ringfence_dma::Streaming) and [`Coherent`](ringfence_dma::Coherent), which hand back what was handed
    /// out: a [`Hal`] believes what it is given.
    pub unsafe fn new() -> Self {
        Self { spare: Lock::new(Vec::new()), hal: PhantomData }
    }

    #[inline]
    fn direction(permission: Permission) -> BufferDirection {
        match permission {
            Permission::ReadOnly => BufferDirection::DriverToDevice,
            Permission::WriteOnly => BufferDirection::DeviceToDriver,
            Permission::ReadWrite => BufferDirection::Both,
        }
    }
}

#[inline]
fn range(memory: HostSlice<'_>) -> NonNull<[u8]> {
    let start = NonNull::new(memory.as_ptr()).expect("a slice has an address");
    NonNull::slice_from_raw_parts(start, memory.len())
}

impl<H: Hal> Mapper for HalMapper<H> {
    #[inline]
    fn max_len(&self) -> usize {
        usize::MAX
    }

    #[inline]
    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        // SAFETY: a buffer's memory is valid and, by the contract of `Mapper`, not empty; by that of `new` no other
        // thread touches it now.
        let addr = unsafe { H::share(range(buffer.memory()), Self::direction(permission)) };
        Ok(Mapped { addr: BusAddr(addr), len: buffer.len(), cookie: 0 })
    }

    #[inline]
    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        // SAFETY: as in `map`; the address is what `share` returned for the same buffer and direction, by the contract
        // of `Mapper`.
        unsafe { H::unshare(mapped.addr.0, range(buffer.memory()), Self::direction(permission)) };
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        let pages = len.div_ceil(PAGE_SIZE);
        let spare = {
            let mut spare = self.spare.lock();
            let at = spare.iter().position(|allocation| allocation.pages == pages);
            at.map(|at| spare.swap_remove(at))
        };
        let Allocation { addr, start, .. } = match spare {
            Some(allocation) => allocation,
            None => match H::dma_alloc(pages, BufferDirection::Both) {
                (0, _) => return Err(DmaError::Platform { code: NO_MEMORY }),
                (addr, start) => Allocation { addr, start, pages },
            },
        };
        // SAFETY: valid and without references by the contract of `Hal`, until `drop` below, which outlives the borrow of
        // `self`.
        let memory = unsafe { HostSlice::new(start, len) };
        Ok((Mapped { addr: BusAddr(addr), len, cookie: start.as_ptr().expose_provenance() }, memory))
    }

    fn free(&self, mapped: Mapped) {
        let start = NonNull::new(core::ptr::with_exposed_provenance_mut(mapped.cookie)).expect("what `allocate` made");
        let pages = mapped.len.div_ceil(PAGE_SIZE);
        self.spare.lock().push(Allocation { addr: mapped.addr.0, start, pages });
    }
}

impl<H: Hal> Drop for HalMapper<H> {
    fn drop(&mut self) {
        for Allocation { addr, start, pages } in self.spare.lock().drain(..) {
            // SAFETY: from `dma_alloc`, of so many pages, and nobody's any more: every slice of it borrowed `self`.
            // It returns an error number; memory that a `Hal` does not take back is leaked.
            let _ = unsafe { H::dma_dealloc(addr, start, pages) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::alloc::{alloc_zeroed, dealloc};
    use core::alloc::Layout;
    use core::sync::atomic::{AtomicUsize, Ordering};
    use ringfence_dma::{Coherent, FromDevice, Gpa, Ram, Streaming, ToDevice};

    /// Shares copies, so that a forgotten `share` or `unshare` shows. Addresses are shifted, for the same reason.
    struct Copying;

    const SHIFT: u64 = 1 << 62;
    static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
    static SHARED: AtomicUsize = AtomicUsize::new(0);

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, PAGE_SIZE).unwrap()
    }

    // SAFETY: memory comes from the allocator, fresh and zeroed.
    unsafe impl Hal for Copying {
        fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
            ALLOCATED.fetch_add(pages, Ordering::Relaxed);
            // SAFETY: not empty.
            let start = NonNull::new(unsafe { alloc_zeroed(layout(pages * PAGE_SIZE)) }).unwrap();
            (start.as_ptr().expose_provenance() as u64 | SHIFT, start)
        }

        unsafe fn dma_dealloc(addr: PhysAddr, start: NonNull<u8>, pages: usize) -> i32 {
            assert_eq!(addr, start.as_ptr().addr() as u64 | SHIFT);
            ALLOCATED.fetch_sub(pages, Ordering::Relaxed);
            // SAFETY: by the caller's contract it was allocated so.
            unsafe { dealloc(start.as_ptr(), layout(pages * PAGE_SIZE)) };
            0
        }

        unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
            unreachable!("there are no registers here")
        }

        unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
            SHARED.fetch_add(1, Ordering::Relaxed);
            // SAFETY: not empty, and valid, by the caller's contract.
            unsafe {
                let copy = alloc_zeroed(layout(buffer.len()));
                if direction != BufferDirection::DeviceToDriver {
                    copy.copy_from_nonoverlapping(buffer.cast().as_ptr(), buffer.len());
                }
                copy.expose_provenance() as u64 | SHIFT
            }
        }

        unsafe fn unshare(addr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
            SHARED.fetch_sub(1, Ordering::Relaxed);
            let copy = device(addr);
            // SAFETY: what `share` made, for the same buffer, by the caller's contract.
            unsafe {
                if direction != BufferDirection::DriverToDevice {
                    copy.copy_to_nonoverlapping(buffer.cast().as_ptr(), buffer.len());
                }
                dealloc(copy, layout(buffer.len()));
            }
        }
    }

    /// What the device has at an address.
    fn device(addr: PhysAddr) -> *mut u8 {
        core::ptr::with_exposed_provenance_mut((addr & !SHIFT) as usize)
    }

    #[test]
    fn a_hal_lends_buffers_and_memory_for_rings() {
        // SAFETY: one thread.
        let mapper = unsafe { HalMapper::<Copying>::new() };
        let ram = Ram::new(PAGE_SIZE);
        let buffer = Buffer::new(ram.slice(8, 16), Gpa(8));
        buffer.memory().fill(1);
        let lent = Streaming::map(&mapper, buffer, ToDevice).unwrap();
        // SAFETY: 16 bytes that `share` made.
        assert_eq!(unsafe { device(lent.addr().0).read() }, 1);
        drop(lent);
        let lent = Streaming::map(&mapper, buffer, FromDevice).unwrap();
        // SAFETY: as above.
        unsafe { device(lent.addr().0).write_bytes(2, 16) };
        let mut seen = [0; 16];
        lent.finish().memory().read(0, &mut seen);
        assert_eq!((seen, SHARED.load(Ordering::Relaxed)), ([2; 16], 0));

        let ring = Coherent::allocate(&mapper, PAGE_SIZE + 1).unwrap();
        let (addr, memory) = (ring.addr(), ring.memory());
        memory.fill(3);
        // SAFETY: within what was allocated.
        assert_eq!(unsafe { device(addr.0).add(PAGE_SIZE).read() }, 3);
        drop(ring);
        memory.fill(4); // still memory, though nobody's
        let again = Coherent::allocate(&mapper, 2 * PAGE_SIZE).unwrap();
        assert_eq!(again.addr(), addr, "kept for the next");
        let mut seen = [9];
        again.memory().read(0, &mut seen);
        assert_eq!((seen, ALLOCATED.load(Ordering::Relaxed)), ([0], 2), "cleared, and nothing new");
        drop(again);
        drop(mapper);
        assert_eq!(ALLOCATED.load(Ordering::Relaxed), 0);
    }
}
