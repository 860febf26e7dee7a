use crate::fence::Fence;
use crate::questions::{News, Questions};
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, fence, lock};
use crate::table::{Met, Retired, Table, Translation, Writer};
use crate::view::{Seat, View};
use ringfence_dma::{Access, BusAddr, Permission};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::Instant;

/// A translation cache. See the crate's documentation.
pub struct Iotlb {
    table: Table,
    /// Whether translations are kept beyond the request that asked for them.
    keeps: AtomicBool,
    /// Counts removals. What a view remembers is good for the one in which it was found.
    generation: AtomicU64,
    writer: Mutex<Books>,
    capacity: usize,
    asking: Option<Asking>,
    /// Questions asked.
    misses: AtomicU64,
}

/// What a lookup of an address that nothing is mapped at comes to.
pub enum Unmapped {
    /// A fault: everything there is has been put into the table. Nothing is ever evicted from it.
    Fault,
    /// A question.
    Ask(Arc<dyn Ask>),
}

/// Passes questions on to whoever knows the translations.
pub trait Ask: Send + Sync {
    /// Sends one message a question, in this order. Called at the end of a visit and never during one, from queue
    /// threads, by one at a time, with no lock held that [`Iotlb::update`], [`Iotlb::invalidate`] or
    /// [`Iotlb::answered`] would want. Must not block; what cannot be sent is the end of the connection.
    fn ask(&self, questions: &[Question]);
}

/// A translation that is needed: a MISS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// The first byte that is needed; any alignment.
    pub addr: BusAddr,
    /// What it is needed for.
    pub access: Access,
}

/// A queue's thread that waits for translations.
pub trait Wake: Send + Sync {
    /// Something was answered: what missed through the view may be tried again. Called from the session's thread, at
    /// most once between two misses of the view; must not block.
    fn wake(&self);
}

/// What an [`Iotlb`] is made to.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many mappings are kept; at least 1. See the crate's documentation for the memory that it takes.
    pub capacity: usize,
    /// Whether questions are replied to.
    pub replies: Replies,
}

impl Default for Options {
    /// 2^20 mappings, that is 4 GiB in pages of 4 KiB; a reply to each question.
    fn default() -> Self {
        Options { capacity: 1 << 20, replies: Replies::Each }
    }
}

/// Whether questions are replied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// Each one, in order: [`Iotlb::answered`] is called with it (REPLY_ACK).
    Each,
    /// None: an UPDATE without the wanted permission is a refusal, and an address that nothing is ever mapped at is
    /// waited for.
    Never,
}

/// Why an update was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The range ends before it starts: the front-end's mistake.
    Backwards {
        /// The first address.
        first: BusAddr,
        /// The last.
        last: BusAddr,
    },
    /// The table of physical memory has as many mappings as it was made for.
    Full {
        /// That many.
        capacity: usize,
    },
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refused::Backwards { first, last } => write!(f, "an update of {first} to {last} ends before it starts"),
            Refused::Full { capacity } => write!(f, "the table is full at {capacity} mappings"),
        }
    }
}

impl std::error::Error for Refused {}

/// A reply came and no question was under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unasked;

impl std::fmt::Display for Unasked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a reply to a miss without a miss")
    }
}

impl std::error::Error for Unasked {}

/// What an [`Iotlb`] has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Questions asked.
    pub misses: u64,
    /// Questions denied by their reply.
    pub denials: u64,
    /// Mappings put in.
    pub updates: u64,
    /// Those of them that took the place of something else, with no invalidation between. A front-end whose number
    /// grows while [`Statistics::invalidations`] does not forgets to invalidate.
    pub remaps: u64,
    /// Ranges invalidated.
    pub invalidations: u64,
    /// Mappings removed to make room.
    pub evictions: u64,
    /// Mappings there are.
    pub mappings: u64,
    /// About how many bytes the table takes.
    pub bytes: u64,
}

struct Books {
    table: Writer,
    seen: Statistics,
    /// Replaced and not changed, so that whoever wakes them holds no lock.
    seats: Arc<[Arc<Seat>]>,
    grace: Option<Grace>,
}

