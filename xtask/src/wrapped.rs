//! A back-end of somebody else's behind `ringfence wrap`: virtiofsd, and a Linux guest behind intel-iommu that mounts its
//! folder. (qemu-storage-daemon is among the real guests.)

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ringfence_guests::{
    Arch, Backend, Cache, Error, Guest, Initramfs, Kernel, KernelSeries, Qemu, QemuSource, Virtiofsd,
};
use ringfence_policy::IommuMode;
use sha2::{Digest, Sha256};

use crate::Workspace;
use crate::patience::wait;
use crate::steps::{Log, Pass, StepResult, say};

/// How long the server's last line is waited for.
const PARTING: Duration = Duration::from_secs(10);

/// Longer than the pool has room for at a time.
const BYTES: usize = 3 << 20;

/// Boots the guest.
pub(crate) fn boot(workspace: &Workspace, no_skip: bool, log: &mut Log) -> StepResult {
    let progress = |line: &str| say(&format!("    {line}"));
    let text = |error: Error| error.to_string();
    let cache = Cache::open(&workspace.target.join("guests"), &progress).map_err(text)?;
    let found = Qemu::find(&cache, QemuSource::Auto, &[Arch::Amd64]);
    let found = found.and_then(|qemu| Ok((qemu, Virtiofsd::unpacked(&cache)?)));
    let (qemu, virtiofsd) = match found {
        Ok(found) => found,
        Err(error) if error.is_missing_tool() && !no_skip => return Ok(Pass::Skipped(error.to_string())),
        Err(error) => return Err(error.to_string()),
    };
    let kernel = cache.kernel(KernelSeries::V6_1, Arch::Amd64).map_err(text)?;
    let busybox = cache.busybox(Arch::Amd64).map_err(text)?;
    let started = Instant::now();
    shared_folder(workspace, &qemu, &virtiofsd, (&kernel, &busybox), log)?;
    Ok(Pass::Whole(format!("virtiofsd behind intel-iommu, {:.1} s", started.elapsed().as_secs_f64())))
}

fn shared_folder(
    workspace: &Workspace,
    qemu: &Qemu,
    virtiofsd: &Virtiofsd,
    (kernel, busybox): (&Kernel, &Path),
    log: &mut Log,
) -> Result<(), String> {
    let text = |error: Error| error.to_string();
    let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
    let at = |name: &str| folder.path().join(name);
    let io = |path: &Path| format!("{}: ", path.display());
    let shared = at("shared");
    fs::create_dir_all(shared.join("below")).map_err(|error| io(&shared) + &error.to_string())?;
    let content = content();
    for name in ["large", "below/small"] {
        let (path, len) = (shared.join(name), if name == "large" { BYTES } else { 100 });
        fs::write(&path, &content[..len]).map_err(|error| io(&path) + &error.to_string())?;
    }
    let initramfs = at("initramfs");
    let archive = Initramfs::of_script(kernel, busybox, SCRIPT, &["virtio_pci", "virtiofs"]).map_err(text)?;
    fs::write(&initramfs, archive.bytes()).map_err(|error| io(&initramfs) + &error.to_string())?;

    let (plain, socket) = (at("plain"), at("socket"));
    let back_end = Backend::start(virtiofsd.share(&shared, &plain), &plain, &at("virtiofsd-log")).map_err(text)?;

    // Without anybody between the two QEMU does not even start.
    let console = at("refused");
    let ended = run(qemu, kernel, &initramfs, &plain, &console)?;
    let said = read(&console)?;
    log.line(format_args!("without ringfence wrap: {ended}\n{said}"));
    if ended.success() || !said.contains("iommu_platform=true is not supported by the device") {
        return Err(format!("QEMU takes virtiofsd as it is with iommu_platform=on: {ended}"));
    }
    // It served that front-end, which left, and then ends by itself.
    drop(back_end);
    let _ = fs::remove_file(&plain);
    let back_end = Backend::start(virtiofsd.share(&shared, &plain), &plain, &at("virtiofsd-log")).map_err(text)?;

    let mut wrap = Command::new(workspace.target.join("release/ringfence"));
    wrap.args(["wrap", "--device", "fs", "--iommu", "require", "--pool", "1M", "--backend"]).arg(&plain);
    wrap.arg("--socket").arg(&socket);
    let server = Backend::start(wrap, &socket, &at("log")).map_err(text)?;
    let console = at("console");
    let ended = run(qemu, kernel, &initramfs, &socket, &console)?;
    let said = read(&console)?;
    let counted = |line: &str| line.contains("misses=");
    server.logs(PARTING, counted);
    log.line(format_args!("{said}\n--- ringfence wrap\n{}\n--- virtiofsd\n{}", server.log(), back_end.log()));
    judge(&said, &content, &shared).map_err(|reason| format!("{reason}; QEMU {ended}"))?;
    let misses = server.log().lines().filter(|line| counted(line) && !line.contains("misses=0 ")).count();
    if misses == 0 {
        return Err("nothing was translated".to_owned());
    }
    match server.end().map_err(text)? {
        status if status.success() => Ok(()),
        status => Err(format!("ringfence wrap answered SIGTERM with {status}")),
    }
}

