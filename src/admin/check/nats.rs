//! The doctor's NATS side.
//!
//! A permission is tried by doing what needs it, in a form that JetStream must refuse: a publish that expects its
//! subject to have been stored last at a sequence that no stream reaches.

mod account;
mod aggregate;
mod holes;
mod routes;
mod versions;

use super::finding::{Finding, fail, ok, warn};
use super::postgres::is_local;
use crate::admin::bus::Bus;
use crate::admin::bytes;
use crate::config::Config;
use crate::jetstream::ack::{AckErrorKind, parse_ack};
use crate::jetstream::bucket::{self, key_write_subject};
use crate::jetstream::client::{Api, Link};
use crate::jetstream::preflight::{Preflight, preflight};
use crate::jetstream::streams::{self, StreamInfo, last_message_request, matches};
use crate::jetstream::{Delivery, EXPECTED_LAST_SEQUENCE, Error, OUTBOX_POSITION, STREAM_SOURCE};
use crate::nats::info::ServerInfo;
use crate::outbox::position::SourcePosition;
use crate::outbox::subject::MAX_SUBJECT_LEN;
use crate::relay::checkpoint::record::Record;
use crate::relay::checkpoint::store::key_subject;
use account::Account;

/// With at-least-once a repeat that comes later than this stands in the stream twice, in seconds. nats-server's default.
const SHORT_WINDOW: i64 = 120;

/// The last event of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// The stream.
    pub stream: String,
    /// Where the event stands in Postgres.
    pub position: SourcePosition,
    /// It was published with exactly-once delivery.
    pub fenced: bool,
}

/// What the streams tell of the Postgres they were written from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// The last event of each stream, if it tells.
    pub tails: Vec<Tail>,
    /// What the slot's key of the checkpoint holds.
    pub record: Option<Record>,
}

/// Whether something may be done: done, or the reason why not.
type Tried = Result<(), String>;

/// What was read.
#[derive(Clone, Debug)]
struct Facts {
    server: String,
    info: ServerInfo,
    /// The connection is encrypted.
    tls: bool,
    /// `Err`: what the API said.
    streams: Result<Vec<Stream>, String>,
    /// Where no stream captures the prefix: the one that answers there all the same.
    answers: Option<String>,
    /// What the server says of a subject as long as the mapping makes it, if it ends the connection over it.
    long_subject: Option<String>,
    /// Streams of the prefix in the server's own domain, where the API of another is asked.
    own: Vec<String>,
    bucket: Bucket,
    /// `None`: nothing is ever parked.
    park: Option<Park>,
    /// `None`: not asked, as the API does not answer.
    account: Option<Result<Account, String>>,
    /// `None`: not asked for.
    aggregate: Option<aggregate::Seen>,
}

/// Where events are parked.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Park {
    /// No stream captures the subject.
    Missing,
    /// The streams cannot be asked for.
    Unreadable(String),
    Found {
        stream: String,
        publish: Tried,
        /// Whether the relay may read its end, as it does of every stream it writes to.
        read: Tried,
        /// Empty when it is a stream of the prefix, which is judged as one.
        preflight: Preflight,
    },
}

#[derive(Clone, Debug)]
struct Stream {
    info: StreamInfo,
    /// `None`: not tried, as the stream never answers or captures no subject of ours.
    publish: Option<Tried>,
    /// Another stream that has answered, and the subject of ours where it did, which this one captures.
    elsewhere: Option<(String, String)>,
    read: Tried,
}

#[derive(Clone, Debug, PartialEq)]
enum Bucket {
    /// As nobody could be asked.
    Unknown,
    Missing,
    /// Another stream captures its subjects.
    Captured(String),
    Unreadable(String),
    Found {
        info: Box<StreamInfo>,
        /// It holds a record of this slot.
        has_key: bool,
        write: Tried,
    },
}

