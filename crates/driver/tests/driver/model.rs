//! A device at the level of its registers, with the disk of these tests behind: as strict as the standard lets it be. A
//! register touched in the wrong width, order or state is a panic.

use crate::world::*;
use ringfence_dma::{BusAddr, Mapper};
use ringfence_driver::blk::{Blk, BlkError, Completion, Request, RequestError};
use ringfence_driver::embedded::DeviceEnd;
use ringfence_driver::pci::{Bar, Function};
use ringfence_driver::policy::{Addressing, IommuMode};
use ringfence_driver::{Registers, Transport, Waiting};
use ringfence_ring::Layout;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const FAILED: u8 = 128;

/// How the device does not do as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    None,
    /// The second reset is never confirmed.
    NoReset,
    /// All registers read as ones from the second reset on.
    Gone,
    /// Queues run before they are started.
    Enabled,
    /// This is where queues are rung, in steps of the multiplier.
    NotifyOff(u16),
    /// There is no room for any vector.
    NoVector,
    /// A queue's reset is never confirmed.
    NoQueueReset,
    /// A queue that was reset runs.
    StillEnabled,
}

/// What both kinds of registers come down to.
pub(crate) struct Core {
    pub(crate) disk: Disk,
    pub(crate) lie: Lie,
    mode: IommuMode,
    pub(crate) status: u8,
    features: u64,
    selected: u32,
    queue: QueueState,
    /// How often a reset that was asked for reads as not done yet.
    pending: Option<u32>,
    pub(crate) resets: u32,
    gone: bool,
    pub(crate) config_vector: u16,
}

#[derive(Clone, Copy)]
pub(crate) struct QueueState {
    size: u16,
    pub(crate) vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    pending: Option<u32>,
}

const IDLE: QueueState =
    QueueState { size: 128, vector: 0xffff, enabled: false, descriptors: 0, driver: 0, device: 0, pending: None };

pub(crate) type Shared = Rc<RefCell<Core>>;

impl Core {
    pub(crate) fn shared(world: &World, features: u64, mode: IommuMode) -> Shared {
        Rc::new(RefCell::new(Self {
            disk: world.disk(features),
            lie: Lie::None,
            mode,
            status: 0xaa,
            features: 0,
            selected: 0,
            queue: IDLE,
            pending: None,
            resets: 0,
            gone: false,
            config_vector: 0xffff,
        }))
    }

    pub(crate) fn queue_vector(&self) -> u16 {
        self.queue.vector
    }

    fn offered(&self) -> u64 {
        self.mode.offers(self.disk.features())
    }

    fn ready(&self) {
        assert_eq!(self.pending, None, "touched while it resets");
    }

    fn read_status(&mut self) -> u8 {
        match self.pending {
            Some(0) if self.lie == Lie::NoReset && self.resets > 1 => self.status,
            Some(0) => {
                self.pending = None;
                self.status = 0;
                0
            }
            Some(left) => {
                self.pending = Some(left - 1);
                self.status | 1
            }
            None => self.status,
        }
    }

    fn write_status(&mut self, status: u8) {
        if status == 0 {
            self.resets += 1;
            self.gone = self.lie == Lie::Gone && self.resets > 1;
            if !(self.lie == Lie::NoReset && self.resets > 1) {
                self.disk.reset();
            }
            (self.features, self.queue, self.pending) = (0, IDLE, Some(3));
            self.config_vector = 0xffff;
            return;
        }
        self.ready();
        assert_eq!(status & self.status, self.status, "bits are taken back: {:#x} to {status:#x}", self.status);
        match status & !self.status {
            FAILED => self.status = status,
            ACKNOWLEDGE => self.status = status,
            DRIVER => {
                assert_eq!(self.status, ACKNOWLEDGE);
                self.status = status;
            }
            FEATURES_OK => {
                assert_eq!(self.status, ACKNOWLEDGE | DRIVER);
                if self.mode.accept(self.offered(), self.features).is_ok() {
                    self.status = status;
                }
            }
            DRIVER_OK => {
                assert_eq!(self.status, ACKNOWLEDGE | DRIVER | FEATURES_OK);
                self.status = status;
                self.run();
            }
            added => panic!("bits {added:#x} are set at once"),
        }
    }

