//! What the relay takes of NATS and of the system: one connection, and the threads that the manual names.

use crate::rig::{DEADLINE, Rig, SLOT};
use crate::support::nats::{Nats, NatsCluster};
use crate::support::ports::free_port;
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use crate::support::wait::eventually;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;

/// The body of an answer of nats-server's monitoring.
fn monitoring(port: u16, path: &str) -> Value {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connect to the monitoring");
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("ask the monitoring");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read its answer");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    serde_json::from_str(body).expect("JSON")
}

fn with_monitoring(port: u16) -> Rig {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder()
            .config(&format!("http: 127.0.0.1:{port}"))
            .build(),
    };
    rig.pg.seed_setup();
    rig.nats.client().add_seed_stream();
    rig
}

#[test]
fn a_relay_has_one_connection_to_nats() {
    let port = free_port();
    let rig = with_monitoring(port);
    let relay = rig.relay(&[]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    // the client of this test goes away at its own pace
    let connection = eventually("one connection alone", DEADLINE, || {
        let found = monitoring(port, "/connz?subs=1");
        match found["connections"].as_array().map(Vec::as_slice) {
            Some([connection]) => Ok(connection.clone()),
            _ => Err(found),
        }
    });
    assert_eq!(connection["name"], format!("jetstream-outbox {SLOT}"));
    assert_eq!(connection["subscriptions"], 1, "{connection}");
    // over it went the event, the requests and the checkpoint
    assert!(connection["in_msgs"].as_u64() > Some(5), "{connection}");
    drop(relay);
}

/// The names of its threads, but for the main one.
fn threads(relay: &Relay) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", relay.id())).expect("its threads");
    let mut names: Vec<String> = tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim_end().to_string())
        .filter(|name| !name.starts_with("jetstream-outbo"))
        .collect();
    names.sort();
    names
}

#[test]
fn the_relays_threads_are_those_that_the_manual_names() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "127.0.0.1:0"]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    let chapter = include_str!("../../src/manual/02_configuration.md");
    let named = chapter
        .split_once("The relay has these threads:")
        .expect("named")
        .1;
    let named = named.split_once("\n\n").expect("a paragraph").0;
    let words = named.split('`').skip(1).step_by(2);
    let mut expected: Vec<&str> = words.filter(|word| !word.starts_with('-')).collect();
    expected.sort_unstable();
    eventually("the threads to be those", DEADLINE, || {
        match threads(&relay) {
            found if found == expected => Ok(()),
            found => Err(found),
        }
    });
}

/// One that leaves in time is not cut off.
#[test]
fn a_server_in_lame_duck_mode_is_left_for_another_of_the_cluster() {
    let cluster = NatsCluster::start();
    let pg = Postgres::start();
    pg.seed_setup();
    cluster.add_stream(SLOT, &["events.>"]);
    // only the first is configured; it names the others
    let relay = Relay::start(&pg, &cluster.nodes[0], &[]);
    let first = format!("server=127.0.0.1:{}", cluster.nodes[0].port());
    relay.wait_for_log(&first, DEADLINE);
    cluster.nodes[0].lame_duck();
    relay.wait_for_log("is in lame duck mode", DEADLINE);
    let line = relay.wait_for_log("connected to NATS again", DEADLINE);
    let others = [1, 2].map(|node| format!("server=127.0.0.1:{}", cluster.nodes[node].port()));
    assert!(others.iter().any(|other| line.contains(other)), "{line}");
}
