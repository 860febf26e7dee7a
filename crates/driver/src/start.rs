use crate::policy::{Addressing, DriverPolicy, Platform, Refusal, driver_takes};
use crate::queue::{Queue, QueueError};
use crate::{DeviceStatus, Transport};
use alloc::vec::Vec;
use core::{fmt, mem};
use ringfence_dma::{DmaError, Mapper};
use ringfence_ring::{Format, Indirect, LayoutError, Notifications, Rules};
use virtio_spec::F;

/// The machine that a driver runs on, as far as one device is concerned.
#[derive(Debug)]
pub struct Host<'a, M: Mapper + ?Sized> {
    /// Where device and driver meet.
    pub platform: Platform,
    /// What the driver does about the IOMMU.
    pub policy: DriverPolicy<'a>,
    /// How addresses are made where it comes out that the device uses physical ones. `None`: that can't be had here.
    pub physical: Option<&'a M>,
    /// The platform's DMA API, for everything else.
    pub translated: Option<&'a M>,
}

impl<M: Mapper + ?Sized> Clone for Host<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Mapper + ?Sized> Copy for Host<'_, M> {}

/// What a driver wants of a device.
#[derive(Clone, Copy, Debug)]
pub struct Wants {
    /// The virtio device type that it drives.
    pub device: u32,
    /// The feature bits of the device type that it implements. What rings can do is added here, and what the IOMMU needs
    /// is for [`crate::policy`].
    pub features: u64,
    /// How many queues.
    pub queues: u16,
    /// How many descriptors a queue should have; fewer if the device has fewer. A power of two, else this panics.
    pub depth: u16,
}

/// Why a device was not brought up. It has been told so (FAILED, §2.1) where it could be, and was lent nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartError<E> {
    /// The way to the device failed.
    Transport(E),
    /// It is another type of device.
    OtherDevice {
        /// Its type.
        found: u32,
        /// The driver's.
        wanted: u32,
    },
    /// The driver refuses the device.
    Refused(Refusal),
    /// The device is a legacy one: it does not offer VIRTIO_F_VERSION_1.
    Legacy {
        /// What it offers.
        offered: u64,
    },
    /// The device refuses the driver: it left FEATURES_OK clear.
    FeaturesRefused {
        /// What it offers.
        offered: u64,
        /// What the driver took.
        taken: u64,
    },
    /// Addresses of this kind can't be made here.
    NoMapper(Addressing),
    /// The device lacks a queue.
    NoQueue {
        /// Which.
        queue: u16,
    },
    /// A queue of that kind can't be.
    Layout(LayoutError),
    /// There was no memory for a queue.
    Dma(DmaError),
    /// The device broke down when it was to run (DEVICE_NEEDS_RESET, or DRIVER_OK or another bit not kept).
    Broken {
        /// Its status.
        status: u8,
    },
    /// The configuration space says what can't be.
    Config {
        /// The field.
        field: &'static str,
        /// What it says.
        value: u64,
    },
}

impl<E: fmt::Display> fmt::Display for StartError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            StartError::Transport(ref error) => write!(f, "the device can't be reached: {error}"),
            StartError::OtherDevice { found, wanted } => write!(f, "a device of type {found} and not {wanted}"),
            StartError::Refused(refusal) => refusal.fmt(f),
            StartError::Legacy { offered } => write!(
                f,
                "a legacy device (it offers {offered:#x}, without VIRTIO_F_VERSION_1): have it offer its modern \
                 interface (QEMU: disable-legacy=on,disable-modern=off)"
            ),
            StartError::FeaturesRefused { offered, taken } => {
                write!(f, "the device, which offers features {offered:#x}, refuses {taken:#x} (FEATURES_OK is clear)")?;
                match Refusal::unspoken(offered, taken) {
                    Some(refusal) => write!(f, "; a likely reason: {refusal}"),
                    None => Ok(()),
                }
            }
            StartError::NoMapper(Addressing::Physical) => {
                f.write_str("the device uses physical addresses, which this driver can't give it")
            }
            StartError::NoMapper(Addressing::Translated) => {
                f.write_str("the device uses translated addresses, and this driver has no DMA API to make them")
            }
            StartError::NoQueue { queue } => write!(f, "the device has no queue {queue}"),
            StartError::Layout(error) => write!(f, "no such queue can be: {error}"),
            StartError::Dma(error) => write!(f, "no memory for a queue: {error}"),
            StartError::Broken { status } => write!(f, "the device broke down when started, status {status:#x}"),
            StartError::Config { field, value } => write!(f, "the device's configuration has {field} = {value:#x}"),
        }
    }
}

