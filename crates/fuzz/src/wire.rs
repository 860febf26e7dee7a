//! Messages: whatever parses is sent on as it came.

use crate::Bytes;
use ringfence_vhost_user::wire::{BackendCode, BackendRequest, Frame, FrontendCode, Header, Reply, Request};
use rustix::event::{EventfdFlags, eventfd};
use std::fmt::Debug;
use std::os::fd::OwnedFd;

fn descriptors(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor")).collect()
}

/// Reads a message of each of the four kinds, writes it, reads it again.
pub(crate) fn messages(data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let (kind, count) = (bytes.u8(), bytes.below(10));
    let Ok(head) = bytes.take(Header::SIZE).try_into() else { return };
    let Ok(header) = Header::parse(head) else { return };
    assert_eq!(header.encode(), *head, "a header that changed");
    let body = bytes.take(header.size as usize);
    // The channel hands on whole messages alone.
    if body.len() != header.size as usize {
        return;
    }
    match kind % 4 {
        0 => again(
            &header,
            Request::parse(&header, body, descriptors(count)),
            |it| it.encode(header.need_reply),
            Request::parse,
        ),
        1 => again(
            &header,
            BackendRequest::parse(&header, body, descriptors(count)),
            |it| it.encode(header.need_reply),
            BackendRequest::parse,
        ),
        2 => {
            let code = FrontendCode::ALL[bytes.below(FrontendCode::ALL.len())];
            let parse = |header: &Header, body: &[u8], fds| Reply::parse(code, header, body, fds);
            again(&header, parse(&header, body, descriptors(count)), |it| it.encode(header.request), parse);
        }
        _ => {
            if let Ok(code) = BackendCode::try_from(header.request) {
                let _ = BackendRequest::parse_reply(code, &header, body, descriptors(count));
            }
        }
    }
}

fn again<T: Debug, E: Debug>(
    header: &Header,
    parsed: Result<T, E>,
    encode: impl Fn(&T) -> Frame<'_>,
    parse: impl Fn(&Header, &[u8], Vec<OwnedFd>) -> Result<T, E>,
) {
    let Ok(first) = parsed else { return };
    let frame = encode(&first);
    let (head, body) = frame.bytes.split_first_chunk().expect("a header");
    let head = Header::parse(head).expect("a header of ours");
    assert_eq!((head.request, head.kind), (header.request, header.kind));
    let fds = frame.fds.iter().map(|fd| fd.try_clone_to_owned().expect("a descriptor")).collect();
    let second = parse(&head, body, fds).expect("what we say, we understand");
    assert_eq!(shape(&first), shape(&second));
}

/// Debug without the numbers of descriptors, which change on the way.
fn shape(value: &impl Debug) -> String {
    let text = format!("{value:?}");
    let mut parts = text.split("OwnedFd { fd: ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |shape, part| shape + "fd" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}
