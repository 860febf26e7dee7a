//! How much the next answer is going to cover, from what the last ones did.
//!
//! A VMM answers with what it has in one piece: a page, a huge page, a whole mapping. Who knows that asks once where he
//! would else ask for every page of a buffer; who is wrong about it waits for one round trip more.

use std::ops::RangeInclusive;

/// The smallest page anybody translates by.
pub(crate) const PAGE: u64 = 4096;
/// The most that is foretold.
const MOST: u64 = 1 << 30;
/// So many answers in a row that reach further than was foretold, until that is believed. One that reaches less far is
/// believed at once: what was not asked for because of it waits.
const BELIEVED: u32 = 8;

/// What the next answer is going to cover.
pub(crate) struct Foretold {
    /// The aligned block of this size around what was asked for: a power of two. That of the last answer, if it was one.
    granule: u64,
    /// What follows what was asked for, its page included, up to this size.
    reach: u64,
    /// How many in a row have reached further, and what they all did.
    further: u32,
    least: u64,
}

impl Foretold {
    pub(crate) fn new() -> Self {
        Self { granule: PAGE, reach: PAGE, further: 0, least: MOST }
    }

    /// What an answer to a question about `at` is going to bring: the first and the last address.
    pub(crate) fn answer(&self, at: u64) -> (u64, u64) {
        let rest = self.granule - 1;
        (at & !rest, (at | rest).max(page(at).saturating_add(self.reach - 1)))
    }

    /// Where a question that is open lies, by its page, if its answer is going to bring `addr`.
    pub(crate) fn questions(&self, addr: u64) -> RangeInclusive<u64> {
        let rest = self.granule - 1;
        page(addr & !rest).min(page(addr).saturating_sub(self.reach - PAGE))..=page(addr | rest)
    }

    /// The question about `at` was answered by `first..=last`.
    pub(crate) fn learn(&mut self, at: u64, first: u64, last: u64) {
        self.granule = granule(first, last);
        // In whole pages, those that it has whole.
        let reach = (last - page(at)).saturating_add(1).min(MOST) & !(PAGE - 1);
        if reach <= self.reach {
            (self.reach, self.further, self.least) = (reach.max(PAGE), 0, MOST);
            return;
        }
        self.further += 1;
        self.least = self.least.min(reach);
        if self.further == BELIEVED {
            (self.reach, self.further, self.least) = (self.least, 0, MOST);
        }
    }
}

pub(crate) fn page(addr: u64) -> u64 {
    addr & !(PAGE - 1)
}

fn granule(first: u64, last: u64) -> u64 {
    match (last - first).checked_add(1) {
        Some(len) if len.is_power_of_two() && first.is_multiple_of(len) => len.clamp(PAGE, MOST),
        _ => PAGE,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn aligned_blocks_foretell_aligned_blocks() {
        let mut foretold = Foretold::new();
        assert_eq!(foretold.answer(0x5010), (0x5000, 0x5fff));
        foretold.learn(0x456_0000, 0x400_0000, 0x4ff_ffff);
        assert_eq!(foretold.answer(0x1_0456_0000), (0x1_0400_0000, 0x1_04ff_ffff));
        assert_eq!(foretold.questions(0x1_0456_0000), 0x1_0400_0000..=0x1_04ff_f000);
        foretold.learn(0x5010, 0x5000, 0x5fff);
        assert_eq!(foretold.answer(u64::MAX), (u64::MAX - 0xfff, u64::MAX));
    }

    #[test]
    fn what_reaches_further_is_believed_after_a_while_and_what_does_not_at_once() {
        let mut foretold = Foretold::new();
        for start in 0..u64::from(BELIEVED) {
            assert_eq!(foretold.answer(0x3000), (0x3000, 0x3fff), "after {start}");
            // A mapping of 64 KiB that starts on an odd page.
            let first = 0x1000 + start * 0x11000;
            foretold.learn(first + 0x10, first, first + 0xffff);
        }
        assert_eq!(foretold.answer(0x3010), (0x3000, 0x1_2fff));
        assert_eq!(foretold.questions(0x1_2010), 0x3000..=0x1_2000);
        assert_eq!(foretold.answer(u64::MAX - 0x2000).1, u64::MAX);
        // Asked for in its middle it says no more than that.
        foretold.learn(0x9000, 0x1000, 0x1_0fff);
        assert_eq!(foretold.answer(0x3010), (0x3000, 0xafff));
        foretold.learn(0x3010, 0x3000, 0x3fff);
        assert_eq!(foretold.answer(0x3010), (0x3000, 0x3fff));
    }

    #[test]
    fn odd_sizes_are_no_granules() {
        for (first, last, expected) in [
            (0, u64::MAX, PAGE),
            (0x1000, 0x2fff, PAGE),
            (0, 0, PAGE),
            (0x2000, 0x3fff, 0x2000),
            (0, (1 << 40) - 1, 1 << 30),
        ] {
            assert_eq!(granule(first, last), expected);
        }
        let mut foretold = Foretold::new();
        for _ in 0..20 {
            foretold.learn(0, 0, u64::MAX);
            foretold.learn(u64::MAX, 0, u64::MAX);
            foretold.learn(7, 7, 7);
        }
        assert_eq!(foretold.answer(7), (0, 0xfff));
    }
}
