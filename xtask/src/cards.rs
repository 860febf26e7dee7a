//! Whole PCI functions of ours in Linux guests, by vfio-user: two of them, newer kernels, what lspci makes of them, and what
//! becomes of them when they come and go.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use ringfence_guests::{
    Arch, Backend, Cache, Error, Guest, Image, Initramfs, Kernel, KernelSeries, Lspci, Monitor, Qemu, QemuSource,
};
use ringfence_policy::IommuMode;
use serde_json::{Value, json};

use crate::Workspace;
use crate::copied;
use crate::patience::wait_and;
use crate::pc::Pc;
use crate::steps::{Log, Pass, StepResult, say};

/// Runs in the guest after the disk was verified.
const THEN: &str = include_str!("cards.sh");

/// One of the disk's queues for each.
const PROCESSORS: usize = 4;

/// How long a server's last line is waited for.
const PARTING: Duration = Duration::from_secs(10);

/// VIRTIO_F_RING_RESET.
const RING_RESET: u32 = 40;

/// Which of the boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Which {
    /// One kernel: what there is time for in every run.
    One,
    /// Each kernel.
    Kernels,
    /// Plugged in, unplugged and killed.
    Hotplug,
    /// Every one.
    #[default]
    All,
}

/// A guest with a disk and a source of random bytes.
struct Machine {
    name: &'static str,
    kernel: KernelSeries,
    place: Place,
    vectors: Vectors,
}

/// How the disk's queues interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vectors {
    /// Each by its own.
    Own,
    /// All by one; the configuration by another, which is the least that Linux takes.
    Shared,
}

impl Vectors {
    /// What the disk's server is told.
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Vectors::Own => &[],
            Vectors::Shared => &["--vectors", "2"],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// All of the guest's memory is granted.
    Bare,
    /// What the guest maps is.
    BehindIntelIommu,
}

const fn machine(name: &'static str, kernel: KernelSeries, place: Place) -> Machine {
    Machine { name, kernel, place, vectors: Vectors::Own }
}

const MACHINES: &[Machine] = &[
    machine("6.12 behind intel-iommu", KernelSeries::V6_12, Place::BehindIntelIommu),
    machine("6.12", KernelSeries::V6_12, Place::Bare),
    Machine {
        vectors: Vectors::Shared,
        ..machine("6.12, one vector for all queues", KernelSeries::V6_12, Place::BehindIntelIommu)
    },
    machine("the newest behind intel-iommu", KernelSeries::Newest, Place::BehindIntelIommu),
    machine("the newest", KernelSeries::Newest, Place::Bare),
    machine("6.1 behind intel-iommu", KernelSeries::V6_1, Place::BehindIntelIommu),
];

/// What every boot needs.
struct Kit<'a> {
    workspace: &'a Workspace,
    cache: &'a Cache<'a>,
    qemu: Qemu,
    busybox: PathBuf,
    lspci: Lspci,
}

/// Boots.
pub(crate) fn boot(workspace: &Workspace, which: Which, no_skip: bool, log: &mut Log) -> StepResult {
    let progress = |line: &str| say(&format!("    {line}"));
    let cache = Cache::open(&workspace.target.join("guests"), &progress).map_err(text)?;
    let found = Qemu::with_device(&cache, QemuSource::Auto, Arch::Amd64, "vfio-user-pci");
    let found = found.and_then(|qemu| Ok((qemu, Lspci::unpacked(&cache)?)));
    let (qemu, lspci) = match found {
        Ok(found) => found,
        Err(error) if error.is_missing_tool() && !no_skip => return Ok(Pass::Skipped(error.to_string())),
        Err(error) => return Err(error.to_string()),
    };
    let busybox = cache.busybox(Arch::Amd64).map_err(text)?;
    let kit = Kit { workspace, cache: &cache, qemu, busybox, lspci };
    let started = Instant::now();
    let machines = match which {
        Which::One => &MACHINES[..1],
        Which::Kernels | Which::All => MACHINES,
        Which::Hotplug => &[],
    };
    let mut told = Vec::new();
    for machine in machines {
        let kernel = machine.look(&kit, log).map_err(|reason| format!("{}: {reason}", machine.name))?;
        told.push(format!("two functions in Linux {kernel}"));
    }
    if let Which::Hotplug | Which::All = which {
        let what = plug(&kit, log).map_err(|reason| format!("plug: {reason}"))?;
        told.push(format!("unplugged under load: {what}"));
        let what = kill(&kit, log).map_err(|reason| format!("kill: {reason}"))?;
        told.push(format!("killed under load: {what}"));
    }
    Ok(Pass::Whole(format!("{}; {:.1} s", told.join("; "), started.elapsed().as_secs_f64())))
}

