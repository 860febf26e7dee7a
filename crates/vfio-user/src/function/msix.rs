//! MSI-X (PCI 3.0 §6.8.2): the table, the pending bits, and the client's eventfds.
//!
//! What raises an interrupt is the client's eventfd for its vector (DEVICE_SET_IRQS). A client that has a table of its own,
//! as QEMU does, never writes this one, so an entry masks nothing before somebody has written to it. Whoever drives the
//! table finds it as the standard has it: an interrupt that is masked, or has no eventfd, leaves its pending bit, and is
//! raised when that changes.

use super::layout::PENDING;
use crate::event::Event;
use ringfence_driver::pci::common::NO_VECTOR;
use std::io;
use std::sync::Arc;

/// An entry of the table: address, data, control.
const ENTRY: usize = 16;

/// Where its control is, and what masks.
const CONTROL: usize = 12;
const MASKED: u8 = 1;

/// The function's MSI-X.
pub(crate) struct Msix {
    table: Vec<u8>,
    vectors: Vec<Vector>,
    /// As the capability has it.
    enabled: bool,
    all_masked: bool,
}

struct Vector {
    /// The client's. Replaced and not changed.
    line: Option<Arc<Event>>,
    /// Rung while it can't be raised: its pending bit.
    pending: Arc<Event>,
    /// Somebody has written to its entry, and what that says is meant.
    written: bool,
    /// By DEVICE_SET_IRQS.
    masked: bool,
}

/// How a queue tells of what it used.
#[derive(Clone, Debug)]
pub(super) enum Route {
    /// Not at all.
    Nowhere,
    /// By the ISR status.
    Isr,
    /// By this eventfd.
    Event(Arc<Event>),
}

impl Msix {
    pub(super) fn new(count: u16) -> io::Result<Self> {
        let vector = || Ok(Vector { line: None, pending: Arc::new(Event::new()?), written: false, masked: false });
        let vectors = (0..count).map(|_| vector()).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { table: fresh(count), vectors, enabled: false, all_masked: false })
    }

    pub(crate) fn len(&self) -> u32 {
        self.vectors.len() as u32
    }

    /// As after a reset of the function. The client's eventfds and its masks stay.
    pub(super) fn reset(&mut self) {
        let Self { table, vectors, enabled, all_masked } = self;
        *table = fresh(vectors.len() as u16);
        (*enabled, *all_masked) = (false, false);
        for Vector { line: _, pending, written, masked: _ } in vectors {
            pending.take();
            *written = false;
        }
    }

    /// The capability's two bits.
    pub(super) fn set_control(&mut self, enabled: bool, all_masked: bool) {
        (self.enabled, self.all_masked) = (enabled, all_masked);
        self.raise_pending();
    }

    /// Whether MSI-X tells of things, and not the ISR status: a client that has set it up needs no capability for that.
    pub(super) fn is_on(&self) -> bool {
        self.enabled || self.vectors.iter().any(|vector| vector.line.is_some())
    }

    /// What a driver that chose `vector` reads back (§4.1.5.1.2.1).
    pub(super) fn accept(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.len() { vector } else { NO_VECTOR }
    }

    /// Where `vector` leads now.
    pub(super) fn route(&self, vector: u16) -> Route {
        match self.vectors.get(usize::from(vector)) {
            Some(found) if self.is_masked(vector.into()) => Route::Event(Arc::clone(&found.pending)),
            Some(Vector { line: Some(line), .. }) => Route::Event(Arc::clone(line)),
            Some(found) => Route::Event(Arc::clone(&found.pending)),
            None => Route::Nowhere,
        }
    }

    fn is_masked(&self, vector: usize) -> bool {
        let Vector { written, masked, .. } = self.vectors[vector];
        let by_entry = written && self.table[vector * ENTRY + CONTROL] & MASKED != 0;
        self.enabled && self.all_masked || masked || by_entry
    }

    /// Raises one, or leaves it pending.
    pub(crate) fn trigger(&self, vector: u16) {
        if let Route::Event(event) = self.route(vector) {
            event.ring();
        }
    }

    /// DEVICE_SET_IRQS that raises one. Without an eventfd it has nothing to do: nothing has happened that could be missed.
    pub(crate) fn try_out(&self, vector: u16) {
        if self.vectors[usize::from(vector)].line.is_some() {
            self.trigger(vector);
        }
    }

    /// DEVICE_SET_IRQS with eventfds; none takes them back. The range has been checked.
    pub(crate) fn set_lines(&mut self, start: u32, lines: Vec<Option<Event>>) {
        for (vector, line) in self.vectors[start as usize..].iter_mut().zip(lines) {
            vector.line = line.map(Arc::new);
        }
        self.raise_pending();
    }

    /// DEVICE_SET_IRQS with masks. The vector has been checked.
    pub(crate) fn set_masked(&mut self, vector: u32, masked: bool) {
        self.vectors[vector as usize].masked = masked;
        self.raise_pending();
    }

    /// The client is done with all of it.
    pub(crate) fn turn_off(&mut self) {
        for vector in &mut self.vectors {
            (vector.line, vector.masked) = (None, false);
        }
    }

    /// What was pending and can be raised now is.
    pub(super) fn raise_pending(&self) {
        for (number, vector) in self.vectors.iter().enumerate() {
            if let Some(line) = &vector.line
                && !self.is_masked(number)
                && vector.pending.take()
            {
                line.ring();
            }
        }
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        super::copy(&self.table, offset, into);
        let end = offset + into.len() as u64;
        if end > PENDING {
            let mut bits = vec![0_u8; self.vectors.len().div_ceil(64) * 8];
            for (number, vector) in self.vectors.iter().enumerate() {
                bits[number / 8] |= u8::from(vector.pending.is_rung()) << (number % 8);
            }
            let skip = PENDING.saturating_sub(offset) as usize;
            super::copy(&bits, offset.max(PENDING) - PENDING, &mut into[skip..]);
        }
    }

    /// The pending bits are not for writing.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, &value) in (offset..).zip(data) {
            let Some(byte) = self.table.get_mut(at as usize) else { break };
            let field = at as usize % ENTRY;
            *byte = match field {
                // Of the address the two lowest bits are 0, of the control all but the lowest.
                0 => value & !3,
                CONTROL => value & MASKED,
                13.. => 0,
                _ => value,
            };
            if field == CONTROL {
                self.vectors[at as usize / ENTRY].written = true;
            }
        }
        self.raise_pending();
    }
}

