//! The back-end's side of one connection: what each message does. Knows no socket; [`crate::server`] has it.

use crate::backend::Backend;
use crate::faults::Limit;
pub use crate::keep::{Keep, UnknownKeep};
use crate::keep::{Trust, Verdict};
use crate::vring::{self, Start, StartError, Vring};
use crate::wire::{
    Enable, F_PROTOCOL_FEATURES, FrontendCode, Invalidated, Iotlb as IotlbEntry, ProtocolFeatures, Reply, Request,
    VringAddr, VringFd,
};
use ringfence_device::Device;
use ringfence_device::worker::VISIT;
use ringfence_dma::{BusAddr, FrontendVa, HostSlice, Permission};
use ringfence_hostmem::{MAX_REGIONS, MapError, Placement, Regions};
use ringfence_iotlb::{self as iotlb, Fence, Iotlb, LOST_PATIENCE, Refused, Replies, Unmapped};
use ringfence_policy::{Addressing, IommuMode, Refusal};
use ringfence_ring::{Format, Indirect, Notifications, Rules};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bits of rings and of the standard's version 1, which this session adds to a device's own.
pub mod bits {
    use virtio_spec::F;

    /// The device keeps to the standard (§6).
    pub const VERSION_1: u64 = F::VERSION_1.bits().to_ne() as u64;
    /// Descriptors may be in tables (§2.7.5.3, §2.8.7).
    pub const INDIRECT_DESC: u64 = F::INDIRECT_DESC.bits().to_ne() as u64;
    /// Each side says from which entry on it wants to be told (§2.7.7, §2.8.10).
    pub const EVENT_IDX: u64 = F::EVENT_IDX.bits().to_ne() as u64;
    /// Rings are packed (§2.8).
    pub const RING_PACKED: u64 = F::RING_PACKED.bits().to_ne() as u64;
}

/// The format of the rings of a driver that took `features`.
pub(crate) fn format_of(features: u64) -> Format {
    if features & bits::RING_PACKED == 0 { Format::Split } else { Format::Packed }
}

/// What a driver that took `features` and its device keep to in their rings.
pub fn rules_of(features: u64) -> Rules {
    let has = |bit: u64| features & bit != 0;
    Rules {
        format: format_of(features),
        notifications: if has(bits::EVENT_IDX) { Notifications::EventIdx } else { Notifications::Flags },
        indirect: if has(bits::INDIRECT_DESC) { Indirect::Allowed } else { Indirect::Refused },
    }
}

/// What of vhost-user itself is offered. Inflight tracking is not: requests that are under way end before a queue stops.
const PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// How long a fence is waited for. A visit takes microseconds; one that takes longer waits for memory that does not answer,
/// or for a busy host to let a thread run.
const FENCE_PATIENCE: Duration = Duration::from_secs(10);

/// What an operator decides about a device.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What to do about the IOMMU.
    pub iommu: IommuMode,
    /// How long translations are kept.
    pub keep: Keep,
    /// The longest queue that a driver may set up.
    pub queue_size: u16,
    /// For how long an empty queue is looked at before its thread sleeps.
    pub poll: Duration,
    /// For how long storage that does not answer may keep the front-end waiting for a queue to stop.
    pub io_timeout: Duration,
}

/// The back-end's side of one connection.
pub struct Session {
    device: Arc<dyn Device>,
    options: Options,
    protocol: ProtocolFeatures,
    negotiated: Option<Negotiated>,
    // Before the memory that its translations point to: a field is dropped before those below it.
    iotlb: Option<Arc<Iotlb>>,
    regions: Regions,
    trust: Trust,
    /// For the line that tells of a start: a guest can start its device as often as it likes.
    starts: Limit,
    backend: Arc<Backend>,
    vrings: Vec<Vring>,
    status: u8,
    /// Becomes readable when nobody has time any more.
    hurry: Option<OwnedFd>,
    /// A queue had to stop without its storage, and none has started since: a front-end that stops one queue after the
    /// other waits for that once.
    storage_hangs: bool,
    /// All of guest memory was taken away from the device, because it did not answer.
    memory_gone: Cell<bool>,
    /// Accesses that were not let through.
    faults: Arc<AtomicU64>,
    /// What was counted by translation caches that are gone, and by this session itself.
    past: Counted,
}

