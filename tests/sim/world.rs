//! One run: the servers, the network between, the faults, and the relay's own driver around the real core.
//!
//! The driver does what `session`, `publisher` and `rejoin` do with sockets and threads. A [`Rule`] that is
//! switched off is left out or falsified here, around the core: there is no hook in the relay.

use crate::model::{Event, Flight, Key, Postgres, Stream, refused};
use crate::rules::Rule;
use jetstream_outbox::jetstream::Delivery;
use jetstream_outbox::jetstream::ack::{AckError, PubAck};
use jetstream_outbox::jetstream::resume::{Between, Checkpoint, Extent, Lineage, Tail, find_tail};
use jetstream_outbox::jetstream::streams::{Routes, StreamConfig, StreamInfo, StreamState};
use jetstream_outbox::outbox::batch::{Batch, Change, Fate};
use jetstream_outbox::outbox::park;
use jetstream_outbox::outbox::position::{Position, Source, SourcePosition};
use jetstream_outbox::postgres::Lsn;
use jetstream_outbox::relay::checkpoint::{CheckpointStore, Opened, Overtaken, Value, Write};
use jetstream_outbox::relay::core::memory::Memory;
use jetstream_outbox::relay::core::{Core, Limits, Next, StreamAtConnect, Trouble};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

const ACK_TIMEOUT: Duration = Duration::from_secs(2);
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// The channel between reader and publisher.
const CHANNEL_BATCHES: usize = 4;
/// What the streams of events take, and what is too large for them.
const MAX_MSG_SIZE: i64 = 1_000;
const TOO_LARGE: usize = 1_500;
const PARK_SUBJECT: &str = "parked";

/// What may go wrong in a run beside what always may. What excludes each other is not promised together;
/// see the header of `main.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Servers lose what they stored within the hold-back.
    Rollback,
    /// The server loses the end of the checkpoint's bucket alone.
    BucketBack,
    /// Others write to the streams.
    Foreign,
    /// The messages are consumed away.
    Consumed,
    /// An operator purges streams of which nothing is consumed.
    Purged,
    /// Writers use ids twice.
    ReusedIds,
    /// A standby takes over, with or without the last of the log.
    Failover,
    /// Somebody else moves the slot, or makes it anew.
    SlotMoved,
    /// A message of somebody else comes and is purged with all others, while nothing of ours is on its way.
    Guest,
}

/// A connection to NATS; an abandoned one still delivers what it had been given.
#[derive(Default)]
struct Connection {
    out: VecDeque<Flight>,
    answers: VecDeque<(Flight, Result<PubAck, AckError>)>,
    /// Writes of the checkpoint, and when they arrive.
    writes: VecDeque<(Instant, Write)>,
    /// The answers to them, and when these arrive.
    replies: VecDeque<(Instant, u64, Result<PubAck, AckError>)>,
    /// A stream went back under it: what it publishes behind the old end is not late enough to arrive at a new one.
    outlived: bool,
}

/// A copy stream and the core that it feeds.
struct Session {
    core: Core,
    start: Lsn,
    /// The next transaction that the walsender looks at.
    cursor: usize,
    received: Lsn,
    channel: VecDeque<Batch>,
}

/// What a relay remembers from one session to the next.
struct Process {
    store: CheckpointStore,
    memory: Memory,
    learned: bool,
    reached: Option<SourcePosition>,
}

impl Process {
    fn new(checkpoint: bool, number: usize) -> Process {
        Process {
            store: store(checkpoint, number),
            memory: Memory::default(),
            learned: false,
            reached: None,
        }
    }
}

pub struct World {
    rng: fastrand::Rng,
    off: Option<Rule>,
    kind: Kind,
    hold_back: Duration,
    now: Instant,
    begun: Instant,
    healed: bool,
    postgres: Postgres,
    /// In runs with parked events the last one is theirs.
    streams: Vec<Stream>,
    /// Chooses what is parked, so that runs without are as they were.
    parking: Option<fastrand::Rng>,
    /// The committed events of each stream, in order.
    committed: Vec<Vec<Event>>,
    /// The checkpoint's key in the server.
    key: Key,
    /// In some runs the bucket is slow, and fails beside the streams; in the others it answers at once.
    bucket: Option<fastrand::Rng>,
    /// In some runs answers share names, and refusals overtake acks; in the others each has a name of its own.
    names: Option<fastrand::Rng>,
    lineage: Lineage,
    session: Option<Session>,
    connection: Option<Connection>,
    zombies: Vec<Connection>,
    process: Process,
    /// How many there were.
    processes: usize,
    /// In some runs two relays have the slot in turn: the one that waits for it.
    standby: Option<Process>,
    /// The slot was moved; the relay has said so and ended.
    moved: bool,
    halted: bool,
    next_look: Instant,
    /// What [`Rule::TailRead`] falsifies.
    old_tails: Vec<Tail>,
    pub trace: Vec<String>,
}

type Outcome = Result<(), String>;

macro_rules! trace {
    ($world:expr, $($arg:tt)*) => {
        $world.trace.push(format!("{:>8.3}s {}", ($world.now - $world.begun).as_secs_f64(), format_args!($($arg)*)))
    };
}

/// Runs one seed; `Err` says which promise was broken.
pub fn run(seed: u64, off: Option<Rule>) -> (Outcome, Vec<String>) {
    let mut world = World::new(seed, off);
    let outcome = world.live();
    (outcome, world.trace)
}

