//! A relay that stops, for whatever reason, leaves nothing behind that it has read, and the next one repeats nothing.

use crate::rig::{DEADLINE, Rig, SLOT, STREAM, UUID_SQL, uuid};
use crate::support::nats::Nats;
use crate::support::oracle::{Event, Expected};
use crate::support::postgres::Postgres;
use crate::support::proxy::{Direction, Mode, Proxy};
use crate::support::relay::Relay;
use crate::support::wait::secs;
use rustix::process::Signal;
use serde_json::json;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const LENIENT_TABLE: &str =
    "CREATE TABLE outbox (id uuid, aggregatetype text, aggregateid text, payload jsonb)";

/// Commits the events numbered so, each in a transaction of its own.
fn commit_each(rig: &Rig, from: u64, to: u64) {
    rig.pg.execute(&format!(
        "DO $$ BEGIN FOR n IN {from}..{to} LOOP
            INSERT INTO outbox VALUES ({UUID_SQL}, 'account', 'a', jsonb_build_object('n', n));
            COMMIT;
         END LOOP; END $$"
    ));
}

fn event(number: u64) -> Event {
    let body = format!("{{\"n\":{number}}}");
    Event::new(uuid(number), "events.account.a", body.as_bytes())
}

#[track_caller]
fn assert_stream_holds(rig: &Rig, numbers: impl IntoIterator<Item = u64>) {
    let mut expected = Expected::new();
    expected.commit(0, numbers.into_iter().map(event));
    expected.check(&rig.messages()).assert_clean();
}

fn last_line(log: &[String]) -> String {
    log.last().cloned().unwrap_or_default()
}

#[test]
fn all_before_a_row_that_cannot_be_an_event_is_stored_and_the_advice_leads_past_it() {
    const BACKLOG: u64 = 2_000;
    let rig = Rig::start_with_tables(LENIENT_TABLE);
    let mut expected = Expected::new();
    let mut next = 1;
    for values in [
        "gen_random_uuid(), 'account', NULL, '{}'",
        "NULL, 'account', 'a', '{}'",
    ] {
        commit_each(&rig, next, next + BACKLOG - 1);
        expected.commit(0, (next..next + BACKLOG).map(event));
        let beside = next + BACKLOG;
        rig.pg.execute(&format!(
            "BEGIN;
             INSERT INTO outbox VALUES ('{}', 'account', 'a', '{{\"n\": {beside}}}');
             INSERT INTO outbox VALUES ({values});
             COMMIT",
            uuid(beside)
        ));
        let row_lsn = rig.pg.current_wal_lsn();
        // what stands before the row in its own transaction may be on its way when the row is met
        expected.uncertain(0, [event(beside)]);
        commit_each(&rig, beside + 1, beside + 10);

        let mut said = String::new();
        for hold_back in ["0", "150s"] {
            let (code, log) = rig.run(&["--hold-back", hold_back]);
            said = last_line(&log);
            assert_eq!(code, 65, "{said}");
            expected.check(&rig.messages()).assert_clean();
            assert!(rig.pg.confirmed_flush_lsn(SLOT) < row_lsn);
        }
        let advice = said
            .split_once("SELECT ")
            .and_then(|(_, rest)| rest.split_once(';'));
        let (advice, _) = advice.unwrap_or_else(|| panic!("no statement in {said}"));
        rig.pg.execute(&format!("SELECT {advice}"));

        assert!(
            said.contains("; and then pass -resume-anyway once"),
            "{said}"
        );
        rig.drain(&["--resume-anyway"]);
        expected.commit(0, (beside + 1..=beside + 10).map(event));
        expected.check(&rig.messages()).assert_clean();
        next = beside + 11;
    }
}

#[test]
fn an_event_that_is_too_large_stops_the_relay_until_the_stream_takes_it() {
    let rig = Rig::start();
    let limit = |max_msg_size: i32| rig.set_stream(&json!({ "max_msg_size": max_msg_size }));
    limit(2_000);
    commit_each(&rig, 1, 500);
    let text = "x".repeat(3_000);
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ('{}', 'account', 'large', '\"{text}\"')",
        uuid(501)
    ));
    commit_each(&rig, 502, 600);
    for _ in 0..2 {
        let (code, log) = rig.run(&["--hold-back", "0"]);
        let said = last_line(&log);
        assert_eq!(code, 65, "{said}");
        for word in [
            "max_msg_size of the stream",
            &uuid(501),
            "public.outbox",
            "0/",
        ] {
            assert!(said.contains(word), "{word:?} is not in {said}");
        }
        assert!(!said.contains("xxx"), "payloads are never logged: {said}");
        assert_stream_holds(&rig, 1..=500);
    }
    limit(-1);
    rig.drain(&[]);
    let mut expected = Expected::new();
    expected.commit(0, (1..=500).map(event));
    let body = format!("\"{text}\"");
    expected.commit(
        0,
        [Event::new(
            uuid(501),
            "events.account.large",
            body.as_bytes(),
        )],
    );
    expected.commit(0, (502..=600).map(event));
    expected.check(&rig.messages()).assert_clean();
}

