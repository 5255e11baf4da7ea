//! `setup`: creates what is missing, and says what is there and where it differs. It never drops anything, and alters nothing
//! but an aggregate that it made.
//!
//! Postgres is last and the slot the very last: a slot that is left behind by a failure further on would fill a disk.

mod aggregate;

use super::bus::Bus;
use super::database::{Access, Database};
use super::statements::{
    create_bucket, create_park_stream, create_publication, create_slot, create_stream,
    create_table, mapping_of, park_stream, tables,
};
use super::{Error, say};
use crate::config::Config;
use crate::config::operation::Setup;
use crate::exit::Exit;
use crate::jetstream;
use crate::jetstream::bucket::{self, BUCKET_BYTES, MAX_BYTES_REQUIRED};
use crate::jetstream::preflight::{Wanted, preflight as judge_stream};
use crate::jetstream::sources::captures_all;
use crate::jetstream::streams::{Request, StreamInfo};
use crate::nats::info::ServerInfo;
use crate::outbox::mapping::TableName;
use crate::outbox::message::{PUBLISH_SIGNATURE, publish_function};
use crate::postgres::identifier::identifier;
use crate::relay::preflight::server::{self, Writer, blocked_by};
use crate::relay::preflight::slot::{self, Slot, recreate};
use crate::relay::preflight::{self, Finding, failures_of, outboxes, publication};
use std::time::Duration;

/// `pg_create_logical_replication_slot` has the parameter since.
const FAILOVER: u32 = 170_000;

/// pgoutput sends what `pg_logical_emit_message` writes since.
const MESSAGES: u32 = 140_000;

/// `publish_via_partition_root` exists since.
const VIA_ROOT: u32 = 130_000;

/// What became of one thing.
#[derive(Clone)]
enum Outcome {
    Created,
    /// It was there; where it differs from what would have been created, and what to do.
    Found(Vec<String>),
    /// It is not there and cannot be made yet: why.
    Missing(String),
}

/// Prints a line a thing.
struct Report {
    differs: bool,
}

impl Report {
    fn tell(&mut self, what: &str, outcome: Outcome) -> Result<(), Error> {
        match outcome {
            Outcome::Created => say(&format!("created  {what}\n")),
            Outcome::Found(differences) if differences.is_empty() => {
                say(&format!("found    {what}\n"))
            }
            Outcome::Missing(why) => self.tell(what, Outcome::Found(vec![why])),
            Outcome::Found(differences) => {
                self.differs = true;
                differences
                    .iter()
                    .try_for_each(|difference| say(&format!("differs  {what}: {difference}\n")))
            }
        }
    }
}

/// Creates what is missing.
pub fn run(config: &Config, how: &Setup) -> Result<Exit, Error> {
    // both must be there before either is changed
    let mut bus = Bus::connect(&config.nats)?;
    let mut database = Database::connect(&config.db, Access::Write)?;
    if how.failover && database.version < FAILOVER {
        return Err(Error::Wrong {
            what: format!(
                "create the slot: Postgres {} has no failover slots",
                database.version_text
            ),
            remedy: "leave -failover out, or upgrade to Postgres 17".into(),
            exit: Exit::Configuration,
        });
    }
    refuse_foreign(&mut database, config)?;
    let mut report = Report { differs: false };
    streams(&mut bus, config, how, &mut report)?;
    aggregate::extend(&mut bus, config, how, &mut report)?;
    parked(&mut bus, config, how, &mut report)?;
    bucket(&mut bus, config, how, &mut report)?;
    let mut known = Vec::new();
    for table in tables(config) {
        let what = format!("table {}", table.sql());
        let outcome = create_missing_table(&mut database, config, &table)?;
        report.tell(&what, outcome)?;
        known.push(table);
    }
    known.extend(named_by_their_beginning(
        &mut database,
        config,
        &mut report,
    )?);
    if let Some(prefix) = &config.mapping.message_prefix
        && database.version >= MESSAGES
    {
        let outcome = function(&mut database, prefix)?;
        report.tell("function outbox_publish", outcome)?;
    }
    let published = create_missing_publication(&mut database, config, &known)?;
    report.tell(
        &format!("publication {}", identifier(&config.publication)),
        published.clone(),
    )?;
    let outcome = create_missing_slot(&mut database, config, how, &published)?;
    report.tell(&format!("slot {}", config.slot), outcome)?;
    Ok(match report.differs {
        true => Exit::Configuration,
        false => Exit::Done,
    })
}

