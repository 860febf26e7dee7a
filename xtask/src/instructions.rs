//! How many instructions a request costs the device, as callgrind counts them: no other program, no clock and no cache
//! changes that, so that a path which got longer shows.
//!
//! What changes it is the compiler: the bounds are wide enough for another one, and far too narrow for a lock, an
//! allocation or a system call a request.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::Workspace;
use crate::steps::{Log, Pass, StepResult};

/// What is counted, and how much it was when it was last looked at.
const EXPECTED: &[(&str, &[&str], f64)] = &[
    ("split ring, tables", &["--ring", "split"], 1658.0),
    ("split ring, no tables", &["--ring", "direct"], 1425.0),
    ("packed ring, tables", &["--ring", "packed"], 1709.0),
    ("split ring, 64 KiB in translated pages", &["--pages", "--len", "65536"], 3320.0),
];

/// By how much more it may be, and by how much less until the number is to be corrected.
const TOLERANCE: f64 = 0.15;

/// Enough for what happens once not to count.
const REQUESTS: u32 = 64_000;

pub(crate) fn run(workspace: &Workspace, log: &mut Log) -> StepResult {
    let there = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    if !there.is_ok_and(|status| status.success()) {
        return Ok(Pass::Skipped("there is no valgrind here; install it to count instructions".into()));
    }
    let build = ["build", "--release", "-p", "ringfence-vhost-user", "--example", "requests"];
    log.run(Command::new(env!("CARGO")).args(build).current_dir(&workspace.root))?;
    let program = workspace.target.join("release/examples/requests");
    let counts = workspace.target.join("xtask/callgrind.out");
    let (mut told, mut wrong) = (Vec::new(), Vec::new());
    for &(name, arguments, expected) in EXPECTED {
        let counted = count(&program, arguments, &counts, log)?;
        log.line(format_args!("{name}: {counted:.0} instructions a request, {expected:.0} expected"));
        if (counted / expected - 1.0).abs() > TOLERANCE {
            wrong.push(format!("{name}: {counted:.0} instructions a request instead of {expected:.0}"));
        }
        told.push(format!("{counted:.0}"));
    }
    match wrong.is_empty() {
        true => Ok(Pass::Whole(format!("{} a request", told.join(", ")))),
        false => Err(format!(
            "{}. If that is as it should be, write the new number into xtask/src/instructions.rs",
            wrong.join("; ")
        )),
    }
}

/// The instructions of a request in the device's half of `requests`.
fn count(program: &Path, arguments: &[&str], counts: &Path, log: &mut Log) -> Result<f64, String> {
    let mut command = Command::new("valgrind");
    command.args(["-q", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*requests::serve*"]);
    command.arg(format!("--callgrind-out-file={}", counts.display()));
    command.arg(program).args(["--count", &REQUESTS.to_string()]).args(arguments);
    log.run(&mut command)?;
    let text = fs::read_to_string(counts).map_err(|error| format!("{}: {error}", counts.display()))?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse::<f64>().ok());
    match total {
        Some(total) if total > 0.0 => Ok(total / f64::from(REQUESTS)),
        _ => Err(format!("{}: callgrind counted nothing; was `serve` inlined?", counts.display())),
    }
}
