//! Each finding, from facts as a server may tell them.

use super::*;
use crate::admin::check::finding::Level;
use crate::jetstream::streams::{StreamConfig, StreamState};
pub(super) use crate::relay::preflight::tests::config;
use crate::relay::preflight::tests::expect;

/// As setup leaves them.
pub(super) fn good() -> Facts {
    let stream = StreamInfo {
        config: StreamConfig {
            name: "EV".into(),
            subjects: vec!["events.>".into()],
            retention: "limits".into(),
            storage: "file".into(),
            num_replicas: 1,
            discard: "old".into(),
            max_msg_size: -1,
            max_msgs: -1,
            max_bytes: -1,
            duplicate_window: 120_000_000_000,
            ..StreamConfig::default()
        },
        state: StreamState::default(),
        created: String::new(),
        ts: String::new(),
        domain: String::new(),
    };
    Facts {
        server: "127.0.0.1:4222".into(),
        info: serde_json::from_str(
            r#"{"version":"2.15.1","max_payload":1048576,"jetstream":true}"#,
        )
        .unwrap(),
        tls: false,
        streams: Ok(vec![Stream {
            info: stream,
            publish: Some(Ok(())),
            elsewhere: None,
            read: Ok(()),
        }]),
        answers: None,
        long_subject: None,
        own: Vec::new(),
        bucket: bucket("file", Ok(())),
        park: None,
        account: Some(Ok(Account::default())),
        aggregate: None,
    }
}

/// As setup makes it, in this storage.
fn bucket(storage: &str, write: Tried) -> Bucket {
    let config = StreamConfig {
        subjects: vec!["$KV.jetstream_outbox.>".into()],
        storage: storage.into(),
        num_replicas: 3,
        max_msgs_per_subject: 1,
        discard: "new".into(),
        ..StreamConfig::default()
    };
    Bucket::Found {
        info: Box::new(StreamInfo {
            config,
            state: StreamState::default(),
            created: String::new(),
            ts: String::new(),
            domain: String::new(),
        }),
        has_key: true,
        write,
    }
}

#[test]
fn parking_needs_a_stream_that_takes_it() {
    use Level::{Fail, Ok};
    let found = |publish: Tried, read: Tried| Park::Found {
        stream: "parked".into(),
        publish,
        read,
        preflight: Preflight::default(),
    };
    for (park, level, part) in [
        (Park::Missing, Fail, "--subjects='jetstream_outbox.parked'"),
        (Park::Unreadable("denied".into()), Fail, "STREAM.NAMES"),
        (
            found(Err("denied".into()), Result::Ok(())),
            Fail,
            "publish to jetstream_outbox.parked",
        ),
        (
            found(Result::Ok(()), Err("denied".into())),
            Fail,
            "MSG.GET.parked",
        ),
        (
            found(Result::Ok(()), Result::Ok(())),
            Ok,
            "in stream parked",
        ),
    ] {
        check_with(
            &["-on-poison", "park"],
            level,
            "nats.parking",
            &[part],
            |f| {
                f.park = Some(park);
            },
        );
    }
}

/// Breaks good facts and expects exactly this finding, whose text, reason and remedy hold `parts`.
#[track_caller]
fn check_with(
    args: &[&str],
    level: Level,
    name: &str,
    parts: &[&str],
    break_it: impl FnOnce(&mut Facts),
) {
    let mut facts = good();
    break_it(&mut facts);
    let config = config(args);
    let findings: Vec<Finding> = JUDGES
        .iter()
        .flat_map(|judge| judge(&facts, &config))
        .collect();
    expect(&findings, level, name, parts);
}

#[track_caller]
fn check(level: Level, name: &str, parts: &[&str], break_it: impl FnOnce(&mut Facts)) {
    check_with(&[], level, name, parts, break_it);
}

fn stream(facts: &mut Facts) -> &mut Stream {
    facts.streams.as_mut().unwrap().first_mut().unwrap()
}

fn settings(facts: &mut Facts) -> &mut StreamConfig {
    &mut stream(facts).info.config
}

#[test]
fn what_setup_leaves_is_good() {
    check(
        Level::Ok,
        "",
        &["events.> is captured by EV (events.>)", "of up to 1.0 MB"],
        |_| {},
    );
}

