//! The drivers of net, rng and console against strict devices, and against devices that break the rules.

use crate::peer::*;
use crate::world::*;
use ringfence_dma::Buffer;
use ringfence_driver::console::{Console, Size};
use ringfence_driver::embedded::EmbeddedError;
use ringfence_driver::net::{Link, Net, Options};
use ringfence_driver::policy::IommuMode;
use ringfence_driver::rng::Rng;
use ringfence_driver::{LoanError, StartError};
use std::cell::RefCell;
use std::collections::VecDeque;

const RINGS: [u64; 4] = [0, EVENT_IDX, PACKED, PACKED | INDIRECT | EVENT_IDX];
const MAPPINGS: [Mapping; 3] = [Mapping::Static, Mapping::Dynamic, Mapping::Bounce];

fn rng<'p>(world: &World, ring: u64, answer: impl FnMut(u16, &[u8], usize) -> Option<Vec<u8>> + 'p) -> Peer<'p> {
    Peer::new(world, 4, 1, ring, answer)
}

#[test]
fn random_bytes_arrive_and_are_counted() {
    for (ring, mapping) in RINGS.into_iter().flat_map(|ring| MAPPINGS.map(|mapping| (ring, mapping))) {
        let world = World::new();
        let mut transport = rng(&world, ring, |_, read, room| {
            assert!(read.is_empty());
            Some(stamp(1, room.min(40)))
        })
        .embedded(IommuMode::Require);
        world.with_mapper(mapping, |mapper| {
            let mut rng = Rng::start(&mut transport, new_driver(mapper)).unwrap();
            let into = world.buffer(100, 64);
            into.memory().fill(0xaa);
            assert_eq!(rng.fill(into), Ok(40), "{mapping:?}, ring {ring:#x}");
            assert_eq!(bytes(into), [stamp(1, 40), vec![0; 24]].concat(), "no old bytes");
            // As many as the queue takes, and one by one again.
            let mut asked = Vec::new();
            let busy = loop {
                match rng.submit(world.buffer(1000 + 10 * asked.len(), 10)) {
                    Ok(id) => asked.push(id),
                    Err(error) => break error,
                }
            };
            assert_eq!((busy, asked.len()), (LoanError::Busy, 8));
            rng.notify().unwrap();
            while !asked.is_empty() {
                match rng.poll().unwrap() {
                    Some(entropy) => {
                        assert_eq!(bytes(entropy.buffer), stamp(1, 10));
                        asked.retain(|id| *id != entropy.id);
                    }
                    None => rng.wait().unwrap(),
                }
            }
            assert!(rng.poll().unwrap().is_none());
        });
        assert_eq!((world.domain.mapped(), transport.device().resets), (0, 2));
    }
}

#[test]
fn a_source_of_nothing_is_named() {
    let world = World::new();
    let mut transport = rng(&world, 0, |_, _, _| Some(vec![])).embedded(IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut rng = Rng::start(&mut transport, new_driver(mapper)).unwrap();
        assert_eq!(rng.fill(world.buffer(0, 8)), Err(LoanError::Short { written: 0, expected: 1 }));
        assert_eq!(rng.fill(world.buffer(0, 0)), Err(LoanError::TooShort { len: 0, needed: 1 }));
    });
    let mut transport = rng(&world, 0, |_, _, _| None).embedded(IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut rng = Rng::start(&mut transport, new_driver(mapper)).unwrap();
        let stalled = LoanError::Transport(EmbeddedError::Stalled { queue: 0 });
        assert_eq!(rng.fill(world.buffer(0, 8)), Err(stalled));
        drop(rng);
        assert_eq!(world.domain.mapped(), 0);
    });
}

/// A card that sends back what it gets, and strict about headers.
fn echo<'p>(inbox: &'p RefCell<VecDeque<Vec<u8>>>) -> impl FnMut(u16, &[u8], usize) -> Option<Vec<u8>> + 'p {
    |queue, read, room| match queue {
        0 => {
            assert!(room >= 12 + 1514 && read.is_empty(), "room for {room} bytes");
            let packet = inbox.borrow_mut().pop_front()?;
            let mut header = [0; 12];
            header[10] = 1;
            Some([&header[..], &packet].concat())
        }
        _ => {
            assert_eq!(read[..12], [0; 12], "no offloads");
            assert_eq!(room, 0);
            inbox.borrow_mut().push_back(read[12..].to_vec());
            Some(vec![])
        }
    }
}

