//! Back-ends of somebody else's behind `ringfence wrap`, and Linux guests behind an IOMMU that use them: virtiofsd and passt.
//! (qemu-storage-daemon is among the real guests.)

mod card;
mod folder;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use ringfence_guests::{
    Arch, Backend, Cache, Error, Guest, Initramfs, Kernel, KernelSeries, Passt, Qemu, QemuSource, Virtiofsd,
};
use ringfence_policy::IommuMode;
use sha2::{Digest, Sha256};

use crate::Workspace;
use crate::pc::Pc;
use crate::steps::{Log, Pass, StepResult, say};

/// How long the server's last line is waited for.
const PARTING: Duration = Duration::from_secs(10);

/// Longer than the pool has room for at a time.
const BYTES: usize = 3 << 20;

/// Which back-ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Which {
    /// virtiofsd.
    Folders,
    /// passt.
    Card,
    #[default]
    All,
}

/// Boots the guests.
pub(crate) fn boot(workspace: &Workspace, which: Which, no_skip: bool, log: &mut Log) -> StepResult {
    let progress = |line: &str| say(&format!("    {line}"));
    let text = |error: Error| error.to_string();
    let cache = Cache::open(&workspace.target.join("guests"), &progress).map_err(text)?;
    let found = Qemu::find(&cache, QemuSource::Auto, &[Arch::Amd64]);
    let found = found.and_then(|qemu| {
        let virtiofsd = (which != Which::Card).then(|| Virtiofsd::unpacked(&cache)).transpose()?;
        let passt = (which != Which::Folders).then(|| Passt::unpacked(&cache)).transpose()?;
        Ok((qemu, virtiofsd, passt))
    });
    let (qemu, virtiofsd, passt) = match found {
        Ok(found) => found,
        Err(error) if error.is_missing_tool() && !no_skip => return Ok(Pass::Skipped(error.to_string())),
        Err(error) => return Err(error.to_string()),
    };
    let busybox = cache.busybox(Arch::Amd64).map_err(text)?;
    let machine = |iommu: Iommu| -> Result<Machine<'_>, String> {
        let kernel = cache.kernel(iommu.kernel(), Arch::Amd64).map_err(text)?;
        Ok(Machine { server: workspace.ringfence(), qemu: &qemu, kernel, busybox: &busybox, iommu })
    };
    let (intel, virtio) = (machine(Iommu::Intel)?, machine(Iommu::Virtio)?);

    // Two at a time, which is what the smallest machine has processors for.
    let log = &Shared(Mutex::new(log));
    let share = |machine: &Machine<'_>, iommu: &str| {
        let share = |virtiofsd| timed(&format!("virtiofsd behind {iommu}"), || folder::share(machine, virtiofsd, log));
        virtiofsd.as_ref().map(share).transpose()
    };
    let connect = || {
        let connect = |passt| timed("passt", || card::connect(&intel, passt, log));
        passt.as_ref().map(connect).transpose()
    };
    let (first, other) = thread::scope(|scope| {
        let first = scope.spawn(|| Ok::<_, String>((share(&intel, "intel-iommu")?, connect()?)));
        let other = share(&virtio, "virtio-iommu");
        (first.join().expect("a leg does not panic"), other)
    });
    let ((folder, card), other) = (first?, other?);
    match &card {
        Some((_, card::Connected::NoPasst(reason))) if no_skip => return Err(reason.clone()),
        Some((_, card::Connected::NoPasst(reason))) => return Ok(Pass::Skipped(format!("passt: {reason}"))),
        Some((_, card::Connected::Yes)) | None => {}
    }
    let done = folder.into_iter().chain(other).map(|(name, ())| name).chain(card.map(|(name, _)| name));
    Ok(Pass::Whole(done.collect::<Vec<_>>().join("; ")))
}

/// What `leg` came to, after its name and its time.
fn timed<T>(name: &str, leg: impl FnOnce() -> Result<T, String>) -> Result<(String, T), String> {
    let started = Instant::now();
    let done = leg().map_err(|reason| format!("{name}: {reason}"))?;
    Ok((format!("{name}, {:.1} s", started.elapsed().as_secs_f64()), done))
}

/// The step's log, whose entries stay whole though two guests write them.
struct Shared<'l>(Mutex<&'l mut Log>);

impl Shared<'_> {
    fn line(&self, line: impl fmt::Display) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).line(line);
    }
}

/// What the guest has between itself and its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Iommu {
    Intel,
    Virtio,
}

impl Iommu {
    /// The oldest here that drives it.
    fn kernel(self) -> KernelSeries {
        match self {
            Self::Intel => KernelSeries::V6_1,
            Self::Virtio => KernelSeries::V6_12,
        }
    }

    fn device(self) -> &'static str {
        match self {
            Self::Intel => "intel-iommu",
            Self::Virtio => "virtio-iommu-pci",
        }
    }

    /// The modules that come before the device's own driver.
    fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Intel => &["virtio_pci"],
            Self::Virtio => &["virtio_pci", "virtio_iommu"],
        }
    }
}

