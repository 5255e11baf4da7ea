//! Buckets for the checkpoint that somebody has made, or edited: `check` and `setup` name what is wrong with one, and the relay
//! says the same and ends; where a bucket does no harm, nobody says a word.

use crate::check_postgres::{check, finding, set_up};
use crate::command::on;
use crate::rig::{DEADLINE, Rig, STREAM, uuid};
use crate::support::nats::NatsCluster;
use crate::support::natsclient::NatsClient;
use crate::support::postgres::Postgres;
use crate::support::relay::{Relay, halts};
use crate::support::wait::eventually;
use serde_json::{Value, json};

const BUCKET: &str = "KV_jetstream_outbox";
const DRAIN: [&str; 3] = ["-drain", "-hold-back", "0"];

/// Puts a bucket with these settings in place of the present one; `null` leaves one out.
fn replace(nats: &mut NatsClient, good: &Value, settings: &Value) {
    nats.api(&format!("STREAM.DELETE.{BUCKET}"), &Value::Null);
    let mut config = good.as_object().expect("a configuration").clone();
    config.extend(settings.as_object().expect("settings").clone());
    config.retain(|_, value| !value.is_null());
    nats.add_stream_with(Value::Object(config));
}

/// What `check` and `setup` say of the bucket.
#[track_caller]
fn is_found(rig: &Rig, level: &str, told: &str) {
    let findings = check(rig, &[], &[("nats.checkpoint", level)]);
    let found = &finding(&findings, "nats.checkpoint")["found"];
    assert_eq!(found, &json!(format!("bucket jetstream_outbox {told}")));
    let ended = on(rig, &["setup"]);
    let line = format!("differs  checkpoint bucket jetstream_outbox: it {told}: ");
    assert!(ended.with(78).contains(&line), "{ended:?}");
}

/// The events 1 to `count` are in the stream, once, in order.
#[track_caller]
fn has_all(rig: &Rig, count: u64) {
    assert_eq!(rig.ids(), (1..=count).map(uuid).collect::<Vec<_>>());
}

#[test]
fn a_bucket_that_takes_no_record_is_named_by_all_and_ends_the_relay() {
    let rig = set_up(Postgres::builder());
    let mut nats = rig.nats.client();
    let good = nats.stream_info(BUCKET)["config"].clone();
    nats.add_stream("KV_other", &["$KV.other.>"]);
    for (number, (settings, told, fix)) in (1..).zip([
        (
            json!({ "mirror": { "name": "KV_other" }, "subjects": null }),
            "is a mirror of KV_other",
            "-checkpoint",
        ),
        (
            json!({ "subjects": ["other.>"] }),
            "captures other.>, not $KV.jetstream_outbox.>",
            "--subjects='$KV.jetstream_outbox.>'",
        ),
        (
            json!({ "discard_new_per_subject": true }),
            "refuses another value of a key that has one (discard new per subject)",
            "--no-discard-per-subject",
        ),
        (
            json!({ "retention": "interest", "deny_delete": false }),
            "has interest retention",
            "nats kv del jetstream_outbox",
        ),
        (
            json!({ "allow_msg_counter": true, "discard": "old" }),
            "counts (allow_msg_counter)",
            "nats kv del jetstream_outbox",
        ),
    ]) {
        replace(&mut nats, &good, &settings);
        rig.commit_event(number, "a");
        is_found(&rig, "fail", told);
        halts(rig.relay(&DRAIN), 78, &["jetstream_outbox", told, fix]);
        // as it says: it goes on with another, or with this one once it is mended
        match fix.starts_with("--") {
            true => drop(nats.api(&format!("STREAM.UPDATE.{BUCKET}"), &good)),
            false => replace(&mut nats, &good, &json!({})),
        }
        rig.drain(&DRAIN);
        has_all(&rig, number);
    }
}

