//! `check` on the NATS side: each finding, made by really breaking that thing.

use crate::check_postgres::{check, finding, set_up};
use crate::command::{on, run};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM, stream};
use crate::support::nats::Nats;
use crate::support::operator::Operator;
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use serde_json::{Value, json};

/// A Postgres that is well, and a server with these streams beside the checkpoint's bucket.
fn with_streams(streams: &[Value]) -> Rig {
    let rig = set_up(Postgres::builder());
    replace(&rig, streams);
    rig
}

/// Puts these streams in place of the present one.
fn replace(rig: &Rig, streams: &[Value]) {
    let mut nats = rig.nats.client();
    let names = nats.api("STREAM.NAMES", &json!({ "subject": "events.>" }));
    for name in names["streams"].as_array().into_iter().flatten() {
        nats.api(
            &format!("STREAM.DELETE.{}", name.as_str().unwrap()),
            &Value::Null,
        );
    }
    streams
        .iter()
        .for_each(|stream| nats.add_stream_with(stream.clone()));
}

#[test]
fn no_server_no_jetstream_no_stream() {
    let rig = set_up(Postgres::builder());
    let db = rig.pg.url("postgres", "postgres");
    let report = run(&["check", "-json", "-db", &db, "-nats", "127.0.0.1:1"], &[]).json(2);
    assert_eq!(
        finding(&report["findings"], "nats.connection")["level"],
        "fail"
    );
    let off = Nats::builder().without_jetstream().build();
    let report = run(&["check", "-json", "-db", &db, "-nats", &off.url()], &[]).json(2);
    let found = finding(&report["findings"], "nats.jetstream");
    assert!(
        found["fix"]
            .as_str()
            .is_some_and(|fix| fix.contains("store_dir")),
        "{found}"
    );
    replace(&rig, &[]);
    check(&rig, &[], &[("nats.streams", "fail")]);
    // an API that does not exist
    check(
        &rig,
        &["-nats-api-prefix", "$JS.none.API"],
        &[("nats.jetstream", "fail")],
    );
}

#[test]
fn tls_is_missed_on_the_way_to_another_machine() {
    let rig = set_up(Postgres::builder());
    let db = rig.pg.url("postgres", "postgres");
    // an address that is none of the loopback interface, and yet is this machine
    let nats = Nats::builder().config("host: 0.0.0.0").build();
    let url = format!("nats://0.0.0.0:{}", nats.port());
    let report = run(&["check", "-json", "-db", &db, "-nats", &url], &[]).json(2);
    assert_eq!(
        finding(&report["findings"], "nats.tls")["level"],
        "warn",
        "{report:#}"
    );
}

#[test]
fn a_stream_that_cannot_carry_the_promises() {
    let rig = with_streams(&[]);
    let second = 1_000_000_000_u64;
    for (settings, args, name, level) in [
        (
            json!({ "no_ack": true }),
            &[][..],
            "nats.stream_settings",
            "fail",
        ),
        (
            json!({ "storage": "memory" }),
            &[],
            "nats.stream_settings",
            "warn",
        ),
        (
            json!({ "discard": "new", "max_msgs": 5 }),
            &[],
            "nats.stream_settings",
            "warn",
        ),
        (
            json!({ "max_msg_size": 1000 }),
            &[],
            "nats.stream_settings",
            "warn",
        ),
        (
            json!({ "retention": "interest" }),
            &[],
            "nats.stream_settings",
            "warn",
        ),
        (
            json!({ "duplicate_window": second }),
            &["-delivery", "at-least-once"],
            "nats.duplicate_window",
            "warn",
        ),
    ] {
        replace(&rig, &[stream(&settings)]);
        check(&rig, args, &[(name, level)]);
    }
    replace(&rig, &[stream(&json!({ "retention": "interest" }))]);
    let consumer = json!({ "stream_name": STREAM, "config": { "durable_name": "c", "ack_policy": "explicit" } });
    rig.nats
        .client()
        .api(&format!("CONSUMER.DURABLE.CREATE.{STREAM}.c"), &consumer);
    check(&rig, &[], &[]);
    replace(&rig, &[stream(&json!({}))]);
    check(&rig, &[], &[]);
    rig.set_stream(&json!({ "sealed": true }));
    check(
        &rig,
        &[],
        &[("nats.stream_settings", "fail"), ("nats.publish", "fail")],
    );
}

