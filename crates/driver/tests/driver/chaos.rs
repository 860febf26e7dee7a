//! Devices whose registers answer with anything: mostly what a device would, and now and then what nobody expects, in any
//! order and at any step. There is no panic, no register outside of its window, no wait without an end, and no memory that
//! comes back before the device has said that it is reset.

use crate::peer::*;
use crate::world::*;
use proptest::prelude::*;
use ringfence_dma::{Gpa, Mapper, Permission};
use ringfence_driver::blk::{Blk, Options, Request, Unmap};
use ringfence_driver::console::Console;
use ringfence_driver::embedded::DeviceEnd;
use ringfence_driver::mapper::Iommu;
use ringfence_driver::mmio::Mmio;
use ringfence_driver::net::{self, Net};
use ringfence_driver::pci::{Bar, Function, Interrupts, Pci};
use ringfence_driver::policy::{Addressing, IommuMode};
use ringfence_driver::rng::Rng;
use ringfence_driver::viommu::Viommu;
use ringfence_driver::{Registers, Transport, Waiting};
use ringfence_ring::Layout;
use std::cell::{RefCell, RefMut};
use std::rc::Rc;

const QUEUES: u16 = 3;

/// More accesses to registers than any driver needs, with every wait at its end.
const ENOUGH: u32 = 100_000;

/// How often a device is looked at in vain.
const PATIENCE: u32 = 30;

/// What the registers are about, whatever the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Id,
    Features,
    Queues,
    Status,
    Generation,
    Size,
    Vector,
    Enable,
    Doorbell,
    Reset,
    Other,
}

#[derive(Clone, Copy, Default)]
struct QueueRegisters {
    size: u16,
    vector: u16,
    enabled: bool,
    /// Descriptors, driver's area, device's area, in halves.
    at: [u32; 6],
}

struct Chaos<'p> {
    peer: Peer<'p>,
    random: u64,
    /// One answer in so many is a lie.
    truths: u64,
    device: u32,
    status: u8,
    features: [u32; 2],
    select: [u32; 2],
    selected: u16,
    queues: [QueueRegisters; QUEUES as usize],
    /// The configuration space of the function.
    space: [u32; 64],
    accesses: u32,
    /// The device was told to reset, and this is how often it has not said that it has.
    unconfirmed: Option<u32>,
}

type Shared<'p> = Rc<RefCell<Chaos<'p>>>;

