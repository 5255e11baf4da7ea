//! Each rule, from facts as a server may report them.

use super::outboxes::{Outboxes, Publication};
use super::server::{Role, Server, Writer};
use super::slot::Slot;
use super::*;
use crate::cli::{self, Invocation};
use std::ffi::OsString;

/// The configuration of a relay with these flags.
pub fn config(args: &[&str]) -> Config {
    let args = [&["-db", "host=h"], args].concat();
    let Ok(Invocation::Relay(cli)) = cli::parse(args.iter().map(OsString::from)) else {
        panic!("{args:?} do not parse");
    };
    Config::load(&cli, &|_| None).expect("a configuration")
}

/// As setup leaves them, on Postgres 18.
pub fn good() -> Facts {
    let settings = [
        ("wal_level", "logical"),
        ("max_replication_slots", "5"),
        ("max_wal_senders", "10"),
        ("wal_sender_timeout", "60000"),
        ("max_slot_wal_keep_size", "-1"),
        ("synchronized_standby_slots", ""),
        ("synchronous_standby_names", ""),
        ("idle_replication_slot_timeout", "0"),
    ];
    Facts {
        version: 180_004,
        version_text: "18.4".into(),
        peer: "127.0.0.1:5432".into(),
        server: Server {
            database: "shop".into(),
            role: Role {
                name: "relay".into(),
                replication: true,
                member_of: Vec::new(),
            },
            settings: settings
                .map(|(name, value)| (name.into(), value.into()))
                .into(),
            slots: 1,
            ..Server::default()
        },
        slot: Some(Slot {
            slot_type: "logical".into(),
            plugin: Some("pgoutput".into()),
            database: Some("shop".into()),
            here: true,
            confirmed_flush_lsn: Some("0/1000".into()),
            wal_status: Some("reserved".into()),
            retained_bytes: Some(1000),
            ..Slot::default()
        }),
        outboxes: Outboxes {
            version: 180_004,
            publication: Some(Publication {
                oid: 1,
                inserts: true,
                ..Publication::default()
            }),
            tables: vec![publication::tests::table(
                10,
                "outbox",
                &["id", "aggregatetype", "aggregateid", "payload"],
            )],
        },
        ..Facts::default()
    }
}

/// Breaks good facts and expects exactly this finding, whose text, reason and fix hold `parts`. A failure that the relay
/// asks for keeps it from starting.
#[track_caller]
fn check(level: Level, name: &str, parts: &[&str], break_it: impl FnOnce(&mut Facts)) {
    let mut facts = good();
    break_it(&mut facts);
    let config = config(&[]);
    let all = START.into_iter().chain([&server::RULES[..], &slot::RULES]);
    let findings: Vec<Finding> = all
        .flat_map(|rules| rules.iter())
        .flat_map(|rule| rule(&facts, &config))
        .collect();
    expect(&findings, level, name, parts);
}

/// All is well but for this, whose text, reason and fix hold `parts`.
#[track_caller]
pub fn expect(findings: &[Finding], level: Level, name: &str, parts: &[&str]) {
    let bad: Vec<&Finding> = findings.iter().filter(|it| it.level != Level::Ok).collect();
    assert_eq!(bad.len(), usize::from(level != Level::Ok), "{bad:#?}");
    for finding in &bad {
        assert_eq!((finding.name, finding.level), (name, level), "{finding}");
    }
    let text = match bad.first() {
        Some(finding) => finding.to_string(),
        None => findings.iter().map(|it| format!("{it}\n")).collect(),
    };
    for part in parts {
        assert!(text.contains(part), "{part}: {text}");
    }
}

fn set(facts: &mut Facts, name: &str, value: &str) {
    facts.server.settings.insert(name.into(), value.into());
}

fn slot(facts: &mut Facts) -> &mut Slot {
    facts.slot.as_mut().expect("a slot")
}

#[test]
fn a_finding_is_one_line() {
    let finding = warn("a.b", "it\nis  so", "it hurts", "SELECT\n1;");
    assert_eq!(
        finding.to_string(),
        "warn  a.b                          it is so: it hurts; fix: SELECT 1;"
    );
    assert_eq!(
        ok("a.b", "fine").to_string(),
        "ok    a.b                          fine"
    );
    assert!(Level::Fail > Level::Warn && Level::Warn > Level::Ok);
}

#[test]
fn what_setup_leaves_is_good() {
    check(Level::Ok, "", &["ok    postgres.slot "], |_| {});
    assert_eq!(failures(&good(), &config(&[])), []);
}

