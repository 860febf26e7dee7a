//! Rings of either format, each half against the other.

use crate::flat::{PAGE, REST};
use crate::{Bytes, Flat};
use ringfence_dma::{Access, BusAddr, HostSlice, Memory};
use ringfence_ring::{
    AddError, Chain, Descriptor, DeviceQueue, DriverQueue, Format, Indirect, IndirectTable, Position, Used,
};
use std::sync::atomic::Ordering;

/// How many things a peer does at the most: bytes are longer than patience.
const STEPS: usize = 400;

/// What a driver writes into its ring, all of which it may.
pub(crate) fn write_as_driver(bytes: &mut Bytes<'_>, memory: HostSlice<'_>, format: Format, size: u16, next: u16) {
    match bytes.u8() % 4 {
        0 => {
            let at = bytes.below(memory.len().min(1 << 16));
            let len = bytes.below(32).min(memory.len() - at);
            memory.write(at, bytes.take(len));
        }
        1 => {
            // A descriptor that makes some sense, in the ring or in a table.
            let at = match bytes.u8() % 3 {
                0 => REST + 16 * bytes.below(64),
                _ => 16 * bytes.below(usize::from(size)),
            };
            memory.store_u64(at, REST as u64 + u64::from(bytes.u16()), Ordering::Relaxed);
            memory.store_u32(at + 8, u32::from(bytes.u8()) * u32::from(bytes.u8() % 32), Ordering::Relaxed);
            let (flags, other) = (u16::from(bytes.u8()), bytes.u16());
            let (third, fourth) = match format {
                Format::Split => (flags & 7, other % size.max(1)),
                // Its wrap counters (§2.8.1) are bits 7 and 15.
                Format::Packed => (other % size.max(1), flags & 0x87 | (flags & 0x40) << 9),
            };
            memory.store_u16(at + 12, third, Ordering::Relaxed);
            memory.store_u16(at + 14, fourth, Ordering::Relaxed);
        }
        2 if format == Format::Split => {
            let more = bytes.u8();
            for slot in 0..u16::from(more % 4) {
                let entry = usize::from(next.wrapping_add(slot) % size);
                memory.store_u16(PAGE + 4 + 2 * entry, bytes.u8().into(), Ordering::Relaxed);
            }
            memory.store_u16(PAGE + 2, next.wrapping_add((more % 4).into()), Ordering::Release);
        }
        _ => memory.store_u16(PAGE + bytes.below(1 << 9) * 2, bytes.u16(), Ordering::Relaxed),
    }
}

/// The device's half, whose driver writes anything.
pub(crate) fn hostile_driver(data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let (rules, size) = bytes.rules();
    let mut flat = Flat::new();
    let position = match rules.format {
        Format::Split => {
            let at = bytes.u16();
            Position { avail: at, used: at }
        }
        Format::Packed => Position::start(Format::Packed),
    };
    let mut queue = DeviceQueue::new(rules, Flat::layout(size), position).expect("a layout that can be");
    let mut heads = Vec::new();
    let mut chain = Chain::default();
    // Each entry of a chain costs a translation or two, and a missing piece asks for what is behind it.
    let bound = 40 * (u32::from(size) + 1024) * 2;
    for _ in 0..STEPS {
        if bytes.is_empty() {
            break;
        }
        let step = bytes.u8();
        if step < 0xa0 {
            let next = queue.position().avail;
            write_as_driver(bytes, flat.bytes(), rules.format, size, next);
            continue;
        }
        if step < 0xa8 {
            flat.set_missing(bytes.u16());
            continue;
        }
        flat.take_resolved();
        let before = queue.position();
        let visit = flat.visit();
        let mut open = queue.open(&visit);
        match step % 5 {
            0 | 1 => match open.pop(&mut chain) {
                Ok(true) => {
                    for _ in 0..3 {
                        let expanded = chain.expand(&visit, None);
                        assert!(chain.descriptors().len() <= usize::from(size) + 1024);
                        if expanded.is_ok() {
                            let total: u64 = chain.descriptors().iter().map(|piece| u64::from(piece.len)).sum();
                            assert_eq!(total, u64::from(chain.readable_len()) + u64::from(chain.writable_len()));
                            assert!(chain.descriptors().is_sorted_by_key(|piece| piece.access == Access::Write));
                        }
                    }
                    heads.push(chain.head());
                }
                _ => assert_eq!(queue.position(), before, "nothing was taken, and something changed"),
            },
            2 if !heads.is_empty() => {
                let head = heads.swap_remove(bytes.below(heads.len()));
                if open.push(head, bytes.u32()).is_err() {
                    heads.push(head);
                }
            }
            3 => {
                let _ = open.publish();
                let _ = open.needs_notification();
            }
            _ => {
                let _ = open.enable_notifications();
                let _ = open.disable_notifications();
            }
        }
        assert!(flat.take_resolved() < bound, "a step without end");
        assert!(heads.len() <= usize::from(size), "more chains than the queue has entries");
    }
}

