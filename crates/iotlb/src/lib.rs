//! A concurrent translation cache: bus address to host memory, with leases and an exact fence.
//!
//! Knows ranges of bus addresses, where they lie in this process, who looks at them and who still uses them; and the
//! questions that are under way to whoever knows the translations. Knows no messages, sockets, rings or devices.
//!
//! One [`Iotlb`] serves one device. Its *session* thread fills and empties it with [`Iotlb::update`] and
//! [`Iotlb::invalidate`], and hands it the answers to its questions with [`Iotlb::answered`]. Each queue thread has a
//! [`View`], a [`ringfence_dma::Memory`]. Physical addressing is the same cache, filled with the regions of guest
//! memory and made with [`Unmapped::Fault`].
//!
//! # The promise
//! Once [`Fence::wait`] has returned, nothing of the removed range is touched any more on the strength of what was
//! removed: not by a visit, and not by I/O that is under way and holds a [`Lease`]. It rests on three things:
//!
//! 1. A visit announces itself before it looks anything up, and the fence waits for the visits that were announced
//!    before the removal could be seen.
//! 2. A lease is published before its visit ends, so a fence that found no visit finds the lease.
//! 3. A view's private table of what it found lately is good for one *generation*, and every removal starts another.
//!
//! `tests/loom.rs` runs this in every order of events that the memory model allows.
//!
//! # What a hostile peer may do
//! A front-end may update and invalidate what it likes: the table stays within [`Options::capacity`], and one more
//! mapping evicts others, which are asked for again. A guest may use any address: questions under way and refusals on
//! record are bounded ([`UNANSWERED`], [`REFUSALS`]); beyond the first, further misses wait until earlier ones are
//! answered. Neither can choose addresses that make lookups slow: the hash is keyed.
//!
//! # Memory
//! A mapping of one 4 KiB page takes 2 to 5 bytes where its neighbours are mapped too, by how near to each other their memory is,
//! less than one where that follows each other as well, and 40 to 112 where they are not, by how full the slots happen to be. In between, two mappings for 64 neighbouring pages being the worst, and ranges that are
//! aligned to nothing, the table counts bytes rather than mappings, and holds as many as fit 128 bytes for each of
//! [`Options::capacity`]. Slots that are being replaced come on top, until the visits that may look at them are over: at no
//! time is it more than 256 bytes for each of the capacity, 256 MiB for the default (`tests/memory.rs`, with hostile
//! streams of updates).
//!
//! A full table evicts a 64th of itself at once, in the order of a keyed hash: neither the oldest nor what was used
//! least, for which each lookup would have to write, and nothing that a guest can foresee.

mod fence;
mod foretold;
mod index;
mod iotlb;
mod leaf;
mod lease;
mod questions;
mod slots;
mod sync;
mod table;
mod view;
mod word;

pub use fence::{Fence, LOST_PATIENCE, Stuck};
pub use iotlb::{Ask, Iotlb, Options, Question, Refused, Replies, Statistics, Unasked, Unmapped, Wake};
pub use lease::{LEASES, Lease};
pub use questions::{REFUSALS, UNANSWERED};
pub use view::{View, Visit};
