//! Devices shared by futures, under an executor of a few lines.

use crate::peer::*;
use crate::world::*;
use ringfence_dma::{Buffer, Mapper};
use ringfence_driver::LoanError;
use ringfence_driver::blk::{Answer, Blk, BlkError, Options, Request, RequestError};
use ringfence_driver::console::Console;
use ringfence_driver::embedded::{Embedded, EmbeddedError};
use ringfence_driver::net::{self, Net};
use ringfence_driver::policy::IommuMode;
use ringfence_driver::rng::Rng;
use ringfence_driver::tasks::Tasks;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// Says whether its task is to be polled again, and counts how often it was told so.
#[derive(Default)]
struct Flag {
    set: AtomicBool,
    wakes: AtomicUsize,
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.set.store(true, Ordering::Relaxed);
        self.wakes.fetch_add(1, Ordering::Relaxed);
    }
}

type Task<'t> = Pin<Box<dyn Future<Output = ()> + 't>>;

/// Polls what was woken, and nothing else; when nobody was, `idle` is called.
fn run(tasks: Vec<Task<'_>>, mut idle: impl FnMut()) -> usize {
    let mut tasks: Vec<_> = tasks.into_iter().map(|task| (task, Arc::new(Flag::default()))).collect();
    tasks.iter().for_each(|(_, flag)| flag.set.store(true, Ordering::Relaxed));
    let (mut polls, mut idles) = (0, 0);
    while !tasks.is_empty() {
        let mut worked = false;
        tasks.retain_mut(|(task, flag)| {
            if !flag.set.swap(false, Ordering::Relaxed) {
                return true;
            }
            (worked, polls) = (true, polls + 1);
            let waker = Waker::from(flag.clone());
            task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending()
        });
        if !worked {
            idles += 1;
            assert!(idles < 100_000, "nobody is woken any more, and {} tasks are left", tasks.len());
            idle();
        }
    }
    polls
}

type Shared<'a> = Tasks<Blk<'a, &'a mut Embedded<Disk>, dyn Mapper + 'a>>;

fn shared<'a>(transport: &'a mut Embedded<Disk>, mapper: &'a dyn Mapper, depth: u16) -> Shared<'a> {
    let disk = Blk::start(transport, new_driver(mapper), Options { depth, segments: 2 }).unwrap();
    Tasks::new(disk, 64).unwrap()
}

#[test]
fn many_tasks_share_a_disk_that_has_room_for_few() {
    for (ring, mapping) in
        [(0, Mapping::Dynamic), (EVENT_IDX, Mapping::Bounce), (PACKED | INDIRECT | EVENT_IDX, Mapping::Dynamic)]
    {
        let world = World::new();
        let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
        world.with_mapper(mapping, |mapper| {
            let disk = &shared(&mut transport, mapper, 8);
            let world = &world;
            let work = |number: usize| -> Task<'_> {
                Box::pin(async move {
                    let data: [Buffer<'_>; 1] = [world.buffer(number * 4096, 512)];
                    for round in 0..10 {
                        let stamp = stamp(number + round, 512);
                        data[0].memory().write(0, &stamp);
                        assert_eq!(disk.write(number as u64, &data).await, Ok(Answer::Done));
                        data[0].memory().fill(0);
                        assert_eq!(disk.read(number as u64, &data).await, Ok(Answer::Done));
                        assert_eq!(bytes(data[0]), stamp);
                    }
                    assert_eq!(disk.request(Request::Id).await, Ok(Answer::Id));
                    assert_eq!(disk.flush().await, Ok(Answer::Done));
                })
            };
            // This disk has no thread of its own: where it did not ask to be told it works while somebody waits.
            let polls = run((0..40).map(work).collect(), || match ring & EVENT_IDX {
                0 => disk.interrupt().unwrap(),
                _ => disk.idle().unwrap(),
            });
            assert!(polls > 40 * 22, "each request takes two polls or more");
        });
        assert_eq!(world.domain.mapped(), 0);
    }
}

