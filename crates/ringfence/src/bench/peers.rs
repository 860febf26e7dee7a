//! Who is compared: programs that serve a vhost-user disk, as they are installed here.

use anyhow::{Context, bail};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program, and the way it does I/O where it has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Ringfence,
    QemuStorageDaemon { aio: &'static str },
    Spdk,
}

/// What kind of disk it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disk {
    /// Keeps nothing.
    Null,
    /// In its process' memory.
    Memory,
    /// A raw file, in memory where there is a file system for that.
    File,
}

/// How large each disk is.
pub(super) const SIZE: u64 = 512 << 20;

/// How long a program may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

const STORAGE_DAEMON: &str = "qemu-storage-daemon";

/// SPDK's vhost target, by the names that packages, its build and its general target give it.
const SPDK: [&str; 4] = ["spdk_vhost", "vhost_tgt", "vhost", "spdk_tgt"];

/// Whether there is anybody besides us.
pub(super) fn any() -> bool {
    in_path(STORAGE_DAEMON).is_some() || spdk().is_some()
}

/// Who is not installed here.
pub(super) fn absent() -> Vec<String> {
    let mut absent = Vec::new();
    if in_path(STORAGE_DAEMON).is_none() {
        absent.push(format!("there is no {STORAGE_DAEMON} in PATH"));
    }
    if spdk().is_none() {
        absent.push(format!("there is no SPDK in PATH ({})", SPDK.join(", ")));
    }
    absent
}

impl Disk {
    /// Those that there are here, ours first.
    pub(super) fn peers(self) -> Vec<Peer> {
        let mut peers = vec![Peer::Ringfence];
        if in_path(STORAGE_DAEMON).is_some() {
            let ways: &[&str] = match self {
                Disk::Null => &[""],
                Disk::Memory => &[],
                Disk::File => &["threads", "io_uring", "native"],
            };
            peers.extend(ways.iter().map(|aio| Peer::QemuStorageDaemon { aio }));
        }
        if spdk().is_some() {
            peers.push(Peer::Spdk);
        }
        peers
    }
}

impl Peer {
    pub(super) fn name(self) -> String {
        match self {
            Peer::Ringfence => "ringfence".into(),
            Peer::QemuStorageDaemon { aio: "" } => "qemu-storage-daemon".into(),
            Peer::QemuStorageDaemon { aio } => format!("qemu-storage-daemon, aio={aio}"),
            Peer::Spdk => "SPDK vhost".into(),
        }
    }

    /// Starts it with a socket in `folder`.
    pub(super) fn serve(self, disk: Disk, folder: &Path, image: &Path) -> anyhow::Result<Serving> {
        let socket = folder.join("disk.sock");
        let log = folder.join("log");
        let _ = fs::remove_file(&socket);
        let mut command = self.command(disk, folder, &socket, image)?;
        let child = command
            // Ctrl-C is for whoever started us; what we started is ended by us.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?)
            .spawn()
            .with_context(|| format!("can't start {}", self.name()))?;
        let mut serving = Serving { child, socket };
        let until = Instant::now() + PATIENCE;
        while !listens(&serving.socket) {
            let ended = serving.child.try_wait()?;
            if ended.is_some() || Instant::now() > until {
                let log = fs::read_to_string(&log).unwrap_or_default();
                bail!("{} does not listen; it says: {}", self.name(), log.trim());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(serving)
    }

    fn command(self, disk: Disk, folder: &Path, socket: &Path, image: &Path) -> anyhow::Result<Command> {
        Ok(match self {
            Peer::Ringfence => {
                let image = match disk {
                    Disk::Null => format!("null:{SIZE}"),
                    Disk::Memory => format!("memory:{SIZE}"),
                    Disk::File => image.display().to_string(),
                };
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["serve", "blk", "--log", "error", "--image", &image, "--socket"]).arg(socket);
                command
            }
            Peer::QemuStorageDaemon { aio } => {
                let node = match disk {
                    Disk::File => {
                        let cache = if aio == "native" { ",cache.direct=on" } else { "" };
                        format!("driver=file,node-name=disk,filename={},aio={aio}{cache}", image.display())
                    }
                    Disk::Null | Disk::Memory => format!("driver=null-co,node-name=disk,size={SIZE},read-zeroes=off"),
                };
                let export = format!(
                    "vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
                    socket.display()
                );
                let mut command = Command::new(STORAGE_DAEMON);
                command.args(["--blockdev", &node, "--export", &export]);
                command
            }
            Peer::Spdk => {
                let config = folder.join("spdk.json");
                File::create(&config)?.write_all(spdk_config(disk, image).to_string().as_bytes())?;
                let mut command = Command::new(spdk().context("SPDK's vhost is gone")?);
                // One core, which it keeps busy: the first that there is. Huge pages may not be there, and only its own
                // disk is in them.
                command.args(["-m", &format!("[{}]", first_processor()?), "--no-huge", "-s", "1024", "-S"]).arg(folder);
                command.arg("-r").arg(folder.join("spdk-rpc.sock")).arg("-c").arg(config);
                command
            }
        })
    }
}

/// A disk on a controller whose name is that of the socket.
fn spdk_config(disk: Disk, image: &Path) -> serde_json::Value {
    use serde_json::json;
    let blocks = SIZE / 512;
    let bdev = match disk {
        Disk::Null => json!({ "method": "bdev_null_create",
            "params": { "name": "disk", "num_blocks": blocks, "block_size": 512 } }),
        Disk::Memory => json!({ "method": "bdev_malloc_create",
            "params": { "name": "disk", "num_blocks": blocks, "block_size": 512 } }),
        Disk::File => json!({ "method": "bdev_aio_create",
            "params": { "name": "disk", "filename": image, "block_size": 512 } }),
    };
    let controller = json!({ "method": "vhost_create_blk_controller",
        "params": { "ctrlr": "disk.sock", "dev_name": "disk" } });
    json!({ "subsystems": [{ "subsystem": "bdev", "config": [bdev] },
        { "subsystem": "vhost_blk", "config": [controller] }] })
}

fn spdk() -> Option<PathBuf> {
    SPDK.into_iter().find_map(in_path)
}

/// Of those that this process may run on.
fn first_processor() -> anyhow::Result<usize> {
    let allowed = rustix::thread::sched_getaffinity(None)?;
    let first = (0..rustix::thread::CpuSet::MAX_CPU).find(|&processor| allowed.is_set(processor));
    first.context("this process may run nowhere")
}

/// Whether somebody accepts connections there: the file is there a moment earlier.
fn listens(socket: &Path) -> bool {
    const ACCEPTS: u32 = 1 << 16;
    let Ok(sockets) = fs::read_to_string("/proc/net/unix") else { return socket.exists() };
    sockets.lines().filter_map(|line| line.split_once(" /")).any(|(words, path)| {
        let flags = words.split_whitespace().nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        flags.is_some_and(|flags| flags & ACCEPTS != 0) && Path::new("/").join(path) == socket
    })
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|program| program.is_file())
}

/// A program that serves; ended when dropped.
pub(super) struct Serving {
    child: Child,
    pub(super) socket: PathBuf,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > until {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = fs::remove_file(&self.socket);
    }
}
