//! The machine's memory, as whoever started us tells (PVH's `hvm_start_info`, version 1).

use core::ops::RangeInclusive;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

/// Its physical address, written by `entry.s`.
#[unsafe(no_mangle)]
static mut start_info: u32 = 0;

#[derive(Clone, Copy)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    acpi: u64,
    map: u64,
    map_entries: u32,
    reserved: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Entry {
    start: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

fn info() -> Option<StartInfo> {
    // SAFETY: `entry.s` has written it before any of us ran.
    let address = unsafe { start_info } as usize as *const StartInfo;
    // SAFETY: PVH promises the structure at that address, below 4 GiB and so mapped.
    let info = (!address.is_null()).then(|| unsafe { address.read_unaligned() });
    info.filter(|info| info.magic == MAGIC && info.version >= 1)
}

/// The longest command line.
const LONGEST: usize = 4096;

/// The words of the command line.
pub fn command_line() -> impl Iterator<Item = &'static [u8]> {
    let start = info().map_or(0, |info| info.command_line) as *const u8;
    // SAFETY: where there is one PVH promises that it ends with a zero, and nobody writes to it.
    let byte = |index: usize| unsafe { start.add(index).read() };
    let len = if start.is_null() { 0 } else { (0..LONGEST).take_while(|&index| byte(index) != 0).count() };
    let start = if len == 0 { core::ptr::dangling() } else { start };
    // SAFETY: so many bytes were read just now.
    let line = unsafe { core::slice::from_raw_parts(start, len) };
    line.split(|byte| *byte == b' ')
}

/// The ranges that are memory, ends included; none where nobody told.
pub fn ram() -> impl Iterator<Item = RangeInclusive<u64>> {
    let (map, entries) = info().map_or((0, 0), |info| (info.map, info.map_entries));
    (0..entries as usize)
        // SAFETY: and as many entries at its map.
        .map(move |index| unsafe { (map as *const Entry).add(index).read_unaligned() })
        .filter(|entry| entry.kind == RAM && entry.size > 0)
        .map(|entry| entry.start..=entry.start + (entry.size - 1))
}
