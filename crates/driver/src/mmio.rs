//! virtio over MMIO, version 2 (§4.2).
//!
//! A kernel has a window of registers from a device tree, from ACPI or from its command line, and makes an [`Mmio`] of it.
//! Version 1, the legacy interface, is refused ([`MmioError::Legacy`]).

use crate::policy::{Identity, Taken};
use crate::registers::{self, Registers, Wait, Waiting};
use crate::start::RING_RESET;
use crate::{DeviceStatus, Transport};
use core::fmt;
use ringfence_ring::Layout;

/// Offsets of registers (§4.2.2).
mod register {
    pub(super) const MAGIC_VALUE: usize = 0x000;
    pub(super) const VERSION: usize = 0x004;
    pub(super) const DEVICE_ID: usize = 0x008;
    pub(super) const VENDOR_ID: usize = 0x00c;
    pub(super) const DEVICE_FEATURES: usize = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: usize = 0x014;
    pub(super) const DRIVER_FEATURES: usize = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: usize = 0x024;
    pub(super) const QUEUE_SEL: usize = 0x030;
    pub(super) const QUEUE_SIZE_MAX: usize = 0x034;
    pub(super) const QUEUE_SIZE: usize = 0x038;
    pub(super) const QUEUE_READY: usize = 0x044;
    pub(super) const QUEUE_NOTIFY: usize = 0x050;
    pub(super) const INTERRUPT_STATUS: usize = 0x060;
    pub(super) const INTERRUPT_ACK: usize = 0x064;
    pub(super) const STATUS: usize = 0x070;
    pub(super) const QUEUE_DESC: usize = 0x080;
    pub(super) const QUEUE_DRIVER: usize = 0x090;
    pub(super) const QUEUE_DEVICE: usize = 0x0a0;
    pub(super) const QUEUE_RESET: usize = 0x0c0;
    pub(super) const CONFIG_GENERATION: usize = 0x0fc;
    pub(super) const CONFIG: usize = 0x100;
}

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;

/// A virtio device behind a window of registers.
#[derive(Debug)]
pub struct Mmio<R, W> {
    registers: R,
    wait: W,
    identity: Identity,
    features: u64,
    /// How often somebody waited for a queue since something was last rung.
    waited: u32,
}

/// Why a device can't be driven, or did not do as told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MmioError {
    /// No virtio device is there.
    NotVirtio {
        /// What is where the magic value should be.
        magic: u32,
    },
    /// A device of before 1.0.
    Legacy,
    /// A device of a version that this driver does not know.
    Version {
        /// Which.
        version: u32,
    },
    /// A place where no device is plugged in. Not a mistake of anybody's (§4.2.3.1).
    Empty,
    /// The window ends before the registers do.
    Short {
        /// How long it is.
        len: usize,
    },
    /// The device did not do in time what was waited for.
    TimedOut(Waiting),
    /// The device has no such queue.
    NoQueue {
        /// Which.
        queue: u16,
    },
    /// The device says that a queue runs, which nobody started.
    AlreadyReady {
        /// Which.
        queue: u16,
    },
    /// The device does not reset single queues: VIRTIO_F_RING_RESET was not negotiated.
    NoQueueReset,
    /// The device says that a queue's reset is done, and that the queue runs: as one would that offers VIRTIO_F_RING_RESET and
    /// lacks the register.
    StillReady {
        /// Which queue.
        queue: u16,
    },
}

impl fmt::Display for MmioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            MmioError::NotVirtio { magic } => write!(f, "no virtio device: {magic:#x} is where {MAGIC:#x} should be"),
            MmioError::Legacy => f.write_str(
                "the device has the legacy interface (version 1), which this driver does not use: have it offer version 2 \
                 (QEMU: -global virtio-mmio.force-legacy=false)",
            ),
            MmioError::Version { version } => write!(f, "a virtio-mmio device of version {version}, 2 is known here"),
            MmioError::Empty => f.write_str("no device is plugged in"),
            MmioError::Short { len } => write!(f, "{len} bytes of registers, {} are needed", register::CONFIG),
            MmioError::TimedOut(Waiting::Reset) => f.write_str("the device does not confirm its reset"),
            MmioError::TimedOut(Waiting::QueueReset(queue)) => {
                write!(f, "the device does not confirm the reset of queue {queue}")
            }
            MmioError::TimedOut(Waiting::Queue(queue)) => write!(f, "the device does not answer on queue {queue}"),
            MmioError::NoQueue { queue } => write!(f, "the device has no queue {queue}"),
            MmioError::AlreadyReady { queue } => write!(f, "queue {queue} of the device runs, which nobody started"),
            MmioError::StillReady { queue } => {
                write!(f, "queue {queue} runs, though the device says that it was reset")
            }
            MmioError::NoQueueReset => f.write_str("the device does not reset single queues"),
        }
    }
}

impl core::error::Error for MmioError {}

impl<R: Registers, W: Wait> Mmio<R, W> {
    /// Looks what is there. `slot` names it, as [`Identity::slot`] has it: the window's address will do.
    ///
    /// # Errors
    /// All but those of a device that is driven already.
    pub fn new(registers: R, slot: u64, wait: W) -> Result<Self, MmioError> {
        if registers.len() < register::CONFIG {
            return Err(MmioError::Short { len: registers.len() });
        }
        // §4.2.3.1: in this order, and nothing else is touched where one is not as it should be.
        match registers.read_u32(register::MAGIC_VALUE) {
            MAGIC => {}
            magic => return Err(MmioError::NotVirtio { magic }),
        }
        match registers.read_u32(register::VERSION) {
            2 => {}
            1 => return Err(MmioError::Legacy),
            version => return Err(MmioError::Version { version }),
        }
        let device = match registers.read_u32(register::DEVICE_ID) {
            0 => return Err(MmioError::Empty),
            device => device,
        };
        let identity = Identity { vendor: registers.read_u32(register::VENDOR_ID), device, slot };
        Ok(Self { registers, wait, identity, features: 0, waited: 0 })
    }

