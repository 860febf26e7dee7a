//! A small world: some memory, an IOMMU, a strict disk made from the ring's device half, and the mappers of a driver.

use ringfence_dma::{
    Access, Buffer, BusAddr, Fault, FaultReason, Gpa, HostSlice, Mapper, Memory, Physical, Ram, Stop, Ticket, Visit,
    copy_from_bus, copy_to_bus,
};
use ringfence_driver::Host;
use ringfence_driver::embedded::{DeviceEnd, Embedded};
use ringfence_driver::mapper::{Bounce, Direct, Premapped};
use ringfence_driver::policy::{Addressing, DriverPolicy, Identity, IommuMode, Platform};
use ringfence_iommu::{Domain, Strict, Walk};
use ringfence_ring::{
    Chain, DeviceQueue, Format, Indirect, Layout, Notifications, Position, RingArea, RingStop, Rules,
};
use std::sync::Arc;

pub(crate) const PAGE: usize = 4096;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const PACKED: u64 = 1 << 34;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const RING_RESET: u64 = 1 << 40;

/// VIRTIO_BLK_F_SEG_MAX, _BLK_SIZE, _FLUSH, _DISCARD, _WRITE_ZEROES.
pub(crate) const DISK_FEATURES: u64 = VERSION_1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14;
pub(crate) const READ_ONLY: u64 = 1 << 5;

pub(crate) const SECTORS: usize = 2048;
pub(crate) const NAME: &[u8; 20] = b"a disk for testing\0\0";

/// Where things are in memory, in pages.
const RINGS: usize = 0;
const POOL: usize = 256;
const BUFFERS: usize = 512;
const END: usize = 1024;

pub(crate) struct World {
    pub(crate) ram: Arc<Ram>,
    pub(crate) domain: Arc<Domain>,
}

/// How the driver makes bus addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    Direct,
    Static,
    Dynamic,
    Bounce,
}

impl World {
    pub(crate) fn new() -> Self {
        Self { ram: Arc::new(Ram::new(END * PAGE)), domain: Arc::new(Domain::default()) }
    }

    fn pages(&self, first: usize, end: usize) -> Buffer<'_> {
        Buffer::new(self.ram.slice(first * PAGE, (end - first) * PAGE), Gpa((first * PAGE) as u64))
    }

    /// `len` bytes for the driver to use, from `offset` on.
    pub(crate) fn buffer(&self, offset: usize, len: usize) -> Buffer<'_> {
        self.pages(BUFFERS, END).sub(offset, len)
    }

    /// Hands `with` a mapper of that kind.
    pub(crate) fn with_mapper<R>(&self, mapping: Mapping, with: impl FnOnce(&dyn Mapper) -> R) -> R {
        let rings = self.pages(RINGS, POOL);
        let strict = Strict::new(self.domain.clone(), rings);
        match mapping {
            Mapping::Direct => with(&Direct::new(rings)),
            Mapping::Dynamic => with(&strict),
            Mapping::Static => with(&Premapped::new(&strict, &[self.pages(BUFFERS, END)], rings).unwrap()),
            Mapping::Bounce => {
                let bounce = Bounce::new(&strict, self.pages(POOL, BUFFERS), 8 * PAGE).unwrap();
                let result = with(&bounce);
                assert_eq!(bounce.free(), (BUFFERS - POOL) * PAGE, "a buffer was forgotten in the pool");
                result
            }
        }
    }

    pub(crate) fn disk(&self, features: u64) -> Disk {
        Disk {
            domain: self.domain.clone(),
            ram: self.ram.clone(),
            features,
            queue: None,
            content: vec![0; SECTORS * 512],
            seen: Vec::new(),
            mood: Mood::Good,
            careless: false,
            kicks: 0,
            resets: 0,
            addressing: None,
            taken: None,
            config_capacity: SECTORS as u64,
        }
    }

    pub(crate) fn embedded(&self, features: u64, mode: IommuMode) -> Embedded<Disk> {
        Embedded::new(self.disk(features), mode).with_patience(1000)
    }
}

/// A new driver on x86 that makes all addresses through `mapper`.
pub(crate) fn new_driver<'a>(mapper: &'a dyn Mapper) -> Host<'a, dyn Mapper + 'a> {
    Host { platform: Platform::X86Iommu, policy: DriverPolicy::New, physical: Some(mapper), translated: Some(mapper) }
}

/// How the disk misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Good,
    /// Leaves this status.
    Status(u8),
    /// Does not write the status.
    NoStatus,
    /// Says that it wrote so many bytes more or fewer.
    Written(i64),
    /// Takes requests and does not complete them.
    Sleepy,
    /// Completes each request twice.
    Twice,
    /// Completes requests that nobody made.
    Invented,
}

