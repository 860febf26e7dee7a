//! Virtio drivers for kernels, unikernels, firmware and user space, on a DMA API that is per device and fallible.
//!
//! Knows how a driver brings a device up (§3.1.1) and what it then asks of it. [`Transport`] is how a device is
//! reached: [`pci`] and [`mmio`] over a kernel's [`Registers`], [`embedded`] without any. Knows no IOMMU: [`policy`] decides whether addresses are translated, and a
//! [`Mapper`](ringfence_dma::Mapper) makes them.
//!
//! The device is a stranger. What it answers is checked and named when wrong, and never indexes anything; what it was
//! lent stays lent until it is done with it or has been reset.
//!
//! ```
//! use ringfence_dma::{Buffer, Mapper};
//! use ringfence_driver::blk::{Blk, Options};
//! use ringfence_driver::policy::{DriverPolicy, Platform};
//! use ringfence_driver::{Host, Transport};
//!
//! /// Copies the first sector to the second, through whatever stands between this disk and memory.
//! fn copy_sector<'a, T: Transport<Error: 'static>>(
//!     transport: T,
//!     dma_api: &'a dyn Mapper,
//!     sector: Buffer<'a>,
//! ) -> Result<(), Box<dyn core::error::Error>> {
//!     let host = Host {
//!         platform: Platform::X86Iommu,
//!         policy: DriverPolicy::Refusing { allowed: &[] },
//!         physical: None,
//!         translated: Some(dma_api),
//!     };
//!     let mut disk = Blk::start(transport, host, Options::default())?;
//!     disk.read(0, &[sector])?;
//!     disk.write(1, &[sector])?;
//!     Ok(disk.flush()?)
//! }
//! ```
//!
//! To add a driver, write one file as [`blk`] is; to add a transport, implement [`Transport`].

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod config;
mod lending;
mod loans;
mod queue;
mod registers;
mod start;
mod transport;

pub mod blk;
pub mod console;
pub mod embedded;
pub mod mapper;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod rng;
pub mod tasks;
pub mod viommu;

pub use lending::{LoanError, LoanId, Side};
pub use registers::{Registers, Spin, Wait, Waiting};
pub use ringfence_policy as policy;
pub use start::{Host, Running, StartError, Started, Wants, start};
pub use transport::Transport;
pub use virtio_spec::DeviceStatus;

/// The guide's code compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/driver.md")]
struct Guide;
