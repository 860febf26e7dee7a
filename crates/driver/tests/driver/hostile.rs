//! A device that writes whatever it likes wherever it can, at any time: into rings, records and buffers.

use crate::peer::*;
use crate::world::*;
use proptest::prelude::*;
use ringfence_dma::{Buffer, BusAddr, Gpa, HostSlice, Mapper, Permission};
use ringfence_driver::blk::{Blk, BlkError, Options, Request, RequestId};
use ringfence_driver::console::Console;
use ringfence_driver::embedded::{DeviceEnd, Embedded, EmbeddedError};
use ringfence_driver::mapper::{Direct, Iommu, Run};
use ringfence_driver::net::{self, Net};
use ringfence_driver::policy::{Addressing, Identity, IommuMode};
use ringfence_driver::rng::Rng;
use ringfence_driver::viommu::Viommu;
use ringfence_driver::{LoanError, LoanId};
use ringfence_ring::Layout;
use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::rc::Rc;

#[derive(Clone, Debug)]
enum Step {
    Read(u8),
    Write(u8),
    Discard,
    Id,
    Poll,
    Notify,
    /// The device serves what there is.
    Wait,
    Scrawl(Scrawl),
}

/// What a device writes over something.
#[derive(Clone, Debug)]
enum Scrawl {
    Anything {
        at: u16,
        bytes: Vec<u8>,
    },
    /// Aimed: an index near what it should be.
    Nudge {
        at: u16,
        by: i8,
    },
}

/// As far into coherent memory as `reach`. Rings begin on pages of their own.
fn scrawl(reach: u16, rings: u16) -> impl Strategy<Value = Scrawl> {
    prop_oneof![
        1 => (0..reach, prop::collection::vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Scrawl::Anything { at, bytes }),
        2 => (0..rings, 0..1200_u16, any::<i8>()).prop_map(|(ring, at, by)| Scrawl::Nudge { at: ring * 4096 + at, by }),
    ]
}

impl Scrawl {
    fn over(&self, memory: HostSlice<'_>) {
        match *self {
            Scrawl::Anything { at, ref bytes } => memory.write(at.into(), bytes),
            Scrawl::Nudge { at, by } => {
                let mut byte = [0];
                memory.read(at.into(), &mut byte);
                memory.write(at.into(), &[byte[0].wrapping_add_signed(by)]);
            }
        }
    }
}

/// As much of memory as is scrawled over.
const COHERENT: usize = 16 << 10;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => any::<u8>().prop_map(Step::Read),
        3 => any::<u8>().prop_map(Step::Write),
        1 => Just(Step::Discard),
        1 => Just(Step::Id),
        4 => Just(Step::Poll),
        2 => Just(Step::Notify),
        2 => Just(Step::Wait),
        6 => scrawl(3000, 1).prop_map(Step::Scrawl),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// No panic; each request completes at most once; a broken disk stays broken; what is lent is lent until it came
    /// back or the device was reset, and everything is back in the end.
    #[test]
    fn a_hostile_device_gets_nowhere(
        ring in prop::sample::select(vec![0, EVENT_IDX, INDIRECT, PACKED, PACKED | EVENT_IDX, PACKED | INDIRECT]),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let world = World::new();
        let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Offer);
        transport.device_mut().careless = true;
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut disk = Blk::start(&mut transport, new_driver(mapper), Options { depth: 8, segments: 4 }).unwrap();
            let idle = world.domain.mapped();
            let mut pending: HashSet<RequestId> = HashSet::new();
            let mut broken = None;
            for step in steps {
                let buffer = |number: u8| [world.buffer(usize::from(number) * 512, 512)];
                let result = match step {
                    Step::Read(number) => disk.submit(Request::Read { sector: 1, into: &buffer(number) }).map(Some),
                    Step::Write(number) => disk.submit(Request::Write { sector: 1, from: &buffer(number) }).map(Some),
                    Step::Discard => disk.submit(Request::Discard { sector: 1, sectors: 1 }).map(Some),
                    Step::Id => disk.submit(Request::Id).map(Some),
                    Step::Notify => disk.notify().map(|()| None),
                    Step::Wait => disk.wait().map(|()| None),
                    Step::Poll => disk.poll().map(|completion| {
                        if let Some(completion) = completion {
                            assert!(pending.remove(&completion.id), "{completion:?} was not under way");
                        }
                        None
                    }),
                    Step::Scrawl(scrawl) => {
                        scrawl.over(world.ram.slice(0, COHERENT));
                        Ok(None)
                    }
                };
                match result {
                    Ok(id) => pending.extend(id),
                    Err(BlkError::Broken(error)) => {
                        assert_eq!(*broken.get_or_insert(error), error);
                    }
                    Err(BlkError::Busy | BlkError::Transport(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                if let Some(error) = broken {
                    assert_eq!(disk.poll(), Err(BlkError::Broken(error)));
                }
                assert!(world.domain.mapped() <= idle + pending.len());
            }
            drop(disk);
            assert_eq!(world.domain.mapped(), 0);
        });
    }
}

