//! The block driver against a strict disk, in each way of mapping and over each kind of ring.

use crate::world::*;
use ringfence_dma::{Buffer, BusAddr, DmaError, HostSlice, Mapped, Mapper, Permission};
use ringfence_driver::blk::{Answer, Blk, BlkError, Options, Request, RequestError, Unmap};
use ringfence_driver::embedded::EmbeddedError;
use ringfence_driver::policy::{Addressing, IommuMode};
use ringfence_ring::DeviceError;
use std::cell::Cell;

const RINGS: [u64; 8] = [
    0,
    EVENT_IDX,
    INDIRECT,
    INDIRECT | EVENT_IDX,
    PACKED,
    PACKED | EVENT_IDX,
    PACKED | INDIRECT,
    PACKED | INDIRECT | EVENT_IDX,
];

/// Everything that a disk does, with buffers in crumbs, and nothing left behind.
fn check(mapping: Mapping, ring: u64, mode: IommuMode) {
    let context = format!("{mapping:?}, ring {ring:#x}, {mode}");
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES | ring, mode);
    world.with_mapper(mapping, |mapper| {
        let before = world.domain.mapped();
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
        assert_eq!(disk.id().as_ref(), Ok(NAME), "{context}");

        // Across pages, and over pieces that are no whole sectors.
        let from: Vec<_> = [(100, 412), (PAGE - 1, 3 * PAGE), (6 * PAGE, 1), (20_000, 511)]
            .map(|(at, len)| world.buffer(at, len))
            .into();
        let data = stamp(1, 512 + 3 * PAGE + 512);
        let mut rest = &data[..];
        for buffer in &from {
            let (now, later) = rest.split_at(buffer.len());
            buffer.memory().write(0, now);
            rest = later;
        }
        // 412 + 3 * 4096 + 1 + 511 bytes are no whole sectors: 100 are missing.
        let sum = data.len() as u64 - 100;
        assert_eq!(disk.write(3, &from), Err(BlkError::Length { len: sum }), "{context}");
        let tail = world.buffer(40_000, 100);
        tail.memory().write(0, rest);
        let from = [&from[..], &[tail]].concat();
        disk.write(3, &from).unwrap();
        disk.flush().unwrap();

        let into = [world.buffer(50_001, data.len() - 7), world.buffer(90_000, 7)];
        into.iter().for_each(|buffer| buffer.memory().fill(0xaa));
        disk.read(3, &into).unwrap();
        assert_eq!(into.map(bytes).concat(), data, "{context}");

        disk.discard(3, 1).unwrap();
        disk.write_zeroes(5, 2, Unmap::Yes).unwrap();
        disk.read(3, &into).unwrap();
        let mut expected = data.clone();
        expected[..512].fill(0);
        expected[1024..2048].fill(0);
        assert_eq!(into.map(bytes).concat(), expected, "{context}");

        drop(disk);
        assert_eq!(world.domain.mapped(), before, "a mapping was forgotten: {context}");
    });
    let device = transport.device();
    assert_eq!(device.content[3 * 512 + 512..][..512], stamp(1, 1024)[512..], "{context}");
    assert_eq!(device.resets, 2, "once before and once after: {context}");
    assert!(world.domain.faults().latest.is_empty(), "{context}");
    let translated = !matches!((mapping, mode), (_, IommuMode::Off));
    let high = device.seen.iter().all(|addr| addr.0 > u64::MAX / 2);
    let low = device.seen.iter().all(|addr| addr.0 < (4 << 20));
    assert!(if translated { high } else { low }, "{context}: {:?}", device.seen);
    assert_eq!(translated, world.domain.translated() > 0, "{context}");
}

#[test]
fn a_disk_works_in_every_mapping_over_every_ring() {
    for ring in RINGS {
        for mapping in [Mapping::Static, Mapping::Dynamic, Mapping::Bounce] {
            check(mapping, ring, IommuMode::Offer);
            check(mapping, ring, IommuMode::Require);
        }
        check(Mapping::Direct, ring, IommuMode::Off);
    }
}

