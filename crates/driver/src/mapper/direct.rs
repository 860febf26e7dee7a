use super::PAGE;
use ringfence_dma::{Buffer, BusAddr, DmaError, HostSlice, Mapped, Mapper, Permission, Pool};

/// No translation: a bus address is the physical address. For platforms without an IOMMU, and for old drivers.
#[derive(Debug)]
pub struct Direct<'m> {
    coherent: Pool<'m>,
}

impl<'m> Direct<'m> {
    /// `coherent` is memory set aside for rings. Panics where it does not start on a page of 4096 bytes.
    pub fn new(coherent: Buffer<'m>) -> Self {
        Self { coherent: Pool::new(coherent, PAGE) }
    }
}

impl Mapper for Direct<'_> {
    #[inline]
    fn max_len(&self) -> usize {
        usize::MAX
    }

    #[inline]
    fn map(&self, buffer: Buffer<'_>, _: Permission) -> Result<Mapped, DmaError> {
        Ok(Mapped { addr: BusAddr(buffer.physical().0), len: buffer.len(), cookie: 0 })
    }

    #[inline]
    fn unmap(&self, _: Mapped, _: Buffer<'_>, _: Permission) {}

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        let cookie = self.coherent.take(len)?;
        let buffer = self.coherent.buffer().sub(cookie, len);
        Ok((Mapped { addr: BusAddr(buffer.physical().0), len, cookie }, buffer.memory()))
    }

    fn free(&self, mapped: Mapped) {
        self.coherent.give_back(mapped.cookie, mapped.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_dma::{Coherent, Gpa, Ram, Streaming, ToDevice};

    #[test]
    fn bus_addresses_are_physical() {
        let ram = Ram::new(4 * PAGE);
        let mapper = Direct::new(Buffer::new(ram.slice(PAGE, 2 * PAGE), Gpa(0x8_1000)));
        let coherent = Coherent::allocate(&mapper, PAGE).unwrap();
        assert_eq!(coherent.addr(), BusAddr(0x8_1000));
        assert_eq!(coherent.memory().as_ptr(), ram.slice(PAGE, 1).as_ptr());
        let mapping = Streaming::map(&mapper, Buffer::new(ram.slice(3, 9), Gpa(0x8_0003)), ToDevice).unwrap();
        assert_eq!((mapping.addr(), mapping.len()), (BusAddr(0x8_0003), 9));
        let full = DmaError::PoolFull { wanted: 2 * PAGE, free: PAGE };
        assert_eq!(Coherent::allocate(&mapper, 2 * PAGE).err(), Some(full));
    }
}