/// What a device does that no device may.
#[derive(Clone, Debug)]
enum Mischief {
    Scrawl(Scrawl),
    /// What it uses next it uses so.
    Crime(Crime),
    /// It forgets all of its queues.
    Forget,
}

fn mischief(rings: u16) -> impl Strategy<Value = Mischief> {
    prop_oneof![
        6 => scrawl(9000, rings).prop_map(Mischief::Scrawl),
        1 => prop::sample::select(CRIMES.to_vec()).prop_map(Mischief::Crime),
        1 => Just(Mischief::Forget),
    ]
}

fn commit(mischief: Mischief, world: &World, peer: &mut Peer<'_>) {
    match mischief {
        Mischief::Scrawl(scrawl) => scrawl.over(world.ram.slice(0, COHERENT)),
        Mischief::Crime(crime) => peer.crime = crime,
        Mischief::Forget => DeviceEnd::reset(peer),
    }
}

/// A source, a card or a console, as far as a test of all of them goes.
#[derive(Clone, Debug)]
enum LoanStep {
    Lend(u8),
    Back,
    Send(u8),
    Sent,
    Notify,
    Wait,
    Restart,
    Mischief(Mischief),
}

fn loan_step() -> impl Strategy<Value = LoanStep> {
    prop_oneof![
        3 => any::<u8>().prop_map(LoanStep::Lend),
        4 => Just(LoanStep::Back),
        3 => any::<u8>().prop_map(LoanStep::Send),
        4 => Just(LoanStep::Sent),
        2 => Just(LoanStep::Notify),
        2 => Just(LoanStep::Wait),
        1 => Just(LoanStep::Restart),
        6 => mischief(2).prop_map(LoanStep::Mischief),
    ]
}

/// What came back, and how much of it is filled.
type Back<'a> = Option<(LoanId, Buffer<'a>, usize)>;

/// What the test asks of a driver, whichever it is.
trait Lends<'a> {
    type Error: std::fmt::Debug;
    fn lend(&mut self, buffer: Buffer<'a>) -> Result<LoanId, LoanError<Self::Error>>;
    fn back(&mut self) -> Result<Back<'a>, LoanError<Self::Error>>;
    fn send(&mut self, buffer: Buffer<'a>) -> Result<LoanId, LoanError<Self::Error>>;
    fn sent(&mut self) -> Result<Option<LoanId>, LoanError<Self::Error>>;
    fn notify(&mut self) -> Result<(), LoanError<Self::Error>>;
    fn wait(&mut self) -> Result<(), LoanError<Self::Error>>;
    fn restart(&mut self) -> Result<(), LoanError<Self::Error>>;
    fn peer(&mut self) -> &mut Peer<'a>;
}

macro_rules! lends {
    ($driver:ident, $lend:ident, $back:ident, |$it:ident, $buffer:ident| $send:expr, $sent:expr) => {
        impl<'a> Lends<'a> for $driver<'a, Embedded<Peer<'a>>, dyn Mapper + 'a> {
            type Error = EmbeddedError;

            fn lend(&mut self, buffer: Buffer<'a>) -> Result<LoanId, LoanError<EmbeddedError>> {
                self.$lend(buffer)
            }

            fn back(&mut self) -> Result<Back<'a>, LoanError<EmbeddedError>> {
                Ok(self.$back()?.map(|back| (back.id, back.buffer, back.len)))
            }

            fn send(&mut self, $buffer: Buffer<'a>) -> Result<LoanId, LoanError<EmbeddedError>> {
                let $it = self;
                $send
            }

            fn sent(&mut self) -> Result<Option<LoanId>, LoanError<EmbeddedError>> {
                let sent: fn(&mut Self) -> Result<Option<LoanId>, LoanError<EmbeddedError>> = $sent;
                sent(self)
            }

            fn notify(&mut self) -> Result<(), LoanError<EmbeddedError>> {
                $driver::notify(self)
            }

            fn wait(&mut self) -> Result<(), LoanError<EmbeddedError>> {
                $driver::wait(self)
            }

            fn restart(&mut self) -> Result<(), LoanError<EmbeddedError>> {
                $driver::restart(self)
            }

            fn peer(&mut self) -> &mut Peer<'a> {
                self.device_mut().transport_mut().device_mut()
            }
        }
    };
}

