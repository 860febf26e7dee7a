use crate::function::Function;
use crate::memory::Memory;
use crate::sys;
use ringfence_dma::{BusAddr, DmaError, Gpa, Permission};
use ringfence_driver::mapper::{Iommu, Run};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;

/// An address space of the host's IOMMU, with the group of one function in it.
#[derive(Debug)]
pub struct Container<'m> {
    file: File,
    /// Kept open: a group without a user leaves its container.
    _group: File,
    memory: &'m Memory,
}

const PAGE: usize = 4096;

impl<'m> Container<'m> {
    /// Opens the PCI function `name` ("0000:00:03.0"), which is bound to vfio-pci as all of its group are, in a container
    /// of its own in which `memory` can be mapped.
    ///
    /// # Errors
    /// Says which step failed. Nothing is mapped.
    pub fn open(name: &str, memory: &'m Memory) -> io::Result<(Self, Function)> {
        let step = |what: &str| {
            let what = format!("{name}: {what}");
            move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"))
        };
        let failed = |what| Err(io::Error::other(format!("{name}: {what}")));
        let link = fs::read_link(format!("/sys/bus/pci/devices/{name}/iommu_group"));
        let link = link.map_err(step("it has no IOMMU group (is there an IOMMU, and is it on?)"))?;
        let number = link.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let open = |path: &str| File::options().read(true).write(true).open(path).map_err(step(path));
        let file = open("/dev/vfio/vfio")?;
        if !sys::is_type1(&file).map_err(step("the kernel's VFIO"))? {
            return failed("the kernel's VFIO has no type 1 IOMMU (module vfio_iommu_type1)");
        }
        let group = open(&format!("/dev/vfio/{number}"))?;
        if !sys::is_viable(&group).map_err(step("its group"))? {
            return failed("another function of its group is not bound to vfio-pci");
        }
        sys::set_container(&group, &file).map_err(step("its group joins no container"))?;
        sys::set_type1(&file)
            .map_err(step("the IOMMU can't be had (without interrupt remapping: allow_unsafe_interrupts=1)"))?;
        let device = sys::device(&group, &CString::new(name)?).map_err(step("it can't be opened"))?;
        let function = Function::new(device, name).map_err(step("its configuration space"))?;
        Ok((Self { file, _group: group, memory }, function))
    }
}

/// Errors of the kernel are [`DmaError::Platform`] with its error number.
impl Iommu for Container<'_> {
    fn page(&self) -> usize {
        PAGE
    }

    fn map(&self, addr: BusAddr, physical: Gpa, len: usize, permission: Permission) -> Result<(), DmaError> {
        let vaddr = self.memory.address(physical, len).ok_or(DmaError::Unreachable { physical })?;
        let flags = match permission {
            Permission::ReadOnly => sys::READ,
            Permission::WriteOnly => sys::WRITE,
            Permission::ReadWrite => sys::READ | sys::WRITE,
        };
        sys::map_dma(&self.file, flags, vaddr, addr.0, len as u64).map_err(platform)
    }

    fn unmap(&self, runs: &[Run]) -> Result<(), DmaError> {
        // Each of them, even where one before could not be had.
        let unmap = |run: &Run| sys::unmap_dma(&self.file, run.addr.0, run.len as u64).map_err(platform);
        runs.iter().map(unmap).fold(Ok(()), Result::and)
    }
}

fn platform(error: io::Error) -> DmaError {
    DmaError::Platform { code: error.raw_os_error().unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_that_is_not_there_is_named() {
        let memory = Memory::new(PAGE).unwrap();
        let error = Container::open("ffff:ff:1f.7", &memory).unwrap_err().to_string();
        assert!(error.starts_with("ffff:ff:1f.7: it has no IOMMU group"), "{error}");
    }
}
