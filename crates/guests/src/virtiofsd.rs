//! virtiofsd, a shared folder's back-end: no translation, and not ours.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::error::Error;
use crate::{tool, unpacked};

/// A virtiofsd that runs here.
#[derive(Clone, Debug)]
pub struct Virtiofsd {
    root: PathBuf,
}

impl Virtiofsd {
    /// Debian 13's, unpacked in the cache.
    ///
    /// # Errors
    ///
    /// A download that failed, or a program that does not start here.
    pub fn unpacked(cache: &Cache<'_>) -> Result<Self, Error> {
        let found = Self { root: cache.virtiofsd()? };
        tool::run(found.command().arg("--version")).map(|_| found)
    }

    /// The command that serves `folder` on `socket`, with no more rights than whoever starts it.
    pub fn share(&self, folder: &Path, socket: &Path) -> Command {
        let mut command = self.command();
        command.arg("--shared-dir").arg(folder).arg("--socket-path").arg(socket);
        command.args(["--sandbox", "none", "--seccomp", "none", "--cache", "never"]);
        command
    }

    fn command(&self) -> Command {
        unpacked::program_at(&self.root, Path::new("usr/libexec/virtiofsd"))
    }
}
