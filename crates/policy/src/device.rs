use crate::{Addressing, FLAG, Platform, Refusal};
use core::fmt;
use core::str::FromStr;

/// What a device is configured to do about the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum IommuMode {
    /// An old device: the flag is not offered.
    Off,
    /// The flag is offered, and everything is translated once it is taken.
    #[default]
    Offer,
    /// The flag is offered, and a driver that does not take it is refused.
    Require,
}

impl IommuMode {
    /// Every mode.
    pub const ALL: [IommuMode; 3] = [IommuMode::Off, IommuMode::Offer, IommuMode::Require];

    /// The feature bits to offer: `device_bits`, with the flag or without it as the mode says.
    ///
    /// `device_bits` is all that the device supports otherwise, VERSION_1 and a transport's own bits included: they are
    /// the caller's business and pass through untouched. If the flag is among them (another process's device) the mode
    /// still decides.
    pub fn offers(self, device_bits: u64) -> u64 {
        match self {
            IommuMode::Off => device_bits & !FLAG,
            IommuMode::Offer | IommuMode::Require => device_bits | FLAG,
        }
    }

    /// What the device does with the driver's answer: `offered` is what [`offers`](Self::offers) said, `acknowledged`
    /// what came back from the peer, who may have written anything. A transport's own bits (vhost-user's bit 30) are
    /// the caller's to remove from `acknowledged`, or to have in `offered`.
    ///
    /// # Errors
    /// After a refusal no ring of the device may run: FEATURES_OK stays clear, or the connection closes.
    /// - [`Refusal::NeverOffered`]: bits came back that were not offered.
    /// - [`Refusal::FlagRequired`]: the mode is [`Require`](IommuMode::Require) and the flag did not come back.
    pub fn accept(self, offered: u64, acknowledged: u64) -> Result<Addressing, Refusal> {
        let bits = acknowledged & !offered;
        if bits != 0 {
            return Err(Refusal::NeverOffered { bits });
        }
        match (self, acknowledged & FLAG != 0) {
            (IommuMode::Require, false) => Err(Refusal::FlagRequired),
            (_, false) => Ok(Addressing::Physical),
            (_, true) => Ok(Addressing::Translated),
        }
    }
}

impl FromStr for IommuMode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        match text {
            "off" => Ok(IommuMode::Off),
            "offer" => Ok(IommuMode::Offer),
            "require" => Ok(IommuMode::Require),
            _ => Err(UnknownMode),
        }
    }
}

impl fmt::Display for IommuMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            IommuMode::Off => "off",
            IommuMode::Offer => "offer",
            IommuMode::Require => "require",
        })
    }
}

/// The text names no [`IommuMode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownMode;

impl fmt::Display for UnknownMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an IOMMU mode: expected off, offer or require")
    }
}

impl core::error::Error for UnknownMode {}

/// The kinds of device that the proposal tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// Part of a VMM that does not know the flag. Goes past any IOMMU.
    OldEmulated,
    /// Part of a VMM that knows the flag.
    NewEmulated,
    /// The same with `iommu=on`: refuses a driver that does not take the flag.
    NewEmulatedRequiring,
    /// An old one whose VMM has somebody between it and the guest, who knows the flag and copies.
    Wrapped,
    /// Hardware that does not know the flag, behind the host's IOMMU where there is one.
    OldPhysical,
    /// Hardware that sets the flag, behind the host's IOMMU where there is one.
    NewPhysical,
}

/// What becomes of an address that a device sends, whatever was negotiated: a device can't talk itself out of hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// It goes to memory as it is.
    Untranslated,
    /// It goes through the platform's IOMMU.
    ThroughIommu,
}

impl DeviceKind {
    /// Every kind, in the order of a table.
    pub const ALL: [DeviceKind; 6] = [
        DeviceKind::OldEmulated,
        DeviceKind::NewEmulated,
        DeviceKind::NewEmulatedRequiring,
        DeviceKind::Wrapped,
        DeviceKind::OldPhysical,
        DeviceKind::NewPhysical,
    ];

