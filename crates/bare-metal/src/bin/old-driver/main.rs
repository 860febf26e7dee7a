//! The old driver of the proposal, for real: a kernel whose disk driver is the crate `virtio-drivers`, unmodified. It
//! takes neither the flag nor a refusal: it acknowledges the features it knows, sets FEATURES_OK and goes on without
//! looking at what became of it (§3.1.1 step 6). Addresses are physical, and no IOMMU is programmed.
//!
//! It does to the disk what Linux guests do in `init.sh` of `ringfence-guests`, and prints the same lines. There `kernel`
//! is the driver, and `features` and `status` are what the device holds after the driver has written DRIVER_OK.

#![no_std]
#![no_main]

mod common_config;
mod flat;
mod ports;

use core::fmt;

use ringfence_bare_metal::{finish, memory, tell, watchdog};
use sha2::{Digest, Sha256};
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{Command, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};

use crate::common_config::CommonConfig;
use crate::flat::Flat;
use crate::ports::Ports;

type Disk = VirtIOBlk<Flat, PciTransport>;

const MIB: usize = 1 << 20;
const SECTORS_PER_MIB: usize = MIB / SECTOR_SIZE;

/// How long the device may be silent, as in `init.sh`: an emulated processor on a busy machine is slow.
const PATIENCE: u32 = 20;

#[unsafe(no_mangle)]
extern "C" fn guest() -> ! {
    tell("kernel", "virtio-drivers-0.13.0");
    memory::ram().for_each(|range| tell("ram", format_args!("{:08x}-{:08x}", range.start(), range.end())));
    watchdog::allow(PATIENCE, stuck);
    let mut root = PciRoot::new(Ports);
    let Some(place) = find(&root) else { refuse("absent", "no virtio disk on PCI") };
    root.set_command(place, Command::MEMORY_SPACE | Command::BUS_MASTER);
    let config = CommonConfig::of(&mut root, place);
    let driver = start(&mut root, place);
    if let Some(config) = config {
        tell("offered", config.offered());
        tell("features", config.acknowledged());
        tell("status", format_args!("{:#010x}", config.status()));
    }
    let mut disk = driver.unwrap_or_else(|error| refuse("absent", error));
    tell("started", PATIENCE - watchdog::seconds_left());
    let buffer = flat::buffer();
    if let Err(error) = disk.read_blocks(0, &mut buffer[..4096]) {
        refuse("stuck", format_args!("first read: {error}"));
    }
    tell("disk", "ready");
    match work(&mut disk, buffer) {
        Ok(()) => finish("done"),
        Err(error) => {
            tell("error", error);
            finish("failed")
        }
    }
}

/// The first disk on any bus.
fn find(root: &PciRoot<Ports>) -> Option<DeviceFunction> {
    let mut functions = (0..=u8::MAX).flat_map(|bus| root.enumerate_bus(bus));
    functions.find(|(_, info)| virtio_device_type(info) == Some(DeviceType::Block)).map(|(place, _)| place)
}

fn start(root: &mut PciRoot<Ports>, place: DeviceFunction) -> Result<Disk, Failure> {
    let transport = PciTransport::new::<Flat, _>(root, place).map_err(Failure::Transport)?;
    Disk::new(transport).map_err(|error| Failure::Request("start", 0, error))
}

/// Reads all, writes half, reads all again.
fn work(disk: &mut Disk, buffer: &mut [u8; MIB]) -> Result<(), Failure> {
    let sectors = disk.capacity();
    let mib = usize::try_from(sectors).unwrap_or(0) / SECTORS_PER_MIB;
    if mib < 2 || sectors != (mib * SECTORS_PER_MIB) as u64 {
        return Err(Failure::Size(sectors));
    }
    tell("read", digest(disk, buffer, mib, MIB)?);
    // The second half becomes the first, moved down by a MiB; the MiB that falls off
    // goes to the end, in small pieces.
    let half = mib / 2;
    for index in 1..half {
        copy(disk, &mut buffer[..], index, half + index - 1, MIB)?;
    }
    copy(disk, &mut buffer[..], 0, 2 * half - 1, 4096)?;
    disk.flush().map_err(|error| Failure::Request("flush", 0, error))?;
    tell("written", digest(disk, buffer, mib, MIB / 4)?);
    Ok(())
}

/// Copies the MiB numbered `from` to the one numbered `to`, in pieces of `piece` bytes.
fn copy(disk: &mut Disk, buffer: &mut [u8], from: usize, to: usize, piece: usize) -> Result<(), Failure> {
    let buffer = &mut buffer[..piece];
    for offset in (0..SECTORS_PER_MIB).step_by(piece / SECTOR_SIZE) {
        read(disk, from * SECTORS_PER_MIB + offset, buffer)?;
        let sector = to * SECTORS_PER_MIB + offset;
        watchdog::allow(PATIENCE, silent);
        disk.write_blocks(sector, buffer).map_err(|error| Failure::Request("write", sector, error))?;
    }
    Ok(())
}

/// SHA-256 of all of the disk's `mib` MiB, read in pieces of `piece` bytes.
fn digest(disk: &mut Disk, buffer: &mut [u8], mib: usize, piece: usize) -> Result<Hex, Failure> {
    let buffer = &mut buffer[..piece];
    let mut hasher = Sha256::new();
    for sector in (0..mib * SECTORS_PER_MIB).step_by(piece / SECTOR_SIZE) {
        read(disk, sector, buffer)?;
        hasher.update(&*buffer);
    }
    Ok(Hex(hasher.finalize().into()))
}

fn read(disk: &mut Disk, sector: usize, buffer: &mut [u8]) -> Result<(), Failure> {
    watchdog::allow(PATIENCE, silent);
    disk.read_blocks(sector, buffer).map_err(|error| Failure::Request("read", sector, error))
}

/// The driver waits for ever; we don't.
fn stuck() -> ! {
    refuse("stuck", format_args!("no answer in {PATIENCE} s"))
}

fn silent() -> ! {
    tell("error", format_args!("no answer in {PATIENCE} s"));
    finish("failed")
}

fn refuse(disk: &str, reason: impl fmt::Display) -> ! {
    tell("disk", disk);
    tell("error", reason);
    finish("refused")
}

/// What did not work.
enum Failure {
    Transport(virtio_drivers::transport::pci::VirtioPciError),
    Request(&'static str, usize, virtio_drivers::Error),
    Size(u64),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transport(error) => write!(f, "transport: {error}"),
            Self::Request(what, sector, error) => write!(f, "{what} at sector {sector}: {error}"),
            Self::Size(sectors) => write!(f, "a disk of {sectors} sectors, not of whole MiB and two at least"),
        }
    }
}

struct Hex([u8; 32]);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
