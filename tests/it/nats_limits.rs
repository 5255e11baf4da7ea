//! What NATS allows may change while the relay runs: it is asked again before an event is called too large.

use crate::rig::{DEADLINE, Rig, uuid};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use serde_json::json;
use std::fs;

const SMALL: &str = "max_payload: 2000";
const LARGE: &str = "max_payload: 1000000";

fn start(limit: &str) -> Rig {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder()
            .config("include limit")
            .file("limit", limit)
            .build(),
    };
    rig.pg.seed_setup();
    let mut client = rig.nats.client();
    client.add_seed_stream();
    client.add_stream("parked", &["jetstream_outbox.parked"]);
    rig
}

/// An event of 4 kB, between two small ones.
fn commit_large(rig: &Rig) {
    let id = uuid(2);
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ('{id}', 'account', 'large', to_jsonb(repeat('x', 4000)))"
    ));
    rig.commit_event(3, "c");
}

fn set(rig: &Rig, limit: &str) {
    fs::write(rig.nats.dir().join("limit"), limit).expect("write the limit");
    rig.nats.reload();
}

/// It is parked, or stops the relay, only where it does not fit.
#[test]
fn a_raised_max_payload_is_found_before_an_event_is_called_too_large() {
    for policy in ["stop", "park"] {
        let rig = start(SMALL);
        let relay = rig.relay(&["-on-poison", policy]);
        rig.commit_event(1, "a");
        rig.wait_for_messages(1);
        set(&rig, LARGE);
        commit_large(&rig);
        rig.wait_for_messages(3);
        let log = relay.log().join("\n");
        assert!(
            log.contains("reading max_payload of the server again"),
            "{log}"
        );
        assert_eq!(rig.nats.client().message_count("parked"), 0, "{policy}");
    }
}

#[test]
fn a_lowered_max_payload_is_found_by_what_the_server_refuses() {
    let rig = start(LARGE);
    let relay = rig.relay(&["-on-poison", "park"]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    set(&rig, SMALL);
    commit_large(&rig);
    // the third comes after the one that is parked
    rig.wait_for_messages(2);
    let log = relay.log().join("\n");
    assert!(log.contains("parking an event"), "{log}");
    assert_eq!(rig.nats.client().message_count("parked"), 1);
}

#[test]
fn a_raised_max_msg_size_is_found_before_an_event_is_called_too_large() {
    let rig = start(LARGE);
    let limit = |max_msg_size: i32| rig.set_stream(&json!({ "max_msg_size": max_msg_size }));
    limit(2_000);
    let relay = rig.relay(&[]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    limit(-1);
    commit_large(&rig);
    rig.wait_for_messages(3);
    let log = relay.log().join("\n");
    assert!(
        log.contains("reading max_msg_size of the stream again"),
        "{log}"
    );
}

/// A full disk: from 2.14 on nats-server says nothing to who publishes. The relay says what it may be, and nothing is lost.
#[test]
fn a_store_that_cannot_write_is_named() {
    let rig = Rig::start();
    let relay = rig.relay(&["--hold-back", "0", "--ack-timeout", "1s"]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    rig.nats.limit_files(Some(50_000));
    let large = "INSERT INTO outbox SELECT ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, 'account', 'a', \
                 jsonb_build_object('n', repeat('x', 3000)) FROM generate_series(2, 100) n";
    rig.pg.execute(large);
    relay.wait_for_log("store cannot write", DEADLINE);
    rig.nats.limit_files(None);
    // it may need to be told
    rig.nats.restart();
    rig.wait_for_messages(100);
    let ids: Vec<String> = rig
        .messages()
        .iter()
        .map(|it| it.id().to_string())
        .collect();
    assert_eq!(ids, (1..=100).map(uuid).collect::<Vec<_>>());
}
