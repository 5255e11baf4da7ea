//! Faults of the relay itself: killed, frozen, replaced, started again late.

use crate::faults_scenario::{NAME, Scenario};
use crate::rig::{DEADLINE, Rig, SLOT, uuid};
use crate::support::nats::Nats;
use crate::support::natsclient::{Message, NatsClient, StreamMessage, consumer_reply};
use crate::support::postgres::Postgres;
use crate::support::proxy::{Mode, Proxy};
use crate::support::relay::Relay;
use crate::support::wait::{eventually, secs};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

#[test]
fn a_relay_killed_at_any_moment_loses_repeats_and_reorders_nothing() {
    for hold_back in ["0", "150s"] {
        let nats = Nats::start();
        let run = Scenario::start(&nats);
        let args = ["--hold-back", hold_back, "--inflight", "64"];
        let mut relay = run.relay(&args);
        for _ in 0..20 {
            run.wait_for_commits(fastrand::u64(1..100));
            relay.kill();
            relay = run.relay(&args);
        }
        run.wait_for_relay("SIGKILL");
        run.finish(relay);
    }
}

/// The first relay has publishes under way when it is frozen. The second takes over once Postgres has given
/// the first up; the first, thawed, may still send what it had, and then waits for its turn.
#[test]
fn a_frozen_relay_that_comes_back_repeats_and_reorders_nothing() {
    let nats = Nats::start();
    let run = start_with_window(&nats, Some(WINDOW), json!({}));
    let args = ["--hold-back", "0"];
    let mut working = run.relay(&args);
    let mut standby = run.relay(&args);
    for round in 0..5 {
        run.wait_for_commits(fastrand::u64(50..300));
        working.freeze();
        eventually("the walsender of the frozen relay to end", secs(60), || {
            run.pg.terminate_walsender() > 0
        });
        run.wait_for_relay(&format!("takeover {round}"));
        working.thaw();
        run.wait_for_relay(&format!("the return of relay {round}"));
        assert!(working.is_running(), "it becomes the standby");
        std::mem::swap(&mut working, &mut standby);
    }
    standby.kill();
    run.finish(working);
}

/// JetStream's own deduplication forgets within this time, or after its default.
fn start_with_window(nats: &Nats, window: Option<Duration>, config: Value) -> Scenario {
    let mut stream = json!({ "name": NAME, "subjects": ["events.>"] });
    let fields = stream.as_object_mut().expect("an object");
    fields.extend(config.as_object().expect("an object").clone());
    if let Some(window) = window {
        fields.insert("duplicate_window".into(), (window.as_nanos() as u64).into());
    }
    nats.client().add_stream_with(stream);
    Scenario::start_on(Postgres::start(), &[nats.port()], &[(NAME, "events.")])
}

/// The least that JetStream allows.
const WINDOW: Duration = Duration::from_millis(100);

/// With the default hold-back Postgres sends everything again at each start.
#[test]
fn a_relay_started_after_the_deduplication_window_repeats_nothing() {
    let nats = Nats::start();
    let run = start_with_window(&nats, Some(WINDOW), json!({}));
    let mut relay = run.relay(&[]);
    for round in 0..6 {
        run.wait_for_relay(&format!("start {round}"));
        if round % 2 == 0 {
            relay.term();
            assert_eq!(relay.wait_exit(secs(30)), 0);
        } else {
            relay.kill();
        }
        // what a killed relay had sent may still be stored
        let mut last = (0, Instant::now());
        eventually(
            "the last stored event to be past the window",
            secs(30),
            || {
                let stored = run.stored().expect("nats-server is up");
                if stored > last.0 {
                    last = (stored, Instant::now());
                }
                last.1.elapsed() >= 5 * WINDOW
            },
        );
        relay = run.relay(&[]);
    }
    run.finish(relay).assert_held_back();
}

/// What is consumed is gone from the stream, and proves nothing: what the record lacks is asked of JetStream, which knows the ids
/// for the time of its deduplication window.
#[test]
fn a_consumed_work_queue_is_given_nothing_twice_when_connections_are_lost() {
    consumed_work_queue(&[], |run, nats, _, round| match round % 2 {
        0 => nats.restart(),
        _ => eventually("the walsender to end", secs(60), || {
            run.pg.terminate_walsender() > 0
        }),
    });
}

#[test]
fn a_consumed_work_queue_is_given_nothing_twice_when_the_relay_starts_again() {
    consumed_work_queue(&[], |run, _, relay, _| {
        relay.kill();
        *relay = run.relay(&[]);
    });
}

