//! Each finding, from facts as a server may tell them.

use super::*;
use crate::relay::preflight::Level;
use crate::relay::preflight::slot::Slot;
use crate::relay::preflight::tests::expect;
use crate::relay::preflight::tests::{config, good as shared};

/// As setup leaves them, on Postgres 18.
fn good() -> Facts {
    Facts {
        shared: shared(),
        encoding: "UTF8".into(),
        publication: Some(Publication::default()),
        ..Facts::default()
    }
}

/// Breaks good facts and expects exactly this finding, whose text, reason and remedy hold `parts`.
#[track_caller]
fn check_with(
    args: &[&str],
    level: Level,
    name: &str,
    parts: &[&str],
    break_it: impl FnOnce(&mut Facts),
) {
    let mut facts = good();
    break_it(&mut facts);
    let config = config(args);
    let findings: Vec<Finding> = JUDGES
        .iter()
        .chain(&SLOT_JUDGES)
        .flat_map(|judge| judge(&facts, &config))
        .collect();
    expect(&findings, level, name, parts);
}

#[track_caller]
fn check(level: Level, name: &str, parts: &[&str], break_it: impl FnOnce(&mut Facts)) {
    check_with(&[], level, name, parts, break_it);
}

fn slot(facts: &mut Facts) -> &mut Slot {
    facts.shared.slot.as_mut().unwrap()
}

fn publication(facts: &mut Facts) -> &mut Publication {
    facts.publication.as_mut().unwrap()
}

fn set(facts: &mut Facts, name: &str, value: &str) {
    facts
        .shared
        .server
        .settings
        .insert(name.into(), value.into());
}

#[test]
fn what_setup_leaves_is_good() {
    check(Level::Ok, "", &["ok    postgres.replica_identity "], |_| {});
}

#[test]
fn the_connection_s_encryption() {
    use Level::{Ok, Warn};
    check(Warn, "postgres.tls", &["sslmode=verify-full"], |f| {
        f.shared.peer = "db.example.com:5432".into()
    });
    check(Ok, "", &["TLSv1_3"], |f| {
        f.shared.peer = "db.example.com:5432".into();
        f.tls = Some("TLSv1_3".into());
    });
    check(Ok, "", &["this machine"], |f| {
        f.shared.peer = "/var/run/postgresql:5432".into()
    });
    check(Ok, "", &["this machine"], |f| {
        f.shared.peer = "[::1]:5432".into()
    });
}

#[test]
fn the_publication() {
    use Level::{Fail, Warn};
    check(
        Fail,
        "postgres.replica_identity",
        &["public.outbox", "DELETE", "publish = 'insert'"],
        |f| publication(f).without_identity = vec!["public.outbox".into()],
    );
    check(
        Warn,
        "postgres.publication_age",
        &["start the relay: it passes"],
        |f| publication(f).younger_than_slot = Some(true),
    );
    check(
        Level::Ok,
        "postgres.publication_age",
        &["another slot holds back as much"],
        |f| publication(f).younger_than_slot = None,
    );
}

#[test]
fn encodings_without_an_equivalent_for_each_byte() {
    use Level::{Ok, Warn};
    for (encoding, level, says) in [
        ("UTF8", Ok, "encoding is UTF8"),
        ("LATIN1", Ok, "encoding is LATIN1"),
        ("WIN1252", Warn, "stands for no character"),
        ("SQL_ASCII", Warn, "not UTF-8"),
        ("EUC_JP", Warn, "stops the relay with 65"),
    ] {
        let name = if level == Ok { "" } else { "postgres.encoding" };
        check_with(&["-no-messages"], level, name, &[says], |f| {
            f.encoding = encoding.into();
        });
    }
}

