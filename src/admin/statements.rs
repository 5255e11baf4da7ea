//! The statements and requests that create what the relay needs. `setup` runs them, `--print-sql` and `--print-nats` print
//! them, `check` recommends them: they are the same text.

use crate::config::Config;
use crate::config::operation::{DEFAULT_WINDOW, Setup};
use crate::jetstream::streams::{Request, create_bucket_request};
use crate::outbox::mapping::TableName;
use crate::postgres::connection::quote_literal;
use serde_json::json;
use std::time::Duration;

/// A name as SQL spells it, quoted where it must be. (Key words are quoted by nobody here but by `"` in `--table`.)
pub fn identifier(name: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    match starts_well && name.chars().all(plain) && !RESERVED.contains(&name) {
        true => name.to_string(),
        false => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}

/// Reserved words that somebody might call a table, a role or a publication.
const RESERVED: [&str; 8] = [
    "all", "default", "end", "group", "order", "table", "union", "user",
];

/// A table's name as SQL spells it.
pub fn table_name(table: &TableName) -> String {
    match &table.schema {
        Some(schema) => format!("{}.{}", identifier(schema), identifier(&table.name)),
        None => identifier(&table.name),
    }
}

/// The tables that `-table` names, or `outbox`.
pub fn tables(config: &Config) -> Vec<TableName> {
    match config.mapping.tables.as_slice() {
        [] => vec![TableName {
            and_longer: false,
            schema: None,
            name: "outbox".into(),
        }],
        tables => tables.iter().map(|it| it.table.clone()).collect(),
    }
}

/// Creates an outbox table.
pub fn create_table(table: &TableName) -> String {
    format!(
        "CREATE TABLE {} (\n    id uuid NOT NULL PRIMARY KEY,\n    aggregatetype character varying(255) NOT NULL,\n    \
         aggregateid character varying(255) NOT NULL,\n    payload jsonb\n);",
        table_name(table)
    )
}

/// Creates the publication. Of inserts alone: deletes are not needed, and ask for a replica identity.
pub fn create_publication(config: &Config) -> String {
    let tables: Vec<String> = tables(config).iter().map(table_name).collect();
    format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish = 'insert');",
        identifier(&config.publication),
        tables.join(", ")
    )
}

/// Creates the slot. `failover` exists from Postgres 17 on.
pub fn create_slot(slot: &str, failover: bool) -> String {
    let failover = if failover { ", failover => true" } else { "" };
    format!(
        "SELECT pg_create_logical_replication_slot({}, 'pgoutput'{failover});",
        quote_literal(slot)
    )
}

/// Drops the slot.
pub fn drop_slot(slot: &str) -> String {
    format!("SELECT pg_drop_replication_slot({});", quote_literal(slot))
}

/// Asks for the stream of the prefix.
pub fn create_stream(config: &Config, how: &Setup) -> Request {
    let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(i64::MAX as u64);
    let body = json!({
        "name": how.stream, "subjects": [format!("{}.>", config.prefix)], "retention": "limits", "storage": "file",
        "discard": "old", "num_replicas": how.replicas.unwrap_or(1), "max_age": how.max_age.map_or(0, nanos),
        "duplicate_window": nanos(how.duplicate_window.unwrap_or(DEFAULT_WINDOW)), "allow_direct": true,
    });
    (
        format!("STREAM.CREATE.{}", how.stream),
        body.to_string().into(),
    )
}

/// Asks for the bucket of the checkpoint; `None` if there is to be none.
pub fn create_bucket(config: &Config, replicas: Option<u32>) -> Option<Request> {
    (!config.checkpoint.is_empty())
        .then(|| create_bucket_request(&config.checkpoint, replicas.unwrap_or(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_where_sql_asks_for_it() {
        for (name, text) in [
            ("outbox", "outbox"),
            ("_o1", "_o1"),
            ("1o", "\"1o\""),
            ("Outbox", "\"Outbox\""),
            ("a b", "\"a b\""),
            ("a\"b", "\"a\"\"b\""),
            ("order", "\"order\""),
            ("", "\"\""),
        ] {
            assert_eq!(identifier(name), text);
        }
    }
}
