//! Waiting for a QEMU, and not for ever.

use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A guest of ours ends by itself within this, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(20);

/// Runs QEMU to its end, or for as long as is reasonable.
pub(crate) fn wait(command: &mut Command) -> Result<ExitStatus, String> {
    wait_and(command, || Ok(()))
}

/// The same, and calls `meanwhile` many times a second; its error ends QEMU.
pub(crate) fn wait_and(
    command: &mut Command,
    mut meanwhile: impl FnMut() -> Result<(), String>,
) -> Result<ExitStatus, String> {
    let mut child = command.stdin(Stdio::null()).spawn().map_err(|error| format!("cannot start QEMU: {error}"))?;
    let deadline = Instant::now() + PATIENCE;
    let reason = loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            return Ok(status);
        }
        if let Err(reason) = meanwhile() {
            break reason;
        }
        if Instant::now() >= deadline {
            break format!("no end after {} s", PATIENCE.as_secs());
        }
        thread::sleep(PAUSE);
    };
    let _ = child.kill();
    let _ = child.wait();
    Err(format!("{reason}; killed"))
}
