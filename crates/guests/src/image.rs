//! The disk image: what the guest finds on it, and what it must leave.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::Error;

/// 16 MiB: enough for requests of a MiB, little enough for an emulated CPU to hash.
const SIZE: usize = 16 * MIB;
const MIB: usize = 1 << 20;

/// A disk image with known content.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    initial: String,
    expected: String,
}

impl Image {
    /// Writes an image whose content depends on `seed`, so that two guests that
    /// are given each other's disk do not go unnoticed.
    pub fn create(path: &Path, seed: u64) -> Result<Self, Error> {
        let mut content = noise(seed);
        fs::write(path, &content).map_err(Error::file("cannot write", path))?;
        let initial = hex(&content);
        copy_down(&mut content);
        Ok(Self { path: path.to_owned(), initial, expected: hex(&content) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of what the guest finds.
    pub fn initial(&self) -> &str {
        &self.initial
    }

    /// SHA-256 of the image after the guest wrote to it, worked out here.
    pub fn expected(&self) -> &str {
        &self.expected
    }

    /// SHA-256 of what the file holds now.
    pub fn current(&self) -> Result<String, Error> {
        digest(&self.path)
    }
}

/// SHA-256 of a file, in hexadecimal.
pub fn digest(path: &Path) -> Result<String, Error> {
    Ok(hex(&fs::read(path).map_err(Error::file("cannot read", path))?))
}

/// What the init script does: the second half becomes the first, moved down by
/// a MiB, with the MiB that falls off at the end.
fn copy_down(content: &mut [u8]) {
    let (first, second) = content.split_at_mut(SIZE / 2);
    second.copy_from_slice(first);
    second.rotate_left(MIB);
}

/// Bytes of a 64-bit xorshift generator. Every 4 KiB begin with the block's
/// number, which leaves no two blocks alike.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(SIZE);
    while bytes.len() < SIZE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = if bytes.len() % 4096 == 0 { (bytes.len() / 4096) as u64 } else { state };
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_its_seed_and_then_its_first_half_twice() {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::create(&folder.path().join("disk"), 1).unwrap();
        assert_eq!(image.current().unwrap(), image.initial());

        let before = fs::read(image.path()).unwrap();
        let mut after = before.clone();
        copy_down(&mut after);
        assert_eq!(after[..SIZE / 2], before[..SIZE / 2]);
        assert_eq!(after[SIZE / 2..SIZE - MIB], before[MIB..SIZE / 2]);
        assert_eq!(after[SIZE - MIB..], before[..MIB]);
        fs::write(image.path(), after).unwrap();
        assert_eq!(image.current().unwrap(), image.expected());

        let other = Image::create(&folder.path().join("other"), 2).unwrap();
        assert_ne!(other.initial(), image.initial());
    }

    #[test]
    fn a_digest_is_sha256() {
        assert_eq!(hex(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
