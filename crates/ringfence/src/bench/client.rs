//! The front-end that a back-end is loaded from: memory, an IOMMU if there is one, a driver, and a thread a queue.

use super::cpu::Cpu;
use super::job::{Job, Mapping};
use super::load::{Conductor, Lane, Phase, Plan, Tally};
use super::outcome::{Backend, CpuUse, Latency, Outcome, Traffic};
use super::pattern::Ledger;
use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use ringfence_dma::{Buffer, FrontendVa, Gpa, Mapper};
use ringfence_driver::blk::{Blk, Options, SECTOR};
use ringfence_driver::mapper::{Bounce, Direct, Paged, Premapped};
use ringfence_driver::policy::{DriverPolicy, Identity, Platform, driver_takes};
use ringfence_driver::{Host, StartError};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_iommu::{Domain, Strict, Window};
use ringfence_vhost_user::client::{self, Attachment, Counters, Frontend, FrontendTransport, Lent};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

/// Who sees how far a measurement is, and who may end it early.
pub(super) struct Watch<'w> {
    pub(super) bar: &'w ProgressBar,
    pub(super) ended: &'w AtomicBool,
}

const PAGE: usize = 4096;

/// The virtio device type (§5).
const BLOCK_DEVICE: u32 = 2;

/// The machine that the disk is measured in.
const PLATFORM: Platform = Platform::X86Iommu;
const BEHIND_IOMMU: DriverPolicy<'_> = DriverPolicy::Refusing { allowed: &[] };
const IDENTITY: Identity = Identity { vendor: 0x1af4, device: BLOCK_DEVICE, slot: 0 };

/// What is verified is written first; more of a disk than this would take too long.
const VERIFIED: u64 = 256 << 20;

/// How long a request may be in one piece; longer ones may be cut by the disk's `size_max`.
const ONE_PIECE: u64 = 1 << 16;

/// How often it is looked whether all is well.
const TICK: Duration = Duration::from_millis(20);

/// Loads the back-end as `job` says. `None`: it was ended before there was anything to tell.
pub(super) fn run(job: &Job, watch: &Watch<'_>) -> anyhow::Result<Option<Outcome>> {
    Client::connect(job)?.run(watch)
}

struct Client<'j> {
    job: &'j Job,
    frontend: Arc<Frontend>,
    memory: SharedMemory,
    domain: Option<Arc<Domain>>,
    places: Places,
}

/// Where in memory what is.
struct Places {
    rings: (usize, usize),
    pool: (usize, usize),
    buffers: (usize, usize),
    len: usize,
}

impl Places {
    fn of(job: &Job) -> anyhow::Result<Self> {
        let queues = usize::from(job.shape.queues);
        // A queue's areas, and for each descriptor a request's record with its table.
        let per_descriptor = 32 + if job.shape.block_size > ONE_PIECE { 2048 } else { 192 };
        let ring = (usize::from(job.queue_size) + 8) * per_descriptor + 8 * PAGE;
        let rings = queues * ring.next_multiple_of(PAGE);
        let block = usize::try_from(job.shape.block_size)?.next_multiple_of(PAGE);
        let buffers = block.checked_mul(queues * usize::from(job.shape.queue_depth));
        let buffers = buffers.filter(|&buffers| buffers <= 16 << 30).context("more than 16 GiB of buffers")?;
        let pool = if job.shape.iommu == Mapping::Bounce { rings + buffers } else { 0 };
        Ok(Self {
            rings: (0, rings),
            pool: (rings, pool),
            buffers: (rings + pool, buffers),
            len: rings + pool + buffers,
        })
    }
}

impl<'j> Client<'j> {
    fn connect(job: &'j Job) -> anyhow::Result<Self> {
        let shape = &job.shape;
        let places = Places::of(job)?;
        let memory = SharedMemory::new(places.len).context("can't make memory for the back-end to see")?;
        memory.seal_length()?;
        let base = FrontendVa(memory.slice(0, places.len).as_ptr() as u64);
        let options = client::Options {
            miss_delay: Duration::from_micros(shape.miss_delay),
            granule: shape.granule,
            ..client::Options::default()
        };
        let frontend = Arc::new(Frontend::connect(&job.socket, options)?);
        let placement = Placement { gpa: Gpa(0), frontend_va: base, size: places.len as u64, offset: 0 };
        frontend.set_memory(&[(placement, memory.as_fd())])?;
        let domain = match shape.iommu {
            Mapping::Off => None,
            _ => {
                // Before it is told of any of that: qemu-storage-daemon ends when it is.
                driver_takes(PLATFORM, BEHIND_IOMMU, IDENTITY, frontend.offered(), u64::MAX).map_err(unmeasurable)?;
                Some(frontend.serve_domain(Window::HIGH, base).map_err(unmeasurable)?)
            }
        };
        Ok(Self { job, frontend, memory, domain, places })
    }

