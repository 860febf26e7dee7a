//! One cell: a platform and what is asked of the flag, booted and judged.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ringfence_guests::{
    Backend, Boot, Disk, DiskState, Guest, Image, Iommu, Outcome, PLATFORMS, Platform, StorageDaemon, VirtioFlag,
};
use ringfence_policy::IommuMode;

use super::Server;
use super::kit::Kit;

/// How long a server may take to log the end of a connection.
const PARTING: Duration = Duration::from_secs(5);

/// What is asked of the flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flag {
    /// Neither the server nor QEMU offers it.
    Off,
    /// Both offer it.
    On,
    /// Both offer it, and the server serves nobody who does not take it.
    Require,
}

/// What has to come of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// The disk works by guest-physical addresses; the guest holds the flag or not.
    Physical { flag: bool },
    /// The disk works, and each of its addresses is translated.
    Translated,
    /// The server turns QEMU away and lives.
    Refused,
}

/// A platform, the flag, and who serves.
pub(crate) struct Cell {
    pub(crate) platform: &'static Platform,
    flag: Flag,
    server: Server,
}

/// Where things are, and how long they may take.
pub(crate) struct Places {
    pub(crate) server: PathBuf,
    pub(crate) logs: PathBuf,
    pub(crate) timeout: Duration,
}

impl Cell {
    /// Every cell that makes sense with `server`.
    pub(crate) fn all(server: Server) -> impl Iterator<Item = Self> {
        let flags: &[Flag] = match server {
            Server::Ringfence => &[Flag::Off, Flag::On, Flag::Require],
            Server::Qemu => &[Flag::Off, Flag::On],
            Server::StorageDaemon => &[Flag::Off],
        };
        PLATFORMS.iter().flat_map(move |platform| flags.iter().map(move |&flag| Self { platform, flag, server }))
    }

    /// `platform/flag`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.platform.name, self.flag)
    }

    /// Boots and judges; what was seen, or what was not as it should be.
    pub(crate) fn run(&self, kit: &Kit, places: &Places) -> Result<String, String> {
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let image = Image::create(&folder.path().join("disk"), self.seed()).map_err(|error| error.to_string())?;
        let [socket, server_log] = ["socket", "log"].map(|name| folder.path().join(name));
        let mut backend = match self.server {
            Server::Qemu => None,
            Server::Ringfence => Some(self.serve(places, &image, &socket)),
            Server::StorageDaemon => Some(StorageDaemon::IN_PATH.export(image.path(), &socket)),
        }
        .map(|command| Backend::start(command, &socket, &server_log))
        .transpose()
        .map_err(|error| error.to_string())?;
        let boot = Boot {
            qemu: &kit.qemu,
            platform: self.platform,
            kernel: kit.kernel(self.platform),
            busybox: kit.busybox(self.platform),
            disk: backend.as_ref().map_or(Disk::QemuOwn(image.path()), |backend| Disk::VhostUser(backend.socket())),
            platform_access: if self.flag == Flag::Off { VirtioFlag::Off } else { VirtioFlag::On },
            timeout: places.timeout,
        };
        let outcome = boot.run().map_err(|error| error.to_string())?;
        let verdict = self.judge(&image, &outcome, backend.as_mut());

        let log = places.logs.join(format!("{}.log", self.name().replace('/', "-")));
        let served = backend.as_ref().map(|backend| format!("--- server\n{}", backend.log())).unwrap_or_default();
        fs::write(&log, outcome.log() + &served).map_err(|error| format!("{}: {error}", log.display()))?;

        let seen = verdict?;
        backend.map_or(Ok(()), ends_cleanly)?;
        self.judge_image(&image)?;
        Ok(format!("boot {:>4.1} s, {seen}", outcome.elapsed.as_secs_f64()))
    }

    fn judge(&self, image: &Image, outcome: &Outcome, backend: Option<&mut Backend>) -> Result<String, String> {
        let expected = self.expected();
        if expected == Expected::Refused {
            return judge_refusal(outcome, backend);
        }
        let seen = judge_guest(expected, image, outcome)?;
        match backend.filter(|_| self.server == Server::Ringfence) {
            Some(backend) => Ok(format!("{seen}, {}", judge_counts(expected, backend)?)),
            None => Ok(seen),
        }
    }

    /// The host finds in the image what the guest left there, to the byte.
    fn judge_image(&self, image: &Image) -> Result<(), String> {
        let as_left = match self.expected() {
            Expected::Refused => image.is_untouched(),
            Expected::Physical { .. } | Expected::Translated => image.is_as_expected(),
        };
        match as_left.map_err(|error| error.to_string())? {
            true => Ok(()),
            false => Err("the image on the host is not what the guest left".to_owned()),
        }
    }

    fn expected(&self) -> Expected {
        match (self.flag, self.platform.iommu) {
            (Flag::Off, _) => Expected::Physical { flag: false },
            (Flag::On | Flag::Require, Iommu::Present) => Expected::Translated,
            // QEMU offers the guest the flag, and strips it for the server.
            (Flag::On, Iommu::Absent) => Expected::Physical { flag: true },
            (Flag::Require, Iommu::Absent) => Expected::Refused,
        }
    }

    fn serve(&self, places: &Places, image: &Image, socket: &Path) -> Command {
        let mode = match self.flag {
            Flag::Off => "off",
            Flag::On => "offer",
            Flag::Require => "require",
        };
        let mut command = Command::new(&places.server);
        command.args(["serve", "blk", "--iommu", mode, "--socket"]).arg(socket).arg("--image").arg(image.path());
        command
    }

    /// Differs between cells that run at the same time.
    fn seed(&self) -> u64 {
        let name = self.name();
        name.bytes().fold(0, |seed, byte| (seed * 31 + u64::from(byte)) & 0xffff_ffff)
    }
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Require => "require",
        })
    }
}

