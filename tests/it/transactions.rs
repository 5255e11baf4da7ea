//! Transactions are relayed whole or not at all, whatever their size.

use crate::rig::{DEADLINE, Rig, SLOT, STREAM, UUID_SQL, uuid};
use crate::support::nats::Nats;
use crate::support::natsclient::StreamMessage;
use crate::support::oracle::{Event, Expected};
use crate::support::postgres::Postgres;
use crate::support::wait::eventually;
use serde_json::json;

/// SQL that inserts the events numbered so.
fn insert(from: u64, to: u64) -> String {
    format!(
        "INSERT INTO outbox SELECT {UUID_SQL}, 'account', 'a', jsonb_build_object('n', n) FROM generate_series({from}, {to}) AS n;"
    )
}

fn events(from: u64, to: u64) -> impl Iterator<Item = Event> {
    (from..=to).map(|n| {
        Event::new(
            uuid(n),
            "events.account.a",
            format!("{{\"n\":{n}}}").as_bytes(),
        )
    })
}

#[test]
fn what_is_rolled_back_never_arrives_although_postgres_spilled_it() {
    let rig = Rig::start_with(Postgres::builder().setting("logical_decoding_work_mem", "64kB"));
    let mut relay = rig.relay(&[]);
    rig.pg.execute("BEGIN; INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 'aborted', '{}'); ROLLBACK");
    // Postgres 18 spills nothing of which it knows already that it was rolled back: so it is decoded before
    let mut session = rig.pg.client();
    let mut run = |sql: String| session.batch_execute(&sql).expect("write");
    let decoded = |number: u64, messages: u64| {
        rig.pg.execute(&insert(number, number));
        rig.wait_for_messages(messages);
    };
    run(format!("BEGIN; {}", insert(1, 50_000)));
    decoded(800_001, 1);
    run(format!(
        "ROLLBACK; BEGIN; {} SAVEPOINT a; {} SAVEPOINT b; {}",
        insert(100_001, 100_003),
        insert(200_001, 210_000),
        insert(300_001, 310_000),
    ));
    decoded(800_002, 2);
    run(format!(
        "ROLLBACK TO a; {} SAVEPOINT c; {} RELEASE c; {} COMMIT",
        insert(400_001, 400_003),
        insert(500_001, 500_100),
        insert(600_001, 600_001),
    ));
    rig.pg.execute(&format!(
        "BEGIN; {} SAVEPOINT a; {} ROLLBACK",
        insert(1, 9),
        insert(10, 19)
    ));
    // PREPARE is not allowed by max_prepared_transactions = 0, so a last ordinary one ends the test
    rig.pg.execute(&insert(700_001, 700_001));
    let mut expected = Expected::new();
    for (from, to) in [
        (800_001, 800_001),
        (800_002, 800_002),
        (100_001, 100_003),
        (400_001, 400_003),
        (500_001, 500_100),
        (600_001, 600_001),
        (700_001, 700_001),
    ] {
        expected.commit(0, events(from, to));
    }
    rig.wait_for_messages(expected.committed() as u64);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    expected.check(&rig.messages()).assert_clean();
    // or the test shows nothing about large transactions
    eventually("Postgres to report what it spilled", DEADLINE, || {
        let spilled =
            "SELECT spill_txns FROM pg_stat_replication_slots WHERE slot_name = 'jetstream_outbox'";
        rig.pg
            .scalar::<i64>(spilled)
            .is_some_and(|count| count >= 2)
    });
}

#[test]
fn a_prepared_transaction_arrives_when_it_is_committed_and_only_then() {
    let rig = Rig::start_with(Postgres::builder().setting("max_prepared_transactions", "2"));
    let relay = rig.relay(&[]);
    let prepare =
        |from, to, name| format!("BEGIN; {} PREPARE TRANSACTION '{name}'", insert(from, to));
    rig.pg.execute(&prepare(1, 5, "kept"));
    rig.pg.execute(&prepare(11, 15, "dropped"));
    rig.pg.execute("ROLLBACK PREPARED 'dropped'");
    rig.pg.execute(&insert(21, 25));
    rig.pg.execute("COMMIT PREPARED 'kept'");
    rig.wait_for_messages(10);
    rig.pg.execute(&insert(31, 31));
    rig.wait_for_messages(11);
    drop(relay);
    let mut expected = Expected::new();
    for (from, to) in [(21, 25), (1, 5), (31, 31)] {
        expected.commit(0, events(from, to));
    }
    expected.check(&rig.messages()).assert_clean();
}

