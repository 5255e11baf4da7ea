//! What befalls the streams themselves: put back to a copy, deleted, missing, shared with others, several.

use crate::faults_scenario::{NAME, Scenario};
use crate::rig::{DEADLINE, Rig, UUID_SQL, counted, uuid};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::proxy::{Direction, Mode, Proxy};
use crate::support::relay::{Relay, halts};
use crate::support::wait::{eventually, pause, secs};
use serde_json::{Value, json};
use std::time::Duration;

/// Copies the store, lets events flow, and puts the copy back: what a power loss does to unsynced writes.
fn put_back(nats: &Nats, run: &Scenario, until: impl FnOnce()) {
    nats.stop();
    let copy = nats.snapshot_store();
    nats.start_again();
    run.wait_for_relay("the copy of the store");
    run.wait_for_commits(300);
    run.wait_for_relay("events behind the copy");
    until();
    nats.kill();
    nats.restore_store(&copy);
    nats.start_again();
}

#[test]
fn a_store_put_back_within_the_hold_back_is_filled_again_in_order() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&[]);
    for _ in 0..3 {
        run.wait_for_relay("the start");
        put_back(&nats, &run, || {});
        run.wait_for_relay("the store put back");
    }
    run.finish(relay).assert_held_back();
}

/// A relay that was not there when it happened reads it from the stream.
#[test]
fn a_store_put_back_while_no_relay_runs_is_filled_again_in_order() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let relay = run.relay(&[]);
    run.wait_for_relay("the start");
    nats.stop();
    let copy = nats.snapshot_store();
    nats.start_again();
    run.wait_for_relay("the copy of the store");
    run.wait_for_commits(300);
    relay.kill();
    nats.kill();
    nats.restore_store(&copy);
    nats.start_again();
    let relay = run.relay(&[]);
    run.wait_for_relay("the store put back");
    run.finish(relay).assert_held_back();
}

/// A power loss may leave the index and take the messages: the server still counts what it has lost. These were not
/// consumed, as nothing is from such a stream.
#[test]
fn the_end_of_a_stream_that_is_lost_but_still_counted_is_filled_again_in_order() {
    for while_it_runs in [true, false] {
        let nats = Nats::start();
        let run = Scenario::start(&nats);
        let mut relay = run.relay(&[]);
        run.wait_for_commits(300);
        run.wait_for_relay("the start");
        if !while_it_runs {
            relay.kill();
        }
        nats.stop();
        nats.tear_stream(NAME);
        nats.start_again();
        let info = nats.client().stream_info(NAME);
        let lost = info["state"]["num_deleted"].as_u64();
        let lost = lost.expect("the server counts what it has lost");
        if !while_it_runs {
            relay = run.relay(&[]);
        }
        run.wait_for_relay_beside(lost, "the torn stream");
        let outcome = run.finish(relay);
        outcome.assert_held_back();
        let said =
            |line: &String| line.contains("the last messages of") && line.contains("are gone");
        assert!(outcome.log.iter().any(said), "{:#?}", outcome.log);
    }
}

/// They count as lost: nothing consumes the newest messages of such a stream and leaves older ones. Each comes again as soon
/// as JetStream no longer takes it for a repeat.
#[test]
fn the_last_messages_that_somebody_deletes_are_published_again_and_a_purge_of_all_is_not() {
    const WINDOW: Duration = secs(4);
    let rig = Rig::start();
    let mut client = rig.nats.client();
    let window = json!({ "name": NAME, "subjects": ["events.>"], "duplicate_window": WINDOW.as_nanos() as u64 });
    client.api(&format!("STREAM.UPDATE.{NAME}"), &window);
    (1..=8).for_each(|number| rig.commit_event(number, "a"));
    rig.drain(&[]);
    // the one may go long before the other
    pause(WINDOW / 2);
    (9..=10).for_each(|number| rig.commit_event(number, "a"));
    rig.drain(&[]);
    for seq in 8..=10 {
        client.api(&format!("STREAM.MSG.DELETE.{NAME}"), &json!({ "seq": seq }));
    }
    let log = rig.drain(&[]);
    assert_eq!(counted(&log, "published"), 3, "{log:#?}");
    let said = |line: &String| line.contains("the last messages of") && line.contains("are gone");
    assert!(log.iter().any(said), "{log:#?}");
    let messages = rig.messages();
    let ids: Vec<&str> = messages.iter().map(|message| message.id()).collect();
    assert_eq!(ids, (1..=10).map(uuid).collect::<Vec<_>>());

    client.api(&format!("STREAM.PURGE.{NAME}"), &Value::Null);
    rig.commit_event(11, "a");
    let log = rig.drain(&[]);
    assert_eq!(counted(&log, "published"), 1, "{log:#?}");
    assert_eq!(rig.messages()[0].id(), uuid(11));
}