/// What the driver took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Negotiated {
    features: u64,
    addressing: Addressing,
}

/// What a connection came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Translations asked for.
    pub misses: u64,
    /// Translations given.
    pub updates: u64,
    /// Ranges taken away.
    pub invalidations: u64,
    /// Accesses that were not let through.
    pub faults: u64,
}

impl Counted {
    fn add(&mut self, seen: &iotlb::Statistics) {
        // Updates and invalidations are counted as messages: the cache also counts what the session does by itself.
        self.misses += seen.misses;
    }
}

/// What a message could not have.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The driver, or the front-end for it, did not take what it must.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// Protocol features that were never offered.
    #[error("protocol features {0:#x} were never offered")]
    Protocol(u64),
    /// A queue that is not there.
    #[error("queue {index} of {queues}")]
    Queue {
        /// The one that was named.
        index: u32,
        /// How many there are.
        queues: usize,
    },
    /// A queue of a size that no queue has.
    #[error("queue size {size}, the limit is {max}")]
    QueueSize {
        /// What was asked for.
        size: u32,
        /// The most there can be.
        max: u16,
    },
    /// A message that means nothing now.
    #[error("{message} before {missing}")]
    TooEarly {
        /// The message's name.
        message: FrontendCode,
        /// What has to come first.
        missing: &'static str,
    },
    /// Guest memory that can't be had.
    #[error("guest memory: {0}")]
    Memory(#[from] MapError),
    /// The front-end cut a file short that holds guest memory.
    #[error("guest memory is gone: the front-end cut its file short")]
    MemoryLost,
    /// An address of the front-end that is in none of the regions.
    #[error("front-end address {addr} (+{size:#x}) is not in the memory table")]
    Outside {
        /// Where.
        addr: FrontendVa,
        /// How many bytes.
        size: u64,
    },
    /// The flag was taken by a front-end that can't translate.
    #[error(
        "the IOMMU flag was taken, but the front-end gave no back-end channel (SET_BACKEND_REQ_FD) to ask for \
         translations on: a front-end without IOTLB support must not take the flag; use --iommu off for it"
    )]
    NoChannel,
    /// A translation that can't be kept.
    #[error("{0}")]
    Translation(#[from] Refused),
    /// Another back-end channel while questions are under way on the one there is.
    #[error("SET_BACKEND_REQ_FD while queues ask for translations on the channel there is")]
    ChannelInUse,
    /// Translations where nothing is translated.
    #[error("IOTLB_MSG from a front-end that did not take the IOMMU flag")]
    NotTranslated,
    /// A queue that has all it needs and does not start.
    #[error("queue {index}: {error}")]
    Start {
        /// Which.
        index: usize,
        /// Why not.
        error: StartError,
    },
    /// A message of a protocol feature that was not offered.
    #[error("{0} belongs to a protocol feature that was not offered")]
    NotOffered(FrontendCode),
    /// The device itself said no.
    #[error("the device refuses {message}: {error}")]
    Device {
        /// What it refuses.
        message: FrontendCode,
        /// Why.
        error: io::Error,
    },
    /// The host is short of something.
    #[error("{0}")]
    Resources(#[from] io::Error),
}

impl SessionError {
    /// What follows for the connection.
    pub fn severity(&self) -> Severity {
        match self {
            SessionError::Refused(_) | SessionError::NoChannel | SessionError::MemoryLost => Severity::Fatal,
            SessionError::Outside { .. }
            | SessionError::NotTranslated
            | SessionError::Translation(_)
            | SessionError::Start { .. } => Severity::Minor,
            _ => Severity::Tell,
        }
    }
}

/// What a message that could not be carried out means for its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It goes on: a guest can cause this, or it concerns one entry alone.
    Minor,
    /// It goes on if the front-end asked to be told. One that was not told would be wrong about all that follows.
    Tell,
    /// It ends.
    Fatal,
}