/// Another slot's record has taken the room.
#[test]
fn a_bucket_without_room_for_another_key_is_named_and_the_relay_of_the_one_that_has_a_key_goes_on()
{
    let rig = set_up(Postgres::builder());
    let mut nats = rig.nats.client();
    let good = nats.stream_info(BUCKET)["config"].clone();
    replace(&mut nats, &good, &json!({ "max_msgs": 1 }));
    rig.commit_event(1, "a");
    rig.drain(&DRAIN);
    check(&rig, &[], &[]);
    on(&rig, &["setup"]).with(0);
    nats.api(&format!("STREAM.PURGE.{BUCKET}"), &Value::Null);
    nats.publish("$KV.jetstream_outbox.other", &[], b"{}");
    let told = "is full (max_msgs 1, discard new)";
    let findings = check(&rig, &[], &[("nats.checkpoint", "fail")]);
    let found = finding(&findings, "nats.checkpoint")["found"].to_string();
    assert!(found.contains(told), "{found}");
    rig.commit_event(2, "a");
    halts(rig.relay(&DRAIN), 78, &[told, "--max-msgs=-1"]);
    nats.api(&format!("STREAM.UPDATE.{BUCKET}"), &good);
    rig.drain(&DRAIN);
    has_all(&rig, 2);
}

#[test]
fn a_bucket_that_may_lose_the_record_is_warned_of() {
    let rig = set_up(Postgres::builder());
    let mut nats = rig.nats.client();
    let good = nats.stream_info(BUCKET)["config"].clone();
    nats.add_stream("KV_other", &["$KV.other.>"]);
    for (number, (settings, told)) in (1..).zip([
        (
            json!({ "sources": [{ "name": "KV_other" }] }),
            "copies from other streams (sources)",
        ),
        (
            json!({ "retention": "workqueue", "deny_delete": false }),
            "is a work queue",
        ),
        (
            json!({ "max_msgs": 10, "discard": "old" }),
            "drops the oldest value of any key at its limit (max_msgs or max_bytes, discard old)",
        ),
        (
            json!({ "max_msgs_per_subject": -1 }),
            "keeps each value that a key ever had (max_msgs_per_subject)",
        ),
    ]) {
        replace(&mut nats, &good, &settings);
        rig.commit_event(number, "a");
        is_found(&rig, "warn", told);
        rig.drain(&DRAIN);
        rig.drain(&DRAIN);
        has_all(&rig, number);
    }
}

#[test]
fn a_bucket_that_does_no_harm_is_left_in_peace() {
    let rig = set_up(Postgres::builder());
    let mut nats = rig.nats.client();
    let good = nats.stream_info(BUCKET)["config"].clone();
    for (number, settings) in (1..).zip([
        json!({ "compression": "s2", "allow_direct": false, "allow_msg_ttl": true }),
        json!({ "deny_purge": true, "allow_rollup_hdrs": false }),
        // what is republished comes into the stream of the events, as messages of others
        json!({ "republish": { "src": ">", "dest": "events.>" } }),
        json!({ "max_msgs_per_subject": 64, "max_bytes": 1_000_000 }),
    ]) {
        replace(&mut nats, &good, &settings);
        rig.commit_event(number, "a");
        check(&rig, &[], &[]);
        on(&rig, &["setup"]).with(0);
        for _ in 0..2 {
            rig.drain(&DRAIN);
        }
        let events = rig.messages().into_iter();
        let events = events.filter(|it| it.header("Outbox-Position").is_some());
        let ids: Vec<String> = events.map(|it| it.id().to_string()).collect();
        assert_eq!(ids, (1..=number).map(uuid).collect::<Vec<_>>());
    }
}