#[test]
fn two_hundred_thousand_rows_of_one_transaction_pass_through_bounded_memory() {
    const ROWS: u64 = 200_000;
    const LIMIT_KB: u64 = 32 * 1024;
    let rig = Rig::start();
    let mut relay = rig.relay(&[]);
    rig.pg.execute(&format!(
        "BEGIN; {} DELETE FROM outbox; COMMIT",
        insert(1, ROWS)
    ));
    rig.wait_for_messages(ROWS);
    let peak = relay.rss_peak_kb().expect("the relay runs");
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    assert!(peak < LIMIT_KB, "{peak} KiB were resident");
    let mut expected = Expected::new();
    expected.commit(0, events(1, ROWS));
    expected.check(&rig.messages()).assert_clean();
    assert_eq!(rig.nats.client().last_seq(STREAM), ROWS);
}

const MARKS: &str = "--transaction-headers";
const TEXT_TABLE: &str =
    "CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload text)";

/// SQL that inserts events of these ids.
fn rows(kind: &str, ids: &[&str]) -> String {
    let row = |id: &&str| format!("INSERT INTO outbox VALUES ('{id}', '{kind}', 'a', 'x');");
    ids.iter().map(row).collect()
}

/// The ids of the messages that say that they are the last, and of how many.
fn ends(messages: &[StreamMessage]) -> Vec<(&str, u64)> {
    let ends = messages.iter().filter_map(|message| {
        let count = message.header("Outbox-Transaction-End")?;
        Some((message.id(), count.parse().expect("a number")))
    });
    ends.collect()
}

#[test]
fn the_last_event_of_a_transaction_says_how_many_there_are() {
    let rig = Rig::start_with_tables(&format!(
        "{TEXT_TABLE}; ALTER TABLE outbox REPLICA IDENTITY FULL; CREATE TABLE other (n int)"
    ));
    let message = |id: &str| {
        format!(
            "SELECT pg_logical_emit_message(true, '{SLOT}', \
             '{{\"id\": \"{id}\", \"aggregatetype\": \"account\", \"aggregateid\": \"a\", \"payload\": 1}}');"
        )
    };
    rig.pg.execute(&rows("account", &["unmarked"]));
    rig.drain(&[]);
    assert_eq!(rig.messages()[0].header("Outbox-Transaction-End"), None);
    rig.pg.execute(&rows("account", &["alone"]));
    // what comes after the last event is none
    rig.pg.execute(&format!(
        "BEGIN; {} INSERT INTO other SELECT generate_series(1, 300); DELETE FROM outbox; \
         SELECT pg_logical_emit_message(true, 'others', 'x'); COMMIT",
        rows("account", &["1", "2", "3"])
    ));
    rig.pg.execute(&format!(
        "BEGIN; {} {} {} {} COMMIT",
        rows("account", &["row"]),
        message("message"),
        rows("account", &["another"]),
        message("last"),
    ));
    rig.pg.execute(
        "INSERT INTO outbox SELECT 'n' || n, 'account', 'a', 'x' FROM generate_series(1, 10000) AS n",
    );
    rig.drain(&[MARKS]);
    let messages = rig.messages();
    assert_eq!(messages.len(), 10_009);
    let expected = [("alone", 1), ("3", 3), ("last", 4), ("n10000", 10_000)];
    assert_eq!(ends(&messages), expected);
}

#[test]
fn each_stream_of_a_transaction_has_its_end() {
    let rig = Rig::start_with_tables(TEXT_TABLE);
    rig.set_stream(&json!({ "subjects": ["events.account.>"] }));
    rig.nats.client().add_stream("ORDERS", &["events.order.>"]);
    let (account, order) = (
        |ids: &[&str]| rows("account", ids),
        |ids: &[&str]| rows("order", ids),
    );
    let many = |name: &str, count: u32| {
        format!(
            "INSERT INTO outbox SELECT '{name}' || n, 'order', 'a', 'x' FROM generate_series(1, {count}) AS n;"
        )
    };
    rig.pg.execute(&format!(
        "BEGIN; {} {} {} {} COMMIT",
        account(&["a1"]),
        order(&["o1"]),
        account(&["a2"]),
        order(&["o2", "o3"]),
    ));
    rig.pg.execute(&format!(
        "BEGIN; {} {} COMMIT",
        account(&["b1"]),
        many("p", 5_000)
    ));
    // more than the relay holds behind an event
    rig.pg.execute(&format!(
        "BEGIN; {} {} COMMIT",
        account(&["c1"]),
        many("q", 30_000)
    ));
    rig.pg.execute(&account(&["d1"]));
    rig.drain(&[MARKS]);
    let orders = rig.nats.client().read_all("ORDERS");
    assert_eq!(ends(&rig.messages()), [("a2", 2), ("b1", 1), ("d1", 1)]);
    assert_eq!(
        ends(&orders),
        [("o3", 3), ("p5000", 5_000), ("q30000", 30_000)]
    );
}

