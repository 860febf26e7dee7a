//! Where the frames of a Xen guest are that drives devices: what [`FrameTable`](ringfence_driver::mapper::FrameTable) goes by.

use crate::Machine;
use ringfence_dma::Gpa;
use ringfence_driver::mapper::Frames;
use std::sync::Arc;

/// The pfn-to-mfn table of a machine's guest.
#[derive(Debug)]
pub struct GuestFrames(pub Arc<Machine>);

impl Frames for GuestFrames {
    fn machine(&self, frame: Gpa) -> Option<u64> {
        self.0.machine_addr(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Area, PAGE};
    use ringfence_dma::{BusAddr, Coherent, Gpa, Physical, Streaming, ToDevice};
    use ringfence_driver::mapper::{FrameTable, Xen};
    use ringfence_policy::Platform;

    #[test]
    fn what_is_scattered_in_the_machine_is_bounced_and_the_rest_is_not() {
        let machine = Arc::new(Machine::new(Platform::Xen));
        let table = FrameTable::new(GuestFrames(machine.clone()));
        let dma = Xen::new(&table, machine.buffer(Area::BOUNCE), 8 * PAGE).unwrap();
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
        assert_eq!(dma.free(), pool.len());
        assert!(Xen::new(&table, machine.buffer(Area::RINGS), PAGE).is_err(), "that is scattered");
    }
}
