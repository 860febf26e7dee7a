//! One cell, booted.

use std::cell::Cell as Slot;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringfence_guests::{Backend, Boot, Disk, End, Error, Image, Interface, Qemu, StorageDaemon, System, Watch};
use ringfence_policy::IommuMode;

use super::cell::{Cell, Device, Driver};
use super::seen::{Counts, Seen, Server, flag_in, ring_in};
use super::session::Options;

/// How long a server may take to log the end of a connection.
const PARTING: Duration = Duration::from_secs(5);

/// How long a guest is given to be served after all, once its server has refused it and its driver has started.
const GRACE: Duration = Duration::from_secs(2);

/// How often the server's log is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// A cell that was booted, and all that was said.
pub(crate) struct Booted {
    pub(crate) seen: Seen,
    pub(crate) log: String,
}

impl Booted {
    /// Whether the time was up before the guest had said a word.
    pub(crate) fn never_began(&self) -> bool {
        matches!(self.seen.outcome.end, End::TimedOut(_)) && self.seen.outcome.console.trim().is_empty()
    }
}

/// What a cell is made of.
pub(crate) struct Parts<'a> {
    pub(crate) qemu: &'a Qemu,
    pub(crate) system: System<'a>,
    /// Where the cell has it.
    pub(crate) storage_daemon: Option<&'a StorageDaemon>,
}

/// Boots `cell`; an error means that there was no boot.
pub(crate) fn boot(cell: &Cell, parts: &Parts<'_>, options: &Options<'_>) -> Result<Booted, Error> {
    let &Parts { qemu, system, storage_daemon } = parts;
    let folder = ringfence_guests::scratch()?;
    let image = Image::create(&folder.path().join("disk"), seed(cell))?;
    let [socket, server_log, plain, daemon_log] =
        ["socket", "log", "plain", "daemon-log"].map(|name| folder.path().join(name));
    // Held until the guest is over.
    let wrapped = match (cell.device, storage_daemon) {
        (Device::Wrapped(_), Some(daemon)) => {
            Some(Backend::start(daemon.export(image.path(), &plain), &plain, &daemon_log)?)
        }
        _ => None,
    };
    let command = match cell.device {
        Device::QemuBlk(_) => None,
        Device::ServeBlk(..) | Device::Card(_) => Some(serve(cell, options.server, &image, &socket)),
        Device::StorageDaemon(_) => storage_daemon.map(|daemon| daemon.export(image.path(), &socket)),
        Device::Wrapped(mode) => Some(wrap(options.server, mode, &plain, &socket)),
    };
    let backend = command.map(|command| Backend::start(command, &socket, &server_log)).transpose()?;
    let plain_back_end = match cell.device {
        Device::StorageDaemon(_) => backend.as_ref(),
        _ => wrapped.as_ref(),
    };
    let shared = Slot::new(None);
    let outcome = Boot {
        qemu,
        platform: cell.platform,
        system,
        disk: match (&backend, cell.device) {
            (None, _) => Disk::QemuOwn(image.path()),
            (Some(backend), Device::Card(_)) => Disk::VfioUser(backend.socket()),
            (Some(backend), _) => Disk::VhostUser(backend.socket()),
        },
        platform_access: cell.flag(),
        interface: if cell.driver == Driver::LinuxLegacy { Interface::Transitional } else { Interface::Modern },
        timeout: options.timeout,
        watch: &watch(backend.as_ref(), plain_back_end, &shared, options),
    }
    .run()?;
    let logs = [("server", &backend), ("wrapped", &wrapped)];
    let logs = logs.map(|(name, of)| of.as_ref().map_or_else(String::new, |of| format!("--- {name}\n{}", of.log())));
    let log = outcome.log() + &logs.concat();
    let server = match cell.device {
        Device::ServeBlk(..) | Device::Card(_) | Device::Wrapped(_) => backend.map(end_of_server),
        Device::QemuBlk(_) | Device::StorageDaemon(_) => None,
    };
    let back_end_memory = shared.take();
    let (image, initial, expected) = (image.state()?, image.initial().to_owned(), image.expected().to_owned());
    Ok(Booted {
        seen: Seen { platform: cell.platform, outcome, image, initial, expected, server, back_end_memory },
        log,
    })
}

