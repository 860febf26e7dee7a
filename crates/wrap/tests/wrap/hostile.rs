//! Back-ends that break every rule there is: the driver gets what it asked for from the next one, or an error.

use crate::scripted::{Act, Scripted};
use crate::served::{self, BUFFERS, Driver, Frontend, PAGE, RINGS};
use crate::{driven, options, wrap};
use ringfence_dma::{Buffer, DmaError, HostSlice, Mapped, Mapper, Permission};
use ringfence_driver::blk::{Answer, BlkError, Completion, Request, RequestError};
use ringfence_iommu::Strict;
use ringfence_vhost_user::wire::Invalidated;
use ringfence_wrap::{OnError, Options};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const RULES: [Act; 7] =
    [Act::WildIndex, Act::NeverGiven, Act::NoSuchChain, Act::Twice, Act::TooLong, Act::Silent, Act::Dies];

#[test]
fn whoever_breaks_a_rule_is_hung_up_on_and_the_next_gets_what_is_unanswered() {
    for act in RULES {
        let backend = Scripted::start(&[act, act]);
        let timeout = Some(Duration::from_secs(1));
        let wrapped = wrap(Options { timeout, ..options(&backend.socket) });
        driven!(wrapped => frontend, disk);
        for round in 0..3 {
            frontend.write_and_read_back(&mut disk, round);
        }
        assert!(backend.connections() >= 3, "{act:?} had no consequence");
    }
}

#[test]
fn with_on_error_stop_every_request_fails_from_then_on() {
    for act in RULES.into_iter().filter(|&act| act != Act::Dies) {
        let backend = Scripted::start(&[act]);
        let timeout = Some(Duration::from_secs(1));
        let wrapped = wrap(Options { timeout, on_error: OnError::Stop, ..options(&backend.socket) });
        driven!(wrapped => frontend, disk);
        let buffer = frontend.buffer((BUFFERS.0, PAGE));
        buffer.memory().fill(0x5a);
        // The first may have been answered before the rule was broken.
        let first = disk.read(0, &[buffer]);
        if act != Act::Twice {
            assert!(matches!(first, Err(BlkError::Failed(RequestError::Io))), "{act:?}: {first:?}");
            assert_eq!(served::bytes(buffer), [0x5a; PAGE], "{act:?}: bytes that nobody vouches for");
        }
        for _ in 0..10 {
            let failed = disk.read(0, &[buffer]);
            assert!(matches!(failed, Err(BlkError::Failed(RequestError::Io))), "{act:?}: {failed:?}");
        }
        assert_eq!(backend.connections(), 1, "{act:?}");
    }
}

#[test]
fn a_read_that_was_not_written_whole_fails_and_brings_nothing() {
    let backend = Scripted::start(&[Act::Short]);
    let wrapped = wrap(options(&backend.socket));
    driven!(wrapped => frontend, disk);
    backend.disk.lock().unwrap().fill(0xee);
    let buffer = frontend.buffer((BUFFERS.0, PAGE));
    buffer.memory().fill(0x5a);
    for _ in 0..10 {
        served::assert_io_error(disk.read(0, &[buffer]));
    }
    assert_eq!(served::bytes(buffer), [0x5a; PAGE]);
    // A write has nothing to be written but its status.
    disk.write(0, &[buffer]).unwrap();
    assert_eq!(backend.disk.lock().unwrap()[..PAGE], [0x5a; PAGE]);
}

#[test]
fn what_it_scribbles_over_descriptors_is_never_read_back() {
    let backend = Scripted::start(&[Act::Rewrites]);
    let wrapped = wrap(options(&backend.socket));
    driven!(wrapped => frontend, disk);
    for round in 0..20 {
        frontend.write_and_read_back(&mut disk, round);
    }
    assert_eq!(backend.connections(), 1);
}

/// Of who can't be used at all nothing is seen but time.
#[test]
fn whoever_can_not_be_used_is_passed_over() {
    let backend = Scripted::start(&[Act::Babbles, Act::Dies, Act::Babbles, Act::Refuses]);
    let wrapped = wrap(options(&backend.socket));
    driven!(wrapped => frontend, disk);
    for round in 0..3 {
        frontend.write_and_read_back(&mut disk, round);
    }
    assert!(backend.connections() >= 5);
}

/// A queue that is stopped while the back-end is silent does not wait for it for ever, and goes on with all it had begun.
#[test]
fn a_queue_stops_though_the_back_end_is_silent() {
    let backend = Scripted::start(&[Act::Silent]);
    let wrapped = wrap(options(&backend.socket));
    driven!(wrapped => frontend, disk);
    backend.disk.lock().unwrap().fill(0x77);
    let buffers = [frontend.buffer((BUFFERS.0, PAGE))];
    let id = disk.submit(Request::Read { sector: 8, into: &buffers }).unwrap();
    disk.notify().unwrap();
    backend.has_taken(1);
    let transport = disk.device_mut().transport_mut();
    let base = transport.pause(0).unwrap();
    transport.resume(0, base).unwrap();
    assert_eq!(served::completed(&mut disk), Completion { id, result: Ok(Answer::Done) });
    assert_eq!(served::bytes(buffers[0]), [0x77; PAGE]);
    assert_eq!(backend.connections(), 2);
}

/// Nobody waits in a write to a descriptor that the back-end has too.
#[test]
fn a_queue_stops_though_the_back_end_fills_what_it_is_kicked_by() {
    let backend = Scripted::start(&[Act::FillsKick]);
    let wrapped = wrap(options(&backend.socket));
    driven!(wrapped => frontend, disk);
    let buffers = [frontend.buffer((BUFFERS.0, PAGE))];
    disk.read(0, &buffers).unwrap();
    let id = disk.submit(Request::Read { sector: 8, into: &buffers }).unwrap();
    disk.notify().unwrap();
    backend.has_taken(2);
    let transport = disk.device_mut().transport_mut();
    let base = transport.pause(0).unwrap();
    transport.resume(0, base).unwrap();
    assert_eq!(served::completed(&mut disk), Completion { id, result: Ok(Answer::Done) });
    assert_eq!(backend.connections(), 2);
}

