//! From the rows of an outbox table to the events of a [`Batch`].
//!
//! Takes what pgoutput tells of tables and inserted rows (`postgres::pgoutput` decodes it) and decides three
//! things: which tables are outboxes, which of their columns are the four that matter, and what each of
//! these becomes on the wire.
//!
//! | column | becomes | when NULL |
//! | --- | --- | --- |
//! | `id`, of any type | the message id, its text by the rule of [`super::message_id`] | an error, as when empty |
//! | `aggregatetype`, `aggregateid` | the subject, by the rule of [`super::subject`] | an error |
//! | `payload`, `json` or `jsonb` | the body, compacted by [`super::json`] | `null` |
//! | `payload`, `bytea` | the body, the raw bytes | an empty body |
//! | `payload`, any other type | the body, its text as it is | an empty body |
//!
//! A table with `aggregatetype` or `aggregateid` is meant as an outbox: it has all four columns or is an
//! error, so that a renamed column cannot make events vanish. A domain over `json`, `jsonb` or `bytea` counts
//! as "any other type": pgoutput tells the domain's own oid and not what it is over.
//!
//! Whatever fails here is a row or a table that the relay must not skip; none of it passes by trying again.

use super::batch::Batch;
use super::position::Position;
use super::{json, message_id, subject};
use crate::postgres::Lsn;
use std::collections::BTreeMap;
use std::fmt;

/// The columns of an outbox table, in the order of `OutboxTable::columns`.
const COLUMNS: [&str; 4] = ["id", "aggregatetype", "aggregateid", "payload"];

// src/include/catalog/pg_type.dat
const BYTEA_OID: u32 = 17;
const JSON_OID: u32 = 114;
const JSONB_OID: u32 = 3802;

/// A table as `pg_class` and `pg_namespace` spell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    /// `None`: in any schema.
    pub schema: Option<String>,
    /// The table.
    pub name: String,
}

/// A column of a relation message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type's object id.
    pub type_id: u32,
}

/// A value of an inserted row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// NULL.
    Null,
    /// Stored out of line and not sent.
    UnchangedToast,
    /// The text form.
    Text(&'a [u8]),
    /// The binary form, which the relay does not ask for.
    Binary(&'a [u8]),
}

impl fmt::Debug for Value<'_> {
    /// Tells the kind and the length; the content may be a payload.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("Null"),
            Value::UnchangedToast => f.write_str("UnchangedToast"),
            Value::Text(bytes) => write!(f, "Text({} bytes)", bytes.len()),
            Value::Binary(bytes) => write!(f, "Binary({} bytes)", bytes.len()),
        }
    }
}

/// What a table or a row cannot be mapped for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapError {
    /// A row of a table that no relation message described.
    UnknownRelation {
        /// The table's object id.
        relation_id: u32,
    },
    /// The table is an outbox, or named as one, and lacks columns.
    MissingColumns {
        /// The table.
        table: TableName,
        /// The columns it lacks.
        columns: Vec<&'static str>,
        /// Where the relation message stood.
        at: Lsn,
    },
    /// The row has not as many values as its table has columns.
    ValueCount {
        /// The table.
        table: TableName,
        /// The columns the relation message described.
        columns: usize,
        /// The values of the row.
        values: usize,
        /// The commit of the row's transaction.
        at: Lsn,
    },
    /// A value of the row cannot become part of an event.
    Value {
        /// The table.
        table: TableName,
        /// The column.
        column: &'static str,
        /// What is wrong with it.
        problem: ValueProblem,
        /// The commit of the row's transaction.
        at: Lsn,
    },
}

