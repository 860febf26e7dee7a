mod blocking;
mod ring;
mod window;
mod work;

use super::bounce::{Bounce, Strays};
use super::lock::lock;
use super::open::{OpenError, Reason, open_file};
use super::threads::Threads;
use super::{Geometry, Lost, SECTOR, Storage, StorageQueue};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use window::Window;

/// A file or block device whose bytes are the disk's.
///
/// Data goes through the page cache: what it holds is copied at once, the rest by io_uring. A file in a tmpfs is mapped. Where the kernel has no
/// io_uring to give, a queue does the rest by a few threads, and says so once.
///
/// A file whose size is no multiple of 512 has that size rounded up: the missing bytes read as zeroes, and writing them
/// makes the file longer. A file that got shorter since it was opened has no bytes there: reading them is an error.
///
/// The image is locked as QEMU locks its images, and as long as this lives: two programs that know of these locks
/// won't write the same disk.
pub struct Raw {
    shared: Arc<Image>,
}

impl Raw {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// Whatever makes it unfit for being a disk, and what to do about it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let image = Image::open(path, read_only).map_err(|reason| OpenError::new(path.display(), reason))?;
        Ok(Self { shared: Arc::new(image) })
    }
}

impl Storage for Raw {
    fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn StorageQueue>> {
        let Image { geometry, strays, .. } = &*self.shared;
        match ring::Ring::new(Arc::clone(&self.shared), depth) {
            Ok(ring) => Ok(Box::new(Bounce::new(ring, *geometry, depth, strays))),
            Err(error) if is_forbidden(&error) => {
                if !self.shared.warned_of_no_ring.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        %error,
                        "no io_uring here, so each queue waits in threads; allow it by `sysctl \
                         kernel.io_uring_disabled=0` and in the container's seccomp profile"
                    );
                }
                let threads = Threads::new("raw", &self.shared, depth)?;
                Ok(Box::new(Bounce::new(threads, *geometry, depth, strays)))
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether io_uring is out of reach altogether: switched off, filtered, or not built in.
fn is_forbidden(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS))
}

/// An open image, and what was learned about it on the way.
struct Image {
    file: File,
    /// Holds the lock, and is closed with the last queue. `file` might not be: the kernel drops a ring's files when it
    /// gets round to it, even after the process has gone, and whoever opened the image next would find it in use.
    _locked: File,
    geometry: Geometry,
    /// The size when it was opened, which `geometry.capacity` rounds up.
    len: u64,
    is_device: bool,
    /// Of a file that lives in memory and may be written.
    window: Option<Window>,
    read_now: Now,
    write_now: Now,
    /// Whether its file system knows calls that must not wait. One that does not may wait, in its server, for what io_uring
    /// asks it on the way in: that is for a thread of the kernel's from the start.
    knows_nowait: bool,
    can_punch: AtomicBool,
    can_zero: AtomicBool,
    lost: Lost,
    strays: Strays,
    warned_of_shrinking: AtomicBool,
    warned_of_no_ring: AtomicBool,
}

/// Whether a transfer that needs no waiting can be made by a plain system call, without a trip through the ring.
enum Now {
    /// The file is memory: nothing ever waits.
    Always,
    /// By RWF_NOWAIT, until the file system says that it does not know it.
    Unless { unsupported: AtomicBool },
}

impl Now {
    fn of(in_memory: bool) -> Self {
        if in_memory { Self::Always } else { Self::Unless { unsupported: AtomicBool::new(false) } }
    }
}

