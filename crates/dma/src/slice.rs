use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// A piece of memory that both sides of a device touch, good for `'m`.
///
/// The other side may write at any time, so there is never a reference into it: bytes are copied in and out, and what
/// was copied out is what gets checked. Every method checks its bounds; being out of them is our own mistake and panics.
#[derive(Clone, Copy, Debug)]
pub struct HostSlice<'m> {
    start: NonNull<u8>,
    len: usize,
    memory: PhantomData<&'m ()>,
}

// SAFETY: a slice is an address and a length; every access through it is a copy or an atomic, and the memory is by
// definition shared with parties that no lock of ours could stop.
unsafe impl Send for HostSlice<'_> {}
// SAFETY: as above.
unsafe impl Sync for HostSlice<'_> {}

macro_rules! atomic {
    ($load:ident, $store:ident, $int:ty, $atomic:ty) => {
        /// Reads a little-endian integer in one access where it is aligned, else byte by byte.
        #[inline]
        pub fn $load(&self, offset: usize, order: Ordering) -> $int {
            let at = self.at(offset, size_of::<$int>()).cast::<$int>();
            if at.is_aligned() {
                // SAFETY: in bounds by `at`, aligned, alive for 'm by `new`; atomics may race with anything.
                <$int>::from_le(unsafe { <$atomic>::from_ptr(at.as_ptr()) }.load(order))
            } else {
                let mut bytes = [0; size_of::<$int>()];
                self.read(offset, &mut bytes);
                <$int>::from_le_bytes(bytes)
            }
        }

        /// Writes a little-endian integer in one access where it is aligned, else byte by byte.
        #[inline]
        pub fn $store(&self, offset: usize, value: $int, order: Ordering) {
            let at = self.at(offset, size_of::<$int>()).cast::<$int>();
            if at.is_aligned() {
                // SAFETY: in bounds by `at`, aligned, alive for 'm by `new`; atomics may race with anything.
                unsafe { <$atomic>::from_ptr(at.as_ptr()) }.store(value.to_le(), order);
            } else {
                self.write(offset, &value.to_le_bytes());
            }
        }
    };
}

/// Integers that both sides of a device may touch at the same time; see [`HostSlice::cells`].
pub trait Cell: sealed::Cell {}

impl Cell for AtomicU16 {}
impl Cell for AtomicU32 {}
impl Cell for AtomicU64 {}
impl<T: Cell, const N: usize> Cell for [T; N] {}

mod sealed {
    use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

    /// # Safety
    /// Every byte belongs to an atomic, and any value will do.
    pub unsafe trait Cell {}

    // SAFETY: so it is.
    unsafe impl Cell for AtomicU16 {}
    // SAFETY: so it is.
    unsafe impl Cell for AtomicU32 {}
    // SAFETY: so it is.
    unsafe impl Cell for AtomicU64 {}
    // SAFETY: an array has no bytes but those of its elements.
    unsafe impl<T: Cell, const N: usize> Cell for [T; N] {}
}

impl<'m> HostSlice<'m> {
    /// A slice of `len` bytes from `start`.
    ///
    /// # Safety
    /// For all of `'m` the bytes are mapped, readable and writable, and no Rust reference to any of them exists but to
    /// atomics.
    #[inline]
    pub unsafe fn new(start: NonNull<u8>, len: usize) -> Self {
        Self { start, len, memory: PhantomData }
    }

