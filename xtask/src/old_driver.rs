//! The old driver: a kernel by itself, built apart from the workspace, and booted once.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ringfence_guests::{Arch, Cache, Error, Guest, Image, Qemu, QemuSource};
use ringfence_policy::IommuMode;

use crate::Workspace;
use crate::confined;
use crate::steps::{Log, Pass, StepResult, cargo, say};

/// The program, and its file beside `ringfence` itself.
const NAME: &str = "ringfence-old-driver";

/// The kernel ends itself when its device is silent for 20 s; a busy machine may take longer for the whole.
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(20);

/// A status that says DRIVER_OK, and one from which QEMU has kept FEATURES_OK and all that follows.
const TAKEN: &str = "0x0000000f";
const REFUSED: &str = "0x00000003";

/// Where a finished program without an operating system lies.
pub(crate) fn program(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.target.join("release").join(name)
}

/// Checks and builds all of them.
pub(crate) fn build(workspace: &Workspace, log: &mut Log) -> StepResult {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Ok(Pass::Skipped("it is built with the host's own tools, and those are not x86-64's".to_owned()));
    }
    let folder = workspace.root.join("crates/bare-metal");
    let target = workspace.target.join("bare-metal");
    let mut run = |arguments: &[&str]| {
        let mut command = cargo(&folder);
        // It runs on QEMU's processor: flags for the host's are none of its business.
        command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
        log.run(command.args(arguments).env("CARGO_TARGET_DIR", &target))
    };
    run(&["fmt", "--", "--check"])?;
    run(&["clippy", "--release", "--locked", "--", "-D", "warnings"])?;
    run(&["build", "--release", "--locked"])?;
    for name in [NAME, confined::NAME] {
        let to = program(workspace, name);
        let at = |error| format!("{}: {error}", to.display());
        fs::create_dir_all(to.parent().expect("a program is in a folder")).map_err(at)?;
        fs::copy(target.join("release").join(name), &to).map_err(at)?;
    }
    Ok(Pass::Whole(program(workspace, NAME).display().to_string()))
}

/// Boots it on QEMU's own disk, which is an old device and then a new one: it takes the flag of neither, and is served
/// by both, for QEMU's refusal is advice that an old driver does not read.
pub(crate) fn boot(workspace: &Workspace, source: QemuSource, no_skip: bool, log: &mut Log) -> StepResult {
    let progress = |line: &str| say(&format!("    {line}"));
    let kernel = program(workspace, NAME);
    if !kernel.exists() {
        return Ok(Pass::Skipped(format!("there is no {}", kernel.display())));
    }
    let cache = Cache::open(&workspace.target.join("guests"), &progress).map_err(|error| error.to_string())?;
    let qemu = match Qemu::find(&cache, source, &[Arch::Amd64]) {
        Ok(qemu) => qemu,
        Err(error) if error.is_missing_tool() && !no_skip => return Ok(Pass::Skipped(error.to_string())),
        Err(error) => return Err(error.to_string()),
    };
    let mut seconds = Vec::new();
    for (offer, status) in [("off", TAKEN), ("on", REFUSED)] {
        let started = Instant::now();
        served(&qemu, workspace, offer, status, log).map_err(|reason| format!("iommu_platform={offer}: {reason}"))?;
        seconds.push(format!("{offer} {:.1} s", started.elapsed().as_secs_f64()));
    }
    Ok(Pass::Whole(format!("iommu_platform {}", seconds.join(", "))))
}

/// One boot that reads and writes the disk as every guest does.
fn served(qemu: &Qemu, workspace: &Workspace, offer: &str, status: &str, log: &mut Log) -> Result<(), String> {
    let text = |error: Error| error.to_string();
    let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
    let image = Image::create(&folder.path().join("disk"), 7).map_err(text)?;
    let console = folder.path().join("console");
    let file = File::create(&console).map_err(|error| format!("{}: {error}", console.display()))?;
    let mut command = qemu.command(Arch::Amd64);
    command
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-accel", "tcg"])
        .args(["-machine", "q35", "-m", "64M", "-blockdev"])
        .arg(format!("driver=file,node-name=disk,filename={}", image.path().display()))
        .args(["-device", &format!("virtio-blk-pci,drive=disk,disable-legacy=on,iommu_platform={offer}")])
        .arg("-kernel")
        .arg(program(workspace, NAME))
        .stderr(file.try_clone().map_err(|error| error.to_string())?)
        .stdout(file);
    let ended = wait(&mut command)?;
    let console = fs::read(&console).map_err(|error| error.to_string())?;
    let console = String::from_utf8_lossy(&console);
    log.line(format_args!("iommu_platform={offer}\n{console}"));

    let guest = Guest::parse(&console);
    let said = |what: &str, found: Option<&str>, wanted: &str| match found == Some(wanted) {
        true => Ok(()),
        false => Err(format!("{what} is {}, not {wanted}; QEMU {ended}", found.unwrap_or("not told"))),
    };
    said("end", guest.end.as_deref(), "done")?;
    said("SHA-256 of what it read", guest.read.as_deref(), image.initial())?;
    said("SHA-256 of what it read back", guest.written.as_deref(), image.expected())?;
    said("device status", guest.status.as_deref(), status)?;
    let flag = IommuMode::Offer.offers(0).trailing_zeros();
    if guest.features.is_none_or(|features| features.has(flag)) {
        return Err(format!("it told of no features, or took bit {flag} and is not old"));
    }
    match image.is_as_expected().map_err(text)? {
        true => Ok(()),
        false => Err("the image on the host is not what it wrote".to_owned()),
    }
}

/// Runs QEMU to its end, or for as long as is reasonable.
pub(crate) fn wait(command: &mut Command) -> Result<ExitStatus, String> {
    let mut child = command.stdin(Stdio::null()).spawn().map_err(|error| format!("cannot start QEMU: {error}"))?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            return Ok(status);
        }
        thread::sleep(PAUSE);
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(format!("no end after {} s; killed", PATIENCE.as_secs()))
}
