//! What guests are made of, fetched before the first of them boots.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ringfence_guests::{
    Arch, Cache, Error, Hypervisor, Kernel, KernelSeries, Qemu, QemuSource, StorageDaemon, Suite, System,
};

use super::cell::{Cell, Device, Driver, Program, Runs};
use super::session::Programs;

/// Why a cell cannot be executed.
#[derive(Clone, Debug)]
pub(crate) struct Missing {
    pub(crate) reason: String,
    /// Whether the machine lacks a tool, rather than that something went wrong.
    pub(crate) tool: bool,
}

type Part<T> = Result<T, Missing>;

/// Each part of the cells' machines, or why it is not there.
pub(crate) struct Kit {
    qemus: BTreeMap<Arch, Part<(Qemu, String)>>,
    /// One that takes functions of other processes, where a cell has such a one.
    with_cards: Option<Part<(Qemu, String)>>,
    kernels: BTreeMap<(KernelSeries, Arch), Part<Kernel>>,
    busyboxes: BTreeMap<Arch, Part<PathBuf>>,
    xen: Option<Part<PathBuf>>,
    storage_daemon: Option<Part<StorageDaemon>>,
    programs: Programs,
}

impl Kit {
    /// Fetches for `cells` what is not in the cache.
    pub(crate) fn fetch(cache: &Cache<'_>, source: QemuSource, programs: &Programs, cells: &[Cell]) -> Self {
        let arches: BTreeSet<Arch> = cells.iter().map(|cell| cell.platform.arch).collect();
        let series = |runs: fn(Runs) -> bool| -> BTreeSet<_> {
            let cells = cells.iter().filter(|cell| runs(cell.runs()));
            cells.map(|cell| (cell.platform.kernel, cell.platform.arch)).collect()
        };
        let linux = series(|runs| !matches!(runs, Runs::Bare(_)));
        let shell = series(|runs| runs == Runs::Linux);
        let xen = cells.iter().any(|cell| cell.platform.hypervisor == Hypervisor::Xen);
        let cards = cells.iter().any(|cell| matches!(cell.device, Device::Card(_)));
        let daemon = cells.iter().any(|cell| matches!(cell.device, Device::StorageDaemon(_) | Device::Wrapped(_)));
        Self {
            qemus: qemus(cache, source, &arches),
            with_cards: cards.then(|| part(with_cards(cache, source))),
            busyboxes: shell.iter().map(|&(_, arch)| (arch, part(cache.busybox(arch)))).collect(),
            kernels: linux.into_iter().map(|key| (key, part(cache.kernel(key.0, key.1)))).collect(),
            xen: xen.then(|| part(cache.xen())),
            storage_daemon: daemon.then(|| part(storage_daemon(cache, source))),
            programs: programs.clone(),
        }
    }

    /// The emulator for a cell, and its version.
    pub(crate) fn qemu(&self, cell: &Cell) -> Part<&(Qemu, String)> {
        let found = match cell.device {
            Device::Card(_) => self.with_cards.as_ref().expect("looked for where a cell has it"),
            _ => &self.qemus[&cell.platform.arch],
        };
        found.as_ref().map_err(Clone::clone)
    }

    /// qemu-storage-daemon.
    pub(crate) fn storage_daemon(&self) -> Part<&StorageDaemon> {
        self.storage_daemon.as_ref().expect("fetched for a cell that has it").as_ref().map_err(Clone::clone)
    }

    /// What runs in a cell's guest.
    pub(crate) fn system(&self, cell: &Cell) -> Part<System<'_>> {
        let platform = cell.platform;
        let kernel = || self.kernels[&(platform.kernel, platform.arch)].as_ref().map_err(Clone::clone);
        let allows = cell.driver == Driver::RingfenceAllowing;
        match cell.runs() {
            Runs::Linux => {}
            Runs::Bare(program) => {
                let program = self.programs.find(program)?;
                return Ok(System::Program { program, arguments: if allows { "allow" } else { "" } });
            }
            Runs::UserSpace(program) => {
                let program = self.programs.find(program)?;
                let arguments = if allows { "ringfence.allow" } else { "" };
                return Ok(System::UserSpace { kernel: kernel()?, program, arguments });
            }
        }
        let xen = match (&self.xen, platform.hypervisor) {
            (Some(xen), Hypervisor::Xen) => Some(xen.as_deref().map_err(Clone::clone)?),
            _ => None,
        };
        let kernel = kernel()?;
        let busybox = self.busyboxes[&platform.arch].as_deref().map_err(Clone::clone)?;
        Ok(System::Linux { kernel, busybox, xen })
    }
}

fn part<T>(found: Result<T, Error>) -> Part<T> {
    found.map_err(|error| Missing { reason: error.to_string(), tool: error.is_missing_tool() })
}

/// One QEMU for all, or where that cannot be had one for each.
fn qemus(cache: &Cache<'_>, source: QemuSource, arches: &BTreeSet<Arch>) -> BTreeMap<Arch, Part<(Qemu, String)>> {
    let with_version = |qemu: Qemu, arch| qemu.version(arch).map(|version| (qemu, version));
    let all: Vec<Arch> = arches.iter().copied().collect();
    let together = Qemu::find(cache, source, &all);
    let one = |arch| match &together {
        Ok(qemu) => with_version(qemu.clone(), arch),
        Err(_) => Qemu::find(cache, source, &[arch]).and_then(|qemu| with_version(qemu, arch)),
    };
    all.iter().map(|&arch| (arch, part(one(arch)))).collect()
}

fn with_cards(cache: &Cache<'_>, source: QemuSource) -> Result<(Qemu, String), Error> {
    let qemu = Qemu::with_device(cache, source, Arch::Amd64, "vfio-user-pci")?;
    let version = qemu.version(Arch::Amd64)?;
    Ok((qemu, version))
}

/// The machine's own, else one of the suite that QEMU is from.
fn storage_daemon(cache: &Cache<'_>, source: QemuSource) -> Result<StorageDaemon, Error> {
    let in_path = StorageDaemon::IN_PATH.version().map(|_| StorageDaemon::IN_PATH);
    match source {
        QemuSource::Path => in_path,
        QemuSource::Unpacked(suite) => StorageDaemon::unpacked(cache, suite),
        QemuSource::Auto => in_path.or_else(|_| StorageDaemon::unpacked(cache, Suite::BookwormBackports)),
    }
}

impl Programs {
    fn find(&self, program: Program) -> Part<&Path> {
        let (path, what, option) = match program {
            Program::OldDriver => (&self.old_driver, "an old driver", "--old-driver"),
            Program::Confined => (&self.confined, "drivers of ours", "--confined"),
            Program::UserDriver => (&self.user_driver, "drivers of ours for VFIO", "--user-driver"),
        };
        let missing = |reason| Missing { reason, tool: true };
        let path = path.as_deref().ok_or_else(|| missing(format!("no program with {what}; name one by {option}")))?;
        match path.is_file() {
            true => Ok(path),
            false => Err(missing(format!("no program with {what} at {}; see {option}", path.display()))),
        }
    }
}
