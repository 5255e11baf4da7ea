//! The servers, what is known of every event, and the promises. See `main.rs`.

use crate::nats::{Answer, Flight, Key, Stream, refused};
use crate::operator::Fault;
use crate::postgres::{Event, OTHER_ID, PARKED, Postgres, Setting, TOPICS, Transaction};
use crate::relay::{Accepted, End, HOLD_BACK, Relay, Wire};
use jetstream_outbox::jetstream::ack::{AckError, Origin, PubAck};
use jetstream_outbox::nats::EndedBy;
use jetstream_outbox::outbox::batch::Fate;
use jetstream_outbox::outbox::position::Position;
use jetstream_outbox::postgres::Lsn;
use jetstream_outbox::relay::checkpoint::store::Write;
use jetstream_outbox::relay::core::evidence::Message;
use jetstream_outbox::relay::core::rules::Rule;
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A publish or a record that arrives later than this does not arrive at all.
pub const LATEST: Duration = Duration::from_secs(50);

macro_rules! trace {
    ($env:expr, $($arg:tt)*) => {
        if let Some(trace) = &mut $env.trace {
            trace.push(format!("{:>8.3}s {}", ($env.now - $env.begun).as_secs_f64(), format_args!($($arg)*)))
        }
    };
}
pub(crate) use trace;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is there.
    There,
    /// Consumed, purged, deleted: it was there.
    Gone,
    /// A crash of the server took it.
    Lost,
}

#[derive(Debug)]
pub struct Copy {
    /// The stream's serial, and the sequence.
    pub at: (u64, u64),
    pub state: State,
    is_parked: bool,
    is_late: bool,
    transaction_end: Option<u64>,
}

/// What became of an event.
#[derive(Debug)]
pub struct Story {
    pub event: Rc<Event>,
    pub copies: Vec<Copy>,
    /// Its id was another's.
    pub dropped: bool,
    /// It went with the WAL that it was in, or the slot was moved past it.
    pub given_up: bool,
    /// A relay by whose flags it is no event has gone past it.
    passed_over: bool,
}

impl Story {
    fn is_resolved(&self) -> bool {
        self.event.fate == Fate::Lose
            || self.dropped
            || self.copies.iter().any(|copy| copy.state != State::Lost)
    }
}

/// Which relays mark the end of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marks {
    All,
    None,
    EverySecond,
}

pub struct Env {
    marks: Marks,
    /// The rule that is not followed.
    off: Option<Rule>,
    /// The slot was moved to this LSN, beyond what the record of this writer told.
    pub moved_slot: Option<(Lsn, String)>,
    /// The operator has passed `-resume-anyway`.
    pub was_accepted: bool,
    pub rng: fastrand::Rng,
    pub now: Instant,
    pub begun: Instant,
    pub is_healed: bool,
    pub pg: Postgres,
    /// Which server process it is: another one has no connections of this one.
    pub pg_epoch: u64,
    pub streams: Vec<Stream>,
    pub serial: u64,
    pub key: Key,
    pub key_down_until: Instant,
    /// Of connections that are gone: what may still arrive, in order.
    late: Vec<VecDeque<Flight>>,
    late_writes: Vec<Write>,
    pub stories: HashMap<u64, Story>,
    by_id: HashMap<String, Vec<u64>>,
    pub next_uid: u64,
    /// Why a halt is due, if it is.
    pub due: Option<&'static str>,
    /// Events of this topic go elsewhere, those of an odd one every second time.
    pub leaf: Option<usize>,
    leaf_turn: usize,
    was_elsewhere: bool,
    was_doubtful: bool,
    /// Publishes go elsewhere now and then; those that did, which do not so again.
    has_namesake: bool,
    swallowed: HashSet<u64>,
    /// When the topic was last moved to another stream.
    pub moved: [Option<Instant>; TOPICS + 1],
    /// The flags of the relays that start now, those of the last that came up, and whether they were ever changed.
    pub setting: Setting,
    pub earlier: Setting,
    pub flags_changed: bool,
    /// Positions were counted in two ways: where a stream has lost something since, only the operator knows what to do.
    pub counted_otherwise: bool,
    pub has_lost: bool,
    pub has_regressed: bool,
    pub has_deleted_streams: bool,
    /// Something else has answered, so that an event seemed to be gone.
    was_misled: bool,
    /// `created` has changed of a stream that is the same: where the witness is gone, nothing tells.
    pub has_other_created: bool,
    /// Those of each writer.
    settings: HashMap<String, Setting>,
    /// The record is not what it was.
    pub key_was_touched: bool,
    /// A message of ours without a fence is no copy, for all that is known.
    pub has_bare_copies: bool,
    /// What was copied: to this stream, under this id.
    pub copied: HashSet<(u64, String)>,
    pub has_foreign: bool,
    /// Streams that have left the prefix for a while.
    pub left: HashSet<u64>,
    pub trace: Option<Vec<String>>,
}

pub fn list(messages: &[(u64, Option<Message>)]) -> String {
    let one = |(seq, message): &(u64, Option<Message>)| match message {
        None => format!("{seq} gone"),
        Some(message) => format!("{seq} {}", message.id.as_deref().unwrap_or("foreign")),
    };
    messages.iter().map(one).collect::<Vec<_>>().join(", ")
}

impl Env {
    pub fn is_off(&self, rule: Rule) -> bool {
        self.off == Some(rule)
    }

