use super::payload::{
    self, RawConfigHead, RawInflight, RawLog, RawMemTableHead, RawRegion, RawSingleRegion, RawVringAddr, RawVringState,
};
use super::{Frame, FrontendCode, Header, Iotlb, Kind, NeedReply, ProtocolFeatures, WireError};
use ringfence_dma::{FrontendVa, Gpa};
use ringfence_hostmem::Placement;
use std::os::fd::{AsFd, OwnedFd};
use zerocopy::{FromBytes, IntoBytes};

/// The most regions in one SET_MEM_TABLE. ADD_MEM_REG can go on from there.
pub const MAX_REGIONS: usize = 8;

/// The end of the configuration space, in bytes.
const MAX_CONFIG: u32 = 4096;

/// What a front-end asks of a back-end, checked as far as a message can be by itself.
///
/// `F` is how a file descriptor is held: owned where it was received, borrowed where it is sent.
#[derive(Debug)]
#[expect(missing_docs, reason = "the variants are the standard's messages, named in `FrontendCode`")]
pub enum Request<F = OwnedFd> {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    /// Deprecated.
    ResetOwner,
    /// At most [`MAX_REGIONS`], each with the file it is in. Overlaps and file sizes are unchecked.
    SetMemTable(Vec<(Placement, F)>),
    /// The form of LOG_SHMFD: that many bytes from an offset in a file. The older form is not taken.
    SetLogBase {
        size: u64,
        offset: u64,
        fd: F,
    },
    SetLogFd(F),
    /// The queue's size. Unchecked.
    SetVringNum {
        index: u32,
        num: u32,
    },
    SetVringAddr(VringAddr),
    /// Where the queue goes on. Split: 16 bits; packed: two halves with their wrap counters on top.
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick(VringFd<F>),
    SetVringCall(VringFd<F>),
    SetVringErr(VringFd<F>),
    GetProtocolFeatures,
    /// Bits that nobody has defined are kept.
    SetProtocolFeatures(ProtocolFeatures),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: Enable,
    },
    SendRarp(u64),
    NetSetMtu(u64),
    SetBackendReqFd(F),
    IotlbMsg(Iotlb),
    SetVringEndian {
        index: u32,
        num: u32,
    },
    /// `offset + size` is at most 4096, and no more is asked for than a message holds.
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    /// `offset + data.len()` is at most 4096. Flags: bit 0 is set during live migration.
    SetConfig {
        offset: u32,
        flags: u32,
        data: Vec<u8>,
    },
    GetInflightFd(Inflight),
    SetInflightFd(Inflight, F),
    ResetDevice,
    VringKick {
        index: u32,
    },
    GetMaxMemSlots,
    AddMemReg(Placement, F),
    /// The offset means nothing. A descriptor that came along, as old front-ends do it, is closed.
    RemMemReg(Placement),
    SetStatus(u8),
    GetStatus,
}

/// Where the three parts of a ring are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringAddr {
    /// Which queue.
    pub index: u32,
    /// Bit 0: writes to the used ring are logged.
    pub flags: u32,
    /// The descriptor table, or ring of a packed queue. This and the next two are bus addresses where the device
    /// translates, else the front-end's virtual ones.
    pub descriptor: u64,
    /// The used ring, or device event suppression.
    pub used: u64,
    /// The available ring, or driver event suppression.
    pub available: u64,
    /// Where writes to the used ring are logged, guest-physical.
    pub log: u64,
}

impl VringAddr {
    /// The flag that asks for logging.
    pub const LOG: u32 = 1;
}

/// An eventfd for a queue.
#[derive(Debug, PartialEq, Eq)]
pub struct VringFd<F = OwnedFd> {
    /// Which queue.
    pub index: u8,
    /// `None`: poll instead.
    pub fd: Option<F>,
}

/// Whether a queue has effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enable {
    /// It has.
    On,
    /// It has none.
    Off,
}

/// The shared buffer for requests under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inflight {
    /// Its size in bytes.
    pub mmap_size: u64,
    /// Where it starts in the file.
    pub mmap_offset: u64,
    /// How many queues.
    pub queues: u16,
    /// How many descriptors each.
    pub queue_size: u16,
}

const VRING_INDEX: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;

