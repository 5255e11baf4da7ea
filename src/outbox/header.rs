//! Header lines of an event beside the relay's own: which names they may have, and how a value stands in one.
//!
//! A header is a line of the block before the body (ADR-4): `Name: value`. A name is one or more visible ASCII
//! characters but the colon. Names that begin with `Nats-` or `Outbox-`, in any case, are not the writer's: a
//! `Nats-Msg-Id` of its own would undo the promises. Some are what JetStream offers to publishers (`OFFERED`),
//! and the operator may map a column to one of them.
//!
//! A value stands as it is, unless a header line would not carry it unchanged: control characters, white space
//! other than the plain space, and a plain space at either end, which clients and servers trim. Such a value is
//! percent-encoded, every `%` included ([`super::percent`]), and its header's name is listed in
//! [`ENCODED`]: so a value that holds a `%` by itself is left alone, and still each one can be read back.
//! A name that came from a row (a member of a JSON object) is percent-encoded by the same rule where it must be.

use super::json;
use super::message_id::must_escape;
use super::percent;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

/// Lists the headers of a message whose values are percent-encoded, separated by a comma and a space.
pub const ENCODED: &str = "Outbox-Encoded";

/// Bytes that the headers of one event may take: JetStream allows 64 KiB for all, the relay's own among them.
pub const MAX_LEN: usize = 60_000;

/// What JetStream offers to publishers, in lower case: lifetime and schedules (ADR-43, ADR-51).
const OFFERED: [&str; 6] = [
    "nats-ttl",
    "nats-schedule",
    "nats-schedule-target",
    "nats-schedule-source",
    "nats-schedule-ttl",
    "nats-schedule-time-zone",
];

/// Whether the server acts on a header of this name by storing copies of the message later.
pub fn is_schedule(name: &str) -> bool {
    starts_with(name, "nats-schedule")
}

/// Why a header cannot be called so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameError {
    /// It is empty, or not visible ASCII without a colon.
    Illegal,
    /// It is one of NATS' own.
    Nats,
    /// It is one of the relay's.
    Outbox,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NameError::Illegal => {
                "is not a header's name: visible ASCII characters without a colon"
            }
            NameError::Nats => {
                "is a header that NATS acts on; only Nats-TTL and Nats-Schedule… can be mapped"
            }
            NameError::Outbox => "is a header of the relay's own; choose another name",
        })
    }
}

impl std::error::Error for NameError {}

/// Whether the operator may map a column to a header of this name.
pub fn check_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() || !name.bytes().all(is_name_byte) {
        Err(NameError::Illegal)
    } else if starts_with(name, "outbox-") {
        Err(NameError::Outbox)
    } else if starts_with(name, "nats-") && !OFFERED.iter().any(|o| name.eq_ignore_ascii_case(o)) {
        Err(NameError::Nats)
    } else {
        Ok(())
    }
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_graphic() && byte != b':'
}

fn starts_with(name: &str, lower: &str) -> bool {
    name.get(..lower.len())
        .is_some_and(|begin| begin.eq_ignore_ascii_case(lower))
}

/// Whether a value stands in a header line as it is.
pub fn is_plain(value: &str) -> bool {
    let bytes = value.as_bytes();
    let ends = |byte: Option<&u8>| byte == Some(&b' ');
    if bytes.iter().all(|byte| matches!(byte, b' '..=b'~')) {
        return !ends(bytes.first()) && !ends(bytes.last());
    }
    let mut before = None;
    let mut chars = value.chars().peekable();
    while let Some(c) = chars.next() {
        if must_escape(before, c, chars.peek().copied()) {
            return false;
        }
        before = Some(c);
    }
    true
}

/// Why a line cannot be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LineError {
    /// No header line carries the value, or the name, as it is, and it is not to be encoded.
    NotPlain {
        /// The header, as a row gave it.
        name: String,
    },
    /// The lines would be more than [`MAX_LEN`].
    Full,
}

/// The lines are more than [`MAX_LEN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl From<Full> for LineError {
    fn from(_: Full) -> LineError {
        LineError::Full
    }
}

