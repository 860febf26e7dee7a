//! The machine's side, as far as a test or a tool needs one: it grants memory, drives registers and answers what the
//! function asks. Everything waits; nothing is kept.
//!
//! [`Client::function`] is a PCI function to the drivers of `ringfence-driver`, and a client is an
//! [`Iommu`] to their mappers: what a driver lends is granted page by page, at addresses
//! that have nothing to do with where it is.

use crate::wire::{
    Answer, Capabilities, Command, DmaMap, DmaUnmap, Frame, Header, IrqData, Kind, Request, SetIrqs, TwinSocket,
    Version, WireError, Write,
};
use ringfence_dma::{BusAddr, DmaError, Gpa, Permission};
use ringfence_driver::Registers;
use ringfence_driver::mapper::{Iommu, Run};
use ringfence_driver::pci::{Bar, BarKind, Function};
use ringfence_vhost_user::channel::{Channel, ChannelError, Message, Received};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Memory that is reached by messages.
pub trait Far {
    /// Fills `into` from `addr`; `false`: not there.
    fn read(&self, addr: BusAddr, into: &mut [u8]) -> bool;

    /// Stores `from` at `addr`; `false`: not there.
    fn write(&self, addr: BusAddr, from: &[u8]) -> bool;
}

/// One connection to a server.
pub struct Client {
    main: RefCell<Channel<Header>>,
    /// The server's own socket, if it made one.
    twin: RefCell<Option<Channel<Header>>>,
    next: Cell<u16>,
    far: Option<Box<dyn Far>>,
    timeout: Duration,
    /// What the server says it can do.
    server: Capabilities,
    /// The file that [`Iommu::map`] grants parts of.
    memory: Option<OwnedFd>,
}

/// What became of a command.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server refuses, with this errno.
    #[error("{command} was refused: {errno}")]
    Refused {
        /// Which command.
        command: Command,
        /// Why, if it says so.
        errno: u32,
    },
    /// The socket is of no use any more.
    #[error("{0}")]
    Channel(ChannelError<WireError>),
    /// What came back is no answer to what was asked.
    #[error("a bad answer to {0}")]
    Answer(Command),
}

impl From<ChannelError<WireError>> for ClientError {
    fn from(error: ChannelError<WireError>) -> Self {
        ClientError::Channel(error)
    }
}

/// An answer: its payload and what came with it.
#[derive(Debug)]
pub struct Answered {
    /// The payload.
    pub body: Vec<u8>,
    /// The descriptors.
    pub fds: Vec<OwnedFd>,
}

impl Client {
    /// Negotiates on a fresh connection. `far` answers for what is granted without a file.
    ///
    /// # Errors
    /// The server does not speak the protocol.
    pub fn new(stream: UnixStream, twin: bool, far: Option<Box<dyn Far>>) -> Result<Self, ClientError> {
        let mut client = Self {
            main: RefCell::new(Channel::new(stream.into())),
            twin: RefCell::default(),
            next: Cell::new(0),
            far,
            timeout: Duration::from_secs(20),
            server: Capabilities::default(),
            memory: None,
        };
        let capabilities = Capabilities {
            max_msg_fds: Some(16),
            max_data_xfer_size: Some(1 << 20),
            max_dma_maps: Some(65535),
            pgsizes: Some(4096),
            twin_socket: twin.then_some(TwinSocket { supported: true, fd_index: None }),
            write_multiple: Some(true),
        };
        let proposed = Version { major: 0, minor: 1, capabilities };
        let Answered { body, mut fds } = client.ask(&Request::Version(proposed))?;
        let version = Version::parse(&body).map_err(|_| ClientError::Answer(Command::Version))?;
        let index = version.capabilities.twin_socket.as_ref().and_then(|twin| twin.fd_index);
        if let Some(index) = index {
            let there = (index as usize) < fds.len();
            let socket = there.then(|| fds.swap_remove(index as usize)).ok_or(ClientError::Answer(Command::Version))?;
            client.twin = RefCell::new(Some(Channel::new(socket)));
        }
        client.server = version.capabilities;
        Ok(client)
    }

    /// What the server can do.
    pub fn server(&self) -> &Capabilities {
        &self.server
    }

    /// Has drivers' memory be parts of this file, by guest-physical address.
    pub fn set_memory(&mut self, file: OwnedFd) {
        self.memory = Some(file);
    }

