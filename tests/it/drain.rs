//! `--drain` publishes what was committed before the start, confirms it, and ends.

use crate::rig::{DEADLINE, Rig, SLOT, STREAM, UUID_SQL, counted, uuid};
use crate::support::oracle::{Event, Expected};
use crate::support::process::Process;
use crate::support::wait::eventually;
use postgres::Client;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

/// A second slot that only the tests read: it tells the order of commits without the relay.
const ORACLE_SLOT: &str = "oracle";

/// Commits `transactions` of `events` each, numbered from `first` on; each row is deleted again.
fn commit_many(client: &mut Client, first: u64, transactions: u64, events: u64) {
    client
        .batch_execute(&format!(
            "DO $$ BEGIN FOR t IN 0..{last} LOOP
                INSERT INTO outbox SELECT {UUID_SQL}, 'account', 'a' || n % 7, jsonb_build_object('n', n)
                    FROM generate_series({first} + t * {events}, {first} + (t + 1) * {events} - 1) AS n;
                DELETE FROM outbox WHERE aggregatetype = 'account' AND id >= {from};
                COMMIT;
             END LOOP; END $$",
            last = transactions - 1,
            from = UUID_SQL.replace("n::text", &format!("({first} + t * {events})::text")),
        ))
        .expect("commit");
}

fn event(number: u64) -> Event {
    let subject = format!("events.account.a{}", number % 7);
    Event::new(
        uuid(number),
        subject,
        format!("{{\"n\":{number}}}").as_bytes(),
    )
}

/// All events in commit order, as Postgres' own decoding of [`ORACLE_SLOT`] has it: the id is the first
/// value of an Insert message of pgoutput.
fn committed_in_order(client: &mut Client) -> Vec<u64> {
    let rows = client
        .query(
            "SELECT substring(convert_from(substring(data FROM 14 FOR 36), 'UTF8') FROM 25)::bigint
             FROM pg_logical_slot_get_binary_changes('oracle', NULL, NULL, 'proto_version', '1', 'publication_names', 'jetstream_outbox')
             WHERE get_byte(data, 0) = ascii('I')",
            &[],
        )
        .expect("decode the other slot");
    rows.iter()
        .map(|row| u64::try_from(row.get::<_, i64>(0)).expect("a number"))
        .collect()
}

#[test]
fn a_hundred_thousand_events_of_four_writers_arrive_once_in_commit_order_and_are_confirmed() {
    const WRITERS: u64 = 4;
    const TRANSACTIONS: u64 = 2_500;
    const EVENTS: u64 = 10;
    let rig = Rig::start();
    rig.add_slot(ORACLE_SLOT);
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let mut client = rig.pg.client();
            let first = writer * TRANSACTIONS * EVENTS;
            scope.spawn(move || commit_many(&mut client, first, TRANSACTIONS, EVENTS));
        }
    });
    let before = rig.pg.current_wal_lsn();
    let log = rig.drain(&["--hold-back", "0s"]);
    assert_eq!(counted(&log, "published"), WRITERS * TRANSACTIONS * EVENTS);
    let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
    assert!(
        confirmed >= before,
        "{confirmed} is confirmed of {before}\n{}",
        log.join("\n")
    );

    let order = committed_in_order(&mut rig.pg.client());
    assert_eq!(order.len() as u64, WRITERS * TRANSACTIONS * EVENTS);
    let mut expected = Expected::new();
    // one lane: the whole stream has one order
    expected.commit(0, order.into_iter().map(event));
    expected.check(&rig.messages()).assert_clean();

    let last_seq = rig.nats.client().last_seq(STREAM);
    let start = Instant::now();
    let log = rig.drain(&["--hold-back", "0s"]);
    assert_eq!(
        (counted(&log, "published"), counted(&log, "already_stored")),
        (0, 0)
    );
    assert!(start.elapsed() < DEADLINE / 6, "{:?}", start.elapsed());
    assert_eq!(rig.nats.client().last_seq(STREAM), last_seq);
}

#[test]
fn an_empty_outbox_drains_at_once_also_while_others_write() {
    let rig = Rig::start();
    rig.drain(&[]);
    rig.pg.execute("CREATE TABLE other (n int)");
    rig.drain(&[]);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let mut client = rig.pg.client();
            while !done.load(Ordering::Relaxed) {
                client
                    .batch_execute("INSERT INTO other SELECT generate_series(1, 100)")
                    .expect("write");
            }
        });
        rig.drain(&[]);
        done.store(true, Ordering::Relaxed);
        writing.join().expect("the writer ends");
    });
    assert_eq!(rig.nats.client().last_seq(STREAM), 0);
}