    fn run(&self, watch: &Watch<'_>) -> anyhow::Result<Option<Outcome>> {
        let rings = self.buffer(self.places.rings);
        let Some(domain) = &self.domain else { return self.drive(&Direct::new(rings), &|| {}, watch) };
        let strict = Strict::new(Arc::clone(domain), rings);
        match self.job.shape.iommu {
            Mapping::Off => unreachable!("then there is no domain"),
            Mapping::Static => {
                let buffers = [self.buffer(self.places.buffers)];
                self.drive(&Premapped::new(&strict, &buffers, rings)?, &|| {}, watch)
            }
            Mapping::Dynamic => {
                // Those that came back together are invalidated together, and none is looked at before that.
                let paged = Paged::batched(Lent(Arc::clone(domain)), rings, self.job.queue_size.into());
                self.drive(&paged, &|| paged.flush(), watch)
            }
            Mapping::Bounce => {
                let longest = self.job.shape.block_size.max(1 << 20) as usize;
                self.drive(&Bounce::new(&strict, self.buffer(self.places.pool), longest)?, &|| {}, watch)
            }
        }
    }

    /// Loads the disk. `settle` has `mapper` do what it has put off.
    fn drive<M: Mapper + Sync>(
        &self,
        mapper: &M,
        settle: &(dyn Fn() + Sync),
        watch: &Watch<'_>,
    ) -> anyhow::Result<Option<Outcome>> {
        let shape = &self.job.shape;
        let mut disk = self.start(mapper)?;
        let geometry = disk.geometry();
        ensure!(
            shape.rw.reads(shape.read_percent) == 100 && !self.job.verify || !geometry.read_only,
            "the disk is read-only: there is nothing to measure but --rw read and randread, without --verify"
        );
        let size = self.area(geometry.sectors * SECTOR)?;
        let (transport, queues) = disk.split();
        let transport = &*transport;
        let mut lanes = Vec::new();
        for (number, queue) in queues.into_iter().enumerate() {
            let plan = Plan::new(self.job, number as u16, size);
            let ledger = self.job.verify.then(|| Ledger::new(plan.blocks(), shape.block_size, number as u64 + 1));
            let buffers = self.buffers(number);
            let bells = transport.bells(number as u16)?;
            lanes.push(Lane::new(queue, bells, buffers, plan, ledger, settle, self.job.poll));
        }
        let conductor = Conductor::default();
        std::thread::scope(|scope| {
            let conductor = &conductor;
            let threads = lanes.into_iter().enumerate().map(|(number, lane)| {
                let builder = std::thread::Builder::new().name(format!("bench-queue-{number}"));
                builder.spawn_scoped(scope, move || lane.run(conductor)).context("can't start a thread")
            });
            let threads = threads.collect::<anyhow::Result<Vec<_>>>().inspect_err(|_| conductor.say(Phase::Abandon))?;
            let measured = self.conduct(conductor, &threads, watch);
            conductor.say(if measured.is_ok() { Phase::End } else { Phase::Abandon });
            // Of several errors the first that is not a consequence.
            let (mut tally, mut failed) = (Tally::new(), None);
            for thread in threads {
                match thread.join().expect("a queue's thread panicked") {
                    Ok(one) => tally.add(&one),
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            match (measured, failed) {
                (Ok(None), None) => Ok(None),
                (Ok(Some(window)), None) => Ok(Some(self.outcome(&window, &tally))),
                (Err(error), _) | (_, Some(error)) => Err(error),
            }
        })
    }

    /// Says what is to be done when; what passed while it was measured. `None`: ended before.
    fn conduct(
        &self,
        conductor: &Conductor,
        threads: &[ScopedJoinHandle<'_, anyhow::Result<Tally>>],
        watch: &Watch<'_>,
    ) -> anyhow::Result<Option<Passed>> {
        let server = self.frontend.backend_process();
        let well = || {
            if let Some(broken) = self.frontend.iotlb_failure() {
                bail!("misses are not answered any more: {broken}");
            }
            if threads.iter().any(ScopedJoinHandle::is_finished) {
                return Ok(false);
            }
            if watch.ended.load(Ordering::Relaxed) {
                return Ok(false);
            }
            ensure!(self.frontend.is_connected(), "the back-end closed the connection; look at its log");
            Ok(true)
        };
        let pass = |seconds: f64| -> anyhow::Result<bool> {
            let until = Instant::now() + Duration::from_secs_f64(seconds);
            loop {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() || !well()? {
                    return Ok(left.is_zero());
                }
                std::thread::sleep(left.min(TICK));
                watch.bar.inc(left.min(TICK).as_millis() as u64);
            }
        };
        while conductor.filled() < threads.len() {
            if !well()? {
                return Ok(None);
            }
            std::thread::sleep(TICK / 10);
        }
        conductor.say(Phase::WarmUp);
        if !pass(self.job.warmup)? {
            return Ok(None);
        }
        conductor.say(Phase::Measure);
        let (began, cpu, counters) = (Instant::now(), Cpu::now(server), self.frontend.counters());
        // Ended early is ended all the same.
        pass(self.job.seconds)?;
        Ok(Some(Passed {
            lasted: began.elapsed(),
            cpu: Cpu::now(server).since(cpu),
            traffic: since(self.frontend.counters(), counters),
        }))
    }

    fn outcome(&self, window: &Passed, tally: &Tally) -> Outcome {
        let shape = self.job.shape;
        let requests = tally.latency.len();
        let seconds = window.lasted.as_secs_f64();
        let per_request = |time: Duration| time.as_nanos() as f64 / requests.max(1) as f64;
        let Cpu { client, server } = window.cpu;
        let pid = self.frontend.backend_process();
        let program = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok());
        Outcome {
            shape,
            backend: Backend { pid, program: program.map(|name| name.trim_end().to_owned()) },
            seconds,
            requests,
            iops: requests as f64 / seconds,
            bytes_per_second: requests as f64 * shape.block_size as f64 / seconds,
            latency: Latency::of(&tally.latency),
            cpu: CpuUse {
                client_per_request: per_request(client),
                server_per_request: server.map(per_request),
                client_processors: client.as_secs_f64() / seconds,
                server_processors: server.map(|server| server.as_secs_f64() / seconds),
            },
            iotlb: window.traffic,
            verified: self.job.verify.then_some(tally.verified),
        }
    }

    fn start<'a, M: Mapper>(&'a self, mapper: &'a M) -> anyhow::Result<Blk<'a, FrontendTransport, M>> {
        let shape = &self.job.shape;
        let (policy, physical, translated) = match shape.iommu {
            Mapping::Off => (DriverPolicy::Old, Some(mapper), None),
            _ => (BEHIND_IOMMU, None, Some(mapper)),
        };
        let host = Host { platform: PLATFORM, policy, physical, translated };
        let attachment = Attachment {
            device: BLOCK_DEVICE,
            queue_size: self.job.queue_size,
            gpa: Gpa(0),
            frontend_va: FrontendVa(self.memory.slice(0, self.places.len).as_ptr() as u64),
            patience: Duration::from_secs(10),
        };
        let transport = FrontendTransport::new(Arc::clone(&self.frontend), attachment).without(self.job.hidden);
        let segments = if shape.block_size > ONE_PIECE { 64 } else { 1 };
        let options = Options { depth: self.job.queue_size, segments };
        Blk::start_queues(transport, host, options, shape.queues).map_err(|error| match (&error, shape.iommu) {
            (StartError::NoQueue { queue }, _) => {
                anyhow::anyhow!("the back-end has {queue} queues, and {} are asked for (--queues)", shape.queues)
            }
            (StartError::FeaturesRefused { .. }, Mapping::Off) => {
                anyhow::Error::from(error).context("the back-end wants an IOMMU: try --iommu static")
            }
            _ => error.into(),
        })
    }

    /// How many bytes of a disk of `size` to work on.
    fn area(&self, size: u64) -> anyhow::Result<u64> {
        let Job { shape, area, verify, .. } = self.job;
        let wanted = area.unwrap_or(if *verify { VERIFIED.min(size) } else { size });
        ensure!(wanted <= size, "--size is {wanted} bytes, and the disk has {size}");
        let needed = shape.block_size * u64::from(shape.queues) * (u64::from(shape.queue_depth) + 1);
        ensure!(
            wanted >= needed,
            "{wanted} bytes are too few for {} queues of {} requests of {} bytes, each with a block of its own",
            shape.queues,
            shape.queue_depth,
            shape.block_size
        );
        Ok(wanted)
    }

    fn buffer(&self, (offset, len): (usize, usize)) -> Buffer<'_> {
        Buffer::new(self.memory.slice(offset, len), Gpa(offset as u64))
    }

    /// Those of one queue, filled with what does not compress.
    fn buffers(&self, queue: usize) -> Vec<Buffer<'_>> {
        let depth = usize::from(self.job.shape.queue_depth);
        let len = self.job.shape.block_size as usize;
        let all = self.buffer(self.places.buffers);
        let mut state = queue as u64 + 1;
        (0..depth)
            .map(|number| {
                let buffer = all.sub((queue * depth + number) * len.next_multiple_of(PAGE), len);
                for at in (0..len).step_by(8) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    buffer.memory().store_u64(at, state ^ state >> 31, Ordering::Relaxed);
                }
                buffer
            })
            .collect()
    }
}

/// What passed while it was measured.
struct Passed {
    lasted: Duration,
    cpu: Cpu,
    traffic: Traffic,
}

fn since(now: Counters, then: Counters) -> Traffic {
    Traffic {
        misses: now.misses - then.misses,
        updates: now.updates - then.updates,
        invalidations: now.invalidations - then.invalidations,
    }
}

/// A back-end that no IOMMU can talk to.
fn unmeasurable(error: impl Into<anyhow::Error>) -> anyhow::Error {
    error.into().context("the back-end can't be measured behind an IOMMU; --iommu off measures it without")
}