    fn run(&mut self) {
        if !self.queue.enabled {
            return;
        }
        let addressing = self.mode.accept(self.offered(), self.features).expect("was accepted");
        let QueueState { size, descriptors, driver, device, .. } = self.queue;
        let [descriptors, driver, device] = [descriptors, driver, device].map(BusAddr);
        let layout = Layout { size, descriptors, driver, device };
        assert!(self.disk.start_queue(0, &layout, self.features, addressing));
    }

    fn offer(&self, select: u32) -> u32 {
        self.ready();
        assert!(self.status & DRIVER != 0, "features are read before DRIVER");
        (self.offered() >> (32 * select)) as u32
    }

    fn take(&mut self, select: u32, half: u32) {
        self.ready();
        assert_eq!(self.status, ACKNOWLEDGE | DRIVER, "features are written between DRIVER and FEATURES_OK");
        let shift = 32 * select;
        self.features = self.features & !(0xffff_ffff << shift) | u64::from(half) << shift;
    }

    fn select(&mut self, queue: u32) {
        self.ready();
        self.selected = queue;
    }

    /// The queue that is selected, to be set up.
    fn setting_up(&mut self) -> &mut QueueState {
        self.ready();
        assert_eq!(self.selected, 0, "there is one queue");
        assert!(self.status & FEATURES_OK != 0, "a queue is set up before FEATURES_OK");
        assert!(self.status & DRIVER_OK == 0 || self.features & RING_RESET != 0, "a queue is set up after DRIVER_OK");
        assert!(!self.queue.enabled, "a queue is set up that runs");
        &mut self.queue
    }

    fn enable(&mut self) {
        let running = self.status & DRIVER_OK != 0;
        self.setting_up().enabled = true;
        if running {
            self.run();
        }
    }

    fn reset_queue(&mut self) {
        self.ready();
        assert!(self.features & RING_RESET != 0, "a queue's reset that was not agreed on");
        assert!(self.queue.enabled, "a queue is reset that does not run");
        self.disk.reset();
        self.queue = QueueState { pending: Some(2), enabled: self.lie == Lie::StillEnabled, ..IDLE };
    }

    fn queue_resets(&mut self) -> bool {
        match self.queue.pending {
            _ if self.lie == Lie::NoQueueReset => true,
            Some(0) | None => {
                self.queue.pending = None;
                false
            }
            Some(left) => {
                self.queue.pending = Some(left - 1);
                true
            }
        }
    }

    fn is_enabled(&self) -> bool {
        self.queue.enabled || self.lie == Lie::Enabled
    }

    fn kick(&mut self, queue: u32) {
        self.ready();
        assert!(self.status & DRIVER_OK != 0, "rung before DRIVER_OK");
        assert_eq!(queue, 0);
        assert!(self.queue.enabled, "a queue is rung that does not run");
        self.disk.turn(0);
    }

    /// The widths of the fields of a disk's configuration space (§5.2.4), which are to be read as such.
    fn config(&self, offset: usize, width: usize) -> u32 {
        self.ready();
        assert!(self.status & DRIVER != 0, "the configuration is read before DRIVER");
        let natural = match offset {
            0..16 | 20..24 | 28..32 | 36..56 => 4,
            16 | 26 | 34 => 2,
            _ => 1,
        };
        assert!(width == natural, "{width} bytes at {offset} of the configuration");
        let mut bytes = [0; 4];
        self.disk.read_config(offset as u32, &mut bytes[..width]);
        u32::from_le_bytes(bytes)
    }
}

