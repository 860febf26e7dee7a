use crate::DeviceStatus;
use crate::policy::{Identity, Taken};
use ringfence_ring::Layout;

/// How a driver reaches a device: virtio-pci, virtio-mmio, vhost-user, or a device in the same process.
///
/// Registers and nothing else: what they mean is the business of [`start`](crate::start()) and of the drivers. Whatever
/// comes back was chosen by the device, and every method may fail as the way to it may.
pub trait Transport {
    /// What can go wrong on the way.
    type Error: core::error::Error;

    /// The feature bits of the transport itself that it implements (§6): they are taken where they are offered.
    fn features(&self) -> u64 {
        0
    }

    /// Which device this is.
    fn identity(&self) -> Identity;

    /// Resets the device, and returns when it has confirmed that: from then on it touches no memory that it was lent
    /// (§2.1.2, §2.4).
    ///
    /// # Errors
    /// Also when the device does not confirm in a time that the transport thinks reasonable. Memory that the device was
    /// lent is then given up for lost.
    fn reset(&mut self) -> Result<(), Self::Error>;

    /// The device status field (§2.1).
    ///
    /// # Errors
    /// The way to the device failed; so everywhere below.
    fn status(&mut self) -> Result<DeviceStatus, Self::Error>;

    /// The status of a device that says that it broke down, and that nothing less than a reset of all of it helps
    /// (DEVICE_NEEDS_RESET, §2.1).
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn needs_reset(&mut self) -> Result<Option<u8>, Self::Error> {
        let status = self.status()?;
        Ok(status.contains(DeviceStatus::DEVICE_NEEDS_RESET).then_some(status.bits()))
    }

    /// Writes the device status field. Not for resetting.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn set_status(&mut self, status: DeviceStatus) -> Result<(), Self::Error>;

    /// The feature bits that the device offers.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn offered(&mut self) -> Result<u64, Self::Error>;

    /// Tells the device what the driver takes of them. A transport on which ring addresses are written differently with
    /// and without translation (vhost-user) finds that in [`Taken::addressing`].
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn take(&mut self, taken: Taken) -> Result<(), Self::Error>;

    /// Counts changes of the configuration space (§2.5.1); a transport without such a count says always the same.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn config_generation(&mut self) -> Result<u32, Self::Error>;

    /// Reads `into.len()` bytes at `offset` of the configuration space. Bytes that the device does not have are zero.
    ///
    /// A field of 1, 2, 4 or 8 bytes is read by itself, as §4.1.3.1 wants it: a transport makes of that an access of the
    /// width, or two.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), Self::Error>;

    /// The largest size that queue `queue` may have; 0 where there is no such queue.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn max_queue_size(&mut self, queue: u16) -> Result<u16, Self::Error>;

    /// Tells the device where queue `queue` is, and enables it.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn start_queue(&mut self, queue: u16, layout: &Layout) -> Result<(), Self::Error>;

    /// Resets queue `queue` alone, and returns when the device has confirmed that: from then on it touches nothing that it
    /// was lent through it, and the queue can be started anew (§2.6.1). For a transport that has VIRTIO_F_RING_RESET among
    /// its [`features`](Self::features), where that was taken.
    ///
    /// # Errors
    /// Also when the device does not confirm, or the queue can't be reset alone. What was lent through it is the device's
    /// then as before.
    fn reset_queue(&mut self, queue: u16) -> Result<(), Self::Error>;

    /// Tells the device that there is something new in queue `queue`.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    fn notify(&mut self, queue: u16) -> Result<(), Self::Error>;

    /// Waits until the device may have used something of queue `queue`: for an interrupt, or for a moment. Coming back
    /// early is fine.
    ///
    /// # Errors
    /// See [`status`](Self::status); also when the transport thinks that the device has had time enough. Whoever waits
    /// then gives up.
    fn wait(&mut self, queue: u16) -> Result<(), Self::Error>;
}

/// So that a transport can be looked at after its driver is gone.
impl<T: Transport> Transport for &mut T {
    type Error = T::Error;

    fn features(&self) -> u64 {
        (**self).features()
    }

    fn identity(&self) -> Identity {
        (**self).identity()
    }

    fn reset(&mut self) -> Result<(), Self::Error> {
        (**self).reset()
    }

    fn status(&mut self) -> Result<DeviceStatus, Self::Error> {
        (**self).status()
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<(), Self::Error> {
        (**self).set_status(status)
    }

    fn offered(&mut self) -> Result<u64, Self::Error> {
        (**self).offered()
    }

    fn take(&mut self, taken: Taken) -> Result<(), Self::Error> {
        (**self).take(taken)
    }

    fn config_generation(&mut self) -> Result<u32, Self::Error> {
        (**self).config_generation()
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), Self::Error> {
        (**self).read_config(offset, into)
    }

    fn max_queue_size(&mut self, queue: u16) -> Result<u16, Self::Error> {
        (**self).max_queue_size(queue)
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout) -> Result<(), Self::Error> {
        (**self).start_queue(queue, layout)
    }

    fn reset_queue(&mut self, queue: u16) -> Result<(), Self::Error> {
        (**self).reset_queue(queue)
    }

    fn notify(&mut self, queue: u16) -> Result<(), Self::Error> {
        (**self).notify(queue)
    }

    fn wait(&mut self, queue: u16) -> Result<(), Self::Error> {
        (**self).wait(queue)
    }
}
