use super::PAGE;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};
use ringfence_dma::{Buffer, BusAddr, DmaError, Gpa, HostSlice, Lock, Mapped, Mapper, Permission, Pool};

/// Whatever shows whole pages of memory to one device, and hides them again: an IOMMU ([`Window`](super::Window)), a
/// grant table ([`Grants`](super::Grants)).
pub trait Pages {
    /// How long a page is: a power of two.
    fn page(&self) -> usize;

    /// The longest run, in bytes: at least two pages.
    fn max_len(&self) -> usize;

    /// Shows the device `len` bytes of memory from `physical` on, whole pages both, in one piece.
    ///
    /// # Errors
    /// Any [`DmaError`]; the device sees nothing of it then.
    fn show(&self, physical: Gpa, len: usize, permission: Permission) -> Result<BusAddr, DmaError>;

    /// Hides what was shown, each run as it was. Returns when the device can't reach any of it any more.
    ///
    /// # Errors
    /// That can't be had. None of the addresses is ever handed out again.
    fn hide(&self, runs: &[Run]) -> Result<(), DmaError>;
}

/// A run of pages that a device is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first byte, for the device.
    pub addr: BusAddr,
    /// How many bytes.
    pub len: usize,
}

/// Lends buffers by the page.
///
/// [`strict`](Self::strict): what came back is out of the device's reach at once, for the price of an invalidation a
/// buffer. [`batched`](Self::batched): many invalidations are one, and until then a device that misbehaves reaches what
/// has already come back, as with an operating system's lazy mode. Rings are hidden at once in either.
#[derive(Debug)]
pub struct Paged<'a, P: Pages> {
    pages: P,
    coherent: Pool<'a>,
    /// How many runs are hidden at once; 0: each by itself.
    batch: usize,
    /// What came back and is not hidden yet.
    pending: Lock<Vec<Run>>,
    lost: AtomicUsize,
}

impl<'a, P: Pages> Paged<'a, P> {
    /// Hides each buffer when it comes back. `coherent` is memory set aside for rings: what of it is no whole page of
    /// [`Pages::page`], or of 4096 bytes where those are shorter, stays unused.
    pub fn strict(pages: P, coherent: Buffer<'a>) -> Self {
        Self::new(pages, coherent, 0)
    }

    /// Hides buffers once `batch` of them came back, or [`flush`](Self::flush) is called, or addresses run out.
    ///
    /// Panics for an empty batch. See [`strict`](Self::strict) for the rest.
    pub fn batched(pages: P, coherent: Buffer<'a>, batch: usize) -> Self {
        assert!(batch > 0, "an empty batch");
        Self::new(pages, coherent, batch)
    }

    fn new(pages: P, coherent: Buffer<'a>, batch: usize) -> Self {
        let page = pages.page().max(PAGE);
        let before = (coherent.physical().0.wrapping_neg() % page as u64) as usize;
        let coherent = match coherent.len().checked_sub(before) {
            Some(rest) if rest >= page => Pool::new(coherent.sub(before, rest), page),
            // How long a page is can be for a device to say (virtio-iommu): there is no room for rings, and no reason to stop.
            _ => Pool::new(coherent.sub(0, 0), 1),
        };
        let pending = Lock::new(Vec::with_capacity(batch));
        Self { pages, coherent, batch, pending, lost: AtomicUsize::new(0) }
    }

    /// Whatever shows the pages.
    pub fn pages(&self) -> &P {
        &self.pages
    }

    /// Hides all that came back.
    pub fn flush(&self) {
        let mut pending = self.pending.lock();
        self.hide(&pending);
        pending.clear();
    }

    /// How many runs could not be hidden: the device may still reach them, and should be kept from the bus.
    pub fn lost(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }

    /// The whole pages around a buffer, and how far into them it begins.
    fn around(&self, addr: u64, len: usize) -> Option<(u64, usize)> {
        let page = self.pages.page() as u64;
        let first = addr - addr % page;
        let last = addr.checked_add((len as u64).checked_sub(1)?)?;
        let pages = (last - last % page - first).checked_add(page)?;
        Some((first, usize::try_from(pages).ok()?))
    }

