//! The thread that serves a queue: busy while there is work, for a short while after, and then asleep until the driver
//! rings, a translation arrives or storage completes.

use crate::queue::{Broken, Queue, Stopped};
use ringfence_dma::Memory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a queue sleeps at the most while a chain waits for translations. News wake it; this is for news that were
/// lost.
const WAITING_NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
const RETRY: Duration = Duration::from_millis(20);

/// How long a queue sleeps that nobody wakes.
const LOOKING_NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// How often an empty queue is looked at between two looks at the clock.
const LOOKS: u32 = 32;

/// A queue's thread.
#[derive(Debug)]
pub struct Worker {
    control: Arc<Control>,
    /// Gone once it was joined.
    thread: Option<JoinHandle<Stopped>>,
}

/// How others reach a queue's thread.
#[derive(Debug)]
pub struct Control {
    event: OwnedFd,
    sleeping: AtomicBool,
    news: AtomicBool,
    stop: AtomicBool,
    call: Mutex<Option<Arc<OwnedFd>>>,
    call_changed: AtomicBool,
}

/// What a queue's thread is given besides the queue.
#[derive(Debug)]
pub struct Bells {
    /// Readable when the driver made something available. `None`: the driver does not ring, so the queue is looked at
    /// time and again.
    pub kick: Option<OwnedFd>,
    /// Written when the queue broke.
    pub error: Option<OwnedFd>,
    /// For how long an empty queue is looked at before the thread sleeps.
    pub poll: Duration,
}

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
            call: Mutex::new(call.map(Arc::new)),
            call_changed: AtomicBool::new(false),
        }))
    }

    /// Translations may have arrived.
    pub fn tell_news(&self) {
        self.news.store(true, Ordering::Relaxed);
        self.rouse();
    }

    /// From now on the driver is told by `call`; `None`: it looks by itself.
    pub fn set_call(&self, call: Option<OwnedFd>) {
        // What was used since the last one may have been told to nobody.
        if let Some(call) = &call {
            ring(call.as_fd());
        }
        *self.call.lock().unwrap_or_else(PoisonError::into_inner) = call.map(Arc::new);
        self.call_changed.store(true, Ordering::Release);
    }

    fn call(&self) -> Option<Arc<OwnedFd>> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
        let thread = {
            let control = Arc::clone(&control);
            std::thread::Builder::new()
                .name(name.to_owned())
                .stack_size(256 << 10)
                .spawn(move || serve(queue, &control, &bells))?
        };
        Ok(Self { control, thread: Some(thread) })
    }

    /// How others reach the thread.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Ends the thread when nothing is under way any more, and says where the queue was. `None`: the thread panicked,
    /// which is our own mistake; it has let go of everything, and what it knew is lost.
    pub fn stop(mut self) -> Option<Stopped> {
        let thread = self.thread.take().expect("joined here or when dropped, and this is before");
        self.end();
        thread.join().ok()
    }

    fn end(&self) {
        self.control.stop.store(true, Ordering::Relaxed);
        self.control.rouse();
    }
}

impl Drop for Worker {
    /// The memory that the thread serves may go after this, so it waits as [`Worker::stop`] does.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.end();
            let _ = thread.join();
        }
    }
}

fn serve<M: Memory>(mut queue: Queue<M>, control: &Control, bells: &Bells) -> Stopped {
    if let Err(broken) = run(&mut queue, control, bells) {
        tracing::error!(
            queue = std::thread::current().name().unwrap_or_default(),
            "queue stopped: {broken}; a device reset starts it again"
        );
        if let Some(error) = &bells.error {
            ring(error.as_fd());
        }
    }
    while !queue.drain() {
        let completion = queue.completion_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // A handler without a descriptor completes by itself: look again soon.
        let patience = if completion.is_some() { WAITING_NAP } else { LOOKING_NAP };
        let _ = poll(&mut Vec::from_iter(completion), Some(&patience));
    }
    // A ring that can't be reached any more has been given up by its driver.
    if queue.flush() == Ok(true)
        && let Some(call) = control.call()
    {
        ring(call.as_fd());
    }
    queue.stop()
}

fn run<M: Memory>(queue: &mut Queue<M>, control: &Control, bells: &Bells) -> Result<(), Broken> {
    let mut call = control.call();
    let mut idle_since: Option<Instant> = None;
    let mut looks = 0;
    // What an earlier run left is tried at once, and what that one used is told of: it may not have been.
    let mut tried = None;
    if let Some(call) = &call {
        ring(call.as_fd());
    }
    queue.ignore()?;
    while !control.stop.load(Ordering::Acquire) {
        let news = control.news.load(Ordering::Relaxed) && control.news.swap(false, Ordering::Acquire);
        // News may be lost, or be about somebody else's question: now and then all is tried again.
        let due = queue.is_waiting() && tried.is_none_or(|tried: Instant| tried.elapsed() >= RETRY);
        if news || due {
            tried = Some(Instant::now());
        }
        let turn = queue.turn(news || due)?;
        if control.call_changed.load(Ordering::Relaxed) && control.call_changed.swap(false, Ordering::Acquire) {
            call = control.call();
        }
        if turn.notify
            && let Some(call) = &call
        {
            ring(call.as_fd());
        }
        if turn.worked {
            (idle_since, looks) = (None, 0);
            continue;
        }
        if !bells.poll.is_zero() {
            std::hint::spin_loop();
            looks += 1;
            if looks % LOOKS != 0 || idle_since.get_or_insert_with(Instant::now).elapsed() < bells.poll {
                continue;
            }
        }
        nap(queue, control, bells)?;
        (idle_since, looks) = (None, 0);
    }
    Ok(())
}

/// Sleeps until something happens.
fn nap<M: Memory>(queue: &mut Queue<M>, control: &Control, bells: &Bells) -> Result<(), Broken> {
    if queue.listen()? && !queue.ring_waits() {
        return queue.ignore();
    }
    control.sleeping.store(true, Ordering::Relaxed);
    // Orders `sleeping` before the look at the flags; see `Control::rouse`.
    fence(Ordering::SeqCst);
    if !control.stop.load(Ordering::Relaxed) && !control.news.load(Ordering::Relaxed) {
        let timeout = match (queue.is_waiting(), &bells.kick) {
            (_, None) => Some(&LOOKING_NAP),
            (true, _) => Some(&WAITING_NAP),
            (false, _) => None,
        };
        let mut fds = Vec::with_capacity(3);
        fds.push(PollFd::new(&control.event, PollFlags::IN));
        fds.extend(bells.kick.as_ref().map(|kick| PollFd::new(kick, PollFlags::IN)));
        fds.extend(queue.completion_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        // An interrupted poll is one that ended early; the turn that follows looks at everything.
        let _ = poll(&mut fds, timeout);
    }
    control.sleeping.store(false, Ordering::Relaxed);
    hush(control.event.as_fd());
    if let Some(kick) = &bells.kick {
        hush(kick.as_fd());
    }
    queue.ignore()
}

/// Adds one to an eventfd. One that is full already says what it should.
fn ring(bell: BorrowedFd<'_>) {
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

/// Empties an eventfd, which is non-blocking.
fn hush(bell: BorrowedFd<'_>) {
    let mut count = [0; 8];
    while rustix::io::read(bell, &mut count) == Err(Errno::INTR) {}
}