/// Waits until nobody can look at what was unlinked.
///
/// Readers hold pointers into the table during a visit and never longer. So what was unlinked may be freed once every
/// visit is over that was under way at some time after.
struct Grace {
    visits: Vec<(Arc<Seat>, u64)>,
    #[expect(dead_code, reason = "held for its destructor")]
    retired: Vec<Retired>,
}

pub(crate) struct Asking {
    ask: Arc<dyn Ask>,
    /// Whether an update can matter to the questions: nothing is open and nothing refused else. Changed under their
    /// lock, and looked at without it.
    pub(crate) busy: AtomicBool,
    /// As [`Questions::verdicts`], for looking without their lock.
    pub(crate) verdicts: AtomicU64,
    pub(crate) questions: Mutex<Questions>,
    /// Held while questions are put into the order of their replies and passed on in that order. Holds the list.
    order: Mutex<Vec<Question>>,
}

/// See the crate's documentation.
const BYTES: usize = 128;

impl Iotlb {
    /// An empty cache.
    pub fn new(unmapped: Unmapped, options: Options) -> Arc<Iotlb> {
        assert!(options.capacity > 0, "a cache without room");
        Arc::new(Iotlb {
            table: Table::new(),
            keeps: AtomicBool::new(true),
            generation: AtomicU64::new(1),
            writer: Mutex::new(Books {
                table: Writer::default(),
                seen: Statistics::default(),
                seats: Arc::new([]),
                grace: None,
            }),
            capacity: options.capacity,
            asking: match unmapped {
                Unmapped::Fault => None,
                Unmapped::Ask(ask) => Some(Asking {
                    ask,
                    busy: AtomicBool::new(false),
                    verdicts: AtomicU64::new(0),
                    questions: Mutex::new(Questions::new(options.replies)),
                    order: Mutex::new(Vec::new()),
                }),
            },
            misses: AtomicU64::new(0),
        })
    }

    /// Maps `first..=last` to the memory at `target`, in the place of every mapping that overlaps it: those are
    /// removed whole. The fence that comes back is for them; it has nothing to wait for where there were none, and
    /// needs no waiting for where their memory stays what it is.
    ///
    /// # Errors
    /// [`Refused`]; the table is then as it was.
    ///
    /// # Safety
    /// The memory is mapped here, readable and writable, and without a Rust reference to any of it, until the mapping
    /// was removed (by an update over it, [`Iotlb::invalidate`] or [`Iotlb::clear`]) and the fence has passed. A
    /// mapping may be evicted at any time: before memory goes away, its range is invalidated in any case.
    pub unsafe fn update(
        &self,
        first: BusAddr,
        last: BusAddr,
        target: NonNull<u8>,
        permission: Permission,
    ) -> Result<Fence, Refused> {
        if last < first {
            return Err(Refused::Backwards { first, last });
        }
        let mut books = lock(&self.writer);
        self.collect(&mut books);
        self.make_room(&mut books)?;
        let host = target.as_ptr().expose_provenance() as u64;
        let mapping = Translation { first: first.0, last: last.0, host, permission };
        let met = self.table.insert(&mut books.table, mapping);
        books.seen.updates += 1;
        let replaced = (met == Met::Different).then(|| {
            books.seen.remaps += 1;
            self.removed(&books, first, last)
        });
        if let Some(asking) = &self.asking {
            // Orders the mapping's store, above, before the look at `busy`, below; in pair with the fence in
            // `View::miss`, which orders the store of `busy` before its second look for the mapping. So either the
            // question is seen here, or it finds its answer there.
            fence(SeqCst);
            if asking.busy.load(Relaxed) {
                let mut questions = lock(&asking.questions);
                let news = questions.updated(first.0, last.0, permission);
                asking.busy.store(!questions.is_idle(), Relaxed);
                asking.verdicts.store(questions.verdicts(), Relaxed);
                drop(questions);
                self.tell(books, news);
            }
        }
        Ok(replaced.unwrap_or_else(|| Fence::nothing(first, last)))
    }

