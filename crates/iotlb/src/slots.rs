//! Where a cluster's word is: in a slot, which its key is hashed to, or in a branch.
//!
//! 64 clusters of pages that follow each other are a *region*. Where several of them hold something, the region has one
//! slot, and the words of its clusters lie side by side in a [`Branch`]: 8 bytes each, where slots take 32 to 96. So the way
//! to a million dense pages fits into a processor's own cache, and a lookup waits for memory once, for the page, and not for
//! the slot before.
//!
//! Which regions have a branch is decided when the slots are replaced. In one set of slots the word of a cluster that holds
//! something stays where it is, and a reader looks in one place.

use crate::leaf::PAGES;
use crate::sync::{AtomicU64, AtomicUsize};
use crate::word::{BRANCH, Word};
use rustix::mm::{Advice, madvise};
use std::hash::{BuildHasher, RandomState};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// The key of a slot that never had one: no cluster has level 15.
const EMPTY: u64 = u64::MAX;
/// What the key of a region has in place of a level.
const REGIONS: u32 = 11;
/// How many slots share a cache line and are looked at together. A model checker pays for each atomic.
const WAYS: usize = if cfg!(loom) { 1 } else { 4 };
const FEWEST: usize = if cfg!(loom) { 4 } else { 64 };
/// A region of so many clusters gets a branch, which takes about as much memory as their slots.
pub(crate) const MANY: usize = if cfg!(loom) { 2 } else { 8 };
/// And keeps it for as long as it has so many.
const SOME: usize = if cfg!(loom) { 1 } else { 4 };

/// Of a key: which cluster of its level.
const CLUSTER: u64 = (1 << 60) - 1;

#[inline]
pub(crate) fn key(level: u32, cluster: u64) -> u64 {
    u64::from(level) << 60 | cluster
}

/// Level and cluster.
#[inline]
pub(crate) fn split(key: u64) -> (u32, u64) {
    ((key >> 60) as u32, key & CLUSTER)
}

/// The key of the region that a cluster of pages is in, by the cluster's own key or without its level.
#[inline]
pub(crate) fn region(cluster: u64) -> u64 {
    key(REGIONS, (cluster & CLUSTER) >> 6)
}

/// The keys of a region's clusters.
fn clusters(region: u64) -> impl Iterator<Item = u64> {
    let first = split(region).1 << 6;
    (first..first + 64).map(|cluster| key(PAGES, cluster))
}

pub(crate) struct Slots {
    lines: Box<[Line]>,
    /// Odd and random, so that no guest can choose addresses that collide.
    multiplier: u64,
    shift: u32,
    /// The regions with branches once more, each where its number says if no other is there: nearly all, for they mostly follow
    /// each other. A reader need not hash them.
    near: Box<[Near]>,
}

/// A branch, and of which region.
struct Near {
    region: u64,
    branch: AtomicU64,
}

/// How many bytes a branch takes, with its place among the near ones.
pub(crate) const BRANCH_BYTES: usize = size_of::<Branch>() + 2 * size_of::<Near>();

/// Slots side by side: which of them has a key is found without a branch that the processor could foresee wrongly, only to
/// learn it when the line has come from memory.
#[repr(align(64))]
struct Line {
    /// Each set once, after the first value, and never changed: a reader that found its key needs no second look.
    keys: [AtomicU64; WAYS],
    values: [AtomicU64; WAYS],
}

/// One of a line's.
#[derive(Clone, Copy)]
struct Slot<'s> {
    key: &'s AtomicU64,
    value: &'s AtomicU64,
}

/// How many bytes a slot takes.
pub(crate) const SLOT: usize = size_of::<Line>() / WAYS;

/// The words of a region's clusters.
pub(crate) struct Branch {
    words: [AtomicU64; 64],
    /// How many of them hold something; the writer's alone.
    live: AtomicUsize,
}

/// Where a cluster's word is.
#[derive(Clone, Copy)]
pub(crate) struct Place<'s> {
    pub(crate) value: &'s AtomicU64,
    /// What it is in, if it is no slot.
    pub(crate) branch: Option<&'s Branch>,
}

fn multiplier(len: usize) -> u64 {
    // A model checker comes by the same way twice and must find the same.
    if cfg!(loom) { 0x9e37_79b9_7f4a_7c15 } else { RandomState::new().hash_one(len) | 1 }
}

/// A random look at a large table would otherwise miss the processor's own TLB besides. For memory that is not touched yet.
fn ask_for_huge_pages<T>(memory: &mut [MaybeUninit<T>]) {
    const HUGE: usize = 2 << 20;
    let Range { start, end } = memory.as_mut_ptr_range();
    let skip = start.addr().next_multiple_of(HUGE) - start.addr();
    let len = (end.addr() / HUGE * HUGE).saturating_sub(start.addr() + skip);
    if len > 0 {
        // SAFETY: within `memory`; no advice of this kind changes what is there. A kernel without huge pages says so, and
        // goes on without.
        let _ = unsafe { madvise(start.wrapping_byte_add(skip).cast(), len, Advice::LinuxHugepage) };
    }
}

