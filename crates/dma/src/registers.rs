use core::marker::PhantomData;
use core::ptr::NonNull;

/// A window of a device's registers, mapped for `'m`.
///
/// What is read has side effects and may differ each time: every access is one volatile instruction of exactly the width
/// that was asked for, and is made. Registers are little-endian. Every method checks bounds and alignment; being out of
/// them is our own mistake and panics.
///
/// Writes to memory made before a register is written are visible to a device that is told by that write: where the
/// processor does not order the two by itself, each write to a register begins with a barrier.
#[derive(Clone, Copy, Debug)]
pub struct RegisterWindow<'m> {
    start: NonNull<u8>,
    len: usize,
    registers: PhantomData<&'m ()>,
}

// SAFETY: an address and a length. Who may touch a register when is a matter of the device's protocol; the accesses
// themselves race with nothing but the device.
unsafe impl Send for RegisterWindow<'_> {}
// SAFETY: as above.
unsafe impl Sync for RegisterWindow<'_> {}

macro_rules! register {
    ($read:ident, $write:ident, $int:ty) => {
        /// Reads the register at `offset` in one access.
        #[inline]
        pub fn $read(&self, offset: usize) -> $int {
            let at = self.at(offset, size_of::<$int>()).cast::<$int>();
            // SAFETY: in bounds and aligned by `at`, mapped for 'm by `new`.
            <$int>::from_le(unsafe { at.as_ptr().read_volatile() })
        }

        /// Writes the register at `offset` in one access.
        #[inline]
        pub fn $write(&self, offset: usize, value: $int) {
            let at = self.at(offset, size_of::<$int>()).cast::<$int>();
            memory_before_registers();
            // SAFETY: in bounds and aligned by `at`, mapped for 'm by `new`.
            unsafe { at.as_ptr().write_volatile(value.to_le()) }
        }
    };
}

impl<'m> RegisterWindow<'m> {
    /// A window of `len` bytes from `start`.
    ///
    /// # Safety
    /// For all of `'m` the bytes are mapped as registers are (uncached), they are a device's or do as if (what is written
    /// there harms nothing but the device), and no Rust reference to any of them exists.
    #[inline]
    pub unsafe fn new(start: NonNull<u8>, len: usize) -> Self {
        Self { start, len, registers: PhantomData }
    }

    /// How many bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "nobody maps a window without a register")]
    pub fn len(&self) -> usize {
        self.len
    }

    register!(read_u8, write_u8, u8);
    register!(read_u16, write_u16, u16);
    register!(read_u32, write_u32, u32);

    #[inline]
    fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset <= self.len && len <= self.len - offset, "{len} bytes at {offset} of a window of {}", self.len);
        // SAFETY: within the window by the line above.
        let at = unsafe { self.start.add(offset) };
        assert!(at.addr().get().is_multiple_of(len), "a register of {len} bytes at {at:p}");
        at
    }
}

/// Orders stores to memory before the store to a register that follows. x86 does so by itself: memory is written back
/// cached there and registers are uncached, and neither store passes the other.
#[inline]
fn memory_before_registers() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier touches nothing.
    unsafe {
        core::arch::asm!("dsb st", options(nostack, preserves_flags));
    }
    #[cfg(any(target_arch = "riscv32", target_arch = "riscv64"))]
    // SAFETY: a barrier touches nothing.
    unsafe {
        core::arch::asm!("fence w, o", options(nostack, preserves_flags));
    }
    // Elsewhere the strongest that there is for processors; on x86 it keeps the compiler from reordering, for nothing.
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
    #[cfg(not(any(
        target_arch = "aarch64",
        target_arch = "riscv32",
        target_arch = "riscv64",
        target_arch = "x86",
        target_arch = "x86_64"
    )))]
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ram;

    fn window(ram: &Ram) -> RegisterWindow<'_> {
        let start = NonNull::new(ram.slice(0, 8).as_ptr()).unwrap();
        // SAFETY: memory that lives as long as the borrow and has no references; it does as registers do.
        unsafe { RegisterWindow::new(start, 8) }
    }

    #[test]
    fn registers_are_little_endian_and_of_the_width_asked_for() {
        let ram = Ram::new(8);
        let window = window(&ram);
        window.write_u32(4, 0x0403_0201);
        assert_eq!([4, 5, 6, 7].map(|at| window.read_u8(at)), [1, 2, 3, 4]);
        window.write_u16(6, 0x0807);
        window.write_u8(4, 9);
        assert_eq!((window.read_u32(4), window.read_u16(4)), (0x0807_0209, 0x0209));
    }

    #[test]
    #[should_panic(expected = "a register of 4 bytes at")]
    fn registers_are_aligned() {
        window(&Ram::new(8)).read_u32(2);
    }

    #[test]
    #[should_panic(expected = "4 bytes at 8 of a window of 8")]
    fn out_of_bounds_is_our_mistake() {
        window(&Ram::new(8)).write_u32(8, 0);
    }
}