impl Image {
    fn open(path: &Path, read_only: bool) -> Result<Self, Reason> {
        let file = open_file(path, read_only)?;
        let locked = open_file(path, true)?;
        let (about, locked_about) = (file.metadata().map_err(Reason::of)?, locked.metadata().map_err(Reason::of)?);
        if (about.dev(), about.ino()) != (locked_about.dev(), locked_about.ino()) {
            return Err(Reason::Replaced);
        }
        lock(&locked, read_only)?;
        let is_device = about.file_type().is_block_device();
        let len = (&file).seek(SeekFrom::End(0)).map_err(|source| Reason::Io { doing: "measuring it", source })?;
        if len == 0 {
            return Err(Reason::Empty);
        }
        let capacity = len.checked_next_multiple_of(SECTOR).ok_or(Reason::TooLarge)?;
        let units = if is_device { device_units(&file) } else { file_units(&file) };
        let units = units.map_err(|source| Reason::Io { doing: "asking for its block size", source })?;
        let in_memory = !is_device && lives_in_memory(&file);
        let knows_nowait = in_memory || blocking::knows_nowait(&file);
        let window = if in_memory && !read_only { Window::over(&file, len) } else { None };
        Ok(Self {
            geometry: Geometry {
                block_size: units.block,
                physical_block_size: units.physical.max(units.block),
                optimal_size: units.optimal,
                discard_alignment: units.physical.max(units.block),
                read_only,
                ..Geometry::plain(capacity)
            },
            file,
            _locked: locked,
            len,
            is_device,
            window,
            read_now: Now::of(in_memory),
            write_now: Now::of(in_memory),
            knows_nowait,
            can_punch: AtomicBool::new(true),
            can_zero: AtomicBool::new(true),
            lost: Lost::default(),
            strays: Strays::default(),
            warned_of_shrinking: AtomicBool::new(false),
            warned_of_no_ring: AtomicBool::new(false),
        })
    }
}

struct Units {
    block: u32,
    physical: u32,
    optimal: u32,
}

/// Files can be addressed in any unit; their file system's is what is written without reading.
fn file_units(file: &File) -> io::Result<Units> {
    let physical = u32::try_from(file.metadata()?.blksize()).unwrap_or(0);
    // Network file systems answer with what they like to transfer, which is no block.
    let physical = if physical.is_power_of_two() { physical.clamp(SECTOR as u32, 4096) } else { SECTOR as u32 };
    Ok(Units { block: SECTOR as u32, physical, optimal: 0 })
}

fn device_units(file: &File) -> io::Result<Units> {
    let ask = |request| {
        let mut answer: libc::c_uint = 0;
        // SAFETY: each of the three requests writes one unsigned int.
        match unsafe { libc::ioctl(file.as_raw_fd(), request, &mut answer) } {
            0 => Ok(answer),
            _ => Err(io::Error::last_os_error()),
        }
    };
    Ok(Units { block: ask(libc::BLKSSZGET)?, physical: ask(libc::BLKPBSZGET)?, optimal: ask(libc::BLKIOOPT)? })
}

/// Whether the file system keeps its files nowhere but in memory.
fn lives_in_memory(file: &File) -> bool {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|about| [libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&about.f_type))
}

#[cfg(test)]
mod tests {
    use super::super::exercise::{CAPACITY, Driver, exercise, refuses_every_change, untouched_from_now_on};
    use super::super::{Came, Durability, Operation, Started};
    use super::*;
    use ringfence_dma::Ram;
    use std::io::{Read, Write};
    use std::process::Command;
    use tempfile::NamedTempFile;

