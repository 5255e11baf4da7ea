//! `setup`: creates what is missing, and says what is there and where it differs. It never alters or drops anything.
//!
//! Postgres is last and the slot the very last: a slot that is left behind by a failure further on would fill a disk.

use super::bus::Bus;
use super::database::{Access, Database};
use super::statements::{
    create_bucket, create_publication, create_slot, create_stream, create_table, drop_slot,
    identifier, table_name, tables,
};
use super::{Error, say};
use crate::config::Config;
use crate::config::operation::Setup;
use crate::exit::Exit;
use crate::jetstream::Delivery;
use crate::jetstream::preflight::preflight;
use crate::jetstream::probe::ServerInfo;
use crate::jetstream::streams::{StreamInfo, matches};
use crate::outbox::mapping::TableName;
use std::time::Duration;

/// `pg_create_logical_replication_slot` has the parameter since.
const FAILOVER: u32 = 170_000;

/// What became of one thing.
enum Outcome {
    Created,
    /// It was there; where it differs from what would have been created, and what to do.
    Found(Vec<String>),
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
    let mut report = Report { differs: false };
    streams(&mut bus, config, how, &mut report)?;
    bucket(&mut bus, config, how, &mut report)?;
    for table in tables(config) {
        let what = format!("table {}", table_name(&table));
        report.tell(&what, create_missing_table(&mut database, &table)?)?;
    }
    let outcome = publication(&mut database, config)?;
    let made_publication = matches!(outcome, Outcome::Created);
    report.tell(
        &format!("publication {}", identifier(&config.publication)),
        outcome,
    )?;
    let outcome = slot(&mut database, config, how, made_publication)?;
    report.tell(&format!("slot {}", config.slot), outcome)?;
    Ok(match report.differs {
        true => Exit::Configuration,
        false => Exit::Done,
    })
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
        bus.create(create_stream(config, how))?;
        return report.tell(&what, Outcome::Created);
    }
    let whole = |stream: &StreamInfo| captures_all(&stream.config.subjects, &wanted);
    for stream in &found {
        let subjects = stream.config.subjects.join(", ");
        let what = format!("stream {} of {subjects}", stream.config.name);
        let mut differences = stream_differences(stream, &bus.info, config.delivery, how);
        if found.len() == 1 && !whole(stream) {
            differences.push(format!(
                "it does not capture all of {wanted}; an event of another subject stops the relay until a stream captures it"
            ));
        }
        report.tell(&what, Outcome::Found(differences))?;
    }
    Ok(())
}

/// One of the patterns stands for every subject that `wanted`, of the form `prefix.>`, stands for.
fn captures_all(patterns: &[String], wanted: &str) -> bool {
    // a pattern that takes a subject of two further unheard-of tokens takes all of them, or ends in a fixed number
    let probe = wanted.replace('>', "\u{1}.\u{1}");
    patterns.iter().any(|pattern| {
        pattern.ends_with('>')
            && matches(pattern, &probe)
            && matches(pattern, &wanted.replace('>', "\u{1}"))
    })
}

fn stream_differences(
    stream: &StreamInfo,
    server: &ServerInfo,
    delivery: Delivery,
    how: &Setup,
) -> Vec<String> {
    let found = preflight(stream, server, delivery);
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
    let Some(request) = create_bucket(config, how.replicas) else {
        return Ok(());
    };
    let what = format!("checkpoint bucket {}", config.checkpoint);
    let outcome = match bus.stream(&format!("KV_{}", config.checkpoint))? {
        None => {
            bus.create(request)?;
            Outcome::Created
        }
        Some(found) if found.config.storage == "memory" => {
            Outcome::Found(vec!["it is kept in memory, not in a file".into()])
        }
        Some(_) => Outcome::Found(Vec::new()),
    };
    report.tell(&what, outcome)
}

/// The four columns an outbox has.
pub const COLUMNS: [&str; 4] = ["id", "aggregatetype", "aggregateid", "payload"];

