//! The cells: which driver meets which device on which platform, and what that stands for.

use std::fmt;

use ringfence_guests::{Arch, Hypervisor, Iommu, PLATFORMS, Platform, VirtioFlag};
use ringfence_policy::{DeviceKind, IommuMode, Platform as Place};

use crate::case::Key;
use crate::record::{Source, StandsFor};
use crate::{Case, DriverKind, Select};

/// A real cell's place in the table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// The machine.
    pub platform: &'static Platform,
    /// What drives the disk.
    pub driver: Driver,
    /// What serves it.
    pub device: Device,
}

/// A driver of today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// Linux: takes the flag.
    Linux,
    /// Linux by the interface from before the standard, whose 32 feature bits leave no room for the flag.
    LinuxLegacy,
    /// The `virtio-drivers` crate in a bare program: does not know the flag.
    VirtioDrivers,
    /// `ringfence-driver`, which takes the flag, and behind an IOMMU refuses a disk without it: in a bare program where
    /// there is no IOMMU or one that it can program, else as the only program of a Linux that gives it the disk by VFIO.
    Ringfence,
    /// The same with the disk on its allow-list, as one that uses physical addresses.
    RingfenceAllowing,
}

/// What is booted for a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runs {
    /// Linux, and its own driver.
    Linux,
    /// A program without an operating system.
    Bare(Program),
    /// Linux with this as its only program.
    UserSpace(Program),
}

/// A program that is no part of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// A kernel with `virtio-drivers`.
    OldDriver,
    /// A kernel with our drivers, that can program a virtio-iommu.
    Confined,
    /// Our drivers by way of VFIO.
    UserDriver,
}

/// A device of today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// QEMU's own; with the flag on it refuses whoever does not take it.
    QemuBlk(VirtioFlag),
    /// `ringfence serve blk`.
    ServeBlk(IommuMode, Keep),
    /// `ringfence serve blk --transport vfio-user`: a whole PCI function, which negotiates for itself as hardware does.
    Card(IommuMode),
    /// qemu-storage-daemon, which knows no flag; QEMU is told to want it, or not.
    StorageDaemon(VirtioFlag),
    /// The same behind `ringfence wrap`: an old device become a new one.
    Wrapped(IommuMode),
}

/// How long `ringfence serve blk` keeps translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Its default: as far as the front-end is seen to take them away.
    Auto,
    /// Until they are taken away.
    Cache,
    /// For one request.
    Request,
}

const QEMU_OFF: Device = Device::QemuBlk(VirtioFlag::Off);
const QEMU_ON: Device = Device::QemuBlk(VirtioFlag::On);
const OFFER: Device = Device::ServeBlk(IommuMode::Offer, Keep::Auto);
const REQUIRE: Device = Device::ServeBlk(IommuMode::Require, Keep::Auto);

/// What a new driver meets: the flag on and off, of QEMU's own and of back-ends.
const DEVICES: [Device; 7] = [
    QEMU_OFF,
    QEMU_ON,
    Device::ServeBlk(IommuMode::Off, Keep::Auto),
    OFFER,
    REQUIRE,
    Device::StorageDaemon(VirtioFlag::Off),
    Device::StorageDaemon(VirtioFlag::On),
];

/// What Linux meets where the machine is one of each kind: how the IOMMU works is no business of who is wrapped.
const WRAPPED: [Device; 2] = [Device::Wrapped(IommuMode::Offer), Device::Wrapped(IommuMode::Require)];

/// What a driver that does not know the flag meets.
const OLD_DRIVERS_MEET: [Device; 4] = [QEMU_OFF, QEMU_ON, OFFER, REQUIRE];

/// Where a front-end never takes a translation away: what becomes of a server that believes it does.
const KEPT: [Device; 2] =
    [Device::ServeBlk(IommuMode::Offer, Keep::Cache), Device::ServeBlk(IommuMode::Offer, Keep::Request)];

/// What a driver can be told to allow: disks that go past the IOMMU.
const ALLOWED: [Device; 3] =
    [QEMU_OFF, Device::ServeBlk(IommuMode::Off, Keep::Auto), Device::StorageDaemon(VirtioFlag::Off)];

/// Hardware, of before the flag and with it.
const CARDS: [Device; 2] = [Device::Card(IommuMode::Off), Device::Card(IommuMode::Offer)];

