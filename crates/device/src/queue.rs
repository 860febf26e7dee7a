//! The engine that serves one queue of any device: it takes chains off the ring, has them translated, hands them to
//! the device's [`Handler`], and puts what is used back.
//!
//! A chain that lacks a translation waits aside, unless its handler takes it unseen, and holds nothing, so that it stops
//! neither its neighbours nor whoever takes translations away; everything it lacks has been asked for at once. A chain that
//! touches what it must not is failed alone. A chain that breaks the rules of rings stops the queue.
//!
//! Nor does a chain hold anything that the device has under way: the device has its memory for as long as a visit, and
//! what it touches when it is done is translated again then, down to the status byte. So an invalidation waits for a
//! visit and never for a disk.

use crate::{Back, Handler, Outcome, Pieces, Request, Token, Unreachable};
use ringfence_dma::{
    Access, BusAddr, DetachedSlice, Fault, FaultReason, Memory, Miss, Stop, Ticket, Visit, copy_to_bus,
};
use ringfence_ring::{Chain, DeviceQueue, Head, OpenQueue, Position, RingError, RingStop};
use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Most requests of one turn, and most bytes: a turn is a visit, and whoever takes translations away waits for it.
const TURN_REQUESTS: usize = 64;
const TURN_BYTES: u64 = 1 << 20;

/// So many requests are taken off the ring at once, so that the memory of all of them is on its way here before the first
/// is looked at.
const BATCH: usize = 8;

/// So many are shown to the driver at once: it goes on with them while the turn does. With fewer the two sides take the
/// used index from each other all the time, with more the driver of a short queue has nothing to do until the turn ends.
const SHOWN: usize = 16;

/// Most translations that one chain asks for at a time: a driver may describe 4 GiB with one descriptor, and what asks
/// its VMM for each page of that keeps the VMM from everything else.
const MISSES_AT_ONCE: usize = 1024;

/// For how long the driver is not told of what is done because one that came before it waits for a translation: see
/// [`Requests::held`]. Answers take microseconds, of a busy VMM milliseconds; one that never comes holds nobody.
const HELD: Duration = Duration::from_millis(50);

/// Room for so many pieces is kept in each slot.
const PIECES_KEPT: usize = 1024;

/// One queue of a device, being served from one thread.
pub struct Queue<M: Memory> {
    ring: DeviceQueue,
    // Before the handler, also when a panic drops all of it: a handler waits for what it has under way.
    memory: M,
    handler: Box<dyn Handler>,
    report: Box<dyn Report>,
    requests: Requests,
}

/// Who is told of accesses that were not let through. May be called often: limiting the rate is its business.
pub trait Report: Send {
    /// `fault` made a request fail, or stopped the ring.
    fn fault(&mut self, fault: Fault);
}

/// What came of a [`Queue::turn`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Something was done, so there may be more to do at once.
    pub worked: bool,
    /// The driver wants to be told.
    pub notify: bool,
}

/// The queue can't go on: what the driver, or whoever translates for it, did to its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The driver broke the rules of rings.
    #[error("the driver broke the ring: {0}")]
    Ring(RingError),
    /// The ring itself can't be reached.
    #[error("the ring can't be reached: {0}")]
    Fault(Fault),
}

/// Where a queue was when it stopped, and what it had begun and not ended: nothing that the driver made available is
/// lost if a queue goes on from here.
///
/// The newest chains of which none is ended are the ring's again, and whoever goes on from the position takes them off it,
/// in this process or in another. One that is older than some that the driver was told of can't be given back like that: it
/// is only here.
#[derive(Debug)]
pub struct Stopped {
    /// Where to go on in the ring.
    pub position: Position,
    /// Chains that start anew in the order of their arrival, those among them that the device had and was not done with.
    waiting: Vec<(u64, Chain)>,
    /// Chains that are done and that the driver was not told of.
    finished: Vec<Finished>,
    /// How many chains had been taken off the ring.
    arrived: u64,
}

impl Stopped {
    /// A queue that has not run yet.
    pub fn at(position: Position) -> Self {
        Self { position, waiting: Vec::new(), finished: Vec::new(), arrived: 0 }
    }

    /// Whether some chain was begun and not ended, and is not the ring's again.
    pub fn is_unfinished(&self) -> bool {
        !self.waiting.is_empty() || !self.finished.is_empty()
    }
}

/// A chain that is done.
#[derive(Clone, Copy, Debug)]
struct Finished {
    /// As [`Slot::arrival`].
    arrival: u64,
    head: Head,
    written: u32,
}

