use super::{Imago, Memory, Null, Raw, SECTOR, Storage};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// Opens what `image` names: `null:SIZE` and `memory:SIZE`, with a size in bytes or with K, M, G or T behind it, are the
/// disks of that name; anything else is the path of a file or block device, whose content is of `format`.
///
/// A file whose name begins like that can be had as `./null:1G`.
///
/// # Errors
/// What is wrong with `image` and what to do about it.
pub fn open(image: &str, format: Format, read_only: bool) -> Result<Arc<dyn Storage>, OpenError> {
    let sized = |size| size_of(size).map_err(|reason| OpenError::new(image, reason));
    if let Some(size) = image.strip_prefix("null:") {
        return Ok(Arc::new(Null::new(sized(size)?, read_only)));
    }
    if let Some(size) = image.strip_prefix("memory:") {
        let memory = Memory::new(sized(size)?, read_only);
        let memory =
            memory.map_err(|source| OpenError::new(image, Reason::Io { doing: "reserving memory", source }))?;
        return Ok(Arc::new(memory));
    }
    match format {
        Format::Raw => Ok(Arc::new(Raw::open(Path::new(image), read_only)?)),
        Format::Virtual(format) => Ok(Arc::new(Imago::open(Path::new(image), format, read_only)?)),
    }
}

/// What an image's bytes are. It is said by whoever names the image and never guessed: a guest with a raw image can
/// write there what makes it look like any other format, one with a backing file of its choice among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes as they are.
    #[default]
    Raw,
    /// A format that keeps a disk within a file.
    Virtual(VirtualFormat),
}

/// The formats that [`Imago`] knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtualFormat {
    /// QEMU's, versions 2 and 3.
    Qcow2,
    /// VMware's, for reading.
    Vmdk,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("raw"),
            Self::Virtual(format) => format.fmt(f),
        }
    }
}

impl fmt::Display for VirtualFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        })
    }
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Virtual(VirtualFormat::Qcow2)),
            "vmdk" => Ok(Self::Virtual(VirtualFormat::Vmdk)),
            _ => Err(UnknownFormat),
        }
    }
}

/// The name is not that of a [`Format`].
#[derive(Debug, thiserror::Error)]
#[error("no such image format; there are raw, qcow2 and vmdk")]
pub struct UnknownFormat;

/// Why an image can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open image {image}: {reason}")]
pub struct OpenError {
    image: String,
    reason: Reason,
}

impl OpenError {
    pub(super) fn new(image: impl fmt::Display, reason: Reason) -> Self {
        Self { image: image.to_string(), reason }
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Reason {
    #[error("there is no such file")]
    NotFound,
    #[error("it is a directory; name the image file in it")]
    Directory,
    #[error("it is neither a regular file nor a block device")]
    NotADisk,
    #[error("it is empty; give it a size first, as `truncate -s 10G` does")]
    Empty,
    #[error("it was replaced by another file just now; try again")]
    Replaced,
    #[error("it is too large for a disk")]
    TooLarge,
    #[error("reading it is not permitted to this user")]
    NotReadable,
    #[error("writing it is not permitted to this user; permit it, or serve the image with --read-only")]
    NotWritable,
    #[error("{format} images can only be read; serve it with --read-only")]
    OnlyReadable { format: VirtualFormat },
    #[error("another process has it open for writing, such as QEMU or another server; stop that one first")]
    Written,
    #[error(
        "another process has it open and relies on it not to change, such as QEMU or another server; stop that one \
         first, or serve the image with --read-only"
    )]
    InUse,
    #[error("{0:?} is not a size; give bytes, or a number with K, M, G or T behind it, and more than none")]
    NotASize(String),
    #[error("{0} bytes are no multiple of 512")]
    NotSectors(u64),
    #[error("it is not a {format} image that can be used: {source} (a format is never guessed: see --format)")]
    NotOfFormat { format: VirtualFormat, source: io::Error },
    #[error("of its backing file {name}: {reason}", name = name.display())]
    Backing { name: PathBuf, reason: Box<Reason> },
    #[error("its format is not said, and won't be guessed; say it by `qemu-img rebase -u -b FILE -F FORMAT IMAGE`")]
    NoBackingFormat,
    #[error("its format is {0:?}, which is not known here; raw and qcow2 are")]
    BackingFormat(String),
    #[error("there are too many behind each other")]
    TooManyLayers,
    #[error("{doing} failed: {source}")]
    Io { doing: &'static str, source: io::Error },
}

impl Reason {
    /// Why a file could not be opened.
    pub(super) fn of(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::PermissionDenied => Self::NotReadable,
            io::ErrorKind::IsADirectory => Self::Directory,
            _ => Self::Io { doing: "opening it", source },
        }
    }
}

