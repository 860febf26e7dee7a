use super::request::{RawAccess, RawInfo, RawRegionInfo};
use super::{DmaUnmap, Version, Write};
use std::os::fd::OwnedFd;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a server answers.
#[derive(Debug)]
pub enum Reply {
    /// That it is done.
    Done,
    /// VERSION, and the client's end of the server's own socket if there is one.
    Version(Version, Option<OwnedFd>),
    /// DMA_UNMAP.
    Unmapped(DmaUnmap),
    /// DEVICE_GET_INFO: a PCI device that can be reset.
    DeviceInfo {
        /// How many regions.
        regions: u32,
        /// How many interrupt types.
        irqs: u32,
    },
    /// DEVICE_GET_REGION_INFO. A region of size 0 is not there; all others can be read and written.
    RegionInfo {
        /// Which.
        index: u32,
        /// How many bytes.
        size: u64,
    },
    /// DEVICE_GET_REGION_IO_FDS: eventfds that ring, one for each part.
    RegionIoFds {
        /// How long the answer may be. With less than all takes it says how long that is, and has none.
        argsz: u32,
        /// Which region.
        index: u32,
        /// Its parts.
        parts: Vec<Subregion>,
    },
    /// DEVICE_GET_IRQ_INFO.
    IrqInfo(IrqInfo),
    /// REGION_READ.
    Data(Write),
    /// REGION_WRITE.
    Written {
        /// Which region.
        region: u32,
        /// Where.
        offset: u64,
        /// How many bytes.
        count: u32,
    },
    /// REGION_WRITE_MULTI.
    WrittenMulti {
        /// How many writes.
        count: u64,
    },
}

/// A part of a region that rings an eventfd when it is written.
#[derive(Debug)]
pub struct Subregion {
    /// Where it begins.
    pub offset: u64,
    /// How many bytes.
    pub size: u64,
    /// What is rung.
    pub fd: OwnedFd,
}

/// An interrupt type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// Which.
    pub index: u32,
    /// How many interrupts it has. They tell by eventfd, and can be masked.
    pub count: u32,
}

const RESET: u32 = 1;
const PCI: u32 = 1 << 1;
const READ: u32 = 1;
const WRITE: u32 = 1 << 1;
const EVENTFD: u32 = 1;
const MASKABLE: u32 = 1 << 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawSubregion {
    offset: u64,
    size: u64,
    fd_index: u32,
    /// 0: an eventfd.
    kind: u32,
    flags: u32,
    padding: u32,
    datamatch: u64,
}

impl Reply {
    /// The payload, and the descriptors that go with it.
    pub fn encode(self) -> (Vec<u8>, Vec<OwnedFd>) {
        let fixed = size_of::<RawInfo>() as u32;
        let body = match self {
            Reply::Done => Vec::new(),
            Reply::Version(version, twin) => return (version.encode(), Vec::from_iter(twin)),
            Reply::Unmapped(unmap) => unmap.encode(),
            Reply::DeviceInfo { regions, irqs } => {
                RawInfo { argsz: fixed, flags: RESET | PCI, index: regions, count: irqs }.as_bytes().to_vec()
            }
            Reply::RegionInfo { index, size } => {
                let flags = if size == 0 { 0 } else { READ | WRITE };
                let argsz = size_of::<RawRegionInfo>() as u32;
                RawRegionInfo { argsz, flags, index, cap_offset: 0, size, offset: 0 }.as_bytes().to_vec()
            }
            Reply::RegionIoFds { argsz: room, index, parts } => {
                let argsz = fixed + (parts.len() * size_of::<RawSubregion>()) as u32;
                // How many there are also where there is no room for them, as libvfio-user has it.
                let info = RawInfo { argsz, flags: 0, index, count: parts.len() as u32 };
                let parts = if room < argsz { Vec::new() } else { parts };
                let mut body = info.as_bytes().to_vec();
                for (fd_index, part) in (0..).zip(&parts) {
                    let Subregion { offset, size, .. } = *part;
                    let raw = RawSubregion { offset, size, fd_index, kind: 0, flags: 0, padding: 0, datamatch: 0 };
                    body.extend_from_slice(raw.as_bytes());
                }
                return (body, parts.into_iter().map(|part| part.fd).collect());
            }
            Reply::IrqInfo(IrqInfo { index, count }) => {
                let flags = if count == 0 { EVENTFD } else { EVENTFD | MASKABLE };
                RawInfo { argsz: fixed, flags, index, count }.as_bytes().to_vec()
            }
            Reply::Data(Write { region, offset, data }) => {
                let raw = RawAccess { offset, region, count: data.len() as u32 };
                [raw.as_bytes(), &data].concat()
            }
            Reply::Written { region, offset, count } => RawAccess { offset, region, count }.as_bytes().to_vec(),
            Reply::WrittenMulti { count } => count.to_ne_bytes().to_vec(),
        };
        (body, Vec::new())
    }
}
