//! Invariant 6: `policy`, `dma`, `ring`, `driver` (and `iommu`) build without std.
//!
//! Only the host's target may be installed, and there std is always at hand: a
//! crate that quietly uses it still builds. So each crate is put into a library
//! that has its own panic handler. Whatever pulls std in, however far down,
//! brings a second one, and rustc refuses.

use std::fs;
use std::path::Path;

use crate::Workspace;
use crate::steps::{Log, Pass, StepResult, cargo};

const CRATES: &[&str] = &["policy", "dma", "ring", "iommu", "driver", "hal"];

/// A crate that uses std, to show at each run that the proof would notice.
const CONTROL: &str = "control";

/// A library with nothing below it but core and alloc.
const PROOF: &str = r#"//! Generated. Links one crate and no std.
#![no_std]

extern crate alloc;
extern crate NAME as _;

struct Nowhere;

// SAFETY: an allocator may always say no.
unsafe impl core::alloc::GlobalAlloc for Nowhere {
    unsafe fn alloc(&self, _: core::alloc::Layout) -> *mut u8 {
        core::ptr::null_mut()
    }

    unsafe fn dealloc(&self, _: *mut u8, _: core::alloc::Layout) {}
}

#[global_allocator]
static NOWHERE: Nowhere = Nowhere;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
"#;

/// Builds a proof for each crate, and shows that a crate with std has none.
pub(crate) fn run(workspace: &Workspace, log: &mut Log) -> StepResult {
    let folder = workspace.target.join("no-std");
    generate(workspace, &folder)?;
    for name in CRATES {
        prove(&folder, name, log).map_err(|error| {
            format!(
                "ringfence-{name} does not build without std ({error}); \
                 E0152 in the log means that it, or something it uses, needs std"
            )
        })?;
    }
    log.line("The next build must fail with E0152: its crate uses std.");
    let before = log.length();
    if prove(&folder, CONTROL, log).is_ok() || !log.since(before).contains("E0152") {
        return Err("a crate that uses std was not noticed, so the proofs above show nothing".to_owned());
    }
    Ok(Pass::Whole(CRATES.join(", ")))
}

/// Writes a workspace with a proof for each crate.
fn generate(workspace: &Workspace, folder: &Path) -> Result<(), String> {
    let members: Vec<_> = CRATES.iter().chain([&CONTROL]).map(|name| format!("proof-{name}")).collect();
    let profile = "[profile.dev]\npanic = \"abort\"\ndebug = false\n";
    write(
        &folder.join("Cargo.toml"),
        &format!("[workspace]\nresolver = \"3\"\nmembers = {members:?}\nexclude = [{CONTROL:?}]\n\n{profile}"),
    )?;
    // The same versions as everywhere else; without it cargo would choose anew.
    let lock = workspace.root.join("Cargo.lock");
    fs::copy(&lock, folder.join("Cargo.lock")).map_err(|error| format!("{}: {error}", lock.display()))?;
    for name in CRATES {
        proof(folder, name, &format!("ringfence-{name}"), &workspace.root.join("crates").join(name))?;
    }
    let control = folder.join(CONTROL);
    write(&control.join("Cargo.toml"), &package(CONTROL, ""))?;
    write(&control.join("src/lib.rs"), "//! Generated. Uses std.\npub use std::time::Instant;\n")?;
    proof(folder, CONTROL, CONTROL, &control)
}

/// The proof of the crate `dependency` at `path`.
fn proof(folder: &Path, name: &str, dependency: &str, path: &Path) -> Result<(), String> {
    let folder = folder.join(format!("proof-{name}"));
    let path = path.display().to_string();
    let rest = format!(
        "[lib]\ncrate-type = [\"staticlib\"]\n\n\
         [dependencies]\n{dependency} = {{ path = {path:?}, default-features = false }}\n"
    );
    write(&folder.join("Cargo.toml"), &package(&format!("proof-{name}"), &rest))?;
    write(&folder.join("src/lib.rs"), &PROOF.replace("NAME", &dependency.replace('-', "_")))
}

/// Builds one proof alone: built together, the features of one would reach the others.
fn prove(folder: &Path, name: &str, log: &mut Log) -> Result<(), String> {
    let mut build = cargo(folder);
    build.args(["build", "--package", &format!("proof-{name}")]);
    log.run(build.env("CARGO_TARGET_DIR", folder.join("target")))
}

fn package(name: &str, rest: &str) -> String {
    format!("[package]\nname = \"{name}\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n{rest}")
}

/// Writes a file only if it differs, so that an unchanged proof is not built again.
fn write(path: &Path, text: &str) -> Result<(), String> {
    let at = |error| format!("{}: {error}", path.display());
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    fs::create_dir_all(path.parent().expect("a file is in a folder")).map_err(at)?;
    fs::write(path, text).map_err(at)
}
