use crate::wire::{self, DESCRIPTOR};
use crate::{Format, Position};
use core::fmt;
use ringfence_dma::BusAddr;

/// Where the three areas of a queue lie, and for how many descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How many descriptors: 1 to 32768; a power of two for a split ring.
    pub size: u16,
    /// The descriptor table, or ring.
    pub descriptors: BusAddr,
    /// What the driver writes: the avail ring, or the driver's event suppression.
    pub driver: BusAddr,
    /// What the device writes: the used ring, or the device's event suppression.
    pub device: BusAddr,
}

/// One of the three areas of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RingArea {
    /// The descriptor table, or ring.
    Descriptors,
    /// What the driver writes.
    Driver,
    /// What the device writes.
    Device,
}

/// A queue can't be as it was described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// A size that the format does not have.
    Size {
        /// The size, in descriptors.
        size: u16,
        /// The format.
        format: Format,
    },
    /// An area that is not aligned as it must be (§2.7, §2.8.10.1).
    Misaligned {
        /// Which.
        area: RingArea,
        /// Where it starts.
        addr: BusAddr,
        /// What that has to be a multiple of.
        align: u32,
    },
    /// An area that runs past the end of the address space.
    Wraps {
        /// Which.
        area: RingArea,
        /// Where it starts.
        addr: BusAddr,
    },
    /// A position outside of the ring, or with more entries under way than the ring has.
    Position {
        /// The position.
        position: Position,
        /// How many descriptors the ring has.
        size: u16,
    },
    /// A split ring's base that is no 16-bit index.
    Base {
        /// The base.
        base: u32,
    },
}

impl RingArea {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Descriptors, Self::Driver, Self::Device];

    /// How many bytes the area has for `size` descriptors, room for `VIRTIO_F_EVENT_IDX`'s fields included.
    pub const fn len(self, format: Format, size: u16) -> u32 {
        match (format, self) {
            (_, Self::Descriptors) => DESCRIPTOR * size as u32,
            (Format::Split, Self::Driver) => 6 + 2 * size as u32,
            (Format::Split, Self::Device) => 6 + 8 * size as u32,
            (Format::Packed, Self::Driver | Self::Device) => 4,
        }
    }

    /// What the area's address has to be a multiple of.
    pub const fn align(self, format: Format) -> u32 {
        match (format, self) {
            (_, Self::Descriptors) => 16,
            (Format::Split, Self::Driver) => 2,
            (Format::Split, Self::Device) | (Format::Packed, _) => 4,
        }
    }
}

impl Layout {
    /// Where `area` starts.
    pub const fn addr(&self, area: RingArea) -> BusAddr {
        match area {
            RingArea::Descriptors => self.descriptors,
            RingArea::Driver => self.driver,
            RingArea::Device => self.device,
        }
    }

    /// Whether a ring of `format` can lie there.
    ///
    /// # Errors
    /// What is wrong first.
    pub fn check(&self, format: Format) -> Result<(), LayoutError> {
        check_size(format, self.size)?;
        for area in RingArea::ALL {
            let (addr, align) = (self.addr(area), area.align(format));
            if addr.0 % u64::from(align) != 0 {
                return Err(LayoutError::Misaligned { area, addr, align });
            }
            if addr.last(area.len(format, self.size).into()).is_none() {
                return Err(LayoutError::Wraps { area, addr });
            }
        }
        Ok(())
    }
}

pub(crate) fn check_size(format: Format, size: u16) -> Result<(), LayoutError> {
    let possible = match format {
        Format::Split => size.is_power_of_two(),
        Format::Packed => (1..=1 << 15).contains(&size),
    };
    if possible { Ok(()) } else { Err(LayoutError::Size { size, format }) }
}

// The offsets of `wire` end where the areas end.
const _: () = {
    assert!(RingArea::Driver.len(Format::Split, 8) == 4 + 2 * 8 + 2);
    assert!(RingArea::Device.len(Format::Split, 8) == 4 + 8 * 8 + 2);
    assert!(wire::packed::FLAGS + 2 == DESCRIPTOR as usize);
};

