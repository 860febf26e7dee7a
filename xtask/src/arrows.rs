//! Invariant 2, and the drawing in ARCHITECTURE.md: which crate may use which.

use std::fs;

use crate::Workspace;
use crate::steps::{Pass, StepResult};

/// Each crate, and those of ours that it may depend on. Rings and devices know no IOMMU because they know no crate that
/// does.
const ARROWS: &[(&str, &[&str])] = &[
    ("policy", &[]),
    ("dma", &[]),
    ("ring", &["dma"]),
    ("iotlb", &["dma"]),
    ("iommu", &["dma"]),
    ("hostmem", &["dma"]),
    ("device", &["dma", "ring", "hostmem"]),
    ("driver", &["dma", "ring", "policy"]),
    ("hal", &["dma"]),
    ("vfio", &["dma", "driver"]),
    ("vhost-user", &["policy", "dma", "ring", "iotlb", "iommu", "hostmem", "device", "driver"]),
    ("vfio-user", &["policy", "dma", "ring", "iotlb", "hostmem", "device", "driver", "vhost-user"]),
    ("wrap", &["policy", "dma", "ring", "hostmem", "device", "vhost-user"]),
    ("matrix", &["policy", "dma", "ring", "iommu", "device", "driver", "vhost-user", "wrap", "guests"]),
    ("guests", &[]),
    ("cost", &["dma", "ring", "iotlb", "device", "driver"]),
    ("bare-metal", &["dma", "driver"]),
    ("fuzz", &["policy", "dma", "ring", "iotlb", "hostmem", "device", "vhost-user", "wrap"]),
    (
        "ringfence",
        &[
            "policy",
            "dma",
            "ring",
            "iotlb",
            "iommu",
            "hostmem",
            "device",
            "driver",
            "vfio-user",
            "vhost-user",
            "wrap",
            "matrix",
        ],
    ),
];

/// Compares every manifest with the arrows.
pub(crate) fn run(workspace: &Workspace) -> StepResult {
    let crates = workspace.root.join("crates");
    let mut wrong = Vec::new();
    let mut members = 0;
    for entry in fs::read_dir(&crates).map_err(|error| format!("{}: {error}", crates.display()))? {
        let path = entry.map_err(|error| error.to_string())?.path();
        let manifest = path.join("Cargo.toml");
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(&manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
        members += 1;
        match ARROWS.iter().find(|(member, _)| *member == name) {
            None => wrong.push(format!("crates/{name} is not in the drawing")),
            Some((_, allowed)) => {
                wrong.extend(used(&text).filter(|used| !allowed.contains(used)).map(|used| format!("{name} -> {used}")))
            }
        }
    }
    match wrong.is_empty() {
        true => Ok(Pass::Whole(format!("{members} crates"))),
        false => Err(format!("arrows that are not in xtask/src/arrows.rs: {}", wrong.join(", "))),
    }
}

/// Our crates in a manifest's `[dependencies]`; what only tests use is their business.
fn used(manifest: &str) -> impl Iterator<Item = &str> {
    let lines = manifest.lines().skip_while(|line| *line != "[dependencies]").skip(1);
    lines
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.strip_prefix("ringfence-"))
        .filter_map(|line| line.split([' ', '.', '=']).next())
}

#[cfg(test)]
mod tests {
    use super::used;

    #[test]
    fn only_what_the_crate_itself_uses_counts() {
        let manifest = "[package]\nname = \"ringfence-x\"\n[dependencies]\nringfence-dma = { workspace = true }\n\
                        libc = \"0.2\"\nringfence-vhost-user.workspace = true\n[dev-dependencies]\nringfence-iommu = {}\n";
        assert_eq!(used(manifest).collect::<Vec<_>>(), ["dma", "vhost-user"]);
    }
}
