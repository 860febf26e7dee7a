//! One connection to a back-end, with the memory that it was given.

use crate::Options;
use crate::arena::{Arena, RingMemory};
use crate::kind::Kind;
use crate::seat::Seat;
use ringfence_device::Bell;
use ringfence_dma::{BusAddr, Permission};
use ringfence_hostmem::MapError;
use ringfence_ring::{DriverQueue, Format, Indirect, LayoutError, Notifications, Position, Rules};
use ringfence_vhost_user::client::{self, ClientError, Frontend, Translation, Translator, Vring};
use ringfence_vhost_user::session::bits;
use ringfence_vhost_user::wire::ProtocolFeatures;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What of vhost-user a back-end is asked for. What hands out memory (postcopy, shared objects, inflight tracking, host
/// notifiers, a device's state) is not: there is no memory to hand out, and what is under way is remembered here.
const PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::STATUS);

/// How long a back-end may take to answer a message. It may have to end what is under way first.
const ANSWER: Duration = Duration::from_secs(10);

/// Why a back-end can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody is there.
    #[error("{}: no back-end answers: {error}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        error: Errno,
    },
    /// It does not speak vhost-user as it should.
    #[error("{}: the back-end: {error}", path.display())]
    Client {
        /// The socket.
        path: PathBuf,
        /// What it did.
        error: ClientError,
    },
    /// It lacks what this needs.
    #[error("{}: the back-end does not offer {what}", path.display())]
    Lacks {
        /// The socket.
        path: PathBuf,
        /// What it lacks.
        what: &'static str,
    },
    /// It is another device than before.
    #[error("{}: another back-end than before: it lacks {what}, which the driver uses", path.display())]
    Changed {
        /// The socket.
        path: PathBuf,
        /// What it lacks.
        what: String,
    },
    /// The memory for it is not to be had.
    #[error("no memory for the back-end: {0}")]
    Memory(#[from] MapError),
    /// A ring that the back-end's format does not have.
    #[error("{0}")]
    Layout(#[from] LayoutError),
    /// The host is short of something.
    #[error("{0}")]
    Host(#[from] io::Error),
}

impl From<Errno> for LinkError {
    fn from(errno: Errno) -> Self {
        LinkError::Host(errno.into())
    }
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Link {
    path: PathBuf,
    frontend: Frontend,
    pub(crate) arena: Arc<Arena>,
    /// The rules that rings at this back-end keep to.
    pub(crate) rules: Rules,
    /// What the back-end was told of the driver's features, if it still holds.
    agreed: Mutex<Option<u64>>,
    has_memory: AtomicBool,
    /// Somebody ended it and has said why.
    ended: AtomicBool,
}

/// What a back-end is, as it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Profile {
    /// All that it offers.
    pub(crate) offered: u64,
    /// How many queues.
    pub(crate) queues: u16,
}

/// A queue at one back-end.
#[derive(Debug)]
pub(crate) struct Incarnation {
    pub(crate) link: Arc<Link>,
    pub(crate) ring: DriverQueue<RingMemory>,
    kick: Bell,
    pub(crate) call: OwnedFd,
}

impl Incarnation {
    /// Tells the back-end that there is something.
    pub(crate) fn kick(&mut self) {
        self.kick.ring();
    }
}

/// Opens a connection to `path` without ever waiting: a back-end that is busy with another front-end is not here yet.
pub(crate) fn dial(path: &Path) -> Result<UnixStream, LinkError> {
    let failed = |error| LinkError::Connect { path: path.to_owned(), error };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
    connect(&socket, &SocketAddrUnix::new(path).map_err(failed)?).map_err(failed)?;
    Ok(socket.into())
}

/// Whom to tell that the configuration space has changed, whichever back-end says so.
#[derive(Default)]
pub(crate) struct Announce(Mutex<Option<Box<dyn Fn() + Send + Sync>>>);

impl Announce {
    pub(crate) fn set(&self, changed: Box<dyn Fn() + Send + Sync>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(changed);
    }

    pub(crate) fn tell(&self) {
        if let Some(changed) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            changed();
        }
    }
}

/// What a back-end may say on a channel of its own. Translations there are none.
impl Translator for Announce {
    fn translate(&self, _iova: BusAddr, _perm: Permission) -> Option<Translation> {
        None
    }

    fn config_changed(&self) {
        self.tell();
    }
}

impl Link {
    /// Makes the acquaintance of the back-end at the other end of `stream`. It gets no memory yet.
    pub(crate) fn new(
        stream: UnixStream,
        options: &Options,
        announce: &Arc<Announce>,
    ) -> Result<(Self, Profile), LinkError> {
        let path = options.backend.clone();
        let failed = |error| LinkError::Client { path: options.backend.clone(), error };
        let how = client::Options { protocol: PROTOCOL_FEATURES, timeout: ANSWER, ..Default::default() };
        let frontend = Frontend::new(stream, how).map_err(failed)?;
        let offered = frontend.offered();
        let offers = |bit: u64| offered & bit != 0;
        if options.format == Format::Packed && !offers(bits::RING_PACKED) {
            return Err(LinkError::Lacks { path, what: "packed rings" });
        }
        let rules = Rules {
            format: options.format,
            notifications: if offers(bits::EVENT_IDX) { Notifications::EventIdx } else { Notifications::Flags },
            indirect: if offers(bits::INDIRECT_DESC) { Indirect::Allowed } else { Indirect::Refused },
        };
        let queues = queue_count(&frontend, options).map_err(failed)?;
        if frontend.protocol().contains(ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK) {
            frontend.serve_iotlb(Arc::clone(announce) as _).map_err(failed)?;
        }
        let link = Self {
            path,
            frontend,
            arena: Arc::new(Arena::new(options, queues)?),
            rules,
            agreed: Mutex::new(None),
            has_memory: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        };
        Ok((link, Profile { offered, queues }))
    }

    fn failed(&self, error: ClientError) -> LinkError {
        LinkError::Client { path: self.path.clone(), error }
    }

    /// Tells the back-end what the driver took, of `kind`'s own features; of rings it is told what this side does.
    pub(crate) fn agree(&self, kind: Kind, taken: u64) -> Result<(), LinkError> {
        let mut agreed = self.agreed.lock().unwrap_or_else(PoisonError::into_inner);
        if *agreed == Some(taken) {
            return Ok(());
        }
        let Rules { format, notifications, indirect } = self.rules;
        let mut features = taken & (kind.features() | bits::VERSION_1);
        if format == Format::Packed {
            features |= bits::RING_PACKED;
        }
        if notifications == Notifications::EventIdx {
            features |= bits::EVENT_IDX;
        }
        if indirect == Indirect::Allowed {
            features |= bits::INDIRECT_DESC;
        }
        let missing = features & !self.frontend.offered();
        if missing != 0 {
            return Err(LinkError::Changed { path: self.path.clone(), what: format!("features {missing:#x}") });
        }
        self.frontend.set_features(features).map_err(|error| self.failed(error))?;
        if !self.has_memory.load(Ordering::Relaxed) {
            self.frontend.set_memory(&[self.arena.region()]).map_err(|error| self.failed(error))?;
            self.has_memory.store(true, Ordering::Relaxed);
        }
        *agreed = Some(taken);
        Ok(())
    }

    /// Starts a queue at the back-end, with nothing in it.
    pub(crate) fn start(self: &Arc<Self>, seat: &Seat) -> Result<Incarnation, LinkError> {
        let memory = RingMemory::new(&self.arena, seat.index, self.rules.format, seat.size);
        let layout = memory.layout();
        let mut ring = DriverQueue::new(self.rules, seat.size, memory)?;
        ring.disable_callbacks();
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let (kick, call) = (eventfd(0, flags)?, eventfd(0, flags)?);
        let vring = Vring {
            index: seat.index as u8,
            size: seat.size,
            base: Position::start(self.rules.format).vring_base(self.rules.format),
            descriptor: layout.descriptors.0,
            available: layout.driver.0,
            used: layout.device.0,
            kick: Some(kick.as_fd()),
            call: Some(call.as_fd()),
        };
        self.frontend.start_vring(&vring).map_err(|error| self.failed(error))?;
        Ok(Incarnation { link: Arc::clone(self), ring, kick: Bell::new(kick), call })
    }

    /// Stops a queue in which nothing is under way.
    pub(crate) fn stop(&self, queue: u16) -> Result<(), LinkError> {
        self.frontend.stop_vring(queue as u8).map(drop).map_err(|error| self.failed(error))
    }

    /// `len` bytes of the configuration space from its start.
    pub(crate) fn config(&self, len: usize) -> Result<Vec<u8>, ClientError> {
        let mut config = vec![0; len];
        self.frontend.config(0, &mut config)?;
        Ok(config)
    }

    pub(crate) fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ClientError> {
        self.frontend.set_config(offset, data)
    }

    /// Passes the device status on, to a back-end that keeps one.
    pub(crate) fn set_status(&self, status: u8) -> Result<(), ClientError> {
        if status == 0 && self.frontend.protocol().contains(ProtocolFeatures::STATUS) {
            self.forget_agreement();
        }
        self.frontend.set_status(status)
    }

    /// Resets the device, where the back-end can do that.
    pub(crate) fn reset(&self) -> Result<(), ClientError> {
        if !self.frontend.protocol().contains(ProtocolFeatures::RESET_DEVICE) {
            return Ok(());
        }
        self.forget_agreement();
        self.frontend.reset()
    }

    fn forget_agreement(&self) {
        *self.agreed.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Ends the connection, which whoever looks after it then notices. `true`: it had not been ended before.
    pub(crate) fn hang_up(&self) -> bool {
        // In this order: whoever sees the connection end knows whether somebody did that.
        let first = !self.ended.swap(true, Ordering::SeqCst);
        self.frontend.hang_up();
        first
    }

    /// The connection, to see it end.
    pub(crate) fn socket(&self) -> &Frontend {
        &self.frontend
    }
}

/// How many queues there are for us.
fn queue_count(frontend: &Frontend, options: &Options) -> Result<u16, ClientError> {
    let group = options.kind.group();
    let has = match (frontend.queues()?, options.queues) {
        (Some(groups), _) => u16::try_from(groups).unwrap_or(u16::MAX),
        // One that can't count has as many as its user says.
        (None, Some(groups)) => groups,
        (None, None) => options.kind.usual_queues() / group,
    };
    let groups = has.min(options.queues.unwrap_or(MOST_QUEUES)).min(MOST_INDEXED / group);
    Ok(groups.max(1) * group)
}

/// Each queue is a thread: back-ends that could have hundreds are not given as many unasked.
const MOST_QUEUES: u16 = 64;

/// vhost-user names a queue with a byte where descriptors travel.
const MOST_INDEXED: u16 = 256;
