//! A cell's world, and what can be seen in it.

use crate::wrapped::Plain;
use crate::{
    Area, Attached, Bus, Case, Damage, DriverKind, GuestFrames, GuestGrants, Halt, Machine, OWN, PAGE, Slot, Touch,
    Trace,
};
use ringfence_device::Device;
use ringfence_device::blk::{self, Blk as Disk};
use ringfence_device::queue::Report;
use ringfence_device::storage::{Memory as MemoryDisk, Storage};
use ringfence_dma::{Buffer, BusAddr, DmaError, Fault, Gpa, HostSlice, Mapped, Mapper, Permission};
use ringfence_driver::blk::{Blk, BlkError, Options};
use ringfence_driver::embedded::{Embedded, EmbeddedError};
use ringfence_driver::mapper::{Direct, FrameTable, Paged, Xen};
use ringfence_driver::{Host, StartError};
use ringfence_iommu::{Domain, Faults, Mapping, Strict, Window};
use ringfence_policy::{Addressing, Allow, DeviceKind, DriverPolicy, IommuMode, Platform, Reach, Refusal};
use ringfence_ring::{Format, Indirect, Notifications, Rules};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// What a cell's world is assembled from, where there is a choice. What the methods do of themselves is what the platform
/// has; a test puts parts in that misbehave.
pub trait Parts {
    /// What the device does about the flag.
    fn mode(&self, case: Case) -> IommuMode {
        case.device.mode(case.platform)
    }

    /// What the driver does about the flag. `allowed` names the device.
    fn policy<'a>(&self, case: Case, allowed: &'a [Allow]) -> DriverPolicy<'a> {
        match case.driver {
            DriverKind::Old => DriverPolicy::Old,
            DriverKind::New => DriverPolicy::New,
            DriverKind::Refusing => DriverPolicy::Refusing { allowed: &[] },
            DriverKind::Allowing => DriverPolicy::Refusing { allowed },
        }
    }

    /// The device's way to memory.
    fn bus(&self, case: Case, world: &World) -> Bus {
        let World { machine, domain, assigned, trace, .. } = world;
        match (case.device.reach(case.platform), domain, assigned) {
            (Reach::ThroughIommu, Some(domain), _) => Bus::through(domain, machine, trace),
            (Reach::Untranslated, _, Some(assigned)) if case.device.is_physical() => {
                Bus::through(assigned, machine, trace)
            }
            (Reach::Untranslated, _, Some(_)) => Bus::foreign(machine, trace),
            _ => Bus::plain(machine, trace),
        }
    }

    /// The platform's DMA API, for this device.
    ///
    /// # Errors
    /// There is no memory for it.
    fn dma_api<'w>(&self, case: Case, world: &'w World) -> Result<Box<dyn Mapper + 'w>, DmaError> {
        let rings = world.machine.buffer(Area::RINGS);
        Ok(match (&world.domain, case.platform) {
            (Some(table), Platform::XenGrants) => {
                Box::new(Paged::strict(GuestGrants::new(Arc::clone(table), &world.machine), rings))
            }
            (Some(domain), _) => Box::new(Strict::new(Arc::clone(domain), rings)),
            (None, Platform::Xen) => {
                let pool = world.machine.buffer(Area::BOUNCE);
                Box::new(Xen::new(&world.frames, pool, pool.len())?)
            }
            (None, _) => Box::new(Direct::new(rings)),
        })
    }
}

/// The parts that the platforms have.
#[derive(Clone, Copy, Debug)]
pub struct Genuine;

impl Parts for Genuine {}

/// A machine, and what stands between its devices and its memory.
#[derive(Debug)]
pub struct World {
    /// Its memory.
    pub machine: Arc<Machine>,
    /// What its IOMMU shows the device, if it has one. On Xen with grants that is the grant table.
    pub domain: Option<Arc<Domain>>,
    /// On Xen with grants: what the host's IOMMU shows hardware that the guest was given, all of the guest's memory under
    /// the guest's own addresses.
    pub assigned: Option<Arc<Domain>>,
    /// Where the guest's frames are in the machine.
    pub frames: FrameTable<GuestFrames>,
    /// Where the device's accesses went.
    pub trace: Trace,
}

