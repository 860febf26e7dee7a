use clap::ValueEnum;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// What to load a back-end with.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) socket: PathBuf,
    pub(super) shape: Shape,
    pub(super) seconds: f64,
    pub(super) warmup: f64,
    /// How long a queue's thread looks for completions before it sleeps.
    pub(super) poll: Duration,
    pub(super) queue_size: u16,
    /// Features of rings that the driver is not to see.
    pub(super) hidden: u64,
    /// The part of the disk to work on, in bytes; all of it if there is none.
    pub(super) area: Option<u64>,
    pub(super) verify: bool,
}

/// What tells one measurement from another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Shape {
    pub(super) rw: Rw,
    /// How many of a hundred requests of a mixed load are reads.
    pub(super) read_percent: u32,
    /// In bytes.
    pub(super) block_size: u64,
    pub(super) queue_depth: u16,
    pub(super) queues: u16,
    pub(super) iommu: Mapping,
    /// Microseconds from a miss to its answer.
    pub(super) miss_delay: u64,
    /// The most that one answer to a miss covers, in bytes.
    pub(super) granule: u64,
}

/// What a VMM's answer covers on x86 and arm64.
pub(super) const GRANULE: u64 = 4096;

/// Which requests, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Rw {
    /// Reads, one after the other
    Read,
    /// Writes, one after the other
    Write,
    /// Reads anywhere
    #[value(name = "randread")]
    RandRead,
    /// Writes anywhere
    #[value(name = "randwrite")]
    RandWrite,
    /// Reads and writes anywhere
    #[value(name = "randrw")]
    #[serde(rename = "randrw")]
    RandMixed,
}

/// How memory is lent to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mapping {
    /// No IOMMU: the flag is not taken, the device reaches all memory
    Off,
    /// Everything is mapped once
    Static,
    /// Each buffer is mapped for its request, and then unmapped and invalidated
    Dynamic,
    /// A pool is mapped once, and each buffer copied
    Bounce,
}

impl Rw {
    pub(super) fn is_random(self) -> bool {
        matches!(self, Rw::RandRead | Rw::RandWrite | Rw::RandMixed)
    }

    /// How many of a hundred requests are reads.
    pub(super) fn reads(self, mixed: u32) -> u32 {
        match self {
            Rw::Read | Rw::RandRead => 100,
            Rw::Write | Rw::RandWrite => 0,
            Rw::RandMixed => mixed,
        }
    }
}

/// By the name that the command line has for it.
fn name<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

impl fmt::Display for Rw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self))
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { rw, read_percent, block_size, queue_depth, queues, iommu, miss_delay, granule } = *self;
        write!(f, "{rw}")?;
        if rw == Rw::RandMixed {
            write!(f, " {read_percent}:{}", 100 - read_percent)?;
        }
        write!(f, " {}, QD{queue_depth}", Bytes(block_size))?;
        if queues > 1 {
            write!(f, " × {queues} queues")?;
        }
        write!(f, ", IOMMU {iommu}")?;
        if miss_delay > 0 {
            write!(f, ", {miss_delay} µs a miss")?;
        }
        if iommu != Mapping::Off && granule != GRANULE {
            write!(f, ", {} a translation", Bytes(granule))?;
        }
        Ok(())
    }
}

/// A number of bytes as a person writes it.
pub(super) struct Bytes(pub(super) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut number, mut unit) = (self.0, "B");
        for larger in ["KiB", "MiB", "GiB", "TiB"] {
            if number == 0 || !number.is_multiple_of(1024) {
                break;
            }
            (number, unit) = (number / 1024, larger);
        }
        write!(f, "{number} {unit}")
    }
}

/// A size on the command line: bytes, or a number with k, M, G or T behind it, times 1024 each.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err("a size is bytes, or a number with k, M, G or T behind it".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "a size begins with a number")?;
    number.checked_mul(1 << shift).filter(|&size| size > 0).ok_or_else(|| "not a size that can be".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (text, bytes, written) in
            [("512", 512, "512 B"), ("4k", 4096, "4 KiB"), ("1M", 1 << 20, "1 MiB"), ("1536", 1536, "1536 B")]
        {
            assert_eq!(size(text), Ok(bytes));
            assert_eq!(Bytes(bytes).to_string(), written);
        }
        for text in ["", "k", "0", "1x", "-4k", "99999999999T"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_shape_is_named_by_what_matters() {
        let shape = Shape {
            rw: Rw::RandMixed,
            read_percent: 70,
            block_size: 4096,
            queue_depth: 32,
            queues: 2,
            iommu: Mapping::Dynamic,
            miss_delay: 60,
            granule: GRANULE,
        };
        assert_eq!(shape.to_string(), "randrw 70:30 4 KiB, QD32 × 2 queues, IOMMU dynamic, 60 µs a miss");
        let huge = Shape { granule: 2 << 20, ..shape };
        assert!(huge.to_string().ends_with("60 µs a miss, 2 MiB a translation"), "{huge}");
    }
}
