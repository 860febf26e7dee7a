//! virtio over PCI, the modern interface (§4.1).
//!
//! A kernel implements [`Function`] for its PCI code: two accesses to the configuration space and one way to map registers.
//! [`Pci`] does the rest: finds the structures of §4.1.4 through all that a device may write there, and is then a
//! [`Transport`].
//!
//! Transitional devices are driven by their modern interface. One that has none is refused
//! ([`PciError::LegacyOnly`]): the legacy interface can't say that it respects an IOMMU, nor can its driver say so.

mod capabilities;
pub mod common;
mod function;

pub use capabilities::{Structure, Unusable};
pub use function::{Bar, BarKind, Function};

use crate::policy::{Identity, Taken};
use crate::registers::{self, Registers, Wait, Waiting};
use crate::start::RING_RESET;
use crate::{DeviceStatus, Transport};
use alloc::vec::Vec;
use capabilities::Found;
use common::NO_VECTOR;
use core::fmt;
use ringfence_ring::Layout;

/// A virtio device on PCI.
#[derive(Debug)]
pub struct Pci<F: Function, W> {
    function: F,
    wait: W,
    identity: Identity,
    common: F::Registers,
    notify: F::Registers,
    isr: F::Registers,
    /// Some device types have none.
    config: Option<F::Registers>,
    multiplier: u32,
    interrupts: Interrupts,
    /// By queue: where it is rung in `notify`.
    doorbells: Vec<usize>,
    features: u64,
    /// How often somebody waited for a queue since something was last rung.
    waited: u32,
}

/// How the device is to tell of what it used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Interrupts {
    /// Not at all: the driver looks. INTx is off.
    #[default]
    Polled,
    /// By INTx. The handler reads [`Pci::interrupt`], which also takes the line down.
    Line,
    /// By MSI-X, which the kernel has set up and enabled. Entries of the function's MSI-X table:
    Vectors {
        /// For changes of the configuration.
        config: Option<u16>,
        /// For each queue, by its number. A queue that is not there tells of nothing.
        queues: Vec<u16>,
    },
}

/// What an interrupt was about (§4.1.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interrupt {
    /// Some queue has something used.
    pub queue: bool,
    /// The configuration has changed.
    pub config: bool,
}

/// Why a device on PCI can't be driven, or did not do as told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PciError {
    /// Another kind of function.
    NotVirtio {
        /// Its vendor.
        vendor: u16,
        /// Its device ID.
        device: u16,
    },
    /// A virtio device of before 1.0, or told to be like one.
    LegacyOnly {
        /// Its device ID.
        device: u16,
    },
    /// A structure is missing, or none of those offered can be used.
    Structure {
        /// Which.
        structure: Structure,
        /// What is wrong with the last one that was offered.
        why: Option<Unusable>,
    },
    /// The list of capabilities has no end.
    EndlessCapabilities,
    /// The function is gone: all its registers read as ones.
    Gone,
    /// The device did not do in time what was waited for.
    TimedOut(Waiting),
    /// The device has no such queue.
    NoQueue {
        /// Which.
        queue: u16,
    },
    /// The device says that a queue runs, which nobody started.
    AlreadyEnabled {
        /// Which.
        queue: u16,
    },
    /// The device would have a queue rung outside of its notification structure, or where no register can be.
    Doorbell {
        /// Which.
        queue: u16,
        /// Where.
        offset: u64,
    },
    /// The device has no room for this MSI-X vector (§4.1.5.1.2).
    NoVector {
        /// Which.
        vector: u16,
    },
    /// The device does not reset single queues: VIRTIO_F_RING_RESET was not negotiated.
    NoQueueReset,
    /// The device says that a queue was reset, and that it still runs.
    StillEnabled {
        /// Which.
        queue: u16,
    },
}

