//! How much processor time the two sides have used.

use rustix::time::{ClockId, clock_gettime};
use std::fs;
use std::time::Duration;

/// This process, and the one at the other end if that is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpu {
    pub(super) client: Duration,
    pub(super) server: Option<Duration>,
}

impl Cpu {
    pub(super) fn now(server: Option<u32>) -> Self {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Self { client: Duration::new(time.tv_sec as u64, time.tv_nsec as u32), server: server.and_then(of_process) }
    }

    pub(super) fn since(self, earlier: Cpu) -> Cpu {
        let server = self.server.zip(earlier.server).map(|(now, then)| now.saturating_sub(then));
        Cpu { client: self.client.saturating_sub(earlier.client), server }
    }
}

/// The time of all threads that a process has now.
fn of_process(pid: u32) -> Option<Duration> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let nanoseconds = threads.flatten().filter_map(|thread| {
        // A thread may end meanwhile.
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Some(Duration::from_nanos(nanoseconds.sum()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_on_both_sides() {
        let own = Some(std::process::id());
        let before = Cpu::now(own);
        let mut now = before;
        // Until it shows; a kernel without `schedstat` has nothing to show for the server.
        while now.since(before).client.is_zero() || now.since(before).server.is_some_and(|server| server.is_zero()) {
            std::hint::black_box((0..100_000_u64).sum::<u64>());
            now = Cpu::now(own);
        }
        assert!(Cpu::now(None).server.is_none());
    }
}
