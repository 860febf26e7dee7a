//! Packets there and back between sides that sleep and wake whenever they like, through pools that are too small, while
//! translations are taken away: each comes back, and nobody sleeps for good.
//!
//! `RINGFENCE_TRAFFIC_SECONDS=600` has it go on for so long.

use crate::served::{BUFFERS, Frontend, RINGS, Served};
use crate::{options, serve_plainly, wrap_looking};
use ringfence_device::{Back, Device, Handler, Outcome, Request, Token, Unreachable, eventfd};
use ringfence_dma::{Buffer, FrontendVa, Gpa};
use ringfence_driver::net::{Net, Options as CardOptions};
use ringfence_driver::policy::{DriverPolicy, Platform};
use ringfence_driver::{Host, LoanError};
use ringfence_iommu::Strict;
use ringfence_ring::Format;
use ringfence_vhost_user::client::{Attachment, FrontendTransport, TransportError};
use ringfence_vhost_user::session::bits;
use ringfence_vhost_user::wire::Invalidated;
use ringfence_wrap::{Kind, MIN_POOL, Options};
use rustix::event::{EventfdFlags, eventfd as new_eventfd};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// xorshift: any numbers will do, and the same ones each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }

    fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    fn doze(&mut self) {
        match self.below(8) {
            0 => std::thread::sleep(Duration::from_micros(self.below(400))),
            1 => std::thread::yield_now(),
            _ => {}
        }
    }
}

/// A card whose packets come back. To `ringfence wrap` it is somebody's back-end without an IOMMU.
pub(crate) struct Echo {
    packets: Mutex<VecDeque<Vec<u8>>>,
    arrived: OwnedFd,
}

impl Echo {
    pub(crate) fn new() -> Self {
        let arrived = new_eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        Self { packets: Mutex::default(), arrived }
    }

    /// Something is there for whoever receives.
    pub(crate) fn receive(&self, packet: Vec<u8>) {
        self.packets.lock().unwrap().push_back(packet);
        eventfd::ring(self.arrived.as_fd());
    }
}

impl Device for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn id(&self) -> u16 {
        1
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        2
    }

    fn queue_groups(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn open_queue(self: Arc<Self>, index: u16, _depth: u16, _features: u64) -> io::Result<Box<dyn Handler>> {
        let random = Random(0x9e37_79b9_7f4a_7c15 + u64::from(index));
        Ok(match index {
            0 => Box::new(Receiving {
                card: self,
                posted: VecDeque::new(),
                filled: HashMap::new(),
                listening: false,
                random,
            }),
            _ => Box::new(Sending { card: self, random }),
        })
    }
}

/// The queue that the driver receives by.
struct Receiving {
    card: Arc<Echo>,
    posted: VecDeque<Token>,
    filled: HashMap<Token, Vec<u8>>,
    listening: bool,
    random: Random,
}

impl Handler for Receiving {
    fn is_in_order(&self) -> bool {
        true
    }

    fn start(&mut self, token: Token, _: &Request<'_>) -> Outcome {
        self.posted.push_back(token);
        Outcome::Pending
    }

    fn unreachable(&mut self, _: &Unreachable<'_>) -> u32 {
        0
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        self.random.doze();
        if std::mem::take(&mut self.listening) {
            eventfd::hush(self.card.arrived.as_fd());
        }
        let packets = &mut *self.card.packets.lock().unwrap();
        while !self.posted.is_empty()
            && let Some(packet) = packets.pop_front()
        {
            let token = self.posted.pop_front().unwrap();
            self.filled.insert(token, packet);
            back.push(Back { token, readable_from: 0, writable_from: 0 });
        }
    }

    fn go_on(&mut self, token: Token, request: &Request<'_>) -> Outcome {
        let packet = self.filled.remove(&token).unwrap();
        assert!(request.writable.write(0, &packet), "a buffer that is too short");
        Outcome::Done(packet.len() as u32)
    }

    fn recall(&mut self, unbegun: &mut Vec<Token>) {
        unbegun.extend(self.posted.drain(..));
    }

    fn listen(&mut self) -> bool {
        self.listening = true;
        !self.posted.is_empty() && !self.card.packets.lock().unwrap().is_empty()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.card.arrived.as_fd())
    }
}

/// The queue that the driver sends by.
struct Sending {
    card: Arc<Echo>,
    random: Random,
}

impl Handler for Sending {
    fn is_in_order(&self) -> bool {
        true
    }

    fn start(&mut self, _: Token, request: &Request<'_>) -> Outcome {
        self.random.doze();
        let mut packet = vec![0; request.readable.len() as usize];
        assert!(request.readable.read(0, &mut packet));
        self.card.receive(packet);
        Outcome::Done(0)
    }

    fn unreachable(&mut self, _: &Unreachable<'_>) -> u32 {
        panic!("a request out of reach, without an IOMMU")
    }
}

fn echo() -> Served {
    serve_plainly(Arc::new(Echo::new()))
}

