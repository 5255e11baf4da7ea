//! `unpark`: parked events are published once what stopped them is mended, and only once.

use crate::command::{Ended, on};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM};
use crate::support::wait::eventually;
use serde_json::json;

const TABLE: &str = "CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload json, headers jsonb)";
const PARK: [&str; 2] = ["-on-poison", "park"];

/// With a stream of its own for what is parked, and little room for an event.
fn rig() -> Rig {
    let rig = Rig::start_with_tables(TABLE);
    rig.nats
        .client()
        .add_stream("PARKED", &["jetstream_outbox.parked"]);
    rig.set_stream(&json!({ "max_msg_size": 2000 }));
    rig
}

fn insert(rig: &Rig, id: &str, payload: &str, headers: &str) {
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ({id}, 't', 'a b', {payload}, {headers})"
    ));
}

const LARGE: &str = "json_build_object('x', repeat('y', 3000))";

#[track_caller]
fn unpark(rig: &Rig, code: i32, args: &[&str]) -> Vec<String> {
    let ended: Ended = on(rig, &[&["unpark"], args].concat());
    ended.with(code).lines().map(str::to_string).collect()
}

#[test]
fn a_parked_event_is_published_once_when_its_cause_is_mended() {
    let rig = rig();
    insert(
        &rig,
        "'1'",
        LARGE,
        "'{\"k\": [\"v\", \"w\"], \"e\": \"a\\nb%\"}'",
    );
    insert(&rig, "'2'", "'{}'", "NULL");
    insert(&rig, "'3'", LARGE, "NULL");
    rig.drain(&PARK);
    assert_eq!(rig.ids(), ["2"]);
    let parked = rig.nats.client().read_all("PARKED");
    assert_eq!(parked.len(), 2);

    // before it is mended, the relay cannot publish it
    assert_eq!(
        unpark(&rig, 0, &["-id", "1"]),
        [
            "unparked    1 events.t.a%20b",
            "found       1 unparked, 0 done before, 0 left"
        ]
    );
    rig.drain(&PARK);
    assert_eq!(rig.ids(), ["2"]);
    rig.set_stream(&json!({}));

    let statement = unpark(&rig, 0, &["-id", "1", "-print-sql"]);
    assert!(statement[0].starts_with("SELECT pg_catalog.pg_logical_emit_message(true, "));
    assert_eq!(
        statement[1],
        "-- found       1 unparked, 0 done before, 0 left"
    );
    // that one is on its way, and is not written twice
    rig.pg.execute(&statement.join("\n"));
    for done in ["it is on its way to a stream", "it is in a stream"] {
        let lines = unpark(&rig, 0, &["-id", "1"]);
        assert_eq!(lines[0], format!("done        1: {done}"));
        rig.drain(&PARK);
    }
    assert_eq!(
        unpark(&rig, 0, &["-all"]),
        [
            "done        1: it is in a stream",
            "unparked    3 events.t.a%20b",
            "found       1 unparked, 1 done before, 0 left"
        ]
    );
    rig.drain(&PARK);
    assert_eq!(rig.ids(), ["2", "1", "3"]);
    let (was, found) = (&parked[0], &rig.messages()[1]);
    assert_eq!(found.subject, "events.t.a%20b");
    assert_eq!(found.text(), was.text());
    for name in ["k", "e", "Outbox-Encoded"] {
        let values = |of: &[(String, String)]| {
            let of = of.iter().filter(|(key, _)| key == name);
            of.map(|(_, value)| value.clone()).collect::<Vec<_>>()
        };
        assert_eq!(values(&found.headers), values(&was.headers), "{name}");
    }
    let lines = unpark(&rig, 0, &["-all"]);
    assert_eq!(
        lines.last().unwrap(),
        "found       0 unparked, 2 done before, 0 left"
    );
}