impl fmt::Display for RingArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RingArea::Descriptors => "descriptor area",
            RingArea::Driver => "driver area",
            RingArea::Device => "device area",
        })
    }
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            LayoutError::Size { size, format: Format::Split } => {
                write!(f, "a split ring can't have {size} descriptors: it takes a power of two up to 32768")
            }
            LayoutError::Size { size, format: Format::Packed } => {
                write!(f, "a packed ring can't have {size} descriptors: it takes 1 to 32768")
            }
            LayoutError::Misaligned { area, addr, align } => {
                write!(f, "the {area} at {addr} is not aligned to {align} bytes")
            }
            LayoutError::Wraps { area, addr } => write!(f, "the {area} at {addr} passes the end of the address space"),
            LayoutError::Position { position: Position { avail, used }, size } => {
                write!(f, "no ring of {size} descriptors can be at avail {avail:#06x}, used {used:#06x}")
            }
            LayoutError::Base { base } => write!(f, "a split ring's base is a 16-bit index, not {base:#x}"),
        }
    }
}

impl core::error::Error for LayoutError {}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: Layout =
        Layout { size: 256, descriptors: BusAddr(0x1000), driver: BusAddr(0x2000), device: BusAddr(0x3000) };

    #[test]
    fn layouts() {
        use Format::{Packed, Split};
        use RingArea::{Descriptors, Device, Driver};
        let size = |size| Layout { size, ..FINE };
        let descriptors = |addr| Layout { descriptors: BusAddr(addr), ..FINE };
        let driver = |addr| Layout { driver: BusAddr(addr), ..FINE };
        let device = |addr| Layout { device: BusAddr(addr), ..FINE };
        let misaligned = |area, addr, align| Err(LayoutError::Misaligned { area, addr: BusAddr(addr), align });
        let wraps = |area, addr| Err(LayoutError::Wraps { area, addr: BusAddr(addr) });
        for (layout, format, expected) in [
            (FINE, Split, Ok(())),
            (FINE, Packed, Ok(())),
            (size(0), Split, Err(LayoutError::Size { size: 0, format: Split })),
            (size(0), Packed, Err(LayoutError::Size { size: 0, format: Packed })),
            (size(1), Split, Ok(())),
            (size(3), Split, Err(LayoutError::Size { size: 3, format: Split })),
            (size(3), Packed, Ok(())),
            (size(32768), Split, Ok(())),
            (size(32768), Packed, Ok(())),
            (size(32769), Packed, Err(LayoutError::Size { size: 32769, format: Packed })),
            (descriptors(0x1008), Split, misaligned(Descriptors, 0x1008, 16)),
            (descriptors(0x1008), Packed, misaligned(Descriptors, 0x1008, 16)),
            (driver(0x2001), Split, misaligned(Driver, 0x2001, 2)),
            (driver(0x2002), Split, Ok(())),
            (driver(0x2002), Packed, misaligned(Driver, 0x2002, 4)),
            (device(0x3002), Split, misaligned(Device, 0x3002, 4)),
            (device(0x3002), Packed, misaligned(Device, 0x3002, 4)),
            (descriptors(0u64.wrapping_sub(256 * 16)), Split, Ok(())),
            (descriptors(0u64.wrapping_sub(255 * 16)), Split, wraps(Descriptors, 0u64.wrapping_sub(255 * 16))),
            (driver(0u64.wrapping_sub(518)), Split, Ok(())),
            (driver(0u64.wrapping_sub(516)), Split, wraps(Driver, 0u64.wrapping_sub(516))),
            (device(0u64.wrapping_sub(2056)), Split, Ok(())),
            (device(0u64.wrapping_sub(2052)), Split, wraps(Device, 0u64.wrapping_sub(2052))),
            (device(0u64.wrapping_sub(4)), Packed, Ok(())),
        ] {
            assert_eq!(layout.check(format), expected, "{format:?} {layout:?}");
        }
    }
}
