//! A front-end with a driver of its own, which takes pages away from a device that is using them.

use crate::slow::{CAPACITY, content};
use ringfence_dma::{BusAddr, FrontendVa, Gpa, HostSlice, Permission};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_ring::{Format, Notifications, Position};
use ringfence_vhost_user::client::{self, Translation, Translator, Vring, range};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// More than there are addresses, so that a page which was taken away stays stamped for a while.
const MEMORY: usize = 2048;
/// How many requests may be under way, each with so many descriptors of its own.
const REQUESTS: usize = 25;
const DESCRIPTORS: usize = 10;
const QUEUE: u16 = 256;

/// Pages of bus addresses, from [`BASE`] on: the ring's, then headers and status bytes, then data. A packed ring has its
/// descriptors in [`TABLE`], and the event suppression of driver and device where the other's rings begin.
const BASE: u64 = 0x7_0000_0000;
const TABLE: usize = 0;
const AVAIL: usize = 1;
/// The used ring's flags and index are the last bytes of this page, and its entries begin with the next.
const USED: usize = 2;
const ENTRIES: usize = 3;
const HEADERS: usize = 4;
const STATUS: usize = 5;
const USED_AT: usize = PAGE - 4;
const DATA: usize = 8;
const ADDRESSES: usize = DATA + 256;

/// Where what is lent is.
const LENT: BusAddr = BusAddr(BASE - PAGE as u64);

const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the device's questions are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misses {
    Answered,
    Withheld,
}

/// What the two sides agree on for the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) format: Format,
    pub(crate) notifications: Notifications,
}

impl Kind {
    pub(crate) const SPLIT: Self = Self { format: Format::Split, notifications: Notifications::Flags };

    /// What the driver does not see of what is offered.
    fn hidden(self) -> u64 {
        (if self.format == Format::Split { PACKED } else { 0 })
            | (if self.notifications == Notifications::Flags { EVENT_IDX } else { 0 })
    }
}

const PACKED: u64 = virtio_spec::F::RING_PACKED.bits().to_ne() as u64;
const EVENT_IDX: u64 = virtio_spec::F::EVENT_IDX.bits().to_ne() as u64;

/// How long to go on.
pub(crate) struct Load {
    /// Until so many pages have been stamped, and some requests have ended.
    pub(crate) pages: u64,
    /// How often the queue stops and goes on, on the way.
    pub(crate) stops: u64,
    /// Whether each sector reads as [`content`] says, whatever is written.
    pub(crate) known: bool,
}

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) stamped: u64,
    /// Requests that succeeded, and that failed because their memory was gone.
    pub(crate) done: u64,
    pub(crate) failed: u64,
    /// Reads whose memory stayed where it was, and which brought what they should.
    pub(crate) checked: u64,
}

/// What the device may reach: which page of memory is behind which address.
struct Map {
    pages: Mutex<[Option<usize>; ADDRESSES]>,
    va: u64,
}

impl Translator for Map {
    fn translate(&self, iova: BusAddr, _perm: Permission) -> Option<Translation> {
        self.translation(usize::try_from(iova.0.checked_sub(BASE)?).ok()? / PAGE)
    }
}

impl Map {
    fn translation(&self, index: usize) -> Option<Translation> {
        let page = (*self.pages.lock().unwrap().get(index)?)?;
        Some(Translation {
            iova: BusAddr(BASE + (index * PAGE) as u64),
            size: PAGE as u64,
            uaddr: FrontendVa(self.va + (page * PAGE) as u64),
            perm: Permission::ReadWrite,
        })
    }
}

pub(crate) struct Frontend {
    kind: Kind,
    client: client::Frontend,
    map: Arc<Map>,
    memory: SharedMemory,
    kick: OwnedFd,
    call: OwnedFd,
    state: Mutex<State>,
}

/// The driver's, and what lies idle.
struct State {
    random: u64,
    /// Where the driver is, with the wrap counters on top in a packed ring.
    avail: u16,
    used: u16,
    /// How many entries were made available since the device was last told, or found not to want to be.
    untold: u16,
    requests: [Option<Request>; REQUESTS],
    /// Pages that were taken away, oldest first, with their stamps.
    stamped: VecDeque<(usize, u64)>,
    /// How often each address was given other memory.
    moved: [u64; ADDRESSES],
    seen: Seen,
    known: bool,
}

