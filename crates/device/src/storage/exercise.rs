//! What every back-end is put through, and what tests drive one with.

use super::{Came, Durability, Geometry, Operation, Started, Storage, StorageQueue, total};
use ringfence_dma::{DetachedSlice, Ram};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io;

/// A queue and the memory that its operations use.
pub(super) struct Driver {
    // Before the memory, so that it is dropped first.
    pub(super) queue: Box<dyn StorageQueue>,
    pub(super) ram: Ram,
    /// By token.
    pieces: BTreeMap<u16, Vec<(usize, usize)>>,
}

impl Driver {
    pub(super) fn new(queue: Box<dyn StorageQueue>, memory: usize) -> Self {
        Self { queue, ram: Ram::new(memory), pieces: BTreeMap::new() }
    }

    pub(super) fn start(&mut self, token: u16, operation: Operation, pieces: &[(usize, usize)]) -> Started {
        self.pieces.insert(token, pieces.to_vec());
        // SAFETY: `ram` is there during this call.
        unsafe { self.queue.start(token, operation, &self.left(token, 0)) }
    }

    /// The pieces of an operation of which so many bytes are done.
    fn left(&self, token: u16, mut done: u64) -> Vec<DetachedSlice> {
        let mut left = Vec::new();
        for &(at, len) in &self.pieces[&token] {
            let skip = done.min(len as u64) as usize;
            done -= skip as u64;
            if skip < len {
                left.push(self.ram.slice(at + skip, len - skip).detach());
            }
        }
        left
    }

    /// Waits until at least one operation has ended.
    pub(super) fn wait(&mut self) -> Vec<(u16, io::Result<()>)> {
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        let mut ended = Vec::new();
        while ended.is_empty() {
            self.queue.submit().unwrap();
            let mut came = Vec::new();
            self.queue.completed(&mut |token, how| came.push((token, how)));
            if came.is_empty() {
                let fd = self.queue.completion_fd().expect("something is under way");
                let ready = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&limit)).unwrap();
                assert_eq!(ready, 1, "nothing ended within ten seconds");
            }
            for (token, how) in came {
                match how {
                    Came::End(result) => ended.push((token, result)),
                    Came::Data { done } => {
                        let left = self.left(token, done);
                        // SAFETY: `ram` is there during this call.
                        if let Started::Done(result) = unsafe { self.queue.go_on(token, &left) } {
                            ended.push((token, result));
                        }
                    }
                }
            }
        }
        ended
    }

    /// Carries one operation out.
    pub(super) fn run(&mut self, operation: Operation, pieces: &[(usize, usize)]) -> io::Result<()> {
        match self.start(0, operation, pieces) {
            Started::Done(result) => result,
            Started::Pending => {
                let ended = self.wait();
                let [(0, result)] = <[_; 1]>::try_from(ended).unwrap() else { panic!("another token than given") };
                result
            }
        }
    }

    pub(super) fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.ram.slice(0, len).fill(0xee);
        self.run(Operation::Read { offset }, &[(0, len)])?;
        Ok(self.peek(0, len))
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.ram.slice(0, bytes.len()).write(0, bytes);
        self.run(Operation::Write { offset, durability: Durability::Cached }, &[(0, bytes.len())])
    }

    pub(super) fn peek(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.slice(at, len).read(0, &mut bytes);
        bytes
    }
}

/// Numbers that look random, and are the same each time.
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// What `exercise` makes its disks of.
pub(super) const CAPACITY: usize = 1 << 20;

/// Puts an all-zero disk of [`CAPACITY`] through everything that is the same for all.
pub(super) fn exercise(storage: &dyn Storage) {
    let Geometry { capacity, read_only, .. } = storage.geometry();
    assert_eq!((capacity, read_only), (CAPACITY as u64, false));
    follows_a_model(storage);
    keeps_many_under_way(storage);
    refuses_what_lies_beyond(storage);
    forgets_no_token_on_the_way_out(storage);
}

