use super::*;
use crate::SharedMemory;
use proptest::prelude::*;
use std::os::fd::AsFd;

const PAGE: u64 = 4096;

fn at(gpa: u64, va: u64, size: u64, offset: u64) -> Placement {
    Placement { gpa: Gpa(gpa), frontend_va: FrontendVa(va), size, offset }
}

/// A file of so many pages, each filled with its own number.
fn file(pages: u64) -> SharedMemory {
    let memory = SharedMemory::new((pages * PAGE) as usize).unwrap();
    for page in 0..pages {
        memory.slice((page * PAGE) as usize, PAGE as usize).fill(page as u8);
    }
    memory
}

fn fd(memory: &SharedMemory) -> OwnedFd {
    memory.as_fd().try_clone_to_owned().unwrap()
}

fn table(memory: &SharedMemory, placements: &[Placement]) -> Result<Regions, MapError> {
    Regions::new(placements.iter().map(|&placement| (placement, fd(memory))).collect())
}

/// The first byte and the length of each piece.
fn shape<'r>(pieces: impl Iterator<Item = HostSlice<'r>>) -> Vec<(u8, usize)> {
    pieces.map(|piece| (byte(piece), piece.len())).collect()
}

fn byte(slice: HostSlice<'_>) -> u8 {
    let mut byte = [0];
    slice.read(0, &mut byte);
    byte[0]
}

#[test]
fn memory_is_found_by_both_of_its_addresses() {
    let memory = file(8);
    // As QEMU does it: one file, the part above 4 GiB from an offset, guest addresses with a hole.
    let regions =
        table(&memory, &[at(1 << 32, 0x7000_0000 + 4 * PAGE, 4 * PAGE, 4 * PAGE), at(0, 0x7000_0000, 4 * PAGE, 0)]);
    let regions = regions.unwrap();
    let page_at = |gpa, len| Physical::slice(&regions, Gpa(gpa), len).map(|slice| (byte(slice), slice.len()));
    assert_eq!(page_at(0, 16), Some((0, 16)));
    assert_eq!(page_at(3 * PAGE + 1, usize::MAX), Some((3, PAGE as usize - 1)));
    assert_eq!(page_at(4 * PAGE, 1), None);
    assert_eq!(page_at((1 << 32) - 1, 1), None);
    assert_eq!(page_at((1 << 32) + 3 * PAGE, 1), Some((7, 1)));
    assert_eq!(page_at((1 << 32) + 4 * PAGE, 1), None);
    assert_eq!(page_at(u64::MAX, 1), None);

    assert_eq!(regions.gpa(FrontendVa(0x7000_0000)), Some(Gpa(0)));
    assert_eq!(regions.gpa(FrontendVa(0x7000_0000 + 5 * PAGE + 7)), Some(Gpa((1 << 32) + PAGE + 7)));
    assert_eq!(regions.gpa(FrontendVa(0x6fff_ffff)), None);
    assert_eq!(regions.gpa(FrontendVa(0x7000_0000 + 8 * PAGE)), None);

    // A write arrives in the file: it is the same memory.
    Physical::slice(&regions, Gpa(1 << 32), 1).unwrap().fill(0xaa);
    assert_eq!(byte(memory.slice(4 * PAGE as usize, 1)), 0xaa);
}

#[test]
fn a_range_may_straddle_neighbours_and_never_leave_them() {
    let memory = file(6);
    let base = 0x7000_0000;
    let regions = table(
        &memory,
        &[
            at(0, base, 2 * PAGE, 0),
            at(9 * PAGE, base + 2 * PAGE, PAGE, 2 * PAGE),
            at(5 * PAGE, base + 3 * PAGE, PAGE, 5 * PAGE),
            // With a hole before it.
            at(20 * PAGE, base + 5 * PAGE, PAGE, 4 * PAGE),
        ],
    );
    let regions = regions.unwrap();
    let pieces = |va, len| regions.pieces(FrontendVa(va), len).map(shape);
    let page = PAGE as usize;
    assert_eq!(pieces(base, 1), Some(vec![(0, 1)]));
    assert_eq!(pieces(base, 4 * PAGE), Some(vec![(0, 2 * page), (2, page), (5, page)]));
    assert_eq!(pieces(base + 2 * PAGE - 1, 2), Some(vec![(1, 1), (2, 1)]));
    assert_eq!(pieces(base + 3 * PAGE, PAGE), Some(vec![(5, page)]));
    assert_eq!(pieces(base, 4 * PAGE + 1), None);
    assert_eq!(pieces(base + 4 * PAGE, 1), None);
    assert_eq!(pieces(base - 1, 2), None);
    assert_eq!(pieces(base, 0), None);
    assert_eq!(pieces(base, u64::MAX), None);
    assert_eq!(pieces(u64::MAX, 1), None);
}

