//! Events that cannot be published: parked in their place, given up, or stopped at.

use crate::rig::{DEADLINE, Rig, SLOT, STREAM, counted};
use crate::support::nats::Nats;
use crate::support::natsclient::StreamMessage;
use crate::support::postgres::Postgres;
use crate::support::wait::{eventually, pause};
use serde_json::json;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const TABLE: &str = "CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload text, headers jsonb)";
const PARKED: &str = "PARKED";
const PARK: [&str; 2] = ["--on-poison", "park"];

/// With a stream of its own for what is parked, or the events' stream capturing both.
fn rig(own_stream: bool) -> Rig {
    let rig = Rig::start_with_tables(TABLE);
    capture_parked(&rig, own_stream);
    rig
}

fn capture_parked(rig: &Rig, own_stream: bool) {
    let parked = "jetstream_outbox.parked";
    match own_stream {
        true => rig.nats.client().add_stream(PARKED, &[parked]),
        false => rig.set_stream(&json!({ "subjects": ["events.>", parked] })),
    }
}

fn update_stream(rig: &Rig, name: &str, subject: &str, max_msg_size: i32) {
    let config = json!({ "name": name, "subjects": [subject], "max_msg_size": max_msg_size });
    rig.nats
        .client()
        .api(&format!("STREAM.UPDATE.{name}"), &config);
}

fn insert(rig: &Rig, id: &str, aggregateid: &str, payload: &str) {
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ({id}, 't', {aggregateid}, {payload})"
    ));
}

fn ids(messages: &[StreamMessage]) -> Vec<&str> {
    messages.iter().map(StreamMessage::id).collect()
}

/// The headers about the parking, in their order.
fn told(message: &StreamMessage) -> Vec<(&str, &str)> {
    let headers = message.headers.iter();
    headers
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .filter(|(name, _)| !name.starts_with("Nats-") && *name != "Outbox-Position")
        .collect()
}

#[test]
fn what_cannot_be_an_event_is_parked_in_its_place() {
    let rig = rig(false);
    let row = |id: &str, aggregateid: &str, headers: &str| {
        format!("INSERT INTO outbox VALUES ({id}, 't', {aggregateid}, 'body', {headers});")
    };
    let bad = format!("SELECT pg_logical_emit_message(true, '{SLOT}', '{{\"id\": 7');");
    rig.pg.execute(&format!(
        "BEGIN; {} {} {} {} {} {} {} COMMIT; {}",
        row("'1'", "'a'", "NULL"),
        row("'2'", "NULL", "'{\"k\": \"v\"}'"),
        row("'3'", "'a'", "'{\"k\": \"v\"}'"),
        row("NULL", "'a b'", "NULL"),
        row("'5'", "'a'", "'[1]'"),
        bad,
        row("'6'", "'a'", "NULL"),
        row("'7'", "'a'", "NULL"),
    ));
    let cause = |what: &str| format!("row of \"public\".\"outbox\": {what}");
    let message =
        "message \"jetstream_outbox\": its content is no JSON object in UTF-8".to_string();
    let parked = "jetstream_outbox.parked";
    type Expected<'a> = (&'a str, &'a str, Vec<(&'a str, String)>, &'a str);
    let home = |subject: &str| ("Outbox-Original-Subject", subject.to_string());
    let expected: [Expected<'_>; 8] = [
        ("events.t.a", "1", vec![], "body"),
        (
            parked,
            "2",
            vec![
                ("k", "v".to_string()),
                ("Outbox-Parked", cause("column aggregateid is NULL")),
            ],
            "body",
        ),
        ("events.t.a", "3", vec![("k", "v".to_string())], "body"),
        (
            parked,
            "parked-LSN-4",
            vec![
                ("Outbox-Parked", cause("column id is NULL")),
                home("events.t.a%20b"),
            ],
            "body",
        ),
        (
            parked,
            "5",
            vec![
                ("Outbox-Parked", cause("column headers is no JSON object")),
                home("events.t.a"),
            ],
            "body",
        ),
        (
            parked,
            "parked-LSN-6",
            vec![("Outbox-Parked", message)],
            "{\"id\": 7",
        ),
        ("events.t.a", "6", vec![], "body"),
        ("events.t.a", "7", vec![], "body"),
    ];
    // the second time everything comes again from the slot, and is found stored
    for round in 0..2 {
        let log = rig.drain(&PARK);
        let messages = rig.messages();
        let found: Vec<_> = messages
            .iter()
            .map(|m| (m.subject.as_str(), told(m), m.text()))
            .collect();
        let lsn = messages[0].header("Outbox-Position").expect("a position");
        let lsn = lsn.split(' ').nth(3).expect("an LSN");
        let wanted: Vec<_> = expected
            .iter()
            .map(|(subject, _, headers, body)| {
                let headers = headers.iter().map(|(name, value)| (*name, value.as_str()));
                (*subject, headers.collect::<Vec<_>>(), *body)
            })
            .collect();
        assert_eq!(found, wanted);
        let wanted: Vec<_> = expected
            .iter()
            .map(|(_, id, ..)| id.replace("LSN", lsn))
            .collect();
        assert_eq!(ids(&messages), wanted);
        let said = log
            .iter()
            .filter(|line| line.contains("parking an event"))
            .count();
        assert_eq!(said, if round == 0 { 4 } else { 0 });
        assert_eq!(counted(&log, "parked"), if round == 0 { 4 } else { 0 });
        assert!(
            !log.join("\n").contains("body"),
            "payloads are never logged"
        );
    }
}

