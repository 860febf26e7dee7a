//! The other mode: for guests without an IOMMU whose VMM demands the flag all the same.
//!
//! QEMU refuses a back-end without bit 33 when a device is configured with it, as it is in every confidential guest, and
//! strips the bit where nothing translates. So messages pass as they are, descriptors of guest memory included, and rings
//! run between the guest and the back-end directly; what is added is the flag and the protocol features that QEMU wants
//! to see with it. Nothing is confined. Whoever does translate is told to use the other mode.

use crate::link::dial;
use crate::{LinkError, Options};
use ringfence_hostmem::Placement;
use ringfence_policy::{Addressing, IommuMode};
use ringfence_vhost_user::channel::{Channel, ChannelError, Message, Received};
use ringfence_vhost_user::server::Ended;
use ringfence_vhost_user::wire::{
    F_PROTOCOL_FEATURES, Frame, FrontendCode, Header, NeedReply, ProtocolFeatures, Reply, Request, VringAddr, WireError,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What QEMU wants of a back-end that offers the flag, and is done here where the back-end can't.
const ADDED: ProtocolFeatures = ProtocolFeatures::REPLY_ACK.union(ProtocolFeatures::BACKEND_REQ);

/// How often an absent back-end is looked for.
const RETRY: Duration = Duration::from_millis(50);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Over {
    #[error("the front-end: {0}")]
    Frontend(ChannelError),
    #[error("the back-end: {0}")]
    Backend(ChannelError),
    #[error("the back-end left")]
    BackendLeft,
    #[error(
        "this machine has a vIOMMU ({0}), which a back-end would go past with --mode pass: refused; use --mode confine, \
         which is the default"
    )]
    Translated(&'static str),
    #[error("features {0:#x} were never offered")]
    Features(u64),
    #[error("bad message: {0}")]
    Wire(#[from] WireError),
    #[error("can't wait: {0}")]
    Wait(#[from] Errno),
}

/// One front-end and a back-end of its own.
struct Relay {
    frontend: Channel,
    backend: Channel,
    /// The device's features as offered to the front-end.
    offered: u64,
    /// Whether the back-end knows protocol features at all.
    has_protocol: bool,
    /// Those that it offers.
    theirs: ProtocolFeatures,
    /// Where the guest's memory is.
    regions: Vec<Placement>,
    /// The channel that the back-end does not know of, kept open for whoever is at its other end.
    kept: Option<OwnedFd>,
}

/// Passes messages between the front-end at `stream` and the back-end, until one of them leaves or `end` becomes readable.
pub fn relay(stream: UnixStream, options: &Options, end: BorrowedFd<'_>) -> Ended {
    let backend = match wait_for_backend(options) {
        Ok(backend) => backend,
        Err(error) => {
            tracing::error!("connection closed: {error}");
            return Ended::ByFrontend;
        }
    };
    let mut relay = Relay {
        frontend: Channel::new(stream.into()),
        backend: Channel::new(backend.into()),
        offered: 0,
        has_protocol: false,
        theirs: ProtocolFeatures::empty(),
        regions: Vec::new(),
        kept: None,
    };
    match relay.run(end) {
        Ok(ended) => {
            tracing::info!("connection ended");
            ended
        }
        Err(over) => {
            tracing::error!("connection closed: {over}");
            Ended::ByFrontend
        }
    }
}

fn wait_for_backend(options: &Options) -> Result<UnixStream, LinkError> {
    let deadline = Instant::now() + options.patience;
    loop {
        match dial(&options.backend) {
            Ok(backend) => return Ok(backend),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

impl Relay {
    fn run(&mut self, end: BorrowedFd<'_>) -> Result<Ended, Over> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(end, PollFlags::IN),
                PollFd::new(&self.frontend, PollFlags::IN),
                PollFd::new(&self.backend, PollFlags::IN),
            ];
            let held = self.frontend.holds_message() || self.backend.holds_message();
            match poll(&mut fds, held.then(Timespec::default).as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !fds[0].revents().is_empty() {
                return Ok(Ended::ByUs);
            }
            // Answers first: somebody waits for them.
            match self.backend.receive().map_err(Over::Backend)? {
                Received::Message(message) => self.answer(message)?,
                Received::Nothing => {}
                Received::End => return Err(Over::BackendLeft),
            }
            match self.frontend.receive().map_err(Over::Frontend)? {
                Received::Message(message) => self.message(message)?,
                Received::Nothing => {}
                Received::End => return Ok(Ended::ByFrontend),
            }
        }
    }

    /// A message of the front-end's, on to the back-end where it is for it.
    fn message(&mut self, message: Message) -> Result<(), Over> {
        let header = message.header;
        let code = FrontendCode::try_from(header.request).ok();
        match code {
            // What matters here is looked at; all else passes as it is, known or not.
            Some(
                FrontendCode::SetFeatures
                | FrontendCode::GetProtocolFeatures
                | FrontendCode::SetProtocolFeatures
                | FrontendCode::SetMemTable
                | FrontendCode::AddMemReg
                | FrontendCode::RemMemReg
                | FrontendCode::SetVringAddr
                | FrontendCode::SetVringEnable
                | FrontendCode::SetBackendReqFd
                | FrontendCode::IotlbMsg,
            ) => {
                let request = Request::parse(&message.header, &message.body, message.fds)?;
                match self.look(request)? {
                    Some(request) => {
                        let frame = request.encode(self.need_reply(&header));
                        self.backend.send(&frame).map_err(Over::Backend)?;
                        self.acknowledge_for_it(&header)
                    }
                    None => self.acknowledge(&header),
                }
            }
            _ => {
                self.backend.send(&raw(&message, self.need_reply(&header))).map_err(Over::Backend)?;
                self.acknowledge_for_it(&header)
            }
        }
    }

    /// What of a message goes to the back-end.
    fn look(&mut self, request: Request) -> Result<Option<Request>, Over> {
        match request {
            Request::SetFeatures(features) => {
                let taken = features & !F_PROTOCOL_FEATURES;
                match IommuMode::Offer.accept(self.offered, taken) {
                    Ok(Addressing::Physical) => {}
                    Ok(Addressing::Translated) => return Err(Over::Translated("the flag was not stripped")),
                    Err(_) => return Err(Over::Features(taken & !self.offered)),
                }
                Ok(Some(Request::SetFeatures(if self.has_protocol { features } else { taken })))
            }
            Request::IotlbMsg(_) => Err(Over::Translated("IOTLB_MSG")),
            Request::SetVringAddr(addresses) => {
                self.check_ring(&addresses)?;
                Ok(Some(request))
            }
            Request::SetMemTable(table) => {
                self.regions = table.iter().map(|(placement, _)| *placement).collect();
                Ok(Some(Request::SetMemTable(table)))
            }
            Request::AddMemReg(placement, fd) => {
                self.regions.push(placement);
                Ok(Some(Request::AddMemReg(placement, fd)))
            }
            Request::RemMemReg(placement) => {
                self.regions.retain(|region| region.frontend_va != placement.frontend_va);
                Ok(Some(request))
            }
            Request::SetBackendReqFd(fd) if !self.theirs.contains(ProtocolFeatures::BACKEND_REQ) => {
                self.kept = Some(fd);
                Ok(None)
            }
            Request::SetProtocolFeatures(taken) if self.has_protocol => {
                Ok(Some(Request::SetProtocolFeatures(taken & self.theirs)))
            }
            // A back-end from before there were any: its rings are always enabled.
            Request::SetProtocolFeatures(_) | Request::SetVringEnable { .. } if !self.has_protocol => Ok(None),
            Request::GetProtocolFeatures if !self.has_protocol => {
                let answer = Reply::U64(ADDED.bits());
                let frame = answer.encode(FrontendCode::GetProtocolFeatures.number());
                self.frontend.send(&frame).map_err(Over::Frontend)?;
                Ok(None)
            }
            request => Ok(Some(request)),
        }
    }

    /// A ring that is not in the memory table is where an IOMMU says.
    fn check_ring(&self, addresses: &VringAddr) -> Result<(), Over> {
        let inside = |addr: u64| {
            self.regions.iter().any(|region| addr.checked_sub(region.frontend_va.0).is_some_and(|at| at < region.size))
        };
        match [addresses.descriptor, addresses.available, addresses.used].into_iter().all(inside) {
            true => Ok(()),
            false => Err(Over::Translated("a ring that is not in the memory table")),
        }
    }

    /// Whether the back-end is asked for an acknowledgement.
    fn need_reply(&self, asked: &Header) -> NeedReply {
        if self.theirs.contains(ProtocolFeatures::REPLY_ACK) { asked.need_reply } else { NeedReply::No }
    }

    /// Says that a message was carried out, if somebody waits to hear it.
    fn acknowledge(&self, asked: &Header) -> Result<(), Over> {
        match asked.need_reply {
            NeedReply::Yes => self.frontend.send(&Reply::U64(0).encode(asked.request)).map_err(Over::Frontend),
            NeedReply::No => Ok(()),
        }
    }

    /// The same for a back-end that can't say so.
    fn acknowledge_for_it(&self, asked: &Header) -> Result<(), Over> {
        if self.theirs.contains(ProtocolFeatures::REPLY_ACK) { Ok(()) } else { self.acknowledge(asked) }
    }

    /// An answer of the back-end's, on to the front-end.
    fn answer(&mut self, mut message: Message) -> Result<(), Over> {
        let number = message.body.as_slice().try_into().map(u64::from_ne_bytes);
        match (FrontendCode::try_from(message.header.request), number) {
            (Ok(FrontendCode::GetFeatures), Ok(features)) => {
                self.has_protocol = features & F_PROTOCOL_FEATURES != 0;
                self.offered = IommuMode::Offer.offers(features & !F_PROTOCOL_FEATURES);
                message.body = (self.offered | F_PROTOCOL_FEATURES).to_ne_bytes().to_vec();
            }
            (Ok(FrontendCode::GetProtocolFeatures), Ok(features)) => {
                self.theirs = ProtocolFeatures::from_bits_retain(features);
                message.body = (self.theirs | ADDED).bits().to_ne_bytes().to_vec();
            }
            _ => {}
        }
        self.frontend.send(&raw(&message, message.header.need_reply)).map_err(Over::Frontend)
    }
}

/// The message as it came.
fn raw(message: &Message, need_reply: NeedReply) -> Frame<'_> {
    let header = Header { need_reply, ..message.header };
    Frame { bytes: [&header.encode()[..], &message.body].concat(), fds: message.fds.iter().map(AsFd::as_fd).collect() }
}