const MAC: u64 = 1 << 5;
const STATUS: u64 = 1 << 16;
const MTU: u64 = 1 << 3;

#[test]
fn packets_go_and_come() {
    for (ring, mapping) in RINGS.into_iter().flat_map(|ring| MAPPINGS.map(|mapping| (ring, mapping))) {
        let world = World::new();
        let inbox = RefCell::default();
        let mut peer = Peer::new(&world, 1, 2, ring | MAC | STATUS, echo(&inbox));
        peer.config = vec![2, 0, 0, 0, 0, 9, 1, 0];
        let mut transport = peer.embedded(IommuMode::Require);
        world.with_mapper(mapping, |mapper| {
            let mut net = Net::start(&mut transport, new_driver(mapper), Options { depth: 32, segments: 3 }).unwrap();
            assert_eq!((net.card().mac, net.card().mtu), (Some([2, 0, 0, 0, 0, 9]), None));
            assert_eq!(net.link(), Ok(Link::Up));
            let room = |number: usize| world.buffer(number * 2000, 1600);
            let mut offered: Vec<_> = (0..4).map(|number| net.offer(room(number)).unwrap()).collect();
            let packet = [world.buffer(100_000, 14), world.buffer(104_090, 100)];
            for round in 0..40 {
                packet[0].memory().write(0, &stamp(round, 14));
                packet[1].memory().write(0, &stamp(round + 1, 100));
                let id = net.send(&packet).unwrap();
                net.notify().unwrap();
                while net.sent().unwrap() != Some(id) {
                    net.wait_sent().unwrap();
                }
                let received = loop {
                    match net.received().unwrap() {
                        Some(received) => break received,
                        None => net.wait().unwrap(),
                    }
                };
                assert_eq!(received.id, offered.remove(0));
                assert_eq!(received.len, 114);
                let seen = bytes(received.buffer.sub(0, 114));
                assert_eq!(seen, [stamp(round, 14), stamp(round + 1, 100)].concat());
                offered.push(net.offer(received.buffer).unwrap());
            }
            assert!(net.received().unwrap().is_none());
        });
        assert_eq!(world.domain.mapped(), 0);
    }
}

#[test]
fn nonsense_does_not_reach_a_card_and_its_own_is_named() {
    let world = World::new();
    let start = |config: Vec<u8>, features, modest| {
        let inbox = Box::leak(Box::new(RefCell::default()));
        let mut peer = Peer::new(&world, 1, 2, features, echo(inbox));
        (peer.config, peer.modest) = (config, modest);
        peer.embedded(IommuMode::Offer)
    };
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let options = Options { depth: 4, segments: 2 };
        let mut transport = start(vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 67, 0], MTU, 0);
        let error = Net::start(&mut transport, new_driver(mapper), options).err();
        assert_eq!(error, Some(StartError::Config { field: "mtu", value: 67 }));

        let mut transport = start(vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x27], MTU | STATUS, 0);
        let mut net = Net::start(&mut transport, new_driver(mapper), options).unwrap();
        assert_eq!((net.link(), net.packet_len()), (Ok(Link::Down), 10_014));
        let idle = world.domain.mapped();
        assert_eq!(net.offer(world.buffer(0, 10_013)), Err(LoanError::TooShort { len: 10_013, needed: 10_014 }));
        assert_eq!(net.send(&[world.buffer(0, 13)]), Err(LoanError::TooShort { len: 13, needed: 14 }));
        assert_eq!(net.send(&[]), Err(LoanError::TooShort { len: 0, needed: 14 }));
        assert_eq!(net.send(&[world.buffer(0, 10_015)]), Err(LoanError::TooLong { count: 10_015, max: 10_014 }));
        assert_eq!(net.send(&[world.buffer(0, 20); 3]), Err(LoanError::TooLong { count: 3, max: 2 }));
        assert_eq!(world.domain.mapped(), idle, "nothing was lent");
        // Two descriptors each, and there are four.
        net.send(&[world.buffer(0, 20)]).unwrap();
        net.send(&[world.buffer(0, 20)]).unwrap();
        assert_eq!(net.send(&[world.buffer(0, 20)]), Err(LoanError::Busy));
        drop(net);

        let mut transport = start(vec![], 0, 0);
        let mut net = Net::start(&mut transport, new_driver(mapper), options).unwrap();
        let runt = net.offer(world.buffer(0, 1514)).unwrap();
        net.send(&[world.buffer(4000, 15)]).unwrap();
        net.notify().unwrap();
        // The header and 15 bytes are written, and it says that it were 16 fewer.
        net.device_mut().transport_mut().device_mut().modest = 16;
        net.wait().unwrap();
        assert_eq!(net.received().err(), Some(LoanError::Short { written: 11, expected: 12 }));
        assert_ne!(net.offer(world.buffer(0, 1514)), Ok(runt), "the card goes on");
    });
}

