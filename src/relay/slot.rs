//! What must be right in Postgres before the relay starts: the slot, the publication, the server.
//!
//! Everything is read on the replication connection itself, which takes plain SQL; `pg_replication_slots`
//! and `pg_publication` are readable by every role.

use super::error::Error;
use crate::postgres::connection::{quote_identifier, quote_literal};
use crate::postgres::identifier::identifier;
use crate::postgres::{Connection, Lsn};
use std::time::Duration;

/// The oldest server: pgoutput with the options used here, and still found in the field.
const OLDEST: u32 = 120_000;
/// Transactional messages (`messages` of pgoutput) came with it.
const MESSAGES: u32 = 140_000;

/// The slot as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// `confirmed_flush_lsn`: replication starts here at the earliest.
    pub confirmed_flush_lsn: Lsn,
    /// After so long without a status update Postgres ends the session; zero: never.
    pub wal_sender_timeout: Duration,
}

/// Checks server, slot and publication.
pub fn check(connection: &mut Connection, slot: &str, publication: &str) -> Result<Slot, Error> {
    let version = connection.server_version_num();
    if version < OLDEST {
        return Err(Error::Setup(format!(
            "check the server: version {} is too old; Postgres 12 or newer is needed",
            connection.parameter("server_version").unwrap_or("unknown")
        )));
    }
    let found = check_slot(connection, slot, publication)?;
    check_publication(connection, publication)?;
    let setting = "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'";
    let rows = connection.simple_query(setting)?;
    let timeout_ms = rows
        .first()
        .and_then(|row| row.first()?.as_deref()?.parse().ok());
    Ok(Slot {
        confirmed_flush_lsn: found,
        wal_sender_timeout: Duration::from_millis(timeout_ms.unwrap_or(0)),
    })
}

fn check_slot(connection: &mut Connection, slot: &str, publication: &str) -> Result<Lsn, Error> {
    // wal_status tells a slot whose log is gone, from 13 on
    let since = |version, column| match connection.server_version_num() >= version {
        true => column,
        false => "NULL",
    };
    let (wal_status, reason) = (
        since(130_000, "wal_status"),
        since(170_000, "invalidation_reason"),
    );
    let sql = format!(
        "SELECT slot_type, plugin, database = current_database(), active_pid, confirmed_flush_lsn, {wal_status}, \
         {reason}, database FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
        quote_literal(slot)
    );
    let rows = connection.simple_query(&sql)?;
    let Some(
        [
            slot_type,
            plugin,
            here,
            active_pid,
            confirmed,
            wal_status,
            reason,
            database,
        ],
    ) = rows
        .into_iter()
        .next()
        .and_then(|row| <[Option<String>; 8]>::try_from(row).ok())
    else {
        return Err(Error::Setup(format!(
            "find the slot: {slot} does not exist; after creating the publication {publication}, run in this database: \
             SELECT pg_create_logical_replication_slot({}, 'pgoutput');",
            quote_literal(slot)
        )));
    };
    if slot_type.as_deref() != Some("logical") || plugin.as_deref() != Some("pgoutput") {
        return Err(Error::Setup(format!(
            "check the slot: {slot} is a {} slot of plugin {}, the relay needs a logical one of pgoutput; name another with -slot",
            slot_type.unwrap_or_default(),
            plugin.as_deref().unwrap_or("(none)")
        )));
    }
    if here.as_deref() != Some("t") {
        return Err(Error::Setup(format!(
            "check the slot: {slot} belongs to database {}; name that one in -db",
            database.unwrap_or_default()
        )));
    }
    if wal_status.as_deref() == Some("lost") {
        let why = match reason.as_deref() {
            None => {
                "most often because the log that it needed was more than max_slot_wal_keep_size"
            }
            Some("wal_removed") => {
                "wal_removed: the log that it needed was more than max_slot_wal_keep_size"
            }
            Some(reason) => reason,
        };
        return Err(Error::Setup(format!(
            "check the slot: Postgres has given {slot} up ({why}), so events are missing; drop the slot, create it anew, and \
             publish what was committed in between by hand"
        )));
    }
    if let Some(pid) = active_pid {
        return Err(Error::SlotInUse {
            slot: slot.to_string(),
            pid: pid.parse().ok(),
        });
    }
    Ok(confirmed
        .and_then(|lsn| lsn.parse().ok())
        .unwrap_or_default())
}

