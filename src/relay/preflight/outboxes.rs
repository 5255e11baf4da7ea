//! What the catalog says about the outboxes of the database: which of them are in the publication, by what name, with which
//! columns and under which condition their rows are sent, and what else they are made of.
//!
//! The unit is the *tree*: a table with its partitions or inheritance children. Applications insert into its root, and the
//! rows end in any of its members, so all of these have to reach the relay. What an outbox inherits from is no part of it, unless
//! that looks like an outbox too. Read in one statement, that is of one
//! snapshot, whose text does not grow with the tables; every role may run it. [`super::publication`] judges.
//!
//! Sources: <https://www.postgresql.org/docs/current/view-pg-publication-tables.html>,
//! <https://www.postgresql.org/docs/current/catalog-pg-publication-rel.html>, and `get_rel_sync_entry` of pgoutput.c, which
//! decides the same at the server.

use super::Query;
use crate::outbox::mapping::{Mapping, NamedTable, TableMapping, TableName};
use crate::postgres;
use crate::postgres::connection::quote_literal;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// `pubviaroot` came with it, and partitioned tables in publications.
pub const VIA_ROOT: u32 = 130_000;
/// Row filters, column lists and schemas came with it.
pub const FILTERS: u32 = 150_000;
/// A publication may send stored generated columns since.
pub const GENERATED: u32 = 180_000;
/// `FOR ALL TABLES EXCEPT` came with it.
pub const EXCEPT: u32 = 190_000;

/// The trigger that keeps rows in their partition, as the fix of `postgres.partition_moves` creates it.
pub const KEEPS_PARTITION: &str = "outbox_keeps_partition";

/// The table of somebody who passes no `-table`.
const DEFAULT_TABLE: &str = "outbox";

/// What was read.
#[derive(Clone, Debug, Default)]
pub struct Outboxes {
    /// 150018 for 15.18.
    pub version: u32,
    /// `None`: there is none of that name in this database.
    pub publication: Option<Publication>,
    /// By tree, its root first.
    pub tables: Vec<Table>,
}

/// A row of `pg_publication`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Publication {
    /// Another one under the same name is another publication.
    pub oid: u32,
    /// It publishes inserts.
    pub inserts: bool,
    /// It publishes updates.
    #[serde(default)]
    pub updates: bool,
    /// It is for all tables.
    pub all_tables: bool,
    /// `publish_via_partition_root`.
    pub via_root: bool,
    /// The tables that `FOR ALL TABLES` excepts, as SQL spells them.
    #[serde(default)]
    pub except: Vec<String>,
    /// The tables that it names one by one, at most 100 of them: oid, and as SQL spells it.
    #[serde(default)]
    pub named: Vec<(u32, String)>,
}

/// A table that looks like an outbox, is named, or shares a tree with one that does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Table {
    /// `pg_class.oid`.
    pub oid: u32,
    /// The topmost table of its tree.
    pub root: u32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// `pg_class.relkind`: r, p (partitioned, holds no rows itself), f (foreign), v or m (a view).
    pub kind: char,
    /// Its rows are not in the WAL.
    #[serde(default)]
    pub unlogged: bool,
    /// It is a partition of another.
    #[serde(default)]
    pub partition: bool,
    /// The table by whose name its rows are sent: itself, or a partitioned one above it.
    pub via: Option<u32>,
    /// The publication covers it, or a partitioned table above it.
    #[serde(default)]
    pub member: bool,
    /// It has been published since it exists: by its schema, by `FOR ALL TABLES`, or by the transaction that created it.
    #[serde(default)]
    pub automatic: bool,
    /// Another publication has it.
    #[serde(default)]
    pub elsewhere: bool,
    /// The row filter by which it is published.
    pub filter: Option<String>,
    /// A hash of it as the catalog keeps it, by the numbers of columns: renaming leaves it as it is.
    pub filter_hash: Option<i64>,
    /// The publication has a list of its columns.
    #[serde(default)]
    pub listed: bool,
    /// Those that take part in an event, by whatever mapping; empty where the table it is published by has them.
    #[serde(default)]
    pub columns: Vec<Column>,
    /// How it is partitioned.
    pub key: Option<Key>,
    /// What a view reads.
    pub reads: Option<String>,
}

/// A column.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type, as SQL spells it.
    #[serde(rename = "type")]
    pub kind: String,
    /// What a domain is over.
    pub base: Option<String>,
    /// `attgenerated`: s (stored), v (virtual) or nothing.
    #[serde(default)]
    pub generated: String,
    /// The publication sends it.
    #[serde(default)]
    pub sent: bool,
    /// It is declared NOT NULL.
    #[serde(default)]
    pub not_null: bool,
    /// Its default, or what it is generated by.
    pub expression: Option<String>,
    /// The sequence that it takes its values from, as SQL spells it.
    pub sequence: Option<String>,
}

/// A partition key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Key {
    /// As SQL spells it: `LIST (state)`.
    pub text: String,
    /// Its columns; one that is an expression is left out.
    pub columns: Vec<String>,
    /// An UPDATE may well move a row: it is a list, or a range over a column that may be NULL.
    pub moves: bool,
    /// The trigger [`KEEPS_PARTITION`] refuses it.
    pub kept: bool,
}

