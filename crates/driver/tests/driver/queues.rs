//! A disk of several queues, each of which is restarted by itself.

use crate::peer::*;
use crate::world::*;
use ringfence_driver::Transport;
use ringfence_driver::blk::{Answer, Blk, BlkError, Completion, Options, Request, RequestError};
use ringfence_driver::embedded::EmbeddedError;
use ringfence_driver::policy::IommuMode;
use std::cell::Cell;

const MQ: u64 = 1 << 12;
const QUEUES: u16 = 3;
const OPTIONS: Options = Options { depth: 16, segments: 2 };

/// A disk of a few sectors, which answers no read while it is `asleep`.
fn disk<'p>(world: &World, features: u64, asleep: &'p Cell<bool>) -> Peer<'p> {
    let answer = |_: u16, _: &[u8], room: usize| (!asleep.get()).then(|| [vec![7; room - 1], vec![0]].concat());
    let mut peer = Peer::new(world, 2, QUEUES.into(), MQ | features, answer);
    peer.config = [64_u64.to_le_bytes().to_vec(), vec![0; 52]].concat();
    peer
}

#[test]
fn a_queue_is_restarted_and_the_others_go_on() {
    for ring in [0, EVENT_IDX, INDIRECT, PACKED, PACKED | EVENT_IDX, PACKED | INDIRECT] {
        let (world, asleep) = (World::new(), Cell::new(true));
        let mut transport = disk(&world, RING_RESET | ring, &asleep).embedded(IommuMode::Require);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut disk = Blk::start_queues(&mut transport, new_driver(mapper), OPTIONS, QUEUES).unwrap();
            let idle = world.domain.mapped();
            let buffer = |number: usize| [world.buffer(number * 512, 512)];
            let (transport, mut queues) = disk.split();
            let mut asked = Vec::new();
            for (number, queue) in queues.iter_mut().enumerate() {
                let mut ask =
                    |turn| queue.submit(Request::Read { sector: 1, into: &buffer(2 * number + turn) }).unwrap();
                asked.push([ask(0), ask(1)]);
                assert!(queue.publish().unwrap());
                transport.notify(number as u16).unwrap();
            }
            assert_eq!(world.domain.mapped(), idle + 6);

            queues[1].restart(transport).unwrap();
            assert_eq!(world.domain.mapped(), idle + 4, "what this queue had is back, and nothing else");
            let lost = |id| Ok(Some(Completion { id, result: Err(RequestError::Lost) }));
            assert_eq!(queues[1].listen(), Ok(true), "something is to be heard");
            assert_eq!(asked[1].map(|_| queues[1].poll()), asked[1].map(lost));
            assert_eq!(queues[1].poll(), Ok(None));

            asleep.set(false);
            let again = queues[1].submit(Request::Read { sector: 1, into: &buffer(6) }).unwrap();
            assert!(!asked[1].contains(&again), "an id names one request");
            assert!(queues[1].publish().unwrap());
            transport.notify(1).unwrap();
            for (number, expected) in [(0, &asked[0][..]), (1, &[again]), (2, &asked[2])] {
                for &id in expected {
                    while !queues[number].has_used() {
                        transport.wait(number as u16).unwrap();
                    }
                    let done = Completion { id, result: Ok(Answer::Done) };
                    assert_eq!(queues[number].poll(), Ok(Some(done)), "queue {number}, ring {ring:#x}");
                }
            }
            assert_eq!(bytes(buffer(6)[0]), [7; 512]);
            assert_eq!(world.domain.mapped(), idle);

            asleep.set(true);
            let asked = [0, 1, 2]
                .map(|number| queues[number].submit(Request::Read { sector: 1, into: &buffer(number) }).unwrap());
            disk.restart().unwrap();
            assert_eq!(world.domain.mapped(), idle, "all of them");
            assert_eq!(disk.poll().unwrap(), lost(asked[0]).unwrap());
            let (_, mut queues) = disk.split();
            assert_eq!(queues[2].poll(), lost(asked[2]));
        });
        assert_eq!((world.domain.mapped(), transport.device().queue_resets), (0, 1 + u32::from(QUEUES)));
    }
}

#[test]
fn a_queue_that_cannot_be_restarted_keeps_what_it_has() {
    let (world, asleep) = (World::new(), Cell::new(true));
    let mut transport = disk(&world, 0, &asleep).embedded(IommuMode::Require);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start_queues(&mut transport, new_driver(mapper), OPTIONS, QUEUES).unwrap();
        let idle = world.domain.mapped();
        let (transport, mut queues) = disk.split();
        queues[2].submit(Request::Read { sector: 1, into: &[world.buffer(0, 512)] }).unwrap();
        let error = BlkError::Transport(EmbeddedError::NotRunning { queue: 2 });
        assert_eq!(queues[2].restart(transport), Err(error));
        assert_eq!((world.domain.mapped(), queues[2].under_way()), (idle + 1, 1));
        assert_eq!(disk.restart(), Err(BlkError::NotOffered));
    });
}

/// Requests that were lost and that nobody has asked about take up room, as those under way do.
#[test]
fn what_was_lost_is_kept_within_limits() {
    for ring in [0, PACKED | INDIRECT] {
        let (world, asleep) = (World::new(), Cell::new(true));
        let mut transport = disk(&world, RING_RESET | ring, &asleep).embedded(IommuMode::Require);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut disk = Blk::start_queues(&mut transport, new_driver(mapper), OPTIONS, QUEUES).unwrap();
            let (transport, mut queues) = disk.split();
            let queue = &mut queues[1];
            let mut under_way = std::collections::HashSet::new();
            for _ in 0..20 {
                let into = [world.buffer(0, 512)];
                let busy = loop {
                    match queue.submit(Request::Read { sector: 1, into: &into }) {
                        Ok(id) => assert!(under_way.insert(id)),
                        Err(error) => break error,
                    }
                };
                assert_eq!(busy, BlkError::Busy);
                queue.restart(transport).unwrap();
                for _ in 0..3 {
                    let lost = queue.poll().unwrap().expect("as many as were under way");
                    assert!(under_way.remove(&lost.id));
                }
            }
            while let Some(lost) = queue.poll().unwrap() {
                assert!(under_way.remove(&lost.id) && lost.result == Err(RequestError::Lost));
            }
            assert!(under_way.is_empty());
        });
    }
}
