//! Every target, on bytes that were kept because they matter and on bytes that are the same each time.

use ringfence_fuzz::TARGETS;
use std::path::Path;

/// How many inputs are made up for a target.
const MADE: u64 = 60;

#[test]
fn no_target_finds_anything() {
    let threads: Vec<_> = TARGETS
        .iter()
        .map(|&(name, run)| {
            std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                kept(name).iter().for_each(|data| run(data));
                (1..=MADE).for_each(|number| run(&made(number)));
            })
        })
        .collect();
    for thread in threads {
        thread.unwrap().join().expect("a target found something");
    }
}

/// Inputs in the tree: what once found something, and what leads far.
fn kept(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kept").join(target);
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect()
}

/// Bytes that like to be small.
fn made(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize
    };
    let len = next() % 2048;
    (0..len).map(|_| if next() % 3 == 0 { next() as u8 } else { (next() % 32) as u8 }).collect()
}
