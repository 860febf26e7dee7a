//! `ringfence demo`: the whole path in one process tree, without root or QEMU.

mod checks;
mod server;
mod world;

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ringfence_policy::IommuMode;
use server::Server;
use std::io::{IsTerminal, stderr};
use std::process::ExitCode;
use world::{Mapping, World};

/// Make a disk, serve it, drive it through a software IOMMU, and check every byte.
///
/// A second process serves a temporary image over a real vhost-user socket; this one is its front-end, its IOMMU and its
/// driver. Needs neither root nor QEMU, and leaves nothing behind.
#[derive(Args)]
#[command(after_long_help = "Exit status: 0 if everything held, 1 if something did not; standard error says what.")]
pub(crate) struct Demo {
    /// The size of the disk, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 8, value_parser = clap::value_parser!(u64).range(2..=1024))]
    size: u64,
}

impl Demo {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let folder = tempfile::Builder::new().prefix("ringfence-demo-").tempdir()?;
        let image = folder.path().join("disk.img");
        let size = self.size << 20;
        std::fs::File::create(&image).and_then(|file| file.set_len(size)).context("can't make the demo's image")?;

        println!("Ringfence demo: a disk of {} MiB in a process of its own, behind a software IOMMU\n", self.size);
        let bar = progress(size * 3 * Mapping::ALL.len() as u64);
        let server = Server::start(&image, &folder.path().join("offer.sock"), IommuMode::Offer)?;
        let mut rows = Vec::new();
        for mapping in Mapping::ALL {
            bar.set_message(mapping.name());
            let world = World::connect(&server)?;
            let row = world.exercise(mapping, &image, size, &bar);
            rows.push((mapping, row.with_context(|| format!("mapping mode '{}'", mapping.name()))?));
        }
        bar.finish_and_clear();

        println!("{}", checks::HEADER);
        for (mapping, row) in &rows {
            println!("{}", row.line(*mapping));
        }
        println!();
        checks::expect(&rows)?;

        let forbidden = World::connect(&server)?.touch_forbidden_page()?;
        println!("forbidden page   {forbidden}");
        let log = server.stop()?;
        let strict = Server::start(&image, &folder.path().join("require.sock"), IommuMode::Require)?;
        let refused = World::connect(&strict)?.start_old_driver()?;
        println!("--iommu require  an old driver: {refused}");
        World::connect(&strict)?.start_new_driver()?;
        println!("                 a new driver, next on the same socket: served, translated");
        strict.stop()?;
        println!("\nWhat the server logged, a line a connection and a line a fault:");
        log.lines()
            .filter(|line| line.contains("ended") || line.contains("fault:"))
            .for_each(|line| println!("  {line}"));
        println!("\nEvery byte was where it belongs, and nowhere else.");
        Ok(ExitCode::SUCCESS)
    }
}

fn progress(bytes: u64) -> ProgressBar {
    // Where nobody watches, a bar is noise.
    let target = if stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{msg:<18} [{bar:40}] {bytes}/{total_bytes}")
        .expect("the template is a constant")
        .progress_chars("=> ");
    ProgressBar::with_draw_target(Some(bytes), target).with_style(style)
}
