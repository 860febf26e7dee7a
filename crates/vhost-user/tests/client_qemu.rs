//! The front-end against a back-end that other people wrote: qemu-storage-daemon.

use ringfence_dma::{Buffer, FrontendVa, Gpa};
use ringfence_driver::Host;
use ringfence_driver::blk::{self, Blk};
use ringfence_driver::mapper::Direct;
use ringfence_driver::policy::{DriverPolicy, Platform};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_vhost_user::client::{Attachment, Frontend, FrontendTransport, Options, Vring};
use ringfence_vhost_user::wire::ProtocolFeatures;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

/// VIRTIO_F_VERSION_1, which every device of today has.
const VERSION_1: u64 = 1 << 32;

const SECTOR: usize = 512;

/// Where the front-end claims to have its memory: nowhere near where it is mapped.
const FRONTEND: u64 = 0x5555_0000_0000;

/// Ends the daemon with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves `image` on `socket`. `None` where the program is not installed.
fn daemon(image: &Path, socket: &Path) -> Option<Daemon> {
    let blockdev = format!("driver=file,node-name=n,filename={},read-only=on", image.display());
    let export = format!("type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={}", socket.display());
    let mut command = Command::new("qemu-storage-daemon");
    match command.args(["--blockdev", &blockdev, "--export", &export]).spawn() {
        Ok(child) => Some(Daemon(child)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => panic!("qemu-storage-daemon: {error}"),
    }
}

fn connect(socket: &Path, daemon: &mut Daemon) -> Frontend {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Frontend::connect(socket, Options::default()) {
            Ok(frontend) => return frontend,
            Err(error) => {
                assert!(daemon.0.try_wait().unwrap().is_none(), "the daemon ended");
                assert!(Instant::now() < deadline, "{error}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// Its queue is stopped and begins anew, though it knows nothing of VIRTIO_F_RING_RESET: that is the front-end's business.
#[test]
fn a_disk_of_qemu_storage_daemon_goes_on_after_its_queue_was_reset() {
    const LEN: usize = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    let content: Vec<u8> = (0..LEN).map(|at| (at / SECTOR) as u8 ^ at as u8).collect();
    std::fs::write(&image, &content).unwrap();
    let Some(mut daemon) = daemon(&image, &socket) else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: qemu-storage-daemon is not installed (package qemu-utils)");
        return;
    };
    let frontend = Arc::new(connect(&socket, &mut daemon));
    let memory = SharedMemory::new(LEN).unwrap();
    let place = Placement { gpa: Gpa(0), frontend_va: FrontendVa(FRONTEND), size: LEN as u64, offset: 0 };
    frontend.set_memory(&[(place, memory.as_fd())]).unwrap();
    let attachment = Attachment {
        device: 2,
        queue_size: 64,
        gpa: Gpa(0),
        frontend_va: FrontendVa(FRONTEND),
        patience: Duration::from_secs(30),
    };
    let half = |first| Buffer::new(memory.slice(first, LEN / 2), Gpa(first as u64));
    let direct = Direct::new(half(0));
    let host = Host { platform: Platform::X86, policy: DriverPolicy::Old, physical: Some(&direct), translated: None };
    let transport = FrontendTransport::new(frontend, attachment);
    let mut disk = Blk::start(transport, host, blk::Options { depth: 64, segments: 4 }).unwrap();
    let into = half(LEN / 2).sub(0, SECTOR);
    for sector in 0..300 {
        if sector % 100 == 50 {
            disk.restart().unwrap();
        }
        disk.read(sector as u64, &[into]).unwrap();
        let mut bytes = [0; SECTOR];
        into.memory().read(0, &mut bytes);
        assert_eq!(bytes, content[sector * SECTOR..][..SECTOR], "sector {sector}");
    }
}

#[test]
fn one_block_is_read_through_qemu_storage_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    let mut content = vec![0u8; 1 << 20];
    content.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / SECTOR) as u8 ^ at as u8);
    std::fs::write(&image, &content).unwrap();
    let Some(mut daemon) = daemon(&image, &socket) else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: qemu-storage-daemon is not installed (package qemu-utils)");
        return;
    };
    let frontend = connect(&socket, &mut daemon);
    assert!(frontend.protocol().contains(ProtocolFeatures::CONFIG), "{:?}", frontend.protocol());
    assert_ne!(frontend.offered() & VERSION_1, 0);

    // The configuration space of virtio-blk starts with its capacity in sectors (§5.2.4).
    let mut capacity = [0; 8];
    frontend.config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), (content.len() / SECTOR) as u64);
    assert!(frontend.queues().unwrap().is_some_and(|queues| queues >= 1));

    // One file, two regions that are no neighbours: the ring in the first, the data in the second.
    const RING: u64 = 0x10_0000;
    const DATA: u64 = 0x4000_0000;
    let memory = SharedMemory::new(0x4000).unwrap();
    let place = |gpa: u64, offset: u64| Placement {
        gpa: Gpa(gpa),
        frontend_va: FrontendVa(FRONTEND + gpa),
        size: 0x2000,
        offset,
    };
    frontend.set_memory(&[(place(RING, 0), memory.as_fd()), (place(DATA, 0x2000), memory.as_fd())]).unwrap();
    frontend.set_features(VERSION_1).unwrap();

    // A split ring of 4 (§2.7): descriptors at 0, the available ring at 0x400, the used ring at 0x800.
    let (ring, data) = (memory.slice(0, 0x2000), memory.slice(0x2000, 0x2000));
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let descriptor = |index: usize, gpa: u64, len: u32, flags: u16| {
        ring.store_u64(index * 16, gpa, Ordering::Relaxed);
        ring.store_u32(index * 16 + 8, len, Ordering::Relaxed);
        ring.store_u16(index * 16 + 12, flags, Ordering::Relaxed);
        ring.store_u16(index * 16 + 14, index as u16 + 1, Ordering::Relaxed);
    };
    // The request (§5.2.6): type 0 is a read, then the sector; its data; its status.
    const FROM: u64 = 5;
    data.store_u32(0, 0, Ordering::Relaxed);
    data.store_u64(8, FROM, Ordering::Relaxed);
    data.sub(0x1000, 1).fill(0xff);
    descriptor(0, DATA, 16, NEXT);
    descriptor(1, DATA + 0x200, SECTOR as u32, NEXT | WRITE);
    descriptor(2, DATA + 0x1000, 1, WRITE);
    // Ring: entry 0 is chain 0. The index is the last to be seen.
    ring.store_u16(0x404, 0, Ordering::Relaxed);
    ring.store_u16(0x402, 1, Ordering::Release);

    let (kick, call) = (bell(), bell());
    let vring = Vring {
        index: 0,
        size: 4,
        base: 0,
        descriptor: FRONTEND + RING,
        available: FRONTEND + RING + 0x400,
        used: FRONTEND + RING + 0x800,
        kick: Some(kick.as_fd()),
        call: Some(call.as_fd()),
    };
    frontend.start_vring(&vring).unwrap();
    // The available index above comes before the bell that makes the device look at it.
    fence(Ordering::SeqCst);
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    // A call may come for no reason; the used index tells.
    while ring.load_u16(0x802, Ordering::Acquire) == 0 {
        assert!(Instant::now() < deadline, "the request is not used");
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        if poll(&mut [PollFd::new(&call, PollFlags::IN)], Some(&second)).unwrap() == 1 {
            rustix::io::read(&call, &mut [0; 8]).unwrap();
        }
    }
    assert_eq!(ring.load_u32(0x804, Ordering::Relaxed), 0, "chain 0");
    assert_eq!(ring.load_u32(0x808, Ordering::Relaxed), SECTOR as u32 + 1, "data and status were written");
    let (mut block, mut status) = ([0; SECTOR], [0]);
    data.read(0x200, &mut block);
    data.read(0x1000, &mut status);
    assert_eq!(status, [0]);
    assert_eq!(block[..], content[FROM as usize * SECTOR..][..SECTOR]);

    assert_eq!(frontend.stop_vring(0).unwrap(), 1, "one chain was taken");
    // What a stopped queue is handed stays there.
    ring.store_u16(0x402, 2, Ordering::Release);
    assert_eq!(frontend.stop_vring(0).unwrap(), 1);
}
