//! virtio-iommu's driver (§5.13): an IOMMU for the other devices.
//!
//! [`Viommu`] speaks to the device. A [`Space`] is one of its domains, attached to an endpoint, and is an
//! [`Iommu`]: behind a [`Window`](crate::mapper::Window) and a [`Paged`](crate::mapper::Paged) it is how another driver
//! lends its buffers.
//!
//! An endpoint's number is firmware's to tell (ACPI's VIOT, a device tree's `iommu-map`); on QEMU's x86 and arm64 machines it
//! is the PCI requester ID: bus, device and function.
//!
//! ```
//! use ringfence_dma::{Buffer, BusAddr, Mapper};
//! use ringfence_driver::mapper::{Paged, Window};
//! use ringfence_driver::policy::{DriverPolicy, Platform};
//! use ringfence_driver::viommu::Viommu;
//! use ringfence_driver::{Host, Transport, blk::Blk};
//!
//! fn confined<'a, T: Transport<Error: 'static>, M: Mapper>(
//!     iommu: &'a Viommu<'a, T, M>,
//!     rings: Buffer<'a>,
//!     disk: T,
//! ) -> Result<(), Box<dyn core::error::Error>> {
//!     const ENDPOINT: u32 = 0x0018; // bus 0, device 3, function 0
//!     let reserved = iommu.probe(ENDPOINT)?;
//!     let space = iommu.attach(1, ENDPOINT)?;
//!     let first = iommu.place(&reserved, 1024).ok_or("no room for bus addresses")?;
//!     let mapper = Paged::strict(Window::new(space, first, 1024), rings);
//!     let host = Host {
//!         platform: Platform::X86Iommu,
//!         policy: DriverPolicy::Refusing { allowed: &[] },
//!         physical: None,
//!         translated: Some(&mapper),
//!     };
//!     println!("{:?}", Blk::start(disk, host, Default::default())?.geometry());
//!     Ok(())
//! }
//! ```

use crate::lending::{Lender, Lending, LoanError, LoanId, Part};
use crate::mapper::{Iommu, Run};
use crate::policy::{DriverPolicy, Platform};
use crate::{Host, StartError, Transport, Wants, config};
use alloc::vec::Vec;
use core::fmt;
use ringfence_dma::{Access, BusAddr, DmaError, Gpa, HostSlice, Lock, Mapper, Permission};
use virtio_spec::Id;

/// An IOMMU. Any number of drivers may use it; each request is waited for under a spin lock.
#[derive(Debug)]
pub struct Viommu<'a, T: Transport, M: Mapper + ?Sized> {
    lender: Lock<Lender<'a, T, M>>,
    limits: Limits,
}

/// What the device can do, as its configuration space says (§5.13.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long its smallest page is.
    pub page: usize,
    /// The first and the last bus address that can be mapped.
    pub addresses: (BusAddr, BusAddr),
    /// The first and the last number that a domain may have.
    pub domains: (u32, u32),
    /// How long its answer to a probe is, if it can be probed.
    probe: Option<u32>,
}

/// A range of bus addresses of an endpoint that is not to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// The first address.
    pub first: BusAddr,
    /// The last.
    pub last: BusAddr,
    /// Interrupts are sent there: what is written there passes (VIRTIO_IOMMU_RESV_MEM_T_MSI).
    pub msi: bool,
}

/// What the device stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Why.
    pub reason: FaultReason,
    /// Whose access it was.
    pub endpoint: u32,
    /// What was wanted, as far as it is known.
    pub access: Option<Access>,
    /// Where, if it is known.
    pub addr: Option<BusAddr>,
}

/// Why an access was stopped (§5.13.6.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// The device does not say.
    Unknown(u8),
    /// The endpoint has no domain.
    Domain,
    /// There is no mapping, or it does not allow that.
    Mapping,
}

/// What the device answers to a request that it does not do (§5.13.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// VIRTIO_IOMMU_S_IOERR.
    Io,
    /// VIRTIO_IOMMU_S_UNSUPP.
    Unsupported,
    /// VIRTIO_IOMMU_S_DEVERR.
    Device,
    /// VIRTIO_IOMMU_S_INVAL.
    Invalid,
    /// VIRTIO_IOMMU_S_RANGE.
    Range,
    /// VIRTIO_IOMMU_S_NOENT.
    NoEntry,
    /// VIRTIO_IOMMU_S_FAULT.
    Fault,
    /// VIRTIO_IOMMU_S_NOMEM.
    NoMemory,
    /// Nothing, or what no device may answer.
    Other(u8),
}

