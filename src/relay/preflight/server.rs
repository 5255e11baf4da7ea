//! The server and the role: what was read of them, and the rules about it.
//!
//! Only catalogs, views and functions that every role may read: on managed servers nobody is a superuser.
//! Sources: the manual's chapters on logical decoding, on replication settings and on `pg_locks`; the providers' pages on
//! logical replication for the table of them.

use super::minors;
use super::probe::Probe;
use super::{Facts, Finding, Query, Rule, fail, ok, query_json, warn};
use crate::config::Config;
use crate::postgres::identifier::identifier;
use serde::Deserialize;
use std::collections::BTreeMap;

/// The oldest server: pgoutput with the options that are used here, and still found in the field.
pub const OLDEST: u32 = 120_000;
/// Logical slots on a standby came with it.
const SLOTS_ON_STANDBYS: u32 = 160_000;
/// `wal_level = replica` suffices since: the first logical slot raises the effective level.
const EFFECTIVE_WAL_LEVEL: u32 = 190_000;
/// Less than this ends sessions that are healthy but slow, in milliseconds.
const SHORT_TIMEOUT_MS: i64 = 10_000;
/// A transaction that has written and is this old may stay for long.
const OLD_TRANSACTION_SECONDS: i64 = 10;
/// What holds the creation of a slot up is named up to so many times.
const MAX_BLOCKERS: usize = 5;

/// What holds for every start: the relay halts when one fails.
pub const START: [Rule; 3] = [version, primary, wal_level];
/// What else `check` looks at: a connection of the relay's own has proven it, or it is a risk for later.
pub const RULES: [Rule; 9] = [
    minors::rule,
    role,
    replication,
    slots,
    senders,
    sender_timeout,
    idle_timeout,
    synchronous_standby,
    blockers,
];

/// What was read of the server. The names are those of the query.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Server {
    /// The database of the session.
    pub database: String,
    /// The server process that serves the session.
    pub backend_pid: i32,
    /// The server is a standby.
    pub in_recovery: bool,
    /// The role of the session.
    pub role: Role,
    /// Of `pg_settings`, by name; those that the role may see.
    pub settings: BTreeMap<String, String>,
    /// How many replication slots there are.
    pub slots: i64,
    /// How many walsenders are busy.
    pub senders: i64,
    /// The slots of standbys that follow: active physical ones.
    pub standby_slots: Vec<String>,
    /// The application names of the standbys that stream.
    pub standbys: Vec<String>,
    /// Roles that tell whose managed server this is.
    pub markers: Vec<String>,
    /// Transactions that have written something and are open or prepared, in all databases; the oldest first.
    pub writers: Vec<Writer>,
}

/// The role of the session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Role {
    /// Its name.
    pub name: String,
    /// It has the attribute REPLICATION, or is a superuser.
    pub replication: bool,
    /// Which of the roles that grant replication it is a member of.
    pub member_of: Vec<String>,
}

/// A transaction that has written something: a slot cannot be created before it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Writer {
    /// Its transaction id.
    pub xid: String,
    /// The server process; `None`: it is prepared.
    pub pid: Option<i32>,
    /// The name it was prepared under.
    pub gid: Option<String>,
    /// Its database.
    pub database: Option<String>,
    /// Whose it is.
    pub owner: Option<String>,
    /// The name that the application gave itself.
    pub application: Option<String>,
    /// How old it is; `None`: the role may not know.
    pub seconds: Option<i64>,
}

impl Writer {
    /// What it is.
    pub fn description(&self) -> String {
        let known = |label: &str, value: &Option<String>| {
            let value = value.as_deref().filter(|value| !value.is_empty());
            value.map(|value| format!(", {label} {value}"))
        };
        let what = match (&self.gid, self.pid) {
            (Some(gid), _) => format!("prepared transaction {}", quote(gid)),
            (None, pid) => format!(
                "the transaction of server process {}",
                pid.unwrap_or_default()
            ),
        };
        let age = self
            .seconds
            .map(|seconds| format!(", {seconds} s old"))
            .unwrap_or_default();
        let more = [
            known("database", &self.database),
            known("role", &self.owner),
            known("application", &self.application),
        ];
        let more: Vec<String> = more.into_iter().flatten().collect();
        format!("{what}{}{age}", more.concat())
    }

