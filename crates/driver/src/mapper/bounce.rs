use super::PAGE;
use ringfence_dma::{
    Both, Buffer, BusAddr, DmaError, Handover, HostSlice, Mapped, Mapper, Permission, Pool, Streaming,
};

/// A bounded pool that is mapped once; each buffer is copied into it, or out of it. The device never sees the driver's
/// own memory, not even what shares a page with a buffer.
#[derive(Debug)]
pub struct Bounce<'a, M: Mapper + ?Sized> {
    pool: Pool<'a>,
    addr: BusAddr,
    max_len: usize,
    _mapping: Streaming<'a, M, Both>,
}

impl<'a, M: Mapper + ?Sized> Bounce<'a, M> {
    /// Maps `pool` through `inner`, a mapper whose device sees the driver's own bytes. Rings come from the pool too.
    /// No buffer takes more than `max_len` of it at once, so that one request can't starve the others.
    ///
    /// Panics where `pool` does not start on a page of 4096 bytes, or `max_len` is 0.
    ///
    /// # Errors
    /// Those of [`Streaming::map`].
    pub fn new(inner: &'a M, pool: Buffer<'a>, max_len: usize) -> Result<Self, DmaError> {
        assert!(max_len > 0, "a pool that nothing may be taken from");
        let mapping = Streaming::map(inner, pool, Both)?;
        Ok(Self { pool: Pool::new(pool, PAGE), addr: mapping.addr(), max_len, _mapping: mapping })
    }

    /// Bytes of the pool that are free, perhaps scattered: all of them again when a driver has forgotten nothing.
    pub fn free(&self) -> usize {
        self.pool.free()
    }

    fn piece(&self, offset: usize, len: usize) -> HostSlice<'a> {
        self.pool.buffer().sub(offset, len).memory()
    }

    fn take(&self, len: usize) -> Result<(Mapped, HostSlice<'a>), DmaError> {
        let cookie = self.pool.take(len)?;
        Ok((Mapped { addr: BusAddr(self.addr.0 + cookie as u64), len, cookie }, self.piece(cookie, len)))
    }
}

impl<M: Mapper + ?Sized> Mapper for Bounce<'_, M> {
    fn max_len(&self) -> usize {
        self.max_len
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        let (mapped, piece) = self.take(buffer.len())?;
        match permission {
            Permission::ReadOnly | Permission::ReadWrite => copy(buffer.memory(), piece),
            // Cleared: a device that claims to have written and has not would otherwise pass an earlier request's bytes
            // on to this one. Copying the buffer in instead would show the device what it has no business to read.
            Permission::WriteOnly => piece.fill(0),
        }
        Ok(mapped)
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        if permission != Permission::ReadOnly {
            copy(self.piece(mapped.cookie, mapped.len), buffer.memory());
        }
        self.pool.give_back(mapped.cookie, mapped.len);
    }

    fn sync(&self, mapped: &Mapped, buffer: Buffer<'_>, handover: Handover) {
        let piece = self.piece(mapped.cookie, mapped.len);
        match handover {
            Handover::ToDevice => copy(buffer.memory(), piece),
            Handover::FromDevice => copy(piece, buffer.memory()),
        }
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.take(len)
    }

    fn free(&self, mapped: Mapped) {
        self.pool.give_back(mapped.cookie, mapped.len);
    }
}

/// Copies between two slices of one length, by way of a little memory of our own: there are no references into either.
fn copy(from: HostSlice<'_>, to: HostSlice<'_>) {
    let mut bytes = [0; 512];
    for offset in (0..from.len()).step_by(bytes.len()) {
        let chunk = &mut bytes[..from.len().min(offset + 512) - offset];
        from.read(offset, chunk);
        to.write(offset, chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapper::Direct;
    use alloc::vec::Vec;
    use ringfence_dma::{Coherent, FromDevice, Gpa, Ram, ToDevice};

    fn bytes(slice: HostSlice<'_>) -> Vec<u8> {
        let mut bytes = alloc::vec![0; slice.len()];
        slice.read(0, &mut bytes);
        bytes
    }

    #[test]
    fn the_device_sees_a_copy_and_no_earlier_secrets_pass() {
        let ram = Ram::new(16 * PAGE);
        let buffer = |at: usize, len| Buffer::new(ram.slice(at, len), Gpa(at as u64));
        let direct = Direct::new(buffer(0, PAGE));
        let mapper = Bounce::new(&direct, buffer(PAGE, 4 * PAGE), 2 * PAGE).unwrap();
        let device = |addr: BusAddr, len| ram.slice(addr.0 as usize, len);

        let data = buffer(8 * PAGE + 100, PAGE + 1000);
        data.memory().fill(0x11);
        let written = Streaming::map(&mapper, data, ToDevice).unwrap();
        assert_eq!(bytes(device(written.addr(), data.len())), bytes(data.memory()));
        device(written.addr(), data.len()).fill(0x22);
        let addr = written.addr();
        drop(written);
        assert!(bytes(data.memory()).iter().all(|&byte| byte == 0x11), "the device was not to write");

        // The same piece again, which still holds 0x22.
        let other = buffer(12 * PAGE, 4 * PAGE - 5).sub(0, PAGE + 1000);
        other.memory().fill(0x33);
        let mut held = Vec::new();
        let read = loop {
            let read = Streaming::map(&mapper, other, FromDevice).unwrap();
            if read.addr() == addr {
                break read;
            }
            held.push(read);
        };
        assert!(bytes(device(addr, data.len())).iter().all(|&byte| byte == 0), "neither 0x22 nor 0x33");
        device(addr, 3).fill(0x44);
        assert_eq!(bytes(other.memory())[0], 0x33, "not before the mapping is undone");
        let back = read.finish();
        assert_eq!(bytes(back.memory())[..4], [0x44, 0x44, 0x44, 0]);
    }

    #[test]
    fn a_full_pool_is_said_to_be_full_and_recovers() {
        let ram = Ram::new(16 * PAGE);
        let buffer = |at: usize, len| Buffer::new(ram.slice(at, len), Gpa(at as u64));
        let direct = Direct::new(buffer(0, PAGE));
        let mapper = Bounce::new(&direct, buffer(PAGE, 4 * PAGE), 2 * PAGE).unwrap();
        let ring = Coherent::allocate(&mapper, PAGE).unwrap();
        let map = |len| Streaming::map(&mapper, buffer(8 * PAGE, len), ToDevice);
        let held = map(2 * PAGE).unwrap();
        assert_eq!(map(PAGE + 1).err(), Some(DmaError::PoolFull { wanted: PAGE + 1, free: PAGE }));
        assert_eq!(map(2 * PAGE + 1).err(), Some(DmaError::TooLong { len: 2 * PAGE + 1, max: 2 * PAGE }));
        drop(held);
        drop(ring);
        assert!(map(PAGE + 1).is_ok());
        assert_eq!(mapper.free(), 4 * PAGE);
    }
}
