//! A relay: the production machines, and around them as little as can be. What is here `relay::connect`, `session` and
//! `publisher` have in production.

use crate::nats::{Answer, Flight};
use crate::postgres::{PARK_SUBJECT, PARKED, SLOT, Setting, end_of, push, subject};
use crate::world::{Env, trace};
use jetstream_outbox::jetstream::Delivery;
use jetstream_outbox::jetstream::ack::{AckError, PubAck};
use jetstream_outbox::jetstream::streams::Routes;
use jetstream_outbox::nats::EndedBy;
use jetstream_outbox::outbox::batch::{Batch, Change};
use jetstream_outbox::outbox::lineage::Lineage;
use jetstream_outbox::outbox::park;
use jetstream_outbox::outbox::position::Position;
use jetstream_outbox::postgres::Lsn;
use jetstream_outbox::relay::checkpoint::record::StreamCut;
use jetstream_outbox::relay::checkpoint::store::{Identity, Overtaken, Store, Write};
use jetstream_outbox::relay::core::agreement::Look;
use jetstream_outbox::relay::core::capacity::Capacity;
use jetstream_outbox::relay::core::continuity::Continuity;
use jetstream_outbox::relay::core::evidence::Message;
use jetstream_outbox::relay::core::exactly_once::{Connection, ExactlyOnce};
use jetstream_outbox::relay::core::resume::facts::{Facts, Known, StreamFacts};
use jetstream_outbox::relay::core::resume::{Answer as Found, Read, Resume};
use jetstream_outbox::relay::core::rules::Rule;
use jetstream_outbox::relay::core::trouble::{Cause, Halt, Trouble};
use jetstream_outbox::relay::core::window::Limits;
use jetstream_outbox::relay::core::{Core, Next};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The hold-back's default.
pub const HOLD_BACK: Duration = Duration::from_secs(150);
const ACK_TIMEOUT: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// The largest message.
const MAX_PAYLOAD: usize = 2000;
/// What the gate allows, and the way of a record.
const LONGEST_UNRECORDED: Duration = Duration::from_secs(12);
const CHANNEL_BATCHES: usize = 4;

/// Why a relay does not go on as it is.
#[derive(Debug)]
pub enum End {
    /// The connection to NATS is over.
    Connection(String),
    /// The session is over.
    Session(String),
    /// The relay stops.
    Halt(String),
    /// The same: what is stored after this anchor was made by other flags.
    OtherFlags(String),
    /// A promise is broken.
    Broken(String),
}

/// What the operator has accepted with `-resume-anyway`; as in `relay::session`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    Nothing,
    Loss,
    OtherWal,
}

/// What is connected so far.
#[derive(Debug)]
enum Stage {
    Down,
    /// The key was read.
    Streams,
    Reading(Box<Reading>),
    Claiming(u64, Instant),
    Up,
}

#[derive(Debug)]
struct Reading {
    resume: Resume,
    connection: Unresumed,
}

#[derive(Debug)]
struct Unresumed {
    streams: Vec<StreamFacts>,
    capacity: Capacity,
    missing: Vec<StreamCut>,
}

/// One copy stream.
struct Session {
    lineage: Lineage,
    confirmed: Lsn,
    wal_end: Lsn,
    earlier_upto: Lsn,
    epoch: u64,
    core: Option<Core>,
    is_streaming: bool,
    /// The reader shows the first transaction also without events: it proves which WAL this is.
    is_first: bool,
    /// The batches have something of the transaction that is being read.
    is_shown: bool,
    /// The next transaction of the WAL, and the next event of it.
    next: (usize, usize),
    received: Lsn,
    flush: Lsn,
    channel: VecDeque<Arc<Batch>>,
}

/// On its way to the server.
pub enum Wire {
    Publish(Box<Flight>),
    Ping,
}

/// A process, and the connections it has.
pub struct Relay {
    pub name: u64,
    pub setting: Setting,
    pub accepted: Accepted,
    store: Store,
    session: Option<Session>,
    stage: Stage,
    retry_at: Instant,
    next_look: Instant,
    /// On their way to the server.
    pub out: VecDeque<Wire>,
    pub writes: VecDeque<Write>,
    looks: VecDeque<(u64, Look)>,
    /// On their way back.
    pub answers: VecDeque<(u64, Answer)>,
    pub written: VecDeque<(u64, Result<PubAck, AckError>)>,
    /// PINGs that were sent over this connection, and answers to them; how many of these were taken.
    pings: u64,
    pub pongs: u64,
    ponged: u64,
    /// The connection is over.
    pub ended: Option<EndedBy>,
    /// Since when it has known where the topics lead.
    up_since: Instant,
    /// It was frozen and revived; its Postgres session is another's by now.
    pub zombie_since: Option<Instant>,
    /// Since when there are publishes that the record lacks.
    unrecorded: Option<Instant>,
}

