//! The `ringfence` command line.

mod bench;
mod demo;
mod log;
mod matrix;
mod serve;
mod wrap;

use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

/// Virtio whose DMA stays inside the IOMMU.
///
/// A virtual machine hands its memory to the processes that serve its devices. With a virtual IOMMU and the feature flag
/// VIRTIO_F_ACCESS_PLATFORM (QEMU: iommu_platform=on) a guest decides what each of them may reach. Ringfence's devices
/// offer that flag and keep to it.
#[derive(Parser)]
#[command(version, propagate_version = true, max_term_width = 100, after_long_help = EXIT_STATUS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "\
Exit status:
  0  done, or ended by SIGTERM or SIGINT
  1  something failed; standard error says what, where, and what to do
  2  the command line is not understood";

#[derive(Subcommand)]
enum Command {
    /// Serve a device that respects the guest's IOMMU, over vhost-user or vfio-user
    #[command(subcommand)]
    Serve(serve::Serve),
    Wrap(wrap::Wrap),
    Bench(bench::Bench),
    Demo(demo::Demo),
    Matrix(matrix::Run),
}

fn main() -> ExitCode {
    match run(Cli::parse_from(arguments(std::env::args_os()))) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ringfence: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Serve(serve) => serve.run(),
        Command::Wrap(wrap) => wrap.run(),
        Command::Bench(bench) => bench.run(),
        Command::Demo(demo) => demo.run(),
        Command::Matrix(matrix) => matrix.run(),
    }
}

/// Management software starts a vhost-user back-end by its path alone, with options that the convention defines and no
/// subcommand. Under the name `ringfence-blk` (a link will do) the program is therefore `ringfence serve blk`.
fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut given = given.peekable();
    let name = given.peek().and_then(|path| Path::new(path).file_name()).unwrap_or_default().to_owned();
    let Some(device) = name.to_str().and_then(|name| name.strip_prefix("ringfence-")) else {
        return given.collect();
    };
    let words = ["ringfence", "serve", device].map(OsString::from);
    words.into_iter().chain(given.skip(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_link_names_the_device() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let given = words(&["/usr/libexec/ringfence-blk", "--fd", "3"]);
        assert_eq!(arguments(given.into_iter()), words(&["ringfence", "serve", "blk", "--fd", "3"]));
        let given = words(&["target/release/ringfence", "serve"]);
        assert_eq!(arguments(given.clone().into_iter()), given);
    }
}
