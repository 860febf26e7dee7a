//! The device's half of a ring beside rust-vmm's `virtio-queue`: the same memory, the same driver, the same requests (a
//! header, a buffer and a status). What each takes to pop 32 chains, look at every descriptor, and push them.
//!
//! `cargo bench -p ringfence-ring`. The peer has split rings alone.

use divan::Bencher;
use divan::counter::ItemsCount;
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Stop, Ticket, Visit};
use ringfence_ring::{
    Chain, Descriptor, DeviceQueue, DriverQueue, Format, Head, Indirect, IndirectTable, Layout, Notifications,
    Position, RingArea, RingSlices, Rules,
};
use std::cell::RefCell;
use std::hint::black_box;
use std::ptr::NonNull;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

fn main() {
    divan::main();
}

const SIZE: u16 = 256;
const BATCH: usize = 32;
const MEMORY: usize = 1 << 20;
const TABLES: u64 = 0x10000;
const LAYOUT: Layout = Layout { size: SIZE, descriptors: BusAddr(0), driver: BusAddr(0x2000), device: BusAddr(0x4000) };

/// How a request's three descriptors are written: in the ring, or in a table that one of the ring points to.
const INDIRECT: [Indirect; 2] = [Indirect::Refused, Indirect::Allowed];

#[divan::bench(args = INDIRECT, sample_count = 2000, sample_size = 1)]
fn split_ringfence(bencher: Bencher<'_, '_>, indirect: Indirect) {
    measure(bencher, Format::Split, indirect, &mut Ours::new(Format::Split, indirect));
}

#[divan::bench(args = INDIRECT, sample_count = 2000, sample_size = 1)]
fn split_virtio_queue(bencher: Bencher<'_, '_>, indirect: Indirect) {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(LAYOUT.descriptors.0 as u32), Some(0));
    queue.set_avail_ring_address(Some(LAYOUT.driver.0 as u32), Some(0));
    queue.set_used_ring_address(Some(LAYOUT.device.0 as u32), Some(0));
    queue.set_event_idx(true);
    queue.set_ready(true);
    measure(bencher, Format::Split, indirect, &mut queue);
}

#[divan::bench(args = INDIRECT, sample_count = 2000, sample_size = 1)]
fn packed_ringfence(bencher: Bencher<'_, '_>, indirect: Indirect) {
    measure(bencher, Format::Packed, indirect, &mut Ours::new(Format::Packed, indirect));
}

/// A device's half that does nothing with requests but to look at them.
trait Device {
    fn turn(&mut self, memory: &GuestMemoryMmap, all: HostSlice<'_>);
}

struct Ours {
    queue: DeviceQueue,
    chain: Chain,
    heads: Vec<(Head, u32)>,
}

impl Ours {
    fn new(format: Format, indirect: Indirect) -> Self {
        let queue = DeviceQueue::new(rules(format, indirect), LAYOUT, Position::start(format)).unwrap();
        Self { queue, chain: Chain::default(), heads: Vec::with_capacity(BATCH) }
    }
}

impl Device for Ours {
    fn turn(&mut self, _: &GuestMemoryMmap, all: HostSlice<'_>) {
        let visit = Flat(all);
        let mut ring = self.queue.open(&visit);
        self.heads.clear();
        while ring.pop(&mut self.chain).unwrap() {
            self.chain.expand(&visit, None).unwrap();
            self.chain.descriptors().iter().for_each(|descriptor| {
                black_box((descriptor.addr, descriptor.len, descriptor.access));
            });
            self.heads.push((self.chain.head(), self.chain.writable_len()));
        }
        for &(head, written) in &self.heads {
            ring.push(head, written).unwrap();
        }
        ring.publish().unwrap();
        black_box(ring.needs_notification().unwrap());
    }
}

impl Device for Queue {
    fn turn(&mut self, memory: &GuestMemoryMmap, _: HostSlice<'_>) {
        let mut used = [(0, 0); BATCH];
        let mut count = 0;
        for chain in self.iter(memory).unwrap() {
            let (head, mut written) = (chain.head_index(), 0);
            for descriptor in chain {
                black_box((descriptor.addr(), descriptor.len(), descriptor.is_write_only()));
                written += if descriptor.is_write_only() { descriptor.len() } else { 0 };
            }
            used[count] = (head, written);
            count += 1;
        }
        for &(head, written) in &used[..count] {
            self.add_used(memory, head, written).unwrap();
        }
        black_box(self.needs_notification(memory).unwrap());
    }
}

/// All of memory, at 0.
struct Flat<'m>(HostSlice<'m>);

impl Visit for Flat<'_> {
    type Lease = ();

    #[inline]
    fn resolve(&self, addr: BusAddr, len: usize, access: Access, _: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let at = usize::try_from(addr.0).ok().filter(|&at| at < self.0.len());
        let at = at.ok_or(Fault { addr, access, reason: FaultReason::Unmapped })?;
        Ok(self.0.sub(at, len.min(self.0.len() - at)))
    }

    fn lease(&self, _: &[(BusAddr, u32)]) {}
}

fn rules(format: Format, indirect: Indirect) -> Rules {
    Rules { format, notifications: Notifications::EventIdx, indirect }
}

/// A driver submits 32 requests, which is not counted; `device` takes its turn, which is.
fn measure(bencher: Bencher<'_, '_>, format: Format, indirect: Indirect, device: &mut impl Device) {
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let start = NonNull::new(memory.get_host_address(GuestAddress(0)).unwrap()).unwrap();
    // SAFETY: mapped for as long as `memory`, which outlives all of this, and never referenced.
    let all = unsafe { HostSlice::new(start, MEMORY) };
    let area = |area: RingArea| all.sub(LAYOUT.addr(area).0 as usize, area.len(format, SIZE) as usize);
    let slices = RingSlices {
        descriptors: area(RingArea::Descriptors),
        driver: area(RingArea::Driver),
        device: area(RingArea::Device),
    };
    let driver = RefCell::new(DriverQueue::new(rules(format, indirect), SIZE, slices).unwrap());
    let under_way = std::cell::Cell::new(0);
    bencher
        .counter(ItemsCount::new(BATCH))
        .with_inputs(|| {
            let driver = &mut *driver.borrow_mut();
            let mut back = 0;
            while driver.take_used().unwrap().is_some() {
                back += 1;
            }
            assert_eq!(back, under_way.replace(BATCH), "the device used what it was given");
            submit(driver, all, indirect);
        })
        .bench_local_values(|()| device.turn(&memory, all));
    // The peer's own view of memory is the same bytes.
    assert_ne!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
}

fn submit(driver: &mut DriverQueue<RingSlices<'_>>, all: HostSlice<'_>, indirect: Indirect) {
    for number in 0..BATCH as u64 {
        let at = |offset: u64| BusAddr(0x2_0000 + number * 0x2000 + offset);
        let chain = [
            Descriptor { addr: at(0), len: 16, access: Access::Read },
            Descriptor { addr: at(0x1000), len: 4096, access: Access::Write },
            Descriptor { addr: at(48), len: 1, access: Access::Write },
        ];
        let table = TABLES + number * 64;
        let table = IndirectTable { memory: all.sub(table as usize, 48), addr: BusAddr(table) };
        driver.add(&chain, (indirect == Indirect::Allowed).then_some(table)).unwrap();
    }
    driver.publish();
}
