use ringfence_device::queue::{Broken, Look, Queue, Report, Stopped};
use ringfence_device::{Device, Handler};
use ringfence_dma::Memory;
use ringfence_driver::embedded::DeviceEnd;
use ringfence_policy::{Addressing, Identity};
use ringfence_ring::{DeviceQueue, Format, Indirect, Layout, LayoutError, Notifications, Position, Rules};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::{fmt, io};
use virtio_spec::F;

/// Any [`Device`] as the end of an [`Embedded`](ringfence_driver::embedded::Embedded) transport: its queues are served
/// by the engine that serves them everywhere else, in turns that the driver's side asks for, without a thread.
pub struct Attached<S: Slot> {
    device: Arc<dyn Device>,
    slot: S,
    rules: Rules,
    max_queue_size: u16,
    queues: BTreeMap<u16, Queue<S::Memory>>,
}

/// Where a device is plugged in.
pub trait Slot {
    /// The device's way to memory.
    type Memory: Memory;

    /// Who made the device: see [`Identity::vendor`].
    fn vendor(&self) -> u32;

    /// Which place this is: see [`Identity::slot`].
    fn number(&self) -> u64;

    /// The way to memory for a queue that starts, after a negotiation that ended with `addressing`.
    fn memory(&self, addressing: Addressing) -> Self::Memory;

    /// Who is told of accesses that were not let through.
    fn report(&self) -> Box<dyn Report>;

    /// Queue `queue` does not go on, or did not start.
    fn halted(&self, queue: u16, why: Halt);
}

/// Why a queue does not run.
#[derive(Debug)]
pub enum Halt {
    /// The driver put it where no queue can be.
    Layout(LayoutError),
    /// The device lacks what it needs for a queue.
    Resources(io::Error),
    /// The ring is broken, or can't be reached.
    Broken(Broken),
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Halt::Layout(error) => write!(f, "no such queue can be: {error}"),
            Halt::Resources(error) => write!(f, "the device can't open a queue: {error}"),
            Halt::Broken(error) => error.fmt(f),
        }
    }
}

impl<S: Slot> Attached<S> {
    /// `device` in `slot`, with rings of up to `max_queue_size` entries that can do no more than `rules` say.
    pub fn new(device: Arc<dyn Device>, slot: S, rules: Rules, max_queue_size: u16) -> Self {
        Self { device, slot, rules, max_queue_size, queues: BTreeMap::new() }
    }

    /// Where the device is plugged in.
    pub fn slot(&self) -> &S {
        &self.slot
    }

    fn open(
        &self,
        index: u16,
        layout: &Layout,
        features: u64,
        addressing: Addressing,
    ) -> Result<Queue<S::Memory>, Halt> {
        let rules = rules(features);
        let start = Position::start(rules.format);
        let ring = DeviceQueue::new(rules, *layout, start).map_err(Halt::Layout)?;
        let handler: Box<dyn Handler> =
            Arc::clone(&self.device).open_queue(index, layout.size, features).map_err(Halt::Resources)?;
        let (memory, report) = (self.slot.memory(addressing), self.slot.report());
        let mut queue = Queue::new(ring, layout.size, memory, handler, report, Stopped::at(start));
        // The driver asks for turns: it need not ring. A worker's thread begins like this too.
        queue.ignore().map_err(Halt::Broken)?;
        Ok(queue)
    }
}

impl<S: Slot> DeviceEnd for Attached<S> {
    fn identity(&self) -> Identity {
        Identity { vendor: self.slot.vendor(), device: self.device.id().into(), slot: self.slot.number() }
    }

    fn features(&self) -> u64 {
        self.device.features() | ring_features(self.rules)
    }

    fn read_config(&self, offset: u32, into: &mut [u8]) {
        let config = self.device.config();
        let rest = config.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(into.len());
        into[..len].copy_from_slice(&rest[..len]);
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        if queue < self.device.queues() { self.max_queue_size } else { 0 }
    }

    /// A queue whose ring can't be reached counts as started: a driver learns that from its silence, as with hardware.
    fn start_queue(&mut self, queue: u16, layout: &Layout, features: u64, addressing: Addressing) -> bool {
        match self.open(queue, layout, features, addressing) {
            Ok(opened) => {
                self.queues.insert(queue, opened);
                true
            }
            Err(why) => {
                let started = matches!(why, Halt::Broken(_));
                self.slot.halted(queue, why);
                started
            }
        }
    }

    fn reset_queue(&mut self, queue: u16) {
        self.queues.remove(&queue);
    }

    fn turn(&mut self, queue: u16) -> bool {
        let Some(served) = self.queues.get_mut(&queue) else { return false };
        match turn(served) {
            Ok(worked) => worked,
            Err(broken) => {
                self.queues.remove(&queue);
                self.slot.halted(queue, Halt::Broken(broken));
                false
            }
        }
    }

    fn reset(&mut self) {
        // A queue that is dropped waits for what storage has under way.
        self.queues.clear();
    }
}

/// A turn; where that comes to nothing and the device has something under way, another one when that is done.
fn turn<M: Memory>(queue: &mut Queue<M>) -> Result<bool, Broken> {
    let turn = queue.turn(Look::Thorough)?;
    if turn.worked || queue.under_way() == 0 {
        return Ok(turn.worked);
    }
    if !queue.listen()?
        && let Some(done) = queue.completion_fd()
    {
        // Who waits in vain gives up as with a device that never answers.
        let _ = poll(&mut [PollFd::new(&done, PollFlags::IN)], Some(&ANSWER));
    }
    queue.ignore()?;
    queue.turn(Look::Thorough).map(|turn| turn.worked)
}

/// How long a device may take for a request.
const ANSWER: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// What a device offers that has rings of these rules, or of lesser ones.
fn ring_features(rules: Rules) -> u64 {
    let mut features = F::VERSION_1;
    features.set(F::RING_PACKED, rules.format == Format::Packed);
    features.set(F::EVENT_IDX, rules.notifications == Notifications::EventIdx);
    features.set(F::INDIRECT_DESC, rules.indirect == Indirect::Allowed);
    bits(features)
}

/// What a driver chose that took `features`.
fn rules(features: u64) -> Rules {
    let taken = |feature| features & bits(feature) != 0;
    Rules {
        format: if taken(F::RING_PACKED) { Format::Packed } else { Format::Split },
        notifications: if taken(F::EVENT_IDX) { Notifications::EventIdx } else { Notifications::Flags },
        indirect: if taken(F::INDIRECT_DESC) { Indirect::Allowed } else { Indirect::Refused },
    }
}

fn bits(features: F) -> u64 {
    features.bits().to_ne() as u64
}
