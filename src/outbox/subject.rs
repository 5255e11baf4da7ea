//! What stands in the subject that an event is published under: `prefix.aggregatetype.aggregateid`, or as
//! [`super::template`] says.
//!
//! The rule, which [`super::percent::decode`] or any percent-decoder undoes for each value:
//!
//! - A dot in a value separates tokens of the subject, so that `a.b` and `c` make `prefix.a.b.c`. Where it would
//!   make an empty token, at the beginning or the end of a value or behind another dot, it is written `%2E`.
//! - `*`, `>`, `%`, control characters and white space (all of Unicode's, and U+FEFF) are written as their
//!   UTF-8 bytes, each `%` and two upper-case hexadecimal digits. All other characters stand as they are.
//! - An empty value is a single `%`.
//! - A value that would be longer than 1,400 bytes so written keeps its beginning and ends in `%~` and the
//!   SHA-256 of the whole value in hexadecimal: the one form that cannot be undone.
//!
//! The prefix stands as configured, once [`validate_prefix`] has passed it; since it comes first, no value
//! reaches the server's own subjects (`$JS`, `$SYS`). What a subject may hold:
//! <https://docs.nats.io/nats-concepts/subjects>.

use super::percent;
use std::fmt;

/// The longest prefix, in bytes.
pub const MAX_PREFIX_LEN: usize = 255;

/// The longest subject that a [`super::template::Subject`] makes, in bytes.
///
/// The server takes 4,096 bytes for a whole `HPUB` line (`max_control_line`), and the `nats` crate reads no
/// longer one. What is left is for the longest of: our reply inbox; a consumer's `$JS.ACK.` reply subject and
/// a `$JS.API.CONSUMER.CREATE.` request, either with a stream's and a consumer's name of 255 bytes.
pub const MAX_SUBJECT_LEN: usize = MAX_PREFIX_LEN + 2 * (1 + percent::MAX_LEN);

/// Why a prefix cannot begin a subject. Display completes a sentence that begins with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubjectError {
    /// It is empty, begins or ends with a dot, or has two in a row.
    EmptyToken,
    /// It holds a wildcard, white space or a control character.
    Illegal {
        /// The first such character.
        character: char,
    },
    /// It begins with a token that is the server's or the clients' own.
    Reserved {
        /// That token.
        token: String,
    },
    /// It is longer than [`MAX_PREFIX_LEN`].
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
}

impl fmt::Display for SubjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubjectError::EmptyToken => f.write_str(
                "has an empty token; give words with single dots between them, like events.shop",
            ),
            SubjectError::Illegal { character } => write!(
                f,
                "holds {character:?}, which cannot stand in a subject; use neither wildcards, white space nor control characters"
            ),
            SubjectError::Reserved { token } => write!(
                f,
                "begins with {token}, under which subjects belong to NATS itself; begin with another word"
            ),
            SubjectError::TooLong { len } => {
                write!(f, "is {len} bytes long; use at most {MAX_PREFIX_LEN}")
            }
        }
    }
}

impl std::error::Error for SubjectError {}

