//! What the relay shows of itself while it works on real servers: metrics, health, and what systemd is told.

use crate::exposition::{self, Format};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM, UUID_SQL, field};
use crate::support::process::Signal;
use crate::support::relay::Relay;
use crate::support::wait::{eventually, secs};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

const DASHBOARD: &str = include_str!("../../scripts/deploy/grafana-dashboard.json");
const ALERTS: &str = include_str!("../../scripts/deploy/prometheus-alerts.yml");
const SCRIPT: &str = include_str!("../../src/observe/page/page.js");

/// The addresses that a relay with `-listen` says it has.
pub fn addresses(relay: &Relay) -> Vec<String> {
    let line = relay.wait_for_log("serving metrics", DEADLINE);
    let addresses = field(&line, "address").expect("it names them");
    addresses.split(',').map(str::to_string).collect()
}

/// The first of them, of IPv4.
pub fn address(relay: &Relay) -> String {
    addresses(relay).remove(0)
}

/// The whole answer to a request, or to what is none.
pub fn exchange(address: &str, request: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(secs(5)))?;
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Status and body of an answer.
pub fn try_get(address: &str, path: &str) -> io::Result<(u16, String)> {
    let text = exchange(
        address,
        &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n"),
    )?;
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
pub fn get(address: &str, path: &str) -> (u16, String) {
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

/// What the status page shows.
#[track_caller]
fn status(address: &str) -> Value {
    let (code, text) = get(address, "/status");
    assert_eq!(code, 200);
    serde_json::from_str(&text).expect("/status is JSON")
}

#[track_caller]
pub fn wait_for_readiness(address: &str, status: u16, text: &str) {
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
        let done = metric(&at, &format!("{P}flush_lsn_bytes"));
        (done >= end).then_some(()).ok_or((done, end))
    });
    let value = |name: &str| metric(&at, &format!("{P}{name}"));
    assert_eq!(value("events_published_total"), 20.0);
    let bodies = rig.messages().iter().map(|m| m.body.len()).sum::<usize>();
    assert_eq!(value("published_bytes_total"), bodies as f64);
    assert_eq!(value("events_in_flight"), 0.0);
    assert_eq!(value("lag_bytes"), 0.0);
    assert_eq!(value("lag_seconds"), 0.0);
    assert!(value("stored_lsn_bytes") >= end && value("received_lsn_bytes") >= end);
    assert!(value("wal_end_bytes") >= value("received_lsn_bytes"));
    let checkpointed = value("checkpointed_lsn_bytes");
    assert!(
        (value("flush_lsn_bytes")..=value("stored_lsn_bytes")).contains(&checkpointed),
        "{checkpointed}"
    );
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

/// The text of `/metrics` for a scraper that sends this `Accept`.
#[track_caller]
fn scrape(address: &str, accept: &str) -> (String, String) {
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nAccept: {accept}\r\n\r\n");
    let answer = exchange(address, &request).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
    (head.to_string(), body.to_string())
}

#[test]
fn each_scraper_gets_the_format_that_it_asks_for_and_it_is_valid() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    wait_for_readiness(&at, 200, "relaying");
    (1..=3).for_each(|number| rig.commit_event(number, "a"));
    eventually("the events to be counted", DEADLINE, || {
        metric(&at, "jetstream_outbox_events_published_total") == 3.0
    });
    let (head, text) = scrape(&at, "*/*");
    let kind = "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n";
    assert!(head.contains(kind), "{head}");
    let as_text = exposition::read(&text, Format::Text);
    let (head, text) = scrape(
        &at,
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    );
    let kind = "\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(head.contains(kind), "{head}");
    let as_open_metrics = exposition::read(&text, Format::OpenMetrics);
    // the same samples under the same names: a change of format changes no series
    let names = |values: &std::collections::BTreeMap<String, f64>| {
        values.keys().cloned().collect::<BTreeSet<_>>()
    };
    assert_eq!(names(&as_text), names(&as_open_metrics));
    let key = "jetstream_outbox_events_published_total";
    assert_eq!((as_text[key], as_open_metrics[key]), (3.0, 3.0));
    // from the start, so that the first reconnect is an increase
    let key = "jetstream_outbox_reconnects_total{cause=\"connection\"}";
    assert_eq!(as_text[key], 0.0);
}

