//! The platforms as a table of facts: what to start, and what to tell Linux.

use crate::packages::{Arch, Suite};

/// A kernel series that Debian offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelSeries {
    /// Debian 12's own.
    V6_1,
    /// The one of bookworm-backports; the first here with virtio-iommu on x86.
    V6_12,
    /// Whatever Debian's newest is.
    Newest,
}

impl KernelSeries {
    /// The series' number, where it stays the same.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    pub(crate) const fn suite(self) -> Suite {
        match self {
            Self::V6_1 => Suite::Bookworm,
            Self::V6_12 => Suite::BookwormBackports,
            Self::Newest => Suite::Sid,
        }
    }
}

/// A machine and how its kernel is told to use the IOMMU.
#[derive(Debug, PartialEq, Eq)]
pub struct Platform {
    /// The name, as in a report.
    pub name: &'static str,
    /// The guest's architecture.
    pub arch: Arch,
    /// The kernel.
    pub kernel: KernelSeries,
    /// QEMU's `-machine`.
    pub(crate) machine: &'static str,
    /// QEMU's `-cpu`, if the machine's own will not do.
    pub(crate) cpu: Option<&'static str>,
    /// Devices that come before the disk.
    pub(crate) devices: &'static [&'static str],
    /// What is added to the disk's own options.
    pub(crate) disk: &'static str,
    /// The kernel's console.
    pub(crate) console: &'static str,
    /// What is added to the kernel's command line.
    pub(crate) arguments: &'static str,
    /// The modules that the disk needs, before its own driver.
    pub(crate) modules: &'static [&'static str],
    /// Whether the disk sits behind an IOMMU of the guest.
    pub iommu: Iommu,
    /// QEMU's trace events that show what that IOMMU does.
    pub(crate) trace: &'static [&'static str],
    /// Whether Linux runs by itself or as Xen's first domain.
    pub hypervisor: Hypervisor,
}

/// Who starts Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hypervisor {
    /// Nobody: it has the machine.
    None,
    /// Xen, which makes it a paravirtual dom0 that owns the devices.
    Xen,
}

/// Whether a platform has an IOMMU that the guest programs for its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// None: a bus address is a guest-physical one.
    Absent,
    /// One that Linux drives.
    Present,
}

const X86: Platform = Platform {
    name: "x86-none",
    arch: Arch::Amd64,
    kernel: KernelSeries::V6_1,
    machine: "q35",
    cpu: None,
    devices: &[],
    disk: "",
    console: "ttyS0",
    arguments: "",
    modules: &["virtio_pci"],
    iommu: Iommu::Absent,
    trace: &[],
    hypervisor: Hypervisor::None,
};

const ARM64: Platform = Platform {
    name: "arm64-none",
    arch: Arch::Arm64,
    machine: "virt",
    cpu: Some("cortex-a57"),
    console: "ttyAMA0",
    ..X86
};

const SMMUV3: Platform = Platform {
    machine: "virt,iommu=smmuv3",
    iommu: Iommu::Present,
    trace: &["smmuv3_translate_success", "smmuv3_record_event"],
    ..ARM64
};

const INTEL: Platform = Platform {
    devices: &["intel-iommu"],
    iommu: Iommu::Present,
    trace: &["vtd_dmar_translate", "vtd_dmar_fault"],
    ..X86
};

const AMD: Platform = Platform {
    iommu: Iommu::Present,
    trace: &["amdvi_translation_result", "amdvi_iotlb_hit", "amdvi_page_fault", "amdvi_pages_inval"],
    ..X86
};

const XEN: Platform = Platform { console: "hvc0", hypervisor: Hypervisor::Xen, ..X86 };

/// Every platform, in the order of a report.
pub const PLATFORMS: &[Platform] = &[
    X86,
    Platform { name: "x86-intel-strict", arguments: "intel_iommu=on iommu.strict=1", ..INTEL },
    Platform { name: "x86-intel-lazy", arguments: "intel_iommu=on iommu.strict=0", ..INTEL },
    // Before 8.1 QEMU tells a vhost-user back-end of no invalidation unless both sides have a device TLB.
    Platform {
        name: "x86-intel-ats",
        devices: &["intel-iommu,device-iotlb=on"],
        disk: ",ats=on",
        arguments: "intel_iommu=on",
        ..INTEL
    },
    // QEMU has to hear of what the guest maps, to grant it to a function of another process.
    Platform {
        name: "x86-intel-caching",
        devices: &["intel-iommu,caching-mode=on"],
        arguments: "intel_iommu=on",
        trace: &["vfio_user_dma_map", "vtd_dmar_fault"],
        ..INTEL
    },
    // Passes accesses by in its default form, and breaks interrupts in the one that does not. Never invalidates.
    Platform { name: "x86-amd", devices: &["amd-iommu,pt=off,intremap=off"], ..AMD },
    Platform { name: "x86-amd-defaults", devices: &["amd-iommu"], ..AMD },
    Platform {
        name: "x86-virtio-iommu",
        kernel: KernelSeries::V6_12,
        devices: &["virtio-iommu-pci"],
        modules: &["virtio_pci", "virtio_iommu"],
        iommu: Iommu::Present,
        trace: &["virtio_iommu_translate_out", "virtio_iommu_report_fault"],
        ..X86
    },
    ARM64,
    Platform { name: "arm64-smmuv3-strict", arguments: "iommu.strict=1", ..SMMUV3 },
    Platform { name: "arm64-smmuv3-lazy", arguments: "iommu.strict=0", ..SMMUV3 },
    Platform {
        name: "ppc64le-pseries",
        arch: Arch::Ppc64el,
        machine: "pseries",
        console: "hvc0",
        // The hypervisor's TCE tables are there without any option.
        iommu: Iommu::Present,
        trace: &["spapr_iommu_xlate"],
        ..X86
    },
    Platform { name: "xen-dom0", ..XEN },
    Platform { name: "xen-dom0-intel", devices: INTEL.devices, iommu: Iommu::Present, trace: INTEL.trace, ..XEN },
];

impl Platform {
    /// The platform of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        PLATFORMS.iter().find(|platform| platform.name == name)
    }

    /// The machine's memory, in MiB.
    pub(crate) fn memory(&self) -> u64 {
        match self.hypervisor {
            Hypervisor::None => 256,
            // The domain has some of it.
            Hypervisor::Xen => 512,
        }
    }

    /// Where the machine's memory begins and ends, as its devices see it; what else they reach are registers.
    pub fn ram(&self) -> std::ops::Range<u64> {
        let start = if self.arch == Arch::Arm64 { 1 << 30 } else { 0 };
        start..start + (self.memory() << 20)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        let names: BTreeSet<_> = PLATFORMS.iter().map(|platform| platform.name).collect();
        assert_eq!(names.len(), PLATFORMS.len());
        assert!(names.iter().all(|name| Platform::named(name).is_some()));
        assert_eq!(Platform::named("vax"), None);
    }
}
