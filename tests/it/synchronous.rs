//! `synchronous_standby_names` that matches everybody: no commit waits for what the relay holds back.

use crate::rig::{DEADLINE, Rig, SLOT};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::wait::{eventually, secs};
use std::time::Instant;

/// With `*` a walsender of any name is a candidate, and the relay confirms minutes later than a standby.
#[test]
fn a_commit_waits_for_the_standby_alone() {
    let primary = Postgres::start();
    primary.seed_setup();
    // the standby is made of a copy, and restarts its primary for it
    let standby = Postgres::builder().build_standby_of(&primary, "sb");
    let rig = Rig {
        pg: primary,
        nats: Nats::start(),
    };
    rig.nats.client().add_seed_stream();
    // of several that match equally the one that came first counts, once it has confirmed something
    standby.stop_fast();
    const HOLD_BACK: &str = "8s";
    let relay = rig.relay(&["--hold-back", HOLD_BACK]);
    rig.commit_event(1, "a");
    let end = rig.pg.current_wal_lsn();
    eventually("the event to be confirmed", DEADLINE, || {
        rig.pg.confirmed_flush_lsn(SLOT) >= end
    });
    standby.start_again();
    eventually("the standby to stream", DEADLINE, || {
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
        rig.pg.scalar::<i64>(sql) == Some(2)
    });
    rig.pg
        .execute("ALTER SYSTEM SET synchronous_standby_names = '*'");
    rig.pg.execute("SELECT pg_reload_conf()");
    eventually("the standby to be synchronous", DEADLINE, || {
        let sql = "SELECT application_name FROM pg_stat_replication WHERE sync_state = 'sync'";
        rig.pg.scalar::<String>(sql).is_some()
    });
    let begun = Instant::now();
    for number in 2..5 {
        rig.commit_event(number, "a");
    }
    // each would wait for the hold-back
    assert!(begun.elapsed() < secs(8), "{:?}", begun.elapsed());
    rig.wait_for_messages(4);
    drop(relay);
    drop(standby);
}

/// For whoever watches `pg_stat_replication`: what is confirmed is the replay position.
#[test]
fn what_is_confirmed_is_shown_as_replayed() {
    let rig = Rig::start();
    let relay = rig.relay(&["--hold-back", "0"]);
    rig.commit_event(1, "a");
    let end = rig.pg.current_wal_lsn();
    let sql = "SELECT flush_lsn IS NULL AND replay_lsn = (SELECT confirmed_flush_lsn FROM pg_replication_slots) \
               FROM pg_stat_replication";
    eventually("the event to be confirmed", DEADLINE, || {
        rig.pg.confirmed_flush_lsn(SLOT) >= end && rig.pg.scalar::<bool>(sql) == Some(true)
    });
    drop(relay);
}