    /// Sends a command without waiting for its answer; says by which id it is known.
    ///
    /// # Errors
    /// The socket failed.
    pub fn send(&self, request: &Request, answer: Answer) -> Result<u16, ClientError> {
        let id = self.next.replace(self.next.get().wrapping_add(1));
        self.main.borrow().send(&request.encode(id, answer))?;
        Ok(id)
    }

    /// Waits for the answer to a command, and answers what the server asks meanwhile.
    ///
    /// # Errors
    /// The server refuses, or answers something else.
    pub fn receive(&self, id: u16, command: Command) -> Result<Answered, ClientError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            self.serve_twin()?;
            let message = self.main.borrow_mut().receive_until(deadline.min(Instant::now() + Duration::from_millis(1)));
            let message = match message {
                Err(ChannelError::TimedOut(_)) if Instant::now() < deadline => continue,
                message => message?,
            };
            if message.header.kind == Kind::Command {
                let main = self.main.borrow();
                self.serve(&main, message)?;
                continue;
            }
            let Header { id: came, command: number, error, .. } = message.header;
            if came != id || number != command as u16 || (error.is_some() && !message.body.is_empty()) {
                return Err(ClientError::Answer(command));
            }
            return match error {
                Some(errno) => Err(ClientError::Refused { command, errno }),
                None => Ok(Answered { body: message.body, fds: message.fds }),
            };
        }
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// The server refuses, or the connection is over.
    pub fn ask(&self, request: &Request) -> Result<Answered, ClientError> {
        let id = self.send(request, Answer::Wanted)?;
        self.receive(id, request.command())
    }

    /// Answers what the server has asked, and does not wait.
    ///
    /// # Errors
    /// The connection is over.
    pub fn serve_pending(&self) -> Result<(), ClientError> {
        self.serve_twin()?;
        loop {
            let received = self.main.borrow_mut().receive()?;
            match received {
                Received::Message(message) if message.header.kind == Kind::Command => {
                    let main = self.main.borrow();
                    self.serve(&main, message)?;
                }
                Received::Message(_) => return Err(ClientError::Answer(Command::Version)),
                Received::Nothing => return Ok(()),
                Received::End => return Err(ClientError::Channel(ChannelError::Closed)),
            }
        }
    }

    fn serve_twin(&self) -> Result<(), ClientError> {
        let mut twin = self.twin.borrow_mut();
        while let Some(channel) = &mut *twin {
            match channel.receive()? {
                Received::Message(message) => self.serve(channel, message)?,
                _ => break,
            }
        }
        Ok(())
    }

    /// Answers one question of the server's.
    fn serve(&self, channel: &Channel<Header>, message: Message<Header>) -> Result<(), ClientError> {
        let Message { header, body, .. } = message;
        let answer = self.reached(&header, &body);
        if header.answer == Answer::Wanted {
            let frame: Frame<'_> = match &answer {
                Some(body) => header.reply(body, &[]),
                None => header.refusal(14),
            };
            channel.send(&frame)?;
        }
        Ok(())
    }

    fn reached(&self, header: &Header, body: &[u8]) -> Option<Vec<u8>> {
        let number = |at: usize| body.get(at..at + 8).map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("eight")));
        let (addr, count) = (BusAddr(number(0)?), usize::try_from(number(8)?).ok()?);
        let far = self.far.as_ref()?;
        match Command::from_number(header.command)? {
            Command::DmaRead => {
                let mut data = vec![0; count];
                far.read(addr, &mut data).then(|| [&body[..16], &data].concat())
            }
            Command::DmaWrite => far.write(addr, body.get(16..16 + count)?).then(|| body[..16].to_vec()),
            _ => None,
        }
    }

    /// Grants memory.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn map(
        &self,
        first: BusAddr,
        len: u64,
        permission: Permission,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), ClientError> {
        let last = BusAddr(first.0 + (len - 1));
        let fd = file.map(|(fd, _)| fd.try_clone_to_owned()).transpose();
        let fd = fd.map_err(|_| ClientError::Answer(Command::DmaMap))?;
        let offset = file.map_or(0, |(_, offset)| offset);
        self.ask(&Request::DmaMap(DmaMap { permission, offset, first, last, fd })).map(drop)
    }

    /// Takes a grant back.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn unmap(&self, first: BusAddr, len: u64) -> Result<(), ClientError> {
        self.ask(&Request::DmaUnmap(DmaUnmap::range(first, BusAddr(first.0 + (len - 1))))).map(drop)
    }

    /// Reads registers.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn read(&self, region: u32, offset: u64, into: &mut [u8]) -> Result<(), ClientError> {
        let Answered { body, .. } = self.ask(&Request::RegionRead { region, offset, count: into.len() as u32 })?;
        let data = body.get(16..).filter(|data| data.len() == into.len());
        into.copy_from_slice(data.ok_or(ClientError::Answer(Command::RegionRead))?);
        Ok(())
    }

    /// Writes registers.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.ask(&Request::RegionWrite(Write { region, offset, data: data.to_vec() })).map(drop)
    }

    /// Has MSI-X vectors from `start` on tell by `fds`.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn set_irqs(&self, irqs: SetIrqs) -> Result<(), ClientError> {
        self.ask(&Request::SetIrqs(irqs)).map(drop)
    }

    /// Has MSI-X vector `vector` tell by `fd`.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn set_vector(&self, vector: u32, fd: OwnedFd) -> Result<(), ClientError> {
        let data = IrqData::EventFds(vec![fd]);
        let action = crate::wire::Action::Trigger;
        self.set_irqs(SetIrqs { index: crate::wire::index::MSIX, start: vector, count: 1, action, data })
    }

    /// Resets the device.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn reset(&self) -> Result<(), ClientError> {
        self.ask(&Request::DeviceReset).map(drop)
    }

    /// What rings the queues, by number: eventfds for writing to.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn doorbells(&self) -> Result<Vec<OwnedFd>, ClientError> {
        let request = Request::RegionIoFds { argsz: 1 << 16, index: crate::layout::BAR_VIRTIO };
        self.ask(&request).map(|answered| answered.fds)
    }

    /// The function, for a driver.
    pub fn function(&self) -> Remote<'_> {
        Remote(self)
    }
}