impl Chaos<'_> {
    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 16) % bound
    }

    /// What is on the edge of something, or anything.
    fn anything(&mut self) -> u32 {
        const LIKED: [u32; 18] = [
            0,
            1,
            2,
            3,
            4,
            7,
            0x40,
            0x7f,
            0x80,
            0xff,
            0x100,
            0x7fff,
            0x8000,
            0xffff,
            0x1_0000,
            0x7fff_ffff,
            0x8000_0000,
            u32::MAX,
        ];
        match self.below(4) {
            0 => self.random as u32,
            _ => LIKED[self.below(LIKED.len() as u64) as usize],
        }
    }

    fn queue(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.selected))
    }

    fn read(&mut self, register: Register, truth: impl FnOnce(&mut Self) -> u32) -> u32 {
        self.accesses += 1;
        assert!(self.accesses < ENOUGH, "{register:?} is read again and again");
        let truth = truth(self);
        let answer = if self.below(self.truths) == 0 { self.anything() } else { truth };
        if register == Register::Status {
            let confirmed = answer as u8 == 0;
            self.unconfirmed = self.unconfirmed.map(|times| if confirmed { 0 } else { times + 1 });
        }
        answer
    }

    fn register(&mut self, register: Register) -> u32 {
        self.read(register, |chaos| match register {
            Register::Id => chaos.device,
            Register::Features => {
                let offered = IommuMode::Offer.offers(chaos.peer.features());
                if chaos.select[0] < 2 { (offered >> (32 * chaos.select[0])) as u32 } else { 0 }
            }
            Register::Queues => QUEUES.into(),
            Register::Status => chaos.status.into(),
            Register::Size => {
                if chaos.queue().is_some() {
                    64
                } else {
                    0
                }
            }
            Register::Vector => chaos.queue().map_or(0xffff, |queue| queue.vector.into()),
            Register::Enable => chaos.queue().is_some_and(|queue| queue.enabled).into(),
            Register::Doorbell => chaos.selected.into(),
            Register::Generation | Register::Reset | Register::Other => 0,
        })
    }

    fn config(&mut self, offset: usize, width: usize) -> u32 {
        self.read(Register::Other, |chaos| {
            let mut bytes = [0; 4];
            chaos.peer.read_config(offset as u32, &mut bytes[..width]);
            u32::from_le_bytes(bytes)
        })
    }

    fn write_status(&mut self, status: u8) {
        if status == 0 {
            DeviceEnd::reset(&mut self.peer);
            (self.queues, self.features, self.unconfirmed) = (Default::default(), [0; 2], Some(0));
        } else {
            self.unconfirmed = None;
        }
        self.status = status;
        if status & 4 != 0 {
            (0..QUEUES).for_each(|number| self.start(number));
        }
    }

    /// Has the peer serve a queue, if it can be.
    fn start(&mut self, number: u16) {
        let QueueRegisters { size, enabled, at, .. } = self.queues[usize::from(number)];
        if !enabled || self.status & 4 == 0 {
            return;
        }
        let addr = |half: usize| ringfence_dma::BusAddr(u64::from(at[half]) | u64::from(at[half + 1]) << 32);
        let layout = Layout { size, descriptors: addr(0), driver: addr(2), device: addr(4) };
        let features = u64::from(self.features[0]) | u64::from(self.features[1]) << 32;
        // A device that was never told the truth about itself is a stranger to its own features.
        assert!(self.peer.start_queue(number, &layout, features, Addressing::Translated));
    }

    fn enable(&mut self) {
        if let Some(queue) = self.queue() {
            queue.enabled = true;
            let number = self.selected;
            self.start(number);
        }
    }

    fn reset_queue(&mut self) {
        if let Some(queue) = self.queue() {
            *queue = QueueRegisters::default();
            let number = self.selected;
            self.peer.reset_queue(number);
        }
    }

    fn kick(&mut self) {
        if self.below(self.truths) == 0 {
            self.peer.crime = CRIMES[self.below(CRIMES.len() as u64) as usize];
        }
        self.peer.turn(0);
    }
}

/// Gives up soon, and has the device work.
fn patience<'p>(chaos: &Shared<'p>) -> impl FnMut(Waiting, u32) -> bool + use<'p> {
    let chaos = chaos.clone();
    move |purpose, waited| {
        if let Waiting::Queue(_) = purpose {
            chaos.borrow_mut().kick();
        }
        waited < PATIENCE
    }
}

/// The function, and a window of its BAR or of MMIO.
struct Window<'p> {
    chaos: Shared<'p>,
    start: usize,
    len: usize,
    mmio: bool,
}

const BAR_LEN: u32 = 0x4000;

impl<'p> Window<'p> {
    fn at(&self, offset: usize, width: usize) -> (RefMut<'_, Chaos<'p>>, usize) {
        assert!(offset.is_multiple_of(width) && offset + width <= self.len, "{width} bytes at {offset:#x}");
        (self.chaos.borrow_mut(), self.start + offset)
    }

    fn read(&self, offset: usize, width: usize) -> u32 {
        use Register as R;
        let (mut chaos, at) = self.at(offset, width);
        if self.mmio {
            return match at {
                0x000 => chaos.read(R::Other, |_| 0x7472_6976),
                0x004 => chaos.read(R::Other, |_| 2),
                0x008 => chaos.register(R::Id),
                0x010 => chaos.register(R::Features),
                0x034 => chaos.register(R::Size),
                0x044 => chaos.register(R::Enable),
                0x070 => chaos.register(R::Status),
                0x0c0 => chaos.register(R::Reset),
                0x0fc => chaos.register(R::Generation),
                0x100.. => chaos.config(at - 0x100, width),
                _ => chaos.register(R::Other),
            };
        }
        match at {
            0x04 => chaos.register(R::Features),
            0x10 | 0x1a => chaos.register(R::Vector),
            0x12 => chaos.register(R::Queues),
            0x14 => chaos.register(R::Status),
            0x15 => chaos.register(R::Generation),
            0x18 => chaos.register(R::Size),
            0x1c => chaos.register(R::Enable),
            0x1e => chaos.register(R::Doorbell),
            0x3a => chaos.register(R::Reset),
            0x2000..0x3000 => chaos.config(at - 0x2000, width),
            _ => chaos.register(R::Other),
        }
    }

