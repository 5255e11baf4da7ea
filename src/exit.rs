//! Why the program ended, as its exit code. The numbers are those of `sysexits.h`; 1 and 2 are what monitoring
//! systems take for a warning and for trouble.

use std::process::ExitCode;

/// The exit codes, all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Stopped on request, or drained; also `--help` and `--version`.
    Done = 0,
    /// `check --strict` has found warnings, or `status` a lag above its limit.
    Warning = 1,
    /// `check` has found what keeps the relay from working.
    Failure = 2,
    /// A flag, or its environment variable, is unknown, missing or has a value that is not allowed (`EX_USAGE`).
    Usage = 64,
    /// An event cannot be published and must not be skipped (`EX_DATAERR`).
    Data = 65,
    /// A server could not be reached within the retry budget (`EX_UNAVAILABLE`).
    Unavailable = 69,
    /// A defect of this program (`EX_SOFTWARE`).
    Internal = 70,
    /// The slot is in use by another relay, and `--no-wait` was given (`EX_TEMPFAIL`).
    SlotInUse = 75,
    /// A slot, publication, stream, privilege or file is missing or wrong (`EX_CONFIG`).
    Configuration = 78,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}
