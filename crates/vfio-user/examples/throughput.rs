//! The same disk, driver and memory over vfio-user and over vhost-user, in turns: requests a second, and their ratio.
//!
//! `cargo run --release -p ringfence-vfio-user --example throughput [ROUNDS [BYTES [DEPTH [STORAGE]]]]`: so many rounds of
//! reads of so many bytes, so many at a time, from a disk that keeps nothing or from a file. Everything is in one process;
//! memory is granted, or shared, once. The function is rung by eventfd, as a hypervisor does for its guest, and by messages
//! that want no answer, as QEMU does.
//!
//! The driver has the first processor and the queue the second, where there are two: else the kernel now and then has both
//! on one for a while, and a round is slow for no reason of its own. The ratio is the median of the rounds' own ratios,
//! which what else the machine does leaves alone as long as it lasts longer than a round.

use ringfence_device::Device;
use ringfence_device::blk::{self as device, Blk as Disk};
use ringfence_device::storage;
use ringfence_dma::{Buffer, BusAddr, FrontendVa, Gpa, Permission};
use ringfence_driver::blk::{Blk, Options, Request as Read};
use ringfence_driver::mapper::Direct;
use ringfence_driver::pci::Pci;
use ringfence_driver::policy::{DriverPolicy, Identity, Platform, Taken};
use ringfence_driver::{DeviceStatus, Host, Transport, Waiting};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_policy::IommuMode;
use ringfence_ring::Layout;
use ringfence_vfio_user::client::Client;
use ringfence_vfio_user::layout::{BAR_VIRTIO, NOTIFY, NOTIFY_MULTIPLIER};
use ringfence_vfio_user::server as vfio_user;
use ringfence_vfio_user::wire::{Answer, Request, Write};
use ringfence_vhost_user::client::{self, Attachment, FrontendTransport};
use ringfence_vhost_user::server::{self as vhost_user, Keep, Server};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MEMORY: usize = 64 << 20;
const RINGS: usize = 1 << 20;
const ROUND: Duration = Duration::from_millis(200);
const POLL: Duration = Duration::from_micros(50);
const QUEUE: u16 = 256;

/// What is read.
#[derive(Clone)]
struct Load {
    piece: usize,
    depth: usize,
    storage: String,
}

fn main() {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(std::io::stderr).init();
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(default, |it| it.parse().expect("a number"));
    let (rounds, piece, depth) = (number(20), number(4096), number(32));
    let load = Load { piece, depth, storage: arguments.next().unwrap_or_else(|| "null:64M".to_owned()) };
    assert!(RINGS + piece * depth <= MEMORY, "{depth} times {piece} bytes");
    keep_to(0);
    let ways: [(&str, &dyn Fn() -> f64); 3] = [
        ("vhost-user", &|| over_vhost_user(&load)),
        ("vfio-user, rung by eventfd", &|| over_vfio_user(&load, Ringing::EventFds)),
        ("vfio-user, rung by messages", &|| over_vfio_user(&load, Ringing::Messages)),
    ];
    let mut seen: [Vec<f64>; 3] = Default::default();
    for round in 0..rounds {
        // Who comes first takes turns.
        for turn in 0..ways.len() {
            let way = (round + turn) % ways.len();
            seen[way].push(ways[way].1());
        }
    }
    let median = |seen: &mut Vec<f64>| {
        seen.sort_by(f64::total_cmp);
        (seen[seen.len() / 4], seen[seen.len() / 2], seen[seen.len() * 3 / 4])
    };
    for ((name, _), of) in ways.iter().zip(&seen) {
        let mut ratios = of.iter().zip(&seen[0]).map(|(this, vhost)| this / vhost).collect();
        let (low, ratio, high) = median(&mut ratios);
        let (_, rate, _) = median(&mut of.clone());
        println!("{:>8.1} k/s  {ratio:.3} ({low:.3} to {high:.3})  {name}", rate / 1e3);
    }
}

/// Keeps this thread, and those that it starts, to one processor, if there is such a one.
fn keep_to(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor);
    // Where that fails the figures are less quiet.
    let _ = sched_setaffinity(None, &set);
}

fn disk(storage: &str) -> Arc<dyn Device> {
    let storage = storage::open(storage, storage::Format::Raw, true).expect("a disk");
    Arc::new(Disk::new(storage, device::Options { queues: 1, queue_size: QUEUE, serial: String::new() }))
}

/// Has `serve` serve while `test` runs.
fn with_server(serve: impl FnOnce(Server, BorrowedFd<'_>) + Send + 'static, test: impl FnOnce(&Path) -> f64) -> f64 {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket).expect("a socket");
    let (mut end, ended) = UnixStream::pair().expect("a pair of sockets");
    let thread = std::thread::spawn(move || {
        keep_to(1);
        serve(server, ended.as_fd());
    });
    let result = test(&socket);
    end.write_all(&[0]).expect("the server listens");
    thread.join().expect("the server ends");
    result
}

