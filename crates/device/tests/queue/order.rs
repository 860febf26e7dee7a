//! A queue that stops and goes on: what was begun starts anew in the order in which it came, here or with another device.

use crate::world::{PAGE, Page, REST, SIZE, World};
use ringfence_device::queue::{Look, Queue, Report, Stopped};
use ringfence_device::{Back, Handler, Outcome, Request, Token, Unreachable};
use ringfence_dma::{Access, BusAddr, Fault};
use ringfence_ring::{Descriptor, DriverQueue, Format, Position, RingCells, Rules};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Starts everything that it has room for, and ends what it is told to.
#[derive(Clone, Default)]
struct Holding(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    /// The first byte of each request, in the order in which they started.
    started: Vec<u8>,
    tokens: HashMap<u8, Token>,
    over: Vec<Token>,
    /// There is no more room than for so many at a time.
    room: Option<usize>,
    /// What has not begun can be taken back.
    posts: bool,
    /// What was done may be done again.
    repeats: bool,
}

impl Holding {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap()
    }

    fn end(&self, names: impl IntoIterator<Item = u8>) {
        let held = &mut *self.held();
        for name in names {
            held.over.push(held.tokens.remove(&name).unwrap());
        }
    }
}

impl Handler for Holding {
    fn is_in_order(&self) -> bool {
        self.held().posts
    }

    fn may_repeat(&self) -> bool {
        self.held().repeats
    }

    fn start(&mut self, token: Token, request: &Request<'_>) -> Outcome {
        let held = &mut *self.held();
        if held.room.is_some_and(|room| held.tokens.len() >= room) {
            return Outcome::NoRoom;
        }
        let mut name = [0];
        assert!(request.readable.read(0, &mut name));
        held.started.push(name[0]);
        held.tokens.insert(name[0], token);
        Outcome::Pending
    }

    fn unreachable(&mut self, _: &Unreachable<'_>) -> u32 {
        0
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        back.extend(self.held().over.drain(..).map(|token| Back { token, readable_from: 1, writable_from: 0 }));
    }

    fn go_on(&mut self, _: Token, _: &Request<'_>) -> Outcome {
        Outcome::Done(0)
    }

    fn recall(&mut self, unbegun: &mut Vec<Token>) {
        let held = &mut *self.held();
        if held.posts {
            unbegun.extend(held.tokens.drain().map(|(_, token)| token));
        }
    }
}

impl Report for Holding {
    fn fault(&mut self, fault: Fault) {
        panic!("{fault}");
    }
}

/// The requests of a name are on this page.
fn page_of(name: u8) -> usize {
    REST + usize::from(name % 4)
}

/// A driver, whose requests have names, and what it has seen of them.
struct Side<'w> {
    world: &'w World,
    format: Format,
    driver: DriverQueue<RingCells<'w>>,
    names: HashMap<usize, u8>,
    used: Vec<u8>,
}

impl<'w> Side<'w> {
    fn new(world: &'w World, format: Format) -> Self {
        Self { world, format, driver: world.driver(), names: HashMap::new(), used: Vec::new() }
    }

    /// Each of two descriptors, so that a packed ring counts otherwise than in chains.
    fn submit(&mut self, names: impl IntoIterator<Item = u8>) {
        for name in names {
            let place = page_of(name) * PAGE + usize::from(name) * 16;
            self.world.ram.slice(place, 2).write(0, &[name, name]);
            let buffer = |at| Descriptor { addr: BusAddr((place + at) as u64), len: 1, access: Access::Read };
            let on_ring = self.driver.add(&[buffer(0), buffer(1)], None).unwrap();
            self.names.insert(on_ring.index(), name);
        }
        self.driver.publish();
    }

    /// What the driver has been told of so far.
    fn used(&mut self) -> &[u8] {
        while let Some(used) = self.driver.take_used().unwrap() {
            self.used.push(self.names.remove(&used.token.index()).expect("used twice"));
        }
        &self.used
    }

    /// The queue at a device that knows nothing but a number.
    fn fresh(&self, device: &Holding, base: u32) -> Queue<World> {
        let at = Position::from_vring_base(self.format, base).unwrap();
        self.resumed(device, Stopped::at(at))
    }

    fn resumed(&self, device: &Holding, stopped: Stopped) -> Queue<World> {
        let at = stopped.position;
        self.world.queue(Box::new(device.clone()), Box::new(device.clone()), stopped, at)
    }

    fn start(&self) -> u32 {
        Position::start(self.format).vring_base(self.format)
    }

    fn base(&self, stopped: &Stopped) -> u32 {
        stopped.position.vring_base(self.format)
    }
}

