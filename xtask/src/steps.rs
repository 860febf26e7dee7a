//! A run of steps: one heading and one time each, a log each, a summary.

use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Workspace;

/// Whether the steps go on.
pub(crate) type Run = ControlFlow<()>;

/// How many lines of a failed step's log are shown.
const SHOWN: usize = 60;

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

struct Done {
    name: String,
    time: Duration,
    word: &'static str,
}

/// The steps so far.
pub(crate) struct Steps {
    root: PathBuf,
    logs: PathBuf,
    keep_going: bool,
    started: Instant,
    done: Vec<Done>,
}

impl Steps {
    pub(crate) fn new(workspace: &Workspace, keep_going: bool) -> Self {
        let logs = workspace.target.join("xtask");
        Self { root: workspace.root.clone(), logs, keep_going, started: Instant::now(), done: Vec::new() }
    }

    /// Runs cargo as a step.
    pub(crate) fn cargo(&mut self, name: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Run {
        let mut command = cargo(&self.root);
        command.args(arguments).envs(environment.iter().copied());
        self.step(name, |log| {
            log.run(&mut command)?;
            Ok(Pass::Whole(tests_in(&log.path).map_or_else(String::new, |count| format!("{count} passed"))))
        })
    }

    /// Runs one step, and tells its name, time and end.
    pub(crate) fn step(&mut self, name: &str, work: impl FnOnce(&mut Log) -> StepResult) -> Run {
        let number = self.done.len() + 1;
        say(&format!("==> {number}. {name}"));
        let started = Instant::now();
        let path = self.logs.join(format!("{number:02}-{}.log", name.replace(' ', "-")));
        let result = open(&path).and_then(|mut log| work(&mut log));
        let time = started.elapsed();
        let word = match &result {
            Ok(Pass::Whole(told)) => {
                let told = if told.is_empty() { String::new() } else { format!(": {told}") };
                say(&format!("    ok, {}{told}", Seconds(time)));
                "ok"
            }
            Ok(Pass::Skipped(told)) => {
                say(&format!("    SKIPPED: {told}"));
                "SKIPPED"
            }
            Err(reason) => {
                say(&shown(&path));
                say(&format!("    FAILED, {}: step '{name}': {reason}", Seconds(time)));
                say(&format!("    log: {}", path.display()));
                "FAILED"
            }
        };
        self.done.push(Done { name: name.to_owned(), time, word });
        if result.is_err() && !self.keep_going { Run::Break(()) } else { Run::Continue(()) }
    }

    /// Prints what became of each step; true if none failed.
    pub(crate) fn summary(&self) -> bool {
        say("");
        for Done { name, time, word } in &self.done {
            say(&format!("{word:>9}  {:>9}  {name}", Seconds(*time).to_string()));
        }
        let those = |wanted: &str| {
            let names: Vec<_> =
                self.done.iter().filter(|step| step.word == wanted).map(|step| step.name.as_str()).collect();
            names.join(", ")
        };
        let (failed, skipped) = (those("FAILED"), those("SKIPPED"));
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
    use super::*;

    #[test]
    fn times_read_well() {
        assert_eq!(Seconds(Duration::from_millis(1_250)).to_string(), "1.2 s");
        assert_eq!(Seconds(Duration::from_millis(99_990)).to_string(), "1 min 39 s");
        assert_eq!(Seconds(Duration::from_secs(725)).to_string(), "12 min 05 s");
    }

    #[test]
    fn a_failed_step_stops_the_run_unless_told() {
        let folder = tempfile::tempdir().unwrap();
        let workspace =
            Workspace { root: folder.path().to_owned(), target: folder.path().to_owned(), with_assertions: false };
        for (keep_going, expected) in [(false, Run::Break(())), (true, Run::Continue(()))] {
            let mut steps = Steps::new(&workspace, keep_going);
            assert_eq!(steps.step("good one", |_| Ok(Pass::Whole(String::new()))), Run::Continue(()));
            assert_eq!(steps.step("bad one", |_| Err("why".to_owned())), expected);
            assert!(!steps.summary());
            assert!(folder.path().join("xtask/02-bad-one.log").exists());
        }
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
