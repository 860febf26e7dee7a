//! `ringfence bench --compare`: a named set of loads against our server and every peer that is installed.
//!
//! A machine is never twice the same, so nothing is compared that was not measured within the same seconds: each round
//! goes through all peers, and what is told is the median of the rounds' ratios.

use super::client::{self, Watch};
use super::job::{GRANULE, Job, Mapping, Rw, Shape};
use super::outcome::{Count, Outcome, Time};
use super::peers::{self, Disk, Peer, SIZE};
use anyhow::{Context, ensure};
use indicatif::ProgressBar;
use serde::Serialize;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// One load, and what it is to show.
struct Experiment {
    group: &'static str,
    disk: Disk,
    shape: Shape,
    poll: Duration,
    /// Who takes part besides ours.
    peers: Peers,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Peers {
    All,
    /// Nobody else can do it.
    None,
}

/// What is to be measured, and for how long.
pub(super) struct Comparison {
    /// Only loads whose name or group has this in it.
    pub(super) only: Option<String>,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    pub(super) warmup: f64,
}

/// All that was measured. As JSON it is described in docs/performance.md.
#[derive(Debug, Serialize)]
pub(super) struct Compared {
    pub(super) schema: u32,
    pub(super) version: &'static str,
    pub(super) processors: usize,
    pub(super) rows: Vec<Row>,
    /// Peers that could not be measured, and why.
    pub(super) absent: Vec<String>,
}

/// One load of one program.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) group: &'static str,
    pub(super) load: String,
    pub(super) subject: String,
    /// Medians over the rounds.
    pub(super) iops: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) server_cpu: Option<f64>,
    /// How many times as many requests as the first of the same load and group has: the median of the rounds' ratios.
    pub(super) ratio: f64,
    pub(super) rounds: Vec<Outcome>,
}

/// What nobody but us does: the loads differ in how memory is mapped alone.
pub(super) const IOMMU: &str = "What the IOMMU costs";

fn experiments() -> Vec<Experiment> {
    const SPIN: Duration = Duration::from_micros(50);
    let shape = |rw, kib: u64, queue_depth| Shape {
        rw,
        read_percent: 50,
        block_size: kib << 10,
        queue_depth,
        queues: 1,
        iommu: Mapping::Off,
        miss_delay: 0,
        granule: GRANULE,
    };
    let all = |group, disk, poll, shape| Experiment { group, disk, shape, poll, peers: Peers::All };
    let mut set = Vec::new();
    for depth in [1, 32, 128] {
        set.push(all("A disk that keeps nothing", Disk::Null, SPIN, shape(Rw::RandRead, 4, depth)));
    }
    set.push(all("A client that sleeps", Disk::Null, Duration::ZERO, shape(Rw::RandRead, 4, 1)));
    set.push(all("A client that sleeps", Disk::Null, Duration::ZERO, shape(Rw::RandRead, 4, 32)));
    for (rw, kib, depth) in [(Rw::RandRead, 4, 32), (Rw::RandWrite, 4, 32), (Rw::Read, 128, 16), (Rw::Write, 128, 16)] {
        set.push(all("A file in memory", Disk::File, SPIN, shape(rw, kib, depth)));
    }
    for rw in [Rw::RandRead, Rw::RandWrite] {
        set.push(all("A disk in memory", Disk::Memory, SPIN, shape(rw, 4, 32)));
    }
    for kib in [4, 64] {
        for (iommu, miss_delay) in [
            (Mapping::Off, 0),
            (Mapping::Static, 0),
            (Mapping::Bounce, 0),
            (Mapping::Dynamic, 0),
            (Mapping::Dynamic, 60),
        ] {
            let shape = Shape { iommu, miss_delay, ..shape(Rw::RandRead, kib, 32) };
            set.push(Experiment { group: IOMMU, disk: Disk::File, shape, poll: SPIN, peers: Peers::None });
        }
    }
    set
}