/// Everything that can be said, and what is told of Postgres.
pub fn findings(
    config: &Config,
    system_id: Option<u64>,
    aggregate: Option<&str>,
) -> (Vec<Finding>, Past) {
    let mut past = Past::default();
    let facts = match Bus::connect(&config.nats) {
        Ok(mut bus) => {
            let mut facts = read(&mut bus, config, system_id, &mut past);
            if let (Some(name), Ok(streams)) = (aggregate, &facts.streams) {
                facts.aggregate = Some(aggregate::read(&mut bus, config, name, streams));
            }
            facts
        }
        Err(error) => {
            let error = crate::admin::Error::Nats(error);
            let finding = fail(
                "nats.connection",
                error.to_string(),
                "the relay connects the same way",
                error.mend(),
            );
            return (vec![finding], past);
        }
    };
    let findings = JUDGES.iter().flat_map(|judge| judge(&facts, config));
    (findings.collect(), past)
}

type Judge = fn(&Facts, &Config) -> Vec<Finding>;

/// All findings, in the order in which a person would look.
const JUDGES: [Judge; 14] = [
    connection,
    versions::judge,
    encryption,
    jetstream,
    account::judge,
    streams,
    settings,
    window,
    publish,
    read_tail,
    holes::judge,
    checkpoint,
    parking,
    aggregate::judge,
];

fn connection(facts: &Facts, _: &Config) -> Vec<Finding> {
    let (version, server) = (&facts.info.version, &facts.server);
    vec![ok(
        "nats.connection",
        format!("nats-server {version} at {server}"),
    )]
}

fn encryption(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.tls";
    vec![match facts.tls {
        true => ok(NAME, "used"),
        false if is_local(&facts.server) => ok(NAME, "not used; the server is on this machine"),
        false => warn(
            NAME,
            "not used",
            "everybody on the way can read events and passwords, and change them",
            "give nats-server a tls block, and name it as tls://host in -nats",
        ),
    }]
}

fn jetstream(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.jetstream";
    vec![match &facts.streams {
        Ok(_) => ok(NAME, "its API answers"),
        Err(error) => fail(
            NAME,
            error,
            "events are stored in JetStream",
            match facts.info.jetstream {
                true => format!(
                    "let the user publish to {0}.STREAM.NAMES and {0}.STREAM.INFO.* and subscribe to _INBOX.>; enable JetStream for the \
                     account; correct -nats-api-prefix",
                    config.nats.api_prefix
                ),
                false => "add jetstream { store_dir: \"/var/lib/nats\" } to nats-server.conf and restart it".into(),
            },
        ),
    }]
}

fn streams(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.streams";
    let Ok(streams) = &facts.streams else {
        return Vec::new();
    };
    let wanted = format!("{}.>", config.prefix);
    let names: Vec<String> = streams
        .iter()
        .map(|stream| {
            let config = &stream.info.config;
            format!("{} ({})", config.name, config.subjects.join(", "))
        })
        .collect();
    let elsewhere = routes::findings(facts, config);
    if !elsewhere.is_empty() {
        return elsewhere;
    }
    vec![match names.as_slice() {
        [] => fail(
            NAME,
            format!("no stream captures {wanted}"),
            "the relay waits until there is one",
            format!(
                "jetstream-outbox setup, or: nats stream add {} --subjects='{wanted}' --defaults",
                config.slot
            ),
        ),
        names => ok(
            NAME,
            format!("{wanted} is captured by {}", names.join(", ")),
        ),
    }]
}

/// One judgement a stream; what is fine for all is told once.
fn each(
    facts: &Facts,
    name: &'static str,
    fine: &str,
    judge: impl Fn(&Stream) -> Vec<Finding>,
) -> Vec<Finding> {
    let streams = facts.streams.as_deref().unwrap_or_default();
    let findings: Vec<Finding> = streams.iter().flat_map(judge).collect();
    match findings.is_empty() && !streams.is_empty() {
        true => vec![ok(name, fine)],
        false => findings,
    }
}