    fn write(&self, offset: usize, width: usize, value: u32) {
        let (mut chaos, at) = self.at(offset, width);
        let half = |chaos: &mut Chaos<'_>, half: usize| {
            if let Some(queue) = chaos.queue() {
                queue.at[half] = value;
            }
        };
        let size = |chaos: &mut Chaos<'_>| {
            if let Some(queue) = chaos.queue() {
                queue.size = value as u16;
            }
        };
        match (self.mmio, at) {
            (true, 0x014) | (false, 0x00) => chaos.select[0] = value,
            (true, 0x024) | (false, 0x08) => chaos.select[1] = value,
            (true, 0x020) | (false, 0x0c) => {
                let select = chaos.select[1] as usize;
                chaos.features[select] = value;
            }
            (true, 0x030) | (false, 0x16) => chaos.selected = value as u16,
            (true, 0x038) | (false, 0x18) => size(&mut chaos),
            (true, 0x044) | (false, 0x1c) => chaos.enable(),
            (true, 0x070) | (false, 0x14) => chaos.write_status(value as u8),
            (true, 0x080 | 0x084) => half(&mut chaos, (at - 0x080) / 4),
            (true, 0x090 | 0x094) => half(&mut chaos, (at - 0x090) / 4 + 2),
            (true, 0x0a0 | 0x0a4) => half(&mut chaos, (at - 0x0a0) / 4 + 4),
            (false, 0x20..0x38) => half(&mut chaos, (at - 0x20) / 4),
            (true, 0x0c0) | (false, 0x3a) => chaos.reset_queue(),
            (false, 0x1a) => {
                if let Some(queue) = chaos.queue() {
                    queue.vector = value as u16;
                }
            }
            (true, 0x050) | (false, 0x3000..) => chaos.kick(),
            _ => {}
        }
    }
}

impl Registers for Window<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn read_u8(&self, offset: usize) -> u8 {
        self.read(offset, 1) as u8
    }

    fn read_u16(&self, offset: usize) -> u16 {
        self.read(offset, 2) as u16
    }

    fn read_u32(&self, offset: usize) -> u32 {
        self.read(offset, 4)
    }

    fn write_u8(&self, offset: usize, value: u8) {
        self.write(offset, 1, value.into());
    }

    fn write_u16(&self, offset: usize, value: u16) {
        self.write(offset, 2, value.into());
    }

    fn write_u32(&self, offset: usize, value: u32) {
        self.write(offset, 4, value);
    }
}

#[derive(Clone)]
struct Card<'p>(Shared<'p>);

impl<'p> Function for Card<'p> {
    type Registers = Window<'p>;

    fn slot(&self) -> u64 {
        0x18
    }

    fn read(&mut self, offset: u8) -> u32 {
        assert!(offset.is_multiple_of(4));
        self.0.borrow_mut().read(Register::Other, |chaos| chaos.space[usize::from(offset) / 4])
    }

    fn write(&mut self, offset: u8, value: u32) {
        let word = &mut self.0.borrow_mut().space[usize::from(offset) / 4];
        // BAR 4 has 14 bits that are always 0, and is one of memory.
        *word = if offset == 0x20 { value & !(BAR_LEN - 1) } else { value };
    }

    fn map(&mut self, bar: Bar, offset: u64, len: usize) -> Option<Window<'p>> {
        let end = offset.checked_add(len as u64).expect("no overflow");
        assert!(end <= bar.len && bar.address.checked_add(bar.len).is_some(), "{len} bytes at {offset} of {bar:?}");
        // Whatever the function says: this kernel has registers here and nowhere else.
        let ours = bar.index == 4 && end <= BAR_LEN.into();
        ours.then(|| Window { chaos: self.0.clone(), start: offset as usize, len, mmio: false })
    }
}

