use crate::MapError;
use crate::mapping::{Mapping, Purpose};
use ringfence_dma::{HostSlice, Permission};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

/// The most files that are mapped at once. The kernel keeps some 65000 mappings for a process, and one that has no more of
/// them can't even allocate.
pub const MAX_FILES: usize = 4096;

/// Files that others grant parts of, page by page if they like: each is mapped once and in whole, so that a grant costs a
/// look at which file it is, and never one of the mappings that the kernel has so few of.
#[derive(Debug, Default)]
pub struct Files {
    /// What somebody still has a part of; the rest goes when another file comes.
    mapped: HashMap<Key, Weak<Mapping>>,
    /// What is mapped for one part alone, or was mapped before the file grew.
    alone: Vec<Weak<Mapping>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: u64,
    inode: u64,
    purpose: Purpose,
}

/// A part of a file. The file stays mapped for as long as there is one of it.
#[derive(Clone, Debug)]
pub struct Part {
    mapping: Arc<Mapping>,
    start: usize,
    len: usize,
}

impl Files {
    /// `len` bytes from `offset` of the file behind `fd`. `len` is not 0.
    ///
    /// A file that is not open for writing can have parts that nobody writes to: whoever gets one with
    /// [`Permission::ReadOnly`] must not.
    ///
    /// # Errors
    /// The file has not the bytes, is none that can be mapped as `permission` needs it, or there are too many.
    pub fn part(&mut self, fd: OwnedFd, offset: u64, len: usize, permission: Permission) -> Result<Part, MapError> {
        match self.part_for(fd.as_fd(), offset, len, Purpose::ReadWrite) {
            Err(MapError::NotWritable) if permission == Permission::ReadOnly => {
                self.part_for(fd.as_fd(), offset, len, Purpose::Read)
            }
            part => part,
        }
    }

    /// How many files are mapped.
    pub fn len(&self) -> usize {
        self.mapped.values().chain(&self.alone).filter(|file| file.strong_count() > 0).count()
    }

    /// Whether one of them was cut short, see [`Region::is_lost`](crate::Region::is_lost).
    pub fn is_lost(&self) -> bool {
        self.files().any(|file| file.is_lost())
    }

    /// As [`Region::take_away`](crate::Region::take_away), all of them.
    pub fn take_away(&self) -> bool {
        // All, also after one that could not be.
        self.files().filter(|file| !file.take_away()).count() == 0
    }

    fn files(&self) -> impl Iterator<Item = Arc<Mapping>> {
        self.mapped.values().chain(&self.alone).filter_map(Weak::upgrade)
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn part_for(&mut self, fd: BorrowedFd<'_>, offset: u64, len: usize, purpose: Purpose) -> Result<Part, MapError> {
        let stat = fstat(fd)?;
        let writable = fcntl_getfl(fd)? & OFlags::RWMODE == OFlags::RDWR;
        if purpose == Purpose::ReadWrite && !writable {
            return Err(MapError::NotWritable);
        }
        // The inode can't be another file's: a file that is mapped keeps it.
        let key = Key { device: stat.st_dev, inode: stat.st_ino, purpose };
        if let Some(mapping) = self.mapped.get(&key).and_then(Weak::upgrade)
            && let Some(part) = Part::of(mapping, offset, len)
        {
            return Ok(part);
        }
        self.make_room()?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let has_size = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let whole = usize::try_from(size).ok().filter(|&whole| has_size && whole > 0);
        if let Some(whole) = whole
            && let Ok(mapping) = Mapping::with(fd, 0, whole, purpose)
        {
            let mapping = Arc::new(mapping);
            if let Some(part) = Part::of(Arc::clone(&mapping), offset, len) {
                // One that has grown may still have parts elsewhere.
                self.alone.extend(self.mapped.insert(key, Arc::downgrade(&mapping)));
                return Ok(part);
            }
        }
        // Larger than there are addresses, or without a size; or too short, which this says.
        let mapping = Arc::new(Mapping::with(fd, offset, len, purpose)?);
        self.alone.push(Arc::downgrade(&mapping));
        Ok(Part { mapping, start: 0, len })
    }

    /// Forgets what is not mapped any more.
    fn make_room(&mut self) -> Result<(), MapError> {
        self.mapped.retain(|_, file| file.strong_count() > 0);
        self.alone.retain(|file| file.strong_count() > 0);
        if self.mapped.len() + self.alone.len() < MAX_FILES {
            Ok(())
        } else {
            Err(MapError::TooMany { max: MAX_FILES })
        }
    }
}

impl Part {
    fn of(mapping: Arc<Mapping>, offset: u64, len: usize) -> Option<Self> {
        let start = usize::try_from(offset).ok()?;
        start.checked_add(len).filter(|&end| end <= mapping.slice().len())?;
        Some(Self { mapping, start, len })
    }

