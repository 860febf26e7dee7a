//! Rings that can't be reached, or in pieces that no ring can lie in.

use crate::world::{Kind, World, all_rules};
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Miss, Ram, Stop, Ticket, Visit};
use ringfence_ring::{
    Chain, DeviceQueue, DriverQueue, Format, Layout, LayoutError, Notifications, OpenQueue, Position, RingStop, Rules,
};
use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

/// Each area in turn is not mapped. What needs it faults, and what does not need it works.
#[test]
fn areas_out_of_reach() {
    for rules in all_rules() {
        let world = World::new(Kind::Scattered, rules, 4, 0);
        let Layout { descriptors, driver, device, .. } = world.layout;
        for (addr, access) in [(descriptors, Access::Read), (driver, Access::Read), (device, Access::Write)] {
            // One chain is there.
            let mut theirs = DriverQueue::new(rules, 4, world.cells()).unwrap();
            let buffer = ringfence_ring::Descriptor { addr: BusAddr(1), len: 1, access: Access::Write };
            theirs.add(&[buffer], None).unwrap();
            theirs.publish();
            world.driver_to_device();
            let page = (addr.0 - crate::world::BUS) / 4096;
            world.unmapped.replace(vec![page]);

            let mut queue = DeviceQueue::new(rules, world.layout, Position::start(rules.format)).unwrap();
            let mut open = queue.open(&world);
            let mut chain = Chain::default();
            let popped = open.pop(&mut chain);
            let is_fault = |stop: RingStop| match stop {
                RingStop::Fault(fault) => {
                    assert_eq!((fault.access, fault.reason), (access, FaultReason::Unmapped), "{rules:?}");
                    assert_eq!((fault.addr.0 - crate::world::BUS) / 4096, page);
                    true
                }
                stop => panic!("{stop}"),
            };
            let pop_needs = addr == descriptors || addr == driver && rules.format == Format::Split;
            assert_eq!(popped.is_err_and(is_fault), pop_needs, "{rules:?}");
            assert_eq!(open.needs_notification().is_err_and(is_fault), addr == driver, "{rules:?}");
            if !pop_needs {
                let push_needs = addr == device && rules.format == Format::Split;
                assert_eq!(open.push(chain.head(), 1).is_err_and(is_fault), push_needs, "{rules:?}");
            }
            world.unmapped.replace(Vec::new());
        }
    }
}

/// Memory in which every byte is mapped by itself as far as `piece` says, from a `shift`ed address.
struct Pieces {
    ram: Ram,
    piece: u64,
    shift: usize,
}

impl Visit for Pieces {
    type Lease = ();

    fn resolve(&self, addr: BusAddr, len: usize, _: Access, _: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let here = (self.piece - addr.0 % self.piece).min(len as u64);
        Ok(self.ram.slice(addr.0 as usize + self.shift, here as usize))
    }

    fn lease(&self, _: &[(BusAddr, u32)]) {}
}

/// One chain goes through a ring in the smallest pieces that its elements can lie in, and through none smaller; and a
/// mapping that misaligns it is refused.
#[test]
fn elements_in_pieces() {
    let layout = Layout { size: 4, descriptors: BusAddr(0x1000), driver: BusAddr(0x2000), device: BusAddr(0x3000) };
    for format in [Format::Split, Format::Packed] {
        let rules = Rules { format, notifications: Notifications::EventIdx, ..Rules::default() };
        for (piece, shift, expected) in [
            (4096, 0, None),
            (64, 0, None),
            (16, 0, None),
            (16, 16, None),
            (8, 0, Some((0x1000, Access::Read))),
            (4096, 8, Some((0x1000, Access::Read))),
            (4096, 1, Some((if format == Format::Split { 0x2000 } else { 0x1000 }, Access::Read))),
        ] {
            let memory = Pieces { ram: Ram::new(0x5000), piece, shift };
            let area = |addr: BusAddr| memory.ram.slice(addr.0 as usize + shift, 0x800);
            // By hand, as the ring may be misaligned.
            let (flags, at) = if format == Format::Split { (0, 12) } else { (0x80, 14) };
            area(layout.descriptors).store_u32(8, 1, Ordering::Relaxed);
            area(layout.descriptors).store_u16(at, flags, Ordering::Relaxed);
            area(layout.driver).store_u16(2, 1, Ordering::Relaxed);

            let mut queue = DeviceQueue::new(rules, layout, Position::start(format)).unwrap();
            let mut chain = Chain::default();
            let mut open = queue.open(&memory);
            let served = open.pop(&mut chain).and_then(|some| {
                assert!(some);
                open.push(chain.head(), 1)?;
                open.publish()?;
                open.needs_notification()?;
                open.enable_notifications()
            });
            let expected = expected.map(|(addr, access)| {
                RingStop::Fault(Fault { addr: BusAddr(addr), access, reason: FaultReason::Split })
            });
            let got = served.err().map(|stop| match stop {
                // Which element of the area was wanted first is of no interest.
                RingStop::Fault(fault) => RingStop::Fault(Fault { addr: BusAddr(fault.addr.0 & !0xfff), ..fault }),
                stop => stop,
            });
            assert_eq!(got, expected, "{format:?} in pieces of {piece}, shifted by {shift}");
        }
    }
}