/// A guest's folder, image and servers.
struct Set {
    folder: tempfile::TempDir,
    image: Image,
    disk: Backend,
    random: Backend,
    kernel: Kernel,
}

/// How a boot ended.
struct Boot {
    console: String,
    /// What QEMU said, beside.
    qemu: String,
    status: ExitStatus,
}

/// Serves a device in `folder`.
fn serve(kit: &Kit<'_>, folder: &Path, device: &str, more: &[&Path]) -> Result<Backend, String> {
    let mut command = Command::new(kit.workspace.ringfence());
    let socket = folder.join(device);
    command.args(["serve", device, "--transport", "vfio-user", "--socket"]).arg(&socket).args(more);
    Backend::start(command, &socket, &folder.join(format!("{device}-log"))).map_err(text)
}

impl Set {
    fn new(kit: &Kit<'_>, kernel: KernelSeries, vectors: Vectors) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
        let image = Image::create(&folder.path().join("image"), 17).map_err(text)?;
        let mut disk = vec!["--image".as_ref(), image.path()];
        disk.extend(vectors.arguments().iter().map(Path::new));
        let disk = serve(kit, folder.path(), "blk", &disk)?;
        let random = serve(kit, folder.path(), "rng", &[])?;
        let kernel = kit.cache.kernel(kernel, Arch::Amd64).map_err(text)?;
        Ok(Self { folder, image, disk, random, kernel })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Boots with `devices`, and calls `meanwhile` with the console now and then.
    fn boot(
        &self,
        kit: &Kit<'_>,
        place: Place,
        devices: &[String],
        word: &str,
        mut meanwhile: impl FnMut(&str) -> Result<(), String>,
    ) -> Result<Boot, String> {
        let at = |path: &Path| format!("{}: ", path.display());
        let [initramfs, console, errors] = ["initramfs", "console", "errors"].map(|name| self.at(name));
        let modules = ["virtio_pci", "virtio_rng"];
        let archive = Initramfs::build_with(&self.kernel, &kit.busybox, &modules, THEN).map_err(text)?;
        fs::write(&initramfs, archive.bytes()).map_err(|error| at(&initramfs) + &error.to_string())?;
        let create = |path: &Path| File::create(path).map_err(|error| at(path) + &error.to_string());
        let mut pc = Pc::with_shared_memory(&kit.qemu, 256);
        pc.option("-smp", PROCESSORS.to_string())
            .option("-qmp", format!("unix:{},server=on,wait=off", self.at(MONITOR).display()));
        let mut arguments = format!("printk.devkmsg=on {word}");
        if place == Place::BehindIntelIommu {
            pc.device("intel-iommu,caching-mode=on");
            arguments.push_str(" intel_iommu=on");
        }
        for device in devices {
            pc.device(device);
        }
        let command = pc.linux(&self.kernel, &initramfs, &arguments).command();
        command.stdout(create(&console)?).stderr(create(&errors)?);
        let read = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let read = |path: &Path| read(path).map_err(|error| at(path) + &error.to_string());
        let status = wait_and(command, || meanwhile(&read(&console)?));
        let (console, qemu) = (read(&console)?, read(&errors)?);
        match status {
            Ok(status) => Ok(Boot { console, qemu, status }),
            Err(reason) => Err(format!("{reason}; the guest said\n{console}\nand QEMU\n{qemu}")),
        }
    }

    fn log(&self, name: &str, boot: &Boot, log: &mut Log) {
        log.line(format_args!(
            "=== {name}: QEMU {}\n{}\n--- QEMU\n{}\n--- disk\n{}\n--- random bytes\n{}",
            boot.status,
            boot.console,
            boot.qemu,
            self.disk.log(),
            self.random.log()
        ));
    }
}

const MONITOR: &str = "monitor";

/// QEMU's option for the function at `socket`.
pub(crate) fn function(id: &str, addr: &str, socket: &Path) -> String {
    let socket = json!({ "type": "unix", "path": socket.display().to_string() });
    json!({ "driver": "vfio-user-pci", "id": id, "addr": addr, "socket": socket }).to_string()
}

impl Machine {
    /// Boots, and checks everything that the guest tells. The kernel's version.
    fn look(&self, kit: &Kit<'_>, log: &mut Log) -> Result<String, String> {
        let set = Set::new(kit, self.kernel, self.vectors)?;
        let devices = [function("disk", "5", set.disk.socket()), function("random", "6", set.random.socket())];
        let boot = set.boot(kit, self.place, &devices, "", |_| Ok(()))?;
        // The counts come with the end of the connection, which may trail QEMU's.
        for server in [&set.disk, &set.random] {
            server.logs(PARTING, |line| line.contains("connection ended"));
        }
        set.log(self.name, &boot, log);
        let spaces = spaces(&boot.console)?;
        let described = kit.lspci.describe(&spaces).map_err(text)?;
        log.line(format_args!("--- lspci\n{described}"));
        let guest = Guest::parse(&boot.console);
        judge(&guest, &boot.console, &set.image).map_err(|reason| format!("{reason}; QEMU {}", boot.status))?;
        interrupts(&boot.console, self.vectors)?;
        let of_disk = match self.vectors {
            // One for each of 16 queues, and one for the configuration.
            Vectors::Own => 17,
            Vectors::Shared => 2,
        };
        for (slot, vectors) in [("00:05.0", of_disk), ("00:06.0", 2)] {
            let of = |function: &&str| function.starts_with(slot);
            let function = described.split("\n\n").find(of).ok_or_else(|| format!("lspci does not name {slot}"))?;
            proper(function, vectors).map_err(|reason| format!("{slot}: {reason}"))?;
        }
        if !set.random.log().contains("faults=0") {
            return Err("the source of random bytes met faults, or does not say that it did not".to_owned());
        }
        for server in [set.disk, set.random] {
            let status = server.end().map_err(text)?;
            if !status.success() {
                return Err(format!("a server answered SIGTERM with {status}"));
            }
        }
        Ok(guest.kernel.unwrap_or_default())
    }
}

/// The values that the guest told under `key`.
fn told<'c>(console: &'c str, key: &str) -> Vec<&'c str> {
    let mark = format!("RINGFENCE {key}=");
    console.lines().filter_map(|line| line.split_once(&mark).map(|(_, value)| value.trim())).collect()
}

