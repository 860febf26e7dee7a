//! The locks that QEMU takes on its images, so that it and we notice each other.
//!
//! One byte a permission: at 100 + n whoever uses permission n, at 200 + n whoever does not want others to use it. All
//! hold them shared, and then look whether anybody holds the counterpart; so readers need no right to write, and
//! nothing has to be unlocked in order to look. A lock is the open file's, and goes when its last descriptor does.

use super::open::Reason;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// Reading what stays as it was read.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks an image for a disk whose only writer we are, or of which nobody is.
pub(super) fn lock(file: &File, read_only: bool) -> Result<(), Reason> {
    let used: &[i64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
    let unshared = &[WRITE, RESIZE];
    let all = used.iter().map(|n| USED + n).chain(unshared.iter().map(|n| UNSHARED + n));
    for byte in all {
        match hold(file, byte) {
            Ok(()) => {}
            Err(error) if is_unsupported(&error) => {
                tracing::warn!(%error, "the image's file system has no locks: take care that nobody else writes it");
                return Ok(());
            }
            Err(source) => return Err(Reason::Io { doing: "locking it", source }),
        }
    }
    let free = |byte| is_free(file, byte).map_err(|source| Reason::Io { doing: "looking for locks on it", source });
    for n in unshared {
        if !free(USED + n)? {
            return Err(Reason::Written);
        }
    }
    for n in used {
        if !free(UNSHARED + n)? {
            return Err(Reason::InUse);
        }
    }
    Ok(())
}

fn hold(file: &File, byte: i64) -> io::Result<()> {
    control(file, libc::F_OFD_SETLK, &mut request(libc::F_RDLCK, byte))
}

/// Whether nobody else holds `byte`.
fn is_free(file: &File, byte: i64) -> io::Result<bool> {
    // Asks what would stand in the way of an exclusive lock: any shared one of another open file.
    let mut asked = request(libc::F_WRLCK, byte);
    control(file, libc::F_OFD_GETLK, &mut asked)?;
    Ok(asked.l_type == libc::F_UNLCK as libc::c_short)
}

fn request(kind: libc::c_int, byte: i64) -> libc::flock {
    // SAFETY: all zeroes is a `flock`; `l_pid` has to be 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn control(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: both commands take a `flock`, which they read and may fill in.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, lock as *mut libc::flock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS))
}
