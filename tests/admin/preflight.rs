//! What `check`, `setup` and the relay's start make of servers that are not ours: managed ones without a superuser, poolers
//! on the way, and transactions that hold a new slot up.

use crate::check_postgres::{finding, set_up};
use crate::command::{Ended, on, run};
use crate::rig::{DEADLINE, Rig, SLOT};
use crate::support::files::temp_dir;
use crate::support::nats::Nats;
use crate::support::ports::free_port;
use crate::support::postgres::{Postgres, as_server};
use crate::support::process::Process;
use crate::support::wait::eventually;
use jetstream_outbox::postgres::{ConnInfo, Connection};
use jetstream_outbox::relay::preflight;
use serde_json::Value;
use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Runs a command as this role, in this database.
#[track_caller]
fn as_role(rig: &Rig, role: &str, db: &str, args: &[&str]) -> Ended {
    let db = rig.pg.url(role, db);
    let nats = rig.nats.url();
    let servers = ["-db", &db, "-nats", &nats];
    run(&[args, &servers].concat(), &[])
}

fn bare(pg: Postgres) -> Rig {
    Rig {
        pg,
        nats: Nats::start(),
    }
}

/// On a managed server nobody is a superuser: the owner of the database may create and replicate, and no more.
#[test]
fn a_database_owner_runs_every_command_again_and_again() {
    let rig = bare(Postgres::start());
    rig.pg
        .execute("CREATE ROLE owner LOGIN REPLICATION CREATEDB; CREATE ROLE secretive");
    rig.pg.execute("CREATE DATABASE shop OWNER owner");
    let mut shop = rig.pg.client_of("shop").expect("the database");
    // a schema that the owner may not use, with a table of the name that is looked for
    shop.batch_execute(
        "CREATE SCHEMA secret AUTHORIZATION secretive; CREATE TABLE secret.outbox (id uuid); \
         REVOKE ALL ON SCHEMA secret FROM PUBLIC; CREATE PUBLICATION others FOR ALL TABLES; \
         CREATE TABLE toasted (t text); INSERT INTO toasted SELECT repeat(n::text, 100000) FROM generate_series(1, 10) n",
    )
    .expect("tables of others");
    let owner = |args: &[&str]| as_role(&rig, "owner", "shop", args);
    owner(&["setup"]).with(0);
    // also when the planner has other statistics of the catalog
    for round in 0..2 {
        let text = owner(&["setup"]);
        let text = text.with(0);
        let created = text.lines().find(|line| !line.starts_with("found "));
        assert_eq!(created, None, "round {round}");
        owner(&["check", "-strict"]).with(0);
        owner(&["status"]).with(0);
        shop.batch_execute("VACUUM ANALYZE").expect("statistics");
    }
    // a name in a schema that it may not use is a difference, not an error
    let ended = owner(&["setup", "-table", "secret.outbox"]);
    assert!(
        ended
            .with(78)
            .contains("differs  table secret.outbox: it has no column"),
        "{ended:?}"
    );
    owner(&["teardown", "-yes"]).with(0);
}

/// The roles by which providers let their customers replicate, made in a real server.
#[test]
fn the_roles_of_managed_servers() {
    for (groups, member_of, fix) in [
        (
            &["rds_superuser", "rds_replication"][..],
            &["rds_replication"][..],
            "GRANT rds_replication TO svc;",
        ),
        (&["cloudsqlsuperuser"], &[], "ALTER ROLE svc REPLICATION;"),
        (&["alloydbsuperuser"], &[], "ALTER ROLE svc REPLICATION;"),
        (&["azure_pg_admin"], &[], "ALTER ROLE svc REPLICATION;"),
        (&["neon_superuser"], &[], "ALTER ROLE svc REPLICATION;"),
        (&["supabase_admin"], &[], "ALTER ROLE svc REPLICATION;"),
    ] {
        let rig = set_up(Postgres::builder());
        rig.pg.execute("CREATE ROLE svc LOGIN");
        for group in groups {
            rig.pg.execute(&format!("CREATE ROLE {group}"));
        }
        let check = || {
            let ended = as_role(&rig, "svc", "postgres", &["check", "-json"]);
            let report: Value = serde_json::from_str(&ended.stdout).expect("a report");
            finding(&report["findings"], "postgres.role").clone()
        };
        let found = check();
        assert_eq!(found["level"], "fail", "{groups:?}");
        assert_eq!(found["fix"], fix, "{groups:?}");
        rig.pg.execute(fix);
        let facts = facts(&rig, "svc");
        assert_eq!(facts.server.role.member_of, member_of, "{groups:?}");
        assert_eq!(facts.server.markers, groups[..1], "{groups:?}");
        if !member_of.is_empty() {
            // this server is none of that provider's, and lets no member in: what it does counts
            let found = check();
            assert_eq!(found["level"], "fail");
            assert_eq!(found["fix"], "ALTER ROLE svc REPLICATION;");
            rig.pg.execute("ALTER ROLE svc REPLICATION");
        }
        assert_eq!(check()["level"], "ok", "{groups:?}");
        as_role(&rig, "svc", "postgres", &["check", "-strict"]).with(0);
        // settings are changed in the provider's way
        rig.pg.execute("ALTER SYSTEM SET wal_sender_timeout = 0");
        rig.pg.execute("SELECT pg_reload_conf()");
        let fix = eventually("the setting to be read", DEADLINE, || {
            let ended = as_role(&rig, "svc", "postgres", &["check", "-json"]);
            let report: Value = serde_json::from_str(&ended.stdout).expect("a report");
            let found = finding(&report["findings"], "postgres.wal_sender_timeout");
            found["fix"].as_str().map(str::to_string)
        });
        assert!(!fix.contains("ALTER SYSTEM"), "{fix}");
    }
}