/// What a server has acknowledged may go with it. A relay that cannot look at it confirms nothing meanwhile, not even with
/// the last words of its session.
#[test]
fn what_is_acknowledged_does_not_grow_old_while_the_server_is_away() {
    lost_while_away(false);
}

#[test]
fn a_relay_that_ends_while_the_server_is_away_confirms_nothing_more() {
    lost_while_away(true);
}

fn lost_while_away(ends: bool) {
    const HOLD_BACK: Duration = secs(10);
    let (pg, nats) = (Postgres::start(), Nats::start());
    pg.seed_setup();
    nats.client().add_seed_stream();
    let proxy = Proxy::start(nats.port());
    let args = ["--hold-back", "10s"];
    let mut relay = Relay::start_at(pg.port(), proxy.port(), &args);
    let commit = |numbers: std::ops::RangeInclusive<u64>| {
        let (first, last) = numbers.into_inner();
        pg.execute(&format!(
            "INSERT INTO outbox SELECT {UUID_SQL}, 'account', 'a', to_jsonb(n) FROM generate_series({first}, {last}) n"
        ));
        let stored = || nats.try_client().map(|mut client| client.last_seq(NAME));
        eventually("the events to be stored", secs(60), || match stored() {
            Ok(seq) if seq >= last => Ok(()),
            other => Err(other.map_err(|error| error.to_string())),
        });
    };
    commit(1..=50);
    nats.stop();
    let copy = nats.snapshot_store();
    nats.start_again();
    commit(51..=150);
    // from now on the hold-back counts
    eventually("the checkpoint to hold them", secs(60), || {
        let kept = nats.client().checkpoint().ok_or("nothing is kept")?;
        (kept["young"]["streams"][0]["read_after"] == 150)
            .then_some(())
            .ok_or("less is kept")
    });
    let before = proxy.accepted();
    proxy.set(Mode::Refuse);
    eventually("the relay to connect again, in vain", secs(30), || {
        proxy.accepted() > before
    });
    nats.kill();
    nats.restore_store(&copy);
    nats.start_again();
    // it would be old enough by then
    pause(HOLD_BACK + secs(1));
    if ends {
        relay.term();
        assert_eq!(relay.wait_exit(secs(30)), 0);
        relay = Relay::start_at(pg.port(), nats.port(), &args);
    }
    proxy.set(Mode::Pass);
    let mut client = nats.client();
    eventually("what was lost to be there again", secs(60), || {
        client.last_seq(NAME) >= 150
    });
    let bodies = client.read_all(NAME).into_iter();
    let bodies: Vec<String> = bodies.map(|message| message.text().to_string()).collect();
    let expected: Vec<String> = (1..=150).map(|number: u64| number.to_string()).collect();
    assert_eq!(bodies, expected);
    relay.term();
    assert_eq!(relay.wait_exit(secs(30)), 0);
}

#[test]
fn a_store_put_back_beyond_what_the_slot_keeps_halts_the_relay() {
    let nats = Nats::start();
    let run = Scenario::start(&nats);
    let mut relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_relay("the start");
    put_back(&nats, &run, || {
        let behind = run.pg.current_wal_lsn();
        eventually("the slot to forget", secs(60), || {
            run.pg.confirmed_flush_lsn(NAME) >= behind
        });
    });
    // the checkpoint went with it
    halts(&mut relay, 78, &["an old copy", "-resume-anyway"]);
}

#[test]
fn a_stream_that_is_deleted_and_created_again_gets_what_the_slot_still_has() {
    for while_it_runs in [true, false] {
        let nats = Nats::start();
        let run = Scenario::start(&nats);
        let mut relay = run.relay(&["--hold-back", "0"]);
        run.wait_for_relay("the start");
        if !while_it_runs {
            relay.term();
            assert_eq!(relay.wait_exit(secs(30)), 0);
        }
        nats.client()
            .api(&format!("STREAM.DELETE.{NAME}"), &Value::Null);
        nats.client().add_seed_stream();
        let since = run.committed();
        if !while_it_runs {
            relay = run.relay(&["--hold-back", "0"]);
        }
        relay.wait_for_log("was deleted and created again", secs(60));
        run.wait_for_commits(300);
        let committed = run.committed();
        eventually("what was committed since", secs(60), || {
            nats.client().message_count(NAME) >= committed - since
        });
        relay.term();
        assert_eq!(relay.wait_exit(secs(30)), 0);
    }
}

