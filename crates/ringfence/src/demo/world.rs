//! The front-end's half of the demo: memory, a software IOMMU and a driver.

use super::checks::Row;
use super::server::Server;
use anyhow::{Context, anyhow, bail, ensure};
use indicatif::ProgressBar;
use ringfence_dma::{Buffer, DmaError, FromDevice, FrontendVa, Gpa, HostSlice, Mapped, Mapper, Permission, Streaming};
use ringfence_driver::blk::{Blk, BlkError, Options, RequestError, SECTOR};
use ringfence_driver::mapper::{Bounce, Direct, Premapped};
use ringfence_driver::policy::{DriverPolicy, Platform};
use ringfence_driver::{Host, StartError};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_iommu::{Domain, Strict, Window};
use ringfence_vhost_user::client::{self, Attachment, Frontend, FrontendTransport, TransportError};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How a driver's memory is lent to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// An old driver: physical addresses.
    None,
    /// Everything once.
    Static,
    /// Each buffer for its request alone.
    Strict,
    /// A pool once, and each buffer copied.
    Bounce,
}

impl Mapping {
    pub(super) const ALL: [Mapping; 4] = [Mapping::None, Mapping::Static, Mapping::Strict, Mapping::Bounce];

    pub(super) fn name(self) -> &'static str {
        match self {
            Mapping::None => "none (old driver)",
            Mapping::Static => "static",
            Mapping::Strict => "dynamic, strict",
            Mapping::Bounce => "bounce pool",
        }
    }
}

// The driver's memory, by what it is for.
const RINGS: (usize, usize) = (0, 2 << 20);
const POOL: (usize, usize) = (2 << 20, 6 << 20);
const BUFFERS: (usize, usize) = (8 << 20, 2 << 20);
const CANARY: (usize, usize) = (12 << 20, 4096);
const MEMORY: usize = 16 << 20;

const PAGE: usize = 4096;
const TRANSFER: usize = 1 << 20;
const DEPTH: u16 = 256;

/// A front-end with memory and an IOMMU, connected to a server.
pub(super) struct World {
    frontend: Arc<Frontend>,
    memory: SharedMemory,
    domain: Arc<Domain>,
}

type Disk<'a, M> = Blk<'a, FrontendTransport, M>;

impl World {
    pub(super) fn connect(server: &Server) -> anyhow::Result<Self> {
        let memory = SharedMemory::new(MEMORY).context("can't make guest memory")?;
        memory.seal_length()?;
        let base = FrontendVa(memory.slice(0, MEMORY).as_ptr() as u64);
        let frontend = Arc::new(Frontend::connect(server.socket(), client::Options::default())?);
        let placement = Placement { gpa: Gpa(0), frontend_va: base, size: MEMORY as u64, offset: 0 };
        frontend.set_memory(&[(placement, memory.as_fd())])?;
        let domain = frontend.serve_domain(Window::HIGH, base)?;
        Ok(Self { frontend, memory, domain })
    }

    /// Writes the whole disk, compares the image, reads it back in other pieces, and compares again.
    pub(super) fn exercise(&self, mapping: Mapping, image: &Path, size: u64, bar: &ProgressBar) -> anyhow::Result<Row> {
        let all = [self.buffer(BUFFERS)];
        let rings = self.buffer(RINGS);
        let strict = Strict::new(Arc::clone(&self.domain), rings);
        match mapping {
            Mapping::None => self.drive(mapping, &Direct::new(rings), image, size, bar),
            Mapping::Static => self.drive(mapping, &Premapped::new(&strict, &all, rings)?, image, size, bar),
            Mapping::Strict => self.drive(mapping, &strict, image, size, bar),
            Mapping::Bounce => {
                self.drive(mapping, &Bounce::new(&strict, self.buffer(POOL), TRANSFER)?, image, size, bar)
            }
        }
    }

