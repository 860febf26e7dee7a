//! What clusters hold of which there are several mappings: leaves of three kinds.
//!
//! Nearly always they are pages of 4 KiB, and their memory lies within 4 TiB. Then the leaf is *narrow*, and has a half word a
//! page, which tells where that is from the table's [`Origin`]; or *tight*, a quarter of a word a page, where the pages lie within
//! 192 MiB and allow the same. Else it is *wide*. What does not fit makes a leaf a wider one. The less memory leaves take, the more
//! of them are in the processor's caches; and where those end, a lookup takes ten times as long.

use crate::sync::{AtomicU16, AtomicU32, AtomicU64};
use crate::table::Run;
use crate::word::{ADDRESS, ROW, Word};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// What a cluster holds of which there are several.
#[derive(Clone, Copy)]
pub(crate) enum Leaf<'t> {
    Wide(&'t WideLeaf),
    Narrow(&'t NarrowLeaf),
    Tight(Tight<'t>),
}

pub(crate) struct WideLeaf {
    words: [AtomicU64; 64],
    /// Which words are not 0; the writer's alone.
    used: AtomicU64,
}

/// Of pages of 4 KiB only.
pub(crate) struct NarrowLeaf {
    /// What is allowed in the upper two bits, as in a [`Word`]; below how many pages from the origin.
    halves: [AtomicU32; 64],
    /// As in a wide one.
    used: AtomicU64,
}

/// Of pages of 4 KiB that lie near each other and allow the same.
pub(crate) struct TightLeaf {
    /// 0 is nothing, else one more than how many pages from the base.
    quarters: [AtomicU16; 64],
    /// As in a wide one.
    used: AtomicU64,
}

/// A tight leaf, with what its word says.
#[derive(Clone, Copy)]
pub(crate) struct Tight<'t> {
    pub(crate) leaf: &'t TightLeaf,
    /// Where its memory begins: so many times [`BASE`] pages from the origin.
    pub(crate) base: u64,
    pub(crate) rights: u64,
}

/// What a base counts, in pages: 64 MiB. A word has room for [`BASES`] of them, 256 GiB.
const BASE: u64 = 1 << 14;
pub(crate) const BASES: u64 = 1 << 12;
/// How many pages from the base a quarter can say.
const NEAR: u64 = u16::MAX as u64;

/// Where the memory that narrow and tight leaves name begins. Chosen once: whoever found a part of a word may still want it.
pub(crate) struct Origin {
    narrow: AtomicU64,
    tight: AtomicU64,
}

/// The level of pages of 4 KiB, and how many bits an address has within one.
pub(crate) const PAGES: u32 = 2;
pub(crate) const PAGE_BITS: u32 = 12;
/// How many pages from the origin a half word can say.
const WITHIN: u64 = 1 << 30;

impl Leaf<'_> {
    /// A word that was found has everything in it that it points to, if it points to something.
    #[inline]
    pub(crate) fn word(self, at: u32, origin: &Origin) -> Word {
        let page = match self {
            Leaf::Narrow(leaf) => leaf.page(at, origin),
            Leaf::Tight(leaf) => leaf.page(at, origin),
            Leaf::Wide(leaf) => return Word(leaf.words[at as usize].load(Acquire)),
        };
        if page == Word::NOTHING { page } else { Word(page.0 | u64::from(at) << 56) }
    }

    /// Which words are not 0; for the writer.
    pub(crate) fn used(self) -> u64 {
        self.marks().load(Relaxed)
    }

    fn marks(&self) -> &AtomicU64 {
        match self {
            Leaf::Wide(leaf) => &leaf.used,
            Leaf::Narrow(leaf) => &leaf.used,
            Leaf::Tight(leaf) => &leaf.leaf.used,
        }
    }

    /// Fills a run with `word`; `false` where that does not fit, and nothing was done.
    pub(crate) fn fill(self, run: Run, word: Word, origin: &Origin) -> bool {
        match self {
            Leaf::Wide(leaf) => {
                leaf.fill(run, word);
                return true;
            }
            Leaf::Narrow(leaf) => {
                let page = pages_from(origin.of_narrow(), run.level, word).filter(|&page| page < WITHIN);
                let Some(page) = page else { return false };
                let half = (word.rights() << 30 | page) as u32;
                leaf.halves[run.index as usize].store(half, Release);
            }
            Leaf::Tight(leaf) => {
                let page = pages_from(origin.of_tight(), run.level, word).filter(|_| word.rights() == leaf.rights);
                let page = page.and_then(|page| page.checked_sub(leaf.base * BASE)).filter(|&page| page < NEAR);
                let Some(page) = page else { return false };
                leaf.leaf.quarters[run.index as usize].store(page as u16 + 1, Release);
            }
        }
        self.marks().store(self.used() | run.mask(), Relaxed);
        true
    }

    /// The word of a row, if that is what this is by now: all granules there, allowing the same, and in memory one behind the
    /// other.
    pub(crate) fn row(self, level: u32, origin: &Origin) -> Option<Word> {
        if self.used() != u64::MAX || level < PAGES {
            return None;
        }
        let first = self.word(0, origin);
        let (rights, host) = (first.rights(), first.address());
        let distance = |at| u64::from(at) << (6 * level);
        let is_possible = rights != 0 && host.is_multiple_of(1 << PAGE_BITS) && host + distance(63) <= ADDRESS;
        // The word of a granule has its index, too.
        let follows = |at| self.word(at, origin).0 == first.0 + (u64::from(at) << 56) + distance(at);
        (is_possible && (1..64).all(follows)).then_some(Word(ROW << 56 | host | rights))
    }

    /// Empties a run.
    pub(crate) fn clear(self, run: Run) {
        let used = self.used() & !run.mask();
        for at in run.index as usize..(run.index + run.count) as usize {
            match self {
                Leaf::Wide(leaf) => leaf.words[at].store(Word::NOTHING.0, Release),
                Leaf::Narrow(leaf) => leaf.halves[at].store(0, Release),
                Leaf::Tight(leaf) => leaf.leaf.quarters[at].store(0, Release),
            }
        }
        self.marks().store(used, Relaxed);
    }
}

