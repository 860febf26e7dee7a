use crate::{Placement, Region, SharedMemory};
use ringfence_dma::{FrontendVa, Gpa};
use rustix::fs::ftruncate;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::Ordering;

const PAGE: usize = 4096;

/// A region of so many pages, and the front-end's hold on its file.
fn region(pages: usize) -> (Region, SharedMemory) {
    let memory = SharedMemory::new(pages * PAGE).unwrap();
    memory.slice(0, memory.len()).fill(0xaa);
    let size = memory.len() as u64;
    let placement = Placement { gpa: Gpa(0), frontend_va: FrontendVa(0), size, offset: 0 };
    (Region::map(placement, memory.as_fd().try_clone_to_owned().unwrap()).unwrap(), memory)
}

#[test]
fn a_file_that_shrinks_under_us_is_lost_and_nothing_else_is() {
    let (lost, file) = region(4);
    let (kept, _other) = region(4);
    ftruncate(&file, PAGE as u64).unwrap();
    assert!(!lost.is_lost(), "nobody has noticed");
    assert_eq!(lost.slice().load_u64(0, Ordering::Relaxed), 0xaaaa_aaaa_aaaa_aaaa, "this page is still there");

    let mut read = [0xff; 16];
    lost.slice().read(2 * PAGE, &mut read);
    assert_eq!(read, [0; 16]);
    assert!(lost.is_lost());
    lost.slice().fill(7);
    lost.slice().store_u32(PAGE, 8, Ordering::Relaxed);
    assert_eq!(lost.slice().load_u32(PAGE, Ordering::Relaxed), 8, "memory like any other");
    assert_eq!(file.slice(0, 2).load_u16(0, Ordering::Relaxed), 0xaaaa, "that nobody else sees");

    assert!(!kept.is_lost());
    assert_eq!(kept.slice().load_u64(3 * PAGE, Ordering::Relaxed), 0xaaaa_aaaa_aaaa_aaaa);
    drop(lost);
    // Its place in the list is used again, and unmarked.
    let (new, file) = region(1);
    assert!(!new.is_lost());
    ftruncate(&file, 0).unwrap();
    new.slice().fill(1);
    assert!(new.is_lost());
}

#[test]
fn many_threads_may_meet_the_hole_at_once_while_others_map_and_unmap() {
    for _ in 0..20 {
        let (lost, file) = region(64);
        ftruncate(&file, 0).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let lost = &lost;
                scope.spawn(move || (0..64).for_each(|page| lost.slice().sub(page * PAGE, PAGE).fill(thread)));
            }
            scope.spawn(|| {
                for _ in 0..200 {
                    let (other, _file) = region(1);
                    assert_eq!(other.slice().load_u64(0, Ordering::Relaxed), 0xaaaa_aaaa_aaaa_aaaa);
                    assert!(!other.is_lost());
                }
            });
        });
        assert!(lost.is_lost());
    }
}

#[test]
fn a_system_call_on_lost_memory_fails_and_nothing_else() {
    let (lost, file) = region(2);
    ftruncate(&file, 0).unwrap();
    let zeroes = std::fs::File::open("/dev/zero").unwrap();
    // SAFETY: the kernel writes to mapped memory that nobody refers to, or refuses.
    let read = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zeroes), lost.slice().as_ptr().cast(), PAGE) };
    assert_eq!((read, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
}

/// Runs the named test of this binary alone in a process of its own, with `CHILD` set.
fn child(test: &str) -> std::process::ExitStatus {
    let name = format!("sigbus::tests::{test}");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &name, "--test-threads=1"]).env(CHILD, "1");
    child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    child.status().unwrap()
}

const CHILD: &str = "RINGFENCE_SIGBUS_CHILD";

/// A mapping that is not of this crate, with nothing behind it.
fn foreign_hole() -> *mut u8 {
    let (_region, _file) = region(1);
    let file = tempfile::tempfile().unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            PAGE,
            rustix::mm::ProtFlags::READ,
            rustix::mm::MapFlags::SHARED,
            &file,
            0,
        )
    };
    at.unwrap().cast()
}

#[test]
fn a_fault_elsewhere_still_ends_the_process() {
    if std::env::var_os(CHILD).is_some() {
        // SAFETY: mapped and readable as far as the compiler knows; that it faults is the point.
        let byte = unsafe { foreign_hole().read_volatile() };
        panic!("read {byte} from nothing");
    }
    assert_eq!(child("a_fault_elsewhere_still_ends_the_process").signal(), Some(libc::SIGBUS));
}

#[test]
fn the_signal_sent_by_hand_does_what_it_did_before() {
    if std::env::var_os(CHILD).is_some() {
        // SAFETY: plain system calls.
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            let (_region, _file) = region(1);
            libc::raise(libc::SIGBUS);
        }
        std::thread::sleep(std::time::Duration::from_secs(10));
        panic!("outlived the signal");
    }
    assert_eq!(child("the_signal_sent_by_hand_does_what_it_did_before").signal(), Some(libc::SIGBUS));
}

#[test]
fn a_handler_that_gives_up_its_place_does_not_give_up_ours() {
    if std::env::var_os(CHILD).is_some() {
        let (lost, file) = region(1);
        // The standard library's handler, to which this goes, knows faults alone: it puts the default in its own place
        // and waits for the fault to come again.
        // SAFETY: a plain system call.
        unsafe { libc::raise(libc::SIGBUS) };
        ftruncate(&file, 0).unwrap();
        lost.slice().fill(1);
        assert!(lost.is_lost());
        return;
    }
    assert!(child("a_handler_that_gives_up_its_place_does_not_give_up_ours").success());
}

#[test]
fn whoever_handled_the_signal_before_still_does() {
    extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: ends the process at once, which a handler may.
        unsafe { libc::_exit(42) }
    }
    if std::env::var_os(CHILD).is_some() {
        // SAFETY: all zeroes is a valid `sigaction`, and `handler` has the form that its flags say.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as extern "C" fn(_, _, _) as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
            foreign_hole().read_volatile();
        }
        panic!("nobody handled it");
    }
    assert_eq!(child("whoever_handled_the_signal_before_still_does").code(), Some(42));
}
