use crate::MapError;
use crate::mapping::Mapping;
use ringfence_dma::{FrontendVa, Gpa, HostSlice};
use std::os::fd::{AsFd, OwnedFd};

/// Where a region of guest memory lies for whom, as a front-end says it. Anything may be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Where the front-end sees it.
    pub frontend_va: FrontendVa,
    /// How many bytes.
    pub size: u64,
    /// Where it starts in its file, in bytes.
    pub offset: u64,
}

/// A region of guest memory mapped here. Never empty, and no range of it wraps.
#[derive(Debug)]
pub struct Region {
    gpa: Gpa,
    frontend_va: FrontendVa,
    mapping: Mapping,
}

impl Region {
    /// Maps a region.
    ///
    /// # Errors
    /// The placement is none, the file has not the bytes, or it can't be mapped for reading and writing.
    pub fn map(placement: Placement, fd: OwnedFd) -> Result<Self, MapError> {
        let Placement { gpa, frontend_va, size, offset } = placement;
        if size == 0 {
            return Err(MapError::Empty { gpa });
        }
        let wraps = |space| MapError::Wraps { gpa, size, space };
        gpa.last(size).ok_or(wraps("guest-physical addresses"))?;
        frontend_va.last(size).ok_or(wraps("front-end addresses"))?;
        let end = offset.checked_add(size).filter(|&end| i64::try_from(end).is_ok());
        end.ok_or(wraps("file"))?;
        let len = usize::try_from(size).map_err(|_| wraps("host addresses"))?;
        Ok(Self { gpa, frontend_va, mapping: Mapping::new(fd.as_fd(), offset, len)? })
    }

    /// Where the guest sees it.
    #[inline]
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// Where the front-end sees it.
    #[inline]
    pub fn frontend_va(&self) -> FrontendVa {
        self.frontend_va
    }

    /// How many bytes.
    #[inline]
    pub fn size(&self) -> u64 {
        self.slice().len() as u64
    }

    /// All of it.
    #[inline]
    pub fn slice(&self) -> HostSlice<'_> {
        self.mapping.slice()
    }

    /// Whether the front-end took the file away under the mapping, and somebody noticed. From then on the region is
    /// memory that nobody else sees: whatever was read may be zeroes that were never written, and nothing that is
    /// written arrives. The connection is of no use any more.
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Takes the memory away from everybody in this process who still has an address in it, wherever they are: from now on
    /// they touch memory that nobody else sees, and the region [is lost](Self::is_lost). For those who do not come back
    /// from touching it. `false`: the kernel can't.
    ///
    /// This reaches whoever goes through this process's page tables: its threads, and system calls of theirs that copy.
    /// It would not reach a device or a file system of the kernel that has looked the pages up; none is ever given these.
    pub fn take_away(&self) -> bool {
        self.mapping.take_away()
    }

    /// From `gpa` on, at most `len` bytes, if it is in here.
    #[inline]
    pub(crate) fn at_gpa(&self, gpa: Gpa, len: usize) -> Option<HostSlice<'_>> {
        self.from(gpa.0.checked_sub(self.gpa.0)?, len)
    }

    /// From `va` on, at most `len` bytes, if it is in here.
    #[inline]
    pub(crate) fn at_va(&self, va: FrontendVa, len: usize) -> Option<HostSlice<'_>> {
        self.from(va.0.checked_sub(self.frontend_va.0)?, len)
    }

    #[inline]
    fn from(&self, offset: u64, len: usize) -> Option<HostSlice<'_>> {
        let all = self.slice();
        let offset = usize::try_from(offset).ok().filter(|&offset| offset < all.len())?;
        Some(all.sub(offset, len.min(all.len() - offset)))
    }
}
