//! A wrapped back-end as a device, and the thread that looks after the connection to it.

use crate::bounce::Bounce;
use crate::link::{self, Announce, Link, LinkError, Profile};
use crate::seat::Seat;
use crate::{OnError, Options};
use ringfence_device::{Device, Handler, eventfd as eventfds};
use ringfence_ring::Format;
use ringfence_vhost_user::client::ClientError;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often an absent back-end is looked for.
const RETRY: Duration = Duration::from_millis(50);
/// How long one is left alone that was there and could not be used, or that had to be hung up on.
const PENANCE: Duration = Duration::from_secs(1);
/// How often silence is looked for.
const TICK: Duration = Duration::from_secs(1);
/// How long a request is unanswered before the log says so.
const REMARKABLE: Duration = Duration::from_secs(30);
/// As much of the configuration space as is remembered for when nobody can be asked.
const CONFIG: usize = 256;

/// A back-end behind the IOMMU: a [`Device`] for one front-end, with a connection to the back-end for as long as it lives.
pub struct Wrapped {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

/// What the queues' threads, the session's and the keeper share.
pub(crate) struct Shared {
    pub(crate) options: Options,
    profile: Profile,
    /// The device type's features that the driver is offered.
    features: u64,
    announce: Arc<Announce>,
    /// Wakes the keeper.
    bell: OwnedFd,
    end: AtomicBool,
    /// The back-end misbehaved, and is not to be heard again.
    stopped: AtomicBool,
    state: Mutex<State>,
    /// The queues that run. Locked after `state`, and never for long: queues' threads need it too.
    seats: Mutex<Vec<Option<Arc<Seat>>>>,
    /// A connection that is being made, to hang up on when all ends.
    dialing: Mutex<Option<UnixStream>>,
}

struct State {
    /// Gone while there is no back-end.
    link: Option<Arc<Link>>,
    /// What the driver took.
    taken: Option<u64>,
    status: u8,
    /// The configuration space as last seen.
    config: Vec<u8>,
    /// How often anything changed that a back-end has to be told: what `taken` and `status` are, which queues run.
    changes: u64,
}

impl Wrapped {
    /// Connects to the back-end, which is waited for as long as [`Options::patience`] says.
    ///
    /// # Errors
    /// Nobody answers there, or not as a back-end of use.
    pub fn open(options: Options) -> Result<Self, LinkError> {
        let announce = Arc::default();
        let (link, profile) = first_link(&options, &announce)?;
        tell_profile(&options, profile);
        let config = remember(&link);
        let kind = options.kind;
        let shared = Arc::new(Shared {
            profile,
            features: profile.offered & kind.features() & !kind.mistaken(profile.offered, &config),
            announce,
            bell: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            end: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            state: Mutex::new(State { config, link: Some(Arc::new(link)), taken: None, status: 0, changes: 0 }),
            seats: Mutex::new((0..profile.queues).map(|_| None).collect()),
            dialing: Mutex::new(None),
            options,
        });
        let keeper = std::thread::Builder::new().name("wrap".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || keep(&shared)
        })?;
        Ok(Self { shared, keeper: Some(keeper) })
    }
}

impl Drop for Wrapped {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        eventfds::ring(self.shared.bell.as_fd());
        if let Some(stream) = &*lock(&self.shared.dialing) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        let kept = self.keeper.take().expect("joined only here").join();
        assert!(kept.is_ok() || std::thread::panicking(), "the thread that keeps the connection panicked");
    }
}

fn first_link(options: &Options, announce: &Arc<Announce>) -> Result<(Link, Profile), LinkError> {
    let deadline = Instant::now() + options.patience;
    let mut told = false;
    loop {
        let error = match link::dial(&options.backend).and_then(|stream| Link::new(stream, options, announce)) {
            Ok(found) => return Ok(found),
            // One that is there and can't be used does not get better.
            Err(error @ (LinkError::Lacks { .. } | LinkError::Memory(_))) => return Err(error),
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            return Err(error);
        }
        if !std::mem::replace(&mut told, true) {
            tracing::info!("waiting for the back-end: {error}");
        }
        std::thread::sleep(RETRY);
    }
}

fn tell_profile(options: &Options, Profile { offered, queues }: Profile) {
    let kind = options.kind;
    tracing::info!(
        queues,
        features = format_args!("{offered:#x}"),
        "the back-end at {} is taken for a {kind} device",
        options.backend.display()
    );
    let withheld = kind.withheld(offered);
    if withheld != 0 {
        tracing::info!(
            "features {withheld:#x} of the back-end are not passed on: what they let it do with memory is not known here"
        );
    }
}