fn read(path: &Path) -> Result<String, String> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Boots with a folder at `socket`, and everything that is said in `console`.
fn run(
    qemu: &Qemu,
    kernel: &Kernel,
    initramfs: &Path,
    socket: &Path,
    console: &Path,
) -> Result<std::process::ExitStatus, String> {
    let file = File::create(console).map_err(|error| format!("{}: {error}", console.display()))?;
    let mut command = qemu.command(Arch::Amd64);
    command
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-accel", "tcg"])
        .args(["-object", "memory-backend-memfd,id=memory,size=256M,share=on", "-m", "256M"])
        .args(["-machine", "q35,kernel-irqchip=split,memory-backend=memory", "-device", "intel-iommu"])
        .args(["-chardev", &format!("socket,id=folder,path={}", socket.display())])
        .args(["-device", "vhost-user-fs-pci,chardev=folder,tag=shared,iommu_platform=on"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", "console=ttyS0 panic=-1 loglevel=5 no_timer_check intel_iommu=on"])
        .stderr(file.try_clone().map_err(|error| error.to_string())?)
        .stdout(file);
    wait(&mut command)
}

fn judge(console: &str, content: &[u8], shared: &Path) -> Result<(), String> {
    let guest = Guest::parse(console);
    let says = |key: &str, wanted: &str| {
        let line = format!("RINGFENCE {key}={wanted}");
        match console.lines().any(|said| said.trim_end().ends_with(&line)) {
            true => Ok(()),
            false => Err(format!("the guest does not say {line}")),
        }
    };
    says("end", "done")?;
    says("large", &digest(content))?;
    says("small", &digest(&content[..100]))?;
    says("names", "below large")?;
    let flag = IommuMode::Offer.offers(0).trailing_zeros();
    if guest.features.is_none_or(|features| !features.has(flag)) {
        return Err(format!("bit {flag} was not taken"));
    }
    let written = shared.join("below/written");
    let found = fs::read(&written).map_err(|error| format!("{}: {error}", written.display()))?;
    // The large one backwards by halves, and the small one behind it.
    let (first, second) = content.split_at(BYTES / 2);
    if found != [second, first, &content[..100]].concat() {
        return Err("what the guest wrote is not what is there".to_owned());
    }
    Ok(())
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// No two pages of it are alike.
fn content() -> Vec<u8> {
    let words = (0..BYTES as u64 / 8).map(|at| (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23));
    words.flat_map(u64::to_le_bytes).collect()
}

const SCRIPT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
tell() { echo "<1>RINGFENCE $1=$2" >/dev/kmsg; }
finish() { tell end "$1"; poweroff -f; sleep 60; }
for module in /modules/*.ko; do insmod "$module" || tell error "cannot load $module"; done
for device in /sys/bus/virtio/devices/*; do
    [ "$(cat "$device/device")" = 0x001a ] && tell features "$(cat "$device/features")"
done
mkdir /shared
mount -t virtiofs shared /shared || finish failed
digest() { sha256sum <"$1" | cut -d' ' -f1; }
tell names "$(ls /shared | xargs)"
tell large "$(digest /shared/large)"
tell small "$(digest /shared/below/small)"
half=$(($(stat -c %s /shared/large) / 2 / 4096))
{ dd if=/shared/large bs=4096 skip=$half; dd if=/shared/large bs=4096 count=$half; cat /shared/below/small; } \
    2>/dev/null >/shared/below/written || finish failed
sync
umount /shared || finish failed
finish done
"#;
