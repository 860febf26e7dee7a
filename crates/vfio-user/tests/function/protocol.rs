//! The protocol by hand: what is answered, with what, and when not at all.

use crate::served::*;
use ringfence_policy::IommuMode;
use ringfence_vfio_user::layout::{BAR_MSIX, BAR_MSIX_LEN, BAR_VIRTIO, BAR_VIRTIO_LEN, CONFIG, CONFIG_LEN};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// One message as it travels: id, command, flags, payload.
fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(id.to_ne_bytes());
    bytes.extend(command.to_ne_bytes());
    bytes.extend((16 + body.len() as u32).to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Id, command, flags, errno, payload.
fn answer(stream: &mut UnixStream) -> (u16, u16, u32, u32, Vec<u8>) {
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
    let half = |at: usize| u16::from_ne_bytes(head[at..at + 2].try_into().unwrap());
    let mut body = vec![0; word(4) as usize - 16];
    stream.read_exact(&mut body).unwrap();
    (half(0), half(2), word(8), word(12), body)
}

fn ask(stream: &mut UnixStream, command: u16, body: &[u8]) -> Result<Vec<u8>, u32> {
    stream.write_all(&message(0x1234, command, 0, body)).unwrap();
    let (id, came, flags, errno, body) = answer(stream);
    assert_eq!((id, came), (0x1234, command));
    match flags {
        1 => Ok(body),
        0x21 => {
            assert!(body.is_empty(), "an error has no payload");
            Err(errno)
        }
        other => panic!("flags {other:#x}"),
    }
}

fn version(json: &str) -> Vec<u8> {
    [&[0, 0, 1, 0], json.as_bytes(), &[0]].concat()
}

fn negotiated(served: &Served) -> UnixStream {
    let mut stream = served.stream();
    ask(&mut stream, 1, &version("{}")).unwrap();
    stream
}

const EINVAL: u32 = 22;

#[test]
fn a_version_is_negotiated_once_and_first() {
    let served = Served::disk(IommuMode::Offer);
    let mut stream = served.stream();
    let asked = r#"{"capabilities":{"max_msg_fds":8,"migration":{"pgsize":4096},"pgsizes":4096,"new":[1]}}"#;
    let body = ask(&mut stream, 1, &version(asked)).unwrap();
    let json = std::str::from_utf8(&body[4..body.len() - 1]).unwrap();
    assert_eq!((&body[..4], body.last()), (&[0, 0, 1, 0][..], Some(&0)));
    assert_eq!(json, r#"{"capabilities":{"max_msg_fds":16,"pgsizes":4096}}"#, "what was named, and nothing else");
    assert_eq!(ask(&mut stream, 1, &version("{}")), Err(EINVAL));
    ask(&mut stream, 4, &words(&[16, 0, 0, 0])).unwrap();
    drop(stream);

    let mut stream = served.stream();
    assert_eq!(ask(&mut stream, 1, &[0, 0, 0, 0]).unwrap()[..4], [0; 4], "no data, and a lower minor version");
    drop(stream);

    for (command, body) in [(4, words(&[16, 0, 0, 0])), (1, vec![1, 0, 0, 0])] {
        let mut stream = served.stream();
        assert_eq!(ask(&mut stream, command, &body), Err(EINVAL));
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "closed");
    }
    for bad in ["", "[", "{\"capabilities\":7}", "{\"capabilities\":{\"max_msg_fds\":\"8\"}}", &"[".repeat(5000)] {
        let mut stream = served.stream();
        assert_eq!(ask(&mut stream, 1, &version(bad)), Err(EINVAL), "{bad}");
    }
}

#[test]
fn the_device_its_regions_and_its_interrupts_are_described() {
    let served = Served::disk(IommuMode::Offer);
    let mut stream = negotiated(&served);
    assert_eq!(ask(&mut stream, 4, &words(&[16, 0, 0, 0])).unwrap(), words(&[16, 3, 9, 5]));
    assert_eq!(ask(&mut stream, 4, &words(&[15, 0, 0, 0])), Err(EINVAL));
    for index in 0..9 {
        let size = match index {
            BAR_VIRTIO => BAR_VIRTIO_LEN,
            BAR_MSIX => BAR_MSIX_LEN,
            CONFIG => CONFIG_LEN,
            _ => 0,
        };
        let flags = if size == 0 { 0 } else { 3 };
        // There is room for more, and 32 bytes are what it takes.
        let body = ask(&mut stream, 5, &words(&[64, 0, index, 0, 0, 0, 0, 0])).unwrap();
        assert_eq!(body, words(&[32, flags, index, 0, size as u32, 0, 0, 0]));
    }
    assert_eq!(ask(&mut stream, 5, &words(&[32, 0, 9, 0, 0, 0, 0, 0])), Err(EINVAL));
    for (index, flags, count) in [(0, 1, 0), (1, 1, 0), (2, 3, 3), (3, 1, 0), (4, 1, 0)] {
        assert_eq!(ask(&mut stream, 7, &words(&[16, 0, index, 0])).unwrap(), words(&[16, flags, index, count]));
    }
    assert_eq!(ask(&mut stream, 7, &words(&[16, 0, 5, 0])), Err(EINVAL));
    // Doorbells: with little room, how much it takes; a client that takes one descriptor gets one.
    assert_eq!(ask(&mut stream, 6, &words(&[16, 0, 0, 0])).unwrap(), words(&[56, 0, 0, 1]));
    let body = ask(&mut stream, 6, &words(&[56, 0, 0, 0])).unwrap();
    assert_eq!(body[..40], words(&[56, 0, 0, 1, 0x3000, 0, 2, 0, 0, 0])[..]);
    assert_eq!(ask(&mut stream, 6, &words(&[56, 0, 2, 0])).unwrap(), words(&[16, 0, 2, 0]));
    assert_eq!(ask(&mut stream, 6, &words(&[56, 1, 0, 0])), Err(EINVAL));
    assert_eq!(ask(&mut stream, 6, &words(&[56, 0, 0, 1])), Err(EINVAL));
}

#[test]
fn what_is_unknown_or_too_much_is_refused_and_the_connection_goes_on() {
    let served = Served::disk(IommuMode::Offer);
    let mut stream = negotiated(&served);
    for command in [0, 11, 12, 14, 16, 17, 18, 19, 99, u16::MAX] {
        assert_eq!(ask(&mut stream, command, &[0; 64]), Err(EINVAL), "{command}");
    }
    let access = |offset: u64, region: u32, count: u32| {
        [&offset.to_ne_bytes()[..], &region.to_ne_bytes(), &count.to_ne_bytes()].concat()
    };
    for (offset, region, count) in
        [(CONFIG_LEN, CONFIG, 1), (CONFIG_LEN - 3, CONFIG, 4), (u64::MAX, 0, 2), (0, 1, 1), (0, 9, 1), (0, 0, 1 << 21)]
    {
        assert_eq!(ask(&mut stream, 9, &access(offset, region, count)), Err(EINVAL), "{offset:#x} {region} {count}");
    }
    let body = ask(&mut stream, 9, &access(0, CONFIG, 4)).unwrap();
    assert_eq!(body, [access(0, CONFIG, 4), vec![0xf4, 0x1a, 0x42, 0x10]].concat());
    assert_eq!(ask(&mut stream, 9, &access(0, CONFIG, 0)).unwrap(), access(0, CONFIG, 0));
    assert_eq!(ask(&mut stream, 10, &access(0, CONFIG, 4)), Err(EINVAL), "no data");
    let written = ask(&mut stream, 10, &[access(4, CONFIG, 2), vec![6, 0]].concat()).unwrap();
    assert_eq!(written, access(4, CONFIG, 2));
    for short in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15] {
        assert_eq!(ask(&mut stream, short, &[0; 3]), Err(EINVAL), "{short}");
    }
    // Writes in one message, the last of them out of bounds.
    let write = |offset: u64, count: u32| [access(offset, CONFIG, count), vec![7; 8]].concat();
    let multi = |writes: &[Vec<u8>]| [&(writes.len() as u64).to_ne_bytes()[..], &writes.concat()].concat();
    assert_eq!(ask(&mut stream, 15, &multi(&[write(0x3c, 1), write(4, 2)])).unwrap(), 2_u64.to_ne_bytes());
    assert_eq!(ask(&mut stream, 15, &multi(&[write(0x3c, 1), write(0, 9)])), Err(EINVAL));
    assert_eq!(ask(&mut stream, 15, &multi(&[write(4096, 1)])), Err(EINVAL));
    assert_eq!(ask(&mut stream, 15, &[0xff; 8]), Err(EINVAL));
}

