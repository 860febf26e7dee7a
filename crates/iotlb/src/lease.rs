use crate::sync::{AtomicPtr, AtomicU64, AtomicUsize, fence};
use crate::view::Seat;
use ringfence_dma::BusAddr;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// How many leases one view may have at once: twice the longest queue. One more is our own leak, and panics.
pub const LEASES: usize = CHUNK * CHUNKS;

const CHUNK: usize = if cfg!(loom) { 1 } else { 64 };
const CHUNKS: usize = if cfg!(loom) { 2 } else { 1024 };
/// More ranges than this are widened, so that a fence waits for a little more than it must.
const RANGES: usize = if cfg!(loom) { 1 } else { 7 };

/// Keeps translations good until it is dropped, by whichever thread, and even after its view is gone: whoever takes
/// one of them away waits for it.
///
/// For a device that has memory worked on while no visit is open: by hardware, or by a kernel that can be relied on to let go
/// of it. Each request under a lease can hold up whoever invalidates, so a device whose storage may hang takes none, and
/// translates anew when its bytes have come.
#[derive(Debug)]
#[must_use = "what it keeps good is good only until it is dropped"]
pub struct Lease {
    held: Option<(Arc<Seat>, usize)>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((seat, at)) = &self.held {
            seat.holds.release(*at);
        }
    }
}

impl Lease {
    /// Publishes `ranges`. Called by the view's own thread, in a visit.
    pub(crate) fn publish(seat: &Arc<Seat>, free: &mut Vec<usize>, ranges: &[(BusAddr, u32)]) -> Lease {
        let mut covered = Cover::default();
        for &(addr, len) in ranges {
            if let Some(more) = len.checked_sub(1) {
                covered.add(addr.0, addr.0.saturating_add(more.into()));
            }
        }
        if covered.len == 0 {
            return Lease { held: None };
        }
        let at = seat.holds.take(free);
        seat.holds.publish(at, covered.ranges());
        Lease { held: Some((Arc::clone(seat), at)) }
    }
}

/// A few ranges that cover what was added.
#[derive(Default)]
struct Cover {
    ranges: [(u64, u64); RANGES],
    len: usize,
}

impl Cover {
    fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges[..self.len]
    }

    fn add(&mut self, first: u64, last: u64) {
        let near = |&(low, high): &(u64, u64)| first <= high.saturating_add(1) && low <= last.saturating_add(1);
        let grown = |&(low, high): &(u64, u64)| (last.max(high) - first.min(low)) - (high - low);
        // A request's buffers mostly follow each other: the last range first.
        let ranges = &mut self.ranges[..self.len];
        let widen = match ranges.iter_mut().rev().find(|range| near(range)) {
            None if self.len == RANGES => ranges.iter_mut().min_by_key(|range| grown(range)),
            neighbour => neighbour,
        };
        match widen {
            Some((low, high)) => (*low, *high) = (first.min(*low), last.max(*high)),
            None => {
                self.ranges[self.len] = (first, last);
                self.len += 1;
            }
        }
    }
}

/// The leases of one view: slots that the view's thread takes, anybody gives back, and fences look at.
pub(crate) struct Holds {
    chunks: Box<[AtomicPtr<Chunk>]>,
    /// How many slots were ever offered.
    offered: AtomicUsize,
}

struct Chunk {
    /// Odd: in use. Counts up, so that a fence which waits for one lease does not wait for the next in its place.
    states: [AtomicU64; CHUNK],
    ranges: [Ranges; CHUNK],
}

struct Ranges {
    len: AtomicUsize,
    ranges: [(AtomicU64, AtomicU64); RANGES],
}

impl Holds {
    pub(crate) fn new() -> Holds {
        Holds { chunks: (0..CHUNKS).map(|_| AtomicPtr::new(null_mut())).collect(), offered: AtomicUsize::new(0) }
    }

    fn chunk(&self, at: usize) -> &Chunk {
        // Acquire: `grow` filled the chunk before it linked it.
        let chunk = self.chunks[at / CHUNK].load(Acquire);
        assert!(!chunk.is_null(), "slot {at} was never offered");
        // SAFETY: from `Box::into_raw` in `grow`; freed when `self` is dropped.
        unsafe { &*chunk }
    }

    fn state(&self, at: usize) -> &AtomicU64 {
        &self.chunk(at).states[at % CHUNK]
    }

    /// A slot that is not in use. The view's own thread keeps `free`.
    fn take(&self, free: &mut Vec<usize>) -> usize {
        if let Some(at) = free.pop() {
            return at;
        }
        let offered = self.offered.load(Relaxed);
        // Acquire, in pair with `release`: the fence in `publish` says what for. The lowest on top, so that slots in
        // use stay few and together.
        free.extend((0..offered).rev().filter(|&at| self.state(at).load(Acquire).is_multiple_of(2)));
        // With at least half of the slots found free, a search costs two looks a lease.
        if free.len() * 2 <= offered && offered < LEASES {
            self.grow(offered);
            free.extend((offered..offered + CHUNK).rev());
        }
        free.pop().unwrap_or_else(|| panic!("{LEASES} leases of one view at once"))
    }

