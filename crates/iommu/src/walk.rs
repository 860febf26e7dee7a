use crate::Domain;
use crate::dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Memory, Physical, Stop, Ticket, Visit};
use alloc::sync::Arc;
use core::ops::Deref;

/// Memory as a device in this process sees it through its domain: each access looks at the mappings, nothing is cached.
///
/// What is not mapped is a fault at once: an IOMMU without page requests answers no miss later. `R` refers to the memory
/// behind: `&Ram`, `Arc<Ram>`.
#[derive(Clone, Debug)]
pub struct Walk<R> {
    domain: Arc<Domain>,
    memory: R,
}

impl<R: Deref<Target: Physical>> Walk<R> {
    /// `memory` as `domain` shows it.
    pub fn new(domain: Arc<Domain>, memory: R) -> Self {
        Self { domain, memory }
    }
}

impl<R: Deref<Target: Physical>> Memory for Walk<R> {
    type Lease = Lease;
    type Visit<'m>
        = Sight<'m, R>
    where
        Self: 'm;

    fn visit(&mut self) -> Sight<'_, R> {
        Sight { visit: self.domain.enter(), walk: self }
    }
}

/// A visit through a [`Walk`]. [`Domain::unmap`] waits for its end.
#[derive(Debug)]
pub struct Sight<'m, R> {
    walk: &'m Walk<R>,
    visit: u64,
}

impl<R: Deref<Target: Physical>> Visit for Sight<'_, R> {
    type Lease = Lease;

    fn resolve(&self, addr: BusAddr, len: usize, access: Access, _: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let domain = &self.walk.domain;
        let (gpa, contiguous) = domain.translate(addr, access)?;
        let len = usize::try_from(contiguous).map_or(len, |contiguous| contiguous.min(len));
        self.walk.memory.slice(gpa, len).ok_or_else(|| {
            // Mapped to where there is no memory: for the device no different.
            let fault = Fault { addr, access, reason: FaultReason::Unmapped };
            domain.report(fault);
            fault.into()
        })
    }

    fn lease(&self, ranges: &[(BusAddr, u32)]) -> Lease {
        let domain = self.walk.domain.clone();
        let holder = domain.holder();
        domain.hold(holder, ranges);
        Lease { domain, holder }
    }
}

impl<R> Drop for Sight<'_, R> {
    fn drop(&mut self) {
        self.walk.domain.leave(self.visit);
    }
}