/// Where the slot is another database's, what would be made beside it is that one's as well, by its name.
fn refuse_foreign(database: &mut Database, config: &Config) -> Result<(), Error> {
    let facts = preflight::read(database, config)?;
    let is_foreign = |slot: &&Slot| slot.database.is_some() && !slot.here;
    if facts.slot.as_ref().filter(is_foreign).is_none() {
        return Ok(());
    }
    match failures_of(&[&slot::START], &facts, config)
        .into_iter()
        .next()
    {
        None => Ok(()),
        Some(finding) => Err(Error::Wrong {
            what: format!("create the slot: {}", finding.found),
            remedy: format!(
                "{}; nothing was created",
                finding.advice.map(|advice| advice.fix).unwrap_or_default()
            ),
            exit: Exit::Configuration,
        }),
    }
}

fn streams(
    bus: &mut Bus<'_>,
    config: &Config,
    how: &Setup,
    report: &mut Report,
) -> Result<(), Error> {
    let wanted = format!("{}.>", config.prefix);
    let found = bus.streams(&wanted)?;
    if found.is_empty() {
        let what = format!("stream {} of {wanted}", how.stream);
        if let Some(other) = bus.stream(&how.stream)? {
            let subjects = other.config.subjects.join(", ");
            let difference = format!(
                "it captures {subjects}, not {wanted}; add the subject to it, or name another stream with -stream"
            );
            return report.tell(&what, Outcome::Found(vec![difference]));
        }
        create(bus, &how.stream, create_stream(config, how))?;
        return report.tell(&what, Outcome::Created);
    }
    let whole = |stream: &StreamInfo| {
        (stream.config.subjects.iter()).any(|pattern| captures_all(pattern, &wanted))
    };
    for stream in &found {
        let subjects = stream.config.subjects.join(", ");
        let what = format!("stream {} of {subjects}", stream.config.name);
        let mut differences = stream_differences(stream, &bus.info, config.wanted(), how);
        if found.len() == 1 && !whole(stream) {
            differences.push(format!(
                "it does not capture all of {wanted}; an event of another subject stops the relay until a stream captures it"
            ));
        }
        report.tell(&what, Outcome::Found(differences))?;
    }
    Ok(())
}

fn stream_differences(
    stream: &StreamInfo,
    server: &ServerInfo,
    wanted: Wanted,
    how: &Setup,
) -> Vec<String> {
    // a limit that was asked for is none to warn of
    let mut judged = stream.clone();
    if judged.config.max_bytes == how.max_bytes {
        judged.config.max_bytes = -1;
    }
    let found = judge_stream(&judged, server, wanted);
    let mut differences: Vec<String> = found.refused.into_iter().chain(found.warnings).collect();
    let config = &stream.config;
    let seconds = |nanos: i64| format!("{}s", nanos as f64 / 1e9);
    let mut differs = |name: &str, found: String, wanted: Option<String>| match wanted {
        Some(wanted) if wanted != found => {
            differences.push(format!("its {name} is {found}, not {wanted}"));
        }
        _ => {}
    };
    let given = |span: Option<Duration>| span.map(|span| format!("{}s", span.as_secs_f64()));
    let replicas = how.replicas.map(|number| number.to_string());
    differs(
        "number of replicas",
        config.num_replicas.to_string(),
        replicas,
    );
    differs("max_age", seconds(config.max_age), given(how.max_age));
    differs(
        "max_bytes",
        config.max_bytes.to_string(),
        (how.max_bytes > 0).then(|| how.max_bytes.to_string()),
    );
    differs(
        "duplicate_window",
        seconds(config.duplicate_window),
        given(how.duplicate_window),
    );
    differences
}

