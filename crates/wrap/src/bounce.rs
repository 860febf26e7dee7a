//! One queue: its driver's requests on a ring of ours, their bytes in the bounce pool.

use crate::arena::{Arena, Which};
use crate::device::{Shared, tell_hang_up};
use crate::kind::Kind;
use crate::link::Incarnation;
use crate::pool::{Extent, PAGE};
use crate::seat::Seat;
use ringfence_device::{Back, Handler, Outcome, Request, Token, Unreachable, eventfd};
use ringfence_dma::Access;
use ringfence_ring::{AddError, Descriptor, Indirect, IndirectTable};
use ringfence_vhost_user::Limit;
use rustix::event::{Timespec, epoll};
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What one descriptor takes up in a table.
const DESCRIPTOR: usize = 16;

/// A queue of a wrapped back-end, used from the queue's thread.
pub(crate) struct Bounce {
    shared: Arc<Shared>,
    kind: Kind,
    seat: Arc<Seat>,
    /// The ring at the back-end. It may be one that is gone: then what is put there waits for the next.
    at: Option<Incarnation>,
    /// [`Seat::moves`] when that was taken.
    moves: u64,
    /// Readable when the seat's bell or the back-end rings.
    events: OwnedFd,
    /// The back-end was asked to ring.
    listening: bool,
    /// Something was added since the back-end was told.
    added: bool,
    /// The back-end broke this ring.
    broken: bool,
    /// The back-end has stopped this ring.
    at_rest: bool,
    /// It stands in line for room in a pool.
    in_line: bool,
    /// And was sent away without, since it last looked whether it still wants some.
    sent_away: bool,
    /// By token.
    requests: Box<[Sent]>,
    /// By what the ring calls them.
    by_ring: Box<[Token]>,
    /// What was sent and must be answered, in order, and perhaps was since.
    order: VecDeque<(u64, Token)>,
    /// What is over and was not handed on yet.
    over: Vec<Token>,
    /// What was with a back-end that is gone, in order, to be sent again.
    again: VecDeque<Token>,
    numbered: u64,
    /// The chain being made; kept for its capacity.
    chain: Vec<Descriptor>,
    /// For what there may be as many of as requests.
    complaints: Limit,
}

/// A request that the back-end has, by token.
#[derive(Debug)]
struct Sent {
    state: State,
    /// Counts up from 1.
    number: u64,
    which: Which,
    /// Its pages, if it has any.
    extent: Option<Extent>,
    /// The arena that these are in, where it is not that of now.
    home: Option<Arc<Arena>>,
    layout: Layout,
    /// Success means that every writable byte was written.
    fills_all: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The token is free.
    Free,
    /// The back-end has it, or will again.
    Sent,
    /// The back-end says that it wrote so many bytes.
    Answered(u32),
    /// It will get no answer.
    Failed,
    /// The queue stops, and nobody waits for the answer any more.
    GivenUp,
}

/// Where a request's bytes are in its extent: its descriptor table if it has one, then the buffers, which are cut as the
/// driver cut them, because there are back-ends that make something of it.
#[derive(Debug, Default)]
struct Layout {
    buffers: Vec<Placed>,
    table: bool,
    len: usize,
    /// How many bytes the back-end is to read.
    readable: u32,
}

/// A buffer in an extent.
#[derive(Clone, Copy, Debug)]
struct Placed {
    offset: usize,
    len: u32,
    access: Access,
}

impl Layout {
    fn plan(&mut self, buffers: &[Descriptor], indirect: Indirect) {
        self.buffers.clear();
        self.table = indirect == Indirect::Allowed && buffers.len() > 1;
        // Headers and status bytes first, beside the table: each would cost a page among aligned buffers.
        let mut end = if self.table { DESCRIPTOR * buffers.len() } else { 0 };
        for &Descriptor { len, access, .. } in buffers {
            let mut offset = 0;
            if len < SMALL {
                offset = end.next_multiple_of(alignment(len));
                end = offset + len as usize;
            }
            self.buffers.push(Placed { offset, len, access });
        }
        for buffer in self.buffers.iter_mut().filter(|buffer| buffer.len >= SMALL) {
            buffer.offset = end.next_multiple_of(alignment(buffer.len));
            end = buffer.offset + buffer.len as usize;
        }
        self.len = end;
        self.readable = buffers.iter().filter(|buffer| buffer.access == Access::Read).map(|buffer| buffer.len).sum();
    }

    fn pages(&self) -> usize {
        self.len.div_ceil(PAGE)
    }

