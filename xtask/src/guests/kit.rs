//! What the chosen cells are made of, fetched once before the first boot.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use ringfence_guests::{Arch, Cache, Error, Kernel, KernelSeries, Platform, Qemu, QemuSource};

use super::cell::Cell;

/// An emulator, and each platform's kernel and busybox.
pub(crate) struct Kit {
    pub(crate) qemu: Qemu,
    /// The emulator's version.
    pub(crate) version: String,
    kernels: BTreeMap<(KernelSeries, Arch), Kernel>,
    busyboxes: BTreeMap<Arch, PathBuf>,
}

impl Kit {
    /// Fetches what is not in the cache.
    pub(crate) fn fetch(cache: &Cache<'_>, source: QemuSource, cells: &[Cell]) -> Result<Self, Error> {
        let arches: Vec<Arch> =
            cells.iter().map(|cell| cell.platform.arch).collect::<BTreeSet<_>>().into_iter().collect();
        let qemu = Qemu::find(cache, source, &arches)?;
        let version = qemu.version(arches[0])?;
        let mut kit = Self { qemu, version, kernels: BTreeMap::new(), busyboxes: BTreeMap::new() };
        for arch in arches {
            kit.busyboxes.insert(arch, cache.busybox(arch)?);
        }
        let kernels: BTreeSet<_> = cells.iter().map(|cell| (cell.platform.kernel, cell.platform.arch)).collect();
        for (series, arch) in kernels {
            kit.kernels.insert((series, arch), cache.kernel(series, arch)?);
        }
        Ok(kit)
    }

    pub(crate) fn kernel(&self, platform: &Platform) -> &Kernel {
        &self.kernels[&(platform.kernel, platform.arch)]
    }

    pub(crate) fn busybox(&self, platform: &Platform) -> &PathBuf {
        &self.busyboxes[&platform.arch]
    }
}
