//! Front-ends that do to the eventfds they share what they like, or give something else.

mod served;

use ringfence_device::eventfd;
use ringfence_driver::blk::Request;
use ringfence_iommu::Strict;
use ringfence_policy::IommuMode;
use ringfence_vhost_user::client::{ClientError, Vring};
use ringfence_vhost_user::wire::FrontendCode;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use served::{BUFFERS, Driven, Driver, Frontend, PAGE, RINGS, Served};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Has a front-end come, start its disk, do `what` with it, and leave.
fn with_disk(served: &Served, what: impl for<'a> FnOnce(&'a Frontend, &mut Driven<'a, Strict<'a>>)) {
    let frontend = Frontend::connect(served);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let mut disk = frontend.start(Driver::New, &strict).unwrap();
    what(&frontend, &mut disk);
}

fn serves_the_next(served: &Served) {
    with_disk(served, |frontend, disk| (0..3).for_each(|round| frontend.write_and_read_back(disk, round)));
}

/// Has the queue end, and begin where it was.
fn restart(disk: &mut Driven<'_, Strict<'_>>) {
    let transport = disk.device_mut().transport_mut();
    let base = transport.pause(0).unwrap();
    transport.resume(0, base).unwrap();
}

/// Until there is no room for one more; then it blocks whoever adds one.
fn fill(fd: BorrowedFd<'_>) {
    loop {
        match rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()) {
            // Somebody has rung it: all of it goes, and then there is room.
            Err(Errno::AGAIN) => eventfd::hush(fd),
            written => {
                written.unwrap();
                break;
            }
        };
    }
    fcntl_setfl(fd, OFlags::empty()).unwrap();
}

/// Whoever waits in a write waits for ever: every request after the first, the end of the queue, and the next front-end.
#[test]
fn a_call_that_is_full_and_blocks_holds_nobody_up() {
    let served = Served::start(IommuMode::Offer);
    with_disk(&served, |frontend, disk| {
        let buffers = [frontend.buffer((BUFFERS.0, PAGE))];
        disk.write(0, &buffers).unwrap();
        fill(disk.device_mut().transport_mut().bells(0).unwrap().1);
        for sector in 0..20 {
            disk.submit(Request::Read { sector, into: &buffers }).unwrap();
            disk.notify().unwrap();
            while disk.poll().unwrap().is_none() {
                std::thread::yield_now();
            }
        }
        restart(disk);
    });
    serves_the_next(&served);
}

/// What is rung and emptied by somebody else before it is read is not waited for.
#[test]
fn a_kick_that_blocks_and_that_others_empty_holds_nobody_up() {
    let served = Served::start(IommuMode::Offer);
    with_disk(&served, |frontend, disk| {
        let buffers = [frontend.buffer((BUFFERS.0, PAGE))];
        let kick = disk.device_mut().transport_mut().bells(0).unwrap().0.try_clone_to_owned().unwrap();
        fcntl_setfl(&kick, OFlags::empty()).unwrap();
        let enough = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
                    (0..100).for_each(|_| std::hint::spin_loop());
                    eventfd::hush(kick.as_fd());
                }
            });
            // A queue that sleeps between two requests is one that reads its kick.
            for sector in 0..300 {
                disk.read(sector, &buffers).unwrap();
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
            enough.store(true, Ordering::Relaxed);
            restart(disk);
        });
    });
    serves_the_next(&served);
}

/// A pipe can be full, a socket can be read by others, and a file's server can be the front-end.
#[test]
fn what_is_no_eventfd_is_refused() {
    let served = Served::start(IommuMode::Offer);
    let ours = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let (read, write) = std::io::pipe().unwrap();
    let socket = UnixStream::pair().unwrap().0;
    let others: [OwnedFd; 3] = [read.into(), write.into(), socket.into()];
    for other in &others {
        let kicks = (other.as_fd(), ours.as_fd(), FrontendCode::SetVringKick);
        let calls = (ours.as_fd(), other.as_fd(), FrontendCode::SetVringCall);
        for (kick, call, refused) in [kicks, calls] {
            let frontend = Frontend::connect(&served);
            let (kick, call) = (Some(kick), Some(call));
            let vring = Vring { index: 0, size: 64, base: 0, descriptor: 0, available: 0, used: 0, kick, call };
            match frontend.client.start_vring(&vring) {
                Err(ClientError::Refused { message, .. }) => assert_eq!(message, refused),
                other => panic!("{other:?}"),
            }
        }
    }
    serves_the_next(&served);
}
