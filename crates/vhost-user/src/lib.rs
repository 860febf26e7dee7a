//! The vhost-user protocol with IOTLB: wire, session, server, client.
//!
//! Knows how a device in one process and a VMM in another come to share memory, rings and translations. Does not know
//! what the device is (that is `ringfence_device::Device`), nor what is in its rings.
//!
//! [`wire`] is messages as types, [`channel`] a socket that carries them; [`session`] is the back-end's side of one
//! connection without its socket, [`server`] that with one; [`client`] is the front-end's side.

pub mod channel;
pub mod client;
pub mod server;
pub mod session;
pub mod wire;

mod backend;
mod faults;
mod keep;
mod vring;

pub use faults::Limit;
