//! The doctor's Postgres side.
//!
//! Sources: the manual's chapters on logical decoding and on logical replication's restrictions, and the
//! system views its facts are read from.

mod disk;

use crate::admin::database::{Access, Database};
use crate::admin::statements::{
    add_columns, create_publication, create_table, mapping_of, missing_columns, table_name, tables,
};
use crate::admin::{Error, bytes};
use crate::config::Config;
use crate::outbox::mapping::TableName;
use crate::postgres::Lsn;
use crate::postgres::identifier::identifier;
use crate::relay::preflight::probe::{self, Probe};
use crate::relay::preflight::server::{self, OLDEST};
use crate::relay::preflight::slot::{self, recreate};
use crate::relay::preflight::{self, Finding, Rule, fail, ok, warn};
use disk::Disk;
use std::collections::BTreeMap;

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
    /// The tables that the relay is to read, as the catalog has them.
    named: Vec<Named>,
    publication: Option<Publication>,
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
    inserts: bool,
    /// Updates or deletes.
    changes: bool,
    /// It was created or altered later than what the slot still has to decode.
    newer_than_slot: bool,
    tables: Vec<Table>,
}

/// A table that `-table` names, or `outbox`.
#[derive(Clone, Debug)]
struct Named {
    name: TableName,
    exists: bool,
    /// Its partitions are published, under their own names.
    by_partition: bool,
    partitioned: bool,
}

#[derive(Clone, Debug)]
struct Table {
    name: TableName,
    /// Those that are published.
    columns: Vec<String>,
    /// All of them, and their types.
    types: BTreeMap<String, String>,
    /// The condition of its row filter.
    filter: Option<String>,
    /// Updates and deletes of a published table need one.
    replica_identity: bool,
}

