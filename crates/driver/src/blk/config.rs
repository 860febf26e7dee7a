//! The configuration space of a disk (§5.2.4), read and believed as far as it can be.

use super::{Geometry, SECTOR, bits};
use crate::{StartError, Transport, config};
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
    let sectors = config.capacity;
    // A byte's position has to have a number too.
    if sectors > u64::MAX / SECTOR {
        return Err(StartError::Config { field: "capacity", value: sectors });
    }
    let block_size = if taken(F::BLK_SIZE) { config.blk_size } else { SECTOR as u32 };
    if !block_size.is_power_of_two() || u64::from(block_size) < SECTOR {
        return Err(StartError::Config { field: "blk_size", value: block_size.into() });
    }
    // qemu-storage-daemon offers the feature and has 0 there, which can only mean that there is no limit.
    let piece = if taken(F::SIZE_MAX) && config.size_max != 0 { config.size_max } else { u32::MAX };
    let segments = if taken(F::SEG_MAX) { config.seg_max } else { u32::MAX };
    if segments == 0 {
        return Err(StartError::Config { field: "seg_max", value: 0 });
    }
    let geometry = Geometry {
        sectors,
        block_size,
        read_only: taken(F::RO),
        cached: taken(F::FLUSH),
        discard: taken(F::DISCARD).then_some(config.max_discard_sectors),
        write_zeroes: taken(F::WRITE_ZEROES).then_some(config.max_write_zeroes_sectors),
    };
    let segments = u16::try_from(segments).unwrap_or(u16::MAX);
    Ok((geometry, Limits { segments, piece: piece as usize }))
}

/// The fields that are looked at (§5.2.4), at one moment. Those of features that were not taken mean nothing.
struct Config {
    capacity: u64,
    size_max: u32,
    seg_max: u32,
    blk_size: u32,
    max_discard_sectors: u32,
    max_write_zeroes_sectors: u32,
}

impl Config {
    fn read<T: Transport>(transport: &mut T) -> Result<Self, StartError<T::Error>> {
        config::read(transport, |fields| {
            Ok(Self {
                capacity: fields.u64(0)?,
                size_max: fields.u32(8)?,
                seg_max: fields.u32(12)?,
                blk_size: fields.u32(20)?,
                max_discard_sectors: fields.u32(36)?,
                max_write_zeroes_sectors: fields.u32(48)?,
            })
        })
    }
}
