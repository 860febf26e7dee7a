//! A kernel of ours whose devices are QEMU's own: behind a virtio-iommu and not, with the flag and without, with packed
//! rings, and legacy ones; and behind registers in memory instead of PCI.

use std::fs;
use std::time::Instant;

use ringfence_guests::{Arch, Cache, Error, Guest, Image, Qemu, QemuSource};
use ringfence_policy::IommuMode;

use crate::Workspace;
use crate::copied;
use crate::guide;
use crate::old_driver::program;
use crate::pc::Pc;
use crate::steps::{Log, Pass, StepResult, say};

/// The program, and its file beside `ringfence` itself.
pub(crate) const NAME: &str = "ringfence-confined";

/// What it may weigh.
const MOST: u64 = 200 << 10;

/// The machine's, in MiB.
const MEMORY: u32 = 64;

/// One boot.
struct Cell {
    name: &'static str,
    iommu: Option<&'static str>,
    bus: Bus,
    /// Options of each device.
    devices: &'static str,
    command_line: &'static str,
    /// What the kernel says in the end, and words of its reason if that is not `done`.
    end: &'static str,
    reason: &'static str,
    /// Whether the disk's driver took the flag.
    flag: bool,
}

/// How devices are reached.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bus {
    /// PCI, on a q35.
    Pci,
    /// Registers in memory, version 2, on a microvm.
    Mmio,
    /// The same, version 1.
    LegacyMmio,
}

const CELLS: &[Cell] = &[
    Cell { name: "confined", iommu: IOMMU, devices: "disable-legacy=on,iommu_platform=on", flag: true, ..PLAIN },
    Cell {
        name: "confined, packed, pages of 64 KiB",
        iommu: Some("virtio-iommu-pci,granule=64k"),
        devices: "disable-legacy=on,iommu_platform=on,packed=on",
        flag: true,
        ..PLAIN
    },
    Cell { name: "unflagged", iommu: IOMMU, end: "refused", reason: "may go past the IOMMU", ..PLAIN },
    Cell { name: "unflagged, allowed", iommu: IOMMU, command_line: "allow", ..PLAIN },
    PLAIN,
    Cell { name: "plain, packed", devices: "disable-legacy=on,iommu_platform=on,packed=on", flag: true, ..PLAIN },
    Cell { name: "transitional", devices: "disable-legacy=off", ..PLAIN },
    Cell { name: "legacy", devices: "disable-modern=on", end: "failed", reason: "legacy interface alone", ..PLAIN },
    MMIO,
    Cell { name: "MMIO, packed", devices: "iommu_platform=on,packed=on", flag: true, ..MMIO },
    Cell { name: "MMIO, legacy", bus: Bus::LegacyMmio, end: "failed", reason: "legacy", ..MMIO },
];

const IOMMU: Option<&str> = Some("virtio-iommu-pci");

/// A modern device without an IOMMU.
const PLAIN: Cell = Cell {
    name: "plain",
    iommu: None,
    bus: Bus::Pci,
    devices: "disable-legacy=on,iommu_platform=off",
    command_line: "",
    end: "done",
    reason: "",
    flag: false,
};

/// A device of version 2 behind registers in memory.
const MMIO: Cell = Cell { name: "MMIO", bus: Bus::Mmio, devices: "iommu_platform=off", command_line: "mmio", ..PLAIN };