#[test]
fn the_server() {
    use Level::{Fail, Ok, Warn};
    let name = "postgres.primary";
    check(Fail, name, &["target_session_attrs=primary"], |f| {
        f.version = 150_018;
        f.server.in_recovery = true;
    });
    check(Warn, name, &["standby"], |f| f.server.in_recovery = true);
    let name = "postgres.wal_level";
    let parts = ["replica", "ALTER SYSTEM SET wal_level = 'logical'"];
    check(Fail, name, &parts, |f| set(f, "wal_level", "replica"));
    check(Ok, "", &["replica, and logical in effect"], |f| {
        f.version = 190_000;
        set(f, "wal_level", "replica");
        set(f, "effective_wal_level", "logical");
    });
    check(Fail, name, &["minimal"], |f| {
        f.version = 190_000;
        set(f, "wal_level", "minimal");
    });
    check(Ok, "", &["5 of 5 replication slots"], |f| {
        f.server.slots = 5
    });
    let parts = ["max_wal_senders = 15"];
    check(Fail, "postgres.walsenders", &parts, |f| {
        f.server.senders = 10
    });
    check(Ok, "", &["10 of 10 walsenders"], |f| {
        f.server.senders = 10;
        slot(f).active_pid = Some(7);
    });
    let name = "postgres.wal_sender_timeout";
    check(Warn, name, &["off"], |f| set(f, "wal_sender_timeout", "0"));
    check(Warn, name, &["9999 ms"], |f| {
        set(f, "wal_sender_timeout", "9999")
    });
    check(Warn, "postgres.idle_timeout", &["3600 s"], |f| {
        set(f, "idle_replication_slot_timeout", "3600")
    });
}

#[test]
fn an_old_server_is_refused() {
    let facts = Facts {
        version: 110_022,
        ..Facts::default()
    };
    let failures = failures(&facts, &config(&[]));
    assert!(failures[0].found.contains("Postgres"), "{failures:?}");
    assert_eq!(failures[0].name, "postgres.connection");
}

#[test]
fn a_role_replicates_by_attribute_by_membership_or_because_the_server_lets_it() {
    use Level::{Fail, Ok};
    let name = "postgres.role";
    let without = |f: &mut Facts| f.server.role.replication = false;
    check(Fail, name, &["ALTER ROLE relay REPLICATION;"], without);
    check(Fail, name, &["GRANT rds_replication TO relay;"], |f| {
        without(f);
        f.server.markers = vec!["rds_superuser".into()];
    });
    check(Ok, "", &["as a member of rds_replication"], |f| {
        without(f);
        f.server.role.member_of = vec!["rds_replication".into()];
    });
    check(Ok, "", &["relay may replicate"], |f| {
        without(f);
        f.probe = Some(probe::Probe::Admitted {
            system: postgres::replication::IdentifySystem {
                system_id: 7,
                timeline: 1,
                xlogpos: postgres::Lsn(1),
                dbname: "shop".into(),
            },
        });
    });
}

/// What no catalog shows: a pooler on the way, or a server that refuses for a reason that has no finding of its own.
#[test]
fn the_relays_own_kind_of_connection_is_refused() {
    let refused = |code: &str, message: &str| {
        let error = postgres::error::ServerError {
            severity: "FATAL".into(),
            code: code.into(),
            message: message.into(),
            ..Default::default()
        };
        let error = postgres::Error::Server(error.into()).into();
        move |f: &mut Facts| f.probe = Some(probe::Probe::Refused { error })
    };
    let name = "postgres.replication";
    let pooler = refused("08P01", "unsupported startup parameter: replication");
    check(Level::Fail, name, &["to a connection pooler"], pooler);
    let other = refused("28000", "no pg_hba.conf entry");
    check(Level::Fail, name, &["check pg_hba.conf"], other);
    // the role's, and the walsenders'
    let role = refused("42501", "must be superuser or replication role");
    check(Level::Fail, "postgres.role", &["may not replicate"], role);
    let busy = refused("53300", "too many walsenders");
    check(Level::Ok, "", &["relay may replicate"], busy);
}

#[test]
fn a_managed_server_has_no_alter_system() {
    for (marker, part) in [
        ("rds_superuser", "rds.logical_replication = 1"),
        ("cloudsqlsuperuser", "cloudsql.logical_decoding = on"),
        ("alloydbsuperuser", "alloydb.logical_decoding = on"),
        ("azure_pg_admin", "server parameter wal_level"),
        ("neon_superuser", "project's settings"),
        ("supabase_admin", "wal_level = logical"),
    ] {
        check(Level::Fail, "postgres.wal_level", &[part], |f| {
            set(f, "wal_level", "replica");
            f.server.markers = vec![marker.into()];
        });
        check(
            Level::Warn,
            "postgres.wal_sender_timeout",
            &["the way "],
            |f| {
                set(f, "wal_sender_timeout", "0");
                f.server.markers = vec![marker.into()];
            },
        );
    }
}

