//! What can go wrong, by who erred.

use std::io;
use std::path::{Path, PathBuf};

/// An error of fetching or booting; its text says what to do where that is known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's file system refused.
    #[error("{what} {path}: {source}")]
    File {
        /// The verb, as in "cannot write".
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A program of the host is not there or cannot be started.
    #[error("cannot start {program}: {source}; install it, or run on Debian 12")]
    Start {
        /// The program.
        program: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A program of the host ran and failed.
    #[error("{program} failed ({status}); it said:\n{tail}")]
    Tool {
        /// The program with its arguments.
        program: String,
        /// Its exit status.
        status: String,
        /// The end of its output.
        tail: String,
    },
    /// The host lacks a file that one of its packages brings.
    #[error("{path} is missing, so {consequence}; as root run: apt-get install {package}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// What cannot be done without it.
        consequence: &'static str,
        /// The package to install.
        package: &'static str,
    },
    /// The host has no QEMU for a guest and none could be fetched.
    #[error("no QEMU for these guests: {reason}; as root run: {install}")]
    NoQemu {
        /// Why each way of getting one failed.
        reason: String,
        /// The command that would help.
        install: String,
    },
    /// A package or a kernel does not hold what it should.
    #[error("{subject}: {problem}")]
    Content {
        /// The package or file.
        subject: String,
        /// What is missing or wrong.
        problem: String,
    },
    /// A back-end process did not come up.
    #[error("back-end {program} {problem}; its log ends:\n{tail}")]
    Backend {
        /// The program.
        program: String,
        /// What it did or failed to do.
        problem: String,
        /// The end of its log.
        tail: String,
    },
    /// The guest did not get to its end.
    #[error("{platform}: {problem}; {source_name} ends:\n{tail}")]
    Guest {
        /// The platform's name.
        platform: &'static str,
        /// What happened instead.
        problem: String,
        /// Where the tail is from.
        source_name: &'static str,
        /// The end of the console, or of QEMU's own messages.
        tail: String,
    },
}

impl Error {
    /// Whether the host lacks a program or a package, rather than that
    /// something went wrong: who may skip guests, may skip them for this.
    pub fn is_missing_tool(&self) -> bool {
        matches!(self, Self::Start { .. } | Self::Missing { .. } | Self::NoQemu { .. })
    }

    /// Names the file that `source` is about.
    pub fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}

/// The last `lines` lines of `text`, indented for an error message.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let kept = &all[all.len().saturating_sub(lines)..];
    if kept.is_empty() {
        return "    (nothing)".to_owned();
    }
    kept.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::tail;

    #[test]
    fn a_tail_is_the_last_lines_or_says_nothing() {
        assert_eq!(tail("a\n\nb\nc\n", 2), "    b\n    c");
        assert_eq!(tail("\n", 5), "    (nothing)");
    }
}
