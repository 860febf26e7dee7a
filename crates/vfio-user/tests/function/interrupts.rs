//! MSI-X with one vector for everything, with one for each of many queues, and with none.

use crate::driven::file_ref;
use crate::served::*;
use ringfence_dma::{Buffer, BusAddr, Gpa, Permission};
use ringfence_driver::blk::{Blk, Options, Request};
use ringfence_driver::mapper::Direct;
use ringfence_driver::pci::{Interrupts, Pci};
use ringfence_policy::IommuMode;
use ringfence_vfio_user::client::Client;
use ringfence_vfio_user::layout::BAR_VIRTIO;
use ringfence_vfio_user::wire::{Action, IrqData, SetIrqs, index};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::time::Instant;

const QUEUES: u16 = 64;

/// With one for the configuration.
const VECTORS: u32 = QUEUES as u32 + 1;

/// As many as one message may have.
const AT_ONCE: usize = 16;

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

/// Eventfds for all vectors, handed over as a VMM does.
fn wire(client: &Client) -> Vec<OwnedFd> {
    let events: Vec<_> = (0..VECTORS).map(|_| event()).collect();
    for (number, some) in events.chunks(AT_ONCE).enumerate() {
        let (start, count) = ((number * AT_ONCE) as u32, some.len() as u32);
        let data = IrqData::EventFds(some.iter().map(|event| event.try_clone().unwrap()).collect());
        client.set_irqs(SetIrqs { index: index::MSIX, start, count, action: Action::Trigger, data }).unwrap();
    }
    events
}

#[test]
fn each_of_many_vectors_is_its_own() {
    let served = Served::disk_with(QUEUES, IommuMode::Offer);
    let client = served.client();
    let events = wire(&client);
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
    for all_by_one in [false, true] {
        let served = Served::disk_with(QUEUES, IommuMode::Offer);
        let client = served.client();
        let events = wire(&client);
        let memory = memory();
        client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((file_ref(&memory), 0))).unwrap();
        let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
        let of = |queue: u16| if all_by_one { 0 } else { QUEUES - queue };
        let interrupts = Interrupts::Vectors { config: Some(0), queues: (0..QUEUES).map(of).collect() };
        let transport: Pci<_, _> = pci(&client).unwrap().with_interrupts(interrupts);
        let options = Options { depth: 8, segments: 1 };
        let mut disk = Blk::start_queues(transport, host(&mapper), options, QUEUES).unwrap();
        let (_, queues) = disk.split();
        // A queue that begins tells once of what may have been used before, when its thread comes to it.
        if !all_by_one {
            events[1..].iter().for_each(|event| wait_for(event, "a queue that begins"));
        }
        for (number, queue) in queues.into_iter().enumerate() {
            let data = buffer(&memory, number * PAGE as usize, PAGE as usize);
            // Else it looks by itself, and wants to be told nothing.
            queue.listen().unwrap();
            queue.submit(Request::Read { sector: 0, into: &[data] }).unwrap();
            queue.publish().unwrap();
            ring(&client, number);
            let vector = usize::from(of(number as u16));
            loop {
                wait_for(&events[vector], "a queue");
                if queue.poll().unwrap().is_some() {
                    break;
                }
                assert!(all_by_one, "queue {number}: it is told when it is used");
            }
            let others = events.iter().enumerate().filter(|&(other, event)| other != vector && took(event));
            assert_eq!(others.count(), 0, "queue {number}: nobody else is told");
        }
    }
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