/// As much as there is of the configuration space: some back-ends refuse who asks for more than they have.
fn remember(link: &Link) -> Vec<u8> {
    let sizes = (0..=CONFIG.ilog2()).rev().map(|power| 1usize << power);
    let mut known = Vec::new();
    // From the top down to what is there, then up to where it ends.
    for step in sizes {
        if let Ok(config) = link.config(known.len() + step) {
            known = config;
            if known.len() >= CONFIG {
                break;
            }
        }
    }
    known
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device for Wrapped {
    fn name(&self) -> &'static str {
        self.shared.options.kind.name()
    }

    fn id(&self) -> u16 {
        self.shared.options.kind.id()
    }

    fn features(&self) -> u64 {
        self.shared.features
    }

    fn queues(&self) -> u16 {
        self.shared.profile.queues
    }

    fn queue_groups(&self) -> u16 {
        self.shared.profile.queues / self.shared.options.kind.group()
    }

    fn config(&self) -> Vec<u8> {
        self.shared.fit(lock(&self.shared.state).config.clone())
    }

    fn read_config(&self, offset: u32, len: u32) -> Option<Vec<u8>> {
        self.shared.read_config(offset as usize, len as usize)
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        let link = lock(&self.shared.state).link.clone();
        let link = link.ok_or_else(|| io::Error::other("the back-end is gone"))?;
        link.write_config(offset, data).map_err(io::Error::other)
    }

    fn watch_config(&self, changed: Box<dyn Fn() + Send + Sync>) {
        self.shared.announce.set(changed);
    }

    fn take(&self, features: u64) -> io::Result<()> {
        let state = &mut *lock(&self.shared.state);
        state.taken = Some(features);
        state.changes += 1;
        match &state.link {
            Some(link) => refused_or_gone(link, link.agree(self.shared.options.kind, features)),
            None => Ok(()),
        }
    }

    fn set_status(&self, status: u8) {
        let state = &mut *lock(&self.shared.state);
        state.status = status;
        state.changes += 1;
        if let Some(link) = &state.link {
            tell_failure(link.set_status(status));
        }
    }

    fn reset(&self) {
        let state = &mut *lock(&self.shared.state);
        (state.status, state.taken) = (0, None);
        state.changes += 1;
        if let Some(link) = &state.link {
            tell_failure(link.reset());
        }
    }

    fn open_queue(self: Arc<Self>, index: u16, depth: u16, features: u64) -> io::Result<Box<dyn Handler>> {
        let shared = &self.shared;
        let size = match shared.options.format {
            Format::Split => depth.checked_next_power_of_two().unwrap_or(1 << 15),
            Format::Packed => depth,
        };
        let seat = Arc::new(Seat::new(index, size)?);
        let handler = Bounce::new(Arc::clone(shared), Arc::clone(&seat), depth)?;
        let state = &mut *lock(&shared.state);
        state.taken = Some(features);
        state.changes += 1;
        if let Some(link) = &state.link {
            let started = link.agree(shared.options.kind, features).and_then(|()| link.start(&seat));
            let started = started.map(|ring| seat.move_to(ring));
            refused_or_gone(link, started)?;
        }
        lock(&shared.seats)[usize::from(index)] = Some(seat);
        Ok(Box::new(handler))
    }
}

/// A back-end that says no is not asked again; one that does not answer is hung up on, and another one asked.
fn refused_or_gone(link: &Link, result: Result<(), LinkError>) -> io::Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(error @ LinkError::Client { error: ClientError::Channel { .. } | ClientError::Broken, .. }) => {
            tell_hang_up(link, &error);
            Ok(())
        }
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Ends a connection that is of no use any more.
pub(crate) fn tell_hang_up(link: &Link, error: &LinkError) {
    if link.hang_up() {
        tracing::warn!("hung up on the back-end: {error}");
    }
}

fn tell_failure(result: Result<(), ClientError>) {
    if let Err(error) = result {
        tracing::warn!("the back-end: {error}");
    }
}