#[test]
fn a_missing_slot_needs_a_free_place() {
    let parts = ["pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput')"];
    check(Level::Fail, "postgres.slot", &parts, |f| f.slot = None);
    let mut facts = good();
    facts.slot = None;
    for (slots, level) in [(4, Level::Ok), (5, Level::Fail)] {
        facts.server.slots = slots;
        let rules = server::RULES.iter();
        let mut findings = rules.flat_map(|rule| rule(&facts, &config(&[])));
        let found = findings.find(|it| it.name == "postgres.slots");
        assert_eq!(found.map(|it| it.level), Some(level));
    }
}

/// The names of the standbys that follow are proposed; the relay's own never is.
#[test]
fn the_relay_as_a_synchronous_standby() {
    use Level::{Ok, Warn};
    let name = "postgres.synchronous_standby";
    check(Warn, name, &["synchronous_standby_names = ''"], |f| {
        set(f, "synchronous_standby_names", "*")
    });
    let parts = ["synchronous_standby_names = 'FIRST 1 (\"db2\")'"];
    check(Warn, name, &parts, |f| {
        set(f, "synchronous_standby_names", "ANY 1 (*)");
        f.server.standbys = vec!["db2".into()];
    });
    let ours = config(&[]).db.application_name().to_string();
    check(Warn, name, &parts, |f| {
        let value = format!("db2, \"{}\"", ours.to_uppercase());
        set(f, "synchronous_standby_names", &value);
        f.server.standbys = vec![ours.clone()];
    });
    check(Ok, "", &["no synchronous standby"], |f| {
        set(f, "synchronous_standby_names", "db2")
    });
}

/// Old transactions that have written, while there is no slot, are told with what ends them.
#[test]
fn what_blocks_the_slot_s_creation_is_named() {
    let name = "postgres.open_transactions";
    let open = Writer {
        xid: "7".into(),
        pid: Some(42),
        database: Some("other".into()),
        owner: Some("app".into()),
        application: Some("report".into()),
        seconds: Some(3600),
        ..Writer::default()
    };
    let prepared = Writer {
        xid: "8".into(),
        gid: Some("it's".into()),
        database: Some("shop".into()),
        owner: Some("app".into()),
        seconds: Some(1),
        ..Writer::default()
    };
    let young = Writer {
        seconds: Some(1),
        ..open.clone()
    };
    let judge = |slot: Option<Slot>, writers: Vec<Writer>| {
        let mut facts = good();
        facts.slot = slot;
        facts.server.writers = writers;
        let rules = server::RULES.iter();
        let findings = rules.flat_map(|rule| rule(&facts, &config(&[])));
        let found = findings.filter(|it| it.name == name);
        found.map(|it| it.to_string()).collect::<Vec<_>>()
    };
    let texts = judge(None, vec![open.clone(), prepared.clone(), young.clone()]);
    for part in [
        "server process 42, database other, role app, application report, 3600 s old",
        "prepared transaction 'it''s', database shop, role app, 1 s old",
        "SELECT pg_terminate_backend(42); COMMIT PREPARED 'it''s'; -- the prepared in its own database, or ROLLBACK",
    ] {
        assert!(texts[0].contains(part), "{part}: {texts:?}");
    }
    assert_eq!(judge(None, vec![young]), [""; 0]);
    assert_eq!(judge(good().slot, vec![open, prepared]), [""; 0]);
}