#[test]
fn what_is_parked_or_dropped_makes_no_end_false() {
    let rig = Rig::start_with_tables(TEXT_TABLE);
    let parked = "jetstream_outbox.parked";
    // the stream has what is parked, too
    rig.set_stream(&json!({ "subjects": ["events.>", parked], "max_msg_size": 2000 }));
    let null = |id: &str| format!("INSERT INTO outbox VALUES ('{id}', 'account', NULL, 'x');");
    let large =
        "INSERT INTO outbox VALUES ('large', 'account', 'a', repeat('x', 3000));".to_string();
    for (of, last) in [("n", null("last")), ("l", large)] {
        rig.pg.execute(&format!(
            "BEGIN; {} {} {} {last} COMMIT",
            rows("account", &[&format!("{of}1")]),
            null(&format!("null-{of}")),
            rows("account", &[&format!("{of}2")]),
        ));
    }
    // the id is known: the event is dropped, first in the middle, then at the end
    rig.pg.execute(&format!(
        "BEGIN; {} COMMIT",
        rows("account", &["c1", "n1", "c2"])
    ));
    rig.pg.execute(&format!(
        "BEGIN; {} COMMIT",
        rows("account", &["d1", "d2", "n1"])
    ));
    rig.pg.execute(&rows("account", &["e"]));
    let log = rig.drain(&[MARKS, "--on-poison", "park"]);
    assert!(
        log.iter()
            .any(|line| line.contains("an earlier one has used its id"))
    );
    let messages = rig.messages();
    let parked = messages.iter().filter(|it| it.subject == parked).count();
    assert_eq!((messages.len(), parked), (13, 4));
    // what is refused or dropped as the last one is known too late
    assert_eq!(ends(&messages), [("n2", 2), ("c2", 2), ("e", 1)]);
}

#[test]
fn a_relay_that_is_killed_in_the_middle_of_a_transaction_ends_it_with_the_right_count() {
    const ROWS: u64 = 100_000;
    let rig = Rig::start();
    rig.pg.execute(&insert(1, ROWS));
    rig.pg.execute(&insert(ROWS + 1, ROWS + 2));
    // slow enough to be killed in the middle
    let args = [MARKS, "--inflight", "8"];
    let mut count = 0;
    for kills in [true, false] {
        let mut relay = rig.relay(&args);
        rig.wait_for_messages(count + 12_000);
        match kills {
            true => relay.kill(),
            false => {
                relay.term();
                assert_eq!(relay.wait_exit(DEADLINE), 0);
                let log = relay.log().join("\n");
                assert!(!log.contains("not everything was acknowledged"), "{log}");
            }
        }
        count = rig.nats.client().message_count(STREAM);
        assert!(count < ROWS, "all was published before");
    }
    rig.drain(&[MARKS]);
    let (last, next) = (uuid(ROWS), uuid(ROWS + 2));
    let messages = rig.messages();
    assert_eq!(ends(&messages), [(last.as_str(), ROWS), (next.as_str(), 2)]);
    let mut expected = Expected::new();
    expected.commit(0, events(1, ROWS));
    expected.commit(0, events(ROWS + 1, ROWS + 2));
    expected.check(&messages).assert_clean();
}

#[test]
fn events_of_which_the_relay_holds_one_at_a_time_have_their_end() {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder().config("max_payload: 8000000").build(),
    };
    rig.pg.execute(TEXT_TABLE);
    rig.pg
        .execute(&format!("CREATE PUBLICATION {SLOT} FOR ALL TABLES"));
    rig.add_slot(SLOT);
    rig.nats.client().add_seed_stream();
    for (flags, name) in [(&[][..], "a"), (&[MARKS][..], "b")] {
        rig.pg.execute(&format!(
            "INSERT INTO outbox SELECT '{name}' || n, 'account', 'a', repeat('x', 2000000) FROM generate_series(1, 4) AS n"
        ));
        rig.drain(flags);
    }
    assert_eq!(ends(&rig.messages()), [("b4", 4)]);
}
