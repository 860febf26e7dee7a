use crate::BusAddr;
use core::fmt;

/// What a device does to memory. Named from the device's side, as vhost-user and IOMMUs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The device reads what the driver wrote.
    Read,
    /// The device writes.
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::Read => "read",
            Access::Write => "write",
        })
    }
}

/// What a translation lets the device do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Read and nothing else.
    ReadOnly,
    /// Write and nothing else.
    WriteOnly,
    /// Both.
    ReadWrite,
}

impl Permission {
    /// Whether `access` is allowed.
    #[inline]
    pub fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self != Permission::WriteOnly,
            Access::Write => self != Permission::ReadOnly,
        }
    }
}

/// Why an access was not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultReason {
    /// Nothing is mapped there.
    Unmapped,
    /// Something is mapped there, and this access to it is not allowed.
    Forbidden,
    /// The range runs past the end of the address space.
    Wraps,
    /// A ring element lies across two mappings that are not neighbours in memory, or is not aligned.
    Split,
}

/// An access that was not let through: what an IOMMU would record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The first byte that could not be reached.
    pub addr: BusAddr,
    /// What was wanted there.
    pub access: Access,
    /// Why not.
    pub reason: FaultReason,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.reason {
            FaultReason::Unmapped => "nothing is mapped there",
            FaultReason::Forbidden => "its mapping forbids it",
            FaultReason::Wraps => "the range passes the end of the address space",
            FaultReason::Split => "a ring element is split or misaligned",
        };
        write!(f, "{} at bus address {}: {why}", self.access, self.addr)
    }
}

impl core::error::Error for Fault {}

/// When a translation was first asked for. Whoever waits hands it back with each new try, so that a refusal that
/// arrived in the meantime is known to answer this question and not somebody's older one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A translation is not there yet and has been asked for, as far as that was possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// To be handed back with the next try.
    pub ticket: Ticket,
    /// How many bytes, counted from the address of the try, the question covers. At least 1. Whoever needs more goes
    /// on behind them, so that all of a request's questions are under way at once. [`Miss::NOTHING_ASKED`] where too
    /// many questions are under way already: try again when some are answered.
    pub covers: u64,
}

impl Miss {
    /// In [`Miss::covers`]: nothing could be asked, and nothing behind it could be either.
    pub const NOTHING_ASKED: u64 = u64::MAX;
}

/// Why an address did not resolve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Wait: try again when translations have arrived.
    Miss(Miss),
    /// Denied.
    Fault(Fault),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Stop::Fault(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions() {
        for (permission, read, write) in [
            (Permission::ReadOnly, true, false),
            (Permission::WriteOnly, false, true),
            (Permission::ReadWrite, true, true),
        ] {
            assert_eq!(permission.allows(Access::Read), read);
            assert_eq!(permission.allows(Access::Write), write);
        }
    }
}