/// What a queue that stopped leaves of its device: the requests that were given up and are not over. Dropping it waits
/// for them, for as long as that takes; none of the queue's memory is touched any more.
pub struct Leftover(#[expect(dead_code, reason = "held for its destructor")] Box<dyn Handler>);

impl<M: Memory> Queue<M> {
    /// A queue over `ring` with up to `depth` requests under way, which goes on with what `stopped` left.
    pub fn new(
        ring: DeviceQueue,
        depth: u16,
        memory: M,
        handler: Box<dyn Handler>,
        report: Box<dyn Report>,
        stopped: Stopped,
    ) -> Self {
        let (in_order, unseen, repeats) = (handler.is_in_order(), handler.starts_unseen(), handler.may_repeat());
        let requests = Requests { in_order, unseen, repeats, ..Requests::new(depth, stopped) };
        Self { ring, handler, memory, report, requests }
    }

    /// Does what there is to do, up to a bounded amount, and never waits. Chains that wait for translations are tried
    /// again as `look` says.
    ///
    /// # Errors
    /// [`Broken`] stops the queue for good; what is under way still completes by [`Queue::drain`].
    pub fn turn(&mut self, look: Look) -> Result<Turn, Broken> {
        let turn = self.visit(look);
        // After the visit: handing on is a system call, and a file system may take its time for it.
        self.handler.submit();
        turn
    }

    #[inline]
    fn visit(&mut self, look: Look) -> Result<Turn, Broken> {
        let Self { ring, memory, handler, report, requests } = self;
        let visit = memory.visit();
        let mut ring = ring.open(&visit);
        requests.ring_waits = false;
        let mut server = Server { visit: &visit, handler: &mut **handler, report: &mut **report };
        let mut turn = Turn { worked: requests.collect(&mut server), notify: false };

        // Room may have come about; whoever lacks it is tried before anything new is taken.
        let room = if std::mem::take(&mut requests.full) { Look::Quick } else { Look::Not };
        let look = look.max(requests.look).max(room);
        if look > Look::Not {
            turn.worked |= requests.retry(&mut server, look)?;
        }
        let mut bytes = 0;
        // Whether the driver may have made more available that the device has room for.
        let mut more = true;
        for _ in 0..TURN_REQUESTS / BATCH {
            if requests.full {
                more = false;
                break;
            }
            let (fetched, met) = requests.fetch(&visit, &mut ring);
            turn.worked |= !fetched.is_empty();
            for &token in &fetched {
                requests.admit(&mut server, token)?;
                bytes += requests.slots[usize::from(token)].len();
            }
            if requests.finished.len() >= SHOWN && !requests.unseen {
                requests.publish(&visit, &mut ring)?;
            }
            if met? == Met::End {
                more = requests.ring_waits;
                break;
            }
            if bytes >= TURN_BYTES {
                break;
            }
        }
        // These may have been all that a device had that takes buffers unseen. It gets those behind them first: the driver may
        // answer at once what it finds here. No honest driver has more of them than there are slots.
        if !requests.unseen || !more || requests.finished.len() >= requests.slots.len() {
            requests.publish(&visit, &mut ring)?;
        }
        turn.notify = requests.needs_notification(&visit, &mut ring)?;
        Ok(turn)
    }

    /// Asks the driver to say when it makes something available, if that could be taken, and the device when it completes
    /// something. `true`: one already has, so there is another turn to take before sleeping.
    ///
    /// # Errors
    /// As [`Queue::turn`].
    pub fn listen(&mut self) -> Result<bool, Broken> {
        let completed = self.listen_to_device();
        if self.requests.full || self.requests.free.is_empty() {
            // Whatever is available is not taken before there is room or a place for it, and then it is found.
            return Ok(completed);
        }
        let visit = self.memory.visit();
        let waits = &mut self.requests.ring_waits;
        let available = self.ring.open(&visit).enable_notifications();
        available.or_else(|stop| wait_or_break(stop, waits).map(|()| false)).map(|available| available || completed)
    }

    /// Asks the device alone, if it has something, or has no room for something. `true`: it has completed some already.
    pub fn listen_to_device(&mut self) -> bool {
        let requests = &mut self.requests;
        requests.listening = requests.under_way > 0 || requests.full;
        requests.listening && self.handler.listen()
    }

    /// Tells the driver that it need not say so.
    ///
    /// # Errors
    /// As [`Queue::turn`].
    pub fn ignore(&mut self) -> Result<(), Broken> {
        let visit = self.memory.visit();
        let waits = &mut self.requests.ring_waits;
        self.ring.open(&visit).disable_notifications().or_else(|stop| wait_or_break(stop, waits))
    }

    /// Whether something waits for translations: worth another try even if no news come. For room alone it is waited until
    /// the device tells.
    pub fn is_waiting(&self) -> bool {
        let requests = &self.requests;
        !requests.waiting.is_empty() && !requests.waits_for_room_alone()
            || !requests.back.is_empty()
            || requests.ring_waits
    }

    /// Whether the ring itself lacks a translation: then there may be chains, and none can be taken.
    pub fn ring_waits(&self) -> bool {
        self.requests.ring_waits
    }

    /// How many requests the device has under way.
    pub fn under_way(&self) -> usize {
        self.requests.under_way
    }

    /// Brings requests under way closer to their end without taking new ones; `true` when the device has none left, and has
    /// had those that came before one that it had. Those that lack a translation wait, for a queue that goes on from here:
    /// whoever waits for this to end may be who would bring it.
    pub fn drain(&mut self) -> bool {
        let Self { memory, handler, report, requests, .. } = self;
        let visit = memory.visit();
        let mut server = Server { visit: &visit, handler: &mut **handler, report: &mut **report };
        let mut worked = requests.collect(&mut server);
        worked |= requests.catch_up(&mut server);
        drop(visit);
        handler.submit();
        // Of requests in order those behind one that waits have not moved either.
        requests.under_way == 0 && !requests.full && (requests.back.is_empty() || !worked)
    }

    /// Takes back what the device has not begun, before the queue is drained.
    pub fn recall(&mut self) {
        let mut unbegun = Vec::new();
        self.handler.recall(&mut unbegun);
        for token in unbegun {
            let slot = &mut self.requests.slots[usize::from(token)];
            assert!(slot.stage == Stage::UnderWay, "the device gave back token {token}, which it did not have");
            slot.stage = Stage::New;
            self.requests.under_way -= 1;
            self.requests.waiting.push_back(token);
        }
    }

    /// Asks for everything that is under way to be given up.
    pub fn cancel(&mut self) {
        for (token, slot) in self.requests.slots.iter().enumerate() {
            if slot.stage == Stage::UnderWay {
                self.handler.cancel(token as Token);
            }
        }
    }

    /// Whether the device still has something, after [`Queue::cancel`]. What it lets go of is not looked at: the queue
    /// that goes on from here starts it anew.
    pub fn is_under_way(&mut self) -> bool {
        let Requests { slots, back, under_way, listening, .. } = &mut self.requests;
        let known = back.len();
        *listening = false;
        self.handler.submit();
        self.handler.completed(back);
        for back in &back[known..] {
            slots[usize::from(back.token)].stage = Stage::Back { readable_from: 0, writable_from: 0 };
            *under_way -= 1;
        }
        *under_way > 0
    }

    /// Becomes readable when the device has done something that it was asked to tell of since it was last looked at.
    /// `None`: it was asked nothing, and what its descriptor says is of what it had before.
    pub fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.requests.listening { self.handler.completion_fd() } else { None }
    }

    /// Puts what is done on the used ring, without taking anything new; `true` if the driver wants to be told.
    ///
    /// # Errors
    /// As [`Queue::turn`].
    pub fn flush(&mut self) -> Result<bool, Broken> {
        let visit = self.memory.visit();
        let mut ring = self.ring.open(&visit);
        self.requests.publish(&visit, &mut ring)?;
        let notify = self.requests.needs_notification(&visit, &mut ring)?;
        // Who stops does not come back to it: once too often does no harm.
        Ok(notify || self.requests.untold)
    }

    /// Tells whoever is told of faults that `broken` is one.
    pub fn report(&mut self, broken: &Broken) {
        if let Broken::Fault(fault) = broken {
            self.report.fault(*fault);
        }
    }

    /// Ends the queue: it touches no memory any more. What is done and could not be told the driver is kept, and what
    /// the device still has is given up, to be started anew by whoever goes on from here.
    pub fn stop(self) -> (Stopped, Leftover) {
        let Self { ring, mut handler, memory, requests, .. } = self;
        drop(memory);
        let Requests { slots, free, unpublished, finished, under_way, repeats, mut arrived, .. } = requests;
        let mut is_free = vec![false; slots.len()];
        free.iter().for_each(|&token| is_free[usize::from(token)] = true);
        let mut waiting = Vec::new();
        for (token, slot) in Vec::from(slots).into_iter().enumerate() {
            if is_free[token] {
                continue;
            }
            if let Stage::Back { .. } = slot.stage {
                handler.forget(token as Token);
            }
            waiting.push((slot.arrival, slot.chain));
        }
        // Who goes on from here begins with what came first.
        waiting.sort_unstable_by_key(|&(arrival, _)| arrival);
        if under_way > 0 {
            handler.abandon();
        }
        // The newest of those that were not pushed are the ring's again, if nobody minds that what is done is done again.
        let mut finished = Vec::from(finished);
        let mut unended: Vec<_> = waiting.iter().map(|(arrival, chain)| (*arrival, chain.head())).collect();
        if repeats {
            unended.extend(finished.iter().map(|finished| (finished.arrival, finished.head)));
        }
        arrived = newest_from(arrived, unended.iter().map(|&(arrival, _)| arrival).collect());
        let rewound = unended.iter().filter(|&&(arrival, _)| arrival >= arrived);
        let entries = rewound.map(|(_, head)| head.entries()).sum();
        waiting.retain(|&(arrival, _)| arrival < arrived);
        finished.retain(|finished| finished.arrival < arrived);
        // The driver does not see these yet, so they are pushed again, from where it sees the ring to be.
        let finished = [unpublished, finished].concat();
        (Stopped { position: ring.rewound(entries), waiting, finished, arrived }, Leftover(handler))
    }
}

