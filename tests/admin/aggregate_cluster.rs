//! An aggregate on a cluster of three, with three replicas, while the leaders of its stream and of an origin are killed.

use crate::command::{Ended, run};
use crate::rig::{DEADLINE, uuid};
use crate::support::nats::NatsCluster;
use crate::support::natsclient::{NatsClient, StreamMessage};
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use crate::support::wait::{eventually, pause};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const ALL: &str = "ALL";
const NAMES: [&str; 2] = ["a", "b"];

struct Services {
    pg: Postgres,
    cluster: NatsCluster,
}

impl Services {
    fn start() -> Services {
        let services = Services {
            pg: Postgres::start(),
            cluster: NatsCluster::start(),
        };
        for name in NAMES {
            services.pg.execute(&format!("CREATE DATABASE {name}"));
            let stream = name.to_uppercase();
            let args = [
                "setup",
                "-stream",
                &stream,
                "-aggregate",
                ALL,
                "-replicas",
                "3",
            ];
            services.run(name, &args).with(0);
        }
        services
    }

    fn flags(&self, name: &str) -> Vec<String> {
        let servers = self.cluster.nodes.each_ref().map(|node| node.url());
        let flags = [
            "-db",
            &self.pg.url("postgres", name),
            "-nats",
            &servers.join(","),
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

    fn relay(&self, name: &str, more: &[&str]) -> Relay {
        let flags = self.flags(name);
        let flags = flags.iter().map(String::as_str);
        Relay::run(&more.iter().copied().chain(flags).collect::<Vec<_>>(), &[])
    }

    /// What `check` finds of NATS that is not ok.
    fn check(&self, name: &str) -> Vec<String> {
        let report = self.run(name, &["check", "-json", "-aggregate", ALL]);
        let report: Value = serde_json::from_str(&report.stdout).expect("JSON");
        let findings = report["findings"].as_array().expect("a list");
        let text = |it: &Value, key: &str| it[key].as_str().unwrap_or_default().to_string();
        let bad = (findings.iter())
            .filter(|it| it["level"] != "ok" && text(it, "name").starts_with("nats."));
        bad.map(|it| format!("{} {}", text(it, "level"), text(it, "found")))
            .collect()
    }

    /// A connection to the first node that answers.
    fn client(&self) -> std::io::Result<NatsClient> {
        let mut last = None;
        for node in &self.cluster.nodes {
            match node.try_client() {
                Ok(client) => return Ok(client),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("there are three"))
    }

    fn count(&self) -> std::io::Result<u64> {
        let info = self
            .client()?
            .try_api(&format!("STREAM.INFO.{ALL}"), &Value::Null)?;
        Ok(info["state"]["messages"].as_u64().unwrap_or_default())
    }

    #[track_caller]
    fn wait_for(&self, count: u64) {
        eventually("the aggregate to grow", DEADLINE, || match self.count() {
            Ok(found) if found >= count => Ok(()),
            found => Err(format!("{found:?} of {count}")),
        });
    }

    /// Changes fields of the aggregate's configuration.
    fn edit(&self, fields: &Value) {
        let mut client = self.client().expect("a node answers");
        let mut config = client.stream_info(ALL)["config"].clone();
        let fields = fields.as_object().expect("fields").clone();
        config.as_object_mut().expect("fields").extend(fields);
        client.api(&format!("STREAM.UPDATE.{ALL}"), &config);
    }
}

/// Commits events of its own numbers until it is told to stop.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: thread::JoinHandle<()>,
}

impl Writer {
    fn start(services: &Services, name: &str, first: u64) -> Writer {
        let mut client = services.pg.client_of(name).expect("connect");
        let (stop, written) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let thread = thread::spawn({
            let (stop, written) = (stop.clone(), written.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let number = written.load(Ordering::Relaxed) + 1;
                    let id = uuid(first + number);
                    let sql = format!(
                        "BEGIN; INSERT INTO outbox VALUES ('{id}', 'account', 'x', '{{}}'); DELETE FROM outbox; COMMIT"
                    );
                    client.batch_execute(&sql).expect("commit an event");
                    written.store(number, Ordering::Relaxed);
                    pause(Duration::from_millis(5));
                }
            }
        });
        Writer {
            stop,
            written,
            thread,
        }
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("it writes");
        self.written.load(Ordering::Relaxed)
    }
}

/// The ids of what was copied from a stream.
fn copies_of(messages: &[StreamMessage], origin: &str) -> Vec<String> {
    let of_it = |message: &&StreamMessage| {
        let source = message.header("Nats-Stream-Source").unwrap_or_default();
        source.split(' ').next() == Some(origin)
    };
    let messages = messages.iter().filter(of_it);
    messages.map(|it| it.id().to_string()).collect()
}

#[test]
fn an_aggregate_of_three_replicas_has_every_event_once_and_in_order_though_leaders_are_killed() {
    let services = Services::start();
    let mut client = services.client().expect("a node answers");
    for stream in ["A", "B", ALL, "KV_jetstream_outbox"] {
        assert_eq!(client.stream_info(stream)["config"]["num_replicas"], 3);
    }
    let writers = [0, 1_000_000].map(|first| {
        let name = if first == 0 { "a" } else { "b" };
        Writer::start(&services, name, first)
    });
    let mut relays = NAMES.map(|name| services.relay(name, &[]));
    services.wait_for(200);
    for stream in [ALL, "A", ALL, "B"] {
        let leader = eventually("a leader", DEADLINE, || services.cluster.leader(stream));
        let node = &services.cluster.nodes[leader];
        node.kill();
        let before = eventually("the aggregate to answer", DEADLINE, || services.count());
        services.wait_for(before + 200);
        node.start_again();
        services.wait_for(before + 300);
    }
    let written = writers.map(Writer::finish);
    for relay in &mut relays {
        relay.term();
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    }
    for name in NAMES {
        let mut relay = services.relay(name, &["-drain"]);
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    }
    services.wait_for(written.iter().sum());
    let all = eventually("the aggregate to be read", DEADLINE, || {
        services.client()?.try_read_from(ALL, 1)
    });
    for (origin, first, count) in [("A", 0, written[0]), ("B", 1_000_000, written[1])] {
        let expected: Vec<String> = (1..=count).map(|number| uuid(first + number)).collect();
        assert!(copies_of(&all, origin) == expected, "{origin}");
    }
    assert_eq!(all.len() as u64, written.iter().sum::<u64>());
    for name in NAMES {
        eventually("nothing to be found", DEADLINE, || {
            let found = services.check(name);
            if found.is_empty() { Ok(()) } else { Err(found) }
        });
    }

    // it lags, and is told so
    services.edit(&json!({ "max_msgs": all.len(), "discard": "new" }));
    services.pg.client_of("a").expect("connect").batch_execute(
        "INSERT INTO outbox VALUES ('00000000-0000-0000-0000-999999999999', 'account', 'x', '{}')",
    ).expect("commit an event");
    let mut relay = services.relay("a", &["-drain"]);
    assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    let lag = format!(
        "fail stream ALL: the copying from A stands before its sequence {}",
        written[0] + 1
    );
    let found = services.check("a");
    assert!(
        found.iter().any(|found| found.starts_with(&lag)),
        "{found:?}"
    );
    services.edit(&json!({ "max_msgs": -1, "discard": "old" }));
    services.wait_for(written.iter().sum::<u64>() + 1);
    eventually("nothing to be found", DEADLINE, || {
        let found = services.check("a");
        if found.is_empty() { Ok(()) } else { Err(found) }
    });
}
