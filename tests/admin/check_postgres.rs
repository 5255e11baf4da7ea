//! `check` on the Postgres side: each finding, made by really breaking that thing.

use crate::command::{on, run};
use crate::rig::{DEADLINE, Rig, SLOT};
use crate::support::nats::Nats;
use crate::support::postgres::{Builder, Postgres};
use crate::support::wait::eventually;
use serde_json::Value;

/// Expects exactly these findings to be other than ok, and the exit code that follows from them. Gives all of them.
#[track_caller]
pub fn check(rig: &Rig, args: &[&str], expected: &[(&str, &str)]) -> Value {
    let all = [&["check", "--json", "--strict"], args].concat();
    let worst = ["fail", "warn"]
        .into_iter()
        .find(|level| expected.iter().any(|(_, l)| l == level));
    let code = match worst {
        Some("fail") => 2,
        Some(_) => 1,
        None => 0,
    };
    let report = on(rig, &all).json(code);
    assert_eq!(report["level"], worst.unwrap_or("ok"), "{report:#}");
    let findings = report["findings"].as_array().expect("a list");
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_string();
    let bad: Vec<(String, String)> = findings
        .iter()
        .filter(|finding| finding["level"] != "ok")
        .map(|finding| {
            assert!(
                finding["why"].is_string() && finding["fix"].is_string(),
                "{finding}"
            );
            (text(finding, "name"), text(finding, "level"))
        })
        .collect();
    let bad: Vec<(&str, &str)> = bad
        .iter()
        .map(|(name, level)| (name.as_str(), level.as_str()))
        .collect();
    assert_eq!(bad, expected, "{report:#}");
    report["findings"].clone()
}

/// The first finding of that name.
#[track_caller]
pub fn finding<'a>(findings: &'a Value, name: &str) -> &'a Value {
    let mut all = findings.as_array().expect("a list").iter();
    all.find(|finding| finding["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in {findings:#}"))
}

/// What `setup` leaves, on a cluster of the test's own.
pub fn set_up(pg: Builder) -> Rig {
    let rig = Rig {
        pg: pg.build(),
        nats: Nats::start(),
    };
    on(&rig, &["setup"]).with(0);
    rig
}

/// Runs the remedy of a finding, which must be a statement.
#[track_caller]
fn mend(rig: &Rig, findings: &Value, name: &str) {
    let fix = finding(findings, name)["fix"].as_str().expect("a remedy");
    let fix = fix
        .split(" -- ")
        .next()
        .expect("the part before the comment");
    // as psql does: one statement a transaction
    for statement in fix.split_inclusive(';').filter(|sql| sql.ends_with(';')) {
        rig.pg.execute(statement);
    }
}