/// 64 MB of WAL is kept for a slot at most.
fn bound_wal(rig: &Rig) {
    rig.pg
        .execute("ALTER SYSTEM SET max_slot_wal_keep_size = '64MB'");
    rig.pg.execute("SELECT pg_reload_conf()");
    let setting = "SELECT current_setting('max_slot_wal_keep_size')";
    eventually("the setting to be read", DEADLINE, || {
        rig.pg.scalar::<String>(setting).as_deref() == Some("64MB")
    });
}

/// Events in all of [`the_status_says_what_is_served_and_remembers_an_outage`].
const LARGE: u64 = 20_000;

/// What somebody sees who opens the page after the outage.
#[test]
fn the_status_says_what_is_served_and_remembers_an_outage() {
    let rig = Rig::start();
    bound_wal(&rig);
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    wait_for_readiness(&at, 200, "relaying");
    (1..=4).for_each(|number| rig.commit_event(number, "a"));
    rig.wait_for_messages(4);
    let before = eventually("the stream's end to be shown", DEADLINE, || {
        let status = status(&at);
        let last_seq = status["streams"][0]["last_seq"].as_u64();
        (last_seq == Some(4)).then_some(status)
    });
    let (settings, connected) = (&before["settings"], &before["connected"]);
    let pg_at = format!("127.0.0.1:{}", rig.pg.port());
    let nats_at = format!("127.0.0.1:{}", rig.nats.port());
    assert_eq!(settings["slot"], SLOT);
    assert_eq!(settings["publication"], SLOT);
    assert_eq!(settings["database"], "postgres");
    assert_eq!(settings["postgres"], pg_at.as_str());
    assert_eq!(settings["nats"], nats_at.as_str());
    assert_eq!(connected["postgres"]["address"], pg_at.as_str());
    assert_eq!(connected["nats"]["address"], nats_at.as_str());
    assert_eq!(before["streams"][0]["name"], STREAM);
    assert_eq!(before["state"]["ready"], true);
    assert_eq!(before["slot_wal"]["limit_bytes"], 64 << 20);
    let safe = metric(&at, "jetstream_outbox_slot_safe_wal_bytes");
    assert!(safe > f64::from(32 << 20), "{safe}");
    // it is looked at again while the session runs
    let wal = |status: &Value| status["slot_wal"]["bytes"].as_u64().expect("it is known");
    rig.pg
        .execute("CREATE TABLE other AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)");
    eventually("more WAL to be kept", DEADLINE, || {
        wal(&status(&at)) > wal(&before) + 1_000_000
    });

    rig.nats.stop();
    wait_for_readiness(&at, 503, "connecting to NATS again");
    let history = |what: &str| {
        let status = status(&at);
        let list = status["history"][what].as_array().expect("a list").clone();
        list.iter().map(Value::as_f64).collect::<Vec<_>>()
    };
    eventually("the outage to be sampled", DEADLINE, || {
        history("ready").contains(&Some(0.0))
    });
    // what others write fills the channel, and leaves the last place to an event
    let write_other = || {
        let before = metric(&at, "jetstream_outbox_wal_end_bytes");
        rig.pg.execute("INSERT INTO other VALUES ('x')");
        eventually("Postgres to say how far it is", DEADLINE, || {
            metric(&at, "jetstream_outbox_wal_end_bytes") > before
        });
    };
    eventually("the channel to be nearly full", DEADLINE, || {
        write_other();
        metric(&at, "jetstream_outbox_channel_batches") >= 3.0
    });
    (0..5).for_each(|_| write_other());
    // more than the reader can hand over: the end of the transaction has not come, and its events wait all the same
    rig.pg.execute(&format!(
        "INSERT INTO outbox SELECT {UUID_SQL}, 'account', 'a', jsonb_build_object('text', repeat('x', 300)) \
         FROM generate_series(5, {LARGE}) n"
    ));
    eventually("its lag to be sampled", DEADLINE, || {
        history("lag_seconds").last().copied().flatten() > Some(0.0)
    });
    // the reader stands still meanwhile, and the lag grows all the same
    rig.pg
        .execute("INSERT INTO other SELECT repeat('x', 1000) FROM generate_series(1, 2000)");
    eventually("the lag to grow with the WAL", DEADLINE, || {
        history("lag_bytes").last().copied().flatten() > Some(1e6)
    });
    assert_eq!(metric(&at, "jetstream_outbox_events_in_flight"), 0.0);
    rig.nats.start_again();
    wait_for_readiness(&at, 200, "relaying");
    rig.wait_for_messages(LARGE);
    eventually("the end of the outage to be sampled", DEADLINE, || {
        history("ready").last() == Some(&Some(1.0))
            && history("lag_seconds").last() == Some(&Some(0.0))
    });
    // all of it is still there
    let ready = history("ready");
    let outage = ready.iter().position(|it| *it == Some(0.0));
    assert!(outage.is_some_and(|at| at > 0), "{ready:?}");
    let lag = history("lag_seconds");
    assert!(lag.iter().any(|it| *it > Some(0.0)), "{lag:?}");
    let rates = history("events_per_second");
    assert!(rates.iter().any(|it| *it > Some(0.0)), "{rates:?}");
    let after = status(&at);
    let now = after["now"].as_u64().expect("a time");
    let lines = after["warnings"]["lines"].as_array().expect("a list");
    let warned = lines
        .iter()
        .find(|line| {
            line["message"] == "connecting to NATS again; Postgres keeps what is not stored"
        })
        .unwrap_or_else(|| panic!("{lines:#?}"));
    assert_eq!(warned["level"], "warn");
    let since = before["started"].as_u64().expect("a time");
    assert!((since..=now).contains(&warned["at"].as_u64().expect("a time")));
    assert!(after["warnings"]["total"].as_u64() >= Some(1));
    let since = after["state"]["since"].as_u64();
    assert!(since > before["state"]["since"].as_u64(), "{since:?}");
    eventually("the stream's end to be shown", DEADLINE, || {
        status(&at)["streams"][0]["last_seq"] == LARGE
    });
}