    /// Removes every mapping that overlaps `first..=last`. They are gone from every view's next visit on; whether
    /// they are still in use is what the fence knows.
    ///
    /// Takes time by what is mapped in the range, not by its size. A range that ends before it starts is empty.
    pub fn invalidate(&self, first: BusAddr, last: BusAddr) -> Fence {
        if last < first {
            return Fence::nothing(first, last);
        }
        let mut books = lock(&self.writer);
        self.collect(&mut books);
        self.table.remove(&mut books.table, first.0, last.0);
        books.seen.invalidations += 1;
        // Even where nothing was found: it may have been evicted and still be in use.
        self.removed(&books, first, last)
    }

    /// Has translations kept for as long as nobody takes them away, as it is at first, or no longer than for the request
    /// that asked for them: then whatever a view's user releases is forgotten at the end of its visit.
    pub fn keep(&self, keep: bool) {
        self.keeps.store(keep, Relaxed);
    }

    #[inline]
    pub(crate) fn keeps(&self) -> bool {
        self.keeps.load(Relaxed)
    }

    /// Whether something is mapped at `addr`.
    pub fn is_mapped(&self, addr: BusAddr) -> bool {
        let _books = lock(&self.writer);
        // SAFETY: the writer's lock is held.
        unsafe { self.table.lookup(addr.0) }.is_some()
    }

    /// Takes `ranges` out of the table without a fence, for whoever keeps no translation beyond the request that asked
    /// for it: the next request asks anew. Whatever overlaps them goes, other requests' included; those that have a
    /// lease keep it.
    pub fn forget(&self, ranges: &[(BusAddr, u32)]) {
        let mut books = lock(&self.writer);
        self.collect(&mut books);
        for &(addr, len) in ranges {
            if let Some(more) = len.checked_sub(1) {
                self.table.remove(&mut books.table, addr.0, addr.0.saturating_add(more.into()));
            }
        }
        self.start_generation();
    }

    /// Removes everything. Its fence waits for all visits and all leases.
    pub fn clear(&self) -> Fence {
        self.invalidate(BusAddr(0), BusAddr(u64::MAX))
    }

    /// The reply to the oldest question without one. Its UPDATE may come before or after.
    ///
    /// # Errors
    /// [`Unasked`]: the front-end's mistake, without effect.
    pub fn answered(&self, granted: bool) -> Result<(), Unasked> {
        let asking = self.asking.as_ref().ok_or(Unasked)?;
        let mut books = lock(&self.writer);
        let mut questions = lock(&asking.questions);
        let news = questions.answered(
            granted,
            // SAFETY: the writer's lock is held.
            |at| unsafe { self.table.lookup(at) }.map(|found| found.permission),
            Instant::now,
        );
        asking.verdicts.store(questions.verdicts(), Relaxed);
        drop(questions);
        books.seen.denials += u64::from(!granted && news.is_some());
        self.tell(books, news.ok_or(Unasked)?);
        Ok(())
    }

    /// One queue's view. `wake` is called when what it asked for is answered.
    pub fn view(self: &Arc<Self>, wake: Arc<dyn Wake>) -> View {
        let seat = Arc::new(Seat::new(wake));
        self.reseat(Some(&seat));
        View::new(Arc::clone(self), seat)
    }

    /// What happened up to now.
    pub fn statistics(&self) -> Statistics {
        let books = lock(&self.writer);
        Statistics {
            misses: self.misses.load(Relaxed),
            mappings: books.table.mappings() as u64,
            bytes: books.table.bytes() as u64,
            ..books.seen
        }
    }

    fn make_room(&self, books: &mut Books) -> Result<(), Refused> {
        let full = |table: &Writer, mappings, bytes| table.mappings() >= mappings || table.bytes() >= bytes;
        let capacity = self.capacity;
        if !full(&books.table, capacity, capacity.saturating_mul(BYTES).max(1 << 16)) {
            return Ok(());
        }
        if self.asking.is_none() {
            return Err(Refused::Full { capacity });
        }
        // Several at once, because each time throws away what the views remember.
        let less = capacity - (capacity / 64).max(1);
        let enough = |table: &Writer| !full(table, less + 1, less.saturating_mul(BYTES).max(1 << 15));
        books.seen.evictions += self.table.evict(&mut books.table, enough) as u64;
        self.start_generation();
        Ok(())
    }