#[test]
fn what_setup_leaves_is_well_and_stays_so_while_a_relay_runs() {
    let rig = set_up(Postgres::builder());
    let findings = check(&rig, &[], &[]);
    assert!(
        findings.as_array().is_some_and(|all| all.len() >= 25),
        "{findings:#}"
    );
    let relay = rig.relay(&[]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    eventually("the slot to be used", DEADLINE, || rig.pg.slot_active(SLOT));
    let findings = check(&rig, &[], &[]);
    let found = &finding(&findings, "both.history")["found"];
    assert!(
        found
            .as_str()
            .is_some_and(|text| text.contains("last written from this Postgres")),
        "{found}"
    );
    assert!(relay.is_running());
    assert_eq!(rig.messages().len(), 1, "check has stored nothing");
    let text = on(&rig, &["check"]);
    assert!(
        text.with(0)
            .starts_with("ok    postgres.connection          Postgres 1"),
        "{text:?}"
    );
}

#[test]
fn a_server_that_cannot_be_reached_or_lets_nobody_in() {
    let rig = Rig {
        pg: Postgres::builder()
            .hba("host all weak 127.0.0.1/32 scram-sha-256")
            .build(),
        nats: Nats::start(),
    };
    on(&rig, &["setup"]).with(0);
    rig.pg.execute("CREATE ROLE weak LOGIN PASSWORD 'right'");
    let nats = rig.nats.url();
    for (db, part, fix) in [
        (
            "postgres://postgres@127.0.0.1:1/postgres".to_string(),
            "refused",
            "is Postgres up",
        ),
        (
            format!("postgres://weak:wrong@127.0.0.1:{}/postgres", rig.pg.port()),
            "28P01",
            "password",
        ),
        (rig.pg.url("postgres", "none"), "3D000", "database name"),
    ] {
        let ended = run(&["check", "-json", "-db", &db, "-nats", &nats], &[]);
        let report = ended.json(2);
        let found = finding(&report["findings"], "postgres.connection");
        assert_eq!(found["level"], "fail");
        assert!(
            found["found"]
                .as_str()
                .is_some_and(|text| text.contains(part)),
            "{found}"
        );
        assert!(
            found["fix"].as_str().is_some_and(|text| text.contains(fix)),
            "{found}"
        );
        // the other side is told of all the same
        assert_eq!(finding(&report["findings"], "nats.read")["level"], "ok");
        assert!(!ended.stdout.contains("wrong@"), "{ended:?}");
    }
    // no second try helps
    let db = format!("postgres://weak@127.0.0.1:{}/postgres", rig.pg.port());
    let ended = run(&["teardown", "-db", &db], &[]);
    assert!(ended.stderr.contains("none was given"), "{ended:?}");
    ended.with(78);
    let db = format!("postgres://weak:right@127.0.0.1:{}/postgres", rig.pg.port());
    let report = run(&["check", "-json", "-db", &db, "-nats", &nats], &[]).json(2);
    let found = finding(&report["findings"], "postgres.role");
    assert_eq!(found["level"], "fail", "{report:#}");
    assert_eq!(found["fix"], "ALTER ROLE weak REPLICATION;");
    mend(&rig, &report["findings"], "postgres.role");
    run(&["check", "-strict", "-db", &db, "-nats", &nats], &[]).with(0);
}

/// The session is the relay's own: TLS, SCRAM and the host's name in the certificate.
#[test]
fn tls_is_used_or_missed() {
    let made =
        rcgen::generate_simple_self_signed(["127.0.0.1".to_string()]).expect("a certificate");
    let certificate = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(certificate.path(), made.cert.pem()).expect("write the certificate");
    let pg = Postgres::builder()
        .setting("ssl", "on")
        .setting("ssl_cert_file", "server.crt")
        .setting("ssl_key_file", "server.key")
        .file("server.crt", made.cert.pem())
        .file("server.key", made.signing_key.serialize_pem())
        .hba(
            "hostssl all relay 127.0.0.1/32 scram-sha-256\nhostnossl all relay 127.0.0.1/32 reject",
        );
    let rig = set_up(pg);
    rig.pg
        .execute("CREATE ROLE relay LOGIN REPLICATION PASSWORD 'secret'");
    let port = rig.pg.port();
    let path = certificate.path().display();
    let db = format!(
        "postgres://relay@127.0.0.1:{port}/postgres?sslmode=verify-full&sslrootcert={path}&require_auth=scram-sha-256"
    );
    let nats = rig.nats.url();
    let args = ["check", "-json", "-strict", "-db", &db, "-nats", &nats];
    let report = run(&args, &[("PGPASSWORD", "secret")]).json(0);
    let found = finding(&report["findings"], "postgres.tls");
    assert!(
        found["found"]
            .as_str()
            .is_some_and(|text| text.starts_with("TLSv1_3 ")),
        "{found}"
    );
    let args = ["status", "-db", &db, "-nats", &nats];
    run(&args, &[("PGPASSWORD", "secret")]).with(0);

    // an address that is none of the loopback interface, and yet is this machine
    let db = format!("postgres://postgres@0.0.0.0:{port}/postgres?sslmode=disable");
    let report = run(
        &["check", "-json", "-strict", "-db", &db, "-nats", &nats],
        &[],
    )
    .json(1);
    assert_eq!(
        finding(&report["findings"], "postgres.tls")["level"],
        "warn",
        "{report:#}"
    );
}

#[test]
fn the_log_lacks_what_decoding_needs() {
    // from 19 on the first slot raises the level that is in effect
    let too_low = match Postgres::major_version() {
        ..19 => "replica",
        _ => "minimal",
    };
    let mut pg = Postgres::builder().setting("wal_level", too_low);
    if too_low == "minimal" {
        pg = pg.setting("max_wal_senders", "0");
    }
    let rig = Rig {
        pg: pg.build(),
        nats: Nats::start(),
    };
    let ended = on(&rig, &["setup"]);
    assert_eq!(ended.code, 78, "{ended:?}");
    let report = on(&rig, &["check", "-json"]).json(2);
    for name in ["postgres.wal_level", "postgres.slot"] {
        let found = finding(&report["findings"], name);
        assert_eq!(found["level"], "fail", "{report:#}");
    }
    if too_low == "replica" {
        assert!(ended.stderr.contains("wal_level = logical"), "{ended:?}");
        let expected = [("postgres.wal_level", "fail"), ("postgres.slot", "fail")];
        let findings = check(&rig, &[], &expected);
        mend(&rig, &findings, "postgres.wal_level");
        rig.pg.restart();
    } else {
        let rig = set_up(Postgres::builder().setting("wal_level", "replica"));
        check(&rig, &[], &[]);
        rig.commit_event(1, "a");
        rig.drain(&[]);
        assert_eq!(rig.messages().len(), 1);
        return;
    }
    on(&rig, &["setup"]).with(0);
    check(&rig, &[], &[]);
}

#[test]
fn there_is_no_slot_or_walsender_left() {
    let rig = Rig {
        pg: Postgres::builder()
            .setting("max_replication_slots", "1")
            .setting("max_wal_senders", "1")
            .build(),
        nats: Nats::start(),
    };
    rig.add_slot("other");
    let ended = on(&rig, &["setup"]);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(ended.stderr.contains("max_replication_slots"), "{ended:?}");
    let findings = check(
        &rig,
        &[],
        &[("postgres.slots", "fail"), ("postgres.slot", "fail")],
    );
    assert_eq!(
        finding(&findings, "postgres.slots")["found"],
        "1 of 1 replication slots are taken"
    );
    let relay = rig.relay(&["-slot", "other", "-publication", SLOT]);
    eventually("the other relay to run", DEADLINE, || {
        rig.pg.slot_active("other")
    });
    let expected = [
        ("postgres.slots", "fail"),
        ("postgres.walsenders", "fail"),
        ("postgres.slot", "fail"),
    ];
    check(&rig, &[], &expected);
    drop(relay);
}

/// Breaks it by `sql`, expects the finding alone, and runs its remedy.
#[track_caller]
fn break_and_mend(rig: &Rig, sql: &[&str], args: &[&str], name: &str, level: &str) {
    sql.iter().for_each(|sql| rig.pg.execute(sql));
    let findings = check(rig, args, &[(name, level)]);
    mend(rig, &findings, name);
}

/// What was altered just now is younger than what the slot has to send; that is told too, so the slot is made anew.
fn new_slot(rig: &Rig) {
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    rig.add_slot(SLOT);
}

#[test]
fn the_publication_is_not_what_the_relay_needs() {
    let rig = set_up(Postgres::builder());
    let age = ("postgres.publication_age", "warn");
    for (sql, name, level) in [
        (
            &[format!("ALTER PUBLICATION {SLOT} SET (publish = 'update')")][..],
            "postgres.publication",
            "fail",
        ),
        (
            &[format!("ALTER PUBLICATION {SLOT} DROP TABLE outbox")],
            "postgres.tables",
            "fail",
        ),
        (
            &[format!(
                "ALTER PUBLICATION {SLOT} SET TABLE outbox WHERE (aggregatetype <> 'x')"
            )],
            "postgres.tables",
            "warn",
        ),
    ] {
        sql.iter().for_each(|sql| rig.pg.execute(sql));
        new_slot(&rig);
        let findings = check(&rig, &[], &[(name, level)]);
        mend(&rig, &findings, name);
        let fix = finding(&findings, name)["fix"].to_string();
        if fix.contains("publish") {
            // it has been altered later than the slot was made
            check(&rig, &[], &[age]);
        }
        new_slot(&rig);
        check(&rig, &[], &[]);
    }
    rig.pg.execute(&format!(
        "ALTER PUBLICATION {SLOT} SET TABLE outbox (id, aggregatetype, aggregateid)"
    ));
    new_slot(&rig);
    let findings = check(&rig, &[], &[("postgres.tables", "fail")]);
    assert_eq!(
        finding(&findings, "postgres.tables")["found"],
        "table public.outbox is published without payload"
    );
    rig.pg
        .execute(&format!("ALTER PUBLICATION {SLOT} SET TABLE outbox"));
    check(
        &rig,
        &["-table", "shop.outbox"],
        &[("postgres.tables", "fail")],
    );

    rig.pg.execute(&format!("DROP PUBLICATION {SLOT}"));
    break_and_mend(&rig, &[], &[], "postgres.publication", "fail");
    check(&rig, &[], &[]);
}

/// The remedies are run as printed: what they leave is what the flags ask for.
#[test]
fn tables_columns_and_headers_are_looked_for_by_the_mapping() {
    let rig = set_up(Postgres::builder());
    let name = "postgres.tables";
    for flags in [
        &["-header", "tenant"][..],
        &["-subject", "{prefix}.{region}.{aggregateid}"],
        &["-table", "outbox:id=event_id,headers=meta"],
        &["-payload-column", "body"],
    ] {
        let findings = check(&rig, flags, &[(name, "fail")]);
        mend(&rig, &findings, name);
        check(&rig, flags, &[]);
    }
    // a table of another name, which is not there
    let flags = ["-table", "outbox,other:payload=text"];
    let findings = check(&rig, &flags, &[(name, "fail")]);
    assert_eq!(
        finding(&findings, name)["found"],
        "table other does not exist in this database"
    );
    mend(&rig, &findings, name);
    new_slot(&rig);
    check(&rig, &flags, &[]);
    // its column list is taken away, the other table stays
    rig.pg.execute(&format!(
        "ALTER PUBLICATION {SLOT} SET TABLE other, outbox (id, aggregatetype, aggregateid)"
    ));
    new_slot(&rig);
    let findings = check(&rig, &flags, &[(name, "fail")]);
    mend(&rig, &findings, name);
    new_slot(&rig);
    check(&rig, &flags, &[]);

    rig.pg.execute("ALTER TABLE outbox ADD COLUMN headers text");
    mends_with(&rig, &flags, "postgres.headers_column", "warn");
    rig.pg
        .execute(&format!("ALTER PUBLICATION {SLOT} SET TABLE outbox"));
    new_slot(&rig);
    rig.pg.execute("ALTER TABLE outbox ADD COLUMN extra text");
    mends_with(
        &rig,
        &["-table", "outbox", "-headers-column", "extra"],
        "postgres.headers_column",
        "fail",
    );
}

#[track_caller]
fn mends_with(rig: &Rig, flags: &[&str], name: &str, level: &str) {
    let findings = check(rig, flags, &[(name, level)]);
    mend(rig, &findings, name);
    check(rig, flags, &[]);
}

#[test]
fn partitions_are_published_under_their_own_names() {
    let rig = set_up(Postgres::builder());
    rig.pg.execute(&format!(
        "CREATE TABLE parted (LIKE outbox) PARTITION BY LIST (aggregatetype); \
         CREATE TABLE parted_a PARTITION OF parted FOR VALUES IN ('account'); ALTER PUBLICATION {SLOT} SET TABLE parted"
    ));
    new_slot(&rig);
    let flags = ["-table", "parted"];
    let findings = check(&rig, &flags, &[("postgres.tables", "fail")]);
    mend(&rig, &findings, "postgres.tables");
    new_slot(&rig);
    check(&rig, &flags, &[]);
}

/// Postgres hands messages over in the database's encoding.
#[test]
fn messages_of_a_database_that_is_not_utf8() {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::start(),
    };
    rig.pg
        .execute("CREATE DATABASE old ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
    let (db, nats) = (rig.pg.url("postgres", "old"), rig.nats.url());
    let at = ["-db", &db, "-nats", &nats];
    run(&[&["setup"], &at[..]].concat(), &[]).with(0);
    let report = run(&[&["check", "-json", "-strict"], &at[..]].concat(), &[]).json(1);
    let found = finding(&report["findings"], "postgres.messages");
    assert_eq!(found["level"], "warn", "{found}");
    assert_eq!(found["found"], "the database's encoding is LATIN1");
    run(
        &[&["check", "-strict", "-no-messages"], &at[..]].concat(),
        &[],
    )
    .with(0);
}

/// The trap is real: the application's own DELETE fails.
#[test]
fn the_application_cannot_delete() {
    let rig = set_up(Postgres::builder());
    rig.pg
        .execute("ALTER TABLE outbox DROP CONSTRAINT outbox_pkey");
    check(&rig, &[], &[]);
    rig.pg.execute(&format!(
        "ALTER PUBLICATION {SLOT} SET (publish = 'insert, delete')"
    ));
    new_slot(&rig);
    rig.commit_event(1, "a");
    let delete = || rig.pg.client().batch_execute("DELETE FROM outbox");
    let error = delete().expect_err("no replica identity");
    assert_eq!(
        error.code().map(|code| code.code()),
        Some("55000"),
        "{error:?}"
    );
    let findings = check(&rig, &[], &[("postgres.replica_identity", "fail")]);
    mend(&rig, &findings, "postgres.replica_identity");
    delete().expect("the remedy helps");
    new_slot(&rig);
    check(&rig, &[], &[]);
}

/// The relay cannot decode what was written before there was a publication, or leaves it out.
#[test]
fn the_publication_is_younger_than_the_slot() {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::start(),
    };
    rig.add_slot(SLOT);
    on(&rig, &["setup"]).with(78);
    let findings = check(&rig, &[], &[("postgres.publication_age", "warn")]);
    // no statement, as what the slot holds may be of use
    let fix = finding(&findings, "postgres.publication_age")["fix"].to_string();
    assert!(
        fix.contains("start the relay") && !fix.contains("slot("),
        "{fix}"
    );
    // one that holds back as much hides it
    rig.add_slot("another");
    check(&rig, &[], &[]);
    rig.pg.execute("SELECT pg_drop_replication_slot('another')");
    new_slot(&rig);
    check(&rig, &[], &[]);
}

