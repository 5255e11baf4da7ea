//! `check` on the publication: each fault is made in a real database, its fix is applied as printed, and then all is well.

use crate::check_postgres::{check, finding, set_up};
use crate::command::run;
use crate::rig::{Rig, SLOT};
use crate::support::postgres::Postgres;
use serde_json::Value;

const TABLE: &str =
    "(id uuid PRIMARY KEY, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb)";

/// A database without an outbox, and what setup makes beside it.
fn empty() -> Rig {
    let rig = set_up(Postgres::builder());
    rig.pg
        .execute(&format!("DROP PUBLICATION {SLOT}; DROP TABLE outbox"));
    rig
}

/// The statements of a fix, as printed.
fn statements(findings: &Value, name: &str) -> String {
    let fix = finding(findings, name)["fix"].as_str().expect("a fix");
    fix.split(" -- ").next().unwrap_or_default().to_string()
}

/// Where a case ends: nothing is there that the next one would meet.
fn clear(rig: &Rig) {
    rig.pg.execute(&format!(
        "DROP PUBLICATION IF EXISTS {SLOT}; DROP SCHEMA IF EXISTS a, b CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA public;
         DROP SERVER IF EXISTS away CASCADE; DROP FOREIGN DATA WRAPPER IF EXISTS none; SELECT pg_drop_replication_slot('{SLOT}')"
    ));
}

/// What is broken, what `check` calls it and says of it; empty: the fix is a flag.
struct Fault {
    sql: String,
    args: &'static [&'static str],
    name: &'static str,
    level: &'static str,
    found: &'static str,
}

impl Fault {
    /// Breaks it, applies the fix as printed, and expects nothing else to be wrong before or after.
    #[track_caller]
    fn is_found_and_fixed(&self, rig: &Rig) {
        rig.pg.execute(&self.sql);
        rig.add_slot(SLOT);
        let findings = check(rig, self.args, &[(self.name, self.level)]);
        let found = finding(&findings, self.name)["found"]
            .as_str()
            .unwrap_or_default();
        assert!(found.contains(self.found), "{found}");
        let fix = statements(&findings, self.name);
        match fix.strip_prefix("-table ") {
            Some(tables) => {
                check(rig, &["-table", tables], &[]);
            }
            None => {
                rig.pg.execute(&fix);
                // what was altered just now is younger than the slot
                rig.pg
                    .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
                rig.add_slot(SLOT);
                check(rig, self.args, &[]);
            }
        }
        clear(rig);
    }
}

fn fault(sql: impl Into<String>, found: &'static str) -> Fault {
    Fault {
        sql: sql.into(),
        args: &[],
        name: "postgres.tables",
        level: "fail",
        found,
    }
}

/// The seed's table in a schema, and a publication of what follows.
fn published(tables: &str, what: &str) -> String {
    format!("{tables}; CREATE PUBLICATION {SLOT} {what} WITH (publish = 'insert')")
}

const PARTED: &str = "CREATE TABLE outbox (id uuid NOT NULL, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb, \
    state text NOT NULL) PARTITION BY RANGE (state); CREATE TABLE outbox_1 PARTITION OF outbox FOR VALUES FROM ('a') TO ('m')";
const SECOND: &str =
    "CREATE TABLE second (LIKE outbox); ALTER TABLE outbox ATTACH PARTITION second DEFAULT";