#[test]
fn the_server() {
    use Level::{Fail, Ok, Warn};
    check(Warn, "nats.tls", &["tls://"], |f| {
        f.server = "nats.example.com:4222".into()
    });
    check(Ok, "", &["nats.tls                     used"], |f| {
        f.server = "nats.example.com:4222".into();
        f.tls = true;
    });
    for (jetstream, part) in [
        (true, "let the user publish to $JS.API.STREAM.NAMES"),
        (false, "store_dir"),
    ] {
        check(Fail, "nats.jetstream", &["nobody answers", part], |f| {
            f.streams = Err("nobody answers".into());
            f.bucket = Bucket::Unknown;
            f.info.jetstream = jetstream;
        });
    }
}

#[test]
fn the_streams() {
    use Level::{Fail, Ok, Warn};
    check(
        Fail,
        "nats.streams",
        &["no stream captures events.>", "setup"],
        |f| f.streams = Result::Ok(Vec::new()),
    );
    check(
        Fail,
        "nats.stream_settings",
        &["no_ack", "set no_ack to false"],
        |f| settings(f).no_ack = true,
    );
    check(Fail, "nats.stream_settings", &["sealed"], |f| {
        settings(f).sealed = true
    });
    check(Fail, "nats.stream_settings", &["async"], |f| {
        settings(f).persist_mode = "async".into()
    });
    check(Fail, "nats.stream_settings", &["replicated", "2.12"], |f| {
        settings(f).num_replicas = 3;
        f.info.version = "2.11.0".into();
    });
    check(Warn, "nats.stream_settings", &["memory"], |f| {
        settings(f).storage = "memory".into()
    });
    check(Warn, "nats.stream_settings", &["discard new"], |f| {
        settings(f).discard = "new".into();
        settings(f).max_msgs = 5;
    });
    check(
        Warn,
        "nats.stream_settings",
        &[
            "stream EV: it takes messages of up to 1000 bytes",
            "a larger event stops the relay",
        ],
        |f| settings(f).max_msg_size = 1000,
    );
    check(Ok, "", &[], |f| settings(f).max_msg_size = 1_048_576);
    let short = |f: &mut Facts| settings(f).duplicate_window = 30_000_000_000;
    check(Ok, "", &[], short);
    check_with(
        &["-delivery", "at-least-once"],
        Warn,
        "nats.duplicate_window",
        &["for 30 s", "--dupe-window"],
        short,
    );
}

/// As nats-server answers for an account without limits, with one set of them, and with tiers.
#[test]
fn the_account() {
    use Level::{Fail, Ok, Warn};
    let tiers = |r1: u32, r1_streams: u32, r3: u32| {
        format!(
            r#"{{"storage":{0},"streams":{r1_streams},"limits":{{"max_storage":0,"max_streams":0}},"tiers":{{
            "R1":{{"storage":{r1},"streams":{r1_streams},"limits":{{"max_storage":100,"max_streams":2}}}},
            "R3":{{"storage":{r3},"streams":1,"limits":{{"max_storage":100,"max_streams":1}}}}}}}}"#,
            r1 + r3
        )
    };
    let one = |storage: u32| {
        format!(
            r#"{{"storage":{storage},"streams":2,"limits":{{"max_storage":100,"max_streams":2}}}}"#
        )
    };
    let none = r#"{"storage":7,"streams":2,"limits":{"max_storage":-1,"max_streams":-1}}"#;
    for (answer, bucket, streams, level, part) in [
        (
            none.into(),
            true,
            true,
            Ok,
            "7 bytes in files of no limit, 2 streams of no limit",
        ),
        (
            one(80),
            true,
            true,
            Ok,
            "80 bytes in files of 100 bytes, 2 streams of 2",
        ),
        (
            one(81),
            true,
            true,
            Warn,
            "its files take 81 bytes of 100 bytes",
        ),
        (
            one(80),
            false,
            true,
            Warn,
            "2 of 2 streams are taken, and 1 more",
        ),
        (
            one(80),
            false,
            false,
            Fail,
            "2 of 2 streams are taken, and 2 more",
        ),
        (
            tiers(80, 1, 240),
            false,
            true,
            Ok,
            "tier R1: 80 bytes in files of 100 bytes, 1 streams of 2; tier R3: 240 bytes in files of 300 bytes, 1 streams of 1",
        ),
        (
            tiers(81, 1, 0),
            true,
            true,
            Warn,
            "tier R1: its files take 81 bytes of 100 bytes",
        ),
        (
            tiers(0, 1, 241),
            true,
            true,
            Warn,
            "tier R3: its files take 241 bytes of 300 bytes",
        ),
        (
            tiers(0, 1, 0),
            false,
            false,
            Fail,
            "tier R1: 1 of 2 streams; tier R3: 1 of 1 streams are taken, and 2 more",
        ),
    ] {
        let mut facts = good();
        facts.account = Some(Result::Ok(serde_json::from_str(&answer).unwrap()));
        if !bucket {
            facts.bucket = Bucket::Missing;
        }
        if !streams {
            facts.streams = Result::Ok(Vec::new());
        }
        let findings = account::judge(&facts, &config(&[]));
        let [finding] = findings.as_slice() else {
            panic!("{findings:?}");
        };
        assert_eq!(finding.level, level, "{finding}");
        assert!(finding.found.starts_with(part), "{finding}");
    }
}

