//! The replication slot: what was read of it, the rules about it, and the statements that create and drop it.
//!
//! A statement that drops a slot is made in one place, [`recreate`], which looks at whose slot it is and who uses it.
//! Source: <https://www.postgresql.org/docs/current/view-pg-replication-slots.html>.

use super::{Facts, Finding, Query, Rule, fail, ok, query_json, warn};
use crate::config::Config;
use crate::postgres::Lsn;
use crate::postgres::connection::quote_literal;
use serde::Deserialize;

/// The plugin that the relay reads.
const PLUGIN: &str = "pgoutput";
/// NAMEDATALEN less one.
const MAX_NAME_BYTES: usize = 63;
/// `FAILOVER` came with it.
const FAILOVER: u32 = 170_000;

/// What must hold for every start: the relay halts when one fails.
pub const START: [Rule; 2] = [slot, lost];
/// What else `check` looks at.
pub const RULES: [Rule; 2] = [about_to_be_lost, failover];

/// A row of `pg_replication_slots`, with what else is known of it. A column that the version lacks has its default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Slot {
    /// `logical` or `physical`.
    pub slot_type: String,
    /// The output plugin of a logical one.
    pub plugin: Option<String>,
    /// The database of a logical one.
    pub database: Option<String>,
    /// That is the database of this session.
    pub here: bool,
    /// It goes with the session that created it.
    pub temporary: bool,
    /// The server process that uses it.
    pub active_pid: Option<i32>,
    /// The application name of whoever uses it.
    pub application: Option<String>,
    /// Replication starts here at the earliest.
    pub confirmed_flush_lsn: Option<String>,
    /// `reserved`, `extended`, `unreserved` or `lost`; 13 on.
    pub wal_status: Option<String>,
    /// Prepared transactions are sent before they commit; 14 on.
    pub two_phase: bool,
    /// Why Postgres invalidated it; 17 on.
    pub invalidation_reason: Option<String>,
    /// Invalidated, or about to be, on a standby; 16 on.
    pub conflicting: Option<bool>,
    /// Standbys take it over; 17 on.
    pub failover: bool,
    /// It was taken over from a primary; 17 on.
    pub synced: bool,
    /// How much WAL it keeps.
    pub retained_bytes: Option<i64>,
}

impl Slot {
    /// [`Slot::confirmed_flush_lsn`] as a number.
    pub fn confirmed(&self) -> Option<Lsn> {
        self.confirmed_flush_lsn.as_ref()?.parse().ok()
    }

    /// Postgres has invalidated it.
    fn is_lost(&self) -> bool {
        self.wal_status.as_deref() == Some("lost")
            || self.conflicting == Some(true)
            || self.invalidation_reason.is_some()
    }

    /// A copy can be decoded as the slot itself would be.
    pub fn can_be_copied(&self) -> bool {
        self.could_be_ours() && !self.is_lost() && !self.synced && self.confirmed().is_some()
    }

    /// It is of the relay's kind and in the relay's database. Any other is not for us to drop or move.
    pub fn could_be_ours(&self) -> bool {
        self.slot_type == "logical"
            && self.plugin.as_deref() == Some(PLUGIN)
            && self.here
            && !self.temporary
    }
}

/// Reads what is known of the slot.
pub fn read<Q: Query>(session: &mut Q, slot: &str) -> Result<Option<Slot>, Q::Error> {
    let sql = format!(
        "SELECT pg_catalog.to_json(s) FROM (SELECT s.*, s.database IS NOT DISTINCT FROM pg_catalog.current_database() AS here, \
         a.application_name AS application, pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_catalog.pg_is_in_recovery() \
         THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_lsn() END, s.restart_lsn)::bigint AS retained_bytes \
         FROM pg_catalog.pg_replication_slots s LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid \
         WHERE s.slot_name = {}) s",
        quote_literal(slot)
    );
    query_json(session, "look at the slot", &sql)
}

/// Creates the slot. `failover` exists from Postgres 17 on.
pub fn create_slot(slot: &str, failover: bool) -> String {
    let failover = if failover { ", failover => true" } else { "" };
    format!(
        "SELECT pg_create_logical_replication_slot({}, '{PLUGIN}'{failover});",
        quote_literal(slot)
    )
}

/// Drops the slot, whoever's it is: for `teardown`, which looks first, and [`recreate`].
pub fn drop_slot(slot: &str) -> String {
    format!("SELECT pg_drop_replication_slot({});", quote_literal(slot))
}