/// Of so many chains that have arrived: from which on all are among `those`.
fn newest_from(arrived: u64, mut those: Vec<u64>) -> u64 {
    those.sort_unstable();
    let mut from = arrived;
    while those.pop().is_some_and(|arrival| arrival + 1 == from) {
        from -= 1;
    }
    from
}

/// A ring that lacks a translation is waited for; nothing else is.
fn wait_or_break(stop: RingStop, ring_waits: &mut bool) -> Result<(), Broken> {
    match stop {
        RingStop::Wait(_) => {
            *ring_waits = true;
            Ok(())
        }
        RingStop::Fault(fault) => Err(Broken::Fault(fault)),
        RingStop::Broken(error) => Err(Broken::Ring(error)),
    }
}

/// How a queue looks at the chains that wait for translations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Look {
    /// Not at all.
    #[default]
    Not,
    /// Quickly, after news: those whose last question seems to be answered are tried again.
    Quick,
    /// All of them are tried again, now and then: an answer may be taken away again before anybody has seen it.
    Thorough,
}

/// Everything that was taken off the ring and is not back on it.
struct Requests {
    slots: Box<[Slot]>,
    free: Vec<Token>,
    /// Chains without all of their translations, in order of arrival.
    waiting: VecDeque<Token>,
    /// Chains that came back from the device and were not looked at yet.
    back: Vec<Back>,
    /// Chains that are done and not on the used ring yet.
    finished: VecDeque<Finished>,
    /// Chains on the used ring that the driver can't see yet: an index, or flags, could not be reached.
    unpublished: Vec<Finished>,
    /// The driver can see some that it was not asked about yet whether it wants to be told of them.
    untold: bool,
    /// The last time something of the ring was wanted, its translation was missing.
    ring_waits: bool,
    /// Not all waiting chains were tried again that could have been.
    look: Look,
    /// The device has no room for the oldest chain that is ready: none that came later is offered to it.
    full: bool,
    /// The device was asked to say when it has done something, and was not looked at since.
    listening: bool,
    /// None overtakes another.
    in_order: bool,
    /// The device takes buffers before it is known where they are.
    unseen: bool,
    /// Any may be carried out again that the driver was not told of.
    repeats: bool,
    /// The driver is not told of those that came after this one, which waits for a translation: then all of them can be the
    /// ring's again, should the queue stop now. Whoever stops it may be who would bring the translation, and another
    /// process may be who goes on. Since when that is so.
    held: Option<(u64, Instant)>,
    /// Those that came before this one have been waited for in vain.
    overtaken: u64,
    under_way: usize,
    /// How many chains have been taken off the ring and are not its own again.
    arrived: u64,
}