    /// A write of the record reaches the server.
    pub fn put(&mut self, write: &Write, is_strict: bool) -> Result<PubAck, AckError> {
        let answer = self.key.put(write, is_strict, self.now);
        // the one who had received it before the slot was moved has stored what that skips
        let record = self.key.record();
        self.moved_slot.take_if(|(lsn, writer)| {
            record.is_some_and(|it| it.writer == *writer && it.young.stored_lsn >= *lsn)
        });
        if let Some(record) = self.key.record()
            && let Some(of_writer) = self.settings.get(&record.writer)
            && !(of_writer.takes_wide && of_writer.sends_wide)
        {
            let young = &record.young;
            let upto = young.stored_lsn.max(young.anchor.position.commit_lsn);
            let passed = (self.pg.transactions.iter()).flat_map(|it| &it.events);
            for event in passed.filter(|it| it.is_wide && it.position.commit_lsn <= upto) {
                if let Some(story) = self.stories.get_mut(&event.uid) {
                    story.passed_over |= !story.is_resolved();
                }
            }
        }
        answer
    }

    /// It is promised for these flags.
    fn is_due(&self, event: &Event) -> bool {
        let story = self.stories.get(&event.uid);
        !event.is_wide || self.setting.takes(event) && !story.is_some_and(|story| story.passed_over)
    }

    pub fn is_key_down(&self) -> bool {
        self.now < self.key_down_until
    }

    /// One of `n`; never once the faults are over.
    pub fn one_in(&mut self, n: u32) -> bool {
        !self.is_healed && self.rng.u32(..n) == 0
    }

    pub fn message(&self, stream: &str, seq: u64) -> Result<Option<Message>, End> {
        let found = self.streams.iter().find(|it| it.name == stream);
        let found = found.ok_or_else(|| End::Connection(format!("stream {stream} is gone")))?;
        Ok(found.messages.get(&seq).map(|it| it.message.clone()))
    }

    pub fn commit(&mut self, gap: u64, events: Vec<Event>) {
        let time_us = (self.now - self.begun).as_micros() as i64 + self.rng.i64(1..1_000_000);
        let transaction = self.pg.commit(gap, time_us, events).clone();
        for event in &transaction.events {
            self.by_id
                .entry(event.id.clone())
                .or_default()
                .push(event.uid);
            let story = Story {
                event: event.clone(),
                copies: Vec::new(),
                dropped: false,
                given_up: false,
                passed_over: false,
            };
            self.stories.insert(event.uid, story);
        }
        let events = transaction.events.iter();
        let events: Vec<_> = events
            .map(|it| {
                format!(
                    "{} to {}{}",
                    it.id,
                    it.topic,
                    if it.is_large { " large" } else { "" }
                )
            })
            .collect();
        trace!(
            self,
            "commit {} {events:?}, ends at {}", transaction.commit_lsn, transaction.end_lsn
        );
    }

    /// The operator has accepted what is lost: what the streams lack up to `resolved`, and what the slot does not send.
    pub fn accept_loss(&mut self, resolved: Position, confirmed: Lsn) {
        trace!(
            self,
            "accepted: what is lost up to {resolved} or {confirmed}"
        );
        for transaction in &self.pg.transactions {
            for event in &transaction.events {
                let is_over = transaction.end_lsn <= confirmed || event.position <= resolved;
                if let Some(story) = self.stories.get_mut(&event.uid).filter(|_| is_over) {
                    story.given_up |= !story.is_resolved();
                }
            }
        }
        (self.moved_slot, self.was_accepted) = (None, true);
    }

    /// Nothing tells any more what was accepted.
    pub fn forget_accepted(&mut self) {
        if self.was_accepted {
            self.due = Some("forgotten");
        }
    }

    /// A relay goes on with what was accepted: it has no reason to halt any more. Before another WAL is seen to be another, it may
    /// be found to be so later.
    pub fn on_accepted(&mut self, accepted: Accepted, writer: &str) {
        // the bucket may have been put back since
        let record = self.key.record();
        if record.is_none_or(|record| record.writer != writer) {
            return;
        }
        let is_over = match accepted {
            Accepted::Nothing => false,
            Accepted::Loss => self.due == Some("slot moved"),
            Accepted::OtherWal => true,
        };
        self.due = self.due.filter(|_| !is_over);
    }

