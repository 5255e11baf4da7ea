//! Temporary folders and copies of whole folders.

use super::process;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// A folder that is removed when dropped, or by the reaper when the test program is killed. Its
/// path is short: a Unix socket inside must stay under 108 bytes.
pub fn temp_dir(prefix: &str) -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix(prefix)
        .rand_bytes(6)
        .tempdir()
        .expect("create a temporary folder");
    process::reap_folder(dir.path());
    dir
}

/// Copies a folder with owners and modes, replacing `to`.
pub fn copy_folder(from: &Path, to: &Path) {
    if to.exists() {
        std::fs::remove_dir_all(to).expect("remove the folder to be replaced");
    }
    run(Command::new("cp").arg("-a").arg(from).arg(to));
}

/// Runs a helper program to its end; panics with its output when it fails.
#[track_caller]
pub fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("run {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
