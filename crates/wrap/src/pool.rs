//! The bounce pool: pages that requests take and give back, queue by queue in the order in which they came.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) const PAGE: usize = 4096;

/// Pages in a row, taken from a [`Pool`] and to be given back to it.
#[derive(Debug)]
#[must_use = "pages that are not given back are lost to the pool"]
pub(crate) struct Extent {
    first: usize,
    pages: usize,
}

impl Extent {
    /// Its offset in the arena, in bytes.
    pub(crate) fn offset(&self) -> usize {
        self.first * PAGE
    }
}

/// Some pages of an arena.
#[derive(Debug)]
pub(crate) struct Pool {
    /// The arena's page that is our first.
    base: usize,
    pages: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// A bit a page, set where it is taken; those behind the last page are set for good.
    taken: Box<[u64]>,
    /// No page before this one is free. Those that were used last are used next: they are in caches, and of a pool no more
    /// is ever touched than was needed at a time.
    low: usize,
    /// The queues that wait for room, oldest first.
    line: VecDeque<u16>,
}

impl Pool {
    pub(crate) fn new(base: usize, pages: usize) -> Self {
        let mut taken = vec![0; pages.div_ceil(64)].into_boxed_slice();
        for page in pages..taken.len() * 64 {
            set(&mut taken, page, 1, true);
        }
        Self { base, pages, inner: Mutex::new(Inner { taken, low: 0, line: VecDeque::new() }) }
    }

    /// How many pages there are, taken or not.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// `pages` in a row for `queue`, and who is next in line; `None` where there are none, or another queue has waited
    /// for longer. The queue then stands in line, until it gets some or [`Pool::leave`]s.
    pub(crate) fn take(&self, queue: u16, pages: usize) -> Option<(Extent, Option<u16>)> {
        let inner = &mut *self.lock();
        let turn = inner.line.front().is_none_or(|&front| front == queue);
        let found = if turn { inner.find(pages) } else { None };
        match found {
            Some(first) => {
                inner.line.pop_front();
                set(&mut inner.taken, first, pages, true);
                if first == inner.low {
                    inner.low += pages;
                }
                Some((Extent { first: self.base + first, pages }, inner.line.front().copied()))
            }
            None => {
                if !inner.line.contains(&queue) {
                    inner.line.push_back(queue);
                }
                None
            }
        }
    }

    /// Takes `extent` back; the queue that has waited for longest, if one has.
    pub(crate) fn give(&self, extent: Extent) -> Option<u16> {
        let inner = &mut *self.lock();
        let first = extent.first.checked_sub(self.base).expect("an extent of this pool");
        set(&mut inner.taken, first, extent.pages, false);
        inner.low = inner.low.min(first);
        inner.line.front().copied()
    }

    /// `queue` waits no longer; who has waited for longest now.
    pub(crate) fn leave(&self, queue: u16) -> Option<u16> {
        let inner = &mut *self.lock();
        inner.line.retain(|&waiting| waiting != queue);
        inner.line.front().copied()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics half-way.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The first of `pages` free ones in a row.
    fn find(&self, pages: usize) -> Option<usize> {
        let to = self.taken.len() * 64;
        let (mut at, mut free) = (self.low, 0);
        while at < to {
            let word = self.taken[at / 64] >> (at % 64);
            // As many alike as this word tells, at least one.
            let left = (64 - at % 64).min(to - at);
            if word & 1 == 1 {
                free = 0;
                at += (word.trailing_ones() as usize).min(left);
            } else {
                let here = (word.trailing_zeros() as usize).min(left);
                free += here;
                at += here;
                if free >= pages {
                    return Some(at - free);
                }
            }
        }
        None
    }
}

fn set(bits: &mut [u64], first: usize, count: usize, taken: bool) {
    let mut at = first;
    while at < first + count {
        let here = (64 - at % 64).min(first + count - at);
        let mask = (u64::MAX >> (64 - here)) << (at % 64);
        assert!(
            taken == (bits[at / 64] & mask == 0) || !taken && bits[at / 64] & mask == mask,
            "pages {first}+{count}"
        );
        if taken {
            bits[at / 64] |= mask
        } else {
            bits[at / 64] &= !mask
        }
        at += here;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_never_overlaps_and_comes_back() {
        let pool = Pool::new(10, 200);
        let mut held: VecDeque<Extent> = VecDeque::new();
        let mut owner = [false; 210];
        let mut random = 1u32;
        for _ in 0..10_000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let pages = 1 + (random >> 16) as usize % 70;
            match pool.take(0, pages) {
                Some((extent, _)) => {
                    assert!(extent.first >= 10);
                    let pages = &mut owner[extent.first..extent.first + extent.pages];
                    assert!(pages.iter().all(|owned| !owned), "{extent:?} twice");
                    pages.fill(true);
                    held.push_back(extent);
                }
                None => {
                    let back = held.pop_front().expect("an empty pool has room for 70");
                    owner[back.first..back.first + back.pages].fill(false);
                    assert_eq!(pool.give(back), Some(0));
                }
            }
        }
        while let Some(back) = held.pop_front() {
            let _ = pool.give(back);
        }
        let (all, _) = pool.take(0, 200).expect("all came back");
        assert_eq!(all.offset(), 10 * PAGE);
        assert!(pool.take(0, 1).is_none());
        let _ = pool.give(all);
        assert!(pool.take(0, 201).is_none());
    }

    #[test]
    fn queues_get_room_in_the_order_in_which_they_asked() {
        let pool = Pool::new(0, 8);
        let (first, next) = pool.take(0, 6).unwrap();
        assert_eq!(next, None);
        assert!(pool.take(1, 4).is_none(), "too little is left");
        assert!(pool.take(2, 1).is_none(), "queue 1 came before");
        assert!(pool.take(0, 1).is_none());
        assert_eq!(pool.give(first), Some(1));
        let (second, next) = pool.take(1, 4).unwrap();
        assert_eq!(next, Some(2));
        let (third, next) = pool.take(2, 1).unwrap();
        assert_eq!(next, Some(0));
        assert_eq!(pool.leave(0), None, "it was the last in line");
        assert_eq!(pool.give(third), None);
        assert_eq!(pool.give(second), None);
    }
}
