use anyhow::{Context, bail};
use ringfence_policy::IommuMode;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// This very program as the disk's server, in a process of its own.
pub(super) struct Server {
    socket: PathBuf,
    child: Child,
    log: Option<std::thread::JoinHandle<String>>,
}

impl Server {
    pub(super) fn start(image: &Path, socket: &Path, iommu: IommuMode) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("can't find this program to start it again")?;
        let mut child = Command::new(&program)
            .args(["serve", "blk", "--iommu", &iommu.to_string(), "--socket"])
            .arg(socket)
            .arg("--image")
            .arg(image)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't start {}", program.display()))?;
        // Read all the time: a full pipe would hold the server up.
        let stderr = BufReader::new(child.stderr.take().expect("piped above"));
        let (listens, ready) = mpsc::channel();
        let log = std::thread::spawn(move || {
            let mut log = String::new();
            for line in stderr.lines().map_while(Result::ok) {
                if line.contains("listening on") {
                    let _ = listens.send(());
                }
                log = log + &line + "\n";
            }
            log
        });
        let mut server = Self { socket: socket.to_owned(), child, log: Some(log) };
        server.wait_until_it_listens(&ready)?;
        Ok(server)
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends the server as an operator does, and returns its log.
    pub(super) fn stop(mut self) -> anyhow::Result<String> {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM)?;
        let status = self.child.wait()?;
        let log = self.log.take().expect("taken only here").join().unwrap_or_default();
        if !status.success() {
            bail!("the server ended with {status}; its log:\n{log}");
        }
        if self.socket.exists() {
            bail!("the server left its socket {} behind", self.socket.display());
        }
        Ok(log)
    }

    fn wait_until_it_listens(&mut self, ready: &mpsc::Receiver<()>) -> anyhow::Result<()> {
        let Err(error) = ready.recv_timeout(Duration::from_secs(10)) else { return Ok(()) };
        let _ = self.child.kill();
        let log = self.log.take().map(|log| log.join().unwrap_or_default()).unwrap_or_default();
        bail!("the server does not listen on {} ({error}); its log:\n{log}", self.socket.display())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Where `stop` was not reached; a process that has ended already is left alone by both.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
