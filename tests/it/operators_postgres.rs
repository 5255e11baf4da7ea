//! Operators put Postgres back to a snapshot, promote clones, move and re-create the slot.
//!
//! The relay halts by name, and goes on with `--resume-anyway`, once: what was committed since is then published, each event
//! once; and what the lost history had published stays in the stream.

use crate::operators::{capture, edit, ids, insert, stop, wait_for_confirmation};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM, uuid};
use crate::support::command;
use crate::support::natsclient::NatsClient;
use crate::support::postgres::Postgres;
use crate::support::relay::halts;
use crate::support::wait::{eventually, secs, throughout};
use serde_json::{Value, json};
use std::ops::RangeInclusive;
use tempfile::TempDir;

const RESTORED: &str = "this is not the WAL that the streams were written from";
/// Events of the history that is put back, and those of after that.
const OLD: RangeInclusive<u64> = 4..=203;
const NEW: RangeInclusive<u64> = 1001..=1020;

/// What the relay waits for before it tells Postgres of what is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum HoldBack {
    Zero,
    Default,
}

impl HoldBack {
    const EACH: [HoldBack; 2] = [HoldBack::Zero, HoldBack::Default];

    fn args(self) -> &'static [&'static str] {
        match self {
            HoldBack::Zero => &["--hold-back", "0"],
            HoldBack::Default => &[],
        }
    }
}

/// What becomes of the slot of the server that is put back.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Slot {
    /// It is as it was.
    Kept,
    /// It is dropped and created again.
    Recreated,
}

/// Commits each event in a transaction of its own.
fn commit(pg: &Postgres, numbers: RangeInclusive<u64>) {
    let mut client = pg.client();
    for n in numbers {
        let id = uuid(n);
        let sql = format!("INSERT INTO outbox VALUES ('{id}', 'account', 'a', '{{\"n\": {n}}}')");
        client.batch_execute(&sql).expect("commit an event");
    }
}

/// Stops Postgres and copies its disk.
fn snapshot(rig: &Rig) -> TempDir {
    rig.pg.stop_fast();
    let snapshot = rig.pg.snapshot();
    rig.pg.start_again();
    snapshot
}

fn put_back(rig: &Rig, snapshot: &TempDir, slot: Slot) {
    rig.pg.stop_immediate();
    rig.pg.restore(snapshot);
    rig.pg.start_again();
    if slot == Slot::Recreated {
        rig.pg
            .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
        rig.add_slot(SLOT);
    }
}

/// A rig with the first three events stored.
fn begun(hold_back: HoldBack) -> Rig {
    let rig = Rig::start();
    // JetStream does not help by knowing the ids
    edit(
        &mut rig.nats.client(),
        STREAM,
        &json!({ "duplicate_window": 100_000_000 }),
    );
    commit(&rig.pg, 1..=3);
    rig.drain(hold_back.args());
    rig
}

/// The WAL grows beyond all that the streams know of it.
fn grow(pg: &Postgres) {
    pg.execute("SELECT pg_logical_emit_message(true, 'filler', repeat('x', 200000))");
}

/// Sees that `check` and `status` find what the relay does.
#[track_caller]
fn is_found_before(rig: &Rig) {
    let (db, nats) = (rig.pg.url("postgres", "postgres"), rig.nats.url());
    let ended = command::run(&["check", "-db", &db, "-nats", &nats], &[]);
    let found = |line: &str| line.starts_with("fail") && line.contains("-resume-anyway");
    assert!(ended.stdout.lines().any(found), "{}", ended.stdout);
    assert_eq!(ended.code, 2, "{}", ended.stdout);
    let ended = command::run(&["status", "-db", &db, "-nats", &nats], &[]);
    let none = |line: &str| line.contains("lag") && line.contains("none");
    assert!(!ended.stdout.lines().any(none), "{}", ended.stdout);
}

