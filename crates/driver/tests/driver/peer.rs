//! A device of any type with any number of queues: what it answers is a closure, how it misbehaves a mood.

use crate::world::*;
use ringfence_dma::{Access, BusAddr, Memory, Ram, Visit, copy_from_bus, copy_to_bus};
use ringfence_driver::embedded::{DeviceEnd, Embedded};
use ringfence_driver::policy::{Addressing, Identity, IommuMode};
use ringfence_iommu::{Domain, Walk};
use ringfence_ring::{Chain, DeviceQueue, Format, Indirect, Layout, Notifications, Position, RingArea, Rules};
use std::sync::Arc;

/// What a device does with a chain of a queue: it read this and may write so many bytes. What it writes, or nothing yet.
pub(crate) type Answer<'p> = dyn FnMut(u16, &[u8], usize) -> Option<Vec<u8>> + 'p;

/// How the device breaks the rules of rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crime {
    None,
    /// Uses what it was given twice.
    Twice,
    /// Uses what it never was given.
    Invented,
    /// Uses what can't exist.
    OutOfRange,
    /// Says that it wrote more than there is room for.
    TooMuch,
    /// Moves its index as if it had used hundreds. (A packed ring has none: uses something out of nothing.)
    Jump,
}

pub(crate) const CRIMES: [Crime; 5] = [Crime::Twice, Crime::Invented, Crime::OutOfRange, Crime::TooMuch, Crime::Jump];

pub(crate) struct Peer<'p> {
    domain: Arc<Domain>,
    ram: Arc<Ram>,
    device: u32,
    features: u64,
    pub(crate) config: Vec<u8>,
    max: u16,
    queues: Vec<Option<Queue>>,
    answer: Box<Answer<'p>>,
    pub(crate) crime: Crime,
    /// Does not mind a ring that is not as it should be.
    pub(crate) careless: bool,
    /// Once.
    committed: bool,
    /// Says that it filled whatever it may write.
    pub(crate) boast: bool,
    /// Bytes fewer that it says that it wrote.
    pub(crate) modest: u32,
    addressing: Option<Addressing>,
    pub(crate) resets: u32,
    pub(crate) queue_resets: u32,
}

struct Queue {
    ring: DeviceQueue,
    layout: Layout,
    format: Format,
    /// Taken and not answered.
    held: Vec<Chain>,
}

impl<'p> Peer<'p> {
    pub(crate) fn new(
        world: &World,
        device: u32,
        queues: usize,
        features: u64,
        answer: impl FnMut(u16, &[u8], usize) -> Option<Vec<u8>> + 'p,
    ) -> Self {
        Self {
            domain: world.domain.clone(),
            ram: world.ram.clone(),
            device,
            features: features | VERSION_1,
            config: Vec::new(),
            max: 256,
            queues: (0..queues).map(|_| None).collect(),
            answer: Box::new(answer),
            crime: Crime::None,
            careless: false,
            committed: false,
            boast: false,
            modest: 0,
            addressing: None,
            resets: 0,
            queue_resets: 0,
        }
    }

    pub(crate) fn embedded(self, mode: IommuMode) -> Embedded<Self> {
        Embedded::new(self, mode).with_patience(1000)
    }

    fn serve(&mut self, memory: &mut impl Memory) -> bool {
        let mut worked = false;
        for number in 0..self.queues.len() {
            let Some(mut queue) = self.queues[number].take() else { continue };
            worked |= self.serve_queue(number as u16, &mut queue, &memory.visit());
            self.queues[number] = Some(queue);
        }
        worked
    }

