//! Debian packages by private lists: the machine's own set-up is neither used
//! for sources nor changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::tool;

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A Debian suite that packages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Debian 12.
    Bookworm,
    /// Newer packages built for Debian 12.
    BookwormBackports,
    /// Debian 13. Its libc is newer than Debian 12's, so its programs run with one of their own.
    Trixie,
    /// Debian's newest. Its libc is newer than that of any release, so its programs
    /// run with a libc of their own.
    Sid,
}

impl Suite {
    /// The suite's name in a sources list.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::BookwormBackports => "bookworm-backports",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }

    /// The suites that its packages take what they need from.
    pub(crate) const fn with_its_base(self) -> &'static [Self] {
        match self {
            Self::Bookworm => &[Self::Bookworm],
            Self::BookwormBackports => &[Self::Bookworm, Self::BookwormBackports],
            Self::Trixie => &[Self::Trixie],
            Self::Sid => &[Self::Sid],
        }
    }

    /// What its programs may count on: releases are close enough to the machine's.
    pub(crate) const fn runs_beside(self) -> Installed {
        match self {
            Self::Bookworm | Self::BookwormBackports => Installed::Machine,
            Self::Trixie | Self::Sid => Installed::Nothing,
        }
    }
}

/// A guest's architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arch {
    /// x86-64.
    Amd64,
    /// 64-bit Arm.
    Arm64,
    /// 64-bit little-endian POWER.
    Ppc64el,
}

impl Arch {
    /// Debian's name of the architecture.
    pub const fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
            Self::Ppc64el => "ppc64el",
        }
    }

    /// The metapackage that depends on the suite's current kernel.
    pub(crate) const fn kernel_metapackage(self) -> &'static str {
        match self {
            Self::Amd64 => "linux-image-amd64",
            Self::Arm64 => "linux-image-arm64",
            Self::Ppc64el => "linux-image-powerpc64le",
        }
    }

    /// The QEMU program that runs it.
    pub const fn qemu(self) -> &'static str {
        match self {
            Self::Amd64 => "qemu-system-x86_64",
            Self::Arm64 => "qemu-system-aarch64",
            Self::Ppc64el => "qemu-system-ppc64",
        }
    }

    /// Debian's package of that program.
    pub const fn qemu_package(self) -> &'static str {
        match self {
            Self::Amd64 => "qemu-system-x86",
            Self::Arm64 => "qemu-system-arm",
            Self::Ppc64el => "qemu-system-ppc",
        }
    }
}

/// What apt takes for installed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Installed {
    /// Nothing: a package is looked at by itself, of any architecture.
    Nothing,
    /// What the machine has, so that only missing dependencies are fetched.
    Machine,
}

/// Package lists in a folder of their own.
pub(crate) struct Lists {
    folder: PathBuf,
    arch: Arch,
    installed: Installed,
}

impl Lists {
    /// Fetches the lists of `suites` for `arch` into `folder`.
    pub(crate) fn update(folder: &Path, suites: &[Suite], arch: Arch, installed: Installed) -> Result<Self, Error> {
        if !Path::new(KEYRING).exists() {
            return Err(Error::Missing {
                path: PathBuf::from(KEYRING),
                consequence: "Debian's packages cannot be verified",
                package: "debian-archive-keyring",
            });
        }
        for sub in ["lists/partial", "cache/archives/partial"] {
            let sub = folder.join(sub);
            fs::create_dir_all(&sub).map_err(Error::file("cannot create", &sub))?;
        }
        let sources: String =
            suites.iter().map(|suite| format!("deb [signed-by={KEYRING}] {MIRROR} {} main\n", suite.name())).collect();
        let list = folder.join("sources.list");
        fs::write(&list, sources).map_err(Error::file("cannot write", &list))?;
        let lists = Self { folder: folder.to_owned(), arch, installed };
        tool::run(lists.apt("apt-get").arg("update"))?;
        Ok(lists)
    }

    /// The packages that a metapackage of kernels stands for: the kernel's own, and from Debian 14 on those that its image,
    /// its modules and their lists are in.
    pub(crate) fn kernel_packages(&self, metapackage: &str) -> Result<Vec<String>, Error> {
        let depends = |package: &str| tool::run(self.apt("apt-cache").args(["depends", package]));
        let answer = depends(metapackage)?;
        let kernel = dependencies(&answer, "linux-image-").next().ok_or_else(|| Error::Content {
            subject: metapackage.to_owned(),
            problem: format!("depends on no kernel; apt-cache said: {}", answer.trim()),
        })?;
        let answer = depends(kernel)?;
        let parts = ["linux-binary-", "linux-modules-", "linux-base-"]
            .into_iter()
            .flat_map(|prefix| dependencies(&answer, prefix));
        Ok([kernel].into_iter().chain(parts).map(str::to_owned).collect())
    }

