//! How fast a guest's disk is behind its IOMMU: QEMU's own virtio-blk, and `ringfence serve blk` beside it.
//!
//! Both are in one guest, which measures them in turn: what else the machine does meanwhile, it does to both.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use clap::Args;
use ringfence_guests::{Arch, Backend, Cache, Error, Initramfs, KernelSeries, Qemu, QemuSource};

use crate::Workspace;
use crate::pc::Pc;
use crate::static_program;
use crate::steps::{Log, Pass, StepResult, say};

/// The program that loads a disk.
const LOAD: &str = "ringfence-guest-load";

/// How large each disk is, in MiB.
const SIZE: usize = 256;

/// How the guest's kernel forgets mappings.
const MODES: [(&str, &str); 2] =
    [("strict", "intel_iommu=on iommu.strict=1"), ("lazy", "intel_iommu=on iommu.strict=0")];

/// What to measure.
#[derive(Args)]
pub(crate) struct SpeedArgs {
    /// How often each load is measured on each disk, in turn.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// For how many seconds each random load goes on.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Boot a kernel of this kind alone: strict or lazy.
    #[arg(long, value_parser = ["strict", "lazy"])]
    mode: Option<String>,
    /// This load alone, by its name in the table; the log then has the server's IOTLB traffic for it.
    #[arg(long, default_value = "")]
    load: String,
    /// Options of `ringfence serve blk`, such as "--poll 0".
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    options: String,
    /// Properties of its device in QEMU, such as "indirect_desc=off".
    #[arg(long, default_value = "")]
    properties: String,
}

/// Boots a guest a mode, and prints how the disks compare.
pub(crate) fn run(workspace: &Workspace, args: &SpeedArgs, log: &mut Log) -> StepResult {
    let progress = |line: &str| say(&format!("    {line}"));
    let text = |error: Error| error.to_string();
    let Some(load) = static_program::build(workspace, "ringfence-guests", LOAD, log)? else {
        return Ok(Pass::Skipped(static_program::WHY_NOT.to_owned()));
    };
    let cache = Cache::open(&workspace.target.join("guests"), &progress).map_err(text)?;
    let qemu = Qemu::find(&cache, QemuSource::Auto, &[Arch::Amd64]).map_err(text)?;
    let mut slowest = f64::INFINITY;
    for (mode, arguments) in MODES {
        if args.mode.as_ref().is_some_and(|only| only != mode) {
            continue;
        }
        let console = boot(workspace, args, &cache, &qemu, &load, arguments, log)?;
        let table = Table::read(&console)?;
        if table.loads.is_empty() {
            return Err(format!("the guest knows no load {}", args.load));
        }
        say(&format!("    {mode}, requests a second, medians of {} rounds", args.rounds));
        for (load, [own, other, ratio]) in table.rows() {
            say(&format!("      {load:16} QEMU's own {own:>8.0}   serve blk {other:>8.0}   {ratio:>5.2} times"));
            slowest = slowest.min(ratio);
        }
    }
    Ok(Pass::Whole(format!("at worst {slowest:.2} times QEMU's own")))
}