/// Whether subjects can begin with `prefix`: one or more tokens, legal as they are.
pub fn validate_prefix(prefix: &str) -> Result<(), SubjectError> {
    if prefix.len() > MAX_PREFIX_LEN {
        return Err(SubjectError::TooLong { len: prefix.len() });
    }
    if let Some(character) = prefix.chars().find(|&c| is_illegal(c)) {
        return Err(SubjectError::Illegal { character });
    }
    if prefix.split('.').any(str::is_empty) {
        return Err(SubjectError::EmptyToken);
    }
    match prefix.split('.').next() {
        Some(token) if token.starts_with('$') || token == "_INBOX" => Err(SubjectError::Reserved {
            token: token.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Appends a value, which may be anything, in at most `max_len` bytes. Tells whether it stands there as it is.
pub(super) fn write_value(value: &str, max_len: usize, out: &mut Vec<u8>) -> bool {
    if value.len() <= max_len && is_legal(value.as_bytes()) {
        out.extend_from_slice(value.as_bytes());
        return true;
    }
    let start = out.len();
    percent::write(value, max_len, must_escape, out);
    out.get(start..) == Some(value.as_bytes())
}

/// What can stand nowhere in a subject.
pub(super) fn is_illegal(c: char) -> bool {
    matches!(c, '*' | '>') || percent::is_space_or_control(c)
}

fn must_escape(before: Option<char>, c: char, after: Option<char>) -> bool {
    is_illegal(c) || (c == '.' && (matches!(before, None | Some('.')) || after.is_none()))
}

/// The bytes that stand as they are, dots aside.
const fn is_legal_byte(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'*' | b'>' | b'%')
}

/// Whether nothing in `value` needs to be escaped, decided from the bytes alone: `false` for what is not ASCII.
fn is_legal(value: &[u8]) -> bool {
    let mut before = b'.';
    for &byte in value {
        if !is_legal_byte(byte) || (byte == b'.' && before == b'.') {
            return false;
        }
        before = byte;
    }
    before != b'.'
}

#[cfg(test)]
mod tests {
    use super::super::template::Template;
    use super::*;
    use std::convert::Infallible;

    fn subject(aggregatetype: &str, aggregateid: &str) -> String {
        let values = [aggregatetype, aggregateid];
        let slot = |name: &str| usize::from(name == "aggregateid");
        let compiled = Template::default().compile("events", slot);
        let mut out = Vec::new();
        let Ok(_) = compiled.write(|slot| Ok::<_, Infallible>(values[slot]), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn subjects() {
        for (aggregatetype, aggregateid, expected) in [
            ("account", "17", "events.account.17"),
            (
                "Account_Created-v2",
                "$1/a:b@c",
                "events.Account_Created-v2.$1/a:b@c",
            ),
            ("shop.order", "a.b", "events.shop.order.a.b"),
            ("Größe", "日本", "events.Größe.日本"),
            ("a b", "1\r\nPUB x 0", "events.a%20b.1%0D%0APUB%20x%200"),
            ("*", ">", "events.%2A.%3E"),
            ("a*b", "100%", "events.a%2Ab.100%25"),
            ("", "", "events.%.%"),
            ("%", "%2E", "events.%25.%252E"),
            (".a", "b.", "events.%2Ea.b%2E"),
            ("a..b", "...", "events.a.%2Eb.%2E%2E%2E"),
            (".", "a..", "events.%2E.a.%2E"),
            ("\u{85}\u{2028}", "\u{7f}", "events.%C2%85%E2%80%A8.%7F"),
            ("$JS", "API.>", "events.$JS.API.%3E"),
        ] {
            assert_eq!(subject(aggregatetype, aggregateid), expected);
        }
    }

    #[test]
    fn both_values_keep_their_place_however_long() {
        let long = subject(&"type ".repeat(1_000), &"x".repeat(100_000));
        assert!(long.len() <= MAX_SUBJECT_LEN);
        let tokens: Vec<&str> = long.split('.').collect();
        let [_, aggregatetype, aggregateid] = tokens[..] else {
            panic!("{long}")
        };
        assert!(aggregatetype.starts_with("type%20type") && aggregateid.starts_with("xxx"));
    }

    #[test]
    fn a_line_with_the_longest_subject_fits() {
        let names = "n".repeat(255);
        let create = format!(
            "HPUB $JS.API.CONSUMER.CREATE.{names}.{names}. {} 99999999 99999999\r\n",
            "i".repeat(64)
        );
        let ack = format!(
            "HMSG  {0} $JS.ACK.{names}.12345678.{names}.{names}.{0}.{0}.{0}.{0}.{0}.12345678 99999999 99999999\r\n",
            u64::MAX
        );
        for line in [create, ack] {
            assert!(line.len() + MAX_SUBJECT_LEN <= 4_096, "{}", line.len());
        }
    }

    #[test]
    fn prefixes() {
        use SubjectError::*;
        let reserved = |token: &str| {
            Err(Reserved {
                token: token.into(),
            })
        };
        for (prefix, expected) in [
            ("events", Ok(())),
            ("events.shop-1.größe", Ok(())),
            ("a$b._INBOX", Ok(())),
            (&"p".repeat(255), Ok(())),
            (&"p".repeat(256), Err(TooLong { len: 256 })),
            ("", Err(EmptyToken)),
            (".a", Err(EmptyToken)),
            ("a.", Err(EmptyToken)),
            ("a..b", Err(EmptyToken)),
            ("a b", Err(Illegal { character: ' ' })),
            ("a\r\n", Err(Illegal { character: '\r' })),
            ("a.*", Err(Illegal { character: '*' })),
            ("a.>", Err(Illegal { character: '>' })),
            (
                "a\u{2028}",
                Err(Illegal {
                    character: '\u{2028}',
                }),
            ),
            ("$JS.API", reserved("$JS")),
            ("$", reserved("$")),
            ("_INBOX.a", reserved("_INBOX")),
        ] {
            assert_eq!(validate_prefix(prefix), expected, "{prefix:?}");
        }
    }
}