impl fmt::Display for PciError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            PciError::NotVirtio { vendor, device } => {
                write!(f, "the function {vendor:04x}:{device:04x} is no virtio device")
            }
            PciError::LegacyOnly { device } => write!(
                f,
                "the virtio device 1af4:{device:04x} has the legacy interface alone, which this driver does not use: have it \
                 offer its modern one (QEMU: disable-modern=off)"
            ),
            PciError::Structure { structure, why: None } => write!(f, "the device has no {structure} (§4.1.4)"),
            PciError::Structure { structure, why: Some(why) } => {
                write!(f, "the device has no {structure} that can be used (§4.1.4): {why}")
            }
            PciError::EndlessCapabilities => f.write_str("the function's list of capabilities has no end"),
            PciError::Gone => f.write_str("the function is gone: its registers read as ones"),
            PciError::TimedOut(Waiting::Reset) => f.write_str("the device does not confirm its reset"),
            PciError::TimedOut(Waiting::QueueReset(queue)) => {
                write!(f, "the device does not confirm the reset of queue {queue}")
            }
            PciError::TimedOut(Waiting::Queue(queue)) => write!(f, "the device does not answer on queue {queue}"),
            PciError::NoQueue { queue } => write!(f, "the device has no queue {queue}"),
            PciError::AlreadyEnabled { queue } => write!(f, "queue {queue} of the device runs, which nobody started"),
            PciError::Doorbell { queue, offset } => {
                write!(f, "the device has queue {queue} rung at {offset:#x}, where no register of it can be")
            }
            PciError::NoVector { vector } => write!(f, "the device has no room for MSI-X vector {vector}"),
            PciError::NoQueueReset => f.write_str("the device does not reset single queues"),
            PciError::StillEnabled { queue } => write!(f, "queue {queue} was reset and still runs"),
        }
    }
}

impl core::error::Error for PciError {}

impl<F: Function, W: Wait> Pci<F, W> {
    /// Finds and maps the structures of a virtio device. Memory space is enabled; the device itself is left as it is.
    ///
    /// # Errors
    /// [`PciError::NotVirtio`], [`PciError::LegacyOnly`], [`PciError::Structure`], [`PciError::EndlessCapabilities`] and
    /// [`PciError::Gone`].
    pub fn new(mut function: F, wait: W) -> Result<Self, PciError> {
        let id = function::device_type(&mut function)?;
        let found = Found::walk(&mut function)?;
        if id.transitional && found.is_empty() {
            return Err(PciError::LegacyOnly { device: id.device });
        }
        function::enable_memory(&mut function);
        let (common, _) = found.usable(&mut function, Structure::Common)?;
        let (notify, multiplier) = found.usable(&mut function, Structure::Notify)?;
        let (isr, _) = found.usable(&mut function, Structure::Isr)?;
        let config = match found.usable(&mut function, Structure::Device) {
            Ok((config, _)) => Some(config),
            // §4.1.4.6: only device types without a configuration space may lack it, and what is not there reads as 0.
            Err(PciError::Structure { why: None, .. }) => None,
            Err(error) => return Err(error),
        };
        let identity = Identity { vendor: id.vendor.into(), device: id.virtio.into(), slot: function.slot() };
        Ok(Self {
            function,
            wait,
            identity,
            common,
            notify,
            isr,
            config,
            multiplier,
            interrupts: Interrupts::Polled,
            doorbells: Vec::new(),
            features: 0,
            waited: 0,
        })
    }

    /// Has the device tell as `interrupts` says, from the next time that it is started.
    pub fn with_interrupts(mut self, interrupts: Interrupts) -> Self {
        self.interrupts = interrupts;
        self
    }

    /// The PCI function.
    pub fn function(&self) -> &F {
        &self.function
    }

    /// The PCI function.
    pub fn function_mut(&mut self) -> &mut F {
        &mut self.function
    }

    /// What the interrupt was about, and takes the line down (§4.1.4.5). For [`Interrupts::Line`]; a handler that can't
    /// come by the transport keeps [`isr`](Self::isr).
    pub fn interrupt(&self) -> Interrupt {
        let bits = self.isr.read_u8(0);
        Interrupt { queue: bits & 1 != 0, config: bits & 2 != 0 }
    }

