//! What is granted, what is not, and that DMA_UNMAP is answered when no byte moves any more.

use crate::served::*;
use ringfence_dma::{Buffer, BusAddr, Gpa, Permission};
use ringfence_driver::blk::{Blk, Options, Request};
use ringfence_driver::mapper::Direct;
use ringfence_hostmem::SharedMemory;
use ringfence_policy::IommuMode;
use ringfence_vfio_user::MAX_MAPS;
use ringfence_vfio_user::client::{Client, ClientError};
use ringfence_vfio_user::wire::{Answer, DmaMap, DmaUnmap, Request as Message};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

const A: BusAddr = BusAddr(0x10_0000_0000);

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Errno {
    match result {
        Err(ClientError::Refused { errno, .. }) => Errno::from_raw_os_error(errno as i32),
        other => panic!("not refused: {other:?}"),
    }
}

fn grant(client: &Client, memory: &SharedMemory, first: BusAddr, len: u64) -> Result<(), ClientError> {
    client.map(first, len, Permission::ReadWrite, Some((memory.as_fd(), 0)))
}

#[test]
fn grants_are_disjoint_and_taken_back_as_they_were_made() {
    let served = Served::disk(IommuMode::Offer);
    let (client, memory) = (served.client(), memory());
    let at = |pages: u64| BusAddr(A.0 + pages * PAGE);
    grant(&client, &memory, A, 16 * PAGE).unwrap();
    for (first, pages) in [(A, 16), (at(15), 2), (BusAddr(A.0 - PAGE), 2), (at(3), 1), (BusAddr(A.0 - PAGE), 100)] {
        assert_eq!(refused(grant(&client, &memory, first, pages * PAGE)), Errno::EXIST, "{first}");
    }
    grant(&client, &memory, at(16), PAGE).unwrap();
    assert_eq!(refused(client.unmap(at(40), PAGE)), Errno::NOENT, "never mapped");
    assert_eq!(refused(client.unmap(A, 15 * PAGE)), Errno::NOENT, "a part");
    assert_eq!(refused(client.unmap(at(1), 15 * PAGE)), Errno::NOENT, "a part");
    assert_eq!(refused(client.unmap(at(1), PAGE)), Errno::NOENT, "a part");
    client.unmap(A, 17 * PAGE).unwrap();
    assert_eq!(refused(client.unmap(A, 16 * PAGE)), Errno::NOENT);
    // As QEMU flushes: a power of two, whatever is there.
    client.unmap(BusAddr(1 << 40), 1 << 40).unwrap();
    // And when the guest switches its IOMMU: all on either side of the addresses of interrupts.
    client.unmap(BusAddr(0), 0xfee0_0000).unwrap();
    client.unmap(BusAddr(0xfef0_0000), 0xfef0_0000_u64.wrapping_neg()).unwrap();
    grant(&client, &memory, BusAddr(u64::MAX - (PAGE - 1)), PAGE).unwrap();
    let everything = client.ask(&Message::DmaUnmap(DmaUnmap::everything())).unwrap();
    assert_eq!(everything.body.len(), 24, "the question again");
    grant(&client, &memory, BusAddr(0), PAGE).unwrap();
}

#[test]
fn what_is_no_memory_is_not_granted() {
    let served = Served::disk(IommuMode::Offer);
    let (client, memory) = (served.client(), memory());
    let (reader, writer) = std::io::pipe().unwrap();
    let folder = std::fs::File::open("/").unwrap();
    let read_only = OwnedFd::from(std::fs::File::open("/proc/self/exe").unwrap());
    for fd in [reader.as_fd(), writer.as_fd(), folder.as_fd(), read_only.as_fd()] {
        refused(client.map(A, PAGE, Permission::ReadWrite, Some((fd, 0))));
    }
    client.map(A, PAGE, Permission::ReadOnly, Some((read_only.as_fd(), 0))).unwrap();
    client.unmap(A, PAGE).unwrap();
    refused(client.map(A, PAGE, Permission::ReadWrite, Some((memory.as_fd(), MEMORY as u64))));
    refused(client.map(A, PAGE, Permission::ReadWrite, Some((memory.as_fd(), u64::MAX - 4095))));
    refused(client.map(A, 1 << 50, Permission::ReadWrite, Some((memory.as_fd(), 0))));
    grant(&client, &memory, A, PAGE).unwrap();
}

