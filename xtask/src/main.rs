//! Everything a contributor or CI runs.
//!
//! `cargo xtask test` is the whole; `cargo xtask guests` is the slow half of it
//! alone, one cell or many.

#![forbid(unsafe_code)]

mod arrows;
mod bit33;
mod browser;
mod cards;
mod confined;
mod copied;
mod fuzz;
mod guest_speed;
mod guests;
mod guide;
mod instructions;
mod no_std;
mod old_driver;
mod patience;
mod pc;
mod prefetch;
mod report;
mod static_program;
mod steps;
mod vfio;
mod wrapped;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

use crate::cards::Which;
use crate::fuzz::FuzzArgs;
use crate::guest_speed::SpeedArgs;
use crate::guests::GuestArgs;
use crate::steps::{Pass, Run, Steps};

/// Everything a contributor or CI runs.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Formatting, lints, no_std builds, documentation, tests, the demo, the matrix and its report, and real guests.
    ///
    /// Logs of all steps are kept in target/xtask; kernels and QEMU in target/guests.
    Test {
        /// Go on after a step that failed.
        #[arg(long)]
        keep_going: bool,
        #[command(flatten)]
        guests: GuestArgs,
    },
    /// Real Debian kernels in QEMU: `ringfence matrix --real`, by default for every platform with `ringfence serve blk`.
    Guests {
        /// Only name the cells.
        #[arg(long)]
        list: bool,
        #[command(flatten)]
        guests: GuestArgs,
    },
    /// The fence under load, for long: pages are taken away from a slow disk, stamped, and found unchanged.
    Stress {
        /// How many pages each test stamps.
        #[arg(long, default_value_t = 4_000_000)]
        pages: u64,
        /// Only the tests that have this in their name, such as any_ring.
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Hostile guests, front-ends and back-ends under libFuzzer with AddressSanitizer, for as long as asked.
    ///
    /// Inputs that lead somewhere are kept in target/fuzz/corpus. `cargo xtask test` runs the same targets on a few inputs.
    Fuzz {
        #[command(flatten)]
        fuzz: FuzzArgs,
    },
    /// The no_std crates linked into programs that have no std.
    NoStd,
    /// A kernel with a real old driver, built into target/release/ringfence-old-driver and booted once.
    OldDriver,
    /// A kernel of ours whose devices are behind a virtio-iommu, built into target/release/ringfence-confined and booted
    /// with devices of each kind.
    Confined,
    /// A user-space driver of ours in a Linux guest, with devices by way of VFIO.
    Vfio,
    /// Whole PCI functions of ours, by vfio-user, in Linux guests of three kernels: what lspci makes of them, and what becomes
    /// of them when they are plugged in, unplugged and killed under load.
    Cards {
        /// Which boots.
        #[arg(long, value_enum, default_value_t)]
        which: Which,
    },
    /// virtiofsd and passt behind `ringfence wrap`, and Linux guests behind an IOMMU that mount its folder and move bytes
    /// through its card.
    Wrapped {
        /// Which back-ends.
        #[arg(long, value_enum, default_value_t)]
        which: wrapped::Which,
    },
    /// The matrix as a page, read in a headless Chromium.
    Report {
        /// Only take a picture of the page with the stored real run, as in docs/report.png.
        #[arg(long, value_name = "FILE")]
        picture: Option<PathBuf>,
    },
    /// How many instructions a request costs, compared with what it did.
    Instructions,
    /// A guest's disk behind an emulated intel-iommu: QEMU's own virtio-blk and `ringfence serve blk`, compared.
    GuestSpeed {
        #[command(flatten)]
        speed: SpeedArgs,
    },
    /// Checks that feature bit 33 is named in the policy crate alone.
    Bit33,
}

/// The workspace, and where its builds go.
#[derive(Clone)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
    /// Whether guests get the `ringfence` that the tests have, which is there already and has its assertions, rather than
    /// the one that users have.
    pub(crate) with_assertions: bool,
}

impl Workspace {
    fn here() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the workspace").to_owned();
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |path| root.join(path));
        Self { root, target, with_assertions: false }
    }

    /// The program that guests, and whoever else, are given.
    pub(crate) fn ringfence(&self) -> PathBuf {
        self.target.join(if self.with_assertions { "debug" } else { "release" }).join("ringfence")
    }
}

fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::from(2)
        }
    }
}