#[test]
fn a_value_that_is_not_to_be_encoded_is_parked_or_stops_the_relay() {
    let rig = rig(true);
    insert(&rig, "'1'", "'good'", "'x'");
    insert(&rig, "'2'", "'not good'", "'x'");
    rig.pg
        .execute(r#"INSERT INTO outbox VALUES ('3', 't', 'a', 'x', '{"k": "\n"}')"#);
    for (args, cause) in [
        (
            &["--on-bad-subject", "stop"][..],
            "its subject cannot stand in a subject as it is",
        ),
        (
            &["--on-bad-subject", "park", "--on-bad-header", "stop"],
            "header \\\"k\\\" cannot stand in a header as it is",
        ),
    ] {
        let (code, log) = rig.run(args);
        let last = log.last().cloned().unwrap_or_default();
        assert_eq!(code, 65, "{last}");
        assert!(last.contains(cause), "{last}");
    }
    insert(&rig, "'4'", "'good'", "'x'");
    rig.drain(&["--on-bad-subject", "park", "--on-bad-header", "park"]);
    assert_eq!(ids(&rig.messages()), ["1", "4"]);
    let parked = rig.nats.client().read_all(PARKED);
    assert_eq!(ids(&parked), ["2", "3"]);
    assert_eq!(
        parked[0].header("Outbox-Original-Subject"),
        Some("events.t.not%20good")
    );
    assert_eq!(parked[1].header("k"), Some("%0A"));
    // what stands before a stored event is stored, whatever is to be done with such events now
    rig.drain(&[]);
    assert_eq!(ids(&rig.messages()), ["1", "4"]);
}

#[test]
fn what_is_larger_than_the_server_takes_is_parked_with_its_body_cut() {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder().config("max_payload: 8192").build(),
    };
    rig.pg.seed_setup();
    rig.nats.client().add_seed_stream();
    capture_parked(&rig, true);
    rig.pg.execute(
        "INSERT INTO outbox SELECT gen_random_uuid(), 'account', n::text,
            CASE WHEN n IN (5, 6, 20) THEN to_jsonb(repeat('ä', 5000)) ELSE to_jsonb(n) END
         FROM generate_series(1, 20) AS n",
    );
    for _ in 0..2 {
        let log = rig.drain(&PARK);
        // it is known before it is sent, but for one look whether the limit is still the same
        let again = log
            .iter()
            .filter(|line| line.contains("connecting to NATS again"));
        assert!(
            again.clone().count() <= 1
                && again
                    .clone()
                    .all(|line| line.contains("reading max_payload")),
            "{}",
            log.join("\n")
        );
        let subjects = rig.subjects();
        let expected = (1..20).filter(|n| ![5, 6].contains(n));
        let expected: Vec<_> = expected.map(|n| format!("events.account.{n}")).collect();
        assert_eq!(subjects, expected);
        let parked = rig.nats.client().read_all(PARKED);
        for (message, number) in parked.iter().zip([5, 6, 20]) {
            let home = format!("events.account.{number}");
            assert_eq!(
                message.header("Outbox-Original-Subject"),
                Some(home.as_str())
            );
            assert_eq!(message.header("Outbox-Body-Cut"), Some("10002"));
            let cause = message.header("Outbox-Parked").expect("a cause");
            assert!(
                cause.ends_with("bytes are more than the 8192 that NATS accepts"),
                "{cause}"
            );
            // what there is room for, up to a character
            assert!(
                (5000..8192).contains(&message.body.len()),
                "{}",
                message.body.len()
            );
            let whole = format!("\"{}\"", "ä".repeat(5000));
            assert!(whole.starts_with(message.text()));
        }
        assert_eq!(parked.len(), 3);
    }
}