    /// The statement that ends it.
    pub fn end(&self) -> String {
        match (&self.gid, self.pid) {
            (Some(gid), _) => format!("COMMIT PREPARED {};", quote(gid)),
            (None, pid) => format!("SELECT pg_terminate_backend({});", pid.unwrap_or_default()),
        }
    }
}

/// A string literal. A gid holds whatever its application likes.
fn quote(text: &str) -> String {
    crate::postgres::connection::quote_literal(text)
        .trim()
        .to_string()
}

/// A provider of managed servers, told by a role that only it creates.
struct Provider {
    marker: &'static str,
    name: &'static str,
    /// How logical decoding is switched on there.
    wal_level: &'static str,
    /// The role whose members replicate, where that is not the attribute's business.
    grants_replication: Option<&'static str>,
}

const PROVIDERS: [Provider; 6] = [
    Provider {
        marker: "rds_superuser",
        name: "Amazon RDS or Aurora",
        wal_level: "set rds.logical_replication = 1 in the parameter group, then reboot the instance",
        grants_replication: Some("rds_replication"),
    },
    Provider {
        marker: "alloydbsuperuser",
        name: "AlloyDB",
        wal_level: "set the flag alloydb.logical_decoding = on, which restarts the instance",
        grants_replication: None,
    },
    Provider {
        marker: "cloudsqlsuperuser",
        name: "Cloud SQL",
        wal_level: "set the flag cloudsql.logical_decoding = on, which restarts the instance",
        grants_replication: None,
    },
    Provider {
        marker: "azure_pg_admin",
        name: "Azure",
        wal_level: "set the server parameter wal_level = logical, then restart the server",
        grants_replication: None,
    },
    Provider {
        marker: "neon_superuser",
        name: "Neon",
        wal_level: "enable logical replication in the project's settings",
        grants_replication: None,
    },
    Provider {
        marker: "supabase_admin",
        name: "Supabase",
        wal_level: "set wal_level = logical by the provider's command line, then restart the project",
        grants_replication: None,
    },
];

impl Server {
    /// A setting; empty when the version, or the role, does not have it.
    pub fn setting(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", String::as_str)
    }

    /// A setting that is a number.
    pub fn number(&self, name: &str) -> i64 {
        self.setting(name).parse().unwrap_or_default()
    }

    fn provider(&self) -> Option<&'static Provider> {
        let has = |provider: &&Provider| self.markers.iter().any(|it| it == provider.marker);
        PROVIDERS.iter().find(has)
    }

    /// How a setting is changed. Managed servers have no ALTER SYSTEM.
    pub fn set(&self, name: &str, value: &str, restart: bool) -> String {
        match (self.provider(), restart) {
            (Some(provider), _) => {
                format!(
                    "set the parameter {name} = {value}, the way {} does",
                    provider.name
                )
            }
            (None, true) => format!("ALTER SYSTEM SET {name} = {value}; -- then restart Postgres"),
            (None, false) => format!("ALTER SYSTEM SET {name} = {value}; SELECT pg_reload_conf();"),
        }
    }
}

