//! A vhost-user back-end as a process: started, watched, ended by its own handle.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{Error, tail};
use crate::tool;

/// How long a back-end may take to make its socket, and to end when asked.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);

/// A running back-end; dropped, it is killed.
#[derive(Debug)]
pub struct Backend {
    child: Child,
    program: String,
    socket: PathBuf,
    log: PathBuf,
}

impl Backend {
    /// Starts `command`, which must listen on `socket`, with its output in the
    /// file `log`.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`] when it ends or the socket does not appear in time.
    pub fn start(mut command: Command, socket: &Path, log: &Path) -> Result<Self, Error> {
        let file = File::create(log).map_err(Error::file("cannot create", log))?;
        let copy = file.try_clone().map_err(Error::file("cannot use", log))?;
        let program = tool::line(&command);
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(copy)
            // A log in a file has no use for colour.
            .env("NO_COLOR", "1")
            .spawn()
            .map_err(|source| Error::Start { program: program.clone(), source })?;
        let mut backend = Self { child, program, socket: socket.to_owned(), log: log.to_owned() };
        backend.wait_for_socket()?;
        Ok(backend)
    }

    /// The socket it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Its resident memory in KiB, now.
    pub fn resident_kib(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    }

    /// The anonymous files that it has mapped, as the kernel calls them: memory that it shares with others.
    pub fn shared_memory(&self) -> Option<Vec<String>> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.child.id())).ok()?;
        let mut names: Vec<String> =
            maps.lines().filter_map(|line| Some(line[line.find("/memfd:")?..].to_owned())).collect();
        names.sort_unstable();
        names.dedup();
        Some(names)
    }

    /// Whether it runs and takes a connection.
    pub fn serves(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None)) && UnixStream::connect(&self.socket).is_ok()
    }

    /// Waits until the log holds a line that `wanted` accepts; `false` after `patience`.
    pub fn logs(&self, patience: Duration, wanted: impl Fn(&str) -> bool) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if self.log().lines().any(&wanted) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(PAUSE);
        }
    }

    /// Kills it, as `kill -9` does: it has no time for anything.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`] when it had ended before.
    pub fn kill(&self) -> Result<(), Error> {
        let id = Pid::from_child(&self.child);
        // The child is not yet waited for, so the id is still its own.
        kill_process(id, Signal::KILL).map_err(|errno| self.failed(format!("cannot be killed: {errno}")))
    }

    /// Ends it by SIGTERM and waits.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`] when it had ended before, or has to be killed.
    pub fn end(mut self) -> Result<ExitStatus, Error> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Err(self.failed(format!("had ended already ({status})")));
        }
        let id = Pid::from_child(&self.child);
        // The child is not yet waited for, so the id is still its own.
        kill_process(id, Signal::TERM).map_err(|errno| self.failed(format!("cannot be signalled: {errno}")))?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Ok(status);
            }
            thread::sleep(PAUSE);
        }
        Err(self.failed(format!("did not end within {PATIENCE:?} of SIGTERM")))
    }

    fn wait_for_socket(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        // Looking is enough: to connect would be the back-end's first front-end.
        while !self.socket.exists() {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.failed(format!("ended before it listened ({status})")));
            }
            if Instant::now() >= deadline {
                return Err(self.failed(format!("made no socket {} in {PATIENCE:?}", self.socket.display())));
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn failed(&self, problem: String) -> Error {
        Error::Backend { program: self.program.clone(), problem, tail: tail(&self.log(), 10) }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Both fail only where the process has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A path for one of QEMU's comma-separated options.
pub(crate) fn comma_safe(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_backend_that_ends_at_once_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let error = Backend::start(
            shell("echo bad image >&2; exit 3"),
            &folder.path().join("socket"),
            &folder.path().join("log"),
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("ended before it listened (exit status: 3)"), "{error}");
        assert!(error.ends_with("bad image"), "{error}");
    }

    #[test]
    fn a_backend_ends_by_sigterm() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let script = format!("trap 'echo bye; exit 0' TERM; : > {}; while :; do sleep 0.02; done", socket.display());
        let backend = Backend::start(shell(&script), &socket, &folder.path().join("log")).unwrap();
        assert!(!backend.logs(Duration::ZERO, |line| line == "bye"));
        assert!(backend.resident_kib().unwrap() > 0);
        assert!(backend.end().unwrap().success());
        assert_eq!(fs::read_to_string(folder.path().join("log")).unwrap(), "bye\n");
    }
}
