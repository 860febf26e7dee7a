//! The way out: QEMU ends.

use core::arch::asm;

use crate::port;

/// The power control of ACPI (PM1a_CNT) where QEMU's firmware puts it, on q35 and pc.
const POWER_CONTROL: u16 = 0x604;
/// SLP_EN, and 0 for the type of sleep: QEMU's S5.
const OFF: u16 = 1 << 13;

const KEYBOARD: u16 = 0x64;
const RESET: u8 = 0xfe;

/// A limit and an address, as `lidt` wants them, one after the other.
static NO_HANDLERS: [u16; 5] = [0; 5];

/// Switches the machine off. Where that is not to be had it is reset, at the last by a fault that nobody handles, and QEMU
/// ends at that if it was started with `-no-reboot`.
pub(crate) fn off() -> ! {
    port::write_16(POWER_CONTROL, OFF);
    port::write_8(KEYBOARD, RESET);
    // SAFETY: a table of interrupts with nothing in it, and then one: the processor gives up. Nothing runs after that.
    unsafe { asm!("lidt [{}]", "int3", in(reg) &raw const NO_HANDLERS, options(nostack)) }
    loop {
        // SAFETY: without interrupts the processor stops here for good.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
