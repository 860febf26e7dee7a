//! The shared table: every cached mapping, written under a lock and read without one.
//!
//! A 64-ary trie whose nodes are not linked but hashed. A mapping is cut at powers of 64 into granules: 1 byte, 64
//! bytes, 4 KiB, 256 KiB, 16 MiB and so on are the *levels*; 64 granules that lie in one granule of the level above are
//! a *cluster*. One open-addressing table maps (level, cluster) to what is cached there, so that a lookup costs one
//! probe for each level in use, which is one where all mappings are 4 KiB pages or all are 16 MiB, however many. Where
//! clusters of pages are many in a row, their nodes are linked after all: see `slots.rs`.
//!
//! What a cluster holds is one word: a single granule's translation, a mapping of several granules (a [`Span`]), or a leaf
//! of 64 such words, or of halves or quarters of them, once two mappings meet in one cluster, or all 64 if they are a row: see
//! `word.rs`. Dense pages so take 2 to 5 bytes each, in rows less than one, and scattered ones about 100, and a word changes
//! in one store: a reader sees the old mapping or the new one, never half.
//!
//! What is unlinked is not freed but retired: see `Grace` in `iotlb.rs`.

use crate::index::Index;
use crate::leaf::{Leaf, NarrowLeaf, Origin, PAGES, TightLeaf, WideLeaf};
use crate::slots::{BRANCH_BYTES, Branch, MANY, Place, SLOT, Slots, key, region, split};
use crate::sync::{AtomicPtr, AtomicU32};
use crate::word::{ADDRESS, BRANCH, LEAF, Meaning, NARROW, SPAN, Span, Word};
use ringfence_dma::Permission;
use std::collections::BTreeSet;
use std::iter;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// 1 byte to 2^60 bytes.
const LEVELS: usize = 11;

/// A mapping as a lookup finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    pub(crate) first: u64,
    /// Inclusive.
    pub(crate) last: u64,
    /// Where `first` lies, with its provenance exposed.
    pub(crate) host: u64,
    pub(crate) permission: Permission,
}

/// What an insertion met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Met {
    /// Nothing was mapped there.
    Nothing,
    /// The very same mapping.
    Same,
    /// Something else, which is gone.
    Different,
}

/// What readers see.
pub(crate) struct Table {
    slots: AtomicPtr<Slots>,
    /// One bit a level that has clusters.
    levels: AtomicU32,
    /// What narrow and tight leaves count from.
    origin: Origin,
}

/// What the writer knows besides.
#[derive(Default)]
pub(crate) struct Writer {
    /// The keys of all clusters that are not [`Word::NOTHING`], in order of level and address: a removal finds what lies
    /// in its range without looking at what does not.
    index: Index,
    /// How many clusters hold something, by level and in all.
    clusters: [usize; LEVELS],
    live: usize,
    /// How many of them have their word in a branch.
    branched: usize,
    /// Slots that have a key, those whose cluster is empty by now included: a key stays until the table is rebuilt.
    claimed: usize,
    mappings: usize,
    wide: usize,
    narrow: usize,
    tight: usize,
    spans: usize,
    branches: usize,
    /// Where eviction goes on: a slot.
    hand: usize,
    /// Unlinked, and maybe still read.
    retired: Vec<Retired>,
    retired_bytes: usize,
}

/// Memory that readers may still look at.
///
/// Pointers and not boxes, which would claim to be the only ones. Dropping one frees it.
pub(crate) enum Retired {
    Slots(*mut Slots),
    Wide(*mut WideLeaf),
    Narrow(*mut NarrowLeaf),
    Tight(*mut TightLeaf),
    Span(*mut Span),
    Branch(*mut Branch),
}

// SAFETY: an owned allocation of what is `Send` and `Sync` itself.
unsafe impl Send for Retired {}

impl Drop for Retired {
    fn drop(&mut self) {
        // SAFETY: each comes from `Box::into_raw` and is retired once, by whoever unlinked it; whoever drops it knows
        // that the visits which could have seen it are over.
        unsafe {
            match *self {
                Retired::Slots(slots) => drop(Box::from_raw(slots)),
                Retired::Wide(leaf) => drop(Box::from_raw(leaf)),
                Retired::Narrow(leaf) => drop(Box::from_raw(leaf)),
                Retired::Tight(leaf) => drop(Box::from_raw(leaf)),
                Retired::Span(span) => drop(Box::from_raw(span)),
                Retired::Branch(branch) => drop(Box::from_raw(branch)),
            }
        }
    }
}

