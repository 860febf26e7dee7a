use super::{WireError, payload};
use ringfence_dma::{BusAddr, FrontendVa, Permission};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IOTLB message as it travels, in both directions: `struct vhost_iotlb_msg`.
///
/// C pads it to 32 bytes and most peers send those; the 26 bytes of its fields alone are taken too.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct IotlbMessage {
    /// The I/O virtual address.
    pub iova: u64,
    /// How many bytes.
    pub size: u64,
    /// The front-end's virtual address.
    pub uaddr: u64,
    /// [`IotlbMessage::RO`], [`IotlbMessage::WO`] or [`IotlbMessage::RW`]; 0 where it means nothing.
    pub perm: u8,
    /// [`IotlbMessage::MISS`] and so on.
    pub kind: u8,
    /// C's.
    pub padding: [u8; 6],
}

impl IotlbMessage {
    /// The device may read.
    pub const RO: u8 = 1;
    /// The device may write.
    pub const WO: u8 = 2;
    /// The device may do both.
    pub const RW: u8 = 3;

    /// The back-end has no translation and wants one.
    pub const MISS: u8 = 1;
    /// The front-end gives one.
    pub const UPDATE: u8 = 2;
    /// The front-end takes some away.
    pub const INVALIDATE: u8 = 3;
    /// The back-end met an access that is not allowed.
    pub const ACCESS_FAIL: u8 = 4;

    const FIELDS: usize = 26;

    pub(super) fn parse(message: &'static str, body: &[u8]) -> Result<Self, WireError> {
        payload::padded(message, body, Self::FIELDS)
    }

    fn permission(&self, message: &'static str) -> Result<Permission, WireError> {
        match self.perm {
            Self::RO => Ok(Permission::ReadOnly),
            Self::WO => Ok(Permission::WriteOnly),
            Self::RW => Ok(Permission::ReadWrite),
            perm => Err(WireError::Value { message, field: "perm", value: perm.into() }),
        }
    }
}

fn perm(permission: Permission) -> u8 {
    match permission {
        Permission::ReadOnly => IotlbMessage::RO,
        Permission::WriteOnly => IotlbMessage::WO,
        Permission::ReadWrite => IotlbMessage::RW,
    }
}

/// What a front-end says about translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iotlb {
    /// UPDATE: `size` bytes at `iova` are those at `uaddr`. Neither range is empty or wraps; whether `uaddr` lies in
    /// the memory table is for whoever has the table to check.
    Update {
        /// Where the device sees it.
        iova: BusAddr,
        /// How many bytes, at least one.
        size: u64,
        /// Where the front-end sees it.
        uaddr: FrontendVa,
        /// What the device may do there.
        perm: Permission,
    },
    /// INVALIDATE.
    Invalidate(Invalidated),
}

/// The addresses that an INVALIDATE takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidated {
    /// From the first address to the last, inclusive: an exclusive end wraps to zero at the top of the space, which
    /// QEMU's lazy flushes reach.
    Range {
        /// The first address.
        first: BusAddr,
        /// The last one, not below the first.
        last: BusAddr,
    },
    /// All of them. On the wire its size is 0: 2^64, truncated.
    Everything,
}

impl Iotlb {
    pub(super) fn parse(message: &'static str, body: &[u8]) -> Result<Self, WireError> {
        let raw = IotlbMessage::parse(message, body)?;
        let iova = BusAddr(raw.iova);
        match raw.kind {
            IotlbMessage::UPDATE => {
                let uaddr = FrontendVa(raw.uaddr);
                let range = |field, start| WireError::Range { message, field, start, size: raw.size };
                iova.last(raw.size).ok_or_else(|| range("iova", raw.iova))?;
                uaddr.last(raw.size).ok_or_else(|| range("uaddr", raw.uaddr))?;
                Ok(Iotlb::Update { iova, size: raw.size, uaddr, perm: raw.permission(message)? })
            }
            IotlbMessage::INVALIDATE if raw.size == 0 => Ok(Iotlb::Invalidate(Invalidated::Everything)),
            IotlbMessage::INVALIDATE => {
                // One that passes the top of the space is wrong, and taking away more is the safe way to be wrong.
                let last = iova.last(raw.size).unwrap_or(BusAddr(u64::MAX));
                Ok(Iotlb::Invalidate(Invalidated::Range { first: iova, last }))
            }
            kind => Err(WireError::Value { message, field: "type", value: kind.into() }),
        }
    }

    /// The message as it travels.
    pub fn encode(&self) -> IotlbMessage {
        let (iova, size, uaddr, perm, kind) = match *self {
            Iotlb::Update { iova, size, uaddr, perm: p } => (iova.0, size, uaddr.0, perm(p), IotlbMessage::UPDATE),
            Iotlb::Invalidate(Invalidated::Everything) => (0, 0, 0, 0, IotlbMessage::INVALIDATE),
            Iotlb::Invalidate(Invalidated::Range { first, last }) => {
                // The whole space has 2^64 bytes, which is 0 in 64 bits, which means everything.
                let size = (last.0 - first.0).wrapping_add(1);
                (first.0, size, 0, 0, IotlbMessage::INVALIDATE)
            }
        };
        IotlbMessage { iova, size, uaddr, perm, kind, padding: [0; 6] }
    }
}

/// What a back-end says about translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IotlbReport {
    /// MISS: it wants the translation of this address, for this access.
    Miss {
        /// The address.
        iova: BusAddr,
        /// What it wants to do there.
        perm: Permission,
    },
    /// ACCESS_FAIL: a translation was there and forbade this access.
    AccessFail {
        /// The address.
        iova: BusAddr,
        /// What was tried there.
        perm: Permission,
    },
}

impl IotlbReport {
    pub(super) fn parse(message: &'static str, body: &[u8]) -> Result<Self, WireError> {
        let raw = IotlbMessage::parse(message, body)?;
        let iova = BusAddr(raw.iova);
        match raw.kind {
            IotlbMessage::MISS => Ok(IotlbReport::Miss { iova, perm: raw.permission(message)? }),
            IotlbMessage::ACCESS_FAIL => Ok(IotlbReport::AccessFail { iova, perm: raw.permission(message)? }),
            kind => Err(WireError::Value { message, field: "type", value: kind.into() }),
        }
    }

    /// The message as it travels.
    pub fn encode(&self) -> IotlbMessage {
        let (iova, permission, kind) = match *self {
            IotlbReport::Miss { iova, perm } => (iova, perm, IotlbMessage::MISS),
            IotlbReport::AccessFail { iova, perm } => (iova, perm, IotlbMessage::ACCESS_FAIL),
        };
        IotlbMessage { iova: iova.0, size: 0, uaddr: 0, perm: perm(permission), kind, padding: [0; 6] }
    }
}