#[test]
fn a_stream_that_is_missing_is_waited_for() {
    let nats = Nats::start();
    let run = Scenario::start_on(Postgres::start(), &[nats.port()], &[(NAME, "events.")]);
    let relay = run.relay(&["--hold-back", "0"]);
    relay.wait_for_log("no stream captures", secs(30));
    run.wait_for_commits(300);
    nats.client().add_seed_stream();
    run.wait_for_relay("a missing stream");
    run.finish_confirmed(relay);
}

/// The first event of the window is refused, because another's message stands in its place; none behind it
/// may be stored, though one of them expects just the sequence that this message has.
#[test]
fn a_message_of_another_in_the_middle_of_a_window_leaves_no_hole() {
    let nats = Nats::start();
    nats.client().add_seed_stream();
    let (bodies, _) = another_in_the_window(&nats, false);
    assert_eq!(bodies, (1..=WINDOW).collect::<Vec<_>>());
}

/// Events that [`another_in_the_window`] commits.
pub const WINDOW: u64 = 100;

/// Lets somebody else's message into the stream before a window of events that is on its way, with the relay alive or
/// killed and started again. Returns the bodies behind that message, and the last relay's log.
pub fn another_in_the_window(nats: &Nats, killed: bool) -> (Vec<u64>, Vec<String>) {
    let pg = Postgres::start();
    pg.seed_setup();
    let proxy = Proxy::start(nats.port());
    let mut relay = Relay::start_at(pg.port(), proxy.port(), &["--hold-back", "0"]);
    // until something is acknowledged, one event goes at a time
    pg.execute("INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 0, '0')");
    eventually("the first event", secs(30), || {
        nats.client().message_count(NAME) == 1
    });
    proxy.set(Mode::Freeze);
    let before = proxy.passed(Direction::ToServer);
    pg.execute(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), 'account', n, to_jsonb(n) FROM generate_series(1, {WINDOW}) n"
    ));
    relay.wait_for_log("acknowledged nothing", secs(30));
    assert_eq!(proxy.passed(Direction::ToServer), before);
    if killed {
        relay.kill();
    }
    let mut client = nats.client();
    client.publish("events.foreign.a", &[], b"");
    // the window, in the proxy all the while, arrives behind the other's message
    proxy.set(Mode::Pass);
    if killed {
        eventually("what was on its way", secs(30), || {
            client.message_count(NAME) > 2
        });
        relay = Relay::start_at(pg.port(), nats.port(), &["--hold-back", "0"]);
    }
    let mut bodies: Vec<u64> = Vec::new();
    eventually("every event", secs(60), || {
        let messages = client
            .try_read_from(NAME, 1)
            .map_err(|error| error.to_string())?;
        let numbers = messages
            .iter()
            .skip(2)
            .map(|message| message.text().parse());
        bodies = numbers
            .collect::<Result<_, _>>()
            .expect("the bodies are numbers");
        let mut sorted = bodies.clone();
        sorted.sort_unstable();
        sorted.dedup();
        match sorted.len() as u64 {
            WINDOW => Ok(()),
            found => Err(format!("{found} of {WINDOW}")),
        }
    });
    relay.term();
    assert_eq!(relay.wait_exit(secs(30)), 0);
    assert_eq!(client.message_count(NAME), WINDOW + 2, "nothing came twice");
    (bodies, relay.log())
}

#[test]
fn messages_of_others_cost_neither_order_nor_events() {
    let nats = Nats::start();
    let mut client = nats.client();
    client.add_stream_with(json!({ "name": NAME, "subjects": ["events.>", "other.>"] }));
    let run = Scenario::start_on(Postgres::start(), &[nats.port()], &[(NAME, "events.")]);
    let relay = run.relay(&["--hold-back", "0"]);
    run.wait_for_relay("the start");
    let mut others = 0;
    for subject in ["other.a", "events.foreign.a"] {
        for _ in 0..15 {
            run.wait_for_commits(fastrand::u64(1..50));
            let count = fastrand::u64(1..10);
            for number in 0..count {
                client.publish(subject, &[], number.to_string().as_bytes());
            }
            others += count;
        }
        run.wait_for_relay_beside(others, subject);
    }
    let warned = relay
        .log()
        .iter()
        .filter(|line| line.contains("others write to the streams of the events"))
        .count();
    run.finish_confirmed(relay);
    assert!(
        (1..=3).contains(&warned),
        "once a minute, not {warned} times"
    );
}

