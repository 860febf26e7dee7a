//! PCI's configuration space by the ports of old: 256 bytes a function, every PC has it.

use crate::port;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// A function's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// 0 to 255.
    pub bus: u8,
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

/// Reads the four bytes at `register`, a multiple of four; all ones where nobody is.
pub fn read(place: Place, register: u8) -> u32 {
    port::write_32(ADDRESS, address(place, register));
    port::read_32(DATA)
}

/// Writes the four bytes at `register`, a multiple of four.
///
/// # Safety
///
/// A function that is made a bus master, or moved, can write to any memory.
pub unsafe fn write(place: Place, register: u8, value: u32) {
    port::write_32(ADDRESS, address(place, register));
    port::write_32(DATA, value);
}

fn address(Place { bus, device, function }: Place, register: u8) -> u32 {
    assert!(device < 32 && function < 8 && register.is_multiple_of(4), "no such place in PCI's configuration");
    ENABLE | u32::from(bus) << 16 | u32::from(device) << 11 | u32::from(function) << 8 | u32::from(register)
}
