/// What is wrong with a message that the peer sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not the version of the protocol that exists.
    #[error("message {request}: protocol version {version} instead of 1")]
    Version {
        /// The message's number.
        request: u32,
        /// The version it claims.
        version: u32,
    },
    /// Header flags that nobody has defined.
    #[error("message {request}: undefined header flags in {flags:#x}")]
    Flags {
        /// The message's number.
        request: u32,
        /// All of its flags.
        flags: u32,
    },
    /// More payload than any message has.
    #[error("message {request}: payload of {size} bytes, the limit is {max}")]
    TooLong {
        /// The message's number.
        request: u32,
        /// The payload it claims, in bytes.
        size: u32,
        /// The longest that is taken.
        max: usize,
    },
    /// A reply where a request belongs, or the other way round.
    #[error("message {request}: a {got:?} where the other kind belongs")]
    Kind {
        /// The message's number.
        request: u32,
        /// What it says it is.
        got: super::Kind,
    },
    /// No message has this number.
    #[error("message number {request} is unknown")]
    Unknown {
        /// The number.
        request: u32,
    },
    /// A message of the standard that belongs to a protocol feature we never offer.
    #[error("{message} is not supported")]
    Unsupported {
        /// The message's name.
        message: &'static str,
    },
    /// The payload has the wrong length.
    #[error("{message}: payload of {got} bytes instead of {expected}")]
    Size {
        /// The message's name.
        message: &'static str,
        /// Bytes that came.
        got: usize,
        /// Bytes that it should have.
        expected: usize,
    },
    /// The wrong number of file descriptors.
    #[error("{message}: {got} file descriptors instead of {expected}")]
    Fds {
        /// The message's name.
        message: &'static str,
        /// How many came.
        got: usize,
        /// How many it should have.
        expected: usize,
    },
    /// More memory regions than one message can hold.
    #[error("{message}: {got} regions, the limit is {max}")]
    Regions {
        /// The message's name.
        message: &'static str,
        /// How many it claims.
        got: u32,
        /// The most there can be.
        max: usize,
    },
    /// A field with a value that the standard does not give it.
    #[error("{message}: {field} cannot be {value:#x}")]
    Value {
        /// The message's name.
        message: &'static str,
        /// The field's name.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A range without a byte, or that passes the end of its space.
    #[error("{message}: {field} range of {size:#x} bytes at {start:#x} is empty or passes the end")]
    Range {
        /// The message's name.
        message: &'static str,
        /// The address or offset field's name.
        field: &'static str,
        /// Where it starts.
        start: u64,
        /// How long it is, in bytes.
        size: u64,
    },
    /// An answer to another question.
    #[error("message {got} came where the reply to {expected} belongs")]
    WrongReply {
        /// The number that came.
        got: u32,
        /// The name of the message that was asked.
        expected: &'static str,
    },
}
