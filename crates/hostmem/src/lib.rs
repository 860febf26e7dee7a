//! Memory that others have too, mapped into this process: a guest's, above all.
//!
//! Knows files that somebody else shares with us, where their bytes lie here, and by which two kinds of address the
//! other side names them. Knows no translation, no messages and no rings.
//!
//! [`Regions`] is a front-end's memory table, [`Files`] is what somebody has who is granted memory in many small parts,
//! [`SharedMemory`] is memory of our own that another process can map, [`FileMemory`] a file.
//!
//! # What a hostile front-end may do
//! It may describe anything: every number is checked before something is mapped. It keeps its file, and may shorten it
//! under a mapping: touching what is gone raises SIGBUS, which would end the process and with it the service of every
//! other front-end. Therefore the first mapping installs a handler: a fault within a mapping of this crate replaces
//! that mapping by anonymous zeroes and marks it lost ([`Region::is_lost`]); any other fault is passed on to whoever
//! handled the signal before. It may share a file whose pages come from a file system of its own (FUSE), and then make
//! whoever touches them wait: only its own queues do.

mod file;
mod files;
mod mapping;
mod region;
mod regions;
mod shared;
mod sigbus;

pub use file::FileMemory;
pub use files::{Files, MAX_FILES, Part};
pub use mapping::{MOST_MAPPED, MapError};
pub use region::{Placement, Region};
pub use regions::{MAX_REGIONS, Pieces, Regions};
pub use shared::SharedMemory;
