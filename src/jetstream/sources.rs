//! The aggregate: a stream without subjects of its own that copies from others by `sources`, so that many relays, each with a
//! stream of its own, are read from one. Pure.
//!
//! What was found out on nats-server 2.12.8 and 2.15.1. A source is copied by its sequences: in its order, each message once,
//! over restarts of either side, and `Nats-Expected-*` headers are left out. The aggregate looks for duplicates as any
//! stream does: what has the id of a message from another source is dropped in silence. Before 2.15 each aggregate has
//! such a window, two minutes unless it is told otherwise, and cannot be without.

use super::ack::{AckError, ApiError};
use super::preflight::release;
use super::streams::{
    Request, StreamConfig, StreamInfo, SubjectTransform, null_as_default, parse, parse_info, set,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::time::Duration;

/// What tells an aggregate that `setup` made, and may extend, from one that it leaves alone: a member of its metadata.
const MARK: (&str, &str) = ("jetstream_outbox", "aggregate");
/// The shortest window that nats-server takes, in nanoseconds.
const LEAST_WINDOW: i64 = 100_000_000;
/// The first release whose aggregates have no window unless they are given one, and which says what was copied.
const WITHOUT_WINDOW: (u32, u32) = (2, 15);
/// nats-server looks whether a source is still there after 10 s of silence, by a clock that ticks each 10 s.
const SILENT: Duration = Duration::from_secs(25);

/// One of the streams that an aggregate copies from, and what of it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Source {
    /// The stream.
    pub name: String,
    /// Only messages of this subject; empty for all.
    pub filter_subject: String,
    /// Only messages of these subjects, under other ones; empty for all as they are.
    #[serde(deserialize_with = "null_as_default")]
    pub subject_transforms: Vec<SubjectTransform>,
    /// It is in another domain or account.
    pub external: Option<Value>,
}

/// How far the copying of a source is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Copying {
    /// The stream.
    pub name: String,
    /// It is in another domain or account.
    pub external: Option<Value>,
    /// The sequence in the source of what was copied last; servers before 2.15 do not say.
    pub seq: Option<u64>,
    /// How many nanoseconds ago the source was heard of; −1 for never.
    pub active: i64,
    /// Why nothing is copied.
    pub error: Option<ApiError>,
}

/// A stream with its sources.
#[derive(Clone, Debug, PartialEq)]
pub struct Aggregate {
    /// As of any stream.
    pub info: StreamInfo,
    /// What it copies from.
    pub sources: Vec<Source>,
    /// How far that is.
    pub copying: Vec<Copying>,
    /// `setup` made it, or was allowed to extend it.
    pub is_ours: bool,
    /// The whole configuration, as it is sent back with another source.
    config: Map<String, Value>,
}

/// Something about an aggregate that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Events do not get there, or not as they should.
    pub fails: bool,
    /// What it is.
    pub what: String,
    /// Why that matters.
    pub why: &'static str,
    /// What to do.
    pub fix: String,
}

impl Source {
    /// The pattern of what is copied; `None`: everything.
    fn patterns(&self) -> Option<Vec<&str>> {
        match (self.filter_subject.as_str(), &self.subject_transforms[..]) {
            ("", []) => None,
            ("", transforms) => Some(transforms.iter().map(|it| it.src.as_str()).collect()),
            (filter, _) => Some(vec![filter]),
        }
    }

    fn copies_some(&self, wanted: &str) -> bool {
        let some = |patterns: Vec<&str>| patterns.iter().any(|it| overlap(it, wanted));
        self.patterns().is_none_or(some)
    }

    fn copies_all(&self, wanted: &str) -> bool {
        let all = |patterns: Vec<&str>| patterns.iter().any(|it| captures_all(it, wanted));
        self.patterns().is_none_or(all)
    }

