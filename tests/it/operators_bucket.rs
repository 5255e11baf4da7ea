//! Operators delete the checkpoint's bucket, and put it back to an older state.

use crate::operators::{Load, assert_each_once, edit, insert, stop, wait_for_confirmation};
use crate::rig::{DEADLINE, Rig, STREAM};
use crate::support::natsclient::NatsClient;
use crate::support::relay::halts;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

pub const BUCKET: &str = "KV_jetstream_outbox";
const AT_ONCE: [&str; 2] = ["--hold-back", "0"];

/// JetStream does not help by knowing the ids.
fn forgetful() -> Rig {
    let rig = Rig::start();
    let window = json!({ "duplicate_window": 100_000_000 });
    edit(&mut rig.nats.client(), STREAM, &window);
    rig
}

fn delete_bucket(client: &mut NatsClient) {
    client.api(&format!("STREAM.DELETE.{BUCKET}"), &Value::Null);
}

/// The record's subject, and its value.
pub fn record(client: &mut NatsClient) -> (String, Vec<u8>) {
    try_record(client).expect("read the record")
}

/// The same while NATS may be away, or nothing is written yet.
pub fn try_record(client: &mut NatsClient) -> std::io::Result<(String, Vec<u8>)> {
    let last = json!({ "last_by_subj": "$KV.jetstream_outbox.>" });
    let found = client.try_api(&format!("STREAM.MSG.GET.{BUCKET}"), &last)?;
    let message = &found["message"];
    let value = message["data"].as_str().expect("a value");
    let subject = message["subject"].as_str().expect("a subject");
    let value = BASE64_STANDARD.decode(value).expect("base64");
    Ok((subject.to_string(), value))
}

#[test]
fn a_bucket_deleted_under_a_running_relay_is_created_again_and_nothing_is_lost_or_repeated() {
    for args in [&[][..], &AT_ONCE] {
        let rig = forgetful();
        let mut client = rig.nats.client();
        let relay = rig.relay(args);
        relay.wait_for_log("connected", DEADLINE);
        let load = Load::start(&rig.pg);
        load.wait_for_more(200);
        delete_bucket(&mut client);
        load.wait_for_more(200);
        let count = load.finish();
        assert_each_once(&rig, &[STREAM], count);
        if args == AT_ONCE {
            wait_for_confirmation(&rig);
        }
        rig.pg.execute(&insert(count + 1, "account"));
        assert_each_once(&rig, &[STREAM], count + 1);
        stop(relay);
        rig.drain(args);
        assert_each_once(&rig, &[STREAM], count + 1);
    }
}

/// The streams are read back instead.
#[test]
fn a_bucket_deleted_between_two_runs_repeats_nothing() {
    for (args, killed) in [
        (&[][..], false),
        (&[], true),
        (&AT_ONCE, false),
        (&AT_ONCE, true),
    ] {
        let rig = forgetful();
        let mut client = rig.nats.client();
        let relay = rig.relay(args);
        relay.wait_for_log("connected", DEADLINE);
        let load = Load::start(&rig.pg);
        load.wait_for_more(300);
        if killed {
            relay.kill();
        } else {
            stop(relay);
        }
        delete_bucket(&mut client);
        load.wait_for_more(50);
        let relay = rig.relay(args);
        load.wait_for_more(100);
        let count = load.finish();
        assert_each_once(&rig, &[STREAM], count);
        stop(relay);
        rig.drain(args);
        assert_each_once(&rig, &[STREAM], count);
    }
}

/// The key holds what it held a while ago. Where Postgres has been told more since, only a person can say that it is the
/// bucket that went back and not the slot that was moved.
#[test]
fn a_bucket_put_back_to_an_older_record_repeats_nothing() {
    for (args, halts_first) in [(&[][..], false), (&AT_ONCE, true)] {
        let rig = forgetful();
        let mut client = rig.nats.client();
        rig.pg.execute(&insert(1, "account"));
        rig.drain(args);
        let (subject, value) = record(&mut client);
        for number in 2..=200 {
            rig.pg.execute(&insert(number, "account"));
        }
        rig.drain(args);
        client.publish(&subject, &[], &value);
        rig.pg.execute(&insert(201, "account"));
        if halts_first {
            halts(rig.relay(args), 78, &["an old copy", "-resume-anyway"]);
            rig.drain(&[&["--resume-anyway"], args].concat());
        } else {
            rig.drain(args);
        }
        assert_each_once(&rig, &[STREAM], 201);
        rig.pg.execute(&insert(202, "account"));
        rig.drain(args);
        assert_each_once(&rig, &[STREAM], 202);
    }
}

#[test]
fn a_record_overwritten_under_a_running_relay_costs_a_session_and_no_event() {
    let rig = Rig::start();
    let mut client = rig.nats.client();
    let relay = rig.relay(&[]);
    relay.wait_for_log("connected", DEADLINE);
    let load = Load::start(&rig.pg);
    load.wait_for_more(200);
    let (subject, value) = record(&mut client);
    load.wait_for_more(300);
    client.publish(&subject, &[], &value);
    load.wait_for_more(300);
    let count = load.finish();
    assert_each_once(&rig, &[STREAM], count);
    stop(relay);
    rig.drain(&[]);
    assert_each_once(&rig, &[STREAM], count);
}
