use super::bounce::{Bounce, Strays};
use super::lock::lock;
use super::open::{OpenError, Reason, VirtualFormat, open_file};
use super::threads::{Carry, Threads};
use super::{Durability, Geometry, Lost, Operation, SECTOR, Storage, StorageQueue};
use imago::file::File as ImagoFile;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::vmdk::Vmdk;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// A disk within a file of another format, read and written by the `imago` crate.
///
/// Each queue has a few threads that each do one thing at a time; data goes through buffers of the queue's, so a format's
/// code sees no bytes change under its hands.
///
/// An image may name other files: a backing file, or extents. They are opened as QEMU does it, relative to the image
/// and for reading only, because whoever named the image vouched for it: **an image from a stranger can name any file
/// that this process may read**, and its content then is the disk's. Three things go less far than in QEMU: a backing
/// file has to say its format, since the guest that wrote a raw one could make it look like another; a data file apart
/// from the image, which would be written, is refused; and so is a chain of more than 64.
pub struct Imago {
    image: Arc<Image>,
}

impl Imago {
    /// Opens the image at `path`, which is of `format`.
    ///
    /// # Errors
    /// Whatever makes it unfit for being a disk, and what to do about it.
    pub fn open(path: &Path, format: VirtualFormat, read_only: bool) -> Result<Self, OpenError> {
        let image = Image::open(path, format, read_only).map_err(|reason| OpenError::new(path.display(), reason))?;
        Ok(Self { image: Arc::new(image) })
    }
}

impl Storage for Imago {
    fn geometry(&self) -> Geometry {
        self.image.geometry
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn StorageQueue>> {
        let threads = Threads::new("imago", &self.image, depth)?;
        Ok(Box::new(Bounce::new(threads, self.image.geometry, depth, &self.image.strays)))
    }
}

/// How many files may lie behind each other.
const MAX_LAYERS: usize = 64;

/// An open image.
struct Image {
    /// Discarding takes clusters away, and wants nobody else to be using one meanwhile.
    format: RwLock<FormatAccess<ImagoFile>>,
    geometry: Geometry,
    lost: Lost,
    strays: Strays,
}

impl Image {
    fn open(path: &Path, format: VirtualFormat, read_only: bool) -> Result<Self, Reason> {
        let access = match format {
            VirtualFormat::Qcow2 => open_qcow2(path, read_only, MAX_LAYERS)?,
            VirtualFormat::Vmdk if !read_only => return Err(Reason::OnlyReadable { format }),
            VirtualFormat::Vmdk => {
                let vmdk = Vmdk::<ImagoFile>::builder(open_layer(path, true)?).open(Extents);
                FormatAccess::new(vmdk.map_err(|source| Reason::NotOfFormat { format, source })?)
            }
        };
        let capacity = access.size();
        if capacity == 0 {
            return Err(Reason::Empty);
        }
        if !capacity.is_multiple_of(SECTOR) {
            return Err(Reason::NotSectors(capacity));
        }
        let geometry = Geometry { read_only, physical_block_size: 4096, ..Geometry::plain(capacity) };
        Ok(Self { format: RwLock::new(access), geometry, lost: Lost::default(), strays: Strays::default() })
    }