fn lost_rows() -> Vec<Fault> {
    let outbox = format!("CREATE TABLE outbox {TABLE}");
    let parted = |more: &str| format!("{PARTED}; {more}");
    vec![
        fault(
            format!(
                "{}; ALTER TABLE outbox RENAME TO outbox_old; CREATE TABLE outbox (LIKE outbox_old INCLUDING ALL); DROP TABLE outbox_old",
                published(&outbox, "FOR TABLE outbox")
            ),
            "does not hold public.outbox",
        ),
        fault(
            format!(
                "CREATE SCHEMA a; CREATE SCHEMA b; {}; ALTER TABLE a.outbox SET SCHEMA b",
                published(
                    &format!("CREATE TABLE a.outbox {TABLE}"),
                    "FOR TABLES IN SCHEMA a"
                )
            ),
            "does not hold b.outbox",
        ),
        fault(
            format!(
                "{}; ALTER TABLE outbox SET UNLOGGED",
                published(&outbox, "FOR ALL TABLES")
            ),
            "public.outbox is unlogged",
        ),
        fault(
            format!(
                "{}; ALTER TABLE outbox SET UNLOGGED",
                published(&outbox, "FOR TABLES IN SCHEMA public")
            ),
            "public.outbox is unlogged",
        ),
        fault(
            format!(
                "CREATE UNLOGGED TABLE outbox {TABLE}; CREATE PUBLICATION {SLOT} WITH (publish = 'insert')"
            ),
            "public.outbox is unlogged",
        ),
        fault(
            format!(
                "{}; CREATE TABLE outbox_2027 () INHERITS (outbox)",
                published(&outbox, "FOR TABLE outbox")
            ),
            "does not hold public.outbox_2027, below public.outbox",
        ),
        Fault {
            level: "warn",
            ..fault(
                format!(
                    "{}; {SECOND}",
                    published(&parted("SELECT"), "FOR TABLE outbox_1")
                ),
                "does not hold public.second, below public.outbox",
            )
        },
        Fault {
            args: &["-table", "outbox*"],
            ..fault(
                published(&parted(SECOND), "FOR TABLE outbox"),
                "the partitions of table public.outbox under their own names",
            )
        },
        fault(
            format!(
                "{}; ALTER TABLE second SET UNLOGGED",
                published(&parted(SECOND), "FOR TABLE outbox")
            ),
            "public.second is unlogged",
        ),
        fault(
            format!(
                "{}; CREATE FOREIGN DATA WRAPPER none; CREATE SERVER away FOREIGN DATA WRAPPER none; \
                 CREATE FOREIGN TABLE second PARTITION OF outbox DEFAULT SERVER away",
                published(&parted("SELECT"), "FOR TABLE outbox")
            ),
            "public.second is on another server",
        ),
        Fault {
            args: &["-table", "a.outbox,b.outbox"],
            ..fault(
                format!(
                    "CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE b.outbox {TABLE}; {}",
                    published(
                        &format!("CREATE TABLE a.outbox {TABLE}"),
                        "FOR TABLE a.outbox"
                    )
                ),
                "does not hold b.outbox",
            )
        },
        Fault {
            level: "warn",
            ..fault(
                format!(
                    "CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE b.outbox {TABLE}; {}",
                    published(
                        &format!("CREATE TABLE a.outbox {TABLE}"),
                        "FOR TABLE a.outbox"
                    )
                ),
                "table b.outbox looks like an outbox and is in no publication",
            )
        },
        Fault {
            args: &["-table", "outbox"],
            ..fault(
                format!(
                    "CREATE SCHEMA a; {}; CREATE VIEW outbox AS SELECT * FROM a.events",
                    published(
                        &format!("CREATE TABLE a.events {TABLE}"),
                        "FOR TABLE a.events"
                    )
                ),
                "outbox is a view",
            )
        },
        Fault {
            level: "warn",
            ..fault(
                published(&outbox, "FOR TABLE outbox WHERE (aggregatetype <> 'x')"),
                "row filter for public.outbox",
            )
        },
        fault(
            published(&outbox, "FOR TABLE outbox (id, aggregatetype, aggregateid)"),
            "table public.outbox is published without payload",
        ),
        Fault {
            level: "warn",
            ..fault(
                published(
                    &format!("{outbox}; ALTER TABLE outbox ADD COLUMN headers jsonb"),
                    "FOR TABLE outbox (id, aggregatetype, aggregateid, payload)",
                ),
                "table public.outbox is published without headers",
            )
        },
        fault(
            published("SELECT", "FOR ALL TABLES"),
            "table outbox does not exist",
        ),
    ]
}

#[test]
fn outboxes_whose_rows_do_not_come_are_found_and_fixed() {
    let rig = empty();
    clear(&rig);
    for fault in lost_rows() {
        fault.is_found_and_fixed(&rig);
    }
}

