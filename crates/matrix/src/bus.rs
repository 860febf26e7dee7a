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
    Foreign,
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

    /// An address is the guest's own, of any of its pages: on Xen, what a privileged domain maps of another one.
    pub fn foreign(machine: &Arc<Machine>, trace: &Trace) -> Self {
        Self { way: Way::Foreign, ..Self::plain(machine, trace) }
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
            Way::Plain => Seen::Plain,
            Way::Foreign => Seen::Foreign,
            Way::Iommu(walk) => Seen::Iommu(walk.visit()),
        };
        BusVisit { sight, machine: &self.machine, trace: &self.trace }
    }
}

/// A visit to memory by way of a [`Bus`].
#[derive(Debug)]
pub struct BusVisit<'m> {
    sight: Seen<'m>,
    machine: &'m Machine,
    trace: &'m Trace,
}

#[derive(Debug)]
enum Seen<'m> {
    Plain,
    Foreign,
    Iommu(Sight<'m, Arc<Machine>>),
}

impl Visit for BusVisit<'_> {
    type Lease = Option<Lease>;

    fn resolve(&self, sent: BusAddr, len: usize, access: Access, asked: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        let nowhere = Fault { addr: sent, access, reason: FaultReason::Unmapped };
        let slice = match &self.sight {
            Seen::Plain => self.machine.slice(Gpa(sent.0), len).ok_or(nowhere)?,
            Seen::Foreign => {
                let at = self.machine.machine_addr(Gpa(sent.0)).ok_or(nowhere)?;
                self.machine.slice(Gpa(at), len).ok_or(nowhere)?
            }
            Seen::Iommu(sight) => sight.resolve(sent, len, access, asked)?,
        };
        self.trace.push(Touch { sent, reached: self.machine.guest_addr(slice), access });
        Ok(slice)
    }

    fn lease(&self, ranges: &[(BusAddr, u32)]) -> Option<Lease> {
        match &self.sight {
            Seen::Plain | Seen::Foreign => None,
            Seen::Iommu(sight) => Some(sight.lease(ranges)),
        }
    }
}
