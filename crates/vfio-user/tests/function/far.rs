//! Memory without a file, reached by messages: beside the answers, and on a socket of its own.

use crate::served::*;
use ringfence_dma::{BusAddr, Permission};
use ringfence_driver::blk::{Blk, Options};
use ringfence_hostmem::SharedMemory;
use ringfence_policy::IommuMode;
use ringfence_vfio_user::client::{Client, Far};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The machine's memory, at the bus address where it is. Counts what is asked.
struct Messages {
    memory: Arc<SharedMemory>,
    asked: Arc<AtomicU64>,
}

impl Far for Messages {
    fn read(&self, addr: BusAddr, into: &mut [u8]) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.memory.slice(addr.0 as usize, into.len()).read(0, into);
        true
    }

    fn write(&self, addr: BusAddr, from: &[u8]) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.memory.slice(addr.0 as usize, from.len()).write(0, from);
        true
    }
}

#[test]
fn a_disk_works_without_a_file_of_memory() {
    for twin in [false, true] {
        let served = Served::disk(IommuMode::Offer);
        let memory = Arc::new(memory());
        let asked = Arc::<AtomicU64>::default();
        let far = Messages { memory: Arc::clone(&memory), asked: Arc::clone(&asked) };
        let client: Client = served.client_with(twin, Some(Box::new(far)));
        assert_eq!(client.server().twin_socket.is_some(), twin);
        client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, None).unwrap();
        let rings = ringfence_dma::Buffer::new(memory.slice(0, RINGS), ringfence_dma::Gpa(0));
        // Granted once and for all, where it is.
        let mapper = ringfence_driver::mapper::Direct::new(rings);
        let mut disk = Blk::start(pci(&client).unwrap(), host(&mapper), Options::default()).unwrap();
        let (from, into) = (buffer(&memory, 0, 16 << 10), buffer(&memory, 1 << 20, 16 << 10));
        let stamp: Vec<u8> = (0..from.len()).map(|at| (at / 7) as u8).collect();
        from.memory().write(0, &stamp);
        for sector in [0, 100, 1000] {
            disk.write(sector, &[from]).unwrap();
            // It differs here and there from what is there already.
            let near: Vec<u8> = stamp.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at % 40 == 3)).collect();
            into.memory().write(0, &near);
            let before = asked.load(Ordering::Relaxed);
            disk.read(sector, &[into]).unwrap();
            let messages = asked.load(Ordering::Relaxed) - before;
            assert!(messages < 100, "{messages} messages for one request, twin {twin}");
            let mut seen = vec![0; into.len()];
            into.memory().read(0, &mut seen);
            assert!(seen == stamp, "at {sector}, twin {twin}");
        }
        assert!(asked.load(Ordering::Relaxed) > 20);
    }
}

/// A driver sees what is used at once, in a ring that is mapped; what was read has another way to it.
#[test]
fn what_is_read_by_messages_is_there_before_it_is_used() {
    for twin in [false, true] {
        let served = Served::disk(IommuMode::Offer);
        let memory = Arc::new(memory());
        let far = Messages { memory: Arc::clone(&memory), asked: Arc::default() };
        let client: Client = served.client_with(twin, Some(Box::new(far)));
        let near = Some((crate::driven::file_ref(&memory), 0));
        client.map(BusAddr(0), RINGS as u64, Permission::ReadWrite, near).unwrap();
        client.map(BusAddr(RINGS as u64), (MEMORY - RINGS) as u64, Permission::ReadWrite, None).unwrap();
        let mapper = ringfence_driver::mapper::Direct::new(ringfence_dma::Buffer::new(
            memory.slice(0, RINGS),
            ringfence_dma::Gpa(0),
        ));
        let mut disk = Blk::start(pci(&client).unwrap(), host(&mapper), Options::default()).unwrap();
        let (from, into) = (buffer(&memory, 0, 4096), buffer(&memory, 1 << 20, 4096));
        for round in 0..200 {
            from.memory().fill(round as u8);
            disk.write(round * 8, &[from]).unwrap();
            into.memory().fill(!(round as u8));
            disk.read(round * 8, &[into]).unwrap();
            let mut seen = vec![0; into.len()];
            into.memory().read(0, &mut seen);
            assert!(seen.iter().all(|&byte| byte == round as u8), "round {round}, twin {twin}");
        }
    }
}