fn bucket(
    bus: &mut Bus<'_>,
    config: &Config,
    how: &Setup,
    report: &mut Report,
) -> Result<(), Error> {
    let what = format!("checkpoint bucket {}", config.checkpoint);
    // it is there where the streams are
    let replicas = match how.replicas {
        Some(replicas) => replicas,
        None => {
            let streams = bus.streams(&format!("{}.>", config.prefix))?;
            let replicas = streams.iter().map(|stream| stream.config.num_replicas);
            replicas.max().unwrap_or(1)
        }
    };
    let outcome = match bus.stream(&format!("KV_{}", config.checkpoint))? {
        None => {
            let made = bus.create(create_bucket(config, replicas, None));
            match made.err() {
                Some(error) if asks_for_max_bytes(&error) => {
                    bus.create(create_bucket(config, replicas, Some(BUCKET_BYTES)))?;
                }
                Some(error) => return Err(error.into()),
                None => {}
            }
            Outcome::Created
        }
        Some(found) => {
            let faults = bucket::faults(&config.checkpoint, &found, replicas);
            // a record of this slot may be in it
            let faults = faults.into_iter().chain(bucket::lacks_room(&found, true));
            Outcome::Found(
                faults
                    .map(|fault| format!("it {}: {}", fault.what, fault.why))
                    .collect(),
            )
        }
    };
    report.tell(&what, outcome)
}

fn asks_for_max_bytes(error: &jetstream::Error) -> bool {
    error
        .api_error()
        .is_some_and(|it| it.err_code == MAX_BYTES_REQUIRED)
}

/// Creates a stream for which a size may be needed, which is the operator's to choose.
fn create(bus: &mut Bus<'_>, name: &str, request: Request) -> Result<(), Error> {
    bus.create(request).map_err(|error| match asks_for_max_bytes(&error) {
        true => Error::Wrong {
            what: format!("create stream {name}: the account asks for max_bytes of each stream (max_bytes_required)"),
            remedy: "pass -max-bytes with what it may hold, such as 10GB".into(),
            exit: Exit::Configuration,
        },
        false => error.into(),
    })
}

fn parked(
    bus: &mut Bus<'_>,
    config: &Config,
    how: &Setup,
    report: &mut Report,
) -> Result<(), Error> {
    let Some(request) = create_park_stream(config, how) else {
        return Ok(());
    };
    let subject = &config.mapping.policy.park_subject;
    if let Some(stream) = bus.streams(subject)?.first() {
        let what = format!("stream {} of {subject}", stream.config.name);
        // those of the prefix are for the other stream
        let how = Setup {
            max_age: None,
            duplicate_window: None,
            ..how.clone()
        };
        let differences = stream_differences(stream, &bus.info, config.wanted(), &how);
        return report.tell(&what, Outcome::Found(differences));
    }
    let name = park_stream(how);
    let what = format!("stream {name} of {subject}");
    if bus.stream(&name)?.is_some() {
        let difference = "it does not capture the subject; add it, or name a subject that a stream captures with -park-subject";
        return report.tell(&what, Outcome::Found(vec![difference.into()]));
    }
    create(bus, &name, request)?;
    report.tell(&what, Outcome::Created)
}

/// What a name in a statement means. Not by `to_regclass`, which fails for a schema that the role may not use.
fn find_table(database: &mut Database, table: &TableName) -> Result<Option<u32>, Error> {
    let row = database.row(
        "find the table",
        "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relname = $1 AND CASE WHEN $2::text IS NULL THEN pg_catalog.pg_table_is_visible(c.oid) ELSE n.nspname = $2 END",
        &[&table.name, &table.schema],
    )?;
    Ok(row.map(|row| row.get(0)))
}

