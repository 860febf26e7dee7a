//! How long translations are kept: as long as a front-end can be relied on to take them away.
//!
//! A front-end that never invalidates is not a thought: QEMU before 8.1 is one with intel-iommu unless both sides have a
//! device TLB, and so is every QEMU up to 11.1 with amd-iommu. Whoever keeps their translations writes to memory that the
//! guest has long given to something else. Whoever keeps none asks for each page each time.
//!
//! Only one thing proves that a front-end takes translations away: that it does. Answers that do not change are but a sign: a
//! guest that uses one buffer maps it anew each time, at the same address, until it uses another. Yet a guest whose mappings
//! are for good never flushes, and must not be asked about each page each time. So thousands of answers in a row that did not
//! change, and none that was new, count as proof, and the log says so: a guest that boots reads its disk into many buffers
//! long before. Whether an address is mapped while no request needs it would tell the two apart for certain, but to ask for one
//! that is not is a fault, which the guest finds in its log; and to ask again for what is kept finds out too late.

use ringfence_dma::{BusAddr, FrontendVa};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// How long translations are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// For one request each, until the front-end has shown that it takes them away, or that they are for good.
    #[default]
    Auto,
    /// Until they are taken away.
    Cache,
    /// For one request each.
    Request,
}

impl FromStr for Keep {
    type Err = UnknownKeep;

    fn from_str(name: &str) -> Result<Self, UnknownKeep> {
        match name {
            "auto" => Ok(Keep::Auto),
            "cache" => Ok(Keep::Cache),
            "request" => Ok(Keep::Request),
            _ => Err(UnknownKeep),
        }
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Keep::Auto => "auto",
            Keep::Cache => "cache",
            Keep::Request => "request",
        })
    }
}

/// The text names no [`Keep`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownKeep;

impl fmt::Display for UnknownKeep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected auto, cache or request")
    }
}

impl std::error::Error for UnknownKeep {}

/// So many translations in a row that were asked for again and had not changed are for good. A driver that maps each request
/// breaks the row: it uses an address again for another buffer, which settles the matter, or one that is new.
const STEADY: u32 = 4096;

/// How many translations are remembered for comparing.
const REMEMBERED: usize = 32768;

/// What a front-end has shown of itself since its driver started.
#[derive(Debug)]
pub(crate) struct Trust {
    verdict: Verdict,
    /// What was given, and not taken away since.
    given: BTreeMap<BusAddr, FrontendVa>,
    /// How many in a row had not changed.
    steady: u32,
}

/// What follows for the translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Not known yet: they are kept for one request each.
    Open,
    /// They are kept: one was taken away.
    Keep,
    /// They are kept: they have not changed for long.
    Steady,
    /// The front-end was seen not to invalidate, here: they are kept for one request each.
    Stale(BusAddr),
}

impl Trust {
    pub(crate) fn new() -> Self {
        Self { verdict: Verdict::Open, given: BTreeMap::new(), steady: 0 }
    }

    pub(crate) fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// A translation arrived. `anew`: there was none for it, so if it was given before, a request has used it up.
    pub(crate) fn updated(&mut self, iova: BusAddr, target: FrontendVa, anew: bool) {
        if self.verdict != Verdict::Open {
            return;
        }
        if self.given.len() >= REMEMBERED {
            self.given.clear();
        }
        match self.given.insert(iova, target) {
            Some(before) if before != target => self.settle(Verdict::Stale(iova)),
            Some(_) if anew => {
                self.steady += 1;
                if self.steady == STEADY {
                    self.settle(Verdict::Steady);
                }
            }
            Some(_) => {}
            None => self.steady = 0,
        }
    }

    /// A range was taken away. `in_use` tells which translations are still there: those of rings are when a driver
    /// starts, and that they are flushed then says nothing of what comes later.
    pub(crate) fn invalidated(&mut self, first: BusAddr, last: BusAddr, in_use: impl Fn(BusAddr) -> bool) {
        if self.verdict != Verdict::Open {
            return;
        }
        let mut used_up = false;
        self.given.retain(|&iova, _| {
            let taken = (first..=last).contains(&iova);
            used_up |= taken && !in_use(iova);
            !taken
        });
        if used_up {
            self.settle(Verdict::Keep);
        }
    }

    fn settle(&mut self, verdict: Verdict) {
        self.verdict = verdict;
        self.given = BTreeMap::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: BusAddr = BusAddr(0x1000);
    const B: BusAddr = BusAddr(0x2000);

    #[test]
    fn a_page_given_anew_with_another_target_and_never_taken_away_is_stale() {
        let mut trust = Trust::new();
        trust.updated(A, FrontendVa(1), true);
        trust.updated(B, FrontendVa(2), true);
        trust.updated(A, FrontendVa(1), true);
        assert_eq!(trust.verdict(), Verdict::Open);
        trust.updated(B, FrontendVa(3), true);
        assert_eq!(trust.verdict(), Verdict::Stale(B));
        trust.invalidated(A, B, |_| false);
        assert_eq!(trust.verdict(), Verdict::Stale(B), "a driver that starts anew is another matter");
    }

    #[test]
    fn taking_away_what_a_request_has_used_up_earns_trust() {
        let mut trust = Trust::new();
        trust.updated(A, FrontendVa(1), true);
        trust.updated(B, FrontendVa(2), true);
        trust.invalidated(A, A, |_| true);
        assert_eq!(trust.verdict(), Verdict::Open, "a ring that is flushed at the start proves nothing");
        trust.updated(A, FrontendVa(9), true);
        assert_eq!(trust.verdict(), Verdict::Open, "it had been taken away");
        trust.invalidated(BusAddr(0), BusAddr(u64::MAX), |iova| iova == A);
        assert_eq!(trust.verdict(), Verdict::Keep);
    }

    #[test]
    fn mappings_that_do_not_change_for_long_earn_trust_and_one_that_does_loses_it() {
        let nearly = || {
            let mut trust = Trust::new();
            trust.updated(A, FrontendVa(1), true);
            for _ in 1..STEADY {
                trust.updated(A, FrontendVa(1), true);
                // Given twice for one request: for reading and for writing.
                trust.updated(A, FrontendVa(1), false);
            }
            assert_eq!(trust.verdict(), Verdict::Open);
            trust
        };
        let mut trust = nearly();
        trust.updated(A, FrontendVa(1), true);
        assert_eq!(trust.verdict(), Verdict::Steady);
        let mut trust = nearly();
        trust.updated(A, FrontendVa(2), true);
        assert_eq!(trust.verdict(), Verdict::Stale(A));
        let mut trust = nearly();
        trust.invalidated(A, A, |_| false);
        assert_eq!(trust.verdict(), Verdict::Keep);
    }

    #[test]
    fn what_never_changes_says_nothing_of_what_is_new_each_time() {
        let mut trust = Trust::new();
        for page in 0..10 * STEADY as u64 {
            trust.updated(A, FrontendVa(1), true);
            trust.updated(BusAddr(0x10_0000 + (page << 12)), FrontendVa(page), true);
        }
        assert_eq!(trust.verdict(), Verdict::Open);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut trust = Trust::new();
        for page in 0..10 * REMEMBERED as u64 {
            trust.updated(BusAddr(page << 12), FrontendVa(page), true);
            assert!(trust.given.len() <= REMEMBERED);
        }
    }

    #[test]
    fn names_are_their_own_inverse() {
        for keep in [Keep::Auto, Keep::Cache, Keep::Request] {
            assert_eq!(keep.to_string().parse(), Ok(keep));
        }
        assert_eq!("often".parse::<Keep>(), Err(UnknownKeep));
    }
}
