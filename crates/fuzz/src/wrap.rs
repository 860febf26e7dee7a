//! What stands before a back-end, with a hostile guest and with a hostile back-end.

use crate::flat::{PAGE, PAGES, REST};
use crate::link::{BackEnd, Honest, options};
use crate::ring::write_as_driver;
use crate::{Bytes, Flat};
use ringfence_device::Device;
use ringfence_device::queue::{Look, Queue, Report, Stopped};
use ringfence_dma::{Access, BusAddr, Fault};
use ringfence_ring::{Descriptor, DeviceQueue, DriverQueue, Position, Rules};
use ringfence_wrap::Wrapped;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::Arc;
use std::sync::atomic::Ordering;

struct Silence;

impl Report for Silence {
    fn fault(&mut self, _: Fault) {}
}

/// A queue of a device in `memory`, and the device.
fn queue(device: &Arc<Wrapped>, memory: &Flat, rules: Rules, size: u16, at: Position) -> Option<Queue<Flat>> {
    let ring = DeviceQueue::new(rules, Flat::layout(size), at).ok()?;
    let device: Arc<dyn Device> = Arc::clone(device) as _;
    let handler = Arc::clone(&device).open_queue(0, size, device.features() | 1 << 32).ok()?;
    Some(Queue::new(ring, size, memory.clone(), handler, Box::new(Silence), Stopped::at(at)))
}

/// Waits for the device to have something, for a little while. Of 0 milliseconds a look is left.
fn settle(queue: &mut Queue<Flat>, milliseconds: i64) {
    if let Ok(false) = queue.listen()
        && let Some(fd) = queue.completion_fd()
    {
        let timeout = Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
        let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout));
    }
    let _ = queue.ignore();
}

/// A queue's end, as a worker has it: what can end does, and the rest is given up after so many looks.
fn finish(mut queue: Queue<Flat>, looks: usize, milliseconds: i64) {
    queue.recall();
    for _ in 0..looks {
        if queue.drain() {
            break;
        }
        settle(&mut queue, milliseconds);
    }
    queue.cancel();
    let _ = queue.is_under_way();
    let _ = queue.stop();
}

/// A guest that writes anything into its ring, before an honest back-end.
pub(crate) fn hostile_guest(data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let (rules, size) = bytes.rules();
    let back_end = Honest::start();
    let device = Arc::new(Wrapped::open(options(back_end.socket(), bytes.u8())).expect("an honest back-end"));
    let memory = Flat::new();
    let at = Position::start(rules.format);
    let Some(mut queue) = queue(&device, &memory, rules, size, at) else { return };
    for _ in 0..200 {
        if bytes.is_empty() {
            break;
        }
        match bytes.u8() % 16 {
            0 => memory.set_missing(bytes.u16()),
            1..=4 => {
                if queue.turn(Look::Thorough).is_err() {
                    break;
                }
            }
            5 => settle(&mut queue, 1),
            6 => {
                // A header of a disk's request, where one may be read.
                let at = REST + usize::from(bytes.u8()) * 16;
                memory.bytes().store_u32(at, u32::from(bytes.u8() % 16), Ordering::Relaxed);
                memory.bytes().store_u64(at + 8, u64::from(bytes.u8()), Ordering::Relaxed);
            }
            _ => write_as_driver(bytes, memory.bytes(), rules.format, size, bytes_next(&memory)),
        }
    }
    memory.set_missing(0);
    finish(queue, 20, 5);
}

/// The next entry of a split avail ring, as far as the guest has come.
fn bytes_next(memory: &Flat) -> u16 {
    memory.bytes().load_u16(PAGE + 2, Ordering::Relaxed)
}

/// A back-end that writes anything into its memory, with an honest guest: of the guest's memory nothing changes but what it
/// lent for writing, and its ring is one that keeps to the rules.
pub(crate) fn hostile_back_end(data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let mut back_end = BackEnd::start(bytes.u8());
    let Ok(device) = Wrapped::open(options(back_end.socket(), bytes.u8())) else { return };
    let device = Arc::new(device);
    let memory = Flat::new();
    let rules = Rules::default();
    const SIZE: u16 = 16;
    let Some(mut queue) = queue(&device, &memory, rules, SIZE, Position::start(rules.format)) else { return };
    let mut driver = DriverQueue::new(rules, SIZE, memory.cells(rules.format, SIZE)).expect("a size that can be");
    memory.bytes().sub(REST, PAGES * PAGE - REST).fill(0xa5);
    // By the token of a chain: the slot in memory that it uses.
    let mut slots = [None; SIZE as usize];
    let place = |slot: usize| REST + slot * 1024;
    for _ in 0..200 {
        if bytes.is_empty() {
            break;
        }
        match bytes.u8() % 8 {
            0 | 1 => {
                let Some(slot) = (0..8).find(|slot| !slots.contains(&Some(*slot))) else { continue };
                let at = place(slot);
                memory.bytes().sub(at, 1024).fill(0xa5);
                memory.bytes().store_u32(at, u32::from(bytes.u8() % 2), Ordering::Relaxed);
                memory.bytes().store_u64(at + 8, u64::from(bytes.u8() % 8), Ordering::Relaxed);
                let is_read = memory.bytes().load_u32(at, Ordering::Relaxed) == 0;
                let len = 512;
                let data = if is_read { Access::Write } else { Access::Read };
                let buffer =
                    |offset: usize, len, access| Descriptor { addr: BusAddr((at + offset) as u64), len, access };
                let chain = [buffer(0, 16, Access::Read), buffer(64, len, data), buffer(1000, 1, Access::Write)];
                if let Ok(token) = driver.add(&chain, None) {
                    slots[token.index()] = Some(slot);
                    driver.publish();
                }
            }
            2 | 3 => {
                queue.turn(Look::Thorough).expect("the guest is honest");
                // Beyond every slot nobody was lent a byte. Nothing is copied but here.
                let rest = memory.bytes().sub(place(8), PAGES * PAGE - place(8));
                assert!(whole(rest, 0xa5), "memory that was never lent has changed");
            }
            // The back-end does what it does in this thread: there is nothing to wait for.
            4 => settle(&mut queue, 0),
            _ => back_end.act(bytes),
        }
        loop {
            match driver.take_used() {
                Ok(Some(used)) => {
                    let slot = slots[used.token.index()].take().expect("one that was under way");
                    check(&memory, place(slot));
                }
                Ok(None) => break,
                Err(error) => panic!("the guest's ring was broken: {error}"),
            }
        }
    }
    finish(queue, 1, 0);
}

/// What no request lends for writing is as it was, wherever in the request it lies.
fn check(memory: &Flat, at: usize) {
    let slot = memory.bytes().sub(at, 1024);
    assert!(whole(slot.sub(16, 48), 0xa5), "the bytes behind a header have changed");
    assert!(whole(slot.sub(576, 1000 - 576), 0xa5), "the bytes behind the data have changed");
    assert!(whole(slot.sub(1001, 23), 0xa5), "the bytes behind the status have changed");
    if slot.load_u32(0, Ordering::Relaxed) == 1 {
        assert!(whole(slot.sub(64, 512), 0xa5), "what was to be read has changed");
    }
}

fn whole(slice: ringfence_dma::HostSlice<'_>, byte: u8) -> bool {
    let mut copy = vec![0; slice.len()];
    slice.read(0, &mut copy);
    // As a whole: a look at each byte is what an input would take its time for.
    copy == vec![byte; copy.len()]
}