impl Translation {
    #[inline]
    pub(crate) fn contains(&self, addr: u64) -> bool {
        self.first <= addr && addr <= self.last
    }

    /// Of the granule that `addr` is in, which lies at `host`.
    #[inline]
    fn of_granule(level: u32, addr: u64, host: u64, permission: Permission) -> Translation {
        let within = granule_mask(level);
        Translation { first: addr & !within, last: addr | within, host, permission }
    }

    fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}

#[inline]
fn index(level: u32, addr: u64) -> u32 {
    (addr >> (6 * level)) as u32 & 63
}

#[inline]
fn cluster(level: u32, addr: u64) -> u64 {
    addr >> (6 * level) >> 6
}

/// A run of granules in one cluster.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    pub(crate) level: u32,
    cluster: u64,
    pub(crate) index: u32,
    pub(crate) count: u32,
}

impl Run {
    fn key(self) -> u64 {
        key(self.level, self.cluster)
    }

    pub(crate) fn mask(self) -> u64 {
        (u64::MAX >> (64 - self.count)) << self.index
    }

    /// The granules of a cluster that have something of `first..=last`, which has something of the cluster.
    fn within(level: u32, cluster: u64, first: u64, last: u64) -> Run {
        let start = cluster << 6 << (6 * level);
        let from = if first > start { index(level, first) } else { 0 };
        let to = if last >> (6 * level) >> 6 > cluster { 63 } else { index(level, last) };
        Run { level, cluster, index: from, count: to - from + 1 }
    }

    /// A range that is one granule: what nearly all are.
    pub(crate) fn granule(first: u64, last: u64) -> Option<Run> {
        let mask = last - first;
        let bits = mask.trailing_ones();
        let whole = bits.is_multiple_of(6) && bits <= 60 && mask >> bits == 0 && first & mask == 0;
        let level = bits / 6;
        whole.then(|| Run { level, cluster: cluster(level, first), index: index(level, first), count: 1 })
    }
}

/// Cuts a range into the largest granules that fit: at most two runs a level, and never two in one cluster.
fn runs(first: u64, last: u64) -> impl Iterator<Item = Run> {
    let mut at = Some(first);
    std::iter::from_fn(move || {
        let start = at?;
        // One less than the length, because the whole space has 2^64.
        let rest = last - start;
        let aligned = start.trailing_zeros().min(60) / 6;
        let fits = rest.checked_add(1).map_or(60, |len| len.ilog2()) / 6;
        let level = aligned.min(fits).min(LEVELS as u32 - 1);
        let index = index(level, start);
        let whole = (rest >> (6 * level)) + u64::from(rest & granule_mask(level) == granule_mask(level));
        let to_the_end = if level == LEVELS as u32 - 1 { 16 - index } else { 64 - index };
        let count = whole.min(u64::from(to_the_end)) as u32;
        let used = ((u64::from(count) - 1) << (6 * level)) | granule_mask(level);
        at = (used < rest).then(|| start + used + 1);
        Some(Run { level, cluster: cluster(level, start), index, count })
    })
}

#[inline]
fn granule_mask(level: u32) -> u64 {
    (1 << (6 * level)) - 1
}

impl Table {
    pub(crate) fn new() -> Table {
        Table {
            slots: AtomicPtr::new(Box::into_raw(Slots::new(0, 0))),
            levels: AtomicU32::new(0),
            origin: Origin::new(),
        }
    }

    /// The mapping of `addr`.
    ///
    /// # Safety
    /// Called in a visit of a registered view, or with the writer's lock held.
    #[inline]
    pub(crate) unsafe fn lookup(&self, addr: u64) -> Option<Translation> {
        let mut levels = self.levels.load(Acquire);
        // SAFETY: the pointer is from `Box::into_raw`, and freed only after the visits that could have loaded it.
        let slots = unsafe { &*self.slots.load(Acquire) };
        while levels != 0 {
            let level = levels.trailing_zeros();
            levels &= levels - 1;
            // SAFETY: by this function's own contract, as below.
            let Some(place) = (unsafe { slots.find(key(level, cluster(level, addr))) }) else { continue };
            // Acquire here and below: what the word points to was written before it.
            let word = Word(place.value.load(Acquire));
            // SAFETY: from the table, by this function's own contract.
            if let Some(found) = unsafe { self.in_cluster(word, level, addr) } {
                return Some(found);
            }
        }
        None
    }