impl WideLeaf {
    pub(crate) fn new() -> Box<WideLeaf> {
        Box::new(WideLeaf { words: std::array::from_fn(|_| AtomicU64::new(0)), used: AtomicU64::new(0) })
    }

    pub(crate) fn fill(&self, run: Run, word: Word) {
        for at in run.index..run.index + run.count {
            self.words[at as usize].store(word.0, Release);
        }
        self.used.store(self.used.load(Relaxed) | run.mask(), Relaxed);
    }

    pub(crate) fn words(&self) -> impl Iterator<Item = Word> {
        self.words.iter().map(|word| Word(word.load(Relaxed)))
    }
}

impl NarrowLeaf {
    /// A page's word, as if it were its cluster's first.
    #[inline]
    pub(crate) fn page(&self, at: u32, origin: &Origin) -> Word {
        let half = u64::from(self.halves[at as usize].load(Acquire));
        let rights = half >> 30;
        // Within 2^56, as it was put in.
        let host = || origin.of_narrow().wrapping_add((half & (WITHIN - 1)) << PAGE_BITS);
        if rights == 0 { Word::NOTHING } else { Word(rights << 62 | host()) }
    }

    pub(crate) fn new() -> Box<NarrowLeaf> {
        Box::new(NarrowLeaf { halves: std::array::from_fn(|_| AtomicU32::new(0)), used: AtomicU64::new(0) })
    }
}

impl TightLeaf {
    /// One of these words, if they fit in one, and the word that points to it.
    pub(crate) fn of(words: impl Iterator<Item = (Run, Word)> + Clone, origin: &Origin) -> Option<Word> {
        let rights = words.clone().next()?.1.rights();
        let (mut lowest, mut highest) = (u64::MAX, 0);
        for (run, word) in words.clone() {
            let page = pages_from(origin.of_tight(), run.level, word).filter(|_| word.rights() == rights)?;
            (lowest, highest) = (lowest.min(page), highest.max(page));
        }
        // They are about in the middle of what it reaches, so that most of what comes later fits, too.
        let base = (lowest.midpoint(highest) + BASE / 2).saturating_sub(NEAR / 2) / BASE;
        if base >= BASES || highest - base * BASE >= NEAR || lowest < base * BASE {
            return None;
        }
        let quarters = std::array::from_fn(|_| AtomicU16::new(0));
        let leaf = Box::into_raw(Box::new(TightLeaf { quarters, used: AtomicU64::new(0) }));
        let Some(pointer) = Word::of_tight(leaf, base, rights) else {
            // SAFETY: from the line above, and nobody else's.
            drop(unsafe { Box::from_raw(leaf) });
            return None;
        };
        // SAFETY: as above; and it lives on.
        let leaf = Leaf::Tight(Tight { leaf: unsafe { &*leaf }, base, rights });
        words.for_each(|(run, word)| assert!(leaf.fill(run, word, origin), "looked at above"));
        Some(pointer)
    }
}