/// The facts as a role reads them that may not replicate.
#[track_caller]
fn facts(rig: &Rig, role: &str) -> preflight::Facts {
    let info =
        ConnInfo::parse(&rig.pg.url(role, "postgres"), &|_| None).expect("a connection string");
    let mut connection = Connection::connect(&info.without_replication()).expect("a connection");
    let args = ["-db", "host=h"].map(std::ffi::OsString::from);
    let parsed = jetstream_outbox::cli::parse(args);
    let Ok(jetstream_outbox::cli::Invocation::Relay(cli)) = parsed else {
        panic!("the flags do not parse");
    };
    let config = jetstream_outbox::config::Config::load(&cli, &|_| None).expect("a configuration");
    preflight::read(&mut connection, &config).expect("the facts")
}

/// A slot waits for whoever has written something; whose transaction it is, and what ends it, is told.
#[test]
fn what_holds_the_slot_s_creation_up_is_named() {
    let rig = bare(
        Postgres::builder()
            .setting("max_prepared_transactions", "5")
            .build(),
    );
    rig.pg
        .execute("CREATE ROLE owner LOGIN REPLICATION CREATEDB");
    rig.pg.execute("CREATE DATABASE other");
    rig.pg.execute("CREATE DATABASE shop OWNER owner");
    let mut other = rig.pg.client_of("other").expect("the database");
    other
        .batch_execute("CREATE TABLE t (n int)")
        .expect("a table");
    other
        .batch_execute("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'a''b'")
        .expect("a prepared transaction");
    let mut open = rig.pg.client_of("other").expect("the database");
    open.batch_execute("SET application_name = 'report'; BEGIN; INSERT INTO t VALUES (2)")
        .expect("an open transaction");
    let pid: i32 = open
        .query_one("SELECT pg_backend_pid()", &[])
        .expect("its process")
        .get(0);
    // also to a role that may not see the activity of others
    for role in ["owner", "postgres"] {
        let ended = as_role(&rig, role, "shop", &["setup"]);
        assert_eq!(ended.code, 78, "{ended:?}");
        for part in [
            "prepared transaction 'a''b', database other",
            "COMMIT PREPARED 'a''b';",
            &format!(
                "the transaction of server process {pid}, database other, role postgres, application report"
            ),
            &format!("SELECT pg_terminate_backend({pid});"),
        ] {
            assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
        }
    }
    rig.pg
        .execute(&format!("SELECT pg_terminate_backend({pid})"));
    other
        .batch_execute("COMMIT PREPARED 'a''b'")
        .expect("what setup printed");
    as_role(&rig, "owner", "shop", &["setup"]).with(0);
    as_role(&rig, "owner", "shop", &["check", "-strict"]).with(0);
}

/// PgBouncer: `PGBOUNCER_BIN`, or Debian's.
fn pgbouncer() -> Option<PathBuf> {
    let given = std::env::var_os("PGBOUNCER_BIN").map(PathBuf::from);
    let all = given
        .into_iter()
        .chain([PathBuf::from("/usr/sbin/pgbouncer")]);
    all.into_iter().find(|path| path.exists())
}

