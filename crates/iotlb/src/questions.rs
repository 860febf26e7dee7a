//! What was asked, what was answered, and who may go on because of it. A state machine: time and table are handed in.
//!
//! A question is *open* from the first miss of its page until an UPDATE brings the page, a reply denies it, or a reply
//! grants it and its UPDATE came and is gone again. Replies carry no number: the n-th reply answers the n-th question
//! handed to `Ask::ask`, whether or not that is still open. A reply comes over one socket and the UPDATE over another,
//! so that either may be seen first.

use crate::iotlb::{Question, Replies};
use ringfence_dma::{Access, BusAddr, FaultReason, Miss, Permission, Ticket};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// How many questions may wait for a reply, or for an UPDATE where there are no replies. Past that, misses wait
/// unasked for a place; where there are no replies the oldest question gives up its place, since it may never be
/// answered.
pub const UNANSWERED: usize = 1 << 16;
/// How many refusals are remembered. Whoever waited for one that was forgotten asks again.
pub const REFUSALS: usize = 1 << 12;

/// How long a question that was granted waits for its UPDATE before it is asked again.
const PATIENCE: Duration = Duration::from_millis(50);
/// How often in a row, before it counts as refused.
const ATTEMPTS: u32 = 64;
/// The smallest page anybody translates by.
const PAGE: u64 = 4096;
/// The largest size of UPDATE from which the next is foretold.
const LARGEST_GRANULE: u64 = 1 << 30;

/// What a miss comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Wait. `sent` names a question to be passed on when the visit ends; `retry` is when to try again at the latest.
    Wait { miss: Miss, question: Option<Handle>, retry: Option<Instant> },
    /// It was refused.
    Refused(FaultReason),
}

/// A question that was written down and not yet passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handle {
    access: Access,
    page: u64,
    number: u64,
}

/// What changed for those who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum News {
    None,
    Some,
}

pub(crate) struct Questions {
    replies: Replies,
    /// Of the question that comes next.
    number: u64,
    /// How much one answer is expected to cover: a power of two.
    granule: u64,
    /// By access and page.
    open: [BTreeMap<u64, Open>; 2],
    /// Passed on, oldest first. Those that were resolved stay until their reply has come.
    unanswered: VecDeque<Handle>,
    refusals: [BTreeMap<u64, Refusal>; 2],
    /// Which refusal goes first when there are too many. May name some that are gone.
    refused: VecDeque<(Access, u64, u64)>,
}

struct Open {
    /// The byte that was wanted.
    at: u64,
    number: u64,
    state: State,
    /// Granted in a row without an UPDATE.
    attempts: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its visit goes on.
    Written,
    Asked,
    /// Asked; an UPDATE came that lacked the permission. What the reply says decides.
    Lacking,
    /// The reply came first.
    Granted {
        until: Instant,
    },
}

#[derive(Clone, Copy)]
struct Refusal {
    number: u64,
    reason: FaultReason,
}

fn of(access: Access) -> usize {
    match access {
        Access::Read => 0,
        Access::Write => 1,
    }
}

impl Questions {
    pub(crate) fn new(replies: Replies) -> Questions {
        Questions {
            replies,
            number: 1,
            granule: PAGE,
            open: Default::default(),
            unanswered: VecDeque::new(),
            refusals: Default::default(),
            refused: VecDeque::new(),
        }
    }

    /// Somebody needs `addr`, and the table has it not.
    pub(crate) fn miss(
        &mut self,
        addr: BusAddr,
        access: Access,
        asked: Option<Ticket>,
        now: impl FnOnce() -> Instant,
    ) -> Verdict {
        // Below the number of every question asked from now on, above that of every earlier one: a refusal that
        // answers an older question says nothing about what the guest has mapped since.
        let ticket = asked.unwrap_or(Ticket(self.number));
        if let Some(reason) = self.refusal(addr.0, access, ticket) {
            return Verdict::Refused(reason);
        }
        let granule = self.granule - 1;
        let miss = Miss { ticket, covers: (addr.0 | granule) - addr.0 + 1 };
        let about = self.open[of(access)].range_mut(page(addr.0 & !granule)..=page(addr.0 | granule)).next();
        let (question, retry) = match about.map(|(&page, open)| (page, open)) {
            None => (self.write_down(addr.0, access, 0), None),
            Some((_, Open { state: State::Granted { until }, at, attempts, number })) => {
                let (until, at, attempts, number) = (*until, *at, *attempts, *number);
                if now() < until {
                    (None, Some(until))
                } else if attempts < ATTEMPTS {
                    self.open[of(access)].remove(&page(at));
                    (self.write_down(at, access, attempts), None)
                } else {
                    self.open[of(access)].remove(&page(at));
                    self.refuse(at, access, number, FaultReason::Unmapped);
                    // If this waiter came later, or waits for another page, it starts over.
                    if let Some(reason) = self.refusal(addr.0, access, ticket) {
                        return Verdict::Refused(reason);
                    }
                    (self.write_down(addr.0, access, 0), None)
                }
            }
            Some(_) => (None, None),
        };
        Verdict::Wait { miss, question, retry }
    }

    fn refusal(&self, addr: u64, access: Access, ticket: Ticket) -> Option<FaultReason> {
        let refusal = self.refusals[of(access)].get(&page(addr))?;
        (refusal.number >= ticket.0).then_some(refusal.reason)
    }

