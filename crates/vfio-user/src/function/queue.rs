//! One queue: its registers, and its thread while it runs.

use super::common::Half;
use super::msix::Route;
use crate::bus::Bus;
use crate::event::Event;
use crate::memory::Memory;
use ringfence_device::Device;
use ringfence_device::queue::{Queue as Engine, Report, Stopped};
use ringfence_device::worker::{Bells, Control, Stuck, Worker};
use ringfence_dma::{BusAddr, Fault};
use ringfence_driver::pci::common::NO_VECTOR;
use ringfence_iotlb::Wake;
use ringfence_ring::{DeviceQueue, Layout, LayoutError, Position, RingArea, Rules};
use ringfence_vhost_user::Limit;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A queue.
pub(super) struct Queue {
    size: u16,
    pub(super) vector: u16,
    enable: Enable,
    addresses: [u64; 3],
    /// Rung by the driver. The same for as long as the client is there, who may have given it to its hypervisor.
    kick: Event,
    /// Where it tells of what it used.
    route: Route,
    worker: Option<Worker>,
    /// What it had begun when it was stopped and was not reset.
    stopped: Option<Stopped>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Enable {
    Off,
    On,
}

/// What a queue needs from its function in order to run.
pub(super) struct Start<'s> {
    pub(super) index: u16,
    pub(super) device: &'s Arc<dyn Device>,
    pub(super) features: u64,
    pub(super) rules: Rules,
    pub(super) memory: &'s Memory,
    pub(super) broken: &'s Arc<Event>,
    pub(super) poll: Duration,
    pub(super) patience: Duration,
    pub(super) faults: &'s Arc<AtomicU64>,
}