type Answer = Result<Option<Reply>, SessionError>;

impl Session {
    /// A session with nothing negotiated.
    pub fn new(device: Arc<dyn Device>, options: Options) -> Self {
        let vrings = (0..device.queues()).map(|_| Vring::new()).collect();
        let backend = Arc::<Backend>::default();
        device.watch_config(Box::new({
            let backend = Arc::clone(&backend);
            move || backend.config_changed()
        }));
        Self {
            device,
            options,
            protocol: ProtocolFeatures::empty(),
            negotiated: None,
            iotlb: None,
            regions: Regions::default(),
            trust: Trust::new(),
            starts: Limit::new(),
            backend,
            vrings,
            status: 0,
            hurry: None,
            storage_hangs: false,
            memory_gone: Cell::new(false),
            faults: Arc::default(),
            past: Counted::default(),
        }
    }

    /// Once `end` is readable, storage that does not answer is hardly waited for.
    pub fn hurry_on(&mut self, end: OwnedFd) {
        self.hurry = Some(end);
    }

    /// Does what a message says. The answer is what the message itself has; an acknowledgement that was asked for
    /// besides is the caller's.
    ///
    /// # Errors
    /// What could not be had, for a negative acknowledgement and the log.
    pub fn handle(&mut self, request: Request) -> Answer {
        match request {
            Request::GetFeatures => Ok(Some(Reply::U64(self.offered() | F_PROTOCOL_FEATURES))),
            Request::SetFeatures(features) => self.set_features(features),
            Request::GetProtocolFeatures => Ok(Some(Reply::U64(self.offered_protocol().bits()))),
            Request::SetProtocolFeatures(features) => self.set_protocol_features(features),
            Request::SetOwner => Ok(None),
            Request::ResetOwner | Request::ResetDevice => self.reset(),
            Request::GetStatus => Ok(Some(Reply::U64(self.status.into()))),
            Request::SetStatus(status) => self.set_status(status),
            Request::GetQueueNum => Ok(Some(Reply::U64(self.device.queue_groups().into()))),
            Request::GetConfig { offset, size, flags } => Ok(Some(self.config(offset, size, flags))),
            Request::SetConfig { offset, data, .. } => self.set_config(offset, &data),
            Request::GetMaxMemSlots => Ok(Some(Reply::U64(MAX_REGIONS as u64))),
            Request::SetMemTable(regions) => self.set_mem_table(regions),
            Request::AddMemReg(placement, fd) => self.add_region(placement, fd),
            Request::RemMemReg(placement) => self.remove_region(placement),
            Request::SetVringNum { index, num } => self.set_vring_num(index, num),
            Request::SetVringAddr(addresses) => self.set_vring_addr(addresses),
            Request::SetVringBase { index, base } => self.set_vring_base(index, base),
            Request::GetVringBase { index } => self.stop_vring(index),
            Request::SetVringKick(VringFd { index, fd }) => self.set_vring_kick(index, fd),
            Request::SetVringCall(VringFd { index, fd }) => self.set_vring_fd(index, fd, Vring::set_call),
            Request::SetVringErr(VringFd { index, fd }) => self.set_vring_fd(index, fd, Vring::set_error),
            Request::SetVringEnable { index, enable } => self.enable_vring(index, enable),
            Request::IotlbMsg(entry) => self.iotlb_message(entry),
            // The channel is a socket, which the server has taken out of the message.
            Request::SetBackendReqFd(_) => Ok(None),
            request @ (Request::SetLogBase { .. }
            | Request::SetLogFd(_)
            | Request::SendRarp(_)
            | Request::NetSetMtu(_)
            | Request::SetVringEndian { .. }
            | Request::GetInflightFd(_)
            | Request::SetInflightFd(..)
            | Request::VringKick { .. }) => Err(SessionError::NotOffered(request.code())),
        }
    }