    fn format(&self) -> RwLockReadGuard<'_, FormatAccess<ImagoFile>> {
        self.format.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn sync(&self) -> io::Result<()> {
        self.lost.verdict()?;
        let format = self.format();
        let synced = format.flush().and_then(|()| format.sync());
        synced.inspect_err(|error| self.lost.remember(error))
    }
}

fn open_layer(path: &Path, read_only: bool) -> Result<ImagoFile, Reason> {
    let file = open_file(path, read_only)?;
    lock(&file, read_only)?;
    // The name serves for finding what lies beside it.
    let options = StorageOpenOptions::new().write(!read_only).filename(path);
    ImagoFile::from_open_file(file, options).map_err(Reason::of)
}

/// Opens an image and all that lies behind it, of which there may be `layers` more.
fn open_qcow2(path: &Path, read_only: bool, layers: usize) -> Result<FormatAccess<ImagoFile>, Reason> {
    let unfit = |source| Reason::NotOfFormat { format: VirtualFormat::Qcow2, source };
    let layer = open_layer(path, read_only)?;
    let mut qcow2 = Qcow2::<ImagoFile>::open_image(layer, !read_only).map_err(unfit)?;
    if !read_only {
        counts_its_first_cluster(path).map_err(unfit)?;
    }
    if let Some(name) = qcow2.implicit_backing_file().cloned() {
        let behind = path.parent().unwrap_or(Path::new("")).join(&name);
        let format = qcow2.implicit_backing_format().cloned();
        let backing = match (layers.checked_sub(1), format.as_deref()) {
            (None, _) => Err(Reason::TooManyLayers),
            (Some(layers), Some("qcow2")) => open_qcow2(&behind, true, layers),
            (Some(_), Some("raw" | "file")) => open_layer(&behind, true).and_then(|file| {
                let raw = imago::raw::Raw::builder(file).open(DenyImplicitOpenGate::default());
                raw.map(FormatAccess::new).map_err(Reason::of)
            }),
            (Some(_), Some(other)) => Err(Reason::BackingFormat(other.to_owned())),
            (Some(_), None) => Err(Reason::NoBackingFormat),
        };
        let backing = backing.map_err(|reason| Reason::Backing { name: behind, reason: Box::new(reason) })?;
        qcow2.set_backing(Some(backing));
    }
    // What is left would be a data file.
    qcow2.open_implicit_dependencies_gated(DenyImplicitOpenGate::default()).map_err(unfit)?;
    Ok(FormatAccess::new(qcow2))
}

/// Refuses an image to be written whose reference counts say nothing about its own header. Version 0.2 of the crate would
/// put a table in the header's place, and then look for another place without end.
fn counts_its_first_cluster(path: &Path) -> io::Result<()> {
    let file = std::fs::File::open(path)?;
    let [mut table, mut first] = [[0; 8]; 2];
    file.read_exact_at(&mut table, 48)?;
    let mut clusters = [0; 4];
    file.read_exact_at(&mut clusters, 56)?;
    file.read_exact_at(&mut first, u64::from_be_bytes(table))?;
    // The low bits are reserved.
    if u32::from_be_bytes(clusters) == 0 || u64::from_be_bytes(first) >> 9 == 0 {
        return Err(io::Error::other("its reference counts are damaged: `qemu-img check -r all` may mend them"));
    }
    Ok(())
}

/// Opens the extents that a descriptor names, for reading.
struct Extents;

impl ImplicitOpenGate<ImagoFile> for Extents {
    fn open_format<F: FormatDriverBuilder<ImagoFile>>(&mut self, builder: F) -> io::Result<FormatAccess<ImagoFile>> {
        let name = builder.get_image_path().unwrap_or_default();
        Err(io::Error::other(format!("it wants to open {} as an image of its own", name.display())))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<ImagoFile> {
        let name = options.get_filename().ok_or_else(|| io::Error::other("an extent without a name"))?;
        open_layer(name, true).map_err(|reason| io::Error::other(reason.to_string()))
    }
}

impl Carry for Image {
    fn carry_out(&self, operation: Operation, memory: &mut [u8]) -> io::Result<()> {
        match operation {
            Operation::Read { offset } => self.format().read(memory, offset),
            Operation::Write { offset, durability } => {
                self.format().write(&*memory, offset)?;
                if durability == Durability::Durable { self.sync() } else { Ok(()) }
            }
            Operation::Flush if self.geometry.read_only => Ok(()),
            Operation::Flush => self.sync(),
            Operation::Discard { offset, len } => {
                let mut format = self.format.write().unwrap_or_else(PoisonError::into_inner);
                match format.discard_to_any(offset, len) {
                    // A discard is a wish.
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                    result => result,
                }
            }
            Operation::WriteZeroes { offset, len, unmap: false } => self.format().write_zeroes(offset, len),
            Operation::WriteZeroes { offset, len, unmap: true } => {
                self.format.write().unwrap_or_else(PoisonError::into_inner).discard_to_zero(offset, len)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Started;
    use super::super::exercise::{CAPACITY, Driver, Numbers, exercise, refuses_every_change};
    use super::*;
    use imago::FormatCreateBuilder;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::fs;
    use std::process::Command;
    use tempfile::TempDir;

    /// Makes an empty qcow2 image of [`CAPACITY`].
    fn create(path: &Path, backing: Option<(&str, &str)>) {
        let file = fs::File::options().create_new(true).read(true).write(true).open(path).unwrap();
        let file = ImagoFile::from_open_file(file, StorageOpenOptions::new().write(true).filename(path)).unwrap();
        let builder = Qcow2::<ImagoFile>::create_builder(file).size(CAPACITY as u64);
        let builder = match backing {
            Some((name, format)) => builder.backing(name.into(), format.into()),
            None => builder,
        };
        builder.create().unwrap();
    }

    fn open(path: &Path, read_only: bool) -> Result<Imago, String> {
        Imago::open(path, VirtualFormat::Qcow2, read_only).map_err(|error| error.to_string())
    }

    fn driver(imago: &Imago, memory: usize) -> Driver {
        Driver::new(imago.open_queue(16).unwrap(), memory)
    }

    /// Runs `qemu-img`, if there is one.
    fn qemu_img(arguments: &[&str], image: &Path) -> Option<std::process::Output> {
        let output = Command::new("qemu-img").args(arguments).arg(image).output().ok();
        if output.is_none() {
            eprintln!("SKIPPED: no qemu-img on this machine");
        }
        output
    }

    #[test]
    fn behaves_as_a_disk_and_leaves_a_sound_image() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("disk");
        create(&path, None);
        exercise(&open(&path, false).unwrap());
        if let Some(output) = qemu_img(&["check", "-f", "qcow2"], &path) {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
    }

    #[test]
    fn read_only_stays_as_it_is() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("disk");
        create(&path, None);
        let before = fs::read(&path).unwrap();
        refuses_every_change(&open(&path, true).unwrap());
        assert!(fs::read(&path).unwrap() == before);
    }

    #[test]
    fn what_was_flushed_is_in_the_file() {
        let directory = TempDir::new().unwrap();
        let [path, copy] = ["disk", "copy"].map(|name| directory.path().join(name));
        create(&path, None);
        let imago = open(&path, false).unwrap();
        let mut driver = driver(&imago, 4096);
        driver.write(70_000 / 512 * 512, &[9; 4096]).unwrap();
        driver.run(Operation::Flush, &[]).unwrap();
        // What a power cut would leave.
        fs::copy(&path, &copy).unwrap();
        driver.write(0, &[1; 512]).unwrap();
        let mut left = self::driver(&open(&copy, false).unwrap(), 4096);
        assert_eq!(left.read(70_000 / 512 * 512, 4096).unwrap(), [9; 4096]);
        let durable = Operation::Write { offset: 1 << 19, durability: Durability::Durable };
        driver.ram.slice(0, 512).fill(3);
        driver.run(durable, &[(0, 512)]).unwrap();
        fs::remove_file(&copy).unwrap();
        fs::copy(&path, &copy).unwrap();
        let mut left = self::driver(&open(&copy, true).unwrap(), 4096);
        assert_eq!(left.read(1 << 19, 512).unwrap(), [3; 512]);
    }

    #[test]
    fn a_backing_file_is_read_and_never_written() {
        let directory = TempDir::new().unwrap();
        let [top, middle, base] = ["top", "middle", "base"].map(|name| directory.path().join(name));
        fs::write(&base, vec![5; CAPACITY]).unwrap();
        create(&middle, Some(("base", "raw")));
        create(&top, Some(("middle", "qcow2")));
        let behind = fs::read(&middle).unwrap();
        {
            let imago = open(&top, false).unwrap();
            let mut driver = driver(&imago, 8192);
            assert_eq!(driver.read(4096, 512).unwrap(), [5; 512]);
            driver.write(4096, &[6; 512]).unwrap();
            driver.run(Operation::WriteZeroes { offset: 65_536, len: 65_536, unmap: true }, &[]).unwrap();
            assert_eq!(driver.read(4096, 1024).unwrap(), [[6; 512], [5; 512]].concat());
            assert_eq!(driver.read(65_536, 512).unwrap(), [0; 512]);
            driver.run(Operation::Flush, &[]).unwrap();
        }
        assert!(fs::read(&base).unwrap() == vec![5; CAPACITY] && fs::read(&middle).unwrap() == behind);
    }

    #[test]
    fn what_lies_behind_has_to_be_sound() {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("base"), vec![0; CAPACITY]).unwrap();
        create(&path("unknown"), Some(("base", "vpc")));
        create(&path("dangling"), Some(("nowhere", "raw")));
        create(&path("circle"), Some(("circle", "qcow2")));
        create(&path("directory"), Some(("/", "raw")));
        create(&path("unsaid"), Some(("base", "raw")));
        // Takes the extension that says the format out of the header.
        let mut bytes = fs::read(path("unsaid")).unwrap();
        let extension = bytes.windows(4).position(|four| four == 0xe279_2aca_u32.to_be_bytes()).unwrap();
        bytes[extension..extension + 4].copy_from_slice(&0x7777_7777_u32.to_be_bytes());
        fs::write(path("unsaid"), bytes).unwrap();
        for (name, says) in [
            ("unknown", "its format is \"vpc\""),
            ("dangling", "there is no such file"),
            ("circle", "too many behind each other"),
            ("directory", "it is a directory"),
            ("unsaid", "its format is not said"),
        ] {
            let error = open(&path(name), true).err().expect("unsound");
            assert!(error.contains(says) && error.contains("backing file"), "{name}: {error}");
        }
    }

    #[test]
    fn a_data_file_apart_is_not_written() {
        let directory = TempDir::new().unwrap();
        let [path, data] = ["disk", "data"].map(|name| directory.path().join(name));
        let option = format!("data_file={}", data.display());
        let create = ["create", "-f", "qcow2", "-o", &option, path.to_str().unwrap(), "1M"];
        let Some(output) = qemu_img(&create[..6], Path::new("1M")) else { return };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(open(&path, false).err().unwrap().contains("denied"));
    }

    #[test]
    fn images_that_qemu_made_are_read() {
        let directory = TempDir::new().unwrap();
        let [raw, image] = ["raw", "image"].map(|name| directory.path().join(name));
        let content: Vec<u8> = (0..CAPACITY).map(|at| (at / 512 % 251) as u8).collect();
        fs::write(&raw, &content).unwrap();
        for (name, options) in [("qcow2", "compat=1.1"), ("qcow2", "compat=0.10"), ("vmdk", "subformat=monolithicFlat")]
        {
            let from = raw.to_str().unwrap();
            let Some(made) = qemu_img(&["convert", "-f", "raw", "-O", name, "-o", options, from], &image) else {
                return;
            };
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            let super::super::Format::Virtual(format) = name.parse().unwrap() else { unreachable!() };
            let imago = Imago::open(&image, format, true).unwrap();
            assert!(driver(&imago, CAPACITY).read(0, CAPACITY).unwrap() == content, "{name} {options}");
        }
        assert!(Imago::open(&image, VirtualFormat::Vmdk, false).err().unwrap().to_string().contains("--read-only"));
    }

    #[test]
    fn large_transfers_go_in_parts() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("disk");
        create(&path, None);
        fs::remove_file(&path).unwrap();
        let file = fs::File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        let file = ImagoFile::from_open_file(file, StorageOpenOptions::new().write(true).filename(&path)).unwrap();
        Qcow2::<ImagoFile>::create_builder(file).size(8 << 20).create().unwrap();
        let imago = open(&path, false).unwrap();
        let mut driver = driver(&imago, 8 << 20);
        let content: Vec<u8> = (0..3 << 20_u32).map(|at| (at / 512) as u8).collect();
        driver.write(512, &content).unwrap();
        let half = content.len() / 2 + 1;
        driver.ram.slice(0, 8 << 20).fill(0xee);
        let rest = content.len() - half;
        driver.run(Operation::Read { offset: 512 }, &[(half + 100, half), (0, rest)]).unwrap();
        assert!([driver.peek(half + 100, half), driver.peek(0, rest)].concat() == content);
    }

