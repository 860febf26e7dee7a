//! What one thread last told another, who looks often and rarely finds something.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The last of what was told. What was told before it and not taken is forgotten.
#[derive(Debug)]
pub(crate) struct Latest<T> {
    told: Mutex<Option<T>>,
    /// Whether there is something. Changed under the lock alone: set after it, a value that had been taken meanwhile would
    /// be announced a second time, and be missing.
    is_new: AtomicBool,
}

impl<T> Latest<T> {
    pub(crate) fn new(first: T) -> Self {
        Self { told: Mutex::new(Some(first)), is_new: AtomicBool::new(true) }
    }

    pub(crate) fn tell(&self, value: T) {
        let mut told = self.lock();
        *told = Some(value);
        self.is_new.store(true, Ordering::Relaxed);
    }

    /// Whether there is something to take: a look without a lock, for who orders it by fences of his own.
    pub(crate) fn is_new(&self) -> bool {
        self.is_new.load(Ordering::Relaxed)
    }

    /// What was told last, once.
    #[inline]
    pub(crate) fn take(&self) -> Option<T> {
        if !self.is_new() {
            return None;
        }
        let mut told = self.lock();
        self.is_new.store(false, Ordering::Relaxed);
        told.take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two in a row, as of a front-end that unmasks an interrupt right after it has masked it, and a taker who comes
    /// between: he ends with the last, however that goes.
    #[test]
    fn whoever_takes_ends_with_what_was_told_last() {
        const LAST: u32 = 300_000;
        let latest = Latest::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| (1..=LAST).for_each(|value| latest.tell(value)));
            let mut known = 0;
            while known < LAST {
                let announced = latest.is_new();
                let taken = latest.take();
                assert!(taken.is_some() || !announced, "{known}, and then something that is nothing");
                if let Some(taken) = taken {
                    assert!(taken > known || taken == 0, "{taken} after {known}");
                    known = taken;
                }
            }
        });
        assert_eq!(latest.take(), None);
    }
}