#[test]
fn what_a_stream_refuses_for_good_is_parked() {
    let rig = rig(true);
    update_stream(&rig, STREAM, "events.>", 2_000);
    update_stream(&rig, PARKED, "jetstream_outbox.parked", 3_000);
    for n in 1..=31 {
        let payload = if n % 10 == 0 {
            "repeat('x', 4000)"
        } else {
            "'x'"
        };
        insert(&rig, &format!("'{n}'"), "'a'", payload);
    }
    let check = || {
        let messages = rig.messages();
        let expected: Vec<_> = (1..=31)
            .filter(|n| n % 10 != 0)
            .map(|n| n.to_string())
            .collect();
        assert_eq!(ids(&messages), expected);
        let parked = rig.nats.client().read_all(PARKED);
        assert_eq!(ids(&parked), ["10", "20", "30"]);
        for message in &parked {
            let cause = message.header("Outbox-Parked").expect("a cause");
            assert!(
                cause.ends_with("bytes are more than the 2000 that NATS accepts"),
                "{cause}"
            );
            assert_eq!(message.header("Outbox-Body-Cut"), Some("4000"));
            // the id of the message before is not known when it is cut, so room is left for a long one
            assert!(
                (500..3_000).contains(&message.body.len()),
                "{}",
                message.body.len()
            );
        }
    };
    rig.drain(&PARK);
    check();
    // what was parked is not published beside, once there would be room
    update_stream(&rig, STREAM, "events.>", -1);
    rig.drain(&PARK);
    rig.drain(&[]);
    check();
}

#[test]
fn a_limit_that_is_lowered_while_the_relay_runs_is_noticed_by_the_refusal() {
    let rig = rig(true);
    let mut relay = rig.relay(&PARK);
    insert(&rig, "'1'", "'a'", "repeat('x', 4000)");
    rig.wait_for_messages(1);
    update_stream(&rig, STREAM, "events.>", 2_000);
    rig.pg.execute(
        "INSERT INTO outbox SELECT n::text, 't', 'a', CASE WHEN n IN (5, 9) THEN repeat('x', 4000) ELSE 'x' END
         FROM generate_series(2, 10) AS n",
    );
    rig.wait_for_messages(8);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    assert_eq!(
        ids(&rig.messages()),
        ["1", "2", "3", "4", "6", "7", "8", "10"]
    );
    assert_eq!(ids(&rig.nats.client().read_all(PARKED)), ["5", "9"]);
    let log = relay.log();
    let refused = "publish row 5 of public.outbox at ";
    assert!(
        log.iter().any(|line| line.contains(refused)),
        "{}",
        log.join("\n")
    );
    assert!(
        !log.iter().any(|line| line.contains("publish row 9")),
        "the limit is known by then"
    );
}

