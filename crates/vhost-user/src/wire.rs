//! The messages of vhost-user as types that cannot hold nonsense (QEMU, docs/interop/vhost-user.rst).
//!
//! Knows numbers, sizes, and which message carries how many file descriptors. Knows no sockets and no state: whether a
//! message is in order *now* is the session's business. All integers travel in the machine's own byte order.
//!
//! Parsing is total. A peer may send any bytes: what comes back is a message or a [`WireError`] that names it, and
//! every file descriptor that came with a bad message is closed. Where the header itself was good the message has been
//! taken off the stream whole, so a bad one can still be answered and the next one read.

mod backend;
mod code;
mod error;
mod iotlb;
mod payload;
mod reply;
mod request;

pub use backend::BackendRequest;
pub use code::{BackendCode, FrontendCode};
pub use error::WireError;
pub use iotlb::{Invalidated, Iotlb, IotlbMessage, IotlbReport};
pub use reply::Reply;
pub use request::{Enable, Inflight, MAX_REGIONS, Request, VringAddr, VringFd};

use std::os::fd::{AsFd, BorrowedFd};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// vhost-user's own feature bit: protocol features can be negotiated. A driver never sees it (bit 30 is reserved).
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// The longest payload that is taken, in bytes. The longest message in use, SET_CONFIG, stays under it.
pub const MAX_BODY: usize = 4096;

/// The most file descriptors that any message carries: one a region of SET_MEM_TABLE.
pub const MAX_FDS: usize = MAX_REGIONS;

bitflags::bitflags! {
    /// Protocol features: what of vhost-user itself both sides can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct ProtocolFeatures: u64 {
        /// The back-end has several queues and says how many (GET_QUEUE_NUM).
        const MQ = 1 << 0;
        /// The dirty log arrives as a file descriptor.
        const LOG_SHMFD = 1 << 1;
        /// The back-end announces a migrated guest on the network.
        const RARP = 1 << 2;
        /// Any message can ask for an answer.
        const REPLY_ACK = 1 << 3;
        /// The front-end sets the MTU.
        const MTU = 1 << 4;
        /// The back-end has a channel for requests of its own.
        const BACKEND_REQ = 1 << 5;
        /// Legacy rings in the other byte order.
        const CROSS_ENDIAN = 1 << 6;
        /// Sessions of a crypto device.
        const CRYPTO_SESSION = 1 << 7;
        /// Postcopy migration.
        const PAGEFAULT = 1 << 8;
        /// The configuration space is the back-end's.
        const CONFIG = 1 << 9;
        /// The back-end's own requests may carry file descriptors.
        const BACKEND_SEND_FD = 1 << 10;
        /// Doorbells that the guest writes directly.
        const HOST_NOTIFIER = 1 << 11;
        /// Requests under way survive a back-end that crashes.
        const INFLIGHT_SHMFD = 1 << 12;
        /// RESET_DEVICE.
        const RESET_DEVICE = 1 << 13;
        /// Kicks and calls as messages.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// Memory regions come and go one by one.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// SET_STATUS and GET_STATUS.
        const STATUS = 1 << 16;
        /// Memory regions described as Xen needs it.
        const XEN_MMAP = 1 << 17;
        /// Objects shared between back-ends.
        const SHARED_OBJECT = 1 << 18;
        /// The device's state moves with a migration.
        const DEVICE_STATE = 1 << 19;
    }
}

/// Whether the sender of a message waits for an answer (REPLY_ACK).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeedReply {
    /// It waits. Zero means success.
    Yes,
    /// It does not, unless the message has an answer of its own.
    No,
}

/// Whether a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It asks.
    Request,
    /// It answers.
    Reply,
}

/// What comes before every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The message's number. The two directions number their messages apart.
    pub request: u32,
    /// Asking or answering.
    pub kind: Kind,
    /// Whether an answer was asked for. Some back-ends copy it into their replies, where it means nothing.
    pub need_reply: NeedReply,
    /// The payload's length in bytes, at most [`MAX_BODY`].
    pub size: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    /// Length on the wire, in bytes.
    pub const SIZE: usize = size_of::<RawHeader>();
    const VERSION: u32 = 1;
    const VERSION_MASK: u32 = 0b11;
    const REPLY: u32 = 1 << 2;
    const NEED_REPLY: u32 = 1 << 3;

    /// Reads a header.
    ///
    /// # Errors
    /// After one the stream is lost: what follows cannot be told apart from anything.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, WireError> {
        let RawHeader { request, flags, size } = zerocopy::transmute!(*bytes);
        if flags & Self::VERSION_MASK != Self::VERSION {
            return Err(WireError::Version { request, version: flags & Self::VERSION_MASK });
        }
        if flags & !(Self::VERSION_MASK | Self::REPLY | Self::NEED_REPLY) != 0 {
            return Err(WireError::Flags { request, flags });
        }
        if size as usize > MAX_BODY {
            return Err(WireError::TooLong { request, size, max: MAX_BODY });
        }
        Ok(Self {
            request,
            kind: if flags & Self::REPLY == 0 { Kind::Request } else { Kind::Reply },
            need_reply: if flags & Self::NEED_REPLY == 0 { NeedReply::No } else { NeedReply::Yes },
            size,
        })
    }

    /// The header as it travels.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let reply = if self.kind == Kind::Reply { Self::REPLY } else { 0 };
        let need_reply = if self.need_reply == NeedReply::Yes { Self::NEED_REPLY } else { 0 };
        zerocopy::transmute!(RawHeader {
            request: self.request,
            flags: Self::VERSION | reply | need_reply,
            size: self.size,
        })
    }
}

/// A message ready to be sent.
#[derive(Debug)]
pub struct Frame<'f> {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// The file descriptors that travel with it.
    pub fds: Vec<BorrowedFd<'f>>,
}

impl<'f> Frame<'f> {
    fn new(request: u32, kind: Kind, need_reply: NeedReply, body: &[u8]) -> Self {
        assert!(body.len() <= MAX_BODY, "message {request} of ours with {} bytes", body.len());
        let header = Header { request, kind, need_reply, size: body.len() as u32 };
        Self { bytes: [&header.encode(), body].concat(), fds: Vec::new() }
    }

    fn with_fd(mut self, fd: &'f impl AsFd) -> Self {
        self.fds.push(fd.as_fd());
        self
    }
}

#[cfg(test)]
mod tests;
