//! `compare`: what is committed is looked for in the streams, and what is missing goes there by way of Postgres.

use crate::command::{Ended, on, run};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM, UUID_SQL, uuid};
use crate::support::postgres::Postgres;
use crate::support::wait::{eventually, pause};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// The findings of one kind, and the summary, which must have come with this exit code.
struct Compared {
    lines: Vec<Value>,
    summary: Value,
}

impl Compared {
    #[track_caller]
    fn of(ended: &Ended, code: i32) -> Compared {
        let mut lines = ended.json_lines(code);
        let summary = lines.pop().expect("a summary")["summary"].clone();
        assert!(summary.is_object(), "{ended:?}");
        Compared { lines, summary }
    }

    fn ids(&self, kind: &str) -> Vec<&str> {
        let lines = self.lines.iter().filter(|line| line["finding"] == kind);
        lines.filter_map(|line| line["id"].as_str()).collect()
    }

    /// The counts that are not 0, but for those of what was compared.
    fn counts(&self) -> Value {
        let mut counts = self.summary.as_object().expect("an object").clone();
        counts.retain(|name, count| {
            *count != json!(0)
                && !["outboxes", "rows", "wal_events", "messages"].contains(&name.as_str())
        });
        counts.remove("incomplete_streams");
        Value::Object(counts)
    }
}

#[track_caller]
fn compare(rig: &Rig, code: i32, args: &[&str]) -> Compared {
    Compared::of(&on(rig, &[&["compare", "-json"], args].concat()), code)
}

/// The slot goes beyond what no relay has seen.
fn move_slot(rig: &Rig) {
    rig.pg.execute(&format!(
        "SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn())"
    ));
}

fn message(n: u64, headers: &str) -> String {
    format!(
        "SELECT pg_logical_emit_message(true, '{SLOT}', '{{\"id\": \"{}\", \"aggregatetype\": \"account\", \
         \"aggregateid\": \"m\", \"headers\": {headers}, \"payload\": {{\"n\": [{n},  2]}}}}');",
        uuid(n)
    )
}

#[test]
fn what_is_stored_is_found_and_what_comes_later_waits() {
    let rig = Rig::start();
    for n in 1..=3 {
        rig.commit_event(n, "a");
    }
    rig.pg.execute(&message(4, "null"));
    rig.drain(&[]);
    let found = compare(&rig, 0, &[]);
    assert_eq!(found.counts(), json!({}), "{}", found.summary);
    for (name, count) in [("rows", 3), ("wal_events", 4), ("messages", 4)] {
        assert_eq!(found.summary[name], count, "{}", found.summary);
    }
    // no relay runs
    rig.commit_event(5, "a");
    rig.pg.execute(&message(6, "null"));
    let found = compare(&rig, 0, &[]);
    assert_eq!(found.counts(), json!({ "waiting": 2 }));
    let text = on(&rig, &["compare"]);
    let text = text.with(0);
    assert!(
        text.ends_with(
            "compared    4 rows and 6 events of the WAL with 4 messages\n\
             found       0 missing, 0 doubled, 0 out of order, 0 altered, 0 unknown\n\
             besides     0 parked, 2 waiting\n"
        ),
        "{text}"
    );
    assert_eq!(
        rig.pg
            .scalar::<i64>("SELECT count(*) FROM pg_replication_slots"),
        Some(1),
        "no copy is left"
    );
    rig.drain(&[]);
    assert_eq!(compare(&rig, 0, &[]).counts(), json!({}));
}

