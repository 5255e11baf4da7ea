//! Answers as servers wrote them.

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
                consumer_count: 0,
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
