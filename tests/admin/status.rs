//! `status`: both sides' own words about where things stand.

use crate::command::{command, on, run, servers};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM};
use crate::support::process::Process;
use crate::support::wait::{eventually, secs, throughout};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

#[track_caller]
fn status(rig: &Rig) -> Value {
    on(rig, &["status", "--json"]).json(0)
}

#[test]
fn an_event_that_waits_is_told_until_it_is_published() {
    let rig = Rig::start();
    let idle = status(&rig);
    assert_eq!(idle["lag_seconds"], 0, "{idle}");
    assert_eq!(idle["lag_bytes"], 0, "{idle}");
    assert_eq!(idle["slot"]["holder"], Value::Null, "{idle}");

    rig.commit_event(1, "a");
    // the lag is as old as the event
    let waiting = eventually("the event to wait for a second", DEADLINE, || {
        let found = status(&rig);
        match found["lag_seconds"].as_u64() {
            Some(seconds) if seconds > 0 => Ok(found),
            _ => Err(found),
        }
    });
    assert!(waiting["lag_bytes"].as_u64() > Some(0), "{waiting}");
    for (limits, code) in [
        (&["--max-lag-seconds", "3600"][..], 0),
        (&["--max-lag-seconds", "0"], 1),
        (&["--max-lag-bytes", "100000000"], 0),
        (&["--max-lag-bytes", "10"], 1),
    ] {
        on(&rig, &[&["status"], limits].concat()).with(code);
    }

    // held back, so not confirmed; but it is in the stream
    rig.drain(&["--hold-back", "1h"]);
    let published = status(&rig);
    assert!(rig.pg.confirmed_flush_lsn(SLOT) < rig.pg.current_wal_lsn());
    assert_eq!(published["lag_seconds"], 0, "{published}");
    let stream = &published["streams"][0];
    assert_eq!(stream["last_event_seq"], 1, "{published}");
    assert!(stream["last_event_age_seconds"].is_u64(), "{published}");
    let position = stream["last_event_position"].as_str().expect("a position");
    assert!(position.starts_with("jetstream_outbox "), "{position}");
    on(&rig, &["status", "--max-lag-seconds", "0"]).with(0);
    assert_eq!(
        rig.pg
            .scalar::<i64>("SELECT count(*) FROM pg_replication_slots"),
        Some(1),
        "no copy is left"
    );
}

/// A relay that halts in the middle of a transaction has published its first events, and no more.
#[test]
fn the_second_half_of_a_transaction_is_lag() {
    let rig = Rig::start();
    let room_for =
        |max_msgs: i32| rig.set_stream(&json!({ "max_msgs": max_msgs, "discard": "new" }));
    room_for(6);
    rig.commit_event(1, "a");
    rig.pg.execute(
        "INSERT INTO outbox SELECT gen_random_uuid(), 'account', 'a', '{}' FROM generate_series(1, 10)",
    );
    let relay = rig.relay(&["--hold-back", "1h"]);
    relay.wait_for_log("connecting to NATS again", DEADLINE);
    assert_eq!(rig.nats.client().message_count(STREAM), 6);
    wait_for_lag(&rig, "the sixth event to wait");
    room_for(-1);
    rig.wait_for_messages(11);
    let found = status(&rig);
    assert_eq!(found["lag_bytes"], 0, "{found}");
}

/// Waits until an event has waited for a second at least.
#[track_caller]
fn wait_for_lag(rig: &Rig, what: &str) {
    let found = eventually(what, DEADLINE, || {
        let found = status(rig);
        match found["lag_seconds"].as_u64() {
            Some(seconds) if seconds > 0 => Ok(found),
            _ => Err(found),
        }
    });
    assert!(found["lag_bytes"].as_u64() > Some(0), "{found}");
}

#[test]
fn an_event_after_many_messages_that_are_not_transactional_is_lag() {
    let rig = Rig::start();
    rig.pg.execute(
        "SELECT count(pg_logical_emit_message(false, 'heartbeat', '')) FROM generate_series(1, 3000)",
    );
    rig.commit_event(1, "a");
    wait_for_lag(&rig, "the event to wait");
}

