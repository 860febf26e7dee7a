use core::fmt;

/// Where a device and its driver meet, as far as the IOMMU is concerned.
///
/// For a driver this is a statement about one device: on a machine with an IOMMU that leaves this device out, say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Platform {
    /// x86 without an IOMMU.
    X86,
    /// x86 with an IOMMU.
    X86Iommu,
    /// A Xen domain that owns devices. Its IOMMU is a fake one: the DMA API turns pseudo-physical frames into machine
    /// frames, and nothing at the device translates.
    Xen,
    /// A Xen domain whose devices are served from another domain, under grants: the DMA API lets that domain into single
    /// frames, and a reference to such a grant is the bus address. The grant table is its IOMMU.
    XenGrants,
    /// PPC by the proposal: devices go past the IOMMU, and the flag is taboo.
    PpcProposed,
    /// PPC as found on real kernels: the flag is offered and taken as elsewhere, and without it the IOMMU is bypassed.
    PpcToday,
    /// arm64 without an SMMU.
    Arm64,
    /// arm64 with an SMMU. The proposal's author was unsure; firmware describes exactly who is behind it, so that the
    /// rules for x86 hold.
    Arm64Smmu,
}

impl Platform {
    /// Every platform, in the order of a table.
    pub const ALL: [Platform; 8] = [
        Platform::X86,
        Platform::X86Iommu,
        Platform::Xen,
        Platform::XenGrants,
        Platform::PpcProposed,
        Platform::PpcToday,
        Platform::Arm64,
        Platform::Arm64Smmu,
    ];

    /// Whether a device on this platform appears, to its driver, to be behind an IOMMU. The proposal: any device
    /// whatsoever on x86 with an IOMMU, Xen's fake one included.
    pub fn appears_behind_iommu(self) -> bool {
        match self {
            Platform::X86 | Platform::Arm64 => false,
            Platform::X86Iommu
            | Platform::Xen
            | Platform::XenGrants
            | Platform::PpcProposed
            | Platform::PpcToday
            | Platform::Arm64Smmu => true,
        }
    }

    /// Whether something translates what a device sends that does not go past it.
    pub(crate) fn has_iommu(self) -> bool {
        self.appears_behind_iommu() && self != Platform::Xen
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Platform::X86 => "x86 without IOMMU",
            Platform::X86Iommu => "x86 with IOMMU",
            Platform::Xen => "Xen",
            Platform::XenGrants => "Xen with grants",
            Platform::PpcProposed => "PPC as proposed",
            Platform::PpcToday => "PPC as found today",
            Platform::Arm64 => "arm64 without SMMU",
            Platform::Arm64Smmu => "arm64 with SMMU",
        })
    }
}
