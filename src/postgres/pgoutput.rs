//! Decodes the messages of the `pgoutput` plugin, protocol version 1, as servers 12 to 18 send them.
//!
//! Pure: one message in, a borrowed view of it out. Nothing is allocated, so a count or length that a
//! broken server claims costs nothing. It keeps no state: which columns a relation has is for the caller
//! to remember.
//! Source: <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>.

use super::Lsn;
use super::byte_reader::{ByteReader, ReadError};
use std::fmt;

/// One message. Field names are the manual's; times are microseconds since 2000-01-01 00:00 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction starts. It has been committed: without streaming, only committed ones are sent.
    Begin {
        /// Where its commit record starts; the `commit_lsn` of the [`Message::Commit`] that ends it.
        final_lsn: Lsn,
        /// When it was committed.
        commit_time_us: i64,
        /// Its id.
        xid: u32,
    },
    /// What `pg_logical_emit_message` wrote; sent only when asked for by the option `messages`.
    Message {
        /// It belongs to the transaction around it, and stands in none otherwise.
        transactional: bool,
        /// Where it stands in the log.
        lsn: Lsn,
        /// Says who it is for.
        prefix: &'a str,
        /// Any bytes.
        content: MessageContent<'a>,
    },
    /// The transaction ends.
    Commit {
        /// Where its commit record starts.
        commit_lsn: Lsn,
        /// Where its commit record ends: the position to confirm.
        end_lsn: Lsn,
        /// When it was committed.
        commit_time_us: i64,
    },
    /// The transaction was replicated to this server from another one.
    Origin {
        /// Where it was committed on that other server.
        commit_lsn: Lsn,
        /// The origin's name.
        name: &'a str,
    },
    /// Describes a table: sent before its first change in a session, and again when it was altered.
    Relation(Relation<'a>),
    /// Names a type that is not built in: sent before the relation that uses it.
    Type {
        /// Its object id.
        id: u32,
        /// Its schema; empty for `pg_catalog`.
        namespace: &'a str,
        /// Its name.
        name: &'a str,
    },
    /// A row was inserted.
    Insert {
        /// The table's object id.
        relation_id: u32,
        /// The row.
        tuple: Tuple<'a>,
    },
    /// A row was updated.
    Update {
        /// The table's object id.
        relation_id: u32,
        /// What is known of the row before: depends on the replica identity, and on whether it changed.
        old: Option<OldTuple<'a>>,
        /// The row after.
        new: Tuple<'a>,
    },
    /// A row was deleted.
    Delete {
        /// The table's object id.
        relation_id: u32,
        /// What is known of the row.
        old: OldTuple<'a>,
    },
    /// Tables were truncated by one statement.
    Truncate {
        /// `CASCADE` was given.
        cascade: bool,
        /// `RESTART IDENTITY` was given.
        restart_identity: bool,
        /// The tables.
        relation_ids: RelationIds<'a>,
    },
}

/// A table and its published columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// Its object id, by which the changes name it.
    pub id: u32,
    /// Its schema; empty for `pg_catalog`.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// `pg_class.relreplident`: `d` default, `n` nothing, `f` full, `i` index.
    pub replica_identity: u8,
    columns: Columns<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Columns<'a> {
    len: u16,
    columns: &'a [u8],
}

/// A column of a [`Relation`], in the order of the values in its tuples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column<'a> {
    /// It is part of the replica identity.
    pub key: bool,
    /// Its name.
    pub name: &'a str,
    /// Its type's object id.
    pub type_id: u32,
    /// `pg_attribute.atttypmod`: a length or precision as the type defines it, -1 for none.
    pub type_modifier: i32,
}

/// The values of a row, one for each column of its relation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tuple<'a> {
    len: u16,
    values: &'a [u8],
}

