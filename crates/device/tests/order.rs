//! A queue that stops and goes on: what was begun starts anew in the order in which it came.

use ringfence_device::queue::{Look, Queue, Report, Stopped};
use ringfence_device::{Back, Handler, Outcome, Request, Token, Unreachable};
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, Gpa, HostSlice, Memory, Physical, Ram, Stop, Ticket, Visit};
use ringfence_ring::{Descriptor, DeviceQueue, DriverQueue, Layout, Position, RingCells, RingSlices, Rules};
use std::sync::{Arc, Mutex};

const SIZE: u16 = 8;

/// Memory without an IOMMU.
#[derive(Clone)]
struct Flat(Arc<Ram>);

impl Memory for Flat {
    type Lease = ();
    type Visit<'m> = FlatVisit<'m>;

    fn visit(&mut self) -> FlatVisit<'_> {
        FlatVisit(&self.0)
    }
}

struct FlatVisit<'m>(&'m Ram);

impl Visit for FlatVisit<'_> {
    type Lease = ();

    fn resolve(&self, addr: BusAddr, len: usize, access: Access, _: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let nowhere = Fault { addr, access, reason: FaultReason::Unmapped };
        Physical::slice(self.0, Gpa(addr.0), len).ok_or(nowhere.into())
    }

    fn lease(&self, _: &[(BusAddr, u32)]) {}
}

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
    let memory = Flat(Arc::new(Ram::new(4 * 4096)));
    let ram = Arc::clone(&memory.0);
    let rules = Rules::default();
    let slices = RingSlices {
        descriptors: ram.slice(0, 4096),
        driver: ram.slice(4096, 4096),
        device: ram.slice(2 * 4096, 4096),
    };
    let at = |page: u64| BusAddr(page * 4096);
    let layout = Layout { size: SIZE, descriptors: at(0), driver: at(1), device: at(2) };
    let mut driver = DriverQueue::new(rules, SIZE, RingCells::new(rules.format, SIZE, &slices)).unwrap();
    let mut submit = |name: u8| {
        let place = usize::from(name) * 16;
        ram.slice(3 * 4096 + place, 1).write(0, &[name]);
        let addr = BusAddr((3 * 4096 + place) as u64);
        driver.add(&[Descriptor { addr, len: 1, access: Access::Read }], None).unwrap();
        driver.publish();
    };
    let start = |holding: &Holding, stopped, position| {
        let ring = DeviceQueue::new(rules, layout, position).unwrap();
        Queue::new(ring, SIZE, memory.clone(), Box::new(holding.clone()), Box::new(holding.clone()), stopped)
    };
    let first = Holding::default();
    let mut queue = start(&first, Stopped::at(Position::start(rules.format)), Position::start(rules.format));
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
