//! A machine without an operating system: QEMU's x86-64 PC, started by `-kernel`.
//!
//! Knows the way in, the map of memory, the serial port, PCI's configuration, a watchdog and the way out. It knows no
//! virtio and no driver: those are what the programs in `src/bin` are about. A program has
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//!
//! #[unsafe(no_mangle)]
//! extern "C" fn guest() -> ! {
//!     ringfence_bare_metal::tell("kernel", "mine");
//!     ringfence_bare_metal::finish("done")
//! }
//! ```
//!
//! One processor, no threads; memory below 4 GiB is mapped to itself, so that a pointer is a physical address. No heap:
//! what a program needs is static.

#![no_std]

mod mem;
pub mod memory;
pub mod pci;
mod port;
mod power;
mod report;
mod serial;
mod traps;
pub mod watchdog;

pub use report::{finish, tell};

core::arch::global_asm!(include_str!("entry.s"), options(att_syntax, raw));

unsafe extern "C" {
    /// The program; never returns.
    safe fn guest() -> !;
}

/// Called by `entry.s`, once, on a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn boot() -> ! {
    serial::start();
    traps::start();
    watchdog::start();
    guest()
}
