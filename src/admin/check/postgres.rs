//! The doctor's Postgres side.
//!
//! Sources: the manual's chapters on logical decoding and on logical replication's restrictions, and the
//! system views its facts are read from.

mod disk;

use crate::admin::database::{Access, Database};
use crate::admin::{Error, bytes};
use crate::config::Config;
use crate::postgres::Lsn;
use crate::postgres::encoding::Encoding;
use crate::postgres::identifier::identifier;
use crate::relay::preflight::outboxes;
use crate::relay::preflight::probe::{self, Probe};
use crate::relay::preflight::publication;
use crate::relay::preflight::publication_state::{self, PublicationState};
use crate::relay::preflight::server::{self, OLDEST};
use crate::relay::preflight::slot;
use crate::relay::preflight::{self, Finding, Rule, fail, ok, warn};
use disk::Disk;

/// pgoutput sends messages since.
const MESSAGES: u32 = 140_000;
/// A backlog of log that an operator should know of, when nothing bounds it.
const MUCH_LOG: u64 = 1 << 30;
/// What bounds the log that a slot holds, in MB; from 13 on.
const KEEP_SIZE: &str = "max_slot_wal_keep_size";

/// What was read.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// Of the server and the slot.
    shared: preflight::Facts,
    tls: Option<String>,
    /// Of the database.
    encoding: String,
    /// The bodies of the functions `outbox_publish` that the role would call.
    publish_functions: Vec<String>,
    publication: Option<Publication>,
    /// What the relay has lost of it since it last looked; `None`: it has not looked yet.
    change: Option<Option<Finding>>,
    /// Of the log; `None` where it cannot be looked at.
    disk: Option<Disk>,
}

/// The log, and where the slot stands in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// `IDENTIFY_SYSTEM`'s systemid.
    pub system_id: u64,
    /// Counted up by each promotion.
    pub timeline: u32,
    /// The slot's `confirmed_flush_lsn`; `None`: there is no such slot.
    pub confirmed: Option<Lsn>,
}

#[derive(Clone, Debug, Default)]
struct Publication {
    /// It was created or altered later than what the slot still has to decode. `None`: another slot holds back as much, so it
    /// cannot be told.
    younger_than_slot: Option<bool>,
    /// Tables whose updates or deletes are published, and that have no replica identity; not all of very many.
    without_identity: Vec<String>,
}

/// `IDENTIFY_SYSTEM`'s systemid, if a replication connection can be had.
pub fn system_id(config: &Config) -> Option<u64> {
    match probe::connect(config).0 {
        Probe::Admitted { system } => Some(system.system_id),
        Probe::Refused { .. } => None,
    }
}

/// Everything that can be said, and which log it was said of.
/// `seen`: what the relay remembers of the publication.
pub fn findings(config: &Config, seen: Option<&PublicationState>) -> (Vec<Finding>, Option<Log>) {
    let read = Database::connect(&config.db, Access::Read)
        .and_then(|mut database| read(&mut database, config, seen));
    let mut facts = match read {
        Ok(facts) => facts,
        Err(error) => return (vec![unreachable(&error)], None),
    };
    if facts.shared.version < OLDEST {
        return (preflight::failures(&facts.shared, config), None);
    }
    let (probe, connection) = probe::connect(config);
    let log = match &probe {
        Probe::Admitted { system } => Some(Log {
            system_id: system.system_id,
            timeline: system.timeline,
            confirmed: facts.shared.slot.as_ref().and_then(|slot| slot.confirmed()),
        }),
        Probe::Refused { .. } => None,
    };
    facts.shared.probe = Some(probe);
    facts.shared.start = connection.and_then(|it| probe::start(it, &facts.shared, config));
    let of = |rules: &[Rule]| -> Vec<Finding> {
        let each = rules.iter().flat_map(|rule| rule(&facts.shared, config));
        each.collect()
    };
    let own = |judges: &[Judge]| -> Vec<Finding> {
        let each = judges.iter().flat_map(|judge| judge(&facts, config));
        each.collect()
    };
    let findings = [
        of(&server::START),
        of(&server::RULES),
        of(&publication::START),
        of(&publication::RULES),
        own(&JUDGES),
        of(&slot::START),
        of(&slot::RULES),
        own(&SLOT_JUDGES),
        of(&[probe::rule]),
    ];
    (findings.concat(), log)
}

fn unreachable(error: &Error) -> Finding {
    fail(
        "postgres.connection",
        error.to_string(),
        "the relay connects the same way",
        error.mend(),
    )
}

type Judge = fn(&Facts, &Config) -> Vec<Finding>;

/// The findings that the relay's start does not ask for.
const JUDGES: [Judge; 5] = [
    encryption,
    encoding,
    publication_change,
    messages,
    replica_identity,
];

/// Those about the slot.
const SLOT_JUDGES: [Judge; 3] = [retained, disk::judge, publication_age];

