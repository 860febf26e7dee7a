//! A file that is slow, or hangs: a file system of our own with one file in it. Needs the right to mount one.

use crate::slow::{CAPACITY, content};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) struct SlowFile {
    folder: tempfile::TempDir,
    hangs: Arc<AtomicBool>,
    waiting: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

impl SlowFile {
    /// `direct`: the kernel keeps nothing in its page cache, and has whoever answers write to the pages of whoever reads.
    /// `None`, and a line that says so, where we may not.
    pub(crate) fn mount(delay: Duration, direct: bool) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let device = match open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(device) => File::from(device),
            Err(error) => {
                eprintln!("SKIPPED: no file that is slow, because /dev/fuse can't be opened: {error}");
                return None;
            }
        };
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        let data = std::ffi::CString::new(data).unwrap();
        if let Err(error) = mount("ringfence-test", folder.path(), "fuse", flags, data.as_c_str()) {
            eprintln!("SKIPPED: no file that is slow, because file systems can't be mounted: {error}");
            return None;
        }
        let (hangs, waiting) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        // As many as can be asked for at once, so that a delay is one.
        let threads = (0..32)
            .map(|_| {
                let (device, hangs, waiting) = (device.try_clone().unwrap(), Arc::clone(&hangs), Arc::clone(&waiting));
                std::thread::spawn(move || answer(&device, delay, direct, &hangs, &waiting))
            })
            .collect();
        Some(Self { folder, hangs, waiting, threads })
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    pub(crate) fn hang(&self) {
        self.hangs.store(true, Ordering::SeqCst);
    }

    /// How many reads and writes hang.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    pub(crate) fn recover(&self) {
        self.hangs.store(false, Ordering::SeqCst);
    }
}

/// Has the file recover when it is dropped: before whoever would wait for it.
pub(crate) struct Recovering<'f>(pub(crate) &'f SlowFile);

impl Drop for Recovering<'_> {
    fn drop(&mut self) {
        self.0.recover();
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        self.recover();
        // Somebody may just be closing the file.
        let since = Instant::now();
        while unmount(self.folder.path(), UnmountFlags::empty()).is_err() && since.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = unmount(self.folder.path(), UnmountFlags::DETACH);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the file system's thread panicked");
        }
    }
}

// The kernel's <linux/fuse.h>, protocol 7.31; all numbers are the host's.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FOPEN_DIRECT_IO: u32 = 1;
const HEADER: usize = 40;

fn answer(mut device: &File, delay: Duration, direct: bool, hangs: &AtomicBool, waiting: &AtomicUsize) {
    let mut message = vec![0; (1 << 20) + 4096];
    loop {
        let len = match device.read(&mut message) {
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::NotFound || error.kind() == ErrorKind::Interrupted => continue,
            // Unmounted.
            Err(_) => return,
        };
        let u32_at = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap());
        let (opcode, unique, node) = (u32_at(4), u64_at(8), u64_at(16));
        if let READ | WRITE = opcode {
            std::thread::sleep(delay);
            waiting.fetch_add(1, Ordering::SeqCst);
            while hangs.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            waiting.fetch_sub(1, Ordering::SeqCst);
        }
        let body: Result<Vec<u8>, i32> = match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            INIT => Ok(init()),
            LOOKUP if &message[HEADER..len] == b"disk\0" => {
                let mut entry = Vec::new();
                [2_u64, 0, 3600, 3600].iter().for_each(|number| entry.extend(number.to_ne_bytes()));
                entry.extend([0; 8]);
                entry.extend(attributes(2));
                Ok(entry)
            }
            LOOKUP => Err(libc::ENOENT),
            GETATTR => {
                let mut answer = 3600_u64.to_ne_bytes().to_vec();
                answer.extend([0; 8]);
                answer.extend(attributes(node));
                Ok(answer)
            }
            OPEN => {
                let mut answer = vec![0; 8];
                answer.extend((if direct { FOPEN_DIRECT_IO } else { 0 }).to_ne_bytes());
                answer.extend([0; 4]);
                Ok(answer)
            }
            READ => {
                let (offset, size) = (u64_at(HEADER + 8), u64::from(u32_at(HEADER + 16)));
                let end = (offset + size).min(CAPACITY);
                Ok((offset..end).step_by(8).flat_map(|at| content(at / 512).to_ne_bytes()).collect())
            }
            WRITE => {
                let mut answer = u32_at(HEADER + 16).to_ne_bytes().to_vec();
                answer.extend([0; 4]);
                Ok(answer)
            }
            STATFS => Ok(vec![0; 80]),
            RELEASE | FSYNC | FLUSH => Ok(Vec::new()),
            _ => Err(libc::ENOSYS),
        };
        let (error, body) = match body {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        reply.extend(error.to_ne_bytes());
        reply.extend(unique.to_ne_bytes());
        reply.extend(body);
        // Who asked may have gone.
        let _ = device.write(&reply);
    }
}

fn init() -> Vec<u8> {
    let mut answer = Vec::new();
    // Version; readahead, which would fetch what nobody asked for; flags: asynchronous reads, and large writes.
    [7_u32, 31, 0, 1 | 1 << 5].iter().for_each(|number| answer.extend(number.to_ne_bytes()));
    // How many may be under way, and how large a write may be.
    answer.extend(64_u16.to_ne_bytes());
    answer.extend(48_u16.to_ne_bytes());
    answer.extend((1_u32 << 20).to_ne_bytes());
    answer.resize(64, 0);
    answer
}

/// `struct fuse_attr` of the folder, or of the file.
fn attributes(node: u64) -> Vec<u8> {
    let (size, mode) = if node == 1 { (0, 0o40755_u32) } else { (CAPACITY, 0o100644) };
    let mut attributes = Vec::new();
    [node, size, size / 512, 0, 0, 0].iter().for_each(|number| attributes.extend(number.to_ne_bytes()));
    [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].iter().for_each(|number: &u32| attributes.extend(number.to_ne_bytes()));
    attributes
}