    /// Downloads one package into the lists' folder and returns its file.
    pub(crate) fn download(&self, package: &str) -> Result<PathBuf, Error> {
        let folder = self.folder.join("packages");
        fs::create_dir_all(&folder).map_err(Error::file("cannot create", &folder))?;
        tool::run(self.apt("apt-get").current_dir(&folder).args(["download", package]))?;
        debs(&folder)?.into_iter().find(|deb| is_of(deb, package)).ok_or_else(|| Error::Content {
            subject: package.to_owned(),
            problem: "apt-get download left no file".to_owned(),
        })
    }

    /// Downloads `packages` with whatever they need that the machine lacks.
    pub(crate) fn download_closure(&self, suite: Suite, packages: &[&str]) -> Result<Vec<PathBuf>, Error> {
        tool::run(
            self.apt("apt-get")
                .args(["install", "--download-only", "--yes", "--no-install-recommends"])
                .args(["-t", suite.name()])
                // Nothing is installed, so the lock on the machine's packages is not needed.
                .arg("-oDebug::NoLocking=1")
                .args(packages),
        )?;
        let debs = debs(&self.folder.join("cache/archives"))?;
        match packages.iter().find(|package| !debs.iter().any(|deb| is_of(deb, package))) {
            None => Ok(debs),
            Some(package) => Err(Error::Content {
                subject: (*package).to_owned(),
                problem: "apt did not fetch it; it is installed here already".to_owned(),
            }),
        }
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let arch = self.arch.debian();
        command
            .env("LC_ALL", "C")
            .arg("-qq")
            .arg(option("Dir::Etc::sourcelist", &self.folder.join("sources.list")))
            .arg("-oDir::Etc::sourceparts=/dev/null")
            .arg(option("Dir::State::Lists", &self.folder.join("lists")))
            .arg(option("Dir::Cache", &self.folder.join("cache")))
            .arg(format!("-oAPT::Architecture={arch}"))
            .arg(format!("-oAPT::Architectures={arch}"))
            // apt's own user may not be able to enter the folder.
            .arg("-oAPT::Sandbox::User=root")
            .arg("-oAcquire::Retries=3")
            .arg("-oAcquire::Languages=none")
            .arg("-oAcquire::IndexTargets::deb::DEP-11::DefaultEnabled=false");
        if self.installed == Installed::Nothing {
            command.arg("-oDir::State::status=/dev/null");
        }
        command
    }
}

fn option(name: &str, path: &Path) -> String {
    // apt takes a relative path for one below its own root folder.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    format!("-o{name}={}", path.display())
}

fn debs(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(folder).map_err(Error::file("cannot list", folder))?;
    Ok(entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect())
}

fn is_of(deb: &Path, package: &str) -> bool {
    deb.file_name().and_then(|name| name.to_str()?.strip_prefix(package)).is_some_and(|rest| rest.starts_with('_'))
}

/// What apt-cache says that a package depends on, as far as it begins so.
fn dependencies<'t>(depends: &'t str, prefix: &'static str) -> impl Iterator<Item = &'t str> {
    let packages = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    packages.filter(move |package| package.starts_with(prefix))
}

/// Unpacks a package below `into`, leaving out the paths in `without`.
pub(crate) fn unpack(deb: &Path, into: &Path, without: &[&str]) -> Result<(), Error> {
    fs::create_dir_all(into).map_err(Error::file("cannot create", into))?;
    let mut reader = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .map_err(|source| Error::Start { program: "dpkg-deb".to_owned(), source })?;
    let pipe = reader.stdout.take().expect("stdout was piped");
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--no-same-owner").arg("--directory").arg(into);
    tar.args(without.iter().map(|path| format!("--exclude={path}")));
    let unpacked = tar.stdin(pipe).output().map_err(|source| Error::Start { program: "tar".to_owned(), source });
    let read = reader.wait().map_err(Error::file("cannot read", deb))?;
    let unpacked = unpacked?;
    if read.success() && unpacked.status.success() {
        return Ok(());
    }
    Err(Error::Content {
        subject: deb.display().to_string(),
        problem: format!(
            "cannot be unpacked (dpkg-deb {read}, tar {}): {}",
            unpacked.status,
            String::from_utf8_lossy(&unpacked.stderr).trim()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metapackage_names_its_kernel() {
        let answer = "linux-image-amd64\n  Depends: linux-image-6.1.0-50-amd64\n";
        assert_eq!(dependencies(answer, "linux-image-").collect::<Vec<_>>(), ["linux-image-6.1.0-50-amd64"]);
        assert_eq!(dependencies(answer, "linux-binary-").next(), None);
        assert_eq!(dependencies("linux-image-amd64\n", "linux-image-").next(), None);
    }

    #[test]
    fn a_package_is_known_by_its_file() {
        let deb = Path::new("/apt/qemu-system-x86_1%3a11.1_amd64.deb");
        assert!(is_of(deb, "qemu-system-x86"));
        assert!(!is_of(deb, "qemu-system"), "another package");
    }
}