impl Shared {
    /// Whether the back-end is not to be heard again.
    #[inline]
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// The back-end at the other end of `link` broke a rule.
    pub(crate) fn misbehaved(&self, link: &Link, queue: u16, what: &str) {
        if self.options.on_error == OnError::Stop {
            // Before anybody notices that the connection has ended.
            self.stopped.store(true, Ordering::Release);
        }
        if !link.hang_up() {
            return;
        }
        let consequence = match self.options.on_error {
            OnError::Reconnect => "hung up, and asking again",
            OnError::Stop => "hung up; the device stands still from now on",
        };
        tracing::error!(queue, "the back-end misbehaves: {what}; {consequence}");
        if self.options.on_error == OnError::Stop {
            lock(&self.seats).iter().flatten().for_each(|seat| seat.ring());
        }
    }

    /// Wakes the thread of `queue`, for which there is room now.
    pub(crate) fn wake(&self, queue: Option<u16>) {
        if let Some(seat) = queue.and_then(|queue| lock(&self.seats)[usize::from(queue)].clone()) {
            seat.ring();
        }
    }

    /// `seat`'s thread ends, whose ring is at `current`, with so many requests `unended` there.
    pub(crate) fn leave(&self, seat: &Arc<Seat>, current: Option<&Arc<Link>>, unended: usize) {
        // Nobody starts queues meanwhile.
        let mut state = lock(&self.state);
        state.changes += 1;
        lock(&self.seats)[usize::from(seat.index)].take_if(|there| Arc::ptr_eq(there, seat));
        // The last that it was to move to: it may not have come to that.
        let next = seat.take_next();
        let Some(link) = next.as_ref().map(|ring| &ring.link).or(current) else { return };
        if next.is_none() && unended > 0 {
            // It may still write to its memory: nothing else may be there. So it loses all of it.
            if link.hang_up() {
                tracing::warn!(
                    queue = seat.index,
                    "the queue stops, and the back-end does not end {unended} requests: hung up; they are asked again \
                     when the queue goes on"
                );
            }
        } else if let Err(error) = link.stop(seat.index) {
            tell_hang_up(link, &error);
        }
    }

    /// `len` bytes of the configuration space from `offset`, from the back-end if it can be asked.
    fn read_config(&self, offset: usize, len: usize) -> Option<Vec<u8>> {
        let (link, known) = {
            let state = lock(&self.state);
            (state.link.clone(), state.config.len())
        };
        // From the start on, whatever is asked: some back-ends know no offsets. And no more than it has.
        let end = (offset + len).min(known);
        let fresh = link.and_then(|link| link.config(end).ok());
        let state = &mut *lock(&self.state);
        // It may have become another's meanwhile.
        if let (Some(fresh), Some(known)) = (fresh, state.config.get_mut(..end)) {
            known.copy_from_slice(&fresh);
        }
        if state.config.is_empty() {
            return None;
        }
        let config = self.fit(state.config.clone());
        Some((offset..offset + len).map(|at| config.get(at).copied().unwrap_or(0)).collect())
    }

    /// The configuration space as it is for a device of as many queues as there are.
    fn fit(&self, mut config: Vec<u8>) -> Vec<u8> {
        let groups = self.profile.queues / self.options.kind.group();
        let field = self.options.kind.queue_count_field().and_then(|at| config.get_mut(at..at + 2));
        if let Some(field) = field {
            let has = u16::from_le_bytes([field[0], field[1]]);
            field.copy_from_slice(&has.min(groups).to_le_bytes());
        }
        config
    }
}

/// Looks after the connection until the device ends.
fn keep(shared: &Shared) {
    let mut silence = Silence::default();
    while !shared.end.load(Ordering::Acquire) {
        let link = lock(&shared.state).link.clone();
        match link {
            Some(link) => {
                if is_over(shared, &link) {
                    drop(link);
                    lost(shared);
                } else {
                    silence.look(shared, &link);
                }
            }
            None if shared.is_stopped() => {
                let _ = poll(&mut [PollFd::new(&shared.bell, PollFlags::IN)], None);
            }
            None => {
                silence = Silence::default();
                reconnect(shared);
            }
        }
    }
}

/// Waits for the end of `link` for a while; whether it came.
fn is_over(shared: &Shared, link: &Link) -> bool {
    let mut fds = [PollFd::new(&shared.bell, PollFlags::IN), PollFd::new(link.socket(), PollFlags::RDHUP)];
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: TICK.as_secs() as i64, tv_nsec: 0 }));
    !fds[1].revents().is_empty()
}