impl Slots {
    /// Slots enough for so many keys and some more, half as many at least; some of them regions' with branches.
    pub(crate) fn new(keys: usize, branches: usize) -> Box<Slots> {
        let len = (keys * 3).next_power_of_two().max(FEWEST) / WAYS;
        let mut lines = Vec::with_capacity(len);
        ask_for_huge_pages(lines.spare_capacity_mut());
        lines.extend((0..len).map(|_| Line {
            keys: std::array::from_fn(|_| AtomicU64::new(EMPTY)),
            values: std::array::from_fn(|_| AtomicU64::new(0)),
        }));
        let near =
            (0..branches.next_power_of_two()).map(|_| Near { region: EMPTY, branch: AtomicU64::new(0) }).collect();
        Box::new(Slots { lines: lines.into_boxed_slice(), multiplier: multiplier(len), shift: 64 - len.ilog2(), near })
    }

    pub(crate) fn len(&self) -> usize {
        self.lines.len() * WAYS
    }

    /// The key and the word of a slot, if it holds something; for the writer.
    pub(crate) fn at(&self, at: usize) -> Option<(u64, Word)> {
        let slot = self.lines[at / WAYS].slot(at % WAYS);
        let word = Word(slot.value.load(Relaxed));
        (!word.is_nothing()).then(|| (slot.key.load(Relaxed), word))
    }

    /// All that hold something; for the writer.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Word)> {
        (0..self.len()).filter_map(|at| self.at(at))
    }

    /// The place of a cluster that has one.
    ///
    /// # Safety
    /// As for [`Word::meaning`]: the slots and what they point to.
    #[inline]
    pub(crate) unsafe fn find(&self, key: u64) -> Option<Place<'_>> {
        let (level, cluster) = split(key);
        if level == PAGES
            // SAFETY: by this function's own contract.
            && let Some(branch) = unsafe { self.branch(region(cluster)) }
        {
            return Some(branch.place(cluster));
        }
        self.probe(key).ok().map(|slot| Place { value: slot.value, branch: None })
    }

    /// # Safety
    /// As for [`Slots::find`].
    #[inline]
    unsafe fn branch(&self, region: u64) -> Option<&Branch> {
        let near = &self.near[self.near_of(region)];
        let word = match near.region {
            it if it == region => &near.branch,
            // Its place would be taken.
            EMPTY => return None,
            _ => self.probe(region).ok()?.value,
        };
        // SAFETY: by this function's own contract.
        unsafe { Word(word.load(Acquire)).branch() }
    }

    /// The word of a cluster of pages, if it is in the first place where it may be. Else [`Slots::find`] knows.
    ///
    /// # Safety
    /// As for [`Slots::find`].
    #[inline]
    pub(crate) unsafe fn page(&self, cluster: u64) -> Word {
        let region = region(cluster);
        let near = &self.near[self.near_of(region)];
        if near.region == region
            // SAFETY: by this function's own contract.
            && let Some(branch) = unsafe { Word(near.branch.load(Acquire)).branch() }
        {
            return Word(branch.place(cluster).value.load(Acquire));
        }
        let key = key(PAGES, cluster);
        self.line(self.line_of(key)).find(key).map_or(Word::NOTHING, |slot| Word(slot.value.load(Acquire)))
    }

    /// The value of a key that has no slot yet, and gets one.
    pub(crate) fn claim(&self, key: u64) -> &AtomicU64 {
        let Err(slot) = self.probe(key) else { unreachable!("keys are unique") };
        slot.key.store(key, Release);
        slot.value
    }

    /// Puts a word in before anybody reads.
    pub(crate) fn put(&mut self, key: u64, word: Word) {
        self.claim(key).store(word.0, Relaxed);
        let near = self.near_of(key);
        let near = &mut self.near[near];
        if split(key).0 == REGIONS && near.region == EMPTY {
            *near = Near { region: key, branch: AtomicU64::new(word.0) };
        }
    }

    /// Takes a branch off that holds nothing any more, and gives the word that named it.
    pub(crate) fn cut(&self, region: u64) -> Word {
        let Ok(slot) = self.probe(region) else { unreachable!("a branch hangs on a slot") };
        let word = Word(slot.value.load(Relaxed));
        slot.value.store(Word::NOTHING.0, Release);
        let near = &self.near[self.near_of(region)];
        if near.region == region {
            near.branch.store(Word::NOTHING.0, Release);
        }
        word
    }

    #[inline]
    fn near_of(&self, region: u64) -> usize {
        region as usize & (self.near.len() - 1)
    }

    /// The slot of `key`, else the empty one where it would go. Ends because at most half of the slots have keys.
    #[inline]
    fn probe(&self, key: u64) -> Result<Slot<'_>, Slot<'_>> {
        let mut at = self.line_of(key);
        loop {
            let line = self.line(at);
            if let Some(slot) = line.find(key) {
                return Ok(slot);
            }
            // A line is filled from its front, and goes on in the next when it is full.
            if let Some(slot) = line.find(EMPTY) {
                return Err(slot);
            }
            at += 1;
        }
    }

    /// In which line a key belongs, if there is room.
    #[inline]
    fn line_of(&self, key: u64) -> usize {
        // Less than 64: there are two lines at least.
        key.wrapping_mul(self.multiplier).wrapping_shr(self.shift) as usize
    }

    #[inline]
    fn line(&self, at: usize) -> &Line {
        &self.lines[at & (self.lines.len() - 1)]
    }
}

