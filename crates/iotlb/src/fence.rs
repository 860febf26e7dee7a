use crate::lease::Held;
use crate::view::Seat;
use ringfence_dma::BusAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What may still use translations that were removed: the visits that were under way, then the leases that overlap.
///
/// Leases for other addresses are not waited for, nor is anything that began later.
#[derive(Debug)]
#[must_use = "what was removed may be in use until the fence has been waited for"]
pub struct Fence {
    first: BusAddr,
    last: BusAddr,
    waits: Vec<(Arc<Seat>, Wait)>,
}

/// A fence was not passed in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// The first address of what was removed.
    pub first: BusAddr,
    /// The last.
    pub last: BusAddr,
    /// How many visits are still under way: threads that do not come back.
    pub visits: usize,
    /// How many leases are still held: I/O that does not end.
    pub leases: usize,
}

impl std::fmt::Display for Stuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Stuck { first, last, visits, leases } = self;
        write!(f, "{first} to {last} is still in use by {leases} requests and {visits} visits")
    }
}

impl std::error::Error for Stuck {}

#[derive(Clone, Copy, Debug)]
enum Wait {
    Visit { epoch: u64 },
    Lease(Held),
}

/// How long a fence is waited for at a time, by who may have to take memory away.
const STEP: Duration = Duration::from_millis(50);

/// How long those are waited for that memory has been taken away from.
pub const LOST_PATIENCE: Duration = Duration::from_secs(1);

impl Fence {
    /// One that has passed.
    #[inline]
    pub(crate) fn nothing(first: BusAddr, last: BusAddr) -> Fence {
        Fence { first, last, waits: Vec::new() }
    }

    /// Called after a SeqCst fence that comes after the removal, with the writer's lock held: a view that registers
    /// later sees the table without what was removed.
    pub(crate) fn new(seats: &[Arc<Seat>], first: BusAddr, last: BusAddr) -> Fence {
        let mut fence = Fence::nothing(first, last);
        for seat in seats.iter() {
            match seat.visit_under_way() {
                Some(epoch) => fence.waits.push((Arc::clone(seat), Wait::Visit { epoch })),
                None => fence.wait_for_leases(seat),
            }
        }
        fence
    }

    fn wait_for_leases(&mut self, seat: &Arc<Seat>) {
        let held = seat.holds.overlapping(self.first.0, self.last.0);
        self.waits.extend(held.map(|held| (Arc::clone(seat), Wait::Lease(held))));
    }

    /// Whether nothing uses what was removed any more. Does not wait.
    pub fn has_passed(&mut self) -> bool {
        let mut at = 0;
        while let Some((seat, wait)) = self.waits.get(at) {
            let over = match *wait {
                Wait::Visit { epoch } => !seat.is_in_visit(epoch),
                Wait::Lease(held) => !seat.holds.is_held(held),
            };
            if !over {
                at += 1;
                continue;
            }
            // What a visit leased was published before it ended.
            if let (seat, Wait::Visit { .. }) = self.waits.swap_remove(at) {
                self.wait_for_leases(&seat);
            }
        }
        self.waits.is_empty()
    }

    /// Returns when nothing uses what was removed any more.
    #[inline]
    pub fn wait(self) {
        // As it is nearly always.
        if !self.waits.is_empty() {
            self.wait_for_all();
        }
    }

    fn wait_for_all(mut self) {
        let mut pause = Pause::default();
        while !self.has_passed() {
            pause.pause();
        }
    }

    /// As [`Fence::wait`], for `patience` at most; may be called again.
    ///
    /// # Errors
    /// [`Stuck`]: what was removed is still in use.
    pub fn wait_for(&mut self, patience: Duration) -> Result<(), Stuck> {
        let mut deadline = None;
        let mut pause = Pause::default();
        while !self.has_passed() {
            if Instant::now() >= *deadline.get_or_insert_with(|| Instant::now() + patience) {
                let visits = self.waits.iter().filter(|(_, wait)| matches!(wait, Wait::Visit { .. })).count();
                let leases = self.waits.len() - visits;
                return Err(Stuck { first: self.first, last: self.last, visits, leases });
            }
            pause.pause();
        }
        Ok(())
    }

    /// As [`Fence::wait`], where memory itself may not answer, so that a visit to it does not end. After `patience`, or at once
    /// when `is_in_a_hurry`, `take_away` takes it from everybody, and says whether it could; those in it have
    /// [`LOST_PATIENCE`] then. As long as it could not there is nothing but to wait, and it is called anew after `patience`.
    ///
    /// # Errors
    /// [`Stuck`]: all was taken away, and somebody is in it still.
    pub fn wait_or_take_away(
        mut self,
        patience: Duration,
        is_in_a_hurry: impl Fn() -> bool,
        mut take_away: impl FnMut(Stuck) -> bool,
    ) -> Result<(), Stuck> {
        if self.waits.is_empty() {
            return Ok(());
        }
        let (mut since, mut hurried) = (Instant::now(), false);
        while let Err(stuck) = self.wait_for(STEP) {
            // Once: a hurry does not end.
            let hurries = !hurried && is_in_a_hurry();
            if !hurries && since.elapsed() < patience {
                continue;
            }
            hurried |= hurries;
            if take_away(stuck) {
                return self.wait_for(LOST_PATIENCE);
            }
            since = Instant::now();
        }
        Ok(())
    }
}

/// Spins as long as a visit takes, then sleeps in steps that are short beside an I/O. Whoever ends a lease so need not
/// look for sleepers, which would cost every request a full memory barrier.
#[derive(Default)]
struct Pause {
    turns: u32,
}

impl Pause {
    fn pause(&mut self) {
        self.turns = self.turns.saturating_add(1);
        #[cfg(loom)]
        loom::thread::yield_now();
        #[cfg(not(loom))]
        match self.turns {
            ..200 => std::hint::spin_loop(),
            200..220 => std::thread::yield_now(),
            220..270 => std::thread::sleep(Duration::from_micros(20)),
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}