/// Structures in BAR 4, as `model.rs` has them.
fn space(device: u32) -> [u32; 64] {
    let mut space = [0; 64];
    space[0] = 0x1af4 | (0x1040 + device) << 16;
    (space[1], space[2], space[0x34 / 4]) = (0x0010_0000, 1, 0x40);
    let structures = [(1, 0, 0x40), (2, 0x3000, 0x1000), (3, 0x1000, 1), (4, 0x2000, 0x100)];
    for (number, (kind, offset, length)) in structures.into_iter().enumerate() {
        let at = 0x40 + 20 * number;
        let next = if number < 3 { at + 20 } else { 0 };
        let words = [9 | (next as u32) << 8 | 20 << 16 | kind << 24, 4, offset, length, 4];
        space[at / 4..at / 4 + 5].copy_from_slice(&words);
    }
    space
}

/// What stands in the configuration space instead of something that makes sense.
const CONFIG: [u32; 8] = [0, 1, 2, 100, 512, 4096, 1 << 31, u32::MAX];

fn sane_config(device: u32) -> [u32; 16] {
    match device {
        // The MTU comes after the address and the status.
        1 => [0x5452_0002, 0x0001_0000, 1500 << 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // 64 sectors; 100 segments; blocks of 512; discards and zeroes of 64 sectors.
        2 => [64, 0, 0, 100, 0, 512, 0, 0, 3 << 16, 64, 1, 1, 64, 1, 0, 0],
        3 => [80 | 25 << 16, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // Pages of 4096; all of 48 bits; domains of 16; 64 bytes of properties.
        _ => [0xffff_f000, u32::MAX, 0, 0, u32::MAX, 0xffff, 0, 0xffff, 64, 0, 0, 0, 0, 0, 0, 0],
    }
}

/// Does with the device what can be done, whatever comes of it.
fn drive<T: Transport<Error: 'static>>(world: &World, mapper: &dyn Mapper, transport: T, device: u32, seed: u64) {
    let host = new_driver(mapper);
    let buffer = |number: usize, len| world.buffer(number * 2 * PAGE, len);
    match device {
        1 => {
            let Ok(mut card) = Net::start(transport, host, net::Options { depth: 8, segments: 2 }) else { return };
            for turn in 0..6 {
                let _ = card.offer(buffer(turn, 2 * PAGE));
                let _ = card.send(&[buffer(6, 60)]);
                let _ = (card.notify(), card.link(), card.wait(), card.wait_sent());
                if let Ok(Some(received)) = card.received() {
                    assert!(received.len <= received.buffer.len());
                }
                let _ = card.sent();
                if turn == 3 {
                    let _ = card.restart();
                }
            }
        }
        2 => {
            let queues = 1 + (seed % 3) as u16;
            let options = Options { depth: 8, segments: 3 };
            let Ok(mut disk) = Blk::start_queues(transport, host, options, queues) else { return };
            for turn in 0..4 {
                let data = [buffer(turn, 512), buffer(turn + 8, 1024)];
                let _ = (disk.read(1, &data[..1]), disk.write(2, &data), disk.flush(), disk.id());
                let _ = (disk.discard(0, 1), disk.write_zeroes(1, 1, Unmap::Yes));
                let (transport, mut queues) = disk.split();
                for (number, queue) in queues.iter_mut().enumerate() {
                    let _ = queue.submit(Request::Read { sector: 0, into: &data[..1] });
                    if let Ok(true) = queue.publish() {
                        let _ = transport.notify(number as u16);
                    }
                    let _ = (queue.listen(), transport.wait(number as u16), queue.poll());
                    if turn == number {
                        let _ = queue.restart(transport);
                    }
                }
                if turn == 2 {
                    let _ = disk.restart();
                }
            }
        }
        3 => {
            let Ok(mut console) = Console::start(transport, host) else { return };
            for turn in 0..6 {
                let _ = (console.size(), console.offer(buffer(turn, 100)), console.notify(), console.wait());
                if let Ok(Some(received)) = console.received() {
                    assert!(received.len <= received.buffer.len());
                }
                let _ = console.write(&[buffer(7, 10)]);
                if turn == 3 {
                    let _ = console.restart();
                }
            }
        }
        4 => {
            let Ok(mut source) = Rng::start(transport, host) else { return };
            for turn in 0..6 {
                if let Ok(len) = source.fill(buffer(turn, 64)) {
                    assert!((1..=64).contains(&len));
                }
                if turn == 3 {
                    let _ = source.restart();
                }
            }
        }
        _ => {
            let Ok(iommu) = Viommu::start(transport, mapper) else { return };
            let limits = iommu.limits();
            assert!(limits.page.is_power_of_two() && limits.addresses.0 <= limits.addresses.1);
            for turn in 0..4 {
                if let Ok(reserved) = iommu.probe(8) {
                    let _ = iommu.place(&reserved, 16);
                }
                if let Ok(space) = iommu.attach(1, 8) {
                    let _ = space.map(ringfence_dma::BusAddr(0), Gpa(0), limits.page, Permission::ReadWrite);
                    let run = ringfence_driver::mapper::Run { addr: ringfence_dma::BusAddr(0), len: limits.page };
                    let _ = (space.unmap(&[run; 3]), iommu.fault());
                }
                if turn == 2 {
                    let _ = iommu.restart();
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn registers_that_lie_get_nowhere(
        seed in 1..=u64::MAX,
        truths in prop::sample::select(vec![2_u64, 5, 20, 100, 1000]),
        device in prop::sample::select(vec![1_u32, 2, 2, 3, 4, 23]),
        bus in prop::sample::select(vec!["mmio", "polled", "vectors"]),
        ring in prop::sample::select(vec![0, EVENT_IDX, INDIRECT, PACKED, PACKED | EVENT_IDX, PACKED | INDIRECT]),
        config in prop::collection::vec(prop::option::weighted(0.1, prop::sample::select(CONFIG.to_vec())), 16),
    ) {
        let world = World::new();
        let mut answers = seed;
        let answer = |_: u16, _: &[u8], room: usize| {
            answers = answers.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let len = if answers & 8 == 0 { room } else { answers as usize % (room + 1) };
            (answers & 0x70 != 0).then(|| vec![if answers & 0x80 == 0 { 0 } else { answers as u8 }; len])
        };
        // All features of its type but those of offloads, and of rings what was asked for.
        let mut peer = Peer::new(&world, device, QUEUES.into(), ring | RING_RESET | 0xff_ffff, answer);
        peer.careless = true;
        let words = config.iter().zip(sane_config(device));
        peer.config = words.flat_map(|(odd, sane)| odd.unwrap_or(sane).to_le_bytes()).collect();
        let chaos = Rc::new(RefCell::new(Chaos {
            peer,
            random: seed,
            truths,
            device,
            status: 0,
            features: [0; 2],
            select: [0; 2],
            selected: 0,
            queues: Default::default(),
            space: space(device),
            accesses: 0,
            unconfirmed: None,
        }));
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let patience = patience(&chaos);
            if bus == "mmio" {
                let window = Window { chaos: chaos.clone(), start: 0, len: 0x200, mmio: true };
                if let Ok(transport) = Mmio::new(window, 0, patience) {
                    drive(&world, mapper, transport, device, seed);
                }
            } else if let Ok(transport) = Pci::new(Card(chaos.clone()), patience) {
                let vectors = Interrupts::Vectors { config: Some(0), queues: vec![1, 2, 3] };
                let interrupts = if bus == "vectors" { vectors } else { Interrupts::Polled };
                drive(&world, mapper, transport.with_interrupts(interrupts), device, seed);
            }
        });
        // Where the last word was that it is reset, or it was never told to be, all is back.
        if chaos.borrow().unconfirmed.is_none_or(|times| times == 0) {
            prop_assert_eq!(world.domain.mapped(), 0);
        }
    }
}
