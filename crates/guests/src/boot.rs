//! One boot: QEMU's command line, the console, and how it ended.

use std::cell::Cell;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::backend::comma_safe;
use crate::cache::scratch;
use crate::console::Guest;
use crate::error::{Error, tail};
use crate::initramfs::Initramfs;
use crate::kernel::Kernel;
use crate::packages::Arch;
use crate::platform::Platform;
use crate::qemu::Qemu;
use crate::qmp::{DEVICE, Monitor, Virtio};
use crate::trace::{IommuTrace, SLOT};

const PAUSE: Duration = Duration::from_millis(20);

/// How long QEMU may take to end when it is told to.
const LEAVE: Duration = Duration::from_secs(5);

/// When the guest prints these, QEMU is asked what it knows of the disk.
const MOMENTS: [&str; 2] = ["RINGFENCE started=", "RINGFENCE disk="];

/// How often it is asked before: a guest may not live to print the first.
const ASK: Duration = Duration::from_millis(250);

/// QEMU's `iommu_platform` property of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtioFlag {
    /// The device does not offer it.
    Off,
    /// The device offers it.
    On,
}

/// Who serves the guest's disk.
#[derive(Clone, Copy, Debug)]
pub enum Disk<'a> {
    /// QEMU's own virtio-blk with this raw image.
    QemuOwn(&'a Path),
    /// A vhost-user-blk back-end that listens on this socket.
    VhostUser(&'a Path),
    /// A PCI function that listens on this socket, by vfio-user.
    VfioUser(&'a Path),
}

/// Which of virtio's two interfaces to PCI the disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// The standard's alone.
    Modern,
    /// Both; the guest is told to use the one from before the standard, which has 32 feature bits.
    Transitional,
}

/// What runs in the guest.
#[derive(Clone, Copy, Debug)]
pub enum System<'a> {
    /// Linux with our init script.
    Linux {
        /// A kernel of the platform's series and architecture.
        kernel: &'a Kernel,
        /// A static busybox of the platform's architecture.
        busybox: &'a Path,
        /// Xen, where the platform has it.
        xen: Option<&'a Path>,
    },
    /// A bare program that drives the disk and prints what the init script does.
    Program {
        /// For QEMU's `-kernel`.
        program: &'a Path,
        /// Its command line.
        arguments: &'a str,
    },
    /// Linux with one program, that has the disk given to it by VFIO and prints what the init script does.
    UserSpace {
        /// A kernel of the platform's series and architecture.
        kernel: &'a Kernel,
        /// A static program.
        program: &'a Path,
        /// What is added to the kernel's command line.
        arguments: &'a str,
    },
}

/// A guest to boot.
#[derive(Clone, Copy)]
pub struct Boot<'a> {
    /// The emulator.
    pub qemu: &'a Qemu,
    /// The machine.
    pub platform: &'static Platform,
    /// What runs in it.
    pub system: System<'a>,
    /// The disk.
    pub disk: Disk<'a>,
    /// Whether the disk's device offers the flag.
    pub platform_access: VirtioFlag,
    /// How the disk is attached.
    pub interface: Interface,
    /// When to give up on the guest.
    pub timeout: Duration,
    /// Asked many times a second, with the console so far, whether to wait on.
    pub watch: &'a dyn Fn(&str) -> Watch,
}

/// Whether to wait on for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// It has not said all.
    On,
    /// There is nothing to come: end it.
    Enough,
}

/// How QEMU came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this status; zero after a guest's power-off.
    Exited(ExitStatus),
    /// The guest's kernel panicked.
    Panicked,
    /// Whoever watched had seen enough.
    Ended,
    /// It was killed when the time was up.
    TimedOut(Duration),
}

/// What came of a boot.
#[derive(Clone, Debug)]
pub struct Outcome {
    platform: &'static str,
    /// What the guest said, as far as it got.
    guest: Guest,
    /// What QEMU knew of the disk when its driver had last made progress.
    pub virtio: Option<Virtio>,
    /// What the IOMMU did for the disk.
    pub iommu: IommuTrace,
    /// The whole console.
    pub console: String,
    /// What QEMU itself said.
    pub qemu: String,
    /// QEMU's command line.
    pub command: String,
    /// How it ended.
    pub end: End,
    /// From QEMU's start to its end.
    pub elapsed: Duration,
}