/// Whether every step succeeded; an error where what was asked makes no sense.
fn perform(task: Task) -> Result<bool, String> {
    let workspace = &Workspace::here();
    Ok(match task {
        Task::Test { keep_going, guests } => {
            // A selection of nothing is worth knowing before ten minutes have passed.
            guests.cells()?;
            let workspace = &Workspace { with_assertions: true, ..workspace.clone() };
            run(workspace, keep_going, |steps| test(workspace, steps, &guests))
        }
        Task::Guests { list: true, guests } => {
            guests.cells()?.iter().for_each(|cell| println!("{cell}"));
            true
        }
        Task::Guests { list: false, guests } => {
            guests.cells()?;
            run(workspace, false, |steps| boots(workspace, steps, &guests))
        }
        Task::Stress { pages, only } => run(workspace, false, |steps| {
            let pages = pages.to_string();
            let run =
                ["test", "--release", "-p", "ringfence", "--test", "fence", "--", "--nocapture", "--test-threads=1"];
            let only = (!only.is_empty()).then_some(only.as_str());
            let arguments: Vec<_> = run.into_iter().chain(only).collect();
            steps.cargo("the fence under load", &arguments, &[("RINGFENCE_STRESS_PAGES", &pages)])
        }),
        Task::Fuzz { fuzz } => run(workspace, false, |steps| fuzz::run(workspace, steps, &fuzz)),
        Task::NoStd => run(workspace, false, |steps| steps.step("no_std builds", |log| no_std::run(workspace, log))),
        Task::OldDriver => run(workspace, false, |steps| {
            steps.step("the old driver", |log| old_driver::build(workspace, log))?;
            boots(workspace, steps, &GuestArgs::old_driver())
        }),
        Task::Confined => run(workspace, false, |steps| {
            steps.step("kernels of ours", |log| old_driver::build(workspace, log))?;
            steps.step("confined devices", |log| confined::boot(workspace, true, log))
        }),
        Task::Vfio => run(workspace, false, |steps| {
            server(steps)?;
            steps.step("the user-space driver", |log| vfio::build(workspace, log))?;
            steps.step("devices by way of VFIO", |log| vfio::boot(workspace, true, log))
        }),
        Task::Cards { which } => run(workspace, false, |steps| {
            server(steps)?;
            steps.step("whole PCI functions", |log| cards::boot(workspace, which, true, log))
        }),
        Task::Wrapped { which } => run(workspace, false, |steps| {
            server(steps)?;
            steps.step("wrapped back-ends", |log| wrapped::boot(workspace, which, true, log))
        }),
        Task::Report { picture } => run(workspace, false, |steps| {
            server(steps)?;
            match &picture {
                None => steps.step("the report in a browser", |log| report::run(workspace, log)),
                Some(path) => steps.step("a picture", |log| report::picture(workspace, log, path)),
            }
        }),
        Task::Instructions => {
            run(workspace, false, |steps| steps.step("instructions", |log| instructions::run(workspace, log)))
        }
        Task::GuestSpeed { speed } => run(workspace, false, |steps| {
            server(steps)?;
            steps.step("guest speed", |log| guest_speed::run(workspace, &speed, log))
        }),
        Task::Bit33 => run(workspace, false, |steps| steps.step("bit 33", |_| bit33::run(workspace))),
    })
}

fn run(workspace: &Workspace, keep_going: bool, steps: impl FnOnce(&Steps) -> Run) -> bool {
    let all = Steps::new(workspace, keep_going);
    // A step that stops the run has told why, and is counted.
    let _ = steps(&all);
    all.summary()
}

/// Cheap steps first: who broke the formatting need not wait for a guest to learn it.
///
/// The rest in two lanes side by side: while a crate is linked, a test sleeps or a guest with one processor boots, another
/// processor would have nothing to do. Cargo locks a target folder, so what runs beside the workspace's builds builds elsewhere.
fn test(workspace: &Workspace, steps: &Steps, guests: &GuestArgs) -> Run {
    prefetch::begin(workspace, guests);
    steps.cargo("formatting", &["fmt", "--all", "--", "--check"], &[])?;
    steps.step("bit 33 is named in policy alone", |_| bit33::run(workspace))?;
    steps.step("crates use what they may", |_| arrows::run(workspace))?;
    steps.side_by_side(|| built_apart(workspace, steps, guests), || in_the_workspace(workspace, steps))?;
    steps.side_by_side(|| small_guests(workspace, steps, guests), || boots(workspace, steps, guests))
}

/// What cargo does in the workspace's own target folder, and what takes only the server that comes of it.
fn in_the_workspace(workspace: &Workspace, steps: &Steps) -> Run {
    steps.cargo("lints", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])?;
    steps.cargo("documentation", &["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")])?;
    steps.cargo("tests", &["test", "--workspace"], &[])?;
    // Cargo has built the server for its tests.
    for name in ["demo", "matrix"] {
        steps.step(name, |log| {
            log.run(Command::new(workspace.ringfence()).arg(name).current_dir(&workspace.root))?;
            Ok(Pass::Whole(String::new()))
        })?;
    }
    steps.step("the report in a browser", |log| report::run(workspace, log))
}

/// What builds in folders of its own, and boots what came of it.
fn built_apart(workspace: &Workspace, steps: &Steps, guests: &GuestArgs) -> Run {
    steps.step("no_std builds", |log| no_std::run(workspace, log))?;
    steps.step("kernels of ours", |log| old_driver::build(workspace, log))?;
    steps.step("the user-space driver", |log| vfio::build(workspace, log))?;
    let loom = workspace.target.join("loom").display().to_string();
    steps.cargo(
        "every order of events",
        &["test", "--release", "-p", "ringfence-iotlb", "--test", "loom"],
        // Other flags in the same folder would build everything anew, twice.
        &[("RUSTFLAGS", "--cfg loom"), ("CARGO_TARGET_DIR", &loom)],
    )?;
    steps.step("instructions a request", |log| instructions::run(workspace, log))?;
    steps.step("confined devices", |log| confined::boot(workspace, guests.no_skip(), log))
}

/// Guests that come one at a time, or are few.
fn small_guests(workspace: &Workspace, steps: &Steps, guests: &GuestArgs) -> Run {
    steps.step("devices by way of VFIO", |log| vfio::boot(workspace, guests.no_skip(), log))?;
    steps.step("whole PCI functions", |log| cards::boot(workspace, Which::One, guests.no_skip(), log))?;
    steps.step("wrapped back-ends", |log| wrapped::boot(workspace, wrapped::Which::All, guests.no_skip(), log))
}

fn server(steps: &Steps) -> Run {
    steps.cargo("the server", &["build", "-p", "ringfence", "--release"], &[])
}

fn boots(workspace: &Workspace, steps: &Steps, guests: &GuestArgs) -> Run {
    if guests.needs_our_server() && !workspace.with_assertions {
        server(steps)?;
    }
    steps.step("real guests", |log| guests::run(workspace, guests, log))
}
