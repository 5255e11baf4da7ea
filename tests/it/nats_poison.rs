//! Events that the server ends the connection over, or leaves without an answer, and streams that refuse whatever comes: they
//! are put aside or halt the relay by name. An outage never puts anything aside.

use crate::operators::{Load, assert_each_once, wait_for_confirmation};
use crate::rig::{DEADLINE, Rig, STREAM, stream, uuid};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::proxy::{Mode, Proxy};
use crate::support::relay::{Relay, halts};
use crate::support::wait::{eventually, pause};
use serde_json::{Value, json};
use std::time::Duration;

const PARKED: &str = "jetstream_outbox.parked";

/// A server with these lines in its configuration, and a stream for what is parked.
fn rig(config: &str) -> Rig {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder()
            .config(config)
            .client_options(json!({ "user": "admin", "pass": "p" }))
            .build(),
    };
    rig.pg.seed_setup();
    let mut client = rig.nats.client();
    client.add_seed_stream();
    client.add_stream("parked", &[PARKED]);
    rig
}

/// Nine events in one transaction, so that they are on their way together; the fifth is `events.account.<aggregateid>`.
fn commit_nine(rig: &Rig, aggregateid: &str) {
    let row = |number: u64| {
        let of_it = match number {
            5 => aggregateid,
            _ => "a",
        };
        let id = uuid(number);
        format!("INSERT INTO outbox VALUES ('{id}', 'account', '{of_it}', '{{\"n\": {number}}}');")
    };
    let rows: String = (1..=9).map(row).collect();
    rig.pg.execute(&format!("BEGIN; {rows} COMMIT"));
}

fn ids(rig: &Rig, stream: &str) -> Vec<String> {
    let messages = rig.nats.client().read_all(stream).into_iter();
    messages.map(|message| message.id().to_string()).collect()
}

