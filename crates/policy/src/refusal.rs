use crate::{FLAG, Identity};
use core::fmt;

/// Somebody will not go on. The text says who, why, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// By the device: it requires the flag, and the flag did not come back.
    FlagRequired,
    /// By the device: bits came back that it never offered.
    NeverOffered {
        /// Those bits.
        bits: u64,
    },
    /// By the driver: the device sets the flag, and on PPC (as proposed) nobody knows what that means.
    FlagOnPpc {
        /// Which device.
        identity: Identity,
    },
    /// By the driver: the device appears to be behind an IOMMU and does not say that it respects it.
    Unflagged {
        /// Which device.
        identity: Identity,
    },
}

/// One of the two ends of a virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The device.
    Device,
    /// The driver.
    Driver,
}

impl Refusal {
    /// Why a device may have refused that does not say why: it `offered` these bits, these were `acknowledged`, and it
    /// left FEATURES_OK clear. QEMU refuses so. `None` where the flag is not the reason.
    pub fn unspoken(offered: u64, acknowledged: u64) -> Option<Refusal> {
        (offered & !acknowledged & FLAG != 0).then_some(Refusal::FlagRequired)
    }

    /// Who refused.
    pub fn by(self) -> Side {
        match self {
            Refusal::FlagRequired | Refusal::NeverOffered { .. } => Side::Device,
            Refusal::FlagOnPpc { .. } | Refusal::Unflagged { .. } => Side::Driver,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Side::Device => "device",
            Side::Driver => "driver",
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::FlagRequired => f.write_str(
                "the device refuses its driver: translation by the IOMMU is required, and \
                 VIRTIO_F_ACCESS_PLATFORM (bit 33) was not acknowledged. \
                 That is no proof of an old or hostile driver: QEMU strips the bit when the machine has no vIOMMU, even \
                 though the guest took it. \
                 Give the machine a vIOMMU (such as -device intel-iommu or -device virtio-iommu-pci) and the device \
                 iommu_platform=on; or use a driver that takes the flag; or, to do without protection, set the mode \
                 from 'require' to 'offer'",
            ),
            Refusal::NeverOffered { bits } => write!(
                f,
                "the device refuses its driver: feature bits {bits:#x} were acknowledged that were never offered. \
                 The driver or the VMM is broken or hostile: report it to whoever made it; where a VMM sends \
                 bit 33 unasked, let the device offer it (mode 'offer')"
            ),
            Refusal::FlagOnPpc { identity } => write!(
                f,
                "the driver refuses the device ({identity}): it sets VIRTIO_F_ACCESS_PLATFORM (bit 33), which has no \
                 agreed meaning on this PPC platform. Turn the flag off at the device (QEMU: iommu_platform=off)"
            ),
            Refusal::Unflagged { identity } => write!(
                f,
                "the driver refuses the device ({identity}): it appears to be behind an IOMMU and does not offer \
                 VIRTIO_F_ACCESS_PLATFORM (bit 33), so it may go past the IOMMU. \
                 Turn the flag on at the device (QEMU: iommu_platform=on), or put the device on the driver's \
                 allow-list together with how it reaches memory"
            ),
        }
    }
}

impl core::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use std::string::ToString;

    #[test]
    fn a_silent_refusal_is_understood_where_the_flag_explains_it() {
        assert_eq!(Refusal::unspoken(1 | FLAG, 1), Some(Refusal::FlagRequired));
        assert_eq!(Refusal::unspoken(1 | FLAG, 1 | FLAG), None);
        assert_eq!(Refusal::unspoken(1, 0), None);
    }

    #[test]
    fn a_refusal_says_who_why_and_what_to_do() {
        let identity = Identity { vendor: 0x1af4, device: 2, slot: 0x18 };
        for (refusal, who, why, advice) in [
            (Refusal::FlagRequired, "the device", "no vIOMMU", "Give the machine a vIOMMU"),
            (Refusal::NeverOffered { bits: 1 << 40 }, "the device", "0x10000000000", "report it"),
            (Refusal::FlagOnPpc { identity }, "the driver", "PPC", "iommu_platform=off"),
            (Refusal::Unflagged { identity }, "the driver", "behind an IOMMU", "allow-list"),
        ] {
            let text = refusal.to_string();
            assert!(text.starts_with(who) && who.ends_with(&refusal.by().to_string()), "{text}");
            assert!(text.contains(why) && text.contains(advice), "{text}");
        }
    }
}
