//! Clients that do what they should not. Nobody asks what comes of it, but that the next one is served.

use crate::served::*;
use proptest::prelude::*;
use ringfence_dma::{BusAddr, Permission};
use ringfence_policy::IommuMode;
use ringfence_vfio_user::client::ClientError;
use ringfence_vfio_user::layout::{BAR_MSIX, BAR_VIRTIO, CONFIG};
use ringfence_vfio_user::wire::{Action, IrqData, SetIrqs};
use rustix::fs::ftruncate;
use std::io::Write;
use std::os::fd::AsFd;

/// Where something happens, more often than elsewhere.
fn place() -> impl Strategy<Value = (u32, u64)> {
    prop_oneof![
        4 => (0..0x40_u64).prop_map(|at| (BAR_VIRTIO, at)),
        1 => (0..0x8000_u64).prop_map(|at| (BAR_VIRTIO, at)),
        1 => (0..0x10000_u64).prop_map(|at| (BAR_MSIX, at)),
        2 => (0..0x100_u64).prop_map(|at| (CONFIG, at)),
    ]
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    let small = prop_oneof![Just(0_u8), Just(1), Just(4), Just(15), Just(0xff), any::<u8>()];
    prop_oneof![proptest::collection::vec(small.clone(), 1..9), proptest::collection::vec(small, 1..200)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn registers_may_be_written_in_any_order_and_width(
        writes in proptest::collection::vec((place(), data()), 1..200),
        granted: bool,
    ) {
        let served = Served::disk(IommuMode::Offer);
        let (client, memory) = (served.client(), memory());
        if granted {
            client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((memory.as_fd(), 0))).unwrap();
        }
        // As a driver would, so that queues can come to run.
        let set = |at: u64, data: &[u8]| client.write(BAR_VIRTIO, at, data).unwrap();
        set(0x14, &[3]);
        set(0x08, &[1, 0, 0, 0]);
        set(0x0c, &[3, 1, 0, 0]);
        set(0x14, &[11]);
        set(0x1c, &[1, 0]);
        set(0x14, &[15]);
        for ((region, at), data) in writes {
            match client.write(region, at, &data) {
                Ok(()) | Err(ClientError::Refused { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            let mut back = vec![0; data.len()];
            let _ = client.read(region, at, &mut back);
        }
        client.reset().unwrap();
        let mut status = [0xff];
        client.read(BAR_VIRTIO, 0x14, &mut status).unwrap();
        prop_assert_eq!(status[0], 0);
    }

    #[test]
    fn a_stream_may_hold_anything(
        version: bool,
        mut bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        commands in proptest::collection::vec((0..20_u16, 0..80_u32), 0..20),
    ) {
        let served = Served::disk(IommuMode::Offer);
        let mut stream = served.stream();
        if version {
            let hello = [1, 0, 1, 0, 23, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b'{', b'}', 0];
            let _ = stream.write_all(&hello);
        }
        for (command, len) in commands {
            let body: Vec<u8> = bytes.drain(..bytes.len().min(len as usize)).collect();
            let mut head = [0; 16];
            head[2..4].copy_from_slice(&command.to_ne_bytes());
            head[4..8].copy_from_slice(&(16 + body.len() as u32).to_ne_bytes());
            let _ = stream.write_all(&[&head[..], &body].concat());
        }
        let _ = stream.write_all(&bytes);
        drop(stream);
        served.client();
    }
}

#[test]
fn interrupts_that_there_are_not_are_refused() {
    let served = Served::disk(IommuMode::Offer);
    let client = served.client();
    let event = || rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let set = |index, start, count, action, data| client.set_irqs(SetIrqs { index, start, count, action, data });
    use Action::*;
    set(2, 0, 3, Trigger, IrqData::EventFds(vec![event(), event(), event()])).unwrap();
    set(2, 1, 1, Trigger, IrqData::EventFds(vec![])).unwrap();
    set(2, 0, 3, Mask, IrqData::None).unwrap();
    set(2, 0, 3, Unmask, IrqData::Bools(vec![true, false, true])).unwrap();
    set(2, 0, 3, Trigger, IrqData::None).unwrap();
    // Other types have no interrupts, and those of this one are not theirs to turn off.
    let vector = event();
    client.set_vector(2, vector.try_clone().unwrap()).unwrap();
    (0..5).filter(|&other| other != 2).for_each(|other| set(other, 0, 0, Trigger, IrqData::None).unwrap());
    set(2, 2, 1, Trigger, IrqData::None).unwrap();
    rustix::io::read(&vector, &mut [0; 8]).unwrap();
    set(2, 0, 0, Trigger, IrqData::None).unwrap();
    // Without an eventfd that is nothing, also for the next one.
    set(2, 2, 1, Trigger, IrqData::None).unwrap();
    rustix::fs::fcntl_setfl(&vector, rustix::fs::OFlags::NONBLOCK).unwrap();
    client.set_vector(2, vector.try_clone().unwrap()).unwrap();
    assert!(rustix::io::read(&vector, &mut [0; 8]).is_err());
    for refused in [
        set(2, 3, 1, Trigger, IrqData::None),
        set(2, 0, 4, Mask, IrqData::None),
        set(2, u32::MAX, 1, Mask, IrqData::None),
        set(2, 0, 2, Trigger, IrqData::EventFds(vec![event()])),
        // Of none: all of them are turned off, and nothing else is done.
        set(2, 1, 0, Trigger, IrqData::None),
        set(2, 0, 0, Mask, IrqData::None),
        set(2, 0, 0, Trigger, IrqData::Bools(vec![])),
        set(2, 0, 0, Trigger, IrqData::EventFds(vec![])),
        // One bool too many, or too few.
        set(2, 0, 2, Trigger, IrqData::Bools(vec![true; 3])),
        set(2, 0, 2, Trigger, IrqData::Bools(vec![true; 1])),
        set(0, 0, 1, Trigger, IrqData::EventFds(vec![event()])),
        set(5, 0, 0, Trigger, IrqData::None),
        set(2, 0, 1, Mask, IrqData::EventFds(vec![event()])),
    ] {
        assert!(matches!(refused, Err(ClientError::Refused { .. })), "{refused:?}");
    }
}

/// The ring is in a file that is cut short while the queue looks at it.
#[test]
fn memory_that_goes_ends_the_connection_and_not_the_process() {
    let served = Served::disk(IommuMode::Offer);
    {
        let client = served.client();
        let memory = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, MEMORY as u64).unwrap();
        client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((memory.as_fd(), 0))).unwrap();
        let set = |at: u64, data: &[u8]| client.write(BAR_VIRTIO, at, data);
        set(0x14, &[3]).unwrap();
        set(0x08, &[1, 0, 0, 0]).unwrap();
        set(0x0c, &[3, 0, 0, 0]).unwrap();
        set(0x14, &[11]).unwrap();
        for (at, page) in [(0x20, 1_u64), (0x28, 2), (0x30, 3)] {
            set(at, &(page << 12).to_le_bytes()).unwrap();
        }
        set(0x1c, &[1, 0]).unwrap();
        ftruncate(&memory, 0).unwrap();
        let since = std::time::Instant::now();
        let mut gone = set(0x14, &[15]).and_then(|()| set(0x3000, &[0, 0]));
        while gone.is_ok() {
            assert!(since.elapsed().as_secs() < 20, "nobody noticed");
            gone = set(0x3000, &[0, 0]);
        }
    }
    served.client();
}

#[test]
fn a_client_that_does_not_read_is_left() {
    let served = Served::disk(IommuMode::Offer);
    let mut stream = served.stream();
    stream.set_nonblocking(true).unwrap();
    let hello = [1, 0, 1, 0, 23, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b'{', b'}', 0];
    stream.write_all(&hello).unwrap();
    // Each asks for much more than it has.
    let mut read = [0; 32];
    read[2..8].copy_from_slice(&[9, 0, 32, 0, 0, 0]);
    read[24..32].copy_from_slice(&[7, 0, 0, 0, 0, 16, 0, 0]);
    while stream.write_all(&read).is_ok() {}
    drop(stream);
    served.client();
}
