//! What `setup` and `check` say where a subject leads elsewhere than its stream: domains, mappings, imports.

use crate::check_postgres::{check, finding};
use crate::command::{at, run};
use crate::rig::{DEADLINE, Rig, STREAM};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use serde_json::{Value, json};

const OF_HUB: [&str; 2] = ["-nats-api-prefix", "$JS.hub.API"];

/// The checkpoint's writes and all else go through the prefix, and what is printed permits that and suffices.
#[test]
fn a_relay_at_a_leaf_node_works_in_the_hub_with_what_is_printed() {
    let pg = Postgres::start();
    pg.seed_setup();
    let db = pg.url("postgres", "postgres");
    let printed = run(
        &[&["setup", "--print-nats", "-db", &db], &OF_HUB[..]].concat(),
        &[],
    );
    let (config, requests) = printed.with(0).split_once("# Then").expect("two parts");
    assert!(
        config.contains(r#""$JS.hub.API.$KV.jetstream_outbox.*""#),
        "{config}"
    );
    let admin = "authorization {\n  users: [\n    { user: admin, password: admin }";
    let config = config.replace("authorization {\n  users: [", admin);
    let (hub, leaf) = Nats::hub_and_leaf(&config, &json!({ "user": "admin", "pass": "admin" }));
    let mut client = leaf.client();
    for line in requests.lines().filter(|it| it.starts_with("nats request")) {
        let words: Vec<&str> = line.split('\'').collect();
        let [_, subject, _, body, _] = words.as_slice() else {
            panic!("{line}")
        };
        client
            .try_request(subject, &[], body.as_bytes())
            .expect("the hub answers");
    }
    let nats = format!("nats://relay:choose-a-better-one@127.0.0.1:{}", leaf.port());
    let flags = [&["-db", &db, "-nats", &nats], &OF_HUB[..]].concat();
    let rig = Rig { pg, nats: leaf };
    rig.commit_event(1, "a");
    let mut relay = Relay::run(&[&flags[..], &["-drain", "-hold-back=0"]].concat(), &[]);
    assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    assert_eq!(hub.client().message_count(STREAM), 1);
    assert_eq!(hub.client().message_count("KV_jetstream_outbox"), 1);
    run(&[&flags[..], &["check", "--strict"]].concat(), &[]).with(0);
}

/// Each has a stream of the subjects: said before the relay halts over it.
#[test]
fn a_leaf_nodes_own_stream_of_the_same_subjects_is_found() {
    let (hub, leaf) = Nats::hub_and_leaf("", &json!({}));
    let rig = Rig {
        pg: Postgres::start(),
        nats: leaf,
    };
    at(&rig.pg, &rig.nats, &[&["setup"], &OF_HUB[..]].concat()).with(0);
    assert_eq!(hub.client().message_count("KV_jetstream_outbox"), 0);
    check(&rig, &OF_HUB, &[]);
    let mut client = rig.nats.client();
    client.add_stream("LOCAL", &["events.>"]);
    let findings = check(&rig, &OF_HUB, &[("nats.streams", "fail")]);
    let found = finding(&findings, "nats.streams").to_string();
    assert!(
        found.contains("LOCAL") && found.contains("domain"),
        "{found}"
    );
    // also of the same name
    client.api("STREAM.DELETE.LOCAL", &Value::Null);
    client.add_seed_stream();
    check(&rig, &OF_HUB, &[("nats.streams", "fail")]);
    // to the hub itself, its own domain is no other
    let rig = Rig {
        pg: rig.pg,
        nats: hub,
    };
    check(&rig, &OF_HUB, &[]);
}

#[test]
fn a_mapping_that_leads_elsewhere_is_found() {
    let half = |other: &str| {
        format!(
            r#""events.>": [ {{ destination: "events.>", weight: "50%" }}, {{ destination: "{other}", weight: "50%" }} ]"#
        )
    };
    for (mapping, streams, bad, words) in [
        (
            r#""events.>": "evt.>""#.to_string(),
            vec![("EVT", "evt.>")],
            true,
            "EVT stores",
        ),
        (
            half("other.>"),
            vec![(STREAM, "events.>"), ("OTHER", "other.>")],
            true,
            "reaches stream OTHER",
        ),
        (
            half("events.more.>"),
            vec![(STREAM, "events.>")],
            false,
            "is captured by",
        ),
    ] {
        let rig = Rig {
            pg: Postgres::start(),
            nats: Nats::builder()
                .config(&format!("mappings = {{ {mapping} }}"))
                .build(),
        };
        at(&rig.pg, &rig.nats, &["setup"]).with(0);
        let mut client = rig.nats.client();
        client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
        for (name, subject) in &streams {
            client.add_stream(name, &[*subject]);
        }
        let expected = [("nats.streams", "fail")];
        let findings = check(&rig, &[], if bad { &expected } else { &[] });
        let found = finding(&findings, "nats.streams").to_string();
        assert!(found.contains(words), "{found}");
        for (name, _) in &streams {
            assert_eq!(client.last_seq(name), 0, "{name}");
        }
    }
}

/// `max_control_line` is in no INFO: it is found by trying.
#[test]
fn a_server_whose_lines_are_too_short_for_long_subjects_is_found() {
    for (limit, expected) in [(1024, &[("nats.publish", "warn")][..]), (4096, &[])] {
        let rig = Rig {
            pg: Postgres::start(),
            nats: Nats::builder()
                .config(&format!("max_control_line: {limit}"))
                .build(),
        };
        at(&rig.pg, &rig.nats, &["setup"]).with(0);
        let findings = check(&rig, &[], expected);
        if limit == 1024 {
            let found = finding(&findings, "nats.publish").to_string();
            assert!(found.contains("maximum control line exceeded"), "{found}");
        }
        assert_eq!(rig.nats.client().last_seq(STREAM), 0);
    }
}
