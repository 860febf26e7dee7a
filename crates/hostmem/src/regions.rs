use crate::{MapError, Placement, Region};
use ringfence_dma::{FrontendVa, Gpa, HostSlice, Physical};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The most regions that a table keeps. QEMU never has more than 512.
pub const MAX_REGIONS: usize = 512;

/// A memory table: disjoint regions, found by guest-physical and by front-end address.
///
/// A clone shares the regions: a table can be changed while others still look at the old one.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    /// By `gpa`.
    by_gpa: Vec<Arc<Region>>,
    /// The same, by `frontend_va`.
    by_va: Vec<Arc<Region>>,
}

impl Regions {
    /// Maps a whole table.
    ///
    /// # Errors
    /// Of the first region that can't be had; nothing is mapped then.
    pub fn new(table: Vec<(Placement, OwnedFd)>) -> Result<Self, MapError> {
        let mut regions = Self::default();
        table.into_iter().try_for_each(|(placement, fd)| regions.add(placement, fd))?;
        Ok(regions)
    }

    /// Maps one more region.
    ///
    /// # Errors
    /// It overlaps another one, there are too many, or it can't be mapped; the table is as it was.
    pub fn add(&mut self, placement: Placement, fd: OwnedFd) -> Result<(), MapError> {
        if self.len() >= MAX_REGIONS {
            return Err(MapError::TooMany { max: MAX_REGIONS });
        }
        let region = Arc::new(Region::map(placement, fd)?);
        let (gpa, va, size) = (region.gpa(), region.frontend_va(), region.size());
        let at_gpa = self.by_gpa.partition_point(|other| other.gpa() < gpa);
        let at_va = self.by_va.partition_point(|other| other.frontend_va() < va);
        if let Some(other) = overlap(&self.by_gpa, at_gpa, gpa.0, size, |region| region.gpa().0) {
            return Err(MapError::GpaOverlap { gpa, other });
        }
        if let Some(other) = overlap(&self.by_va, at_va, va.0, size, |region| region.frontend_va().0) {
            return Err(MapError::VaOverlap { gpa, va, other });
        }
        self.by_gpa.insert(at_gpa, Arc::clone(&region));
        self.by_va.insert(at_va, region);
        Ok(())
    }

    /// Takes a region out. It stays mapped for as long as somebody else holds it. `offset` means nothing here.
    ///
    /// # Errors
    /// There is none of this address, front-end address and size.
    pub fn remove(&mut self, placement: &Placement) -> Result<Arc<Region>, MapError> {
        let &Placement { gpa, frontend_va: va, size, offset: _ } = placement;
        let same = |region: &Arc<Region>| region.gpa() == gpa && region.frontend_va() == va && region.size() == size;
        let absent = MapError::Absent { gpa, va, size };
        let at_gpa = self.by_gpa.iter().position(same).ok_or(absent)?;
        let at_va = self.by_va.iter().position(same).expect("both lists hold the same regions");
        self.by_va.remove(at_va);
        Ok(self.by_gpa.remove(at_gpa))
    }

    /// How many regions.
    pub fn len(&self) -> usize {
        self.by_gpa.len()
    }

    /// Whether there is no memory at all.
    pub fn is_empty(&self) -> bool {
        self.by_gpa.is_empty()
    }

    /// All regions, by guest-physical address.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Region>> {
        self.by_gpa.iter()
    }

    /// Whether the front-end took a file away under one of them, see [`Region::is_lost`].
    pub fn is_lost(&self) -> bool {
        self.iter().any(|region| region.is_lost())
    }

    /// What the guest calls the byte that the front-end calls `va`.
    pub fn gpa(&self, va: FrontendVa) -> Option<Gpa> {
        let region = self.by_va[..self.by_va.partition_point(|region| region.frontend_va() <= va)].last()?;
        region.at_va(va, 1)?;
        region.gpa().checked_add(va.0 - region.frontend_va().0)
    }

    /// The memory of `len` bytes from `va`, in order. `None` where a single byte of them is in no region, or there are
    /// none, or they pass the end of the address space.
    pub fn pieces(&self, va: FrontendVa, len: u64) -> Option<Pieces<'_>> {
        let last = va.last(len)?;
        let first = self.by_va.partition_point(|region| region.frontend_va() <= va).checked_sub(1)?;
        let regions = &self.by_va[first..];
        let mut next = va;
        for region in regions {
            let piece = region.at_va(next, usize::MAX)?;
            // The last byte of a region, so that the sum cannot wrap.
            let end = next.last(piece.len() as u64)?;
            if end >= last {
                return Some(Pieces { regions, next: va, last });
            }
            next = end.checked_add(1)?;
        }
        None
    }
}

impl Physical for Regions {
    #[inline]
    fn slice(&self, gpa: Gpa, len: usize) -> Option<HostSlice<'_>> {
        let before = self.by_gpa.partition_point(|region| region.gpa() <= gpa);
        self.by_gpa[..before].last()?.at_gpa(gpa, len)
    }
}

/// See [`Regions::pieces`].
#[derive(Debug)]
pub struct Pieces<'r> {
    /// Those that are left, neighbours in the front-end's addresses; `next` is in the first, `last` in one of them.
    regions: &'r [Arc<Region>],
    next: FrontendVa,
    last: FrontendVa,
}

impl<'r> Iterator for Pieces<'r> {
    type Item = HostSlice<'r>;

    fn next(&mut self) -> Option<HostSlice<'r>> {
        let (region, rest) = self.regions.split_first()?;
        let wanted = usize::try_from(self.last.0 - self.next.0).unwrap_or(usize::MAX).saturating_add(1);
        let piece = region.at_va(self.next, wanted).expect("checked by `pieces`");
        match self.next.checked_add(piece.len() as u64).filter(|next| *next <= self.last) {
            Some(next) => (self.regions, self.next) = (rest, next),
            None => self.regions = &[],
        }
        Some(piece)
    }
}

/// Which of the neighbours of place `at` in a sorted list of disjoint regions a new range overlaps.
fn overlap(sorted: &[Arc<Region>], at: usize, start: u64, size: u64, key: fn(&Region) -> u64) -> Option<Gpa> {
    let neighbours = [at.checked_sub(1), Some(at)].into_iter().flatten().filter_map(|index| sorted.get(index));
    let last = |start: u64, size: u64| start + (size - 1);
    let mut hit = neighbours.filter(|other| {
        let other_start = key(other);
        start <= last(other_start, other.size()) && other_start <= last(start, size)
    });
    hit.next().map(|other| other.gpa())
}

#[cfg(test)]
mod tests;
