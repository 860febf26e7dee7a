//! The translation cache, filled and emptied by a front-end that says anything, against a list of ranges.

use crate::Bytes;
use ringfence_dma::{Access, BusAddr, Memory, Permission, Stop, Visit};
use ringfence_iotlb::{Ask, Iotlb, Options, Question, Unmapped, Wake};
use std::ptr::NonNull;
use std::sync::Arc;

struct Nobody;

impl Ask for Nobody {
    fn ask(&self, _: &[Question]) {}
}

impl Wake for Nobody {
    fn wake(&self) {}
}

/// A mapping: first and last address, where it leads, and what for.
type Entry = (u64, u64, usize, Permission);

const PLACES: [u64; 8] =
    [0, 1 << 12, 1 << 24, 0xfef0_0000, 0x0800_0000_0456_0000, 1 << 60, 0xf << 60, u64::MAX - 0xffff];

fn address(bytes: &mut Bytes<'_>) -> u64 {
    let place = PLACES[bytes.below(PLACES.len())];
    match bytes.u8() % 4 {
        0 => bytes.u64(),
        1 => place.wrapping_add(u64::from(bytes.u8()) << 12),
        2 => place.wrapping_add((u64::from(bytes.u8()) << 12).wrapping_sub(1)),
        _ => place.wrapping_add(u64::from(bytes.u8()) << 22),
    }
}

fn range(bytes: &mut Bytes<'_>) -> (u64, u64) {
    let first = address(bytes);
    let len = match bytes.u8() % 5 {
        0 => 1 << (bytes.u8() % 63),
        1 => bytes.u64(),
        2 => u64::from(bytes.u8()),
        _ => 4096 << (bytes.u8() % 13),
    };
    (first, first.saturating_add(len.max(1) - 1))
}

fn permission(bytes: &mut Bytes<'_>) -> Permission {
    [Permission::ReadOnly, Permission::WriteOnly, Permission::ReadWrite][bytes.below(3)]
}

pub(crate) fn entries(data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options::default());
    let mut view = iotlb.view(Arc::new(Nobody));
    let mut model: Vec<Entry> = Vec::new();
    let overlap = |&(first, last, ..): &Entry, from: u64, to: u64| first <= to && from <= last;
    for _ in 0..200 {
        if bytes.is_empty() {
            break;
        }
        let map = |model: &mut Vec<Entry>, first: u64, last: u64, host: usize, permission| {
            let target = NonNull::new(std::ptr::without_provenance_mut(host)).expect("not 0");
            // SAFETY: no memory at all, and what is resolved is only looked at.
            let updated = unsafe { iotlb.update(BusAddr(first), BusAddr(last), target, permission) };
            if let Ok(fence) = updated {
                fence.wait();
                model.retain(|entry| !overlap(entry, first, last));
                model.push((first, last, host, permission));
            }
        };
        let (first, last) = match bytes.u8() % 9 {
            0..=3 => {
                let (first, last) = range(bytes);
                let host = 0x7000_0000_0000 + (bytes.below(4) << 40) + bytes.below(3);
                map(&mut model, first, last, host, permission(bytes));
                (first, last)
            }
            // Two neighbours in each of many clusters of 64 pages that follow each other, or that do not.
            8 => {
                let (region, distance) = ((bytes.below(3) as u64) << 24, [18, 24, 30][bytes.below(3)]);
                let (count, permission) = (bytes.below(65) as u64, permission(bytes));
                for page in (0..count).map(|cluster| region + (cluster << distance) + 0x5000) {
                    for page in [page, page + 0x1000] {
                        map(
                            &mut model,
                            page,
                            page | 0xfff,
                            0x7000_0000_0000 + (page & 0xffff_f000) as usize,
                            permission,
                        );
                    }
                }
                (region, region + (count << distance))
            }
            4 | 5 => {
                let (first, last) = range(bytes);
                iotlb.invalidate(BusAddr(first), BusAddr(last)).wait();
                model.retain(|entry| !overlap(entry, first, last));
                (first, last)
            }
            6 => {
                let _ = iotlb.answered(bytes.one_in(2));
                continue;
            }
            _ => (address(bytes), address(bytes)),
        };
        for addr in [first, last, first.midpoint(last), first.saturating_sub(1), last.saturating_add(1)] {
            let expected = model.iter().find(|entry| overlap(entry, addr, addr));
            for access in [Access::Read, Access::Write] {
                let visit = view.visit();
                let found = visit.resolve(BusAddr(addr), usize::MAX, access, None);
                match (found, expected) {
                    (Ok(slice), Some(&(first, last, host, permission))) => {
                        assert!(permission.allows(access));
                        assert_eq!(slice.as_ptr().addr(), host.wrapping_add((addr - first) as usize));
                        assert_eq!(slice.len(), ((last - addr) as usize).saturating_add(1));
                    }
                    (Ok(slice), None) => panic!("{addr:#x} is at {:p} and should be nowhere", slice.as_ptr()),
                    (Err(Stop::Miss(_)), Some(&(_, _, _, permission))) => assert!(!permission.allows(access)),
                    (Err(_), _) => {}
                }
            }
        }
    }
}
