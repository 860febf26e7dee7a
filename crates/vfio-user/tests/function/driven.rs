//! Driven by the project's own drivers, register by register, with each buffer granted for its request alone.

use crate::served::*;
use ringfence_dma::{Buffer, Gpa, Permission};
use ringfence_driver::blk::{Blk, BlkError, Options, Request, RequestError};
use ringfence_driver::mapper::Direct;
use ringfence_driver::pci::{Function, common};
use ringfence_driver::policy::{Addressing, Allow, DriverPolicy, Platform};
use ringfence_driver::rng::Rng;
use ringfence_driver::{Host, StartError, Transport};
use ringfence_policy::IommuMode;
use ringfence_vfio_user::layout::{BAR_VIRTIO, CONFIG};
use std::time::Instant;

pub(crate) fn stamp(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

pub(crate) fn bytes(buffer: Buffer<'_>) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.memory().read(0, &mut bytes);
    bytes
}

#[test]
fn a_disk_works_and_nothing_is_granted_afterwards() {
    let served = Served::disk(IommuMode::Require);
    let mut client = served.client();
    let memory = memory();
    client.set_memory(file(&memory));
    for _ in 0..2 {
        let mapper = mapper(&client, &memory);
        let transport = pci(&client).unwrap();
        let mut disk = Blk::start(transport, host(&mapper), Options::default()).unwrap();
        assert_eq!(disk.device().addressing(), Addressing::Translated);
        assert_eq!(disk.geometry().sectors, (8 << 20) / 512);
        let (from, into) = (buffer(&memory, 0, 64 << 10), buffer(&memory, 1 << 20, 64 << 10));
        for seed in 1..20 {
            from.memory().write(0, &stamp(seed, from.len()));
            disk.write(7, &[from]).unwrap();
            disk.read(7, &[into]).unwrap();
            assert_eq!(bytes(into), stamp(seed, into.len()));
        }
        disk.flush().unwrap();
        assert_eq!(&disk.id().unwrap()[..5], b"test\0");
        drop(disk);
        drop(mapper);
        // Everything was taken back: there is nothing left to take.
        client
            .ask(&ringfence_vfio_user::wire::Request::DmaUnmap(ringfence_vfio_user::wire::DmaUnmap::everything()))
            .unwrap();
    }
}

#[test]
fn random_bytes_by_the_same_transport() {
    let served = Served::rng();
    let mut client = served.client();
    let memory = memory();
    client.set_memory(file(&memory));
    let mapper = mapper(&client, &memory);
    let mut rng = Rng::start(pci(&client).unwrap(), host(&mapper)).unwrap();
    let into = buffer(&memory, 0, 4096);
    assert_eq!(rng.fill(into).unwrap(), 4096);
    assert!(bytes(into).iter().filter(|&&byte| byte == 0).count() < 256);
}

#[test]
fn a_driver_without_the_flag_is_refused_where_it_is_required_and_served_where_it_is_not() {
    for (mode, served_too) in [(IommuMode::Require, false), (IommuMode::Off, true)] {
        let served = Served::disk(mode);
        let mut client = served.client();
        let memory = memory();
        client.set_memory(file(&memory));
        // An old driver: whatever it hands over is where it is. It is granted so, and works.
        client
            .map(ringfence_dma::BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((file_ref(&memory), 0)))
            .unwrap();
        let mut transport = pci(&client).unwrap();
        transport.reset().unwrap();
        let physical = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
        let allowed = [Allow { vendor: 0x1af4, device: 2, slot: None, addressing: Addressing::Physical }];
        let host = Host {
            platform: Platform::X86Iommu,
            policy: DriverPolicy::Refusing { allowed: &allowed },
            physical: Some(&physical),
            translated: None,
        };
        if served_too {
            let mut disk = Blk::start(transport, host, Options::default()).unwrap();
            let data = buffer(&memory, 0, 4096);
            data.memory().write(0, &stamp(3, 4096));
            disk.write(0, &[data]).unwrap();
            data.memory().fill(0);
            disk.read(0, &[data]).unwrap();
            assert_eq!(bytes(data), stamp(3, 4096));
        } else {
            // By hand: no driver of ours would leave the flag.
            let common = |offset: usize, value: u32| {
                client.write(BAR_VIRTIO, offset as u64, &value.to_le_bytes()).unwrap();
            };
            let status = |client: &ringfence_vfio_user::client::Client| {
                let mut status = [0];
                client.read(BAR_VIRTIO, common::DEVICE_STATUS as u64, &mut status).unwrap();
                status[0]
            };
            client.write(BAR_VIRTIO, common::DEVICE_STATUS as u64, &[3]).unwrap();
            common(common::DRIVER_FEATURE_SELECT, 1);
            common(common::DRIVER_FEATURE, 1);
            client.write(BAR_VIRTIO, common::DEVICE_STATUS as u64, &[11]).unwrap();
            assert_eq!(status(&client), 3, "FEATURES_OK stays clear");
            client.write(BAR_VIRTIO, common::DEVICE_STATUS as u64, &[15]).unwrap();
            assert_eq!(status(&client), 3, "and it is no advice");
        }
    }
}

pub(crate) fn file_ref(memory: &ringfence_hostmem::SharedMemory) -> std::os::fd::BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(memory)
}

