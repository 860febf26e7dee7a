use super::{Command, WireError, head};
use std::os::fd::OwnedFd;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Interrupt types of a PCI device.
pub mod index {
    /// INTx.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// Errors.
    pub const ERR: u32 = 3;
    /// The host wants the device back.
    pub const REQ: u32 = 4;
    /// How many there are.
    pub const COUNT: u32 = 5;
}

/// DEVICE_SET_IRQS.
#[derive(Debug)]
pub struct SetIrqs {
    /// Which interrupt type, see [`index`]. Unchecked.
    pub index: u32,
    /// The first interrupt of it.
    pub start: u32,
    /// How many. `start + count` does not wrap.
    pub count: u32,
    /// What to do to them, or on which occasion.
    pub action: Action,
    /// With what.
    pub data: IrqData,
}

/// What is done to an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is masked.
    Mask,
    /// It is unmasked.
    Unmask,
    /// It is raised.
    Trigger,
}

/// What comes along.
#[derive(Debug)]
pub enum IrqData {
    /// Nothing: it is done to all of them; with a count of 0, all of the type are turned off.
    None,
    /// One for each: whether it is done to this one.
    Bools(Vec<bool>),
    /// One for each: written when it is done to this one. Empty: those there were are taken back.
    EventFds(Vec<OwnedFd>),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const DATA: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
const MASK: u32 = 1 << 3;
const UNMASK: u32 = 1 << 4;
const TRIGGER: u32 = 1 << 5;

impl SetIrqs {
    pub(super) fn parse(body: &[u8], fds: Vec<OwnedFd>) -> Result<Self, WireError> {
        let command = Command::DeviceSetIrqs;
        let (Raw { argsz, flags, index, start, count }, data) = head::<Raw>(command, body)?;
        if (argsz as usize) < size_of::<Raw>() {
            return Err(WireError::Argsz { command, argsz, needed: size_of::<Raw>() });
        }
        let action = match flags & !DATA {
            MASK => Action::Mask,
            UNMASK => Action::Unmask,
            TRIGGER => Action::Trigger,
            _ => return Err(WireError::Field { command, field: "flags", value: flags.into() }),
        };
        if start.checked_add(count).is_none() {
            return Err(WireError::Field { command, field: "count", value: count.into() });
        }
        // None of them is all of them, for turning them off alone.
        let all_off = action == Action::Trigger && flags & DATA == DATA_NONE && start == 0;
        if count == 0 && !all_off {
            return Err(WireError::Field { command, field: "count", value: 0 });
        }
        let data = match flags & DATA {
            DATA_NONE => IrqData::None,
            DATA_BOOL if data.len() != count as usize => {
                let needed = size_of::<Raw>() + count as usize;
                return Err(WireError::Short { command, got: body.len(), needed });
            }
            DATA_BOOL => IrqData::Bools(data.iter().map(|&byte| byte != 0).collect()),
            DATA_EVENTFD if fds.is_empty() || fds.len() == count as usize => {
                return Ok(Self { index, start, count, action, data: IrqData::EventFds(fds) });
            }
            DATA_EVENTFD => return Err(WireError::Fds { command, got: fds.len(), max: count as usize }),
            _ => return Err(WireError::Field { command, field: "flags", value: flags.into() }),
        };
        match fds.len() {
            0 => Ok(Self { index, start, count, action, data }),
            got => Err(WireError::Fds { command, got, max: 0 }),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let action = match self.action {
            Action::Mask => MASK,
            Action::Unmask => UNMASK,
            Action::Trigger => TRIGGER,
        };
        let (kind, bools) = match &self.data {
            IrqData::None => (DATA_NONE, Vec::new()),
            IrqData::Bools(bools) => (DATA_BOOL, bools.iter().map(|&it| u8::from(it)).collect()),
            IrqData::EventFds(_) => (DATA_EVENTFD, Vec::new()),
        };
        let argsz = (size_of::<Raw>() + bools.len()) as u32;
        let raw = Raw { argsz, flags: action | kind, index: self.index, start: self.start, count: self.count };
        [raw.as_bytes(), &bools].concat()
    }
}