/// How the transports of these tests wait: in vain after a while.
pub(crate) fn patience(core: &Shared) -> impl FnMut(Waiting, u32) -> bool + use<> {
    let core = core.clone();
    move |purpose, waited| {
        if let Waiting::Queue(_) = purpose {
            // An interrupt that got lost is made up for.
            let mut core = core.borrow_mut();
            if core.queue.enabled && core.status & DRIVER_OK != 0 && core.pending.is_none() {
                core.disk.turn(0);
            }
        }
        waited < 100
    }
}

/// A window of an MMIO device, version 2 (§4.2.2).
pub(crate) struct MmioModel {
    pub(crate) core: Shared,
    pub(crate) magic: u32,
    pub(crate) version: u32,
    pub(crate) device: u32,
    pub(crate) len: usize,
    features_sel: [Cell<u32>; 2],
}

impl MmioModel {
    pub(crate) fn new(core: &Shared) -> Self {
        let features_sel = [Cell::new(7), Cell::new(7)];
        Self { core: core.clone(), magic: 0x7472_6976, version: 2, device: 2, len: 0x200, features_sel }
    }
}

fn halves(field: &mut u64, upper: bool, value: u32) {
    let shift = if upper { 32 } else { 0 };
    *field = *field & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

impl Registers for MmioModel {
    fn len(&self) -> usize {
        self.len
    }

    fn read_u8(&self, offset: usize) -> u8 {
        assert!(offset >= 0x100, "8 bits of register {offset:#x}");
        self.core.borrow().config(offset - 0x100, 1) as u8
    }

    fn read_u16(&self, offset: usize) -> u16 {
        assert!(offset >= 0x100, "16 bits of register {offset:#x}");
        self.core.borrow().config(offset - 0x100, 2) as u16
    }

    fn read_u32(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len);
        let mut core = self.core.borrow_mut();
        match offset {
            0x000 => self.magic,
            0x004 if self.magic == 0x7472_6976 => self.version,
            0x008 if self.version == 2 => self.device,
            0x00c if self.device != 0 => 0x1af4,
            _ if self.version != 2 || self.device == 0 => panic!("register {offset:#x} of no device"),
            0x010 => core.offer(self.features_sel[0].get()),
            0x034 => {
                core.ready();
                if core.selected == 0 { 128 } else { 0 }
            }
            0x044 => u32::from(core.is_enabled()),
            0x060 => 1,
            0x070 => core.read_status().into(),
            0x0c0 => u32::from(core.queue_resets()),
            0x0fc => 0,
            0x100.. => core.config(offset - 0x100, 4),
            _ => panic!("register {offset:#x} is read"),
        }
    }

    fn write_u8(&self, offset: usize, _: u8) {
        panic!("8 bits of register {offset:#x} are written");
    }

    fn write_u16(&self, offset: usize, _: u16) {
        panic!("16 bits of register {offset:#x} are written");
    }

    fn write_u32(&self, offset: usize, value: u32) {
        let mut core = self.core.borrow_mut();
        match offset {
            0x014 => self.features_sel[0].set(value),
            0x024 => self.features_sel[1].set(value),
            0x020 => core.take(self.features_sel[1].get(), value),
            0x030 => core.select(value),
            0x038 => core.setting_up().size = value as u16,
            0x044 => {
                assert_eq!(value, 1);
                core.enable();
            }
            0x050 => core.kick(value),
            0x064 => assert_eq!(value, 1, "what was there is acknowledged"),
            0x070 => core.write_status(value as u8),
            0x080 | 0x084 => halves(&mut core.setting_up().descriptors, offset == 0x084, value),
            0x090 | 0x094 => halves(&mut core.setting_up().driver, offset == 0x094, value),
            0x0a0 | 0x0a4 => halves(&mut core.setting_up().device, offset == 0x0a4, value),
            0x0c0 => {
                assert_eq!(value, 1);
                core.reset_queue();
            }
            _ => panic!("register {offset:#x} is written"),
        }
    }
}

