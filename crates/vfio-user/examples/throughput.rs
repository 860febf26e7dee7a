//! The same disk, driver and memory over vfio-user and over vhost-user, in turns: requests a second, and their ratio.
//!
//! `cargo run --release -p ringfence-vfio-user --example throughput [ROUNDS]`. Everything is in one process; the disk keeps
//! nothing, so that what is seen is the way to it. Memory is granted, or shared, once.

use ringfence_device::Device;
use ringfence_device::blk::{self as device, Blk as Disk};
use ringfence_device::storage;
use ringfence_dma::{Buffer, BusAddr, FrontendVa, Gpa, Permission};
use ringfence_driver::blk::{Blk, Options, Request};
use ringfence_driver::mapper::Direct;
use ringfence_driver::pci::Pci;
use ringfence_driver::policy::{DriverPolicy, Identity, Platform, Taken};
use ringfence_driver::{DeviceStatus, Host, Transport, Waiting};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_policy::IommuMode;
use ringfence_ring::Layout;
use ringfence_vfio_user::client::Client;
use ringfence_vfio_user::server as vfio_user;
use ringfence_vhost_user::client::{self, Attachment, FrontendTransport};
use ringfence_vhost_user::server::{self as vhost_user, Keep, Server};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MEMORY: usize = 8 << 20;
const RINGS: usize = 1 << 20;
const DEPTH: usize = 32;
const PIECE: usize = 4096;
const ROUND: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_micros(50);
const QUEUE: u16 = 256;

fn main() {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(std::io::stderr).init();
    let rounds = std::env::args().nth(1).map_or(10, |rounds| rounds.parse().expect("a number of rounds"));
    let mut seen = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        seen[0].push(over_vfio_user());
        seen[1].push(over_vhost_user());
    }
    let [vfio, vhost] = seen.map(|mut seen| {
        seen.sort_by(f64::total_cmp);
        seen[seen.len() / 2]
    });
    println!("vfio-user {:.0} k/s, vhost-user {:.0} k/s, ratio {:.3}", vfio / 1e3, vhost / 1e3, vfio / vhost);
}

fn disk() -> Arc<dyn Device> {
    let storage = storage::open("null:64M", storage::Format::Raw, false).expect("a disk without content");
    Arc::new(Disk::new(storage, device::Options { queues: 1, queue_size: QUEUE, serial: String::new() }))
}

/// Has `serve` serve while `test` runs.
fn with_server(serve: impl FnOnce(Server, BorrowedFd<'_>) + Send + 'static, test: impl FnOnce(&Path) -> f64) -> f64 {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket).expect("a socket");
    let (mut end, ended) = UnixStream::pair().expect("a pair of sockets");
    let thread = std::thread::spawn(move || serve(server, ended.as_fd()));
    let result = test(&socket);
    end.write_all(&[0]).expect("the server listens");
    thread.join().expect("the server ends");
    result
}

fn over_vfio_user() -> f64 {
    let serve = |server, end: BorrowedFd<'_>| {
        let options = vfio_user::Options {
            iommu: IommuMode::Offer,
            queue_size: QUEUE,
            poll: POLL,
            io_timeout: Duration::from_secs(1),
        };
        vfio_user::run(server, "blk", || Ok(disk()), options, end).expect("a server");
    };
    with_server(serve, |socket| {
        let client = Client::new(UnixStream::connect(socket).expect("a server"), false, None).expect("a function");
        let memory = SharedMemory::new(MEMORY).expect("memory");
        client
            .map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((memory.as_fd(), 0)))
            .expect("memory can be granted");
        let bells = client.doorbells().expect("doorbells");
        let pci = Pci::new(client.function(), |_: Waiting, _| {
            std::thread::yield_now();
            true
        });
        load(Rung { inner: pci.expect("a function"), bells }, &memory)
    })
}

