//! An access that is forbidden is one fault, however often its chain had to wait before that was known, and for what.

use crate::world::{PAGE, Page, REST, World};
use ringfence_device::queue::{Look, Report, Stopped};
use ringfence_device::{Back, Handler, Outcome, Request, Token, Unreachable};
use ringfence_dma::{Access, BusAddr, Fault};
use ringfence_ring::{Descriptor, Position, Rules};
use std::sync::{Arc, Mutex};

/// A header that is read, data and a status byte that are written, each on a page of its own.
const HEADER: usize = REST;
const DATA: usize = REST + 1;
const STATUS: usize = REST + 2;
const FAILED: u8 = 7;

/// What came of it all, as the device and whoever hears of faults have it.
#[derive(Clone, Default)]
struct Heard {
    faults: Arc<Mutex<Vec<Fault>>>,
    started: Arc<Mutex<Vec<Token>>>,
    back: Arc<Mutex<Vec<Token>>>,
    forgotten: Arc<Mutex<usize>>,
}

impl Report for Heard {
    fn fault(&mut self, fault: Fault) {
        self.faults.lock().unwrap().push(fault);
    }
}

impl Handler for Heard {
    fn start(&mut self, token: Token, _: &Request<'_>) -> Outcome {
        self.started.lock().unwrap().push(token);
        Outcome::Pending
    }

    fn unreachable(&mut self, request: &Unreachable<'_>) -> u32 {
        match request.write(request.writable_len - 1, &[FAILED]) {
            true => request.writable_len,
            false => 0,
        }
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        let over = self.back.lock().unwrap().drain(..).collect::<Vec<_>>();
        back.extend(over.into_iter().map(|token| Back { token, readable_from: 16, writable_from: 0 }));
    }

    fn go_on(&mut self, _: Token, _: &Request<'_>) -> Outcome {
        Outcome::Done(0)
    }

    fn forget(&mut self, _: Token) {
        *self.forgotten.lock().unwrap() += 1;
    }
}

/// Each page's state, turn by turn: of the data, and of the status byte.
type Turns = &'static [(Page, Page)];

use Page::{Forbidden, Here, Missing};

/// The first turn of each is one in which the chain waits.
const WAITED: &[Turns] = &[
    &[(Missing, Here), (Forbidden, Here)],
    &[(Missing, Here), (Missing, Here), (Forbidden, Here)],
    // The status byte can be told of only when it is here, and the data is forbidden all the while.
    &[(Forbidden, Missing), (Forbidden, Here)],
    &[(Missing, Missing), (Forbidden, Missing), (Forbidden, Missing), (Forbidden, Here)],
    // It was here, and then it was not.
    &[(Missing, Here), (Missing, Missing), (Forbidden, Missing), (Forbidden, Here)],
];

fn check(turns: Turns, comes_back: bool) {
    let world = World::new();
    let heard = Heard::default();
    let at = Position::start(Rules::default().format);
    let mut driver = world.driver();
    let mut queue = world.queue(Box::new(heard.clone()), Box::new(heard.clone()), Stopped::at(at), at);
    let part = |page: usize, len, access| Descriptor { addr: BusAddr((page * PAGE) as u64), len, access };
    let chain = [part(HEADER, 16, Access::Read), part(DATA, 64, Access::Write), part(STATUS, 1, Access::Write)];
    driver.add(&chain, None).unwrap();
    driver.publish();
    if comes_back {
        // The device has it already, and finds out when it brings it back.
        queue.turn(Look::Thorough).unwrap();
        let started = std::mem::take(&mut *heard.started.lock().unwrap());
        assert_eq!(started.len(), 1);
        heard.back.lock().unwrap().extend(started);
    }
    for (number, &(data, status)) in turns.iter().enumerate() {
        world.set(DATA, data);
        world.set(STATUS, status);
        queue.turn(Look::Thorough).unwrap();
        let is_last = number + 1 == turns.len();
        let faults = heard.faults.lock().unwrap().len();
        assert_eq!(faults, usize::from(is_last), "turn {number} of {turns:?}, comes back: {comes_back}");
        assert_eq!(driver.take_used().unwrap().is_some(), is_last);
    }
    assert_eq!(heard.faults.lock().unwrap()[0].addr, BusAddr((DATA * PAGE) as u64));
    let mut status = [0];
    world.ram.slice(STATUS * PAGE, 1).read(0, &mut status);
    assert_eq!(status, [FAILED]);
    assert_eq!(*heard.forgotten.lock().unwrap(), usize::from(comes_back));
    assert!(heard.started.lock().unwrap().is_empty(), "it was started though it can't be carried out");
    for _ in 0..3 {
        queue.turn(Look::Thorough).unwrap();
    }
    assert_eq!(heard.faults.lock().unwrap().len(), 1, "told of again when it was over");
}

#[test]
fn a_forbidden_access_whose_chain_had_waited_is_one_fault() {
    for turns in WAITED {
        check(turns, false);
        check(turns, true);
    }
}