/// Reads everything in one statement.
pub fn read<Q: Query>(session: &mut Q) -> Result<Server, Q::Error> {
    let names = |names: &mut dyn Iterator<Item = &'static str>| {
        let quoted: Vec<String> = names.map(|name| format!("'{name}'")).collect();
        quoted.join(", ")
    };
    let markers = names(&mut PROVIDERS.iter().map(|provider| provider.marker));
    let grants = names(&mut PROVIDERS.iter().filter_map(|it| it.grants_replication));
    // a transaction with an id holds a lock on it, and pg_locks shows every role that much of all of them
    let sql = format!(
        "SELECT pg_catalog.to_json(s) FROM (SELECT pg_catalog.current_database() AS database, \
         pg_catalog.pg_backend_pid() AS backend_pid, pg_catalog.pg_is_in_recovery() AS in_recovery, \
         (SELECT pg_catalog.json_build_object('name', rolname, 'replication', rolreplication OR rolsuper, \
         'member_of', ARRAY(SELECT g.rolname::text FROM pg_catalog.pg_roles g WHERE g.rolname IN ({grants}) \
         AND pg_catalog.pg_has_role(current_user, g.oid, 'MEMBER'))) \
         FROM pg_catalog.pg_roles WHERE rolname = current_user) AS role, \
         (SELECT pg_catalog.json_object_agg(name, setting) FROM pg_catalog.pg_settings WHERE name IN ('wal_level', \
         'effective_wal_level', 'max_replication_slots', 'max_wal_senders', 'wal_sender_timeout', \
         'max_slot_wal_keep_size', 'synchronized_standby_slots', 'idle_replication_slot_timeout', \
         'synchronous_standby_names', 'data_directory')) AS settings, \
         (SELECT count(*) FROM pg_catalog.pg_replication_slots) AS slots, \
         (SELECT count(*) FROM pg_catalog.pg_stat_replication) AS senders, \
         ARRAY(SELECT slot_name::text FROM pg_catalog.pg_replication_slots WHERE slot_type = 'physical' AND active \
         ORDER BY 1) AS standby_slots, \
         ARRAY(SELECT DISTINCT r.application_name FROM pg_catalog.pg_stat_replication r WHERE r.state = 'streaming' \
         AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots l WHERE l.active_pid = r.pid \
         AND l.slot_type = 'logical') ORDER BY 1) AS standbys, \
         ARRAY(SELECT rolname::text FROM pg_catalog.pg_roles WHERE rolname IN ({markers})) AS markers, \
         ARRAY(SELECT pg_catalog.to_json(w) FROM (SELECT min(l.transactionid::text) AS xid, l.pid, NULL AS gid, \
         min(a.datname::text) AS database, min(a.usename::text) AS owner, min(a.application_name) AS application, \
         min(extract(epoch FROM pg_catalog.now() - a.xact_start)::bigint) AS seconds \
         FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
         WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted \
         AND l.pid <> pg_catalog.pg_backend_pid() GROUP BY l.pid UNION ALL \
         SELECT transaction::text, NULL, gid, database::text, owner::text, NULL, \
         extract(epoch FROM pg_catalog.now() - prepared)::bigint FROM pg_catalog.pg_prepared_xacts \
         ORDER BY 7 DESC NULLS LAST LIMIT 100) w) AS writers) s"
    );
    let server = query_json(session, "look at the server", &sql)?;
    Ok(server.unwrap_or_default())
}

fn version(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.connection";
    let found = format!("Postgres {} at {}", facts.version_text, facts.peer);
    vec![match facts.version >= OLDEST {
        true => ok(NAME, found),
        false => fail(
            NAME,
            found,
            "it is too old",
            "upgrade to Postgres 12 or later",
        ),
    }]
}

fn primary(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.primary";
    const FIX: &str = "name the primary in -db, or several hosts and target_session_attrs=primary";
    if facts.version < OLDEST {
        return Vec::new();
    }
    vec![match facts.server.in_recovery {
        false => ok(NAME, "the server is a primary"),
        true if facts.version < SLOTS_ON_STANDBYS => fail(
            NAME,
            "the server is a standby",
            "before Postgres 16 there are no logical slots on a standby",
            FIX,
        ),
        true => warn(
            NAME,
            "the server is a standby",
            "its slots are lost when the primary removes rows they need, and events come late",
            FIX,
        ),
    }]
}

fn wal_level(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.wal_level";
    if facts.version < OLDEST {
        return Vec::new();
    }
    let server = &facts.server;
    let suffices = facts.version >= EFFECTIVE_WAL_LEVEL;
    vec![match server.setting("wal_level") {
        "logical" => ok(NAME, "logical"),
        "replica" if suffices => ok(
            NAME,
            format!(
                "replica, and {} in effect; the first logical slot raises it",
                server.setting("effective_wal_level")
            ),
        ),
        found => fail(
            NAME,
            found,
            "the WAL does not hold what logical decoding needs",
            match server.provider() {
                Some(provider) => provider.wal_level.to_string(),
                None => server.set("wal_level", "'logical'", true),
            },
        ),
    }]
}