/// The relay learns of it by its next write.
#[test]
fn a_bucket_that_is_sealed_under_a_running_relay_ends_it_by_name() {
    let rig = set_up(Postgres::builder());
    let mut nats = rig.nats.client();
    let relay = rig.relay(&["-hold-back", "0"]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    let mut config = nats.stream_info(BUCKET)["config"].clone();
    config["sealed"] = json!(true);
    nats.api(&format!("STREAM.UPDATE.{BUCKET}"), &config);
    rig.commit_event(2, "a");
    halts(relay, 78, &["it is sealed", "nats kv del jetstream_outbox"]);
    nats.api(&format!("STREAM.DELETE.{BUCKET}"), &Value::Null);
    rig.drain(&DRAIN);
    has_all(&rig, 2);
}

/// The bucket was full when the relay wrote, and it waits for whoever makes room.
#[test]
fn a_bucket_that_has_become_full_is_waited_for_and_named() {
    let rig = set_up(Postgres::builder());
    let mut nats = rig.nats.client();
    let good = nats.stream_info(BUCKET)["config"].clone();
    rig.commit_event(1, "a");
    rig.drain(&DRAIN);
    let bytes = nats.stream_info(BUCKET)["state"]["bytes"].as_u64();
    let mut full = good.clone();
    full["max_bytes"] = json!(bytes.expect("a size") - 1000);
    nats.api(&format!("STREAM.UPDATE.{BUCKET}"), &full);
    let name = full["max_bytes"].to_string();
    is_found(
        &rig,
        "fail",
        &format!("is full (max_bytes {name}, discard new)"),
    );
    rig.commit_event(2, "a");
    let mut relay = rig.relay(&DRAIN);
    let line = relay.wait_for_log("has no room for the record", DEADLINE);
    assert!(
        line.contains("KV_jetstream_outbox, with a larger --max-bytes"),
        "{line}"
    );
    assert!(relay.is_running());
    nats.api(&format!("STREAM.UPDATE.{BUCKET}"), &good);
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    has_all(&rig, 2);
}

/// There a write that finds no room is answered otherwise.
#[test]
fn a_replicated_bucket_that_has_become_full_is_waited_for_and_named() {
    let cluster = NatsCluster::start();
    cluster.add_stream(STREAM, &["events.>"]);
    let (pg, node) = (Postgres::start(), &cluster.nodes[0]);
    crate::command::at(&pg, node, &["setup"]).with(0);
    let commit = |number: u64| {
        let id = uuid(number);
        pg.execute(&format!(
            "INSERT INTO outbox VALUES ('{id}', 'account', 'a', '{{}}')"
        ));
    };
    commit(1);
    assert_eq!(Relay::start(&pg, node, &DRAIN).wait_exit(DEADLINE), 0);
    let mut nats = node.client();
    let info = nats.stream_info(BUCKET);
    let (good, bytes) = (&info["config"], info["state"]["bytes"].as_u64());
    assert_eq!(good["num_replicas"], 3);
    let mut full = good.clone();
    full["max_bytes"] = json!(bytes.expect("a size") - 100);
    nats.api(&format!("STREAM.UPDATE.{BUCKET}"), &full);
    commit(2);
    let mut relay = Relay::start(&pg, node, &DRAIN);
    relay.wait_for_log("has no room for the record", DEADLINE);
    assert!(relay.is_running());
    nats.api(&format!("STREAM.UPDATE.{BUCKET}"), good);
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    assert_eq!(nats.stream_info(STREAM)["state"]["messages"], 2);
}

#[test]
fn a_bucket_has_as_many_replicas_as_the_streams_or_is_warned_of() {
    let cluster = NatsCluster::start();
    cluster.add_stream(STREAM, &["events.>"]);
    let pg = Postgres::start();
    let mut nats = cluster.nodes[0].client();
    let setup = || crate::command::at(&pg, &cluster.nodes[0], &["setup"]);
    setup().with(0);
    let replicas = |nats: &mut NatsClient| {
        eventually("the bucket to answer", DEADLINE, || {
            let info = nats.try_api(&format!("STREAM.INFO.{BUCKET}"), &Value::Null)?;
            std::io::Result::Ok(info["config"].clone())
        })
    };
    let mut config = replicas(&mut nats);
    assert_eq!(config["num_replicas"], 3, "setup makes it so");
    config["num_replicas"] = json!(1);
    nats.api(&format!("STREAM.UPDATE.{BUCKET}"), &config);
    let told = "it has 1 of the 3 replicas that the streams of the events have";
    let ended = setup();
    assert!(ended.with(78).contains(told), "{ended:?}");
    let ended = crate::command::at(&pg, &cluster.nodes[0], &["check"]);
    assert!(ended.stdout.contains("--replicas=3"), "{ended:?}");
}
