//! A look at the device's common configuration beside the driver (§4.1.4.3): what the device holds of the driver's
//! doing, which the driver itself does not ask.

use core::fmt;

use virtio_drivers::Hal;
use virtio_drivers::transport::pci::VIRTIO_PCI_CAP_COMMON_CFG;
use virtio_drivers::transport::pci::bus::{DeviceFunction, PCI_CAP_ID_VNDR, PciRoot};

use crate::flat::Flat;
use crate::ports::Ports;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const DEVICE_STATUS: usize = 0x14;
const LENGTH: usize = 0x38;

/// The registers of one device.
pub(crate) struct CommonConfig(*mut u8);

impl CommonConfig {
    /// Finds them by the device's capabilities; none in a device of before virtio 1.0.
    pub(crate) fn of(root: &mut PciRoot<Ports>, place: DeviceFunction) -> Option<Self> {
        let capability = root.capabilities(place).find(|capability| {
            let kind = capability.private_header >> 8;
            capability.id == PCI_CAP_ID_VNDR && kind == u16::from(VIRTIO_PCI_CAP_COMMON_CFG)
        })?;
        let at = |offset| ringfence_bare_metal::pci::read(crate::ports::at(place), capability.offset + offset);
        let (bar, offset) = (at(4) as u8, at(8));
        let (start, _) = root.bar_info(place, bar).ok()??.memory_address_size()?;
        // SAFETY: the device says that its registers are there.
        let start = unsafe { Flat::mmio_phys_to_virt(start + u64::from(offset), LENGTH) };
        Some(Self(start.as_ptr()))
    }

    /// The features that the device offers.
    pub(crate) fn offered(&self) -> Bits {
        self.features(DEVICE_FEATURE_SELECT, DEVICE_FEATURE)
    }

    /// The features that the driver has written.
    pub(crate) fn acknowledged(&self) -> Bits {
        self.features(DRIVER_FEATURE_SELECT, DRIVER_FEATURE)
    }

    /// The device status (§2.1).
    pub(crate) fn status(&self) -> u8 {
        // SAFETY: a register of the device, see `of`.
        unsafe { self.0.add(DEVICE_STATUS).read_volatile() }
    }

    fn features(&self, select: usize, feature: usize) -> Bits {
        let halves = [0, 1].map(|half: u32| {
            // SAFETY: registers of the device, see `of`; the driver sets its choice before each use.
            unsafe {
                self.0.add(select).cast::<u32>().write_volatile(half);
                self.0.add(feature).cast::<u32>().read_volatile()
            }
        });
        Bits(u64::from(halves[1]) << 32 | u64::from(halves[0]))
    }
}

/// Features as sysfs writes them: 64 characters, bit 0 first.
pub(crate) struct Bits(u64);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:064b}", self.0.reverse_bits())
    }
}