#[test]
fn what_the_slot_was_moved_past_is_missing_and_is_published_once() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.drain(&[]);
    rig.commit_event(2, "b c");
    rig.commit_event(3, "a");
    move_slot(&rig);
    let found = compare(&rig, 1, &[]);
    assert_eq!(found.ids("missing"), [uuid(2), uuid(3)]);
    assert_eq!(found.counts(), json!({ "missing": 2 }));
    let missing = found.lines.iter().find(|it| it["id"] == uuid(2));
    let missing = missing.expect("it is missing");
    assert_eq!(missing["subject"], "events.account.b%20c");
    assert_eq!(missing["source"], "public.outbox");
    // a relay halts at a slot that was moved
    assert!(
        found.lines[0]["note"]
            .as_str()
            .is_some_and(|it| it.contains("a relay halts here"))
    );

    let chosen = format!("id <> '{}'", uuid(3));
    assert_eq!(
        compare(&rig, 1, &["-where", &chosen]).ids("missing"),
        [uuid(2)]
    );
    compare(&rig, 0, &["-where", "payload @> '{\"n\": 1}' -- x"]);
    let ended = on(&rig, &["compare", "-where", "nothing > 1"]);
    ended.with(78);
    assert!(
        ended.stderr.contains("\"nothing\" does not exist"),
        "{ended:?}"
    );

    let found = compare(&rig, 0, &["-publish", "-where", &chosen]);
    assert_eq!(found.ids("published"), [uuid(2)]);
    // what was written is on its way
    let found = compare(&rig, 0, &["-publish"]);
    assert_eq!(found.ids("published"), [uuid(3)]);
    assert_eq!(
        found.counts(),
        json!({ "missing": 1, "published": 1, "waiting": 1 })
    );
    let found = compare(&rig, 0, &["-publish"]);
    assert_eq!(found.counts(), json!({ "waiting": 2 }));
    rig.drain(&["-resume-anyway"]);
    assert_eq!(rig.ids(), [uuid(1), uuid(2), uuid(3)]);
    assert_eq!(
        rig.subjects(),
        [
            "events.account.a",
            "events.account.b%20c",
            "events.account.a"
        ]
    );
    assert_eq!(rig.messages()[1].text(), "{\"n\":2}");
    assert_eq!(compare(&rig, 0, &["-publish"]).counts(), json!({}));
}

#[test]
fn what_the_relay_has_given_up_is_missing_unless_it_is_to_be_given_up() {
    let rig = Rig::start();
    rig.pg
        .execute(&format!("{} {}", message(1, "null"), message(2, "[7]")));
    let skip = ["-on-poison", "skip", "-yes-lose-events"];
    rig.drain(&skip);
    let ended = on(&rig, &[&["compare", "-json"], &skip[..]].concat());
    assert_eq!(Compared::of(&ended, 0).counts(), json!({ "given_up": 1 }));
    assert!(!ended.stderr.contains("gave up"), "{ended:?}");
    let found = compare(&rig, 1, &["-publish"]);
    assert_eq!(found.ids("missing"), [uuid(2)]);
    assert!(found.lines[0]["position"].is_string(), "{}", found.lines[0]);
    assert_eq!(found.ids("left"), [uuid(2)]);
    assert_eq!(found.counts(), json!({ "missing": 1 }));
    // before the relay has passed it, it waits
    rig.pg.execute(&message(3, "[7]"));
    let found = compare(&rig, 1, &[]);
    assert_eq!(found.counts(), json!({ "missing": 1, "waiting": 1 }));
}

#[test]
fn what_is_there_twice_or_out_of_order_is_found() {
    let rig = Rig::start();
    rig.set_stream(&json!({ "duplicate_window": 100_000_000 }));
    for n in 1..=2 {
        rig.commit_event(n, "a");
    }
    rig.drain(&[]);
    let first = rig.messages().remove(0);
    let position = first.header("Outbox-Position").expect("a position");
    let mut client = rig.nats.client();
    let mut again = |expected: &str, late: &[(&str, &str)]| {
        let id = uuid(1);
        let own = [
            ("Nats-Msg-Id", id.as_str()),
            ("Outbox-Position", position),
            ("Nats-Expected-Last-Sequence", expected),
        ];
        eventually("the server to forget the id", DEADLINE, || {
            let headers = [&own[..], late].concat();
            let ack = client.publish("events.account.a", &headers, b"{\"n\":1}");
            ack["duplicate"] != true
        });
    };
    again("2", &[("Outbox-Late", "true")]);
    let found = compare(&rig, 1, &[]);
    assert_eq!(found.counts(), json!({ "doubled": 1 }));
    assert_eq!(found.ids("doubled"), [uuid(1)]);
    assert_eq!(
        (&found.lines[0]["first_seq"], &found.lines[0]["seq"]),
        (&json!(1), &json!(3))
    );
    again("3", &[]);
    let found = compare(&rig, 1, &[]);
    assert_eq!(found.counts(), json!({ "doubled": 2, "disordered": 1 }));
    assert_eq!(found.ids("disordered"), [uuid(1)]);
    // somebody else's message is nobody's event
    let foreign = [("Nats-Msg-Id", "x"), ("Outbox-Position", position)];
    client.publish("events.account.a", &foreign, b"{}");
    assert_eq!(compare(&rig, 1, &[]).counts(), found.counts());
}

