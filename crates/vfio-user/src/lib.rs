//! A whole virtio-pci function in a process of its own, over the vfio-user protocol: wire, session, server.
//!
//! Knows how a function on a bus and the machine that it is plugged into come to share registers, interrupts and memory.
//! Does not know what the device is (that is [`ringfence_device::Device`]), nor what is in its rings.
//!
//! [`wire`] is messages as types; [`session`] is the function's side of one connection, and [`server`] serves it on a
//! socket; [`client`] is the machine's side. Between them are the function itself, register by register, and the memory
//! that it was granted: what DMA_MAP says, at the addresses and with the permissions that it says, until DMA_UNMAP is
//! answered.

pub mod client;
pub mod server;
pub mod session;
pub mod wire;

mod bus;
mod event;
mod function;
mod link;
mod memory;

pub use function::layout;
pub use memory::MAX_MAPS;
