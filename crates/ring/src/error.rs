use core::fmt;
use ringfence_dma::{Fault, Miss, Stop};

/// Why the device's half could not do what it was asked to. Nothing was changed in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingStop {
    /// A translation of the ring is missing and has been asked for: call again when some have arrived.
    Wait(Miss),
    /// The ring, or an indirect table, can't be reached.
    Fault(Fault),
    /// The driver broke the rules: the queue stops.
    Broken(RingError),
}

/// A rule that the driver broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RingError {
    /// The avail index moved past everything that the driver can own (§2.7.6).
    AvailIndex {
        /// The index that the driver wrote.
        index: u16,
        /// The next entry that would have been taken.
        next: u16,
        /// How many more entries the driver had at the most.
        room: u16,
    },
    /// A chain starts at, or goes on with, a descriptor that does not exist.
    NoSuchDescriptor {
        /// Which.
        index: u16,
        /// How many there are.
        count: u32,
    },
    /// A chain has more descriptors than there are for it: it may well be a loop.
    ChainTooLong {
        /// How many there are.
        limit: u32,
    },
    /// A chain of a packed ring goes on with a descriptor that the driver has not made available.
    NotAvailable {
        /// Which.
        index: u16,
    },
    /// A descriptor to be read comes after one to be written (§2.7.4.2, §2.8.17).
    ReadAfterWrite,
    /// A chain describes 4 GiB or more.
    TooManyBytes,
    /// A chain does not describe a single byte.
    NoBytes,
    /// A descriptor refers to a table, which was not agreed on.
    IndirectRefused,
    /// A descriptor refers to a table and the chain goes on, or, in a packed ring, had begun before.
    IndirectInChain,
    /// A table refers to a table.
    IndirectNested,
    /// The length of a table is zero or no whole number of descriptors.
    TableLength {
        /// The length, in bytes.
        len: u32,
    },
    /// A table has more entries than accepted.
    TableTooLong {
        /// How many it has.
        entries: u32,
        /// How many it may have.
        limit: u32,
    },
    /// A chain is given back though none is under way. The driver did not do that: whoever resumed the queue said the
    /// wrong position.
    NothingUnderWay,
}

impl From<RingError> for RingStop {
    fn from(error: RingError) -> Self {
        RingStop::Broken(error)
    }
}

impl From<Stop> for RingStop {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Miss(miss) => RingStop::Wait(miss),
            Stop::Fault(fault) => RingStop::Fault(fault),
        }
    }
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            RingError::AvailIndex { index, next, room } => {
                write!(f, "the avail index is {index}, with {next} next and room for {room}")
            }
            RingError::NoSuchDescriptor { index, count } => write!(f, "descriptor {index} of {count} is in a chain"),
            RingError::ChainTooLong { limit } => write!(f, "a chain has more than {limit} descriptors"),
            RingError::NotAvailable { index } => {
                write!(f, "a chain goes on with descriptor {index}, which is not available")
            }
            RingError::ReadAfterWrite => f.write_str("a readable descriptor follows a writable one"),
            RingError::TooManyBytes => f.write_str("a chain has 4 GiB or more"),
            RingError::NoBytes => f.write_str("a chain has no bytes"),
            RingError::IndirectRefused => f.write_str("an indirect descriptor, which was not agreed on"),
            RingError::IndirectInChain => f.write_str("an indirect descriptor within a chain"),
            RingError::IndirectNested => f.write_str("an indirect descriptor within an indirect table"),
            RingError::TableLength { len } => write!(f, "an indirect table of {len} bytes"),
            RingError::TableTooLong { entries, limit } => {
                write!(f, "an indirect table of {entries} entries, with {limit} accepted")
            }
            RingError::NothingUnderWay => f.write_str("a chain is given back and none is under way"),
        }
    }
}

impl fmt::Display for RingStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RingStop::Wait(_) => f.write_str("a translation of the ring is missing"),
            RingStop::Fault(fault) => write!(f, "the ring can't be reached: {fault}"),
            RingStop::Broken(error) => write!(f, "the driver broke the ring: {error}"),
        }
    }
}

impl core::error::Error for RingError {}
impl core::error::Error for RingStop {}