impl World {
    fn new(seed: u64, off: Option<Rule>) -> World {
        let mut rng = fastrand::Rng::with_seed(seed);
        let kinds = [
            Kind::Rollback,
            Kind::Foreign,
            Kind::Consumed,
            Kind::ReusedIds,
            Kind::Failover,
            Kind::SlotMoved,
        ];
        let mut kind = kinds[rng.usize(..kinds.len())];
        // so that the other seeds stay what they were
        if seed % 11 == 3 {
            kind = Kind::Purged;
        } else if seed % 12 == 5 {
            kind = Kind::BucketBack;
        } else if seed % 13 == 4 {
            kind = Kind::Guest;
        }
        let replicated = rng.bool();
        let window = Duration::from_secs([1, 20, 120][rng.usize(..3)]);
        let captures: &[(&str, &str)] = match rng.bool() {
            true => &[("A", "events.0.>"), ("B", "events.1.>")],
            false => &[("ALL", "events.>")],
        };
        let stream = |(name, subjects): &(&'static str, &'static str)| {
            let keeps_its_end = !replicated && kind != Kind::Consumed;
            Stream::new(name, subjects, replicated, keeps_its_end, window)
        };
        let mut streams: Vec<Stream> = captures.iter().map(stream).collect();
        let parking = (seed % 5 == 2).then(|| fastrand::Rng::with_seed(!seed));
        if parking.is_some() {
            streams.push(stream(&("PARKED", PARK_SUBJECT)));
        }
        let shortest = match kind {
            Kind::Rollback | Kind::BucketBack | Kind::Consumed | Kind::Purged | Kind::Guest => 1,
            Kind::Foreign | Kind::ReusedIds | Kind::Failover | Kind::SlotMoved => 0,
        };
        let hold_back = Duration::from_secs([0, 10, 30][rng.usize(shortest..3)]);
        // consumed messages, and others on a replicated stream, are not coped with without one
        let consumed = matches!(kind, Kind::Consumed | Kind::Purged | Kind::Guest);
        let needed = consumed || kind == Kind::SlotMoved || kind == Kind::Foreign && replicated;
        let checkpoint = needed || rng.bool();
        let now = Instant::now();
        let source = Source {
            slot: "slot".to_string(),
            system_id: 1,
            timeline: 1,
        };
        let mut world = World {
            rng,
            off,
            kind,
            hold_back,
            now,
            begun: now,
            healed: false,
            postgres: Postgres::default(),
            committed: streams.iter().map(|_| Vec::new()).collect(),
            streams,
            parking,
            key: Key::default(),
            bucket: (seed % 4 == 1).then(|| fastrand::Rng::with_seed(seed.rotate_left(32))),
            names: (seed % 6 == 2).then(|| fastrand::Rng::with_seed(seed.reverse_bits())),
            lineage: Lineage {
                source,
                switch_points: Vec::new(),
            },
            session: None,
            connection: None,
            zombies: Vec::new(),
            process: Process::new(checkpoint, 0),
            processes: 2,
            standby: (seed % 3 == 2 && kind != Kind::Guest).then(|| Process::new(checkpoint, 1)),
            moved: false,
            halted: false,
            next_look: now,
            old_tails: Vec::new(),
            trace: Vec::new(),
        };
        trace!(
            world,
            "{kind:?}, {} streams, replicated: {replicated}, ids kept {window:?}, hold-back {hold_back:?}, checkpoint: {checkpoint}",
            captures.len()
        );
        world
    }

    fn is_off(&self, rule: Rule) -> bool {
        self.off == Some(rule)
    }

    /// One of `n`; never once the faults are over.
    fn one_in(&mut self, n: u32) -> bool {
        !self.healed && self.rng.u32(..n) == 0
    }

    fn live(&mut self) -> Outcome {
        for _ in 0..self.rng.u32(50..400) {
            self.step()?;
        }
        self.heal()
    }

    fn step(&mut self) -> Outcome {
        match self.rng.u32(..100) {
            0..16 => self.commit(),
            16..30 => self.walsender(),
            30..50 => self.relay()?,
            50..70 => self.deliver()?,
            70..84 => self.answer()?,
            84..88 => {
                let pause = Duration::from_millis(self.rng.u64(1..900));
                self.pass(pause)?;
            }
            88 if self.one_in(4) => {
                let seconds = self.rng.u32(1..40);
                trace!(self, "{seconds} s pass");
                for _ in 0..seconds {
                    self.pass(Duration::from_millis(900))?;
                }
            }
            89 => self.lose_connection(),
            90 if self.one_in(2) => {
                self.end_session()?;
                self.take_over();
            }
            91 if self.kind != Kind::Guest && self.one_in(2) => self.kill(),
            95..98 if self.kind == Kind::Guest => self.guest()?,
            92 if self.kind == Kind::Rollback => self.roll_back(),
            93..95 if self.kind == Kind::Foreign => self.foreign(),
            95..98 if self.kind == Kind::Consumed => self.consume(),
            95 if self.kind == Kind::Purged => self.purge(),
            92 if self.kind == Kind::Failover && self.one_in(2) => self.fail_over(),
            92 if self.kind == Kind::SlotMoved && self.one_in(2) => self.move_slot(),
            98 => self.deliver_zombie()?,
            94 | 96 | 99 if self.bucket_fails(1) => self.slow_time()?,
            _ => {}
        }
        Ok(())
    }

    /// The other relay gets the slot.
    fn take_over(&mut self) {
        if let Some(standby) = &mut self.standby
            && self.session.is_none()
        {
            std::mem::swap(standby, &mut self.process);
            trace!(self, "the other relay gets the slot");
        }
    }

    fn kill(&mut self) {
        trace!(self, "the relay is killed");
        self.lose_connection();
        self.session = None;
        self.process = Process::new(!self.process.store.is_forbidden(), self.processes);
        self.processes += 1;
    }

    /// No more faults: everything must be stored and confirmed soon.
    fn heal(&mut self) -> Outcome {
        trace!(self, "no more faults");
        self.healed = true;
        while !self.zombies.is_empty() {
            self.deliver_zombie()?;
        }
        for second in 0..self.hold_back.as_secs() + 100 {
            if second == 3 && self.kind == Kind::Rollback {
                self.roll_back();
            }
            for _ in 0..60 {
                self.work()?;
            }
            self.pass(Duration::from_secs(1))?;
            if self.halted {
                return Ok(());
            }
            if self.postgres.confirmed == self.postgres.wal_end {
                return self.all_is_stored();
            }
        }
        Err(format!(
            "no progress: {} of {} confirmed",
            self.postgres.confirmed, self.postgres.wal_end
        ))
    }

    fn all_is_stored(&self) -> Outcome {
        for (stream, committed) in self.streams.iter().zip(&self.committed) {
            let mut stored: Vec<usize> = stream.history.iter().map(|(_, nth, _)| *nth).collect();
            stored.sort_unstable();
            let mut stored = stored.into_iter().peekable();
            for event in committed {
                if stored.next_if_eq(&event.nth).is_none() && !event.reused && !event.forgotten {
                    return Err(format!("lost: {event:?} is not in {}", stream.name));
                }
            }
        }
        Ok(())
    }

    /// How many streams are for events that are not parked.
    fn homes(&self) -> usize {
        self.streams.len() - usize::from(self.parking.is_some())
    }