/// Follows the advice: `--resume-anyway` once. All of `expected` is in the stream then, once each, also what is committed after
/// a further start, and when the WAL is past where it was.
#[track_caller]
fn resumes_anyway(rig: &Rig, hold_back: HoldBack, expected: impl Iterator<Item = u64>) {
    let args = [&["--resume-anyway"], hold_back.args()].concat();
    let relay = rig.relay(&args);
    let mut expected: Vec<u64> = expected.collect();
    holds(rig, &expected);
    commit(&rig.pg, 2001..=2003);
    expected.extend(2001..=2003);
    holds(rig, &expected);
    stop(relay);
    let relay = rig.relay(hold_back.args());
    commit(&rig.pg, 2004..=2010);
    grow(&rig.pg);
    commit(&rig.pg, 2011..=2013);
    expected.extend(2004..=2013);
    holds(rig, &expected);
    if hold_back == HoldBack::Zero {
        wait_for_confirmation(rig);
    }
    stop(relay);
    rig.drain(hold_back.args());
    holds(rig, &expected);
}

/// Waits until the stream has these events, and sees that it has each once.
#[track_caller]
fn holds(rig: &Rig, expected: &[u64]) {
    let mut client = rig.nats.client();
    let mut expected: Vec<String> = expected.iter().copied().map(uuid).collect();
    expected.sort_unstable();
    let found = eventually("all events", DEADLINE, || {
        let mut found = ids(&mut client, STREAM);
        found.sort_unstable();
        let missing = expected
            .iter()
            .filter(|id| found.binary_search(id).is_err());
        match missing.count() {
            0 => Ok(found),
            many => Err(format!("{many} of {} are missing", expected.len())),
        }
    });
    assert_eq!(found, expected);
}

/// Put back while no relay runs; `grown`: by the time it starts the WAL is longer than it was.
#[track_caller]
fn put_back_between_sessions(hold_back: HoldBack, slot: Slot, grown: bool) {
    let rig = begun(hold_back);
    let copy = snapshot(&rig);
    let relay = rig.relay(hold_back.args());
    commit(&rig.pg, OLD);
    rig.wait_for_messages(203);
    if hold_back == HoldBack::Zero {
        wait_for_confirmation(&rig);
    }
    stop(relay);
    put_back(&rig, &copy, slot);
    commit(&rig.pg, NEW);
    if grown {
        grow(&rig.pg);
        commit(&rig.pg, 1021..=1025);
    }
    // whoever supervises it starts it again
    for _ in 0..2 {
        is_found_before(&rig);
        halts(
            rig.relay(hold_back.args()),
            65,
            &[RESTORED, "-resume-anyway"],
        );
        assert_eq!(rig.messages().len(), 203);
    }
    let last = if grown { 1025 } else { 1020 };
    resumes_anyway(&rig, hold_back, (1..=203).chain(1001..=last));
}

#[test]
fn postgres_put_back_to_a_snapshot_halts_the_relay_until_that_is_accepted() {
    for hold_back in HoldBack::EACH {
        put_back_between_sessions(hold_back, Slot::Kept, false);
    }
}

#[test]
fn postgres_put_back_to_a_snapshot_halts_the_relay_also_when_its_wal_has_grown() {
    for hold_back in HoldBack::EACH {
        put_back_between_sessions(hold_back, Slot::Kept, true);
    }
}

#[test]
fn postgres_put_back_to_a_snapshot_halts_the_relay_also_with_a_slot_created_again() {
    for hold_back in HoldBack::EACH {
        put_back_between_sessions(hold_back, Slot::Recreated, false);
    }
}

#[test]
fn postgres_put_back_under_a_running_relay_halts_it_until_that_is_accepted() {
    for hold_back in HoldBack::EACH {
        let rig = begun(hold_back);
        let copy = snapshot(&rig);
        let relay = rig.relay(hold_back.args());
        commit(&rig.pg, OLD);
        rig.wait_for_messages(203);
        put_back(&rig, &copy, Slot::Kept);
        commit(&rig.pg, NEW);
        halts(relay, 65, &[RESTORED, "-resume-anyway"]);
        assert_eq!(rig.messages().len(), 203);
        resumes_anyway(&rig, hold_back, (1..=203).chain(NEW));
    }
}