fn each_format(check: impl Fn(&World, Format)) {
    for format in [Format::Split, Format::Packed] {
        check(&World::with(Rules { format, ..Rules::default() }), format);
    }
}

fn turn(queue: &mut Queue<World>) {
    queue.turn(Look::Thorough).unwrap();
}

/// More than once around the ring.
#[test]
fn what_was_begun_is_the_rings_again() {
    each_format(|world, format| {
        let mut side = Side::new(world, format);
        let mut base = side.start();
        for round in 0..7 {
            let first = 6 * round;
            let device = Holding::default();
            let mut queue = side.fresh(&device, base);
            side.submit(first..first + 2);
            turn(&mut queue);
            device.end(first..first + 2);
            turn(&mut queue);
            // These have the tokens of those.
            side.submit(first + 2..first + 4);
            turn(&mut queue);
            let (stopped, _leftover) = queue.stop();
            assert!(!stopped.is_unfinished());
            assert_eq!(side.used().len(), usize::from(first) + 2);

            let next = Holding::default();
            let mut queue = side.fresh(&next, side.base(&stopped));
            side.submit(first + 4..first + 6);
            turn(&mut queue);
            assert_eq!(next.held().started, [2, 3, 4, 5].map(|name| first + name), "{format:?}");
            next.end(first + 2..first + 6);
            turn(&mut queue);
            assert_eq!(side.used().len(), usize::from(first) + 6);
            base = side.base(&queue.stop().0);
        }
        assert!(side.used().is_sorted() && side.used().len() > 4 * usize::from(SIZE));
    });
}

/// A chain that lacks a translation, and that others have overtaken: whoever goes on in the same process has it, and whoever
/// has but the number has those that came later.
#[test]
fn what_was_overtaken_and_can_not_go_on_is_kept_here() {
    each_format(|world, format| {
        for here in [true, false] {
            let mut side = Side::new(world, format);
            let device = Holding::default();
            let mut queue = side.fresh(&device, side.start());
            world.set(page_of(0), Page::Missing);
            side.submit(0..4);
            turn(&mut queue);
            assert_eq!(device.held().started, [1, 2, 3]);
            device.end([1]);
            assert!(!queue.drain());
            queue.flush().unwrap();
            assert_eq!(side.used(), [1]);
            let (stopped, _leftover) = queue.stop();
            assert!(stopped.is_unfinished());
            world.set(page_of(0), Page::Here);

            let next = Holding::default();
            let base = side.base(&stopped);
            let mut queue = if here { side.resumed(&next, stopped) } else { side.fresh(&next, base) };
            turn(&mut queue);
            assert_eq!(next.held().started, [0, 2, 3][usize::from(!here)..], "{format:?}");
            if here {
                next.end([0, 2, 3]);
                turn(&mut queue);
                assert_eq!(side.used(), [1, 0, 2, 3]);
                // It is in step again.
                side.submit([4]);
                turn(&mut queue);
                let (stopped, _leftover) = queue.stop();
                let last = Holding::default();
                turn(&mut side.fresh(&last, side.base(&stopped)));
                assert_eq!(last.held().started, [4]);
            }
        }
    });
}

/// One that lacks but room is waited for if it was overtaken, and is the ring's if not.
#[test]
fn what_waits_for_room_is_brought_to_its_end_if_it_was_overtaken() {
    each_format(|world, format| {
        let mut side = Side::new(world, format);
        let device = Holding::default();
        device.held().room = Some(2);
        let mut queue = side.fresh(&device, side.start());
        world.set(page_of(0), Page::Missing);
        side.submit(0..4);
        turn(&mut queue);
        assert_eq!(device.held().started, [1, 2]);
        world.set(page_of(0), Page::Here);
        assert!(!queue.drain());
        device.end([1]);
        assert!(!queue.drain());
        assert_eq!(device.held().started, [1, 2, 0], "{format:?}");
        device.end([2, 0]);
        while !queue.drain() {}
        queue.flush().unwrap();
        assert_eq!(side.used(), [1, 2, 0]);
        let (stopped, _leftover) = queue.stop();
        assert!(!stopped.is_unfinished());

        let next = Holding::default();
        turn(&mut side.fresh(&next, side.base(&stopped)));
        assert_eq!(next.held().started, [3]);
    });
}

