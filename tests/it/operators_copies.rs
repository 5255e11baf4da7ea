//! Mirrors promoted, streams moved by sources, backups restored: the procedures of the manual, step by step.

use crate::operators::{Load, capture, edit, insert, stop};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM, uuid};
use crate::support::natsclient::NatsClient;
use crate::support::relay::halts;
use crate::support::wait::eventually;
use serde_json::{Value, json};

const COPY: &str = "COPY";
const BRIEF: [&str; 2] = ["--hold-back", "2s"];

/// The ids in a stream, whatever their headers are: a mirror's lack the fence.
fn all_ids(client: &mut NatsClient, stream: &str) -> Vec<String> {
    let messages = client.read_all(stream).into_iter();
    messages.map(|message| message.id().to_string()).collect()
}

fn numbered(count: u64) -> Vec<String> {
    (1..=count).map(uuid).collect()
}

#[track_caller]
fn wait_for_copy(client: &mut NatsClient) {
    eventually("the copy to be complete", DEADLINE, || {
        client.last_seq(COPY) == client.last_seq(STREAM)
    });
}

/// Makes an ordinary stream of a mirror, with the subjects of the one that it mirrors.
fn promote(client: &mut NatsClient) {
    let mut config = client.stream_info(COPY)["config"].clone();
    let fields = config.as_object_mut().expect("fields");
    fields.remove("mirror");
    fields.insert("subjects".into(), json!(["events.>"]));
    client.api(&format!("STREAM.UPDATE.{COPY}"), &config);
}

/// Versions that can promote a mirror: 2.12 and later.
fn with_mirror() -> Rig {
    let rig = Rig::start();
    let mirror = json!({ "name": COPY, "mirror": { "name": STREAM } });
    rig.nats.client().add_stream_with(mirror);
    rig
}

/// Stop the writers, drain, wait for the mirror, take the subjects from the stream, promote the mirror, go on.
#[test]
fn a_mirror_that_is_promoted_after_a_drain_has_everything_once() {
    for keep in [true, false] {
        let rig = with_mirror();
        let mut client = rig.nats.client();
        let relay = rig.relay(&BRIEF);
        let load = Load::start(&rig.pg);
        load.wait_for_more(300);
        let before = load.finish();
        stop(relay);
        rig.drain(&BRIEF);
        wait_for_copy(&mut client);
        match keep {
            true => capture(&mut client, STREAM, &["retired.events"]),
            false => drop(client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null)),
        }
        promote(&mut client);
        let relay = rig.relay(&BRIEF);
        for number in before + 1..=before + 20 {
            rig.pg.execute(&insert(number, "account"));
        }
        eventually("the new events", DEADLINE, || {
            client.last_seq(COPY) == before + 20
        });
        relay.kill();
        rig.drain(&BRIEF);
        assert_eq!(
            all_ids(&mut client, COPY),
            numbered(before + 20),
            "kept: {keep}"
        );
    }
}

/// The same without a stop: writers and relay go on meanwhile, and the relay waits until the mirror has the subjects.
#[test]
fn a_mirror_that_is_promoted_under_a_running_relay_has_everything_once() {
    for keep in [true, false] {
        let rig = with_mirror();
        let mut client = rig.nats.client();
        let relay = rig.relay(&BRIEF);
        let load = Load::start(&rig.pg);
        load.wait_for_more(300);
        capture(&mut client, STREAM, &["retired.events"]);
        load.wait_for_more(100);
        wait_for_copy(&mut client);
        if !keep {
            client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
        }
        promote(&mut client);
        load.wait_for_more(300);
        let count = load.finish();
        eventually("the last event", DEADLINE, || {
            client.last_seq(COPY) >= count
        });
        stop(relay);
        rig.drain(&BRIEF);
        assert_eq!(all_ids(&mut client, COPY), numbered(count), "kept: {keep}");
    }
}

/// Without its bucket, too, it does not take the mirror's messages, which have no fence, for those of at-least-once.
#[test]
fn a_promoted_mirror_is_not_taken_for_at_least_once_delivery() {
    let rig = with_mirror();
    let mut client = rig.nats.client();
    let relay = rig.relay(&[]);
    for number in 1..=5 {
        rig.pg.execute(&insert(number, "account"));
    }
    wait_for_copy_of(&mut client, 5);
    relay.kill();
    client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
    promote(&mut client);
    client.api("STREAM.DELETE.KV_jetstream_outbox", &Value::Null);
    halts(
        rig.relay(&[]),
        78,
        &["without a fence", "or a promoted mirror"],
    );
    assert_eq!(all_ids(&mut client, COPY), numbered(5));
}

