use crate::{Layout, RingArea, RingStop, Rules};
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Miss, Stop, Ticket, Visit};

/// Windows start at a page where they can, so that going down through an area does not need a new one at each step.
const PAGE: u64 = 4096;

/// How many missing pieces are asked for at once, at the most: as many as the largest area has pages.
const QUESTIONS: usize = 128;

/// One area of a ring, and how it was last found in memory.
#[derive(Debug)]
pub(crate) struct Area {
    base: BusAddr,
    /// In bytes.
    len: u32,
    align: u32,
    access: Access,
    /// The whole area was in one piece when last seen, so it is worth asking for at once.
    whole: bool,
    /// The page that was last missed, and when that was.
    asked: Option<(u64, Ticket)>,
}

/// An area for as long as a visit lasts. Remembers the piece it last resolved, so that most accesses need no
/// translation.
pub(crate) struct View<'q, 'v, V> {
    visit: &'v V,
    area: &'q mut Area,
    window: Option<Window<'v>>,
}

/// A piece of an area.
#[derive(Clone, Copy)]
struct Window<'v> {
    /// Where in the area it begins.
    start: u32,
    slice: HostSlice<'v>,
}

impl Area {
    pub(crate) fn new(area: RingArea, rules: &Rules, layout: &Layout, access: Access) -> Self {
        Self {
            base: layout.addr(area),
            len: area.len(rules.format, layout.size),
            align: area.align(rules.format),
            access,
            whole: true,
            asked: None,
        }
    }

    #[inline]
    pub(crate) fn view<'q, 'v, V: Visit>(&'q mut self, visit: &'v V) -> View<'q, 'v, V> {
        View { visit, area: self, window: None }
    }

    /// `offset` is within the area, which does not wrap.
    fn addr(&self, offset: u32) -> BusAddr {
        BusAddr(self.base.0 + u64::from(offset))
    }

    fn page(&self, offset: u32) -> u64 {
        self.addr(offset).0 / PAGE
    }

    /// Where in the area the page of `offset` begins.
    fn page_start(&self, offset: u32) -> u32 {
        offset.saturating_sub((self.addr(offset).0 % PAGE) as u32)
    }
}

impl<'v, V: Visit> View<'_, 'v, V> {
    /// The `len` bytes at `offset` of the area, which lie in one piece.
    #[inline]
    pub(crate) fn at(&mut self, offset: u32, len: u32) -> Result<HostSlice<'v>, RingStop> {
        match self.seen(offset, len) {
            Some(found) => Ok(found),
            None => self.open(offset, len),
        }
    }

    /// The same, if that needs no translation.
    #[inline]
    pub(crate) fn seen(&self, offset: u32, len: u32) -> Option<HostSlice<'v>> {
        self.window.and_then(|window| window.find(offset, len))
    }

    #[cold]
    #[inline(never)]
    fn open(&mut self, offset: u32, len: u32) -> Result<HostSlice<'v>, RingStop> {
        assert!(offset + len <= self.area.len, "{len} bytes at {offset} of an area of {}", self.area.len);
        let page = self.area.page_start(offset);
        // The last try decides; those before it hope for a larger window.
        let tries = [self.area.whole.then_some(0), (page != 0 || !self.area.whole).then_some(page)];
        for start in tries.into_iter().flatten().filter(|&start| start != offset) {
            if let Ok(window) = self.window(start)
                && let Some(found) = window.find(offset, len)
            {
                self.window = Some(window);
                return Ok(found);
            }
        }
        let window = self.window(offset)?;
        let fault = Fault { addr: self.area.addr(offset), access: self.area.access, reason: FaultReason::Split };
        let found = window.find(offset, len).ok_or(RingStop::Fault(fault))?;
        self.window = Some(window);
        Ok(found)
    }

    /// The window that begins at `start`.
    fn window(&mut self, start: u32) -> Result<Window<'v>, RingStop> {
        let area = &mut *self.area;
        let page = area.page(start);
        let asked = area.asked.filter(|&(asked, _)| asked == page).map(|(_, ticket)| ticket);
        let (addr, len) = (area.addr(start), area.len - start);
        let slice = self.visit.resolve(addr, len as usize, area.access, asked).inspect_err(|stop| {
            if let Stop::Miss(miss) = stop {
                let ticket = asked.unwrap_or(miss.ticket);
                area.asked = Some((page, ticket));
                ask_behind(self.visit, *miss, addr, len, area.access, ticket);
            }
        });
        if start == 0 {
            area.whole = slice.is_ok_and(|slice| slice.len() == len as usize);
        }
        let slice = slice?;
        if !(slice.as_ptr().addr() as u64 ^ addr.0).is_multiple_of(area.align.into()) {
            // An index could not be read in one access: the two sides would see halves of each other's stores.
            return Err(RingStop::Fault(Fault { addr, access: area.access, reason: FaultReason::Split }));
        }
        if area.asked.is_some_and(|(asked, _)| asked == page) {
            area.asked = None;
        }
        Ok(Window { start, slice })
    }
}

impl<'v> Window<'v> {
    #[inline]
    fn find(&self, offset: u32, len: u32) -> Option<HostSlice<'v>> {
        let (within, len) = (offset.wrapping_sub(self.start) as usize, len as usize);
        (within < self.slice.len() && len <= self.slice.len() - within).then(|| self.slice.sub(within, len))
    }
}

/// Asks for whatever is missing of `len` bytes at `addr` behind `miss`, which is how their beginning did not resolve:
/// one round trip brings all of it.
#[cold]
pub(crate) fn ask_behind<V: Visit>(visit: &V, miss: Miss, addr: BusAddr, len: u32, access: Access, ticket: Ticket) {
    let mut offset = miss.covers.max(1);
    for _ in 0..QUESTIONS {
        let Some(at) = addr.checked_add(offset).filter(|_| offset < u64::from(len)) else { break };
        let covered = match visit.resolve(at, (u64::from(len) - offset) as usize, access, Some(ticket)) {
            Ok(piece) => piece.len() as u64,
            Err(Stop::Miss(miss)) => miss.covers.max(1),
            // It will be met again by who gets there.
            Err(Stop::Fault(_)) => break,
        };
        offset = offset.saturating_add(covered);
    }
}