/// Nothing of the device's is waited for while another queue has all the room.
#[test]
fn what_waits_for_room_alone_is_waited_for() {
    each_format(|world, format| {
        let mut side = Side::new(world, format);
        let device = Holding::default();
        let mut queue = side.fresh(&device, side.start());
        world.set(page_of(0), Page::Missing);
        side.submit(0..2);
        turn(&mut queue);
        world.set(page_of(0), Page::Here);
        device.held().room = Some(0);
        device.end([1]);
        for _ in 0..3 {
            assert!(!queue.drain(), "there is no room: {format:?}");
        }
        device.held().room = None;
        assert!(!queue.drain());
        device.end([0]);
        assert!(queue.drain());
        queue.flush().unwrap();
        assert_eq!(side.used(), [1, 0]);
        assert!(!queue.stop().0.is_unfinished());
    });
}

/// Buffers that stand at a device for ever are not waited for.
#[test]
fn what_the_device_gives_back_is_the_rings_again() {
    each_format(|world, format| {
        let mut side = Side::new(world, format);
        let device = Holding::default();
        device.held().posts = true;
        let mut queue = side.fresh(&device, side.start());
        side.submit(0..4);
        turn(&mut queue);
        device.end([0]);
        turn(&mut queue);
        queue.recall();
        assert!(queue.drain());
        let (stopped, _leftover) = queue.stop();
        assert!(!stopped.is_unfinished());
        let next = Holding::default();
        turn(&mut side.fresh(&next, side.base(&stopped)));
        assert_eq!(next.held().started, [1, 2, 3], "{format:?}");
    });
}

/// While one waits for its translation the driver is not told of those that came later: so the ring can have them all.
#[test]
fn whom_the_driver_is_not_told_of_is_the_rings_again() {
    each_format(|world, format| {
        for comes in [true, false] {
            let mut side = Side::new(world, format);
            let device = Holding::default();
            device.held().repeats = true;
            let mut queue = side.fresh(&device, side.start());
            side.submit(0..1);
            turn(&mut queue);
            device.end([0]);
            world.set(page_of(1), Page::Missing);
            side.submit(1..4);
            turn(&mut queue);
            device.end([2, 3]);
            turn(&mut queue);
            assert_eq!(side.used(), [0], "1 waits");
            if comes {
                world.set(page_of(1), Page::Here);
                turn(&mut queue);
                assert_eq!(side.used(), [0, 2, 3]);
                device.end([1]);
                turn(&mut queue);
                assert_eq!(side.used(), [0, 2, 3, 1]);
                continue;
            }
            assert!(queue.drain());
            queue.flush().unwrap();
            let (stopped, _leftover) = queue.stop();
            assert!(!stopped.is_unfinished());
            world.set(page_of(1), Page::Here);
            let next = Holding::default();
            turn(&mut side.fresh(&next, side.base(&stopped)));
            assert_eq!(next.held().started, [1, 2, 3], "{format:?}");
        }
    });
}

/// Whoever waits for what never comes keeps the others for a moment, and once.
#[test]
fn what_never_comes_holds_nobody() {
    each_format(|world, format| {
        let mut side = Side::new(world, format);
        let device = Holding::default();
        device.held().repeats = true;
        let mut queue = side.fresh(&device, side.start());
        world.set(page_of(0), Page::Missing);
        world.set(page_of(1), Page::Missing);
        side.submit(0..3);
        turn(&mut queue);
        device.end([2]);
        while side.used().is_empty() {
            turn(&mut queue);
        }
        side.submit(3..4);
        turn(&mut queue);
        device.end([3]);
        turn(&mut queue);
        assert_eq!(side.used(), [2, 3]);
        assert!(queue.stop().0.is_unfinished());
        (0..2).for_each(|name| world.set(page_of(name), Page::Here));
    });
}

/// What is done and could not be put on the ring was not done, for whoever goes on, if it may be done again.
#[test]
fn what_could_not_be_told_is_done_again() {
    each_format(|world, format| {
        let mut side = Side::new(world, format);
        let device = Holding::default();
        device.held().repeats = true;
        let mut queue = side.fresh(&device, side.start());
        side.submit(0..3);
        turn(&mut queue);
        device.end([0]);
        turn(&mut queue);
        let used_ring = if format == Format::Split { 2 } else { 0 };
        world.set(used_ring, Page::Missing);
        device.end([2, 1]);
        assert!(queue.drain());
        queue.flush().unwrap();
        let (stopped, _leftover) = queue.stop();
        assert!(!stopped.is_unfinished());
        world.set(used_ring, Page::Here);
        assert_eq!(side.used(), [0]);
        let next = Holding::default();
        let mut queue = side.fresh(&next, side.base(&stopped));
        turn(&mut queue);
        assert_eq!(next.held().started, [1, 2], "{format:?}");
        next.end([2, 1]);
        turn(&mut queue);
        assert_eq!(side.used(), [0, 2, 1]);
    });
}