impl Tight<'_> {
    /// A page's word, as if it were its cluster's first.
    #[inline]
    pub(crate) fn page(self, at: u32, origin: &Origin) -> Word {
        let quarter = u64::from(self.leaf.quarters[at as usize & 63].load(Acquire));
        if quarter == 0 {
            return Word::NOTHING;
        }
        // Within 2^56, as it was put in.
        let page = self.base * BASE + quarter - 1;
        Word(self.rights << 62 | origin.of_tight().wrapping_add(page << PAGE_BITS))
    }
}

impl Origin {
    /// Not chosen yet.
    pub(crate) fn new() -> Origin {
        Origin { narrow: AtomicU64::new(u64::MAX), tight: AtomicU64::new(u64::MAX) }
    }

    /// For leaves of each kind, one in whose middle the page of `word` lies; unless that was done.
    pub(crate) fn choose(&self, level: u32, word: Word) {
        if self.narrow.load(Relaxed) == u64::MAX && level == PAGES && word.rights() != 0 {
            let page = word.address() >> PAGE_BITS;
            self.narrow.store(page.saturating_sub(WITHIN / 2) << PAGE_BITS, Relaxed);
            self.tight.store(page.saturating_sub(BASES * BASE / 2) << PAGE_BITS, Relaxed);
        }
    }

    // Chosen before the first leaf was made that wants it, which whoever asks has found.

    #[inline]
    fn of_narrow(&self) -> u64 {
        self.narrow.load(Relaxed)
    }

    #[inline]
    fn of_tight(&self) -> u64 {
        self.tight.load(Relaxed)
    }
}

