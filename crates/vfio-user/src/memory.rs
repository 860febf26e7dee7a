//! The memory that the function was granted: what DMA_MAP said and DMA_UNMAP has not taken back.

use crate::link::Link;
use crate::wire::{DmaMap, Unmapped};
use ringfence_dma::{Access, BusAddr, Permission};
use ringfence_hostmem::{Files, MapError, Part};
use ringfence_iotlb::{self as iotlb, Fence, Iotlb};
use rustix::io::Errno;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// How many DMA maps may be valid at once: what the protocol has where nobody says otherwise.
pub const MAX_MAPS: usize = 65535;

/// How long a fence is waited for in all. A visit takes microseconds, unless the memory itself does not answer; and QEMU
/// waits five seconds for an answer.
const FENCE_PATIENCE: Duration = Duration::from_secs(3);

/// What the function may reach. Each grant that has a file is a translation; the others are in a table of their own.
pub(crate) struct Memory {
    // Before the files that its translations point to: a field is dropped before those below it.
    iotlb: Arc<Iotlb>,
    remote: Arc<Remote>,
    /// By first address; disjoint.
    grants: BTreeMap<u64, Grant>,
    files: Files,
    /// All of it was taken away from the device, because it did not answer.
    gone: Cell<bool>,
    link: Arc<Link>,
}

struct Grant {
    last: u64,
    /// None: it is reached by messages.
    part: Option<Part>,
}

/// What is reached by messages, as queues look it up.
#[derive(Debug, Default)]
pub(crate) struct Remote(RwLock<BTreeMap<u64, (u64, Permission)>>);

impl Remote {
    /// The grant that `addr` is in: its last address, and what it allows.
    pub(crate) fn find(&self, addr: u64) -> Option<(u64, Permission)> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        table.range(..=addr).next_back().map(|(_, &grant)| grant).filter(|&(last, _)| addr <= last)
    }

    /// An address that can be read.
    pub(crate) fn readable(&self) -> Option<u64> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        table.iter().find(|(_, (_, permission))| permission.allows(Access::Read)).map(|(&first, _)| first)
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<u64, (u64, Permission)>)) {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Why memory can't be granted, or taken back.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// Some of it is granted already.
    #[error("DMA_MAP of {first} to {last}: {other} of it is mapped already")]
    Mapped {
        /// The first address.
        first: BusAddr,
        /// The last.
        last: BusAddr,
        /// The first of a grant that it overlaps.
        other: BusAddr,
    },
    /// There are as many as can be.
    #[error("DMA_MAP of {first}: there are {MAX_MAPS} maps already")]
    TooMany {
        /// The first address.
        first: BusAddr,
    },
    /// Its file can't be had.
    #[error("DMA_MAP of {first} to {last}: {error}")]
    File {
        /// The first address.
        first: BusAddr,
        /// The last.
        last: BusAddr,
        /// Why not.
        error: MapError,
    },
    /// Nothing of it was granted.
    #[error("DMA_UNMAP of {first} to {last}: nothing is mapped there")]
    NotMapped {
        /// The first address.
        first: BusAddr,
        /// The last.
        last: BusAddr,
    },
    /// A grant lies partly in it.
    #[error("DMA_UNMAP of {first} to {last}: it would cut what is mapped at {other}")]
    Cut {
        /// The first address.
        first: BusAddr,
        /// The last.
        last: BusAddr,
        /// The first of the grant that it would cut.
        other: BusAddr,
    },
}

impl GrantError {
    /// What the client is told.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            GrantError::Mapped { .. } => Errno::EXIST,
            GrantError::TooMany { .. } => Errno::NOSPC,
            // There is no such grant either way.
            GrantError::NotMapped { .. } | GrantError::Cut { .. } => Errno::NOENT,
            GrantError::File { error, .. } => match error {
                MapError::NotWritable => Errno::ACCESS,
                MapError::NotMappable => Errno::NODEV,
                MapError::TooMany { .. } => Errno::NOSPC,
                MapError::Kernel(errno) => *errno,
                _ => Errno::INVAL,
            },
        }
    }
}

impl Memory {
    /// Nothing at all.
    pub(crate) fn new(link: Arc<Link>) -> Self {
        // What is not in the table is a fault: nobody is to be asked for it. One more than there can be: an update makes
        // sure of room for itself first.
        let options = iotlb::Options { capacity: MAX_MAPS + 1, ..Default::default() };
        Self {
            iotlb: Iotlb::new(iotlb::Unmapped::Fault, options),
            remote: Arc::default(),
            grants: BTreeMap::new(),
            gone: Cell::new(false),
            files: Files::default(),
            link,
        }
    }

    pub(crate) fn iotlb(&self) -> &Arc<Iotlb> {
        &self.iotlb
    }

    pub(crate) fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// How many grants there are.
    pub(crate) fn len(&self) -> usize {
        self.grants.len()
    }

    /// Whether a file of it was cut short. It reads as zeroes since.
    pub(crate) fn is_lost(&self) -> bool {
        // Not each grant: there can be many, and this is asked with each message.
        self.files.is_lost()
    }

