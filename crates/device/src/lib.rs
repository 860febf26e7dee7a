//! Virtio devices: one file a device model, storage behind a trait, and the engine that serves their queues.
//!
//! Knows requests and what to do with them. Does not know whether an IOMMU exists ([`ringfence_dma::Memory`] is handed
//! to a queue when it starts), nor how a driver reaches the device: that is a transport's business.
//!
//! To add a device, write one file with a [`Device`] and its [`Handler`], and add its line below.

mod bell;
mod device;
mod request;

pub mod blk;
pub mod eventfd;
pub mod queue;
pub mod rng;
pub mod storage;
pub mod worker;

pub use bell::Bell;
pub use device::{Back, Device, Handler, Outcome, Token};
pub use request::{Pieces, Request, Unreachable};
