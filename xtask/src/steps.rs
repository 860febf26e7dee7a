//! A run of steps: one heading and one time each, a log each, a summary. Two lanes of them may run side by side.

use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use crate::Workspace;

/// Whether the steps go on.
pub(crate) type Run = ControlFlow<()>;

/// How many lines of a failed step's log are shown.
const SHOWN: usize = 60;

/// How a step ended.
const OK: &str = "ok";
const SKIPPED: &str = "SKIPPED";
const FAILED: &str = "FAILED";

/// How a step ended, or why it failed.
pub(crate) type StepResult = Result<Pass, String>;

/// A step that did not fail, with what it has to say.
pub(crate) enum Pass {
    /// It did all it is for.
    Whole(String),
    /// It could not do what it is for, and said so.
    Skipped(String),
}

/// Where a step writes what only a failure needs.
pub(crate) struct Log {
    file: File,
    pub(crate) path: PathBuf,
}

impl Log {
    pub(crate) fn line(&mut self, line: impl fmt::Display) {
        // The log is a help: a full disk must not turn a good step into a bad one.
        let _ = writeln!(self.file, "{line}");
    }

    /// How many bytes it holds.
    pub(crate) fn length(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }

    /// What was written after its first `length` bytes.
    pub(crate) fn since(&self, length: u64) -> String {
        let bytes = fs::read(&self.path).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(length as usize..).unwrap_or_default()).into_owned()
    }

    /// Runs `command` with its output in the log; an error names its status.
    pub(crate) fn run(&mut self, command: &mut Command) -> Result<(), String> {
        let errors = self.handle()?;
        self.run_aloud(command.stderr(errors))
    }

    /// The same, with what it writes to standard error where the command has it, by default on the terminal.
    pub(crate) fn run_aloud(&mut self, command: &mut Command) -> Result<(), String> {
        let program = command.get_program().to_string_lossy().into_owned();
        let status = command
            .stdin(Stdio::null())
            .stdout(self.handle()?)
            .status()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("{program}: {status}")) }
    }

    fn handle(&self) -> Result<File, String> {
        self.file.try_clone().map_err(|error| format!("{}: {error}", self.path.display()))
    }
}

/// A step that has begun.
struct Begun {
    name: String,
    /// Its time, and how it ended, once it has.
    end: Option<(Duration, &'static str)>,
}

/// The steps so far.
pub(crate) struct Steps {
    root: PathBuf,
    logs: PathBuf,
    keep_going: bool,
    started: Instant,
    begun: Mutex<Vec<Begun>>,
}

impl Steps {
    pub(crate) fn new(workspace: &Workspace, keep_going: bool) -> Self {
        let (root, logs) = (workspace.root.clone(), workspace.target.join("xtask"));
        Self { root, logs, keep_going, started: Instant::now(), begun: Mutex::default() }
    }

    /// Runs two lanes of steps side by side, and waits for both. Where a step stops the run, the other lane's step comes to its
    /// end, and begins no other.
    pub(crate) fn side_by_side(&self, one: impl FnOnce() -> Run + Send, other: impl FnOnce() -> Run) -> Run {
        thread::scope(|scope| {
            let one = scope.spawn(one);
            let other = other();
            let one = one.join().unwrap_or_else(|reason| panic::resume_unwind(reason));
            if one.is_break() { one } else { other }
        })
    }

    /// Runs cargo as a step.
    pub(crate) fn cargo(&self, name: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Run {
        let mut command = cargo(&self.root);
        command.args(arguments).envs(environment.iter().copied());
        self.step(name, |log| {
            log.run(&mut command)?;
            Ok(Pass::Whole(tests_in(&log.path).map_or_else(String::new, |count| format!("{count} passed"))))
        })
    }

    /// Runs one step, and tells its name, time and end.
    pub(crate) fn step(&self, name: &str, work: impl FnOnce(&mut Log) -> StepResult) -> Run {
        let Some(place) = self.begin(name) else { return Run::Break(()) };
        let started = Instant::now();
        let path = self.logs.join(format!("{}.log", name.replace(' ', "-")));
        let result = open(&path).and_then(|mut log| work(&mut log));
        let time = started.elapsed();
        // Each is said at once: another step may have something to say, too.
        let word = match &result {
            Ok(Pass::Whole(told)) => {
                let told = if told.is_empty() { String::new() } else { format!(": {told}") };
                say(&format!("    ok, {}: {name}{told}", Seconds(time)));
                OK
            }
            Ok(Pass::Skipped(told)) => {
                say(&format!("    SKIPPED: {name}: {told}"));
                SKIPPED
            }
            Err(reason) => {
                let failed = format!("    FAILED, {}: step '{name}': {reason}", Seconds(time));
                say(&format!("{}\n{failed}\n    log: {}", shown(&path), path.display()));
                FAILED
            }
        };
        self.begun()[place].end = Some((time, word));
        if result.is_err() && !self.keep_going { Run::Break(()) } else { Run::Continue(()) }
    }

    /// Tells that a step begins, and where it is among all; not where another one has stopped the run.
    fn begin(&self, name: &str) -> Option<usize> {
        let mut begun = self.begun();
        let failed = begun.iter().any(|step| step.end.is_some_and(|(_, word)| word == FAILED));
        if failed && !self.keep_going {
            return None;
        }
        begun.push(Begun { name: name.to_owned(), end: None });
        say(&format!("==> {}. {name}", begun.len()));
        Some(begun.len() - 1)
    }

    fn begun(&self) -> MutexGuard<'_, Vec<Begun>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prints what became of each step; true if none failed.
    pub(crate) fn summary(&self) -> bool {
        let begun = self.begun();
        let ended = || begun.iter().filter_map(|step| step.end.map(|(time, word)| (&*step.name, time, word)));
        say("");
        for (name, time, word) in ended() {
            say(&format!("{word:>9}  {:>9}  {name}", Seconds(time).to_string()));
        }
        let those = |wanted: &str| {
            let names: Vec<_> = ended().filter(|(_, _, word)| *word == wanted).map(|(name, ..)| name).collect();
            names.join(", ")
        };
        let (failed, skipped) = (those(FAILED), those(SKIPPED));
        let total = Seconds(self.started.elapsed());
        if !failed.is_empty() {
            say(&format!("Failed after {total}: {failed}. Logs: {}", self.logs.display()));
        } else if !skipped.is_empty() {
            say(&format!("Nothing failed in {total}, but SKIPPED, so not tested: {skipped}."));
        } else {
            say(&format!("Every step succeeded in {total}."));
        }
        failed.is_empty()
    }
}

/// The cargo that runs us, in the workspace.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    // What `cargo run` sets for us describes xtask, not what we build.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_NAME", "CARGO_PKG_VERSION"] {
        command.env_remove(name);
    }
    command
}

