//! What an operator meets: signals, standbys, configuration that is wrong, rows that cannot be events.

use crate::rig::{DEADLINE, Rig, SLOT, STREAM};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use crate::support::wait::eventually;
use rustix::process::Signal;
use serde_json::{Value, json};

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
fn sighup_does_not_end_the_relay() {
    let rig = Rig::start();
    let relay = rig.relay(&[]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    relay.signal(Signal::HUP);
    relay.wait_for_log("ignored SIGHUP", DEADLINE);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    assert!(relay.is_running());
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
        r#"SELECT pg_create_logical_replication_slot('decoded', 'test_decoding');
         SELECT pg_create_physical_replication_slot('physical');
         CREATE PUBLICATION "All deletes" FOR TABLE outbox WITH (publish = 'delete');
         CREATE ROLE plain LOGIN;"#,
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
            &[
                "none does not exist",
                "CREATE PUBLICATION none FOR TABLE outbox",
                "a slot does not see a publication that is younger than its events",
            ],
        ),
        (
            &["--publication", "table"],
            78,
            &[r#"CREATE PUBLICATION \"table\" FOR TABLE"#],
        ),
        (
            &["--publication", "All deletes"],
            78,
            &[
                "does not publish inserts",
                r#"ALTER PUBLICATION \"All deletes\" SET"#,
            ],
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

/// They are refused before there is a session, where an outage would be, too.
#[test]
fn what_authentication_and_tls_lack_ends_the_relay_unless_another_host_may_come_back() {
    let rig = Rig::start_with(Postgres::builder().hba(
        "host all by_scram 127.0.0.1/32 scram-sha-256
         host all by_gss 127.0.0.1/32 gss",
    ));
    rig.pg.execute(
        "CREATE ROLE by_scram LOGIN REPLICATION PASSWORD 'x'; CREATE ROLE by_gss LOGIN REPLICATION",
    );
    let (scram, gss) = (
        rig.pg.url("by_scram", "postgres"),
        rig.pg.url("by_gss", "postgres"),
    );
    let no_tls = rig.pg.url("postgres", "postgres?sslmode=require");
    let missing = rig.pg.url(
        "postgres",
        "postgres?sslmode=verify-full&sslrootcert=/nonexistent",
    );
    let here = format!("127.0.0.1:{}", rig.pg.port());
    let one_is_away = scram.replace(&here, &format!("127.0.0.1:1,{here}"));
    for (db, code, words) in [
        (&scram, 78, &["none was given", "PGPASSWORD"][..]),
        (&gss, 78, &["GSSAPI", "pg_hba.conf"]),
        (&no_tls, 78, &["does not offer", "sslmode"]),
        (&missing, 78, &["/nonexistent", "sslrootcert"]),
        (&one_is_away, 69, &["refused", "none was given"]),
    ] {
        let (found, log) = rig.run(&["-db", db, "--max-outage", "2s"]);
        let last = log.last().cloned().unwrap_or_default();
        assert_eq!(found, code, "{db}: {last}");
        for word in words {
            assert!(last.contains(word), "{db}: {word:?} is not in {last}");
        }
    }
}

#[test]
fn a_stream_that_cannot_carry_the_promises_is_refused_and_one_with_limits_warned_of_once() {
    let rig = Rig::start_without_stream();
    rig.commit_event(1, "a");
    // nats-server removes the folder of all streams with the last of them, and at its leisure: so one stays,
    // and each has another name
    rig.nats.client().add_stream("STAYS", &["stays"]);
    for (number, (settings, updates, refused, word)) in (1..).zip([
        (json!({ "no_ack": true }), json!(null), true, "no_ack"),
        (json!({}), json!({ "sealed": true }), true, "sealed"),
        (
            json!({ "persist_mode": "async" }),
            json!(null),
            true,
            "persist_mode async",
        ),
        (
            json!({ "subject_transform": { "src": "events.>", "dest": "other.>" } }),
            json!(null),
            true,
            "subject_transform",
        ),
        (json!({ "storage": "memory" }), json!(null), false, "memory"),
        (
            json!({ "max_msgs": 100 }),
            json!(null),
            false,
            "discard old",
        ),
        (
            json!({ "max_bytes": 100_000, "discard": "new" }),
            json!(null),
            false,
            "discard new",
        ),
        (
            json!({ "max_msg_size": 2_000 }),
            json!(null),
            false,
            "max_msg_size",
        ),
    ]) {
        let name = format!("S{number}");
        let mut nats = rig.nats.client();
        let mut config = json!({ "name": name, "subjects": ["events.>"] });
        let fields = |value: &Value| value.as_object().cloned().unwrap_or_default();
        let merge = |config: &mut Value, more: &Value| {
            for (name, value) in fields(more) {
                config[name] = value;
            }
        };
        merge(&mut config, &settings);
        nats.add_stream_with(config.clone());
        if !updates.is_null() {
            merge(&mut config, &updates);
            nats.api(&format!("STREAM.UPDATE.{name}"), &config);
        }
        let (code, log) = rig.run(&["--drain", "--hold-back", "150s"]);
        let said: Vec<_> = log
            .iter()
            .filter(|line| line.contains("level=warn") || line.contains("level=error"))
            .collect();
        assert_eq!(said.len(), 1, "{settings}: {log:?}");
        assert!(
            said.iter().all(|line| line.contains(word)),
            "{settings}: {said:?}"
        );
        assert_eq!(code, if refused { 78 } else { 0 }, "{settings}: {said:?}");
        assert_eq!(nats.message_count(&name), u64::from(!refused), "{settings}");
        nats.api(&format!("STREAM.DELETE.{name}"), &json!({}));
        // the next one begins with nothing
        if !refused {
            nats.api("STREAM.DELETE.KV_jetstream_outbox", &json!({}));
        }
    }
}

#[test]
fn what_is_missing_in_nats_is_waited_for_and_named() {
    let rig = Rig::start_without_stream();
    rig.commit_event(1, "a");
    let relay = rig.relay(&[]);
    let said = relay.wait_for_log("no stream captures it", DEADLINE);
    assert!(
        said.contains("events.>") && said.contains("jetstream-outbox setup"),
        "{said}"
    );
    rig.nats.client().add_seed_stream();
    rig.wait_for_messages(1);
}

#[test]
fn a_checkpoint_that_is_not_allowed_halts_exactly_once_and_not_at_least_once() {
    for forbidden in ["$JS.API.STREAM.CREATE.KV_jetstream_outbox", "$KV.>"] {
        let rig = Rig {
            pg: Postgres::start(),
            nats: Nats::builder()
                .config(&format!(
                    "no_auth_user: relay
                     authorization {{ users: [
                         {{ user: admin, password: p }}
                         {{ user: relay, password: p, permissions {{ publish {{ deny: \"{forbidden}\" }} }} }}
                     ] }}"
                ))
                .client_options(json!({ "user": "admin", "pass": "p" }))
                .build(),
        };
        rig.pg.seed_setup();
        rig.nats.client().add_seed_stream();
        rig.commit_event(1, "a");
        let (code, log) = rig.run(&["--drain"]);
        let last = log.last().expect("it says why");
        assert_eq!(code, 78, "{last}");
        for part in ["-print-nats", "-delivery at-least-once"] {
            assert!(last.contains(part), "{last}");
        }
        assert_eq!(rig.messages().len(), 0);
        let log = rig.drain(&["-delivery", "at-least-once"]);
        let warnings: Vec<_> = log
            .iter()
            .filter(|line| line.contains("level=warn"))
            .collect();
        // a write that is not allowed ends the connection, too
        let (told, others) = warnings.split_first().expect("it is warned of");
        assert!(told.contains("going on without the checkpoint"), "{told}");
        let again = |line: &&String| line.contains("connecting to NATS again");
        assert!(others.len() <= 1 && others.iter().all(again), "{others:?}");
        assert_eq!(rig.messages().len(), 1);
    }
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

/// As a node that is cut off from its cluster: it lets the relay in, and then has nothing for it.
#[test]
fn after_a_server_that_is_of_no_use_the_next_is_asked() {
    let rig = Rig::start();
    let useless = Nats::start();
    rig.commit_event(1, "a");
    let servers = format!("{},{}", useless.url(), rig.nats.url());
    let log = rig.drain(&["--nats", &servers, "--max-outage", "20s"]);
    let missing = |line: &String| line.contains("no stream captures it");
    assert!(log.iter().any(missing), "{log:#?}");
    assert_eq!(rig.messages().len(), 1);
}