fn role(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.role";
    let role = &facts.server.role;
    let name = identifier(&role.name);
    // what the server does counts, whatever a provider has made of the attribute
    let (may, how) = match &facts.probe {
        Some(Probe::Admitted { .. }) => (true, String::new()),
        Some(probe) if probe.sqlstate() == Some("42501") => (false, String::new()),
        _ if role.replication => (true, String::new()),
        _ => match role.member_of.first() {
            Some(group) => (true, format!(", as a member of {group}")),
            None => (false, String::new()),
        },
    };
    vec![match may {
        true => ok(NAME, format!("{name} may replicate{how}")),
        false => fail(
            NAME,
            format!("{name} may not replicate"),
            "the relay reads by way of replication",
            match facts.server.provider().and_then(|it| it.grants_replication) {
                Some(group) if role.member_of.is_empty() => format!("GRANT {group} TO {name};"),
                _ => format!("ALTER ROLE {name} REPLICATION;"),
            },
        ),
    }]
}

/// The relay's own kind of connection, which a pooler does not pass on.
fn replication(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.replication";
    vec![match &facts.probe {
        None => return Vec::new(),
        Some(Probe::Admitted { system }) => ok(
            NAME,
            format!(
                "replication connections are taken; system {}, timeline {}",
                system.system_id, system.timeline
            ),
        ),
        // these have a finding of their own
        Some(probe) if matches!(probe.sqlstate(), Some("42501" | "53300")) => return Vec::new(),
        Some(Probe::Refused { error }) => fail(
            NAME,
            error.to_string(),
            "the relay reads on a replication connection",
            error.remedy().unwrap_or(
                "check pg_hba.conf, and that -db leads to Postgres itself, not to a pooler",
            ),
        ),
    }]
}

fn slots(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.slots";
    let server = &facts.server;
    let most = server.number("max_replication_slots");
    let found = format!("{} of {most} replication slots are taken", server.slots);
    vec![match server.slots >= most && facts.slot.is_none() {
        false => ok(NAME, found),
        true => fail(
            NAME,
            found,
            format!("there is none left for {}", config.slot),
            server.set("max_replication_slots", &(most + 5).to_string(), true)
                + "; or drop a slot that nobody needs",
        ),
    }]
}

fn senders(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.walsenders";
    let server = &facts.server;
    let most = server.number("max_wal_senders");
    let found = format!("{} of {most} walsenders are busy", server.senders);
    let slot = facts.slot.as_ref();
    let ours_runs = slot.is_some_and(|slot| slot.active_pid.is_some());
    vec![match server.senders >= most && !ours_runs {
        false => ok(NAME, found),
        true => fail(
            NAME,
            found,
            "there is none left to send to the relay",
            server.set("max_wal_senders", &(most + 5).to_string(), true),
        ),
    }]
}

fn sender_timeout(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.wal_sender_timeout";
    let found = facts.server.number("wal_sender_timeout");
    let fix = facts.server.set("wal_sender_timeout", "'60s'", false);
    vec![match found {
        0 => warn(
            NAME,
            "off",
            "a relay whose machine has died keeps the slot, and its standby waits",
            fix,
        ),
        1..SHORT_TIMEOUT_MS => warn(
            NAME,
            format!("{found} ms"),
            "a network that stands still for so long ends the session",
            fix,
        ),
        _ => ok(NAME, format!("{} s", found / 1000)),
    }]
}

/// Postgres 18 on.
fn idle_timeout(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.idle_timeout";
    let name = "idle_replication_slot_timeout";
    if !facts.server.settings.contains_key(name) {
        return Vec::new();
    }
    vec![match facts.server.number(name) {
        0 => ok(NAME, format!("{name} is off")),
        found => warn(
            NAME,
            format!("{name} is {found} s"),
            "when no relay runs for so long, Postgres invalidates the slot, and events are lost",
            facts.server.set(name, "0", false),
        ),
    }]
}