    /// The ISR status register (§4.1.4.5): one byte, cleared by reading. Bit 0: a queue, bit 1: the configuration.
    pub fn isr(&self) -> &F::Registers {
        &self.isr
    }

    fn select(&mut self, queue: u16) -> Result<(), PciError> {
        if queue >= self.common.read_u16(common::NUM_QUEUES) {
            return Err(PciError::NoQueue { queue });
        }
        self.common.write_u16(common::QUEUE_SELECT, queue);
        Ok(())
    }

    /// Writes an MSI-X vector, and reads back whether the device has room for it (§4.1.5.1.2).
    fn set_vector(&mut self, register: usize, vector: Option<u16>) -> Result<(), PciError> {
        let vector = vector.unwrap_or(NO_VECTOR);
        self.common.write_u16(register, vector);
        match self.common.read_u16(register) {
            found if found == vector => Ok(()),
            _ => Err(PciError::NoVector { vector }),
        }
    }

    /// §4.1.5.1.2: the vectors of a device are forgotten when it is reset.
    fn set_vectors(&mut self, queue: u16) -> Result<(), PciError> {
        let (config, queue) = match &self.interrupts {
            Interrupts::Vectors { config, queues } => (*config, queues.get(usize::from(queue)).copied()),
            Interrupts::Polled | Interrupts::Line => return Ok(()),
        };
        self.set_vector(common::CONFIG_MSIX_VECTOR, config)?;
        self.set_vector(common::QUEUE_MSIX_VECTOR, queue)
    }

    /// Where queue `queue`, which is selected, is rung (§4.1.4.4).
    fn doorbell(&self, queue: u16) -> Result<usize, PciError> {
        let offset = u64::from(self.common.read_u16(common::QUEUE_NOTIFY_OFF)) * u64::from(self.multiplier);
        let fits = offset.is_multiple_of(2) && offset + 2 <= self.notify.len() as u64;
        if fits { Ok(offset as usize) } else { Err(PciError::Doorbell { queue, offset }) }
    }

    /// §4.1.3.1: a field of 64 bits is written in halves, the lower first.
    fn write_u64(&self, offset: usize, value: u64) {
        self.common.write_u32(offset, value as u32);
        self.common.write_u32(offset + 4, (value >> 32) as u32);
    }
}

impl<F: Function, W: Wait> Transport for Pci<F, W> {
    type Error = PciError;

