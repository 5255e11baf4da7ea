//! A server that cannot be reached: each command says which, and what to look at.

use crate::check_postgres::finding;
use crate::command::{Ended, run};
use crate::rig::DEADLINE;
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::wait::eventually;
use std::net::TcpListener;

/// Nobody listens on port 1.
const NO_DB: &str = "postgres://postgres@127.0.0.1:1/postgres";
const NO_NATS: &str = "127.0.0.1:1";

const POSTGRES_DOWN: &str = "nothing listens there: is Postgres up (systemctl status postgresql on its host, and its log), \
    are host and port of -db right, does listen_addresses name that address";
const NATS_DOWN: &str = "nothing listens there: is nats-server up (systemctl status nats-server on its host, and its log), \
    are host and port of -nats right";

/// The two lines on standard error: what is wrong begins so, what to do is this.
#[track_caller]
fn says(ended: &Ended, code: i32, what: &str, remedy: &str) {
    ended.with(code);
    let mut lines = ended.stderr.lines();
    let first = lines.next().unwrap_or_default();
    assert!(
        first.starts_with(&format!("jetstream-outbox: {what}")),
        "{ended:?}"
    );
    assert_eq!(lines.collect::<Vec<_>>(), [remedy], "{ended:?}");
}

#[test]
fn nobody_listens() {
    let nats = Nats::start();
    let url = nats.url();
    for command in ["setup", "status"] {
        let ended = run(&[command, "-db", NO_DB, "-nats", NO_NATS], &[]);
        says(
            &ended,
            69,
            "connect to NATS at 127.0.0.1:1: Connection refused",
            NATS_DOWN,
        );
    }
    let ended = run(&["tail", "-db", NO_DB, "-nats", NO_NATS], &[]);
    says(
        &ended,
        69,
        "connect to NATS at 127.0.0.1:1: Connection refused",
        NATS_DOWN,
    );
    let what = "connect to Postgres at 127.0.0.1:1: open the connection: Connection refused";
    for command in ["setup", "status", "teardown"] {
        let ended = run(&[command, "-db", NO_DB, "-nats", &url], &[]);
        says(&ended, 69, what, POSTGRES_DOWN);
    }

    let report = run(&["check", "-json", "-db", NO_DB, "-nats", NO_NATS], &[]).json(2);
    for (name, remedy) in [
        ("postgres.connection", POSTGRES_DOWN),
        ("nats.connection", NATS_DOWN),
    ] {
        let found = finding(&report["findings"], name);
        assert_eq!(
            (&found["level"], &found["fix"]),
            (&"fail".into(), &remedy.into()),
            "{report:#}"
        );
    }

    let folder = tempfile::tempdir().expect("a folder");
    let db = format!(
        "host={} port=5432 user=postgres dbname=x",
        folder.path().display()
    );
    let ended = run(&["teardown", "-db", &db, "-nats", NO_NATS], &[]);
    assert!(
        ended.stderr.contains("unix_socket_directories"),
        "{ended:?}"
    );
    ended.with(69);
    let db = "postgres://postgres@no-such-host.invalid/postgres";
    let ended = run(&["teardown", "-db", db, "-nats", NO_NATS], &[]);
    assert!(ended.stderr.contains("name service"), "{ended:?}");
    ended.with(69);
}

/// As a server that is frozen, or a firewall that lets the handshake through.
#[test]
fn nobody_answers() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = silent.local_addr().expect("its number").port();
    let db = format!("postgres://postgres@127.0.0.1:{port}/postgres?connect_timeout=2");
    let ended = run(&["teardown", "-db", &db, "-nats", NO_NATS], &[]);
    assert!(
        ended
            .stderr
            .contains("the connection stands and nothing answers"),
        "{ended:?}"
    );
    ended.with(69);
    let nats = format!("127.0.0.1:{port}");
    let ended = run(&["tail", "-db", NO_DB, "-nats", &nats], &[]);
    assert!(
        ended.stderr.contains("is nats-server frozen or overloaded"),
        "{ended:?}"
    );
    ended.with(69);
}

/// It takes connections, and refuses them for now.
#[test]
fn the_server_shuts_down() {
    let pg = Postgres::start();
    let held = pg.client();
    pg.let_run_out();
    let args = [
        "teardown",
        "-db",
        &pg.url("postgres", "postgres"),
        "-nats",
        NO_NATS,
    ];
    let ended = eventually("the server to refuse", DEADLINE, || {
        let ended = run(&args, &[]);
        (ended.code != 0).then_some(ended)
    });
    says(
        &ended,
        69,
        "connect to Postgres at 127.0.0.1:",
        "the server starts up, recovers or shuts down: its log tells how far it is; then run this again",
    );
    assert!(ended.stderr.contains("57P03"), "{ended:?}");
    drop(held);
}
