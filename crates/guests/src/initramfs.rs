//! The guest's whole user space: busybox, one script, the modules it loads.
//!
//! The archive is cpio in the 'newc' form, uncompressed: the kernel unpacks it
//! faster than it would inflate it.

use std::fs;
use std::path::Path;

use crate::error::Error;
use crate::kernel::Kernel;
use crate::modules::{self, Module};

const INIT: &str = include_str!("init.sh");
const SPEED: &str = include_str!("speed.sh");

/// The driver of the disk, loaded last.
const DISK_DRIVER: &str = "virtio_blk";

/// An initramfs for one kernel, ready to be written to a file.
#[derive(Debug)]
pub struct Initramfs(Vec<u8>);

impl Initramfs {
    /// Packs `busybox`, the init script, and `modules` of `kernel` with all they need.
    pub fn build(kernel: &Kernel, busybox: &Path, modules: &[&str]) -> Result<Self, Error> {
        Self::of_script(kernel, busybox, INIT, &with_the_disks(modules))
    }

    /// The same, and `then`: a script that has the init script's functions, and runs when that has verified the disk.
    ///
    /// # Errors
    ///
    /// An error where something can't be read, or the kernel lacks a module.
    pub fn build_with(kernel: &Kernel, busybox: &Path, modules: &[&str], then: &str) -> Result<Self, Error> {
        let modules = modules::in_load_order(kernel, &with_the_disks(modules))?;
        let files = [("bin/busybox", &read(busybox)?[..]), ("then.sh", then.as_bytes())];
        Ok(Self::pack(INIT.as_bytes(), &files, &modules))
    }

    /// Packs `busybox`, a script for its shell that is the guest's only program, and `modules` of `kernel` with all they
    /// need: `/modules/NN-NAME.ko` in the order in which they load.
    ///
    /// # Errors
    ///
    /// An error where something can't be read, or the kernel lacks a module.
    pub fn of_script(kernel: &Kernel, busybox: &Path, script: &str, modules: &[&str]) -> Result<Self, Error> {
        let modules = modules::in_load_order(kernel, modules)?;
        Ok(Self::pack(script.as_bytes(), &[("bin/busybox", &read(busybox)?)], &modules))
    }

    /// Packs `busybox`, a script that measures two disks, and `load`: `ringfence-guest-load`, built static.
    ///
    /// # Errors
    ///
    /// An error where something can't be read, or the kernel lacks a module.
    pub fn of_speed(kernel: &Kernel, busybox: &Path, load: &Path) -> Result<Self, Error> {
        let modules = modules::in_load_order(kernel, &["virtio_pci", DISK_DRIVER])?;
        let files = [("bin/busybox", &read(busybox)?[..]), ("bin/load", &read(load)?)];
        Ok(Self::pack(SPEED.as_bytes(), &files, &modules))
    }

    /// Packs a static program that is the guest's only one, and `modules` of `kernel` with all they need: `/init`, and
    /// `/modules/NN-NAME.ko` in the order in which they load.
    ///
    /// # Errors
    ///
    /// An error where something can't be read, or the kernel lacks a module.
    pub fn of_program(kernel: &Kernel, program: &Path, modules: &[&str]) -> Result<Self, Error> {
        Ok(Self::pack(&read(program)?, &[], &modules::in_load_order(kernel, modules)?))
    }

    fn pack(init: &[u8], files: &[(&str, &[u8])], modules: &[Module]) -> Self {
        let mut archive = Archive::default();
        for folder in ["bin", "dev", "modules", "proc", "run", "sys"] {
            archive.folder(folder);
        }
        archive.file("init", 0o755, init);
        for &(name, content) in files {
            archive.file(name, 0o755, content);
        }
        for (position, module) in modules.iter().enumerate() {
            archive.file(&format!("modules/{position:02}-{}.ko", module.name), 0o644, &module.object);
        }
        Self(archive.finish())
    }

    /// The archive's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

fn with_the_disks<'m>(modules: &[&'m str]) -> Vec<&'m str> {
    modules.iter().copied().chain([DISK_DRIVER]).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(Error::file("cannot read", path))
}

/// A 'newc' cpio archive: a header of thirteen hexadecimal fields, the name and
/// the content of each file, the last two padded to four bytes.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | permissions, content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.files += 1;
        let (inode, links) = (self.files, 1);
        let size = u32::try_from(content.len()).expect("cpio holds files below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a short name");
        let (owner, group, time, device, checksum) = (0, 0, 0, 0, 0);
        self.bytes.extend_from_slice(b"070701");
        for field in [inode, mode, owner, group, links, time, size, device, device, device, device, name_size, checksum]
        {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    /// Reads an archive back by the format's description alone.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let at = 6 + 8 * index;
                u32::from_str_radix(std::str::from_utf8(&bytes[at..at + 8]).unwrap(), 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            assert_eq!(bytes[110 + name_size - 1], 0, "a name ends in a zero");
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let start = (110 + name_size).next_multiple_of(4);
            let content = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty(), "nothing follows the trailer");
                return entries;
            }
            entries.push((name, mode, content));
        }
    }

    #[test]
    fn an_archive_reads_back() {
        let mut archive = Archive::default();
        archive.folder("bin");
        // Lengths of every remainder by four, of names and of contents.
        for length in 0..9 {
            archive.file(&"n".repeat(length + 1), 0o644, &vec![b'c'; length]);
        }
        let entries = read(&archive.finish());
        assert_eq!(entries[0], ("bin".to_owned(), 0o040_755, Vec::new()));
        for (length, entry) in entries[1..].iter().enumerate() {
            assert_eq!(*entry, ("n".repeat(length + 1), 0o100_644, vec![b'c'; length]));
        }
        assert_eq!(entries.len(), 10);
    }
}