#[test]
fn what_a_message_cannot_carry_is_left() {
    let rig = rig();
    rig.nats.client().api(
        "STREAM.UPDATE.PARKED",
        &json!({ "name": "PARKED", "subjects": ["jetstream_outbox.parked"], "max_msg_size": 4000 }),
    );
    let larger = "json_build_object('x', repeat('y', 9000))";
    insert(&rig, "'cut'", larger, "NULL");
    insert(&rig, "NULL", "'{}'", "NULL");
    insert(&rig, "'headers'", "'{}'", "'[1]'");
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ('home', 't', NULL, '{{}}'); \
         SELECT pg_logical_emit_message(true, '{SLOT}', '{{\"id\": 7')"
    ));
    rig.drain(&PARK);
    let lines = unpark(&rig, 1, &["-all"]);
    let left = |id: &str| {
        let begin = format!("left        {id}");
        let line = lines.iter().find(|line| line.starts_with(&begin));
        line.unwrap_or_else(|| panic!("{id} is not left: {lines:?}"))
            .as_str()
    };
    assert!(left("cut").contains("was cut"), "{lines:?}");
    assert!(left("home").contains("no subject"), "{lines:?}");
    assert!(left("parked-").contains("no id of its own"), "{lines:?}");
    // its bad headers were not taken along
    assert!(
        lines.contains(&"unparked    headers events.t.a%20b".to_string()),
        "{lines:?}"
    );
    assert_eq!(
        lines.last().unwrap(),
        "found       1 unparked, 0 done before, 4 left"
    );
    let lines = unpark(&rig, 0, &["-cause", "headers is no JSON object"]);
    assert_eq!(
        lines.last().unwrap(),
        "found       0 unparked, 1 done before, 0 left"
    );
    assert_eq!(
        unpark(&rig, 1, &["-id", "x"])[0],
        "left        x: no parked event has this id"
    );
    on(&rig, &["unpark"]).with(64);
    on(&rig, &["unpark", "-all", "-no-messages"]).with(78);
}

/// What was consumed, or is too old, looks as if it had never been there.
#[test]
fn where_a_stream_drops_what_it_has_stored_nothing_is_unparked_twice() {
    let rig = rig();
    insert(&rig, "'1'", LARGE, "NULL");
    rig.drain(&PARK);
    rig.set_stream(&json!({}));
    unpark(&rig, 0, &["-id", "1"]);
    // with -hold-back 0 the slot has nothing of it
    rig.drain(&[&PARK[..], &["-hold-back", "0"]].concat());
    assert_eq!(rig.ids(), ["1"]);
    rig.nats
        .client()
        .api(&format!("STREAM.PURGE.{STREAM}"), &json!({}));
    insert(&rig, "'2'", "'{}'", "NULL");
    rig.drain(&[&PARK[..], &["-hold-back", "0"]].concat());
    let lines = unpark(&rig, 1, &["-id", "1"]);
    assert!(
        lines[0].contains("may have been unparked before"),
        "{lines:?}"
    );
    // one that was parked later than what the stream has dropped
    rig.set_stream(&json!({ "max_msg_size": 2000 }));
    insert(&rig, "'3'", LARGE, "NULL");
    rig.drain(&PARK);
    rig.set_stream(&json!({}));
    // nor is it on its way because nothing says that the relay has passed it
    let bucket = "STREAM.DELETE.KV_jetstream_outbox";
    rig.nats.client().api(bucket, &json!({}));
    assert_eq!(
        unpark(&rig, 0, &["-id", "3"])[0],
        "unparked    3 events.t.a%20b"
    );
}

