//! Which stream captures which subject, and what a stream holds: requests and answers of the JetStream API.
//!
//! Pure but for [`list`], [`info`] and [`message`], which ask over whatever is an [`Api`]. The
//! answers' fields are those of nats-server's `StreamConfig`, `StreamState` and `StoredMsg` (ADR-1, ADR-31
//! for what is not used: direct get); unknown ones are ignored, so that newer servers can be talked to.

use super::ack::{AckError, ApiError};
use super::client::{Answer, Api, Link};
use super::error::Error;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::json;
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

/// Where a write of a bucket's key goes: into another domain, or through an import, by way of the API's prefix (ADR-8's
/// clients do the same).
pub fn key_write_subject(api_prefix: &str, key: &str) -> String {
    match api_prefix {
        "$JS.API" => key.to_string(),
        prefix => format!("{prefix}.{key}"),
    }
}

/// Asks for a new key-value bucket with one value a key (ADR-8); [`parse_info`] reads the answer.
pub fn create_bucket_request(bucket: &str, replicas: u32) -> Request {
    let name = format!("KV_{bucket}");
    let body = json!({
        "name": name, "subjects": [format!("$KV.{bucket}.>")], "storage": "file", "retention": "limits",
        "max_msgs_per_subject": 1, "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_msg_size": -1,
        "discard": "new", "num_replicas": replicas.max(1), "duplicate_window": 120_000_000_000_i64,
        "deny_delete": true, "allow_rollup_hdrs": true, "allow_direct": true,
    });
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
#[derive(Clone, Debug, Default)]
pub struct Routes {
    routes: Vec<(Pattern, usize)>,
    names: Vec<String>,
    /// The largest message of each stream that has such a limit.
    max_msg_sizes: Vec<(usize, usize)>,
}

#[derive(Clone, Debug)]
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
        Routes {
            routes: routes.collect(),
            names: streams.iter().map(|it| it.config.name.clone()).collect(),
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

    /// The name of the stream that captures `subject`.
    pub fn name(&self, subject: &str) -> Option<&str> {
        self.names.get(self.route(subject)?).map(String::as_str)
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
mod tests {
    use super::*;

    #[test]
    fn wildcards_stand_for_tokens() {
        for (pattern, subject, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.c", false),
            ("a.b", "a", false),
            ("a.b", "a.b.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("*", "a", true),
            ("*", "a.b", false),
            (">", "a", true),
            (">", "a.b", true),
            ("a.>", "a", false),
            ("a.>", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "ab.c", false),
            ("a.*.>", "a.b", false),
            ("a.*.>", "a.b.c", true),
            ("a.>.c", "a.b.c", false),
            ("A.b", "a.b", false),
        ] {
            assert_eq!(matches(pattern, subject), expected, "{pattern} {subject}");
            let routes = Routes::new(&[stream(&[pattern])]);
            assert_eq!(
                routes.route(subject),
                expected.then_some(0),
                "{pattern} {subject}"
            );
        }
    }

    fn stream(subjects: &[&str]) -> StreamInfo {
        StreamInfo {
            config: StreamConfig {
                subjects: subjects.iter().map(ToString::to_string).collect(),
                ..StreamConfig::default()
            },
            state: StreamState::default(),
            created: String::new(),
            ts: String::new(),
            domain: String::new(),
        }
    }

    #[test]
    fn only_limits_on_one_replica_without_lifetimes_keep_a_streams_end() {
        let limits = || StreamConfig {
            retention: "limits".into(),
            num_replicas: 1,
            ..StreamConfig::default()
        };
        let check = |expected: bool, change: fn(&mut StreamConfig)| {
            let mut config = limits();
            change(&mut config);
            assert_eq!(config.keeps_its_end(), expected, "{config:?}");
            let in_order = expected && config.max_msgs_per_subject <= 0;
            assert_eq!(config.keeps_its_order(), in_order, "{config:?}");
        };
        check(true, |_| {});
        check(true, |config| config.max_msgs_per_subject = -1);
        // an older server does not say
        check(true, |config| config.num_replicas = 0);
        // what goes by itself goes oldest first
        check(true, |config| {
            (config.max_msgs, config.max_age) = (10, 1_000_000_000);
            config.discard = "old".into();
        });
        // the newest of each subject stays
        check(true, |config| config.max_msgs_per_subject = 1);
        check(false, |config| config.retention = "workqueue".into());
        check(false, |config| config.retention = "interest".into());
        check(false, |config| config.num_replicas = 3);
        check(false, |config| config.allow_msg_ttl = true);
    }

    #[test]
    fn each_subject_goes_to_the_stream_that_captures_it() {
        let routes = Routes::new(&[
            stream(&["events.account.>"]),
            stream(&[]),
            stream(&["events.order.*", "events.order.*.x"]),
        ]);
        for (subject, expected) in [
            ("events.account.1", Some(0)),
            ("events.account.1.2", Some(0)),
            ("events.account", None),
            ("events.order.7", Some(2)),
            ("events.order.7.x", Some(2)),
            ("events.order.7.y", None),
            ("events.other", None),
        ] {
            assert_eq!(routes.route(subject), expected, "{subject}");
        }
        assert_eq!(Routes::default().route("a"), None);
    }

    #[test]
    fn each_subject_has_the_size_limit_of_its_stream() {
        let limited = |subject, max_msg_size| {
            let mut stream = stream(&[subject]);
            stream.config.max_msg_size = max_msg_size;
            stream
        };
        let routes = Routes::new(&[
            limited("a.>", -1),
            limited("b.>", 100),
            limited("c.>", 0),
            limited("d.>", 50),
        ]);
        for (subject, expected) in [
            ("a.1", None),
            ("b.1", Some(100)),
            ("c.1", None),
            ("d.1", Some(50)),
            ("e.1", None),
        ] {
            assert_eq!(routes.max_msg_size(subject), expected, "{subject}");
        }
    }

    #[test]
    fn reads_a_stream() {
        // as nats-server 2.15.1 wrote it
        let body = br#"{"type":"io.nats.jetstream.api.v1.stream_info_response","total":0,"offset":0,"limit":0,"config":{"name":"EV","subjects":["events.\u003e"],"retention":"limits","max_consumers":-1,"max_msgs":-1,"max_bytes":-1,"max_age":0,"max_msgs_per_subject":-1,"max_msg_size":100,"discard":"old","storage":"file","num_replicas":1,"duplicate_window":120000000000,"compression":"none","allow_direct":false,"mirror_direct":false,"sealed":false,"deny_delete":false,"deny_purge":false,"allow_rollup_hdrs":false,"consumer_limits":{},"allow_msg_ttl":false,"metadata":{"_nats.level":"5"}},"created":"2026-11-23T09:26:06.875757873Z","state":{"messages":2,"bytes":122,"first_seq":1,"first_ts":"2026-11-23T09:26:06.87843845Z","last_seq":2,"last_ts":"2026-11-23T09:26:06.878692928Z","num_subjects":1,"consumer_count":0},"cluster":{"leader":"N"},"ts":"2026-11-23T09:26:06.879621015Z"}"#;
        let info = parse_info(body).unwrap().unwrap();
        assert_eq!(
            info,
            StreamInfo {
                config: StreamConfig {
                    name: "EV".into(),
                    subjects: vec!["events.>".into()],
                    retention: "limits".into(),
                    storage: "file".into(),
                    num_replicas: 1,
                    discard: "old".into(),
                    max_msg_size: 100,
                    max_msgs: -1,
                    max_bytes: -1,
                    max_msgs_per_subject: -1,
                    duplicate_window: 120_000_000_000,
                    ..StreamConfig::default()
                },
                state: StreamState {
                    messages: 2,
                    bytes: 122,
                    first_seq: 1,
                    last_seq: 2,
                    num_deleted: 0,
                    first_ts: "2026-11-23T09:26:06.87843845Z".into(),
                    last_ts: "2026-11-23T09:26:06.878692928Z".into(),
                },
                created: "2026-11-23T09:26:06.875757873Z".into(),
                ts: "2026-11-23T09:26:06.879621015Z".into(),
                domain: String::new(),
            }
        );
        for end in 0..body.len() {
            assert_eq!(parse_info(&body[..end]), Err(AckError::Malformed));
        }
        let missing = br#"{"type":"x","error":{"code":404,"err_code":10059,"description":"stream not found"},"total":0}"#;
        assert_eq!(parse_info(missing), Ok(None));
        let off = br#"{"error":{"code":503,"err_code":10039,"description":"JetStream not enabled for account"}}"#;
        assert!(matches!(parse_info(off), Err(AckError::Api(_))));
    }

    #[test]
    fn reads_names() {
        let names = |streams: &[&str], total| {
            Ok(Names {
                total,
                streams: streams.iter().map(ToString::to_string).collect(),
            })
        };
        for (body, expected) in [
            (
                r#"{"total":1,"offset":0,"limit":1024,"streams":["EV"]}"#,
                names(&["EV"], 1),
            ),
            (r#"{"total":0,"streams":null}"#, names(&[], 0)),
            (r#"{"total":0}"#, names(&[], 0)),
            ("[]x", Err(AckError::Malformed)),
        ] {
            assert_eq!(parse_names(body.as_bytes()), expected, "{body}");
        }
    }

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
