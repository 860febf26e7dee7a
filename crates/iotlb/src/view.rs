use crate::iotlb::{Iotlb, Wake};
use crate::lease::{Holds, Lease};
use crate::questions::{Handle, Verdict};
use crate::sync::{AtomicBool, AtomicU64, fence, lock};
use crate::table::Translation;
use crate::word::{READ, WRITE, Word, rights};
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Memory, Miss, Stop, Ticket};
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::Instant;

/// One queue's view of memory: used by one thread, and handed to it. See [`Iotlb::view`].
///
/// Dropping it takes it off the [`Iotlb`]; leases that it gave out stay good, and fences still wait for them.
pub struct View {
    iotlb: Arc<Iotlb>,
    seat: Arc<Seat>,
    /// Of the visit, and of what is remembered: the stamp of what allows nothing.
    generation: Cell<u64>,
    /// The last that was found of more than a page: hits as long as all accesses lie in one large mapping.
    latest: Cell<Remembered>,
    /// What was found lately, by page number.
    remembered: Box<[Cell<Remembered>; REMEMBERED]>,
    free_holds: RefCell<Vec<usize>>,
    /// Written down in this visit, to be passed on when it ends.
    written: RefCell<Vec<Handle>>,
    /// To be forgotten when the visit ends.
    released: RefCell<Vec<(BusAddr, u32)>>,
    retry: Cell<Option<Instant>>,
}

const REMEMBERED: usize = if cfg!(loom) { 2 } else { 512 };

/// A translation that was found, and in which generation.
#[derive(Clone, Copy)]
struct Remembered {
    first: u64,
    last: u64,
    host: u64,
    /// Generation, times four, and what is allowed: one comparison tells both. Generations start at 1.
    stamp: u64,
}

const PAGE: u64 = 4096;

fn right(access: Access) -> u64 {
    match access {
        Access::Read => READ,
        Access::Write => WRITE,
    }
}

/// A view as the writer sees it, on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Seat {
    /// Odd during a visit. Never the same number twice.
    pub(crate) epoch: AtomicU64,
    /// The view was dropped.
    left: AtomicBool,
    /// Missed something, and was not told since.
    waits: AtomicBool,
    pub(crate) holds: Holds,
    wake: Waker,
}

struct Waker(Arc<dyn Wake>);

impl std::fmt::Debug for Waker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waker")
    }
}

impl Seat {
    pub(crate) fn new(wake: Arc<dyn Wake>) -> Seat {
        Seat {
            epoch: AtomicU64::new(0),
            left: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            holds: Holds::new(),
            wake: Waker(wake),
        }
    }

    /// The visit that is under way.
    pub(crate) fn visit_under_way(&self) -> Option<u64> {
        // Acquire: of a visit that is over, the leases are seen.
        let epoch = self.epoch.load(Acquire);
        (!epoch.is_multiple_of(2)).then_some(epoch)
    }

    /// Whether that visit still goes on.
    pub(crate) fn is_in_visit(&self, epoch: u64) -> bool {
        // Acquire: as above, and what the visit did to memory is done.
        self.epoch.load(Acquire) == epoch
    }

    /// Whether nothing can come from it any more.
    pub(crate) fn is_deserted(&self) -> bool {
        // Acquire: leases are published before the view is dropped.
        self.left.load(Acquire) && self.holds.is_empty()
    }

    /// Wakes the view's thread if it waits for an answer.
    pub(crate) fn tell(&self) {
        // Set under the questions' lock, which whoever calls this held after the change, or with a fence that is in pair
        // with his: no miss goes unnoticed.
        if self.waits.load(Relaxed) && self.waits.swap(false, Relaxed) {
            self.wake.0.wake();
        }
    }
}

impl View {
    pub(crate) fn new(iotlb: Arc<Iotlb>, seat: Arc<Seat>) -> View {
        let nothing = Remembered { first: 0, last: 0, host: 0, stamp: 0 };
        View {
            iotlb,
            seat,
            generation: Cell::new(0),
            latest: Cell::new(nothing),
            remembered: Box::new(
                [const { Cell::new(Remembered { first: 0, last: 0, host: 0, stamp: 0 }) }; REMEMBERED],
            ),
            free_holds: RefCell::default(),
            written: RefCell::default(),
            released: RefCell::default(),
            retry: Cell::new(None),
        }
    }

    /// When what missed since the last call must be tried again even if nobody calls [`Wake::wake`]: a translation
    /// was promised and may never come. `None`: not before then.
    pub fn take_deadline(&mut self) -> Option<Instant> {
        self.retry.take()
    }

    /// The cache that it is a view of.
    pub fn iotlb(&self) -> &Arc<Iotlb> {
        &self.iotlb
    }