    fn commit(&mut self) {
        let mut events = Vec::new();
        for _ in 0..self.rng.usize(..5) {
            let mut stream = self.rng.usize(..self.homes());
            let mut too_large_for = None;
            if let Some(rng) = &mut self.parking
                && rng.u32(..5) == 0
            {
                too_large_for = rng.bool().then_some(stream);
                stream = self.streams.len() - 1;
            }
            let nth = self.committed[stream].len();
            let again = self.kind == Kind::ReusedIds && nth > 0 && self.one_in(6);
            let id = match again {
                true => {
                    let earlier = self.rng.usize(nth.saturating_sub(4)..nth);
                    self.committed[stream][earlier].id.clone()
                }
                false => format!("{stream}-{nth}"),
            };
            let event = Event {
                position: Position::default(),
                id,
                stream,
                nth,
                reused: again,
                timeline: self.lineage.source.timeline,
                forgotten: false,
                too_large_for,
            };
            self.committed[stream].push(event.clone());
            events.push(event);
        }
        self.postgres.commit(events);
        let transaction = self.postgres.transactions.last().expect("just committed");
        for event in &transaction.events {
            self.committed[event.stream][event.nth] = event.clone();
        }
        let ids: Vec<&str> = transaction.events.iter().map(|e| e.id.as_str()).collect();
        trace!(
            self,
            "commit {} {ids:?}, ends at {}", transaction.commit_lsn, transaction.end_lsn
        );
    }

    /// The walsender and the reader: transactions and keepalives come as batches.
    fn walsender(&mut self) {
        let (keepalive, many) = (self.one_in(4), self.rng.usize(1..4));
        let split = self.rng.bool();
        let homes = self.homes();
        let Some(session) = &mut self.session else {
            return;
        };
        if session.channel.len() >= CHANNEL_BATCHES {
            return;
        }
        let mut batch = Batch::default();
        let mut sent = Lsn::INVALID;
        for transaction in self
            .postgres
            .transactions
            .iter()
            .skip(session.cursor)
            .take(many)
        {
            session.cursor += 1;
            sent = transaction.end_lsn;
            if transaction.commit_lsn < session.start {
                continue;
            }
            for (i, event) in transaction.events.iter().enumerate() {
                if split && i == 2 {
                    session.channel.push_back(std::mem::take(&mut batch));
                }
                let is_parked = event.stream >= homes;
                let (fate, subject) =
                    match event.too_large_for.or((!is_parked).then_some(event.stream)) {
                        Some(home) => (Fate::Publish, format!("events.{home}.x")),
                        None => (Fate::Park, PARK_SUBJECT.to_string()),
                    };
                let body = if event.too_large_for.is_some() {
                    TOO_LARGE
                } else {
                    2
                };
                let added = batch.draft("t", event.position, fate, |draft| {
                    let append = |part: &[u8], out: &mut Vec<u8>| {
                        out.extend_from_slice(part);
                        Ok::<(), ()>(())
                    };
                    draft.subject(|out| append(subject.as_bytes(), out))?;
                    draft.id(|out| append(event.id.as_bytes(), out))?;
                    draft.body(|out| append(&vec![b'x'; body], out))
                });
                added.expect("nothing in it fails");
            }
            session.received = transaction.end_lsn;
            match transaction.events.is_empty() {
                true => batch.push_boundary(transaction.end_lsn),
                false => batch.push(Change::Commit {
                    commit_lsn: transaction.commit_lsn,
                    end_lsn: transaction.end_lsn,
                    commit_time_us: 0,
                }),
            }
        }
        let caught_up = session.cursor == self.postgres.transactions.len();
        if caught_up || keepalive && sent > Lsn::INVALID {
            let wal_end = if caught_up {
                self.postgres.wal_end
            } else {
                sent
            };
            session.received = session.received.max(wal_end);
            batch.push_boundary(wal_end);
        }
        if !batch.is_empty() {
            session.channel.push_back(batch);
        }
    }

    /// One round of the relay: whatever is missing is connected, then the publisher's loop runs once.
    fn relay(&mut self) -> Outcome {
        if self.halted {
            return Ok(());
        }
        if self.session.is_none() {
            return self.start_session();
        }
        if self.connection.is_none() {
            return self.rejoin();
        }
        let outcome = self.publisher();
        self.handle(outcome)?;
        self.bucket_answers();
        Ok(())
    }

    fn publisher(&mut self) -> Result<Result<(), Trouble>, String> {
        let now = self.now;
        let (fence, tick) = (!self.is_off(Rule::Fence), !self.is_off(Rule::AckTimeout));
        let homes = self.homes();
        let (lookup, look) = (!self.is_off(Rule::Lookup), !self.is_off(Rule::Look));
        let (Some(session), Some(connection)) = (&mut self.session, &mut self.connection) else {
            return Ok(Ok(()));
        };
        if tick && let Err(trouble) = session.core.tick(now) {
            return Ok(Err(trouble));
        }
        loop {
            match session.core.next(now) {
                Ok(Next::Publish(publication)) => {
                    let position = publication.event.position();
                    let event = self
                        .committed
                        .iter()
                        .flatten()
                        .find(|event| event.position == position && !event.forgotten)
                        .ok_or("an event that was never committed")?;
                    if (publication.event.fate() == Fate::Park) != (event.stream >= homes) {
                        return Err(format!("published in the wrong form: {event:?}"));
                    }
                    connection.out.push_back(Flight {
                        token: publication.token,
                        reply: publication.reply,
                        event: event.clone(),
                        expected: publication.expected_last_sequence.filter(|_| fence),
                        expected_last: publication
                            .expected_last
                            .filter(|_| fence)
                            .map(|last| last.id().to_string()),
                    });
                }
                Ok(Next::Lookup { stream, seq, token }) => {
                    if session.core.waiting() > 0 {
                        return Err("a look at a message while answers to publishes are due".into());
                    }
                    let source = &self.lineage.source;
                    let found = self.streams.iter().find(|s| s.name == stream);
                    let found = found
                        .and_then(|s| s.messages.get(&seq))
                        .and_then(|message| message.event.as_ref());
                    let position = found.map(|event| SourcePosition {
                        source: Source {
                            timeline: event.timeline,
                            ..source.clone()
                        },
                        position: event.position,
                    });
                    let used = found.map(|event| (event.id.as_str(), position.as_ref()));
                    let used = if lookup {
                        used
                    } else {
                        Some(("another", None))
                    };
                    let dropped = match session.core.looked_up(token, used, now) {
                        Ok(dropped) => dropped,
                        Err(trouble) => return Ok(Err(trouble)),
                    };
                    trace!(self, "looked at {seq} of {stream}, dropped {dropped:?}");
                }
                Ok(Next::TooLarge { token, .. }) => {
                    let event = session
                        .core
                        .event(token)
                        .ok_or("an event that is not there")?;
                    let room = session.core.room(PARK_SUBJECT);
                    let parked = park::parked(&event, PARK_SUBJECT, "too large", room);
                    session.core.replace(token, parked);
                }
                Ok(Next::Nothing) => break,
                Err(trouble) => return Ok(Err(trouble)),
            }
        }
        if look && now >= self.next_look {
            self.next_look = now + LOOK_INTERVAL;
            let idle = session.core.idle_streams();
            let idle: Vec<_> = idle.map(|(i, name)| (i, name.to_string())).collect();
            for (index, name) in idle {
                let stream = self.streams.iter().find(|s| s.name == name);
                let last_seq = stream.map_or(0, |s| s.last_seq);
                if let Err(trouble) = session.core.looked_at(index, last_seq, now) {
                    return Ok(Err(trouble));
                }
            }
        }
        let confirmable = session.core.confirmable(now);
        let marks = || session.core.marks(&self.lineage.source);
        if let Some(write) = self.process.store.write(marks, confirmable, now, false) {
            let slow = self.bucket.as_mut().filter(|_| !self.healed);
            let delay = slow.map_or(0, |rng| [0, 1, 12, 12][rng.usize(..4)]);
            let arrives = now + Duration::from_secs(delay);
            connection.writes.push_back((arrives, write));
        }
        self.confirm()?;
        let Some(session) = &mut self.session else {
            return Ok(Ok(()));
        };
        if session.core.wants_batch()
            && let Some(batch) = session.channel.pop_front()
        {
            session.core.offer(Arc::new(batch));
        }
        Ok(Ok(()))
    }

