use super::{Answer, Command, Frame, Header, Kind, MAX_DATA, SetIrqs, Version, WireError, head};
use ringfence_dma::{BusAddr, Permission};
use std::os::fd::{AsFd, OwnedFd};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The page that DMA maps are made of, in bytes.
const PAGE: u64 = 4096;

/// What a client asks of a server, checked as far as a message can be by itself.
#[derive(Debug)]
pub enum Request {
    /// The first of all.
    Version(Version),
    /// Grants memory.
    DmaMap(DmaMap),
    /// Takes memory back.
    DmaUnmap(DmaUnmap),
    /// What kind of device it is.
    DeviceInfo,
    /// What a region is like. Its number is unchecked.
    RegionInfo {
        /// Which.
        index: u32,
    },
    /// Which parts of a region are rung by eventfd.
    RegionIoFds {
        /// How long the answer may be.
        argsz: u32,
        /// Which region. Unchecked.
        index: u32,
    },
    /// What an interrupt type is like. Its number is unchecked.
    IrqInfo {
        /// Which.
        index: u32,
    },
    /// Sets interrupts up.
    SetIrqs(SetIrqs),
    /// Reads registers. Region and range are unchecked.
    RegionRead {
        /// Which region.
        region: u32,
        /// Where in it.
        offset: u64,
        /// How many bytes, up to [`MAX_DATA`].
        count: u32,
    },
    /// Writes registers.
    RegionWrite(Write),
    /// Writes registers, one after the other.
    RegionWriteMulti(Vec<Write>),
    /// Resets the device.
    DeviceReset,
}

/// Grants memory.
#[derive(Debug)]
pub struct DmaMap {
    /// What the device may do there.
    pub permission: Permission,
    /// Where it begins in its file.
    pub offset: u64,
    /// The first address.
    pub first: BusAddr,
    /// The last. Whole pages.
    pub last: BusAddr,
    /// Its file; none: it is reached by messages.
    pub fd: Option<OwnedFd>,
}

/// Takes memory back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// What.
    pub what: Unmapped,
    raw: RawUnmap,
}

/// What is taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmapped {
    /// All that was ever granted.
    Everything,
    /// What lies in this range.
    Range {
        /// The first address.
        first: BusAddr,
        /// The last.
        last: BusAddr,
    },
}

/// A write to registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Which region. Unchecked.
    pub region: u32,
    /// Where in it. Unchecked.
    pub offset: u64,
    /// What.
    pub data: Vec<u8>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawMap {
    argsz: u32,
    flags: u32,
    offset: u64,
    address: u64,
    size: u64,
}

const READABLE: u32 = 1;
const WRITEABLE: u32 = 1 << 1;
const BOTH: u32 = READABLE | WRITEABLE;
/// How the file is to be reached: mapped, or read and written. libvfio-user has these two, the protocol's text has not. What
/// is mapped here shows the same bytes as what is read and written.
const MAPPED: u32 = 1 << 2;
const FILE_IO: u32 = 1 << 3;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
struct RawUnmap {
    argsz: u32,
    flags: u32,
    address: u64,
    size: u64,
}

/// As the kernel's interface has it. The bit before asks for a bitmap of what was written, which nothing here keeps.
const UNMAP_ALL: u32 = 1 << 1;

/// What DEVICE_GET_IRQ_INFO and DEVICE_GET_REGION_IO_FDS ask with, and DEVICE_GET_INFO.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RawInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) count: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RawRegionInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) cap_offset: u32,
    pub(super) size: u64,
    pub(super) offset: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RawAccess {
    pub(super) offset: u64,
    pub(super) region: u32,
    pub(super) count: u32,
}

/// One write of REGION_WRITE_MULTI: up to 8 bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawWrite {
    offset: u64,
    region: u32,
    count: u32,
    data: [u8; 8],
}

