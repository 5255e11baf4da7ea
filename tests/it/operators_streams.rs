//! Operators move subjects between streams, delete streams, use their names again, and copy messages.

use crate::operators::{
    Load, assert_each_once, capture, edit, events, ids, insert, stop, wait_for_confirmation,
};
use crate::rig::{DEADLINE, Rig, uuid};
use crate::support::natsclient::NatsClient;
use crate::support::wait::{eventually, pause, secs};
use serde_json::{Value, json};

/// Streams of the accounts and of the orders.
const A: &str = "A";
const B: &str = "B";
const BRIEF: [&str; 2] = ["--hold-back", "2s"];

/// With a stream of the accounts and one of the orders.
fn two_streams() -> Rig {
    with_streams(|client| {
        client.add_stream(A, &["events.account.>"]);
        client.add_stream(B, &["events.order.>"]);
    })
}

fn with_streams(add: impl FnOnce(&mut NatsClient)) -> Rig {
    let rig = Rig::start_without_stream();
    add(&mut rig.nats.client());
    rig
}

/// Commits an event in each stream, waits for them, has B refuse what comes next, moves its subject to A, and sees that the
/// refused event and all after it are in A.
#[track_caller]
fn refused_then_moved(refuse: fn(&mut NatsClient), said: &str, remedy: fn(&mut NatsClient)) {
    let rig = two_streams();
    let mut client = rig.nats.client();
    let relay = rig.relay(&BRIEF);
    rig.pg
        .execute(&format!("{} {}", insert(1, "order"), insert(2, "account")));
    eventually("the first events", DEADLINE, || {
        (client.last_seq(A), client.last_seq(B)) == (1, 1)
    });
    // what a deleted stream takes along is not ours to bring back
    wait_for_confirmation(&rig);
    refuse(&mut client);
    let numbers = [(3, "order"), (4, "account"), (5, "account")];
    let sql: Vec<_> = numbers.iter().map(|(n, kind)| insert(*n, kind)).collect();
    rig.pg.execute(&sql.concat());
    rig.pg.execute(&insert(6, "account"));
    relay.wait_for_log(said, DEADLINE);
    remedy(&mut client);
    rig.pg.execute(&insert(7, "order"));
    eventually("the events in their new stream", DEADLINE, || {
        let mut found = ids(&mut client, A);
        found.sort();
        let expected: Vec<_> = (2..=7).map(uuid).collect();
        if found == expected {
            Ok(())
        } else {
            Err(found)
        }
    });
    wait_for_confirmation(&rig);
    stop(relay);
    assert_eq!(client.last_seq(A), 6, "nothing came twice");
    // the next one finds nothing to do
    rig.drain(&BRIEF);
    assert_eq!(client.last_seq(A), 6, "nothing came twice");
}

#[test]
fn what_a_full_stream_refused_goes_where_its_subject_is_moved_to() {
    let refuse = |client: &mut NatsClient| {
        edit(client, B, &json!({ "max_msgs": 1, "discard": "new" }));
    };
    let remedy = |client: &mut NatsClient| {
        capture(client, B, &["unused.b"]);
        capture(client, A, &["events.>"]);
    };
    refused_then_moved(refuse, "maximum messages exceeded", remedy);
}

#[test]
fn what_a_deleted_stream_refused_goes_where_its_subject_is_moved_to() {
    let refuse = |client: &mut NatsClient| {
        client.api("STREAM.DELETE.B", &Value::Null);
    };
    let remedy = |client: &mut NatsClient| capture(client, A, &["events.>"]);
    refused_then_moved(refuse, "no stream captures", remedy);
}

#[test]
fn what_a_stream_refused_while_it_was_edited_goes_where_its_subject_is_moved_to() {
    let refuse = |client: &mut NatsClient| capture(client, B, &["unused.b"]);
    let remedy = |client: &mut NatsClient| capture(client, A, &["events.>"]);
    refused_then_moved(refuse, "no stream captures", remedy);
}

/// How the relay fares meanwhile.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Relays {
    /// It lives through it.
    Live,
    /// It is killed at the first edit, and started again after the last.
    Crash,
}

/// Edits streams while a writer commits; each event is in one of them, once.
#[track_caller]
fn edited_under_load(rig: &Rig, streams: &[&str], edits: &[fn(&mut NatsClient)], relays: Relays) {
    let mut client = rig.nats.client();
    let mut relay = rig.relay(&BRIEF);
    relay.wait_for_log("connected", DEADLINE);
    let load = Load::start(&rig.pg);
    load.wait_for_more(200);
    // past the hold-back: the oldest record is of before the edits
    wait_for_confirmation(rig);
    for edit in edits {
        edit(&mut client);
        if relays == Relays::Crash {
            relay.kill();
        }
        load.wait_for_more(100);
    }
    if relays == Relays::Crash {
        relay = rig.relay(&BRIEF);
    }
    load.wait_for_more(200);
    let count = load.finish();
    assert_each_once(rig, streams, count);
    wait_for_confirmation(rig);
    stop(relay);
    rig.drain(&BRIEF);
    assert_each_once(rig, streams, count);
}

