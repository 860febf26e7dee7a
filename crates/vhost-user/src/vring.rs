use crate::backend::Backend;
use crate::faults::FaultReport;
use crate::wire::{Enable, VringAddr};
use ringfence_device::queue::{Queue, Stopped};
use ringfence_device::worker::{Bells, Control, Stuck, Worker};
use ringfence_device::{Device, eventfd};
use ringfence_dma::BusAddr;
use ringfence_iotlb::{Iotlb, Wake};
use ringfence_ring::{DeviceQueue, Format, Layout, LayoutError, Rules};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// One queue as its front-end set it up, and its thread while it runs.
pub(crate) struct Vring {
    size: u16,
    addresses: Option<VringAddr>,
    pub(crate) enable: Enable,
    /// As SET_VRING_BASE said, or where the queue was when it last stopped.
    base: u32,
    /// What a stopped queue had begun and the ring has not; good for as long as `base` is where it stopped.
    stopped: Option<Stopped>,
    /// The format of the ring when it last ran.
    format: Format,
    kick: Kick,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    worker: Option<Worker>,
}

/// Whether and how the driver rings.
#[derive(Debug)]
enum Kick {
    /// Not said yet: the queue is stopped.
    Unset,
    /// By this eventfd.
    Event(OwnedFd),
    /// Not at all: look.
    Poll,
}

/// What a queue needs from its session in order to run.
pub(crate) struct Start<'s> {
    pub(crate) index: u16,
    pub(crate) device: &'s Arc<dyn Device>,
    pub(crate) features: u64,
    pub(crate) rules: Rules,
    /// The addresses as the ring's memory knows them.
    pub(crate) layout: Layout,
    pub(crate) iotlb: &'s Arc<Iotlb>,
    pub(crate) backend: &'s Arc<Backend>,
    pub(crate) poll: Duration,
    pub(crate) patience: Duration,
    /// Counts accesses that were not let through.
    pub(crate) faults: &'s Arc<AtomicU64>,
}