/// Why the IOMMU did not do as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViommuError<E> {
    /// The request could not be made, or its answer is none.
    Loan(LoanError<E>),
    /// The device answered that it does not do it.
    Refused(Status),
    /// The device can't be probed.
    NoProbe,
    /// The device's answer to a probe makes no sense.
    BadProperty {
        /// Where in the answer.
        offset: usize,
    },
}

impl<E: fmt::Display> fmt::Display for ViommuError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ViommuError::Loan(error) => write!(f, "the IOMMU: {error}"),
            ViommuError::Refused(status) => write!(f, "the IOMMU refuses: {status:?}"),
            ViommuError::NoProbe => f.write_str("the IOMMU can't be probed"),
            ViommuError::BadProperty { offset } => {
                write!(f, "the IOMMU's answer to a probe makes no sense at byte {offset}")
            }
        }
    }
}

impl<E: core::error::Error> core::error::Error for ViommuError<E> {}

impl<E> From<LoanError<E>> for ViommuError<E> {
    fn from(error: LoanError<E>) -> Self {
        ViommuError::Loan(error)
    }
}

/// Feature bits (§5.13.3).
const INPUT_RANGE: u64 = 1 << 0;
const DOMAIN_RANGE: u64 = 1 << 1;
const MAP_UNMAP: u64 = 1 << 2;
const PROBE: u64 = 1 << 4;

/// The device's queues (§5.13.2).
const REQUESTS: usize = 0;
const EVENTS: usize = 1;

/// How many requests may be under way, and how many faults may wait.
const DEPTH: u16 = 64;

/// Request types (§5.13.6).
const ATTACH: u8 = 1;
const DETACH: u8 = 2;
const MAP: u8 = 3;
const UNMAP: u8 = 4;
const PROBE_REQUEST: u8 = 5;

/// The longest request, a probe, without what the device writes: that comes behind it in our memory, wherever a request
/// ends.
const LONGEST: usize = 72;

/// `virtio_iommu_req_tail`: the answer.
const TAIL: u32 = 4;

/// A probe's answer that is longer than this is not asked for.
const MOST_PROPERTIES: u32 = 4096 - LONGEST as u32 - TAIL;

/// `virtio_iommu_fault`.
const FAULT_LEN: u32 = 24;

/// What no device answers: it shows an answer that was not written.
const NO_STATUS: u8 = 0xff;

impl<'a, T: Transport, M: Mapper + ?Sized> Viommu<'a, T, M> {
    /// Brings the IOMMU up. `physical` makes physical addresses: an IOMMU is behind no other.
    ///
    /// # Errors
    /// Those of [`start`](crate::start()), and [`StartError::Config`] for a device that can't be as it says.
    pub fn start(transport: T, physical: &'a M) -> Result<Self, StartError<T::Error>> {
        // One that offers to be translated has its addresses translated to themselves.
        let (platform, policy) = (Platform::X86, DriverPolicy::New);
        let host = Host { platform, policy, physical: Some(physical), translated: Some(physical) };
        let features = INPUT_RANGE | DOMAIN_RANGE | MAP_UNMAP | PROBE;
        let wants = Wants { device: u8::from(Id::Iommu).into(), features, queues: 2, depth: DEPTH };
        let heads = |limits: &Limits| {
            let answer = limits.probe.unwrap_or(0) + TAIL;
            [LONGEST + answer as usize, FAULT_LEN as usize]
        };
        let (lender, limits) = Lender::start(transport, host, wants, heads, 0, read_config)?;
        let viommu = Self { lender: Lock::new(lender), limits };
        match viommu.listen() {
            Ok(()) => Ok(viommu),
            Err(LoanError::Transport(error)) => Err(StartError::Transport(error)),
            // A queue of its own that is too small for a single fault.
            Err(_) => Err(StartError::NoQueue { queue: EVENTS as u16 }),
        }
    }

    /// What the device can do.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Attaches an endpoint to a domain, which is made if it does not exist. What the endpoint sends goes through the
    /// domain's mappings from then on.
    ///
    /// # Errors
    /// Any [`ViommuError`].
    pub fn attach(&self, domain: u32, endpoint: u32) -> Result<Space<'_, 'a, T, M>, ViommuError<T::Error>> {
        // No flags: an endpoint that is let through untranslated is not attached.
        self.exchange([Request::new(ATTACH).u32(domain).u32(endpoint).u64(0)], TAIL, |_| ())?;
        Ok(Space { viommu: self, domain, endpoint })
    }