/// Of these halts `-resume-anyway` makes a start with another WAL.
fn is_other_wal(why: &str) -> bool {
    let others = ["Discontinuous", "NotSent", "OtherId"];
    others.iter().any(|it| why.starts_with(it))
}

/// R18.
fn lineage(env: &Env) -> Lineage {
    let mut lineage = env.pg.lineage();
    if env.is_off(Rule::SwitchPoint) {
        for (_, lsn) in &mut lineage.switch_points {
            *lsn = Lsn(u64::MAX);
        }
    }
    lineage
}

impl Relay {
    pub fn new(name: u64, setting: Setting, hold_back: Duration, now: Instant) -> Relay {
        let identity = Identity {
            bucket: "bucket".into(),
            slot: SLOT.into(),
            writer: format!("relay-{name}"),
            flags: setting.flags(),
            delivery: Delivery::ExactlyOnce,
        };
        Relay {
            name,
            setting,
            accepted: Accepted::Nothing,
            store: Store::new(identity, hold_back, now),
            session: None,
            stage: Stage::Down,
            retry_at: now,
            next_look: now,
            out: VecDeque::new(),
            writes: VecDeque::new(),
            looks: VecDeque::new(),
            answers: VecDeque::new(),
            written: VecDeque::new(),
            pings: 0,
            pongs: 0,
            ponged: 0,
            ended: None,
            up_since: now,
            zombie_since: None,
            unrecorded: None,
        }
    }

    pub fn is_up(&self) -> bool {
        matches!(self.stage, Stage::Up)
    }

    fn core(&mut self) -> Option<&mut ExactlyOnce> {
        match self.session.as_mut()?.core.as_mut()? {
            Core::ExactlyOnce(core) => Some(core),
            Core::AtLeastOnce(_) => None,
        }
    }

    /// Does what there is to do. `Err`: it halts, or a promise is broken.
    pub fn work(&mut self, env: &mut Env) -> Result<(), End> {
        let outcome = self.go_on(env);
        match outcome {
            Err(end) if self.zombie_since.is_some() && !matches!(end, End::Broken(_)) => {
                trace!(env, "the zombie relay {} ends: {end:?}", self.name);
                Err(end)
            }
            Err(End::Connection(why)) => {
                self.disconnect(env, &why);
                Ok(())
            }
            Err(End::Session(why)) => {
                if self.session.as_ref().is_some_and(|it| it.is_streaming) {
                    self.accepted = Accepted::Nothing;
                }
                self.end_session(env, &why);
                Ok(())
            }
            Err(End::Halt(why)) if self.accepted == Accepted::Loss && is_other_wal(&why) => {
                self.accepted = Accepted::OtherWal;
                self.end_session(env, &why);
                Ok(())
            }
            Err(End::OtherFlags(why)) if self.accepted == Accepted::Loss => {
                self.accepted = Accepted::OtherWal;
                self.end_session(env, &why);
                Ok(())
            }
            other => other,
        }
    }

    /// The connection to NATS is gone.
    pub fn disconnect(&mut self, env: &mut Env, why: &str) {
        trace!(env, "relay {}: connection lost: {why}", self.name);
        if let Some(core) = self.core() {
            core.on_disconnect();
        }
        // at a start that is the end of the session
        self.session.take_if(|it| !it.is_streaming);
        self.store.on_disconnect();
        self.stage = Stage::Down;
        self.retry_at = env.now + Duration::from_millis(env.rng.u64(..1500));
        self.hang_up(env);
    }

    /// What was on its way may still arrive.
    pub fn hang_up(&mut self, env: &mut Env) {
        let out = std::mem::take(&mut self.out).into_iter();
        let flights = out.filter_map(|it| match it {
            Wire::Publish(flight) => Some(*flight),
            Wire::Ping => None,
        });
        env.leave_behind(flights.collect(), std::mem::take(&mut self.writes));
        (self.pings, self.pongs, self.ponged) = (0, 0, 0);
        self.ended = None;
        self.answers.clear();
        self.written.clear();
        self.looks.clear();
    }