    /// The page of `addr` if that is in a row or in a leaf that is not wide, as nearly all are where there are many, and its
    /// cluster's word is in the first place where it may be. Else nothing, and [`Table::lookup`] knows.
    ///
    /// What a processor works at ahead of memory is so many instructions: the fewer a lookup has, the more of them wait for
    /// memory at the same time.
    ///
    /// # Safety
    /// As for [`Table::lookup`].
    #[inline]
    pub(crate) unsafe fn page(&self, addr: u64) -> Word {
        // SAFETY: as in `lookup`.
        let slots = unsafe { &*self.slots.load(Acquire) };
        // SAFETY: from the table, by this function's own contract; and so is the leaf.
        unsafe { slots.page(cluster(PAGES, addr)).page(index(PAGES, addr), &self.origin) }
    }

    /// # Safety
    /// As for [`Word::meaning`].
    #[inline]
    unsafe fn in_cluster(&self, word: Word, level: u32, addr: u64) -> Option<Translation> {
        // SAFETY: by this function's own contract.
        match unsafe { word.meaning() } {
            Meaning::Nothing => None,
            Meaning::Leaf(leaf) => {
                let word = leaf.word(index(level, addr), &self.origin);
                // SAFETY: as above. A leaf holds no leaf: the recursion ends here.
                unsafe { self.in_cluster(word, level, addr) }
            }
            Meaning::Granule { index: at, host, permission } => {
                (at == index(level, addr)).then(|| Translation::of_granule(level, addr, host, permission))
            }
            Meaning::Span(span) => span.0.contains(addr).then_some(span.0),
            Meaning::Row { host, permission } => {
                let host = host + (u64::from(index(level, addr)) << (6 * level));
                Some(Translation::of_granule(level, addr, host, permission))
            }
        }
    }

    /// Caches a mapping in the place of everything that overlaps it.
    pub(crate) fn insert(&self, writer: &mut Writer, mapping: Translation) -> Met {
        // SAFETY: the writer is at hand.
        let there = unsafe { self.lookup(mapping.first) };
        if there == Some(mapping) {
            return Met::Same;
        }
        let met = match self.remove(writer, mapping.first, mapping.last) {
            0 => Met::Nothing,
            _ => Met::Different,
        };
        writer.mappings += 1;
        if let Some(run) = Run::granule(mapping.first, mapping.last)
            && mapping.host <= ADDRESS
        {
            self.put(writer, run, Word::granule(run.index, mapping.host, mapping.permission));
        } else {
            writer.spans += 1;
            let word = Word::pointer(SPAN, Box::into_raw(Box::new(Span(mapping))));
            for run in runs(mapping.first, mapping.last) {
                self.put(writer, run, word);
            }
        }
        met
    }

    /// Removes every mapping that overlaps `first..=last`, and says how many that were.
    pub(crate) fn remove(&self, writer: &mut Writer, first: u64, last: u64) -> usize {
        let before = writer.mappings;
        let mut levels = self.levels.load(Relaxed);
        while levels != 0 {
            let level = levels.trailing_zeros();
            levels &= levels - 1;
            let (low, high) = (cluster(level, first), cluster(level, last));
            if high - low < 4 {
                for cluster in low..=high {
                    self.remove_in_cluster(writer, key(level, cluster), first, last);
                }
            } else {
                for found in writer.index.take(&(key(level, low)..=key(level, high))) {
                    self.remove_in_cluster(writer, found, first, last);
                    // Else its branch went with the last of it.
                    let Some(place) = self.find(found) else { continue };
                    match Word(place.value.load(Relaxed)) {
                        // To a reader they are the same.
                        Word::VACANT => place.value.store(Word::NOTHING.0, Release),
                        _ => writer.index.add(found),
                    }
                }
            }
        }
        before - writer.mappings
    }

