//! What a queue waits for when there is nothing to do.

use crate::world::{PAGE, Page, REST, World};
use ringfence_device::queue::{Look, Queue, Report, Stopped};
use ringfence_device::worker::{Bells, Control, Worker};
use ringfence_device::{Back, Handler, Outcome, Request, Token, Unreachable, eventfd};
use ringfence_dma::{Access, BusAddr, Fault};
use ringfence_ring::{Descriptor, DriverQueue, Position, RingCells, Rules};
use rustix::event::{EventfdFlags, eventfd as new_eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What is said to the device by others, and what it says.
struct Told {
    event: OwnedFd,
    has_room: bool,
    over: Vec<Token>,
    /// How often it was asked to start a request.
    starts: usize,
}

/// Whose descriptor stays readable until it was asked to tell and is looked at again.
struct Busy {
    told: Arc<Mutex<Told>>,
    event: OwnedFd,
    listening: bool,
}

impl Handler for Busy {
    fn start(&mut self, _: Token, _: &Request<'_>) -> Outcome {
        let told = &mut *self.told.lock().unwrap();
        told.starts += 1;
        if told.has_room { Outcome::Pending } else { Outcome::NoRoom }
    }

    fn unreachable(&mut self, _: &Unreachable<'_>) -> u32 {
        0
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        if std::mem::take(&mut self.listening) {
            eventfd::hush(self.event.as_fd());
        }
        let over = std::mem::take(&mut self.told.lock().unwrap().over);
        back.extend(over.into_iter().map(|token| Back { token, readable_from: 1, writable_from: 0 }));
    }

    fn go_on(&mut self, _: Token, _: &Request<'_>) -> Outcome {
        Outcome::Done(0)
    }

    fn listen(&mut self) -> bool {
        self.listening = true;
        false
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }
}

struct Silence;

impl Report for Silence {
    fn fault(&mut self, fault: Fault) {
        panic!("{fault}");
    }
}

/// A queue of a device that has no room yet.
fn busy(world: &World) -> (Queue<World>, Arc<Mutex<Told>>) {
    let event = new_eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let told = Told { event: event.try_clone().unwrap(), has_room: false, over: Vec::new(), starts: 0 };
    let told = Arc::new(Mutex::new(told));
    let position = Position::start(Rules::default().format);
    let handler = Busy { told: Arc::clone(&told), event, listening: false };
    (world.queue(Box::new(handler), Box::new(Silence), Stopped::at(position), position), told)
}

/// A request of one byte in `page`.
fn submit(driver: &mut DriverQueue<RingCells<'_>>, page: usize) {
    driver.add(&[Descriptor { addr: BusAddr((page * PAGE) as u64), len: 1, access: Access::Read }], None).unwrap();
    driver.publish();
}

fn is_rung(queue: &Queue<World>) -> bool {
    let Some(fd) = queue.completion_fd() else { return false };
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
}

/// A device that rings while it has nothing of this queue's does not keep its thread awake: nobody would ever make it stop.
/// One that has something, or had no room for it, is heard.
#[test]
fn a_device_is_heard_while_it_has_something_or_had_no_room() {
    let world = World::new();
    let mut driver = world.driver();
    let (mut queue, told) = busy(&world);
    let ring = || eventfd::ring(told.lock().unwrap().event.as_fd());

    ring();
    for _ in 0..3 {
        assert!(!queue.turn(Look::Not).unwrap().worked);
        assert!(!queue.listen().unwrap());
        assert!(!is_rung(&queue), "it has nothing to say to this queue");
    }

    submit(&mut driver, REST);
    assert!(queue.turn(Look::Not).unwrap().worked);
    queue.listen().unwrap();
    assert!(is_rung(&queue), "there may be room");
    queue.turn(Look::Not).unwrap();
    queue.listen().unwrap();
    assert!(!is_rung(&queue), "there was none");
    submit(&mut driver, REST);
    assert!(!queue.turn(Look::Not).unwrap().worked);
    assert!(!queue.listen().unwrap(), "another one is available, and can't be taken either");

    told.lock().unwrap().has_room = true;
    ring();
    assert!(is_rung(&queue));
    queue.turn(Look::Not).unwrap();
    assert_eq!(queue.under_way(), 2);
    queue.listen().unwrap();
    assert!(!is_rung(&queue));
    told.lock().unwrap().over.extend([0, 1]);
    ring();
    assert!(is_rung(&queue));
    assert!(queue.turn(Look::Not).unwrap().worked);
    assert!(driver.take_used().unwrap().is_some() && driver.take_used().unwrap().is_some());
    queue.listen().unwrap();
    assert!(!is_rung(&queue));
}

/// A translation is looked for now and then though nobody said that it has come. Room is not: the device says so.
#[test]
fn what_lacks_room_alone_is_not_tried_again_by_time() {
    let world = World::new();
    let mut driver = world.driver();
    let (mut queue, told) = busy(&world);
    assert!(!queue.is_waiting());
    submit(&mut driver, REST);
    queue.turn(Look::Not).unwrap();
    assert!(!queue.is_waiting(), "it lacks room");
    queue.turn(Look::Thorough).unwrap();
    assert!(!queue.is_waiting(), "still room");
    told.lock().unwrap().has_room = true;
    queue.turn(Look::Not).unwrap();
    assert_eq!(queue.under_way(), 1);

    world.set(REST + 1, Page::Missing);
    submit(&mut driver, REST + 1);
    queue.turn(Look::Not).unwrap();
    assert!(queue.is_waiting(), "it lacks a translation");
    told.lock().unwrap().has_room = false;
    submit(&mut driver, REST);
    queue.turn(Look::Not).unwrap();
    assert!(queue.is_waiting(), "one lacks room and one that came before it a translation");
    world.set(REST + 1, Page::Here);
    queue.turn(Look::Thorough).unwrap();
    assert!(!queue.is_waiting(), "both lack room");
}

/// A driver that posts more than there is room for, as of a card that is idle, costs nothing until there is some.
#[test]
fn a_thread_whose_device_has_no_room_sleeps_until_it_is_told() {
    let world = World::new();
    let mut driver = world.driver();
    let (queue, told) = busy(&world);
    let kick = new_eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let bells = Bells {
        kick: Some(kick.try_clone().unwrap()),
        error: None,
        poll: Duration::ZERO,
        patience: Duration::from_secs(60),
    };
    let worker = Worker::start("queue", queue, Control::new(None).unwrap(), bells).unwrap();
    submit(&mut driver, REST);
    eventfd::ring(kick.as_fd());
    let deadline = Instant::now() + Duration::from_secs(60);
    let until = |done: &mut dyn FnMut(&mut Told) -> bool| {
        while !done(&mut told.lock().unwrap()) {
            assert!(Instant::now() < deadline, "nobody wakes it");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    until(&mut |told| told.starts > 0);
    // One more, which stays on the ring.
    submit(&mut driver, REST);
    eventfd::ring(kick.as_fd());
    // Long enough to be tried again many times.
    std::thread::sleep(Duration::from_millis(200));
    // As it comes, once more in case there is room by now, and whenever the driver rings.
    let starts = told.lock().unwrap().starts;
    assert!(starts <= 5, "tried {starts} times");

    let tell = |told: &mut Told| eventfd::ring(told.event.as_fd());
    {
        let told = &mut *told.lock().unwrap();
        told.has_room = true;
        tell(told);
    }
    until(&mut |told| told.starts >= starts + 2);
    {
        let told = &mut *told.lock().unwrap();
        told.over.extend([0, 1]);
        tell(told);
    }
    (0..2).for_each(|_| until(&mut |_| driver.take_used().unwrap().is_some()));
    drop(worker);
}