    fn drive<M: Mapper>(
        &self,
        mapping: Mapping,
        mapper: &M,
        image: &Path,
        size: u64,
        bar: &ProgressBar,
    ) -> anyhow::Result<Row> {
        let mut disk = self.start(mapping, mapper)?;
        let seed = mapping as u64 + 1;
        ensure!(
            disk.geometry().sectors * SECTOR == size,
            "the disk says that it has {} sectors",
            disk.geometry().sectors
        );

        for offset in (0..size).step_by(TRANSFER) {
            let pieces = self.pieces(8 << 10, seed);
            let len = TRANSFER.min((size - offset) as usize);
            fill(&pieces, offset, seed);
            for (at, part) in transfers(&pieces, offset, len) {
                disk.write(at / SECTOR, part)?;
            }
            bar.inc(len as u64);
        }
        disk.flush()?;
        let file = File::open(image)?;
        let mut block = vec![0; TRANSFER];
        for offset in (0..size).step_by(TRANSFER) {
            file.read_exact_at(&mut block, offset)?;
            check(&block, offset, seed).context("in the image")?;
            bar.inc(TRANSFER as u64);
        }
        for offset in (0..size).step_by(TRANSFER) {
            // Other pieces than those written from, so that no mistake undoes itself.
            let pieces = self.pieces(PAGE, seed + 7);
            pieces.iter().for_each(|piece| piece.memory().fill(0));
            for (at, part) in transfers(&pieces, offset, TRANSFER) {
                disk.read(at / SECTOR, part)?;
            }
            let mut at = 0;
            for piece in &pieces {
                piece.memory().read(0, &mut block[at..at + piece.len()]);
                at += piece.len();
            }
            check(&block, offset, seed).context("read back")?;
            bar.inc(TRANSFER as u64);
        }

        let first = self.buffer((BUFFERS.0, PAGE));
        let bus = Streaming::map(mapper, first, FromDevice)?.addr();
        let addressing = disk.device().addressing();
        drop(disk);
        ensure!(mapping != Mapping::Strict || self.domain.mapped() == 0, "the driver left mappings behind");
        let counters = self.frontend.counters();
        Ok(Row { addressing, bus, physical: first.physical().0, counters, verified: 2 * size })
    }

    /// Lets the device write to a page that is mapped for reading only, with a canary on it.
    pub(super) fn touch_forbidden_page(&self) -> anyhow::Result<String> {
        let strict = Strict::new(Arc::clone(&self.domain), self.buffer(RINGS));
        let canary = self.buffer(CANARY);
        let mapper = ReadOnlyAt { inner: &strict, page: canary.physical() };
        let mut disk = self.start(Mapping::Strict, &mapper)?;
        canary.memory().fill(0xca);
        match disk.read(0, &[canary]) {
            Err(BlkError::Failed(RequestError::Io)) => {}
            other => bail!("a read into a forbidden page came to {other:?} instead of an I/O error"),
        }
        let mut bytes = [0; PAGE];
        canary.memory().read(0, &mut bytes);
        ensure!(bytes.iter().all(|&byte| byte == 0xca), "the device wrote to a page that was not its to write");
        disk.read(0, &[self.buffer((BUFFERS.0, PAGE))]).context("the request after the forbidden one")?;
        drop(disk);
        let reports = self.frontend.counters().access_fails;
        ensure!(reports > 0, "the device did not report the fault");
        Ok(format!("I/O error, its {PAGE} bytes unchanged, {reports} fault reported; the next request succeeds"))
    }

    /// An old driver on a device that requires the flag; returns why it was refused.
    pub(super) fn start_old_driver(&self) -> anyhow::Result<String> {
        let direct = Direct::new(self.buffer(RINGS));
        match self.try_start(Mapping::None, &direct) {
            Ok(_) => bail!("an old driver was served though the flag is required"),
            Err(error @ StartError::FeaturesRefused { .. }) => Ok(error.to_string()),
            Err(error) => Err(anyhow!(error).context("an old driver failed for another reason than the flag")),
        }
    }

    pub(super) fn start_new_driver(&self) -> anyhow::Result<()> {
        let strict = Strict::new(Arc::clone(&self.domain), self.buffer(RINGS));
        self.start(Mapping::Strict, &strict)?.read(0, &[self.buffer((BUFFERS.0, PAGE))])?;
        Ok(())
    }