    /// Under which subjects what `wanted` stands for is in the aggregate.
    pub fn stored_under(&self, wanted: &str) -> String {
        let transforms = self.subject_transforms.iter();
        let mut of_it =
            transforms.filter(|it| captures_all(&it.src, wanted) && !it.dest.is_empty());
        of_it.next().map_or(wanted, |it| it.dest.as_str()).into()
    }
}

impl Aggregate {
    /// Reads the answer to [`info_request`](super::streams::info_request); `None` if there is no such stream.
    pub fn parse(body: &[u8]) -> Result<Option<Aggregate>, AckError> {
        #[derive(Deserialize)]
        struct Answer {
            config: Map<String, Value>,
            #[serde(default, deserialize_with = "null_as_default")]
            sources: Vec<Copying>,
        }
        let Some(info) = parse_info(body)? else {
            return Ok(None);
        };
        let Answer { config, sources } = parse(body)?;
        let of_config = config.get("sources").cloned().unwrap_or_default();
        let of_config: Option<Vec<Source>> =
            serde_json::from_value(of_config).map_err(|_| AckError::Malformed)?;
        let mark = config.get("metadata").and_then(|it| it.get(MARK.0));
        Ok(Some(Aggregate {
            info,
            sources: of_config.unwrap_or_default(),
            copying: sources,
            is_ours: mark.is_some_and(|it| it == MARK.1),
            config,
        }))
    }

    /// The sources that copy something of `wanted`, of the form `prefix.>`, from a stream of this account.
    pub fn sources_of<'a>(&'a self, origin: &'a str, wanted: &'a str) -> Vec<&'a Source> {
        let of_it =
            |it: &&Source| it.name == origin && it.external.is_none() && it.copies_some(wanted);
        self.sources.iter().filter(of_it).collect()
    }

    /// Asks for the same stream with another source.
    pub fn extend_request(&self, source: Value) -> Request {
        let mut config = self.config.clone();
        let sources = config.entry("sources").or_insert(Value::Null);
        match sources.as_array_mut() {
            Some(sources) => sources.push(source),
            None => *sources = json!([source]),
        }
        let name = &self.info.config.name;
        let config = Value::Object(config).to_string();
        (format!("STREAM.UPDATE.{name}"), config.into())
    }

    /// What keeps events of `wanted` from being in it as they are in `origin`, by the configuration of the two.
    pub fn faults(&self, origin: &StreamInfo, wanted: &str, server_version: &str) -> Vec<Fault> {
        let mut faults = Vec::from_iter(self.faults_of_source(&origin.config.name, wanted));
        faults.extend(faults_of_origin(&origin.config));
        faults.extend(self.faults_of_window(server_version));
        faults.extend(self.faults_of_limits(&origin.config));
        faults
    }

    fn faults_of_source(&self, origin: &str, wanted: &str) -> Option<Fault> {
        let name = &self.info.config.name;
        let fix = |what: String| format!("{what} (nats stream edit {name} --config=FILE)");
        if self.info.config.sealed {
            let fix = "take another stream with -aggregate";
            return Some(fails("it is sealed", "nothing can be added to it", fix));
        }
        match self.sources_of(origin, wanted)[..] {
            [] => Some(fails(
                format!("it does not copy from {origin}"),
                "no event of this relay gets into it",
                format!("jetstream-outbox setup -aggregate {name}"),
            )),
            [source] if source.copies_all(wanted) => None,
            [_] => Some(fails(
                format!("of {origin} it does not copy all of {wanted}"),
                "the other events do not get into it",
                fix(format!("let the source {origin} copy {wanted}")),
            )),
            _ => Some(fails(
                format!("it copies from {origin} by more than one source"),
                "what both copy is in it twice",
                fix(format!("leave one source {origin}")),
            )),
        }
    }

    fn faults_of_window(&self, server_version: &str) -> Option<Fault> {
        let (name, window) = (&self.info.config.name, self.info.config.duplicate_window);
        let least = match release(server_version) < WITHOUT_WINDOW {
            true => LEAST_WINDOW,
            false => 0,
        };
        (window > least).then(|| {
            warns(
                format!("it looks for duplicates (duplicate_window {} s)", window as f64 / 1e9),
                "an event with the Nats-Msg-Id of another relay's event is dropped, and nothing says so",
                format!("nats stream edit {name} --dupe-window={}ms", least / 1_000_000),
            )
        })
    }

    fn faults_of_limits(&self, origin: &StreamConfig) -> Vec<Fault> {
        let (own, from) = (&self.info.config, &origin.name);
        let edit = |what: &str| format!("nats stream edit {} {what}", own.name);
        let mut faults = Vec::new();
        if own.storage == "memory" {
            faults.push(warns(
                "it is kept in memory",
                "after a restart it is copied again, under other sequences, from what its origins still have",
                "make it again with file storage",
            ));
        }
        if own.max_msgs > 0 || own.max_bytes > 0 || own.max_msgs_per_subject > 0 {
            let why = match own.discard == "new" {
                true => {
                    "at its limit it takes nothing more until there is room; what an origin drops meanwhile never gets into it"
                }
                false => "at its limit it drops its oldest messages, consumed or not",
            };
            let what = format!(
                "it has a limit (max_msgs {}, max_bytes {}, max_msgs_per_subject {}, discard {})",
                own.max_msgs, own.max_bytes, own.max_msgs_per_subject, own.discard
            );
            faults.push(warns(
                what,
                why,
                edit("--max-age=... in place of the limit"),
            ));
        }
        let larger = origin.max_msg_size <= 0 || own.max_msg_size < origin.max_msg_size;
        if own.max_msg_size > 0 && larger {
            let most = own.max_msg_size;
            faults.push(warns(
                format!(
                    "it takes messages of up to {most} bytes (max_msg_size), {from} larger ones"
                ),
                "a larger event stops the copying from that origin, and all events after it wait",
                edit("--max-msg-size=-1"),
            ));
        }
        faults
    }

    /// The sequence in `origin` of what was copied last, if the server says, or if nothing ever was.
    pub fn copied(&self, origin: &str, server_version: &str) -> Option<u64> {
        let says = release(server_version) >= WITHOUT_WINDOW;
        let copying = self.copying_from(origin)?;
        let none_yet = (says || self.info.state.last_seq == 0).then_some(0);
        copying.seq.or(none_yet)
    }

    /// How far the copying from `origin` is.
    pub fn copying_from(&self, origin: &str) -> Option<&Copying> {
        let of_it = |it: &&Copying| it.name == origin && it.external.is_none();
        self.copying.iter().find(of_it)
    }
}

