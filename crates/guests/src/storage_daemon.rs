//! qemu-storage-daemon, the back-end that comes with QEMU: no translation, and not ours.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::backend::comma_safe;
use crate::cache::Cache;
use crate::error::Error;
use crate::packages::Suite;
use crate::{tool, unpacked};

const NAME: &str = "qemu-storage-daemon";

/// A qemu-storage-daemon that runs here.
#[derive(Clone, Debug)]
pub struct StorageDaemon {
    /// Its root folder if unpacked privately, else it is in `PATH`.
    root: Option<PathBuf>,
}

impl StorageDaemon {
    /// The one in `PATH`; whether there is one, [`version`](Self::version) shows.
    pub const IN_PATH: Self = Self { root: None };

    /// The one of `suite`, unpacked in the cache.
    ///
    /// # Errors
    ///
    /// A download that failed, or a program that does not start here.
    pub fn unpacked(cache: &Cache<'_>, suite: Suite) -> Result<Self, Error> {
        let daemon = Self { root: Some(cache.qemu_utils(suite)?) };
        daemon.version().map(|_| daemon)
    }

    /// The command that serves the raw `image` on `socket`, writable.
    pub fn export(&self, image: &Path, socket: &Path) -> Command {
        let (image, socket) = (comma_safe(image), comma_safe(socket));
        let mut command = self.command();
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={image}"))
            .arg("--export")
            .arg(format!("type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on"));
        command
    }

    /// What it says of its version, in one line.
    pub fn version(&self) -> Result<String, Error> {
        let said = tool::run(self.command().arg("--version"))?;
        Ok(said.lines().next().unwrap_or_default().trim_start_matches("qemu-storage-daemon version ").to_owned())
    }

    fn command(&self) -> Command {
        self.root.as_ref().map_or_else(|| Command::new(NAME), |root| unpacked::program(root, NAME))
    }
}
