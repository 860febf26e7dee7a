//! The DMA API of a Xen guest that drives devices: machine addresses where the guest knows only its own.

use crate::Machine;
use ringfence_dma::{Buffer, BusAddr, DmaError, HostSlice, Mapped, Mapper, Permission};
use ringfence_driver::mapper::Bounce;
use std::sync::Arc;

/// Turns the guest's frames into the machine's, for buffers that lie in one piece there too. It protects nothing: a
/// device that has one machine address can send any other.
#[derive(Debug)]
pub struct FrameTable {
    machine: Arc<Machine>,
}

impl FrameTable {
    /// The table of the guest in `machine`.
    pub fn new(machine: &Arc<Machine>) -> Self {
        Self { machine: Arc::clone(machine) }
    }

    /// The machine address of a buffer that is in one piece.
    fn find(&self, buffer: Buffer<'_>) -> Result<u64, DmaError> {
        let unreachable = DmaError::Unreachable { physical: buffer.physical() };
        let at = |offset: usize| self.machine.machine_addr(buffer.sub(offset, 1).physical());
        let first = at(0).ok_or(unreachable)?;
        let step = crate::PAGE - (first as usize) % crate::PAGE;
        let whole = (step..buffer.len()).step_by(crate::PAGE).all(|offset| at(offset) == Some(first + offset as u64));
        if whole { Ok(first) } else { Err(unreachable) }
    }
}

impl Mapper for FrameTable {
    fn max_len(&self) -> usize {
        usize::MAX
    }

    fn map(&self, buffer: Buffer<'_>, _: Permission) -> Result<Mapped, DmaError> {
        Ok(Mapped { addr: BusAddr(self.find(buffer)?), len: buffer.len(), cookie: 0 })
    }

    fn unmap(&self, _: Mapped, _: Buffer<'_>, _: Permission) {}

    /// It has no memory of its own: rings come from the pool in front of it.
    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        Err(DmaError::PoolFull { wanted: len, free: 0 })
    }

    fn free(&self, mapped: Mapped) {
        unreachable!("{} bytes that were never allocated", mapped.len)
    }
}

/// A [`FrameTable`], and a pool for buffers that are in several pieces in the machine, and for rings.
#[derive(Debug)]
pub struct XenDma<'a> {
    table: &'a FrameTable,
    pool: Bounce<'a, FrameTable>,
}

impl<'a> XenDma<'a> {
    /// `pool` is in one piece in the machine.
    ///
    /// # Errors
    /// [`DmaError::Unreachable`] where it is not.
    pub fn new(table: &'a FrameTable, pool: Buffer<'a>) -> Result<Self, DmaError> {
        Ok(Self { table, pool: Bounce::new(table, pool, pool.len())? })
    }
}

impl Mapper for XenDma<'_> {
    fn max_len(&self) -> usize {
        self.pool.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        self.table.map(buffer, permission).or_else(|_| self.pool.map(buffer, permission))
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        // A frame's place in the machine does not change, so that this decides as `map` did.
        match self.table.find(buffer) {
            Ok(_) => self.table.unmap(mapped, buffer, permission),
            Err(_) => self.pool.unmap(mapped, buffer, permission),
        }
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.pool.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        Mapper::free(&self.pool, mapped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Area, PAGE};
    use ringfence_dma::{Coherent, Gpa, Physical, Streaming, ToDevice};
    use ringfence_policy::Platform;

    #[test]
    fn what_is_scattered_in_the_machine_is_bounced_and_the_rest_is_not() {
        let machine = Arc::new(Machine::new(Platform::Xen));
        let table = FrameTable::new(&machine);
        let dma = XenDma::new(&table, machine.buffer(Area::BOUNCE)).unwrap();
        let seen = |addr: BusAddr| machine.guest_addr(machine.slice(Gpa(addr.0), 1).unwrap()).unwrap();
        let pool = machine.buffer(Area::BOUNCE);
        let in_pool = |gpa: Gpa| gpa >= pool.physical() && gpa.0 < pool.physical().0 + pool.len() as u64;

        let buffers = machine.buffer(Area::BUFFERS);
        let within = Streaming::map(&dma, buffers.sub(PAGE - 8, 8), ToDevice).unwrap();
        assert_eq!(seen(within.addr()), Gpa(buffers.physical().0 + PAGE as u64 - 8));
        let across = Streaming::map(&dma, buffers.sub(PAGE - 8, 9), ToDevice).unwrap();
        assert!(in_pool(seen(across.addr())));
        let ring = Coherent::allocate(&dma, 2 * PAGE).unwrap();
        assert!(in_pool(seen(ring.addr())));
        drop((within, across, ring));
        assert_eq!(dma.pool.free(), pool.len());
        assert!(XenDma::new(&table, machine.buffer(Area::RINGS)).is_err(), "that is scattered");
    }
}