    /// Removes mappings until `enough`, cluster by cluster in the order of their slots, which nobody can foresee, and going
    /// round.
    pub(crate) fn evict(&self, writer: &mut Writer, enough: impl Fn(&Writer) -> bool) -> usize {
        let before = writer.mappings;
        let slots = self.slots();
        for _ in 0..slots.len() {
            if enough(writer) {
                break;
            }
            let there = slots.at(writer.hand & (slots.len() - 1));
            writer.hand = writer.hand.wrapping_add(1);
            let Some((key, word)) = there else { continue };
            // SAFETY: from the table, and the writer is at hand; nothing retired is freed before the writer is let go.
            let Some(branch) = (unsafe { word.branch() }) else {
                self.remove_in_cluster(writer, key, 0, u64::MAX);
                continue;
            };
            // From one on that is another each time.
            let from = (writer.hand as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58;
            let part = |late: bool| branch.clusters(key).filter(move |&(key, _)| (key % 64 >= from) == late);
            for (key, _) in part(true).chain(part(false)) {
                if enough(writer) {
                    break;
                }
                self.remove_in_cluster(writer, key, 0, u64::MAX);
            }
        }
        before - writer.mappings
    }

    fn remove_in_cluster(&self, writer: &mut Writer, key: u64, first: u64, last: u64) {
        let (level, cluster) = split(key);
        let Some(place) = self.find(key) else { return };
        let word = Word(place.value.load(Relaxed));
        // SAFETY: from the table, and the writer is at hand; nothing retired is freed before the writer is let go.
        match unsafe { word.meaning() } {
            Meaning::Nothing => {}
            Meaning::Granule { index, .. } => {
                let start = (cluster << 6 | u64::from(index)) << (6 * level);
                if start <= last && first <= start | granule_mask(level) {
                    writer.mappings -= 1;
                    self.vacate(writer, place, key);
                }
            }
            Meaning::Span(span) => {
                if span.0.overlaps(first, last) {
                    self.remove_span(writer, span, word);
                }
            }
            Meaning::Row { host, permission } => {
                let gone = Run::within(level, cluster, first, last).mask();
                writer.mappings -= gone.count_ones() as usize;
                if gone == u64::MAX {
                    self.vacate(writer, place, key);
                    return;
                }
                let left = (0..64).filter(|at| gone >> at & 1 == 0).map(|index| {
                    let host = host + (u64::from(index) << (6 * level));
                    (Run { level, cluster, index, count: 1 }, Word::granule(index, host, permission))
                });
                place.value.store(self.leaf(writer, left).that_was_row().0, Release);
            }
            Meaning::Leaf(leaf) => {
                let wanted = Run::within(level, cluster, first, last).mask();
                loop {
                    let left = leaf.used() & wanted;
                    if left == 0 {
                        break;
                    }
                    let at = left.trailing_zeros();
                    let word = leaf.word(at, &self.origin);
                    // SAFETY: as above.
                    match unsafe { word.meaning() } {
                        Meaning::Span(span) => self.remove_span(writer, span, word),
                        _ => {
                            writer.mappings -= 1;
                            self.take(writer, Run { level, cluster, index: at, count: 1 });
                        }
                    }
                }
            }
        }
    }

    fn remove_span(&self, writer: &mut Writer, span: &Span, word: Word) {
        writer.mappings -= 1;
        writer.spans -= 1;
        for run in runs(span.0.first, span.0.last) {
            self.take(writer, run);
        }
        // Every word that named it is gone, so it is retired once.
        writer.retire(Retired::Span(word.to()), size_of::<Span>());
    }

    /// Empties a run that is known to hold one mapping.
    fn take(&self, writer: &mut Writer, run: Run) {
        let place = self.find(run.key()).unwrap_or_else(|| unreachable!("a mapping's cluster has a place"));
        let word = Word(place.value.load(Relaxed));
        // SAFETY: from the table, and the writer is at hand.
        if let Meaning::Leaf(leaf) = unsafe { word.meaning() } {
            leaf.clear(run);
            if leaf.used() != 0 {
                return;
            }
            self.vacate(writer, place, run.key());
            writer.retire_leaf(word);
        } else {
            self.vacate(writer, place, run.key());
        }
    }

    fn vacate(&self, writer: &mut Writer, place: Place<'_>, key: u64) {
        place.value.store(Word::VACANT.0, Release);
        writer.live -= 1;
        let (level, cluster) = split(key);
        writer.clusters[level as usize] -= 1;
        if writer.clusters[level as usize] == 0 {
            self.levels.store(self.levels.load(Relaxed) & !(1 << level), Release);
        }
        if let Some(branch) = place.branch {
            writer.branched -= 1;
            branch.shrank();
            if branch.live() == 0 {
                let word = self.slots().cut(region(cluster));
                writer.index.take(&(key & !63..=key | 63));
                writer.retire_branch(word);
            }
        }
    }

    /// Fills a run that is empty.
    fn put(&self, writer: &mut Writer, run: Run, word: Word) {
        let place = self.claim(writer, run);
        let there = Word(place.value.load(Relaxed));
        // SAFETY: from the table, and the writer is at hand.
        match unsafe { there.meaning() } {
            Meaning::Nothing => {
                if there == Word::NOTHING {
                    writer.index.add(run.key());
                }
                writer.live += 1;
                writer.clusters[run.level as usize] += 1;
                // Before the value: who finds the level empty does not look for it.
                self.levels.store(self.levels.load(Relaxed) | 1 << run.level, Release);
                if let Some(branch) = place.branch {
                    branch.grew();
                    writer.branched += 1;
                }
                place.value.store(word.0, Release);
            }
            Meaning::Leaf(leaf) => {
                if !leaf.fill(run, word, &self.origin) {
                    let others = (0..64).filter(|at| leaf.used() >> at & 1 == 1);
                    let others = others.map(|at| (Run { index: at, count: 1, ..run }, leaf.word(at, &self.origin)));
                    // The one that does not fit comes first, so that no narrow leaf is filled in vain.
                    let wide = self.leaf(writer, iter::once((run, word)).chain(others));
                    place.value.store(if there.was_row() { wide.that_was_row() } else { wide }.0, Release);
                } else if !there.was_row()
                    && let Some(row) = leaf.row(run.level, &self.origin)
                {
                    place.value.store(row.0, Release);
                } else {
                    return;
                }
                writer.retire_leaf(there);
            }
            Meaning::Granule { index, .. } => {
                self.share(writer, place, Run { index, count: 1, ..run }, there, run, word);
            }
            Meaning::Span(span) => {
                let old = runs(span.0.first, span.0.last).find(|old| old.key() == run.key());
                self.share(writer, place, old.expect("a span is where its runs are"), there, run, word);
            }
            Meaning::Row { .. } => unreachable!("a row has no room"),
        }
    }

    /// Turns a cluster's single word into a leaf, with a second mapping beside the first.
    fn share(&self, writer: &mut Writer, place: Place<'_>, old_run: Run, old: Word, run: Run, word: Word) {
        self.origin.choose(run.level, old);
        place.value.store(self.leaf(writer, [(old_run, old), (run, word)].into_iter()).0, Release);
    }

    /// A leaf of these words, of the narrowest kind that they fit in.
    fn leaf(&self, writer: &mut Writer, words: impl Iterator<Item = (Run, Word)> + Clone) -> Word {
        if let Some(tight) = TightLeaf::of(words.clone(), &self.origin) {
            writer.tight += 1;
            return tight;
        }
        let narrow = NarrowLeaf::new();
        if words.clone().all(|(run, word)| Leaf::Narrow(&narrow).fill(run, word, &self.origin)) {
            writer.narrow += 1;
            return Word::pointer(NARROW, Box::into_raw(narrow));
        }
        let wide = WideLeaf::new();
        words.for_each(|(run, word)| wide.fill(run, word));
        writer.wide += 1;
        Word::pointer(LEAF, Box::into_raw(wide))
    }

    /// The place of a run's cluster, which gets one if it has none.
    fn claim(&self, writer: &mut Writer, run: Run) -> Place<'_> {
        if let Some(place) = self.find(run.key()) {
            return place;
        }
        if (writer.claimed + 1) * 2 > self.slots().len() {
            self.rebuild(writer);
            // Its region may have a branch by now.
            if let Some(place) = self.find(run.key()) {
                return place;
            }
        }
        writer.claimed += 1;
        Place { value: self.slots().claim(run.key()), branch: None }
    }