    /// Its bytes.
    pub fn slice(&self) -> HostSlice<'_> {
        self.mapping.slice().sub(self.start, self.len)
    }

    /// As [`Region::is_lost`](crate::Region::is_lost), of the whole file.
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, Mode, ftruncate, memfd_create, open};
    use std::os::fd::AsRawFd;

    fn memfd(len: u64) -> OwnedFd {
        let fd = memfd_create("files", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        fd
    }

    fn read_only(fd: &OwnedFd) -> OwnedFd {
        open(format!("/proc/self/fd/{}", fd.as_raw_fd()), OFlags::RDONLY, Mode::empty()).unwrap()
    }

    #[test]
    fn a_file_is_mapped_once_however_many_parts_are_granted() {
        let fd = memfd(1 << 20);
        let mut files = Files::default();
        let part = |files: &mut Files, at: u64| {
            files.part(fd.try_clone().unwrap(), at << 12, 4096, Permission::ReadWrite).unwrap()
        };
        let parts: Vec<_> = (0..256).map(|at| part(&mut files, at)).collect();
        assert_eq!(files.len(), 1);
        parts[7].slice().write(0, b"seven");
        let mut seen = [0; 5];
        part(&mut files, 7).slice().read(0, &mut seen);
        assert_eq!(&seen, b"seven");
        drop(parts);
        assert!(files.is_empty(), "nobody has a part any more");
    }

    #[test]
    fn a_file_that_grew_is_mapped_again() {
        let fd = memfd(4096);
        let mut files = Files::default();
        let mut part = |at| files.part(fd.try_clone().unwrap(), at, 4096, Permission::ReadWrite);
        let first = part(0).unwrap();
        assert!(matches!(part(4096), Err(MapError::FileTooShort { .. })));
        ftruncate(&fd, 8192).unwrap();
        part(4096).unwrap().slice().write(0, b"x");
        first.slice().write(0, b"y");
    }

    #[test]
    fn a_file_that_can_not_be_written_has_parts_for_reading() {
        let fd = memfd(4096);
        let mut files = Files::default();
        let writable = files.part(fd.try_clone().unwrap(), 0, 4096, Permission::ReadOnly).unwrap();
        writable.slice().write(0, b"z");
        let refused = files.part(read_only(&fd), 0, 4096, Permission::ReadWrite);
        assert!(matches!(refused, Err(MapError::NotWritable)));
        let part = files.part(read_only(&fd), 0, 4096, Permission::ReadOnly).unwrap();
        let mut seen = [0];
        part.slice().read(0, &mut seen);
        assert_eq!(&seen, b"z");
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut files = Files::default();
        for fd in [OwnedFd::from(reader), writer.into(), std::fs::File::open("/").unwrap().into()] {
            files.part(fd, 0, 4096, Permission::ReadOnly).unwrap_err();
        }
        assert!(files.is_empty());
    }

    #[test]
    fn there_are_not_too_many() {
        let mut files = Files::default();
        let kept: Vec<_> =
            (0..MAX_FILES).map(|_| files.part(memfd(4096), 0, 4096, Permission::ReadWrite).unwrap()).collect();
        let refused = files.part(memfd(4096), 0, 4096, Permission::ReadWrite);
        assert!(matches!(refused, Err(MapError::TooMany { .. })));
        drop(kept);
        files.part(memfd(4096), 0, 4096, Permission::ReadWrite).unwrap();
    }
}
