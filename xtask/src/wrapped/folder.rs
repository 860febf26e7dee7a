//! A folder that virtiofsd shares.

use std::fs;
use std::path::Path;

use ringfence_guests::{Backend, Error, Virtiofsd};

use super::{BYTES, Machine, Shared, content, digest, says, script};

const FILE_SYSTEM: u16 = 26;
const DEVICE: &[&str] = &["-device", "vhost-user-fs-pci,chardev=socket,tag=shared,iommu_platform=on"];

/// Has a guest mount a folder, read files and write one.
pub(super) fn share(machine: &Machine<'_>, virtiofsd: &Virtiofsd, log: &Shared<'_>) -> Result<(), String> {
    let text = |error: Error| error.to_string();
    let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
    let at = |name: &str| folder.path().join(name);
    let io = |path: &Path| format!("{}: ", path.display());
    let shared = at("shared");
    fs::create_dir_all(shared.join("below")).map_err(|error| io(&shared) + &error.to_string())?;
    let content = content();
    for name in ["large", "below/small"] {
        let (path, len) = (shared.join(name), if name == "large" { BYTES } else { 100 });
        fs::write(&path, &content[..len]).map_err(|error| io(&path) + &error.to_string())?;
    }
    let initramfs = at("initramfs");
    machine.write_guest(&script(FILE_SYSTEM, SCRIPT), "virtiofs", &initramfs)?;

    let plain = at("plain");
    let start = || Backend::start(virtiofsd.share(&shared, &plain), &plain, &at("virtiofsd-log")).map_err(text);
    let back_end = start()?;
    machine.is_refused(&initramfs, DEVICE, &plain, log)?;
    // It served that front-end, which left, and then ends by itself.
    drop(back_end);
    let _ = fs::remove_file(&plain);
    let said = machine.run_wrapped("fs", &initramfs, DEVICE, &start()?, log)?;
    judge(&said, &content, &shared)
}

fn judge(said: &str, content: &[u8], shared: &Path) -> Result<(), String> {
    says(said, "end", "done")?;
    says(said, "large", &digest(content))?;
    says(said, "small", &digest(&content[..100]))?;
    says(said, "names", "below large")?;
    let written = shared.join("below/written");
    let found = fs::read(&written).map_err(|error| format!("{}: {error}", written.display()))?;
    // The large one backwards by halves, and the small one behind it.
    let (first, second) = content.split_at(BYTES / 2);
    if found != [second, first, &content[..100]].concat() {
        return Err("what the guest wrote is not what is there".to_owned());
    }
    Ok(())
}

const SCRIPT: &str = r#"
mkdir /shared
mount -t virtiofs shared /shared || finish failed
tell names "$(ls /shared | xargs)"
tell large "$(digest /shared/large)"
tell small "$(digest /shared/below/small)"
half=$(($(stat -c %s /shared/large) / 2 / 4096))
{ dd if=/shared/large bs=4096 skip=$half; dd if=/shared/large bs=4096 count=$half; cat /shared/below/small; } \
    2>/dev/null >/shared/below/written || finish failed
sync
umount /shared || finish failed
finish done
"#;