fn settings(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.stream_settings";
    let most = bytes(facts.info.max_payload as u64);
    let fine = format!("the streams can carry the promises, in events of up to {most}");
    each(facts, NAME, &fine, |stream| {
        let name = &stream.info.config.name;
        let found = preflight(&stream.info, &facts.info, config.wanted());
        // the refusal says why, and after its last semicolon what to do
        let refused = found.refused.map(|text| match text.rsplit_once("; ") {
            Some((why, fix)) => fail(NAME, why, "the relay refuses the stream", fix),
            None => fail(
                NAME,
                text,
                "the relay refuses the stream",
                "use another stream",
            ),
        });
        let warnings = found.warnings.into_iter().map(|warning| {
            let (what, why) = warning
                .split_once(": ")
                .unwrap_or((&warning, "a promise is at risk"));
            warn(
                NAME,
                format!("stream {name}: {what}"),
                why,
                format!(
                    "nats stream edit {name}, or a new stream where the setting cannot be changed"
                ),
            )
        });
        refused.into_iter().chain(warnings).collect()
    })
}

fn window(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.duplicate_window";
    let fine = match config.delivery {
        Delivery::ExactlyOnce => "does not matter much: repeats are known by their position",
        Delivery::AtLeastOnce => "long enough",
    };
    each(facts, NAME, fine, |stream| {
        let found = &stream.info.config;
        let seconds = found.duplicate_window / 1_000_000_000;
        // without any, the settings say so
        let short = (1..SHORT_WINDOW).contains(&seconds)
            || (1..1_000_000_000).contains(&found.duplicate_window);
        if config.delivery == Delivery::ExactlyOnce || !short {
            return Vec::new();
        }
        vec![warn(
            NAME,
            format!(
                "stream {} remembers message ids for {seconds} s",
                found.name
            ),
            "with -delivery at-least-once, what is repeated after a longer outage stands in it twice",
            format!(
                "nats stream edit {} --dupe-window=2m; where nats-server has a lower limit (jetstream {{ limits {{ \
                 duplicate_window }} }}), raise that first",
                found.name
            ),
        )]
    })
}

fn publish(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.publish";
    if let Some(words) = &facts.long_subject {
        return vec![warn(
            NAME,
            format!("a subject of {MAX_SUBJECT_LEN} bytes ends the connection: {words}"),
            "an event with a long aggregate type and id would be such a one, and can then not be published",
            "raise max_control_line in nats-server.conf (4 KB unless it is set)",
        )];
    }
    each(facts, NAME, "permitted", |stream| match &stream.publish {
        Some(Err(error)) => vec![fail(
            NAME,
            format!("stream {}: {error}", stream.info.config.name),
            "no event gets there",
            format!("let the user publish to {}.>", config.prefix),
        )],
        _ => Vec::new(),
    })
}

fn read_tail(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.read";
    let api = &config.nats.api_prefix;
    each(facts, NAME, "permitted", |stream| match &stream.read {
        Ok(()) => Vec::new(),
        Err(error) => vec![fail(
            NAME,
            format!("stream {}: {error}", stream.info.config.name),
            "the relay reads the last event back to know where to go on",
            format!(
                "let the user publish to {api}.STREAM.MSG.GET.{}, or pass -delivery at-least-once",
                stream.info.config.name
            ),
        )],
    })
}

