use crate::sigbus::{self, Watch};
use ringfence_dma::{FrontendVa, Gpa, HostSlice};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

/// A part of a file mapped here, readable and writable, shared with everybody who has the file.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// What the kernel mapped: whole pages.
    base: NonNull<u8>,
    mapped: usize,
    /// What was asked for, within that.
    start: NonNull<u8>,
    len: usize,
    watch: Watch,
    _room: Room,
}

/// The most that is mapped at once, in bytes: a quarter of the addresses that there are, and much more than a machine has
/// of memory. A file may be as long as it likes and cost nothing; whoever mapped enough of them here would leave no
/// addresses for anything of ours, and a process that can't allocate ends.
pub const MOST_MAPPED: u64 = 1 << 45;

/// How much is mapped, by everybody in this process.
static MAPPED: AtomicU64 = AtomicU64::new(0);

/// Room for so many bytes.
#[derive(Debug)]
struct Room(u64);

impl Room {
    fn take(len: u64) -> Option<Self> {
        let fits = |mapped: u64| mapped.checked_add(len).filter(|&sum| sum <= MOST_MAPPED);
        // Nothing is ordered by it.
        MAPPED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok().map(|_| Self(len))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

// SAFETY: owns its mapping; all access goes through `HostSlice`, which is made for sharing.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Why memory can't be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// A region without a byte.
    #[error("region at {gpa} has size 0")]
    Empty {
        /// Where it was to be.
        gpa: Gpa,
    },
    /// A region that passes the end of guest-physical, front-end virtual or file space.
    #[error("region at {gpa}: {size:#x} bytes pass the end of its {space}")]
    Wraps {
        /// Where it was to be.
        gpa: Gpa,
        /// Its size in bytes.
        size: u64,
        /// Which space it is.
        space: &'static str,
    },
    /// A region on top of another one, guest-physically.
    #[error("region at {gpa} overlaps the one at {other}")]
    GpaOverlap {
        /// Where it was to be.
        gpa: Gpa,
        /// Where the other one is.
        other: Gpa,
    },
    /// A region on top of another one in the front-end's virtual addresses.
    #[error("region at {gpa}: its front-end addresses from {va} overlap those of the region at {other}")]
    VaOverlap {
        /// Where it was to be.
        gpa: Gpa,
        /// Where it was to be for the front-end.
        va: FrontendVa,
        /// Where the other one is, guest-physically.
        other: Gpa,
    },
    /// More regions than are kept.
    #[error("more than {max} memory regions, or files of memory")]
    TooMany {
        /// How many are kept.
        max: usize,
    },
    /// A region that is to be removed and is not there.
    #[error("no region of {size:#x} bytes at {gpa} (front-end {va})")]
    Absent {
        /// Where it was said to be.
        gpa: Gpa,
        /// Where it was said to be for the front-end.
        va: FrontendVa,
        /// Its size in bytes.
        size: u64,
    },
    /// The file ends before the region does.
    #[error("the file has {file:#x} bytes, the region needs {needed:#x}")]
    FileTooShort {
        /// The file's size in bytes.
        file: u64,
        /// How many bytes it would need.
        needed: u64,
    },
    /// A descriptor that can't be written through.
    #[error("the memory's file descriptor is not open for reading and writing")]
    NotWritable,
    /// Something that has no pages: a pipe, a socket, a folder.
    #[error("the memory's file descriptor is not a file that can be mapped")]
    NotMappable,
    /// The kernel said no.
    #[error("can't map memory: {0}")]
    Kernel(#[from] Errno),
}

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    /// Reading and writing.
    ReadWrite,
    /// Reading alone: whoever hands its slices out sees to it that nobody writes through them.
    Read,
}

impl Mapping {
    /// Maps `len` bytes from `offset` of the file behind `fd`, which is not needed afterwards. `len` is not 0.
    pub(crate) fn new(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self, MapError> {
        Self::with(fd, offset, len, Purpose::ReadWrite)
    }

    /// The same, for a purpose.
    pub(crate) fn with(fd: BorrowedFd<'_>, offset: u64, len: usize, purpose: Purpose) -> Result<Self, MapError> {
        assert!(len > 0, "a mapping without a byte");
        let page = check_file(fd, offset, len, purpose)?;
        // The kernel maps whole pages, huge ones where the file has them.
        let lead = offset % page;
        let mapped = (lead + len as u64).checked_next_multiple_of(page).and_then(|mapped| usize::try_from(mapped).ok());
        let mapped = mapped.filter(|&mapped| mapped <= isize::MAX as usize).ok_or(Errno::NOMEM)?;
        let room = Room::take(mapped as u64).ok_or(Errno::NOMEM)?;
        sigbus::install()?;
        let protection = match purpose {
            Purpose::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
            Purpose::Read => ProtFlags::READ,
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap(ptr::null_mut(), mapped, protection, flags, fd, offset - lead) };
        let base = base.map_err(|errno| match errno {
            // A memfd sealed against writing, or a file opened through a read-only mount.
            Errno::PERM | Errno::ACCESS => MapError::NotWritable,
            Errno::NODEV => MapError::NotMappable,
            errno => errno.into(),
        })?;
        let base = NonNull::new(base.cast::<u8>()).expect("the kernel maps nothing at 0 unasked");
        // A guest's memory is no part of our core dumps. Failing that, dumps are larger and nothing else.
        // SAFETY: the mapping is ours, and this advice changes no byte of it.
        let _ = unsafe { madvise(base.as_ptr().cast(), mapped, Advice::LinuxDontDump) };
        // SAFETY: `lead` is less than a page and `len` more bytes follow it, see `mapped`.
        let start = unsafe { base.add(lead as usize) };
        Ok(Self { base, mapped, start, len, watch: sigbus::watch(base, mapped), _room: room })
    }

    pub(crate) fn slice(&self) -> HostSlice<'_> {
        // SAFETY: mapped until `self` is dropped, which the slice borrows; never referenced. Writable too, or nobody
        // writes, see `Purpose`. Pages that the file loses are replaced when they are touched, see `sigbus`.
        unsafe { HostSlice::new(self.start, self.len) }
    }

