//! What the relay shows of itself while it works on real servers: metrics, health, and what systemd is told.

use crate::rig::{DEADLINE, Rig, STREAM, field};
use crate::support::process::Signal;
use crate::support::relay::Relay;
use crate::support::wait::{eventually, secs};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};
use std::{fs, thread};

const DASHBOARD: &str = include_str!("../../scripts/deploy/grafana-dashboard.json");
const ALERTS: &str = include_str!("../../scripts/deploy/prometheus-alerts.yml");
const PAGE: &str = include_str!("../../src/observe/page.html");

/// The address that a relay with `-listen 0` says it has.
fn address(relay: &Relay) -> String {
    let line = relay.wait_for_log("serving metrics", DEADLINE);
    field(&line, "address")
        .expect("it names the address")
        .to_string()
}

/// Status and body of an answer.
fn try_get(address: &str, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status = text
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    let body = text
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.to_string());
    status.zip(body).ok_or(io::ErrorKind::InvalidData.into())
}

#[track_caller]
fn get(address: &str, path: &str) -> (u16, String) {
    try_get(address, path).unwrap_or_else(|error| panic!("GET {path}: {error}"))
}

/// The sum of a metric over its labels.
#[track_caller]
fn metric(address: &str, name: &str) -> f64 {
    let (status, text) = get(address, "/metrics");
    assert_eq!(status, 200);
    let of_it = |line: &&str| line.split(['{', ' ']).next() == Some(name);
    let values = text.lines().filter(of_it).map(|line| {
        let value = line.rsplit(' ').next().expect("a line has a value");
        value.parse::<f64>().expect("a value is a number")
    });
    values.sum()
}

#[track_caller]
fn wait_for_readiness(address: &str, status: u16, text: &str) {
    eventually(
        &format!("/readyz to say {text:?}"),
        DEADLINE,
        || match get(address, "/readyz") {
            (found, body) if found == status && body.contains(text) => Ok(()),
            other => Err(other),
        },
    );
    assert_eq!(get(address, "/livez"), (200, "alive\n".to_string()));
}

#[test]
fn metrics_and_health_follow_the_work_and_the_outages() {
    const P: &str = "jetstream_outbox_";
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0", "-hold-back", "0"]);
    let at = address(&relay);
    wait_for_readiness(&at, 200, "relaying");
    for number in 1..=20 {
        rig.commit_event(number, "a");
    }
    rig.wait_for_messages(20);
    let end = rig.pg.current_wal_lsn().0 as f64;
    eventually("everything to be told", DEADLINE, || {
        let done = metric(&at, &format!("{P}confirmed_lsn_bytes"));
        (done >= end).then_some(()).ok_or((done, end))
    });
    let value = |name: &str| metric(&at, &format!("{P}{name}"));
    assert_eq!(value("events_published_total"), 20.0);
    let bodies = rig.messages().iter().map(|m| m.body.len()).sum::<usize>();
    assert_eq!(value("published_bytes_total"), bodies as f64);
    assert_eq!(value("events_in_flight"), 0.0);
    assert_eq!(value("lag_bytes"), 0.0);
    assert_eq!(value("lag_seconds"), 0.0);
    assert!(value("acked_lsn_bytes") >= end && value("received_lsn_bytes") >= end);
    let timed = value("commit_to_ack_seconds_count");
    assert!((1.0..=20.0).contains(&timed), "{timed}");
    assert!((1.0..=20.0).contains(&value("ack_seconds_count")));
    assert!(value("commit_to_ack_seconds_sum") < 20.0 * 60.0);
    assert_eq!((value("ready"), value("sessions_total")), (1.0, 1.0));

    rig.nats.stop();
    wait_for_readiness(&at, 503, "connecting to NATS again");
    rig.commit_event(21, "a");
    eventually("the lag to grow", DEADLINE, || {
        value("lag_seconds") > 1.0 && value("lag_bytes") > 0.0
    });
    rig.nats.start_again();
    wait_for_readiness(&at, 200, "relaying");
    rig.wait_for_messages(21);
    assert!(value("reconnects_total") >= 1.0);
    eventually("the lag to end", DEADLINE, || value("lag_seconds") == 0.0);

    rig.pg.stop_fast();
    wait_for_readiness(&at, 503, "connecting: ");
    assert_eq!(value("ready"), 0.0);
    rig.pg.start_again();
    wait_for_readiness(&at, 200, "relaying");
    assert!(value("sessions_total") >= 2.0);

    // counters go on over sessions; and a standby says what it is
    rig.commit_event(22, "a");
    rig.wait_for_messages(22);
    eventually("the counter to go on", DEADLINE, || {
        value("events_published_total") == 22.0
    });
    let standby = rig.relay(&["-listen", "0"]);
    wait_for_readiness(&address(&standby), 503, "standby: ");
}