#[test]
fn another_body_is_found_and_another_spelling_is_none() {
    let rig = Rig::start();
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ('{}', 'a', 'b', '{{\"long\": [1.00,   {{}}], \"a\": \"ü b\"}}')",
        uuid(1)
    ));
    rig.commit_event(2, "a");
    rig.drain(&[]);
    assert_eq!(compare(&rig, 0, &[]).counts(), json!({}));
    rig.pg.execute(&format!(
        "UPDATE outbox SET payload = '{{\"n\": 7}}' WHERE id = '{}'",
        uuid(2)
    ));
    let found = compare(&rig, 1, &[]);
    assert_eq!(found.ids("altered"), [uuid(2)]);
    assert_eq!(found.counts(), json!({ "altered": 1 }));
    // and is not put right
    let found = compare(&rig, 1, &["-publish"]);
    assert_eq!(found.counts(), json!({ "altered": 1 }));
}

#[test]
fn parked_events_are_not_missing() {
    let rig = Rig::start();
    rig.nats
        .client()
        .add_stream("PARKED", &["jetstream_outbox.parked"]);
    rig.set_stream(&json!({ "max_msg_size": 2000 }));
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ('{}', 'a', 'b', to_jsonb(repeat('x', 3000)))",
        uuid(1)
    ));
    rig.commit_event(2, "a");
    let park = ["-on-poison", "park"];
    rig.drain(&park);
    for args in [&park[..], &[]] {
        let found = compare(&rig, 0, args);
        assert_eq!(found.ids("parked"), [uuid(1)]);
        assert_eq!(found.counts(), json!({ "parked": 1 }));
        assert_eq!(found.lines[0]["stream"], "PARKED");
    }
}

/// While nobody knows, nothing is published either.
#[test]
fn of_what_a_stream_has_dropped_it_cannot_be_told() {
    let rig = Rig::start();
    rig.set_stream(&json!({ "max_msgs": 2 }));
    for n in 1..=3 {
        rig.commit_event(n, "a");
    }
    rig.drain(&["-hold-back", "0"]);
    move_slot(&rig);
    let found = compare(&rig, 1, &["-publish"]);
    assert_eq!(found.ids("unknown"), [uuid(1)]);
    assert_eq!(found.counts(), json!({ "unknown": 1 }));
    assert_eq!(found.summary["incomplete_streams"], json!([STREAM]));
    // the operator knows which of them must be there
    compare(&rig, 0, &["-where", "payload <> '{\"n\": 1}'"]);
    rig.commit_event(4, "a");
    move_slot(&rig);
    let found = compare(&rig, 1, &["-where", "payload <> '{\"n\": 1}'"]);
    assert_eq!(found.ids("missing"), [uuid(4)]);
    // but not of one with holes
    let gone = json!({ "seq": 3 });
    let api = format!("STREAM.MSG.DELETE.{STREAM}");
    rig.nats.client().api(&api, &gone);
    rig.set_stream(&json!({ "max_msgs": -1 }));
    rig.nats.client().publish("events.x", &[], b"{}");
    let found = compare(&rig, 1, &["-where", "payload <> '{\"n\": 1}'"]);
    assert_eq!(found.ids("unknown"), [uuid(3), uuid(4)]);
}

#[test]
fn what_a_relay_would_publish_again_by_itself_waits() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.drain(&[]);
    assert_eq!(compare(&rig, 0, &[]).counts(), json!({}));
    let mut client = rig.nats.client();
    client.api(&format!("STREAM.DELETE.{STREAM}"), &json!({}));
    client.add_seed_stream();
    assert_eq!(
        compare(&rig, 0, &["-publish"]).counts(),
        json!({ "waiting": 1 })
    );
    rig.drain(&[]);
    assert_eq!(rig.ids(), [uuid(1)]);
    assert_eq!(compare(&rig, 0, &[]).counts(), json!({}));
}