/// The id is the writer's: within the window a second event under it is a repeat to JetStream.
/// Somebody else publishes a message under the prefix, and purges the stream.
fn guest(rig: &Rig) {
    let mut client = rig.nats.client();
    client.publish("events.guest", &[], b"hello");
    client.api(&format!("STREAM.PURGE.{NAME}"), &Value::Null);
}

/// Commits an event, which comes into an empty stream.
#[track_caller]
fn comes_alone(rig: &Rig, number: u64) {
    rig.commit_event(number, "a");
    rig.wait_for_messages(1);
    assert_eq!(rig.messages()[0].id(), uuid(number));
}

#[test]
fn a_message_of_somebody_else_that_came_and_went_beside_an_idle_relay_takes_no_events_place() {
    let rig = Rig::start();
    let _relay = rig.relay(&[]);
    comes_alone(&rig, 1);
    guest(&rig);
    comes_alone(&rig, 2);
}

#[test]
fn a_message_of_somebody_else_that_came_and_went_before_a_reconnect_takes_no_events_place() {
    let rig = Rig::start();
    let relay = rig.relay(&[]);
    comes_alone(&rig, 1);
    guest(&rig);
    rig.nats.restart();
    relay.wait_for_log("connected to NATS again", DEADLINE);
    comes_alone(&rig, 2);
}

#[test]
fn a_message_of_somebody_else_that_came_and_went_while_no_relay_ran_takes_no_events_place() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.drain(&[]);
    guest(&rig);
    rig.commit_event(2, "a");
    rig.drain(&[]);
    assert_eq!(rig.messages()[0].id(), uuid(2));
}

/// As after a crash of Postgres, which may forget what was confirmed last. The checkpoint does not.
#[test]
fn what_a_relay_with_at_least_once_has_settled_is_trusted_although_the_slot_goes_back() {
    let rig = Rig::start();
    let copy = |from: &str, to: &str| {
        rig.pg.execute(&format!(
            "SELECT pg_copy_logical_replication_slot('{from}', '{to}')"
        ));
    };
    copy(NAME, "before");
    rig.commit_event(1, "a");
    rig.drain(&["--delivery", "at-least-once"]);
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{NAME}')"));
    copy("before", NAME);
    rig.commit_event(2, "a");
    rig.drain(&[]);
    let messages = rig.messages();
    let ids: Vec<_> = messages.iter().map(|message| message.id()).collect();
    assert_eq!(ids, [1, 2].map(uuid));
}

/// At least once, an event can be stored while an earlier one is not, whose subject is full.
#[test]
fn what_a_relay_with_at_least_once_left_out_is_not_taken_for_stored() {
    const AT_LEAST_ONCE: [&str; 2] = ["--delivery", "at-least-once"];
    let rig = Rig::start();
    let limit = |per_subject: i64| {
        let mut nats = rig.nats.client();
        let mut config = nats.stream_info(NAME)["config"].clone();
        config["max_msgs_per_subject"] = json!(per_subject);
        config["discard"] = json!("new");
        config["discard_new_per_subject"] = json!(per_subject > 0);
        nats.api(&format!("STREAM.UPDATE.{NAME}"), &config);
    };
    limit(1);
    let relay = rig.relay(&AT_LEAST_ONCE);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    rig.pg.execute(&format!(
        "INSERT INTO outbox SELECT {UUID_SQL}, 'account', subject, '{{}}'
         FROM (VALUES (2, 'a'), (3, 'b')) AS event (n, subject)"
    ));
    rig.wait_for_messages(2);
    relay.kill();
    limit(-1);

    let (code, log) = rig.run(&["--drain"]);
    let said = log.last().expect("it says why");
    assert_eq!(code, 78, "{said}");
    assert!(said.contains("-delivery at-least-once -drain"), "{said}");
    assert_eq!(rig.messages().len(), 2);
    // as it says
    rig.drain(&AT_LEAST_ONCE);
    rig.commit_event(4, "a");
    rig.drain(&[]);
    rig.commit_event(5, "a");
    rig.drain(&[]);
    let messages = rig.messages();
    let ids: Vec<_> = messages.iter().map(|message| message.id()).collect();
    assert_eq!(ids, [1, 3, 2, 4, 5].map(uuid));
}

