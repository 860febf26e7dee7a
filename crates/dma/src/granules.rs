use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// So many equal pieces of something, handed out in runs: of memory, of bus addresses, of grants.
///
/// Several threads may use it, without a lock; two that race for the last pieces may both get none.
#[derive(Debug)]
pub struct Granules {
    /// A bit for each granule: set while it is taken.
    taken: Box<[AtomicU64]>,
    granules: usize,
    free: AtomicUsize,
    /// Where the next search starts.
    hint: AtomicUsize,
}

impl Granules {
    /// `count` of them, all free.
    pub fn new(count: usize) -> Self {
        let taken = (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { taken, granules: count, free: AtomicUsize::new(count), hint: AtomicUsize::new(0) }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.granules
    }

    /// How many are left, perhaps scattered.
    pub fn free(&self) -> usize {
        self.free.load(Ordering::Relaxed)
    }

    /// Takes `wanted` in a row, of which there is at least one, and says which is the first. What was given back last is
    /// handed out again as late as possible. `None` where there is no such run.
    pub fn take(&self, wanted: usize) -> Option<usize> {
        if wanted > self.granules {
            return None;
        }
        let hint = self.hint.load(Ordering::Relaxed);
        let hint = if hint <= self.granules - wanted { hint } else { 0 };
        // From the hint to the end, then all of it: a run may begin before the hint and end behind it.
        let first = self.run(hint, wanted).or_else(|| if hint == 0 { None } else { self.run(0, wanted) })?;
        self.free.fetch_sub(wanted, Ordering::Relaxed);
        self.hint.store(first + wanted, Ordering::Relaxed);
        Some(first)
    }

    /// Gives back what [`take`](Self::take) handed out for `count` at `first`. Anything else panics.
    pub fn give_back(&self, first: usize, count: usize) {
        assert!(first <= self.granules && count <= self.granules - first, "{count} granules at {first}");
        for granule in first..first + count {
            assert!(self.release(granule), "granule {granule} was not taken");
        }
        self.free.fetch_add(count, Ordering::Relaxed);
    }

    /// Claims `wanted` granules in a row, the first that are free from `from` on. Looks at each granule once.
    fn run(&self, from: usize, wanted: usize) -> Option<usize> {
        let mut first = from;
        let mut next = from;
        while first + wanted <= self.granules {
            if next == first + wanted {
                return Some(first);
            }
            if !self.claim(next) {
                (first..next).for_each(|granule| {
                    self.release(granule);
                });
                first = next + 1;
            }
            next += 1;
        }
        None
    }

    /// Acquire, so that what the one who gave it back did with the memory comes before what we do.
    fn claim(&self, granule: usize) -> bool {
        let bit = 1 << (granule % 64);
        self.taken[granule / 64].fetch_or(bit, Ordering::Acquire) & bit == 0
    }

    /// Release, for `claim`. Says whether it was claimed.
    fn release(&self, granule: usize) -> bool {
        let bit = 1 << (granule % 64);
        self.taken[granule / 64].fetch_and(!bit, Ordering::Release) & bit != 0
    }
}
