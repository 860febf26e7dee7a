//! The DMA API of a Xen domain whose devices are served from another one: what that domain may touch is granted to it.

use crate::{Machine, PAGE};
use ringfence_dma::{Buffer, BusAddr, DmaError, Gpa, HostSlice, Mapped, Mapper, Permission, Pool};
use ringfence_iommu::{Domain, Mapping};
use std::sync::{Arc, Mutex, PoisonError};

/// The bit that tells a grant from every other address, as Linux has it (`drivers/xen/grant-dma-ops.c`).
const GRANT: u64 = 1 << 63;

/// References to hand out. The first ones are Xen's own, for the console and the store.
const FIRST: usize = 8;
const END: usize = 512;

/// Grants each frame of a buffer while it is lent, to read or to write, and revokes it when the buffer comes back.
///
/// A bus address is bit 63, the reference as a frame's number, and the offset in that frame. References in a row make a
/// buffer of several frames one piece for the device, wherever those are in the machine.
///
/// The grant table is a [`Domain`] in which each reference in use is a mapping of one frame: the device's side reaches
/// what it finds there, and nothing else, and what it does not find is recorded.
#[derive(Debug)]
pub struct Grants<'m> {
    table: Arc<Domain>,
    machine: &'m Machine,
    rings: Pool<'m>,
    references: Mutex<References>,
}

impl<'m> Grants<'m> {
    /// Grants in `table` what is the guest's in `machine`. `rings` is memory set aside for rings.
    pub fn new(table: Arc<Domain>, machine: &'m Machine, rings: Buffer<'m>) -> Self {
        Self { table, machine, rings: Pool::new(rings, PAGE), references: Mutex::new(References::new()) }
    }

    fn grant(&self, buffer: Buffer<'_>, permission: Permission) -> Result<BusAddr, DmaError> {
        let unreachable = DmaError::Unreachable { physical: buffer.physical() };
        let (offset, count) = frames(buffer.physical().0, buffer.len());
        let first = buffer.physical().0 - offset;
        let frames: Option<Vec<u64>> =
            (0..count).map(|frame| self.machine.machine_addr(Gpa(first + (frame * PAGE) as u64))).collect();
        let frames = frames.ok_or(unreachable)?;
        let reference = self.references().take(count).ok_or(DmaError::OutOfAddresses { wanted: buffer.len() })?;
        // A grant is for reading, or for everything.
        let permission = match permission {
            Permission::ReadOnly => Permission::ReadOnly,
            Permission::WriteOnly | Permission::ReadWrite => Permission::ReadWrite,
        };
        for (reference, frame) in (reference..).zip(frames) {
            let mapping = Mapping { addr: address(reference), gpa: Gpa(frame), len: PAGE as u64, permission };
            self.table.map_at(mapping).expect("a reference that nobody else has");
        }
        Ok(BusAddr(address(reference).0 + offset))
    }

    /// Linux looks once whether the other side is still in there, and gives the device up if so. This waits.
    fn revoke(&self, mapped: &Mapped) {
        let (_, count) = frames(mapped.addr.0, mapped.len);
        let reference = (mapped.addr.0 & !GRANT) as usize / PAGE;
        for reference in reference..reference + count {
            self.table.unmap(address(reference), PAGE as u64).expect("what `grant` made");
        }
        self.references().give_back(reference, count);
    }

    fn references(&self) -> std::sync::MutexGuard<'_, References> {
        self.references.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn address(reference: usize) -> BusAddr {
    BusAddr(GRANT | (reference * PAGE) as u64)
}

/// The offset in the first frame, and how many frames `len` bytes at `addr` are in.
fn frames(addr: u64, len: usize) -> (u64, usize) {
    let offset = addr % PAGE as u64;
    (offset, (offset as usize + len).div_ceil(PAGE))
}

impl Mapper for Grants<'_> {
    fn max_len(&self) -> usize {
        (END - FIRST - 1) * PAGE
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        Ok(Mapped { addr: self.grant(buffer, permission)?, len: buffer.len(), cookie: 0 })
    }

    fn unmap(&self, mapped: Mapped, _: Buffer<'_>, _: Permission) {
        self.revoke(&mapped);
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        let cookie = self.rings.take(len)?;
        let buffer = self.rings.buffer().sub(cookie, len);
        match self.grant(buffer, Permission::ReadWrite) {
            Ok(addr) => Ok((Mapped { addr, len, cookie }, buffer.memory())),
            Err(error) => {
                self.rings.give_back(cookie, len);
                Err(error)
            }
        }
    }

    fn free(&self, mapped: Mapped) {
        self.revoke(&mapped);
        self.rings.give_back(mapped.cookie, mapped.len);
    }
}