#[test]
fn a_relay_that_runs_makes_no_false_findings() {
    let rig = Rig::start();
    let relay = rig.relay(&["-hold-back", "1s"]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for writer in 0..2_u64 {
            let (rig, stop) = (&rig, &stop);
            scope.spawn(move || {
                let mut client = rig.pg.client();
                let mode = ["on", "off"][writer as usize];
                client
                    .batch_execute(&format!("SET synchronous_commit = {mode}"))
                    .expect("it is set");
                let mut first = 1 + writer * 1_000_000;
                while !stop.load(Ordering::Relaxed) {
                    let last = first + 19;
                    let sql = format!(
                        "INSERT INTO outbox SELECT {UUID_SQL}, 'a', 'b', '{{}}' FROM generate_series({first}, {last}) AS n"
                    );
                    client.batch_execute(&sql).expect("it is committed");
                    first = last + 1;
                    // so many that a look comes to an end
                    pause(Duration::from_millis(20));
                }
            });
        }
        let looks = thread::scope(|scope| {
            let looks = scope.spawn(|| (0..6).map(|_| compare(&rig, 0, &[])).collect::<Vec<_>>());
            let looks = looks.join();
            stop.store(true, Ordering::Relaxed);
            looks
        });
        for found in looks.expect("no look finds anything") {
            assert!(
                found.summary["rows"].as_u64() > Some(0),
                "{}",
                found.summary
            );
            assert_eq!(found.lines, Vec::<Value>::new());
        }
    });
    relay.kill();
    // nor one that was killed
    compare(&rig, 0, &[]);
}

/// What pgoutput sends of a row, in the form in which it sends it, is compared.
#[test]
fn rows_are_compared_as_the_publication_sends_them() {
    let rig = Rig::start_without_stream();
    rig.nats.client().add_seed_stream();
    rig.pg.execute(
        "CREATE TABLE raw (id char(4), aggregatetype text, aggregateid timestamptz, payload bytea, headers json); \
         CREATE TABLE parts (id int, aggregatetype text, aggregateid text, payload text) PARTITION BY LIST (id); \
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1); \
         CREATE TABLE parts_2 PARTITION OF parts DEFAULT; \
         CREATE TABLE other (id int); \
         ALTER PUBLICATION jetstream_outbox ADD TABLE raw WHERE (aggregatetype <> 'secret'), parts, other; \
         SELECT pg_replication_slot_advance('jetstream_outbox', pg_current_wal_lsn()); \
         INSERT INTO other VALUES (1); \
         INSERT INTO raw VALUES ('a', 't', '2026-11-23 11:00:00+01', '\\x00ff', '{\"k\": 1}'), ('b', 'secret', now(), '', NULL), \
         ('c', 't', now(), NULL, NULL); \
         INSERT INTO parts VALUES (1, 'p', 'a', ' one '), (2, 'p', 'a', NULL)",
    );
    rig.drain(&[]);
    let found = compare(&rig, 0, &[]);
    assert_eq!(found.counts(), json!({}), "{:?}", found.lines);
    assert_eq!(found.summary["rows"], 4);
    rig.pg
        .execute("INSERT INTO raw VALUES ('d', 't', now(), '\\x00', NULL); INSERT INTO parts VALUES (4, 'p', 'a', '{\"a\": 1}'), (5, 'p', 'x', '{\"a\":1}')");
    move_slot(&rig);
    // what a message cannot carry is left, by name
    let found = compare(&rig, 1, &["-publish"]);
    assert_eq!(found.ids("missing"), ["4", "5", "d  %20"]);
    assert_eq!(found.ids("published"), ["5"]);
    assert_eq!(found.ids("left"), ["4", "d  %20"]);
    let why = |id: &str| {
        let of = |it: &&Value| it["finding"] == "left" && it["id"] == id;
        let line = found.lines.iter().find(of).expect("it is left");
        line["why"].as_str().expect("a text").to_string()
    };
    assert!(why("4").contains("another body"), "{}", why("4"));
    assert!(why("d  %20").contains("not JSON"), "{}", why("d  %20"));
}

