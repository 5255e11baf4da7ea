//! Rules that the simulator does not switch off one by one.

use super::memory::Mark;
use super::*;
use crate::jetstream::ack::ApiError;
use crate::jetstream::resume::Between;
use crate::jetstream::resume::Lineage;
use crate::jetstream::streams::{StreamConfig, StreamInfo, StreamState};
use std::convert::Infallible;

const SECOND: Duration = Duration::from_secs(1);

fn core(delivery: Delivery, memory: Memory) -> Core {
    let limits = Limits {
        inflight: 100,
        inflight_bytes: 1 << 20,
        replies: 8,
        ack_timeout: 10 * SECOND,
        hold_back: Duration::ZERO,
    };
    Core::new(delivery, limits, memory)
}

/// A new connection to a stream of so many replicas, which holds so many messages of others and none of ours.
fn connect(core: &mut Core, replicas: u32, foreign: u64, now: Instant) {
    let tail = Tail {
        foreign,
        ..Tail::default()
    };
    connect_to(core, replicas, foreign, tail, now);
}

fn connect_to(core: &mut Core, replicas: u32, last_seq: u64, tail: Tail, now: Instant) {
    let stream = StreamInfo {
        config: StreamConfig {
            subjects: vec!["events.>".into()],
            ..StreamConfig::default()
        },
        state: StreamState::default(),
        created: String::new(),
        ts: String::new(),
    };
    let found = StreamAtConnect {
        name: "stream".into(),
        created: String::new(),
        replicas,
        last_seq,
        tail,
        aged: None,
        has_young: false,
        keeps_from: None,
    };
    let routes = Routes::new(&[stream]);
    core.connected(routes, vec![found], now).unwrap();
}

/// Events of one transaction; of each the subject, which is its id too.
fn offer(core: &mut Core, subjects: &[&str]) {
    offer_at(core, 1, subjects);
}

fn offer_at(core: &mut Core, lsn: u64, subjects: &[&str]) {
    let mut batch = Batch::default();
    for (ordinal, subject) in (1..).zip(subjects) {
        let commit_lsn = Lsn(lsn);
        let text = |bytes: &mut Vec<u8>| {
            bytes.extend_from_slice(subject.as_bytes());
            Ok::<(), Infallible>(())
        };
        let position = Position {
            commit_lsn,
            ordinal,
        };
        let Ok(()) = batch.push_event("outbox", position, text, text, text);
    }
    core.offer(Arc::new(batch));
}

/// What goes now.
fn publishes(core: &mut Core, now: Instant) -> Vec<Publish> {
    let mut publishes = Vec::new();
    loop {
        match core.next(now).unwrap() {
            Next::Publish(publish) => publishes.push(publish),
            Next::Nothing => return publishes,
            other => panic!("{other:?}"),
        }
    }
}

fn subjects(publishes: &[Publish]) -> Vec<&str> {
    publishes.iter().map(|it| it.event.subject()).collect()
}

fn ack(core: &mut Core, publish: &Publish, now: Instant) {
    let seq = publish.expected_last_sequence.unwrap_or(publish.token) + 1;
    let duplicate = false;
    let stored = core.answer(publish.reply, Ok(PubAck { seq, duplicate }), now);
    assert_eq!(stored, Ok(Some(publish.token)));
}

#[test]
fn at_least_once_has_one_event_of_a_subject_on_its_way() {
    let now = Instant::now();
    let mut core = core(Delivery::AtLeastOnce, Memory::default());
    connect(&mut core, 1, 0, now);
    offer(&mut core, &["events.a", "events.b", "events.a", "events.b"]);
    let first = publishes(&mut core, now);
    assert_eq!(subjects(&first), ["events.a", "events.b"]);
    ack(&mut core, &first[1], now);
    assert_eq!(subjects(&publishes(&mut core, now)), [""; 0]);

    // what was not answered goes again, and still alone
    connect(&mut core, 1, 0, now);
    let again = publishes(&mut core, now);
    assert_eq!(subjects(&again), ["events.a"]);
    assert_eq!(again[0].token, first[0].token);
    ack(&mut core, &again[0], now);
    let last = publishes(&mut core, now);
    assert_eq!(subjects(&last), ["events.a", "events.b"]);
    last.iter().for_each(|it| ack(&mut core, it, now));
    assert!(core.is_settled());
}

