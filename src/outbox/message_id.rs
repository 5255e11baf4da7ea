//! The id an event bears on the wire, in the `Nats-Msg-Id` header: the row's `id` as text.
//!
//! A uuid, a number, any word stands as it is. What a header line cannot carry unchanged is percent-encoded
//! as in a subject (see [`super::percent`], which undoes it): control characters, white space other than
//! the plain space, a plain space at either end, which clients and server trim, and `%`. An id longer than
//! 1,400 bytes so written is shortened by the same rule, well under the 64 KiB the server allows for all headers.

use super::percent;

/// Appends the id to `out`. JetStream takes an empty one for none, so the mapper refuses those before.
pub fn write_message_id(id: &str, out: &mut Vec<u8>) {
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'%';
    if id.len() <= percent::MAX_LEN && !id.is_empty() && id.bytes().all(plain) {
        out.extend_from_slice(id.as_bytes());
    } else {
        percent::write(id, percent::MAX_LEN, must_escape, out);
    }
}

/// What no header line carries unchanged.
pub(super) fn must_escape(before: Option<char>, c: char, after: Option<char>) -> bool {
    match c {
        ' ' => before.is_none() || after.is_none(),
        _ => percent::is_space_or_control(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for (id, expected) in [
            (
                "cbe5a5b0-2e9a-4a0b-8f5e-6a3f1e3c9b11",
                "cbe5a5b0-2e9a-4a0b-8f5e-6a3f1e3c9b11",
            ),
            ("17", "17"),
            ("order 17.*>", "order 17.*>"),
            ("größe", "größe"),
            ("  a  ", "%20 a %20"),
            (" ", "%20"),
            ("1\r\nNats-Rollup: all", "1%0D%0ANats-Rollup: all"),
            ("a\u{a0}b\u{2028}\tc", "a%C2%A0b%E2%80%A8%09c"),
            ("50%", "50%25"),
        ] {
            let mut out = Vec::new();
            write_message_id(id, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), expected);
            assert_eq!(percent::decode(expected).as_deref(), Some(id));
        }
    }

    #[test]
    fn a_long_id_is_bounded() {
        let mut out = Vec::new();
        write_message_id(&"1".repeat(70_000), &mut out);
        assert_eq!(out.len(), percent::MAX_LEN);
    }
}
