//! One boot: QEMU's command line, the console, and how it ended.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::backend::comma_safe;
use crate::console::Guest;
use crate::error::{Error, tail};
use crate::initramfs::Initramfs;
use crate::kernel::Kernel;
use crate::packages::Arch;
use crate::platform::Platform;
use crate::qemu::Qemu;

const MEMORY: &str = "256M";
const PAUSE: Duration = Duration::from_millis(20);

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
}

/// A guest to boot.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    /// The emulator.
    pub qemu: &'a Qemu,
    /// The machine.
    pub platform: &'static Platform,
    /// A kernel of the platform's series and architecture.
    pub kernel: &'a Kernel,
    /// A static busybox of the platform's architecture.
    pub busybox: &'a Path,
    /// The disk.
    pub disk: Disk<'a>,
    /// Whether the disk's device offers the flag.
    pub platform_access: VirtioFlag,
    /// When to give up on the guest.
    pub timeout: Duration,
}

/// How QEMU came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this status; zero after a guest's power-off.
    Exited(ExitStatus),
    /// The guest's kernel panicked.
    Panicked,
    /// It was killed when the time was up.
    TimedOut(Duration),
}

/// What came of a boot.
#[derive(Clone, Debug)]
pub struct Outcome {
    platform: &'static str,
    /// What the guest said, as far as it got.
    guest: Guest,
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
        let folder = tempfile::tempdir().map_err(Error::file("cannot create a folder in", &std::env::temp_dir()))?;
        let initramfs = folder.path().join("initramfs");
        let archive = Initramfs::build(self.kernel, self.busybox, self.platform.modules)?;
        fs::write(&initramfs, archive.bytes()).map_err(Error::file("cannot write", &initramfs))?;
        let mut command = self.command(&initramfs)?;
        let line = crate::tool::line(&command);
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Start { program: self.platform.arch.qemu().to_owned(), source })?;
        let console = collect(child.stdout.take().expect("stdout was piped"));
        let qemu = collect(child.stderr.take().expect("stderr was piped"));
        let end = wait(&mut child, self.timeout);
        let elapsed = started.elapsed();
        let [console, qemu] = [console, qemu].map(|thread| thread.join().expect("a reader does not panic"));
        let end = if console.contains("Kernel panic - not syncing") { End::Panicked } else { end };
        let guest = Guest::parse(&console);
        Ok(Outcome { platform: self.platform.name, guest, console, qemu, command: line, end, elapsed })
    }

    fn command(&self, initramfs: &Path) -> Result<Command, Error> {
        let platform = self.platform;
        let mut command = self.qemu.command(platform.arch);
        command
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-accel", "tcg", "-smp", "1", "-m", MEMORY])
            .arg("-object")
            // A vhost-user back-end maps the guest's memory, so it is shared.
            .arg(format!("memory-backend-memfd,id=memory,size={MEMORY},share=on"))
            .arg("-machine")
            .arg(format!("{},memory-backend=memory", platform.machine));
        if let Some(cpu) = platform.cpu {
            command.args(["-cpu", cpu]);
        }
        for device in platform.devices {
            command.arg("-device").arg(self.qemu.device(platform.arch, device)?);
        }
        self.disk_options(&mut command);
        command.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(initramfs);
        command.arg("-append").arg(self.kernel_arguments());
        Ok(command)
    }

    fn disk_options(&self, command: &mut Command) {
        let offer = match self.platform_access {
            VirtioFlag::Off => "off",
            VirtioFlag::On => "on",
        };
        let common = format!("disable-legacy=on,iommu_platform={offer}{}", self.platform.disk);
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
        }
    }

    fn kernel_arguments(&self) -> String {
        let Platform { console, arguments, arch, .. } = self.platform;
        // A panic ends QEMU at once; warnings are on the console, small talk is not.
        let mut line = format!("console={console} panic=-1 loglevel=5");
        if *arch == Arch::Amd64 {
            // Linux counts timer ticks against its own delay loop, and panics where a
            // busy host holds the emulated CPU back for as long.
            line.push_str(" no_timer_check");
        }
        if !arguments.is_empty() {
            line.push(' ');
            line.push_str(arguments);
        }
        line
    }
}

impl Outcome {
    /// What the guest said, if it came to the end of its script.
    ///
    /// # Errors
    ///
    /// [`Error::Guest`] with the end of the console after a panic, a time-out or
    /// a QEMU that did not start.
    pub fn guest(&self) -> Result<&Guest, Error> {
        let problem = match &self.end {
            End::Panicked => "the guest's kernel panicked".to_owned(),
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
        let Self { platform, guest: _, console, qemu, command, end, elapsed } = self;
        format!(
            "{platform}: {end:?} after {:.1} s\n\n$ {command}\n\n--- QEMU\n{qemu}\n--- console\n{console}\n",
            elapsed.as_secs_f64()
        )
    }
}

/// Waits for `child`, and kills it when `timeout` is over.
fn wait(child: &mut Child, timeout: Duration) -> End {
    let deadline = Instant::now() + timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return End::Exited(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(PAUSE),
            // Time is up, or the child cannot even be asked: end it either way.
            Ok(None) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                return End::TimedOut(timeout);
            }
        }
    }
}

/// Reads a pipe to its end beside us, so that QEMU never waits for its reader.
fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A pipe that breaks leaves what was read before, which is all there is.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(console: &str, end: End) -> Outcome {
        Outcome {
            platform: "x86-none",
            guest: Guest::parse(console),
            console: console.to_owned(),
            qemu: "qemu: no such device".to_owned(),
            command: String::new(),
            end,
            elapsed: Duration::from_secs(1),
        }
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

    #[test]
    fn a_child_that_hangs_is_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let end = wait(&mut child, Duration::from_millis(30));
        assert_eq!(end, End::TimedOut(Duration::from_millis(30)));
        assert!(child.try_wait().unwrap().is_some(), "it was waited for");
    }
}