impl Row {
    /// Of mappings all are ours.
    pub(super) fn is_ours(&self) -> bool {
        self.subject == Peer::Ringfence.name() || self.group == IOMMU
    }
}

impl Experiment {
    /// What it is called among those of its group.
    fn load(&self) -> String {
        let Shape { rw, block_size, queue_depth, .. } = self.shape;
        format!("{rw} {} KiB, QD{queue_depth}", block_size >> 10)
    }

    fn is_named(&self, part: &str) -> bool {
        format!("{}: {}", self.group, self.load()).to_lowercase().contains(&part.to_lowercase())
    }
}

impl Comparison {
    /// `None`: ended before the first round was over.
    pub(super) fn run(&self, ended: &AtomicBool, bar: &ProgressBar) -> anyhow::Result<Option<Compared>> {
        let folder = tempfile::tempdir().context("can't make a folder for sockets")?;
        let image = image(folder.path())?;
        let mut set = experiments();
        set.retain(|experiment| self.only.as_ref().is_none_or(|part| experiment.is_named(part)));
        ensure!(!set.is_empty(), "no load has that in its name; without --only all are run, and named");
        let absent = peers::absent();
        ensure!(
            peers::any() || set.iter().all(|experiment| experiment.peers == Peers::None),
            "there is nobody to compare with: {}. What the IOMMU costs is shown without by --only IOMMU",
            absent.join("; ")
        );
        let mut subjects = Vec::new();
        for experiment in &set {
            let peers = match experiment.peers {
                Peers::All => experiment.disk.peers(),
                Peers::None => vec![Peer::Ringfence],
            };
            subjects.extend(peers.into_iter().map(|peer| (experiment, peer, Vec::<Outcome>::new())));
        }
        bar.set_length(subjects.len() as u64 * u64::from(self.rounds));
        let mut absent = absent;
        let mut whole = 0;
        'rounds: for _ in 0..self.rounds {
            for (experiment, peer, outcomes) in &mut subjects {
                bar.inc(1);
                bar.set_message(format!("{}: {}", peer.name(), experiment.shape));
                match self.measure(experiment, *peer, folder.path(), image.path(), ended) {
                    Ok(Some(outcome)) => outcomes.push(outcome),
                    Ok(None) => {}
                    Err(error) if *peer != Peer::Ringfence => {
                        let why = format!("{}: {error:#}", peer.name());
                        if !absent.contains(&why) {
                            absent.push(why);
                        }
                    }
                    Err(error) => return Err(error).with_context(|| experiment.shape.to_string()),
                }
                if ended.load(Ordering::Relaxed) {
                    break 'rounds;
                }
            }
            whole += 1;
        }
        bar.finish_and_clear();
        // Of a round that was ended nothing is told: it has no ratios.
        subjects.iter_mut().for_each(|(_, _, outcomes)| outcomes.truncate(whole));
        subjects.retain(|(_, _, outcomes)| outcomes.len() == whole && whole > 0);
        if subjects.is_empty() {
            return Ok(None);
        }
        let mut rows: Vec<Row> = Vec::new();
        for (experiment, peer, outcomes) in subjects {
            let row = row(experiment, peer, outcomes, &rows);
            rows.push(row);
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Some(Compared { schema: 1, version: env!("CARGO_PKG_VERSION"), processors, rows, absent }))
    }

    fn measure(
        &self,
        experiment: &Experiment,
        peer: Peer,
        folder: &Path,
        image: &Path,
        ended: &AtomicBool,
    ) -> anyhow::Result<Option<Outcome>> {
        let serving = peer.serve(experiment.disk, folder, image)?;
        let job = Job {
            socket: serving.socket.clone(),
            shape: experiment.shape,
            seconds: self.seconds,
            warmup: self.warmup,
            poll: experiment.poll,
            queue_size: 256,
            // As VMMs have it.
            hidden: super::PACKED,
            area: Some(SIZE),
            verify: false,
        };
        let watch = Watch { bar: &ProgressBar::hidden(), ended };
        if experiment.disk != Disk::Null {
            // What was never touched is not there yet: memory, and the pages of a file that is mapped.
            let fill = Shape { rw: Rw::Write, block_size: 64 << 10, queue_depth: 8, ..experiment.shape };
            let all = Job { shape: fill, seconds: 0.0, warmup: 0.0, verify: true, ..job.clone() };
            client::run(&all, &watch)?;
        }
        client::run(&job, &watch)
    }
}

