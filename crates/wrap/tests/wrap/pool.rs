//! A pool that is too small for all that is asked at once, and for some of it at all.

use crate::served::{self, BUFFERS, Driver, Frontend, PAGE, RINGS, Served};
use crate::{driven, options, wrap};
use ringfence_driver::blk::{Answer, Request};
use ringfence_driver::mapper::Direct;
use ringfence_policy::IommuMode;
use ringfence_wrap::Options;

#[test]
fn what_has_no_room_waits_in_order_and_nothing_fails() {
    let disk = Served::start(IommuMode::Off);
    // Room for one request of 16 pages at a time, and that barely.
    let wrapped = wrap(Options { pool: 18 * PAGE, ..options(&disk.socket) });
    // Nothing is translated: requests that wait for translations may pass each other, before they come to the pool.
    let frontend = Frontend::connect(&wrapped);
    let direct = Direct::new(frontend.buffer(RINGS));
    let mut disk = frontend.start(Driver::Old, &direct).unwrap();
    let pages: Vec<Vec<_>> = (0..16)
        .map(|request| (0..16).map(|page| frontend.buffer((BUFFERS.0 + (request * 16 + page) * PAGE, PAGE))).collect())
        .collect();
    for round in 0..20u8 {
        let mut ids = Vec::new();
        for (number, buffers) in pages.iter().enumerate() {
            // All at one place: the last to be carried out is what is there.
            buffers.iter().for_each(|buffer| buffer.memory().fill(round ^ (number as u8 * 3)));
            ids.push(disk.submit(Request::Write { sector: 0, from: buffers }).unwrap());
        }
        disk.notify().unwrap();
        while !ids.is_empty() {
            match disk.poll().unwrap() {
                Some(completion) => {
                    assert_eq!(completion.result, Ok(Answer::Done));
                    ids.retain(|&id| id != completion.id);
                }
                None => disk.wait().unwrap(),
            }
        }
        disk.read(0, &pages[0]).unwrap();
        assert!(pages[0].iter().all(|&buffer| served::bytes(buffer) == [round ^ (15 * 3); PAGE]), "round {round}");
    }
}

#[test]
fn what_never_has_room_fails_alone() {
    let disk = Served::start(IommuMode::Off);
    let wrapped = wrap(Options { pool: 16 * PAGE, ..options(&disk.socket) });
    driven!(wrapped => frontend, disk);
    let pages: Vec<_> = (0..16).map(|page| frontend.buffer((BUFFERS.0 + page * PAGE, PAGE))).collect();
    for round in 0..10 {
        served::assert_io_error(disk.write(0, &pages));
        pages[..15].iter().for_each(|page| page.memory().fill(round));
        disk.write(0, &pages[..15]).unwrap();
        disk.read(128, &pages[..15]).unwrap();
        disk.read(0, &pages[..15]).unwrap();
        assert!(pages[..15].iter().all(|&page| served::bytes(page) == [round; PAGE]));
    }
}