impl Copying {
    /// What keeps it from going on. `last_seq` is the origin's, read after this.
    pub fn fault(&self, last_seq: u64) -> Option<Fault> {
        const WHY: &str = "no event of this relay gets into it";
        let name = &self.name;
        let silent = Duration::from_nanos(u64::try_from(self.active).unwrap_or(0));
        if let Some(error) = &self.error {
            let what = format!("nothing is copied from {name}: {error}");
            return Some(fails(what, WHY, "correct what the error names"));
        }
        if silent > SILENT {
            return Some(fails(
                format!("{name} was not heard of for {} s", silent.as_secs()),
                WHY,
                "look into the log of nats-server, and whether both streams have a leader",
            ));
        }
        let seq = self.seq.filter(|seq| *seq > last_seq)?;
        Some(fails(
            format!("it has copied {seq} of {name}, which ends at {last_seq}"),
            "that stream was put back or made again; what it stores up to that sequence is not copied, unless nats-server (from \
             2.15 on) sees within 20 s that it is another stream",
            "see \"Many relays, one stream to read\" in the manual",
        ))
    }
}

fn fails(what: impl Into<String>, why: &'static str, fix: impl Into<String>) -> Fault {
    Fault {
        fails: true,
        what: what.into(),
        why,
        fix: fix.into(),
    }
}

fn warns(what: impl Into<String>, why: &'static str, fix: impl Into<String>) -> Fault {
    Fault {
        fails: false,
        ..fails(what, why, fix)
    }
}

