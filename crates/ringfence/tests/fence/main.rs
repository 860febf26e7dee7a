//! The fence under load, from outside: once an INVALIDATE is acknowledged, no byte of its pages changes.
//!
//! A front-end keeps reads, writes and flushes under way on a slow disk, and meanwhile takes pages away: of data, of
//! headers and status bytes, and of the ring itself. After each acknowledgement it stamps them, and before it uses one
//! again it finds the stamp, byte for byte, long after the I/O that was under way has ended.
//!
//! Some seconds of it run with all tests; `cargo xtask stress` runs millions of pages.

mod frontend;
mod fuse;
mod slow;

use frontend::{Frontend, Kind, Load, Misses};
use fuse::{Recovering, SlowFile};
use ringfence_device::blk::{self, Blk};
use ringfence_device::storage::Storage;
use ringfence_policy::IommuMode;
use ringfence_ring::{Format, Notifications};
use ringfence_vhost_user::client::{self, ClientError, Vring};
use ringfence_vhost_user::server::{Keep, Options, Server};
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, Signal, kill_process};
use slow::Slow;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How many pages a test stamps: some seconds' worth, or as many as `cargo xtask stress` says.
fn pages() -> u64 {
    std::env::var("RINGFENCE_STRESS_PAGES").map_or(12_000, |pages| pages.parse().expect("a number of pages"))
}

/// A server in a thread of this process.
struct Inside {
    socket: PathBuf,
    end: UnixStream,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Inside {
    fn start(storage: Arc<dyn Storage>, keep: Keep, io_timeout: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("blk.sock");
        let server = Server::bind(&socket).unwrap();
        let disk = blk::Options { queues: 1, queue_size: 256, serial: String::new() };
        let device = Arc::new(Blk::new(storage, disk));
        let poll = Duration::from_micros(20);
        let options = Options { iommu: IommuMode::Require, keep, queue_size: 256, poll, io_timeout };
        let (end, ended) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || server.run(device, options, ended.as_fd()).unwrap());
        Self { socket, end, thread: Some(thread), _folder: folder }
    }

    /// As SIGTERM does.
    fn end(mut self) -> Duration {
        let since = Instant::now();
        self.end.write_all(&[0]).unwrap();
        self.thread.take().unwrap().join().unwrap();
        since.elapsed()
    }
}

/// The real server, in a process of its own.
struct Outside {
    socket: PathBuf,
    child: Child,
    _folder: tempfile::TempDir,
}

