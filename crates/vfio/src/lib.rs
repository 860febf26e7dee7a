//! Virtio drivers in user space: a PCI function and its IOMMU by way of Linux's VFIO.
//!
//! Knows VFIO's groups, containers (type 1) and regions; knows no virtio. A [`Function`] is what
//! `ringfence_driver::pci` wants of PCI, a [`Container`] is the [`Iommu`](ringfence_driver::mapper::Iommu) that
//! the function is behind, and a [`Memory`] is what may be mapped in it. The device reaches what is mapped, and nothing
//! else of this process or of the machine. Its interrupts are [`Vector`]s.
//!
//! ```no_run
//! use ringfence_dma::{BusAddr, Mapper};
//! use ringfence_driver::blk::{Blk, Options};
//! use ringfence_driver::mapper::{Paged, Window};
//! use ringfence_driver::pci::Pci;
//! use ringfence_driver::policy::{DriverPolicy, Platform};
//! use ringfence_driver::{Host, Spin};
//! use ringfence_vfio::{Container, Memory};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = Memory::new(1 << 20)?;
//! let (container, function) = Container::open("0000:00:03.0", &memory)?;
//! let pages = memory.buffer();
//! let mapper = Paged::strict(Window::new(&container, BusAddr(1 << 32), 4096), pages.sub(0, 1 << 19));
//! let host = Host {
//!     platform: Platform::X86Iommu,
//!     policy: DriverPolicy::Refusing { allowed: &[] },
//!     physical: None,
//!     translated: Some(&mapper as &dyn Mapper),
//! };
//! let mut disk = Blk::start(Pci::new(function, Spin::default())?, host, Options::default())?;
//! disk.read(0, &[pages.sub(1 << 19, 4096)])?;
//! # Ok(())
//! # }
//! ```

#![cfg(target_os = "linux")]

mod container;
mod function;
mod memory;
mod sys;
mod vector;

pub use container::Container;
pub use function::{Function, RegisterMapping};
pub use memory::Memory;
pub use vector::Vector;
