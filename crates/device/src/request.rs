use ringfence_dma::{DetachedSlice, HostSlice};
use ringfence_ring::Descriptor;
use std::marker::PhantomData;

/// A request whose bytes can be reached for as long as `'l`: all of them when it starts, or those to be read where the
/// handler starts unseen, and when it goes on those from where its handler said on.
#[derive(Clone, Copy, Debug)]
pub struct Request<'l> {
    /// What the driver wrote for the device to read.
    pub readable: Pieces<'l>,
    /// Where the device's answer goes.
    pub writable: Pieces<'l>,
    /// Both as the driver cut them. A device makes nothing of that (§2.7.4.1); who passes the request on keeps it.
    pub buffers: &'l [Descriptor],
}

/// One half of a request: bytes in order, scattered over memory.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'l> {
    pieces: &'l [DetachedSlice],
    /// Those before are out of reach.
    from: u32,
    len: u32,
    visit: PhantomData<HostSlice<'l>>,
}

impl<'l> Pieces<'l> {
    /// `len` bytes, of which `pieces` are those from `from` on, in order.
    ///
    /// # Safety
    /// Every piece is good for all of `'l`, as in [`DetachedSlice::attach`].
    pub(crate) unsafe fn new(pieces: &'l [DetachedSlice], from: u32, len: u32) -> Self {
        Self { pieces, from, len, visit: PhantomData }
    }

    /// How many bytes, within reach or not.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the bytes from `offset` out; `false`, and nothing copied, where there are fewer within reach.
    #[inline]
    pub fn read(&self, offset: u32, into: &mut [u8]) -> bool {
        self.each(offset, into.len(), |at, piece| piece.read(0, &mut into[at..at + piece.len()]))
    }

    /// Copies `from` to `offset`; `false`, and nothing copied, where they are not within reach.
    #[inline]
    pub fn write(&self, offset: u32, from: &[u8]) -> bool {
        self.each(offset, from.len(), |at, piece| piece.write(0, &from[at..at + piece.len()]))
    }

    /// Copies as many bytes from `offset` as `into` has; `false`, and nothing copied, where there are fewer.
    #[inline]
    pub fn copy_to(&self, offset: u32, into: HostSlice<'_>) -> bool {
        self.each(offset, into.len(), |at, piece| into.copy_from(at, piece))
    }

    /// Copies all of `from` to `offset`; `false`, and nothing copied, where it does not fit.
    #[inline]
    pub fn copy_from(&self, offset: u32, from: HostSlice<'_>) -> bool {
        self.each(offset, from.len(), |at, piece| piece.copy_from(0, from.sub(at, piece.len())))
    }

    /// Appends the pieces of `len` bytes from `offset` to `into`; `false`, and nothing appended, where they are
    /// not within reach.
    #[inline]
    pub fn extract(&self, offset: u32, len: u32, into: &mut Vec<DetachedSlice>) -> bool {
        self.each(offset, len as usize, |_, piece| into.push(piece.detach()))
    }

    #[inline]
    fn each(&self, offset: u32, len: usize, mut each: impl FnMut(usize, HostSlice<'l>)) -> bool {
        if offset < self.from || offset as usize + len > self.len as usize {
            return false;
        }
        let (mut skip, mut done) = ((offset - self.from) as usize, 0);
        for piece in self.pieces {
            if done == len {
                break;
            }
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            // SAFETY: good for 'l by the contract of `new`.
            let piece = unsafe { piece.attach::<'l>() };
            let here = piece.sub(skip, (piece.len() - skip).min(len - done));
            each(done, here);
            done += here.len();
            skip = 0;
        }
        true
    }
}

/// A request of which some byte can't be reached.
#[derive(Clone, Copy)]
pub struct Unreachable<'l> {
    /// How long the device-writable part was meant to be.
    pub writable_len: u32,
    pub(crate) write: &'l dyn Fn(u32, &[u8]) -> bool,
}

impl Unreachable<'_> {
    /// Copies `from` to `offset` in the writable part; `false` where those bytes too are out of reach.
    pub fn write(&self, offset: u32, from: &[u8]) -> bool {
        (self.write)(offset, from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_dma::Ram;

    #[test]
    fn bytes_are_in_order_whatever_the_pieces() {
        let ram = Ram::new(4096);
        let pieces: Vec<_> = [(100, 3), (50, 1), (200, 4)].map(|(at, len)| ram.slice(at, len).detach()).into();
        // SAFETY: `ram` outlives `all`.
        let all = unsafe { Pieces::new(&pieces, 0, 8) };
        assert!(all.write(0, b"abcdefgh"));
        let mut back = [0; 5];
        assert!(all.read(2, &mut back));
        assert_eq!(&back, b"cdefg");
        let mut second = [0; 1];
        ram.slice(50, 1).read(0, &mut second);
        assert_eq!(&second, b"d");

        let mut part = Vec::new();
        assert!(all.extract(1, 4, &mut part));
        assert_eq!(part.iter().map(|piece| piece.len()).collect::<Vec<_>>(), [2, 1, 1]);
        assert!(!all.extract(5, 4, &mut part), "runs past the end");
        assert!(!all.write(8, b"x"));
        assert!(all.read(8, &mut []));

        // SAFETY: as above.
        let rest = unsafe { Pieces::new(&pieces[1..], 3, 8) };
        let mut back = [0; 4];
        assert!(rest.read(3, &mut back));
        assert_eq!(&back, b"defg");
        assert!(!rest.read(2, &mut back), "out of reach");

        let mut back = [0; 5];
        let other = ram.slice(1000, 5);
        assert!(all.copy_to(2, other));
        other.read(0, &mut back);
        assert_eq!(&back, b"cdefg");
        other.write(0, b"CDEFG");
        assert!(all.copy_from(3, other));
        assert!(all.read(3, &mut back));
        assert_eq!(&back, b"CDEFG");
        assert!(!all.copy_from(4, other) && !all.copy_to(4, other), "runs past the end");
    }
}
