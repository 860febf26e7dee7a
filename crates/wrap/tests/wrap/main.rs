//! A wrapped back-end from end to end: a driver behind an IOMMU, the server, the bounce pool, and somebody's back-end.

mod hostile;
mod lost;
mod pass;
#[path = "../../../fuzz/src/plain.rs"]
mod plain;
mod pool;
mod scripted;
#[path = "../../../vhost-user/tests/served/mod.rs"]
mod served;
mod stop;
mod traffic;
#[path = "../../../device/tests/queue/world.rs"]
#[allow(dead_code)] // Each test folder uses a part of it.
mod world;

use ringfence_device::Device;
use ringfence_iommu::Strict;
use ringfence_policy::{Addressing, IommuMode};
use ringfence_ring::Format;
use ringfence_vhost_user::server::{self, Keep};
use ringfence_wrap::{Kind, OnError, Options, Wrapped};
use served::{Driver, Frontend, PAGE, RINGS, Served};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub(crate) fn options(backend: &Path) -> Options {
    Options {
        backend: backend.to_owned(),
        kind: Kind::Blk,
        queues: None,
        queue_size: 256,
        pool: 16 << 20,
        format: Format::Split,
        timeout: None,
        on_error: OnError::Reconnect,
        patience: Duration::from_secs(30),
    }
}

/// `device` as somebody's back-end without an IOMMU.
pub(crate) fn serve_plainly(device: Arc<dyn Device>) -> Served {
    let how = server::Options {
        iommu: IommuMode::Off,
        keep: Keep::Auto,
        queue_size: 256,
        poll: Duration::ZERO,
        io_timeout: Duration::from_secs(10),
    };
    Served::run(move |server, end| server.run(device, how, end).unwrap())
}

/// `ringfence wrap`, without its command line.
pub(crate) fn wrap(options: Options) -> Served {
    wrap_looking(options, Duration::from_micros(20), Duration::from_secs(2))
}

/// The same, whose queues look for more to do for so long before they sleep, and wait for so long for a back-end.
pub(crate) fn wrap_looking(options: Options, poll: Duration, io_timeout: Duration) -> Served {
    let first = Wrapped::open(options.clone()).unwrap();
    let how =
        server::Options { iommu: IommuMode::Offer, keep: Keep::Auto, queue_size: options.queue_size, poll, io_timeout };
    Served::run(move |server, end| {
        let mut first = Some(first);
        let open = || -> io::Result<Arc<dyn Device>> {
            let wrapped = first.take().map_or_else(|| Wrapped::open(options.clone()), Ok);
            Ok(Arc::new(wrapped.map_err(io::Error::other)?))
        };
        server.run_each("wrapped", open, how, end).unwrap();
    })
}

/// A front-end and a driver's disk behind `$wrapped`.
macro_rules! driven {
    ($wrapped:ident => $frontend:ident, $disk:ident) => {
        let $frontend = $crate::served::Frontend::connect(&$wrapped);
        let mapper = ringfence_iommu::Strict::new(
            std::sync::Arc::clone(&$frontend.domain),
            $frontend.buffer($crate::served::RINGS),
        );
        let mut $disk = $frontend.start($crate::served::Driver::New, &mapper).unwrap();
    };
}
pub(crate) use driven;

#[test]
fn an_old_device_becomes_a_new_one() {
    for format in [Format::Split, Format::Packed] {
        let disk = Served::start(IommuMode::Off);
        let wrapped = wrap(Options { format, ..options(&disk.socket) });
        // The second front-end gets a connection of its own to the back-end.
        for _ in 0..2 {
            let frontend = Frontend::connect(&wrapped);
            let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
            let mut driven = frontend.start(Driver::New, &strict).unwrap();
            assert_eq!(driven.device().addressing(), Addressing::Translated);
            for round in 0..100 {
                frontend.write_and_read_back(&mut driven, round);
            }
            driven.flush().unwrap();
            assert!(frontend.client.counters().misses > 0);
            drop(driven);
            assert_eq!(frontend.domain.mapped(), 0);
        }
    }
}
