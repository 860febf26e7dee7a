use super::Bounce;
use ringfence_dma::{Buffer, BusAddr, DmaError, HostSlice, Mapped, Mapper, Permission};
use ringfence_dma::{Gpa, Handover};

/// Where a Xen guest's frames are in the machine: its pfn-to-mfn table.
pub trait Frames {
    /// The machine address of the frame of 4096 bytes at `frame`; `None` where there is none.
    fn machine(&self, frame: Gpa) -> Option<u64>;
}

/// Turns a guest's addresses into the machine's, for buffers that lie in one piece there too.
///
/// It protects nothing: a device that has one machine address can send any other.
#[derive(Debug)]
pub struct FrameTable<F> {
    frames: F,
}

const FRAME: u64 = 4096;

/// The cookie of a buffer that was not bounced. No offset in a pool.
const IN_PLACE: usize = usize::MAX;

impl<F: Frames> FrameTable<F> {
    /// By this table.
    pub fn new(frames: F) -> Self {
        Self { frames }
    }

    /// The machine address of a buffer that is in one piece.
    fn find(&self, buffer: Buffer<'_>) -> Option<u64> {
        let physical = buffer.physical().0;
        let offset = physical % FRAME;
        let first = self.frames.machine(Gpa(physical - offset))?;
        // `Buffer` does not pass the end of memory.
        let last = physical + (buffer.len() as u64).checked_sub(1)?;
        let frames = (last / FRAME) - (physical / FRAME);
        let follows = |frame: u64| {
            let machine = self.frames.machine(Gpa(physical - offset + frame * FRAME));
            machine.is_some() && machine == first.checked_add(frame * FRAME)
        };
        (1..=frames).all(follows).then(|| first.checked_add(offset))?
    }
}

impl<F: Frames> Mapper for FrameTable<F> {
    fn max_len(&self) -> usize {
        usize::MAX
    }

    fn map(&self, buffer: Buffer<'_>, _: Permission) -> Result<Mapped, DmaError> {
        let addr = self.find(buffer).ok_or(DmaError::Unreachable { physical: buffer.physical() })?;
        Ok(Mapped { addr: BusAddr(addr), len: buffer.len(), cookie: IN_PLACE })
    }

    fn unmap(&self, _: Mapped, _: Buffer<'_>, _: Permission) {}

    /// It has no memory of its own: rings come from the pool of [`Xen`].
    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        Err(DmaError::PoolFull { wanted: len, free: 0 })
    }

    fn free(&self, mapped: Mapped) {
        unreachable!("{} bytes that were never allocated", mapped.len)
    }
}

/// A [`FrameTable`], and a pool for buffers that are in several pieces in the machine, and for rings.
#[derive(Debug)]
pub struct Xen<'a, F: Frames> {
    table: &'a FrameTable<F>,
    pool: Bounce<'a, FrameTable<F>>,
}

impl<'a, F: Frames> Xen<'a, F> {
    /// `pool` is in one piece in the machine (XENMEM_exchange). See [`Bounce::new`] for the rest.
    ///
    /// # Errors
    /// [`DmaError::Unreachable`] where it is not.
    pub fn new(table: &'a FrameTable<F>, pool: Buffer<'a>, max_len: usize) -> Result<Self, DmaError> {
        Ok(Self { table, pool: Bounce::new(table, pool, max_len)? })
    }

    /// See [`Bounce::free`].
    pub fn free(&self) -> usize {
        self.pool.free()
    }
}

impl<F: Frames> Mapper for Xen<'_, F> {
    /// What may have to be bounced is no longer than what may be bounced.
    fn max_len(&self) -> usize {
        self.pool.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        self.table.map(buffer, permission).or_else(|_| self.pool.map(buffer, permission))
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        if mapped.cookie != IN_PLACE {
            self.pool.unmap(mapped, buffer, permission);
        }
    }

    fn sync(&self, mapped: &Mapped, buffer: Buffer<'_>, handover: Handover) {
        if mapped.cookie != IN_PLACE {
            self.pool.sync(mapped, buffer, handover);
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
    use crate::mapper::PAGE;
    use ringfence_dma::{Both, Coherent, Ram, Streaming, ToDevice};

    /// The upper half is in one piece, the lower in the opposite order; there is no frame 3.
    struct Shuffled;

    impl Frames for Shuffled {
        fn machine(&self, frame: Gpa) -> Option<u64> {
            match frame.0 / FRAME {
                3 => None,
                number @ 0..8 => Some(0x9000_0000 - number * FRAME),
                number => Some(0x5_0000_0000 + number * FRAME),
            }
        }
    }

    #[test]
    fn what_is_scattered_in_the_machine_is_bounced_and_the_rest_is_not() {
        let ram = Ram::new(16 * PAGE);
        let buffer = |at: usize, len| Buffer::new(ram.slice(at, len), Gpa(at as u64));
        let table = FrameTable::new(Shuffled);
        let physical = Gpa(0);
        let scattered = Xen::new(&table, buffer(0, 2 * PAGE), PAGE).err();
        assert_eq!(scattered, Some(DmaError::Unreachable { physical }));
        let mapper = Xen::new(&table, buffer(12 * PAGE, 4 * PAGE), 2 * PAGE).unwrap();
        let pool = 0x5_0000_c000..0x5_0001_0000;

        let within = Streaming::map(&mapper, buffer(2 * PAGE - 8, 8), ToDevice).unwrap();
        assert_eq!(within.addr(), BusAddr(0x8fff_fff8));
        let across = Streaming::map(&mapper, buffer(2 * PAGE - 8, 9), Both).unwrap();
        assert!(pool.contains(&across.addr().0));
        let copy = ram.slice((across.addr().0 - 0x5_0000_0000) as usize, 9);
        across.write(8, &[7]);
        assert_eq!(
            {
                let mut seen = [0];
                copy.read(8, &mut seen);
                seen
            },
            [7]
        );
        copy.fill(5);
        let mut seen = [0; 2];
        across.read(0, &mut seen);
        assert_eq!(seen, [5, 5]);
        let whole = Streaming::map(&mapper, buffer(8 * PAGE + 1, 2 * PAGE), ToDevice).unwrap();
        assert_eq!(whole.addr(), BusAddr(0x5_0000_8001));
        let missing = Streaming::map(&mapper, buffer(4 * PAGE - 1, 1), ToDevice).unwrap();
        assert!(pool.contains(&missing.addr().0), "what is nowhere in the machine is bounced too");
        let ring = Coherent::allocate(&mapper, 2 * PAGE).unwrap();
        assert!(pool.contains(&ring.addr().0));
        assert_eq!(mapper.free(), 0);
        drop((within, across, whole, missing, ring));
        assert_eq!(mapper.free(), 4 * PAGE);
    }
}