#[test]
fn as_many_grants_as_there_may_be_and_not_one_more() {
    let served = Served::disk(IommuMode::Offer);
    let (client, memory) = (served.client(), memory());
    let pages = MEMORY as u64 / PAGE;
    // Every other page, so that none can be joined to its neighbour.
    let at = |number: u64| BusAddr(A.0 + 2 * number * PAGE);
    let map = |number: u64| {
        let fd = Some(memory.as_fd().try_clone_to_owned().unwrap());
        let offset = number % pages * PAGE;
        let (first, last) = (at(number), BusAddr(at(number).0 + PAGE - 1));
        Message::DmaMap(DmaMap { permission: Permission::ReadWrite, offset, first, last, fd })
    };
    for number in 0..MAX_MAPS as u64 - 1 {
        client.send(&map(number), Answer::Unwanted).unwrap();
    }
    client.ask(&map(MAX_MAPS as u64 - 1)).unwrap();
    assert_eq!(refused(client.ask(&map(MAX_MAPS as u64))), Errno::NOSPC);
    client.unmap(at(77), PAGE).unwrap();
    client.ask(&map(MAX_MAPS as u64)).unwrap();
    client.unmap(BusAddr(0), 1 << 62).unwrap();
    assert_eq!(refused(client.unmap(at(0), PAGE)), Errno::NOENT);
}

/// Requests are under way, and the pages that they read into are taken away: from the answer on those are the client's.
#[test]
fn after_the_answer_to_dma_unmap_no_byte_moves() {
    const PAGES: usize = 16;
    let served = Served::disk(IommuMode::Offer);
    let (client, memory) = (served.client(), memory());
    let part = |offset: usize, len: usize| {
        client.map(BusAddr(offset as u64), len as u64, Permission::ReadWrite, Some((memory.as_fd(), offset as u64)))
    };
    part(0, RINGS).unwrap();
    let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
    let mut disk = Blk::start(pci(&client).unwrap(), host(&mapper), Options::default()).unwrap();
    let page = |number: usize| buffer(&memory, number * PAGE as usize, PAGE as usize);
    // What is read is not what pages are stamped with.
    part(RINGS, PAGE as usize).unwrap();
    page(0).memory().fill(0x11);
    (0..PAGES as u64).for_each(|at| disk.write(at * 8, &[page(0)]).unwrap());
    client.unmap(BusAddr(RINGS as u64), PAGE).unwrap();
    let (mut read, mut failed) = (0, 0);
    for round in 0..300 {
        for number in 0..PAGES {
            part(RINGS + number * PAGE as usize, PAGE as usize).unwrap();
            disk.submit(Request::Read { sector: number as u64 * 8, into: &[page(number)] }).unwrap();
        }
        disk.notify().unwrap();
        for turn in 0..PAGES {
            // In another order each time.
            let number = (turn * 7 + round) % PAGES;
            client.unmap(BusAddr((RINGS + number * PAGE as usize) as u64), PAGE).unwrap();
            page(number).memory().fill(0xaa);
        }
        let since = Instant::now();
        let mut left = PAGES;
        while left > 0 {
            assert!(since.elapsed().as_secs() < 20, "requests that do not end");
            let Some(done) = disk.poll().unwrap() else { continue };
            left -= 1;
            match done.result {
                Ok(_) => read += 1,
                Err(_) => failed += 1,
            }
        }
        for number in 0..PAGES {
            let mut seen = [0; PAGE as usize];
            page(number).memory().read(0, &mut seen);
            assert!(seen.iter().all(|&byte| byte == 0xaa), "page {number} of round {round} was written to");
        }
    }
    eprintln!("{read} were read in time, {failed} were not let through");
}