    #[inline]
    fn enter(&self) {
        let epoch = &self.seat.epoch;
        // Odd, and another number than before, even if the last visit was forgotten rather than dropped.
        // Release, as in `leave`: a fence that waits for the last visit may see this number and never the one between.
        epoch.store((epoch.load(Relaxed) + 1) | 1, Release);
        // Orders the store above before the loads of the generation, below, and of the table, in `find`; in pair with
        // the fence in `Iotlb::removed`.
        fence(SeqCst);
        self.generation.set(self.iotlb.generation() << 2);
    }

    #[inline]
    fn leave(&self) {
        let epoch = &self.seat.epoch;
        // Release: what the visit touched and leased comes before a fence that sees it over.
        epoch.store(epoch.load(Relaxed) + 1, Release);
    }

    /// What is mapped at `addr`, if it allows `access`. Called in a visit.
    #[inline]
    fn find(&self, addr: u64, access: Access) -> Option<Remembered> {
        let stamp = self.stamp(right(access));
        // One comparison for both ends: of two the first would go either way, and the processor could not foresee it.
        let fits = |it: Remembered| {
            it.stamp & (!3 | stamp) == stamp && addr.wrapping_sub(it.first) <= it.last.wrapping_sub(it.first)
        };
        let latest = self.latest.get();
        if fits(latest) {
            return Some(latest);
        }
        let remembered = self.remembered[(addr / PAGE) as usize % REMEMBERED].get();
        if fits(remembered) {
            return Some(remembered);
        }
        let page = self.page(addr);
        if page.rights() & right(access) != 0 {
            let (first, last) = (addr & !(PAGE - 1), addr | (PAGE - 1));
            return Some(
                self.remember(addr, Remembered { first, last, host: page.address(), stamp: self.stamp(page.rights()) }),
            );
        }
        self.look_further(addr).filter(|&found| fits(found))
    }

    /// The page that the shared table has at `addr`, if it is quickly found. Apart from [`View::find`], which is everywhere in
    /// what a request costs, and finds most things without. In and out by registers.
    #[inline(never)]
    fn page(&self, addr: u64) -> Word {
        // SAFETY: in a visit, as `find`, which alone calls this.
        unsafe { self.iotlb.table().page(addr) }
    }

    /// What the shared table has at `addr`.
    #[inline(never)]
    fn look_further(&self, addr: u64) -> Option<Remembered> {
        // SAFETY: in a visit, as in `page`.
        let found = unsafe { self.iotlb.table().lookup(addr) }?;
        let Translation { first, last, host, permission } = found;
        let remembered = Remembered { first, last, host, stamp: self.stamp(rights(permission)) };
        self.remember(addr, remembered);
        if found.last - found.first >= PAGE {
            self.latest.set(remembered);
        }
        Some(remembered)
    }

    #[inline]
    fn remember(&self, addr: u64, found: Remembered) -> Remembered {
        self.remembered[(addr / PAGE) as usize % REMEMBERED].set(found);
        found
    }

    #[inline]
    fn stamp(&self, rights: u64) -> u64 {
        self.generation.get() | rights
    }

    /// Asks for what is not there; `part` of something for which [`View::wait_for`] says what is waited for.
    #[cold]
    fn miss(&self, addr: BusAddr, access: Access, asked: Option<Ticket>, part: bool) -> Result<Remembered, Stop> {
        let Some(asking) = self.iotlb.asking() else {
            // SAFETY: in a visit, as in `find`.
            let reason = match unsafe { self.iotlb.table().lookup(addr.0) } {
                Some(_) => FaultReason::Forbidden,
                None => FaultReason::Unmapped,
            };
            return Err(Fault { addr, access, reason }.into());
        };
        // The one lock taken during a visit: by who misses, for as long as a look into two trees takes, and nobody
        // waits for anything while holding it.
        let mut questions = lock(&asking.questions);
        asking.busy.store(true, Relaxed);
        // Orders the store above before the second look for the mapping, below; in pair with the fence in
        // `Iotlb::update`. An update that came since the first look would otherwise leave the question unanswered.
        fence(SeqCst);
        if let Some(found) = self.find(addr.0, access) {
            return Ok(found);
        }
        let verdict = questions.miss(addr, access, asked, Instant::now);
        asking.verdicts.store(questions.verdicts(), Relaxed);
        match verdict {
            Verdict::Wait { miss, question, retry } => {
                if !part || miss.covers == Miss::NOTHING_ASKED {
                    questions.wait_for(addr.0, access);
                    self.seat.waits.store(true, Relaxed);
                }
                drop(questions);
                self.written.borrow_mut().extend(question);
                if let Some(retry) = retry {
                    self.retry.set(Some(self.retry.get().map_or(retry, |earlier| earlier.min(retry))));
                }
                Err(Stop::Miss(miss))
            }
            Verdict::Refused(reason) => Err(Fault { addr, access, reason }.into()),
        }
    }