    fn end_session(&mut self, env: &mut Env, why: &str) {
        trace!(env, "relay {}: session ends: {why}", self.name);
        self.disconnect(env, "session ends");
        self.session = None;
    }

    fn go_on(&mut self, env: &mut Env) -> Result<(), End> {
        let epoch = env.pg_epoch;
        let is_zombie = self.zombie_since.is_some();
        if let Some(session) = &self.session
            && session.epoch != epoch
            && !is_zombie
        {
            return Err(End::Session("Postgres has closed the connection".into()));
        }
        if let Some(ended) = self.ended.take() {
            let core = self.session.as_mut().and_then(|it| it.core.as_mut());
            let outcome = core.map_or(Ok(()), |core| core.on_end(ended, "a complaint"));
            return match outcome {
                Ok(()) => Err(End::Connection(format!("ended: {ended:?}"))),
                Err(trouble) => self.on_trouble(env, trouble),
            };
        }
        match &mut self.stage {
            Stage::Down if env.now >= self.retry_at => self.read_key(env),
            Stage::Down => Ok(()),
            Stage::Streams => self.read_streams(env),
            Stage::Reading(_) => self.read_messages(env),
            Stage::Claiming(..) => self.on_claim(env),
            Stage::Up => self.publish(env),
        }
    }

    // connecting

    fn read_key(&mut self, env: &mut Env) -> Result<(), End> {
        if self.session.is_none() {
            self.store.start_over();
            self.session = Some(Session {
                lineage: lineage(env),
                confirmed: env.pg.confirmed,
                wal_end: env.pg.wal_end,
                earlier_upto: Lsn::INVALID,
                epoch: env.pg_epoch,
                core: None,
                is_streaming: false,
                is_first: true,
                is_shown: false,
                next: (0, 0),
                received: Lsn::INVALID,
                flush: Lsn::INVALID,
                channel: VecDeque::new(),
            });
        }
        if env.is_key_down() {
            return Err(End::Connection("the bucket does not answer".into()));
        }
        let Some(session) = &self.session else {
            return Ok(());
        };
        let value = env.key.read(env.begun, env.now);
        let read = self.store.on_read(value, &session.lineage, env.now);
        let read = read.map_err(|conflict| End::Halt(format!("conflict: {conflict:?}")))?;
        if let Err(Overtaken) = read {
            self.store.start_over();
            if session.core.is_some() {
                return Err(End::Session("another relay has written the record".into()));
            }
        }
        if session.core.is_none()
            && let Some(record) = self.store.held()
            && record.is_exceeded(session.confirmed)
            && self.accepted == Accepted::Nothing
            && !env.is_off(Rule::Told)
        {
            return Err(End::Halt(format!(
                "slot moved: confirmed {}, told {}",
                session.confirmed, record.told_lsn
            )));
        }
        self.stage = Stage::Streams;
        Ok(())
    }

