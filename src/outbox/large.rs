//! Rows and messages that are too large to be taken at once: what is kept of one while it comes in.
//!
//! Only the columns that take part in the event are kept. Together they may be [`most`] bytes; in a row with more than that
//! each is cut, so that it can be parked under its own id and with the beginning of its payload, but not published.

use super::plan::Value;
use crate::postgres::pieces::RowPiece;

/// An event's text in Postgres may be so many times `max_payload`: a byte of a `bytea` takes four characters at most, and white
/// space between the tokens of a `json` goes.
const TIMES_MAX_PAYLOAD: usize = 4;
/// The default `max_payload`. With a lower one as much is taken: the limit may be raised.
const SMALLEST_MAX_PAYLOAD: usize = 1 << 20;
/// nats-server allows no more. Any number can come over a network.
const LARGEST_MAX_PAYLOAD: usize = 64 << 20;
/// What is kept of a value that is no payload: of more, no subject, id or header could be made.
const MAX_PART: usize = 64 << 10;

/// What one event may take in Postgres, in bytes, with a NATS server that takes `max_payload`.
pub fn most(max_payload: usize) -> usize {
    TIMES_MAX_PAYLOAD * clamp(max_payload)
}

/// What is kept of a payload that makes the event larger than that: an even number, as two digits are a byte of `bytea`.
fn cut_payload(max_payload: usize) -> usize {
    clamp(max_payload) & !1
}

fn clamp(max_payload: usize) -> usize {
    max_payload.clamp(SMALLEST_MAX_PAYLOAD, LARGEST_MAX_PAYLOAD)
}

/// A value as far as it is kept.
#[derive(Debug)]
enum Kept {
    Null,
    UnchangedToast,
    Bytes {
        is_binary: bool,
        len: usize,
        most: usize,
        bytes: Vec<u8>,
    },
}

impl Kept {
    fn cut(&mut self, to: usize) {
        if let Kept::Bytes { most, bytes, .. } = self {
            *most = to;
            bytes.truncate(to);
            bytes.shrink_to_fit();
        }
    }

    fn value(&self) -> Value<'_> {
        match self {
            Kept::Null => Value::Null,
            Kept::UnchangedToast => Value::UnchangedToast,
            Kept::Bytes { len, bytes, .. } if bytes.len() < *len => Value::Cut {
                kept: bytes,
                len: *len,
            },
            Kept::Bytes {
                is_binary: true,
                bytes,
                ..
            } => Value::Binary(bytes),
            Kept::Bytes { bytes, .. } => Value::Text(bytes),
        }
    }
}

/// What a column is to the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Nothing.
    Unused,
    /// Part of the subject, the id or the headers.
    Part,
    /// The body.
    Payload,
}

/// A row of an outbox, as far as it has come.
#[derive(Debug)]
pub struct LargeRow {
    roles: Vec<Role>,
    max_payload: usize,
    held: usize,
    values: Vec<Kept>,
}

impl LargeRow {
    /// Of a table with these columns.
    pub fn new(roles: Vec<Role>, max_payload: usize) -> LargeRow {
        LargeRow {
            values: Vec::with_capacity(roles.len()),
            roles,
            max_payload,
            held: 0,
        }
    }

    /// Takes what comes next.
    pub fn take(&mut self, piece: RowPiece<'_>) {
        match piece {
            RowPiece::Null => self.values.push(Kept::Null),
            RowPiece::UnchangedToast => self.values.push(Kept::UnchangedToast),
            RowPiece::Value { is_binary, len } => self.begin(is_binary, len),
            RowPiece::Bytes(piece) => {
                if let Some(Kept::Bytes { most, bytes, .. }) = self.values.last_mut() {
                    let room = most.saturating_sub(bytes.len());
                    bytes.extend_from_slice(piece.get(..room).unwrap_or(piece));
                }
            }
        }
    }

    fn role(&self, index: usize) -> Role {
        self.roles.get(index).copied().unwrap_or(Role::Unused)
    }

    fn cut(&self, role: Role) -> usize {
        match role {
            Role::Unused => 0,
            Role::Part => MAX_PART,
            Role::Payload => cut_payload(self.max_payload),
        }
    }

    fn begin(&mut self, is_binary: bool, len: usize) {
        let role = self.role(self.values.len());
        if role == Role::Unused {
            return self.values.push(Kept::Null);
        }
        let before = self.held;
        self.held = self.held.saturating_add(len);
        let most = most(self.max_payload);
        if before <= most && self.held > most {
            for index in 0..self.values.len() {
                let to = self.cut(self.role(index));
                if let Some(value) = self.values.get_mut(index) {
                    value.cut(to);
                }
            }
        }
        let most = match self.held > most {
            true => self.cut(role),
            false => len,
        };
        self.values.push(Kept::Bytes {
            is_binary,
            len,
            most,
            bytes: Vec::with_capacity(len.min(most)),
        });
    }