    /// Mappings are out of the table: makes the views forget them, and sees who may still use them.
    fn removed(&self, books: &Books, first: BusAddr, last: BusAddr) -> Fence {
        self.start_generation();
        // Orders the removals and the generation, above, before the look at every view's epoch, below; in pair with
        // the fence in `View::enter`, which orders the epoch's store before the look at the generation and the table.
        // So either the fence sees the visit, or the visit sees the removal.
        fence(SeqCst);
        Fence::new(&books.seats, first, last)
    }

    fn start_generation(&self) {
        // Only the writer changes it. Release: who sees the new generation sees the table without what was removed,
        // and will not remember it under the new number.
        self.generation.store(self.generation.load(Relaxed) + 1, Release);
    }

    /// Frees what nobody can look at any more.
    #[inline]
    fn collect(&self, books: &mut Books) {
        if books.grace.is_some() || books.table.is_worth_collecting() {
            self.collect_some(books);
        }
    }

    fn collect_some(&self, books: &mut Books) {
        if let Some(grace) = &mut books.grace {
            grace.visits.retain(|(seat, epoch)| seat.epoch.load(Acquire) == *epoch);
            if grace.visits.is_empty() {
                books.grace = None;
            }
        }
        if books.grace.is_none() && books.table.is_worth_collecting() {
            // Orders the unlinking, in earlier calls, before the look at the epochs: as in `removed`.
            fence(SeqCst);
            let under_way = |seat: &Arc<Seat>| {
                // Acquire: the reads of a visit that is over come before the memory is freed.
                let epoch = seat.epoch.load(Acquire);
                (!epoch.is_multiple_of(2)).then(|| (Arc::clone(seat), epoch))
            };
            let visits = books.seats.iter().filter_map(under_way).collect();
            books.grace = Some(Grace { visits, retired: books.table.take_retired() });
        }
    }

    /// Lets go of views that were dropped and whose leases are over, and takes one more in.
    fn reseat(&self, one_more: Option<&Arc<Seat>>) {
        let mut books = lock(&self.writer);
        let stay = books.seats.iter().filter(|seat| !seat.is_deserted()).chain(one_more).cloned().collect();
        let old = std::mem::replace(&mut books.seats, stay);
        drop(books);
        // Without the lock: this may drop somebody's `Wake`.
        drop(old);
    }

    fn tell(&self, books: MutexGuard<'_, Books>, news: News) {
        if news == News::Some {
            let seats = Arc::clone(&books.seats);
            drop(books);
            // Orders the mapping's store and that of the verdicts before the looks at who waits; in pair with the fence in
            // `View::may_have_changed`.
            fence(SeqCst);
            seats.iter().for_each(|seat| seat.tell());
        }
    }

    // What follows is for views.

    pub(crate) fn forget_deserted(&self) {
        self.reseat(None);
    }

    pub(crate) fn verdicts(&self) -> u64 {
        self.asking.as_ref().map_or(0, |asking| asking.verdicts.load(Relaxed))
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Acquire)
    }

    pub(crate) fn asking(&self) -> Option<&Asking> {
        self.asking.as_ref()
    }

    /// Passes on what a visit wrote down.
    pub(crate) fn ask(&self, written: impl Iterator<Item = crate::questions::Handle>) {
        let Some(asking) = &self.asking else { return };
        let mut list = lock(&asking.order);
        list.clear();
        lock(&asking.questions).ask(written, &mut list);
        if !list.is_empty() {
            self.misses.fetch_add(list.len() as u64, Relaxed);
            asking.ask.ask(&list);
        }
    }
}

impl std::fmt::Debug for Iotlb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iotlb").field("statistics", &self.statistics()).finish_non_exhaustive()
    }
}
