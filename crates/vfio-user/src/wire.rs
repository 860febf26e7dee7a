//! The messages of vfio-user as types that cannot hold nonsense (QEMU, docs/interop/vfio-user.rst).
//!
//! Knows numbers, sizes, and which message carries how many file descriptors. Knows no sockets and no state. All integers
//! travel in the machine's own byte order.
//!
//! Parsing is total. A peer may send any bytes: what comes back is a message, or a [`WireError`] that names it and has an
//! errno for the answer, and every file descriptor that came with a bad message is closed. Where the header itself was
//! good the message has been taken off the stream whole, so a bad one can still be answered and the next one read.

mod code;
mod error;
mod irqs;
mod reply;
mod request;
mod version;

pub use code::Command;
pub use error::WireError;
pub use irqs::{Action, IrqData, SetIrqs, index};
pub use reply::{IrqInfo, Reply, Subregion};
pub use request::{DmaMap, DmaUnmap, Request, Unmapped, Write};
pub use version::{Capabilities, TwinSocket, Version};

use ringfence_vhost_user::channel::{Head, SPACE};
pub use ringfence_vhost_user::wire::Frame;
use std::os::fd::{AsFd, OwnedFd};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most data of one REGION_READ, REGION_WRITE, DMA_READ or DMA_WRITE, in bytes: the protocol's default.
pub const MAX_DATA: u32 = 1 << 20;

/// The longest message that is taken, in bytes: data, and what comes before it.
pub const MAX_MESSAGE: u32 = MAX_DATA + 64;

/// The most file descriptors of one message, as we say it. QEMU takes no server that claims more. What comes with more all
/// the same is taken too: a client that has not asked sets up all of its interrupts at once.
pub const MAX_FDS: usize = 16;

/// Whether a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It asks.
    Command,
    /// It answers.
    Reply,
}

/// Whether the sender of a command waits for its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It waits.
    Wanted,
    /// It does not, and none is sent.
    Unwanted,
}

/// What comes before every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The sender's name for the message; its reply has the same. Anything may be in it, also the same twice.
    pub id: u16,
    /// The message's number.
    pub command: u16,
    /// Asking or answering.
    pub kind: Kind,
    /// Whether the one who asks wants an answer.
    pub answer: Answer,
    /// A reply's errno: the command could not be carried out. It may be 0 all the same.
    pub error: Option<u32>,
    /// The payload's length in bytes.
    pub body: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    id: u16,
    command: u16,
    size: u32,
    flags: u32,
    error: u32,
}

impl Header {
    /// Length on the wire, in bytes.
    pub const SIZE: usize = size_of::<RawHeader>();
    const TYPE: u32 = 0xf;
    const REPLY: u32 = 1;
    const NO_REPLY: u32 = 1 << 4;
    const ERROR: u32 = 1 << 5;

    /// The header as it travels.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let reply = if self.kind == Kind::Reply { Self::REPLY } else { 0 };
        let no_reply = if self.answer == Answer::Unwanted { Self::NO_REPLY } else { 0 };
        let error = if self.error.is_some() { Self::ERROR } else { 0 };
        zerocopy::transmute!(RawHeader {
            id: self.id,
            command: self.command,
            size: Self::SIZE as u32 + self.body,
            flags: reply | no_reply | error,
            error: self.error.unwrap_or(0),
        })
    }

    /// That a command with this header could not be carried out.
    pub fn refusal(&self, errno: u32) -> Frame<'static> {
        let header = Header { kind: Kind::Reply, answer: Answer::Wanted, error: Some(errno), body: 0, ..*self };
        Frame { bytes: header.encode().to_vec(), fds: Vec::new() }
    }

    /// The answer to a command with this header.
    pub fn reply<'f>(&self, body: &[u8], fds: &'f [OwnedFd]) -> Frame<'f> {
        let header =
            Header { kind: Kind::Reply, answer: Answer::Wanted, error: None, body: body.len() as u32, ..*self };
        Frame { bytes: [&header.encode(), body].concat(), fds: fds.iter().map(AsFd::as_fd).collect() }
    }
}

impl Head for Header {
    type Bytes = [u8; Header::SIZE];
    type Error = WireError;
    const MAX_FDS: usize = SPACE;

    /// Reads a header. Flags that nobody has defined mean nothing.
    fn parse(bytes: &Self::Bytes) -> Result<Self, WireError> {
        let RawHeader { id, command, size, flags, error } = zerocopy::transmute!(*bytes);
        let body = size.checked_sub(Self::SIZE as u32).filter(|_| size <= MAX_MESSAGE);
        let body = body.ok_or(WireError::Length { id, command, size, max: MAX_MESSAGE })?;
        let kind = match flags & Self::TYPE {
            0 => Kind::Command,
            Self::REPLY => Kind::Reply,
            other => return Err(WireError::Type { id, command, other }),
        };
        Ok(Self {
            id,
            command,
            kind,
            answer: if flags & Self::NO_REPLY == 0 { Answer::Wanted } else { Answer::Unwanted },
            error: (kind == Kind::Reply && flags & Self::ERROR != 0).then_some(error),
            body,
        })
    }

    fn body(&self) -> usize {
        self.body as usize
    }
}

/// Takes a `T` off the front of a payload.
fn head<T: FromBytes>(command: Command, body: &[u8]) -> Result<(T, &[u8]), WireError> {
    let (head, rest) =
        T::read_from_prefix(body).map_err(|_| WireError::Short { command, got: body.len(), needed: size_of::<T>() })?;
    Ok((head, rest))
}

#[cfg(test)]
mod tests;
