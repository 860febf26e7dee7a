//! A file's length costs nothing, and addresses are few. In a process of its own: they are everybody's.

use ringfence_dma::Permission;
use ringfence_hostmem::{Files, MOST_MAPPED, MapError};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

fn memfd(len: usize) -> OwnedFd {
    let fd = memfd_create("room", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, len as u64).unwrap();
    fd
}

#[test]
fn there_is_always_room_for_what_is_ours() {
    let mut files = Files::default();
    let mut part = |len: usize| files.part(memfd(len), 0, len, Permission::ReadWrite);
    let lengths = (12..47).rev().flat_map(|size| std::iter::repeat_n(1 << size, 8));
    let kept: Vec<_> = lengths.filter_map(|len| part(len).ok()).collect();
    let mapped: u64 = kept.iter().map(|part| part.slice().len() as u64).sum();
    assert_eq!(mapped, MOST_MAPPED);
    assert!(matches!(part(4096), Err(MapError::Kernel(Errno::NOMEM))));
    drop(kept);
    part(4096).unwrap();
}