#[test]
fn an_event_whose_lifetime_the_server_cannot_read_is_parked_without_it() {
    let rig = rig(true);
    rig.set_stream(&json!({ "allow_msg_ttl": true }));
    insert(&rig, "'1'", "'1h'", "'x'");
    insert(&rig, "'2'", "'soon'", "'x'");
    insert(&rig, "'3'", "'2h'", "'x'");
    let header = "--header=aggregateid=Nats-TTL,aggregatetype=X";
    let (code, log) = rig.run(&[header]);
    let last = log.last().cloned().unwrap_or_default();
    assert_eq!(code, 65, "{last}");
    assert!(
        last.contains("row 2 of public.outbox at ") && last.contains("invalid"),
        "{last}"
    );
    rig.drain(&[&PARK[..], &[header]].concat());
    assert_eq!(ids(&rig.messages()), ["1", "3"]);
    let parked = rig.nats.client().read_all(PARKED);
    assert_eq!(ids(&parked), ["2"]);
    assert_eq!(
        (parked[0].header("Nats-TTL"), parked[0].header("X")),
        (None, Some("t"))
    );
}

#[test]
fn a_parked_event_is_found_where_it_is_the_last_of_the_stream() {
    for own_stream in [true, false] {
        let rig = rig(own_stream);
        insert(&rig, "'1'", "'a'", "'x'");
        insert(&rig, "'2'", "NULL", "'x'");
        for _ in 0..3 {
            let log = rig.drain(&PARK);
            let again = "connecting to NATS again";
            assert!(
                !log.iter().any(|line| line.contains(again)),
                "{}",
                log.join("\n")
            );
        }
        let mut all = rig.messages();
        if own_stream {
            all.extend(rig.nats.client().read_all(PARKED));
        }
        assert_eq!(ids(&all), ["1", "2"]);
    }
}

#[test]
fn at_least_once_parks_too() {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder().config("max_payload: 8192").build(),
    };
    rig.pg.execute(TABLE);
    rig.pg
        .execute(&format!("CREATE PUBLICATION {SLOT} FOR ALL TABLES"));
    rig.add_slot(SLOT);
    rig.nats.client().add_seed_stream();
    capture_parked(&rig, true);
    update_stream(&rig, STREAM, "events.>", 4_000);
    for (id, aggregateid, payload) in [
        ("'1'", "'a'", "'x'"),
        ("'2'", "NULL", "'x'"),
        ("'3'", "'a'", "repeat('x', 9000)"),
        ("'4'", "'a'", "repeat('x', 5000)"),
        ("'5'", "'a'", "'x'"),
    ] {
        insert(&rig, id, aggregateid, payload);
    }
    rig.drain(&[&PARK[..], &["--delivery", "at-least-once"]].concat());
    assert_eq!(ids(&rig.messages()), ["1", "5"]);
    let parked = rig.nats.client().read_all(PARKED);
    assert_eq!(ids(&parked), ["2", "3", "4"]);
    assert!(parked[1].body.len() > 6_000 && parked[2].body.len() == 5_000);
}

/// What only the server knows to be wrong: a lifetime that is none.
const LIFETIME: &str = "--header=aggregateid=Nats-TTL";

fn rig_with_lifetimes() -> Rig {
    let rig = rig(true);
    rig.set_stream(&json!({ "allow_msg_ttl": true }));
    rig
}

#[test]
fn an_event_that_is_refused_is_parked_before_one_behind_it() {
    let rig = rig_with_lifetimes();
    rig.pg.execute(
        "INSERT INTO outbox VALUES ('1', 't', '1h', 'x'), ('2', 't', 'soon', 'x'), ('3', 't', NULL, 'x'), ('4', 't', '1h', 'x')",
    );
    rig.drain(&[&PARK[..], &[LIFETIME]].concat());
    assert_eq!(ids(&rig.messages()), ["1", "4"]);
    assert_eq!(ids(&rig.nats.client().read_all(PARKED)), ["2", "3"]);
}

