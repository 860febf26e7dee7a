//! The driver's half of a packed ring (§2.8).

use super::{Chains, Returned, access_flag, store};
use crate::cells::RingCells;
use crate::cursor::Cursor;
use crate::wire::{AVAIL, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, INDIRECT, NEXT, Raw, USED, packed_event_passed};
use crate::{Descriptor, DeviceError, Notifications};
use core::sync::atomic::{AtomicU64, Ordering, fence};
use ringfence_dma::BusAddr;

#[derive(Debug)]
pub(super) struct Ring {
    notifications: Notifications,
    size: u16,
    /// The next descriptor to write, and the flags that make it available: a word's highest bits.
    added: u16,
    lap: u64,
    /// Where the device writes its next used descriptor, and the flags that it then has. [`BROKEN`]: never.
    taken: u16,
    used: u64,
    /// Where something used was seen and not taken yet, in this lap. [`NOWHERE`]: nothing was.
    seen: u32,
    /// How many entries were ever added, and how many had been when the device was last told or found not to care.
    count: u64,
    told: u64,
}

/// The flags of a word that say whose turn it is.
const TURN: u64 = ((AVAIL | USED) as u64) << 48;

/// No flags are this.
const BROKEN: u64 = 1;

/// No place is this.
const NOWHERE: u32 = u32::MAX;

const fn word(flags: u16) -> u64 {
    (flags as u64) << 48
}

impl Ring {
    pub(super) fn new(size: u16, notifications: Notifications) -> Self {
        Self {
            notifications,
            size,
            added: 0,
            lap: word(Cursor::START.available_flags()),
            taken: 0,
            used: word(Cursor::START.used_flags()),
            seen: NOWHERE,
            count: 0,
            told: 0,
        }
    }

    /// A descriptor of a table. The id and all other flags mean nothing there (§2.8.7).
    #[inline(always)]
    pub(super) fn in_table(buffer: &Descriptor) -> (u64, u64) {
        Raw { addr: buffer.addr, len: buffer.len, flags: access_flag(buffer), link: 0 }.packed_words()
    }

    /// Adds chain `id`, which lies in a table of `len` bytes at `addr`.
    #[inline(always)]
    pub(super) fn add_table(&mut self, cells: &RingCells<'_>, id: u16, addr: BusAddr, len: u32) {
        let (addr, rest) = Raw { addr, len, flags: INDIRECT, link: id }.packed_words();
        self.add_head(cells, (addr, rest | self.lap));
        (self.added, self.lap) = self.after(self.added, 1, self.lap);
        self.count += 1;
    }

    /// Adds a chain, and says its id. There is room.
    #[inline]
    pub(super) fn add<T>(
        &mut self,
        cells: &RingCells<'_>,
        chains: &mut Chains<T>,
        buffers: &[Descriptor],
        writable: u32,
    ) -> u16 {
        let id = chains.next;
        chains.next = chains.links[usize::from(id)];
        chains.give(id, id, buffers.len() as u16, writable);
        // The first of them comes last: it may be what has the device look at all.
        let (mut at, mut lap) = self.after(self.added, 1, self.lap);
        for number in 1..buffers.len() {
            let words = in_ring(&buffers[number], id, number + 1 < buffers.len(), lap);
            store(&cells.descriptors[usize::from(at)], words);
            (at, lap) = self.after(at, 1, lap);
        }
        self.add_head(cells, in_ring(&buffers[0], id, buffers.len() > 1, self.lap));
        (self.added, self.lap) = (at, lap);
        self.count += buffers.len() as u64;
        id
    }

    /// Adds chain `id` of three.
    #[inline(always)]
    pub(super) fn add_three(&mut self, cells: &RingCells<'_>, id: u16, [head, middle, last]: [Descriptor; 3]) {
        let at = usize::from(self.added);
        match cells.descriptors.get(at..).and_then(|rest| rest.first_chunk()) {
            // Before the ring's end nothing changes from one to the next.
            Some([first, second, third, _]) => {
                store(second, in_ring(&middle, id, true, self.lap));
                store(third, in_ring(&last, id, false, self.lap));
                show(first, in_ring(&head, id, true, self.lap));
                self.added = self.added.wrapping_add(3);
            }
            None => {
                let (at, lap) = self.after(self.added, 1, self.lap);
                store(&cells.descriptors[usize::from(at)], in_ring(&middle, id, true, lap));
                let (at, lap) = self.after(at, 1, lap);
                store(&cells.descriptors[usize::from(at)], in_ring(&last, id, false, lap));
                let after = self.after(at, 1, lap);
                self.add_head(cells, in_ring(&head, id, true, self.lap));
                (self.added, self.lap) = after;
            }
        }
        self.count = self.count.wrapping_add(3);
    }

    #[inline(always)]
    fn add_head(&mut self, cells: &RingCells<'_>, words: (u64, u64)) {
        show(&cells.descriptors[usize::from(self.added)], words);
    }

    /// The place `entries` after `at`, and the flags there.
    #[inline(always)]
    fn after(&self, at: u16, entries: u16, flags: u64) -> (u16, u64) {
        // 32768 and as many: up to 65536.
        let at = u32::from(at) + u32::from(entries);
        if at < u32::from(self.size) { (at as u16, flags) } else { ((at - u32::from(self.size)) as u16, flags ^ TURN) }
    }