/// How the slot is created again, and a remark: never by dropping one that another database, another program or a running relay
/// needs, and never without a word of what it holds.
pub fn recreate(facts: &Facts, config: &Config, remark: &str) -> String {
    let name = &config.slot;
    match &facts.slot {
        None => format!("{} -- {remark}", create_slot(name, false)),
        Some(slot) if !slot.could_be_ours() => take_another(facts, config),
        Some(slot) => match unused(slot) {
            Ok(()) => {
                let (drop, create) = (drop_slot(name), create_slot(name, slot.failover));
                let since = match slot.confirmed() {
                    Some(confirmed) if !slot.is_lost() => format!(
                        "; what was committed since {confirmed} is sent by no slot then: stop the writers first, and publish \
                         it by hand"
                    ),
                    _ => String::new(),
                };
                format!("{drop} {create} -- {remark}{since}")
            }
            Err(first) => first,
        },
    }
}

/// Nobody uses the slot; otherwise what has to be done first.
fn unused(slot: &Slot) -> Result<(), String> {
    match slot.active_pid {
        None => Ok(()),
        Some(pid) => Err(format!(
            "stop what uses the slot, server process {pid} ({}), then run check again",
            slot.application
                .as_deref()
                .unwrap_or("of an unknown application")
        )),
    }
}

/// The slot is somebody else's: a name that is most likely free.
fn take_another(facts: &Facts, config: &Config) -> String {
    let plain = |c: char| match c.to_ascii_lowercase() {
        c if c.is_ascii_alphanumeric() => c,
        _ => '_',
    };
    let database = facts.server.database.chars().map(plain);
    let mut name: String = config
        .slot
        .chars()
        .chain("_".chars())
        .chain(database)
        .collect();
    name.truncate(MAX_NAME_BYTES);
    format!(
        "take another -slot, for every command and the relay: jetstream-outbox setup -slot {name}"
    )
}

fn slot(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.slot";
    let name = &config.slot;
    let Some(slot) = &facts.slot else {
        return vec![fail(
            NAME,
            format!("slot {name} does not exist"),
            "it keeps the WAL until its events are published",
            format!(
                "{} -- in this database, after the publication; if there was one, stop the writers first: no slot sends what \
                 is committed between the two",
                create_slot(name, false)
            ),
        )];
    };
    let refuse = |found: String, why: &str, fix: String| vec![fail(NAME, found, why, fix)];
    if slot.slot_type != "logical" {
        return refuse(
            format!("slot {name} is {}", slot.slot_type),
            "the relay needs a logical one; this is a standby's, or a backup's",
            take_another(facts, config),
        );
    }
    if !slot.here {
        return refuse(
            format!(
                "slot {name} belongs to database {}",
                slot.database.as_deref().unwrap_or_default()
            ),
            "a slot sees one database, and its events may be another service's",
            format!(
                "{}; or name that database in -db",
                take_another(facts, config)
            ),
        );
    }
    if slot.plugin.as_deref() != Some(PLUGIN) {
        return refuse(
            format!(
                "slot {name} is of plugin {}",
                slot.plugin.as_deref().unwrap_or("(none)")
            ),
            "the relay reads pgoutput; this is another program's",
            take_another(facts, config),
        );
    }
    if slot.temporary {
        return refuse(
            format!("slot {name} is temporary"),
            "it goes with the session that created it, and what it has not sent is lost",
            take_another(facts, config),
        );
    }
    if slot.synced && facts.server.in_recovery {
        return refuse(
            format!("slot {name} is synchronized from the primary"),
            "nobody can read it before this standby is promoted",
            "name the primary in -db, or several hosts and target_session_attrs=primary".into(),
        );
    }
    if slot.two_phase {
        return refuse(
            format!("slot {name} was created with two_phase"),
            "it sends a prepared transaction before it commits, and the relay publishes only what is committed",
            without_two_phase(slot, name),
        );
    }
    vec![used(slot, facts, config)]
}

/// A copy of a slot is at the same position, and without two_phase.
fn without_two_phase(slot: &Slot, name: &str) -> String {
    if let Err(first) = unused(slot) {
        return first;
    }
    let mut copy = name.to_string();
    copy.truncate(MAX_NAME_BYTES - "_copy".len());
    copy += "_copy";
    let statement = |from: &str, to: &str| {
        format!(
            "SELECT pg_copy_logical_replication_slot({}, {});",
            quote_literal(from),
            quote_literal(to)
        )
    };
    format!(
        "{} {} {} {} -- nothing is lost: a copy is at the same position, and has no two_phase",
        statement(name, &copy),
        drop_slot(name),
        statement(&copy, name),
        drop_slot(&copy)
    )
}

