//! The driver's side: how memory is lent to one device and taken back.
//!
//! A platform implements [`Mapper`], once for each device; drivers use the two owned values made from it: [`Streaming`]
//! lends a buffer for the time of a request, [`Coherent`] is memory that both sides use all the time, for rings. Both
//! take the memory back when they are dropped.

use crate::{BusAddr, Gpa, Granules, HostSlice, Permission};
use core::fmt;
use core::marker::PhantomData;

/// A platform's way to lend memory to one device.
///
/// To be implemented by a platform and called through [`Streaming`] and [`Coherent`], which hand back to it exactly
/// what it handed out, once. What it guards against is the device: after [`unmap`](Self::unmap) has returned, nothing
/// that the device does reaches the memory.
///
/// The least that a platform without an IOMMU writes:
///
/// ```
/// use ringfence_dma::{Buffer, BusAddr, Coherent, DmaError, Gpa, HostSlice, Mapped, Mapper, Permission, Pool, Ram};
///
/// /// A device that sees all of memory, 2 GiB further up.
/// struct Shifted<'m> {
///     rings: Pool<'m>,
/// }
///
/// const SHIFT: u64 = 2 << 30;
///
/// impl Mapper for Shifted<'_> {
///     fn max_len(&self) -> usize {
///         usize::MAX
///     }
///
///     fn map(&self, buffer: Buffer<'_>, _: Permission) -> Result<Mapped, DmaError> {
///         let physical = buffer.physical();
///         let addr = physical.0.checked_add(SHIFT).ok_or(DmaError::Unreachable { physical })?;
///         Ok(Mapped { addr: BusAddr(addr), len: buffer.len(), cookie: 0 })
///     }
///
///     fn unmap(&self, _: Mapped, _: Buffer<'_>, _: Permission) {}
///
///     fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
///         let cookie = self.rings.take(len)?;
///         let buffer = self.rings.buffer().sub(cookie, len);
///         Ok((Mapped { cookie, ..self.map(buffer, Permission::ReadWrite)? }, buffer.memory()))
///     }
///
///     fn free(&self, mapped: Mapped) {
///         self.rings.give_back(mapped.cookie, mapped.len);
///     }
/// }
///
/// let ram = Ram::new(0x10000);
/// let mapper = Shifted { rings: Pool::new(Buffer::new(ram.slice(0x1000, 0x4000), Gpa(0x1000)), 4096) };
/// let ring = Coherent::allocate(&mapper, 100)?;
/// assert_eq!(ring.addr(), BusAddr(SHIFT + 0x1000));
/// # Ok::<(), DmaError>(())
/// ```
pub trait Mapper {
    /// The longest mapping, in bytes; not 0. Longer ones are turned down before [`map`](Self::map) is called.
    fn max_len(&self) -> usize;

    /// Lends `buffer` to the device, who may do with it what `permission` says. Not empty, and no longer than
    /// [`max_len`](Self::max_len).
    ///
    /// What shares a page with the buffer is lent with it where an IOMMU knows only pages: whoever does not want that
    /// starts and ends buffers on page boundaries, or copies (a bounce pool).
    ///
    /// # Errors
    /// Any [`DmaError`]; the device got nothing then.
    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError>;

    /// Takes back what [`map`](Self::map) handed out for the same buffer and permission, and has what the device wrote
    /// there in the buffer.
    ///
    /// Returns when the device can't reach it any more. An address for which that can't be had (an IOMMU that does not
    /// answer) is never handed out again.
    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission);

    /// Has what the driver wrote visible to the device (`Handover::ToDevice`), or the other way round, while a
    /// mapping goes on. Nothing to do where both see the same bytes all the time.
    fn sync(&self, mapped: &Mapped, buffer: Buffer<'_>, handover: Handover) {
        let _ = (mapped, buffer, handover);
    }

    /// Memory that device and driver both read and write for a long time without further ado: for rings. In one piece
    /// for both, and starts on a page boundary.
    ///
    /// It may have been in use before: [`Coherent`] clears it. The slice is good for as long as the mapper is, even
    /// after [`free`](Self::free): a mapper takes memory back into its own pool and not out of the world.
    ///
    /// # Errors
    /// Any [`DmaError`].
    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError>;

    /// Takes back what [`allocate`](Self::allocate) handed out, as [`unmap`](Self::unmap) does.
    fn free(&self, mapped: Mapped);
}