/// Why a value cannot become part of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueProblem {
    /// It is NULL where an event needs a value.
    Null,
    /// It is an empty id.
    Empty,
    /// It was not sent.
    UnchangedToast,
    /// It came in binary form.
    Binary,
    /// It is an id or an aggregate column and not UTF-8.
    NotUtf8,
    /// It is neither of the two text forms of a `bytea`.
    NotBytea,
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
        if let Some(schema) = &self.schema {
            write!(f, "{}.", quoted(schema))?;
        }
        f.write_str(&quoted(&self.name))
    }
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapError::UnknownRelation { relation_id } => write!(
                f,
                "map row of relation {relation_id}: the server did not describe that relation before; restart the relay"
            ),
            MapError::MissingColumns { table, columns, at } => write!(
                f,
                "map table {table} at {at}: it lacks {}; an outbox has the columns id, aggregatetype, aggregateid and payload, \
                 all in the publication's column list if it has one; if this is no outbox, name those that are with --table",
                columns.join(", ")
            ),
            MapError::ValueCount {
                table,
                columns,
                values,
                at,
            } => write!(
                f,
                "map row of {table} at {at}: it has {values} values where the server described {columns} columns; restart the relay"
            ),
            MapError::Value {
                table,
                column,
                problem,
                at,
            } => {
                write!(f, "map row of {table} at {at}: column {column} {problem}")?;
                if problem.is_the_writers() {
                    // Postgres skips a transaction whose commit record begins before the slot's position
                    let behind = Lsn(at.0.saturating_add(1));
                    write!(
                        f,
                        "; publish this transaction's events otherwise, then move the slot past it: \
                         SELECT pg_replication_slot_advance('<slot>', '{behind}'); and then pass --resume-anyway once"
                    )?;
                }
                Ok(())
            }
        }
    }
}

impl ValueProblem {
    /// The row was written so, and will be read so at every attempt.
    fn is_the_writers(&self) -> bool {
        match self {
            ValueProblem::Null | ValueProblem::Empty | ValueProblem::NotUtf8 => true,
            ValueProblem::UnchangedToast | ValueProblem::Binary | ValueProblem::NotBytea => false,
        }
    }
}

impl fmt::Display for ValueProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ValueProblem::Null => "is NULL; declare it NOT NULL",
            ValueProblem::Empty => "is empty, which JetStream takes for no id; add a CHECK",
            ValueProblem::UnchangedToast => {
                "was not sent (unchanged TOAST), which an insert never leaves out; restart the relay"
            }
            ValueProblem::Binary => {
                "came in binary form, which the relay never asks for; check what stands between it and the server"
            }
            ValueProblem::NotUtf8 => {
                "is not UTF-8; use a database encoding that Postgres converts to UTF-8, which SQL_ASCII is not"
            }
            ValueProblem::NotBytea => {
                "is no bytea in hex or escape form; check what stands between the relay and the server"
            }
        })
    }
}

impl std::error::Error for MapError {}

/// Knows the tables of the publication and writes their rows into batches.
#[derive(Debug)]
pub struct Mapper {
    prefix: String,
    tables: Vec<TableName>,
    relations: BTreeMap<u32, Relation>,
}

#[derive(Debug)]
enum Relation {
    Outbox(OutboxTable),
    Other,
}

#[derive(Debug)]
struct OutboxTable {
    name: TableName,
    /// `schema.table`, as events bear it.
    label: String,
    /// Which value of a row is the one of each of [`COLUMNS`].
    columns: [usize; 4],
    column_count: usize,
    body: Body,
}

/// How a payload becomes a body.
#[derive(Clone, Copy, Debug)]
enum Body {
    CompactJson,
    RawBytes,
    Text,
}

impl Mapper {
    /// A mapper that knows no relation yet. `prefix` has passed [`subject::validate_prefix`]; `tables` are
    /// the only ones to relay, none meaning all that are outboxes.
    pub fn new(prefix: &str, tables: &[TableName]) -> Mapper {
        Mapper {
            prefix: prefix.to_string(),
            tables: tables.to_vec(),
            relations: BTreeMap::new(),
        }
    }

