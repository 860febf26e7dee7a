//! What a plain back-end of one queue is told, and says. (Also for the tests of `ringfence-wrap`, by its path.)

use ringfence_hostmem::Regions;
use ringfence_vhost_user::wire::{ProtocolFeatures, Reply, Request, VringAddr};
use std::os::fd::OwnedFd;

/// VERSION_1, and that there are protocol features.
pub(crate) const BASE: u64 = 1 << 32 | 1 << 30;

/// What a back-end was told of its memory and its queue.
pub(crate) struct Told {
    pub(crate) memory: Regions,
    pub(crate) ring: Option<VringAddr>,
    pub(crate) size: u16,
    pub(crate) call: Option<OwnedFd>,
    pub(crate) kick: Option<OwnedFd>,
    /// The next entry of the avail ring.
    pub(crate) next: u16,
    /// How many entries it has used.
    pub(crate) used: u16,
    /// Feature bits that it offers beside those without which it is no back-end.
    offered: u64,
    config: [u8; 64],
}

impl Told {
    pub(crate) fn new(offered: u64, config: [u8; 64]) -> Self {
        let memory = Regions::default();
        Self { memory, ring: None, size: 0, call: None, kick: None, next: 0, used: 0, offered, config }
    }

    /// Takes a message in; the answer, to one that has its own.
    pub(crate) fn hear(&mut self, request: Request) -> Option<Reply> {
        match request {
            Request::GetFeatures => return Some(Reply::U64(BASE | self.offered)),
            Request::GetProtocolFeatures => {
                let features = ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIG;
                return Some(Reply::U64(features.bits()));
            }
            Request::GetQueueNum => return Some(Reply::U64(1)),
            Request::GetConfig { offset, size, flags } => {
                let bytes = self.config.get(offset as usize..).and_then(|rest| rest.get(..size as usize));
                return Some(bytes.map_or(Reply::NoConfig, |data| Reply::Config {
                    offset,
                    flags,
                    data: data.to_vec(),
                }));
            }
            Request::SetMemTable(table) => self.memory = Regions::new(table).expect("memory that can be had"),
            Request::SetVringNum { num, .. } => self.size = num as u16,
            Request::SetVringBase { base, .. } => (self.next, self.used) = (base as u16, base as u16),
            Request::SetVringAddr(addresses) => self.ring = Some(addresses),
            Request::SetVringKick(vring) => self.kick = vring.fd,
            Request::SetVringCall(vring) => self.call = vring.fd,
            Request::GetVringBase { index } => {
                (self.ring, self.kick) = (None, None);
                return Some(Reply::VringBase { index, base: self.next.into() });
            }
            _ => {}
        }
        None
    }
}