    fn grow(&self, offered: usize) {
        let chunk = Box::new(Chunk {
            states: std::array::from_fn(|_| AtomicU64::new(0)),
            ranges: std::array::from_fn(|_| Ranges {
                len: AtomicUsize::new(0),
                ranges: std::array::from_fn(|_| (AtomicU64::new(0), AtomicU64::new(0))),
            }),
        });
        self.chunks[offered / CHUNK].store(Box::into_raw(chunk), Release);
        self.offered.store(offered + CHUNK, Release);
    }

    fn publish(&self, at: usize, ranges: &[(u64, u64)]) {
        let chunk = self.chunk(at);
        let (state, slot) = (&chunk.states[at % CHUNK], &chunk.ranges[at % CHUNK]);
        // Orders `take`'s look at the even state before the ranges' stores: a fence that reads one of these ranges
        // and then the state again finds that the lease which it looked at is over.
        fence(Release);
        slot.len.store(ranges.len(), Relaxed);
        for ((low, high), &(first, last)) in slot.ranges.iter().zip(ranges) {
            low.store(first, Relaxed);
            high.store(last, Relaxed);
        }
        // Release: who sees the odd state sees the ranges.
        state.store(state.load(Relaxed) + 1, Release);
    }

    fn release(&self, at: usize) {
        let state = self.state(at);
        // Release: what was done under the lease comes before a fence that sees it over.
        state.store(state.load(Relaxed) + 1, Release);
    }

    /// The leases that overlap `first..=last`, for [`Holds::is_held`].
    pub(crate) fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = Held> + '_ {
        (0..self.offered.load(Acquire)).filter_map(move |at| {
            let held = Held { at, state: self.state(at).load(Acquire) };
            if held.state.is_multiple_of(2) {
                return None;
            }
            let slot = &self.chunk(at).ranges[at % CHUNK];
            let len = slot.len.load(Relaxed).min(RANGES);
            let overlaps =
                slot.ranges[..len].iter().any(|(low, high)| low.load(Relaxed) <= last && first <= high.load(Relaxed));
            // Orders the loads of the ranges before the second look at the state, in pair with the fence in `publish`.
            fence(Acquire);
            // A lease that ended meanwhile needs no waiting for. If the ranges were another's, that one began in a
            // visit which came after the removal: the visits before were over when this was called.
            (overlaps && self.is_held(held)).then_some(held)
        })
    }

    /// Whether a lease is still held.
    pub(crate) fn is_held(&self, held: Held) -> bool {
        // Acquire: see `release`.
        self.state(held.at).load(Acquire) == held.state
    }

    /// Whether no lease is held at all.
    pub(crate) fn is_empty(&self) -> bool {
        (0..self.offered.load(Acquire)).all(|at| self.state(at).load(Acquire).is_multiple_of(2))
    }
}

/// One lease as a fence found it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    at: usize,
    state: u64,
}

impl Drop for Holds {
    fn drop(&mut self) {
        for chunk in &self.chunks {
            let chunk = chunk.load(Acquire);
            if !chunk.is_null() {
                // SAFETY: from `Box::into_raw` in `grow`, linked once.
                drop(unsafe { Box::from_raw(chunk) });
            }
        }
    }
}

impl std::fmt::Debug for Holds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Holds").field("offered", &self.offered.load(Relaxed)).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn cover(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut cover = Cover::default();
        for &(first, last) in ranges {
            cover.add(first, last);
        }
        cover.ranges().to_vec()
    }

    #[test]
    fn neighbours_become_one_range() {
        assert_eq!(cover(&[(0x1000, 0x1fff), (0x2000, 0x2fff), (0x800, 0xfff)]), [(0x800, 0x2fff)]);
        assert_eq!(cover(&[(0, 0), (2, 2)]), [(0, 0), (2, 2)]);
        assert_eq!(cover(&[(u64::MAX, u64::MAX), (0, 0)]), [(u64::MAX, u64::MAX), (0, 0)]);
    }

    #[test]
    fn too_many_ranges_are_widened_where_it_costs_least() {
        let far: Vec<_> = (0..7).map(|i| (i << 20, (i << 20) + 9)).collect();
        let mut more = far.clone();
        more.push(((3 << 20) + 100, (3 << 20) + 109));
        let mut expected = far;
        expected[3].1 = (3 << 20) + 109;
        assert_eq!(cover(&more), expected);
    }

    #[test]
    fn slots_are_found_again_and_grow_to_twice_what_is_used() {
        let holds = Holds::new();
        let mut free = Vec::new();
        let taken: Vec<_> =
            (0..200).map(|_| holds.take(&mut free)).inspect(|&at| holds.publish(at, &[(0, 0)])).collect();
        assert_eq!(taken.iter().collect::<std::collections::BTreeSet<_>>().len(), 200);
        assert_eq!(holds.overlapping(0, 0).count(), 200);
        taken.iter().for_each(|&at| holds.release(at));
        assert!(holds.is_empty());
        for _ in 0..10_000 {
            let at = holds.take(&mut free);
            holds.publish(at, &[(5, 9)]);
            assert_eq!(holds.overlapping(9, 10).count(), 1);
            assert_eq!(holds.overlapping(10, u64::MAX).count(), 0);
            holds.release(at);
        }
        assert!(holds.offered.load(Relaxed) <= 512, "{}", holds.offered.load(Relaxed));
    }
}