const BOTH: [Relays; 2] = [Relays::Live, Relays::Crash];

#[test]
fn a_subject_moved_to_another_stream_under_load_takes_no_event_along() {
    for relays in BOTH {
        let edits: [fn(&mut NatsClient); 2] = [
            |client| capture(client, B, &["unused.b"]),
            |client| capture(client, A, &["events.>"]),
        ];
        edited_under_load(&two_streams(), &[A, B], &edits, relays);
    }
}

#[test]
fn a_stream_split_in_two_under_load_repeats_nothing() {
    for relays in BOTH {
        let rig = with_streams(|client| client.add_stream(A, &["events.>"]));
        let edits: [fn(&mut NatsClient); 2] = [
            |client| capture(client, A, &["events.account.>"]),
            |client| client.add_stream(B, &["events.order.>"]),
        ];
        edited_under_load(&rig, &[A, B], &edits, relays);
    }
}

#[test]
fn a_new_stream_that_takes_a_subject_under_load_repeats_nothing() {
    for relays in BOTH {
        let edits: [fn(&mut NatsClient); 2] = [
            |client| capture(client, B, &["events.unused"]),
            |client| client.add_stream("C", &["events.order.>"]),
        ];
        edited_under_load(&two_streams(), &[A, B, "C"], &edits, relays);
    }
}

#[test]
fn two_streams_that_swap_their_subjects_under_load_keep_each_event() {
    for relays in BOTH {
        let edits: [fn(&mut NatsClient); 3] = [
            |client| capture(client, A, &["unused.a"]),
            |client| capture(client, B, &["events.account.>"]),
            |client| capture(client, A, &["events.order.>"]),
        ];
        edited_under_load(&two_streams(), &[A, B], &edits, relays);
    }
}

/// There and back again: the second stream holds the middle.
#[test]
fn a_subject_that_comes_back_to_its_stream_under_load_takes_no_event_along() {
    for relays in BOTH {
        let edits: [fn(&mut NatsClient); 4] = [
            |client| capture(client, B, &["unused.b"]),
            |client| capture(client, A, &["events.>"]),
            |client| capture(client, A, &["events.account.>"]),
            |client| capture(client, B, &["events.order.>"]),
        ];
        edited_under_load(&two_streams(), &[A, B], &edits, relays);
    }
}

/// Everything is long recorded, and the new stream is read, found empty, and not filled with what the old one has.
#[test]
fn a_stream_split_in_two_while_no_relay_runs_repeats_nothing() {
    for killed in [false, true] {
        let rig = with_streams(|client| client.add_stream(A, &["events.>"]));
        let mut client = rig.nats.client();
        let relay = rig.relay(&[]);
        rig.pg
            .execute(&format!("{} {}", insert(1, "order"), insert(2, "account")));
        eventually("the events", DEADLINE, || client.last_seq(A) == 2);
        if killed {
            relay.kill();
        } else {
            stop(relay);
        }
        capture(&mut client, A, &["events.account.>"]);
        client.add_stream(B, &["events.order.>"]);
        rig.pg.execute(&insert(3, "order"));
        rig.drain(&[]);
        rig.drain(&[]);
        assert_each_once(&rig, &[A, B], 3);
        assert_eq!(ids(&mut client, B), [uuid(3)]);
    }
}

/// All was settled before: nothing of what the name stood for is missed.
#[test]
fn a_stream_that_left_the_prefix_may_leave_its_name_to_another() {
    let rig = two_streams();
    let mut client = rig.nats.client();
    let relay = rig.relay(&["--hold-back", "0"]);
    for number in 0..5 {
        let (first, second) = (2 * number + 1, 2 * number + 2);
        rig.pg.execute(&format!(
            "{} {}",
            insert(first, "order"),
            insert(second, "account")
        ));
    }
    eventually("the events", DEADLINE, || client.last_seq(B) == 5);
    wait_for_confirmation(&rig);
    stop(relay);
    client.api("STREAM.DELETE.B", &Value::Null);
    capture(&mut client, A, &["events.>"]);
    client.add_stream(B, &["other.>"]);
    for _ in 0..3 {
        client.publish("other.a", &[], b"foreign");
    }
    for number in 11..=12 {
        let relay = rig.relay(&["--hold-back", "0"]);
        relay.wait_for_log("connected", DEADLINE);
        rig.pg.execute(&insert(number, "order"));
        wait_for_confirmation(&rig);
        // a look at the streams comes every 10 s
        pause(secs(11));
        let log = stop(relay);
        let again = |line: &&String| line.contains("connecting to NATS again");
        assert_eq!(log.iter().filter(again).count(), 0, "{log:#?}");
        if number == 11 {
            // a third one of that name
            client.api("STREAM.DELETE.B", &Value::Null);
            client.add_stream(B, &["other.>"]);
        }
    }
    assert_eq!(events(&mut client, A).len(), 7);
}