fn judge(guest: &Guest, console: &str, image: &Image) -> Result<(), String> {
    copied::hold("end", guest.end.as_deref(), "done", &guest.errors)?;
    copied::all_of(guest, image)?;
    if !guest.errors.is_empty() {
        return Err(format!("the guest tells of errors: {:?}", guest.errors));
    }
    if let Some(line) =
        console.lines().find(|line| ["nobody cared", "Call Trace", "BUG:"].iter().any(|bad| line.contains(bad)))
    {
        return Err(format!("the kernel complains: {line}"));
    }
    let flag = IommuMode::Offer.offers(0).trailing_zeros();
    let features = guest.features.as_ref().ok_or("the guest tells of no features")?;
    for bit in [flag, RING_RESET] {
        if !features.has(bit) {
            return Err(format!("bit {bit} was not taken"));
        }
    }
    let functions = told(console, "function");
    if functions.len() != 2 || functions.iter().any(|function| !function.ends_with(" irq=0")) {
        return Err(format!("not two functions without a line: {functions:?}"));
    }
    is_random(console)
}

/// Two pieces of random bytes: of 32 each, not alike, and not one byte over and over.
fn is_random(console: &str) -> Result<(), String> {
    let told = told(console, "random");
    let pieces = told.first().and_then(|told| told.split_once(' '));
    let various =
        |piece: &str| piece.len() == 64 && piece.as_bytes().chunks(2).any(|byte| byte != &piece.as_bytes()[..2]);
    match pieces {
        Some((one, other)) if one != other && various(one) && various(other) => Ok(()),
        _ => Err(format!("no random bytes: {told:?}")),
    }
}

