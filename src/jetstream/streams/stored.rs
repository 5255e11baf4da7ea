//! A message read back from a stream (`StoredMsg`; ADR-31 for what is not used: direct get).

use super::{Request, ask, none_if, parse};
use crate::jetstream::ack::AckError;
use crate::jetstream::client::Api;
use crate::jetstream::error::Error;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::json;
use std::fmt;
use std::time::Duration;

/// A message read back from a stream.
#[derive(Clone, PartialEq, Eq)]
pub struct StoredMessage {
    /// The subject it was published on.
    pub subject: String,
    /// Its sequence.
    pub seq: u64,
    /// When it was stored, RFC 3339.
    pub time: String,
    /// Its headers in order, names as written.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub data: Vec<u8>,
}

impl fmt::Debug for StoredMessage {
    /// Names the message; the body never reaches a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredMessage")
            .field("subject", &self.subject)
            .field("seq", &self.seq)
            .field("headers", &self.headers)
            .field("data_len", &self.data.len())
            .finish()
    }
}

impl StoredMessage {
    /// The first header of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.headers.iter().find(found).map(|(_, v)| v.as_str())
    }
}

/// Asks for a stream's last message on a subject, which may have wildcards.
pub fn last_message_request(stream: &str, subject: &str) -> Request {
    let body = json!({ "last_by_subj": subject });
    (format!("STREAM.MSG.GET.{stream}"), body.to_string().into())
}

/// Asks for the message with a sequence.
pub fn message_request(stream: &str, seq: u64) -> Request {
    let body = json!({ "seq": seq });
    (format!("STREAM.MSG.GET.{stream}"), body.to_string().into())
}

/// Asks for the first message at or behind a sequence on a subject, which may have wildcards.
pub fn next_message_request(stream: &str, seq: u64, subject: &str) -> Request {
    let body = json!({ "seq": seq, "next_by_subj": subject });
    (format!("STREAM.MSG.GET.{stream}"), body.to_string().into())
}

/// Reads the answer to [`last_message_request`] or [`message_request`]; `None` if there is no such message.
pub fn parse_message(body: &[u8]) -> Result<Option<StoredMessage>, AckError> {
    let Some(StoredAnswer { message }) = none_if(10037, parse(body))? else {
        return Ok(None);
    };
    let data = decode(&message.data)?;
    let head = message.head()?;
    Ok(Some(StoredMessage { data, ..head }))
}

/// The same without the message's body.
pub fn parse_message_head(body: &[u8]) -> Result<Option<StoredMessage>, AckError> {
    let answer: Option<StoredAnswer> = none_if(10037, parse(body))?;
    answer.map(|answer| answer.message.head()).transpose()
}

#[derive(Deserialize)]
struct StoredAnswer {
    message: Stored,
}

#[derive(Deserialize)]
struct Stored {
    subject: String,
    seq: u64,
    #[serde(default)]
    time: String,
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
}

impl Stored {
    fn head(self) -> Result<StoredMessage, AckError> {
        Ok(StoredMessage {
            subject: self.subject,
            seq: self.seq,
            time: self.time,
            headers: parse_headers(&decode(&self.hdrs)?),
            data: Vec::new(),
        })
    }
}

fn decode(text: &str) -> Result<Vec<u8>, AckError> {
    STANDARD.decode(text).map_err(|_| AckError::Malformed)
}

/// `NATS/1.0\r\n`, then `name: value\r\n` lines (ADR-4). A line without a colon is skipped: whoever published it is
/// not us, and a header of ours after it must still be found.
fn parse_headers(block: &[u8]) -> Vec<(String, String)> {
    let text = String::from_utf8_lossy(block);
    let pair = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.trim().to_string(), value.trim().to_string()))
    };
    text.split("\r\n").skip(1).filter_map(pair).collect()
}

/// The answer to [`last_message_request`] or [`message_request`].
pub fn message(
    link: &impl Api,
    request: Request,
    timeout: Duration,
) -> Result<Option<StoredMessage>, Error> {
    ask(link, request, timeout, parse_message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_message() {
        let body = br#"{"type":"x","message":{"subject":"events.a","seq":2,"hdrs":"TkFUUy8xLjANCk5hdHMtTXNnLUlkOiB4DQpGb286IGJhcg0KDQo=","data":"e30=","time":"2026-11-23T09:26:06.878692928Z"}}"#;
        let message = parse_message(body).unwrap().unwrap();
        assert_eq!(
            (message.subject.as_str(), message.seq, message.data.len()),
            ("events.a", 2, 2)
        );
        assert_eq!(message.header("nats-msg-id"), Some("x"));
        assert_eq!(message.header("Foo"), Some("bar"));
        assert_eq!(message.header("Bar"), None);
        for end in 0..body.len() {
            assert_eq!(parse_message(&body[..end]), Err(AckError::Malformed));
        }
        for (body, expected) in [
            (
                r#"{"error":{"code":404,"err_code":10037,"description":"no message found"}}"#,
                Ok(false),
            ),
            (r#"{"message":{"subject":"a","seq":1}}"#, Ok(true)),
            (
                r#"{"message":{"subject":"a","seq":1,"hdrs":"*"}}"#,
                Err(AckError::Malformed),
            ),
            (
                r#"{"message":{"subject":"a","seq":-1}}"#,
                Err(AckError::Malformed),
            ),
        ] {
            let found = parse_message(body.as_bytes()).map(|message| message.is_some());
            assert_eq!(found, expected, "{body}");
        }
    }

    #[test]
    fn reads_headers() {
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        for (block, expected) in [
            ("", vec![]),
            ("NATS/1.0\r\n\r\n", vec![]),
            ("NATS/1.0\r\nA:b\r\n\r\n", vec![pair("A", "b")]),
            (
                "NATS/1.0 503 x\r\nA: b:c \r\njunk\r\nD:\r\n\r\n",
                vec![pair("A", "b:c"), pair("D", "")],
            ),
        ] {
            assert_eq!(parse_headers(block.as_bytes()), expected, "{block:?}");
        }
    }
}