    /// Copies the clusters that hold something into slots enough for some more. Crowded regions get a branch, and those that
    /// hardly hold anything lose theirs.
    fn rebuild(&self, writer: &mut Writer) {
        let old = self.slots();
        let in_slots = writer.clusters[PAGES as usize] - writer.branched;
        let mut pages = Vec::with_capacity(in_slots);
        let mut others = Vec::with_capacity(writer.live - writer.clusters[PAGES as usize] + writer.branches);
        writer.index = Index::default();
        for (key, word) in old.iter() {
            // SAFETY: from the table, and the writer is at hand.
            if let Some(branch) = unsafe { word.branch() } {
                branch.clusters(key).for_each(|(key, _)| writer.index.add(key));
                if branch.is_worth_keeping() {
                    branch.forget_vacant();
                    others.push((key, word));
                } else {
                    pages.extend(branch.clusters(key));
                    writer.branched -= branch.live();
                    writer.retire_branch(word);
                }
            } else {
                writer.index.add(key);
                if split(key).0 == PAGES { &mut pages } else { &mut others }.push((key, word));
            }
        }
        pages.sort_unstable_by_key(|&(key, _)| key);
        let crowd = |clusters: &[_]| clusters.len() >= MANY;
        let regions = || pages.chunk_by(|(one, _), (next, _)| region(*one) == region(*next));
        let keys =
            others.len() + regions().map(|clusters| if crowd(clusters) { 1 } else { clusters.len() }).sum::<usize>();
        let branches = writer.branches + regions().filter(|clusters| crowd(clusters)).count();
        let mut new = Slots::new(keys, branches);
        others.iter().for_each(|&(key, word)| new.put(key, word));
        for clusters in regions() {
            if crowd(clusters) {
                writer.branches += 1;
                writer.branched += clusters.len();
                new.put(region(clusters[0].0), Branch::of(clusters));
            } else {
                clusters.iter().for_each(|&(key, word)| new.put(key, word));
            }
        }
        writer.claimed = keys;
        let bytes = old.len() * SLOT;
        // Release: the copies above are there for whoever loads the pointer.
        let old = self.slots.swap(Box::into_raw(new), Release);
        // Unlinked by the line above, so it is retired once.
        writer.retire(Retired::Slots(old), bytes);
    }