fn check_publication(connection: &mut Connection, publication: &str) -> Result<(), Error> {
    let sql = format!(
        "SELECT pubinsert FROM pg_catalog.pg_publication WHERE pubname = {}",
        quote_literal(publication)
    );
    let rows = connection.simple_query(&sql)?;
    let name = identifier(publication);
    match rows
        .first()
        .and_then(|row| row.first())
        .map(|cell| cell.as_deref())
    {
        Some(Some("t")) => Ok(()),
        Some(_) => Err(Error::Setup(format!(
            "check the publication: {publication} does not publish inserts; run ALTER PUBLICATION {name} SET (publish = 'insert')"
        ))),
        None => Err(Error::Setup(format!(
            "find the publication: {publication} does not exist in this database; run CREATE PUBLICATION {name} FOR TABLE outbox \
             WITH (publish = 'insert'), with the tables of -table in place of outbox if it names any, or name another \
             publication with -publication (one that is created after the slot lacks what was \
             written before it: create the slot anew then)"
        ))),
    }
}

/// pgoutput's options for a server of this version; `messages`: those without a table are wanted.
pub fn pgoutput_options(
    server_version_num: u32,
    publication: &str,
    messages: bool,
) -> Vec<(&'static str, String)> {
    // publication_names is a list of identifiers
    let mut options = vec![
        ("proto_version", "1".to_string()),
        ("publication_names", quote_identifier(publication)),
    ];
    if server_version_num >= MESSAGES {
        options.push(("messages", messages.to_string()));
    }
    options
}

/// Where everything that is committed now will have been sent: the target of `--drain`.
///
/// The insert position, since a commit may return before its record is flushed. Right behind a page's
/// header nothing can end, so there the page's start is meant: the log is never flushed up to the header alone.
pub fn current_lsn(connection: &mut Connection) -> Result<Lsn, Error> {
    let rows = connection.simple_query(
        "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END, \
         current_setting('wal_block_size')",
    )?;
    let cell = |index: usize| {
        rows.first()
            .and_then(|row| row.get(index))
            .and_then(|cell| cell.as_deref())
    };
    let lsn: Option<Lsn> = cell(0).and_then(|text| text.parse().ok());
    let block: Option<u64> = cell(1).and_then(|text| text.parse().ok());
    match (lsn, block) {
        (Some(lsn), Some(block)) if block > 0 => Ok(page_start_if_in_header(lsn, block)),
        _ => Err(Error::Internal("pg_current_wal_insert_lsn() has no value")),
    }
}

/// The sizes of the two page headers of the log (xlog_internal.h: short 24, long 40 on 64-bit systems).
fn page_start_if_in_header(lsn: Lsn, block: u64) -> Lsn {
    match lsn.0 % block {
        offset @ (24 | 40) => Lsn(lsn.0 - offset),
        _ => lsn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_ends_inside_a_page_header() {
        for (lsn, target) in [
            (0x2000, 0x2000),
            (0x2018, 0x2000),
            (0x2028, 0x2000),
            (0x2030, 0x2030),
            (0x3FF8, 0x3FF8),
        ] {
            assert_eq!(page_start_if_in_header(Lsn(lsn), 0x2000), Lsn(target));
        }
    }

    #[test]
    fn the_publication_is_an_identifier() {
        let options = pgoutput_options(120_000, "we\"ird, name", true);
        assert_eq!(options[1].1, "\"we\"\"ird, name\"");
        assert_eq!(options.len(), 2);
        for messages in [true, false] {
            let options = pgoutput_options(150_000, "p", messages);
            assert_eq!(options[2], ("messages", messages.to_string()));
        }
    }
}
