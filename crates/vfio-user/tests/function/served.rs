//! A server in a thread, and clients for it.

use ringfence_device::Device;
use ringfence_device::blk::{self, Blk as Disk};
use ringfence_device::rng::Rng;
use ringfence_device::storage;
use ringfence_dma::{Buffer, Gpa};
use ringfence_driver::mapper::{Paged, Window};
use ringfence_driver::pci::{Pci, PciError};
use ringfence_driver::policy::{DriverPolicy, Platform};
use ringfence_driver::{Host, Wait, Waiting};
use ringfence_hostmem::SharedMemory;
use ringfence_policy::IommuMode;
use ringfence_vfio_user::client::{Client, Far, Remote};
use ringfence_vfio_user::server::{self, Options, Server};
use std::io::Write;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MEMORY: usize = 8 << 20;
pub(crate) const RINGS: usize = 1 << 20;

/// Far from where memory is.
pub(crate) const FIRST: ringfence_dma::BusAddr = ringfence_dma::BusAddr(0x70_0000_0000);

/// A server, on a socket in a folder of its own. Dropping it ends it as SIGTERM would.
pub(crate) struct Served {
    pub(crate) socket: PathBuf,
    end: UnixStream,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Served {
    /// Of an 8 MiB disk in memory, with two queues.
    pub(crate) fn disk(iommu: IommuMode) -> Self {
        Self::disk_with(2, iommu)
    }

    pub(crate) fn disk_with(queues: u16, iommu: IommuMode) -> Self {
        Self::start(disk("memory:8M", queues), iommu)
    }

    pub(crate) fn rng() -> Self {
        Self::start(Arc::new(Rng), IommuMode::Require)
    }

    /// With so many vectors at the most.
    pub(crate) fn disk_with_vectors(queues: u16, vectors: Option<NonZeroU16>) -> Self {
        Self::start_with(disk("memory:8M", queues), Options { vectors, ..options(IommuMode::Offer) })
    }

    pub(crate) fn start(device: Arc<dyn Device>, iommu: IommuMode) -> Self {
        Self::start_with(device, options(iommu))
    }

    fn start_with(device: Arc<dyn Device>, options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("function.sock");
        let server = Server::bind(&socket).unwrap();
        let (end, ended) = UnixStream::pair().unwrap();
        let serve = move || serve(server, &device, options, ended.as_fd());
        Self { socket, end, thread: Some(std::thread::spawn(serve)), _folder: folder }
    }

    pub(crate) fn stream(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.stream(), false, None).unwrap()
    }

    pub(crate) fn client_with(&self, twin: bool, far: Option<Box<dyn Far>>) -> Client {
        Client::new(self.stream(), twin, far).unwrap()
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

/// A disk of `queues` queues, called "test".
pub(crate) fn disk(image: &str, queues: u16) -> Arc<dyn Device> {
    let storage = storage::open(image, storage::Format::Raw, false).unwrap();
    Arc::new(Disk::new(storage, blk::Options { queues, queue_size: 256, serial: "test".to_owned() }))
}

pub(crate) fn options(iommu: IommuMode) -> Options {
    let poll = Duration::from_micros(20);
    Options { iommu, queue_size: 256, poll, io_timeout: Duration::from_secs(2), vectors: None }
}

/// Serves until `end`.
pub(crate) fn serve(server: Server, device: &Arc<dyn Device>, options: Options, end: BorrowedFd<'_>) {
    server::run(server, device.name(), || Ok(Arc::clone(device)), options, end).unwrap();
}

pub(crate) type Mapper<'c> = Paged<'c, Window<&'c Client>>;

/// Memory of a machine, and what of it is rings.
pub(crate) fn memory() -> SharedMemory {
    SharedMemory::new(MEMORY).unwrap()
}

pub(crate) fn buffer(memory: &SharedMemory, offset: usize, len: usize) -> Buffer<'_> {
    Buffer::new(memory.slice(RINGS + offset, len), Gpa((RINGS + offset) as u64))
}

/// Each buffer is granted for the time of its request, at an address that has nothing to do with where it is.
pub(crate) fn mapper<'c>(client: &'c Client, memory: &'c SharedMemory) -> Mapper<'c> {
    let rings = Buffer::new(memory.slice(0, RINGS), Gpa(0));
    Paged::strict(Window::new(client, FIRST, 4096), rings)
}

pub(crate) fn file(memory: &SharedMemory) -> OwnedFd {
    memory.as_fd().try_clone_to_owned().unwrap()
}

pub(crate) fn host<'m, M: ringfence_dma::Mapper + ?Sized>(mapper: &'m M) -> Host<'m, M> {
    let policy = DriverPolicy::Refusing { allowed: &[] };
    Host { platform: Platform::X86Iommu, policy, physical: None, translated: Some(mapper) }
}

pub(crate) fn pci<'c>(client: &'c Client) -> Result<Pci<Remote<'c>, impl Wait>, PciError> {
    let mut since = Instant::now();
    Pci::new(client.function(), move |_: Waiting, waited| {
        if waited == 0 {
            since = Instant::now();
        }
        // What the function asks is answered by this very thread. A server that is gone will not use anything any more.
        let is_there = client.serve_pending().is_ok();
        std::thread::yield_now();
        is_there && since.elapsed() < Duration::from_secs(20)
    })
}
