//! What a request costs the driver and the device, without a second processor, sockets or sleep: both halves in one
//! thread, batch by batch.
//!
//! `requests [--count N] [--depth N] [--len BYTES] [--image IMAGE] [--ring split|direct|packed] [--pages] [--write]`
//! tells nanoseconds a request, the best of many rounds. Under `valgrind --tool=callgrind --toggle-collect=…` the same
//! program tells instructions, which no noise changes: `cargo xtask instructions`.

use ringfence_device::Device;
use ringfence_device::blk::{self, Blk as Disk};
use ringfence_device::queue::{Look, Queue, Report, Stopped};
use ringfence_device::storage::{self, Format};
use ringfence_dma::{Buffer, BusAddr, Fault, Gpa, Permission, Ram};
use ringfence_driver::Host;
use ringfence_driver::blk::{Blk, Options, Request};
use ringfence_driver::embedded::{DeviceEnd, Embedded};
use ringfence_driver::mapper::Direct;
use ringfence_driver::policy::{Addressing, DriverPolicy, Identity, IommuMode, Platform};
use ringfence_iotlb::{Iotlb, Unmapped, View, Wake};
use ringfence_ring::{DeviceQueue, Format as RingFormat, Indirect, Layout, Notifications, Position, Rules};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_spec::F;

struct Nobody;

impl Wake for Nobody {
    fn wake(&self) {}
}

impl Report for Nobody {
    fn fault(&mut self, fault: Fault) {
        panic!("{fault}");
    }
}

/// A disk of `ringfence-device` behind a translation cache.
struct End {
    device: Arc<dyn Device>,
    iotlb: Arc<Iotlb>,
    hidden: u64,
    queue: Option<Queue<View>>,
}

const fn bit(feature: F) -> u64 {
    feature.bits().to_ne() as u64
}

impl DeviceEnd for End {
    fn identity(&self) -> Identity {
        Identity { vendor: 0x1af4, device: self.device.id().into(), slot: 0 }
    }

    fn features(&self) -> u64 {
        let rings = F::VERSION_1 | F::INDIRECT_DESC | F::EVENT_IDX | F::RING_PACKED;
        (self.device.features() | bit(rings)) & !self.hidden
    }

    fn read_config(&self, offset: u32, into: &mut [u8]) {
        let config = self.device.config();
        for (to, from) in into.iter_mut().zip(config.iter().skip(offset as usize)) {
            *to = *from;
        }
    }

    fn max_queue_size(&self, _queue: u16) -> u16 {
        32768
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout, features: u64, _addressing: Addressing) -> bool {
        let has = |feature| features & bit(feature) != 0;
        let rules = Rules {
            format: if has(F::RING_PACKED) { RingFormat::Packed } else { RingFormat::Split },
            notifications: if has(F::EVENT_IDX) { Notifications::EventIdx } else { Notifications::Flags },
            indirect: if has(F::INDIRECT_DESC) { Indirect::Allowed } else { Indirect::Refused },
        };
        let position = Position::start(rules.format);
        let ring = DeviceQueue::new(rules, *layout, position).unwrap();
        let handler = Arc::clone(&self.device).open_queue(queue, layout.size, features).unwrap();
        let view = self.iotlb.view(Arc::new(Nobody));
        self.queue = Some(Queue::new(ring, layout.size, view, handler, Box::new(Nobody), Stopped::at(position)));
        true
    }

    fn reset_queue(&mut self, _queue: u16) {
        self.queue = None;
    }