#[test]
fn many_requests_are_under_way_and_complete_in_any_mix_of_ways() {
    for ring in RINGS {
        let world = World::new();
        let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let options = Options { depth: 32, segments: 8 };
            let mut disk = Blk::start(&mut transport, new_driver(mapper), options).unwrap();
            let rings = world.domain.mapped();
            let buffer = |number: usize| world.buffer(number * 512, 512);
            for round in 0..50 {
                let mut pending = Vec::new();
                loop {
                    let number = pending.len();
                    buffer(number).memory().write(0, &stamp(round + number, 512));
                    let from = [buffer(number)];
                    match disk.submit(Request::Write { sector: number as u64, from: &from }) {
                        Ok(id) => pending.push(id),
                        Err(BlkError::Busy) => break,
                        Err(error) => panic!("{error}"),
                    }
                }
                // Without a table each takes three of the ring's descriptors.
                assert_eq!(pending.len(), if ring & INDIRECT == 0 { 10 } else { 32 });
                assert_eq!(world.domain.mapped(), rings + pending.len(), "each is lent until it is done");
                // Waiting for one more request has to get others out of the way, and may not lose them.
                assert_eq!(disk.id().as_ref(), Ok(NAME));
                // All are done now, and not polled. That may stop who does not poll, and nobody else.
                if ring & INDIRECT != 0 {
                    assert_eq!(disk.submit(Request::Flush), Err(BlkError::Busy));
                }
                assert_eq!(disk.id().as_ref(), Ok(NAME));
                let mut left = pending.len();
                while left > 0 {
                    disk.notify().unwrap();
                    match disk.poll().unwrap() {
                        Some(completion) => {
                            assert_eq!(completion.result, Ok(Answer::Done));
                            let at = pending.iter().position(|&id| id == completion.id).expect("one of ours, once");
                            pending.swap_remove(at);
                            left -= 1;
                        }
                        None => disk.wait().unwrap(),
                    }
                }
                assert_eq!(disk.poll(), Ok(None));
                assert_eq!(world.domain.mapped(), rings);
                let content = &disk.device().transport().device().content;
                for number in 0..10 {
                    assert_eq!(content[number * 512..][..512], stamp(round + number, 512));
                }
            }
        });
    }
}

#[test]
fn a_request_waits_for_room_in_the_pool_and_a_long_one_is_cut() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES, IommuMode::Offer);
    world.with_mapper(Mapping::Bounce, |mapper| {
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
        // 8 pages at most in one piece, so this takes 32 of them.
        let whole = world.buffer(0, 256 * PAGE);
        whole.memory().write(0, &stamp(5, 256 * PAGE));
        let part = whole.sub(0, 200 * PAGE);
        let full = match disk.write(0, &[whole]) {
            Err(BlkError::Dma(error @ DmaError::PoolFull { .. })) => error,
            other => panic!("{other:?}"),
        };
        assert!(full.is_transient());
        disk.write(0, &[part]).unwrap();
        // What is under way has to come back before this one finds room.
        let id = disk.submit(Request::Write { sector: 0, from: &[part] }).unwrap();
        let into = world.buffer(256 * PAGE, 200 * PAGE);
        disk.read(0, &[into]).unwrap();
        assert_eq!(bytes(into), bytes(part));
        assert_eq!(disk.poll().unwrap().unwrap().id, id);
    });
}

#[test]
fn nonsense_does_not_reach_the_device() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES | READ_ONLY, IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let rings_only = {
            let mut disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
            assert_eq!(disk.write(0, &[world.buffer(0, 512)]), Err(BlkError::ReadOnly));
            assert_eq!(disk.discard(0, 1), Err(BlkError::ReadOnly));
            world.domain.mapped()
        };
        drop(std::mem::replace(&mut transport, world.embedded(DISK_FEATURES & !(1 << 14), IommuMode::Offer)));
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options { depth: 64, segments: 4 }).unwrap();
        let sector = world.buffer(0, 512);
        let end = SECTORS as u64;
        for (at, buffers, error) in [
            (0, vec![], BlkError::Length { len: 0 }),
            (0, vec![world.buffer(0, 511)], BlkError::Length { len: 511 }),
            (end, vec![sector], BlkError::OutOfRange { sector: end, sectors: 1 }),
            (end - 1, vec![sector; 2], BlkError::OutOfRange { sector: end - 1, sectors: 2 }),
            (u64::MAX, vec![sector], BlkError::OutOfRange { sector: u64::MAX, sectors: 1 }),
            (0, vec![sector; 5], BlkError::TooLong { count: 5, max: 4 }),
        ] {
            assert_eq!(disk.read(at, &buffers), Err(error));
            assert_eq!(disk.write(at, &buffers), Err(error));
        }
        assert_eq!(disk.discard(0, 65), Err(BlkError::TooLong { count: 65, max: 64 }));
        assert_eq!(disk.discard(0, 0), Err(BlkError::Length { len: 0 }));
        assert_eq!(disk.discard(end, 1), Err(BlkError::OutOfRange { sector: end, sectors: 1 }));
        assert_eq!(disk.write_zeroes(0, 1, Unmap::No), Err(BlkError::NotOffered));
        assert_eq!(disk.device().transport().device().kicks, 0);
        assert!(world.domain.mapped() <= rings_only);
        disk.read(0, &[sector]).unwrap();
    });
}