#[test]
fn no_reply_means_none_and_ids_are_the_senders() {
    let served = Served::disk(IommuMode::Offer);
    let mut stream = negotiated(&served);
    let info = words(&[16, 0, 0, 0]);
    let mut batch = Vec::new();
    // Refused, unknown and fine; none of them is answered.
    batch.extend(message(1, 9, 0x10, &[0xff; 16]));
    batch.extend(message(2, 77, 0x10, &[]));
    batch.extend(message(3, 4, 0x10, &info));
    // The same id twice, and all of it at once.
    batch.extend(message(7, 4, 0, &info));
    batch.extend(message(7, 99, 0, &info));
    // A reply that nobody waits for.
    batch.extend(message(9, 11, 1, &info));
    batch.extend(message(8, 13, 0, &[]));
    stream.write_all(&batch).unwrap();
    assert_eq!(answer(&mut stream), (7, 4, 1, 0, words(&[16, 3, 9, 5])));
    assert_eq!(answer(&mut stream), (7, 99, 0x21, EINVAL, vec![]));
    assert_eq!(answer(&mut stream), (8, 13, 1, 0, vec![]));
}

#[test]
fn a_client_that_is_left_with_more_to_say_finds_the_end_and_no_error() {
    let served = Served::disk(IommuMode::Offer);
    let mut stream = negotiated(&served);
    // No message has this length, so the rest is not read any more.
    let mut lost = vec![0; 100_000];
    lost[..8].copy_from_slice(&[1, 0, 9, 0, 3, 0, 0, 0]);
    // It may be over before all is written.
    let _ = stream.write_all(&lost);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("an end, and no reset");
}

