//! passt, a network card's back-end that needs no privilege: no translation, and not ours.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::error::Error;
use crate::{tool, unpacked};

/// A passt that runs here.
#[derive(Clone, Debug)]
pub struct Passt {
    root: PathBuf,
}

impl Passt {
    /// Debian 13's, unpacked in the cache.
    ///
    /// # Errors
    ///
    /// A download that failed, or a program that does not start here.
    pub fn unpacked(cache: &Cache<'_>) -> Result<Self, Error> {
        let found = Self { root: cache.passt()? };
        tool::run(found.command().arg("--version")).map(|_| found)
    }

    /// The command that serves a card on `socket`, by vhost-user. DHCP gives the guest the address `guest`, and what it sends to
    /// `gateway` reaches this machine's own.
    pub fn serve(&self, guest: Ipv4Addr, gateway: Ipv4Addr, socket: &Path) -> Command {
        let mut command = self.command();
        command.args(["--foreground", "--vhost-user", "--ipv4-only", "--socket"]).arg(socket);
        command.args(["--address", &guest.to_string(), "--netmask", "24", "--gateway", &gateway.to_string()]);
        // Who it is changed to otherwise may not enter the folder that the socket is in.
        let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        command.args(["--runas", &format!("{user}:{group}")]);
        command
    }

    fn command(&self) -> Command {
        unpacked::program_at(&self.root, Path::new("usr/bin/passt"))
    }
}
