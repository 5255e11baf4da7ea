//! The slot itself: moved or made anew by somebody else, and confirmed by runs that are shorter than the hold-back.

use crate::rig::{DEADLINE, Rig, SLOT, uuid};
use crate::support::postgres::Postgres;
use crate::support::relay::halts;
use crate::support::wait::{eventually, secs};
use std::time::Duration;

/// Runs until the relay ends by itself, which must be because the slot was moved.
#[track_caller]
fn halts_at_the_slot(rig: &Rig) {
    halts(
        rig.relay(&[]),
        78,
        &["dropped and re-created", "-resume-anyway"],
    );
}

/// A rig that has published one event in an orderly run.
fn after_a_run() -> Rig {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.drain(&[]);
    // nobody's business but that of the slot's consumer
    rig.commit_event(2, "a");
    rig
}

#[test]
fn a_slot_that_was_made_anew_halts_until_told_otherwise() {
    let rig = after_a_run();
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    rig.add_slot(SLOT);
    rig.commit_event(3, "a");
    halts_at_the_slot(&rig);
    halts_at_the_slot(&rig);
    assert_eq!(rig.messages().len(), 1);
    rig.drain(&["--resume-anyway"]);
    assert_eq!(
        rig.messages().len(),
        2,
        "the second event went with the slot"
    );
    rig.commit_event(4, "a");
    rig.drain(&[]);
    assert_eq!(rig.messages().len(), 3);
}

#[test]
fn a_slot_that_somebody_else_has_read_halts() {
    let rig = after_a_run();
    rig.pg.execute(&format!(
        "SELECT count(*) FROM pg_logical_slot_get_binary_changes('{SLOT}', NULL, NULL, 'proto_version', '1', \
         'publication_names', '{SLOT}')"
    ));
    halts_at_the_slot(&rig);
    rig.drain(&["--resume-anyway"]);
}

#[test]
fn a_slot_that_is_moved_while_the_relay_is_away_halts() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    let mut relay = rig.relay(&[]);
    rig.wait_for_messages(1);
    relay.freeze();
    assert_eq!(rig.pg.terminate_walsender(), 1);
    rig.commit_event(2, "b");
    eventually("the slot to be free", DEADLINE, || {
        !rig.pg.slot_active(SLOT)
    });
    rig.pg.execute(&format!(
        "SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn())"
    ));
    relay.thaw();
    assert_eq!(relay.wait_exit(DEADLINE), 78);
    assert!(relay.log().join("\n").contains("moved by somebody else"));
    assert_eq!(rig.messages().len(), 1);
}

/// A limit on what a slot may keep is one on how long the relay may be away.
#[test]
fn a_slot_whose_log_is_gone_halts_and_says_that_events_are_missing() {
    if Postgres::major_version() < 13 {
        eprintln!("skipped: max_slot_wal_keep_size came with Postgres 13");
        return;
    }
    for while_it_runs in [true, false] {
        let rig = Rig::start_with(Postgres::builder().setting("max_slot_wal_keep_size", "1MB"));
        let mut relay = rig.relay(&["--hold-back", "0"]);
        relay.wait_for_log("msg=\"connected\"", DEADLINE);
        rig.commit_event(1, "a");
        rig.wait_for_messages(1);
        match while_it_runs {
            true => relay.freeze(),
            false => relay.kill(),
        }
        let status =
            format!("SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        let mut number = 1;
        eventually("the log to be removed", DEADLINE, || {
            number += 1;
            rig.commit_event(number, "a");
            // the rest of a segment counts; and one is removed at a checkpoint
            rig.pg.execute("SELECT pg_switch_wal()");
            rig.pg.execute("CHECKPOINT");
            rig.pg.scalar::<String>(&status).as_deref() == Some("lost")
        });
        match while_it_runs {
            true => relay.thaw(),
            false => relay = rig.relay(&[]),
        }
        let (code, log) = (relay.wait_exit(DEADLINE), relay.log());
        let last = log.last().expect("it says why");
        assert_eq!(code, 78, "{last}");
        for part in [
            "max_slot_wal_keep_size",
            "events are missing",
            "pg_create_logical_replication_slot",
        ] {
            assert!(last.contains(part), "{part:?} is not in {last}");
        }
        // what had reached the relay before the slot was lost is in the stream, in its order
        let messages = rig.messages();
        let ids: Vec<&str> = messages.iter().map(|message| message.id()).collect();
        let expected: Vec<String> = (1..=number).map(uuid).take(ids.len()).collect();
        assert_eq!(ids, expected);
    }
}

/// Each drain is over long before what it published is old enough.
#[test]
fn drains_confirm_what_earlier_ones_published_also_while_events_keep_coming() {
    const HOLD_BACK: Duration = secs(3);
    let rig = Rig::start();
    rig.commit_event(1, "a");
    let end = rig.pg.current_wal_lsn();
    let mut number = 1;
    let mut confirmed = Vec::new();
    eventually("the first event to be confirmed", DEADLINE, || {
        number += 1;
        rig.commit_event(number, "a");
        rig.drain(&["--hold-back", "3s"]);
        confirmed.push((std::time::Instant::now(), rig.pg.confirmed_flush_lsn(SLOT)));
        rig.pg.confirmed_flush_lsn(SLOT) >= end
    });
    let (begun, _) = confirmed[0];
    let early = confirmed
        .iter()
        .filter(|(at, lsn)| *at - begun < HOLD_BACK && *lsn >= end);
    assert_eq!(
        early.count(),
        0,
        "nothing is confirmed before the hold-back"
    );
    assert_eq!(rig.messages().len() as u64, number);
}

/// An outbox that is idle for long must not keep the log of a busy server, by short runs either.
#[test]
fn drains_of_an_idle_outbox_let_go_of_the_log() {
    let rig = Rig::start();
    rig.pg.execute("CREATE TABLE other (n int)");
    rig.drain(&["--hold-back", "2s"]);
    let end = rig.pg.current_wal_lsn();
    eventually("the log to be let go of", DEADLINE, || {
        rig.pg.execute("INSERT INTO other VALUES (1)");
        rig.drain(&["--hold-back", "2s"]);
        rig.pg.confirmed_flush_lsn(SLOT) >= end
    });
}

/// Postgres says why from 17 on.
#[test]
fn a_slot_that_postgres_has_given_up_halts_with_the_reason() {
    let pg = Postgres::builder().setting("max_slot_wal_keep_size", "32MB");
    let rig = Rig::start_with(pg);
    for _ in 0..6 {
        rig.pg
            .execute("SELECT pg_logical_emit_message(false, 'x', 'x'); SELECT pg_switch_wal()");
    }
    rig.pg.execute("CHECKPOINT");
    let (code, log) = rig.run(&[]);
    let last = log.last().cloned().unwrap_or_default();
    assert_eq!(code, 78, "{last}");
    let since_17 = "SELECT current_setting('server_version_num')::int >= 170000";
    let reason = match rig.pg.scalar::<bool>(since_17) {
        Some(true) => "(wal_removed: the WAL that it needed was more than max_slot_wal_keep_size)",
        _ => "(most often because the WAL that it needed was more than max_slot_wal_keep_size)",
    };
    let said = format!("Postgres has invalidated slot {SLOT} {reason}: events are missing");
    assert!(last.contains(&said), "{last}");
}
