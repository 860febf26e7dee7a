use super::PAGE;
use alloc::vec::Vec;
use ringfence_dma::{Both, Buffer, BusAddr, DmaError, HostSlice, Mapped, Mapper, Permission, Pool, Streaming};

/// Memory that is mapped once, for reading and writing, and stays mapped: static mappings.
///
/// Fast, and the least protection that an IOMMU can give: the device reaches all of the regions all the time, whatever
/// a request's direction. What is outside of them stays out of reach.
#[derive(Debug)]
pub struct Premapped<'a, M: Mapper + ?Sized> {
    regions: Vec<Region<'a, M>>,
    coherent: Pool<'a>,
    coherent_addr: BusAddr,
    _coherent_mapping: Streaming<'a, M, Both>,
}

#[derive(Debug)]
struct Region<'a, M: Mapper + ?Sized> {
    physical: u64,
    len: usize,
    mapping: Streaming<'a, M, Both>,
}

impl<'a, M: Mapper + ?Sized> Premapped<'a, M> {
    /// Maps `regions`, in which all buffers will be, and `coherent`, which is set aside for rings, through `inner`: a
    /// mapper whose device sees the driver's own bytes, an IOMMU's for example, and not a bounce pool.
    ///
    /// Panics where `coherent` does not start on a page of 4096 bytes.
    ///
    /// # Errors
    /// Those of [`Streaming::map`]; nothing stays mapped then.
    pub fn new(inner: &'a M, regions: &[Buffer<'a>], coherent: Buffer<'a>) -> Result<Self, DmaError> {
        let regions = regions.iter().map(|&buffer| {
            let mapping = Streaming::map(inner, buffer, Both)?;
            Ok(Region { physical: buffer.physical().0, len: buffer.len(), mapping })
        });
        let regions = regions.collect::<Result<_, DmaError>>()?;
        let coherent_mapping = Streaming::map(inner, coherent, Both)?;
        let coherent_addr = coherent_mapping.addr();
        Ok(Self { regions, coherent: Pool::new(coherent, PAGE), coherent_addr, _coherent_mapping: coherent_mapping })
    }
}

impl<M: Mapper + ?Sized> Mapper for Premapped<'_, M> {
    #[inline]
    fn max_len(&self) -> usize {
        usize::MAX
    }

    #[inline]
    fn map(&self, buffer: Buffer<'_>, _: Permission) -> Result<Mapped, DmaError> {
        let physical = buffer.physical();
        // A guest's memory is a handful of regions.
        let found = self.regions.iter().find_map(|region| {
            let offset = physical.0.checked_sub(region.physical)?;
            let room = (region.len as u64).checked_sub(offset)?;
            (buffer.len() as u64 <= room).then(|| BusAddr(region.mapping.addr().0 + offset))
        });
        let addr = found.ok_or(DmaError::Unreachable { physical })?;
        Ok(Mapped { addr, len: buffer.len(), cookie: 0 })
    }

    #[inline]
    fn unmap(&self, _: Mapped, _: Buffer<'_>, _: Permission) {}

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        let cookie = self.coherent.take(len)?;
        let addr = BusAddr(self.coherent_addr.0 + cookie as u64);
        Ok((Mapped { addr, len, cookie }, self.coherent.buffer().sub(cookie, len).memory()))
    }

    fn free(&self, mapped: Mapped) {
        self.coherent.give_back(mapped.cookie, mapped.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::sync::Arc;
    use ringfence_dma::{Access, Coherent, FromDevice, Gpa, Memory, Ram, ToDevice, Visit};
    use ringfence_iommu::{Domain, Strict, Walk};

    #[test]
    fn what_is_mapped_once_is_reached_at_other_addresses_and_all_the_time() {
        let ram = Ram::new(8 * PAGE);
        let page = |first: usize, pages| Buffer::new(ram.slice(first * PAGE, pages * PAGE), Gpa((first * PAGE) as u64));
        let domain = Arc::new(Domain::default());
        let iommu = Strict::new(domain.clone(), page(0, 1));
        let mapper = Premapped::new(&iommu, &[page(2, 2), page(5, 1)], page(1, 1)).unwrap();
        assert_eq!(domain.mapped(), 3);

        let mut device = Walk::new(domain.clone(), &ram);
        for (first, offset, len) in [(2, 7, 2 * PAGE - 7), (5, 0, PAGE)] {
            let buffer = page(first, len.div_ceil(PAGE)).sub(offset, len);
            let mapping = Streaming::map(&mapper, buffer, FromDevice).unwrap();
            let addr = mapping.addr();
            assert_ne!(addr.0, buffer.physical().0);
            drop(mapping);
            let visit = device.visit();
            let seen = visit.resolve(addr, len, Access::Write, None).unwrap();
            assert_eq!((seen.as_ptr(), seen.len()), (buffer.memory().as_ptr(), len));
        }
        let coherent = Coherent::allocate(&mapper, 100).unwrap();
        let visit = device.visit();
        let seen = visit.resolve(coherent.addr(), 100, Access::Read, None).unwrap();
        assert_eq!(seen.as_ptr(), coherent.memory().as_ptr());
        drop(visit);

        for (first, pages) in [(4, 1), (3, 2), (0, 1), (7, 1)] {
            let physical = Gpa((first * PAGE) as u64);
            let error = Streaming::map(&mapper, page(first, pages), ToDevice).err();
            assert_eq!(error, Some(DmaError::Unreachable { physical }));
        }
        drop(coherent);
        drop(mapper);
        assert_eq!(domain.mapped(), 0);
    }
}
