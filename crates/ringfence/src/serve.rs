//! `ringfence serve`: one device, one socket, by one of two transports.

use crate::log;
use anyhow::Context;
use clap::{Args, Subcommand};
use ringfence_device::Device;
use ringfence_device::blk::{self, Blk};
use ringfence_device::rng::Rng;
use ringfence_device::storage::{self, Format};
use ringfence_policy::IommuMode;
use ringfence_vfio_user::server as vfio_user;
use ringfence_vhost_user::server::{Keep, Options, Server};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::fmt::Debug;
use std::io;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;

/// The devices; each is a line here and a file in `ringfence-device`.
#[derive(Subcommand)]
pub(crate) enum Serve {
    /// A disk (virtio-blk)
    Blk(ServeBlk),
    /// A source of random bytes (virtio-rng)
    Rng(ServeRng),
}

impl Serve {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Serve::Blk(blk) => blk.run(),
            Serve::Rng(rng) => rng.run(),
        }
    }
}

/// What every served device is told.
#[derive(Args)]
pub(crate) struct Common {
    /// How the VMM reaches the device
    ///
    /// vhost-user: the VMM has the PCI function, and this process the queues; the VMM hands over all of the guest's memory.
    /// vfio-user: this process is the whole PCI function, as a card on a bus is, and has what DMA_MAP grants it.
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,

    /// Listen on this Unix socket for one front-end (VMM) after the other
    ///
    /// A socket that a dead process left behind is replaced, one that somebody listens on is not. Removed at the end.
    #[arg(long, visible_alias = "socket-path", value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"])]
    socket: Option<PathBuf>,

    /// Use the socket that was inherited as this file descriptor, listening or connected
    #[arg(long, value_name = "N", conflicts_with = "socket", value_parser = clap::value_parser!(RawFd).range(0..))]
    fd: Option<RawFd>,

    /// What to do about the IOMMU
    ///
    /// off: an old device; the flag is not offered. offer: the flag is offered, and once it is taken everything is
    /// translated. require: whoever does not take the flag is refused. QEMU strips the flag where the machine has no
    /// IOMMU, so `require` also refuses such machines.
    #[arg(long, value_name = "MODE", default_value_t, value_parser = named::<IommuMode>(&["off", "offer", "require"]))]
    pub(crate) iommu: IommuMode,

    /// How long to keep translations
    ///
    /// cache: until the front-end takes them away. request: for one request, for front-ends that never take any away,
    /// such as QEMU's amd-iommu, or its intel-iommu before 8.1 without a device TLB. auto: for one request until the
    /// front-end has shown which it is.
    #[arg(long, value_name = "HOW", default_value_t, value_parser = named::<Keep>(&["auto", "cache", "request"]))]
    iotlb: Keep,

    /// For how many microseconds a queue looks for more work before it sleeps, at the most
    ///
    /// Looking saves the time that waking up takes, which is tens of microseconds in a virtual machine. A queue whose
    /// looking is in vain does less of it, and while it looks it gives way to whoever wants its processor. 0: never. A
    /// disk of ours does it for 50 unless told otherwise, and never before a back-end of others: they have the work to do.
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    poll: Option<u64>,

    /// How many seconds storage, or a back-end, that does not answer may keep the VMM waiting
    ///
    /// A VMM waits for a queue to stop when its guest is paused or resets the device, and the queue for the I/O that is
    /// under way. After this time that is cancelled, and what can't be is left to itself: it has none of the guest's
    /// memory. When the queue goes on, its requests start anew. An invalidation never waits for storage.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = seconds)]
    io_timeout: f64,

    /// How many MSI-X vectors the function has at the most; by vfio-user alone
    ///
    /// By default it has one for each queue and one for the configuration, and Linux gives each of them an interrupt of its
    /// own. With fewer they share: a guest with many cards may be short of vectors.
    #[arg(long, value_name = "N")]
    vectors: Option<NonZeroU16>,

