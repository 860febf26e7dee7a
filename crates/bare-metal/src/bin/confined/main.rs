//! A kernel whose devices are confined: it finds a virtio-iommu on PCI, puts a disk behind it, reads and writes, and shows
//! what happens to an access that was not allowed. A random source and a network card are tried too, if there are some.
//!
//! To be read as an example of `ringfence-driver`: [`machine`] is all that a kernel has to bring along.
//!
//! Without an IOMMU addresses are physical. With one, a disk that does not offer VIRTIO_F_ACCESS_PLATFORM is refused, unless
//! the command line has the word `allow`. With the word `mmio` the devices are those behind registers in memory (QEMU's
//! microvm, which has no PCI), at physical addresses.
//!
//! It does to the disk what Linux guests do in `init.sh` of `ringfence-guests`, and prints the same lines.

#![no_std]
#![no_main]

extern crate alloc;

mod heap;
mod machine;

use alloc::boxed::Box;
use core::error::Error;
use core::fmt;

use machine::{Device, MIB, Pages};
use ringfence_bare_metal::{finish, memory, tell, watchdog};
use ringfence_dma::{Buffer, BusAddr, DmaError, FromDevice, HostSlice, Mapped, Mapper, Permission, Streaming};
use ringfence_driver::blk::{self, Blk};
use ringfence_driver::mapper::{Direct, Paged, Window};
use ringfence_driver::net::{self, Net};
use ringfence_driver::policy::{Addressing, Allow, DriverPolicy, Platform};
use ringfence_driver::rng::Rng;
use ringfence_driver::viommu::Viommu;
use ringfence_driver::{Host, StartError, Transport};
use sha2::{Digest, Sha256};

type Failure = Box<dyn Error>;

/// Virtio device types (§5).
const NET: u16 = 1;
const DISK: u16 = 2;
const RNG: u16 = 4;
const IOMMU: u16 = 23;

/// How many pages each device may be shown at once: 16 MiB.
const WINDOW: usize = 4096;

/// More faults, or packets, than these are not looked at.
const MOST: u32 = 1000;

/// How long any of it may take.
const PATIENCE: u32 = 100;

const SECTORS_PER_MIB: u64 = MIB as u64 / blk::SECTOR;

#[unsafe(no_mangle)]
extern "C" fn guest() -> ! {
    tell("kernel", "ringfence-confined");
    memory::ram().for_each(|range| tell("ram", format_args!("{:08x}-{:08x}", range.start(), range.end())));
    watchdog::allow(PATIENCE, || {
        tell("error", format_args!("not done in {PATIENCE} s"));
        finish("failed")
    });
    match run() {
        Ok(()) => finish("done"),
        Err(error) => {
            tell("error", &error);
            let refused = error.downcast_ref().is_some_and(|error| matches!(error, StartError::<NoWay>::Refused(_)));
            finish(if refused { "refused" } else { "failed" })
        }
    }
}

type NoWay = ringfence_driver::pci::PciError;

fn run() -> Result<(), Failure> {
    if said("mmio") {
        return run_without_pci();
    }
    // Rings of the IOMMU itself, and of whatever is not behind one.
    let direct = Direct::new(machine::take(Pages::Own));
    let iommu = match machine::find(IOMMU).next() {
        Some(device) => Some(Viommu::start(device.open()?, &direct)?),
        None => None,
    };
    let iommu = iommu.as_ref();
    tell("iommu", if iommu.is_some() { "virtio-iommu" } else { "none" });
    let rings = machine::take(Pages::Rings);
    let data = machine::take(Pages::Data);
    // The endpoints take turns: one domain at a time, and the same memory for rings.
    for device in machine::find(RNG) {
        behind(iommu, &direct, device, rings, &mut |host, _| random(device.open()?, host, data))?;
    }
    for device in machine::find(NET) {
        behind(iommu, &direct, device, rings, &mut |host, _| ask_the_router(device.open()?, host, data))?;
    }
    let device = machine::find(DISK).next().ok_or("no virtio disk on PCI")?;
    behind(iommu, &direct, device, rings, &mut |host, mapper| {
        copy_about(device.open()?, host, data)?;
        if let Some(mapper) = mapper { overstep(device, mapper, data) } else { Ok(()) }
    })?;
    if let Some(iommu) = iommu {
        let mut faults = 0;
        // One that tells of new ones all the time is not heard to its end.
        while let (0..MOST, Some(fault)) = (faults, iommu.fault()?) {
            if faults == 0 {
                tell("fault", format_args!("{fault:x?}"));
            }
            faults += 1;
        }
        tell("faults", faults);
    }
    Ok(())
}