/// How many of four events go at once at these times after others were seen to write.
#[track_caller]
fn check_shared(replicas: u32, new_session: bool, expected: &[(Duration, usize)]) {
    for (after, at_once) in expected {
        let seen = Instant::now();
        let mut core = core(Delivery::ExactlyOnce, Memory::default());
        connect(&mut core, replicas, 0, seen);
        connect(&mut core, replicas, 3, seen);
        let now = seen + *after;
        if new_session {
            core = self::core(Delivery::ExactlyOnce, core.into_memory());
            connect(&mut core, replicas, 0, now);
        }
        offer(&mut core, &["events.a", "events.b", "events.c", "events.d"]);
        let mut publish = publishes(&mut core, now);
        let found = publish.len();
        assert_eq!(found, *at_once, "{replicas} replicas, after {after:?}");
        // one by one, or together, all of them
        let mut all = 0;
        while !publish.is_empty() {
            all += publish.len();
            publish.iter().for_each(|it| ack(&mut core, it, now));
            publish = publishes(&mut core, now);
        }
        assert_eq!(all, 4);
    }
}

#[test]
fn a_replicated_stream_gets_one_event_at_a_time_for_ten_minutes_after_a_message_of_others() {
    let expected = [
        (Duration::ZERO, 1),
        (600 * SECOND - Duration::from_millis(1), 1),
        (600 * SECOND, 4),
    ];
    check_shared(3, false, &expected);
    // also where the session to Postgres is lost meanwhile
    check_shared(3, true, &expected);
    check_shared(1, false, &[(Duration::ZERO, 4)]);
}

/// The oldest event decides: what is acknowledged for others does not put its timeout off.
#[test]
fn an_event_without_an_answer_ends_the_connection_whatever_else_is_acknowledged() {
    let now = Instant::now();
    let mut core = core(Delivery::AtLeastOnce, Memory::default());
    connect(&mut core, 1, 0, now);
    offer(&mut core, &["events.a", "events.b", "events.c"]);
    let sent = publishes(&mut core, now);
    ack(&mut core, &sent[1], now + 9 * SECOND);
    assert_eq!(core.deadline(), Some(now + 10 * SECOND));
    ack(&mut core, &sent[0], now + 9 * SECOND);
    assert_eq!(core.deadline(), Some(now + 19 * SECOND));
    ack(&mut core, &sent[2], now + 10 * SECOND);
    assert_eq!(core.deadline(), None);
}

/// Postgres up to 14 sends each transaction without events.
#[test]
fn keepalives_behind_what_waits_are_kept_as_one() {
    let now = Instant::now();
    let mut core = core(Delivery::ExactlyOnce, Memory::default());
    connect(&mut core, 1, 0, now);
    offer(&mut core, &["events.a"]);
    let sent = publishes(&mut core, now);
    for lsn in 2..1000 {
        let mut batch = Batch::default();
        batch.push_boundary(Lsn(lsn));
        core.offer(Arc::new(batch));
        assert!(publishes(&mut core, now).is_empty());
    }
    assert_eq!(core.window.len(), 2);
    ack(&mut core, &sent[0], now);
    assert_eq!((core.settled(), core.is_settled()), (Lsn(999), true));
}

fn at(lsn: u64, ordinal: u32) -> Position {
    Position {
        commit_lsn: Lsn(lsn),
        ordinal,
    }
}

fn last(seq: u64, position: Position) -> Option<Checkpoint> {
    let id = None;
    Some(Checkpoint { seq, position, id })
}

/// A stream of this end, from which everything behind what the core knows of is gone.
fn connect_emptied(core: &mut Core, replicas: u32, last_seq: u64, now: Instant) {
    let stored = core.last_known("stream").cloned();
    let known = stored.as_ref().map_or(0, |known| known.seq);
    let consumed = last_seq - known;
    let tail = Tail {
        stored,
        consumed,
        ..Tail::default()
    };
    connect_to(core, replicas, last_seq, tail, now);
}

/// Everything up to `lsn` has come.
fn boundary(core: &mut Core, lsn: u64, now: Instant) {
    let mut batch = Batch::default();
    batch.push_boundary(Lsn(lsn));
    core.offer(Arc::new(batch));
    assert!(publishes(core, now).is_empty());
}

fn lineage(timeline: u32) -> Lineage {
    let source = Source {
        slot: "slot".into(),
        system_id: 7,
        timeline,
    };
    Lineage {
        source,
        switch_points: vec![(1, Lsn(100))],
    }
}

/// What a relay has written on the first timeline, after the event at `position`, and before it was killed.
fn mark(seq: u64, position: &str) -> Mark {
    Mark {
        name: "stream".into(),
        created: String::new(),
        last: Some((seq, format!("slot 7 1 {position}").parse().unwrap())),
        shared: false,
        at_rest: false,
        settled_seq: 0,
        confirmed_seq: 0,
    }
}

