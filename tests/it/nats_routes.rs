//! Where a subject leads is the account's matter: mappings, partitions and imports. Where an event stays in the stream that
//! captures its subject, all promises hold; where it does not, the relay says so and ends.

use crate::operators::{Load, assert_each_once, stop};
use crate::rig::{DEADLINE, Rig, STREAM, uuid};
use crate::support::nats::{Builder, Nats};
use crate::support::natsclient::StreamMessage;
use crate::support::postgres::Postgres;
use crate::support::relay::halts;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;

fn rig(config: &str, streams: &[(&str, &str)]) -> Rig {
    with_streams(Nats::builder().config(config), streams)
}

fn with_streams(nats: Builder, streams: &[(&str, &str)]) -> Rig {
    let rig = Rig {
        pg: Postgres::start(),
        nats: nats.build(),
    };
    rig.pg.seed_setup();
    let mut client = rig.nats.client();
    for (name, subject) in streams {
        client.add_stream(name, &[subject]);
    }
    rig
}

/// By the event's id, and at random: both stay in the stream, under other subjects.
#[test]
fn mappings_within_the_stream_lose_and_repeat_nothing() {
    for mapping in [
        r#""events.*.*": "events.{{partition(3,2)}}.{{wildcard(1)}}.{{wildcard(2)}}""#,
        r#""events.*.*": [
            { destination: "events.x.{{wildcard(1)}}.{{wildcard(2)}}", weight: "50%" }
            { destination: "events.y.{{wildcard(1)}}.{{wildcard(2)}}", weight: "50%" } ]"#,
    ] {
        let rig = rig(
            &format!("mappings = {{ {mapping} }}"),
            &[(STREAM, "events.>")],
        );
        let load = Load::start(&rig.pg);
        for round in 0..4 {
            let relay = rig.relay(&[]);
            load.wait_for_more(200);
            match round % 2 {
                0 => relay.kill(),
                _ => drop(stop(relay)),
            }
        }
        let count = load.finish();
        rig.drain(&[]);
        assert_each_once(&rig, &[STREAM], count);
        assert_eq!(
            rig.nats.client().last_seq(STREAM),
            count,
            "nothing came twice"
        );
        let subjects: BTreeSet<_> = rig.subjects().into_iter().collect();
        assert!(
            subjects.iter().all(|it| it.split('.').count() == 4),
            "{subjects:?}"
        );
    }
}

/// The streams capture what the subjects are changed into, and the relay cannot know which.
#[test]
fn a_subject_that_is_changed_on_its_way_to_another_stream_is_named() {
    let partition = r#""events.*.*": "events.{{partition(2,2)}}.{{wildcard(1)}}.{{wildcard(2)}}""#;
    for (mapping, streams, named) in [
        (
            r#""events.>": "evt.>""#,
            vec![("EVT", "evt.>")],
            "EVT stores",
        ),
        (
            partition,
            vec![("P0", "events.0.>"), ("P1", "events.1.>")],
            "stores what is published there",
        ),
    ] {
        let rig = rig(&format!("mappings = {{ {mapping} }}"), &streams);
        rig.commit_event(1, "a");
        for delivery in ["exactly-once", "at-least-once"] {
            let relay = rig.relay(&["-delivery", delivery]);
            halts(relay, 78, &["events.", named, "mapping"]);
        }
        for (stream, _) in &streams {
            assert_eq!(rig.nats.client().last_seq(stream), 0);
        }
    }
}

/// The account's owner changes the mapping under a running relay: every second publish goes to another stream, which acknowledges
/// it as the right one would.
#[test]
fn a_subject_that_only_sometimes_leads_to_its_stream_halts_the_relay() {
    let mapping = |lines: &str| format!("mappings = {{ {lines} }}");
    let halved = r#""events.>": [ { destination: "events.>", weight: "50%" }, { destination: "other.>", weight: "50%" } ]"#;
    for delivery in ["exactly-once", "at-least-once"] {
        let nats = Nats::builder()
            .file("mapping.conf", mapping(""))
            .config("include mapping.conf");
        let rig = with_streams(nats, &[(STREAM, "events.>"), ("OTHER", "other.>")]);
        let map = |lines| {
            fs::write(rig.nats.dir().join("mapping.conf"), mapping(lines)).expect("write");
            rig.nats.reload();
        };
        let args = ["-delivery", delivery];
        let load = Load::start(&rig.pg);
        let relay = rig.relay(&args);
        load.wait_for_more(200);
        map(halved);
        halts(relay, 65, &["another stream answers", "mapping"]);
        // as it says: the subject leads to one stream
        map("");
        let count = load.finish();
        rig.drain(&args);
        if delivery == "exactly-once" {
            assert_each_once(&rig, &[STREAM], count);
        }
        let messages = rig.messages();
        let stored: BTreeSet<_> = messages.iter().map(StreamMessage::id).collect();
        let committed: Vec<_> = (1..=count).map(uuid).collect();
        let missing = committed.iter().find(|it| !stored.contains(it.as_str()));
        assert_eq!(missing, None, "{delivery}");
    }
}

/// The streams are another account's, and what is published is its service.
fn importing(subject: &str, captured: &str) -> Rig {
    let config = format!(
        r#"accounts {{
            ORDERS {{
                jetstream: enabled
                users: [ {{ user: admin, password: p }} ]
                exports: [ {{ service: "$JS.API.>" }}, {{ service: "$KV.>" }}, {{ service: "{captured}" }} ]
            }}
            APP {{
                users: [ {{ user: relay, password: p }} ]
                imports: [
                    {{ service: {{ account: ORDERS, subject: "$JS.API.>" }}, to: "$JS.orders.API.>" }}
                    {{ service: {{ account: ORDERS, subject: "$KV.>" }}, to: "$JS.orders.API.$KV.>" }}
                    {{ service: {{ account: ORDERS, subject: "{captured}" }}, to: "{subject}" }}
                ]
            }}
        }}
        no_auth_user: relay"#
    );
    let nats = Nats::builder()
        .config(&config)
        .client_options(json!({ "user": "admin", "pass": "p" }))
        .build();
    let rig = Rig {
        pg: Postgres::start(),
        nats,
    };
    rig.pg.seed_setup();
    rig.nats.client().add_stream(STREAM, &[captured]);
    rig
}

const OF_ORDERS: [&str; 2] = ["-nats-api-prefix", "$JS.orders.API"];

#[test]
fn the_streams_of_another_account_are_used_through_its_exports() {
    let rig = importing("events.>", "events.>");
    let load = Load::start(&rig.pg);
    for _ in 0..2 {
        let relay = rig.relay(&OF_ORDERS);
        load.wait_for_more(200);
        relay.kill();
    }
    let count = load.finish();
    rig.drain(&OF_ORDERS);
    assert_each_once(&rig, &[STREAM], count);
    assert_eq!(
        rig.nats.client().last_seq(STREAM),
        count,
        "nothing came twice"
    );
    assert_eq!(rig.nats.client().message_count("KV_jetstream_outbox"), 1);
}

#[test]
fn an_import_under_another_subject_is_named() {
    let rig = importing("events.>", "orders.>");
    rig.commit_event(1, "a");
    halts(rig.relay(&OF_ORDERS), 78, &[STREAM, "stores", "import"]);
    // as it says, one way: a name for both
    let relay = rig.relay(&[&OF_ORDERS[..], &["-max-outage", "1s", "-prefix", "none"]].concat());
    relay.wait_for_log("no stream captures it; create one", DEADLINE);
    assert_eq!(rig.nats.client().last_seq(STREAM), 0);
}