#[test]
fn a_region_may_reach_the_top_of_both_spaces() {
    let memory = file(1);
    let top = 0u64.wrapping_sub(PAGE);
    let regions = table(&memory, &[at(top, top, PAGE, 0)]).unwrap();
    assert_eq!(Physical::slice(&regions, Gpa(u64::MAX), 9).unwrap().len(), 1);
    assert_eq!(regions.gpa(FrontendVa(u64::MAX)), Some(Gpa(u64::MAX)));
    assert_eq!(shape(regions.pieces(FrontendVa(top), PAGE).unwrap()), vec![(0, PAGE as usize)]);
    assert!(regions.pieces(FrontendVa(top), PAGE + 1).is_none());
}

#[test]
fn regions_come_and_go() {
    let memory = file(2);
    let one = at(0, 0x1000, PAGE, 0);
    let two = at(PAGE, 0x8000, PAGE, PAGE);
    let mut regions = table(&memory, &[one]).unwrap();
    let before = regions.clone();
    regions.add(two, fd(&memory)).unwrap();
    assert_eq!((regions.len(), before.len()), (2, 1));
    let absent = MapError::Absent { gpa: Gpa(PAGE), va: FrontendVa(0x8000), size: 2 * PAGE };
    assert_eq!(regions.remove(&Placement { size: 2 * PAGE, ..two }).unwrap_err(), absent);
    // The offset is not looked at.
    let held = regions.remove(&Placement { offset: 77, ..two }).unwrap();
    assert!(Physical::slice(&regions, Gpa(PAGE), 1).is_none() && regions.gpa(FrontendVa(0x8000)).is_none());
    assert_eq!(byte(held.slice()), 1, "whoever holds a region can go on using it");
    regions.remove(&one).unwrap();
    assert!(regions.is_empty());
    assert!(regions.remove(&one).is_err());
}

#[test]
fn what_is_no_table_is_refused_and_says_why() {
    let memory = file(4);
    let gpa = Gpa(PAGE);
    let error = |placements: &[Placement]| table(&memory, placements).unwrap_err();
    let wraps = |size, space| MapError::Wraps { gpa, size, space };
    assert_eq!(error(&[at(PAGE, 0, 0, 0)]), MapError::Empty { gpa });
    assert_eq!(error(&[at(PAGE, 0, u64::MAX, 0)]), wraps(u64::MAX, "guest-physical addresses"));
    assert_eq!(error(&[at(PAGE, !0xfff, PAGE + 1, 0)]), wraps(PAGE + 1, "front-end addresses"));
    assert_eq!(error(&[at(PAGE, 0, PAGE, u64::MAX)]), wraps(PAGE, "file"));
    assert_eq!(error(&[at(PAGE, 0, PAGE, i64::MAX as u64)]), wraps(PAGE, "file"));
    let too_short = MapError::FileTooShort { file: 4 * PAGE, needed: 4 * PAGE + 1 };
    assert_eq!(error(&[at(PAGE, 0, PAGE + 1, 3 * PAGE)]), too_short);

    let first = at(0, 0x10_0000, 2 * PAGE, 0);
    let over = MapError::GpaOverlap { gpa, other: Gpa(0) };
    assert_eq!(error(&[first, at(PAGE, 0, PAGE, 0)]), over);
    let va = FrontendVa(0x10_0000 + PAGE);
    let over = MapError::VaOverlap { gpa: Gpa(2 * PAGE), va, other: Gpa(0) };
    assert_eq!(error(&[first, at(2 * PAGE, va.0, PAGE, 0)]), over);

    let mut full = Regions::default();
    for n in 0..MAX_REGIONS as u64 {
        full.add(at(n * PAGE, n * PAGE, PAGE, 0), fd(&memory)).unwrap();
    }
    let one_more = full.add(at(!0xfff, !0xfff, PAGE, 0), fd(&memory));
    assert_eq!(one_more, Err(MapError::TooMany { max: MAX_REGIONS }));
}