fn over_vhost_user() -> f64 {
    let serve = |server: Server, end: BorrowedFd<'_>| {
        let options = vhost_user::Options {
            iommu: IommuMode::Off,
            keep: Keep::Auto,
            queue_size: QUEUE,
            poll: POLL,
            io_timeout: Duration::from_secs(1),
        };
        server.run(disk(), options, end).expect("a server");
    };
    with_server(serve, |socket| {
        let frontend = Arc::new(client::Frontend::connect(socket, client::Options::default()).expect("a back-end"));
        let memory = SharedMemory::new(MEMORY).expect("memory");
        let frontend_va = FrontendVa(memory.slice(0, MEMORY).as_ptr() as u64);
        let placement = Placement { gpa: Gpa(0), frontend_va, size: MEMORY as u64, offset: 0 };
        frontend.set_memory(&[(placement, memory.as_fd())]).expect("memory can be shared");
        let patience = Duration::from_secs(10);
        let attachment = Attachment { device: 2, queue_size: QUEUE, gpa: Gpa(0), frontend_va, patience };
        load(FrontendTransport::new(frontend, attachment), &memory)
    })
}

/// Requests a second.
fn load<T: Transport>(transport: T, memory: &SharedMemory) -> f64 {
    let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
    let host =
        Host { platform: Platform::X86, policy: DriverPolicy::Old, physical: Some(&mapper), translated: Some(&mapper) };
    let mut disk = Blk::start(transport, host, Options { depth: 128, segments: 2 }).expect("a disk");
    let buffer = |number: usize| {
        let at = RINGS + number % DEPTH * PIECE;
        Buffer::new(memory.slice(at, PIECE), Gpa(at as u64))
    };
    let (mut submitted, mut done) = (0, 0);
    let since = Instant::now();
    while since.elapsed() < ROUND {
        for _ in 0..64 {
            let room = DEPTH - (submitted - done);
            for _ in 0..room {
                let sector = (submitted as u64 * 8).wrapping_mul(0x9e37_79b9) % 100_000;
                disk.submit(Request::Read { sector, into: &[buffer(submitted)] }).expect("room");
                submitted += 1;
            }
            if room > 0 {
                disk.notify().expect("a bell");
            }
            while let Some(completion) = disk.poll().expect("a ring") {
                completion.result.expect("a read");
                done += 1;
            }
        }
    }
    done as f64 / since.elapsed().as_secs_f64()
}

/// Rings by eventfd, as a hypervisor does for its guest.
struct Rung<T> {
    inner: T,
    bells: Vec<OwnedFd>,
}

impl<T: Transport> Transport for Rung<T> {
    type Error = T::Error;

    fn features(&self) -> u64 {
        self.inner.features()
    }

    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn reset(&mut self) -> Result<(), T::Error> {
        self.inner.reset()
    }

    fn status(&mut self) -> Result<DeviceStatus, T::Error> {
        self.inner.status()
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<(), T::Error> {
        self.inner.set_status(status)
    }

    fn offered(&mut self) -> Result<u64, T::Error> {
        self.inner.offered()
    }

    fn take(&mut self, taken: Taken) -> Result<(), T::Error> {
        self.inner.take(taken)
    }

    fn config_generation(&mut self) -> Result<u32, T::Error> {
        self.inner.config_generation()
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), T::Error> {
        self.inner.read_config(offset, into)
    }

    fn max_queue_size(&mut self, queue: u16) -> Result<u16, T::Error> {
        self.inner.max_queue_size(queue)
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout) -> Result<(), T::Error> {
        self.inner.start_queue(queue, layout)
    }

    fn reset_queue(&mut self, queue: u16) -> Result<(), T::Error> {
        self.inner.reset_queue(queue)
    }

    fn notify(&mut self, queue: u16) -> Result<(), T::Error> {
        let _ = rustix::io::write(&self.bells[usize::from(queue)], &1_u64.to_ne_bytes());
        Ok(())
    }

    fn wait(&mut self, queue: u16) -> Result<(), T::Error> {
        self.inner.wait(queue)
    }
}