    /// How much to log to standard error: off, error, warn, info, debug, trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub(crate) log: LevelFilter,

    /// Print what this back-end can do as JSON, as the vhost-user convention asks, and exit
    #[arg(long)]
    pub(crate) print_capabilities: bool,
}

/// How a VMM reaches a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Transport {
    /// Queues, of a function that is the VMM's
    #[default]
    VhostUser,
    /// A whole PCI function
    VfioUser,
}

/// For how long a disk's queue looks for more work.
const POLL: Duration = Duration::from_micros(50);

/// Each queue is a thread; more than this many is a slip of the finger.
pub(crate) const MAX_QUEUES: i64 = 256;

/// One of `names`, each of which parses.
pub(crate) fn named<T>(names: &'static [&'static str]) -> impl clap::builder::TypedValueParser<Value = T>
where
    T: FromStr<Err: Debug> + Clone + Send + Sync + 'static,
{
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    PossibleValuesParser::new(names.iter().copied()).map(|name| name.parse().expect("one of the names"))
}

/// Up to a day.
fn seconds(text: &str) -> Result<f64, String> {
    let seconds: Result<f64, _> = text.parse();
    seconds.ok().filter(|seconds| (0.0..=86400.0).contains(seconds)).ok_or("expected 0 to 86400".to_owned())
}

impl Common {
    /// First of all, while the only descriptors are those that were inherited.
    pub(crate) fn server(&self) -> anyhow::Result<Server> {
        Ok(match (&self.socket, self.fd) {
            (Some(path), _) => Server::bind(path)?,
            (None, Some(fd)) => Server::inherit(fd)?,
            (None, None) => unreachable!("the command line requires one of them"),
        })
    }

    /// Serves the devices that `open` makes, one for each front-end, until the process is told to end.
    pub(crate) fn serve(
        self,
        server: Server,
        name: &str,
        (queue_size, poll): (u16, Duration),
        open: impl FnMut() -> io::Result<Arc<dyn Device>>,
    ) -> anyhow::Result<ExitCode> {
        let end = end_of_process().context("can't wait for SIGTERM and SIGINT")?;
        let poll = self.poll.map_or(poll, Duration::from_micros);
        let (iommu, io_timeout) = (self.iommu, Duration::from_secs_f64(self.io_timeout));
        end_in_any_case(end.try_clone()?, self.socket)?;
        match self.transport {
            Transport::VhostUser => {
                anyhow::ensure!(
                    self.vectors.is_none(),
                    "--vectors is for --transport vfio-user: else they are the VMM's"
                );
                let options = Options { iommu, keep: self.iotlb, queue_size, poll, io_timeout };
                server.run_each(name, open, options, end.as_fd())?;
            }
            Transport::VfioUser => {
                let options = vfio_user::Options { iommu, queue_size, poll, io_timeout, vectors: self.vectors };
                vfio_user::run(server, name, open, options, end.as_fd())?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Relays between one front-end after the other and a back-end, until the process is told to end.
    pub(crate) fn pass(self, server: Server, options: &ringfence_wrap::Options) -> anyhow::Result<ExitCode> {
        let end = end_of_process().context("can't wait for SIGTERM and SIGINT")?;
        end_in_any_case(end.try_clone()?, self.socket)?;
        let serve = |stream| ringfence_wrap::pass::relay(stream, options, end.as_fd());
        server.each("pass", serve, end.as_fd())?;
        Ok(ExitCode::SUCCESS)
    }
}

/// How long a process that was told to end may take: longer than all that is waited for in good order.
const END: Duration = Duration::from_secs(5);

/// Ends the process some seconds after it was told to, whatever its other threads are stuck in.
fn end_in_any_case(end: UnixStream, socket: Option<PathBuf>) -> io::Result<()> {
    let watch = move || {
        let mut told = [PollFd::new(&end, PollFlags::IN)];
        while poll(&mut told, None) == Err(Errno::INTR) {}
        std::thread::sleep(END);
        tracing::error!("did not end in {END:?}, so what is left is left behind");
        if let Some(socket) = socket {
            let _ = std::fs::remove_file(socket);
        }
        std::process::exit(0);
    };
    std::thread::Builder::new().name("end".to_owned()).spawn(watch).map(drop)
}

/// Becomes readable when the process is told to end.
fn end_of_process() -> io::Result<UnixStream> {
    let (ours, handler) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, handler.try_clone()?)?;
    }
    Ok(ours)
}

/// Serve a source of random bytes: this machine's.
#[derive(Args)]
pub(crate) struct ServeRng {
    #[command(flatten)]
    common: Common,
}

/// The longest queue of a device that has one request at a time.
const SHORT_QUEUE: u16 = 64;

impl ServeRng {
    fn run(self) -> anyhow::Result<ExitCode> {
        if self.common.print_capabilities {
            println!("{}", serde_json::json!({ "type": "rng" }));
            return Ok(ExitCode::SUCCESS);
        }
        log::to_stderr(self.common.log);
        let server = self.common.server()?;
        let device: Arc<dyn Device> = Arc::new(Rng);
        self.common.serve(server, device.name(), (SHORT_QUEUE, Duration::ZERO), || Ok(Arc::clone(&device)))
    }
}

/// Serve a disk over vhost-user, or as a whole PCI function over vfio-user.
///
/// The image stays open for as long as the process runs; several front-ends are served one after the other.
#[derive(Args)]
#[command(after_long_help = BLK_EXAMPLE)]
pub(crate) struct ServeBlk {
    #[command(flatten)]
    common: Common,