#[test]
fn nothing_that_check_tries_is_stored() {
    let rig = with_streams(&[
        json!({ "name": "A", "subjects": ["events.account.>"] }),
        json!({ "name": "B", "subjects": ["events.order.*", "events.x"] }),
    ]);
    let findings = check(&rig, &[], &[]);
    let found = finding(&findings, "nats.streams")["found"].as_str();
    assert_eq!(
        found,
        Some("events.> is captured by A (events.account.>), B (events.order.*, events.x)")
    );
    for stream in ["A", "B", "KV_jetstream_outbox"] {
        assert_eq!(rig.nats.client().last_seq(stream), 0, "{stream}");
    }
}

/// A user who may do everything but `denied`, on a server with the stream and the bucket.
fn denying(rig: &Rig, denied: &str, create_bucket: bool) -> Nats {
    let config = format!(
        "authorization {{ users: [ {{ user: admin, password: admin }}, {{ user: relay, password: relay, \
         permissions: {{ publish: {{ deny: [\"{denied}\"] }} }} }} ] }}"
    );
    let nats = Nats::builder()
        .config(&config)
        .client_options(json!({ "user": "admin", "pass": "admin" }))
        .build();
    nats.client().add_seed_stream();
    if create_bucket {
        let url = format!("nats://admin:admin@127.0.0.1:{}", nats.port());
        run(
            &[
                "setup",
                "-db",
                &rig.pg.url("postgres", "postgres"),
                "-nats",
                &url,
            ],
            &[],
        )
        .with(0);
    }
    nats
}

#[test]
fn a_permission_is_missing() {
    let rig = set_up(Postgres::builder());
    let db = rig.pg.url("postgres", "postgres");
    for (denied, bucket, expected) in [
        ("none", true, vec![]),
        (
            "$JS.API.STREAM.NAMES",
            true,
            vec![("nats.jetstream", "fail")],
        ),
        // the limits of the account are worth a look, and no permission
        ("$JS.API.INFO", true, vec![]),
        ("events.>", true, vec![("nats.publish", "fail")]),
        (
            "$JS.API.STREAM.MSG.GET.jetstream_outbox",
            true,
            vec![("nats.read", "fail")],
        ),
        ("$KV.>", true, vec![("nats.checkpoint", "fail")]),
        (
            "$JS.API.STREAM.MSG.GET.KV_jetstream_outbox",
            true,
            vec![("nats.checkpoint", "fail")],
        ),
        ("none", false, vec![("nats.checkpoint", "warn")]),
    ] {
        let nats = denying(&rig, denied, bucket);
        let url = format!("nats://relay:relay@127.0.0.1:{}", nats.port());
        let ended = run(&["check", "-json", "-db", &db, "-nats", &url], &[]);
        let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
        let bad: Vec<(&str, &str)> = (report["findings"].as_array().into_iter().flatten())
            .filter(|finding| finding["level"] != "ok")
            .filter_map(|finding| Some((finding["name"].as_str()?, finding["level"].as_str()?)))
            .collect();
        assert_eq!(bad, expected, "{denied}: {report:#}");
    }
}

/// Events are parked where a stream takes them and the relay may write and read: tried, and nothing is stored.
#[test]
fn parking() {
    let rig = set_up(Postgres::builder());
    let park = ["-on-poison", "park"];
    let bad = [("nats.parking", "fail")];
    check(&rig, &park, &bad);
    check(&rig, &["-on-bad-subject", "park"], &bad);
    check(&rig, &[], &[]);
    on(&rig, &[&["setup"], &park[..]].concat()).with(0);
    check(&rig, &park, &[]);
    assert_eq!(rig.nats.client().last_seq("jetstream_outbox_parked"), 0);

    let db = rig.pg.url("postgres", "postgres");
    for denied in [
        "jetstream_outbox.parked",
        "$JS.API.STREAM.MSG.GET.jetstream_outbox_parked",
    ] {
        let nats = denying(&rig, denied, true);
        let at = |user: &str| format!("nats://{user}:{user}@127.0.0.1:{}", nats.port());
        let (admin, relay) = (at("admin"), at("relay"));
        run(
            &["setup", "-db", &db, "-nats", &admin, "-on-poison", "park"],
            &[],
        )
        .with(0);
        let args = [
            "check",
            "-json",
            "-db",
            &db,
            "-nats",
            &relay,
            "-on-poison",
            "park",
        ];
        let report = run(&args, &[]).json(2);
        let found = finding(&report["findings"], "nats.parking");
        let fix = found["fix"].as_str().unwrap_or_default();
        assert_eq!(fix, format!("let the user publish to {denied}"), "{found}");
    }
}

