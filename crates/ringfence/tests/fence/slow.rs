//! A disk that takes its time, and one that hangs.

use ringfence_device::storage::{Came, Geometry, Operation, Started, Storage, StorageQueue};
use ringfence_dma::DetachedSlice;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// How large the disks of these tests are.
pub(crate) const CAPACITY: u64 = 64 << 20;

/// What every 8 bytes of a sector hold. No stamp looks like it.
pub(crate) fn content(sector: u64) -> u64 {
    0xd15c_0000_0000_0000 | sector
}

/// Each operation takes as long as it is told to, give or take; reads bring [`content`].
pub(crate) struct Slow {
    delay: Duration,
    mood: Arc<AtomicU8>,
}

const WORKS: u8 = 0;
/// Nothing ends, but for what is cancelled.
const HANGS: u8 = 1;
/// Nothing ends.
const DEAD: u8 = 2;

impl Slow {
    pub(crate) fn new(delay: Duration) -> Self {
        Self { delay, mood: Arc::new(AtomicU8::new(WORKS)) }
    }

    pub(crate) fn hang(&self, lets_go: bool) {
        self.mood.store(if lets_go { HANGS } else { DEAD }, Ordering::SeqCst);
    }

    pub(crate) fn recover(&self) {
        self.mood.store(WORKS, Ordering::SeqCst);
    }
}

impl Storage for Slow {
    fn geometry(&self) -> Geometry {
        Geometry {
            capacity: CAPACITY,
            block_size: 512,
            physical_block_size: 512,
            optimal_size: 0,
            read_only: false,
            discard: true,
            discard_alignment: 512,
            write_zeroes: true,
        }
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn StorageQueue>> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Box::new(SlowQueue {
            delay: self.delay,
            mood: Arc::clone(&self.mood),
            random: 1,
            under_way: (0..depth).map(|_| None).collect(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
        }))
    }
}

struct SlowQueue {
    delay: Duration,
    mood: Arc<AtomicU8>,
    random: u64,
    under_way: Vec<Option<Under>>,
    /// Readable now and then: whoever polls comes by often enough.
    timer: OwnedFd,
}

#[derive(Clone, Copy)]
struct Under {
    operation: Operation,
    due: Instant,
    told: bool,
    cancelled: bool,
}

impl StorageQueue for SlowQueue {
    unsafe fn start(&mut self, token: u16, operation: Operation, pieces: &[DetachedSlice]) -> Started {
        if let Operation::Write { .. } = operation {
            let mut sum = 0;
            // SAFETY: the pieces are good during this call.
            pieces.iter().for_each(|piece| sum ^= unsafe { piece.attach() }.load_u64(0, Ordering::Relaxed));
            std::hint::black_box(sum);
        }
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let due = Instant::now() + self.delay.mul_f64((self.random >> 40) as f64 / (1_u64 << 23) as f64);
        let before =
            self.under_way[usize::from(token)].replace(Under { operation, due, told: false, cancelled: false });
        assert!(before.is_none(), "token {token} is under way already");
        Started::Pending
    }

    fn submit(&mut self) -> io::Result<()> {
        let step = Timespec { tv_sec: 0, tv_nsec: 200_000 };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: step, it_value: step })?;
        Ok(())
    }

    fn completed(&mut self, each: &mut dyn FnMut(u16, Came)) {
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        let mood = self.mood.load(Ordering::SeqCst);
        let now = Instant::now();
        for (token, slot) in self.under_way.iter_mut().enumerate() {
            let Some(under) = slot else { continue };
            if under.cancelled && mood != DEAD {
                *slot = None;
                each(token as u16, Came::End(Err(io::Error::from_raw_os_error(libc::ECANCELED))));
            } else if mood == WORKS && !under.told && under.due <= now {
                if let Operation::Read { .. } = under.operation {
                    under.told = true;
                    each(token as u16, Came::Data { done: 0 });
                } else {
                    *slot = None;
                    each(token as u16, Came::End(Ok(())));
                }
            }
        }
    }

    unsafe fn go_on(&mut self, token: u16, pieces: &[DetachedSlice]) -> Started {
        let Some(Under { operation: Operation::Read { offset }, told: true, .. }) =
            self.under_way[usize::from(token)].take()
        else {
            panic!("token {token} goes on and had not come back")
        };
        let mut at = offset;
        for piece in pieces {
            // SAFETY: the pieces are good during this call.
            let piece = unsafe { piece.attach() };
            for part in (0..piece.len()).step_by(512) {
                let bytes = content((at + part as u64) / 512).to_ne_bytes().repeat(64);
                piece.write(part, &bytes[..(piece.len() - part).min(512)]);
            }
            at += piece.len() as u64;
        }
        Started::Done(Ok(()))
    }

    fn forget(&mut self, token: u16) {
        assert!(self.under_way[usize::from(token)].take().is_some_and(|under| under.told));
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.timer.as_fd())
    }

    fn cancel(&mut self, token: u16) {
        if let Some(under) = &mut self.under_way[usize::from(token)] {
            under.cancelled = true;
        }
    }
}

/// As the trait has it: waits for what is under way.
impl Drop for SlowQueue {
    fn drop(&mut self) {
        while self.under_way.iter().flatten().any(|under| !under.told) && self.mood.load(Ordering::SeqCst) == DEAD {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