/// Scattered reads, writes, zeroes, discards and flushes against a plain array.
fn follows_a_model(storage: &dyn Storage) {
    let mut model = vec![0_u8; CAPACITY];
    let mut driver = Driver::new(storage.open_queue(1).unwrap(), 1 << 20);
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    for round in 0..600 {
        let offset = numbers.below(CAPACITY / 512) * 512;
        let len = ((1 + numbers.below(128)) * 512).min(CAPACITY - offset);
        let range = offset..offset + len;
        let (offset, kind) = (offset as u64, numbers.below(8));
        match kind {
            0..3 => {
                let pieces = scattered(&mut numbers, len);
                for &(at, len) in &pieces {
                    driver.ram.slice(at, len).fill(0xee);
                }
                driver.run(Operation::Read { offset }, &pieces).unwrap();
                let read: Vec<_> = pieces.iter().flat_map(|&(at, len)| driver.peek(at, len)).collect();
                assert!(read == model[range], "round {round}: {len} bytes at {offset}");
            }
            3..6 => {
                let pieces = scattered(&mut numbers, len);
                let bytes: Vec<_> = (0..len).map(|_| numbers.below(256) as u8).collect();
                let mut rest = &bytes[..];
                for &(at, len) in &pieces {
                    driver.ram.slice(at, len).write(0, &rest[..len]);
                    rest = &rest[len..];
                }
                let durability = if round % 16 == 0 { Durability::Durable } else { Durability::Cached };
                driver.run(Operation::Write { offset, durability }, &pieces).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            6 => {
                if round % 2 == 0 {
                    driver.run(Operation::Discard { offset, len: len as u64 }, &[]).unwrap();
                }
                let unmap = numbers.below(2) == 0;
                driver.run(Operation::WriteZeroes { offset, len: len as u64, unmap }, &[]).unwrap();
                model[range].fill(0);
            }
            _ => driver.run(Operation::Flush, &[]).unwrap(),
        }
    }
    for offset in (0..CAPACITY).step_by(1 << 16) {
        assert!(driver.read(offset as u64, 1 << 16).unwrap() == model[offset..offset + (1 << 16)], "at {offset}");
    }
}

/// `len` bytes of memory in pieces of any length, in no order, none overlapping.
fn scattered(numbers: &mut Numbers, len: usize) -> Vec<(usize, usize)> {
    let (mut pieces, mut left, mut at) = (Vec::new(), len, numbers.below(64));
    while left > 0 {
        let here = (1 + numbers.below(20_000)).min(left);
        pieces.push((at, here));
        at += here + numbers.below(64);
        left -= here;
    }
    let swaps = pieces.len();
    for index in 0..swaps {
        pieces.swap(index, numbers.below(swaps));
    }
    pieces
}

fn keeps_many_under_way(storage: &dyn Storage) {
    const DEPTH: usize = 256;
    const BLOCK: usize = CAPACITY / DEPTH;
    let mut driver = Driver::new(storage.open_queue(DEPTH as u16).unwrap(), CAPACITY);
    for index in 0..DEPTH {
        driver.ram.slice(index * BLOCK, BLOCK).fill(index as u8);
    }
    let write = |index: usize| Operation::Write { offset: (index * BLOCK) as u64, durability: Durability::Cached };
    all_at_once(&mut driver, DEPTH, |index| (write(index), (index * BLOCK, BLOCK)));
    driver.ram.slice(0, CAPACITY).fill(0xee);
    // Each block where another one was.
    let read = |index: usize| Operation::Read { offset: ((DEPTH - 1 - index) * BLOCK) as u64 };
    all_at_once(&mut driver, DEPTH, |index| (read(index), (index * BLOCK, BLOCK)));
    for index in 0..DEPTH {
        assert_eq!(driver.peek(index * BLOCK, BLOCK), vec![(DEPTH - 1 - index) as u8; BLOCK], "block {index}");
    }
}

fn all_at_once(driver: &mut Driver, count: usize, operation: impl Fn(usize) -> (Operation, (usize, usize))) {
    let start = |index| {
        let (operation, piece) = operation(index);
        match driver.start(index as u16, operation, &[piece]) {
            Started::Done(result) => result.map(|()| false),
            Started::Pending => Ok(true),
        }
    };
    let mut under_way: Vec<bool> = (0..count).map(start).collect::<Result<_, _>>().unwrap();
    while under_way.contains(&true) {
        for (token, result) in driver.wait() {
            result.unwrap();
            assert!(std::mem::take(&mut under_way[usize::from(token)]), "token {token} came back twice");
        }
    }
}

fn refuses_what_lies_beyond(storage: &dyn Storage) {
    let mut driver = Driver::new(storage.open_queue(1).unwrap(), 8192);
    let end = CAPACITY as u64;
    let before = driver.read(end - 512, 512).unwrap();
    for offset in [end, end - 512, u64::MAX - 511] {
        for operation in [Operation::Read { offset }, Operation::Write { offset, durability: Durability::Durable }] {
            let refused = driver.run(operation, &[(0, 512), (4096, 512)]).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{operation:?}");
        }
        let erase =
            [Operation::Discard { offset, len: 1024 }, Operation::WriteZeroes { offset, len: 1024, unmap: true }];
        for operation in erase {
            assert_eq!(driver.run(operation, &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{operation:?}");
        }
    }
    assert_eq!(driver.read(end - 512, 512).unwrap(), before);
    driver.run(Operation::Read { offset: end }, &[]).unwrap();
    driver.run(Operation::Discard { offset: end, len: 0 }, &[]).unwrap();
    driver.run(Operation::WriteZeroes { offset: end, len: 0, unmap: false }, &[]).unwrap();
    // None is under way, and this one never can be.
    driver.queue.cancel(0);
    driver.queue.cancel(u16::MAX);
    driver.read(0, 512).unwrap();
}

/// A queue that goes with operations under way leaves memory alone from then on.
fn forgets_no_token_on_the_way_out(storage: &dyn Storage) {
    let ram = Ram::new(CAPACITY);
    for submitted in [true, false] {
        let mut queue = storage.open_queue(64).unwrap();
        for token in 0..64 {
            let at = usize::from(token) * (CAPACITY / 64);
            let piece = ram.slice(at, CAPACITY / 64).detach();
            // SAFETY: `ram` outlives the queue.
            let _ = unsafe { queue.start(token, Operation::Read { offset: at as u64 }, &[piece]) };
        }
        if submitted {
            queue.submit().unwrap();
        }
        drop(queue);
        untouched_from_now_on(&ram);
    }
}

/// Watches memory for a while.
pub(super) fn untouched_from_now_on(ram: &Ram) {
    let look = || {
        let mut bytes = vec![0; ram.len()];
        ram.slice(0, ram.len()).read(0, &mut bytes);
        bytes
    };
    let now = look();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(look() == now, "memory was written after its queue had gone");
}

/// What a read-only disk lets happen.
pub(super) fn refuses_every_change(storage: &dyn Storage) {
    assert!(storage.geometry().read_only);
    let mut driver = Driver::new(storage.open_queue(4).unwrap(), 4096);
    let before = driver.read(0, 4096).unwrap();
    for operation in [
        Operation::Write { offset: 0, durability: Durability::Cached },
        Operation::Discard { offset: 0, len: 512 },
        Operation::WriteZeroes { offset: 0, len: 512, unmap: true },
    ] {
        let pieces: &[_] = if matches!(operation, Operation::Write { .. }) { &[(0, 512)] } else { &[] };
        assert_eq!(driver.run(operation, pieces).unwrap_err().raw_os_error(), Some(libc::EROFS), "{operation:?}");
    }
    driver.run(Operation::Flush, &[]).unwrap();
    assert_eq!(driver.read(0, 4096).unwrap(), before);
}

#[test]
fn pieces_of_a_scattered_request_are_all_there_and_apart() {
    let ram = Ram::new(1 << 20);
    let mut numbers = Numbers(7);
    let mut pieces = scattered(&mut numbers, 65_536);
    let detached: Vec<DetachedSlice> = pieces.iter().map(|&(at, len)| ram.slice(at, len).detach()).collect();
    assert_eq!(total(&detached), 65_536);
    pieces.sort_unstable();
    assert!(pieces.len() > 2 && pieces.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
}
