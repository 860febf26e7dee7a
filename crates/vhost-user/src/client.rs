//! A front-end: the side of a connection that has the memory and asks for a device.
//!
//! Knows the order of messages and what each answer means. Knows no rings, no drivers and no device models: a queue is
//! three addresses and two eventfds, a configuration space is bytes.
//!
//! # What a hostile back-end may do
//! Answer anything, late or never, and ask what it likes on its own channel. A wrong answer is a typed error, after
//! which the connection is [`ClientError::Broken`]: what comes next on it might be the answer to an older question. No
//! wait is longer than [`Options::timeout`]. What it does to the memory that it was given is another matter: see the
//! driver's side.

mod domain;
mod iotlb;
mod transport;

pub use domain::{Lent, Pages};
pub use iotlb::{Counters, Translation, Translator};
pub use transport::{Attachment, FrontendTransport, TransportError};

use crate::channel::{Channel, ChannelError, Message};
use crate::wire::{
    Enable, F_PROTOCOL_FEATURES, Frame, FrontendCode, Invalidated, Iotlb, MAX_REGIONS, NeedReply, ProtocolFeatures,
    Reply, Request, VringAddr, VringFd, WireError,
};
use iotlb::{Counts, IotlbThread};
use ringfence_dma::BusAddr;
use ringfence_hostmem::Placement;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The protocol features that this front-end can use; those that the back-end offers too are taken.
const PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// The most bytes of configuration in one message: libvhost-user, and with it most back-ends, takes no more.
const CONFIG_PART: usize = 256;

/// The most translations that are given or taken away in one go: both sides' sockets hold that much and the answers.
const AT_ONCE: usize = 128;

/// A request whose descriptors somebody else owns.
type Ask<'f> = Request<BorrowedFd<'f>>;

/// How a front-end behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The protocol features that may be taken, of those that it can use. None makes it a front-end from before there
    /// were any.
    pub protocol: ProtocolFeatures,
    /// How long an answer is waited for.
    pub timeout: Duration,
    /// How long a miss waits before it is answered, each counted from its arrival: they wait side by side, as they do
    /// behind a slow VMM. Zero answers at once.
    pub miss_delay: Duration,
    /// The most that one translation out of a domain covers, see [`Frontend::serve_domain`]: a power of two, of bytes, not
    /// below 4096, which is what VMMs have on x86 and arm64.
    pub granule: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            protocol: PROTOCOL_FEATURES,
            timeout: Duration::from_secs(10),
            miss_delay: Duration::ZERO,
            granule: 4096,
        }
    }
}