/// A chain on its way, by token.
struct Slot {
    chain: Chain,
    readable: Vec<DetachedSlice>,
    writable: Vec<DetachedSlice>,
    stage: Stage,
    /// When its first missing translation was asked for.
    asked: Option<Ticket>,
    /// What it was last seen to lack.
    lacks: Option<Lack>,
    /// Counts up, chain by chain of the ring: who has the smaller number came first.
    arrival: u64,
}

/// How far a chain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The device has not seen it.
    New,
    /// The device has it, and none of its memory.
    UnderWay,
    /// The device has done what it could without its memory, and needs this much of it.
    Back { readable_from: u32, writable_from: u32 },
}

/// What a chain waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    /// A translation that was asked for: the last of several, because answers come in the order of questions. And
    /// [`Visit::verdicts`] before.
    Asked(BusAddr, Access, u64),
    /// One that there was no place to ask for.
    Unasked,
    /// Room in the device.
    Room,
    /// Nothing, and others come first.
    Turn,
}

/// Whether a chain is the next to go on where none may overtake another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It is, or that is no matter.
    First,
    /// Another one is before it.
    Behind,
}

/// Those a chain meets on its way to the device.
struct Server<'t, V> {
    visit: &'t V,
    handler: &'t mut dyn Handler,
    report: &'t mut dyn Report,
}

/// Why [`Requests::fetch`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Met {
    /// With as many chains as it takes.
    Full,
    /// There are no more for now, or no place for them.
    End,
}

/// A few tokens.
#[derive(Default)]
struct Batch {
    tokens: [Token; BATCH],
    len: usize,
}

impl Batch {
    fn push(&mut self, token: Token) {
        self.tokens[self.len] = token;
        self.len += 1;
    }

    fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<'b> IntoIterator for &'b Batch {
    type Item = &'b Token;
    type IntoIter = std::slice::Iter<'b, Token>;

    fn into_iter(self) -> Self::IntoIter {
        self.tokens[..self.len].iter()
    }
}

#[derive(Clone, Copy)]
enum Served {
    Done(u32),
    UnderWay,
    Waiting,
    NoRoom,
}

impl Requests {
    fn new(depth: u16, stopped: Stopped) -> Self {
        let Stopped { position: _, waiting, finished, arrived } = stopped;
        let mut waiting = waiting.into_iter();
        let restored = waiting.len().min(usize::from(depth)) as u16;
        let slots = (0..depth)
            .map(|_| {
                let (arrival, chain) = waiting.next().unwrap_or_default();
                let (readable, writable) = (Vec::new(), Vec::new());
                Slot { chain, readable, writable, stage: Stage::New, asked: None, lacks: None, arrival }
            })
            .collect();
        Self {
            slots,
            free: (restored..depth).rev().collect(),
            waiting: (0..restored).collect(),
            back: Vec::new(),
            finished: finished.into(),
            unpublished: Vec::new(),
            untold: false,
            ring_waits: false,
            look: Look::Not,
            full: false,
            listening: false,
            in_order: false,
            unseen: false,
            repeats: false,
            held: None,
            overtaken: 0,
            under_way: 0,
            arrived,
        }
    }

