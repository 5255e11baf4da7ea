//! The WAL that Postgres keeps for the slot, and what bounds it: for those who watch the disk. It decides nothing.
//!
//! Source: <https://www.postgresql.org/docs/current/view-pg-replication-slots.html>.

use crate::postgres::connection::quote_literal;
use crate::postgres::{Connection, Lsn};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// `max_slot_wal_keep_size`, `wal_status` and `safe_wal_size` came with it.
const LIMITS: u32 = 130_000;

/// As `pg_replication_slots` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotWal {
    /// The end of the WAL. While the publisher takes nothing the copy stream stands still, and does not say it.
    pub wal_end: Lsn,
    /// From the slot's `restart_lsn` to the end of the WAL.
    pub bytes: u64,
    /// `max_slot_wal_keep_size` in bytes; `None`: there is no limit but the disk.
    pub limit_bytes: Option<u64>,
    /// `safe_wal_size`: so much can still be written before the slot is in danger; `None`: there is no limit.
    pub safe_bytes: Option<u64>,
    /// `wal_status`, from Postgres 13 on.
    pub status: Option<String>,
    /// When it was read.
    pub at: SystemTime,
}

/// What was read last. It is shared, since threads read it that nobody waits for.
#[derive(Clone, Debug, Default)]
pub struct SlotWalSeen(Arc<Mutex<Option<SlotWal>>>);

impl SlotWalSeen {
    /// `None`: not read yet.
    pub fn get(&self) -> Option<SlotWal> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Reads it over this connection. Where that fails the last one stays: whoever has the connection finds out himself.
    pub fn look(&self, connection: &mut Connection, slot: &str) {
        let read = connection.simple_query(&query(connection.server_version_num(), slot));
        let found = match &read {
            Ok(rows) => rows.first().and_then(|row| parse(row)),
            Err(error) => {
                log::debug!(cause:% = error; "cannot read how much WAL is kept for the slot");
                None
            }
        };
        if found.is_some() {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = found;
        }
    }
}

fn query(version: u32, slot: &str) -> String {
    let (status, safe) = match version >= LIMITS {
        true => ("wal_status", "safe_wal_size"),
        false => ("NULL", "NULL"),
    };
    format!(
        "SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn), {status}, {safe}, \
         pg_catalog.pg_current_wal_lsn(), (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'max_slot_wal_keep_size') \
         FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
        quote_literal(slot)
    )
}

/// `None`: a slot without a `restart_lsn`.
fn parse(row: &[Option<String>]) -> Option<SlotWal> {
    let cell = |index: usize| row.get(index).and_then(|cell| cell.as_deref());
    let bytes: i64 = cell(0)?.parse().ok()?;
    // -1: no limit
    let limit_mib: Option<u64> = cell(4).and_then(|setting| setting.parse().ok());
    let safe_bytes = cell(2).and_then(|size| size.parse::<i64>().ok());
    Some(SlotWal {
        wal_end: cell(3)?.parse().ok()?,
        bytes: u64::try_from(bytes).unwrap_or(0),
        limit_bytes: limit_mib.map(|mib| mib.saturating_mul(1 << 20)),
        // below zero: only the next checkpoint of Postgres decides
        safe_bytes: safe_bytes.map(|size| u64::try_from(size).unwrap_or(0)),
        status: cell(1).map(str::to_string),
        at: SystemTime::now(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(
        row: [Option<&str>; 4],
        bytes: u64,
        safe_bytes: Option<u64>,
        limit_bytes: Option<u64>,
    ) {
        let [wal, status, safe, limit] = row;
        let row = [wal, status, safe, Some("1/10"), limit];
        let found = parse(&row.map(|cell| cell.map(str::to_string))).unwrap();
        assert_eq!(found.wal_end, Lsn(0x1_0000_0010));
        assert_eq!(
            (found.bytes, found.safe_bytes, found.limit_bytes),
            (bytes, safe_bytes, limit_bytes)
        );
    }

    #[test]
    fn a_limit_is_told_where_there_is_one() {
        let reserved = Some("reserved");
        check([Some("7"), reserved, None, Some("-1")], 7, None, None);
        check(
            [Some("7"), reserved, Some("1048569"), Some("1")],
            7,
            Some(1_048_569),
            Some(1 << 20),
        );
        check(
            [Some("7"), Some("unreserved"), Some("-5"), Some("0")],
            7,
            Some(0),
            Some(0),
        );
        // Postgres 12
        check([Some("7"), None, None, None], 7, None, None);
        assert_eq!(parse(&[const { None }; 5]), None);
        assert_eq!(parse(&[]), None);
    }
}