/// The server answers SIGTERM with success.
fn ends_cleanly(backend: Backend) -> Result<(), String> {
    let status = backend.end().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("the server answered SIGTERM with {status}")) }
}

/// The guest worked, read what was there, read back what it wrote, and holds
/// the flag where it should.
fn judge_guest(expected: Expected, image: &Image, outcome: &Outcome) -> Result<String, String> {
    let guest = outcome.guest().map_err(|error| error.to_string())?;
    let Guest { kernel, features, group, read, written, errors, .. } = guest;
    if !errors.is_empty() || written.is_none() {
        let disk = guest.disk.map_or("of unknown state".to_owned(), |disk| format!("{disk:?}").to_lowercase());
        return Err(format!("the guest's disk is {disk}; it says: {}", errors.join("; ")));
    }
    let hold = |what: &str, found: &Option<String>, wanted: &str| match found.as_deref() == Some(wanted) {
        true => Ok(()),
        false => Err(format!("the guest {what} {}, not {wanted}", found.as_deref().unwrap_or("nothing"))),
    };
    hold("read", read, image.initial())?;
    hold("read back", written, image.expected())?;
    let wanted = expected != Expected::Physical { flag: false };
    let held = features.as_ref().is_some_and(|features| features.has(flag_bit()));
    if held != wanted {
        let word = |set| if set { "set" } else { "clear" };
        return Err(format!("bit {} is {} in the guest's sysfs, not {}", flag_bit(), word(held), word(wanted)));
    }
    let group = group.as_ref().map_or("no group".to_owned(), |group| format!("group {group}"));
    let bit = if held { format!("bit {}", flag_bit()) } else { format!("no bit {}", flag_bit()) };
    Ok(format!("{}, {bit}, {group}", kernel.as_deref().unwrap_or("unknown kernel")))
}

