//! Memory of which any page can be missing or forbidden, and a ring in it.

use ringfence_device::Handler;
use ringfence_device::queue::{Queue, Report, Stopped};
use ringfence_dma::{
    Access, BusAddr, Fault, FaultReason, Gpa, HostSlice, Memory, Miss, Physical, Ram, Stop, Ticket, Visit,
};
use ringfence_ring::{DeviceQueue, DriverQueue, Layout, Position, RingCells, RingSlices, Rules};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

pub(crate) const SIZE: u16 = 8;
pub(crate) const PAGE: usize = 4096;
/// The pages behind those of the ring.
pub(crate) const REST: usize = 3;
const PAGES: usize = 8;

/// What comes of looking a page up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    Here,
    Missing,
    Forbidden,
}

/// Memory at bus address 0.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) ram: Arc<Ram>,
    pages: Arc<Mutex<[Page; PAGES]>>,
    rules: Rules,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(Rules::default())
    }

    /// One whose ring keeps to `rules`.
    pub(crate) fn with(rules: Rules) -> Self {
        Self { ram: Arc::new(Ram::new(PAGES * PAGE)), pages: Arc::new(Mutex::new([Page::Here; PAGES])), rules }
    }

    pub(crate) fn set(&self, page: usize, to: Page) {
        self.pages.lock().unwrap()[page] = to;
    }

    pub(crate) fn driver(&self) -> DriverQueue<RingCells<'_>> {
        let [descriptors, driver, device] = [0, 1, 2].map(|page| self.ram.slice(page * PAGE, PAGE));
        let slices = RingSlices { descriptors, driver, device };
        DriverQueue::new(self.rules, SIZE, RingCells::new(self.rules.format, SIZE, &slices)).unwrap()
    }

    /// A queue that goes on at `position`.
    pub(crate) fn queue(
        &self,
        handler: Box<dyn Handler>,
        report: Box<dyn Report>,
        stopped: Stopped,
        position: Position,
    ) -> Queue<World> {
        let [descriptors, driver, device] = [0, 1, 2].map(|page| BusAddr(page * PAGE as u64));
        let ring = DeviceQueue::new(self.rules, Layout { size: SIZE, descriptors, driver, device }, position);
        Queue::new(ring.unwrap(), SIZE, self.clone(), handler, report, stopped)
    }
}

impl Memory for World {
    type Lease = ();
    type Visit<'m> = Looking<'m>;

    fn visit(&mut self) -> Looking<'_> {
        Looking { world: self, tickets: AtomicUsize::new(0) }
    }
}

pub(crate) struct Looking<'m> {
    world: &'m World,
    tickets: AtomicUsize,
}

impl Visit for Looking<'_> {
    type Lease = ();

    fn resolve(&self, addr: BusAddr, len: usize, access: Access, _: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let page = addr.0 as usize / PAGE;
        let here = len.min(PAGE - addr.0 as usize % PAGE);
        match self.world.pages.lock().unwrap().get(page) {
            Some(Page::Here) => Ok(Physical::slice(&*self.world.ram, Gpa(addr.0), here).unwrap()),
            Some(Page::Missing) => {
                let ticket = Ticket(self.tickets.fetch_add(1, Ordering::Relaxed) as u64);
                Err(Stop::Miss(Miss { ticket, covers: here as u64 }))
            }
            Some(Page::Forbidden) | None => Err(Fault { addr, access, reason: FaultReason::Unmapped }.into()),
        }
    }

    fn lease(&self, _: &[(BusAddr, u32)]) {}
}