/// Prints a line now, also where output goes to a file.
pub(crate) fn say(line: &str) {
    println!("{line}");
    // Nobody reads it any more if this fails; the exit status still tells.
    let _ = std::io::stdout().flush();
}

/// A time as a person reads it.
pub(crate) struct Seconds(pub(crate) Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        if seconds < 99.95 {
            return write!(f, "{seconds:.1} s");
        }
        let whole = self.0.as_secs();
        write!(f, "{} min {:02} s", whole / 60, whole % 60)
    }
}

fn open(path: &Path) -> Result<Log, String> {
    let at = |error| format!("{}: {error}", path.display());
    fs::create_dir_all(path.parent().expect("a log is in a folder")).map_err(at)?;
    Ok(Log { file: File::create(path).map_err(at)?, path: path.to_owned() })
}

fn shown(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN)..].iter().map(|line| format!("    | {line}")).collect::<Vec<_>>().join("\n")
}

/// The sum of cargo's `test result:` lines, if there are any.
fn tests_in(log: &Path) -> Option<u32> {
    let text = fs::read_to_string(log).ok()?;
    let counts = text.lines().filter_map(|line| {
        let rest = line.strip_prefix("test result: ok. ")?;
        rest.split_once(" passed")?.0.parse::<u32>().ok()
    });
    counts.reduce(|sum, count| sum + count)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn times_read_well() {
        assert_eq!(Seconds(Duration::from_millis(1_250)).to_string(), "1.2 s");
        assert_eq!(Seconds(Duration::from_millis(99_990)).to_string(), "1 min 39 s");
        assert_eq!(Seconds(Duration::from_secs(725)).to_string(), "12 min 05 s");
    }

    fn in_a_folder() -> (tempfile::TempDir, Workspace) {
        let folder = tempfile::tempdir().unwrap();
        let workspace =
            Workspace { root: folder.path().to_owned(), target: folder.path().to_owned(), with_assertions: false };
        (folder, workspace)
    }

    const GOOD: fn(&mut Log) -> StepResult = |_| Ok(Pass::Whole(String::new()));
    const BAD: fn(&mut Log) -> StepResult = |_| Err("why".to_owned());

    #[test]
    fn a_failed_step_stops_the_run_unless_told() {
        let (folder, workspace) = in_a_folder();
        for (keep_going, expected) in [(false, Run::Break(())), (true, Run::Continue(()))] {
            let steps = Steps::new(&workspace, keep_going);
            assert_eq!(steps.step("good one", GOOD), Run::Continue(()));
            assert_eq!(steps.step("bad one", BAD), expected);
            assert!(!steps.summary());
            assert!(folder.path().join("xtask/bad-one.log").exists());
        }
    }

    #[test]
    fn a_failed_step_stops_the_lane_beside_it_unless_told() {
        let (_folder, workspace) = in_a_folder();
        for (keep_going, expected) in [(false, Run::Break(())), (true, Run::Continue(()))] {
            let (steps, both) = (&Steps::new(&workspace, keep_going), &Barrier::new(2));
            // Both have begun before the one fails, and the other ends after that.
            let bad = || {
                let run = steps.step("bad one", |log| {
                    both.wait();
                    BAD(log)
                });
                both.wait();
                run
            };
            let beside = || {
                steps.step("good one", |log| {
                    both.wait();
                    both.wait();
                    GOOD(log)
                })?;
                steps.step("next one", GOOD)
            };
            assert_eq!(steps.side_by_side(bad, beside), expected);
            assert!(!steps.summary());
            let begun = steps.begun();
            assert!(begun.iter().all(|step| step.end.is_some()), "both lanes came to their ends");
            assert_eq!(begun.iter().any(|step| step.name == "next one"), keep_going);
        }
    }

    #[test]
    fn lanes_run_at_the_same_time() {
        let (_folder, workspace) = in_a_folder();
        let (steps, both) = (&Steps::new(&workspace, false), &Barrier::new(2));
        let lane = |name: &'static str| {
            move || {
                steps.step(name, |log| {
                    both.wait();
                    GOOD(log)
                })
            }
        };
        assert_eq!(steps.side_by_side(lane("one"), lane("other")), Run::Continue(()));
        assert!(steps.summary());
    }

    #[test]
    fn test_results_add_up() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "test result: ok. 3 passed; 0 failed\nx\ntest result: ok. 4 passed; 0 failed\n")
            .unwrap();
        assert_eq!(tests_in(file.path()), Some(7));
        fs::write(file.path(), "Finished\n").unwrap();
        assert_eq!(tests_in(file.path()), None);
    }
}
