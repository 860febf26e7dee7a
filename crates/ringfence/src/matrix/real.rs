//! `ringfence matrix --real`: what it needs, and how far it is.

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ringfence_matrix::real::{Cell, Event, Options, Programs, QemuSource, Session, Suite};
use ringfence_matrix::record::{Observed, Record};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The exit status after Ctrl-C: 128 and SIGINT's number.
pub(super) const STOPPED: u8 = 130;

/// Drivers that are looked for beside this program. A program that cargo leaves there by the last one's own name is not
/// static.
const OLD_DRIVER: &str = "ringfence-old-driver";
const CONFINED: &str = "ringfence-confined";
const USER_DRIVER: &str = "ringfence-user-driver-static";

#[derive(clap::Args)]
pub(super) struct Args {
    /// Also boot real kernels in QEMU, and tell both tables
    ///
    /// Debian's kernels, busybox and Xen, and a QEMU where PATH has none, are fetched on first use, about 1 GB, and kept
    /// in target/guests of a checkout, else in $XDG_CACHE_HOME/ringfence/guests. What cannot be had is named, and its
    /// cells are skipped. Needs no root; as root, a missing QEMU is installed by apt where no package that is there has
    /// to change.
    #[arg(long, help_heading = "Real guests")]
    pub(super) real: bool,
    /// How many guests run at a time
    #[arg(long, value_name = "N", default_value_t = 2, requires = "real", help_heading = "Real guests")]
    jobs: usize,
    /// Keep every guest's log in DIR; without it, those of unexpected cells are kept in a temporary folder
    #[arg(long, value_name = "DIR", requires = "real", help_heading = "Real guests")]
    keep_logs: Option<PathBuf>,
    /// When to give up on a guest
    #[arg(long, value_name = "SECONDS", default_value_t = 180, requires = "real", help_heading = "Real guests")]
    timeout: u64,
    /// Where QEMU comes from
    #[arg(long, value_enum, default_value_t, requires = "real", help_heading = "Real guests")]
    qemu: Qemu,
    /// A bare program with a driver that does not know the flag, for QEMU's -kernel
    ///
    /// It prints what it does to the first serial port, in lines `RINGFENCE key=value`. By default `ringfence-old-driver`
    /// beside this program, if it is there.
    #[arg(long, value_name = "PATH", requires = "real", help_heading = "Real guests")]
    old_driver: Option<PathBuf>,
    /// A bare program with drivers of ours, for QEMU's -kernel
    ///
    /// By default `ringfence-confined` beside this program, if it is there: `cargo xtask confined` leaves it.
    #[arg(long, value_name = "PATH", requires = "real", help_heading = "Real guests")]
    confined: Option<PathBuf>,
    /// A static program with drivers of ours that Linux gives a disk by VFIO
    ///
    /// By default `ringfence-user-driver-static` beside this program, if it is there: `cargo xtask vfio` leaves it.
    #[arg(long, value_name = "PATH", requires = "real", help_heading = "Real guests")]
    user_driver: Option<PathBuf>,
    /// A cell that has to be skipped is a failure
    #[arg(long, requires = "real", help_heading = "Real guests")]
    no_skip: bool,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Qemu {
    /// PATH, else the distribution's by apt, else Debian's newer one unpacked privately
    #[default]
    Auto,
    /// PATH alone
    Path,
    /// Debian 12's, unpacked privately
    Bookworm,
    /// The newer one for Debian 12, unpacked privately
    BookwormBackports,
    /// Debian's newest, unpacked privately with its own libc
    Sid,
}

impl Args {
    /// Runs the cells; fewer come back after Ctrl-C.
    pub(super) fn run(&self, cells: &[Cell]) -> anyhow::Result<Vec<Record>> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // The second time ends us at once.
            signal_hook::flag::register_conditional_shutdown(signal, i32::from(STOPPED), Arc::clone(&stop))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
                .context("can't wait for Ctrl-C")?;
        }
        let this = env::current_exe().context("can't find this program, which serves the disks")?;
        let program = |named: &Option<PathBuf>, name| {
            named.clone().or_else(|| Some(this.with_file_name(name)).filter(|path| path.exists()))
        };
        let programs = Programs {
            old_driver: program(&self.old_driver, OLD_DRIVER),
            confined: program(&self.confined, CONFINED),
            user_driver: program(&self.user_driver, USER_DRIVER),
        };
        let cache = cache(&this);
        let options = Options {
            jobs: self.jobs,
            timeout: Duration::from_secs(self.timeout),
            cache: &cache,
            qemu: self.qemu.into(),
            server: &this,
            programs: &programs,
            keep_logs: self.keep_logs.as_deref(),
            stop: &stop,
        };
        let progress = Progress::new(cells.len());
        let session = Session::run(cells, &options, &|event| progress.tell(event));
        progress.bar.finish_and_clear();
        let session = session?;
        if let Some(logs) = &session.logs {
            eprintln!("logs: {}", logs.display());
        }
        Ok(session.records)
    }

    /// How many cells were skipped that should not have been.
    pub(super) fn refuses_to_skip(&self, records: &[Record]) -> usize {
        match self.no_skip {
            true => records.iter().filter(|record| record.observed == Observed::Skipped && !record.unexpected).count(),
            false => 0,
        }
    }
}

