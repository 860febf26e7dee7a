use crate::dma::{Access, BusAddr, Fault, FaultReason, Gpa, Lock, Locked, Permission};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::fmt;
use core::hint;

/// What an IOMMU maps in: no mapping starts, ends or lands within a page.
pub(crate) const PAGE: u64 = 4096;

/// How many faults are remembered: the latest ones. A device that faults without end costs no memory.
const FAULTS_KEPT: usize = 64;

/// One device's address space. Any number of threads may use it.
pub struct Domain {
    window: Window,
    state: Lock<State>,
    watcher: Option<Box<dyn Invalidate>>,
}

/// Whoever keeps copies of a domain's mappings: a front-end whose back-end has an IOTLB.
pub trait Invalidate: Send + Sync {
    /// Forget `len` bytes from `addr`. Returns when no copy is used any more.
    ///
    /// At this time [`Domain::lookup`] does not find the mapping any more, and its addresses are not handed out again
    /// before this returns. No lock is held: looking up and mapping from here or from other threads is fine. Who
    /// answers look-ups from another thread holds a lock of its own from the look-up until the answer is on its way,
    /// and takes the same lock here; else an old answer could overtake the invalidation.
    fn invalidate(&self, addr: BusAddr, len: u64);

    /// The same for several ranges, each its first address and how many bytes. Whoever can say it all before he waits
    /// does.
    fn invalidate_all(&self, ranges: &[(BusAddr, u64)]) {
        ranges.iter().for_each(|&(addr, len)| self.invalidate(addr, len));
    }
}

/// The bus addresses that a domain hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    first: u64,
    last: u64,
}

impl Window {
    /// The upper half of the 64-bit space, from an address with bits in all parts of it.
    pub const HIGH: Window = Window { first: 0x8000_5a5a_f000_0000, last: u64::MAX };

    /// From `first` to `last`, inclusive, in whole pages. An empty window panics.
    pub fn new(first: BusAddr, last: BusAddr) -> Self {
        let whole = first.0.is_multiple_of(PAGE) && last.0 % PAGE == PAGE - 1;
        assert!(whole && first < last, "a window from {first} to {last}");
        Self { first: first.0, last: last.0 }
    }
}

/// A range of bus addresses and where it lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The first address.
    pub addr: BusAddr,
    /// Where that lands.
    pub gpa: Gpa,
    /// How many bytes, in whole pages.
    pub len: u64,
    /// What the device may do there.
    pub permission: Permission,
}

/// What was stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// How many accesses, since the domain exists.
    pub total: u64,
    /// The latest of them, oldest first; 64 at most.
    pub latest: Vec<Fault>,
}

/// Why a mapping could not be made or undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// An address or the length is not one of whole pages, or the length is zero.
    Misaligned,
    /// The range, or where it lands, passes the end of the address space.
    Wraps,
    /// Some of the range is mapped already.
    Overlaps {
        /// The mapping that is in the way.
        addr: BusAddr,
    },
    /// No gap of that length is left in the window.
    NoGap {
        /// Bytes wanted.
        len: u64,
    },
    /// There is no such mapping.
    NotMapped {
        /// The first address.
        addr: BusAddr,
    },
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapError::Misaligned => write!(f, "an IOMMU maps whole pages of {PAGE} bytes"),
            MapError::Wraps => write!(f, "the range passes the end of the address space"),
            MapError::Overlaps { addr } => write!(f, "the range overlaps the mapping at {addr}"),
            MapError::NoGap { len } => write!(f, "no gap of {len} bytes is left"),
            MapError::NotMapped { addr } => write!(f, "no mapping of that length at {addr}"),
        }
    }
}

impl core::error::Error for MapError {}

impl Default for Domain {
    fn default() -> Self {
        Self::new(Window::HIGH)
    }
}

impl Domain {
    /// A domain in which nothing is mapped.
    pub fn new(window: Window) -> Self {
        Self { window, state: Lock::new(State::new(window)), watcher: None }
    }

    /// The same, with somebody to tell of each mapping that goes away.
    pub fn watched(window: Window, watcher: impl Invalidate + 'static) -> Self {
        Self { watcher: Some(Box::new(watcher)), ..Self::new(window) }
    }

