//! passt, a network card's back-end that needs no privilege: no translation, and not ours.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;

use crate::cache::Cache;
use crate::error::Error;
use crate::unpacked::Program;

/// A passt that runs here.
#[derive(Clone, Debug)]
pub struct Passt(Program);

impl Passt {
    /// Debian 13's, unpacked in the cache.
    ///
    /// # Errors
    ///
    /// A download that failed, or a program that does not start here.
    pub fn unpacked(cache: &Cache<'_>) -> Result<Self, Error> {
        Program::found(cache.passt()?, "usr/bin/passt").map(Self)
    }

    /// The command that serves a card on `socket`, by vhost-user. DHCP gives the guest the address `guest`, and what it sends to
    /// `gateway` reaches this machine's own.
    pub fn serve(&self, guest: Ipv4Addr, gateway: Ipv4Addr, socket: &Path) -> Command {
        let mut command = self.0.command();
        command.args(["--foreground", "--vhost-user", "--ipv4-only", "--socket"]).arg(socket);
        command.args(["--address", &guest.to_string(), "--netmask", "24", "--gateway", &gateway.to_string()]);
        // Who it is changed to otherwise may not enter the folder that the socket is in.
        let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        command.args(["--runas", &format!("{user}:{group}")]);
        command
    }
}
