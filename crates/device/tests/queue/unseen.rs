//! Buffers that are posted before it is known where they are.

use crate::world::{PAGE, Page, REST, World};
use ringfence_device::queue::{Look, Report, Stopped};
use ringfence_device::{Back, Handler, Outcome, Request, Token, Unreachable};
use ringfence_dma::{Access, BusAddr, Fault};
use ringfence_ring::{Descriptor, Position, Rules};
use std::sync::{Arc, Mutex};

/// Fills what it was given once something has arrived.
#[derive(Clone, Default)]
struct Filling {
    in_order: bool,
    posted: Arc<Mutex<Vec<Token>>>,
    arrived: Arc<Mutex<bool>>,
    faults: Arc<Mutex<usize>>,
}

impl Handler for Filling {
    fn is_in_order(&self) -> bool {
        self.in_order
    }

    fn starts_unseen(&self) -> bool {
        true
    }

    fn start(&mut self, token: Token, request: &Request<'_>) -> Outcome {
        self.posted.lock().unwrap().push(token);
        assert_eq!(request.readable.len() + request.writable.len(), 32);
        Outcome::Pending
    }

    fn unreachable(&mut self, _: &Unreachable<'_>) -> u32 {
        0
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        if *self.arrived.lock().unwrap() {
            let over = self.posted.lock().unwrap().drain(..).collect::<Vec<_>>();
            back.extend(over.into_iter().map(|token| Back { token, readable_from: 0, writable_from: 0 }));
        }
    }

    fn go_on(&mut self, _: Token, request: &Request<'_>) -> Outcome {
        assert!(request.writable.write(0, &[7; 32]));
        Outcome::Done(32)
    }
}

impl Report for Filling {
    fn fault(&mut self, _: Fault) {
        *self.faults.lock().unwrap() += 1;
    }
}

/// What becomes of one of 32 bytes that are missing when it is posted, and then are so.
fn check(access: Access, then: Page) -> (Filling, Option<u32>) {
    let world = World::new();
    let filling = Filling { in_order: true, ..Filling::default() };
    let at = Position::start(Rules::default().format);
    let mut driver = world.driver();
    let mut queue = world.queue(Box::new(filling.clone()), Box::new(filling.clone()), Stopped::at(at), at);
    world.set(REST, Page::Missing);
    let buffer = Descriptor { addr: BusAddr((REST * PAGE) as u64), len: 32, access };
    driver.add(&[buffer], None).unwrap();
    driver.publish();
    queue.turn(Look::Thorough).unwrap();
    if access == Access::Read {
        assert!(filling.posted.lock().unwrap().is_empty(), "its bytes are what starts it");
        return (filling, None);
    }
    assert_eq!(filling.posted.lock().unwrap().len(), 1, "it waits for nothing");
    *filling.arrived.lock().unwrap() = true;
    queue.turn(Look::Thorough).unwrap();
    assert_eq!(driver.take_used(), Ok(None), "there is nowhere to write to");
    world.set(REST, then);
    queue.turn(Look::Thorough).unwrap();
    let used = driver.take_used().unwrap().map(|used| used.written);
    let mut bytes = [0; 32];
    world.ram.slice(REST * PAGE, 32).read(0, &mut bytes);
    assert_eq!(bytes == [7; 32], used == Some(32));
    (filling, used)
}

#[test]
fn what_is_only_written_to_is_posted_before_it_is_known_where_it_is() {
    let (filling, used) = check(Access::Write, Page::Here);
    assert_eq!((used, *filling.faults.lock().unwrap()), (Some(32), 0));
    let (filling, used) = check(Access::Write, Page::Forbidden);
    assert_eq!((used, *filling.faults.lock().unwrap()), (Some(0), 1));
    check(Access::Read, Page::Here);
}

/// A device whose buffers are all filled gets others before the driver hears of these, however long it takes to see which: the
/// driver may answer at once, and there are devices that have no patience.
#[test]
fn the_driver_hears_of_a_buffer_once_the_device_has_the_next() {
    let world = World::new();
    let filling = Filling { in_order: true, ..Filling::default() };
    let at = Position::start(Rules::default().format);
    let mut driver = world.driver();
    let mut queue = world.queue(Box::new(filling.clone()), Box::new(filling.clone()), Stopped::at(at), at);
    let mut post = |number: usize| {
        let addr = BusAddr((REST * PAGE + number * 64) as u64);
        driver.add(&[Descriptor { addr, len: 32, access: Access::Write }], None).unwrap();
        driver.publish();
    };
    post(0);
    queue.turn(Look::Thorough).unwrap();
    post(1);
    // Where the driver says what it has made available.
    world.set(1, Page::Missing);
    *filling.arrived.lock().unwrap() = true;
    queue.turn(Look::Thorough).unwrap();
    assert_eq!(filling.posted.lock().unwrap().len(), 0, "nothing is posted");
    assert_eq!(driver.take_used(), Ok(None));
    assert!(queue.is_waiting());

    *filling.arrived.lock().unwrap() = false;
    world.set(1, Page::Here);
    queue.turn(Look::Thorough).unwrap();
    assert_eq!(filling.posted.lock().unwrap().len(), 1);
    assert_eq!(driver.take_used().unwrap().map(|used| used.written), Some(32));
}

/// Whoever stops the queue may be who would have brought what is missing.
#[test]
fn a_queue_that_stops_waits_for_no_translation() {
    for in_order in [false, true] {
        let world = World::new();
        let filling = Filling { in_order, ..Filling::default() };
        let at = Position::start(Rules::default().format);
        let mut driver = world.driver();
        let mut queue = world.queue(Box::new(filling.clone()), Box::new(filling.clone()), Stopped::at(at), at);
        world.set(REST, Page::Missing);
        for number in 0..3 {
            let addr = BusAddr((REST * PAGE + number * 64) as u64);
            driver.add(&[Descriptor { addr, len: 32, access: Access::Write }], None).unwrap();
        }
        driver.publish();
        queue.turn(Look::Thorough).unwrap();
        assert!(!queue.drain(), "the device has them");
        *filling.arrived.lock().unwrap() = true;
        assert!(queue.drain(), "the device has done all that it can, in order {in_order}");
        let (stopped, _leftover) = queue.stop();
        assert_eq!((stopped.position, stopped.is_unfinished()), (at, false), "they are the ring's again");
    }
}