#[test]
fn all_before_an_event_larger_than_the_server_allows_is_stored() {
    const BACKLOG: u64 = 300;
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder().config("max_payload: 8192").build(),
    };
    rig.pg.seed_setup();
    rig.nats.client().add_seed_stream();
    commit_each(&rig, 1, BACKLOG);
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ('{}', 'account', 'large', to_jsonb(repeat('x', 9000)))",
        uuid(BACKLOG + 1)
    ));
    commit_each(&rig, BACKLOG + 2, BACKLOG + 10);
    for _ in 0..2 {
        let (code, log) = rig.run(&["--hold-back", "0"]);
        let said = last_line(&log);
        assert_eq!(code, 65, "{said}");
        assert!(
            said.contains("max_payload") && said.contains(&uuid(BACKLOG + 1)),
            "{said}"
        );
        assert_stream_holds(&rig, 1..=BACKLOG);
    }
}

#[test]
fn relays_that_are_stopped_under_load_lose_and_repeat_nothing() {
    let rig = Rig::start();
    let done = AtomicBool::new(false);
    let committed = AtomicU64::new(0);
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let first = committed.load(Ordering::Relaxed) + 1;
                commit_each(&rig, first, first + 49);
                committed.fetch_add(50, Ordering::Relaxed);
            }
        });
        for (round, signal) in (1..).zip([Signal::TERM, Signal::INT].repeat(3)) {
            let hold_back = if round % 2 == 0 { "0" } else { "150s" };
            let mut relay = rig.relay(&["--hold-back", hold_back]);
            let stored = rig.nats.client().message_count(STREAM);
            rig.wait_for_messages(stored + 100);
            relay.signal(signal);
            assert_eq!(relay.wait_exit(DEADLINE), 0);
        }
        done.store(true, Ordering::Relaxed);
        writing.join().expect("the writer ends");
    });
    rig.drain(&[]);
    assert_stream_holds(&rig, 1..=committed.load(Ordering::Relaxed));
}

#[test]
fn a_relay_that_is_stopped_within_a_large_transaction_goes_on_in_it() {
    // several times what is read within the reader's half second of grace
    const ROWS: u64 = 300_000;
    let rig = Rig::start();
    rig.pg.execute(&format!(
        "INSERT INTO outbox SELECT {UUID_SQL}, 'account', 'a', jsonb_build_object('n', n) FROM generate_series(1, {ROWS}) AS n"
    ));
    let upto = rig.pg.current_wal_lsn();
    let mut stopped_within = 0;
    for _ in 0..3 {
        let mut relay = rig.relay(&["--hold-back", "0"]);
        let stored = rig.nats.client().message_count(STREAM);
        rig.wait_for_messages(stored + 500);
        let begun = Instant::now();
        relay.term();
        assert_eq!(relay.wait_exit(DEADLINE), 0);
        assert!(begun.elapsed() < secs(15), "{:?}", begun.elapsed());
        if rig.nats.client().message_count(STREAM) < ROWS {
            stopped_within += 1;
            let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
            assert!(confirmed < upto, "half a transaction is confirmed");
        } else {
            break;
        }
    }
    assert!(stopped_within > 0, "the relay was faster than the signal");
    rig.drain(&[]);
    assert_stream_holds(&rig, 1..=ROWS);
}

#[test]
fn a_second_signal_ends_a_relay_at_once_that_waits_for_acks() {
    for (second, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let rig = Rig::start();
        let proxy = Proxy::start(rig.nats.port());
        let args = ["--ack-timeout", "60s"];
        let mut relay = Relay::start_at(rig.pg.port(), proxy.port(), &args);
        relay.wait_for_log("msg=\"connected\"", DEADLINE);
        proxy.set(Mode::Swallow(Direction::ToClient));
        commit_each(&rig, 1, 1);
        // it is stored, and the relay will not be told
        rig.wait_for_messages(1);
        relay.term();
        relay.wait_for_log("stopping: waiting", DEADLINE);
        assert!(relay.is_running(), "it waits for the ack");
        let begun = Instant::now();
        relay.signal(second);
        assert_eq!(relay.wait_exit(DEADLINE), code);
        assert!(begun.elapsed() < Duration::from_secs(3));
        rig.drain(&[]);
        assert_stream_holds(&rig, 1..=1);
    }
}