    #[test]
    fn what_has_not_begun_can_be_cancelled() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("disk");
        create(&path, None);
        let imago = open(&path, false).unwrap();
        let mut driver = driver(&imago, 4096);
        // Nobody can begin while the image is held.
        let held = imago.image.format.write().unwrap();
        for token in 0..16 {
            let started = driver.start(token, Operation::Read { offset: 0 }, &[(0, 512)]);
            assert!(matches!(started, Started::Pending));
            if token == 14 {
                driver.queue.submit().unwrap();
            }
        }
        for token in [14, 15] {
            driver.queue.cancel(token);
            let ended = driver.wait();
            assert_eq!((ended.len(), ended[0].0), (1, token));
            assert_eq!(ended[0].1.as_ref().unwrap_err().raw_os_error(), Some(libc::ECANCELED));
        }
        drop(held);
        let mut left: Vec<u16> = (0..14).collect();
        while !left.is_empty() {
            for (token, result) in driver.wait() {
                result.unwrap();
                left.retain(|&other| other != token);
            }
        }
        // Nothing more to tell, and nothing that says otherwise.
        let fd = driver.queue.completion_fd().unwrap();
        let mut asked = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        assert_eq!(poll(&mut asked, Some(&Timespec::default())).unwrap(), 0);
    }