/// Opens the file of an image. Locking it is left to do.
pub(super) fn open_file(path: &Path, read_only: bool) -> Result<File, Reason> {
    let kind = path.metadata().map_err(Reason::of)?.file_type();
    if kind.is_dir() {
        return Err(Reason::Directory);
    }
    // Before it is opened, which could wait (a pipe) or do something (a tape).
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Reason::NotADisk);
    }
    OpenOptions::new().read(true).write(!read_only).open(path).map_err(|error| {
        let refused = matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS));
        if refused && !read_only && File::open(path).is_ok() { Reason::NotWritable } else { Reason::of(error) }
    })
}

fn size_of(text: &str) -> Result<u64, Reason> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let unit = match &text[digits.len()..] {
        "" => Some(1),
        "K" => Some(1 << 10),
        "M" => Some(1 << 20),
        "G" => Some(1 << 30),
        "T" => Some(1_u64 << 40),
        _ => None,
    };
    let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u64>().ok()).flatten();
    let not_a_size = || Reason::NotASize(text.to_owned());
    let size = number.zip(unit).ok_or_else(not_a_size)?;
    let size = size.0.checked_mul(size.1).filter(|&size| size > 0).ok_or_else(not_a_size)?;
    if size.is_multiple_of(SECTOR) { Ok(size) } else { Err(Reason::NotSectors(size)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode};

    #[test]
    fn sizes_have_binary_units() {
        for (text, size) in [
            ("512", Some(512)),
            ("4K", Some(4096)),
            ("3M", Some(3 << 20)),
            ("1G", Some(1 << 30)),
            ("2T", Some(2 << 40)),
        ] {
            assert_eq!(size_of(text).ok(), size, "{text}");
        }
        for text in ["", "K", "0", "0G", "-1", "+1K", "1.5G", "1GK", "1g", "513", "17000000000T", "1 G"] {
            assert!(size_of(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_error_says_what_and_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let inside = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(inside("empty"), b"").unwrap();
        std::fs::write(inside("zeroes"), [0; 4096]).unwrap();
        rustix::fs::mknodat(CWD, inside("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let qcow2 = Format::Virtual(VirtualFormat::Qcow2);
        for (image, format, says) in [
            (inside("missing"), Format::Raw, "there is no such file"),
            (inside("missing"), qcow2, "there is no such file"),
            (inside(""), Format::Raw, "it is a directory"),
            (inside("pipe"), Format::Raw, "neither a regular file nor a block device"),
            (inside("empty"), Format::Raw, "truncate -s"),
            (inside("zeroes"), qcow2, "not a qcow2 image"),
            ("null:".into(), Format::Raw, "is not a size"),
            ("memory:100".into(), Format::Raw, "100 bytes are no multiple of 512"),
        ] {
            let error = open(&image, format, false).err().expect("nothing that could be served").to_string();
            assert!(error.contains(says) && error.contains(&image), "{error}");
        }
    }

    #[test]
    fn every_format_is_known_by_its_own_name() {
        for format in [Format::Raw, Format::Virtual(VirtualFormat::Qcow2), Format::Virtual(VirtualFormat::Vmdk)] {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
        }
        assert!("QCOW2".parse::<Format>().is_err());
    }
}
