//! At-least-once delivery between the same models: what is acknowledged is confirmed, whatever is lost on the way comes again, and
//! the first copies of a subject's events are in order.

use crate::nats::{Flight, Stream, refused};
use crate::postgres::{Event, Postgres, TOPICS, end_of, push, subject};
use jetstream_outbox::jetstream::ack::{AckError, Origin};
use jetstream_outbox::jetstream::streams::Routes;
use jetstream_outbox::outbox::batch::{Batch, Fate};
use jetstream_outbox::outbox::position::Position;
use jetstream_outbox::postgres::Lsn;
use jetstream_outbox::relay::core::Next;
use jetstream_outbox::relay::core::at_least_once::AtLeastOnce;
use jetstream_outbox::relay::core::capacity::Capacity;
use jetstream_outbox::relay::core::trouble::Trouble;
use jetstream_outbox::relay::core::window::Limits;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ACK_TIMEOUT: Duration = Duration::from_secs(10);

struct World {
    rng: fastrand::Rng,
    now: Instant,
    is_healed: bool,
    pg: Postgres,
    stream: Stream,
    /// The first copy of each event, in the order of the stream.
    stored: HashSet<u64>,
    last_of_topic: [u64; TOPICS],
    core: AtLeastOnce,
    next: usize,
    received: Lsn,
    out: VecDeque<Flight>,
}

fn capacity(stream: &Stream) -> Capacity {
    Capacity {
        routes: Routes::new(&[stream.info()]),
        max_payload: 1 << 20,
        position_source_len: 8,
        puts_aside: false,
        marks_ends: false,
    }
}

fn limits(rng: &mut fastrand::Rng) -> Limits {
    Limits {
        inflight: rng.usize(1..12),
        inflight_bytes: 1 << 20,
        replies: 1,
        ack_timeout: ACK_TIMEOUT,
    }
}

pub fn run(seed: u64) -> Result<(), String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let now = Instant::now();
    let window = Duration::from_secs(rng.u64(1..60));
    let mut stream = Stream::new(1, "A", rng.bool(), false, window, now);
    stream.topics = (0..TOPICS).collect();
    let core = AtLeastOnce::start(limits(&mut rng), capacity(&stream));
    let mut world = World {
        rng,
        now,
        is_healed: false,
        pg: Postgres::new(),
        stream,
        stored: HashSet::new(),
        last_of_topic: [0; TOPICS],
        core,
        next: 0,
        received: Lsn(0),
        out: VecDeque::new(),
    };
    for _ in 0..world.rng.u32(50..300) {
        world.step()?;
    }
    world.is_healed = true;
    for _ in 0..3_000 {
        world.step()?;
        if world.pg.confirmed == world.pg.wal_end {
            return Ok(());
        }
    }
    Err(format!(
        "no progress: {} of {}",
        world.pg.confirmed, world.pg.wal_end
    ))
}

impl World {
    fn step(&mut self) -> Result<(), String> {
        self.now += Duration::from_millis(self.rng.u64(..500));
        if !self.is_healed && self.rng.u32(..4) == 0 {
            self.commit();
        }
        if !self.is_healed && self.rng.u32(..40) == 0 {
            // a crash: a new copy stream from what was confirmed
            self.pg.confirmed = self.pg.persisted;
            self.core = AtLeastOnce::start(limits(&mut self.rng), capacity(&self.stream));
            self.next = self.pg.first_from(Lsn(0));
            self.out.clear();
        }
        if !self.is_healed && self.rng.u32(..30) == 0 {
            self.reconnect();
        }
        self.receive()?;
        loop {
            match self.core.next(self.now) {
                Ok(Next::Publish(publish)) => {
                    let event = publish.event.view();
                    let uid = std::str::from_utf8(event.body).ok();
                    let uid = uid.and_then(|it| it.split(' ').next()?.parse().ok());
                    let topic = (0..TOPICS).find(|topic| subject(*topic) == event.subject);
                    self.out.push_back(Flight {
                        uid: uid.ok_or("no uid")?,
                        topic: topic.ok_or("another subject")?,
                        reply: publish.token,
                        id: event.id.into(),
                        position: self.pg.lineage().at(event.position),
                        expected: publish.expected_last_sequence,
                        expected_last: None,
                        expected_stream: None,
                        is_late: false,
                        transaction_end: None,
                        sent: self.now,
                        routed: self.now,
                    });
                }
                Ok(Next::Nothing) => break,
                other => return Err(format!("unexpected: {other:?}")),
            }
        }
        self.deliver()?;
        if self
            .core
            .window()
            .deadline()
            .is_some_and(|at| self.now >= at)
        {
            self.reconnect();
        }
        self.confirm()
    }

