//! A user-space driver of ours as the init of a Linux guest: QEMU's own virtio devices by way of VFIO, behind
//! intel-iommu and behind virtio-iommu.

use std::fs::{self, File};
use std::path::Path;
use std::time::Instant;

use ringfence_guests::{
    Arch, Cache, Error, Guest, Image, ImageState, Initramfs, KernelSeries, Qemu, QemuSource, VFIO_MODULES,
};
use ringfence_policy::IommuMode;

use crate::Workspace;
use crate::old_driver::program;
use crate::patience::wait;
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
    /// Options of each device.
    devices: &'static str,
    end: &'static str,
    /// Whether the disk's driver took the flag.
    flag: bool,
}

const CONFINED: &str = "disable-legacy=on,iommu_platform=on";
const PACKED: &str = "disable-legacy=on,iommu_platform=on,packed=on";
const UNFLAGGED: &str = "disable-legacy=on,iommu_platform=off";

/// vfio-pci wants an IOMMU that says when mappings appear.
const INTEL: Cell = Cell {
    name: "intel-iommu",
    iommu: "intel-iommu,caching-mode=on",
    kernel: KernelSeries::V6_1,
    modules: &[],
    arguments: "intel_iommu=on",
    devices: CONFINED,
    end: "done",
    flag: true,
};

const VIRTIO: Cell = Cell {
    name: "virtio-iommu",
    iommu: "virtio-iommu-pci",
    kernel: KernelSeries::V6_12,
    modules: &["virtio_iommu"],
    arguments: "",
    ..INTEL
};

const CELLS: &[Cell] = &[
    INTEL,
    Cell { name: "intel-iommu, packed", devices: PACKED, ..INTEL },
    Cell { name: "intel-iommu, unflagged", devices: UNFLAGGED, end: "refused", flag: false, ..INTEL },
    Cell {
        name: "intel-iommu, allowed",
        devices: UNFLAGGED,
        arguments: "intel_iommu=on ringfence.allow",
        flag: false,
        ..INTEL
    },
    VIRTIO,
    Cell { name: "virtio-iommu, packed", devices: PACKED, ..VIRTIO },
];

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
    let started = Instant::now();
    for cell in CELLS {
        cell.boot(&cache, &qemu, &program, log).map_err(|reason| format!("{}: {reason}", cell.name))?;
    }
    Ok(Pass::Whole(format!("{} boots, {:.1} s", CELLS.len(), started.elapsed().as_secs_f64())))
}

impl Cell {
    fn boot(&self, cache: &Cache<'_>, qemu: &Qemu, program: &Path, log: &mut Log) -> Result<(), String> {
        let text = |error: Error| error.to_string();
        let kernel = cache.kernel(self.kernel, Arch::Amd64).map_err(text)?;
        let modules: Vec<_> = self.modules.iter().chain(VFIO_MODULES).copied().collect();
        let archive = Initramfs::of_program(&kernel, program, &modules).map_err(text)?;
        let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
        let [initramfs, console, disk] = ["initramfs", "console", "disk"].map(|name| folder.path().join(name));
        let at = |path: &Path| format!("{}: ", path.display());
        fs::write(&initramfs, archive.bytes()).map_err(|error| at(&initramfs) + &error.to_string())?;
        let image = Image::create(&disk, 13).map_err(text)?;
        let file = File::create(&console).map_err(|error| at(&console) + &error.to_string())?;
        let Self { devices, iommu, arguments, .. } = self;
        let mut command = qemu.command(Arch::Amd64);
        command
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-accel", "tcg"])
            .args(["-machine", "q35,kernel-irqchip=split", "-cpu", "max", "-m", "256M", "-device", iommu])
            .args(["-blockdev", &format!("driver=file,node-name=disk,filename={}", disk.display())])
            .args(["-device", &format!("virtio-blk-pci,drive=disk,{devices}")])
            .args(["-device", &format!("virtio-rng-pci,{devices}")])
            .args(["-netdev", "user,id=net,restrict=on"])
            .args(["-device", &format!("virtio-net-pci,netdev=net,{devices}")])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&initramfs)
            .args(["-append", &format!("console=ttyS0 panic=-1 loglevel=5 no_timer_check {arguments}")])
            .stderr(file.try_clone().map_err(|error| error.to_string())?)
            .stdout(file);
        let ended = wait(&mut command)?;
        let console = fs::read(&console).map_err(|error| error.to_string())?;
        let console = String::from_utf8_lossy(&console);
        log.line(format_args!("{}\n{console}", self.name));
        self.judge(&console, &image).map_err(|reason| format!("{reason}; QEMU {ended}"))
    }

    fn judge(&self, console: &str, image: &Image) -> Result<(), String> {
        let guest = Guest::parse(console);
        let hold = |what: &str, found: Option<&str>, wanted: &str| match found == Some(wanted) {
            true => Ok(()),
            false => Err(format!("{what} is {}, not {wanted} {:?}", found.unwrap_or("not told"), guest.errors)),
        };
        let says = |words: &str| match console.contains(words) {
            true => Ok(()),
            false => Err(format!("the driver does not say \"{words}\"")),
        };
        hold("end", guest.end.as_deref(), self.end)?;
        if self.end == "refused" {
            says("it appears to be behind an IOMMU and does not offer")?;
            return match image.state().map_err(|error| error.to_string())? {
                ImageState::Untouched => Ok(()),
                state => Err(format!("the image was written to: {state:?}")),
            };
        }
        hold("SHA-256 of what it read", guest.read.as_deref(), image.initial())?;
        hold("SHA-256 of what it read back", guest.written.as_deref(), image.expected())?;
        says("RINGFENCE restarted=the queue alone")?;
        says("RINGFENCE random=64 bytes, which differ")?;
        says("RINGFENCE router=[52, 55, 0a, 00, 02, 02]")?;
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
            let (wrong, fault) = (told("RINGFENCE wrong=0x"), told("RINGFENCE fault="));
            let heard = wrong.zip(fault).is_some_and(|(wrong, fault)| !wrong.is_empty() && fault.contains(wrong));
            if !heard {
                return Err(format!("the kernel told of no fault at {wrong:?}, but {fault:?}"));
            }
        }
        match image.state().map_err(|error| error.to_string())? {
            ImageState::Written => Ok(()),
            state => Err(format!("the image on the host is not what it wrote: {state:?}")),
        }
    }
}