/// Writes header lines, each `\r\nName: value`, so that they continue a block. No more than [`MAX_LEN`]: what a row gives beyond
/// that is not looked at.
#[derive(Debug)]
pub struct Lines<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
    encode: bool,
    attributes: bool,
    /// The line that names the headers whose values are encoded, and the names in it.
    encoded: String,
    known: HashSet<String>,
}

impl<'a> Lines<'a> {
    /// Lines at the end of `out`; `encode`: what is not plain is encoded, else it is an error. `attributes`: a
    /// header whose name begins with `ce-` is an attribute of a CloudEvent.
    pub fn new(out: &'a mut Vec<u8>, encode: bool, attributes: bool) -> Lines<'a> {
        Lines {
            start: out.len(),
            out,
            encode,
            attributes,
            encoded: String::new(),
            known: HashSet::new(),
        }
    }

    fn len(&self) -> usize {
        self.out.len() - self.start + self.encoded.len()
    }

    /// What may still be written.
    fn room(&self) -> usize {
        MAX_LEN.saturating_sub(self.len())
    }

    /// Adds a header whose name is legal.
    ///
    /// # Errors
    /// [`LineError::NotPlain`] when the value is not and is not to be encoded.
    pub fn add(&mut self, name: &str, value: &str) -> Result<(), LineError> {
        if value.len() > self.room() {
            return Err(LineError::Full);
        }
        self.add_as(name, value, is_plain(value))
    }

    /// Adds a header whose value is known to be plain.
    pub fn add_plain(&mut self, name: &str, value: fmt::Arguments<'_>) {
        self.begin(name);
        // writing to a Vec cannot fail
        let _ = std::io::Write::write_fmt(self.out, value);
    }

    /// Adds an attribute of a CloudEvent, by the rule of its NATS binding (§3.1.3.2): visible ASCII without `"` and
    /// `%` stands as it is, and all else is percent-encoded, which every reader of it expects.
    pub fn add_attribute(&mut self, name: &str, value: &str) {
        self.begin(name);
        // of one that is too long so much as shows it
        let mut end = value.len().min(MAX_LEN + 4);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        write_attribute(value.get(..end).unwrap_or_default(), self.out);
    }

    fn begin(&mut self, name: &str) {
        self.out.extend_from_slice(b"\r\n");
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b": ");
    }

    /// The value is no longer than there is room for.
    fn add_as(&mut self, name: &str, value: &str, plain: bool) -> Result<(), LineError> {
        if self.attributes && starts_with(name, "ce-") {
            self.add_attribute(name, value);
        } else if plain {
            self.begin(name);
            self.out.extend_from_slice(value.as_bytes());
        } else if self.encode {
            self.begin(name);
            if !value.is_empty() {
                percent::write(value, usize::MAX, must_escape, self.out);
            }
            if self.known.insert(name.to_string()) {
                match self.encoded.is_empty() {
                    true => self.encoded.extend(["\r\n", ENCODED, ": "]),
                    false => self.encoded.push_str(", "),
                }
                self.encoded.push_str(name);
            }
        } else {
            return Err(LineError::NotPlain {
                name: name.to_string(),
            });
        }
        match self.len() > MAX_LEN {
            true => Err(LineError::Full),
            false => Ok(()),
        }
    }

    /// Adds the members of a JSON object: strings, numbers and booleans as they are, each element of an array as a
    /// header of its own, what is nested deeper as JSON text, `null` not at all. Members for whose name `taken` holds are left out.
    ///
    /// # Errors
    /// [`ObjectError`]; lines may have been written by then.
    pub fn add_object(
        &mut self,
        text: &str,
        taken: impl Fn(&str) -> bool,
    ) -> Result<(), ObjectError> {
        let members = each_member(text, |name, value| match taken(&name) {
            true => Ok(()),
            false => self.add_member(&name, value),
        });
        match members {
            Ok(()) => Ok(()),
            Err(None) => Err(ObjectError::NoObject),
            Err(Some(error)) => Err(ObjectError::Line(error)),
        }
    }