/// The same devices behind registers in memory.
fn run_without_pci() -> Result<(), Failure> {
    let direct = Direct::new(machine::take(Pages::Own));
    let data = machine::take(Pages::Data);
    let (platform, policy) = (Platform::X86, DriverPolicy::New);
    let host: Host<'_, dyn Mapper> = Host { platform, policy, physical: Some(&direct), translated: Some(&direct) };
    let mut disks = 0;
    for device in machine::windows() {
        let device = device?;
        match device.identity().device as u16 {
            RNG => random(device, host, data)?,
            NET => ask_the_router(device, host, data)?,
            DISK => {
                disks += 1;
                copy_about(device, host, data)?;
            }
            _ => {}
        }
    }
    if disks == 0 { Err("no virtio disk behind registers".into()) } else { Ok(()) }
}

fn said(word: &str) -> bool {
    memory::command_line().any(|said| said == word.as_bytes())
}

type Test<'t, 'd> = &'t mut dyn FnMut(Host<'_, dyn Mapper + '_>, Option<&dyn Mapper>) -> Result<(), Failure>;

/// Has `device` see what is lent to it alone, if there is an IOMMU.
fn behind(
    iommu: Option<&Viommu<'_, machine::Pci, Direct<'_>>>,
    direct: &Direct<'_>,
    device: Device,
    rings: Buffer<'static>,
    test: Test<'_, '_>,
) -> Result<(), Failure> {
    let Some(iommu) = iommu else {
        let (platform, policy) = (Platform::X86, DriverPolicy::New);
        return test(Host { platform, policy, physical: Some(direct), translated: Some(direct) }, None);
    };
    let reserved = iommu.probe(device.requester())?;
    let space = iommu.attach(1, device.requester())?;
    let first = iommu.place(&reserved, WINDOW).ok_or("no room for bus addresses")?;
    let mapper = Paged::strict(Window::new(space, first, WINDOW), rings);
    let past_it =
        |device: u16| Allow { vendor: 0x1af4, device: device.into(), slot: None, addressing: Addressing::Physical };
    let all = [DISK, RNG, NET].map(past_it);
    let allowed = if said("allow") { &all[..] } else { &[] };
    let (platform, policy) = (Platform::X86Iommu, DriverPolicy::Refusing { allowed });
    test(Host { platform, policy, physical: Some(direct), translated: Some(&mapper) }, Some(&mapper))
}

/// Reads all of the disk, writes half, and reads all again.
fn copy_about<T: Transport<Error: 'static>>(
    device: T,
    host: Host<'_, dyn Mapper + '_>,
    data: Buffer<'static>,
) -> Result<(), Failure> {
    let options = blk::Options { depth: 32, segments: 8 };
    let started = Blk::start(device, host, options);
    if let Err(StartError::Refused(_)) = started {
        tell("disk", "refused");
    }
    let mut disk = started?;
    tell("features", Bits(disk.device().features()));
    tell("addresses", format_args!("{:?}", disk.device().addressing()));
    let status = disk.device_mut().transport_mut().status()?;
    tell("status", format_args!("{:#010x}", status.bits()));
    tell("started", PATIENCE - watchdog::seconds_left());
    if let (Addressing::Translated, Some(mapper)) = (disk.device().addressing(), host.translated) {
        let lent = Streaming::map(mapper, data, FromDevice)?;
        tell("bus", format_args!("{} physical={}", lent.addr(), data.physical()));
    }
    disk.read(0, &[data.sub(0, 4096)])?;
    tell("disk", "ready");

    let sectors = disk.geometry().sectors;
    let mib = sectors / SECTORS_PER_MIB;
    if mib < 2 || sectors != mib * SECTORS_PER_MIB {
        return Err("the disk is not of whole MiB, and two at least".into());
    }
    tell("read", digest(&mut disk, data, mib, MIB)?);
    // The second half becomes the first, moved down by a MiB; the MiB that falls off goes to the end, in small pieces.
    let half = mib / 2;
    for index in 1..half {
        copy(&mut disk, data, index, half + index - 1, MIB)?;
    }
    copy(&mut disk, data, 0, 2 * half - 1, 4096)?;
    disk.flush()?;
    tell("written", digest(&mut disk, data, mib, MIB / 4)?);
    Ok(())
}

type Disk<'a, T> = Blk<'a, T, dyn Mapper + 'a>;

/// Copies the MiB numbered `from` to the one numbered `to`, in pieces of `piece` bytes.
fn copy<T: Transport<Error: 'static>>(
    disk: &mut Disk<'_, T>,
    data: Buffer<'static>,
    from: u64,
    to: u64,
    piece: usize,
) -> Result<(), Failure> {
    let data = [data.sub(0, piece)];
    for offset in (0..SECTORS_PER_MIB).step_by(piece / blk::SECTOR as usize) {
        disk.read(from * SECTORS_PER_MIB + offset, &data)?;
        disk.write(to * SECTORS_PER_MIB + offset, &data)?;
    }
    Ok(())
}

