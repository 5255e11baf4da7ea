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
        prefix: Text<'a>,
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
        name: Text<'a>,
    },
    /// Describes a table: sent before its first change in a session, and again when it was altered.
    Relation(Relation<'a>),
    /// Names a type that is not built in: sent before the relation that uses it.
    Type {
        /// Its object id.
        id: u32,
        /// Its schema; empty for `pg_catalog`.
        namespace: Text<'a>,
        /// Its name.
        name: Text<'a>,
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
    pub namespace: Text<'a>,
    /// Its name.
    pub name: Text<'a>,
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
    pub name: Text<'a>,
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

/// A name, in the session's encoding: whoever names an object may put any byte there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Text<'a>(pub &'a [u8]);

/// The tables of a [`Message::Truncate`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RelationIds<'a>(&'a [[u8; 4]]);

/// The content of a [`Message::Message`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MessageContent<'a>(pub &'a [u8]);

/// Why a message cannot be decoded. The bytes of rows are never part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    let prefix = text(reader, "prefix")?;
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
        name: text(reader, "name")?,
    })
}

fn relation<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    let id = reader.u32("relation id")?;
    let namespace = text(reader, "namespace")?;
    let name = text(reader, "name")?;
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
        name: text(reader, "column name")?,
        type_id: reader.u32("column type id")?,
        type_modifier: reader.i32("column type modifier")?,
    })
}