#[test]
fn the_slot_is_not_what_the_relay_needs() {
    let rig = set_up(Postgres::builder());
    let drop_slot = format!("SELECT pg_drop_replication_slot('{SLOT}')");
    break_and_mend(&rig, &[&drop_slot], &[], "postgres.slot", "fail");
    check(&rig, &[], &[]);
    let logical = format!("SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')");
    let decoding = format!("SELECT pg_create_logical_replication_slot('{SLOT}', 'test_decoding')");
    let physical = format!("SELECT pg_create_physical_replication_slot('{SLOT}')");
    for (db, slot, found) in [
        ("postgres", &decoding, "is of plugin test_decoding"),
        ("postgres", &physical, "is physical"),
        ("elsewhere", &logical, "belongs to database elsewhere"),
    ] {
        let rig = set_up(Postgres::builder());
        rig.pg.execute("CREATE DATABASE elsewhere");
        rig.pg.execute(&drop_slot);
        let mut client = rig.pg.client_of(db).expect("the database");
        client.batch_execute(slot).expect("a slot there");
        let findings = check(&rig, &[], &[("postgres.slot", "fail")]);
        let found = format!("slot {SLOT} {found}");
        assert_eq!(finding(&findings, "postgres.slot")["found"], found);
        take_another_slot(&rig, &findings);
        let kept = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        assert_eq!(rig.pg.scalar::<i64>(&kept), Some(1), "it is another's");
    }
}

