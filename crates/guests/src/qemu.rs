//! Which QEMU: the machine's own, one that apt may add, or one unpacked privately.

use std::path::PathBuf;
use std::process::Command;

use crate::apt::{self, is_in_path};
use crate::cache::Cache;
use crate::error::Error;
use crate::packages::{Arch, Suite};
use crate::{tool, unpacked};

/// Where a QEMU may come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QemuSource {
    /// The first that works and is not too old of: `PATH`; one unpacked in the
    /// cache before; the distribution's own, installed by apt where we are root
    /// and nothing present has to change; Debian's newer one, unpacked now.
    #[default]
    Auto,
    /// What is in `PATH`, and nothing else.
    Path,
    /// Debian's, unpacked in the cache; the machine stays as it is.
    Unpacked(Suite),
}

/// What is known of QEMU's devices is known from this version on. Debian 12's own 7.2 has, for one, an amd-iommu that
/// translates by default, as no later one here does; so what a guest shows would depend on the machine that it runs on.
const OLDEST: u32 = 10;

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

    /// The same, for guests of `arch` with a device that older ones lack: the one that was asked for, or is in `PATH`, if it
    /// has it; else Debian's newest. Nothing is installed.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn with_device(cache: &Cache<'_>, source: QemuSource, arch: Arch, device: &str) -> Result<Self, Error> {
        let asked = if source == QemuSource::Auto { QemuSource::Path } else { source };
        match Self::find(cache, asked, &[arch]).ok().filter(|qemu| qemu.has_device(arch, device)) {
            Some(qemu) => Ok(qemu),
            None => Self::find(cache, QemuSource::Unpacked(Suite::Sid), &[arch]),
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

    /// Whether the emulator of `arch` has a device of that name.
    pub fn has_device(&self, arch: Arch, name: &str) -> bool {
        // Asked for the help of one that it has not, QEMU 7.2 says so and leaves as if all were well.
        let devices = tool::run(self.command(arch).args(["-device", "help"]));
        devices.is_ok_and(|list| list.contains(&format!("name \"{name}\"")))
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
        const SUITE: Suite = Suite::BookwormBackports;
        if let Some(qemu) = Self::in_path(arches) {
            match qemu.too_old(arches) {
                None => return Ok(qemu),
                Some(old) => cache.say(&format!("the QEMU in PATH is {old}; using one unpacked in the cache")),
            }
        } else if !cache.has_qemu(SUITE) {
            // apt takes seconds to say no, which every run would wait for.
            match Self::by_apt(cache, arches) {
                Ok(qemu) => return Ok(qemu),
                Err(reason) => cache.say(&format!("no QEMU by apt ({reason}); using one unpacked in the cache")),
            }
        }
        Self::unpacked(cache, SUITE, arches)
    }

    fn by_apt(cache: &Cache<'_>, arches: &[Arch]) -> Result<Self, String> {
        let packages = packages(arches);
        let suits = |package: &str, version: &str| match packages.contains(&package) && is_too_old(version) {
            true => Err(format!("{package} would be {version}, older than {OLDEST}")),
            false => Ok(()),
        };
        apt::install_if(cache, "the distribution's QEMU", &packages, suits)?;
        Self::in_path(arches).ok_or_else(|| "apt installed the packages, yet they are not in PATH".to_owned())
    }

    /// The version of an emulator that is too old, or that does not tell its version.
    fn too_old(&self, arches: &[Arch]) -> Option<String> {
        let versions = arches.iter().map(|arch| self.version(*arch).unwrap_or_else(|error| error.to_string()));
        versions.into_iter().find(|version| is_too_old(version))
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

/// Whether `version`, as QEMU or its package tells it, is of before [`OLDEST`], or is none.
fn is_too_old(version: &str) -> bool {
    // A package's may begin with an epoch.
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    let major = upstream.split(|c: char| !c.is_ascii_digit()).next().and_then(|major| major.parse::<u32>().ok());
    major.is_none_or(|major| major < OLDEST)
}

fn no_qemu(arches: &[Arch], reason: String) -> Error {
    Error::NoQemu { reason, install: apt::command(&packages(arches)) }
}

/// Each once.
fn packages(arches: &[Arch]) -> Vec<&'static str> {
    let mut packages: Vec<_> = arches.iter().map(|arch| arch.qemu_package()).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_qemu_and_its_package_tell_them() {
        for old in ["7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "1:7.2+dfsg-7+deb12u18", "9.2.0", "", "none"] {
            assert!(is_too_old(old), "{old}");
        }
        for new in ["10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)", "1:10.0.2+ds-2~bpo12+1", "11.1.0"] {
            assert!(!is_too_old(new), "{new}");
        }
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