/// Where kernels and QEMUs are kept: in the checkout that this program was built in, else where the user keeps such things.
fn cache(this: &Path) -> PathBuf {
    let folder = this.parent().and_then(Path::parent).unwrap_or(this);
    // Cargo leaves that in its folder.
    if folder.join(".rustc_info.json").exists() {
        return folder.join("guests");
    }
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let absolute = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    absolute.or_else(home).unwrap_or_else(env::temp_dir).join("ringfence/guests")
}

/// A bar on a terminal, else a line for each cell.
struct Progress {
    bar: ProgressBar,
    running: Mutex<BTreeSet<String>>,
}

impl Progress {
    fn new(cells: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(cells as u64), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {elapsed} {wide_msg}");
        bar.set_style(style.expect("a template that a test has used"));
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, running: Mutex::new(BTreeSet::new()) }
    }

    fn tell(&self, event: Event<'_>) {
        match event {
            Event::Slow(line) => self.line(line),
            Event::Begins(cell) => self.change(|running| {
                running.insert(cell.to_string());
            }),
            Event::Ended(cell, record) => {
                self.change(|running| {
                    running.remove(&cell.to_string());
                });
                self.bar.inc(1);
                self.line(&line(cell, record));
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut BTreeSet<String>)) {
        let mut running = self.running.lock().expect("nobody panics with it");
        change(&mut running);
        self.bar.set_message(running.iter().cloned().collect::<Vec<_>>().join(", "));
    }

    fn line(&self, line: &str) {
        match self.bar.is_hidden() {
            true => eprintln!("{line}"),
            false => self.bar.println(line),
        }
    }
}

/// What came of a cell, in a line.
fn line(cell: &Cell, record: &Record) -> String {
    let observed = record.observed;
    let seconds = record.evidence.get("seconds").and_then(|seconds| seconds.as_str()).unwrap_or("–");
    let mark = if record.unexpected { "UNEXPECTED " } else { "" };
    let why = record.why.lines().next().unwrap_or_default();
    format!("{seconds:>6} s  {cell:56} {observed:29} {mark}{why}")
}

impl From<Qemu> for QemuSource {
    fn from(qemu: Qemu) -> Self {
        match qemu {
            Qemu::Auto => Self::Auto,
            Qemu::Path => Self::Path,
            Qemu::Bookworm => Self::Unpacked(Suite::Bookworm),
            Qemu::Sid => Self::Unpacked(Suite::Sid),
            Qemu::BookwormBackports => Self::Unpacked(Suite::BookwormBackports),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_the_checkouts_or_the_users() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("release/ringfence");
        assert!(cache(&program).ends_with("ringfence/guests"));
        std::fs::write(folder.path().join(".rustc_info.json"), "").unwrap();
        assert_eq!(cache(&program), folder.path().join("guests"));
    }

    #[test]
    fn a_bar_can_be_drawn() {
        Progress::new(3).tell(Event::Slow("fetching"));
    }
}