#[track_caller]
fn wait_for_copy_of(client: &mut NatsClient, count: u64) {
    eventually("the copy", DEADLINE, || client.last_seq(COPY) >= count);
}

/// Stop the writers, drain, wait for the copy, take the subjects from the stream, give them to the copy, go on.
#[test]
fn a_stream_that_is_moved_by_sources_has_everything_once() {
    let rig = Rig::start();
    let mut client = rig.nats.client();
    let relay = rig.relay(&BRIEF);
    let load = Load::start(&rig.pg);
    load.wait_for_more(300);
    // while the relay goes on
    client.add_stream_with(json!({ "name": COPY, "sources": [{ "name": STREAM }] }));
    load.wait_for_more(300);
    let before = load.finish();
    stop(relay);
    rig.drain(&BRIEF);
    wait_for_copy(&mut client);
    capture(&mut client, STREAM, &["retired.events"]);
    edit(
        &mut client,
        COPY,
        &json!({ "sources": [], "subjects": ["events.>"] }),
    );
    let relay = rig.relay(&BRIEF);
    for number in before + 1..=before + 20 {
        rig.pg.execute(&insert(number, "account"));
    }
    wait_for_copy_of(&mut client, before + 20);
    relay.kill();
    client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
    rig.drain(&BRIEF);
    assert_eq!(all_ids(&mut client, COPY), numbered(before + 20));
}

/// Back up, lose the stream, restore: what the slot still has is published again by itself.
#[test]
fn a_stream_that_is_restored_from_a_young_backup_is_completed() {
    let rig = Rig::start();
    let mut client = rig.nats.client();
    let relay = rig.relay(&[]);
    for number in 1..=5 {
        rig.pg.execute(&insert(number, "account"));
    }
    rig.wait_for_messages(5);
    let backup = client.snapshot(STREAM);
    for number in 6..=9 {
        rig.pg.execute(&insert(number, "account"));
    }
    rig.wait_for_messages(9);
    stop(relay);
    client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
    client.restore(&backup);
    assert_eq!(client.last_seq(STREAM), 5);
    rig.pg.execute(&insert(10, "account"));
    let log = rig.drain(&[]);
    let said = "going back to where the checkpoint and the streams agree";
    assert!(log.iter().any(|line| line.contains(said)), "{log:#?}");
    assert_eq!(all_ids(&mut client, STREAM), numbered(10));
}

/// Whichever cut is gone back to after that: the slot sends nothing before the place that it was moved to.
#[test]
fn a_stream_that_loses_its_end_after_a_moved_slot_was_accepted_gets_it_back() {
    let rig = Rig::start();
    let mut client = rig.nats.client();
    for number in 1..=2 {
        rig.pg.execute(&insert(number, "account"));
    }
    rig.drain(&[]);
    let backup = client.snapshot(STREAM);
    // nobody publishes it, as the operator knows
    rig.pg.execute(&insert(3, "account"));
    rig.pg.execute(&format!(
        "SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn())"
    ));
    halts(
        rig.relay(&[]),
        78,
        &["moved by somebody else", "-resume-anyway"],
    );
    rig.pg.execute(&insert(4, "account"));
    rig.drain(&["--resume-anyway"]);
    client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
    client.restore(&backup);
    rig.drain(&[]);
    let expected = [1, 2, 4].map(uuid);
    assert_eq!(all_ids(&mut client, STREAM), expected);
}

/// The slot no longer has what is missing: the relay says so, and goes on when it is told to.
#[test]
fn a_stream_that_is_restored_from_an_old_backup_halts_the_relay() {
    let rig = Rig::start();
    let mut client = rig.nats.client();
    rig.pg.execute(&insert(1, "account"));
    rig.drain(&["--hold-back", "0"]);
    let backup = client.snapshot(STREAM);
    for number in 2..=4 {
        rig.pg.execute(&insert(number, "account"));
        rig.drain(&["--hold-back", "0"]);
    }
    client.api(&format!("STREAM.DELETE.{STREAM}"), &Value::Null);
    client.restore(&backup);
    rig.pg.execute(&insert(5, "account"));
    halts(
        rig.relay(&[]),
        65,
        &["ends at sequence 1, but had acknowledged", "-resume-anyway"],
    );
    assert_eq!(all_ids(&mut client, STREAM), numbered(1));
    rig.drain(&["--resume-anyway"]);
    let found = all_ids(&mut client, STREAM);
    assert_eq!(found.first(), Some(&uuid(1)));
    assert_eq!(found.last(), Some(&uuid(5)));
    // what is to be published by hand is what lies between the two
    rig.drain(&[]);
    assert_eq!(all_ids(&mut client, STREAM), found);
}
