use super::{Came, Geometry, Operation, Started, Storage, StorageQueue, total};
use ringfence_dma::DetachedSlice;
use std::io;
use std::os::fd::BorrowedFd;

/// A disk that keeps nothing and ends every operation at once, for measuring what is around it.
///
/// A read leaves its pieces as they were: whoever asked gets back what it had there itself, so that nothing leaks and
/// no byte is touched.
#[derive(Debug)]
pub struct Null {
    geometry: Geometry,
}

impl Null {
    /// A disk of `capacity` bytes: a multiple of 512, not 0.
    pub fn new(capacity: u64, read_only: bool) -> Self {
        Self { geometry: Geometry { read_only, ..Geometry::plain(capacity) } }
    }
}

impl Storage for Null {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue(&self, _depth: u16) -> io::Result<Box<dyn StorageQueue>> {
        Ok(Box::new(NullQueue { geometry: self.geometry }))
    }
}

struct NullQueue {
    geometry: Geometry,
}

impl StorageQueue for NullQueue {
    unsafe fn start(&mut self, _token: u16, operation: Operation, pieces: &[DetachedSlice]) -> Started {
        Started::Done(self.geometry.admit(&operation, total(pieces)))
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completed(&mut self, _each: &mut dyn FnMut(u16, Came)) {}

    unsafe fn go_on(&mut self, _token: u16, _pieces: &[DetachedSlice]) -> Started {
        unreachable!("every operation is done when it was started")
    }

    fn forget(&mut self, _token: u16) {}

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn cancel(&mut self, _token: u16) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_dma::Ram;

    #[test]
    fn a_read_touches_nothing_and_bounds_hold() {
        let ram = Ram::new(4096);
        ram.slice(0, 4096).fill(7);
        let mut queue = Null::new(8192, false).open_queue(1).unwrap();
        let mut read = |offset| {
            // SAFETY: `ram` outlives the queue.
            unsafe { queue.start(0, Operation::Read { offset }, &[ram.slice(0, 4096).detach()]) }
        };
        assert!(matches!(read(4096), Started::Done(Ok(()))));
        assert!(matches!(read(4608), Started::Done(Err(_))));
        let mut bytes = [0; 4096];
        ram.slice(0, 4096).read(0, &mut bytes);
        assert!(bytes.iter().all(|&byte| byte == 7));
    }
}