    /// DMA_MAP.
    pub(crate) fn map(&mut self, DmaMap { permission, offset, first, last, fd }: DmaMap) -> Result<(), GrantError> {
        if let Some((&other, _)) = self.grants.range(..=last.0).next_back().filter(|(_, grant)| first.0 <= grant.last) {
            return Err(GrantError::Mapped { first, last, other: BusAddr(other) });
        }
        if self.grants.len() >= MAX_MAPS {
            return Err(GrantError::TooMany { first });
        }
        let part = fd.map(|fd| {
            let len = usize::try_from(last.0 - first.0).ok().and_then(|more| more.checked_add(1));
            let len = len.ok_or(MapError::Kernel(Errno::NOMEM))?;
            self.files.part(fd, offset, len, permission)
        });
        let part = part.transpose().map_err(|error| GrantError::File { first, last, error })?;
        match &part {
            Some(part) => {
                let start = NonNull::new(part.slice().as_ptr()).expect("memory is not at address 0");
                // SAFETY: the part is mapped until its grant goes, which `unmap` and `drop` let it do only after the
                // fence has been waited for. One that is mapped for reading alone is granted for reading alone.
                let update = unsafe { self.iotlb.update(first, last, start, permission) };
                // Disjoint from all that is there.
                update.map_err(|_| GrantError::TooMany { first })?.wait();
            }
            None => self.remote.change(|table| {
                table.insert(first.0, (last.0, permission));
            }),
        }
        self.grants.insert(first.0, Grant { last: last.0, part });
        Ok(())
    }

    /// DMA_UNMAP: returns when no byte of it moves any more.
    ///
    /// Takes a range that is one grant, as the protocol has it, or several, see [`is_flush`].
    pub(crate) fn unmap(&mut self, what: Unmapped, hurry: BorrowedFd<'_>) -> Result<(), GrantError> {
        let (first, last) = match what {
            Unmapped::Everything => (BusAddr(0), BusAddr(u64::MAX)),
            Unmapped::Range { first, last } => (first, last),
        };
        let before = self.grants.range(..first.0).next_back().filter(|(_, grant)| first.0 <= grant.last);
        let behind = self.grants.range(first.0..=last.0).next_back().filter(|(_, grant)| last.0 < grant.last);
        if let Some((&other, _)) = before.or(behind) {
            return Err(GrantError::Cut { first, last, other: BusAddr(other) });
        }
        let taken: BTreeSet<u64> = self.grants.range(first.0..=last.0).map(|(&first, _)| first).collect();
        if taken.is_empty() {
            return if is_flush(what) { Ok(()) } else { Err(GrantError::NotMapped { first, last }) };
        }
        // Messages on their way are given up: whoever is to answer them waits for us.
        let _quiet = self.link.hush();
        self.remote.change(|table| {
            for first in &taken {
                table.remove(first);
            }
        });
        let fence = self.iotlb.invalidate(first, last);
        self.wait(fence, hurry);
        taken.iter().for_each(|first| drop(self.grants.remove(first)));
        Ok(())
    }

    /// Waits until no byte moves any more on the strength of what was taken away.
    fn wait(&self, fence: Fence, hurry: BorrowedFd<'_>) {
        let gone = self.is_gone();
        let patience = if gone { Duration::ZERO } else { FENCE_PATIENCE };
        let take_away = |stuck| {
            gone || {
                tracing::error!("the client waits for its own memory: {stuck}");
                self.take_away()
            }
        };
        if fence.wait_or_take_away(patience, || crate::server::is_readable(hurry), take_away).is_err() {
            self.leave_behind();
        }
    }

    /// A thread of ours is stuck in memory of the client's that does not answer. Then nobody has it any more, and the next
    /// message finds it lost, which ends the connection. `false`: the kernel does not let us, and there is nothing but to wait,
    /// for nobody may be told what is not true.
    pub(crate) fn take_away(&self) -> bool {
        tracing::error!("granted memory does not answer, so it is taken away from the device, and the connection ends");
        let gone = self.files.take_away();
        if !gone {
            tracing::error!("the kernel does not let it be taken away");
        }
        self.gone.set(gone);
        gone
    }

    /// Whether all of it was taken away because it did not answer.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.get()
    }

    /// Not even that freed whoever is stuck. It is never unmapped, so that nothing else can be mapped there.
    pub(crate) fn leave_behind(&self) {
        self.grants.values().for_each(|grant| std::mem::forget(grant.part.clone()));
    }
}

/// Whether nothing needs to be mapped where something is taken back.
///
/// By the protocol a range is exactly what was mapped. But when a guest flushes its IOMMU, QEMU takes the whole address
/// space back in aligned powers of two, down to one MiB, whatever is in them; and when the guest switches its IOMMU on or
/// off, what is below the addresses of interrupts and what is above. The kernel's own interface, from which this one comes,
/// takes what there is.
fn is_flush(what: Unmapped) -> bool {
    match what {
        Unmapped::Everything => true,
        Unmapped::Range { first, last } => {
            let more = last.0 - first.0;
            let aligned = more & more.wrapping_add(1) == 0 && first.0 & more == 0;
            more >= 0xf_ffff && (aligned || first.0 == 0 || last.0 == u64::MAX)
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // No queue is left by now. What was left behind holds its own.
        let mut fence = self.iotlb.clear();
        if fence.wait_for(FENCE_PATIENCE).is_err() {
            self.take_away();
            self.leave_behind();
        }
    }
}