    /// Each chain was shown when it was added.
    #[inline(always)]
    pub(super) fn publish(&mut self, _: &RingCells<'_>) {}

    #[inline(always)]
    pub(super) fn needs_kick(&mut self, cells: &RingCells<'_>) -> bool {
        if self.count == self.told {
            return false;
        }
        self.tell(cells)
    }

    /// The same where there is something that the device was not told of.
    #[inline(always)]
    pub(super) fn tell(&mut self, cells: &RingCells<'_>) -> bool {
        // Orders the store of the head's flags before the load of what the device wants; the device does the opposite
        // before it sleeps.
        fence(Ordering::SeqCst);
        let wanted = u32::from_le(cells.events[1][0].load(Ordering::Relaxed));
        // EVENT_ENABLE.
        let wants = wanted & 3 << 16 == 0 || self.wants_this(wanted);
        self.told = self.count;
        wants
    }

    /// Whether a device wants to be told of what is new that does not want to be told of everything.
    #[cold]
    fn wants_this(&self, wanted: u32) -> bool {
        let (event, flags) = (wanted as u16, (wanted >> 16) as u16 & 3);
        match (flags, self.notifications) {
            (EVENT_DISABLE, _) => false,
            (EVENT_DESC, Notifications::EventIdx) => {
                // More than a lap is a lap: every event is among them.
                let untold = self.count.wrapping_sub(self.told).min(self.size.into()) as u32;
                packed_event_passed(event, self.added, self.lap == word(AVAIL), untold, self.size)
            }
            _ => true,
        }
    }

    /// Takes back the next chain that the device has used. After an error nothing is taken any more.
    #[inline(always)]
    pub(super) fn pop_used<'c, T>(
        &mut self,
        cells: &RingCells<'_>,
        chains: &'c mut Chains<T>,
    ) -> Result<Option<(Returned, &'c mut T)>, DeviceError> {
        // Acquire: orders this load before those of the buffers that came back. All of the word in one load, so that its
        // flags speak of the rest.
        let rest = self.next(cells, Ordering::Acquire);
        if rest & TURN != self.used {
            return if self.seen == u32::from(self.taken) { Err(self.unused(chains)) } else { Ok(None) };
        }
        match chains.take((rest >> 32) as u32 & 0xffff, rest as u32) {
            Ok((returned, entries, record)) => {
                // A lap is rare.
                let after = u32::from(self.taken) + u32::from(entries);
                if after < u32::from(self.size) {
                    self.taken = after as u16;
                } else {
                    self.end_lap(after);
                }
                Ok(Some((returned, record)))
            }
            Err(error) => {
                self.break_down();
                Err(error)
            }
        }
    }

    /// Nothing is taken any more, and there is nothing to tell of.
    #[cold]
    fn break_down(&mut self) {
        (self.used, self.seen, self.told) = (BROKEN, NOWHERE, self.count);
    }

    /// A device may not take back what it used: whoever looks again and again for what is said to be there would never
    /// come to an end, nor wait.
    #[cold]
    fn unused<T>(&mut self, chains: &mut Chains<T>) -> DeviceError {
        self.break_down();
        chains.free = 0;
        DeviceError::Unused { place: self.taken }
    }

    #[cold]
    fn end_lap(&mut self, after: u32) {
        self.taken = (after - u32::from(self.size)) as u16;
        self.used ^= TURN;
        self.seen = NOWHERE;
    }

    /// The second word of what the device used next, or did not.
    #[inline(always)]
    fn next(&self, cells: &RingCells<'_>, order: Ordering) -> u64 {
        u64::from_le(cells.descriptors[usize::from(self.taken)][1].load(order))
    }

    #[inline]
    pub(super) fn has_used(&self, cells: &RingCells<'_>) -> bool {
        // A hint: `pop_used` loads it again with the order that it needs.
        self.next(cells, Ordering::Relaxed) & TURN == self.used
    }

    pub(super) fn disable_callbacks(&mut self, cells: &RingCells<'_>) {
        set_event(cells, 0, EVENT_DISABLE);
    }

    pub(super) fn enable_callbacks<T>(
        &mut self,
        cells: &RingCells<'_>,
        chains: &mut Chains<T>,
    ) -> Result<bool, DeviceError> {
        match self.notifications {
            Notifications::Flags => set_event(cells, 0, EVENT_ENABLE),
            Notifications::EventIdx => {
                let taken = Cursor { index: self.taken, wrap: self.used != 0 };
                set_event(cells, taken.bits(), EVENT_DESC);
            }
        }
        // Orders the store above before the load of the next descriptor's flags; the device does the opposite.
        fence(Ordering::SeqCst);
        match self.next(cells, Ordering::Relaxed) & TURN == self.used {
            true if chains.are_all_back() => {
                self.break_down();
                chains.free = 0;
                Err(DeviceError::NothingUnderWay)
            }
            true => {
                self.seen = self.taken.into();
                Ok(true)
            }
            false => Ok(false),
        }
    }
}

/// The descriptor of a buffer in a chain that goes on or ends, where `lap` are the flags that make it available.
#[inline(always)]
fn in_ring(buffer: &Descriptor, id: u16, goes_on: bool, lap: u64) -> (u64, u64) {
    let flags = if goes_on { NEXT } else { 0 } | access_flag(buffer);
    let (addr, rest) = Raw { addr: buffer.addr, len: buffer.len, flags, link: id }.packed_words();
    (addr, rest | lap)
}

/// Writes the first descriptor of a chain, whose flags have the device look at the rest.
#[inline(always)]
fn show(cell: &[AtomicU64; 2], (addr, rest): (u64, u64)) {
    cell[0].store(addr.to_le(), Ordering::Relaxed);
    // Release: orders the stores of the rest of the chain, and of the buffers behind it, before this one.
    cell[1].store(rest.to_le(), Ordering::Release);
}

/// Both halves in one store, so that the device never sees a new flag with an old offset.
fn set_event(cells: &RingCells<'_>, event: u16, flags: u16) {
    let event = u32::from(event) | u32::from(flags) << 16;
    cells.events[0][0].store(event.to_le(), Ordering::Relaxed);
}
