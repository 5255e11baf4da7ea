//! Reads what JetStream answers to a publish: a PubAck, or why the message was not stored.
//!
//! Pure: bytes in, values out. The forms are those of ADR-1 (JSON API) and of nats-server's `errors.json`,
//! where the numbers of [`ApiError::err_code`] come from.

use crate::nats::connection::NoReply;
use serde::Deserialize;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// The stream stored the message, or had it already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PubAck {
    /// The message's sequence in its stream.
    pub seq: u64,
    /// The id was seen within the deduplication window; `seq` is the earlier message's.
    ///
    /// nats-server 2.10 answers seq 0 here for messages a replicated stream never stored.
    pub duplicate: bool,
}

/// The error object of the JetStream API.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ApiError {
    /// Like an HTTP status: 400, 404, 503.
    #[serde(default)]
    pub code: u32,
    /// Which error it is, 10000 and up; 0 from servers that do not say.
    #[serde(default)]
    pub err_code: u32,
    /// The server's words.
    #[serde(default)]
    pub description: String,
}

/// The message was not stored, or the answer does not say so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AckError {
    /// JetStream refused it.
    Api(ApiError),
    /// Nobody listens on the subject: no stream captures it, or JetStream is off.
    NoResponders,
    /// Neither a PubAck nor an error: somebody other than JetStream answered.
    Malformed,
    /// No answer came in time; whether the message was stored is not known. Never said of an event: the core keeps their
    /// deadlines.
    NoAnswer,
}

/// What a refusal means to a publisher. Every error that nats-server 2.10 to 2.15 answers a publish with has one, by
/// [`MEANINGS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckErrorKind {
    /// The stream does not end where the publish expected; it ends at the number, if the server gave one.
    WrongLastSequence(Option<u64>),
    /// Another stream captures the subject than the publish expected.
    OtherStream,
    /// It passes by itself: no leader, a queue that is full, an id that another publish is being stored with.
    Busy,
    /// It passes when somebody makes room: a limit of the stream with `discard: new`, storage, JetStream switched off.
    NoRoom,
    /// The stream refuses this very message, and will whenever it comes.
    Poison,
    /// The stream takes no event of ours, whichever it is.
    Closed,
    /// Not one of these; the description says what.
    Unknown,
}

/// The errors that a publish can meet: those of `server/stream.go`, `jetstream_cluster.go` and `jetstream_batching.go` of
/// nats-server, and the few of the JetStream API that stand for a server that is not well. Source: `server/errors.json`.
/// [`ApiError::kind`] reads more from some descriptions.
pub const MEANINGS: [(u32, AckErrorKind); 48] = {
    use AckErrorKind::{Busy, Closed, NoRoom, OtherStream, Poison, WrongLastSequence};
    [
        (10002, NoRoom), // resource limits exceeded for account
        (10008, Busy),   // JetStream system temporarily unavailable
        (10009, Busy),   // JetStream cluster can not handle request
        (10023, NoRoom), // insufficient resources
        (10028, NoRoom), // insufficient memory resources available
        (10039, NoRoom), // JetStream not enabled for account
        (10047, NoRoom), // insufficient storage resources available
        (10054, Poison), // message size exceeds maximum allowed
        (10060, OtherStream),
        (10063, Busy), // expected stream sequence does not match: a leader that is not up to date
        (10070, WrongLastSequence(None)), // wrong last msg ID: another message has taken the place of that one
        (10071, WrongLastSequence(None)), // and its description has the sequence
        (10076, NoRoom),                  // JetStream not enabled
        (10077, NoRoom), // store failed: the description carries the store's own words
        (10097, Poison), // header size exceeds maximum allowed of 64k
        (10109, Closed), // invalid operation on sealed stream
        (10111, Poison), // rollup failed
        (10118, Busy),   // stream is offline
        // duplicate message id is in process; 2.10 and 2.11 say so of one that was refused, and 2.15.1 of one whose leader
        // stepped down meanwhile, until the window of duplicates is over
        (10158, Busy),
        (10164, WrongLastSequence(None)),
        (10165, Poison), // invalid per-message TTL
        (10166, Poison), // per-message TTL is disabled
        (10167, Busy),   // too many requests
        (10168, Poison), // message counters is disabled: the event bears an increment
        (10169, Closed), // message counter increment is missing: the stream counts, and stores nothing else
        (10170, Closed), // message counter has payload
        (10171, Closed), // message counter increment is invalid; also with any fence
        (10172, Closed), // message counter is broken
        (10174, Poison), // atomic publish is disabled: the event bears a batch's headers, as in the next ones
        (10175, Poison),
        (10176, Poison),
        (10177, Poison),
        (10179, Poison),
        (10185, Poison), // JetStream minimum api level required
        (10188, Poison), // message schedules is disabled
        (10189, Poison), // message schedules pattern is invalid
        (10190, Poison), // message schedules target is invalid
        (10191, Poison), // message schedules invalid per-message TTL
        (10192, Poison), // message schedules invalid rollup
        (10193, Poison), // missing sequence for expected last sequence per subject
        (10194, Busy),   // stream is offline, and why
        (10201, Poison), // atomic publish batch contains duplicate message id
        (10203, Poison), // message schedules source is invalid
        (10205, Poison), // batch publish is disabled
        (10212, Poison), // message schedules invalid scheduler
        (10223, Poison), // message schedules time zone is invalid
        (10226, Busy),   // stream is being reconfigured
        (10227, Poison), // message stream source header is not allowed
    ]
};

