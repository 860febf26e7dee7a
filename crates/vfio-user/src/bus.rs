//! Memory as a queue of the function reaches it: what is mapped here at once, the rest by messages to the client.
//!
//! Who grants memory without a file answers for each access. It is slow, and is what there is: a copy is fetched when the
//! queue looks, and what the queue changed of it goes back, all of it within the visit. The order in which a driver may see
//! changes is kept: whatever was copied last goes back first, for a ring is found before the buffers that it tells of, and
//! of one copy what lies behind goes first, for an index lies before the entries that it counts.

use crate::event::Event;
use crate::link::{Link, Unanswered};
use crate::memory::Remote;
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Memory, Miss, Permission, Ram, Stop, Ticket};
use ringfence_iotlb::{Lease, View};
use std::cell::RefCell;
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
}

impl Bus {
    pub(crate) fn new(view: View, remote: Arc<Remote>, link: Arc<Link>, broken: Arc<Event>) -> Self {
        Self { view, far: Far { remote, link, broken } }
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

    #[inline]
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
                    Unanswered::Later => Stop::Miss(Miss { ticket: Ticket(0), covers: Miss::NOTHING_ASKED }),
                })?;
                bytes.slice(0, len).write(0, &known);
                Some(known)
            }
        };
        let start = NonNull::new(bytes.slice(0, len).as_ptr()).expect("memory is not at address 0");
        self.all.borrow_mut().push(Copy { addr: addr.0, bytes, len, known, access });
        // SAFETY: `bytes` is in the list now, which drops nothing until the visit ends, which the slice borrows. There are
        // no references to it but slices.
        Ok(unsafe { HostSlice::new(start, len) })
    }

    fn write_back(&self) {
        for copy in self.all.borrow_mut().iter_mut().rev() {
            if copy.access == Access::Write && copy.write_back(&self.far.link).is_err() {
                tracing::error!(
                    "the client refuses a write of {} bytes at bus address {:#x}, which it has granted: the device needs a \
                     reset",
                    copy.len,
                    copy.addr
                );
                self.far.broken.ring();
            }
        }
    }
}

impl Drop for Copies<'_> {
    fn drop(&mut self) {
        self.write_back();
    }
}

impl Copy {
    fn write_back(&mut self, link: &Link) -> Result<(), Unanswered> {
        let mut now = vec![0; self.len];
        self.bytes.slice(0, self.len).read(0, &mut now);
        let changes = match &self.known {
            Some(known) => changes(known, &now),
            None => vec![0..self.len],
        };
        for range in changes.into_iter().rev() {
            link.write(self.addr + range.start as u64, &now[range])?;
        }
        self.known = Some(now);
        Ok(())
    }
}

/// Where two slices of one length differ, in order.
fn changes(before: &[u8], now: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut changes: Vec<std::ops::Range<usize>> = Vec::new();
    for (at, _) in before.iter().zip(now).enumerate().filter(|(_, (before, now))| before != now) {
        match changes.last_mut() {
            Some(last) if at == last.end => last.end += 1,
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
        assert_eq!(changes(b"abcdef", b"abcdef"), []);
        assert_eq!(changes(b"abcdef", b"xbcdyz"), [0..1, 4..6]);
    }
}