    /// The events of these transactions need not be published any more.
    pub fn give_up<'a>(&mut self, transactions: impl IntoIterator<Item = &'a Rc<Transaction>>) {
        for event in transactions.into_iter().flat_map(|it| &it.events) {
            if let Some(story) = self.stories.get_mut(&event.uid) {
                story.given_up = true;
            }
        }
    }

    // what a relay leaves behind

    pub fn leave_behind(&mut self, mut out: VecDeque<Flight>, writes: VecDeque<Write>) {
        if self.is_healed {
            return;
        }
        out.truncate(self.rng.usize(..=out.len()));
        if !out.is_empty() && self.rng.bool() {
            self.late.push(out);
        }
        for write in writes {
            if self.rng.bool() {
                self.late_writes.push(write);
            }
        }
    }

    pub fn forget_late(&mut self, topic: usize) {
        for flights in &mut self.late {
            flights.retain(|it| it.topic != topic);
        }
    }

    pub fn forget_all_late(&mut self) {
        self.late.clear();
        self.late_writes.clear();
    }

    pub fn is_late(&self, topic: usize) -> bool {
        self.late.iter().flatten().any(|it| it.topic == topic)
    }

    pub fn deliver_late(&mut self) -> Result<(), End> {
        let now = self.now;
        for flights in &mut self.late {
            flights.retain(|it| now < it.sent + LATEST);
        }
        self.late.retain(|flights| !flights.is_empty());
        if !self.late.is_empty() {
            let index = self.rng.usize(..self.late.len());
            if let Some(flight) = self.late[index].pop_front() {
                let answer = self.arrive(&flight, true)?;
                trace!(self, "late publish of {}: {answer:?}", flight.id);
            }
        }
        if !self.late_writes.is_empty() && self.rng.bool() {
            let index = self.rng.usize(..self.late_writes.len());
            let write = self.late_writes.swap_remove(index);
            let is_strict = !self.is_off(Rule::Revision);
            let answer = self.put(&write, is_strict);
            trace!(self, "late record: {answer:?}");
        }
        Ok(())
    }

    /// Another stream of the same name has taken it, and answers.
    fn swallow(&mut self, flight: &Flight) -> Option<Answer> {
        let home = (self.streams.iter()).find(|it| it.topics.contains(&flight.topic))?;
        let is_taken = self.has_namesake && flight.uid % 97 == 5 && !self.is_healed;
        if !is_taken || !self.swallowed.insert(flight.uid) {
            return None;
        }
        let origin = Origin {
            stream: home.name.clone(),
            domain: String::new(),
        };
        let ack = PubAck {
            seq: 200_000 + flight.uid,
            duplicate: false,
        };
        Some(Ok((ack, Arc::new(origin))))
    }

    // the promises

    /// How the server ends the connection over a publish, if it does.
    pub fn ends_over(&self, flight: &Flight) -> Option<EndedBy> {
        let story = self.stories.get(&flight.uid)?;
        story.event.ends.filter(|_| flight.topic != PARKED)
    }

    /// A publish reaches the server.
    pub fn arrive(&mut self, flight: &Flight, is_late_copy: bool) -> Result<Option<Answer>, End> {
        let story = self.stories.get(&flight.uid);
        let is_mystery = story.is_some_and(|it| it.event.is_mystery) && flight.topic != PARKED;
        if is_mystery || self.ends_over(flight).is_some() {
            return Ok(None);
        }
        self.leaf_turn += usize::from(self.leaf == Some(flight.topic));
        if self.leaf == Some(flight.topic) && (flight.topic * self.leaf_turn).is_multiple_of(2) {
            self.was_elsewhere = true;
            let origin = Origin {
                stream: "LEAF".into(),
                domain: "leaf".into(),
            };
            let ack = PubAck {
                seq: flight.expected.unwrap_or(0) + 1,
                duplicate: false,
            };
            return Ok(Some(Ok((ack, Arc::new(origin)))));
        }
        let now = self.now;
        let home = self
            .streams
            .iter_mut()
            .find(|it| it.topics.contains(&flight.topic));
        let Some(stream) = home else {
            return Ok(Some(Err(AckError::NoResponders)));
        };
        if stream.down_until > now {
            return Ok(None);
        }
        let origin = Arc::new(Origin {
            stream: stream.name.clone(),
            domain: String::new(),
        });
        let answer = stream.publish(flight, self.off != Some(Rule::Fence), now);
        if let Ok(ack) = &answer
            && !ack.duplicate
        {
            let (serial, name) = (stream.serial, stream.name.clone());
            trace!(self, "stored {} at {} of {name}", flight.id, ack.seq);
            self.on_stored(flight, (serial, ack.seq), is_late_copy)?;
        }
        Ok(Some(answer.map(|ack| (ack, origin))))
    }

    /// The answer as it would be if nothing in it were against the rule that is not followed.
    fn without_rule(&self, flight: &Flight, answer: Answer) -> Answer {
        let mut streams = self.streams.iter();
        let home = streams.find(|it| it.topics.contains(&flight.topic));
        let home = Arc::new(Origin {
            stream: home.map_or(String::new(), |it| it.name.clone()),
            domain: String::new(),
        });
        let stored = PubAck {
            seq: flight.expected.unwrap_or_default() + 1,
            duplicate: false,
        };
        match answer {
            Ok((ack, _)) if self.is_off(Rule::Origin) => Ok((ack, home)),
            Ok((ack, origin)) if self.is_off(Rule::AckSequence) && !ack.duplicate => {
                Ok((stored, origin))
            }
            Ok((ack, origin)) if self.is_off(Rule::Duplicate) && ack.duplicate => {
                Ok((stored, origin))
            }
            Err(_) if self.is_off(Rule::Refusal) => Ok((stored, home)),
            answer => answer,
        }
    }

    fn on_stored(
        &mut self,
        flight: &Flight,
        at: (u64, u64),
        is_late_copy: bool,
    ) -> Result<(), End> {
        let broken = |why: String| Err(End::Broken(why));
        let position = flight.position.position;
        let Some(story) = self.stories.get_mut(&flight.uid) else {
            return broken(format!("published what was never committed: {flight:?}"));
        };
        // without a record nothing tells of a stream that has left the prefix
        let routed = self.streams.iter().filter(|it| !it.topics.is_empty());
        let routed: Vec<u64> = routed.map(|it| it.serial).collect();
        let is_known = |at: (u64, u64)| {
            !self.key_was_touched || routed.contains(&at.0) && !self.left.contains(&at.0)
        };
        let mut there = story
            .copies
            .iter()
            .filter(|copy| copy.state == State::There);
        let twice = there.find(|copy| is_known(copy.at));
        if let Some(twice) = twice {
            return broken(format!(
                "twice: {} at {at:?}, and at {:?}",
                flight.id, twice.at
            ));
        }
        let event = story.event.clone();
        let was_lost = story.copies.iter().any(|copy| copy.state == State::Lost);
        let was_gone = story.copies.iter().any(|copy| copy.state == State::Gone);
        story.copies.push(Copy {
            at,
            state: State::There,
            is_parked: flight.topic == PARKED,
            is_late: flight.is_late,
            transaction_end: flight.transaction_end,
        });
        self.check_mark(flight, at, was_gone)?;
        let is_refused = event.is_large || event.is_mystery || event.ends.is_some();
        let is_poison = event.topic == PARKED || is_refused;
        if flight.topic == PARKED && !is_poison {
            return broken(format!(
                "{} is put aside, and nothing is wrong with it",
                flight.id
            ));
        }
        if !is_late_copy
            && !self.key_was_touched
            && let Some(record) = self.key.record()
            && record.timeline == flight.position.source.timeline
            && position <= record.young.anchor.position
            && self.due.is_none()
        {
            return broken(format!(
                "{} at {position} is published, but the record has everything up to {}",
                flight.id, record.young.anchor.position
            ));
        }
        // what an abandoned WAL had is in no order with what its successor has
        if self.stories.get(&flight.uid).is_some_and(|it| it.given_up) {
            return Ok(());
        }
        // a restored server has repeated the write, and JetStream has taken it for the first one
        let same = self.by_id.get(&event.id).into_iter().flatten();
        let same = same.filter_map(|uid| self.stories.get(uid));
        let mut same = same.filter(|it| it.event.position == position);
        let first_is_gone = same.any(|it| it.copies.iter().any(|copy| copy.state == State::Gone));
        let lineage = self.pg.lineage();
        let Some(stream) = self.streams.iter().find(|it| it.serial == at.0) else {
            return Ok(());
        };
        let later = stream.messages.range(..at.1).filter_map(|(seq, it)| {
            let other = self.stories.get(&it.uid?)?;
            let is_later = it.message.ours(&lineage)? > position;
            (is_later && !other.given_up).then_some((seq, other.event.topic))
        });
        let later: Vec<_> = later.collect();
        let Some((seq, _)) = later.first() else {
            return Ok(());
        };
        // one whose topic was moved while it was on its way may land in a stream that ends where the other one did
        let has_strayed = self.moved[flight.topic].is_some_and(|at| at >= flight.routed);
        if !flight.is_late && !has_strayed && self.due.is_none() {
            return broken(format!(
                "{} at {} comes after {seq}, which is later, and is not marked late",
                flight.id, at.1
            ));
        }
        let was_moved = event.committed <= stream.born
            || self.moved[flight.topic].is_some()
            // they were on their way to another stream, and fitted the end of this one
            || later.iter().all(|(_, topic)| self.moved[*topic].is_some())
            // somebody has taken it, and the server has forgotten it
            || first_is_gone
            // others have passed while it was refused, before it was parked
            || event.is_mystery
            || event.ends.is_some()
            || event.reuses_id
            // earlier flags have passed it over, and later ones take it
            || event.is_wide
            // its end was lost, and others have filled it before the relay has seen that
            || was_lost && self.has_foreign;
        if !stream.is_replicated && !was_moved && self.due.is_none() {
            return broken(format!(
                "out of order: {} at {} comes after {seq}, which is later",
                flight.id, at.1
            ));
        }
        Ok(())
    }

    /// The relay of this name marks the end of a transaction.
    pub fn marks_ends(&self, relay: u64) -> bool {
        match self.marks {
            Marks::All => true,
            Marks::None => false,
            Marks::EverySecond => relay.is_multiple_of(2),
        }
    }

    /// The copies of each of the transaction's events in the stream, but those that are parked or lost. Nothing tells an event from
    /// the one that a restored server has repeated.
    fn share(&self, transaction: &Transaction, stream: u64) -> Vec<Vec<&Copy>> {
        let is_event =
            |copy: &&Copy| copy.at.0 == stream && !copy.is_parked && copy.state != State::Lost;
        let copies = transaction.events.iter().map(|event| {
            let same = self.by_id.get(&event.id).into_iter().flatten();
            let same = same.filter_map(|uid| self.stories.get(uid));
            let same = same.filter(|it| it.event.position == event.position);
            same.flat_map(|it| &it.copies).filter(is_event).collect()
        });
        copies
            .filter(|copies: &Vec<_>| !copies.is_empty())
            .collect()
    }

    /// A mark is never false: its count is right, and no event comes after it.
    fn check_mark(&self, flight: &Flight, at: (u64, u64), was_gone: bool) -> Result<(), End> {
        let commit_lsn = flight.position.position.commit_lsn;
        let transaction = self.pg.transactions.iter().find(|it| {
            let is_it = |event: &Rc<Event>| event.uid == flight.uid;
            it.commit_lsn == commit_lsn && it.events.iter().any(is_it)
        });
        let Some(transaction) = transaction.filter(|_| flight.topic != PARKED) else {
            return Ok(());
        };
        let share = self.share(transaction, at.0);
        let is_there = |copies: &&Vec<&Copy>| copies.iter().any(|it| it.state == State::There);
        // what is gone may be known or not, and a copy may be taken for the event
        let is_copied = |event: &&Rc<Event>| self.copied.contains(&(at.0, event.id.clone()));
        let copied = transaction.events.iter().filter(is_copied).count();
        let counts = share.iter().filter(is_there).count()..=share.len() + copied;
        let topics = transaction.events.iter().map(|event| event.topic);
        let moved = topics.filter_map(|topic| self.moved[topic]);
        let (mut moved, was_moved) = (moved.clone(), moved.count() > 0);
        let has_strayed = moved.any(|at| at >= flight.routed);
        // an event of an abandoned timeline may have its position and id
        let is_namesake =
            |event: &Rc<Event>| self.by_id.get(&event.id).is_some_and(|it| it.len() > 1);
        let has_namesakes = transaction.events.iter().any(is_namesake);
        if let Some(count) = flight.transaction_end
            && !counts.contains(&(count as usize))
            && !has_strayed
            && !has_namesakes
            && !self.was_accepted
            && !self.is_behind_a_copy(transaction, at)
        {
            return Err(End::Broken(format!(
                "mark: {} is the last of {count}, but {counts:?} are there",
                flight.id,
            )));
        }
        // it was dropped, and is not now that its id is forgotten
        let was_dropped = self.by_id.get(&flight.id).is_none_or(|all| all.len() > 1);
        let is_excused = was_moved || was_gone || was_dropped || self.flags_changed;
        // what was deleted may have been lost since
        let is_left = |copy: &Copy| copy.state == State::There || !self.has_regressed;
        let is_marked =
            |copy: &&&Copy| copy.at.1 < at.1 && copy.transaction_end.is_some() && is_left(copy);
        let marked = share.iter().flatten().find(is_marked);
        if let Some(copy) = marked.filter(|_| !is_excused) {
            return Err(End::Broken(format!(
                "mark: {} comes after that at {:?}",
                flight.id, copy.at
            )));
        }
        Ok(())
    }

    /// In the place of the event before is a copy of one of the transaction's, with its id: for the fence it is that event.
    fn is_behind_a_copy(&self, transaction: &Transaction, at: (u64, u64)) -> bool {
        let stream = self.streams.iter().find(|it| it.serial == at.0);
        let before = stream.and_then(|it| it.messages.get(&(at.1 - 1)));
        let id = before
            .filter(|it| it.uid.is_none())
            .and_then(|it| it.message.id.as_ref());
        id.is_some_and(|id| transaction.events.iter().any(|event| event.id == *id))
    }

    /// Each transaction has its mark in each stream, but for those that something has come between.
    fn check_marks(&self) -> Result<(), String> {
        let is_excused = self.marks != Marks::All
            || self.off.is_some()
            || self.flags_changed
            || self.has_other_created
            || self.has_deleted_streams
            || self.was_misled
            || self.was_accepted;
        for transaction in self.pg.transactions.iter().filter(|_| !is_excused) {
            let is_plain = |event: &Rc<Event>| {
                let story = self.stories.get(&event.uid);
                let story =
                    story.filter(|_| self.by_id.get(&event.id).is_some_and(|all| all.len() == 1));
                let is_refused = event.is_large || event.is_mystery || event.ends.is_some();
                let was_moved = self.moved[event.topic].is_some();
                story.is_some_and(|it| match it.copies.as_slice() {
                    [] => event.fate == Fate::Lose,
                    [copy] => copy.state == State::There && !copy.is_late,
                    _ => false,
                }) && !is_refused
                    && !was_moved
            };
            if !transaction.events.iter().all(is_plain) {
                continue;
            }
            for stream in &self.streams {
                let share = self.share(transaction, stream.serial);
                let last = share.iter().flatten().max_by_key(|copy| copy.at.1);
                if let Some(last) = last.filter(|it| it.transaction_end != Some(share.len() as u64))
                {
                    return Err(format!(
                        "mark: none at {:?}, the last of {} of {}",
                        last.at,
                        share.len(),
                        transaction.commit_lsn
                    ));
                }
            }
        }
        Ok(())
    }

    /// A message goes.
    pub fn mark(&mut self, serial: u64, seq: u64, uid: Option<u64>, state: State) {
        let Some(story) = uid.and_then(|uid| self.stories.get_mut(&uid)) else {
            return;
        };
        for copy in &mut story.copies {
            if copy.at == (serial, seq) && copy.state == State::There {
                copy.state = state;
            }
        }
    }

    pub fn on_dropped(&mut self, id: &str) -> Result<(), End> {
        let id = id.strip_prefix(OTHER_ID).unwrap_or(id);
        let uids = self.by_id.get(id).cloned().unwrap_or_default();
        let reused = uids
            .iter()
            .filter_map(|uid| self.stories.get(uid))
            .any(|it| it.event.reuses_id);
        // it was stored, and somebody has taken it, which the relay does not know by a record that was put back or disowned, or
        // by a cut that it went back to
        let stories = uids.iter().filter_map(|uid| self.stories.get(uid));
        let mut copies = stories.flat_map(|it| &it.copies);
        let was_stored = copies.any(|copy| match copy.state {
            State::Gone => {
                self.key_was_touched
                    || self.has_regressed
                    || self.has_deleted_streams
                    || self.was_accepted
            }
            // by a WAL in place of which this one was accepted, which repeats its writes
            State::There => self.was_accepted,
            State::Lost => false,
        });
        if !reused && self.due.is_none() && !was_stored {
            return Err(End::Broken(format!("dropped {id}, which nobody else has")));
        }
        for uid in uids {
            if let Some(story) = self.stories.get_mut(&uid) {
                story.dropped = true;
            }
        }
        Ok(())
    }

    fn is_resolved(&self, event: &Event) -> bool {
        let is_resolved = |uid: &u64| self.stories.get(uid).is_some_and(Story::is_resolved);
        if !self.is_due(event)
            || is_resolved(&event.uid)
            || self.stories.get(&event.uid).is_some_and(|it| it.given_up)
        {
            return true;
        }
        // a restored server has repeated the write: nothing tells the two apart
        let same = self.by_id.get(&event.id).into_iter().flatten();
        let mut same = same.filter(|uid| {
            self.stories
                .get(uid)
                .is_some_and(|it| it.event.position == event.position)
        });
        if same.any(is_resolved) || self.is_copied(event) {
            return true;
        }
        // of several with one id JetStream keeps any, while it remembers the id
        let all = || self.by_id.get(&event.id).into_iter().flatten();
        let stories = || all().filter_map(|uid| self.stories.get(uid));
        stories().any(|it| it.event.reuses_id) && stories().any(Story::is_resolved)
    }

    /// Somebody's copy of it is in its stream, which JetStream takes for it.
    fn is_copied(&self, event: &Event) -> bool {
        let home = (self.streams.iter()).filter(|it| it.topics.contains(&event.topic));
        let messages = home.flat_map(|it| it.messages.values());
        let mut messages = messages.map(|it| &it.message);
        messages.any(|message| {
            let at = message.position.as_ref().map(|it| it.position);
            at == Some(event.position) && message.id.as_deref() == Some(&event.id)
        })
    }

    /// The relay tells Postgres.
    pub fn confirm(&mut self, lsn: Lsn, received: Lsn) -> Result<(), End> {
        if self.moved_slot.is_some() && !self.key_was_touched {
            return Err(End::Broken("went on with a slot that was moved".into()));
        }
        if lsn > received {
            return Err(End::Broken(format!("confirmed {lsn}, received {received}")));
        }
        if lsn <= self.pg.confirmed {
            return Ok(());
        }
        trace!(self, "confirmed {lsn}");
        if lsn > self.pg.wal_end {
            return Err(End::Broken(format!(
                "confirmed {lsn}, the WAL ends at {}",
                self.pg.wal_end
            )));
        }
        if !self.key_was_touched && self.key.record().is_none_or(|record| record.told_lsn < lsn) {
            return Err(End::Broken(format!(
                "confirmed {lsn}, which the record does not tell"
            )));
        }
        let from = self.pg.first_from(Lsn(0));
        let transactions = self.pg.transactions.iter().skip(from);
        for transaction in transactions.take_while(|it| it.end_lsn <= lsn) {
            for event in &transaction.events {
                if !self.is_resolved(event) {
                    return Err(End::Broken(format!(
                        "confirmed {lsn}, but {} at {} is not stored",
                        event.id, event.position
                    )));
                }
            }
        }
        self.pg.confirmed = lsn;
        if self.rng.bool() {
            self.pg.persisted = lsn;
        }
        Ok(())
    }

    /// Something that was committed is not stored.
    pub fn has_unresolved(&self) -> bool {
        self.check_all().is_err()
    }

    fn check_all(&self) -> Result<(), String> {
        for event in self.pg.transactions.iter().flat_map(|it| &it.events) {
            if !self.is_resolved(event) {
                return Err(format!(
                    "lost: {} at {} of topic {}",
                    event.id, event.position, event.topic
                ));
            }
        }
        Ok(())
    }
}

