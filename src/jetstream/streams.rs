//! Which stream captures which subject, and what a stream holds: requests and answers of the JetStream API.
//!
//! Pure but for [`list`], [`info`] and [`message`], which ask over whatever is an [`Api`]. The
//! answers' fields are those of nats-server's `StreamConfig`, `StreamState` and `StoredMsg` (ADR-1, ADR-31
//! for what is not used: direct get); unknown ones are ignored, so that newer servers can be talked to.

use super::ack::{AckError, ApiError, Origin};
use super::client::{Answer, Api, Link};
use super::error::Error;
use super::sources::Source;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use std::fmt;
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
        self.retention == "limits" && !self.allow_msg_ttl && self.num_replicas <= 1
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

pub(super) fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// One page of the names of the streams whose subjects overlap `subject`, from the `offset`th on.
pub fn names_request(subject: &str, offset: usize) -> Request {
    let body = json!({ "subject": subject, "offset": offset });
    ("STREAM.NAMES".into(), body.to_string().into())
}

/// A page of names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Names {
    /// How many there are on all pages.
    #[serde(default)]
    pub total: usize,
    /// The names on this page.
    #[serde(default, deserialize_with = "null_as_default")]
    pub streams: Vec<String>,
}

/// Reads the answer to [`names_request`].
pub fn parse_names(body: &[u8]) -> Result<Names, AckError> {
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

/// nats-server's code for a stream without `max_bytes` in an account that asks for it (`max_bytes_required`).
pub const MAX_BYTES_REQUIRED: u32 = 10113;
/// What a bucket gets there: room for a thousand slots.
pub const BUCKET_BYTES: u64 = 16 << 20;

/// Where a write of a bucket's key goes: into another domain, or through an import, by way of the API's prefix (ADR-8's
/// clients do the same).
pub fn key_write_subject(api_prefix: &str, key: &str) -> String {
    match api_prefix {
        "$JS.API" => key.to_string(),
        prefix => format!("{prefix}.{key}"),
    }
}

/// Sets a field of a JSON object.
pub fn set(object: &mut Value, field: &str, value: Value) {
    if let Some(object) = object.as_object_mut() {
        object.insert(field.into(), value);
    }
}

/// The error code of a stream whose subjects another one captures.
pub const SUBJECTS_OVERLAP: u32 = 10065;

/// The subjects of all keys of a bucket (ADR-8).
pub fn bucket_subjects(bucket: &str) -> String {
    format!("$KV.{bucket}.>")
}

/// Asks for a new key-value bucket with one value a key (ADR-8); [`parse_info`] reads the answer. The server sets the window of
/// duplicates, for which it may have a limit.
pub fn create_bucket_request(bucket: &str, replicas: u32, max_bytes: Option<u64>) -> Request {
    let name = format!("KV_{bucket}");
    let mut body = json!({
        "name": name, "subjects": [bucket_subjects(bucket)], "storage": "file", "retention": "limits",
        "max_msgs_per_subject": 1, "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_msg_size": -1,
        "discard": "new", "num_replicas": replicas.max(1), "deny_delete": true, "allow_rollup_hdrs": true, "allow_direct": true,
    });
    if let Some(max_bytes) = max_bytes {
        set(&mut body, "max_bytes", max_bytes.into());
    }
    (format!("STREAM.CREATE.{name}"), body.to_string().into())
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

/// No stream reaches this sequence, and every JSON reader and server holds it.
const NEVER: u64 = 1 << 53;

/// Publishes what every stream must refuse, as it expects `subject` to have been stored last at a sequence that is never reached.
/// Returns the answer, which tells who has it, whatever the API reports: a mapping, an import or a leaf node may lead elsewhere.
///
/// # Errors
/// [`AckError::NoResponders`]: nobody has.
pub fn probe(link: &Link, subject: &str, timeout: Duration) -> Result<Vec<u8>, Error> {
    link.put_now(subject, NEVER, &[], timeout)
}

/// The answer to [`last_message_request`] or [`message_request`].
pub fn message(
    link: &impl Api,
    request: Request,
    timeout: Duration,
) -> Result<Option<StoredMessage>, Error> {
    ask(link, request, timeout, parse_message)
}

/// As [`message`], on a link on which other answers are due: hands them on.
pub fn message_among(
    link: &Link,
    (api, body): Request,
    timeout: Duration,
    other: impl FnMut(Answer),
) -> Result<Option<StoredMessage>, Error> {
    let answer = link.call_among(&api, &body, timeout, other)?;
    parse_message(&answer).map_err(|source| Error::Api { api, source })
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

/// Whether `subject`, without wildcards, is one that `pattern` stands for: `*` for one token, a last `>` for one or
/// more. See <https://docs.nats.io/nats-concepts/subjects#wildcards>.
pub fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    let mut wanted = pattern.split('.').peekable();
    while let Some(want) = wanted.next() {
        let Some(token) = tokens.next() else {
            return false;
        };
        if want == ">" && wanted.peek().is_none() {
            return true;
        }
        if want != "*" && want != token {
            return false;
        }
    }
    tokens.next().is_none()
}

/// Finds the stream that captures a subject. The server lets no two streams overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    routes: Vec<(Pattern, usize)>,
    homes: Vec<Origin>,
    /// When each was created: another time is another stream of that name.
    created: Vec<String>,
    /// The largest message of each stream that has such a limit.
    max_msg_sizes: Vec<(usize, usize)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    /// `prefix.>`, as `prefix.`: the usual one, told by its beginning alone.
    Below(String),
    Any(String),
}

impl Routes {
    /// For these streams; [`route`](Self::route) gives indices into them.
    pub fn new(streams: &[StreamInfo]) -> Routes {
        let pattern = |subject: &String| match subject.strip_suffix('>') {
            Some(below) if below.ends_with('.') && !below.contains('*') => {
                Pattern::Below(below.into())
            }
            _ => Pattern::Any(subject.clone()),
        };
        let routes = streams.iter().enumerate().flat_map(|(index, stream)| {
            let subjects = stream.config.subjects.iter();
            subjects.map(move |subject| (pattern(subject), index))
        });
        let limited = streams.iter().enumerate().filter_map(|(index, stream)| {
            let limit = usize::try_from(stream.config.max_msg_size).ok()?;
            (limit > 0).then_some((index, limit))
        });
        let home = |stream: &StreamInfo| Origin {
            stream: stream.config.name.clone(),
            domain: stream.domain.clone(),
        };
        Routes {
            routes: routes.collect(),
            homes: streams.iter().map(home).collect(),
            created: streams.iter().map(|it| it.created.clone()).collect(),
            max_msg_sizes: limited.collect(),
        }
    }

    /// The `max_msg_size` of the stream that captures `subject`, if it has one.
    pub fn max_msg_size(&self, subject: &str) -> Option<usize> {
        if self.max_msg_sizes.is_empty() {
            return None;
        }
        let stream = self.route(subject)?;
        let of_it = |(index, _): &&(usize, usize)| *index == stream;
        self.max_msg_sizes
            .iter()
            .find(of_it)
            .map(|(_, limit)| *limit)
    }

    /// The stream that captures `subject`.
    pub fn home(&self, subject: &str) -> Option<&Origin> {
        self.homes.get(self.route(subject)?)
    }

    /// The index of the stream that captures `subject`, a legal one without wildcards.
    pub fn route(&self, subject: &str) -> Option<usize> {
        let captures = |(pattern, _): &&(Pattern, usize)| match pattern {
            Pattern::Below(below) => subject.len() > below.len() && subject.starts_with(below),
            Pattern::Any(pattern) => matches(pattern, subject),
        };
        self.routes.iter().find(captures).map(|(_, index)| *index)
    }
}

#[cfg(test)]
mod tests;