impl Request {
    /// Reads a command.
    ///
    /// # Errors
    /// It is none; what the sender is told is [`WireError::errno`].
    pub fn parse(header: &Header, body: &[u8], fds: Vec<OwnedFd>) -> Result<Self, WireError> {
        let number = header.command;
        let command = Command::from_number(number).ok_or(WireError::Unknown { number })?;
        if header.kind == Kind::Reply {
            return Err(WireError::Type { id: header.id, command: number, other: 1 });
        }
        let max = match command {
            Command::DmaMap => 1,
            // As many as it says: it looks itself.
            Command::DeviceSetIrqs => usize::MAX,
            _ => 0,
        };
        if fds.len() > max {
            return Err(WireError::Fds { command, got: fds.len(), max });
        }
        match command {
            Command::Version => Version::parse(body).map(Request::Version),
            Command::DmaMap => DmaMap::parse(body, fds.into_iter().next()).map(Request::DmaMap),
            Command::DmaUnmap => DmaUnmap::parse(body).map(Request::DmaUnmap),
            Command::DeviceGetInfo => info(command, body).map(|_| Request::DeviceInfo),
            Command::DeviceGetRegionInfo => region_info(body),
            Command::DeviceGetRegionIoFds => {
                let RawInfo { argsz, flags, index, count } = info(command, body)?;
                match (flags, count) {
                    (0, 0) => Ok(Request::RegionIoFds { argsz, index }),
                    (0, _) => Err(WireError::Field { command, field: "count", value: count.into() }),
                    _ => Err(WireError::Field { command, field: "flags", value: flags.into() }),
                }
            }
            Command::DeviceGetIrqInfo => info(command, body).map(|RawInfo { index, .. }| Request::IrqInfo { index }),
            Command::DeviceSetIrqs => SetIrqs::parse(body, fds).map(Request::SetIrqs),
            Command::RegionRead => region_read(body),
            Command::RegionWrite => region_write(body),
            Command::RegionWriteMulti => write_multi(body),
            Command::DeviceReset => Ok(Request::DeviceReset),
            Command::DmaRead
            | Command::DmaWrite
            | Command::DirtyPages
            | Command::DeviceFeature
            | Command::MigDataRead
            | Command::MigDataWrite => Err(WireError::Unsupported { command }),
        }
    }

    /// Which command it is.
    pub fn command(&self) -> Command {
        match self {
            Request::Version(_) => Command::Version,
            Request::DmaMap(_) => Command::DmaMap,
            Request::DmaUnmap(_) => Command::DmaUnmap,
            Request::DeviceInfo => Command::DeviceGetInfo,
            Request::RegionInfo { .. } => Command::DeviceGetRegionInfo,
            Request::RegionIoFds { .. } => Command::DeviceGetRegionIoFds,
            Request::IrqInfo { .. } => Command::DeviceGetIrqInfo,
            Request::SetIrqs(_) => Command::DeviceSetIrqs,
            Request::RegionRead { .. } => Command::RegionRead,
            Request::RegionWrite(_) => Command::RegionWrite,
            Request::RegionWriteMulti(_) => Command::RegionWriteMulti,
            Request::DeviceReset => Command::DeviceReset,
        }
    }