pub struct World {
    pub env: Env,
    pub faults: Vec<Fault>,
    pub relay: Option<Relay>,
    pub zombies: Vec<Relay>,
    pub relays: u64,
    pub snapshot: Option<Postgres>,
    /// After a restore: what is written again.
    pub repeats: VecDeque<Rc<Transaction>>,
    halted: Option<String>,
    /// No relay has come up since the flags were refused.
    pub were_refused: bool,
    /// So often the operator still passes `-resume-anyway` where a halt says so.
    anyways: u32,
    /// He does, until a relay comes up.
    is_accepting: bool,
}

/// How a run ended that broke no promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    AllStored,
    Halted(String),
}

type Outcome = Result<Ended, String>;

/// Runs one seed; `Err` says which promise was broken.
pub fn run(seed: u64, off: Option<Rule>, traced: bool) -> (Outcome, Vec<String>) {
    let mut world = World::new(seed, off, traced);
    let outcome = world.live();
    (outcome, world.env.trace.unwrap_or_default())
}

impl World {
    fn new(seed: u64, off: Option<Rule>, traced: bool) -> World {
        let mut rng = fastrand::Rng::with_seed(seed);
        let now = Instant::now();
        let mut faults = Fault::choose(&mut rng);
        // not drawn, so that the other seeds stay what they were
        match seed % 8 {
            3 => faults.push(Fault::HangUp),
            6 => faults.push(Fault::Flags),
            4 if seed % 16 == 12 => faults.push(Fault::Namesake),
            _ => {}
        }
        let mut env = Env {
            marks: match seed % 5 {
                0 => Marks::None,
                1 => Marks::EverySecond,
                _ => Marks::All,
            },
            off,
            moved_slot: None,
            was_accepted: false,
            now,
            begun: now,
            is_healed: false,
            pg: Postgres::new(),
            pg_epoch: 0,
            streams: Vec::new(),
            serial: 0,
            key: Key::default(),
            key_down_until: now,
            late: Vec::new(),
            late_writes: Vec::new(),
            stories: HashMap::new(),
            by_id: HashMap::new(),
            next_uid: 0,
            due: None,
            leaf: None,
            leaf_turn: 0,
            was_elsewhere: false,
            was_doubtful: false,
            has_namesake: faults.contains(&Fault::Namesake),
            swallowed: HashSet::new(),
            moved: [None; TOPICS + 1],
            setting: Setting::WIDE,
            earlier: Setting::WIDE,
            flags_changed: false,
            counted_otherwise: false,
            has_lost: false,
            has_regressed: false,
            has_deleted_streams: false,
            was_misled: false,
            has_other_created: false,
            settings: HashMap::new(),
            key_was_touched: false,
            has_bare_copies: false,
            copied: HashSet::new(),
            has_foreign: false,
            left: HashSet::new(),
            trace: traced.then(Vec::new),
            rng,
        };
        env.set_up();
        trace!(env, "faults: {faults:?}");
        World {
            env,
            faults,
            relay: None,
            zombies: Vec::new(),
            relays: 0,
            snapshot: None,
            repeats: VecDeque::new(),
            halted: None,
            were_refused: false,
            anyways: if seed % 4 == 1 { 3 } else { 0 },
            is_accepting: false,
        }
    }

