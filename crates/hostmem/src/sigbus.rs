//! What keeps the process alive when a file shrinks under a mapping.
//!
//! The handler runs on a thread that was stopped between two instructions, maybe inside an allocator: it takes no lock,
//! allocates nothing and calls nothing but the kernel. What it reads are slots in a list that only ever grows, each
//! guarded by a sequence number.
//!
//! A fault loses the whole mapping, not one page: a guest's pages are many, each replaced alone would be a mapping of
//! its own to the kernel, and whoever shortens the file could make us run into the limit on those.

use rustix::io::Errno;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

/// The registration of one mapping.
#[derive(Debug)]
pub(crate) struct Watch(&'static Slot);

impl Watch {
    /// Whether the mapping has been replaced.
    pub(crate) fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Acquire)
    }

    /// Replaces the mapping, as if it had been lost: whoever touches it touches memory that nobody else sees. Whether it
    /// worked.
    pub(crate) fn lose(&self) -> bool {
        let (start, len) = (self.0.start.load(Ordering::Relaxed), self.0.len.load(Ordering::Relaxed));
        lose(self.0, start, len)
    }

    /// Forgets the mapping, which is about to go.
    pub(crate) fn end(&mut self) {
        self.0.write(0, 0);
        self.0.taken.store(false, Ordering::Release);
    }
}

/// Registers a mapping of `len` bytes. Nobody has touched it yet.
pub(crate) fn watch(base: NonNull<u8>, len: usize) -> Watch {
    let slot = Slot::take();
    slot.lost.store(false, Ordering::Release);
    slot.write(base.as_ptr().expose_provenance(), len);
    Watch(slot)
}

/// Installs the handler, once for the life of the process.
pub(crate) fn install() -> Result<(), Errno> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        let mut old = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: only asks; `old` is written where the call succeeds.
        let asked = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), old.as_mut_ptr()) };
        if asked != 0 {
            return Err(last_errno());
        }
        // SAFETY: written by the successful call above.
        let old = unsafe { old.assume_init() };
        // Before our own is in place: it may be needed from that moment on.
        BEFORE.store(Box::into_raw(Box::new(old)), Ordering::Release);
        take_place()
    })
}

fn take_place() -> Result<(), Errno> {
    // SAFETY: all zeroes is a valid `sigaction`: no flags, an empty mask.
    let mut new: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    new.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `handle` has the form that SA_SIGINFO asks for and keeps to what a handler may do.
    if unsafe { libc::sigaction(libc::SIGBUS, &new, ptr::null_mut()) } == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// One entry of the list. `start` and `len` belong together while `sequence` is even and stays the same.
#[derive(Debug)]
struct Slot {
    taken: AtomicBool,
    sequence: AtomicU32,
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
    next: AtomicPtr<Slot>,
}

/// The newest entry. Entries are used again, and never freed.
static NEWEST: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());

/// Who handled the signal before us.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

impl Slot {
    fn all() -> impl Iterator<Item = &'static Slot> {
        // SAFETY: entries are leaked boxes, published whole by the Release in `take` that this Acquire sees.
        let follow = |next: &AtomicPtr<Slot>| unsafe { next.load(Ordering::Acquire).as_ref() };
        std::iter::successors(follow(&NEWEST), move |slot| follow(&slot.next))
    }

    /// An entry that nobody uses, maybe a new one.
    fn take() -> &'static Slot {
        let free =
            |slot: &&Slot| slot.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if let Some(slot) = Slot::all().find(free) {
            return slot;
        }
        let slot: &'static Slot = Box::leak(Box::new(Slot {
            taken: AtomicBool::new(true),
            sequence: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
            next: AtomicPtr::new(ptr::null_mut()),
        }));
        let mut newest = NEWEST.load(Ordering::Acquire);
        loop {
            slot.next.store(newest, Ordering::Relaxed);
            let this = ptr::from_ref(slot).cast_mut();
            match NEWEST.compare_exchange_weak(newest, this, Ordering::Release, Ordering::Acquire) {
                Ok(_) => return slot,
                Err(other) => newest = other,
            }
        }
    }

    /// Only by whoever has taken the entry.
    fn write(&self, start: usize, len: usize) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        // Orders the odd number before the two fields, as seen by `read`.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        // Orders the two fields before the even number.
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// The range, unless it is being changed: then it is not one that anybody may be touching.
    fn read(&self) -> Option<(usize, usize)> {
        let before = self.sequence.load(Ordering::Acquire);
        let range = (self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        // Orders the two fields before the second look at the number.
        fence(Ordering::Acquire);
        (before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before).then_some(range)
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: errno is the thread's own; whoever we interrupted finds his again.
    let errno = unsafe { &mut *libc::__errno_location() };
    let interrupted = *errno;
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid `info`.
    let code = unsafe { (*info).si_code };
    let by_access = code == libc::BUS_ADRERR || code == libc::BUS_MCEERR_AR;
    // SAFETY: as above; only a fault has an address.
    let answered = by_access && replace(unsafe { (*info).si_addr() } as usize);
    if !answered {
        pass_on(signal, info, context, by_access);
    }
    *errno = interrupted;
}

/// Replaces the mapping around `addr` by zeroes. Whether there is one.
///
/// Two threads may fault at once. The second one replaces zeroes by zeroes: what was written in between goes where all
/// writes to lost memory go.
fn replace(addr: usize) -> bool {
    let hit = Slot::all().find_map(|slot| {
        let (start, len) = slot.read()?;
        (addr.wrapping_sub(start) < len).then_some((slot, start, len))
    });
    hit.is_some_and(|(slot, start, len)| lose(slot, start, len))
}

/// Maps zeroes over the mapping of `slot`. When this returns, no processor writes to what was there any more: the kernel
/// has taken it out of everybody's tables. Who is waiting for one of its pages finds the zeroes.
fn lose(slot: &Slot, start: usize, len: usize) -> bool {
    // Before the zeroes: whoever reads one finds the mark.
    slot.lost.store(true, Ordering::Release);
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is a mapping of this crate: it was registered whole, and is taken off the list before it is
    // unmapped, which cannot be now because somebody is touching it. Nothing refers to its bytes but `HostSlice`s, to
    // which any content is as good as any other.
    let at = unsafe { libc::mmap(start as *mut libc::c_void, len, protection, flags, -1, 0) };
    at != libc::MAP_FAILED
}

/// Does what would have been done without us.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, by_access: bool) {
    // SAFETY: stored by `install` before the handler could run, and never freed.
    let before = unsafe { BEFORE.load(Ordering::Acquire).as_ref() };
    let handler = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    match handler {
        libc::SIG_IGN if !by_access => {}
        libc::SIG_IGN | libc::SIG_DFL => {
            // SAFETY: plain system calls. The process ends: by doing the access again, or by the signal that waits
            // until this handler has returned.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                if !by_access {
                    libc::raise(signal);
                }
            }
        }
        handler => {
            let with_info = before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0);
            // SAFETY: the kernel would have called this address in the form that its flags say.
            unsafe {
                if with_info {
                    type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                    std::mem::transmute::<usize, Full>(handler)(signal, info, context);
                } else {
                    std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler)(signal);
                }
            }
            // A fault comes again if nobody did anything about it. A signal that was sent does not, and then this
            // process lives on; the standard library's handler has put the default in our place by now.
            if !by_access {
                let _ = take_place();
            }
        }
    }
}

#[cfg(test)]
mod tests;