#[test]
fn messages_are_taken() {
    use Level::{Ok, Warn};
    let name = "postgres.messages";
    check(Warn, name, &["LATIN1", "-no-messages"], |f| {
        f.encoding = "LATIN1".into()
    });
    check(Warn, name, &["upgrade to Postgres 14"], |f| {
        f.shared.version = 130_020
    });
    check_with(&["-no-messages"], Ok, "", &["not taken"], |f| {
        f.encoding = "LATIN1".into();
        f.shared.version = 130_020;
    });
    let function = |f: &mut Facts| {
        f.publish_functions = vec!["emit(true, 'jetstream_outbox', ...)".into()];
    };
    check(
        Ok,
        "",
        &["those with prefix jetstream_outbox are events"],
        function,
    );
    check_with(
        &["-message-prefix", "orders"],
        Warn,
        name,
        &["prefix orders"],
        function,
    );
}

#[test]
fn what_the_slot_retains() {
    use Level::Warn;
    check(
        Warn,
        "postgres.retained_log",
        &["1.1 GB", "nothing but the disk"],
        |f| slot(f).retained_bytes = Some((1 << 30) + 1),
    );
    check(
        Warn,
        "postgres.retained_log",
        &["more than half of max_slot_wal_keep_size"],
        |f| {
            set(f, "max_slot_wal_keep_size", "100");
            slot(f).retained_bytes = Some((50 << 20) + 1);
        },
    );
}

#[test]
fn the_log_and_its_bound_are_told() {
    use Level::Ok;
    check(
        Ok,
        "",
        &["holds 1.0 kB of log; nothing but the disk bounds it (max_slot_wal_keep_size is -1)"],
        |_| {},
    );
    check(Ok, "", &["of log; nothing but the disk bounds it\n"], |f| {
        f.shared.server.settings.remove("max_slot_wal_keep_size");
    });
    check(
        Ok,
        "",
        &["holds 52.4 MB of log; max_slot_wal_keep_size bounds it at 104.9 MB"],
        |f| {
            set(f, "max_slot_wal_keep_size", "100");
            slot(f).retained_bytes = Some(50 << 20);
        },
    );
}

/// The file system of the log, of which so much is free.
fn disk(facts: &mut Facts, free: u64, size: u64) {
    facts.disk = Some(Disk {
        folder: "/data/pg_wal".into(),
        free,
        size,
    });
}

#[test]
fn the_disk() {
    use Level::{Ok, Warn};
    const NAME: &str = "postgres.disk";
    let parts = [
        "ok    postgres.disk",
        "5 bytes of 100 bytes are free at /data/pg_wal\n",
    ];
    check(Ok, "", &parts, |f| {
        slot(f).retained_bytes = Some(5);
        disk(f, 5, 100);
    });
    check(Warn, NAME, &["less than 5 %", "run teardown"], |f| {
        slot(f).retained_bytes = None;
        disk(f, 4, 100);
    });
    let parts = [
        "and slot jetstream_outbox holds 1.0 kB of log",
        "nothing bounds",
    ];
    check(Warn, NAME, &parts, |f| disk(f, 999, 1000));
    let bounded = |held: i64, free: u64| {
        move |f: &mut Facts| {
            set(f, "max_slot_wal_keep_size", "100");
            slot(f).retained_bytes = Some(held << 20);
            disk(f, free << 20, 1000 << 20);
        }
    };
    // what is held already is not free any more, and not taken a second time
    check(Ok, "", &["62.9 MB of 1.0 GB are free"], bounded(50, 60));
    check(Ok, "", &[], bounded(50, 50));
    let parts = [
        "less than the 62.9 MB that slot jetstream_outbox may still take",
        "max_slot_wal_keep_size = '65MB'",
    ];
    check(Warn, NAME, &parts, bounded(40, 51));
}

/// Behind a tunnel there may be the same path, and even a process of that number.
#[test]
fn another_machine_s_disk_is_not_looked_at() {
    let ours = std::process::id() as i32;
    assert_eq!(disk::look("127.0.0.1:5432", ours, "/"), None);
}