    /// A standby status update, and what it may claim.
    fn confirm(&mut self) -> Outcome {
        let lost = self.one_in(4);
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        let lsn = session.core.confirmable(self.now);
        if lsn <= self.postgres.confirmed || lost {
            return Ok(());
        }
        if lsn > session.received {
            return Err(format!("confirmed {lsn}, received {}", session.received));
        }
        let confirmed = self.postgres.first_unconfirmed();
        for transaction in self.postgres.transactions.iter().skip(confirmed) {
            if transaction.commit_lsn >= lsn {
                break;
            }
            for event in transaction.events.iter().filter(|event| !event.reused) {
                let history = &self.streams[event.stream].history;
                let stored = history.iter().find(|(_, nth, _)| *nth == event.nth);
                match stored {
                    None => return Err(format!("confirmed {lsn}, but {event:?} is not stored")),
                    Some((_, _, time)) if self.now - *time < self.hold_back => {
                        return Err(format!("confirmed {lsn}, but {event:?} is too young"));
                    }
                    Some(_) => {}
                }
            }
        }
        trace!(self, "confirmed {lsn}");
        self.postgres.confirmed = lsn;
        Ok(())
    }

    /// One of `n`, in runs where the bucket fails.
    fn bucket_fails(&mut self, n: u32) -> bool {
        let rng = self.bucket.as_mut().filter(|_| !self.healed);
        rng.is_some_and(|rng| rng.u32(..n) == 0)
    }

    fn put(&mut self, write: &Write) -> Result<PubAck, AckError> {
        if self.is_off(Rule::Checkpoint) {
            return Ok(PubAck {
                seq: write.revision,
                duplicate: false,
            });
        }
        self.key.put(write, self.now)
    }

    fn read_key(&self) -> Value {
        let value = self.key.read(self.begun, self.now);
        match self.is_off(Rule::Ripening) {
            true => Value {
                stored_ms: Some(0),
                ..value
            },
            false => value,
        }
    }

    /// Writes reach the bucket, and the answers the relay, as far as they are due.
    fn bucket_answers(&mut self) {
        let now = self.now;
        let write = self.connection.as_mut();
        let write = write.and_then(|it| pop_due(&mut it.writes, |(due, _)| *due <= now));
        if let Some((_, write)) = write
            && !self.bucket_fails(10)
        {
            let answer = self.put(&write);
            trace!(self, "checkpoint {} is written: {answer:?}", write.number);
            let slow = self.bucket.as_mut().filter(|_| !self.healed);
            let delay = slow.map_or(0, |rng| [0, 1, 12, 12][rng.usize(..4)]);
            let reply = (now + Duration::from_secs(delay), write.number, answer);
            if !self.bucket_fails(10)
                && let Some(connection) = &mut self.connection
            {
                connection.replies.push_back(reply);
            }
        }
        let reply = self.connection.as_mut();
        let reply = reply.and_then(|it| pop_due(&mut it.replies, |(due, ..)| *due <= now));
        if let Some((_, number, answer)) = reply {
            let number = match self.is_off(Rule::LateAnswer) {
                true => self.process.store.writes(),
                false => number,
            };
            self.written(number, answer);
        }
    }

    /// The answer to a write reaches the relay.
    fn written(&mut self, number: u64, answer: Result<PubAck, AckError>) {
        let Some(session) = &mut self.session else {
            return;
        };
        match self.process.store.written(number, answer, self.now) {
            Ok(Some(marks)) => session.core.kept(marks, self.now),
            Ok(None) => {}
            Err(Overtaken) => {
                trace!(self, "the checkpoint was written meanwhile");
                self.lose_connection();
            }
        }
    }

    /// What the publisher and the session make of trouble.
    fn handle(&mut self, outcome: Result<Result<(), Trouble>, String>) -> Outcome {
        let Err(trouble) = outcome? else {
            return Ok(());
        };
        trace!(self, "{trouble:?}");
        match trouble {
            Trouble::Reconnect(_) | Trouble::Refused { .. } => self.lose_connection(),
            Trouble::Backwards(_) if self.is_off(Rule::Replay) => self.lose_connection(),
            Trouble::Backwards(_) => {
                self.end_session()?;
                self.process.store.unripe();
            }
            Trouble::Halt(halt) => return Err(format!("halted without need: {halt:?}")),
        }
        Ok(())
    }