#[derive(Clone)]
struct Request {
    /// Descriptors.
    len: u16,
    sector: u64,
    reads: bool,
    /// Addresses of its data, and how often they had moved when it started.
    data: Vec<(usize, u64)>,
}

impl Frontend {
    pub(crate) fn connect(socket: &Path, misses: Misses) -> Self {
        Self::with_ring(socket, misses, Kind::SPLIT)
    }

    pub(crate) fn with_ring(socket: &Path, misses: Misses, kind: Kind) -> Self {
        let memory = SharedMemory::new(MEMORY * PAGE).unwrap();
        let va = memory.slice(0, 1).as_ptr() as u64;
        // Withheld answers would come long after the test.
        let miss_delay = if misses == Misses::Answered { Duration::ZERO } else { 100 * PATIENCE };
        let options = client::Options { timeout: PATIENCE, miss_delay, ..Default::default() };
        let client = client::Frontend::connect(socket, options).unwrap();
        let size = (MEMORY * PAGE) as u64;
        let placement = Placement { gpa: Gpa(0), frontend_va: FrontendVa(va), size, offset: 0 };
        client.set_memory(&[(placement, memory.as_fd())]).unwrap();
        let pages = std::array::from_fn(Some);
        let map = Arc::new(Map { pages: Mutex::new(pages), va });
        client.serve_iotlb(Arc::clone(&map) as _).unwrap();
        // The ring that is wanted, and all else that there is.
        assert_eq!(!client.offered() & (PACKED | EVENT_IDX), 0, "all rings are offered");
        client.set_features(client.offered() & !kind.hidden()).unwrap();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let state = State {
            random: 0x1234_5678_9abc_def1,
            avail: Position::start(kind.format).avail,
            used: Position::start(kind.format).used,
            untold: 0,
            requests: [const { None }; REQUESTS],
            stamped: VecDeque::new(),
            moved: [0; ADDRESSES],
            seen: Seen::default(),
            known: false,
        };
        let (kick, call) = (eventfd(0, flags).unwrap(), eventfd(0, flags).unwrap());
        let frontend = Self { kind, client, map, memory, kick, call, state: Mutex::new(state) };
        let mut state = frontend.state.lock().unwrap();
        for page in ADDRESSES..MEMORY {
            frontend.stamp(&mut state, page);
        }
        drop(state);
        frontend.start(Position::start(kind.format).vring_base(kind.format));
        frontend
    }

    /// Gives every translation unasked, which also answers those who wait for one.
    pub(crate) fn give_everything(&self) {
        for translation in (0..ADDRESSES).filter_map(|address| self.map.translation(address)) {
            self.client.update(translation).unwrap();
        }
    }

    pub(crate) fn start(&self, base: u32) {
        let at = |address: usize| BASE + (address * PAGE) as u64;
        let vring = Vring {
            index: 0,
            size: QUEUE,
            base,
            descriptor: at(TABLE),
            available: at(AVAIL),
            used: at(USED) + USED_AT as u64,
            kick: Some(self.kick.as_fd()),
            call: Some(self.call.as_fd()),
        };
        self.client.start_vring(&vring).unwrap();
        // What it did not want to be told of before it stopped is news to a queue that starts.
        self.ring(&mut self.state.lock().unwrap(), Tell::Always);
    }

    pub(crate) fn stop(&self) -> u32 {
        self.client.stop_vring(0).unwrap()
    }

