//! Memory that is strict: each area has its own rights, each page may lie elsewhere, and each may be missing for a while.

use proptest::prelude::*;
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Miss, Permission, Ram, Stop, Ticket, Visit};
use ringfence_ring::{Format, Indirect, IndirectTable, Layout, Notifications, RingArea, RingCells, RingSlices, Rules};
use std::cell::{Cell, RefCell};
use std::ops::Range;

const PAGE: usize = 4096;

/// Where the world begins on the bus: nowhere near where it is in memory.
pub(crate) const BUS: u64 = 0x005a_0000_0000;

/// How many buffers a table of the world has room for, and how many tables there are.
pub(crate) const TABLE_BUFFERS: usize = 40;
pub(crate) const TABLES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Every area in one piece.
    Flat,
    /// Each page elsewhere.
    Scattered,
    /// As before, and each page is missing this often before it resolves, or once or twice more than its neighbour.
    Missing(u8),
}

/// A ring, tables beside it, and how the device reaches both.
pub(crate) struct World {
    kind: Kind,
    pub(crate) rules: Rules,
    pub(crate) layout: Layout,
    /// The bytes as the driver sees them, in one piece.
    near: Ram,
    /// The bytes as the device reaches them, pages in another order. Flat worlds have one memory for both.
    far: Option<Ram>,
    regions: [Region; 4],
    /// By page: how often it is still to be missed.
    missing: RefCell<Vec<u8>>,
    tickets: Cell<u64>,
    pub(crate) resolved: Cell<usize>,
    /// Pages that are not mapped.
    pub(crate) unmapped: RefCell<Vec<u64>>,
}

struct Region {
    offsets: Range<usize>,
    permission: Permission,
}

impl World {
    /// `skew` shifts the areas within their pages.
    pub(crate) fn new(kind: Kind, rules: Rules, size: u16, skew: usize) -> Self {
        let mut end = 0usize;
        let mut region = |len: usize, align: usize, permission| {
            let start = end.next_multiple_of(PAGE) + skew * align % PAGE;
            end = start + len;
            Region { offsets: start..end, permission }
        };
        let area = |area: RingArea| (area.len(rules.format, size) as usize, area.align(rules.format) as usize);
        let (len, align) = area(RingArea::Descriptors);
        let descriptors = match rules.format {
            Format::Split => region(len, align, Permission::ReadOnly),
            Format::Packed => region(len, align, Permission::ReadWrite),
        };
        let (len, align) = area(RingArea::Driver);
        let driver = region(len, align, Permission::ReadOnly);
        let (len, align) = area(RingArea::Device);
        let device = region(len, align, Permission::WriteOnly);
        // Tables need not be aligned at all.
        let tables = region(TABLES * TABLE_BUFFERS * 16, 1, Permission::ReadOnly);
        let regions = [descriptors, driver, device, tables];
        let pages = end.div_ceil(PAGE);
        let at = |region: &Region| BusAddr(BUS + region.offsets.start as u64);
        let layout = Layout { size, descriptors: at(&regions[0]), driver: at(&regions[1]), device: at(&regions[2]) };
        let world = Self {
            kind,
            rules,
            layout,
            near: Ram::new(pages * PAGE),
            far: (kind != Kind::Flat).then(|| Ram::new(pages * PAGE)),
            regions,
            missing: RefCell::new(vec![0; pages]),
            tickets: Cell::new(0),
            resolved: Cell::new(0),
            unmapped: RefCell::default(),
        };
        world.flush();
        world
    }