/// Keeps translations of a [`Walk`] good: [`Domain::unmap`] waits until it is dropped.
#[derive(Debug)]
pub struct Lease {
    domain: Arc<Domain>,
    holder: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.domain.release(self.holder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::{Gpa, Permission, Ram, copy_from_bus, copy_to_bus};
    use crate::{Mapping, Window};
    use core::sync::atomic::{AtomicU64, Ordering};
    extern crate std;

    const PAGE: u64 = 4096;

    #[test]
    fn scattered_pages_read_as_one_range_and_a_forbidden_one_faults() {
        let ram = Ram::new(4 * PAGE as usize);
        let domain = Arc::new(Domain::new(Window::HIGH));
        let base = BusAddr(0x7fff_0000_0000_0000);
        for (page, gpa, permission) in
            [(0, 0x2000, Permission::ReadWrite), (1, 0, Permission::ReadWrite), (2, 0x1000, Permission::ReadOnly)]
        {
            let addr = BusAddr(base.0 + page * PAGE);
            domain.map_at(Mapping { addr, gpa: Gpa(gpa), len: PAGE, permission }).unwrap();
        }
        let mut walk = Walk::new(domain.clone(), &ram);
        let visit = walk.visit();
        let at = BusAddr(base.0 + PAGE - 2);
        copy_to_bus(&visit, at, &[1, 2, 3, 4], None).unwrap();
        let mut bytes = [0; 2];
        ram.slice(0x2ffe, 2).read(0, &mut bytes);
        assert_eq!(bytes, [1, 2]);
        ram.slice(0, 2).read(0, &mut bytes);
        assert_eq!(bytes, [3, 4]);

        let forbidden = BusAddr(base.0 + 2 * PAGE);
        copy_from_bus(&visit, forbidden, &mut bytes, None).unwrap();
        let fault = Fault { addr: forbidden, access: Access::Write, reason: FaultReason::Forbidden };
        assert_eq!(copy_to_bus(&visit, forbidden, &[9], None), Err(Stop::Fault(fault)));
        let past = Fault { addr: BusAddr(base.0 + 3 * PAGE), access: Access::Read, reason: FaultReason::Unmapped };
        assert_eq!(copy_from_bus(&visit, past.addr, &mut bytes, None), Err(Stop::Fault(past)));
        assert_eq!(domain.faults().latest, [fault, past]);
    }

    #[test]
    fn a_mapping_to_where_no_memory_is_faults() {
        let ram = Ram::new(PAGE as usize);
        let domain = Arc::new(Domain::default());
        let addr = domain.map(Gpa(1 << 40), PAGE, Permission::ReadWrite).unwrap();
        let mut walk = Walk::new(domain.clone(), &ram);
        assert!(walk.visit().resolve(addr, 1, Access::Read, None).is_err());
        assert_eq!(domain.faults().total, 1);
    }

    #[test]
    fn a_visit_ends_and_a_lease_outlives_it() {
        let ram = Ram::new(PAGE as usize);
        let domain = Arc::new(Domain::default());
        let addr = domain.map(Gpa(0), PAGE, Permission::ReadWrite).unwrap();
        let mut walk = Walk::new(domain.clone(), &ram);
        let lease = {
            let visit = walk.visit();
            visit.resolve(addr, 1, Access::Read, None).unwrap();
            visit.lease(&[(addr, 1)])
        };
        drop(lease);
        // With either still open this would not return.
        domain.unmap(addr, PAGE).unwrap();
    }

    /// A device that writes all the time, through whatever address it was last told, from its own thread: once `unmap`
    /// has returned, not a byte changes.
    #[test]
    fn after_unmap_there_is_silence() {
        const ROUNDS: usize = 500;
        let ram = Ram::new(PAGE as usize);
        let domain = Arc::new(Domain::default());
        let told = AtomicU64::new(0);
        let written = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut walk = Walk::new(domain.clone(), &ram);
                let mut turn = 0_u8;
                loop {
                    let addr = match told.load(Ordering::Relaxed) {
                        u64::MAX => break,
                        addr => BusAddr(addr),
                    };
                    turn = turn.wrapping_add(1);
                    let visit = walk.visit();
                    let Ok(slice) = visit.resolve(addr, 64, Access::Write, None) else {
                        drop(visit);
                        std::thread::yield_now();
                        continue;
                    };
                    let (slice, lease) = (slice.detach(), visit.lease(&[(addr, 64)]));
                    drop(visit);
                    // SAFETY: the lease is held until the line after.
                    unsafe { slice.attach() }.fill(turn | 1);
                    drop(lease);
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
            let _end = EndOf(&told);
            for _ in 0..ROUNDS {
                let addr = domain.map(Gpa(0), PAGE, Permission::WriteOnly).unwrap();
                let before = written.load(Ordering::Relaxed);
                told.store(addr.0, Ordering::Relaxed);
                while written.load(Ordering::Relaxed) == before {
                    std::thread::yield_now();
                }
                domain.unmap(addr, PAGE).unwrap();
                ram.slice(0, 64).fill(0);
                for _ in 0..20 {
                    let mut bytes = [1; 64];
                    ram.slice(0, 64).read(0, &mut bytes);
                    assert_eq!(bytes, [0; 64]);
                }
            }
        });
        assert!(domain.faults().total > 0, "the device never came too late, so this showed nothing");
    }

    /// Ends the device's thread, also when the test fails.
    struct EndOf<'t>(&'t AtomicU64);

    impl Drop for EndOf<'_> {
        fn drop(&mut self) {
            self.0.store(u64::MAX, Ordering::Relaxed);
        }
    }
}