impl Cell {
    /// Every cell, platform by platform.
    pub fn all() -> Vec<Cell> {
        let mut cells = Vec::new();
        for platform in PLATFORMS {
            let mut meet = |driver, devices: &[Device]| {
                cells.extend(devices.iter().map(|&device| Cell { platform, driver, device }));
            };
            match platform.name {
                // There for them alone.
                "x86-intel-caching" => {
                    meet(Driver::Linux, &CARDS);
                    continue;
                }
                "x86-none" => meet(Driver::Linux, &CARDS),
                _ => {}
            }
            meet(Driver::Linux, &DEVICES);
            if let "x86-none" | "x86-intel-lazy" | "x86-virtio-iommu" | "arm64-smmuv3-lazy" = platform.name {
                meet(Driver::Linux, &WRAPPED);
            }
            if let "x86-none" | "x86-intel-strict" | "x86-virtio-iommu" = platform.name {
                meet(Driver::Ringfence, &DEVICES);
            }
            if let "x86-intel-strict" | "x86-virtio-iommu" = platform.name {
                meet(Driver::RingfenceAllowing, &ALLOWED);
            }
            match platform.name {
                "x86-amd" => meet(Driver::Linux, &KEPT),
                // One of each: how often an IOMMU forgets is of no matter to who never asks it.
                "x86-none" | "x86-intel-lazy" => {
                    meet(Driver::LinuxLegacy, &OLD_DRIVERS_MEET);
                    meet(Driver::VirtioDrivers, &OLD_DRIVERS_MEET);
                }
                "arm64-none" | "arm64-smmuv3-lazy" | "ppc64le-pseries" | "xen-dom0" => {
                    meet(Driver::LinuxLegacy, &OLD_DRIVERS_MEET);
                }
                _ => {}
            }
        }
        cells
    }

    /// Those of a selection.
    pub fn selected(select: &Select) -> Vec<Cell> {
        Cell::all().into_iter().filter(|cell| cell.is_in(select)).collect()
    }

    pub(crate) fn is_in(&self, select: &Select) -> bool {
        select.matches_names(|key| self.names(key))
    }

    /// What a selection may call it: its own name, and that of what it stands for.
    pub(crate) fn names(&self, key: Key) -> Vec<&'static str> {
        let case = self.case();
        match key {
            Key::Source => vec![Source::Real.slug()],
            Key::Platform => vec![self.platform.name, case.platform_slug()],
            Key::Driver => vec![self.driver.slug(), case.driver.slug()],
            Key::Device => vec![self.device.slug(), case.device_slug()],
        }
    }

    /// The cell of the proposal's table that it stands for.
    pub fn case(&self) -> Case {
        let platform = match (self.platform.hypervisor, self.platform.arch, self.platform.iommu) {
            (Hypervisor::Xen, ..) => Place::Xen,
            (_, Arch::Amd64, Iommu::Absent) => Place::X86,
            (_, Arch::Amd64, Iommu::Present) => Place::X86Iommu,
            (_, Arch::Arm64, Iommu::Absent) => Place::Arm64,
            (_, Arch::Arm64, Iommu::Present) => Place::Arm64Smmu,
            (_, Arch::Ppc64el, _) => Place::PpcToday,
        };
        let driver = match self.driver {
            Driver::Linux => DriverKind::New,
            Driver::LinuxLegacy | Driver::VirtioDrivers => DriverKind::Old,
            Driver::Ringfence => DriverKind::Refusing,
            Driver::RingfenceAllowing => DriverKind::Allowing,
        };
        let device = match self.device {
            Device::QemuBlk(VirtioFlag::Off) | Device::ServeBlk(IommuMode::Off, _) | Device::StorageDaemon(_) => {
                DeviceKind::OldEmulated
            }
            Device::Card(IommuMode::Off) => DeviceKind::OldPhysical,
            Device::Card(IommuMode::Offer | IommuMode::Require) => DeviceKind::NewPhysical,
            Device::ServeBlk(IommuMode::Offer, _) => DeviceKind::NewEmulated,
            Device::Wrapped(_) => DeviceKind::Wrapped,
            Device::QemuBlk(VirtioFlag::On) | Device::ServeBlk(IommuMode::Require, _) => {
                DeviceKind::NewEmulatedRequiring
            }
        };
        Case { platform, driver, device }
    }

    /// What is booted.
    pub(crate) fn runs(&self) -> Runs {
        let programmable = self.platform.iommu == Iommu::Absent || self.platform.name == "x86-virtio-iommu";
        match self.driver {
            Driver::Linux | Driver::LinuxLegacy => Runs::Linux,
            Driver::VirtioDrivers => Runs::Bare(Program::OldDriver),
            Driver::Ringfence | Driver::RingfenceAllowing if programmable => Runs::Bare(Program::Confined),
            Driver::Ringfence | Driver::RingfenceAllowing => Runs::UserSpace(Program::UserDriver),
        }
    }

    /// The same by names.
    pub(crate) fn stands_for(&self) -> StandsFor {
        let case = self.case();
        StandsFor {
            platform: case.platform_slug().into(),
            driver: case.driver.slug().into(),
            device: case.device_slug().into(),
        }
    }

    /// What QEMU is told of the flag.
    pub(crate) fn flag(&self) -> VirtioFlag {
        match (self.driver, self.device) {
            // QEMU starts no transitional device with the flag on. Its own shows that; a back-end offers it all the same.
            (Driver::LinuxLegacy, Device::ServeBlk(..)) => VirtioFlag::Off,
            (_, Device::QemuBlk(flag) | Device::StorageDaemon(flag)) => flag,
            // A card is not told by QEMU.
            (_, Device::ServeBlk(IommuMode::Off, _) | Device::Card(IommuMode::Off)) => VirtioFlag::Off,
            (_, Device::ServeBlk(IommuMode::Offer | IommuMode::Require, _) | Device::Card(_) | Device::Wrapped(_)) => {
                VirtioFlag::On
            }
        }
    }
}