impl Boot<'_> {
    /// Boots the guest and waits until it is over. A panic or a time-out is an
    /// outcome; an error means that there was no boot at all.
    pub fn run(&self) -> Result<Outcome, Error> {
        let folder = scratch()?;
        let mut command = self.command(folder.path())?;
        let line = crate::tool::line(&command);
        let started = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Start { program: self.platform.arch.qemu().to_owned(), source })?;
        let mut running = Running::new(child, folder.path().join(MONITOR));
        let end = running.wait(self.timeout, self.watch);
        let elapsed = started.elapsed();
        let (console, qemu, virtio) = running.finish();
        let end = if console.contains("Kernel panic - not syncing") { End::Panicked } else { end };
        let guest = Guest::parse(&console);
        let iommu = IommuTrace::read(&folder.path().join(TRACE));
        Ok(Outcome { platform: self.platform.name, guest, virtio, iommu, console, qemu, command: line, end, elapsed })
    }

    fn command(&self, folder: &Path) -> Result<Command, Error> {
        let platform = self.platform;
        let memory = platform.memory();
        let mut command = self.qemu.command(platform.arch);
        command
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-accel", "tcg", "-smp", "1", "-m", &format!("{memory}M")])
            .arg("-object")
            // A vhost-user back-end maps the guest's memory, so it is shared.
            .arg(format!("memory-backend-memfd,id=memory,size={memory}M,share=on"))
            .arg("-machine")
            .arg(format!("{},memory-backend=memory", platform.machine))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", comma_safe(&folder.join(MONITOR))))
            .arg("-D")
            .arg(folder.join(TRACE));
        for event in platform.trace {
            command.args(["-trace", event]);
        }
        if let Some(cpu) = platform.cpu {
            command.args(["-cpu", cpu]);
        }
        for device in platform.devices {
            command.arg("-device").arg(self.qemu.device(platform.arch, device)?);
        }
        self.disk_options(&mut command);
        self.system_options(&mut command, folder)?;
        Ok(command)
    }

    fn system_options(&self, command: &mut Command, folder: &Path) -> Result<(), Error> {
        let (kernel, archive, xen, more) = match self.system {
            System::Linux { kernel, busybox, xen } => {
                (kernel, Initramfs::build(kernel, busybox, self.platform.modules)?, xen, "")
            }
            System::UserSpace { kernel, program, arguments } => {
                (kernel, Initramfs::of_program(kernel, program, VFIO_MODULES)?, None, arguments)
            }
            System::Program { program, arguments } => {
                command.arg("-kernel").arg(program).args(["-append", arguments]);
                return Ok(());
            }
        };
        let initramfs = folder.join("initramfs");
        fs::write(&initramfs, archive.bytes()).map_err(Error::file("cannot write", &initramfs))?;
        let arguments = format!("{} {more}", self.kernel_arguments());
        match xen {
            None => {
                command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
                command.arg("-append").arg(arguments);
            }
            Some(xen) => {
                // Multiboot modules: Linux with its command line, and what it would have as initrd.
                let kernel = comma_safe(&kernel.image);
                command.arg("-kernel").arg(xen).args(["-append", XEN_ARGUMENTS]);
                command.arg("-initrd").arg(format!("{kernel} {arguments},{}", comma_safe(&initramfs)));
            }
        }
        Ok(())
    }

    fn disk_options(&self, command: &mut Command) {
        let offer = match self.platform_access {
            VirtioFlag::Off => "off",
            VirtioFlag::On => "on",
        };
        let modern = match self.interface {
            Interface::Modern => "disable-legacy=on",
            Interface::Transitional => "disable-legacy=off,disable-modern=off",
        };
        let more = self.platform.disk;
        let common = format!("id={DEVICE},addr={SLOT},{modern},iommu_platform={offer}{more}");
        match self.disk {
            Disk::QemuOwn(image) => {
                let image = comma_safe(image);
                command
                    .arg("-blockdev")
                    .arg(format!("driver=file,node-name=disk,filename={image}"))
                    .arg("-device")
                    .arg(format!("virtio-blk-pci,drive=disk,{common}"));
            }
            Disk::VhostUser(socket) => {
                let socket = comma_safe(socket);
                command
                    .arg("-chardev")
                    .arg(format!("socket,id=backend,path={socket}"))
                    .arg("-device")
                    .arg(format!("vhost-user-blk-pci,chardev=backend,{common}"));
            }
            // Its registers, the flag among them, are its own business. A socket can only be named in JSON.
            Disk::VfioUser(socket) => {
                let path = format!("{:?}", socket.display().to_string());
                command.arg("-device").arg(format!(
                    r#"{{"driver":"vfio-user-pci","id":"{DEVICE}","addr":"{SLOT}","socket":{{"type":"unix","path":{path}}}}}"#
                ));
            }
        }
    }

    fn kernel_arguments(&self) -> String {
        let Platform { console, arguments, arch, .. } = self.platform;
        // A panic ends QEMU at once; warnings are on the console, small talk is not.
        let mut line = format!("console={console} panic=-1 loglevel=5 printk.devkmsg=on");
        if *arch == Arch::Amd64 {
            // Linux counts timer ticks against its own delay loop, and panics where a
            // busy host holds the emulated CPU back for as long.
            line.push_str(" no_timer_check");
        }
        if self.interface == Interface::Transitional {
            line.push_str(" virtio_pci.force_legacy=1");
        }
        if !arguments.is_empty() {
            line.push(' ');
            line.push_str(arguments);
        }
        line
    }
}