    /// The ring as the driver sees it.
    pub(crate) fn slices(&self) -> RingSlices<'_> {
        RingSlices { descriptors: self.near(0), driver: self.near(1), device: self.near(2) }
    }

    /// The same, for a driver's half.
    pub(crate) fn cells(&self) -> RingCells<'_> {
        RingCells::new(self.rules.format, self.layout.size, &self.slices())
    }

    /// A table of the driver's.
    pub(crate) fn table(&self, index: usize) -> IndirectTable<'_> {
        let (at, len) = (index * TABLE_BUFFERS * 16, TABLE_BUFFERS * 16);
        IndirectTable { memory: self.near(3).sub(at, len), addr: self.table_addr(index) }
    }

    pub(crate) fn table_addr(&self, index: usize) -> BusAddr {
        BusAddr(BUS + (self.regions[3].offsets.start + index * TABLE_BUFFERS * 16) as u64)
    }

    fn near(&self, region: usize) -> HostSlice<'_> {
        let Range { start, end } = self.regions[region].offsets;
        self.near.slice(start, end - start)
    }

    /// Everything, as the driver sees it.
    pub(crate) fn bytes(&self) -> HostSlice<'_> {
        self.near.slice(0, self.near.len())
    }

    /// Shows the device what the driver did.
    pub(crate) fn driver_to_device(&self) {
        self.carry(|near, far| (near, far));
    }

    /// Shows the driver what the device did.
    pub(crate) fn device_to_driver(&self) {
        self.carry(|near, far| (far, near));
    }

    fn carry<'w>(&'w self, direction: impl Fn(HostSlice<'w>, HostSlice<'w>) -> (HostSlice<'w>, HostSlice<'w>)) {
        let Some(far) = &self.far else { return };
        let mut bytes = [0; PAGE];
        for page in 0..self.pages() {
            let (near, far) = (self.near.slice(page * PAGE, PAGE), far.slice(self.far_page(page) * PAGE, PAGE));
            let (from, to) = direction(near, far);
            from.read(0, &mut bytes);
            to.write(0, &bytes);
        }
    }

    fn pages(&self) -> usize {
        self.near.len() / PAGE
    }

    /// Neighbours on the bus are never neighbours in memory.
    fn far_page(&self, page: usize) -> usize {
        self.pages() - 1 - page
    }

    /// Takes all translations away.
    pub(crate) fn flush(&self) {
        if let Kind::Missing(times) = self.kind {
            for (page, missing) in self.missing.borrow_mut().iter_mut().enumerate() {
                *missing = times + page as u8 % 3;
            }
        }
    }

    fn reach(&self, addr: BusAddr, len: usize, access: Access, asked: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        self.resolved.set(self.resolved.get() + 1);
        assert!(len > 0, "an empty range");
        assert!(asked.is_none_or(|Ticket(ticket)| ticket < self.tickets.get()), "a ticket that was never given");
        let fault = |reason| Stop::Fault(Fault { addr, access, reason });
        let offset = addr.0.checked_sub(BUS).and_then(|offset| usize::try_from(offset).ok());
        let region = self
            .regions
            .iter()
            .find_map(|region| offset.filter(|offset| region.offsets.contains(offset)).map(|offset| (offset, region)));
        let (offset, region) = region.ok_or(fault(FaultReason::Unmapped))?;
        if !region.permission.allows(access) {
            return Err(fault(FaultReason::Forbidden));
        }
        let page = offset / PAGE;
        if self.unmapped.borrow().contains(&(page as u64)) {
            return Err(fault(FaultReason::Unmapped));
        }
        let in_region = len.min(region.offsets.end - offset);
        let in_page = in_region.min((page + 1) * PAGE - offset);
        let missing = &mut self.missing.borrow_mut()[page];
        if *missing > 0 {
            *missing -= 1;
            let ticket = Ticket(self.tickets.replace(self.tickets.get() + 1));
            return Err(Stop::Miss(Miss { ticket, covers: in_page as u64 }));
        }
        Ok(match &self.far {
            None => self.near.slice(offset, in_region),
            Some(far) => far.slice(self.far_page(page) * PAGE + offset % PAGE, in_page),
        })
    }
}

impl Visit for World {
    type Lease = ();

    fn resolve(&self, addr: BusAddr, len: usize, access: Access, asked: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        self.reach(addr, len, access, asked)
    }

    fn lease(&self, _: &[(BusAddr, u32)]) {}
}

/// Every combination of what can be agreed on.
pub(crate) fn all_rules() -> impl Iterator<Item = Rules> {
    [Format::Split, Format::Packed].into_iter().flat_map(|format| {
        [Notifications::Flags, Notifications::EventIdx].into_iter().flat_map(move |notifications| {
            [Indirect::Refused, Indirect::Allowed].into_iter().map(move |indirect| Rules {
                format,
                notifications,
                indirect,
            })
        })
    })
}

pub(crate) fn any_rules() -> impl Strategy<Value = Rules> {
    prop::sample::select(all_rules().collect::<Vec<_>>())
}

/// A queue's rules and a size that its format has.
pub(crate) fn any_queue() -> impl Strategy<Value = (Rules, u16)> {
    any_rules().prop_flat_map(|rules| {
        let size = match rules.format {
            Format::Split => prop::sample::select(vec![1, 2, 4, 8, 64, 256, 512]).boxed(),
            Format::Packed => prop_oneof![1..20u16, Just(64), Just(300), Just(512)].boxed(),
        };
        (Just(rules), size)
    })
}

pub(crate) fn any_kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Flat), Just(Kind::Scattered), (1..4u8).prop_map(Kind::Missing)]
}