    fn start<'a, M: Mapper>(&self, mapping: Mapping, mapper: &'a M) -> anyhow::Result<Disk<'a, M>> {
        Ok(self.try_start(mapping, mapper)?)
    }

    fn try_start<'a, M: Mapper>(
        &self,
        mapping: Mapping,
        mapper: &'a M,
    ) -> Result<Disk<'a, M>, StartError<TransportError>> {
        let (policy, physical, translated) = match mapping {
            Mapping::None => (DriverPolicy::Old, Some(mapper), None),
            _ => (DriverPolicy::Refusing { allowed: &[] }, None, Some(mapper)),
        };
        let host = Host { platform: Platform::X86Iommu, policy, physical, translated };
        let attachment = Attachment {
            device: 2,
            queue_size: DEPTH,
            gpa: Gpa(0),
            frontend_va: FrontendVa(self.memory.slice(0, MEMORY).as_ptr() as u64),
            patience: Duration::from_secs(10),
        };
        let transport = FrontendTransport::new(Arc::clone(&self.frontend), attachment);
        Blk::start(transport, host, Options { depth: DEPTH, segments: 96 })
    }

    fn buffer(&self, (offset, len): (usize, usize)) -> Buffer<'_> {
        Buffer::new(self.memory.slice(offset, len), Gpa(offset as u64))
    }

    /// One transfer's worth of memory, in pieces of `len` that follow each other in no order.
    fn pieces(&self, len: usize, seed: u64) -> Vec<Buffer<'_>> {
        let count = TRANSFER / len;
        // Odd steps visit every place of a power of two once.
        let step = (seed as usize * 2 + 1) * 5;
        let all = self.buffer((BUFFERS.0, TRANSFER));
        (0..count).map(|index| all.sub((index * step + 3) % count * len, len)).collect()
    }
}

/// An IOMMU that lets the device read one page and not write it, whatever it is asked to map.
struct ReadOnlyAt<'a, 'm> {
    inner: &'a Strict<'m>,
    page: Gpa,
}

impl Mapper for ReadOnlyAt<'_, '_> {
    fn max_len(&self) -> usize {
        self.inner.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        let here = buffer.physical() == self.page;
        self.inner.map(buffer, if here { Permission::ReadOnly } else { permission })
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        self.inner.unmap(mapped, buffer, permission);
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.inner.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.inner.free(mapped);
    }
}

/// Cuts one transfer into requests: a single sector, a page or so, and requests of many pieces.
fn transfers<'p, 'm>(pieces: &'p [Buffer<'m>], offset: u64, len: usize) -> Vec<(u64, &'p [Buffer<'m>])> {
    let mut requests = Vec::new();
    let (mut at, mut rest) = (offset, pieces);
    for count in [1, 2, 13, 64].into_iter().chain(std::iter::repeat(96)) {
        if at == offset + len as u64 {
            break;
        }
        let (now, later) = rest.split_at(count.min(rest.len()));
        requests.push((at, now));
        at += now.iter().map(|piece| piece.len() as u64).sum::<u64>();
        rest = later;
    }
    requests
}

/// The eight bytes that belong at `offset`, a multiple of 8.
fn word(offset: u64, seed: u64) -> [u8; 8] {
    (offset ^ seed << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes()
}

fn fill(pieces: &[Buffer<'_>], mut offset: u64, seed: u64) {
    for piece in pieces {
        let bytes: Vec<u8> = (0..piece.len()).step_by(8).flat_map(|at| word(offset + at as u64, seed)).collect();
        piece.memory().write(0, &bytes);
        offset += bytes.len() as u64;
    }
}

fn check(block: &[u8], offset: u64, seed: u64) -> anyhow::Result<()> {
    for (at, got) in block.chunks(8).enumerate() {
        let offset = offset + at as u64 * 8;
        ensure!(got == word(offset, seed), "wrong bytes at {offset:#x}: {got:02x?}");
    }
    Ok(())
}