#[test]
fn a_future_that_is_dropped_leaves_its_request_to_its_end() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES, IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let disk = shared(&mut transport, mapper, 8);
        let idle = world.domain.mapped();
        let (data, noop) = ([world.buffer(0, 512)], Waker::noop());
        {
            let mut future = pin!(disk.write(0, &data));
            assert_eq!(future.as_mut().poll(&mut Context::from_waker(noop)), Poll::Pending);
            assert_eq!(world.domain.mapped(), idle + 1);
        }
        assert_eq!(world.domain.mapped(), idle + 1, "the disk may still read it");
        disk.interrupt().unwrap();
        assert_eq!(world.domain.mapped(), idle);
        // One that was never polled was never asked for; nonsense is said at once.
        drop(disk.write(0, &data));
        let none = pin!(disk.read(0, &[])).poll(&mut Context::from_waker(noop));
        assert_eq!(none, Poll::Ready(Err(BlkError::Length { len: 0 })));
        let mut disk = disk.into_driver();
        assert_eq!(disk.device_mut().transport_mut().device_mut().kicks, 1);
        assert_eq!(disk.poll(), Ok(None));
    });
}

#[test]
fn every_task_hears_of_a_disk_that_is_broken() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES, IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options { depth: 8, segments: 2 }).unwrap();
        disk.device_mut().transport_mut().device_mut().mood = Mood::Written(1);
        let disk = &Tasks::new(disk, 8).unwrap();
        let (heard, world) = (&Cell::new(0), &world);
        let work = |number: usize| -> Task<'_> {
            Box::pin(async move {
                let into = [world.buffer(number * 512, 512)];
                let error = disk.read(0, &into).await.unwrap_err();
                assert!(matches!(error, BlkError::Broken(_)), "{error}");
                heard.set(heard.get() + 1);
            })
        };
        // More than there is room for.
        run((0..5).map(work).collect(), || {
            let _ = disk.interrupt();
        });
        assert_eq!(heard.get(), 5);
    });
}

#[test]
fn an_executor_without_interrupts_waits_at_the_device() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES | EVENT_IDX, IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options { depth: 8, segments: 2 }).unwrap();
        disk.device_mut().transport_mut().device_mut().mood = Mood::Status(1);
        let disk = &Tasks::new(disk, 8).unwrap();
        let into = &[world.buffer(0, 512)];
        let failing: Task<'_> = Box::pin(async move {
            assert_eq!(disk.read(0, into).await, Err(BlkError::Failed(RequestError::Io)));
        });
        run(vec![failing], || disk.idle().unwrap());
    });
    let mut transport = world.embedded(DISK_FEATURES, IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options { depth: 8, segments: 2 }).unwrap();
        disk.device_mut().transport_mut().device_mut().mood = Mood::Sleepy;
        let disk = Tasks::new(disk, 8).unwrap();
        let into = [world.buffer(0, 512)];
        let mut future = pin!(disk.read(0, &into));
        assert_eq!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Pending);
        let stalled = (0..2000).find_map(|_| disk.idle().err());
        assert_eq!(stalled, Some(BlkError::Transport(EmbeddedError::Stalled { queue: 0 })));
    });
}

#[test]
fn a_disk_that_goes_on_tells_whose_request_is_lost() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES | RING_RESET, IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start(&mut transport, new_driver(mapper), Options { depth: 8, segments: 2 }).unwrap();
        disk.device_mut().transport_mut().device_mut().mood = Mood::Sleepy;
        let disk = &Tasks::new(disk, 8).unwrap();
        let (heard, world) = (&Cell::new(0), &world);
        let work = |number: usize| -> Task<'_> {
            Box::pin(async move {
                let into = [world.buffer(number * 512, 512)];
                let lost = disk.read(0, &into).await;
                // Those that waited for room may get in afterwards, and then wait for the next time.
                assert_eq!(lost, Err(BlkError::Failed(RequestError::Lost)));
                heard.set(heard.get() + 1);
            })
        };
        run((0..5).map(work).collect(), || disk.restart().unwrap());
        assert_eq!(heard.get(), 5);
    });
    assert_eq!(world.domain.mapped(), 0);
}