/// Eight events are stored in order, and the fifth is parked with the whole of its body, because of `words`.
fn assert_fifth_parked(rig: &Rig, words: &str) {
    let others: Vec<_> = (1..=9).filter(|number| *number != 5).map(uuid).collect();
    assert_eq!(ids(rig, STREAM), others);
    let parked = rig.nats.client().read_all("parked");
    assert_eq!(parked.len(), 1);
    assert_eq!(parked[0].id(), uuid(5));
    assert_eq!(parked[0].text(), r#"{"n":5}"#);
    let cause = parked[0].header("Outbox-Parked").expect("a cause");
    assert!(cause.contains(words), "{cause}");
}

const DELIVERIES: [&str; 2] = ["exactly-once", "at-least-once"];

/// The relay halts by name; with `park` it goes on.
fn is_poison(rig: &Rig, aggregateid: &str, words: &str) {
    commit_nine(rig, aggregateid);
    for delivery in DELIVERIES {
        let fifth = uuid(5);
        halts(
            rig.relay(&["-delivery", delivery]),
            65,
            &[&fifth, "public.outbox", words, "-on-poison"],
        );
    }
    let before: Vec<_> = (1..=4).map(uuid).collect();
    assert_eq!(ids(rig, STREAM)[..4], before);
}

#[test]
fn an_event_whose_line_is_too_long_for_the_server_is_poison() {
    for delivery in DELIVERIES {
        let rig = rig("max_control_line: 700");
        let long = "x".repeat(800);
        rig.pg
            .execute("ALTER TABLE outbox ALTER aggregateid TYPE text");
        let words = "maximum control line exceeded";
        if delivery == "exactly-once" {
            is_poison(&rig, &long, words);
        } else {
            commit_nine(&rig, &long);
        }
        rig.drain(&["-on-poison", "park", "-delivery", delivery]);
        assert_fifth_parked(&rig, words);
    }
}

#[test]
fn an_event_whose_subject_is_not_permitted_is_poison() {
    for delivery in DELIVERIES {
        let rig = rig("no_auth_user: relay
             authorization { users: [
                 { user: admin, password: p }
                 { user: relay, password: p, permissions { publish { deny: \"events.account.secret\" } } }
             ] }");
        let words = "Permissions Violation for Publish";
        if delivery == "exactly-once" {
            is_poison(&rig, "secret", words);
        } else {
            commit_nine(&rig, "secret");
        }
        rig.drain(&["-on-poison", "park", "-delivery", delivery]);
        assert_fifth_parked(&rig, words);
    }
}

/// Somebody between ends the connection at the event, and says nothing.
#[test]
fn an_event_that_the_connection_ends_at_each_time_is_poison() {
    for delivery in DELIVERIES {
        let rig = rig("");
        let proxy = Proxy::start(rig.nats.port());
        proxy.set(Mode::EndAt("account.poison"));
        commit_nine(&rig, "poison");
        let run = |policy: &str| {
            let args = ["-drain", "-on-poison", policy, "-delivery", delivery];
            Relay::start_at(rig.pg.port(), proxy.port(), &args)
        };
        halts(run("stop"), 65, &[&uuid(5), "without a word", "-on-poison"]);
        // the parked event's header names its subject, which ends no connection any more
        let mut relay = run("park");
        relay.wait_for_log("at it each time, without a word", DEADLINE);
        proxy.set(Mode::Pass);
        assert_eq!(relay.wait_exit(DEADLINE), 0);
        assert_fifth_parked(&rig, "without a word");
    }
}

/// Each event ends it: that is no matter of one event.
#[test]
fn a_server_that_ends_the_connection_at_every_event_halts_whatever_the_policy() {
    let rig = rig("");
    let proxy = Proxy::start(rig.nats.port());
    proxy.set(Mode::EndAt("HPUB events."));
    commit_nine(&rig, "a");
    let relay = Relay::start_at(rig.pg.port(), proxy.port(), &["-on-poison", "park"]);
    halts(relay, 65, &[&uuid(2), "the event before", "not put aside"]);
    assert_eq!(ids(&rig, "parked"), [uuid(1)]);
    assert_eq!(rig.messages().len(), 0);
}

#[test]
fn no_outage_puts_an_event_aside() {
    let rig = rig("");
    let proxy = Proxy::start(rig.nats.port());
    let args = ["-on-poison", "park", "-hold-back", "0", "-inflight", "64"];
    let relay = Relay::start_at(rig.pg.port(), proxy.port(), &args);
    let load = Load::start(&rig.pg);
    for round in 0..60 {
        load.wait_for_more(10);
        match round % 4 {
            0 => proxy.cut(),
            1 => proxy.reset(),
            // nothing is answered, and then the connection ends
            2 => {
                proxy.set(Mode::Freeze);
                pause(Duration::from_millis(30));
                proxy.cut();
                proxy.set(Mode::Pass);
            }
            _ => {
                rig.nats.kill();
                rig.nats.start_again();
            }
        }
    }
    let count = load.finish();
    eventually("all events", DEADLINE, || {
        rig.nats.client().message_count(STREAM) >= count
    });
    wait_for_confirmation(&rig);
    assert_each_once(&rig, &[STREAM], count);
    assert_eq!(rig.nats.client().message_count("parked"), 0);
    let log = relay.log().join("\n");
    assert!(!log.contains("parking an event"), "{log}");
}

#[test]
fn a_stream_that_takes_no_event_halts_the_relay_by_name() {
    for (settings, words) in [
        (json!({ "allow_msg_counter": true }), "allow_msg_counter"),
        (json!({ "sealed": true }), "is sealed"),
    ] {
        for policy in ["stop", "park"] {
            let rig = rig("");
            let mut client = rig.nats.client();
            let args = ["-on-poison", policy];
            let relay = rig.relay(&args);
            rig.commit_event(1, "a");
            rig.wait_for_messages(1);
            if settings["sealed"] == true {
                rig.set_stream(&settings);
            } else {
                client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
                client.add_stream_with(stream(&settings));
            }
            rig.commit_event(2, "a");
            halts(relay, 78, &[STREAM, words]);
            halts(rig.relay(&args), 78, &[STREAM, words]);
            assert_eq!(client.message_count("parked"), 0, "{words}");
        }
    }
}

/// It captures nothing: the relay waits for one that does, and goes on by itself.
#[test]
fn a_mirror_is_no_stream_of_the_events() {
    let rig = rig("");
    let mut client = rig.nats.client();
    client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
    client.add_stream("ORIGIN", &["origin.>"]);
    client.add_stream_with(json!({ "name": STREAM, "mirror": { "name": "ORIGIN" } }));
    let relay = rig.relay(&["-on-poison", "park"]);
    rig.commit_event(1, "a");
    relay.wait_for_log("no stream captures it", DEADLINE);
    assert_eq!(client.message_count("parked"), 0);
    client.add_stream("EVENTS", &["events.>"]);
    eventually("the event", DEADLINE, || {
        client.message_count("EVENTS") == 1
    });
}

/// What the stream does not allow, and what it cannot read, in a header that the row brings.
#[test]
fn an_event_that_asks_for_what_its_stream_does_not_allow_is_poison() {
    let day = "'24h'";
    let [exactly_once, at_least_once] = DELIVERIES;
    let schedules = json!({ "allow_msg_schedules": true, "allow_rollup_hdrs": true });
    for (settings, delivery, header, value, words) in [
        (
            json!({}),
            exactly_once,
            "Nats-TTL",
            day,
            "per-message TTL is disabled",
        ),
        (
            json!({ "allow_msg_ttl": true }),
            exactly_once,
            "Nats-TTL",
            "'soon'",
            "invalid per-message TTL",
        ),
        (
            json!({}),
            at_least_once,
            "Nats-Schedule",
            "'@every 1h'",
            "message schedules is disabled",
        ),
        (
            schedules,
            at_least_once,
            "Nats-Schedule",
            "'sometime'",
            "message schedules",
        ),
    ] {
        let rig = Rig::start_with_tables(
            "CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload text, wish text)",
        );
        let mut client = rig.nats.client();
        client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
        client.add_stream_with(stream(&settings));
        client.add_stream("parked", &[PARKED]);
        rig.pg.execute(&format!(
            "INSERT INTO outbox VALUES ('1', 'a', 'x', 'one', NULL), ('2', 'a', 'x', 'two', {value}), ('3', 'a', 'x', 'three', NULL)"
        ));
        let mapped = format!("wish={header}");
        let args = ["-header", &mapped, "-delivery", delivery];
        halts(rig.relay(&args), 65, &["row 2", words]);
        rig.drain(&[&args[..], &["-on-poison", "park"]].concat());
        assert_eq!(ids(&rig, STREAM), ["1", "3"]);
        let parked = client.read_all("parked");
        assert_eq!(parked.len(), 1, "{words}");
        assert_eq!((parked[0].id(), parked[0].text()), ("2", "two"));
        let cause = parked[0].header("Outbox-Parked").expect("a cause");
        assert!(cause.contains(words), "{cause}");
    }
}
