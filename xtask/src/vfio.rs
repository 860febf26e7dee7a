//! A user-space driver of ours as the init of a Linux guest: QEMU's own virtio devices by way of VFIO, behind
//! intel-iommu and behind virtio-iommu; and a disk that is a process of ours, as a card is (vfio-user).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ringfence_guests::{
    Arch, Backend, Cache, Error, Guest, Image, Initramfs, KernelSeries, Qemu, QemuSource, VFIO_MODULES,
};
use ringfence_policy::IommuMode;

use crate::Workspace;
use crate::cards::function;
use crate::copied;
use crate::old_driver::program;
use crate::pc::Pc;
use crate::static_program;
use crate::steps::{Log, Pass, StepResult, say};

/// The program: static, for there is nothing else in the guest.
const NAME: &str = "ringfence-user-driver";

/// One boot.
struct Cell {
    name: &'static str,
    iommu: &'static str,
    kernel: KernelSeries,
    /// Modules beside those of VFIO, before them.
    modules: &'static [&'static str],
    arguments: &'static str,
    devices: Devices,
    /// Whether there is a slow disk besides, whose queues are reset while it has requests: QEMU's goes on with them all the
    /// same, which the driver is to find out.
    slow: bool,
    end: &'static str,
    /// Whether the disk's driver took the flag.
    flag: bool,
}

enum Devices {
    /// QEMU's own disk, random bytes and network card, with these options.
    Qemus(&'static str),
    /// A disk of ours, which negotiates for itself.
    Card(IommuMode),
}

const CONFINED: Devices = Devices::Qemus("disable-legacy=on,iommu_platform=on");
const PACKED: Devices = Devices::Qemus("disable-legacy=on,iommu_platform=on,packed=on");
const UNFLAGGED: Devices = Devices::Qemus("disable-legacy=on,iommu_platform=off");

/// vfio-pci wants an IOMMU that says when mappings appear.
const INTEL: Cell = Cell {
    name: "intel-iommu",
    iommu: "intel-iommu,caching-mode=on",
    kernel: KernelSeries::V6_1,
    modules: &[],
    arguments: "intel_iommu=on",
    devices: CONFINED,
    slow: true,
    end: "done",
    flag: true,
};

const VIRTIO: Cell = Cell {
    name: "virtio-iommu",
    iommu: "virtio-iommu-pci",
    kernel: KernelSeries::V6_12,
    modules: &["virtio_iommu"],
    arguments: "",
    slow: false,
    ..INTEL
};

const CELLS: &[Cell] = &[
    INTEL,
    // QEMU 10 itself goes round in circles where its disk's packed ring is reset with requests under way.
    Cell { name: "intel-iommu, packed", devices: PACKED, slow: false, ..INTEL },
    Cell { name: "intel-iommu, unflagged", devices: UNFLAGGED, slow: false, end: "refused", flag: false, ..INTEL },
    Cell {
        name: "intel-iommu, allowed",
        devices: UNFLAGGED,
        slow: false,
        arguments: "intel_iommu=on ringfence.allow",
        flag: false,
        ..INTEL
    },
    VIRTIO,
    Cell { name: "virtio-iommu, packed", devices: PACKED, ..VIRTIO },
    CARD,
    Cell { name: "a card, unflagged", devices: Devices::Card(IommuMode::Off), end: "refused", flag: false, ..CARD },
    // What it is told is where memory is by itself, and nothing is granted there.
    Cell {
        name: "a card, allowed",
        devices: Devices::Card(IommuMode::Off),
        arguments: "intel_iommu=on ringfence.allow ringfence.haste",
        end: "failed",
        flag: false,
        ..CARD
    },
];

const CARD: Cell = Cell { name: "a card", devices: Devices::Card(IommuMode::Offer), slow: false, ..INTEL };

/// It answers each request after a second.
const SLOW: &str = "driver=null-co,node-name=slow,size=16777216,read-zeroes=on,latency-ns=1000000000";

/// How long a card's last line is waited for.
const PARTING: Duration = Duration::from_secs(10);

/// Builds the program.
pub(crate) fn build(workspace: &Workspace, log: &mut Log) -> StepResult {
    match static_program::build(workspace, "ringfence-vfio", NAME, log)? {
        Some(built) => {
            // Where `ringfence matrix --real` looks for it; cargo's own of that name is not static.
            let beside = program(workspace, &format!("{NAME}-static"));
            let at = |error| format!("{}: {error}", beside.display());
            fs::create_dir_all(beside.parent().expect("a program is in a folder")).map_err(at)?;
            fs::copy(&built, &beside).map_err(at)?;
            Ok(Pass::Whole(built.display().to_string()))
        }
        None => Ok(Pass::Skipped(static_program::WHY_NOT.to_owned())),
    }
}

/// Boots it with each IOMMU and kind of device.
pub(crate) fn boot(workspace: &Workspace, no_skip: bool, log: &mut Log) -> StepResult {
    let progress = |line: &str| say(&format!("    {line}"));
    let program = static_program::path(workspace, NAME);
    if !program.exists() {
        return Ok(Pass::Skipped(format!("there is no {}", program.display())));
    }
    let text = |error: Error| error.to_string();
    let cache = Cache::open(&workspace.target.join("guests"), &progress).map_err(text)?;
    let qemu = match Qemu::find(&cache, QemuSource::Auto, &[Arch::Amd64]) {
        Ok(qemu) => qemu,
        Err(error) if error.is_missing_tool() && !no_skip => return Ok(Pass::Skipped(error.to_string())),
        Err(error) => return Err(error.to_string()),
    };
    let with_cards = Qemu::with_device(&cache, QemuSource::Auto, Arch::Amd64, "vfio-user-pci").map_err(text)?;
    let server = workspace.ringfence();
    let started = Instant::now();
    let kit = Kit { cache: &cache, qemu, with_cards, program, server };
    for cell in CELLS {
        cell.boot(&kit, log).map_err(|reason| format!("{}: {reason}", cell.name))?;
    }
    Ok(Pass::Whole(format!("{} boots, {:.1} s", CELLS.len(), started.elapsed().as_secs_f64())))
}

/// What boots are made of.
struct Kit<'a> {
    cache: &'a Cache<'a>,
    qemu: Qemu,
    with_cards: Qemu,
    program: PathBuf,
    server: PathBuf,
}

