//! Queues that stop at any time, and go on with another process that knows nothing but the number that the first one gave.

use crate::scripted::{Act, Scripted};
use crate::traffic::Echo;
use crate::{PAGE, options, serve_plainly, wrap_looking};
use ringfence_dma::{Access, BusAddr, FrontendVa, Gpa};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_ring::{Descriptor, DriverQueue, Format, Position, RingArea, RingCells, RingSlices, Rules};
use ringfence_vhost_user::client::{Frontend, Options as ClientOptions, Vring};
use ringfence_vhost_user::session::bits;
use ringfence_wrap::{Kind, Options};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: u16 = 256;
/// A request's bytes; and its header and status, elsewhere.
const LEN: usize = 16 * PAGE;
const SLOTS: usize = 8;
const BUFFERS: usize = 1 << 20;
const HEADERS: usize = BUFFERS - PAGE;
const MEMORY: usize = BUFFERS + SLOTS * LEN;

/// A driver's ring and its requests, whoever serves them.
struct Guest<'m> {
    memory: &'m SharedMemory,
    format: Format,
    ring: DriverQueue<RingCells<'m>>,
    /// By the ring's name for them: which slot, and what was to be written where.
    under_way: HashMap<usize, (usize, u64, u8)>,
    free: Vec<usize>,
    ended: Vec<(u64, u8)>,
}

impl<'m> Guest<'m> {
    fn new(memory: &'m SharedMemory, format: Format) -> Self {
        let area = |area: RingArea, page: usize| memory.slice(page * 4 * PAGE, area.len(format, SIZE) as usize);
        let slices = RingSlices {
            descriptors: area(RingArea::Descriptors, 0),
            driver: area(RingArea::Driver, 1),
            device: area(RingArea::Device, 2),
        };
        let rules = Rules { format, ..Rules::default() };
        let ring = DriverQueue::new(rules, SIZE, RingCells::new(format, SIZE, &slices)).unwrap();
        Self { memory, format, ring, under_way: HashMap::new(), free: (0..SLOTS).collect(), ended: Vec::new() }
    }

    /// Has `value` written all over the place of that number.
    fn submit(&mut self, number: u64, value: u8) {
        let slot = self.free.pop().unwrap();
        let (header, data) = (HEADERS + slot * 32, BUFFERS + slot * LEN);
        let sector = number * (LEN / 512) as u64;
        let mut bytes = [0; 17];
        bytes[0] = 1;
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        bytes[16] = 0xff;
        self.memory.slice(header, 17).write(0, &bytes);
        self.memory.slice(data, LEN).fill(value);
        let descriptor =
            |at: usize, len: usize, access| Descriptor { addr: BusAddr(at as u64), len: len as u32, access };
        let mut chain = vec![descriptor(header, 16, Access::Read)];
        chain.extend((0..LEN / PAGE).map(|page| descriptor(data + page * PAGE, PAGE, Access::Read)));
        chain.push(descriptor(header + 16, 1, Access::Write));
        let on_ring = self.ring.add(&chain, None).unwrap();
        self.under_way.insert(on_ring.index(), (slot, number, value));
    }

    /// Takes in what was used.
    fn look(&mut self) {
        while let Some(used) = self.ring.take_used().unwrap() {
            let (slot, number, value) = self.under_way.remove(&used.token.index()).expect("used twice");
            let mut status = [0xff];
            self.memory.slice(HEADERS + slot * 32 + 16, 1).read(0, &mut status);
            assert_eq!(status, [0]);
            self.free.push(slot);
            self.ended.push((number, value));
        }
    }
}