    /// What an endpoint's addresses must not be mapped for.
    ///
    /// # Errors
    /// Any [`ViommuError`]; [`ViommuError::NoProbe`] where the device has no probes, and nothing is known.
    pub fn probe(&self, endpoint: u32) -> Result<Vec<Reserved>, ViommuError<T::Error>> {
        let len = self.limits.probe.ok_or(ViommuError::NoProbe)?;
        let mut properties = alloc::vec![0; len as usize];
        let request = Request { len: LONGEST, ..Request::new(PROBE_REQUEST).u32(endpoint) };
        self.exchange([request], len + TAIL, |answer| answer.read(0, &mut properties))?;
        parse(&properties)
    }

    /// Addresses for `pages` pages that nothing keeps from being mapped, from 4 GiB on if possible: so that they are no
    /// physical addresses of a small machine.
    pub fn place(&self, reserved: &[Reserved], pages: usize) -> Option<BusAddr> {
        let (lowest, highest) = self.limits.addresses;
        let page = self.limits.page as u64;
        let rest = (pages as u64).checked_mul(page)?.checked_sub(1)?;
        let from = |start: u64| {
            let mut first = start.checked_next_multiple_of(page)?;
            // Each reserved range moves it on once at the most.
            for _ in 0..=reserved.len() {
                let last = first.checked_add(rest).filter(|&last| last <= highest.0)?;
                match reserved.iter().find(|range| range.first.0 <= last && first <= range.last.0) {
                    None => return Some(BusAddr(first)),
                    Some(range) => first = range.last.0.checked_add(1)?.checked_next_multiple_of(page)?,
                }
            }
            None
        };
        from(lowest.0.max(1 << 32)).or_else(|| from(lowest.0))
    }

    /// A fault that the device told of, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`LoanError::Broken`], [`LoanError::Transport`], [`LoanError::Short`].
    pub fn fault(&self) -> Result<Option<Fault>, LoanError<T::Error>> {
        let Some(back) = self.lender.lock().queues[EVENTS].take()? else { return Ok(None) };
        let mut bytes = [0; FAULT_LEN as usize];
        back.head.memory.read(0, &mut bytes);
        self.listen()?;
        match back.written {
            FAULT_LEN.. => Ok(Some(Fault::read(bytes))),
            written => Err(LoanError::Short { written, expected: FAULT_LEN }),
        }
    }

    /// Resets each queue alone, and has them go on: an IOMMU that broke the rules, or did not answer, need not be given up.
    /// Its domains are what they were, as far as it was told before.
    ///
    /// # Errors
    /// [`LoanError::NotOffered`] where the device or the transport does not reset single queues, [`LoanError::NeedsReset`], and
    /// [`LoanError::Transport`].
    pub fn restart(&self) -> Result<(), LoanError<T::Error>> {
        self.lender.lock().restart()?;
        self.listen()
    }

    /// Lends the device all the room for faults that there is.
    fn listen(&self) -> Result<(), LoanError<T::Error>> {
        let mut lender = self.lender.lock();
        let part = Part { offset: 0, len: FAULT_LEN, access: Access::Write };
        loop {
            match lender.queues[EVENTS].lend(&[part], &[], Access::Write) {
                Ok(_) => {}
                Err(LoanError::Busy) => return lender.notify(),
                Err(error) => return Err(error),
            }
        }
    }

