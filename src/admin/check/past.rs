//! Whether this is the Postgres that the streams were written from, and the slot is where the relay has left it: what the relay
//! itself compares at each start, by the same rules ([`Record`], [`Continuity`]).

use super::finding::{Finding, fail, ok, warn};
use super::nats::{Past, Tail};
use super::postgres::Log;
use crate::config::Config;
use crate::jetstream::Delivery;
use crate::postgres::connection::{Connection, quote_literal};
use crate::postgres::{ConnInfo, Lsn};
use crate::relay::checkpoint::record::{Anchor, Cut, Record};
use crate::relay::checkpoint::store::ANYTHING;
use crate::relay::core::continuity::{Broken, Continuity};
use crate::relay::error::Error;
use crate::relay::{session, slot};
use std::time::Duration;

/// How long the WAL from the slot's position to the last resolved event may take to decode: it is what came within the
/// hold-back.
const DECODE_LIMIT: Duration = Duration::from_secs(20);

/// One finding a comparison, for what there is to compare. `log` was read before the record, which is written before
/// Postgres is told.
pub fn findings(config: &Config, log: Log, past: &Past) -> Vec<Finding> {
    let tails = past.tails.iter();
    let has_record = past.record.is_some();
    let system = |tail| system(config, log, tail, has_record);
    let mut findings: Vec<Finding> = tails.filter_map(system).collect();
    let mut record = None;
    if let Some(found) = &past.record {
        let (rebased, finding) = history(config, found.clone());
        if let Some(rebased) = &rebased {
            findings.extend(slot_position(config, log, rebased));
        }
        findings.push(finding);
        record = rebased;
    }
    let tails = past.tails.iter();
    findings.extend(tails.filter_map(|tail| unfenced(config, log, record.as_ref(), tail)));
    findings
}

/// Whether a stream was written from this Postgres, if the slot wrote its last event. As at its start, the relay looks no
/// further where it has a record of this system: it has accepted it.
fn system(config: &Config, log: Log, tail: &Tail, has_record: bool) -> Option<Finding> {
    const NAME: &str = "both.history";
    let (stream, at, system_id) = (&tail.stream, &tail.position, log.system_id);
    if at.source.slot != config.slot {
        return None;
    }
    let of_another = format!(
        "the last event of stream {stream} ({at}) was written from another Postgres system, this one is {system_id}"
    );
    Some(match (at.source.system_id == system_id, config.delivery) {
        (true, _) => ok(
            NAME,
            format!(
                "stream {stream} was last written from this Postgres, at {}",
                at.position
            ),
        ),
        (false, _) if has_record => ok(NAME, format!("{of_another}, which a relay has accepted")),
        (false, Delivery::AtLeastOnce) => warn(
            NAME,
            of_another,
            "the relay goes on, and the stream holds the events of two databases",
            "correct -db, unless this database replaces the other",
        ),
        (false, Delivery::ExactlyOnce) => fail(
            NAME,
            of_another,
            "the relay halts rather than mix the histories of two databases",
            "correct -db, or, if this database replaces the other, start the relay once with -accept-new-system",
        ),
    })
}

/// Whether the slot is where the relay has left it.
fn slot_position(config: &Config, log: Log, record: &Record) -> Option<Finding> {
    const NAME: &str = "both.slot_position";
    let (confirmed, slot, told) = (log.confirmed?, &config.slot, record.told_lsn);
    Some(match record.is_exceeded(confirmed) {
        false => ok(
            NAME,
            format!("slot {slot} is at {confirmed}, no further than a relay has confirmed"),
        ),
        true => fail(
            NAME,
            format!(
                "slot {slot} is at {confirmed}, but a relay has confirmed {told} at most: it was re-created, or moved by somebody else"
            ),
            "what was committed between the two may be missing in the stream, so the relay halts",
            "publish by hand what is missing, then start the relay once with -resume-anyway",
        ),
    })
}

/// Whether the WAL of this server is the one that the streams were written from.
pub enum Compared {
    /// It is; and this is the record as it reads on this server.
    Same(Box<Record>),
    /// It is not, so the relay halts.
    Other(String),
}

/// Compares a record with the server that `-db` leads to, as the relay does before it publishes anything.
pub fn compare(
    db: &ConnInfo,
    config: &Config,
    record: Record,
    limit: Duration,
) -> Result<Compared, Error> {
    let mut connection = Connection::connect(db)?;
    let lineage = session::lineage(&mut connection, &config.slot)?;
    let record = match record.rebase(&lineage) {
        Ok(record) => record,
        Err(conflict) => {
            let of = "the checkpoint".to_string();
            return Ok(Compared::Other(
                Error::Conflict { of, conflict }.to_string(),
            ));
        }
    };
    let continuity = continuity(&mut connection, config, &record.young, limit)?;
    Ok(match continuity {
        Ok(()) => Compared::Same(Box::new(record)),
        Err(broken) => Compared::Other(broken.to_string()),
    })
}

