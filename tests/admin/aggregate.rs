//! Many relays, one stream to read: a stream for each, and an aggregate that copies from all.

use crate::command::{Ended, run};
use crate::rig::{DEADLINE, uuid};
use crate::support::nats::Nats;
use crate::support::natsclient::{NatsClient, StreamMessage};
use crate::support::postgres::Postgres;
use crate::support::proxy::{Mode, Proxy};
use crate::support::relay::Relay;
use crate::support::wait::{eventually, pause};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const ALL: &str = "ALL";

/// Two services on one Postgres, each with its database, slot, prefix and stream.
struct Services {
    pg: Postgres,
    nats: Nats,
}

impl Services {
    fn start() -> Services {
        let services = Services {
            pg: Postgres::start(),
            nats: Nats::start(),
        };
        for name in ["a", "b"] {
            services.pg.execute(&format!("CREATE DATABASE {name}"));
        }
        services
    }

    /// The flags of a service.
    fn flags(&self, name: &str) -> Vec<String> {
        let flags = [
            "-db",
            &self.pg.url("postgres", name),
            "-nats",
            &self.nats.url(),
            "-slot",
            name,
            "-publication",
            name,
            "-prefix",
            name,
        ];
        flags.map(str::to_string).to_vec()
    }

    fn run(&self, name: &str, args: &[&str]) -> Ended {
        let flags = self.flags(name);
        let flags = flags.iter().map(String::as_str);
        run(&args.iter().copied().chain(flags).collect::<Vec<_>>(), &[])
    }

    /// `setup` of a service, with a stream of its name in capitals.
    fn set_up(&self, name: &str, more: &[&str]) -> Ended {
        let stream = name.to_uppercase();
        let args = [&["setup", "-stream", &stream, "-aggregate", ALL], more].concat();
        self.run(name, &args)
    }

    fn relay(&self, name: &str, more: &[&str]) -> Relay {
        let flags = self.flags(name);
        let flags = flags.iter().map(String::as_str);
        Relay::run(&more.iter().copied().chain(flags).collect::<Vec<_>>(), &[])
    }

    /// Commits the event of a number.
    fn commit(&self, name: &str, number: u64) {
        let mut client = self.pg.client_of(name).expect("connect");
        client.batch_execute(&insert(number)).expect("commit");
    }

    fn sources(&self) -> Vec<Value> {
        let info = self.nats.client().stream_info(ALL);
        let mut sources = info["config"]["sources"]
            .as_array()
            .expect("sources")
            .clone();
        sources.sort_by_key(|source| source["name"].as_str().map(str::to_string));
        sources
    }

    /// The findings of `check -aggregate` that are not ok, as `level found`.
    fn check(&self, name: &str) -> Vec<String> {
        let report = self.run(name, &["check", "-json", "-aggregate", ALL]);
        let report: Value = serde_json::from_str(&report.stdout).expect("JSON");
        let findings = report["findings"].as_array().expect("a list");
        // the other service's transactions make the publication look younger than it is: Postgres' side is not asked here
        let text = |it: &Value, key: &str| it[key].as_str().unwrap_or_default().to_string();
        let bad = (findings.iter())
            .filter(|it| it["level"] != "ok" && text(it, "name").starts_with("nats."));
        bad.map(|it| {
            assert_eq!(it["name"], "nats.aggregate", "{it}");
            format!("{} {}", text(it, "level"), text(it, "found"))
        })
        .collect()
    }
}

fn insert(number: u64) -> String {
    let id = uuid(number);
    format!("INSERT INTO outbox VALUES ('{id}', 'account', 'x', '{{\"n\": {number}}}');")
}

/// Changes fields of a stream's configuration.
fn edit(client: &mut NatsClient, stream: &str, fields: &Value) {
    let mut config = client.stream_info(stream)["config"].clone();
    let fields = fields.as_object().expect("fields").clone();
    config.as_object_mut().expect("fields").extend(fields);
    client.api(&format!("STREAM.UPDATE.{stream}"), &config);
}

#[track_caller]
fn wait_for(client: &mut NatsClient, stream: &str, count: u64) {
    eventually("the copies", DEADLINE, || {
        let found = client.message_count(stream);
        if found >= count { Ok(()) } else { Err(found) }
    });
}

