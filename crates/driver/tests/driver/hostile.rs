//! A device that writes whatever it likes wherever it can, at any time: into rings, records and buffers.

use crate::peer::Peer;
use crate::world::*;
use proptest::prelude::*;
use ringfence_dma::{Gpa, Physical};
use ringfence_driver::blk::{Blk, BlkError, Options, Request, RequestId};
use ringfence_driver::policy::IommuMode;
use ringfence_driver::{LoanError, net};
use std::collections::HashSet;

#[derive(Clone, Debug)]
enum Step {
    Read(u8),
    Write(u8),
    Discard,
    Id,
    Poll,
    Notify,
    /// The device serves what there is.
    Wait,
    /// The device writes over something, as far into coherent memory as this.
    Scribble {
        at: u16,
        bytes: Vec<u8>,
    },
    /// The same, aimed: an index near what it should be.
    Nudge {
        at: u16,
        by: i8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => any::<u8>().prop_map(Step::Read),
        3 => any::<u8>().prop_map(Step::Write),
        1 => Just(Step::Discard),
        1 => Just(Step::Id),
        4 => Just(Step::Poll),
        2 => Just(Step::Notify),
        2 => Just(Step::Wait),
        2 => (0..3000_u16, prop::collection::vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Step::Scribble { at, bytes }),
        4 => (0..1200_u16, any::<i8>()).prop_map(|(at, by)| Step::Nudge { at, by }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// No panic; each request completes at most once; a broken disk stays broken; what is lent is lent until it came
    /// back or the device was reset, and everything is back in the end.
    #[test]
    fn a_hostile_device_gets_nowhere(
        ring in prop::sample::select(vec![0, EVENT_IDX, INDIRECT, PACKED, PACKED | EVENT_IDX, PACKED | INDIRECT]),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let world = World::new();
        let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
        transport.device_mut().careless = true;
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut disk = Blk::start(&mut transport, new_driver(mapper), Options { depth: 8, segments: 4 }).unwrap();
            let idle = world.domain.mapped();
            let mut pending: HashSet<RequestId> = HashSet::new();
            let mut broken = None;
            for step in steps {
                let buffer = |number: u8| [world.buffer(usize::from(number) * 512, 512)];
                let result = match step {
                    Step::Read(number) => disk.submit(Request::Read { sector: 1, into: &buffer(number) }).map(Some),
                    Step::Write(number) => disk.submit(Request::Write { sector: 1, from: &buffer(number) }).map(Some),
                    Step::Discard => disk.submit(Request::Discard { sector: 1, sectors: 1 }).map(Some),
                    Step::Id => disk.submit(Request::Id).map(Some),
                    Step::Notify => disk.notify().map(|()| None),
                    Step::Wait => disk.wait().map(|()| None),
                    Step::Poll => disk.poll().map(|completion| {
                        if let Some(completion) = completion {
                            assert!(pending.remove(&completion.id), "{completion:?} was not under way");
                        }
                        None
                    }),
                    Step::Scribble { at, bytes } => {
                        let memory = world.ram.slice(usize::from(at), bytes.len());
                        memory.write(0, &bytes);
                        Ok(None)
                    }
                    Step::Nudge { at, by } => {
                        let memory = Physical::slice(&*world.ram, Gpa(at.into()), 1).unwrap();
                        let mut byte = [0];
                        memory.read(0, &mut byte);
                        memory.write(0, &[byte[0].wrapping_add_signed(by)]);
                        Ok(None)
                    }
                };
                match result {
                    Ok(id) => pending.extend(id),
                    Err(BlkError::Broken(error)) => {
                        assert_eq!(*broken.get_or_insert(error), error);
                    }
                    Err(BlkError::Busy | BlkError::Transport(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                if let Some(error) = broken {
                    assert_eq!(disk.poll(), Err(BlkError::Broken(error)));
                }
                assert!(world.domain.mapped() <= idle + pending.len());
            }
            drop(disk);
            assert_eq!(world.domain.mapped(), 0);
        });
    }
}

#[derive(Clone, Debug)]
enum NetStep {
    Offer(u8),
    Received,
    Send(u8),
    Sent,
    Notify,
    Wait,
    Scribble { at: u16, bytes: Vec<u8> },
    Nudge { at: u16, by: i8 },
}

fn net_step() -> impl Strategy<Value = NetStep> {
    prop_oneof![
        3 => any::<u8>().prop_map(NetStep::Offer),
        4 => Just(NetStep::Received),
        3 => any::<u8>().prop_map(NetStep::Send),
        4 => Just(NetStep::Sent),
        2 => Just(NetStep::Notify),
        2 => Just(NetStep::Wait),
        2 => (0..9000_u16, prop::collection::vec(any::<u8>(), 1..16))
            .prop_map(|(at, bytes)| NetStep::Scribble { at, bytes }),
        // The two rings of 8 begin on pages of their own.
        4 => (0..2_u16, 0..300_u16, any::<i8>())
            .prop_map(|(ring, at, by)| NetStep::Nudge { at: ring * 4096 + at, by }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same for what the simpler drivers have in common: each buffer comes back at most once, with no more bytes than
    /// it has.
    #[test]
    fn a_hostile_card_gets_nowhere(
        ring in prop::sample::select(vec![0, EVENT_IDX, PACKED, PACKED | EVENT_IDX]),
        steps in prop::collection::vec(net_step(), 1..60),
    ) {
        let world = World::new();
        let mut peer = Peer::new(&world, 1, 2, ring, |queue, _, room| Some(vec![7; if queue == 0 { room.min(60) } else { 0 }]));
        peer.careless = true;
        let mut transport = peer.embedded(IommuMode::Offer);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let options = net::Options { depth: 8, segments: 1 };
            let mut card = net::Net::start(&mut transport, new_driver(mapper), options).unwrap();
            let idle = world.domain.mapped();
            let (mut offered, mut sent) = (HashSet::new(), HashSet::new());
            for step in steps {
                let buffer = |number: u8| world.buffer(usize::from(number) * 2048, 1514);
                let result = match step {
                    NetStep::Offer(number) => card.offer(buffer(number)).map(|id| {
                        offered.insert(id);
                    }),
                    NetStep::Send(number) => card.send(&[buffer(number)]).map(|id| {
                        sent.insert(id);
                    }),
                    NetStep::Received => card.received().map(|received| if let Some(received) = received {
                        assert!(received.len <= received.buffer.len());
                        assert!(offered.remove(&received.id));
                    }),
                    NetStep::Sent => card.sent().map(|id| if let Some(id) = id {
                        assert!(sent.remove(&id));
                    }),
                    NetStep::Notify => card.notify(),
                    NetStep::Wait => card.wait(),
                    NetStep::Scribble { at, bytes } => {
                        world.ram.slice(usize::from(at), bytes.len()).write(0, &bytes);
                        Ok(())
                    }
                    NetStep::Nudge { at, by } => {
                        let memory = world.ram.slice(at.into(), 1);
                        let mut byte = [0];
                        memory.read(0, &mut byte);
                        memory.write(0, &[byte[0].wrapping_add_signed(by)]);
                        Ok(())
                    }
                };
                match result {
                    Ok(()) | Err(LoanError::Busy | LoanError::Transport(_) | LoanError::Broken(_)) => {}
                    // Its buffer is back, and nobody says which it was.
                    Err(LoanError::Short { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
                assert!(world.domain.mapped() <= idle + offered.len() + sent.len());
            }
            drop(card);
            assert_eq!(world.domain.mapped(), 0);
        });
    }
}