/// Far more events are on their way than there are names for their answers.
#[test]
fn a_refusal_in_a_large_window_is_taken_for_the_right_event() {
    let rig = rig_with_lifetimes();
    rig.pg.execute(
        "INSERT INTO outbox SELECT n::text, 't', CASE WHEN n IN (700, 1999) THEN 'soon' ELSE '1h' END, 'x'
         FROM generate_series(1, 3000) AS n",
    );
    let log = rig.drain(&[&PARK[..], &[LIFETIME, "--inflight", "3000"]].concat());
    let is_parked = |n: &i32| matches!(n, 700 | 1999);
    let (parked, stored): (Vec<i32>, Vec<i32>) = (1..=3000).partition(is_parked);
    let names = |numbers: Vec<i32>| numbers.iter().map(i32::to_string).collect::<Vec<_>>();
    assert_eq!(ids(&rig.messages()), names(stored));
    let messages = rig.nats.client().read_all(PARKED);
    assert_eq!(ids(&messages), names(parked), "{}", log.join("\n"));
}

#[test]
fn nothing_passes_a_parked_event() {
    let rig = rig_with_lifetimes();
    let full = |max_msgs: i32| {
        let config = json!({ "name": PARKED, "subjects": ["jetstream_outbox.parked"], "discard": "new", "max_msgs": max_msgs });
        rig.nats
            .client()
            .api(&format!("STREAM.UPDATE.{PARKED}"), &config);
    };
    rig.nats
        .client()
        .publish("jetstream_outbox.parked", &[], b"somebody else's");
    full(1);
    rig.pg.execute(
        "INSERT INTO outbox VALUES ('1', 't', '1h', 'x'), ('2', 't', 'soon', 'x'), ('3', 't', '1h', 'x')",
    );
    let args = [&PARK[..], &[LIFETIME]].concat();
    let relay = rig.relay(&args);
    relay.wait_for_log("maximum messages exceeded", DEADLINE);
    relay.kill();
    assert_eq!(ids(&rig.messages()), ["1"]);
    full(-1);
    rig.drain(&args);
    assert_eq!(ids(&rig.messages()), ["1", "3"]);
    let parked = rig.nats.client().read_all(PARKED);
    assert_eq!(parked.len(), 2);
    assert_eq!(parked[1].id(), "2");
}

#[test]
fn an_event_is_given_up_only_when_that_is_said_twice() {
    let rig = Rig::start_with_tables(TABLE);
    update_stream(&rig, STREAM, "events.>", 2_000);
    insert(&rig, "'1'", "'a'", "'x'");
    insert(&rig, "'2'", "NULL", "'x'");
    insert(&rig, "'3'", "'a'", "repeat('x', 3000)");
    insert(&rig, "'4'", "'a'", "'x'");
    let (code, log) = rig.run(&["--on-poison", "skip"]);
    assert_eq!(code, 64, "{log:?}");
    let log = rig.drain(&[
        "--on-poison",
        "skip",
        "--yes-lose-events",
        "--hold-back",
        "0",
    ]);
    assert_eq!(ids(&rig.messages()), ["1", "4"]);
    let gave_up: Vec<_> = log
        .iter()
        .filter(|line| line.contains("gave up an event"))
        .collect();
    assert_eq!(gave_up.len(), 2, "{gave_up:?}");
    assert!(gave_up.iter().all(|line| line.contains("level=warn")));
    assert!(gave_up[0].contains("aggregateid is NULL") && gave_up[1].contains("id=3"));
    assert_eq!(counted(&log, "given_up"), 2);
    rig.drain(&[]);
    assert_eq!(ids(&rig.messages()), ["1", "4"]);
}

