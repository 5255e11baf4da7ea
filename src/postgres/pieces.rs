//! pgoutput messages that are too large to be held: what one is, by its head, and the values of a row as they come in.
//!
//! The other half of [`super::pgoutput`], for what comes through [`super::replication`] in pieces. Pure; it holds a few bytes
//! of a length that was cut through, and nothing else.

use super::byte_reader::{ByteReader, ReadError};
use super::pgoutput::{DecodeError, Text};

/// What a large message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head<'a> {
    /// A row was inserted: for [`Row`].
    Insert {
        /// The table's object id.
        relation_id: u32,
    },
    /// What `pg_logical_emit_message` wrote.
    Message {
        /// It belongs to the transaction around it.
        transactional: bool,
        /// Says who it is for; `None`: it is longer than the head.
        prefix: Option<Text<'a>>,
        /// Where in the message its content begins.
        content_at: usize,
        /// How long that is, in bytes.
        content_len: usize,
    },
    /// A table is described, which takes the whole message.
    Relation,
    /// An update, a delete, a truncate, an origin or a type: of no use to anybody, however large.
    Other,
}

/// Reads the head of a message.
///
/// # Errors
/// When it is of no known type, or of one that is never large.
pub fn head(head: &[u8]) -> Result<Head<'_>, DecodeError> {
    let mut reader = ByteReader::new(head);
    let malformed = |message| move |cause| DecodeError::Malformed { message, cause };
    match reader.u8("type").map_err(malformed("message"))? {
        b'I' => {
            let relation_id = reader.u32("relation id").map_err(malformed("Insert"))?;
            Ok(Head::Insert { relation_id })
        }
        b'M' => message(reader, head.len()).map_err(malformed("Message")),
        b'R' => Ok(Head::Relation),
        b'U' | b'D' | b'T' | b'O' | b'Y' => Ok(Head::Other),
        b'B' => Err(too_large("Begin", head)),
        b'C' => Err(too_large("Commit", head)),
        byte => Err(DecodeError::UnknownMessage(byte)),
    }
}

fn too_large(message: &'static str, head: &[u8]) -> DecodeError {
    let cause = ReadError::TrailingBytes { left: head.len() };
    DecodeError::Malformed { message, cause }
}

fn message<'a>(mut reader: ByteReader<'a>, head_len: usize) -> Result<Head<'a>, ReadError> {
    const TRANSACTIONAL: u8 = 1;
    const FIXED: usize = 10;
    let transactional = reader.u8("flags")? & TRANSACTIONAL != 0;
    reader.u64("LSN")?;
    let name = reader.bytes_to_nul();
    let content_at = FIXED + name.len() + 1;
    let (prefix, content_len) = match content_at + 4 <= head_len {
        true => (Some(Text(name)), reader.count32("length of the content")?),
        false => (None, 0),
    };
    Ok(Head::Message {
        transactional,
        prefix,
        content_at: content_at + 4,
        content_len,
    })
}

/// What comes next in a row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum RowPiece<'a> {
    /// NULL.
    Null,
    /// A value that is stored out of line and is not sent.
    UnchangedToast,
    /// A value of this many bytes begins.
    Value {
        /// It is in binary form.
        is_binary: bool,
        /// Its length in bytes.
        len: usize,
    },
    /// Bytes of the value that has begun.
    Bytes(&'a [u8]),
}

/// Reads an Insert from its pieces.
#[derive(Debug)]
pub struct Row {
    state: State,
    /// The bytes of a fixed field so far.
    field: [u8; HEAD_LEN],
    field_len: usize,
    columns_left: u16,
}

/// Type, relation id, kind of the tuple, number of values.
const HEAD_LEN: usize = 8;

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    Kind,
    Length { is_binary: bool },
    Value { left: usize },
}

impl Default for Row {
    fn default() -> Row {
        Row {
            state: State::Head,
            field: [0; HEAD_LEN],
            field_len: 0,
            columns_left: 0,
        }
    }
}

impl Row {
    /// Reads the next piece, and tells what is in it.
    ///
    /// # Errors
    /// When it is no row.
    pub fn feed<'a>(
        &mut self,
        mut bytes: &'a [u8],
        mut tell: impl FnMut(RowPiece<'a>),
    ) -> Result<(), DecodeError> {
        let malformed = |cause| DecodeError::Malformed {
            message: "Insert",
            cause,
        };
        while let Some((&first, after)) = bytes.split_first() {
            match self.state {
                State::Head => {
                    if let Some(field) = self.fixed::<HEAD_LEN>(&mut bytes) {
                        let [_, _, _, _, _, kind, high, low] = field;
                        if kind != b'N' {
                            let (what, byte) = ("tuple kind", kind);
                            return Err(malformed(ReadError::UnknownByte { what, byte }));
                        }
                        let count = [high, low];
                        let count = ByteReader::new(&count).count16("number of values");
                        self.columns_left = count.map_err(malformed)?;
                        self.state = State::Kind;
                    }
                }
                State::Kind => {
                    let Some(left) = self.columns_left.checked_sub(1) else {
                        let left = bytes.len();
                        return Err(malformed(ReadError::TrailingBytes { left }));
                    };
                    self.columns_left = left;
                    bytes = after;
                    match first {
                        b'n' => tell(RowPiece::Null),
                        b'u' => tell(RowPiece::UnchangedToast),
                        b't' => self.state = State::Length { is_binary: false },
                        b'b' => self.state = State::Length { is_binary: true },
                        byte => {
                            let what = "kind of a value";
                            return Err(malformed(ReadError::UnknownByte { what, byte }));
                        }
                    }
                }
                State::Length { is_binary } => {
                    if let Some(field) = self.fixed::<4>(&mut bytes) {
                        let len = ByteReader::new(&field).count32("length of a value");
                        let len = len.map_err(malformed)?;
                        tell(RowPiece::Value { is_binary, len });
                        self.enter_value(len);
                    }
                }
                State::Value { left } => {
                    let (taken, after) = bytes.split_at_checked(left).unwrap_or((bytes, &[]));
                    bytes = after;
                    tell(RowPiece::Bytes(taken));
                    self.enter_value(left - taken.len());
                }
            }
        }
        Ok(())
    }