/// A value. The manual's submessages `n`, `u`, `t` and `b`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum TupleValue<'a> {
    /// NULL.
    Null,
    /// A value that is stored out of line and was not changed; the server does not send it.
    UnchangedToast,
    /// The text form, in the session's client encoding. It is not checked to be UTF-8.
    Text(&'a [u8]),
    /// The binary form; sent only when asked for by the option `binary`, from server 14 on.
    Binary(&'a [u8]),
}

/// What is known of a row before its change. The manual's submessages `K` and `O`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldTuple<'a> {
    /// The columns of the replica identity; the others are NULL.
    Key(Tuple<'a>),
    /// The whole row: the table's replica identity is `FULL`.
    Full(Tuple<'a>),
}

/// The tables of a [`Message::Truncate`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RelationIds<'a>(&'a [[u8; 4]]);

/// The content of a [`Message::Message`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MessageContent<'a>(pub &'a [u8]);

/// Why a message cannot be decoded. The bytes of rows are never part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The first byte is not one of protocol version 1.
    UnknownMessage(u8),
    /// The bytes do not have the form of the message that the first one announces.
    Malformed {
        /// The message, by its name in the manual.
        message: &'static str,
        /// What could not be read.
        cause: ReadError,
    },
}

/// Decodes one message, which must fill `data` exactly. Tuples and columns are checked whole, so that
/// iterating over them later cannot fail.
///
/// # Errors
/// When the bytes are not a message of protocol version 1: the server, or what lies between, is at fault.
pub fn decode(data: &[u8]) -> Result<Message<'_>, DecodeError> {
    let mut reader = ByteReader::new(data);
    let malformed = |message| move |cause| DecodeError::Malformed { message, cause };
    let message_type = reader.u8("type").map_err(malformed("message"))?;
    let (name, message) = match message_type {
        b'B' => ("Begin", begin(&mut reader)),
        b'M' => ("Message", logical_message(&mut reader)),
        b'C' => ("Commit", commit(&mut reader)),
        b'O' => ("Origin", origin(&mut reader)),
        b'R' => ("Relation", relation(&mut reader)),
        b'Y' => ("Type", type_(&mut reader)),
        b'I' => ("Insert", insert(&mut reader)),
        b'U' => ("Update", update(&mut reader)),
        b'D' => ("Delete", delete(&mut reader)),
        b'T' => ("Truncate", truncate(&mut reader)),
        _ => return Err(DecodeError::UnknownMessage(message_type)),
    };
    let message = message.map_err(malformed(name))?;
    reader.end().map_err(malformed(name))?;
    Ok(message)
}

fn begin<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    Ok(Message::Begin {
        final_lsn: lsn(reader, "final LSN")?,
        commit_time_us: reader.i64("commit timestamp")?,
        xid: reader.u32("transaction id")?,
    })
}

fn logical_message<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    const TRANSACTIONAL: u8 = 1;
    let transactional = reader.u8("flags")? & TRANSACTIONAL != 0;
    let lsn = lsn(reader, "LSN")?;
    let prefix = reader.string("prefix")?;
    let len = reader.count32("length of the content")?;
    let content = MessageContent(reader.bytes("content", len)?);
    Ok(Message::Message {
        transactional,
        lsn,
        prefix,
        content,
    })
}

fn commit<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    // none is defined; Postgres' own subscriber refuses any, as it would change what a commit means
    match reader.u8("flags")? {
        0 => {}
        byte => {
            return Err(ReadError::UnknownByte {
                what: "flags",
                byte,
            });
        }
    }
    Ok(Message::Commit {
        commit_lsn: lsn(reader, "commit LSN")?,
        end_lsn: lsn(reader, "end LSN")?,
        commit_time_us: reader.i64("commit timestamp")?,
    })
}

fn origin<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    Ok(Message::Origin {
        commit_lsn: lsn(reader, "commit LSN")?,
        name: reader.string("name")?,
    })
}

fn relation<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    let id = reader.u32("relation id")?;
    let namespace = reader.string("namespace")?;
    let name = reader.string("name")?;
    let replica_identity = reader.u8("replica identity")?;
    let len = reader.count16("number of columns")?;
    let columns = reader.span(|reader| (0..len).try_for_each(|_| column(reader).map(drop)))?;
    Ok(Message::Relation(Relation {
        id,
        namespace,
        name,
        replica_identity,
        columns: Columns { len, columns },
    }))
}

fn column<'a>(reader: &mut ByteReader<'a>) -> Result<Column<'a>, ReadError> {
    const KEY: u8 = 1;
    Ok(Column {
        key: reader.u8("column flags")? & KEY != 0,
        name: reader.string("column name")?,
        type_id: reader.u32("column type id")?,
        type_modifier: reader.i32("column type modifier")?,
    })
}

fn type_<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    Ok(Message::Type {
        id: reader.u32("type id")?,
        namespace: reader.string("namespace")?,
        name: reader.string("name")?,
    })
}

fn insert<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    let relation_id = reader.u32("relation id")?;
    match reader.u8(TUPLE_KIND)? {
        b'N' => Ok(Message::Insert {
            relation_id,
            tuple: tuple(reader)?,
        }),
        byte => Err(unknown_tuple_kind(byte)),
    }
}

fn update<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    let relation_id = reader.u32("relation id")?;
    let (old, kind) = match reader.u8(TUPLE_KIND)? {
        b'N' => (None, b'N'),
        kind => (Some(old_tuple(reader, kind)?), reader.u8(TUPLE_KIND)?),
    };
    match kind {
        b'N' => Ok(Message::Update {
            relation_id,
            old,
            new: tuple(reader)?,
        }),
        byte => Err(unknown_tuple_kind(byte)),
    }
}

fn delete<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    let relation_id = reader.u32("relation id")?;
    let kind = reader.u8(TUPLE_KIND)?;
    Ok(Message::Delete {
        relation_id,
        old: old_tuple(reader, kind)?,
    })
}

fn truncate<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    const CASCADE: u8 = 1;
    const RESTART_IDENTITY: u8 = 2;
    let count = reader.count32("number of relations")?;
    let options = reader.u8("options")?;
    let ids = reader.bytes("relation ids", count.saturating_mul(size_of::<u32>()))?;
    Ok(Message::Truncate {
        cascade: options & CASCADE != 0,
        restart_identity: options & RESTART_IDENTITY != 0,
        relation_ids: RelationIds(ids.as_chunks().0),
    })
}

