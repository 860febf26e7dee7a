//! Anyone's vhost-user back-end, behind the IOMMU.
//!
//! Knows how to be a device for a VMM while another process is the device: it copies. Knows no translation and no guest
//! memory (`ringfence_vhost_user` hands it requests whose bytes can be reached), and of device types only what copying
//! needs ([`Kind`]).
//!
//! A [`Wrapped`] is a [`Device`](ringfence_device::Device). To the back-end it is a front-end without an IOMMU, whose whole
//! memory is an arena: a private file of rings and a bounce pool. No descriptor of the guest's memory ever goes there,
//! so what the back-end can reach is the kernel's to say and not the back-end's.
//!
//! A request's way: its readable bytes are copied into the pool while its translations are held; it goes on the
//! back-end's ring as a chain that is cut as the driver cut it; nothing of the guest's is held while the back-end works;
//! when it is done, what the driver may read of the answer is translated anew and copied back.
//!
//! # What a hostile back-end may do
//! Write anything to the arena at any time, answer anything on its socket, be silent, die. What it says is checked once and
//! used from the copy. A broken rule costs it its connection, and with it this arena: whoever answers next gets a new one.
//! What the driver asked for is remembered here and sent again. What it can do is what a disk can do: answer wrongly, or
//! not at all.

#![forbid(unsafe_code)]

mod arena;
mod bounce;
mod device;
mod kind;
mod link;
mod pool;
mod seat;

pub mod pass;

pub use device::Wrapped;
pub use kind::{Kind, UnknownKind};
pub use link::LinkError;

use ringfence_ring::Format;
use std::path::PathBuf;
use std::time::Duration;

/// What an operator decides about a wrapped back-end.
#[derive(Clone, Debug)]
pub struct Options {
    /// The back-end's socket.
    pub backend: PathBuf,
    /// What kind of device it is.
    pub kind: Kind,
    /// At most so many queues; `None`: as many as it has.
    pub queues: Option<u16>,
    /// The longest queue that a driver may set up.
    pub queue_size: u16,
    /// How many bytes of requests are with the back-end at the most. At least [`MIN_POOL`].
    pub pool: usize,
    /// The format of the rings that the back-end gets.
    pub format: Format,
    /// How long the back-end may leave a request unanswered before that counts as misbehaviour; `None`: for ever.
    pub timeout: Option<Duration>,
    /// What follows from misbehaviour.
    pub on_error: OnError,
    /// How long it is waited for when there is nobody to serve without it.
    pub patience: Duration,
}

/// What follows when a back-end breaks the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// It is connected to anew, and gets again what it has not answered.
    #[default]
    Reconnect,
    /// It is never heard again: every request fails that can say so, the others stand still.
    Stop,
}

/// The smallest pool.
pub const MIN_POOL: usize = 64 << 10;
