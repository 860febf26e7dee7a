//! What is written, so that what is read tells whether it is right.
//!
//! Each queue has a stretch of the disk to itself, and at most one request at a time for a block: what a block should
//! hold is always known. The bytes depend on where they are and on how often the block was written, so that a block
//! which went elsewhere, or an old one, shows.

use anyhow::ensure;
use ringfence_dma::HostSlice;

/// The blocks of one queue.
pub(super) struct Ledger {
    /// How often each was written.
    versions: Vec<u32>,
    /// Which have a request under way.
    busy: Vec<bool>,
    seed: u64,
    words: Vec<u8>,
}

impl Ledger {
    pub(super) fn new(blocks: u64, block_size: u64, seed: u64) -> Self {
        let (blocks, block_size) = (blocks as usize, block_size as usize);
        Self { versions: vec![0; blocks], busy: vec![false; blocks], seed, words: vec![0; block_size] }
    }

    /// Takes `block`, or the next that is not under way: there are more blocks than requests.
    pub(super) fn take(&mut self, block: u64) -> u64 {
        let mut block = block as usize;
        while self.busy[block] {
            block = (block + 1) % self.busy.len();
        }
        self.busy[block] = true;
        block as u64
    }

    /// The bytes of the next version of `block`, which is at `position` on the disk.
    pub(super) fn fill(&mut self, block: u64, position: u64, buffer: HostSlice<'_>) {
        let version = &mut self.versions[block as usize];
        *version += 1;
        words(&mut self.words, position, self.seed, *version);
        buffer.write(0, &self.words);
    }

    /// Makes sure that a read leaves something behind.
    pub(super) fn spoil(buffer: HostSlice<'_>) {
        buffer.fill(0xdb);
    }

    /// Whether `buffer` holds what was last written to `block`, if anything was.
    pub(super) fn check(&mut self, block: u64, position: u64, buffer: HostSlice<'_>) -> anyhow::Result<()> {
        let version = self.versions[block as usize];
        if version == 0 {
            return Ok(());
        }
        buffer.read(0, &mut self.words);
        for (at, got) in self.words.chunks(8).enumerate() {
            let at = position + at as u64 * 8;
            let right = word(at, self.seed, version);
            ensure!(
                got == right,
                "wrong data: at byte {at:#x} of the disk {got:02x?} was read, and {right:02x?} had been written there"
            );
        }
        Ok(())
    }

    pub(super) fn give_back(&mut self, block: u64) {
        self.busy[block as usize] = false;
    }
}

fn words(into: &mut [u8], position: u64, seed: u64, version: u32) {
    for (at, bytes) in into.chunks_mut(8).enumerate() {
        bytes.copy_from_slice(&word(position + at as u64 * 8, seed, version));
    }
}

/// The eight bytes that belong at `position`.
fn word(position: u64, seed: u64, version: u32) -> [u8; 8] {
    let mixed = (position ^ seed.rotate_left(40) ^ u64::from(version) << 44).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_dma::Ram;

    #[test]
    fn wrong_old_and_misplaced_blocks_show() {
        let ram = Ram::new(8192);
        let (one, other) = (ram.slice(0, 4096), ram.slice(4096, 4096));
        let mut ledger = Ledger::new(4, 4096, 7);
        assert!(ledger.check(0, 0, one).is_ok(), "never written");
        ledger.fill(0, 0, one);
        ledger.fill(1, 4096, other);
        assert!(ledger.check(0, 0, one).is_ok() && ledger.check(1, 4096, other).is_ok());
        assert!(ledger.check(0, 0, other).is_err(), "misplaced");
        ledger.fill(0, 0, other);
        assert!(ledger.check(0, 0, one).is_err(), "old");
        other.store_u16(
            4094,
            !other.load_u16(4094, std::sync::atomic::Ordering::Relaxed),
            std::sync::atomic::Ordering::Relaxed,
        );
        let error = ledger.check(0, 0, other).unwrap_err().to_string();
        assert!(error.contains("0xff8"), "{error}");
        Ledger::spoil(one);
        assert!(ledger.check(0, 0, one).is_err(), "not read at all");
    }

    #[test]
    fn no_block_has_two_requests() {
        let mut ledger = Ledger::new(3, 512, 0);
        assert_eq!([ledger.take(1), ledger.take(1), ledger.take(1)], [1, 2, 0]);
        ledger.give_back(2);
        assert_eq!(ledger.take(0), 2);
    }
}