impl Driver {
    /// Its name in reports and in selections.
    pub fn slug(self) -> &'static str {
        match self {
            Driver::Linux => "linux",
            Driver::LinuxLegacy => "linux-legacy",
            Driver::VirtioDrivers => "virtio-drivers",
            Driver::Ringfence => "ringfence",
            Driver::RingfenceAllowing => "ringfence-allowing",
        }
    }
}

impl Device {
    /// Its name in reports and in selections.
    pub fn slug(self) -> &'static str {
        match self {
            Device::QemuBlk(VirtioFlag::Off) => "qemu-blk-off",
            Device::QemuBlk(VirtioFlag::On) => "qemu-blk-on",
            Device::ServeBlk(IommuMode::Off, _) => "serve-blk-off",
            Device::ServeBlk(IommuMode::Offer, Keep::Auto) => "serve-blk-offer",
            Device::ServeBlk(IommuMode::Offer, Keep::Cache) => "serve-blk-offer-cache",
            Device::ServeBlk(IommuMode::Offer, Keep::Request) => "serve-blk-offer-request",
            Device::ServeBlk(IommuMode::Require, _) => "serve-blk-require",
            Device::Card(IommuMode::Off) => "vfio-user-off",
            Device::Card(IommuMode::Offer) => "vfio-user-offer",
            Device::Card(IommuMode::Require) => "vfio-user-require",
            Device::StorageDaemon(VirtioFlag::Off) => "storage-daemon-off",
            Device::StorageDaemon(VirtioFlag::On) => "storage-daemon-on",
            Device::Wrapped(IommuMode::Require) => "wrapped-storage-daemon-require",
            Device::Wrapped(_) => "wrapped-storage-daemon-offer",
        }
    }
}

impl Keep {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Keep::Auto => "auto",
            Keep::Cache => "cache",
            Keep::Request => "request",
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{} {} {}", self.platform.name, self.driver.slug(), self.device.slug()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_cell_has_its_own_name() {
        let cells = Cell::all();
        let names: BTreeSet<_> = cells.iter().map(Cell::to_string).collect();
        assert_eq!(names.len(), cells.len());
    }

    #[test]
    fn a_cell_is_called_by_its_name_and_by_what_it_stands_for() {
        let count = |select: &str| Cell::selected(&select.parse().unwrap()).len();
        assert_eq!(count("source=embedded"), 0);
        assert_eq!(count("source=real"), Cell::all().len());
        assert_eq!(count("platform=xen-dom0"), count("platform=xen driver=new") - 7 + 4);
        assert_eq!(count("platform=x86-amd driver=linux"), 9);
        assert_eq!(count("platform=x86-none device=old-emulated driver=new"), 4);
        assert_eq!(count("driver=refusing|allowing"), 3 * 7 + 2 * 3);
        assert_eq!(count("device=new-wrapped"), 8);
        assert_eq!(count("platform!=x86* device=serve-blk-require driver=linux"), 6);
    }
}