impl Outside {
    fn start(image: &Path, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("blk.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_ringfence"))
            .args(["serve", "blk", "--iommu", "require", "--log", "warn", "--socket"])
            .arg(&socket)
            .arg("--image")
            .arg(image)
            .args(options)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let since = Instant::now();
        // It is there before it listens.
        while UnixStream::connect(&socket).is_err() {
            assert!(since.elapsed() < Duration::from_secs(60), "the server does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { socket, child, _folder: folder }
    }

    /// Until so many of its threads serve queues.
    fn wait_for_queues(&self, count: usize) {
        let since = Instant::now();
        let is_queue = |task: &std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("blk-queue"))
        };
        let tasks = || std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        while tasks().filter_map(Result::ok).filter(is_queue).count() != count {
            assert!(since.elapsed() < Duration::from_secs(60), "not {count} queues");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn tell_to_end(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    fn is_gone_within(&mut self, time: Duration) -> bool {
        let since = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            if since.elapsed() >= time {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Sends SIGTERM, and says how long the process took to end.
    fn end(mut self) -> Duration {
        let since = Instant::now();
        if self.child.try_wait().unwrap().is_none() {
            self.tell_to_end();
        }
        let status = self.child.wait().unwrap();
        assert!(status.success(), "the server ended with {status}");
        assert!(!self.socket.exists(), "the server left its socket behind");
        since.elapsed()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn no_byte_of_an_invalidated_page_changes_with_slow_storage() {
    for keep in [Keep::Cache, Keep::Request] {
        let served = Inside::start(Arc::new(Slow::new(Duration::from_millis(2))), keep, Duration::from_secs(10));
        let frontend = Frontend::connect(&served.socket, Misses::Answered);
        let seen = frontend.run(Load { pages: pages() / 2, stops: 50, known: true });
        eprintln!("{keep}: {seen:?}");
        drop(frontend);
        served.end();
    }
}

/// A packed ring's descriptors are written to by both sides, and event indices by the device as well.
#[test]
fn no_byte_of_an_invalidated_page_changes_with_any_ring() {
    let kinds = [
        (Format::Split, Notifications::EventIdx),
        (Format::Packed, Notifications::Flags),
        (Format::Packed, Notifications::EventIdx),
    ];
    for (format, notifications) in kinds {
        let kind = Kind { format, notifications };
        let served = Inside::start(Arc::new(Slow::new(Duration::from_millis(1))), Keep::Cache, Duration::from_secs(10));
        let frontend = Frontend::with_ring(&served.socket, Misses::Answered, kind);
        let seen = frontend.run(Load { pages: pages() / 8, stops: 10, known: true });
        eprintln!("{kind:?}: {seen:?}");
        drop(frontend);
        served.end();
    }
}

/// The file's server decides how the kernel treats the memory that is read into: here it is looked up before, and written
/// to whatever is mapped at its address by then.
#[test]
fn no_byte_of_an_invalidated_page_changes_from_another_process() {
    for direct in [true, false] {
        let Some(file) = SlowFile::mount(Duration::from_millis(2), direct) else { return };
        let served = Outside::start(&file.path(), &["--iotlb", "cache"]);
        let frontend = Frontend::connect(&served.socket, Misses::Answered);
        // What is written to a file that is cached is read from there.
        let seen = frontend.run(Load { pages: pages() / 2, stops: 20, known: direct });
        eprintln!("a file whose server {}: {seen:?}", if direct { "has pages pinned" } else { "lets pages be cached" });
        drop(frontend);
        served.end();
    }
}

/// Where no file can be slow, one that is not: still a second process, and everything moves in and out at full speed.
#[test]
fn no_byte_of_an_invalidated_page_changes_with_a_plain_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(slow::CAPACITY).unwrap();
    let packed = Kind { format: Format::Packed, notifications: Notifications::EventIdx };
    for kind in [Kind::SPLIT, packed] {
        let served = Outside::start(file.path(), &["--iotlb", "cache"]);
        let frontend = Frontend::with_ring(&served.socket, Misses::Answered, kind);
        let seen = frontend.run(Load { pages: pages() / 4, stops: 20, known: false });
        eprintln!("a plain file, {kind:?}: {seen:?}");
        drop(frontend);
        served.end();
    }
}

/// A disk that hangs: pages are taken away at once all the same, the queue stops in time and goes on later, and the
/// server ends when it is told to.
#[test]
fn a_disk_that_hangs_holds_nobody() {
    let slow = Arc::new(Slow::new(Duration::from_millis(1)));
    let served = Inside::start(Arc::clone(&slow) as _, Keep::Cache, Duration::from_millis(300));
    let frontend = Frontend::connect(&served.socket, Misses::Answered);
    for lets_go in [true, false] {
        slow.hang(lets_go);
        frontend.submit_reads(8);
        // None of these waits for the disk, which would be for ever.
        frontend.take_away_everything();
        let base = frontend.stop();
        frontend.take_away_everything();
        slow.recover();
        frontend.start(base);
        assert_eq!(frontend.wait_for_all(), 8, "requests that were given up start anew: {lets_go}");
    }
    slow.hang(false);
    frontend.submit_reads(4);
    let took = served.end();
    assert!(took < Duration::from_secs(60), "{took:?}");
    frontend.assert_stamps();
    slow.recover();
}

#[test]
fn a_file_that_hangs_holds_nobody() {
    for direct in [true, false] {
        let Some(file) = SlowFile::mount(Duration::from_millis(1), direct) else { return };
        let mut served = Outside::start(&file.path(), &["--iotlb", "cache", "--io-timeout", "0.3"]);
        let _recovering = Recovering(&file);
        let frontend = Frontend::connect(&served.socket, Misses::Answered);
        file.hang();
        frontend.submit_reads(8);
        frontend.take_away_everything();
        let base = frontend.stop();
        frontend.take_away_everything();
        file.recover();
        frontend.start(base);
        assert_eq!(frontend.wait_for_all(), 8);
        frontend.assert_stamps();

        file.hang();
        frontend.submit_reads(4);
        frontend.take_away_everything();
        served.tell_to_end();
        frontend.wait_for_hangup();
        if !served.is_gone_within(Duration::from_secs(30)) {
            // Nothing that a process can do ends a wait of the kernel's that nothing interrupts.
            eprintln!("SKIPPED: this kernel keeps a process for as long as its file hangs");
            file.recover();
        }
        served.end();
        frontend.assert_stamps();
    }
}

/// A file whose server is the front-end, given for an eventfd: nobody looks at it, or waits for it to be closed.
#[test]
fn a_bell_that_hangs_holds_nobody() {
    let Some(file) = SlowFile::mount(Duration::from_millis(1), true) else { return };
    let served = Outside::start(Path::new("memory:8M"), &[]);
    let given = File::open(file.path()).unwrap();
    let ours = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let _recovering = Recovering(&file);
    file.hang();
    for (kick, call) in [(given.as_fd(), ours.as_fd()), (ours.as_fd(), given.as_fd())] {
        let hostile = client::Frontend::connect(&served.socket, client::Options::default()).unwrap();
        let (kick, call) = (Some(kick), Some(call));
        let vring = Vring { index: 0, size: 64, base: 0, descriptor: 0, available: 0, used: 0, kick, call };
        let refused = hostile.start_vring(&vring);
        assert!(matches!(refused, Err(ClientError::Refused { .. })), "{refused:?}");
    }
    let frontend = Frontend::connect(&served.socket, Misses::Answered);
    frontend.submit_reads(8);
    assert_eq!(frontend.wait_for_all(), 8);
    // The kernel keeps a process for as long as a file that it closes hangs.
    file.recover();
    served.end();
}

/// Memory of the guest whose server is the front-end: a visit is in the middle of it, and does not end.
#[test]
fn memory_that_hangs_is_taken_away_from_the_device() {
    let Some(file) = SlowFile::mount(Duration::from_millis(1), false) else { return };
    let served = Outside::start(Path::new("memory:8M"), &["--iotlb", "cache"]);
    let lent = File::options().read(true).write(true).open(file.path()).unwrap();
    let _recovering = Recovering(&file);
    let frontend = Frontend::connect(&served.socket, Misses::Answered);
    frontend.lend(lent.as_fd());
    file.hang();
    frontend.read_into_lent();
    while file.waiting() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    if !frontend.take_lent_away() {
        // Then nobody was told that it is true.
        eprintln!("SKIPPED: this kernel does not let memory be replaced in the middle of a fault");
        return;
    }
    assert_eq!(file.waiting(), 1, "acknowledged before memory answers");
    frontend.wait_for_hangup();
    let next = Frontend::connect(&served.socket, Misses::Answered);
    next.submit_reads(8);
    assert_eq!(next.wait_for_all(), 8, "the next front-end is served");
    file.recover();
    // Whoever was stuck goes on, with memory of nobody's: its thread ends.
    served.wait_for_queues(1);
    let mut found = [0; 8];
    lent.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, slow::content(0).to_ne_bytes(), "written after its invalidation was acknowledged");
    served.end();
}

/// A front-end that answers no miss, and takes away, stops and starts: nobody waits for anybody.
#[test]
fn misses_that_are_not_answered_hold_nobody() {
    let served = Inside::start(Arc::new(Slow::new(Duration::from_millis(1))), Keep::Cache, Duration::from_secs(10));
    let frontend = Frontend::connect(&served.socket, Misses::Withheld);
    for _ in 0..20 {
        frontend.submit_reads(8);
        frontend.take_away_everything();
        let base = frontend.stop();
        frontend.start(base);
        frontend.take_away_everything();
        frontend.give_everything();
        assert_eq!(frontend.wait_for_all(), 8);
        // What came back to memory that is missing by then waits for it too.
        frontend.submit_reads(8);
        frontend.take_away_everything();
        let base = frontend.stop();
        frontend.take_away_everything();
        frontend.start(base);
        frontend.give_everything();
        assert_eq!(frontend.wait_for_all(), 8);
    }
    frontend.submit_reads(8);
    frontend.take_away_everything();
    assert!(served.end() < Duration::from_secs(60));
    frontend.assert_stamps();
}