    /// Takes over what the device has done; `true` if there was something.
    fn collect<V: Visit>(&mut self, server: &mut Server<'_, V>) -> bool {
        if !std::mem::take(&mut self.listening) && self.under_way == 0 && self.back.is_empty() {
            return false;
        }
        let known = self.back.len();
        server.handler.completed(&mut self.back);
        for &Back { token, readable_from, writable_from } in &self.back[known..] {
            let slot = &mut self.slots[usize::from(token)];
            assert!(slot.stage == Stage::UnderWay, "the device gave back token {token}, which it did not have");
            slot.stage = Stage::Back { readable_from, writable_from };
            (slot.asked, slot.lacks) = (None, None);
            self.under_way -= 1;
        }
        let (mut count, mut bytes) = (0, 0);
        while bytes < TURN_BYTES
            && let Some(&Back { token, .. }) = self.back.get(count)
        {
            count += 1;
            let slot = &mut self.slots[usize::from(token)];
            bytes += slot.len();
            let served = slot.proceed(server, token, Place::First);
            if self.in_order && matches!(served, Served::Waiting) {
                count -= 1;
                self.ask_behind(server.visit, count + 1);
                break;
            }
            if !self.settle(server.visit, token, served) {
                self.free.push(token);
            }
        }
        self.back.drain(..count);
        count > 0
    }

    /// The chain before those at `from` waits, and they with it. What they lack is asked for now and not one by one.
    fn ask_behind<V: Visit>(&mut self, visit: &V, from: usize) {
        for &Back { token, readable_from, writable_from } in &self.back[from..] {
            let slot = &mut self.slots[usize::from(token)];
            if let Err(Stop::Miss(miss)) = slot.translate(visit, readable_from, writable_from) {
                slot.wait(miss);
            }
        }
    }

    /// Tries the chains again that wait for translations, oldest first; `true` if one got further.
    fn retry<V: Visit>(&mut self, server: &mut Server<'_, V>, look: Look) -> Result<bool, Broken> {
        let mut some = false;
        let mut at = 0;
        let mut bytes = 0;
        self.look = Look::Not;
        while let Some(&token) = self.waiting.get(at) {
            if bytes >= TURN_BYTES {
                self.look = self.look.max(look);
                break;
            }
            let slot = &mut self.slots[usize::from(token)];
            let barred = self.full && slot.stage == Stage::New;
            if barred || look < Look::Thorough && slot.still_lacks(server.visit) {
                at += 1;
                continue;
            }
            bytes += slot.len();
            let place = if self.in_order && at > 0 { Place::Behind } else { Place::First };
            match slot.serve(server, token, place)? {
                // No more can be asked for now, by the younger ones either.
                Served::Waiting if slot.lacks == Some(Lack::Unasked) => break,
                Served::Waiting => at += 1,
                Served::NoRoom => {
                    self.full = true;
                    at += 1;
                }
                served => {
                    some = true;
                    self.waiting.remove(at);
                    if !self.settle(server.visit, token, served) {
                        self.free.push(token);
                    }
                }
            }
        }
        Ok(some)
    }

    /// Whether no chain that waits lacks anything but room, which the device knows that it was asked for.
    fn waits_for_room_alone(&self) -> bool {
        let for_room = |&token: &Token| matches!(self.slots[usize::from(token)].lacks, Some(Lack::Room | Lack::Turn));
        self.full && self.waiting.iter().all(for_room)
    }

    /// The queue stops: tries those that wait and were overtaken. They can't be the ring's again, so nobody but who has them
    /// here would ever serve them. `true` if one got further; [`Requests::full`] if one lacks nothing but room.
    fn catch_up<V: Visit>(&mut self, server: &mut Server<'_, V>) -> bool {
        self.full = false;
        if self.in_order || self.waiting.is_empty() {
            return false;
        }
        let waiting = self.waiting.iter().map(|&token| &self.slots[usize::from(token)]);
        let news = waiting.filter(|slot| slot.stage == Stage::New).map(|slot| slot.arrival);
        // From here on nothing was begun.
        let begun = newest_from(self.arrived, news.collect());
        let mut some = false;
        let mut at = 0;
        while let Some(&token) = self.waiting.get(at) {
            let slot = &mut self.slots[usize::from(token)];
            let is_new = slot.stage == Stage::New;
            if is_new && (self.full || slot.arrival >= begun) || slot.still_lacks(server.visit) {
                at += 1;
                continue;
            }
            match slot.serve(server, token, Place::First) {
                // What is no chain is left to who finds the ring broken.
                Ok(Served::Waiting) | Err(_) => at += 1,
                Ok(Served::NoRoom) => {
                    self.full = true;
                    at += 1;
                }
                Ok(served) => {
                    some = true;
                    self.waiting.remove(at);
                    if !self.settle(server.visit, token, served) {
                        self.free.push(token);
                    }
                }
            }
        }
        some
    }

