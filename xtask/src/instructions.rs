//! How many instructions a request costs the device, and the driver, as callgrind counts them: no other program, no clock and
//! no cache changes that, so that a path which got longer shows.
//!
//! What changes it is the compiler: the bounds are wide enough for another one, and far too narrow for a lock, an
//! allocation or a system call a request.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::Workspace;
use crate::steps::{Log, Pass, StepResult, cargo};

/// What is counted, and how much it was when it was last looked at.
struct Count {
    name: &'static str,
    program: &'static Program,
    arguments: &'static [&'static str],
    expected: f64,
}

/// A program of `ringfence-cost` whose inner loop is counted.
struct Program {
    name: &'static str,
    /// The functions in which callgrind counts.
    counted: &'static str,
    /// Enough requests for what happens once not to count.
    requests: u32,
}

const DEVICE: Program = Program { name: "requests", counted: "*requests::serve*", requests: 64_000 };
const DRIVER: Program = Program { name: "drivers", counted: "*drivers::driver_*", requests: 64_000 };

const fn device(name: &'static str, arguments: &'static [&'static str], expected: f64) -> Count {
    Count { name, program: &DEVICE, arguments, expected }
}

const fn driver(name: &'static str, arguments: &'static [&'static str], expected: f64) -> Count {
    Count { name, program: &DRIVER, arguments, expected }
}

const EXPECTED: &[Count] = &[
    device("split ring, tables", &["--count", "64000", "--ring", "split"], 1635.0),
    device("split ring, no tables", &["--count", "64000", "--ring", "direct"], 1427.0),
    device("packed ring, tables", &["--count", "64000", "--ring", "packed"], 1688.0),
    device("split ring, 64 KiB in translated pages", &["--count", "64000", "--pages", "--len", "65536"], 2934.0),
    driver("driver, split ring", &["ours", "split", "direct", "batch"], 165.0),
    driver("driver, split ring, tables", &["ours", "split", "tables", "batch"], 181.0),
    driver("driver, packed ring", &["ours", "packed", "direct", "batch"], 175.0),
    driver("driver, split ring, one by one", &["ours", "split", "direct", "each"], 186.0),
    driver("driver, packed ring, one by one", &["ours", "packed", "direct", "each"], 192.0),
    driver("virtio-drivers, split ring", &["theirs", "split", "direct"], 197.0),
];

/// By how much more it may be, and by how much less until the number is to be corrected.
const TOLERANCE: f64 = 0.15;

pub(crate) fn run(workspace: &Workspace, log: &mut Log) -> StepResult {
    let there = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    if !there.is_ok_and(|status| status.success()) {
        return Ok(Pass::Skipped("there is no valgrind here; install it to count instructions".into()));
    }
    log.run(cargo(&workspace.root).args(["build", "--release", "-p", "ringfence-cost"]))?;
    let programs = workspace.target.join("release");
    let counts = workspace.target.join("xtask/callgrind.out");
    let (mut told, mut wrong) = (Vec::new(), Vec::new());
    for count @ &Count { name, expected, .. } in EXPECTED {
        let counted = count.run(&programs, &counts, log)?;
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

impl Count {
    /// The instructions of a request.
    fn run(&self, programs: &Path, counts: &Path, log: &mut Log) -> Result<f64, String> {
        let Program { name, counted, requests } = *self.program;
        let mut command = Command::new("valgrind");
        command.args(["-q", "--tool=callgrind", "--collect-atstart=no", &format!("--toggle-collect={counted}")]);
        command.arg(format!("--callgrind-out-file={}", counts.display()));
        command.arg(programs.join(name)).args(self.arguments);
        log.run(&mut command)?;
        let text = fs::read_to_string(counts).map_err(|error| format!("{}: {error}", counts.display()))?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse::<f64>().ok());
        match total {
            Some(total) if total > 0.0 => Ok(total / f64::from(requests)),
            _ => Err(format!("{}: callgrind counted nothing; was `{counted}` inlined?", counts.display())),
        }
    }
}
