//! A bound on every wait, also on those in code that is not ours: the timer ends what takes too long.

use core::arch::asm;
use core::mem;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use crate::port;
use crate::report::finish;
use crate::traps;

const HERTZ: u32 = 100;
const TIMER_INPUT: u32 = 1_193_182;

/// Counted down by `entry.s`, which acts when it comes to nothing.
#[unsafe(no_mangle)]
static ticks_left: AtomicU32 = AtomicU32::new(0);

static EXPIRED: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// From now on `expired` is called, wherever the program is, when `seconds` are over and
/// `allow` was not called again.
pub fn allow(seconds: u32, expired: fn() -> !) {
    EXPIRED.store(expired as *mut (), Ordering::Relaxed);
    ticks_left.store(seconds * HERTZ, Ordering::Relaxed);
}

/// What is left of the time that was allowed.
pub fn seconds_left() -> u32 {
    ticks_left.load(Ordering::Relaxed).div_ceil(HERTZ)
}

#[unsafe(no_mangle)]
extern "C" fn time_is_up() -> ! {
    let expired = EXPIRED.load(Ordering::Relaxed);
    if expired.is_null() {
        // 497 days without a bound.
        finish("failed");
    }
    // SAFETY: `allow` is the only one to write it, and writes such a function.
    let expired = unsafe { mem::transmute::<*mut (), fn() -> !>(expired) };
    expired()
}

/// Starts the timer (8254) and lets its interrupt alone through the controllers (8259).
pub(crate) fn start() {
    let [low, high] = ((TIMER_INPUT / HERTZ) as u16).to_le_bytes();
    let writes = [
        (0x43, 0x34), // counter 0, periodic
        (0x40, low),
        (0x40, high),
        (0x20, 0x11), // start of initialisation, of both
        (0xa0, 0x11),
        (0x21, traps::TIMER),
        (0xa1, traps::TIMER + 8),
        (0x21, 4), // the second is at the first's input 2
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
        (0x21, 0xfe), // input 0 alone
        (0xa1, 0xff),
    ];
    writes.iter().for_each(|&(port, value)| port::write_8(port, value));
    // SAFETY: the gates are there, and `tick` keeps every register.
    unsafe { asm!("sti", options(nomem, nostack)) }
}
