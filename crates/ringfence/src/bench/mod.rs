//! `ringfence bench`: load and latency of any vhost-user-blk back-end.
//!
//! Knows what a user asks for and what he is told. The front-end is [`client`], the inner loop [`load`].

mod client;
mod compare;
mod cpu;
mod job;
mod load;
mod outcome;
mod page;
mod pattern;
mod peers;

use anyhow::Context;
use clap::{Args, ValueEnum};
use client::Watch;
use compare::Comparison;
use indicatif::{ProgressBar, ProgressStyle};
use job::{GRANULE, Job, Mapping, Rw, Shape, size};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::fs::File;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use virtio_spec::F;

/// Load a vhost-user disk, and tell how fast it is and what that costs
///
/// Works with any vhost-user-blk back-end that listens on a socket: ringfence's, qemu-storage-daemon's, others. Writing
/// loads, and --verify, overwrite what is on its disk.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Bench {
    /// The socket that the back-end listens on
    #[arg(short, long, visible_alias = "socket-path", value_name = "PATH", required_unless_present = "compare")]
    socket: Option<PathBuf>,

    /// Compare ringfence with every peer that is installed, over a set of loads
    ///
    /// Starts ringfence, qemu-storage-daemon with each of its aio modes, and SPDK's vhost if it is in PATH, on disks of
    /// their own, one at a time and in turn. What is asked for besides counts for nothing, but for --only, --rounds,
    /// --seconds, --warmup, --format and --output.
    #[arg(long, conflicts_with = "socket")]
    compare: bool,

    /// Only those loads of --compare that have this in their name, such as "keeps nothing", QD32 or IOMMU
    #[arg(long, value_name = "TEXT", requires = "compare")]
    only: Option<String>,

    /// How often --compare goes through everything
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// How memory is lent to the disk
    ///
    /// All but `off` need a back-end that takes part in an IOMMU: it offers VIRTIO_F_ACCESS_PLATFORM and speaks
    /// vhost-user's IOTLB messages.
    #[arg(short, long, value_enum, default_value_t = Mapping::Off)]
    iommu: Mapping,

    /// What to do
    #[arg(long, value_enum, default_value_t = Rw::RandRead)]
    rw: Rw,

    /// How many of a hundred requests of `randrw` are reads
    #[arg(long, visible_alias = "rwmixread", value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    read_percent: u32,

    /// How long each request is: bytes, or with k or M behind it
    #[arg(short, long, visible_alias = "bs", value_name = "SIZE", default_value = "4k", value_parser = block_size)]
    block_size: u64,

    /// How many requests each queue has under way
    #[arg(short = 'd', long, visible_alias = "iodepth", value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=32768))]
    queue_depth: u16,

    /// How many queues, with a thread each
    #[arg(short, long, visible_alias = "numjobs", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,

    /// For how many seconds to measure: 5, or 0.5 each with --compare
    #[arg(short = 't', long, visible_alias = "runtime", value_name = "S", value_parser = seconds)]
    seconds: Option<f64>,

    /// For how many seconds to load before that
    #[arg(long, visible_alias = "ramp-time", value_name = "S", default_value_t = 0.5, value_parser = seconds)]
    warmup: f64,

    /// For how many microseconds a thread looks for completions before it sleeps
    ///
    /// 0 is a client that sleeps, as most guests do: then each completion takes an interrupt.
    #[arg(short, long, value_name = "MICROSECONDS", default_value_t = 50, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    poll: u64,

    /// Work on the first so many bytes of the disk
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,

    /// Write a pattern first, and check everything that is read
    ///
    /// Works on 256 MiB unless --size says otherwise. Checking takes time of the client's.
    #[arg(long)]
    verify: bool,

    /// For how many microseconds to let a miss wait before it is answered, as a slow VMM does
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    miss_delay: u64,

    /// How much one answer to a miss covers: as VMMs have it on x86 and arm64, or more, as with huge pages or on ppc64le
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = granule)]
    granule: u64,

    /// How many descriptors a queue has: 256, or more if the depth needs it
    #[arg(long, value_name = "N", value_parser = queue_size)]
    queue_size: Option<u16>,

    /// Use packed rings where the back-end has them
    #[arg(long)]
    packed: bool,

    /// Use no indirect descriptors: three descriptors of the ring for each request
    #[arg(long)]
    no_indirect: bool,

    /// Use no event indices: ring as long as the other side is not known to look
    #[arg(long)]
    no_event_idx: bool,

    /// How to tell
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,

    /// Where to write it, instead of to standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  ringfence serve blk --socket /tmp/disk.sock --image memory:1G &
  ringfence bench -s /tmp/disk.sock --rw randread -b 4k -d 32 -t 5
  ringfence bench -s /tmp/disk.sock --rw randrw --iommu dynamic --miss-delay 60 --verify
  ringfence bench -s /tmp/disk.sock -d 1 --poll 0      latency, for a client that sleeps
  ringfence bench --compare --format html -o compare.html

