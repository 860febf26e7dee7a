//! Driver and device, both honest, doing things in any order. Nothing is lost, nothing is made up, nobody sleeps while
//! there is something for it.

use crate::world::{Kind, TABLE_BUFFERS, TABLES, World, all_rules, any_kind, any_queue};
use proptest::prelude::*;
use ringfence_dma::{Access, BusAddr, Ticket};
use ringfence_ring::{
    AddError, Chain, Descriptor, DeviceQueue, DriverQueue, Format, Indirect, Notifications, OpenQueue, Position,
    RingCells, RingStop, Rules, Token, Used,
};
use std::collections::{HashMap, VecDeque};

/// How often a device tries again before the test gives up: more than there can be misses.
const PATIENCE: usize = 1000;

#[derive(Clone, Debug)]
enum Step {
    /// The driver adds a chain with so many readable and writable buffers.
    Add { readable: usize, writable: usize, folded: bool },
    /// The driver shows what it added, and rings if it is to.
    Kick,
    /// The driver stops listening and takes back up to so many chains.
    Take(usize),
    /// The driver listens and sleeps if nothing is there.
    DriverSleeps,
    /// The device stops listening and takes up to so many chains in one visit.
    Pop(usize),
    /// The device gives chains back, in this order, and tells of it.
    Push(Vec<usize>),
    /// The device listens and sleeps if nothing is there.
    DeviceSleeps,
    /// Another device process goes on.
    Resume,
    /// All translations are taken away.
    Flush,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4usize, 0..4usize, any::<bool>())
            .prop_map(|(readable, writable, folded)| Step::Add { readable, writable, folded }),
        1 => (0..30usize, 0..10usize).prop_map(|(readable, writable)| Step::Add { readable, writable, folded: true }),
        3 => Just(Step::Kick),
        3 => (1..20usize).prop_map(Step::Take),
        1 => Just(Step::DriverSleeps),
        3 => (1..20usize).prop_map(Step::Pop),
        3 => prop::collection::vec(any::<usize>(), 1..20).prop_map(Step::Push),
        1 => Just(Step::DeviceSleeps),
        1 => Just(Step::Resume),
        1 => Just(Step::Flush),
    ]
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Listening {
    /// It asked to be told and found nothing.
    Asleep,
    /// It asked not to be told.
    Deaf,
    /// It asked to be told, and was, or found something.
    Awake,
}

/// The two halves, and what should be where.
struct Pair<'w> {
    world: &'w World,
    driver: DriverQueue<RingCells<'w>>,
    device: DeviceQueue,
    driver_is: Listening,
    device_is: Listening,
    /// Whether the device can know what it told the driver of.
    resumed: bool,
    /// By token: what was added, and the table that it took.
    given: HashMap<Token, Option<usize>>,
    tables: Vec<usize>,
    added: VecDeque<(Token, Vec<Descriptor>)>,
    published: VecDeque<(Token, Vec<Descriptor>)>,
    popped: Vec<(Token, Chain)>,
    used: VecDeque<Used>,
    serial: u64,
    done: usize,
}

impl<'w> Pair<'w> {
    fn new(world: &'w World) -> Self {
        let World { rules, layout, .. } = *world;
        let driver = DriverQueue::new(rules, layout.size, world.cells()).unwrap();
        world.driver_to_device();
        Self {
            world,
            driver,
            device: DeviceQueue::new(rules, layout, Position::start(rules.format)).unwrap(),
            // Memory full of zeros asks to be told of the first entry.
            driver_is: Listening::Asleep,
            device_is: Listening::Asleep,
            resumed: true,
            given: HashMap::new(),
            tables: (0..TABLES).collect(),
            added: VecDeque::new(),
            published: VecDeque::new(),
            popped: Vec::new(),
            used: VecDeque::new(),
            serial: 0,
            done: 0,
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Add { readable, writable, folded } => self.add(readable, writable, folded),
            Step::Kick => self.kick(),
            Step::Take(count) => self.take(count),
            Step::DriverSleeps => self.driver_sleeps(),
            Step::Pop(count) => self.pop(count),
            Step::Push(ref order) => self.push(order),
            Step::DeviceSleeps => self.device_sleeps(),
            Step::Resume => self.resume(),
            Step::Flush => self.world.flush(),
        }
    }

