//! The disk image: what the guest finds on it, and what it must leave.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::Error;

/// 16 MiB: enough for requests of a MiB, little enough for an emulated CPU to hash.
const SIZE: usize = 16 * MIB;
const MIB: usize = 1 << 20;
const SECTOR: usize = 512;

/// What a disk image holds, compared with what it may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// What it held at first.
    Untouched,
    /// Some of the sectors that the guest was to write are written, and the others untouched.
    Partly,
    /// What the guest had to write, and around it what was there.
    Written,
    /// Something that nobody was to write.
    Wrong {
        /// The first sector's place, in bytes.
        at: usize,
    },
}

/// A disk image with known content.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    content: Vec<u8>,
    initial: String,
    expected: String,
}

impl Image {
    /// Writes an image whose content depends on `seed`, so that two guests that
    /// are given each other's disk do not go unnoticed.
    pub fn create(path: &Path, seed: u64) -> Result<Self, Error> {
        let content = noise(seed);
        fs::write(path, &content).map_err(Error::file("cannot write", path))?;
        let (first, second) = content.split_at(SIZE / 2);
        let hasher = Sha256::new().chain_update(first);
        let initial = hex(hasher.clone().chain_update(second));
        let expected = hex(hasher.chain_update(copied_down(first)));
        Ok(Self { path: path.to_owned(), content, initial, expected })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of what the guest finds.
    pub fn initial(&self) -> &str {
        &self.initial
    }

    /// SHA-256 of the whole disk after the guest wrote to it, worked out here.
    pub fn expected(&self) -> &str {
        &self.expected
    }

    /// What the file holds now.
    pub fn state(&self) -> Result<ImageState, Error> {
        let now = fs::read(&self.path).map_err(Error::file("cannot read", &self.path))?;
        let first = &self.content[..SIZE / 2];
        let written = [first, &copied_down(first)].concat();
        if now == self.content {
            return Ok(ImageState::Untouched);
        }
        if now == written {
            return Ok(ImageState::Written);
        }
        let sector = |bytes: &[u8], at: usize| bytes.get(at..bytes.len().min(at + SECTOR)).unwrap_or_default().to_vec();
        let wrong = (0..SIZE.max(now.len())).step_by(SECTOR).find(|&at| {
            let found = sector(&now, at);
            found != sector(&self.content, at) && found != sector(&written, at)
        });
        Ok(wrong.map_or(ImageState::Partly, |at| ImageState::Wrong { at }))
    }
}

/// What the init script writes: the first half moved down by a MiB, with the MiB
/// that falls off at the end.
fn copied_down(first: &[u8]) -> Vec<u8> {
    [&first[MIB..], &first[..MIB]].concat()
}

/// Words of a 64-bit xorshift generator. Every 4 KiB begin with the block's
/// number, which leaves no two blocks alike.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; SIZE];
    for (index, place) in bytes.chunks_exact_mut(8).enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = if index % 512 == 0 { (index / 512) as u64 } else { state };
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_its_seed_and_then_its_first_half_twice() {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::create(&folder.path().join("disk"), 1).unwrap();
        assert_eq!(image.state().unwrap(), ImageState::Untouched);

        let before = fs::read(image.path()).unwrap();
        assert_eq!(hex(Sha256::new().chain_update(&before)), image.initial());
        let mut after = before.clone();
        after.copy_within(MIB..SIZE / 2, SIZE / 2);
        fs::write(image.path(), &after).unwrap();
        assert_eq!(image.state().unwrap(), ImageState::Partly);
        after.copy_within(..MIB, SIZE - MIB);
        fs::write(image.path(), &after).unwrap();
        assert_eq!(image.state().unwrap(), ImageState::Written);
        assert_eq!(hex(Sha256::new().chain_update(&after)), image.expected());

        after[SIZE - 1] ^= 1;
        fs::write(image.path(), &after).unwrap();
        assert_eq!(image.state().unwrap(), ImageState::Wrong { at: SIZE - SECTOR }, "one bit off");
        fs::write(image.path(), &after[..SIZE - SECTOR]).unwrap();
        assert_eq!(image.state().unwrap(), ImageState::Wrong { at: SIZE - SECTOR }, "cut short");
        fs::write(image.path(), [&before[..], &[0]].concat()).unwrap();
        assert_eq!(image.state().unwrap(), ImageState::Wrong { at: SIZE }, "grown");
    }

    #[test]
    fn a_digest_is_sha256() {
        let digest = hex(Sha256::new().chain_update(b"abc"));
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
