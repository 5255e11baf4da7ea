//! What is wrong with a table, a row or a message that cannot become an event, and what a person reads of it.

use super::header;
use super::mapping::TableName;
use super::plan::MAX_COLUMNS;
use crate::postgres::Lsn;
use std::fmt;

/// What an event is written in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventSource {
    /// A row of this table.
    Row(TableName),
    /// A message with this prefix.
    Message(String),
}

impl fmt::Display for EventSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EventSource::Row(table) => write!(f, "row of {table}"),
            EventSource::Message(prefix) => write!(f, "message {prefix:?}"),
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
        columns: Vec<String>,
        /// The columns it needs.
        needed: Vec<String>,
        /// Where the relation message stood.
        at: Lsn,
    },
    /// The table was relayed under another name, and is not named by this one.
    Renamed {
        /// What it was called.
        was: Box<TableName>,
        /// What it is called from here on.
        now: TableName,
        /// Where the relation message stood.
        at: Lsn,
    },
    /// More columns of one table are named than [`MAX_COLUMNS`].
    TooManyColumns {
        /// The table.
        table: TableName,
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
    /// A part of the event cannot be published.
    Value {
        /// What it was written in.
        source: EventSource,
        /// Its id, if it has one.
        id: Option<String>,
        /// The part: a column, a member, a header, the subject.
        part: String,
        /// What is wrong with it.
        problem: ValueProblem,
        /// The commit of the transaction.
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
    /// It is part of a subject, an id or a header, and not UTF-8.
    NotUtf8,
    /// It is neither of the two text forms of a `bytea`.
    NotBytea,
    /// It is to hold headers, and is no JSON object.
    NoObject,
    /// It cannot stand in a subject as it is, and is not to be encoded.
    BadSubject,
    /// It cannot stand in a header as it is, and is not to be encoded.
    BadHeader,
    /// The headers are more than a message may have.
    ManyHeaders,
    /// It is a message, and no JSON object.
    Malformed,
    /// With it the event is larger than the relay takes; see [`super::large`].
    TooLarge,
    /// It is in the database's encoding, and has a byte that stands for no character.
    NoEquivalent,
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapError::UnknownRelation { relation_id } => write!(
                f,
                "map row of relation {relation_id}: the server did not describe that relation before; restart the relay"
            ),
            MapError::MissingColumns {
                table,
                columns,
                needed,
                at,
            } => write!(
                f,
                "map table {table} at {at}: it lacks {}; an outbox has the columns {}, all in the publication's column \
                 list if it has one; if they are called otherwise, say so with -id-column, -subject and the like; if this is \
                 no outbox, name those that are with -table",
                columns.join(", "),
                needed.join(", ")
            ),
            MapError::Renamed { was, now, at } => write!(
                f,
                "map table {now} at {at}: it was {was} before, which -table names, and is renamed; name both in -table (rows \
                 written before the change come under the old name)"
            ),
            MapError::TooManyColumns { table } => write!(
                f,
                "map table {table}: more than {MAX_COLUMNS} of its columns take part in an event; name fewer with -header"
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
                source,
                id,
                part,
                problem,
                at,
            } => {
                write!(f, "map {source} at {at}")?;
                if let Some(id) = id {
                    write!(f, ", id {id}")?;
                }
                write!(f, ": {part} {problem}; {}", problem.advice())
            }
        }
    }
}

impl MapError {
    /// For an event that was written so: where the slot has left its transaction out. (Postgres skips one whose commit
    /// record begins before the slot's position.)
    pub fn behind(&self) -> Option<Lsn> {
        match self {
            MapError::Value { problem, at, .. } if problem.is_the_writers() => {
                Some(Lsn(at.0.saturating_add(1)))
            }
            // columns that were renamed within a transaction, which no flags fit
            MapError::MissingColumns { at, .. } => Some(Lsn(at.0.saturating_add(1))),
            _ => None,
        }
    }
}

impl ValueProblem {
    /// The event was written so, and will be read so at every attempt.
    pub(super) fn is_the_writers(self) -> bool {
        match self {
            ValueProblem::Null
            | ValueProblem::Empty
            | ValueProblem::NotUtf8
            | ValueProblem::NoObject
            | ValueProblem::BadSubject
            | ValueProblem::BadHeader
            | ValueProblem::ManyHeaders
            | ValueProblem::Malformed
            | ValueProblem::TooLarge
            | ValueProblem::UnchangedToast
            | ValueProblem::NoEquivalent => true,
            ValueProblem::Binary | ValueProblem::NotBytea => false,
        }
    }

    fn advice(self) -> &'static str {
        match self {
            ValueProblem::Null => "declare it NOT NULL",
            ValueProblem::Empty => "add a CHECK",
            ValueProblem::UnchangedToast => {
                "an UPDATE that a row filter lets in comes as an insert without it: ALTER PUBLICATION ... SET (publish = 'insert')"
            }
            ValueProblem::Binary | ValueProblem::NotBytea => {
                "check what stands between the relay and the server"
            }
            ValueProblem::NotUtf8 => {
                "use a database encoding that Postgres converts to UTF-8, which SQL_ASCII is not"
            }
            ValueProblem::NoObject => "add a CHECK (jsonb_typeof(headers) = 'object')",
            ValueProblem::BadSubject => "-on-bad-subject encode would let it through",
            ValueProblem::BadHeader => "-on-bad-header encode would let it through",
            ValueProblem::ManyHeaders => "put what is large into the payload",
            ValueProblem::Malformed => "emit it with the function outbox_publish",
            ValueProblem::TooLarge => "put what is large elsewhere, and its address into the event",
            ValueProblem::NoEquivalent => {
                "move to a database created with ENCODING 'UTF8', or add a CHECK for characters that UTF-8 has"
            }
        }
    }
}

impl fmt::Display for ValueProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueProblem::Null => f.write_str("is NULL"),
            ValueProblem::Empty => f.write_str("is empty, which JetStream takes for no id"),
            ValueProblem::UnchangedToast => {
                f.write_str("was not sent (unchanged TOAST)")
            }
            ValueProblem::Binary => {
                f.write_str("came in binary form, which the relay never asks for")
            }
            ValueProblem::NotUtf8 => f.write_str("is not UTF-8"),
            ValueProblem::NotBytea => f.write_str("is no bytea in hex or escape form"),
            ValueProblem::NoObject => f.write_str("is no JSON object"),
            ValueProblem::BadSubject => f.write_str("cannot stand in a subject as it is"),
            ValueProblem::BadHeader => f.write_str("cannot stand in a header as it is"),
            ValueProblem::ManyHeaders => {
                write!(
                    f,
                    "are more than the {} bytes of headers that an event may have",
                    header::MAX_LEN
                )
            }
            ValueProblem::Malformed => f.write_str("is no JSON object in UTF-8"),
            ValueProblem::TooLarge => f.write_str(
                "makes the event larger than the relay takes: 4 times the max_payload of the NATS server",
            ),
            ValueProblem::NoEquivalent => {
                f.write_str("has a byte without an equivalent in UTF-8, by the database's encoding")
            }
        }
    }
}

impl std::error::Error for MapError {}