fn faults_of_origin(origin: &StreamConfig) -> Option<Fault> {
    let name = &origin.name;
    match origin.retention.as_str() {
        "interest" => Some(fails(
            format!("its origin {name} has interest retention"),
            "an event that comes while nothing is copied, as in a restart, is dropped there and never gets into the aggregate",
            format!("take a new stream with limits retention in place of {name}"),
        )),
        "workqueue" => Some(warns(
            format!("its origin {name} is a work queue"),
            "the aggregate is its only consumer, and if it is deleted what it has copied is gone",
            format!("take a new stream with limits retention and a max_age in place of {name}"),
        )),
        _ => None,
    }
}

/// The origin's sequence in a `Nats-Stream-Source` header, if the message was copied from it.
pub fn copied_seq(header: &str, origin: &str) -> Option<u64> {
    let mut words = header.split(' ');
    (words.next()? == origin).then(|| words.next()?.parse().ok())?
}

/// The source that copies the events of `prefix` from a stream; with `other_prefix` under that one in the aggregate.
pub fn source(name: &str, subjects: &[String], prefix: &str, other_prefix: Option<&str>) -> Value {
    let wanted = format!("{prefix}.>");
    match other_prefix {
        Some(other) => json!({
            "name": name, "subject_transforms": [{ "src": wanted, "dest": format!("{other}.>") }]
        }),
        None if subjects.iter().all(|it| captures_all(&wanted, it)) => json!({ "name": name }),
        None => json!({ "name": name, "filter_subject": wanted }),
    }
}

/// Asks for one that [`Aggregate::faults`] has nothing against. `limits`: further fields of its configuration.
pub fn create_request(
    name: &str,
    sources: &[Value],
    limits: Value,
    server_version: &str,
) -> Request {
    let mut body = limits;
    for (field, value) in [
        ("name", json!(name)),
        ("sources", json!(sources)),
        ("retention", json!("limits")),
        ("storage", json!("file")),
        ("discard", json!("old")),
        ("allow_direct", json!(true)),
        ("metadata", json!({ MARK.0: MARK.1 })),
    ] {
        set(&mut body, field, value);
    }
    if release(server_version) < WITHOUT_WINDOW {
        set(&mut body, "duplicate_window", LEAST_WINDOW.into());
    }
    (format!("STREAM.CREATE.{name}"), body.to_string().into())
}

/// Each subject that `wanted` stands for is one that `pattern` stands for.
pub fn captures_all(pattern: &str, wanted: &str) -> bool {
    let mut wanted = wanted.split('.');
    for want in pattern.split('.') {
        let found = wanted.next();
        match (want, found) {
            (">", found) => return found.is_some(),
            ("*", Some(found)) if found != ">" => {}
            (want, Some(found)) if want == found => {}
            _ => return false,
        }
    }
    wanted.next().is_none()
}

