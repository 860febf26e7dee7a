//! A device in the same process, without registers or sockets between.

use crate::policy::{Addressing, Identity, IommuMode, Refusal, Taken};
use crate::start::RING_RESET;
use crate::{DeviceStatus, Transport};
use alloc::vec::Vec;
use core::fmt;
use core::hint;
use ringfence_ring::Layout;

/// A device as [`Embedded`] needs it. Glue, for whoever has a device and some memory for it.
pub trait DeviceEnd {
    /// Which device it is.
    fn identity(&self) -> Identity;

    /// What it supports; whether it offers to be translated is [`Embedded`]'s business.
    fn features(&self) -> u64;

    /// Reads the configuration space at `offset`. Bytes that there are not are left alone.
    fn read_config(&self, offset: u32, into: &mut [u8]);

    /// The largest size that queue `queue` may have; 0 where there is no such queue.
    fn max_queue_size(&self, queue: u16) -> u16;

    /// Starts queue `queue` for a driver that took `features`. `addressing` says through which memory the queue is to
    /// reach everything. `false`: it can't be started.
    fn start_queue(&mut self, queue: u16, layout: &Layout, features: u64, addressing: Addressing) -> bool;

    /// Stops queue `queue` alone, and touches nothing that it was lent through it from then on. For a device that has
    /// VIRTIO_F_RING_RESET among its [`features`](Self::features).
    fn reset_queue(&mut self, queue: u16);

    /// Does what there is to do in queue `queue`, and says whether there was anything.
    fn turn(&mut self, queue: u16) -> bool;

    /// Stops all queues, and touches no memory from then on.
    fn reset(&mut self);
}

/// Turns in a row that may come to nothing before a driver that waits is told to give up.
const PATIENCE: u32 = 1 << 26;

/// The transport to a [`DeviceEnd`], which also does for the device what is the same for all of them: the status field
/// and the negotiation.
///
/// A refusal is not advisory: a driver that goes on without FEATURES_OK gets no queue started.
#[derive(Debug)]
pub struct Embedded<D> {
    device: D,
    mode: IommuMode,
    patience: u32,
    fruitless: u32,
    session: Session,
}

/// What there is between two resets.
#[derive(Debug)]
struct Session {
    status: DeviceStatus,
    acknowledged: u64,
    /// What became of the negotiation, once FEATURES_OK was written.
    accepted: Option<Result<Addressing, Refusal>>,
    queues: Vec<(u16, Layout)>,
}

impl Session {
    fn new() -> Self {
        Self { status: DeviceStatus::empty(), acknowledged: 0, accepted: None, queues: Vec::new() }
    }
}

/// What an embedded device does not let a driver do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddedError {
    /// The driver rings or waits for a queue that does not run.
    NotRunning {
        /// Which.
        queue: u16,
    },
    /// The device has nothing to do and the driver goes on waiting.
    Stalled {
        /// For which queue.
        queue: u16,
    },
}

impl fmt::Display for EmbeddedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EmbeddedError::NotRunning { queue } => write!(f, "queue {queue} of the device does not run"),
            EmbeddedError::Stalled { queue } => write!(f, "the device does not answer on queue {queue}"),
        }
    }
}

impl core::error::Error for EmbeddedError {}

impl<D: DeviceEnd> Embedded<D> {
    /// A transport to `device`, which does about the IOMMU what `mode` says.
    pub fn new(device: D, mode: IommuMode) -> Self {
        Self { device, mode, patience: PATIENCE, fruitless: 0, session: Session::new() }
    }

