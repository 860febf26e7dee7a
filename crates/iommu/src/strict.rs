use crate::dma::{Buffer, BusAddr, DmaError, Gpa, HostSlice, Mapped, Mapper, Permission, Pool};
use crate::domain::PAGE;
use crate::{Domain, MapError};
use alloc::sync::Arc;

/// Maps each buffer when it is lent and takes the mapping away, copies elsewhere included, when it comes back: the
/// strict mode of an IOMMU driver. The device reaches the pages of what is under way, and nothing else at any time.
#[derive(Debug)]
pub struct Strict<'m> {
    domain: Arc<Domain>,
    coherent: Pool<'m>,
}

impl<'m> Strict<'m> {
    /// Maps in `domain`. `coherent` is memory set aside for rings.
    ///
    /// Panics where `coherent` does not start on a page of 4096 bytes.
    pub fn new(domain: Arc<Domain>, coherent: Buffer<'m>) -> Self {
        Self { domain, coherent: Pool::new(coherent, PAGE as usize) }
    }

    /// The device's address space.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    fn map_pages(&self, buffer: Buffer<'_>, permission: Permission) -> Result<BusAddr, DmaError> {
        let unreachable = DmaError::Unreachable { physical: buffer.physical() };
        let (first, len) = pages(buffer.physical().0, buffer.len()).ok_or(unreachable)?;
        let page = self.domain.map(Gpa(first), len, permission).map_err(|error| match error {
            MapError::NoGap { .. } => DmaError::OutOfAddresses { wanted: buffer.len() },
            _ => unreachable,
        })?;
        Ok(BusAddr(page.0 + (buffer.physical().0 - first)))
    }

    fn unmap_pages(&self, mapped: &Mapped) {
        let (first, len) = pages(mapped.addr.0, mapped.len).expect("what `map_pages` handed out");
        self.domain.unmap(BusAddr(first), len).expect("what `map_pages` handed out");
    }
}

/// The whole pages around `len` bytes at `addr`: the first address, and how many bytes.
fn pages(addr: u64, len: usize) -> Option<(u64, u64)> {
    let first = addr - addr % PAGE;
    let last = addr.checked_add((len as u64).checked_sub(1)?)?;
    Some((first, (last - last % PAGE - first).checked_add(PAGE)?))
}

impl Mapper for Strict<'_> {
    fn max_len(&self) -> usize {
        usize::MAX
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        Ok(Mapped { addr: self.map_pages(buffer, permission)?, len: buffer.len(), cookie: 0 })
    }

    fn unmap(&self, mapped: Mapped, _: Buffer<'_>, _: Permission) {
        self.unmap_pages(&mapped);
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        let cookie = self.coherent.take(len)?;
        let buffer = self.coherent.buffer().sub(cookie, len);
        match self.map_pages(buffer, Permission::ReadWrite) {
            Ok(addr) => Ok((Mapped { addr, len, cookie }, buffer.memory())),
            Err(error) => {
                self.coherent.give_back(cookie, len);
                Err(error)
            }
        }
    }

    fn free(&self, mapped: Mapped) {
        self.unmap_pages(&mapped);
        self.coherent.give_back(mapped.cookie, mapped.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::{Access, Coherent, FromDevice, Memory, Ram, Streaming, ToDevice, Visit};
    use crate::{Walk, Window};

    const PAGE: usize = 4096;

    #[test]
    fn the_device_reaches_what_is_lent_while_it_is_lent() {
        let ram = Ram::new(8 * PAGE);
        let domain = Arc::new(Domain::default());
        let mapper = Strict::new(domain.clone(), Buffer::new(ram.slice(0, PAGE), Gpa(0)));
        let mut device = Walk::new(domain.clone(), &ram);
        // From the middle of a page to the middle of the next but one.
        let buffer = Buffer::new(ram.slice(0x1800, 2 * PAGE), Gpa(0x1800));

        let mapping = Streaming::map(&mapper, buffer, FromDevice).unwrap();
        let addr = mapping.addr();
        assert_eq!(addr.0 % 4096, 0x800);
        let visit = device.visit();
        let seen = visit.resolve(addr, 2 * PAGE, Access::Write, None).unwrap();
        assert_eq!((seen.len(), seen.as_ptr()), (2 * PAGE, buffer.memory().as_ptr()));
        assert!(visit.resolve(addr, 1, Access::Read, None).is_err(), "the device was not to read");
        drop(visit);
        drop(mapping);
        assert!(device.visit().resolve(addr, 1, Access::Write, None).is_err(), "the mapping is gone");
        assert_eq!((domain.mapped(), domain.unmapped()), (0, 1));
    }

    #[test]
    fn running_out_leaves_nothing_behind() {
        let ram = Ram::new(4 * PAGE);
        let window = Window::new(BusAddr(1 << 40), BusAddr((1 << 40) + 2 * PAGE as u64 - 1));
        let domain = Arc::new(Domain::new(window));
        let mapper = Strict::new(domain.clone(), Buffer::new(ram.slice(0, 3 * PAGE), Gpa(0)));
        let held = Coherent::allocate(&mapper, PAGE).unwrap();
        let out = Some(DmaError::OutOfAddresses { wanted: 2 * PAGE });
        assert_eq!(Coherent::allocate(&mapper, 2 * PAGE).err(), out);
        let buffer = Buffer::new(ram.slice(3 * PAGE - 1, 2), Gpa(3 * PAGE as u64 - 1));
        let wanted = 2;
        assert_eq!(Streaming::map(&mapper, buffer, ToDevice).err(), Some(DmaError::OutOfAddresses { wanted }));
        let full = DmaError::PoolFull { wanted: 3 * PAGE, free: 2 * PAGE };
        assert_eq!(Coherent::allocate(&mapper, 3 * PAGE).err(), Some(full));
        drop(held);
        assert!(Coherent::allocate(&mapper, 2 * PAGE).is_ok());
        assert_eq!(domain.mapped(), 0);
    }
}
