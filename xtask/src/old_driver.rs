//! The old driver: a kernel by itself, built apart from the workspace. The real matrix boots it.

use std::fs;
use std::path::PathBuf;

use crate::Workspace;
use crate::confined;
use crate::guide;
use crate::steps::{Log, Pass, StepResult, cargo};

/// The program, and its file beside `ringfence` itself.
const NAME: &str = "ringfence-old-driver";

/// Where a finished program without an operating system lies: where `ringfence` looks for it.
pub(crate) fn program(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.ringfence().with_file_name(name)
}

/// Checks and builds all of them.
pub(crate) fn build(workspace: &Workspace, log: &mut Log) -> StepResult {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Ok(Pass::Skipped("it is built with the host's own tools, and those are not x86-64's".to_owned()));
    }
    let folder = workspace.root.join("crates/bare-metal");
    let target = workspace.target.join("bare-metal");
    let mut run = |arguments: &[&str]| {
        let mut command = cargo(&folder);
        // It runs on QEMU's processor: flags for the host's are none of its business.
        command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
        log.run(command.args(arguments).env("CARGO_TARGET_DIR", &target))
    };
    run(&["fmt", "--", "--check"])?;
    run(&["clippy", "--release", "--locked", "--", "-D", "warnings"])?;
    run(&["build", "--release", "--locked"])?;
    for name in [NAME, confined::NAME, guide::NAME] {
        let to = program(workspace, name);
        let at = |error| format!("{}: {error}", to.display());
        fs::create_dir_all(to.parent().expect("a program is in a folder")).map_err(at)?;
        fs::copy(target.join("release").join(name), &to).map_err(at)?;
    }
    Ok(Pass::Whole(program(workspace, NAME).display().to_string()))
}
