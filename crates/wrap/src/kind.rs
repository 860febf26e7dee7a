//! What copying has to know of a device type: next to nothing, and here is all of it.

use ringfence_device::{Request, Unreachable};
use std::fmt;
use std::str::FromStr;
use virtio_spec::{blk, net};

/// What kind of device a back-end is. vhost-user does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A disk (§5.2).
    #[default]
    Blk,
    /// A network card (§5.1): its receive queues are full of buffers that stand there until something arrives.
    Net,
    /// A shared folder (§5.11), without its notification queue and without DAX.
    Fs,
    /// Any other whose queues carry requests, or buffers to be filled, and nothing that refers to other memory.
    Generic,
}

/// The bits of device types (§2.2); the others belong to rings and transports.
const DEVICE_TYPE: u64 = !(u64::MAX << 24) | u64::MAX << 50;

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 4] = [Kind::Blk, Kind::Net, Kind::Fs, Kind::Generic];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Blk => "blk",
            Kind::Net => "net",
            Kind::Fs => "fs",
            Kind::Generic => "generic",
        }
    }

    /// The virtio device ID (§5); 0 where it is not known.
    pub(crate) fn id(self) -> u16 {
        match self {
            Kind::Blk => 2,
            Kind::Net => 1,
            Kind::Fs => 26,
            Kind::Generic => 0,
        }
    }

    /// The device type's feature bits that pass through: those that are known to mean nothing but what requests say, and
    /// that no bounce pool upsets.
    pub(crate) fn features(self) -> u64 {
        match self {
            Kind::Blk => {
                use blk::F;
                let data = F::SIZE_MAX | F::SEG_MAX | F::GEOMETRY | F::RO | F::BLK_SIZE | F::FLUSH | F::TOPOLOGY;
                let more = F::CONFIG_WCE | F::MQ | F::DISCARD | F::WRITE_ZEROES | F::LIFETIME | F::SECURE_ERASE;
                (data | more).bits().to_ne() as u64
            }
            Kind::Net => {
                use net::F;
                let guest = F::GUEST_CSUM | F::GUEST_TSO4 | F::GUEST_TSO6 | F::GUEST_ECN | F::GUEST_UFO;
                let host = F::CSUM | F::HOST_TSO4 | F::HOST_TSO6 | F::HOST_ECN | F::HOST_UFO;
                let uso = F::GUEST_USO4 | F::GUEST_USO6 | F::HOST_USO | F::GUEST_HDRLEN;
                let card = F::MTU | F::MAC | F::MRG_RXBUF | F::STATUS | F::MQ | F::SPEED_DUPLEX;
                // The control queue is the VMM's, whose features these are; it asks the back-end whether it minds.
                let control = F::CTRL_VQ | F::CTRL_RX | F::CTRL_VLAN | F::GUEST_ANNOUNCE | F::CTRL_MAC_ADDR;
                let more = F::CTRL_GUEST_OFFLOADS | F::RSS | F::HASH_REPORT;
                (guest | host | uso | card | control | more).bits().to_ne() as u64
            }
            // NOTIFICATION, the only one there is, needs buffers that stand beside the requests in DAX's memory.
            Kind::Fs => 0,
            Kind::Generic => DEVICE_TYPE,
        }
    }

    /// Which of the offered bits of device types are kept back.
    pub(crate) fn withheld(self, offered: u64) -> u64 {
        offered & DEVICE_TYPE & !self.features()
    }

    /// Offered bits that are not meant as the standard has them, as the configuration space shows. qemu-storage-daemon
    /// offers a limit for the size of buffers and says that it is 0: some drivers give up, others cut all they have into
    /// pages.
    pub(crate) fn mistaken(self, offered: u64, config: &[u8]) -> u64 {
        let size_max = blk::F::SIZE_MAX.bits().to_ne() as u64;
        if self == Kind::Blk && config.get(8..12) == Some(&[0; 4]) { offered & size_max } else { 0 }
    }

    /// How many queues there are for each that a back-end counts.
    pub(crate) fn group(self) -> u16 {
        if self == Kind::Net { 2 } else { 1 }
    }

    /// How many queues a back-end has that does not count them.
    pub(crate) fn usual_queues(self) -> u16 {
        match self {
            Kind::Blk | Kind::Generic => 1,
            Kind::Net | Kind::Fs => 2,
        }
    }

    /// Whether some buffers may stand in a queue for ever: those of requests without a byte to read.
    pub(crate) fn has_standing(self) -> bool {
        matches!(self, Kind::Net | Kind::Generic)
    }

    /// Whether one request follows from another: packets that fill several buffers, streams of bytes.
    pub(crate) fn is_in_order(self) -> bool {
        matches!(self, Kind::Net | Kind::Generic)
    }

    /// Whether a request may be carried out twice before its driver is told of it. A folder can't be made twice.
    pub(crate) fn may_repeat(self) -> bool {
        self == Kind::Blk
    }

    /// Where the configuration space says how many queues there are, if it does.
    pub(crate) fn queue_count_field(self) -> Option<usize> {
        match self {
            Kind::Blk => Some(34),
            Kind::Net => Some(8),
            Kind::Fs | Kind::Generic => None,
        }
    }

    /// Whether the last writable byte says how the request ended, so that it is copied back whatever the back-end says
    /// of how much it wrote.
    pub(crate) fn status(self) -> Option<Status> {
        match self {
            Kind::Blk => Some(Status { ok: blk_status::OK, failed: blk_status::IOERR }),
            Kind::Net | Kind::Fs | Kind::Generic => None,
        }
    }

    /// Whether success means that every writable byte was written.
    pub(crate) fn fills_all(self, request: &Request<'_>) -> bool {
        let mut kind = [0; 4];
        self == Kind::Blk && request.readable.read(0, &mut kind) && u32::from_le_bytes(kind) == BLK_T_IN
    }

    /// Answers a request that can't be carried out, where the type has an answer for that; how many bytes were written.
    pub(crate) fn fail(self, request: &Request<'_>) -> u32 {
        let writable = &request.writable;
        match self {
            Kind::Blk => {
                if let Some(last) = writable.len().checked_sub(1) {
                    writable.write(last, &[blk_status::IOERR]);
                }
                0
            }
            Kind::Fs => {
                // `struct fuse_in_header`: length, opcode, unique; `struct fuse_out_header`: length, error, unique.
                let mut unique = [0; 8];
                let mut out = [0; 16];
                request.readable.read(8, &mut unique);
                out[..4].copy_from_slice(&16u32.to_le_bytes());
                out[4..8].copy_from_slice(&FUSE_EIO.to_le_bytes());
                out[8..].copy_from_slice(&unique);
                if writable.write(0, &out) { 16 } else { 0 }
            }
            Kind::Net | Kind::Generic => 0,
        }
    }

    /// The same for one whose memory can't be reached.
    pub(crate) fn fail_unreachable(self, request: &Unreachable<'_>) -> u32 {
        if let (Some(status), Some(last)) = (self.status(), request.writable_len.checked_sub(1)) {
            // The used length is counted from the first writable byte, of which none was written but the last.
            request.write(last, &[status.failed]);
        }
        0
    }
}

/// The values of a status byte that matter here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Status {
    pub(crate) ok: u8,
    pub(crate) failed: u8,
}

/// §5.2.6.
mod blk_status {
    pub(super) const OK: u8 = 0;
    pub(super) const IOERR: u8 = 1;
}

/// VIRTIO_BLK_T_IN (§5.2.6).
const BLK_T_IN: u32 = 0;

/// -EIO.
const FUSE_EIO: i32 = -5;

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name).ok_or(UnknownKind)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text names no [`Kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownKind;

impl fmt::Display for UnknownKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected blk, net, fs or generic")
    }
}

impl std::error::Error for UnknownKind {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_their_own_inverse() {
        for kind in Kind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert_eq!("disk".parse::<Kind>(), Err(UnknownKind));
    }

    #[test]
    fn no_bit_of_rings_or_transports_passes_through() {
        for kind in Kind::ALL {
            assert_eq!(kind.features() & !DEVICE_TYPE, 0, "{kind}");
        }
        assert_eq!(Kind::Fs.withheld(1 << 32 | 1), 1);
    }
}