/// Does what the fix says: another slot for every command, which then is well.
#[track_caller]
fn take_another_slot(rig: &Rig, findings: &Value) {
    let fix = finding(findings, "postgres.slot")["fix"]
        .as_str()
        .expect("a fix");
    let (_, command) = fix
        .split_once("jetstream-outbox setup ")
        .expect("a command");
    let command = command.split(';').next().expect("the command alone");
    let flags: Vec<&str> = command.split(' ').collect();
    let setup = [&["setup"], &flags[..]].concat();
    // the name of the slot is also the prefix of messages, and so in the function; setup prints what changes that
    let text = on(rig, &setup);
    let (_, function) = text.with(78).split_once("stay:\n").expect("a statement");
    let (function, _) = function.split_once("$$;").expect("its end");
    rig.pg.execute(&format!("{function}$$;"));
    on(rig, &setup).with(0);
    // a warning may be left: the other slot keeps the new one's catalog_xmin older than the publication
    on(rig, &[&["check"], &flags[..]].concat()).with(0);
}

#[test]
fn the_slot_holds_too_much_and_then_has_lost_it() {
    let rig = set_up(Postgres::builder().setting("max_slot_wal_keep_size", "48MB"));
    // one log file of 16 MB each
    let write = |files: u32| {
        for _ in 0..files {
            rig.pg
                .execute("SELECT pg_logical_emit_message(false, 'x', 'x'); SELECT pg_switch_wal()");
        }
    };
    write(2);
    check(&rig, &[], &[("postgres.retained_log", "warn")]);
    write(4);
    check(
        &rig,
        &[],
        &[
            ("postgres.slot_log", "fail"),
            ("postgres.retained_log", "warn"),
        ],
    );
    rig.pg.execute("CHECKPOINT");
    let findings = check(&rig, &[], &[("postgres.slot_log", "fail")]);
    // from 17 on Postgres gives a reason
    let found = finding(&findings, "postgres.slot_log")["found"].to_string();
    assert!(found.contains("has invalidated slot"), "{found}");
    assert!(
        found.contains("more than max_slot_wal_keep_size"),
        "{found}"
    );
    mend(&rig, &findings, "postgres.slot_log");
    check(&rig, &[], &[]);
}