    fn turn(&mut self, _queue: u16) -> bool {
        serve(self)
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

/// All that the device does for a batch.
#[inline(never)]
fn serve(end: &mut End) -> bool {
    end.queue.as_mut().is_some_and(|queue| queue.turn(Look::Not).unwrap().worked)
}

type Driver<'a> = ringfence_driver::blk::Queue<'a, Direct<'a>>;

#[inline(never)]
fn submit<'a>(queue: &mut Driver<'a>, buffers: &[Buffer<'a>], write: bool, at: &mut u64) {
    for buffer in buffers {
        *at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let sector = (*at >> 48) * 8;
        let buffer = std::slice::from_ref(buffer);
        let request =
            if write { Request::Write { sector, from: buffer } } else { Request::Read { sector, into: buffer } };
        queue.submit(request).unwrap();
    }
    queue.publish().unwrap();
}

#[inline(never)]
fn reap(queue: &mut Driver<'_>) -> usize {
    let mut ended = 0;
    while let Some(completion) = queue.poll().unwrap() {
        completion.result.unwrap();
        ended += 1;
    }
    ended
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        Some(arguments.get(at + 1).expect("a value").clone())
    };
    let number = |name: &str, default: usize| value(name).map_or(default, |text| text.parse().expect("a number"));
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let (count, depth, len) = (number("--count", 2_000_000), number("--depth", 32), number("--len", 4096));
    let hidden = match value("--ring").as_deref().unwrap_or("split") {
        "split" => bit(F::RING_PACKED),
        "direct" => bit(F::RING_PACKED | F::INDIRECT_DESC),
        "packed" => 0,
        other => panic!("no ring is called {other}"),
    };

    const RINGS: usize = 1 << 20;
    let size = RINGS + depth * len.next_multiple_of(4096);
    let ram = Ram::new(size);
    let iotlb = Iotlb::new(Unmapped::Fault, ringfence_iotlb::Options::default());
    let piece = if flag("--pages") { 4096 } else { size };
    for start in (0..size).step_by(piece) {
        let host = NonNull::new(ram.slice(start, 1).as_ptr()).unwrap();
        let (first, last) = (BusAddr(start as u64), BusAddr((start + piece.min(size - start)) as u64 - 1));
        // SAFETY: `ram` outlives the device, which is dropped with the disk.
        let _ = unsafe { iotlb.update(first, last, host, Permission::ReadWrite) }.unwrap();
    }
    let image = value("--image").unwrap_or_else(|| "null:1G".into());
    let storage = storage::open(&image, Format::Raw, false).unwrap();
    let options = blk::Options { queues: 1, queue_size: 32768, serial: String::new() };
    let end = End { device: Arc::new(Disk::new(storage, options)), iotlb, hidden, queue: None };
    let buffer = |at, len| Buffer::new(ram.slice(at, len), Gpa(at as u64));
    let mapper = Direct::new(buffer(0, RINGS));
    let host = Host { platform: Platform::X86, policy: DriverPolicy::Old, physical: Some(&mapper), translated: None };
    let options = Options { depth: (depth * 4).next_power_of_two().max(256) as u16, segments: 1 };
    let mut disk = Blk::start(Embedded::new(end, IommuMode::Off), host, options).unwrap();
    let buffers: Vec<_> = (0..depth).map(|n| buffer(RINGS + n * len.next_multiple_of(4096), len)).collect();

    let (transport, mut queues) = disk.split();
    let (queue, device) = (&mut *queues[0], transport.device_mut());
    let write = flag("--write");
    let mut at = 1;
    let mut best = [Duration::MAX; 3];
    let rounds = count.div_ceil(depth * 200).max(1);
    for _ in 0..rounds {
        let mut spent = [Duration::ZERO; 3];
        for _ in 0..200 {
            let began = Instant::now();
            submit(queue, &buffers, write, &mut at);
            let submitted = Instant::now();
            while serve(device) {}
            let served = Instant::now();
            assert_eq!(reap(queue), depth);
            let reaped = Instant::now();
            spent[0] += submitted - began;
            spent[1] += served - submitted;
            spent[2] += reaped - served;
        }
        for (best, spent) in best.iter_mut().zip(spent) {
            *best = (*best).min(spent);
        }
    }
    let [submit, serve, reap] = best.map(|best| best.as_nanos() as f64 / (200 * depth) as f64);
    println!("submit {submit:.1} ns, serve {serve:.1} ns, reap {reap:.1} ns a request");
}