Ctrl-C ends a measurement early; what there is until then is told.";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For reading
    Text,
    /// For programs; docs/performance.md describes it
    Json,
    /// A page with plots, of its own
    Html,
}

/// What most VMMs don't offer unless asked to.
const PACKED: u64 = bit(F::RING_PACKED);

const fn bit(feature: F) -> u64 {
    feature.bits().to_ne() as u64
}

fn block_size(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if !bytes.is_multiple_of(512) {
        return Err("a request is whole sectors of 512 bytes".into());
    }
    if bytes > 1 << 30 { Err("a request has 1G at the most".into()) } else { Ok(bytes) }
}

fn granule(text: &str) -> Result<u64, String> {
    match size(text)? {
        bytes if bytes.is_power_of_two() && bytes >= GRANULE => Ok(bytes),
        _ => Err("a power of two from 4k on".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=1e6).contains(&seconds) => Ok(seconds),
        _ => Err("seconds, such as 5 or 0.5".into()),
    }
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (4..=32768).contains(&size) => Ok(size),
        _ => Err("a power of two from 4 to 32768".into()),
    }
}

impl Bench {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let ended = ended_by_signals()?;
        // What can't be written is not worth measuring.
        let output = self.output.as_deref().map(|path| File::options().create(true).append(true).open(path));
        let output = output.transpose().with_context(|| format!("can't write {}", self.output().display()))?;
        let text = match &self.socket {
            Some(socket) => self.measure(socket, &ended)?,
            None => self.compare(&ended)?,
        };
        match output {
            // Only now: what is there of an earlier measurement stays until there is another.
            Some(mut file) => (file.set_len(0).and_then(|()| file.write_all(text.as_bytes())))
                .with_context(|| format!("can't write {}", self.output().display()))?,
            None => stdout().write_all(text.as_bytes()).context("can't write to standard output")?,
        }
        Ok(ExitCode::SUCCESS)
    }

    fn output(&self) -> &Path {
        self.output.as_deref().unwrap_or("standard output".as_ref())
    }

    fn measure(&self, socket: &Path, ended: &AtomicBool) -> anyhow::Result<String> {
        let job = self.job(socket);
        let (depth, room) = (job.shape.queue_depth, job.queue_size);
        anyhow::ensure!(depth <= room, "a queue of {room} descriptors has no room for {depth} requests (--queue-size)");
        let total = Duration::from_secs_f64(job.warmup + job.seconds).as_millis() as u64;
        let bar = ProgressBar::new(total).with_style(style()).with_message(job.shape.to_string());
        let outcome = client::run(&job, &Watch { bar: &bar, ended })
            .with_context(|| format!("measuring the back-end at {}", socket.display()))?;
        bar.finish_and_clear();
        let outcome = outcome.context("ended before there was anything to tell")?;
        Ok(match self.format {
            Format::Text => outcome.to_string(),
            Format::Json => serde_json::to_string_pretty(&outcome)? + "\n",
            Format::Html => outcome.page()?,
        })
    }

    fn compare(&self, ended: &AtomicBool) -> anyhow::Result<String> {
        let seconds = self.seconds.unwrap_or(0.5);
        let bar = ProgressBar::new(0).with_style(style());
        let only = self.only.clone();
        let comparison = Comparison { only, rounds: self.rounds, seconds, warmup: self.warmup.min(seconds) };
        let compared = comparison.run(ended, &bar)?.context("ended before the first round was over")?;
        Ok(match self.format {
            Format::Text => compared.to_string(),
            Format::Json => serde_json::to_string_pretty(&compared)? + "\n",
            Format::Html => compared.page()?,
        })
    }

    fn job(&self, socket: &Path) -> Job {
        let hidden =
            [(!self.packed, PACKED), (self.no_indirect, bit(F::INDIRECT_DESC)), (self.no_event_idx, bit(F::EVENT_IDX))];
        let hidden = hidden.into_iter().filter(|(hide, _)| *hide);
        Job {
            socket: socket.to_owned(),
            shape: Shape {
                rw: self.rw,
                read_percent: self.read_percent,
                block_size: self.block_size,
                queue_depth: self.queue_depth,
                queues: self.queues,
                iommu: self.iommu,
                miss_delay: self.miss_delay,
                granule: self.granule,
            },
            seconds: self.seconds.unwrap_or(5.0),
            warmup: self.warmup,
            poll: Duration::from_micros(self.poll),
            queue_size: self.queue_size.unwrap_or(self.queue_depth.next_power_of_two().max(256)),
            hidden: hidden.map(|(_, feature)| feature).sum(),
            area: self.size,
            verify: self.verify,
        }
    }
}

/// Set by the first SIGINT or SIGTERM; the second ends the process.
fn ended_by_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&ended))?;
        signal_hook::flag::register(signal, Arc::clone(&ended))?;
    }
    Ok(ended)
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} %, {eta} left").expect("a template that is right")
}