    /// The place of a cluster that has one; for the writer.
    fn find(&self, key: u64) -> Option<Place<'_>> {
        // SAFETY: the writer is at hand; what it unlinks is freed only after it lets the lock go.
        unsafe { self.slots().find(key) }
    }

    /// For the writer, which alone replaces them. Not kept across `claim`.
    fn slots(&self) -> &Slots {
        // SAFETY: from `Box::into_raw`; what the writer replaces is freed only after it lets the lock go.
        unsafe { &*self.slots.load(Relaxed) }
    }
}

/// So many bytes of retired pieces are freed together: each time costs a fence.
const RETIRED: usize = 64 * size_of::<WideLeaf>();

impl Writer {
    fn retire(&mut self, piece: Retired, bytes: usize) {
        self.retired.push(piece);
        self.retired_bytes += bytes;
    }

    /// A leaf that no slot names any more, so that it is retired once.
    fn retire_leaf(&mut self, word: Word) {
        if word.is_tight() {
            self.tight -= 1;
            self.retire(Retired::Tight(word.to_tight()), size_of::<TightLeaf>());
        } else if word.is_narrow() {
            self.narrow -= 1;
            self.retire(Retired::Narrow(word.to()), size_of::<NarrowLeaf>());
        } else {
            self.wide -= 1;
            self.retire(Retired::Wide(word.to()), size_of::<WideLeaf>());
        }
    }

    /// A branch that no slot names any more, as above.
    fn retire_branch(&mut self, word: Word) {
        self.branches -= 1;
        self.retire(Retired::Branch(word.to()), BRANCH_BYTES);
    }

    pub(crate) fn is_worth_collecting(&self) -> bool {
        self.retired_bytes >= RETIRED
    }