    fn start_session(&mut self) -> Outcome {
        let Opened {
            marks: kept,
            by_another,
            ..
        } = self.open_bucket().unwrap_or_default();
        let rebased = self.process.memory.rebase(&self.lineage, false);
        rebased.expect("the server was promoted");
        if !self.process.learned || by_another {
            let learned = self
                .process
                .memory
                .learn(kept.streams.clone(), &self.lineage);
            learned.expect("the server was promoted");
            self.process.store.learned();
            self.process.learned = true;
        }
        let reached = [&self.process.reached, &kept.reached].into_iter().flatten();
        let reached = reached.filter_map(|at| self.lineage.reach(at)).max();
        let confirmed = self.postgres.confirmed;
        let beyond = reached.is_some_and(|reached| reached < confirmed);
        if self.process.store.is_kept() && beyond && !self.is_off(Rule::Reached) {
            if self.moved {
                trace!(self, "halted: the slot was moved");
                self.halted = true;
                return Ok(());
            }
            return Err(format!("the slot is at {confirmed}, behind {reached:?}"));
        }
        self.process.memory.reached = reached.unwrap_or_default().max(confirmed);
        let memory = std::mem::take(&mut self.process.memory);
        let found = self.read_streams(|stream| memory.last_known(stream).cloned());
        let position = |stream: &StreamAtConnect| match &stream.tail {
            Tail {
                between: Some(between),
                ..
            } => between.from.commit_lsn,
            tail => {
                let stored = tail.stored.as_ref();
                stored.map_or(Lsn::INVALID, |stored| stored.position.commit_lsn)
            }
        };
        let oldest = found.iter().map(position).min().unwrap_or_default();
        let newest = found.iter().map(position).max().unwrap_or_default();
        let start = if self.is_off(Rule::OldestTail) {
            newest
        } else {
            oldest
        };
        let limits = Limits {
            inflight: self.rng.usize(1..12),
            inflight_bytes: 1 << 20,
            replies: self.names.as_mut().map_or(1 << 20, |rng| rng.u64(1..6)),
            ack_timeout: ACK_TIMEOUT,
            hold_back: if self.is_off(Rule::HoldBack) {
                Duration::ZERO
            } else {
                self.hold_back
            },
        };
        let core = Core::new(Delivery::ExactlyOnce, limits, memory);
        self.session = Some(Session {
            core,
            start,
            cursor: self.postgres.first_unconfirmed(),
            received: Lsn::INVALID,
            channel: VecDeque::new(),
        });
        trace!(
            self,
            "start replication at {start}, confirmed {}", self.postgres.confirmed
        );
        self.join(found)?;
        if let Some(session) = &mut self.session {
            if self.process.store.is_kept() {
                let ripe = self
                    .process
                    .store
                    .ripe(&self.lineage, self.hold_back, self.now);
                session.core.has_checkpoint(ripe);
            }
            session.core.log_ended_at(match self.off {
                Some(Rule::Sent) => Lsn(u64::MAX),
                _ => self.postgres.wal_end,
            });
            session.core.starts_at(start, self.now);
        }
        if !self.begin_checkpoint() {
            self.lose_session();
        }
        Ok(())
    }

    /// Reads the checkpoint over a new connection; `None`: the relay may not.
    fn open_bucket(&mut self) -> Option<Opened> {
        if self.process.store.is_forbidden() {
            return None;
        }
        let mut opened = self.process.store.opened(self.read_key(), self.now);
        opened.by_another &= self.off != Some(Rule::Company);
        Some(opened)
    }

    fn rejoin(&mut self) -> Outcome {
        let needed = match self.kind {
            Kind::Consumed | Kind::Purged | Kind::Guest | Kind::SlotMoved | Kind::Foreign => true,
            Kind::Rollback | Kind::BucketBack | Kind::ReusedIds | Kind::Failover => false,
        };
        if !needed && self.bucket_fails(60) {
            trace!(self, "the bucket may no longer be used");
            self.process.store.forbid();
            if let Some(standby) = &mut self.standby {
                standby.store.forbid();
            }
        }
        let Opened {
            marks,
            went_back,
            by_another,
        } = self.open_bucket().unwrap_or_default();
        if by_another {
            trace!(self, "another relay has written the checkpoint");
            return self.end_session();
        }
        if !self.process.store.is_kept()
            && let Some(session) = &mut self.session
        {
            session.core.has_no_checkpoint(self.now);
        }
        if let Some(session) = &mut self.session {
            if went_back && self.off != Some(Rule::CheckpointBack) {
                session.core.checkpoint_went_back();
            }
            let reached = marks.reached.and_then(|at| self.lineage.reach(&at));
            session.core.has_reached(reached.unwrap_or_default());
        }
        let known = |world: &World, stream: &str| {
            let session = world.session.as_ref()?;
            session.core.last_known(stream).cloned()
        };
        let found = self.read_streams(|stream| known(self, stream));
        let stale = |found: Vec<StreamAtConnect>| {
            let stale = found.into_iter().zip(self.old_tails.clone());
            stale
                .map(|(stream, tail)| StreamAtConnect { tail, ..stream })
                .collect()
        };
        let found = if self.is_off(Rule::TailRead) {
            stale(found)
        } else {
            found
        };
        self.join(found)?;
        if !self.begin_checkpoint() {
            self.lose_connection();
        }
        Ok(())
    }

    fn join(&mut self, found: Vec<StreamAtConnect>) -> Outcome {
        self.old_tails = found.iter().map(|stream| stream.tail.clone()).collect();
        for stream in &found {
            trace!(
                self,
                "{} ends at {}: {:?}, old enough {:?}",
                stream.name,
                stream.last_seq,
                stream.tail,
                stream.aged
            );
        }
        let infos: Vec<StreamInfo> = self.streams.iter().map(info).collect();
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        session
            .core
            .takes(1 << 20, 0, self.off != Some(Rule::Limits));
        self.connection = Some(Connection::default());
        if let Err(trouble) = session.core.connected(Routes::new(&infos), found, self.now) {
            return self.handle(Ok(Err(trouble)));
        }
        Ok(())
    }

    /// `false`: the checkpoint could not be written.
    fn begin_checkpoint(&mut self) -> bool {
        let Some(session) = &self.session else {
            return true;
        };
        let marks = session.core.marks(&self.lineage.source);
        let Some(write) = self.process.store.begin(marks, self.now) else {
            return true;
        };
        if self.bucket_fails(10) {
            return false;
        }
        let answer = self.put(&write);
        trace!(self, "checkpoint {} begins: {answer:?}", write.number);
        let is_written = answer.is_ok() && !self.bucket_fails(10);
        if is_written {
            self.written(write.number, answer);
        }
        is_written
    }

