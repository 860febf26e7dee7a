//! Memory as one side of a virtio device sees it.
//!
//! Knows addresses, access rights, faults and how to touch memory that somebody else writes at the same time. Knows no
//! rings, no devices, no IOMMU: whether a bus address is translated is the business of whoever implements [`Memory`].
//!
//! Three kinds of address exist and are never mixed: a [`BusAddr`] is what a driver puts into a descriptor, a [`Gpa`] is
//! where that lands in the guest's memory, a [`FrontendVa`] is how a VMM names the same byte in vhost-user messages.
//!
//! The device's side is [`Memory`]: a queue is handed one when it starts. Each time it has work it makes a [`Visit`];
//! what it resolves through the visit is good until the visit ends, and a [`Visit::lease`] keeps it good for longer.

#![no_std]

extern crate alloc;

mod access;
mod address;
mod granules;
mod lock;
mod mapper;
mod memory;
mod ram;
mod registers;
mod slice;

pub use access::{Access, Fault, FaultReason, Miss, Permission, Stop, Ticket};
pub use address::{BusAddr, FrontendVa, Gpa};
pub use granules::Granules;
pub use lock::{Lock, Locked};
pub use mapper::{
    Both, Buffer, Coherent, DeviceReads, DeviceWrites, Direction, DmaError, FromDevice, Handover, Loan, Mapped, Mapper,
    Pool, Streaming, ToDevice,
};
pub use memory::{Memory, Physical, Visit, copy_from_bus, copy_to_bus};
pub use ram::Ram;
pub use registers::RegisterWindow;
pub use slice::{Cell, DetachedSlice, HostSlice};