/// A card on a socket in `folder`.
fn card(kit: &Kit<'_>, mode: IommuMode, image: &Image, folder: &Path) -> Result<Backend, Error> {
    let socket = folder.join("socket");
    let mut command = Command::new(&kit.server);
    command.args(["serve", "blk", "--transport", "vfio-user", "--iommu", &mode.to_string(), "--socket"]);
    command.arg(&socket).arg("--image").arg(image.path());
    Backend::start(command, &socket, &folder.join("log"))
}

impl Cell {
    fn boot(&self, kit: &Kit<'_>, log: &mut Log) -> Result<(), String> {
        let text = |error: Error| error.to_string();
        let kernel = kit.cache.kernel(self.kernel, Arch::Amd64).map_err(text)?;
        let modules: Vec<_> = self.modules.iter().chain(VFIO_MODULES).copied().collect();
        let archive = Initramfs::of_program(&kernel, &kit.program, &modules).map_err(text)?;
        let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
        let [initramfs, console, disk] = ["initramfs", "console", "disk"].map(|name| folder.path().join(name));
        let at = |path: &Path| format!("{}: ", path.display());
        fs::write(&initramfs, archive.bytes()).map_err(|error| at(&initramfs) + &error.to_string())?;
        let image = Image::create(&disk, 13).map_err(text)?;
        let Self { iommu, arguments, .. } = self;
        let card = match self.devices {
            Devices::Qemus(_) => None,
            Devices::Card(mode) => Some(card(kit, mode, &image, folder.path()).map_err(text)?),
        };
        let qemu = if card.is_some() { &kit.with_cards } else { &kit.qemu };
        let mut pc = Pc::with_shared_memory(qemu, 256);
        pc.option("-cpu", "max").device(iommu);
        match (&card, &self.devices) {
            (Some(card), _) => pc.device(function("disk", "3", card.socket())),
            (None, Devices::Card(_)) => unreachable!("it was started above"),
            (None, Devices::Qemus(options)) => pc.disk("pci", &disk, options).source_and_card("pci", options),
        };
        if let (true, Devices::Qemus(options)) = (self.slow, &self.devices) {
            pc.option("-blockdev", SLOW).device(format!("virtio-blk-pci,drive=slow,num-queues=4,{options}"));
        }
        let (ended, console) = pc.linux(&kernel, &initramfs, arguments).run(&console)?;
        let card = card.map(|card| {
            card.logs(PARTING, |line| line.contains("connection ended"));
            card.log()
        });
        log.line(format_args!("{}\n{console}\n{}", self.name, card.as_deref().unwrap_or_default()));
        self.judge(&console, &image, card.as_deref()).map_err(|reason| format!("{reason}; QEMU {ended}"))
    }