    /// Up to `len` bytes of one half, as few stretches as they make: where each begins in that half, its offset in the
    /// extent and its length.
    fn stretches(&self, access: Access, len: u32, mut each: impl FnMut(u32, usize, usize)) {
        let (mut begin, mut offset, mut run, mut at) = (0, 0, 0usize, 0u32);
        for buffer in self.buffers.iter().filter(|buffer| buffer.access == access) {
            let here = buffer.len.min(len - at);
            if offset + run == buffer.offset {
                run += here as usize;
            } else {
                if run > 0 {
                    each(begin, offset, run);
                }
                (begin, offset, run) = (at, buffer.offset, here as usize);
            }
            at += here;
        }
        if run > 0 {
            each(begin, offset, run);
        }
    }

    /// The offset of the last writable byte.
    fn last(&self) -> Option<usize> {
        self.buffers
            .last()
            .filter(|buffer| buffer.access == Access::Write)
            .map(|last| last.offset + last.len as usize - 1)
    }
}

/// Sectors and pages are aligned to themselves: a back-end may hand them to storage that insists on it.
fn alignment(len: u32) -> usize {
    (1usize << len.trailing_zeros().min(PAGE.trailing_zeros())).max(DESCRIPTOR)
}

/// Less than a sector.
const SMALL: u32 = 512;

/// What came of placing a request on the ring.
enum Placing {
    Placed,
    NoRoom,
    /// It can't ever be placed.
    TooLarge,
}