/// What one stream has refused stands before what another one has taken.
#[test]
fn an_event_that_one_of_several_streams_lacks_is_lag() {
    let rig = Rig::start_without_stream();
    for (name, subjects) in [
        ("A", "events.account.>"),
        ("O", "events.order.>"),
        ("P", "events.p.>"),
    ] {
        rig.nats.client().add_stream(name, &[subjects]);
    }
    let room_for = |max_msgs: i32| {
        let config = json!({ "name": "A", "subjects": ["events.account.>"], "max_msgs": max_msgs, "discard": "new" });
        rig.nats.client().api("STREAM.UPDATE.A", &config);
    };
    room_for(1);
    // another's messages count, and are no events
    rig.pg.execute(
        "BEGIN; SELECT pg_logical_emit_message(true, 'of another', 'x') FROM generate_series(1, 5); \
         INSERT INTO outbox SELECT gen_random_uuid(), kind, 'a', '{}' \
         FROM unnest(ARRAY['account', 'order', 'account', 'order']) AS kind; COMMIT",
    );
    let relay = rig.relay(&["--hold-back", "1h"]);
    relay.wait_for_log("connecting to NATS again", DEADLINE);
    let count = |stream: &str| rig.nats.client().message_count(stream);
    // what was on its way behind the refused one
    eventually("the fourth event", DEADLINE, || {
        (count("A"), count("O")) == (1, 2)
    });
    wait_for_lag(&rig, "the third event to wait");
    room_for(-1);
    eventually("the third event", DEADLINE, || count("A") == 2);
    // one stream has nothing at all, and nothing is confirmed
    let found = status(&rig);
    assert_eq!(found["lag_bytes"], 0, "{found}");
    relay.kill();

    // a row that cannot be an event, and one that no stream captures, wait as well
    for (values, more) in [
        ("'account', ''", &["--on-bad-subject", "stop"][..]),
        ("'x', 'a'", &[]),
    ] {
        rig.pg.execute(&format!(
            "INSERT INTO outbox VALUES (gen_random_uuid(), {values}, '{{}}')"
        ));
        let args = [&["status", "--json"], more].concat();
        let found = on(&rig, &args).json(0);
        assert!(found["lag_bytes"].as_u64() > Some(0), "{found}");
        rig.pg.execute(&format!(
            "SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn())"
        ));
        assert_eq!(on(&rig, &args).json(0)["lag_bytes"], 0);
    }
}

#[test]
fn what_is_no_event_is_no_lag() {
    let rig = Rig::start_with_tables(
        "CREATE TABLE outbox (id uuid PRIMARY KEY, aggregatetype text, aggregateid text, payload jsonb); \
         CREATE TABLE other (n int PRIMARY KEY)",
    );
    rig.pg
        .execute("INSERT INTO other SELECT generate_series(1, 3000)");
    (1..=1500).for_each(|n| {
        if n % 100 == 0 {
            rig.pg
                .execute(&format!("UPDATE other SET n = -n WHERE n = {n}"));
        }
    });
    let found = status(&rig);
    // what was committed just now waits for 0 seconds as well, so the bytes tell
    assert_eq!(found["lag_bytes"], 0, "{found}");
    rig.commit_event(1, "a");
    eventually("the event to wait", DEADLINE, || {
        status(&rig)["lag_seconds"].as_u64() > Some(0)
    });
}

#[test]
fn what_the_mapping_makes_an_event_is_lag() {
    let rig = Rig::start_with_tables(
        "CREATE TABLE mail (nr int PRIMARY KEY, receiver text, body text); CREATE TABLE other (nr int PRIMARY KEY, receiver text, body text)",
    );
    let mapped = "mail:id=nr,payload=body,subject={prefix}.mail.{receiver}";
    let lag = |more: &[&str]| {
        let args = [&["status", "--json"], more].concat();
        on(&rig, &args).json(0)["lag_bytes"].as_u64()
    };
    rig.pg.execute("INSERT INTO other VALUES (1, 'a', 'b')");
    assert_eq!(lag(&["--table", mapped]), Some(0));
    rig.pg.execute("INSERT INTO mail VALUES (1, 'a', 'b')");
    assert!(lag(&["--table", mapped]) > Some(0));
    assert_eq!(lag(&[]), Some(0), "it is no outbox by default");

    let rig = Rig::start();
    let lag = |more: &[&str]| {
        let args = [&["status", "--json"], more].concat();
        on(&rig, &args).json(0)["lag_bytes"].as_u64()
    };
    rig.pg
        .execute("SELECT pg_logical_emit_message(false, 'jetstream_outbox', 'x')");
    rig.pg
        .execute("SELECT pg_logical_emit_message(true, 'jetstream_outbox2', 'x')");
    assert_eq!(lag(&[]), Some(0));
    rig.pg
        .execute("SELECT pg_logical_emit_message(true, 'jetstream_outbox', '{}')");
    assert!(lag(&[]) > Some(0));
    assert_eq!(lag(&["--no-messages"]), Some(0));
}