impl Outboxes {
    /// The trees, each with its root first.
    pub fn trees(&self) -> impl Iterator<Item = &[Table]> {
        self.tables.chunk_by(|a, b| a.root == b.root)
    }

    /// For looking up many tables.
    pub fn index(&self) -> Index<'_> {
        let mut index = Index::default();
        for tree in self.trees() {
            for table in tree {
                index.trees.insert(table.oid, tree);
                index.names.insert((&table.schema, &table.name), table);
            }
        }
        index
    }
}

/// The members of a tree whose rows are not sent. A partitioned table that has no partition yet is its own, unless the
/// publication will have those that come.
pub fn holes(tree: &[Table]) -> impl Iterator<Item = &Table> {
    let is_empty = is_empty(tree);
    tree.iter().filter(move |table| match is_empty {
        true => table.kind == 'p' && !table.member,
        false => table.holds_rows() && !table.reaches(),
    })
}

/// It is partitioned, and there is no partition to hold a row.
pub fn is_empty(tree: &[Table]) -> bool {
    !tree.iter().any(Table::holds_rows)
}

/// Finds tables by their oids and names.
#[derive(Clone, Debug, Default)]
pub struct Index<'a> {
    /// The tree of each table.
    pub trees: BTreeMap<u32, &'a [Table]>,
    /// By schema and name.
    pub names: BTreeMap<(&'a str, &'a str), &'a Table>,
}

impl Table {
    /// It holds rows.
    pub fn holds_rows(&self) -> bool {
        matches!(self.kind, 'r' | 'f')
    }

    /// What is inserted into it is sent.
    pub fn reaches(&self) -> bool {
        self.kind == 'r' && !self.unlogged && self.via.is_some()
    }

    /// Its rows are sent by its own name.
    pub fn is_sent_by_name(&self) -> bool {
        self.via == Some(self.oid)
    }

    /// The column of that name, if the table has it.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Its name as the catalog has it, with the schema.
    pub fn label(&self) -> TableName {
        TableName {
            schema: Some(self.schema.clone()),
            name: self.name.clone(),
            and_longer: false,
        }
    }

    /// As SQL spells it.
    pub fn sql(&self) -> String {
        self.label().sql()
    }
}

/// Reads them. `remembered`: tables to look for whatever they look like.
///
/// Never on the session that is to decode: these functions open the tables, and Postgres goes on to decode older WAL with
/// what it has cached of them by then (18 ends in "cache lookup failed for namespace" where a table was moved meanwhile).
pub fn read<Q: Query>(
    session: &mut Q,
    publication: &str,
    mapping: &Mapping,
    remembered: &[u32],
) -> Result<Outboxes, Q::Error> {
    const DOING: &str = "look at the publication";
    let (version, _) = session.server_version();
    let sql = statement(version, publication, mapping, remembered);
    // it would compile for seconds what runs for a fraction of one
    session.text_rows(DOING, "SET jit = off")?;
    let mut found = Outboxes {
        version,
        ..Outboxes::default()
    };
    for row in session.text_rows(DOING, &sql)? {
        let mut cells = row.into_iter();
        match (cells.next().flatten().as_deref(), cells.next().flatten()) {
            (Some("publication"), Some(text)) => {
                found.publication = Some(parse::<_, Q>(DOING, &text)?);
            }
            (_, Some(text)) => found.tables.push(parse::<_, Q>(DOING, &text)?),
            _ => {}
        }
    }
    // the root of each is its first
    (found.tables).sort_by_key(|table| (table.root, table.oid != table.root, table.oid));
    Ok(found)
}

fn parse<T: DeserializeOwned, Q: Query>(doing: &'static str, text: &str) -> Result<T, Q::Error> {
    serde_json::from_str(text)
        .map_err(|error| postgres::Error::Protocol(format!("{doing}: {error}")).into())
}

/// An array of these texts.
fn texts<'a>(all: impl IntoIterator<Item = &'a str>) -> String {
    let mut all: Vec<&str> = all.into_iter().collect();
    all.sort_unstable();
    all.dedup();
    let quoted: Vec<String> = all.iter().map(|text| quote_literal(text)).collect();
    format!("ARRAY[{}]::text[]", quoted.join(", "))
}

/// The condition that a relation `c` in the schema `n` is one of those that `-table` names.
fn named(mapping: &Mapping) -> String {
    let any = |table: &TableName| {
        let name = quote_literal(&table.name);
        let mut sql = match table.and_longer {
            true => format!("pg_catalog.starts_with(c.relname::text, {name})"),
            false => format!("c.relname = {name}"),
        };
        if let Some(schema) = &table.schema {
            sql += &format!(" AND n.nspname = {}", quote_literal(schema));
        }
        sql
    };
    let named: Vec<String> = (mapping.tables.iter())
        .map(|NamedTable { table, .. }| any(table))
        .collect();
    match named.is_empty() {
        true => format!("c.relname = '{DEFAULT_TABLE}'"),
        false => named.join(" OR "),
    }
}