/// Boots it with each kind of device.
pub(crate) fn boot(workspace: &Workspace, no_skip: bool, log: &mut Log) -> StepResult {
    let progress = |line: &str| say(&format!("    {line}"));
    let kernel = program(workspace, NAME);
    let Ok(file) = fs::metadata(&kernel) else {
        return Ok(Pass::Skipped(format!("there is no {}", kernel.display())));
    };
    if file.len() > MOST {
        return Err(format!("{} has {} bytes, more than {MOST}", kernel.display(), file.len()));
    }
    let cache = Cache::open(&workspace.target.join("guests"), &progress).map_err(|error| error.to_string())?;
    let qemu = match Qemu::find(&cache, QemuSource::Auto, &[Arch::Amd64]) {
        Ok(qemu) => qemu,
        Err(error) if error.is_missing_tool() && !no_skip => return Ok(Pass::Skipped(error.to_string())),
        Err(error) => return Err(error.to_string()),
    };
    let started = Instant::now();
    for cell in CELLS {
        cell.boot(&qemu, workspace, log).map_err(|reason| format!("{}: {reason}", cell.name))?;
    }
    guide::boot(&qemu, workspace, log).map_err(|reason| format!("the guide's code: {reason}"))?;
    let (kib, seconds) = (file.len() >> 10, started.elapsed().as_secs_f64());
    Ok(Pass::Whole(format!("{} boots of {kib} KiB, and the guide's code, {seconds:.1} s", CELLS.len())))
}

impl Cell {
    fn boot(&self, qemu: &Qemu, workspace: &Workspace, log: &mut Log) -> Result<(), String> {
        let text = |error: Error| error.to_string();
        let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
        let image = Image::create(&folder.path().join("disk"), 11).map_err(text)?;
        let (mut pc, bus) = match self.bus {
            Bus::Pci => (Pc::new(qemu, "q35", MEMORY), "pci"),
            bus => {
                // The kernel's watchdog is the timer that it has interrupts from.
                let mut pc = Pc::new(qemu, "microvm,pit=on,pic=on,rtc=on,isa-serial=on", MEMORY);
                pc.option("-global", format!("virtio-mmio.force-legacy={}", bus == Bus::LegacyMmio));
                (pc, "device")
            }
        };
        if let Some(iommu) = self.iommu {
            pc.device(iommu);
        }
        let Self { devices, command_line, .. } = self;
        pc.disk(bus, image.path(), devices)
            .source_and_card(bus, devices)
            .kernel(&program(workspace, NAME), command_line);
        let (ended, console) = pc.run(&folder.path().join("console"))?;
        log.line(format_args!("{}\n{console}", self.name));
        self.judge(&console, &image).map_err(|reason| format!("{reason}; QEMU {ended}"))
    }

    fn judge(&self, console: &str, image: &Image) -> Result<(), String> {
        let guest = Guest::parse(console);
        let says = |words: &str| match console.contains(words) {
            true => Ok(()),
            false => Err(format!("the kernel does not say \"{words}\"")),
        };
        copied::hold("end", guest.end.as_deref(), self.end, &guest.errors)?;
        if self.end != "done" {
            says(self.reason)?;
            return copied::nothing_of(image);
        }
        copied::all_of(&guest, image)?;
        copied::hold("device status", guest.status.as_deref(), "0x0000000f", &guest.errors)?;
        says("RINGFENCE random=64 bytes, which differ")?;
        says("RINGFENCE router=[52, 55, 0a, 00, 02, 02]")?;
        let flag = IommuMode::Offer.offers(0).trailing_zeros();
        if guest.features.is_none_or(|features| features.has(flag) != self.flag) {
            return Err(format!("bit {flag} was not {}", if self.flag { "taken" } else { "left alone" }));
        }
        if self.iommu.is_some() && self.flag {
            says("RINGFENCE forbidden=nothing came through")?;
            says("RINGFENCE fault=Fault { reason: Mapping, endpoint: 10, ")?;
            let (bus, physical) = addresses(console).ok_or("the kernel told of no addresses")?;
            if bus == physical {
                return Err(format!("bus and physical address are both {bus}"));
            }
        }
        Ok(())
    }
}

/// The data's bus address and its physical one.
fn addresses(console: &str) -> Option<(&str, &str)> {
    console.lines().find_map(|line| line.strip_prefix("RINGFENCE bus=")?.trim().split_once(" physical="))
}

#[cfg(test)]
mod tests {
    use super::addresses;

    #[test]
    fn addresses_are_read_from_the_console() {
        assert_eq!(addresses("a\r\nRINGFENCE bus=0x1 physical=0x2\r\n"), Some(("0x1", "0x2")));
        assert_eq!(addresses("RINGFENCE bus=0x1"), None);
    }
}
