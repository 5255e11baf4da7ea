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

const COLUMNS: [&str; 4] = ["id", "aggregatetype", "aggregateid", "payload"];

fn table(name: &str, columns: &[&str]) -> Table {
    Table {
        name: TableName {
            and_longer: false,
            schema: Some("public".into()),
            name: name.into(),
        },
        columns: columns.iter().map(ToString::to_string).collect(),
        types: (columns.iter())
            .map(|column| (column.to_string(), "text".to_string()))
            .collect(),
        filter: None,
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
        encoding: "UTF8".into(),
        named: vec![Named {
            name: tables(&config(&[])).remove(0),
            exists: true,
            by_partition: false,
            partitioned: false,
        }],
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
        |f| publication(f).tables[0].filter = Some("n > 1".into()),
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
fn tables_and_columns_follow_the_mapping() {
    use Level::{Fail, Ok, Warn};
    let lacks = |args: &[&str], parts: &[&str]| {
        check_with(args, Fail, "postgres.tables", parts, |_| {});
    };
    lacks(
        &["-header", "tenant"],
        &[
            "has no column tenant:",
            "ALTER TABLE public.outbox ADD COLUMN tenant text;",
        ],
    );
    lacks(
        &["-subject", "{prefix}.{aggregatetype}.{region}"],
        &[
            "has no column region:",
            "ADD COLUMN region character varying(255);",
        ],
    );
    lacks(
        &["-id-column", "event_id"],
        &["has no column event_id:", "ADD COLUMN event_id uuid;"],
    );
    lacks(
        &["-headers-column", "meta"],
        &["has no column meta:", "ADD COLUMN meta jsonb;"],
    );
    lacks(
        &["-table", "outbox:payload=body"],
        &["has no column body:", "ADD COLUMN body jsonb;"],
    );
    // {aggregatetype} is the default of a CloudEvent's type; here there is none
    check_with(
        &[
            "-subject",
            "{prefix}.{aggregateid}",
            "-cloudevents",
            "/shop",
        ],
        Fail,
        "postgres.tables",
        &["has no column type:", "ADD COLUMN type text;"],
        |f| publication(f).tables = vec![table("outbox", &["id", "aggregateid", "payload"])],
    );
    check_with(
        &["-subject", "{prefix}.{aggregateid}"],
        Ok,
        "",
        &["holds public.outbox"],
        |f| {
            publication(f).tables = vec![table("outbox", &["id", "aggregateid", "payload"])];
        },
    );
    check_with(
        &["-table", "out*"],
        Ok,
        "",
        &["holds public.outbox"],
        |_| {},
    );
    check_with(
        &["-table", "in*"],
        Fail,
        "postgres.tables",
        &["no table \"in\"*"],
        |_| {},
    );
    check(
        Fail,
        "postgres.tables",
        &[
            "table outbox does not exist",
            "CREATE TABLE outbox (",
            "ADD TABLE outbox;",
        ],
        |f| {
            publication(f).tables.clear();
            f.named[0].exists = false;
        },
    );
    check_with(
        &["-table", "outbox"],
        Fail,
        "postgres.tables",
        &["the partitions", "SET (publish_via_partition_root = true);"],
        |f| {
            publication(f).tables = vec![table("outbox_1", &COLUMNS)];
            f.named[0].by_partition = true;
        },
    );
    // the remedy keeps what else the publication holds
    check(
        Warn,
        "postgres.tables",
        &["SET TABLE public.outbox, public.other (n) WHERE (n > 1);"],
        |f| {
            let mut other = table("other", &["n", "m"]);
            other.columns.pop();
            other.filter = Some("n > 1".into());
            publication(f).tables[0].filter = Some("id > 1".into());
            publication(f).tables.push(other);
        },
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
fn headers_and_messages() {
    use Level::{Fail, Ok, Warn};
    let meta = |kind: &'static str| {
        move |f: &mut Facts| {
            let table = &mut publication(f).tables[0];
            table.columns.push("headers".into());
            table.types.insert("headers".into(), kind.into());
        }
    };
    let name = "postgres.headers_column";
    check(
        Ok,
        "",
        &["column headers of table public.outbox is jsonb"],
        meta("jsonb"),
    );
    check(
        Warn,
        name,
        &["TYPE jsonb USING headers::jsonb;"],
        meta("text"),
    );
    check_with(
        &["-headers-column", "headers"],
        Fail,
        name,
        &["TYPE jsonb"],
        meta("hstore"),
    );

    let name = "postgres.messages";
    check(Warn, name, &["LATIN1", "-no-messages"], |f| {
        f.encoding = "LATIN1".into()
    });
    check(Warn, name, &["upgrade to Postgres 14"], |f| {
        f.version = 130_020
    });
    check_with(&["-no-messages"], Ok, "", &["not taken"], |f| {
        f.encoding = "LATIN1".into();
        f.version = 130_020;
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
fn the_log_and_its_bound_are_told() {
    use Level::Ok;
    check(
        Ok,
        "",
        &["holds 1.0 kB of log; nothing but the disk bounds it (max_slot_wal_keep_size is -1)"],
        |_| {},
    );
    check(Ok, "", &["of log; nothing but the disk bounds it\n"], |f| {
        f.settings.remove("max_slot_wal_keep_size");
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

#[test]
fn an_old_server_is_refused() {
    let facts = Facts {
        version: 110_022,
        ..good()
    };
    assert_eq!(connection(&facts, &config(&[]))[0].level, Level::Fail);
}
