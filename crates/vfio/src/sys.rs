//! System calls that have no safe form: VFIO's ioctls, and mappings.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

/// `_IO(';', 100 + number)` (linux/vfio.h).
const fn request(number: u64) -> u64 {
    (b';' as u64) << 8 | (100 + number)
}

const GET_API_VERSION: u64 = request(0);
const CHECK_EXTENSION: u64 = request(1);
const SET_IOMMU: u64 = request(2);
const GROUP_GET_STATUS: u64 = request(3);
const GROUP_SET_CONTAINER: u64 = request(4);
const GROUP_GET_DEVICE_FD: u64 = request(6);
const DEVICE_GET_REGION_INFO: u64 = request(8);
const DEVICE_SET_IRQS: u64 = request(10);
const IOMMU_MAP_DMA: u64 = request(13);
const IOMMU_UNMAP_DMA: u64 = request(14);

/// VFIO_TYPE1v2_IOMMU.
const TYPE1_V2: u64 = 3;

/// VFIO_GROUP_FLAGS_VIABLE.
const VIABLE: u32 = 1;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An ioctl whose argument is a number.
fn with_number(file: &File, request: u64, number: u64) -> io::Result<libc::c_int> {
    // SAFETY: the requests that this is called with read no memory of ours.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, number) })
}

/// An ioctl whose argument is a structure that begins with its own size.
fn with_struct<T>(file: &File, request: u64, argument: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: `argument` is exclusively ours, and is of the type that the request reads and writes (linux/vfio.h).
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, ptr::from_mut(argument)) })
}

pub(crate) fn is_type1(container: &File) -> io::Result<bool> {
    Ok(with_number(container, GET_API_VERSION, 0)? == 0 && with_number(container, CHECK_EXTENSION, TYPE1_V2)? == 1)
}

pub(crate) fn set_type1(container: &File) -> io::Result<()> {
    with_number(container, SET_IOMMU, TYPE1_V2).map(drop)
}

pub(crate) fn is_viable(group: &File) -> io::Result<bool> {
    #[repr(C)]
    struct Status {
        argsz: u32,
        flags: u32,
    }
    let mut status = Status { argsz: size_of::<Status>() as u32, flags: 0 };
    with_struct(group, GROUP_GET_STATUS, &mut status)?;
    Ok(status.flags & VIABLE != 0)
}

pub(crate) fn set_container(group: &File, container: &File) -> io::Result<()> {
    let mut descriptor = container.as_raw_fd();
    with_struct(group, GROUP_SET_CONTAINER, &mut descriptor).map(drop)
}

pub(crate) fn device(group: &File, name: &std::ffi::CStr) -> io::Result<File> {
    // SAFETY: the request reads a string that ends in a zero, which `name` is.
    let descriptor = check(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
    // SAFETY: the kernel opened it just now, for us.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

/// A region of a device: a BAR, the configuration space.
#[repr(C)]
pub(crate) struct Region {
    argsz: u32,
    pub(crate) flags: u32,
    index: u32,
    cap_offset: u32,
    pub(crate) size: u64,
    /// Where it is in the device's file.
    pub(crate) offset: u64,
}

pub(crate) fn region(device: &File, index: u32) -> io::Result<Region> {
    let argsz = size_of::<Region>() as u32;
    let mut region = Region { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
    with_struct(device, DEVICE_GET_REGION_INFO, &mut region)?;
    Ok(region)
}

/// VFIO_PCI_MSIX_IRQ_INDEX.
const MSIX: u32 = 2;

/// VFIO_IRQ_SET_DATA_EVENTFD and VFIO_IRQ_SET_ACTION_TRIGGER.
const TRIGGERS_EVENTFD: u32 = 1 << 2 | 1 << 5;

/// The most vectors that are asked for at once.
pub(crate) const MOST_VECTORS: usize = 64;

/// Has MSI-X vectors, from the first one on, signal these eventfds; vectors are on from then on.
pub(crate) fn set_vectors(device: &File, eventfds: &[&File]) -> io::Result<()> {
    #[repr(C)]
    struct Set {
        argsz: u32,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        descriptors: [i32; MOST_VECTORS],
    }
    if eventfds.is_empty() || eventfds.len() > MOST_VECTORS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut descriptors = [-1; MOST_VECTORS];
    for (to, eventfd) in descriptors.iter_mut().zip(eventfds) {
        *to = eventfd.as_raw_fd();
    }
    let (argsz, count) = (size_of::<Set>() as u32, eventfds.len() as u32);
    let mut set = Set { argsz, flags: TRIGGERS_EVENTFD, index: MSIX, start: 0, count, descriptors };
    with_struct(device, DEVICE_SET_IRQS, &mut set).map(drop)
}

/// An eventfd that is read without waiting.
pub(crate) fn eventfd() -> io::Result<File> {
    // SAFETY: makes a descriptor, and touches no memory.
    let descriptor = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the kernel opened it just now, for us.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

/// Whether there is something to read before so many milliseconds are over.
pub(crate) fn is_readable(file: &File, milliseconds: libc::c_int) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure, which is exclusively ours.
    Ok(check(unsafe { libc::poll(&raw mut poll, 1, milliseconds) })? > 0)
}

pub(crate) const READ: u32 = 1;
pub(crate) const WRITE: u32 = 2;

/// Maps `size` bytes of this process from `vaddr` on at `iova`; the kernel pins them.
pub(crate) fn map_dma(container: &File, flags: u32, vaddr: u64, iova: u64, size: u64) -> io::Result<()> {
    #[repr(C)]
    struct Map {
        argsz: u32,
        flags: u32,
        vaddr: u64,
        iova: u64,
        size: u64,
    }
    let argsz = size_of::<Map>() as u32;
    with_struct(container, IOMMU_MAP_DMA, &mut Map { argsz, flags, vaddr, iova, size }).map(drop)
}

/// Takes that mapping away; the IOMMU has forgotten it when this returns.
pub(crate) fn unmap_dma(container: &File, iova: u64, size: u64) -> io::Result<()> {
    #[repr(C)]
    struct Unmap {
        argsz: u32,
        flags: u32,
        iova: u64,
        size: u64,
    }
    let mut unmap = Unmap { argsz: size_of::<Unmap>() as u32, flags: 0, iova, size };
    with_struct(container, IOMMU_UNMAP_DMA, &mut unmap)?;
    // It says how much it has unmapped.
    if unmap.size == size { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// Memory that is mapped here, until this is dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; what is done with the memory is up to the owner.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes of a file from `offset` on, which is on a page.
    pub(crate) fn of(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        Self::new(len, libc::MAP_SHARED, file.as_raw_fd(), offset as libc::off_t)
    }

    /// `len` bytes of nothing but zeroes; `flags` beside MAP_SHARED and MAP_ANONYMOUS.
    pub(crate) fn anonymous(len: usize, flags: libc::c_int) -> io::Result<Self> {
        Self::new(len, libc::MAP_SHARED | libc::MAP_ANONYMOUS | flags, -1, 0)
    }

    fn new(len: usize, flags: libc::c_int, descriptor: libc::c_int, offset: libc::off_t) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes, which replaces none.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, descriptor, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).expect("the kernel maps nothing at zero");
        Ok(Self { start, len })
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nobody has anything of it any more who borrowed from `self`.
        let unmapped = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert_eq!(unmapped, 0, "{}", io::Error::last_os_error());
    }
}