/// Every queue has interrupted, by a vector of its own or by that of all; and nothing by a line.
fn interrupts(console: &str, vectors: Vectors) -> Result<(), String> {
    let lines = told(console, "interrupt");
    let all = || format!("interrupts: {lines:#?}");
    let count =
        |line: &str| -> u64 { line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum() };
    let (name, wanted) = match vectors {
        Vectors::Own => ("-req.", PROCESSORS),
        Vectors::Shared => ("-virtqueues", 1),
    };
    let queues: Vec<_> = lines.iter().filter(|line| line.contains(name)).collect();
    if queues.len() != wanted || queues.iter().any(|line| count(line) == 0) {
        return Err(format!("not each of {wanted} vectors of queues has interrupted; {}", all()));
    }
    if !lines.iter().any(|line| line.ends_with("-input") && count(line) > 0) {
        return Err(format!("no interrupt for random bytes; {}", all()));
    }
    match lines.iter().find(|line| !line.contains("MSI")) {
        None => Ok(()),
        Some(line) => Err(format!("not by MSI-X: {line}")),
    }
}

/// The configuration space of each function, put together from its lines.
fn spaces(console: &str) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let mut spaces = BTreeMap::<String, Vec<u8>>::new();
    for line in told(console, "config") {
        let bad = || format!("no line of a configuration space: {line}");
        let (slot, digits) = line.split_once(' ').ok_or_else(bad)?;
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> = digits.as_bytes().chunks(2).map(byte).collect();
        spaces.entry(slot.to_owned()).or_default().extend(bytes.ok_or_else(bad)?);
    }
    match spaces.iter().find(|(_, space)| space.len() != 4096 && space.len() != 256) {
        None => Ok(spaces),
        Some((slot, space)) => Err(format!("{slot} has a configuration space of {} bytes", space.len())),
    }
}

/// Whether lspci finds everything that a virtio function has, and nothing to wonder about.
fn proper(function: &str, vectors: usize) -> Result<(), String> {
    let wanted = [
        "[1af4:10".to_owned(),
        "(rev 01)".to_owned(),
        "BusMaster+".to_owned(),
        "VirtIO: CommonCfg".to_owned(),
        "VirtIO: Notify".to_owned(),
        "VirtIO: ISR".to_owned(),
        format!("MSI-X: Enable+ Count={vectors} Masked-"),
        "Power Management version 3".to_owned(),
        "Express (v2)".to_owned(),
        "FLReset+".to_owned(),
    ];
    if let Some(missing) = wanted.iter().find(|wanted| !function.contains(*wanted)) {
        return Err(format!("lspci does not say {missing:?}:\n{function}"));
    }
    // lspci has no name for virtio's fifth structure, access by configuration space.
    let rest = function.replacen("VirtIO: <unknown>", "", 1);
    let unwanted = ["Interrupt: pin", "I/O ports", "unknown", "Unknown", "looped", "!!!", "denied", " INTx+"];
    match unwanted.iter().find(|unwanted| rest.contains(**unwanted)) {
        None => Ok(()),
        Some(found) => Err(format!("lspci says {found:?}:\n{function}")),
    }
}

/// Where functions can come and go.
fn port() -> String {
    "pcie-root-port,id=root-port,chassis=1,slot=1".to_owned()
}

/// The function of that name at `socket`, there.
fn in_port(id: &str, socket: &Path) -> String {
    function(id, "0", socket).replacen('{', "{\"bus\":\"root-port\",", 1)
}

