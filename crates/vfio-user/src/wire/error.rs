use super::{Answer, Command, Frame, Header, Kind};
use rustix::io::Errno;

/// What is wrong with a message that the peer sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A length that no message has. The stream is lost.
    #[error("message {command}: {size} bytes in all, the limit is {max}")]
    Length {
        /// What the sender calls it.
        id: u16,
        /// The message's number.
        command: u16,
        /// The length it claims.
        size: u32,
        /// The longest that is taken.
        max: u32,
    },
    /// Neither a command nor a reply. The stream is lost.
    #[error("message {command}: type {other}, which is neither a command nor a reply")]
    Type {
        /// What the sender calls it.
        id: u16,
        /// The message's number.
        command: u16,
        /// The type it claims.
        other: u32,
    },
    /// No message has this number.
    #[error("message number {number} is unknown")]
    Unknown {
        /// The number.
        number: u16,
    },
    /// A message of the protocol that this side does not take.
    #[error("{command} is not supported")]
    Unsupported {
        /// Which.
        command: Command,
    },
    /// Fewer bytes than the message has.
    #[error("{command}: payload of {got} bytes, {needed} are needed")]
    Short {
        /// Which message.
        command: Command,
        /// Bytes that came.
        got: usize,
        /// Bytes that it needs.
        needed: usize,
    },
    /// `argsz` has no room for the fixed part of the answer, or of the question.
    #[error("{command}: argsz {argsz}, at least {needed} is needed")]
    Argsz {
        /// Which message.
        command: Command,
        /// What it says.
        argsz: u32,
        /// What it takes.
        needed: usize,
    },
    /// File descriptors that the message does not have.
    #[error("{command}: {got} file descriptors, {max} at the most")]
    Fds {
        /// Which message.
        command: Command,
        /// How many came.
        got: usize,
        /// How many may.
        max: usize,
    },
    /// A field that can't have this value.
    #[error("{command}: {field} {value:#x} is none")]
    Field {
        /// Which message.
        command: Command,
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A range of nothing, or one that passes the end of the address space, or begins or ends within a page.
    #[error("{command}: {size:#x} bytes at {address:#x} are no range of pages")]
    Range {
        /// Which message.
        command: Command,
        /// Where it begins.
        address: u64,
        /// How many bytes.
        size: u64,
    },
    /// More data than one message may move.
    #[error("{command}: {count} bytes at once, the limit is {max}")]
    Count {
        /// Which message.
        command: Command,
        /// How many were asked for.
        count: u64,
        /// The most.
        max: u32,
    },
    /// A version's capabilities are no JSON of the form that the protocol has.
    #[error("VERSION: bad capabilities: {0}")]
    Capabilities(String),
}

impl WireError {
    /// What the sender is told: clients know nothing else from the protocol's first server, libvfio-user.
    pub fn errno(&self) -> Errno {
        Errno::INVAL
    }

    /// The last answer of a stream that is lost, if it is.
    pub(crate) fn farewell(&self) -> Option<Frame<'static>> {
        let (&id, &command) = match self {
            WireError::Length { id, command, .. } | WireError::Type { id, command, .. } => (id, command),
            _ => return None,
        };
        let header = Header { id, command, kind: Kind::Command, answer: Answer::Wanted, error: None, body: 0 };
        Some(header.refusal(self.errno().raw_os_error() as u32))
    }
}
