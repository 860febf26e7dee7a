//! What an init has to do besides: mounts, modules, giving devices to VFIO, and an end.

use ringfence_dma::BusAddr;
use std::ffi::{CString, c_long};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::time::Duration;

/// Prints a fact.
pub(crate) fn tell(key: &str, value: impl Display) {
    println!("RINGFENCE {key}={value}");
}

/// For how many seconds the kernel has run.
pub(crate) fn uptime() -> String {
    let told = fs::read_to_string("/proc/uptime").unwrap_or_default();
    told.split('.').next().unwrap_or_default().to_owned()
}

/// Mounts what the rest needs.
pub(crate) fn begin() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let [name, path] = [kind, target].map(|text| CString::new(text).expect("no zero in it"));
        // SAFETY: strings that end in zeroes, and no data.
        let mounted = unsafe { libc::mount(name.as_ptr(), path.as_ptr(), name.as_ptr(), 0, ptr::null()) };
        if mounted != 0 {
            tell("error", format_args!("cannot mount {target}: {}", io::Error::last_os_error()));
        }
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    tell("kernel", release.trim());
}

/// Says how it went, and switches the machine off.
pub(crate) fn finish(end: &str) -> ! {
    tell("end", end);
    // SAFETY: there is nothing to be lost.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    loop {
        std::thread::sleep(Duration::from_secs(60)); // it can take a moment; an init that ends is a panic
    }
}

/// Loads the modules in /modules in the order of their names, and has a huge page made.
pub(crate) fn load_modules() -> io::Result<()> {
    let mut modules: Vec<_> = fs::read_dir("/modules")?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    modules.sort();
    for path in modules {
        // Without interrupt remapping VFIO's IOMMU is only to be had with this; all of the guest is ours.
        let unsafe_interrupts = path.to_string_lossy().contains("vfio_iommu_type1");
        let options = if unsafe_interrupts { c"allow_unsafe_interrupts=1" } else { c"" };
        let file = File::open(&path)?;
        // SAFETY: a string that ends in a zero.
        let loaded: c_long =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), options.as_ptr(), 0 as libc::c_int) };
        if loaded != 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::new(error.kind(), format!("cannot load {}: {error}", path.display())));
        }
    }
    fs::write("/proc/sys/vm/nr_hugepages", "1")
}

/// Whether the kernel's command line has `ringfence.WORD`.
fn is_told(word: &str) -> bool {
    let wanted = format!("ringfence.{word}");
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split_whitespace().any(|found| found == wanted))
}

/// Whether devices that go past the IOMMU are let.
pub(crate) fn is_allowed() -> bool {
    is_told("allow")
}

/// Whether a device that does not answer is given up soon.
pub(crate) fn is_hasty() -> bool {
    is_told("haste")
}

/// The names of the modern and transitional virtio devices of a type on PCI.
pub(crate) fn devices(kind: u16) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let path = entry?.path();
        let number = |file: &str| {
            let text = fs::read_to_string(path.join(file)).unwrap_or_default();
            u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(0)
        };
        let found = match (number("vendor"), number("device")) {
            (0x1af4, 0x1000..=0x103f) => number("subsystem_device"),
            (0x1af4, device @ 0x1040..) => device - 0x1040,
            _ => continue,
        };
        if found == kind {
            names.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Takes a function from its driver, if it has one, and gives it to vfio-pci.
pub(crate) fn give_to_vfio(name: &str) -> io::Result<()> {
    let device = format!("/sys/bus/pci/devices/{name}");
    if fs::read_link(format!("{device}/driver")).is_ok_and(|driver| driver.ends_with("vfio-pci")) {
        return Ok(());
    }
    fs::write(format!("{device}/driver_override"), "vfio-pci")?;
    // It may have no driver.
    let _ = fs::write(format!("{device}/driver/unbind"), name);
    fs::write("/sys/bus/pci/drivers_probe", name)
}

/// The first line in which the kernel tells of an IOMMU's fault at this address.
pub(crate) fn iommu_fault(addr: BusAddr) -> Option<String> {
    let addr = format!("{:x}", addr.0);
    // The fault's interrupt may come a moment later than the answer.
    for _ in 0..50 {
        let mut log = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").ok()?;
        let mut record = [0; 8192];
        // Each read is a record; one that was overwritten is an error, and the next is read.
        loop {
            match log.read(&mut record) {
                Ok(0) => break,
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]).into_owned();
                    let line = text.lines().next().unwrap_or_default().to_owned();
                    if line.contains("fault") && line.contains(&addr) {
                        return line.split_once(';').map(|(_, message)| message.to_owned());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {}
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}
