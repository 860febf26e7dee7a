//! Programs that the machine lacks, added by its own apt where nothing that is there has to change.

use std::env;
use std::path::Path;
use std::process::Command;

use crate::cache::Cache;
use crate::error::Error;
use crate::tool;

/// Installs packages, `what` in words, from the machine's own sources; a reason in words when that cannot be had without
/// changing what is installed.
pub fn install(cache: &Cache<'_>, what: &str, packages: &[&str]) -> Result<(), String> {
    install_if(cache, what, packages, |_, _| Ok(()))
}

/// The same, unless `suits` has a reason against one of the packages that would come, by its name and version.
pub(crate) fn install_if(
    cache: &Cache<'_>,
    what: &str,
    packages: &[&str],
    suits: impl Fn(&str, &str) -> Result<(), String>,
) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("not root".to_owned());
    }
    if !is_in_path("apt-get") {
        return Err("no apt-get here".to_owned());
    }
    // dpkg refuses a second one at a time rather than have it wait.
    let _alone = cache.lock().map_err(|error| error.to_string())?;
    let scratch = cache.scratch().map_err(|error| error.to_string())?;
    let apt = Apt { scratch: scratch.path() };
    apt.run(&["update"])?;
    let mut install = vec!["install", "--yes", "--no-install-recommends", "--no-remove"];
    install.extend(packages);
    let plan = apt.run(&[&["--simulate"], &install[..]].concat())?;
    if let Some(change) = plan.lines().find(|line| changes_the_machine(line)) {
        return Err(format!("it would change what is installed: {change}"));
    }
    plan.lines().filter_map(added).try_for_each(|(package, version)| suits(package, version))?;
    cache.say(&format!("installing {what} by apt"));
    apt.run(&install).map(drop)
}

/// What a person types as root for the same.
pub fn command(packages: &[&str]) -> String {
    format!("apt-get install --no-install-recommends {}", packages.join(" "))
}

/// Whether a line of apt's plan touches a package that is installed already.
fn changes_the_machine(line: &str) -> bool {
    // `Inst name [old] (new …)` is an upgrade; a new package has no `[old]`.
    let replaces = |rest: &str| rest.split_whitespace().nth(1).is_some_and(|word| word.starts_with('['));
    line.starts_with("Remv ") || line.strip_prefix("Inst ").is_some_and(replaces)
}

/// The package and the version that a line of apt's plan adds.
fn added(line: &str) -> Option<(&str, &str)> {
    let mut words = line.strip_prefix("Inst ")?.split_whitespace();
    let package = words.next()?;
    Some((package, words.next()?.strip_prefix('(')?))
}

/// apt with the machine's sources, and lists of our own: those of the machine
/// may be absent, and stay as they are.
struct Apt<'a> {
    scratch: &'a Path,
}

impl Apt<'_> {
    fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let scratch = std::path::absolute(self.scratch).map_err(|error| error.to_string())?;
        for folder in ["lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(scratch.join(folder)).map_err(|error| error.to_string())?;
        }
        let mut command = Command::new("apt-get");
        command
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .arg("-q")
            .arg(format!("-oDir::State::Lists={}", scratch.join("lists").display()))
            .arg(format!("-oDir::Cache={}", scratch.join("cache").display()))
            .arg("-oAPT::Sandbox::User=root")
            .arg("-oAcquire::Retries=3")
            .arg("-oAcquire::Languages=none")
            .args(arguments);
        tool::run(&mut command).map_err(|error| match error {
            Error::Tool { tail, .. } => last_error(&tail),
            other => other.to_string(),
        })
    }
}

/// apt's own one-line reason, or the end of what it said.
fn last_error(tail: &str) -> String {
    let lines: Vec<&str> = tail.lines().map(str::trim).collect();
    let errors: Vec<&str> = lines.iter().copied().filter(|line| line.starts_with("E: ")).collect();
    match errors.is_empty() {
        true => lines.join(" "),
        false => errors.join(" "),
    }
}

/// Whether a shell would find `program`.
pub fn is_in_path(program: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_only_adds_is_told_from_one_that_changes() {
        assert!(!changes_the_machine("Inst seabios (1.16.2-1 Debian:12.15/oldstable [all])"));
        assert!(!changes_the_machine("Conf seabios (1.16.2-1 Debian:12.15/oldstable [all])"));
        assert!(changes_the_machine("Inst libusb-1.0-0 [2:1.0.25-1] (2:1.0.26-1 Debian:12.15/oldstable [amd64])"));
        assert!(changes_the_machine("Remv qemu-utils [1:10.0.2]"));
    }

    #[test]
    fn a_plan_says_what_comes() {
        let line = "Inst qemu-system-x86 (1:7.2+dfsg-7+deb12u18 Debian:12.15/oldstable [amd64])";
        assert_eq!(added(line), Some(("qemu-system-x86", "1:7.2+dfsg-7+deb12u18")));
        assert_eq!(added("Inst libusb-1.0-0 [2:1.0.25-1] (2:1.0.26-1 Debian:12.15/oldstable [amd64])"), None);
        assert_eq!(added("Conf qemu-system-x86 (1:7.2+dfsg-7+deb12u18 Debian:12.15/oldstable [amd64])"), None);
    }

    #[test]
    fn apt_is_quoted_by_its_errors() {
        assert_eq!(last_error("    Reading\n    E: no such package\n"), "E: no such package");
        assert_eq!(last_error("    odd\n    end"), "odd end");
    }
}