#[test]
fn setup_makes_an_aggregate_and_adds_to_it_what_is_missing() {
    let services = Services::start();
    let first = services.set_up("a", &["-max-age", "1h"]);
    let text = first.with(0);
    assert!(text.contains("created  aggregate ALL\n"), "{text}");
    let config = services.nats.client().stream_info(ALL)["config"].clone();
    assert_eq!(config["max_age"], json!(3_600_000_000_000_u64));
    assert_eq!(services.sources(), [json!({ "name": "A" })]);
    // somebody else's
    let mut client = services.nats.client();
    client.add_stream("OTHER", &["other.>"]);
    let others = json!([{ "name": "OTHER", "filter_subject": "other.x" }, { "name": "A" }]);
    edit(
        &mut client,
        ALL,
        &json!({ "sources": others, "description": "kept" }),
    );

    let second = services.set_up("b", &[]);
    let text = second.with(0);
    assert!(text.contains("found    aggregate ALL\n"), "{text}");
    assert!(
        text.contains("created  source B of aggregate ALL\n"),
        "{text}"
    );
    let expected = [
        json!({ "name": "A" }),
        json!({ "name": "B" }),
        json!({ "name": "OTHER", "filter_subject": "other.x" }),
    ];
    assert_eq!(services.sources(), expected);
    let config = client.stream_info(ALL)["config"].clone();
    assert_eq!(config["description"], "kept");
    for name in ["a", "b"] {
        let again = services.set_up(name, &[]);
        let text = again.with(0);
        assert!(
            !text.contains("created") && text.contains("found    aggregate ALL\n"),
            "{text}"
        );
        assert!(services.check(name).is_empty());
    }
    assert_eq!(client.stream_info(ALL)["config"], config);
}

#[test]
fn an_aggregate_that_setup_did_not_make_is_left_alone_until_it_is_allowed() {
    let services = Services::start();
    let mut client = services.nats.client();
    client.add_stream("OTHER", &["other.>"]);
    client.add_stream_with(json!({ "name": ALL, "sources": [{ "name": "OTHER" }] }));
    let before = client.stream_info(ALL)["config"].clone();
    let ended = services.set_up("a", &[]);
    let text = ended.with(78);
    assert!(
        text.contains("differs  aggregate ALL: it does not copy from A, and setup did not make it"),
        "{text}"
    );
    assert_eq!(client.stream_info(ALL)["config"], before);
    assert_eq!(
        services.check("a"),
        ["fail stream ALL: it does not copy from A"]
    );
    // as it says
    edit(
        &mut client,
        ALL,
        &json!({ "metadata": { "jetstream_outbox": "aggregate" } }),
    );
    services.set_up("a", &[]).with(0);
    assert_eq!(
        services.sources(),
        [json!({ "name": "A" }), json!({ "name": "OTHER" })]
    );
}

#[test]
fn a_stream_that_captures_the_events_is_no_aggregate() {
    let services = Services::start();
    let mut client = services.nats.client();
    client.add_stream("ALL", &["a.>"]);
    let ended = services.set_up("a", &[]);
    assert!(
        ended
            .with(78)
            .contains("differs  aggregate ALL: it captures a.> itself"),
        "{ended:?}"
    );
    assert_eq!(services.check("a"), ["fail stream ALL captures a.> itself"]);
}

/// Each copies under its own prefix, or under one that all have.
#[test]
fn events_get_another_prefix_where_it_is_wished() {
    let services = Services::start();
    services.set_up("a", &["-aggregate-prefix", "all"]).with(0);
    services.set_up("b", &[]).with(0);
    for name in ["a", "b"] {
        services.commit(name, if name == "a" { 1 } else { 2 });
        let mut relay = services.relay(name, &["-drain"]);
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    }
    let mut client = services.nats.client();
    wait_for(&mut client, ALL, 2);
    let mut subjects: Vec<_> = client
        .read_all(ALL)
        .into_iter()
        .map(|it| it.subject)
        .collect();
    subjects.sort();
    assert_eq!(subjects, ["all.account.x", "b.account.x"]);
    assert!(services.check("a").is_empty());
    // what is there is not changed
    let ended = services.set_up("b", &["-aggregate-prefix", "all"]);
    assert!(
        ended
            .with(78)
            .contains("events of B are in it under b.>, not all.>"),
        "{ended:?}"
    );
}

