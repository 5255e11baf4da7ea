//! Others share the account and its streams: services with the same names, relays on one stream, foreign messages, copies
//! of ours, and somebody who answers in the stream's place.

use crate::operators::{
    Load, assert_each_once, edit, events, ids, insert, stop, wait_for_confirmation,
};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM, uuid};
use crate::support::nats::{Nats, NatsCluster};
use crate::support::natsclient::{NatsClient, StreamMessage};
use crate::support::postgres::Postgres;
use crate::support::relay::{Relay, halts};
use crate::support::wait::{eventually, pause, secs, throughout};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const AT_ONCE: [&str; 2] = ["--hold-back", "0"];

/// The stream of the events forgets ids at once, so that JetStream does not help by knowing them.
fn forgetful() -> Rig {
    let rig = Rig::start_without_stream();
    rig.nats.client().add_stream_with(json!({
        "name": STREAM, "subjects": ["events.>"], "duplicate_window": 100_000_000,
    }));
    rig
}

/// The ids of everything in a stream, copies and all.
fn all_ids(client: &mut NatsClient, stream: &str) -> Vec<String> {
    let messages = client.read_all(stream).into_iter();
    messages.map(|message| message.id().to_string()).collect()
}

/// An event that its stream refuses for good is parked once, also where the park subject's stream has gone beyond it.
#[test]
fn a_refused_event_is_parked_once_whatever_else_is_in_the_stream_that_it_is_parked_in() {
    const PARKED: &str = "jetstream_outbox.parked";
    for shared in [true, false] {
        let rig = Rig {
            pg: Postgres::start(),
            nats: Nats::start(),
        };
        rig.pg.execute(
            "CREATE TABLE outbox (id text PRIMARY KEY, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb, ttl text)",
        );
        rig.pg.execute(&format!(
            "CREATE PUBLICATION {SLOT} FOR TABLE outbox WITH (publish = 'insert')"
        ));
        rig.add_slot(SLOT);
        let mut client = rig.nats.client();
        let (subjects, park) = match shared {
            true => (vec!["events.a.>", PARKED], "A"),
            false => (vec!["events.a.>"], "P"),
        };
        client.add_stream("A", &subjects);
        client.add_stream_with(
            json!({ "name": "B", "subjects": ["events.b.>"], "allow_msg_ttl": true }),
        );
        if !shared {
            client.add_stream("P", &[PARKED]);
        }
        let args = [
            "--hold-back",
            "2s",
            "--header",
            "ttl=Nats-TTL",
            "--on-poison",
            "park",
        ];
        let relay = rig.relay(&args);
        let row = |id: &str, ttl: &str| {
            let kind = &id[..1];
            format!("INSERT INTO outbox VALUES ('{id}', '{kind}', 'x', '{{}}', {ttl});")
        };
        rig.pg.execute(&(row("b0", "'1h'") + &row("a0", "NULL")));
        let rows = [
            ("b1", "'garbage'"),
            ("a1", "NULL"),
            ("a2", "NULL"),
            ("b2", "'1h'"),
        ];
        rig.pg.execute(&rows.map(|(id, ttl)| row(id, ttl)).concat());
        rig.pg.execute(&row("a3", "NULL"));
        wait_for_confirmation(&rig);
        relay.kill();
        rig.drain(&args);
        let parked = |message: &StreamMessage| message.subject == PARKED;
        let (found, others): (Vec<_>, Vec<_>) =
            events(&mut client, park).into_iter().partition(parked);
        assert_eq!(found.len(), 1, "shared: {shared}");
        assert!(
            found[0].headers.iter().any(|(_, value)| value == "b1"),
            "{:?}",
            found[0].headers
        );
        let mut others: BTreeSet<String> = others.iter().map(|it| it.id().to_string()).collect();
        others.extend(ids(&mut client, "A"));
        others.extend(ids(&mut client, "B"));
        others.remove(found[0].id());
        assert_eq!(
            others.iter().collect::<Vec<_>>(),
            ["a0", "a1", "a2", "a3", "b0", "b2"]
        );
        let count = client.last_seq("A") + client.last_seq("B");
        assert_eq!(count, if shared { 7 } else { 6 }, "nothing came twice");
    }
}

