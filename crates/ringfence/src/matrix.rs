//! `ringfence matrix`: the proposal's table, every cell executed.

mod real;

use anyhow::Context;
use clap::{Args, ValueEnum};
use ringfence_matrix::real::{Cell, Report};
use ringfence_matrix::record::{Record, Table};
use ringfence_matrix::{Case, Genuine, Matrix, Select, compatibility, html};
use std::fs;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Run every platform × driver × device of the proposal, and tell what happens
///
/// Each cell is a small machine in this process: a driver, a disk, a ring between them, and the IOMMU or the address
/// translation that the platform has. Bytes are written and read back, and canaries tell what else was touched. Needs
/// neither root nor QEMU, and takes well under a second.
///
/// With --real the same table is also executed by real kernels in real QEMU, which takes minutes.
#[derive(Args)]
#[command(after_long_help = "Exit status: 0 if every cell is as the proposal has it, or differs for a reason that is \
                             known; 1 if one differs for none, or something failed; 130 after Ctrl-C.")]
pub(crate) struct Run {
    /// How to write it
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Where to write it, instead of to standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Run some of the cells: KEY=NAME or KEY!=NAME with the keys source (embedded or real), platform, driver and
    /// device, names separated by '|', ending in '*' for any rest. A real cell is also called by the names of the cell
    /// that it stands for. Semicolons separate selections of which one is enough. For example
    /// 'platform=xen|x86* driver!=old'
    #[arg(long, value_name = "EXPR", default_value = "", hide_default_value = true)]
    only: Select,
    /// Put the real cells of this JSON, which --format json wrote, beside the embedded ones, rather than boot them again
    #[arg(long, value_name = "FILE", conflicts_with = "real")]
    from: Option<PathBuf>,
    /// Only name the cells
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    real: real::Args,
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
        let stored = self.from.as_deref().map(stored).transpose()?.map(|table| table.into_real(&self.only));
        let cells = if self.real.real { Cell::selected(&self.only) } else { Vec::new() };
        let cases: Vec<Case> = Case::all().into_iter().filter(|case| self.only.matches(case)).collect();
        let none = cells.is_empty() && cases.is_empty() && stored.as_ref().is_none_or(Vec::is_empty);
        anyhow::ensure!(!none, "--only leaves no cell");
        if self.list {
            cases.iter().for_each(|case| println!("source=embedded {case}"));
            cells.iter().for_each(|cell| println!("source=real {cell}"));
            return Ok(ExitCode::SUCCESS);
        }
        let matrix = Matrix::run(&self.only, &Genuine);
        let real = match stored {
            Some(stored) => stored,
            None if cells.is_empty() => Vec::new(),
            None => self.real.run(&cells)?,
        };
        self.write(&matrix, &real)?;
        if real.len() < cells.len() {
            eprintln!("ringfence: stopped after {} of {} real cells", real.len(), cells.len());
            return Ok(ExitCode::from(real::STOPPED));
        }
        let skipped = self.real.refuses_to_skip(&real);
        if skipped > 0 {
            eprintln!("ringfence: {skipped} cells were skipped, and --no-skip was given");
        }
        let unexpected = matrix.unexpected().count() + real.iter().filter(|cell| cell.unexpected).count();
        if unexpected > 0 {
            eprintln!("ringfence: {unexpected} cells are not as they should be, for no reason that is known");
        }
        Ok(if unexpected + skipped == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn write(&self, matrix: &Matrix, real: &[Record]) -> anyhow::Result<()> {
        let mut table = matrix.table();
        table.cells.extend_from_slice(real);
        let text = match self.format {
            Format::Table if matrix.cells.is_empty() => Report(real).to_string(),
            Format::Table => format!("{matrix}{}", Report(real)),
            Format::Json => serde_json::to_string_pretty(&table)? + "\n",
            Format::Html => html::page(&table),
            Format::Markdown => compatibility::page(&table),
        };
        match &self.output {
            Some(path) => fs::write(path, text).with_context(|| format!("can't write {}", path.display())),
            None => stdout().write_all(text.as_bytes()).context("can't write to standard output"),
        }
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
        assert_eq!((read["schema"].as_u64(), read["cells"].as_array().map(Vec::len)), (Some(1), Some(6)));

        assert!(run(&["--only", "platform=xen platform=x86"]).run().is_err(), "no cell is both");
        assert!(run(&["--only", "source=real"]).run().is_err(), "none without --real");
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
        assert_eq!(cells(&[]), (ringfence_matrix::Case::all().len(), 6));
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