    fn read_streams(&mut self, env: &mut Env) -> Result<(), End> {
        let own_cut = self.core().map(|core| core.on_disconnect());
        let Some(session) = &self.session else {
            return Ok(());
        };
        if env.streams.iter().all(|it| it.topics.is_empty()) {
            return Err(End::Connection("no stream".into()));
        }
        let routed: Vec<_> = env
            .streams
            .iter()
            .filter(|it| !it.topics.is_empty())
            .collect();
        let mut streams: Vec<StreamFacts> = routed.iter().map(|it| it.facts()).collect();
        let infos: Vec<_> = routed.iter().map(|it| it.info()).collect();
        let known = match own_cut {
            Some(cut) => Known::of_core(cut),
            None => {
                self.store.accept_slot(session.confirmed);
                let also = match self.accepted {
                    Accepted::OtherWal => self.store.disown(),
                    Accepted::Nothing | Accepted::Loss => Vec::new(),
                };
                let known = Known::of_record(&self.store, session.confirmed, env.now);
                let mut known = Known { also, ..known };
                if env.is_off(Rule::FallBack) {
                    known.cuts.truncate(1);
                }
                known
            }
        };
        let agrees = env.is_off(Rule::Agreement);
        if let Some(cut) = known.cuts.first().filter(|_| agrees) {
            for stream in &mut streams {
                let Some(of_cut) = cut.stream(&stream.name) else {
                    continue;
                };
                let witness_seq = of_cut.witness.as_ref().map_or(0, |it| it.seq);
                stream.last_seq = stream.last_seq.max(of_cut.read_after).max(witness_seq);
                stream.created = of_cut.created.clone();
                stream.first_seq = stream.first_seq.max(witness_seq + 1);
            }
        }
        let mut missing: Vec<StreamCut> = Vec::new();
        for (name, cut) in known.named() {
            if streams.iter().any(|it| it.name == name) {
                continue;
            }
            match env.streams.iter().find(|it| it.name == name) {
                Some(stream) => streams.push(stream.facts()),
                None => missing.extend(cut),
            }
        }
        let mut facts = Facts {
            lineage: session.lineage.clone(),
            known,
            streams,
            accept_loss: self.accepted != Accepted::Nothing,
        };
        facts.forget_left(&mut missing);
        let connection = Unresumed {
            streams: facts.streams.clone(),
            capacity: Capacity {
                routes: Routes::new(&infos),
                max_payload: MAX_PAYLOAD,
                position_source_len: session.lineage.source.to_string().len(),
                puts_aside: true,
                marks_ends: env.marks_ends(self.name),
            },
            missing,
        };
        self.stage = Stage::Reading(Box::new(Reading {
            resume: Resume::new(facts),
            connection,
        }));
        Ok(())
    }

    fn read_messages(&mut self, env: &mut Env) -> Result<(), End> {
        let at_once = env.rng.usize(1..200);
        let Stage::Reading(reading) = &mut self.stage else {
            return Ok(());
        };
        let mut reads = Vec::new();
        while reads.len() < at_once {
            match reading.resume.next_read() {
                Ok(Some(read)) => reads.push(read),
                Ok(None) => break,
                Err(lost) => {
                    let is_within = self.session.as_ref().is_some_and(|it| it.core.is_some());
                    return Err(match is_within {
                        true => {
                            self.store.distrust(&lost.stream);
                            End::Session(format!("{lost}"))
                        }
                        false => End::Halt(format!("lost: {lost}")),
                    });
                }
            }
        }
        if reads.is_empty() {
            return self.claim(env);
        }
        let cuts = self.store.held().into_iter().flat_map(|it| it.cuts());
        let witnesses = cuts
            .flat_map(|cut| &cut.streams)
            .filter_map(|it| it.witness.as_ref());
        let witnesses: Vec<_> = witnesses.map(|it| it.position.clone()).collect();
        env.rng.shuffle(&mut reads);
        for read in reads {
            let answer = match &read {
                Read::Message(index, seq) => {
                    let name = reading
                        .connection
                        .streams
                        .get(*index)
                        .map(|it| it.name.as_str());
                    let message = env.message(name.unwrap_or_default(), *seq)?;
                    let position = message.as_ref().and_then(|it| it.position.as_ref());
                    let is_witness = position.is_some_and(|it| witnesses.contains(it));
                    Found::Message(match env.is_off(Rule::Evidence) && !is_witness {
                        true => message.map(|it| Message {
                            seq: it.seq,
                            ..Default::default()
                        }),
                        false => message,
                    })
                }
                Read::Exists(name) => Found::Exists(env.streams.iter().any(|it| it.name == *name)),
            };
            reading.resume.on_read(&read, answer);
        }
        Ok(())
    }