#[test]
fn messages_that_are_gone_from_the_middle_are_missed_where_none_goes_by_itself() {
    use Level::{Ok, Warn};
    let lost = |facts: &mut Facts| stream(facts).info.state.num_deleted = 3;
    check(Warn, "nats.holes", &["EV has lost 3 messages"], lost);
    check(Ok, "", &[], |facts| {
        lost(facts);
        settings(facts).max_msgs_per_subject = 1;
    });
}

#[test]
fn permissions() {
    use Level::{Fail, Ok, Warn};
    let denied = || Err("Permissions Violation".to_string());
    check(
        Fail,
        "nats.publish",
        &["Permissions Violation", "publish to events.>"],
        |f| stream(f).publish = Some(denied()),
    );
    check(Ok, "", &[], |f| stream(f).publish = None);
    check(Fail, "nats.read", &["$JS.API.STREAM.MSG.GET.EV"], |f| {
        stream(f).read = denied()
    });
    check(
        Fail,
        "nats.checkpoint",
        &["publish to $KV.jetstream_outbox.*"],
        |f| {
            f.bucket = bucket("file", denied());
        },
    );
    check(Warn, "nats.checkpoint", &["in memory"], |f| {
        f.bucket = bucket("memory", Result::Ok(()));
    });
    check(Warn, "nats.checkpoint", &["does not exist", "setup"], |f| {
        f.bucket = Bucket::Missing
    });
    let unreadable = |f: &mut Facts| f.bucket = Bucket::Unreadable("no".into());
    let parts = ["STREAM.INFO.KV_jetstream_outbox"];
    check(Fail, "nats.checkpoint", &parts, unreadable);
    let args = ["-delivery", "at-least-once"];
    check_with(&args, Warn, "nats.checkpoint", &parts, unreadable);
}

#[test]
fn a_publish_is_tried_under_the_prefix_alone() {
    for (patterns, expected) in [
        (&["events.>"][..], Some("events.outbox-check.outbox-check")),
        (&[">"], Some("events.outbox-check.outbox-check")),
        (&["events.*"], Some("events.outbox-check")),
        (&["events.account.>"], Some("events.account.outbox-check")),
        (&["other.>", "events.a.b"], Some("events.a.b")),
        (&["*.account.*"], None),
        (&["other.>"], None),
        (&[], None),
    ] {
        let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
        assert_eq!(
            probe_subject(&patterns, "events").as_deref(),
            expected,
            "{patterns:?}"
        );
    }
}

#[test]
fn a_subject_that_leads_elsewhere_is_a_failure() {
    let streams = "nats.streams";
    check(Level::Fail, streams, &["OTHER", "events.a.b"], |facts| {
        for stream in facts.streams.as_mut().unwrap() {
            stream.elsewhere = Some(("OTHER".into(), "events.a.b".into()));
        }
    });
    // both answer: one finding is enough
    check(Level::Fail, streams, &["LOCAL", "domain"], |facts| {
        facts.own = vec!["LOCAL".into()];
        for stream in facts.streams.as_mut().unwrap() {
            stream.elsewhere = Some(("LOCAL".into(), "events.a.b".into()));
        }
    });
    check(Level::Fail, streams, &["EVT stores", "mapping"], |facts| {
        facts.streams = Ok(Vec::new());
        facts.answers = Some("EVT".into());
    });
}