/// What is parked needs a stream that keeps it as much as any event does; setup says so of one that it finds.
#[test]
fn a_stream_for_parking_that_cannot_keep_its_promise() {
    let rig = set_up(Postgres::builder());
    let park = ["-on-poison", "park"];
    let name = "parked";
    for (setting, value, level, told) in [
        ("no_ack", json!(true), "fail", "acknowledges nothing"),
        ("sealed", json!(true), "fail", "is sealed"),
        ("storage", json!("memory"), "warn", "it is kept in memory"),
    ] {
        let mut nats = rig.nats.client();
        nats.add_stream_with(json!({ "name": name, "subjects": ["jetstream_outbox.parked"] }));
        check(&rig, &park, &[]);
        let mut config = nats.stream_info(name)["config"].clone();
        config[setting] = value;
        if setting == "storage" {
            nats.api(&format!("STREAM.DELETE.{name}"), &Value::Null);
            nats.add_stream_with(config);
        } else {
            let answer = nats.api(&format!("STREAM.UPDATE.{name}"), &config);
            assert!(answer["error"].is_null(), "{answer}");
        }
        let findings = check(&rig, &park, &[("nats.parking", level)]);
        assert!(findings.to_string().contains(told), "{findings:#}");
        let ended = on(&rig, &[&["setup"], &park[..]].concat());
        let line = format!("differs  stream {name} of jetstream_outbox.parked: ");
        let text = ended.with(78);
        assert!(text.contains(&line) && text.contains(told), "{text}");
        nats.api(&format!("STREAM.DELETE.{name}"), &Value::Null);
    }
}

#[test]
fn the_bucket_is_in_memory() {
    let rig = set_up(Postgres::builder());
    let mut nats = rig.nats.client();
    let name = "KV_jetstream_outbox";
    let mut config = nats.stream_info(name)["config"].clone();
    nats.api(&format!("STREAM.DELETE.{name}"), &Value::Null);
    config["storage"] = json!("memory");
    nats.add_stream_with(config);
    check(&rig, &[], &[("nats.checkpoint", "warn")]);
}

/// A bucket as people make it by hand, or as it was edited.
#[test]
fn the_bucket_does_not_keep_the_record() {
    let rig = set_up(Postgres::builder());
    let mut nats = rig.nats.client();
    let name = "KV_jetstream_outbox";
    let good = nats.stream_info(name)["config"].clone();
    for (setting, value, told) in [
        (
            "max_age",
            json!(3_600_000_000_000_u64),
            "drops what is in it after 3600 s (max_age)",
        ),
        (
            "max_msg_size",
            json!(1000),
            "takes values of up to 1000 bytes (max_msg_size)",
        ),
    ] {
        let mut config = good.clone();
        config[setting] = value;
        nats.api(&format!("STREAM.UPDATE.{name}"), &config);
        let findings = check(&rig, &[], &[("nats.checkpoint", "warn")]);
        let found = finding(&findings, "nats.checkpoint")["found"].as_str();
        assert_eq!(
            found,
            Some(format!("bucket jetstream_outbox {told}").as_str())
        );
        let ended = on(&rig, &["setup"]);
        let line = format!("differs  checkpoint bucket jetstream_outbox: it {told}: ");
        assert!(ended.with(78).contains(&line), "{ended:?}");
    }
    nats.api(&format!("STREAM.UPDATE.{name}"), &good);
    check(&rig, &[], &[]);
}