impl ApiError {
    /// What the error means to a publisher.
    pub fn kind(&self) -> AckErrorKind {
        let meaning = MEANINGS.iter().find(|(code, _)| *code == self.err_code);
        match (self.err_code, meaning) {
            (10071, _) => AckErrorKind::WrongLastSequence(
                self.description
                    .rsplit(' ')
                    .next()
                    .and_then(|word| word.parse().ok()),
            ),
            // larger than the store takes, whatever the limits are ("to" up to 2.14)
            (10077, _)
                if matches!(&*self.description, "message too large" | "message to large") =>
            {
                AckErrorKind::Poison
            }
            (_, Some((_, kind))) => *kind,
            _ if self.code == 429 => AckErrorKind::Busy,
            _ => AckErrorKind::Unknown,
        }
    }
}

impl AckError {
    /// What the error means to a publisher.
    pub fn kind(&self) -> AckErrorKind {
        match self {
            AckError::Api(error) => error.kind(),
            AckError::NoResponders | AckError::NoAnswer => AckErrorKind::Busy,
            AckError::Malformed => AckErrorKind::Unknown,
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ApiError {
            code,
            err_code,
            description,
        } = self;
        write!(f, "{description} (code {code}, err_code {err_code})")
    }
}

impl fmt::Display for AckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AckError::Api(error) => error.fmt(f),
            AckError::NoResponders => f.write_str(
                "no stream captures the subject, or JetStream is off: create a stream for it, or enable JetStream",
            ),
            AckError::Malformed => f.write_str(
                "the answer is no PubAck: another subscriber answers on the subject, or the server is too old",
            ),
            AckError::NoAnswer => f.write_str("no answer came in time"),
        }
    }
}

impl From<NoReply> for AckError {
    fn from(reason: NoReply) -> AckError {
        match reason {
            NoReply::NoResponders => AckError::NoResponders,
            NoReply::Status => AckError::Malformed,
            NoReply::Timeout => AckError::NoAnswer,
        }
    }
}

impl std::error::Error for ApiError {}
impl std::error::Error for AckError {}

/// Where an ack says that a message is stored: with leaf nodes, imports and mappings this may be another stream than the one
/// that the publisher knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The stream's name.
    pub stream: String,
    /// The JetStream domain; empty without one.
    pub domain: String,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.domain.as_str() {
            "" => write!(f, "{}", self.stream),
            domain => write!(f, "{} in domain {domain}", self.stream),
        }
    }
}

/// The most origins that are remembered; a publisher meets as many as it has streams.
const MAX_ORIGINS: usize = 64;

/// So many acks share one reference, then a new one is made: two threads that count at one place wait for each other.
const MAX_SHARED: usize = 64;

/// The origins met so far, so that an ack costs no memory of its own: it bears a counted reference, and to compare two that
/// come from one place is to compare two addresses.
#[derive(Debug, Default)]
pub struct Origins {
    met: Vec<Arc<Origin>>,
    asked: usize,
}

