//! The thread that serves a queue: busy while there is work, for a short while after, and then asleep until the driver
//! rings, a translation arrives or storage completes.

use crate::Bell;
use crate::eventfd::{hush, ring};
use crate::queue::{Broken, Look, Queue, Stopped};
use ringfence_dma::Memory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a queue sleeps at the most while a chain waits for translations. News wake it; this is for news that were
/// lost.
const WAITING_NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// How often everything that waits is looked at thoroughly.
const RETRY: Duration = Duration::from_millis(5);

/// How long a queue sleeps that nobody wakes.
const LOOKING_NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// How long a queue that has to end at once waits for its storage.
const HURRY: Duration = Duration::from_secs(1);

/// How long requests that were cancelled are waited for.
const GRACE: Duration = Duration::from_millis(250);

/// How long a thread may take beyond all that. Its visits to memory are short, unless memory itself does not answer; but
/// a busy host may not let it run for a while.
pub const VISIT: Duration = Duration::from_secs(10);

/// How often an empty queue is looked at between two looks at the clock.
const LOOKS: u32 = 32;

/// A queue's thread.
#[derive(Debug)]
pub struct Worker {
    control: Arc<Control>,
    /// When it was told to.
    told: Option<Instant>,
    /// Gone once it has been waited for.
    thread: Option<JoinHandle<()>>,
}

/// How others reach a queue's thread.
#[derive(Debug)]
pub struct Control {
    event: OwnedFd,
    sleeping: AtomicBool,
    news: AtomicBool,
    stop: AtomicBool,
    /// For how long storage is waited for when the queue stops, in nanoseconds: [`Bells::patience`], or less by now.
    patience: AtomicU64,
    end: Mutex<Option<End>>,
    /// Readable once the thread touches no memory any more.
    ended: OwnedFd,
    call: Mutex<Call>,
}

/// How the driver is told of what was used.
#[derive(Debug, Default)]
struct Call {
    bell: Option<Bell>,
    /// It was to be told, and there was no way.
    untold: bool,
}

/// What a queue's thread is given besides the queue.
#[derive(Debug)]
pub struct Bells {
    /// Readable when the driver made something available. `None`: the driver does not ring, so the queue is looked at
    /// time and again.
    pub kick: Option<OwnedFd>,
    /// Written when the queue broke.
    pub error: Option<OwnedFd>,
    /// For how long an empty queue is looked at before the thread sleeps, at the most: it is less while that is of no use.
    pub poll: Duration,
    /// For how long storage is waited for when the queue stops. Then what it has is cancelled; and what can't be is left
    /// to itself: it has none of the queue's memory.
    pub patience: Duration,
}

/// How a queue's thread ended.
#[derive(Debug)]
struct End {
    stopped: Stopped,
    /// Whether its storage has let go of everything, so that the thread is gone in a moment.
    rests: bool,
}

/// A queue's thread has not come back from a visit to memory: the memory itself does not answer, as that of a file
/// system whose server hangs. Whoever gave it has to take it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck;

impl Control {
    /// For one worker.
    ///
    /// # Errors
    /// No file descriptor was to be had.
    pub fn new(call: Option<OwnedFd>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            sleeping: AtomicBool::new(false),
            news: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            patience: AtomicU64::new(u64::MAX),
            end: Mutex::new(None),
            ended: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            call: Mutex::new(Call { bell: call.map(Bell::new), untold: false }),
        }))
    }

    /// Translations may have arrived.
    pub fn tell_news(&self) {
        self.news.store(true, Ordering::Relaxed);
        self.rouse();
    }

    /// From now on the driver is told by `call`; `None`: it looks by itself. When this returns the one before is not rung any
    /// more, so that whoever has both misses nothing.
    pub fn set_call(&self, call: Option<OwnedFd>) {
        let mut current = self.call();
        current.bell = call.map(Bell::new);
        if current.untold && current.bell.is_some() {
            current.tell();
        }
    }

    /// Tells the driver that something was used.
    pub fn tell(&self) {
        self.call().tell();
    }

    fn call(&self) -> MutexGuard<'_, Call> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Storage is waited for no longer than this: who knows that it hangs need not wait for it again.
    fn shorten(&self, patience: Duration) {
        self.patience.fetch_min(u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn patience(&self) -> Duration {
        Duration::from_nanos(self.patience.load(Ordering::Relaxed))
    }

    fn rouse(&self) {
        // Orders the flag set before this call before the look at `sleeping`; its twin in `nap` orders `sleeping`
        // before the look at the flags. One of the two sides sees the other.
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            ring(self.event.as_fd());
        }
    }
}