    fn show(&self, buffer: Buffer<'_>, permission: Permission) -> Result<BusAddr, DmaError> {
        let physical = buffer.physical();
        let (first, len) = self.around(physical.0, buffer.len()).ok_or(DmaError::Unreachable { physical })?;
        let show = || self.pages.show(Gpa(first), len, permission);
        let addr = show().or_else(|error| match self.batch > 0 && error.is_transient() {
            true => {
                self.flush();
                show()
            }
            false => Err(error),
        })?;
        Ok(BusAddr(addr.0 + (physical.0 - first)))
    }

    /// `false`: it could not be had.
    fn hide(&self, runs: &[Run]) -> bool {
        let hidden = runs.is_empty() || self.pages.hide(runs).is_ok();
        if !hidden {
            self.lost.fetch_add(runs.len(), Ordering::Relaxed);
        }
        hidden
    }

    fn run(&self, mapped: &Mapped) -> Run {
        let (first, len) = self.around(mapped.addr.0, mapped.len).expect("what `show` handed out");
        Run { addr: BusAddr(first), len }
    }
}

impl<P: Pages> Mapper for Paged<'_, P> {
    fn max_len(&self) -> usize {
        // A buffer may begin at the end of a page.
        self.pages.max_len() - self.pages.page() + 1
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        Ok(Mapped { addr: self.show(buffer, permission)?, len: buffer.len(), cookie: 0 })
    }

    fn unmap(&self, mapped: Mapped, _: Buffer<'_>, _: Permission) {
        let run = self.run(&mapped);
        if self.batch == 0 {
            self.hide(&[run]);
            return;
        }
        let mut pending = self.pending.lock();
        pending.push(run);
        if pending.len() == self.batch {
            self.hide(&pending);
            pending.clear();
        }
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        let cookie = self.coherent.take(len)?;
        let buffer = self.coherent.buffer().sub(cookie, len);
        match self.show(buffer, Permission::ReadWrite) {
            Ok(addr) => Ok((Mapped { addr, len, cookie }, buffer.memory())),
            Err(error) => {
                self.coherent.give_back(cookie, len);
                Err(error)
            }
        }
    }

    fn free(&self, mapped: Mapped) {
        // Memory that the device may still reach is nobody's any more.
        if self.hide(&[self.run(&mapped)]) {
            self.coherent.give_back(mapped.cookie, mapped.len);
        }
    }
}

impl<P: Pages> Drop for Paged<'_, P> {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_dma::{Coherent, Ram};

    struct Long(usize);

    impl Pages for Long {
        fn page(&self) -> usize {
            self.0
        }

        fn max_len(&self) -> usize {
            2 * self.0
        }

        fn show(&self, physical: Gpa, _: usize, _: Permission) -> Result<BusAddr, DmaError> {
            Ok(BusAddr(physical.0))
        }

        fn hide(&self, _: &[Run]) -> Result<(), DmaError> {
            Ok(())
        }
    }

    #[test]
    fn rings_have_whole_pages_or_none_whatever_a_page_is() {
        let ram = Ram::new(9 * PAGE);
        let memory = Buffer::new(ram.slice(0, 9 * PAGE), Gpa(PAGE as u64));
        for (page, rings) in [(64, 9), (PAGE, 9), (2 * PAGE, 4), (4 * PAGE, 1), (8 * PAGE, 0), (1 << 30, 0)] {
            let mapper = Paged::strict(Long(page), memory);
            let held: Vec<_> = (0..20).map_while(|_| Coherent::allocate(&mapper, 1).ok()).collect();
            assert_eq!(held.len(), rings, "pages of {page}");
            assert!(held.iter().all(|ring| ring.addr().0.is_multiple_of(page as u64)));
            let full = Some(DmaError::PoolFull { wanted: 1, free: 0 });
            assert_eq!(Coherent::allocate(&mapper, 1).err(), full);
        }
    }
}