    fn enter_value(&mut self, left: usize) {
        self.state = match left {
            0 => State::Kind,
            left => State::Value { left },
        };
    }

    /// Takes what is there of a field of `N` bytes; gives it once it is whole.
    fn fixed<const N: usize>(&mut self, bytes: &mut &[u8]) -> Option<[u8; N]> {
        while let Some((&byte, after)) = bytes.split_first()
            && self.field_len < N
        {
            if let Some(place) = self.field.get_mut(self.field_len) {
                *place = byte;
            }
            self.field_len += 1;
            *bytes = after;
        }
        if self.field_len < N {
            return None;
        }
        self.field_len = 0;
        self.field.first_chunk::<N>().copied()
    }

    /// There is no more of it.
    ///
    /// # Errors
    /// When there should be.
    pub fn finish(&self) -> Result<(), DecodeError> {
        match (self.state, self.columns_left) {
            (State::Kind, 0) => Ok(()),
            (_, left) => Err(DecodeError::Malformed {
                message: "Insert",
                cause: ReadError::UnexpectedEnd {
                    what: "row",
                    need: left.into(),
                    have: 0,
                },
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert() -> Vec<u8> {
        let mut bytes = b"I\0\0\0\x07N\0\x05nut\0\0\0\x03abcb\0\0\0\0t\0\0\0\x01x".to_vec();
        bytes[7] = 5;
        bytes
    }

    /// What a row comes to, its bytes put together.
    fn read(pieces: &[&[u8]]) -> Result<Vec<String>, DecodeError> {
        let mut row = Row::default();
        let mut found = Vec::new();
        for piece in pieces {
            row.feed(piece, |piece| match piece {
                RowPiece::Null => found.push("null".to_string()),
                RowPiece::UnchangedToast => found.push("toast".to_string()),
                RowPiece::Value { is_binary, len } => found.push(format!("{is_binary} {len} ")),
                RowPiece::Bytes(bytes) => {
                    let text = String::from_utf8(bytes.to_vec()).unwrap();
                    found.last_mut().unwrap().push_str(&text);
                }
            })?;
        }
        row.finish()?;
        Ok(found)
    }

    #[test]
    fn a_row_cut_at_every_byte_comes_out_whole() {
        let bytes = insert();
        let expected = ["null", "toast", "false 3 abc", "true 0 ", "false 1 x"];
        for cut in 0..=bytes.len() {
            let (first, second) = bytes.split_at(cut);
            assert_eq!(read(&[first, second]).unwrap(), expected, "{cut}");
            if cut < bytes.len() {
                assert!(read(&[first]).is_err(), "{cut}");
            }
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(read(&single).unwrap(), expected);
    }

    #[test]
    fn what_is_no_row_is_an_error() {
        for (at, byte) in [(5, b'O'), (6, 0xff), (8, b'x'), (11, 0xff)] {
            let mut bytes = insert();
            bytes[at] = byte;
            assert!(read(&[&bytes]).is_err(), "{at}");
        }
        let more = [insert(), vec![b'n']].concat();
        assert!(read(&[&more]).is_err());
    }

    #[test]
    fn a_head_says_what_the_message_is() {
        let message = [
            b"M\x01\0\0\0\0\0\0\0\x09me\0\0\0\x01\0".as_slice(),
            &[b'x'; 50],
        ]
        .concat();
        for (bytes, expected) in [
            (&insert()[..], Head::Insert { relation_id: 7 }),
            (b"U\0\0", Head::Other),
            (b"D", Head::Other),
            (b"T", Head::Other),
            (b"O", Head::Other),
            (b"Y", Head::Other),
            (b"R", Head::Relation),
            (
                &message,
                Head::Message {
                    transactional: true,
                    prefix: Some(Text(b"me")),
                    content_at: 17,
                    content_len: 256,
                },
            ),
        ] {
            assert_eq!(head(bytes), Ok(expected));
        }
        let long = [b"M\0\0\0\0\0\0\0\0\x09".as_slice(), &[b'p'; 50]].concat();
        let Ok(Head::Message {
            transactional: false,
            prefix: None,
            ..
        }) = head(&long)
        else {
            panic!("{:?}", head(&long));
        };
        for bytes in [&b"B"[..], b"C", b"S", b"", b"I\0", b"M\0"] {
            assert!(head(bytes).is_err(), "{bytes:?}");
        }
    }
}