/// A PCI function with its structures in a 64-bit BAR 4.
pub(crate) struct PciModel {
    pub(crate) core: Shared,
    /// The configuration space; BARs are kept beside it.
    pub(crate) space: [u8; 256],
    pub(crate) bars: [BarModel; 6],
    /// Where the next capability goes, and where the last one's link is.
    free: u8,
    link: u8,
    /// What the kernel won't map.
    pub(crate) unmappable: bool,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BarModel {
    pub(crate) value: u32,
    /// The bits that can be written.
    pub(crate) mask: u32,
    /// The bits that say what it is.
    pub(crate) kind: u32,
}

/// One of virtio's capabilities.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cap {
    pub(crate) len: u8,
    pub(crate) kind: u8,
    pub(crate) bar: u8,
    pub(crate) offset: u32,
    pub(crate) length: u32,
    pub(crate) multiplier: u32,
}

/// Where the structures are in BAR 4.
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const BAR_LEN: u32 = 0x4000;
const MULTIPLIER: u32 = 4;

pub(crate) const COMMON_CAP: Cap = Cap { len: 16, kind: 1, bar: 4, offset: 0, length: 0x38, multiplier: 0 };
pub(crate) const NOTIFY_CAP: Cap =
    Cap { len: 20, kind: 2, bar: 4, offset: NOTIFY, length: 0x1000, multiplier: MULTIPLIER };
pub(crate) const ISR_CAP: Cap = Cap { len: 16, kind: 3, bar: 4, offset: ISR, length: 1, multiplier: 0 };
pub(crate) const DEVICE_CAP: Cap = Cap { len: 16, kind: 4, bar: 4, offset: DEVICE, length: 60, multiplier: 0 };

impl PciModel {
    /// A modern function with these capabilities.
    pub(crate) fn new(core: &Shared, caps: &[Cap]) -> Self {
        let mut space = [0; 256];
        space[..4].copy_from_slice(&[0xf4, 0x1a, 0x42, 0x10]);
        // Status: capabilities; another bit that a one would clear.
        space[6..8].copy_from_slice(&[0x10, 0x20]);
        space[8] = 1;
        let mut bars = [BarModel::default(); 6];
        bars[0] = BarModel { value: 0xc000, mask: 0xffff_ffe0, kind: 1 };
        bars[1] = BarModel { value: 0xfebd_1000, mask: 0xffff_f000, kind: 0 };
        bars[4] = BarModel { value: 0, mask: !(BAR_LEN - 1), kind: 0xc };
        bars[5] = BarModel { value: 0x80, mask: u32::MAX, kind: 0 };
        let mut model = Self { core: core.clone(), space, bars, free: 0x40, link: 0x34, unmappable: false };
        caps.iter().for_each(|cap| model.add(*cap));
        model
    }

    pub(crate) fn sane(core: &Shared) -> Self {
        Self::new(core, &[COMMON_CAP, NOTIFY_CAP, ISR_CAP, DEVICE_CAP])
    }

    pub(crate) fn add(&mut self, cap: Cap) {
        let at = self.free;
        self.space[usize::from(self.link)] = at;
        let mut bytes = vec![0; usize::from(cap.len).max(20)];
        bytes[0] = 9;
        bytes[2] = cap.len;
        bytes[3] = cap.kind;
        bytes[4] = cap.bar;
        bytes[8..12].copy_from_slice(&cap.offset.to_le_bytes());
        bytes[12..16].copy_from_slice(&cap.length.to_le_bytes());
        bytes[16..20].copy_from_slice(&cap.multiplier.to_le_bytes());
        let room = bytes.len().min(256 - usize::from(at));
        self.space[usize::from(at)..][..room].copy_from_slice(&bytes[..room]);
        self.link = at + 1;
        self.free = at.saturating_add(20);
    }

    /// Where the next capability goes.
    pub(crate) fn next_at(&mut self, at: u8) {
        self.free = at;
    }

    /// Where the list goes on after the last one.
    pub(crate) fn link_to(&mut self, at: u8) {
        self.space[usize::from(self.link)] = at;
    }

