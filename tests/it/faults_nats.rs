//! Faults of nats-server: everything committed arrives once and in order, and nothing is confirmed before
//! it is stored.

use crate::faults_scenario::{NAME, Scenario};
use crate::rig::{DEADLINE, Rig, uuid};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::wait::{eventually, secs, throughout};
use postgres::Client;
use std::time::Duration;

#[test]
fn a_restarted_or_killed_nats_server_loses_repeats_and_reorders_nothing() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_relay("the start");
    for _ in 0..2 {
        nats.restart();
        run.wait_for_relay("a restart");
        nats.kill();
        run.wait_for_commits(100);
        nats.start_again();
        run.wait_for_relay("SIGKILL");
    }
    run.finish_confirmed(relay);
}

/// Its connections stay open for the grace period, in which JetStream answers no more.
#[test]
fn a_nats_server_in_lame_duck_mode_loses_repeats_and_reorders_nothing() {
    let nats = Nats::builder()
        .config("lame_duck_duration: 30s\nlame_duck_grace_period: 2s")
        .build();
    let run = Scenario::start(&nats);
    let relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_relay("the start");
    for _ in 0..2 {
        run.wait_for_commits(100);
        nats.lame_duck();
        run.wait_for_commits(100);
        nats.start_again();
        run.wait_for_relay("lame duck mode");
    }
    relay.wait_for_log("lame duck mode", secs(1));
    run.finish_confirmed(relay);
}

/// At such a pace the relay is often hit while it connects or reads back.
#[test]
fn a_nats_server_killed_again_and_again_loses_repeats_and_reorders_nothing() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&["--hold-back", "0", "--inflight", "16"]);
    for _ in 0..15 {
        run.wait_for_commits(fastrand::u64(1..150));
        nats.kill();
        nats.start_again();
    }
    // a relay that is told to stop while it connects confirms nothing
    run.wait_for_relay("the last kill");
    run.finish_confirmed(relay);
}

#[test]
fn a_nats_server_frozen_for_half_a_minute_loses_repeats_and_reorders_nothing() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_relay("the start");
    nats.freeze();
    throughout("the relay", secs(30), || relay.is_running());
    nats.thaw();
    run.wait_for_relay("30 s frozen");
    run.finish_confirmed(relay);
}

/// What stands in the socket of a frozen server is stored once it is thawed, after the relay has given the
/// connection up: the fence alone keeps it from being a repeat.
#[test]
fn a_nats_server_frozen_beyond_the_ack_timeout_stores_no_late_copies() {
    let nats = Nats::start();
    let mut client = nats.client();
    client.add_stream_with(serde_json::json!({
        "name": NAME, "subjects": ["events.>"], "duplicate_window": 100_000_000,
    }));
    let run = Scenario::start_on(Postgres::start(), &[nats.port()], &[(NAME, "events.")]);
    let relay = run.relay(&["--hold-back", "0", "--ack-timeout", "100ms"]);
    run.wait_for_relay("the start");
    for _ in 0..10 {
        nats.freeze();
        throughout(
            "the relay",
            Duration::from_millis(fastrand::u64(50..600)),
            || relay.is_running(),
        );
        nats.thaw();
        run.wait_for_commits(50);
    }
    run.finish_confirmed(relay);
}

#[test]
fn a_relay_that_starts_against_a_frozen_nats_server_waits_for_it() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    nats.freeze();
    let relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_commits(1000);
    relay.wait_for_log("level=warn", secs(60));
    nats.thaw();
    run.wait_for_relay("frozen at the start");
    run.finish_confirmed(relay);
}

/// The walsender that serves the slot, and since when its session exists.
fn walsender(client: &mut Client) -> Vec<String> {
    let sql = "SELECT pid || ' since ' || backend_start FROM pg_stat_replication";
    let rows = client.query(sql, &[]).expect("query pg_stat_replication");
    rows.iter().map(|row| row.get(0)).collect()
}

#[test]
fn three_minutes_of_back_pressure_do_not_cost_the_session_to_postgres() {
    let pg = Postgres::builder()
        .setting("wal_sender_timeout", "10s")
        .build();
    let nats = Nats::start();
    nats.client().add_seed_stream();
    let run = Scenario::start_on(pg, &[nats.port()], &[(NAME, "events.")]);
    let relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_relay("the start");
    let mut client = run.pg.client();
    let before = walsender(&mut client);
    assert_eq!(before.len(), 1);
    nats.freeze();
    run.commit_a_backlog();
    throughout("the session", secs(180), || {
        walsender(&mut client) == before
    });
    nats.thaw();
    run.wait_for_relay("three minutes of back pressure");
    assert_eq!(walsender(&mut client), before);
    let peak_kb = relay.rss_peak_kb().expect("the relay runs");
    assert!(peak_kb < 32 * 1024, "resident set of {peak_kb} KiB");
    run.finish_confirmed(relay);
}

/// Repeats are caught by the message ids, and an event waits for the one before it under its subject.
#[test]
fn at_least_once_loses_nothing_and_keeps_the_order_of_each_subject() {
    const SUBJECTS: u64 = 7;
    let rig = Rig::start();
    let relay = rig.relay(&["--delivery", "at-least-once", "--ack-timeout", "1s"]);
    relay.wait_for_log("connected", secs(30));
    let mut committed = 0;
    for round in 0..6 {
        for _ in 0..60 {
            committed += 1;
            rig.commit_event(committed, &format!("a{}", committed % SUBJECTS));
        }
        match round % 3 {
            0 => rig.nats.kill(),
            1 => rig.nats.stop(),
            _ => eventually("a session to end", secs(30), || {
                rig.pg.terminate_walsender() == 1
            }),
        }
        if round % 3 < 2 {
            rig.nats.start_again();
        }
    }
    rig.wait_for_messages(committed);
    for subject in 0..SUBJECTS {
        let messages = rig.messages();
        let ids = messages
            .iter()
            .filter(|message| message.subject == format!("events.account.a{subject}"))
            .map(|message| message.id().to_string());
        let expected = (1..=committed).filter(|number| number % SUBJECTS == subject);
        assert_eq!(
            ids.collect::<Vec<_>>(),
            expected.map(uuid).collect::<Vec<_>>()
        );
    }
}

/// With a quiet outbox, what ends an outage is a connection that lasts.
#[test]
fn two_short_outages_with_nothing_to_publish_between_are_not_a_long_one() {
    let rig = Rig::start();
    let relay = rig.relay(&["--max-outage", "5s"]);
    relay.wait_for_log("\"connected\"", DEADLINE);
    for _ in 0..2 {
        let mark = relay.log().len();
        rig.nats.restart();
        relay.wait_for_log_after(mark, "connected to NATS again", DEADLINE);
        throughout("the relay runs on", secs(11), || relay.is_running());
    }
}

/// As where the bucket is made over an API prefix, and its subjects are not imported.
#[test]
fn a_checkpoint_whose_subject_leads_nowhere_halts_exactly_once_delivery() {
    let mapped = r#"mappings = { "$KV.jetstream_outbox.>": "nowhere.>" }"#;
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder().config(mapped).build(),
    };
    rig.pg.seed_setup();
    rig.nats.client().add_seed_stream();
    rig.commit_event(1, "a");
    let (code, log) = rig.run(&["--drain", "--hold-back", "0", "--max-outage", "20s"]);
    let last = log.last().expect("it says why");
    assert_eq!(code, 78, "{last}");
    assert!(last.contains("nobody answers on $KV."), "{last}");
    assert_eq!(rig.messages().len(), 0);
}
