//! Streams, and what they hold: requests and answers of the JetStream API.
//!
//! This file: how a stream is configured and what is in it. `stored`: a message read back. `routes`: which stream captures a
//! subject.
//!
//! Pure but for [`list`], [`info`], [`message`] and [`probe`], which ask. The answers' fields are those of
//! nats-server's `StreamConfig`, `StreamState` and `StoredMsg` (ADR-1); unknown ones are ignored, so that newer
//! servers can be talked to.

mod routes;
mod stored;

pub use routes::{Routes, matches, probe};
pub use stored::{
    StoredMessage, last_message_request, message, message_request, next_message_request,
    parse_message, parse_message_head,
};

use super::ack::{AckError, ApiError};
use super::client::Api;
use super::error::Error;
use super::sources::Source;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A request of the JetStream API: the subject behind the API prefix, and the body.
pub type Request = (String, Vec<u8>);

/// A stream: what it captures, how, and what is in it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct StreamInfo {
    /// How it is configured.
    pub config: StreamConfig,
    /// What it holds.
    pub state: StreamState,
    /// When it was created, RFC 3339; another value under the same name means another stream.
    #[serde(default)]
    pub created: String,
    /// The server's time, RFC 3339; servers before 2.10 do not say.
    #[serde(default)]
    pub ts: String,
    /// The JetStream domain that it is in; empty without one.
    #[serde(default)]
    pub domain: String,
}

/// The part of a stream's configuration that decides whether it can carry the relay's promises.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct StreamConfig {
    /// The stream's name.
    pub name: String,
    /// The subjects it captures, wildcards included; none for a mirror.
    #[serde(deserialize_with = "null_as_default")]
    pub subjects: Vec<String>,
    /// `limits`, `interest` or `workqueue`.
    pub retention: String,
    /// `file` or `memory`.
    pub storage: String,
    /// Copies in the cluster.
    pub num_replicas: u32,
    /// The stream answers no publish.
    pub no_ack: bool,
    /// Nothing can be added any more.
    pub sealed: bool,
    /// At a limit: `old` drops the oldest message, `new` refuses the publish.
    pub discard: String,
    /// The largest message in bytes, headers included; −1 or 0 for no limit.
    pub max_msg_size: i64,
    /// At most so many messages; −1 for no limit.
    pub max_msgs: i64,
    /// At most so many bytes; −1 for no limit.
    pub max_bytes: i64,
    /// Messages are dropped at this age in nanoseconds; 0 for never.
    pub max_age: i64,
    /// At most so many messages of one subject; −1 for no limit.
    pub max_msgs_per_subject: i64,
    /// With `discard: new` a subject at its own limit refuses, too.
    pub discard_new_per_subject: bool,
    /// Messages are stored under another subject than they were published on.
    pub subject_transform: Option<SubjectTransform>,
    /// For how many nanoseconds message ids are remembered.
    pub duplicate_window: i64,
    /// The stream counts: a message is a number to add, and bears no fence.
    pub allow_msg_counter: bool,
    /// A message may name its own time to live, and go before older ones do.
    pub allow_msg_ttl: bool,
    /// Reads may be answered by any replica.
    pub allow_direct: bool,
    /// `async` acknowledges before the store has written; absent or `default` otherwise.
    pub persist_mode: String,
    /// It copies all of another stream, and takes nothing else.
    pub mirror: Option<Source>,
    /// It copies from other streams, beside what it captures.
    #[serde(deserialize_with = "null_as_default")]
    pub sources: Vec<Source>,
}

impl StreamConfig {
    /// The last message of ours stays while an older one does: what goes by itself goes oldest first. (A replicated
    /// stream is left out, because a new leader may not know yet what is there.)
    pub fn keeps_its_end(&self) -> bool {
        self.is_log() && self.num_replicas <= 1
    }

    /// Nothing is consumed, or lives shorter than what is older.
    pub fn is_log(&self) -> bool {
        self.retention == "limits" && !self.allow_msg_ttl
    }