/// Why a front-end did not get what it wanted.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves there.
    #[error("{path}: can't connect: {error}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The connection failed while this message was under way.
    #[error("{message}: {error}")]
    Channel {
        /// The message.
        message: FrontendCode,
        /// What happened.
        error: ChannelError,
    },
    /// The back-end's answer is none.
    #[error("bad answer: {0}")]
    Answer(#[from] WireError),
    /// The back-end's answer is about something else than was asked.
    #[error("answer to {message}: {field} is {got} instead of {expected}")]
    Mismatch {
        /// The message.
        message: FrontendCode,
        /// Which field of the answer.
        field: &'static str,
        /// What it says.
        got: u64,
        /// What it should say.
        expected: u64,
    },
    /// The back-end said no.
    #[error("the back-end refused {message} ({value})")]
    Refused {
        /// What it did not do.
        message: FrontendCode,
        /// Its answer, not 0.
        value: u64,
    },
    /// The back-end has no configuration to show there.
    #[error("the back-end has no configuration of {size} bytes at {offset}")]
    NoConfig {
        /// From where, in bytes.
        offset: u32,
        /// How many bytes.
        size: usize,
    },
    /// Needs a protocol feature that was not negotiated.
    #[error("the back-end does not offer protocol feature {0}")]
    NotOffered(&'static str),
    /// More regions than the back-end takes.
    #[error("{wanted} memory regions, the back-end takes {max}")]
    Slots {
        /// How many there are.
        wanted: usize,
        /// How many it takes.
        max: u64,
    },
    /// After an earlier error nothing on this connection can be trusted any more.
    #[error("the connection failed earlier")]
    Broken,
    /// The host is short of something.
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// A queue, as a back-end is told about it.
#[derive(Clone, Copy, Debug)]
pub struct Vring<'f> {
    /// Which queue.
    pub index: u8,
    /// How many descriptors.
    pub size: u16,
    /// Where it goes on; 0 for a new split ring, 0x8000_8000 for a new packed one.
    pub base: u32,
    /// Descriptor table or ring. This and the next two are bus addresses where the device translates, else the
    /// front-end's virtual ones.
    pub descriptor: u64,
    /// Available ring, or driver event suppression.
    pub available: u64,
    /// Used ring, or device event suppression.
    pub used: u64,
    /// The eventfd that the driver rings; without one the back-end polls.
    pub kick: Option<BorrowedFd<'f>>,
    /// The eventfd that the device rings; without one the driver polls.
    pub call: Option<BorrowedFd<'f>>,
}

/// One connection to a back-end.
///
/// All methods may be called from any thread; messages go out one after the other.
#[derive(Debug)]
pub struct Frontend {
    shared: Arc<Shared>,
    iotlb: Mutex<Option<IotlbThread>>,
    features: u64,
    options: Options,
}

/// What the thread that answers misses has too.
#[derive(Debug)]
struct Shared {
    wire: Mutex<Wire>,
    /// The socket once more, to hang up without waiting for whoever is using it.
    socket: OwnedFd,
    protocol: ProtocolFeatures,
    counts: Counts,
}

/// The main channel, for whoever holds its lock.
#[derive(Debug)]
struct Wire {
    channel: Channel,
    timeout: Duration,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Good,
    Broken,
}

impl Frontend {
    /// Connects to the back-end that listens on `path` and negotiates protocol features.
    ///
    /// # Errors
    /// Nobody listens there, or he does not speak vhost-user.
    pub fn connect(path: &Path, options: Options) -> Result<Self, ClientError> {
        let stream =
            UnixStream::connect(path).map_err(|error| ClientError::Connect { path: path.to_owned(), error })?;
        Self::new(stream, options)
    }

    /// Uses a connection that is there already.
    ///
    /// # Errors
    /// The other end does not speak vhost-user.
    pub fn new(stream: UnixStream, options: Options) -> Result<Self, ClientError> {
        let socket = OwnedFd::from(stream.try_clone()?);
        let mut wire = Wire { channel: Channel::new(stream.into()), timeout: options.timeout, state: State::Good };
        let features = wire.number(&Ask::GetFeatures)?;
        let mut protocol = ProtocolFeatures::empty();
        if features & F_PROTOCOL_FEATURES != 0 && !options.protocol.is_empty() {
            let offered = wire.number(&Ask::GetProtocolFeatures)?;
            protocol = PROTOCOL_FEATURES & options.protocol & ProtocolFeatures::from_bits_retain(offered);
            wire.tell(&Ask::SetProtocolFeatures(protocol))?;
        }
        let shared = Shared { wire: Mutex::new(wire), socket, protocol, counts: Counts::default() };
        shared.command(&Ask::SetOwner)?;
        Ok(Self {
            shared: Arc::new(shared),
            iotlb: Mutex::new(None),
            features: features & !F_PROTOCOL_FEATURES,
            options,
        })
    }

    /// The device's features that the back-end offers; vhost-user's own bit is not among them.
    pub fn offered(&self) -> u64 {
        self.features
    }

    /// What of the protocol both sides can do.
    pub fn protocol(&self) -> ProtocolFeatures {
        self.shared.protocol
    }

    /// Takes `features` of the device. vhost-user's own bit goes with them.
    ///
    /// # Errors
    /// [`ClientError::Refused`] where the back-end does not accept them and can say so (REPLY_ACK).
    pub fn set_features(&self, features: u64) -> Result<(), ClientError> {
        let own = if self.has_protocol() { F_PROTOCOL_FEATURES } else { 0 };
        self.shared.command(&Ask::SetFeatures(features | own))
    }

    /// How many queues the device has, where it can say so (MQ).
    ///
    /// # Errors
    /// The connection failed.
    pub fn queues(&self) -> Result<Option<u64>, ClientError> {
        match self.shared.require(ProtocolFeatures::MQ, "MQ") {
            Ok(()) => self.shared.wire().number(&Ask::GetQueueNum).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Gives the back-end this memory and no other.
    ///
    /// # Errors
    /// [`ClientError::Slots`] for more regions than it takes, [`ClientError::Refused`] for what it can't use.
    pub fn set_memory(&self, regions: &[(Placement, BorrowedFd<'_>)]) -> Result<(), ClientError> {
        if regions.len() > MAX_REGIONS {
            let max = match self.protocol().contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
                true => self.shared.wire().number(&Ask::GetMaxMemSlots)?,
                false => MAX_REGIONS as u64,
            };
            if regions.len() as u64 > max {
                return Err(ClientError::Slots { wanted: regions.len(), max });
            }
        }
        let (table, more) = regions.split_at(regions.len().min(MAX_REGIONS));
        self.shared.command(&Ask::SetMemTable(table.to_vec()))?;
        more.iter().try_for_each(|&(placement, fd)| self.add_memory(placement, fd))
    }

    /// Gives the back-end one more region.
    ///
    /// # Errors
    /// It does not take regions one by one, or not this one.
    pub fn add_memory(&self, placement: Placement, fd: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.shared.require(ProtocolFeatures::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
        self.shared.command(&Ask::AddMemReg(placement, fd))
    }

    /// Takes a region away.
    ///
    /// # Errors
    /// It does not take regions one by one, or never had this one.
    pub fn remove_memory(&self, placement: Placement) -> Result<(), ClientError> {
        self.shared.require(ProtocolFeatures::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
        self.shared.command(&Ask::RemMemReg(placement))
    }

    /// Reads the configuration space from `offset` on.
    ///
    /// # Errors
    /// The back-end has none, or none there.
    pub fn config(&self, offset: u32, into: &mut [u8]) -> Result<(), ClientError> {
        self.shared.require(ProtocolFeatures::CONFIG, "CONFIG")?;
        let mut at = offset;
        for part in into.chunks_mut(CONFIG_PART) {
            self.config_part(at, part)?;
            at = at.saturating_add(part.len() as u32);
        }
        Ok(())
    }

    fn config_part(&self, offset: u32, into: &mut [u8]) -> Result<(), ClientError> {
        let question = Ask::GetConfig { offset, size: into.len() as u32, flags: 0 };
        let mismatch = |field, got: u64, expected: u64| {
            Err(ClientError::Mismatch { message: FrontendCode::GetConfig, field, got, expected })
        };
        match self.shared.wire().question(&question)? {
            Reply::NoConfig => Err(ClientError::NoConfig { offset, size: into.len() }),
            Reply::Config { offset: got, .. } if got != offset => mismatch("offset", got.into(), offset.into()),
            Reply::Config { data, .. } if data.len() != into.len() => {
                mismatch("size", data.len() as u64, into.len() as u64)
            }
            Reply::Config { data, .. } => {
                into.copy_from_slice(&data);
                Ok(())
            }
            reply => unreachable!("no reply to GET_CONFIG parses as {reply:?}"),
        }
    }

    /// Writes the configuration space from `offset` on, as a driver does: a field, so that it changes at once.
    ///
    /// # Panics
    /// For more data than a message holds.
    ///
    /// # Errors
    /// The back-end has none, or it can't be written there.
    pub fn set_config(&self, offset: u32, data: &[u8]) -> Result<(), ClientError> {
        self.shared.require(ProtocolFeatures::CONFIG, "CONFIG")?;
        self.shared.command(&Ask::SetConfig { offset, flags: 0, data: data.to_vec() })
    }

    /// The device status as the back-end sees it, if it keeps one (STATUS).
    ///
    /// # Errors
    /// The connection failed, or what came is no status.
    pub fn status(&self) -> Result<Option<u8>, ClientError> {
        if self.shared.require(ProtocolFeatures::STATUS, "STATUS").is_err() {
            return Ok(None);
        }
        let value = self.shared.wire().number(&Ask::GetStatus)?;
        let status = u8::try_from(value);
        let message = FrontendCode::GetStatus.name();
        Ok(Some(status.map_err(|_| WireError::Value { message, field: "status", value })?))
    }

    /// Tells the back-end the device status, if it keeps one (STATUS); else there is nothing to tell.
    ///
    /// # Errors
    /// The connection failed, or the back-end does not accept this status.
    pub fn set_status(&self, status: u8) -> Result<(), ClientError> {
        match self.shared.require(ProtocolFeatures::STATUS, "STATUS") {
            Ok(()) => self.shared.command(&Ask::SetStatus(status)),
            Err(_) => Ok(()),
        }
    }

    /// Resets the device (RESET_DEVICE).
    ///
    /// # Errors
    /// The back-end can't.
    pub fn reset(&self) -> Result<(), ClientError> {
        self.shared.require(ProtocolFeatures::RESET_DEVICE, "RESET_DEVICE")?;
        self.shared.command(&Ask::ResetDevice)
    }

    /// Sets a queue up and starts it.
    ///
    /// # Errors
    /// The back-end can't use it, and can say so (REPLY_ACK).
    pub fn start_vring(&self, vring: &Vring<'_>) -> Result<(), ClientError> {
        let &Vring { index, size, base, descriptor, available, used, kick, call } = vring;
        let queue = u32::from(index);
        let addr = VringAddr { index: queue, flags: 0, descriptor, used, available, log: 0 };
        self.shared.command(&Ask::SetVringNum { index: queue, num: size.into() })?;
        self.shared.command(&Ask::SetVringBase { index: queue, base })?;
        self.shared.command(&Ask::SetVringAddr(addr))?;
        self.shared.command(&Ask::SetVringCall(VringFd { index, fd: call }))?;
        self.shared.command(&Ask::SetVringKick(VringFd { index, fd: kick }))?;
        // Without protocol features there is no such message: queues are enabled from the start.
        if self.has_protocol() { self.enable_vring(index, Enable::On) } else { Ok(()) }
    }

    /// Lets a queue have effects, or not.
    ///
    /// # Errors
    /// The back-end can't.
    pub fn enable_vring(&self, index: u8, enable: Enable) -> Result<(), ClientError> {
        self.shared.command(&Ask::SetVringEnable { index: index.into(), enable })
    }

    /// Stops a queue. Where it was, for [`Vring::base`].
    ///
    /// # Errors
    /// The connection failed, or the answer is about another queue.
    pub fn stop_vring(&self, index: u8) -> Result<u32, ClientError> {
        let index = u32::from(index);
        match self.shared.wire().question(&Ask::GetVringBase { index })? {
            Reply::VringBase { index: got, .. } if got != index => Err(ClientError::Mismatch {
                message: FrontendCode::GetVringBase,
                field: "index",
                got: got.into(),
                expected: index.into(),
            }),
            Reply::VringBase { base, .. } => Ok(base),
            reply => unreachable!("no reply to GET_VRING_BASE parses as {reply:?}"),
        }
    }

    /// Gives the back-end a channel of its own, and answers from now on what it asks there: its misses with what
    /// `translator` knows. A thread does it, until the front-end is dropped or this is called again.
    ///
    /// # Errors
    /// The back-end lacks BACKEND_REQ, or REPLY_ACK without which no invalidation is ever certain.
    pub fn serve_iotlb(&self, translator: Arc<dyn Translator>) -> Result<(), ClientError> {
        self.shared.require(ProtocolFeatures::BACKEND_REQ, "BACKEND_REQ")?;
        self.shared.require(ProtocolFeatures::REPLY_ACK, "REPLY_ACK")?;
        let (ours, theirs) = UnixStream::pair()?;
        let thread = IotlbThread::start(Arc::clone(&self.shared), ours.into(), translator, self.options.miss_delay)?;
        *self.iotlb.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        self.shared.command(&Ask::SetBackendReqFd(theirs.as_fd()))
    }

    /// Takes translations away. Whoever calls has taken them out of what the translator knows before; once this
    /// returns, the back-end has promised to use none of them.
    ///
    /// No lock that the translator takes may be held meanwhile: misses are answered one message at a time with this.
    ///
    /// # Errors
    /// The back-end did not promise it: assume that it goes on.
    pub fn invalidate(&self, range: Invalidated) -> Result<(), ClientError> {
        self.invalidate_then(range, || {})
    }

    /// As [`Frontend::invalidate`], for translations that change rather than go: `change` is called when the back-end has
    /// promised, and before another miss is answered, so that none is answered with what was, or denied. Until then the
    /// translator knows what was.
    ///
    /// # Errors
    /// As [`Frontend::invalidate`]; `change` was not called.
    pub fn invalidate_then(&self, range: Invalidated, change: impl FnOnce()) -> Result<(), ClientError> {
        self.invalidate_each(&[range], change)
    }

    /// As [`Frontend::invalidate`], for several: they go out together, and one wait is for all of them.
    ///
    /// # Errors
    /// As [`Frontend::invalidate`], of any of them.
    pub fn invalidate_all(&self, ranges: &[Invalidated]) -> Result<(), ClientError> {
        ranges.chunks(AT_ONCE).try_for_each(|ranges| self.invalidate_each(ranges, || {}))
    }

    fn invalidate_each(&self, ranges: &[Invalidated], change: impl FnOnce()) -> Result<(), ClientError> {
        self.shared.require(ProtocolFeatures::REPLY_ACK, "REPLY_ACK")?;
        let mut requests = Frame { bytes: Vec::new(), fds: Vec::new() };
        for &range in ranges {
            self.shared.counts.invalidated();
            let request = Ask::IotlbMsg(Iotlb::Invalidate(range));
            requests.bytes.extend_from_slice(&request.encode(NeedReply::Yes).bytes);
        }
        let mut wire = self.shared.wire();
        wire.send(FrontendCode::IotlbMsg, &requests)?;
        // All the answers are taken in, or the next question would be answered by what is left.
        let answers: Vec<_> = ranges.iter().map(|_| wire.acknowledged(FrontendCode::IotlbMsg)).collect();
        answers.into_iter().collect::<Result<(), _>>()?;
        change();
        Ok(())
    }

    /// Gives a translation unasked.
    ///
    /// # Errors
    /// The back-end does not take it: the memory is not in what it was given.
    pub fn update(&self, translation: Translation) -> Result<(), ClientError> {
        self.shared.require(ProtocolFeatures::REPLY_ACK, "REPLY_ACK")?;
        self.shared.counts.updated();
        self.shared.command(&Ask::IotlbMsg(translation.into()))
    }

    /// What has been asked and answered so far.
    pub fn counters(&self) -> Counters {
        self.shared.counts.snapshot()
    }

    /// The process at the other end: the one that listened, or made the connection. `None` where it can't be told.
    pub fn backend_process(&self) -> Option<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.shared.socket).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    /// Whether the back-end has not hung up.
    pub fn is_connected(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.shared.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec::default())) == Ok(0)
    }

    /// Why misses are not answered any more, if so: the back-end closed its channel or sent what is no message there.
    pub fn iotlb_failure(&self) -> Option<String> {
        self.iotlb.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(IotlbThread::failure)
    }

    /// Ends the connection: whoever waits for an answer on it gets none.
    pub fn hang_up(&self) {
        let _ = rustix::net::shutdown(&self.shared.socket, rustix::net::Shutdown::Both);
    }

    fn has_protocol(&self) -> bool {
        !self.protocol().is_empty()
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        // Ends the waits of the thread that answers misses, which is then joined with the other fields.
        self.hang_up();
    }
}

/// The connection, to see it end. What is read from it is answers to others.
impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

/// The inclusive range of `size` bytes from `iova`, for [`Frontend::invalidate`]. `None` where it is empty or wraps.
pub fn range(iova: BusAddr, size: u64) -> Option<Invalidated> {
    Some(Invalidated::Range { first: iova, last: iova.last(size)? })
}

impl Shared {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        // A thread that panicked with the lock held left the stream in the middle of something.
        self.wire.lock().unwrap_or_else(|poisoned| {
            let mut wire = poisoned.into_inner();
            wire.state = State::Broken;
            wire
        })
    }

    fn require(&self, feature: ProtocolFeatures, name: &'static str) -> Result<(), ClientError> {
        if self.protocol.contains(feature) { Ok(()) } else { Err(ClientError::NotOffered(name)) }
    }

    /// Sends a message that has no answer of its own, and waits for its acknowledgement if there are any.
    fn command(&self, request: &Ask<'_>) -> Result<(), ClientError> {
        let mut wire = self.wire();
        if self.protocol.contains(ProtocolFeatures::REPLY_ACK) {
            wire.send(request.code(), &request.encode(NeedReply::Yes))?;
            wire.acknowledged(request.code())
        } else {
            wire.tell(request)
        }
    }
}

impl Wire {
    /// Sends a message that nobody answers.
    fn tell(&mut self, request: &Ask<'_>) -> Result<(), ClientError> {
        self.send(request.code(), &request.encode(NeedReply::No))
    }

    /// Sends a message that has an answer of its own.
    fn question(&mut self, request: &Ask<'_>) -> Result<Reply, ClientError> {
        self.tell(request)?;
        self.answer(request.code())
    }

    /// Sends a message whose answer is a number.
    fn number(&mut self, request: &Ask<'_>) -> Result<u64, ClientError> {
        match self.question(request)? {
            Reply::U64(number) => Ok(number),
            reply => unreachable!("no reply to {} parses as {reply:?}", request.code()),
        }
    }

    fn send(&mut self, message: FrontendCode, frame: &Frame<'_>) -> Result<(), ClientError> {
        if self.state == State::Broken {
            return Err(ClientError::Broken);
        }
        let sent = self.channel.send(frame);
        self.note(sent.map_err(|error| ClientError::Channel { message, error }))
    }

    /// Waits for the answer to `message`, which was sent.
    fn answer(&mut self, message: FrontendCode) -> Result<Reply, ClientError> {
        if self.state == State::Broken {
            return Err(ClientError::Broken);
        }
        let reply = match self.channel.receive_until(Instant::now() + self.timeout) {
            Ok(Message { header, body, fds }) => Reply::parse(message, &header, &body, fds).map_err(ClientError::from),
            Err(error) => Err(ClientError::Channel { message, error }),
        };
        self.note(reply)
    }

    /// Waits for the acknowledgement of `message`, which was sent.
    fn acknowledged(&mut self, message: FrontendCode) -> Result<(), ClientError> {
        match self.answer(message)? {
            Reply::U64(0) => Ok(()),
            Reply::U64(value) => Err(ClientError::Refused { message, value }),
            reply => unreachable!("no acknowledgement of {message} parses as {reply:?}"),
        }
    }

    /// After an error here the answer to this message may come when the next one is asked.
    fn note<T>(&mut self, result: Result<T, ClientError>) -> Result<T, ClientError> {
        if result.is_err() {
            self.state = State::Broken;
        }
        result
    }
}