    fn features(&self) -> u64 {
        if self.common.len() < common::WITH_QUEUE_RESET { 0 } else { RING_RESET }
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    /// A device that does not confirm is not let on the bus any more, where its function obeys at least that.
    fn reset(&mut self) -> Result<(), PciError> {
        self.common.write_u8(common::DEVICE_STATUS, 0);
        let Self { function, wait, common, .. } = self;
        let confirmed = registers::until(wait, Waiting::Reset, PciError::TimedOut, || {
            match common.read_u8(common::DEVICE_STATUS) {
                0 => Ok(true),
                u8::MAX if function::is_gone(function) => Err(PciError::Gone),
                _ => Ok(false),
            }
        });
        function::disable_master(&mut self.function);
        self.doorbells.clear();
        self.features = 0;
        confirmed
    }

    fn status(&mut self) -> Result<DeviceStatus, PciError> {
        match self.common.read_u8(common::DEVICE_STATUS) {
            u8::MAX if function::is_gone(&mut self.function) => Err(PciError::Gone),
            status => Ok(DeviceStatus::from_bits_retain(status)),
        }
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<(), PciError> {
        self.common.write_u8(common::DEVICE_STATUS, status.bits());
        Ok(())
    }

    fn offered(&mut self) -> Result<u64, PciError> {
        let half = |select| {
            self.common.write_u32(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read_u32(common::DEVICE_FEATURE))
        };
        Ok(half(0) | half(1) << 32)
    }

    fn take(&mut self, taken: Taken) -> Result<(), PciError> {
        for (select, half) in [(0, taken.features as u32), (1, (taken.features >> 32) as u32)] {
            self.common.write_u32(common::DRIVER_FEATURE_SELECT, select);
            self.common.write_u32(common::DRIVER_FEATURE, half);
        }
        self.features = taken.features;
        Ok(())
    }

    fn config_generation(&mut self) -> Result<u32, PciError> {
        Ok(self.common.read_u8(common::CONFIG_GENERATION).into())
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), PciError> {
        match &self.config {
            Some(config) => registers::read_config(config, 0, offset, into),
            None => into.fill(0),
        }
        Ok(())
    }

    fn max_queue_size(&mut self, queue: u16) -> Result<u16, PciError> {
        match self.select(queue) {
            Ok(()) => Ok(self.common.read_u16(common::QUEUE_SIZE)),
            Err(PciError::NoQueue { .. }) => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout) -> Result<(), PciError> {
        self.select(queue)?;
        if self.common.read_u16(common::QUEUE_ENABLE) != 0 {
            return Err(PciError::AlreadyEnabled { queue });
        }
        let doorbell = self.doorbell(queue)?;
        self.set_vectors(queue)?;
        self.common.write_u16(common::QUEUE_SIZE, layout.size);
        self.write_u64(common::QUEUE_DESC, layout.descriptors.0);
        self.write_u64(common::QUEUE_DRIVER, layout.driver.0);
        self.write_u64(common::QUEUE_DEVICE, layout.device.0);
        // From here on there is something that it is to reach.
        function::enable_master(&mut self.function, self.interrupts != Interrupts::Line);
        self.common.write_u16(common::QUEUE_ENABLE, 1);
        let number = usize::from(queue);
        if self.doorbells.len() <= number {
            self.doorbells.resize(number + 1, usize::MAX);
        }
        self.doorbells[number] = doorbell;
        Ok(())
    }

    fn reset_queue(&mut self, queue: u16) -> Result<(), PciError> {
        if self.features & RING_RESET == 0 || self.common.len() < common::WITH_QUEUE_RESET {
            return Err(PciError::NoQueueReset);
        }
        self.select(queue)?;
        self.common.write_u16(common::QUEUE_RESET, 1);
        let Self { function, wait, common, .. } = self;
        // §4.1.4.3.2: it reads 1 until the reset is done.
        registers::until(wait, Waiting::QueueReset(queue), PciError::TimedOut, || {
            match common.read_u16(common::QUEUE_RESET) {
                0 => Ok(true),
                u16::MAX if function::is_gone(function) => Err(PciError::Gone),
                _ => Ok(false),
            }
        })?;
        match self.common.read_u16(common::QUEUE_ENABLE) {
            0 => Ok(()),
            _ => Err(PciError::StillEnabled { queue }),
        }
    }

    #[inline]
    fn notify(&mut self, queue: u16) -> Result<(), PciError> {
        self.waited = 0;
        match self.doorbells.get(usize::from(queue)) {
            Some(&doorbell) if doorbell != usize::MAX => {
                self.notify.write_u16(doorbell, queue);
                Ok(())
            }
            _ => Err(PciError::NoQueue { queue }),
        }
    }

    fn wait(&mut self, queue: u16) -> Result<(), PciError> {
        let waited = self.waited;
        self.waited = waited.saturating_add(1);
        match self.wait.wait(Waiting::Queue(queue), waited) {
            true => Ok(()),
            false => {
                self.waited = 0;
                Err(PciError::TimedOut(Waiting::Queue(queue)))
            }
        }
    }
}

impl<F: Function, W> Drop for Pci<F, W> {
    fn drop(&mut self) {
        // Whoever drove the device has reset it; one that was not driven to its end is silenced here.
        function::disable_master(&mut self.function);
    }
}
