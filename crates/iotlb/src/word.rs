//! What the table's slots and leaves hold: words of 64 bits, each of which changes in one store.
//!
//! A cluster that holds several mappings has a leaf. Nearly always they are pages of 4 KiB, and their memory lies within
//! 4 TiB: then the leaf is *narrow*, and has a half word a page, which tells where that is from the table's [`Origin`].
//! It takes half the memory of a *wide* one, so that of twice as many pages the translations are in the processor's
//! caches. What does not fit turns the leaf into a wide one. A cluster that is full, and lies in memory as it lies in bus
//! addresses, is a *row*, and needs no leaf: its word says it all.

use crate::slots::Branch;
use crate::sync::{AtomicU32, AtomicU64};
use crate::table::{Run, Translation};
use ringfence_dma::Permission;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// A mapping of more than one granule.
pub(crate) struct Span(pub(crate) Translation);

/// A cluster's or a granule's 64 bits. 0 is nothing; else
///
/// | bits 63, 62 | bits 61 to 56 | bits 55 to 0 |
/// | --- | --- | --- |
/// | writable, readable | which of the cluster's granules | host address |
/// | 0 | 1 | address of a [`Span`] |
/// | 0 | 2 | address of a [`WideLeaf`], in a cluster's word only |
/// | 0 | 3 | 0: nothing, in a cluster that is in the index still |
/// | 0 | 4 | address of a [`NarrowLeaf`], in a cluster's word only |
/// | 0 | 5 | a row's host address, with what is allowed in bits 1 and 0, in a cluster's word only |
/// | 0 | 6 | address of a [`Branch`], in a region's word only |
///
/// Bit 0 of a leaf's address: it was a row. It does not become one again: where one page comes and goes all the time, making
/// a leaf each time would be most of what that costs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