/// The server is on this machine, so its disk can be looked at; none is as large as what this slot may take.
#[test]
fn the_disk_is_smaller_than_what_the_slot_may_take() {
    let rig = set_up(Postgres::builder());
    let findings = check(&rig, &[], &[]);
    let found = finding(&findings, "postgres.disk")["found"].to_string();
    let folder = rig.pg.data_dir().join("pg_wal");
    let end = format!(" are free at {}\"", folder.display());
    assert!(found.ends_with(&end), "{found}");
    let found = finding(&findings, "postgres.retained_log")["found"].to_string();
    assert!(found.contains("nothing but the disk bounds it"), "{found}");

    rig.pg
        .execute("ALTER SYSTEM SET max_slot_wal_keep_size = '2000TB'");
    rig.pg.execute("SELECT pg_reload_conf()");
    let setting = || rig.pg.scalar::<String>("SHOW max_slot_wal_keep_size");
    eventually("the setting to be read", DEADLINE, || {
        setting().as_deref() == Some("2000TB")
    });
    let findings = check(&rig, &[], &[("postgres.disk", "warn")]);
    mend(&rig, &findings, "postgres.disk");
    eventually("the setting to be read", DEADLINE, || {
        setting().as_deref() != Some("2000TB")
    });
    check(&rig, &[], &[]);

    // a role that may not know where the data are is told nothing of them, nor is one that comes from elsewhere
    rig.pg.execute("CREATE ROLE plain LOGIN REPLICATION");
    let away = format!("postgres://postgres@0.0.0.0:{}/postgres", rig.pg.port());
    let nats = rig.nats.url();
    for db in [rig.pg.url("plain", "postgres"), away] {
        let report = run(&["check", "-json", "-db", &db, "-nats", &nats], &[]).json(0);
        assert!(!report.to_string().contains("postgres.disk"), "{report:#}");
    }
}

