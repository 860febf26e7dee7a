//! A software IOMMU: what stands between a device and memory in tests, in the demo and in the matrix.
//!
//! Knows domains, mappings, permissions, faults and when a translation may be taken away. Knows no rings, no devices and
//! no virtio.
//!
//! One [`Domain`] is one device's address space. The driver's side maps through [`Strict`], a [`dma::Mapper`]; a device
//! in the same process reaches memory through [`Walk`], a [`dma::Memory`] that looks at the mappings on each access and
//! caches nothing; a device in another process is fed by whoever asks [`Domain::lookup`] and has itself told of each
//! mapping that goes away ([`Invalidate`]).
//!
//! Bus addresses are handed out from a [`Window`] that, unless one says otherwise, is the upper half of the 64-bit
//! space: a bus address that is taken for a physical one, or cut to fewer bits, hits nothing.

#![no_std]

extern crate alloc;

use ringfence_dma as dma;

mod domain;
mod strict;
mod walk;

pub use domain::{Domain, Faults, Invalidate, MapError, Mapping, Window};
pub use strict::Strict;
pub use walk::{Lease, Sight, Walk};
