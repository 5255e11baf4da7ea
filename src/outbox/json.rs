//! Compact JSON without reading it as JSON: white space between tokens goes, every other byte stays.
//!
//! Parsing and printing would lose what the writer wrote: digits of large numbers, the order of keys,
//! duplicate keys, escapes. Only strings must be told from what lies between them, since RFC 8259 §2 allows
//! white space (space, tab, line feed, carriage return) anywhere there. Not a validator: `json` and
//! `jsonb` columns are valid by Postgres' word, and of anything else no byte but white space is dropped.

use memchr::memchr2;

/// Appends `json` to `out` without the white space outside of strings.
///
/// Bytes are copied in runs: `jsonb` prints one space after each `:` and `,` and none elsewhere.
pub fn compact_into(json: &[u8], out: &mut Vec<u8>) {
    out.reserve(json.len());
    let mut rest = json;
    while let Some(at) = rest.iter().position(|b| b" \t\n\r\"".contains(b)) {
        let (before, found) = rest.split_at(at);
        match found.split_first() {
            Some((b'"', string)) => {
                let (whole, after) = rest.split_at(at + 1 + string_len(string));
                out.extend_from_slice(whole);
                rest = after;
            }
            Some((_, after)) => {
                out.extend_from_slice(before);
                rest = after;
            }
            None => break,
        }
    }
    out.extend_from_slice(rest);
}

/// How far the string whose opening quote has been read reaches, its closing quote included; all of
/// `string` when nothing closes it.
fn string_len(string: &[u8]) -> usize {
    let mut len = 0;
    while let Some((at, rest)) = string
        .get(len..)
        .and_then(|rest| Some((memchr2(b'"', b'\\', rest)?, rest)))
    {
        len += at + 1;
        match rest.get(at) {
            // whatever is escaped, a quote above all, does not close the string
            Some(b'\\') => len += 1,
            _ => return len,
        }
    }
    string.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, expected: &str) {
        let mut out = b"kept".to_vec();
        compact_into(json.as_bytes(), &mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            format!("kept{expected}"),
            "{json:?}"
        );
    }

    #[test]
    fn white_space_between_tokens_goes() {
        for (json, expected) in [
            (
                r#"{"msg": "A test account creation event"}"#,
                r#"{"msg":"A test account creation event"}"#,
            ),
            ("[1, 2, {\"a\": []}]", "[1,2,{\"a\":[]}]"),
            (" \t\r\n{ \"a\"\n:\t1 }\r\n", "{\"a\":1}"),
            ("null", "null"),
            (" true ", "true"),
            ("", ""),
            (" \n", ""),
        ] {
            check(json, expected);
        }
    }

    #[test]
    fn nothing_else_changes() {
        for json in [
            "123456789012345678901234567890.10e+05",
            r#"{"b":1,"a":2,"b":3}"#,
            r#""\u00e9\/<>& \t""#,
            r#"" a, b: c ""#,
            "\"a\tb\"",
            r#"{"q\" : ":"\\"}"#,
            "\"\u{a0}\u{2028}é\"",
        ] {
            check(json, json);
        }
    }

    #[test]
    fn a_backslash_hides_the_quote_behind_it_only() {
        check(r#"["\\" , "\\\" ", 1 ]"#, r#"["\\","\\\" ",1]"#);
    }

    #[test]
    fn malformed_text_is_kept() {
        for (json, expected) in [
            (r#"{ "a"#, r#"{"a"#),
            (r#"[ " \"#, r#"[" \"#),
            (r#"[ " \\"#, r#"[" \\"#),
            (r#"[ " \""#, r#"[" \""#),
            (r#" \ " "#, r#"\" "#),
            ("\"", "\""),
        ] {
            check(json, expected);
        }
    }
}