/// A used entry has 8 bytes and is aligned to 4, so that one of 1024 lies across two pages.
#[test]
fn a_used_entry_lies_across_two_pages() {
    let rules = Rules::default();
    let world = World::new(Kind::Scattered, rules, 1024, 0);
    let mut theirs = DriverQueue::new(rules, 1024, world.cells()).unwrap();
    let buffer = ringfence_ring::Descriptor { addr: BusAddr(1), len: 0x0102_0304, access: Access::Write };
    for _ in 0..1024 {
        theirs.add(&[buffer], None).unwrap();
    }
    theirs.publish();
    world.driver_to_device();
    let mut queue = DeviceQueue::new(rules, world.layout, Position::start(Format::Split)).unwrap();
    let mut open = queue.open(&world);
    let mut chain = Chain::default();
    while open.pop(&mut chain).unwrap() {
        open.push(chain.head(), buffer.len).unwrap();
    }
    open.publish().unwrap();
    world.device_to_driver();
    for index in 0..1024 {
        let used = theirs.take_used().unwrap().unwrap();
        assert_eq!((used.token.index(), used.written), (index, buffer.len));
    }
}

/// Memory whose translations are refused some time after they were asked for.
struct Refusing {
    refused: Cell<Option<Ticket>>,
    asked: RefCell<Vec<(BusAddr, Option<Ticket>)>>,
}

impl Visit for Refusing {
    type Lease = ();

    fn resolve(&self, addr: BusAddr, _: usize, access: Access, asked: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        self.asked.borrow_mut().push((addr, asked));
        match (asked, self.refused.get()) {
            (Some(asked), Some(refused)) if asked <= refused => {
                Err(Stop::Fault(Fault { addr, access, reason: FaultReason::Unmapped }))
            }
            _ => Err(Stop::Miss(Miss { ticket: Ticket(self.asked.borrow().len() as u64), covers: 64 })),
        }
    }

    fn lease(&self, _: &[(BusAddr, u32)]) {}
}

/// A ring whose translation is refused is known to be so; and all of an area is asked for at once.
#[test]
fn refusals_arrive() {
    let layout = Layout { size: 16, descriptors: BusAddr(0x1000), driver: BusAddr(0x2000), device: BusAddr(0x3000) };
    for format in [Format::Split, Format::Packed] {
        let rules = Rules { format, ..Rules::default() };
        let memory = Refusing { refused: Cell::new(None), asked: RefCell::default() };
        let mut queue = DeviceQueue::new(rules, layout, Position::start(format)).unwrap();
        let mut chain = Chain::default();
        for _ in 0..3 {
            assert!(matches!(queue.open(&memory).pop(&mut chain), Err(RingStop::Wait(_))));
        }
        if format == Format::Packed {
            for at in [0x1000, 0x1040, 0x1080, 0x10c0] {
                assert!(memory.asked.borrow().iter().any(|&(addr, _)| addr == BusAddr(at)), "{at:#x} not asked for");
            }
        }
        memory.refused.set(Some(Ticket(1)));
        assert!(matches!(queue.open(&memory).pop(&mut chain), Err(RingStop::Fault(_))));
    }
}