    /// `card`: what the disk itself told, where it is a process of ours.
    fn judge(&self, console: &str, image: &Image, card: Option<&str>) -> Result<(), String> {
        let guest = Guest::parse(console);
        let says = |words: &str| match console.contains(words) {
            true => Ok(()),
            false => Err(format!("the driver does not say \"{words}\"")),
        };
        copied::hold("end", guest.end.as_deref(), self.end, &guest.errors)?;
        if self.end != "done" {
            match self.end {
                "refused" => says("it appears to be behind an IOMMU and does not offer")?,
                _ => met_faults(card.unwrap_or_default())?,
            }
            return copied::nothing_of(image);
        }
        copied::all_of(&guest, image)?;
        says("RINGFENCE restarted=the queue alone")?;
        if self.slow {
            says("RINGFENCE in-flight=16 lost; ")?;
            says("RINGFENCE anew=4 queues")?;
        }
        if card.is_none() {
            says("RINGFENCE random=64 bytes, which differ")?;
            says("RINGFENCE router=[52, 55, 0a, 00, 02, 02]")?;
        }
        let slept =
            console.lines().find_map(|line| line.trim().strip_prefix("RINGFENCE interrupts=")?.parse::<u64>().ok());
        if slept.is_none_or(|slept| slept == 0) {
            return Err(format!("the driver slept until {slept:?} interrupts"));
        }
        let flag = IommuMode::Offer.offers(0).trailing_zeros();
        if guest.features.is_none_or(|features| features.has(flag) != self.flag) {
            return Err(format!("bit {flag} was not {}", if self.flag { "taken" } else { "left alone" }));
        }
        let told = |key: &str| console.lines().find_map(|line| line.split_once(key).map(|(_, value)| value.trim()));
        let addresses = told("RINGFENCE bus=").and_then(|told| told.split_once(" physical="));
        let (bus, physical) = addresses.ok_or("the driver told of no addresses")?;
        if (bus == physical) == self.flag {
            return Err(format!("the bus address is {bus}, the physical one {physical}"));
        }
        if self.flag {
            says("RINGFENCE forbidden=nothing came through")?;
            // A card has its own idea of what it was granted.
            let (wrong, fault) = (told("RINGFENCE wrong=0x"), card.or_else(|| told("RINGFENCE fault=")));
            let heard = wrong.zip(fault).is_some_and(|(wrong, fault)| !wrong.is_empty() && fault.contains(wrong));
            if !heard {
                return Err(format!("nobody told of a fault at {wrong:?}, but {fault:?}"));
            }
        }
        Ok(())
    }
}

/// Whether the log of a card tells of faults, and counts them.
fn met_faults(log: &str) -> Result<(), String> {
    let counted = log.lines().any(|line| line.contains("connection ended") && !line.contains("faults=0"));
    match counted && log.contains("fault: ") {
        true => Ok(()),
        false => Err(format!("the card tells of no faults: {log}")),
    }
}
