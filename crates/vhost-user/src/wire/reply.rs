use super::payload::{self, RawConfigHead, RawInflight, RawVringState};
use super::{Frame, FrontendCode, Header, Inflight, Kind, NeedReply, WireError, request};
use std::os::fd::OwnedFd;
use zerocopy::IntoBytes;

/// What a back-end answers.
#[derive(Debug)]
pub enum Reply {
    /// A number. To a message that has no answer of its own: zero for success (REPLY_ACK).
    U64(u64),
    /// To GET_VRING_BASE: where the stopped queue was.
    VringBase {
        /// Which queue.
        index: u32,
        /// In the form of SET_VRING_BASE.
        base: u32,
    },
    /// To GET_CONFIG.
    Config {
        /// Where the data starts.
        offset: u32,
        /// As asked.
        flags: u32,
        /// The data, as long as was asked for.
        data: Vec<u8>,
    },
    /// To GET_CONFIG: it could not be read.
    NoConfig,
    /// To GET_INFLIGHT_FD.
    Inflight(Inflight, OwnedFd),
}

impl Reply {
    /// Reads the answer to `question`.
    ///
    /// # Errors
    /// It answers something else, or has not the form of an answer to it. `fds` are closed.
    pub fn parse(question: FrontendCode, header: &Header, body: &[u8], fds: Vec<OwnedFd>) -> Result<Self, WireError> {
        let message = question.name();
        if header.kind != Kind::Reply {
            return Err(WireError::Kind { request: header.request, got: header.kind });
        }
        if header.request != question.number() {
            return Err(WireError::WrongReply { got: header.request, expected: message });
        }
        if question == FrontendCode::GetInflightFd {
            return Ok(Reply::Inflight(request::inflight(message, body)?, payload::one_fd(message, fds)?));
        }
        payload::fds::<0>(message, fds)?;
        match question {
            FrontendCode::GetVringBase => payload::exact::<RawVringState>(message, body)
                .map(|state| Reply::VringBase { index: state.index, base: state.num }),
            FrontendCode::GetConfig if body.is_empty() => Ok(Reply::NoConfig),
            FrontendCode::GetConfig => {
                let (head, data) = request::config(message, body)?;
                Ok(Reply::Config { offset: head.offset, flags: head.flags, data: data.to_vec() })
            }
            _ => payload::exact(message, body).map(Reply::U64),
        }
    }

    /// The answer to the message with this number as it travels. A number, because a message that nobody knows can be
    /// answered too.
    pub fn encode(&self, request: u32) -> Frame<'_> {
        let frame = |body: &[u8]| Frame::new(request, Kind::Reply, NeedReply::No, body);
        match self {
            Reply::U64(number) => frame(number.as_bytes()),
            Reply::VringBase { index, base } => frame(RawVringState { index: *index, num: *base }.as_bytes()),
            Reply::Config { offset, flags, data } => {
                let head = RawConfigHead { offset: *offset, size: data.len() as u32, flags: *flags };
                frame(&[head.as_bytes(), data].concat())
            }
            Reply::NoConfig => frame(&[]),
            Reply::Inflight(inflight, fd) => frame(RawInflight::from(*inflight).as_bytes()).with_fd(fd),
        }
    }
}