/// The WAL had grown, and none of it was an event: what was stored last is there all the same.
#[test]
fn postgres_put_back_by_a_stretch_without_events_halts_the_relay_until_that_is_accepted() {
    let hold_back = HoldBack::Zero;
    let rig = begun(hold_back);
    let copy = snapshot(&rig);
    let relay = rig.relay(hold_back.args());
    (0..3).for_each(|_| grow(&rig.pg));
    wait_for_confirmation(&rig);
    stop(relay);
    put_back(&rig, &copy, Slot::Kept);
    commit(&rig.pg, NEW);
    is_found_before(&rig);
    for reason in ["and was read and stored up to", "there was none"] {
        let texts = [RESTORED, reason, "-resume-anyway"];
        halts(rig.relay(hold_back.args()), 65, &texts);
        assert_eq!(rig.messages().len(), 3);
        (0..3).for_each(|_| grow(&rig.pg));
    }
    resumes_anyway(&rig, hold_back, (1..=3).chain(NEW));
}

/// The same transactions in the same order: the same LSNs and ids, at another time.
#[test]
fn the_same_writes_repeated_after_a_restore_halt_the_relay_and_come_once() {
    for hold_back in HoldBack::EACH {
        let rig = begun(hold_back);
        let copy = snapshot(&rig);
        commit(&rig.pg, 4..=9);
        rig.drain(hold_back.args());
        put_back(&rig, &copy, Slot::Kept);
        commit(&rig.pg, 4..=9);
        commit(&rig.pg, NEW);
        halts(
            rig.relay(hold_back.args()),
            65,
            &[RESTORED, "-resume-anyway"],
        );
        resumes_anyway(&rig, hold_back, (1..=9).chain(NEW));
    }
}

/// Two clones of one snapshot were both promoted, to the same timeline.
#[test]
fn another_clone_on_the_same_timeline_halts_the_relay_until_that_is_accepted() {
    for hold_back in HoldBack::EACH {
        let mut rig = begun(hold_back);
        rig.pg.stop_fast();
        let copy = rig.pg.snapshot();
        let clone = || Postgres::builder().build_promoted_clone(&copy);
        rig.pg = clone();
        let relay = rig.relay(hold_back.args());
        commit(&rig.pg, OLD);
        rig.wait_for_messages(203);
        stop(relay);
        rig.pg = clone();
        commit(&rig.pg, NEW);
        is_found_before(&rig);
        halts(
            rig.relay(hold_back.args()),
            65,
            &[RESTORED, "-resume-anyway"],
        );
        resumes_anyway(&rig, hold_back, (1..=203).chain(NEW));
    }
}

/// What the checkpoint says of the history that was put back is not told to the server that replaces it.
#[test]
fn after_a_restore_that_is_accepted_nothing_is_confirmed_before_it_is_stored() {
    let rig = begun(HoldBack::Zero);
    let copy = snapshot(&rig);
    let relay = rig.relay(HoldBack::Zero.args());
    commit(&rig.pg, OLD);
    rig.wait_for_messages(203);
    grow(&rig.pg);
    wait_for_confirmation(&rig);
    stop(relay);
    put_back(&rig, &copy, Slot::Kept);
    let before = rig.pg.confirmed_flush_lsn(SLOT);
    commit(&rig.pg, NEW);
    let mut client = rig.nats.client();
    edit(
        &mut client,
        STREAM,
        &json!({ "max_msgs": 203, "discard": "new" }),
    );
    let relay = rig.relay(&["--resume-anyway", "--hold-back", "0"]);
    relay.wait_for_log("maximum messages exceeded", DEADLINE);
    throughout("what is not stored is not confirmed", secs(5), || {
        let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
        if confirmed <= before {
            Ok(())
        } else {
            Err(confirmed)
        }
    });
    relay.kill();
    edit(&mut client, STREAM, &json!({ "max_msgs": -1 }));
    rig.drain(HoldBack::Zero.args());
    holds(&rig, &(1..=203).chain(NEW).collect::<Vec<_>>());
}

/// What was restored is accepted: the stream has these events in the end, and nothing more.
#[track_caller]
fn accept(rig: &Rig, stream: &str, expected: Vec<String>) {
    let mut client = rig.nats.client();
    let relay = rig.relay(&["--resume-anyway"]);
    eventually("the new events", DEADLINE, || {
        ids(&mut client, stream).last() == expected.last()
    });
    stop(relay);
    rig.drain(&[]);
    assert_eq!(ids(&mut client, stream), expected);
}

