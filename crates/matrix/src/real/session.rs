//! Many cells, some at a time.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use ringfence_guests::{Cache, Error, QemuSource};
use serde_json::{Map, Value, json};

use super::cell::{Cell, Device};
use super::kit::{Kit, Missing};
use super::run::{self, Booted, Parts};
use super::{expected, verdict};
use crate::proposal::{Agreement, Proposal};
use crate::record::{Observed, Proposed, Record, Says, Source};

/// How to boot.
pub struct Options<'a> {
    /// How many guests run at a time.
    pub jobs: usize,
    /// When to give up on a guest.
    pub timeout: Duration,
    /// Where kernels and QEMUs are kept.
    pub cache: &'a Path,
    /// Where QEMU comes from.
    pub qemu: QemuSource,
    /// This build of `ringfence`, to serve disks.
    pub server: &'a Path,
    /// Drivers that are no part of this program.
    pub programs: &'a Programs,
    /// Where every cell's log goes; without it, those of what fails go to a temporary folder.
    pub keep_logs: Option<&'a Path>,
    /// Set to end every guest and to start no more.
    pub stop: &'a AtomicBool,
}

/// Drivers that are programs of their own, as far as they are there. Each prints what it does to its first serial port, in
/// lines `RINGFENCE key=value`.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    /// A bare program with a driver that does not know the flag.
    pub old_driver: Option<PathBuf>,
    /// A bare program with `ringfence-driver`, which programs a virtio-iommu where there is one.
    pub confined: Option<PathBuf>,
    /// A static program for Linux, with `ringfence-driver` over VFIO.
    pub user_driver: Option<PathBuf>,
}

/// What happens while cells run.
pub enum Event<'a> {
    /// Something slow begins, as a download.
    Slow(&'a str),
    /// A cell begins.
    Begins(&'a Cell),
    /// A cell has ended.
    Ended(&'a Cell, &'a Record),
}

/// Cells that were run.
pub struct Session {
    /// In the order of the table.
    pub records: Vec<Record>,
    /// Where logs are, if there are any.
    pub logs: Option<PathBuf>,
}

impl Session {
    /// Fetches into the folder `cache` what `cells` are made of, for a run that comes later. What can't be had that run
    /// finds out, and says.
    ///
    /// # Errors
    ///
    /// The cache's folder cannot be used.
    pub fn prepare(cells: &[Cell], cache: &Path, qemu: QemuSource, say: &dyn Fn(&str)) -> Result<(), Error> {
        Kit::fetch(&Cache::open(cache, say)?, qemu, &Programs::default(), cells);
        Ok(())
    }

    /// Runs `cells`, and tells `events` from whatever thread it happens in. A cell that cannot be run is in the records,
    /// with what is missing.
    ///
    /// # Errors
    ///
    /// The cache's or the logs' folder cannot be used.
    pub fn run(cells: &[Cell], options: &Options<'_>, events: &(dyn Fn(Event<'_>) + Sync)) -> Result<Self, Error> {
        let say = |line: &str| events(Event::Slow(line));
        let cache = Cache::open(options.cache, &say)?;
        let kit = Kit::fetch(&cache, options.qemu, options.programs, cells);
        let logs = Logs::new(options.keep_logs)?;
        let queue = Mutex::new((0..cells.len()).collect::<VecDeque<_>>());
        let done = Mutex::new(Vec::new());
        let worker = || {
            loop {
                let next = queue.lock().expect("no worker panics").pop_front();
                let Some(index) = next.filter(|_| !options.stop.load(Ordering::Relaxed)) else { break };
                let cell = &cells[index];
                events(Event::Begins(cell));
                let record = one(cell, &kit, options, &logs);
                if options.stop.load(Ordering::Relaxed) {
                    break;
                }
                events(Event::Ended(cell, &record));
                done.lock().expect("no worker panics").push((index, record));
            }
        };
        thread::scope(|scope| {
            for _ in 0..options.jobs.clamp(1, cells.len().max(1)) {
                scope.spawn(worker);
            }
        });
        let mut done = done.into_inner().expect("no worker panics");
        done.sort_by_key(|(index, _)| *index);
        Ok(Self { records: done.into_iter().map(|(_, record)| record).collect(), logs: logs.folder() })
    }
}