#[test]
fn tasks_share_a_card_a_console_and_a_source() {
    for ring in [0, EVENT_IDX, PACKED | EVENT_IDX] {
        let world = &World::new();
        // Whatever is sent comes back.
        let inbox = &RefCell::new(VecDeque::<Vec<u8>>::new());
        let echo = |queue, read: &[u8], room: usize| match queue {
            0 => inbox.borrow_mut().pop_front().inspect(|packet| assert!(packet.len() <= room)),
            _ => {
                inbox.borrow_mut().push_back(read.to_vec());
                Some(vec![])
            }
        };
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut transport = Peer::new(world, 1, 2, ring, echo).embedded(IommuMode::Offer);
            let options = net::Options { depth: 8, segments: 1 };
            let card = &Tasks::new(Net::start(&mut transport, new_driver(mapper), options).unwrap(), 8).unwrap();
            let seen = &RefCell::new(Vec::new());
            let work = |number: usize| -> Task<'_> {
                Box::pin(async move {
                    let (out, room) = ([world.buffer(number * 8192, 60)], world.buffer(number * 8192 + 4096, 1514));
                    for round in 0..5 {
                        out[0].memory().write(0, &stamp(number * 10 + round, 60));
                        assert_eq!(card.send(&out).await, Ok(0));
                        assert_eq!(card.receive(room).await, Ok(60));
                        seen.borrow_mut().push(bytes(room.sub(0, 60)));
                    }
                })
            };
            run((0..6).map(work).collect(), || card.idle().unwrap());
            let mut wanted: Vec<_> = (0..6).flat_map(|n| (0..5).map(move |round| stamp(n * 10 + round, 60))).collect();
            wanted.sort();
            seen.borrow_mut().sort();
            assert_eq!(*seen.borrow(), wanted);

            let mut transport = Peer::new(world, 3, 2, ring, echo).embedded(IommuMode::Offer);
            let console = &Tasks::new(Console::start(&mut transport, new_driver(mapper)).unwrap(), 8).unwrap();
            let talk: Task<'_> = Box::pin(async move {
                let (out, room) = ([world.buffer(0, 5)], world.buffer(100, 16));
                out[0].memory().write(0, b"hello");
                console.write(&out).await.unwrap();
                assert_eq!(console.read(room).await, Ok(5));
                assert_eq!(bytes(room.sub(0, 5)), b"hello");
            });
            run(vec![talk], || console.idle().unwrap());

            let source = |_, _: &[u8], room: usize| Some(stamp(1, room.min(40)));
            let mut transport = Peer::new(world, 4, 1, ring, source).embedded(IommuMode::Offer);
            let rng = &Tasks::new(Rng::start(&mut transport, new_driver(mapper)).unwrap(), 32).unwrap();
            let fill = |number: usize| -> Task<'_> {
                Box::pin(async move {
                    let into = world.buffer(number * 100, 64);
                    assert_eq!(rng.fill(into).await, Ok(40));
                    assert_eq!(bytes(into.sub(0, 40)), stamp(1, 40));
                })
            };
            // More than there is room for.
            run((0..20).map(fill).collect(), || rng.idle().unwrap());
        });
        assert_eq!(world.domain.mapped(), 0);
    }
}

#[test]
fn tasks_of_a_broken_source_hear_of_it_and_go_on_after_a_restart() {
    let world = &World::new();
    let source = |_, _: &[u8], room: usize| Some(stamp(1, room));
    let mut transport = Peer::new(world, 4, 1, RING_RESET, source).embedded(IommuMode::Offer);
    transport.device_mut().crime = Crime::TooMuch;
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let rng = Rng::start(&mut transport, new_driver(mapper)).unwrap();
        let rng = &Tasks::new(rng, 8).unwrap();
        let fill = |expected: bool| -> Task<'_> {
            Box::pin(async move {
                match rng.fill(world.buffer(0, 64)).await {
                    Ok(64) => assert!(expected),
                    Err(LoanError::Broken(_)) => assert!(!expected),
                    other => panic!("{other:?}"),
                }
            })
        };
        run(vec![fill(false), fill(false)], || {
            let _ = rng.idle();
        });
        assert!(world.domain.mapped() > 0);
        rng.restart().unwrap();
        run(vec![fill(true)], || rng.idle().unwrap());
    });
    assert_eq!(world.domain.mapped(), 0);
}