fn checkpoint(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.checkpoint";
    let (lacks, why): (fn(_, _, _, _) -> _, _) = match config.delivery {
        Delivery::ExactlyOnce => (fail, "exactly-once delivery needs it"),
        Delivery::AtLeastOnce => (
            warn,
            "whether the slot was moved or the publication changed is not seen without it",
        ),
    };
    let bucket = &config.checkpoint;
    let api = &config.nats.api_prefix;
    if let Bucket::Found {
        info,
        has_key,
        write,
    } = &facts.bucket
    {
        let streams = facts.streams.iter().flatten();
        let replicas = streams.map(|stream| stream.info.config.num_replicas).max();
        let mut faults = bucket::faults(bucket, info, replicas.unwrap_or_default());
        faults.extend(bucket::lacks_room(info, *has_key));
        // who may not write learns that first, unless nobody could
        if write.is_ok() || faults.iter().any(|fault| fault.is_fatal) {
            let level = |fault: &bucket::Fault| if fault.is_fatal { lacks } else { warn };
            let findings = faults.into_iter().map(|fault| {
                let fix = match &fault.edit {
                    Some(edit) => format!("nats stream edit KV_{bucket} {edit}"),
                    None => format!(
                        "with every relay that uses it stopped: nats kv del {bucket}; then jetstream-outbox setup; or name another bucket with -checkpoint"
                    ),
                };
                let found = format!("bucket {bucket} {}", fault.what);
                level(&fault)(NAME, found, fault.why, fix)
            });
            let findings: Vec<Finding> = findings.collect();
            if !findings.is_empty() {
                return findings;
            }
        }
    }
    let finding = match &facts.bucket {
        Bucket::Unknown => return Vec::new(),
        Bucket::Missing => warn(
            NAME,
            format!("bucket {bucket} does not exist"),
            "the relay creates it if it may",
            format!("jetstream-outbox setup, or: nats kv add {bucket}"),
        ),
        Bucket::Captured(stream) => lacks(
            NAME,
            format!(
                "stream {stream} captures $KV.{bucket}.>, which is bucket {bucket}'s, and so that cannot be created"
            ),
            why,
            format!("take the subject out of {stream}: nats stream edit {stream} --subjects=..."),
        ),
        Bucket::Unreadable(error) => lacks(
            NAME,
            format!("bucket {bucket}: {error}"),
            why,
            format!(
                "let the user publish to {api}.STREAM.INFO.KV_{bucket} and {api}.STREAM.MSG.GET.KV_{bucket}"
            ),
        ),
        Bucket::Found {
            write: Err(error), ..
        } => lacks(
            NAME,
            format!("bucket {bucket}: {error}"),
            why,
            format!(
                "let the user publish to {}",
                key_write_subject(api, &format!("$KV.{bucket}.*"))
            ),
        ),
        Bucket::Found { .. } => ok(NAME, format!("bucket {bucket} can be written")),
    };
    vec![finding]
}

fn parking(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.parking";
    const WHY: &str = "the first event that must be parked holds the relay up";
    let subject = &config.mapping.policy.park_subject;
    let api = &config.nats.api_prefix;
    let Some(park) = &facts.park else {
        return Vec::new();
    };
    if let Park::Found {
        preflight: Preflight {
            refused: Some(text),
            ..
        },
        ..
    } = park
    {
        let (why, fix) =
            (text.rsplit_once("; ")).unwrap_or((text, "name another subject with -park-subject"));
        return vec![fail(NAME, why, WHY, fix)];
    }
    let can = match park {
        Park::Missing => fail(
            NAME,
            format!("no stream captures {subject}"),
            WHY,
            format!(
                "jetstream-outbox setup with the same flags, or: nats stream add parked --subjects='{subject}' --defaults"
            ),
        ),
        Park::Unreadable(error) => fail(
            NAME,
            error,
            WHY,
            format!("let the user publish to {api}.STREAM.NAMES and {api}.STREAM.INFO.*"),
        ),
        Park::Found {
            stream,
            publish: Err(error),
            ..
        } => fail(
            NAME,
            format!("stream {stream}: {error}"),
            WHY,
            format!("let the user publish to {subject}"),
        ),
        Park::Found {
            stream,
            read: Err(error),
            ..
        } => fail(
            NAME,
            format!("stream {stream}: {error}"),
            "the relay reads the end of each stream it writes to, to know where to go on",
            format!("let the user publish to {api}.STREAM.MSG.GET.{stream}"),
        ),
        Park::Found { stream, .. } => ok(
            NAME,
            format!("events are parked under {subject}, in stream {stream}"),
        ),
    };
    std::iter::once(can).chain(kept(park)).collect()
}