#[test]
fn paths_methods_and_addresses_that_are_none_are_answered() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    assert!(at.starts_with("127.0.0.1:"), "{at}");
    let (status, page) = get(&at, "/?x");
    assert_eq!((status, page.as_str()), (200, PAGE));
    assert_eq!(get(&at, "/other").0, 404);
    let answer = |request: &str| {
        let mut stream = TcpStream::connect(&at).expect("connect");
        let limit = Some(DEADLINE);
        stream.set_read_timeout(limit).expect("set a timeout");
        stream
            .write_all(request.as_bytes())
            .expect("send a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("read the answer");
        text
    };
    assert!(answer("POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
    let head = answer("HEAD / HTTP/1.1\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    let (code, log) = rig.run(&["-listen", &at]);
    let last = log.last().expect("it says why");
    assert!(
        code == 78 && last.contains("give -listen another port"),
        "{code} {last}"
    );
}

/// Hundreds of clients that never finish, drip, or send too much: events flow, and threads and files stay few.
#[test]
fn hostile_clients_disturb_nothing() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    wait_for_readiness(&at, 200, "relaying");
    let of_relay = |what: &str| format!("/proc/{}/{what}", relay.id());
    let count = |what: &str| fs::read_dir(of_relay(what)).expect("it runs").count();
    let before = (count("task"), count("fd"));
    let mut idle = Vec::new();
    let mut refused = 0;
    let mut most = before;
    for number in 0..300_u64 {
        match TcpStream::connect(&at) {
            Ok(mut stream) => {
                // one that was closed already takes nothing
                let _ = match number % 3 {
                    0 => Ok(()),
                    1 => stream.write_all(b"G"),
                    _ => stream.write_all(&[b'x'; 20_000]),
                };
                idle.push(stream);
            }
            Err(_) => refused += 1,
        }
        if number % 10 == 0 {
            rig.commit_event(number + 1, "a");
        }
        most = (most.0.max(count("task")), most.1.max(count("fd")));
    }
    rig.wait_for_messages(30);
    assert!(refused < 300, "some got through");
    assert!(
        most.0 <= before.0 + 8 && most.1 <= before.1 + 10,
        "{before:?} {most:?}"
    );
    // dripping clients do not live longer than the deadline: somebody else is served then
    let dripping = thread::spawn(move || {
        let begun = Instant::now();
        while begun.elapsed() < secs(5) {
            for stream in &mut idle {
                let _ = stream.write_all(b"a");
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
    eventually("an honest client to be served", DEADLINE, || {
        try_get(&at, "/metrics")
    });
    dripping.join().expect("it only writes");
    rig.commit_event(1_000, "a");
    rig.wait_for_messages(31);
    eventually("the threads to end", DEADLINE, || count("task") <= before.0);
}

/// The metrics' names in a text.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let ours = words.filter(|word| word.starts_with("jetstream_outbox_"));
    ours.map(str::to_string).collect()
}

#[test]
fn the_dashboard_the_alerts_and_the_page_name_only_what_is_served() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    // one reconnect, so that its label is there
    wait_for_readiness(&at, 200, "relaying");
    rig.nats.restart();
    eventually("a reconnect", DEADLINE, || {
        metric(&at, "jetstream_outbox_reconnects_total") >= 1.0
    });
    let (_, text) = get(&at, "/metrics");
    let samples: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let served = names(&samples.join("\n"));
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("the dashboard is JSON");
    let panels = dashboard["panels"].as_array().expect("it has panels");
    let queries = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().expect("queries"));
    let queries: Vec<&str> = queries
        .map(|query| query["expr"].as_str().expect("a query"))
        .collect();
    assert!(queries.len() > 10);
    for (what, used) in [
        ("dashboard", names(&queries.join("\n"))),
        ("alerts", names(ALERTS)),
    ] {
        let missing: Vec<_> = used.difference(&served).collect();
        assert!(
            !used.is_empty() && missing.is_empty(),
            "{what}: {missing:?}\n{text}"
        );
    }
    assert!(
        text.contains("reconnects_total{cause=\"connection\"}"),
        "{text}"
    );
    // the page leaves the prefix out
    let rows = PAGE.split("const ROWS").nth(1).expect("the page has rows");
    let rows = rows
        .split("];")
        .next()
        .expect("they end")
        .split("[\"")
        .skip(1);
    let used: Vec<&str> = rows
        .map(|row| row.split('"').next().unwrap_or_default())
        .collect();
    assert!(used.len() > 10);
    let computed = [
        "lag_bytes",
        "commit_to_ack_seconds_sum",
        "commit_to_ack_seconds_count",
    ];
    for name in used.iter().chain(&computed) {
        assert!(
            PAGE.contains(name) && served.contains(&format!("jetstream_outbox_{name}")),
            "{name}"
        );
    }
}

#[test]
fn systemd_is_told_of_the_start_the_state_the_end_and_that_threads_move() {
    let rig = Rig::start();
    let folder = tempfile::tempdir().expect("create a temporary folder");
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("bind a socket");
    let next = |limit: Duration| {
        let limit = Some(limit.max(Duration::from_millis(1)));
        socket.set_read_timeout(limit).expect("set a timeout");
        let mut buffer = [0; 4096];
        let count = socket.recv(&mut buffer)?;
        io::Result::Ok(String::from_utf8_lossy(&buffer[..count]).into_owned())
    };
    // whatever else it tells: the watchdog never ends
    let wait_for = |what: &str| {
        let end = Instant::now() + DEADLINE;
        let left = || end.saturating_duration_since(Instant::now());
        while !next(left()).expect(what).contains(what) {}
    };
    let db = format!("postgres://postgres@127.0.0.1:{}/postgres", rig.pg.port());
    let nats = rig.nats.url();
    let env = [
        ("NOTIFY_SOCKET", path.to_str().expect("a path of ours")),
        ("WATCHDOG_USEC", "600000"),
    ];
    let mut relay = Relay::run(&["-db", &db, "-nats", &nats], &env);
    wait_for("READY=1");
    wait_for("STATUS=relaying");
    // regularly
    (0..3).for_each(|_| wait_for("WATCHDOG=1"));
    rig.nats.stop();
    wait_for("STATUS=relaying, but connecting to NATS again: ");
    rig.nats.start_again();
    wait_for("STATUS=relaying");
    // a process that stands still tells nothing, and systemd ends it
    relay.signal(Signal::STOP);
    // but for what it has told already
    let silence = || next(secs(2)).err();
    let error = eventually("silence", DEADLINE, silence);
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    relay.signal(Signal::CONT);
    wait_for("WATCHDOG=1");
    relay.term();
    wait_for("STOPPING=1");
    assert_eq!(relay.wait_exit(secs(30)), 0);
    assert_eq!(rig.nats.client().message_count(STREAM), 0);
}
