//! A guest's first and only program: has its virtio devices given to it by VFIO, and drives them behind the IOMMU.
//!
//! It does to the disk what `init.sh` of `ringfence-guests` does, prints the same lines, and then has the disk overstep.
//! A disk that does not offer VIRTIO_F_ACCESS_PLATFORM is refused, unless the kernel's command line has
//! `ringfence.allow`; with `ringfence.haste` one that does not answer is given up after seconds.

mod guest;
mod in_flight;

use ringfence_dma::{Buffer, BusAddr, DmaError, FromDevice, HostSlice, Mapped, Mapper, Permission, Streaming};
use ringfence_driver::blk::{self, Blk};
use ringfence_driver::mapper::{Direct, Paged, Window};
use ringfence_driver::net::{self, Net};
use ringfence_driver::pci::{Interrupts, Pci, PciError};
use ringfence_driver::policy::{Addressing, Allow, DriverPolicy, Platform};
use ringfence_driver::rng::Rng;
use ringfence_driver::{Host, StartError, Transport, Waiting};
use ringfence_vfio::{Container, Function, Memory};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::error::Error;
use std::time::{Duration, Instant};

type Failure = Box<dyn Error>;
type Anything<'m> = dyn Mapper + 'm;

const NET: u16 = 1;
const DISK: u16 = 2;
const RNG: u16 = 4;

/// Bus addresses from 64 GiB on, which no memory of this guest has: 64 MiB of them.
const FIRST: BusAddr = BusAddr(1 << 36);
const WINDOW: usize = 16384;

/// How memory is parted: rings of whoever is translated, of whoever is not, and data.
const RINGS: usize = 256 << 10;
const MIB: usize = 1 << 20;
const SECTORS_PER_MIB: u64 = MIB as u64 / blk::SECTOR;

fn main() {
    guest::begin();
    let end = match run() {
        Ok(()) => "done",
        Err(error) => {
            guest::tell("error", &error);
            let refused = matches!(error.downcast_ref(), Some(StartError::<PciError>::Refused(_)));
            if refused { "refused" } else { "failed" }
        }
    };
    guest::finish(end)
}

fn run() -> Result<(), Failure> {
    guest::load_modules()?;
    for name in guest::devices(RNG)? {
        behind(&name, |host, function, data| random(host, function, data))?;
    }
    for name in guest::devices(NET)? {
        behind(&name, |host, function, data| ask_the_router(host, function, data))?;
    }
    let mut disks = guest::devices(DISK)?.into_iter();
    let disk = disks.next().ok_or("no virtio disk on PCI")?;
    behind(&disk, |host, function, data| copy_about(host, function, data))?;
    behind(&disk, |host, function, data| match host.translated {
        Some(mapper) if !guest::is_allowed() => overstep(mapper, function, data),
        _ => Ok(()),
    })?;
    // A slow one, if there is one.
    disks.try_for_each(|slow| behind(&slow, in_flight::reset))
}

