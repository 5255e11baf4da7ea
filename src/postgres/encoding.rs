//! Text in the encoding of a database, read by us.
//!
//! A server that converts what it sends to UTF-8 refuses, with 22P05 or 22021, what has no equivalent there: one such byte, in
//! whatever row, column or name, and the WAL can be read no further. With `client_encoding = SQL_ASCII` it converts nothing and
//! refuses nothing. So where we know the encoding of the database we ask for that, and read the text by the server's own
//! tables: what has no equivalent is then the matter of one value. `encodings.txt` holds these tables, as
//! `convert(…, 'UTF8')` of Postgres gives them for the bytes from 0x80 on; a test compares them with the server's.
//!
//! The encodings of several bytes a character (EUC_*, MULE_INTERNAL) are left to the server.
//! Source: <https://www.postgresql.org/docs/current/multibyte.html>.

use std::borrow::Cow;

const TABLES: &str = include_str!("encodings.txt");
const HALF: usize = 128;

/// How the text of a session is to be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// It is UTF-8: the database is, or the server converts it.
    #[default]
    Utf8,
    /// The database's encoding is SQL_ASCII: bytes of which nobody says what they mean. Those that are UTF-8 are taken for it.
    Unknown,
    /// One byte a character. Those below 0x80 are ASCII; for the others the character, or none.
    SingleByte(Box<[Option<char>; HALF]>),
}

impl Encoding {
    /// For a database of the encoding that the server calls so. `None`: the server is to convert it.
    pub fn of_database(name: &str) -> Option<Encoding> {
        match name {
            "UTF8" => Some(Encoding::Utf8),
            "SQL_ASCII" => Some(Encoding::Unknown),
            _ => single_byte(name).map(|table| Encoding::SingleByte(Box::new(table))),
        }
    }

    /// Every byte that a writer can store has an equivalent in UTF-8.
    pub fn is_complete(&self) -> bool {
        match self {
            Encoding::Utf8 => true,
            Encoding::Unknown => false,
            Encoding::SingleByte(table) => table.iter().all(Option::is_some),
        }
    }

    /// The text; `None` where a byte stands for no character.
    pub fn decode<'a>(&self, bytes: &'a [u8]) -> Option<Cow<'a, str>> {
        match self {
            Encoding::SingleByte(table) if !bytes.is_ascii() => bytes
                .iter()
                .map(|&byte| character(table, byte))
                .collect::<Option<String>>()
                .map(Cow::Owned),
            _ => std::str::from_utf8(bytes).ok().map(Cow::Borrowed),
        }
    }

    /// The text, for names: U+FFFD stands for what stands for no character, and no name that is looked for has that.
    pub fn decode_name<'a>(&self, bytes: &'a [u8]) -> Cow<'a, str> {
        match self {
            Encoding::SingleByte(table) if !bytes.is_ascii() => bytes
                .iter()
                .map(|&byte| character(table, byte).unwrap_or(char::REPLACEMENT_CHARACTER))
                .collect(),
            _ => String::from_utf8_lossy(bytes),
        }
    }

    /// The bytes of a statement in it. What it has no byte for stays as it is in UTF-8, and names nothing.
    pub fn encode<'a>(&self, text: &'a str) -> Cow<'a, [u8]> {
        let Encoding::SingleByte(table) = self else {
            return Cow::Borrowed(text.as_bytes());
        };
        if text.is_ascii() {
            return Cow::Borrowed(text.as_bytes());
        }
        let mut bytes = Vec::with_capacity(text.len());
        for c in text.chars() {
            let found = table.iter().position(|known| *known == Some(c));
            match found.and_then(|index| u8::try_from(index + HALF).ok()) {
                Some(byte) => bytes.push(byte),
                None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        Cow::Owned(bytes)
    }
}

fn character(table: &[Option<char>; HALF], byte: u8) -> Option<char> {
    match usize::from(byte).checked_sub(HALF) {
        None => Some(char::from(byte)),
        Some(index) => table.get(index).copied().flatten(),
    }
}

/// The names of the encodings of `encodings.txt`.
pub fn single_byte_names() -> impl Iterator<Item = &'static str> {
    TABLES.lines().filter(|line| !line.starts_with(' '))
}

fn single_byte(name: &str) -> Option<[Option<char>; HALF]> {
    let mut lines = TABLES.lines().skip_while(|line| *line != name);
    lines.next()?;
    let rows = lines.take_while(|line| line.starts_with(' '));
    let cells = rows.flat_map(str::split_ascii_whitespace);
    let mut table = [None; HALF];
    for (place, cell) in table.iter_mut().zip(cells) {
        // `----` is no number
        *place = u32::from_str_radix(cell, 16).ok().and_then(char::from_u32);
    }
    Some(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_is_read_by_its_encodings_table() {
        let of = |name| Encoding::of_database(name).unwrap();
        for (name, bytes, text, named) in [
            ("UTF8", "größe".as_bytes(), Some("größe"), "größe"),
            ("UTF8", b"caf\xe9", None, "caf\u{fffd}"),
            ("SQL_ASCII", "größe".as_bytes(), Some("größe"), "größe"),
            ("SQL_ASCII", b"caf\xe9", None, "caf\u{fffd}"),
            ("WIN1252", b"caf\xe9 \x80", Some("café €"), "café €"),
            ("WIN1252", b"caf\x81", None, "caf\u{fffd}"),
            ("WIN1251", b"\xcf\xf0", Some("Пр"), "Пр"),
            ("LATIN1", b"\x81\xe9", Some("\u{81}é"), "\u{81}é"),
            ("LATIN9", b"\xa4", Some("€"), "€"),
            ("KOI8R", b"\xf0", Some("П"), "П"),
        ] {
            let encoding = of(name);
            assert_eq!(encoding.decode(bytes).as_deref(), text, "{name}");
            assert_eq!(encoding.decode_name(bytes), named, "{name}");
            if let Some(text) = text {
                assert_eq!(*encoding.encode(text), *bytes, "{name}");
            }
        }
        assert_eq!(*of("WIN1252").encode("Пр"), *"Пр".as_bytes());
        assert_eq!(Encoding::of_database("EUC_JP"), None);
        let complete =
            ["UTF8", "LATIN1", "WIN1252", "SQL_ASCII"].map(|name| of(name).is_complete());
        assert_eq!(complete, [true, true, false, false]);
        assert_eq!(single_byte_names().count(), 27);
    }
}
