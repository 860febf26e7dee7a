//! The device's half of a split ring beside rust-vmm's `virtio-queue`: the same memory, the same driver, the same requests
//! (a header, a buffer and a status), in turn. What each takes to pop 32 chains, look at every descriptor, and push them.

use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Stop, Ticket, Visit};
use ringfence_ring::{
    Chain, Descriptor, DeviceQueue, DriverQueue, Format, Indirect, IndirectTable, Layout, Notifications, Position,
    RingArea, RingCells, RingSlices, Rules,
};
use std::hint::black_box;
use std::ptr::NonNull;
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: u16 = 256;
const BATCH: usize = 32;
const MEMORY: usize = 1 << 20;
const TABLES: u64 = 0x10000;
const ROUNDS: usize = 200;
const BATCHES: usize = 500;

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

fn main() {
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let start = NonNull::new(memory.get_host_address(GuestAddress(0)).unwrap()).unwrap();
    // SAFETY: mapped for as long as `memory`, which outlives all of this, and never referenced.
    let all = unsafe { HostSlice::new(start, MEMORY) };
    println!("nanoseconds a request, the best of {ROUNDS} rounds");
    for (name, indirect) in [("three descriptors", Indirect::Refused), ("a table of three", Indirect::Allowed)] {
        let ours = best(&memory, all, indirect, Side::Ours);
        let peer = best(&memory, all, indirect, Side::VirtioQueue);
        println!("{name:20} ours {ours:6.1}   virtio-queue {peer:6.1}   {:.1} times", peer / ours);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Ours,
    VirtioQueue,
}

fn best(memory: &GuestMemoryMmap, all: HostSlice<'_>, indirect: Indirect, side: Side) -> f64 {
    let rules = Rules { format: Format::Split, notifications: Notifications::EventIdx, indirect };
    let layout = Layout { size: SIZE, descriptors: BusAddr(0), driver: BusAddr(0x2000), device: BusAddr(0x4000) };
    let area = |area: RingArea| all.sub(layout.addr(area).0 as usize, area.len(rules.format, SIZE) as usize);
    let slices = RingSlices {
        descriptors: area(RingArea::Descriptors),
        driver: area(RingArea::Driver),
        device: area(RingArea::Device),
    };
    let mut driver = DriverQueue::new(rules, SIZE, RingCells::new(rules.format, SIZE, &slices)).unwrap();
    let mut ours = DeviceQueue::new(rules, layout, Position::start(rules.format)).unwrap();
    let mut peer = Queue::new(SIZE).unwrap();
    peer.set_size(SIZE);
    peer.set_desc_table_address(Some(layout.descriptors.0 as u32), Some(0));
    peer.set_avail_ring_address(Some(layout.driver.0 as u32), Some(0));
    peer.set_used_ring_address(Some(layout.device.0 as u32), Some(0));
    peer.set_event_idx(true);
    peer.set_ready(true);
    let visit = Flat(all);
    let mut chain = Chain::default();
    let mut heads = Vec::with_capacity(BATCH);
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let mut spent = Duration::ZERO;
        for _ in 0..BATCHES {
            submit(&mut driver, all, indirect);
            let began = Instant::now();
            match side {
                Side::Ours => {
                    let mut ring = ours.open(&visit);
                    heads.clear();
                    while ring.pop(&mut chain).unwrap() {
                        chain.expand(&visit, None).unwrap();
                        chain.descriptors().iter().for_each(|descriptor| {
                            black_box((descriptor.addr, descriptor.len, descriptor.access));
                        });
                        heads.push((chain.head(), chain.writable_len()));
                    }
                    for &(head, written) in &heads {
                        ring.push(head, written).unwrap();
                    }
                    ring.publish().unwrap();
                    black_box(ring.needs_notification().unwrap());
                }
                Side::VirtioQueue => {
                    let mut used = [(0, 0); BATCH];
                    let mut count = 0;
                    for chain in peer.iter(memory).unwrap() {
                        let (head, mut written) = (chain.head_index(), 0);
                        for descriptor in chain {
                            black_box((descriptor.addr(), descriptor.len(), descriptor.is_write_only()));
                            written += if descriptor.is_write_only() { descriptor.len() } else { 0 };
                        }
                        used[count] = (head, written);
                        count += 1;
                    }
                    for &(head, written) in &used[..count] {
                        peer.add_used(memory, head, written).unwrap();
                    }
                    black_box(peer.needs_notification(memory).unwrap());
                }
            }
            spent += began.elapsed();
            let mut back = 0;
            while driver.take_used().unwrap().is_some() {
                back += 1;
            }
            assert_eq!(back, BATCH);
        }
        best = best.min(spent);
    }
    // The peer's own view of memory is the same bytes.
    assert_ne!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    best.as_nanos() as f64 / (BATCHES * BATCH) as f64
}

fn submit(driver: &mut DriverQueue<RingCells<'_>>, all: HostSlice<'_>, indirect: Indirect) {
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