#[test]
fn a_writethrough_disk_needs_no_flush() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES & !(1 << 9), IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
        assert!(!disk.geometry().cached);
        assert_eq!(disk.flush(), Ok(()));
        assert_eq!(disk.submit(Request::Flush), Err(BlkError::NotOffered));
        assert_eq!(disk.device().transport().device().kicks, 0);
    });
}

#[test]
fn whatever_the_disk_answers_is_an_error_with_a_name() {
    for ring in [0, PACKED] {
        for (mood, error) in [
            (Mood::Status(1), RequestError::Io),
            (Mood::Status(2), RequestError::Unsupported),
            (Mood::Status(3), RequestError::Status(3)),
            (Mood::Status(0x80), RequestError::Status(0x80)),
            (Mood::NoStatus, RequestError::Status(0xff)),
            (Mood::Written(-1), RequestError::Short { written: 512, expected: 513 }),
            (Mood::Written(-513), RequestError::Short { written: 0, expected: 513 }),
        ] {
            let world = World::new();
            let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
            world.with_mapper(Mapping::Dynamic, |mapper| {
                let mut disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
                disk.device_mut().transport_mut().device_mut().mood = mood;
                let into = [world.buffer(0, 512)];
                assert_eq!(disk.read(0, &into), Err(BlkError::Failed(error)), "{mood:?}");
                disk.device_mut().transport_mut().device_mut().mood = Mood::Good;
                assert_eq!(disk.read(0, &into), Ok(()), "after {mood:?} the disk goes on");
            });
        }
    }
}

#[test]
fn a_disk_that_breaks_the_ring_is_of_no_use_any_more_and_its_buffers_stay_lent_until_it_is_reset() {
    for ring in [0, PACKED] {
        for mood in [Mood::Written(1), Mood::Written(1 << 20), Mood::Invented] {
            let world = World::new();
            let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
            world.with_mapper(Mapping::Dynamic, |mapper| {
                let mut disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
                let rings = world.domain.mapped();
                disk.device_mut().transport_mut().device_mut().mood = mood;
                let into = [world.buffer(0, 512)];
                let broken: DeviceError = match disk.read(0, &into) {
                    Err(BlkError::Broken(error)) => error,
                    other => panic!("{mood:?}: {other:?}"),
                };
                assert_eq!(disk.read(0, &into), Err(BlkError::Broken(broken)));
                assert_eq!(disk.poll(), Err(BlkError::Broken(broken)));
                assert_eq!(disk.flush(), Err(BlkError::Broken(broken)));
                assert_eq!(world.domain.mapped(), rings + 1, "the device may still write there");
                drop(disk);
                assert_eq!(world.domain.mapped(), 0);
            });
            assert_eq!(transport.device().resets, 2);
        }
    }
}

#[test]
fn a_disk_that_does_not_answer_is_given_up() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES, IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
        disk.device_mut().transport_mut().device_mut().mood = Mood::Sleepy;
        let stalled = BlkError::Transport(EmbeddedError::Stalled { queue: 0 });
        assert_eq!(disk.read(0, &[world.buffer(0, 512)]), Err(stalled));
        drop(disk);
        assert_eq!(world.domain.mapped(), 0);
    });
}

/// Takes the device's right to a buffer away behind the driver's back, as a broken platform might.
struct Sabotage<'m> {
    inner: &'m dyn Mapper,
    how: Cell<How>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Fine,
    /// Maps for the other direction.
    Reversed,
    /// Hands out an address where nothing is.
    Elsewhere,
    /// Skips the translation.
    Physical,
}

impl Mapper for Sabotage<'_> {
    fn max_len(&self) -> usize {
        self.inner.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        let permission = match (self.how.get(), permission) {
            (How::Reversed, Permission::ReadOnly) => Permission::WriteOnly,
            (How::Reversed, Permission::WriteOnly) => Permission::ReadOnly,
            _ => permission,
        };
        let mut mapped = self.inner.map(buffer, permission)?;
        mapped.cookie = mapped.addr.0 as usize;
        match self.how.get() {
            How::Fine | How::Reversed => {}
            How::Elsewhere => mapped.addr.0 ^= 1 << 40,
            How::Physical => mapped.addr = BusAddr(buffer.physical().0),
        }
        Ok(mapped)
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        let addr = BusAddr(mapped.cookie as u64);
        self.inner.unmap(Mapped { addr, ..mapped }, buffer, permission);
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.inner.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.inner.free(mapped);
    }
}

