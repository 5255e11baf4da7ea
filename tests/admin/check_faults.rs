//! A server with many faults: `check` names each, and the fix that it prints, applied as printed, makes it pass.
//!
//! To add a fault, add a line to [`FAULTS`].

use crate::check_postgres::set_up;
use crate::command::on;
use crate::rig::{DEADLINE, Rig, SLOT};
use crate::support::postgres::Postgres;
use crate::support::wait::eventually;
use jetstream_outbox::postgres::{ConnInfo, Connection};
use serde_json::Value;

/// One fault.
struct Fault {
    /// The findings that name it, and how bad they are.
    findings: &'static [(&'static str, &'static str)],
    /// What makes it, on a server that `setup` has prepared: one statement a transaction.
    sql: &'static [&'static str],
    /// From this version on.
    since: u32,
    /// It can be there together with the others that say so.
    together: bool,
}

const DROP_SLOT: &str = "SELECT pg_drop_replication_slot('jetstream_outbox')";

const FAULTS: &[Fault] = &[
    Fault {
        findings: &[("postgres.slot", "fail")],
        sql: &[DROP_SLOT],
        since: 12,
        together: false,
    },
    Fault {
        findings: &[("postgres.slot", "fail")],
        sql: &[
            DROP_SLOT,
            "SELECT pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput', false, true)",
        ],
        since: 14,
        together: true,
    },
    Fault {
        findings: &[
            ("postgres.open_transactions", "warn"),
            ("postgres.slot", "fail"),
        ],
        sql: &[
            DROP_SLOT,
            "BEGIN; INSERT INTO outbox VALUES (gen_random_uuid(), 'a', 'b', '{}'); PREPARE TRANSACTION 'it''s'",
        ],
        since: 13,
        together: false,
    },
    // the slot has a row to send of a time when there was no publication
    Fault {
        findings: &[("postgres.start", "fail")],
        sql: &[
            "DROP PUBLICATION jetstream_outbox",
            "INSERT INTO outbox VALUES (gen_random_uuid(), 'a', 'b', '{}')",
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ],
        since: 13,
        together: false,
    },
    Fault {
        findings: &[("postgres.wal_sender_timeout", "warn")],
        sql: &[
            "ALTER SYSTEM SET wal_sender_timeout = 0",
            "SELECT pg_reload_conf()",
        ],
        since: 12,
        together: true,
    },
    Fault {
        findings: &[("postgres.synchronous_standby", "warn")],
        sql: &[
            "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'",
            "SELECT pg_reload_conf()",
        ],
        since: 12,
        together: true,
    },
    Fault {
        findings: &[("postgres.synchronous_standby", "warn")],
        sql: &[
            "ALTER SYSTEM SET synchronous_standby_names = 'db2, \"Jetstream-Outbox 0.1.0\"'",
            "SELECT pg_reload_conf()",
        ],
        since: 12,
        together: false,
    },
    Fault {
        findings: &[("postgres.idle_timeout", "warn")],
        sql: &[
            "ALTER SYSTEM SET idle_replication_slot_timeout = '1h'",
            "SELECT pg_reload_conf()",
        ],
        since: 18,
        together: true,
    },
    Fault {
        findings: &[("postgres.publication", "fail")],
        sql: &["ALTER PUBLICATION jetstream_outbox SET (publish = 'update')"],
        since: 12,
        together: true,
    },
    Fault {
        findings: &[("postgres.tables", "fail")],
        sql: &["ALTER PUBLICATION jetstream_outbox DROP TABLE outbox"],
        since: 12,
        together: true,
    },
    Fault {
        findings: &[("postgres.tables", "warn")],
        sql: &["ALTER PUBLICATION jetstream_outbox SET TABLE outbox WHERE (aggregatetype <> 'x')"],
        since: 15,
        together: false,
    },
    Fault {
        findings: &[("postgres.replica_identity", "fail")],
        sql: &[
            "ALTER TABLE outbox REPLICA IDENTITY NOTHING",
            "ALTER PUBLICATION jetstream_outbox SET (publish = 'insert, delete')",
        ],
        since: 12,
        together: false,
    },
    Fault {
        findings: &[("postgres.headers_column", "warn")],
        sql: &["ALTER TABLE outbox ADD COLUMN headers text"],
        since: 12,
        together: false,
    },
];

/// What comes of altering the publication and passes by itself, and how full the machine's disk is.
const NOT_OURS: [&str; 2] = ["postgres.publication_age", "postgres.disk"];