    fn commit(&mut self) {
        let uid = self
            .pg
            .transactions
            .iter()
            .map(|it| it.events.len() as u64)
            .sum::<u64>();
        let event = |nth: u64, rng: &mut fastrand::Rng| Event {
            uid: uid + nth + 1,
            id: format!("e{}", uid + nth + 1),
            topic: rng.usize(..TOPICS),
            fate: Fate::Publish,
            is_large: false,
            ends: None,
            is_mystery: false,
            is_wide: false,
            reuses_id: false,
            position: Position::default(),
            committed: self.now,
        };
        let many = self.rng.u64(..4);
        let events = (0..many).map(|nth| event(nth, &mut self.rng)).collect();
        self.pg.commit(7, 0, events);
    }

    fn reconnect(&mut self) {
        self.core.on_disconnect();
        self.out.truncate(0);
        self.core.resume(capacity(&self.stream));
    }

    fn receive(&mut self) -> Result<(), String> {
        while self.core.wants_batch()
            && let Some(transaction) = self.pg.transactions.get(self.next)
        {
            let mut batch = Batch::default();
            for event in &transaction.events {
                push(&mut batch, event, event.position, &event.id);
            }
            batch.push(end_of(transaction));
            self.received = self.received.max(transaction.end_lsn);
            self.next += 1;
            self.core
                .offer(&Arc::new(batch))
                .map_err(|it| format!("{it:?}"))?;
        }
        Ok(())
    }

    fn deliver(&mut self) -> Result<(), String> {
        for _ in 0..self.rng.usize(..6) {
            let Some(flight) = self.out.pop_front() else {
                return Ok(());
            };
            let fault = match self.is_healed {
                true => 9,
                false => self.rng.u32(..30),
            };
            let answer = match fault {
                0 => continue,
                1 => Err(AckError::NoResponders),
                2 => Err(refused(429, 10167, "too many requests")),
                _ => self.arrive(&flight)?,
            };
            if fault == 3 {
                continue;
            }
            let origin = Arc::new(Origin {
                stream: "A".into(),
                domain: String::new(),
            });
            let answer = answer.map(|ack| (ack, origin));
            match self.core.answer(flight.reply, answer, self.now) {
                Ok(_) => {}
                Err(Trouble::Reconnect(_)) => self.reconnect(),
                Err(other) => return Err(format!("{other:?}")),
            }
        }
        Ok(())
    }

    fn arrive(
        &mut self,
        flight: &Flight,
    ) -> Result<Result<jetstream_outbox::jetstream::ack::PubAck, AckError>, String> {
        if flight.expected.is_some() {
            return Err("a fence with at-least-once delivery".into());
        }
        let answer = self.stream.publish(flight, true, self.now);
        if answer.is_ok() && self.stored.insert(flight.uid) {
            let last = &mut self.last_of_topic[flight.topic];
            if flight.uid < *last {
                return Err(format!("{} comes after e{last}, which is later", flight.id));
            }
            *last = flight.uid;
        }
        Ok(answer)
    }

    fn confirm(&mut self) -> Result<(), String> {
        let lsn = self.core.stored_lsn().min(self.received);
        let told = self.pg.transactions.iter().filter(|it| it.end_lsn <= lsn);
        for event in told.flat_map(|it| &it.events) {
            if !self.stored.contains(&event.uid) {
                return Err(format!("confirmed {lsn}, but {} is not stored", event.id));
            }
        }
        if lsn > self.pg.confirmed {
            self.pg.confirmed = lsn;
            if self.rng.bool() {
                self.pg.persisted = lsn;
            }
        }
        Ok(())
    }
}
