//! A disk shared by futures, under an executor of a few lines.

use crate::world::*;
use ringfence_dma::{Buffer, Mapper};
use ringfence_driver::blk::{Answer, Blk, BlkError, Options, Request, RequestError};
use ringfence_driver::embedded::{Embedded, EmbeddedError};
use ringfence_driver::policy::IommuMode;
use ringfence_driver::tasks::Tasks;
use std::cell::Cell;
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

type Shared<'a> = Tasks<'a, &'a mut Embedded<Disk>, dyn Mapper + 'a>;

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
        let mut disk = disk.into_disk();
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