impl World {
    /// A machine of this kind, on which nothing has happened.
    pub fn new(platform: Platform) -> Self {
        let machine = Arc::new(Machine::new(platform));
        Self {
            domain: window(platform).map(|window| Arc::new(Domain::new(window))),
            assigned: (platform == Platform::XenGrants).then(|| Arc::new(assigned(&machine))),
            frames: FrameTable::new(GuestFrames(Arc::clone(&machine))),
            trace: Trace::default(),
            machine,
        }
    }

    /// What was stopped, by whatever there is that stops a device and says so.
    pub fn faults(&self) -> Option<Faults> {
        let all = [&self.domain, &self.assigned].into_iter().flatten().map(|domain| domain.faults());
        all.reduce(|mut all, Faults { total, latest }| {
            all.total += total;
            all.latest.extend(latest);
            all
        })
    }
}

fn assigned(machine: &Machine) -> Domain {
    let domain = Domain::default();
    for page in 0..OWN {
        let addr = (page * PAGE) as u64;
        let gpa = Gpa(machine.machine_addr(Gpa(addr)).expect("a page of the guest's"));
        let mapping = Mapping { addr: BusAddr(addr), gpa, len: PAGE as u64, permission: Permission::ReadWrite };
        domain.map_at(mapping).expect("pages, one after the other");
    }
    domain
}

/// The bus addresses that the platform's IOMMU hands out, where it has one.
fn window(platform: Platform) -> Option<Window> {
    match platform {
        // Xen's IOMMU, where the machine has one, is the hypervisor's business: a guest's devices get machine addresses.
        Platform::X86 | Platform::Arm64 | Platform::Xen => None,
        // References are handed out by whoever grants.
        Platform::XenGrants => Some(Window::HIGH),
        // Bus addresses lie among those of memory, as Linux hands them out below 4 GiB: taken for physical ones they
        // are somebody's.
        Platform::X86Iommu | Platform::Arm64Smmu => {
            Some(Window::new(BusAddr((OWN * PAGE) as u64), BusAddr((crate::ALL * PAGE - 1) as u64)))
        }
        // Far above all memory.
        Platform::PpcProposed | Platform::PpcToday => {
            Some(Window::new(BusAddr(0x0800_0000_0000_0000), BusAddr(0x0800_0000_0fff_ffff)))
        }
    }
}

/// Everything that was seen of a cell.
#[derive(Debug)]
pub struct Observation {
    /// How far the driver came.
    pub outcome: Outcome,
    /// What became of the flag.
    pub flag: Flag,
    /// The accesses of the device that were let through, but for those of the probes.
    pub touches: Vec<Touch>,
    /// What was recorded as stopped, if there is anything that stops and records, but for the probes.
    pub iommu: Option<Faults>,
    /// What the device itself complained of, but for the probes.
    pub complaints: Vec<String>,
    /// Whether the device reached what it must not. `None`: nobody tried, as nothing worked.
    pub probes: Option<Probes>,
    /// Bytes that changed and were lent to nobody.
    pub damage: Vec<Damage>,
    /// What the disk holds in the end, read in another machine.
    pub disk: Content,
}

/// How far the driver came.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It wrote, and read the same back.
    Done,
    /// It refused the device.
    RefusedByDriver(Refusal),
    /// The device refused it.
    RefusedByDevice(Refusal),
    /// It was told, or found out, that something failed.
    Failed(String),
    /// All seemed well, and the bytes were wrong.
    WrongData {
        /// Which byte of the transfer.
        at: usize,
        /// What was written there.
        expected: u8,
        /// What came back.
        found: u8,
    },
}

/// What became of the flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
    /// The device did not offer it.
    NotOffered,
    /// The driver took it.
    Taken,
    /// It was offered, and the driver did not take it.
    NotTaken,
}

/// What became of pages that the device was made to write to, and must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probes {
    /// One that was lent for reading.
    pub forbidden: Probe,
    /// One that was lent for writing, and is not any more.
    pub returned: Probe,
}

/// What became of such a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// The write was stopped, and this recorded.
    Stopped(Fault),
    /// It was written, or nobody noticed.
    Reached,
}

/// What a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What the driver wrote, where it wrote it, and nothing else.
    Written,
    /// What it held before: nothing.
    Untouched,
    /// Something else.
    Wrong {
        /// The first byte that is.
        at: usize,
    },
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Written => f.write_str("what was written, and nothing else"),
            Content::Untouched => f.write_str("nothing, as before"),
            Content::Wrong { at } => write!(f, "something else from byte {at:#x} on"),
        }
    }
}

