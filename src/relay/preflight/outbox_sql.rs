//! The statements that create and alter outbox tables and their publication. `setup` runs them, `-print-sql` prints them,
//! findings recommend them: they are the same text.

use super::outboxes::{Column, GENERATED, KEEPS_PARTITION, Key, Table};
use crate::config::Config;
use crate::outbox::mapping::{TableMapping, TableName};
use crate::postgres::connection::quote_literal;
use crate::postgres::identifier::identifier;

/// The column of a CloudEvent's type, where there is no aggregate's.
const EVENT_TYPE: &str = "type";
/// `ALTER COLUMN … DROP EXPRESSION` came with it, and row triggers on partitioned tables that act before.
const DROP_EXPRESSION: u32 = 130_000;

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
    format!("CREATE TABLE {} (\n{}\n);", table.sql(), lines.join(",\n"))
}

/// Adds columns to a table that lacks them. Without constraints: the rows that are there have no value.
pub fn add_columns(config: &Config, table: &TableName, columns: &[String]) -> String {
    let mapping = mapping_of(config, table);
    let added = columns.iter().map(|column| {
        let (kind, _) = column_type(mapping, column);
        format!("ADD COLUMN {} {kind}", identifier(column))
    });
    let added: Vec<String> = added.collect();
    format!("ALTER TABLE {} {};", table.sql(), added.join(", "))
}

/// Creates the publication. Of inserts alone: deletes are not needed, and ask for a replica identity.
pub fn create_publication(config: &Config, tables: &[TableName], of_partitioned: bool) -> String {
    let tables: Vec<String> = tables.iter().map(TableName::sql).collect();
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

/// Takes column list and row filter from a table of the publication. `SET TABLE` would have to name all the others.
pub fn publish_whole(publication: &str, table: &Table) -> String {
    let (name, table) = (identifier(publication), table.sql());
    format!(
        "BEGIN; ALTER PUBLICATION {name} DROP TABLE ONLY {table}; ALTER PUBLICATION {name} ADD TABLE ONLY {table}; COMMIT;"
    )
}

/// Makes the publication send a generated column of `table`, or the column one that it sends. `published`: the table that
/// the publication names, by a list of columns if `listed`.
pub fn send_generated(
    version: u32,
    publication: &str,
    table: &Table,
    column: &Column,
    listed: Option<&Table>,
) -> String {
    let (sql, name) = (table.sql(), identifier(&column.name));
    let expression = column.expression.as_deref().unwrap_or("NULL");
    let again = format!(
        "ALTER TABLE {sql} DROP COLUMN {name}, ADD COLUMN {name} {}",
        column.kind
    );
    if version >= GENERATED {
        let mut fix = String::new();
        if column.generated == "v" {
            fix += &format!("{again} GENERATED ALWAYS AS ({expression}) STORED; ");
        }
        if let Some(listed) = listed {
            fix += &publish_whole(publication, listed);
            fix += " ";
        }
        let publication = identifier(publication);
        return fix
            + &format!(
                "ALTER PUBLICATION {publication} SET (publish_generated_columns = stored);"
            );
    }
    // before 18 none is ever sent: a trigger computes what the column did
    let function = TableName {
        name: format!("{}_{}", table.name, column.name),
        ..table.label()
    };
    let plain = match version >= DROP_EXPRESSION {
        true => format!("ALTER TABLE {sql} ALTER COLUMN {name} DROP EXPRESSION;"),
        false => again + ";",
    };
    format!(
        "BEGIN; {plain} CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $outbox$BEGIN SELECT {expression} \
         INTO NEW.{name} FROM (SELECT NEW.*) AS inserted; RETURN NEW; END$outbox$; CREATE TRIGGER {trigger} BEFORE INSERT OR \
         UPDATE ON {sql} FOR EACH ROW EXECUTE FUNCTION {function}(); COMMIT;",
        function = function.sql(),
        trigger = identifier(&function.name),
    )
}

/// Makes Postgres refuse an UPDATE that moves a row to another partition; `None` where it cannot.
pub fn keep_partition(version: u32, table: &Table, key: &Key) -> Option<String> {
    if version < DROP_EXPRESSION || key.columns.is_empty() {
        return None;
    }
    let function = TableName {
        name: format!("{}_keeps_partition", table.name),
        ..table.label()
    };
    let row = |row: &str| {
        let columns = key
            .columns
            .iter()
            .map(|name| format!("{row}.{}", identifier(name)));
        columns.collect::<Vec<_>>().join(", ")
    };
    Some(format!(
        "BEGIN; CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $outbox$BEGIN RAISE EXCEPTION \
         'a row of an outbox stays in its partition'; END$outbox$; CREATE TRIGGER {KEEPS_PARTITION} BEFORE UPDATE ON {table} \
         FOR EACH ROW WHEN (ROW({old}) IS DISTINCT FROM ROW({new})) EXECUTE FUNCTION {function}(); COMMIT;",
        function = function.sql(),
        table = table.sql(),
        old = row("OLD"),
        new = row("NEW"),
    ))
}

/// Makes the tables take their ids from the sequence of the first, which is set past all of them; `None` where one of them
/// has none.
pub fn share_sequence(tables: &[(&Table, &Column)]) -> Option<String> {
    let ((_, first), others) = tables.split_first()?;
    let sequence = first.sequence.as_deref()?;
    let mut sequences = Vec::new();
    for (_, id) in tables {
        sequences.push(format!(
            "nextval({})",
            quote_literal(id.sequence.as_deref()?)
        ));
    }
    let quoted = quote_literal(sequence);
    let mut fix = format!(
        "SELECT setval({quoted}, GREATEST({}));",
        sequences.join(", ")
    );
    for (table, id) in others {
        let column = identifier(&id.name);
        fix += &format!(
            " ALTER TABLE {} ALTER COLUMN {column} DROP IDENTITY IF EXISTS, ALTER COLUMN {column} SET DEFAULT nextval({quoted});",
            table.sql()
        );
    }
    Some(fix)
}
