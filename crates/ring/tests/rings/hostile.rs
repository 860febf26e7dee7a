//! Peers that write anything at any time. Whatever it is, there is an answer, soon, and nothing else happens.

use crate::world::{Kind, World, any_kind, any_queue};
use proptest::prelude::*;
use ringfence_dma::{Access, BusAddr, HostSlice};
use ringfence_ring::{
    AddError, Chain, Descriptor, DeviceError, DeviceQueue, DriverQueue, Format, Indirect, Position, RingStop, Rules,
    Used,
};
use std::sync::atomic::Ordering;

/// Somebody who writes without a plan, and likes small numbers and flags better than others.
struct Scribbler(u64);

impl Scribbler {
    /// A number below `bound`. By xorshift: the seed is not 0.
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % bound
    }

    fn scribble(&mut self, slice: &HostSlice<'_>, words: usize) {
        const LIKED: [u16; 10] = [0x80, 0x81, 0x82, 0x84, 0x8000, 0x8001, 0x8002, 0x8004, 16, 32];
        let all = slice.len() / 2;
        for _ in 0..words {
            let at = if self.below(4) == 0 { self.below(all) } else { self.below(all.min(150)) };
            let value = match self.below(6) {
                0 => self.below(0x1_0000) as u16,
                1 | 2 => LIKED[self.below(LIKED.len())],
                _ => self.below(8) as u16,
            };
            slice.store_u16(2 * at, value, Ordering::Relaxed);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn a_driver_can_write_anything(
        (rules, size) in any_queue(),
        kind in any_kind(),
        avail in any::<u16>(),
        seed in 1..=u64::MAX,
        rounds in 1..60,
    ) {
        let world = World::new(kind, rules, size, 1);
        let start = Position::start(rules.format);
        let position = match rules.format {
            Format::Split => Position { avail, used: avail },
            Format::Packed => start,
        };
        let mut queue = DeviceQueue::new(rules, world.layout, position).unwrap();
        let mut under_way = Vec::new();
        let mut scribbler = Scribbler(seed);
        for _ in 0..rounds {
            scribbler.scribble(&world.slices().descriptors, 20);
            scribbler.scribble(&world.slices().driver, 5);
            scribbler.scribble(&world.table(0).memory, 20);
            scribbler.scribble(&world.bytes(), 10);
            // Now and then a table that can be reached.
            let table = world.table_addr(scribbler.below(2)).0 + scribbler.below(3) as u64;
            let slot = scribbler.below(usize::from(size).min(8));
            if scribbler.below(3) == 0 {
                world.slices().descriptors.store_u64(16 * slot, table, Ordering::Relaxed);
                world.slices().descriptors.store_u32(16 * slot + 8, 16 * scribbler.below(9) as u32, Ordering::Relaxed);
            }
            if rules.format == Format::Split {
                // Else hardly any index would be accepted.
                let more = scribbler.below(4) as u16;
                world.slices().driver.store_u16(2, queue.position().avail.wrapping_add(more), Ordering::Relaxed);
            }
            world.driver_to_device();
            world.resolved.set(0);
            let before = queue.position();
            let mut open = queue.open(&world);
            let mut chain = Chain::default();
            let popped = open.pop(&mut chain);
            let _ = open.enable_notifications();
            let _ = open.needs_notification();
            let _ = open.disable_notifications();
            match popped {
                Ok(true) => {
                    for _ in 0..8 {
                        let expanded = chain.expand(&world, None);
                        prop_assert!(chain.descriptors().len() <= usize::from(size) + usize::from(size).max(1024));
                        if expanded.is_ok() {
                            let total: u64 = chain.descriptors().iter().map(|piece| u64::from(piece.len)).sum();
                            prop_assert_eq!(total, u64::from(chain.readable_len()) + u64::from(chain.writable_len()));
                            prop_assert!(!chain.descriptors().is_empty());
                            prop_assert!(chain.descriptors().is_sorted_by_key(|piece| piece.access == Access::Write));
                        }
                    }
                    under_way.push(chain.head());
                }
                _ => prop_assert_eq!(queue.position(), before),
            }
            if under_way.len() > 3 {
                let mut open = queue.open(&world);
                under_way.retain(|&head| open.push(head, 1).is_err());
                let _ = open.publish();
            }
            // Each descriptor costs a translation or two at the worst, and a missing piece asks for what is behind it.
            let bound = 20 * (usize::from(size) + usize::from(size).max(1024)) * 2;
            prop_assert!(world.resolved.get() < bound, "{} translations", world.resolved.get());
        }
    }

    #[test]
    fn a_device_can_write_anything(
        (rules, size) in any_queue(),
        seed in 1..=u64::MAX,
        rounds in 1..60,
    ) {
        let world = World::new(Kind::Flat, rules, size, 1);
        let mut queue = DriverQueue::new(rules, size, world.cells()).unwrap();
        let buffers = [
            Descriptor { addr: BusAddr(0x1000), len: 4, access: Access::Read },
            Descriptor { addr: BusAddr(0x2000), len: 4, access: Access::Write },
            Descriptor { addr: BusAddr(0x3000), len: 1, access: Access::Write },
        ];
        let mut given = Vec::new();
        let mut taken = 0u16;
        let mut scribbler = Scribbler(seed);
        for _ in 0..rounds {
            match queue.add(&buffers[..scribbler.below(3) + 1], None) {
                Ok(token) => {
                    prop_assert!(!given.contains(&token), "a token twice");
                    given.push(token);
                }
                Err(AddError::Poisoned(error)) => prop_assert_eq!(queue.poison(), Some(error)),
                Err(_) => {}
            }
            scribbler.scribble(&world.slices().descriptors, 10);
            scribbler.scribble(&world.slices().device, 10);
            if rules.format == Format::Split {
                let more = scribbler.below(3) as u16;
                world.slices().device.store_u16(2, taken.wrapping_add(more), Ordering::Relaxed);
            }
            let _ = queue.needs_kick();
            let poison = queue.poison();
            match queue.take_used() {
                Ok(None) => prop_assert_eq!(poison, None),
                Ok(Some(Used { token, written })) => {
                    taken = taken.wrapping_add(1);
                    prop_assert!(written <= 5);
                    let index = given.iter().position(|&given| given == token);
                    given.remove(index.expect("a token that is not under way"));
                }
                Err(error) => {
                    prop_assert_eq!(queue.poison(), Some(error));
                    prop_assert!(poison.is_none_or(|poison| poison == error));
                    prop_assert_eq!(queue.enable_callbacks(), Err(error));
                }
            }
            prop_assert_eq!(queue.under_way().count(), given.len());
        }
    }
}

/// Tries one lie of a device on a queue of four with two chains under way: 0 (4 bytes writable) and then 1 or, in a
/// split ring, 2 (8 bytes writable).
fn lie(why: &str, format: Format, tell: impl Fn(&World), expected: Result<(), DeviceError>) {
    let rules = Rules { format, ..Rules::default() };
    let world = World::new(Kind::Flat, rules, 4, 0);
    let mut queue = DriverQueue::new(rules, 4, world.cells()).unwrap();
    let buffer = |len, access| Descriptor { addr: BusAddr(0x1000), len, access };
    queue.add(&[buffer(9, Access::Read), buffer(4, Access::Write)], None).unwrap();
    queue.add(&[buffer(8, Access::Write)], None).unwrap();
    queue.publish();
    tell(&world);
    let mut taken = (0..9).map(|_| queue.take_used());
    let end = taken.find(|used| !matches!(used, Ok(Some(_)))).unwrap();
    assert_eq!(end.map(|used| assert_eq!(used, None)), expected, "{why} ({format:?})");
    if let Err(error) = expected {
        assert_eq!(queue.take_used(), Err(error), "{why}: forgotten");
        assert_eq!(queue.add(&[buffer(1, Access::Read)], None), Err(AddError::Poisoned(error)), "{why}: forgotten");
    }
}

#[test]
fn split_lies() {
    let lie = |why, index: u16, entries: &[(u32, u32)], expected| {
        let tell = |world: &World| {
            let device = world.slices().device;
            for (slot, &(id, written)) in entries.iter().enumerate() {
                device.store_u32(4 + 8 * slot, id, Ordering::Relaxed);
                device.store_u32(8 + 8 * slot, written, Ordering::Relaxed);
            }
            device.store_u16(2, index, Ordering::Relaxed);
        };
        lie(why, Format::Split, tell, expected);
    };
    use DeviceError as E;
    lie("nothing yet", 0, &[], Ok(()));
    lie("both, the later one first", 2, &[(2, 8), (0, 4)], Ok(()));
    lie("nothing written", 2, &[(0, 0), (2, 0)], Ok(()));
    lie("too many", 3, &[(0, 0), (2, 0)], Err(E::UsedIndex { index: 3, next: 0, under_way: 2 }));
    lie("backwards", 0xffff, &[], Err(E::UsedIndex { index: 0xffff, next: 0, under_way: 2 }));
    lie("the middle of a chain", 1, &[(1, 0)], Err(E::NotUnderWay { id: 1 }));
    lie("never given", 1, &[(3, 0)], Err(E::NotUnderWay { id: 3 }));
    lie("twice", 2, &[(0, 0), (0, 0)], Err(E::NotUnderWay { id: 0 }));
    lie("out of the ring", 1, &[(4, 0)], Err(E::NoSuchChain { id: 4, size: 4 }));
    lie("an id of more than 16 bits", 1, &[(0x1_0000, 0)], Err(E::NoSuchChain { id: 0x1_0000, size: 4 }));
    lie("more than is writable", 1, &[(0, 5)], Err(E::WrittenTooMuch { id: 0, written: 5, writable: 4 }));
    lie("more of the second", 2, &[(0, 4), (2, 9)], Err(E::WrittenTooMuch { id: 2, written: 9, writable: 8 }));
}

#[test]
fn packed_lies() {
    const USED: u16 = 0x8080;
    let lie = |why, entries: &[(usize, u16, u32)], expected| {
        let tell = |world: &World| {
            let ring = world.slices().descriptors;
            for &(slot, id, written) in entries {
                ring.store_u32(16 * slot + 8, written, Ordering::Relaxed);
                ring.store_u16(16 * slot + 12, id, Ordering::Relaxed);
                ring.store_u16(16 * slot + 14, USED, Ordering::Relaxed);
            }
        };
        lie(why, Format::Packed, tell, expected);
    };
    use DeviceError as E;
    lie("nothing yet", &[], Ok(()));
    lie("both, in order", &[(0, 0, 4), (2, 1, 8)], Ok(()));
    lie("both, the later one first", &[(0, 1, 8), (1, 0, 4)], Ok(()));
    lie("one that can't be seen yet", &[(2, 1, 8)], Ok(()));
    lie("never given", &[(0, 2, 0)], Err(E::NotUnderWay { id: 2 }));
    lie("twice", &[(0, 0, 0), (2, 0, 0)], Err(E::NotUnderWay { id: 0 }));
    lie("out of the ring", &[(0, 4, 0)], Err(E::NoSuchChain { id: 4, size: 4 }));
    lie("more than is writable", &[(0, 0, 5)], Err(E::WrittenTooMuch { id: 0, written: 5, writable: 4 }));
    lie("one more than there are", &[(0, 0, 4), (2, 1, 8), (3, 1, 8)], Err(E::NothingUnderWay));
}

/// A driver's own mistakes change nothing.
#[test]
fn chains_that_are_not_added() {
    let buffer = |len, access| Descriptor { addr: BusAddr(0x1000), len, access };
    let (read, write) = (Access::Read, Access::Write);
    for format in [Format::Split, Format::Packed] {
        let rules = Rules { format, indirect: Indirect::Allowed, ..Rules::default() };
        let world = World::new(Kind::Flat, rules, 4, 0);
        let mut queue = DriverQueue::new(rules, 4, world.cells()).unwrap();
        queue.add(&[buffer(1, read)], None).unwrap();
        let mut table = world.table(0);
        table.memory = table.memory.sub(0, 31);
        for (buffers, table, expected) in [
            (vec![], None, AddError::NoBytes),
            (vec![buffer(0, read)], None, AddError::NoBytes),
            (vec![buffer(1, read), buffer(0, write)], None, AddError::NoBytes),
            (vec![buffer(1, write), buffer(1, read)], None, AddError::ReadAfterWrite),
            (vec![buffer(u32::MAX, read), buffer(1, write)], None, AddError::TooManyBytes),
            (vec![buffer(1, read); 5], None, AddError::TooManyBuffers { buffers: 5, limit: 4 }),
            (vec![buffer(1, read); 5], Some(world.table(0)), AddError::TooManyBuffers { buffers: 5, limit: 4 }),
            (vec![buffer(1, read); 4], None, AddError::Full { needed: 4, free: 3 }),
            (vec![buffer(1, read); 2], Some(table), AddError::TableTooSmall { needed: 32, len: 31 }),
        ] {
            assert_eq!(queue.add(&buffers, table), Err(expected), "{format:?} {buffers:?}");
            assert_eq!(queue.free(), 3);
        }
        queue.add(&[buffer(1, read); 4], Some(world.table(0))).unwrap();
        let mut queue = DriverQueue::new(Rules { format, ..Rules::default() }, 4, world.cells()).unwrap();
        assert_eq!(queue.add(&[buffer(1, read)], Some(world.table(0))), Err(AddError::IndirectRefused));
    }
}

/// Giving back what was never taken is refused before it can be seen.
#[test]
fn nothing_is_pushed_that_was_not_popped() {
    for format in [Format::Split, Format::Packed] {
        let rules = Rules { format, ..Rules::default() };
        let world = World::new(Kind::Flat, rules, 4, 0);
        let mut queue = DeviceQueue::new(rules, world.layout, Position::start(format)).unwrap();
        let pushed = queue.open(&world).push(Chain::default().head(), 0);
        assert_eq!(pushed, Err(RingStop::Broken(ringfence_ring::RingError::NothingUnderWay)));
        assert_eq!(queue.position(), Position::start(format));
    }
}

/// Whoever is told that something was used looks for it without waiting, and would look for ever.
#[test]
fn what_was_used_stays_used() {
    let rules = Rules { format: Format::Packed, ..Rules::default() };
    let world = World::new(Kind::Flat, rules, 4, 0);
    let mut queue = DriverQueue::new(rules, 4, world.cells()).unwrap();
    let buffer = Descriptor { addr: BusAddr(0x1000), len: 4, access: Access::Write };
    let flags = |place: usize, flags| world.slices().descriptors.store_u16(16 * place + 14, flags, Ordering::Relaxed);
    // Over more than a lap: a place that was seen in one lap says nothing of the next.
    for turn in 0..9 {
        queue.add(&[buffer], None).unwrap();
        assert_eq!(queue.enable_callbacks(), Ok(false));
        assert_eq!(queue.take_used(), Ok(None), "nothing yet, and nothing wrong");
        let (place, used) = (turn % 4, if turn / 4 % 2 == 0 { 0x8080 } else { 0 });
        world.slices().descriptors.store_u16(16 * place + 12, 0, Ordering::Relaxed);
        flags(place, used);
        assert_eq!(queue.enable_callbacks(), Ok(true));
        if turn == 8 {
            flags(place, 0x80);
        } else {
            assert!(queue.take_used().unwrap().is_some());
        }
    }
    let error = DeviceError::Unused { place: 0 };
    assert_eq!(queue.take_used(), Err(error));
    assert_eq!(queue.enable_callbacks(), Err(error));
    assert_eq!(queue.add(&[buffer], None), Err(AddError::Poisoned(error)));
}

/// A device that goes on with a chain after its queue was reset: what it says of that one is not taken for another's.
#[test]
fn a_chain_of_before_a_reset_is_not_taken_for_a_later_one() {
    for format in [Format::Split, Format::Packed] {
        for indirect in [Indirect::Refused, Indirect::Allowed] {
            let rules = Rules { format, indirect, ..Rules::default() };
            let world = World::new(Kind::Flat, rules, 8, 2);
            let buffers =
                [Access::Read, Access::Write].map(|access| Descriptor { addr: BusAddr(0x1000), len: 4, access });
            let table = |number| (indirect == Indirect::Allowed).then(|| world.table(number));
            // Once more when one was lost before, and once more when the queue broke.
            for resets in 1..4 {
                let mut queue = DriverQueue::new(rules, 8, world.cells()).unwrap();
                let late = queue.add(&buffers, table(0)).unwrap();
                for _ in 0..resets {
                    let mut lost = Vec::new();
                    queue.reset(|token, ()| lost.push(token));
                    assert!(lost.len() <= 1);
                }
                queue.add(&buffers, table(1)).unwrap();
                queue.publish();
                let id = late.index() as u16;
                let (descriptors, device) = (world.slices().descriptors, world.slices().device);
                match format {
                    Format::Split => {
                        device.store_u32(4, id.into(), Ordering::Relaxed);
                        device.store_u16(2, 1, Ordering::Relaxed);
                    }
                    Format::Packed => {
                        descriptors.store_u16(12, id, Ordering::Relaxed);
                        descriptors.store_u16(14, 0x8080, Ordering::Relaxed);
                    }
                }
                assert_eq!(queue.take_used(), Err(DeviceError::NotUnderWay { id }), "{rules:?}");
                // All of them are there again, each once.
                queue.reset(|_, ()| {});
                let mut all: Vec<_> = (0..8).map(|_| queue.add(&buffers[..1], None).unwrap()).collect();
                all.sort_unstable_by_key(|token| token.index());
                all.dedup();
                assert_eq!((all.len(), queue.free()), (8, 0));
            }
        }
    }
}