/// The bytes of a packet behind its number.
fn content(number: u64, len: usize) -> Vec<u8> {
    let mut random = Random(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    number.to_le_bytes().into_iter().chain((8..len).map(|_| random.below(256) as u8)).collect()
}

const WINDOW: u64 = 14;
const BUFFER: usize = 2048;
const BUFFERS_EACH_WAY: usize = 16;

/// How the rings are, and how eager those between.
#[derive(Clone, Copy, Debug)]
struct How {
    /// What the driver does not take.
    without: u64,
    /// At the back-end.
    format: Format,
    poll: Duration,
    seed: u64,
}

/// So many packets there and back.
fn exchange(how: How, packets: u64) {
    let back_end = echo();
    let wrapped = Options { kind: Kind::Net, pool: MIN_POOL, format: how.format, ..options(&back_end.socket) };
    let wrapped = wrap_looking(wrapped, how.poll, Duration::from_secs(60));
    let frontend = Frontend::connect(&wrapped);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let attachment = Attachment {
        device: 1,
        queue_size: 64,
        gpa: Gpa(0),
        frontend_va: FrontendVa(frontend.memory.slice(0, 1).as_ptr() as u64),
        // Who waits in vain for so long waits for ever.
        patience: Duration::from_secs(60),
    };
    let transport = FrontendTransport::new(Arc::clone(&frontend.client), attachment).without(how.without);
    let host =
        Host { platform: Platform::X86Iommu, policy: DriverPolicy::New, physical: None, translated: Some(&strict) };
    let mut net = Net::start(transport, host, CardOptions { depth: 64, segments: 2 }).unwrap();

    let buffer = |number: usize| frontend.buffer((BUFFERS.0 + number * BUFFER, BUFFER));
    for number in 0..BUFFERS_EACH_WAY {
        net.offer(buffer(number)).unwrap();
    }
    let mut free: Vec<Buffer<'_>> = (BUFFERS_EACH_WAY..2 * BUFFERS_EACH_WAY).map(buffer).collect();
    let mut lent = Vec::new();
    let mut random = Random(how.seed);
    let (mut sent, mut back) = (0, 0);
    let fail = |error: LoanError<TransportError>, sent: u64, back: u64| -> ! {
        panic!("{how:?}, {sent} sent, {back} back: {error}")
    };
    while back < packets {
        while let Some(id) = net.sent().unwrap_or_else(|error| fail(error, sent, back)) {
            let at = lent.iter().position(|&(other, _)| other == id).unwrap();
            free.push(lent.swap_remove(at).1);
        }
        for _ in 0..random.below(WINDOW) {
            if sent == packets || sent - back == WINDOW {
                break;
            }
            let Some(buffer) = free.pop() else { break };
            let packet = content(sent, 14 + random.below(1500) as usize);
            buffer.memory().write(0, &packet);
            lent.push((net.send(&[buffer.sub(0, packet.len())]).unwrap(), buffer));
            sent += 1;
        }
        net.notify().unwrap();
        random.doze();
        let mut some = false;
        while let Some(received) = net.received().unwrap_or_else(|error| fail(error, sent, back)) {
            let mut packet = vec![0; received.len];
            received.buffer.memory().read(0, &mut packet);
            assert!(packet == content(back, packet.len()), "{how:?}, packet {back} of {sent}");
            net.offer(received.buffer).unwrap();
            (some, back) = (true, back + 1);
        }
        net.notify().unwrap();
        if random.one_in(50) {
            frontend.client.invalidate(Invalidated::Everything).unwrap();
        }
        if random.one_in(200) {
            // What is being received when its queue stops may be lost, as on any card.
            let queue = u16::from(sent > back || random.one_in(2));
            let transport = net.device_mut().transport_mut();
            let base = transport.pause(queue).unwrap();
            transport.resume(queue, base).unwrap();
        }
        if !some && sent > back {
            let waited = match random.below(8) {
                0 => {
                    std::thread::yield_now();
                    Ok(())
                }
                1 if !lent.is_empty() => net.wait_sent(),
                _ => net.wait(),
            };
            waited.unwrap_or_else(|error| fail(error, sent, back));
        }
    }
}

/// Busy now and then, beside whoever does the work.
fn disturb(end: &AtomicBool, seed: u64) {
    let mut random = Random(seed);
    while !end.load(Ordering::Relaxed) {
        let until = Instant::now() + Duration::from_micros(random.below(3000));
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_micros(random.below(2000)));
    }
}

#[test]
fn nobody_sleeps_for_good() {
    let seconds = std::env::var("RINGFENCE_TRAFFIC_SECONDS").ok().and_then(|text| text.parse().ok());
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        (1..=2).for_each(|seed| {
            _ = scope.spawn({
                let end = &end;
                move || disturb(end, seed)
            })
        });
        let ended = std::panic::catch_unwind(|| {
            for seed in 1.. {
                for (number, (without, format)) in [
                    (bits::RING_PACKED, Format::Split),
                    (0, Format::Packed),
                    (bits::RING_PACKED | bits::INDIRECT_DESC, Format::Packed),
                    (bits::EVENT_IDX, Format::Split),
                ]
                .into_iter()
                .enumerate()
                {
                    let poll = Duration::from_micros(if (seed + number as u64).is_multiple_of(2) { 20 } else { 0 });
                    exchange(How { without, format, poll, seed: seed * 7 + number as u64 }, 400);
                }
                if until.is_none_or(|until| Instant::now() >= until) {
                    break;
                }
            }
        });
        end.store(true, Ordering::Relaxed);
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}