/// Every entry is masked.
fn fresh(count: u16) -> Vec<u8> {
    let mut table = vec![0; usize::from(count) * ENTRY];
    table.iter_mut().skip(CONTROL).step_by(ENTRY).for_each(|control| *control = MASKED);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msix() -> (Msix, Event) {
        let mut msix = Msix::new(3).unwrap();
        let line = Event::new().unwrap();
        msix.set_lines(1, vec![Some(Event::of(line.try_clone().unwrap()).unwrap())]);
        (msix, line)
    }

    fn pending(msix: &Msix) -> u64 {
        let mut bits = [0; 8];
        msix.read(PENDING, &mut bits);
        u64::from_le_bytes(bits)
    }

    #[test]
    fn a_client_with_a_table_of_its_own_gets_its_interrupts() {
        let (msix, line) = msix();
        msix.trigger(1);
        assert!(line.take());
        msix.trigger(2);
        assert!(!line.take());
        assert_eq!(pending(&msix), 1 << 2, "nobody has set that one up");
    }

    #[test]
    fn a_masked_vector_is_pending_and_raised_when_it_is_unmasked() {
        let (mut msix, line) = msix();
        let control = (ENTRY + CONTROL) as u64;
        msix.write(control, &1_u32.to_le_bytes());
        msix.trigger(1);
        assert!(!line.take());
        assert_eq!(pending(&msix), 1 << 1);
        msix.write(control, &0_u32.to_le_bytes());
        assert!(line.take());
        assert_eq!(pending(&msix), 0);

        msix.set_control(true, true);
        msix.trigger(1);
        assert!(!line.take());
        msix.set_control(true, false);
        assert!(line.take());

        msix.set_masked(1, true);
        msix.trigger(1);
        assert!(!line.take());
        msix.set_masked(1, false);
        assert!(line.take());
    }

    #[test]
    fn a_table_may_be_read_and_written_anywhere() {
        let mut msix = Msix::new(3).unwrap();
        msix.write(0, &[0xff; 0x10000]);
        let mut all = vec![0; 0x10000];
        msix.read(0, &mut all);
        assert_eq!(all[..16], [0xfc, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0]);
        assert!(all[48..].iter().all(|&byte| byte == 0));
        msix.read(PENDING - 1, &mut [0; 3]);
        msix.reset();
        msix.read(0, &mut all);
        assert_eq!(all[CONTROL], MASKED);
    }
}