#[test]
fn the_server_is_a_standby() {
    let primary = set_up(Postgres::builder());
    let rig = Rig {
        pg: Postgres::builder().build_standby_of(&primary.pg, "sb"),
        nats: primary.nats,
    };
    let report = on(&rig, &["check", "--json"]).json(2);
    let found = finding(&report["findings"], "postgres.primary");
    assert_eq!(found["found"], "the server is a standby", "{report:#}");
    let slots_on_standbys = rig
        .pg
        .scalar::<bool>("SELECT current_setting('server_version_num')::int >= 160000");
    let level = if slots_on_standbys == Some(true) {
        "warn"
    } else {
        "fail"
    };
    assert_eq!(found["level"], level);
    assert_eq!(
        finding(&report["findings"], "postgres.slot")["level"],
        "fail"
    );
}

/// A relay that is away for the timeout loses its slot.
#[test]
#[ignore = "needs Postgres 18: scripts/test --matrix"]
fn an_idle_slot_is_given_up() {
    let rig = set_up(Postgres::builder());
    rig.pg
        .execute("ALTER SYSTEM SET idle_replication_slot_timeout = '1s'");
    rig.pg.execute("SELECT pg_reload_conf()");
    let setting = || {
        rig.pg
            .scalar::<String>("SHOW idle_replication_slot_timeout")
    };
    eventually("the setting to be read", DEADLINE, || {
        setting().as_deref() == Some("1s")
    });
    check(&rig, &[], &[("postgres.idle_timeout", "warn")]);
    // the slot is looked at when a checkpoint is made
    let reason = "SELECT invalidation_reason FROM pg_replication_slots WHERE invalidation_reason IS NOT NULL";
    eventually("the slot to be given up", DEADLINE, || {
        rig.pg.execute("CHECKPOINT");
        rig.pg.scalar::<String>(reason)
    });
    check(
        &rig,
        &[],
        &[
            ("postgres.idle_timeout", "warn"),
            ("postgres.slot_log", "fail"),
        ],
    );
}

