//! Programs for guests that have nothing else: static, built by the host's own tools.

use std::path::PathBuf;

use crate::Workspace;
use crate::steps::{Log, cargo};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where [`build`] builds nothing.
pub(crate) const WHY_NOT: &str = "it is built with the host's own tools, and those are not x86-64's";

/// Builds the program `name` of `package`; `None` where that can't be.
pub(crate) fn build(
    workspace: &Workspace,
    package: &str,
    name: &str,
    log: &mut Log,
) -> Result<Option<PathBuf>, String> {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu")) {
        return Ok(None);
    }
    let mut command = cargo(&workspace.root);
    command
        .args(["build", "--release", "--locked", "-p", package, "--bin", name])
        // With a target named, the flags are not for build scripts and macros.
        .args(["--target", TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_TARGET_DIR", workspace.target.join("static"));
    log.run(&mut command)?;
    Ok(Some(path(workspace, name)))
}

/// Where it is, once it is built.
pub(crate) fn path(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.target.join("static").join(TARGET).join("release").join(name)
}