impl Call {
    fn tell(&mut self) {
        self.untold = self.bell.is_none();
        if let Some(bell) = &mut self.bell {
            bell.ring();
        }
    }
}

impl Worker {
    /// Starts a thread that serves `queue` until [`Worker::stop`].
    ///
    /// # Errors
    /// No thread was to be had.
    pub fn start<M>(name: &str, queue: Queue<M>, control: Arc<Control>, bells: Bells) -> io::Result<Self>
    where
        M: Memory + Send + 'static,
        M::Lease: Send,
    {
        control.shorten(bells.patience);
        let thread = {
            let control = Arc::clone(&control);
            std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(move || {
                // Rings also when the thread panics, and after the queue's memory has gone.
                let _ended = Ended(&control);
                serve(queue, &control, &bells);
            })?
        };
        Ok(Self { control, told: None, thread: Some(thread) })
    }

    /// How others reach the thread.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Tells the thread to stop, and does not wait: where there are many, tell them all before the first is waited for.
    pub fn tell_stop(&mut self) {
        if self.told.is_none() {
            self.told = Some(Instant::now());
            self.control.stop.store(true, Ordering::Relaxed);
            self.control.rouse();
        }
    }

    /// Storage is known to hang: it is not waited for again when this queue stops.
    pub fn expect_nothing(&self) {
        self.control.shorten(Duration::ZERO);
    }

    /// Stops the thread, and says where the queue was when it touched memory for the last time. `None`: it panicked,
    /// which is our own mistake; it has let go of everything, and what it knew is lost. Storage is waited for as long as
    /// [`Bells::patience`] says, and hardly at all once `hurry` is readable; memory as long as `visit` says beyond that, and
    /// from now on: [`VISIT`] where it may be expected to answer.
    ///
    /// # Errors
    /// [`Stuck`]; may be called again.
    pub fn stop(&mut self, hurry: Option<BorrowedFd<'_>>, visit: Duration) -> Result<Option<Stopped>, Stuck> {
        self.tell_stop();
        let told = *self.told.get_or_insert_with(Instant::now);
        let mut hurry = hurry;
        let mut deadline = (told + self.control.patience() + GRACE).max(Instant::now()) + visit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            let mut fds = Vec::with_capacity(2);
            fds.push(PollFd::new(&self.control.ended, PollFlags::IN));
            fds.extend(hurry.map(|hurry| PollFd::from_borrowed_fd(hurry, PollFlags::IN)));
            let _ = poll(&mut fds, timeout.as_ref());
            if !fds[0].revents().is_empty() {
                break;
            }
            if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
                hurry = None;
                self.control.shorten(HURRY);
                deadline = deadline.min(Instant::now() + HURRY + GRACE + visit);
            } else if left.is_zero() {
                return Err(Stuck);
            }
        }
        let end = self.control.end.lock().unwrap_or_else(PoisonError::into_inner).take();
        let thread = self.thread.take();
        Ok(end.map(|End { stopped, rests }| {
            // One that waits for its storage ends by itself, whenever that is.
            if let Some(thread) = thread.filter(|_| rests) {
                let _ = thread.join();
            }
            stopped
        }))
    }
}

impl Drop for Worker {
    /// The memory that the thread serves may go after this, so it waits.
    fn drop(&mut self) {
        if self.thread.is_some() {
            while self.stop(None, VISIT).is_err() {}
        }
    }
}