/// nats-server's own limit is shorter than what setup would ask for: it takes what the server gives.
#[test]
fn the_server_limits_the_window_of_duplicates() {
    let rig = set_up(Postgres::builder());
    let block = "jetstream { store_dir: \"{dir}/store\", limits { duplicate_window: \"1m\" } }";
    let rig = Rig {
        nats: Nats::builder().without_jetstream().config(block).build(),
        pg: rig.pg,
    };
    on(&rig, &["setup"]).with(0);
    for stream in [STREAM, "KV_jetstream_outbox"] {
        let config = rig.nats.client().stream_info(stream)["config"].clone();
        assert_eq!(
            config["duplicate_window"],
            json!(60_000_000_000_u64),
            "{stream}"
        );
    }
    check(&rig, &[], &[]);
    let at_least_once = ["-delivery", "at-least-once"];
    let findings = check(&rig, &at_least_once, &[("nats.duplicate_window", "warn")]);
    let fix = finding(&findings, "nats.duplicate_window")["fix"].as_str();
    assert!(
        fix.is_some_and(|fix| fix.contains("raise that first")),
        "{fix:?}"
    );
}

#[test]
fn the_stream_is_of_another_postgres() {
    let rig = set_up(Postgres::builder());
    rig.commit_event(1, "a");
    rig.drain(&[]);
    check(&rig, &[], &[]);
    let other = Rig {
        pg: Postgres::builder().own_system_id().build(),
        nats: rig.nats,
    };
    on(&other, &["setup"]).with(0);
    check(&other, &[], &[("both.history", "fail")]);
}

#[test]
fn the_slot_is_not_where_the_relay_has_left_it() {
    let rig = set_up(Postgres::builder());
    rig.commit_event(1, "a");
    rig.drain(&["-hold-back", "0"]);
    let findings = check(&rig, &[], &[]);
    assert_eq!(finding(&findings, "both.slot_position")["level"], "ok");
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    rig.commit_event(2, "a");
    on(&rig, &["setup"]).with(0);
    check(&rig, &[], &[("both.slot_position", "fail")]);
    // the relay says so too, and its remedy is the finding's
    let (code, log) = rig.run(&["-drain"]);
    assert_eq!(code, 78, "{log:?}");
    rig.drain(&["-resume-anyway", "-hold-back", "0"]);
    check(&rig, &[], &[]);
}

/// Room in the account, which other streams share.
#[test]
fn the_account_is_nearly_full() {
    let rig = set_up(Postgres::builder());
    let limited = |limits: &str| {
        let account = format!(
            "accounts {{ A {{ jetstream {{ {limits} }}, users: [ {{ user: a, password: a }} ] }} }}"
        );
        Nats::builder()
            .config(&account)
            .client_options(json!({ "user": "a", "pass": "a" }))
            .build()
    };
    let with_stream = |limits: &str| {
        let nats = limited(limits);
        nats.client().add_seed_stream();
        nats
    };
    let db = rig.pg.url("postgres", "postgres");
    let bad = |nats: &Nats, code: i32, more: &[&str]| {
        let url = format!("nats://a:a@127.0.0.1:{}", nats.port());
        let args = [
            &["check", "-json", "-strict", "-db", &db, "-nats", &url],
            more,
        ]
        .concat();
        let report = run(&args, &[]).json(code);
        let all = report["findings"].as_array().expect("a list").clone();
        let bad = all.iter().filter(|finding| finding["level"] != "ok");
        let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or("").to_string();
        bad.map(|finding| format!("{} {}", text(finding, "level"), text(finding, "name")))
            .collect::<Vec<String>>()
    };
    // one stream is there: the bucket is one more, the parked events' another
    let nats = with_stream("max_file: 100000, max_streams: 2");
    assert_eq!(bad(&nats, 1, &[]), ["warn nats.checkpoint"]);
    let park = ["-on-poison", "park"];
    assert_eq!(
        bad(&nats, 2, &park),
        [
            "fail nats.account",
            "warn nats.checkpoint",
            "fail nats.parking"
        ]
    );
    nats.client().add_stream_with(json!({
        "name": "KV_jetstream_outbox", "subjects": ["$KV.jetstream_outbox.>"], "max_msgs_per_subject": 1,
    }));
    assert!(bad(&nats, 0, &[]).is_empty());
    nats.client().publish("events.a", &[], &[b'x'; 70_000]);
    assert!(bad(&nats, 0, &[]).is_empty());
    nats.client().publish("events.a", &[], &[b'x'; 20_000]);
    assert_eq!(bad(&nats, 1, &[]), ["warn nats.account"]);

    let nats = with_stream("max_file: 100000, max_streams: 1");
    assert_eq!(
        bad(&nats, 1, &[]),
        ["warn nats.account", "warn nats.checkpoint"]
    );

    let nats = limited("max_bytes_required: true");
    assert_eq!(
        bad(&nats, 2, &[]),
        [
            "fail nats.account",
            "fail nats.streams",
            "warn nats.checkpoint"
        ]
    );
    let url = format!("nats://a:a@127.0.0.1:{}", nats.port());
    // as the finding says
    let setup = ["setup", "-db", &db, "-nats", &url, "-aggregate", "ALL"];
    let ended = run(&setup, &[]);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(ended.stderr.contains("pass -max-bytes"), "{ended:?}");
    for _ in 0..2 {
        run(&[&setup[..], &["-max-bytes", "1GB"]].concat(), &[]).with(0);
    }
    for stream in [STREAM, "ALL"] {
        let config = nats.client().stream_info(stream)["config"].clone();
        assert_eq!(config["max_bytes"], 1_000_000_000, "{stream}");
    }
    // nor does the relay fail to create its bucket
    let bucket = "KV_jetstream_outbox";
    for by_relay in [false, true] {
        if by_relay {
            nats.client()
                .api(&format!("STREAM.DELETE.{bucket}"), &Value::Null);
            let mut relay = Relay::run(&["-db", &db, "-nats", &url, "-drain"], &[]);
            assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
        }
        let config = nats.client().stream_info(bucket)["config"].clone();
        assert_eq!(config["max_bytes"], 16 << 20, "{by_relay}");
    }
    // the limit of the streams is worth a word
    assert_eq!(bad(&nats, 1, &[]), ["warn nats.stream_settings"]);
}