#[test]
fn a_stream_that_is_lost_is_told_so_and_closed_and_the_next_client_served() {
    let served = Served::disk(IommuMode::Offer);
    let mut long = message(1, 9, 0, &[]);
    long[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let mut short = message(1, 9, 0, &[]);
    short[4..8].copy_from_slice(&15_u32.to_ne_bytes());
    for lost in [long, short, message(1, 9, 7, &[])] {
        let mut stream = negotiated(&served);
        stream.write_all(&lost).unwrap();
        assert_eq!(answer(&mut stream), (1, 9, 0x21, EINVAL, vec![]));
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "closed");
    }
    for garbage in [vec![0xff; 64], vec![0; 5]] {
        let mut stream = served.stream();
        stream.write_all(&garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
    negotiated(&served);
}

/// The kernel holds a few hundred answers for whoever does not read; the rest is kept.
#[test]
fn a_client_may_ask_much_before_it_reads() {
    let served = Served::disk(IommuMode::Offer);
    let mut stream = negotiated(&served);
    const MANY: u16 = 20_000;
    for id in 0..MANY {
        stream.write_all(&message(id, 9, 0, &[&[0; 8][..], &[7, 0, 0, 0, 4, 0, 0, 0]].concat())).unwrap();
    }
    for id in 0..MANY {
        let (came, command, flags, _, body) = answer(&mut stream);
        assert_eq!((came, command, flags, body.len()), (id, 9, 1, 20));
    }
    ask(&mut stream, 4, &words(&[16, 0, 0, 0])).unwrap();
}

#[test]
fn a_client_that_takes_no_descriptors_gets_none() {
    let served = Served::disk(IommuMode::Offer);
    for (max, twin) in [(0, false), (1, true)] {
        let mut stream = served.stream();
        let asked = format!(r#"{{"capabilities":{{"max_msg_fds":{max},"twin_socket":{{"supported":true}}}}}}"#);
        let body = ask(&mut stream, 1, &version(&asked)).unwrap();
        assert_eq!(body.windows(4).any(|part| part == b"twin"), twin, "{max}");
        let bells = ask(&mut stream, 6, &words(&[4096, 0, 0, 0])).unwrap();
        assert_eq!(bells.len(), 16 + 40 * usize::from(twin));
    }
}

#[test]
fn who_has_said_all_still_reads_every_answer() {
    let served = Served::disk(IommuMode::Offer);
    let mut stream = negotiated(&served);
    let question = words(&[32, 0, 0, 0, 0, 0, 0, 0]);
    // More answers than the socket holds, so that some are kept.
    const MANY: u16 = 3000;
    for id in 0..MANY {
        stream.write_all(&message(id, 5, 0, &question)).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    for id in 0..MANY {
        assert_eq!(answer(&mut stream).0, id);
    }
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}
