//! The event without a table: what `pg_logical_emit_message(true, prefix, json)` writes into the log.
//!
//! Postgres 14 and later hand such messages to pgoutput in their place in the transaction, with no table, index,
//! insert or delete. The content is a JSON object with `id`, `aggregatetype`, `aggregateid`, `payload` and
//! `headers`, and any other member that the subject template or a header names. Strings count by their
//! characters, other values by their text; the payload is sent on as the compact form of the very bytes, so
//! that digits, the order of keys and escapes survive.
//!
//! Postgres does not convert the content to the client's encoding: it is in that of the database, and what is
//! not UTF-8 is malformed.

use super::header::{each_member, scalar};
use super::problem::ValueProblem;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::convert::Infallible;

/// The SQL of [`publish_function`], for the default prefix.
const PUBLISH_FUNCTION: &str = include_str!("outbox_publish.sql");
const DEFAULT_PREFIX: &str = "'jetstream_outbox'";

/// What `pg_get_function_identity_arguments` and `pg_get_function_result` say of it.
pub const PUBLISH_SIGNATURE: &str =
    "(aggregatetype text, aggregateid text, payload json, headers jsonb, id uuid) RETURNS uuid";

/// The statement that creates the SQL function `outbox_publish(aggregatetype, aggregateid, payload [, headers] [, id])`,
/// which emits a message with this prefix and returns the event's id. It checks what the table would.
///
/// The payload is `json` and not `jsonb`, which would sort keys and drop white space and repeated keys.
pub fn publish_function(prefix: &str) -> String {
    let literal = format!("'{}'", prefix.replace('\'', "''"));
    PUBLISH_FUNCTION.replace(DEFAULT_PREFIX, &literal)
}

/// The members called `names`, in the order of `names`, each as text; `None` where it is missing or `null`. Those
/// at `raw` are JSON as it was written. Of a repeated member the last counts, as in `jsonb`.
///
/// # Errors
/// [`ValueProblem::Malformed`] when the content is no JSON object in UTF-8.
pub fn read<'a>(
    content: &'a [u8],
    names: &[String],
    raw: impl Fn(usize) -> bool,
) -> Result<Vec<Option<Cow<'a, str>>>, ValueProblem> {
    let text = std::str::from_utf8(content).map_err(|_| ValueProblem::Malformed)?;
    let mut found = vec![None; names.len()];
    let member = |name: Cow<'a, str>, value: &'a RawValue| {
        for (index, slot) in found.iter_mut().enumerate() {
            if names.get(index).is_some_and(|wanted| *wanted == name) {
                *slot = match (raw(index), value.get()) {
                    (true, "null") => None,
                    (true, text) => Some(Cow::Borrowed(text)),
                    (false, _) => scalar(value),
                };
            }
        }
        Ok::<(), Infallible>(())
    };
    each_member(text, member).map_err(|_| ValueProblem::Malformed)?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_whatever_their_order() {
        let names = ["id", "payload", "n"].map(str::to_string);
        for (content, expected) in [
            (
                r#" {"payload" : {"b": 1.0, "a": [ 1e5 ]} ,"x":{}, "n": 12345678901234567890, "id":"\u00e9"} "#,
                [
                    Some("é"),
                    Some(r#"{"b": 1.0, "a": [ 1e5 ]}"#),
                    Some("12345678901234567890"),
                ],
            ),
            (
                r#"{"payload": "x", "id": true}"#,
                [Some("true"), Some("\"x\""), None],
            ),
            (r#"{"payload": null, "id": null}"#, [None, None, None]),
            (r#"{"id": 1, "id": "2"}"#, [Some("2"), None, None]),
            ("{}", [None, None, None]),
        ] {
            let found = read(content.as_bytes(), &names, |index| index == 1).unwrap();
            let found: Vec<_> = found.iter().map(|text| text.as_deref()).collect();
            assert_eq!(found, expected, "{content}");
        }
    }

    #[test]
    fn what_is_no_object_is_malformed() {
        for content in [
            &b""[..],
            b"x",
            b"[]",
            b"{",
            b"{}}",
            b"{\"a\":}",
            b"{\"a\":\"\xff\"}",
            b"null",
        ] {
            assert_eq!(
                read(content, &[], |_| false),
                Err(ValueProblem::Malformed),
                "{content:?}"
            );
        }
    }

    #[test]
    fn the_function_emits_messages_with_the_given_prefix() {
        assert!(
            publish_function("jetstream_outbox")
                .contains("emit_message(true, 'jetstream_outbox', ")
        );
        let other = publish_function("o'clock");
        assert!(other.contains("emit_message(true, 'o''clock', ") && !other.contains("jetstream"));
    }
}
