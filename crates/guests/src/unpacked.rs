//! Programs of Debian packages that were unpacked into a folder, and not installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::tool;

/// Where libraries lie below a root folder; in `lib` before Debian 13.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// The dynamic loader. The link to it in `lib64` can be absolute, and then means the machine's.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// A program that is not QEMU's, below the root folder of its packages.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) root: PathBuf,
    path: &'static str,
}

impl Program {
    /// The one at `path` below `root`, which tells its version here.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub(crate) fn found(root: PathBuf, path: &'static str) -> Result<Self, Error> {
        let found = Self { root, path };
        tool::run(found.command().arg("--version")).map(|_| found)
    }

    /// The command that starts it.
    pub(crate) fn command(&self) -> Command {
        program_at(&self.root, Path::new(self.path))
    }
}

/// The command that starts `name` of QEMU's packages below `root`.
pub(crate) fn program(root: &Path, name: &str) -> Command {
    let mut command = program_at(root, &Path::new("usr/bin").join(name));
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    command.env("QEMU_MODULE_DIR", root.join(LIBRARIES[0]).join("qemu"));
    command
}

/// The command that starts the program at `path` below `root`.
///
/// Where a libc was unpacked too, its own loader starts the program: the
/// machine's loader with another libc crashes, and so does every child that
/// inherits `LD_LIBRARY_PATH`.
fn program_at(root: &Path, path: &Path) -> Command {
    // A program may be started in another folder.
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let program = root.join(path);
    let libraries = LIBRARIES.map(|path| root.join(path).display().to_string()).join(":");
    match loader(&root) {
        Some(loader) => {
            let mut command = Command::new(loader);
            command.arg("--library-path").arg(libraries).arg(program);
            command
        }
        None => {
            let mut command = Command::new(program);
            command.env("LD_LIBRARY_PATH", libraries);
            command
        }
    }
}

fn loader(root: &Path) -> Option<PathBuf> {
    LIBRARIES.iter().map(|path| root.join(path).join(LOADER)).find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_libc_of_its_own_is_used_by_its_own_loader() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let bare = program(root, "qemu-img");
        assert_eq!(bare.get_program(), root.join("usr/bin/qemu-img"));
        assert!(bare.get_envs().any(|(name, _)| name == "LD_LIBRARY_PATH"));

        let loader = root.join(LIBRARIES[0]).join(LOADER);
        fs::create_dir_all(root.join(LIBRARIES[0])).unwrap();
        fs::write(&loader, "").unwrap();
        let loaded = program(root, "qemu-img");
        assert_eq!(loaded.get_program(), loader);
        assert_eq!(loaded.get_args().last().unwrap(), root.join("usr/bin/qemu-img"));
        assert!(!loaded.get_envs().any(|(name, _)| name == "LD_LIBRARY_PATH"), "children would inherit it");
    }
}
