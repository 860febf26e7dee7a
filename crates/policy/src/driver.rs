use crate::{Addressing, FLAG, Platform, Refusal};
use core::fmt;

/// What a driver does about the flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverPolicy<'a> {
    /// Does not know the flag: never takes it, always passes physical addresses.
    Old,
    /// Takes the flag wherever it is offered and always uses the DMA API.
    ///
    /// Where an IOMMU exists and an emulated device without the flag goes past it, such a driver and such a device miss
    /// each other in memory. That is why the proposal has the next policy, which a careful kernel chooses.
    New,
    /// The same, and refuses a device without the flag that appears to be behind an IOMMU.
    Refusing {
        /// The devices that it talks to nevertheless.
        allowed: &'a [Allow],
    },
}

/// Which device this is, as its bus tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The vendor: PCI's vendor or virtio-mmio's VendorID. Who makes the device, so it may lie.
    pub vendor: u32,
    /// The virtio device type (§5), 2 for a block device.
    pub device: u32,
    /// Where it is: a PCI segment, bus, device and function packed into a number, an MMIO window's address.
    pub slot: u64,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vendor {:#x}, virtio device type {}, slot {:#x}", self.vendor, self.device, self.slot)
    }
}

/// A device that is known to be good although it lacks the flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allow {
    /// See [`Identity::vendor`].
    pub vendor: u32,
    /// See [`Identity::device`].
    pub device: u32,
    /// See [`Identity::slot`]; `None` allows any. A vendor is easily forged where devices are strangers: name the slot.
    pub slot: Option<u64>,
    /// How the device reaches memory, which it can't say itself: hardware behind the IOMMU wants
    /// [`Translated`](Addressing::Translated), a VMM's device that goes past it [`Physical`](Addressing::Physical).
    pub addressing: Addressing,
}

impl Allow {
    fn names(&self, identity: Identity) -> bool {
        self.vendor == identity.vendor
            && self.device == identity.device
            && self.slot.is_none_or(|slot| slot == identity.slot)
    }
}

/// What a driver takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The feature bits to write back.
    pub features: u64,
    /// How every address that this driver hands to the device is made.
    pub addressing: Addressing,
}

/// What a driver takes of what a device offers.
///
/// `supported` is the driver's allow-list: what it implements, not what it has heard of. The flag is not for it to
/// name; everything else is, VERSION_1 included. `offered` comes from the device, who may claim anything: only what is
/// in both comes back.
///
/// # Errors
/// After a refusal the driver sets FAILED (§3.1.1) and leaves the device alone.
/// - [`Refusal::FlagOnPpc`]: the flag is offered on PPC as proposed.
/// - [`Refusal::Unflagged`]: the policy refuses devices without the flag, and this one is not on the allow-list.
pub fn driver_takes(
    platform: Platform,
    policy: DriverPolicy<'_>,
    identity: Identity,
    offered: u64,
    supported: u64,
) -> Result<Taken, Refusal> {
    let plain = offered & supported & !FLAG;
    if policy == DriverPolicy::Old {
        return Ok(Taken { features: plain, addressing: Addressing::Physical });
    }
    if offered & FLAG != 0 {
        return match platform {
            Platform::PpcProposed => Err(Refusal::FlagOnPpc { identity }),
            _ => Ok(Taken { features: plain | FLAG, addressing: Addressing::Translated }),
        };
    }
    let addressing = match policy {
        // Every device on PPC as proposed lacks the flag and goes past the IOMMU: refusing them would leave none.
        DriverPolicy::Refusing { allowed } if platform.appears_behind_iommu() && platform != Platform::PpcProposed => {
            let allow = allowed.iter().find(|allow| allow.names(identity));
            allow.ok_or(Refusal::Unflagged { identity })?.addressing
        }
        // PPC: without the flag the driver goes past the DMA API, as the device goes past the IOMMU.
        _ if matches!(platform, Platform::PpcProposed | Platform::PpcToday) => Addressing::Physical,
        _ => Addressing::Translated,
    };
    Ok(Taken { features: plain, addressing })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Identity = Identity { vendor: 0x1af4, device: 2, slot: 0x18 };
    const SUPPORTED: u64 = 1 << 32 | 1 << 9;

    #[test]
    fn only_what_is_offered_and_supported_is_taken() {
        let take = |policy, offered| driver_takes(Platform::X86, policy, DISK, offered, SUPPORTED).unwrap().features;
        assert_eq!(take(DriverPolicy::New, u64::MAX), SUPPORTED | FLAG);
        assert_eq!(take(DriverPolicy::New, 1 << 9 | 1 << 5), 1 << 9);
        assert_eq!(take(DriverPolicy::Old, u64::MAX), SUPPORTED);
    }

    #[test]
    fn an_allow_list_can_not_smuggle_the_flag_in_through_the_supported_set() {
        let old = driver_takes(Platform::X86Iommu, DriverPolicy::Old, DISK, u64::MAX, u64::MAX).unwrap();
        assert_eq!(old, Taken { features: !FLAG, addressing: Addressing::Physical });
        let new = driver_takes(Platform::X86, DriverPolicy::New, DISK, SUPPORTED, u64::MAX).unwrap();
        assert_eq!(new.features, SUPPORTED);
    }

    #[test]
    fn an_allow_list_names_a_device_exactly() {
        let allow = |vendor, device, slot| Allow { vendor, device, slot, addressing: Addressing::Translated };
        for (entry, allowed) in [
            (allow(0x1af4, 2, None), true),
            (allow(0x1af4, 2, Some(0x18)), true),
            (allow(0x1af4, 2, Some(0x20)), false),
            (allow(0x1af4, 1, Some(0x18)), false),
            (allow(0x1af5, 2, None), false),
        ] {
            let policy = DriverPolicy::Refusing { allowed: &[entry] };
            let taken = driver_takes(Platform::X86Iommu, policy, DISK, SUPPORTED, SUPPORTED);
            let expected = Ok(Taken { features: SUPPORTED, addressing: Addressing::Translated });
            assert_eq!(taken, if allowed { expected } else { Err(Refusal::Unflagged { identity: DISK }) }, "{entry:?}");
        }
    }

    #[test]
    fn the_allow_list_says_how_a_device_reaches_memory() {
        for addressing in [Addressing::Physical, Addressing::Translated] {
            let allowed = &[Allow { vendor: 0x1af4, device: 2, slot: None, addressing }];
            let policy = DriverPolicy::Refusing { allowed };
            let taken = driver_takes(Platform::X86Iommu, policy, DISK, SUPPORTED, SUPPORTED).unwrap();
            assert_eq!(taken.addressing, addressing);
        }
    }
}