    fn page(&self, page: usize) -> HostSlice<'_> {
        self.memory.slice(page * PAGE, PAGE)
    }

    /// The memory behind an address. The state's lock keeps it there.
    fn at(&self, address: usize) -> HostSlice<'_> {
        self.page(self.map.pages.lock().unwrap()[address].expect("mapped while the state is locked"))
    }

    fn stamp(&self, state: &mut State, page: usize) {
        let stamp = state.next() | 1;
        self.page(page).write(0, stamp.to_ne_bytes().repeat(PAGE / 8).as_slice());
        state.stamped.push_back((page, stamp));
    }

    fn assert_stamp(&self, (page, stamp): (usize, u64)) {
        let mut found = [0; PAGE];
        self.page(page).read(0, &mut found);
        let changed = found != stamp.to_ne_bytes().repeat(PAGE / 8)[..];
        let at = found.chunks(8).position(|word| word != stamp.to_ne_bytes()).unwrap_or_default() * 8;
        assert!(!changed, "page {page} changed at {at:#x} after its invalidation was acknowledged");
    }

    pub(crate) fn assert_stamps(&self) {
        self.state.lock().unwrap().stamped.iter().for_each(|&stamped| self.assert_stamp(stamped));
    }

    /// Takes pages away, stamps them, and gives their addresses others, with the same content where that matters.
    fn take_away(&self, state: &mut State, first: usize, count: usize) {
        let addresses = first..first + count;
        let bus = BusAddr(BASE + (first * PAGE) as u64);
        let range = range(bus, (count * PAGE) as u64).unwrap();
        // Data has no address for a while, as an unmapped buffer does; a request that needs it then fails.
        let unmaps = first >= DATA && state.below(2) == 0;
        let mut old = self.map.pages.lock().unwrap()[addresses.clone()].to_vec();
        if unmaps {
            self.map.pages.lock().unwrap()[addresses.clone()].fill(None);
            self.client.invalidate(range).unwrap();
            self.replace(state, first, &old);
        } else {
            self.client.invalidate_then(range, || self.replace(state, first, &old)).unwrap();
        }
        for old in old.drain(..).flatten() {
            self.stamp(state, old);
            state.seen.stamped += 1;
        }
    }

    /// The invalidation is acknowledged: from here on nothing writes to the old pages.
    fn replace(&self, state: &mut State, first: usize, old: &[Option<usize>]) {
        for (address, old) in (first..).zip(old) {
            let fresh = state.stamped.pop_front().expect("more memory than addresses");
            self.assert_stamp(fresh);
            if address < DATA {
                let mut content = [0; PAGE];
                self.page(old.expect("mapped")).read(0, &mut content);
                self.page(fresh.0).write(0, &content);
            }
            state.moved[address] += 1;
            self.map.pages.lock().unwrap()[address] = Some(fresh.0);
        }
    }

    pub(crate) fn take_away_everything(&self) {
        let state = &mut self.state.lock().unwrap();
        for address in [TABLE, AVAIL, USED, ENTRIES, HEADERS, STATUS] {
            self.take_away(state, address, 1);
        }
        self.take_away(state, DATA, ADDRESSES - DATA);
    }

    /// Puts a request into the ring; `false` where there is no room.
    fn submit(&self, state: &mut State, reads: Option<bool>) -> bool {
        let Some(slot) = state.requests.iter().position(Option::is_none) else { return false };
        let most = if state.below(4) == 0 { DESCRIPTORS - 2 } else { 2 };
        let count = 1 + state.below(most);
        let kind = match reads {
            Some(_) => 0,
            // Mostly reads; some writes, some flushes.
            None => [0, 0, 0, 0, 0, 0, 1, 4][state.below(8)],
        };
        let sector = state.below((CAPACITY as usize / PAGE) - DESCRIPTORS) as u64 * 8;
        let count = if kind == 4 { 0 } else { count };
        let data: Vec<_> = (0..count).map(|_| DATA + state.below(ADDRESSES - DATA)).collect();
        let header = self.at(HEADERS).sub(slot * 16, 16);
        header.store_u32(0, kind, Ordering::Relaxed);
        header.store_u32(4, 0, Ordering::Relaxed);
        header.store_u64(8, if kind == 4 { 0 } else { sector }, Ordering::Relaxed);
        self.at(STATUS).sub(slot, 1).write(0, &[0xff]);
        let bus = |address: usize, offset: usize| BASE + (address * PAGE + offset) as u64;
        let write: u16 = if kind == 0 { 2 } else { 0 };
        let mut chain = vec![(bus(HEADERS, slot * 16), 16_u32, 0_u16)];
        chain.extend(data.iter().map(|&address| (bus(address, 0), PAGE as u32, write)));
        chain.push((bus(STATUS, slot), 1, 2));
        let len = chain.len() as u16;
        match self.kind.format {
            Format::Split => self.add_split(state, slot, &chain),
            Format::Packed => self.add_packed(state, slot, &chain),
        }
        let data = data.into_iter().map(|address| (address, state.moved[address])).collect();
        state.requests[slot] = Some(Request { len, sector, reads: kind == 0, data });
        true
    }

    /// Each slot has descriptors of its own.
    fn add_split(&self, state: &mut State, slot: usize, chain: &[(u64, u32, u16)]) {
        let table = self.at(TABLE);
        let last = chain.len() - 1;
        for (index, &(addr, len, flags)) in chain.iter().enumerate() {
            let at = slot * DESCRIPTORS + index;
            let (flags, next) = if index == last { (flags, 0) } else { (flags | 1, at + 1) };
            table.store_u64(at * 16, addr, Ordering::Relaxed);
            table.store_u32(at * 16 + 8, len, Ordering::Relaxed);
            table.store_u16(at * 16 + 12, flags, Ordering::Relaxed);
            table.store_u16(at * 16 + 14, next as u16, Ordering::Relaxed);
        }
        let avail = self.at(AVAIL);
        let entry = usize::from(state.avail % QUEUE) * 2 + 4;
        avail.store_u16(entry, (slot * DESCRIPTORS) as u16, Ordering::Relaxed);
        state.avail = state.avail.wrapping_add(1);
        state.untold += 1;
        avail.store_u16(2, state.avail, Ordering::Release);
    }

    /// One after the other; there are more than all slots have. The first becomes available last (§2.8.13).
    fn add_packed(&self, state: &mut State, slot: usize, chain: &[(u64, u32, u16)]) {
        let table = self.at(TABLE);
        let first = state.avail;
        let last = chain.len() - 1;
        let mut first_flags = 0;
        for (index, &(addr, len, flags)) in chain.iter().enumerate() {
            let at = usize::from(state.avail & !WRAP) * 16;
            let available = if state.avail & WRAP != 0 { 1 << 7 } else { 1 << 15 };
            let flags = flags | available | u16::from(index != last);
            table.store_u64(at, addr, Ordering::Relaxed);
            table.store_u32(at + 8, len, Ordering::Relaxed);
            table.store_u16(at + 12, slot as u16, Ordering::Relaxed);
            match index {
                0 => first_flags = flags,
                _ => table.store_u16(at + 14, flags, Ordering::Relaxed),
            }
            state.avail = wrapped(state.avail, 1);
        }
        state.untold += chain.len() as u16;
        table.store_u16(usize::from(first & !WRAP) * 16 + 14, first_flags, Ordering::Release);
    }

    /// Tells the device of what it can have; with event indices only if it wants to know.
    fn ring(&self, state: &mut State, tell: Tell) {
        fence(Ordering::SeqCst);
        let fresh = std::mem::take(&mut state.untold);
        if self.kind.notifications == Notifications::Flags || tell == Tell::Always || self.is_wanted(state, fresh) {
            rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
        }
        // Nobody waits for a call here; that the device reads this is what matters.
        if self.kind.notifications == Notifications::EventIdx {
            match self.kind.format {
                Format::Split => {
                    self.at(AVAIL).store_u16(4 + usize::from(QUEUE) * 2, state.used, Ordering::Relaxed);
                }
                Format::Packed => {
                    self.at(AVAIL).store_u16(0, state.used, Ordering::Relaxed);
                    self.at(AVAIL).store_u16(2, 2, Ordering::Release);
                }
            }
        }
    }

    /// Whether the device's event is among the `fresh` entries that were last made available (§2.7.10, §2.8.10).
    fn is_wanted(&self, state: &State, fresh: u16) -> bool {
        let (event, new) = match self.kind.format {
            Format::Split => (self.at(ENTRIES).load_u16(usize::from(QUEUE) * 8, Ordering::Relaxed), state.avail),
            Format::Packed => {
                let suppression = self.at(USED);
                match suppression.load_u16(USED_AT + 2, Ordering::Relaxed) {
                    0 => return true,
                    1 => return false,
                    _ => {}
                }
                let event = suppression.load_u16(USED_AT, Ordering::Relaxed);
                // One of the round before is as far behind as the ring is long.
                let round = if (event ^ state.avail) & WRAP == 0 { 0 } else { QUEUE };
                ((event & !WRAP).wrapping_sub(round), state.avail & !WRAP)
            }
        };
        new.wrapping_sub(event).wrapping_sub(1) < fresh
    }

    pub(crate) fn submit_reads(&self, count: usize) {
        let state = &mut self.state.lock().unwrap();
        for _ in 0..count {
            assert!(self.submit(state, Some(true)), "room for {count} requests");
        }
        self.ring(state, Tell::IfWanted);
    }

    /// Lends the device a file as memory of the guest, behind the address of [`LENT`].
    pub(crate) fn lend(&self, file: BorrowedFd<'_>) {
        let placement = |gpa, va, size| Placement { gpa: Gpa(gpa), frontend_va: FrontendVa(va), size, offset: 0 };
        let size = (MEMORY * PAGE) as u64;
        // An address of nothing here: what hangs would hang us too.
        let lent = FrontendVa(0x10_0000);
        let own = (placement(0, self.map.va, size), self.memory.as_fd());
        self.client.set_memory(&[own, (placement(1 << 40, lent.0, PAGE as u64), file)]).unwrap();
        let translation = Translation { iova: LENT, size: PAGE as u64, uaddr: lent, perm: Permission::ReadWrite };
        self.client.update(translation).unwrap();
    }

    /// A read whose data goes to what was lent.
    pub(crate) fn read_into_lent(&self) {
        let state = &mut self.state.lock().unwrap();
        self.at(HEADERS).write(0, &[0; 16]);
        let bus = |address: usize| BASE + (address * PAGE) as u64;
        self.add_split(state, 0, &[(bus(HEADERS), 16, 0), (LENT.0, PAGE as u32, 2), (bus(STATUS), 1, 2)]);
        state.requests[0] = Some(Request { len: 3, sector: 0, reads: true, data: Vec::new() });
        self.ring(state, Tell::IfWanted);
    }

    /// `false`: the connection ended without an answer.
    pub(crate) fn take_lent_away(&self) -> bool {
        self.client.invalidate(range(LENT, PAGE as u64).unwrap()).is_ok()
    }

    /// Takes what the device has used.
    fn reap(&self, state: &mut State) -> usize {
        let mut count = 0;
        while let Some(slot) = self.next_used(state) {
            let request = state.requests[slot].take().expect("the device used a request that is under way");
            state.used = match self.kind.format {
                Format::Split => state.used.wrapping_add(1),
                Format::Packed => wrapped(state.used, request.len),
            };
            count += 1;
            let mut status = [0];
            self.at(STATUS).sub(slot, 1).read(0, &mut status);
            match status[0] {
                0 => {
                    state.seen.done += 1;
                    self.check(state, &request);
                }
                1 => state.seen.failed += 1,
                other => panic!("status {other}"),
            }
        }
        count
    }

    /// The slot of the next request that the device has used.
    fn next_used(&self, state: &State) -> Option<usize> {
        let id = match self.kind.format {
            Format::Split => {
                if self.at(USED).load_u16(USED_AT + 2, Ordering::Acquire) == state.used {
                    return None;
                }
                let entry = usize::from(state.used % QUEUE) * 8;
                let id = self.at(ENTRIES).load_u32(entry, Ordering::Relaxed) as usize;
                assert!(id.is_multiple_of(DESCRIPTORS), "the device used {id}, which heads no chain");
                id / DESCRIPTORS
            }
            Format::Packed => {
                let at = usize::from(state.used & !WRAP) * 16;
                let flags = self.at(TABLE).load_u16(at + 14, Ordering::Acquire);
                let used = if state.used & WRAP != 0 { 1 << 7 | 1 << 15 } else { 0 };
                if flags & (1 << 7 | 1 << 15) != used {
                    return None;
                }
                usize::from(self.at(TABLE).load_u16(at + 12, Ordering::Relaxed))
            }
        };
        assert!(id < REQUESTS, "the device used {id}, which is no request");
        Some(id)
    }

    /// The first word of each page that stayed where it was, unless another request shares it.
    fn check(&self, state: &mut State, request: &Request) {
        let unmoved = request.data.iter().all(|&(address, moved)| state.moved[address] == moved);
        let mut uses: HashMap<usize, usize> = HashMap::new();
        let others = state.requests.iter().flatten().flat_map(|other| &other.data);
        request.data.iter().chain(others).for_each(|&(address, _)| *uses.entry(address).or_default() += 1);
        if !state.known || !request.reads || !unmoved || request.data.iter().any(|(address, _)| uses[address] > 1) {
            return;
        }
        state.seen.checked += 1;
        for (index, &(address, _)) in request.data.iter().enumerate() {
            let word = self.at(address).load_u64(0, Ordering::Relaxed);
            let expected = content(request.sector + index as u64 * 8);
            // A page that another request used meanwhile may have that one's.
            assert!(word == expected || word >> 48 == expected >> 48, "{word:#x} in a page that was read");
        }
    }

    /// Until nothing is under way; says how many there were.
    pub(crate) fn wait_for_all(&self) -> usize {
        let since = Instant::now();
        let mut count = 0;
        loop {
            let state = &mut self.state.lock().unwrap();
            count += self.reap(state);
            if state.requests.iter().all(Option::is_none) {
                return count;
            }
            assert!(since.elapsed() < PATIENCE, "requests were lost: {:?}", state.seen);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Until the back-end has closed the connection.
    pub(crate) fn wait_for_hangup(&self) {
        let since = Instant::now();
        while self.client.config(0, &mut [0; 8]).is_ok() {
            assert!(since.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Keeps the device busy and takes its pages away.
    pub(crate) fn run(&self, load: Load) -> Seen {
        let Load { pages, stops, known } = load;
        self.state.lock().unwrap().known = known;
        let mut stop_at = pages / (stops + 1);
        let mut progress = (Instant::now(), 0);
        let is_enough =
            |seen: &Seen| seen.stamped >= pages && seen.done >= pages / 100 && (seen.checked >= pages / 2000 || !known);
        while !is_enough(&self.state.lock().unwrap().seen) {
            {
                let state = &mut self.state.lock().unwrap();
                self.reap(state);
                let mut some = false;
                while self.submit(state, None) {
                    some = true;
                }
                if some {
                    self.ring(state, Tell::IfWanted);
                }
                match state.below(40) {
                    0 => self.take_away(state, TABLE, 1),
                    1 => self.take_away(state, AVAIL, 1),
                    2 => self.take_away(state, USED, 1),
                    3 => self.take_away(state, ENTRIES, 1),
                    4 => self.take_away(state, HEADERS, 1),
                    5 | 6 => self.take_away(state, STATUS, 1),
                    7 => self.take_away(state, DATA, ADDRESSES - DATA),
                    _ => {
                        let count = 1 + state.below(16);
                        let first = DATA + state.below(ADDRESSES - DATA - count);
                        self.take_away(state, first, count);
                    }
                }
                let done = state.seen.done + state.seen.failed;
                if done != progress.1 {
                    progress = (Instant::now(), done);
                }
                assert!(progress.0.elapsed() < PATIENCE, "no request ends any more: {:?}", state.seen);
            }
            if self.state.lock().unwrap().seen.stamped >= stop_at {
                stop_at += pages / (stops + 1);
                // What is used now can't be published, because nobody answers a miss while the queue is stopped.
                self.take_away(&mut self.state.lock().unwrap(), USED, 1);
                let base = self.stop();
                self.assert_stamps();
                self.start(base);
            }
        }
        self.wait_for_all();
        self.assert_stamps();
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }
}

/// Whether the device hears of it although it may not want to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tell {
    IfWanted,
    Always,
}

/// The wrap counter of a place in a packed ring.
const WRAP: u16 = 1 << 15;

/// The place in a packed ring that is `by` entries on.
fn wrapped(place: u16, by: u16) -> u16 {
    let index = (place & !WRAP) + by;
    if index < QUEUE { place & WRAP | index } else { (place ^ WRAP) & WRAP | (index - QUEUE) }
}

impl State {
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
