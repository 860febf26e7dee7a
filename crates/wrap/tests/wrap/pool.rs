//! A pool that is too small for all that is asked at once, and for some of it at all.

use crate::served::{self, BUFFERS, Driver, Frontend, PAGE, RINGS, Served};
use crate::world::{Page, REST, SIZE, World};
use crate::{driven, options, serve_plainly, wrap};
use ringfence_device::queue::{Look, Queue, Report, Stopped};
use ringfence_device::{Back, Device, Handler, Outcome, Token, Unreachable, eventfd};
use ringfence_dma::{Access, BusAddr, Fault};
use ringfence_driver::blk::{Answer, Request};
use ringfence_driver::mapper::Direct;
use ringfence_policy::IommuMode;
use ringfence_ring::{Descriptor, DriverQueue, Position, RingCells, Rules};
use ringfence_wrap::{Kind, Options, Wrapped};
use rustix::event::{EventfdFlags, eventfd as new_eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[test]
fn what_has_no_room_waits_in_order_and_nothing_fails() {
    let disk = Served::start(IommuMode::Off);
    // Room for one request of 16 pages at a time, and that barely.
    let wrapped = wrap(Options { pool: 18 * PAGE, ..options(&disk.socket) });
    // Nothing is translated: requests that wait for translations may pass each other, before they come to the pool.
    let frontend = Frontend::connect(&wrapped);
    let direct = Direct::new(frontend.buffer(RINGS));
    let mut disk = frontend.start(Driver::Old, &direct).unwrap();
    let pages: Vec<Vec<_>> = (0..16)
        .map(|request| (0..16).map(|page| frontend.buffer((BUFFERS.0 + (request * 16 + page) * PAGE, PAGE))).collect())
        .collect();
    for round in 0..20u8 {
        let mut ids = Vec::new();
        for (number, buffers) in pages.iter().enumerate() {
            // All at one place: the last to be carried out is what is there.
            buffers.iter().for_each(|buffer| buffer.memory().fill(round ^ (number as u8 * 3)));
            ids.push(disk.submit(Request::Write { sector: 0, from: buffers }).unwrap());
        }
        disk.notify().unwrap();
        while !ids.is_empty() {
            match disk.poll().unwrap() {
                Some(completion) => {
                    assert_eq!(completion.result, Ok(Answer::Done));
                    ids.retain(|&id| id != completion.id);
                }
                None => disk.wait().unwrap(),
            }
        }
        disk.read(0, &pages[0]).unwrap();
        assert!(pages[0].iter().all(|&buffer| served::bytes(buffer) == [round ^ (15 * 3); PAGE]), "round {round}");
    }
}

#[test]
fn what_never_has_room_fails_alone() {
    let disk = Served::start(IommuMode::Off);
    let wrapped = wrap(Options { pool: 16 * PAGE, ..options(&disk.socket) });
    driven!(wrapped => frontend, disk);
    let pages: Vec<_> = (0..16).map(|page| frontend.buffer((BUFFERS.0 + page * PAGE, PAGE))).collect();
    for round in 0..10 {
        served::assert_io_error(disk.write(0, &pages));
        pages[..15].iter().for_each(|page| page.memory().fill(round));
        disk.write(0, &pages[..15]).unwrap();
        disk.read(128, &pages[..15]).unwrap();
        disk.read(0, &pages[..15]).unwrap();
        assert!(pages[..15].iter().all(|&page| served::bytes(page) == [round; PAGE]));
    }
}

/// A device of two queues that holds what it has until it is told to let go.
struct Holding {
    lets_go: AtomicBool,
    /// Readable for good once it does.
    told: OwnedFd,
}

struct Held {
    device: Arc<Holding>,
    tokens: Vec<Token>,
}

impl Device for Holding {
    fn name(&self) -> &'static str {
        "holding"
    }

    fn id(&self) -> u16 {
        0
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        2
    }

    fn config(&self) -> Vec<u8> {
        vec![0; 4]
    }

    fn open_queue(self: Arc<Self>, _: u16, _: u16, _: u64) -> io::Result<Box<dyn Handler>> {
        Ok(Box::new(Held { device: self, tokens: Vec::new() }))
    }
}

impl Handler for Held {
    fn start(&mut self, token: Token, _: &ringfence_device::Request<'_>) -> Outcome {
        self.tokens.push(token);
        Outcome::Pending
    }

    fn unreachable(&mut self, _: &Unreachable<'_>) -> u32 {
        panic!("a request out of reach, without an IOMMU")
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        if self.device.lets_go.load(Ordering::Relaxed) {
            back.extend(self.tokens.drain(..).map(|token| Back { token, readable_from: 16, writable_from: 0 }));
        }
    }

    fn go_on(&mut self, _: Token, _: &ringfence_device::Request<'_>) -> Outcome {
        Outcome::Done(0)
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.told.as_fd())
    }
}

#[derive(Clone, Default)]
struct Faults(Arc<Mutex<usize>>);

impl Report for Faults {
    fn fault(&mut self, _: Fault) {
        *self.0.lock().unwrap() += 1;
    }
}

/// A queue of a wrapped device, and its driver.
struct Side<'w> {
    driver: DriverQueue<RingCells<'w>>,
    queue: Queue<World>,
}

impl<'w> Side<'w> {
    fn new(world: &'w World, device: &Arc<Wrapped>, index: u16, faults: &Faults) -> Self {
        let at = Position::start(Rules::default().format);
        let device: Arc<dyn Device> = Arc::clone(device) as _;
        let handler = device.open_queue(index, SIZE, 1 << 32).unwrap();
        Self { driver: world.driver(), queue: world.queue(handler, Box::new(faults.clone()), Stopped::at(at), at) }
    }

    fn submit(&mut self) {
        let buffer = Descriptor { addr: BusAddr((REST * PAGE) as u64), len: 16, access: Access::Read };
        self.driver.add(&[buffer], None).unwrap();
        self.driver.publish();
        self.turn();
    }

    fn turn(&mut self) {
        self.queue.turn(Look::Thorough).unwrap();
    }

    fn wait_for_used(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.driver.take_used().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it never ends");
            std::thread::sleep(Duration::from_millis(1));
            self.turn();
        }
    }
}

/// A queue that waited for room, and then had nothing to put there, keeps nobody waiting.
#[test]
fn whoever_wants_no_room_any_more_leaves_the_line() {
    let told = new_eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let device = Arc::new(Holding { lets_go: AtomicBool::new(false), told });
    let back_end = serve_plainly(Arc::clone(&device) as _);
    let one_page = Options { kind: Kind::Generic, pool: PAGE, ..options(&back_end.socket) };
    let wrapped = Arc::new(Wrapped::open(one_page).unwrap());
    let worlds = [World::new(), World::new()];
    let faults = Faults::default();
    let [mut first, mut second] = [0, 1].map(|index| Side::new(&worlds[index], &wrapped, index as u16, &faults));
    first.submit();
    second.submit();
    worlds[1].set(REST, Page::Forbidden);
    second.wait_for_used();
    assert_eq!(*faults.0.lock().unwrap(), 1);
    device.lets_go.store(true, Ordering::Relaxed);
    eventfd::ring(device.told.as_fd());
    first.wait_for_used();
    first.submit();
    first.wait_for_used();
}