impl Bounce {
    /// A queue with up to `depth` requests under way.
    pub(crate) fn new(shared: Arc<Shared>, seat: Arc<Seat>, depth: u16) -> io::Result<Self> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&events, &seat.bell, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        let sent = || Sent {
            state: State::Free,
            number: 0,
            which: Which::Requests,
            extent: None,
            home: None,
            layout: Layout::default(),
            fills_all: false,
        };
        Ok(Self {
            kind: shared.options.kind,
            at: None,
            moves: seat.moves(),
            events,
            listening: false,
            added: false,
            broken: false,
            at_rest: false,
            in_line: false,
            sent_away: false,
            requests: (0..depth).map(|_| sent()).collect(),
            by_ring: vec![0; usize::from(seat.size)].into(),
            order: VecDeque::with_capacity(depth.into()),
            over: Vec::new(),
            again: VecDeque::new(),
            numbered: 0,
            chain: Vec::new(),
            complaints: Limit::new(),
            shared,
            seat,
        })
    }

    /// Copies a request into the pool and puts it on the ring.
    fn send(&mut self, token: Token, request: &Request<'_>) -> Placing {
        let Some(at) = &self.at else { return Placing::NoRoom };
        let sent = &mut self.requests[usize::from(token)];
        sent.layout.plan(request.buffers, at.link.rules.indirect);
        sent.which = match request.readable.is_empty() && self.kind.has_standing() {
            true => Which::Standing,
            false => Which::Requests,
        };
        sent.fills_all = self.kind.fills_all(request);
        let arena = Arc::clone(&at.link.arena);
        let placing = self.place(token, |layout, start| {
            layout.stretches(Access::Read, request.readable.len(), |begin, offset, len| {
                let copied = request.readable.copy_to(begin, arena.slice(start + offset, len));
                assert!(copied, "a layout of other buffers than the request's");
            });
        });
        if let Placing::Placed = placing {
            self.numbered += 1;
            let sent = &mut self.requests[usize::from(token)];
            (sent.state, sent.number) = (State::Sent, self.numbered);
            if sent.which == Which::Requests {
                if self.order.is_empty() {
                    self.seat.oldest.store(self.numbered, Ordering::Relaxed);
                }
                self.order.push_back((self.numbered, token));
            }
        }
        placing
    }

    /// Gives a planned request pages, has them filled, and puts it on the ring.
    fn place(&mut self, token: Token, fill: impl FnOnce(&Layout, usize)) -> Placing {
        let Self { at: Some(at), chain, requests, by_ring, .. } = self else { return Placing::NoRoom };
        let Sent { which, layout, extent: place, .. } = &mut requests[usize::from(token)];
        let arena = &*at.link.arena;
        let pool = arena.pool(*which, self.seat.index);
        let entries = if layout.table { 1 } else { layout.buffers.len() };
        // No chain is longer than its queue, in a table or not.
        if layout.pages() > pool.pages() || layout.buffers.len() > usize::from(at.ring.size()) {
            return Placing::TooLarge;
        }
        // Before the pool is asked: who has room there and not here would keep it from the others.
        if self.broken || usize::from(at.ring.free()) < entries {
            return Placing::NoRoom;
        }
        let Some((extent, next)) = pool.take(self.seat.index, layout.pages()) else {
            (self.in_line, self.sent_away) = (true, true);
            return Placing::NoRoom;
        };
        self.shared.wake(next);
        let start = extent.offset();
        *place = Some(extent);
        fill(layout, start);
        if let (Some(status), Some(last)) = (self.kind.status(), layout.last()) {
            // A back-end that never writes it has not succeeded.
            arena.slice(start + last, 1).write(0, &[status.failed]);
        }
        chain.clear();
        chain.extend(layout.buffers.iter().map(|&Placed { offset, len, access }| Descriptor {
            addr: arena.addr(start + offset),
            len,
            access,
        }));
        let table = layout
            .table
            .then(|| IndirectTable { memory: arena.slice(start, DESCRIPTOR * chain.len()), addr: arena.addr(start) });
        match at.ring.add(chain, table) {
            Ok(on_ring) => {
                by_ring[on_ring.index()] = token;
                self.added = true;
                if *which == Which::Standing {
                    // Before the driver hears of those whose place it takes: it may answer at once, and there are back-ends
                    // that drop what they have to say then if there is no buffer for it.
                    at.ring.publish();
                }
                Placing::Placed
            }
            Err(error) => {
                let next = place.take().and_then(|extent| pool.give(extent));
                self.shared.wake(next);
                match error {
                    AddError::Full { .. } | AddError::Poisoned(_) => Placing::NoRoom,
                    error => unreachable!("a chain that the driver could make available: {error}"),
                }
            }
        }
    }

    /// Takes over what the back-end says it has done.
    fn collect(&mut self) {
        let Some(at) = &mut self.at else { return };
        while !self.broken {
            match at.ring.take_used() {
                Ok(Some(used)) => {
                    let token = self.by_ring[used.token.index()];
                    let sent = &mut self.requests[usize::from(token)];
                    match sent.state {
                        State::Sent => self.over.push(token),
                        // Handed on when it was.
                        State::GivenUp => {}
                        state => unreachable!("the ring gives back what it was given, and not what is {state:?}"),
                    }
                    sent.state = State::Answered(used.written);
                }
                Ok(None) => break,
                Err(error) => {
                    self.broken = true;
                    self.shared.misbehaved(&at.link, self.seat.index, &format!("it breaks its ring: {error}"));
                }
            }
        }
        if !self.over.is_empty() {
            self.note_oldest();
        }
    }

    fn note_oldest(&mut self) {
        while let Some(&(number, token)) = self.order.front() {
            let sent = &self.requests[usize::from(token)];
            if sent.state == State::Sent && sent.number == number {
                break;
            }
            self.order.pop_front();
        }
        let oldest = self.order.front().map_or(0, |&(number, _)| number);
        self.seat.oldest.store(oldest, Ordering::Relaxed);
    }

    /// Goes to the ring at another back-end, if there is one, with all that the last one has not answered.
    #[inline]
    fn keep_up(&mut self) {
        if self.seat.moves() != self.moves {
            self.move_on();
        }
        if !self.again.is_empty() {
            self.send_again();
        }
    }

    #[cold]
    fn move_on(&mut self) {
        self.moves = self.seat.moves();
        let Some(next) = self.seat.take_next() else { return };
        // What was done before the old one went is done.
        self.collect();
        if let Some(old) = self.at.take() {
            let _ = epoll::delete(&self.events, &old.call);
            let mut placed = Vec::new();
            for (sent, token) in self.requests.iter_mut().zip(0..) {
                if sent.extent.is_some() && sent.home.is_none() {
                    sent.home = Some(Arc::clone(&old.link.arena));
                    match sent.state {
                        State::Sent => placed.push((sent.number, token)),
                        State::GivenUp => sent.state = State::Failed,
                        _ => {}
                    }
                }
            }
            placed.sort_unstable();
            // What was placed is older than what had yet to be.
            placed.into_iter().rev().for_each(|(_, token)| self.again.push_front(token));
        }
        // Edges: nothing is ever read from it, so the back-end can't make a read of ours wait.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        if let Err(error) = epoll::add(&self.events, &next.call, epoll::EventData::new_u64(1), flags) {
            tracing::error!(queue = self.seat.index, "the back-end's calls go unheard: {error}");
        }
        self.at = Some(next);
        (self.listening, self.added, self.broken, self.at_rest) = (false, false, false, false);
        if !self.again.is_empty() {
            tracing::info!(queue = self.seat.index, "{} unfinished requests are sent again", self.again.len());
        }
    }

    /// Sends again what has yet to be, as far as there is room.
    fn send_again(&mut self) {
        while let Some(&token) = self.again.front() {
            let Some(at) = &self.at else { return };
            let arena = Arc::clone(&at.link.arena);
            let sent = &mut self.requests[usize::from(token)];
            if sent.state != State::Sent {
                self.again.pop_front();
                continue;
            }
            // Its bytes are where they were, in memory that the back-end of now does not have.
            let (old, home) = (sent.extent.take(), sent.home.take());
            let placing = self.place(token, |layout, start| {
                let (Some(old), Some(home)) = (&old, &home) else {
                    unreachable!("it was with a back-end that is gone")
                };
                layout.stretches(Access::Read, u32::MAX, |_, offset, len| {
                    arena.slice(start + offset, len).copy_from(0, home.slice(old.offset() + offset, len));
                });
            });
            let sent = &mut self.requests[usize::from(token)];
            match placing {
                Placing::Placed => {}
                Placing::NoRoom => {
                    (sent.extent, sent.home) = (old, home);
                    return;
                }
                Placing::TooLarge => {
                    sent.state = State::Failed;
                    self.over.push(token);
                }
            }
            self.again.pop_front();
        }
    }

    /// Gives up on all that is with the back-end.
    fn fail_all(&mut self) {
        if self.kind.status().is_none() && self.kind != Kind::Fs {
            // There is no way to say that it failed.
            return;
        }
        for (sent, token) in self.requests.iter_mut().zip(0..).filter(|(sent, _)| sent.state == State::Sent) {
            // The back-end may still write there, so the pages stay taken.
            (sent.state, sent.extent, sent.home) = (State::Failed, None, None);
            self.over.push(token);
        }
        self.again.clear();
        self.note_oldest();
    }

    /// The request is over, and its pages free; those of an arena that is gone are gone with it.
    fn release(&mut self, token: Token) {
        let sent = &mut self.requests[usize::from(token)];
        sent.state = State::Free;
        if let (Some(extent), None, Some(at)) = (sent.extent.take(), sent.home.take(), &self.at) {
            let next = at.link.arena.give(sent.which, self.seat.index, extent);
            self.shared.wake(next.filter(|&queue| queue != self.seat.index));
        }
    }

    /// Whoever stands in line and wants no room any more, as for a request whose memory has gone since, would keep all those
    /// behind him waiting for as long as he asks for none.
    #[cold]
    fn leave_line(&mut self) {
        self.in_line = false;
        if let Some(at) = &self.at {
            for which in [Which::Requests, Which::Standing] {
                self.shared.wake(at.link.arena.pool(which, self.seat.index).leave(self.seat.index));
            }
        }
    }

    /// How many requests the back-end has, waited for or not.
    fn unended(&self) -> usize {
        self.requests.iter().filter(|sent| matches!(sent.state, State::Sent | State::GivenUp)).count()
    }
}

