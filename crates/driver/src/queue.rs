use alloc::vec::Vec;
use core::mem;
use ringfence_dma::{BusAddr, Coherent, DmaError, HostSlice, Mapper};
use ringfence_ring::{DriverQueue, Indirect, Layout, LayoutError, RingArea, RingCells, RingSlices, Rules, Token};

/// A queue of a device, in coherent memory.
#[derive(Debug)]
pub(crate) struct Queue<'a, M: Mapper + ?Sized, T = ()> {
    pub(crate) ring: DriverQueue<RingCells<'a>, T>,
    pub(crate) layout: Layout,
    pub(crate) indirect: Indirect,
    /// Where the ring is: to be kept until the device is reset.
    memory: Option<Coherent<'a, M>>,
}

/// Why there is no queue.
#[derive(Debug)]
pub(crate) enum QueueError {
    Layout(LayoutError),
    Dma(DmaError),
}

/// Areas start on cache lines of their own: the two sides do not write to the same ones.
const LINE: usize = 64;

impl<'a, M: Mapper + ?Sized> Queue<'a, M> {
    /// A queue of `size` descriptors, of which the device has not been told yet. It is polled: the device need not say
    /// what it uses.
    pub(crate) fn new(mapper: &'a M, rules: Rules, size: u16) -> Result<Self, QueueError> {
        let len = |area: RingArea| area.len(rules.format, size) as usize;
        let driver = len(RingArea::Descriptors).next_multiple_of(LINE);
        let device = driver + len(RingArea::Driver).next_multiple_of(LINE);
        let memory = Coherent::allocate(mapper, device + len(RingArea::Device)).map_err(QueueError::Dma)?;
        let at = |offset: usize| BusAddr(memory.addr().0 + offset as u64);
        let layout = Layout { size, descriptors: at(0), driver: at(driver), device: at(device) };
        layout.check(rules.format).map_err(QueueError::Layout)?;
        let slice = |offset, area| memory.memory().sub(offset, len(area));
        let slices = RingSlices {
            descriptors: slice(0, RingArea::Descriptors),
            driver: slice(driver, RingArea::Driver),
            device: slice(device, RingArea::Device),
        };
        let mut ring =
            DriverQueue::new(rules, size, RingCells::new(rules.format, size, &slices)).map_err(QueueError::Layout)?;
        ring.disable_callbacks();
        Ok(Self { ring, layout, indirect: rules.indirect, memory: Some(memory) })
    }

    /// The same, with a record beside each chain.
    pub(crate) fn keeping<T>(self, records: impl FnMut(Token) -> T) -> Queue<'a, M, T> {
        let Self { ring, layout, indirect, memory } = self;
        Queue { ring: ring.keeping(records), layout, indirect, memory }
    }
}

impl<M: Mapper + ?Sized, T> Queue<'_, M, T> {
    /// Gives the ring's memory up for lost.
    pub(crate) fn leak(&mut self) {
        mem::forget(self.memory.take());
    }
}

/// Coherent memory for each request that may be under way: equal pieces, numbered.
#[derive(Debug)]
pub(crate) struct Pieces<'a, M: Mapper + ?Sized> {
    /// Chunk by chunk, so that a pool in crumbs will do.
    chunks: Vec<Coherent<'a, M>>,
    pieces: Vec<Piece<'a>>,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    pub(crate) memory: HostSlice<'a>,
    pub(crate) addr: BusAddr,
}

impl<'a, M: Mapper + ?Sized> Pieces<'a, M> {
    const CHUNK: usize = 4096;

    /// `count` pieces of `len` bytes each, on cache lines of their own.
    pub(crate) fn allocate(mapper: &'a M, count: u16, len: usize) -> Result<Self, DmaError> {
        let len = len.next_multiple_of(LINE);
        let per_chunk = (Self::CHUNK / len).max(1);
        let chunks = (0..usize::from(count).div_ceil(per_chunk)).map(|_| Coherent::allocate(mapper, per_chunk * len));
        let chunks = chunks.collect::<Result<Vec<_>, _>>()?;
        let piece = |number: usize| {
            let (chunk, offset) = (&chunks[number / per_chunk], number % per_chunk * len);
            Piece { memory: chunk.memory().sub(offset, len), addr: BusAddr(chunk.addr().0 + offset as u64) }
        };
        let pieces = (0..usize::from(count)).map(piece).collect();
        Ok(Self { chunks, pieces })
    }

    /// Gives them up for lost.
    pub(crate) fn leak(&mut self) {
        mem::forget(mem::take(&mut self.chunks));
    }

    #[inline]
    pub(crate) fn get(&self, number: u16) -> Piece<'a> {
        self.pieces[usize::from(number)]
    }
}