/// Has QEMU do something, once it can be asked.
fn ask(monitor: &Path, command: &str, arguments: &Value) -> Result<(), String> {
    let done = Monitor::connect(monitor).and_then(|mut monitor| monitor.ask(command, arguments));
    done.map(drop).ok_or_else(|| format!("QEMU refuses {command}"))
}

/// A function is plugged in while the disk works, and unplugged again. What became of it.
fn plug(kit: &Kit<'_>, log: &mut Log) -> Result<String, String> {
    let mut set = Set::new(kit, KernelSeries::V6_12, Vectors::Own)?;
    let (monitor, random) = (set.at(MONITOR), in_port("random", set.random.socket()));
    let random: Value = serde_json::from_str(&random).map_err(|error| error.to_string())?;
    let mut asked = 0;
    let devices = [port(), function("disk", "5", set.disk.socket())];
    let boot = set.boot(kit, Place::BehindIntelIommu, &devices, "ringfence.plug", |console| {
        let (command, arguments) = match asked {
            0 if console.contains("RINGFENCE load=runs") => ("device_add", &random),
            1 if console.contains("RINGFENCE random=") => ("device_del", &json!({ "id": "random" })),
            _ => return Ok(()),
        };
        asked += 1;
        ask(&monitor, command, arguments)
    })?;
    set.log("plug", &boot, log);
    is_random(&boot.console)?;
    let left = |server: &Backend| server.logs(PARTING, |line| line.contains("connection ended"));
    if !left(&set.random) || !set.random.serves() {
        return Err("the server does not see that it was unplugged, or serves nobody any more".to_owned());
    }
    let guest = Guest::parse(&boot.console);
    match guest.end.as_deref() {
        Some("done") => Ok("the guest goes on".to_owned()),
        _ => boot.died_of(&[UNPLUG_KILLS]),
    }
}

/// The disk's process is killed while the disk works. What became of the guest.
fn kill(kit: &Kit<'_>, log: &mut Log) -> Result<String, String> {
    let set = Set::new(kit, KernelSeries::V6_12, Vectors::Own)?;
    let monitor = set.at(MONITOR);
    let (mut killed, mut lives) = (None::<Instant>, None);
    let devices = [function("disk", "5", set.disk.socket())];
    let boot = set.boot(kit, Place::BehindIntelIommu, &devices, "ringfence.kill", |console| match killed {
        None if console.contains("RINGFENCE load=runs") => {
            killed = Some(Instant::now());
            set.disk.kill().map_err(text)
        }
        Some(since) if since.elapsed() > DEAD && lives.is_none() => {
            lives = Some(ask(&monitor, "query-status", &json!({})).is_ok());
            // It may have ended by itself.
            let _ = ask(&monitor, "quit", &json!({}));
            Ok(())
        }
        _ => Ok(()),
    })?;
    set.log("kill", &boot, log);
    let again = serve(kit, set.folder.path(), "blk", &["--image".as_ref(), set.image.path()])?;
    if !again.logs(PARTING, |line| line.contains("listening")) {
        return Err("the disk can't be served again".to_owned());
    }
    match (lives, told(&boot.console, "lost").first()) {
        (_, Some(lost)) => Ok(format!("the guest sees it ({lost})")),
        (Some(true), None) => Ok("QEMU goes on, and the guest waits for its disk".to_owned()),
        _ => boot.died_of(&[KILL_KILLS]),
    }
}

/// What QEMU makes of a process that is gone shows after this.
const DEAD: Duration = Duration::from_secs(5);

impl Boot {
    /// Which of its own assertions QEMU ended of.
    fn died_of(&self, assertions: &[&str]) -> Result<String, String> {
        match assertions.iter().find(|assertion| self.qemu.contains(**assertion)) {
            Some(assertion) => Ok(format!("QEMU ends itself by an assertion ({assertion})")),
            None => Err(format!("QEMU ended as {}: {}", self.status, self.qemu)),
        }
    }
}

/// What QEMU says when it dies of an unplugged function.
const UNPLUG_KILLS: &str = "memory_region_del_subregion";

/// And of one whose process is gone.
const KILL_KILLS: &str = "error_setv";

fn text(error: Error) -> String {
    error.to_string()
}