    pub(crate) fn take_away(&self) -> bool {
        self.watch.lose()
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.watch.is_lost()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First of all, so that no fault is taken for ours once something else is mapped there.
        self.watch.end();
        // SAFETY: mapped in `new` with this length; every slice borrowed `self` and is gone.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.mapped) };
        assert!(unmapped.is_ok(), "unmapping memory of our own: {unmapped:?}");
    }
}

/// Looks at what can be known before mapping, so that the error says what is wrong. The file's page size in bytes.
///
/// The front-end can change the file afterwards: nothing but the error depends on this. SIGBUS is what protects.
fn check_file(fd: BorrowedFd<'_>, offset: u64, len: usize, purpose: Purpose) -> Result<u64, MapError> {
    match fcntl_getfl(fd)? & OFlags::RWMODE {
        OFlags::RDWR => {}
        OFlags::RDONLY if purpose == Purpose::Read => {}
        _ => return Err(MapError::NotWritable),
    }
    let stat = fstat(fd)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let file = u64::try_from(stat.st_size).unwrap_or(0);
            // No file is longer than i64 counts, so this cannot wrap; where it would, the file is too short.
            let needed = offset.saturating_add(len as u64);
            if file < needed {
                return Err(MapError::FileTooShort { file, needed });
            }
        }
        // Persistent memory and the like have no size to look at.
        FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => {}
        FileType::Directory | FileType::Fifo | FileType::Socket | FileType::Symlink => {
            return Err(MapError::NotMappable);
        }
    }
    let system = rustix::param::page_size() as u64;
    let statfs = fstatfs(fd)?;
    let huge = statfs.f_type == libc::HUGETLBFS_MAGIC;
    let page = if huge { u64::try_from(statfs.f_bsize).unwrap_or(system) } else { system };
    Ok(if page.is_power_of_two() { page.max(system) } else { system })
}