#[test]
fn the_slot() {
    use Level::{Fail, Ok, Warn};
    let name = "postgres.slot";
    // never one that another needs
    let another = "take another -slot, for every command and the relay: jetstream-outbox setup -slot jetstream_outbox_shop";
    check(Fail, name, &["physical", another], |f| {
        slot(f).slot_type = "physical".into();
        slot(f).here = false;
    });
    check(Fail, name, &["test_decoding", another], |f| {
        slot(f).plugin = Some("test_decoding".into())
    });
    check(Fail, name, &["database crm", "-db", another], |f| {
        slot(f).here = false;
        slot(f).database = Some("crm".into());
    });
    check(Fail, name, &["temporary", another], |f| {
        slot(f).temporary = true;
        slot(f).active_pid = Some(7);
    });
    let copied = "SELECT pg_copy_logical_replication_slot('jetstream_outbox', 'jetstream_outbox_copy'); \
                  SELECT pg_drop_replication_slot('jetstream_outbox'); \
                  SELECT pg_copy_logical_replication_slot('jetstream_outbox_copy', 'jetstream_outbox');";
    check(Fail, name, &["two_phase", copied], |f| {
        slot(f).two_phase = true
    });
    check(Fail, name, &["two_phase", "stop what uses the slot"], |f| {
        slot(f).two_phase = true;
        slot(f).active_pid = Some(7);
    });
    check(Ok, "", &["in use by the server process 7"], |f| {
        slot(f).active_pid = Some(7)
    });
    check(Ok, "", &["in use by the server process 7"], |f| {
        slot(f).active_pid = Some(7);
        slot(f).application = Some("jetstream-outbox 0.0.9".into());
    });
    check(Warn, name, &["Debezium", another], |f| {
        slot(f).active_pid = Some(7);
        slot(f).application = Some("Debezium Streaming".into());
    });
    check(Ok, "", &["not in use"], |f| slot(f).synced = true);
    let mut facts = good();
    slot(&mut facts).synced = true;
    facts.server.in_recovery = true;
    let failures = failures(&facts, &config(&[]));
    assert!(
        failures[0].found.contains("synchronized from the primary"),
        "{failures:?}"
    );
}

#[test]
fn a_slot_that_was_invalidated() {
    use Level::{Fail, Ok};
    let name = "postgres.slot_log";
    let again = "SELECT pg_drop_replication_slot('jetstream_outbox'); SELECT pg_create_logical_replication_slot(";
    check(Fail, name, &["idle_timeout", again], |f| {
        slot(f).invalidation_reason = Some("idle_timeout".into())
    });
    check(Fail, name, &["invalidated", again], |f| {
        slot(f).wal_status = Some("lost".into())
    });
    check(Fail, name, &["invalidated", again], |f| {
        slot(f).conflicting = Some(true)
    });
    check(Fail, name, &["wal_removed", "failover => true"], |f| {
        slot(f).invalidation_reason = Some("wal_removed".into());
        slot(f).failover = true;
    });
    check(Fail, name, &["max_slot_wal_keep_size = -1"], |f| {
        slot(f).wal_status = Some("unreserved".into())
    });
    check(Ok, "", &["wal_status is extended"], |f| {
        slot(f).wal_status = Some("extended".into())
    });
    // the relay may still save what is about to be lost
    let mut facts = good();
    slot(&mut facts).wal_status = Some("unreserved".into());
    assert_eq!(failures(&facts, &config(&[])), []);
}

#[test]
fn standbys_take_the_slot_over() {
    use Level::{Fail, Ok, Warn};
    let name = "postgres.failover";
    check(Warn, name, &["sb follows", "ALTER_REPLICATION_SLOT"], |f| {
        f.server.standby_slots = vec!["sb".into()]
    });
    check(Ok, "", &["standbys take slot"], |f| {
        slot(f).failover = true;
        f.server.standby_slots = vec!["sb".into()];
        set(f, "synchronized_standby_slots", "\"sb\"");
    });
    let parts = ["names gone,", "synchronized_standby_slots = ''"];
    check(Fail, name, &parts, |f| {
        slot(f).failover = true;
        f.server.standby_slots = vec!["sb".into()];
        set(f, "synchronized_standby_slots", "sb, gone");
    });
}

/// No fix drops or moves a slot that somebody else has, or that is in use.
#[test]
fn no_statement_drops_a_slot_that_is_not_free_and_ours() {
    let make: [fn(&mut Slot); 5] = [
        |slot| slot.here = false,
        |slot| slot.plugin = Some("wal2json".into()),
        |slot| slot.slot_type = "physical".into(),
        |slot| slot.temporary = true,
        |slot| slot.active_pid = Some(7),
    ];
    let worsen: [fn(&mut Slot); 3] = [
        |_| {},
        |slot| slot.wal_status = Some("lost".into()),
        |slot| slot.two_phase = true,
    ];
    for make in make {
        for worsen in worsen {
            let mut facts = good();
            make(slot(&mut facts));
            worsen(slot(&mut facts));
            let config = config(&[]);
            let rules = slot::START.iter().chain(&slot::RULES);
            let mut texts: Vec<String> = rules
                .flat_map(|rule| rule(&facts, &config))
                .map(|finding| finding.to_string())
                .collect();
            texts.push(slot::recreate(&facts, &config, "remark"));
            for text in texts {
                for statement in ["pg_drop_replication_slot", "pg_replication_slot_advance"] {
                    assert!(!text.contains(statement), "{text}");
                }
            }
        }
    }
}
