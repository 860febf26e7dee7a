use super::function::{BarKind, Function};
use super::{PciError, common};
use crate::registers::Registers;
use alloc::vec::Vec;
use core::fmt;

/// A structure that a device has in its BARs (§4.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structure {
    /// VIRTIO_PCI_CAP_COMMON_CFG.
    Common,
    /// VIRTIO_PCI_CAP_NOTIFY_CFG.
    Notify,
    /// VIRTIO_PCI_CAP_ISR_CFG.
    Isr,
    /// VIRTIO_PCI_CAP_DEVICE_CFG.
    Device,
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Structure::Common => "common configuration structure",
            Structure::Notify => "notification structure",
            Structure::Isr => "ISR status",
            Structure::Device => "device-specific configuration structure",
        })
    }
}

/// Why a structure that a device offers can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Its capability is shorter than it must be.
    ShortCapability {
        /// How long it is.
        len: u8,
    },
    /// It lies in I/O space, which this driver does not use.
    Io {
        /// The BAR.
        bar: u8,
    },
    /// The function has no such BAR.
    NoBar {
        /// The BAR.
        bar: u8,
    },
    /// It goes beyond its BAR.
    BeyondBar {
        /// Where it begins.
        offset: u32,
        /// How long it is.
        len: u32,
        /// How long the BAR is.
        bar_len: u64,
    },
    /// It has no room for what must be in it.
    Short {
        /// How long it is.
        len: u32,
        /// What it takes.
        needed: u32,
    },
    /// It begins where it must not.
    Misaligned {
        /// Where it begins.
        offset: u32,
    },
    /// It could not be mapped.
    NotMapped {
        /// The BAR.
        bar: u8,
    },
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Unusable::ShortCapability { len } => write!(f, "its capability has {len} bytes"),
            Unusable::Io { bar } => write!(f, "BAR {bar} is I/O space"),
            Unusable::NoBar { bar } => write!(f, "there is no BAR {bar}"),
            Unusable::BeyondBar { offset, len, bar_len } => {
                write!(f, "{len:#x} bytes at {offset:#x} go beyond a BAR of {bar_len:#x}")
            }
            Unusable::Short { len, needed } => write!(f, "it has {len} bytes of {needed}"),
            Unusable::Misaligned { offset } => write!(f, "it begins at {offset:#x}, which is not aligned"),
            Unusable::NotMapped { bar } => write!(f, "BAR {bar} can't be mapped"),
        }
    }
}

/// Bytes of a structure that anybody uses: the standard leaves room for a large one, and so for a hostile one.
const LONGEST: u32 = 4096;

/// The notification structure has a register for each queue, perhaps each on a page.
const LONGEST_NOTIFY: u32 = 16 << 20;

/// The configuration space holds no more capabilities than this.
const MOST: usize = 48;

/// Offsets in the configuration space.
const STATUS: u8 = 0x04;
const CAPABILITIES: u8 = 0x34;

/// Where its header ends.
const HEADER: u8 = 0x40;

/// The vendor-specific capability, and how long virtio's are (§4.1.4).
const VENDOR_SPECIFIC: u8 = 0x09;
const CAPABILITY: u8 = 16;
const NOTIFY_CAPABILITY: u8 = 20;

/// A structure that is offered.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    structure: Structure,
    /// How long its capability is.
    capability: u8,
    bar: u8,
    offset: u32,
    len: u32,
    multiplier: u32,
}

/// All structures that a function offers, in its order of preference.
pub(super) struct Found(Vec<Candidate>);

impl Found {
    /// Reads the list of capabilities.
    pub(super) fn walk(function: &mut impl Function) -> Result<Self, PciError> {
        let mut found = Vec::new();
        let has_list = function.read(STATUS) >> 16 & 1 << 4 != 0;
        let mut next = if has_list { function.read(CAPABILITIES) as u8 } else { 0 };
        for _ in 0..MOST {
            // The two lowest bits are reserved.
            let at = next & !3;
            if at < HEADER {
                return Ok(Self(found));
            }
            let head = function.read(at);
            if head == u32::MAX {
                return Err(PciError::Gone);
            }
            let [id, following, len, kind] = head.to_le_bytes();
            if id == VENDOR_SPECIFIC {
                found.extend(Candidate::read(function, at, len, kind));
            }
            next = following;
        }
        Err(PciError::EndlessCapabilities)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Maps the first structure of a kind that can be used (§4.1.4.1), and says its `notify_off_multiplier`.
    pub(super) fn usable<F: Function>(
        &self,
        function: &mut F,
        structure: Structure,
    ) -> Result<(F::Registers, u32), PciError> {
        let mut why = None;
        for candidate in self.0.iter().filter(|candidate| candidate.structure == structure) {
            match candidate.map(function) {
                Ok(registers) => return Ok((registers, candidate.multiplier)),
                Err(unusable) => why = Some(unusable),
            }
        }
        Err(PciError::Structure { structure, why })
    }
}

impl Candidate {
    /// Reads virtio's capability at `at`. Unknown kinds and reserved BARs are to be ignored (§4.1.4.1).
    fn read(function: &mut impl Function, at: u8, capability: u8, kind: u8) -> Option<Self> {
        let structure = match kind {
            1 => Structure::Common,
            2 => Structure::Notify,
            3 => Structure::Isr,
            4 => Structure::Device,
            _ => return None,
        };
        // One that runs over the end of the configuration space has no bytes there, and counts as shorter.
        let capability = u16::from(capability).min(256 - u16::from(at)) as u8;
        let mut word = |offset: u8| match offset + 4 <= capability {
            true => function.read(at + offset),
            false => 0,
        };
        let bar = word(4) as u8;
        let (offset, len) = (word(8), word(12));
        let multiplier = if structure == Structure::Notify { word(16) } else { 0 };
        (bar <= 5).then_some(Self { structure, capability, bar, offset, len, multiplier })
    }

    fn map<F: Function>(&self, function: &mut F) -> Result<F::Registers, Unusable> {
        let Self { structure, capability, bar, offset, len, .. } = *self;
        // What must be in it, how it is aligned, and how long its capability is (§4.1.4.3 to §4.1.4.6).
        let (needed, align, least, longest) = match structure {
            Structure::Common => (common::QUEUE_DEVICE as u32 + 8, 4, CAPABILITY, LONGEST),
            Structure::Notify => (2, 2, NOTIFY_CAPABILITY, LONGEST_NOTIFY),
            Structure::Isr => (1, 1, CAPABILITY, LONGEST),
            Structure::Device => (1, 4, CAPABILITY, LONGEST),
        };
        if capability < least {
            return Err(Unusable::ShortCapability { len: capability });
        }
        let place = match function.bar(bar) {
            Some(BarKind::Memory(place)) => place,
            Some(BarKind::Io) => return Err(Unusable::Io { bar }),
            None => return Err(Unusable::NoBar { bar }),
        };
        if u64::from(offset) + u64::from(len) > place.len {
            return Err(Unusable::BeyondBar { offset, len, bar_len: place.len });
        }
        if len < needed {
            return Err(Unusable::Short { len, needed });
        }
        if !offset.is_multiple_of(align) {
            return Err(Unusable::Misaligned { offset });
        }
        let len = len.min(longest) as usize;
        let registers = function.map(place, offset.into(), len).ok_or(Unusable::NotMapped { bar })?;
        // A kernel that mapped less would have us run over its end.
        if registers.len() < len { Err(Unusable::NotMapped { bar }) } else { Ok(registers) }
    }
}
