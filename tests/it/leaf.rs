//! The relay at a leaf node, with the streams and the checkpoint in the hub's domain, while the way between the two and either
//! server come and go.

use crate::operators::{Load, assert_each_once, stop, wait_for_confirmation};
use crate::rig::{DEADLINE, Rig, STREAM};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::proxy::{Mode, Proxy};
use crate::support::relay::Relay;
use crate::support::wait::eventually;
use serde_json::json;

/// The hub's stream forgets ids at once, so that JetStream does not help by knowing them.
#[test]
fn a_relay_at_a_leaf_node_loses_and_repeats_nothing_while_the_hub_comes_and_goes() {
    let mut proxy = None;
    let by_proxy = |port| proxy.insert(Proxy::start(port)).port();
    let (nats, leaf) = Nats::hub_and_leaf_by(by_proxy, "", &json!({}));
    let proxy = proxy.expect("it was asked for");
    let rig = Rig {
        pg: Postgres::start(),
        nats,
    };
    rig.pg.seed_setup();
    rig.nats.client().add_stream_with(
        json!({ "name": STREAM, "subjects": ["events.>"], "duplicate_window": 100_000_000 }),
    );
    let args = ["-nats-api-prefix", "$JS.hub.API", "-hold-back", "0"];
    let relay = Relay::start(&rig.pg, &leaf, &args);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    let load = Load::start(&rig.pg);
    let grows = |what: &str| {
        let count = || rig.nats.try_client().map(|mut it| it.message_count(STREAM));
        let before = eventually(what, DEADLINE, count);
        eventually(what, DEADLINE, || match count() {
            Ok(now) if now >= before + 200 => Ok(()),
            now => Err(format!("{now:?} after {before}")),
        });
    };
    grows("the stream to grow");
    for (what, fault) in [
        ("after a cut", &(|| proxy.cut()) as &dyn Fn()),
        ("after an outage of the way", &|| {
            proxy.set(Mode::Refuse);
            load.wait_for_more(300);
            proxy.set(Mode::Pass);
        }),
        ("after a way that stood still", &|| {
            proxy.set(Mode::Freeze);
            load.wait_for_more(300);
            proxy.set(Mode::Pass);
        }),
        ("after a restart of the hub", &|| rig.nats.restart()),
        ("after a crash of the hub", &|| {
            rig.nats.kill();
            load.wait_for_more(300);
            rig.nats.start_again();
        }),
        ("after a restart of the leaf node", &|| leaf.restart()),
    ] {
        fault();
        grows(what);
    }
    let count = load.finish();
    wait_for_confirmation(&rig);
    stop(relay);
    assert_each_once(&rig, &[STREAM], count);
    let mut client = rig.nats.client();
    assert_eq!(client.last_seq(STREAM), count, "nothing came twice");
    // the checkpoint is the hub's, and the leaf node has nothing
    assert_eq!(client.message_count("KV_jetstream_outbox"), 1);
    let leafs = leaf.client().api("STREAM.NAMES", &json!({}));
    assert_eq!(leafs["total"], 0, "{leafs}");
}