/// Whoever is slow to be made acquaintance with keeps the VMM from nothing.
#[test]
fn nobody_waits_for_a_back_end_that_does_not_answer_at_first() {
    let backend = Scripted::start(&[Act::Dies, Act::Deaf]);
    let wrapped = wrap(options(&backend.socket));
    driven!(wrapped => frontend, disk);
    let buffers = [frontend.buffer((BUFFERS.0, PAGE))];
    disk.submit(Request::Read { sector: 8, into: &buffers }).unwrap();
    disk.notify().unwrap();
    while backend.connections() < 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Long enough for the memory table, on which it is stuck.
    std::thread::sleep(Duration::from_millis(300));
    let mut capacity = [0; 8];
    frontend.client.config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), (8 << 20) / 512);
    assert_eq!((backend.connections(), backend.ended()), (2, 1), "it was waited for");
}

/// Notes where everything is mapped.
struct Noting<'a, 'm> {
    inner: &'a Strict<'m>,
    mapped: Mutex<Vec<Mapped>>,
}

impl Mapper for Noting<'_, '_> {
    fn max_len(&self) -> usize {
        self.inner.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        let mapped = self.inner.map(buffer, permission)?;
        self.mapped.lock().unwrap().push(Mapped { ..mapped });
        Ok(mapped)
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        // What the test took away is not there any more.
        if self.inner.domain().lookup(mapped.addr).is_some() {
            self.inner.unmap(mapped, buffer, permission);
        }
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.inner.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.inner.free(mapped);
    }
}

/// While the back-end has a request the driver's memory is the driver's: taking it away waits for nobody, and what the
/// back-end then has to say is lost on that request alone.
#[test]
fn a_silent_back_end_holds_no_fence_and_reaches_nothing_that_was_taken_away() {
    let backend = Scripted::start(&[Act::Silent]);
    let wrapped = wrap(Options { timeout: Some(Duration::from_secs(1)), ..options(&backend.socket) });
    let frontend = Frontend::connect(&wrapped);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let noting = Noting { inner: &strict, mapped: Mutex::default() };
    let mut disk = frontend.start(Driver::New, &noting).unwrap();
    backend.disk.lock().unwrap().fill(0x77);
    let pages = [0, 1, 2, 3].map(|page| [frontend.buffer((BUFFERS.0 + page * PAGE, PAGE))]);
    pages.iter().for_each(|page| page[0].memory().fill(0x5a));
    let ids: Vec<_> = pages.iter().map(|page| disk.submit(Request::Read { sector: 8, into: page }).unwrap()).collect();
    disk.notify().unwrap();
    backend.has_taken(4);
    let second = noting.mapped.lock().unwrap()[1].addr;
    frontend.domain.unmap(second, PAGE as u64).unwrap();
    frontend.client.invalidate(Invalidated::Everything).unwrap();
    assert_eq!(backend.connections(), 1, "the promise came while the back-end was still silent");

    let mut results = HashMap::new();
    while results.len() < ids.len() {
        match disk.poll().unwrap() {
            Some(completion) => {
                results.insert(completion.id, completion.result);
            }
            None => disk.wait().unwrap(),
        }
    }
    for (number, id) in ids.iter().enumerate() {
        let (expected, byte) = if number == 1 { (Err(RequestError::Io), 0x5a) } else { (Ok(Answer::Done), 0x77) };
        assert_eq!(results[id], expected, "request {number}");
        assert_eq!(served::bytes(pages[number][0]), [byte; PAGE], "request {number}");
    }
}

/// Back-ends that do anything at all, by the same numbers each time: every request comes to an end, no byte moves that no
/// request asked for, and the next honest one is served.
#[test]
fn whatever_a_back_end_does_stays_within_its_requests() {
    let acts: Vec<Act> = (1..=12).map(|seed| Act::Wild(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15))).collect();
    let backend = Scripted::start(&acts);
    let wrapped = wrap(Options { timeout: Some(Duration::from_secs(1)), ..options(&backend.socket) });
    driven!(wrapped => frontend, disk);
    let canary = frontend.buffer((BUFFERS.0 + 64 * PAGE, 64 * PAGE));
    canary.memory().fill(0xc5);
    let page = |number: usize| [frontend.buffer((BUFFERS.0 + number * PAGE, PAGE))];
    let pages: Vec<_> = (0..16).map(page).collect();
    let mut ended = 0;
    while backend.connections() <= acts.len() {
        let mut under_way = 0;
        for (number, buffer) in pages.iter().enumerate() {
            let sector = number as u64 * 8;
            let request = match (ended + number) % 3 {
                0 => Request::Write { sector, from: buffer },
                _ => Request::Read { sector, into: buffer },
            };
            disk.submit(request).unwrap();
            under_way += 1;
        }
        disk.notify().unwrap();
        while under_way > 0 {
            match disk.poll().unwrap() {
                // A disk may answer what it likes.
                Some(_) => (under_way, ended) = (under_way - 1, ended + 1),
                None => disk.wait().unwrap(),
            }
        }
    }
    assert!(ended > acts.len(), "{ended} requests");
    let mut bytes = vec![0; 64 * PAGE];
    canary.memory().read(0, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == 0xc5), "bytes that no request asked for");
    frontend.write_and_read_back_at(&mut disk, BUFFERS.0 + (1 << 20), 1);
}