    /// Takes a few chains off the ring and has what they describe brought near: first the tables of those that have one,
    /// then where the device will look first and last. Their tokens, and why there are no more.
    #[inline]
    fn fetch<V: Visit>(&mut self, visit: &V, ring: &mut OpenQueue<'_, '_, V>) -> (Batch, Result<Met, Broken>) {
        let mut fetched = Batch::default();
        let mut met = Ok(Met::Full);
        while fetched.len < BATCH {
            let Some(&token) = self.free.last() else {
                met = Ok(Met::End);
                break;
            };
            let slot = &mut self.slots[usize::from(token)];
            match ring.pop(&mut slot.chain) {
                Ok(true) => {}
                Ok(false) => {
                    met = Ok(Met::End);
                    break;
                }
                Err(stop) => {
                    met = wait_or_break(stop, &mut self.ring_waits).map(|()| Met::End);
                    break;
                }
            }
            (slot.stage, slot.asked, slot.lacks, slot.arrival) = (Stage::New, None, None, self.arrived);
            self.arrived += 1;
            if let Some((table, _)) = slot.chain.table() {
                visit.approach(table, Access::Read);
            }
            self.free.pop();
            fetched.push(token);
        }
        for &token in &fetched {
            self.slots[usize::from(token)].approach(visit);
        }
        (fetched, met)
    }

    /// Serves a chain that was just taken off the ring.
    #[inline]
    fn admit<V: Visit>(&mut self, server: &mut Server<'_, V>, token: Token) -> Result<(), Broken> {
        let slot = &mut self.slots[usize::from(token)];
        if self.full {
            // One that came before it, of the same few, found no room.
            slot.lacks = Some(Lack::Room);
            self.waiting.push_back(token);
            return Ok(());
        }
        let place = if self.in_order && !self.waiting.is_empty() { Place::Behind } else { Place::First };
        let served = slot.serve(server, token, place);
        let needed = match served {
            Ok(served) => self.settle(server.visit, token, served),
            // It is no chain: nobody goes on with it.
            Err(_) => false,
        };
        if !needed {
            self.free.push(token);
        }
        served.map(drop)
    }

    /// Puts what is finished on the used ring, as far as the ring can be reached.
    #[inline]
    fn publish<V: Visit>(&mut self, visit: &V, ring: &mut OpenQueue<'_, '_, V>) -> Result<(), Broken> {
        let before = self.hold();
        let mut at = 0;
        while let Some(&Finished { arrival, head, written }) = self.finished.get(at) {
            if arrival >= before {
                at += 1;
                continue;
            }
            if let Err(stop) = ring.push(head, written) {
                wait_or_break(stop, &mut self.ring_waits)?;
                break;
            }
            // Nearly always the first: nothing has to move for that.
            self.unpublished.extend(if at == 0 { self.finished.pop_front() } else { self.finished.remove(at) });
        }
        if self.unpublished.is_empty() {
            return Ok(());
        }
        // A buffer may have another way to the driver than the ring.
        if let Err(stop) = visit.settle().map_err(RingStop::from).and_then(|()| ring.publish()) {
            return wait_or_break(stop, &mut self.ring_waits);
        }
        self.unpublished.clear();
        self.untold = true;
        Ok(())
    }

    /// The driver is told of those that arrived before the one with this number: see [`Requests::held`].
    #[inline]
    fn hold(&mut self) -> u64 {
        if self.waiting.is_empty() || self.finished.is_empty() || !self.repeats {
            self.held = None;
            return u64::MAX;
        }
        let waiting = self.waiting.iter().map(|&token| &self.slots[usize::from(token)]);
        // What lacks nothing but room has it before the queue stops.
        let lacking = waiting.filter(|slot| slot.arrival >= self.overtaken && slot.lacks != Some(Lack::Room));
        let oldest = lacking.map(|slot| slot.arrival).min();
        let Some(oldest) = oldest.filter(|&oldest| self.finished.iter().any(|finished| finished.arrival > oldest))
        else {
            self.held = None;
            return u64::MAX;
        };
        let since = match self.held {
            Some((held, since)) if held == oldest => since,
            _ => Instant::now(),
        };
        if since.elapsed() < HELD {
            self.held = Some((oldest, since));
            return oldest;
        }
        // Nor are those after it waited for: as many that never come would take as many times as long.
        (self.overtaken, self.held) = (self.arrived, None);
        u64::MAX
    }

    /// Whether the driver wants to be told of what was published since this was last asked.
    #[inline]
    fn needs_notification<V: Visit>(&mut self, visit: &V, ring: &mut OpenQueue<'_, '_, V>) -> Result<bool, Broken> {
        if !std::mem::take(&mut self.untold) {
            return Ok(false);
        }
        // The ring itself may have another way to the driver than the call, which must not be there before it.
        if let Err(stop) = visit.settle().map_err(RingStop::from) {
            self.untold = true;
            return wait_or_break(stop, &mut self.ring_waits).map(|()| false);
        }
        match ring.needs_notification() {
            Ok(notify) => Ok(notify),
            // Whether the driver wants to be told can't be seen now. Once too often does no harm.
            Err(stop) => wait_or_break(stop, &mut self.ring_waits).map(|()| true),
        }
    }

