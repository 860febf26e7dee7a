//! The grant table of a Xen domain whose devices are served from another one: what that domain may touch is granted to it.

use crate::{Machine, PAGE};
use ringfence_dma::{BusAddr, DmaError, Gpa, Granules, Permission};
use ringfence_driver::mapper::{GrantAccess, GrantTable, Grants};
use ringfence_iommu::{Domain, Mapping};
use std::sync::Arc;

/// References to hand out. The first ones are Xen's own, for the console and the store.
const FIRST: u32 = 8;
const COUNT: usize = 504;

/// A guest's grants, as a [`Domain`] in which each reference in use is a mapping of one frame: the device's side reaches what
/// it finds there, and nothing else, and what it does not find is recorded.
///
/// References in a row make memory of several frames one piece for the device, wherever those are in the machine.
#[derive(Debug)]
pub struct GuestGrants<'m> {
    table: Arc<Domain>,
    machine: &'m Machine,
    references: Granules,
}

impl<'m> GuestGrants<'m> {
    /// Grants in `table` what is the guest's in `machine`.
    pub fn new(table: Arc<Domain>, machine: &'m Machine) -> Grants<Self> {
        Grants::new(Self { table, machine, references: Granules::new(COUNT) }, COUNT)
    }
}

impl GrantTable for GuestGrants<'_> {
    fn grant(&self, first: Gpa, frames: usize, access: GrantAccess) -> Result<u32, DmaError> {
        let machine = |frame: usize| self.machine.machine_addr(Gpa(first.0 + (frame * PAGE) as u64)).map(Gpa);
        let places: Option<Vec<Gpa>> = (0..frames).map(machine).collect();
        let places = places.ok_or(DmaError::Unreachable { physical: first })?;
        let reference = self.references.take(frames).ok_or(DmaError::OutOfAddresses { wanted: frames * PAGE })?;
        let reference = FIRST + reference as u32;
        let permission = match access {
            GrantAccess::Read => Permission::ReadOnly,
            GrantAccess::ReadWrite => Permission::ReadWrite,
        };
        for (reference, gpa) in (reference..).zip(places) {
            let mapping = Mapping { addr: address(reference), gpa, len: PAGE as u64, permission };
            self.table.map_at(mapping).expect("a reference that nobody else has");
        }
        Ok(reference)
    }

    /// Linux looks once whether the other side is still in there, and gives the device up if so. This waits.
    fn revoke(&self, first: u32, frames: usize) -> Result<(), DmaError> {
        for reference in first..first + frames as u32 {
            self.table.unmap(address(reference), PAGE as u64).expect("what `grant` made");
        }
        self.references.give_back((first - FIRST) as usize, frames);
        Ok(())
    }
}

fn address(reference: u32) -> BusAddr {
    Grants::<GuestGrants<'_>>::address(reference)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Area, Bus, Trace};
    use ringfence_dma::{Access, Buffer, Coherent, FaultReason, FromDevice, Memory, Stop, Streaming, ToDevice, Visit};
    use ringfence_driver::mapper::Paged;
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
        let grants = Paged::strict(GuestGrants::new(Arc::clone(&table), &machine), machine.buffer(Area::RINGS));
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
        for addr in [buffer.physical().0, machine_addr, 1 << 63 | buffer.physical().0] {
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
        let grants = Paged::strict(GuestGrants::new(Arc::clone(&table), &machine), machine.buffer(Area::RINGS));
        let buffer = machine.buffer(Area::BUFFERS);
        let full = Some(DmaError::OutOfAddresses { wanted: buffer.len() });
        let mut held = Vec::new();
        let error = loop {
            match Streaming::map(&grants, buffer, ToDevice) {
                Ok(mapping) => held.push(mapping),
                error => break error.err(),
            }
        };
        assert_eq!((held.len(), error), (COUNT * PAGE / buffer.len(), full));
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
