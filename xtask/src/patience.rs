//! Waiting for a QEMU, and not for ever.

use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A guest of ours ends by itself within this, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(20);

/// Runs QEMU to its end, or for as long as is reasonable.
pub(crate) fn wait(command: &mut Command) -> Result<ExitStatus, String> {
    let mut child = command.stdin(Stdio::null()).spawn().map_err(|error| format!("cannot start QEMU: {error}"))?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            return Ok(status);
        }
        thread::sleep(PAUSE);
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(format!("no end after {} s; killed", PATIENCE.as_secs()))
}