    fn command(&self) -> u8 {
        self.space[4]
    }
}

/// A function that the test keeps a hand on.
#[derive(Clone)]
pub(crate) struct Model(Rc<RefCell<PciModel>>);

impl Model {
    pub(crate) fn new(model: PciModel) -> Self {
        Self(Rc::new(RefCell::new(model)))
    }

    pub(crate) fn borrow(&self) -> std::cell::Ref<'_, PciModel> {
        self.0.borrow()
    }
}

impl Function for Model {
    type Registers = PciWindow;

    fn slot(&self) -> u64 {
        0x18
    }

    fn read(&mut self, offset: u8) -> u32 {
        assert!(offset.is_multiple_of(4));
        let model = self.borrow();
        if model.core.borrow().gone {
            return u32::MAX;
        }
        if let 0x10..0x28 = offset {
            let bar = model.bars[usize::from(offset - 0x10) / 4];
            return bar.value & bar.mask | bar.kind;
        }
        u32::from_le_bytes(model.space[usize::from(offset)..][..4].try_into().unwrap())
    }

    fn write(&mut self, offset: u8, value: u32) {
        let mut model = self.0.borrow_mut();
        match offset {
            0x04 => {
                assert_eq!(value >> 16, 0, "ones clear bits of the status register");
                model.space[4..6].copy_from_slice(&value.to_le_bytes()[..2]);
            }
            0x10..0x28 => {
                assert_eq!(model.command() & 3, 0, "a BAR is written while it is decoded");
                model.bars[usize::from(offset - 0x10) / 4].value = value;
            }
            _ => panic!("{offset:#x} of the configuration space is written"),
        }
    }

    fn map(&mut self, bar: Bar, offset: u64, len: usize) -> Option<PciWindow> {
        let model = self.borrow();
        assert!(offset + len as u64 <= bar.len, "beyond {bar:?}");
        assert!(model.bars[4].value & model.bars[4].mask == 0 && model.bars[5].value == 0x80, "a BAR was not put back");
        (!model.unmappable).then(|| {
            assert_eq!(bar, Bar { index: 4, address: 0x80_0000_0000, len: BAR_LEN.into() });
            PciWindow { model: self.clone(), start: offset as usize, len }
        })
    }
}

/// Registers in BAR 4.
pub(crate) struct PciWindow {
    model: Model,
    start: usize,
    len: usize,
}

impl PciWindow {
    /// What the device has here: `None` where it is gone.
    fn access<R>(&self, offset: usize, width: usize, access: impl FnOnce(&mut Core, usize) -> R) -> Option<R> {
        assert!(offset.is_multiple_of(width) && offset + width <= self.len, "{width} bytes at {offset:#x}");
        let model = self.model.borrow();
        assert!(model.command() & 2 != 0, "registers are touched while memory is not decoded");
        let mut core = model.core.borrow_mut();
        (!core.gone).then(|| access(&mut core, self.start + offset))
    }
}

impl Registers for PciWindow {
    fn len(&self) -> usize {
        self.len
    }

    fn read_u8(&self, offset: usize) -> u8 {
        let read = self.access(offset, 1, |core, at| match at {
            0x14 => core.read_status(),
            0x15 => {
                core.ready();
                0
            }
            0x1000 => 1,
            0x2000.. => core.config(at - 0x2000, 1) as u8,
            _ => panic!("8 bits at {at:#x} are read"),
        });
        read.unwrap_or(u8::MAX)
    }

    fn read_u16(&self, offset: usize) -> u16 {
        let read = self.access(offset, 2, |core, at| match at {
            0x10 => core.config_vector,
            0x12 => 1,
            0x18 => core.queue.size,
            0x1a => core.queue.vector,
            0x1c => u16::from(core.is_enabled()),
            0x1e => match core.lie {
                Lie::NotifyOff(off) => off,
                _ => 3,
            },
            0x3a => u16::from(core.queue_resets()),
            0x2000..0x3000 => core.config(at - 0x2000, 2) as u16,
            _ => panic!("16 bits at {at:#x} are read"),
        });
        read.unwrap_or(u16::MAX)
    }