fn create_missing_table(
    database: &mut Database,
    config: &Config,
    table: &TableName,
) -> Result<Outcome, Error> {
    let Some(oid) = find_table(database, table)? else {
        database.run("create the table", &create_table(config, table))?;
        return Ok(Outcome::Created);
    };
    let rows = database.rows(
        "look at the table",
        "SELECT attname::text FROM pg_catalog.pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped",
        &[&oid],
    )?;
    let columns: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let has = |column: &str| columns.iter().any(|found| found == column);
    let cloud_events = config.mapping.cloudevents.is_some();
    let missing = mapping_of(config, table).missing_columns(cloud_events, has);
    Ok(Outcome::Found(match missing.as_slice() {
        [] => Vec::new(),
        missing => vec![format!("it has no column {}", missing.join(", "))],
    }))
}

/// The tables that `-table name*` means. They are partitions of something, or made by somebody: none is created here.
fn named_by_their_beginning(
    database: &mut Database,
    config: &Config,
    report: &mut Report,
) -> Result<Vec<TableName>, Error> {
    let mut found = Vec::new();
    for named in config
        .mapping
        .tables
        .iter()
        .filter(|it| it.table.and_longer)
    {
        let rows = database.rows(
            "find the tables",
            "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p') \
             AND pg_catalog.starts_with(c.relname::text, $1) AND c.relpersistence = 'p' \
             AND n.nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2",
            &[&named.table.name],
        )?;
        let matching: Vec<TableName> = rows
            .iter()
            .map(|row| (row.get::<_, String>(0), row.get::<_, String>(1)))
            .filter(|(schema, name)| named.table.matches(schema, name))
            .map(|(schema, name)| TableName {
                schema: Some(schema),
                name,
                and_longer: false,
            })
            .collect();
        let differences = match matching.is_empty() {
            true => vec!["there is none; create one, then run setup again".to_string()],
            false => Vec::new(),
        };
        report.tell(
            &format!("tables {}", named.table),
            Outcome::Found(differences),
        )?;
        found.extend(matching);
    }
    Ok(found)
}

/// The SQL function by which an application publishes without a table.
fn function(database: &mut Database, prefix: &str) -> Result<Outcome, Error> {
    let sql = publish_function(prefix);
    // each overload; ours first
    let found = database.rows(
        "find the function",
        "SELECT prosrc, s.text = $1, s.text, oid::regprocedure::text FROM pg_catalog.pg_proc, \
         pg_catalog.format('(%s) RETURNS %s', pg_catalog.pg_get_function_identity_arguments(oid), \
         pg_catalog.pg_get_function_result(oid)) AS s(text) \
         WHERE proname = 'outbox_publish' AND pg_catalog.pg_function_is_visible(oid) ORDER BY 2 DESC, 4",
        &[&PUBLISH_SIGNATURE],
    )?;
    let Some(first) = found.first() else {
        database.run("create the function", &sql)?;
        return Ok(Outcome::Created);
    };
    if !first.get::<_, bool>(1) {
        // beside it ours might make the application's own calls ambiguous, and it cannot be put in its place
        let each = found.iter().map(|row| {
            format!(
                "there is outbox_publish{}, and not outbox_publish{PUBLISH_SIGNATURE}; if nobody calls it: DROP ROUTINE {}; \
                 and run setup again; otherwise rename it, or pass -no-messages",
                row.get::<_, String>(2),
                row.get::<_, String>(3)
            )
        });
        return Ok(Outcome::Found(each.collect()));
    }
    // between the dollar quotes, as pg_proc keeps it
    let body = sql.split("$$").nth(1).unwrap_or_default();
    Ok(Outcome::Found(match first.get::<_, String>(0) == body {
        true => Vec::new(),
        false => vec![format!(
            "it is not the one of this release and of message prefix {prefix}; if nobody has changed it on purpose, replace \
             it in one statement, by which no call fails meanwhile and privileges stay:\n{}",
            replace_function(&sql)
        )],
    }))
}