    /// The registers: an interrupt's handler that can't come by the transport reads InterruptStatus and writes
    /// InterruptACK there (§4.2.2).
    pub fn registers(&self) -> &R {
        &self.registers
    }

    /// What the interrupt was about, and acknowledges it: bit 0 a queue, bit 1 the configuration.
    pub fn interrupt(&self) -> u32 {
        let causes = self.registers.read_u32(register::INTERRUPT_STATUS);
        self.registers.write_u32(register::INTERRUPT_ACK, causes);
        causes
    }

    fn write_u64(&self, offset: usize, value: u64) {
        self.registers.write_u32(offset, value as u32);
        self.registers.write_u32(offset + 4, (value >> 32) as u32);
    }
}

impl<R: Registers, W: Wait> Transport for Mmio<R, W> {
    type Error = MmioError;

    fn features(&self) -> u64 {
        RING_RESET
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn reset(&mut self) -> Result<(), MmioError> {
        self.registers.write_u32(register::STATUS, 0);
        self.features = 0;
        let Self { registers, wait, .. } = self;
        registers::until(wait, Waiting::Reset, MmioError::TimedOut, || Ok(registers.read_u32(register::STATUS) == 0))
    }

    fn status(&mut self) -> Result<DeviceStatus, MmioError> {
        Ok(DeviceStatus::from_bits_retain(self.registers.read_u32(register::STATUS) as u8))
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<(), MmioError> {
        self.registers.write_u32(register::STATUS, status.bits().into());
        Ok(())
    }

    fn offered(&mut self) -> Result<u64, MmioError> {
        let half = |select| {
            self.registers.write_u32(register::DEVICE_FEATURES_SEL, select);
            u64::from(self.registers.read_u32(register::DEVICE_FEATURES))
        };
        Ok(half(0) | half(1) << 32)
    }

    fn take(&mut self, taken: Taken) -> Result<(), MmioError> {
        for (select, half) in [(0, taken.features as u32), (1, (taken.features >> 32) as u32)] {
            self.registers.write_u32(register::DRIVER_FEATURES_SEL, select);
            self.registers.write_u32(register::DRIVER_FEATURES, half);
        }
        self.features = taken.features;
        Ok(())
    }

    fn config_generation(&mut self) -> Result<u32, MmioError> {
        Ok(self.registers.read_u32(register::CONFIG_GENERATION))
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), MmioError> {
        registers::read_config(&self.registers, register::CONFIG, offset, into);
        Ok(())
    }

    fn max_queue_size(&mut self, queue: u16) -> Result<u16, MmioError> {
        self.registers.write_u32(register::QUEUE_SEL, queue.into());
        // More than a queue can have is as much as it can have.
        Ok(u16::try_from(self.registers.read_u32(register::QUEUE_SIZE_MAX)).unwrap_or(1 << 15))
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout) -> Result<(), MmioError> {
        self.registers.write_u32(register::QUEUE_SEL, queue.into());
        // §4.2.3.2: a queue that is in use already is none.
        if self.registers.read_u32(register::QUEUE_READY) != 0 {
            return Err(MmioError::AlreadyReady { queue });
        }
        if self.registers.read_u32(register::QUEUE_SIZE_MAX) == 0 {
            return Err(MmioError::NoQueue { queue });
        }
        self.registers.write_u32(register::QUEUE_SIZE, layout.size.into());
        self.write_u64(register::QUEUE_DESC, layout.descriptors.0);
        self.write_u64(register::QUEUE_DRIVER, layout.driver.0);
        self.write_u64(register::QUEUE_DEVICE, layout.device.0);
        self.registers.write_u32(register::QUEUE_READY, 1);
        Ok(())
    }

    fn reset_queue(&mut self, queue: u16) -> Result<(), MmioError> {
        if self.features & RING_RESET == 0 {
            return Err(MmioError::NoQueueReset);
        }
        self.registers.write_u32(register::QUEUE_SEL, queue.into());
        self.registers.write_u32(register::QUEUE_RESET, 1);
        let Self { registers, wait, .. } = self;
        registers::until(wait, Waiting::QueueReset(queue), MmioError::TimedOut, || {
            Ok(registers.read_u32(register::QUEUE_RESET) == 0)
        })?;
        match self.registers.read_u32(register::QUEUE_READY) {
            0 => Ok(()),
            _ => Err(MmioError::StillReady { queue }),
        }
    }

    #[inline]
    fn notify(&mut self, queue: u16) -> Result<(), MmioError> {
        self.waited = 0;
        self.registers.write_u32(register::QUEUE_NOTIFY, queue.into());
        Ok(())
    }

    fn wait(&mut self, queue: u16) -> Result<(), MmioError> {
        let waited = self.waited;
        self.waited = waited.saturating_add(1);
        match self.wait.wait(Waiting::Queue(queue), waited) {
            true => Ok(()),
            false => {
                self.waited = 0;
                Err(MmioError::TimedOut(Waiting::Queue(queue)))
            }
        }
    }
}
