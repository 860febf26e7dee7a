//! MSI-X with one vector for everything, with one for each of many queues, and with none.

use crate::driven::file_ref;
use crate::served::*;
use ringfence_dma::{Buffer, BusAddr, Gpa, Permission};
use ringfence_driver::blk::{Blk, Options, Request};
use ringfence_driver::mapper::Direct;
use ringfence_driver::pci::{Interrupts, Pci};
use ringfence_policy::IommuMode;
use ringfence_vfio_user::client::Client;
use ringfence_vfio_user::layout::{BAR_MSIX, BAR_VIRTIO, CONFIG, PENDING};
use ringfence_vfio_user::wire::{Action, IrqData, MAX_FDS, SetIrqs, index};
use rustix::event::{EventfdFlags, eventfd};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::time::Instant;

const QUEUES: u16 = 64;

/// With one for the configuration.
const VECTORS: u32 = QUEUES as u32 + 1;

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

/// Whether it was rung since the last time.
fn took(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_ok()
}

fn wait_for(event: &OwnedFd, what: &str) {
    let since = Instant::now();
    while !took(event) {
        assert!(since.elapsed().as_secs() < 20, "no interrupt for {what}");
    }
}

/// Eventfds for all vectors, so many with one message.
fn wire(client: &Client, vectors: u32, at_once: usize) -> Vec<OwnedFd> {
    let events: Vec<_> = (0..vectors).map(|_| event()).collect();
    for (number, some) in events.chunks(at_once).enumerate() {
        let (start, count) = ((number * at_once) as u32, some.len() as u32);
        let data = IrqData::EventFds(some.iter().map(|event| event.try_clone().unwrap()).collect());
        client.set_irqs(SetIrqs { index: index::MSIX, start, count, action: Action::Trigger, data }).unwrap();
    }
    events
}

#[test]
fn each_of_many_vectors_is_its_own() {
    let served = Served::disk_with(QUEUES, IommuMode::Offer);
    let client = served.client();
    // More than the server says it takes: not every client asks.
    let events = wire(&client, VECTORS, VECTORS as usize);
    for vector in 0..VECTORS {
        let data = IrqData::None;
        let irqs = SetIrqs { index: index::MSIX, start: vector, count: 1, action: Action::Trigger, data };
        client.set_irqs(irqs).unwrap();
        let rung: Vec<_> = (0..VECTORS).filter(|&other| took(&events[other as usize])).collect();
        assert_eq!(rung, [vector]);
    }
}

#[test]
fn every_queue_tells_by_its_vector_and_all_by_one() {
    for (all_by_one, most) in [(false, None), (true, None), (true, NonZeroU16::new(1))] {
        let served = Served::disk_with_vectors(QUEUES, most);
        let client = served.client();
        let vectors = most.map_or(VECTORS, |most| most.get().into());
        let control = (vectors - 1).to_le_bytes();
        assert_eq!(control[..2], msix_control(&client), "the capability says how many there are");
        let events = wire(&client, vectors, MAX_FDS);
        let beyond = SetIrqs {
            index: index::MSIX,
            start: vectors,
            count: 1,
            action: Action::Trigger,
            data: IrqData::EventFds(vec![event()]),
        };
        assert!(client.set_irqs(beyond).is_err());
        let memory = memory();
        client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((file_ref(&memory), 0))).unwrap();
        let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
        let of = |queue: u16| if all_by_one { 0 } else { QUEUES - queue };
        let interrupts = Interrupts::Vectors { config: Some(0), queues: (0..QUEUES).map(of).collect() };
        let transport: Pci<_, _> = pci(&client).unwrap().with_interrupts(interrupts);
        let options = Options { depth: 8, segments: 1 };
        let mut disk = Blk::start_queues(transport, host(&mapper), options, QUEUES).unwrap();
        let (_, queues) = disk.split();
        for (number, queue) in queues.into_iter().enumerate() {
            let data = buffer(&memory, number * PAGE as usize, PAGE as usize);
            // Else it looks by itself, and wants to be told nothing.
            queue.listen().unwrap();
            queue.submit(Request::Read { sector: 0, into: &[data] }).unwrap();
            queue.publish().unwrap();
            ring(&client, number);
            let vector = usize::from(of(number as u16));
            // Not when it begins, or for another: a driver that is told looks once.
            wait_for(&events[vector], "a queue");
            assert!(queue.poll().unwrap().is_some(), "queue {number}: it is told when it is used");
            let others = events.iter().enumerate().filter(|&(other, event)| other != vector && took(event));
            assert_eq!(others.count(), 0, "queue {number}: nobody else is told");
        }
    }
}