/// What the driver writes: more than a page, to sector 3.
const LEN: usize = PAGE + 512;
const SECTOR: u64 = 3;
const CAPACITY: usize = 4 * PAGE;

/// Turns of the device that may come to nothing before the driver gives up. It answers in the first, or never.
const PATIENCE: u32 = 8;

/// The rings of the proposal's time.
const RINGS: Rules = Rules { format: Format::Split, notifications: Notifications::Flags, indirect: Indirect::Allowed };
const QUEUE_SIZE: u16 = 16;

const VENDOR: u32 = 0x1af4;
const SLOT: u64 = 0x18;

/// Runs one cell, in a world of its own.
pub fn observe(case: Case, parts: &dyn Parts) -> Observation {
    let world = World::new(case.platform);
    let storage: Arc<dyn Storage> = Arc::new(MemoryDisk::new(CAPACITY as u64, false).expect("some pages of memory"));
    let complaints = Complaints::default();
    let agreed = Agreed::default();
    let slot = Socket {
        bus: Mutex::new(Some(parts.bus(case, &world))),
        agreed: agreed.clone(),
        complaints: complaints.clone(),
    };
    let mode = parts.mode(case);
    let process = (case.device == DeviceKind::Wrapped).then(|| Plain::serve(disk(&storage)));
    let device = process.as_ref().map_or_else(|| disk(&storage), Plain::wrapped);
    let mut transport = Embedded::new(Attached::new(device, slot, RINGS, QUEUE_SIZE), mode).with_patience(PATIENCE);

    let buffers = Buffers::new(&world.machine);
    let allowed = [allow(case)];
    let mut run = Run { complaints: &complaints, outcome: Outcome::Done, before_probes: None, probes: None };
    match parts.dma_api(case, &world) {
        Ok(translated) => {
            let policy = parts.policy(case, &allowed);
            if let Err(error) = run.drive(case, policy, &world, &buffers, &*translated, &mut transport) {
                run.outcome = not_started(error, transport.accepted());
            }
        }
        Err(error) => run.outcome = Outcome::Failed(format!("no DMA API: {error}")),
    }

    let taken = *agreed.lock().unwrap_or_else(PoisonError::into_inner) == Some(Addressing::Translated);
    let flag = match (mode.offers(0) != 0, taken) {
        (false, _) => Flag::NotOffered,
        (true, true) => Flag::Taken,
        (true, false) => Flag::NotTaken,
    };
    drop(transport);
    let Seen { touches, iommu, complaints } = run.before_probes.unwrap_or_else(|| Seen::now(&world, &complaints));
    Observation {
        outcome: run.outcome,
        flag,
        touches,
        iommu,
        complaints,
        probes: run.probes,
        damage: world.machine.damage(&buffers.lent),
        disk: content(&storage),
    }
}

/// What has been seen at some time.
struct Seen {
    touches: Vec<Touch>,
    iommu: Option<Faults>,
    complaints: Vec<String>,
}

impl Seen {
    fn now(world: &World, complaints: &Complaints) -> Self {
        Self { touches: world.trace.touches(), iommu: world.faults(), complaints: complaints.all() }
    }
}

/// The driver's buffers: neither at the start of pages nor next to each other, so that there are canaries around them.
struct Buffers<'m> {
    from: Buffer<'m>,
    into: Buffer<'m>,
    read_only: Buffer<'m>,
    returned: Buffer<'m>,
    /// These, and the pools.
    lent: [Buffer<'m>; 6],
}

impl<'m> Buffers<'m> {
    fn new(machine: &'m Machine) -> Self {
        let all = machine.buffer(Area::BUFFERS);
        let (from, into) = (all.sub(0x234, LEN), all.sub(3 * PAGE + 0x6ac, LEN));
        let (read_only, returned) = (all.sub(6 * PAGE + 0x200, 512), all.sub(7 * PAGE + 0x400, 512));
        let lent = [from, into, read_only, returned, machine.buffer(Area::RINGS), machine.buffer(Area::BOUNCE)];
        Self { from, into, read_only, returned, lent }
    }
}

/// What the driver puts on the disk.
fn pattern() -> Vec<u8> {
    (0..LEN).map(|at| (at * 7 + at / 251 + 1) as u8).collect()
}