/// What a program needs of the kernel that drives a PCI function by VFIO.
pub const VFIO_MODULES: &[&str] = &["vfio_iommu_type1", "vfio_pci"];

/// Files in a boot's folder.
const MONITOR: &str = "monitor";
const TRACE: &str = "trace";

/// The domain has less than the machine, so that an address of the machine can lie outside it.
///
/// Nor does Xen ask the firmware about disks: that reads them, and waits for ever where a device is silent.
const XEN_ARGUMENTS: &str = "console=com1 com1=115200 dom0_mem=192M,max:192M loglvl=warning no-real-mode";

/// A QEMU that runs; dropped, it is killed.
struct Running {
    child: Child,
    console: Pipe,
    qemu: Pipe,
    socket: std::path::PathBuf,
    monitor: Option<Monitor>,
    virtio: Option<Virtio>,
    /// How much of the console was looked through for moments.
    looked: usize,
}

impl Running {
    fn new(mut child: Child, socket: std::path::PathBuf) -> Self {
        let console = Pipe::new(child.stdout.take().expect("stdout was piped"));
        let qemu = Pipe::new(child.stderr.take().expect("stderr was piped"));
        Self { child, console, qemu, socket, monitor: None, virtio: None, looked: 0 }
    }

    /// Waits for the end, and makes it when `timeout` is over or `watch` has seen enough.
    fn wait(&mut self, timeout: Duration, watch: &dyn Fn(&str) -> Watch) -> End {
        let deadline = Instant::now() + timeout;
        let (mut asked, mut early) = (Instant::now(), true);
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return End::Exited(status),
                Ok(None) if Instant::now() < deadline => {}
                // Time is up, or the child cannot even be asked.
                Ok(None) | Err(_) => {
                    self.ask();
                    self.end();
                    return End::TimedOut(timeout);
                }
            }
            if self.moment() {
                (asked, early) = (Instant::now(), false);
                self.ask();
            } else if early && asked.elapsed() > ASK {
                asked = Instant::now();
                self.ask();
            }
            let enough = watch(&self.console.text()) == Watch::Enough;
            if enough {
                self.ask();
                self.end();
                return End::Ended;
            }
            thread::sleep(PAUSE);
        }
    }

    /// Whether the guest has said that its driver made progress since this was last asked.
    fn moment(&mut self) -> bool {
        let console = self.console.text();
        // A line is looked at when it is whole.
        let whole = console.rfind('\n').map_or(0, |end| end + 1);
        let fresh = console.get(self.looked..whole).unwrap_or_default();
        let found = MOMENTS.iter().any(|moment| fresh.contains(moment));
        drop(console);
        self.looked = whole.max(self.looked);
        found
    }

    fn monitor(&mut self) -> Option<&mut Monitor> {
        if self.monitor.is_none() {
            self.monitor = Monitor::connect(&self.socket);
        }
        self.monitor.as_mut()
    }

    fn ask(&mut self) {
        if let Some(virtio) = self.monitor().and_then(Monitor::virtio) {
            self.virtio = Some(virtio);
        }
    }

    /// Asks QEMU to end, and kills it where that does not help.
    fn end(&mut self) {
        if let Some(monitor) = self.monitor() {
            monitor.quit();
            let deadline = Instant::now() + LEAVE;
            while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
                thread::sleep(PAUSE);
            }
        }
        self.kill();
    }

    fn kill(&mut self) {
        // Both fail only where the process has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What was said on either pipe, and what QEMU knew.
    fn finish(mut self) -> (String, String, Option<Virtio>) {
        (self.console.close(), self.qemu.close(), self.virtio.take())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A pipe that is read beside us, so that QEMU never waits for its reader.
struct Pipe {
    text: Arc<Mutex<String>>,
    reader: Cell<Option<JoinHandle<()>>>,
}

impl Pipe {
    fn new(mut pipe: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let shared = Arc::clone(&text);
        let reader = thread::spawn(move || {
            let mut bytes = [0; 4096];
            // A pipe that breaks leaves what was read before, which is all there is.
            while let Ok(length @ 1..) = pipe.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..length]);
                shared.lock().expect("nobody panics with it").push_str(&text);
            }
        });
        Self { text, reader: Cell::new(Some(reader)) }
    }

    fn text(&self) -> MutexGuard<'_, String> {
        self.text.lock().expect("nobody panics with it")
    }

    /// Everything, once the writer has closed it.
    fn close(&self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("a reader does not panic");
        }
        std::mem::take(&mut self.text())
    }
}