    /// The message, as a client sends it.
    pub fn encode(&self, id: u16, answer: Answer) -> Frame<'_> {
        let info = |argsz, index| RawInfo { argsz, flags: 0, index, count: 0 }.as_bytes().to_vec();
        let fixed = size_of::<RawInfo>() as u32;
        let (body, fds) = match self {
            Request::Version(version) => (version.encode(), Vec::new()),
            Request::DmaMap(map) => (map.encode(), map.fd.iter().map(AsFd::as_fd).collect()),
            Request::DmaUnmap(unmap) => (unmap.encode(), Vec::new()),
            Request::DeviceInfo => (info(fixed, 0), Vec::new()),
            Request::RegionInfo { index } => {
                let argsz = size_of::<RawRegionInfo>() as u32;
                let raw = RawRegionInfo { argsz, flags: 0, index: *index, cap_offset: 0, size: 0, offset: 0 };
                (raw.as_bytes().to_vec(), Vec::new())
            }
            Request::RegionIoFds { argsz, index } => (info(*argsz, *index), Vec::new()),
            Request::IrqInfo { index } => (info(fixed, *index), Vec::new()),
            Request::SetIrqs(irqs) => {
                let fds = match &irqs.data {
                    super::IrqData::EventFds(fds) => fds.iter().map(AsFd::as_fd).collect(),
                    _ => Vec::new(),
                };
                (irqs.encode(), fds)
            }
            &Request::RegionRead { region, offset, count } => {
                (RawAccess { offset, region, count }.as_bytes().to_vec(), Vec::new())
            }
            Request::RegionWrite(Write { region, offset, data }) => {
                let raw = RawAccess { offset: *offset, region: *region, count: data.len() as u32 };
                ([raw.as_bytes(), data].concat(), Vec::new())
            }
            Request::RegionWriteMulti(writes) => {
                let mut body = (writes.len() as u64).to_ne_bytes().to_vec();
                for Write { region, offset, data } in writes {
                    let mut padded = [0; 8];
                    padded[..data.len()].copy_from_slice(data);
                    let raw = RawWrite { offset: *offset, region: *region, count: data.len() as u32, data: padded };
                    body.extend_from_slice(raw.as_bytes());
                }
                (body, Vec::new())
            }
            Request::DeviceReset => (Vec::new(), Vec::new()),
        };
        let command = self.command() as u16;
        let header = Header { id, command, kind: Kind::Command, answer, error: None, body: body.len() as u32 };
        Frame { bytes: [&header.encode()[..], &body].concat(), fds }
    }
}

fn info(command: Command, body: &[u8]) -> Result<RawInfo, WireError> {
    let (info, _) = head::<RawInfo>(command, body)?;
    enough(command, info.argsz, size_of::<RawInfo>())?;
    Ok(info)
}

fn region_info(body: &[u8]) -> Result<Request, WireError> {
    let command = Command::DeviceGetRegionInfo;
    let (raw, _) = head::<RawRegionInfo>(command, body)?;
    enough(command, raw.argsz, size_of::<RawRegionInfo>())?;
    Ok(Request::RegionInfo { index: raw.index })
}

fn enough(command: Command, argsz: u32, needed: usize) -> Result<(), WireError> {
    if argsz as usize >= needed { Ok(()) } else { Err(WireError::Argsz { command, argsz, needed }) }
}

fn region_read(body: &[u8]) -> Result<Request, WireError> {
    let command = Command::RegionRead;
    let (RawAccess { offset, region, count }, _) = head::<RawAccess>(command, body)?;
    match count {
        ..=MAX_DATA => Ok(Request::RegionRead { region, offset, count }),
        _ => Err(WireError::Count { command, count: count.into(), max: MAX_DATA }),
    }
}

fn region_write(body: &[u8]) -> Result<Request, WireError> {
    let command = Command::RegionWrite;
    let (RawAccess { offset, region, count }, data) = head::<RawAccess>(command, body)?;
    if count > MAX_DATA {
        return Err(WireError::Count { command, count: count.into(), max: MAX_DATA });
    }
    if data.len() != count as usize {
        return Err(WireError::Short { command, got: body.len(), needed: size_of::<RawAccess>() + count as usize });
    }
    Ok(Request::RegionWrite(Write { region, offset, data: data.to_vec() }))
}

fn write_multi(body: &[u8]) -> Result<Request, WireError> {
    let command = Command::RegionWriteMulti;
    let (count, mut rest) = head::<u64>(command, body)?;
    if count > (rest.len() / size_of::<RawWrite>()) as u64 {
        return Err(WireError::Count { command, count, max: (rest.len() / size_of::<RawWrite>()) as u32 });
    }
    let mut writes = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let (write, others) = head::<RawWrite>(command, rest)?;
        rest = others;
        let data = write.data.get(..write.count as usize);
        let data = data.ok_or(WireError::Count { command, count: write.count.into(), max: 8 })?.to_vec();
        writes.push(Write { region: write.region, offset: write.offset, data });
    }
    Ok(Request::RegionWriteMulti(writes))
}