/// Six change it at once, over connections that are slow enough for each to read what others are about to change.
#[test]
fn setups_at_the_same_time_lose_no_source() {
    const MANY: usize = 6;
    let services = Services::start();
    services.set_up("a", &[]).with(0);
    let proxy = Proxy::start(services.nats.port());
    proxy.set(Mode::Delay(Duration::from_millis(60)));
    let nats = format!("nats://127.0.0.1:{}", proxy.port());
    let db = services.pg.url("postgres", "a");
    let one = |number: usize| {
        let (slot, stream) = (format!("s{number}"), format!("S{number}"));
        run(
            &[
                "setup",
                "-db",
                &db,
                "-nats",
                &nats,
                "-slot",
                &slot,
                "-prefix",
                &slot,
                "-stream",
                &stream,
                "-aggregate",
                ALL,
                "-no-messages",
            ],
            &[],
        )
        .with(0);
    };
    for round in 0..3 {
        if round > 0 {
            services
                .nats
                .client()
                .api("STREAM.DELETE.ALL", &Value::Null);
        }
        thread::scope(|scope| {
            for number in 0..MANY {
                scope.spawn(move || one(number));
            }
        });
        let names: Vec<Value> = services
            .sources()
            .iter()
            .map(|it| it["name"].clone())
            .collect();
        let expected: Vec<Value> = (0..MANY)
            .map(|number| json!(format!("S{number}")))
            .collect();
        assert_eq!(names.len(), MANY + usize::from(round == 0), "{names:?}");
        assert!(expected.iter().all(|it| names.contains(it)), "{names:?}");
    }
}

/// Another one has read it before this one changes it, and changes it after.
#[test]
fn a_source_that_a_change_by_another_undoes_is_added_again() {
    let services = Services::start();
    services.set_up("a", &[]).with(0);
    let mut client = services.nats.client();
    client.add_stream("C", &["c.>"]);
    thread::scope(|scope| {
        let setup = scope.spawn(|| services.set_up("b", &[]).with(0).to_string());
        let changed = eventually("the source to be added", DEADLINE, || {
            let before = json!([{ "name": "A" }, { "name": "C" }]);
            (services.sources().len() == 2).then_some(before)
        });
        edit(&mut client, ALL, &json!({ "sources": changed }));
        setup.join().expect("it ends");
    });
    let names: Vec<Value> = (services.sources().iter())
        .map(|it| it["name"].clone())
        .collect();
    assert_eq!(names, ["A", "B", "C"]);
}

/// What was copied from a stream.
fn copies_of(messages: &[StreamMessage], origin: &str) -> Vec<String> {
    let of_it = |message: &&StreamMessage| {
        let source = message.header("Nats-Stream-Source").unwrap_or_default();
        source.split(' ').next() == Some(origin)
    };
    messages
        .iter()
        .filter(of_it)
        .map(|it| it.id().to_string())
        .collect()
}

/// Nothing is lost, nothing comes twice, and each stream's order is kept, over kills of relays and of the server.
#[test]
fn an_aggregate_has_every_event_once_in_the_order_of_its_stream() {
    let services = Arc::new(Services::start());
    services.set_up("a", &[]).with(0);
    services.set_up("b", &[]).with(0);
    let stop = Arc::new(AtomicBool::new(false));
    let writers = ["a", "b"].map(|name| {
        let (services, stop) = (services.clone(), stop.clone());
        thread::spawn(move || {
            let mut client = services.pg.client_of(name).expect("connect");
            let mut number = if name == "a" { 0 } else { 1_000_000 };
            let first = number;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                let sql = format!("BEGIN; {} DELETE FROM outbox; COMMIT", insert(number));
                client.batch_execute(&sql).expect("commit an event");
                pause(Duration::from_millis(4));
            }
            number - first
        })
    });
    let mut relays = [services.relay("a", &[]), services.relay("b", &[])];
    let grow = |events: u64| {
        let count = || services.nats.client().message_count(ALL);
        let target = count() + events;
        eventually("the aggregate to grow", DEADLINE, || count() >= target);
    };
    grow(200);
    for (index, name) in [(0, "a"), (1, "b")] {
        relays[index].kill();
        pause(Duration::from_millis(200));
        relays[index] = services.relay(name, &[]);
        grow(100);
        services.nats.kill();
        services.nats.start_again();
        grow(100);
    }
    services.nats.restart();
    grow(100);
    stop.store(true, Ordering::Relaxed);
    let written = writers.map(|writer| writer.join().expect("it writes"));
    for relay in &mut relays {
        relay.term();
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    }
    for name in ["a", "b"] {
        let mut relay = services.relay(name, &["-drain"]);
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    }
    let mut client = services.nats.client();
    wait_for(&mut client, ALL, written.iter().sum());
    let all = client.read_all(ALL);
    assert_eq!(all.len() as u64, written.iter().sum::<u64>());
    for (origin, first, count) in [("A", 0, written[0]), ("B", 1_000_000, written[1])] {
        let expected: Vec<String> = (1..=count).map(|number| uuid(first + number)).collect();
        assert_eq!(copies_of(&all, origin), expected, "{origin}");
    }
    for name in ["a", "b"] {
        assert!(services.check(name).is_empty());
    }
}