/// Whether what is parked stays.
fn kept(park: &Park) -> Vec<Finding> {
    let Park::Found {
        stream, preflight, ..
    } = park
    else {
        return Vec::new();
    };
    let finding = |text: &String| {
        let gone = "a parked event that is gone can be published by nobody";
        let (what, why) = text.split_once(": ").unwrap_or((text, gone));
        let found = format!("stream {stream}: {what}");
        let fix = format!(
            "nats stream edit {stream}, or a new stream where the setting cannot be changed"
        );
        warn("nats.parking", found, why, fix)
    };
    preflight.warnings.iter().map(finding).collect()
}

/// Looks for the park subject, and tries it.
fn read_park(bus: &mut Bus<'_, Link>, config: &Config) -> Option<Park> {
    let subject = &config.mapping.policy.park_subject;
    if !config.mapping.policy.parks() {
        return None;
    }
    Some(match bus.streams(subject) {
        Err(error) => Park::Unreadable(error.to_string()),
        Ok(streams) => match streams.first() {
            None => Park::Missing,
            Some(found) => {
                let stream = found.config.name.clone();
                let preflight = match matches(&format!("{}.>", config.prefix), subject) {
                    true => Preflight::default(),
                    false => preflight(found, &bus.info, config.wanted()),
                };
                let last = bus.message(last_message_request(&stream, subject));
                Park::Found {
                    publish: match found.config.no_ack {
                        true => Ok(()),
                        false => try_write(bus, subject),
                    },
                    read: match config.delivery {
                        Delivery::ExactlyOnce => {
                            last.map(drop).map_err(|error| error.while_reading())
                        }
                        Delivery::AtLeastOnce => Ok(()),
                    },
                    stream,
                    preflight,
                }
            }
        },
    })
}

fn read(
    bus: &mut Bus<'_, Link>,
    config: &Config,
    system_id: Option<u64>,
    past: &mut Past,
) -> Facts {
    let wanted = format!("{}.>", config.prefix);
    let streams = bus.streams(&wanted).map(|infos| {
        let each = infos
            .into_iter()
            .map(|info| read_stream(bus, config, info, past));
        each.collect::<Vec<Stream>>()
    });
    let tls = bus.info.tls_required
        || (config.nats.servers.iter())
            .any(|server| server.tls && server.to_string() == bus.server);
    Facts {
        server: bus.server.clone(),
        info: bus.info.clone(),
        tls,
        bucket: match streams.is_ok() {
            true => read_bucket(bus, config, system_id, past),
            false => Bucket::Unknown,
        },
        answers: match &streams {
            Ok(streams) if streams.is_empty() => {
                let subject = probe_subject(std::slice::from_ref(&wanted), &config.prefix);
                subject.and_then(|subject| routes::refuser(bus, &subject))
            }
            _ => None,
        },
        long_subject: routes::long_subject(bus, config, streams.as_deref().unwrap_or_default()),
        own: routes::own(config, streams.as_deref().unwrap_or_default()),
        // without an API that answers there is one finding, not two
        park: streams.is_ok().then(|| read_park(bus, config)).flatten(),
        account: streams.is_ok().then(|| read_account(bus)),
        aggregate: None,
        streams: streams.map_err(|error: Error| error.to_string()),
    }
}

fn read_account(bus: &mut Bus<'_, Link>) -> Result<Account, String> {
    let answer = bus.ask(|link, timeout| link.call("INFO", &[], timeout));
    let answer = answer.map_err(|error| error.to_string())?;
    serde_json::from_slice(&answer).map_err(|error| error.to_string())
}