/// Serves `guest` from `base` on by a process of its own, for as long as `until` says; where it stopped.
fn serve(
    guest: &mut Guest<'_>,
    backend: &Path,
    base: u32,
    io_timeout: Duration,
    until: impl FnOnce(&mut Guest<'_>),
) -> u32 {
    // Room for one request at a time.
    let base = serve_as(Options { pool: 18 * PAGE, ..options(backend) }, guest, base, io_timeout, until);
    guest.look();
    base
}

fn serve_as(
    options: Options,
    guest: &mut Guest<'_>,
    base: u32,
    io_timeout: Duration,
    until: impl FnOnce(&mut Guest<'_>),
) -> u32 {
    let wrapped = wrap_looking(options, Duration::from_micros(20), io_timeout);
    let client = Frontend::connect(&wrapped.socket, ClientOptions::default()).unwrap();
    let packed = if guest.format == Format::Packed { bits::RING_PACKED } else { 0 };
    client.set_features(client.offered() & (bits::VERSION_1 | packed)).unwrap();
    let va = guest.memory.slice(0, 1).as_ptr() as u64;
    let all = Placement { gpa: Gpa(0), frontend_va: FrontendVa(va), size: MEMORY as u64, offset: 0 };
    client.set_memory(&[(all, guest.memory.as_fd())]).unwrap();
    let [kick, call] = [(); 2].map(|()| eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let [descriptor, available, used] = [0, 1, 2].map(|page| va + (page * 4 * PAGE) as u64);
    let (kick_fd, call_fd) = (Some(kick.as_fd()), Some(call.as_fd()));
    let vring = Vring { index: 0, size: SIZE, base, descriptor, available, used, kick: kick_fd, call: call_fd };
    client.start_vring(&vring).unwrap();
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    until(guest);
    client.stop_vring(0).unwrap()
}

fn memory() -> SharedMemory {
    SharedMemory::new(MEMORY).unwrap()
}

/// Nothing lies between what was used and where the queue stopped.
fn assert_nothing_is_left_behind(guest: &Guest<'_>, base: u32) {
    let position = Position::from_vring_base(guest.format, base).unwrap();
    let used = match guest.format {
        Format::Split => guest.ended.len() as u16,
        Format::Packed => position.used,
    };
    assert_eq!(position.avail, used, "{:?}, {} ended", guest.format, guest.ended.len());
}

fn assert_stored(backend: &Scripted, guest: &Guest<'_>) {
    let disk = backend.disk.lock().unwrap();
    let latest: HashMap<u64, u8> = guest.ended.iter().copied().collect();
    for (number, value) in latest {
        assert!(disk[number as usize * LEN..][..LEN].iter().all(|&byte| byte == value), "place {number}");
    }
}

#[test]
fn what_waits_for_room_goes_on_with_another_process() {
    for format in [Format::Split, Format::Packed] {
        let backend = Scripted::start(&[]);
        let memory = memory();
        let mut guest = Guest::new(&memory, format);
        let mut base = Position::start(format).vring_base(format);
        let (mut submitted, mut left_at_a_stop) = (0u64, 0);
        for round in 0..12u64 {
            while !guest.free.is_empty() {
                // Each place of the disk more than once.
                guest.submit(submitted % 24, submitted as u8 | 1);
                submitted += 1;
            }
            guest.ring.publish();
            base = serve(&mut guest, &backend.socket, base, Duration::from_secs(60), |guest| {
                // From none to some of them.
                std::thread::sleep(Duration::from_micros(150 * (round % 5)));
                guest.look();
            });
            assert_nothing_is_left_behind(&guest, base);
            left_at_a_stop += guest.under_way.len();
        }
        assert!(left_at_a_stop > 0, "it never had to stop in the middle");
        finish(&mut guest, &backend, base, submitted as usize);
        assert_eq!(backend.requests(), submitted as usize, "each was carried out once");
    }
}

fn finish(guest: &mut Guest<'_>, backend: &Scripted, base: u32, submitted: usize) {
    serve(guest, &backend.socket, base, Duration::from_secs(60), |guest| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !guest.under_way.is_empty() {
            assert!(Instant::now() < deadline, "{:?} are lost", guest.under_way);
            std::thread::sleep(Duration::from_millis(1));
            guest.look();
        }
    });
    assert_eq!(guest.ended.len(), submitted);
    assert_stored(backend, guest);
}

/// What was with a back-end that said nothing until nobody waited any more is begun anew by whoever comes next.
#[test]
fn what_a_silent_back_end_had_goes_on_with_another_process() {
    for format in [Format::Split, Format::Packed] {
        let backend = Scripted::start(&[Act::Silent]);
        let memory = memory();
        let mut guest = Guest::new(&memory, format);
        (0..SLOTS as u64).for_each(|number| guest.submit(number, 7 + number as u8));
        guest.ring.publish();
        let start = Position::start(format).vring_base(format);
        let base = serve(&mut guest, &backend.socket, start, Duration::from_millis(100), |_| backend.has_taken(1));
        assert_eq!(base, start);
        finish(&mut guest, &backend, base, SLOTS);
    }
}

/// Buffers that stand at a card are another's when the queue stops, and nobody waits for them.
#[test]
fn what_nothing_has_arrived_for_goes_on_with_another_process() {
    const BUFFERS_POSTED: usize = 12;
    for format in [Format::Split, Format::Packed] {
        let card = Arc::new(Echo::new());
        let backend = serve_plainly(Arc::clone(&card) as _);
        let memory = memory();
        let mut guest = Guest::new(&memory, format);
        let mut buffers = HashMap::new();
        for number in 0..BUFFERS_POSTED {
            let addr = BusAddr((BUFFERS + number * PAGE) as u64);
            let on_ring = guest.ring.add(&[Descriptor { addr, len: 2048, access: Access::Write }], None).unwrap();
            buffers.insert(on_ring.index(), number);
        }
        guest.ring.publish();
        let mut base = Position::start(format).vring_base(format);
        let mut arrived = 0;
        for count in [0, 3, 1, 8] {
            let net = Options { kind: Kind::Net, pool: 32 * PAGE, ..options(&backend.socket) };
            base = serve_as(net, &mut guest, base, Duration::from_secs(60), |guest| {
                for number in arrived..arrived + count {
                    card.receive(vec![number as u8 + 1; 100 + number]);
                }
                let deadline = Instant::now() + Duration::from_secs(60);
                while arrived < BUFFERS_POSTED.min(guest.ended.len() + count) {
                    let Some(used) = guest.ring.take_used().unwrap() else {
                        assert!(Instant::now() < deadline, "{arrived} arrived");
                        std::thread::sleep(Duration::from_millis(1));
                        continue;
                    };
                    let mut packet = vec![0; used.written as usize];
                    let buffer = buffers.remove(&used.token.index()).expect("used twice");
                    memory.slice(BUFFERS + buffer * PAGE, packet.len()).read(0, &mut packet);
                    assert_eq!(packet, vec![arrived as u8 + 1; 100 + arrived]);
                    arrived += 1;
                }
            });
            guest.ended.resize(arrived, (0, 0));
            assert_nothing_is_left_behind(&guest, base);
        }
        assert!(buffers.is_empty());
    }
}