/// The same as a finding, and the record as it reads on this server.
fn history(config: &Config, record: Record) -> (Option<Record>, Finding) {
    const NAME: &str = "both.wal";
    match compare(&config.db, config, record, DECODE_LIMIT) {
        Ok(Compared::Same(record)) => {
            let anchor = &record.young.anchor;
            let finding = ok(NAME, format!("Postgres has what was stored last, {anchor}"));
            (Some(*record), finding)
        }
        Ok(Compared::Other(reason)) => {
            let finding = fail(
                NAME,
                reason,
                "Postgres was restored from a snapshot or a backup, or another clone was promoted, so the relay halts",
                "connect to the server that the events came from, or, if this one replaces it, start the relay once with -resume-anyway",
            );
            (None, finding)
        }
        Err(error) => {
            let finding = warn(
                NAME,
                format!("whether Postgres has what was stored last is not known: {error}"),
                "the relay finds out when it starts",
                "see to it that the role may replicate, and that a replication slot and a walsender are free for a moment",
            );
            (None, finding)
        }
    }
}

/// What the relay finds at the anchor's place; `Ok(Err(_))`: why it halts. One that runs meanwhile may tell Postgres that it has the
/// anchor's transaction, which is then not sent any more: then once more.
fn continuity(
    connection: &mut Connection,
    config: &Config,
    cut: &Cut,
    limit: Duration,
) -> Result<Result<(), Broken>, Error> {
    let mut confirmed = slot::confirmed(connection, config)?;
    loop {
        let Some(seen) = confirmed else {
            // there is a finding about the slot
            return Ok(Ok(()));
        };
        let found = continuity_at(connection, config, cut, seen, limit)?;
        confirmed = slot::confirmed(connection, config)?;
        // it only grows, and beyond the anchor's commit nothing of it is expected
        if found.is_ok() || confirmed == Some(seen) || seen > cut.anchor.position.commit_lsn {
            return Ok(found);
        }
    }
}

/// The same, for a slot that stands at `confirmed`.
fn continuity_at(
    connection: &mut Connection,
    config: &Config,
    cut: &Cut,
    confirmed: Lsn,
    limit: Duration,
) -> Result<Result<(), Broken>, Error> {
    let wal_end = slot::current_lsn(connection)?;
    let flags = config.flags();
    let (anchor, stored_lsn) = (&cut.anchor, cut.stored_lsn);
    let mut continuity = match Continuity::new(anchor, stored_lsn, confirmed, wal_end, flags) {
        Ok(continuity) => continuity,
        Err(broken) => return Ok(Err(broken)),
    };
    if !continuity.is_proven() {
        let commit_lsn = anchor.position.commit_lsn;
        return Ok(match first_begin(connection, config, commit_lsn, limit)? {
            Some((commit_lsn, commit_time_us)) => continuity.on_first(commit_lsn, commit_time_us),
            None => continuity.on_position(wal_end),
        });
    }
    Ok(Ok(()))
}

/// The first transaction of the publication whose commit is at `lsn` or after it, and when that was. A copy of the slot, which
/// goes with the session, is decoded for it; a slot that is beyond it has nothing there.
fn first_begin(
    connection: &mut Connection,
    config: &Config,
    lsn: Lsn,
    limit: Duration,
) -> Result<Option<(Lsn, i64)>, Error> {
    let copy = format!("outbox_check_{}", connection.backend_pid());
    let sql = format!(
        "SELECT pg_catalog.pg_copy_logical_replication_slot({}, {}, true)",
        quote_literal(&config.slot),
        quote_literal(&copy)
    );
    connection.simple_query(&sql)?;
    let prefix = &config.mapping.message_prefix;
    let options = slot::pgoutput_options(
        connection.server_version_num(),
        &config.publication,
        prefix.is_some(),
    );
    let options = options
        .iter()
        .map(|(name, value)| format!(", {}, {}", quote_literal(name), quote_literal(value)));
    // 66: Begin, then the commit's LSN and time. Decoding ends with the transaction that the LSN is in
    let sql = format!(
        "SELECT encode(substr(data, 2, 16), 'hex') FROM pg_catalog.pg_logical_slot_peek_binary_changes({}, '{}', NULL{}) \
         WHERE get_byte(data, 0) = 66 AND substr(data, 2, 8) >= decode('{:016x}', 'hex') LIMIT 1",
        quote_literal(&copy),
        Lsn(lsn.0 + 1),
        options.collect::<String>(),
        lsn.0
    );
    let rows = connection.simple_query_within(&sql, limit)?;
    let begin = rows.first().and_then(|row| row.first()?.as_deref());
    Ok(begin.and_then(|begin| {
        let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let lsn = number(begin.get(..16)?)?;
        let time = number(begin.get(16..)?)?;
        Some((Lsn(lsn), time as i64))
    }))
}