#[test]
fn a_relay_that_runs_is_named_and_not_disturbed() {
    let rig = Rig::start();
    let relay = rig.relay(&[]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    let found = eventually("the relay to be seen", DEADLINE, || {
        let found = status(&rig);
        found["slot"]["holder"].is_object().then_some(found)
    });
    assert!(found["slot"]["holder"]["pid"].is_u64(), "{found}");
    assert_eq!(found["lag_seconds"], 0, "{found}");
    let ended = on(&rig, &["status"]);
    let text = ended.with(0);
    for part in [
        "slot     jetstream_outbox at 127.0.0.1:",
        // a relay of which release
        concat!(
            "\nrelay    jetstream-outbox ",
            env!("CARGO_PKG_VERSION"),
            " from"
        ),
        "from 127.0.0.1, server process",
        "sequence 1, ",
        "\nlag      none",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    rig.commit_event(2, "a");
    rig.wait_for_messages(2);
    assert!(relay.is_running());
    let warned: Vec<String> = relay
        .log()
        .into_iter()
        .filter(|line| line.contains("level=warn"))
        .collect();
    assert!(warned.is_empty(), "{warned:?}");
}

/// Without the privilege to see others' sessions, and without a word from the stream.
#[test]
fn a_weak_role_sees_what_it_may() {
    let rig = Rig::start();
    rig.pg.execute("CREATE ROLE relay LOGIN REPLICATION");
    rig.commit_event(1, "a");
    let db = rig.pg.url("relay", "postgres");
    let ended = run(
        &["status", "--json", "-db", &db, "-nats", &rig.nats.url()],
        &[],
    );
    let found = ended.json(0);
    assert!(found["lag_seconds"].is_u64(), "{found}");
    assert!(found["lag_bytes"].as_u64() > Some(0), "{found}");
    assert_eq!(
        found["streams"][0]["last_event_seq"],
        Value::Null,
        "{found}"
    );
}

#[test]
fn what_cannot_be_found_out_is_unknown_and_exceeds_a_limit() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.pg.execute(&format!("DROP PUBLICATION {SLOT}"));
    let found = status(&rig);
    assert_eq!(found["lag_seconds"], Value::Null, "{found}");
    on(&rig, &["status", "--max-lag-seconds", "3600"]).with(1);
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    let ended = on(&rig, &["status"]);
    assert_eq!(ended.code, 78, "{ended:?}");
    rig.nats.stop();
    assert_eq!(on(&rig, &["status"]).code, 69);
}

#[test]
fn watching_prints_again_with_a_history() {
    let rig = Rig::start();
    let mut watched = Watched::start(&rig, &[]);
    for history in ["history  ▁", "history  ▁▁", "history  ▁▁▁"] {
        let line = watched.next("the history", |line| line.starts_with("history  "));
        assert_eq!(line, history);
    }
    watched.process.kill();
}

/// Takes all that a consumer has to give, and acknowledges it.
fn consume(rig: &Rig) {
    let mut nats = rig.nats.client();
    nats.try_subscribe("taken", 2).expect("subscribe");
    let info = nats.api("CONSUMER.INFO.jetstream_outbox.c", &Value::Null);
    let pending = info["num_pending"].as_u64().expect("a count");
    for _ in 0..pending {
        let next = "$JS.API.CONSUMER.MSG.NEXT.jetstream_outbox.c";
        nats.try_send(next, "taken", &[], b"1").expect("ask");
        let message = loop {
            let message = nats.try_next().expect("a message");
            if message.reply.is_some() {
                break message;
            }
        };
        let reply = message.reply.expect("it is to be acknowledged");
        nats.try_send(&reply, "", &[], b"+ACK")
            .expect("acknowledge");
    }
}

/// What was stored and is gone again does not wait: consumed, dropped for lack of a consumer, aged out, or purged.
#[test]
fn events_that_were_consumed_do_not_count_as_lag() {
    for (settings, consumer) in [
        (json!({ "retention": "workqueue" }), true),
        (json!({ "retention": "interest" }), true),
        (json!({ "retention": "interest" }), false),
        (
            json!({ "max_age": 1_000_000_000, "duplicate_window": 1_000_000_000 }),
            false,
        ),
        (json!({ "retention": "limits" }), false),
    ] {
        let rig = Rig::start();
        let mut nats = rig.nats.client();
        nats.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
        let mut config = settings.clone();
        config["name"] = json!(STREAM);
        config["subjects"] = json!(["events.>"]);
        nats.add_stream_with(config);
        if consumer {
            let config = json!({ "durable_name": "c", "ack_policy": "explicit" });
            let request = json!({ "stream_name": STREAM, "config": config });
            nats.api(&format!("CONSUMER.DURABLE.CREATE.{STREAM}.c"), &request);
        }
        // nothing is confirmed in the time of the test
        let mut relay = rig.relay(&["--hold-back", "1h"]);
        for number in 1..=3 {
            rig.commit_event(number, "a");
        }
        eventually("the events", DEADLINE, || nats.last_seq(STREAM) == 3);
        match consumer {
            true => consume(&rig),
            false if settings["retention"] == "limits" => {
                nats.api(&format!("STREAM.PURGE.{STREAM}"), &Value::Null);
            }
            false => {}
        }
        eventually("them to be gone", DEADLINE, || {
            nats.message_count(STREAM) == 0
        });
        let none = |found: &Value| found["lag_bytes"] == 0 && found["lag_seconds"] == 0;
        // within a second of the last event there is a record of it
        eventually("the lag to be none", DEADLINE, || {
            let found = status(&rig);
            if none(&found) { Ok(()) } else { Err(found) }
        });
        throughout("no lag", secs(2), || none(&status(&rig)));
        on(
            &rig,
            &["status", "--max-lag-seconds", "0", "--max-lag-bytes", "0"],
        )
        .with(0);
        relay.term();
        assert_eq!(relay.wait_exit(DEADLINE), 0);
        // and what was never stored does
        rig.commit_event(4, "a");
        eventually("the lag of another", DEADLINE, || {
            let found = status(&rig);
            let seconds = found["lag_seconds"].as_u64();
            if seconds > Some(0) {
                Ok(())
            } else {
                Err(found)
            }
        });
    }
}

/// What `status --watch` has printed since the last look.
struct Watched {
    process: Process,
    lines: Receiver<String>,
}

impl Watched {
    fn start(rig: &Rig, more: &[&str]) -> Watched {
        let mut command = command(&["status", "--watch"], &[]);
        command
            .args(more)
            .args(servers(&rig.pg, &rig.nats))
            .stdout(Stdio::piped());
        let mut process = Process::spawn("status", &mut command);
        let stdout = process.child().stdout.take().expect("stdout is piped");
        let (sender, lines) = channel();
        thread::spawn(move || {
            let lines = BufReader::new(stdout).lines();
            lines
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Watched { process, lines }
    }

    /// The next line that is asked for.
    #[track_caller]
    fn next(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + DEADLINE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|error| {
                panic!(
                    "{what}: {error}; it has ended: {:?}",
                    self.process.try_exit()
                )
            });
            if wanted(&line) {
                return line;
            }
        }
    }
}

/// Programs in two containers may have the same process id, and the copies of slots have names of their own.
#[test]
fn the_copy_of_the_slot_is_the_sessions_own() {
    let rig = Rig::start();
    let mut watched = Watched::start(&rig, &["--json"]);
    let other = format!("outbox_status_{}", watched.process.child().id());
    rig.pg.execute(&format!(
        "SELECT pg_create_physical_replication_slot('{other}')"
    ));
    rig.commit_event(1, "a");
    watched.next("how long the event waits", |line| {
        let found: Value = serde_json::from_str(line).expect("a line is one value");
        assert_ne!(found["lag_seconds"], Value::Null, "{found}");
        found["lag_seconds"].as_u64() > Some(0)
    });
    watched.process.kill();
}

#[test]
fn without_nats_the_slot_is_told_all_the_same() {
    let rig = Rig::start();
    rig.nats.stop();
    let plain = on(&rig, &["status"]);
    assert_eq!(plain.code, 69, "{plain:?}");
    assert!(
        plain.stdout.starts_with(&format!("slot     {SLOT} at ")),
        "{plain:?}"
    );
    assert!(plain.stderr.contains("connect to NATS"), "{plain:?}");
    let json = on(&rig, &["status", "-json"]).json(69);
    assert_eq!(json["slot"]["name"], SLOT, "{json}");
    assert!(
        json["error"].as_str().is_some_and(|it| it.contains("NATS")),
        "{json}"
    );
}

/// A machine that hangs, a network that swallows: nothing is refused, and nothing comes.
#[test]
fn watching_says_soon_that_a_server_does_not_answer() {
    let rig = Rig::start();
    let mut watched = Watched::start(&rig, &[]);
    let figures = |line: &str| line == "lag      none: the slot has nothing to send";
    watched.next("figures", figures);
    let unknown = |line: &str| line.starts_with("unknown  ");
    for server in ["NATS", "Postgres"] {
        let start = Instant::now();
        match server {
            "NATS" => rig.nats.freeze(),
            _ => rig.pg.freeze(),
        }
        let line = watched.next(server, unknown);
        let waited = start.elapsed();
        // it waits for 3 s, looks each second whether they have passed, and begins a second after the last look
        assert!(waited < secs(8), "{waited:?}");
        assert!(line.contains(": no answer within 3"), "{line}");
        // again, by way of a new connection
        let again = Instant::now();
        watched.next(server, unknown);
        assert!(again.elapsed() < secs(8), "{:?}", again.elapsed());
        match server {
            "NATS" => rig.nats.thaw(),
            _ => rig.pg.thaw(),
        }
        watched.next(&format!("figures after {server} moves on"), figures);
    }
    watched.process.kill();
}

#[test]
fn watching_goes_on_while_a_server_is_away() {
    let rig = Rig::start();
    let mut watched = Watched::start(&rig, &[]);
    let figures = |line: &str| line == "lag      none: the slot has nothing to send";
    watched.next("figures", figures);
    for (server, told) in [
        (
            "NATS",
            format!("connect to NATS at 127.0.0.1:{}", rig.nats.port()),
        ),
        (
            "Postgres",
            format!("connect to Postgres at 127.0.0.1:{}", rig.pg.port()),
        ),
    ] {
        match server {
            "NATS" => rig.nats.stop(),
            _ => rig.pg.stop_fast(),
        }
        let line = watched.next(server, |line| {
            line.starts_with("unknown  ") && line.contains(&told)
        });
        assert!(line.ends_with("; trying again"), "{line}");
        let history = watched.next("a gap", |line| line.starts_with("history  "));
        assert!(history.ends_with('·'), "{history}");
        match server {
            "NATS" => rig.nats.start_again(),
            _ => rig.pg.start_again(),
        }
        watched.next(&format!("figures after {server} is back"), figures);
        let history = watched.next("the history", |line| line.starts_with("history  "));
        assert!(history.contains('·') && history.ends_with('▁'), "{history}");
    }
    watched.process.kill();

    let mut watched = Watched::start(&rig, &["--json"]);
    let value = |line: &str| serde_json::from_str::<Value>(line).expect("a line is one value");
    watched.next("figures", |line| value(line)["lag_bytes"] == 0);
    rig.nats.stop();
    let line = watched.next("an error", |line| value(line)["error"].is_string());
    assert!(!line.contains("lag_bytes"), "{line}");
    rig.nats.start_again();
    watched.next("figures", |line| value(line)["lag_bytes"] == 0);
    watched.process.kill();
}