    fn add_member(&mut self, name: &str, value: &RawValue) -> Result<(), LineError> {
        if name.len() > self.room() {
            return Err(LineError::Full);
        }
        let legal = self.legal_name(name)?;
        let mut values = Vec::new();
        let mut room = self.room();
        // each is a line; what has no room is not looked at
        let mut push = |value: &RawValue| {
            let Some(value) = scalar(value) else {
                return Ok(());
            };
            let len = legal.len() + value.len() + 4;
            room = room.checked_sub(len).ok_or(LineError::Full)?;
            values.push(value.into_owned());
            Ok(())
        };
        if !value.get().starts_with('[') {
            push(value)?;
        } else if let Err(Some(error)) = each_element(value, &mut push) {
            return Err(error);
        }
        // one header's values are all encoded or none is, as the list names headers
        let plain = values.iter().all(|value| is_plain(value));
        for value in &values {
            self.add_as(&legal, value, plain)?;
        }
        Ok(())
    }

    /// The name as a header may bear it.
    fn legal_name<'n>(&self, name: &'n str) -> Result<Cow<'n, str>, LineError> {
        let reserved = starts_with(name, "nats-") || starts_with(name, "outbox-");
        let plain = |c: char| u8::try_from(c).is_ok_and(is_name_byte) && c != '%';
        if !name.is_empty() && !reserved && name.chars().all(plain) {
            return Ok(Cow::Borrowed(name));
        }
        if !self.encode {
            return Err(LineError::NotPlain {
                name: name.to_string(),
            });
        }
        let mut out = Vec::new();
        let escape = |before: Option<char>, c, _| !plain(c) || (reserved && before.is_none());
        percent::write(name, usize::MAX, escape, &mut out);
        Ok(Cow::Owned(String::from_utf8(out).unwrap_or_default()))
    }

    /// Ends the lines: names the headers whose values are encoded.
    ///
    /// # Errors
    /// [`Full`] when all that was written is more than [`MAX_LEN`].
    pub fn finish(self) -> Result<(), Full> {
        self.out.extend_from_slice(self.encoded.as_bytes());
        match self.out.len() - self.start > MAX_LEN {
            true => Err(Full),
            false => Ok(()),
        }
    }
}

fn write_attribute(value: &str, out: &mut Vec<u8>) {
    let escape = |_, c: char, _| !matches!(c, '!'..='~') || c == '"';
    if !value.is_empty() {
        percent::write(value, usize::MAX, escape, out);
    }
}

/// Why the headers of a row cannot be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectError {
    /// The text is JSON of another kind, or none.
    NoObject,
    /// A member cannot be added.
    Line(LineError),
}

impl From<LineError> for ObjectError {
    fn from(error: LineError) -> ObjectError {
        ObjectError::Line(error)
    }
}

/// Calls `each` with the members of a JSON object in their order, each value as it is written, until it fails. Nothing is
/// held of them: there may be any number.
///
/// # Errors
/// That of `each`; `None` when the text is no object. It may have been called by then.
pub fn each_member<'a, E>(
    text: &'a str,
    each: impl FnMut(Cow<'a, str>, &'a RawValue) -> Result<(), E>,
) -> Result<(), Option<E>> {
    struct Members<'f, F, E>(F, &'f mut Option<E>);
    impl<'de, E, F> Visitor<'de> for Members<'_, F, E>
    where
        F: FnMut(Cow<'de, str>, &'de RawValue) -> Result<(), E>,
    {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
            while let Some((Name(name), value)) = map.next_entry()? {
                if let Err(error) = (self.0)(name, value) {
                    *self.1 = Some(error);
                    return Err(serde::de::Error::custom("that is enough"));
                }
            }
            Ok(())
        }
    }
    let mut failed = None;
    let mut json = serde_json::Deserializer::from_str(text);
    let read = json.deserialize_map(Members(each, &mut failed));
    match read.and_then(|()| json.end()) {
        Ok(()) => Ok(()),
        Err(_) => Err(failed),
    }
}

