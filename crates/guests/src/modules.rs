//! Kernel modules in the order in which they load.
//!
//! A kernel package has no `modules.dep` before it is installed, and depmod is
//! not on every machine. Each module names what it needs in its own `.modinfo`
//! section, so that is read instead.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::kernel::Kernel;
use crate::tool;

/// A module's name, with underscores as the kernel prints it, and its ELF file.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) object: Vec<u8>,
}

/// The modules that `wanted` need, dependencies first, without what is built in.
pub(crate) fn in_load_order(kernel: &Kernel, wanted: &[&str]) -> Result<Vec<Module>, Error> {
    let mut files = BTreeMap::new();
    index(&kernel.modules.join("kernel"), &mut files)?;
    let builtin = builtin(&kernel.modules.join("modules.builtin"))?;
    let mut order = Order { kernel, files, builtin, seen: BTreeSet::new(), modules: Vec::new() };
    wanted.iter().try_for_each(|name| order.visit(name))?;
    Ok(order.modules)
}

struct Order<'a> {
    kernel: &'a Kernel,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    seen: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Order<'_> {
    /// Adds `name` after what it depends on. Each module is visited once, which
    /// bounds the recursion.
    fn visit(&mut self, name: &str) -> Result<(), Error> {
        let name = canonical(name);
        if self.builtin.contains(&name) || !self.seen.insert(name.clone()) {
            return Ok(());
        }
        let Some(file) = self.files.get(&name) else {
            return Err(Error::Content {
                subject: format!("kernel {}", self.kernel.release),
                problem: format!("has no module {name}"),
            });
        };
        let object = read(file)?;
        for dependency in dependencies(&object) {
            self.visit(&dependency)?;
        }
        self.modules.push(Module { name, object });
        Ok(())
    }
}

fn index(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), Error> {
    let entries = fs::read_dir(folder).map_err(Error::file("cannot list", folder))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            index(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

fn builtin(list: &Path) -> Result<BTreeSet<String>, Error> {
    let text = fs::read_to_string(list).map_err(Error::file("cannot read", list))?;
    Ok(text.lines().filter_map(|line| module_name(Path::new(line))).collect())
}

fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    Some(canonical(name.strip_suffix(".ko").or_else(|| name.strip_suffix(".ko.xz"))?))
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(file).map_err(Error::file("cannot read", file));
    }
    let mut command = Command::new("xz");
    let output = tool::output(command.args(["--decompress", "--stdout"]).arg(file))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(Error::Content {
            subject: file.display().to_string(),
            problem: format!("xz: {}", String::from_utf8_lossy(&output.stderr).trim()),
        }),
    }
}

/// The names in the object's `depends=` entry.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = object[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(canonical).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_names_what_it_needs() {
        assert_eq!(
            dependencies(b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0name=x\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(dependencies(b"\x7fELF\0depends=\0").is_empty());
        assert!(dependencies(b"\x7fELF").is_empty());
    }

    #[test]
    fn dependencies_load_first_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let drivers = folder.path().join("kernel/drivers");
        fs::create_dir_all(&drivers).unwrap();
        for (name, needs) in [("virtio_blk", "virtio-ring,virtio"), ("virtio-ring", "virtio"), ("virtio", "")] {
            fs::write(drivers.join(format!("{name}.ko")), format!("ELF\0depends={needs}\0")).unwrap();
        }
        fs::write(folder.path().join("modules.builtin"), "kernel/drivers/virtio/virtio-pci.ko\n").unwrap();
        let kernel = Kernel { image: PathBuf::new(), release: "6.0".into(), modules: folder.path().to_owned() };
        let modules = in_load_order(&kernel, &["virtio_pci", "virtio_blk"]).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_blk"]);

        let error = in_load_order(&kernel, &["nvme"]).unwrap_err().to_string();
        assert_eq!(error, "kernel 6.0: has no module nvme");
    }
}
