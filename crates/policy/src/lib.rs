//! What a virtio device offers and refuses, and what a driver takes and refuses, about the IOMMU.
//!
//! The proposal that led to `VIRTIO_F_ACCESS_PLATFORM` (bit 33), as pure decisions. Knows platforms, kinds of device and
//! driver, and feature sets as numbers; knows no rings, no memory, no transport, and what no bit but this one means.
//!
//! This is the only crate that names the bit. Everyone else gets the decision as an object: a device an [`Addressing`]
//! from [`IommuMode::accept`], a driver a [`Taken`] from [`driver_takes`], and whoever is turned away a [`Refusal`] that
//! says who refused, why, and what to do.
//!
//! ```
//! use ringfence_policy::{Addressing, IommuMode};
//!
//! let device_bits = 1 << 32; // whatever the device model supports: VERSION_1 is the caller's business
//! let offered = IommuMode::Require.offers(device_bits);
//! assert_eq!(IommuMode::Require.accept(offered, offered), Ok(Addressing::Translated));
//! assert!(IommuMode::Require.accept(offered, device_bits).is_err());
//! ```

#![no_std]
#![forbid(unsafe_code)]

mod device;
mod driver;
mod platform;
mod refusal;
#[cfg(test)]
mod table;

pub use device::{DeviceKind, IommuMode, Reach, UnknownMode};
pub use driver::{Allow, DriverPolicy, Identity, Taken, driver_takes};
pub use platform::Platform;
pub use refusal::{Refusal, Side};

/// Whose addresses a ring carries, as the negotiation settled it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Addressing {
    /// The driver's own physical addresses, whatever the platform says about an IOMMU (§6.1, flag not taken).
    Physical,
    /// Addresses from the platform's DMA API: translated or limited on the way, by an IOMMU or whatever else the
    /// platform has. Where it has nothing they happen to equal the physical ones.
    Translated,
}

/// `VIRTIO_F_ACCESS_PLATFORM`, the flag that all of this is about.
const FLAG: u64 = virtio_spec::F::ACCESS_PLATFORM.bits().to_ne() as u64;