    fn add(&mut self, readable: usize, writable: usize, folded: bool) {
        let buffers: Vec<_> = (0..readable + writable)
            .map(|number| {
                self.serial += 1;
                let access = if number < readable { Access::Read } else { Access::Write };
                Descriptor { addr: BusAddr(self.serial << 13), len: self.serial as u32 % 9999 + 1, access }
            })
            .collect();
        let allowed = self.world.rules.indirect == Indirect::Allowed;
        let table = if folded && allowed && buffers.len() <= TABLE_BUFFERS { self.tables.pop() } else { None };
        let (size, free) = (self.driver.size(), self.driver.free());
        let needed = if table.is_some() { 1 } else { buffers.len() };
        match self.driver.add(&buffers, table.map(|table| self.world.table(table))) {
            Ok(token) => {
                assert!(token.index() < size.into());
                assert_eq!(self.given.insert(token, table), None, "a token twice");
                assert_eq!(usize::from(free - self.driver.free()), needed);
                self.added.push_back((token, buffers));
                // A packed ring shows each chain at once.
                if self.world.rules.format == Format::Packed {
                    self.published.append(&mut self.added);
                }
            }
            Err(error) => {
                self.tables.extend(table);
                assert_eq!(self.driver.free(), free);
                match error {
                    AddError::NoBytes => assert!(buffers.is_empty()),
                    AddError::TooManyBuffers { .. } => assert!(buffers.len() > size.into()),
                    AddError::Full { .. } => assert!(needed > free.into()),
                    error => panic!("{error}"),
                }
            }
        }
        self.world.driver_to_device();
    }

    fn kick(&mut self) {
        let kick = self.driver.needs_kick();
        self.world.driver_to_device();
        self.published.append(&mut self.added);
        match self.device_is {
            Listening::Asleep if !self.published.is_empty() => {
                assert!(kick, "the device sleeps for ever");
                self.device_is = Listening::Awake;
            }
            Listening::Deaf if self.is_silent_when_deaf() => assert!(!kick, "rang at a device that does not listen"),
            Listening::Asleep | Listening::Deaf | Listening::Awake => {}
        }
    }

    /// By `EVENT_IDX` in a split ring a device does not say that it is deaf: it falls behind what it asked for.
    fn is_silent_when_deaf(&self) -> bool {
        let Rules { format, notifications, .. } = self.world.rules;
        format == Format::Packed || notifications == Notifications::Flags
    }

    fn take(&mut self, count: usize) {
        self.driver.disable_callbacks();
        self.driver_is = Listening::Deaf;
        for _ in 0..count {
            let used = self.driver.take_used().unwrap();
            // What was added is published by taking; a device that sleeps is rung for it at the next kick.
            self.published.append(&mut self.added);
            assert_eq!(used, self.used.pop_front());
            let Some(used) = used else { break };
            self.tables.extend(self.given.remove(&used.token).unwrap());
            self.done += 1;
        }
        self.world.driver_to_device();
    }

    fn driver_sleeps(&mut self) {
        let more = self.driver.enable_callbacks().unwrap();
        self.world.driver_to_device();
        assert_eq!(more, !self.used.is_empty());
        self.driver_is = if more { Listening::Awake } else { Listening::Asleep };
    }

