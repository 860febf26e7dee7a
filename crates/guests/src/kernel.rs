//! A kernel as its package leaves it: the image, the release, the modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::tool;

/// A kernel as unpacked from its package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The file that QEMU loads.
    pub image: PathBuf,
    /// The kernel's own version, as `uname -r` prints it.
    pub release: String,
    /// The folder of its modules.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// The kernel below `root`, inflated if it could be.
    pub(crate) fn unpacked(root: &Path) -> Result<Self, Error> {
        let boot = root.join("boot");
        let found = images(&boot, "vmlinux-")?.or(images(&boot, "vmlinuz-")?);
        let (image, release) = found.ok_or_else(|| Error::Content {
            subject: boot.display().to_string(),
            problem: "holds no kernel; delete the folder and try again".to_owned(),
        })?;
        let modules = ["lib/modules", "usr/lib/modules"]
            .map(|path| root.join(path).join(&release))
            .into_iter()
            .find(|path| path.exists())
            .ok_or_else(|| Error::Content {
                subject: root.display().to_string(),
                problem: format!("holds no modules of {release}"),
            })?;
        Ok(Self { image, release, modules })
    }
}

/// Puts a kernel that lies beside its modules, as from Debian 14 on, where it was before.
pub(crate) fn settle(root: &Path) -> Result<(), Error> {
    let modules = root.join("usr/lib/modules");
    let Ok(entries) = fs::read_dir(&modules) else { return Ok(()) };
    for entry in entries.flatten() {
        let image = entry.path().join("vmlinuz");
        if image.exists() {
            let boot = root.join("boot");
            fs::create_dir_all(&boot).map_err(Error::file("cannot create", &boot))?;
            let release = entry.file_name().to_string_lossy().into_owned();
            fs::rename(&image, boot.join(format!("vmlinuz-{release}"))).map_err(Error::file("cannot move", &image))?;
        }
    }
    Ok(())
}

/// Takes an xz-compressed x86 kernel out of its shell.
///
/// An emulated CPU needs 6 s to inflate Debian's 6.1, at each boot; the host
/// needs one, once. QEMU starts the inner file by its PVH note. Kernels that
/// are compressed otherwise, or not at all, stay as they are.
pub(crate) fn inflate(root: &Path) -> Result<(), Error> {
    let boot = root.join("boot");
    let Some((image, release)) = images(&boot, "vmlinuz-")? else { return Ok(()) };
    let shell = fs::read(&image).map_err(Error::file("cannot read", &image))?;
    let Some(payload) = xz_payload(&shell) else { return Ok(()) };
    let packed = boot.join("payload.xz");
    fs::write(&packed, payload).map_err(Error::file("cannot write", &packed))?;
    let output = tool::output(Command::new("xz").args(["--decompress", "--stdout", "--single-stream"]).arg(&packed));
    fs::remove_file(&packed).map_err(Error::file("cannot remove", &packed))?;
    // Without xz the guest inflates its kernel itself.
    let Ok(output) = output else { return Ok(()) };
    if output.status.success() && output.stdout.starts_with(b"\x7fELF") {
        let inner = boot.join(format!("vmlinux-{release}"));
        fs::write(&inner, output.stdout).map_err(Error::file("cannot write", &inner))?;
    }
    Ok(())
}

/// The compressed kernel inside an x86 boot image, by the boot protocol's
/// `setup_sects`, `payload_offset` and `payload_length` (2.08 and later).
fn xz_payload(shell: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(shell.get(at..at + 4)?.try_into().ok()?) as usize);
    if shell.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup = (usize::from(shell[0x1f1]) + 1) * 512;
    let start = setup.checked_add(word(0x248)?)?;
    let payload = shell.get(start..start.checked_add(word(0x24c)?)?)?;
    payload.starts_with(b"\xfd7zXZ\0").then_some(payload)
}

/// The file in `boot` whose name begins with `prefix`, and the release after it.
fn images(boot: &Path, prefix: &str) -> Result<Option<(PathBuf, String)>, Error> {
    let entries = fs::read_dir(boot).map_err(Error::file("cannot list", boot))?;
    Ok(entries.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        Some((entry.path(), name.strip_prefix(prefix)?.to_owned()))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(payload: &[u8]) -> Vec<u8> {
        let mut shell = vec![0; 1024 + 16];
        shell[0x1f1] = 1;
        shell[0x202..0x206].copy_from_slice(b"HdrS");
        shell[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        shell[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        shell.extend_from_slice(payload);
        shell
    }

    #[test]
    fn only_an_xz_payload_is_taken_out() {
        let xz = b"\xfd7zXZ\0rest";
        assert_eq!(xz_payload(&shell(xz)), Some(&xz[..]));
        assert_eq!(xz_payload(&shell(b"\x28\xb5\x2f\xfd zstd")), None);
        assert_eq!(xz_payload(&shell(xz)[..1030]), None, "cut short");
        assert_eq!(xz_payload(b"MZ"), None, "not x86");
    }

    #[test]
    fn a_kernel_beside_its_modules_is_found_too() {
        let root = tempfile::tempdir().unwrap();
        settle(root.path()).unwrap();
        let modules = root.path().join("usr/lib/modules/7.0-x");
        fs::create_dir_all(&modules).unwrap();
        fs::write(modules.join("vmlinuz"), "").unwrap();
        settle(root.path()).unwrap();
        let kernel = Kernel::unpacked(root.path()).unwrap();
        assert_eq!((kernel.image, kernel.modules), (root.path().join("boot/vmlinuz-7.0-x"), modules));
        assert_eq!(kernel.release, "7.0-x");
    }

    #[test]
    fn an_inflated_kernel_goes_first() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("lib/modules/6.0-x")).unwrap();
        fs::create_dir(root.path().join("boot")).unwrap();
        assert!(Kernel::unpacked(root.path()).unwrap_err().to_string().contains("holds no kernel"));
        for name in ["vmlinuz-6.0-x", "vmlinux-6.0-x"] {
            fs::write(root.path().join("boot").join(name), "").unwrap();
            let kernel = Kernel::unpacked(root.path()).unwrap();
            assert_eq!(kernel.image.file_name().unwrap(), name);
            assert_eq!(kernel.release, "6.0-x");
        }
    }
}
