//! Everything that a driver can get wrong in a chain, and what it is told.

use crate::world::{BUS, Kind, World};
use ringfence_dma::{Access, BusAddr, Fault, FaultReason};
use ringfence_ring::{Chain, Descriptor, DeviceQueue, Format, Indirect, Position, RingError, RingStop, Rules};
use std::sync::atomic::Ordering;

const SIZE: u16 = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// A packed descriptor that is available in the first lap.
const AVAIL: u16 = 1 << 7;

/// A descriptor: address, length, flags, and where the chain goes on (split) or its id (packed).
type Raw = (u64, u32, u16, u16);

/// What becomes of one chain of a queue with eight descriptors.
fn check(why: &str, rules: Rules, ring: &[Raw], table: &[Raw], expected: Result<Vec<Descriptor>, RingStop>) {
    for kind in [Kind::Flat, Kind::Scattered, Kind::Missing(2)] {
        let world = World::new(kind, rules, SIZE, 3);
        let ring_slice = world.slices().descriptors;
        let write = |slice: &ringfence_dma::HostSlice<'_>, at: usize, (addr, len, flags, link): Raw| {
            let halves = if rules.format == Format::Split { (flags, link) } else { (link, flags) };
            slice.store_u64(at, addr, Ordering::Relaxed);
            slice.store_u32(at + 8, len, Ordering::Relaxed);
            slice.store_u16(at + 12, halves.0, Ordering::Relaxed);
            slice.store_u16(at + 14, halves.1, Ordering::Relaxed);
        };
        for (index, &raw) in ring.iter().enumerate() {
            write(&ring_slice, 16 * index, raw);
        }
        let table_slice = world.table(0).memory;
        for (index, &raw) in table.iter().enumerate() {
            write(&table_slice, 16 * index, raw);
        }
        if rules.format == Format::Split {
            // Entry 0 is descriptor 0.
            world.slices().driver.store_u16(2, 1, Ordering::Relaxed);
        }
        world.driver_to_device();

        let mut queue = DeviceQueue::new(rules, world.layout, Position::start(rules.format)).unwrap();
        let mut chain = Chain::default();
        let popped = patiently(|| queue.open(&world).pop(&mut chain));
        let got = popped.and_then(|some| {
            assert!(some, "{why}: the chain was overlooked");
            patiently(|| chain.expand(&world, None))
        });
        assert_eq!(got.map(|()| chain.descriptors().to_vec()), expected, "{why} ({:?}, {kind:?})", rules.format);
        if popped.is_err() {
            assert_eq!(queue.position(), Position::start(rules.format), "{why}: something was taken");
        }
    }
}

fn patiently<T>(mut try_it: impl FnMut() -> Result<T, RingStop>) -> Result<T, RingStop> {
    (0..100).map(|_| try_it()).find(|tried| !matches!(tried, Err(RingStop::Wait(_)))).expect("the ring resolves")
}

fn broken(error: RingError) -> Result<Vec<Descriptor>, RingStop> {
    Err(RingStop::Broken(error))
}

fn read(addr: u64, len: u32) -> Descriptor {
    Descriptor { addr: BusAddr(addr), len, access: Access::Read }
}

fn write(addr: u64, len: u32) -> Descriptor {
    Descriptor { addr: BusAddr(addr), len, access: Access::Write }
}

/// Where table 0 is in a world of this form.
fn table_addr(format: Format) -> u64 {
    World::new(Kind::Flat, rules(format), SIZE, 3).table_addr(0).0
}

fn rules(format: Format) -> Rules {
    Rules { format, indirect: Indirect::Allowed, ..Rules::default() }
}