#[test]
fn without_a_slot_or_messages_nothing_is_published() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    let ended = on(&rig, &["compare", "-publish", "-no-messages"]);
    ended.with(78);
    assert!(ended.stderr.contains("-no-messages"), "{ended:?}");
    // another one that does the same
    let mut other = rig.pg.client();
    let lock = format!("SELECT pg_advisory_lock(hashtextextended('jetstream-outbox {SLOT}', 0))");
    other.batch_execute(&lock).expect("it is locked");
    on(&rig, &["compare", "-publish"]).with(75);
    drop(other);
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    let found = compare(&rig, 1, &[]);
    assert_eq!(found.ids("missing"), [uuid(1)]);
    let note = found.lines[0]["note"].as_str().unwrap_or_default();
    assert!(note.contains("does not exist"), "{note}");
    let ended = on(&rig, &["compare", "-publish"]);
    ended.with(78);
    assert!(ended.stderr.contains("there is no slot"), "{ended:?}");
}

/// What the streams were written from is gone, and positions are used again.
#[test]
fn after_a_restore_what_the_slot_has_waits() {
    let rig = Rig::start_with(Postgres::builder().own_system_id());
    rig.commit_event(1, "a");
    rig.drain(&["-hold-back", "0"]);
    rig.pg.stop_fast();
    let snapshot = rig.pg.snapshot();
    rig.pg.start_again();
    for n in 2..=9 {
        rig.commit_event(n, "lost");
    }
    rig.drain(&[]);
    rig.pg.stop_fast();
    rig.pg.restore(&snapshot);
    rig.pg.start_again();
    // more than was lost
    for n in 10..=40 {
        rig.commit_event(n, "a");
    }
    let found = compare(&rig, 0, &["-publish"]);
    let note = found.lines[0]["note"].as_str().unwrap_or_default();
    assert!(note.contains("a relay halts here"), "{note}");
    assert_eq!(found.counts(), json!({ "waiting": 31 }));
    rig.drain(&["-resume-anyway"]);
    assert_eq!(compare(&rig, 0, &[]).counts(), json!({}));
    assert_eq!(rig.ids().len(), 40);
}

/// Of changes that are no events a whole batch may come.
#[test]
fn messages_that_are_not_transactional_are_not_the_end_of_the_wal() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.drain(&[]);
    rig.pg.execute(
        "SELECT count(pg_logical_emit_message(false, 'heartbeat', '')) FROM generate_series(1, 3000)",
    );
    rig.commit_event(2, "a");
    assert_eq!(
        compare(&rig, 0, &["-publish"]).counts(),
        json!({ "waiting": 1 })
    );
}

/// The relay parks it, or halts at it.
#[test]
fn what_has_a_bad_subject_is_not_given_up() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.drain(&[]);
    rig.commit_event(2, "b c");
    move_slot(&rig);
    let skip = ["-on-poison", "skip", "-yes-lose-events"];
    for on_bad in ["stop", "park"] {
        let args = [&skip[..], &["-on-bad-subject", on_bad]].concat();
        assert_eq!(compare(&rig, 1, &args).counts(), json!({ "missing": 1 }));
    }
}

#[test]
fn where_nothing_was_compared_nothing_is_said_to_be_there() {
    let rig = Rig::start();
    let nothing = |found: &Compared| {
        assert_eq!(found.counts(), json!({}));
        let note = found.lines.last().map(|it| it["note"].to_string());
        assert!(
            note.as_ref()
                .is_some_and(|it| it.contains("nothing was compared")),
            "{note:?}"
        );
    };
    rig.pg
        .execute("ALTER PUBLICATION jetstream_outbox DROP TABLE outbox");
    nothing(&compare(&rig, 1, &[]));
    rig.pg.execute(&message(1, "null"));
    assert_eq!(compare(&rig, 0, &[]).counts(), json!({ "waiting": 1 }));
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    nothing(&compare(&rig, 1, &[]));
    let ended = on(&rig, &["compare", "-publication", "outbocks"]);
    ended.with(78);
    assert!(
        ended.stderr.contains("outbocks does not exist"),
        "{ended:?}"
    );
}