    #[test]
    fn damaged_images_are_errors_at_the_worst() {
        let directory = TempDir::new().unwrap();
        let [path, broken] = ["disk", "broken"].map(|name| directory.path().join(name));
        create(&path, None);
        driver(&open(&path, false).unwrap(), CAPACITY).write(0, &vec![1; CAPACITY / 2]).unwrap();
        let sound = fs::read(&path).unwrap();
        let mut numbers = Numbers(0xdead_beef);
        let (mut opened, mut refused) = (0, 0);
        for _ in 0..200 {
            let mut bytes = sound.clone();
            for _ in 0..1 + numbers.below(8) {
                // Headers and tables, mostly.
                let at = if numbers.below(2) == 0 { numbers.below(112) } else { numbers.below(bytes.len() / 8) * 8 };
                bytes[at] = numbers.below(256) as u8;
            }
            fs::write(&broken, bytes).unwrap();
            match open(&broken, false) {
                Ok(imago) if imago.geometry().capacity >= 65_536 => {
                    opened += 1;
                    let mut driver = driver(&imago, 65_536);
                    let _ = driver.read(0, 65_536);
                    let _ = driver.write(4096, &[2; 4096]);
                    let _ = driver.run(Operation::Discard { offset: 0, len: 65_536 }, &[]);
                    let _ = driver.run(Operation::Flush, &[]);
                }
                Ok(_) => {}
                Err(_) => refused += 1,
            }
        }
        assert!(opened > 10 && refused > 10, "{opened} opened, {refused} refused");
    }

    #[test]
    fn a_raw_image_is_not_taken_for_what_it_looks_like() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("disk");
        create(&path, None);
        let bytes = fs::read(&path).unwrap();
        let storage = super::super::open(path.to_str().unwrap(), super::super::Format::Raw, true).unwrap();
        assert_eq!(storage.geometry().capacity, bytes.len().next_multiple_of(512) as u64);
        let mut driver = Driver::new(storage.open_queue(1).unwrap(), 4096);
        assert_eq!(driver.read(0, 512).unwrap(), bytes[..512]);
    }
}
