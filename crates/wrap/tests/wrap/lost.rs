//! Back-ends that die, and what the driver notices of it: nothing.

use crate::served::{self, BUFFERS, PAGE};
use crate::{driven, options, wrap};
use ringfence_driver::blk::{Answer, Completion, Request};
use ringfence_wrap::Options;
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// An unmodified qemu-storage-daemon; ended with the value.
struct Daemon(Child);

impl Daemon {
    /// `None` where the program is not installed.
    fn start(image: &Path, socket: &Path) -> Option<Self> {
        let blockdev = format!("driver=file,node-name=n,filename={}", image.display());
        let path = socket.display();
        let export = format!("type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={path},writable=on");
        let mut command = Command::new("qemu-storage-daemon");
        match command.args(["--blockdev", &blockdev, "--export", &export]).spawn() {
            Ok(child) => Some(Daemon(child)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let told = "SKIPPED: qemu-storage-daemon is not installed (package qemu-utils)";
                let _ = writeln!(std::io::stderr(), "{told}");
                None
            }
            Err(error) => panic!("qemu-storage-daemon: {error}"),
        }
    }
}

impl Drop for Daemon {
    /// By SIGKILL.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An image of 8 MiB in a folder, and a place for a socket beside it.
fn image() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("plain.sock"));
    std::fs::write(&image, vec![0; 8 << 20]).unwrap();
    (folder, image, socket)
}

#[test]
fn kill_9_under_load_loses_nothing() {
    let (_folder, image, socket) = image();
    let Some(mut daemon) = Daemon::start(&image, &socket) else { return };
    let wrapped = wrap(options(&socket));
    driven!(wrapped => frontend, disk);
    // Each page of memory has its own place on the disk, and is written with a number that counts up, read back, compared.
    const PAGES: usize = 32;
    let buffers: Vec<_> = (0..2 * PAGES).map(|page| [frontend.buffer((BUFFERS.0 + page * PAGE, PAGE))]).collect();
    let (out, back) = buffers.split_at(PAGES);
    let content = |page: usize, round: u64| [(page as u64 ^ round.wrapping_mul(0x9e37) & 0xff) as u8; PAGE];
    let mut under_way = HashMap::new();
    let mut rounds = [0u64; PAGES];
    let (mut ended, mut kills) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(240);
    while kills < 5 || !under_way.is_empty() {
        assert!(Instant::now() < deadline, "{kills} kills, {ended} requests ended, {} under way", under_way.len());
        let busy: HashSet<usize> = under_way.values().map(|&(page, _)| page).collect();
        for page in (0..PAGES).filter(|page| kills < 5 && !busy.contains(page)) {
            rounds[page] += 1;
            out[page][0].memory().write(0, &content(page, rounds[page]));
            let id = disk.submit(Request::Write { sector: page as u64 * 24, from: &out[page] }).unwrap();
            under_way.insert(id, (page, true));
        }
        disk.notify().unwrap();
        while let Some(Completion { id, result }) = disk.poll().unwrap() {
            assert_eq!(result, Ok(Answer::Done));
            ended += 1;
            let (page, was_write) = under_way.remove(&id).unwrap();
            if was_write {
                let id = disk.submit(Request::Read { sector: page as u64 * 24, into: &back[page] }).unwrap();
                under_way.insert(id, (page, false));
            } else {
                assert_eq!(served::bytes(back[page][0]), content(page, rounds[page]), "page {page}");
            }
        }
        disk.notify().unwrap();
        if kills < 5 && ended > (kills + 1) * 500 && under_way.len() > PAGES / 2 {
            drop(daemon);
            kills += 1;
            daemon = Daemon::start(&image, &socket).unwrap();
        }
    }
    drop(daemon);
    let stored = std::fs::read(&image).unwrap();
    for (page, &round) in rounds.iter().enumerate() {
        assert_eq!(stored[page * 24 * 512..][..PAGE], content(page, round), "page {page}");
    }
}

/// The kernel's word for it: what the back-end has mapped and what it has open is none of the guest's memory.
#[test]
fn the_back_end_has_no_memory_of_the_guest() {
    let (_folder, image, socket) = image();
    let Some(daemon) = Daemon::start(&image, &socket) else { return };
    let wrapped = wrap(Options { pool: 3 << 20, ..options(&socket) });
    driven!(wrapped => frontend, disk);
    frontend.write_and_read_back(&mut disk, 1);
    let guest = rustix::fs::fstat(&frontend.memory).unwrap().st_ino;
    let process = PathBuf::from(format!("/proc/{}", daemon.0.id()));
    let maps = std::fs::read_to_string(process.join("maps")).unwrap();
    let shared: Vec<_> = maps.lines().filter(|line| line.contains("memfd:")).collect();
    assert_eq!(shared.len(), 1, "rings and pool, in one piece: {maps}");
    let inode = shared[0].split_whitespace().nth(4).unwrap();
    assert_ne!(inode, guest.to_string());
    for entry in std::fs::read_dir(process.join("fd")).unwrap() {
        if let Ok(metadata) = std::fs::metadata(entry.unwrap().path()) {
            assert_ne!(metadata.ino(), guest);
        }
    }
}

/// A back-end tells its front-end of changes; the VMM hears of them.
#[test]
fn a_disk_that_was_replaced_is_announced_by_its_configuration() {
    let (folder, image, socket) = image();
    let Some(daemon) = Daemon::start(&image, &socket) else { return };
    let wrapped = wrap(options(&socket));
    driven!(wrapped => frontend, disk);
    frontend.write_and_read_back(&mut disk, 1);
    drop(daemon);
    let larger = folder.path().join("larger");
    std::fs::write(&larger, vec![0; 16 << 20]).unwrap();
    let _daemon = Daemon::start(&larger, &socket).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while frontend.client.counters().config_changes == 0 {
        assert!(Instant::now() < deadline, "no notice");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut capacity = [0; 8];
    frontend.client.config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), (16 << 20) / 512);
    frontend.write_and_read_back(&mut disk, 2);
}