    /// Whether guest memory has gone from under us: a file that was cut short. It reads as zeroes since, so whatever
    /// goes on would go on with wrong bytes.
    ///
    /// # Errors
    /// [`SessionError::MemoryLost`].
    pub fn check_memory(&self) -> Result<(), SessionError> {
        if self.regions.is_lost() { Err(SessionError::MemoryLost) } else { Ok(()) }
    }

    /// Whether a queue runs that can't go on without asking the front-end.
    pub(crate) fn needs_channel(&self) -> bool {
        let translated = matches!(self.negotiated, Some(Negotiated { addressing: Addressing::Translated, .. }));
        translated && self.vrings.iter().any(Vring::is_running)
    }

    /// Whether acknowledgements were negotiated.
    pub fn acknowledges(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::REPLY_ACK)
    }

    /// The way to the front-end.
    pub(crate) fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// The front-end answered the oldest question that it had not.
    pub(crate) fn answered(&self, granted: bool) {
        if let Some(iotlb) = &self.iotlb
            && let Err(error) = iotlb.answered(granted)
        {
            tracing::debug!("{error}");
        }
    }

    /// What the connection has come to.
    pub fn counted(&self) -> Counted {
        let mut counted = self.past;
        counted.faults = self.faults.load(Ordering::Relaxed);
        if let Some(iotlb) = &self.iotlb {
            counted.add(&iotlb.statistics());
        }
        counted
    }

    fn offered(&self) -> u64 {
        let rings = bits::VERSION_1 | bits::INDIRECT_DESC | bits::EVENT_IDX | bits::RING_PACKED;
        self.options.iommu.offers(self.device.features() | rings)
    }

    fn set_features(&mut self, features: u64) -> Answer {
        let features_of_driver = features & !F_PROTOCOL_FEATURES;
        let accepted = self.options.iommu.accept(self.offered(), features_of_driver);
        let addressing = match accepted {
            Ok(addressing) => addressing,
            Err(refusal) => {
                // Whatever ran before runs on under nothing that was agreed.
                self.pause_all();
                self.negotiated = None;
                return Err(refusal.into());
            }
        };
        let negotiated = Negotiated { features: features_of_driver, addressing };
        if self.negotiated != Some(negotiated) {
            self.pause_all();
            self.negotiated = Some(negotiated);
            self.renew_iotlb();
            tracing::debug!(features = format_args!("{features_of_driver:#x}"), ?addressing, "features taken");
        }
        let taken = self.device.take(features_of_driver);
        taken.map_err(|error| SessionError::Device { message: FrontendCode::SetFeatures, error })?;
        if features & F_PROTOCOL_FEATURES == 0 {
            // Without protocol features there is no SET_VRING_ENABLE: rings start enabled.
            self.vrings.iter_mut().for_each(|vring| vring.enable = Enable::On);
        }
        Ok(None)
    }

    /// A device without a configuration space has its front-end make one.
    fn offered_protocol(&self) -> ProtocolFeatures {
        let config = if self.device.config().is_empty() { ProtocolFeatures::CONFIG } else { ProtocolFeatures::empty() };
        PROTOCOL_FEATURES - config
    }

    fn set_protocol_features(&mut self, features: ProtocolFeatures) -> Answer {
        let unknown = features.bits() & !self.offered_protocol().bits();
        if unknown != 0 {
            return Err(SessionError::Protocol(unknown));
        }
        if self.protocol != features {
            self.pause_all();
            self.protocol = features;
            self.backend.expect_answers(self.acknowledges());
            self.renew_iotlb();
        }
        Ok(None)
    }

    fn config(&self, offset: u32, size: u32, flags: u32) -> Reply {
        match self.device.read_config(offset, size) {
            Some(data) => Reply::Config { offset, flags, data },
            None => Reply::NoConfig,
        }
    }

    fn set_config(&mut self, offset: u32, data: &[u8]) -> Answer {
        let written = self.device.write_config(offset, data);
        written.map_err(|error| SessionError::Device { message: FrontendCode::SetConfig, error })?;
        Ok(None)
    }

    /// Status 0 resets a device (§2.1), but here it comes from a front-end, and QEMU sends it whenever it stops the device:
    /// when the guest resets it, and when the machine is paused, before GET_VRING_BASE (7.2) or after it (10.0). A queue
    /// that is only paused goes on with all that it had begun, so what tells the two apart is where it starts again. In
    /// both, no byte of memory moves from here on.
    fn set_status(&mut self, status: u8) -> Answer {
        self.status = status;
        if status == 0 {
            self.pause_all();
            self.vrings.iter_mut().for_each(|vring| {
                vring.stopped();
            });
        }
        self.device.set_status(status);
        Ok(None)
    }

    /// Has translations kept for as long as the front-end can be relied on, or as the operator says.
    fn keep_as_trusted(&self) {
        let keep = match self.options.keep {
            Keep::Cache => true,
            Keep::Request => false,
            Keep::Auto => matches!(self.trust.verdict(), Verdict::Keep | Verdict::Steady),
        };
        if let (Some(iotlb), Some(Negotiated { addressing: Addressing::Translated, .. })) =
            (&self.iotlb, self.negotiated)
        {
            iotlb.keep(keep);
        }
    }

    /// Takes in what the front-end has just shown of itself.
    fn learn(&mut self, what: impl FnOnce(&mut Trust)) {
        let before = self.trust.verdict();
        what(&mut self.trust);
        let now = self.trust.verdict();
        if before == now {
            return;
        }
        self.keep_as_trusted();
        match (now, self.options.keep) {
            (Verdict::Stale(iova), Keep::Auto | Keep::Request) => tracing::warn!(
                "the front-end gave bus address {iova} a new target and never took the old one away: no translation is \
                 kept beyond its request, as with --iotlb request, at the price of asking for each anew. QEMU before 8.1 needs \
                 intel-iommu,device-iotlb=on and the disk's ats=on, QEMU's amd-iommu never invalidates"
            ),
            (Verdict::Stale(iova), Keep::Cache) => tracing::error!(
                "the front-end gave bus address {iova} a new target and never took the old one away: with --iotlb cache \
                 that corrupts the guest's memory; use --iotlb auto or --iotlb request"
            ),
            (Verdict::Steady, Keep::Auto) => tracing::info!(
                "the front-end's translations have not changed for long, and it has taken none away: they are kept from now \
                 on. A guest that maps each request, in a VMM that never invalidates, needs --iotlb request"
            ),
            (verdict, _) => tracing::debug!(?verdict, "the front-end has shown how it treats translations"),
        }
    }

    /// A device reset (§2.4): rings stop, and nothing that they had begun goes on.
    fn reset(&mut self) -> Answer {
        self.status = 0;
        self.pause_all();
        let enable = if self.protocol.is_empty() { Enable::On } else { Enable::Off };
        for vring in &mut self.vrings {
            vring.reset();
            vring.enable = enable;
        }
        self.device.reset();
        Ok(None)
    }

    /// Stops all queues where they are, at the same time.
    fn pause_all(&mut self) {
        self.vrings.iter_mut().for_each(Vring::tell_pause);
        (0..self.vrings.len()).for_each(|index| self.pause(index));
    }

    /// Stops a queue where it is. When this returns it touches no memory any more.
    fn pause(&mut self, index: usize) {
        if self.storage_hangs || self.memory_gone.get() {
            self.vrings[index].expect_nothing();
        }
        let began = Instant::now();
        let hurry = self.hurry.as_ref().map(AsFd::as_fd);
        let visit = |gone| if gone { LOST_PATIENCE } else { VISIT };
        let mut gone = self.memory_gone.get();
        while self.vrings[index].pause(hurry, visit(gone)).is_err() {
            if gone {
                self.leave_memory_behind();
                self.vrings[index].leave();
                break;
            }
            gone = self.take_memory_away();
        }
        self.storage_hangs |= began.elapsed() >= self.options.io_timeout;
    }

    /// Waits until no byte moves any more on the strength of what was taken away.
    fn wait(&self, fence: Fence) {
        let gone = self.memory_gone.get();
        let patience = if gone { Duration::ZERO } else { FENCE_PATIENCE };
        let take_away = |stuck| {
            gone || {
                tracing::error!("the front-end waits for its own memory: {stuck}");
                self.take_memory_away()
            }
        };
        if fence.wait_or_take_away(patience, || self.is_in_a_hurry(), take_away).is_err() {
            self.leave_memory_behind();
        }
    }

    fn is_in_a_hurry(&self) -> bool {
        let Some(hurry) = &self.hurry else { return false };
        let mut fds = [PollFd::new(hurry, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// A thread of ours is stuck in guest memory: touching it takes as long as whoever is behind it takes. Then nobody
    /// has it any more: see [`Region::take_away`](ringfence_hostmem::Region::take_away). What was acknowledged is true,
    /// and the next message finds the memory lost, which ends the connection. `false`: the kernel does not let us, and there
    /// is nothing but to wait, for nobody may be told what is not true.
    fn take_memory_away(&self) -> bool {
        tracing::error!("guest memory does not answer, so it is taken away from the device, and the connection ends");
        let mut gone = true;
        for region in self.regions.iter() {
            if !region.take_away() {
                gone = false;
                tracing::error!(gpa = %region.gpa(), "the kernel does not let it be taken away");
            }
        }
        self.memory_gone.set(gone);
        gone
    }

    /// Not even that freed whoever is stuck. It is never unmapped, so that nothing else can be mapped there.
    fn leave_memory_behind(&self) {
        self.regions.iter().for_each(|region| std::mem::forget(Arc::clone(region)));
    }

    // Memory.

    fn set_mem_table(&mut self, table: Vec<(Placement, OwnedFd)>) -> Answer {
        let regions = Regions::new(table)?;
        self.change_memory(|session| {
            session.regions = regions;
            Ok(())
        })
    }

    fn add_region(&mut self, placement: Placement, fd: OwnedFd) -> Answer {
        self.change_memory(|session| Ok(session.regions.add(placement, fd)?))
    }

    fn remove_region(&mut self, placement: Placement) -> Answer {
        self.change_memory(|session| {
            session.regions.remove(&placement)?;
            Ok(())
        })
    }

    /// Changes the memory table while nothing touches memory. Translations that point into the old table are forgotten;
    /// those that are wanted again are asked for again.
    fn change_memory(&mut self, change: impl FnOnce(&mut Self) -> Result<(), SessionError>) -> Answer {
        // A queue that translates can run on: between here and the return nobody gives it a translation. It must, too:
        // one that starts anew looks at its ring without having been told to, and if the guest has just switched its
        // IOMMU on over a driver that is gone, that is a fault in the guest's log.
        let translated = matches!(self.negotiated, Some(Negotiated { addressing: Addressing::Translated, .. }));
        if !translated {
            self.pause_all();
        }
        self.forget_translations();
        let changed = change(self);
        self.preload();
        // Also those that did not run because their ring had gone: a region is changed by taking it out and putting it
        // in again. What keeps one from starting is no fault of this message.
        for index in 0..self.vrings.len() {
            if let Err(error) = self.start_if_ready(index) {
                tracing::warn!("the memory table has changed, and {error}");
            }
        }
        changed.map(|()| None)
    }

    // Translation.

    /// A translation cache for what has been negotiated, once enough has been.
    fn renew_iotlb(&mut self) {
        self.forget_translations();
        self.past = self.counted();
        self.iotlb = self.negotiated.map(|negotiated| {
            let unmapped = match negotiated.addressing {
                Addressing::Physical => Unmapped::Fault,
                Addressing::Translated => Unmapped::Ask(Arc::clone(&self.backend) as _),
            };
            let replies = if self.acknowledges() { Replies::Each } else { Replies::Never };
            Iotlb::new(unmapped, iotlb::Options { replies, ..Default::default() })
        });
        self.trust = Trust::new();
        self.keep_as_trusted();
        self.preload();
    }

    fn forget_translations(&self) {
        if let Some(iotlb) = &self.iotlb {
            self.wait(iotlb.clear());
        }
    }

    /// Without translation every bus address is guest-physical, and all of the guest's memory is in reach: the same
    /// table, filled once.
    fn preload(&self) {
        if let (Some(iotlb), Some(Negotiated { addressing: Addressing::Physical, .. })) = (&self.iotlb, self.negotiated)
        {
            for region in self.regions.iter() {
                self.map(iotlb, BusAddr(region.gpa().0), region.slice(), Permission::ReadWrite)
                    .expect("the table has room for every region");
            }
        }
    }

    fn iotlb_message(&mut self, entry: IotlbEntry) -> Answer {
        match entry {
            IotlbEntry::Update { .. } => self.past.updates += 1,
            IotlbEntry::Invalidate(_) => self.past.invalidations += 1,
        }
        let (Some(iotlb), Some(Negotiated { addressing: Addressing::Translated, .. })) = (&self.iotlb, self.negotiated)
        else {
            return Err(SessionError::NotTranslated);
        };
        let iotlb = Arc::clone(iotlb);
        match entry {
            IotlbEntry::Invalidate(range) => {
                let (first, last) = match range {
                    Invalidated::Everything => (BusAddr(0), BusAddr(u64::MAX)),
                    Invalidated::Range { first, last } => (first, last),
                };
                self.learn(|trust| trust.invalidated(first, last, |iova| iotlb.is_mapped(iova)));
                self.wait(iotlb.invalidate(first, last));
            }
            IotlbEntry::Update { iova, size, uaddr, perm } => {
                let pieces = self.regions.pieces(uaddr, size).ok_or(SessionError::Outside { addr: uaddr, size })?;
                // Of interest as long as it is not known how the front-end treats translations.
                let anew = self.trust.verdict() == Verdict::Open && !iotlb.is_mapped(iova);
                let mut at = iova;
                for piece in pieces {
                    self.map(&iotlb, at, piece, perm)?;
                    at = BusAddr(at.0.wrapping_add(piece.len() as u64));
                }
                self.learn(|trust| trust.updated(iova, uaddr, anew));
            }
        }
        Ok(None)
    }

    /// Puts memory of `self.regions` into the translation cache.
    fn map(&self, iotlb: &Iotlb, at: BusAddr, piece: HostSlice<'_>, perm: Permission) -> Result<(), Refused> {
        let last = at.last(piece.len() as u64).expect("a range that was checked whole does not wrap in parts");
        let start = NonNull::new(piece.as_ptr()).expect("memory is not at address 0");
        // SAFETY: `piece` is memory of `self.regions`. That stays mapped until the table of regions changes or goes,
        // which `change_memory` and `drop` do only after `forget_translations` has waited for the fence.
        let fence = unsafe { iotlb.update(at, last, start, perm) }?;
        // Nobody asked for silence about what was mapped there before; a front-end that remaps without an INVALIDATE
        // gets it all the same.
        self.wait(fence);
        Ok(())
    }

    // Queues.

    fn vring(&mut self, index: u32) -> Result<&mut Vring, SessionError> {
        let queues = self.vrings.len();
        self.vrings.get_mut(index as usize).ok_or(SessionError::Queue { index, queues })
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Answer {
        let max = self.options.queue_size;
        let size = u16::try_from(num).ok().filter(|size| (1..=max).contains(size));
        let size = size.ok_or(SessionError::QueueSize { size: num, max })?;
        self.vring(index)?;
        self.pause(index as usize);
        self.vring(index)?.set_size(size);
        self.start_if_ready(index as usize)
    }

    fn set_vring_addr(&mut self, addresses: VringAddr) -> Answer {
        self.vring(addresses.index)?;
        self.pause(addresses.index as usize);
        if self.vring(addresses.index)?.set_addresses(addresses) {
            // Another driver: it may sit behind another kind of IOMMU than the last, as a kernel does after firmware.
            self.trust = Trust::new();
            self.keep_as_trusted();
        }
        self.start_if_ready(addresses.index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Answer {
        self.vring(index)?;
        self.pause(index as usize);
        self.vring(index)?.set_base(base);
        self.start_if_ready(index as usize)
    }

    fn stop_vring(&mut self, index: u32) -> Answer {
        self.vring(index)?;
        self.pause(index as usize);
        let base = self.vring(index)?.stopped();
        Ok(Some(Reply::VringBase { index, base }))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<OwnedFd>) -> Answer {
        self.vring(index.into())?;
        self.pause(index.into());
        self.vring(index.into())?.set_kick(fd)?;
        self.start_if_ready(index.into())
    }

    fn set_vring_fd(
        &mut self,
        index: u8,
        fd: Option<OwnedFd>,
        set: fn(&mut Vring, Option<OwnedFd>) -> io::Result<()>,
    ) -> Answer {
        set(self.vring(index.into())?, fd)?;
        Ok(None)
    }

    fn enable_vring(&mut self, index: u32, enable: Enable) -> Answer {
        self.vring(index)?.enable = enable;
        if enable == Enable::Off {
            self.pause(index as usize);
        }
        self.start_if_ready(index as usize)
    }

    /// Starts a queue once its front-end has said everything about it, in whatever order.
    fn start_if_ready(&mut self, index: usize) -> Answer {
        let vring = &self.vrings[index];
        let (true, Some(addresses)) = (vring.is_ready(), vring.addresses()) else { return Ok(None) };
        let (Some(negotiated), Some(iotlb)) = (self.negotiated, &self.iotlb) else {
            return Err(SessionError::TooEarly {
                message: FrontendCode::SetVringKick,
                missing: FrontendCode::SetFeatures.name(),
            });
        };
        if negotiated.addressing == Addressing::Translated && !self.backend.is_connected() {
            return Err(SessionError::NoChannel);
        }
        let layout = vring::layout(vring.size(), self.bus_addresses(negotiated.addressing, &addresses)?);
        let with = Start {
            index: index as u16,
            device: &self.device,
            features: negotiated.features,
            rules: rules_of(negotiated.features),
            layout,
            iotlb,
            backend: &self.backend,
            poll: self.options.poll,
            patience: self.options.io_timeout,
            faults: &self.faults,
        };
        if index == 0 && self.starts.tell().is_some() {
            tracing::info!(
                addressing = ?negotiated.addressing,
                features = format_args!("{:#x}", negotiated.features),
                "the driver's queues run"
            );
        }
        self.vrings[index].start(&with).map_err(|error| SessionError::Start { index, error })?;
        self.storage_hangs = false;
        Ok(None)
    }

    /// A ring's addresses are bus addresses where the device translates; else they are the front-end's own, and what
    /// the driver's descriptors hold is guest-physical.
    fn bus_addresses(&self, addressing: Addressing, ring: &VringAddr) -> Result<[BusAddr; 3], SessionError> {
        let addresses = [ring.descriptor, ring.available, ring.used];
        match addressing {
            Addressing::Translated => Ok(addresses.map(BusAddr)),
            Addressing::Physical => {
                let mut bus = [BusAddr(0); 3];
                for (bus, addr) in bus.iter_mut().zip(addresses.map(FrontendVa)) {
                    let gpa = self.regions.gpa(addr).ok_or(SessionError::Outside { addr, size: 1 })?;
                    *bus = BusAddr(gpa.0);
                }
                Ok(bus)
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Queues first, so that nothing touches the memory that goes with the session.
        self.pause_all();
        self.forget_translations();
    }
}