    /// Maps `len` bytes from `gpa`, at a bus address that is free and never equals `gpa`.
    ///
    /// Fresh addresses come first, and a page stays free behind each mapping while there is room: who uses an address
    /// for too long, or runs past the end of a buffer, faults.
    ///
    /// # Errors
    /// All of [`MapError`] but [`MapError::Overlaps`] and [`MapError::NotMapped`].
    pub fn map(&self, gpa: Gpa, len: u64, permission: Permission) -> Result<BusAddr, MapError> {
        check_whole(gpa, len)?;
        let mut state = self.state.lock();
        let first = state.gap(self.window, len, gpa).ok_or(MapError::NoGap { len })?;
        state.mappings.insert(first, Entry { last: first + (len - 1), gpa: gpa.0, permission, life: Life::Live });
        state.cursor = first.saturating_add(len).saturating_add(PAGE);
        Ok(BusAddr(first))
    }

    /// Maps `mapping`, inside the window or not.
    ///
    /// # Errors
    /// All of [`MapError`] but [`MapError::NoGap`] and [`MapError::NotMapped`].
    pub fn map_at(&self, mapping: Mapping) -> Result<(), MapError> {
        let Mapping { addr, gpa, len, permission } = mapping;
        check_whole(gpa, len)?;
        if !addr.0.is_multiple_of(PAGE) {
            return Err(MapError::Misaligned);
        }
        let last = addr.last(len).ok_or(MapError::Wraps)?.0;
        let mut state = self.state.lock();
        if let Some((&first, entry)) = state.mappings.range(..=last).next_back()
            && entry.last >= addr.0
        {
            return Err(MapError::Overlaps { addr: BusAddr(first) });
        }
        state.mappings.insert(addr.0, Entry { last, gpa: gpa.0, permission, life: Life::Live });
        Ok(())
    }

    /// Takes away the mapping of `len` bytes at `addr`: exactly one, as it was made.
    ///
    /// Returns when nobody can use it any more: the watcher has been told and has answered, every visit that may have
    /// seen the mapping is over, every lease over it has been dropped. Called from within a visit it would wait for
    /// ever.
    ///
    /// # Errors
    /// [`MapError::NotMapped`].
    pub fn unmap(&self, addr: BusAddr, len: u64) -> Result<(), MapError> {
        self.unmap_all(&[(addr, len)])
    }

    /// Takes several mappings away, with one wait for all of them. See [`Domain::unmap`].
    ///
    /// # Errors
    /// [`MapError::NotMapped`] for the first that is none; nothing was taken away then.
    pub fn unmap_all(&self, ranges: &[(BusAddr, u64)]) -> Result<(), MapError> {
        let before = {
            let mut state = self.state.lock();
            for (at, &(addr, len)) in ranges.iter().enumerate() {
                let entry = state.mappings.get_mut(&addr.0);
                match entry.filter(|entry| addr.last(len) == Some(BusAddr(entry.last)) && entry.life == Life::Live) {
                    Some(entry) => entry.life = Life::Dying,
                    None => {
                        for (addr, _) in &ranges[..at] {
                            state.mappings.get_mut(&addr.0).expect("found above").life = Life::Live;
                        }
                        return Err(MapError::NotMapped { addr });
                    }
                }
            }
            state.next_visit
        };
        // From here on nobody finds the mappings, and nobody else gets their addresses.
        if let Some(watcher) = &self.watcher {
            watcher.invalidate_all(ranges);
        }
        let used = |state: &State, &(addr, len): &(BusAddr, u64)| state.is_used(addr.0, addr.0 + (len - 1), before);
        let mut state = self.wait_until(|state| !ranges.iter().any(|range| used(state, range)));
        for (addr, _) in ranges {
            state.mappings.remove(&addr.0);
        }
        state.unmapped += ranges.len() as u64;
        Ok(())
    }

    /// The mapping that `addr` is in. Counts nothing and records no fault: for who answers a device's IOTLB.
    pub fn lookup(&self, addr: BusAddr) -> Option<Mapping> {
        self.state.lock().find(addr.0)
    }