#[test]
fn warnings_are_kept_for_the_page_whatever_level_is_logged() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0", "-logging", "info"]);
    let at = address(&relay);
    let port = at.rsplit(':').next().expect("a port").to_string();
    drop(relay);
    let quiet = rig.relay(&["-listen", &port, "-logging", "error"]);
    eventually("it to serve", DEADLINE, || try_get(&at, "/livez"));
    wait_for_readiness(&at, 200, "relaying");
    rig.nats.restart();
    eventually("the warning", DEADLINE, || {
        status(&at)["warnings"]["total"].as_u64() >= Some(1)
    });
    assert_eq!(quiet.log(), Vec::<String>::new());
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
    bound_wal(&rig);
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
    // what the page takes from the list it names without the prefix, and the rest by where it is
    let value = |text: &str| text.split('"').next().unwrap_or_default().to_string();
    let used: Vec<String> = SCRIPT.split("value(\"").skip(1).map(value).collect();
    assert!(used.len() > 2);
    for name in used {
        let is_served = |it: &String| it.starts_with(&format!("jetstream_outbox_{name}"));
        assert!(served.iter().any(is_served), "{name}");
    }
    let plots = SCRIPT
        .split("const PLOTS = {")
        .nth(1)
        .expect("it has plots");
    let plots = plots.split('}').next().expect("they end");
    let history = &status(&at)["history"];
    for plot in plots.split(',') {
        let name = plot.split(':').next().expect("a name").trim();
        assert!(history[name].is_array(), "{name}");
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