    fn read_u32(&self, offset: usize) -> u32 {
        let read = self.access(offset, 4, |core, at| match at {
            0x04 => core.offer(core.selected),
            0x2000..0x3000 => core.config(at - 0x2000, 4),
            _ => panic!("32 bits at {at:#x} are read"),
        });
        read.unwrap_or(u32::MAX)
    }

    fn write_u8(&self, offset: usize, value: u8) {
        self.access(offset, 1, |core, at| match at {
            0x14 => core.write_status(value),
            _ => panic!("8 bits at {at:#x} are written"),
        });
    }

    fn write_u16(&self, offset: usize, value: u16) {
        let master = self.model.borrow().command() & 4 != 0;
        self.access(offset, 2, |core, at| match at {
            0x10 => {
                core.ready();
                core.config_vector = if core.lie == Lie::NoVector { 0xffff } else { value };
            }
            0x16 => core.select(value.into()),
            0x18 => core.setting_up().size = value,
            0x1a => core.setting_up().vector = value,
            0x1c => {
                assert_eq!(value, 1, "queue_enable takes no 0");
                assert!(master, "a queue is started that can't be reached");
                core.enable();
            }
            0x3a => {
                assert_eq!(value, 1);
                core.reset_queue();
            }
            0x300c => {
                assert!(master, "rung while the device can't reach memory");
                core.kick(value.into());
            }
            _ => panic!("16 bits at {at:#x} are written"),
        });
    }

    fn write_u32(&self, offset: usize, value: u32) {
        self.access(offset, 4, |core, at| match at {
            0x00 | 0x08 => core.selected = value,
            0x0c => core.take(core.selected, value),
            0x20 | 0x24 => halves(&mut core.setting_up().descriptors, at == 0x24, value),
            0x28 | 0x2c => halves(&mut core.setting_up().driver, at == 0x2c, value),
            0x30 | 0x34 => halves(&mut core.setting_up().device, at == 0x34, value),
            _ => panic!("32 bits at {at:#x} are written"),
        });
    }
}

/// What the device was told about addresses.
pub(crate) fn addressing(core: &Shared) -> Option<Addressing> {
    core.borrow().disk.addressing
}

/// Has the disk's queue reset while it has a request. Where that comes to `Ok`, the disk goes on and the request is lost; else
/// it keeps what it was lent.
pub(crate) fn check_restart<'a, T: Transport<Error: PartialEq>>(
    world: &'a World,
    core: &RefCell<Core>,
    disk: &mut Blk<'a, T, dyn Mapper + 'a>,
    expected: Result<(), BlkError<T::Error>>,
) {
    let idle = world.domain.mapped();
    core.borrow_mut().disk.mood = Mood::Sleepy;
    let lost = disk.submit(Request::Read { sector: 0, into: &[world.buffer(0, 512)] }).unwrap();
    disk.notify().unwrap();
    core.borrow_mut().disk.mood = Mood::Good;
    let outcome = disk.restart();
    assert_eq!(outcome, expected);
    if outcome.is_err() {
        assert_eq!(world.domain.mapped(), idle + 1, "it stays lent");
        assert_eq!(disk.poll(), Ok(None));
        return;
    }
    assert_eq!(world.domain.mapped(), idle, "all is back");
    assert_eq!(disk.poll(), Ok(Some(Completion { id: lost, result: Err(RequestError::Lost) })));
    let data = [world.buffer(0, 512)];
    for round in 0..300 {
        data[0].memory().write(0, &stamp(round, 512));
        disk.write(1, &data).unwrap();
        data[0].memory().fill(0);
        disk.read(1, &data).unwrap();
        assert_eq!(bytes(data[0]), stamp(round, 512));
    }
}
