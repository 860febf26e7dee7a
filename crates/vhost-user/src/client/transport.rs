//! A driver's way to a device behind a [`Frontend`].

use super::{ClientError, Frontend, Vring};
use crate::session::format_of;
use crate::wire::ProtocolFeatures;
use ringfence_dma::{FrontendVa, Gpa};
use ringfence_driver::{DeviceStatus, Transport};
use ringfence_policy::{Addressing, Identity, Taken};
use ringfence_ring::{Format, Layout, Position};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use virtio_spec::{F, Id};

/// The vendor of QEMU's and most other virtual devices. vhost-user itself does not say who makes one.
const VENDOR: u32 = 0x1af4;

const RING_RESET: u64 = F::RING_RESET.bits().to_ne() as u64;

/// What [`FrontendTransport`] is told, as vhost-user leaves it open.
#[derive(Clone, Copy, Debug)]
pub struct Attachment {
    /// The virtio device type (§5) that the socket is known to serve.
    pub device: u32,
    /// The largest queue to set up.
    pub queue_size: u16,
    /// Where the driver's memory begins for the device when nothing translates.
    pub gpa: Gpa,
    /// The same byte in the memory table that was given to [`Frontend::set_memory`].
    pub frontend_va: FrontendVa,
    /// For how long a used buffer is waited for.
    pub patience: Duration,
}

/// [`Transport`] over vhost-user: what a VMM is to its guest's driver.
///
/// The memory table has to be set, and where translation may be agreed on the IOTLB be served, before a driver starts.
#[derive(Debug)]
pub struct FrontendTransport {
    frontend: Arc<Frontend>,
    attachment: Attachment,
    hidden: u64,
    status: DeviceStatus,
    addressing: Addressing,
    format: Format,
    /// Set features were turned down: the device is gone for good, and FEATURES_OK stays clear.
    refused: bool,
    queues: Vec<(u16, Queue)>,
}

#[derive(Debug)]
struct Queue {
    layout: Layout,
    kick: OwnedFd,
    call: OwnedFd,
}

/// What goes wrong on the way to the device.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The connection, or the back-end's answer.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// A queue that was not started.
    #[error("queue {queue} was not started")]
    NotStarted {
        /// Which.
        queue: u16,
    },
    /// A ring that is not in the memory that the back-end was given.
    #[error("a ring at {0:#x} lies before the driver's memory")]
    Outside(u64),
    /// The back-end has not used anything for so long.
    #[error("the device used nothing of queue {queue} in {patience:?}")]
    Silent {
        /// Of which queue.
        queue: u16,
        /// How long.
        patience: Duration,
    },
    /// Eventfds, which the host is short of.
    #[error("{0}")]
    Host(#[from] Errno),
}

impl FrontendTransport {
    /// A way to the device behind `frontend`.
    pub fn new(frontend: Arc<Frontend>, attachment: Attachment) -> Self {
        Self {
            frontend,
            attachment,
            hidden: 0,
            status: DeviceStatus::empty(),
            addressing: Addressing::Physical,
            format: Format::Split,
            refused: false,
            queues: Vec::new(),
        }
    }

    /// Hides `features` from the driver, as a VMM's options do (QEMU's `packed=off`, its default, for one).
    pub fn without(mut self, features: u64) -> Self {
        self.hidden |= features;
        self
    }

    /// The connection below.
    pub fn frontend(&self) -> &Arc<Frontend> {
        &self.frontend
    }

    /// The eventfd that rings the device for a queue, and the one that the device rings: for a thread that serves the
    /// queue by itself.
    ///
    /// # Errors
    /// [`TransportError::NotStarted`].
    pub fn bells(&self, queue: u16) -> Result<(BorrowedFd<'_>, BorrowedFd<'_>), TransportError> {
        let Queue { kick, call, .. } = self.queue(queue)?;
        Ok((kick.as_fd(), call.as_fd()))
    }

    /// Stops a queue as a VMM does when its guest is paused, and says where it was.
    ///
    /// # Errors
    /// The connection's.
    pub fn pause(&mut self, queue: u16) -> Result<u32, TransportError> {
        self.queue(queue)?;
        Ok(self.frontend.stop_vring(queue as u8)?)
    }