    fn live(&mut self) -> Outcome {
        let steps = [60, 150, 300, 600][self.env.rng.usize(..4)];
        for _ in 0..steps {
            if let Some(why) = self.step()? {
                return self.on_halt(why);
            }
        }
        self.heal()
    }

    fn on_halt(&mut self, why: String) -> Outcome {
        trace!(self.env, "halted: {why}");
        let is_unfenced = why.starts_with("unfenced");
        let is_mixed = why.starts_with("both flags");
        let is_lost = why.starts_with("lost");
        match self.env.due {
            _ if is_mixed && self.env.counted_otherwise && self.env.has_lost => {
                Ok(Ended::Halted(why))
            }
            _ if is_unfenced && self.env.has_bare_copies => Ok(Ended::Halted(why)),
            _ if is_lost && self.env.has_other_created && self.env.has_lost => {
                Ok(Ended::Halted(why))
            }
            Some("elsewhere") if !why.starts_with("Elsewhere") => {
                Err(format!("halted for another reason than is due: {why}"))
            }
            Some(_) => Ok(Ended::Halted(why)),
            None => Err(format!("halted without need: {why}")),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.env.now += time;
    }

    /// `Some`: the relay has halted.
    fn step(&mut self) -> Result<Option<String>, String> {
        let ms = match self.env.rng.u32(..100) {
            0..70 => self.env.rng.u64(..100),
            70..95 => self.env.rng.u64(..1500),
            _ => {
                for _ in 0..self.env.rng.u32(..40) {
                    self.pass(Duration::from_millis(500));
                    if let Some(why) = self.work(3)? {
                        return Ok(Some(why));
                    }
                }
                0
            }
        };
        self.pass(Duration::from_millis(ms));
        if self.env.rng.u32(..100) < 25 {
            self.commit();
        }
        if self.env.rng.u32(..100) < 12 && !self.faults.is_empty() {
            let fault = self.faults[self.env.rng.usize(..self.faults.len())];
            self.strike(fault);
        }
        let much = self.env.rng.usize(..4);
        self.work(much)
    }

    /// Everybody does something.
    fn work(&mut self, much: usize) -> Result<Option<String>, String> {
        let outcome = self.try_work(much);
        match outcome {
            Ok(()) => Ok(self.halted.clone()),
            Err(End::Broken(why)) => Err(why),
            Err(End::Halt(why)) => Ok(self.resume_anyway(why)),
            Err(End::OtherFlags(why)) => {
                let why = self.on_other_flags(why);
                Ok(why.and_then(|why| self.resume_anyway(why)))
            }
            Err(End::Connection(why) | End::Session(why)) => Err(format!("not handled: {why}")),
        }
    }

    /// The operator does what a halt says. `Some`: it says something else, or he has had enough.
    fn resume_anyway(&mut self, why: String) -> Option<String> {
        let says_so = self.env.due != Some("elsewhere");
        if self.anyways == 0 || !says_so || self.on_halt(why.clone()).is_err() {
            return Some(why);
        }
        trace!(self.env, "the operator passes -resume-anyway");
        self.anyways -= 1;
        self.is_accepting = true;
        if let Some(mut relay) = self.relay.take() {
            relay.hang_up(&mut self.env);
        }
        // that takes him a while: nothing is on its way any more
        self.env.forget_all_late();
        None
    }

    /// The operator takes the earlier flags again, as he is told.
    fn on_other_flags(&mut self, why: String) -> Option<String> {
        if std::mem::replace(&mut self.were_refused, true) {
            return Some(format!("both flags are refused after {why}"));
        }
        let env = &mut self.env;
        env.setting = env.earlier;
        trace!(
            env,
            "the flags are refused after {why}, and are {:?} again", env.setting
        );
        self.relay = None;
        None
    }

    fn try_work(&mut self, much: usize) -> Result<(), End> {
        let World {
            env,
            relay,
            zombies,
            relays,
            were_refused,
            is_accepting,
            ..
        } = self;
        let new = *relays;
        let hold_back = match env.is_off(Rule::HoldBack) {
            true => Duration::ZERO,
            false => HOLD_BACK,
        };
        env.settings.insert(format!("relay-{new}"), env.setting);
        let relay = relay.get_or_insert_with(|| {
            let mut relay = Relay::new(new, env.setting, hold_back, env.now);
            if *is_accepting {
                relay.accepted = Accepted::Loss;
            }
            relay
        });
        *relays = (*relays).max(relay.name + 1);
        for _ in 0..much {
            relay.receive(env);
            relay.work(env)?;
            serve(env, relay)?;
        }
        if relay.is_up() {
            *were_refused = false;
            env.earlier = relay.setting;
            *is_accepting = false;
        }
        let mut index = 0;
        while index < zombies.len() {
            let zombie = &mut zombies[index];
            let is_over = zombie
                .zombie_since
                .is_none_or(|since| env.now > since + LATEST / 2);
            let mut outcome = serve(env, zombie);
            if outcome.is_ok() && !is_over {
                outcome = zombie.work(env);
            }
            match outcome {
                Err(End::Broken(why)) => return Err(End::Broken(why)),
                Ok(()) if !is_over => index += 1,
                _ => drop(zombies.swap_remove(index)),
            }
        }
        if env.rng.u32(..4) == 0 {
            env.deliver_late()?;
        }
        Ok(())
    }

    fn heal(&mut self) -> Outcome {
        trace!(self.env, "no more faults");
        self.env.is_healed = true;
        self.zombies.clear();
        self.end_faults();
        for _ in 0..2 * (HOLD_BACK.as_secs() * 4 + 100) {
            self.pass(Duration::from_millis(500));
            if let Some(why) = self.work(4)? {
                return self.on_halt(why);
            }
            if self.env.pg.confirmed == self.env.pg.wal_end {
                self.env.check_all()?;
                self.env.check_marks()?;
                return Ok(Ended::AllStored);
            }
        }
        if self.env.due == Some("elsewhere") && !self.env.was_elsewhere {
            return Ok(Ended::AllStored);
        }
        Err(format!(
            "no progress: {} of {} confirmed",
            self.env.pg.confirmed, self.env.pg.wal_end
        ))
    }

    fn commit(&mut self) {
        if let Some(transaction) = self.repeats.pop_front() {
            let wal_end = self.env.pg.wal_end;
            if let Some(gap) = transaction.commit_lsn.0.checked_sub(wal_end.0) {
                let events = transaction.events.iter().map(|it| {
                    let mut event = Event::clone(it);
                    event.uid = self.env.next_uid;
                    event.committed = self.env.now;
                    self.env.next_uid += 1;
                    event
                });
                let events = events.collect();
                return self.env.commit(gap, events);
            }
        }
        let events = (0..self.env.rng.usize(..5)).map(|_| self.event()).collect();
        let gap = self.env.rng.u64(1..20);
        self.env.commit(gap, events);
    }

    fn event(&mut self) -> Event {
        let has = |fault| self.faults.contains(&fault);
        let (parks, reuses, loses) = (has(Fault::Park), has(Fault::ReuseIds), has(Fault::Lose));
        let (hangs_up, changes_flags) = (has(Fault::HangUp), has(Fault::Flags));
        let env = &mut self.env;
        let uid = env.next_uid;
        env.next_uid += 1;
        let mut event = Event {
            uid,
            id: format!("e{uid}"),
            topic: env.rng.usize(..TOPICS),
            fate: Fate::Publish,
            is_large: false,
            ends: None,
            is_mystery: false,
            is_wide: changes_flags && uid % 3 == 1,
            reuses_id: false,
            position: Position::default(),
            committed: env.now,
        };
        if parks && env.one_in(6) {
            match env.rng.bool() {
                true => event.is_large = true,
                false => (event.topic, event.fate) = (PARKED, Fate::Park),
            }
        } else if loses && env.one_in(10) {
            event.fate = Fate::Lose;
        }
        if hangs_up && event.topic != PARKED && event.fate == Fate::Publish && env.one_in(12) {
            // of two in a row that are put aside in doubt, the second is a halt
            let is_doubtful = !std::mem::replace(&mut env.was_doubtful, true);
            match (is_doubtful, uid % 2) {
                (true, 0) => event.is_mystery = true,
                (true, _) => event.ends = Some(EndedBy::Silence),
                (false, _) => event.ends = Some(EndedBy::Complaint),
            }
        }
        if reuses && uid > 0 && env.one_in(8) {
            let other = uid - env.rng.u64(1..=uid.min(5));
            if let Some(story) = env.stories.get(&other) {
                event.id = story.event.id.clone();
                event.reuses_id = true;
            }
        }
        event
    }
}

/// The server takes what came from a relay, and answers.
pub fn serve(env: &mut Env, relay: &mut Relay) -> Result<(), End> {
    for _ in 0..env.rng.usize(..8) {
        let flight = match relay.out.pop_front() {
            Some(Wire::Publish(flight)) => *flight,
            Some(Wire::Ping) => {
                relay.pongs += 1;
                continue;
            }
            None => break,
        };
        if let Some(by) = env.ends_over(&flight) {
            trace!(env, "the server ends the connection over {}", flight.id);
            relay.out.clear();
            if env.rng.bool() {
                relay.answers.clear();
            }
            relay.ended = Some(by);
            break;
        }
        let refuses = match env.one_in(60) {
            true => env.rng.usize(..4),
            false => 9,
        };
        let story = env.stories.get(&flight.uid);
        let is_mystery = story.is_some_and(|it| it.event.is_mystery) && flight.topic != PARKED;
        let swallowed = env.swallow(&flight);
        let answer = match refuses {
            _ if let Some(answer) = swallowed => answer,
            _ if is_mystery => Err(refused(400, 19999, "nobody knows")),
            0 => Err(AckError::NoResponders),
            1 => Err(refused(503, 10077, "no space left on device")),
            2 => Err(refused(429, 10167, "too many requests")),
            _ => match env.arrive(&flight, relay.zombie_since.is_some())? {
                Some(answer) => answer,
                None => continue,
            },
        };
        let answer = match env.one_in(150) {
            true => {
                let seq = env.rng.u64(1..1_000) + 100_000;
                trace!(env, "another answers {} with {seq}", flight.id);
                env.was_misled = true;
                answer.map(|(ack, origin)| (PubAck { seq, ..ack }, origin))
            }
            false => answer,
        };
        let answer = env.without_rule(&flight, answer);
        if env.one_in(150) {
            trace!(env, "the answer to {} is lost", flight.id);
            continue;
        }
        let home = env
            .streams
            .iter()
            .find(|it| it.topics.contains(&flight.topic));
        let overtakes =
            answer.is_err() && home.is_some_and(|it| it.is_replicated) && env.rng.bool();
        match overtakes {
            true => relay.answers.push_front((flight.reply, answer)),
            false => relay.answers.push_back((flight.reply, answer)),
        }
    }
    while env.rng.u32(..3) > 0
        && let Some(write) = relay.writes.pop_front()
    {
        if env.is_key_down() {
            if env.rng.bool() {
                relay
                    .written
                    .push_back((write.number, Err(AckError::NoResponders)));
            }
            continue;
        }
        let answer = env.put(&write, !env.is_off(Rule::Revision));
        trace!(
            env,
            "relay {} record {}: {answer:?} {}",
            relay.name,
            write.number,
            String::from_utf8_lossy(&write.body)
        );
        if !env.one_in(40) {
            relay.written.push_back((write.number, answer));
        }
    }
    Ok(())
}