    fn pop(&mut self, count: usize) {
        self.patiently(|open| open.disable_notifications());
        self.device_is = Listening::Deaf;
        let mut chains = Vec::new();
        // One visit for as much as goes, and another after each miss.
        let mut tries = 0;
        'visits: while chains.len() < count {
            tries += 1;
            assert!(tries < PATIENCE, "the ring never resolves");
            let before = self.device.position();
            let had = chains.len();
            let mut open = self.device.open(self.world);
            while chains.len() < count {
                let mut chain = Chain::default();
                match open.pop(&mut chain) {
                    Ok(true) => chains.push(chain),
                    Ok(false) => break 'visits,
                    Err(RingStop::Wait(_)) => break,
                    Err(stop) => panic!("{stop}"),
                }
            }
            if chains.len() == had {
                assert_eq!(self.device.position(), before);
            }
        }
        let expected = count.min(self.published.len());
        assert_eq!(chains.len(), expected, "chains were overlooked, or made up");
        for mut chain in chains {
            let (token, buffers) = self.published.pop_front().unwrap();
            assert_eq!(chain.is_folded(), self.given[&token].is_some());
            self.expand(&mut chain);
            assert!(!chain.is_folded());
            assert_eq!(chain.expand(self.world, None), Ok(()), "an expanded chain has nothing more to read");
            assert_eq!(chain.descriptors(), buffers);
            let total = |access| buffers.iter().filter(|buffer| buffer.access == access).map(|buffer| buffer.len).sum();
            assert_eq!((chain.readable_len(), chain.writable_len()), (total(Access::Read), total(Access::Write)));
            self.popped.push((token, chain));
        }
    }

    fn expand(&self, chain: &mut Chain) {
        let mut asked: Option<Ticket> = None;
        for _ in 0..PATIENCE {
            match chain.expand(self.world, asked) {
                Ok(()) => return,
                Err(RingStop::Wait(miss)) => asked = asked.or(Some(miss.ticket)),
                Err(stop) => panic!("{stop}"),
            }
        }
        panic!("the table never resolves");
    }

    fn push(&mut self, order: &[usize]) {
        let mut pushed = Vec::new();
        for &pick in order {
            if self.popped.is_empty() {
                break;
            }
            let (token, chain) = self.popped.swap_remove(pick % self.popped.len());
            let written = if pick % 3 == 0 { 0 } else { chain.writable_len() };
            self.patiently(|open| open.push(chain.head(), written));
            pushed.push(Used { token, written });
        }
        // Until it is published the driver sees nothing.
        self.world.device_to_driver();
        if self.used.is_empty() {
            assert_eq!(self.driver.take_used(), Ok(None));
            self.published.append(&mut self.added);
            self.world.driver_to_device();
        }
        self.patiently(|open| open.publish());
        self.world.device_to_driver();
        let news = !pushed.is_empty();
        self.used.extend(pushed);
        self.notify(news);
    }

    fn notify(&mut self, news: bool) {
        let notify = self.patiently(|open| open.needs_notification());
        let known = !std::mem::take(&mut self.resumed);
        if known {
            match self.driver_is {
                Listening::Deaf => assert!(!notify, "told a driver that does not listen"),
                _ => assert!(news || !notify, "told of nothing"),
            }
        }
        if self.driver_is == Listening::Asleep && !self.used.is_empty() {
            assert!(notify, "the driver sleeps for ever");
            self.driver_is = Listening::Awake;
        }
    }

    fn device_sleeps(&mut self) {
        let more = self.patiently(|open| open.enable_notifications());
        self.world.device_to_driver();
        assert_eq!(more, !self.published.is_empty());
        self.device_is = if more { Listening::Awake } else { Listening::Asleep };
    }

    /// The front-end's number is enough where nothing is under way; else the whole position is.
    fn resume(&mut self) {
        let World { rules, layout, .. } = *self.world;
        let position = self.device.position();
        let from_base = Position::from_vring_base(rules.format, position.vring_base(rules.format)).unwrap();
        if self.popped.is_empty() || rules.format == Format::Packed && position.used != 0 {
            assert_eq!(from_base, position);
        }
        let under_way = self.device.under_way();
        self.device = DeviceQueue::new(rules, layout, position).unwrap();
        assert_eq!(self.device.under_way(), under_way);
        self.resumed = true;
    }

    fn patiently<T>(&mut self, mut try_it: impl FnMut(&mut OpenQueue<'_, '_, World>) -> Result<T, RingStop>) -> T {
        for _ in 0..PATIENCE {
            let before = self.device.position();
            let tried = try_it(&mut self.device.open(self.world));
            match tried {
                Ok(done) => {
                    self.world.device_to_driver();
                    return done;
                }
                Err(RingStop::Wait(_)) => assert_eq!(self.device.position(), before),
                Err(stop) => panic!("{stop}"),
            }
        }
        panic!("the ring never resolves");
    }

    /// Everything comes to its end.
    fn finish(&mut self) {
        for _ in 0..PATIENCE {
            self.kick();
            self.pop(usize::MAX);
            self.push(&vec![1; self.popped.len()]);
            self.take(usize::MAX);
            if self.given.is_empty() {
                break;
            }
        }
        assert_eq!(self.driver.free(), self.driver.size());
        assert_eq!(self.device.under_way(), 0);
        assert_eq!(self.driver.under_way().count(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn halves_agree_in_any_order(
        (rules, size) in any_queue(),
        kind in any_kind(),
        skew in 0..400usize,
        steps in prop::collection::vec(any_step(), 1..120),
    ) {
        let world = World::new(kind, rules, size, skew);
        let mut pair = Pair::new(&world);
        for step in &steps {
            pair.step(step);
        }
        pair.finish();
    }
}

/// More requests than an index has values, in batches that are no divisor of anything. A packed ring's indices have as
/// many values as the ring has entries.
#[test]
fn indices_wrap() {
    for rules in all_rules() {
        let (sizes, requests) = match rules.format {
            Format::Split if rules.indirect == Indirect::Refused => ([2, 128], 66_000),
            Format::Split => ([1, 16], 200),
            Format::Packed => ([3, 128], 1_500),
        };
        for size in sizes {
            let world = World::new(Kind::Flat, rules, size, 1);
            let mut pair = Pair::new(&world);
            for turn in 0.. {
                for number in 0..usize::from(size) {
                    pair.add(1, turn % 2, number % 4 == 0);
                    if usize::from(pair.driver.free()) < turn % 5 + 1 {
                        break;
                    }
                }
                pair.kick();
                pair.pop(turn % 70 + 1);
                pair.push(&[5, 1, 0, 7, 3, 2, 9].repeat(turn % 12 + 1));
                if turn % 11 == 0 {
                    pair.device_sleeps();
                }
                pair.take(turn % 60 + 1);
                if turn % 13 == 0 {
                    pair.driver_sleeps();
                }
                if pair.done >= requests {
                    break;
                }
            }
            pair.finish();
        }
    }
}