/// Rings when it is dropped.
struct Ended<'c>(&'c Control);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        ring(self.0.ended.as_fd());
    }
}

fn serve<M: Memory>(mut queue: Queue<M>, control: &Control, bells: &Bells) {
    if let Err(broken) = run(&mut queue, control, bells) {
        queue.report(&broken);
        tracing::error!(
            queue = std::thread::current().name().unwrap_or_default(),
            "queue stopped: {broken}; a device reset starts it again"
        );
        if let Some(error) = bells.error.as_ref().and_then(|error| error.try_clone().ok()) {
            Bell::new(error).ring();
        }
    }
    let rests = drain(&mut queue, control) || give_up(&mut queue);
    // A ring that can't be reached any more has been given up by its driver.
    if queue.flush() == Ok(true) {
        control.tell();
    }
    let (stopped, leftover) = queue.stop();
    *control.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(End { stopped, rests });
    ring(control.ended.as_fd());
    // Last, and from this thread: the kernel has its requests as this thread's, and keeps it until they are over.
    drop(leftover);
}

/// Brings everything to its end that is under way; `false` if that takes too long for whoever waits for it.
fn drain<M: Memory>(queue: &mut Queue<M>, control: &Control) -> bool {
    let mut stopping: Option<Instant> = None;
    queue.recall();
    while !queue.drain() {
        if control.stop.load(Ordering::Relaxed)
            && stopping.get_or_insert_with(Instant::now).elapsed() >= control.patience()
        {
            return false;
        }
        wait(queue, WAITING_NAP);
    }
    true
}

/// Cancels everything that is under way; `false` if some of it goes on all the same.
fn give_up<M: Memory>(queue: &mut Queue<M>) -> bool {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    tracing::warn!(
        queue = name,
        requests = queue.under_way(),
        "storage does not answer and somebody waits for the queue to stop: cancelling its requests, which start anew \
         when the queue goes on"
    );
    queue.cancel();
    let since = Instant::now();
    while queue.is_under_way() {
        if since.elapsed() >= GRACE {
            tracing::error!(
                queue = name,
                requests = queue.under_way(),
                "the kernel does not let go of requests: they are left to themselves, without any of the guest's memory; \
                 until they end, what would change the disk fails if a change is among them"
            );
            return false;
        }
        wait(queue, LOOKING_NAP);
    }
    true
}

/// Until something completes, or for so long.
fn wait<M: Memory>(queue: &mut Queue<M>, at_most: Timespec) {
    if queue.listen_to_device() {
        return;
    }
    let completion = queue.completion_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    // A handler without a descriptor completes by itself: look again soon.
    let timeout = if completion.is_some() { at_most } else { LOOKING_NAP };
    let _ = poll(&mut Vec::from_iter(completion), Some(&timeout));
}

/// Serves `queue` until it is told to stop.
fn run<M: Memory>(queue: &mut Queue<M>, control: &Control, bells: &Bells) -> Result<(), Broken> {
    let mut patience = Patience { most: bells.poll, now: bells.poll };
    let mut idle_since: Option<Instant> = None;
    let mut looks = 0;
    // What an earlier run left is tried at once.
    let mut tried = None;
    queue.ignore()?;
    while !control.stop.load(Ordering::Acquire) {
        let news = control.news.load(Ordering::Relaxed) && control.news.swap(false, Ordering::Acquire);
        // News may be lost, or be taken back before they were seen: now and then all is tried again.
        let due = queue.is_waiting() && tried.is_none_or(|tried: Instant| tried.elapsed() >= RETRY);
        if due {
            tried = Some(Instant::now());
        }
        let turn = queue.turn(match (due, news) {
            (true, _) => Look::Thorough,
            (false, true) => Look::Quick,
            (false, false) => Look::Not,
        })?;
        if turn.notify {
            control.tell();
        }
        if turn.worked {
            (idle_since, looks) = (None, 0);
            continue;
        }
        if !patience.now.is_zero() {
            std::hint::spin_loop();
            looks += 1;
            if looks % LOOKS != 0 {
                continue;
            }
            if idle_since.get_or_insert_with(Instant::now).elapsed() < patience.now {
                // Whoever is to make something available may be waiting for this very processor.
                std::thread::yield_now();
                continue;
            }
        }
        let idle = *idle_since.get_or_insert_with(Instant::now);
        nap(queue, control, bells)?;
        patience.learn(idle.elapsed());
        (idle_since, looks) = (None, 0);
    }
    Ok(())
}