pub(crate) enum Meaning<'t> {
    Nothing,
    Granule {
        index: u32,
        host: u64,
        permission: Permission,
    },
    /// Each granule is a mapping of its own, and the first lies at `host`.
    Row {
        host: u64,
        permission: Permission,
    },
    Span(&'t Span),
    Leaf(Leaf<'t>),
}

pub(crate) const ADDRESS: u64 = (1 << 56) - 1;
pub(crate) const SPAN: u64 = 1;
pub(crate) const LEAF: u64 = 2;
const VACANT: u64 = 3;
pub(crate) const NARROW: u64 = 4;
const ROW: u64 = 5;
pub(crate) const BRANCH: u64 = 6;
const WAS_ROW: u64 = 1;

impl Word {
    pub(crate) const NOTHING: Word = Word(0);
    /// A driver that maps each request comes back to the same clusters over and over: they stay in the index.
    pub(crate) const VACANT: Word = Word(VACANT << 56);

    pub(crate) fn granule(index: u32, host: u64, permission: Permission) -> Word {
        debug_assert!(index < 64 && host <= ADDRESS);
        let rights = match permission {
            Permission::ReadOnly => 1,
            Permission::WriteOnly => 2,
            Permission::ReadWrite => 3,
        };
        Word(rights << 62 | u64::from(index) << 56 | host)
    }

    /// What a granule's word allows, or the two bits of a row's.
    #[inline]
    fn permission(rights: u64) -> Option<Permission> {
        // And no branches: what is allowed comes from memory, and may be anything.
        const MEANING: [Option<Permission>; 4] =
            [None, Some(Permission::ReadOnly), Some(Permission::WriteOnly), Some(Permission::ReadWrite)];
        MEANING[rights as usize & 3]
    }

    pub(crate) fn pointer<T>(kind: u64, to: *mut T) -> Word {
        let address = to.expose_provenance() as u64;
        assert!(address <= ADDRESS, "an allocation at {address:#x}, beyond 2^56");
        Word(kind << 56 | address)
    }

    pub(crate) fn address(self) -> u64 {
        self.0 & ADDRESS
    }

    /// What a granule's word allows: 1 to read, 2 to write.
    #[inline]
    pub(crate) fn rights(self) -> u64 {
        self.0 >> 62
    }

    /// # Safety
    /// The word was read from the table, by the writer or in the visit that goes on for all of `'t`.
    #[inline]
    pub(crate) unsafe fn meaning<'t>(self) -> Meaning<'t> {
        if let Some(permission) = Word::permission(self.0 >> 62) {
            return Meaning::Granule { index: (self.0 >> 56) as u32 & 63, host: self.address(), permission };
        }
        match self.0 >> 56 {
            // SAFETY: made by `Word::pointer` from a box that is freed only after the visits that could see it.
            NARROW => Meaning::Leaf(Leaf::Narrow(unsafe { &*self.to() })),
            // SAFETY: as above.
            LEAF => Meaning::Leaf(Leaf::Wide(unsafe { &*self.to() })),
            // SAFETY: as above.
            SPAN => Meaning::Span(unsafe { &*self.to() }),
            ROW => Word::permission(self.0 & 3)
                .map_or(Meaning::Nothing, |permission| Meaning::Row { host: self.address() & !3, permission }),
            _ => Meaning::Nothing,
        }
    }

    /// The leaf that this points to, if that is a narrow one.
    ///
    /// # Safety
    /// As for [`Word::meaning`].
    #[inline]
    pub(crate) unsafe fn narrow<'t>(self) -> Option<&'t NarrowLeaf> {
        // SAFETY: made by `Word::pointer` from a box that is freed only after the visits that could see it.
        (self.0 >> 56 == NARROW).then(|| unsafe { &*self.to() })
    }

    /// The branch that this points to, if it does.
    ///
    /// # Safety
    /// As for [`Word::meaning`].
    #[inline]
    pub(crate) unsafe fn branch<'t>(self) -> Option<&'t Branch> {
        // SAFETY: as above.
        (self.0 >> 56 == BRANCH).then(|| unsafe { &*self.to() })
    }

    /// Whether nothing is there, whatever the index says.
    pub(crate) fn is_nothing(self) -> bool {
        self == Word::NOTHING || self == Word::VACANT
    }

    /// What a word of a pointer's kind points to.
    #[inline]
    pub(crate) fn to<T>(self) -> *mut T {
        std::ptr::with_exposed_provenance_mut((self.address() & !WAS_ROW) as usize)
    }

    /// A leaf's word, as that of one that was a row.
    pub(crate) fn that_was_row(self) -> Word {
        Word(self.0 | WAS_ROW)
    }

    pub(crate) fn was_row(self) -> bool {
        self.0 & WAS_ROW != 0
    }

    pub(crate) fn is_narrow(self) -> bool {
        self.0 >> 56 == NARROW
    }
}

/// What a cluster holds of which there are several.
#[derive(Clone, Copy)]
pub(crate) enum Leaf<'t> {
    Wide(&'t WideLeaf),
    Narrow(&'t NarrowLeaf),
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

/// Where the memory that narrow leaves name begins. Chosen once: whoever found a half word may still want it.
pub(crate) struct Origin(AtomicU64);

/// The level of pages of 4 KiB, and how many bits an address has within one.
pub(crate) const PAGES: u32 = 2;
const PAGE_BITS: u32 = 12;
/// How many pages from the origin a half word can say.
const WITHIN: u64 = 1 << 30;

impl Leaf<'_> {
    /// A word that was found has everything in it that it points to, if it points to something.
    #[inline]
    pub(crate) fn word(self, at: u32, origin: &Origin) -> Word {
        match self {
            Leaf::Narrow(leaf) => {
                let page = leaf.page(at, origin);
                if page == Word::NOTHING { page } else { Word(page.0 | u64::from(at) << 56) }
            }
            Leaf::Wide(leaf) => Word(leaf.words[at as usize].load(Acquire)),
        }
    }

    /// Which words are not 0; for the writer.
    pub(crate) fn used(self) -> u64 {
        self.marks().load(Relaxed)
    }

    fn marks(&self) -> &AtomicU64 {
        match self {
            Leaf::Wide(leaf) => &leaf.used,
            Leaf::Narrow(leaf) => &leaf.used,
        }
    }

    /// Fills a run with `word`; `false` where that does not fit, and nothing was done.
    pub(crate) fn fill(self, run: Run, word: Word, origin: &Origin) -> bool {
        match self {
            Leaf::Wide(leaf) => leaf.fill(run, word),
            Leaf::Narrow(leaf) => {
                let Some(half) = origin.half(run.level, word) else { return false };
                leaf.halves[run.index as usize].store(half, Release);
                leaf.used.store(leaf.used.load(Relaxed) | run.mask(), Relaxed);
            }
        }
        true
    }

    /// The word of a row, if that is what this is by now: all granules there, allowing the same, and in memory one behind the
    /// other.
    pub(crate) fn row(self, level: u32, origin: &Origin) -> Option<Word> {
        if self.used() != u64::MAX || level < PAGES {
            return None;
        }
        let first = self.word(0, origin);
        let (rights, host) = (first.0 >> 62, first.address());
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
        // Within 2^56: see `Origin::half`.
        let host = || origin.address() + ((half & (WITHIN - 1)) << PAGE_BITS);
        if rights == 0 { Word::NOTHING } else { Word(rights << 62 | host()) }
    }

    pub(crate) fn new() -> Box<NarrowLeaf> {
        Box::new(NarrowLeaf { halves: std::array::from_fn(|_| AtomicU32::new(0)), used: AtomicU64::new(0) })
    }
}

impl Origin {
    /// Not chosen yet.
    pub(crate) fn new() -> Origin {
        Origin(AtomicU64::new(u64::MAX))
    }

    #[inline]
    fn address(&self) -> u64 {
        // Chosen before the first narrow leaf was made, which whoever asks has found.
        self.0.load(Relaxed)
    }

    /// Chooses one in whose middle the page of `word` lies, unless that was done.
    pub(crate) fn choose(&self, level: u32, word: Word) {
        if self.address() == u64::MAX && level == PAGES && word.0 >> 62 != 0 {
            let page = word.address() >> PAGE_BITS;
            self.0.store(page.saturating_sub(WITHIN / 2) << PAGE_BITS, Relaxed);
        }
    }

    /// A granule's word in half the bits. `None`: it has more in it.
    fn half(&self, level: u32, word: Word) -> Option<u32> {
        let (rights, distance) = (word.0 >> 62, word.address().checked_sub(self.address())?);
        let pages = distance >> PAGE_BITS;
        let fits = level == PAGES && rights != 0 && pages < WITHIN && pages << PAGE_BITS == distance;
        fits.then_some((rights << 30 | pages) as u32)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

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
