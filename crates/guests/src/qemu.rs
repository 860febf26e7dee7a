//! Which QEMU: the machine's own, one that apt may add, or one unpacked privately.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::error::Error;
use crate::packages::{Arch, Suite};
use crate::{tool, unpacked};

/// Where a QEMU may come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QemuSource {
    /// The first that works of: `PATH`; the distribution's own, installed by
    /// apt where we are root and nothing present has to change; Debian's newer
    /// one, unpacked in the cache.
    #[default]
    Auto,
    /// What is in `PATH`, and nothing else.
    Path,
    /// Debian's, unpacked in the cache; the machine stays as it is.
    Unpacked(Suite),
}

/// A QEMU that can run the guests asked for.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// Its root folder if unpacked privately, else it is in `PATH`.
    root: Option<PathBuf>,
}

impl Qemu {
    /// Finds, installs or unpacks a QEMU for all of `arches`.
    ///
    /// # Errors
    ///
    /// [`Error::NoQemu`] says what to install; a download that failed is itself.
    pub fn find(cache: &Cache<'_>, source: QemuSource, arches: &[Arch]) -> Result<Self, Error> {
        match source {
            QemuSource::Auto => Self::first_that_works(cache, arches),
            QemuSource::Path => Self::in_path(arches).ok_or_else(|| no_qemu(arches, "not all are in PATH".to_owned())),
            QemuSource::Unpacked(suite) => Self::unpacked(cache, suite, arches),
        }
    }

    /// The command that starts the emulator of `arch`.
    pub fn command(&self, arch: Arch) -> Command {
        let Some(root) = &self.root else { return Command::new(arch.qemu()) };
        let mut command = unpacked::program(root, arch.qemu());
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(root.join(firmware));
        }
        command
    }

    /// What the emulator of `arch` says of its version, in one line.
    pub fn version(&self, arch: Arch) -> Result<String, Error> {
        let said = tool::run(self.command(arch).arg("--version"))?;
        Ok(said.lines().next().unwrap_or_default().trim_start_matches("QEMU emulator version ").to_owned())
    }

    /// The option `device` as this QEMU spells it.
    ///
    /// amd-iommu's `pt=off`, to translate after all, has become `dma-remap=on` in 11.
    pub(crate) fn device(&self, arch: Arch, device: &str) -> Result<String, Error> {
        const OLD: &str = "amd-iommu,pt=off";
        const NEW: &str = "amd-iommu,dma-remap=on";
        let Some(rest) = device.strip_prefix(OLD) else { return Ok(device.to_owned()) };
        let properties = tool::run(self.command(arch).args(["-device", "amd-iommu,help"]))?;
        let spelling = if properties.contains("dma-remap=") { NEW } else { OLD };
        Ok(format!("{spelling}{rest}"))
    }

    fn first_that_works(cache: &Cache<'_>, arches: &[Arch]) -> Result<Self, Error> {
        if let Some(qemu) = Self::in_path(arches) {
            return Ok(qemu);
        }
        let by_apt = match install(cache, arches) {
            Ok(()) => match Self::in_path(arches) {
                Some(qemu) => return Ok(qemu),
                None => "apt installed the packages, yet they are not in PATH".to_owned(),
            },
            Err(reason) => reason,
        };
        cache.say(&format!("no QEMU by apt ({by_apt}); using one unpacked in the cache"));
        Self::unpacked(cache, Suite::BookwormBackports, arches)
    }

    fn in_path(arches: &[Arch]) -> Option<Self> {
        arches.iter().all(|arch| is_in_path(arch.qemu())).then_some(Self { root: None })
    }

    fn unpacked(cache: &Cache<'_>, suite: Suite, arches: &[Arch]) -> Result<Self, Error> {
        let qemu = Self { root: Some(cache.qemu(suite)?) };
        // Without a libc of its own it may not start on every machine.
        let starts = arches.iter().try_for_each(|arch| qemu.version(*arch).map(drop));
        starts.map(|()| qemu).map_err(|error| no_qemu(arches, format!("Debian's does not run here: {error}")))
    }
}