impl DmaMap {
    fn parse(body: &[u8], fd: Option<OwnedFd>) -> Result<Self, WireError> {
        let command = Command::DmaMap;
        let (RawMap { argsz, flags, offset, address, size }, _) = head::<RawMap>(command, body)?;
        enough(command, argsz, size_of::<RawMap>())?;
        let by_file = MAPPED | FILE_IO;
        if flags & by_file != 0 && fd.is_none() {
            return Err(WireError::Field { command, field: "flags", value: flags.into() });
        }
        let permission = match flags & !by_file {
            READABLE => Permission::ReadOnly,
            WRITEABLE => Permission::WriteOnly,
            BOTH => Permission::ReadWrite,
            _ => return Err(WireError::Field { command, field: "flags", value: flags.into() }),
        };
        let (first, last) = range(command, address, size)?;
        // A file's end is counted with a sign.
        let in_file = |end: Option<u64>| end.is_some_and(|end| i64::try_from(end).is_ok());
        if fd.is_some() && !in_file(offset.checked_add(size)) {
            return Err(WireError::Field { command, field: "offset", value: offset });
        }
        Ok(Self { permission, offset, first, last, fd })
    }

    fn encode(&self) -> Vec<u8> {
        let flags = match self.permission {
            Permission::ReadOnly => READABLE,
            Permission::WriteOnly => WRITEABLE,
            Permission::ReadWrite => BOTH,
        };
        let (address, size) = (self.first.0, self.last.0 - self.first.0 + 1);
        let raw = RawMap { argsz: size_of::<RawMap>() as u32, flags, offset: self.offset, address, size };
        raw.as_bytes().to_vec()
    }
}

impl DmaUnmap {
    /// Takes back what lies in a range.
    pub fn range(first: BusAddr, last: BusAddr) -> Self {
        let size = last.0.wrapping_sub(first.0).wrapping_add(1);
        let raw = RawUnmap { argsz: size_of::<RawUnmap>() as u32, flags: 0, address: first.0, size };
        Self { what: Unmapped::Range { first, last }, raw }
    }

    /// Takes everything back.
    pub fn everything() -> Self {
        let raw = RawUnmap { argsz: size_of::<RawUnmap>() as u32, flags: UNMAP_ALL, address: 0, size: 0 };
        Self { what: Unmapped::Everything, raw }
    }

    fn parse(body: &[u8]) -> Result<Self, WireError> {
        let command = Command::DmaUnmap;
        let (raw, _) = head::<RawUnmap>(command, body)?;
        enough(command, raw.argsz, size_of::<RawUnmap>())?;
        let RawUnmap { flags, address, size, .. } = raw;
        let what = match (flags, address, size) {
            (0, ..) => {
                let (first, last) = range(command, address, size)?;
                Unmapped::Range { first, last }
            }
            (UNMAP_ALL, 0, 0) => Unmapped::Everything,
            (UNMAP_ALL, ..) => return Err(WireError::Range { command, address, size }),
            _ => return Err(WireError::Field { command, field: "flags", value: flags.into() }),
        };
        Ok(Self { what, raw })
    }

    /// The payload, and that of the answer: it is the question again.
    pub fn encode(&self) -> Vec<u8> {
        let argsz = size_of::<RawUnmap>() as u32;
        RawUnmap { argsz, ..self.raw }.as_bytes().to_vec()
    }
}

/// Whole pages, at least one.
fn range(command: Command, address: u64, size: u64) -> Result<(BusAddr, BusAddr), WireError> {
    let first = BusAddr(address);
    let last = first.last(size).filter(|_| address.is_multiple_of(PAGE) && size.is_multiple_of(PAGE));
    last.map(|last| (first, last)).ok_or(WireError::Range { command, address, size })
}
