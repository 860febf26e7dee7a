//! Real guests: the real cells of the matrix, run and judged by the command that everybody else uses.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use clap::Args;
use ringfence_matrix::Select;
use ringfence_matrix::real::Cell;

use crate::Workspace;
use crate::steps::{Log, Pass, StepResult, say};

/// What every run boots, for want of time: our own server's disk on each platform, and with the interface from before the
/// standard on two; in each of its modes on three, and past another architecture's IOMMU; qemu-storage-daemon behind
/// `ringfence wrap`; and cards with the flag and without. The rest, QEMU's own devices, and the guest whose memory is
/// damaged (what it dies of is never the same twice) are for `cargo xtask guests --only ''`.
const BY_DEFAULT: &str = "device=serve-blk-offer driver!=linux-legacy; \
                          device=serve-blk-offer driver=linux-legacy platform=x86-none|arm64-smmuv3-lazy; \
                          device=serve-blk-off|serve-blk-require platform=x86-none|x86-intel-strict|x86-virtio-iommu; \
                          device=serve-blk-off driver=linux platform=arm64-smmuv3-lazy; \
                          device=wrapped-storage-daemon-require platform=x86-intel-lazy|x86-virtio-iommu|arm64-smmuv3-lazy; \
                          device=vfio-user-of*; \
                          device=serve-blk-offer-request";

/// Which guests to boot, and how: handed on to `ringfence matrix --real`.
#[derive(Args, Clone)]
pub(crate) struct GuestArgs {
    /// Only these cells, as in 'platform=x86* device=serve-blk-require'; '' for every one.
    #[arg(long, value_name = "EXPR", default_value = BY_DEFAULT)]
    only: Select,
    /// This build of `ringfence`, rather than one made now.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Where QEMU comes from: auto, path, bookworm, bookworm-backports or sid.
    #[arg(long, value_name = "SOURCE", default_value = "auto")]
    qemu: String,
    /// How many guests run at a time.
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// When to give up on a guest, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    timeout: u64,
    /// Guests that have to be skipped count as failed.
    #[arg(long)]
    no_skip: bool,
}

impl GuestArgs {
    /// The cells that an old driver is in.
    pub(crate) fn old_driver() -> Self {
        let only = "driver=virtio-drivers".parse().expect("a selection that a test has parsed");
        Self { only, binary: None, qemu: "auto".to_owned(), jobs: 2, timeout: 180, no_skip: true }
    }

    /// Whether guests that have to be skipped count as failed.
    pub(crate) fn no_skip(&self) -> bool {
        self.no_skip
    }

    /// Whether QEMU may come from wherever it is.
    pub(crate) fn takes_any_qemu(&self) -> bool {
        self.qemu == "auto"
    }

    /// Whether the server has to be built before.
    pub(crate) fn needs_our_server(&self) -> bool {
        self.binary.is_none()
    }

    /// The cells that were asked for; an error where there are none.
    pub(crate) fn cells(&self) -> Result<Vec<Cell>, String> {
        let cells = Cell::selected(&self.only);
        if cells.is_empty() { Err(format!("--only '{}' leaves no cell", self.only)) } else { Ok(cells) }
    }

    fn matrix(&self, workspace: &Workspace) -> Command {
        let program = self.binary.clone().unwrap_or_else(|| workspace.ringfence());
        let mut command = Command::new(program);
        let real = "source=real".parse().expect("a key and a name that there are");
        command.args(["matrix", "--real", "--only", &self.only.and(&real).to_string()]);
        command.args(["--qemu", &self.qemu, "--timeout", &self.timeout.to_string()]);
        command.args(["--jobs", &self.jobs.to_string()]);
        if self.no_skip {
            command.arg("--no-skip");
        }
        command.stdin(Stdio::null());
        command
    }
}

/// Boots every cell that was asked for. How far it is goes to standard error, and the table to the step's log.
pub(crate) fn run(workspace: &Workspace, args: &GuestArgs, log: &mut Log) -> StepResult {
    let logs = workspace.target.join("xtask/guests");
    let length = log.length();
    let mut command = args.matrix(workspace);
    command.arg("--keep-logs").arg(&logs);
    let told = |error| format!("{error}; consoles and server logs: {}", logs.display());
    log.run_aloud(&mut command).map_err(told)?;
    let table = log.since(length);
    let counts = table.lines().rev().find(|line| line.contains(" real cells")).unwrap_or_default().to_owned();
    match counts.contains(" skipped") {
        false => Ok(Pass::Whole(counts)),
        true => {
            let rule = "!".repeat(72);
            say(&format!("{rule}\n!! SKIPPED: some real guests. What they would show was not tested."));
            table.lines().filter(|line| line.contains(" skipped ")).for_each(|line| say(&format!("!! {line}")));
            say(&rule);
            Ok(Pass::Skipped(counts))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_booted_by_default_is_every_platform_and_an_old_driver() {
        assert!(!GuestArgs::old_driver().cells().unwrap().is_empty());
        let all = Cell::all();
        let by_default = Cell::selected(&BY_DEFAULT.parse().unwrap());
        for cell in all {
            assert!(by_default.iter().any(|booted| booted.platform == cell.platform), "{cell}");
            assert!(by_default.iter().any(|booted| booted.driver == cell.driver), "{cell}");
        }
    }
}