fn publication_change(facts: &Facts, config: &Config) -> Vec<Finding> {
    let name = identifier(&config.publication);
    let change = facts.change.iter().map(|change| match change {
        Some(lost) => lost.clone(),
        None => ok(
            publication_state::NAME,
            format!("publication {name} sends what it sent when the relay last looked"),
        ),
    });
    change.collect()
}

fn encryption(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.tls";
    vec![match &facts.tls {
        Some(tls) => ok(NAME, tls.clone()),
        None if is_local(&facts.shared.peer) => ok(NAME, "not used; the server is on this machine"),
        None => warn(
            NAME,
            "not used",
            "everybody on the way can read and change what the relay reads",
            facts.shared.server.set("ssl", "on", false)
                + " -- with server.crt and server.key in its data directory; then add sslmode=verify-full to -db",
        ),
    }]
}

/// `host:port` of the loopback interface, or the folder of a Unix socket.
pub fn is_local(peer: &str) -> bool {
    let host = peer.rsplit_once(':').map_or(peer, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.starts_with('/')
        || host == "localhost"
        || host
            .parse()
            .is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

fn encoding(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.encoding";
    let found = format!("the database's encoding is {}", facts.encoding);
    let another = "move to a database created with ENCODING 'UTF8'";
    vec![match Encoding::of_database(&facts.encoding) {
        Some(encoding) if encoding.is_complete() => ok(NAME, found),
        Some(Encoding::Unknown) => warn(
            NAME,
            found,
            "an event with bytes that are not UTF-8 in its id, subject, headers or JSON cannot be published: -on-poison decides",
            another,
        ),
        Some(_) => warn(
            NAME,
            found,
            "an event with a byte that stands for no character cannot be published: -on-poison decides",
            another,
        ),
        None => warn(
            NAME,
            found,
            "a row, in whatever published table, that Postgres cannot convert to UTF-8 stops the relay with 65, whatever -on-poison says",
            another,
        ),
    }]
}

/// Events without a table.
fn messages(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.messages";
    let Some(prefix) = &config.mapping.message_prefix else {
        return vec![ok(NAME, "not taken, by -no-messages")];
    };
    if facts.shared.version < MESSAGES {
        return vec![warn(
            NAME,
            format!(
                "Postgres {} does not send messages",
                facts.shared.version_text
            ),
            "what pg_logical_emit_message writes is not published",
            "publish by the table and pass -no-messages, or upgrade to Postgres 14 or later",
        )];
    }
    let literal = crate::postgres::connection::quote_literal(prefix);
    let others = !facts.publish_functions.is_empty()
        && !(facts.publish_functions.iter()).any(|body| body.contains(&literal));
    if others {
        return vec![warn(
            NAME,
            format!("function outbox_publish does not emit messages with prefix {prefix}"),
            "the relay passes them over, so that their events are lost",
            "run the statement that jetstream-outbox setup prints, or name its prefix with -message-prefix",
        )];
    }
    vec![match facts.encoding.as_str() {
        "UTF8" => ok(NAME, format!("those with prefix {prefix} are events")),
        encoding => warn(
            NAME,
            format!("the database's encoding is {encoding}"),
            "Postgres does not convert messages, and one with other characters than ASCII is malformed: -on-poison decides",
            "publish by the table and pass -no-messages, or move to a database created with ENCODING 'UTF8'",
        ),
    }]
}

fn replica_identity(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.replica_identity";
    let Some(publication) = &facts.publication else {
        return Vec::new();
    };
    let without = &publication.without_identity;
    vec![match without.is_empty() {
        true => ok(
            NAME,
            "no statement of the application is refused for lack of one",
        ),
        false => fail(
            NAME,
            format!(
                "{} has none, and updates or deletes are published",
                without.join(", ")
            ),
            "the application's own UPDATE and DELETE fail there",
            format!(
                "ALTER PUBLICATION {} SET (publish = 'insert');",
                identifier(&config.publication)
            ),
        ),
    }]
}

fn retained(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.retained_log";
    let Some(held) = facts
        .shared
        .slot
        .as_ref()
        .and_then(|slot| slot.retained_bytes)
    else {
        return Vec::new();
    };
    let held = held.max(0) as u64;
    let found = format!("slot {} holds {} of log", config.slot, bytes(held));
    let bound = facts.log_bound();
    let by = match bound {
        Some(bound) => format!("max_slot_wal_keep_size bounds it at {}", bytes(bound)),
        None if facts.shared.server.settings.contains_key(KEEP_SIZE) => {
            "nothing but the disk bounds it (max_slot_wal_keep_size is -1)".into()
        }
        None => "nothing but the disk bounds it".into(),
    };
    let fix = "start the relay and see with status that it catches up; if it is given up for good, run teardown";
    vec![match bound {
        Some(bound) if held > bound / 2 => warn(
            NAME,
            format!(
                "{found}, more than half of max_slot_wal_keep_size, {}",
                bytes(bound)
            ),
            "a slot that holds more loses events",
            fix,
        ),
        None if held > MUCH_LOG => warn(NAME, found, by, fix),
        _ => ok(NAME, format!("{found}; {by}")),
    }]
}

fn publication_age(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.publication_age";
    let (Some(publication), Some(_)) = (&facts.publication, &facts.shared.slot) else {
        return Vec::new();
    };
    let (name, slot) = (identifier(&config.publication), &config.slot);
    vec![match publication.younger_than_slot {
        Some(false) => ok(
            NAME,
            format!("publication {name} is older than what slot {slot} has to send"),
        ),
        None => ok(
            NAME,
            format!(
                "whether publication {name} is older than what slot {slot} has to send cannot be told: another slot holds \
                 back as much"
            ),
        ),
        Some(true) => warn(
            NAME,
            format!(
                "publication {name} was created or altered later than what slot {slot} has to send"
            ),
            "a row that was committed before that is sent, or left out, by what the publication was then",
            "start the relay: it passes once that is behind the slot; if rows of before were to be sent, publish them by hand",
        ),
    }]
}

impl Facts {
    /// How much log the slot may hold, in bytes; `None`: no bound.
    fn log_bound(&self) -> Option<u64> {
        let megabytes: i64 = self.shared.server.setting(KEEP_SIZE).parse().ok()?;
        let megabytes = u64::try_from(megabytes).ok()?;
        megabytes.checked_mul(1 << 20)
    }
}

fn read(
    database: &mut Database,
    config: &Config,
    seen: Option<&PublicationState>,
) -> Result<Facts, Error> {
    let mut facts = Facts {
        shared: preflight::read(database, config)?,
        tls: database.tls.clone(),
        ..Facts::default()
    };
    if facts.shared.version < OLDEST {
        return Ok(facts);
    }
    facts.shared.outboxes = outboxes::read(database, &config.publication, &config.mapping, &[])?;
    if let Some(seen) = seen {
        facts.change = Some(seen.look(&mut facts.shared, config, |oids| {
            outboxes::read(database, &config.publication, &config.mapping, oids)
        })?);
    }
    let server = &facts.shared.server;
    // a role that may not know it does not see the setting
    let data_directory = server.setting("data_directory");
    facts.disk = disk::look(&facts.shared.peer, server.backend_pid, data_directory);
    let database_row = database.row(
        "look at the database",
        "SELECT pg_catalog.pg_encoding_to_char(encoding)::text FROM pg_catalog.pg_database \
         WHERE datname = pg_catalog.current_database()",
        &[],
    )?;
    facts.encoding = database_row.map_or_else(String::new, |row| row.get(0));
    let functions = database.rows(
        "find the function",
        "SELECT prosrc FROM pg_catalog.pg_proc WHERE proname = 'outbox_publish' AND pg_catalog.pg_function_is_visible(oid)",
        &[],
    )?;
    facts.publish_functions = functions.iter().map(|row| row.get(0)).collect();
    facts.publication = read_publication(database, config)?;
    Ok(facts)
}

fn read_publication(
    database: &mut Database,
    config: &Config,
) -> Result<Option<Publication>, Error> {
    // an age is how many transactions ago; a catalog row's xmin is the transaction that wrote it
    let found = database.row(
        "look at the publication",
        "SELECT pubupdate OR pubdelete, COALESCE(pg_catalog.age(p.xmin) <= pg_catalog.age(s.catalog_xmin), false), \
         EXISTS (SELECT FROM pg_catalog.pg_replication_slots o WHERE o.slot_name <> s.slot_name \
         AND pg_catalog.age(o.catalog_xmin) >= pg_catalog.age(s.catalog_xmin)) \
         FROM pg_catalog.pg_publication p LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = $2 WHERE pubname = $1",
        &[&config.publication, &config.slot],
    )?;
    let Some(row) = found else {
        return Ok(None);
    };
    let (changes, is_younger): (bool, bool) = (row.get(0), row.get(1));
    let without = match changes {
        false => Vec::new(),
        true => database.rows(
            "look for replica identities",
            "SELECT pg_catalog.quote_ident(t.schemaname) || '.' || pg_catalog.quote_ident(t.tablename) \
             FROM pg_catalog.pg_publication_tables t JOIN pg_catalog.pg_namespace n ON n.nspname = t.schemaname \
             JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename \
             WHERE t.pubname = $1 AND NOT CASE c.relreplident WHEN 'f' THEN true \
             WHEN 'd' THEN EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary) \
             WHEN 'i' THEN EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisreplident) \
             ELSE false END LIMIT 10",
            &[&config.publication],
        )?,
    };
    Ok(Some(Publication {
        // a new slot begins with what another one holds back
        younger_than_slot: (!is_younger || !row.get::<_, bool>(2)).then_some(is_younger),
        without_identity: without.iter().map(|row| row.get(0)).collect(),
    }))
}

#[cfg(test)]
mod tests;
