use super::WireError;
use std::os::fd::OwnedFd;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Reads a payload that is exactly a `T`.
pub(super) fn exact<T: FromBytes>(message: &'static str, body: &[u8]) -> Result<T, WireError> {
    T::read_from_bytes(body).map_err(|_| WireError::Size { message, got: body.len(), expected: size_of::<T>() })
}

/// Reads a payload that ends in C padding, which some peers send and some do not.
pub(super) fn padded<T: FromBytes + IntoBytes>(
    message: &'static str,
    body: &[u8],
    fields: usize,
) -> Result<T, WireError> {
    if body.len() != fields && body.len() != size_of::<T>() {
        return Err(WireError::Size { message, got: body.len(), expected: size_of::<T>() });
    }
    let mut value = T::new_zeroed();
    value.as_mut_bytes()[..body.len()].copy_from_slice(body);
    Ok(value)
}

/// The payload must be empty.
pub(super) fn empty(message: &'static str, body: &[u8]) -> Result<(), WireError> {
    if body.is_empty() { Ok(()) } else { Err(WireError::Size { message, got: body.len(), expected: 0 }) }
}

/// Exactly `N` file descriptors.
pub(super) fn fds<const N: usize>(message: &'static str, fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], WireError> {
    fds.try_into().map_err(|fds: Vec<_>| WireError::Fds { message, got: fds.len(), expected: N })
}

/// The only file descriptor.
pub(super) fn one_fd(message: &'static str, all: Vec<OwnedFd>) -> Result<OwnedFd, WireError> {
    let [fd] = fds(message, all)?;
    Ok(fd)
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawVringState {
    pub(super) index: u32,
    pub(super) num: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawVringAddr {
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) descriptor: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    pub(super) log: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawRegion {
    pub(super) guest_address: u64,
    pub(super) size: u64,
    pub(super) user_address: u64,
    pub(super) mmap_offset: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawMemTableHead {
    pub(super) regions: u32,
    pub(super) padding: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawSingleRegion {
    pub(super) padding: u64,
    pub(super) region: RawRegion,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawLog {
    pub(super) size: u64,
    pub(super) offset: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawConfigHead {
    pub(super) offset: u32,
    pub(super) size: u32,
    pub(super) flags: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawInflight {
    pub(super) mmap_size: u64,
    pub(super) mmap_offset: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    pub(super) padding: [u8; 4],
}

impl RawInflight {
    pub(super) const FIELDS: usize = 20;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct RawVringArea {
    pub(super) vring: u64,
    pub(super) size: u64,
    pub(super) offset: u64,
}
