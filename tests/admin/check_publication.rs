//! `check` on the publication: each fault is made in a real database, its fix is applied as printed, and then all is well.

use crate::check_postgres::{check, finding, set_up};
use crate::command::run;
use crate::rig::{Rig, SLOT};
use crate::support::postgres::Postgres;
use serde_json::Value;

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

/// The seed's table in a schema, and a publication of what follows.
fn published(tables: &str, what: &str) -> String {
    format!("{tables}; CREATE PUBLICATION {SLOT} {what} WITH (publish = 'insert')")
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

/// The same of a row that an UPDATE makes pass the row filter; with the fix it is not sent.
#[test]
fn an_update_that_a_row_filter_lets_in_is_not_sent_with_the_fix() {
    if Postgres::major_version() < 15 {
        return;
    }
    let rig = empty();
    clear(&rig);
    rig.pg.execute(&format!(
        "CREATE TABLE outbox (id uuid NOT NULL, aggregatetype text, aggregateid text, payload jsonb, ready bool); \
         ALTER TABLE outbox REPLICA IDENTITY FULL; \
         CREATE PUBLICATION {SLOT} FOR TABLE outbox WHERE (ready) WITH (publish = 'insert, update')"
    ));
    rig.add_slot(SLOT);
    let insert = "INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 'a', '{}', false)";
    let update = "UPDATE outbox SET ready = true WHERE NOT ready";
    rig.pg.execute(insert);
    rig.pg.execute(update);
    rig.drain(&["--hold-back", "0"]);
    assert_eq!(rig.messages().len(), 1);
    let expected = [
        ("postgres.tables", "warn"),
        ("postgres.filter_moves", "warn"),
    ];
    let findings = check(&rig, &[], &expected);
    rig.pg
        .execute(&statements(&findings, "postgres.filter_moves"));
    rig.pg.execute(insert);
    rig.pg.execute(update);
    rig.drain(&["--hold-back", "0"]);
    assert_eq!(rig.messages().len(), 1);
    let expected = [
        ("postgres.tables", "warn"),
        ("postgres.publication_age", "warn"),
    ];
    check(&rig, &[], &expected);
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