    /// Makes requests, as many at once as there is room for, and waits for all of them. The device writes `answer` bytes
    /// for each; `read` sees them where it did as asked. The first error is the one that is told.
    fn exchange(
        &self,
        requests: impl IntoIterator<Item = Request>,
        answer: u32,
        mut read: impl FnMut(HostSlice<'_>),
    ) -> Result<(), ViommuError<T::Error>> {
        let lender = &mut *self.lender.lock();
        let mut requests = requests.into_iter().peekable();
        let mut outcome = Ok(());
        while requests.peek().is_some() {
            let mut under_way = [None; DEPTH as usize];
            let mut count = 0;
            while let Some(request) = requests.peek() {
                match request.put(&mut lender.queues[REQUESTS], answer) {
                    Ok(id) => under_way[count] = Some(id),
                    Err(LoanError::Busy) if count > 0 => break,
                    Err(error) => return Err(error.into()),
                }
                count += 1;
                requests.next();
            }
            lender.notify()?;
            while count > 0 {
                let Some(back) = lender.queues[REQUESTS].take()? else {
                    lender.wait(REQUESTS)?;
                    continue;
                };
                // What somebody gave up on before is nobody's.
                let Some(mine) = under_way.iter_mut().find(|id| **id == Some(back.id)) else { continue };
                *mine = None;
                count -= 1;
                let slice = back.head.memory.sub(LONGEST, answer as usize);
                let answered = check(slice, back.written);
                if answered.is_ok() {
                    read(slice);
                }
                outcome = outcome.and(answered);
            }
        }
        outcome
    }
}

/// What the device answered in the last bytes of `slice`, who says that it wrote so many of them.
fn check<E>(slice: HostSlice<'_>, written: u32) -> Result<(), ViommuError<E>> {
    let expected = slice.len() as u32;
    if written < expected {
        return Err(LoanError::Short { written, expected }.into());
    }
    let mut status = [0];
    slice.read(slice.len() - TAIL as usize, &mut status);
    let status = match status[0] {
        0 => return Ok(()),
        1 => Status::Io,
        2 => Status::Unsupported,
        3 => Status::Device,
        4 => Status::Invalid,
        5 => Status::Range,
        6 => Status::NoEntry,
        7 => Status::Fault,
        8 => Status::NoMemory,
        other => Status::Other(other),
    };
    Err(ViommuError::Refused(status))
}

/// A request as the device reads it (§5.13.6).
struct Request {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Request {
    fn new(kind: u8) -> Self {
        let mut bytes = [0; LONGEST];
        bytes[0] = kind;
        Self { bytes, len: 4 }
    }

    fn field(mut self, field: &[u8]) -> Self {
        self.bytes[self.len..][..field.len()].copy_from_slice(field);
        self.len += field.len();
        self
    }

    fn u32(self, value: u32) -> Self {
        self.field(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.field(&value.to_le_bytes())
    }

    /// Lends the request, and room for an answer that is none yet.
    fn put<M: Mapper + ?Sized, E>(&self, queue: &mut Lending<'_, M>, answer: u32) -> Result<LoanId, LoanError<E>> {
        let Some(head) = queue.next_head() else { return queue.usable().and(Err(LoanError::Busy)) };
        head.memory.write(0, &self.bytes[..self.len]);
        let room = head.memory.sub(LONGEST, answer as usize);
        room.fill(0);
        room.write(room.len() - TAIL as usize, &[NO_STATUS]);
        let asked = Part { offset: 0, len: self.len as u32, access: Access::Read };
        let answered = Part { offset: LONGEST as u32, len: answer, access: Access::Write };
        queue.lend(&[asked, answered], &[], Access::Write)
    }
}

/// An endpoint in a domain of its own: its address space. Detached when dropped, from when on nothing of the endpoint's
/// passes unless the device lets through what is attached nowhere.
#[derive(Debug)]
pub struct Space<'v, 'a, T: Transport, M: Mapper + ?Sized> {
    viommu: &'v Viommu<'a, T, M>,
    domain: u32,
    endpoint: u32,
}

impl<T: Transport, M: Mapper + ?Sized> Space<'_, '_, T, M> {
    /// Where the platform's error code comes from.
    fn failed(error: &ViommuError<T::Error>) -> DmaError {
        let code = match error {
            ViommuError::Refused(Status::Io) => 1,
            ViommuError::Refused(Status::Unsupported) => 2,
            ViommuError::Refused(Status::Device) => 3,
            ViommuError::Refused(Status::Invalid) => 4,
            ViommuError::Refused(Status::Range) => 5,
            ViommuError::Refused(Status::NoEntry) => 6,
            ViommuError::Refused(Status::Fault) => 7,
            ViommuError::Refused(Status::NoMemory) => 8,
            ViommuError::Refused(Status::Other(status)) => (*status).into(),
            // The device did not answer, or not as it must.
            _ => -1,
        };
        DmaError::Platform { code }
    }
}

/// Errors are [`DmaError::Platform`] with the device's status (§5.13.6.2) as their code, or -1 where it gave none.
impl<T: Transport, M: Mapper + ?Sized> Iommu for Space<'_, '_, T, M> {
    fn page(&self) -> usize {
        self.viommu.limits.page
    }

    fn map(&self, addr: BusAddr, physical: Gpa, len: usize, permission: Permission) -> Result<(), DmaError> {
        let unreachable = DmaError::Unreachable { physical };
        let last = addr.last(len as u64).ok_or(unreachable)?;
        let flags = match permission {
            Permission::ReadOnly => 1,
            Permission::WriteOnly => 2,
            Permission::ReadWrite => 3,
        };
        let request = Request::new(MAP).u32(self.domain).u64(addr.0).u64(last.0).u64(physical.0).u32(flags);
        self.viommu.exchange([request], TAIL, |_| ()).map_err(|error| Self::failed(&error))
    }

