//! A queue's thread: requests without end, as many at a time as the depth says.
//!
//! One turn takes what the device has used, puts as many new requests on their way, shows them with one store, rings at
//! most once, and looks at the clock once: the client must not be what is measured.

use super::job::Job;
use super::pattern::Ledger;
use anyhow::{Context, bail};
use hdrhistogram::Histogram;
use ringfence_dma::{Buffer, Mapper};
use ringfence_driver::blk::{BlkError, Completion, Queue, Request, SECTOR};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Most completions that are taken before new requests go out: the device shall not run dry meanwhile.
const BATCH: usize = 16;

/// How often an idle queue is looked at between two looks at the clock.
const LOOKS: u32 = 64;

/// A sleeping thread looks up so often, for the phase and for a device that has died.
const NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// A device that uses nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the threads are to do; the main thread says it.
#[derive(Debug, Default)]
pub(super) struct Conductor {
    phase: AtomicU8,
    /// How many lanes have written what they are going to verify.
    filled: AtomicUsize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Write what is to be verified.
    Fill,
    WarmUp,
    Measure,
    /// Start nothing new.
    End,
    /// Wait for nothing.
    Abandon,
}

impl Conductor {
    pub(super) fn say(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(super) fn filled(&self) -> usize {
        self.filled.load(Ordering::Relaxed)
    }

    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Fill,
            1 => Phase::WarmUp,
            2 => Phase::Measure,
            3 => Phase::End,
            _ => Phase::Abandon,
        }
    }
}

/// What came of a lane.
#[derive(Debug)]
pub(super) struct Tally {
    /// In nanoseconds, of each request.
    pub(super) latency: Histogram<u64>,
    pub(super) verified: u64,
}

impl Tally {
    pub(super) fn new() -> Self {
        let longest = Duration::from_secs(100).as_nanos() as u64;
        let latency = Histogram::new_with_bounds(1, longest, 3).expect("bounds and a precision that there are");
        Self { latency, verified: 0 }
    }

    pub(super) fn add(&mut self, other: &Tally) {
        self.latency.add(&other.latency).expect("of the same bounds");
        self.verified += other.verified;
    }

    fn clear(&mut self) {
        self.latency.reset();
        self.verified = 0;
    }
}

/// Where the next request goes.
pub(super) struct Plan {
    /// The lane's own stretch of the disk, in blocks.
    first: u64,
    blocks: u64,
    block_size: u64,
    random: bool,
    reads: u32,
    next: u64,
    state: u64,
}

