//! Answers as servers wrote them.

use super::*;

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