/// Opens a function in an address space of its own, and shows it what is lent to it.
fn behind(
    name: &str,
    test: impl FnOnce(Host<'_, Anything<'_>>, Function, Buffer<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    guest::give_to_vfio(name)?;
    let memory = Memory::huge()?;
    let all = memory.buffer();
    let (container, function) = Container::open(name, &memory)?;
    let mapper = Paged::strict(Window::new(&container, FIRST, WINDOW), all.sub(0, RINGS));
    // For whoever goes past the IOMMU, and is let.
    let direct = Direct::new(all.sub(RINGS, RINGS));
    let allow =
        |device: u16| Allow { vendor: 0x1af4, device: device.into(), slot: None, addressing: Addressing::Physical };
    let allowed = [NET, DISK, RNG].map(allow);
    let allowed = if guest::is_allowed() { &allowed[..] } else { &[] };
    let host = Host {
        platform: Platform::X86Iommu,
        policy: DriverPolicy::Refusing { allowed },
        physical: Some(&direct as &Anything<'_>),
        translated: Some(&mapper as &Anything<'_>),
    };
    test(host, function, all.sub(2 * RINGS, MIB))
}

/// A transport that gives up after so long without an answer.
fn pci(function: Function, patience: Duration) -> Result<Pci<Function, impl FnMut(Waiting, u32) -> bool>, PciError> {
    let mut since = Instant::now();
    Pci::new(function, move |_, waited| {
        if waited == 0 {
            since = Instant::now();
        }
        std::thread::yield_now();
        since.elapsed() < patience
    })
}

/// A transport that sleeps until the interrupt of the one queue, and counts them.
fn pci_told(
    function: Function,
    patience: Duration,
    told: &Cell<u64>,
) -> Result<Pci<Function, impl FnMut(Waiting, u32) -> bool>, Failure> {
    let vectors = function.vectors(1)?;
    let look = |_: Waiting, waited: u32| {
        std::thread::yield_now();
        waited < u32::MAX
    };
    let wait = move |purpose, waited| match purpose {
        Waiting::Queue(_) => {
            let came = vectors[0].wait(patience).unwrap_or(false);
            told.set(told.get() + u64::from(came));
            came
        }
        Waiting::Reset | Waiting::QueueReset(_) => look(purpose, waited),
    };
    Ok(Pci::new(function, wait)?.with_interrupts(Interrupts::Vectors { config: None, queues: vec![0] }))
}

const PATIENCE: Duration = Duration::from_secs(60);
const HASTE: Duration = Duration::from_secs(3);

/// Reads all of the disk, writes half, and reads all again.
fn copy_about(host: Host<'_, Anything<'_>>, function: Function, data: Buffer<'_>) -> Result<(), Failure> {
    let patience = if guest::is_hasty() { HASTE } else { PATIENCE };
    let told = Cell::new(0);
    let started = Blk::start(pci_told(function, patience, &told)?, host, blk::Options { depth: 32, segments: 8 });
    if let Err(StartError::Refused(_)) = started {
        guest::tell("disk", "refused");
    }
    let mut disk = started?;
    let features = disk.device().features();
    guest::tell("features", (0..64).map(|bit| if features >> bit & 1 == 0 { '0' } else { '1' }).collect::<String>());
    let status = disk.device_mut().transport_mut().status()?;
    guest::tell("status", format_args!("{:#010x}", status.bits()));
    guest::tell("started", guest::uptime());
    let mapper = match disk.device().addressing() {
        Addressing::Translated => host.translated,
        Addressing::Physical => host.physical,
    };
    let lent = Streaming::map(mapper.expect("it was started with one"), data, FromDevice)?;
    guest::tell("bus", format_args!("{} physical={}", lent.addr(), data.physical()));
    drop(lent);
    let sectors = disk.geometry().sectors;
    let mib = sectors / SECTORS_PER_MIB;
    if mib < 2 || sectors != mib * SECTORS_PER_MIB {
        return Err("the disk is not of whole MiB, and two at least".into());
    }
    guest::tell("disk", "ready");
    guest::tell("read", digest(&mut disk, data, mib, MIB)?);
    // The second half becomes the first, moved down by a MiB; the MiB that falls off goes to the end, in small pieces.
    let half = mib / 2;
    for index in 1..half {
        copy(&mut disk, data, index, half + index - 1, MIB)?;
    }
    copy(&mut disk, data, 0, 2 * half - 1, 4096)?;
    disk.flush()?;
    // What follows goes through a queue that began anew, where the device lets it.
    match disk.restart() {
        Ok(()) => guest::tell("restarted", "the queue alone"),
        Err(error) => guest::tell("restarted", error),
    }
    guest::tell("written", digest(&mut disk, data, mib, MIB / 4)?);
    guest::tell("interrupts", told.get());
    Ok(())
}

/// Copies the MiB numbered `from` to the one numbered `to`, in pieces of `piece` bytes.
fn copy<'a, T: Transport<Error = PciError>>(
    disk: &mut Blk<'a, T, Anything<'a>>,
    data: Buffer<'a>,
    from: u64,
    to: u64,
    piece: usize,
) -> Result<(), Failure> {
    for offset in (0..SECTORS_PER_MIB).step_by(piece / blk::SECTOR as usize) {
        disk.read(from * SECTORS_PER_MIB + offset, &[data.sub(0, piece)])?;
        disk.write(to * SECTORS_PER_MIB + offset, &[data.sub(0, piece)])?;
    }
    Ok(())
}

/// SHA-256 of all of the disk's `mib` MiB, read in pieces of `piece` bytes.
fn digest<'a, T: Transport<Error = PciError>>(
    disk: &mut Blk<'a, T, Anything<'a>>,
    data: Buffer<'a>,
    mib: u64,
    piece: usize,
) -> Result<String, Failure> {
    let mut hasher = Sha256::new();
    let mut bytes = vec![0; piece];
    for sector in (0..mib * SECTORS_PER_MIB).step_by(piece / blk::SECTOR as usize) {
        disk.read(sector, &[data.sub(0, piece)])?;
        data.memory().read(0, &mut bytes);
        hasher.update(&bytes);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Tells the device a wrong address for each buffer.
struct Elsewhere<'m> {
    mapper: &'m Anything<'m>,
    /// The last one.
    told: Cell<BusAddr>,
}

const AWAY: u64 = 1 << 37;

impl Mapper for Elsewhere<'_> {
    fn max_len(&self) -> usize {
        self.mapper.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        let mapped = self.mapper.map(buffer, permission)?;
        self.told.set(BusAddr(mapped.addr.0 ^ AWAY));
        Ok(Mapped { addr: self.told.get(), ..mapped })
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        self.mapper.unmap(Mapped { addr: BusAddr(mapped.addr.0 ^ AWAY), ..mapped }, buffer, permission);
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.mapper.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.mapper.free(mapped);
    }
}

/// Has the disk write where nothing is mapped. It does not come through, and the kernel's IOMMU driver hears of it.
fn overstep(mapper: &Anything<'_>, function: Function, data: Buffer<'_>) -> Result<(), Failure> {
    let elsewhere = Elsewhere { mapper, told: Cell::new(BusAddr(0)) };
    let host = Host {
        platform: Platform::X86Iommu,
        policy: DriverPolicy::Refusing { allowed: &[] },
        physical: None,
        translated: Some(&elsewhere as &Anything<'_>),
    };
    let sector = data.sub(0, 512);
    sector.memory().fill(0xa5);
    let mut disk = Blk::start(pci(function, HASTE)?, host, blk::Options { depth: 8, segments: 2 })?;
    let outcome = disk.read(0, &[sector]);
    let mut bytes = [0; 512];
    sector.memory().read(0, &mut bytes);
    if bytes != [0xa5; 512] {
        return Err("a forbidden access came through".into());
    }
    match outcome {
        // QEMU has the bytes go nowhere, and is content.
        Ok(()) => guest::tell("forbidden", "nothing came through, though the disk says that all went well"),
        Err(error) => guest::tell("forbidden", format_args!("nothing came through: {error}")),
    }
    guest::tell("wrong", elsewhere.told.get());
    // A device that has its own idea of what it was granted tells of it elsewhere.
    guest::tell(
        "fault",
        guest::iommu_fault(elsewhere.told.get()).as_deref().unwrap_or("none that the kernel tells of"),
    );
    Ok(())
}

/// Random bytes: some, and not all the same.
fn random(host: Host<'_, Anything<'_>>, function: Function, data: Buffer<'_>) -> Result<(), Failure> {
    let mut rng = Rng::start(pci(function, PATIENCE)?, host)?;
    let len = rng.fill(data.sub(0, 64))?;
    let mut bytes = vec![0; len];
    data.memory().read(0, &mut bytes);
    let differ = bytes.iter().any(|byte| *byte != bytes[0]);
    guest::tell("random", format_args!("{len} bytes, {}", if differ { "which differ" } else { "all the same" }));
    Ok(())
}

/// Asks who has 10.0.2.2, which is QEMU's user network's router, and prints its address.
fn ask_the_router(host: Host<'_, Anything<'_>>, function: Function, data: Buffer<'_>) -> Result<(), Failure> {
    let mut card = Net::start(pci(function, PATIENCE)?, host, net::Options { depth: 16, segments: 1 })?;
    let mac = card.card().mac.unwrap_or([2, 0, 0, 0, 0, 1]);
    let head = [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &[10, 0, 2, 15]].concat();
    let packet = [&head[..], &[0; 6], &[10, 0, 2, 2], &[0; 18]].concat();
    let (out, room) = (data.sub(0, packet.len()), data.sub(4096, 2048));
    out.memory().write(0, &packet);
    card.offer(room)?;
    card.send(&[out])?;
    card.notify()?;
    loop {
        let Some(received) = card.received()? else {
            card.wait()?;
            continue;
        };
        let mut reply = [0; 42];
        received.buffer.memory().read(0, &mut reply);
        // ARP, a reply, from whom we asked for.
        if received.len >= 42 && reply[12..14] == [8, 6] && reply[20..22] == [0, 2] && reply[28..32] == [10, 0, 2, 2] {
            guest::tell("router", format_args!("{:02x?}", &reply[22..28]));
            return Ok(());
        }
        card.offer(received.buffer)?;
        card.notify()?;
    }
}