pub(crate) struct Disk {
    domain: Arc<Domain>,
    ram: Arc<Ram>,
    features: u64,
    queue: Option<Queue>,
    pub(crate) content: Vec<u8>,
    /// Bus addresses that requests named, data and all.
    pub(crate) seen: Vec<BusAddr>,
    pub(crate) mood: Mood,
    /// Says that all went well, whatever the request is, and does not mind a ring that is not as it should be.
    pub(crate) careless: bool,
    pub(crate) kicks: u32,
    pub(crate) resets: u32,
    pub(crate) addressing: Option<Addressing>,
    /// What the driver took, once the queue runs.
    pub(crate) taken: Option<u64>,
    pub(crate) config_capacity: u64,
}

struct Queue {
    ring: DeviceQueue,
    layout: Layout,
    rules: Rules,
}

/// All of memory at its physical addresses.
pub(crate) struct Flat(pub(crate) Arc<Ram>);

impl Memory for Flat {
    type Lease = ();
    type Visit<'m> = FlatVisit<'m>;

    fn visit(&mut self) -> FlatVisit<'_> {
        FlatVisit(&self.0)
    }
}

pub(crate) struct FlatVisit<'m>(&'m Ram);

impl Visit for FlatVisit<'_> {
    type Lease = ();

    fn resolve(&self, addr: BusAddr, len: usize, access: Access, _: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let fault = Fault { addr, access, reason: FaultReason::Unmapped };
        Physical::slice(self.0, Gpa(addr.0), len).ok_or(fault.into())
    }

    fn lease(&self, _: &[(BusAddr, u32)]) {}
}

impl DeviceEnd for Disk {
    fn identity(&self) -> Identity {
        Identity { vendor: 0x1af4, device: 2, slot: 0x18 }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u32, into: &mut [u8]) {
        let mut config = [0; 60];
        config[..8].copy_from_slice(&self.config_capacity.to_le_bytes());
        config[12..16].copy_from_slice(&100_u32.to_le_bytes());
        config[20..24].copy_from_slice(&512_u32.to_le_bytes());
        config[36..40].copy_from_slice(&64_u32.to_le_bytes());
        config[48..52].copy_from_slice(&64_u32.to_le_bytes());
        let config = &config[offset as usize..];
        let len = into.len().min(config.len());
        into[..len].copy_from_slice(&config[..len]);
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        if queue == 0 { 128 } else { 0 }
    }

    fn start_queue(&mut self, _: u16, layout: &Layout, features: u64, addressing: Addressing) -> bool {
        let rules = Rules {
            format: if features & PACKED != 0 { Format::Packed } else { Format::Split },
            notifications: if features & EVENT_IDX != 0 { Notifications::EventIdx } else { Notifications::Flags },
            indirect: if features & INDIRECT != 0 { Indirect::Allowed } else { Indirect::Refused },
        };
        let ring = DeviceQueue::new(rules, *layout, Position::start(rules.format)).unwrap();
        self.queue = Some(Queue { ring, layout: *layout, rules });
        self.addressing = Some(addressing);
        self.taken = Some(features);
        true
    }

    fn reset_queue(&mut self, queue: u16) {
        assert_eq!((queue, self.queue.is_some()), (0, true), "a queue that runs is reset");
        self.queue = None;
    }

    fn turn(&mut self, _: u16) -> bool {
        self.kicks += 1;
        let mut queue = self.queue.take().expect("a queue that runs");
        let worked = match self.addressing {
            Some(Addressing::Translated) => {
                let walk = Walk::new(self.domain.clone(), self.ram.clone());
                self.serve(&mut queue, walk)
            }
            _ => {
                let flat = Flat(self.ram.clone());
                self.serve(&mut queue, flat)
            }
        };
        self.queue = Some(queue);
        worked
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.queue = None;
        self.addressing = None;
    }
}

