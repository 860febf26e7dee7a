//! The mode for machines without an IOMMU.

use crate::options;
use crate::scripted::Scripted;
use crate::served::{Driver, Frontend, RINGS, Served};
use ringfence_driver::mapper::Direct;
use ringfence_iommu::Strict;
use ringfence_policy::IommuMode;
use ringfence_vhost_user::wire::ProtocolFeatures;
use ringfence_wrap::pass::relay;
use std::path::Path;
use std::sync::Arc;

fn pass(backend: &Path) -> Served {
    let options = options(backend);
    Served::run(move |server, end| server.each("pass", |stream| relay(stream, &options, end), end).unwrap())
}

#[test]
fn the_flag_is_added_and_rings_run_directly() {
    let disk = Served::start(IommuMode::Off);
    let passed = pass(&disk.socket);
    for _ in 0..2 {
        let frontend = Frontend::connect(&passed);
        assert_eq!(IommuMode::Offer.offers(0) & !frontend.client.offered(), 0, "the flag is offered");
        let direct = Direct::new(frontend.buffer(RINGS));
        // As QEMU has it that strips the flag.
        let mut driven = frontend.start(Driver::Old, &direct).unwrap();
        for round in 0..20 {
            frontend.write_and_read_back(&mut driven, round);
        }
    }
}

#[test]
fn whoever_translates_is_turned_away_and_the_next_is_served() {
    let disk = Served::start(IommuMode::Off);
    let passed = pass(&disk.socket);
    let frontend = Frontend::connect(&passed);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    assert!(frontend.start(Driver::New, &strict).is_err());
    drop(frontend);

    let frontend = Frontend::connect(&passed);
    let direct = Direct::new(frontend.buffer(RINGS));
    let mut driven = frontend.start(Driver::Old, &direct).unwrap();
    frontend.write_and_read_back(&mut driven, 1);
}

/// What QEMU wants to see with the flag is there, whatever the back-end knows of it.
#[test]
fn protocol_features_are_added() {
    let backend = Scripted::start(&[]);
    let passed = pass(&backend.socket);
    let frontend = Frontend::connect(&passed);
    let protocol = frontend.client.protocol();
    assert!(protocol.contains(ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK), "{protocol:?}");
    assert!(!protocol.contains(ProtocolFeatures::STATUS), "{protocol:?}: nobody does that");
}
