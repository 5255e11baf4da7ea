//! The statements and requests that create what the relay needs. `setup` runs them, `--print-sql` and `--print-nats` print
//! them, `check` recommends them: they are the same text.

use crate::config::Config;
use crate::config::operation::{DEFAULT_WINDOW, Setup};
use crate::jetstream::streams::{Request, create_bucket_request, matches};
use crate::outbox::mapping::{TableMapping, TableName};
use crate::postgres::identifier::identifier;
pub use crate::relay::preflight::slot::create_slot;
use serde_json::json;
use std::time::Duration;

/// A table's name as SQL spells it.
pub fn table_name(table: &TableName) -> String {
    match &table.schema {
        Some(schema) => format!("{}.{}", identifier(schema), identifier(&table.name)),
        None => identifier(&table.name),
    }
}

/// The tables that `-table` names, or `outbox`; without those that it names by their beginning, which are made elsewhere.
pub fn tables(config: &Config) -> Vec<TableName> {
    match config.mapping.tables.as_slice() {
        [] => vec![TableName {
            and_longer: false,
            schema: None,
            name: "outbox".into(),
        }],
        tables => (tables.iter().map(|it| &it.table))
            .filter(|table| !table.and_longer)
            .cloned()
            .collect(),
    }
}

/// How the rows of a table become events: what `-table` says of it, or the default.
pub fn mapping_of<'a>(config: &'a Config, table: &TableName) -> &'a TableMapping {
    let mut named = config.mapping.tables.iter();
    let own = named.find(|it| {
        it.table == *table
            || it
                .table
                .matches(table.schema.as_deref().unwrap_or_default(), &table.name)
    });
    own.map_or(&config.mapping.default, |it| &it.mapping)
}

/// The type that setup gives to a column of the mapping, and its constraint.
fn column_type(mapping: &TableMapping, column: &str) -> (&'static str, &'static str) {
    let in_subject = || {
        let mut columns = mapping.subject.columns();
        columns.any(|name| mapping.column(name) == column)
    };
    match column {
        _ if column == mapping.id => ("uuid", " NOT NULL PRIMARY KEY"),
        _ if column == mapping.payload => ("jsonb", ""),
        _ if mapping.headers_column.as_deref() == Some(column) => ("jsonb", ""),
        // a row whose subject lacks a part cannot be published
        _ if in_subject() => ("character varying(255)", " NOT NULL"),
        _ => ("text", ""),
    }
}

/// Creates an outbox table, with the columns that its mapping asks for.
pub fn create_table(config: &Config, table: &TableName) -> String {
    let mapping = mapping_of(config, table);
    let mut columns = vec![mapping.id.as_str()];
    columns.extend(mapping.subject.columns().map(|name| mapping.column(name)));
    columns.extend(mapping.headers.iter().map(|header| header.column.as_str()));
    if config.mapping.cloudevents.is_some() && !columns.contains(&mapping.aggregatetype.as_str()) {
        columns.push(EVENT_TYPE);
    }
    columns.extend(mapping.headers_column.as_deref());
    columns.push(&mapping.payload);
    let mut lines: Vec<String> = Vec::new();
    for (index, column) in columns.iter().enumerate() {
        if !columns.iter().take(index).any(|before| before == column) {
            let (kind, constraint) = column_type(mapping, column);
            lines.push(format!("    {} {kind}{constraint}", identifier(column)));
        }
    }
    format!(
        "CREATE TABLE {} (\n{}\n);",
        table_name(table),
        lines.join(",\n")
    )
}

/// Adds columns to a table that lacks them. Without constraints: the rows that are there have no value.
pub fn add_columns(config: &Config, table: &TableName, columns: &[String]) -> String {
    let mapping = mapping_of(config, table);
    let added = columns.iter().map(|column| {
        let (kind, _) = column_type(mapping, column);
        format!("ADD COLUMN {} {kind}", identifier(column))
    });
    let added: Vec<String> = added.collect();
    format!("ALTER TABLE {} {};", table_name(table), added.join(", "))
}

/// The column of a CloudEvent's type, where there is no aggregate's.
const EVENT_TYPE: &str = "type";

/// The columns that the relay needs of a table and that are not among `has`.
pub fn missing_columns(
    config: &Config,
    mapping: &TableMapping,
    has: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut needed = vec![mapping.id.as_str()];
    needed.extend(mapping.subject.columns().map(|name| mapping.column(name)));
    needed.extend(mapping.needed_columns());
    if config.mapping.cloudevents.is_some() && !has(&mapping.aggregatetype) {
        needed.push(EVENT_TYPE);
    }
    let mut missing: Vec<String> = Vec::new();
    for column in needed {
        if !has(column) && !missing.iter().any(|known| known == column) {
            missing.push(column.to_string());
        }
    }
    missing
}

/// Creates the publication. Of inserts alone: deletes are not needed, and ask for a replica identity.
pub fn create_publication(config: &Config, tables: &[TableName], of_partitioned: bool) -> String {
    let tables: Vec<String> = tables.iter().map(table_name).collect();
    // the rows of a partitioned table are the table's then, not its partitions'
    let root = match of_partitioned {
        true => ", publish_via_partition_root = true",
        false => "",
    };
    format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish = 'insert'{root});",
        identifier(&config.publication),
        tables.join(", ")
    )
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

/// Asks for the stream of the events that are parked; `None` if none are, or the stream of the prefix takes them.
///
/// One of its own, so that its age and limits can differ, and nobody who reads events meets what was parked.
pub fn create_park_stream(config: &Config, how: &Setup) -> Option<Request> {
    let subject = &config.mapping.policy.park_subject;
    if !config.mapping.policy.parks() || matches(&format!("{}.>", config.prefix), subject) {
        return None;
    }
    let name = park_stream(how);
    let body = json!({
        "name": name, "subjects": [subject], "retention": "limits", "storage": "file", "discard": "old",
        "num_replicas": how.replicas.unwrap_or(1), "allow_direct": true,
    });
    Some((format!("STREAM.CREATE.{name}"), body.to_string().into()))
}

/// The stream of the events that are parked, if it has to be created.
pub fn park_stream(how: &Setup) -> String {
    format!("{}_parked", how.stream)
}

/// Asks for the bucket of the checkpoint.
pub fn create_bucket(config: &Config, replicas: Option<u32>) -> Request {
    create_bucket_request(&config.checkpoint, replicas.unwrap_or(1))
}