/// Runs a cell and writes it down.
fn one(cell: &Cell, kit: &Kit, options: &Options<'_>, logs: &Logs) -> Record {
    let (parts, version) = match parts(cell, kit) {
        Ok(parts) => parts,
        Err(missing) => return skipped(cell, &missing),
    };
    let boot = || run::boot(cell, &parts, options);
    // An emulated processor on a busy machine can hang before it has begun. A guest that cannot begin does so twice.
    let booted = boot().and_then(|first| if first.never_began() { boot() } else { Ok(first) });
    match booted {
        // A guest that was ended early is no observation.
        Ok(_) if options.stop.load(Ordering::Relaxed) => {
            skipped(cell, &Missing { reason: "stopped".into(), tool: true })
        }
        Ok(booted) => observed(cell, &booted, version, logs),
        Err(error) => skipped(cell, &Missing { reason: error.to_string(), tool: error.is_missing_tool() }),
    }
}

/// What a cell is made of, and QEMU's version.
fn parts<'k>(cell: &Cell, kit: &'k Kit) -> Result<(Parts<'k>, &'k str), Missing> {
    let (qemu, version) = kit.qemu(cell)?;
    let storage_daemon = match cell.device {
        Device::StorageDaemon(_) | Device::Wrapped(_) => Some(kit.storage_daemon()?),
        Device::QemuBlk(_) | Device::ServeBlk(..) | Device::Card(_) => None,
    };
    Ok((Parts { qemu, system: kit.system(cell)?, storage_daemon }, version))
}

fn observed(cell: &Cell, booted: &Booted, qemu: &str, logs: &Logs) -> Record {
    let seen = &booted.seen;
    let (verdict, mut why) = verdict::of(seen);
    let flag = seen.flag();
    let agreement = expected::compare(cell, flag, verdict);
    let mut flaws = verdict::flaws(seen, verdict);
    let expected = expected::of(cell);
    match expected {
        Some(expected) if expected.verdict != verdict => flaws.push(format!("'{}' was expected", expected.verdict)),
        Some(expected) if expected.flag != flag => {
            flaws.push(format!("the flag is {}, not {}", flag.slug(), expected.flag.slug()));
        }
        Some(expected) if expected.status.is_some() && expected.status != seen.guest().status => {
            let found = seen.guest().status.as_deref().unwrap_or("not told");
            flaws.push(format!("the device status is {found}, not {}", expected.status.as_deref().unwrap_or_default()));
        }
        Some(_) => {}
        None => flaws.push("nothing is expected of it".to_owned()),
    }
    let reason = match agreement {
        Agreement::Expected(_, known) => Some(&known.why),
        _ => expected.and_then(|expected| expected.why.as_ref()),
    };
    let unexpected = !flaws.is_empty() || matches!(agreement, Agreement::Unexpected(_));
    for line in flaws.iter().chain(reason.filter(|_| flaws.is_empty())) {
        why.push_str(". ");
        why.push_str(line);
    }
    let mut evidence = verdict::evidence(seen);
    evidence.insert("qemu".to_owned(), json!(qemu));
    evidence.insert("date".to_owned(), json!(today()));
    if !flaws.is_empty() {
        evidence.insert("flaws".to_owned(), json!(flaws));
    }
    let mut record = record(cell, Observed::Verdict(verdict), why, evidence);
    record.proposal = proposed(cell, agreement);
    record.agrees = match agreement {
        Agreement::Silent | Agreement::Unsure(_) => None,
        Agreement::Agrees => Some(true),
        Agreement::Expected(..) | Agreement::Unexpected(_) => Some(false),
    };
    record.unexpected = unexpected;
    logs.keep(cell, booted, &mut record);
    record
}

