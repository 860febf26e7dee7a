//! The buffers of one request, while the device has them.

use alloc::vec::Vec;
use core::mem;
use ringfence_dma::{Access, Buffer, DmaError, Loan, Mapper, Permission};
use ringfence_ring::Descriptor;

/// What a request has lent, in order. Most have one buffer, which then is beside everything else of the request.
#[derive(Debug)]
pub(crate) struct Loans<'a, M: Mapper + ?Sized> {
    first: Option<Loan<'a, M>>,
    rest: Vec<Loan<'a, M>>,
}

impl<'a, M: Mapper + ?Sized> Loans<'a, M> {
    /// None yet; up to `count` of them allocate nothing.
    pub(crate) fn with_capacity(count: u16) -> Self {
        Self { first: None, rest: Vec::with_capacity(usize::from(count).saturating_sub(1)) }
    }

    /// How many there will be, of `longest` bytes at the most.
    pub(crate) fn count(buffers: &[Buffer<'_>], longest: usize) -> usize {
        buffers.iter().map(|buffer| buffer.len().div_ceil(longest)).sum()
    }

    /// Lends `buffers` in pieces of `longest` bytes at the most, where nothing is lent yet.
    pub(crate) fn lend(
        &mut self,
        mapper: &'a M,
        buffers: &[Buffer<'a>],
        longest: usize,
        access: Access,
    ) -> Result<(), DmaError> {
        for buffer in buffers {
            let mut offset = 0;
            while offset < buffer.len() {
                let piece = buffer.sub(offset, longest.min(buffer.len() - offset));
                match Loan::map(mapper, piece, permission(access)) {
                    Ok(loan) if self.first.is_none() => self.first = Some(loan),
                    Ok(loan) => self.rest.push(loan),
                    Err(error) => {
                        self.take_back();
                        return Err(error);
                    }
                }
                offset += piece.len();
            }
        }
        Ok(())
    }

    /// Keeps the one loan of a request.
    #[inline]
    pub(crate) fn keep(&mut self, loan: Loan<'a, M>) -> &Loan<'a, M> {
        self.first.insert(loan)
    }

    /// Takes back what was [kept](Self::keep).
    #[inline]
    pub(crate) fn take_one_back(&mut self) {
        self.first = None;
    }

    /// Takes everything back: whatever the device wrote is in the buffers afterwards.
    #[inline]
    pub(crate) fn take_back(&mut self) {
        self.first = None;
        if !self.rest.is_empty() {
            self.rest.clear();
        }
    }

    /// Gives up for lost what is lent.
    pub(crate) fn leak(&mut self) {
        mem::forget(self.first.take());
        mem::forget(mem::take(&mut self.rest));
    }

    pub(crate) fn descriptors(&self, access: Access) -> impl Iterator<Item = Descriptor> {
        self.first.iter().chain(&self.rest).map(move |loan| descriptor(loan, access))
    }
}

#[inline]
pub(crate) fn permission(access: Access) -> Permission {
    match access {
        Access::Read => Permission::ReadOnly,
        Access::Write => Permission::WriteOnly,
    }
}

/// How a chain names a loan.
#[inline]
pub(crate) fn descriptor<M: Mapper + ?Sized>(loan: &Loan<'_, M>, access: Access) -> Descriptor {
    // Whoever lends keeps a piece below 4 GiB.
    Descriptor { addr: loan.addr(), len: loan.len() as u32, access }
}