    /// Records that an access was stopped.
    pub fn report(&self, fault: Fault) {
        let mut state = self.state.lock();
        state.fault_total += 1;
        if state.faults.len() == FAULTS_KEPT {
            state.faults.pop_front();
        }
        state.faults.push_back(fault);
    }

    /// What was stopped so far.
    pub fn faults(&self) -> Faults {
        let state = self.state.lock();
        Faults { total: state.fault_total, latest: state.faults.iter().copied().collect() }
    }

    /// How many mappings there are: 0 again when a driver has forgotten none.
    pub fn mapped(&self) -> usize {
        self.state.lock().mappings.len()
    }

    /// How many mappings have been taken away so far.
    pub fn unmapped(&self) -> u64 {
        self.state.lock().unmapped
    }

    /// How many accesses have been translated so far.
    pub fn translated(&self) -> u64 {
        self.state.lock().translated
    }

    /// Where `addr` lands, and how many bytes lie in one piece from there. Records a fault where it must not.
    pub(crate) fn translate(&self, addr: BusAddr, access: Access) -> Result<(Gpa, u64), Fault> {
        let stopped = |reason| Fault { addr, access, reason };
        let found = {
            let mut state = self.state.lock();
            match state.find(addr.0) {
                None => Err(stopped(FaultReason::Unmapped)),
                Some(mapping) if !mapping.permission.allows(access) => Err(stopped(FaultReason::Forbidden)),
                Some(mapping) => {
                    state.translated += 1;
                    let offset = addr.0 - mapping.addr.0;
                    Ok((Gpa(mapping.gpa.0 + offset), mapping.len - offset))
                }
            }
        };
        found.inspect_err(|&fault| self.report(fault))
    }

    /// Begins a visit: mappings that it finds are good until it has ended.
    pub(crate) fn enter(&self) -> u64 {
        let mut state = self.state.lock();
        let visit = state.next_visit;
        state.next_visit += 1;
        state.visits.push(visit);
        visit
    }

    pub(crate) fn leave(&self, visit: u64) {
        self.state.lock().visits.retain(|&open| open != visit);
    }

    /// Keeps what the open visit `holder` has found good until [`release`](Self::release).
    pub(crate) fn hold(&self, holder: u64, ranges: &[(BusAddr, u32)]) {
        let mut state = self.state.lock();
        for &(addr, len) in ranges.iter().filter(|&&(_, len)| len != 0) {
            let last = addr.0.saturating_add(u64::from(len) - 1);
            state.leased.push(Leased { first: addr.0, last, holder });
        }
    }

    pub(crate) fn release(&self, holder: u64) {
        self.state.lock().leased.retain(|leased| leased.holder != holder);
    }

    /// A number for a lease.
    pub(crate) fn holder(&self) -> u64 {
        let mut state = self.state.lock();
        state.next_holder += 1;
        state.next_holder
    }

    fn wait_until(&self, holds: impl Fn(&State) -> bool) -> Locked<'_, State> {
        loop {
            let state = self.state.lock();
            if holds(&state) {
                return state;
            }
            drop(state);
            hint::spin_loop();
        }
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain").field("window", &self.window).field("mapped", &self.mapped()).finish_non_exhaustive()
    }
}

fn check_whole(gpa: Gpa, len: u64) -> Result<(), MapError> {
    if len == 0 || !len.is_multiple_of(PAGE) || !gpa.0.is_multiple_of(PAGE) {
        return Err(MapError::Misaligned);
    }
    gpa.last(len).map(drop).ok_or(MapError::Wraps)
}

struct State {
    /// By first address; no two overlap.
    mappings: BTreeMap<u64, Entry>,
    /// Where the search for a gap starts.
    cursor: u64,
    /// Visits under way, by number; a visit with a higher number began later.
    visits: Vec<u64>,
    next_visit: u64,
    leased: Vec<Leased>,
    next_holder: u64,
    faults: VecDeque<Fault>,
    fault_total: u64,
    translated: u64,
    unmapped: u64,
}

#[derive(Clone, Copy)]
struct Entry {
    last: u64,
    gpa: u64,
    permission: Permission,
    life: Life,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Live,
    /// Being taken away: found by nobody, its addresses not free yet.
    Dying,
}

struct Leased {
    first: u64,
    last: u64,
    holder: u64,
}

