//! Whether the disk has room for the log that the slot holds.
//!
//! Postgres says nothing of free space to SQL, so this looks at the file system itself, which it can on the server's own
//! machine alone. What cannot be looked at is no finding: most relays run on another one.

use super::{Facts, Finding, KEEP_SIZE, is_local, ok, warn};
use crate::admin::bytes;
use crate::config::Config;
use std::fs;
use std::path::{Path, PathBuf};

/// A file system and how full it is, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The folder that was looked at.
    pub folder: PathBuf,
    /// What others than root may still write.
    pub free: u64,
    /// The whole of it.
    pub size: u64,
}

/// Looks at the file system of the log. `peer` is where Postgres was reached, `backend` its process that serves us.
pub fn look(peer: &str, backend: i32, data_directory: &str) -> Option<Disk> {
    if data_directory.is_empty() || !is_local(peer) || !is_here(backend) {
        return None;
    }
    let data = Path::new(data_directory);
    // only Postgres' own user may look below the data directory
    room(data.join("pg_wal")).or_else(|| room(data.into()))
}

/// A tunnel or a container's port ends on the loopback interface too, and the same path may be another's folder here.
fn is_here(backend: i32) -> bool {
    fs::read_to_string(format!("/proc/{backend}/comm")).is_ok_and(|name| name.trim() == "postgres")
}

fn room(folder: PathBuf) -> Option<Disk> {
    let found = rustix::fs::statvfs(&folder).ok()?;
    Some(Disk {
        folder,
        free: found.f_bavail.saturating_mul(found.f_frsize),
        size: found.f_blocks.saturating_mul(found.f_frsize),
    })
}

/// Warns before the disk is full.
pub fn judge(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.disk";
    const WHY: &str = "on a full disk Postgres stops, for everybody";
    let Some(disk) = &facts.disk else {
        return Vec::new();
    };
    let slot = &config.slot;
    let folder = disk.folder.display();
    let (free, size) = (disk.free, disk.size);
    let found = format!("{} of {} are free at {folder}", bytes(free), bytes(size));
    let held = facts
        .shared
        .slot
        .as_ref()
        .and_then(|slot| slot.retained_bytes);
    let held = held.unwrap_or_default().max(0) as u64;
    let (server, room_mb) = (
        &facts.shared.server,
        (held.saturating_add(free / 2) >> 20).max(1),
    );
    let catch_up = "start the relay and see with status that it catches up, or give the disk room; if the relay is given up \
                    for good, run teardown";
    vec![match facts.log_bound() {
        Some(bound) if free < bound.saturating_sub(held) => warn(
            NAME,
            format!(
                "{found}, less than the {} that slot {slot} may still take",
                bytes(bound - held)
            ),
            format!("max_slot_wal_keep_size is {}; {WHY}", bytes(bound)),
            server.set(KEEP_SIZE, &format!("'{room_mb}MB'"), false)
                + " -- or give the disk room; a slot that needs more loses events",
        ),
        None if free < held => warn(
            NAME,
            format!("{found}, and slot {slot} holds {} of log", bytes(held)),
            format!("nothing bounds what it takes; {WHY}"),
            catch_up,
        ),
        _ if free < size / 20 => warn(NAME, format!("{found}, less than 5 %"), WHY, catch_up),
        _ => ok(NAME, found),
    }]
}