#[test]
fn a_drain_ends_although_events_keep_coming_and_the_next_brings_the_rest() {
    let rig = Rig::start();
    let done = AtomicBool::new(false);
    let committed = AtomicU64::new(0);
    let (before, stored) = thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let mut client = rig.pg.client();
            while !done.load(Ordering::Relaxed) {
                let first = committed.load(Ordering::Relaxed);
                commit_many(&mut client, first, 1, 10);
                committed.fetch_add(10, Ordering::Relaxed);
            }
        });
        let enough = || committed.load(Ordering::Relaxed) >= 500;
        eventually("some transactions", DEADLINE, enough);
        let before = committed.load(Ordering::Relaxed);
        rig.drain(&[]);
        // while the writer still writes: the drain has not waited for it to end
        let stored = rig.nats.client().message_count(STREAM);
        let behind = || committed.load(Ordering::Relaxed) > stored;
        eventually("the writer to be ahead", DEADLINE, behind);
        done.store(true, Ordering::Relaxed);
        writing.join().expect("the writer ends");
        (before, stored)
    });
    assert!(stored >= before, "{stored} of {before} were stored");
    assert_eq!(stored % 10, 0, "whole transactions");
    rig.drain(&[]);
    let mut expected = Expected::new();
    expected.commit(0, (0..committed.load(Ordering::Relaxed)).map(event));
    expected.check(&rig.messages()).assert_clean();
}

#[test]
fn short_drains_with_hold_back_repeat_nothing() {
    let rig = Rig::start();
    for run in 1..=3 {
        commit_many(&mut rig.pg.client(), run * 100, 10, 10);
        let log = rig.drain(&[]);
        // what the runs before have stored is not confirmed yet, and not sent again
        assert_eq!(counted(&log, "published"), 100, "run {run}");
    }
    let mut expected = Expected::new();
    expected.commit(0, (100..400).map(event));
    expected.check(&rig.messages()).assert_clean();
}

/// The number before the first `what`, without its thousands' commas.
fn number_before(text: &str, what: &str) -> Option<u64> {
    let (before, _) = text.split_once(what)?;
    let number = before.rsplit(' ').next()?;
    number.replace(',', "").parse().ok()
}

/// A person sees how far it is, how fast, and for how long still; a log file gets its lines and nothing to draw with.
#[test]
fn a_drain_on_a_terminal_draws_a_bar() {
    let version = Command::new("script").arg("--version").output();
    if !version.is_ok_and(|it| String::from_utf8_lossy(&it.stdout).contains("util-linux")) {
        eprintln!("skipped: there is no script of util-linux here, which makes a terminal");
        return;
    }
    const EVENTS: u64 = 40_000;
    let rig = Rig::start();
    commit_many(&mut rig.pg.client(), 1, EVENTS / 10, 10);
    // one at a time, so that it takes long enough to be watched; where `script` is killed it ends after the servers
    let relay = format!(
        "'{}' -drain -inflight 1 -max-outage 10s -db '{}' -nats '{}'",
        env!("CARGO_BIN_EXE_jetstream-outbox"),
        rig.pg.url("postgres", "postgres"),
        rig.nats.url()
    );
    let mut command = Command::new("script");
    command
        .args(["-q", "-e", "-c", &relay, "/dev/null"])
        .env("TERM", "xterm")
        .stdout(Stdio::piped());
    let mut process = Process::spawn("script", &mut command);
    let mut stdout = process.child().stdout.take().expect("stdout is piped");
    let terminal = thread::spawn(move || {
        let mut drawn = Vec::new();
        stdout.read_to_end(&mut drawn).map(|_| drawn)
    });
    let status = process.wait_exit(DEADLINE);
    let drawn = terminal.join().expect("it reads").expect("a terminal");
    let drawn = String::from_utf8_lossy(&drawn);
    assert!(status.success(), "{drawn}");
    let frames: Vec<&str> = (drawn.split(['\r', '\n']))
        .filter(|line| line.contains(" % of the WAL, "))
        .collect();
    let tells = |frame: &&str| {
        let number = |what| number_before(frame, what).unwrap_or_default();
        number(" % of the WAL, ") < 100
            && number(" events, ") > 0
            && number("/s, ") > 0
            && number("s left") > 0
    };
    assert!(frames.iter().any(tells), "{frames:#?}");
    // none is drawn before there is something to tell
    let has_message = |frame: &&str| frame.contains(" events, ");
    assert!(frames.iter().all(has_message), "{frames:#?}");
    rig.wait_for_messages(EVENTS);

    commit_many(&mut rig.pg.client(), EVENTS + 1, EVENTS / 40, 10);
    let log = rig.drain(&["-inflight", "1"]);
    assert_eq!(counted(&log, "published"), EVENTS / 4);
    for line in &log {
        assert!(line.starts_with("ts="), "{line}");
    }
}