    fn claim(&mut self, env: &mut Env) -> Result<(), End> {
        let stage = std::mem::replace(&mut self.stage, Stage::Down);
        let (Stage::Reading(reading), Some(session)) = (stage, &mut self.session) else {
            return Ok(());
        };
        let Reading { resume, connection } = *reading;
        assert!(resume.is_done());
        let mut resumed = resume.finish();
        if env.is_off(Rule::Doubt) {
            resumed.gone.fill(None);
        }
        trace!(
            env,
            "relay {}: resumed with cut {:?} ({:?}) at {}, stored {}, evidence {:?}, gone {:?}, unfenced {:?}",
            self.name,
            resumed.cut,
            resumed.disagreed,
            resumed.anchor,
            resumed.stored_lsn,
            resumed.evidence,
            resumed.gone,
            resumed.unfenced
        );
        let accepted = self.accepted;
        if let Some(unfenced) = resumed.unfenced.filter(|_| accepted == Accepted::Nothing) {
            return Err(End::Halt(format!("unfenced: {unfenced:?}")));
        }
        let flags = self.setting.flags();
        let is_mixed = resumed.is_mixed(&flags) && accepted != Accepted::OtherWal;
        if session.core.is_none() && !env.is_off(Rule::Flags) && is_mixed {
            return Err(End::OtherFlags(format!("{}", resumed.anchor)));
        }
        let fell_back = session.core.is_none() && resumed.fell_back();
        let connection = Connection {
            resumed,
            streams: connection.streams,
            capacity: connection.capacity,
            missing: connection.missing,
        };
        match &mut session.core {
            Some(Core::ExactlyOnce(core)) => core.resume(connection, env.now),
            Some(Core::AtLeastOnce(_)) => unreachable!("exactly-once"),
            None => {
                let is_accepted = accepted == Accepted::OtherWal;
                let continuity = match is_accepted || env.is_off(Rule::Continuity) {
                    true => Ok(Continuity::accepted(session.wal_end, flags)),
                    false => {
                        let (confirmed, wal_end) = (session.confirmed, session.wal_end);
                        Continuity::resumed(&connection.resumed, confirmed, wal_end, flags)
                    }
                };
                let continuity = continuity.map_err(|broken| {
                    let halt = Halt::Discontinuous(broken);
                    End::Halt(format!("{halt:?}"))
                })?;
                let limits = Limits {
                    inflight: env.rng.usize(1..12),
                    inflight_bytes: 1 << 20,
                    replies: env.rng.u64(1..6),
                    ack_timeout: ACK_TIMEOUT,
                };
                let lineage = session.lineage.clone();
                let core = ExactlyOnce::start(
                    lineage,
                    limits,
                    continuity,
                    connection,
                    session.wal_end,
                    env.now,
                );
                session.core = Some(Core::ExactlyOnce(Box::new(core)));
            }
        }
        let confirmed = session.confirmed.max(session.flush);
        let Some(Core::ExactlyOnce(core)) = &mut session.core else {
            return Ok(());
        };
        match accepted {
            Accepted::Nothing => {}
            Accepted::Loss => env.accept_loss(core.resolved_before(), confirmed),
            Accepted::OtherWal => env.accept_loss(Position::default(), confirmed),
        }
        let cut = core.cut_to_record();
        let end = |name: &str| core.end_of(name);
        let write = self.store.claim(cut, fell_back, end, confirmed, env.now);
        self.stage = Stage::Claiming(write.number, env.now);
        if env.is_off(Rule::Claim) {
            let ack = PubAck {
                seq: write.revision,
                duplicate: false,
            };
            self.written.push_back((write.number, Ok(ack)));
            return Ok(());
        }
        self.writes.push_back(write);
        Ok(())
    }

    fn on_claim(&mut self, env: &mut Env) -> Result<(), End> {
        let Stage::Claiming(number, sent) = self.stage else {
            return Ok(());
        };
        let Some((answered, answer)) = self.written.pop_front() else {
            return match env.now > sent + ACK_TIMEOUT {
                true => Err(End::Connection("the claim is not answered".into())),
                false => Ok(()),
            };
        };
        if answered != number {
            return Ok(());
        }
        match self.store.on_written(number, answer, env.now) {
            Ok(true) => {}
            Ok(false) => return Err(End::Connection("the claim is not written".into())),
            Err(Overtaken) => return Err(End::Connection("the claim is refused".into())),
        }
        let now = env.now;
        if let Some(core) = self.core() {
            core.on_recorded(now);
        }
        self.stage = Stage::Up;
        self.up_since = now;
        self.unrecorded = None;
        self.next_look = env.now + LOOK_INTERVAL;
        let Some(session) = self.session.as_mut().filter(|it| !it.is_streaming) else {
            return Ok(());
        };
        env.on_accepted(self.accepted, &format!("relay-{}", self.name));
        if let Some(Core::ExactlyOnce(core)) = &session.core {
            session.is_streaming = true;
            session.earlier_upto = core.earlier_upto();
            let start = match env.is_off(Rule::Anchor) {
                true => core.resolved_before().commit_lsn.max(core.stored_lsn()),
                false => core.resolved_before().commit_lsn,
            };
            session.next = (env.pg.first_from(start), 0);
            trace!(
                env,
                "relay {}: streams from {}, confirmed {}",
                self.name,
                core.resolved_before().commit_lsn,
                env.pg.confirmed
            );
        }
        Ok(())
    }