/// Two services may count their ids from 1.
#[test]
fn what_another_relay_has_parked_is_another_event() {
    let rig = Rig::start();
    let mut client = rig.nats.client();
    client.add_stream("PARKED", &["jetstream_outbox.parked"]);
    let id = uuid(1);
    let headers = [
        ("Nats-Msg-Id", id.as_str()),
        ("Outbox-Parked", "too large"),
        ("Outbox-Position", "other 1 1 0/10 1"),
    ];
    client.publish("jetstream_outbox.parked", &headers, b"{}");
    rig.commit_event(1, "a");
    move_slot(&rig);
    let found = compare(&rig, 1, &[]);
    assert_eq!(found.counts(), json!({ "missing": 1 }));
}

/// One event that is resolved, in the WAL still, and in no stream, though it could be.
fn rig_with_a_hole() -> Rig {
    let rig = Rig::start();
    rig.set_stream(&json!({ "max_msg_size": 2000 }));
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ('{}', 'a', 'b', to_jsonb(repeat('x', 3000)))",
        uuid(1)
    ));
    rig.commit_event(2, "a");
    rig.drain(&["-on-poison", "skip", "-yes-lose-events"]);
    rig.set_stream(&json!({}));
    rig
}

#[test]
fn what_was_published_and_is_on_its_way_is_not_published_again() {
    let rig = rig_with_a_hole();
    let found = compare(&rig, 0, &["-publish"]);
    assert_eq!(found.counts(), json!({ "missing": 1, "published": 1 }));
    assert!(found.lines[0]["position"].is_string(), "{}", found.lines[0]);
    // the WAL has it where it was, and where it was written again
    assert_eq!(
        compare(&rig, 0, &["-publish"]).counts(),
        json!({ "waiting": 1 })
    );
    rig.drain(&[]);
    assert_eq!(rig.ids(), [uuid(2), uuid(1)]);
    assert_eq!(compare(&rig, 0, &[]).counts(), json!({}));
}

/// Then the record may be about another WAL.
#[test]
fn where_the_history_cannot_be_compared_what_the_slot_has_waits() {
    let rig = rig_with_a_hole();
    rig.pg.execute(
        "CREATE ROLE reader LOGIN REPLICATION; GRANT SELECT ON outbox TO reader; \
         REVOKE EXECUTE ON FUNCTION pg_logical_slot_peek_binary_changes FROM PUBLIC; \
         GRANT EXECUTE ON FUNCTION pg_logical_slot_peek_binary_changes TO reader",
    );
    let (db, nats) = (rig.pg.url("reader", "postgres"), rig.nats.url());
    let look = |code| {
        let args = ["compare", "-json", "-db", &db, "-nats", &nats];
        Compared::of(&run(&args, &[]), code)
    };
    assert_eq!(look(1).counts(), json!({ "missing": 1 }));
    rig.pg
        .execute("REVOKE EXECUTE ON FUNCTION pg_logical_slot_peek_binary_changes FROM reader");
    let found = look(0);
    assert_eq!(found.counts(), json!({ "waiting": 1 }));
    let note = found.lines[0]["note"].as_str().unwrap_or_default();
    assert!(note.contains("is not known"), "{note}");
}

/// Its position says nothing of what was dropped before it.
#[test]
fn a_late_message_does_not_tell_what_a_stream_has_dropped() {
    let rig = Rig::start();
    rig.set_stream(&json!({ "duplicate_window": 100_000_000 }));
    for n in 1..=3 {
        rig.commit_event(n, "a");
    }
    rig.drain(&[]);
    let messages = rig.messages();
    let mut client = rig.nats.client();
    let mut again = |n: usize, expected: &str, late: &[(&str, &str)]| {
        let own = [
            ("Nats-Msg-Id", messages[n - 1].id()),
            (
                "Outbox-Position",
                messages[n - 1]
                    .header("Outbox-Position")
                    .expect("a position"),
            ),
            ("Nats-Expected-Last-Sequence", expected),
        ];
        eventually("the server to forget the id", DEADLINE, || {
            let headers = [&own[..], late].concat();
            let ack = client.publish("events.account.a", &headers, &messages[n - 1].body);
            ack["duplicate"] != true
        });
    };
    again(1, "3", &[("Outbox-Late", "true")]);
    again(3, "4", &[]);
    client.api(&format!("STREAM.PURGE.{STREAM}"), &json!({ "seq": 4 }));
    let found = compare(&rig, 1, &[]);
    assert_eq!(found.ids("unknown"), [uuid(2)]);
    assert_eq!(found.counts(), json!({ "unknown": 1 }));
}
