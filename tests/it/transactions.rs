//! Transactions are relayed whole or not at all, whatever their size.

use crate::rig::{DEADLINE, Rig, STREAM, UUID_SQL, uuid};
use crate::support::oracle::{Event, Expected};
use crate::support::postgres::Postgres;
use crate::support::wait::eventually;

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
