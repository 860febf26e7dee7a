use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Memory, Miss, Physical, Ram, Stop, Ticket, Visit};
use ringfence_ring::{Format, Layout, RingArea, RingCells, RingSlices};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) const PAGE: usize = 4096;

/// How many pages there are: rings, then whatever else.
pub(crate) const PAGES: usize = 16;

/// Where a ring's areas begin.
const AREAS: [usize; 3] = [0, PAGE, 2 * PAGE];

/// Where memory begins that no ring is in.
pub(crate) const REST: usize = 3 * PAGE;

/// Memory at bus address 0, of which any page can be missing.
#[derive(Clone)]
pub(crate) struct Flat {
    ram: Arc<Ram>,
    /// A bit a page.
    missing: Arc<AtomicU32>,
    resolved: Arc<AtomicU32>,
}

impl Flat {
    pub(crate) fn new() -> Self {
        Self { ram: Arc::new(Ram::new(PAGES * PAGE)), missing: Arc::default(), resolved: Arc::default() }
    }

    /// As a side sees it that needs no translation.
    pub(crate) fn bytes(&self) -> HostSlice<'_> {
        self.ram.slice(0, PAGES * PAGE)
    }

    pub(crate) fn set_missing(&self, pages: u16) {
        self.missing.store(pages.into(), Ordering::Relaxed);
    }

    /// How many translations there were since the last time.
    pub(crate) fn take_resolved(&self) -> u32 {
        self.resolved.swap(0, Ordering::Relaxed)
    }

    pub(crate) fn layout(size: u16) -> Layout {
        let [descriptors, driver, device] = AREAS.map(|at| BusAddr(at as u64));
        Layout { size, descriptors, driver, device }
    }

    /// The ring as its driver sees it.
    pub(crate) fn cells(&self, format: Format, size: u16) -> RingCells<'_> {
        let area = |at: usize, area: RingArea| self.ram.slice(AREAS[at], area.len(format, size) as usize);
        let slices = RingSlices {
            descriptors: area(0, RingArea::Descriptors),
            driver: area(1, RingArea::Driver),
            device: area(2, RingArea::Device),
        };
        RingCells::new(format, size, &slices)
    }
}

impl Memory for Flat {
    type Lease = ();
    type Visit<'m> = FlatVisit<'m>;

    fn visit(&mut self) -> FlatVisit<'_> {
        FlatVisit { flat: self, tickets: Cell::new(0) }
    }
}

pub(crate) struct FlatVisit<'m> {
    flat: &'m Flat,
    tickets: Cell<u64>,
}

impl Visit for FlatVisit<'_> {
    type Lease = ();

    fn resolve(&self, addr: BusAddr, len: usize, access: Access, _: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let Flat { ram, missing, resolved } = self.flat;
        resolved.fetch_add(1, Ordering::Relaxed);
        assert!(len > 0, "an empty range");
        let missing = missing.load(Ordering::Relaxed);
        let at = usize::try_from(addr.0).ok().filter(|&at| at < PAGES * PAGE);
        let Some(at) = at else { return Err(Fault { addr, access, reason: FaultReason::Unmapped }.into()) };
        let here = len.min(PAGE - at % PAGE);
        if missing & 1 << (at / PAGE) != 0 {
            let ticket = Ticket(self.tickets.replace(self.tickets.get() + 1));
            return Err(Stop::Miss(Miss { ticket, covers: here as u64 }));
        }
        Ok(Physical::slice(&**ram, ringfence_dma::Gpa(addr.0), here).expect("in bounds, see above"))
    }

    fn lease(&self, _: &[(BusAddr, u32)]) {}
}