#[test]
fn an_old_device_behind_an_iommu_faults_and_needs_a_reset() {
    let served = Served::disk(IommuMode::Off);
    let mut client = served.client();
    let memory = memory();
    client.set_memory(file(&memory));
    // Granted is another place than the one that the driver hands over.
    let elsewhere = ringfence_dma::BusAddr(1 << 40);
    client.map(elsewhere, MEMORY as u64, Permission::ReadWrite, Some((file_ref(&memory), 0))).unwrap();
    let physical = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
    let allowed = [Allow { vendor: 0x1af4, device: 2, slot: None, addressing: Addressing::Physical }];
    let refusing = Host {
        platform: Platform::X86Iommu,
        policy: DriverPolicy::Refusing { allowed: &[] },
        physical: Some(&physical),
        translated: None,
    };
    let refused = Blk::start(pci(&client).unwrap(), refusing, Options::default());
    assert!(matches!(refused, Err(StartError::Refused(_))), "a driver that knows of the IOMMU refuses it");
    let host = Host { policy: DriverPolicy::Refusing { allowed: &allowed }, ..refusing };
    let mut status = [0];
    let started = Blk::start(pci(&client).unwrap(), host, Options::default());
    match &started {
        Err(StartError::Broken { status }) => assert_eq!(*status, 0x4f, "DEVICE_NEEDS_RESET"),
        Err(error) => panic!("{error}"),
        Ok(_) => {
            let since = Instant::now();
            while status[0] & 0x40 == 0 && since.elapsed().as_secs() < 20 {
                client.read(BAR_VIRTIO, common::DEVICE_STATUS as u64, &mut status).unwrap();
            }
            assert_eq!(status[0], 0x4f, "DEVICE_NEEDS_RESET");
        }
    }
    drop(started);
    client.read(BAR_VIRTIO, common::DEVICE_STATUS as u64, &mut status).unwrap();
    assert_eq!(status[0], 0, "and after a reset it does not");
}

#[test]
fn a_request_outside_of_what_is_granted_fails_alone() {
    let served = Served::disk(IommuMode::Require);
    let mut client = served.client();
    let memory = memory();
    client.set_memory(file(&memory));
    let mapper = mapper(&client, &memory);
    let lying = Lying(&mapper);
    let mut disk = Blk::start(pci(&client).unwrap(), host(&lying), Options::default()).unwrap();
    let data = buffer(&memory, 0, 4096);
    // The ring and the headers are where they are said to be, the data is granted for the other direction.
    let failed = disk.read(0, &[data]);
    assert!(matches!(failed, Err(BlkError::Failed(_))), "{failed:?}");
    disk.flush().unwrap();
    assert_eq!(bytes(data), vec![0; 4096]);
}

/// Grants the device reading where it is to write.
struct Lying<'m, 'c>(&'m Mapper<'c>);

impl ringfence_dma::Mapper for Lying<'_, '_> {
    fn max_len(&self) -> usize {
        self.0.max_len()
    }

    fn map(
        &self,
        buffer: Buffer<'_>,
        permission: Permission,
    ) -> Result<ringfence_dma::Mapped, ringfence_dma::DmaError> {
        let told = if buffer.len() == 4096 { Permission::ReadOnly } else { permission };
        self.0.map(buffer, told)
    }

    fn unmap(&self, mapped: ringfence_dma::Mapped, buffer: Buffer<'_>, permission: Permission) {
        self.0.unmap(mapped, buffer, permission);
    }

    fn allocate(
        &self,
        len: usize,
    ) -> Result<(ringfence_dma::Mapped, ringfence_dma::HostSlice<'_>), ringfence_dma::DmaError> {
        self.0.allocate(len)
    }

    fn free(&self, mapped: ringfence_dma::Mapped) {
        self.0.free(mapped);
    }
}

#[test]
fn a_disk_goes_on_after_its_queue_was_reset_alone() {
    let served = Served::disk(IommuMode::Require);
    let mut client = served.client();
    let memory = memory();
    client.set_memory(file(&memory));
    let mapper = mapper(&client, &memory);
    let mut disk = Blk::start(pci(&client).unwrap(), host(&mapper), Options::default()).unwrap();
    let data = buffer(&memory, 0, 4096);
    // At its first entry, and wherever it was.
    for round in 0..3 {
        disk.restart().unwrap();
        (0..200).for_each(|_| disk.read(0, &[data]).unwrap());
        let lost = disk.submit(Request::Read { sector: 0, into: &[data] }).unwrap();
        disk.restart().unwrap();
        let ended = disk.poll().unwrap().map(|ended| (ended.id, ended.result));
        assert_eq!(ended, Some((lost, Err(RequestError::Lost))), "round {round}");
    }
}

#[test]
fn a_function_level_reset_leaves_nothing() {
    let served = Served::disk(IommuMode::Offer);
    let client = served.client();
    let mut function = client.function();
    let mut at = function.read(0x34) as u8;
    let express = loop {
        let head = function.read(at);
        if head as u8 == 0x10 {
            break at;
        }
        at = (head >> 8) as u8;
    };
    assert_ne!(function.read(express + 4) & 1 << 28, 0, "it says that it can");
    function.write(0x04, 0x6);
    function.write(0x10, 0xfe00_0000);
    client.write(BAR_VIRTIO, common::DEVICE_STATUS as u64, &[3]).unwrap();
    function.write(express + 8, 1 << 15);
    let mut status = [0xff];
    client.read(BAR_VIRTIO, common::DEVICE_STATUS as u64, &mut status).unwrap();
    assert_eq!((status[0], function.read(0x04) & 0xffff, function.read(0x10)), (0, 0, 0xc));
    client.write(CONFIG, 4, &[6, 0]).unwrap();
    client.reset().unwrap();
    assert_eq!(function.read(0x04) & 0xffff, 0);
}
