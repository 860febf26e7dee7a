//! A queue that stops and goes on: what was begun starts anew in the order in which it came.

use crate::world::{PAGE, REST, World};
use ringfence_device::queue::{Look, Report, Stopped};
use ringfence_device::{Back, Handler, Outcome, Request, Token, Unreachable};
use ringfence_dma::{Access, BusAddr, Fault};
use ringfence_ring::{Descriptor, Position, Rules};
use std::sync::{Arc, Mutex};

/// Starts everything, and ends what it is told to.
#[derive(Clone, Default)]
struct Holding {
    /// The first byte of each request, in the order in which they started.
    started: Arc<Mutex<Vec<(Token, u8)>>>,
    over: Arc<Mutex<Vec<Token>>>,
}

impl Handler for Holding {
    fn start(&mut self, token: Token, request: &Request<'_>) -> Outcome {
        let mut name = [0];
        assert!(request.readable.read(0, &mut name));
        self.started.lock().unwrap().push((token, name[0]));
        Outcome::Pending
    }

    fn unreachable(&mut self, _: &Unreachable<'_>) -> u32 {
        0
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        let over = self.over.lock().unwrap().drain(..).collect::<Vec<_>>();
        back.extend(over.into_iter().map(|token| Back { token, readable_from: 1, writable_from: 0 }));
    }

    fn go_on(&mut self, _: Token, _: &Request<'_>) -> Outcome {
        Outcome::Done(0)
    }
}

impl Report for Holding {
    fn fault(&mut self, fault: Fault) {
        panic!("{fault}");
    }
}

#[test]
fn what_was_begun_starts_anew_in_the_order_in_which_it_came() {
    let world = World::new();
    let mut driver = world.driver();
    let mut submit = |name: u8| {
        let place = usize::from(name) * 16;
        world.ram.slice(REST * PAGE + place, 1).write(0, &[name]);
        let addr = BusAddr((REST * PAGE + place) as u64);
        driver.add(&[Descriptor { addr, len: 1, access: Access::Read }], None).unwrap();
        driver.publish();
    };
    let start = |holding: &Holding, stopped, position| {
        world.queue(Box::new(holding.clone()), Box::new(holding.clone()), stopped, position)
    };
    let first = Holding::default();
    let mut queue =
        start(&first, Stopped::at(Position::start(Rules::default().format)), Position::start(Rules::default().format));
    (0..4).for_each(&mut submit);
    queue.turn(Look::Thorough).unwrap();
    // The first two end, and those that come next have their tokens.
    let tokens: Vec<_> = first.started.lock().unwrap()[..2].iter().map(|&(token, _)| token).collect();
    first.over.lock().unwrap().extend(tokens);
    queue.turn(Look::Thorough).unwrap();
    (4..6).for_each(&mut submit);
    queue.turn(Look::Thorough).unwrap();
    let (stopped, _leftover) = queue.stop();

    let second = Holding::default();
    let position = stopped.position;
    let mut queue = start(&second, stopped, position);
    queue.turn(Look::Thorough).unwrap();
    let names: Vec<u8> = second.started.lock().unwrap().iter().map(|&(_, name)| name).collect();
    assert_eq!(names, [2, 3, 4, 5]);
}