impl Line {
    #[inline]
    fn find(&self, key: u64) -> Option<Slot<'_>> {
        // Bits, and not branches, one of which would be wrong every other time.
        // Acquire: the value was stored before the key.
        let found = (0..WAYS).fold(0u32, |bits, way| bits | u32::from(self.keys[way].load(Acquire) == key) << way);
        (found != 0).then(|| self.slot(found.trailing_zeros() as usize))
    }

    #[inline]
    fn slot(&self, way: usize) -> Slot<'_> {
        Slot { key: &self.keys[way], value: &self.values[way] }
    }
}

impl Branch {
    /// Of clusters of one region, as a word that points to it.
    pub(crate) fn of(clusters: &[(u64, Word)]) -> Word {
        let branch = Branch {
            words: std::array::from_fn(|_| AtomicU64::new(Word::NOTHING.0)),
            live: AtomicUsize::new(clusters.len()),
        };
        for &(key, word) in clusters {
            branch.place(key).value.store(word.0, Relaxed);
        }
        Word::pointer(BRANCH, Box::into_raw(Box::new(branch)))
    }

    #[inline]
    fn place(&self, cluster: u64) -> Place<'_> {
        Place { value: &self.words[cluster as usize & 63], branch: Some(self) }
    }

    /// The clusters of it that hold something; for the writer.
    pub(crate) fn clusters(&self, region: u64) -> impl Iterator<Item = (u64, Word)> {
        let words = self.words.iter().map(|word| Word(word.load(Relaxed)));
        clusters(region).zip(words).filter(|(_, word)| !word.is_nothing())
    }

    /// Whether it is worth its memory.
    pub(crate) fn is_worth_keeping(&self) -> bool {
        self.live() >= SOME
    }

    pub(crate) fn live(&self) -> usize {
        self.live.load(Relaxed)
    }

    /// One cluster more.
    pub(crate) fn grew(&self) {
        self.live.store(self.live() + 1, Relaxed);
    }

    /// One less.
    pub(crate) fn shrank(&self) {
        self.live.store(self.live() - 1, Relaxed);
    }

    /// Makes all clusters that hold nothing [`Word::NOTHING`]: they are in the index no more.
    pub(crate) fn forget_vacant(&self) {
        for word in &self.words {
            if Word(word.load(Relaxed)).is_nothing() {
                word.store(Word::NOTHING.0, Relaxed);
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use ringfence_dma::Permission;

    #[test]
    fn a_branch_is_found_by_hash_and_by_number_until_it_is_cut() {
        // The third has the first's number among the near ones.
        let regions = [5, 6, 7].map(|number: u64| region(if number == 7 { 9 } else { number } << 6));
        let mut slots = Slots::new(3, 3);
        let word = |region: u64| Word::granule(1, region & 0xfff << 12, Permission::ReadOnly);
        for region in regions {
            let clusters: Vec<_> = clusters(region).take(MANY).map(|key| (key, word(region))).collect();
            slots.put(region, Branch::of(&clusters));
        }
        // SAFETY: what hangs on the slots is freed at the end alone.
        let found = |slots: &Slots, cluster: u64| unsafe {
            let by_hash = slots.find(key(PAGES, cluster)).map(|place| Word(place.value.load(Relaxed)).0);
            (by_hash, slots.page(cluster).0)
        };
        for (number, region) in regions.into_iter().enumerate() {
            let cluster = split(region).1 << 6;
            let by_number = if number == 2 { Word::NOTHING } else { word(region) };
            assert_eq!(found(&slots, cluster), (Some(word(region).0), by_number.0));
            assert_eq!(found(&slots, cluster + MANY as u64), (Some(0), 0), "not of its clusters");
        }
        for region in regions {
            let branch = slots.cut(region);
            // SAFETY: cut off, and nobody's.
            drop(unsafe { Box::from_raw(branch.to::<Branch>()) });
            assert_eq!(found(&slots, split(region).1 << 6), (None, 0));
        }
    }
}