    /// Takes a relation message, the first or another one of its table: `columns` in the order of the values
    /// in its rows, `at` its place in the log.
    ///
    /// A table that is no outbox is ignored; unless `tables` leaves it out, one warning says so.
    ///
    /// # Errors
    /// [`MapError::MissingColumns`] when the table is an outbox by name, by one of its columns, or was one
    /// before, and lacks columns. The mapper still knows the table as it was: rows must not follow.
    pub fn relation<'a>(
        &mut self,
        id: u32,
        namespace: &str,
        name: &str,
        columns: impl Iterator<Item = ColumnInfo<'a>>,
        at: Lsn,
    ) -> Result<(), MapError> {
        let mut found = [None; 4];
        let mut payload_type = 0;
        let mut column_count = 0;
        for (index, column) in columns.enumerate() {
            column_count += 1;
            for (slot, wanted) in found.iter_mut().zip(COLUMNS) {
                if column.name == wanted {
                    *slot = Some(index);
                }
            }
            if column.name == "payload" {
                payload_type = column.type_id;
            }
        }

        let named = self.tables.iter().any(|table| {
            table.name == name && table.schema.as_deref().is_none_or(|s| s == namespace)
        });
        let label = format!("{namespace}.{name}");
        if !named && !self.tables.is_empty() {
            log::debug!(table = label.as_str(); "not named by -table, ignored");
            self.relations.insert(id, Relation::Other);
            return Ok(());
        }
        let table = TableName {
            schema: Some(namespace.to_string()),
            name: name.to_string(),
        };
        if let [
            Some(id_at),
            Some(aggregatetype_at),
            Some(aggregateid_at),
            Some(payload_at),
        ] = found
        {
            let outbox = OutboxTable {
                name: table,
                label,
                columns: [id_at, aggregatetype_at, aggregateid_at, payload_at],
                column_count,
                body: match payload_type {
                    JSON_OID | JSONB_OID => Body::CompactJson,
                    BYTEA_OID => Body::RawBytes,
                    _ => Body::Text,
                },
            };
            self.relations.insert(id, Relation::Outbox(outbox));
            return Ok(());
        }

        let [_, aggregatetype, aggregateid, _] = found;
        let before = self.relations.get(&id);
        if named
            || aggregatetype.is_some()
            || aggregateid.is_some()
            || matches!(before, Some(Relation::Outbox(_)))
        {
            let missing = found.iter().zip(COLUMNS).filter(|(at, _)| at.is_none());
            return Err(MapError::MissingColumns {
                table,
                columns: missing.map(|(_, column)| column).collect(),
                at,
            });
        }
        if before.is_none() {
            log::warn!(table = label.as_str(); "in the publication without the columns of an outbox, ignored");
        }
        self.relations.insert(id, Relation::Other);
        Ok(())
    }

    /// Whether the rows of a relation become events.
    ///
    /// # Errors
    /// [`MapError::UnknownRelation`].
    pub fn is_outbox(&self, relation_id: u32) -> Result<bool, MapError> {
        Ok(self.outbox(relation_id)?.is_some())
    }

    fn outbox(&self, relation_id: u32) -> Result<Option<&OutboxTable>, MapError> {
        match self.relations.get(&relation_id) {
            Some(Relation::Outbox(outbox)) => Ok(Some(outbox)),
            Some(Relation::Other) => Ok(None),
            None => Err(MapError::UnknownRelation { relation_id }),
        }
    }

    /// Adds an inserted row to `batch`, as the event at `position`; `false` when its table is no outbox.
    ///
    /// # Errors
    /// Every [`MapError`] but [`MapError::MissingColumns`]; `batch` is then as it was.
    pub fn insert<'a>(
        &self,
        relation_id: u32,
        values: impl Iterator<Item = Value<'a>>,
        position: Position,
        batch: &mut Batch,
    ) -> Result<bool, MapError> {
        let Some(outbox) = self.outbox(relation_id)? else {
            return Ok(false);
        };
        let at = position.commit_lsn;
        let mut found = [Value::Null; 4];
        let mut count = 0;
        for value in values {
            for (slot, &index) in found.iter_mut().zip(&outbox.columns) {
                if index == count {
                    *slot = value;
                }
            }
            count += 1;
        }
        if count != outbox.column_count {
            return Err(MapError::ValueCount {
                table: outbox.name.clone(),
                columns: outbox.column_count,
                values: count,
                at,
            });
        }

        let failed = |column, problem| MapError::Value {
            table: outbox.name.clone(),
            column,
            problem,
            at,
        };
        let [id, aggregatetype, aggregateid, payload] = found;
        let required = |column, value| text(value).map_err(|problem| failed(column, problem));
        let id = required("id", id)?;
        let aggregatetype = required("aggregatetype", aggregatetype)?;
        let aggregateid = required("aggregateid", aggregateid)?;
        if id.is_empty() {
            return Err(failed("id", ValueProblem::Empty));
        }
        batch.push_event(
            &outbox.label,
            position,
            |out| {
                subject::write_subject(&self.prefix, aggregatetype, aggregateid, out);
                Ok(())
            },
            |out| {
                message_id::write_message_id(id, out);
                Ok(())
            },
            |out| {
                write_body(payload, outbox.body, out).map_err(|problem| failed("payload", problem))
            },
        )?;
        Ok(true)
    }
}

fn text(value: Value<'_>) -> Result<&str, ValueProblem> {
    match value {
        Value::Text(bytes) => std::str::from_utf8(bytes).map_err(|_| ValueProblem::NotUtf8),
        Value::Null => Err(ValueProblem::Null),
        Value::UnchangedToast => Err(ValueProblem::UnchangedToast),
        Value::Binary(_) => Err(ValueProblem::Binary),
    }
}

