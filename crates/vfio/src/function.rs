use crate::sys::{self, Mapping, Region};
use crate::vector::Vector;
use ringfence_dma::RegisterWindow;
use ringfence_driver::Registers;
use ringfence_driver::pci::{Bar, BarKind, Function as PciFunction};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A PCI function that VFIO has opened for us.
#[derive(Debug)]
pub struct Function {
    device: File,
    /// Where the configuration space is in the device's file.
    config: u64,
    slot: u64,
}

/// VFIO_PCI_CONFIG_REGION_INDEX. The first six are the BARs.
const CONFIG_REGION: u32 = 7;

/// VFIO_REGION_INFO_FLAG_MMAP.
const CAN_BE_MAPPED: u32 = 1 << 2;

const PAGE: u64 = 4096;

/// Offsets in the configuration space.
const BARS: u8 = 0x10;

impl Function {
    pub(crate) fn new(device: File, name: &str) -> io::Result<Self> {
        let Region { offset: config, .. } = sys::region(&device, CONFIG_REGION)?;
        Ok(Self { device, config, slot: slot(name) })
    }

    /// Turns the function's MSI-X on, with so many vectors: for `Interrupts::Vectors` of `ringfence_driver::pci`, whose
    /// numbers are the places in this list.
    ///
    /// # Errors
    /// Those of VFIO_DEVICE_SET_IRQS: there are fewer, or none.
    pub fn vectors(&self, count: usize) -> io::Result<Vec<Vector>> {
        Vector::all(&self.device, count)
    }
}

/// "SSSS:BB:DD.F" as segment, bus, device and function packed into a number.
fn slot(name: &str) -> u64 {
    let mut parts = name.split([':', '.']).map(|part| u64::from_str_radix(part, 16).unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    let (segment, bus, device, function) = (next(), next(), next(), next());
    segment << 16 | bus << 8 | device << 3 | function
}

impl PciFunction for Function {
    type Registers = RegisterMapping;

    fn slot(&self) -> u64 {
        self.slot
    }

    /// Where the kernel does not answer, as with hardware: all ones.
    fn read(&mut self, offset: u8) -> u32 {
        let mut bytes = [0xff; 4];
        let _ = self.device.read_exact_at(&mut bytes, self.config + u64::from(offset));
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u8, value: u32) {
        // As with hardware, nobody tells.
        let _ = self.device.write_all_at(&value.to_le_bytes(), self.config + u64::from(offset));
    }

    fn map(&mut self, bar: Bar, offset: u64, len: usize) -> Option<RegisterMapping> {
        let region = sys::region(&self.device, bar.index.into()).ok()?;
        let end = offset.checked_add(len as u64)?;
        if region.flags & CAN_BE_MAPPED == 0 || end > region.size {
            return None;
        }
        let first = offset - offset % PAGE;
        let mapping = Mapping::of(&self.device, region.offset + first, (end - first) as usize).ok()?;
        // SAFETY: within the mapping, whose first page `offset` is in.
        let start = unsafe { mapping.start().add((offset - first) as usize) };
        // SAFETY: the window is of a device's BAR, and lives as long as the mapping beside it, below. The kernel maps BARs
        // uncached.
        let window = unsafe { RegisterWindow::new(start, len) };
        Some(RegisterMapping { window, _mapping: mapping })
    }

    fn bar(&mut self, index: u8) -> Option<BarKind> {
        let register = |function: &mut Self, index: u8| function.read(BARS + 4 * index);
        // The upper half of the one before is none.
        let mut at = 0;
        while at < index {
            at += if register(self, at) & 7 == 4 { 2 } else { 1 };
        }
        if at != index {
            return None;
        }
        let region = sys::region(&self.device, index.into()).ok()?;
        match region.size {
            0 => None,
            _ if register(self, index) & 1 != 0 => Some(BarKind::Io),
            // The address is the kernel's business: it maps by number.
            len => Some(BarKind::Memory(Bar { index, address: 0, len })),
        }
    }
}

/// Registers of a function, mapped.
#[derive(Debug)]
pub struct RegisterMapping {
    window: RegisterWindow<'static>,
    /// What the window is of.
    _mapping: Mapping,
}

impl Registers for RegisterMapping {
    #[inline]
    fn len(&self) -> usize {
        self.window.len()
    }

    #[inline]
    fn read_u8(&self, offset: usize) -> u8 {
        self.window.read_u8(offset)
    }

    #[inline]
    fn read_u16(&self, offset: usize) -> u16 {
        self.window.read_u16(offset)
    }

    #[inline]
    fn read_u32(&self, offset: usize) -> u32 {
        self.window.read_u32(offset)
    }

    #[inline]
    fn write_u8(&self, offset: usize, value: u8) {
        self.window.write_u8(offset, value);
    }

    #[inline]
    fn write_u16(&self, offset: usize, value: u16) {
        self.window.write_u16(offset, value);
    }

    #[inline]
    fn write_u32(&self, offset: usize, value: u32) {
        self.window.write_u32(offset, value);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_name_is_a_slot() {
        assert_eq!(super::slot("0000:00:03.0"), 0x18);
        assert_eq!(super::slot("0001:02:1f.7"), 0x1_02ff);
    }
}