    /// Files a chain by what became of it; `true` if it goes on needing its slot.
    fn settle<V: Visit>(&mut self, visit: &V, token: Token, served: Served) -> bool {
        let slot = &mut self.slots[usize::from(token)];
        match served {
            Served::Done(written) => {
                slot.release(visit);
                if !visit.keeps() && !self.waiting.is_empty() {
                    // What was forgotten just now may be what another was waiting for, and was there already.
                    self.look = Look::Thorough;
                }
                self.finished.push_back(Finished { arrival: slot.arrival, head: slot.chain.head(), written });
                false
            }
            Served::UnderWay => {
                slot.stage = Stage::UnderWay;
                self.under_way += 1;
                true
            }
            Served::Waiting | Served::NoRoom => {
                self.full |= matches!(served, Served::NoRoom);
                self.waiting.push_back(token);
                true
            }
        }
    }
}

impl Slot {
    /// How many bytes the request moves.
    fn len(&self) -> u64 {
        u64::from(self.chain.readable_len()) + u64::from(self.chain.writable_len())
    }

    /// Whether what it was last seen to lack is still under way: a quick look before a whole new try.
    fn still_lacks<V: Visit>(&self, visit: &V) -> bool {
        match self.lacks {
            Some(Lack::Asked(addr, access, verdicts)) => !visit.may_have_changed(addr, access, verdicts),
            Some(Lack::Unasked | Lack::Room | Lack::Turn) | None => false,
        }
    }

    /// Reads the chain's table, if it has one and that is at hand, and has the header and the status brought near. What
    /// goes wrong goes wrong again in [`Slot::serve`], which says so.
    #[inline]
    fn approach<V: Visit>(&mut self, visit: &V) {
        if let Err(RingStop::Wait(miss)) = self.chain.expand(visit, self.asked) {
            self.asked.get_or_insert(miss.ticket);
        }
        if let [first, .., last] = self.chain.descriptors() {
            visit.approach(first.addr, first.access);
            visit.approach(last.addr, last.access);
        }
    }

    #[inline]
    fn serve<V: Visit>(&mut self, server: &mut Server<'_, V>, token: Token, place: Place) -> Result<Served, Broken> {
        if self.stage == Stage::New {
            match self.chain.expand(server.visit, self.asked) {
                Ok(()) => {}
                Err(RingStop::Wait(miss)) => {
                    // Where its buffers are is not known yet.
                    self.lacks = None;
                    return Ok(self.wait(miss));
                }
                Err(RingStop::Broken(error)) => return Err(Broken::Ring(error)),
                // The table that tells where the request's bytes are is itself out of reach: nobody can be told.
                Err(RingStop::Fault(fault)) => {
                    server.report.fault(fault);
                    return Ok(Served::Done(0));
                }
            }
        }
        Ok(self.proceed(server, token, place))
    }

    /// Takes a chain whose descriptors are all known to the device, or brings it back there.
    #[inline]
    fn proceed<V: Visit>(&mut self, server: &mut Server<'_, V>, token: Token, place: Place) -> Served {
        let (readable_from, mut writable_from) = match self.stage {
            Stage::New => (0, 0),
            Stage::Back { readable_from, writable_from } => (readable_from, writable_from),
            Stage::UnderWay => unreachable!("the device has token {token}"),
        };
        match self.translate(server.visit, readable_from, writable_from) {
            Ok(()) => {}
            Err(Stop::Miss(miss)) => {
                let is_seen = self.stage != Stage::New || self.chain.readable_len() > 0;
                if is_seen || !server.handler.starts_unseen() {
                    return self.wait(miss);
                }
                // If there is no room for it yet, it comes again, and has asked.
                self.asked.get_or_insert(miss.ticket);
                self.writable.clear();
                writable_from = self.chain.writable_len();
            }
            Err(Stop::Fault(fault)) => return self.fail(server, token, fault),
        }
        if place == Place::Behind {
            self.lacks = Some(Lack::Turn);
            return Served::Waiting;
        }
        // SAFETY: every piece was resolved in the visit that is still open.
        let request = unsafe {
            Request {
                readable: Pieces::new(&self.readable, readable_from, self.chain.readable_len()),
                writable: Pieces::new(&self.writable, writable_from, self.chain.writable_len()),
                buffers: self.chain.descriptors(),
            }
        };
        let outcome = match self.stage {
            Stage::New => server.handler.start(token, &request),
            _ => server.handler.go_on(token, &request),
        };
        match outcome {
            Outcome::Done(written) => Served::Done(written),
            Outcome::Pending => Served::UnderWay,
            Outcome::NoRoom => {
                assert!(self.stage == Stage::New, "the device has token {token}, and no room for it");
                self.lacks = Some(Lack::Room);
                Served::NoRoom
            }
        }
    }

    fn wait(&mut self, miss: Miss) -> Served {
        self.asked.get_or_insert(miss.ticket);
        Served::Waiting
    }