impl Plan {
    /// For lane `lane` of those of `job`, on a disk (or a part of it) of `size` bytes.
    pub(super) fn new(job: &Job, lane: u16, size: u64) -> Self {
        let shape = &job.shape;
        let blocks = size / shape.block_size / u64::from(shape.queues);
        Self {
            first: blocks * u64::from(lane),
            blocks,
            block_size: shape.block_size,
            random: shape.rw.is_random(),
            reads: shape.rw.reads(shape.read_percent),
            next: 0,
            state: 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(u64::from(lane) + 1),
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// xorshift64*: fast, and random enough for an address.
    #[inline]
    fn random(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next block and what to do with it.
    #[inline]
    fn step(&mut self) -> (u64, Kind) {
        let kind = match self.reads {
            0 => Kind::Write,
            100 => Kind::Read,
            reads => [Kind::Write, Kind::Read][usize::from(self.random() >> 32 < (u64::from(reads) << 32) / 100)],
        };
        if self.random {
            let block = (u128::from(self.random()) * u128::from(self.blocks)) >> 64;
            return (block as u64, kind);
        }
        let block = self.next;
        self.next = if block + 1 == self.blocks { 0 } else { block + 1 };
        (block, kind)
    }

    #[inline]
    fn position(&self, block: u64) -> u64 {
        (self.first + block) * self.block_size
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

/// A request under way.
#[derive(Clone, Copy)]
struct Flight {
    /// Nanoseconds since the lane began.
    started: u64,
    block: u64,
    kind: Kind,
}

/// A queue and all that its thread needs.
pub(super) struct Lane<'q, 'a, M: Mapper + ?Sized> {
    queue: &'q mut Queue<'a, M>,
    kick: BorrowedFd<'q>,
    call: BorrowedFd<'q>,
    /// One for each request that may be under way.
    buffers: Vec<Buffer<'a>>,
    flights: Vec<Flight>,
    /// By the slot of a request: whose buffer and flight it has.
    by_slot: Vec<u16>,
    idle: Vec<u16>,
    plan: Plan,
    ledger: Option<Ledger>,
    /// Called before what came back is looked at: whatever the mapper has put off is done then.
    settle: &'q (dyn Fn() + Sync),
    /// Completions that are not looked at yet.
    ended: Vec<Completion>,
    spin: Duration,
    began: Instant,
    /// When the device last used something, or had nothing to use.
    lively: Instant,
}

impl<'q, 'a, M: Mapper + ?Sized> Lane<'q, 'a, M> {
    pub(super) fn new(
        queue: &'q mut Queue<'a, M>,
        (kick, call): (BorrowedFd<'q>, BorrowedFd<'q>),
        buffers: Vec<Buffer<'a>>,
        plan: Plan,
        ledger: Option<Ledger>,
        settle: &'q (dyn Fn() + Sync),
        spin: Duration,
    ) -> Self {
        let depth = buffers.len() as u16;
        let flights = vec![Flight { started: 0, block: 0, kind: Kind::Read }; usize::from(depth)];
        let by_slot = vec![0; queue.slots()];
        let idle = (0..depth).rev().collect();
        let began = Instant::now();
        let ended = Vec::with_capacity(BATCH);
        let lively = began;
        Self { queue, kick, call, buffers, flights, by_slot, idle, plan, ledger, settle, ended, spin, began, lively }
    }

    /// Until the conductor ends it.
    pub(super) fn run(mut self, conductor: &Conductor) -> anyhow::Result<Tally> {
        let mut tally = Tally::new();
        if self.ledger.is_some() {
            self.fill(conductor, &mut tally)?;
        }
        conductor.filled.fetch_add(1, Ordering::Relaxed);
        while conductor.phase() == Phase::Fill {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.lively = Instant::now();
        let mut seen = Phase::WarmUp;
        loop {
            let phase = conductor.phase();
            if phase != seen {
                match phase {
                    Phase::Measure => tally.clear(),
                    Phase::End => break,
                    Phase::Abandon => bail!("abandoned"),
                    Phase::Fill | Phase::WarmUp => {}
                }
                seen = phase;
            }
            let ended = self.reap(&mut tally)?;
            self.refill(self.now())?;
            if ended == 0 {
                self.wait(conductor)?;
            }
        }
        let mut rest = Tally::new();
        self.drain(conductor, &mut rest)?;
        Ok(tally)
    }

    /// Writes every block once.
    fn fill(&mut self, conductor: &Conductor, tally: &mut Tally) -> anyhow::Result<()> {
        for block in 0..self.plan.blocks() {
            while self.idle.is_empty() {
                self.ring()?;
                if self.reap(tally)? == 0 {
                    self.wait(conductor)?;
                }
            }
            self.start(0, block, Kind::Write)?;
            if matches!(conductor.phase(), Phase::End | Phase::Abandon) {
                break;
            }
        }
        self.ring()?;
        self.drain(conductor, tally)
    }

    fn drain(&mut self, conductor: &Conductor, tally: &mut Tally) -> anyhow::Result<()> {
        self.lively = Instant::now();
        while self.idle.len() < self.buffers.len() {
            if self.reap(tally)? == 0 {
                self.wait(conductor)?;
            }
        }
        Ok(())
    }

    #[inline]
    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    /// Takes what has come back, up to a batch of it.
    #[inline]
    fn reap(&mut self, tally: &mut Tally) -> anyhow::Result<usize> {
        while self.ended.len() < BATCH {
            let Some(completion) = self.queue.poll()? else { break };
            self.ended.push(completion);
        }
        let ended = self.ended.len();
        if ended == 0 {
            return Ok(0);
        }
        (self.settle)();
        let now = self.now();
        for completion in self.ended.drain(..) {
            let index = self.by_slot[completion.id.slot()];
            let flight = self.flights[usize::from(index)];
            self.idle.push(index);
            if let Err(error) = completion.result {
                let position = self.plan.position(flight.block);
                return Err(error).with_context(|| format!("a {:?} at byte {position:#x}", flight.kind));
            }
            tally.latency.saturating_record(now.saturating_sub(flight.started).max(1));
            if let Some(ledger) = &mut self.ledger {
                ledger.give_back(flight.block);
                if flight.kind == Kind::Read {
                    let position = self.plan.position(flight.block);
                    ledger.check(flight.block, position, self.buffers[usize::from(index)].memory())?;
                    tally.verified += 1;
                }
            }
        }
        Ok(ended)
    }

    /// Puts a request on its way for each that is idle.
    #[inline]
    fn refill(&mut self, now: u64) -> anyhow::Result<()> {
        if self.idle.is_empty() {
            return Ok(());
        }
        while !self.idle.is_empty() {
            let (block, kind) = self.plan.step();
            let block = match &mut self.ledger {
                Some(ledger) => ledger.take(block),
                None => block,
            };
            if !self.start(now, block, kind)? {
                break;
            }
        }
        self.ring()
    }

    /// Puts one request on its way, with the last of the idle buffers; `false` where there is no room for it now.
    #[inline]
    fn start(&mut self, now: u64, block: u64, kind: Kind) -> anyhow::Result<bool> {
        let index = *self.idle.last().expect("whoever calls has seen one");
        let buffer = &self.buffers[usize::from(index)..][..1];
        let position = self.plan.position(block);
        if let Some(ledger) = &mut self.ledger {
            match kind {
                Kind::Read => Ledger::spoil(buffer[0].memory()),
                Kind::Write => ledger.fill(block, position, buffer[0].memory()),
            }
        }
        let sector = position / SECTOR;
        let request = match kind {
            Kind::Read => Request::Read { sector, into: buffer },
            Kind::Write => Request::Write { sector, from: buffer },
        };
        match self.queue.submit(request) {
            Ok(id) => {
                self.idle.pop();
                self.by_slot[id.slot()] = index;
                self.flights[usize::from(index)] = Flight { started: now, block, kind };
                Ok(true)
            }
            Err(BlkError::Busy) => bail!(
                "the queue has no room for {} requests: the back-end takes no indirect descriptors, so that a request \
                 needs three; use a longer queue (--queue-size) or a smaller --queue-depth",
                self.buffers.len()
            ),
            Err(error) => Err(error.into()),
        }
    }

    #[inline]
    fn ring(&mut self) -> anyhow::Result<()> {
        if self.queue.publish()? {
            rustix::io::write(self.kick, &1_u64.to_ne_bytes()).context("can't ring the device")?;
        }
        Ok(())
    }

    /// Looks for a while and then sleeps, until the device has used something. May come back early.
    fn wait(&mut self, conductor: &Conductor) -> anyhow::Result<()> {
        self.ring()?;
        if !self.spin.is_zero() {
            let since = Instant::now();
            loop {
                for _ in 0..LOOKS {
                    if self.queue.has_used() {
                        self.lively = since;
                        return Ok(());
                    }
                    std::hint::spin_loop();
                }
                if since.elapsed() >= self.spin {
                    break;
                }
                // The back-end may be waiting for this very processor.
                std::thread::yield_now();
            }
        }
        if !self.queue.listen()? {
            match poll(&mut [PollFd::new(&self.call, PollFlags::IN)], Some(&NAP)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => self.still_lively(conductor)?,
                Ok(_) => {
                    self.lively = Instant::now();
                    let _ = rustix::io::read(self.call, &mut [0; 8]);
                }
                Err(error) => return Err(error).context("can't wait for the device"),
            }
        }
        self.queue.ignore();
        Ok(())
    }

    fn still_lively(&self, conductor: &Conductor) -> anyhow::Result<()> {
        if conductor.phase() == Phase::Abandon {
            bail!("abandoned");
        }
        let under_way = self.buffers.len() - self.idle.len();
        if self.lively.elapsed() > PATIENCE {
            bail!("the back-end has ended none of {under_way} requests for {PATIENCE:?}");
        }
        Ok(())
    }
}