    /// The walsender and the reader: some changes of the copy stream come as a batch.
    pub fn receive(&mut self, env: &mut Env) {
        let epoch = env.pg_epoch;
        let is_zombie = self.zombie_since.is_some();
        let Some(session) = self.session.as_mut() else {
            return;
        };
        let is_alive = session.is_streaming && session.epoch == epoch && !is_zombie;
        if !is_alive || session.channel.len() >= CHANNEL_BATCHES {
            return;
        }
        let mut batch = Batch::default();
        let mut events = env.rng.usize(1..8);
        while let Some(transaction) = env.pg.transactions.get(session.next.0).cloned() {
            let sent = transaction.sent(self.setting);
            let (first, rest) = (session.next.1, sent.len() - session.next.1);
            let taken = rest.min(events);
            for (event, position) in sent.iter().skip(first).take(taken) {
                if self.setting.takes(event) {
                    push(&mut batch, event, *position, &self.setting.id(event));
                    session.is_shown = true;
                } else if transaction.commit_lsn < session.earlier_upto {
                    batch.push_ignored(*position);
                    session.is_shown = true;
                }
            }
            events -= taken;
            if taken < rest {
                session.next.1 += taken;
                if session.is_shown {
                    batch.push(Change::Open {
                        commit_lsn: transaction.commit_lsn,
                        commit_time_us: transaction.time_us,
                    });
                }
                break;
            }
            session.next = (session.next.0 + 1, 0);
            session.received = session.received.max(transaction.end_lsn);
            let is_first = std::mem::take(&mut session.is_first);
            match std::mem::take(&mut session.is_shown) || is_first {
                true => batch.push(end_of(&transaction)),
                false => batch.push_boundary(transaction.end_lsn),
            }
            if events == 0 {
                break;
            }
        }
        if session.next.0 == env.pg.transactions.len() && env.rng.bool() {
            session.received = session.received.max(env.pg.wal_end);
            batch.push_boundary(env.pg.wal_end);
        }
        if !batch.is_empty() {
            session.channel.push_back(Arc::new(batch));
        }
    }

    // publishing

    fn publish(&mut self, env: &mut Env) -> Result<(), End> {
        for _ in 0..env.rng.usize(..8) {
            if let Some((reply, answer)) = self.answers.pop_front() {
                self.on_answer(env, reply, answer)?;
            }
        }
        if self.pongs > self.ponged && self.pongs == self.pings {
            self.ponged = self.pongs;
            if let Some(core) = self.session.as_mut().and_then(|it| it.core.as_mut()) {
                core.on_pong();
            }
        }
        self.on_written(env)?;
        self.on_looks(env)?;
        let now = env.now;
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        let Some(core) = &mut session.core else {
            return Ok(());
        };
        let mut outcome = match env.is_off(Rule::AckTimeout) {
            true => Ok(()),
            false => core.tick(now),
        };
        if env.is_off(Rule::Gate)
            && let Core::ExactlyOnce(core) = core
        {
            core.on_recorded_again(now);
        }
        while outcome.is_ok()
            && core.wants_batch()
            && let Some(batch) = session.channel.pop_front()
        {
            outcome = core.offer(&batch);
        }
        if let Err(trouble) = outcome {
            return self.on_trouble(env, trouble);
        }
        if let Err(trouble) = self.next(env)? {
            return self.on_trouble(env, trouble);
        }
        self.record(env, false);
        self.look(env);
        self.confirm(env)
    }

    fn on_answer(&mut self, env: &mut Env, reply: u64, answer: Answer) -> Result<(), End> {
        let now = env.now;
        let Some(core) = self.core() else {
            return Ok(());
        };
        match core.answer(reply, answer, now) {
            Ok(_) => Ok(()),
            Err(trouble) => self.on_trouble(env, trouble),
        }
    }