impl Request {
    /// Reads the message behind `header`. `body` is all of its payload, `fds` all that came with it.
    ///
    /// # Errors
    /// The message is not one that a front-end can mean; `fds` are closed.
    pub fn parse(header: &Header, body: &[u8], fds: Vec<OwnedFd>) -> Result<Self, WireError> {
        let code = FrontendCode::try_from(header.request)?;
        if header.kind != Kind::Request {
            return Err(WireError::Kind { request: header.request, got: header.kind });
        }
        let name = code.name();
        match code {
            FrontendCode::SetMemTable => mem_table(name, body, fds),
            FrontendCode::SetLogBase => {
                let RawLog { size, offset } = payload::exact(name, body)?;
                Ok(Request::SetLogBase { size, offset, fd: payload::one_fd(name, fds)? })
            }
            FrontendCode::SetLogFd => {
                payload::empty(name, body)?;
                payload::one_fd(name, fds).map(Request::SetLogFd)
            }
            FrontendCode::SetVringKick => vring_fd(name, body, fds).map(Request::SetVringKick),
            FrontendCode::SetVringCall => vring_fd(name, body, fds).map(Request::SetVringCall),
            FrontendCode::SetVringErr => vring_fd(name, body, fds).map(Request::SetVringErr),
            FrontendCode::SetBackendReqFd => {
                payload::empty(name, body)?;
                payload::one_fd(name, fds).map(Request::SetBackendReqFd)
            }
            FrontendCode::SetInflightFd => {
                Ok(Request::SetInflightFd(inflight(name, body)?, payload::one_fd(name, fds)?))
            }
            FrontendCode::AddMemReg => Ok(Request::AddMemReg(single_region(name, body)?, payload::one_fd(name, fds)?)),
            FrontendCode::RemMemReg if fds.len() <= 1 => single_region(name, body).map(Request::RemMemReg),
            _ => {
                payload::fds::<0>(name, fds)?;
                Self::parse_without_fds(code, body)
            }
        }
    }

    fn parse_without_fds(code: FrontendCode, body: &[u8]) -> Result<Self, WireError> {
        let name = code.name();
        let nothing = |request| payload::empty(name, body).map(|()| request);
        let number = || payload::exact::<u64>(name, body);
        let state = || payload::exact::<RawVringState>(name, body);
        match code {
            FrontendCode::GetFeatures => nothing(Request::GetFeatures),
            FrontendCode::SetFeatures => number().map(Request::SetFeatures),
            FrontendCode::SetOwner => nothing(Request::SetOwner),
            FrontendCode::ResetOwner => nothing(Request::ResetOwner),
            FrontendCode::SetVringNum => state().map(|RawVringState { index, num }| Request::SetVringNum { index, num }),
            FrontendCode::SetVringAddr => vring_addr(name, body).map(Request::SetVringAddr),
            FrontendCode::SetVringBase => state().map(|s| Request::SetVringBase { index: s.index, base: s.num }),
            FrontendCode::GetVringBase => state().map(|s| Request::GetVringBase { index: s.index }),
            FrontendCode::GetProtocolFeatures => nothing(Request::GetProtocolFeatures),
            FrontendCode::SetProtocolFeatures => {
                number().map(|bits| Request::SetProtocolFeatures(ProtocolFeatures::from_bits_retain(bits)))
            }
            FrontendCode::GetQueueNum => nothing(Request::GetQueueNum),
            FrontendCode::SetVringEnable => vring_enable(name, state()?),
            FrontendCode::SendRarp => number().map(Request::SendRarp),
            FrontendCode::NetSetMtu => number().map(Request::NetSetMtu),
            FrontendCode::IotlbMsg => Iotlb::parse(name, body).map(Request::IotlbMsg),
            FrontendCode::SetVringEndian => state().map(|s| Request::SetVringEndian { index: s.index, num: s.num }),
            FrontendCode::GetConfig => {
                let (RawConfigHead { offset, size, flags }, _) = config(name, body)?;
                Ok(Request::GetConfig { offset, size, flags })
            }
            FrontendCode::SetConfig => {
                let (RawConfigHead { offset, flags, .. }, data) = config(name, body)?;
                Ok(Request::SetConfig { offset, flags, data: data.to_vec() })
            }
            FrontendCode::GetInflightFd => inflight(name, body).map(Request::GetInflightFd),
            FrontendCode::ResetDevice => nothing(Request::ResetDevice),
            FrontendCode::VringKick => state().map(|s| Request::VringKick { index: s.index }),
            FrontendCode::GetMaxMemSlots => nothing(Request::GetMaxMemSlots),
            FrontendCode::SetStatus => {
                let value = number()?;
                let status = value.try_into().map_err(|_| WireError::Value { message: name, field: "status", value })?;
                Ok(Request::SetStatus(status))
            }
            FrontendCode::GetStatus => nothing(Request::GetStatus),
            // These came through `parse`, which has dealt with them.
            FrontendCode::SetMemTable
            | FrontendCode::SetLogBase
            | FrontendCode::SetLogFd
            | FrontendCode::SetVringKick
            | FrontendCode::SetVringCall
            | FrontendCode::SetVringErr
            | FrontendCode::SetBackendReqFd
            | FrontendCode::SetInflightFd
            | FrontendCode::AddMemReg
            | FrontendCode::RemMemReg
            // And these belong to devices or to kinds of migration that nothing here has.
            | FrontendCode::CreateCryptoSession
            | FrontendCode::CloseCryptoSession
            | FrontendCode::PostcopyAdvise
            | FrontendCode::PostcopyListen
            | FrontendCode::PostcopyEnd
            | FrontendCode::GpuSetSocket
            | FrontendCode::GetSharedObject
            | FrontendCode::SetDeviceStateFd
            | FrontendCode::CheckDeviceState => Err(WireError::Unsupported { message: name }),
        }
    }
}