impl Iommu for Client {
    fn page(&self) -> usize {
        4096
    }

    fn map(&self, addr: BusAddr, physical: Gpa, len: usize, permission: Permission) -> Result<(), DmaError> {
        let file = self.memory.as_ref().map(|file| (file.as_fd(), physical.0));
        Client::map(self, addr, len as u64, permission, file).map_err(|_| DmaError::Unreachable { physical })
    }

    fn unmap(&self, runs: &[Run]) -> Result<(), DmaError> {
        let one = |run: &Run| Client::unmap(self, run.addr, run.len as u64);
        runs.iter().try_for_each(one).map_err(|_| DmaError::Unreachable { physical: Gpa(0) })
    }
}

/// A function behind a connection. A server that is gone reads as ones, as what was unplugged does.
#[derive(Clone, Copy)]
pub struct Remote<'c>(&'c Client);

impl<'c> Function for Remote<'c> {
    type Registers = Window<'c>;

    fn slot(&self) -> u64 {
        0
    }

    fn read(&mut self, offset: u8) -> u32 {
        let mut bytes = [0xff; 4];
        let _ = self.0.read(crate::layout::CONFIG, offset.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u8, value: u32) {
        let _ = self.0.write(crate::layout::CONFIG, offset.into(), &value.to_le_bytes());
    }

    fn map(&mut self, bar: Bar, offset: u64, len: usize) -> Option<Window<'c>> {
        Some(Window { client: self.0, region: bar.index.into(), offset, len })
    }

    fn bar(&mut self, index: u8) -> Option<BarKind> {
        match crate::layout::region_size(index.into()) {
            0 => None,
            len => Some(BarKind::Memory(Bar { index, address: 0, len })),
        }
    }
}

/// Registers behind a connection.
#[derive(Clone, Copy)]
pub struct Window<'c> {
    client: &'c Client,
    region: u32,
    offset: u64,
    len: usize,
}

impl Window<'_> {
    fn read<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0xff; N];
        let _ = self.client.read(self.region, self.offset + offset as u64, &mut bytes);
        bytes
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        let _ = self.client.write(self.region, self.offset + offset as u64, bytes);
    }
}

impl Registers for Window<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn read_u8(&self, offset: usize) -> u8 {
        u8::from_le_bytes(self.read(offset))
    }

    fn read_u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    fn read_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    fn write_u8(&self, offset: usize, value: u8) {
        self.write(offset, &value.to_le_bytes());
    }

    fn write_u16(&self, offset: usize, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    fn write_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }
}
