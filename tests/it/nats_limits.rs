//! What NATS allows may change while the relay runs: it is asked again before an event is called too large.

use crate::rig::{DEADLINE, Rig, UUID_SQL, uuid};
use crate::support::command::run;
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use serde_json::{Value, json};
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

/// A server that drops whoever has so many bytes waiting.
fn with_max_pending(limits: &str) -> Rig {
    let nats = Nats::builder().config("include limit");
    let rig = Rig {
        pg: Postgres::start(),
        nats: nats.file("limit", limits).build(),
    };
    rig.pg.seed_setup();
    rig.nats.client().add_seed_stream();
    rig
}

/// Commits events with bodies of so many bytes.
fn commit_many(rig: &Rig, numbers: std::ops::RangeInclusive<u64>, bytes: usize) {
    let (first, last) = (numbers.start(), numbers.end());
    rig.pg.execute(&format!(
        "INSERT INTO outbox SELECT {UUID_SQL}, 'account', 'a', to_jsonb(repeat('x', {bytes})) FROM generate_series({first}, {last}) n"
    ));
}

/// A server reads `max_pending` at its start alone.
fn lift(rig: &Rig) {
    fs::write(rig.nats.dir().join("limit"), LARGE).expect("write the limit");
    rig.nats.restart();
}

fn lose_the_record(rig: &Rig) {
    let mut client = rig.nats.client();
    client.api("STREAM.DELETE.KV_jetstream_outbox", &Value::Null);
}

/// How often the relay has lost NATS, or a session.
fn losses(log: &[String]) -> usize {
    let words = ["connected to NATS again", "trying again"];
    let is_one = |line: &&String| words.iter().any(|words| line.contains(words));
    log.iter().filter(is_one).count()
}

/// The acks of a large window are over the limit when the server gets to them all at once.
#[test]
fn bursts_get_over_a_small_max_pending_and_the_log_of_the_server_is_pointed_to() {
    let rig = with_max_pending("max_pending: 65536, max_payload: 32768");
    for (numbers, bytes) in [(1..=30_000, 1), (30_001..=31_000, 30_000)] {
        commit_many(&rig, numbers, bytes);
        let log = rig.drain(&["-inflight", "10000"]);
        let found = losses(&log);
        assert!(found < 20, "{log:#?}");
        let is_named = log.join("\n").contains("its log says why");
        assert_eq!(is_named, found > 0, "{log:#?}");
    }
    lift(&rig);
    assert_eq!(rig.ids(), (1..=31_000).map(uuid).collect::<Vec<_>>());
}

/// Reading back asks for as many messages at a time as the server manages.
#[test]
fn large_messages_are_read_back_over_a_small_max_pending() {
    let rig = with_max_pending("max_pending: 200000, max_payload: 71680");
    commit_many(&rig, 1..=300, 60_000);
    // nothing is confirmed
    let relay = rig.relay(&[]);
    rig.wait_for_messages(300);
    relay.kill();
    lose_the_record(&rig);
    rig.commit_event(301, "a");
    let log = rig.drain(&[]);
    assert!((1..=7).contains(&losses(&log)), "{log:#?}");
    lift(&rig);
    assert_eq!(rig.ids(), (1..=301).map(uuid).collect::<Vec<_>>());
}

/// An answer has the message in base64. What the server can never send is named, by `check` too, until it can.
#[test]
fn a_message_whose_answer_is_over_max_pending_is_named() {
    let rig = with_max_pending("max_pending: 102400, max_payload: 100000");
    commit_many(&rig, 1..=3, 90_000);
    let relay = rig.relay(&[]);
    rig.wait_for_messages(3);
    relay.kill();
    lose_the_record(&rig);
    let mut relay = rig.relay(&["-drain"]);
    let line = relay.wait_for_log("read the streams back", DEADLINE);
    assert!(line.contains("raise that"), "{line}");
    let db = rig.pg.url("postgres", "postgres");
    let ended = run(&["check", "-db", &db, "-nats", &rig.nats.url()], &[]);
    assert!(ended.stdout.contains("max_pending"), "{ended:?}");
    lift(&rig);
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    assert_eq!(rig.ids(), [1, 2, 3].map(uuid));
}
