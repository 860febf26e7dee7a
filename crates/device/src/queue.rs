//! The engine that serves one queue of any device: it takes chains off the ring, has them translated, hands them to
//! the device's [`Handler`], and puts what is used back.
//!
//! A chain that lacks a translation waits aside and holds no lease, so that it stops neither its neighbours nor whoever
//! takes translations away; everything it lacks has been asked for at once. A chain that touches what it must not is
//! failed alone. A chain that breaks the rules of rings stops the queue.

use crate::{Handler, Outcome, Pieces, Request, Token, Unreachable};
use ringfence_dma::{
    Access, BusAddr, DetachedSlice, Fault, FaultReason, Memory, Miss, Stop, Ticket, Visit, copy_to_bus,
};
use ringfence_ring::{Chain, DeviceQueue, Head, OpenQueue, Position, RingError, RingStop};
use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

/// Most requests of one turn, and most bytes: a turn is a visit, and whoever takes translations away waits for it.
const TURN_REQUESTS: usize = 64;
const TURN_BYTES: u64 = 1 << 20;

/// Most translations that one chain asks for at a time: a driver may describe 4 GiB with one descriptor, and what asks
/// its VMM for each page of that keeps the VMM from everything else.
const MISSES_AT_ONCE: usize = 1024;

/// Room for so many pieces is kept in each slot.
const PIECES_KEPT: usize = 1024;

/// One queue of a device, being served from one thread.
pub struct Queue<M: Memory> {
    ring: DeviceQueue,
    // Before the memory, also when a panic drops all of it: a handler waits for what it has under way.
    handler: Box<dyn Handler>,
    memory: M,
    report: Box<dyn Report>,
    requests: Requests<M::Lease>,
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
#[derive(Debug)]
pub struct Stopped {
    /// Where to go on in the ring.
    pub position: Position,
    waiting: Vec<Chain>,
    finished: Vec<(Head, u32)>,
}

impl Stopped {
    /// A queue that has not run yet.
    pub fn at(position: Position) -> Self {
        Self { position, waiting: Vec::new(), finished: Vec::new() }
    }

    /// Whether some chain was begun and not ended.
    pub fn is_unfinished(&self) -> bool {
        !self.waiting.is_empty() || !self.finished.is_empty()
    }
}

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
        Self { ring, handler, memory, report, requests: Requests::new(depth, stopped) }
    }

    /// Does what there is to do, up to a bounded amount, and never waits. `news`: translations may have arrived since
    /// the last turn, so chains that wait for some are tried again.
    ///
    /// # Errors
    /// [`Broken`] stops the queue for good; what is under way still completes by [`Queue::drain`].
    pub fn turn(&mut self, news: bool) -> Result<Turn, Broken> {
        let Self { ring, memory, handler, report, requests } = self;
        let visit = memory.visit();
        let mut ring = ring.open(&visit);
        requests.ring_waits = false;
        let mut turn = Turn { worked: requests.collect(&visit, &mut **handler), notify: false };

        let mut server = Server { visit: &visit, handler: &mut **handler, report: &mut **report };
        if news || requests.retry_more {
            turn.worked |= requests.retry(&mut server)?;
        }
        let mut bytes = 0;
        for _ in 0..TURN_REQUESTS {
            let Some(&token) = requests.free.last() else { break };
            match ring.pop(&mut requests.slots[usize::from(token)].chain) {
                Ok(true) => {}
                Ok(false) => break,
                Err(stop) => {
                    wait_or_break(stop, &mut requests.ring_waits)?;
                    break;
                }
            }
            turn.worked = true;
            requests.admit(&mut server, token)?;
            bytes += requests.slots[usize::from(token)].len();
            if bytes >= TURN_BYTES {
                break;
            }
        }
        server.handler.submit();

        turn.notify = requests.publish(&mut ring)?;
        Ok(turn)
    }

    /// Asks the driver to say when it makes something available. `true`: it already has, so there is another turn to
    /// take before sleeping.
    ///
    /// # Errors
    /// As [`Queue::turn`].
    pub fn listen(&mut self) -> Result<bool, Broken> {
        let visit = self.memory.visit();
        let waits = &mut self.requests.ring_waits;
        self.ring.open(&visit).enable_notifications().or_else(|stop| wait_or_break(stop, waits).map(|()| false))
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

    /// Whether something waits for translations: worth another try even if no news come.
    pub fn is_waiting(&self) -> bool {
        !self.requests.waiting.is_empty() || self.requests.ring_waits
    }

    /// Whether the ring itself lacks a translation: then there may be chains, and none can be taken.
    pub fn ring_waits(&self) -> bool {
        self.requests.ring_waits
    }

    /// How many requests the device has under way.
    pub fn under_way(&self) -> usize {
        self.requests.under_way
    }

    /// Brings requests under way closer to their end without taking new ones; `true` when none is left.
    pub fn drain(&mut self) -> bool {
        let Self { memory, handler, requests, .. } = self;
        let visit = memory.visit();
        handler.submit();
        requests.collect(&visit, &mut **handler);
        drop(visit);
        requests.under_way == 0
    }

    /// Becomes readable when a request under way is done.
    pub fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.handler.completion_fd()
    }

    /// Puts what is done on the used ring, without taking anything new; `true` if the driver wants to be told.
    ///
    /// # Errors
    /// As [`Queue::turn`].
    pub fn flush(&mut self) -> Result<bool, Broken> {
        let visit = self.memory.visit();
        self.requests.publish(&mut self.ring.open(&visit))
    }

    /// Ends the queue, which has been drained. What is done and could not be told the driver is kept.
    pub fn stop(self) -> Stopped {
        assert_eq!(self.requests.under_way, 0, "a queue stops when it is drained");
        let Requests { slots, waiting, finished, .. } = self.requests;
        let mut slots = Vec::from(slots);
        Stopped {
            position: self.ring.position(),
            waiting: waiting.iter().map(|&token| std::mem::take(&mut slots[usize::from(token)].chain)).collect(),
            finished: finished.into(),
        }
    }
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