#[test]
fn split_chains() {
    use RingError as E;
    let rules = rules(Format::Split);
    let table = table_addr(Format::Split);
    let refused = Rules { indirect: Indirect::Refused, ..rules };
    let long: Vec<Raw> = (0..8).map(|index| (0x1000, 1, NEXT, index + 1)).collect();

    // Right, if unusual.
    check("one", rules, &[(0x1000, 5, 0, 0)], &[], Ok(vec![read(0x1000, 5)]));
    check("a link without NEXT", rules, &[(0x1000, 5, 0, 999)], &[], Ok(vec![read(0x1000, 5)]));
    check("flags that mean nothing", rules, &[(0x1000, 5, 0xfff8, 0)], &[], Ok(vec![read(0x1000, 5)]));
    check(
        "backwards",
        rules,
        &[
            (1, 1, NEXT, 7),
            (2, 2, WRITE, 0),
            (0, 0, 0, 0),
            (0, 0, 0, 0),
            (4, 4, NEXT | WRITE, 1),
            (0, 0, 0, 0),
            (0, 0, 0, 0),
            (3, 3, NEXT, 4),
        ],
        &[],
        Ok(vec![read(1, 1), read(3, 3), write(4, 4), write(2, 2)]),
    );
    check("empty stretches", rules, &[(1, 0, NEXT, 1), (2, 2, NEXT, 2), (3, 0, WRITE, 0)], &[], Ok(vec![read(2, 2)]));
    check("a table", rules, &[(table, 16, INDIRECT, 0)], &[(1, 1, 0, 0)], Ok(vec![read(1, 1)]));
    check(
        "a table said to be writable",
        rules,
        &[(table, 16, INDIRECT | WRITE, 0)],
        &[(1, 1, 0, 0)],
        Ok(vec![read(1, 1)]),
    );
    check(
        "a table after a descriptor",
        rules,
        &[(7, 7, NEXT, 1), (table, 32, INDIRECT, 0)],
        &[(1, 1, NEXT, 1), (2, 2, WRITE, 0)],
        Ok(vec![read(7, 7), read(1, 1), write(2, 2)]),
    );
    check(
        "a table in no order, with entries to spare",
        rules,
        &[(table, 80, INDIRECT, 0)],
        &[(1, 1, NEXT, 4), (2, 2, NEXT | WRITE, 3), (0, 0, INDIRECT, 0), (3, 3, WRITE, 0), (4, 4, NEXT, 1)],
        Ok(vec![read(1, 1), read(4, 4), write(2, 2), write(3, 3)]),
    );
    check(
        "all but 4 GiB",
        rules,
        &[(1, u32::MAX - 1, NEXT, 1), (2, 1, WRITE, 0)],
        &[],
        Ok(vec![read(1, u32::MAX - 1), write(2, 1)]),
    );
    check(
        "memory that is not there is for others to find out",
        rules,
        &[(u64::MAX, 9, 0, 0)],
        &[],
        Ok(vec![read(u64::MAX, 9)]),
    );

    // Wrong.
    check("zeros", rules, &[(0, 0, 0, 0)], &[], broken(E::NoBytes));
    check("no bytes in two descriptors", rules, &[(1, 0, NEXT, 1), (2, 0, WRITE, 0)], &[], broken(E::NoBytes));
    check("a link out of the ring", rules, &[(1, 1, NEXT, 8)], &[], broken(E::NoSuchDescriptor { index: 8, count: 8 }));
    check("a link to itself", rules, &[(1, 1, NEXT, 0)], &[], broken(E::ChainTooLong { limit: 8 }));
    check("a loop of two", rules, &[(1, 1, NEXT, 1), (1, 1, NEXT, 0)], &[], broken(E::ChainTooLong { limit: 8 }));
    check("an empty loop", rules, &[(1, 0, NEXT, 0)], &[], broken(E::ChainTooLong { limit: 8 }));
    check(
        "out of the end",
        rules,
        &long,
        &[],
        broken(E::NoSuchDescriptor { index: 8, count: 8 }).map_err(|_| E::ChainTooLong { limit: 8 }.into()),
    );
    check("a read after a write", rules, &[(1, 1, NEXT | WRITE, 1), (2, 2, 0, 0)], &[], broken(E::ReadAfterWrite));
    check(
        "an empty read after a write",
        rules,
        &[(1, 1, NEXT | WRITE, 1), (2, 0, 0, 0)],
        &[],
        broken(E::ReadAfterWrite),
    );
    check(
        "a read after an empty write",
        rules,
        &[(1, 0, NEXT | WRITE, 1), (2, 2, 0, 0)],
        &[],
        broken(E::ReadAfterWrite),
    );
    check("4 GiB", rules, &[(1, u32::MAX, NEXT, 1), (2, 1, 0, 0)], &[], broken(E::TooManyBytes));
    check("4 GiB of both", rules, &[(1, u32::MAX, NEXT, 1), (2, 1, WRITE, 0)], &[], broken(E::TooManyBytes));
    check(
        "a table nobody agreed on",
        refused,
        &[(table, 16, INDIRECT, 0)],
        &[(1, 1, 0, 0)],
        broken(E::IndirectRefused),
    );
    check(
        "a table and on",
        rules,
        &[(table, 16, INDIRECT | NEXT, 1), (1, 1, 0, 0)],
        &[(1, 1, 0, 0)],
        broken(E::IndirectInChain),
    );
    check("a table of nothing", rules, &[(table, 0, INDIRECT, 0)], &[], broken(E::TableLength { len: 0 }));
    check("a table of half an entry", rules, &[(table, 24, INDIRECT, 0)], &[], broken(E::TableLength { len: 24 }));
    check(
        "a table of 1025",
        rules,
        &[(table, 16 * 1025, INDIRECT, 0)],
        &[],
        broken(E::TableTooLong { entries: 1025, limit: 1024 }),
    );
    check(
        "a table of 4 GiB",
        rules,
        &[(table, 0xffff_fff0, INDIRECT, 0)],
        &[],
        broken(E::TableTooLong { entries: 0xfff_ffff, limit: 1024 }),
    );
    check(
        "a table in a table",
        rules,
        &[(table, 16, INDIRECT, 0)],
        &[(table, 16, INDIRECT, 0)],
        broken(E::IndirectNested),
    );
    check(
        "a link out of the table",
        rules,
        &[(table, 32, INDIRECT, 0)],
        &[(1, 1, NEXT, 2)],
        broken(E::NoSuchDescriptor { index: 2, count: 2 }),
    );
    check(
        "a loop in a table",
        rules,
        &[(table, 32, INDIRECT, 0)],
        &[(1, 1, NEXT, 1), (1, 1, NEXT, 0)],
        broken(E::ChainTooLong { limit: 2 }),
    );
    check("a table of zeros", rules, &[(table, 16, INDIRECT, 0)], &[(0, 0, 0, 0)], broken(E::NoBytes));
    check(
        "a table that reads after the ring wrote",
        rules,
        &[(7, 7, NEXT | WRITE, 1), (table, 16, INDIRECT, 0)],
        &[(1, 1, 0, 0)],
        broken(E::ReadAfterWrite),
    );
    check(
        "4 GiB with a table",
        rules,
        &[(7, u32::MAX, NEXT, 1), (table, 16, INDIRECT, 0)],
        &[(1, 1, 0, 0)],
        broken(E::TooManyBytes),
    );
}

