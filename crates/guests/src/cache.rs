//! The cache of what guests are made of: each entry appears whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use crate::error::Error;
use crate::kernel::{self, Kernel};
use crate::packages::{self, Arch, Installed, Lists, Suite};
use crate::platform::KernelSeries;
use crate::tool;

/// Parts of a Debian kernel package that no guest here needs: 250 MB of 390. Modules are in `lib`, or `usr/lib`.
const UNWANTED: &[&str] = &[
    "lib/modules/*/kernel/drivers/gpu",
    "lib/modules/*/kernel/drivers/infiniband",
    "lib/modules/*/kernel/drivers/media",
    "lib/modules/*/kernel/drivers/net/ethernet",
    "lib/modules/*/kernel/drivers/net/wireless",
    "lib/modules/*/kernel/drivers/staging",
    "lib/modules/*/kernel/sound",
    "./usr/share",
];

const QEMU: &str = "qemu";

/// Prefix of folders that are being filled; what an interrupted run left is
/// removed by the next.
const PARTIAL: &str = ".partial-";

/// A folder of kernels, busyboxes and QEMUs.
///
/// An entry that is present is used without any network. Two processes may
/// share the folder: one fetches while the other waits.
pub struct Cache<'a> {
    folder: PathBuf,
    say: &'a dyn Fn(&str),
}

impl<'a> Cache<'a> {
    /// Opens the folder, made if absent; `say` gets one line a slow step.
    pub fn open(folder: &Path, say: &'a dyn Fn(&str)) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(Error::file("cannot create", folder))?;
        Ok(Self { folder: folder.to_owned(), say })
    }

    /// The current Debian kernel of `series` for `arch`.
    pub fn kernel(&self, series: KernelSeries, arch: Arch) -> Result<Kernel, Error> {
        let name = format!("linux-{}-{}", series.name(), arch.debian());
        let folder = self.entry(&name, |cache, partial| {
            let lists = cache.lists(&partial.join("apt"), &[series.suite()], arch, Installed::Nothing)?;
            let root = partial.join("root");
            for package in lists.kernel_packages(arch.kernel_metapackage())? {
                cache.say(&format!("fetching {package} from {}", series.suite().name()));
                packages::unpack(&lists.download(&package)?, &root, UNWANTED)?;
            }
            kernel::settle(&root)?;
            kernel::inflate(&root)
        })?;
        Kernel::unpacked(&folder.join("root"))
    }

    /// Xen, in the form that QEMU starts by itself: unpacked from its package and inflated.
    pub fn xen(&self) -> Result<PathBuf, Error> {
        const IMAGE: &str = "xen";
        let folder = self.entry("xen-4.17-amd64", |cache, partial| {
            let lists = cache.lists(&partial.join("apt"), &[Suite::Bookworm], Arch::Amd64, Installed::Nothing)?;
            cache.say("fetching Xen 4.17");
            let root = partial.join("root");
            packages::unpack(&lists.download("xen-hypervisor-4.17-amd64")?, &root, &["./usr/share"])?;
            let packed = root.join("boot/xen-4.17-amd64.gz");
            let image = tool::bytes(Command::new("gzip").args(["--decompress", "--stdout"]).arg(&packed))?;
            let inflated = partial.join(IMAGE);
            fs::write(&inflated, image).map_err(Error::file("cannot write", &inflated))
        })?;
        Ok(folder.join(IMAGE))
    }

    /// The statically linked busybox for `arch`.
    pub fn busybox(&self, arch: Arch) -> Result<PathBuf, Error> {
        let folder = self.entry(&format!("busybox-{}", arch.debian()), |cache, partial| {
            let lists = cache.lists(&partial.join("apt"), &[Suite::Bookworm], arch, Installed::Nothing)?;
            cache.say(&format!("fetching busybox-static for {}", arch.debian()));
            packages::unpack(&lists.download("busybox-static")?, &partial.join("root"), &["./usr/share"])
        })?;
        let found = ["root/bin/busybox", "root/usr/bin/busybox"].map(|path| folder.join(path));
        found.iter().find(|path| path.exists()).cloned().ok_or_else(|| Error::Content {
            subject: folder.display().to_string(),
            problem: "holds no busybox; delete the folder and try again".to_owned(),
        })
    }

    /// A QEMU of `suite` for all guests, with the libraries the machine lacks.
    pub(crate) fn qemu(&self, suite: Suite) -> Result<PathBuf, Error> {
        self.programs(QEMU, suite, &[Arch::Amd64, Arch::Arm64, Arch::Ppc64el].map(Arch::qemu_package))
    }

    /// Whether that is there already.
    pub(crate) fn has_qemu(&self, suite: Suite) -> bool {
        self.folder.join(programs_entry(QEMU, suite)).exists()
    }

    /// The tools that come with the QEMU of `suite`, apart: most runs need none.
    pub(crate) fn qemu_utils(&self, suite: Suite) -> Result<PathBuf, Error> {
        self.programs("qemu-utils", suite, &["qemu-utils"])
    }

