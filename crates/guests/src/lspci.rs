//! lspci: what others make of a function's configuration space.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use crate::cache::{Cache, scratch};
use crate::error::Error;
use crate::tool;
use crate::unpacked::Program;

/// An lspci that runs here.
#[derive(Clone, Debug)]
pub struct Lspci(Program);

impl Lspci {
    /// Debian's, unpacked in the cache.
    ///
    /// # Errors
    ///
    /// A download that failed, or a program that does not start here.
    pub fn unpacked(cache: &Cache<'_>) -> Result<Self, Error> {
        Program::found(cache.pciutils()?, "usr/bin/lspci").map(Self)
    }

    /// Everything that it says of the functions in `spaces`: configuration spaces by slot, as in `00:05.0`.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn describe(&self, spaces: &BTreeMap<String, Vec<u8>>) -> Result<String, Error> {
        let folder = scratch()?;
        let path = folder.path().join("spaces");
        fs::write(&path, dump(spaces)).map_err(Error::file("cannot write", &path))?;
        let mut command = self.0.command();
        command.arg("-F").arg(&path).args(["-vvv", "-nn", "-i"]).arg(self.0.root.join("usr/share/misc/pci.ids"));
        tool::run(&mut command)
    }
}

/// As lspci's own `-xxxx` writes it, and `-F` reads it.
fn dump(spaces: &BTreeMap<String, Vec<u8>>) -> String {
    let mut text = String::new();
    for (slot, space) in spaces {
        let _ = writeln!(text, "{slot} function");
        for (at, line) in space.chunks(16).enumerate() {
            let bytes: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            let _ = writeln!(text, "{:02x}: {}", at * 16, bytes.join(" "));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_are_written_as_lspci_reads_them() {
        let spaces = BTreeMap::from([("00:05.0".to_owned(), (0..20).collect())]);
        let expected = "00:05.0 function\n00: 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f\n10: 10 11 12 13\n\n";
        assert_eq!(dump(&spaces), expected);
    }
}