/// The server asked for translations exactly where its addresses are translated.
fn judge_counts(expected: Expected, backend: &Backend) -> Result<String, String> {
    // The count comes with the end of the connection, which may trail QEMU's.
    backend.logs(PARTING, |line| counts(line).is_some());
    let log = backend.log();
    let Some((misses, counts)) = log.lines().rev().find_map(counts) else {
        return Err("the server's log has no line with misses=N".to_owned());
    };
    if (misses > 0) != (expected == Expected::Translated) {
        return Err(format!("expected {expected:?}, but the server counted {counts}"));
    }
    Ok(counts)
}

/// The guest got nothing, the server said why, and it serves the next.
fn judge_refusal(outcome: &Outcome, backend: Option<&mut Backend>) -> Result<String, String> {
    let backend = backend.ok_or("no server that could refuse")?;
    let Guest { disk, read, written, .. } = outcome.so_far();
    if read.is_some() || written.is_some() || *disk == Some(DiskState::Ready) {
        return Err("the guest was served though it did not take the flag".to_owned());
    }
    let log = backend.log();
    let reason = log.lines().find(|line| {
        let line = line.to_lowercase();
        line.contains("refus") && line.contains("iommu")
    });
    let Some(reason) = reason else {
        return Err(format!("the server's log names no refusal and its IOMMU: {log}"));
    };
    if !backend.serves() {
        return Err("the server does not serve any more".to_owned());
    }
    let reason = reason.split_once("refus").map_or(reason, |(before, _)| &reason[before.len()..]);
    Ok(format!("{}…", reason.chars().take(120).collect::<String>()))
}

/// The number of misses in a line with `misses=N`, and the line's counts.
fn counts(line: &str) -> Option<(u64, String)> {
    const NAMES: [&str; 4] = ["misses", "updates", "invalidations", "faults"];
    let value = |name: &str| {
        let (_, rest) = line.split_once(&format!("{name}="))?;
        rest.split(|char: char| !char.is_ascii_digit()).next()?.parse::<u64>().ok()
    };
    let misses = value("misses")?;
    let told = NAMES.iter().filter_map(|name| Some(format!("{name}={}", value(name)?)));
    Some((misses, told.collect::<Vec<_>>().join(" ")))
}

/// The flag's bit, from the crate that owns it: the one bit that an offering
/// device adds.
fn flag_bit() -> u32 {
    IommuMode::Offer.offers(0).trailing_zeros()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn counts_are_read_from_the_log() {
        let line = "2026 INFO disconnected peer=1 misses=12 updates=10 invalidations=3 faults=0";
        let expected = (12, "misses=12 updates=10 invalidations=3 faults=0".to_owned());
        assert_eq!(counts(line), Some(expected));
        assert_eq!(counts("misses=0"), Some((0, "misses=0".to_owned())));
        assert_eq!(counts("listening"), None);
    }

    #[test]
    fn every_cell_has_its_own_name_and_seed() {
        let cells: Vec<_> = Cell::all(Server::Ringfence).collect();
        let names: BTreeSet<_> = cells.iter().map(Cell::name).collect();
        let seeds: BTreeSet<_> = cells.iter().map(Cell::seed).collect();
        assert_eq!((names.len(), seeds.len()), (cells.len(), cells.len()));
    }

    #[test]
    fn what_is_expected_follows_from_the_platform_and_the_flag() {
        let expected = |name: &str| {
            let cell = Cell::all(Server::Ringfence).find(|cell| cell.name() == name).expect(name);
            cell.expected()
        };
        assert_eq!(expected("x86-none/off"), Expected::Physical { flag: false });
        assert_eq!(expected("x86-none/on"), Expected::Physical { flag: true });
        assert_eq!(expected("x86-none/require"), Expected::Refused);
        assert_eq!(expected("x86-intel-lazy/off"), Expected::Physical { flag: false });
        assert_eq!(expected("x86-intel-lazy/on"), Expected::Translated);
        assert_eq!(expected("ppc64le-pseries/require"), Expected::Translated);
        assert_eq!(expected("arm64-none/require"), Expected::Refused);
    }
}