fn type_<'a>(reader: &mut ByteReader<'a>) -> Result<Message<'a>, ReadError> {
    Ok(Message::Type {
        id: reader.u32("type id")?,
        namespace: text(reader, "namespace")?,
        name: text(reader, "name")?,
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

fn text<'a>(reader: &mut ByteReader<'a>, what: &'static str) -> Result<Text<'a>, ReadError> {
    reader.string(what).map(Text)
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

impl fmt::Debug for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(self.0).fmt(f)
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::FileFailurePersistence;

    /// Writes what `decode` reads.
    #[derive(Default)]
    struct Encoder(Vec<u8>);

    impl Encoder {
        fn bytes(mut self, bytes: &[u8]) -> Encoder {
            self.0.extend_from_slice(bytes);
            self
        }

        fn u32(self, value: u32) -> Encoder {
            self.bytes(&value.to_be_bytes())
        }

        fn count16(self, count: usize) -> Encoder {
            self.bytes(&i16::try_from(count).unwrap().to_be_bytes())
        }

        fn count32(self, count: usize) -> Encoder {
            self.bytes(&i32::try_from(count).unwrap().to_be_bytes())
        }

        fn string(self, text: &str) -> Encoder {
            self.bytes(text.as_bytes()).bytes(b"\0")
        }

        fn tuple(self, kind: u8, values: &[Value]) -> Encoder {
            let start = self.bytes(&[kind]).count16(values.len());
            values.iter().fold(start, |to, value| match value {
                Value::Null => to.bytes(b"n"),
                Value::UnchangedToast => to.bytes(b"u"),
                Value::Text(value) => to.bytes(b"t").count32(value.len()).bytes(value),
                Value::Binary(value) => to.bytes(b"b").count32(value.len()).bytes(value),
            })
        }
    }

    /// A [`TupleValue`] that owns its bytes.
    #[derive(Clone, Debug)]
    enum Value {
        Null,
        UnchangedToast,
        Text(Vec<u8>),
        Binary(Vec<u8>),
    }

    impl Value {
        fn borrowed(&self) -> TupleValue<'_> {
            match self {
                Value::Null => TupleValue::Null,
                Value::UnchangedToast => TupleValue::UnchangedToast,
                Value::Text(value) => TupleValue::Text(value),
                Value::Binary(value) => TupleValue::Binary(value),
            }
        }
    }

    fn row() -> impl Strategy<Value = Vec<Value>> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
        let value = prop_oneof![
            Just(Value::Null),
            Just(Value::UnchangedToast),
            bytes().prop_map(Value::Text),
            bytes().prop_map(Value::Binary),
        ];
        proptest::collection::vec(value, 0..20)
    }

    fn is_row(tuple: Tuple<'_>, row: &[Value]) -> bool {
        tuple.len() == row.len() && tuple.iter().eq(row.iter().map(Value::borrowed))
    }

    const NAME: &str = "[^\0]{0,20}";

    /// Failures are kept with the tests, and are tried first from then on.
    fn config() -> ProptestConfig {
        let file = FileFailurePersistence::Direct("tests/regressions/pgoutput.txt");
        ProptestConfig {
            failure_persistence: Some(Box::new(file)),
            ..ProptestConfig::default()
        }
    }

    proptest! {
        #![proptest_config(config())]

        #[test]
        fn relations_come_out_as_they_went_in(
            id: u32,
            namespace in NAME,
            name in NAME,
            replica_identity: u8,
            columns in proptest::collection::vec((any::<bool>(), NAME, any::<u32>(), any::<i32>()), 0..20),
        ) {
            let start = Encoder::default()
                .bytes(b"R")
                .u32(id)
                .string(&namespace)
                .string(&name)
                .bytes(&[replica_identity])
                .count16(columns.len());
            let message = columns.iter().fold(start, |to, (key, name, type_id, type_modifier)| {
                to.bytes(&[u8::from(*key)]).string(name).u32(*type_id).bytes(&type_modifier.to_be_bytes())
            });
            let Ok(Message::Relation(relation)) = decode(&message.0) else {
                panic!("{:?}", decode(&message.0))
            };
            prop_assert_eq!(
                (relation.id, relation.namespace, relation.name, relation.replica_identity),
                (id, Text(namespace.as_bytes()), Text(name.as_bytes()), replica_identity)
            );
            prop_assert_eq!(relation.column_count(), columns.len());
            let expected = columns.iter().map(|(key, name, type_id, type_modifier)| Column {
                key: *key,
                name: Text(name.as_bytes()),
                type_id: *type_id,
                type_modifier: *type_modifier,
            });
            prop_assert!(relation.columns().eq(expected));
        }

        #[test]
        fn rows_come_out_as_they_went_in(id: u32, before in row(), after in row()) {
            let message = |kind| Encoder::default().bytes(&[kind]).u32(id);

            let insert = message(b'I').tuple(b'N', &after).0;
            let Ok(Message::Insert { relation_id, tuple }) = decode(&insert) else {
                panic!("{:?}", decode(&insert))
            };
            prop_assert!(relation_id == id && is_row(tuple, &after));

            let update = message(b'U').tuple(b'N', &after).0;
            let Ok(Message::Update { relation_id, old: None, new }) = decode(&update) else {
                panic!("{:?}", decode(&update))
            };
            prop_assert!(relation_id == id && is_row(new, &after));

            for (kind, is_key) in [(b'K', true), (b'O', false)] {
                let is_before = |old| match old {
                    OldTuple::Key(old) => is_key && is_row(old, &before),
                    OldTuple::Full(old) => !is_key && is_row(old, &before),
                };
                let update = message(b'U').tuple(kind, &before).tuple(b'N', &after).0;
                let Ok(Message::Update { relation_id, old: Some(old), new }) = decode(&update) else {
                    panic!("{:?}", decode(&update))
                };
                prop_assert!(relation_id == id && is_before(old) && is_row(new, &after));

                let delete = message(b'D').tuple(kind, &before).0;
                let Ok(Message::Delete { relation_id, old }) = decode(&delete) else {
                    panic!("{:?}", decode(&delete))
                };
                prop_assert!(relation_id == id && is_before(old));
            }
        }
    }

    #[test]
    fn what_is_not_a_message_is_refused_with_the_reason() {
        fn check(data: &[u8], expected: &str) {
            assert_eq!(decode(data).unwrap_err().to_string(), expected, "{data:?}");
        }
        check(
            b"",
            "decode pgoutput message: type needs 1 bytes, 0 are left",
        );
        check(
            b"I\0\0\0",
            "decode pgoutput Insert: relation id needs 4 bytes, 3 are left",
        );
        check(
            b"I\0\0\0\x01K\0\0",
            "decode pgoutput Insert: tuple kind is 0x4B ('K'), which is unknown",
        );
        check(
            b"I\0\0\0\x01N\xff\xff",
            "decode pgoutput Insert: number of values is -1",
        );
        check(
            b"I\0\0\0\x01N\x7f\xffn",
            "decode pgoutput Insert: kind of a value needs 1 bytes, 0 are left",
        );
        check(
            b"I\0\0\0\x01N\0\x01x",
            "decode pgoutput Insert: kind of a value is 0x78 ('x'), which is unknown",
        );
        check(
            b"I\0\0\0\x01N\0\x01t\x7f\xff\xff\xffabc",
            "decode pgoutput Insert: value needs 2147483647 bytes, 3 are left",
        );
        check(
            b"I\0\0\0\x01N\0\x01t\xff\xff\xff\xff",
            "decode pgoutput Insert: length of a value is -1",
        );
        check(
            b"I\0\0\0\x01N\0\x01nn",
            "decode pgoutput Insert: 1 bytes are left after its end",
        );
        check(
            b"U\0\0\0\x01K\0\0K",
            "decode pgoutput Update: tuple kind is 0x4B ('K'), which is unknown",
        );
        check(
            b"D\0\0\0\x01N\0\0",
            "decode pgoutput Delete: tuple kind is 0x4E ('N'), which is unknown",
        );
        check(
            b"Y\0\0\0\x01public",
            "decode pgoutput Type: namespace has no terminator in the 6 bytes left",
        );
        check(
            b"T\x7f\xff\xff\xff\0\0\0\0\x01",
            "decode pgoutput Truncate: relation ids needs 8589934588 bytes, 4 are left",
        );
        check(
            b"C\x01",
            "decode pgoutput Commit: flags is 0x01 ('\\x01'), which is unknown",
        );
        check(b"z", "decode pgoutput message: unknown type 0x7A ('z')");
    }

    #[test]
    fn messages_of_later_protocols_are_named() {
        let text = |byte| decode(&[byte]).unwrap_err().to_string();
        for byte in *b"SEcA" {
            assert!(text(byte).contains("streaming (protocol version 2)"));
        }
        for byte in *b"bPKrp" {
            assert!(text(byte).contains("two-phase commit (protocol version 3)"));
        }
        assert_eq!(
            text(b'S'),
            "decode pgoutput message: unknown type 0x53 ('S'), of streaming (protocol version 2), \
             which the relay never asks for: see what stands between it and Postgres"
        );
    }

    #[test]
    fn the_content_of_rows_and_messages_is_not_in_the_debug_form() {
        let insert = b"I\0\0\0\x07N\0\x02nt\0\0\0\x06secret";
        assert_eq!(
            format!("{:?}", decode(insert).unwrap()),
            "Insert { relation_id: 7, tuple: [Null, Text(6 bytes)] }"
        );
        let message = b"M\x01\0\0\0\0\0\0\0\x09me\0\0\0\0\x06secret";
        assert_eq!(
            format!("{:?}", decode(message).unwrap()),
            "Message { transactional: true, lsn: 0/9, prefix: \"me\", content: 6 bytes }"
        );
    }
}
