//! The configuration space of a disk (§5.2.4), read and believed as far as it can be.

use super::{Geometry, SECTOR, bits};
use crate::{StartError, Transport};
use virtio_spec::blk::F;

/// How much one request may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) segments: u16,
    /// Bytes in one piece of memory.
    pub(super) piece: usize,
}

impl Limits {
    /// A chain's length is counted in 32 bits (§2.7.8, §2.8.7); this leaves room for header and status.
    pub(super) const BYTES: u64 = u32::MAX as u64 - 4096;
}

/// Reads the configuration space, and believes what can be.
pub(super) fn read_config<T: Transport>(
    transport: &mut T,
    features: u64,
) -> Result<(Geometry, Limits), StartError<T::Error>> {
    let config = Config::read(transport)?;
    let taken = |feature| features & bits(feature) != 0;
    let sectors = config.u64(0);
    // A byte's position has to have a number too.
    if sectors > u64::MAX / SECTOR {
        return Err(StartError::Config { field: "capacity", value: sectors });
    }
    let block_size = if taken(F::BLK_SIZE) { config.u32(20) } else { SECTOR as u32 };
    if !block_size.is_power_of_two() || u64::from(block_size) < SECTOR {
        return Err(StartError::Config { field: "blk_size", value: block_size.into() });
    }
    // qemu-storage-daemon offers the feature and has 0 there, which can only mean that there is no limit.
    let piece = if taken(F::SIZE_MAX) && config.u32(8) != 0 { config.u32(8) } else { u32::MAX };
    let segments = if taken(F::SEG_MAX) { config.u32(12) } else { u32::MAX };
    if segments == 0 {
        return Err(StartError::Config { field: "seg_max", value: 0 });
    }
    let geometry = Geometry {
        sectors,
        block_size,
        read_only: taken(F::RO),
        cached: taken(F::FLUSH),
        discard: taken(F::DISCARD).then(|| config.u32(36)),
        write_zeroes: taken(F::WRITE_ZEROES).then(|| config.u32(48)),
    };
    let segments = u16::try_from(segments).unwrap_or(u16::MAX);
    Ok((geometry, Limits { segments, piece: piece as usize }))
}

/// The part of the configuration space that is read (§5.2.4), at one moment.
struct Config([u8; Config::LEN]);

impl Config {
    const LEN: usize = 56;

    /// A device that changes its configuration all the time is not waited for longer than this.
    const TRIES: u32 = 100;

    fn read<T: Transport>(transport: &mut T) -> Result<Self, StartError<T::Error>> {
        let mut bytes = [0; Self::LEN];
        let mut generation = transport.config_generation().map_err(StartError::Transport)?;
        for _ in 0..Self::TRIES {
            transport.read_config(0, &mut bytes).map_err(StartError::Transport)?;
            let now = transport.config_generation().map_err(StartError::Transport)?;
            if now == generation {
                return Ok(Self(bytes));
            }
            generation = now;
        }
        Err(StartError::Config { field: "config_generation", value: generation.into() })
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.0[offset..offset + 4].try_into().expect("four bytes"))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.0[offset..offset + 8].try_into().expect("eight bytes"))
    }
}
