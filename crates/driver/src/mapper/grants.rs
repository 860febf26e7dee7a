use super::paged::{Pages, Run};
use ringfence_dma::{BusAddr, DmaError, Gpa, Permission};

/// A Xen domain's grant table, towards the domain that has the device.
pub trait GrantTable {
    /// Grants `frames` frames from `first` on, to be read, or to be read and written; under references that follow each
    /// other, of which the first is returned.
    ///
    /// # Errors
    /// [`DmaError::OutOfAddresses`] where there is no such run of references; any other.
    fn grant(&self, first: Gpa, frames: usize, access: GrantAccess) -> Result<u32, DmaError>;

    /// Revokes grants. Returns when nobody has them mapped any more.
    ///
    /// # Errors
    /// They are still mapped: the references are lost.
    fn revoke(&self, first: u32, frames: usize) -> Result<(), DmaError>;
}

/// What a grant is for. There is none for writing alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantAccess {
    /// Reading (GTF_readonly).
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// Shows a device's domain what is granted to it: a bus address carries the grant's reference, under a bit that tells it
/// from every other address, as Linux has it (`xen,grant-dma`).
#[derive(Debug)]
pub struct Grants<G> {
    table: G,
    longest: usize,
}

/// Xen's frames.
const FRAME: usize = 4096;

/// What tells a grant from every other address.
const GRANT: u64 = 1 << 63;

impl<G: GrantTable> Grants<G> {
    /// Grants through `table`, no more than `longest` frames in a row; at least two.
    pub fn new(table: G, longest: usize) -> Self {
        assert!(longest > 1, "runs of {longest} frames");
        Self { table, longest }
    }

    /// The grant table.
    pub fn table(&self) -> &G {
        &self.table
    }

    /// The bus address of a frame that is granted under this reference.
    pub fn address(reference: u32) -> BusAddr {
        BusAddr(GRANT | (u64::from(reference) * FRAME as u64))
    }

    /// The reference in a bus address.
    pub fn reference(addr: BusAddr) -> u32 {
        ((addr.0 & !GRANT) / FRAME as u64) as u32
    }
}

impl<G: GrantTable> Pages for Grants<G> {
    fn page(&self) -> usize {
        FRAME
    }

    fn max_len(&self) -> usize {
        self.longest.saturating_mul(FRAME)
    }

    fn show(&self, physical: Gpa, len: usize, permission: Permission) -> Result<BusAddr, DmaError> {
        let frames = len / FRAME;
        if frames > self.longest {
            return Err(DmaError::TooLong { len, max: self.max_len() });
        }
        let access = match permission {
            Permission::ReadOnly => GrantAccess::Read,
            Permission::WriteOnly | Permission::ReadWrite => GrantAccess::ReadWrite,
        };
        let reference = self.table.grant(physical, frames, access)?;
        Ok(Self::address(reference))
    }

    fn hide(&self, runs: &[Run]) -> Result<(), DmaError> {
        // Each of them, even where one before could not be had.
        let revoke = |run: &Run| self.table.revoke(Self::reference(run.addr), run.len / FRAME);
        runs.iter().map(revoke).fold(Ok(()), Result::and)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapper::Paged;
    use alloc::collections::BTreeMap;
    use core::cell::RefCell;
    use ringfence_dma::{Buffer, Coherent, FromDevice, Ram, Streaming, ToDevice};

    #[derive(Default)]
    struct Table(RefCell<BTreeMap<u32, (Gpa, GrantAccess)>>);

    impl GrantTable for &Table {
        fn grant(&self, first: Gpa, frames: usize, access: GrantAccess) -> Result<u32, DmaError> {
            let mut table = self.0.borrow_mut();
            let reference = table.last_key_value().map_or(8, |(last, _)| last + 1);
            if reference as usize + frames > 16 {
                return Err(DmaError::OutOfAddresses { wanted: frames * FRAME });
            }
            (0..frames).for_each(|frame| {
                table.insert(reference + frame as u32, (Gpa(first.0 + (frame * FRAME) as u64), access));
            });
            Ok(reference)
        }

        fn revoke(&self, first: u32, frames: usize) -> Result<(), DmaError> {
            let mut table = self.0.borrow_mut();
            (first..first + frames as u32).for_each(|reference| assert!(table.remove(&reference).is_some()));
            Ok(())
        }
    }

    #[test]
    fn an_address_carries_the_reference_and_a_grant_is_gone_when_the_buffer_is_back() {
        let ram = Ram::new(8 * FRAME);
        let buffer = |at: usize, len| Buffer::new(ram.slice(at, len), Gpa(at as u64));
        let table = Table::default();
        let mapper = Paged::strict(Grants::new(&table, 5), buffer(0, 2 * FRAME));
        let ring = Coherent::allocate(&mapper, FRAME + 1).unwrap();
        assert_eq!(ring.addr(), BusAddr(0x8000_0000_0000_8000));

        let lent = Streaming::map(&mapper, buffer(3 * FRAME - 4, 8), ToDevice).unwrap();
        assert_eq!(lent.addr(), BusAddr(0x8000_0000_0000_affc));
        let reference = Grants::<&Table>::reference(lent.addr());
        assert_eq!(table.0.borrow()[&reference], (Gpa(2 * FRAME as u64), GrantAccess::Read));
        let written = Streaming::map(&mapper, buffer(4 * FRAME, 1), FromDevice).unwrap();
        let reference = Grants::<&Table>::reference(written.addr());
        assert_eq!(table.0.borrow()[&reference], (Gpa(4 * FRAME as u64), GrantAccess::ReadWrite));

        let out = DmaError::OutOfAddresses { wanted: 4 * FRAME };
        assert_eq!(Streaming::map(&mapper, buffer(4 * FRAME, 4 * FRAME - 1), ToDevice).err(), Some(out));
        drop((ring, lent, written));
        assert!(table.0.borrow().is_empty());
    }
}