fn serve(cell: &Cell, program: &Path, image: &Image, socket: &Path) -> Command {
    let (mode, how) = match cell.device {
        Device::ServeBlk(mode, keep) => (mode, ["--iotlb", keep.name()]),
        Device::Card(mode) => (mode, ["--transport", "vfio-user"]),
        Device::QemuBlk(_) | Device::StorageDaemon(_) | Device::Wrapped(_) => {
            unreachable!("only for a server of disks")
        }
    };
    let mut command = Command::new(program);
    command.args(["serve", "blk", "--iommu", &mode.to_string()]).args(how).arg("--socket").arg(socket);
    command.arg("--image").arg(image.path());
    command
}

fn wrap(program: &Path, mode: IommuMode, plain: &Path, socket: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["wrap", "--iommu", &mode.to_string(), "--backend"]).arg(plain).arg("--socket").arg(socket);
    command
}

/// Ends a guest whose server has refused it: it would wait for its disk for long. And every guest when we are to stop.
/// Looks meanwhile at what memory the `plain` back-end shares with others, once the guest's driver uses it.
fn watch<'a>(
    backend: Option<&'a Backend>,
    plain: Option<&'a Backend>,
    shared: &'a Slot<Option<Vec<String>>>,
    options: &'a Options<'_>,
) -> impl Fn(&str) -> Watch + use<'a> {
    let refused = Slot::new(None);
    let looked = Slot::new(Instant::now());
    move |console| {
        if options.stop.load(Ordering::Relaxed) {
            return Watch::Enough;
        }
        let Some(backend) = backend.filter(|_| console.contains("RINGFENCE started=")) else { return Watch::On };
        if let Some(plain) = plain {
            let seen = shared.take();
            shared.set(seen.or_else(|| plain.shared_memory().filter(|shared| !shared.is_empty())));
        }
        if refused.get().is_none() && looked.get().elapsed() > LOOK {
            looked.set(Instant::now());
            refused.set(refusal(&backend.log()).map(|_| Instant::now()));
        }
        match refused.get() {
            Some(since) if since.elapsed() > GRACE => Watch::Enough,
            _ => Watch::On,
        }
    }
}

/// What our server has to say for itself, in the end.
fn end_of_server(mut backend: Backend) -> Server {
    // The counts come with the end of the connection, which may trail QEMU's.
    backend.logs(PARTING, |line| Counts::parse(line).is_some());
    let log = backend.log();
    let refusal = refusal(&log).map(str::to_owned);
    let serves_on = refusal.is_some() && backend.serves();
    let complaints = log.lines().filter(|line| line.contains(" WARN ") || line.contains("ERROR "));
    Server {
        flag: log.lines().rev().find_map(flag_in),
        refusal,
        counts: log.lines().rev().find_map(Counts::parse),
        ring: log.lines().rev().find_map(ring_in),
        complaints: complaints.take(8).map(without_time).collect(),
        serves_on,
        end: match backend.end() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(status.to_string()),
            Err(error) => Err(error.to_string()),
        },
    }
}

/// Our server's reason for turning a front-end away for the flag's sake.
fn refusal(log: &str) -> Option<&str> {
    log.lines().find_map(|line| {
        let (_, reason) = line.split_once("refused: ")?;
        reason.contains("IOMMU").then_some(reason)
    })
}

/// A line of our server's log without the time that it begins with.
fn without_time(line: &str) -> String {
    line.split_once(' ').map_or(line, |(_, rest)| rest).trim().to_owned()
}

/// Differs between cells that run at the same time.
fn seed(cell: &Cell) -> u64 {
    cell.to_string().bytes().fold(0, |seed, byte| (seed * 31 + u64::from(byte)) & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_cell_has_its_own_disk() {
        let cells = Cell::all();
        assert_eq!(cells.iter().map(seed).collect::<BTreeSet<_>>().len(), cells.len());
    }

    #[test]
    fn a_refusal_is_one_for_the_flags_sake() {
        let log = "T INFO listening\nT ERROR connection closed: refused: the device refuses its driver: the IOMMU …\n";
        assert_eq!(refusal(log), Some("the device refuses its driver: the IOMMU …"));
        assert_eq!(refusal("T ERROR connection closed: refused: bad ring"), None);
        assert_eq!(without_time("T ERROR x"), "ERROR x");
    }
}
