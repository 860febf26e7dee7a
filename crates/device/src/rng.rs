//! An entropy device (virtio-rng, §5.4): whatever buffer the driver makes available is filled with random bytes.

use crate::{Device, Handler, Outcome, Request, Token, Unreachable};
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use std::sync::Arc;

/// The most that one request gets. A driver that wants more asks again (§5.4.6.1), and the visit is short.
const MOST: usize = 16 << 10;

/// The kernel gives so much at once, whatever comes in between.
const AT_ONCE: usize = 256;

/// An entropy device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rng;

impl Device for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn id(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn open_queue(self: Arc<Self>, _index: u16, _depth: u16, _features: u64) -> io::Result<Box<dyn Handler>> {
        Ok(Box::new(RngQueue))
    }
}

struct RngQueue;

impl Handler for RngQueue {
    fn may_repeat(&self) -> bool {
        true
    }

    fn start(&mut self, _token: Token, request: &Request<'_>) -> Outcome {
        let wanted = (request.writable.len() as usize).min(MOST);
        let mut written = 0;
        while written < wanted {
            let mut bytes = [0; AT_ONCE];
            let part = &mut bytes[..(wanted - written).min(AT_ONCE)];
            // A kernel that has no randomness yet gives none, and the driver asks again.
            let Ok(got) = getrandom(&mut *part, GetRandomFlags::NONBLOCK) else { break };
            request.writable.write(written as u32, &part[..got]);
            written += got;
        }
        Outcome::Done(written as u32)
    }

    fn unreachable(&mut self, _request: &Unreachable<'_>) -> u32 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pieces;
    use ringfence_dma::Ram;

    #[test]
    fn a_buffer_is_filled_up_to_a_bound() {
        for (len, expected) in [(1, 1), (4096, 4096), (MOST + 4096, MOST)] {
            let ram = Ram::new(len);
            let pieces = [ram.slice(0, len).detach()];
            // SAFETY: `ram` outlives the request.
            let writable = unsafe { Pieces::new(&pieces, 0, len as u32) };
            // SAFETY: there are no pieces.
            let readable = unsafe { Pieces::new(&[], 0, 0) };
            let outcome = RngQueue.start(0, &Request { readable, writable, buffers: &[] });
            assert_eq!(outcome, Outcome::Done(expected as u32));
            let mut bytes = vec![0; len];
            writable.read(0, &mut bytes);
            let zeroes = bytes[..expected].iter().filter(|&&byte| byte == 0).count();
            assert!(expected < 64 || zeroes < expected / 8, "{zeroes} zeroes among {expected} bytes");
            assert!(bytes[expected..].iter().all(|&byte| byte == 0));
        }
    }
}