/// Through a pooler plain SQL works, and replication does not.
#[test]
fn a_pooler_on_the_way_is_named() {
    let Some(program) = pgbouncer() else {
        eprintln!("skipped: there is no PgBouncer (PGBOUNCER_BIN, Debian's pgbouncer)");
        return;
    };
    let rig = set_up(Postgres::builder());
    let version = Command::new(&program)
        .arg("--version")
        .output()
        .expect("its version");
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let minor: u32 = version
        .split_whitespace()
        .nth(1)
        .and_then(|version| version.split('.').nth(1)?.parse().ok())
        .unwrap_or_else(|| panic!("{version}"));
    // from 1.23 on it passes replication on, unless it is told to ignore what asks for it
    for ignores in [false, true] {
        let port = free_port();
        let folder = temp_dir("pgbouncer-");
        let file = folder.path().join("pgbouncer.ini");
        let ignored = if ignores {
            "replication, extra_float_digits"
        } else {
            "extra_float_digits"
        };
        fs::write(
            &file,
            format!(
                "[databases]\npostgres = user=postgres host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
                 auth_type = any\npool_mode = session\nunix_socket_dir =\nignore_startup_parameters = {ignored}\n",
                rig.pg.port()
            ),
        )
        .expect("its configuration");
        let mut command = Command::new(&program);
        command
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        as_server(&mut command, folder.path());
        let pooler = Process::spawn("PgBouncer", &mut command);
        eventually("PgBouncer to listen", DEADLINE, || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        let db = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        let nats = rig.nats.url();
        let report = run(&["check", "-json", "-db", &db, "-nats", &nats], &[]);
        if minor >= 23 && !ignores {
            report.json(0);
            continue;
        }
        let report = report.json(2);
        let found = finding(&report["findings"], "postgres.replication");
        assert_eq!(found["level"], "fail", "{report:#}");
        let fix = found["fix"].as_str().expect("a fix");
        assert!(fix.contains("connection pooler"), "{found}");
        assert_eq!(finding(&report["findings"], "postgres.role")["level"], "ok");
        // and the relay does not try for ever
        let ended = run(&["-db", &db, "-nats", &nats], &[]);
        assert_eq!(ended.code, 78, "{ended:?}");
        assert!(ended.stderr.contains("connection pooler"), "{ended:?}");
        drop(pooler);
    }
    // what the fix says
    on(&rig, &["check", "-strict"]).with(0);
}

/// The copy of a slot by which the fix does without two_phase is at the same place: a transaction that was prepared before
/// it, and committed after it, is published once, and so are all others.
#[test]
fn a_two_phase_slot_is_mended_without_loss() {
    if Postgres::major_version() < 14 {
        eprintln!("skipped: two_phase came with Postgres 14");
        return;
    }
    let rig = set_up(Postgres::builder().setting("max_prepared_transactions", "5"));
    rig.commit_event(1, "a");
    rig.drain(&["--hold-back", "0"]);
    rig.commit_event(2, "a");
    rig.pg.execute(
        "BEGIN; INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 'prepared', '{}'); PREPARE TRANSACTION 'p'",
    );
    // as another program may have made it: the copy has two_phase, at the same position
    let sql = format!("SELECT pg_drop_replication_slot('{SLOT}')");
    rig.pg.execute(&sql);
    rig.pg.execute("COMMIT PREPARED 'p'");
    rig.pg.execute(&format!(
        "SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput', false, true)"
    ));
    rig.commit_event(3, "a");
    rig.pg.execute(
        "BEGIN; INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 'late', '{}'); PREPARE TRANSACTION 'q'",
    );
    rig.commit_event(4, "a");
    let (code, log) = rig.run(&[]);
    let last = log.last().expect("a reason");
    assert_eq!(code, 78, "{last}");
    assert!(last.contains("two_phase"), "{last}");
    let report = on(&rig, &["check", "-json"]).json(2);
    let found = finding(&report["findings"], "postgres.slot");
    let fix = found["fix"]
        .as_str()
        .and_then(|fix| fix.split(" -- ").next());
    crate::check_faults::apply(&rig, "postgres", fix.expect("a fix"));
    rig.pg.execute("COMMIT PREPARED 'q'");
    // the slot is another than the relay has left
    rig.drain(&["--resume-anyway"]);
    let subjects = rig.subjects();
    let expected = ["a", "a", "a", "late"].map(|id| format!("events.account.{id}"));
    assert_eq!(subjects, expected);
}

/// Neither printed nor done: no command drops a slot that is another's.
#[test]
fn teardown_leaves_the_slots_of_others() {
    let rig = bare(Postgres::start());
    rig.pg.execute("CREATE DATABASE elsewhere");
    for (db, create, part) in [
        (
            "postgres",
            "pg_create_logical_replication_slot('jetstream_outbox', 'test_decoding')",
            "of plugin test_decoding",
        ),
        (
            "postgres",
            "pg_create_physical_replication_slot('jetstream_outbox')",
            "is physical",
        ),
        (
            "elsewhere",
            "pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput')",
            "belongs to database elsewhere",
        ),
    ] {
        let mut client = rig.pg.client_of(db).expect("the database");
        client
            .batch_execute(&format!("SELECT {create}"))
            .expect("a slot");
        let ended = on(&rig, &["teardown", "-yes"]);
        assert_eq!(ended.code, 78, "{ended:?}");
        assert!(ended.stderr.contains(part), "{ended:?}");
        // it is there still, or this fails
        client
            .batch_execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"))
            .expect("the slot");
    }
}