/// Everything that was taken off the ring and is not back on it.
struct Requests<L> {
    slots: Box<[Slot<L>]>,
    free: Vec<Token>,
    /// Chains without all of their translations, in order of arrival.
    waiting: VecDeque<Token>,
    /// Chains that are done and not on the used ring yet.
    finished: VecDeque<(Head, u32)>,
    unpublished: bool,
    /// The last time something of the ring was wanted, its translation was missing.
    ring_waits: bool,
    /// Not all waiting chains were tried again that could have been.
    retry_more: bool,
    under_way: usize,
    /// Kept for its capacity.
    done: Vec<Token>,
}

/// A chain on its way, by token.
struct Slot<L> {
    chain: Chain,
    readable: Vec<DetachedSlice>,
    writable: Vec<DetachedSlice>,
    /// When its first missing translation was asked for.
    asked: Option<Ticket>,
    /// What it was last seen to lack.
    lacks: Option<Lack>,
    /// Held while the device has the request.
    lease: Option<L>,
}

/// What a chain waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    /// A translation that was asked for: the last of several, because answers come in the order of questions.
    Asked(BusAddr, Access),
    /// One that there was no place to ask for.
    Unasked,
}

/// Those a chain meets on its way to the device.
struct Server<'t, V> {
    visit: &'t V,
    handler: &'t mut dyn Handler,
    report: &'t mut dyn Report,
}

enum Served<L> {
    Done(u32),
    UnderWay(L),
    Waiting,
}

impl<L> Requests<L> {
    fn new(depth: u16, stopped: Stopped) -> Self {
        let mut waiting = stopped.waiting.into_iter();
        let finished = stopped.finished.into();
        let restored = waiting.len().min(usize::from(depth)) as u16;
        let slots = (0..depth)
            .map(|_| Slot {
                chain: waiting.next().unwrap_or_default(),
                readable: Vec::new(),
                writable: Vec::new(),
                asked: None,
                lacks: None,
                lease: None,
            })
            .collect();
        Self {
            slots,
            free: (restored..depth).rev().collect(),
            waiting: (0..restored).collect(),
            finished,
            unpublished: false,
            ring_waits: false,
            retry_more: false,
            under_way: 0,
            done: Vec::with_capacity(depth.into()),
        }
    }

    /// Takes over what the device has completed; `true` if there was something.
    fn collect<V: Visit<Lease = L>>(&mut self, visit: &V, handler: &mut dyn Handler) -> bool {
        if self.under_way == 0 {
            return false;
        }
        handler.completed(&mut self.done);
        let some = !self.done.is_empty();
        for token in self.done.drain(..) {
            let slot = &mut self.slots[usize::from(token)];
            let lease = slot.lease.take().expect("the device completed a request that it had");
            // SAFETY: `lease`, dropped below, covers every piece.
            let written = handler.finish(token, &unsafe { slot.request() });
            drop(lease);
            slot.release(visit);
            self.under_way -= 1;
            self.finished.push_back((slot.chain.head(), written));
            self.free.push(token);
        }
        some
    }