/// Which references are in use. One that was given back comes round again as late as possible.
#[derive(Debug)]
struct References {
    used: [bool; END],
    next: usize,
}

impl References {
    fn new() -> Self {
        Self { used: [false; END], next: FIRST }
    }

    fn take(&mut self, count: usize) -> Option<usize> {
        let last = END.checked_sub(count)?;
        let is_free = |&first: &usize| self.used[first..first + count].iter().all(|used| !used);
        let first = (self.next..=last).chain(FIRST..=last).find(is_free)?;
        self.used[first..first + count].fill(true);
        self.next = first + count;
        Some(first)
    }

    fn give_back(&mut self, first: usize, count: usize) {
        self.used[first..first + count].fill(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Area, Bus, Trace};
    use ringfence_dma::{Access, Coherent, FaultReason, FromDevice, Memory, Stop, Streaming, ToDevice, Visit};
    use ringfence_policy::Platform;

    fn refused(bus: &mut Bus, addr: BusAddr, access: Access) -> FaultReason {
        match bus.visit().resolve(addr, 1, access, None) {
            Err(Stop::Fault(fault)) => fault.reason,
            other => panic!("{access} at {addr}: {other:?}"),
        }
    }

    #[test]
    fn a_grant_is_one_piece_for_the_device_and_is_gone_when_it_is_revoked() {
        let machine = Arc::new(Machine::new(Platform::XenGrants));
        let table = Arc::new(Domain::default());
        let grants = Grants::new(Arc::clone(&table), &machine, machine.buffer(Area::RINGS));
        let mut bus = Bus::through(&table, &machine, &Trace::default());

        // Three frames, which are nowhere near each other in the machine.
        let buffer = machine.buffer(Area::BUFFERS).sub(PAGE - 6, 2 * PAGE);
        let written = Streaming::map(&grants, buffer, FromDevice).unwrap();
        let addr = written.addr();
        assert_eq!((addr.0 >> 63, addr.0 % PAGE as u64), (1, PAGE as u64 - 6));
        ringfence_dma::copy_to_bus(&bus.visit(), addr, &[7; 2 * PAGE], None).unwrap();
        let mut bytes = [0; 2 * PAGE];
        written.finish().memory().read(0, &mut bytes);
        assert_eq!(bytes, [7; 2 * PAGE]);
        assert_eq!(refused(&mut bus, addr, Access::Write), FaultReason::Unmapped, "revoked");

        let read = Streaming::map(&grants, buffer, ToDevice).unwrap();
        assert_ne!(read.addr(), addr, "not the same again at once");
        assert!(bus.visit().resolve(read.addr(), 1, Access::Read, None).is_ok());
        assert_eq!(refused(&mut bus, read.addr(), Access::Write), FaultReason::Forbidden);
        // A frame is not reached by its number, the guest's or the machine's.
        let machine_addr = machine.machine_addr(buffer.physical()).unwrap();
        for addr in [buffer.physical().0, machine_addr, GRANT | buffer.physical().0] {
            assert_eq!(refused(&mut bus, BusAddr(addr), Access::Read), FaultReason::Unmapped);
        }
        assert_eq!(table.faults().total, 5);
        drop(read);
        assert_eq!(table.mapped(), 0);
    }

    #[test]
    fn references_run_out_and_come_back() {
        let machine = Machine::new(Platform::XenGrants);
        let table = Arc::new(Domain::default());
        let grants = Grants::new(Arc::clone(&table), &machine, machine.buffer(Area::RINGS));
        let buffer = machine.buffer(Area::BUFFERS);
        let full = Some(DmaError::OutOfAddresses { wanted: buffer.len() });
        let mut held = Vec::new();
        let error = loop {
            match Streaming::map(&grants, buffer, ToDevice) {
                Ok(mapping) => held.push(mapping),
                error => break error.err(),
            }
        };
        assert_eq!((held.len(), error), ((END - FIRST) * PAGE / buffer.len(), full));
        assert_eq!(Coherent::allocate(&grants, PAGE).err(), Some(DmaError::OutOfAddresses { wanted: PAGE }));
        drop(held);
        assert!(Streaming::map(&grants, buffer, ToDevice).is_ok());
        assert_eq!(table.mapped(), 0);
        assert!(Coherent::allocate(&grants, 8 * PAGE).is_ok(), "the rings' pool has all of it back");
        let beyond = Buffer::new(machine.buffer(Area::BUFFERS).memory(), Gpa((crate::OWN * PAGE) as u64));
        let physical = beyond.physical();
        assert_eq!(Streaming::map(&grants, beyond, ToDevice).err(), Some(DmaError::Unreachable { physical }));
    }
}