impl Origins {
    /// The origin of this name. The last one asked for is found first.
    fn intern(&mut self, stream: &str, domain: &str) -> Arc<Origin> {
        let is_it = |origin: &Arc<Origin>| origin.stream == stream && origin.domain == domain;
        if let Some(at) = self.met.iter().rposition(is_it) {
            let last = self.met.len() - 1;
            self.met.swap(at, last);
            self.asked = (self.asked + 1) % MAX_SHARED;
            if let Some(origin) = self.met.get_mut(last)
                && self.asked == 0
            {
                *origin = Arc::new(Origin::clone(origin));
            }
            return self.met.get(last).cloned().unwrap_or_default();
        }
        let origin = Arc::new(Origin {
            stream: stream.into(),
            domain: domain.into(),
        });
        if self.met.len() == MAX_ORIGINS {
            self.met.clear();
        }
        self.met.push(origin.clone());
        origin
    }
}

/// Reads the answer to a publish. `status` is the status of its header line (`NATS/1.0 503`), if it has one.
pub fn parse_ack(body: &[u8], status: Option<&str>) -> Result<PubAck, AckError> {
    read(body, status).map(|(ack, _, _)| ack)
}

/// As [`parse_ack`], and where the message is stored.
pub fn parse_ack_from(
    body: &[u8],
    status: Option<&str>,
    origins: &mut Origins,
) -> Result<(PubAck, Arc<Origin>), AckError> {
    let (ack, stream, domain) = read(body, status)?;
    Ok((ack, origins.intern(&stream, &domain)))
}

/// The ack, its stream and its domain.
type Read<'a> = (PubAck, Cow<'a, str>, Cow<'a, str>);

/// The stream that refuses a publish, and why.
pub fn parse_refusal(body: &[u8]) -> Option<(String, ApiError)> {
    #[derive(Deserialize)]
    struct Refusal {
        error: ApiError,
        stream: String,
    }
    let Refusal { error, stream } = serde_json::from_slice(body).ok()?;
    Some((stream, error))
}

fn read<'a>(body: &'a [u8], status: Option<&str>) -> Result<Read<'a>, AckError> {
    match status {
        Some("503") => Err(AckError::NoResponders),
        // nats-server's 429 has the error in its body
        Some(_) => Err(match parse_any(body) {
            Err(error @ AckError::Api(_)) => error,
            _ => AckError::Malformed,
        }),
        None => match scan(body) {
            Some((ack, stream)) => Ok((ack, stream.into(), "".into())),
            None => parse_any(body),
        },
    }
}

/// Every form of answer.
fn parse_any<'a>(body: &[u8]) -> Result<Read<'a>, AckError> {
    #[derive(Deserialize)]
    struct Answer {
        error: Option<ApiError>,
        stream: Option<String>,
        seq: Option<u64>,
        #[serde(default)]
        duplicate: bool,
        #[serde(default)]
        domain: String,
    }
    match serde_json::from_slice(body) {
        Ok(Answer {
            error: Some(error), ..
        }) => Err(AckError::Api(error)),
        Ok(Answer {
            stream: Some(stream),
            seq: Some(seq),
            duplicate,
            domain,
            ..
        }) => Ok((PubAck { seq, duplicate }, stream.into(), domain.into())),
        _ => Err(AckError::Malformed),
    }
}

