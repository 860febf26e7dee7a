//! The function's side of one connection: what each message does. Knows no socket; [`crate::server`] has it.

use crate::event::Event;
use crate::function::{Around, Function, Msix};
use crate::layout::REGIONS;
use crate::link::Link;
pub use crate::memory::GrantError;
use crate::memory::{MAX_MAPS, Memory};
use crate::wire::{
    Action, Capabilities, IrqData, IrqInfo, MAX_DATA, MAX_FDS, Reply, Request, SetIrqs, TwinSocket, Version, Write,
    index,
};
use ringfence_device::Device;
use ringfence_policy::IommuMode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// The version of the protocol: 0.1.
const MAJOR: u16 = 0;
const MINOR: u16 = 1;

/// The page sizes of DMA maps.
const PAGE_SIZES: u64 = 4096;

/// For how long storage is waited for when a queue stops, at the most: QEMU waits five seconds for an answer.
const IO_PATIENCE: Duration = Duration::from_secs(3);

/// What an operator decides about a device.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What to do about the IOMMU.
    pub iommu: IommuMode,
    /// The longest queue that a driver may set up.
    pub queue_size: u16,
    /// For how long an empty queue is looked at before its thread sleeps.
    pub poll: Duration,
    /// For how long storage that does not answer may keep a driver waiting for a reset. Not above three seconds.
    pub io_timeout: Duration,
    /// The most MSI-X vectors there are. `None`: one for each queue and one for the configuration.
    pub vectors: Option<NonZeroU16>,
}

/// The function's side of one connection.
pub struct Session {
    // Before the memory: its queues are gone before that is.
    function: Function,
    memory: Memory,
    negotiated: Negotiation,
    end: OwnedFd,
    /// Our end of the socket for our own commands, until the server takes it.
    twin: Option<OwnedFd>,
    maps: u64,
    unmaps: u64,
}

/// Whether a version was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Negotiation {
    /// Not yet.
    Open,
    /// The client takes so many file descriptors with one message.
    Done { max_fds: usize },
}

/// What a connection came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Grants made.
    pub maps: u64,
    /// Messages that took grants back.
    pub unmaps: u64,
    /// Accesses that were not let through.
    pub faults: u64,
}