const TUPLE_KIND: &str = "tuple kind";

fn unknown_tuple_kind(byte: u8) -> ReadError {
    ReadError::UnknownByte {
        what: TUPLE_KIND,
        byte,
    }
}

fn old_tuple<'a>(reader: &mut ByteReader<'a>, kind: u8) -> Result<OldTuple<'a>, ReadError> {
    match kind {
        b'K' => tuple(reader).map(OldTuple::Key),
        b'O' => tuple(reader).map(OldTuple::Full),
        byte => Err(unknown_tuple_kind(byte)),
    }
}

fn tuple<'a>(reader: &mut ByteReader<'a>) -> Result<Tuple<'a>, ReadError> {
    let len = reader.count16("number of values")?;
    let values = reader.span(|reader| (0..len).try_for_each(|_| tuple_value(reader).map(drop)))?;
    Ok(Tuple { len, values })
}

fn tuple_value<'a>(reader: &mut ByteReader<'a>) -> Result<TupleValue<'a>, ReadError> {
    fn sized<'a>(reader: &mut ByteReader<'a>) -> Result<&'a [u8], ReadError> {
        let len = reader.count32("length of a value")?;
        reader.bytes("value", len)
    }
    match reader.u8("kind of a value")? {
        b'n' => Ok(TupleValue::Null),
        b'u' => Ok(TupleValue::UnchangedToast),
        b't' => sized(reader).map(TupleValue::Text),
        b'b' => sized(reader).map(TupleValue::Binary),
        byte => Err(ReadError::UnknownByte {
            what: "kind of a value",
            byte,
        }),
    }
}

fn lsn(reader: &mut ByteReader<'_>, what: &'static str) -> Result<Lsn, ReadError> {
    reader.u64(what).map(Lsn)
}

impl<'a> Relation<'a> {
    /// How many columns are published.
    pub fn column_count(&self) -> usize {
        self.columns.len.into()
    }

    /// The published columns, in order.
    pub fn columns(&self) -> impl Iterator<Item = Column<'a>> + Clone + use<'a> {
        self.columns.iter()
    }
}

impl<'a> Columns<'a> {
    fn iter(&self) -> impl Iterator<Item = Column<'a>> + Clone + use<'a> {
        let mut reader = ByteReader::new(self.columns);
        // `decode` has read each of them before, so none fails
        (0..self.len).map_while(move |_| column(&mut reader).ok())
    }
}

impl<'a> Tuple<'a> {
    /// How many values there are.
    pub fn len(&self) -> usize {
        self.len.into()
    }

    /// There is no value: the table has no column.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values, in the order of the relation's columns.
    pub fn iter(&self) -> impl Iterator<Item = TupleValue<'a>> + Clone + use<'a> {
        let mut reader = ByteReader::new(self.values);
        // `decode` has read each of them before, so none fails
        (0..self.len).map_while(move |_| tuple_value(&mut reader).ok())
    }
}

impl<'a> RelationIds<'a> {
    /// The tables' object ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + Clone + use<'a> {
        self.0.iter().map(|id| u32::from_be_bytes(*id))
    }
}

// Debug output may reach a log: it says how long the writer's bytes are, never what they are.

impl fmt::Debug for Columns<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl fmt::Debug for Tuple<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl fmt::Debug for RelationIds<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl fmt::Debug for TupleValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TupleValue::Null => f.write_str("Null"),
            TupleValue::UnchangedToast => f.write_str("UnchangedToast"),
            TupleValue::Text(value) => write!(f, "Text({} bytes)", value.len()),
            TupleValue::Binary(value) => write!(f, "Binary({} bytes)", value.len()),
        }
    }
}

impl fmt::Debug for MessageContent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("decode pgoutput ")?;
        match self {
            DecodeError::UnknownMessage(byte) => {
                write!(
                    f,
                    "message: unknown type 0x{byte:02X} ('{}')",
                    byte.escape_ascii()
                )?;
                match later_protocol(*byte) {
                    Some(feature) => write!(
                        f,
                        ", of {feature}, which the relay never asks for: see what stands between it and Postgres"
                    ),
                    None => Ok(()),
                }
            }
            DecodeError::Malformed { message, cause } => write!(f, "{message}: {cause}"),
        }
    }
}

/// What a message type belongs to that came after protocol version 1.
fn later_protocol(message_type: u8) -> Option<&'static str> {
    match message_type {
        b'S' | b'E' | b'c' | b'A' => Some("streaming (protocol version 2)"),
        b'b' | b'P' | b'K' | b'r' | b'p' => Some("two-phase commit (protocol version 3)"),
        _ => None,
    }
}

impl std::error::Error for DecodeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DecodeError::UnknownMessage(_) => None,
            DecodeError::Malformed { cause, .. } => Some(cause),
        }
    }
}