#[test]
fn an_event_that_no_stream_captures_waits_for_one_and_so_does_what_comes_behind_it() {
    let rig = Rig::start();
    let capture = |subjects: &[&str]| rig.set_stream(&json!({ "subjects": subjects }));
    capture(&["events.account.>"]);
    commit_each(&rig, 1, 20);
    let before = rig.pg.current_wal_lsn();
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES ('{}', 'order', 'a', '{{\"n\": 21}}')",
        uuid(21)
    ));
    commit_each(&rig, 22, 40);
    let mut relay = rig.relay(&["--hold-back", "0"]);
    let said = relay.wait_for_log("no stream captures", DEADLINE);
    assert!(said.contains("events.order.a"), "{said}");
    // it has waited for their acks before it said so
    assert_stream_holds(&rig, 1..=20);
    assert!(rig.pg.confirmed_flush_lsn(SLOT) <= before);
    capture(&["events.>"]);
    rig.wait_for_messages(40);
    let mut expected = Expected::new();
    expected.commit(0, (1..=20).map(event));
    expected.commit(0, [Event::new(uuid(21), "events.order.a", b"{\"n\":21}")]);
    expected.commit(0, (22..=40).map(event));
    expected.check(&rig.messages()).assert_clean();
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    assert!(rig.pg.confirmed_flush_lsn(SLOT) > before);
}

#[test]
fn a_drain_that_waits_for_room_ends_on_sigterm_and_does_not_call_itself_drained() {
    let rig = Rig::start();
    let room_for =
        |max_msgs: i32| rig.set_stream(&json!({ "max_msgs": max_msgs, "discard": "new" }));
    room_for(1);
    commit_each(&rig, 1, 2);
    let mut relay = rig.relay(&["--drain"]);
    relay.wait_for_log("connecting to NATS again", DEADLINE);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    let log = relay.log();
    let last = last_line(&log);
    assert!(last.contains("reason=Stopped"), "{last}");
    let admits = |line: &String| line.contains("not everything was acknowledged");
    assert!(log.iter().any(admits), "{log:?}");
    room_for(-1);
    let log = rig.drain(&[]);
    assert!(last_line(&log).contains("reason=Drained"), "{log:?}");
    assert_stream_holds(&rig, 1..=2);
}

/// As after the Go program, which leaves ids and no positions. Each is recognised and dropped over the same
/// connection; that they are many is no outage.
#[test]
fn events_that_another_program_has_stored_are_recognised_without_growing_pauses() {
    const STORED: u64 = 12;
    let rig = Rig::start();
    for number in 1..=STORED {
        let (id, body) = (uuid(number), format!("{{\"n\":{number}}}"));
        let headers = [("Nats-Msg-Id", id.as_str())];
        rig.nats
            .client()
            .publish("events.account.a", &headers, body.as_bytes());
    }
    commit_each(&rig, 1, STORED + 3);
    let log = rig.drain(&["--max-outage", "2s"]);
    let dropped = log.iter().filter(|line| line.contains("dropped an event"));
    assert_eq!(dropped.count() as u64, STORED, "{log:?}");
    assert_stream_holds(&rig, 1..=STORED + 3);
}

#[test]
fn a_checkpoint_that_cannot_be_written_at_the_end_is_told() {
    let rig = Rig::start();
    let mut relay = rig.relay(&["--hold-back", "0"]);
    relay.wait_for_log("\"connected\"", DEADLINE);
    let mut client = rig.nats.client();
    let bucket = format!("KV_{SLOT}");
    let mut config = client.stream_info(&bucket)["config"].clone();
    config["max_msg_size"] = json!(1);
    client.api(&format!("STREAM.UPDATE.{bucket}"), &config);
    rig.commit_event(1, "a");
    let committed = rig.pg.current_wal_lsn();
    rig.wait_for_messages(1);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    relay.wait_for_log("the checkpoint was not written in time", DEADLINE);
    assert!(rig.pg.confirmed_flush_lsn(SLOT) < committed);
    // one that can be is not
    config["max_msg_size"] = json!(-1);
    client.api(&format!("STREAM.UPDATE.{bucket}"), &config);
    let log = rig.drain(&["--hold-back", "0"]);
    assert!(!log.iter().any(|line| line.contains("not written in time")));
    assert!(rig.pg.confirmed_flush_lsn(SLOT) >= committed);
    assert_eq!(rig.messages().len(), 1);
}