    /// Tries the chains again that wait for translations, oldest first; `true` if one got further.
    fn retry<V: Visit<Lease = L>>(&mut self, server: &mut Server<'_, V>) -> Result<bool, Broken> {
        let mut some = false;
        let mut at = 0;
        let mut bytes = 0;
        self.retry_more = false;
        while let Some(&token) = self.waiting.get(at) {
            if bytes >= TURN_BYTES {
                self.retry_more = true;
                break;
            }
            let slot = &mut self.slots[usize::from(token)];
            if slot.still_lacks(server.visit) {
                at += 1;
                continue;
            }
            bytes += slot.len();
            match slot.serve(server, token)? {
                // No more can be asked for now, by the younger ones either.
                Served::Waiting if slot.lacks == Some(Lack::Unasked) => break,
                Served::Waiting => at += 1,
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

    /// Serves the chain just popped into the slot of `token`, the last of the free ones.
    fn admit<V: Visit<Lease = L>>(&mut self, server: &mut Server<'_, V>, token: Token) -> Result<(), Broken> {
        let slot = &mut self.slots[usize::from(token)];
        (slot.asked, slot.lacks) = (None, None);
        let served = slot.serve(server, token)?;
        if self.settle(server.visit, token, served) {
            self.free.pop();
        }
        Ok(())
    }

    /// Puts what is finished on the used ring, as far as the ring can be reached; `true` if the driver wants to be told.
    fn publish<V: Visit>(&mut self, ring: &mut OpenQueue<'_, '_, V>) -> Result<bool, Broken> {
        while let Some(&(head, written)) = self.finished.front() {
            if let Err(stop) = ring.push(head, written) {
                wait_or_break(stop, &mut self.ring_waits)?;
                break;
            }
            self.finished.pop_front();
            self.unpublished = true;
        }
        if !self.unpublished {
            return Ok(false);
        }
        if let Err(stop) = ring.publish() {
            return wait_or_break(stop, &mut self.ring_waits).map(|()| false);
        }
        self.unpublished = false;
        match ring.needs_notification() {
            Ok(notify) => Ok(notify),
            // Whether the driver wants to be told can't be seen now. Once too often does no harm.
            Err(stop) => wait_or_break(stop, &mut self.ring_waits).map(|()| true),
        }
    }

    /// Files a chain by what became of it; `true` if it goes on needing its slot.
    fn settle<V: Visit<Lease = L>>(&mut self, visit: &V, token: Token, served: Served<L>) -> bool {
        let slot = &mut self.slots[usize::from(token)];
        match served {
            Served::Done(written) => {
                slot.release(visit);
                self.finished.push_back((slot.chain.head(), written));
                false
            }
            Served::UnderWay(lease) => {
                slot.lease = Some(lease);
                self.under_way += 1;
                true
            }
            Served::Waiting => {
                self.waiting.push_back(token);
                true
            }
        }
    }
}

impl<L> Slot<L> {
    /// How many bytes the request moves.
    fn len(&self) -> u64 {
        u64::from(self.chain.readable_len()) + u64::from(self.chain.writable_len())
    }

    /// Whether what it was last seen to lack is still under way: a quick look before a whole new try.
    fn still_lacks<V: Visit>(&self, visit: &V) -> bool {
        match self.lacks {
            Some(Lack::Asked(addr, access)) => {
                matches!(visit.resolve(addr, 1, access, self.asked), Err(Stop::Miss(_)))
            }
            Some(Lack::Unasked) | None => false,
        }
    }

    fn serve<V: Visit<Lease = L>>(&mut self, server: &mut Server<'_, V>, token: Token) -> Result<Served<L>, Broken> {
        match self.chain.expand(server.visit, self.asked) {
            Ok(()) => {}
            Err(RingStop::Wait(miss)) => return Ok(self.wait(miss)),
            Err(RingStop::Broken(error)) => return Err(Broken::Ring(error)),
            // The table that tells where the request's bytes are is itself out of reach: nobody can be told.
            Err(RingStop::Fault(fault)) => {
                server.report.fault(fault);
                return Ok(Served::Done(0));
            }
        }
        match self.translate(server.visit) {
            Ok(()) => {}
            Err(Stop::Miss(miss)) => return Ok(self.wait(miss)),
            Err(Stop::Fault(fault)) => return Ok(self.fail(server, fault)),
        }
        // SAFETY: every piece was resolved in the visit that is still open.
        let request = unsafe { self.request() };
        Ok(match server.handler.start(token, &request) {
            Outcome::Done(written) => Served::Done(written),
            // Taken while the visit is open, so there is no moment at which the pieces are unprotected.
            Outcome::Pending => Served::UnderWay(self.lease(server.visit)),
        })
    }

    fn wait(&mut self, miss: Miss) -> Served<L> {
        self.asked.get_or_insert(miss.ticket);
        Served::Waiting
    }

    /// Resolves every byte of the chain. Goes on behind a miss, so that all misses are asked for at once, and ends at
    /// the first fault only when nothing is missing: before that it is not known whether the status byte can be reached.
    fn translate<V: Visit>(&mut self, visit: &V) -> Result<(), Stop> {
        for pieces in [&mut self.readable, &mut self.writable] {
            pieces.clear();
            // A chain may be of a million pieces; room for that is not kept in every slot.
            pieces.shrink_to(PIECES_KEPT);
        }
        let (mut missed, mut faulted) = (None, None);
        let mut misses = 0;
        self.lacks = None;
        for descriptor in self.chain.descriptors() {
            let pieces = match descriptor.access {
                Access::Read => &mut self.readable,
                Access::Write => &mut self.writable,
            };
            let (mut offset, len) = (0, u64::from(descriptor.len));
            while offset < len {
                let Some(at) = descriptor.addr.checked_add(offset) else {
                    let reason = FaultReason::Wraps;
                    faulted.get_or_insert(Fault { addr: descriptor.addr, access: descriptor.access, reason });
                    break;
                };
                match visit.resolve(at, (len - offset) as usize, descriptor.access, self.asked) {
                    Ok(piece) => {
                        pieces.push(piece.detach());
                        offset += piece.len() as u64;
                    }
                    Err(Stop::Miss(miss)) => {
                        misses += 1;
                        let first = *missed.get_or_insert(miss);
                        if miss.covers == Miss::NOTHING_ASKED {
                            self.lacks = Some(Lack::Unasked);
                            return Err(Stop::Miss(first));
                        }
                        self.lacks = Some(Lack::Asked(at, descriptor.access));
                        if misses == MISSES_AT_ONCE {
                            return Err(Stop::Miss(first));
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
        match (missed, faulted) {
            (Some(miss), _) => Err(Stop::Miss(miss)),
            (None, Some(fault)) => Err(Stop::Fault(fault)),
            (None, None) => Ok(()),
        }
    }

    /// Lets the device say that the request failed, where it says such things.
    fn fail<V: Visit>(&mut self, server: &mut Server<'_, V>, fault: Fault) -> Served<L> {
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
        server.report.fault(fault);
        Served::Done(written)
    }

    fn lease<V: Visit<Lease = L>>(&self, visit: &V) -> L {
        // On the stack for all but the longest chains; a lease may be wider than needed, never narrower.
        let mut ranges = [(BusAddr(0), 0); 32];
        let descriptors = self.chain.descriptors();
        if descriptors.len() <= ranges.len() {
            for (range, descriptor) in ranges.iter_mut().zip(descriptors) {
                *range = (descriptor.addr, descriptor.len);
            }
            visit.lease(&ranges[..descriptors.len()])
        } else {
            visit.lease(&descriptors.iter().map(|descriptor| (descriptor.addr, descriptor.len)).collect::<Vec<_>>())
        }
    }

    /// The request is over: whoever keeps translations for requests alone has no more use for its.
    #[inline]
    fn release<V: Visit>(&self, visit: &V) {
        if !visit.keeps() {
            let ranges = self.chain.descriptors().iter().map(|descriptor| (descriptor.addr, descriptor.len));
            visit.release(&ranges.chain(self.chain.table()).collect::<Vec<_>>());
        }
    }

    /// # Safety
    /// The pieces are good for all of `'l`: the visit that resolved them is open, or they are leased.
    unsafe fn request<'l>(&'l self) -> Request<'l> {
        // SAFETY: by this function's contract, for both.
        unsafe {
            Request {
                readable: Pieces::new(&self.readable, self.chain.readable_len()),
                writable: Pieces::new(&self.writable, self.chain.writable_len()),
            }
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
