//! The same table with real kernels in real QEMU: each cell is a guest that boots, and drives a disk.
//!
//! A [`Cell`] names a platform, a driver and a device of today, and the cell of the proposal's table that it stands for.
//! [`Session::run`] boots it and looks at everything: what the guest read and read back, what the image holds, where the driver
//! put its ring, which pages the IOMMU let the device reach, what the server counted, who complained. From that alone
//! follows the verdict; what it should be is data (`data/real.json`).

mod cell;
mod expected;
mod kit;
mod report;
mod run;
mod seen;
mod session;
mod verdict;

pub use cell::{Cell, Device, Driver};
pub use report::Report;
pub use ringfence_guests::{QemuSource, Suite};
pub use session::{Event, Options, Programs, Session};