    /// The values, one for each column that came.
    pub fn values(&self) -> impl Iterator<Item = Value<'_>> {
        self.values.iter().map(Kept::value)
    }
}

/// The content of a message of ours, as far as it has come.
#[derive(Debug)]
pub struct LargeContent {
    /// Bytes of the message that precede the rest of the content.
    skip: usize,
    len: usize,
    most: usize,
    kept: Vec<u8>,
}

impl LargeContent {
    /// Of `len` bytes, which begin after `skip` bytes of the message.
    pub fn new(skip: usize, len: usize, max_payload: usize) -> LargeContent {
        let most = match len > most(max_payload) {
            true => cut_payload(max_payload),
            false => len,
        };
        LargeContent {
            skip,
            len,
            most,
            kept: Vec::with_capacity(most),
        }
    }

    /// Takes the next piece of the message.
    pub fn take(&mut self, piece: &[u8]) {
        let skipped = self.skip.min(piece.len());
        self.skip -= skipped;
        let piece = piece.get(skipped..).unwrap_or_default();
        let room = self.most.saturating_sub(self.kept.len());
        self.kept
            .extend_from_slice(piece.get(..room).unwrap_or(piece));
    }

    /// All of it, or its beginning.
    pub fn value(&self) -> Value<'_> {
        match self.kept.len() == self.len {
            true => Value::Text(&self.kept),
            false => Value::Cut {
                kept: &self.kept,
                len: self.len,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: usize = 1 << 20;

    fn value(row: &mut LargeRow, len: usize) {
        let is_binary = false;
        row.take(RowPiece::Value { is_binary, len });
        let bytes = vec![b'x'; 100_000];
        let mut left = len;
        while left > 0 {
            let count = left.min(bytes.len());
            row.take(RowPiece::Bytes(&bytes[..count]));
            left -= count;
        }
    }

    /// What is kept of a row of (id, payload, something unused, header), and how long each is.
    fn kept(max_payload: usize, lengths: [usize; 4]) -> Vec<(usize, Option<usize>)> {
        use Role::{Part, Payload, Unused};
        let mut row = LargeRow::new(vec![Part, Payload, Unused, Part], max_payload);
        for len in lengths {
            value(&mut row, len);
        }
        let kept = row.values().map(|value| match value {
            Value::Text(bytes) => (bytes.len(), None),
            Value::Cut { kept, len } => (kept.len(), Some(len)),
            _ => (0, None),
        });
        kept.collect()
    }

    #[test]
    fn what_takes_part_is_kept_up_to_the_bound_and_cut_beyond_it() {
        for (max_payload, lengths, expected) in [
            (
                MB,
                [10, 3 * MB, 50 * MB, MB - 10],
                [(10, None), (3 * MB, None), (0, None), (MB - 10, None)],
            ),
            (
                MB,
                [10, 3 * MB, 0, MB],
                [
                    (10, None),
                    (MB, Some(3 * MB)),
                    (0, None),
                    (MAX_PART, Some(MB)),
                ],
            ),
            (
                MB,
                [10, 5 * MB, 0, 7],
                [(10, None), (MB, Some(5 * MB)), (0, None), (7, None)],
            ),
            (
                MB,
                [6 * MB, 2 * MB, 0, 7],
                [
                    (MAX_PART, Some(6 * MB)),
                    (MB, Some(2 * MB)),
                    (0, None),
                    (7, None),
                ],
            ),
            // a lower limit may be raised
            (
                1_000,
                [1, 4 * MB - 1, 0, 0],
                [(1, None), (4 * MB - 1, None), (0, None), (0, None)],
            ),
            (
                2 * MB,
                [1, 7 * MB, 0, 0],
                [(1, None), (7 * MB, None), (0, None), (0, None)],
            ),
        ] {
            assert_eq!(kept(max_payload, lengths), expected, "{lengths:?}");
        }
        assert!(most(usize::MAX) <= 256 * MB);
    }

    #[test]
    fn a_messages_content_is_kept_up_to_the_bound() {
        for (len, kept) in [(4 * MB, 4 * MB), (4 * MB + 1, MB)] {
            let mut content = LargeContent::new(17, len, MB);
            let message = vec![b'x'; 17 + len];
            message.chunks(7_777).for_each(|piece| content.take(piece));
            match content.value() {
                Value::Text(bytes) => assert_eq!((bytes.len(), len), (kept, kept)),
                Value::Cut {
                    kept: bytes,
                    len: whole,
                } => {
                    assert_eq!((bytes.len(), whole), (kept, len));
                }
                _ => panic!("it is text"),
            }
        }
    }
}