fn learned(mark: Mark, timeline: u32) -> Memory {
    let mut memory = Memory::default();
    memory.learn(vec![mark], &lineage(timeline)).unwrap();
    memory
}

fn refusal(last_seq: u64) -> AckError {
    AckError::Api(ApiError {
        code: 400,
        err_code: 10071,
        description: format!("wrong last sequence: {last_seq}"),
    })
}

#[test]
fn what_was_consumed_after_a_kill_is_counted_and_nothing_else_is() {
    let now = Instant::now();
    let mut core = core(Delivery::ExactlyOnce, learned(mark(5, "0/1 1"), 1));
    connect_emptied(&mut core, 1, 7, now);
    core.log_ended_at(Lsn(50));
    offer_at(&mut core, 2, &["events.a"]);
    assert!(publishes(&mut core, now).is_empty());
    // the other was somebody else's, since nobody can have published this one
    offer_at(&mut core, 60, &["events.b"]);
    assert_eq!(subjects(&publishes(&mut core, now)), ["events.b"]);
    // nor is it counted when that one is lost on its way
    connect_emptied(&mut core, 1, 7, now);
    assert_eq!(subjects(&publishes(&mut core, now)), ["events.b"]);
}

/// What the old primary has published and the new one does not know of may have been consumed since.
#[test]
fn what_is_gone_is_not_counted_over_a_failover() {
    let now = Instant::now();
    for (timeline, expected) in [(1, 0), (2, 1)] {
        let mut core = core(Delivery::ExactlyOnce, learned(mark(5, "0/1 1"), timeline));
        connect_emptied(&mut core, 1, 7, now);
        core.log_ended_at(Lsn(50));
        offer_at(&mut core, 2, &["events.a"]);
        assert_eq!(publishes(&mut core, now).len(), expected, "{timeline}");
    }
}

/// What lies before the tail is stored, whether it is still there or not.
#[test]
fn what_is_gone_before_the_tail_is_stored_also_over_a_failover() {
    let now = Instant::now();
    for timeline in [1, 2] {
        let mut core = core(Delivery::ExactlyOnce, learned(mark(1, "0/1 1"), timeline));
        let mut tail = Tail {
            stored: last(3, at(2, 2)),
            ..Tail::default()
        };
        tail.look_between(Between {
            from: at(1, 1),
            stored: vec![(at(2, 2), 3)],
            others: false,
        });
        connect_to(&mut core, 3, 3, tail, now);
        core.log_ended_at(Lsn(50));
        offer_at(&mut core, 2, &["events.a", "events.b"]);
        assert!(publishes(&mut core, now).is_empty(), "{timeline}");
    }
}

/// A relay that published one event and rested, got the slot back from one that published five and was killed.
#[test]
fn what_a_standby_has_published_is_counted_by_who_gets_the_slot_back() {
    let now = Instant::now();
    let mut before = core(Delivery::ExactlyOnce, Memory::default());
    connect(&mut before, 1, 0, now);
    offer_at(&mut before, 10, &["events.a"]);
    let sent = publishes(&mut before, now);
    ack(&mut before, &sent[0], now);
    boundary(&mut before, 11, now);
    let mut memory = before.into_memory();
    memory.learn(vec![mark(3, "0/1E 2")], &lineage(1)).unwrap();
    let mut after = core(Delivery::ExactlyOnce, memory);
    assert_eq!(after.last_known("stream"), last(3, at(30, 2)).as_ref());
    connect_emptied(&mut after, 1, 6, now);
    after.log_ended_at(Lsn(100));
    let names = [
        "events.1", "events.2", "events.3", "events.4", "events.5", "events.6",
    ];
    offer_at(&mut after, 30, &names);
    assert_eq!(subjects(&publishes(&mut after, now)), ["events.6"]);
}

/// What others have written, and somebody has purged since, is no loss of ours.
#[test]
fn a_stream_that_has_lost_messages_of_others_did_not_go_backwards() {
    let now = Instant::now();
    let mut core = core(Delivery::ExactlyOnce, Memory::default());
    let tail = |foreign, lost| Tail {
        stored: last(10, at(10, 1)),
        foreign,
        lost,
        ..Tail::default()
    };
    connect_to(&mut core, 1, 10, tail(0, 0), now);
    boundary(&mut core, 20, now);
    connect_to(&mut core, 1, 15, tail(5, 0), now);
    connect_to(&mut core, 1, 15, tail(0, 5), now);
    assert_eq!(core.acked_seq("stream"), 10);
}

