//! VIRTIO_F_RING_RESET (§2.6.1): a queue is reset while it works, and started anew elsewhere.

use crate::driven::{file_ref, stamp};
use crate::served::*;
use ringfence_dma::{Buffer, BusAddr, Gpa, Permission};
use ringfence_driver::Transport;
use ringfence_driver::blk::{Blk, Options, Request};
use ringfence_driver::mapper::Direct;
use ringfence_driver::pci::common;
use ringfence_hostmem::SharedMemory;
use ringfence_policy::IommuMode;
use ringfence_ring::Layout;
use ringfence_vfio_user::layout::BAR_VIRTIO;
use std::time::Instant;

const RING_RESET: u64 = 1 << 40;
const RING_PACKED: u64 = 1 << 34;

#[test]
fn a_queue_is_reset_while_it_works_and_goes_on_elsewhere() {
    const PAGES: usize = 64;
    let served = Served::disk(IommuMode::Offer);
    let client = served.client();
    let memory = memory();
    client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((file_ref(&memory), 0))).unwrap();
    let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS / 2), Gpa(0)));
    let mut disk = Blk::start(pci(&client).unwrap(), host(&mapper), Options::default()).unwrap();
    let features = disk.device().features();
    assert_ne!(features & RING_RESET, 0, "taken where it is offered");
    assert_ne!(features & RING_PACKED, 0, "what is written by hand below is packed");
    let page = |number: usize| buffer(&memory, number * PAGE as usize, PAGE as usize);
    page(0).memory().write(0, &stamp(9, PAGE as usize));
    disk.write(5, &[page(0)]).unwrap();
    for number in 0..PAGES {
        // Each queue has room for so many only.
        if disk.submit(Request::Read { sector: 5, into: &[page(number)] }).is_err() {
            break;
        }
    }
    disk.notify().unwrap();
    let transport = disk.device_mut().transport_mut();
    transport.reset_queue(0).unwrap();
    // From here on all of it is the driver's again.
    (0..PAGES).for_each(|number| page(number).memory().fill(0xaa));
    let mut enabled = [0xff; 2];
    client.write(BAR_VIRTIO, common::QUEUE_SELECT as u64, &[0, 0]).unwrap();
    client.read(BAR_VIRTIO, common::QUEUE_ENABLE as u64, &mut enabled).unwrap();
    assert_eq!(enabled, [0, 0]);

    for round in 0..3 {
        let ring = Ring::new(&memory, RINGS / 2 + round * 0x4000);
        transport.start_queue(0, &ring.layout()).unwrap();
        ring.read(5, (RINGS + PAGES * PAGE as usize) as u64);
        transport.notify(0).unwrap();
        ring.wait();
        let mut read = vec![0; PAGE as usize];
        memory.slice(RINGS + PAGES * PAGE as usize, PAGE as usize).read(0, &mut read);
        assert_eq!(read, stamp(9, PAGE as usize), "round {round}");
        transport.reset_queue(0).unwrap();
    }
    for number in 0..PAGES {
        let mut seen = vec![0; PAGE as usize];
        page(number).memory().read(0, &mut seen);
        assert!(seen.iter().all(|&byte| byte == 0xaa), "page {number} was written to after the reset");
    }
}

/// A packed ring of 8 by hand, a page for each of its parts, and one for a header and a status.
struct Ring<'m> {
    memory: &'m SharedMemory,
    at: usize,
}

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

impl<'m> Ring<'m> {
    fn new(memory: &'m SharedMemory, at: usize) -> Self {
        memory.slice(at, 0x4000).fill(0);
        Self { memory, at }
    }

    fn layout(&self) -> Layout {
        let [descriptors, driver, device] = [0, 0x1000, 0x2000].map(|part| BusAddr((self.at + part) as u64));
        Layout { size: 8, descriptors, driver, device }
    }

    /// Has a page be read from a sector to an address.
    fn read(&self, sector: u64, into: u64) {
        let header = self.at + 0x3000;
        self.memory.slice(header, 16).write(0, &[[0; 8], sector.to_le_bytes()].concat());
        self.memory.slice(header + 16, 1).fill(0xff);
        let descriptors =
            [(header as u64, 16, NEXT), (into, PAGE as u32, NEXT | WRITE), (header as u64 + 16, 1, WRITE)];
        // The first is made available last.
        for (number, (addr, len, flags)) in descriptors.into_iter().enumerate().rev() {
            let mut bytes = Vec::from(addr.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend(7_u16.to_le_bytes());
            self.memory.slice(self.at + number * 16, 14).write(0, &bytes);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            self.memory.slice(self.at + number * 16 + 14, 2).write(0, &(flags | AVAIL).to_le_bytes());
        }
    }

    /// Waits until it is used, and well.
    fn wait(&self) {
        let since = Instant::now();
        let mut flags = [0; 2];
        while u16::from_le_bytes(flags) & USED == 0 {
            assert!(since.elapsed().as_secs() < 20, "it is not used");
            self.memory.slice(self.at + 14, 2).read(0, &mut flags);
        }
        let mut status = [0xff];
        self.memory.slice(self.at + 0x3010, 1).read(0, &mut status);
        assert_eq!(status, [0]);
    }
}
