//! The PCI function: registers, and what they do.
//!
//! Knows what a driver reads and writes, in any order and width, and what the standard makes of it. Knows no messages.

mod capabilities;
mod common;
mod config;
pub mod layout;
mod msix;
mod queue;

use crate::event::Event;
use crate::memory::Memory;
use crate::session::Options;
use crate::wire::Subregion;
use common::{Common, Effect};
use config::{ConfigSpace, Did};
use layout::{BAR_MSIX, BAR_VIRTIO, COMMON, DEVICE, ISR, NOTIFY, Place};
pub(crate) use msix::Msix;
use msix::Route;
use queue::{Queue, Start};
use ringfence_device::Device;
use ringfence_device::worker::VISIT;
use ringfence_driver::pci::common::NO_VECTOR;
use ringfence_iotlb::LOST_PATIENCE;
use ringfence_policy::{Addressing, Refusal};
use ringfence_vhost_user::Limit;
use ringfence_vhost_user::session::{bits, rules_of};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use virtio_spec::{DeviceStatus, F};

/// A queue can be reset by itself (§2.6.1).
const RING_RESET: u64 = F::RING_RESET.bits().to_ne() as u64;

/// The function, and its device behind it.
pub(crate) struct Function {
    device: Arc<dyn Device>,
    options: Options,
    config: ConfigSpace,
    common: Common,
    msix: Msix,
    queues: Vec<Queue>,
    /// What the driver took, once FEATURES_OK is set.
    negotiated: Option<u64>,
    /// The queue bit of the ISR status: rung by queues while MSI-X is off.
    isr_queue: Arc<Event>,
    /// Its configuration bit.
    isr_config: bool,
    /// Rung by queues that broke.
    broken: Arc<Event>,
    /// Rung when the device's own configuration has changed.
    changed: Arc<Event>,
    /// Counts those changes.
    generation: Arc<AtomicU8>,
    /// Accesses that were not let through.
    faults: Arc<AtomicU64>,
    /// For the lines that a guest can cause as often as it likes.
    lines: Limit,
}

/// What every method needs besides.
pub(crate) struct Around<'a> {
    pub(crate) memory: &'a Memory,
    /// Readable when nobody has time any more.
    pub(crate) hurry: BorrowedFd<'a>,
}

impl Function {
    pub(crate) fn new(device: Arc<dyn Device>, options: Options) -> io::Result<Self> {
        let count = device.queues();
        let (generation, changed) = (Arc::<AtomicU8>::default(), Arc::new(Event::new()?));
        device.watch_config(Box::new({
            let (generation, changed) = (Arc::clone(&generation), Arc::clone(&changed));
            move || {
                generation.fetch_add(1, Ordering::SeqCst);
                changed.ring();
            }
        }));
        let vectors = layout::vectors(count, options.vectors);
        Ok(Self {
            config: ConfigSpace::new(device.id(), vectors, device.config().len()),
            common: Common::new(),
            msix: Msix::new(vectors)?,
            queues: (0..count).map(|_| Queue::new(options.queue_size)).collect::<io::Result<_>>()?,
            negotiated: None,
            isr_queue: Arc::new(Event::new()?),
            isr_config: false,
            broken: Arc::new(Event::new()?),
            changed,
            generation,
            faults: Arc::default(),
            lines: Limit::new(),
            device,
            options,
        })
    }

    /// Readable when [`Function::look`] has something to see.
    pub(crate) fn news(&self) -> [BorrowedFd<'_>; 2] {
        [self.broken.as_fd(), self.changed.as_fd()]
    }