    fn unmap(&self, runs: &[Run]) -> Result<(), DmaError> {
        let request = |run: &Run| {
            let last = run.addr.last(run.len as u64).expect("a run that was mapped");
            Request::new(UNMAP).u32(self.domain).u64(run.addr.0).u64(last.0).u32(0)
        };
        self.viommu.exchange(runs.iter().map(request), TAIL, |_| ()).map_err(|error| Self::failed(&error))
    }
}

impl<T: Transport, M: Mapper + ?Sized> Drop for Space<'_, '_, T, M> {
    fn drop(&mut self) {
        let request = Request::new(DETACH).u32(self.domain).u32(self.endpoint).u64(0);
        // A device that does not even do that has nothing more to be asked.
        let _ = self.viommu.exchange([request], TAIL, |_| ());
    }
}

impl Fault {
    fn read(bytes: [u8; FAULT_LEN as usize]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let flags = word(4);
        let reason = match bytes[0] {
            1 => FaultReason::Domain,
            2 => FaultReason::Mapping,
            other => FaultReason::Unknown(other),
        };
        let access = match flags & 3 {
            1 => Some(Access::Read),
            2 => Some(Access::Write),
            _ => None,
        };
        let addr = u64::from(word(16)) | u64::from(word(20)) << 32;
        Self { reason, endpoint: word(8), access, addr: (flags & 1 << 8 != 0).then_some(BusAddr(addr)) }
    }
}

/// VIRTIO_IOMMU_PROBE_T_RESV_MEM.
const RESV_MEM: u16 = 1;

/// The properties of an endpoint (§5.13.6.7): each has a type and a length, until one of type 0.
fn parse<E>(properties: &[u8]) -> Result<Vec<Reserved>, ViommuError<E>> {
    let mut found = Vec::new();
    let mut offset = 0;
    while let Some(head) = properties.get(offset..offset + 4) {
        let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        // The four upper bits are reserved.
        let (kind, len) = (half(0) & 0xfff, usize::from(half(2)));
        if kind == 0 {
            break;
        }
        let body = properties.get(offset + 4..offset + 4 + len).ok_or(ViommuError::BadProperty { offset })?;
        if kind == RESV_MEM {
            found.push(Reserved::read(body).ok_or(ViommuError::BadProperty { offset })?);
        }
        offset += 4 + len;
    }
    Ok(found)
}

impl Reserved {
    /// `virtio_iommu_probe_resv_mem`, without its head.
    fn read(body: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
        let (first, last) = (word(4)?, word(12)?);
        // §5.13.6.7.2.1: other subtypes are treated like the first.
        (first <= last).then_some(Self { first: BusAddr(first), last: BusAddr(last), msi: body[0] == 1 })
    }
}

/// Reads the configuration space, and believes what can be.
fn read_config<T: Transport>(transport: &mut T, features: u64) -> Result<Limits, StartError<T::Error>> {
    let taken = |feature| features & feature != 0;
    if !taken(MAP_UNMAP) {
        return Err(StartError::Config { field: "features", value: features });
    }
    let (mask, range, domains, probe) = config::read(transport, |fields| {
        let range = (fields.u64(8)?, fields.u64(16)?);
        Ok((fields.u64(0)?, range, (fields.u32(24)?, fields.u32(28)?), fields.u32(32)?))
    })?;
    // A page is no longer than a mapping that anybody would make.
    if mask == 0 || mask.trailing_zeros() > 30 {
        return Err(StartError::Config { field: "page_size_mask", value: mask });
    }
    let (first, last) = if taken(INPUT_RANGE) { range } else { (0, u64::MAX) };
    if first > last {
        return Err(StartError::Config { field: "input_range", value: last });
    }
    let domains = if taken(DOMAIN_RANGE) { domains } else { (0, u32::MAX) };
    if domains.0 > domains.1 {
        return Err(StartError::Config { field: "domain_range", value: domains.1.into() });
    }
    let probe = taken(PROBE).then_some(probe);
    if let Some(len @ (0 | MOST_PROPERTIES..)) = probe {
        return Err(StartError::Config { field: "probe_size", value: len.into() });
    }
    let addresses = (BusAddr(first), BusAddr(last));
    Ok(Limits { page: 1 << mask.trailing_zeros(), addresses, domains, probe })
}