    /// The same, and each message stays while an older one does, whatever their subjects.
    pub fn keeps_its_order(&self) -> bool {
        self.keeps_its_end() && self.max_msgs_per_subject <= 0
    }
}

/// How the subject of a published message becomes that of the stored one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct SubjectTransform {
    /// Which subjects it is for.
    pub src: String,
    /// What the stored subject is made of; empty: it stays as it is.
    pub dest: String,
}

/// What a stream holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct StreamState {
    /// How many messages.
    pub messages: u64,
    /// Their size in the store.
    pub bytes: u64,
    /// The lowest sequence still there; one past `last_seq` when emptied, 0 when there never was a message.
    pub first_seq: u64,
    /// The highest sequence given so far.
    pub last_seq: u64,
    /// How many consumers it has.
    pub consumer_count: u64,
    /// How many messages between the two were deleted.
    pub num_deleted: u64,
    /// When the first message was stored, RFC 3339.
    pub first_ts: String,
    /// When the last message was stored, RFC 3339.
    pub last_ts: String,
}

pub(super) fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// One page of the names of the streams whose subjects overlap `subject`, from the `offset`th on.
fn names_request(subject: &str, offset: usize) -> Request {
    let body = json!({ "subject": subject, "offset": offset });
    ("STREAM.NAMES".into(), body.to_string().into())
}

/// A page of names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Names {
    /// How many there are on all pages.
    #[serde(default)]
    total: usize,
    /// The names on this page.
    #[serde(default, deserialize_with = "null_as_default")]
    streams: Vec<String>,
}

/// Reads the answer to [`names_request`].
fn parse_names(body: &[u8]) -> Result<Names, AckError> {
    parse(body)
}

/// Asks for one stream.
pub fn info_request(stream: &str) -> Request {
    (format!("STREAM.INFO.{stream}"), Vec::new())
}

/// Reads the answer to [`info_request`]; `None` if there is no such stream.
pub fn parse_info(body: &[u8]) -> Result<Option<StreamInfo>, AckError> {
    none_if(10059, parse(body))
}

/// Sets a field of a JSON object.
pub fn set(object: &mut Value, field: &str, value: Value) {
    if let Some(object) = object.as_object_mut() {
        object.insert(field.into(), value);
    }
}

pub(super) fn parse<T: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<T, AckError> {
    #[derive(Deserialize)]
    struct Failure {
        error: ApiError,
    }
    if let Ok(Failure { error }) = serde_json::from_slice(body) {
        return Err(AckError::Api(error));
    }
    serde_json::from_slice(body).map_err(|_| AckError::Malformed)
}

fn none_if<T>(err_code: u32, result: Result<T, AckError>) -> Result<Option<T>, AckError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(AckError::Api(error)) if error.err_code == err_code => Ok(None),
        Err(error) => Err(error),
    }
}

/// Every stream that captures something of `subject` (for instance `events.>`), in the server's order.
pub fn list(link: &impl Api, subject: &str, timeout: Duration) -> Result<Vec<StreamInfo>, Error> {
    let deadline = Instant::now() + timeout;
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut names: Vec<String> = Vec::new();
    loop {
        let page = ask(
            link,
            names_request(subject, names.len()),
            left(),
            parse_names,
        )?;
        let last = page.streams.is_empty();
        names.extend(page.streams);
        if last || names.len() >= page.total {
            break;
        }
    }
    let mut streams = Vec::with_capacity(names.len());
    for name in names {
        // one that was deleted meanwhile captures nothing
        streams.extend(info(link, &name, left())?);
    }
    Ok(streams)
}

/// One stream, or `None`.
pub fn info(link: &impl Api, stream: &str, timeout: Duration) -> Result<Option<StreamInfo>, Error> {
    ask(link, info_request(stream), timeout, parse_info)
}

fn ask<T>(
    link: &impl Api,
    (api, body): Request,
    timeout: Duration,
    parse: impl FnOnce(&[u8]) -> Result<T, AckError>,
) -> Result<T, Error> {
    let answer = link.call(&api, &body, timeout)?;
    parse(&answer).map_err(|source| Error::Api { api, source })
}

#[cfg(test)]
mod tests;