/// The driver's half, whose device writes anything.
pub(crate) fn hostile_device(data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let (rules, size) = bytes.rules();
    let flat = Flat::new();
    let mut queue = DriverQueue::new(rules, size, flat.cells(rules.format, size)).expect("a size that can be");
    let buffers = [
        Descriptor { addr: BusAddr(0x8000), len: 4, access: Access::Read },
        Descriptor { addr: BusAddr(0x9000), len: 4, access: Access::Write },
        Descriptor { addr: BusAddr(0xa000), len: 1, access: Access::Write },
    ];
    let mut given = Vec::new();
    let mut taken = 0u16;
    for _ in 0..STEPS {
        if bytes.is_empty() {
            break;
        }
        match bytes.u8() % 8 {
            0 | 1 => {
                let table = (rules.indirect == Indirect::Allowed && bytes.one_in(2))
                    .then(|| IndirectTable { memory: flat.bytes().sub(REST, 48), addr: BusAddr(REST as u64) });
                match queue.add(&buffers[..bytes.below(3) + 1], table) {
                    Ok(token) => {
                        assert!(!given.contains(&token), "a token twice");
                        given.push(token);
                    }
                    Err(AddError::Poisoned(error)) => assert_eq!(queue.poison(), Some(error)),
                    Err(_) => {}
                }
            }
            2 => {
                let at = bytes.below(REST);
                let len = bytes.below(16).min(REST - at);
                flat.bytes().write(at, bytes.take(len));
            }
            3 if rules.format == Format::Split => {
                let slot = usize::from(taken % size);
                flat.bytes().store_u32(2 * PAGE + 4 + 8 * slot, bytes.u8().into(), Ordering::Relaxed);
                flat.bytes().store_u32(2 * PAGE + 8 + 8 * slot, bytes.below(8) as u32, Ordering::Relaxed);
                let more = u16::from(bytes.u8() % 3);
                flat.bytes().store_u16(2 * PAGE + 2, taken.wrapping_add(more), Ordering::Release);
            }
            3 => {
                let slot = 16 * bytes.below(usize::from(size));
                flat.bytes().store_u32(slot + 8, bytes.below(8) as u32, Ordering::Relaxed);
                flat.bytes().store_u16(slot + 12, bytes.u8().into(), Ordering::Relaxed);
                let flags = u16::from(bytes.u8());
                flat.bytes().store_u16(slot + 14, flags & 0x87 | (flags & 0x40) << 9, Ordering::Release);
            }
            4 => {
                let _ = queue.needs_kick();
            }
            5 => {
                let _ = queue.enable_callbacks();
                queue.disable_callbacks();
            }
            _ => {
                let poison = queue.poison();
                match queue.take_used() {
                    Ok(None) => assert_eq!(poison, None),
                    Ok(Some(Used { token, written })) => {
                        taken = taken.wrapping_add(1);
                        assert!(written <= 5, "more than any buffer has");
                        let index = given.iter().position(|&given| given == token);
                        given.swap_remove(index.expect("a token that is under way"));
                    }
                    Err(error) => {
                        assert_eq!(queue.poison(), Some(error));
                        assert!(poison.is_none_or(|poison| poison == error));
                    }
                }
            }
        }
        assert_eq!(queue.under_way().count(), given.len());
    }
}