impl State {
    fn new(window: Window) -> Self {
        Self {
            mappings: BTreeMap::new(),
            cursor: window.first,
            visits: Vec::new(),
            next_visit: 0,
            leased: Vec::new(),
            next_holder: 0,
            faults: VecDeque::with_capacity(FAULTS_KEPT),
            fault_total: 0,
            translated: 0,
            unmapped: 0,
        }
    }

    fn find(&self, addr: u64) -> Option<Mapping> {
        let (&first, entry) = self.mappings.range(..=addr).next_back()?;
        (entry.last >= addr && entry.life == Life::Live).then(|| Mapping {
            addr: BusAddr(first),
            gpa: Gpa(entry.gpa),
            len: entry.last - first + 1,
            permission: entry.permission,
        })
    }

    /// Whether somebody may still touch what `first..=last` was: a visit that began before number `before`, or a lease.
    fn is_used(&self, first: u64, last: u64, before: u64) -> bool {
        self.visits.iter().any(|&visit| visit < before)
            || self.leased.iter().any(|leased| leased.first <= last && first <= leased.last)
    }

    /// The first gap of `len` bytes behind the cursor, else anywhere in the window.
    fn gap(&self, window: Window, len: u64, gpa: Gpa) -> Option<u64> {
        self.gap_from(self.cursor, window.last, len, gpa).or_else(|| self.gap_from(window.first, window.last, len, gpa))
    }