#[test]
fn a_console_reads_and_writes() {
    for ring in RINGS {
        let world = World::new();
        let screen = RefCell::new(Vec::new());
        let keys = RefCell::new(VecDeque::from([b"yes".to_vec(), b"no".to_vec()]));
        let mut peer = Peer::new(&world, 3, 2, ring | 1, |queue, read, _| match queue {
            0 => keys.borrow_mut().pop_front(),
            _ => {
                screen.borrow_mut().extend_from_slice(read);
                Some(vec![])
            }
        });
        peer.config = vec![80, 0, 25, 0];
        let mut transport = peer.embedded(IommuMode::Require);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut console = Console::start(&mut transport, new_driver(mapper)).unwrap();
            assert_eq!(console.size(), Ok(Some(Size { cols: 80, rows: 25 })));
            let (hello, rest) = (world.buffer(0, 6), world.buffer(100, 1));
            hello.memory().write(0, b"hello ");
            rest.memory().write(0, b"!");
            console.write(&[hello, rest]).unwrap();
            assert_eq!(*screen.borrow(), b"hello !");
            assert_eq!(console.write(&[]), Err(LoanError::TooShort { len: 0, needed: 1 }));
            console.offer(world.buffer(200, 16)).unwrap();
            console.offer(world.buffer(300, 16)).unwrap();
            console.notify().unwrap();
            for expected in [&b"yes"[..], b"no"] {
                let received = console.received().unwrap().expect("a key");
                assert_eq!(bytes(received.buffer.sub(0, received.len)), expected);
            }
            assert!(console.received().unwrap().is_none());
        });
        assert_eq!(world.domain.mapped(), 0);
    }
}

/// Each way to break the rules of rings, on each device: an error with a name from then on, what was lent stays lent until
/// the device is reset, and everything is back afterwards.
#[test]
fn whoever_breaks_the_rules_is_of_no_use_any_more() {
    for (ring, crime) in [0, PACKED].into_iter().flat_map(|ring| CRIMES.map(|crime| (ring, crime))) {
        let world = World::new();
        let context = format!("{crime:?}, ring {ring:#x}");
        let all = |_: u16, _: &[u8], room: usize| Some(vec![7; room]);
        let buffer = |number: usize| -> Buffer<'_> { world.buffer(number * 2000, 1600) };
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let check = |twice: Result<(), LoanError<EmbeddedError>>, again: Result<(), LoanError<EmbeddedError>>| {
                assert!(matches!(twice, Err(LoanError::Broken(_))), "{context}: {twice:?}");
                assert_eq!(twice, again, "{context}");
            };
            let mut transport = Peer::new(&world, 4, 1, ring, all).embedded(IommuMode::Offer);
            transport.device_mut().crime = crime;
            let mut rng = Rng::start(&mut transport, new_driver(mapper)).unwrap();
            // One that is used twice is found out by the second time.
            let first = rng.fill(buffer(0)).map(drop).and_then(|()| rng.poll().map(drop));
            check(first, rng.submit(buffer(1)).map(drop));
            assert_eq!(rng.notify(), rng.poll().map(drop), "{context}");
            drop(rng);
            assert_eq!(world.domain.mapped(), 0, "{context}");

            let mut transport = Peer::new(&world, 1, 2, ring, all).embedded(IommuMode::Offer);
            transport.device_mut().crime = crime;
            let mut net = Net::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
            let idle = world.domain.mapped();
            net.offer(buffer(0)).unwrap();
            net.offer(buffer(1)).unwrap();
            let first = net.notify().and_then(|()| (0..2).try_for_each(|_| net.received().map(drop)));
            check(first, net.offer(buffer(2)).map(drop));
            assert!(crime == Crime::Twice || world.domain.mapped() == idle + 2, "{context}: they stay lent");
            drop(net);
            assert_eq!(world.domain.mapped(), 0, "{context}");

            let mut transport = Peer::new(&world, 3, 2, ring, all).embedded(IommuMode::Offer);
            transport.device_mut().crime = crime;
            let mut console = Console::start(&mut transport, new_driver(mapper)).unwrap();
            let first = console.write(&[buffer(0)]).and_then(|()| console.sent().map(drop));
            check(first, console.write(&[buffer(0)]));
            drop(console);
            assert_eq!(world.domain.mapped(), 0, "{context}");
        });
    }
}