impl<F: AsFd> Request<F> {
    /// Which message it is.
    pub fn code(&self) -> FrontendCode {
        match self {
            Request::GetFeatures => FrontendCode::GetFeatures,
            Request::SetFeatures(_) => FrontendCode::SetFeatures,
            Request::SetOwner => FrontendCode::SetOwner,
            Request::ResetOwner => FrontendCode::ResetOwner,
            Request::SetMemTable(_) => FrontendCode::SetMemTable,
            Request::SetLogBase { .. } => FrontendCode::SetLogBase,
            Request::SetLogFd(_) => FrontendCode::SetLogFd,
            Request::SetVringNum { .. } => FrontendCode::SetVringNum,
            Request::SetVringAddr(_) => FrontendCode::SetVringAddr,
            Request::SetVringBase { .. } => FrontendCode::SetVringBase,
            Request::GetVringBase { .. } => FrontendCode::GetVringBase,
            Request::SetVringKick(_) => FrontendCode::SetVringKick,
            Request::SetVringCall(_) => FrontendCode::SetVringCall,
            Request::SetVringErr(_) => FrontendCode::SetVringErr,
            Request::GetProtocolFeatures => FrontendCode::GetProtocolFeatures,
            Request::SetProtocolFeatures(_) => FrontendCode::SetProtocolFeatures,
            Request::GetQueueNum => FrontendCode::GetQueueNum,
            Request::SetVringEnable { .. } => FrontendCode::SetVringEnable,
            Request::SendRarp(_) => FrontendCode::SendRarp,
            Request::NetSetMtu(_) => FrontendCode::NetSetMtu,
            Request::SetBackendReqFd(_) => FrontendCode::SetBackendReqFd,
            Request::IotlbMsg(_) => FrontendCode::IotlbMsg,
            Request::SetVringEndian { .. } => FrontendCode::SetVringEndian,
            Request::GetConfig { .. } => FrontendCode::GetConfig,
            Request::SetConfig { .. } => FrontendCode::SetConfig,
            Request::GetInflightFd(_) => FrontendCode::GetInflightFd,
            Request::SetInflightFd(..) => FrontendCode::SetInflightFd,
            Request::ResetDevice => FrontendCode::ResetDevice,
            Request::VringKick { .. } => FrontendCode::VringKick,
            Request::GetMaxMemSlots => FrontendCode::GetMaxMemSlots,
            Request::AddMemReg(..) => FrontendCode::AddMemReg,
            Request::RemMemReg(_) => FrontendCode::RemMemReg,
            Request::SetStatus(_) => FrontendCode::SetStatus,
            Request::GetStatus => FrontendCode::GetStatus,
        }
    }

