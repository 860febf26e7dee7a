use std::io::{IsTerminal, stderr};
use tracing_subscriber::filter::LevelFilter;

/// Sends the log to standard error: one line an event, in colour where a person reads it.
pub(crate) fn to_stderr(level: LevelFilter) {
    let colour = stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    tracing_subscriber::fmt().with_writer(stderr).with_max_level(level).with_ansi(colour).with_target(false).init();
}
