//! What was asked, what was answered, and who may go on because of it. A state machine: time and table are handed in.
//!
//! A question is *open* from the first miss of its page until an UPDATE brings the page, a reply denies it, or a reply
//! grants it and its UPDATE came and is gone again. Replies carry no number: the n-th reply answers the n-th question
//! handed to `Ask::ask`, whether or not that is still open. A reply comes over one socket and the UPDATE over another,
//! so that either may be seen first.

use crate::foretold::{Foretold, page};
use crate::iotlb::{Question, Replies};
use ringfence_dma::{Access, BusAddr, FaultReason, Miss, Permission, Ticket};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// How many questions may wait for a reply, or for an UPDATE where there are no replies. Past that, misses wait
/// unasked for a place; where there are no replies the oldest question gives up its place, since it may never be
/// answered.
pub const UNANSWERED: usize = 4096;
/// How many refusals are remembered. Whoever waited for one that was forgotten asks again.
pub const REFUSALS: usize = 1 << 12;

/// How long a question that was granted waits for its UPDATE before it is asked again.
const PATIENCE: Duration = Duration::from_millis(50);
/// How often in a row, before it counts as refused.
const ATTEMPTS: u32 = 64;

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
    /// How many questions were closed otherwise than by a translation: their waiters have to look more than quickly.
    verdicts: u64,
    /// How much one answer is expected to cover.
    foretold: Foretold,
    /// By access and page.
    open: [BTreeMap<u64, Open>; 2],
    /// What an UPDATE closes, and whether by a refusal. Empty, and kept so that none allocates.
    closed: Vec<(Handle, bool)>,
    /// Passed on, oldest first. Those that were resolved stay until their reply has come.
    unanswered: VecDeque<Handle>,
    refusals: [BTreeMap<u64, Refusal>; 2],
    /// Which refusal goes first when there are too many. May name some that are gone.
    refused: VecDeque<(Access, u64, u64)>,
}