#[test]
fn packed_chains() {
    use RingError as E;
    let rules = rules(Format::Packed);
    let table = table_addr(Format::Packed);
    let refused = Rules { indirect: Indirect::Refused, ..rules };
    let long: Vec<Raw> = (0..8).map(|_| (0x1000, 1, AVAIL | NEXT, 0)).collect();

    check("one", rules, &[(1, 5, AVAIL, 77)], &[], Ok(vec![read(1, 5)]));
    check("two", rules, &[(1, 5, AVAIL | NEXT, 0), (2, 6, AVAIL | WRITE, 0)], &[], Ok(vec![read(1, 5), write(2, 6)]));
    check("empty stretches", rules, &[(1, 0, AVAIL | NEXT, 0), (2, 6, AVAIL | WRITE, 0)], &[], Ok(vec![write(2, 6)]));
    check(
        "a table",
        rules,
        &[(table, 32, AVAIL | INDIRECT, 0)],
        &[(1, 1, 0, 0), (2, 2, WRITE, 0)],
        Ok(vec![read(1, 1), write(2, 2)]),
    );
    check(
        "flags in a table that mean nothing there",
        rules,
        &[(table, 32, AVAIL | INDIRECT | WRITE, 0)],
        &[(1, 1, INDIRECT | NEXT | AVAIL, 9), (2, 2, WRITE | NEXT, 9)],
        Ok(vec![read(1, 1), write(2, 2)]),
    );

    check("zeros, available", rules, &[(0, 0, AVAIL, 0)], &[], broken(E::NoBytes));
    check("on into nothing", rules, &[(1, 1, AVAIL | NEXT, 0)], &[], broken(E::NotAvailable { index: 1 }));
    check("all of the ring and on", rules, &long, &[], broken(E::ChainTooLong { limit: 8 }));
    check(
        "a read after a write",
        rules,
        &[(1, 1, AVAIL | NEXT | WRITE, 0), (2, 2, AVAIL, 0)],
        &[],
        broken(E::ReadAfterWrite),
    );
    check("4 GiB", rules, &[(1, u32::MAX, AVAIL | NEXT, 0), (2, 1, AVAIL | WRITE, 0)], &[], broken(E::TooManyBytes));
    check(
        "a table nobody agreed on",
        refused,
        &[(table, 16, AVAIL | INDIRECT, 0)],
        &[(1, 1, 0, 0)],
        broken(E::IndirectRefused),
    );
    check(
        "a table and on",
        rules,
        &[(table, 16, AVAIL | INDIRECT | NEXT, 0), (1, 1, AVAIL, 0)],
        &[],
        broken(E::IndirectInChain),
    );
    check(
        "a table after a descriptor",
        rules,
        &[(1, 1, AVAIL | NEXT, 0), (table, 16, AVAIL | INDIRECT, 0)],
        &[],
        broken(E::IndirectInChain),
    );
    check("a table of nothing", rules, &[(table, 0, AVAIL | INDIRECT, 0)], &[], broken(E::TableLength { len: 0 }));
    check(
        "a table of an entry and a byte",
        rules,
        &[(table, 17, AVAIL | INDIRECT, 0)],
        &[],
        broken(E::TableLength { len: 17 }),
    );
    check(
        "a table of 1025",
        rules,
        &[(table, 16 * 1025, AVAIL | INDIRECT, 0)],
        &[],
        broken(E::TableTooLong { entries: 1025, limit: 1024 }),
    );
    check("a table of zeros", rules, &[(table, 32, AVAIL | INDIRECT, 0)], &[], broken(E::NoBytes));
    check(
        "a table that reads after it wrote",
        rules,
        &[(table, 32, AVAIL | INDIRECT, 0)],
        &[(1, 1, WRITE, 0), (2, 2, 0, 0)],
        broken(E::ReadAfterWrite),
    );
    check(
        "4 GiB in a table",
        rules,
        &[(table, 32, AVAIL | INDIRECT, 0)],
        &[(1, u32::MAX, 0, 0), (2, 2, 0, 0)],
        broken(E::TooManyBytes),
    );
}