/// There is a subject that both stand for.
pub fn overlap(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        return match (one.next(), other.next()) {
            (Some(">"), Some(_)) | (Some(_), Some(">")) => true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => continue,
            (None, None) => true,
            _ => false,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_compared() {
        for (pattern, wanted, all, some) in [
            ("events.>", "events.>", true, true),
            (">", "events.>", true, true),
            ("*.>", "events.>", true, true),
            ("events.*.>", "events.>", false, true),
            ("events.*", "events.>", false, true),
            ("events.account.>", "events.>", false, true),
            ("other.>", "events.>", false, false),
            ("events", "events.>", false, false),
            ("events.>", "events.a.b", true, true),
            ("events.*", "events.a", true, true),
            ("events.a", "events.*", false, true),
            ("events.*.a", "events.b.*", false, true),
            ("events.*.a", "events.b.c", false, false),
            ("a.b.c", "a.b", false, false),
        ] {
            assert_eq!(captures_all(pattern, wanted), all, "{pattern} {wanted}");
            assert_eq!(overlap(pattern, wanted), some, "{pattern} {wanted}");
            assert_eq!(overlap(wanted, pattern), some, "{pattern} {wanted}");
        }
    }

    fn stream(config: Value) -> StreamInfo {
        let info = json!({ "config": config, "state": {} });
        parse_info(info.to_string().as_bytes()).unwrap().unwrap()
    }

    fn aggregate(config: Value) -> Aggregate {
        let info = json!({ "config": config, "state": {}, "sources": null });
        Aggregate::parse(info.to_string().as_bytes())
            .unwrap()
            .unwrap()
    }

    #[test]
    fn a_configuration_that_is_no_object_is_malformed() {
        let as_array = json!({ "config": ["ALL", []], "state": {} }).to_string();
        let found = Aggregate::parse(as_array.as_bytes());
        assert!(matches!(found, Err(AckError::Malformed)), "{found:?}");
    }

    #[test]
    fn a_source_is_as_narrow_as_the_stream_asks_for() {
        for (subjects, other, expected) in [
            (json!(["a.>"]), None, json!({ "name": "A" })),
            (json!(["a.x", "a.y.>"]), None, json!({ "name": "A" })),
            (
                json!(["a.>", "log.>"]),
                None,
                json!({ "name": "A", "filter_subject": "a.>" }),
            ),
            (
                json!([">"]),
                None,
                json!({ "name": "A", "filter_subject": "a.>" }),
            ),
            (
                json!(["a.>"]),
                Some("all"),
                json!({ "name": "A", "subject_transforms": [{ "src": "a.>", "dest": "all.>" }] }),
            ),
        ] {
            let origin = stream(json!({ "name": "A", "subjects": subjects }));
            let made = source("A", &origin.config.subjects, "a", other);
            assert_eq!(made, expected);
            // and is found to be right
            let found = aggregate(json!({ "name": "ALL", "sources": [made] }));
            assert_eq!(found.faults(&origin, "a.>", "2.15.1"), []);
        }
    }

    #[test]
    fn an_aggregate_that_cannot_have_every_event_once_is_found() {
        let good = json!({ "name": "ALL", "sources": [{ "name": "A" }, { "name": "B" }] });
        let origin = json!({ "name": "A", "subjects": ["a.>"], "max_msg_size": 1000 });
        let check = |own: Value, of_origin: Value, version: &str, fails: bool, part: &str| {
            let merged = |base: &Value, more: &Value| {
                let mut base = base.clone();
                let fields = more.as_object().unwrap().clone();
                base.as_object_mut().unwrap().extend(fields);
                base
            };
            let found = aggregate(merged(&good, &own)).faults(
                &stream(merged(&origin, &of_origin)),
                "a.>",
                version,
            );
            match (part, &found[..]) {
                ("", []) => {}
                (part, [fault]) if !part.is_empty() => {
                    assert!(fault.what.contains(part), "{part}: {fault:?}");
                    assert_eq!(fault.fails, fails, "{fault:?}");
                }
                _ => panic!("{part:?}: {found:?}"),
            }
        };
        let of = |sources: Value| json!({ "sources": sources });
        let none = json!({});
        let newest = "2.15.1";
        for (own, fails, part) in [
            (none.clone(), false, ""),
            (of(json!([{ "name": "B" }])), true, "does not copy from A"),
            (json!({ "sources": null }), true, "does not copy from A"),
            // a stream of that name elsewhere
            (
                of(json!([{ "name": "A", "external": { "api": "$JS.x.API" } }])),
                true,
                "does not copy from A",
            ),
            (
                of(json!([{ "name": "A", "filter_subject": "b.>" }])),
                true,
                "does not copy from A",
            ),
            (
                of(json!([{ "name": "A", "filter_subject": "a.x.>" }])),
                true,
                "not copy all of a.>",
            ),
            (
                of(json!([{ "name": "A", "filter_subject": "a.>" }])),
                false,
                "",
            ),
            (
                of(json!([{ "name": "A" }, { "name": "A", "filter_subject": "a.x" }])),
                true,
                "more than one",
            ),
            // another relay's events of the same stream
            (
                of(
                    json!([{ "name": "A", "filter_subject": "a.>" }, { "name": "A", "filter_subject": "b.>" }]),
                ),
                false,
                "",
            ),
            (
                of(
                    json!([{ "name": "A", "subject_transforms": [{ "src": "a.>", "dest": "x.>" }] }]),
                ),
                false,
                "",
            ),
            (json!({ "sealed": true }), true, "sealed"),
            (
                json!({ "duplicate_window": 100_000_000 }),
                false,
                "duplicate_window 0.1 s",
            ),
            (json!({ "storage": "memory" }), false, "memory"),
            (
                json!({ "max_msgs": 5, "discard": "new" }),
                false,
                "discard new",
            ),
            (
                json!({ "max_bytes": 5, "discard": "old" }),
                false,
                "discard old",
            ),
            (json!({ "max_msg_size": 999 }), false, "up to 999 bytes"),
            (json!({ "max_msg_size": 1000 }), false, ""),
        ] {
            check(own, none.clone(), newest, fails, part);
        }
        check(
            json!({ "duplicate_window": 100_000_000 }),
            none.clone(),
            "2.14.6",
            false,
            "",
        );
        check(
            json!({ "duplicate_window": 120_000_000_000_u64 }),
            none.clone(),
            "2.14.6",
            false,
            "duplicate",
        );
        check(
            none.clone(),
            json!({ "retention": "interest" }),
            newest,
            true,
            "interest",
        );
        check(
            none.clone(),
            json!({ "retention": "workqueue" }),
            newest,
            false,
            "work queue",
        );
    }

    #[test]
    fn copying_that_stands_still_is_found() {
        let copying = |seq: Option<u64>, active_s: i64| Copying {
            name: "A".into(),
            seq,
            active: active_s * 1_000_000_000,
            ..Copying::default()
        };
        for (copying, part) in [
            (copying(Some(7), 0), ""),
            (copying(None, 20), ""),
            (
                Copying {
                    active: -1,
                    ..copying(None, 0)
                },
                "",
            ),
            (copying(Some(7), 26), "not heard of for 26 s"),
            (copying(Some(8), 0), "copied 8 of A, which ends at 7"),
            (
                Copying {
                    error: Some(ApiError {
                        code: 404,
                        err_code: 10059,
                        description: "stream not found".into(),
                    }),
                    ..copying(None, 0)
                },
                "stream not found",
            ),
        ] {
            let found = copying.fault(7).map(|fault| fault.what);
            assert_eq!(found.is_some(), !part.is_empty(), "{found:?}");
            assert!(found.unwrap_or_default().contains(part), "{part}");
        }
    }

    #[test]
    fn only_a_source_is_added() {
        let config = json!({ "name": "ALL", "sources": [{ "name": "B" }], "max_age": 5, "unheard_of": [1],
            "metadata": { "jetstream_outbox": "aggregate" } });
        let found = aggregate(config.clone());
        assert!(found.is_ours);
        let (api, body) = found.extend_request(json!({ "name": "A" }));
        let mut expected = config;
        expected["sources"] = json!([{ "name": "B" }, { "name": "A" }]);
        assert_eq!(api, "STREAM.UPDATE.ALL");
        assert_eq!(serde_json::from_slice::<Value>(&body).unwrap(), expected);
        assert!(!aggregate(json!({ "name": "ALL" })).is_ours);
    }

    #[test]
    fn the_place_of_a_copy_is_read() {
        for (header, expected) in [
            ("A 7 > > a.1 AuOyzYQ2", Some(7)),
            ("A 7", Some(7)),
            ("B 7 > >", None),
            ("A:hash 7 > >", None),
            ("A x", None),
            ("", None),
        ] {
            assert_eq!(copied_seq(header, "A"), expected, "{header:?}");
        }
    }
}
