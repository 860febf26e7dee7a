use super::payload::{self, RawVringArea, RawVringState};
use super::{BackendCode, Frame, Header, IotlbReport, Kind, NeedReply, WireError};
use std::os::fd::OwnedFd;
use zerocopy::IntoBytes;

/// What a back-end asks of a front-end.
#[derive(Debug)]
pub enum BackendRequest {
    /// About translations.
    IotlbMsg(IotlbReport),
    /// The configuration space has changed.
    ConfigChangeMsg,
    /// A page that the guest may write its kicks to.
    VringHostNotifierMsg {
        /// Which queue.
        index: u8,
        /// How many bytes.
        size: u64,
        /// Where in the file.
        offset: u64,
        /// The file; `None` takes an earlier one away.
        fd: Option<OwnedFd>,
    },
    /// Buffers were used.
    VringCall {
        /// Which queue.
        index: u32,
    },
    /// The queue is broken.
    VringErr {
        /// Which queue.
        index: u32,
    },
}

const VRING_INDEX: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;

impl BackendRequest {
    /// Reads the message behind `header`. `body` is all of its payload, `fds` all that came with it.
    ///
    /// # Errors
    /// The message is not one that a back-end can mean; `fds` are closed.
    pub fn parse(header: &Header, body: &[u8], fds: Vec<OwnedFd>) -> Result<Self, WireError> {
        let code = BackendCode::try_from(header.request)?;
        if header.kind != Kind::Request {
            return Err(WireError::Kind { request: header.request, got: header.kind });
        }
        let message = code.name();
        if code == BackendCode::VringHostNotifierMsg {
            return host_notifier(message, body, fds);
        }
        payload::fds::<0>(message, fds)?;
        let index = || payload::exact::<RawVringState>(message, body).map(|state| state.index);
        match code {
            BackendCode::IotlbMsg => IotlbReport::parse(message, body).map(BackendRequest::IotlbMsg),
            BackendCode::ConfigChangeMsg => payload::empty(message, body).map(|()| BackendRequest::ConfigChangeMsg),
            BackendCode::VringCall => index().map(|index| BackendRequest::VringCall { index }),
            BackendCode::VringErr => index().map(|index| BackendRequest::VringErr { index }),
            BackendCode::VringHostNotifierMsg
            | BackendCode::SharedObjectAdd
            | BackendCode::SharedObjectRemove
            | BackendCode::SharedObjectLookup => Err(WireError::Unsupported { message }),
        }
    }

    /// The answer to the message behind `asked`: zero for success.
    pub fn encode_reply(asked: &Header, result: u64) -> Frame<'static> {
        Frame::new(asked.request, Kind::Reply, NeedReply::No, result.as_bytes())
    }

    /// Reads the front-end's answer to `question`.
    ///
    /// # Errors
    /// It answers something else, or is not a number. `fds` are closed.
    pub fn parse_reply(
        question: BackendCode,
        header: &Header,
        body: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<u64, WireError> {
        let message = question.name();
        if header.kind != Kind::Reply {
            return Err(WireError::Kind { request: header.request, got: header.kind });
        }
        if header.request != question.number() {
            return Err(WireError::WrongReply { got: header.request, expected: message });
        }
        payload::fds::<0>(message, fds)?;
        payload::exact(message, body)
    }

    /// Which message it is.
    pub fn code(&self) -> BackendCode {
        match self {
            BackendRequest::IotlbMsg(_) => BackendCode::IotlbMsg,
            BackendRequest::ConfigChangeMsg => BackendCode::ConfigChangeMsg,
            BackendRequest::VringHostNotifierMsg { .. } => BackendCode::VringHostNotifierMsg,
            BackendRequest::VringCall { .. } => BackendCode::VringCall,
            BackendRequest::VringErr { .. } => BackendCode::VringErr,
        }
    }

    /// The message as it travels.
    pub fn encode(&self, need_reply: NeedReply) -> Frame<'_> {
        let frame = |body: &[u8]| Frame::new(self.code().number(), Kind::Request, need_reply, body);
        match self {
            BackendRequest::IotlbMsg(report) => frame(report.encode().as_bytes()),
            BackendRequest::ConfigChangeMsg => frame(&[]),
            BackendRequest::VringHostNotifierMsg { index, size, offset, fd } => {
                let no_fd = if fd.is_none() { VRING_NO_FD } else { 0 };
                let area = RawVringArea { vring: u64::from(*index) | no_fd, size: *size, offset: *offset };
                fd.iter().fold(frame(area.as_bytes()), Frame::with_fd)
            }
            BackendRequest::VringCall { index } | BackendRequest::VringErr { index } => {
                frame(RawVringState { index: *index, num: 0 }.as_bytes())
            }
        }
    }
}

fn host_notifier(message: &'static str, body: &[u8], fds: Vec<OwnedFd>) -> Result<BackendRequest, WireError> {
    let RawVringArea { vring, size, offset } = payload::exact(message, body)?;
    if vring & !(VRING_INDEX | VRING_NO_FD) != 0 {
        return Err(WireError::Value { message, field: "vring", value: vring });
    }
    let fd = if vring & VRING_NO_FD == 0 {
        Some(payload::one_fd(message, fds)?)
    } else {
        payload::fds::<0>(message, fds)?;
        None
    };
    Ok(BackendRequest::VringHostNotifierMsg { index: (vring & VRING_INDEX) as u8, size, offset, fd })
}