    /// How many queues to offer
    ///
    /// A VMM sets up as many of them as it likes: QEMU one for each processor of the guest, unless told otherwise.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES))]
    queues: u16,

    /// The longest queue that a driver may set up
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(2..=32768))]
    queue_size: u16,

    /// The image file or block device; null:SIZE for a disk without content, memory:SIZE for one in memory
    #[arg(long, visible_alias = "blk-file", value_name = "PATH", required_unless_present = "print_capabilities")]
    image: Option<String>,

    /// The image's format; it is never guessed, because a guest could make a raw image look like another
    #[arg(long, value_name = "FORMAT", default_value = "raw", value_parser = named::<Format>(&["raw", "qcow2", "vmdk"]))]
    format: Format,

    /// Refuse every write
    #[arg(long)]
    read_only: bool,

    /// The serial number that the guest sees, up to 20 bytes
    #[arg(long, value_name = "TEXT", default_value = "ringfence", value_parser = serial)]
    serial: String,
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() <= 20 { Ok(text.to_owned()) } else { Err(format!("{} bytes, a disk has room for 20", text.len())) }
}

const BLK_EXAMPLE: &str = "\
Example:
  ringfence serve blk --socket /tmp/disk.sock --image disk.img --iommu require &
  qemu-system-x86_64 -M q35,memory-backend=mem,kernel-irqchip=split -device intel-iommu,intremap=on \\
    -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=disk,path=/tmp/disk.sock \\
    -device vhost-user-blk-pci,chardev=disk,disable-legacy=on,iommu_platform=on …";

impl ServeBlk {
    fn run(self) -> anyhow::Result<ExitCode> {
        if self.common.print_capabilities {
            println!("{}", serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] }));
            return Ok(ExitCode::SUCCESS);
        }
        log::to_stderr(self.common.log);
        let image = self.image.expect("the command line requires it");
        let server = self.common.server()?;
        let storage = storage::open(&image, self.format, self.read_only)?;
        let options = blk::Options { queues: self.queues, queue_size: self.queue_size, serial: self.serial };
        let device: Arc<dyn Device> = Arc::new(Blk::new(storage, options));
        self.common.serve(server, device.name(), (self.queue_size, POLL), || Ok(Arc::clone(&device)))
    }
}