    /// `rejoin::Found::join`.
    fn read_streams(
        &self,
        last_known: impl Fn(&str) -> Option<Checkpoint>,
    ) -> Vec<StreamAtConnect> {
        let mut lineage = self.lineage.clone();
        if self.is_off(Rule::SwitchPoint) {
            let all = |(timeline, _): &(u32, Lsn)| (*timeline, Lsn(u64::MAX));
            lineage.switch_points = lineage.switch_points.iter().map(all).collect();
        }
        let source = &lineage.source;
        let mut found = Vec::new();
        for stream in &self.streams {
            let checkpoint = last_known(stream.name);
            let newest = stream.messages.keys().next_back();
            let newest = newest.and_then(|seq| stream.read(source, *seq));
            let state = info(stream).state;
            let extent = Extent {
                first_seq: state.first_seq,
                last_seq: state.last_seq,
                whole: state.num_deleted == 0,
                keeps_its_end: stream.keeps_its_end && !self.is_off(Rule::LostEnd),
            };
            let fetch = |seq| Ok::<_, ()>(stream.read(source, seq));
            let search = find_tail(source, extent, newest.as_ref(), checkpoint.as_ref(), fetch);
            let search = search.expect("the model answers");
            let mut tail = lineage
                .judge(search, checkpoint.as_ref(), false)
                .expect("the server was promoted");
            let old = |message: &&crate::model::Stored| {
                self.is_off(Rule::Age) || self.now - message.time >= self.hold_back
            };
            let messages = stream.messages.values();
            let mut ours = messages.clone().filter(|m| m.event.is_some());
            let has_young = ours.any(|message| !old(&message));
            let aged = messages
                .filter(old)
                .filter_map(|m| m.event.as_ref())
                .rfind(|event| event.timeline == source.timeline);
            if let (true, Some(known), Some(stored)) = (
                stream.replicated && !self.is_off(Rule::Between),
                &checkpoint,
                &tail.stored,
            ) {
                let stretch = known.seq + 1..=stored.seq;
                if !stretch.is_empty() {
                    let mut between = Between::after(known.position);
                    for message in stretch.filter_map(|seq| stream.read(source, seq)) {
                        between.take(&self.lineage, &message);
                    }
                    tail.look_between(between);
                }
            }
            let from = tail.between.as_ref().map(|between| between.from);
            let aged = aged
                .map(|event| event.position)
                .filter(|aged| from.is_none_or(|from| *aged <= from));
            tail.stored.get_or_insert(Checkpoint {
                seq: stream.last_seq,
                position: Position::default(),
                id: None,
            });
            found.push(StreamAtConnect {
                name: stream.name.to_string(),
                replicas: if stream.replicated { 3 } else { 1 },
                created: "once".to_string(),
                last_seq: stream.last_seq,
                tail,
                aged,
                has_young,
                keeps_from: extent.keeps_its_end.then_some(extent.first_seq),
            });
        }
        found
    }

    /// A publish reaches its stream, or something happens to it.
    fn deliver(&mut self) -> Outcome {
        let flight = self.connection.as_mut().and_then(|c| c.out.pop_front());
        let Some(flight) = flight else {
            return Ok(());
        };
        let fault = match self.one_in(10) {
            true => self.rng.u32(..6),
            false => 6,
        };
        let replicated = self.streams[flight.event.stream].replicated;
        let answer = match fault {
            0 => {
                trace!(self, "lost on the way: {}", flight.event.id);
                return Ok(());
            }
            1 => {
                let id = flight.event.id.clone();
                // whatever it was
                let _ = self.arrive(flight)?;
                trace!(self, "the ack of {id} is lost");
                return Ok(());
            }
            2 => Err([
                AckError::NoResponders,
                refused(503, 10077, "no space left on device"),
                refused(429, 10167, "too many requests"),
            ][self.rng.usize(..3)]
            .clone()),
            3 if replicated => Ok(PubAck {
                seq: 0,
                duplicate: true,
            }),
            // somebody else answers on the subject
            4 => Ok(PubAck {
                seq: self.rng.u64(1..1000) + 100_000,
                duplicate: false,
            }),
            _ => {
                let answer = self.arrive(flight.clone())?;
                self.send_answer(&flight, answer);
                return Ok(());
            }
        };
        trace!(
            self,
            "{} is not stored, but answered {answer:?}", flight.event.id
        );
        self.send_answer(&flight, answer);
        Ok(())
    }

    /// Puts an answer on its way, with what a rule that is switched off would have objected to taken out.
    fn send_answer(&mut self, flight: &Flight, answer: Result<PubAck, AckError>) {
        let predicted = PubAck {
            seq: flight.expected.unwrap_or_default() + 1,
            duplicate: false,
        };
        let answer = match answer {
            Err(_) if self.is_off(Rule::Refusal) => Ok(predicted),
            Ok(ack) if self.is_off(Rule::AckSequence) && !ack.duplicate => Ok(predicted),
            Ok(ack) if self.is_off(Rule::DuplicateFlag) && ack.duplicate => Ok(predicted),
            answer => answer,
        };
        // a replicated stream refuses at once, and acknowledges once its followers have the message
        let replicated = self.streams[flight.event.stream].replicated;
        let names = self.names.as_mut().filter(|_| answer.is_err());
        let (for_good, overtakes) = names.map_or((false, false), |rng| (rng.bool(), rng.bool()));
        // the sequence that is refused tells of others
        let for_good = for_good && self.kind != Kind::Guest;
        let answer = match for_good {
            true => Err(refused(400, 10054, "message size exceeds maximum allowed")),
            false => answer,
        };
        if let Some(connection) = &mut self.connection {
            let answer = (flight.clone(), answer);
            match overtakes && replicated {
                true => connection.answers.push_front(answer),
                false => connection.answers.push_back(answer),
            }
        }
    }