#[test]
fn an_id_used_twice_drops_the_second_event_and_names_both() {
    let nats = Nats::start();
    nats.client().add_seed_stream();
    let pg = Postgres::start();
    pg.seed_setup();
    let mut relay = Relay::start(&pg, &nats, &["--hold-back", "0"]);
    let id = |number: u32| format!("00000000-0000-0000-0000-{number:012}");
    for (number, body) in [(1, "first"), (2, "between"), (1, "second"), (3, "after")] {
        pg.execute(&format!(
            "INSERT INTO outbox VALUES ('{}', 'account', 'a', '\"{body}\"'); DELETE FROM outbox",
            id(number)
        ));
    }
    let mut client = nats.client();
    eventually("the last event", secs(30), || {
        client.message_count(NAME) == 3
    });
    let line = relay.wait_for_log("dropped an event", secs(10));
    assert!(
        line.contains("level=warn") && line.contains(&id(1)) && line.contains("seq=1"),
        "{line}"
    );
    let last = pg.current_wal_lsn();
    eventually("the drop to be confirmed too", secs(30), || {
        pg.confirmed_flush_lsn(NAME) >= last
    });
    relay.term();
    assert_eq!(relay.wait_exit(secs(30)), 0);
    let messages = client.read_all(NAME);
    let bodies: Vec<&str> = messages.iter().map(|message| message.text()).collect();
    assert_eq!(bodies, ["\"first\"", "\"between\"", "\"after\""]);
}

/// Each takes a look at what used the id, but no new connection; and the checkpoint is written all the while. Every tenth
/// time an event of its own follows.
#[test]
fn many_events_under_one_id_are_dropped_over_one_connection() {
    let nats = Nats::start();
    nats.client().add_seed_stream();
    let pg = Postgres::start();
    pg.seed_setup();
    let mut relay = Relay::start(&pg, &nats, &["--hold-back", "0"]);
    pg.execute(
        "DO $$ BEGIN FOR i IN 1..4000 LOOP
           INSERT INTO outbox VALUES ('00000000-0000-0000-0000-000000000001', 'account', 'a', '\"same\"');
           IF i % 10 = 0 THEN
             INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 'a', '\"another\"');
           END IF;
           DELETE FROM outbox;
         END LOOP; END $$",
    );
    let last = pg.current_wal_lsn();
    eventually("all of them to be confirmed", secs(60), || {
        pg.confirmed_flush_lsn(NAME) >= last
    });
    relay.term();
    assert_eq!(relay.wait_exit(secs(30)), 0);
    assert_eq!(nats.client().message_count(NAME), 401);
    let log = relay.log();
    let count = |text| log.iter().filter(|line| line.contains(text)).count();
    assert_eq!(count("dropped an event"), 3999);
    // the first one finds others on their way behind it, and where they are many it takes another to tell which it was
    assert!(count("connected to NATS again") <= 2, "{log:?}");
    assert_eq!(count("was written meanwhile"), 0, "{log:?}");
}

#[test]
fn two_streams_under_one_prefix_are_each_complete_and_in_order() {
    for hold_back in ["0", "150s"] {
        let nats = Nats::start();
        let mut client = nats.client();
        client.add_stream("accounts", &["events.account.>"]);
        client.add_stream("orders", &["events.order.>"]);
        let streams = [("accounts", "events.account."), ("orders", "events.order.")];
        let run = Scenario::start_on(Postgres::start(), &[nats.port()], &streams);
        let args = ["--hold-back", hold_back, "--inflight", "64"];
        let mut relay = run.relay(&args);
        for _ in 0..3 {
            run.wait_for_relay("the start");
            nats.restart();
            run.wait_for_commits(fastrand::u64(1..100));
            nats.kill();
            nats.start_again();
            run.wait_for_commits(fastrand::u64(1..100));
            relay.kill();
            relay = run.relay(&args);
            run.wait_for_commits(fastrand::u64(1..100));
            eventually("a walsender to terminate", secs(60), || {
                run.pg.terminate_walsender() > 0
            });
        }
        run.finish(relay);
    }
}
