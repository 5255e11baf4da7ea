//! Faults of Postgres: everything committed arrives once and in order, and nothing is confirmed before it
//! is stored.

use crate::faults_scenario::{NAME, Scenario};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::wait::{eventually, secs};
use std::time::{Duration, Instant};

/// Postgres waits for its walsenders when it stops. What the relay takes to see it, and a checkpoint.
const STOP_LIMIT: Duration = secs(20);

type Fault = (&'static str, fn(&Postgres));

const FAULTS: [Fault; 5] = [
    ("a restart", Postgres::restart),
    ("an immediate stop", |pg| {
        pg.stop_immediate();
        pg.start_again();
    }),
    ("SIGKILL", |pg| {
        pg.kill();
        pg.start_again();
    }),
    ("a checkpoint", |pg| pg.execute("CHECKPOINT")),
    ("its walsender terminated", terminate_walsender),
];

/// When it returns there is none of before: what is stored then has come over a new session.
fn terminate_walsender(pg: &Postgres) {
    let pids: Vec<i32> = eventually("a walsender to terminate", secs(60), || {
        let sql = "SELECT COALESCE(array_agg(pid), '{}')::int[] FROM pg_stat_replication";
        let pids: Vec<i32> = pg.scalar(sql).unwrap_or_default();
        match pids.is_empty() {
            true => Err("there is none"),
            false => Ok(pids),
        }
    });
    pg.terminate_walsender();
    let left = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ('{{{}}}')",
        join(&pids)
    );
    eventually("its end", secs(60), || match pg.scalar::<i64>(&left) {
        Some(0) => Ok(()),
        left => Err(left),
    });
}

fn join(pids: &[i32]) -> String {
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    pids.join(",")
}

#[test]
fn faults_of_postgres_lose_repeat_and_reorder_nothing() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_relay("the start");
    for _ in 0..2 {
        for (name, fault) in FAULTS {
            fault(&run.pg);
            run.wait_for_relay(name);
        }
    }
    run.finish_confirmed(relay);
}

/// Each session begins with all that is held back: it is found stored, not published.
#[test]
fn faults_of_postgres_repeat_nothing_that_is_held_back() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&[]);
    run.wait_for_relay("the start");
    for (name, fault) in FAULTS {
        fault(&run.pg);
        run.wait_for_relay(name);
    }
    run.finish(relay).assert_held_back();
}

#[test]
fn walsenders_terminated_at_any_moment_lose_repeat_and_reorder_nothing() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&["--hold-back", "0", "--inflight", "16"]);
    run.wait_for_relay("the start");
    for _ in 0..10 {
        run.wait_for_commits(fastrand::u64(1..200));
        terminate_walsender(&run.pg);
    }
    run.wait_for_relay("the last end");
    run.finish_confirmed(relay);
}

/// A Postgres that shuts down waits until its walsenders have everything confirmed.
#[test]
fn postgres_stops_while_confirmations_are_held_back() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&[]);
    for round in ["the start", "the first stop", "the second stop"] {
        run.wait_for_relay(round);
        assert_stops_in_time(&run.pg);
        run.pg.start_again();
    }
    run.finish(relay).assert_held_back();
}

#[test]
fn postgres_stops_while_jetstream_stands_still() {
    stops_while_jetstream_stands_still(|_| {});
}

/// Then the relay does not even read what Postgres asks.
#[test]
fn postgres_stops_while_jetstream_stands_still_and_every_buffer_is_full() {
    stops_while_jetstream_stands_still(Scenario::commit_a_backlog);
}

#[track_caller]
fn stops_while_jetstream_stands_still(backlog: fn(&Scenario)) {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_relay("the start");
    nats.freeze();
    run.wait_for_commits(200);
    backlog(&run);
    assert_stops_in_time(&run.pg);
    run.pg.start_again();
    nats.thaw();
    run.wait_for_relay("a stop of Postgres");
    run.finish_confirmed(relay);
}

#[track_caller]
fn assert_stops_in_time(pg: &Postgres) {
    // events of which no writer knows that they are committed can have ended the wait for the relay
    eventually("a walsender to wait for", secs(60), || pg.slot_active(NAME));
    let start = Instant::now();
    pg.stop_fast();
    let took = start.elapsed();
    assert!(took < STOP_LIMIT, "Postgres took {took:?} to stop");
}