    /// Has a paused queue go on at `base`.
    ///
    /// # Errors
    /// The connection's.
    pub fn resume(&mut self, queue: u16, base: u32) -> Result<(), TransportError> {
        let Queue { layout, kick, call } = self.queue(queue)?;
        self.frontend.start_vring(&Vring {
            index: queue as u8,
            size: layout.size,
            base,
            descriptor: self.ring_address(layout.descriptors.0)?,
            available: self.ring_address(layout.driver.0)?,
            used: self.ring_address(layout.device.0)?,
            kick: Some(kick.as_fd()),
            call: Some(call.as_fd()),
        })?;
        Ok(())
    }

    fn queue(&self, queue: u16) -> Result<&Queue, TransportError> {
        let found = self.queues.iter().find(|(index, _)| *index == queue);
        found.map(|(_, state)| state).ok_or(TransportError::NotStarted { queue })
    }

    /// A ring's address as the back-end wants it: a bus address where it translates, else one of the memory table.
    fn ring_address(&self, addr: u64) -> Result<u64, TransportError> {
        match self.addressing {
            Addressing::Translated => Ok(addr),
            Addressing::Physical => addr
                .checked_sub(self.attachment.gpa.0)
                .and_then(|offset| self.attachment.frontend_va.checked_add(offset))
                .map(|va| va.0)
                .ok_or(TransportError::Outside(addr)),
        }
    }
}

impl Transport for FrontendTransport {
    type Error = TransportError;

    /// To stop a ring is the front-end's business, whatever the back-end offers.
    fn features(&self) -> u64 {
        RING_RESET
    }

    fn identity(&self) -> Identity {
        Identity { vendor: VENDOR, device: self.attachment.device, slot: 0 }
    }

    fn reset(&mut self) -> Result<(), TransportError> {
        if !self.refused {
            for (queue, _) in self.queues.drain(..) {
                self.frontend.stop_vring(queue as u8)?;
            }
            if self.frontend.protocol().contains(ProtocolFeatures::RESET_DEVICE) {
                self.frontend.reset()?;
            }
        }
        self.status = DeviceStatus::empty();
        Ok(())
    }

    fn status(&mut self) -> Result<DeviceStatus, TransportError> {
        Ok(self.status)
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<(), TransportError> {
        // FEATURES_OK is the device's to keep clear; here it has said so when the features were set.
        self.status = if self.refused { status - DeviceStatus::FEATURES_OK } else { status };
        if !self.refused {
            self.frontend.set_status(self.status.bits())?;
        }
        Ok(())
    }

    fn offered(&mut self) -> Result<u64, TransportError> {
        Ok((self.frontend.offered() | RING_RESET) & !self.hidden)
    }

    fn take(&mut self, taken: Taken) -> Result<(), TransportError> {
        self.addressing = taken.addressing;
        self.format = format_of(taken.features);
        // A back-end may know the bit, and need not.
        let known = self.frontend.offered() | !RING_RESET;
        match self.frontend.set_features(taken.features & known) {
            Err(ClientError::Refused { .. }) => {
                self.refused = true;
                Ok(())
            }
            other => Ok(other?),
        }
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        Ok(0)
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        Ok(self.frontend.config(offset, into)?)
    }

    fn max_queue_size(&mut self, queue: u16) -> Result<u16, TransportError> {
        // Of a network card pairs are counted.
        let each = if self.attachment.device == u32::from(u8::from(Id::Net)) { 2 } else { 1 };
        let queues = self.frontend.queues()?.unwrap_or(1).saturating_mul(each);
        Ok(if u64::from(queue) < queues.min(256) { self.attachment.queue_size } else { 0 })
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout) -> Result<(), TransportError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        self.queues.push((queue, Queue { layout: *layout, kick: eventfd(0, flags)?, call: eventfd(0, flags)? }));
        self.resume(queue, Position::start(self.format).vring_base(self.format))
    }

    fn reset_queue(&mut self, queue: u16) -> Result<(), TransportError> {
        // The answer comes when the ring is at rest.
        self.pause(queue)?;
        self.queues.retain(|(index, _)| *index != queue);
        Ok(())
    }

    fn notify(&mut self, queue: u16) -> Result<(), TransportError> {
        rustix::io::write(&self.queue(queue)?.kick, &1u64.to_ne_bytes())?;
        Ok(())
    }

    fn wait(&mut self, queue: u16) -> Result<(), TransportError> {
        let call = &self.queue(queue)?.call;
        let patience = self.attachment.patience;
        let timeout = Timespec::try_from(patience).ok();
        match poll(&mut [PollFd::new(call, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => Err(TransportError::Silent { queue, patience }),
            Ok(_) => {
                let _ = rustix::io::read(call, &mut [0; 8]);
                Ok(())
            }
            Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