#[test]
fn what_is_used_while_it_is_masked_is_told_once_it_is_not() {
    let served = Served::disk(IommuMode::Offer);
    let (client, memory) = (served.client(), memory());
    client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((file_ref(&memory), 0))).unwrap();
    let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
    let line = event();
    client.set_vector(1, line.try_clone().unwrap()).unwrap();
    let interrupts = Interrupts::Vectors { config: None, queues: vec![1] };
    let transport: Pci<_, _> = pci(&client).unwrap().with_interrupts(interrupts);
    let mut disk = Blk::start_queues(transport, host(&mapper), Options { depth: 8, segments: 1 }, 1).unwrap();
    let (_, queues) = disk.split();
    let queue = queues.into_iter().next().unwrap();
    let mut read = || {
        queue.listen().unwrap();
        queue.submit(Request::Read { sector: 0, into: &[buffer(&memory, 0, PAGE as usize)] }).unwrap();
        queue.publish().unwrap();
        ring(&client, 0);
        let since = Instant::now();
        while queue.poll().unwrap().is_none() {
            assert!(since.elapsed().as_secs() < 20);
        }
    };
    let pending = || {
        let mut bits = [0; 8];
        client.read(BAR_MSIX, PENDING, &mut bits).unwrap();
        u64::from_le_bytes(bits)
    };
    let by_message = |masked: bool| {
        let action = if masked { Action::Mask } else { Action::Unmask };
        client.set_irqs(SetIrqs { index: index::MSIX, start: 1, count: 1, action, data: IrqData::None }).unwrap();
    };
    // Its entry's control in the table.
    let by_entry = |masked: bool| client.write(BAR_MSIX, 16 + 12, &[u8::from(masked), 0, 0, 0]).unwrap();
    for mask in [&by_message as &dyn Fn(bool), &by_entry] {
        for _ in 0..20 {
            read();
            wait_for(&line, "a request");
            mask(true);
            assert_eq!(pending(), 0, "nothing happened meanwhile");
            mask(false);
            assert!(!took(&line), "nothing happened meanwhile");
            mask(true);
            read();
            let since = Instant::now();
            while pending() == 0 {
                assert!(since.elapsed().as_secs() < 20, "a masked interrupt is not pending");
            }
            assert!(!took(&line), "masked");
            mask(false);
            assert!(took(&line), "what was pending is raised by the write that unmasks it");
            assert_eq!(pending(), 0);
        }
    }
}

/// What the capability's control says.
fn msix_control(client: &Client) -> [u8; 2] {
    let byte = |at: u64| {
        let mut byte = [0];
        client.read(CONFIG, at, &mut byte).unwrap();
        byte[0]
    };
    let mut at = byte(0x34).into();
    while byte(at) != 0x11 {
        at = byte(at + 1).into();
        assert_ne!(at, 0, "MSI-X");
    }
    [byte(at + 2), byte(at + 3)]
}

/// Rings a queue by its register.
fn ring(client: &Client, queue: usize) {
    use ringfence_vfio_user::layout::{NOTIFY, NOTIFY_MULTIPLIER};
    let offset = NOTIFY.start + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
    client.write(BAR_VIRTIO, offset, &(queue as u16).to_le_bytes()).unwrap();
}

#[test]
fn no_line_is_wired() {
    let served = Served::disk(IommuMode::Offer);
    let client = served.client();
    let mut pin = [0xff];
    client.read(ringfence_vfio_user::layout::CONFIG, 0x3d, &mut pin).unwrap();
    assert_eq!(pin, [0], "the interrupt pin");
    let data = IrqData::EventFds(vec![event()]);
    let line = SetIrqs { index: index::INTX, start: 0, count: 1, action: Action::Trigger, data };
    assert!(client.set_irqs(line).is_err());
}
