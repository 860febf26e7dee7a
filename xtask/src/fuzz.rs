//! The targets of `ringfence-fuzz` under libFuzzer with AddressSanitizer, one after the other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::Workspace;
use crate::steps::{Log, Pass, Run, StepResult, Steps, cargo};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What makes a build one that tells libFuzzer where it has been, and AddressSanitizer what it touches.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Zsanitizer=address",
    "-Ccodegen-units=1",
];

/// What to fuzz, and for how long.
#[derive(Args, Clone)]
pub(crate) struct FuzzArgs {
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The target; without one, each in turn.
    #[arg(value_parser = ringfence_fuzz::TARGETS.iter().map(|(name, _)| *name).collect::<Vec<_>>())]
    target: Option<String>,
}

/// Builds the fuzzer and runs what was asked for.
pub(crate) fn run(workspace: &Workspace, steps: &Steps, args: &FuzzArgs) -> Run {
    steps.step("the fuzzer", |log| build(workspace, log))?;
    for (name, _) in ringfence_fuzz::TARGETS {
        if args.target.as_ref().is_none_or(|target| target == name) {
            steps.step(&format!("fuzz {name}"), |log| fuzz(workspace, name, args.seconds, log))?;
        }
    }
    Run::Continue(())
}

fn folder(workspace: &Workspace) -> PathBuf {
    workspace.target.join("fuzz")
}

fn build(workspace: &Workspace, log: &mut Log) -> StepResult {
    let mut command = cargo(&workspace.root.join("fuzz"));
    command
        .args(["build", "--release", "--target", TARGET])
        .env("CARGO_TARGET_DIR", folder(workspace))
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"))
        // Sanitizers are for nightly compilers, and for whoever says that he knows: in this build alone.
        .env("RUSTC_BOOTSTRAP", "1");
    log.run(&mut command).map_err(|error| format!("{error}; it takes a C++ compiler (package g++)"))?;
    Ok(Pass::Whole(String::new()))
}

fn fuzz(workspace: &Workspace, name: &str, seconds: u64, log: &mut Log) -> StepResult {
    let folder = folder(workspace);
    let (corpus, findings) = (folder.join("corpus").join(name), folder.join("findings"));
    for made in [&corpus, &findings] {
        fs::create_dir_all(made).map_err(|error| format!("{}: {error}", made.display()))?;
    }
    let program = folder.join(TARGET).join("release/ringfence-fuzzer");
    let mut command = Command::new(program);
    command
        .env("RINGFENCE_FUZZ_TARGET", name)
        .arg(&corpus)
        .args(kept(workspace, name))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/{name}-", findings.display()))
        // Threads that end with their process are no leak.
        .args(["-timeout=20", "-rss_limit_mb=2048", "-detect_leaks=0", "-print_final_stats=1"]);
    // libFuzzer says all it says on standard error.
    log.run(&mut command).map_err(|error| format!("{error}; inputs that found something: {}", findings.display()))?;
    let said = log.since(0);
    let runs = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    Ok(Pass::Whole(format!("{} inputs", runs.unwrap_or("?").trim())))
}

/// Inputs in the tree.
fn kept(workspace: &Workspace, name: &str) -> Option<PathBuf> {
    let folder = workspace.root.join(Path::new("crates/fuzz/kept")).join(name);
    folder.is_dir().then_some(folder)
}
