//! What a guest says of itself: the lines that `ringfence-guests` reads from consoles.

use core::fmt::{Display, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::power;
use crate::serial::Serial;

/// Prints a fact.
pub fn tell(key: &str, value: impl Display) {
    // The serial port takes everything.
    let _ = writeln!(Serial, "RINGFENCE {key}={value}");
}

/// Says how it went, as `done`, `failed` or `refused`, and ends QEMU.
pub fn finish(end: &str) -> ! {
    tell("end", end);
    power::off()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    if PANICKED.swap(true, Ordering::Relaxed) {
        power::off();
    }
    // A panic's own text has two lines.
    match info.location() {
        Some(place) => tell("error", format_args!("panic: {} ({place})", info.message())),
        None => tell("error", format_args!("panic: {}", info.message())),
    }
    finish("failed")
}