/// Why a queue that has all it needs does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The driver's ring is not one.
    #[error("the ring that the driver set up is not one: {0}")]
    Layout(#[from] LayoutError),
    /// The host is short of something.
    #[error("can't start: {0}")]
    Resources(#[from] io::Error),
}

impl Vring {
    pub(crate) fn new() -> Self {
        Self {
            size: 0,
            addresses: None,
            enable: Enable::Off,
            base: 0,
            stopped: None,
            format: Format::Split,
            kick: Kick::Unset,
            call: None,
            error: None,
            worker: None,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.worker.is_some()
    }

    /// Whether the front-end has said all that the queue needs.
    pub(crate) fn is_ready(&self) -> bool {
        self.size > 0
            && self.addresses.is_some()
            && self.enable == Enable::On
            && !matches!(self.kick, Kick::Unset)
            && self.worker.is_none()
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn addresses(&self) -> Option<VringAddr> {
        self.addresses
    }

    /// SET_VRING_NUM. What a queue of another size had begun is another driver's.
    pub(crate) fn set_size(&mut self, size: u16) {
        if size != self.size {
            self.stopped = None;
        }
        self.size = size;
    }

    /// SET_VRING_ADDR; whether the ring was somewhere else. What that had begun is another driver's.
    pub(crate) fn set_addresses(&mut self, addresses: VringAddr) -> bool {
        let moved = self.addresses.replace(addresses) != Some(addresses);
        if moved {
            self.stopped = None;
        }
        moved
    }

    /// SET_VRING_BASE. What the queue had begun when it stopped goes on only if it goes on from there.
    pub(crate) fn set_base(&mut self, base: u32) {
        if base != self.base {
            self.stopped = None;
        }
        self.base = base;
    }

    pub(crate) fn set_kick(&mut self, fd: Option<OwnedFd>) -> io::Result<()> {
        self.kick = match fd {
            Some(fd) => Kick::Event(eventfd::of_stranger(fd)?),
            None => Kick::Poll,
        };
        Ok(())
    }

    pub(crate) fn set_call(&mut self, fd: Option<OwnedFd>) -> io::Result<()> {
        self.call = fd.map(eventfd::of_stranger).transpose()?;
        if let Some(worker) = &self.worker {
            worker.control().set_call(clone(&self.call)?);
            // What was used since the last one may have been told to nobody: a front-end may have let go of it before.
            worker.control().tell();
        }
        Ok(())
    }

    pub(crate) fn set_error(&mut self, fd: Option<OwnedFd>) -> io::Result<()> {
        self.error = fd.map(eventfd::of_stranger).transpose()?;
        Ok(())
    }

    pub(crate) fn start(&mut self, with: &Start<'_>) -> Result<(), StartError> {
        assert!(self.worker.is_none(), "a queue that runs is stopped before it starts");
        if self.format != with.rules.format {
            self.stopped = None;
        }
        self.format = with.rules.format;
        let ring = match &self.stopped {
            Some(stopped) => DeviceQueue::new(with.rules, with.layout, stopped.position)?,
            None => DeviceQueue::at_vring_base(with.rules, with.layout, self.base)?,
        };
        let handler = Arc::clone(with.device).open_queue(with.index, self.size, with.features)?;
        let control = Control::new(clone(&self.call)?)?;
        let kick = match &self.kick {
            Kick::Event(fd) => Some(fd.try_clone()?),
            Kick::Unset | Kick::Poll => None,
        };
        let bells = Bells { kick, error: clone(&self.error)?, poll: with.poll, patience: with.patience };
        let view = with.iotlb.view(Arc::new(Waker(Arc::clone(&control))));
        let report = Box::new(FaultReport::new(with.index, Arc::clone(with.backend), Arc::clone(with.faults)));
        // Not before all of that is there: what had been begun waits for the next try.
        let stopped = self.stopped.take().unwrap_or_else(|| Stopped::at(ring.position()));
        let queue = Queue::new(ring, self.size, view, handler, report, stopped);
        let name = format!("{}-queue-{}", with.device.name(), with.index);
        self.worker = Some(Worker::start(&name, queue, Arc::clone(&control), bells)?);
        // What was used before it began may have been told to nobody: by a back-end that died, say.
        control.tell();
        Ok(())
    }

    /// Has the queue begin to stop. See [`Vring::pause`].
    pub(crate) fn tell_pause(&mut self) {
        if let Some(worker) = &mut self.worker {
            worker.tell_stop();
        }
    }

    /// Storage is known to hang. See [`Vring::pause`].
    pub(crate) fn expect_nothing(&self) {
        if let Some(worker) = &self.worker {
            worker.expect_nothing();
        }
    }

    /// Stops the queue where it is, and returns when it touches no memory any more; it can go on from there.
    ///
    /// # Errors
    /// [`Stuck`]: it is stuck in the memory itself. May be called again.
    pub(crate) fn pause(&mut self, hurry: Option<BorrowedFd<'_>>, visit: Duration) -> Result<(), Stuck> {
        let Some(worker) = &mut self.worker else { return Ok(()) };
        let stopped = worker.stop(hurry, visit)?;
        self.worker = None;
        match stopped {
            Some(stopped) => {
                self.base = stopped.position.vring_base(self.format);
                // What is all in the ring is taken from there.
                self.stopped = Some(stopped).filter(Stopped::is_unfinished);
            }
            None => {
                // Where it was is lost, so it starts again only when a driver has set it up anew.
                self.addresses = None;
                tracing::error!("a queue's thread panicked: a bug of ringfence's; the guest has to reset its device");
            }
        }
        Ok(())
    }

    /// Its thread is left to itself: it is stuck in memory that has been taken away, and is never unmapped.
    pub(crate) fn leave(&mut self) {
        std::mem::forget(self.worker.take());
        self.addresses = None;
    }

    /// GET_VRING_BASE, once it is paused: the queue stays so until there is a kick again. The call stays: a front-end
    /// whose guest has masked its interrupt sends none before the guest unmasks it.
    pub(crate) fn stopped(&mut self) -> u32 {
        self.kick = Kick::Unset;
        self.base
    }

    /// The driver gave the device up: nothing is left of what it set up. It is paused.
    pub(crate) fn reset(&mut self) {
        assert!(self.worker.is_none(), "a queue is paused before it is reset");
        *self = Self::new();
    }
}

/// Wakes a queue's thread when translations arrive.
struct Waker(Arc<Control>);

impl Wake for Waker {
    fn wake(&self) {
        self.0.tell_news();
    }
}

fn clone(fd: &Option<OwnedFd>) -> io::Result<Option<OwnedFd>> {
    fd.as_ref().map(OwnedFd::try_clone).transpose()
}

/// The three addresses of a ring.
pub(crate) fn layout(size: u16, [descriptors, driver, device]: [BusAddr; 3]) -> Layout {
    Layout { size, descriptors, driver, device }
}
