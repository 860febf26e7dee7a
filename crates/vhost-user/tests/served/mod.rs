//! A server in a thread and front-ends for it, with memory, a software IOMMU and a driver.

// Each test file uses a part of it.
#![allow(dead_code)]

use ringfence_device::blk::{self, Blk as Disk};
use ringfence_device::storage;
use ringfence_dma::{Access, Buffer, BusAddr, DmaError, FrontendVa, Gpa, HostSlice, Mapped, Mapper, Permission};
use ringfence_driver::blk::{Blk, BlkError, Completion, Options, RequestError};
use ringfence_driver::policy::{DriverPolicy, Platform};
use ringfence_driver::{Host, StartError};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_iommu::{Domain, Strict, Window};
use ringfence_policy::IommuMode;
use ringfence_vhost_user::client::{self, Attachment, FrontendTransport, TransportError};
use ringfence_vhost_user::server::{self, Server};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) const PAGE: usize = 4096;
/// Where rings go; as much again lies behind it.
pub(crate) const RINGS: (usize, usize) = (0, 1 << 20);
pub(crate) const BUFFERS: (usize, usize) = (4 << 20, 2 << 20);
const MEMORY: usize = 8 << 20;
const DEPTH: u16 = 64;

/// A server of an 8 MiB disk in memory, on a socket in a folder of its own. Dropping it ends it as SIGTERM would.
pub(crate) struct Served {
    pub(crate) socket: PathBuf,
    end: UnixStream,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Served {
    pub(crate) fn start(iommu: IommuMode) -> Self {
        Self::start_keeping(iommu, server::Keep::Auto)
    }

    pub(crate) fn start_keeping(iommu: IommuMode, keep: server::Keep) -> Self {
        let storage = storage::open("memory:8M", storage::Format::Raw, false).unwrap();
        let disk = blk::Options { queues: 1, queue_size: 256, serial: "test".to_owned() };
        let device = Arc::new(Disk::new(storage, disk));
        let options = server::Options {
            iommu,
            keep,
            queue_size: 256,
            poll: Duration::from_micros(20),
            io_timeout: Duration::from_secs(10),
        };
        Self::run(move |server, end| server.run(device, options, end).unwrap())
    }

    /// Whatever `run` serves.
    pub(crate) fn run(run: impl FnOnce(Server, BorrowedFd<'_>) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("served.sock");
        let server = Server::bind(&socket).unwrap();
        let (end, ended) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || run(server, ended.as_fd()));
        Self { socket, end, thread: Some(thread), _folder: folder }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end.write_all(&[0]).unwrap();
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
        assert!(!self.socket.exists(), "the server left its socket behind");
    }
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Driver {
    Old,
    New,
}

/// A front-end with memory and an IOMMU.
pub(crate) struct Frontend {
    pub(crate) client: Arc<client::Frontend>,
    pub(crate) domain: Arc<Domain>,
    pub(crate) memory: SharedMemory,
}

pub(crate) type Driven<'a, M> = Blk<'a, FrontendTransport, M>;

impl Frontend {
    pub(crate) fn connect(served: &Served) -> Self {
        Self::connect_slowly(served, Duration::ZERO)
    }

    /// Each miss is answered after `miss_delay`.
    pub(crate) fn connect_slowly(served: &Served, miss_delay: Duration) -> Self {
        let memory = SharedMemory::new(MEMORY).unwrap();
        let base = FrontendVa(memory.slice(0, MEMORY).as_ptr() as u64);
        let options = client::Options { miss_delay, ..Default::default() };
        let client = Arc::new(client::Frontend::connect(&served.socket, options).unwrap());
        // In two regions, so that translations cross from one to the other.
        let half = MEMORY as u64 / 2;
        let region = |offset| {
            let placement =
                Placement { gpa: Gpa(offset), frontend_va: FrontendVa(base.0 + offset), size: half, offset };
            (placement, memory.as_fd())
        };
        client.set_memory(&[region(0), region(half)]).unwrap();
        let domain = client.serve_domain(Window::HIGH, base).unwrap();
        Self { client, domain, memory }
    }

    /// It takes mappings away and never tells, and uses each address again as soon as it can.
    pub(crate) fn connect_silently(served: &Served) -> Self {
        let connected = Self::connect(served);
        let base = FrontendVa(connected.memory.slice(0, MEMORY).as_ptr() as u64);
        let window = Window::new(BusAddr(1 << 40), BusAddr((1 << 40) + 0x5f_d000 - 1));
        let domain = Arc::new(Domain::new(window));
        connected
            .client
            .serve_iotlb(Arc::new(client::Pages { domain: Arc::clone(&domain), base, granule: 4096 }))
            .unwrap();
        Self { domain, ..connected }
    }

    pub(crate) fn buffer(&self, (offset, len): (usize, usize)) -> Buffer<'_> {
        Buffer::new(self.memory.slice(offset, len), Gpa(offset as u64))
    }

    pub(crate) fn start<'a, M: Mapper>(
        &self,
        driver: Driver,
        mapper: &'a M,
    ) -> Result<Driven<'a, M>, StartError<TransportError>> {
        let (policy, physical, translated) = match driver {
            Driver::Old => (DriverPolicy::Old, Some(mapper), None),
            Driver::New => (DriverPolicy::New, None, Some(mapper)),
        };
        let host = Host { platform: Platform::X86Iommu, policy, physical, translated };
        let attachment = Attachment {
            device: 2,
            queue_size: DEPTH,
            gpa: Gpa(0),
            frontend_va: FrontendVa(self.memory.slice(0, MEMORY).as_ptr() as u64),
            patience: Duration::from_secs(10),
        };
        let transport = FrontendTransport::new(Arc::clone(&self.client), attachment);
        Blk::start(transport, host, Options { depth: DEPTH, segments: 32 })
    }

    /// Sixteen scattered pages out and back, with bytes that no other round has.
    pub(crate) fn write_and_read_back<'a, M: Mapper>(&'a self, disk: &mut Driven<'a, M>, round: u64) {
        self.write_and_read_back_at(disk, BUFFERS.0, round);
    }

    pub(crate) fn write_and_read_back_at<'a, M: Mapper>(&'a self, disk: &mut Driven<'a, M>, at: usize, round: u64) {
        let all = self.buffer((at, 32 * PAGE));
        let pages = |first: usize| -> Vec<Buffer<'_>> {
            (0..16).map(|page| all.sub((first + page * 14) % 32 / 2 * 2 * PAGE, PAGE)).collect::<Vec<_>>()
        };
        let (out, back) = (pages(0), pages(6));
        for (index, page) in out.iter().enumerate() {
            page.memory().write(0, &pattern(round, index));
        }
        let sector = round % 100 * 128;
        disk.write(sector, &out).unwrap();
        back.iter().for_each(|page| page.memory().fill(0));
        disk.read(sector, &back).unwrap();
        for (index, &page) in back.iter().enumerate() {
            assert_eq!(bytes(page), pattern(round, index), "round {round}, page {index}");
        }
    }
}