    /// The message as it travels.
    ///
    /// # Panics
    /// For more regions, or more configuration, than a message holds: our own mistake.
    pub fn encode(&self, need_reply: NeedReply) -> Frame<'_> {
        let frame = |body: &[u8]| Frame::new(self.code().number(), Kind::Request, need_reply, body);
        let state = |index: u32, num: u32| frame(RawVringState { index, num }.as_bytes());
        match self {
            Request::GetFeatures
            | Request::SetOwner
            | Request::ResetOwner
            | Request::GetProtocolFeatures
            | Request::GetQueueNum
            | Request::ResetDevice
            | Request::GetMaxMemSlots
            | Request::GetStatus => frame(&[]),
            Request::SetFeatures(number) | Request::SendRarp(number) | Request::NetSetMtu(number) => {
                frame(number.as_bytes())
            }
            Request::SetProtocolFeatures(features) => frame(features.bits().as_bytes()),
            Request::SetStatus(status) => frame(u64::from(*status).as_bytes()),
            Request::SetMemTable(regions) => encode_mem_table(regions, frame),
            Request::SetLogBase { size, offset, fd } => {
                frame(RawLog { size: *size, offset: *offset }.as_bytes()).with_fd(fd)
            }
            Request::SetLogFd(fd) | Request::SetBackendReqFd(fd) => frame(&[]).with_fd(fd),
            Request::SetVringNum { index, num } | Request::SetVringEndian { index, num } => state(*index, *num),
            Request::SetVringAddr(addr) => frame(RawVringAddr::from(*addr).as_bytes()),
            Request::SetVringBase { index, base } => state(*index, *base),
            Request::GetVringBase { index } | Request::VringKick { index } => state(*index, 0),
            Request::SetVringKick(vring) | Request::SetVringCall(vring) | Request::SetVringErr(vring) => {
                let no_fd = if vring.fd.is_none() { VRING_NO_FD } else { 0 };
                let frame = frame((u64::from(vring.index) | no_fd).as_bytes());
                vring.fd.iter().fold(frame, Frame::with_fd)
            }
            Request::SetVringEnable { index, enable } => state(*index, u32::from(*enable == Enable::On)),
            Request::IotlbMsg(iotlb) => frame(iotlb.encode().as_bytes()),
            Request::GetConfig { offset, size, flags } => {
                let head = RawConfigHead { offset: *offset, size: *size, flags: *flags };
                frame(&[head.as_bytes(), &vec![0; *size as usize]].concat())
            }
            Request::SetConfig { offset, flags, data } => {
                let head = RawConfigHead { offset: *offset, size: data.len() as u32, flags: *flags };
                frame(&[head.as_bytes(), data].concat())
            }
            Request::GetInflightFd(inflight) => frame(RawInflight::from(*inflight).as_bytes()),
            Request::SetInflightFd(inflight, fd) => frame(RawInflight::from(*inflight).as_bytes()).with_fd(fd),
            Request::AddMemReg(region, fd) => frame(RawSingleRegion::from(*region).as_bytes()).with_fd(fd),
            Request::RemMemReg(region) => frame(RawSingleRegion::from(*region).as_bytes()),
        }
    }
}

fn encode_mem_table<'f, F: AsFd>(regions: &'f [(Placement, F)], frame: impl Fn(&[u8]) -> Frame<'f>) -> Frame<'f> {
    let head = RawMemTableHead { regions: regions.len() as u32, padding: 0 };
    let mut body = head.as_bytes().to_vec();
    regions.iter().for_each(|(region, _)| body.extend_from_slice(RawRegion::from(*region).as_bytes()));
    regions.iter().map(|(_, fd)| fd).fold(frame(&body), Frame::with_fd)
}

fn mem_table(message: &'static str, body: &[u8], fds: Vec<OwnedFd>) -> Result<Request, WireError> {
    let too_short = WireError::Size { message, got: body.len(), expected: size_of::<RawMemTableHead>() };
    let (head, rest) = RawMemTableHead::read_from_prefix(body).map_err(|_| too_short)?;
    let count = head.regions as usize;
    if count > MAX_REGIONS {
        return Err(WireError::Regions { message, got: head.regions, max: MAX_REGIONS });
    }
    // Some front-ends send the whole table of eight, whatever they use of it.
    let expected = count * size_of::<RawRegion>();
    if rest.len() != expected && rest.len() != MAX_REGIONS * size_of::<RawRegion>() {
        let head = size_of::<RawMemTableHead>();
        return Err(WireError::Size { message, got: body.len(), expected: head + expected });
    }
    if fds.len() != count {
        return Err(WireError::Fds { message, got: fds.len(), expected: count });
    }
    let regions = rest.chunks_exact(size_of::<RawRegion>()).zip(fds);
    let regions = regions.map(|(raw, fd)| payload::exact::<RawRegion>(message, raw).map(|raw| (raw.into(), fd)));
    regions.collect::<Result<_, _>>().map(Request::SetMemTable)
}