/// A server as `setup` leaves it, on which a commit never waits for a standby that is not there.
fn rig() -> Rig {
    set_up(
        Postgres::builder()
            .setting("synchronous_commit", "local")
            .setting("max_prepared_transactions", "5"),
    )
}

/// The findings that are not ok.
fn bad(rig: &Rig) -> Vec<Value> {
    let ended = on(rig, &["check", "-json"]);
    let report: Value = serde_json::from_str(&ended.stdout).expect("a report");
    let findings = report["findings"].as_array().expect("a list").clone();
    let is_ours = |finding: &Value| NOT_OURS.iter().all(|name| finding["name"] != *name);
    let is_bad = |finding: &Value| finding["level"] != "ok" && is_ours(finding);
    findings.into_iter().filter(is_bad).collect()
}

fn names(findings: &[Value]) -> Vec<(&str, &str)> {
    findings
        .iter()
        .filter_map(|finding| Some((finding["name"].as_str()?, finding["level"].as_str()?)))
        .collect()
}

/// Runs what the fix says, as an operator would paste it: everything before the comment, a statement at a time.
#[track_caller]
pub fn apply(rig: &Rig, finding: &Value) {
    let fix = finding["fix"].as_str().expect("a fix");
    let statements = fix
        .split(" -- ")
        .next()
        .expect("the part before the comment");
    for statement in statements.split_inclusive(';') {
        let statement = statement.trim();
        assert!(statement.ends_with(';'), "{statement:?} of {fix}");
        match statement.starts_with("ALTER_REPLICATION_SLOT") {
            true => replication_command(rig, statement),
            false => rig.pg.execute(statement),
        }
    }
}

/// Those of the replication protocol need a connection of its kind.
fn replication_command(rig: &Rig, statement: &str) {
    let url = rig.pg.url("postgres", "postgres");
    let info = ConnInfo::parse(&url, &|_| None).expect("a connection string");
    let mut connection = Connection::connect(&info).expect("a replication connection");
    connection.simple_query(statement).expect("the command");
}

fn applies(fault: &&Fault) -> bool {
    fault.since <= Postgres::major_version()
}

#[test]
fn each_fault_is_named_and_its_fix_makes_check_pass() {
    let rig = rig();
    for fault in FAULTS.iter().filter(applies) {
        fault.sql.iter().for_each(|sql| rig.pg.execute(sql));
        let mut found = Vec::new();
        // a setting is read some time after the reload
        eventually(&format!("{:?}", fault.findings), DEADLINE, || {
            found = bad(&rig);
            match names(&found) == fault.findings {
                true => Ok(()),
                false => Err(found.clone()),
            }
        });
        found.iter().for_each(|finding| apply(&rig, finding));
        eventually(
            &format!("{:?} to be fixed", fault.findings),
            DEADLINE,
            || {
                let left = bad(&rig);
                left.is_empty().then_some(()).ok_or(left)
            },
        );
    }
}

#[test]
fn all_faults_together_are_all_named() {
    let rig = rig();
    let faults: Vec<&Fault> = FAULTS
        .iter()
        .filter(applies)
        .filter(|fault| fault.together)
        .collect();
    for fault in &faults {
        fault.sql.iter().for_each(|sql| rig.pg.execute(sql));
    }
    let expected = faults.iter().flat_map(|fault| fault.findings);
    let mut expected: Vec<(&str, &str)> = expected.copied().collect();
    expected.sort_unstable();
    let mut found = Vec::new();
    eventually("all of them", DEADLINE, || {
        found = bad(&rig);
        let mut named = names(&found);
        named.sort_unstable();
        (named == expected).then_some(()).ok_or(found.clone())
    });
    // the relay says the same of what keeps it from starting
    let (code, log) = rig.run(&[]);
    let last = log.last().expect("a reason").clone();
    assert_eq!(code, 78, "{last}");
    let slot = found.iter().find(|it| it["name"] == "postgres.slot");
    if let Some(slot) = slot {
        for part in ["found", "why", "fix"] {
            let part = slot[part].as_str().expect("a text");
            assert!(last.contains(part), "{part:?} is not in {last}");
        }
    }
    found.iter().for_each(|finding| apply(&rig, finding));
    eventually("all to be fixed", DEADLINE, || {
        let left = bad(&rig);
        left.is_empty().then_some(()).ok_or(left)
    });
    rig.commit_event(1, "a");
    rig.drain(&[]);
    assert_eq!(rig.messages().len(), 1, "{SLOT}");
}