/// Its own parked message would make it a duplicate.
#[test]
fn what_is_parked_in_its_own_stream_waits_for_the_duplicate_window() {
    let rig = Rig::start_with_tables(TABLE);
    let both = json!(["events.>", "jetstream_outbox.parked"]);
    let window = |nanoseconds: u64| {
        let config = json!({ "subjects": both, "duplicate_window": nanoseconds });
        rig.set_stream(&config);
    };
    window(3_600_000_000_000);
    insert(&rig, "'1'", "'{}'", "'[1]'");
    rig.drain(&PARK);
    let lines = unpark(&rig, 1, &["-all"]);
    assert!(lines[0].contains("duplicate_window"), "{lines:?}");
    window(100_000_000);
    eventually("the window to be over", DEADLINE, || {
        on(&rig, &["unpark", "-all"]).code == 0
    });
    rig.drain(&PARK);
    assert_eq!(
        rig.subjects(),
        ["jetstream_outbox.parked", "events.t.a%20b"]
    );
}

/// Anybody may write to the park subject, and two services may count their ids from 1.
#[test]
fn what_others_have_written_is_not_this_relays() {
    let rig = rig();
    insert(&rig, "'1'", LARGE, "NULL");
    insert(&rig, "'2 b'", LARGE, "NULL");
    rig.drain(&PARK);
    rig.set_stream(&json!({ "duplicate_window": 100_000_000 }));
    let own = rig.nats.client().read_all("PARKED").remove(1);
    let mut client = rig.nats.client();
    let mut park = |id: &str, headers: &[(&str, &str)]| {
        let parked = [
            ("Nats-Msg-Id", id),
            ("Outbox-Parked", "another one"),
            ("Outbox-Original-Subject", "events.t.other"),
            ("Outbox-Position", "other 1 1 0/10 1"),
        ];
        let headers = [&parked[..], headers].concat();
        eventually("the server to forget the id", DEADLINE, || {
            let ack = client.publish("jetstream_outbox.parked", &headers, b"{}");
            ack["duplicate"] != true
        });
    };
    rig.nats.client().api(
        "STREAM.UPDATE.PARKED",
        &json!({ "name": "PARKED", "subjects": ["jetstream_outbox.parked"], "duplicate_window": 100_000_000 }),
    );
    park("1", &[]);
    park("9", &[]);
    park(
        "cut",
        &[(
            "Outbox-Body-Cut",
            "1\nDROP TABLE outbox; --\rDROP TABLE outbox; --",
        )],
    );
    // one event is in a stream by its id, but it is another service's
    let foreign = [
        ("Nats-Msg-Id", "1"),
        ("Outbox-Position", "other 1 1 0/20 1"),
    ];
    rig.nats.client().publish("events.t.x", &foreign, b"{}");
    // and one was published by hand
    let by_hand = [("Nats-Msg-Id", own.id())];
    rig.nats
        .client()
        .publish("events.t.a%20b", &by_hand, &own.body);

    // a line of a comment stays one
    let lines = unpark(&rig, 1, &["-id", "cut", "-print-sql"]);
    assert!(
        lines.iter().all(|line| line.starts_with("-- ")),
        "{lines:?}"
    );
    assert_eq!(lines.len(), 2, "{lines:?}");
    let left = "left        9: parked by another relay (slot other of system 1)";
    let lines = unpark(&rig, 1, &["-cause", "another"]);
    assert!(lines.iter().any(|it| it.starts_with(left)), "{lines:?}");
    // as it was written, and as a header has it
    for id in ["2 b", own.id()] {
        let lines = unpark(&rig, 0, &["-id", id]);
        assert!(lines[0].ends_with("it is in a stream"), "{lines:?}");
    }
    let lines = unpark(&rig, 1, &["-all"]);
    assert!(lines.iter().any(|it| it.starts_with(left)), "{lines:?}");
    assert!(
        lines.contains(&"unparked    1 events.t.a%20b".to_string()),
        "{lines:?}"
    );
    assert_eq!(
        lines.last().unwrap(),
        "found       1 unparked, 1 done before, 2 left"
    );
    assert_eq!(
        unpark(&rig, 0, &["-id", "9"])[0],
        "unparked    9 events.t.other"
    );
}
