//! A PC as QEMU emulates it, with nothing that was not asked for.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitStatus};

use ringfence_guests::{Arch, Kernel, Qemu};

use crate::patience::wait;

/// A PC that is put together, and then runs to its end.
pub(crate) struct Pc(Command);

impl Pc {
    /// A machine of that kind with so many MiB. Its first serial port is the console.
    pub(crate) fn new(qemu: &Qemu, machine: &str, mib: u32) -> Self {
        let mut command = qemu.command(Arch::Amd64);
        command.args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-accel", "tcg"]).args([
            "-machine",
            machine,
            "-m",
            &format!("{mib}M"),
        ]);
        Self(command)
    }

    /// A q35 whose memory other processes can map, and whose interrupts an IOMMU can translate.
    pub(crate) fn with_shared_memory(qemu: &Qemu, mib: u32) -> Self {
        let mut pc = Self::new(qemu, "q35,kernel-irqchip=split,memory-backend=memory", mib);
        pc.option("-object", format!("memory-backend-memfd,id=memory,size={mib}M,share=on"));
        pc
    }

    /// An option of QEMU's.
    pub(crate) fn option(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.arg(name).arg(value);
        self
    }

    pub(crate) fn device(&mut self, options: impl AsRef<OsStr>) -> &mut Self {
        self.option("-device", options)
    }

    /// A disk of QEMU's own: a virtio-blk on `bus`, which is "pci" or "device".
    pub(crate) fn disk(&mut self, bus: &str, image: &Path, options: &str) -> &mut Self {
        self.option("-blockdev", format!("driver=file,node-name=disk,filename={}", image.display()))
            .device(format!("virtio-blk-{bus},drive=disk,{options}"))
    }

    /// A random source of QEMU's own, and a card on a network whose router is 10.0.2.2.
    pub(crate) fn source_and_card(&mut self, bus: &str, options: &str) -> &mut Self {
        self.device(format!("virtio-rng-{bus},{options}"))
            .option("-netdev", "user,id=net,restrict=on")
            .device(format!("virtio-net-{bus},netdev=net,{options}"))
    }

    /// A back-end at `socket`, for a device with this `chardev`.
    pub(crate) fn socket(&mut self, chardev: &str, socket: &Path) -> &mut Self {
        self.option("-chardev", format!("socket,id={chardev},path={}", socket.display()))
    }

    pub(crate) fn kernel(&mut self, program: &Path, command_line: &str) -> &mut Self {
        self.option("-kernel", program).option("-append", command_line)
    }

    /// Linux, whose console is this PC's.
    pub(crate) fn linux(&mut self, kernel: &Kernel, initramfs: &Path, arguments: &str) -> &mut Self {
        let arguments = format!("console=ttyS0 panic=-1 loglevel=5 no_timer_check {arguments}");
        self.kernel(&kernel.image, &arguments).option("-initrd", initramfs)
    }

    /// QEMU, for who has it run in a way of its own.
    pub(crate) fn command(&mut self) -> &mut Command {
        &mut self.0
    }

    /// Runs it to its end, with all that is said in `console`: how it ended, and what was said.
    pub(crate) fn run(&mut self, console: &Path) -> Result<(ExitStatus, String), String> {
        let at = |error| format!("{}: {error}", console.display());
        let file = File::create(console).map_err(at)?;
        let ended = wait(self.0.stderr(file.try_clone().map_err(at)?).stdout(file));
        let said = fs::read(console).map_err(at)?;
        let said = String::from_utf8_lossy(&said).into_owned();
        match ended {
            Ok(ended) => Ok((ended, said)),
            Err(reason) => Err(format!("{reason}; what was said:\n{said}")),
        }
    }
}
