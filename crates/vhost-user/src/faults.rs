use crate::backend::Backend;
use ringfence_device::queue::Report;
use ringfence_dma::Fault;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many faults of a queue are told in one [`WINDOW`]: a guest can make as many as it can make requests.
const BURST: u32 = 5;
const WINDOW: Duration = Duration::from_secs(1);

/// Tells the log and the front-end of a queue's faults, within reason.
pub(crate) struct FaultReport {
    queue: u16,
    backend: Arc<Backend>,
    since: Instant,
    told: u32,
    untold: u64,
}

impl FaultReport {
    pub(crate) fn new(queue: u16, backend: Arc<Backend>) -> Self {
        Self { queue, backend, since: Instant::now(), told: 0, untold: 0 }
    }
}

impl Report for FaultReport {
    fn fault(&mut self, fault: Fault) {
        if self.since.elapsed() >= WINDOW {
            (self.since, self.told) = (Instant::now(), 0);
        }
        if self.told == BURST {
            self.untold += 1;
            return;
        }
        self.told += 1;
        let untold = std::mem::take(&mut self.untold);
        tracing::warn!(queue = self.queue, untold, "the guest let its disk {fault}; the request fails");
        self.backend.access_failed(fault);
    }
}