/// Everything that can be said, and which log it was said of.
pub fn findings(config: &Config) -> (Vec<Finding>, Option<Log>) {
    let read = Database::connect(&config.db, Access::Read)
        .and_then(|mut database| read(&mut database, config));
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
const JUDGES: [Judge; 6] = [
    encryption,
    publication,
    published_tables,
    headers_column,
    messages,
    replica_identity,
];

/// Those about the slot.
const SLOT_JUDGES: [Judge; 3] = [retained, disk::judge, publication_age];

fn encryption(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.tls";
    vec![match &facts.tls {
        Some(tls) => ok(NAME, tls.clone()),
        None if is_local(&facts.shared.peer) => ok(NAME, "not used; the server is on this machine"),
        None => warn(
            NAME,
            "not used",
            "everybody on the way can read and change what the relay reads",
            "set ssl = on in postgresql.conf, and add sslmode=verify-full to -db",
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

fn publication(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.publication";
    let name = identifier(&config.publication);
    vec![match &facts.publication {
        None => fail(
            NAME,
            format!("publication {name} does not exist in this database"),
            "it says which tables are sent",
            match (
                named_by_their_beginning(config),
                // of another's slot its own finding speaks
                facts
                    .shared
                    .slot
                    .as_ref()
                    .filter(|slot| slot.could_be_ours()),
            ) {
                // which tables there are, setup finds out
                (Some(names), None) => {
                    format!("jetstream-outbox setup -- when there is a table {names}")
                }
                (Some(names), Some(_)) => format!(
                    "when there is a table {names}: jetstream-outbox setup; then: {} -- a slot does not see a publication that is \
                     younger than its events",
                    recreate(&facts.shared, config)
                ),
                (None, None) => create_all(facts, config),
                (None, Some(_)) => format!(
                    "{} {} -- a slot does not see a publication that is younger than its events",
                    create_all(facts, config),
                    recreate(&facts.shared, config)
                ),
            },
        ),
        Some(publication) if !publication.inserts => fail(
            NAME,
            format!("publication {name} does not publish inserts"),
            "events are inserts",
            format!("ALTER PUBLICATION {name} SET (publish = 'insert');"),
        ),
        Some(_) => ok(NAME, format!("publication {name} publishes inserts")),
    }]
}

/// What `-table` names by its beginning: of these no statement can be made without looking for them.
fn named_by_their_beginning(config: &Config) -> Option<String> {
    let named = config.mapping.tables.iter().map(|it| &it.table);
    let names: Vec<String> = (named.filter(|table| table.and_longer))
        .map(TableName::to_string)
        .collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// The tables that are missing, and the publication.
fn create_all(facts: &Facts, config: &Config) -> String {
    let missing = facts.named.iter().filter(|named| !named.exists);
    let mut text: String = missing
        .map(|named| create_table(config, &named.name) + " ")
        .collect();
    let root = facts.shared.version >= 130_000 && facts.named.iter().any(|named| named.partitioned);
    text += &create_publication(config, &tables(config), root);
    text
}

fn published_tables(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.tables";
    let Some(publication) = &facts.publication else {
        return Vec::new();
    };
    let name = identifier(&config.publication);
    let named: Vec<&TableName> = config.mapping.tables.iter().map(|it| &it.table).collect();
    let mut findings = Vec::new();
    for wanted in &named {
        if !(publication.tables.iter()).any(|table| is_named(&table.name, wanted)) {
            findings.push(not_held(facts, config, wanted));
        }
    }
    let mut outboxes = Vec::new();
    for table in outbox_tables(publication, config) {
        let text = table_name(&table.name);
        let mapping = mapping_of(config, &table.name);
        let has = |column: &str| table.columns.iter().any(|found| found == column);
        let missing = missing_columns(config, mapping, has);
        let (left_out, lacking): (Vec<String>, Vec<String>) = missing
            .into_iter()
            .partition(|column| table.types.contains_key(column));
        if !lacking.is_empty() {
            findings.push(fail(
                NAME,
                format!("table {text} has no column {}", lacking.join(", ")),
                "the relay stops at its first row",
                format!(
                    "{} -- or name the columns that it has with -table, -subject, -header or the flags of columns; if it is no \
                     outbox, name those that are with -table",
                    add_columns(config, &table.name, &lacking)
                ),
            ));
        } else if !left_out.is_empty() {
            findings.push(fail(
                NAME,
                format!("table {text} is published without {}", left_out.join(", ")),
                "the relay stops at its first row",
                publish_whole(config, publication, table),
            ));
        } else if let Some(filter) = &table.filter {
            findings.push(warn(
                NAME,
                format!("publication {name} has a row filter for {text}: {filter}"),
                "rows that it leaves out are never published",
                publish_whole(config, publication, table),
            ));
        }
        outboxes.push(text);
    }
    if outboxes.is_empty() && findings.is_empty() {
        // none is named: the one that setup would make
        let missing = facts.named.iter().find(|named| !named.exists);
        findings.push(match (missing, tables(config).first()) {
            (None, Some(wanted)) => fail(
                NAME,
                format!("publication {name} holds no table with the columns of an outbox"),
                "there is nothing to relay",
                format!("ALTER PUBLICATION {name} ADD TABLE {};", table_name(wanted)),
            ),
            (Some(named), _) => not_held(facts, config, &named.name),
            (None, None) => return findings,
        });
    }
    if findings.is_empty() {
        findings.push(ok(
            NAME,
            format!("publication {name} holds {}", outboxes.join(", ")),
        ));
    }
    findings
}

/// The publication lacks a table that is wanted.
fn not_held(facts: &Facts, config: &Config, wanted: &TableName) -> Finding {
    const NAME: &str = "postgres.tables";
    const WHY: &str = "its events are not sent";
    let (name, table) = (identifier(&config.publication), table_name(wanted));
    let add = format!("ALTER PUBLICATION {name} ADD TABLE {table};");
    if wanted.and_longer {
        return fail(
            NAME,
            format!("publication {name} holds no table {wanted}"),
            WHY,
            format!("ALTER PUBLICATION {name} ADD TABLE ...; -- each of them"),
        );
    }
    match facts.named.iter().find(|named| named.name == *wanted) {
        Some(named) if !named.exists => fail(
            NAME,
            format!("table {table} does not exist in this database"),
            WHY,
            format!(
                "{} {add} -- or correct -table or -db",
                create_table(config, wanted)
            ),
        ),
        Some(named) if named.by_partition => fail(
            NAME,
            format!(
                "publication {name} holds the partitions of table {table} under their own names"
            ),
            "-table does not name them, so their rows are ignored",
            format!("ALTER PUBLICATION {name} SET (publish_via_partition_root = true);"),
        ),
        _ => fail(
            NAME,
            format!("publication {name} does not hold table {table}"),
            WHY,
            add,
        ),
    }
}

/// Those whose rows become events, told from others as the relay does.
fn outbox_tables<'a>(publication: &'a Publication, config: &Config) -> Vec<&'a Table> {
    let is_outbox = |table: &&Table| match config.mapping.tables.as_slice() {
        [] => {
            let mapping = &config.mapping.default;
            // a column that the publication leaves out is no sign of another table
            let has = |column: &str| table.types.contains_key(column);
            let mut columns = mapping.subject.columns().map(|name| mapping.column(name));
            columns.any(has) || missing_columns(config, mapping, has).is_empty()
        }
        named => named.iter().any(|it| is_named(&table.name, &it.table)),
    };
    publication.tables.iter().filter(is_outbox).collect()
}

/// Takes column list and row filter from a table, and leaves the others as they are: `SET TABLE` names all there are.
fn publish_whole(config: &Config, publication: &Publication, whole: &Table) -> String {
    let each = publication.tables.iter().map(|table| {
        let mut text = table_name(&table.name);
        if table.name == whole.name {
            return text;
        }
        if table.columns.len() < table.types.len() {
            let columns: Vec<String> = table.columns.iter().map(|it| identifier(it)).collect();
            text += &format!(" ({})", columns.join(", "));
        }
        if let Some(filter) = &table.filter {
            text += &format!(" WHERE ({filter})");
        }
        text
    });
    let each: Vec<String> = each.collect();
    format!(
        "ALTER PUBLICATION {} SET TABLE {};",
        identifier(&config.publication),
        each.join(", ")
    )
}

/// The column whose members become headers can hold none unless it is JSON.
fn headers_column(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.headers_column";
    let Some(publication) = &facts.publication else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for table in outbox_tables(publication, config) {
        let wanted = mapping_of(config, &table.name).headers_column.as_ref();
        let column = wanted.map_or("headers", String::as_str);
        let Some(found) = table.types.get(column) else {
            continue;
        };
        let (text, quoted) = (table_name(&table.name), identifier(column));
        if matches!(found.as_str(), "json" | "jsonb") {
            findings.push(ok(
                NAME,
                format!("column {quoted} of table {text} is {found}"),
            ));
            continue;
        }
        let told = format!("column {quoted} of table {text} is {found}");
        let fix =
            format!("ALTER TABLE {text} ALTER COLUMN {quoted} TYPE jsonb USING {quoted}::jsonb;");
        findings.push(match wanted {
            Some(_) => fail(
                NAME,
                told,
                "headers are read from the members of json or jsonb",
                fix,
            ),
            None => warn(
                NAME,
                told,
                "it is not json or jsonb, so no event gets headers from it",
                format!("{fix} -- or call it something else, if it holds no headers"),
            ),
        });
    }
    findings
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

/// Names as `-table` has them: without a schema, any.
fn is_named(table: &TableName, wanted: &TableName) -> bool {
    wanted.matches(table.schema.as_deref().unwrap_or_default(), &table.name)
}

fn replica_identity(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.replica_identity";
    let Some(publication) = &facts.publication else {
        return Vec::new();
    };
    let without: Vec<String> = publication
        .tables
        .iter()
        .filter(|table| publication.changes && !table.replica_identity)
        .map(|table| table_name(&table.name))
        .collect();
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
    vec![match publication.newer_than_slot {
        false => ok(
            NAME,
            format!("publication {name} is older than what slot {slot} has to send"),
        ),
        true => warn(
            NAME,
            format!(
                "publication {name} was created or altered later than what slot {slot} has to send"
            ),
            "rows of before are sent by what it was then, or stop the relay, if it did not exist",
            format!(
                "{} -- if the relay says that the publication does not exist; otherwise nothing, it passes",
                recreate(&facts.shared, config)
            ),
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

fn read(database: &mut Database, config: &Config) -> Result<Facts, Error> {
    let mut facts = Facts {
        shared: preflight::read(database, config)?,
        tls: database.tls.clone(),
        ..Facts::default()
    };
    let server = &facts.shared.server;
    if facts.shared.version < OLDEST {
        return Ok(facts);
    }
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
    for name in tables(config) {
        facts.named.push(read_named(database, config, name)?);
    }
    facts.publication = read_publication(database, config)?;
    Ok(facts)
}

fn read_named(database: &mut Database, config: &Config, name: TableName) -> Result<Named, Error> {
    // without a schema -table means any
    let row = database.row(
        "find the table",
        "SELECT c.relkind = 'p', EXISTS (SELECT FROM pg_catalog.pg_publication_tables t JOIN pg_catalog.pg_namespace tn \
         ON tn.nspname = t.schemaname JOIN pg_catalog.pg_class tc ON tc.relnamespace = tn.oid AND tc.relname = t.tablename \
         WHERE t.pubname = $3 AND tc.oid <> c.oid \
         AND tc.oid IN (SELECT relid FROM pg_catalog.pg_partition_tree(c.oid))) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relname = $1 AND ($2::text IS NULL OR n.nspname = $2) AND c.relkind IN ('r', 'p') ORDER BY 1 DESC LIMIT 1",
        &[&name.name, &name.schema, &config.publication],
    )?;
    Ok(Named {
        exists: row.is_some(),
        partitioned: row.as_ref().is_some_and(|row| row.get(0)),
        by_partition: row.as_ref().is_some_and(|row| row.get(1)),
        name,
    })
}

fn read_publication(
    database: &mut Database,
    config: &Config,
) -> Result<Option<Publication>, Error> {
    // an age is how many transactions ago; a catalog row's xmin is the transaction that wrote it
    let found = database.row(
        "look at the publication",
        "SELECT pubinsert, pubupdate OR pubdelete, COALESCE(pg_catalog.age(p.xmin) <= (SELECT pg_catalog.age(catalog_xmin) \
         FROM pg_catalog.pg_replication_slots WHERE slot_name = $2), false) \
         FROM pg_catalog.pg_publication p WHERE pubname = $1",
        &[&config.publication, &config.slot],
    )?;
    let Some(row) = found else {
        return Ok(None);
    };
    // column lists and row filters came with 15
    let (columns, filtered) = match database.version >= 150_000 {
        true => ("t.attnames::text[]", "t.rowfilter"),
        false => (
            "ARRAY(SELECT attname::text FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND attnum > 0 \
             AND NOT attisdropped)",
            "NULL::text",
        ),
    };
    let tables = database.rows(
        "look into the publication",
        &format!(
            "SELECT t.schemaname::text, t.tablename::text, {columns}, {filtered}, CASE c.relreplident WHEN 'f' THEN true \
             WHEN 'd' THEN EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary) \
             WHEN 'i' THEN EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisreplident) \
             ELSE false END, \
             ARRAY(SELECT attname::text FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND attnum > 0 \
             AND NOT attisdropped ORDER BY attnum), \
             ARRAY(SELECT pg_catalog.format_type(atttypid, NULL) FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid \
             AND attnum > 0 AND NOT attisdropped ORDER BY attnum) \
             FROM pg_catalog.pg_publication_tables t JOIN pg_catalog.pg_namespace n ON n.nspname = t.schemaname \
             JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename \
             WHERE t.pubname = $1 ORDER BY 1, 2"
        ),
        &[&config.publication],
    )?;
    Ok(Some(Publication {
        inserts: row.get(0),
        changes: row.get(1),
        newer_than_slot: row.get(2),
        tables: tables
            .iter()
            .map(|row| Table {
                name: TableName {
                    and_longer: false,
                    schema: Some(row.get(0)),
                    name: row.get(1),
                },
                columns: row.get::<_, Option<_>>(2).unwrap_or_default(),
                filter: row.get(3),
                replica_identity: row.get(4),
                types: row
                    .get::<_, Vec<String>>(5)
                    .into_iter()
                    .zip(row.get::<_, Vec<String>>(6))
                    .collect(),
            })
            .collect(),
    }))
}

#[cfg(test)]
mod tests;
