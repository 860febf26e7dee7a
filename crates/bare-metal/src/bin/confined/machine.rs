//! What a kernel brings along for `ringfence-driver`: its memory as buffers, and its PCI functions.

use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, Ordering};

use ringfence_bare_metal::memory;
use ringfence_bare_metal::pci::{self, Place};
use ringfence_dma::{Buffer, Gpa, HostSlice, RegisterWindow};
use ringfence_driver::Spin;
use ringfence_driver::mmio::{self, MmioError};
use ringfence_driver::pci::{Bar, Function, PciError};

pub(crate) const MIB: usize = 1 << 20;

/// What `entry.s` maps.
const MAPPED: u64 = 1 << 32;

/// Memory for devices, apart from everything that is a Rust value.
#[repr(C, align(4096))]
struct Memory<const SIZE: usize>(UnsafeCell<[u8; SIZE]>);

// SAFETY: touched by way of `HostSlice` alone, which is made for sharing.
unsafe impl<const SIZE: usize> Sync for Memory<SIZE> {}

static OWN: Memory<{ MIB / 4 }> = Memory(UnsafeCell::new([0; _]));
/// Enough where an IOMMU has pages of 64 KiB, too: each piece of a ring has some of its own.
static RINGS: Memory<MIB> = Memory(UnsafeCell::new([0; _]));
static DATA: Memory<MIB> = Memory(UnsafeCell::new([0; _]));

/// One of three pieces of memory.
#[derive(Clone, Copy)]
pub(crate) enum Pages {
    /// For the IOMMU's own rings, at physical addresses.
    Own,
    /// For the rings of who is behind it.
    Rings,
    /// For data: 1 MiB.
    Data,
}

/// That memory. Each is taken once.
pub(crate) fn take(pages: Pages) -> Buffer<'static> {
    static TAKEN: AtomicU8 = AtomicU8::new(0);
    let bit = 1 << pages as u8;
    assert!(TAKEN.fetch_or(bit, Ordering::Relaxed) & bit == 0, "taken before");
    let (start, len) = match pages {
        Pages::Own => (OWN.0.get().cast::<u8>(), MIB / 4),
        Pages::Rings => (RINGS.0.get().cast(), MIB),
        Pages::Data => (DATA.0.get().cast(), MIB),
    };
    let start = NonNull::new(start).expect("a static is not at zero");
    // SAFETY: a static of so many bytes, to which there is no reference, now or ever.
    let memory = unsafe { HostSlice::new(start, len) };
    // Memory is mapped to itself.
    Buffer::new(memory, Gpa(start.as_ptr() as u64))
}

/// A virtio device on PCI, of a type that was looked for.
#[derive(Clone, Copy)]
pub(crate) struct Device(Place);

/// The transport to one.
pub(crate) type Pci = ringfence_driver::pci::Pci<Device, Spin>;

/// All modern and transitional devices of a type, on any bus.
pub(crate) fn find(kind: u16) -> impl Iterator<Item = Device> {
    let places = (0..=u8::MAX)
        .flat_map(|bus| (0..32).flat_map(move |device| (0..8).map(move |function| Place { bus, device, function })));
    places
        .filter(move |&place| {
            // Function 0 says whether there are others.
            let head = Place { function: 0, ..place };
            if place.function > 0 && pci::read(head, 0x0c) >> 23 & 1 == 0 {
                return false;
            }
            match pci::read(place, 0) {
                id if id as u16 != 0x1af4 => false,
                id if (id >> 16) < 0x1040 => pci::read(place, 0x2c) >> 16 == kind.into(),
                id => id >> 16 == 0x1040 + u32::from(kind),
            }
        })
        .map(Device)
}

/// The transport to a device behind registers in memory.
pub(crate) type Mmio = mmio::Mmio<RegisterWindow<'static>, Spin>;

/// All devices of QEMU's microvm, which says on its command line for Linux that it has up to 24 places for them here. A
/// legacy one is an error.
pub(crate) fn windows() -> impl Iterator<Item = Result<Mmio, MmioError>> {
    const FIRST: usize = 0xfeb0_0000;
    const LEN: usize = 0x200;
    let places = (0..24).filter_map(|place| NonNull::new((FIRST + place * LEN) as *mut u8));
    places.enumerate().filter_map(|(place, start)| {
        // SAFETY: `entry.s` maps it to itself, and whatever is there is no memory.
        let registers = unsafe { RegisterWindow::new(start, LEN) };
        match Mmio::new(registers, place as u64, Spin(u32::MAX)) {
            Err(MmioError::Empty | MmioError::NotVirtio { .. }) => None,
            device => Some(device),
        }
    })
}

impl Device {
    /// The transport, which waits as long as the watchdog lets it.
    pub(crate) fn open(self) -> Result<Pci, PciError> {
        Pci::new(self, Spin(u32::MAX))
    }

    /// The transport, which does not wait for long.
    pub(crate) fn open_hasty(self) -> Result<Pci, PciError> {
        Pci::new(self, Spin(1_000_000))
    }

    /// How the function calls itself on the bus, and towards an IOMMU.
    pub(crate) fn requester(self) -> u32 {
        let Place { bus, device, function } = self.0;
        u32::from(bus) << 8 | u32::from(device) << 3 | u32::from(function)
    }
}

impl Function for Device {
    type Registers = RegisterWindow<'static>;

    fn slot(&self) -> u64 {
        self.requester().into()
    }

    fn read(&mut self, offset: u8) -> u32 {
        pci::read(self.0, offset)
    }

    fn write(&mut self, offset: u8, value: u32) {
        // SAFETY: the driver makes a function a bus master once it has told it of memory that is lent to it, and moves
        // none.
        unsafe { pci::write(self.0, offset, value) }
    }

    fn map(&mut self, bar: Bar, offset: u64, len: usize) -> Option<RegisterWindow<'static>> {
        let (first, end) = (bar.address + offset, bar.address + offset + len as u64);
        // The function may say anything of its BARs.
        if end > MAPPED || memory::ram().any(|range| first <= *range.end() && *range.start() < end) {
            return None;
        }
        let start = NonNull::new(first as *mut u8)?;
        // SAFETY: `entry.s` maps it to itself, and it is no memory.
        Some(unsafe { RegisterWindow::new(start, len) })
    }
}