/// Memory of the driver's that may be lent to a device: in one piece, in physical memory too.
///
/// It is shared memory, so that there is no reference into it. A device that was told of it may write to it until the
/// mapping is undone; for a mapping that is leaked instead (`core::mem::forget`) until the device is reset. `'m` has to
/// cover that: it is the life of a pool, or `'static`, rather than that of a request.
#[derive(Clone, Copy, Debug)]
pub struct Buffer<'m> {
    memory: HostSlice<'m>,
    physical: Gpa,
}

impl<'m> Buffer<'m> {
    /// `memory`, which begins at `physical`. A buffer that passes the end of physical memory panics.
    #[inline]
    pub fn new(memory: HostSlice<'m>, physical: Gpa) -> Self {
        assert!(physical.checked_add(memory.len() as u64).is_some(), "{} bytes at {physical}", memory.len());
        Self { memory, physical }
    }

    /// The bytes.
    #[inline]
    pub fn memory(&self) -> HostSlice<'m> {
        self.memory
    }

    /// Where they are.
    #[inline]
    pub fn physical(&self) -> Gpa {
        self.physical
    }

    /// How many.
    #[inline]
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether there is none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` bytes from `offset`; out of bounds panics.
    #[inline]
    pub fn sub(&self, offset: usize, len: usize) -> Buffer<'m> {
        Buffer { memory: self.memory.sub(offset, len), physical: Gpa(self.physical.0 + offset as u64) }
    }
}

/// What a mapper hands out for a mapping, and gets back to undo it. Can't be copied, so that it is undone once.
#[derive(Debug)]
pub struct Mapped {
    /// The first byte, for the device.
    pub addr: BusAddr,
    /// How many bytes.
    pub len: usize,
    /// The mapper's own: whatever it needs to find its records.
    pub cookie: usize,
}

/// Whose turn it is with a mapping that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// The driver has written, the device is to see it.
    ToDevice,
    /// The device has written, the driver is to see it.
    FromDevice,
}

/// Why memory could not be lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaError {
    /// The buffer has no bytes.
    Empty,
    /// The buffer is longer than one mapping may be: cut it.
    TooLong {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The mapper's pool has no piece of that size left: wait for a request to complete.
    PoolFull {
        /// Bytes wanted.
        wanted: usize,
        /// Bytes left, perhaps scattered.
        free: usize,
    },
    /// The device's address space has no gap of that size left: wait for a request to complete.
    OutOfAddresses {
        /// Bytes wanted.
        wanted: usize,
    },
    /// The device can't be brought to reach this address at all.
    Unreachable {
        /// The address.
        physical: Gpa,
    },
    /// The platform failed for a reason of its own.
    Platform {
        /// Its error number.
        code: i32,
    },
}

impl DmaError {
    /// Whether it may work once some mapping has been undone.
    pub fn is_transient(self) -> bool {
        matches!(self, DmaError::PoolFull { .. } | DmaError::OutOfAddresses { .. })
    }
}

impl fmt::Display for DmaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DmaError::Empty => write!(f, "a buffer without a byte can't be mapped"),
            DmaError::TooLong { len, max } => write!(f, "a buffer of {len} bytes, one mapping covers {max} at most"),
            DmaError::PoolFull { wanted, free } => write!(f, "the pool is full: {wanted} bytes wanted, {free} left"),
            DmaError::OutOfAddresses { wanted } => write!(f, "no bus addresses left for {wanted} bytes"),
            DmaError::Unreachable { physical } => write!(f, "the device can't reach physical address {physical}"),
            DmaError::Platform { code } => write!(f, "the platform failed to map, error {code}"),
        }
    }
}

impl core::error::Error for DmaError {}

/// Which way the bytes of a mapping go, as a type.
pub trait Direction: Copy + sealed::Sealed {
    /// What the device may do.
    const PERMISSION: Permission;
}

/// A direction in which the device reads what the driver wrote.
pub trait DeviceReads: Direction {}

/// A direction in which the driver reads what the device wrote.
pub trait DeviceWrites: Direction {}

/// The device reads.
#[derive(Clone, Copy, Debug)]
pub struct ToDevice;

/// The device writes.
#[derive(Clone, Copy, Debug)]
pub struct FromDevice;

/// The device reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Both;

impl Direction for ToDevice {
    const PERMISSION: Permission = Permission::ReadOnly;
}
impl Direction for FromDevice {
    const PERMISSION: Permission = Permission::WriteOnly;
}
impl Direction for Both {
    const PERMISSION: Permission = Permission::ReadWrite;
}
impl DeviceReads for ToDevice {}
impl DeviceReads for Both {}
impl DeviceWrites for FromDevice {}
impl DeviceWrites for Both {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::ToDevice {}
    impl Sealed for super::FromDevice {}
    impl Sealed for super::Both {}
}

/// A buffer that is lent to the device, until this is dropped.
///
/// Nobody but the device has the bytes for that long: they come back from [`finish`](Self::finish). Which way they go is
/// known when it runs; where it is known before, [`Streaming`] has the compiler look after it.
#[derive(Debug)]
pub struct Loan<'a, M: Mapper + ?Sized> {
    mapper: &'a M,
    buffer: Buffer<'a>,
    mapped: Mapped,
    permission: Permission,
}

impl<'a, M: Mapper + ?Sized> Loan<'a, M> {
    /// Lends `buffer` to the device that `mapper` is for.
    ///
    /// # Errors
    /// [`DmaError::Empty`] and [`DmaError::TooLong`], and those of the mapper.
    #[inline]
    pub fn map(mapper: &'a M, buffer: Buffer<'a>, permission: Permission) -> Result<Self, DmaError> {
        let max = mapper.max_len();
        match buffer.len() {
            0 => return Err(DmaError::Empty),
            len if len > max => return Err(DmaError::TooLong { len, max }),
            _ => {}
        }
        let mapped = mapper.map(buffer, permission)?;
        Ok(Self { mapper, buffer, mapped, permission })
    }

    /// Where the device finds the first byte.
    #[inline]
    pub fn addr(&self) -> BusAddr {
        self.mapped.addr
    }

    /// How many bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "never empty, see `map`")]
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Takes the buffer back. What the device wrote is in it now, and does not change any more.
    #[inline]
    pub fn finish(self) -> Buffer<'a> {
        self.buffer
    }
}

impl<M: Mapper + ?Sized> Drop for Loan<'_, M> {
    #[inline]
    fn drop(&mut self) {
        self.mapper.unmap(take(&self.mapped), self.buffer, self.permission);
    }
}

/// A [`Loan`] whose direction is a type.
#[derive(Debug)]
pub struct Streaming<'a, M: Mapper + ?Sized, D: Direction> {
    loan: Loan<'a, M>,
    direction: PhantomData<D>,
}

impl<'a, M: Mapper + ?Sized, D: Direction> Streaming<'a, M, D> {
    /// Lends `buffer` to the device that `mapper` is for.
    ///
    /// # Errors
    /// As [`Loan::map`].
    #[inline]
    pub fn map(mapper: &'a M, buffer: Buffer<'a>, _direction: D) -> Result<Self, DmaError> {
        Ok(Self { loan: Loan::map(mapper, buffer, D::PERMISSION)?, direction: PhantomData })
    }

    /// Where the device finds the first byte.
    #[inline]
    pub fn addr(&self) -> BusAddr {
        self.loan.addr()
    }

    /// How many bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "never empty, see `map`")]
    pub fn len(&self) -> usize {
        self.loan.len()
    }

    /// Takes the buffer back. What the device wrote is in it now, and does not change any more.
    pub fn finish(self) -> Buffer<'a> {
        self.loan.finish()
    }
}

impl<M: Mapper + ?Sized, D: DeviceReads> Streaming<'_, M, D> {
    /// Writes into the buffer at `offset` while it is lent, and has the device see it. Out of bounds panics.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let Loan { mapper, buffer, mapped, .. } = &self.loan;
        buffer.memory.write(offset, from);
        mapper.sync(mapped, *buffer, Handover::ToDevice);
    }
}

impl<M: Mapper + ?Sized, D: DeviceWrites> Streaming<'_, M, D> {
    /// Reads from the buffer at `offset` while it is lent: what the device wrote so far. Out of bounds panics.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let Loan { mapper, buffer, mapped, .. } = &self.loan;
        mapper.sync(mapped, *buffer, Handover::FromDevice);
        buffer.memory.read(offset, into);
    }
}

/// Memory that the driver and the device both use, until this is dropped. Starts as zeroes, on a page boundary.
#[derive(Debug)]
pub struct Coherent<'a, M: Mapper + ?Sized> {
    mapper: &'a M,
    memory: HostSlice<'a>,
    mapped: Mapped,
}

impl<'a, M: Mapper + ?Sized> Coherent<'a, M> {
    /// `len` bytes for the device that `mapper` is for.
    ///
    /// # Errors
    /// [`DmaError::Empty`], and those of the mapper.
    pub fn allocate(mapper: &'a M, len: usize) -> Result<Self, DmaError> {
        if len == 0 {
            return Err(DmaError::Empty);
        }
        let (mapped, memory) = mapper.allocate(len)?;
        // Whoever had it before may have left a secret there.
        memory.fill(0);
        Ok(Self { mapper, memory, mapped })
    }

    /// Where the device finds the first byte.
    #[inline]
    pub fn addr(&self) -> BusAddr {
        self.mapped.addr
    }

    /// The bytes. They stay memory for as long as the mapper does; once this is dropped they may be somebody else's.
    #[inline]
    pub fn memory(&self) -> HostSlice<'a> {
        self.memory
    }
}

impl<M: Mapper + ?Sized> Drop for Coherent<'_, M> {
    fn drop(&mut self) {
        self.mapper.free(take(&self.mapped));
    }
}

/// The record of a value that is being dropped, so that nobody else will hand it back.
#[inline]
fn take(mapped: &Mapped) -> Mapped {
    let Mapped { addr, len, cookie } = *mapped;
    Mapped { addr, len, cookie }
}

/// A bounded pool of memory that mappers hand out pieces of: for coherent memory, and for bouncing.
///
/// Several threads may use it; two that race for the last pieces may both be told that it is full.
#[derive(Debug)]
pub struct Pool<'m> {
    buffer: Buffer<'m>,
    granule: usize,
    granules: Granules,
}

impl<'m> Pool<'m> {
    /// A pool over `buffer`, in pieces of whole `granule`s; a rest that is shorter stays unused.
    ///
    /// The granule is a power of two, and the buffer starts on a multiple of it; else this panics.
    pub fn new(buffer: Buffer<'m>, granule: usize) -> Self {
        assert!(granule.is_power_of_two(), "a granule of {granule} bytes");
        assert!(buffer.physical.0.is_multiple_of(granule as u64), "a pool of {granule} at {}", buffer.physical);
        Self { buffer, granule, granules: Granules::new(buffer.len() / granule) }
    }

    /// All of the memory.
    pub fn buffer(&self) -> Buffer<'m> {
        self.buffer
    }

    /// Bytes left, perhaps scattered.
    pub fn free(&self) -> usize {
        self.granules.free() * self.granule
    }

    /// A piece of `len` bytes, starting on a granule: its offset in the pool. `len` is not 0.
    ///
    /// # Errors
    /// [`DmaError::PoolFull`] where no run of that length is free.
    pub fn take(&self, len: usize) -> Result<usize, DmaError> {
        let first = self.granules.take(len.div_ceil(self.granule));
        let first = first.ok_or_else(|| DmaError::PoolFull { wanted: len, free: self.free() })?;
        Ok(first * self.granule)
    }

    /// Gives back what [`take`](Self::take) handed out for `len` at `offset`. Anything else panics.
    pub fn give_back(&self, offset: usize, len: usize) {
        assert!(offset.is_multiple_of(self.granule), "{len} bytes at {offset}");
        self.granules.give_back(offset / self.granule, len.div_ceil(self.granule));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ram;
    use alloc::vec::Vec;
    use core::cell::RefCell;

    const PAGE: usize = 4096;

    /// The strictest mapper: the device sees a copy, at an address that is nowhere near the buffer, for as long as the
    /// mapping lasts. Whoever forgets to map, to unmap or to sync sees other bytes than it should.
    struct Copying<'m> {
        pool: Pool<'m>,
        log: RefCell<Vec<&'static str>>,
    }

    const BUS: u64 = 0xffff_8000_0000_0000;

    impl<'m> Copying<'m> {
        fn new(ram: &'m Ram) -> Self {
            let buffer = Buffer::new(ram.slice(0, 4 * PAGE), Gpa(0));
            Self { pool: Pool::new(buffer, PAGE), log: RefCell::default() }
        }

        /// What the device has at `addr`.
        fn device(&self, addr: BusAddr, len: usize) -> HostSlice<'m> {
            self.pool.buffer().memory().sub((addr.0 - BUS) as usize, len)
        }

        fn copy(from: HostSlice<'_>, to: HostSlice<'_>) {
            let mut bytes = alloc::vec![0; from.len()];
            from.read(0, &mut bytes);
            to.write(0, &bytes);
        }
    }

    impl Mapper for Copying<'_> {
        fn max_len(&self) -> usize {
            2 * PAGE
        }

        fn map(&self, buffer: Buffer<'_>, _: Permission) -> Result<Mapped, DmaError> {
            self.log.borrow_mut().push("map");
            let cookie = self.pool.take(buffer.len())?;
            let mapped = Mapped { addr: BusAddr(BUS + cookie as u64), len: buffer.len(), cookie };
            Self::copy(buffer.memory(), self.device(mapped.addr, mapped.len));
            Ok(mapped)
        }

        fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
            self.log.borrow_mut().push("unmap");
            if permission != Permission::ReadOnly {
                self.sync(&mapped, buffer, Handover::FromDevice);
            }
            self.device(mapped.addr, mapped.len).fill(0xee);
            self.pool.give_back(mapped.cookie, mapped.len);
        }

        fn sync(&self, mapped: &Mapped, buffer: Buffer<'_>, handover: Handover) {
            let device = self.device(mapped.addr, mapped.len);
            match handover {
                Handover::ToDevice => Self::copy(buffer.memory(), device),
                Handover::FromDevice => Self::copy(device, buffer.memory()),
            }
        }

        fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
            let cookie = self.pool.take(len)?;
            let addr = BusAddr(BUS + cookie as u64);
            Ok((Mapped { addr, len, cookie }, self.device(addr, len)))
        }

        fn free(&self, mapped: Mapped) {
            self.pool.give_back(mapped.cookie, mapped.len);
        }
    }

    fn bytes(slice: HostSlice<'_>) -> Vec<u8> {
        let mut bytes = alloc::vec![0; slice.len()];
        slice.read(0, &mut bytes);
        bytes
    }

    #[test]
    fn a_mapping_lasts_until_it_is_dropped() {
        let (pool, ram) = (Ram::new(4 * PAGE), Ram::new(PAGE));
        let mapper = Copying::new(&pool);
        let buffer = Buffer::new(ram.slice(0, 8), Gpa(0x1000));

        buffer.memory().fill(1);
        let mapping = Streaming::map(&mapper, buffer, FromDevice).unwrap();
        mapper.device(mapping.addr(), 8).fill(2);
        assert_eq!(bytes(buffer.memory()), [1; 8], "not before it is undone");
        let buffer = mapping.finish();
        assert_eq!(bytes(buffer.memory()), [2; 8]);

        let mapping = Streaming::map(&mapper, buffer, ToDevice).unwrap();
        mapper.device(mapping.addr(), 8).fill(3);
        drop(mapping);
        assert_eq!(bytes(buffer.memory()), [2; 8], "the device was not to write");
        assert_eq!(*mapper.log.borrow(), ["map", "unmap", "map", "unmap"]);
        assert_eq!(mapper.pool.free(), 4 * PAGE);
    }

    #[test]
    fn a_mapping_in_both_directions_is_passed_to_and_fro() {
        let (pool, ram) = (Ram::new(4 * PAGE), Ram::new(PAGE));
        let mapper = Copying::new(&pool);
        let mapping = Streaming::map(&mapper, Buffer::new(ram.slice(0, 4), Gpa(0)), Both).unwrap();
        mapping.write(1, &[7, 7]);
        assert_eq!(bytes(mapper.device(mapping.addr(), 4)), [0, 7, 7, 0]);
        mapper.device(mapping.addr(), 4).fill(9);
        let mut seen = [0; 2];
        mapping.read(2, &mut seen);
        assert_eq!(seen, [9, 9]);
    }

    #[test]
    fn limits_are_typed() {
        let (pool, ram) = (Ram::new(4 * PAGE), Ram::new(4 * PAGE));
        let mapper = Copying::new(&pool);
        let map = |len| Streaming::map(&mapper, Buffer::new(ram.slice(0, len), Gpa(0)), ToDevice);
        assert_eq!(map(0).err(), Some(DmaError::Empty));
        assert_eq!(map(3 * PAGE).err(), Some(DmaError::TooLong { len: 3 * PAGE, max: 2 * PAGE }));
        let held = [map(2 * PAGE).unwrap(), map(PAGE + 1).unwrap()];
        let full = DmaError::PoolFull { wanted: 1, free: 0 };
        assert_eq!(map(1).err(), Some(full));
        assert!(full.is_transient());
        drop(held);
        assert!(map(1).is_ok());
    }

    #[test]
    fn coherent_memory_holds_nobodys_secrets_and_comes_back() {
        let pool = Ram::new(4 * PAGE);
        let mapper = Copying::new(&pool);
        pool.slice(0, 4 * PAGE).fill(0x5a);
        let coherent = Coherent::allocate(&mapper, PAGE + 1).unwrap();
        assert!(bytes(coherent.memory()).iter().all(|&byte| byte == 0));
        assert_eq!(mapper.pool.free(), 2 * PAGE);
        mapper.device(coherent.addr(), 1).fill(4);
        assert_eq!(bytes(coherent.memory())[0], 4, "both see the same bytes at once");
        drop(coherent);
        assert_eq!(mapper.pool.free(), 4 * PAGE);
        assert_eq!(Coherent::allocate(&mapper, 0).err(), Some(DmaError::Empty));
    }

    #[test]
    fn a_pool_never_hands_a_granule_out_twice_and_finds_every_gap() {
        let ram = Ram::new(130 * 64);
        let pool = Pool::new(Buffer::new(ram.slice(0, 130 * 64), Gpa(0)), 64);
        let mut owners = [None; 130];
        let mut held: Vec<(usize, usize)> = Vec::new();
        let mut random = 1_u32;
        for turn in 0..20_000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let len = (random >> 20) as usize % 640 + 1;
            let granules = len.div_ceil(64);
            if random & 0x100 == 0 && !held.is_empty() {
                let (offset, len) = held.swap_remove(random as usize / 512 % held.len());
                pool.give_back(offset, len);
                owners[offset / 64..offset / 64 + len.div_ceil(64)].fill(None);
            } else if let Ok(offset) = pool.take(len) {
                for owner in &mut owners[offset / 64..offset / 64 + granules] {
                    assert_eq!(owner.replace(turn), None);
                }
                held.push((offset, len));
            } else {
                assert!(owners.windows(granules).all(|run| run.iter().any(Option::is_some)), "a gap was missed");
            }
            assert_eq!(pool.free(), owners.iter().filter(|owner| owner.is_none()).count() * 64);
        }
    }
}