/// There is no back-end any more.
fn lost(shared: &Shared) {
    let link = lock(&shared.state).link.take();
    if let Some(link) = link {
        if link.hang_up() {
            tracing::warn!("the back-end is gone; waiting for it at {}", shared.options.backend.display());
        } else {
            // It had to go. Whoever is there may be the same.
            pause(shared, PENANCE);
        }
    }
}

/// Sleeps for `time`, or less if all ends.
fn pause(shared: &Shared, time: Duration) {
    let timeout = Timespec::try_from(time).ok();
    let _ = poll(&mut [PollFd::new(&shared.bell, PollFlags::IN)], timeout.as_ref());
}

/// Tries once to have a back-end again.
fn reconnect(shared: &Shared) {
    let stream = match link::dial(&shared.options.backend) {
        Ok(stream) => stream,
        Err(_) => return pause(shared, RETRY),
    };
    *lock(&shared.dialing) = stream.try_clone().ok();
    // Whoever ends everything rings first and hangs up then, so one of the two is seen.
    let made = if shared.end.load(Ordering::Acquire) { None } else { Some(install(shared, stream)) };
    *lock(&shared.dialing) = None;
    if let Some(Err(error)) = made {
        tracing::warn!("can't use the back-end: {error}; trying again");
        pause(shared, PENANCE);
    }
}

/// Has the back-end at the other end of `stream` do what the last one did. Where the VMM wants something else before that
/// is done there is no back-end yet, and the next try is for what it wants then.
fn install(shared: &Shared, stream: UnixStream) -> Result<(), LinkError> {
    let kind = shared.options.kind;
    let path = || shared.options.backend.clone();
    let (link, profile) = Link::new(stream, &shared.options, &shared.announce)?;
    let lacks = shared.features & !profile.offered;
    if lacks != 0 {
        return Err(LinkError::Changed { path: path(), what: format!("features {lacks:#x}") });
    }
    if profile.queues < shared.profile.queues {
        let what = format!("{} of {} queues", shared.profile.queues - profile.queues, shared.profile.queues);
        return Err(LinkError::Changed { path: path(), what });
    }
    let link = Arc::new(link);
    let config = remember(&link);
    // It may take its time to answer: nobody else waits for it meanwhile.
    let (taken, status, seats, changes) = {
        let state = lock(&shared.state);
        let seats: Vec<_> = lock(&shared.seats).iter().flatten().cloned().collect();
        (state.taken, state.status, seats, state.changes)
    };
    let mut rings = Vec::new();
    if let Some(taken) = taken {
        link.agree(kind, taken)?;
        for seat in seats {
            let ring = link.start(&seat)?;
            rings.push((seat, ring));
        }
        if status != 0 {
            link.set_status(status).map_err(|error| LinkError::Client { path: path(), error })?;
        }
    }
    let state = &mut *lock(&shared.state);
    if state.changes != changes {
        // What it was told is not what is so now. Another connection is told anew.
        return Ok(());
    }
    let running = rings.len();
    rings.into_iter().for_each(|(seat, ring)| seat.move_to(ring));
    state.link = Some(link);
    let changed = std::mem::replace(&mut state.config, config) != state.config;
    tracing::info!(queues = running, "the back-end is there again; what it has not answered is asked again");
    if changed {
        shared.announce.tell();
    }
    Ok(())
}

/// What is known of who does not answer.
#[derive(Default)]
struct Silence {
    /// By queue: its oldest request, since when, and whether the log knows.
    oldest: Vec<(u64, Option<Instant>, bool)>,
}

impl Silence {
    fn look(&mut self, shared: &Shared, link: &Link) {
        let seats: Vec<_> = lock(&shared.seats).iter().flatten().cloned().collect();
        self.oldest.resize(usize::from(shared.profile.queues), (0, None, false));
        for seat in seats {
            let (before, since, told) = &mut self.oldest[usize::from(seat.index)];
            let oldest = seat.oldest.load(Ordering::Relaxed);
            if oldest != *before || oldest == 0 {
                (*before, *since, *told) = (oldest, Some(Instant::now()), false);
                continue;
            }
            let time = since.get_or_insert_with(Instant::now).elapsed();
            if shared.options.timeout.is_some_and(|timeout| time >= timeout) {
                shared.misbehaved(link, seat.index, &format!("a request has no answer in {} s", time.as_secs()));
                *since = None;
            } else if time >= REMARKABLE && !std::mem::replace(told, true) {
                tracing::warn!(
                    queue = seat.index,
                    "the back-end has not answered a request in {} s; waiting",
                    time.as_secs()
                );
            }
        }
    }
}