    fn write_down(&mut self, at: u64, access: Access, attempts: u32) -> Option<Handle> {
        if self.unanswered.len() >= UNANSWERED {
            match self.replies {
                Replies::Each => return None,
                Replies::Never => self.give_up_the_oldest()?,
            }
        }
        if self.open[0].len() + self.open[1].len() >= UNANSWERED {
            // Promises that were not kept, to waiters who are gone. One who is not asks again.
            self.open.iter_mut().for_each(|open| open.retain(|_, open| !matches!(open.state, State::Granted { .. })));
        }
        if self.open[0].len() + self.open[1].len() >= UNANSWERED {
            return None;
        }
        let handle = Handle { access, page: page(at), number: self.number };
        self.number += 1;
        let open = Open { at, number: handle.number, state: State::Written, attempts };
        self.open[of(access)].insert(handle.page, open);
        Some(handle)
    }

    fn give_up_the_oldest(&mut self) -> Option<()> {
        let oldest = self.unanswered.pop_front()?;
        if self.is_open(oldest) {
            self.open[of(oldest.access)].remove(&oldest.page);
        }
        Some(())
    }

    fn is_open(&self, handle: Handle) -> bool {
        self.open[of(handle.access)].get(&handle.page).is_some_and(|open| open.number == handle.number)
    }

    /// A visit is over: which of the questions that it wrote down are to be passed on now, in this order.
    pub(crate) fn ask(&mut self, written: impl Iterator<Item = Handle>, into: &mut Vec<Question>) {
        for handle in written {
            let Some(open) = self.open[of(handle.access)].get_mut(&handle.page) else { continue };
            if open.number == handle.number && open.state == State::Written {
                open.state = State::Asked;
                self.unanswered.push_back(handle);
                into.push(Question { addr: BusAddr(open.at), access: handle.access });
            }
        }
    }

    /// An UPDATE is in the table.
    pub(crate) fn updated(&mut self, first: u64, last: u64, permission: Permission) -> News {
        let mut news = News::None;
        for access in [Access::Read, Access::Write] {
            let pages = page(first)..=page(last);
            if !self.refusals[of(access)].is_empty() {
                let gone: Vec<u64> = self.refusals[of(access)].range(pages.clone()).map(|(&page, _)| page).collect();
                for page in gone {
                    self.refusals[of(access)].remove(&page);
                }
            }
            if self.open[of(access)].is_empty() {
                continue;
            }
            let about: Vec<u64> = self.open[of(access)]
                .range(pages)
                .filter(|(_, open)| first <= open.at && open.at <= last)
                .map(|(&page, _)| page)
                .collect();
            for page in about {
                news = News::Some;
                self.granule = granule(first, last);
                if permission.allows(access) {
                    self.open[of(access)].remove(&page);
                } else {
                    self.lacks(access, page);
                }
            }
        }
        news
    }

    /// An UPDATE came for an open question, without the permission.
    fn lacks(&mut self, access: Access, page: u64) {
        let Some(open) = self.open[of(access)].get_mut(&page) else { return };
        match (open.state, self.replies) {
            // Not an answer: nobody was asked.
            (State::Written, _) => {}
            (State::Asked | State::Lacking, Replies::Each) => open.state = State::Lacking,
            (State::Granted { .. }, _) | (_, Replies::Never) => {
                let (at, number) = (open.at, open.number);
                self.open[of(access)].remove(&page);
                self.refuse(at, access, number, FaultReason::Forbidden);
            }
        }
    }

    /// The oldest question's reply. `permission` is the table's at an address. `None` if nothing was asked.
    pub(crate) fn answered(
        &mut self,
        granted: bool,
        permission: impl FnOnce(u64) -> Option<Permission>,
        now: impl FnOnce() -> Instant,
    ) -> Option<News> {
        if self.replies == Replies::Never {
            return None;
        }
        let handle = self.unanswered.pop_front()?;
        let access = handle.access;
        if !self.is_open(handle) {
            // Somebody may wait for the place in the queue.
            return Some(if self.unanswered.len() + 1 >= UNANSWERED { News::Some } else { News::None });
        }
        let open = self.open[of(access)].get_mut(&handle.page)?;
        let at = open.at;
        let reason = match (granted, permission(at), open.state) {
            (false, Some(permission), _) if !permission.allows(access) => Some(FaultReason::Forbidden),
            (false, ..) => Some(FaultReason::Unmapped),
            // Mapped, if by something that no UPDATE of ours brought.
            (true, Some(permission), _) if permission.allows(access) => None,
            (true, Some(_), State::Lacking) => Some(FaultReason::Forbidden),
            // The UPDATE came and was invalidated: not a refusal, the next try asks anew.
            (true, None, State::Lacking) => None,
            (true, ..) => {
                open.state = State::Granted { until: now() + PATIENCE };
                open.attempts += 1;
                return Some(News::Some);
            }
        };
        self.open[of(access)].remove(&handle.page);
        if let Some(reason) = reason {
            self.refuse(at, access, handle.number, reason);
        }
        Some(News::Some)
    }

    fn refuse(&mut self, at: u64, access: Access, number: u64, reason: FaultReason) {
        self.refusals[of(access)].insert(page(at), Refusal { number, reason });
        self.refused.push_back((access, page(at), number));
        while self.refused.len() > REFUSALS {
            let Some((access, page, number)) = self.refused.pop_front() else { break };
            if self.refusals[of(access)].get(&page).is_some_and(|refusal| refusal.number == number) {
                self.refusals[of(access)].remove(&page);
            }
        }
    }
}

fn page(addr: u64) -> u64 {
    addr & !(PAGE - 1)
}

/// What an answer tells about the size of the next.
fn granule(first: u64, last: u64) -> u64 {
    match (last - first).checked_add(1) {
        Some(len) if len.is_power_of_two() && first.is_multiple_of(len) => len.clamp(PAGE, LARGEST_GRANULE),
        _ => PAGE,
    }
}