impl<E: core::error::Error> core::error::Error for StartError<E> {}

impl<E> From<Refusal> for StartError<E> {
    fn from(refusal: Refusal) -> Self {
        StartError::Refused(refusal)
    }
}

impl<E> From<DmaError> for StartError<E> {
    fn from(error: DmaError) -> Self {
        StartError::Dma(error)
    }
}

impl<E> From<QueueError> for StartError<E> {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Layout(error) => StartError::Layout(error),
            QueueError::Dma(error) => StartError::Dma(error),
        }
    }
}

/// A device that runs. Dropping it resets the device, and only then takes the memory of its queues back.
#[derive(Debug)]
pub struct Running<'a, T: Transport, M: Mapper + ?Sized> {
    pub(crate) transport: T,
    pub(crate) features: u64,
    pub(crate) addressing: Addressing,
    pub(crate) mapper: &'a M,
    pub(crate) queues: Vec<Queue<'a, M>>,
    stopped: Stopped,
}

/// Whether the device was told to let go of all memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    NotYet,
    /// It confirmed.
    Confirmed,
    /// It did not: what it was lent must never be used again.
    Lost,
}

/// A device that runs and how it is configured, or why not.
pub type Started<'a, T, M, C> = Result<(Running<'a, T, M>, C), StartError<<T as Transport>::Error>>;

/// Brings up a device, step by step as §3.1.1 says.
///
/// `configure` is step 7's device-specific part: it may read the configuration space, and runs before any queue exists.
///
/// # Errors
/// Any [`StartError`]. There is no going on after a refusal: the transport is given up with the device failed, or reset
/// if it had been told of memory.
pub fn start<'a, T: Transport, M: Mapper + ?Sized, C>(
    mut transport: T,
    host: Host<'a, M>,
    wants: Wants,
    configure: impl FnOnce(&mut T, u64) -> Result<C, StartError<T::Error>>,
) -> Started<'a, T, M, C> {
    use DeviceStatus as S;
    let mut at = S::empty();

    // 1. Reset the device.
    transport.reset().map_err(StartError::Transport)?;
    let mut step = |transport: &mut T, status: S| {
        at |= status;
        transport.set_status(at).map_err(StartError::Transport)
    };
    let negotiated = (|| {
        // 2. The guest has noticed the device.
        step(&mut transport, S::ACKNOWLEDGE)?;
        let found = transport.identity().device;
        if found != wants.device {
            return Err(StartError::OtherDevice { found, wanted: wants.device });
        }
        // 3. The guest knows how to drive it.
        step(&mut transport, S::DRIVER)?;
        // 4. Read the features, write the subset that the driver takes.
        let offered = transport.offered().map_err(StartError::Transport)?;
        let supported = wants.features | RING_FEATURES | transport.features();
        let taken = driver_takes(host.platform, host.policy, transport.identity(), offered, supported)?;
        if taken.features & bits(F::VERSION_1) == 0 {
            return Err(StartError::Legacy { offered });
        }
        transport.take(taken).map_err(StartError::Transport)?;
        // 5. and 6. FEATURES_OK, and whether the device agrees.
        step(&mut transport, S::FEATURES_OK)?;
        if !transport.status().map_err(StartError::Transport)?.contains(S::FEATURES_OK) {
            return Err(StartError::FeaturesRefused { offered, taken: taken.features });
        }
        let mapper = match taken.addressing {
            Addressing::Physical => host.physical,
            Addressing::Translated => host.translated,
        };
        let mapper = mapper.ok_or(StartError::NoMapper(taken.addressing))?;
        let config = configure(&mut transport, taken.features)?;
        Ok((taken, mapper, config))
    })();
    let (taken, mapper, config) = match negotiated {
        Ok(negotiated) => negotiated,
        Err(error) => {
            // It may not even hear that any more.
            let _ = transport.set_status(at | S::FAILED);
            return Err(error);
        }
    };

    let (features, addressing, stopped) = (taken.features, taken.addressing, Stopped::NotYet);
    let mut running = Running { transport, features, addressing, mapper, queues: Vec::new(), stopped };
    match running.start_queues(wants).and_then(|()| running.run(at)) {
        Ok(()) => Ok((running, config)),
        Err(error) => {
            let _ = running.transport.set_status(at | S::FAILED);
            Err(error)
        }
    }
}

