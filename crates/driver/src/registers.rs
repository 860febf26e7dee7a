//! What a kernel gives to a transport: registers, and a way to wait.

use ringfence_dma::RegisterWindow;

/// A window of registers of a device.
///
/// Implemented for [`RegisterWindow`], which is memory-mapped registers at an address; a kernel with its own type for
/// that implements this in a few lines. Registers are little-endian; each access is one access of exactly that width,
/// is made as often as it is asked for, and in the order in which it is asked for. Writes to memory come before a write
/// to a register that follows them.
///
/// `offset` is a multiple of the width, and the register lies within [`len`](Self::len): a transport keeps to that.
#[expect(clippy::len_without_is_empty, reason = "nobody maps a window without a register")]
pub trait Registers {
    /// How many bytes.
    fn len(&self) -> usize;

    /// Reads 8 bits.
    fn read_u8(&self, offset: usize) -> u8;

    /// Reads 16 bits.
    fn read_u16(&self, offset: usize) -> u16;

    /// Reads 32 bits.
    fn read_u32(&self, offset: usize) -> u32;

    /// Writes 8 bits.
    fn write_u8(&self, offset: usize, value: u8);

    /// Writes 16 bits.
    fn write_u16(&self, offset: usize, value: u16);

    /// Writes 32 bits.
    fn write_u32(&self, offset: usize, value: u32);
}

macro_rules! forward {
    ($to:ty) => {
        #[inline]
        fn len(&self) -> usize {
            <$to>::len(self)
        }

        #[inline]
        fn read_u8(&self, offset: usize) -> u8 {
            <$to>::read_u8(self, offset)
        }

        #[inline]
        fn read_u16(&self, offset: usize) -> u16 {
            <$to>::read_u16(self, offset)
        }

        #[inline]
        fn read_u32(&self, offset: usize) -> u32 {
            <$to>::read_u32(self, offset)
        }

        #[inline]
        fn write_u8(&self, offset: usize, value: u8) {
            <$to>::write_u8(self, offset, value);
        }

        #[inline]
        fn write_u16(&self, offset: usize, value: u16) {
            <$to>::write_u16(self, offset, value);
        }

        #[inline]
        fn write_u32(&self, offset: usize, value: u32) {
            <$to>::write_u32(self, offset, value);
        }
    };
}

impl Registers for RegisterWindow<'_> {
    forward!(RegisterWindow<'_>);
}

impl<R: Registers> Registers for &R {
    forward!(R);
}

/// What a transport waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The device is to confirm its reset (§2.4).
    Reset,
    /// The device is to confirm the reset of this queue (§2.6.1).
    QueueReset(u16),
    /// The device is to use something of this queue: sleep until its interrupt, or for a moment. Coming back early is
    /// fine.
    Queue(u16),
}

/// How a driver waits. Any `FnMut(Waiting, u32) -> bool` will do.
pub trait Wait {
    /// Waits a moment. `waited` says how often this was called before for the same purpose, in a row. `false`: the
    /// device had time enough.
    fn wait(&mut self, purpose: Waiting, waited: u32) -> bool;
}

impl<F: FnMut(Waiting, u32) -> bool> Wait for F {
    fn wait(&mut self, purpose: Waiting, waited: u32) -> bool {
        self(purpose, waited)
    }
}

/// Waits by looking again, so many times: for a reset, where each look is an access to a register and so takes as long as a
/// thousand instructions, 256 times fewer. For firmware, and for the first steps of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Spin(pub u32);

impl Default for Spin {
    /// Longer than a device takes that answers at all: on the order of a minute.
    fn default() -> Self {
        Self(1 << 30)
    }
}

impl Wait for Spin {
    fn wait(&mut self, purpose: Waiting, waited: u32) -> bool {
        core::hint::spin_loop();
        waited
            < match purpose {
                Waiting::Queue(_) => self.0,
                Waiting::Reset | Waiting::QueueReset(_) => self.0 / 256,
            }
    }
}

/// Waits until `done` says so.
pub(crate) fn until<E>(
    wait: &mut impl Wait,
    purpose: Waiting,
    too_long: impl FnOnce(Waiting) -> E,
    mut done: impl FnMut() -> Result<bool, E>,
) -> Result<(), E> {
    let mut waited = 0_u32;
    while !done()? {
        if !wait.wait(purpose, waited) {
            return Err(too_long(purpose));
        }
        waited = waited.saturating_add(1);
    }
    Ok(())
}

/// Reads `into.len()` bytes of a device's configuration space, which begins at `start`, as §4.1.3.1 and §4.2.2.2 want it:
/// a field of 2 or 4 bytes in one access, one of 8 in two, and what is longer and aligned in words; the rest are bytes.
/// What lies behind the end is zero.
pub(crate) fn read_config(registers: &impl Registers, start: usize, offset: u32, into: &mut [u8]) {
    let at = start.saturating_add(offset as usize);
    let width = match into.len() {
        2 if at.is_multiple_of(2) => 2,
        len if len.is_multiple_of(4) && at.is_multiple_of(4) => 4,
        _ => 1,
    };
    for (number, field) in into.chunks_mut(width).enumerate() {
        let at = at.saturating_add(number * width);
        let there = at.checked_add(width).is_some_and(|end| end <= registers.len());
        match (there, field.len()) {
            (true, 4) => field.copy_from_slice(&registers.read_u32(at).to_le_bytes()),
            (true, 2) => field.copy_from_slice(&registers.read_u16(at).to_le_bytes()),
            (true, _) => field.fill(registers.read_u8(at)),
            // A window that ends within a word is read by bytes there.
            (false, len) => {
                for (at, byte) in (at..at.saturating_add(len)).zip(field) {
                    *byte = if at < registers.len() { registers.read_u8(at) } else { 0 };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_waited_for_a_bounded_number_of_looks() {
        for (purpose, expected) in [(Waiting::Queue(0), 1024), (Waiting::Reset, 4), (Waiting::QueueReset(7), 4)] {
            let looks = core::cell::Cell::new(0);
            let never = || {
                looks.set(looks.get() + 1);
                Ok(false)
            };
            assert_eq!(until(&mut Spin(1024), purpose, |purpose| purpose, never), Err(purpose));
            assert_eq!(looks.get(), expected + 1, "{purpose:?}");
        }
    }
}