/// A raw file full of something, in memory where that can be had.
fn image(folder: &Path) -> anyhow::Result<tempfile::NamedTempFile> {
    let in_memory = tempfile::NamedTempFile::new_in("/dev/shm");
    let mut file = in_memory.or_else(|_| tempfile::NamedTempFile::new_in(folder)).context("can't make an image")?;
    let block: Vec<u8> = (0..1_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for _ in 0..SIZE >> 20 {
        file.write_all(&block).context("can't fill an image")?;
    }
    file.flush()?;
    let _: &File = file.as_file();
    Ok(file)
}

fn row(experiment: &Experiment, peer: Peer, rounds: Vec<Outcome>, before: &[Row]) -> Row {
    let (group, load) = (experiment.group, experiment.load());
    let subject = match (group, experiment.shape) {
        // One program, and loads that differ in the mapping.
        (IOMMU, Shape { iommu, miss_delay: 0, .. }) => iommu.to_string(),
        (IOMMU, Shape { iommu, miss_delay, .. }) => format!("{iommu}, {miss_delay} µs a miss"),
        _ => peer.name(),
    };
    let first = before.iter().find(|row| row.group == group && row.load == load);
    let ratio = match first {
        Some(first) => median(rounds.iter().zip(&first.rounds).map(|(this, first)| this.iops / first.iops.max(1.0))),
        None => 1.0,
    };
    let of = |value: fn(&Outcome) -> f64| median(rounds.iter().map(value));
    let known = rounds.iter().all(|outcome| outcome.cpu.server_per_request.is_some());
    Row {
        group,
        load,
        subject,
        iops: of(|outcome| outcome.iops),
        p50: of(|outcome| outcome.latency.p50 as f64),
        p99: of(|outcome| outcome.latency.p99 as f64),
        server_cpu: known.then(|| of(|outcome| outcome.cpu.server_per_request.unwrap_or_default())),
        ratio,
        rounds,
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => (values[len / 2 - 1] + values[len / 2]) / 2.0,
    }
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = ("", "");
        for row in &self.rows {
            let Row { group, load, subject, iops, p50, p99, server_cpu, ratio, .. } = row;
            if last.0 != *group {
                let head = ["IOPS", "ratio", "50 %", "99 %", "CPU"];
                writeln!(f, "{group:46}{:>9}{:>8}{:>10}{:>10}{:>10}", head[0], head[1], head[2], head[3], head[4])?;
            }
            if last != (*group, load) {
                writeln!(f, "  {load}")?;
            }
            last = (group, load);
            let cpu = server_cpu.map_or("?".to_owned(), |time| Time(time).to_string());
            let (iops, p50, p99) = (Count(*iops).to_string(), Time(*p50).to_string(), Time(*p99).to_string());
            writeln!(f, "    {subject:42}{iops:>9}{ratio:>8.2}{p50:>10}{p99:>10}{cpu:>10}")?;
        }
        for why in &self.absent {
            writeln!(f, "not measured: {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert!(median(std::iter::empty()).is_nan());
    }

    #[test]
    fn loads_of_one_group_are_told_apart() {
        for (at, one) in experiments().iter().enumerate() {
            let same = |other: &&Experiment| (other.group, other.shape, other.poll) == (one.group, one.shape, one.poll);
            assert_eq!(experiments().iter().position(|other| same(&other)), Some(at), "{}", one.shape);
        }
    }
}