    fn next(&mut self, env: &mut Env) -> Result<Result<(), Trouble>, End> {
        let now = env.now;
        let Some(session) = &mut self.session else {
            return Ok(Ok(()));
        };
        let Some(core) = &mut session.core else {
            return Ok(Ok(()));
        };
        // what lags behind is asked for again, and takes a while to come
        let mut last_read = None;
        loop {
            match core.next(now) {
                Ok(Next::Publish(publish)) => {
                    let event = publish.event.view();
                    let uid = std::str::from_utf8(event.body).ok();
                    let uid = uid.and_then(|body| body.split(' ').next()?.parse().ok());
                    let topic = (0..=PARKED).find(|topic| subject(*topic) == event.subject);
                    let flight = Flight {
                        uid: uid.ok_or_else(|| End::Broken("an event without its body".into()))?,
                        topic: topic.ok_or_else(|| End::Broken("another subject".into()))?,
                        reply: publish.reply,
                        id: event.id.into(),
                        position: session.lineage.at(event.position),
                        expected: publish.expected_last_sequence,
                        expected_last: publish
                            .expected_last
                            .filter(|_| !env.is_off(Rule::LastId))
                            .map(|last| last.id().into()),
                        expected_stream: publish
                            .expected_stream
                            .filter(|_| !env.is_off(Rule::StreamName))
                            .map(|name| name.to_string()),
                        is_late: publish.is_late && !env.is_off(Rule::Late),
                        transaction_end: match env.is_off(Rule::TransactionEnd) {
                            true => Some(1),
                            false => publish.transaction_end,
                        },
                        sent: now,
                        routed: self.up_since,
                    };
                    trace!(
                        env,
                        "relay {}: publishes {} {} to {} at {:?}{}{}",
                        self.name,
                        flight.id,
                        event.position,
                        event.subject,
                        flight.expected,
                        if flight.is_late { ", late" } else { "" },
                        match flight.transaction_end {
                            Some(count) => format!(", the last of {count}"),
                            None => String::new(),
                        }
                    );
                    if now > *self.unrecorded.get_or_insert(now) + LONGEST_UNRECORDED {
                        let why = "much is published that the record lacks";
                        return Err(End::Broken(why.into()));
                    }
                    self.out.push_back(Wire::Publish(Box::new(flight)));
                }
                Ok(Next::Ping) => {
                    self.pings += 1;
                    self.out.push_back(Wire::Ping);
                }
                Ok(Next::Read { stream, from, to }) => {
                    let read = (stream.clone(), from, to);
                    let lags = last_read.replace(read.clone()) == Some(read);
                    let read = |seq| Ok((seq, env.message(&stream, seq)?));
                    let messages: Result<Vec<(u64, Option<Message>)>, End> =
                        (from..=to).map(read).collect();
                    let messages = messages?;
                    trace!(
                        env,
                        "relay {}: reads {stream} from {from} to {to}: {}",
                        self.name,
                        crate::world::list(&messages)
                    );
                    let Core::ExactlyOnce(core) = core else {
                        return Ok(Ok(()));
                    };
                    match core.on_read(messages, now) {
                        Ok(Some((id, message))) => {
                            trace!(env, "relay {}: drops {id}: {message:?}", self.name);
                            // one that was overtaken may not know the timeline, and decides nothing any more
                            if self.zombie_since.is_none() {
                                env.on_dropped(&id)?;
                            }
                        }
                        Ok(None) => {}
                        Err(trouble) => return Ok(Err(trouble)),
                    }
                    if lags {
                        return Ok(Ok(()));
                    }
                }
                Ok(Next::TooLarge { token, .. }) => {
                    let event = core.event(token);
                    let event = event.ok_or_else(|| End::Broken("no such event".into()))?;
                    let parked =
                        park::parked(&event, PARK_SUBJECT, "too large", core.room(PARK_SUBJECT));
                    core.replace(token, parked);
                }
                Ok(Next::Nothing) => return Ok(Ok(())),
                Err(trouble) => return Ok(Err(trouble)),
            }
        }
    }

    fn on_trouble(&mut self, env: &mut Env, trouble: Trouble) -> Result<(), End> {
        match trouble {
            Trouble::Reconnect(cause) => {
                if let Cause::Disagrees(_) = cause {
                    trace!(env, "relay {}: {cause}", self.name);
                }
                Err(End::Connection(cause.to_string()))
            }
            Trouble::Refused { token, why } => {
                let Some(core) = self.session.as_mut().and_then(|it| it.core.as_mut()) else {
                    return Ok(());
                };
                let event = core.event(token);
                let event = event.ok_or_else(|| End::Broken("no such event".into()))?;
                let parked = park::parked(&event, PARK_SUBJECT, "refused", core.room(PARK_SUBJECT));
                // before an event changes its subject, connect again
                core.on_disconnect();
                core.replace(token, parked);
                Err(End::Connection(why.to_string()))
            }
            Trouble::Halt(halt) => Err(End::Halt(format!("{halt:?}"))),
            Trouble::OutOfOrder(position) => {
                Err(End::Broken(format!("out of order at {position}")))
            }
        }
    }

