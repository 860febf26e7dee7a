//! The server's socket, with a front-end and a guest behind it that do anything: messages, translations, rings.

use crate::Bytes;
use crate::flat::PAGE;
use crate::ring::write_as_driver;
use ringfence_device::blk::{self, Blk};
use ringfence_device::storage::Memory;
use ringfence_dma::{BusAddr, FrontendVa, Gpa, Permission};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_policy::IommuMode;
use ringfence_ring::Format;
use ringfence_vhost_user::server::{Keep, Options, Server};
use ringfence_vhost_user::wire::{
    Enable, F_PROTOCOL_FEATURES, Frame, Header, Invalidated, Iotlb, Kind, NeedReply, ProtocolFeatures, Request,
    VringAddr, VringFd,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

const MEMORY: usize = 16 * PAGE;
/// Where the front-end says that its memory is.
const VA: u64 = 0x7f00_0000_0000;
/// Where its driver says so, if it translates.
const IOVA: u64 = 0x10_0000;

type Ask<'f> = Request<BorrowedFd<'f>>;

/// Sends a frame, if it can be sent at once.
pub(crate) fn send(socket: impl AsFd, frame: &Frame<'_>) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !frame.fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&frame.fds));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&frame.bytes)], &mut control, flags).is_ok()
}

/// Reads away what there is. `false` once the other side has closed.
pub(crate) fn drain(socket: impl AsFd) -> bool {
    let mut into = [0; 1 << 14];
    loop {
        match recv(&socket, &mut into[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return false,
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => return true,
            Err(_) => return false,
        }
    }
}

/// Waits until the other side has said something, or closed.
fn wait(socket: impl AsFd, time: Duration) -> bool {
    let timeout = Timespec::try_from(time).ok();
    poll(&mut [PollFd::new(&socket, PollFlags::IN)], timeout.as_ref()).is_ok_and(|ready| ready > 0)
}

/// Flags, a number of frames, all of it from bytes.
pub(crate) fn socket(data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let choice = bytes.u8();
    let iommu = IommuMode::ALL[usize::from(choice) % 3];
    let keep = [Keep::Auto, Keep::Cache, Keep::Request][usize::from(choice >> 2) % 3];
    let storage = Arc::new(Memory::new(MEMORY as u64, false).expect("memory for a disk"));
    let device = Arc::new(Blk::new(storage, blk::Options { queues: 2, queue_size: 128, serial: String::new() }));
    let (near, far) = UnixStream::pair().expect("two descriptors");
    let (ended, end) = UnixStream::pair().expect("two more");
    let server = Server::inherit(OwnedFd::from(far).into_raw_fd()).expect("a socket");
    let options =
        Options { iommu, keep, queue_size: 128, poll: Duration::ZERO, io_timeout: Duration::from_millis(200) };
    let served = std::thread::spawn(move || server.run(device, options, end.as_fd()));
    talk(bytes, &near);
    // Whoever is still there ends with its front-end.
    let _ = near.shutdown(std::net::Shutdown::Both);
    drop(near);
    served.join().expect("the server does not panic").expect("nor can't it wait");
    drop(ended);
}

fn talk(bytes: &mut Bytes<'_>, near: &UnixStream) {
    let memory = SharedMemory::new(MEMORY).expect("memory for a guest");
    let bell = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("a descriptor");
    let (channel, theirs) = UnixStream::pair().expect("two descriptors");
    let mut format = Format::Split;
    let placement =
        |offset: u64, size: u64| Placement { gpa: Gpa(offset), frontend_va: FrontendVa(VA + offset), size, offset };
    if !bytes.one_in(4) {
        // As most do, so that what follows comes to something.
        let offered = F_PROTOCOL_FEATURES | 1 << 32 | 0x3000_0000 | u64::from(bytes.u8() & 1) << 34;
        format = if offered & 1 << 34 == 0 { Format::Split } else { Format::Packed };
        let taken = if bytes.one_in(2) { IommuMode::Offer.offers(offered) } else { offered };
        for request in [
            Ask::SetProtocolFeatures(
                ProtocolFeatures::MQ
                    | ProtocolFeatures::REPLY_ACK
                    | ProtocolFeatures::BACKEND_REQ
                    | ProtocolFeatures::CONFIG,
            ),
            Ask::SetOwner,
            Ask::SetBackendReqFd(theirs.as_fd()),
            Ask::SetFeatures(taken),
            Ask::SetMemTable(vec![(placement(0, MEMORY as u64), memory.as_fd())]),
        ] {
            send(near, &request.encode(NeedReply::No));
        }
    }
    for _ in 0..150 {
        if bytes.is_empty() || !drain(near) {
            return;
        }
        drain(&channel);
        let index = u32::from(bytes.u8() % 3);
        let need = if bytes.one_in(4) { NeedReply::Yes } else { NeedReply::No };
        let base = if bytes.one_in(2) { VA } else { IOVA };
        let page = |bytes: &mut Bytes<'_>| bytes.below(18) as u64 * PAGE as u64;
        let request = match bytes.u8() % 24 {
            0 => Ask::SetVringNum { index, num: 1 << bytes.below(8) },
            1 => Ask::SetVringAddr(VringAddr {
                index,
                flags: 0,
                descriptor: base,
                available: base + PAGE as u64,
                used: base + 2 * PAGE as u64,
                log: 0,
            }),
            2 => Ask::SetVringAddr(VringAddr {
                index,
                flags: bytes.u8().into(),
                descriptor: base.wrapping_add(bytes.u64() >> bytes.below(64)),
                available: base.wrapping_add(page(bytes)),
                used: base.wrapping_add(bytes.u16().into()),
                log: 0,
            }),
            3 => Ask::SetVringBase {
                index,
                base: if format == Format::Packed { 0x8000_8000 } else { bytes.u16().into() },
            },
            4 => Ask::SetVringKick(VringFd { index: index as u8, fd: (!bytes.one_in(4)).then_some(bell.as_fd()) }),
            5 => Ask::SetVringCall(VringFd { index: index as u8, fd: (!bytes.one_in(4)).then_some(bell.as_fd()) }),
            6 => Ask::SetVringEnable { index, enable: if bytes.one_in(4) { Enable::Off } else { Enable::On } },
            7 => Ask::GetVringBase { index },
            8 | 9 => Ask::IotlbMsg(Iotlb::Update {
                iova: BusAddr(IOVA.wrapping_add(page(bytes))),
                size: PAGE as u64 * (1 + bytes.below(16) as u64),
                uaddr: FrontendVa(VA + page(bytes)),
                perm: [Permission::ReadOnly, Permission::WriteOnly, Permission::ReadWrite][bytes.below(3)],
            }),
            10 => {
                let first = IOVA.wrapping_add(page(bytes));
                let last = first.saturating_add(bytes.u64() >> bytes.below(64));
                Ask::IotlbMsg(Iotlb::Invalidate(Invalidated::Range { first: BusAddr(first), last: BusAddr(last) }))
            }
            11 => Ask::IotlbMsg(Iotlb::Invalidate(Invalidated::Everything)),
            12..=15 => {
                let next = u16::from(bytes.u8());
                for _ in 0..1 + bytes.below(4) {
                    write_as_driver(bytes, memory.slice(0, MEMORY), format, 128, next);
                }
                let _ = rustix::io::write(&bell, &1u64.to_ne_bytes());
                continue;
            }
            16 => {
                // So that queues' threads come to work, and not only in the end.
                wait(&channel, Duration::from_micros(u64::from(bytes.u8()) * 4));
                continue;
            }
            17 => Ask::SetMemTable(vec![(placement(page(bytes), 1 + page(bytes)), memory.as_fd())]),
            18 => Ask::SetStatus(bytes.u8()),
            19 => Ask::ResetDevice,
            20 => Ask::GetConfig { offset: bytes.below(300) as u32, size: bytes.below(200) as u32, flags: 0 },
            21 => Ask::SetFeatures(bytes.u64()),
            _ => {
                // A header of any kind, a body of any length, descriptors that fit nothing.
                let header = Header { request: bytes.below(48) as u32, kind: Kind::Request, need_reply: need, size: 0 };
                let body = bytes.below(64);
                let body = bytes.take(body);
                let header = Header { size: body.len() as u32, ..header };
                let fds = (0..bytes.below(4)).map(|_| bell.as_fd()).collect();
                let mut whole = [&header.encode()[..], body].concat();
                if bytes.one_in(16) {
                    let at = bytes.below(whole.len());
                    whole[at] = bytes.u8();
                }
                if !send(near, &Frame { bytes: whole, fds }) {
                    return;
                }
                continue;
            }
        };
        if !send(near, &request.encode(need)) {
            return;
        }
    }
    // Until it has heard all of it; one that can't parse has closed.
    if send(near, &Ask::GetFeatures.encode(NeedReply::No)) {
        wait(near, Duration::from_millis(20));
    }
}
