//! Memory as a queue of the function reaches it: what is mapped here at once, the rest by messages to the client.
//!
//! Who grants memory without a file answers for each access. It is slow, and is what there is: a copy is fetched when the
//! queue looks, and what the queue changed of it goes back, all of it within the visit. The order in which a driver may see
//! changes is kept: whatever was copied last goes back first, for a ring is found before the buffers that it tells of, and
//! of one copy what lies behind goes first, for an index lies before the entries that it counts.
//!
//! Of a ring only what was changed goes back: what lies beside it the driver may be changing itself. A buffer is the device's
//! alone until it is used, so there one message brings all that lies between its first change and its last.

use crate::event::Event;
use crate::link::{Arrival, Link, Unanswered};
use crate::memory::Remote;
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Memory, Miss, Permission, Ram, Stop, Ticket};
use ringfence_iotlb::{Lease, View};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// The most that is copied at once, in bytes.
const COPY: usize = 1 << 20;

/// The most that is copied in one visit: a driver may describe 4 GiB with one descriptor. Beyond, it can't be reached.
const COPIES: usize = 64 << 20;

/// One queue's way to memory.
pub(crate) struct Bus {
    view: View,
    far: Far,
}

/// What is reached by messages.
struct Far {
    remote: Arc<Remote>,
    link: Arc<Link>,
    /// Rung where something could not be written back.
    broken: Arc<Event>,
    /// First and last address of each part of the ring.
    rings: [(u64, u64); 3],
    /// Where something was written last whose arrival nobody waited for.
    on_its_way: Cell<bool>,
}

impl Bus {
    /// For the queue whose ring has its parts at `rings`, first and last address of each.
    pub(crate) fn new(
        view: View,
        remote: Arc<Remote>,
        link: Arc<Link>,
        broken: Arc<Event>,
        rings: [(u64, u64); 3],
    ) -> Self {
        Self { view, far: Far { remote, link, broken, rings, on_its_way: Cell::default() } }
    }
}

impl Memory for Bus {
    type Lease = Lease;
    type Visit<'m> = Visit<'m>;

    #[inline]
    fn visit(&mut self) -> Visit<'_> {
        let Self { view, far } = self;
        // The copies go back before the visit is over: a field is dropped before those below it.
        Visit { copies: Copies { far, all: RefCell::default() }, near: view.visit() }
    }
}

/// A visit to memory.
pub(crate) struct Visit<'m> {
    copies: Copies<'m>,
    near: ringfence_iotlb::Visit<'m>,
}

impl ringfence_dma::Visit for Visit<'_> {
    type Lease = Lease;

    // Where the rest is not inlined with it, it costs a twelfth of what a small request does.
    // Always: this is each access of a queue, and no more than the table's own way with a cold branch.
    #[inline(always)]
    fn resolve(&self, addr: BusAddr, len: usize, access: Access, asked: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        match self.near.resolve(addr, len, access, asked) {
            Err(Stop::Fault(fault)) if fault.reason == FaultReason::Unmapped => self.copies.resolve(fault, len),
            found => found,
        }
    }

    #[inline]
    fn verdicts(&self) -> u64 {
        self.near.verdicts()
    }

    #[inline]
    fn may_have_changed(&self, addr: BusAddr, access: Access, verdicts: u64) -> bool {
        !self.copies.far.remote.is_empty() || self.near.may_have_changed(addr, access, verdicts)
    }

    #[inline]
    fn settle(&self) -> Result<(), Stop> {
        if self.copies.is_settled() { Ok(()) } else { self.copies.settle() }
    }

    #[inline]
    fn approach(&self, addr: BusAddr, access: Access) {
        self.near.approach(addr, access);
    }

    #[inline]
    fn keeps(&self) -> bool {
        self.near.keeps()
    }

    fn release(&self, ranges: &[(BusAddr, u32)]) {
        self.near.release(ranges);
    }

    fn lease(&self, ranges: &[(BusAddr, u32)]) -> Lease {
        self.near.lease(ranges)
    }
}

/// What was copied in one visit.
struct Copies<'m> {
    far: &'m Far,
    all: RefCell<Vec<Copy>>,
}

struct Copy {
    addr: u64,
    /// Where the queue works. It does not move while the list does.
    bytes: Ram,
    len: usize,
    /// What is known to be there; `None`: nothing, so all of it goes back, once.
    known: Option<Vec<u8>>,
    access: Access,
    of: Of,
}

/// What a copy is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    Ring,
    Buffer,
}

