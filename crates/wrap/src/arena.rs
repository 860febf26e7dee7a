//! All the memory that one back-end sees: a private file of rings and a bounce pool.

use crate::Options;
use crate::pool::{Extent, PAGE, Pool};
use ringfence_dma::{BusAddr, FrontendVa, Gpa, HostSlice};
use ringfence_hostmem::{MapError, Placement, SharedMemory};
use ringfence_ring::{Format, Layout, RingArea, RingCells, RingSlices};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Where the back-end is told that its memory begins: guest-physically, and for us. Neither is where it is mapped.
const GPA: u64 = 1 << 32;
const VA: u64 = 0x5566_0000_0000;

/// Areas of a ring start on cache lines of their own: the two sides do not write to the same ones.
const LINE: usize = 64;

/// One back-end's memory. It outlives the back-end for as long as requests are remembered that were with it.
#[derive(Debug)]
pub(crate) struct Arena {
    memory: SharedMemory,
    /// How many bytes lie between two queues' rings, which come first.
    stride: usize,
    requests: Pool,
    /// Where the kind has such: a pool a queue, for buffers that stand there until the device has something to say, which
    /// may be never. They leave the pool of requests alone.
    standing: Vec<Pool>,
}

/// Which pool of an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Requests,
    Standing,
}

impl Arena {
    /// Memory for `queues` queues.
    pub(crate) fn new(options: &Options, queues: u16) -> Result<Self, MapError> {
        // A split ring has a power of two, whatever the driver's has.
        let longest = options.queue_size.checked_next_power_of_two().unwrap_or(1 << 15);
        let stride = ring_offsets(options.format, longest).end.next_multiple_of(PAGE);
        let rings = stride * usize::from(queues) / PAGE;
        let pages = options.pool / PAGE;
        let share = if options.kind.has_standing() { pages / 2 / usize::from(queues) } else { 0 };
        let requests = Pool::new(rings, pages - share * usize::from(queues));
        let first = rings + requests.pages();
        let standing: Vec<_> = (0..usize::from(queues))
            .filter(|_| share > 0)
            .map(|queue| Pool::new(first + queue * share, share))
            .collect();
        let memory = SharedMemory::new((rings + pages) * PAGE)?;
        // A back-end that shortened it would have our own accesses fail.
        memory.seal_length()?;
        Ok(Self { memory, stride, requests, standing })
    }

    /// As a memory table has it.
    pub(crate) fn region(&self) -> (Placement, BorrowedFd<'_>) {
        let size = self.memory.len() as u64;
        (Placement { gpa: Gpa(GPA), frontend_va: FrontendVa(VA), size, offset: 0 }, self.memory.as_fd())
    }

    /// Where the back-end reaches the byte at `offset`.
    pub(crate) fn addr(&self, offset: usize) -> BusAddr {
        BusAddr(GPA + offset as u64)
    }

    pub(crate) fn slice(&self, offset: usize, len: usize) -> HostSlice<'_> {
        self.memory.slice(offset, len)
    }

    pub(crate) fn pool(&self, which: Which, queue: u16) -> &Pool {
        match which {
            Which::Standing => self.standing.get(usize::from(queue)).unwrap_or(&self.requests),
            Which::Requests => &self.requests,
        }
    }

    pub(crate) fn give(&self, which: Which, queue: u16, extent: Extent) -> Option<u16> {
        self.pool(which, queue).give(extent)
    }
}

/// A queue's ring in an arena.
#[derive(Debug)]
pub(crate) struct RingMemory {
    arena: Arc<Arena>,
    start: usize,
    offsets: Offsets,
    size: u16,
    format: Format,
}

impl RingMemory {
    pub(crate) fn new(arena: &Arc<Arena>, queue: u16, format: Format, size: u16) -> Self {
        let offsets = ring_offsets(format, size);
        assert!(offsets.end <= arena.stride, "a ring of {size} descriptors in an arena for shorter ones");
        Self { arena: Arc::clone(arena), start: arena.stride * usize::from(queue), offsets, size, format }
    }

    /// Where it is in the memory table's front-end addresses.
    pub(crate) fn layout(&self) -> Layout {
        let at = |area| BusAddr(VA + (self.start + self.offsets.of(area)) as u64);
        Layout {
            size: self.size,
            descriptors: at(RingArea::Descriptors),
            driver: at(RingArea::Driver),
            device: at(RingArea::Device),
        }
    }
}

impl ringfence_ring::RingMemory for RingMemory {
    #[inline]
    fn cells(&self) -> RingCells<'_> {
        let area = |area: RingArea| {
            self.arena.slice(self.start + self.offsets.of(area), area.len(self.format, self.size) as usize)
        };
        let slices = RingSlices {
            descriptors: area(RingArea::Descriptors),
            driver: area(RingArea::Driver),
            device: area(RingArea::Device),
        };
        RingCells::new(self.format, self.size, &slices)
    }
}

/// Where a ring's areas begin, and where it ends.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    driver: usize,
    device: usize,
    end: usize,
}

impl Offsets {
    #[inline]
    fn of(&self, area: RingArea) -> usize {
        match area {
            RingArea::Descriptors => 0,
            RingArea::Driver => self.driver,
            RingArea::Device => self.device,
        }
    }
}

fn ring_offsets(format: Format, size: u16) -> Offsets {
    let len = |area: RingArea| (area.len(format, size) as usize).next_multiple_of(LINE);
    let driver = len(RingArea::Descriptors);
    let device = driver + len(RingArea::Driver);
    Offsets { driver, device, end: device + len(RingArea::Device) }
}
