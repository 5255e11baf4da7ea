//! The rows of the outboxes, as events: what the publication would send of them, in the form in which Postgres would.

use crate::admin::Error;
use crate::admin::database::Database;
use crate::config::Config;
use crate::exit::Exit;
use crate::outbox::batch::{Batch, Change, OutboxEvent};
use crate::outbox::mapper::{ColumnInfo, Mapper};
use crate::outbox::plan::{Place, Value};
use crate::outbox::problem::MapError;
use crate::postgres::Lsn;
use crate::postgres::connection::quote_identifier;
use std::ops::ControlFlow;

/// So many rows are fetched by one statement; they are held one by one.
const FETCH: u32 = 500;
const DOING: &str = "read the rows of an outbox";

/// A table of the publication whose rows are events.
struct Outbox {
    id: u32,
    schema: String,
    name: String,
    is_partitioned: bool,
    filter: Option<String>,
    /// Name and type of those that may take part.
    columns: Vec<(String, u32)>,
}

/// Gives each row to `take` as an event, of the snapshot that the session is in. Returns how many outboxes there are.
pub fn each(
    database: &mut Database,
    config: &Config,
    condition: Option<&str>,
    mapper: &mut Mapper,
    mut take: impl FnMut(OutboxEvent<'_>) -> Result<(), Error>,
) -> Result<usize, Error> {
    let outboxes = outboxes(database, config)?;
    let count = outboxes.len();
    for outbox in outboxes {
        let columns = outbox.columns.iter();
        let columns = columns.map(|(name, type_id)| ColumnInfo {
            name,
            type_id: *type_id,
        });
        mapper
            .relation(
                outbox.id,
                &outbox.schema,
                &outbox.name,
                columns,
                Lsn::INVALID,
            )
            .map_err(cannot)?;
        database.run(
            DOING,
            &format!(
                "DECLARE outbox_compare NO SCROLL CURSOR FOR {}",
                outbox.select(condition)
            ),
        )?;
        while fetch(database, &outbox, mapper, &mut take)? {}
        database.run(DOING, "CLOSE outbox_compare")?;
    }
    database.run(DOING, "COMMIT")?;
    Ok(count)
}

/// Takes some rows; whether there were any.
fn fetch(
    database: &mut Database,
    outbox: &Outbox,
    mapper: &Mapper,
    take: &mut impl FnMut(OutboxEvent<'_>) -> Result<(), Error>,
) -> Result<bool, Error> {
    let mut batch = Batch::default();
    let mut any = false;
    let failed = database.each(
        DOING,
        &format!("FETCH {FETCH} FROM outbox_compare"),
        &[],
        |row| {
            any = true;
            let values = (0..row.len()).map(|index| match row.try_get(index) {
                Ok(None) => Value::Null,
                Ok(Some(text)) => Value::Text(str::as_bytes(text)),
                // SQL_ASCII, where nobody says what the bytes mean
                Err(_) => Value::Undecodable(&[]),
            });
            batch.clear();
            let mapped = mapper.insert(outbox.id, values, Place::default(), &mut batch);
            let taken = mapped.map_err(cannot).and_then(|_| match batch.changes() {
                [Change::Event(spans)] => take(batch.event(spans)),
                _ => Ok(()),
            });
            match taken {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => ControlFlow::Break(error),
            }
        },
    )?;
    match failed {
        None => Ok(any),
        Some(error) => Err(error),
    }
}

fn cannot(error: MapError) -> Error {
    Error::Wrong {
        what: error.to_string(),
        remedy: "see what check says".into(),
        exit: Exit::Configuration,
    }
}

fn outboxes(database: &mut Database, config: &Config) -> Result<Vec<Outbox>, Error> {
    // row filters and column lists came with 15
    let tables = database.rows(
        "look for the outboxes of the publication",
        "SELECT c.oid, n.nspname::text, c.relname::text, c.relkind = 'p', to_jsonb(t) ->> 'rowfilter', \
         array_agg(a.attname::text ORDER BY a.attnum), array_agg(a.atttypid ORDER BY a.attnum) \
         FROM pg_catalog.pg_publication_tables t JOIN pg_catalog.pg_namespace n ON n.nspname = t.schemaname \
         JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename \
         JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
         AND COALESCE(to_jsonb(t) -> 'attnames' ? a.attname::text, true) \
         WHERE t.pubname = $1 GROUP BY 1, 2, 3, 4, 5 ORDER BY 2, 3",
        &[&config.publication],
    )?;
    let mut outboxes = Vec::new();
    for table in tables {
        let (schema, name): (String, String) = (table.get(1), table.get(2));
        let Some(mapping) = config.mapping.of_table(&schema, &name) else {
            continue;
        };
        let names: Vec<String> = table.get(5);
        let types: Vec<u32> = table.get(6);
        let has = |column: &&str| names.iter().any(|name| name == column);
        if !mapping.needed_columns().iter().all(has) {
            continue;
        }
        let used = mapping.used_columns();
        let columns = names.iter().zip(&types);
        let columns = columns.filter(|(name, _)| used.contains(&name.as_str()));
        outboxes.push(Outbox {
            id: table.get(0),
            is_partitioned: table.get(3),
            filter: table.get(4),
            columns: columns.map(|(name, of)| (name.clone(), *of)).collect(),
            schema,
            name,
        });
    }
    Ok(outboxes)
}

impl Outbox {
    /// The statement for its rows: each value in the text form, as pgoutput sends it. (A cast would cut the blanks of a `char(n)`.)
    fn select(&self, condition: Option<&str>) -> String {
        let value = |(name, _): &(String, u32)| {
            let column = quote_identifier(name);
            format!(
                "CASE WHEN {column} IS DISTINCT FROM NULL THEN pg_catalog.format('%s', {column}) END"
            )
        };
        let values: Vec<String> = self.columns.iter().map(value).collect();
        let filters = self.filter.as_deref().into_iter().chain(condition);
        let filters: Vec<String> = filters.map(|filter| format!("({filter}\n)")).collect();
        let filters = match filters.is_empty() {
            true => String::new(),
            false => format!(" WHERE {}", filters.join(" AND ")),
        };
        format!(
            "SELECT {} FROM {}{}.{}{filters}",
            values.join(", "),
            // rows of children are published under their own names
            if self.is_partitioned { "" } else { "ONLY " },
            quote_identifier(&self.schema),
            quote_identifier(&self.name)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_cannot_swallow_the_filter() {
        let outbox = Outbox {
            id: 1,
            schema: "s".into(),
            name: "O".into(),
            is_partitioned: false,
            filter: Some("a > 1".into()),
            columns: vec![("id".into(), 25)],
        };
        assert_eq!(
            outbox.select(Some("b OR true -- x")),
            "SELECT CASE WHEN \"id\" IS DISTINCT FROM NULL THEN pg_catalog.format('%s', \"id\") END \
             FROM ONLY \"s\".\"O\" WHERE (a > 1\n) AND (b OR true -- x\n)"
        );
    }
}
