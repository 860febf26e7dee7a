use super::paged::{Pages, Run};
use ringfence_dma::{BusAddr, DmaError, Gpa, Granules, Permission};

/// One device's address space in an IOMMU: what a kernel's IOMMU driver implements, and the driver of virtio-iommu does.
pub trait Iommu {
    /// How long a page is: a power of two.
    fn page(&self) -> usize;

    /// Maps `len` bytes at `addr` to memory from `physical` on, whole pages all. Nothing is mapped there.
    ///
    /// # Errors
    /// Any [`DmaError`]; nothing is mapped then.
    fn map(&self, addr: BusAddr, physical: Gpa, len: usize, permission: Permission) -> Result<(), DmaError>;

    /// Takes mappings away, each as it was made. Returns when no copy of any of them is used any more, wherever it is
    /// kept: one invalidation for all of them will do.
    ///
    /// # Errors
    /// That can't be had.
    fn unmap(&self, runs: &[Run]) -> Result<(), DmaError>;
}

impl<I: Iommu + ?Sized> Iommu for &I {
    fn page(&self) -> usize {
        (**self).page()
    }

    fn map(&self, addr: BusAddr, physical: Gpa, len: usize, permission: Permission) -> Result<(), DmaError> {
        (**self).map(addr, physical, len, permission)
    }

    fn unmap(&self, runs: &[Run]) -> Result<(), DmaError> {
        (**self).unmap(runs)
    }
}

/// The bus addresses that a device is given, out of the address space that an [`Iommu`] makes for it.
///
/// They are handed out one after the other, and what came back last comes last: a device that keeps to an old address
/// faults for as long as possible.
#[derive(Debug)]
pub struct Window<I> {
    iommu: I,
    first: BusAddr,
    granules: Granules,
}

impl<I: Iommu> Window<I> {
    /// `pages` pages from `first` on; a bit of memory each. Panics where `first` is not on a page, there are fewer than
    /// two, or they pass the end of the address space.
    pub fn new(iommu: I, first: BusAddr, pages: usize) -> Self {
        let page = iommu.page() as u64;
        let last = (pages as u64).checked_mul(page).and_then(|len| first.last(len));
        assert!(pages > 1 && first.0.is_multiple_of(page) && last.is_some(), "{pages} pages at {first}");
        Self { iommu, first, granules: Granules::new(pages) }
    }

    /// The address space.
    pub fn iommu(&self) -> &I {
        &self.iommu
    }

    fn give_back(&self, run: &Run) {
        let page = self.iommu.page();
        self.granules.give_back((run.addr.0 - self.first.0) as usize / page, run.len / page);
    }
}

impl<I: Iommu> Pages for Window<I> {
    fn page(&self) -> usize {
        self.iommu.page()
    }

    fn max_len(&self) -> usize {
        self.granules.count().saturating_mul(self.iommu.page())
    }

    fn show(&self, physical: Gpa, len: usize, permission: Permission) -> Result<BusAddr, DmaError> {
        let page = self.iommu.page();
        let first = self.granules.take(len / page).ok_or(DmaError::OutOfAddresses { wanted: len })?;
        let addr = BusAddr(self.first.0 + (first * page) as u64);
        match self.iommu.map(addr, physical, len, permission) {
            Ok(()) => Ok(addr),
            Err(error) => {
                self.give_back(&Run { addr, len });
                Err(error)
            }
        }
    }

    fn hide(&self, runs: &[Run]) -> Result<(), DmaError> {
        self.iommu.unmap(runs)?;
        runs.iter().for_each(|run| self.give_back(run));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapper::{PAGE, Paged};
    use alloc::sync::Arc;
    use alloc::vec::Vec;
    use core::cell::{Cell, RefCell};
    use ringfence_dma::{Access, Buffer, Coherent, FromDevice, Mapper, Memory, Ram, Streaming, ToDevice, Visit};
    use ringfence_iommu::{Domain, Mapping, Walk};

    /// The software IOMMU, which counts invalidations and may refuse one.
    #[derive(Default)]
    struct Counting {
        domain: Arc<Domain>,
        invalidations: RefCell<Vec<usize>>,
        broken: Cell<bool>,
    }

    impl Iommu for Counting {
        fn page(&self) -> usize {
            PAGE
        }

        fn map(&self, addr: BusAddr, gpa: Gpa, len: usize, permission: Permission) -> Result<(), DmaError> {
            let mapping = Mapping { addr, gpa, len: len as u64, permission };
            self.domain.map_at(mapping).map_err(|_| DmaError::Platform { code: 1 })
        }

        fn unmap(&self, runs: &[Run]) -> Result<(), DmaError> {
            if self.broken.get() {
                return Err(DmaError::Platform { code: 2 });
            }
            self.invalidations.borrow_mut().push(runs.len());
            runs.iter().for_each(|run| self.domain.unmap(run.addr, run.len as u64).unwrap());
            Ok(())
        }
    }

    const FIRST: BusAddr = BusAddr(0x7000_0000_0000);

    fn page(ram: &Ram, first: usize, pages: usize) -> Buffer<'_> {
        Buffer::new(ram.slice(first * PAGE, pages * PAGE), Gpa((first * PAGE) as u64))
    }