/// How the function's queue is rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ringing {
    EventFds,
    Messages,
}

fn over_vfio_user(load: &Load, ringing: Ringing) -> f64 {
    let storage = load.storage.clone();
    let serve = move |server, end: BorrowedFd<'_>| {
        let options = vfio_user::Options {
            iommu: IommuMode::Offer,
            queue_size: QUEUE,
            poll: POLL,
            io_timeout: Duration::from_secs(1),
            vectors: None,
        };
        vfio_user::run(server, "blk", || Ok(disk(&storage)), options, end).expect("a server");
    };
    with_server(serve, |socket| {
        let client = Client::new(UnixStream::connect(socket).expect("a server"), false, None).expect("a function");
        let memory = SharedMemory::new(MEMORY).expect("memory");
        client
            .map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((memory.as_fd(), 0)))
            .expect("memory can be granted");
        let bells = match ringing {
            Ringing::EventFds => Bells::EventFds(client.doorbells().expect("doorbells")),
            Ringing::Messages => Bells::Messages(&client),
        };
        let pci = Pci::new(client.function(), |_: Waiting, _| {
            std::thread::yield_now();
            true
        });
        run(load, Rung { inner: pci.expect("a function"), bells }, &memory)
    })
}

fn over_vhost_user(load: &Load) -> f64 {
    let storage = load.storage.clone();
    let serve = move |server: Server, end: BorrowedFd<'_>| {
        let options = vhost_user::Options {
            iommu: IommuMode::Off,
            keep: Keep::Auto,
            queue_size: QUEUE,
            poll: POLL,
            io_timeout: Duration::from_secs(1),
        };
        server.run(disk(&storage), options, end).expect("a server");
    };
    with_server(serve, |socket| {
        let frontend = Arc::new(client::Frontend::connect(socket, client::Options::default()).expect("a back-end"));
        let memory = SharedMemory::new(MEMORY).expect("memory");
        let frontend_va = FrontendVa(memory.slice(0, MEMORY).as_ptr() as u64);
        let placement = Placement { gpa: Gpa(0), frontend_va, size: MEMORY as u64, offset: 0 };
        frontend.set_memory(&[(placement, memory.as_fd())]).expect("memory can be shared");
        let patience = Duration::from_secs(10);
        let attachment = Attachment { device: 2, queue_size: QUEUE, gpa: Gpa(0), frontend_va, patience };
        run(load, FrontendTransport::new(frontend, attachment), &memory)
    })
}

/// Requests a second.
fn run<T: Transport>(&Load { piece, depth, .. }: &Load, transport: T, memory: &SharedMemory) -> f64 {
    let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
    let host =
        Host { platform: Platform::X86, policy: DriverPolicy::Old, physical: Some(&mapper), translated: Some(&mapper) };
    let mut disk = Blk::start(transport, host, Options { depth: 128, segments: 2 }).expect("a disk");
    let buffer = |number: usize| {
        let at = RINGS + number % depth * piece;
        Buffer::new(memory.slice(at, piece), Gpa(at as u64))
    };
    let (mut submitted, mut done) = (0, 0);
    let since = Instant::now();
    while since.elapsed() < ROUND {
        for _ in 0..64 {
            let room = depth - (submitted - done);
            for _ in 0..room {
                let sector = (submitted as u64 * 8).wrapping_mul(0x9e37_79b9) % 100_000;
                disk.submit(Read::Read { sector, into: &[buffer(submitted)] }).expect("room");
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

/// A function that is rung otherwise than its own transport does, which waits for an answer.
struct Rung<'c, T> {
    inner: T,
    bells: Bells<'c>,
}

enum Bells<'c> {
    EventFds(Vec<OwnedFd>),
    Messages(&'c Client),
}

impl<T: Transport> Transport for Rung<'_, T> {
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
        match &self.bells {
            Bells::EventFds(bells) => drop(rustix::io::write(&bells[usize::from(queue)], &1_u64.to_ne_bytes())),
            Bells::Messages(client) => {
                let offset = NOTIFY.start + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER);
                let data = queue.to_le_bytes().to_vec();
                let write = Request::RegionWrite(Write { region: BAR_VIRTIO, offset, data });
                client.send(&write, Answer::Unwanted).expect("a server");
            }
        }
        Ok(())
    }

    fn wait(&mut self, queue: u16) -> Result<(), T::Error> {
        self.inner.wait(queue)
    }
}