    /// Has a driver that waits give up after so many turns of the device in a row that come to nothing.
    pub fn with_patience(self, turns: u32) -> Self {
        Self { patience: turns, ..self }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, to change its mind while it is driven.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// What the device made of the driver's features: `None` before it was asked.
    pub fn accepted(&self) -> Option<Result<Addressing, Refusal>> {
        self.session.accepted
    }

    fn negotiate(&mut self) {
        let offered = self.mode.offers(self.device.features());
        let accepted = self.mode.accept(offered, self.session.acknowledged);
        self.session.status.set(DeviceStatus::FEATURES_OK, accepted.is_ok());
        self.session.accepted = Some(accepted);
    }

    fn run(&mut self) {
        let Session { status, acknowledged, accepted, queues } = &mut self.session;
        let started = match accepted {
            Some(Ok(addressing)) => {
                queues.iter().all(|(queue, layout)| self.device.start_queue(*queue, layout, *acknowledged, *addressing))
            }
            _ => false,
        };
        status.set(DeviceStatus::DRIVER_OK, started);
        status.set(DeviceStatus::DEVICE_NEEDS_RESET, !started);
    }

    fn turn(&mut self, queue: u16) -> Result<bool, EmbeddedError> {
        if !self.session.status.contains(DeviceStatus::DRIVER_OK) {
            return Err(EmbeddedError::NotRunning { queue });
        }
        Ok(self.device.turn(queue))
    }
}

impl<D: DeviceEnd> Transport for Embedded<D> {
    type Error = EmbeddedError;

    fn features(&self) -> u64 {
        self.device.features() & RING_RESET
    }

    fn identity(&self) -> Identity {
        self.device.identity()
    }

    fn reset(&mut self) -> Result<(), EmbeddedError> {
        self.device.reset();
        self.session = Session::new();
        self.fruitless = 0;
        Ok(())
    }

    fn status(&mut self) -> Result<DeviceStatus, EmbeddedError> {
        Ok(self.session.status)
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<(), EmbeddedError> {
        let added = status - self.session.status;
        // Only a reset clears bits (§2.1.1), and these two are the device's to give.
        self.session.status |= added - (DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK);
        if added.contains(DeviceStatus::FEATURES_OK) {
            self.negotiate();
        }
        if added.contains(DeviceStatus::DRIVER_OK) {
            self.run();
        }
        Ok(())
    }

    fn offered(&mut self) -> Result<u64, EmbeddedError> {
        Ok(self.mode.offers(self.device.features()))
    }

    fn take(&mut self, taken: Taken) -> Result<(), EmbeddedError> {
        // Once accepted, the set stands until a reset (§2.2): else a driver could take the flag back.
        if !self.session.status.contains(DeviceStatus::FEATURES_OK) {
            self.session.acknowledged = taken.features;
        }
        Ok(())
    }

    fn config_generation(&mut self) -> Result<u32, EmbeddedError> {
        Ok(0)
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), EmbeddedError> {
        into.fill(0);
        self.device.read_config(offset, into);
        Ok(())
    }

    fn max_queue_size(&mut self, queue: u16) -> Result<u16, EmbeddedError> {
        Ok(self.device.max_queue_size(queue))
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout) -> Result<(), EmbeddedError> {
        let Session { status, acknowledged, accepted, queues } = &mut self.session;
        queues.retain(|&(started, _)| started != queue);
        queues.push((queue, *layout));
        match accepted {
            // One that goes on after it was reset alone.
            Some(Ok(addressing)) if status.contains(DeviceStatus::DRIVER_OK) => {
                match self.device.start_queue(queue, layout, *acknowledged, *addressing) {
                    true => Ok(()),
                    false => Err(EmbeddedError::NotRunning { queue }),
                }
            }
            _ => Ok(()),
        }
    }

    fn reset_queue(&mut self, queue: u16) -> Result<(), EmbeddedError> {
        let running = self.session.queues.iter().any(|&(started, _)| started == queue);
        if self.session.acknowledged & RING_RESET == 0 || !running {
            return Err(EmbeddedError::NotRunning { queue });
        }
        self.device.reset_queue(queue);
        self.session.queues.retain(|&(started, _)| started != queue);
        Ok(())
    }

    fn notify(&mut self, queue: u16) -> Result<(), EmbeddedError> {
        self.turn(queue).map(drop)
    }

    fn wait(&mut self, queue: u16) -> Result<(), EmbeddedError> {
        if self.turn(queue)? {
            self.fruitless = 0;
            return Ok(());
        }
        self.fruitless += 1;
        if self.fruitless >= self.patience {
            self.fruitless = 0;
            return Err(EmbeddedError::Stalled { queue });
        }
        hint::spin_loop();
        Ok(())
    }
}
