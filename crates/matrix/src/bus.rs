use crate::Machine;
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, Gpa, HostSlice, Memory, Physical, Stop, Ticket, Visit};
use ringfence_iommu::{Domain, Lease, Sight, Walk};
use std::sync::{Arc, Mutex, PoisonError};

/// A device's way to memory, which writes down where its accesses went.
#[derive(Debug)]
pub struct Bus {
    way: Way,
    machine: Arc<Machine>,
    trace: Trace,
}

#[derive(Debug)]
enum Way {
    Plain,
    Iommu(Walk<Arc<Machine>>),
}

/// Where a device's accesses went, shared by all who look.
#[derive(Clone, Debug, Default)]
pub struct Trace(Arc<Mutex<Vec<Touch>>>);

/// An access that was let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// The address that the device sent.
    pub sent: BusAddr,
    /// What the guest calls the byte that was reached; `None` if it is not the guest's.
    pub reached: Option<Gpa>,
    /// What was wanted.
    pub access: Access,
}

impl Trace {
    /// Every access so far.
    pub fn touches(&self) -> Vec<Touch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn push(&self, touch: Touch) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(touch);
    }
}

impl Bus {
    /// Nothing translates: an address is the machine's.
    pub fn plain(machine: &Arc<Machine>, trace: &Trace) -> Self {
        Self { way: Way::Plain, machine: Arc::clone(machine), trace: trace.clone() }
    }

    /// Through an IOMMU, which shows the device `domain`.
    pub fn through(domain: &Arc<Domain>, machine: &Arc<Machine>, trace: &Trace) -> Self {
        let walk = Walk::new(Arc::clone(domain), Arc::clone(machine));
        Self { way: Way::Iommu(walk), ..Self::plain(machine, trace) }
    }
}

impl Memory for Bus {
    type Lease = Option<Lease>;
    type Visit<'m> = BusVisit<'m>;

    fn visit(&mut self) -> BusVisit<'_> {
        let sight = match &mut self.way {
            Way::Plain => None,
            Way::Iommu(walk) => Some(walk.visit()),
        };
        BusVisit { sight, machine: &self.machine, trace: &self.trace }
    }
}

/// A visit to memory by way of a [`Bus`].
#[derive(Debug)]
pub struct BusVisit<'m> {
    sight: Option<Sight<'m, Arc<Machine>>>,
    machine: &'m Machine,
    trace: &'m Trace,
}

impl Visit for BusVisit<'_> {
    type Lease = Option<Lease>;

    fn resolve(&self, sent: BusAddr, len: usize, access: Access, asked: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let slice = match &self.sight {
            Some(sight) => sight.resolve(sent, len, access, asked)?,
            None => self.machine.slice(Gpa(sent.0), len).ok_or(Fault {
                addr: sent,
                access,
                reason: FaultReason::Unmapped,
            })?,
        };
        self.trace.push(Touch { sent, reached: self.machine.guest_addr(slice), access });
        Ok(slice)
    }

    fn lease(&self, ranges: &[(BusAddr, u32)]) -> Option<Lease> {
        self.sight.as_ref().map(|sight| sight.lease(ranges))
    }
}