#[test]
#[ignore = "needs Postgres 17 or later: scripts/test --matrix"]
fn standbys_do_not_take_the_slot_over_or_hold_it_up() {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::start(),
    };
    on(&rig, &["setup", "-failover"]).with(0);
    let failover = "SELECT failover FROM pg_replication_slots";
    assert_eq!(rig.pg.scalar::<bool>(failover), Some(true));
    check(&rig, &[], &[]);
    rig.pg
        .execute("ALTER SYSTEM SET synchronized_standby_slots = 'gone'");
    rig.pg.execute("SELECT pg_reload_conf()");
    let setting = || rig.pg.scalar::<String>("SHOW synchronized_standby_slots");
    let reads = |value: &str| {
        eventually("the setting to be read", DEADLINE, || {
            setting().as_deref() == Some(value)
        })
    };
    reads("gone");
    let findings = check(&rig, &[], &[("postgres.failover", "fail")]);
    mend(&rig, &findings, "postgres.failover");
    reads("");
    check(&rig, &[], &[]);

    new_slot(&rig);
    let ended = on(&rig, &["setup", "-failover"]);
    assert!(
        ended.with(78).contains("standbys do not take it over"),
        "{ended:?}"
    );
    check(&rig, &[], &[]);
    let standby = Postgres::builder().build_standby_of(&rig.pg, "sb");
    eventually("the standby to follow", DEADLINE, || {
        rig.pg.slot_active("sb")
    });
    check(&rig, &[], &[("postgres.failover", "warn")]);
    drop(standby);
}