    fn serve_queue(&mut self, number: u16, queue: &mut Queue, visit: &impl Visit) -> bool {
        let Queue { ring, layout, format, held } = queue;
        let mut ring = ring.open(visit);
        loop {
            let mut chain = Chain::default();
            match ring.pop(&mut chain) {
                Ok(true) => held.push(chain),
                Ok(false) => break,
                Err(_) if self.careless => break,
                Err(stop) => panic!("{stop}"),
            }
        }
        let mut worked = false;
        held.retain_mut(|chain| {
            if let Err(stop) = chain.expand(visit, None) {
                assert!(self.careless, "{stop}");
                return false;
            }
            let parts = chain.descriptors();
            let mut read = Vec::new();
            for part in parts.iter().filter(|part| part.access == Access::Read && part.len < 1 << 20) {
                let at = read.len();
                read.resize(at + part.len as usize, 0);
                let copied = copy_from_bus(visit, part.addr, &mut read[at..], None);
                assert!(copied.is_ok() || self.careless, "{copied:?}");
            }
            if self.committed {
                return true;
            }
            let Some(bytes) = (self.answer)(number, &read, chain.writable_len() as usize) else { return true };
            let mut rest = &bytes[..];
            for part in parts.iter().filter(|part| part.access == Access::Write) {
                let (now, later) = rest.split_at(rest.len().min(part.len as usize));
                let copied = copy_to_bus(visit, part.addr, now, None);
                assert!(copied.is_ok() || self.careless, "{copied:?}");
                rest = later;
            }
            assert!(rest.is_empty(), "{} bytes too many for the chain", rest.len());
            worked = true;
            let written = match self.crime {
                Crime::TooMuch => chain.writable_len() + 1,
                _ if self.boast => chain.writable_len(),
                _ => bytes.len() as u32 - self.modest,
            };
            if let Crime::None | Crime::TooMuch | Crime::Twice = self.crime {
                let pushed = ring.push(chain.head(), written).and_then(|()| ring.publish());
                assert!(pushed.is_ok() || self.careless, "{pushed:?}");
            }
            self.committed = self.crime != Crime::None;
            // The first chain has id 0. (id, used entries from the first one on, how many there seem to be.)
            let (id, entry, index): (u16, u16, u16) = match self.crime {
                Crime::None | Crime::TooMuch => return false,
                Crime::Twice => (0, 1, 2),
                Crime::Invented => (layout.size - 1, 0, 1),
                Crime::OutOfRange => (layout.size, 0, 1),
                Crime::Jump => (0, 0, 700),
            };
            match format {
                Format::Split => {
                    let used = layout.addr(RingArea::Device).0;
                    let at = BusAddr(used + 4 + 8 * u64::from(entry));
                    copy_to_bus(visit, at, &[id.to_le_bytes(), [0; 2], [0; 2], [0; 2]].concat(), None).unwrap();
                    copy_to_bus(visit, BusAddr(used + 2), &index.to_le_bytes(), None).unwrap();
                }
                Format::Packed => {
                    let entry = u64::from(entry) * parts.len() as u64;
                    let id = if index == 700 { 700 } else { id };
                    let at = BusAddr(layout.addr(RingArea::Descriptors).0 + 16 * entry + 12);
                    copy_to_bus(visit, at, &[id.to_le_bytes(), [0x80, 0x80]].concat(), None).unwrap();
                }
            }
            false
        });
        worked
    }
}

impl DeviceEnd for Peer<'_> {
    fn identity(&self) -> Identity {
        Identity { vendor: 0x1af4, device: self.device, slot: 0x20 }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u32, into: &mut [u8]) {
        let rest = self.config.get(offset as usize..).unwrap_or_default();
        let len = into.len().min(rest.len());
        into[..len].copy_from_slice(&rest[..len]);
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        if usize::from(queue) < self.queues.len() { self.max } else { 0 }
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout, features: u64, addressing: Addressing) -> bool {
        let rules = Rules {
            format: if features & PACKED != 0 { Format::Packed } else { Format::Split },
            notifications: if features & EVENT_IDX != 0 { Notifications::EventIdx } else { Notifications::Flags },
            indirect: if features & INDIRECT != 0 { Indirect::Allowed } else { Indirect::Refused },
        };
        let ring = DeviceQueue::new(rules, *layout, Position::start(rules.format)).unwrap();
        let queue_state = Queue { ring, layout: *layout, format: rules.format, held: Vec::new() };
        self.queues[usize::from(queue)] = Some(queue_state);
        self.addressing = Some(addressing);
        true
    }

    fn reset_queue(&mut self, queue: u16) {
        let stopped = self.queues[usize::from(queue)].take();
        assert!(stopped.is_some() || self.careless, "a queue that runs is reset");
        self.queue_resets += 1;
        // From then on it behaves.
        (self.crime, self.committed) = (Crime::None, false);
    }

    fn turn(&mut self, _: u16) -> bool {
        match self.addressing {
            Some(Addressing::Translated) => {
                let mut walk = Walk::new(self.domain.clone(), self.ram.clone());
                self.serve(&mut walk)
            }
            _ => {
                let mut flat = Flat(self.ram.clone());
                self.serve(&mut flat)
            }
        }
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.queues.iter_mut().for_each(|queue| *queue = None);
    }
}