/// For how long a thread looks for something to do before it sleeps: as long as that is good for something. Whoever asks
/// for one thing now and then is served by a thread that sleeps, and costs no more than that.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The most there is of it.
    pub most: Duration,
    /// What there is of it now.
    pub now: Duration,
}

impl Patience {
    /// It was given up, and then something came, so long after there had been nothing more to do.
    pub fn learn(&mut self, idle: Duration) {
        self.now = if idle < self.most { self.most } else { self.now / 2 };
        if self.now < Duration::from_micros(1) {
            self.now = Duration::ZERO;
        }
    }
}

/// Sleeps until something happens.
fn nap<M: Memory>(queue: &mut Queue<M>, control: &Control, bells: &Bells) -> Result<(), Broken> {
    if queue.listen()? && !queue.ring_waits() {
        return queue.ignore();
    }
    control.sleeping.store(true, Ordering::Relaxed);
    // Orders `sleeping` before the look at the flags; see `Control::rouse`.
    fence(Ordering::SeqCst);
    if [&control.stop, &control.news].iter().all(|flag| !flag.load(Ordering::Relaxed)) {
        let timeout = match (queue.is_waiting(), &bells.kick) {
            (_, None) => Some(&LOOKING_NAP),
            (true, _) => Some(&WAITING_NAP),
            (false, _) => None,
        };
        // What there is not is replaced by what there is.
        let event = control.event.as_fd();
        let kick = bells.kick.as_ref().map_or(event, |kick| kick.as_fd());
        let completion = queue.completion_fd().unwrap_or(event);
        let mut fds = [event, kick, completion].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // An interrupted poll is one that ended early; the turn that follows looks at everything.
        let _ = poll(&mut fds, timeout);
        let [rung, kicked, _] = fds.map(|fd| !fd.revents().is_empty());
        if rung {
            hush(event);
        }
        if kicked && let Some(kick) = &bells.kick {
            hush(kick.as_fd());
        }
    }
    control.sleeping.store(false, Ordering::Relaxed);
    if control.stop.load(Ordering::Relaxed) {
        // Whoever stops a queue may have taken its ring away, as a guest does that has switched its IOMMU on over a driver
        // that is gone: there is nothing to say there, and a fault if it is said.
        return Ok(());
    }
    queue.ignore()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(event: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }

    /// As of a guest that masks an interrupt and unmasks it, time and again, while its queue works.
    #[test]
    fn a_driver_is_told_by_its_latest_call_and_by_none_before() {
        let calls = [(); 2].map(|()| eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let control = Control::new(None).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    control.tell();
                }
            });
            for round in 0..2000 {
                let (now, before) = (&calls[round % 2], &calls[(round + 1) % 2]);
                control.set_call(None);
                control.set_call(Some(now.try_clone().unwrap()));
                count(before);
                let mut poll_now = [PollFd::new(now, PollFlags::IN)];
                let told = poll(&mut poll_now, Some(&Timespec { tv_sec: 60, tv_nsec: 0 }));
                let late = count(before);
                if told != Ok(1) || late != 0 {
                    done.store(true, Ordering::Relaxed);
                    panic!("round {round}: told {told:?} by the latest, {late} times by the one before");
                }
                count(now);
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn what_could_not_be_told_is_told_by_the_next_call() {
        let call = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let control = Control::new(None).unwrap();
        control.set_call(Some(call.try_clone().unwrap()));
        assert_eq!(count(&call), 0, "there was nothing to tell");
        control.set_call(None);
        control.tell();
        control.set_call(Some(call.try_clone().unwrap()));
        assert_eq!(count(&call), 1);
    }
}
