use crate::MapError;
use crate::mapping::Mapping;
use ringfence_dma::{Gpa, HostSlice, Physical};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Memory of our own that other processes can map: an anonymous file, zeroed.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    mapping: Mapping,
}

impl SharedMemory {
    /// `len` bytes. `len` is not 0.
    ///
    /// # Errors
    /// The host is short of something.
    pub fn new(len: usize) -> Result<Self, MapError> {
        let fd = memfd_create("ringfence", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, len as u64)?;
        let mapping = Mapping::new(fd.as_fd(), 0, len)?;
        Ok(Self { fd, mapping })
    }

    /// Makes its length final: whoever gets the file can rely on its bytes being there.
    ///
    /// # Errors
    /// Somebody has sealed the file against seals.
    pub fn seal_length(&self) -> Result<(), MapError> {
        Ok(fcntl_add_seals(&self.fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?)
    }

    /// How many bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty, see `new`")]
    pub fn len(&self) -> usize {
        self.mapping.slice().len()
    }

    /// `len` bytes from `offset`; out of bounds panics.
    pub fn slice(&self, offset: usize, len: usize) -> HostSlice<'_> {
        self.mapping.slice().sub(offset, len)
    }
}

/// At guest-physical 0.
impl Physical for SharedMemory {
    fn slice(&self, gpa: Gpa, len: usize) -> Option<HostSlice<'_>> {
        let offset = usize::try_from(gpa.0).ok().filter(|&offset| offset < self.len())?;
        Some(SharedMemory::slice(self, offset, len.min(self.len() - offset)))
    }
}

/// The file, to be sent to others.
impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