/// How many pages from `origin` the granule lies. `None`: that does not say it all.
fn pages_from(origin: u64, level: u32, word: Word) -> Option<u64> {
    let distance = word.address().checked_sub(origin)?;
    let pages = distance >> PAGE_BITS;
    (level == PAGES && word.rights() != 0 && pages << PAGE_BITS == distance).then_some(pages)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::word::Meaning;
    use ringfence_dma::Permission;

    fn page(index: u32, host: u64) -> (Run, Word) {
        let first = u64::from(index) << PAGE_BITS;
        let run = Run::granule(first, first | 0xfff).unwrap();
        (run, Word::granule(index, host, Permission::ReadOnly))
    }

    #[test]
    fn a_narrow_leaf_gives_back_what_it_took_and_takes_only_that() {
        const TIB: u64 = 1 << 40;
        for chosen in [0x7000_0000_0000, 0x5000, ADDRESS & !0xfff] {
            let (origin, leaf) = (Origin::new(), NarrowLeaf::new());
            let leaf = Leaf::Narrow(&leaf);
            let (run, word) = page(0, chosen);
            assert!(!leaf.fill(run, word, &origin), "there is no origin yet");
            origin.choose(PAGES, word);
            origin.choose(PAGES, page(0, 0x1234_0000_0000).1);
            let lowest = chosen.saturating_sub(2 * TIB);
            for (index, host, fits) in [
                (0, chosen, true),
                (1, lowest, true),
                (63, lowest + 4 * TIB - 0x1000, true),
                (2, lowest + 4 * TIB, false),
                (3, lowest.wrapping_sub(0x1000) & ADDRESS, false),
                (4, chosen | 1, false),
                (5, chosen + 0x800, false),
            ] {
                if host > ADDRESS {
                    continue;
                }
                let (run, word) = page(index, host);
                assert_eq!(leaf.fill(run, word, &origin), fits, "{host:#x} around {chosen:#x}");
                let found = leaf.word(index, &origin);
                assert!(found == if fits { word } else { Word::NOTHING }, "{host:#x} around {chosen:#x}");
            }
            assert_eq!(leaf.used().count_ones(), if lowest + 4 * TIB <= ADDRESS { 3 } else { 2 });
            leaf.clear(run);
            assert!(leaf.word(0, &origin) == Word::NOTHING && leaf.used() & 1 == 0);
            let whole = Run::granule(0, (1 << 18) - 1).unwrap();
            assert!(!leaf.fill(whole, word, &origin), "no page");
        }
    }

    #[test]
    fn a_tight_leaf_gives_back_what_it_took_and_takes_only_that() {
        const MIB: u64 = 1 << 20;
        let origin = Origin::new();
        let start = 0x7000_0000_0000;
        origin.choose(PAGES, page(0, start).1);
        // What lies up to 192 MiB apart fits always, and from 128 GiB away on never.
        let lowest = start - (128 << 30);
        for (first, second, fits) in [
            (start, start, true),
            (lowest, lowest + 192 * MIB, true),
            (start, start + 256 * MIB, false),
            (start + 77 * MIB, start + 268 * MIB, true),
            (start + 333 * MIB, start + 142 * MIB, true),
            (start + (127 << 30), start + (127 << 30) + 100 * MIB, true),
            (start + (129 << 30), start + (129 << 30), false),
            (lowest - 4096, lowest, false),
            (start, start + 2048, false),
        ] {
            let pages = [page(3, first), page(63, second)];
            let made = TightLeaf::of(pages.into_iter(), &origin);
            assert_eq!(made.is_some(), fits, "{first:#x} and {second:#x}");
            let Some(word) = made else { continue };
            assert!(word.is_tight() && !word.was_row() && word.that_was_row().was_row());
            // SAFETY: from the line above, and not freed yet.
            let Meaning::Leaf(leaf) = (unsafe { word.that_was_row().meaning() }) else { panic!("{:#x}", word.0) };
            for (run, there) in pages {
                assert!(leaf.word(run.index, &origin) == there, "{first:#x} and {second:#x}");
                // SAFETY: as above.
                let quick = unsafe { word.page(run.index, &origin) };
                assert!(quick.address() == there.address() && quick.rights() == there.rights());
            }
            assert!(leaf.word(4, &origin) == Word::NOTHING && leaf.used() == 1 << 63 | 1 << 3);
            let (run, between) = page(5, first.midpoint(second) & !0xfff);
            assert!(!leaf.fill(run, Word(between.0 ^ 3 << 62), &origin), "allows something else");
            assert!(!leaf.fill(run, page(5, first + 512 * MIB).1, &origin), "too far");
            assert!(!leaf.fill(run, page(5, first - 512 * MIB).1, &origin), "too far");
            assert!(leaf.word(5, &origin) == Word::NOTHING);
            assert!(leaf.fill(run, between, &origin) && leaf.word(5, &origin) == between);
            leaf.clear(run);
            assert!(leaf.word(5, &origin) == Word::NOTHING && leaf.used() == 1 << 63 | 1 << 3);
            // SAFETY: as above, and nobody else's.
            drop(unsafe { Box::from_raw(word.to_tight()) });
        }
        let (one, (run, other)) = (page(1, start), page(2, start));
        assert!(
            TightLeaf::of([one, (run, Word(other.0 ^ 3 << 62))].into_iter(), &origin).is_none(),
            "one is to be written"
        );
    }

    #[test]
    fn a_full_leaf_is_a_row_where_its_memory_is() {
        let origin = Origin::new();
        origin.choose(PAGES, page(0, 0x7000_0000_0000).1);
        let (narrow, wide) = (NarrowLeaf::new(), WideLeaf::new());
        for leaf in [Leaf::Narrow(&narrow), Leaf::Wide(&wide)] {
            for at in 0..64 {
                assert!(leaf.row(PAGES, &origin).is_none(), "{at} pages are no row");
                let (run, word) = page(at, 0x7000_0000_0000 + (u64::from(at) << PAGE_BITS));
                assert!(leaf.fill(run, word, &origin));
            }
            let row = leaf.row(PAGES, &origin).unwrap();
            // SAFETY: no word that points to anything.
            let Meaning::Row { host, permission } = (unsafe { row.meaning() }) else { panic!("{:#x}", row.0) };
            assert_eq!((host, permission), (0x7000_0000_0000, Permission::ReadOnly));
            for at in [0, 1, 63] {
                let there = leaf.word(at, &origin);
                let (run, elsewhere) = page(at, 0x7000_0010_0000);
                assert!(leaf.fill(run, elsewhere, &origin));
                assert!(leaf.row(PAGES, &origin).is_none(), "page {at} is elsewhere");
                assert!(leaf.fill(run, Word(there.0 ^ 3 << 62), &origin));
                assert!(leaf.row(PAGES, &origin).is_none(), "page {at} allows something else");
                assert!(leaf.fill(run, there, &origin));
                assert!(leaf.row(PAGES, &origin).is_some());
            }
        }
        let top = ADDRESS + 1 - (64 << PAGE_BITS);
        for (start, is_row) in [(0x5000_0000_0001, false), (0x5000_0000_0000, true), (top, true)] {
            for at in 0..64 {
                let (run, word) = page(at, start + (u64::from(at) << PAGE_BITS));
                wide.fill(run, word);
            }
            assert_eq!(Leaf::Wide(&wide).row(PAGES, &origin).is_some(), is_row, "{start:#x}");
        }
    }
}
