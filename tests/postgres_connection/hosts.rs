//! Which server is chosen: sockets, addresses, several hosts, kinds of session, deadlines.

use crate::cluster::{connect, primary, reachable};
use crate::support::ports::free_port;
use crate::support::postgres::Postgres;
use jetstream_outbox::postgres::Error;
use std::io::Read;
use std::net::TcpListener;
use std::time::{Duration, Instant};

#[test]
fn sockets_names_and_addresses() {
    let server = primary();
    let port = server.port;
    let socket = server.socket().replace('/', "%2F");
    for (text, over_tls) in [
        (server.admin(), false),
        (
            format!("postgres://postgres@{socket}:{port}/postgres"),
            false,
        ),
        (
            format!("postgres://postgres@127.0.0.1:{port}/postgres?replication=database"),
            true,
        ),
        (format!("postgresql://postgres@[::1]:{port}/postgres"), true),
        (
            format!("postgres://postgres@localhost:{port}/postgres"),
            true,
        ),
        (
            format!("host=no.such.host.invalid hostaddr=127.0.0.1 port={port} user=postgres"),
            true,
        ),
        (
            format!(
                "host=localhost port={port} user=postgres keepalives_idle=5 keepalives_interval=2 \
                 keepalives_count=3 tcp_user_timeout=30000"
            ),
            true,
        ),
    ] {
        if !reachable(&text) {
            continue;
        }
        let connection = connect(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!(connection.backend_pid() > 0);
        assert!(connection.server_version_num() >= 120_000);
        let found = connection.tls_description();
        assert_eq!(found.is_some(), over_tls, "{text}");
    }
}

#[test]
fn what_was_asked_for_reaches_the_server() {
    let server = primary();
    let text = server.tcp(
        "postgres",
        "application_name='a b' options='-c work_mem=77kB'",
    );
    let mut connection = connect(&text).unwrap();
    // (SHOW at the start would be a replication command, of which there can be only one at a time)
    let rows = connection.simple_query(
        "SELECT current_setting('application_name'); \
         SELECT current_setting('work_mem'), current_setting('client_encoding'), NULL, 'ä'",
    );
    let some = |text: &str| Some(text.to_string());
    let expected = [
        vec![some("a b")],
        vec![some("77kB"), some("UTF8"), None, some("ä")],
    ];
    assert_eq!(rows.unwrap(), expected);
    assert_eq!(connection.parameter("application_name"), Some("a b"));
}

#[test]
fn a_failed_query_keeps_its_sqlstate_and_the_session() {
    let server = primary();
    let mut connection = connect(&server.admin()).unwrap();
    let error = connection.simple_query("SELECT 1/0").unwrap_err();
    assert_eq!(error.sqlstate(), Some("22012"));
    assert_eq!(connection.simple_query("SELECT 1").unwrap().len(), 1);
    let error = connection
        .simple_query_within("SELECT pg_sleep(60)", Duration::from_millis(200))
        .unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn a_session_that_is_ended_says_so() {
    let server = primary();
    let mut connection = connect(&server.admin()).unwrap();
    let pid = connection.backend_pid();
    let error = connection
        .simple_query(&format!("SELECT pg_terminate_backend({pid})"))
        .unwrap_err();
    assert_eq!(error.sqlstate(), Some("57P01"), "{error}");
}

#[test]
fn the_next_host_is_tried_and_all_failures_are_told() {
    let server = primary();
    let (dead, port) = (free_port(), server.port);
    let text = format!("host=127.0.0.1,127.0.0.1 port={dead},{port} user=postgres");
    assert_eq!(connect(&text).unwrap().peer(), format!("127.0.0.1:{port}"));

    let text = format!("host=127.0.0.1,/nonexistent port={dead} user=postgres");
    let error = connect(&text).unwrap_err().to_string();
    let first =
        format!("connect to Postgres at 127.0.0.1:{dead}: open the connection: Connection refused");
    assert!(error.starts_with(&first), "{error}");
    let second =
        format!("; connect to Postgres at /nonexistent:{dead}: open the connection: No such file");
    assert!(error.contains(&second), "{error}");
}

#[test]
fn a_refusal_is_not_carried_to_the_next_host() {
    let server = primary();
    let port = server.port;
    let text = format!(
        "host=127.0.0.1,localhost port={port} user=by_scram password=wrong dbname=postgres"
    );
    match connect(&text).unwrap_err() {
        Error::Connect(attempts) => assert_eq!(attempts.len(), 1),
        other => panic!("{other}"),
    }
}

#[test]
fn target_session_attrs_choose_among_primary_and_standby() {
    let primary = Postgres::start();
    let standby = Postgres::builder().build_standby_of(&primary, "standby");
    let (p, s) = (primary.port(), standby.port());
    for (first, second, attrs, expected) in [
        (p, s, "any", Some(p)),
        (s, p, "any", Some(s)),
        (s, p, "primary", Some(p)),
        (s, p, "read-write", Some(p)),
        (p, s, "standby", Some(s)),
        (p, s, "read-only", Some(s)),
        (p, s, "prefer-standby", Some(s)),
        (p, p, "prefer-standby", Some(p)),
        (p, p, "standby", None),
        (s, s, "read-write", None),
    ] {
        let text = format!(
            "host=127.0.0.1,127.0.0.1 port={first},{second} user=postgres target_session_attrs={attrs}"
        );
        match (connect(&text), expected) {
            (Ok(connection), Some(port)) => {
                assert_eq!(connection.peer(), format!("127.0.0.1:{port}"), "{text}");
            }
            (Err(error), None) => {
                let expected = format!("it is not {attrs}, as target_session_attrs asks");
                assert!(error.to_string().contains(&expected), "{error}");
            }
            (found, _) => panic!("{text}: {found:?}"),
        }
    }
}

#[test]
fn a_silent_server_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    for sslmode in ["disable", "prefer"] {
        let start = Instant::now();
        let text = format!("host=127.0.0.1 port={port} user=u connect_timeout=1 sslmode={sslmode}");
        let error = connect(&text).unwrap_err();
        assert!(
            error.to_string().contains("no answer within 1 s"),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(5));
        let (mut client, _) = listener.accept().unwrap();
        let mut sent = Vec::new();
        client.read_to_end(&mut sent).unwrap();
    }
}