/// Whether a relay with at-least-once delivery left off in the middle.
fn unfenced(config: &Config, log: Log, record: Option<&Record>, tail: &Tail) -> Option<Finding> {
    let (at, source) = (&tail.position, &tail.position.source);
    let is_ours = (source.slot.as_str(), source.system_id, source.timeline)
        == (config.slot.as_str(), log.system_id, log.timeline);
    let maybe = record.is_none_or(|record| record.told_lsn == ANYTHING);
    if config.delivery != Delivery::ExactlyOnce || tail.fenced || !is_ours || !maybe {
        return None;
    }
    let stored = match record {
        Some(record) => record.young.anchor.position,
        None => Anchor::bare(log.confirmed?).position,
    };
    (at.position > stored).then(|| {
        fail(
            "both.delivery",
            format!(
                "the last event of stream {} has no fence: a relay with at-least-once left off in the middle, or the stream is a \
                 mirror that was promoted",
                tail.stream
            ),
            format!(
                "after {stored} one may be missing that exactly-once would take for stored, so the relay halts"
            ),
            "run once with -delivery at-least-once -drain until that ends with 0, or, where none is missing, with -resume-anyway",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;
    use crate::cli::{self, Invocation};
    use crate::relay::checkpoint::record::tests::record;
    use std::ffi::OsString;

    fn config(args: &[&str]) -> Config {
        let args = [&["-db", "host=h"], args].concat();
        let Ok(Invocation::Relay(cli)) = cli::parse(args.iter().map(OsString::from)) else {
            panic!("{args:?} do not parse");
        };
        Config::load(&cli, &|_| None).unwrap()
    }

    const LOG: Log = Log {
        system_id: 7,
        timeline: 1,
        confirmed: Some(Lsn(0x200)),
    };

    fn tail(position: &str, fenced: bool) -> Tail {
        Tail {
            stream: "EV".into(),
            position: position.parse().unwrap(),
            fenced,
        }
    }

    #[test]
    fn a_stream_of_another_system_fails() {
        for (position, level) in [
            ("jetstream_outbox 7 1 0/200 1", Some(Level::Ok)),
            ("jetstream_outbox 7 2 0/1FF 1", Some(Level::Ok)),
            ("jetstream_outbox 8 1 0/1FF 1", Some(Level::Fail)),
            ("other 8 1 0/100 1", None),
        ] {
            let found = system(&config(&[]), LOG, &tail(position, true), false);
            assert_eq!(found.map(|finding| finding.level), level, "{position}");
        }
    }

    /// What starts the relay passes `check`.
    #[test]
    fn another_system_that_a_relay_has_accepted_is_well() {
        let other = tail("jetstream_outbox 8 1 0/1FF 1", true);
        for (args, has_record, level) in [
            (&[][..], true, Level::Ok),
            (&["-delivery", "at-least-once"], true, Level::Ok),
            (&["-delivery", "at-least-once"], false, Level::Warn),
        ] {
            let found = system(&config(args), LOG, &other, has_record);
            assert_eq!(found.map(|finding| finding.level), Some(level), "{args:?}");
        }
    }

    #[test]
    fn a_slot_beyond_what_was_told_fails() {
        for (told, level) in [(0x1FF, Level::Fail), (0x200, Level::Ok), (0x201, Level::Ok)] {
            let mut record = record(1, 1, 1);
            record.told_lsn = Lsn(told);
            let found = slot_position(&config(&[]), LOG, &record);
            assert_eq!(found.map(|finding| finding.level), Some(level), "{told:x}");
        }
    }

    #[test]
    fn a_relay_with_at_least_once_that_left_off_is_found_before_exactly_once_begins() {
        let with = |stored, told| {
            let mut record = record(1, 1, 1);
            (record.young.anchor, record.told_lsn) = (Anchor::bare(Lsn(stored)), told);
            record
        };
        let fails = |position: &str, fenced, args: &[&str], record: Option<&Record>| {
            let found = unfenced(&config(args), LOG, record, &tail(position, fenced));
            found.map(|finding| finding.level) == Some(Level::Fail)
        };
        let at = "jetstream_outbox 7 1 0/200 1";
        assert!(fails(at, false, &[], None));
        assert!(fails(at, false, &[], Some(&with(0x200, ANYTHING))));
        assert!(!fails(at, false, &[], Some(&with(0x201, ANYTHING))));
        assert!(!fails(at, false, &[], Some(&with(0x200, Lsn(0x200)))));
        for (position, fenced) in [
            ("jetstream_outbox 7 1 0/200 1", true),
            ("jetstream_outbox 7 1 0/1FF 1", false),
            ("jetstream_outbox 8 1 0/200 1", false),
            ("jetstream_outbox 7 2 0/200 1", false),
            ("other 7 1 0/200 1", false),
        ] {
            assert!(!fails(position, fenced, &[], None), "{position}");
        }
        assert!(!fails(at, false, &["-delivery", "at-least-once"], None));
    }
}