fn boot(
    workspace: &Workspace,
    args: &SpeedArgs,
    cache: &Cache<'_>,
    qemu: &Qemu,
    load: &Path,
    arguments: &str,
    log: &mut Log,
) -> Result<String, String> {
    let text = |error: Error| error.to_string();
    let kernel = cache.kernel(KernelSeries::V6_1, Arch::Amd64).map_err(text)?;
    let archive = Initramfs::of_speed(&kernel, &cache.busybox(Arch::Amd64).map_err(text)?, load).map_err(text)?;
    // In memory where that can be had: it is not the host's disk that is measured.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let folder = folder.map_err(|error| format!("cannot create a folder: {error}"))?;
    let at = |name: &str| folder.path().join(name);
    let [initramfs, console, own, other, socket] = ["initramfs", "console", "own", "other", "socket"].map(at);
    fs::write(&initramfs, archive.bytes()).map_err(|error| format!("{}: {error}", initramfs.display()))?;
    for image in [&own, &other] {
        fill(image).map_err(|error| format!("{}: {error}", image.display()))?;
    }
    let mut server = Command::new(workspace.ringfence());
    server.args(["serve", "blk", "--log", "info", "--socket"]).arg(&socket).arg("--image").arg(&other);
    server.args(args.options.split_whitespace());
    let server = Backend::start(server, &socket, &at("log")).map_err(text)?;
    let SpeedArgs { rounds, seconds, load: only, .. } = args;
    let flag = "disable-legacy=on,iommu_platform=on";
    let properties = if args.properties.is_empty() { String::new() } else { format!(",{}", args.properties) };
    let arguments =
        format!("loglevel=4 {arguments} ringfence.rounds={rounds} ringfence.seconds={seconds} ringfence.load={only}");
    let mut pc = Pc::with_shared_memory(qemu, 512);
    pc.device("intel-iommu")
        .disk("pci", &own, &format!("addr=4,{flag}"))
        .socket("backend", &socket)
        .device(format!("vhost-user-blk-pci,chardev=backend,addr=5,{flag}{properties}"))
        .linux(&kernel, &initramfs, &arguments);
    let (ended, said) = pc.run(&console)?;
    log.line(format_args!("$ {:?}\n{said}\n--- the server\n{}", pc.command(), server.log()));
    match said.contains("RINGFENCE end=done") {
        true => Ok(said),
        false => Err(format!("the guest did not come to its end; QEMU {ended}")),
    }
}

/// Something that is no hole.
fn fill(image: &Path) -> std::io::Result<()> {
    let mut file = File::create(image)?;
    let block: Vec<u8> = (0..1_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    (0..SIZE).try_for_each(|_| file.write_all(&block))
}

/// Requests a second, by load: of each round a pair.
#[derive(Default)]
struct Table {
    loads: Vec<String>,
    measured: BTreeMap<(String, u32), [Option<f64>; 2]>,
}

impl Table {
    fn read(console: &str) -> Result<Self, String> {
        let mut table = Self::default();
        for line in console.lines().filter_map(|line| line.split_once("RINGFENCE speed=").map(|(_, rest)| rest)) {
            table.add(line.trim()).ok_or_else(|| format!("the guest's line makes no sense: {line}"))?;
        }
        Ok(table)
    }

    fn add(&mut self, line: &str) -> Option<()> {
        let mut words = line.split_whitespace();
        let round = words.next()?.parse::<u32>().ok()?;
        let disk = match words.next()? {
            "own" => 0,
            "other" => 1,
            _ => return None,
        };
        let load = words.next()?.to_owned();
        let (requests, seconds) = (words.next()?.parse::<f64>().ok()?, words.next()?.parse::<f64>().ok()?);
        // The first round warms up.
        if round > 0 {
            if !self.loads.contains(&load) {
                self.loads.push(load.clone());
            }
            self.measured.entry((load, round)).or_default()[disk] = Some(requests / seconds.max(1e-6));
        }
        Some(())
    }

    /// Medians: QEMU's own, the other's, and of the rounds' ratios.
    fn rows(&self) -> impl Iterator<Item = (&str, [f64; 3])> {
        self.loads.iter().map(|load| {
            let pairs = self.measured.iter().filter(|((of, _), _)| of == load);
            let pairs: Vec<_> = pairs.filter_map(|(_, &[own, other])| Some((own?, other?))).collect();
            let of = |value: fn(&(f64, f64)) -> f64| median(pairs.iter().map(value).collect());
            (load.as_str(), [of(|pair| pair.0), of(|pair| pair.1), of(|pair| pair.1 / pair.0)])
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_becomes_ratios_of_the_same_round() {
        let console = "boot\nRINGFENCE speed=0 own a 9 1\nRINGFENCE speed=1 own a 10 1\nRINGFENCE speed=1 other a 20 1\n\
                       RINGFENCE speed=2 other a 90 1.0\r\nRINGFENCE speed=2 own a 30 1\n\
                       RINGFENCE speed=3 own a 8 2\nRINGFENCE speed=3 other a 8 2\nRINGFENCE end=done\n";
        let table = Table::read(console).unwrap();
        assert_eq!(table.rows().collect::<Vec<_>>(), [("a", [10.0, 20.0, 2.0])]);
        assert!(Table::read("RINGFENCE speed=1 own a x 1").is_err());
    }
}
