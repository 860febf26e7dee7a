use crate::backend::Backend;
use ringfence_device::queue::Report;
use ringfence_dma::Fault;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How many events of a kind are told in one [`WINDOW`]: a guest can cause as many as it can make requests, and a
/// front-end as many as it can send messages.
const BURST: u32 = 5;
const WINDOW: Duration = Duration::from_secs(1);

/// Decides which of many like events the log hears of.
#[derive(Debug)]
pub struct Limit {
    since: Instant,
    told: u32,
    untold: u64,
}

impl Limit {
    /// One that has heard of nothing.
    #[expect(clippy::new_without_default, reason = "there is no usual limit, only the beginning of one")]
    pub fn new() -> Self {
        Self { since: Instant::now(), told: 0, untold: 0 }
    }

    /// Whether to tell of one more, and of how many nobody was told since the last.
    pub fn tell(&mut self) -> Option<u64> {
        if self.since.elapsed() >= WINDOW {
            (self.since, self.told) = (Instant::now(), 0);
        }
        if self.told == BURST {
            self.untold += 1;
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.untold))
    }
}

/// Tells the log and the front-end of a queue's faults, within reason.
pub(crate) struct FaultReport {
    /// Counts all of them.
    total: Arc<AtomicU64>,
    queue: u16,
    backend: Arc<Backend>,
    limit: Limit,
}

impl FaultReport {
    pub(crate) fn new(queue: u16, backend: Arc<Backend>, total: Arc<AtomicU64>) -> Self {
        Self { total, queue, backend, limit: Limit::new() }
    }
}

impl Report for FaultReport {
    fn fault(&mut self, fault: Fault) {
        self.total.fetch_add(1, Ordering::Relaxed);
        let Some(untold) = self.limit.tell() else { return };
        tracing::warn!(queue = self.queue, untold, "fault: {fault}; the driver's request fails");
        self.backend.access_failed(fault);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_of_in_a_few_lines() {
        let mut limit = Limit::new();
        let told = (0..1000).filter(|_| limit.tell().is_some()).count();
        assert!((BURST as usize..1000).contains(&told), "{told} of 1000");
        limit.since = Instant::now() - 2 * WINDOW;
        assert_eq!(limit.tell(), Some(1000 - told as u64));
    }
}