/// SHA-256 of all of the disk's `mib` MiB, read in pieces of `piece` bytes.
fn digest<T: Transport<Error: 'static>>(
    disk: &mut Disk<'_, T>,
    data: Buffer<'static>,
    mib: u64,
    piece: usize,
) -> Result<Hex, Failure> {
    let data = data.sub(0, piece);
    let mut hasher = Sha256::new();
    let mut bytes = [0; 4096];
    for sector in (0..mib * SECTORS_PER_MIB).step_by(piece / blk::SECTOR as usize) {
        disk.read(sector, &[data])?;
        for offset in (0..piece).step_by(bytes.len()) {
            data.memory().read(offset, &mut bytes);
            hasher.update(bytes);
        }
    }
    Ok(Hex(hasher.finalize().into()))
}

/// Has the disk write where nothing is mapped. It does not come through; who it was and where is the IOMMU's to tell.
fn overstep(device: Device, mapper: &dyn Mapper, data: Buffer<'static>) -> Result<(), Failure> {
    /// Tells the device a wrong address.
    struct Elsewhere<'m>(&'m dyn Mapper);
    const AWAY: u64 = 1 << 40;
    impl Mapper for Elsewhere<'_> {
        fn max_len(&self) -> usize {
            self.0.max_len()
        }

        fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
            let mapped = self.0.map(buffer, permission)?;
            Ok(Mapped { addr: BusAddr(mapped.addr.0 ^ AWAY), ..mapped })
        }

        fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
            self.0.unmap(Mapped { addr: BusAddr(mapped.addr.0 ^ AWAY), ..mapped }, buffer, permission);
        }

        fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
            self.0.allocate(len)
        }

        fn free(&self, mapped: Mapped) {
            self.0.free(mapped);
        }
    }
    let elsewhere = Elsewhere(mapper);
    let host = Host {
        platform: Platform::X86Iommu,
        policy: DriverPolicy::Refusing { allowed: &[] },
        physical: None,
        translated: Some(&elsewhere as &dyn Mapper),
    };
    let sector = data.sub(0, 512);
    sector.memory().fill(0xa5);
    // A device that is refused an address may well stop for good.
    let outcome = match Blk::start(device.open_hasty()?, host, blk::Options { depth: 8, segments: 2 }) {
        Ok(mut disk) => disk.read(0, &[sector]),
        // It goes past the IOMMU, and was let through on purpose.
        Err(StartError::Refused(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut bytes = [0; 512];
    sector.memory().read(0, &mut bytes);
    if bytes != [0xa5; 512] {
        return Err("a forbidden access came through".into());
    }
    match outcome {
        // QEMU has the bytes go nowhere, and is content.
        Ok(()) => tell("forbidden", "nothing came through, though the disk says that all went well"),
        Err(error) => tell("forbidden", format_args!("nothing came through: {error}")),
    }
    Ok(())
}

/// Random bytes: some, and not all the same.
fn random<T: Transport<Error: 'static>>(
    device: T,
    host: Host<'_, dyn Mapper + '_>,
    data: Buffer<'static>,
) -> Result<(), Failure> {
    let mut rng = Rng::start(device, host)?;
    let len = rng.fill(data.sub(0, 64))?;
    let mut bytes = [0; 64];
    data.memory().read(0, &mut bytes);
    let differ = bytes[..len].iter().any(|byte| *byte != bytes[0]);
    tell("random", format_args!("{len} bytes, {}", if differ { "which differ" } else { "all the same" }));
    Ok(())
}

/// Asks who has 10.0.2.2, which is QEMU's user network's router, and prints its address.
fn ask_the_router<T: Transport<Error: 'static>>(
    device: T,
    host: Host<'_, dyn Mapper + '_>,
    data: Buffer<'static>,
) -> Result<(), Failure> {
    let mut card = Net::start(device, host, net::Options { depth: 16, segments: 1 })?;
    let mac = card.card().mac.unwrap_or([2, 0, 0, 0, 0, 1]);
    let mut packet = [0; 60];
    packet[..6].fill(0xff);
    packet[6..12].copy_from_slice(&mac);
    packet[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    packet[22..28].copy_from_slice(&mac);
    packet[28..32].copy_from_slice(&[10, 0, 2, 15]);
    packet[38..42].copy_from_slice(&[10, 0, 2, 2]);
    let (out, room) = (data.sub(0, packet.len()), data.sub(4096, 2048));
    out.memory().write(0, &packet);
    card.offer(room)?;
    card.send(&[out])?;
    card.notify()?;
    for _ in 0..MOST {
        let received = loop {
            match card.received()? {
                Some(received) => break received,
                None => card.wait()?,
            }
        };
        let mut reply = [0; 42];
        received.buffer.memory().read(0, &mut reply);
        // ARP, a reply, from whom we asked for.
        if received.len >= 42 && reply[12..14] == [8, 6] && reply[20..22] == [0, 2] && reply[28..32] == [10, 0, 2, 2] {
            tell("router", format_args!("{:02x?}", &reply[22..28]));
            return Ok(());
        }
        card.offer(received.buffer)?;
        card.notify()?;
    }
    Err("other packets, and no reply".into())
}

/// Feature bits as Linux prints them: bit 0 first.
struct Bits(u64);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (0..64).try_for_each(|bit| write!(f, "{}", self.0 >> bit & 1))
    }
}

struct Hex([u8; 32]);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