/// A generated column that is not sent, by whatever has been generated, and what is generated then.
#[test]
fn generated_columns_are_found_and_fixed() {
    let table = |kind: &str| {
        format!(
            "CREATE TABLE outbox (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), aggregatetype text NOT NULL, payload jsonb, \
             aggregateid text GENERATED ALWAYS AS (payload->>'id') {kind})"
        )
    };
    let mut faults = vec![published(&table("STORED"), "FOR TABLE outbox")];
    if Postgres::major_version() >= 18 {
        faults.push(published(&table("VIRTUAL"), "FOR TABLE outbox"));
        faults.push(published(
            &table("STORED"),
            "FOR TABLE outbox (id, aggregatetype, payload)",
        ));
    }
    for sql in faults {
        // what a relay remembers would count
        let rig = empty();
        clear(&rig);
        rig.pg.execute(&sql);
        rig.add_slot(SLOT);
        let findings = check(&rig, &[], &[("postgres.tables", "fail")]);
        // the relay says so before it reads a row
        let (code, log) = rig.run(&[]);
        assert_eq!(code, 78, "{log:#?}");
        assert!(
            log.last().is_some_and(|last| last.contains("is generated")),
            "{log:#?}"
        );
        rig.pg.execute(&statements(&findings, "postgres.tables"));
        rig.pg
            .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
        rig.add_slot(SLOT);
        check(&rig, &[], &[]);
        let before = rig.messages().len();
        rig.pg.execute(
            "INSERT INTO outbox (aggregatetype, payload) VALUES ('account', '{\"id\": \"a1\"}')",
        );
        rig.drain(&["--hold-back", "0", "--resume-anyway"]);
        let messages = rig.messages();
        assert_eq!(messages.len(), before + 1);
        assert_eq!(
            messages.last().map(|it| it.subject.as_str()),
            Some("events.account.a1")
        );
    }
}

/// Nothing is lost today: what will surprise later.
#[test]
fn copies_ids_and_partitions_that_rows_leave_are_found_and_fixed() {
    let rig = empty();
    clear(&rig);
    let outbox = format!("CREATE TABLE outbox {TABLE}");
    let warned = |name, sql: String, args, found| Fault {
        sql,
        args,
        name,
        level: "warn",
        found,
    };
    let counted = |kind: &str| {
        format!(
            "CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE a.outbox (id {kind}, aggregatetype text, aggregateid text, payload jsonb); \
             CREATE TABLE b.outbox (id {kind}, aggregatetype text, aggregateid text, payload jsonb)"
        )
    };
    let both: &[&str] = &["-table", "a.outbox,b.outbox"];
    let listed = "CREATE TABLE outbox (id uuid NOT NULL, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb, \
        state text NOT NULL DEFAULT 'new') PARTITION BY LIST (state); CREATE TABLE o1 PARTITION OF outbox FOR VALUES IN ('new'); \
        CREATE TABLE o2 PARTITION OF outbox FOR VALUES IN ('done')";
    for fault in [
        warned(
            "postgres.copies",
            format!(
                "{}; CREATE TABLE outbox_backup AS SELECT * FROM outbox",
                published(&outbox, "FOR ALL TABLES")
            ),
            &[],
            "public.outbox_backup looks like a kept copy",
        ),
        warned(
            "postgres.copies",
            format!(
                "{}; SELECT * INTO before_the_fire FROM outbox",
                published(&outbox, "FOR ALL TABLES")
            ),
            &[],
            "public.before_the_fire looks like a kept copy",
        ),
        warned(
            "postgres.ids",
            published(&counted("bigserial"), "FOR TABLE a.outbox, b.outbox"),
            both,
            "the ids of a.outbox, b.outbox",
        ),
        warned(
            "postgres.ids",
            published(
                &counted("int GENERATED ALWAYS AS IDENTITY"),
                "FOR ALL TABLES",
            ),
            &[],
            "the ids of a.outbox, b.outbox",
        ),
        warned(
            "postgres.partition_moves",
            published(listed, "FOR TABLE outbox"),
            &[],
            "partitioned by LIST (state)",
        ),
    ] {
        fault.is_found_and_fixed(&rig);
    }
}

