//! virtiofsd, a shared folder's back-end: no translation, and not ours.

use std::path::Path;
use std::process::Command;

use crate::cache::Cache;
use crate::error::Error;
use crate::unpacked::Program;

/// A virtiofsd that runs here.
#[derive(Clone, Debug)]
pub struct Virtiofsd(Program);

impl Virtiofsd {
    /// Debian 13's, unpacked in the cache.
    ///
    /// # Errors
    ///
    /// A download that failed, or a program that does not start here.
    pub fn unpacked(cache: &Cache<'_>) -> Result<Self, Error> {
        Program::found(cache.virtiofsd()?, "usr/libexec/virtiofsd").map(Self)
    }

    /// The command that serves `folder` on `socket`, with no more rights than whoever starts it.
    pub fn share(&self, folder: &Path, socket: &Path) -> Command {
        let mut command = self.0.command();
        command.arg("--shared-dir").arg(folder).arg("--socket-path").arg(socket);
        command.args(["--sandbox", "none", "--seccomp", "none", "--cache", "never"]);
        command
    }
}