    /// Writes the record if there is news.
    fn record(&mut self, env: &mut Env, urgent: bool) {
        let now = env.now;
        let core = self.session.as_mut().and_then(|it| it.core.as_mut());
        let Some(Core::ExactlyOnce(core)) = core.filter(|it| !it.is_probing()) else {
            return;
        };
        let urgent = urgent || core.wants_record();
        if let Some(write) = self.store.write(|| core.cut_to_record(), now, urgent) {
            self.writes.push_back(write);
        } else if urgent && self.store.holds(&core.cut()) {
            core.on_recorded_again(now);
            self.unrecorded = None;
        }
    }

    fn on_written(&mut self, env: &mut Env) -> Result<(), End> {
        while let Some((number, answer)) = self.written.pop_front() {
            match self.store.on_written(number, answer, env.now) {
                Ok(true) => {
                    self.unrecorded = None;
                    let now = env.now;
                    if let Some(core) = self.core() {
                        core.on_recorded(now);
                    }
                }
                Ok(false) => {}
                Err(Overtaken) => return Err(End::Connection("a record is refused".into())),
            }
        }
        Ok(())
    }

    fn look(&mut self, env: &mut Env) {
        let core = self.session.as_ref().and_then(|it| it.core.as_ref());
        if env.now < self.next_look || core.is_some_and(Core::is_probing) {
            return;
        }
        self.next_look = env.now + LOOK_INTERVAL;
        let now = env.now;
        if let Some(core) = self.core() {
            let looks = core.looks(now);
            self.looks.extend(looks);
        }
    }

    fn on_looks(&mut self, env: &mut Env) -> Result<(), End> {
        if env.rng.bool() {
            return Ok(());
        }
        while let Some((token, look)) = self.looks.pop_front() {
            let (Look::Stream(name) | Look::Message(name, _)) = &look;
            let stream = env.streams.iter().find(|it| it.name == *name);
            let stream = stream.ok_or_else(|| End::Connection(format!("stream {name} is gone")))?;
            let Some(core) = self.core() else {
                return Ok(());
            };
            let outcome = match look {
                Look::Stream(_) if env.is_off(Rule::Looks) => {
                    core.on_look(token, &stream.created, u64::MAX)
                }
                Look::Message(..) if env.is_off(Rule::Looks) => core.on_witness(token, None),
                Look::Stream(_) => core.on_look(token, &stream.created, stream.last_seq),
                Look::Message(_, seq) => {
                    let found = stream.messages.get(&seq).map(|it| &it.message);
                    core.on_witness(token, found)
                }
            };
            if let Err(trouble) = outcome {
                return self.on_trouble(env, trouble);
            }
        }
        Ok(())
    }

    fn confirm(&mut self, env: &mut Env) -> Result<(), End> {
        let now = env.now;
        let is_zombie = self.zombie_since.is_some();
        let Some(session) = self.session.as_mut().filter(|_| !is_zombie) else {
            return Ok(());
        };
        let Some(Core::ExactlyOnce(core)) = &session.core else {
            return Ok(());
        };
        if !core.may_confirm(now) {
            return Ok(());
        }
        let flush = match env.is_off(Rule::Received) {
            true => self.store.matured_lsn(now),
            false => self.store.matured_lsn(now).min(session.received),
        };
        if flush > core.stored_lsn() {
            return Err(End::Broken(format!(
                "told {flush}, stored is {}",
                core.stored_lsn()
            )));
        }
        if flush > session.flush {
            session.flush = flush;
            env.confirm(flush, session.received)?;
        }
        Ok(())
    }

    /// It is stopped: what was published is acknowledged, and the record says so. `false`: not now.
    pub fn stop(&mut self, env: &mut Env) -> bool {
        let is_up = self.is_up();
        match self.core() {
            Some(core) if is_up && core.window().waiting() == 0 => core.mark_quiescent(),
            _ => return false,
        }
        self.record(env, true);
        if let Some(write) = self.writes.pop_front() {
            let answer = env.put(&write, true);
            trace!(env, "relay {}: stops in order: {answer:?}", self.name);
        }
        true
    }
}