/// Whether a pattern of `synchronous_standby_names` matches the relay.
fn synchronous_standby(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.synchronous_standby";
    let server = &facts.server;
    let setting = server.setting("synchronous_standby_names");
    let ours = config.db.application_name();
    let names = standby_names(setting);
    let matches = (names.iter()).any(|name| name == "*" || name.eq_ignore_ascii_case(ours));
    if !matches {
        return vec![ok(NAME, "the relay is no synchronous standby")];
    }
    let others = names.iter().filter(|name| *name != "*");
    let others = others.filter(|name| !name.eq_ignore_ascii_case(ours));
    let mut standbys: Vec<String> = others.map(|name| quote_name(name)).collect();
    let streaming = server.standbys.iter().filter(|name| name.as_str() != ours);
    for name in streaming.map(|name| quote_name(name)) {
        if !standbys.contains(&name) {
            standbys.push(name);
        }
    }
    let value = match standbys.is_empty() {
        true => "''".to_string(),
        false => quote(&format!("FIRST 1 ({})", standbys.join(", "))),
    };
    vec![warn(
        NAME,
        format!(
            "synchronous_standby_names is {setting}, which matches the relay's application_name, {ours}"
        ),
        "while no standby follows, a commit waits until the relay confirms it, which it does after the hold-back",
        server.set("synchronous_standby_names", &value, false) + " -- it names standbys alone",
    )]
}

fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The names of `synchronous_standby_names`: `[FIRST|ANY] n (a, "b")`, or the list alone.
fn standby_names(setting: &str) -> Vec<String> {
    let mut names = vec![String::new()];
    let mut quoted = false;
    let mut chars = setting.chars().peekable();
    while let Some(c) = chars.next() {
        let quote_follows = quoted && chars.peek() == Some(&'"');
        match c {
            '"' if quote_follows => {
                chars.next();
                names.last_mut().into_iter().for_each(|name| name.push('"'));
            }
            '"' => quoted = !quoted,
            // what was before it is the number, and how it is meant
            '(' if !quoted => names = vec![String::new()],
            ',' if !quoted => names.push(String::new()),
            ')' if !quoted => {}
            c if c.is_whitespace() && !quoted => {}
            c => names.last_mut().into_iter().for_each(|name| name.push(c)),
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// What holds the creation of the slot up, if it has to be created.
fn blockers(facts: &Facts, config: &Config) -> Vec<Finding> {
    let old = |writer: &&Writer| {
        writer.gid.is_some()
            || writer
                .seconds
                .is_some_and(|age| age >= OLD_TRANSACTION_SECONDS)
    };
    let old: Vec<Writer> = (facts.server.writers.iter().filter(old)).cloned().collect();
    match (&facts.slot, old.is_empty()) {
        (None, false) => vec![blocked_by(&old, &config.slot)],
        _ => Vec::new(),
    }
}

/// A slot cannot be created before these end.
pub fn blocked_by(writers: &[Writer], slot: &str) -> Finding {
    let named = writers.iter().take(MAX_BLOCKERS);
    let found: Vec<String> = named.clone().map(Writer::description).collect();
    let fix: Vec<String> = named.clone().map(Writer::end).collect();
    let comment = match named.clone().any(|writer| writer.gid.is_some()) {
        true => {
            " -- the prepared in its own database, or ROLLBACK PREPARED where its work is not wanted"
        }
        false => "",
    };
    let more = match writers.len().saturating_sub(MAX_BLOCKERS) {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    warn(
        "postgres.open_transactions",
        found.join("; ") + &more,
        format!("slot {slot} cannot be created before they end"),
        fix.join(" ") + comment,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_synchronous_standbys_are_read() {
        for (setting, expected) in [
            ("", &[][..]),
            ("*", &["*"]),
            ("\"*\"", &["*"]),
            ("FIRST 1 (*)", &["*"]),
            ("ANY 2 (a, \"b c\" ,d)", &["a", "b c", "d"]),
            ("2 (a,b)", &["a", "b"]),
            ("a, \"b\"\"(,)\"", &["a", "b\"(,)"]),
        ] {
            assert_eq!(standby_names(setting), expected, "{setting}");
        }
    }
}
