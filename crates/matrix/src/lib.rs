//! The table at the end of the proposal behind `VIRTIO_F_ACCESS_PLATFORM`, every cell executed: for this driver, this
//! device and this platform, does it work, is it translated, who refuses, or does memory get corrupted?
//!
//! A [`Case`] is a cell's place in the table. [`observe`] builds its world ([`world`]) from the project's own parts, puts
//! bytes through a real ring to a real disk and back, and looks at everything afterwards: an [`Observation`]. From that
//! alone, and never from the rules, follows the [`Verdict`]. [`proposal`] compares it with what the proposal says, and
//! [`report`] writes it down.
//!
//! Knows platforms and what memory looks like on them. Knows no rule of the proposal: those are `policy`'s, and what
//! their author expected of them is data.
//!
//! ```
//! use ringfence_matrix::{Case, Genuine, Matrix};
//!
//! let select = "platform=xen driver=old device=old-emulated".parse()?;
//! let matrix = Matrix::run(&select, &Genuine);
//! assert_eq!(matrix.cells[0].observed.slug(), "corrupts");
//! # Ok::<(), ringfence_matrix::SelectError>(())
//! ```

#![forbid(unsafe_code)]

mod attach;
mod bus;
mod case;
mod grants;
mod machine;
mod sides;
mod verdict;
mod wrapped;
mod xen;

pub mod compatibility;
pub mod html;
pub mod proposal;
pub mod real;
pub mod record;
pub mod report;
pub mod world;

pub use attach::{Attached, Halt, Slot};
pub use bus::{Bus, BusVisit, Touch, Trace};
pub use case::{Case, DriverKind, Select, SelectError};
pub use grants::GuestGrants;
pub use machine::{ALL, Area, Damage, Machine, OWN, Owner, PAGE};
pub use report::{Cell, Matrix};
pub use verdict::Verdict;
pub use world::{Genuine, Observation, Parts, World, observe};
pub use xen::GuestFrames;