fn pattern(round: u64, page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        let number = (round << 32 | (page as u64) << 16 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// The next request that ends.
pub(crate) fn completed<M: Mapper>(disk: &mut Driven<'_, M>) -> Completion {
    loop {
        disk.wait().unwrap();
        if let Some(completion) = disk.poll().unwrap() {
            break completion;
        }
    }
}

pub(crate) fn assert_io_error(result: Result<(), BlkError<TransportError>>) {
    assert!(matches!(result, Err(BlkError::Failed(RequestError::Io))), "{result:?} instead of an I/O error");
}

pub(crate) fn bytes(page: Buffer<'_>) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    page.memory().read(0, &mut bytes);
    bytes
}

/// A driver that maps its rings and hands out physical addresses for its buffers all the same.
pub(crate) struct BuffersAreDirect<'a, 'm> {
    pub(crate) rings: &'a Strict<'m>,
}

impl Mapper for BuffersAreDirect<'_, '_> {
    fn max_len(&self) -> usize {
        usize::MAX
    }

    fn map(&self, buffer: Buffer<'_>, _: Permission) -> Result<Mapped, DmaError> {
        Ok(Mapped { addr: BusAddr(buffer.physical().0), len: buffer.len(), cookie: 0 })
    }

    fn unmap(&self, _: Mapped, _: Buffer<'_>, _: Permission) {}

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.rings.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.rings.free(mapped);
    }
}

/// An IOMMU that does not allow one kind of access to one page, whatever it is asked to map.
pub(crate) struct Forbidding<'a, 'm> {
    pub(crate) inner: &'a Strict<'m>,
    pub(crate) page: Gpa,
    pub(crate) access: Access,
}

impl Mapper for Forbidding<'_, '_> {
    fn max_len(&self) -> usize {
        self.inner.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        let allowed = match (buffer.physical() == self.page, self.access) {
            (false, _) => permission,
            (true, Access::Read) => Permission::WriteOnly,
            (true, Access::Write) => Permission::ReadOnly,
        };
        self.inner.map(buffer, allowed)
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