struct Run<'c> {
    complaints: &'c Complaints,
    outcome: Outcome,
    before_probes: Option<Seen>,
    probes: Option<Probes>,
}

impl Run<'_> {
    fn drive<'w>(
        &mut self,
        case: Case,
        policy: DriverPolicy<'_>,
        world: &'w World,
        buffers: &Buffers<'w>,
        dma_api: &dyn Mapper,
        transport: &mut Embedded<Attached<Socket>>,
    ) -> Result<(), StartError<EmbeddedError>> {
        let direct = Direct::new(world.machine.buffer(Area::RINGS));
        let physical = Traps { inner: &direct, read_only: buffers.read_only, returned: buffers.returned };
        let translated = Traps { inner: dma_api, ..physical };
        let host = Host { platform: case.platform, policy, physical: Some(&physical), translated: Some(&translated) };
        let mut disk = Blk::start(transport, host, Options { depth: QUEUE_SIZE, segments: 4 })?;
        self.outcome = transfer(&mut disk, buffers);
        self.before_probes = Some(Seen::now(world, self.complaints));
        if self.outcome == Outcome::Done {
            self.probes = Some(Probes {
                forbidden: probe(&mut disk, world, buffers.read_only),
                returned: probe(&mut disk, world, buffers.returned),
            });
        }
        Ok(())
    }
}

/// `accepted` is what the device made of the driver's features.
fn not_started(error: StartError<EmbeddedError>, accepted: Option<Result<Addressing, Refusal>>) -> Outcome {
    match (error, accepted) {
        (StartError::Refused(refusal), _) => Outcome::RefusedByDriver(refusal),
        (StartError::FeaturesRefused { .. }, Some(Err(refusal))) => Outcome::RefusedByDevice(refusal),
        (error, _) => Outcome::Failed(error.to_string()),
    }
}

type Driver<'d, 'm> = Blk<'m, &'d mut Embedded<Attached<Socket>>, Traps<'m>>;

/// Writes, reads back, and compares.
fn transfer<'m>(disk: &mut Driver<'_, 'm>, buffers: &Buffers<'m>) -> Outcome {
    let failed = |what: &str, error: BlkError<EmbeddedError>| Outcome::Failed(format!("{what}: {error}"));
    let pattern = pattern();
    buffers.from.memory().write(0, &pattern);
    if let Err(error) = disk.write(SECTOR, &[buffers.from]) {
        return failed("write", error);
    }
    if let Err(error) = disk.flush() {
        return failed("flush", error);
    }
    if let Err(error) = disk.read(SECTOR, &[buffers.into]) {
        return failed("read", error);
    }
    // What was written must not have been changed by that either.
    let wrong = [buffers.into, buffers.from].into_iter().find_map(|buffer| {
        let mut found = vec![0; LEN];
        buffer.memory().read(0, &mut found);
        let at = (0..LEN).find(|&at| found[at] != pattern[at])?;
        Some(Outcome::WrongData { at, expected: pattern[at], found: found[at] })
    });
    wrong.unwrap_or(Outcome::Done)
}

/// Has the device write where it must not.
fn probe<'m>(disk: &mut Driver<'_, 'm>, world: &World, trap: Buffer<'m>) -> Probe {
    let memory = trap.memory();
    let bytes = || {
        let mut bytes = [0; 512];
        memory.read(0, &mut bytes);
        bytes
    };
    let before = bytes();
    let total = world.faults().unwrap_or_default().total;
    let failed = disk.read(SECTOR, &[trap]).is_err();
    let after = world.faults().unwrap_or_default();
    match after.latest.last() {
        Some(&fault) if failed && after.total > total && bytes() == before => Probe::Stopped(fault),
        _ => Probe::Reached,
    }
}

/// What an operator writes who knows the device: hardware is behind the IOMMU, an old emulated device goes past it. On
/// Xen either needs the machine's addresses; with grants, the guest's.
fn allow(case: Case) -> Allow {
    let addressing = match case.device {
        _ if case.platform == Platform::XenGrants => Addressing::Physical,
        DeviceKind::OldEmulated if case.platform != Platform::Xen => Addressing::Physical,
        _ => Addressing::Translated,
    };
    Allow { vendor: VENDOR, device: 2, slot: Some(SLOT), addressing }
}