impl Handler for Bounce {
    fn is_in_order(&self) -> bool {
        self.kind.is_in_order()
    }

    fn may_repeat(&self) -> bool {
        self.kind.may_repeat()
    }

    fn starts_unseen(&self) -> bool {
        self.kind.has_standing()
    }

    fn start(&mut self, token: Token, request: &Request<'_>) -> Outcome {
        if self.shared.is_stopped() {
            return match self.kind {
                Kind::Blk | Kind::Fs => Outcome::Done(self.kind.fail(request)),
                Kind::Net | Kind::Generic => Outcome::NoRoom,
            };
        }
        self.keep_up();
        if !self.again.is_empty() {
            return Outcome::NoRoom;
        }
        match self.send(token, request) {
            Placing::Placed => Outcome::Pending,
            Placing::NoRoom => Outcome::NoRoom,
            Placing::TooLarge => {
                if let Some(untold) = self.complaints.tell() {
                    tracing::warn!(
                        queue = self.seat.index,
                        untold,
                        buffers = request.buffers.len(),
                        bytes = u64::from(request.readable.len()) + u64::from(request.writable.len()),
                        "a request is larger than the pool or longer than its queue, and fails; see --pool"
                    );
                }
                Outcome::Done(self.kind.fail(request))
            }
        }
    }

    fn unreachable(&mut self, request: &Unreachable<'_>) -> u32 {
        self.kind.fail_unreachable(request)
    }