/// Who uses it: a relay, or a program that would take its events away.
fn used(slot: &Slot, facts: &Facts, config: &Config) -> Finding {
    const NAME: &str = "postgres.slot";
    let (name, ours) = (&config.slot, config.db.application_name());
    let Some(pid) = slot.active_pid else {
        return ok(NAME, format!("slot {name} is not in use"));
    };
    // the default name ends in the version, which may be another
    let is_relay = |name: &str| name == ours || name.starts_with("jetstream-outbox ");
    match &slot.application {
        Some(other) if !is_relay(other) => warn(
            NAME,
            format!(
                "slot {name} is in use by the server process {pid}, whose application_name is {other}, not {ours}"
            ),
            "if that is no relay, it takes events that the relay then never sees",
            take_another(facts, config),
        ),
        _ => ok(
            NAME,
            format!("slot {name} is in use by the server process {pid}"),
        ),
    }
}

/// Postgres has invalidated it, and removed WAL that it needs.
fn lost(facts: &Facts, config: &Config) -> Vec<Finding> {
    let Some(slot) = facts.slot.as_ref().filter(|slot| slot.could_be_ours()) else {
        return Vec::new();
    };
    let why = match slot.invalidation_reason.as_deref() {
        None if !slot.is_lost() => return Vec::new(),
        None => "most often because the WAL that it needed was more than max_slot_wal_keep_size",
        Some("wal_removed") => {
            "wal_removed: the WAL that it needed was more than max_slot_wal_keep_size"
        }
        Some("idle_timeout") => {
            "idle_timeout: no relay has used it for idle_replication_slot_timeout"
        }
        Some("rows_removed") => {
            "rows_removed: the primary has removed rows that this standby's slot needed"
        }
        Some("wal_level_insufficient") => {
            "wal_level_insufficient: wal_level was lowered on the primary"
        }
        Some(reason) => reason,
    };
    vec![fail(
        "postgres.slot_log",
        format!("Postgres has invalidated slot {} ({why})", config.slot),
        "events are missing: what was committed since then is sent by no slot",
        recreate(
            facts,
            config,
            "then publish by hand what was committed in between, and start the relay once with -resume-anyway",
        ),
    )]
}

fn about_to_be_lost(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.slot_log";
    let Some(slot) = &facts.slot else {
        return Vec::new();
    };
    if !lost(facts, config).is_empty() {
        return Vec::new();
    }
    vec![match slot.wal_status.as_deref() {
        Some("unreserved") => fail(
            NAME,
            format!(
                "Postgres removes WAL that slot {} needs at the next checkpoint",
                config.slot
            ),
            "events are about to be lost",
            facts.server.set("max_slot_wal_keep_size", "-1", false) + " -- or start the relay now",
        ),
        status => ok(
            NAME,
            format!(
                "wal_status is {}",
                status.unwrap_or("not told by this version")
            ),
        ),
    }]
}

/// Postgres 17 on.
fn failover(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.failover";
    let Some(slot) = facts.slot.as_ref().filter(|_| facts.version >= FAILOVER) else {
        return Vec::new();
    };
    let (name, server) = (&config.slot, &facts.server);
    let standbys = &server.standby_slots;
    let waits_for = server.setting("synchronized_standby_slots").split(',');
    let gone: Vec<&str> = waits_for
        .map(|name| name.trim().trim_matches('"'))
        .filter(|name| !name.is_empty() && !standbys.iter().any(|standby| standby == name))
        .collect();
    vec![match (slot.failover, standbys.is_empty()) {
        (true, _) if !gone.is_empty() => fail(
            NAME,
            format!(
                "synchronized_standby_slots names {}, which nobody follows",
                gone.join(", ")
            ),
            "Postgres sends the relay nothing until that standby has what is sent",
            server.set("synchronized_standby_slots", "''", false) + " -- or start the standby",
        ),
        (true, _) => ok(NAME, format!("standbys take slot {name} over")),
        (false, true) => ok(
            NAME,
            format!("slot {name} is not taken over by standbys, of which none follows"),
        ),
        (false, false) => warn(
            NAME,
            format!(
                "{} follows, and does not take slot {name} over",
                standbys.join(", ")
            ),
            "after a failover the slot is missing, and what was not published by then is lost",
            format!(
                "ALTER_REPLICATION_SLOT {name} ( FAILOVER true ); -- on a replication connection, with the relay stopped"
            ),
        ),
    }]
}
