//! A software IOMMU as a front-end's: its mappings answer misses, and what it takes away is invalidated.

use super::{ClientError, Frontend, Translation, Translator, range};
use ringfence_dma::{BusAddr, DmaError, FrontendVa, Gpa, Permission};
use ringfence_driver::mapper::{self, Run};
use ringfence_iommu::{Domain, Invalidate, MapError, Window};
use std::sync::{Arc, Weak};

/// What a domain maps in.
const PAGE: u64 = 4096;

impl Frontend {
    /// Gives the device behind this front-end a domain of its own, in which nothing is mapped yet. `base` is where
    /// guest-physical 0 is in the memory table. Each miss is answered with as much around it as
    /// [`Options::granule`](super::Options::granule) says.
    ///
    /// # Errors
    /// As [`Frontend::serve_iotlb`].
    pub fn serve_domain(self: &Arc<Self>, window: Window, base: FrontendVa) -> Result<Arc<Domain>, ClientError> {
        let domain = Arc::new(Domain::watched(window, Forget(Arc::downgrade(self))));
        let granule = self.options.granule;
        self.serve_iotlb(Arc::new(Pages { domain: Arc::clone(&domain), base, granule }))?;
        Ok(domain)
    }
}

/// A domain's mappings as answers to misses, a piece at a time. By itself it takes nothing away: see
/// [`Frontend::serve_domain`] for that.
#[derive(Debug)]
pub struct Pages {
    /// Whose mappings.
    pub domain: Arc<Domain>,
    /// Where guest-physical 0 is in the memory table.
    pub base: FrontendVa,
    /// The most that one answer covers: a power of two, of bytes, not below 4096.
    pub granule: u64,
}

impl Translator for Pages {
    fn translate(&self, iova: BusAddr, _perm: Permission) -> Option<Translation> {
        let mapping = self.domain.lookup(iova)?;
        let rest = self.granule - 1;
        let first = (iova.0 & !rest).max(mapping.addr.0);
        let last = (iova.0 | rest).min(mapping.addr.0 + (mapping.len - 1));
        let uaddr = self.base.checked_add(mapping.gpa.0 + (first - mapping.addr.0))?;
        Some(Translation { iova: BusAddr(first), size: last - first + 1, uaddr, perm: mapping.permission })
    }
}

/// A domain as what a driver lends by: each buffer is mapped for its request, and taken away after it, by itself or many
/// at a time.
#[derive(Clone, Debug)]
pub struct Lent(pub Arc<Domain>);

impl mapper::Pages for Lent {
    fn page(&self) -> usize {
        PAGE as usize
    }

    fn max_len(&self) -> usize {
        usize::MAX & !(PAGE as usize - 1)
    }

    fn show(&self, physical: Gpa, len: usize, permission: Permission) -> Result<BusAddr, DmaError> {
        self.0.map(physical, len as u64, permission).map_err(|error| match error {
            MapError::NoGap { .. } => DmaError::OutOfAddresses { wanted: len },
            _ => DmaError::Unreachable { physical },
        })
    }

    fn hide(&self, runs: &[Run]) -> Result<(), DmaError> {
        let ranges: Vec<_> = runs.iter().map(|run| (run.addr, run.len as u64)).collect();
        self.0.unmap_all(&ranges).expect("runs that were shown, each as it was");
        Ok(())
    }
}

/// The front-end's thread holds the domain, so the domain does not hold the front-end.
struct Forget(Weak<Frontend>);

impl Invalidate for Forget {
    fn invalidate(&self, addr: BusAddr, len: u64) {
        self.invalidate_all(&[(addr, len)]);
    }

    fn invalidate_all(&self, ranges: &[(BusAddr, u64)]) {
        let Some(frontend) = self.0.upgrade() else { return };
        let ranges: Vec<_> = ranges.iter().filter_map(|&(addr, len)| range(addr, len)).collect();
        if let Err(error) = frontend.invalidate_all(&ranges) {
            // A device that has gone has forgotten.
            tracing::debug!("invalidation not acknowledged: {error}");
        }
    }
}