/// What runs the guests, and what is wrapped.
struct Machine<'a> {
    /// `ringfence`.
    server: PathBuf,
    qemu: &'a Qemu,
    kernel: Kernel,
    busybox: &'a Path,
    iommu: Iommu,
}

impl Machine<'_> {
    /// Writes a guest whose only program is `script` to `path`, with the module of its device.
    fn write_guest(&self, script: &str, module: &str, path: &Path) -> Result<(), String> {
        let modules = [self.iommu.modules(), &[module]].concat();
        let archive = Initramfs::of_script(&self.kernel, self.busybox, script, &modules);
        let archive = archive.map_err(|error| error.to_string())?;
        fs::write(path, archive.bytes()).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Boots with a device of those options at `socket`; how QEMU ended, and all that was said.
    fn run(&self, initramfs: &Path, device: &[&str], socket: &Path) -> Result<(ExitStatus, String), String> {
        let mut pc = Pc::with_shared_memory(self.qemu, 256);
        pc.device(self.iommu.device()).socket("socket", socket).command().args(device);
        pc.linux(&self.kernel, initramfs, "intel_iommu=on").run(&socket.with_extension("console"))
    }

    /// Sees that QEMU does not even start with a device of those options when nobody stands between.
    fn is_refused(&self, initramfs: &Path, device: &[&str], plain: &Path, log: &Shared<'_>) -> Result<(), String> {
        let (ended, said) = self.run(initramfs, device, plain)?;
        log.line(format_args!("without ringfence wrap: {ended}\n{said}"));
        match !ended.success() && said.contains("iommu_platform=true is not supported by the device") {
            true => Ok(()),
            false => Err(format!("QEMU takes the back-end as it is with iommu_platform=on: {ended}")),
        }
    }

    /// Starts `ringfence wrap` before `plain`.
    fn wrap(&self, kind: &str, plain: &Path, socket: &Path) -> Result<Backend, String> {
        let mut wrap = Command::new(&self.server);
        wrap.args(["wrap", "--device", kind, "--iommu", "require", "--pool", "1M", "--backend"]).arg(plain);
        wrap.arg("--socket").arg(socket);
        Backend::start(wrap, socket, &socket.with_extension("log")).map_err(|error| error.to_string())
    }

    /// Boots with the device behind `ringfence wrap`, which leaves in order after; what the guest said, which has taken the
    /// flag, and whose every access was translated.
    fn run_wrapped(
        &self,
        kind: &str,
        initramfs: &Path,
        device: &[&str],
        back_end: &Backend,
        log: &Shared<'_>,
    ) -> Result<String, String> {
        let socket = back_end.socket().with_extension("wrapped");
        let server = self.wrap(kind, back_end.socket(), &socket)?;
        let (ended, said) = self.run(initramfs, device, &socket)?;
        let counted = |line: &str| line.contains("misses=");
        server.logs(PARTING, counted);
        log.line(format_args!("{said}\n--- ringfence wrap\n{}\n--- back-end\n{}", server.log(), back_end.log()));
        let flag = IommuMode::Offer.offers(0).trailing_zeros();
        if Guest::parse(&said).features.is_none_or(|features| !features.has(flag)) {
            return Err(format!("bit {flag} was not taken; QEMU {ended}"));
        }
        if !server.log().lines().any(|line| counted(line) && !line.contains("misses=0 ")) {
            return Err(format!("nothing was translated; QEMU {ended}"));
        }
        match server.end().map_err(|error| error.to_string())? {
            status if status.success() => Ok(said),
            status => Err(format!("ringfence wrap answered SIGTERM with {status}")),
        }
    }
}

/// Whether the guest said that `key` is `wanted`.
fn says(said: &str, key: &str, wanted: &str) -> Result<(), String> {
    let line = format!("RINGFENCE {key}={wanted}");
    match said.lines().any(|said| said.trim_end().ends_with(&line)) {
        true => Ok(()),
        false => Err(format!("the guest does not say {line}")),
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// No two pages of it are alike.
fn content() -> Vec<u8> {
    let words = (0..BYTES as u64 / 8).map(|at| (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23));
    words.flat_map(u64::to_le_bytes).collect()
}

/// How every guest's script begins: `tell`, `finish`, `digest`, its modules loaded, and the features of the device of type
/// `$DEVICE` told.
const PRELUDE: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
tell() { echo "<1>RINGFENCE $1=$2" >/dev/kmsg; }
finish() { tell end "$1"; poweroff -f; sleep 60; }
digest() { sha256sum <"$1" | cut -d' ' -f1; }
for module in /modules/*.ko; do insmod "$module" || tell error "cannot load $module"; done
# It appears once its IOMMU is there, which is not at once.
for try in $(seq 100); do
    for device in /sys/bus/virtio/devices/*; do
        [ "$(cat "$device/device")" = "$DEVICE" ] && tell features "$(cat "$device/features")" && break 2
    done
    sleep 0.1
done
"#;

/// A guest's script.
fn script(device: u16, rest: &str) -> String {
    PRELUDE.replace("$DEVICE", &format!("0x{device:04x}")) + rest
}