#[test]
fn files_that_cannot_be_guest_memory_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    std::fs::write(&path, [0; PAGE as usize]).unwrap();
    let place = at(0, 0, PAGE, 0);
    let map = |fd: OwnedFd| Region::map(place, fd).unwrap_err();
    assert_eq!(map(std::fs::File::open(&path).unwrap().into()), MapError::NotWritable);
    let write_only = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    assert_eq!(map(write_only.into()), MapError::NotWritable);
    let (_, writer) = std::io::pipe().unwrap();
    assert_eq!(map(writer.into()), MapError::NotWritable);
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(map(socket.into()), MapError::NotMappable);

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let sealed = memfd_create("sealed", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&sealed, PAGE).unwrap();
    fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    assert_eq!(map(sealed), MapError::NotWritable);

    let both = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    Region::map(place, both.into()).unwrap();
}

#[test]
fn an_offset_needs_no_alignment() {
    let memory = file(3);
    let region = Region::map(at(0, 0, PAGE, PAGE + 100), fd(&memory)).unwrap();
    assert_eq!(region.size(), PAGE);
    assert_eq!((byte(region.slice()), byte(region.slice().sub(PAGE as usize - 100, 1))), (1, 2));
}

#[test]
fn sealed_memory_cannot_be_shortened() {
    let memory = file(1);
    memory.seal_length().unwrap();
    assert_eq!(rustix::fs::ftruncate(&memory, 0), Err(rustix::io::Errno::PERM));
}

/// Huge pages are mapped whole. There may be none to be had: then touching them is what loses them.
#[test]
fn a_region_of_huge_pages_may_start_and_end_anywhere() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    const HUGE: u64 = 2 << 20;
    let Ok(file) = memfd_create("huge", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) else {
        eprintln!("SKIPPED: this kernel has no huge pages of 2 MiB");
        return;
    };
    ftruncate(&file, 2 * HUGE).unwrap();
    let placement = at(0, 0, HUGE, HUGE - PAGE);
    let region = Region::map(placement, file.try_clone().unwrap()).unwrap();
    let slice = region.slice();
    slice.fill(0x55);
    assert_eq!((byte(slice), byte(slice.sub(slice.len() - 1, 1))), (0x55, 0x55));
    // Unmapping a part of a huge page would fail, and that is asserted where it is done.
    drop(region);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Both ways of looking a byte up agree with a list that is searched from end to end.
    #[test]
    fn lookups_agree_with_a_search(
        slots in proptest::collection::vec((0u64..24, 0u64..24, 1u64..4, 0u64..4), 0..8),
        probes in proptest::collection::vec((0u64..30 * PAGE, 1u64..6 * PAGE), 1..30),
    ) {
        let memory = file(8);
        let mut regions = Regions::default();
        let mut model: Vec<Placement> = Vec::new();
        for (gpa, va, pages, offset) in slots {
            let new = at(gpa * PAGE, va * PAGE, pages * PAGE, offset * PAGE);
            let apart = |a: u64, b: u64, other: u64| a + new.size <= b || b + other <= a;
            let fits = model.iter().all(|old| {
                apart(new.gpa.0, old.gpa.0, old.size) && apart(new.frontend_va.0, old.frontend_va.0, old.size)
            });
            prop_assert_eq!(regions.add(new, fd(&memory)).is_ok(), fits);
            model.extend(fits.then_some(new));
        }
        for (addr, len) in probes {
            let by_gpa = model.iter().find(|r| (r.gpa.0..r.gpa.0 + r.size).contains(&addr));
            let slice = Physical::slice(&regions, Gpa(addr), len as usize);
            let found = slice.map(|slice| (u64::from(byte(slice)), slice.len() as u64));
            let expected = by_gpa.map(|r| {
                let within = addr - r.gpa.0;
                ((r.offset + within) / PAGE, len.min(r.size - within))
            });
            prop_assert_eq!(found, expected);

            let by_va = |va: u64| model.iter().find(|r| (r.frontend_va.0..r.frontend_va.0 + r.size).contains(&va));
            let gpa = by_va(addr).map(|r| Gpa(r.gpa.0 + (addr - r.frontend_va.0)));
            prop_assert_eq!(regions.gpa(FrontendVa(addr)), gpa);
            // Page by page: where each starts, and its last byte.
            let stops: Vec<u64> = (addr..addr + len).filter(|va| *va == addr || va % PAGE == 0).collect();
            let covered = stops.iter().all(|&va| by_va(va).is_some());
            let pieces = regions.pieces(FrontendVa(addr), len);
            prop_assert_eq!(pieces.is_some(), covered);
            if let Some(pieces) = pieces {
                let mut va = addr;
                for piece in pieces {
                    let region = by_va(va).unwrap();
                    let page = (region.offset + (va - region.frontend_va.0)) / PAGE;
                    prop_assert_eq!(u64::from(byte(piece)), page);
                    va += piece.len() as u64;
                }
                prop_assert_eq!(va, addr + len);
            }
        }
    }
}