/// Limits by number of replicas, which an account's token may set in place of the ones for all.
#[test]
fn a_tier_of_the_account_is_nearly_full() {
    let rig = set_up(Postgres::builder());
    let tier = |storage: u32, streams: u32| {
        format!(
            r#"{{"mem_storage":-1,"disk_storage":{storage},"streams":{streams},"consumer":-1,"max_ack_pending":-1}}"#
        )
    };
    let tiers = [tier(100_000, 3), tier(50_000, 1)];
    let operator = Operator::new(&format!(
        r#","tiered_limits":{{"R1":{},"R3":{}}}"#,
        tiers[0], tiers[1]
    ));
    let nats = Nats::builder()
        .config(&operator.config())
        .file("creds", operator.credentials(""))
        .client_options(json!({ "jwt": operator.bearer() }))
        .build();
    let creds = nats.dir().join("creds").display().to_string();
    let (db, url) = (rig.pg.url("postgres", "postgres"), nats.url());
    let servers = ["-db", &db, "-nats", &url, "-creds", &creds];
    run(&[&["setup"], &servers[..]].concat(), &[]).with(0);
    let check = |code: i32| {
        let args = [&["check", "-json", "-strict"], &servers[..]].concat();
        let report = run(&args, &[]).json(code);
        let found = finding(&report["findings"], "nats.account");
        let text = |key: &str| found[key].as_str().unwrap_or_default();
        format!("{}: {}", text("level"), text("found"))
    };
    assert_eq!(
        check(0),
        "ok: tier R1: 0 bytes in files of 100.0 kB, 2 streams of 3; tier R3: 0 bytes in files of 150.0 kB, 0 streams of 1"
    );
    nats.client().publish("events.a", &[], &[b'x'; 90_000]);
    assert_eq!(
        check(1),
        "warn: tier R1: its files take 90.0 kB of 100.0 kB"
    );
}

#[test]
fn a_stream_captures_what_is_the_buckets() {
    let rig = Rig::start_without_stream();
    let subjects = json!({ "subjects": ["events.>", "$KV.>"] });
    rig.nats.client().add_stream_with(stream(&subjects));
    let report = check(&rig, &[], &[("nats.checkpoint", "fail")]);
    let word = format!("stream {STREAM} captures $KV.{SLOT}.>");
    assert!(report.to_string().contains(&word), "{report}");
    let mut relay = rig.relay(&[]);
    assert_eq!(relay.wait_exit(DEADLINE), 78);
    let last = relay.log().pop().expect("it says why");
    assert!(last.contains(&word), "{last}");
}
