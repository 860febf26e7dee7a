//! The guide to a driver (docs/driver.md): its code, as it stands there, reads a sector of QEMU's disk.

use std::fs;

use ringfence_guests::{Guest, Image, Qemu};

use crate::Workspace;
use crate::copied;
use crate::old_driver::program;
use crate::pc::Pc;
use crate::steps::Log;

/// The program, and its file beside `ringfence` itself.
pub(crate) const NAME: &str = "ringfence-guide";

/// Boots it. The disk is where the guide looks for it, and stays as it is.
pub(crate) fn boot(qemu: &Qemu, workspace: &Workspace, log: &mut Log) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
    let image = Image::create(&folder.path().join("disk"), 19).map_err(|error| error.to_string())?;
    let disk = fs::read(image.path()).map_err(|error| format!("{}: {error}", image.path().display()))?;
    let mut pc = Pc::new(qemu, "q35", 64);
    pc.disk("pci", image.path(), "addr=3").kernel(&program(workspace, NAME), "");
    let (ended, console) = pc.run(&folder.path().join("console"))?;
    log.line(format_args!("{NAME}\n{console}"));
    let guest = Guest::parse(&console);
    copied::hold("end", guest.end.as_deref(), "done", &guest.errors)?;
    let sector: String = disk[..512].iter().map(|byte| format!("{byte:02x}")).collect();
    match console.contains(&format!("RINGFENCE sector={sector}")) {
        true => copied::nothing_of(&image),
        false => Err(format!("it does not read what is on the disk; QEMU {ended}")),
    }
}
