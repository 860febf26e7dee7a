//! Runs a program of the host to its end and keeps what it said for the error.

use std::process::{Command, Output, Stdio};

use crate::error::{Error, tail};

/// Runs `command` without input and returns its standard output as text.
pub(crate) fn run(command: &mut Command) -> Result<String, Error> {
    bytes(command).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Runs `command` without input and returns its standard output.
pub(crate) fn bytes(command: &mut Command) -> Result<Vec<u8>, Error> {
    let output = output(command)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(Error::Tool { program: line(command), status: output.status.to_string(), tail: tail(&said, 15) })
}

/// Runs `command` and returns whatever it answered, success or not.
pub(crate) fn output(command: &mut Command) -> Result<Output, Error> {
    command.stdin(Stdio::null()).output().map_err(|source| Error::Start { program: line(command), source })
}

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| {
        let argument = argument.to_string_lossy();
        match argument.contains(' ') {
            true => format!("'{argument}'"),
            false => argument.into_owned(),
        }
    }));
    words.join(" ")
}