    fn image(len: u64) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    fn in_memory(len: u64) -> NamedTempFile {
        let file = NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    fn open(file: &NamedTempFile) -> Raw {
        Raw::open(file.path(), false).unwrap()
    }

    fn driver(raw: &Raw, memory: usize) -> Driver {
        Driver::new(raw.open_queue(64).unwrap(), memory)
    }

    /// Everything through the ring.
    fn without_shortcuts(raw: Raw) -> Raw {
        let mut image = Arc::into_inner(raw.shared).expect("no queue yet");
        image.window = None;
        for now in [&mut image.read_now, &mut image.write_now] {
            *now = Now::Unless { unsupported: AtomicBool::new(true) };
        }
        Raw { shared: Arc::new(image) }
    }

    /// As where the kernel has no io_uring.
    struct WithoutRing(Raw);

    impl Storage for WithoutRing {
        fn geometry(&self) -> Geometry {
            self.0.geometry()
        }

        fn open_queue(&self, depth: u16) -> io::Result<Box<dyn StorageQueue>> {
            let Image { geometry, strays, .. } = &*self.0.shared;
            let threads = Threads::new("raw", &self.0.shared, depth)?;
            Ok(Box::new(Bounce::new(threads, *geometry, depth, strays)))
        }
    }

    /// An image that keeps its reads waiting: the end of a pipe. Also its other end.
    fn stalling() -> (Raw, io::PipeWriter) {
        let (reader, writer) = io::pipe().unwrap();
        let image = Image {
            file: std::os::fd::OwnedFd::from(reader).into(),
            _locked: tempfile::tempfile().unwrap(),
            geometry: Geometry::plain(1 << 20),
            len: 1 << 20,
            is_device: false,
            window: None,
            read_now: Now::of(false),
            write_now: Now::of(false),
            knows_nowait: true,
            can_punch: AtomicBool::new(true),
            can_zero: AtomicBool::new(true),
            lost: Lost::default(),
            strays: Strays::default(),
            warned_of_shrinking: AtomicBool::new(false),
            warned_of_no_ring: AtomicBool::new(false),
        };
        (Raw { shared: Arc::new(image) }, writer)
    }

    #[test]
    fn behaves_as_a_disk_by_every_way_to_the_file() {
        let files =
            [image(CAPACITY as u64), image(CAPACITY as u64), image(CAPACITY as u64), in_memory(CAPACITY as u64)];
        exercise(&open(&files[0]));
        exercise(&without_shortcuts(open(&files[1])));
        exercise(&WithoutRing(open(&files[2])));
        exercise(&open(&files[3]));
    }

    #[test]
    fn behaves_as_a_disk_where_zeroes_have_to_be_written() {
        let file = image(CAPACITY as u64);
        let raw = without_shortcuts(open(&file));
        raw.shared.can_punch.store(false, Ordering::Relaxed);
        raw.shared.can_zero.store(false, Ordering::Relaxed);
        exercise(&raw);
    }

    #[test]
    fn what_the_file_system_cannot_zero_is_written() {
        let file = in_memory(CAPACITY as u64);
        let raw = open(&file);
        let mut driver = driver(&raw, CAPACITY);
        driver.write(0, &[1; CAPACITY]).unwrap();
        // More than one round of zeroes.
        driver.run(Operation::WriteZeroes { offset: 512, len: 300_000, unmap: false }, &[]).unwrap();
        assert!(!raw.shared.can_zero.load(Ordering::Relaxed), "tmpfs makes no zeroes in place");
        let mut expected = vec![1; CAPACITY];
        expected[512..300_512].fill(0);
        assert!(driver.read(0, CAPACITY).unwrap() == expected);
    }

    #[test]
    fn an_odd_size_is_rounded_up_with_zeroes() {
        for raw_of in [open, |file: &NamedTempFile| without_shortcuts(open(file))] {
            let mut file = image(0);
            file.write_all(&[1; 1000]).unwrap();
            let raw = raw_of(&file);
            assert_eq!(raw.geometry().capacity, 1024);
            let mut driver = driver(&raw, 4096);
            let mut expected = vec![1; 1000];
            expected.resize(1024, 0);
            assert_eq!(driver.read(0, 1024).unwrap(), expected);
            // Over three pieces, the last of them past the end of the file.
            driver.ram.slice(0, 4096).fill(0xee);
            driver.run(Operation::Read { offset: 512 }, &[(0, 400), (1000, 100), (2000, 12)]).unwrap();
            assert_eq!(driver.peek(1000, 100), [vec![1; 88], vec![0; 12]].concat());
            assert_eq!(driver.peek(2000, 13), [vec![0; 12], vec![0xee]].concat());

            driver.write(512, &[2; 512]).unwrap();
            assert_eq!(driver.read(512, 512).unwrap(), [2; 512]);
            assert_eq!(file.as_file().metadata().unwrap().len(), 1024);
        }
    }

    #[test]
    fn a_file_that_shrank_is_an_error_and_not_zeroes() {
        for raw_of in [open, |file: &NamedTempFile| without_shortcuts(open(file))] {
            let file = image(8192);
            let raw = raw_of(&file);
            file.as_file().set_len(4096).unwrap();
            let mut driver = driver(&raw, 8192);
            assert_eq!(driver.read(0, 8192).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            assert_eq!(driver.read(4096, 512).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            driver.read(0, 4096).unwrap();
        }
    }

    #[test]
    fn a_file_in_memory_that_shrank_is_an_error_too() {
        let mut file = in_memory(0);
        file.write_all(&[5; 3 << 20]).unwrap();
        let raw = open(&file);
        let mut driver = driver(&raw, 8192);
        for _ in 0..20 {
            assert_eq!(driver.read(1 << 20, 8192).unwrap(), [5; 8192]);
        }
        assert!(!raw.shared.window.as_ref().unwrap().is_lost());
        file.as_file().set_len(4096).unwrap();
        assert_eq!(driver.read(1 << 20, 8192).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(raw.shared.window.as_ref().unwrap().is_lost(), "it was in use");
        assert_eq!(driver.read(0, 4096).unwrap(), [5; 4096]);
        // As a call does it.
        driver.write(2 << 20, &[6; 512]).unwrap();
        assert_eq!(driver.read(2 << 20, 512).unwrap(), [6; 512]);
    }

    #[test]
    fn looking_at_a_file_in_memory_fills_no_holes() {
        let file = in_memory(8 << 20);
        let raw = open(&file);
        let blocks = || file.as_file().metadata().unwrap().blocks();
        let mut driver = driver(&raw, 4 << 20);
        driver.write(0, &[7; 4 << 20]).unwrap();
        let read_all = |driver: &mut Driver| {
            for at in (0..8 << 20).step_by(64 << 10) {
                driver.run(Operation::Read { offset: at }, &[(0, 64 << 10)]).unwrap();
            }
        };
        let full = blocks();
        for _ in 0..3 {
            read_all(&mut driver);
        }
        assert_eq!(blocks(), full);
        driver.run(Operation::Discard { offset: 1 << 20, len: 1 << 20 }, &[]).unwrap();
        for _ in 0..3 {
            read_all(&mut driver);
        }
        assert_eq!(full - blocks(), (1 << 20) / 512);
    }

    #[test]
    fn more_pieces_than_the_kernel_takes_at_once() {
        for raw_of in [open, |file: &NamedTempFile| without_shortcuts(open(file))] {
            let file = image(1 << 20);
            let mut driver = driver(&raw_of(&file), 1 << 20);
            let pieces: Vec<_> = (0..3072).map(|index| (index * 200, 1 + index % 2 * 165)).collect();
            let len: usize = pieces.iter().map(|piece| piece.1).sum();
            assert_eq!(len % 512, 0);
            for (index, &(at, len)) in pieces.iter().enumerate() {
                driver.ram.slice(at, len).fill(index as u8);
            }
            driver.run(Operation::Write { offset: 512, durability: Durability::Cached }, &pieces).unwrap();
            let expected: Vec<_> =
                pieces.iter().enumerate().flat_map(|(index, &(_, len))| vec![index as u8; len]).collect();
            let mut stored = vec![0; 512 + len];
            file.reopen().unwrap().read_exact(&mut stored).unwrap();
            assert!(stored[512..] == expected);
            driver.ram.slice(0, 1 << 20).fill(0xee);
            driver.run(Operation::Read { offset: 512 }, &pieces).unwrap();
            for (index, &(at, len)) in pieces.iter().enumerate() {
                assert_eq!(driver.peek(at, len + 1), [vec![index as u8; len], vec![0xee]].concat());
            }
        }
    }

    #[test]
    fn discarding_and_unmapping_free_space() {
        for file in [image(0), in_memory(0)] {
            for operation in [
                Operation::Discard { offset: 1 << 20, len: 1 << 20 },
                Operation::WriteZeroes { offset: 1 << 20, len: 1 << 20, unmap: true },
            ] {
                file.as_file().set_len(0).unwrap();
                file.as_file().set_len(4 << 20).unwrap();
                let raw = open(&file);
                let mut driver = driver(&raw, 4 << 20);
                driver.write(0, &[1; 4 << 20]).unwrap();
                file.as_file().sync_all().unwrap();
                let blocks = || file.as_file().metadata().unwrap().blocks();
                let before = blocks();
                driver.run(operation, &[]).unwrap();
                assert_eq!(before - blocks(), (1 << 20) / 512, "{operation:?}");
                let read = driver.read(0, 4 << 20).unwrap();
                assert!(read.iter().enumerate().all(|(at, &byte)| byte == u8::from(at >> 20 != 1)));
            }
        }
    }

    #[test]
    fn zeroes_that_are_to_stay_mapped_keep_their_space() {
        let file = image(1 << 20);
        let raw = open(&file);
        let mut driver = driver(&raw, 1 << 20);
        driver.write(0, &[1; 1 << 20]).unwrap();
        file.as_file().sync_all().unwrap();
        let before = file.as_file().metadata().unwrap().blocks();
        driver.run(Operation::WriteZeroes { offset: 0, len: 1 << 20, unmap: false }, &[]).unwrap();
        assert!(file.as_file().metadata().unwrap().blocks() >= before);
        assert!(driver.read(0, 1 << 20).unwrap() == vec![0; 1 << 20]);
    }

    #[test]
    fn read_only_stays_as_it_is() {
        let file = image(4096);
        refuses_every_change(&Raw::open(file.path(), true).unwrap());
        refuses_every_change(&WithoutRing(Raw::open(file.path(), true).unwrap()));
    }

    #[test]
    fn nobody_else_writes_what_is_served() {
        let file = image(4096);
        let attempt = |read_only| Raw::open(file.path(), read_only).map_err(|error| error.to_string());
        let writer = attempt(false).unwrap();
        let says = |refused: Result<Raw, String>, what: &str| {
            let refused = refused.err().expect("is locked");
            assert!(refused.contains(what), "{refused}");
        };
        says(attempt(false), "open for writing");
        says(attempt(true), "open for writing");
        drop(writer);
        let readers = [attempt(true).unwrap(), attempt(true).unwrap()];
        says(attempt(false), "relies on it not to change");
        drop(readers);
        attempt(false).unwrap();
    }

    #[test]
    fn qemu_respects_our_locks() {
        let file = image(1 << 20);
        let _raw = open(&file);
        let Ok(output) =
            Command::new("qemu-img").args(["bench", "-w", "-c", "1", "-f", "raw"]).arg(file.path()).output()
        else {
            eprintln!("SKIPPED: no qemu-img on this machine");
            return;
        };
        let says = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && says.contains("Failed to get \"write\" lock"), "{says}");
    }

    #[test]
    fn a_cancelled_operation_comes_back_and_its_token_serves_again() {
        let (raw, mut writer) = stalling();
        let mut driver = driver(&raw, 8192);
        driver.ram.slice(0, 8192).fill(0xee);
        for token in [3, 4] {
            let started = driver.start(token, Operation::Read { offset: 0 }, &[(usize::from(token) * 512, 512)]);
            assert!(matches!(started, Started::Pending));
        }
        driver.queue.submit().unwrap();
        driver.queue.completed(&mut |token, _| panic!("{token} ended, and nothing was there"));
        driver.queue.cancel(3);
        let ended = driver.wait();
        assert_eq!(ended.len(), 1);
        assert_eq!(ended[0].0, 3);
        assert_eq!(ended[0].1.as_ref().unwrap_err().raw_os_error(), Some(libc::ECANCELED));

        writer.write_all(&[1; 512]).unwrap();
        let ended = driver.wait();
        assert!(matches!(ended[..], [(4, Ok(()))]), "{ended:?}");
        assert_eq!(driver.peek(4 * 512, 512), [1; 512]);

        assert!(matches!(driver.start(3, Operation::Read { offset: 0 }, &[(3 * 512, 512)]), Started::Pending));
        writer.write_all(&[2; 512]).unwrap();
        let ended = driver.wait();
        assert!(matches!(ended[..], [(3, Ok(()))]), "{ended:?}");
        assert_eq!(driver.peek(3 * 512, 512), [2; 512]);
    }

    #[test]
    fn a_short_read_goes_on_where_it_stopped() {
        let (raw, mut writer) = stalling();
        let mut driver = driver(&raw, 4096);
        let started = driver.start(0, Operation::Read { offset: 0 }, &[(0, 100), (1000, 300), (2000, 112)]);
        assert!(matches!(started, Started::Pending));
        driver.queue.submit().unwrap();
        for (from, to) in [(0, 50), (50, 100), (100, 101), (101, 450)] {
            writer.write_all(&(from..to).map(|at| at as u8).collect::<Vec<_>>()).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(5));
            driver.queue.completed(&mut |_, _| panic!("ended after {to} bytes"));
        }
        writer.write_all(&(450..512).map(|at| at as u8).collect::<Vec<_>>()).unwrap();
        assert!(matches!(driver.wait()[..], [(0, Ok(()))]));
        let read = [driver.peek(0, 100), driver.peek(1000, 300), driver.peek(2000, 112)].concat();
        assert_eq!(read, (0..512).map(|at| at as u8).collect::<Vec<_>>());
    }

    #[test]
    fn a_queue_that_goes_takes_its_operations_back() {
        let (raw, mut writer) = stalling();
        let ram = Ram::new(4096);
        let mut queue = raw.open_queue(8).unwrap();
        for token in 0..8 {
            let piece = ram.slice(usize::from(token) * 512, 512).detach();
            // SAFETY: `ram` outlives the queue.
            let started = unsafe { queue.start(token, Operation::Read { offset: 0 }, &[piece]) };
            assert!(matches!(started, Started::Pending));
            if token == 5 {
                queue.submit().unwrap();
            }
        }
        drop(queue);
        writer.write_all(&[7; 4096]).unwrap();
        untouched_from_now_on(&ram);
        let mut bytes = [0; 4096];
        ram.slice(0, 4096).read(0, &mut bytes);
        assert!(!bytes.contains(&7), "memory was written after its queue had gone");
    }

    /// Not by the kernel, whose threads are in the middle of copying, and not by anybody before `go_on`.
    #[test]
    fn what_is_under_way_touches_none_of_its_pieces() {
        const LEN: usize = 64 << 20;
        let mut file = in_memory(0);
        file.write_all(&vec![7; LEN]).unwrap();
        let raw = without_shortcuts(open(&file));
        let ram = Ram::new(LEN);
        let mut queue = raw.open_queue(4).unwrap();
        for token in 0..4 {
            let at = usize::from(token) * (LEN / 4);
            let piece = ram.slice(at, LEN / 4).detach();
            // SAFETY: `ram` outlives the queue.
            let started = unsafe { queue.start(token, Operation::Read { offset: at as u64 }, &[piece]) };
            assert!(matches!(started, Started::Pending));
        }
        queue.submit().unwrap();
        let mut back = 0;
        while back < 4 {
            queue.completed(&mut |token, came| {
                assert!(matches!(came, Came::Data { done: 0 }), "token {token}: {came:?}");
                back += 1;
            });
        }
        queue.forget(3);
        drop(queue);
        let mut bytes = vec![1; LEN];
        ram.slice(0, LEN).read(0, &mut bytes);
        assert!(bytes.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn content_that_has_to_be_fetched_is_right() {
        const LEN: usize = 8 << 20;
        let mut file = image(0);
        let content: Vec<u8> = (0..LEN).map(|at| (at / 512) as u8).collect();
        file.write_all(&content).unwrap();
        file.as_file().sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut driver = driver(&open(&file), LEN);
        for (offset, len) in [(4096, 4096), (8192 - 512, 1 << 20), (0, LEN)] {
            assert!(driver.read(offset as u64, len).unwrap() == content[offset..offset + len], "{len} at {offset}");
        }
    }

    #[test]
    #[should_panic(expected = "token 0 is under way already")]
    fn a_token_given_twice_is_our_mistake() {
        let (raw, _writer) = stalling();
        let mut driver = driver(&raw, 4096);
        for _ in 0..2 {
            let _ = driver.start(0, Operation::Read { offset: 0 }, &[(0, 512)]);
        }
    }
}
