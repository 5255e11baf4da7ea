//! Each finding, from facts as a server may tell them.

use super::*;
use crate::admin::check::finding::Level;
use crate::cli::{self, Invocation};
use std::ffi::OsString;

fn config(args: &[&str]) -> Config {
    let args = [&["-db", "host=h"], args].concat();
    let Ok(Invocation::Relay(cli)) = cli::parse(args.iter().map(OsString::from)) else {
        panic!("{args:?} do not parse");
    };
    Config::load(*cli, &|_| None).unwrap()
}

fn table(name: &str, columns: &[&str]) -> Table {
    Table {
        name: TableName {
            and_longer: false,
            schema: Some("public".into()),
            name: name.into(),
        },
        columns: columns.iter().map(ToString::to_string).collect(),
        filtered: false,
        replica_identity: true,
    }
}

/// As setup leaves them, on Postgres 18.
fn good() -> Facts {
    let settings = [
        ("wal_level", "logical"),
        ("max_replication_slots", "5"),
        ("max_wal_senders", "10"),
        ("wal_sender_timeout", "60000"),
        ("max_slot_wal_keep_size", "-1"),
        ("synchronized_standby_slots", ""),
        ("idle_replication_slot_timeout", "0"),
    ];
    Facts {
        version: 180_004,
        version_text: "18.4".into(),
        peer: "127.0.0.1:5432".into(),
        role: "relay".into(),
        may_replicate: true,
        settings: settings
            .map(|(name, value)| (name.into(), value.into()))
            .into(),
        slots: 1,
        publication: Some(Publication {
            inserts: true,
            changes: false,
            newer_than_slot: false,
            tables: vec![table("outbox", &COLUMNS)],
        }),
        slot: Some(Slot {
            kind: "logical".into(),
            plugin: Some("pgoutput".into()),
            database: Some("shop".into()),
            here: true,
            wal_status: Some("reserved".into()),
            retained_bytes: Some(1000),
            ..Slot::default()
        }),
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
        .flat_map(|judge| judge(&facts, &config))
        .collect();
    let bad: Vec<String> = findings
        .iter()
        .filter(|finding| finding.level != Level::Ok)
        .map(|finding| {
            assert_eq!((finding.name, finding.level), (name, level), "{finding}");
            finding.to_string()
        })
        .collect();
    assert_eq!(bad.len(), usize::from(level != Level::Ok), "{bad:?}");
    let text = match bad.first() {
        Some(text) => text.clone(),
        None => findings
            .iter()
            .map(|finding| format!("{finding}\n"))
            .collect(),
    };
    for part in parts {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[track_caller]
fn check(level: Level, name: &str, parts: &[&str], break_it: impl FnOnce(&mut Facts)) {
    check_with(&[], level, name, parts, break_it);
}

fn slot(facts: &mut Facts) -> &mut Slot {
    facts.slot.as_mut().unwrap()
}

fn publication(facts: &mut Facts) -> &mut Publication {
    facts.publication.as_mut().unwrap()
}

fn set(facts: &mut Facts, name: &str, value: &str) {
    facts.settings.insert(name.into(), value.into());
}

#[test]
fn what_setup_leaves_is_good() {
    check(Level::Ok, "", &["ok    postgres.slot "], |_| {});
}

#[test]
fn the_server() {
    use Level::{Fail, Ok, Warn};
    check(Warn, "postgres.tls", &["sslmode=verify-full"], |f| {
        f.peer = "db.example.com:5432".into()
    });
    check(Ok, "", &["TLSv1_3"], |f| {
        f.peer = "db.example.com:5432".into();
        f.tls = Some("TLSv1_3".into());
    });
    check(Ok, "", &["this machine"], |f| {
        f.peer = "/var/run/postgresql:5432".into()
    });
    check(Ok, "", &["this machine"], |f| f.peer = "[::1]:5432".into());
    check(
        Fail,
        "postgres.primary",
        &["target_session_attrs=primary"],
        |f| {
            f.version = 150_000;
            f.standby = true;
        },
    );
    check(Warn, "postgres.primary", &["standby"], |f| f.standby = true);
    check(
        Fail,
        "postgres.wal_level",
        &["replica", "wal_level = 'logical'"],
        |f| set(f, "wal_level", "replica"),
    );
    check(
        Fail,
        "postgres.role",
        &["ALTER ROLE relay REPLICATION;"],
        |f| f.may_replicate = false,
    );
    check(Ok, "", &["5 of 5 replication slots"], |f| f.slots = 5);
    check(
        Fail,
        "postgres.walsenders",
        &["max_wal_senders = 15"],
        |f| f.senders = 10,
    );
    check(Ok, "", &["10 of 10 walsenders"], |f| {
        f.senders = 10;
        slot(f).active_pid = Some(7);
    });
    check(Warn, "postgres.wal_sender_timeout", &["off"], |f| {
        set(f, "wal_sender_timeout", "0")
    });
    check(Warn, "postgres.wal_sender_timeout", &["9999 ms"], |f| {
        set(f, "wal_sender_timeout", "9999")
    });
    check(Warn, "postgres.idle_timeout", &["3600 s"], |f| {
        set(f, "idle_replication_slot_timeout", "3600")
    });
}

#[test]
fn a_missing_slot_needs_a_free_place() {
    let mut facts = good();
    facts.slots = 5;
    facts.slot = None;
    let config = config(&[]);
    assert_eq!(slots(&facts, &config)[0].level, Level::Fail);
    facts.slots = 4;
    assert_eq!(slots(&facts, &config)[0].level, Level::Ok);
    check(
        Level::Fail,
        "postgres.slot",
        &["pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput')"],
        |f| {
            f.slot = None;
        },
    );
}

#[test]
fn the_publication() {
    use Level::{Fail, Ok, Warn};
    check(
        Fail,
        "postgres.publication",
        &[
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox",
            "pg_drop_replication_slot",
        ],
        |f| {
            f.publication = None;
        },
    );
    check(
        Fail,
        "postgres.publication",
        &["SET (publish = 'insert');"],
        |f| publication(f).inserts = false,
    );
    check(Fail, "postgres.tables", &["ADD TABLE outbox;"], |f| {
        publication(f).tables.clear()
    });
    check(Fail, "postgres.tables", &["ADD TABLE outbox;"], |f| {
        publication(f).tables = vec![table("other", &["n"])]
    });
    check(Fail, "postgres.tables", &["without payload"], |f| {
        publication(f).tables[0].columns.pop();
    });
    check(
        Ok,
        "",
        &["publication jetstream_outbox holds public.outbox"],
        |f| publication(f).tables.push(table("other", &["n"])),
    );
    check_with(
        &["-table", "shop.outbox"],
        Fail,
        "postgres.tables",
        &["ADD TABLE shop.outbox;"],
        |_| {},
    );
    check_with(
        &["-table", "outbox"],
        Ok,
        "",
        &["publication jetstream_outbox holds public.outbox"],
        |f| {
            publication(f)
                .tables
                .push(table("other", &["aggregatetype"]));
        },
    );
    check(
        Warn,
        "postgres.tables",
        &["row filter", "SET TABLE public.outbox"],
        |f| publication(f).tables[0].filtered = true,
    );
    check(Ok, "", &[], |f| {
        publication(f).tables[0].replica_identity = false
    });
    check(
        Fail,
        "postgres.replica_identity",
        &["public.outbox", "DELETE", "publish = 'insert'"],
        |f| {
            publication(f).changes = true;
            publication(f).tables[0].replica_identity = false;
        },
    );
    check(
        Warn,
        "postgres.publication_age",
        &["pg_drop_replication_slot"],
        |f| publication(f).newer_than_slot = true,
    );
}

#[test]
fn the_slot() {
    use Level::{Fail, Ok, Warn};
    check(Fail, "postgres.slot", &["physical"], |f| {
        slot(f).kind = "physical".into()
    });
    check(
        Fail,
        "postgres.slot",
        &["test_decoding", "pg_drop_replication_slot"],
        |f| {
            slot(f).plugin = Some("test_decoding".into());
        },
    );
    check(Fail, "postgres.slot", &["database shop", "-db"], |f| {
        slot(f).here = false
    });
    check(Ok, "", &["in use by the server process 7"], |f| {
        slot(f).active_pid = Some(7)
    });
    check(Fail, "postgres.slot_log", &["idle_timeout"], |f| {
        slot(f).invalidation = Some("idle_timeout".into())
    });
    check(
        Fail,
        "postgres.slot_log",
        &["removed log", "pg_drop_replication_slot"],
        |f| slot(f).wal_status = Some("lost".into()),
    );
    check(
        Fail,
        "postgres.slot_log",
        &["max_slot_wal_keep_size = -1"],
        |f| slot(f).wal_status = Some("unreserved".into()),
    );
    check(Ok, "", &["wal_status is extended"], |f| {
        slot(f).wal_status = Some("extended".into())
    });
    check(
        Warn,
        "postgres.retained_log",
        &["1.1 GB", "fill the disk"],
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
    check(Ok, "", &["holds 52.4 MB"], |f| {
        set(f, "max_slot_wal_keep_size", "100");
        slot(f).retained_bytes = Some(50 << 20);
    });
    check(
        Warn,
        "postgres.failover",
        &["sb follows", "ALTER_REPLICATION_SLOT"],
        |f| f.standbys = vec!["sb".into()],
    );
    check(Ok, "", &["standbys take slot"], |f| {
        slot(f).failover = true;
        f.standbys = vec!["sb".into()];
        set(f, "synchronized_standby_slots", "\"sb\"");
    });
    check(
        Fail,
        "postgres.failover",
        &["names gone,", "synchronized_standby_slots = ''"],
        |f| {
            slot(f).failover = true;
            f.standbys = vec!["sb".into()];
            set(f, "synchronized_standby_slots", "sb, gone");
        },
    );
}

#[test]
fn an_old_server_is_refused() {
    let facts = Facts {
        version: 110_022,
        ..good()
    };
    assert_eq!(connection(&facts, &config(&[]))[0].level, Level::Fail);
}