#[test]
fn tables_out_of_reach_concern_their_chain_alone() {
    for (format, avail) in [(Format::Split, 0), (Format::Packed, AVAIL)] {
        let fault = |addr, reason| Err(RingStop::Fault(Fault { addr: BusAddr(addr), access: Access::Read, reason }));
        let device = World::new(Kind::Flat, rules(format), SIZE, 3).layout.device.0;
        for (addr, reason) in [
            (BUS - 0x1000, FaultReason::Unmapped),
            (u64::MAX - 0xf, FaultReason::Unmapped),
            (u64::MAX - 0xe, FaultReason::Wraps),
            (device, FaultReason::Forbidden),
        ] {
            check("a table", rules(format), &[(addr, 16, avail | INDIRECT, 0)], &[], fault(addr, reason));
        }
    }
}

/// A packed ring's driver owns what is not under way, and nothing else that it may mark as available.
#[test]
fn a_lap_too_many() {
    /// A packed descriptor that is available in the second lap.
    const LATER: u16 = 1 << 15;
    let rules = rules(Format::Packed);
    let world = World::new(Kind::Scattered, rules, SIZE, 0);
    let mark = |slot: usize, flags: u16| {
        let ring = world.slices().descriptors;
        ring.store_u32(16 * slot + 8, 1, Ordering::Relaxed);
        ring.store_u16(16 * slot + 14, flags, Ordering::Relaxed);
        world.driver_to_device();
    };
    let mut queue = DeviceQueue::new(rules, world.layout, Position::start(Format::Packed)).unwrap();
    let mut chain = Chain::default();
    (0..6).for_each(|slot| mark(slot, AVAIL));
    while queue.open(&world).pop(&mut chain).unwrap() {}
    assert_eq!(queue.under_way(), 6);

    mark(6, AVAIL | NEXT);
    mark(7, AVAIL | NEXT);
    mark(0, LATER);
    let popped = queue.open(&world).pop(&mut chain);
    assert_eq!(popped, Err(RingStop::Broken(RingError::ChainTooLong { limit: 2 })));

    mark(7, AVAIL);
    assert_eq!(queue.open(&world).pop(&mut chain), Ok(true));
    assert_eq!(queue.under_way(), 8);
    assert_eq!(queue.open(&world).pop(&mut chain), Ok(false), "descriptor 0 is still the device's");
    assert_eq!(queue.open(&world).enable_notifications(), Ok(false));
}

