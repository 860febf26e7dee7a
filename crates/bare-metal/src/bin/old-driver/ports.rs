//! PCI's configuration, as the driver wants it.

use ringfence_bare_metal::pci::{self, Place};
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction};

/// By ports 0xcf8 and 0xcfc.
pub(crate) struct Ports;

impl ConfigurationAccess for Ports {
    fn read_word(&self, place: DeviceFunction, register: u8) -> u32 {
        pci::read(at(place), register)
    }

    fn write_word(&mut self, place: DeviceFunction, register: u8, value: u32) {
        // SAFETY: the driver and `main` write to the disk's function alone, which then
        // goes by the addresses that the driver gives it.
        unsafe { pci::write(at(place), register, value) }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

/// The place by its other name.
pub(crate) fn at(DeviceFunction { bus, device, function }: DeviceFunction) -> Place {
    Place { bus, device, function }
}