/// Reads the whole disk in another machine, which has nothing that could translate.
fn content(storage: &Arc<dyn Storage>) -> Content {
    let world = World::new(Platform::X86);
    let bus = Bus::plain(&world.machine, &world.trace);
    let slot = Socket { bus: Mutex::new(Some(bus)), agreed: Agreed::default(), complaints: Complaints::default() };
    let attached = Attached::new(disk(storage), slot, RINGS, QUEUE_SIZE);
    let transport = Embedded::new(attached, IommuMode::Off).with_patience(PATIENCE);
    let direct = Direct::new(world.machine.buffer(Area::RINGS));
    let host = Host { platform: Platform::X86, policy: DriverPolicy::Old, physical: Some(&direct), translated: None };
    let into = world.machine.buffer(Area::BUFFERS).sub(0, CAPACITY);
    let mut disk = Blk::start(transport, host, Options { depth: QUEUE_SIZE, segments: 4 }).expect("a plain machine");
    disk.read(0, &[into]).expect("a plain machine");
    let mut found = vec![0; CAPACITY];
    into.memory().read(0, &mut found);

    let mut written = vec![0; CAPACITY];
    written[SECTOR as usize * 512..][..LEN].copy_from_slice(&pattern());
    match found.iter().zip(&written).position(|(found, written)| found != written) {
        None => Content::Written,
        Some(_) if found.iter().all(|&byte| byte == 0) => Content::Untouched,
        Some(at) => Content::Wrong { at },
    }
}

fn disk(storage: &Arc<dyn Storage>) -> Arc<dyn Device> {
    let options = blk::Options { queues: 1, queue_size: QUEUE_SIZE, serial: "matrix".into() };
    Arc::new(Disk::new(Arc::clone(storage), options))
}

/// The slot of a world. It has one queue's way to memory to give away.
struct Socket {
    bus: Mutex<Option<Bus>>,
    agreed: Agreed,
    complaints: Complaints,
}

impl Slot for Socket {
    type Memory = Bus;

    fn vendor(&self) -> u32 {
        VENDOR
    }

    fn number(&self) -> u64 {
        SLOT
    }

    /// Where the slot is decides, and not what was agreed on: a device can't talk itself out of hardware.
    fn memory(&self, addressing: Addressing) -> Bus {
        *self.agreed.lock().unwrap_or_else(PoisonError::into_inner) = Some(addressing);
        self.bus.lock().unwrap_or_else(PoisonError::into_inner).take().expect("a disk of one queue that starts once")
    }

    fn report(&self) -> Box<dyn Report> {
        Box::new(self.complaints.clone())
    }

    fn halted(&self, queue: u16, why: Halt) {
        self.complaints.add(format!("queue {queue} stopped: {why}"));
    }
}

/// What the negotiation ended with, once a queue was started: a reset forgets it.
type Agreed = Arc<Mutex<Option<Addressing>>>;

/// What a device had to complain of.
#[derive(Clone, Debug, Default)]
struct Complaints(Arc<Mutex<Vec<String>>>);

impl Complaints {
    fn add(&self, complaint: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(complaint);
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Report for Complaints {
    fn fault(&mut self, fault: Fault) {
        self.add(format!("not let through: {fault}"));
    }
}

/// A mapper that lends two buffers otherwise than it is asked to: traps for a device that oversteps.
struct Traps<'a> {
    inner: &'a dyn Mapper,
    /// Lent for reading alone.
    read_only: Buffer<'a>,
    /// Lent, and taken back at once: the device gets an address that is none any more.
    returned: Buffer<'a>,
}

impl Traps<'_> {
    fn permission(&self, buffer: Buffer<'_>, asked: Permission) -> Permission {
        if buffer.physical() == self.read_only.physical() { Permission::ReadOnly } else { asked }
    }

    fn is_returned(&self, buffer: Buffer<'_>) -> bool {
        buffer.physical() == self.returned.physical()
    }
}

impl Mapper for Traps<'_> {
    fn max_len(&self) -> usize {
        self.inner.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        let permission = self.permission(buffer, permission);
        let mapped = self.inner.map(buffer, permission)?;
        if !self.is_returned(buffer) {
            return Ok(mapped);
        }
        let stale = Mapped { cookie: 0, ..mapped };
        self.inner.unmap(mapped, buffer, permission);
        Ok(stale)
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        if !self.is_returned(buffer) {
            self.inner.unmap(mapped, buffer, self.permission(buffer, permission));
        }
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.inner.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.inner.free(mapped);
    }
}
