//! `ringfence matrix`: the proposal's table, every cell executed.

use anyhow::Context;
use clap::{Args, ValueEnum};
use ringfence_matrix::record::Table;
use ringfence_matrix::{Genuine, Matrix, Select, compatibility, html, report};
use std::fs;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Run every platform × driver × device of the proposal, and tell what happens
///
/// Each cell is a small machine in this process: a driver, a disk, a ring between them, and the IOMMU or the address
/// translation that the platform has. Bytes are written and read back, and canaries tell what else was touched. Needs
/// neither root nor QEMU, and takes well under a second.
#[derive(Args)]
#[command(after_long_help = "Exit status: 0 if every cell is as the proposal has it, or differs for a reason that is \
                             known; 1 if one differs for none, or something failed.")]
pub(crate) struct Run {
    /// How to write it
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Where to write it, instead of to standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Run some of the cells: KEY=NAME or KEY!=NAME with the keys platform, driver and device, names separated by '|',
    /// ending in '*' for any rest. For example 'platform=xen|x86* driver!=old'
    #[arg(long, value_name = "EXPR", default_value = "", hide_default_value = true)]
    only: Select,
    /// Put the real cells of this JSON, which --format json wrote, beside the embedded ones, rather than boot them again
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// For reading
    Table,
    /// For programs; docs/matrix.md describes it
    Json,
    /// One page that opens in any browser: danger first, every cell with its evidence
    Html,
    /// The short table of docs/compatibility.md
    Markdown,
}

impl Run {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let real = self.from.as_deref().map(stored).transpose()?.map(|table| table.into_real(&self.only));
        let matrix = Matrix::run(&self.only, &Genuine);
        anyhow::ensure!(!matrix.cells.is_empty(), "--only leaves no cell");
        let mut table = matrix.table();
        table.cells.extend(real.into_iter().flatten());
        let text = match self.format {
            Format::Table => format!("{matrix}{}", report::real(&table)),
            Format::Json => serde_json::to_string_pretty(&table)? + "\n",
            Format::Html => html::page(&table),
            Format::Markdown => compatibility::page(&table),
        };
        match &self.output {
            Some(path) => fs::write(path, text).with_context(|| format!("can't write {}", path.display()))?,
            None => stdout().write_all(text.as_bytes()).context("can't write to standard output")?,
        }
        let unexpected = table.cells.iter().filter(|cell| cell.unexpected).count();
        if unexpected > 0 {
            eprintln!("ringfence: {unexpected} cells are not as the proposal has them, for no reason that is known");
        }
        Ok(if unexpected == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// What an earlier run wrote.
fn stored(path: &Path) -> anyhow::Result<Table> {
    let read = || -> anyhow::Result<Table> { Ok(Table::from_json(&fs::read_to_string(path)?)?) };
    read().with_context(|| format!("can't read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use ringfence_matrix::record::Source;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        run: Run,
    }

    fn run(arguments: &[&str]) -> Run {
        Alone::parse_from([&["matrix"], arguments].concat()).run
    }

    #[test]
    fn json_goes_where_it_is_told_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("matrix.json");
        let only = "platform=x86-iommu driver=new";
        run(&["--format", "json", "--output", path.to_str().unwrap(), "--only", only]).run().unwrap();
        let read: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        assert_eq!((read["schema"].as_u64(), read["cells"].as_array().map(Vec::len)), (Some(1), Some(5)));

        assert!(run(&["--only", "platform=xen platform=x86"]).run().is_err(), "no cell is both");
    }

    #[test]
    fn what_was_stored_is_put_beside_what_is_run() {
        let folder = tempfile::tempdir().unwrap();
        let [from, path] = ["real.json", "both.json"].map(|name| folder.path().join(name));
        let mut table = Matrix::run(&"platform=xen driver=old".parse().unwrap(), &Genuine).table();
        for cell in &mut table.cells {
            cell.source = Source::Real;
        }
        // What is embedded is run anew.
        table.cells.push(Matrix::run(&"platform=x86".parse().unwrap(), &Genuine).table().cells.remove(0));
        fs::write(&from, serde_json::to_string(&table).unwrap()).unwrap();
        let [from, output] = [&from, &path].map(|path| path.to_str().unwrap());
        let stored = |more: &[&str]| {
            run(&[&["--from", from, "--output", output], more].concat()).run()?;
            anyhow::Ok(fs::read_to_string(&path)?)
        };
        let cells = |more: &[&str]| {
            let table = Table::from_json(&stored(&[&["--format", "json"], more].concat()).unwrap()).unwrap();
            let real = table.cells.iter().filter(|cell| cell.source == Source::Real).count();
            (table.cells.len() - real, real)
        };
        assert_eq!(cells(&[]), (ringfence_matrix::Case::all().len(), 5));
        assert_eq!(cells(&["--only", "platform=xen device=old-emulated"]), (4, 1));
        for format in ["html", "markdown", "table"] {
            let text = stored(&["--format", format, "--only", "platform=xen"]).unwrap();
            assert!(text.len() > 1000, "{format}");
        }

        for (text, error) in [
            ("", "not a matrix as JSON"),
            ("{\"cells\": []}", "has no \"schema\""),
            ("{\"schema\": 2, \"rows\": []}", "schema is 2, and this ringfence reads schema 1"),
        ] {
            fs::write(from, text).unwrap();
            let told = format!("{:#}", stored(&[]).unwrap_err());
            assert!(told.contains(error) && told.contains("real.json"), "{told}");
        }
    }
}