/// What this crate's use of rings implements; see [`rules`].
const RING_FEATURES: u64 =
    bits(F::VERSION_1) | bits(F::RING_PACKED) | bits(F::EVENT_IDX) | bits(F::INDIRECT_DESC) | ORDER_PLATFORM;

/// VIRTIO_F_ORDER_PLATFORM (§6): the device is not one of the processors, and is to be kept in order by what keeps
/// hardware in order. x86 keeps its stores and loads in order for everybody alike, and the full fence that rings have
/// where that is not enough is one for everybody too. Elsewhere the fences of processors are not enough: there the bit is
/// left alone, and a device that depends on it may refuse.
const ORDER_PLATFORM: u64 =
    if cfg!(any(target_arch = "x86", target_arch = "x86_64")) { bits(F::ORDER_PLATFORM) } else { 0 };

const fn bits(feature: F) -> u64 {
    feature.bits().to_ne() as u64
}

/// VIRTIO_F_RING_RESET: the transport's to implement.
pub(crate) const RING_RESET: u64 = bits(F::RING_RESET);

/// How the queues of a driver that took `features` work.
fn rules(features: u64) -> Rules {
    let taken = |feature| features & bits(feature) != 0;
    Rules {
        format: if taken(F::RING_PACKED) { Format::Packed } else { Format::Split },
        notifications: if taken(F::EVENT_IDX) { Notifications::EventIdx } else { Notifications::Flags },
        indirect: if taken(F::INDIRECT_DESC) { Indirect::Allowed } else { Indirect::Refused },
    }
}

impl Stopped {
    pub(crate) fn is_lost(self) -> bool {
        self == Stopped::Lost
    }
}

impl<'a, T: Transport, M: Mapper + ?Sized> Running<'a, T, M> {
    /// 7. Set the queues up.
    fn start_queues(&mut self, wants: Wants) -> Result<(), StartError<T::Error>> {
        assert!(wants.depth.is_power_of_two(), "a queue of {}", wants.depth);
        let rules = rules(self.features);
        for queue in 0..wants.queues {
            let max = self.transport.max_queue_size(queue).map_err(StartError::Transport)?;
            if max == 0 {
                return Err(StartError::NoQueue { queue });
            }
            // The largest power of two in `max`: a split ring takes no other size.
            let size = wants.depth.min(1 << max.ilog2());
            self.queues.push(Queue::new(self.mapper, rules, size)?);
            let layout = self.queues[usize::from(queue)].layout;
            self.transport.start_queue(queue, &layout).map_err(StartError::Transport)?;
        }
        Ok(())
    }

    /// 8. The device is live from here on.
    fn run(&mut self, at: DeviceStatus) -> Result<(), StartError<T::Error>> {
        self.transport.set_status(at | DeviceStatus::DRIVER_OK).map_err(StartError::Transport)?;
        let status = self.transport.status().map_err(StartError::Transport)?;
        let broken = DeviceStatus::DEVICE_NEEDS_RESET | DeviceStatus::FAILED;
        // FEATURES_OK and the others too: a device that takes one back has not kept what was agreed on.
        if status.intersects(broken) || !status.contains(at | DeviceStatus::DRIVER_OK) {
            return Err(StartError::Broken { status: status.bits() });
        }
        Ok(())
    }

    /// Resets the device, once. [`Stopped::Lost`] means that whatever it was lent has to be leaked.
    pub(crate) fn stop(&mut self) -> Stopped {
        if self.stopped == Stopped::NotYet {
            self.stopped = match self.transport.reset() {
                Ok(()) => Stopped::Confirmed,
                Err(_) => Stopped::Lost,
            };
        }
        self.stopped
    }

    /// Whether single queues can be reset.
    pub(crate) fn resets_queues(&self) -> bool {
        self.features & RING_RESET != 0
    }

    /// The feature bits that were taken.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whose addresses the device is given.
    pub fn addressing(&self) -> Addressing {
        self.addressing
    }

    /// The way to the device.
    pub fn transport(&self) -> &T {
        &self.transport
    }

    /// The way to the device, for tests and logs; who resets the device through it makes the driver wait in vain.
    pub fn transport_mut(&mut self) -> &mut T {
        &mut self.transport
    }
}

impl<T: Transport, M: Mapper + ?Sized> Drop for Running<'_, T, M> {
    fn drop(&mut self) {
        if self.stop() == Stopped::Lost {
            // The device may still write there: nobody else may ever get this memory.
            mem::forget(mem::take(&mut self.queues));
        }
    }
}