#[test]
fn a_park_subject_that_no_stream_captures_is_waited_for() {
    let rig = Rig::start_with_tables(TABLE);
    insert(&rig, "'1'", "'a'", "'x'");
    let mut relay = rig.relay(&[&PARK[..], &["--park-subject", "the.morgue"]].concat());
    relay.wait_for_log(
        "find the stream of the.morgue: no stream captures it",
        DEADLINE,
    );
    assert_eq!(rig.messages().len(), 0);
    rig.nats.client().add_stream(PARKED, &["the.>"]);
    insert(&rig, "'2'", "NULL", "'x'");
    rig.wait_for_messages(1);
    eventually("the parked event", DEADLINE, || {
        rig.nats.client().message_count(PARKED) == 1
    });
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
}

/// Every tenth event cannot be published, for three reasons in turn.
const EACH: &str = "INSERT INTO outbox SELECT n::text, 't',
    CASE WHEN n % 30 = 0 THEN NULL ELSE 'a' END,
    CASE WHEN n % 30 = 10 THEN repeat('x', 20000) WHEN n % 30 = 20 THEN repeat('x', 5000) ELSE 'x' END
    FROM generate_series(LOW, HIGH) AS n";

/// Tells a thread to end when it goes.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

#[test]
fn parked_events_are_there_once_and_in_order_whatever_dies() {
    const EVENTS: u64 = 50;
    for own_stream in [true, false] {
        let rig = Rig {
            pg: Postgres::start(),
            nats: Nats::builder().config("max_payload: 16384").build(),
        };
        rig.pg.execute(TABLE);
        rig.pg
            .execute(&format!("CREATE PUBLICATION {SLOT} FOR ALL TABLES"));
        rig.add_slot(SLOT);
        rig.nats.client().add_seed_stream();
        capture_parked(&rig, own_stream);
        if own_stream {
            update_stream(&rig, STREAM, "events.>", 4_000);
        }
        let (writing, committed) = (AtomicBool::new(true), AtomicU64::new(0));
        let more = |what: &str| {
            let stored = rig.nats.client().message_count(STREAM);
            let arrived = || rig.nats.client().message_count(STREAM) >= stored + 60;
            eventually(&format!("sixty more: {what}"), DEADLINE, arrived);
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut client = rig.pg.client();
                // ahead of the relay, but not by minutes
                while writing.load(Ordering::Relaxed) {
                    let low = committed.load(Ordering::Relaxed) + 1;
                    let high = low + EVENTS - 1;
                    let sql = EACH.replace("LOW", &low.to_string());
                    let sql = sql.replace("HIGH", &high.to_string());
                    client.batch_execute(&sql).expect("Postgres is up");
                    committed.store(high, Ordering::Relaxed);
                    pause(Duration::from_millis(20));
                }
            });
            // ends the writer also where the test fails
            let _done = Done(&writing);
            for round in 0..6 {
                let relay = rig.relay(&PARK);
                more("the start");
                match round % 3 {
                    0 => relay.kill(),
                    1 => {
                        rig.nats.kill();
                        rig.nats.start_again();
                        more("NATS is back");
                    }
                    _ => {
                        assert_eq!(rig.pg.terminate_walsender(), 1);
                        more("the session is lost");
                    }
                }
            }
        });
        rig.drain(&PARK);
        let bad = |n: &u64| match n % 30 {
            0 | 10 => true,
            20 => own_stream,
            _ => false,
        };
        let all = || 1..=committed.load(Ordering::Relaxed);
        let numbers = |messages: &[StreamMessage]| -> Vec<u64> {
            let numbers = messages.iter().map(|m| m.id().parse());
            numbers.map(|n| n.expect("a number")).collect()
        };
        let messages = rig.messages();
        if own_stream {
            let expected: Vec<u64> = all().filter(|n| !bad(n)).collect();
            assert_eq!(numbers(&messages), expected);
            let expected: Vec<u64> = all().filter(bad).collect();
            assert_eq!(numbers(&rig.nats.client().read_all(PARKED)), expected);
        } else {
            assert_eq!(numbers(&messages), all().collect::<Vec<u64>>());
            for message in &messages {
                let number: u64 = message.id().parse().expect("a number");
                assert_eq!(message.subject == "jetstream_outbox.parked", bad(&number));
            }
        }
    }
}