    /// Resolves every byte of the chain from there on. Goes on behind a miss, so that all misses are asked for at once,
    /// and ends at the first fault only when nothing is missing: before that it is not known whether the status byte can
    /// be reached.
    fn translate<V: Visit>(&mut self, visit: &V, readable_from: u32, writable_from: u32) -> Result<(), Stop> {
        for pieces in [&mut self.readable, &mut self.writable] {
            pieces.clear();
            // A chain may be of a million pieces; room for that is not kept in every slot.
            pieces.shrink_to(PIECES_KEPT);
        }
        let (mut missed, mut faulted) = (None, None);
        let mut misses = 0;
        self.lacks = None;
        // Before the first look, so that what is settled after it is noticed.
        let verdicts = visit.verdicts();
        let (mut skip_readable, mut skip_writable) = (u64::from(readable_from), u64::from(writable_from));
        'all: for descriptor in self.chain.descriptors() {
            let (pieces, skip) = match descriptor.access {
                Access::Read => (&mut self.readable, &mut skip_readable),
                Access::Write => (&mut self.writable, &mut skip_writable),
            };
            let len = u64::from(descriptor.len);
            let mut offset = len.min(*skip);
            *skip -= offset;
            while offset < len {
                let Some(at) = descriptor.addr.checked_add(offset) else {
                    let reason = FaultReason::Wraps;
                    faulted.get_or_insert(Fault { addr: descriptor.addr, access: descriptor.access, reason });
                    break;
                };
                match visit.resolve_part(at, (len - offset) as usize, descriptor.access, self.asked) {
                    Ok(piece) => {
                        offset += piece.len() as u64;
                        // Pages are translated one by one, and most of them follow each other here too.
                        let piece = piece.detach();
                        if !pieces.last_mut().is_some_and(|last| last.join(&piece)) {
                            pieces.push(piece);
                        }
                    }
                    Err(Stop::Miss(miss)) => {
                        misses += 1;
                        missed.get_or_insert(miss);
                        if miss.covers == Miss::NOTHING_ASKED {
                            self.lacks = Some(Lack::Unasked);
                            break 'all;
                        }
                        self.lacks = Some(Lack::Asked(at, descriptor.access, verdicts));
                        if misses == MISSES_AT_ONCE {
                            break 'all;
                        }
                        offset = offset.saturating_add(miss.covers.max(1));
                    }
                    Err(Stop::Fault(fault)) => {
                        faulted.get_or_insert(fault);
                        break;
                    }
                }
            }
        }
        if let Some(Lack::Asked(at, access, _)) = self.lacks {
            visit.wait_for(at, access);
        }
        match (missed, faulted) {
            (Some(miss), _) => Err(Stop::Miss(miss)),
            (None, Some(fault)) => Err(Stop::Fault(fault)),
            (None, None) => Ok(()),
        }
    }

    /// Lets the device say that the request failed, where it says such things.
    fn fail<V: Visit>(&mut self, server: &mut Server<'_, V>, token: Token, fault: Fault) -> Served {
        let (chain, asked) = (&self.chain, self.asked);
        let missed = Cell::new(None);
        let write = |offset: u32, from: &[u8]| match write_at(server.visit, chain, offset, from, asked) {
            Ok(()) => true,
            Err(Stop::Fault(_)) => false,
            Err(Stop::Miss(miss)) => {
                missed.set(Some(miss));
                false
            }
        };
        let writable_len = chain.writable_len();
        let written = server.handler.unreachable(&Unreachable { writable_len, write: &write });
        if let Some(miss) = missed.get() {
            // What `translate` resolved a moment ago was taken away since.
            return self.wait(miss);
        }
        if let Stage::Back { .. } = self.stage {
            server.handler.forget(token);
        }
        server.report.fault(fault);
        Served::Done(written)
    }

    /// The request is over: whoever keeps translations for requests alone has no more use for its.
    #[inline]
    fn release<V: Visit>(&self, visit: &V) {
        if !visit.keeps() {
            let ranges = self.chain.descriptors().iter().map(|descriptor| (descriptor.addr, descriptor.len));
            visit.release(&ranges.chain(self.chain.table()).collect::<Vec<_>>());
        }
    }
}

/// Writes into the writable part of `chain`, descriptor by descriptor.
fn write_at<V: Visit>(
    visit: &V,
    chain: &Chain,
    offset: u32,
    mut from: &[u8],
    asked: Option<Ticket>,
) -> Result<(), Stop> {
    let mut skip = offset;
    for descriptor in chain.descriptors().iter().filter(|descriptor| descriptor.access == Access::Write) {
        if skip >= descriptor.len {
            skip -= descriptor.len;
            continue;
        }
        let (here, rest) = from.split_at(from.len().min((descriptor.len - skip) as usize));
        let wraps = Fault { addr: descriptor.addr, access: Access::Write, reason: FaultReason::Wraps };
        copy_to_bus(visit, descriptor.addr.checked_add(skip.into()).ok_or(wraps)?, here, asked)?;
        (from, skip) = (rest, 0);
        if from.is_empty() {
            break;
        }
    }
    Ok(())
}