fn create_missing_table(database: &mut Database, table: &TableName) -> Result<Outcome, Error> {
    let name = table_name(table);
    let columns = database.row(
        "find the table",
        "SELECT array_agg(attname::text) FROM pg_catalog.pg_attribute \
         WHERE attrelid = pg_catalog.to_regclass($1) AND attnum > 0 AND NOT attisdropped \
         HAVING pg_catalog.to_regclass($1) IS NOT NULL",
        &[&name],
    )?;
    let Some(row) = columns else {
        database.run("create the table", &create_table(table))?;
        return Ok(Outcome::Created);
    };
    let columns: Vec<String> = row.get::<_, Option<_>>(0).unwrap_or_default();
    let missing: Vec<&str> = COLUMNS
        .into_iter()
        .filter(|column| !columns.iter().any(|found| found == column))
        .collect();
    Ok(Outcome::Found(match missing.as_slice() {
        [] => Vec::new(),
        missing => vec![format!("it has no column {}", missing.join(", "))],
    }))
}

fn publication(database: &mut Database, config: &Config) -> Result<Outcome, Error> {
    let name = identifier(&config.publication);
    let found = database.row(
        "find the publication",
        "SELECT pubinsert, pubupdate OR pubdelete FROM pg_catalog.pg_publication WHERE pubname = $1",
        &[&config.publication],
    )?;
    let Some(row) = found else {
        database.run("create the publication", &create_publication(config))?;
        return Ok(Outcome::Created);
    };
    let mut differences = Vec::new();
    if !row.get::<_, bool>(0) {
        differences.push(format!(
            "it does not publish inserts; ALTER PUBLICATION {name} SET (publish = 'insert');"
        ));
    }
    for table in tables(config) {
        let table = table_name(&table);
        let holds = database.row(
            "look into the publication",
            "SELECT true FROM pg_catalog.pg_publication_tables t WHERE t.pubname = $1 AND \
             pg_catalog.to_regclass(pg_catalog.quote_ident(t.schemaname) || '.' || pg_catalog.quote_ident(t.tablename)) \
             = pg_catalog.to_regclass($2)",
            &[&config.publication, &table],
        )?;
        if holds.is_none() {
            differences.push(format!(
                "it does not hold table {table}; ALTER PUBLICATION {name} ADD TABLE {table};"
            ));
        }
    }
    Ok(Outcome::Found(differences))
}

fn slot(
    database: &mut Database,
    config: &Config,
    how: &Setup,
    made_publication: bool,
) -> Result<Outcome, Error> {
    let failover = if database.version >= FAILOVER {
        "failover"
    } else {
        "false"
    };
    let found = database.row(
        "find the slot",
        &format!(
            "SELECT slot_type = 'logical' AND plugin IS NOT DISTINCT FROM 'pgoutput', \
             database IS NOT DISTINCT FROM current_database(), database::text, {failover} \
             FROM pg_catalog.pg_replication_slots WHERE slot_name = $1"
        ),
        &[&config.slot],
    )?;
    let Some(row) = found else {
        database.run("create the slot", &create_slot(&config.slot, how.failover))?;
        return Ok(Outcome::Created);
    };
    let mut differences = Vec::new();
    if !row.get::<_, bool>(0) {
        differences
            .push("it is not a logical slot of pgoutput; name another with -slot".to_string());
    } else if !row.get::<_, bool>(1) {
        let database: Option<String> = row.get(2);
        differences.push(format!(
            "it belongs to database {}; name another slot with -slot",
            database.unwrap_or_default()
        ));
    } else if made_publication {
        differences.push(format!(
            "it is older than the publication, which it cannot see in what was written before; drop it and run setup again: {}",
            drop_slot(&config.slot)
        ));
    }
    if how.failover && !row.get::<_, bool>(3) {
        differences.push(format!(
            "standbys do not take it over; with the relay stopped, on a replication connection: \
             ALTER_REPLICATION_SLOT {} ( FAILOVER true );",
            config.slot
        ));
    }
    Ok(Outcome::Found(differences))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_stream_of_everything_captures_everything() {
        for (pattern, all) in [
            ("events.>", true),
            (">", true),
            ("*.>", true),
            ("events.*.>", false),
            ("events.*", false),
            ("events.account.>", false),
            ("other.>", false),
        ] {
            assert_eq!(
                captures_all(&[pattern.into()], "events.>"),
                all,
                "{pattern}"
            );
        }
    }
}
