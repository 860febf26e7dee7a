//! One fuzzer for all targets: `RINGFENCE_FUZZ_TARGET` names the one to run.

#![no_main]

use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("RINGFENCE_FUZZ_TARGET").expect("RINGFENCE_FUZZ_TARGET names a target");
    ringfence_fuzz::target(&name).expect("a target of this name")
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