    /// A stream takes a publish or not: what it may hold then.
    fn arrive(&mut self, flight: Flight) -> Result<Result<PubAck, AckError>, String> {
        let event = &flight.event;
        let stream = &mut self.streams[event.stream];
        let last = stream.history.last().map(|(_, nth, _)| *nth);
        let length = stream.history.len();
        let answer = stream.publish(&flight, self.now);
        // on a replicated stream somebody else's message lets publishes in behind a refused one
        let ordered = !stream.replicated || !matches!(self.kind, Kind::Foreign | Kind::Guest);
        let (_, earlier) = stream
            .history
            .split_last()
            .unwrap_or((&(0, 0, self.now), &[]));
        if stream.history.len() > length && earlier.iter().any(|(_, nth, _)| *nth == event.nth) {
            return Err(format!("twice: {event:?}"));
        }
        if stream.history.len() > length && ordered {
            if last.is_some_and(|last| event.nth <= last) {
                return Err(format!("twice or out of order: {event:?} after {last:?}"));
            }
            let hole = (last.map_or(0, |last| last + 1)..event.nth)
                .map(|nth| &self.committed[event.stream][nth])
                .find(|event| !event.reused && !event.forgotten)
                .map(|event| event.nth);
            if let Some(hole) = hole {
                return Err(format!("a hole: {event:?} is stored before number {hole}"));
            }
        }
        trace!(
            self,
            "{} behind {:?} of {}: {answer:?}",
            event.id,
            flight.expected,
            self.streams[event.stream].name
        );
        Ok(answer)
    }

    /// An answer reaches the relay.
    fn answer(&mut self) -> Outcome {
        let answer = self.connection.as_mut().and_then(|c| c.answers.pop_front());
        let (Some((flight, answer)), Some(session)) = (answer, &mut self.session) else {
            return Ok(());
        };
        let outcome = session.core.answer(flight.reply, answer, self.now);
        if let Ok(Some(token)) | Err(Trouble::Refused { token, .. }) = outcome
            && token != flight.token
        {
            let taken = session.core.event(token).map(|event| event.id.to_string());
            return Err(format!(
                "the answer to {} was taken for that to {taken:?}",
                flight.event.id
            ));
        }
        self.handle(Ok(outcome.map(|_| ())))
    }

    fn lose_connection(&mut self) {
        let keep = self.rng.bool() && self.kind != Kind::ReusedIds;
        if let Some(mut connection) = self.connection.take() {
            trace!(
                self,
                "the connection to NATS ends, {} publishes in flight",
                connection.out.len()
            );
            if keep && !connection.outlived {
                connection.answers.clear();
                self.zombies.push(connection);
            }
        }
        self.process.store.closed();
        if self.off != Some(Rule::Disconnected)
            && let Some(session) = &mut self.session
        {
            session.core.disconnected();
        }
    }

    fn deliver_zombie(&mut self) -> Outcome {
        if self.zombies.is_empty() {
            return Ok(());
        }
        let index = self.rng.usize(..self.zombies.len());
        if let Some((_, write)) = self.zombies[index].writes.pop_front() {
            let answer = self.put(&write);
            trace!(
                self,
                "a late copy of checkpoint {} arrives: {answer:?}", write.number
            );
            return Ok(());
        }
        match self.zombies[index].out.pop_front() {
            Some(flight) => {
                trace!(self, "a late copy of {} arrives", flight.event.id);
                self.arrive(flight).map(|_| ())
            }
            None => {
                self.zombies.swap_remove(index);
                Ok(())
            }
        }
    }

    /// The copy stream ends, and the session with it; the process lives on.
    /// The session ends, whatever ended it, with a last status update.
    fn end_session(&mut self) -> Outcome {
        self.confirm()?;
        self.lose_session();
        Ok(())
    }

    fn lose_session(&mut self) {
        self.lose_connection();
        let Some(session) = self.session.take() else {
            return;
        };
        trace!(self, "the copy stream ends");
        self.process.memory = match self.is_off(Rule::Memory) {
            true => Memory::default(),
            false => session.core.into_memory(),
        };
        self.process.reached = Some(SourcePosition {
            source: self.lineage.source.clone(),
            position: Position {
                commit_lsn: self.process.memory.reached,
                ordinal: 0,
            },
        });
    }

    /// A standby takes over, which may lack the end of the log and may know an older position of the slot. What it
    /// lacks and the stream has stays there.
    fn fail_over(&mut self) {
        if self.rng.bool() {
            self.kill();
        }
        self.lose_session();
        let postgres = &self.postgres;
        let ends = postgres.transactions.iter().map(|it| it.end_lsn);
        let known = ends.chain([postgres.confirmed, postgres.wal_end]);
        let branches = self.lineage.switch_points.last();
        let least = branches.map_or(postgres.confirmed, |(_, lsn)| postgres.confirmed.max(*lsn));
        let known: Vec<Lsn> = known.filter(|lsn| *lsn >= least).collect();
        let switch_point = known[self.rng.usize(..known.len())];
        for event in self.postgres.fail_over(switch_point) {
            self.committed[event.stream][event.nth].forgotten = true;
        }
        if self.rng.bool() {
            let confirmed = self.postgres.confirmed;
            let ends = self.postgres.transactions.iter().map(|it| it.end_lsn);
            let older: Vec<Lsn> = ends.filter(|lsn| *lsn < confirmed).collect();
            if !older.is_empty() {
                self.postgres.confirmed = older[self.rng.usize(..older.len())];
            }
        }
        if self.streams.iter().any(|stream| stream.replicated) {
            // no promise: a copy that is late by a whole failover, on a stream that cannot be told the last message's id
            self.zombies.clear();
        }
        let old = self.lineage.source.timeline;
        self.lineage.switch_points.push((old, switch_point));
        self.lineage.source.timeline = old + 1;
        trace!(
            self,
            "a standby takes over at {switch_point}, confirmed {}", self.postgres.confirmed
        );
    }

    /// Somebody else reads the slot while the relay is away.
    fn move_slot(&mut self) {
        let kept = store(true, 0).opened(self.read_key(), self.now).marks;
        if kept.reached.is_none() {
            // it was never used
            return;
        }
        self.lose_session();
        self.moved = true;
        self.postgres.confirmed = self.postgres.wal_end;
        trace!(self, "the slot is moved to {}", self.postgres.confirmed);
    }

