//! Rules that the simulator does not switch off one by one.

use super::*;
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
    let mut batch = Batch::default();
    for (ordinal, subject) in (1..).zip(subjects) {
        let commit_lsn = Lsn(1);
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

/// What the old primary has published and the new one does not know of may have been consumed since.
#[test]
fn what_is_gone_is_not_counted_over_a_failover() {
    let now = Instant::now();
    for (timeline, expected) in [(1, 0), (2, 1)] {
        let source = Source {
            slot: "slot".into(),
            system_id: 7,
            timeline,
        };
        let lineage = Lineage {
            source,
            switch_points: vec![(1, Lsn(100))],
        };
        let mark = Mark {
            name: "stream".into(),
            created: String::new(),
            last: Some((0, "slot 7 1 0/0 1".parse().unwrap())),
            shared: false,
            at_rest: false,
            settled_seq: 0,
            confirmed_seq: 0,
        };
        let mut memory = Memory::default();
        memory.learn(vec![mark], &lineage).unwrap();
        let mut core = core(Delivery::ExactlyOnce, memory);
        connect_to(
            &mut core,
            1,
            2,
            Tail {
                stored: core_last(),
                consumed: 2,
                ..Tail::default()
            },
            now,
        );
        core.log_ended_at(Lsn(50));
        offer(&mut core, &["events.a"]);
        assert_eq!(publishes(&mut core, now).len(), expected, "{timeline}");
    }
}

fn core_last() -> Option<Checkpoint> {
    Some(Checkpoint {
        seq: 0,
        position: Position::default(),
        id: None,
    })
}