#[test]
fn a_forbidden_page_faults_and_the_driver_reports_an_error() {
    for ring in [0, PACKED | INDIRECT] {
        for how in [How::Reversed, How::Elsewhere, How::Physical] {
            let world = World::new();
            let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
            world.with_mapper(Mapping::Dynamic, |strict| {
                let mapper = Sabotage { inner: strict, how: Cell::new(How::Fine) };
                let mut disk = Blk::start(&mut transport, new_driver(&mapper), Options::default()).unwrap();
                assert_eq!(disk.device().addressing(), Addressing::Translated);
                let good = world.buffer(0, 512);
                good.memory().fill(0x77);
                disk.write(9, &[good]).unwrap();

                mapper.how.set(how);
                let bad = world.buffer(PAGE, 512);
                bad.memory().fill(0x55);
                assert_eq!(disk.read(9, &[bad]), Err(BlkError::Failed(RequestError::Io)), "{how:?}");
                assert_eq!(bytes(bad), [0x55; 512], "not a byte arrived: {how:?}");
                assert_eq!(disk.write(9, &[bad]), Err(BlkError::Failed(RequestError::Io)), "{how:?}");
                assert_eq!(world.domain.faults().total, 2, "{how:?}");

                mapper.how.set(How::Fine);
                disk.read(9, &[bad]).unwrap();
                assert_eq!(bytes(bad), [0x77; 512], "the disk goes on: {how:?}");
            });
        }
    }
}

/// Chains of every length take turns at the same descriptors, so that what stands of an earlier one is never taken for
/// what belongs to a later one.
#[test]
fn requests_of_all_shapes_take_turns() {
    for ring in RINGS {
        let world = World::new();
        let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let options = Options { depth: 32, segments: 4 };
            let mut disk = Blk::start(&mut transport, new_driver(mapper), options).unwrap();
            let mut random = 7_u32;
            let mut below = |limit: u32| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((random >> 12) % limit) as usize
            };
            let mut content = vec![0_u8; 64 * 512];
            for round in 0..400 {
                // What each read is to find, in which memory; nothing overlaps within a round.
                let mut reads = Vec::new();
                let mut under_way = 0;
                for sector in 0..1 + below(12) {
                    // Those whose number divides a sector.
                    let pieces = 1 << below(3);
                    let buffers: Vec<_> =
                        (0..pieces).map(|piece| world.buffer(sector * 4096 + piece * 512, 512 / pieces)).collect();
                    let at = sector * 512;
                    let request = if below(2) == 0 {
                        let data = stamp(round * 64 + sector, 512);
                        let mut rest = &data[..];
                        for buffer in &buffers {
                            buffer.memory().write(0, &rest[..buffer.len()]);
                            rest = &rest[buffer.len()..];
                        }
                        content[at..at + 512].copy_from_slice(&data);
                        Request::Write { sector: sector as u64, from: &buffers }
                    } else {
                        buffers.iter().for_each(|buffer| buffer.memory().fill(0xaa));
                        Request::Read { sector: sector as u64, into: &buffers }
                    };
                    match disk.submit(request) {
                        Ok(_) => under_way += 1,
                        Err(BlkError::Busy) => {
                            // A write that was not made; what is there was written by an earlier one, or by none.
                            let there = &disk.device().transport().device().content;
                            content[at..at + 512].copy_from_slice(&there[at..at + 512]);
                            continue;
                        }
                        Err(error) => panic!("{error}"),
                    }
                    if matches!(request, Request::Read { .. }) {
                        reads.push((content[at..at + 512].to_vec(), buffers));
                    }
                }
                while under_way > 0 {
                    disk.notify().unwrap();
                    match disk.poll().unwrap() {
                        Some(completion) => {
                            assert_eq!(completion.result, Ok(Answer::Done));
                            under_way -= 1;
                        }
                        None => disk.wait().unwrap(),
                    }
                }
                for (expected, buffers) in reads {
                    let found: Vec<u8> = buffers.into_iter().flat_map(bytes).collect();
                    assert_eq!(found, expected, "ring {ring:#x}, round {round}");
                }
                assert_eq!(disk.device().transport().device().content[..64 * 512], content);
            }
        });
    }
}

#[test]
fn a_request_by_itself_is_told_of_at_once() {
    for ring in [0, EVENT_IDX, INDIRECT, PACKED, PACKED | EVENT_IDX] {
        let world = World::new();
        let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
            for round in 0..500 {
                let kicks = disk.device_mut().transport_mut().device_mut().kicks;
                let id = disk.send(Request::Read { sector: 1, into: &[world.buffer(0, 512)] }).unwrap();
                // A device that did not ask to be told of this one is looked at.
                let told = disk.device_mut().transport_mut().device_mut().kicks - kicks;
                assert_eq!(told, u32::from(ring & EVENT_IDX == 0 || told == 1), "round {round}, ring {ring:#x}");
                let ended = loop {
                    match disk.poll().unwrap() {
                        Some(ended) => break ended,
                        None => disk.wait().unwrap(),
                    }
                };
                assert_eq!((ended.id, ended.result), (id, Ok(Answer::Done)));
            }
        });
    }
}