impl Copies<'_> {
    /// A copy of what `fault` was about.
    #[cold]
    fn resolve(&self, fault: Fault, len: usize) -> Result<HostSlice<'_>, Stop> {
        let Fault { addr, access, .. } = fault;
        let Some((last, permission)) = self.far.remote.find(addr.0) else { return Err(fault.into()) };
        if !permission.allows(access) {
            return Err(Fault { reason: FaultReason::Forbidden, ..fault }.into());
        }
        // Before anything is looked at anew: what a driver is to see first.
        self.write_back();
        let rest = usize::try_from(last - addr.0).unwrap_or(usize::MAX).saturating_add(1);
        let len = len.min(rest).min(COPY);
        if self.all.borrow().iter().map(|copy| copy.len).sum::<usize>() + len > COPIES {
            return Err(fault.into());
        }
        let bytes = Ram::new(len);
        let known = match permission {
            Permission::WriteOnly => None,
            _ => {
                let mut known = vec![0; len];
                self.far.link.read(addr.0, &mut known).map_err(|unanswered| match unanswered {
                    Unanswered::Refused => Stop::Fault(fault),
                    Unanswered::Later => LATER,
                })?;
                bytes.slice(0, len).write(0, &known);
                Some(known)
            }
        };
        let start = NonNull::new(bytes.slice(0, len).as_ptr()).expect("memory is not at address 0");
        let end = addr.0.saturating_add(len as u64 - 1);
        let is_ring = self.far.rings.iter().any(|&(first, last)| addr.0 <= last && first <= end);
        let of = if is_ring { Of::Ring } else { Of::Buffer };
        self.all.borrow_mut().push(Copy { addr: addr.0, bytes, len, known, access, of });
        // SAFETY: `bytes` is in the list now, which drops nothing until the visit ends, which the slice borrows. There are
        // no references to it but slices.
        Ok(unsafe { HostSlice::new(start, len) })
    }

    #[inline]
    fn is_settled(&self) -> bool {
        self.all.borrow().is_empty() && !self.far.on_its_way.get()
    }

    #[cold]
    fn settle(&self) -> Result<(), Stop> {
        self.write_back();
        if !self.far.on_its_way.get() {
            return Ok(());
        }
        // Who answers this has taken in whatever was sent before. Where nothing can be read there is no answer: then it is left
        // at that.
        if let Some(addr) = self.far.remote.readable()
            && self.far.link.read(addr, &mut [0]) == Err(Unanswered::Later)
        {
            return Err(LATER);
        }
        self.far.on_its_way.set(false);
        Ok(())
    }

    #[cold]
    fn write_back(&self) {
        for copy in self.all.borrow_mut().iter_mut().rev().filter(|copy| copy.access == Access::Write) {
            match copy.write_back(&self.far.link) {
                Ok(Arrival::Seen) => {}
                Ok(Arrival::OnItsWay) => self.far.on_its_way.set(true),
                Err(_) => {
                    tracing::error!(
                        "the client refuses a write of {} bytes at bus address {:#x}, which it has granted: the device \
                         needs a reset",
                        copy.len,
                        copy.addr
                    );
                    self.far.broken.ring();
                }
            }
        }
    }
}

/// Whoever is to answer waits for us.
const LATER: Stop = Stop::Miss(Miss { ticket: Ticket(0), covers: Miss::NOTHING_ASKED });

impl Drop for Copies<'_> {
    #[inline]
    fn drop(&mut self) {
        // As a rule there are none, and there are many visits.
        if !self.all.get_mut().is_empty() {
            self.write_back();
        }
    }
}

impl Copy {
    fn write_back(&mut self, link: &Link) -> Result<Arrival, Unanswered> {
        let mut now = vec![0; self.len];
        self.bytes.slice(0, self.len).read(0, &mut now);
        let changes = match &self.known {
            Some(known) => changes(self.addr, known, &now, self.of),
            None => std::iter::once(0..self.len).collect(),
        };
        let mut arrival = Arrival::Seen;
        for range in changes.into_iter().rev() {
            arrival = arrival.max(link.write(self.addr + range.start as u64, &now[range])?);
        }
        self.known = Some(now);
        Ok(arrival)
    }
}

/// Of a ring a change goes back with those in the same aligned so many bytes: a descriptor of a packed ring, whose last two
/// bytes say that it is used, is one message.
const AT_ONCE: u64 = 16;

/// Where two slices of one length differ, in order; the first byte is at `addr`.
fn changes(addr: u64, before: &[u8], now: &[u8], of: Of) -> Vec<Range<usize>> {
    let mut changes: Vec<Range<usize>> = Vec::new();
    let block = |at: usize| addr.wrapping_add(at as u64) / AT_ONCE;
    for (at, _) in before.iter().zip(now).enumerate().filter(|(_, (before, now))| before != now) {
        match changes.last_mut() {
            Some(last) if of == Of::Buffer || at == last.end || block(at) == block(last.end - 1) => last.end = at + 1,
            _ => changes.push(at..at + 1),
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_apart() {
        assert_eq!(changes(0, b"abcdef", b"abcdef", Of::Ring), []);
        assert_eq!(changes(0, b"abcdef", b"abcdef", Of::Buffer), []);
        let whole = changes(0x1000, b"abcdef", b"xbcdyz", Of::Ring);
        assert_eq!((whole.len(), &whole[0]), (1, &(0..6)), "a descriptor goes as one");
        assert_eq!(changes(0x100d, b"abcdefgh", b"xbcdefyz", Of::Ring), [0..1, 6..8]);
        let whole = changes(0x100d, b"abcdefgh", b"axcdefyh", Of::Buffer);
        assert_eq!((whole.len(), &whole[0]), (1, &(1..7)), "a buffer is nobody else's");
    }
}