fn proposed(cell: &Cell, agreement: Agreement<'_>) -> Proposed {
    let (says, sentence) = match agreement {
        Agreement::Silent => (Says::Silent, None),
        Agreement::Unsure(sentence) => (Says::Unsure, Some(&sentence.text)),
        Agreement::Expected(sentence, _) | Agreement::Unexpected(sentence) => (Says::Decided, Some(&sentence.text)),
        Agreement::Agrees => (Says::Decided, Proposal::the().about(cell.case()).next().map(|sentence| &sentence.text)),
    };
    Proposed { says, sentence: sentence.cloned() }
}

/// The day in UTC, as in `2026-01-31`.
fn today() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    date(now.as_secs() / 86_400)
}

/// The date of a day by its number, the first of 1970 being 0.
fn date(day: u64) -> String {
    let days_of =
        |year: u64| 365 + u64::from(year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)));
    let (mut year, mut day) = (1970, day);
    while day >= days_of(year) {
        day -= days_of(year);
        year += 1;
    }
    let february = days_of(year) - 337;
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", day + 1)
}

/// A cell that was not run: unexpected, unless the machine lacks a tool.
fn skipped(cell: &Cell, missing: &Missing) -> Record {
    let mut record = record(cell, Observed::Skipped, missing.reason.clone(), Map::new());
    let sentence = Proposal::the().about(cell.case()).next();
    record.proposal.says = match sentence {
        None => Says::Silent,
        Some(sentence) if sentence.is_unsure() => Says::Unsure,
        Some(_) => Says::Decided,
    };
    record.proposal.sentence = sentence.map(|sentence| sentence.text.clone());
    record.unexpected = !missing.tool;
    record
}

fn record(cell: &Cell, observed: Observed, why: String, evidence: Map<String, Value>) -> Record {
    Record {
        platform: cell.platform.name.into(),
        driver: cell.driver.slug().into(),
        device: cell.device.slug().into(),
        source: Source::Real,
        stands_for: Some(cell.stands_for()),
        proposal: Proposed { says: Says::Silent, sentence: None },
        observed,
        agrees: None,
        unexpected: false,
        why,
        evidence,
    }
}

/// Where logs go.
enum Logs {
    /// Every cell's to a folder that was asked for.
    All(PathBuf),
    /// Those of what fails to a folder that is made for the first of them.
    Failed(Mutex<Option<PathBuf>>),
}

impl Logs {
    fn new(folder: Option<&Path>) -> Result<Self, Error> {
        match folder {
            None => Ok(Logs::Failed(Mutex::new(None))),
            Some(folder) => {
                fs::create_dir_all(folder).map_err(Error::file("cannot create", folder))?;
                Ok(Logs::All(folder.to_owned()))
            }
        }
    }

    /// Writes a cell's log if it is one to keep, and says in its evidence where.
    fn keep(&self, cell: &Cell, booted: &Booted, record: &mut Record) {
        let folder = match self {
            Logs::All(folder) => folder.clone(),
            Logs::Failed(_) if !record.unexpected => return,
            Logs::Failed(made) => {
                let mut made = made.lock().expect("no worker panics");
                let new = || Some(tempfile::Builder::new().prefix("ringfence-matrix-").tempdir().ok()?.keep());
                match made.take().or_else(new) {
                    Some(folder) => made.insert(folder).clone(),
                    // The verdict stands without its log.
                    None => return,
                }
            }
        };
        let path = folder.join(format!("{}.log", cell.to_string().replace(' ', "-")));
        if fs::write(&path, &booted.log).is_ok() {
            record.evidence.insert("log".to_owned(), json!(path.display().to_string()));
        }
    }

    fn folder(self) -> Option<PathBuf> {
        match self {
            Logs::All(folder) => Some(folder),
            Logs::Failed(folder) => folder.into_inner().expect("no worker panics"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn days_have_dates() {
        for (day, expected) in [(0, "1970-01-01"), (789, "1972-02-29"), (10_956, "1999-12-31"), (20_787, "2026-11-30")]
        {
            assert_eq!(date(day), expected);
        }
    }
}
