//! Percent-encoding of a value that stands in a subject or in a header, and the way back.
//!
//! A character that may not stand there is written as its UTF-8 bytes, each `%` and two upper-case
//! hexadecimal digits (RFC 3986 §2.1); so is `%` itself, which is what makes the rule one to undo. Two
//! forms use a `%` that no escape begins with:
//!
//! - an empty value is a single `%`;
//! - a value whose encoded form exceeds its bound ([`MAX_LEN`] bytes, mostly) keeps its beginning and ends in `%~` and the
//!   SHA-256 of the whole value in hexadecimal: it cannot be read back, but the event is delivered, and
//!   different values stay different.
//!
//! Which characters may not stand is for [`super::subject`] and [`super::message_id`] to say.

use crate::uri::percent_decode;
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};

/// The longest encoded value, in bytes.
///
/// Two of them with the longest prefix make a subject of [`super::subject::MAX_SUBJECT_LEN`], whose reason
/// stands there. A `varchar(255)` of up to 75 non-ASCII white space characters fits, whatever the others are.
pub const MAX_LEN: usize = 1_400;

/// What takes the place of the end of a value that is too long: `%~` and the hash.
const MARK_LEN: usize = 2 + 2 * SHA256_OUTPUT_LEN;

const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// White space and control characters in the widest sense of any NATS client.
///
/// The server splits at ASCII white space alone, but clients split the lines they get with what their
/// language calls white space: Rust and Python all of Unicode's, JavaScript the byte order mark too.
pub(super) fn is_space_or_control(c: char) -> bool {
    c.is_whitespace() || c.is_control() || c == '\u{FEFF}'
}

/// Appends `value` with every `%` escaped, and every character for which `must_escape` holds; that
/// gets the character before, the character, and the one after. What is longer than `max_len` so written is
/// shortened.
pub(super) fn write(
    value: &str,
    max_len: usize,
    must_escape: impl Fn(Option<char>, char, Option<char>) -> bool,
    out: &mut Vec<u8>,
) {
    if value.is_empty() {
        return out.push(b'%');
    }
    let start = out.len();
    let kept_len = max_len.saturating_sub(MARK_LEN);
    let mut cut = start;
    let mut before = None;
    let mut chars = value.chars().peekable();
    while let Some(c) = chars.next() {
        if out.len() - start <= kept_len {
            cut = out.len();
        }
        let mut utf8 = [0; 4];
        let utf8 = c.encode_utf8(&mut utf8).as_bytes();
        if c == '%' || must_escape(before, c, chars.peek().copied()) {
            for &byte in utf8 {
                out.push(b'%');
                push_hex(byte, out);
            }
        } else {
            out.extend_from_slice(utf8);
        }
        if out.len() - start > max_len {
            out.truncate(cut);
            out.extend_from_slice(b"%~");
            for &byte in digest(&SHA256, value.as_bytes()).as_ref() {
                push_hex(byte, out);
            }
            return;
        }
        before = Some(c);
    }
}

fn push_hex(byte: u8, out: &mut Vec<u8>) {
    for nibble in [byte >> 4, byte & 15] {
        out.extend(HEX.get(usize::from(nibble)));
    }
}

/// The value behind `encoded`: an aggregate type or id as the subject bears it, without the dot that ends
/// it, or a message id. `None` when it was shortened, or is not of the form.
pub fn decode(encoded: &str) -> Option<String> {
    if encoded == "%" {
        return Some(String::new());
    }
    percent_decode(encoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT_LEN: usize = MAX_LEN - MARK_LEN;

    fn encoded(value: &str) -> String {
        let mut out = b"kept".to_vec();
        write(
            value,
            MAX_LEN,
            |_, c, _| c == '!' || is_space_or_control(c),
            &mut out,
        );
        let text = String::from_utf8(out).unwrap();
        text.strip_prefix("kept").unwrap().to_string()
    }

    #[test]
    fn escapes_are_the_utf8_bytes_in_upper_case_hex() {
        for (value, expected) in [
            ("plain/é€😀", "plain/é€😀"),
            ("!", "%21"),
            ("100%", "100%25"),
            ("", "%"),
            ("\0\t\r\n \u{7f}", "%00%09%0D%0A%20%7F"),
            ("\u{85}\u{a0}", "%C2%85%C2%A0"),
            ("\u{2028}\u{3000}\u{feff}", "%E2%80%A8%E3%80%80%EF%BB%BF"),
        ] {
            assert_eq!(encoded(value), expected, "{value:?}");
            assert_eq!(decode(expected).as_deref(), Some(value));
        }
    }

    #[test]
    fn what_is_not_of_the_form_is_not_read() {
        for text in ["%2", "a%", "%%", "%G0", "%+1", "%é", "%C2", "a%~00"] {
            assert_eq!(decode(text), None, "{text:?}");
        }
        assert_eq!(decode("%c3%a9").as_deref(), Some("é"));
    }

    #[test]
    fn a_value_too_long_keeps_its_beginning_and_a_hash() {
        let fits = "a".repeat(MAX_LEN);
        assert_eq!(encoded(&fits), fits);

        let long = encoded(&"a".repeat(MAX_LEN + 1));
        assert_eq!(long.len(), MAX_LEN);
        // what `sha256sum` says of 1,401 times the letter a
        assert_eq!(
            long,
            "a".repeat(KEPT_LEN)
                + "%~"
                + "EE2D28EA4C4634F9FF1693D163DE1CB70DDC3ED0A660118A512F85FFEF3C0C17"
        );
        assert_eq!(decode(&long), None);
        assert_ne!(long, encoded(&("a".repeat(MAX_LEN) + "b")));
    }

    #[test]
    fn the_cut_falls_between_characters() {
        for (value, kept) in [
            ("!".repeat(MAX_LEN), "%21".repeat(KEPT_LEN / 3)),
            ("\u{2028}".repeat(200), "%E2%80%A8".repeat(KEPT_LEN / 9)),
            (
                format!("a{}", "é".repeat(MAX_LEN)),
                format!("a{}", "é".repeat((KEPT_LEN - 1) / 2)),
            ),
        ] {
            let encoded = encoded(&value);
            assert_eq!(encoded.split_once("%~").unwrap().0, kept);
            assert!(encoded.len() <= MAX_LEN);
        }
    }
}