fn write_body(payload: Value<'_>, body: Body, out: &mut Vec<u8>) -> Result<(), ValueProblem> {
    match (payload, body) {
        (Value::Text(bytes), Body::CompactJson) => json::compact_into(bytes, out),
        (Value::Text(bytes), Body::RawBytes) => {
            decode_bytea(bytes, out).ok_or(ValueProblem::NotBytea)?;
        }
        (Value::Text(bytes), Body::Text) => out.extend_from_slice(bytes),
        (Value::Null, Body::CompactJson) => out.extend_from_slice(b"null"),
        (Value::Null, Body::RawBytes | Body::Text) => {}
        (Value::UnchangedToast, _) => return Err(ValueProblem::UnchangedToast),
        (Value::Binary(_), _) => return Err(ValueProblem::Binary),
    }
    Ok(())
}

/// Appends the bytes that a `bytea` in text form stands for, or `None` when it is not one.
///
/// `bytea_output` of the role or the database decides between `hex` and the older `escape`:
/// <https://www.postgresql.org/docs/current/datatype-binary.html>.
fn decode_bytea(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    if let Some(hex) = text.strip_prefix(br"\x") {
        let (pairs, odd) = hex.as_chunks::<2>();
        if !odd.is_empty() {
            return None;
        }
        out.reserve(pairs.len());
        for &[high, low] in pairs {
            out.push(digit(high, 16)? << 4 | digit(low, 16)?);
        }
        return Some(());
    }
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match *rest {
            [b'\\', ref after @ ..] => {
                out.push(b'\\');
                rest = after;
            }
            [high @ b'0'..=b'3', middle, low, ref after @ ..] => {
                out.push(digit(high, 8)? << 6 | digit(middle, 8)? << 3 | digit(low, 8)?);
                rest = after;
            }
            _ => return None,
        }
    }
    Some(())
}

fn digit(byte: u8, radix: u32) -> Option<u8> {
    u8::try_from(char::from(byte).to_digit(radix)?).ok()
}

#[cfg(test)]
mod tests {
    use super::super::batch::Change;
    use super::*;

    const TABLE: u32 = 16_385;
    const UUID_OID: u32 = 2950;
    const TEXT_OID: u32 = 25;
    const AT: Position = Position {
        commit_lsn: Lsn(0x16B3748),
        ordinal: 1,
    };

