use core::cell::UnsafeCell;
use core::hint;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, Ordering};

/// A spin lock, for what is short: without std there is nothing to sleep on.
///
/// A kernel whose interrupt handlers come by it too keeps interrupts off meanwhile: a handler that spins for what it
/// interrupted spins for ever.
#[derive(Debug, Default)]
pub struct Lock<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `lock` hands the value to one thread at a time; it may move between threads because T may.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// Free, with this in it.
    pub const fn new(value: T) -> Self {
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Waits for its turn.
    pub fn lock(&self) -> Locked<'_, T> {
        // Acquire, after the Release of whoever had it before: what it wrote comes before what we read.
        while self.taken.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            hint::spin_loop();
        }
        Locked { lock: self }
    }
}

/// A [`Lock`] that is held, until this is dropped.
#[derive(Debug)]
pub struct Locked<'l, T> {
    lock: &'l Lock<T>,
}

// SAFETY: only `&T` can be had from a shared guard. (Without this the guard of any `T: Send` would be Sync.)
unsafe impl<T: Sync> Sync for Locked<'_, T> {}

impl<T> Deref for Locked<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `taken` was set by us in `lock` and is until we are dropped: nobody else has a guard.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Locked<'_, T> {
    fn drop(&mut self) {
        self.lock.taken.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;

    #[test]
    fn one_at_a_time() {
        let lock = Lock::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| *lock.lock() += 1));
            }
        });
        assert_eq!(*lock.lock(), 40_000);
    }
}
