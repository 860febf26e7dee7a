//! `ringfence wrap`: anyone's back-end, behind the IOMMU.

use crate::log;
use crate::serve::{Common, MAX_QUEUES, named};
use clap::{Args, ValueEnum};
use ringfence_device::Device;
use ringfence_policy::IommuMode;
use ringfence_ring::Format;
use ringfence_wrap::{Kind, MIN_POOL, OnError, Options, Wrapped};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Put anyone's vhost-user back-end behind the guest's IOMMU
///
/// Stands between a VMM and an unmodified back-end (qemu-storage-daemon, SPDK, virtiofsd, …). The VMM sees a device that
/// offers the flag and translates; the back-end sees a front-end without an IOMMU, and of all memory only a private file
/// of rings and a bounce pool. What it can reach is then the kernel's to say.
#[derive(Args)]
#[command(after_long_help = EXAMPLE)]
pub(crate) struct Wrap {
    #[command(flatten)]
    common: Common,

    /// The socket that the back-end listens on
    ///
    /// It is waited for at the start, and connected to again whenever it has gone; then it gets again what it has not
    /// answered.
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    backend: Option<PathBuf>,

    /// Whether the back-end is confined
    ///
    /// confine: it sees a bounce pool and nothing else. pass: for guests without a vIOMMU whose VMM demands the flag all
    /// the same, as for confidential guests; the back-end gets the guest's memory and runs at full speed, and only the flag
    /// is added. Should there be a vIOMMU, that is refused.
    #[arg(long, value_name = "MODE", value_enum, default_value = "confine")]
    mode: Mode,

    /// What kind of device the back-end is
    ///
    /// generic is for types whose queues carry requests, or buffers to be filled, and nothing that refers to other memory.
    #[arg(long, value_name = "KIND", default_value_t, value_parser = named::<Kind>(&["blk", "net", "fs", "generic"]))]
    device: Kind,

    /// Offer at most so many queues (of a network card: pairs)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES))]
    queues: Option<u16>,

    /// The longest queue that a driver may set up
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(2..=32768))]
    queue_size: u16,

    /// How many bytes may be with the back-end at a time
    ///
    /// Requests for which there is no room wait in order; one that is larger fails. K, M and G are powers of 1024.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = pool_size)]
    pool: usize,

    /// The format of the back-end's rings; the driver's are whatever it takes
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "split")]
    backend_ring: BackendRing,

    /// Hang up on the back-end if it leaves a request unanswered for so many seconds; 0: never
    ///
    /// A storage that hangs for longer than this and comes back may then carry out a write twice.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    timeout: u64,

    /// What follows when the back-end breaks the rules
    ///
    /// reconnect: it is hung up on, and whoever answers on its socket next gets what it has not answered. stop: disks and
    /// shared folders fail every request from then on, other devices stand still.
    #[arg(long, value_name = "WHAT", value_enum, default_value = "reconnect")]
    on_error: Consequence,
}

const EXAMPLE: &str = "\
Example:
  qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=disk.img \\
    --export type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=/tmp/plain.sock,writable=on &
  ringfence wrap --socket /tmp/disk.sock --backend /tmp/plain.sock --iommu require &
  qemu-system-x86_64 -M q35,memory-backend=mem,kernel-irqchip=split -device intel-iommu,intremap=on \\
    -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=disk,path=/tmp/disk.sock \\
    -device vhost-user-blk-pci,chardev=disk,disable-legacy=on,iommu_platform=on …";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Confine,
    Pass,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum BackendRing {
    Split,
    Packed,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Consequence {
    Reconnect,
    Stop,
}

/// How long a back-end is waited for that is not there when it is needed.
const PATIENCE: Duration = Duration::from_secs(10);

/// A number of bytes, with K, M or G for powers of 1024.
fn pool_size(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: usize = digits.parse().map_err(|_| "not a size such as 64M".to_owned())?;
    match number.checked_mul(1 << shift) {
        Some(size) if (MIN_POOL..=MAX_POOL).contains(&size) => Ok(size),
        _ => Err(format!("a pool has {}K to {}G", MIN_POOL >> 10, MAX_POOL >> 30)),
    }
}

const MAX_POOL: usize = 64 << 30;

impl Wrap {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        if self.common.print_capabilities {
            let kind = match self.device {
                Kind::Blk => "block",
                Kind::Net => "net",
                Kind::Fs => "fs",
                Kind::Generic => "generic",
            };
            println!("{}", serde_json::json!({ "type": kind }));
            return Ok(ExitCode::SUCCESS);
        }
        log::to_stderr(self.common.log);
        if self.mode == Mode::Pass && self.common.iommu != IommuMode::Offer {
            anyhow::bail!(
                "--mode pass is for machines without an IOMMU, so --iommu {} makes no sense",
                self.common.iommu
            );
        }
        let server = self.common.server()?;
        let options = Options {
            backend: self.backend.expect("the command line requires it"),
            kind: self.device,
            queues: self.queues,
            queue_size: self.queue_size,
            pool: self.pool,
            format: match self.backend_ring {
                BackendRing::Split => Format::Split,
                BackendRing::Packed => Format::Packed,
            },
            timeout: (self.timeout > 0).then(|| Duration::from_secs(self.timeout)),
            on_error: match self.on_error {
                Consequence::Reconnect => OnError::Reconnect,
                Consequence::Stop => OnError::Stop,
            },
            patience: PATIENCE,
        };
        if self.mode == Mode::Pass {
            return self.common.pass(server, &options);
        }
        // At once, so that a mistake shows before there is a VMM; the first front-end gets this very connection.
        let mut first = Some(Wrapped::open(options.clone())?);
        let open = || -> io::Result<Arc<dyn Device>> {
            let wrapped = first.take().map_or_else(|| Wrapped::open(options.clone()), Ok);
            Ok(Arc::new(wrapped.map_err(io::Error::other)?))
        };
        self.common.serve(server, &format!("wrapped {}", self.device), (self.queue_size, Duration::ZERO), open)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(pool_size("64K"), Ok(64 << 10));
        assert_eq!(pool_size("1m"), Ok(1 << 20));
        assert_eq!(pool_size("65536"), Ok(65536));
        assert!(pool_size("64").is_err() && pool_size("M").is_err() && pool_size("-1M").is_err());
        assert!(pool_size("99999999999G").is_err());
    }
}