fn single_region(message: &'static str, body: &[u8]) -> Result<Placement, WireError> {
    payload::exact::<RawSingleRegion>(message, body).map(|raw| raw.region.into())
}

fn vring_fd(message: &'static str, body: &[u8], fds: Vec<OwnedFd>) -> Result<VringFd, WireError> {
    let value: u64 = payload::exact(message, body)?;
    if value & !(VRING_INDEX | VRING_NO_FD) != 0 {
        return Err(WireError::Value { message, field: "vring", value });
    }
    let index = (value & VRING_INDEX) as u8;
    if value & VRING_NO_FD != 0 {
        payload::fds::<0>(message, fds)?;
        return Ok(VringFd { index, fd: None });
    }
    Ok(VringFd { index, fd: Some(payload::one_fd(message, fds)?) })
}

fn vring_addr(message: &'static str, body: &[u8]) -> Result<VringAddr, WireError> {
    let RawVringAddr { index, flags, descriptor, used, available, log } = payload::exact(message, body)?;
    if flags & !VringAddr::LOG != 0 {
        return Err(WireError::Value { message, field: "flags", value: flags.into() });
    }
    Ok(VringAddr { index, flags, descriptor, used, available, log })
}

fn vring_enable(message: &'static str, state: RawVringState) -> Result<Request, WireError> {
    let enable = match state.num {
        0 => Enable::Off,
        1 => Enable::On,
        num => return Err(WireError::Value { message, field: "num", value: num.into() }),
    };
    Ok(Request::SetVringEnable { index: state.index, enable })
}

/// The head and as many bytes as it says.
pub(super) fn config<'b>(message: &'static str, body: &'b [u8]) -> Result<(RawConfigHead, &'b [u8]), WireError> {
    let head_size = size_of::<RawConfigHead>();
    let too_short = WireError::Size { message, got: body.len(), expected: head_size };
    let (head, data) = RawConfigHead::read_from_prefix(body).map_err(|_| too_short)?;
    let RawConfigHead { offset, size, .. } = head;
    if size == 0 || offset.checked_add(size).is_none_or(|end| end > MAX_CONFIG) {
        return Err(WireError::Range { message, field: "config", start: offset.into(), size: size.into() });
    }
    if data.len() != size as usize {
        return Err(WireError::Size { message, got: body.len(), expected: head_size + size as usize });
    }
    Ok((head, data))
}

pub(super) fn inflight(message: &'static str, body: &[u8]) -> Result<Inflight, WireError> {
    let raw: RawInflight = payload::padded(message, body, RawInflight::FIELDS)?;
    let RawInflight { mmap_size, mmap_offset, queues, queue_size, padding: _ } = raw;
    Ok(Inflight { mmap_size, mmap_offset, queues, queue_size })
}

impl From<Inflight> for RawInflight {
    fn from(Inflight { mmap_size, mmap_offset, queues, queue_size }: Inflight) -> Self {
        RawInflight { mmap_size, mmap_offset, queues, queue_size, padding: [0; 4] }
    }
}

impl From<VringAddr> for RawVringAddr {
    fn from(VringAddr { index, flags, descriptor, used, available, log }: VringAddr) -> Self {
        RawVringAddr { index, flags, descriptor, used, available, log }
    }
}

impl From<RawRegion> for Placement {
    fn from(raw: RawRegion) -> Self {
        Placement {
            gpa: Gpa(raw.guest_address),
            size: raw.size,
            frontend_va: FrontendVa(raw.user_address),
            offset: raw.mmap_offset,
        }
    }
}

impl From<Placement> for RawRegion {
    fn from(Placement { gpa, frontend_va, size, offset }: Placement) -> Self {
        RawRegion { guest_address: gpa.0, size, user_address: frontend_va.0, mmap_offset: offset }
    }
}

impl From<Placement> for RawSingleRegion {
    fn from(region: Placement) -> Self {
        RawSingleRegion { padding: 0, region: region.into() }
    }
}
