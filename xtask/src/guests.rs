//! Real guests: every platform with the flag off, on and required.

mod cell;
mod kit;

use std::collections::VecDeque;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use ringfence_guests::{Cache, QemuSource, Suite};

use crate::Workspace;
use crate::steps::{Log, Pass, Seconds, StepResult, say};
use cell::{Cell, Places};
use kit::Kit;

/// Which guests to boot, and how.
#[derive(Args, Clone)]
pub(crate) struct GuestArgs {
    /// Only cells whose name contains one of these comma-separated words, as in
    /// `smmuv3,x86-none/require`.
    #[arg(long, value_name = "EXPR")]
    only: Option<String>,
    /// Who serves the disk. The other two tell our mistakes from QEMU's.
    #[arg(long, value_enum, default_value_t)]
    server: Server,
    /// This build of `ringfence`, rather than one made now.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Where QEMU comes from.
    #[arg(long, value_enum, default_value_t)]
    qemu: QemuArg,
    /// How many guests run at a time.
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// When to give up on a guest, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Boots that have to be skipped count as failed.
    #[arg(long)]
    no_skip: bool,
}

impl GuestArgs {
    /// Whether the server has to be built before.
    pub(crate) fn needs_our_server(&self) -> bool {
        self.server == Server::Ringfence && self.binary.is_none()
    }

    /// Where QEMU comes from.
    pub(crate) fn qemu(&self) -> QemuSource {
        self.qemu.into()
    }

    /// Whether what has to be skipped counts as failed.
    pub(crate) fn no_skip(&self) -> bool {
        self.no_skip
    }

    /// The cells that were asked for; an error where no name fits.
    pub(crate) fn cells(&self) -> Result<Vec<Cell>, String> {
        let only = self.only.as_deref();
        let cells: Vec<_> = Cell::all(self.server).filter(|cell| selected(&cell.name(), only)).collect();
        if cells.is_empty() {
            let all: Vec<String> = Cell::all(self.server).map(|cell| cell.name()).collect();
            return Err(format!("--only {} fits none of: {}", only.unwrap_or_default(), all.join(" ")));
        }
        Ok(cells)
    }
}

/// Who serves a guest's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Server {
    /// `ringfence serve blk`.
    #[default]
    Ringfence,
    /// QEMU's own device, in its own process; it cannot require the flag.
    Qemu,
    /// qemu-storage-daemon; it knows no flag.
    StorageDaemon,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum QemuArg {
    /// PATH, else the distribution's by apt, else Debian's newer one unpacked privately.
    #[default]
    Auto,
    /// PATH alone.
    Path,
    /// Debian 12's, unpacked privately.
    Bookworm,
    /// The newer one for Debian 12, unpacked privately.
    BookwormBackports,
    /// Debian's newest, unpacked privately with its own libc.
    Sid,
}

impl From<QemuArg> for QemuSource {
    fn from(arg: QemuArg) -> Self {
        match arg {
            QemuArg::Auto => Self::Auto,
            QemuArg::Path => Self::Path,
            QemuArg::Bookworm => Self::Unpacked(Suite::Bookworm),
            QemuArg::BookwormBackports => Self::Unpacked(Suite::BookwormBackports),
            QemuArg::Sid => Self::Unpacked(Suite::Sid),
        }
    }
}

/// Boots every cell that was asked for. The last line is `N passed, N failed`.
pub(crate) fn run(workspace: &Workspace, args: &GuestArgs, log: &mut Log) -> StepResult {
    let cells = args.cells()?;
    let progress = |line: &str| say(&format!("    {line}"));
    let folder = workspace.target.join("guests");
    let cache = Cache::open(&folder, &progress).map_err(|error| error.to_string())?;
    let kit = match Kit::fetch(&cache, args.qemu(), &cells) {
        Ok(kit) => kit,
        Err(error) if error.is_missing_tool() => return skipped(cells.len(), &error.to_string(), args.no_skip),
        Err(error) => return Err(error.to_string()),
    };
    say(&format!("    QEMU {}", kit.version));
    log.line(format_args!("QEMU {}", kit.version));
    let places = Places {
        server: args.binary.clone().unwrap_or_else(|| workspace.target.join("release/ringfence")),
        logs: logs(workspace)?,
        timeout: Duration::from_secs(args.timeout),
    };
    let (passed, failures) = boot(cells, &kit, &places, args, log);
    say(&format!("{passed} passed, {} failed", failures.len()));
    match failures.is_empty() {
        true => Ok(Pass::Whole(String::new())),
        false => Err(format!("{}; consoles and server logs: {}", failures.join(", "), places.logs.display())),
    }
}

/// Runs the cells, `jobs` at a time; how many passed, and who failed.
fn boot(cells: Vec<Cell>, kit: &Kit, places: &Places, args: &GuestArgs, log: &mut Log) -> (usize, Vec<String>) {
    let total = cells.len();
    let workers = args.jobs.clamp(1, total);
    let queue = Mutex::new(VecDeque::from(cells));
    let ended = Mutex::new((log, Vec::new()));
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no worker panics").pop_front();
                    let Some(cell) = next else { break };
                    let started = Instant::now();
                    let verdict = cell.run(kit, places);
                    let time = Seconds(started.elapsed()).to_string();
                    let (word, text) = match &verdict {
                        Ok(seen) => ("ok", seen),
                        Err(reason) => ("FAILED", reason),
                    };
                    let line = format!("    {word:>6}  {:<28} {time:>7}  {text}", cell.name());
                    let mut ended = ended.lock().expect("no worker panics");
                    say(&line);
                    ended.0.line(&line);
                    ended.1.extend(verdict.err().map(|_| cell.name()));
                }
            });
        }
    });
    let (_, failures) = ended.into_inner().expect("no worker panics");
    (total - failures.len(), failures)
}

/// Says loudly that no guest ran, and why.
fn skipped(cells: usize, reason: &str, no_skip: bool) -> StepResult {
    let rule = "!".repeat(72);
    say(&format!("{rule}\n!! SKIPPED: {cells} boots of real guests. Nothing below was tested with a real kernel."));
    for line in reason.lines() {
        say(&format!("!! {line}"));
    }
    say(&rule);
    say(&format!("0 passed, 0 failed, {cells} skipped"));
    match no_skip {
        true => Err(format!("{cells} boots skipped, and --no-skip was given")),
        false => Ok(Pass::Skipped(format!("{cells} boots of real guests"))),
    }
}

fn selected(name: &str, only: Option<&str>) -> bool {
    only.is_none_or(|only| only.split(',').map(str::trim).any(|word| !word.is_empty() && name.contains(word)))
}

fn logs(workspace: &Workspace) -> Result<PathBuf, String> {
    let logs = workspace.target.join("xtask/guests");
    fs::create_dir_all(&logs).map_err(|error| format!("{}: {error}", logs.display()))?;
    Ok(logs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_choose_cells() {
        assert!(selected("x86-none/off", None));
        assert!(selected("x86-none/off", Some("smmuv3, none/off")));
        assert!(!selected("x86-none/off", Some("none/on")));
        assert!(!selected("x86-none/off", Some("smmuv3,")));
    }
}