/// The two forms nearly all acks have, `{"stream":"S","seq":7}` and the same with `"duplicate": true`, without
/// building anything; and the stream. `None` sends any other form to [`parse_any`].
fn scan(body: &[u8]) -> Option<(PubAck, &str)> {
    let rest = body.strip_prefix(br#"{"stream":""#)?;
    let end = rest.iter().position(|&byte| byte == b'"')?;
    let (name, rest) = rest.split_at_checked(end)?;
    if !name
        .iter()
        .all(|&byte| matches!(byte, b' '..=b'~') && byte != b'\\')
    {
        return None;
    }
    let rest = rest.strip_prefix(br#"","seq":"#)?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = rest.split_at_checked(digits)?;
    // JSON has no leading zeros
    if number.len() > 1 && number.starts_with(b"0") {
        return None;
    }
    let seq = std::str::from_utf8(number).ok()?.parse().ok()?;
    let duplicate = match rest {
        b"}" => false,
        br#","duplicate": true}"# | br#","duplicate":true}"# => true,
        _ => return None,
    };
    Some((PubAck { seq, duplicate }, std::str::from_utf8(name).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(seq: u64) -> Result<PubAck, AckError> {
        Ok(PubAck {
            seq,
            duplicate: false,
        })
    }

    fn duplicate(seq: u64) -> Result<PubAck, AckError> {
        Ok(PubAck {
            seq,
            duplicate: true,
        })
    }

    fn refused(code: u32, err_code: u32, description: &str) -> Result<PubAck, AckError> {
        Err(AckError::Api(ApiError {
            code,
            err_code,
            description: description.into(),
        }))
    }

    /// As nats-server 2.15.1 wrote them, and what else the words allow.
    fn answers() -> Vec<(&'static str, Result<PubAck, AckError>)> {
        let malformed = || Err(AckError::Malformed);
        vec![
            (r#"{"stream":"EV","seq":1}"#, stored(1)),
            (r#"{"stream":"EV","seq":2,"duplicate": true}"#, duplicate(2)),
            (r#"{"stream":"EV","seq":2,"duplicate":true}"#, duplicate(2)),
            (r#"{"stream":"EV","seq":2,"duplicate":false}"#, stored(2)),
            (r#"{"stream":"EV","seq":7,"domain":"hub"}"#, stored(7)),
            (
                r#"{"stream":"EV","seq":7,"domain":"hub","duplicate":true}"#,
                duplicate(7),
            ),
            (r#" { "seq" : 7, "stream" : "E\"V" } "#, stored(7)),
            (r#"{"stream":"Ä","seq":7}"#, stored(7)),
            (r#"{"stream":"","seq":0}"#, stored(0)),
            (
                r#"{"stream":"EV","seq":18446744073709551615}"#,
                stored(u64::MAX),
            ),
            (r#"{"stream":"EV","seq":18446744073709551616}"#, malformed()),
            (r#"{"stream":"EV","seq":07}"#, malformed()),
            (r#"{"stream":"EV","seq":-1}"#, malformed()),
            (r#"{"stream":"EV","seq":1.0}"#, malformed()),
            (r#"{"stream":"EV","seq":1e3}"#, malformed()),
            (r#"{"stream":"EV","seq":"1"}"#, malformed()),
            (r#"{"stream":"EV","seq":}"#, malformed()),
            (r#"{"stream":"EV","seq":1}x"#, malformed()),
            (r#"{"stream":"EV","seq":1,"seq":2}"#, malformed()),
            (r#"{"seq":1}"#, malformed()),
            (r#"{"stream":"EV"}"#, malformed()),
            ("", malformed()),
            ("{}", malformed()),
            ("+OK", malformed()),
            (
                r#"{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 2"},"stream":"EV","seq":0}"#,
                refused(400, 10071, "wrong last sequence: 2"),
            ),
            (
                r#"{"type":"io.nats.jetstream.api.v1.pub_ack","error":{"code":503,"description":"x"}}"#,
                refused(503, 0, "x"),
            ),
        ]
    }

    #[test]
    fn reads_every_form_of_answer() {
        for (body, expected) in answers() {
            assert_eq!(parse_ack(body.as_bytes(), None), expected, "{body}");
        }
        assert_eq!(parse_ack(b"", Some("503")), Err(AckError::NoResponders));
        assert_eq!(
            parse_ack(br#"{"stream":"EV","seq":1}"#, Some("408")),
            Err(AckError::Malformed)
        );
    }

    #[test]
    fn an_ack_says_where_its_message_is_stored() {
        let mut origins = Origins::default();
        let mut from = |body: &str| {
            parse_ack_from(body.as_bytes(), None, &mut origins)
                .unwrap()
                .1
        };
        let first = from(r#"{"stream":"EV","seq":1}"#);
        let hub = from(r#"{"stream":"EV","domain":"hub","seq":1}"#);
        let again = from(r#"{"stream":"EV","seq":2,"duplicate": true}"#);
        let other = from(r#"{"stream":"Ä","seq":1}"#);
        let origin = |stream: &str, domain: &str| Origin {
            stream: stream.into(),
            domain: domain.into(),
        };
        assert_eq!((&*first, &*hub), (&origin("EV", ""), &origin("EV", "hub")));
        assert_eq!(*other, origin("Ä", ""));
        assert!(Arc::ptr_eq(&first, &again), "nothing is built for it");
        for number in 0..1000 {
            from(&format!(r#"{{"stream":"S{number}","seq":1}}"#));
        }
        assert!(origins.met.len() <= MAX_ORIGINS);
    }

    #[test]
    fn the_common_forms_take_the_fast_path() {
        for (body, fast) in [
            (r#"{"stream":"EV","seq":1}"#, true),
            (r#"{"stream":"EV","seq":2,"duplicate": true}"#, true),
            (r#"{"stream":"EV","seq":7,"domain":"hub"}"#, false),
        ] {
            assert_eq!(scan(body.as_bytes()).is_some(), fast, "{body}");
        }
    }

    /// What the fast path accepts, the whole parser reads the same way.
    fn agrees(body: &[u8]) {
        if let Some((ack, stream)) = scan(body) {
            let read = (ack, stream.into(), "".into());
            assert_eq!(parse_any(body), Ok(read), "{body:?}");
        }
    }

    #[test]
    fn every_prefix_is_malformed_and_no_panic() {
        for (body, _) in answers() {
            let body = body.trim_end().as_bytes();
            for end in 0..body.len() {
                let prefix = &body[..end];
                agrees(prefix);
                if !prefix.ends_with(b"}") {
                    assert_eq!(parse_ack(prefix, None), Err(AckError::Malformed));
                }
            }
        }
    }

    #[test]
    fn mutations_agree_with_the_whole_parser() {
        let mut random = fastrand::Rng::with_seed(1);
        let answers = answers();
        for _ in 0..200_000 {
            let (body, _) = answers[random.usize(..answers.len())];
            let mut body = body.as_bytes().to_vec();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..=body.len());
                match random.u8(..4) {
                    0 => body.insert(at, random.choice(br#""\,:}{0019 te-.e"#).copied().unwrap()),
                    1 if at < body.len() => body[at] = random.u8(..),
                    2 if at < body.len() => drop(body.remove(at)),
                    _ => body.truncate(at),
                }
            }
            agrees(&body);
            let _ = parse_ack(&body, None);
        }
    }

    #[track_caller]
    fn means(code: u32, err_code: u32, description: &str, kind: AckErrorKind) {
        let error = ApiError {
            code,
            err_code,
            description: description.into(),
        };
        assert_eq!(error.kind(), kind, "{error}");
    }

    #[test]
    fn each_error_of_a_publish_has_one_meaning_and_any_other_is_unknown() {
        use AckErrorKind::*;
        let mut last = 0;
        for (err_code, kind) in MEANINGS {
            assert!(last < err_code, "{err_code} is out of order");
            last = err_code;
            means(400, err_code, "whatever it says", kind);
        }
        let known = |err_code| MEANINGS.iter().any(|(code, _)| *code == err_code);
        for err_code in (0..20_000).filter(|code| !known(*code)) {
            means(400, err_code, "whatever it says", Unknown);
            means(429, err_code, "too many requests", Busy);
        }
    }

    #[test]
    fn some_descriptions_say_more() {
        use AckErrorKind::*;
        means(
            400,
            10071,
            "wrong last sequence: 3",
            WrongLastSequence(Some(3)),
        );
        means(
            400,
            10071,
            "wrong last sequence: x",
            WrongLastSequence(None),
        );
        means(503, 10077, "maximum messages exceeded", NoRoom);
        means(503, 10077, "no space left on device", NoRoom);
        means(503, 10077, "message too large", Poison);
        means(503, 10077, "message to large", Poison);
        assert_eq!(AckError::NoResponders.kind(), Busy);
        assert_eq!(AckError::Malformed.kind(), Unknown);
    }

    /// As nats-server 2.15 sends it when its queue is full.
    #[test]
    fn an_error_beside_a_status_is_read() {
        let body = br#"{"error":{"code":429,"err_code":10167,"description":"too many requests"},"stream":"EV","seq":0}"#;
        let error = parse_ack(body, Some("429")).unwrap_err();
        assert_eq!(error.kind(), AckErrorKind::Busy);
        // no ack comes with a status
        let ack = br#"{"stream":"EV","seq":1}"#;
        assert_eq!(parse_ack(ack, Some("429")), Err(AckError::Malformed));
    }
}
