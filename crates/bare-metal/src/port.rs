//! x86's I/O ports. What a device does when it is written to is the caller's to know: none that this crate writes to
//! moves our memory.

use core::arch::asm;

macro_rules! read {
    ($name:ident, $width:ty, $register:tt) => {
        pub(crate) fn $name(port: u16) -> $width {
            let value;
            // SAFETY: the instruction touches no memory.
            unsafe {
                asm!(concat!("in ", $register, ", dx"), out($register) value, in("dx") port, options(nomem, nostack));
            }
            value
        }
    };
}

macro_rules! write {
    ($name:ident, $width:ty, $register:tt) => {
        pub(crate) fn $name(port: u16, value: $width) {
            // SAFETY: the instruction touches no memory.
            unsafe { asm!(concat!("out dx, ", $register), in("dx") port, in($register) value, options(nomem, nostack)) }
        }
    };
}

read!(read_8, u8, "al");
read!(read_32, u32, "eax");
write!(write_8, u8, "al");
write!(write_16, u16, "ax");
write!(write_32, u32, "eax");