/// A device whose queue is of no use any more goes on with a queue that was reset alone, and nothing is lent meanwhile.
#[test]
fn a_queue_that_broke_goes_on_after_a_reset_of_its_own() {
    for (ring, crime) in [0, PACKED | EVENT_IDX].into_iter().flat_map(|ring| CRIMES.map(|crime| (ring, crime))) {
        let world = World::new();
        let context = format!("{crime:?}, ring {ring:#x}");
        let all = |_: u16, _: &[u8], room: usize| Some(vec![7; room]);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut transport = Peer::new(&world, 4, 1, ring | RING_RESET, all).embedded(IommuMode::Offer);
            transport.device_mut().crime = crime;
            let mut rng = Rng::start(&mut transport, new_driver(mapper)).unwrap();
            let idle = world.domain.mapped();
            let old = rng.submit(world.buffer(4096, 8)).unwrap();
            let broken = rng.fill(world.buffer(0, 8)).map(drop).and_then(|()| rng.poll().map(drop));
            assert!(matches!(broken, Err(LoanError::Broken(_))), "{context}: {broken:?}");
            rng.restart().unwrap();
            assert_eq!(world.domain.mapped(), idle, "{context}: all is back");
            for _ in 0..30 {
                assert_eq!(rng.fill(world.buffer(0, 8)), Ok(8), "{context}");
            }
            assert_ne!(rng.submit(world.buffer(0, 8)), Ok(old));
            drop(rng);
            assert_eq!(transport.device().queue_resets, 1);

            let mut transport = Peer::new(&world, 1, 2, ring | RING_RESET, all).embedded(IommuMode::Offer);
            transport.device_mut().crime = crime;
            let mut net = Net::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
            let idle = world.domain.mapped();
            net.offer(world.buffer(0, 1514)).unwrap();
            net.send(&[world.buffer(4096, 60)]).unwrap();
            let _ = net.notify();
            net.restart().unwrap();
            assert_eq!(world.domain.mapped(), idle, "{context}: all is back");
            let id = net.offer(world.buffer(0, 1514)).unwrap();
            net.notify().unwrap();
            let received = net.received().unwrap().expect("a packet");
            assert_eq!((received.id, received.len), (id, 1514), "{context}");
            drop(net);
            assert_eq!(transport.device().queue_resets, 2);
        });
        assert_eq!(world.domain.mapped(), 0, "{context}");
    }
}

#[test]
fn a_device_without_queue_resets_is_not_asked_for_one() {
    let world = World::new();
    let mut transport = rng(&world, 0, |_, _, room| Some(vec![7; room])).embedded(IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut rng = Rng::start(&mut transport, new_driver(mapper)).unwrap();
        assert_eq!(rng.restart(), Err(LoanError::NotOffered));
        assert_eq!(rng.fill(world.buffer(0, 8)), Ok(8));
    });
}

/// A device that says that it filled a buffer, and wrote nothing: what was there before is not passed off as its answer, to
/// be sent on by somebody.
#[test]
fn what_a_device_did_not_write_is_zero() {
    for device in [1, 3, 4] {
        for mapping in [Mapping::Dynamic, Mapping::Bounce] {
            let world = World::new();
            // It writes nothing, and claims all of it.
            let mut peer = Peer::new(&world, device, 2, 0, |queue, _, _| (queue == 0).then(Vec::new));
            peer.boast = true;
            let mut transport = peer.embedded(IommuMode::Offer);
            world.with_mapper(mapping, |mapper| {
                let host = new_driver(mapper);
                let secret = world.buffer(0, 2000);
                secret.memory().fill(0x5e);
                let len = match device {
                    1 => {
                        let mut card = Net::start(&mut transport, host, Options::default()).unwrap();
                        card.offer(secret).unwrap();
                        card.notify().unwrap();
                        card.wait().unwrap();
                        card.received().unwrap().unwrap().len
                    }
                    3 => {
                        let mut console = Console::start(&mut transport, host).unwrap();
                        console.offer(secret).unwrap();
                        console.notify().unwrap();
                        console.wait().unwrap();
                        console.received().unwrap().unwrap().len
                    }
                    _ => Rng::start(&mut transport, host).unwrap().fill(secret).unwrap(),
                };
                assert_eq!((len, bytes(secret)), (2000, vec![0; 2000]), "device {device}, {mapping:?}");
            });
        }
    }
}
