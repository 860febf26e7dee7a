use crate::{Access, BusAddr, Fault, FaultReason, Gpa, HostSlice, Stop, Ticket};

/// The memory that a queue is handed when it starts. One queue has one; it is used from one thread.
pub trait Memory {
    /// Keeps translations good for longer than a visit: until it is dropped. See [`Visit::lease`].
    type Lease: 'static;

    /// See [`Visit`].
    type Visit<'m>: Visit<Lease = Self::Lease>
    where
        Self: 'm;

    /// Opens a visit. Visits are short: whoever takes a translation away waits for the end of the visits under way.
    fn visit(&mut self) -> Self::Visit<'_>;
}

/// A short stay in memory, during which everything that it resolved may be touched.
///
/// No storage is waited for, no lock is taken and nothing is slept on during a visit.
pub trait Visit {
    /// Keeps translations good for longer than a visit: until it is dropped.
    type Lease: 'static;

    /// The memory behind `addr`: at least one byte and at most `len`, as far as it lies in one piece. `len` is not 0.
    ///
    /// `asked` is the ticket of an earlier try for the same purpose, if there was one.
    ///
    /// # Errors
    /// [`Stop::Miss`] where a translation had to be asked for, [`Stop::Fault`] where there is none to be had or it
    /// forbids `access`.
    fn resolve(&self, addr: BusAddr, len: usize, access: Access, asked: Option<Ticket>) -> Result<HostSlice<'_>, Stop>;

    /// As [`Visit::resolve`], for a piece of something that is needed whole. What misses is asked for, and whoever needs it
    /// tries the rest before [`Visit::wait_for`] says for which piece to be woken: not once for each.
    ///
    /// # Errors
    /// As [`Visit::resolve`].
    #[inline]
    fn resolve_part(
        &self,
        addr: BusAddr,
        len: usize,
        access: Access,
        asked: Option<Ticket>,
    ) -> Result<HostSlice<'_>, Stop> {
        self.resolve(addr, len, access, asked)
    }

    /// Whoever missed parts of something waits for this one of them: the last that was asked for, because answers come in
    /// the order of questions.
    #[inline]
    fn wait_for(&self, addr: BusAddr, access: Access) {
        let _ = (addr, access);
    }

    /// How many questions were settled otherwise than by a translation, up to now. See [`Visit::may_have_changed`].
    #[inline]
    fn verdicts(&self) -> u64 {
        0
    }

    /// A quick look at whether it is worth resolving `addr` again, which missed since there were so many verdicts. Asks
    /// nothing. After `false` whoever waits is woken by the next news, and looks once in a while even so: an answer can be
    /// taken away again before it is seen.
    #[inline]
    fn may_have_changed(&self, addr: BusAddr, access: Access, verdicts: u64) -> bool {
        let _ = (addr, access, verdicts);
        true
    }

    /// Whoever sees what is written from now on also sees all that was written before, in this visit and in others. So it is
    /// with memory that is mapped; what is reached by messages has to arrive first.
    ///
    /// # Errors
    /// [`Stop::Miss`]: that can't be had now. Nothing is lost by trying again.
    #[inline]
    fn settle(&self) -> Result<(), Stop> {
        Ok(())
    }

    /// Keeps what this visit resolved for `ranges` good until the lease is dropped.
    fn lease(&self, ranges: &[(BusAddr, u32)]) -> Self::Lease;

    /// Has the cache line of `addr` brought near, for `access`, if its translation is at hand: whoever takes several
    /// requests at once does not wait for each one's memory in turn. Changes nothing.
    #[inline]
    fn approach(&self, addr: BusAddr, access: Access) {
        let _ = (addr, access);
    }

    /// Whether translations are kept beyond the request that they were resolved for. Where not, whoever ends a request
    /// calls [`Visit::release`].
    #[inline]
    fn keeps(&self) -> bool {
        true
    }

    /// The request that `ranges` were resolved for is over.
    fn release(&self, ranges: &[(BusAddr, u32)]) {
        let _ = ranges;
    }
}

/// Reads `into.len()` bytes at `addr`, however scattered they are.
///
/// # Errors
/// Those of [`Visit::resolve`]; after a miss the rest of the range has been asked for too.
pub fn copy_from_bus<V: Visit>(visit: &V, addr: BusAddr, into: &mut [u8], asked: Option<Ticket>) -> Result<(), Stop> {
    each_piece(visit, addr, into.len(), Access::Read, asked, |offset, piece| {
        piece.read(0, &mut into[offset..offset + piece.len()]);
    })
}

/// Writes `from` at `addr`, however scattered it lies there.
///
/// # Errors
/// Those of [`Visit::resolve`]; after a miss the rest of the range has been asked for too, and a part may be written.
pub fn copy_to_bus<V: Visit>(visit: &V, addr: BusAddr, from: &[u8], asked: Option<Ticket>) -> Result<(), Stop> {
    each_piece(visit, addr, from.len(), Access::Write, asked, |offset, piece| {
        piece.write(0, &from[offset..offset + piece.len()]);
    })
}

fn each_piece<'v, V: Visit>(
    visit: &'v V,
    addr: BusAddr,
    len: usize,
    access: Access,
    asked: Option<Ticket>,
    mut each: impl FnMut(usize, HostSlice<'v>),
) -> Result<(), Stop> {
    let mut missed = None;
    let mut offset = 0;
    while offset < len {
        let Some(at) = addr.checked_add(offset as u64) else {
            return Err(Fault { addr, access, reason: FaultReason::Wraps }.into());
        };
        match visit.resolve(at, len - offset, access, asked) {
            Ok(piece) => {
                each(offset, piece);
                offset += piece.len();
            }
            Err(Stop::Miss(miss)) => {
                missed.get_or_insert(miss);
                // At least 1 (see `Miss::covers`); more than the rest ends the loop.
                offset = offset.saturating_add(usize::try_from(miss.covers.max(1)).unwrap_or(usize::MAX));
            }
            Err(fault) => return Err(fault),
        }
    }
    match missed {
        Some(miss) => Err(Stop::Miss(miss)),
        None => Ok(()),
    }
}

/// Guest-physical memory as it is mapped here.
pub trait Physical {
    /// The memory behind `gpa`: at least one byte and at most `len`, as far as it lies in one piece; `None` where
    /// there is no memory.
    fn slice(&self, gpa: Gpa, len: usize) -> Option<HostSlice<'_>>;
}