/// The trap is real: the row comes again, and with the fix the application learns of it instead.
#[test]
fn an_update_that_moves_a_row_is_refused_with_the_fix() {
    let rig = empty();
    clear(&rig);
    rig.pg.execute(&format!(
        "CREATE TABLE outbox (id uuid NOT NULL, aggregatetype text, aggregateid text, payload jsonb, state text) PARTITION BY LIST (state); \
         CREATE TABLE o1 PARTITION OF outbox FOR VALUES IN ('new'); CREATE TABLE o2 PARTITION OF outbox FOR VALUES IN ('done'); \
         CREATE PUBLICATION {SLOT} FOR TABLE outbox WITH (publish = 'insert')"
    ));
    rig.add_slot(SLOT);
    let insert = "INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 'a', '{}', 'new')";
    let delivery = ["--delivery", "at-least-once", "--hold-back", "0"];
    rig.pg.execute(insert);
    rig.pg.execute("UPDATE outbox SET state = 'done'");
    let log = rig.drain(&delivery);
    assert!(
        log.iter()
            .any(|line| line.contains("dropped=1") || line.contains("published=2")),
        "{log:#?}"
    );
    let findings = check(&rig, &[], &[("postgres.partition_moves", "warn")]);
    rig.pg
        .execute(&statements(&findings, "postgres.partition_moves"));
    rig.pg.execute(insert);
    let error = rig
        .pg
        .client()
        .batch_execute("UPDATE outbox SET state = 'done' WHERE state = 'new'")
        .expect_err("a row that moves");
    assert!(error.to_string().contains("db error"), "{error}");
    rig.pg
        .execute("UPDATE outbox SET payload = '{\"a\": 1}'; DELETE FROM outbox");
}

/// What the relay remembers counts for `check` too, and what mends it for both.
#[test]
fn what_a_relay_remembers_is_compared() {
    let rig = set_up(Postgres::builder());
    rig.commit_event(1, "a");
    rig.drain(&["--hold-back", "0"]);
    const CHANGE: &str = "postgres.publication_change";
    let found = finding(&check(&rig, &[], &[]), CHANGE)["found"].clone();
    assert_eq!(
        found,
        "publication jetstream_outbox sends what it sent when the relay last looked"
    );
    rig.pg.execute("ALTER TABLE outbox RENAME TO outbox_old; CREATE TABLE outbox (LIKE outbox_old INCLUDING ALL)");
    let findings = check(&rig, &[], &[("postgres.tables", "fail"), (CHANGE, "fail")]);
    rig.pg.execute(&statements(&findings, "postgres.tables"));
    rig.pg.execute("DROP TABLE outbox_old");
    let findings = check(&rig, &[], &[(CHANGE, "fail")]);
    let fix = finding(&findings, CHANGE)["fix"].to_string();
    assert!(fix.contains("-resume-anyway"), "{fix}");
    rig.commit_event(2, "a");
    rig.drain(&["--hold-back", "0", "--resume-anyway"]);
    check(&rig, &[], &[]);
    assert_eq!(rig.messages().len(), 2);
}

/// A role that may do nothing but replicate reads all of it, also what is in schemas that it may not use.
#[test]
fn a_role_without_privileges_sees_it_all() {
    let rig = set_up(Postgres::builder());
    rig.pg.execute(
        "CREATE ROLE relay LOGIN REPLICATION; CREATE SCHEMA vault; REVOKE ALL ON SCHEMA vault FROM PUBLIC; \
         CREATE TABLE vault.outbox (id bigint GENERATED ALWAYS AS IDENTITY, aggregatetype text, aggregateid text, payload jsonb); \
         CREATE VIEW vault.letters AS SELECT * FROM vault.outbox",
    );
    let db = rig.pg.url("relay", "postgres");
    let nats = rig.nats.url();
    let to = ["-json", "-db", &db, "-nats", &nats];
    let report = run(&[&["check", "-strict"], &to[..]].concat(), &[]).json(1);
    let found = finding(&report["findings"], "postgres.tables")["found"].clone();
    assert_eq!(
        found, "table vault.outbox looks like an outbox and is in no publication",
        "{report:#}"
    );
    let tables = ["check", "-table", "vault.letters,outbox"];
    let report = run(&[&tables, &to[..]].concat(), &[]).json(2);
    let findings = report["findings"].as_array().expect("a list");
    assert!(
        findings.iter().any(
            |it| it["found"] == "vault.letters is a view" && it["fix"] == "-table vault.outbox"
        ),
        "{report:#}"
    );
}