/// What a message could not have.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Something before the version.
    #[error("{0} before VERSION")]
    TooEarly(crate::wire::Command),
    /// A second version.
    #[error("a second VERSION")]
    Again,
    /// A version that there is not.
    #[error("protocol version {major}.{minor}; this is {MAJOR}.{MINOR}")]
    Version {
        /// Proposed.
        major: u16,
        /// Proposed.
        minor: u16,
    },
    /// Memory that can't be granted or taken back.
    #[error("{0}")]
    Grant(#[from] GrantError),
    /// A region that there is not.
    #[error("region {0} of {REGIONS}")]
    Region(u32),
    /// A range that is not in its region.
    #[error("{count} bytes at {offset:#x} of region {region}, which has {size:#x}")]
    Outside {
        /// Which region.
        region: u32,
        /// Where.
        offset: u64,
        /// How many bytes.
        count: u64,
        /// How many there are.
        size: u64,
    },
    /// An interrupt type that there is not.
    #[error("interrupt type {0} of {count}", count = index::COUNT)]
    Irq(u32),
    /// Interrupts that there are not.
    #[error("interrupts {start} and {count} more of type {index}, which has {available}")]
    Irqs {
        /// Which type.
        index: u32,
        /// The first.
        start: u32,
        /// How many.
        count: u32,
        /// How many there are.
        available: u32,
    },
    /// Eventfds for masking: that is no use to anybody here.
    #[error("eventfds that tell of masking are not supported")]
    MaskEvents,
    /// Granted memory has gone: the client cut its file short.
    #[error("granted memory is gone: the client cut its file short")]
    MemoryLost,
    /// The host is short of something.
    #[error("{0}")]
    Resources(#[from] io::Error),
}

impl SessionError {
    /// What the client is told.
    pub fn errno(&self) -> Errno {
        match self {
            SessionError::Grant(error) => error.errno(),
            SessionError::MemoryLost => Errno::IO,
            SessionError::Resources(error) => Errno::from_io_error(error).unwrap_or(Errno::IO),
            _ => Errno::INVAL,
        }
    }

    /// Whether the connection ends: what follows would be wrong.
    pub fn is_fatal(&self) -> bool {
        matches!(self, SessionError::Version { .. } | SessionError::TooEarly(_) | SessionError::MemoryLost)
    }
}

impl Session {
    /// A session with nothing granted. It answers on `socket`, and hurries once `end` is readable.
    ///
    /// # Errors
    /// The host is short of something.
    pub fn new(device: Arc<dyn Device>, options: Options, socket: OwnedFd, end: OwnedFd) -> io::Result<Self> {
        let options = Options { io_timeout: options.io_timeout.min(IO_PATIENCE), ..options };
        let memory = Memory::new(Arc::new(Link::new(socket)));
        let function = Function::new(device, options)?;
        Ok(Self { function, memory, negotiated: Negotiation::Open, end, twin: None, maps: 0, unmaps: 0 })
    }

    /// Readable when [`Session::look`] has something to see.
    pub(crate) fn news(&self) -> [BorrowedFd<'_>; 2] {
        self.function.news()
    }

    /// Takes in what happened elsewhere.
    pub(crate) fn look(&mut self) {
        self.function.look();
    }

    pub(crate) fn link(&self) -> Arc<Link> {
        Arc::clone(self.memory.link())
    }

    /// Our end of the socket for our own commands, once.
    pub(crate) fn take_twin(&mut self) -> Option<OwnedFd> {
        self.twin.take()
    }

    /// What the connection has come to.
    pub fn counted(&self) -> Counted {
        Counted { maps: self.maps, unmaps: self.unmaps, faults: self.function.faults() }
    }

    /// Whether granted memory has gone from under us: a file that was cut short. It reads as zeroes since, so whatever
    /// goes on would go on with wrong bytes.
    ///
    /// # Errors
    /// [`SessionError::MemoryLost`].
    pub fn check_memory(&self) -> Result<(), SessionError> {
        if self.memory.is_lost() { Err(SessionError::MemoryLost) } else { Ok(()) }
    }

    /// Does what a message says.
    ///
    /// # Errors
    /// What could not be had, for the answer and the log.
    pub fn handle(&mut self, request: Request) -> Result<Reply, SessionError> {
        if self.negotiated == Negotiation::Open && !matches!(request, Request::Version(_)) {
            return Err(SessionError::TooEarly(request.command()));
        }
        match request {
            Request::Version(version) => self.version(version),
            Request::DmaMap(map) => {
                self.memory.map(map)?;
                self.maps += 1;
                Ok(Reply::Done)
            }
            Request::DmaUnmap(unmap) => {
                self.memory.unmap(unmap.what, self.end.as_fd())?;
                self.unmaps += 1;
                Ok(Reply::Unmapped(unmap))
            }
            Request::DeviceInfo => Ok(Reply::DeviceInfo { regions: REGIONS, irqs: index::COUNT }),
            Request::RegionInfo { index } => {
                Ok(Reply::RegionInfo { index: region(index)?, size: self.function.region_size(index) })
            }
            Request::RegionIoFds { argsz, index } => self.doorbells(argsz, index),
            Request::IrqInfo { index } => Ok(Reply::IrqInfo(IrqInfo { index, count: self.irqs(index)? })),
            Request::SetIrqs(irqs) => self.set_irqs(irqs),
            Request::RegionRead { region, offset, count } => {
                self.check(region, offset, count.into())?;
                let mut data = vec![0; count as usize];
                self.function.read(region, offset, &mut data);
                Ok(Reply::Data(Write { region, offset, data }))
            }
            Request::RegionWrite(write) => {
                let (region, offset, count) = (write.region, write.offset, write.data.len() as u32);
                self.write(&write)?;
                Ok(Reply::Written { region, offset, count })
            }
            Request::RegionWriteMulti(writes) => {
                writes.iter().try_for_each(|write| self.write(write))?;
                Ok(Reply::WrittenMulti { count: writes.len() as u64 })
            }
            Request::DeviceReset => {
                let Self { function, memory, end, .. } = self;
                function.reset(&Around { memory, hurry: end.as_fd() });
                Ok(Reply::Done)
            }
        }
    }

    fn version(&mut self, Version { major, minor, capabilities }: Version) -> Result<Reply, SessionError> {
        if self.negotiated != Negotiation::Open {
            return Err(SessionError::Again);
        }
        if major != MAJOR {
            return Err(SessionError::Version { major, minor });
        }
        let Capabilities { max_msg_fds, max_data_xfer_size, max_dma_maps, pgsizes, twin_socket, write_multiple } =
            capabilities;
        // What the client names is answered, and nothing else.
        let max_fds = max_msg_fds.map_or(1, |max| usize::try_from(max).unwrap_or(MAX_FDS)).min(MAX_FDS);
        let (twin, theirs) = match twin_socket {
            // It has to take a descriptor for it.
            Some(TwinSocket { supported: true, .. }) if max_fds > 0 => {
                let flags = SocketFlags::CLOEXEC;
                let (ours, theirs) =
                    socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(io::Error::from)?;
                (Some(ours), Some(theirs))
            }
            _ => (None, None),
        };
        let asked = twin.as_ref().map(OwnedFd::try_clone).transpose()?;
        let max = max_data_xfer_size.map_or(MAX_DATA, |max| u32::try_from(max).unwrap_or(MAX_DATA));
        self.memory.link().set_up(max, asked);
        self.twin = twin;
        self.negotiated = Negotiation::Done { max_fds };
        let capabilities = Capabilities {
            max_msg_fds: max_msg_fds.map(|_| MAX_FDS as u64),
            max_data_xfer_size: max_data_xfer_size.map(|_| MAX_DATA.into()),
            max_dma_maps: max_dma_maps.map(|_| MAX_MAPS as u64),
            pgsizes: pgsizes.map(|_| PAGE_SIZES),
            twin_socket: theirs.as_ref().map(|_| TwinSocket { supported: true, fd_index: Some(0) }),
            write_multiple: write_multiple.map(|_| true),
        };
        Ok(Reply::Version(Version { major, minor: minor.min(MINOR), capabilities }, theirs))
    }

    fn doorbells(&self, argsz: u32, index: u32) -> Result<Reply, SessionError> {
        let Negotiation::Done { max_fds } = self.negotiated else { unreachable!("checked by `handle`") };
        let parts = self.function.doorbells(region(index)?, max_fds)?;
        Ok(Reply::RegionIoFds { argsz, index, parts })
    }

    /// How many interrupts there are of a type.
    fn irqs(&self, index: u32) -> Result<u32, SessionError> {
        match index {
            index::MSIX => Ok(self.function.vectors()),
            // No line is wired, and nothing else is told of.
            index::INTX | index::MSI | index::ERR | index::REQ => Ok(0),
            _ => Err(SessionError::Irq(index)),
        }
    }

    fn set_irqs(&mut self, SetIrqs { index, start, count, action, data }: SetIrqs) -> Result<Reply, SessionError> {
        let available = self.irqs(index)?;
        // The wire has seen to it that this does not wrap.
        if start + count > available {
            return Err(SessionError::Irqs { index, start, count, available });
        }
        if index != index::MSIX {
            // There are none of it, so there is nothing to do to them.
            return Ok(Reply::Done);
        }
        let msix = self.function.msix();
        match (action, data) {
            (Action::Trigger, IrqData::None) if count == 0 => msix.turn_off(),
            (Action::Trigger, IrqData::EventFds(fds)) if fds.is_empty() => {
                msix.set_lines(start, (0..count).map(|_| None).collect());
            }
            (Action::Trigger, IrqData::EventFds(fds)) => {
                let lines = fds.into_iter().map(|fd| Event::of(fd).map(Some));
                msix.set_lines(start, lines.collect::<io::Result<_>>()?);
            }
            (Action::Mask | Action::Unmask, IrqData::EventFds(_)) => return Err(SessionError::MaskEvents),
            (action, IrqData::None) => (start..start + count).for_each(|vector| act(msix, action, vector)),
            (action, IrqData::Bools(bools)) => {
                (start..).zip(bools).filter(|&(_, yes)| yes).for_each(|(vector, _)| act(msix, action, vector));
            }
        }
        self.function.rerouted();
        Ok(Reply::Done)
    }

    fn check(&self, number: u32, offset: u64, count: u64) -> Result<(), SessionError> {
        let size = self.function.region_size(region(number)?);
        match offset.checked_add(count).filter(|&end| end <= size) {
            Some(_) => Ok(()),
            None => Err(SessionError::Outside { region: number, offset, count, size }),
        }
    }

    fn write(&mut self, Write { region, offset, data }: &Write) -> Result<(), SessionError> {
        self.check(*region, *offset, data.len() as u64)?;
        let Self { function, memory, end, .. } = self;
        function.write(*region, *offset, data, &Around { memory, hurry: end.as_fd() });
        Ok(())
    }

    /// How many grants there are.
    pub fn grants(&self) -> usize {
        self.memory.len()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Queues first, so that nothing touches the memory that goes with the session.
        let Self { function, memory, end, .. } = self;
        function.end(&Around { memory, hurry: end.as_fd() });
    }
}

fn region(index: u32) -> Result<u32, SessionError> {
    if index < REGIONS { Ok(index) } else { Err(SessionError::Region(index)) }
}

fn act(msix: &mut Msix, action: Action, vector: u32) {
    match action {
        Action::Mask => msix.set_masked(vector, true),
        Action::Unmask => msix.set_masked(vector, false),
        // There are no more vectors than the table has.
        Action::Trigger => msix.try_out(vector as u16),
    }
}
