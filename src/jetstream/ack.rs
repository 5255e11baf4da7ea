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

/// What a refusal means to a publisher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckErrorKind {
    /// The stream does not end where the publish expected; it ends at the number, if the server gave one.
    WrongLastSequence(Option<u64>),
    /// No stream captures the subject, or JetStream is off (status 503 without a body).
    NoResponders,
    /// The id is being stored by another publish, or was poisoned by a refused one (10158, 2.10 and 2.11), or by a leader that
    /// stepped down meanwhile (seen on 2.15.1): until the stream's window of duplicates is over.
    DuplicateInProcess,
    /// Larger than the stream, or the limit on headers, allows. Trying again cannot help.
    MessageTooLarge,
    /// A header of the message asks for a lifetime or a schedule that the server cannot read. Trying again cannot help.
    BadHeader,
    /// A limit of the stream with `discard: new`: messages, bytes, or messages per subject.
    StreamFull,
    /// Storage or memory of the server or the account is used up, or its disk failed.
    InsufficientResources,
    /// The stream is sealed: nothing can ever be added.
    Sealed,
    /// JetStream is off on the server or for the account.
    NotEnabled,
    /// The stream is gone.
    NoStream,
    /// Another stream captures the subject than the publish expected.
    OtherStream,
    /// The server asks to come back later: queues full (429), no leader, stream offline.
    Busy,
    /// An answer that is not JetStream's.
    Malformed,
    /// No answer in time.
    NoAnswer,
    /// Anything else; the description says what.
    Other,
}

impl ApiError {
    /// What the error means to a publisher.
    pub fn kind(&self) -> AckErrorKind {
        match self.err_code {
            10071 => AckErrorKind::WrongLastSequence(
                self.description
                    .rsplit(' ')
                    .next()
                    .and_then(|word| word.parse().ok()),
            ),
            // the last one: another message has taken the sequence of the one before
            10164 | 10070 => AckErrorKind::WrongLastSequence(None),
            10158 => AckErrorKind::DuplicateInProcess,
            10054 | 10097 => AckErrorKind::MessageTooLarge,
            10165 | 10189..=10192 | 10203 | 10212 | 10223 => AckErrorKind::BadHeader,
            10109 => AckErrorKind::Sealed,
            10039 | 10076 => AckErrorKind::NotEnabled,
            10059 => AckErrorKind::NoStream,
            10060 => AckErrorKind::OtherStream,
            10002 | 10023 | 10028 | 10047 => AckErrorKind::InsufficientResources,
            10008 | 10009 | 10118 | 10167 => AckErrorKind::Busy,
            // "store failed" carries the store's own words
            10077 if self.description.starts_with("maximum ") => AckErrorKind::StreamFull,
            10077 => AckErrorKind::InsufficientResources,
            _ if self.code == 429 => AckErrorKind::Busy,
            _ => AckErrorKind::Other,
        }
    }
}

impl AckErrorKind {
    /// The stream refuses this very message, and will whenever it comes.
    pub fn is_for_good(self) -> bool {
        matches!(
            self,
            AckErrorKind::MessageTooLarge | AckErrorKind::BadHeader
        )
    }
}

impl AckError {
    /// What the error means to a publisher.
    pub fn kind(&self) -> AckErrorKind {
        match self {
            AckError::Api(error) => error.kind(),
            AckError::NoResponders => AckErrorKind::NoResponders,
            AckError::Malformed => AckErrorKind::Malformed,
            AckError::NoAnswer => AckErrorKind::NoAnswer,
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

/// The origins met so far, so that an ack costs no memory of its own: it bears a counted reference, and to compare two that
/// come from one place is to compare two addresses.
#[derive(Debug, Default)]
pub struct Origins(Vec<Arc<Origin>>);

impl Origins {
    /// The origin of this name. The last one asked for is found first.
    fn intern(&mut self, stream: &str, domain: &str) -> Arc<Origin> {
        let is_it = |origin: &Arc<Origin>| origin.stream == stream && origin.domain == domain;
        if let Some(at) = self.0.iter().rposition(is_it) {
            let last = self.0.len() - 1;
            self.0.swap(at, last);
            return self.0.get(last).cloned().unwrap_or_default();
        }
        let origin = Arc::new(Origin {
            stream: stream.into(),
            domain: domain.into(),
        });
        if self.0.len() == MAX_ORIGINS {
            self.0.clear();
        }
        self.0.push(origin.clone());
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

fn read<'a>(body: &'a [u8], status: Option<&str>) -> Result<Read<'a>, AckError> {
    match status {
        Some("503") => Err(AckError::NoResponders),
        Some(_) => Err(AckError::Malformed),
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
        assert!(origins.0.len() <= MAX_ORIGINS);
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

    #[test]
    fn names_what_a_refusal_means() {
        use AckErrorKind::*;
        for (code, err_code, description, kind) in [
            (
                400,
                10071,
                "wrong last sequence: 3",
                WrongLastSequence(Some(3)),
            ),
            (
                400,
                10071,
                "wrong last sequence: x",
                WrongLastSequence(None),
            ),
            (400, 10164, "wrong last sequence", WrongLastSequence(None)),
            (400, 10070, "wrong last msg ID: x", WrongLastSequence(None)),
            (
                409,
                10158,
                "duplicate message id is in process",
                DuplicateInProcess,
            ),
            (
                400,
                10054,
                "message size exceeds maximum allowed",
                MessageTooLarge,
            ),
            (
                400,
                10097,
                "header size exceeds maximum allowed of 64k",
                MessageTooLarge,
            ),
            (503, 10077, "maximum messages exceeded", StreamFull),
            (503, 10077, "maximum bytes exceeded", StreamFull),
            (503, 10077, "no space left on device", InsufficientResources),
            (503, 10023, "insufficient resources", InsufficientResources),
            (400, 10109, "invalid operation on sealed stream", Sealed),
            (503, 10039, "JetStream not enabled for account", NotEnabled),
            (503, 10076, "JetStream not enabled", NotEnabled),
            (404, 10059, "stream not found", NoStream),
            (429, 10167, "too many requests", Busy),
            (429, 0, "too many requests", Busy),
            (400, 10060, "expected stream does not match", OtherStream),
        ] {
            let error = ApiError {
                code,
                err_code,
                description: description.into(),
            };
            assert_eq!(error.kind(), kind, "{error}");
        }
        assert_eq!(AckError::NoResponders.kind(), NoResponders);
    }
}