struct Open {
    /// The byte that was wanted.
    at: u64,
    /// What its answer is expected to bring besides, from the first to the last address: others wait for that.
    expected: (u64, u64),
    number: u64,
    state: State,
    /// Granted in a row without an UPDATE.
    attempts: u32,
    /// Whether somebody is to be woken for it. Those who need several answers wait for one of them.
    awaited: bool,
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
            verdicts: 0,
            foretold: Foretold::new(),
            open: Default::default(),
            closed: Vec::new(),
            unanswered: VecDeque::new(),
            refusals: Default::default(),
            refused: VecDeque::new(),
        }
    }

    /// Somebody needs `addr`, and the table has it not. Whether he is to be woken for it is said by
    /// [`Questions::wait_for`].
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
        let (question, expected, retry) = match self.about(addr.0, access) {
            None => {
                let question = self.write_down(addr.0, access, 0);
                (question, question.map(|_| self.foretold.answer(addr.0)), None)
            }
            Some(&Open { state: State::Granted { until }, at, attempts, number, expected, .. }) => {
                if now() < until {
                    (None, Some(expected), Some(until))
                } else {
                    self.open[of(access)].remove(&page(at));
                    let question = if attempts < ATTEMPTS {
                        self.write_down(at, access, attempts)
                    } else {
                        self.refuse(at, access, number, FaultReason::Unmapped);
                        // If this waiter came later, or waits for another page, it starts over.
                        if let Some(reason) = self.refusal(addr.0, access, ticket) {
                            return Verdict::Refused(reason);
                        }
                        self.write_down(addr.0, access, 0)
                    };
                    (question, self.about(addr.0, access).map(|open| open.expected), None)
                }
            }
            Some(open) => (None, Some(open.expected), None),
        };
        let covers = match expected {
            Some((_, last)) => last.max(addr.0) - addr.0 + 1,
            None => Miss::NOTHING_ASKED,
        };
        Verdict::Wait { miss: Miss { ticket, covers }, question, retry }
    }

    /// Somebody waits for the answer that brings `addr`; `false` if none is expected.
    pub(crate) fn wait_for(&mut self, addr: u64, access: Access) -> bool {
        let Some(at) = self.about(addr, access).map(|open| open.at) else { return false };
        if let Some(open) = self.open[of(access)].get_mut(&page(at)) {
            open.awaited = true;
        }
        true
    }

    /// The open question whose answer is expected to bring `addr`, if there is one.
    fn about(&self, addr: u64, access: Access) -> Option<&Open> {
        let near = self.open[of(access)].range(self.foretold.questions(addr));
        near.map(|(_, open)| open).rfind(|open| open.expected.0 <= addr && addr <= open.expected.1)
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
        let expected = self.foretold.answer(at);
        let open = Open { at, expected, number: handle.number, state: State::Written, attempts, awaited: false };
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
        let mut learned = false;
        let mut closed = std::mem::take(&mut self.closed);
        for access in [Access::Read, Access::Write] {
            let pages = page(first)..=page(last);
            if !self.refusals[of(access)].is_empty() {
                let gone: Vec<u64> = self.refusals[of(access)].range(pages.clone()).map(|(&page, _)| page).collect();
                for page in gone {
                    self.refusals[of(access)].remove(&page);
                }
            }
            for (&page, open) in self.open[of(access)].range_mut(pages) {
                if open.at < first || last < open.at {
                    continue;
                }
                if !std::mem::replace(&mut learned, true) {
                    // The first of them: those behind it are answered by the way.
                    self.foretold.learn(open.at, first, last);
                }
                if open.expected.0 < first || last < open.expected.1 {
                    // Whoever waits for the rest of what was expected has to ask for it.
                    self.verdicts += 1;
                    news = News::Some;
                }
                let refused = match (permission.allows(access), open.state, self.replies) {
                    (true, ..) => false,
                    // Not an answer: nobody was asked.
                    (false, State::Written, _) => {
                        news = News::Some;
                        continue;
                    }
                    // The reply decides.
                    (false, State::Asked | State::Lacking, Replies::Each) => {
                        open.state = State::Lacking;
                        news = News::Some;
                        continue;
                    }
                    (false, State::Granted { .. }, _) | (false, _, Replies::Never) => true,
                };
                if open.awaited || refused {
                    news = News::Some;
                }
                closed.push((Handle { access, page, number: open.number }, refused));
            }
        }
        for (Handle { access, page, number }, refused) in closed.drain(..) {
            self.open[of(access)].remove(&page);
            if refused {
                self.refuse(page, access, number, FaultReason::Forbidden);
            }
        }
        self.closed = closed;
        news
    }

    /// Whether an UPDATE could change nothing here.
    pub(crate) fn is_idle(&self) -> bool {
        self.open.iter().all(BTreeMap::is_empty) && self.refusals.iter().all(BTreeMap::is_empty)
    }

    /// How many questions were settled otherwise than by a translation.
    pub(crate) fn verdicts(&self) -> u64 {
        self.verdicts
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
        let open = self.open[of(access)].get_mut(&handle.page).filter(|open| open.number == handle.number);
        let Some(open) = open else {
            // Somebody may wait for the place in the queue.
            return Some(if self.unanswered.len() + 1 >= UNANSWERED { News::Some } else { News::None });
        };
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
        self.verdicts += 1;
        if let Some(reason) = reason {
            self.refuse(at, access, handle.number, reason);
        }
        Some(News::Some)
    }

    fn refuse(&mut self, at: u64, access: Access, number: u64, reason: FaultReason) {
        self.verdicts += 1;
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::foretold::PAGE;
    use Access::{Read, Write};
    use Permission::{ReadOnly, ReadWrite, WriteOnly};

    /// The questions, a table of one mapping, and a clock that only moves when told.
    struct Script {
        questions: Questions,
        mapped: Option<(u64, u64, Permission)>,
        now: Instant,
        asked: Vec<Question>,
    }

    impl Script {
        fn new(replies: Replies) -> Script {
            Script { questions: Questions::new(replies), mapped: None, now: Instant::now(), asked: Vec::new() }
        }

        /// A try in a visit of its own, which is waited for; its question, if any, is passed on.
        fn look(&mut self, addr: u64, access: Access, asked: Option<Ticket>) -> Result<Miss, FaultReason> {
            let miss = self.part(addr, access, asked)?;
            self.questions.wait_for(addr, access);
            Ok(miss)
        }

        /// The same for a part of something.
        fn part(&mut self, addr: u64, access: Access, asked: Option<Ticket>) -> Result<Miss, FaultReason> {
            let now = self.now;
            match self.questions.miss(BusAddr(addr), access, asked, || now) {
                Verdict::Wait { miss, question, .. } => {
                    self.questions.ask(question.into_iter(), &mut self.asked);
                    Ok(miss)
                }
                Verdict::Refused(reason) => Err(reason),
            }
        }

        fn first_look(&mut self, addr: u64, access: Access) -> Ticket {
            self.look(addr, access, None).expect("nobody is refused without having waited").ticket
        }

        fn update(&mut self, first: u64, last: u64, permission: Permission) -> News {
            self.mapped = Some((first, last, permission));
            self.questions.updated(first, last, permission)
        }

        fn reply(&mut self, granted: bool) -> Option<News> {
            let (mapped, now) = (self.mapped, self.now);
            let permission = |at: u64| match mapped {
                Some((first, last, permission)) if (first..=last).contains(&at) => Some(permission),
                _ => None,
            };
            self.questions.answered(granted, permission, || now)
        }

        /// How many questions were passed on since the last call.
        fn asked(&mut self) -> usize {
            std::mem::take(&mut self.asked).len()
        }

        fn is_idle(&self) -> bool {
            self.questions.open.iter().all(BTreeMap::is_empty) && self.questions.unanswered.is_empty()
        }
    }

    const ALL: (u64, u64) = (0x5000, 0x5fff);

    #[test]
    fn one_question_a_page_and_access() {
        let mut script = Script::new(Replies::Each);
        script.first_look(0x5010, Read);
        script.first_look(0x5ff0, Read);
        assert_eq!(script.asked, [Question { addr: BusAddr(0x5010), access: Read }]);
        script.first_look(0x5010, Write);
        script.first_look(0x6000, Read);
        assert_eq!(script.asked(), 3);
        assert_eq!(script.look(0x5010, Read, None).unwrap().covers, 0xff0);
        assert_eq!(script.look(u64::MAX, Read, None).unwrap().covers, 1);
    }

    #[test]
    fn an_update_with_the_access_resolves() {
        for (permission, access, resolves) in [
            (ReadOnly, Read, true),
            (ReadOnly, Write, false),
            (WriteOnly, Write, true),
            (WriteOnly, Read, false),
            (ReadWrite, Read, true),
            (ReadWrite, Write, true),
        ] {
            let mut script = Script::new(Replies::Each);
            script.first_look(0x5010, access);
            assert_eq!(script.update(ALL.0, ALL.1, permission), News::Some);
            assert_eq!(script.questions.open[of(access)].is_empty(), resolves, "{permission:?} {access}");
            let _ = script.reply(true);
            assert!(script.is_idle());
        }
    }

    #[test]
    fn who_needs_several_answers_is_told_of_the_one_he_waits_for() {
        let mut script = Script::new(Replies::Each);
        for page in [0x5000, 0x6000, 0x7000] {
            script.part(page, Read, None).unwrap();
        }
        // Another one waits for the first alone.
        script.look(0x5000, Read, None).unwrap();
        assert!(script.questions.wait_for(0x7000, Read));
        assert_eq!(script.asked(), 3);
        assert_eq!(script.update(0x5000, 0x5fff, ReadWrite), News::Some);
        assert_eq!(script.update(0x6000, 0x6fff, ReadWrite), News::None);
        assert_eq!(script.update(0x7000, 0x7fff, ReadWrite), News::Some);
        assert!(!script.questions.wait_for(0x7000, Read), "nothing is under way");
        // What is no translation is told in any case.
        script.part(0x8000, Write, None).unwrap();
        for _ in 0..3 {
            let _ = script.reply(true);
        }
        assert_eq!(script.reply(false), Some(News::Some));
        script.part(0x9000, Write, None).unwrap();
        assert_eq!(script.update(0x9000, 0x9fff, ReadOnly), News::Some);
    }

    #[test]
    fn an_update_beside_the_byte_resolves_nothing() {
        let mut script = Script::new(Replies::Each);
        script.first_look(0x5810, Read);
        assert_eq!(script.update(0x5000, 0x57ff, ReadWrite), News::None);
        assert_eq!(script.update(0x5811, 0x5fff, ReadWrite), News::None);
        assert_eq!(script.update(0x5810, 0x5810, ReadWrite), News::Some);
    }

    #[test]
    fn a_denial_is_for_who_asked_before_it() {
        let mut script = Script::new(Replies::Each);
        let first = script.first_look(0x5010, Read);
        // Its other pages are asked for later, and denied to it all the same.
        assert_eq!(script.look(0x6000, Read, Some(first)).unwrap().ticket, first);
        let joined = script.first_look(0x5020, Read);
        assert_eq!(script.asked(), 2);
        assert_eq!(script.reply(false), Some(News::Some));
        assert_eq!(script.reply(false), Some(News::Some));
        assert_eq!(script.look(0x5010, Read, Some(first)), Err(FaultReason::Unmapped));
        assert_eq!(script.look(0x6000, Read, Some(first)), Err(FaultReason::Unmapped));
        // Who joined while it was under way cannot know: the guest may have mapped it in between.
        assert!(script.look(0x5020, Read, Some(joined)).is_ok());
        assert_eq!(script.asked(), 1);
        assert!(script.look(0x5010, Write, Some(first)).is_ok(), "the other access was not denied");
    }

    #[test]
    fn an_update_lifts_a_denial() {
        let mut script = Script::new(Replies::Each);
        let ticket = script.first_look(0x5010, Read);
        let _ = script.reply(false);
        let _ = script.update(ALL.0, ALL.1, ReadWrite);
        assert!(script.look(0x5010, Read, Some(ticket)).is_ok());
    }

    #[test]
    fn granted_with_less_than_was_wanted_is_forbidden_in_either_order() {
        for update_first in [true, false] {
            let mut script = Script::new(Replies::Each);
            let ticket = script.first_look(0x5010, Write);
            if update_first {
                let _ = script.update(ALL.0, ALL.1, ReadOnly);
                assert!(script.look(0x5010, Write, Some(ticket)).is_ok(), "not before the reply");
                let _ = script.reply(true);
            } else {
                let _ = script.reply(true);
                assert!(script.look(0x5010, Write, Some(ticket)).is_ok(), "not before the update");
                let _ = script.update(ALL.0, ALL.1, ReadOnly);
            }
            assert_eq!(script.look(0x5010, Write, Some(ticket)), Err(FaultReason::Forbidden));
            assert_eq!(script.asked(), 1);
            assert!(script.is_idle());
        }
    }

    #[test]
    fn an_old_mapping_without_the_permission_is_no_answer() {
        let mut script = Script::new(Replies::Each);
        let _ = script.update(ALL.0, ALL.1, ReadOnly);
        let ticket = script.first_look(0x5010, Write);
        let _ = script.reply(true);
        assert!(script.look(0x5010, Write, Some(ticket)).is_ok(), "the update that raises it is on its way");
        assert_eq!(script.update(ALL.0, ALL.1, ReadWrite), News::Some);
        assert!(script.is_idle());
    }

    #[test]
    fn an_update_before_the_question_was_passed_on_is_no_answer() {
        for replies in [Replies::Each, Replies::Never] {
            let mut script = Script::new(replies);
            let now = script.now;
            let Verdict::Wait { miss, question, .. } = script.questions.miss(BusAddr(0x5010), Write, None, || now)
            else {
                panic!("not refused");
            };
            let _ = script.update(ALL.0, ALL.1, ReadOnly);
            script.questions.ask(question.into_iter(), &mut script.asked);
            assert_eq!(script.asked(), 1);
            assert!(script.look(0x5010, Write, Some(miss.ticket)).is_ok());
        }
    }

    #[test]
    fn a_question_that_an_update_overtook_is_not_passed_on() {
        let mut script = Script::new(Replies::Each);
        let now = script.now;
        let Verdict::Wait { question, .. } = script.questions.miss(BusAddr(0x5010), Write, None, || now) else {
            panic!("not refused");
        };
        let _ = script.update(ALL.0, ALL.1, ReadWrite);
        script.questions.ask(question.into_iter(), &mut script.asked);
        assert!(script.asked.is_empty() && script.is_idle());
    }

    #[test]
    fn invalidated_between_update_and_use_is_asked_again() {
        // The permission was enough, and not.
        for permission in [ReadWrite, ReadOnly] {
            let mut script = Script::new(Replies::Each);
            let ticket = script.first_look(0x5010, Write);
            let _ = script.update(ALL.0, ALL.1, permission);
            script.mapped = None;
            let _ = script.reply(true);
            assert_eq!(script.asked(), 1);
            assert!(script.look(0x5010, Write, Some(ticket)).is_ok());
            assert_eq!(script.asked(), 1);
        }
    }

    #[test]
    fn a_reply_answers_the_question_that_it_follows() {
        let mut script = Script::new(Replies::Each);
        let first = script.first_look(0x5010, Read);
        let _ = script.update(ALL.0, ALL.1, ReadWrite);
        script.mapped = None;
        let second = script.look(0x5010, Read, Some(first)).unwrap().ticket;
        assert_eq!((script.asked(), second), (2, first));
        // The first question's, which no longer matters.
        assert_eq!(script.reply(false), Some(News::None));
        assert!(script.look(0x5010, Read, Some(first)).is_ok());
        assert_eq!(script.reply(false), Some(News::Some));
        assert_eq!(script.look(0x5010, Read, Some(first)), Err(FaultReason::Unmapped));
        assert_eq!(script.reply(true), None);
    }

    #[test]
    fn a_promise_is_waited_for_and_then_asked_for_again_and_then_refused() {
        let mut script = Script::new(Replies::Each);
        let ticket = script.first_look(0x5010, Read);
        for _ in 0..ATTEMPTS {
            assert_eq!(script.asked(), 1);
            assert_eq!(script.reply(true), Some(News::Some));
            let now = script.now;
            match script.questions.miss(BusAddr(0x5010), Read, Some(ticket), || now) {
                Verdict::Wait { question: None, retry: Some(at), .. } => script.now = at,
                other => panic!("{other:?}"),
            }
            let _ = script.look(0x5010, Read, Some(ticket));
        }
        assert_eq!(script.asked(), 0);
        assert_eq!(script.look(0x5010, Read, Some(ticket)), Err(FaultReason::Unmapped));
        // Somebody new starts over.
        script.first_look(0x5010, Read);
        assert_eq!(script.asked(), 1);
    }

    #[test]
    fn without_replies_an_update_decides() {
        let mut script = Script::new(Replies::Never);
        let ticket = script.first_look(0x5010, Write);
        assert_eq!(script.reply(false), None);
        assert_eq!(script.update(ALL.0, ALL.1, ReadOnly), News::Some);
        assert_eq!(script.look(0x5010, Write, Some(ticket)), Err(FaultReason::Forbidden));
        let later = script.first_look(0x5010, Write);
        assert_eq!(script.update(ALL.0, ALL.1, ReadWrite), News::Some);
        assert!(script.look(0x5010, Write, Some(later)).is_ok());
    }

    #[test]
    fn the_size_of_answers_foretells_the_next() {
        let mut script = Script::new(Replies::Each);
        script.first_look(0x800_0000_0456_0000, Read);
        let _ = script.update(0x800_0000_0400_0000, 0x800_0000_04ff_ffff, ReadWrite);
        let miss = script.look(0x800_0000_0556_0000, Read, None).unwrap();
        assert_eq!(miss.covers, 0xaa_0000);
        assert_eq!(script.asked(), 2);
        // Another page of the same granule is not asked for beside it.
        script.first_look(0x800_0000_0500_0000, Read);
        assert_eq!(script.asked(), 0);
        // A small answer corrects it, and who waited for the other page asks.
        let _ = script.update(0x800_0000_0556_0000, 0x800_0000_0556_0fff, ReadWrite);
        assert_eq!(script.look(0x800_0000_0500_0000, Read, Some(miss.ticket)).unwrap().covers, 0x1000);
        assert_eq!(script.asked(), 1);
    }

    /// A front-end that answers with whole mappings, wherever they start, is asked once for each.
    #[test]
    fn a_whole_mapping_is_asked_for_once() {
        let mut script = Script::new(Replies::Each);
        let mapping = |number: u64| (0x1000 + number * 0x1_1000, 0x1_0fff + number * 0x1_1000);
        let ask_for_all = |script: &mut Script, (first, last): (u64, u64)| {
            let mut at = first;
            while at <= last {
                at += script.look(at, Write, None).unwrap().covers;
            }
            script.asked()
        };
        for number in 0..8 {
            assert_eq!(ask_for_all(&mut script, mapping(number)), 16, "mapping {number}");
            let (first, last) = mapping(number);
            for _ in 0..16 {
                let _ = script.update(first, last, WriteOnly);
                let _ = script.reply(true);
            }
        }
        let (first, last) = mapping(8);
        assert_eq!(ask_for_all(&mut script, (first, last)), 1);
        // Somebody waits in its middle, and the answer does not reach him: he is told, and asks.
        let waits = script.look(first + 0x8000, Write, None).unwrap();
        assert_eq!((waits.covers, script.asked()), (0x8000, 0));
        let verdicts = script.questions.verdicts();
        let _ = script.update(first, first + 0xfff, WriteOnly);
        assert!(script.questions.verdicts() > verdicts);
        assert_eq!(script.look(first + 0x8000, Write, Some(waits.ticket)).unwrap().covers, 0x1000);
        assert_eq!(script.asked(), 1);
        assert_eq!(ask_for_all(&mut script, (last + 0x1001, last + 0x1_1000)), 16, "believed at once");
    }

    #[test]
    fn a_denial_is_for_its_page_and_not_for_the_granule() {
        let mut script = Script::new(Replies::Each);
        script.first_look(0, Read);
        let _ = script.update(0, (1 << 24) - 1, ReadWrite);
        let _ = script.reply(true);
        let ticket = script.first_look(5 << 24, Read);
        let other = script.look((5 << 24) + 0x1_0000, Read, Some(ticket)).unwrap().ticket;
        let _ = script.reply(false);
        assert_eq!(script.look(5 << 24, Read, Some(ticket)), Err(FaultReason::Unmapped));
        assert!(script.look((5 << 24) + 0x1_0000, Read, Some(other)).is_ok());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        for replies in [Replies::Each, Replies::Never] {
            let mut script = Script::new(replies);
            for page in 0..UNANSWERED as u64 + 10 {
                script.first_look(page * PAGE, Read);
                assert!(
                    script.questions.open[0].len() <= UNANSWERED && script.questions.unanswered.len() <= UNANSWERED
                );
            }
            match replies {
                Replies::Each => {
                    assert_eq!(script.asked(), UNANSWERED);
                    // A place is free again, and whoever waits for one is told.
                    let _ = script.update(0, PAGE - 1, ReadWrite);
                    assert_eq!(script.reply(true), Some(News::Some));
                    script.first_look(1 << 40, Read);
                    assert_eq!(script.asked(), 1);
                }
                Replies::Never => assert_eq!(script.asked(), UNANSWERED + 10),
            }
        }
        let mut script = Script::new(Replies::Each);
        let mut tickets = Vec::new();
        for page in 0..REFUSALS as u64 + 10 {
            tickets.push(script.first_look(page * PAGE, Read));
            let _ = script.reply(false);
            assert!(script.questions.refusals[0].len() <= REFUSALS && script.questions.refused.len() <= REFUSALS);
        }
        assert!(script.look(0, Read, Some(tickets[0])).is_ok(), "forgotten: asked again");
        assert_eq!(script.look(10 * PAGE, Read, Some(tickets[10])), Err(FaultReason::Unmapped));
    }

    #[test]
    fn promises_that_nobody_keeps_or_waits_for_make_room() {
        let mut script = Script::new(Replies::Each);
        for page in 0..UNANSWERED as u64 {
            script.first_look(page * PAGE, Read);
            let _ = script.reply(true);
        }
        script.asked();
        script.first_look(1 << 40, Read);
        assert_eq!(script.asked(), 1);
        assert_eq!(script.questions.open[0].len(), 1);
    }
}