/// The avail index may say what the driver can own, and nothing else.
#[test]
fn avail_indices() {
    let rules = rules(Format::Split);
    for (position, index, expected) in [
        (Position { avail: 0, used: 0 }, 0, Ok(false)),
        (Position { avail: 0, used: 0 }, 1, Ok(true)),
        (Position { avail: 0, used: 0 }, 8, Ok(true)),
        (Position { avail: 0, used: 0 }, 9, Err(RingError::AvailIndex { index: 9, next: 0, room: 8 })),
        (Position { avail: 0, used: 0 }, 0xffff, Err(RingError::AvailIndex { index: 0xffff, next: 0, room: 8 })),
        (Position { avail: 0xfffc, used: 0xfffc }, 4, Ok(true)),
        (Position { avail: 0xfffc, used: 0xfffc }, 5, Err(RingError::AvailIndex { index: 5, next: 0xfffc, room: 8 })),
        (Position { avail: 2, used: 0xfffc }, 4, Ok(true)),
        (Position { avail: 2, used: 0xfffc }, 5, Err(RingError::AvailIndex { index: 5, next: 2, room: 2 })),
        (Position { avail: 8, used: 0 }, 8, Ok(false)),
        (Position { avail: 8, used: 0 }, 9, Err(RingError::AvailIndex { index: 9, next: 8, room: 0 })),
        (Position { avail: 8, used: 0 }, 7, Err(RingError::AvailIndex { index: 7, next: 8, room: 0 })),
    ] {
        let world = World::new(Kind::Scattered, rules, SIZE, 0);
        for slot in 0..usize::from(SIZE) {
            world.slices().driver.store_u16(4 + 2 * slot, slot as u16, Ordering::Relaxed);
            world.slices().descriptors.store_u32(16 * slot + 8, 1, Ordering::Relaxed);
        }
        world.slices().driver.store_u16(2, index, Ordering::Relaxed);
        world.driver_to_device();
        let mut queue = DeviceQueue::new(rules, world.layout, position).unwrap();
        let popped = queue.open(&world).pop(&mut Chain::default());
        assert_eq!(popped, expected.map_err(RingStop::Broken), "{position:?}, index {index}");
        let enabled = DeviceQueue::new(rules, world.layout, position).unwrap().open(&world).enable_notifications();
        assert_eq!(enabled, expected.map_err(RingStop::Broken), "{position:?}, index {index}");
    }

    // A head beyond the table.
    let world = World::new(Kind::Scattered, rules, SIZE, 0);
    world.slices().driver.store_u32(2, 1 | 8 << 16, Ordering::Relaxed);
    world.driver_to_device();
    let mut queue = DeviceQueue::new(rules, world.layout, Position::start(Format::Split)).unwrap();
    let popped = queue.open(&world).pop(&mut Chain::default());
    assert_eq!(popped, Err(RingStop::Broken(RingError::NoSuchDescriptor { index: 8, count: 8 })));
}