fn read_stream(
    bus: &mut Bus<'_, Link>,
    config: &Config,
    info: StreamInfo,
    past: &mut Past,
) -> Stream {
    let name = &info.config.name;
    let last = bus.message(last_message_request(name, &format!("{}.>", config.prefix)));
    if let Ok(Some(message)) = &last
        && let Some(Ok(position)) = message.header(OUTBOX_POSITION).map(str::parse)
    {
        past.tails.push(Tail {
            stream: name.clone(),
            position,
            // a copy proves nothing either way
            fenced: message.header(EXPECTED_LAST_SEQUENCE).is_some()
                || message.header(STREAM_SOURCE).is_some(),
        });
    }
    let subject = probe_subject(&info.config.subjects, &config.prefix);
    let subject = subject.filter(|_| !info.config.no_ack);
    let publish = subject.as_ref().map(|subject| try_write(bus, subject));
    let elsewhere = subject
        .filter(|_| publish == Some(Ok(())))
        .and_then(|subject| Some((routes::other(bus, &subject, name)?, subject)));
    Stream {
        publish,
        elsewhere,
        read: last.map(drop).map_err(|error| error.while_reading()),
        info,
    }
}

/// A subject under the prefix that one of the patterns captures and no aggregate is likely to have.
fn probe_subject(patterns: &[String], prefix: &str) -> Option<String> {
    const WORD: &str = "outbox-check";
    let under = format!("{prefix}.");
    let filled = patterns.iter().map(|pattern| {
        let tokens: Vec<&str> = pattern
            .split('.')
            .map(|token| {
                if matches!(token, "*" | ">") {
                    WORD
                } else {
                    token
                }
            })
            .collect();
        tokens.join(".")
    });
    let general = [format!("{under}{WORD}.{WORD}"), format!("{under}{WORD}")];
    general
        .into_iter()
        .chain(filled)
        .filter(|subject| subject.starts_with(&under))
        .find(|subject| patterns.iter().any(|pattern| matches(pattern, subject)))
}

/// Publishes what must be refused.
fn try_write(bus: &mut Bus<'_, Link>, subject: &str) -> Tried {
    let answer = bus.ask(|link, timeout| streams::probe(link, subject, timeout));
    let answer = answer.map_err(|error| error.to_string())?;
    match parse_ack(&answer, None) {
        Err(error) if matches!(error.kind(), AckErrorKind::WrongLastSequence(_)) => Ok(()),
        Err(error) => Err(error.to_string()),
        Ok(ack) => Err(format!(
            "an empty message was stored, at {}, against its own condition",
            ack.seq
        )),
    }
}

fn read_bucket(
    bus: &mut Bus<'_, Link>,
    config: &Config,
    system_id: Option<u64>,
    past: &mut Past,
) -> Bucket {
    let name = format!("KV_{}", config.checkpoint);
    // one that no Postgres has, if that is not known
    let key = key_subject(
        &config.checkpoint,
        &config.slot,
        system_id.unwrap_or_default(),
    );
    let info = match bus.stream(&name) {
        Ok(Some(info)) => info,
        Ok(None) => {
            let others = bus.streams(&bucket::bucket_subjects(&config.checkpoint));
            return match others.ok().and_then(|others| others.into_iter().next()) {
                Some(other) => Bucket::Captured(other.config.name),
                None => Bucket::Missing,
            };
        }
        Err(error) => return Bucket::Unreadable(error.to_string()),
    };
    let value = match bus.message(last_message_request(&name, &key)) {
        Ok(value) => value,
        Err(error) => return Bucket::Unreadable(error.to_string()),
    };
    let has_key = value.is_some();
    // an empty one stands for what was deleted
    let value = value.filter(|message| !message.data.is_empty());
    match value.map(|message| serde_json::from_slice(&message.data)) {
        None => {}
        Some(Ok(record)) => past.record = Some(record),
        Some(Err(error)) => return Bucket::Unreadable(format!("{key} holds no record: {error}")),
    }
    Bucket::Found {
        info: Box::new(info),
        has_key,
        write: try_write(bus, &key_write_subject(&config.nats.api_prefix, &key)),
    }
}

#[cfg(test)]
mod tests;