    #[cold]
    fn wait_for(&self, addr: BusAddr, access: Access) {
        let Some(asking) = self.iotlb.asking() else { return };
        let mut questions = lock(&asking.questions);
        // Under the lock, as in `miss`: the answer comes after, and finds that somebody waits; or it came before.
        self.seat.waits.store(true, Relaxed);
        let answered = !questions.wait_for(addr.0, access);
        drop(questions);
        if answered {
            self.seat.tell();
        }
    }

    #[inline]
    fn resolve(
        &self,
        addr: BusAddr,
        len: usize,
        access: Access,
        asked: Option<Ticket>,
        part: bool,
    ) -> Result<HostSlice<'_>, Stop> {
        let found = match self.find(addr.0, access) {
            Some(found) => found,
            None => self.miss(addr, access, asked, part)?,
        };
        // One less than the length, because the whole space has 2^64.
        let rest = found.last - addr.0;
        let len = if (len as u64) <= rest { len } else { rest as usize + 1 };
        let host = std::ptr::with_exposed_provenance_mut::<u8>(found.host.wrapping_add(addr.0 - found.first) as usize);
        let start = NonNull::new(host).expect("no mapping lies across the null pointer");
        // SAFETY: by the contract of `Iotlb::update` the memory is good until a fence has passed that came after its
        // removal; and the fence waits for the visit that calls this, whose borrow of the view the slice has.
        Ok(unsafe { HostSlice::new(start, len) })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Even a visit that was forgotten is over: nothing borrowed from it can be left.
        let epoch = &self.seat.epoch;
        epoch.store((epoch.load(Relaxed) | 1) + 1, Release);
        // Release: every lease was published before.
        self.seat.left.store(true, Release);
        self.iotlb.forget_deserted();
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("seat", &self.seat).finish_non_exhaustive()
    }
}

impl Memory for View {
    type Lease = Lease;
    type Visit<'m> = Visit<'m>;

    #[inline]
    fn visit(&mut self) -> Visit<'_> {
        self.enter();
        Visit { view: self }
    }
}

/// A visit through a [`View`]. Its end passes on the questions that it raised.
#[derive(Debug)]
pub struct Visit<'v> {
    view: &'v View,
}

impl ringfence_dma::Visit for Visit<'_> {
    type Lease = Lease;

    #[inline]
    fn resolve(&self, addr: BusAddr, len: usize, access: Access, asked: Option<Ticket>) -> Result<HostSlice<'_>, Stop> {
        self.view.resolve(addr, len, access, asked, false)
    }

    #[inline]
    fn resolve_part(
        &self,
        addr: BusAddr,
        len: usize,
        access: Access,
        asked: Option<Ticket>,
    ) -> Result<HostSlice<'_>, Stop> {
        self.view.resolve(addr, len, access, asked, true)
    }

    fn wait_for(&self, addr: BusAddr, access: Access) {
        self.view.wait_for(addr, access);
    }

    #[inline]
    fn verdicts(&self) -> u64 {
        self.view.iotlb.verdicts()
    }

    #[inline]
    fn may_have_changed(&self, addr: BusAddr, access: Access, verdicts: u64) -> bool {
        // Whoever waits is told once for each time that it says so, and it waits on if this finds nothing.
        self.view.seat.waits.store(true, Relaxed);
        // Orders the store above before the looks for the mapping and the verdicts, below; in pair with the fences in
        // `Iotlb::update` and `Iotlb::answered`, which order those before the look at `waits`. So either the answer is
        // found here, or the view is told.
        fence(SeqCst);
        self.view.find(addr.0, access).is_some() || self.verdicts() != verdicts
    }

    #[inline]
    fn approach(&self, addr: BusAddr, access: Access) {
        if let Some(found) = self.view.find(addr.0, access) {
            let host = found.host.wrapping_add(addr.0 - found.first) as usize;
            if let Some(start) = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(host)) {
                // SAFETY: as in `resolve`.
                unsafe { HostSlice::new(start, 1) }.approach(access);
            }
        }
    }

    #[inline]
    fn keeps(&self) -> bool {
        self.view.iotlb.keeps()
    }

    fn release(&self, ranges: &[(BusAddr, u32)]) {
        if !self.keeps() {
            self.view.released.borrow_mut().extend_from_slice(ranges);
        }
    }

    fn lease(&self, ranges: &[(BusAddr, u32)]) -> Lease {
        Lease::publish(&self.view.seat, &mut self.view.free_holds.borrow_mut(), ranges)
    }
}

impl Drop for Visit<'_> {
    #[inline]
    fn drop(&mut self) {
        self.view.leave();
        if !self.view.released.borrow().is_empty() {
            self.view.iotlb.forget(&self.view.released.borrow());
            self.view.released.borrow_mut().clear();
        }
        if !self.view.written.borrow().is_empty() {
            self.view.iotlb.ask(self.view.written.borrow_mut().drain(..));
        }
    }
}
