//! A start's look at Postgres: the rules of [`preflight`], and what the session needs to know of the slot.
//!
//! Everything is read on the replication connection itself, which takes plain SQL.

use super::error::Error;
use super::preflight::outboxes::Outboxes;
use super::preflight::server::OLDEST;
use super::preflight::{self, Facts, outboxes};
use crate::config::Config;
use crate::postgres::connection::{quote_identifier, quote_literal};
use crate::postgres::{self, Connection, Lsn};
use std::time::Duration;

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

/// Checks server, slot and publication, and gives what was read.
pub fn check(connection: &mut Connection, config: &Config) -> Result<(Slot, Facts), Error> {
    let mut facts = preflight::read(connection, config)?;
    // an older one is refused, and may not know the statement
    if facts.version >= OLDEST {
        facts.outboxes = outboxes(config, connection.peer(), &[])?;
    }
    let failures = preflight::failures(&facts, config);
    let Some(slot) = facts.slot.as_ref().filter(|_| failures.is_empty()) else {
        return Err(Error::Preflight(failures));
    };
    if slot.active_pid.is_some() {
        return Err(Error::SlotInUse {
            slot: config.slot.clone(),
            pid: slot.active_pid,
        });
    }
    let timeout_ms = facts.server.number("wal_sender_timeout");
    let slot = Slot {
        confirmed_flush_lsn: slot.confirmed().unwrap_or_default(),
        wal_sender_timeout: Duration::from_millis(timeout_ms.try_into().unwrap_or(0)),
    };
    Ok((slot, facts))
}

/// Where the slot stands; `None`: it is gone.
pub fn confirmed(
    connection: &mut Connection,
    config: &Config,
) -> Result<Option<Lsn>, postgres::Error> {
    let rows = connection.simple_query(&format!(
        "SELECT confirmed_flush_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
        quote_literal(&config.slot)
    ))?;
    let text = rows.first().and_then(|row| row.first()?.as_deref());
    Ok(text.and_then(|text| text.parse().ok()))
}

/// Sees that nobody has used the slot since it was looked at. Whoever did may have stored events, and told Postgres of them,
/// that come after all that was read until then: what was concluded from it is not to be believed.
pub fn check_untouched(
    connection: &mut Connection,
    config: &Config,
    slot: &Slot,
) -> Result<(), Error> {
    match confirmed(connection, config)? {
        Some(confirmed) if confirmed != slot.confirmed_flush_lsn => Err(Error::SlotInUse {
            slot: config.slot.clone(),
            pid: None,
        }),
        // one that is gone, START_REPLICATION names
        _ => Ok(()),
    }
}

/// A session beside the one to `peer` that decodes: what must not be asked there.
pub fn plain(config: &Config, peer: &str) -> Result<Connection, postgres::Error> {
    let mut connection = Connection::connect(&config.db.without_replication().only_at(peer))?;
    connection.use_database_encoding()?;
    Ok(connection)
}

/// The publication and its outboxes, with those that were `remembered`.
pub fn outboxes(
    config: &Config,
    peer: &str,
    remembered: &[u32],
) -> Result<Outboxes, postgres::Error> {
    let mut session = plain(config, peer)?;
    outboxes::read(
        &mut session,
        &config.publication,
        &config.mapping,
        remembered,
    )
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

/// Where everything that is committed now will have been sent: the target of `-drain`.
///
/// The insert position, since a commit may return before its record is flushed. Right behind a page's
/// header nothing can end, so there the page's start is meant: the log is never flushed up to the header alone.
pub fn current_lsn(connection: &mut Connection) -> Result<Lsn, postgres::Error> {
    let rows = connection.simple_query(
        "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END, \
         current_setting('wal_block_size'), pg_size_bytes(current_setting('wal_segment_size'))",
    )?;
    let cell = |index: usize| {
        rows.first()
            .and_then(|row| row.get(index))
            .and_then(|cell| cell.as_deref())
    };
    let lsn: Option<Lsn> = cell(0).and_then(|text| text.parse().ok());
    let size = |index: usize| cell(index).and_then(|text| text.parse().ok());
    match (lsn, size(1), size(2)) {
        (Some(lsn), Some(block), Some(segment)) if block > 0 && segment > 0 => {
            Ok(page_start_if_in_header(lsn, block, segment))
        }
        _ => Err(postgres::Error::Protocol(
            "pg_current_wal_insert_lsn() without a value".into(),
        )),
    }
}

/// The sizes of the two page headers of the log (xlog_internal.h: short 24, long 40 on 64-bit systems): the first page of a segment
/// has the long one.
fn page_start_if_in_header(lsn: Lsn, block: u64, segment: u64) -> Lsn {
    let page = lsn.0 - lsn.0 % block;
    let header = match page % segment {
        0 => 40,
        _ => 24,
    };
    match lsn.0 - page == header {
        true => Lsn(page),
        false => lsn,
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
            // a record may end there
            (0x2028, 0x2028),
            (0x10028, 0x10000),
            (0x10018, 0x10018),
            (0x2030, 0x2030),
            (0x3FF8, 0x3FF8),
        ] {
            assert_eq!(
                page_start_if_in_header(Lsn(lsn), 0x2000, 0x10000),
                Lsn(target)
            );
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