    #[test]
    fn what_came_back_is_out_of_reach_at_once_or_in_batches() {
        let ram = Ram::new(16 * PAGE);
        for batch in [1, 3] {
            let iommu = Counting::default();
            let mut device = Walk::new(iommu.domain.clone(), &ram);
            let window = Window::new(&iommu, FIRST, 64);
            let mapper = match batch {
                1 => Paged::strict(window, page(&ram, 0, 2)),
                _ => Paged::batched(window, page(&ram, 0, 2), batch),
            };
            let mut addrs = Vec::new();
            for round in 1..=7 {
                // From the end of one page to the beginning of the next.
                let buffer = page(&ram, 4, 4).sub(PAGE - 1, 2);
                let lent = Streaming::map(&mapper, buffer, FromDevice).unwrap();
                assert_eq!(lent.addr().0 % PAGE as u64, PAGE as u64 - 1);
                assert!(!addrs.contains(&lent.addr()), "an address that came back is used again late");
                addrs.push(lent.addr());
                let visit = device.visit();
                let seen = visit.resolve(lent.addr(), 2, Access::Write, None).unwrap();
                assert_eq!((seen.as_ptr(), seen.len()), (buffer.memory().as_ptr(), 2));
                assert!(visit.resolve(lent.addr(), 2, Access::Read, None).is_err());
                drop(visit);
                drop(lent);
                assert_eq!(iommu.domain.mapped(), round % batch, "round {round}");
            }
            mapper.flush();
            assert_eq!(iommu.domain.mapped(), 0);
            let full = iommu.invalidations.borrow().iter().filter(|&&runs| runs == batch).count();
            assert_eq!(full, 7 / batch);
            // Rings do not wait for others.
            drop(Coherent::allocate(&mapper, 2 * PAGE).unwrap());
            assert_eq!(iommu.domain.mapped(), 0);
            drop(Streaming::map(&mapper, page(&ram, 4, 1), ToDevice).unwrap());
            drop(mapper);
            assert_eq!(iommu.domain.mapped(), 0, "a batch does not outlive its mapper");
        }
    }

    #[test]
    fn addresses_run_out_with_a_name_and_a_batch_is_cut_short_for_them() {
        let ram = Ram::new(16 * PAGE);
        let iommu = Counting::default();
        let mapper = Paged::batched(Window::new(&iommu, FIRST, 4), page(&ram, 0, 1), 100);
        assert_eq!(mapper.max_len(), 3 * PAGE + 1);
        let map = |pages| Streaming::map(&mapper, page(&ram, 4, pages), ToDevice);
        let held = map(2).unwrap();
        drop(map(1).unwrap());
        drop(map(1).unwrap());
        assert!(iommu.invalidations.borrow().is_empty());
        let both = map(2).unwrap();
        assert_eq!(*iommu.invalidations.borrow(), [2], "a flush made room");
        assert_eq!(map(1).err(), Some(DmaError::OutOfAddresses { wanted: PAGE }));
        drop((held, both));
        assert!(map(3).is_ok());
    }

    #[test]
    fn what_an_iommu_does_not_take_away_is_never_handed_out_again() {
        let ram = Ram::new(16 * PAGE);
        let iommu = Counting::default();
        let mapper = Paged::strict(Window::new(&iommu, FIRST, 4), page(&ram, 0, 2));
        let (ring, lent) = (Coherent::allocate(&mapper, PAGE), Streaming::map(&mapper, page(&ram, 4, 1), ToDevice));
        iommu.broken.set(true);
        drop((ring, lent));
        iommu.broken.set(false);
        assert_eq!((mapper.lost(), iommu.domain.mapped()), (2, 2));
        let free: Vec<_> = (0..4).map_while(|_| Streaming::map(&mapper, page(&ram, 4, 1), ToDevice).ok()).collect();
        assert_eq!(free.len(), 2);
        drop(free);
        let full = DmaError::PoolFull { wanted: 2 * PAGE, free: PAGE };
        assert_eq!(Coherent::allocate(&mapper, 2 * PAGE).err(), Some(full));
        // An address that is in use already is an error of the IOMMU's, and lost to nobody.
        let taken = Mapping { addr: FIRST, gpa: Gpa(0), len: PAGE as u64, permission: Permission::ReadOnly };
        assert!(iommu.domain.map_at(taken).is_err());
    }
}