impl Outcome {
    /// An outcome by what was said alone, for whoever judges outcomes and wants to try it.
    pub fn told(platform: &Platform, console: &str, qemu: &str, end: End) -> Self {
        Self {
            platform: platform.name,
            guest: Guest::parse(console),
            virtio: None,
            iommu: IommuTrace::default(),
            console: console.to_owned(),
            qemu: qemu.to_owned(),
            command: String::new(),
            end,
            elapsed: Duration::from_secs(1),
        }
    }

    /// What the guest said, if it came to the end of its script.
    ///
    /// # Errors
    ///
    /// [`Error::Guest`] with the end of the console after a panic, a time-out or
    /// a QEMU that did not start.
    pub fn guest(&self) -> Result<&Guest, Error> {
        let problem = match &self.end {
            End::Panicked => "the guest's kernel panicked".to_owned(),
            End::Ended => "ended by us before it was done".to_owned(),
            End::TimedOut(after) => format!("no end after {} s; killed", after.as_secs()),
            End::Exited(status) if self.console.is_empty() || !status.success() => {
                format!("QEMU ended ({status})")
            }
            End::Exited(_) if self.guest.end.is_none() => "the guest went down too early".to_owned(),
            End::Exited(_) => return Ok(&self.guest),
        };
        let (source_name, said) = match self.console.trim().is_empty() {
            true => ("QEMU's output", &self.qemu),
            false => ("the console", &self.console),
        };
        Err(Error::Guest { platform: self.platform, problem, source_name, tail: tail(said, 25) })
    }

    /// What the guest said, however far it got.
    pub fn so_far(&self) -> &Guest {
        &self.guest
    }

    /// Everything, as for a log file.
    pub fn log(&self) -> String {
        let Self { platform, guest: _, virtio, iommu, console, qemu, command, end, elapsed } = self;
        format!(
            "{platform}: {end:?} after {:.1} s\n\n$ {command}\n\n--- QEMU\n{qemu}\n--- the disk, asked of QEMU\n\
             {virtio:#x?}\n--- the IOMMU\n{iommu}\n--- console\n{console}\n",
            elapsed.as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(console: &str, end: End) -> Outcome {
        let platform = Platform::named("x86-none").unwrap();
        Outcome::told(platform, console, "qemu: no such device", end)
    }

    #[test]
    fn an_outcome_quotes_whoever_knows_why() {
        let exited = || End::Exited(ExitStatus::default());
        let cases = [
            (outcome("", exited()), "QEMU's output ends:\n    qemu: no such device"),
            (outcome("boot\nKernel panic - not syncing", End::Panicked), "the guest's kernel panicked"),
            (
                outcome("boot", End::TimedOut(Duration::from_secs(9))),
                "no end after 9 s; killed; the console ends:\n    boot",
            ),
            (outcome("boot", exited()), "the guest went down too early"),
        ];
        for (outcome, expected) in cases {
            let error = outcome.guest().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(outcome("RINGFENCE end=done", exited()).guest().is_ok());
    }

    fn shell(script: &str) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::new(command.spawn().unwrap(), "/nowhere".into())
    }

    #[test]
    fn a_child_that_hangs_is_killed() {
        let mut running = shell("exec sleep 60");
        let end = running.wait(Duration::from_millis(30), &|_| Watch::On);
        assert_eq!(end, End::TimedOut(Duration::from_millis(30)));
        assert!(running.child.try_wait().unwrap().is_some(), "it was waited for");
    }

    #[test]
    fn whoever_watches_sees_the_console_and_ends_it() {
        let mut running = shell("echo RINGFENCE started=1; echo oh >&2; exec sleep 60");
        let watch = |console: &str| if console.contains("started=1\n") { Watch::Enough } else { Watch::On };
        assert_eq!(running.wait(Duration::from_secs(60), &watch), End::Ended);
        let (console, qemu, virtio) = running.finish();
        assert_eq!((&*console, &*qemu, virtio), ("RINGFENCE started=1\n", "oh\n", None));
    }

    #[test]
    fn a_moment_is_a_whole_line() {
        let mut running = shell("exit 0");
        assert!(!running.moment());
        running.console.text().push_str("boot\nRINGFENCE sta");
        assert!(!running.moment());
        running.console.text().push_str("rted=1\r\n");
        assert!(running.moment());
        assert!(!running.moment(), "once");
    }
}