/// Answers each publish under `subjects` as another stream would, until it is dropped.
struct Impostor {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Impostor {
    fn start(nats: &Nats, answer: &'static str) -> Impostor {
        let stop = Arc::new(AtomicBool::new(false));
        let mut client =
            NatsClient::try_connect_within(nats.port(), &json!({}), Duration::from_millis(200))
                .expect("connect");
        client.try_subscribe("events.>", 2).expect("subscribe");
        let thread = thread::spawn({
            let stop = stop.clone();
            move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(message) = client.try_next()
                        && let Some(reply) = message.reply
                    {
                        let _ = client.try_send(&reply, "", &[], answer.as_bytes());
                    }
                }
            }
        });
        Impostor {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Nothing is confirmed on the word of another stream.
#[test]
fn an_answer_of_another_stream_halts_the_relay_and_confirms_nothing() {
    let rig = Rig::start();
    let before = rig.pg.confirmed_flush_lsn(SLOT);
    let impostor = Impostor::start(&rig.nats, r#"{"stream":"OTHER","seq":1}"#);
    let load = Load::start(&rig.pg);
    // its answers come before those of the stream, or after them
    halts(rig.relay(&[]), 65, &["another stream answers"]);
    assert_eq!(rig.pg.confirmed_flush_lsn(SLOT), before);
    drop(impostor);
    let count = load.finish();
    rig.drain(&[]);
    assert_each_once(&rig, &[STREAM], count);
    let stored = rig.nats.client().last_seq(STREAM);
    assert_eq!(stored, count, "nothing came twice");
}

/// A hub, and a leaf node of it that the rig's relay connects to.
fn hub_and_leaf() -> (Nats, Rig) {
    let (hub, nats) = Nats::hub_and_leaf("", &json!({}));
    let rig = Rig {
        pg: Postgres::start(),
        nats,
    };
    rig.pg.seed_setup();
    (hub, rig)
}

const OF_HUB: [&str; 2] = ["--nats-api-prefix", "$JS.hub.API"];

/// Each has a stream of the same name and subjects: both store, and both answer.
#[test]
fn a_leaf_nodes_stream_of_the_same_subjects_halts_the_relay_of_the_hubs() {
    let (hub, rig) = hub_and_leaf();
    hub.client().add_seed_stream();
    let mut client = rig.nats.client();
    client.add_seed_stream();
    let before = rig.pg.confirmed_flush_lsn(SLOT);
    for number in 1..=20 {
        rig.pg.execute(&insert(number, "account"));
    }
    halts(rig.relay(&OF_HUB), 65, &["another stream answers", "leaf"]);
    assert_eq!(rig.pg.confirmed_flush_lsn(SLOT), before);
    // as it says: the subject leads to one stream
    client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
    rig.drain(&OF_HUB);
    let expected: Vec<_> = (1..=20).map(uuid).collect();
    assert_eq!(all_ids(&mut hub.client(), STREAM), expected);
}

/// While the hub is away the leaf node's stream answers alone, at the very sequence that is expected.
#[test]
fn a_leaf_nodes_stream_that_answers_alone_confirms_nothing_for_the_hubs() {
    let (hub, rig) = hub_and_leaf();
    hub.client().add_seed_stream();
    let mut client = rig.nats.client();
    let args = [&OF_HUB[..], &AT_ONCE].concat();
    let relay = rig.relay(&args);
    for number in 1..=5 {
        rig.pg.execute(&insert(number, "account"));
    }
    wait_for_confirmation(&rig);
    hub.stop();
    let before = rig.pg.confirmed_flush_lsn(SLOT);
    client.add_seed_stream();
    for number in 1..=5 {
        let id = uuid(number);
        client.publish("events.account.a", &[("Nats-Msg-Id", &id)], b"{}");
    }
    rig.pg.execute(&insert(6, "account"));
    relay.wait_for_log("another stream answers", DEADLINE);
    assert_eq!(client.last_seq(STREAM), 6, "the leaf has stored it");
    throughout("nothing is confirmed", secs(5), || {
        rig.pg.confirmed_flush_lsn(SLOT) == before
    });
    client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
    hub.start_again();
    rig.pg.execute(&insert(7, "account"));
    let expected: Vec<_> = (1..=7).map(uuid).collect();
    eventually("the hub to have all", DEADLINE, || {
        let found = all_ids(&mut hub.try_client()?, STREAM);
        if found == expected {
            Ok(())
        } else {
            Err(std::io::Error::other(format!("{found:?}")))
        }
    });
    wait_for_confirmation(&rig);
    stop(relay);
    assert_eq!(all_ids(&mut hub.client(), STREAM), expected);
}

/// "message stream source header is not allowed": newer servers take it from nobody but themselves.
const SOURCE_HEADER: u32 = 10227;

/// Somebody publishes a copy of the second of six events, with all its headers but the fence.
#[test]
fn a_copy_of_an_old_message_hides_and_repeats_no_event() {
    for (running, with_source) in [(true, false), (false, false), (true, true), (false, true)] {
        let rig = forgetful();
        let mut client = rig.nats.client();
        let mut relay = rig.relay(&[]);
        for number in 1..=6 {
            rig.pg.execute(&insert(number, "account"));
        }
        rig.wait_for_messages(6);
        if !running {
            relay.kill();
        }
        // past the window
        pause(Duration::from_millis(300));
        let original = client.read_all(STREAM).swap_remove(1);
        let mut headers: Vec<(&str, &str)> = (original.headers.iter())
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .filter(|(name, _)| !name.starts_with("Nats-Expected"))
            .collect();
        if with_source {
            headers.push((
                "Nats-Stream-Source",
                "GONE 2 events.> events.> events.account.a",
            ));
        }
        let ack = client.publish("events.account.a", &headers, &original.body);
        if ack["error"]["err_code"] == SOURCE_HEADER {
            continue;
        }
        assert_eq!(ack["seq"], 7, "{ack}");
        if !running {
            relay = rig.relay(&[]);
        }
        rig.pg.execute(&insert(7, "account"));
        rig.wait_for_messages(8);
        stop(relay);
        rig.pg.execute(&insert(8, "account"));
        rig.drain(&[]);
        assert_each_once(&rig, &[STREAM], 8);
        assert_eq!(client.last_seq(STREAM), 9);
    }
}

#[test]
fn ten_thousand_foreign_messages_after_a_crash_repeat_nothing() {
    let rig = forgetful();
    let relay = rig.relay(&[]);
    let load = Load::start(&rig.pg);
    load.wait_for_more(400);
    relay.kill();
    let bodies = (0..12_000).map(|number: u32| number.to_string().into_bytes());
    rig.nats.client().fill("events.foreign.a", bodies);
    let relay = rig.relay(&[]);
    load.wait_for_more(200);
    let count = load.finish();
    assert_each_once(&rig, &[STREAM], count);
    stop(relay);
    rig.drain(&[]);
    assert_each_once(&rig, &[STREAM], count);
}

/// A stream that copies ours takes its place: what it holds of ours is not published again.
#[test]
fn a_sourced_copy_that_takes_its_streams_place_gets_nothing_twice() {
    for killed in [false, true] {
        let rig = forgetful();
        let mut client = rig.nats.client();
        client.add_stream_with(json!({
            "name": "COPY", "sources": [{ "name": STREAM }], "duplicate_window": 100_000_000,
        }));
        let relay = rig.relay(&[]);
        let load = Load::start(&rig.pg);
        load.wait_for_more(400);
        if killed {
            relay.kill();
        } else {
            stop(relay);
        }
        eventually("the copy to be complete", DEADLINE, || {
            client.last_seq("COPY") == client.last_seq(STREAM)
        });
        client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
        edit(
            &mut client,
            "COPY",
            &json!({ "sources": [], "subjects": ["events.>"] }),
        );
        let relay = rig.relay(&[]);
        load.wait_for_more(200);
        let count = load.finish();
        let expected: Vec<String> = (1..=count).map(uuid).collect();
        eventually("all events", DEADLINE, || client.last_seq("COPY") >= count);
        stop(relay);
        rig.drain(&[]);
        assert_eq!(all_ids(&mut client, "COPY"), expected, "killed: {killed}");
    }
}

/// While the source is there, its copies in another of our streams prove nothing and hinder nothing.
#[test]
fn a_stream_of_ours_that_copies_another_of_ours_hinders_nothing() {
    let rig = Rig::start_without_stream();
    let mut client = rig.nats.client();
    client.add_stream("A", &["events.account.>"]);
    client.add_stream_with(json!({
        "name": "B", "subjects": ["events.order.>"], "sources": [{ "name": "A" }],
    }));
    let relay = rig.relay(&[]);
    let load = Load::start(&rig.pg);
    load.wait_for_more(200);
    relay.kill();
    load.wait_for_more(50);
    let relay = rig.relay(&[]);
    load.wait_for_more(200);
    let count = load.finish();
    assert_each_once(&rig, &["A", "B"], count);
    stop(relay);
    rig.drain(&[]);
    assert_each_once(&rig, &["A", "B"], count);
}

/// Both with the default names of slot, publication and bucket.
#[test]
fn two_services_of_two_clusters_in_one_account_do_not_meet() {
    let nats = Nats::start();
    let mut client = nats.client();
    let services: Vec<(Postgres, &str, &str)> = [("shop", "SHOP"), ("crm", "CRM")]
        .into_iter()
        .map(|(prefix, stream)| {
            client.add_stream(stream, &[&format!("{prefix}.>")]);
            let pg = Postgres::builder().own_system_id().build();
            pg.seed_setup();
            (pg, prefix, stream)
        })
        .collect();
    let relays: Vec<Relay> = (services.iter())
        .map(|(pg, prefix, _)| Relay::start(pg, &nats, &["--prefix", prefix, "--hold-back", "2s"]))
        .collect();
    let loads: Vec<Load> = services.iter().map(|(pg, ..)| Load::start(pg)).collect();
    loads.iter().for_each(|load| load.wait_for_more(1500));
    for (((pg, _, stream), relay), load) in services.iter().zip(relays).zip(loads) {
        let count = load.finish();
        let end = pg.current_wal_lsn();
        eventually("all to be confirmed", DEADLINE, || {
            pg.confirmed_flush_lsn(SLOT) >= end
        });
        let expected: Vec<String> = (1..=count).map(uuid).collect();
        assert_eq!(ids(&mut client, stream), expected);
        let log = stop(relay);
        let lines = |text: &str| log.iter().filter(|line| line.contains(text)).count();
        assert_eq!(lines("msg=\"connected\""), 1, "{log:#?}");
        assert_eq!(lines("connecting to NATS again"), 0, "{log:#?}");
    }
}

/// Each relay has a prefix, a database and a slot of its own, and all write into one stream.
fn many_relays(nats: &Nats, ports: &[u16]) {
    const RELAYS: usize = 8;
    const EVENTS: u64 = 100;
    let pg = Postgres::builder()
        .setting("max_connections", "100")
        .build();
    let servers: Vec<String> = ports
        .iter()
        .map(|port| format!("127.0.0.1:{port}"))
        .collect();
    let servers = servers.join(",");
    let relays: Vec<Relay> = (0..RELAYS)
        .map(|number| {
            let name = format!("s{number}");
            pg.execute(&format!("CREATE DATABASE {name}"));
            let mut client = pg.client_of(&name).expect("connect");
            for sql in [
                "CREATE TABLE outbox (id text PRIMARY KEY, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb)",
                &format!("CREATE PUBLICATION {name} FOR TABLE outbox WITH (publish = 'insert')"),
                &format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')"),
            ] {
                client.batch_execute(sql).expect("set up a database");
            }
            let (db, prefix) = (pg.url("postgres", &name), format!("events.{name}"));
            Relay::run(
                &["-db", &db, "-nats", &servers, "-slot", &name, "-prefix", &prefix, "--hold-back", "0"],
                &[],
            )
        })
        .collect();
    for relay in &relays {
        relay.wait_for_log("msg=\"connected\"", DEADLINE);
    }
    thread::scope(|scope| {
        for number in 0..RELAYS {
            let pg = &pg;
            scope.spawn(move || {
                let mut client = pg.client_of(&format!("s{number}")).expect("connect");
                for event in 0..EVENTS {
                    let sql =
                        format!("INSERT INTO outbox VALUES ('{number}-{event}', 't', 'x', '{{}}')");
                    client.batch_execute(&sql).expect("commit an event");
                    pause(Duration::from_millis(20));
                }
            });
        }
    });
    let mut client = nats.client();
    eventually("all events", DEADLINE, || match client.last_seq(STREAM) {
        found if found >= RELAYS as u64 * EVENTS => Ok(()),
        found => Err(found),
    });
    for relay in relays {
        let log = stop(relay);
        let again = |line: &&String| line.contains("connecting to NATS again");
        assert_eq!(log.iter().filter(again).count(), 0, "{log:#?}");
    }
    // a cluster may take a while to find the reading consumer a leader
    let messages = eventually("the stream to be read", DEADLINE, || {
        client.try_read_from(STREAM, 1)
    });
    assert_eq!(
        messages.len(),
        RELAYS * EVENTS as usize,
        "nothing came twice"
    );
    for number in 0..RELAYS {
        let prefix = format!("events.s{number}.");
        let of_it = messages.iter().filter(|it| it.subject.starts_with(&prefix));
        let found: Vec<&str> = of_it.map(StreamMessage::id).collect();
        let expected: Vec<String> = (0..EVENTS)
            .map(|event| format!("{number}-{event}"))
            .collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn eight_relays_on_one_stream_keep_their_connections_and_their_order() {
    let nats = Nats::start();
    nats.client().add_seed_stream();
    many_relays(&nats, &[nats.port()]);
}

#[test]
fn eight_relays_on_one_replicated_stream_keep_their_connections_and_their_order() {
    let cluster = NatsCluster::start();
    cluster.add_stream(STREAM, &["events.>"]);
    let ports = cluster.nodes.each_ref().map(Nats::port);
    many_relays(&cluster.nodes[0], &ports);
}

/// What is consumed from a work queue, by a consumer that never rests.
#[test]
fn a_work_queue_that_is_consumed_loses_and_repeats_nothing_over_crashes_at_load() {
    let rig = Rig::start_without_stream();
    let mut client = rig.nats.client();
    client.add_stream_with(
        json!({ "name": STREAM, "subjects": ["events.>"], "retention": "workqueue" }),
    );
    client.api(
        &format!("CONSUMER.CREATE.{STREAM}.c"),
        &json!({ "stream_name": STREAM, "config": { "name": "c", "durable_name": "c",
            "deliver_subject": "deliver", "ack_policy": "explicit" } }),
    );
    // subscribed before anything is delivered, and on a connection of its own
    let mut consumer =
        NatsClient::try_connect_within(rig.nats.port(), &json!({}), Duration::from_millis(200))
            .expect("connect");
    consumer.try_subscribe("deliver", 2).expect("subscribe");
    let mut consumed = Vec::new();
    let mut consume = |consumed: &mut Vec<String>| {
        while let Ok(message) = consumer.try_next() {
            let id = message
                .headers
                .iter()
                .find(|(name, _)| name == "Nats-Msg-Id");
            consumed.push(id.expect("an event has an id").1.clone());
            let ack = message.reply.expect("it is to be acknowledged");
            consumer
                .try_send(&ack, "", &[], b"+ACK")
                .expect("acknowledge");
        }
    };
    let load = Load::start(&rig.pg);
    for _ in 0..4 {
        let relay = rig.relay(&[]);
        relay.wait_for_log("connected", DEADLINE);
        load.wait_for_more(200);
        relay.kill();
        consume(&mut consumed);
    }
    let count = load.finish();
    let relay = rig.relay(&[]);
    let expected: Vec<String> = (1..=count).map(uuid).collect();
    eventually("all to be consumed", DEADLINE, || {
        consume(&mut consumed);
        consumed.len() >= expected.len()
    });
    stop(relay);
    consume(&mut consumed);
    assert_eq!(consumed, expected);
}

/// What is purged is the operator's; what comes after it is whole.
#[test]
fn a_stream_purged_under_load_repeats_nothing_and_loses_nothing_that_comes_after() {
    for killed in [false, true] {
        let rig = Rig::start();
        let mut client = rig.nats.client();
        let mut relay = rig.relay(&AT_ONCE);
        relay.wait_for_log("connected", DEADLINE);
        let load = Load::start(&rig.pg);
        for _ in 0..3 {
            load.wait_for_more(150);
            if killed {
                relay.kill();
            }
            client.api(&format!("STREAM.PURGE.{STREAM}"), &Value::Null);
            if killed {
                relay = rig.relay(&AT_ONCE);
            }
        }
        load.wait_for_more(150);
        let count = load.finish();
        let last = uuid(count);
        eventually("the last event", DEADLINE, || {
            ids(&mut client, STREAM).last() == Some(&last)
        });
        wait_for_confirmation(&rig);
        stop(relay);
        let found = ids(&mut client, STREAM);
        let first = count + 1 - found.len() as u64;
        assert_eq!(found, (first..=count).map(uuid).collect::<Vec<_>>());
    }
}

/// The server changes what it says of the stream's creation (nats-server up to 2.14.5); its messages say that it is the same.
#[test]
fn a_stream_edited_between_two_restarts_of_its_server_is_the_same_stream() {
    for running in [true, false] {
        let rig = Rig::start();
        let mut relay = Some(rig.relay(&AT_ONCE));
        rig.pg.execute(&insert(1, "account"));
        wait_for_confirmation(&rig);
        if !running {
            relay.take().map(stop);
        }
        rig.nats.restart();
        edit(
            &mut rig.nats.client(),
            STREAM,
            &json!({ "max_msgs": 1_000_000 }),
        );
        rig.nats.restart();
        let relay = relay.unwrap_or_else(|| rig.relay(&AT_ONCE));
        rig.pg.execute(&insert(2, "account"));
        wait_for_confirmation(&rig);
        // a look at the stream comes every 10 s
        throughout("the relay runs", secs(11), || relay.is_running());
        rig.pg.execute(&insert(3, "account"));
        wait_for_confirmation(&rig);
        stop(relay);
        assert_each_once(&rig, &[STREAM], 3);
        assert_eq!(rig.nats.client().last_seq(STREAM), 3);
    }
}
