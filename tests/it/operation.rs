//! What an operator meets: signals, standbys, configuration that is wrong, rows that cannot be events.

use crate::rig::{DEADLINE, Rig, SLOT, STREAM};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use crate::support::wait::eventually;
use rustix::process::Signal;

#[test]
fn sigterm_and_sigint_leave_nothing_unconfirmed_and_nothing_to_repeat() {
    for signal in [Signal::TERM, Signal::INT] {
        let rig = Rig::start();
        let mut relay = rig.relay(&["--hold-back", "0"]);
        for number in 1..=50 {
            rig.commit_event(number, "a");
        }
        rig.wait_for_messages(50);
        let upto = rig.pg.current_wal_lsn();
        relay.signal(signal);
        assert_eq!(relay.wait_exit(DEADLINE), 0);
        // the commits of the events lie before `upto`; what follows them need not be confirmed
        let last = rig
            .messages()
            .last()
            .expect("fifty")
            .header("Outbox-Position")
            .expect("ours")
            .to_string();
        let commit_lsn = last
            .split(' ')
            .nth(3)
            .expect("five words")
            .parse()
            .expect("an LSN");
        let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
        assert!(
            confirmed > commit_lsn && confirmed <= upto,
            "{confirmed} {upto} {last}"
        );

        let log = rig.drain(&[]);
        assert!(!log.join("\n").contains("published="), "{log:?}");
        assert_eq!(rig.messages().len(), 50);
    }
}

#[test]
fn a_second_signal_ends_a_relay_that_waits_and_sighup_does_not() {
    let rig = Rig::start();
    let mut relay = rig.relay(&[]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    relay.signal(Signal::HUP);
    relay.wait_for_log("ignored SIGHUP", DEADLINE);
    rig.nats.freeze();
    rig.commit_event(1, "a");
    eventually("the relay to notice", DEADLINE, || {
        relay.log().iter().any(|line| line.contains("level=warn"))
    });
    relay.term();
    relay.wait_for_log("stopping: waiting", DEADLINE);
    relay.signal(Signal::INT);
    let code = relay.wait_exit(DEADLINE);
    // at once by the second signal, or the orderly end was as quick
    assert!(code == 130 || code == 0, "{code}");
    rig.nats.thaw();
    rig.drain(&[]);
    assert_eq!(rig.messages().len(), 1);
}

#[test]
fn a_standby_waits_for_the_slot_says_so_once_and_takes_over() {
    let rig = Rig::start();
    let first = rig.relay(&[]);
    first.wait_for_log("msg=\"connected\"", DEADLINE);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    let standby = rig.relay(&[]);
    standby.wait_for_log("waiting for it as a standby", DEADLINE);
    let (code, log) = rig.run(&["--no-wait"]);
    assert_eq!(code, 75, "{log:?}");
    assert!(
        log.last().is_some_and(|line| line.contains("is in use")),
        "{log:?}"
    );
    first.kill();
    rig.commit_event(2, "a");
    rig.wait_for_messages(2);
    let waits = standby
        .log()
        .iter()
        .filter(|line| line.contains("standby"))
        .count();
    assert_eq!(waits, 1, "{:?}", standby.log());
}

#[test]
fn what_is_missing_or_wrong_in_postgres_is_named_with_what_to_do() {
    let rig = Rig::start();
    rig.pg.execute(
        "SELECT pg_create_logical_replication_slot('decoded', 'test_decoding');
         SELECT pg_create_physical_replication_slot('physical');
         CREATE PUBLICATION deletes FOR TABLE outbox WITH (publish = 'delete');
         CREATE ROLE plain LOGIN;",
    );
    rig.pg.execute("CREATE DATABASE other");
    rig.pg
        .client_of("other")
        .expect("the new database")
        .batch_execute("SELECT pg_create_logical_replication_slot('elsewhere', 'pgoutput')")
        .expect("its slot");
    let plain = rig.pg.url("plain", "postgres");
    let missing = rig.pg.url("postgres", "missing");
    for (args, code, words) in [
        (
            &["--slot", "none"][..],
            78,
            &["none does not exist", "pg_create_logical_replication_slot"][..],
        ),
        (&["--slot", "decoded"], 78, &["test_decoding", "-slot"]),
        (&["--slot", "physical"], 78, &["physical", "-slot"]),
        (
            &["--slot", "elsewhere"],
            78,
            &["belongs to database other", "-db"],
        ),
        (
            &["--publication", "none"],
            78,
            &["none does not exist", "CREATE PUBLICATION"],
        ),
        (
            &["--publication", "deletes"],
            78,
            &["does not publish inserts", "ALTER PUBLICATION"],
        ),
        (&["-db", &plain], 78, &["REPLICATION"]),
        (&["-db", &missing], 78, &["missing", "-db"]),
    ] {
        let (found, log) = rig.run(args);
        let last = log.last().cloned().unwrap_or_default();
        assert_eq!(found, code, "{args:?}: {last}");
        assert!(last.contains("level=error"), "{args:?}: {last}");
        for word in words {
            assert!(last.contains(word), "{args:?}: {word:?} is not in {last}");
        }
    }
}

#[test]
fn what_is_missing_in_nats_is_waited_for_and_named() {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::start(),
    };
    rig.pg.seed_setup();
    rig.commit_event(1, "a");
    let relay = rig.relay(&[]);
    let said = relay.wait_for_log("no stream captures it", DEADLINE);
    assert!(
        said.contains("events.>") && said.contains("nats stream add"),
        "{said}"
    );
    rig.nats.client().add_seed_stream();
    rig.wait_for_messages(1);
}