lends!(Net, offer, received, |card, buffer| card.send(&[buffer]), |card| card.sent());
lends!(Console, offer, received, |console, buffer| Console::send(console, &[buffer]), |console| console.sent());
// It has one direction.
lends!(Rng, submit, poll, |_rng, _buffer| Err(LoanError::Busy), |_| Ok(None));

/// Each buffer comes back at most once, with no more bytes than it has; what is lent is lent until it came back, or the
/// queue or the device was reset; a broken device stays broken until it was.
fn gets_nowhere<'a>(world: &'a World, driver: &mut impl Lends<'a>, steps: Vec<LoanStep>) {
    let idle = world.domain.mapped();
    let (mut lent, mut sent, mut broken) = (HashSet::new(), HashSet::new(), HashSet::new());
    for step in steps {
        let buffer = |number: u8| world.buffer(usize::from(number) * 2048, 1514);
        let result = match step {
            LoanStep::Lend(number) => driver.lend(buffer(number)).map(|id| assert!(lent.insert(id))),
            LoanStep::Send(number) => driver.send(buffer(number)).map(|id| assert!(sent.insert(id))),
            LoanStep::Back => driver.back().map(|back| {
                if let Some((id, buffer, len)) = back {
                    assert!(len <= buffer.len());
                    assert!(lent.remove(&id));
                }
            }),
            LoanStep::Sent => driver.sent().map(|id| {
                if let Some(id) = id {
                    assert!(sent.remove(&id));
                }
            }),
            LoanStep::Notify => driver.notify(),
            LoanStep::Wait => driver.wait(),
            LoanStep::Restart => driver.restart().map(|()| {
                [&mut lent, &mut sent].into_iter().for_each(HashSet::clear);
                broken.clear();
                assert_eq!(world.domain.mapped(), idle, "all is back");
            }),
            LoanStep::Mischief(mischief) => {
                commit(mischief, world, driver.peer());
                Ok(())
            }
        };
        match result {
            Ok(()) | Err(LoanError::Busy | LoanError::Transport(_)) => {}
            Err(LoanError::Broken(error)) => {
                broken.insert(error);
                // A queue breaks once, and there are two of them.
                assert!(broken.len() <= 2, "{broken:?}");
            }
            // Its buffer is back, and nobody says which it was.
            Err(LoanError::Short { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
        assert!(world.domain.mapped() <= idle + lent.len() + sent.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_card_source_or_console_gets_nowhere(
        ring in prop::sample::select(vec![0, EVENT_IDX, PACKED, PACKED | EVENT_IDX]),
        steps in prop::collection::vec(loan_step(), 1..60),
    ) {
        for (device, queues) in [(1, 2), (3, 2), (4, 1)] {
            let world = World::new();
            let answer = |queue, _: &[u8], room: usize| Some(vec![7; if queue == 0 { room.min(60) } else { 0 }]);
            world.with_mapper(Mapping::Dynamic, |mapper| {
                let mut peer = Peer::new(&world, device, queues, ring | RING_RESET, answer);
                peer.careless = true;
                let (transport, host) = (peer.embedded(IommuMode::Offer), new_driver(mapper));
                match device {
                    1 => {
                        let options = net::Options { depth: 8, segments: 1 };
                        gets_nowhere(&world, &mut Net::start(transport, host, options).unwrap(), steps.clone());
                    }
                    3 => gets_nowhere(&world, &mut Console::start(transport, host).unwrap(), steps.clone()),
                    _ => gets_nowhere(&world, &mut Rng::start(transport, host).unwrap(), steps.clone()),
                }
                assert_eq!(world.domain.mapped(), 0, "the device was reset");
            });
        }
    }
}

#[derive(Clone, Debug)]
enum IommuStep {
    Attach,
    Probe,
    Map(u8),
    Unmap(u8),
    Fault,
    /// So many faults at once, of any kind.
    Flood(u8, Vec<u8>),
    Restart,
    Mischief(Mischief),
}

fn iommu_step() -> impl Strategy<Value = IommuStep> {
    prop_oneof![
        2 => Just(IommuStep::Attach),
        2 => Just(IommuStep::Probe),
        4 => any::<u8>().prop_map(IommuStep::Map),
        4 => any::<u8>().prop_map(IommuStep::Unmap),
        4 => Just(IommuStep::Fault),
        2 => (any::<u8>(), prop::collection::vec(any::<u8>(), 0..25)).prop_map(|(count, event)| IommuStep::Flood(count, event)),
        1 => Just(IommuStep::Restart),
        6 => mischief(4).prop_map(IommuStep::Mischief),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// An IOMMU that answers with anything, tells of faults without end, and writes into its own rings: no panic, an error
    /// for each request that was not answered as it must be, and no wait that does not end.
    #[test]
    fn a_hostile_iommu_gets_nowhere(
        ring in prop::sample::select(vec![0, EVENT_IDX, PACKED, PACKED | EVENT_IDX]),
        answers in prop::collection::vec(any::<u8>(), 1..200),
        steps in prop::collection::vec(iommu_step(), 1..40),
    ) {
        const MAP_UNMAP_AND_PROBE: u64 = 1 << 2 | 1 << 4;
        let world = World::new();
        let faults = RefCell::new(VecDeque::<Vec<u8>>::new());
        let mut at = 0;
        let answer = |queue, _: &[u8], room: usize| {
            if queue == 1 {
                return faults.borrow_mut().pop_front();
            }
            // Often it is even the truth.
            at += 1;
            let byte = answers[at % answers.len()];
            match byte {
                0..128 => Some(vec![0; room]),
                128..144 => None,
                _ => Some((0..room).map(|offset| answers[(at + offset) % answers.len()]).collect()),
            }
        };
        let direct = Direct::new(world.buffer(0, 64 * PAGE));
        let mut peer = Peer::new(&world, 23, 2, ring | MAP_UNMAP_AND_PROBE | RING_RESET, answer);
        peer.careless = true;
        peer.config = [&0xffff_f000_u64.to_le_bytes()[..], &[0; 24], &64_u32.to_le_bytes()].concat();
        let peer = Shared(Rc::new(RefCell::new(peer)));
        let iommu = Viommu::start(Embedded::new(peer.clone(), IommuMode::Off).with_patience(50), &direct).unwrap();
        let memory = world.buffer(0, 64 * PAGE);
        let mut space = None;
        for step in steps {
            let page = |number: u8| BusAddr((1 << 40) + u64::from(number) * 4096);
            match step {
                IommuStep::Attach => space = iommu.attach(1, 0x18).ok().or(space.take()),
                IommuStep::Probe => drop(iommu.probe(0x18).map(|reserved| iommu.place(&reserved, 16))),
                IommuStep::Map(number) => drop(space.as_ref().map(|space| {
                    space.map(page(number), Gpa(0), 4096, Permission::ReadWrite)
                })),
                IommuStep::Unmap(number) => drop(space.as_ref().map(|space| {
                    space.unmap(&[Run { addr: page(number), len: 4096 }, Run { addr: page(0), len: 4096 }])
                })),
                IommuStep::Fault => drop(iommu.fault()),
                IommuStep::Flood(count, event) => {
                    faults.borrow_mut().extend((0..count).map(|_| event.clone()));
                }
                IommuStep::Restart => drop(iommu.restart()),
                IommuStep::Mischief(Mischief::Scrawl(scrawl)) => scrawl.over(memory.memory()),
                IommuStep::Mischief(Mischief::Crime(crime)) => peer.0.borrow_mut().crime = crime,
                IommuStep::Mischief(Mischief::Forget) => peer.0.borrow_mut().reset(),
            }
        }
    }
}

/// A device that somebody else holds too: its driver lets nobody at its transport.
#[derive(Clone)]
struct Shared<'p>(Rc<RefCell<Peer<'p>>>);

impl DeviceEnd for Shared<'_> {
    fn identity(&self) -> Identity {
        self.0.borrow().identity()
    }

    fn features(&self) -> u64 {
        self.0.borrow().features()
    }

    fn read_config(&self, offset: u32, into: &mut [u8]) {
        self.0.borrow().read_config(offset, into);
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.0.borrow().max_queue_size(queue)
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout, features: u64, addressing: Addressing) -> bool {
        self.0.borrow_mut().start_queue(queue, layout, features, addressing)
    }

    fn reset_queue(&mut self, queue: u16) {
        self.0.borrow_mut().reset_queue(queue);
    }

    fn turn(&mut self, queue: u16) -> bool {
        self.0.borrow_mut().turn(queue)
    }

    fn reset(&mut self) {
        self.0.borrow_mut().reset();
    }
}