    /// Whether it is hardware.
    pub fn is_physical(self) -> bool {
        matches!(self, DeviceKind::OldPhysical | DeviceKind::NewPhysical)
    }

    /// What the device offers and insists on.
    ///
    /// A VMM knows its platform and, by the proposal, never sets the flag on PPC, where it therefore can't require it
    /// either. Hardware does not know where it is plugged in.
    pub fn mode(self, platform: Platform) -> IommuMode {
        match self {
            DeviceKind::OldEmulated | DeviceKind::OldPhysical => IommuMode::Off,
            DeviceKind::NewEmulated | DeviceKind::NewEmulatedRequiring | DeviceKind::Wrapped
                if platform == Platform::PpcProposed =>
            {
                IommuMode::Off
            }
            DeviceKind::NewEmulated | DeviceKind::Wrapped | DeviceKind::NewPhysical => IommuMode::Offer,
            DeviceKind::NewEmulatedRequiring => IommuMode::Require,
        }
    }

    /// What becomes of the device's accesses. A new device respects the IOMMU if there is one, taken or not, except on
    /// PPC as proposed. A grant is made to a domain, of which hardware is none: it knows no more of grants than an old
    /// device does.
    pub fn reach(self, platform: Platform) -> Reach {
        let past_it = match self {
            DeviceKind::OldEmulated => true,
            DeviceKind::NewEmulated | DeviceKind::NewEmulatedRequiring | DeviceKind::Wrapped => {
                platform == Platform::PpcProposed
            }
            DeviceKind::OldPhysical | DeviceKind::NewPhysical => platform == Platform::XenGrants,
        };
        if platform.has_iommu() && !past_it { Reach::ThroughIommu } else { Reach::Untranslated }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DeviceKind::OldEmulated => "old emulated",
            DeviceKind::NewEmulated => "new emulated",
            DeviceKind::NewEmulatedRequiring => "new emulated, iommu=on",
            DeviceKind::Wrapped => "old emulated, wrapped",
            DeviceKind::OldPhysical => "old physical",
            DeviceKind::NewPhysical => "new physical",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use std::string::ToString;

    const OTHER: u64 = 1 << 32 | 1 << 29;

    #[test]
    fn every_answer_to_every_mode() {
        let refused = Err(Refusal::FlagRequired);
        for (mode, answer, expected) in [
            (IommuMode::Off, 0, Ok(Addressing::Physical)),
            (IommuMode::Off, OTHER, Ok(Addressing::Physical)),
            (IommuMode::Off, OTHER | FLAG, Err(Refusal::NeverOffered { bits: FLAG })),
            (IommuMode::Offer, 0, Ok(Addressing::Physical)),
            (IommuMode::Offer, OTHER, Ok(Addressing::Physical)),
            (IommuMode::Offer, OTHER | FLAG, Ok(Addressing::Translated)),
            (IommuMode::Require, 0, refused),
            (IommuMode::Require, OTHER, refused),
            (IommuMode::Require, OTHER | FLAG, Ok(Addressing::Translated)),
            (IommuMode::Require, FLAG, Ok(Addressing::Translated)),
            (IommuMode::Require, u64::MAX, Err(Refusal::NeverOffered { bits: !(OTHER | FLAG) })),
        ] {
            assert_eq!(mode.accept(mode.offers(OTHER), answer), expected, "{mode}, {answer:#x}");
        }
    }

    #[test]
    fn the_mode_decides_even_where_the_device_has_the_flag_already() {
        assert_eq!(IommuMode::Off.offers(OTHER | FLAG), OTHER);
        assert_eq!(IommuMode::Offer.offers(OTHER | FLAG), OTHER | FLAG);
    }

    #[test]
    fn the_flag_is_the_one_of_the_standard() {
        assert_eq!(FLAG, 1 << 33);
    }

    #[test]
    fn modes_read_as_they_print() {
        for mode in IommuMode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!("on".parse::<IommuMode>(), Err(UnknownMode));
    }
}
