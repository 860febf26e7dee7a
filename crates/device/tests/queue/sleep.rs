//! What a queue waits for when there is nothing to do.

use crate::world::{PAGE, REST, World};
use ringfence_device::queue::{Look, Queue, Report, Stopped};
use ringfence_device::{Back, Handler, Outcome, Request, Token, Unreachable, eventfd};
use ringfence_dma::{Access, BusAddr, Fault};
use ringfence_ring::{Descriptor, Position, Rules};
use rustix::event::{EventfdFlags, eventfd as new_eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

/// What is said to the device by others, and what it says.
struct Told {
    event: OwnedFd,
    has_room: bool,
    over: Vec<Token>,
}

/// Whose descriptor stays readable until it was asked to tell and is looked at again.
struct Busy {
    told: Arc<Mutex<Told>>,
    event: OwnedFd,
    listening: bool,
}

impl Handler for Busy {
    fn start(&mut self, _: Token, _: &Request<'_>) -> Outcome {
        if self.told.lock().unwrap().has_room { Outcome::Pending } else { Outcome::NoRoom }
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

fn is_rung(queue: &Queue<World>) -> bool {
    let Some(fd) = queue.completion_fd() else { return false };
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
}

/// A device that rings while it has nothing of this queue's does not keep its thread awake: nobody would ever make it stop.
/// One that has something, or had no room for it, is heard.
#[test]
fn a_device_is_heard_while_it_has_something_or_had_no_room() {
    let event = new_eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let told = Told { event: event.try_clone().unwrap(), has_room: false, over: Vec::new() };
    let told = Arc::new(Mutex::new(told));
    let ring = || eventfd::ring(told.lock().unwrap().event.as_fd());
    let world = World::new();
    let mut driver = world.driver();
    let position = Position::start(Rules::default().format);
    let handler = Busy { told: Arc::clone(&told), event, listening: false };
    let mut queue = world.queue(Box::new(handler), Box::new(Silence), Stopped::at(position), position);

    ring();
    for _ in 0..3 {
        assert!(!queue.turn(Look::Not).unwrap().worked);
        assert!(!queue.listen().unwrap());
        assert!(!is_rung(&queue), "it has nothing to say to this queue");
    }

    let buffer = Descriptor { addr: BusAddr((REST * PAGE) as u64), len: 1, access: Access::Read };
    driver.add(&[buffer], None).unwrap();
    driver.publish();
    assert!(queue.turn(Look::Not).unwrap().worked);
    queue.listen().unwrap();
    assert!(is_rung(&queue), "there may be room");
    queue.turn(Look::Not).unwrap();
    queue.listen().unwrap();
    assert!(!is_rung(&queue), "there was none");

    told.lock().unwrap().has_room = true;
    ring();
    assert!(is_rung(&queue));
    queue.turn(Look::Not).unwrap();
    assert_eq!(queue.under_way(), 1);
    queue.listen().unwrap();
    assert!(!is_rung(&queue));
    told.lock().unwrap().over.push(0);
    ring();
    assert!(is_rung(&queue));
    assert!(queue.turn(Look::Not).unwrap().worked);
    assert!(driver.take_used().unwrap().is_some());
    queue.listen().unwrap();
    assert!(!is_rung(&queue));
}
