//! Virtqueues: split (§2.7) and packed (§2.8), the device's half and the driver's half.
//!
//! Knows rings; knows no features, transports or IOMMUs. What was negotiated arrives as [`Rules`], where the rings lie
//! as a [`Layout`], and memory as what the caller has: a [`Visit`](ringfence_dma::Visit) on the device's side, in which
//! any page of a ring may be missing for a while, and coherent slices on the driver's.
//!
//! Each half takes the other for hostile. What the other side can write is read once, checked, and used from the copy;
//! how long a chain is and who owns what is kept here and never read back from the ring. A peer that breaks the rules
//! gets its queue stopped with a [`RingError`] or a [`DeviceError`] and nothing else happens: no panic, no unbounded loop.
//!
//! Nothing here allocates once a queue runs, apart from a [`Chain`] that grows to the longest chain it has held.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod area;
mod cells;
mod chain;
mod cursor;
mod device;
mod driver;
mod error;
mod layout;
mod position;
mod rules;
mod wire;

pub use cells::{RingCells, RingSlices};
pub use chain::{Chain, Descriptor, Head};
pub use device::{DeviceQueue, OpenQueue};
pub use driver::{AddError, DeviceError, DriverQueue, Framed, IndirectTable, Returned, RingMemory, Token, Used};
pub use error::{RingError, RingStop};
pub use layout::{Layout, LayoutError, RingArea};
pub use position::Position;
pub use rules::{Format, Indirect, Notifications, Rules};
