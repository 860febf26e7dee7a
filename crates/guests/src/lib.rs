//! Real kernels in real QEMU: fetch, boot, read the console.
//!
//! Knows Debian's packages, QEMU's options and what a guest prints. It knows
//! nothing of Ringfence's own server: a disk is QEMU's own device or any
//! vhost-user socket, and what a feature bit means is the caller's business.
//!
//! ```no_run
//! use ringfence_guests::{
//!     Boot, Cache, Disk, Image, Interface, Platform, Qemu, QemuSource, System, VirtioFlag, Watch,
//! };
//! # fn main() -> Result<(), ringfence_guests::Error> {
//! let cache = Cache::open("target/guests".as_ref(), &|line| println!("{line}"))?;
//! let platform = Platform::named("arm64-smmuv3-lazy").expect("in the table");
//! let image = Image::create("target/disk.img".as_ref(), 1)?;
//! let boot = Boot {
//!     qemu: &Qemu::find(&cache, QemuSource::Auto, &[platform.arch])?,
//!     platform,
//!     system: System::Linux {
//!         kernel: &cache.kernel(platform.kernel, platform.arch)?,
//!         busybox: &cache.busybox(platform.arch)?,
//!         xen: None,
//!     },
//!     disk: Disk::QemuOwn(image.path()),
//!     platform_access: VirtioFlag::On,
//!     interface: Interface::Modern,
//!     timeout: std::time::Duration::from_secs(120),
//!     watch: &|_| Watch::On,
//! };
//! let outcome = boot.run()?;
//! println!("{:?} after {:?}", outcome.guest()?.group, outcome.elapsed);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod apt;
mod backend;
mod boot;
mod cache;
mod console;
mod error;
mod image;
mod initramfs;
mod kernel;
mod lspci;
mod modules;
mod packages;
mod passt;
mod platform;
mod qemu;
mod qmp;
mod storage_daemon;
mod tool;
mod trace;
mod unpacked;
mod virtiofsd;

pub use backend::Backend;
pub use boot::{Boot, Disk, End, Interface, Outcome, System, VFIO_MODULES, VirtioFlag, Watch};
pub use cache::{Cache, scratch};
pub use console::{DiskState, Features, Guest};
pub use error::Error;
pub use image::{Image, ImageState};
pub use initramfs::Initramfs;
pub use kernel::Kernel;
pub use lspci::Lspci;
pub use packages::{Arch, Suite};
pub use passt::Passt;
pub use platform::{Hypervisor, Iommu, KernelSeries, PLATFORMS, Platform};
pub use qemu::{Qemu, QemuSource};
pub use qmp::{Monitor, Ring, Virtio};
pub use storage_daemon::StorageDaemon;
pub use trace::{IommuTrace, Translation};
pub use virtiofsd::Virtiofsd;