    fn submit(&mut self) {
        if self.in_line && !std::mem::take(&mut self.sent_away) {
            self.leave_line();
        }
        if std::mem::take(&mut self.added)
            && let Some(at) = &mut self.at
            && at.ring.needs_kick()
        {
            at.kick();
        }
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        if std::mem::take(&mut self.listening) {
            eventfd::hush(self.seat.bell.as_fd());
            // Takes the edge of the back-end's call; whatever the answer, the ring tells.
            let mut seen = [const { MaybeUninit::uninit() }; 2];
            let _ = epoll::wait(&self.events, &mut seen, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
            if let Some(at) = &mut self.at {
                at.ring.disable_callbacks();
            }
        }
        if self.shared.is_stopped() {
            self.fail_all();
        } else {
            self.keep_up();
            self.collect();
        }
        // What was to be read has been; all that may be written is wanted.
        let requests = &self.requests;
        back.extend(self.over.drain(..).map(|token| Back {
            token,
            readable_from: requests[usize::from(token)].layout.readable,
            writable_from: 0,
        }));
    }

    fn go_on(&mut self, token: Token, request: &Request<'_>) -> Outcome {
        let sent = &self.requests[usize::from(token)];
        let arena = sent.home.as_ref().or(self.at.as_ref().map(|at| &at.link.arena));
        let written = match (sent.state, &sent.extent, arena) {
            (State::Answered(written), Some(extent), Some(arena)) => {
                let delivered = deliver(self.kind, sent, (arena, extent.offset()), written, request);
                delivered.unwrap_or_else(|complaint| {
                    if let Some(untold) = self.complaints.tell() {
                        tracing::warn!(queue = self.seat.index, untold, "{complaint}; the request fails");
                    }
                    self.kind.fail(request)
                })
            }
            _ => self.kind.fail(request),
        };
        self.release(token);
        Outcome::Done(written)
    }

    fn forget(&mut self, token: Token) {
        // The back-end may still write to the pages of one that was given up.
        if self.requests[usize::from(token)].state != State::GivenUp {
            self.release(token);
        }
    }

    fn recall(&mut self, unbegun: &mut Vec<Token>) {
        let standing = |sent: &Sent| sent.which == Which::Standing && sent.state == State::Sent;
        let Some(at) = &self.at else { return };
        if !self.requests.iter().any(standing) {
            return;
        }
        match at.link.stop(self.seat.index) {
            Ok(()) => self.at_rest = true,
            Err(error) => tell_hang_up(&at.link, &error),
        }
        // What came until then came; after that nothing does.
        self.collect();
        for token in 0..self.requests.len() as Token {
            let sent = &mut self.requests[usize::from(token)];
            if standing(sent) {
                if !self.at_rest {
                    // Its arena ends with its connection.
                    (sent.extent, sent.home) = (None, None);
                }
                self.release(token);
                unbegun.push(token);
            }
        }
    }

    fn cancel(&mut self, token: Token) {
        let sent = &mut self.requests[usize::from(token)];
        if sent.state == State::Sent {
            sent.state = State::GivenUp;
            self.over.push(token);
        }
    }

    fn listen(&mut self) -> bool {
        self.listening = true;
        match &mut self.at {
            // One that breaks its ring is noticed where it is collected; once all has stopped nothing is.
            Some(at) if !self.broken && !self.shared.is_stopped() => at.ring.enable_callbacks().unwrap_or(true),
            _ => false,
        }
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.events.as_fd())
    }
}

/// Copies what the back-end wrote, `written` bytes as it says, from `start` in its arena to the driver's memory. How many
/// bytes the driver is told of.
fn deliver(
    kind: Kind,
    sent: &Sent,
    (arena, start): (&Arena, usize),
    written: u32,
    request: &Request<'_>,
) -> Result<u32, String> {
    let len = request.writable.len();
    let copy = |count: u32| {
        sent.layout.stretches(Access::Write, count, |begin, offset, len| {
            let copied = request.writable.copy_from(begin, arena.slice(start + offset, len));
            assert!(copied, "a layout of other buffers than the request's");
        });
    };
    let (Some(status), Some(at)) = (kind.status(), sent.layout.last()) else {
        let count = written.min(len);
        copy(count);
        return Ok(count);
    };
    let last = len - 1;
    let mut said = [0];
    arena.slice(start + at, 1).read(0, &mut said);
    // After a failure there is nothing to see, and the pages hold what was there before.
    let count = if said == [status.ok] { written.min(last) } else { 0 };
    if said == [status.ok] && sent.fills_all && count < last {
        return Err(format!("the back-end says that a read went well, of which it wrote {count} of {last} bytes"));
    }
    copy(count);
    request.writable.write(last, &said);
    // Counted from the first byte, which takes the status in only where all before it was written too.
    Ok(if count == last { len } else { count })
}

impl Drop for Bounce {
    fn drop(&mut self) {
        self.leave_line();
        let current = self.at.as_ref().map(|at| &at.link);
        let left = if self.at_rest && self.unended() == 0 { None } else { current };
        self.shared.leave(&self.seat, left, self.unended());
    }
}