impl Disk {
    fn serve(&mut self, queue: &mut Queue, mut memory: impl Memory) -> bool {
        let visit = memory.visit();
        if self.mood == Mood::Invented {
            return self.invent(queue, &visit);
        }
        let mut ring = queue.ring.open(&visit);
        let mut chain = Chain::default();
        let mut worked = false;
        loop {
            match ring.pop(&mut chain) {
                Ok(true) => worked = true,
                Ok(false) => break,
                Err(_) if self.careless => break,
                Err(stop) => panic!("{stop}"),
            }
            if self.mood == Mood::Sleepy {
                continue;
            }
            let written = match chain.expand(&visit, None) {
                Ok(()) if self.careless => careless(&chain, &visit),
                Ok(()) => self.request(&chain, &visit),
                Err(RingStop::Fault(_)) => 0,
                Err(_) if self.careless => 0,
                Err(stop) => panic!("{stop}"),
            };
            let pushed = ring.push(chain.head(), written).and_then(|()| ring.publish());
            assert!(pushed.is_ok() || self.careless, "{pushed:?}");
            if self.mood == Mood::Twice {
                let _ = ring.push(chain.head(), written).map(|()| ring.publish());
            }
        }
        worked
    }

    /// Writes a used entry for a chain that nobody made.
    fn invent(&self, queue: &Queue, visit: &impl Visit) -> bool {
        match queue.rules.format {
            Format::Split => {
                let used = queue.layout.addr(RingArea::Device);
                copy_to_bus(visit, used, &[0, 0, 1, 0, 77, 0, 0, 0, 0, 0, 0, 0], None).unwrap();
            }
            Format::Packed => {
                let descriptor = BusAddr(queue.layout.addr(RingArea::Descriptors).0 + 12);
                copy_to_bus(visit, descriptor, &[77, 0, 0x80, 0x80], None).unwrap();
            }
        }
        true
    }

    /// Does what the chain says; returns how many bytes were written, from the first writable one on.
    fn request(&mut self, chain: &Chain, visit: &impl Visit) -> u32 {
        let parts = chain.descriptors();
        self.seen.extend(parts.iter().map(|part| part.addr));
        let mut header = [0; 16];
        let readable: Vec<_> = parts.iter().filter(|part| part.access == Access::Read).collect();
        let writable: Vec<_> = parts.iter().filter(|part| part.access == Access::Write).collect();
        assert_eq!(readable[0].len, 16, "a header of its own");
        let (status, into) = writable.split_last().expect("room for a status");
        assert_eq!(status.len, 1, "a status of its own");
        if copy_from_bus(visit, readable[0].addr, &mut header, None).is_err() {
            return 0;
        }
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap()) as usize;

        let transfer = |at: usize, part: &ringfence_ring::Descriptor, content: &mut [u8]| {
            let bytes = &mut content[at..at + part.len as usize];
            match part.access {
                Access::Read => copy_from_bus(visit, part.addr, bytes, None),
                Access::Write => copy_to_bus(visit, part.addr, bytes, None),
            }
        };
        let mut name = NAME.to_vec();
        let result = match kind {
            0 | 1 => {
                let data = if kind == 0 { into.iter() } else { readable[1..].iter() };
                let mut at = sector * 512;
                data.copied().try_for_each(|part| {
                    let done = transfer(at, part, &mut self.content);
                    at += part.len as usize;
                    done
                })
            }
            4 => Ok(()),
            8 => into.iter().copied().try_for_each(|part| transfer(0, part, &mut name)),
            11 | 13 => {
                let mut range = [0; 16];
                copy_from_bus(visit, readable[1].addr, &mut range, None).map(|()| {
                    let first = u64::from_le_bytes(range[..8].try_into().unwrap()) as usize * 512;
                    let len = u32::from_le_bytes(range[8..12].try_into().unwrap()) as usize * 512;
                    assert_eq!(range[12], u8::from(kind == 13), "the unmap flag");
                    self.content[first..first + len].fill(0);
                })
            }
            _ => panic!("request type {kind}"),
        };
        let answer = match (self.mood, result.is_ok()) {
            (Mood::NoStatus, _) => None,
            (Mood::Status(status), _) => Some(status),
            (_, true) => Some(0),
            (_, false) => Some(1),
        };
        if let Some(answer) = answer
            && copy_to_bus(visit, status.addr, &[answer], None).is_err()
        {
            return 0;
        }
        match (self.mood, result.is_ok()) {
            (Mood::Written(more), _) => (i64::from(chain.writable_len()) + more) as u32,
            (_, true) => chain.writable_len(),
            (_, false) => 0,
        }
    }
}

/// Answers without looking.
fn careless(chain: &Chain, visit: &impl Visit) -> u32 {
    match chain.descriptors().last() {
        Some(last) if copy_to_bus(visit, last.addr, &[0], None).is_ok() => chain.writable_len(),
        _ => 0,
    }
}

pub(crate) fn bytes(buffer: Buffer<'_>) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.memory().read(0, &mut bytes);
    bytes
}

/// Bytes that say where they belong.
pub(crate) fn stamp(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 256 + seed * 31 + 1) as u8).collect()
}