    fn gap_from(&self, from: u64, last: u64, len: u64, gpa: Gpa) -> Option<u64> {
        let mut at = match self.mappings.range(..from).next_back() {
            Some((_, entry)) if entry.last >= from => entry.last.checked_add(1)?,
            _ => from,
        };
        if !at.is_multiple_of(PAGE) {
            return None; // a cursor that ran into the end of the space
        }
        let mut taken = self.mappings.range(from..);
        loop {
            if at == gpa.0 {
                at = at.checked_add(PAGE)?;
            }
            let next = taken.next();
            // The last address of the gap that starts at `at`; none if a mapping starts right there.
            let gap_last = match next {
                Some((&first, _)) => first.checked_sub(1).map(|end| end.min(last)),
                None => Some(last),
            };
            if gap_last.is_some_and(|gap_last| gap_last >= at && gap_last - at >= len - 1) {
                return Some(at);
            }
            at = at.max(next?.1.last.checked_add(1)?);
            if at > last {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Permission::{ReadOnly, ReadWrite, WriteOnly};
    use alloc::sync::Arc;
    extern crate std;

    fn small(pages: u64) -> Window {
        Window::new(BusAddr(0x10_0000), BusAddr(0x10_0000 + pages * PAGE - 1))
    }

    #[test]
    fn an_address_translates_within_its_mapping_and_nowhere_else() {
        let domain = Domain::default();
        let addr = domain.map(Gpa(0x3000), 2 * PAGE, ReadWrite).unwrap();
        let at = |offset: i64| domain.translate(BusAddr(addr.0.wrapping_add_signed(offset)), Access::Read);
        assert_eq!(at(0), Ok((Gpa(0x3000), 2 * PAGE)));
        assert_eq!(at(0x1234), Ok((Gpa(0x4234), 0xdcc)));
        assert_eq!(at(0x1fff), Ok((Gpa(0x4fff), 1)));
        for outside in [-1, 0x2000] {
            assert_eq!(at(outside).unwrap_err().reason, FaultReason::Unmapped);
        }
        assert_eq!(domain.translate(BusAddr(0x3000), Access::Read).unwrap_err().reason, FaultReason::Unmapped);
        assert_eq!((domain.translated(), domain.faults().total), (3, 3));
    }

    #[test]
    fn permissions_hold() {
        for permission in [ReadOnly, WriteOnly, ReadWrite] {
            let domain = Domain::default();
            let addr = domain.map(Gpa(0), PAGE, permission).unwrap();
            for access in [Access::Read, Access::Write] {
                let expected = Fault { addr, access, reason: FaultReason::Forbidden };
                match domain.translate(addr, access) {
                    Ok(_) => assert!(permission.allows(access)),
                    Err(fault) => assert!(!permission.allows(access) && fault == expected),
                }
            }
        }
    }

    #[test]
    fn bus_addresses_are_fresh_apart_and_never_physical() {
        let domain = Domain::default();
        let first = domain.map(Gpa(0), PAGE, ReadOnly).unwrap();
        domain.unmap(first, PAGE).unwrap();
        let second = domain.map(Gpa(0), PAGE, ReadOnly).unwrap();
        let third = domain.map(Gpa(PAGE), PAGE, ReadOnly).unwrap();
        assert!(first.0 > u64::MAX / 2 && second > first && third.0 - second.0 > PAGE, "{first} {second} {third}");

        let domain = Domain::new(small(4));
        assert_ne!(domain.map(Gpa(0x10_0000), PAGE, ReadOnly), Ok(BusAddr(0x10_0000)));
    }

    #[test]
    fn a_small_window_is_used_to_the_last_page_again_and_again() {
        let domain = Domain::new(small(8));
        for turn in 0..100 {
            let mut held: Vec<_> = (0..8).map(|_| domain.map(Gpa(0), PAGE, ReadOnly).unwrap()).collect();
            assert_eq!(domain.map(Gpa(0), PAGE, ReadOnly), Err(MapError::NoGap { len: PAGE }));
            held.sort();
            held.dedup();
            assert_eq!(held.len(), 8);
            held.rotate_left(turn % 8);
            held.into_iter().for_each(|addr| domain.unmap(addr, PAGE).unwrap());
            assert_eq!(domain.map(Gpa(0), 9 * PAGE, ReadOnly), Err(MapError::NoGap { len: 9 * PAGE }));
            let all = domain.map(Gpa(0), 8 * PAGE, ReadOnly).unwrap();
            domain.unmap(all, 8 * PAGE).unwrap();
        }
        assert_eq!(domain.mapped(), 0);
    }

    #[test]
    fn the_last_page_of_the_space_is_one_like_any_other() {
        let top = BusAddr(u64::MAX - (PAGE - 1));
        let domain = Domain::new(Window::new(top, BusAddr(u64::MAX)));
        for _ in 0..3 {
            assert_eq!(domain.map(Gpa(0), PAGE, ReadOnly), Ok(top));
            assert_eq!(domain.map(Gpa(0), PAGE, ReadOnly), Err(MapError::NoGap { len: PAGE }));
            assert_eq!(domain.translate(BusAddr(u64::MAX), Access::Read), Ok((Gpa(PAGE - 1), 1)));
            domain.unmap(top, PAGE).unwrap();
        }
    }

    #[test]
    fn nonsense_is_turned_down() {
        let domain = Domain::default();
        let mapping = |addr, gpa, len| Mapping { addr: BusAddr(addr), gpa: Gpa(gpa), len, permission: ReadOnly };
        assert_eq!(domain.map_at(mapping(0x2000, 0, 2 * PAGE)), Ok(()));
        for (addr, gpa, len, error) in [
            (0x8000, 0, 0, MapError::Misaligned),
            (0x8000, 1, PAGE, MapError::Misaligned),
            (0x8001, 0, PAGE, MapError::Misaligned),
            (0x8000, 0, PAGE + 1, MapError::Misaligned),
            (0_u64.wrapping_sub(PAGE), 0, 2 * PAGE, MapError::Wraps),
            (0x8000, 0_u64.wrapping_sub(PAGE), 2 * PAGE, MapError::Wraps),
            (0x1000, 0, 2 * PAGE, MapError::Overlaps { addr: BusAddr(0x2000) }),
            (0x3000, 0, PAGE, MapError::Overlaps { addr: BusAddr(0x2000) }),
            (0, 0, 16 * PAGE, MapError::Overlaps { addr: BusAddr(0x2000) }),
        ] {
            assert_eq!(domain.map_at(mapping(addr, gpa, len)), Err(error), "{addr:#x} {gpa:#x} {len:#x}");
        }
        for (addr, len) in [(0x2000, PAGE), (0x3000, PAGE), (0x2000, 0), (0x9000, PAGE)] {
            assert_eq!(domain.unmap(BusAddr(addr), len), Err(MapError::NotMapped { addr: BusAddr(addr) }));
        }
        assert_eq!(domain.unmap(BusAddr(0x2000), 2 * PAGE), Ok(()));
    }

    #[test]
    fn faults_without_end_cost_no_memory() {
        let domain = Domain::default();
        for addr in 0..1000 {
            domain.translate(BusAddr(addr), Access::Write).unwrap_err();
        }
        let faults = domain.faults();
        assert_eq!((faults.total, faults.latest.len(), faults.latest[63].addr), (1000, 64, BusAddr(999)));
    }

    /// Looks at the domain from within its own invalidation.
    #[derive(Default)]
    struct Watcher {
        domain: Lock<Option<Arc<Domain>>>,
        seen: Lock<Vec<(BusAddr, u64)>>,
    }

    impl Invalidate for Arc<Watcher> {
        fn invalidate(&self, addr: BusAddr, len: u64) {
            let domain = self.domain.lock().take().unwrap();
            assert_eq!(domain.lookup(addr), None, "nobody may be told of it any more");
            assert_eq!(domain.map(Gpa(0), PAGE, ReadOnly), Err(MapError::NoGap { len: PAGE }), "nor get its address");
            assert!(domain.unmap(addr, len).is_err(), "nor undo it a second time");
            self.seen.lock().push((addr, len));
            *self.domain.lock() = Some(domain);
        }
    }

    #[test]
    fn the_watcher_hears_of_each_mapping_before_its_addresses_are_free() {
        let watcher = Arc::new(Watcher::default());
        let domain = Arc::new(Domain::watched(small(1), watcher.clone()));
        *watcher.domain.lock() = Some(domain.clone());
        let addr = domain.map(Gpa(0), PAGE, ReadOnly).unwrap();
        domain.unmap(addr, PAGE).unwrap();
        assert_eq!(*watcher.seen.lock(), [(addr, PAGE)]);
        assert_eq!(domain.map(Gpa(0), PAGE, ReadOnly), Ok(addr));
        watcher.domain.lock().take();
    }

    #[test]
    fn several_go_at_once_or_none() {
        let domain = Domain::default();
        let [a, b, c] = [0, 1, 2].map(|page| domain.map(Gpa(page * PAGE), PAGE, ReadOnly).unwrap());
        let elsewhere = BusAddr(a.0 + (1 << 20));
        for (wrong, at) in [
            ([(a, PAGE), (b, PAGE), (elsewhere, PAGE)], elsewhere),
            ([(a, PAGE), (b, 2 * PAGE), (c, PAGE)], b),
            ([(a, PAGE), (b, PAGE), (a, PAGE)], a),
            ([(a, PAGE), (b, 0), (c, PAGE)], b),
        ] {
            assert_eq!(domain.unmap_all(&wrong), Err(MapError::NotMapped { addr: at }), "{wrong:?}");
            assert!([a, b, c].iter().all(|&addr| domain.lookup(addr).is_some()), "{wrong:?}");
        }
        assert_eq!(domain.unmap_all(&[(c, PAGE), (a, PAGE)]), Ok(()));
        assert_eq!((domain.mapped(), domain.unmapped()), (1, 2));
        assert!(domain.lookup(b).is_some());
    }

    #[test]
    fn unmap_waits_for_visits_that_began_before_and_for_leases() {
        let domain = Domain::default();
        let addr = domain.map(Gpa(0), PAGE, ReadOnly).unwrap();
        let visit = domain.enter();
        std::thread::scope(|scope| {
            let unmapper = scope.spawn(|| domain.unmap(addr, PAGE).unwrap());
            let gone = (0..1_000_000).any(|_| {
                std::thread::yield_now();
                domain.lookup(addr).is_none()
            });
            if !gone {
                domain.leave(visit);
                panic!("found while it is being taken away");
            }
            let later = domain.enter();
            let holder = domain.holder();
            domain.hold(holder, &[(BusAddr(addr.0 + 100), 1)]);
            let still_waits = || {
                for _ in 0..100 {
                    std::thread::yield_now();
                    assert!(!unmapper.is_finished());
                }
            };
            still_waits();
            domain.leave(visit);
            still_waits();
            domain.release(holder);
            // `later` began when the mapping was gone already: it is not waited for.
            while !unmapper.is_finished() {
                std::thread::yield_now();
            }
            domain.leave(later);
        });
    }
}