/// The statement that puts the function in the place of another.
fn replace_function(create: &str) -> String {
    let create = create.trim_end();
    create.replacen("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1)
}

fn create_missing_publication(
    database: &mut Database,
    config: &Config,
    known: &[TableName],
) -> Result<Outcome, Error> {
    let found = database.row(
        "find the publication",
        "SELECT FROM pg_catalog.pg_publication WHERE pubname = $1",
        &[&config.publication],
    )?;
    if found.is_none() {
        if known.is_empty() {
            let why = "it does not exist, and there is no table for it";
            return Ok(Outcome::Missing(why.to_string()));
        }
        let mut partitioned = false;
        for table in known {
            let oid = find_table(database, table)?;
            let row = database.row(
                "look at the table",
                "SELECT relkind = 'p' FROM pg_catalog.pg_class WHERE oid = $1",
                &[&oid],
            )?;
            partitioned |= row.is_some_and(|row| row.get(0));
        }
        // published under their own names, partitions that are named by their beginning would otherwise be missed
        let by_root = partitioned
            && database.version >= VIA_ROOT
            && !config.mapping.tables.iter().any(|it| it.table.and_longer);
        let create = create_publication(config, known, by_root);
        database.run("create the publication", &create)?;
        return Ok(Outcome::Created);
    }
    // by the rules that halt the relay
    let mut facts = preflight::read(database, config)?;
    facts.outboxes = outboxes::read(database, &config.publication, &config.mapping, &[])?;
    let failures = failures_of(&[&publication::START], &facts, config);
    Ok(Outcome::Found(
        failures.iter().map(Finding::sentence).collect(),
    ))
}

/// Creates the slot, or reports what the rules find of the one that is there.
fn create_missing_slot(
    database: &mut Database,
    config: &Config,
    how: &Setup,
    publication: &Outcome,
) -> Result<Outcome, Error> {
    let facts = preflight::read(database, config)?;
    let Some(slot) = &facts.slot else {
        if matches!(publication, Outcome::Missing(_)) {
            // it would keep log that it can never send
            let why = "it is not created before the publication, which it could not see";
            return Ok(Outcome::Missing(why.to_string()));
        }
        let created = database.run("create the slot", &create_slot(&config.slot, how.failover));
        return match created {
            Ok(()) => Ok(Outcome::Created),
            Err(error) => Err(blocked(database, config, &facts, error)),
        };
    };
    let rules = [&server::START[..], &slot::START];
    let mut differences: Vec<String> = failures_of(&rules, &facts, config)
        .iter()
        .map(Finding::sentence)
        .collect();
    if differences.is_empty() && !matches!(publication, Outcome::Found(_)) {
        differences.push(format!(
            "it is older than the publication, which it cannot see in what was written before; {}",
            recreate(
                &facts,
                config,
                "needed only if the outbox was written to between the two"
            )
        ));
    }
    if how.failover && !slot.failover {
        differences.push(format!(
            "standbys do not take it over; with the relay stopped, on a replication connection: \
             ALTER_REPLICATION_SLOT {} ( FAILOVER true );",
            config.slot
        ));
    }
    Ok(Outcome::Found(differences))
}

/// A slot waits for every transaction that has written something by then. When that took too long, those that have been
/// there all the while are named.
fn blocked(
    database: &mut Database,
    config: &Config,
    before: &preflight::Facts,
    error: Error,
) -> Error {
    if !matches!(error.sqlstate(), Some("57014" | "55P03")) {
        return error;
    }
    let Ok(after) = preflight::read(database, config) else {
        return error;
    };
    let still = |writer: &&Writer| after.server.writers.iter().any(|it| it.xid == writer.xid);
    let blockers = before.server.writers.iter().filter(still).cloned();
    let blockers: Vec<Writer> = blockers.collect();
    if blockers.is_empty() {
        return error;
    }
    let finding = blocked_by(&blockers, &config.slot);
    Error::Wrong {
        what: format!("create the slot: {}", finding.found),
        remedy: finding.advice.map_or_else(String::new, |advice| {
            format!("{}; run this, then setup again: {}", advice.why, advice.fix)
        }),
        exit: Exit::Configuration,
    }
}