/// Installs the distribution's QEMU from the machine's own sources; a reason
/// in words when that cannot be had without changing what is installed.
fn install(cache: &Cache<'_>, arches: &[Arch]) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("not root".to_owned());
    }
    if !is_in_path("apt-get") {
        return Err("no apt-get here".to_owned());
    }
    let scratch = cache.scratch().map_err(|error| error.to_string())?;
    let apt = Apt { scratch: scratch.path() };
    apt.run(&["update"])?;
    let mut install = vec!["install", "--yes", "--no-install-recommends", "--no-remove"];
    install.extend(arches.iter().map(|arch| arch.qemu_package()));
    let plan = apt.run(&[&["--simulate"], &install[..]].concat())?;
    if let Some(change) = plan.lines().find(|line| changes_the_machine(line)) {
        return Err(format!("it would change what is installed: {change}"));
    }
    cache.say("installing the distribution's QEMU by apt");
    apt.run(&install).map(drop)
}

/// Whether a line of apt's plan touches a package that is installed already.
fn changes_the_machine(line: &str) -> bool {
    // `Inst name [old] (new …)` is an upgrade; a new package has no `[old]`.
    let replaces = |rest: &str| rest.split_whitespace().nth(1).is_some_and(|word| word.starts_with('['));
    line.starts_with("Remv ") || line.strip_prefix("Inst ").is_some_and(replaces)
}

/// apt with the machine's sources, and lists of our own: those of the machine
/// may be absent, and stay as they are.
struct Apt<'a> {
    scratch: &'a Path,
}

impl Apt<'_> {
    fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let scratch = std::path::absolute(self.scratch).map_err(|error| error.to_string())?;
        for folder in ["lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(scratch.join(folder)).map_err(|error| error.to_string())?;
        }
        let mut command = Command::new("apt-get");
        command
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .arg("-q")
            .arg(format!("-oDir::State::Lists={}", scratch.join("lists").display()))
            .arg(format!("-oDir::Cache={}", scratch.join("cache").display()))
            .arg("-oAPT::Sandbox::User=root")
            .arg("-oAcquire::Retries=3")
            .arg("-oAcquire::Languages=none")
            .args(arguments);
        tool::run(&mut command).map_err(|error| match error {
            Error::Tool { tail, .. } => last_error(&tail),
            other => other.to_string(),
        })
    }
}

/// apt's own one-line reason, or the end of what it said.
fn last_error(tail: &str) -> String {
    let lines: Vec<&str> = tail.lines().map(str::trim).collect();
    let errors: Vec<&str> = lines.iter().copied().filter(|line| line.starts_with("E: ")).collect();
    match errors.is_empty() {
        true => lines.join(" "),
        false => errors.join(" "),
    }
}

fn is_in_path(program: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

fn no_qemu(arches: &[Arch], reason: String) -> Error {
    let mut packages: Vec<_> = arches.iter().map(|arch| arch.qemu_package()).collect();
    packages.sort_unstable();
    packages.dedup();
    Error::NoQemu { reason, install: format!("apt-get install --no-install-recommends {}", packages.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_only_adds_is_told_from_one_that_changes() {
        assert!(!changes_the_machine("Inst seabios (1.16.2-1 Debian:12.15/oldstable [all])"));
        assert!(!changes_the_machine("Conf seabios (1.16.2-1 Debian:12.15/oldstable [all])"));
        assert!(changes_the_machine("Inst libusb-1.0-0 [2:1.0.25-1] (2:1.0.26-1 Debian:12.15/oldstable [amd64])"));
        assert!(changes_the_machine("Remv qemu-utils [1:10.0.2]"));
    }

    #[test]
    fn apt_is_quoted_by_its_errors() {
        assert_eq!(last_error("    Reading\n    E: no such package\n"), "E: no such package");
        assert_eq!(last_error("    odd\n    end"), "odd end");
    }

    #[test]
    fn a_missing_qemu_names_the_command_that_helps() {
        let text = no_qemu(&[Arch::Arm64, Arch::Arm64, Arch::Amd64], "offline".to_owned()).to_string();
        assert_eq!(
            text,
            "no QEMU for these guests: offline; as root run: \
             apt-get install --no-install-recommends qemu-system-arm qemu-system-x86"
        );
    }
}
