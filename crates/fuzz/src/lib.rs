//! Peers made of bytes: each target plays one hostile side against the code that must not trust it.
//!
//! A target takes any bytes, reads from them what its peer does, and returns; a bug of ours is a panic, a wrong access, or a
//! target that does not come to its end. `cargo xtask fuzz` runs them under libFuzzer with AddressSanitizer, and this crate's
//! test runs them on stored and on pseudo-random bytes whenever tests run.

mod bytes;
mod flat;
mod frontend;
mod iotlb;
mod link;
mod plain;
mod ring;
mod wire;
mod wrap;

pub(crate) use bytes::Bytes;
pub(crate) use flat::Flat;

/// A target: its name, and what to do with bytes.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("ring-device", ring::hostile_driver),
    ("ring-driver", ring::hostile_device),
    ("wire", wire::messages),
    ("iotlb", iotlb::entries),
    ("frontend", frontend::socket),
    ("wrap-guest", wrap::hostile_guest),
    ("wrap-back-end", wrap::hostile_back_end),
    ("wrap-socket", link::hostile_answers),
    ("wrap-pass", link::relayed),
];

/// The target of that name.
pub fn target(name: &str) -> Option<fn(&[u8])> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, run)| *run)
}