/// A batch in one visit needs a translation for each area and no more; so does each element after it.
#[test]
fn a_batch_is_translated_once() {
    for rules in all_rules() {
        let world = World::new(Kind::Flat, rules, 64, 0);
        let mut theirs = DriverQueue::new(rules, 64, world.cells()).unwrap();
        let buffer = |access| ringfence_ring::Descriptor { addr: BusAddr(1), len: 1, access };
        for _ in 0..32 {
            theirs.add(&[buffer(Access::Read), buffer(Access::Write)], None).unwrap();
        }
        theirs.publish();
        let mut queue = DeviceQueue::new(rules, world.layout, Position::start(rules.format)).unwrap();
        let mut open: OpenQueue<'_, '_, World> = queue.open(&world);
        world.resolved.set(0);
        let mut chain = Chain::default();
        let mut popped = 0;
        while open.pop(&mut chain).unwrap() {
            open.push(chain.head(), 1).unwrap();
            popped += 1;
        }
        open.publish().unwrap();
        open.needs_notification().unwrap();
        open.enable_notifications().unwrap();
        assert_eq!(popped, 32);
        let areas = if rules.format == Format::Split { 3 } else { 4 };
        assert_eq!(world.resolved.get(), areas, "{rules:?}");
    }
}

#[test]
fn positions_that_no_ring_is_at() {
    for (format, avail, used, fine) in [
        (Format::Split, 8, 0, true),
        (Format::Split, 9, 0, false),
        (Format::Split, 0, 1, false),
        (Format::Split, 3, 0xfffb, true),
        (Format::Packed, 0x8000, 0x8000, true),
        (Format::Packed, 0x8007, 0x8000, true),
        (Format::Packed, 0x8008, 0x8000, false),
        (Format::Packed, 0x8000, 0x8001, false),
        (Format::Packed, 0x0000, 0x8000, true),
        (Format::Packed, 0x0001, 0x8000, false),
    ] {
        let layout = Layout { size: 8, descriptors: BusAddr(0x1000), driver: BusAddr(0x2000), device: BusAddr(0x3000) };
        let position = Position { avail, used };
        let queue = DeviceQueue::new(Rules { format, ..Rules::default() }, layout, position);
        match (queue, fine) {
            (Ok(queue), true) => assert_eq!(queue.position(), position),
            (Err(error), false) => assert_eq!(error, LayoutError::Position { position, size: 8 }),
            (queue, _) => panic!("{format:?} {position:?}: {queue:?}"),
        }
    }
}

/// The front-end's number says where the next chain is; where the next used entry goes is in the ring, unless no ring could
/// be there.
#[test]
fn a_split_queue_goes_on_where_its_used_ring_is() {
    let rules = Rules { format: Format::Split, ..Rules::default() };
    for (used, base, expected) in [(5, 5, 5), (3, 5, 3), (0xfffe, 5, 0xfffe), (0xfffc, 5, 5), (6, 5, 5)] {
        for kind in [Kind::Flat, Kind::Missing(2)] {
            let world = World::new(kind, rules, 8, 0);
            let slices = world.slices();
            slices.device.store_u16(2, used, Ordering::Relaxed);
            slices.driver.store_u16(2, base + 1, Ordering::Relaxed);
            slices.descriptors.store_u32(8, 1, Ordering::Relaxed);
            world.driver_to_device();
            let mut queue = DeviceQueue::at_vring_base(rules, world.layout, base.into()).unwrap();
            assert_eq!(queue.position(), Position { avail: base, used: base }, "nobody has looked");
            let mut chain = Chain::default();
            while let Err(stop) = queue.open(&world).pop(&mut chain) {
                assert!(matches!(stop, RingStop::Wait(_)), "{stop}");
            }
            assert_eq!(queue.position(), Position { avail: base + 1, used: expected });
            while queue.open(&world).push(chain.head(), 0).is_err() {}
            while queue.open(&world).publish().is_err() {}
            world.device_to_driver();
            assert_eq!(slices.device.load_u16(2, Ordering::Relaxed), expected.wrapping_add(1));
        }
    }
    let layout = World::new(Kind::Flat, rules, 8, 0).layout;
    assert_eq!(DeviceQueue::at_vring_base(rules, layout, 1 << 16).unwrap_err(), LayoutError::Base { base: 1 << 16 });
}
