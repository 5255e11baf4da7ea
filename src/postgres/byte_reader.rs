//! Reads the fields of a message from bytes that a server sent: each read is checked, none can panic.
//!
//! Integers are in network byte order, strings end with a NUL. Everything is borrowed, and nothing is
//! reserved by a length or count that the bytes claim.
//! Source: <https://www.postgresql.org/docs/current/protocol-message-types.html>.

use std::fmt;

/// The part of a message that is not read yet.
#[derive(Clone, Copy, Debug)]
pub struct ByteReader<'a> {
    rest: &'a [u8],
}

/// Why a field cannot be read. `what` names the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// The message ends before the field does; both counts are bytes.
    UnexpectedEnd {
        /// The field.
        what: &'static str,
        /// How long the field is.
        need: usize,
        /// How much of the message is left for it.
        have: usize,
    },
    /// No NUL ends the string.
    UnterminatedString {
        /// The field.
        what: &'static str,
        /// How much of the message was searched, in bytes.
        have: usize,
    },
    /// A length or a count is below zero.
    BadCount {
        /// The field.
        what: &'static str,
        /// Its value.
        value: i32,
    },
    /// A byte that selects between alternatives selects none of them.
    UnknownByte {
        /// The field.
        what: &'static str,
        /// Its value.
        byte: u8,
    },
    /// The message goes on after its last field.
    TrailingBytes {
        /// How much is left, in bytes.
        left: usize,
    },
}

impl<'a> ByteReader<'a> {
    /// Starts at the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> ByteReader<'a> {
        ByteReader { rest: bytes }
    }

    /// One byte.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, ReadError> {
        self.array(what).map(u8::from_be_bytes)
    }

    /// Four bytes without a sign, as for object and transaction ids.
    pub fn u32(&mut self, what: &'static str) -> Result<u32, ReadError> {
        self.array(what).map(u32::from_be_bytes)
    }

    /// Four bytes with a sign.
    pub fn i32(&mut self, what: &'static str) -> Result<i32, ReadError> {
        self.array(what).map(i32::from_be_bytes)
    }

    /// Eight bytes without a sign, as for positions in the log.
    pub fn u64(&mut self, what: &'static str) -> Result<u64, ReadError> {
        self.array(what).map(u64::from_be_bytes)
    }

    /// Eight bytes with a sign, as for times.
    pub fn i64(&mut self, what: &'static str) -> Result<i64, ReadError> {
        self.array(what).map(i64::from_be_bytes)
    }

    /// A count of two bytes.
    pub fn count16(&mut self, what: &'static str) -> Result<u16, ReadError> {
        let value = self.array(what).map(i16::from_be_bytes)?;
        u16::try_from(value).map_err(|_| ReadError::BadCount {
            what,
            value: value.into(),
        })
    }

    /// A count or length of four bytes.
    pub fn count32(&mut self, what: &'static str) -> Result<usize, ReadError> {
        let value = self.i32(what)?;
        usize::try_from(value).map_err(|_| ReadError::BadCount { what, value })
    }

    /// The next `need` bytes.
    pub fn bytes(&mut self, what: &'static str, need: usize) -> Result<&'a [u8], ReadError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(need)
            .ok_or_else(|| self.unexpected_end(what, need))?;
        self.rest = rest;
        Ok(taken)
    }

    /// The text up to the next NUL, which is read too, in the session's encoding.
    pub fn string(&mut self, what: &'static str) -> Result<&'a [u8], ReadError> {
        let mut parts = self.rest.splitn(2, |&byte| byte == 0);
        let (Some(text), Some(rest)) = (parts.next(), parts.next()) else {
            let have = self.rest.len();
            return Err(ReadError::UnterminatedString { what, have });
        };
        self.rest = rest;
        Ok(text)
    }

    /// What precedes the next NUL, which is read too; all that is left where there is none.
    pub fn bytes_to_nul(&mut self) -> &'a [u8] {
        let mut parts = self.rest.splitn(2, |&byte| byte == 0);
        let taken = parts.next().unwrap_or_default();
        self.rest = parts.next().unwrap_or_default();
        taken
    }

    /// What `read` reads, as it stands in the message.
    pub fn span(
        &mut self,
        read: impl FnOnce(&mut ByteReader<'a>) -> Result<(), ReadError>,
    ) -> Result<&'a [u8], ReadError> {
        let start = self.rest;
        read(self)?;
        let len = start.len() - self.rest.len();
        Ok(start.get(..len).unwrap_or_default())
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<(), ReadError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(ReadError::TrailingBytes { left }),
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ReadError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or_else(|| self.unexpected_end(what, N))?;
        self.rest = rest;
        Ok(*taken)
    }

    #[cold]
    fn unexpected_end(&self, what: &'static str, need: usize) -> ReadError {
        let have = self.rest.len();
        ReadError::UnexpectedEnd { what, need, have }
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::UnexpectedEnd { what, need, have } => {
                write!(f, "{what} needs {need} bytes, {have} are left")
            }
            ReadError::UnterminatedString { what, have } => {
                write!(f, "{what} has no terminator in the {have} bytes left")
            }
            ReadError::BadCount { what, value } => write!(f, "{what} is {value}"),
            ReadError::UnknownByte { what, byte } => {
                write!(
                    f,
                    "{what} is 0x{byte:02X} ('{}'), which is unknown",
                    byte.escape_ascii()
                )
            }
            ReadError::TrailingBytes { left } => write!(f, "{left} bytes are left after its end"),
        }
    }
}

impl std::error::Error for ReadError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_out_in_network_byte_order() {
        let mut reader = ByteReader::new(b"\x01\0\x02\0\0\0\x03\xff\xff\xff\xfename\0rest");
        assert_eq!(reader.u8("a"), Ok(1));
        assert_eq!(reader.count16("b"), Ok(2));
        assert_eq!(reader.count32("c"), Ok(3));
        assert_eq!(reader.i32("d"), Ok(-2));
        assert_eq!(reader.string("e"), Ok(&b"name"[..]));
        assert_eq!(reader.end(), Err(ReadError::TrailingBytes { left: 4 }));
        assert_eq!(reader.bytes("f", 4), Ok(&b"rest"[..]));
        assert_eq!(reader.end(), Ok(()));
    }

    #[test]
    fn a_failed_read_says_what_and_why() {
        fn check<T: std::fmt::Debug>(read: Result<T, ReadError>, expected: &str) {
            assert_eq!(read.unwrap_err().to_string(), expected);
        }
        let reader = |bytes: &'static [u8]| ByteReader::new(bytes);
        check(
            reader(b"\0\0\0").u32("xid"),
            "xid needs 4 bytes, 3 are left",
        );
        check(
            reader(b"abc").bytes("value", 9),
            "value needs 9 bytes, 3 are left",
        );
        check(
            reader(b"abc").string("name"),
            "name has no terminator in the 3 bytes left",
        );
        check(reader(b"\xff\xfe").count16("columns"), "columns is -2");
        check(
            reader(b"\x80\0\0\0").count32("length"),
            "length is -2147483648",
        );
        check(reader(b"abc").end(), "3 bytes are left after its end");
    }
}