    /// Takes in what happened elsewhere.
    pub(crate) fn look(&mut self) {
        if self.broken.take() {
            self.need_reset();
        }
        if self.changed.take() {
            self.tell_config();
        }
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// How many bytes region `index` has.
    pub(crate) fn region_size(&self, index: u32) -> u64 {
        layout::region_size(index)
    }

    /// How many MSI-X vectors there are.
    pub(crate) fn vectors(&self) -> u32 {
        self.msix.len()
    }

    pub(crate) fn msix(&mut self) -> &mut Msix {
        &mut self.msix
    }

    /// What rings queues, by where it is in region `index`; at most `max`.
    pub(crate) fn doorbells(&self, index: u32, max: usize) -> io::Result<Vec<Subregion>> {
        if index != BAR_VIRTIO {
            return Ok(Vec::new());
        }
        let one = |(number, queue): (usize, &Queue)| {
            let offset = NOTIFY.start + number as u64 * u64::from(layout::NOTIFY_MULTIPLIER);
            Ok(Subregion { offset, size: 2, fd: queue.kick()? })
        };
        self.queues.iter().take(max).enumerate().map(one).collect()
    }

    /// Reads registers. The range lies in the region.
    pub(crate) fn read(&mut self, region: u32, offset: u64, into: &mut [u8]) {
        into.fill(0);
        match region {
            layout::CONFIG => match self.config.window(offset, into.len()) {
                // §4.1.4.9: the data of VIRTIO_PCI_CAP_PCI_CFG is what lies elsewhere.
                Some((bar, at, len)) if self.is_inside(bar, at, len) => {
                    self.config.read(offset, into);
                    let len = len.min(into.len());
                    self.read(bar, at, &mut into[..len]);
                }
                _ => self.config.read(offset, into),
            },
            BAR_MSIX => self.msix.read(offset, into),
            BAR_VIRTIO => self.read_structures(offset, into),
            _ => {}
        }
    }

    /// A range may lie across structures; each byte is that of where it lies.
    fn read_structures(&mut self, offset: u64, into: &mut [u8]) {
        for (place, range) in layout::parts(offset, into.len()) {
            let at = offset + range.start as u64;
            let part = &mut into[range];
            match place {
                Place::Common => {
                    let image = self.common_image();
                    copy(&image, at - COMMON.start, part);
                }
                Place::Isr => {
                    if at == ISR.start {
                        part[0] = self.take_isr();
                    }
                }
                Place::Device => self.read_device(at - DEVICE.start, part),
                Place::Notify => {}
            }
        }
    }

    fn common_image(&self) -> [u8; common::LEN] {
        let queue = self.queues.get(usize::from(self.common.queue_select));
        let offered = self.offered();
        self.common.image(offered, self.queues.len() as u16, self.generation.load(Ordering::SeqCst), queue)
    }

    fn read_device(&self, at: u64, into: &mut [u8]) {
        let read = u32::try_from(at).ok().and_then(|at| self.device.read_config(at, into.len() as u32));
        if let Some(read) = read {
            let len = read.len().min(into.len());
            into[..len].copy_from_slice(&read[..len]);
        }
    }

    /// §4.1.4.5: reading clears it.
    fn take_isr(&mut self) -> u8 {
        u8::from(self.isr_queue.take()) | u8::from(std::mem::take(&mut self.isr_config)) << 1
    }

    /// Writes registers. The range lies in the region.
    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8], around: &Around<'_>) {
        match region {
            layout::CONFIG => self.write_config(offset, data, around),
            BAR_MSIX => {
                self.msix.write(offset, data);
                self.route();
            }
            BAR_VIRTIO => {
                for (place, range) in layout::parts(offset, data.len()) {
                    let at = offset + range.start as u64;
                    let part = &data[range];
                    match place {
                        Place::Common => self.write_common(at - COMMON.start, part, around),
                        Place::Device => self.write_device(at - DEVICE.start, part),
                        Place::Notify => self.notify(at - NOTIFY.start, part.len()),
                        Place::Isr => {}
                    }
                }
            }
            _ => {}
        }
    }

    fn is_inside(&self, bar: u32, at: u64, len: usize) -> bool {
        let known = bar == BAR_VIRTIO || bar == BAR_MSIX;
        known && at.checked_add(len as u64).is_some_and(|end| end <= self.region_size(bar))
    }

    fn write_config(&mut self, offset: u64, data: &[u8], around: &Around<'_>) {
        let window = self.config.window(offset, data.len());
        let did = self.config.write(offset, data);
        if did.contains(Did::RESET) {
            self.reset(around);
            return;
        }
        if did.contains(Did::MSIX) {
            self.msix.set_control(self.config.msix_enabled(), self.config.msix_masked());
            self.route();
        }
        if did.contains(Did::MASTER) {
            if !self.config.may_master() {
                self.pause_all(around);
            }
            self.run(around);
        }
        if let Some((bar, at, len)) = window
            && self.is_inside(bar, at, len)
        {
            self.write(bar, at, &data[..len.min(data.len())], around);
        }
    }

    /// The device's fields, as a driver writes them (§2.5).
    fn write_device(&mut self, at: u64, data: &[u8]) {
        let written = u32::try_from(at).map(|at| self.device.write_config(at, data));
        if let Ok(Err(error)) = written
            && self.lines.tell().is_some()
        {
            tracing::warn!("the driver wrote {} bytes at {at:#x} of the configuration: {error}", data.len());
        }
    }

    /// A write anywhere in a queue's place rings it, whatever is written.
    fn notify(&self, at: u64, len: usize) {
        let multiplier = u64::from(layout::NOTIFY_MULTIPLIER);
        let last = (at + (len as u64).max(1) - 1) / multiplier;
        for number in at / multiplier..=last {
            if let Some(queue) = self.queues.get(number as usize) {
                queue.ring();
            }
        }
    }

    fn write_common(&mut self, at: u64, data: &[u8], around: &Around<'_>) {
        for (field, value) in common::fields(at, data) {
            match self.common.write(field, value) {
                Effect::None => {}
                Effect::Features { select, value } => self.take_features(select, value),
                Effect::ConfigVector(vector) => self.common.config_vector = self.msix.accept(vector),
                Effect::Status(status) => self.set_status(status, around),
                Effect::Queue(field, value) => self.set_queue(field, value, around),
            }
        }
    }

    fn take_features(&mut self, select: u32, value: u32) {
        // §3.1.1: a driver that has said FEATURES_OK has said what it takes.
        if self.negotiated.is_none() {
            self.common.take(select, value);
        }
    }

    fn set_queue(&mut self, field: common::QueueField, value: u32, around: &Around<'_>) {
        let number = usize::from(self.common.queue_select);
        let Some(queue) = self.queues.get_mut(number) else { return };
        use common::QueueField::*;
        match field {
            Size => queue.set_size(value as u16, self.options.queue_size),
            Vector => {
                queue.vector = self.msix.accept(value as u16);
                self.route();
            }
            // §4.1.4.3.2: a driver does not write 0.
            Enable if value as u16 == 1 => {
                queue.enable();
                self.run(around);
            }
            Enable => {}
            Address { area, half } => queue.set_address(area, half, value),
            Reset if value as u16 == 1 && self.has(RING_RESET) => self.reset_queue(number, around),
            Reset => {}
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.negotiated.is_some_and(|taken| taken & feature != 0)
    }

    fn offered(&self) -> u64 {
        let rings = bits::VERSION_1 | bits::INDIRECT_DESC | bits::EVENT_IDX | bits::RING_PACKED | RING_RESET;
        self.options.iommu.offers(self.device.features() | rings)
    }

    /// The driver writes the device status (§2.1): 0 resets, and nothing else takes a bit away.
    fn set_status(&mut self, written: u8, around: &Around<'_>) {
        if written == 0 {
            self.reset_device(around);
            return;
        }
        let (features_ok, driver_ok) = (DeviceStatus::FEATURES_OK.bits(), DeviceStatus::DRIVER_OK.bits());
        let needs_reset = DeviceStatus::DEVICE_NEEDS_RESET.bits();
        let mut status = self.common.status | written & !needs_reset;
        if status & features_ok != 0 && self.negotiated.is_none() && !self.negotiate() {
            status &= !features_ok;
        }
        if status & driver_ok != 0 && self.negotiated.is_none() {
            // The refusal is no advice: without an agreement nothing runs, and the driver can read that.
            status &= !driver_ok;
        }
        self.common.status = status;
        self.device.set_status(status);
        self.run(around);
    }

    /// Whether what the driver takes is accepted; why not is in the log.
    fn negotiate(&mut self) -> bool {
        let taken = self.common.driver_features;
        match self.accept(taken) {
            Ok(addressing) => {
                self.negotiated = Some(taken);
                if self.lines.tell().is_some() {
                    tracing::info!(
                        ?addressing,
                        features = format_args!("{taken:#x}"),
                        "the driver's features are taken"
                    );
                }
                true
            }
            Err(refused) => {
                if self.lines.tell().is_some() {
                    tracing::error!("FEATURES_OK refused: {refused}");
                }
                false
            }
        }
    }

    fn accept(&self, taken: u64) -> Result<Addressing, NotTaken> {
        let addressing = self.options.iommu.accept(self.offered(), taken)?;
        if taken & bits::VERSION_1 == 0 {
            return Err(NotTaken::Legacy);
        }
        self.device.take(taken).map_err(NotTaken::Device)?;
        Ok(addressing)
    }

    fn may_run(&self) -> bool {
        let needs = DeviceStatus::DRIVER_OK.bits();
        let without = DeviceStatus::DEVICE_NEEDS_RESET.bits();
        self.common.status & needs != 0 && self.common.status & without == 0 && self.config.may_master()
    }

    /// Starts every queue that may run and does not.
    fn run(&mut self, around: &Around<'_>) {
        let (true, Some(features)) = (self.may_run(), self.negotiated) else { return };
        self.route();
        for index in 0..self.queues.len() {
            if !self.queues[index].is_ready() {
                continue;
            }
            let with = Start {
                index: index as u16,
                device: &self.device,
                features,
                rules: rules_of(features),
                memory: around.memory,
                broken: &self.broken,
                poll: self.options.poll,
                patience: self.options.io_timeout,
                faults: &self.faults,
            };
            if index == 0 && self.lines.tell().is_some() {
                let [ring, driver, device] = self.queues[0].addresses();
                tracing::info!(
                    features = format_args!("{features:#x}"),
                    ring = format_args!("{ring:#x},{driver:#x},{device:#x}"),
                    "the driver's queues run"
                );
            }
            if let Err(error) = self.queues[index].start(&with) {
                if self.lines.tell().is_some() {
                    tracing::error!("queue {index}: {error}; the device needs a reset");
                }
                self.need_reset();
                return;
            }
        }
    }

    /// Where every queue and the configuration tell of what happened.
    fn route(&mut self) {
        for queue in &mut self.queues {
            let route = match (self.msix.is_on(), queue.vector) {
                (false, _) => Route::Isr,
                (true, NO_VECTOR) => Route::Nowhere,
                (true, vector) => self.msix.route(vector),
            };
            if let Err(error) = queue.route(route, &self.isr_queue) {
                tracing::error!("an interrupt can't be set up: {error}");
            }
        }
        // A queue may have left one pending that was on its way meanwhile.
        self.msix.raise_pending();
    }

    /// After the client has changed how interrupts are told.
    pub(crate) fn rerouted(&mut self) {
        self.route();
    }

    /// Something of the device's configuration has changed (§2.5, §4.1.5.4).
    fn tell_config(&mut self) {
        if self.common.status & DeviceStatus::DRIVER_OK.bits() == 0 {
            return;
        }
        self.isr_config = true;
        if self.msix.is_on() && self.common.config_vector != NO_VECTOR {
            self.msix.trigger(self.common.config_vector);
        }
    }

    /// §2.1.2: says that nothing goes on before a reset.
    fn need_reset(&mut self) {
        self.common.status |= DeviceStatus::DEVICE_NEEDS_RESET.bits();
        self.tell_config();
    }

    /// Stops all queues where they are, at the same time. When this returns they touch no memory any more.
    fn pause_all(&mut self, around: &Around<'_>) {
        self.queues.iter_mut().for_each(Queue::tell_stop);
        let _quiet = around.memory.link().hush();
        self.queues.iter_mut().for_each(|queue| stop(queue, around));
    }

    /// §2.6.1.
    fn reset_queue(&mut self, number: usize, around: &Around<'_>) {
        let _quiet = around.memory.link().hush();
        let queue = &mut self.queues[number];
        stop(queue, around);
        queue.reset(self.options.queue_size);
        self.route();
    }

    /// §2.4: a reset of the virtio device. MSI-X itself stays as it is.
    fn reset_device(&mut self, around: &Around<'_>) {
        self.pause_all(around);
        self.queues.iter_mut().for_each(|queue| queue.reset(self.options.queue_size));
        self.broken.take();
        self.isr_queue.take();
        self.isr_config = false;
        self.negotiated = None;
        self.common = Common::new();
        self.device.reset();
        self.route();
    }

    /// A reset of the function: FLR, or DEVICE_RESET. The client's eventfds stay: they are no part of the function.
    pub(crate) fn reset(&mut self, around: &Around<'_>) {
        self.reset_device(around);
        self.config.reset();
        self.msix.reset();
        self.route();
    }

    /// Nothing is to touch memory any more, for good.
    pub(crate) fn end(&mut self, around: &Around<'_>) {
        self.pause_all(around);
    }
}

/// Stops one queue, whatever it is stuck in.
fn stop(queue: &mut Queue, around: &Around<'_>) {
    let visit = |gone| if gone { LOST_PATIENCE } else { VISIT };
    let mut gone = around.memory.is_gone();
    while queue.stop(around.hurry, visit(gone)).is_err() {
        if gone {
            around.memory.leave_behind();
            queue.leave();
            break;
        }
        gone = around.memory.take_away();
    }
}

/// Copies what an image has from `at` on; beyond it are zeroes.
fn copy(image: &[u8], at: u64, into: &mut [u8]) {
    let from = usize::try_from(at).ok().and_then(|at| image.get(at..)).unwrap_or_default();
    let len = from.len().min(into.len());
    into[..len].copy_from_slice(&from[..len]);
}

/// Why FEATURES_OK stays clear.
#[derive(Debug, thiserror::Error)]
enum NotTaken {
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("the driver did not take VIRTIO_F_VERSION_1 (bit 32), and there is no legacy interface here")]
    Legacy,
    #[error("the device itself: {0}")]
    Device(io::Error),
}