    /// virtiofsd of Debian 13: Debian 12 has an older one, which another package brings.
    pub(crate) fn virtiofsd(&self) -> Result<PathBuf, Error> {
        self.programs("virtiofsd", Suite::Trixie, &["virtiofsd"])
    }

    /// passt of Debian 13: Debian 12's does not speak vhost-user.
    pub(crate) fn passt(&self) -> Result<PathBuf, Error> {
        self.programs("passt", Suite::Trixie, &["passt"])
    }

    /// lspci, and the names of what it lists.
    pub(crate) fn pciutils(&self) -> Result<PathBuf, Error> {
        self.programs("pciutils", Suite::Bookworm, &["pciutils"])
    }

    /// A root folder with `packages` of `suite` and what they need.
    fn programs(&self, name: &str, suite: Suite, packages: &[&str]) -> Result<PathBuf, Error> {
        let folder = self.entry(&programs_entry(name, suite), |cache, partial| {
            let fetch = |installed| {
                let apt = partial.join("apt");
                cache.lists(&apt, suite.with_its_base(), Arch::Amd64, installed)?.download_closure(suite, packages)
            };
            cache.say(&format!("fetching {name} from {}", suite.name()));
            // What the machine has can contradict this suite, or be just this. Nothing is installed,
            // so that matters only to apt: ask again as if the machine were empty.
            let debs = fetch(suite.runs_beside()).or_else(|_| fetch(Installed::Nothing))?;
            debs.iter().try_for_each(|deb| {
                packages::unpack(deb, &partial.join("root"), &["./usr/share/doc", "./usr/share/man"])
            })
        })?;
        Ok(folder.join("root"))
    }

    /// A folder below the cache for lists or scratch that outlive no run.
    pub(crate) fn scratch(&self) -> Result<tempfile::TempDir, Error> {
        tempfile::Builder::new()
            .prefix(PARTIAL)
            .tempdir_in(&self.folder)
            .map_err(Error::file("cannot create a folder in", &self.folder))
    }

    pub(crate) fn say(&self, line: &str) {
        (self.say)(line);
    }

    fn lists(&self, folder: &Path, suites: &[Suite], arch: Arch, installed: Installed) -> Result<Lists, Error> {
        Lists::update(folder, suites, arch, installed)
    }

    /// The folder of entry `name`, filled by `fill` if it is not there.
    fn entry(&self, name: &str, fill: impl FnOnce(&Self, &Path) -> Result<(), Error>) -> Result<PathBuf, Error> {
        let folder = self.folder.join(name);
        if folder.exists() {
            return Ok(folder);
        }
        let _lock = self.lock()?;
        if folder.exists() {
            return Ok(folder);
        }
        self.sweep();
        let partial = self.scratch()?;
        fill(self, partial.path())?;
        let apt = partial.path().join("apt");
        fs::remove_dir_all(&apt).map_err(Error::file("cannot remove", &apt))?;
        fs::rename(partial.keep(), &folder).map_err(Error::file("cannot create", &folder))?;
        Ok(folder)
    }

    /// Held for as long as the file is open.
    pub(crate) fn lock(&self) -> Result<File, Error> {
        let path = self.folder.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o666)
            .open(&path)
            .map_err(Error::file("cannot open", &path))?;
        flock(&file, FlockOperation::LockExclusive).map_err(|errno| Error::file("cannot lock", &path)(errno.into()))?;
        Ok(file)
    }

    /// Removes what interrupted runs left; called with the lock held.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
                // A leftover costs space alone, so a failure here is no error.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// The entry of a program's packages.
fn programs_entry(name: &str, suite: Suite) -> String {
    format!("{name}-{}", suite.name())
}

/// A temporary folder, removed when it is dropped.
pub fn scratch() -> Result<tempfile::TempDir, Error> {
    tempfile::tempdir().map_err(Error::file("cannot create a folder in", &std::env::temp_dir()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), &|_| ()).unwrap();
        let fill = |_: &Cache, partial: &Path| {
            fs::create_dir(partial.join("apt")).unwrap();
            fs::write(partial.join("file"), "half").unwrap();
            Err(Error::Content { subject: "x".into(), problem: "y".into() })
        };
        assert!(cache.entry("one", fill).is_err());
        assert!(!folder.path().join("one").exists());

        let fill = |_: &Cache, partial: &Path| {
            fs::create_dir(partial.join("apt")).unwrap();
            fs::write(partial.join("file"), "whole").unwrap();
            Ok(())
        };
        let entry = cache.entry("one", fill).unwrap();
        assert_eq!(fs::read_to_string(entry.join("file")).unwrap(), "whole");
        assert!(!entry.join("apt").exists(), "package files do not stay");
        assert_eq!(cache.entry("one", |_, _| panic!("is cached")).unwrap(), entry);
    }

    #[test]
    fn an_interrupted_run_leaves_nothing_for_long() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(".partial-old")).unwrap();
        let cache = Cache::open(folder.path(), &|_| ()).unwrap();
        let fill = |_: &Cache, partial: &Path| fs::create_dir(partial.join("apt")).map_err(Error::file("", partial));
        cache.entry("one", fill).unwrap();
        assert!(!folder.path().join(".partial-old").exists());
    }
}