fn statement(version: u32, publication: &str, mapping: &Mapping, remembered: &[u32]) -> String {
    let tables: Vec<&TableMapping> = (mapping.tables.iter().map(|named| &named.mapping))
        .chain([&mapping.default])
        .collect();
    let used = texts(tables.iter().flat_map(|table| table.used_columns()));
    let needed = mapping.default.needed_columns();
    let count = needed.len().to_string();
    let (needed, meant) = (texts(needed), texts(mapping.default.own_columns()));
    // with -table nothing else is an outbox of ours
    let alike = match mapping.tables.is_empty() {
        true => "a.needed OR a.meant AND c.oid IN (SELECT relid FROM published)",
        false => "false",
    };
    let oids: Vec<String> = remembered.iter().map(u32::to_string).collect();
    let (oids, name, named) = (oids.join(","), quote_literal(publication), named(mapping));
    let values = [
        ("name", name.as_str()),
        ("named", &named),
        ("oids", &oids),
        ("alike", alike),
        ("used", &used),
        ("needed", &needed),
        ("count", &count),
        ("meant", &meant),
        ("keeps_partition", KEEPS_PARTITION),
    ];
    fill(include_str!("outboxes.sql"), |name| {
        let value = values.iter().find(|(of, _)| *of == name);
        value.map_or_else(|| of_version(version, name), |(_, value)| value)
    })
}

/// The parts that not every version of Postgres knows.
fn of_version(version: u32, name: &str) -> &'static str {
    let (since, sql, otherwise) = match name {
        "via_root" => (VIA_ROOT, "pubviaroot", "false"),
        "attrs" => (FILTERS, "g.attrs", "NULL"),
        "quals" => (FILTERS, "g.qual", "NULL"),
        "sent" => (FILTERS, "p.attrs", "NULL"),
        "filter" => (FILTERS, "pg_catalog.pg_get_expr(p.qual, p.relid)", "NULL"),
        // where a filter stood in its statement is kept with it
        "filter_hash" => (
            FILTERS,
            r"pg_catalog.hashtextextended(pg_catalog.regexp_replace(p.qual::text, ':location -?[0-9]+', '', 'g'), 0)",
            "NULL",
        ),
        "listed" => (
            FILTERS,
            "EXISTS (SELECT FROM pg_catalog.pg_publication_rel r WHERE r.prpubid = pub.oid AND r.prrelid = t.oid AND r.prattrs IS NOT NULL)",
            "false",
        ),
        "by_schema" => (
            FILTERS,
            "EXISTS (SELECT FROM pg_catalog.pg_publication_namespace s WHERE s.pnpubid = pub.oid AND s.pnnspid = c.relnamespace)",
            "false",
        ),
        "elsewhere_by_schema" => (
            FILTERS,
            "EXISTS (SELECT FROM pg_catalog.pg_publication_namespace s WHERE s.pnpubid <> COALESCE(pub.oid, 0) \
             AND s.pnnspid = c.relnamespace)",
            "false",
        ),
        // one that a list names is sent from 18 on; before, none is
        "is_sent" => (GENERATED, "true", "a.attgenerated = ''"),
        "included" => (EXCEPT, "NOT r.prexcept", "true"),
        "except" => (
            EXCEPT,
            "ARRAY(SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_publication_rel r
           JOIN pg_catalog.pg_class c ON c.oid = r.prrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
           WHERE r.prpubid = pub.oid AND r.prexcept ORDER BY 1)",
            "ARRAY[]::text[]",
        ),
        "excepted" => (
            EXCEPT,
            "EXISTS (SELECT FROM pg_catalog.pg_publication_rel r WHERE r.prpubid = pub.oid AND r.prrelid = c.oid AND r.prexcept)",
            "false",
        ),
        _ => unreachable!("outboxes.sql has no other name in braces"),
    };
    match version >= since {
        true => sql,
        false => otherwise,
    }
}

/// `sql` with a value in place of each name in braces. What is in a value is left as it is.
fn fill<'a>(sql: &str, value: impl Fn(&str) -> &'a str) -> String {
    let mut parts = sql.split('{');
    let mut filled = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let (name, rest) = part.split_once('}').unwrap_or((part, ""));
        filled += value(name);
        filled += rest;
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_value_is_left_as_it_is() {
        let value = |name: &str| match name {
            "a" => "{b}",
            _ => "c",
        };
        assert_eq!(fill("x {a} y {b}{b}", value), "x {b} y cc");
    }

    #[test]
    fn each_name_in_braces_is_known_for_every_version() {
        let given = [
            "name", "named", "oids", "alike", "used", "needed", "count", "meant",
        ];
        for version in [120_000, VIA_ROOT, FILTERS, GENERATED, EXCEPT] {
            let sql = fill(include_str!("outboxes.sql"), |name| {
                match given.contains(&name) || name == "keeps_partition" {
                    true => "given",
                    false => of_version(version, name),
                }
            });
            assert!(!sql.contains(['{', '}']), "{sql}");
        }
    }
}