/// Two services may number their events from 1.
#[test]
fn events_of_two_relays_with_one_id_are_both_in_the_aggregate() {
    let services = Services::start();
    let mut client = services.nats.client();
    for name in ["a", "b"] {
        services.set_up(name, &[]).with(0);
        services.commit(name, 1);
        let mut relay = services.relay(name, &["-drain"]);
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
        let count = if name == "a" { 1 } else { 2 };
        // before nats-server 2.15 the ids are remembered for 100 ms
        wait_for(&mut client, ALL, count);
        pause(Duration::from_millis(150));
    }
    edit(
        &mut client,
        ALL,
        &json!({ "duplicate_window": 120_000_000_000_u64 }),
    );
    let found = services.check("a");
    assert_eq!(
        found,
        ["warn stream ALL: it looks for duplicates (duplicate_window 120 s)"]
    );
    for name in ["a", "b"] {
        services.commit(name, 2);
        let mut relay = services.relay(name, &["-drain"]);
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    }
    // this is what the warning is for
    wait_for(&mut client, ALL, 3);
    assert_eq!(client.message_count(ALL), 3);
}

#[test]
fn check_finds_an_aggregate_that_does_not_get_everything() {
    let services = Services::start();
    let mut client = services.nats.client();
    services.set_up("a", &[]).with(0);
    client.api("STREAM.DELETE.ALL", &Value::Null);
    assert_eq!(services.check("a"), ["fail stream ALL does not exist"]);
    services.set_up("a", &[]).with(0);

    // full, and it takes up again where it stood
    edit(
        &mut client,
        ALL,
        &json!({ "max_msgs": 2, "discard": "new" }),
    );
    for number in 1..=5 {
        services.commit("a", number);
    }
    let mut relay = services.relay("a", &["-drain"]);
    assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    wait_for(&mut client, ALL, 2);
    let found = services.check("a");
    assert_eq!(
        found,
        [
            "warn stream ALL: it has a limit (max_msgs 2, max_bytes -1, max_msgs_per_subject -1, discard new)",
            "fail stream ALL: the copying from A stands before its sequence 3 for 5 s",
        ]
    );
    edit(
        &mut client,
        ALL,
        &json!({ "max_msgs": -1, "discard": "old" }),
    );
    wait_for(&mut client, ALL, 5);
    assert!(services.check("a").is_empty());
    let expected: Vec<String> = (1..=5).map(uuid).collect();
    assert_eq!(copies_of(&client.read_all(ALL), "A"), expected);

    // a part of the events, or all of them twice
    let source = |filter: &str| json!({ "name": "A", "filter_subject": filter });
    for (sources, found) in [
        (
            json!([source("a.order.>")]),
            "of A it does not copy all of a.>",
        ),
        (
            json!([source("a.>"), source("a.order.>")]),
            "it copies from A by more than one source",
        ),
        (json!([{ "name": "B" }]), "it does not copy from A"),
    ] {
        edit(&mut client, ALL, &json!({ "sources": sources }));
        assert_eq!(services.check("a"), [format!("fail stream ALL: {found}")]);
    }
    // its origin is put back
    edit(&mut client, ALL, &json!({ "sources": [{ "name": "A" }] }));
    eventually("all to be copied", DEADLINE, || {
        services.check("a").is_empty()
    });
    client.api("STREAM.DELETE.A", &Value::Null);
    client.add_stream("A", &["a.>"]);
    // nats-server says of the source that it is gone until it has tried again
    let said = [
        "fail stream ALL: it has copied",
        "fail stream ALL: nothing is copied from A",
    ];
    let found = services.check("a");
    assert!(
        found.is_empty() || said.iter().any(|said| found[0].starts_with(said)),
        "{found:?}"
    );
}

#[test]
fn an_origin_that_is_consumed_is_warned_of() {
    for (retention, expected) in [
        (
            "interest",
            "fail stream ALL: its origin A has interest retention",
        ),
        ("workqueue", "warn stream ALL: its origin A is a work queue"),
    ] {
        let services = Services::start();
        let mut client = services.nats.client();
        client.add_stream_with(json!({ "name": "A", "subjects": ["a.>"], "retention": retention }));
        let ended = services.set_up("a", &[]);
        assert!(ended.with(78).contains("its origin A"), "{ended:?}");
        assert!(
            services.check("a").iter().any(|found| found == expected),
            "{retention}"
        );
    }
}