/// The slot sends again what a stream holds that captures nothing any more.
#[test]
fn after_a_restore_that_is_accepted_a_stream_that_left_the_prefix_proves_what_it_holds() {
    let rig = begun(HoldBack::Default);
    let mut client = rig.nats.client();
    capture(&mut client, STREAM, &["unused"]);
    client.add_stream("B", &["events.>"]);
    let copy = snapshot(&rig);
    commit(&rig.pg, 4..=9);
    rig.drain(&[]);
    put_back(&rig, &copy, Slot::Kept);
    commit(&rig.pg, NEW);
    halts(rig.relay(&[]), 65, &[RESTORED, "-resume-anyway"]);
    let expected = (4..=9).chain(NEW).map(uuid).collect();
    accept(&rig, "B", expected);
    assert_eq!(ids(&mut client, STREAM), [1, 2, 3].map(uuid));
}

/// A relay runs while another stream takes the subjects, and gives them back at once: what that one got is far from matured, and
/// no older cut has ever named it.
#[test]
fn after_a_restore_that_is_accepted_a_stream_that_came_and_went_under_the_relay_proves_what_it_holds()
 {
    let rig = begun(HoldBack::Default);
    let mut client = rig.nats.client();
    let stored = |client: &mut NatsClient, stream: &str, last: u64| {
        let last = uuid(last);
        eventually("the events", DEADLINE, || {
            ids(client, stream).last() == Some(&last)
        });
    };
    let relay = rig.relay(&[]);
    capture(&mut client, STREAM, &["unused"]);
    client.add_stream("B", &["events.>"]);
    commit(&rig.pg, 4..=6);
    stored(&mut client, "B", 6);
    capture(&mut client, "B", &["unused.too"]);
    capture(&mut client, STREAM, &["events.>"]);
    commit(&rig.pg, 7..=9);
    stored(&mut client, STREAM, 9);
    stop(relay);
    let copy = snapshot(&rig);
    commit(&rig.pg, 10..=12);
    rig.drain(&[]);
    put_back(&rig, &copy, Slot::Kept);
    commit(&rig.pg, NEW);
    halts(rig.relay(&[]), 65, &[RESTORED, "-resume-anyway"]);
    let expected = (1..=3).chain(7..=12).chain(NEW).map(uuid).collect();
    accept(&rig, STREAM, expected);
    assert_eq!(ids(&mut client, "B"), [4, 5, 6].map(uuid));
}

/// Nothing was told to Postgres since, and no cut agrees with the streams: what the lost history has published is read again, and
/// need not come from Postgres. The new events are at the positions of lost ones, or at others.
#[test]
fn after_a_restore_that_is_accepted_a_stream_may_be_deleted_and_created_again() {
    for same_positions in [true, false] {
        let rig = begun(HoldBack::Zero);
        let mut client = rig.nats.client();
        capture(&mut client, STREAM, &["events.account.>"]);
        client.add_stream("B", &["events.order.>"]);
        rig.pg.execute(&insert(501, "order"));
        rig.drain(HoldBack::Zero.args());
        // what a walsender has confirmed is not written out before Postgres 17; what is advanced to is
        let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
        rig.pg.execute(&format!(
            "SELECT pg_replication_slot_advance('{SLOT}', '{confirmed}')"
        ));
        let copy = snapshot(&rig);
        commit(&rig.pg, 4..=9);
        rig.drain(&[]);
        put_back(&rig, &copy, Slot::Kept);
        if !same_positions {
            grow(&rig.pg);
        }
        commit(&rig.pg, NEW);
        halts(rig.relay(&[]), 65, &[RESTORED, "-resume-anyway"]);
        let mut expected: Vec<String> = (1..=9).chain(NEW).map(uuid).collect();
        let relay = rig.relay(&["--resume-anyway"]);
        eventually("the new events", DEADLINE, || {
            ids(&mut client, STREAM).last() == expected.last()
        });
        stop(relay);
        client.api("STREAM.DELETE.B", &Value::Null);
        client.add_stream("B", &["events.order.>"]);
        commit(&rig.pg, 2001..=2003);
        expected.extend((2001..=2003).map(uuid));
        rig.drain(&[]);
        assert_eq!(ids(&mut client, STREAM), expected);
    }
}