/// Also where more events are on their way than there are names for their answers.
#[test]
fn the_first_of_a_burst_that_is_refused_is_published_again() {
    let now = Instant::now();
    for replicas in [1, 3] {
        let mut core = core(Delivery::ExactlyOnce, Memory::default());
        let stored = last(10, at(10, 1));
        let tail = Tail {
            stored,
            ..Tail::default()
        };
        connect_to(&mut core, replicas, 10, tail, now);
        core.log_ended_at(Lsn(20));
        boundary(&mut core, 25, now);
        let names: Vec<String> = (0..20).map(|n| format!("events.{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        offer_at(&mut core, 30, &names);
        let sent = publishes(&mut core, now);
        let refused = core.answer(sent[0].reply, Err(refusal(11)), now);
        assert!(refused.is_err());
        connect_emptied(&mut core, replicas, 11, now);
        let again = publishes(&mut core, now);
        assert_eq!(subjects(&again).first(), Some(&"events.0"), "{replicas}");
    }
}

/// A message that was gone when the stream was read had been consumed: the connection goes on. Of one that went since, a new
/// one has to tell.
#[test]
fn a_duplicate_of_what_was_consumed_before_the_connection_does_not_end_it() {
    let now = Instant::now();
    for (seq, goes_on) in [(7, true), (8, false)] {
        let mut core = core(Delivery::ExactlyOnce, learned(mark(7, "0/1 1"), 1));
        connect_emptied(&mut core, 1, 7, now);
        offer_at(&mut core, 2, &["events.a"]);
        let sent = publishes(&mut core, now);
        let duplicate = true;
        let answered = core.answer(sent[0].reply, Ok(PubAck { seq, duplicate }), now);
        assert_eq!(answered, Ok(None));
        let Ok(Next::Lookup { token, .. }) = core.next(now) else {
            panic!("it is not looked up");
        };
        assert_eq!(core.looked_up(token, None, now).is_ok(), goes_on, "{seq}");
        if goes_on {
            assert!(publishes(&mut core, now).is_empty());
            assert!(core.is_settled());
        }
    }
}

/// On a replicated stream that others write to: two events still there, one that is gone from its end.
#[test]
fn what_stands_between_a_mark_and_the_tail_is_found_again() {
    let now = Instant::now();
    let shared = Mark {
        shared: true,
        ..mark(10, "0/A 1")
    };
    let mut core = core(Delivery::ExactlyOnce, learned(shared, 1));
    let mut tail = Tail {
        stored: last(12, at(12, 1)),
        consumed: 1,
        ..Tail::default()
    };
    tail.look_between(Between {
        from: at(10, 1),
        stored: vec![(at(11, 1), 11), (at(12, 1), 12)],
        others: false,
    });
    connect_to(&mut core, 3, 13, tail, now);
    assert_eq!(core.last_known("stream"), last(10, at(10, 1)).as_ref());
}

/// Seen by a relay that was frozen, while its standby published.
#[test]
fn what_another_relay_has_published_is_none_of_others() {
    let now = Instant::now();
    let shared = |memory: Memory| {
        let mut core = core(Delivery::ExactlyOnce, memory);
        connect_emptied(&mut core, 1, 12, now);
        core.marks(&lineage(1).source).streams[0].shared
    };
    let seen = || {
        let mut core = core(Delivery::ExactlyOnce, learned(mark(10, "0/A 1"), 1));
        connect_emptied(&mut core, 1, 10, now);
        core.log_ended_at(Lsn(20));
        boundary(&mut core, 25, now);
        core.looked_at(0, 12, now).unwrap();
        assert!(core.marks(&lineage(1).source).streams[0].shared);
        core.into_memory()
    };
    assert!(shared(seen()));
    let mut memory = seen();
    memory.learn(vec![mark(12, "0/1E 2")], &lineage(1)).unwrap();
    assert!(!shared(memory));
}

/// The answers to questions go another way than the acks.
#[test]
fn a_look_is_judged_by_what_was_known_when_it_was_asked() {
    let now = Instant::now();
    let connected = || {
        let mut core = core(Delivery::ExactlyOnce, learned(mark(10, "0/A 1"), 1));
        connect_emptied(&mut core, 1, 10, now);
        core
    };
    let mut core = connected();
    assert_eq!(core.idle_streams().count(), 1);
    offer_at(&mut core, 30, &["events.a"]);
    let [publish] = &publishes(&mut core, now)[..] else {
        panic!("not one publish")
    };
    ack(&mut core, publish, now);
    core.looked_at(0, 10, now).expect("asked before the ack");
    // and now it is known
    assert_eq!(core.idle_streams().count(), 1);
    core.looked_at(0, 10, now).unwrap_err();
}