fn consumed_work_queue(args: &[&str], fault: impl Fn(&Scenario, &Nats, &mut Relay, u32)) {
    let nats = Nats::start();
    let mut run = start_with_window(&nats, None, json!({ "retention": "workqueue" }));
    let mut relay = run.relay(args);
    let mut consumed = BTreeMap::new();
    for round in 0..6 {
        run.wait_for_relay(&format!("fault {round}"));
        consume(&mut nats.client(), &mut consumed);
        fault(&run, &nats, &mut relay, round);
    }
    run.stop_writing();
    let truth = run.truth();
    let last = truth
        .last()
        .and_then(|t| t.ids.last())
        .expect("the writers committed");
    eventually("the last event to be consumed", secs(60), || {
        consume(&mut nats.client(), &mut consumed);
        consumed.values().any(|message| message.id() == last)
    });
    relay.term();
    assert_eq!(relay.wait_exit(secs(30)), 0);
    consume(&mut nats.client(), &mut consumed);
    let consumed: Vec<StreamMessage> = consumed.into_values().collect();
    run.judge(&truth, &[consumed]);
}

/// Takes and acknowledges all that is there. By sequence, since a message whose ack was lost comes again.
fn consume(client: &mut NatsClient, consumed: &mut BTreeMap<u64, StreamMessage>) {
    client.api(
        &format!("CONSUMER.CREATE.{NAME}.worker"),
        &json!({ "stream_name": NAME, "config": { "durable_name": "worker", "ack_policy": "explicit" } }),
    );
    for sid in 2.. {
        let inbox = format!("_INBOX.worker{:016x}", fastrand::u64(..));
        client.try_subscribe(&inbox, sid).expect("subscribe");
        let call = format!("$JS.API.CONSUMER.MSG.NEXT.{NAME}.worker");
        let fetch = json!({ "batch": 500, "no_wait": true }).to_string();
        client
            .try_send(&call, &inbox, &[], fetch.as_bytes())
            .expect("ask for messages");
        let mut taken = 0;
        while taken < 500 {
            let message = client.try_next().expect("messages or a status");
            if message.status != 0 {
                break;
            }
            let Message {
                subject,
                reply,
                headers,
                body,
                ..
            } = message;
            let reply = reply.expect("a consumer's message has a reply subject");
            let (seq, time_ns, _) = consumer_reply(&reply).expect("which tells its place");
            client.try_send(&reply, "", &[], b"").expect("acknowledge");
            consumed.insert(
                seq,
                StreamMessage {
                    seq,
                    time_ns,
                    subject,
                    headers,
                    body,
                },
            );
            taken += 1;
        }
        if taken == 0 {
            return;
        }
    }
}

/// Meanwhile another one takes the slot, publishes, and ends, in order or not: what the first one knows is older than what it
/// then meets.
#[track_caller]
fn is_overtaken(to_postgres: Mode, to_nats: Mode) {
    for ends_in_order in [false, true] {
        let rig = Rig::start();
        rig.commit_event(1, "a");
        rig.drain(&[]);
        let postgres = Proxy::start(rig.pg.port());
        let nats = Proxy::start(rig.nats.port());
        postgres.set(to_postgres);
        nats.set(to_nats);
        let args = ["-nats-connect-timeout", "120s", "-hold-back", "0"];
        let mut slow = Relay::start_at(postgres.port(), nats.port(), &args);
        eventually("a relay that waits for an answer", DEADLINE, || {
            match (postgres.mode(), nats.mode()) {
                (Mode::Freeze, _) => Ok(()),
                (_, Mode::Freeze) if nats.accepted() > 0 => Ok(()),
                modes => Err(modes),
            }
        });

        // one that is killed has told Postgres nothing of what it stored
        let hold_back = if ends_in_order { "0" } else { "1h" };
        let mut other = rig.relay(&["-hold-back", hold_back]);
        for number in 2..=20 {
            rig.commit_event(number, "a");
        }
        rig.wait_for_messages(20);
        if ends_in_order {
            other.term();
            assert_eq!(other.wait_exit(DEADLINE), 0);
        } else {
            other.kill();
        }
        eventually("a free slot", DEADLINE, || match rig.pg.slot_active(SLOT) {
            true => Err("in use"),
            false => Ok(()),
        });

        postgres.set(Mode::Pass);
        nats.set(Mode::Pass);
        for number in 21..=30 {
            rig.commit_event(number, "a");
        }
        rig.wait_for_messages(30);
        slow.term();
        assert_eq!(slow.wait_exit(DEADLINE), 0, "{}", slow.log().join("\n"));
        let ids: Vec<String> = rig.messages().iter().map(|it| it.id().into()).collect();
        assert_eq!(ids, (1..=30).map(uuid).collect::<Vec<_>>());
    }
}

#[test]
fn a_relay_that_is_overtaken_while_it_connects_to_nats_goes_on_with_what_is_there() {
    is_overtaken(Mode::Pass, Mode::Freeze);
}

#[test]
fn a_relay_that_is_overtaken_when_it_has_claimed_the_streams_goes_on_with_what_is_there() {
    is_overtaken(Mode::FreezeAt("START_REPLICATION"), Mode::Pass);
}
