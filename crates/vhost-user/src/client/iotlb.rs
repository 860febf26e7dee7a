//! The thread that answers what a back-end asks, above all its misses.

use super::{AT_ONCE, ClientError, Shared};
use crate::channel::{Channel, ChannelError, Message, Received};
use crate::wire::{BackendRequest, Frame, FrontendCode, Header, Iotlb, IotlbReport, NeedReply, Request};
use ringfence_dma::{BusAddr, FrontendVa, Permission};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most misses that wait for their time. A back-end that asks for more is left unread until some are answered.
const WAITING: usize = 4096;

/// Whoever knows the translations: an IOMMU.
pub trait Translator: Send + Sync {
    /// The translation of the byte at `iova` for `perm`, as much around it as lies in one piece. `None` denies.
    ///
    /// Called while no other message to the back-end is under way: between this answer and its arrival there no
    /// invalidation can pass it by.
    fn translate(&self, iova: BusAddr, perm: Permission) -> Option<Translation>;

    /// The back-end announced that its configuration space has changed.
    fn config_changed(&self) {}
}

/// One translation, as an UPDATE carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Where the device sees it.
    pub iova: BusAddr,
    /// How many bytes.
    pub size: u64,
    /// Where the front-end sees it.
    pub uaddr: FrontendVa,
    /// What the device may do there.
    pub perm: Permission,
}

impl From<Translation> for Iotlb {
    fn from(Translation { iova, size, uaddr, perm }: Translation) -> Self {
        Iotlb::Update { iova, size, uaddr, perm }
    }
}

/// What a front-end and its back-end have said to each other about translations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Translations that the back-end asked for.
    pub misses: u64,
    /// Of those, the ones that the translator did not have.
    pub denied: u64,
    /// Translations that were sent.
    pub updates: u64,
    /// Of those, the ones that the back-end did not take.
    pub rejected: u64,
    /// Ranges that were taken away.
    pub invalidations: u64,
    /// Accesses that the back-end reports as forbidden.
    pub access_fails: u64,
    /// Changes of the configuration that the back-end announced.
    pub config_changes: u64,
}

/// [`Counters`] while they count.
#[derive(Debug, Default)]
pub(super) struct Counts {
    misses: AtomicU64,
    denied: AtomicU64,
    updates: AtomicU64,
    rejected: AtomicU64,
    invalidations: AtomicU64,
    access_fails: AtomicU64,
    config_changes: AtomicU64,
}