#[test]
fn a_relay_gives_up_after_max_outage_and_says_why() {
    let rig = Rig::start();
    let bare = Nats::builder().without_jetstream().build();
    let mut relay = Relay::start(&rig.pg, &bare, &["--max-outage", "1s"]);
    assert_eq!(relay.wait_exit(DEADLINE), 69);
    let last = relay.log().last().cloned().unwrap_or_default();
    assert!(
        last.contains("JetStream") && last.contains("level=error"),
        "{last}"
    );
}

#[test]
fn a_row_that_cannot_be_an_event_stops_the_relay_before_anything_of_it_is_confirmed() {
    for (row, words) in [
        (
            "(gen_random_uuid(), 'account', NULL, '{}')",
            ["aggregateid", "NULL"],
        ),
        (
            "(gen_random_uuid(), NULL, 'a', '{}')",
            ["aggregatetype", "NULL"],
        ),
        ("(NULL, 'account', 'a', '{}')", ["id", "NULL"]),
    ] {
        let rig = Rig::start_with_tables(
            "CREATE TABLE outbox (id uuid, aggregatetype text, aggregateid text, payload jsonb)",
        );
        rig.commit_event(1, "a");
        let before = rig.pg.current_wal_lsn();
        rig.pg.execute(&format!("INSERT INTO outbox VALUES {row}"));
        rig.commit_event(2, "a");
        let (code, log) = rig.run(&["--hold-back", "0"]);
        let last = log.last().cloned().unwrap_or_default();
        assert_eq!(code, 65, "{last}");
        for word in words.iter().chain(&["outbox", "public", "0/"]) {
            assert!(last.contains(word), "{word:?} is not in {last}");
        }
        let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
        assert!(confirmed <= before, "{confirmed} {before}");
        assert_eq!(rig.messages().len(), 1, "what came before it is stored");
    }
}

#[test]
fn other_tables_are_passed_over_and_tables_can_be_chosen() {
    let rig = Rig::start_with_tables(
        "CREATE TABLE outbox (id uuid, aggregatetype text, aggregateid text, payload jsonb);
         CREATE TABLE users (id int PRIMARY KEY, name text);
         ALTER TABLE outbox REPLICA IDENTITY FULL;
         CREATE SCHEMA shop;
         CREATE TABLE shop.outbox (payload jsonb, aggregateid text, aggregatetype text, id bigint, at timestamptz DEFAULT now());
         ALTER TABLE shop.outbox REPLICA IDENTITY FULL",
    );
    let work = |number: u64| {
        rig.commit_event(number, "a");
        rig.pg.execute(&format!(
            "INSERT INTO users VALUES ({number}, 'x');
             UPDATE users SET name = 'y';
             UPDATE outbox SET aggregateid = 'b';
             INSERT INTO shop.outbox (id, aggregatetype, aggregateid, payload) VALUES ({number}, 'order', 'o', '1');
             DELETE FROM shop.outbox;
             TRUNCATE outbox, users"
        ));
    };
    work(1);
    work(2);
    let log = rig.drain(&[]);
    let warnings = log
        .iter()
        .filter(|line| line.contains("level=warn"))
        .count();
    assert_eq!(warnings, 1, "{log:?}");
    let (a, o) = ("events.account.a".to_string(), "events.order.o".to_string());
    assert_eq!(rig.subjects(), [a.clone(), o.clone(), a, o.clone()]);
    work(3);
    rig.drain(&["--table", "shop.outbox", "--prefix", "events"]);
    assert_eq!(rig.subjects().len(), 5);
    assert_eq!(rig.subjects().last(), Some(&o));
}

#[test]
fn the_environment_beats_defaults_and_flags_beat_the_environment() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    let db = rig.pg.url("postgres", "postgres");
    let nats = rig.nats.url();
    let env = [
        ("JETSTREAM_OUTBOX_DB", db.as_str()),
        ("JETSTREAM_OUTBOX_NATS", "nats://127.0.0.1:1"),
        ("JETSTREAM_OUTBOX_DRAIN", "true"),
        ("JETSTREAM_OUTBOX_LOG_FORMAT", "json"),
    ];
    let mut relay = Relay::run(&["-nats", &nats], &env);
    assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    for line in relay.log() {
        let value: serde_json::Value =
            serde_json::from_str(&line).expect("each line is one JSON object");
        assert!(
            value["msg"].is_string() && value["level"].is_string(),
            "{line}"
        );
    }
    assert_eq!(rig.messages().len(), 1);
}

/// Another database writes, the outbox does not: the slot must not hold its log back.
#[test]
fn an_idle_outbox_confirms_while_another_database_is_busy() {
    let rig = Rig::start_with(Postgres::builder().setting("wal_sender_timeout", "2s"));
    rig.pg.execute("CREATE DATABASE busy");
    let mut busy = rig.pg.client_of("busy").expect("the busy database");
    busy.batch_execute("CREATE TABLE t (x text)")
        .expect("its table");
    let _relay = rig.relay(&["--hold-back", "1s"]);
    for _ in 0..3 {
        busy.batch_execute("INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
            .expect("work");
        let target = rig.pg.current_wal_lsn();
        eventually("the slot to follow", DEADLINE, || {
            let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
            if confirmed >= target {
                Ok(())
            } else {
                Err((confirmed, target))
            }
        });
    }
    assert_eq!(rig.nats.client().message_count(STREAM), 0);
}