    pub(crate) fn take_retired(&mut self) -> Vec<Retired> {
        self.retired_bytes = 0;
        std::mem::take(&mut self.retired)
    }

    pub(crate) fn mappings(&self) -> usize {
        self.mappings
    }

    /// How much memory the table takes, at most and but for what is about to be freed.
    pub(crate) fn bytes(&self) -> usize {
        // Of the slots, between a sixth and a half have keys; the index is a vector, and may have room for as much again.
        (self.live - self.branched + self.branches) * 6 * SLOT
            + self.live * 2 * size_of::<u64>()
            + self.branches * BRANCH_BYTES
            + self.wide * size_of::<WideLeaf>()
            + self.narrow * size_of::<NarrowLeaf>()
            + self.tight * size_of::<TightLeaf>()
            + self.spans * size_of::<Span>()
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // Nobody reads any more. What hangs on the slots goes the way of every removal; the writer's books are not
        // needed for that, so the spans are collected first: one span may hang on many words.
        // SAFETY: from `Box::into_raw`, and unlinked for good.
        let slots = unsafe { Box::from_raw(self.slots.load(Acquire)) };
        let mut spans = BTreeSet::new();
        let mut drop_cluster = |word: Word| match word.0 >> 56 {
            SPAN => _ = spans.insert(word.address()),
            LEAF => {
                // SAFETY: made by `Box::into_raw`, and in no other place.
                let leaf = unsafe { Box::from_raw(word.to::<WideLeaf>()) };
                spans.extend(leaf.words().filter(|word| word.0 >> 56 == SPAN).map(Word::address));
            }
            // SAFETY: as above. Spans don't fit in.
            NARROW => drop(unsafe { Box::from_raw(word.to::<NarrowLeaf>()) }),
            // SAFETY: as above.
            _ if word.is_tight() => drop(unsafe { Box::from_raw(word.to_tight()) }),
            _ => {}
        };
        for (key, word) in slots.iter() {
            if word.0 >> 56 == BRANCH {
                // SAFETY: as above.
                let branch = unsafe { Box::from_raw(word.to::<Branch>()) };
                branch.clusters(key).for_each(|(_, word)| drop_cluster(word));
            } else {
                drop_cluster(word);
            }
        }
        for span in spans {
            // SAFETY: made by `Box::into_raw` in `insert`, and here once for the set.
            drop(unsafe { Box::from_raw(Word(span).to::<Span>()) });
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_into_the_largest_granules() {
        let cut = |first, last| -> Vec<_> {
            runs(first, last).map(|run| (run.level, run.cluster, run.index, run.count)).collect()
        };
        assert_eq!(cut(0x1000, 0x1fff), [(2, 0, 1, 1)]);
        assert_eq!(
            cut(0x800_0000_0456_0000 & !0xff_ffff, 0x800_0000_04ff_ffff),
            [(4, 0x800_0000_0400_0000 >> 30, 4, 1)]
        );
        assert_eq!(cut(0, u64::MAX), [(10, 0, 0, 16)]);
        assert_eq!(cut(u64::MAX, u64::MAX), [(0, u64::MAX >> 6, 63, 1)]);
        assert_eq!(cut(0xfff, 0x1000), [(0, 0x3f, 63, 1), (0, 0x40, 0, 1)]);
        assert_eq!(cut(0x3f000, 0x40fff), [(2, 0, 63, 1), (2, 1, 0, 1)]);
    }

    #[test]
    fn a_cut_covers_its_range_once() {
        for (first, last) in
            [(0, u64::MAX), (1, u64::MAX), (0, u64::MAX - 1), (1, u64::MAX - 1), (5, 5), (0x1234, 0x5678_9abc)]
        {
            let mut next = Some(first);
            let mut clusters = BTreeSet::new();
            for run in runs(first, last) {
                assert!(clusters.insert(run.key()));
                let start = (run.cluster << 6 | u64::from(run.index)) << (6 * run.level);
                assert_eq!(Some(start), next);
                let end = start + (((u64::from(run.count) - 1) << (6 * run.level)) | granule_mask(run.level));
                next = end.checked_add(1);
                assert!(end <= last);
            }
            assert_eq!(next, last.checked_add(1));
            assert!(clusters.len() <= 22, "{} runs", clusters.len());
        }
    }
}