    /// The servers lose what they had not synced: connections to them end, or a replica takes over.
    fn roll_back(&mut self) {
        let index = self.rng.usize(..self.streams.len());
        let (now, crash) = (self.now, self.rng.bool());
        // without a crash it is noticed by the next look, which has to be in time
        let unseen = if crash {
            Duration::ZERO
        } else {
            LOOK_INTERVAL + Duration::from_secs(2)
        };
        let age = self
            .hold_back
            .saturating_sub(unseen)
            .mul_f64(self.rng.f64());
        let stream = &mut self.streams[index];
        let kept = stream
            .messages
            .iter()
            .rev()
            .find(|(_, m)| now - m.time >= age);
        let last_seq = kept.map_or(0, |(seq, _)| *seq);
        if last_seq == stream.last_seq {
            return;
        }
        // an end that is lost is told from one that was consumed by the message before it, when the server is back
        let counts_on = crash && stream.keeps_its_end && last_seq > 0 && self.rng.bool();
        match counts_on {
            true => stream.lose_end(last_seq),
            false => stream.roll_back(last_seq),
        }
        trace!(
            self,
            "{} goes back to {last_seq}, crash: {crash}, counts on: {counts_on}",
            self.streams[index].name
        );
        // no copy of a publish is late by a roll-back
        self.zombies.clear();
        if let Some(connection) = &mut self.connection {
            connection.out.clear();
            connection.outlived = true;
        }
        if crash {
            self.lose_connection();
            self.zombies.clear();
            // the bucket is on the same disk; its own file may have lost less
            if !counts_on || self.rng.bool() {
                self.key.roll_back(now - age, counts_on);
            }
        }
    }

    /// While the bucket is slow, time passes, perhaps after a crash and without a connection.
    fn slow_time(&mut self) -> Outcome {
        let Some(rng) = &mut self.bucket else {
            return Ok(());
        };
        let (kind, seconds, end) = (rng.u32(..5), rng.u32(5..40), rng.u32(..3));
        match kind {
            0..3 if self.kind == Kind::Rollback => self.roll_back(),
            0..3 if self.kind == Kind::BucketBack => self.roll_back_bucket(),
            3 => self.lose_connection(),
            _ => {}
        }
        trace!(self, "{seconds} s pass");
        for _ in 0..seconds {
            self.pass(Duration::from_millis(900))?;
        }
        match end {
            0 => {
                self.end_session()?;
                self.take_over();
            }
            1 if self.kind != Kind::Guest => self.kill(),
            _ => {}
        }
        Ok(())
    }

    /// The server crashes, and only the bucket lacks its end when it is back.
    fn roll_back_bucket(&mut self) {
        let Some(rng) = &mut self.bucket else {
            return;
        };
        let age = self.hold_back.mul_f64(rng.f64());
        self.key.roll_back(self.now - age, rng.bool());
        trace!(self, "the bucket goes back by {age:?}");
        if let Some(connection) = &mut self.connection {
            connection.out.clear();
        }
        self.lose_connection();
        self.zombies.clear();
    }

    fn foreign(&mut self) {
        let index = self.rng.usize(..self.streams.len());
        self.streams[index].store(None, self.now);
        let name = self.streams[index].name;
        trace!(self, "a message of somebody else in {name}");
    }

    fn consume(&mut self) {
        let index = self.rng.usize(..self.streams.len());
        let all = self.rng.bool();
        let rng = &mut self.rng;
        let stream = &mut self.streams[index];
        stream.messages.retain(|_, _| !all && rng.bool());
        trace!(
            self,
            "consumed, left are {:?}",
            self.streams[index].messages.keys()
        );
    }

    /// Once nothing is on its way the relay is stopped in order, loses its connection, or goes on; a message of somebody
    /// else comes and goes; and the relay finds that out, or publishes, before anything else fails.
    fn guest(&mut self) -> Outcome {
        let faults = std::mem::replace(&mut self.healed, true);
        for _ in 0..30 {
            self.work()?;
        }
        let length = self.postgres.transactions.len();
        let is_settled = |session: &Session| {
            let all_came = session.cursor == length && session.channel.is_empty();
            all_came && session.core.is_settled()
        };
        if self.connection.is_some() && self.session.as_ref().is_some_and(is_settled) {
            match self.rng.u32(..3) {
                0 => self.stop(),
                1 => self.lose_connection(),
                _ => {}
            }
            self.foreign();
            self.purge();
            if self.rng.bool() {
                self.commit();
                for _ in 0..30 {
                    self.work()?;
                }
            }
            self.next_look = self.now;
            self.work()?;
        }
        self.healed = faults;
        Ok(())
    }

    /// A round of everybody.
    fn work(&mut self) -> Outcome {
        self.walsender();
        self.relay()?;
        self.deliver()?;
        self.answer()
    }

    /// The relay has nothing left to do and ends, if the checkpoint takes its last word.
    fn stop(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        if self.off != Some(Rule::Rest) {
            session.core.rest();
        }
        let confirmable = session.core.confirmable(self.now);
        let marks = session.core.marks(&self.lineage.source);
        let write = self
            .process
            .store
            .write(|| marks.clone(), confirmable, self.now, true);
        if let Some(write) = write {
            let answer = self.put(&write);
            trace!(self, "checkpoint {} is the last: {answer:?}", write.number);
            self.written(write.number, answer);
        }
        match self.process.store.is_kept() && self.process.store.holds(&marks) {
            true => self.kill(),
            false => self.lose_session(),
        }
    }

    fn purge(&mut self) {
        let index = self.rng.usize(..self.streams.len());
        self.streams[index].messages.clear();
        trace!(self, "{} is purged", self.streams[index].name);
    }

    /// Time passes; the relay's loop runs at least each second.
    fn pass(&mut self, pause: Duration) -> Outcome {
        self.now += pause;
        if self.connection.is_some() {
            self.relay()?;
        }
        Ok(())
    }
}

fn pop_due<T>(queue: &mut VecDeque<T>, is_due: impl Fn(&T) -> bool) -> Option<T> {
    queue
        .front()
        .is_some_and(is_due)
        .then(|| queue.pop_front())?
}

fn store(is_wanted: bool, writer: usize) -> CheckpointStore {
    let bucket = if is_wanted { "bucket" } else { "" };
    CheckpointStore::new(bucket, "slot", writer.to_string())
}

fn info(stream: &Stream) -> StreamInfo {
    let (first, messages) = (stream.first_seq(), stream.messages.len() as u64);
    StreamInfo {
        config: StreamConfig {
            name: stream.name.to_string(),
            subjects: vec![stream.subjects.to_string()],
            max_msg_size: match stream.subjects {
                PARK_SUBJECT => -1,
                _ => MAX_MSG_SIZE,
            },
            ..StreamConfig::default()
        },
        state: StreamState {
            messages,
            first_seq: first,
            last_seq: stream.last_seq,
            num_deleted: (stream.last_seq + 1 - first) - messages,
            ..StreamState::default()
        },
        created: "once".to_string(),
        ts: String::new(),
    }
}