    /// The seed's table, its payload of type `payload_type`.
    fn seed(payload_type: u32) -> [(&'static str, u32); 4] {
        [
            ("id", UUID_OID),
            ("aggregatetype", TEXT_OID),
            ("aggregateid", TEXT_OID),
            ("payload", payload_type),
        ]
    }

    fn describe(
        mapper: &mut Mapper,
        name: &str,
        columns: &[(&str, u32)],
    ) -> Result<bool, MapError> {
        let columns = columns
            .iter()
            .map(|&(name, type_id)| ColumnInfo { name, type_id });
        mapper.relation(TABLE, "public", name, columns, AT.commit_lsn)?;
        mapper.is_outbox(TABLE)
    }

    /// Subject, id and body of the event that a row of the table `outbox` with `columns` becomes.
    fn map(
        columns: &[(&str, u32)],
        row: &[Value<'_>],
    ) -> Result<(String, String, Vec<u8>), MapError> {
        let mut mapper = Mapper::new("events", &[]);
        describe(&mut mapper, "outbox", columns)?;
        let mut batch = Batch::default();
        let pushed = mapper.insert(TABLE, row.iter().copied(), AT, &mut batch);
        if let Err(error) = pushed {
            assert_eq!((batch.len_bytes(), batch.is_empty()), (0, true));
            return Err(error);
        }
        assert_eq!(pushed, Ok(true));
        let [Change::Event(spans)] = batch.changes() else {
            panic!("not one event")
        };
        let event = batch.event(spans);
        assert_eq!((event.position, event.table), (AT, "public.outbox"));
        Ok((
            event.subject.to_string(),
            event.id.to_string(),
            event.body.to_vec(),
        ))
    }

    fn t(text: &str) -> Value<'_> {
        Value::Text(text.as_bytes())
    }

    fn name(schema: Option<&str>, name: &str) -> TableName {
        TableName {
            schema: schema.map(str::to_string),
            name: name.to_string(),
        }
    }

    #[test]
    fn columns_are_found_by_name() {
        let expected = Ok((
            "events.account.a1".to_string(),
            "7".to_string(),
            b"{\"a\":1}".to_vec(),
        ));
        let [id, aggregatetype, aggregateid, payload] =
            [t("7"), t("account"), t("a1"), t("{\"a\": 1}")];
        assert_eq!(
            map(&seed(JSONB_OID), &[id, aggregatetype, aggregateid, payload]),
            expected
        );
        let other_order = [
            ("created", 1184),
            ("payload", JSON_OID),
            ("aggregateid", TEXT_OID),
            ("Id", 23),
            ("id", 20),
            ("aggregatetype", TEXT_OID),
            ("big", TEXT_OID),
        ];
        let row = [
            Value::Null,
            payload,
            aggregateid,
            t("1"),
            id,
            aggregatetype,
            Value::UnchangedToast,
        ];
        assert_eq!(map(&other_order, &row), expected);
    }

    #[test]
    fn bodies() {
        for (payload_type, payload, expected) in [
            (
                JSONB_OID,
                t("{\"n\": 12345678901234567890.10}"),
                &b"{\"n\":12345678901234567890.10}"[..],
            ),
            (
                JSON_OID,
                t(" {\"b\":1, \"a\":2, \"b\":3} "),
                b"{\"b\":1,\"a\":2,\"b\":3}",
            ),
            (JSON_OID, Value::Null, b"null"),
            (JSONB_OID, Value::Null, b"null"),
            (JSONB_OID, t("null"), b"null"),
            (TEXT_OID, t(" { \"a\": 1 } "), b" { \"a\": 1 } "),
            (TEXT_OID, Value::Text(b"\xff"), b"\xff"),
            (TEXT_OID, t(""), b""),
            (TEXT_OID, Value::Null, b""),
            (BYTEA_OID, Value::Null, b""),
            (BYTEA_OID, t(r"\x"), b""),
            (BYTEA_OID, t(r"\x00ff5C0a"), b"\0\xff\\\n"),
            (BYTEA_OID, t(""), b""),
            (BYTEA_OID, t(r"a\\x\000\377 b"), b"a\\x\0\xff b"),
            (16_999, t(r"\x00"), br"\x00"),
        ] {
            let row = [t("1"), t("a"), t("b"), payload];
            assert_eq!(
                map(&seed(payload_type), &row).unwrap().2,
                expected,
                "{payload_type} {expected:?}"
            );
        }
    }

    #[test]
    fn what_a_header_or_a_subject_cannot_carry_is_encoded() {
        let row = [t(" 1\r\n"), t("a b"), t(""), Value::Null];
        assert_eq!(
            map(&seed(TEXT_OID), &row),
            Ok(("events.a%20b.%".into(), "%201%0D%0A".into(), vec![]))
        );
    }

    #[test]
    fn a_value_that_cannot_be_published_is_named() {
        use ValueProblem::*;
        let good = [t("1"), t("a"), t("b"), t("c")];
        let invalid = Value::Text(b"\xff");
        let toast = Value::UnchangedToast;
        let binary = Value::Binary(b"0123456789abcdef");
        for (index, value, payload_type, problem) in [
            (0, Value::Null, TEXT_OID, Null),
            (1, Value::Null, TEXT_OID, Null),
            (2, Value::Null, TEXT_OID, Null),
            (0, t(""), TEXT_OID, Empty),
            (0, toast, TEXT_OID, UnchangedToast),
            (2, toast, TEXT_OID, UnchangedToast),
            (3, toast, JSONB_OID, UnchangedToast),
            (0, binary, TEXT_OID, Binary),
            (3, binary, BYTEA_OID, Binary),
            (0, invalid, TEXT_OID, NotUtf8),
            (1, invalid, TEXT_OID, NotUtf8),
            (2, invalid, TEXT_OID, NotUtf8),
            (3, t(r"\x0"), BYTEA_OID, NotBytea),
            (3, t(r"\x0g"), BYTEA_OID, NotBytea),
            (3, t(r"\"), BYTEA_OID, NotBytea),
            (3, t(r"\400"), BYTEA_OID, NotBytea),
            (3, t(r"\08"), BYTEA_OID, NotBytea),
            (3, t(r"\080"), BYTEA_OID, NotBytea),
        ] {
            let mut row = good;
            row[index] = value;
            assert_eq!(
                map(&seed(payload_type), &row),
                Err(MapError::Value {
                    table: name(Some("public"), "outbox"),
                    column: COLUMNS[index],
                    problem,
                    at: AT.commit_lsn
                }),
                "{index} {problem:?}"
            );
        }
    }

    #[test]
    fn a_row_has_a_value_for_each_column() {
        let row = [t("1"), t("a"), t("b"), t("c"), t("d")];
        for len in [0, 3, 5] {
            assert_eq!(
                map(&seed(TEXT_OID), &row[..len]),
                Err(MapError::ValueCount {
                    table: name(Some("public"), "outbox"),
                    columns: 4,
                    values: len,
                    at: AT.commit_lsn
                })
            );
        }
    }

    #[test]
    fn which_tables_are_outboxes() {
        let all = seed(JSONB_OID);
        let missing = |columns: &[&'static str]| {
            Err(MapError::MissingColumns {
                table: name(Some("public"), "outbox"),
                columns: columns.to_vec(),
                at: AT.commit_lsn,
            })
        };
        let only = |schema| vec![name(None, "x"), name(schema, "outbox")];
        for (tables, columns, expected) in [
            (vec![], &all[..], Ok(true)),
            (vec![], &[("id", 23), ("payload", 25)], Ok(false)),
            (vec![], &[], Ok(false)),
            (vec![], &all[..3], missing(&["payload"])),
            (
                vec![],
                &all[1..2],
                missing(&["id", "aggregateid", "payload"]),
            ),
            (vec![], &all[2..], missing(&["id", "aggregatetype"])),
            (only(None), &all, Ok(true)),
            (only(Some("public")), &all, Ok(true)),
            (only(Some("Public")), &all, Ok(false)),
            (vec![name(None, "Outbox")], &all, Ok(false)),
            (vec![name(None, "other")], &all[..3], Ok(false)),
            (only(None), &[("id", 23)], missing(&COLUMNS[1..])),
        ] {
            let mut mapper = Mapper::new("events", &tables);
            assert_eq!(
                describe(&mut mapper, "outbox", columns),
                expected,
                "{tables:?} {columns:?}"
            );
            if expected == Ok(false) {
                let mut batch = Batch::default();
                let row = [Value::Null].into_iter();
                assert_eq!(mapper.insert(TABLE, row, AT, &mut batch), Ok(false));
                assert!(batch.is_empty());
            }
        }
    }

    #[test]
    fn a_relation_described_again_is_looked_up_again() {
        let mut mapper = Mapper::new("events", &[]);
        let mut batch = Batch::default();
        describe(&mut mapper, "outbox", &seed(JSONB_OID)).unwrap();
        let mut columns = seed(TEXT_OID);
        columns.reverse();
        describe(&mut mapper, "outbox", &columns).unwrap();
        let row = [t("{ }"), t("b"), t("a"), t("1")];
        assert_eq!(
            mapper.insert(TABLE, row.into_iter(), AT, &mut batch),
            Ok(true)
        );
        let [Change::Event(spans)] = batch.changes() else {
            panic!("not one event")
        };
        assert_eq!(batch.event(spans).subject, "events.a.b");
        assert_eq!(batch.event(spans).body, b"{ }");

        // an outbox that is none any more would lose events
        let renamed = describe(&mut mapper, "outbox", &[("id", 23)]);
        assert!(matches!(renamed, Err(MapError::MissingColumns { .. })));
    }

    #[test]
    fn a_relation_that_was_not_described_is_an_error() {
        let mapper = Mapper::new("events", &[]);
        let unknown = MapError::UnknownRelation { relation_id: 9 };
        assert_eq!(mapper.is_outbox(9), Err(unknown.clone()));
        let row = std::iter::empty();
        assert_eq!(
            mapper.insert(9, row, AT, &mut Batch::default()),
            Err(unknown)
        );
    }

    #[test]
    fn errors_name_table_column_and_place() {
        let row = [t("1"), t("a"), Value::Null, t("secret")];
        let error = map(&seed(TEXT_OID), &row).unwrap_err();
        assert!(
            error.to_string().starts_with(
                "map row of \"public\".\"outbox\" at 0/16B3748: column aggregateid is NULL; "
            ),
            "{error}"
        );
        let error = map(&seed(TEXT_OID)[..2], &row).unwrap_err();
        assert!(
            error.to_string().starts_with(
                "map table \"public\".\"outbox\" at 0/16B3748: it lacks aggregateid, payload; "
            ),
            "{error}"
        );
        assert_eq!(
            format!("{:?}", [t("secret"), Value::Null]),
            "[Text(6 bytes), Null]"
        );
    }
}