/// Why a queue that is enabled does not start.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("the ring that the driver set up is not one: {0}")]
    Layout(#[from] LayoutError),
    #[error("can't start: {0}")]
    Resources(#[from] io::Error),
}

impl Queue {
    pub(super) fn new(size: u16) -> io::Result<Self> {
        Ok(Self {
            size,
            vector: NO_VECTOR,
            enable: Enable::Off,
            addresses: [0; 3],
            kick: Event::shared()?,
            route: Route::Nowhere,
            worker: None,
            stopped: None,
        })
    }

    /// As after a reset. It does not run.
    pub(super) fn reset(&mut self, max: u16) {
        assert!(self.worker.is_none(), "a queue is stopped before it is reset");
        let Self { size, vector, enable, addresses, kick, route: _, worker: _, stopped } = self;
        (*size, *vector, *enable, *addresses, *stopped) = (max, NO_VECTOR, Enable::Off, [0; 3], None);
        kick.take();
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn addresses(&self) -> [u64; 3] {
        self.addresses
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enable == Enable::On
    }

    /// Enabled, and not running.
    pub(super) fn is_ready(&self) -> bool {
        self.is_enabled() && self.worker.is_none()
    }

    /// A size that there can't be changes nothing, as the driver can read. Nor does anything of a queue that is enabled.
    pub(super) fn set_size(&mut self, size: u16, max: u16) {
        if !self.is_enabled() && (1..=max).contains(&size) {
            self.size = size;
        }
    }

    pub(super) fn set_address(&mut self, area: usize, half: Half, value: u32) {
        if self.is_enabled() {
            return;
        }
        let address = &mut self.addresses[area];
        *address = match half {
            Half::Low => *address & !0xffff_ffff | u64::from(value),
            Half::High => *address & 0xffff_ffff | u64::from(value) << 32,
        };
    }

    pub(super) fn enable(&mut self) {
        self.enable = Enable::On;
    }

    pub(super) fn ring(&self) {
        self.kick.ring();
    }

    pub(super) fn kick(&self) -> io::Result<OwnedFd> {
        self.kick.try_clone()
    }

    pub(super) fn start(&mut self, with: &Start<'_>) -> Result<(), StartError> {
        assert!(self.worker.is_none(), "a queue that runs is stopped before it starts");
        let [descriptors, driver, device] = self.addresses.map(BusAddr);
        let layout = Layout { size: self.size, descriptors, driver, device };
        let start = Position::start(with.rules.format);
        let position = self.stopped.as_ref().map_or(start, |stopped| stopped.position);
        let ring = DeviceQueue::new(with.rules, layout, position)?;
        let handler = Arc::clone(with.device).open_queue(with.index, self.size, with.features)?;
        let control = Control::new(call(&self.route)?)?;
        let bells = Bells {
            kick: Some(self.kick.try_clone()?),
            error: Some(with.broken.try_clone()?),
            poll: with.poll,
            patience: with.patience,
        };
        let Start { memory, broken, .. } = *with;
        let view = memory.iotlb().view(Arc::new(Waker(Arc::clone(&control))));
        let rings = RingArea::ALL.map(|area| {
            let first = layout.addr(area).0;
            // It does not wrap: that was checked with the ring.
            (first, first.saturating_add(u64::from(area.len(with.rules.format, self.size)) - 1))
        });
        let bus = Bus::new(view, Arc::clone(memory.remote()), Arc::clone(memory.link()), Arc::clone(broken), rings);
        let report = FaultLog { queue: with.index, total: Arc::clone(with.faults), limit: Limit::new() };
        let stopped = self.stopped.take().unwrap_or_else(|| Stopped::at(position));
        let engine = Engine::new(ring, self.size, bus, handler, Box::new(report), stopped);
        let name = format!("{}-queue-{}", with.device.name(), with.index);
        self.worker = Some(Worker::start(&name, engine, control, bells)?);
        Ok(())
    }

    /// From now on it tells of what it used by `route`.
    pub(super) fn route(&mut self, route: Route, isr: &Arc<Event>) -> io::Result<()> {
        let route = match route {
            Route::Isr => Route::Event(Arc::clone(isr)),
            route => route,
        };
        let same = match (&self.route, &route) {
            (Route::Event(one), Route::Event(other)) => Arc::ptr_eq(one, other),
            (Route::Nowhere, Route::Nowhere) => true,
            _ => false,
        };
        if !same {
            if let Some(worker) = &self.worker {
                worker.control().set_call(call(&route)?);
            }
            self.route = route;
        }
        Ok(())
    }

    /// Has it begin to stop.
    pub(super) fn tell_stop(&mut self) {
        if let Some(worker) = &mut self.worker {
            worker.tell_stop();
        }
    }

    /// Returns when it touches no memory any more; it can go on from there.
    pub(super) fn stop(&mut self, hurry: BorrowedFd<'_>, visit: Duration) -> Result<(), Stuck> {
        let Some(worker) = &mut self.worker else { return Ok(()) };
        self.stopped = worker.stop(Some(hurry), visit)?;
        self.worker = None;
        if self.stopped.is_none() {
            // Where it was is lost, so it does not go on.
            self.enable = Enable::Off;
            tracing::error!("a queue's thread panicked: a bug of ringfence's; the driver has to reset its device");
        }
        Ok(())
    }

    /// Its thread is left to itself: it is stuck in memory that has been taken away, and is never unmapped.
    pub(super) fn leave(&mut self) {
        std::mem::forget(self.worker.take());
    }
}

fn call(route: &Route) -> io::Result<Option<OwnedFd>> {
    match route {
        Route::Event(event) => event.try_clone().map(Some),
        Route::Isr | Route::Nowhere => Ok(None),
    }
}

/// Wakes a queue's thread when translations arrive.
struct Waker(Arc<Control>);

impl Wake for Waker {
    fn wake(&self) {
        self.0.tell_news();
    }
}

/// Tells the log of a queue's faults, within reason.
struct FaultLog {
    queue: u16,
    total: Arc<AtomicU64>,
    limit: Limit,
}

impl Report for FaultLog {
    fn fault(&mut self, fault: Fault) {
        self.total.fetch_add(1, Ordering::Relaxed);
        if let Some(untold) = self.limit.tell() {
            tracing::warn!(queue = self.queue, untold, "fault: {fault}; the driver's request fails");
        }
    }
}