    /// How many bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a resolved slice is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of the first byte, for system calls. Touching memory through it is up to the caller's own proof.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// `len` bytes from `offset`.
    #[inline]
    pub fn sub(&self, offset: usize, len: usize) -> HostSlice<'m> {
        HostSlice { start: self.at(offset, len), len, memory: PhantomData }
    }

    /// Copies `into.len()` bytes from `offset` out of the slice.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let at = self.at(offset, into.len());
        // SAFETY: in bounds by `at`; `into` is ours alone, so the two cannot overlap. A writer on the other side makes
        // the bytes that arrive arbitrary, not the copy wrong: they go into plain memory and are checked there.
        unsafe { at.as_ptr().copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) }
    }

    /// Copies `from` to `offset` in the slice.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) {
        let at = self.at(offset, from.len());
        // SAFETY: as in `read`, the other way round.
        unsafe { at.as_ptr().copy_from_nonoverlapping(from.as_ptr(), from.len()) }
    }

    /// Copies all of `from` to `offset` in the slice. The two may overlap.
    #[inline]
    pub fn copy_from(&self, offset: usize, from: HostSlice<'_>) {
        let at = self.at(offset, from.len);
        // SAFETY: `at` is in bounds, `from` is good for its own length; neither is referenced, see `new`. What others
        // write meanwhile makes the bytes arbitrary, not the copy wrong.
        unsafe { at.as_ptr().copy_from(from.as_ptr(), from.len) }
    }

    /// Sets every byte to `value`.
    #[inline]
    pub fn fill(&self, value: u8) {
        // SAFETY: the whole slice, valid by `new`.
        unsafe { self.start.as_ptr().write_bytes(value, self.len) }
    }

    /// `count` integers from `offset`, as atomics: bounds and alignment are looked at once, and not at each access. They hold
    /// little-endian values. Out of bounds panics.
    ///
    /// `None` where they are not aligned.
    #[inline]
    pub fn cells<T: Cell>(&self, offset: usize, count: usize) -> Option<&'m [T]> {
        let len = count.checked_mul(size_of::<T>()).expect("a length that fits the address space");
        let at = self.at(offset, len).cast::<T>();
        // SAFETY: in bounds by `at`, aligned, mapped for 'm by `new`; a `Cell` is nothing but atomics, which hold whatever
        // bytes there are and may race with anything.
        at.is_aligned().then(|| unsafe { core::slice::from_raw_parts(at.as_ptr(), count) })
    }

    /// Has the first cache line brought near, for `access`. Changes nothing.
    #[inline]
    pub fn approach(&self, access: crate::Access) {
        #[cfg(target_arch = "x86_64")]
        {
            use core::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
            let line = self.start.as_ptr().cast_const().cast();
            // SAFETY: a hint, which has no effect on what any memory holds and can't fail.
            unsafe {
                match access {
                    crate::Access::Read => _mm_prefetch::<_MM_HINT_T0>(line),
                    crate::Access::Write => _mm_prefetch::<_MM_HINT_ET0>(line),
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = access;
    }

    atomic!(load_u16, store_u16, u16, AtomicU16);
    atomic!(load_u32, store_u32, u32, AtomicU32);
    atomic!(load_u64, store_u64, u64, AtomicU64);

    /// Forgets for how long the slice is good, so that it can wait beside the lease that keeps it good.
    #[inline]
    pub fn detach(self) -> DetachedSlice {
        DetachedSlice { start: self.start, len: self.len }
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset <= self.len && len <= self.len - offset, "{len} bytes at {offset} of a slice of {}", self.len);
        // SAFETY: within the slice by the line above.
        unsafe { self.start.add(offset) }
    }
}

/// A [`HostSlice`] that has forgotten for how long it is good, and therefore can't be touched.
///
/// Laid out as an `iovec` is: a pointer, then a length.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DetachedSlice {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; nothing can be done with them but `attach`, which is unsafe.
unsafe impl Send for DetachedSlice {}

impl DetachedSlice {
    /// How many bytes.
    #[expect(clippy::len_without_is_empty, reason = "comes from a slice that is never empty")]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of the first byte, for system calls.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Takes `next` in, where it follows in memory; `false`, and nothing changed, where it does not. What one system call
    /// or copy can do need not be two.
    #[inline]
    pub fn join(&mut self, next: &DetachedSlice) -> bool {
        let follows = self.start.as_ptr().addr().checked_add(self.len) == Some(next.start.as_ptr().addr());
        match self.len.checked_add(next.len) {
            Some(len) if follows => {
                self.len = len;
                true
            }
            _ => false,
        }
    }

    /// The slice again.
    ///
    /// # Safety
    /// The memory is good for all of `'m`: the visit that resolved it is still open, or a lease over it is still held.
    #[inline]
    pub unsafe fn attach<'m>(self) -> HostSlice<'m> {
        // SAFETY: by this function's own contract.
        unsafe { HostSlice::new(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use crate::Ram;
    use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

    #[test]
    fn integers_are_little_endian_whether_aligned_or_not() {
        let ram = Ram::new(64);
        let slice = ram.slice(0, 64);
        for offset in [0, 1, 3, 8] {
            slice.store_u32(offset, 0x0403_0201, Ordering::Relaxed);
            let mut bytes = [0; 4];
            slice.read(offset, &mut bytes);
            assert_eq!(bytes, [1, 2, 3, 4]);
            assert_eq!(slice.load_u32(offset, Ordering::Relaxed), 0x0403_0201);
        }
    }

    #[test]
    fn what_follows_is_joined_and_nothing_else() {
        let ram = Ram::new(64);
        let mut joined = ram.slice(8, 8).detach();
        for (at, follows) in [(0, false), (17, false), (8, false), (16, true), (16, false), (24, true)] {
            assert_eq!(joined.join(&ram.slice(at, 8).detach()), follows, "at {at}");
        }
        assert_eq!((joined.as_ptr(), joined.len()), (ram.slice(8, 24).as_ptr(), 24));
    }

    #[test]
    fn cells_are_aligned_or_not_there() {
        let ram = Ram::new(64);
        let slice = ram.slice(0, 64);
        let cells: &[[AtomicU32; 2]] = slice.cells(4, 3).unwrap();
        cells[2][1].store(0x0403_0201_u32.to_le(), Ordering::Relaxed);
        assert_eq!((cells.len(), slice.load_u32(24, Ordering::Relaxed)), (3, 0x0403_0201));
        assert!(slice.cells::<AtomicU16>(1, 1).is_none());
        assert!(slice.cells::<AtomicU64>(4, 1).is_none());
    }

    #[test]
    #[should_panic(expected = "64 bytes at 8 of a slice of 64")]
    fn no_cell_is_out_of_bounds() {
        let _ = Ram::new(64).slice(0, 64).cells::<AtomicU64>(8, 8);
    }

    #[test]
    #[should_panic(expected = "2 bytes at 7 of a slice of 8")]
    fn out_of_bounds_is_our_mistake() {
        Ram::new(8).slice(0, 8).load_u16(7, Ordering::Relaxed);
    }
}