/// A member's name, borrowed where it is written without escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// The same with the elements of an array.
fn each_element<'a, E>(
    array: &'a RawValue,
    each: impl FnMut(&'a RawValue) -> Result<(), E>,
) -> Result<(), Option<E>> {
    struct Elements<'f, F, E>(F, &'f mut Option<E>);
    impl<'de, E, F> Visitor<'de> for Elements<'_, F, E>
    where
        F: FnMut(&'de RawValue) -> Result<(), E>,
    {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array")
        }

        fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<(), A::Error> {
            while let Some(element) = seq.next_element()? {
                if let Err(error) = (self.0)(element) {
                    *self.1 = Some(error);
                    return Err(serde::de::Error::custom("that is enough"));
                }
            }
            Ok(())
        }
    }
    let mut failed = None;
    let mut json = serde_json::Deserializer::from_str(array.get());
    match json.deserialize_seq(Elements(each, &mut failed)) {
        Ok(()) => Ok(()),
        Err(_) => Err(failed),
    }
}

/// A JSON value as text: the characters of a string, else what is written, compact; `None` for `null`.
pub fn scalar(value: &RawValue) -> Option<Cow<'_, str>> {
    match value.get() {
        "null" => None,
        text if text.starts_with('"') => {
            // an escape that stands for no character, \ud800, is kept as it is written
            let string = serde_json::from_str::<Cow<'_, str>>(text);
            Some(string.unwrap_or(Cow::Borrowed(text)))
        }
        text if text.starts_with(['{', '[']) => {
            let mut compact = Vec::new();
            json::compact_into(text.as_bytes(), &mut compact);
            Some(Cow::Owned(String::from_utf8(compact).unwrap_or_default()))
        }
        text => Some(Cow::Borrowed(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(
        encode: bool,
        write: impl FnOnce(&mut Lines<'_>) -> Result<(), ObjectError>,
    ) -> Result<String, ObjectError> {
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out, encode, true);
        write(&mut lines)?;
        lines.finish().expect("few");
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn names_that_are_not_the_writers_are_refused() {
        for (name, expected) in [
            ("X-Tenant", Ok(())),
            ("traceparent", Ok(())),
            ("!#$%&'*+-.^_`|~", Ok(())),
            ("Natsy", Ok(())),
            ("Nats-TTL", Ok(())),
            ("nats-schedule-target", Ok(())),
            ("Nats-Msg-Id", Err(NameError::Nats)),
            ("nats-expected-last-sequence", Err(NameError::Nats)),
            ("Nats-Rollup", Err(NameError::Nats)),
            ("Nats-Incr", Err(NameError::Nats)),
            ("Outbox-Position", Err(NameError::Outbox)),
            ("outbox-x", Err(NameError::Outbox)),
            ("", Err(NameError::Illegal)),
            ("a b", Err(NameError::Illegal)),
            ("a:b", Err(NameError::Illegal)),
            ("a\r\n", Err(NameError::Illegal)),
            ("größe", Err(NameError::Illegal)),
        ] {
            assert_eq!(check_name(name), expected, "{name:?}");
        }
    }

    #[test]
    fn values_stand_as_they_are_where_a_line_carries_them() {
        for (value, expected) in [
            ("", "\r\nX: "),
            ("a b", "\r\nX: a b"),
            ("50% größe 日本", "\r\nX: 50% größe 日本"),
            (
                "a\r\nNats-Rollup: all",
                "\r\nX: a%0D%0ANats-Rollup: all\r\nOutbox-Encoded: X",
            ),
            (" 50%", "\r\nX: %2050%25\r\nOutbox-Encoded: X"),
            ("a ", "\r\nX: a%20\r\nOutbox-Encoded: X"),
            ("\t", "\r\nX: %09\r\nOutbox-Encoded: X"),
            (
                "a\u{2028}b\u{85}",
                "\r\nX: a%E2%80%A8b%C2%85\r\nOutbox-Encoded: X",
            ),
        ] {
            let add = |lines: &mut Lines<'_>| Ok(lines.add("X", value)?);
            assert_eq!(lines(true, add).as_deref(), Ok(expected), "{value:?}");
            let strict = lines(false, add);
            match expected.contains(ENCODED) {
                false => assert_eq!(strict.as_deref(), Ok(expected)),
                true => assert_eq!(strict, Err(LineError::NotPlain { name: "X".into() }.into())),
            }
        }
    }

    #[test]
    fn what_is_beyond_the_limit_is_not_looked_at() {
        let members: Vec<_> = (0..200_000).map(|n| format!("\"k{n}\":\"\\n\"")).collect();
        let many = format!("{{{}}}", members.join(","));
        let array = format!("{{\"k\":[{}1]}}", "\"\\n\",".repeat(200_000));
        let long = format!("{{\"k\":\"{}\"}}", "\\n".repeat(100_000));
        let named = format!("{{\"{}\":1}}", "n".repeat(100_000));
        for json in [many, array, long, named] {
            let mut out = Vec::new();
            let mut lines = Lines::new(&mut out, true, false);
            let added = lines.add_object(&json, |_| false);
            assert_eq!(added, Err(LineError::Full.into()));
            assert!(out.len() <= MAX_LEN + 100, "{}", out.len());
        }
        // to the byte, the list of what is encoded included
        for (len, fits) in [(MAX_LEN - 5, true), (MAX_LEN - 4, false)] {
            let json = format!("{{\"k\":\"{}\"}}", "x".repeat(len));
            let mut out = Vec::new();
            let mut lines = Lines::new(&mut out, true, false);
            let added = lines.add_object(&json, |_| false).is_ok();
            assert_eq!((added, lines.finish().is_ok()), (fits, true), "{len}");
        }
    }

    #[test]
    fn members_of_an_object_become_headers() {
        for (json, expected) in [
            ("{}", Some("")),
            (
                r#"{ "a" : "x y", "b":12345678901234567890.10, "c": true , "d":null}"#,
                Some("\r\na: x y\r\nb: 12345678901234567890.10\r\nc: true"),
            ),
            (
                r#"{"a": ["x", 1, null, {"k": [1, 2]}, [ ]], "b": []}"#,
                Some("\r\na: x\r\na: 1\r\na: {\"k\":[1,2]}\r\na: []"),
            ),
            (r#"{"a": {"k": "v w"}}"#, Some("\r\na: {\"k\":\"v w\"}")),
            (r#"{"a": "\u00e9\ud83d\ude00\/"}"#, Some("\r\na: é😀/")),
            (
                r#"{"a": ["50%", "\n"], "b": "50%"}"#,
                Some("\r\na: 50%25\r\na: %0A\r\nb: 50%\r\nOutbox-Encoded: a"),
            ),
            (
                r#"{"Nats-Msg-Id": "x", "OUTBOX-x": "y", "a b": "z", "": 1, "a%": 2, "ö:\r\n": 3}"#,
                Some(
                    "\r\n%4Eats-Msg-Id: x\r\n%4FUTBOX-x: y\r\na%20b: z\r\n%: 1\r\na%25: 2\r\n%C3%B6%3A%0D%0A: 3",
                ),
            ),
            (r#"{"ce-tenant": "a b"}"#, Some("\r\nce-tenant: a%20b")),
            (r#"{"Taken": 1, "x": 2}"#, Some("\r\nx: 2")),
            (r#"{"a": "\ud800"}"#, Some("\r\na: \"\\ud800\"")),
            ("[]", None),
            ("null", None),
            ("\"x\"", None),
            ("{", None),
            ("{} x", None),
            ("", None),
        ] {
            let found = lines(true, |lines| lines.add_object(json, |name| name == "Taken"));
            assert_eq!(found.ok().as_deref(), expected, "{json}");
        }
    }

    #[test]
    fn attributes_of_a_cloud_event_are_encoded_by_its_own_rule() {
        for (value, expected) in [
            ("/shop", "/shop"),
            ("", ""),
            ("a b\"c%", "a%20b%22c%25"),
            ("Euro € 😀", "Euro%20%E2%82%AC%20%F0%9F%98%80"),
        ] {
            let mut out = Vec::new();
            write_attribute(value, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }
}