impl Counts {
    pub(super) fn invalidated(&self) {
        self.invalidations.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn updated(&self) {
        self.updates.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> Counters {
        let Self { misses, denied, updates, rejected, invalidations, access_fails, config_changes } = self;
        let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counters {
            misses: now(misses),
            denied: now(denied),
            updates: now(updates),
            rejected: now(rejected),
            invalidations: now(invalidations),
            access_fails: now(access_fails),
            config_changes: now(config_changes),
        }
    }
}

/// The thread; dropping it ends it.
#[derive(Debug)]
pub(super) struct IotlbThread {
    /// The thread's channel once more, to hang up on it.
    channel: OwnedFd,
    thread: Option<JoinHandle<()>>,
    failure: Arc<Mutex<Option<String>>>,
}

impl IotlbThread {
    pub(super) fn start(
        shared: Arc<Shared>,
        channel: OwnedFd,
        translator: Arc<dyn Translator>,
        delay: Duration,
    ) -> Result<Self, io::Error> {
        let ours = channel.try_clone()?;
        let failure = Arc::new(Mutex::new(None));
        let told = Arc::clone(&failure);
        let mut answering =
            Answering { shared, channel: Channel::new(channel), translator, delay, waiting: VecDeque::new() };
        let thread = std::thread::Builder::new().name("iotlb".to_owned()).spawn(move || {
            if let Err(error) = answering.run() {
                tracing::debug!("misses are not answered any more: {error}");
                *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
            }
            // Whoever still waits for an answer learns that there will be none.
            let _ = rustix::net::shutdown(&answering.channel, rustix::net::Shutdown::Both);
        })?;
        Ok(Self { channel: ours, thread: Some(thread), failure })
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for IotlbThread {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.channel, rustix::net::Shutdown::Both);
        let ended = self.thread.take().expect("joined only here").join();
        // A panic in there is a bug, of ours or the translator's; one on top of another would hide it.
        assert!(ended.is_ok() || std::thread::panicking(), "the thread that answers misses panicked");
    }
}

/// Why the thread ended by itself.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the back-end's channel: {0}")]
    Backend(#[from] ChannelError),
    #[error("{0}")]
    Main(#[from] ClientError),
    #[error("can't wait: {0}")]
    Wait(#[from] Errno),
}

struct Answering {
    shared: Arc<Shared>,
    channel: Channel,
    translator: Arc<dyn Translator>,
    delay: Duration,
    /// In the order of their times.
    waiting: VecDeque<Miss>,
}

struct Miss {
    due: Instant,
    asked: Header,
    iova: BusAddr,
    perm: Permission,
}

impl Answering {
    fn run(&mut self) -> Result<(), Ended> {
        // A delay of microseconds is meant as such; the kernel's slack for a sleeping thread is 50 of them.
        let _ = rustix::thread::set_current_timer_slack(Some(std::num::NonZeroU64::MIN));
        loop {
            let left = self.waiting.front().map(|miss| miss.due.saturating_duration_since(Instant::now()));
            let events = self.sleep(left)?;
            while self.can_take() {
                match self.channel.receive()? {
                    Received::Message(message) => self.message(message)?,
                    Received::Nothing => break,
                    Received::End => return Ok(()),
                }
            }
            if !self.can_take() && events.contains(PollFlags::HUP) {
                // Nobody is left to be answered; and waiting for time to pass, this would never sleep again.
                return Ok(());
            }
            let now = Instant::now();
            let due = self.waiting.partition_point(|miss| miss.due <= now).min(AT_ONCE);
            let due: Vec<Miss> = self.waiting.drain(..due).collect();
            if !due.is_empty() {
                self.answer(&due)?;
            }
        }
    }

    fn can_take(&self) -> bool {
        self.waiting.len() < WAITING
    }

    /// Until there is something to read, or for so long.
    fn sleep(&self, at_most: Option<Duration>) -> Result<PollFlags, Errno> {
        let at_most = if self.can_take() && self.channel.holds_message() { Some(Duration::ZERO) } else { at_most };
        let timeout = at_most.and_then(|time| Timespec::try_from(time).ok());
        let readable = if self.can_take() { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [PollFd::new(&self.channel, readable)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => Ok(fds[0].revents()),
            Err(Errno::INTR) => Ok(PollFlags::empty()),
            Err(errno) => Err(errno),
        }
    }

    fn message(&mut self, message: Message) -> Result<(), Ended> {
        let Message { header, body, fds } = message;
        let counts = &self.shared.counts;
        match BackendRequest::parse(&header, &body, fds) {
            Ok(BackendRequest::IotlbMsg(IotlbReport::Miss { iova, perm })) => {
                counts.misses.fetch_add(1, Ordering::Relaxed);
                self.waiting.push_back(Miss { due: Instant::now() + self.delay, asked: header, iova, perm });
                Ok(())
            }
            Ok(BackendRequest::IotlbMsg(IotlbReport::AccessFail { iova, perm })) => {
                counts.access_fails.fetch_add(1, Ordering::Relaxed);
                tracing::debug!("the back-end reports a forbidden access at {iova} ({perm:?})");
                self.reply(&header, 0)
            }
            Ok(BackendRequest::ConfigChangeMsg) => {
                counts.config_changes.fetch_add(1, Ordering::Relaxed);
                self.translator.config_changed();
                self.reply(&header, 0)
            }
            // Nothing of this was negotiated.
            Ok(
                BackendRequest::VringHostNotifierMsg { .. }
                | BackendRequest::VringCall { .. }
                | BackendRequest::VringErr { .. },
            ) => self.reply(&header, 1),
            Err(error) => {
                tracing::debug!("the back-end asks nonsense: {error}");
                self.reply(&header, 1)
            }
        }
    }

    /// Answers misses: first the translations, each acknowledged, then that they are there.
    fn answer(&mut self, misses: &[Miss]) -> Result<(), Ended> {
        let counts = &self.shared.counts;
        let mut results = Vec::with_capacity(misses.len());
        {
            // From the look at the translations until they have arrived: an invalidation comes before or after.
            let mut wire = self.shared.wire();
            let translations: Vec<_> =
                misses.iter().map(|miss| self.translator.translate(miss.iova, miss.perm)).collect();
            let mut updates = Frame { bytes: Vec::new(), fds: Vec::new() };
            for &translation in translations.iter().flatten() {
                let update = Request::<BorrowedFd<'_>>::IotlbMsg(translation.into());
                updates.bytes.extend_from_slice(&update.encode(NeedReply::Yes).bytes);
                counts.updated();
            }
            wire.send(FrontendCode::IotlbMsg, &updates)?;
            for translation in translations {
                let granted = match translation {
                    None => {
                        counts.denied.fetch_add(1, Ordering::Relaxed);
                        false
                    }
                    Some(_) => match wire.acknowledged(FrontendCode::IotlbMsg) {
                        Ok(()) => true,
                        Err(ClientError::Refused { .. }) => {
                            counts.rejected.fetch_add(1, Ordering::Relaxed);
                            false
                        }
                        Err(error) => return Err(error.into()),
                    },
                };
                results.push(granted);
            }
        }
        let mut replies = Frame { bytes: Vec::new(), fds: Vec::new() };
        for (Miss { asked, .. }, granted) in misses.iter().zip(results) {
            if asked.need_reply == NeedReply::Yes {
                let reply = BackendRequest::encode_reply(asked, u64::from(!granted));
                replies.bytes.extend_from_slice(&reply.bytes);
            }
        }
        Ok(self.channel.send(&replies)?)
    }

    fn reply(&self, asked: &Header, result: u64) -> Result<(), Ended> {
        match asked.need_reply {
            NeedReply::Yes => Ok(self.channel.send(&BackendRequest::encode_reply(asked, result))?),
            NeedReply::No => Ok(()),
        }
    }
}
