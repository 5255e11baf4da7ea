//! Every decision of the publishing side: what to publish next, what an answer means, what may be
//! confirmed, when to read the streams back, when to halt. Pure: no socket, clock or thread; time comes in.
//!
//! The core holds the *window*: the changes that Postgres sent and that are not settled yet, in order.
//! Entries before `unsent` were handed to the connection or found stored; the front leaves once it is
//! settled. A connection that answers anything unexpected is thrown away by the caller, which then reads
//! the streams' tails and calls [`Core::connected`]: from there the window is walked again, and each event
//! is published or found stored.

pub mod memory;
mod stream;

use super::confirm::{Confirm, Confirmable};
use crate::jetstream::Delivery;
use crate::jetstream::ack::{AckError, AckErrorKind, PubAck};
use crate::jetstream::chain::{AnswerFor, Broken};
use crate::jetstream::resume::{Checkpoint, Tail, Verdict};
use crate::jetstream::streams::Routes;
use crate::jetstream::wire::{self, Publish};
use crate::outbox::batch::{Batch, Change, Event, Fate, OutboxEvent};
use crate::outbox::position::{Position, Source, SourcePosition};
use crate::postgres::Lsn;
use memory::{Marks, Memory, Remembered};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stream::Stream;

/// So many changes behind an event whose id was used before go one at a time: where one id is used twice, more often
/// are, and a connection is lost with what is on its way behind each. Near the server this
/// many take about as long as a new connection.
const CAREFUL_FOR: u64 = 128;

/// The bounds of the window.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Events that wait for their ack.
    pub inflight: usize,
    /// Bytes of such events; one event may be larger.
    pub inflight_bytes: usize,
    /// The names for the answers of one stream's publishes, which they use in turn. Few, since a server works out
    /// anew where a name leads that it has not seen lately. Under one name several may wait; where it is then open whom
    /// an answer is about, they are published again with a name each.
    pub replies: u64,
    /// So long may the oldest publish that waits go without an answer.
    pub ack_timeout: Duration,
    /// See [`Confirm`].
    pub hold_back: Duration,
}

/// What to do next.
#[derive(Debug)]
pub enum Next {
    /// Publish this; the answer goes to [`Core::answer`].
    Publish(Publish),
    /// Look at what stands at `seq` of `stream`, then call [`Core::looked_up`]. No publish waits for its answer meanwhile.
    Lookup {
        /// The stream's name.
        stream: String,
        /// Its sequence.
        seq: u64,
        /// To be handed back.
        token: u64,
    },
    /// The event is larger than the server takes: call [`Core::replace`] or [`Core::give_up`], or halt.
    TooLarge {
        /// Names the event.
        token: u64,
        /// Its size as the server counts it.
        size: usize,
        /// What may go.
        limit: usize,
        /// The setting that says so.
        setting: &'static str,
    },
    /// Nothing now: the window is full or empty, or what comes next waits for the answers that are due.
    Nothing,
}

/// The connection, the copy stream or the whole relay cannot go on as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Throw the connection to NATS away, connect, read the tails.
    Reconnect(Cause),
    /// The same; and the stream will never take the event under this token as it is.
    Refused {
        /// Names the event.
        token: u64,
        /// What the stream says.
        error: AckError,
    },
    /// A stream has lost what it acknowledged: start the copy stream anew from the slot, which still has it.
    Backwards(Backwards),
    /// It cannot be repaired.
    Halt(Halt),
}

/// Why a connection's window ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An ack that was not the predicted one.
    Broken(Broken),
    /// Refused by the stream.
    Refused(AckError),
    /// The oldest event that waits was not acknowledged within the ack timeout.
    AckTimeout,
    /// No stream captures this subject.
    NoStream(String),
    /// An idle stream seems to end before what it had acknowledged: a closer look will tell.
    EndsEarly(Backwards),
}

/// A stream that ends before what it had acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backwards {
    /// The stream's name.
    pub stream: String,
    /// Where it ends now.
    pub last_seq: u64,
    /// What it had acknowledged.
    pub acked_seq: u64,
}

/// What cannot be repaired without a person's decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// Another event stands at this position: the stream was written from another history.
    IdMismatch {
        /// The stream's name.
        stream: String,
        /// The position both claim.
        position: Position,
        /// The id that Postgres has there.
        id: String,
        /// The id that the stream has there.
        stored_id: String,
    },
    /// The stream lost events that the slot has been told to forget.
    LostBeyondSlot(Backwards),
    /// The stream was deleted and made anew since events were stored in it.
    Recreated {
        /// The stream's name.
        stream: String,
    },
}

/// A stream as it was read at connect.
#[derive(Clone, Debug)]
pub struct StreamAtConnect {
    /// Its name.
    pub name: String,
    /// When it was created; empty if the server does not say.
    pub created: String,
    /// Copies in the cluster. Only an unreplicated stream can be told the expected last message's id: in
    /// a replicated one a single mismatch ends the stream for good (nats-server 2.14).
    pub replicas: u32,
    /// The last sequence it stored ever.
    pub last_seq: u64,
    /// What it holds of ours.
    pub tail: Tail,
    /// The last event of ours that is older than the hold-back, by the stream's own time.
    pub aged: Option<Position>,
    /// A message under our subjects that is younger stands there.
    pub has_young: bool,
    /// What is gone from here on was deleted or lost, and not consumed; `None`: that cannot be told.
    pub keeps_from: Option<u64>,
}

/// Counters since the core was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Events stored by us.
    pub published: u64,
    /// Bytes of their bodies.
    pub published_bytes: u64,
    /// Events found in the stream on resume.
    pub skipped: u64,
    /// Events dropped because an earlier event had used their id.
    pub dropped: u64,
    /// Of the published, those that were parked.
    pub parked: u64,
    /// Events given up.
    pub lost: u64,
    /// Events published behind later ones, because somebody else's message had let those pass.
    pub late: u64,
}

#[derive(Debug)]
enum Entry {
    Event(Pending),
    Boundary(Lsn),
}

#[derive(Debug)]
struct Pending {
    event: Event,
    state: State,
    /// The server called it a duplicate of what stands at this sequence.
    suspect: Option<u64>,
    /// It stands in the tally.
    counted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unsent,
    Sent {
        stream: usize,
        expected: u64,
    },
    Stored {
        stream: Option<usize>,
        seq: u64,
        at: Option<Instant>,
    },
}

/// The state machine. See the module.
#[derive(Debug)]
pub struct Core {
    delivery: Delivery,
    limits: Limits,
    /// See [`Memory`].
    source: Option<Source>,
    connected: bool,
    routes: Routes,
    /// Which of `streams` each route leads to.
    routed: Vec<usize>,
    streams: Vec<Stream>,
    window: VecDeque<Entry>,
    first_token: u64,
    unsent: usize,
    /// Events and bytes of `window[..unsent]`.
    held: usize,
    held_bytes: usize,
    waiting: usize,
    waiting_since: Option<Instant>,
    /// Up to this token each publish that waits has a name of its own for its answer.
    named_until: u64,
    /// Up to this token one publish goes at a time.
    careful_until: u64,
    /// The event whose publish was called a duplicate on this connection, which goes on.
    doubted: Option<u64>,
    subjects: HashSet<Box<str>>,
    /// What was published last is parked: nothing goes before it is acknowledged, as it did not go before all else was.
    /// Between two streams there is no other order, and which of them an event belongs to may only be known
    /// once one has refused it: it must not be found behind a tail by then.
    parking: bool,
    max_payload: usize,
    position_source_len: usize,
    puts_aside: bool,
    offered: Position,
    /// No event behind this was ever published; nor, behind the other, over an earlier connection.
    sent: Position,
    sent_before: Position,
    /// Nothing is, or will be, on its way: see [`Mark::at_rest`](memory::Mark::at_rest).
    at_rest: bool,
    start: Lsn,
    /// Up to here everything is known to be stored and old enough; told once it was received. 0/0: nothing is.
    proven: Lsn,
    /// See [`Marks`].
    reached: Lsn,
    settled: Lsn,
    /// Confirmed is what the checkpoint has held for the hold-back; without one, what was acknowledged so long ago.
    checkpoint: bool,
    /// What the checkpoint holds of `settled`.
    kept: Lsn,
    youngest: Option<Instant>,
    confirm: Confirm,
    tally: Tally,
}

/// A message with the event's id, but at another position.
fn is_another(event: &OutboxEvent<'_>, (id, position): (&str, Option<&SourcePosition>)) -> bool {
    id == event.id && position.is_none_or(|at| at.position != event.position)
}

impl Core {
    /// A core for one copy stream, with what is remembered of the streams.
    pub fn new(delivery: Delivery, limits: Limits, memory: Memory) -> Core {
        Core {
            delivery,
            limits,
            source: memory.source,
            connected: false,
            routes: Routes::default(),
            routed: Vec::new(),
            streams: memory.streams.into_iter().map(Stream::new).collect(),
            window: VecDeque::new(),
            first_token: 0,
            unsent: 0,
            held: 0,
            held_bytes: 0,
            waiting: 0,
            waiting_since: None,
            named_until: 0,
            careful_until: 0,
            doubted: None,
            subjects: HashSet::new(),
            parking: false,
            max_payload: usize::MAX,
            position_source_len: 0,
            puts_aside: false,
            offered: Position::default(),
            sent: Position::default(),
            sent_before: Position::default(),
            at_rest: false,
            start: Lsn::INVALID,
            proven: Lsn::INVALID,
            reached: memory.reached,
            settled: Lsn::INVALID,
            checkpoint: false,
            kept: Lsn::INVALID,
            youngest: None,
            confirm: Confirm::new(limits.hold_back),
            tally: Tally::default(),
        }
    }

    /// Every event that was ever published is settled.
    fn nothing_is_out(&self) -> bool {
        let first = self.window.iter().find_map(|entry| match entry {
            Entry::Event(pending) => Some(pending.event.position()),
            Entry::Boundary(_) => None,
        });
        let has_come = self.offered >= self.sent || self.settled >= self.sent.commit_lsn;
        first.map_or(has_come, |position| position > self.sent)
    }

    /// What the next session has to know.
    pub fn into_memory(mut self) -> Memory {
        self.disconnected();
        Memory {
            source: self.source,
            streams: self.streams.into_iter().map(Stream::remember).collect(),
            reached: self.reached,
        }
    }

    /// What is worth keeping over a restart.
    pub fn marks(&self, source: &Source) -> Marks {
        let streams = self.streams.iter();
        Marks {
            streams: streams
                .map(|stream| stream.mark(source, self.at_rest))
                .collect(),
            reached: Some(SourcePosition {
                source: source.clone(),
                position: Position {
                    commit_lsn: self.reached,
                    ordinal: 0,
                },
            }),
            settled: self.settled,
        }
    }

    /// The last event known to stand in a stream: from there its tail is searched.
    pub fn last_known(&self, stream: &str) -> Option<&Checkpoint> {
        self.streams
            .iter()
            .find(|s| s.name == stream)?
            .last
            .as_ref()
    }

    /// Each stream's name, and the highest sequence that it has acknowledged or was seen to have.
    pub fn stream_ends(&self) -> impl Iterator<Item = (&str, u64)> {
        let streams = self.streams.iter();
        streams.map(|stream| (stream.name.as_str(), stream.acked_seq))
    }

    /// What a stream has acknowledged.
    pub fn acked_seq(&self, stream: &str) -> u64 {
        let found = self.streams.iter().find(|known| known.name == stream);
        found.map_or(0, |known| known.acked_seq)
    }

    /// A new connection, and what the streams that capture the prefix hold, in the order of `routes`.
    pub fn connected(
        &mut self,
        routes: Routes,
        streams: Vec<StreamAtConnect>,
        now: Instant,
    ) -> Result<(), Trouble> {
        self.disconnected();
        self.routed.clear();
        for found in streams {
            let index = self.stream_index(&found.name);
            let Some(stream) = self.streams.get_mut(index) else {
                continue;
            };
            if stream.created.is_empty() {
                stream.created.clone_from(&found.created);
            } else if stream.created != found.created {
                return Err(Trouble::Halt(Halt::Recreated { stream: found.name }));
            }
            // what it has lost it may still count
            let end = match &found.tail {
                Tail {
                    stored: Some(stored),
                    lost: 1..,
                    ..
                } => stored.seq,
                _ => found.last_seq,
            };
            self.check_forwards(index, end)?;
            if let Some(stream) = self.streams.get_mut(index) {
                stream.is_read(found, self.delivery, now);
            }
            self.routed.push(index);
        }
        self.routes = routes;
        self.connected = true;
        self.sent_before = self.sent;
        Ok(())
    }

    /// What the server of the new connection takes, and the length of what begins the position header. `puts_aside`: what
    /// is too large is replaced or given up, and does not halt the relay.
    pub fn takes(&mut self, max_payload: usize, position_source_len: usize, puts_aside: bool) {
        (self.max_payload, self.position_source_len) = (max_payload, position_source_len);
        self.puts_aside = puts_aside;
    }

    /// How many bytes of id, headers and body may go to `subject`.
    pub fn room(&self, subject: &str) -> usize {
        wire::room(self.limit(subject).0, self.position_source_len)
    }

    /// The largest message that may go to `subject`, and the setting that says so.
    fn limit(&self, subject: &str) -> (usize, &'static str) {
        match self.routes.max_msg_size(subject) {
            Some(of_stream) if of_stream <= self.max_payload => {
                (of_stream, "max_msg_size of the stream")
            }
            _ => (self.max_payload, "max_payload of the server"),
        }
    }

    /// The event that waits under this token.
    pub fn event(&self, token: u64) -> Option<OutboxEvent<'_>> {
        let index = token.checked_sub(self.first_token)? as usize;
        match self.window.get(index)? {
            Entry::Event(pending) => Some(pending.event.view()),
            Entry::Boundary(_) => None,
        }
    }

    /// Another form of the event under this token, at its position, is to be published in its place. Only of one
    /// that is not on its way.
    pub fn replace(&mut self, token: u64, event: Event) {
        self.put(token, |pending| {
            assert_eq!(event.position(), pending.event.position());
            pending.event = event;
        });
    }

    /// The event under this token is not published at all. Only of one that is not on its way.
    pub fn give_up(&mut self, token: u64) {
        self.put(token, |pending| pending.event.give_up());
    }

    fn put(&mut self, token: u64, change: impl FnOnce(&mut Pending)) {
        let index = token.checked_sub(self.first_token);
        let entry = index.and_then(|index| self.window.get_mut(index as usize));
        if let Some(Entry::Event(pending)) = entry {
            assert_eq!(
                pending.state,
                State::Unsent,
                "its answer would count for another"
            );
            change(pending);
        }
    }

    /// The connection is gone. What is not settled will be asked of the streams, also what was acknowledged: where
    /// messages are consumed away, each event must answer for one sequence.
    pub fn disconnected(&mut self) {
        if std::mem::take(&mut self.connected) && self.nothing_is_out() {
            for stream in &mut self.streams {
                stream.at_rest = true;
            }
        }
        for entry in self.window.iter_mut().take(self.unsent) {
            if let Entry::Event(event) = entry {
                match event.state {
                    State::Sent { .. } => event.state = State::Unsent,
                    State::Stored {
                        stream: Some(_), ..
                    } => {
                        event.state = State::Unsent;
                        event.counted = true;
                    }
                    State::Stored { stream: None, .. } | State::Unsent => {}
                }
            }
        }
        (self.unsent, self.held, self.held_bytes, self.waiting) = (0, 0, 0, 0);
        self.waiting_since = None;
        self.subjects.clear();
        self.parking = false;
        self.doubted = None;
    }

    /// Another batch is wanted: everything that came so far was handed on.
    pub fn wants_batch(&self) -> bool {
        self.connected && self.unsent == self.window.len() && self.has_room(0)
    }

    /// There is a checkpoint. It has held `ripe` for the hold-back already.
    pub fn has_checkpoint(&mut self, ripe: Option<Lsn>) {
        self.checkpoint = true;
        self.proven = ripe.unwrap_or_default();
    }

    /// So far this slot was settled by a relay before, or beside, this one: see [`Marks::reached`].
    pub fn has_reached(&mut self, lsn: Lsn) {
        self.reached = self.reached.max(lsn);
    }

    /// The checkpoint can no longer be written. What it was to hold next may have been acknowledged only now.
    pub fn has_no_checkpoint(&mut self, now: Instant) {
        if std::mem::take(&mut self.checkpoint) {
            self.youngest = Some(now);
        }
    }

    /// The checkpoint holds `marks` now.
    pub fn kept(&mut self, marks: &Marks, now: Instant) {
        self.kept = marks.settled;
        if self.checkpoint && self.kept > Lsn::INVALID {
            let sequences = marks.streams.iter().map(|mark| mark.settled_seq);
            self.confirm.boundary(self.kept, Some(now), sequences);
        }
    }

    /// The server has lost what the checkpoint held: whatever waits to be confirmed waits until it holds it again, and
    /// grows old from then on.
    pub fn checkpoint_went_back(&mut self) {
        self.confirm.forget_young();
        self.kept = Lsn::INVALID;
    }

    /// The log ended at `lsn` when this session had got the slot: whoever published before, published nothing beyond.
    pub fn log_ended_at(&mut self, lsn: Lsn) {
        let commit_lsn = lsn;
        self.sent = self.sent.max(Position {
            commit_lsn,
            ordinal: 0,
        });
        self.sent_before = self.sent;
    }

    /// Nothing more will be published: [`Core::marks`] says from now on whether everything that was is settled.
    pub fn rest(&mut self) {
        self.at_rest = self.nothing_is_out();
    }

    /// Where the copy stream starts, once connected. What Postgres skips before it is stored, but perhaps
    /// not for the hold-back: a keepalive from in there confirms nothing, and what comes next waits if
    /// any stream may hold something skipped that is too young.
    pub fn starts_at(&mut self, start: Lsn, now: Instant) {
        self.start = start;
        let mut aged = self
            .routed
            .iter()
            .filter_map(|i| self.streams.get(*i)?.aged);
        let old =
            self.routed.len() == aged.clone().count() && aged.all(|aged| aged.commit_lsn >= start);
        if start > Lsn::INVALID && !old {
            self.youngest = Some(now);
        }
        if !self.checkpoint {
            let aged = self.routed.iter().map(|i| {
                let aged = self.streams.get(*i).and_then(|stream| stream.aged);
                aged.map_or(Lsn::INVALID, |aged| aged.commit_lsn)
            });
            self.proven = aged.min().unwrap_or_default();
        } else if let Some(aged) = self.aged_at_most() {
            self.proven = self.proven.min(aged);
        }
    }

    /// Up to where every event is old enough, where a stream's end shows that not all are. The checkpoint may have lost
    /// that what it says ripens was lost and published again.
    fn aged_at_most(&self) -> Option<Lsn> {
        let streams = self.routed.iter().filter_map(|i| self.streams.get(*i));
        let aged = streams.filter_map(|stream| {
            // one that is consumed away, and one whose events may be younger than their positions tell, show nothing
            let end = stream.tail.stored.as_ref()?;
            let shows = stream.has_young && !(stream.shared && stream.replicas > 1);
            let aged = stream.aged.unwrap_or_default();
            (shows && aged < end.position).then_some(aged.commit_lsn)
        });
        aged.min()
    }

    /// Takes the next changes of the copy stream.
    pub fn offer(&mut self, batch: Arc<Batch>) {
        for (index, change) in batch.changes().iter().enumerate() {
            let entry = match *change {
                Change::Event(spans) => {
                    assert!(
                        spans.position > self.offered,
                        "Postgres sends transactions in commit order"
                    );
                    self.offered = spans.position;
                    let event = Event::new(&batch, index).expect("the change is an event");
                    Entry::Event(Pending {
                        event,
                        state: State::Unsent,
                        suspect: None,
                        counted: false,
                    })
                }
                Change::Commit { end_lsn, .. } => {
                    self.prove(end_lsn);
                    Entry::Boundary(end_lsn)
                }
                Change::Keepalive { wal_end } => {
                    self.prove(wal_end);
                    if wal_end < self.start {
                        continue;
                    }
                    Entry::Boundary(wal_end)
                }
            };
            if let (Some(Entry::Boundary(last)), Entry::Boundary(lsn)) =
                (self.window.back_mut(), &entry)
            {
                // an idle stream's keepalives must not pile up behind what waits
                *last = (*last).max(*lsn);
                continue;
            }
            self.window.push_back(entry);
        }
        if self.unsent == 0 {
            self.settle();
        }
    }

    /// The next thing to do; to be called until it says [`Next::Nothing`].
    pub fn next(&mut self, now: Instant) -> Result<Next, Trouble> {
        while self.connected {
            if self.parking && self.waiting > 0 {
                break;
            }
            self.parking = false;
            let token = self.first_token + self.unsent as u64;
            let Some(entry) = self.window.get(self.unsent) else {
                break;
            };
            let Entry::Event(pending) = entry else {
                self.unsent += 1;
                self.settle();
                continue;
            };
            let event = &pending.event;
            let spans = event.spans();
            let (position, size) = (spans.position, spans.size());
            if !self.has_room(size) {
                break;
            }
            if matches!(pending.state, State::Stored { .. }) {
                self.hold(size);
                continue;
            }
            if event.fate() == Fate::Lose {
                self.tally.lost += u64::from(!pending.counted);
                let state = State::Stored {
                    stream: None,
                    seq: 0,
                    at: None,
                };
                self.set_state(self.unsent, state);
                self.hold(size);
                continue;
            }
            let subject = event.subject();
            let (limit, setting) = self.limit(subject);
            let too_large = |expected: Option<u64>, last_id_len: Option<usize>| {
                let size = wire::size(spans, expected, last_id_len, self.position_source_len);
                (size > limit).then_some(Next::TooLarge {
                    token,
                    size,
                    limit,
                    setting,
                })
            };
            let next = match self.delivery {
                Delivery::AtLeastOnce => {
                    if self.subjects.contains(subject) {
                        break;
                    }
                    if let Some(too_large) = too_large(None, None) {
                        return Ok(too_large);
                    }
                    self.subjects.insert(subject.into());
                    State::Sent {
                        stream: 0,
                        expected: 0,
                    }
                }
                Delivery::ExactlyOnce => {
                    if event.fate() == Fate::Park && self.waiting > 0 {
                        break;
                    }
                    // what fits nowhere in this stream is not in it, wherever its tail is
                    if self.puts_aside
                        && let Some(too_large) = too_large(Some(0), None)
                    {
                        return Ok(too_large);
                    }
                    let routed = self
                        .routes
                        .route(subject)
                        .and_then(|route| self.routed.get(route));
                    let Some((index, stream)) =
                        routed.and_then(|i| Some((*i, self.streams.get_mut(*i)?)))
                    else {
                        return Err(Trouble::Reconnect(Cause::NoStream(subject.to_string())));
                    };
                    if !stream.has_room(now) {
                        break;
                    }
                    let id = event.id();
                    if stream.tail.consumed > 0 && position > self.sent {
                        stream.leave_out_what_is_gone();
                    }
                    match stream.tail.verdict(position, id) {
                        Verdict::IdMismatch => {
                            return Err(Trouble::Halt(Halt::IdMismatch {
                                stream: stream.name.clone(),
                                position,
                                id: id.to_string(),
                                stored_id: stream
                                    .tail
                                    .stored
                                    .as_ref()
                                    .and_then(|t| t.id.clone())
                                    .unwrap_or_default(),
                            }));
                        }
                        Verdict::Stored(seq) => {
                            self.tally.skipped += u64::from(!pending.counted);
                            if let Some(stored) = &stream.tail.stored
                                && stored.position == position
                                && stream.tail.between.is_none()
                            {
                                // one that was consumed away is counted once, also after a reconnect
                                let known = stream.last.as_ref().map_or(0, |last| last.seq);
                                stream.last = Some(Checkpoint {
                                    seq: stored.seq.max(known),
                                    ..stored.clone()
                                });
                            }
                            let aged = stream.aged.is_some_and(|aged| position <= aged);
                            State::Stored {
                                stream: Some(index),
                                seq: seq.unwrap_or(0),
                                at: (!aged).then_some(now),
                            }
                        }
                        Verdict::Publish | Verdict::Missing => match pending.suspect {
                            Some(_) if self.waiting > 0 => break,
                            Some(seq) => {
                                return Ok(Next::Lookup {
                                    stream: stream.name.clone(),
                                    seq,
                                    token,
                                });
                            }
                            None => {
                                let expected = stream.chain.predicted();
                                let last_id_len = stream.last_id_len();
                                if let Some(too_large) = too_large(Some(expected), last_id_len) {
                                    return Ok(too_large);
                                }
                                if stream.replicas > 1 && stream.chain.is_settled() {
                                    // should it be refused, that must be known of it for sure
                                    self.named_until = self.named_until.max(token + 1);
                                }
                                stream.at_rest = false;
                                State::Sent {
                                    stream: index,
                                    expected: stream.chain.extend(token),
                                }
                            }
                        },
                    }
                }
            };
            let publish = match next {
                State::Sent { stream, expected } => Some(Publish {
                    event: event.clone(),
                    token,
                    reply: match self.delivery {
                        Delivery::AtLeastOnce => token,
                        Delivery::ExactlyOnce => {
                            let replies = self.limits.replies;
                            stream as u64 * replies + expected % replies
                        }
                    },
                    expected_last_sequence: (self.delivery == Delivery::ExactlyOnce)
                        .then_some(expected),
                    expected_last: self.streams.get_mut(stream).and_then(|stream| {
                        (stream.replicas == 1).then(|| stream.previous.replace(event.clone()))?
                    }),
                }),
                _ => None,
            };
            self.set_state(self.unsent, next);
            self.hold(size);
            if let Some(publish) = publish {
                self.parking = publish.event.fate() == Fate::Park;
                self.sent = self.sent.max(position);
                self.waiting += 1;
                self.waiting_since.get_or_insert(now);
                return Ok(Next::Publish(publish));
            }
        }
        Ok(Next::Nothing)
    }

    /// The answer to a publish of this connection, by its name. Returns the token of the event that is stored by it.
    pub fn answer(
        &mut self,
        reply: u64,
        answer: Result<PubAck, AckError>,
        now: Instant,
    ) -> Result<Option<u64>, Trouble> {
        let found = match self.delivery {
            Delivery::AtLeastOnce => Some(AnswerFor::One(reply)),
            Delivery::ExactlyOnce => {
                let replies = self.limits.replies;
                let stream = self.streams.get((reply / replies) as usize);
                stream.and_then(|stream| {
                    let ack = answer.as_ref().ok();
                    stream.chain.answer_for(reply % replies, replies, ack)
                })
            }
        };
        let (token, is_sure) = match found {
            None => return Ok(None),
            Some(AnswerFor::One(token)) => (token, true),
            Some(AnswerFor::OneOf(token)) => (token, false),
        };
        if !is_sure {
            // it is trouble, whichever it is for
            self.named_until = self.first_token + self.unsent as u64;
        }
        let index = token
            .checked_sub(self.first_token)
            .map(|index| index as usize);
        let Some((index, Entry::Event(pending))) =
            index.and_then(|i| Some((i, self.window.get_mut(i)?)))
        else {
            return Ok(None);
        };
        let State::Sent { stream, expected } = pending.state else {
            return Ok(None);
        };
        if let Err(error) = &answer
            && let AckErrorKind::WrongLastSequence(Some(last_seq)) = error.kind()
            && last_seq > expected
            && pending.event.position() > self.sent_before
            && let Some(stream) = self.streams.get_mut(stream)
            // a replicated stream refuses before it acknowledges what came earlier
            && (is_sure || stream.replicas <= 1)
            && stream.chain.is_oldest(token)
        {
            // no late copy can have taken its place
            stream.has_met_others(now);
        }
        let ack = answer.map_err(|error| match is_sure && error.kind().is_for_good() {
            true => Trouble::Refused { token, error },
            false => Trouble::Reconnect(Cause::Refused(error)),
        })?;
        let stored = match self.delivery {
            Delivery::AtLeastOnce => {
                // a duplicate is stored too, unless it is the false answer that names no sequence
                if ack.seq == 0 {
                    return Err(Trouble::Reconnect(Cause::Broken(Broken::Duplicate {
                        seq: 0,
                    })));
                }
                self.subjects.remove(pending.event.subject());
                State::Stored {
                    stream: None,
                    seq: ack.seq,
                    at: Some(now),
                }
            }
            Delivery::ExactlyOnce => {
                let Some(stream_state) = self.streams.get_mut(stream) else {
                    return Ok(None);
                };
                if let Err(broken) = stream_state.chain.accept(expected, &ack) {
                    if let Broken::Duplicate { seq: 1.. } = broken
                        && is_sure
                    {
                        pending.suspect = Some(ack.seq);
                        self.careful_until = token + CAREFUL_FOR;
                        if self.waiting == 1 && stream_state.chain.retract() {
                            stream_state.previous = None;
                            self.doubt(index, token);
                            return Ok(None);
                        }
                    }
                    return Err(Trouble::Reconnect(Cause::Broken(broken)));
                }
                stream_state.acked_seq = stream_state.acked_seq.max(ack.seq);
                if stream_state.tail.is_before_end(pending.event.position()) {
                    self.tally.late += 1;
                }
                State::Stored {
                    stream: Some(stream),
                    seq: ack.seq,
                    at: Some(now),
                }
            }
        };
        self.tally.published += 1;
        self.tally.published_bytes += pending.event.spans().body_len() as u64;
        self.tally.parked += u64::from(pending.event.fate() == Fate::Park);
        pending.state = stored;
        self.waiting -= 1;
        if self.waiting == 0 {
            self.waiting_since = None;
        }
        if index == 0 {
            // the oldest: what another stream acknowledges says nothing of this one
            self.waiting_since = (self.waiting > 0).then_some(now);
            self.settle();
        }
        Ok(Some(token))
    }

    /// Nothing is on its way but this event, and it was not stored: the window goes on from it once it is looked up.
    fn doubt(&mut self, index: usize, token: u64) {
        for entry in self.window.range(index..self.unsent) {
            if let Entry::Event(pending) = entry {
                self.held -= 1;
                self.held_bytes -= pending.event.spans().size();
            }
        }
        self.set_state(index, State::Unsent);
        self.unsent = index;
        self.doubted = Some(token);
        (self.waiting, self.waiting_since) = (0, None);
    }

    /// What a [`Next::Lookup`] found: the message's id and position, `None` if there is no such message.
    /// Returns the id of the event if it is dropped.
    ///
    /// Whatever it is but another message with the same id, the stream's tail has to tell: on a new connection it has been
    /// read.
    pub fn looked_up(
        &mut self,
        token: u64,
        found: Option<(&str, Option<&SourcePosition>)>,
        now: Instant,
    ) -> Result<Option<String>, Trouble> {
        if self.doubted.take() == Some(token)
            && let Some(seq) = self.left_open(token, found)
        {
            let duplicate = Broken::Duplicate { seq };
            return Err(Trouble::Reconnect(Cause::Broken(duplicate)));
        }
        Ok(self.judge(token, found, now))
    }

    /// What the event is suspected to repeat, unless that is another one with its id, or was gone when the tail was read.
    fn left_open(&self, token: u64, found: Option<(&str, Option<&SourcePosition>)>) -> Option<u64> {
        let index = token.checked_sub(self.first_token)? as usize;
        let Entry::Event(pending) = self.window.get(index)? else {
            return None;
        };
        let event = pending.event.view();
        let seq = pending.suspect?;
        let is_told = match found {
            Some(found) => is_another(&event, found),
            None => self.home(event.subject).is_some_and(|stream| {
                seq <= stream.read_to.min(stream.chain.acked()) && !stream.keeps(seq)
            }),
        };
        (!is_told).then_some(seq)
    }

    /// The stream that captures a subject.
    fn home(&self, subject: &str) -> Option<&Stream> {
        let index = *self.routed.get(self.routes.route(subject)?)?;
        self.streams.get(index)
    }

    /// A message that is gone was consumed meanwhile. Behind everything that is known of the stream, it can
    /// only have been this very event. Where none is consumed it was deleted, this event or another with its id: it goes
    /// again, until JetStream has forgotten the id and takes it.
    fn judge(
        &mut self,
        token: u64,
        found: Option<(&str, Option<&SourcePosition>)>,
        now: Instant,
    ) -> Option<String> {
        let index = token.checked_sub(self.first_token)? as usize;
        let Some(Entry::Event(pending)) = self.window.get_mut(index) else {
            return None;
        };
        let seq = pending.suspect.take()?;
        let event = pending.event.view();
        match found {
            // the same position would be this very event, and the tail, read again, says so
            Some(found) if !is_another(&event, found) => return None,
            Some(_) => {}
            None => {
                let route = self.routes.route(event.subject);
                let index = route.and_then(|route| self.routed.get(route).copied());
                let stream = index.and_then(|index| self.streams.get(index))?;
                if seq > stream.chain.acked() || stream.keeps(seq) {
                    // not consumed: somebody took it, or the stream went backwards
                    return None;
                }
                if stream.last.as_ref().is_none_or(|last| last.seq < seq) {
                    self.tally.skipped += 1;
                    pending.state = State::Stored {
                        stream: index,
                        seq,
                        at: Some(now),
                    };
                    return None;
                }
            }
        }
        let dropped = event.id.to_string();
        pending.state = State::Stored {
            stream: None,
            seq: 0,
            at: None,
        };
        self.tally.dropped += 1;
        Some(dropped)
    }

    /// What a look at one of the [`idle_streams`](Core::idle_streams) says.
    pub fn looked_at(&mut self, index: usize, last_seq: u64, now: Instant) -> Result<(), Trouble> {
        let nothing_is_out = self.nothing_is_out();
        let stream = self.streams.get_mut(index);
        let Some(stream) = stream.filter(|_| self.delivery == Delivery::ExactlyOnce) else {
            return Ok(());
        };
        let acked_seq = stream.asked_at.take().unwrap_or_default();
        if last_seq >= acked_seq {
            let is_ours = !nothing_is_out || !self.routed.contains(&index);
            let seen = stream.chain.acked().max(stream.read_to);
            if self.connected && !is_ours && last_seq > seen {
                stream.read_to = last_seq;
                stream.has_met_others(now);
            }
            return Ok(());
        }
        Err(Trouble::Reconnect(Cause::EndsEarly(Backwards {
            stream: stream.name.clone(),
            last_seq,
            acked_seq,
        })))
    }

    /// The streams that no publish is on its way to, which are to be asked now where they end, for [`Core::looked_at`].
    pub fn idle_streams(&mut self) -> impl Iterator<Item = (usize, &str)> {
        let all = self.streams.iter_mut().enumerate();
        all.filter(|(_, stream)| stream.chain.is_settled())
            .map(|(index, stream)| {
                stream.asked_at.get_or_insert(stream.acked_seq);
                (index, stream.name.as_str())
            })
    }

    /// When [`Core::tick`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.waiting_since
            .map(|since| since + self.limits.ack_timeout)
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant) -> Result<(), Trouble> {
        match self.deadline() {
            Some(deadline) if now >= deadline => Err(Trouble::Reconnect(Cause::AckTimeout)),
            _ => Ok(()),
        }
    }

    /// The LSN that may be confirmed at `now`. While there is no connection nothing grows old enough: what was acknowledged may
    /// be lost with the server, and only the next look at the streams tells.
    pub fn confirmable(&mut self, now: Instant) -> Lsn {
        if !self.connected {
            return self.confirm.confirmed();
        }
        let Confirmable { lsn, sequences } = self.confirm.confirmable(now);
        for (stream, seq) in self.streams.iter_mut().zip(sequences) {
            stream.confirmed_seq = stream.confirmed_seq.max(*seq);
        }
        *lsn
    }

    /// Everything up to `received` has come from Postgres: what was proven before it came may be confirmed.
    fn prove(&mut self, received: Lsn) {
        if self.proven > Lsn::INVALID && self.proven <= received {
            self.confirm.proven(self.proven);
            self.settled = self.settled.max(self.proven);
            self.reached = self.reached.max(self.proven);
            self.proven = Lsn::INVALID;
        }
    }

    /// Something is stored but too young to be confirmed, or not in the checkpoint yet.
    pub fn is_holding_back(&self) -> bool {
        self.confirm.is_waiting() || self.checkpoint && self.kept < self.settled
    }

    /// Nothing waits: every event that was offered is settled.
    pub fn is_settled(&self) -> bool {
        self.window.is_empty()
    }

    /// Up to here everything is stored, as far as this session has come.
    pub fn settled(&self) -> Lsn {
        self.settled
    }

    /// Publishes that wait for their ack.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// The counters.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    fn stream_index(&mut self, name: &str) -> usize {
        self.streams
            .iter()
            .position(|s| s.name == name)
            .unwrap_or_else(|| {
                self.streams.push(Stream::new(Remembered {
                    name: name.to_string(),
                    ..Remembered::default()
                }));
                self.streams.len() - 1
            })
    }

    /// A stream never ends before what it acknowledged, unless it lost it.
    fn check_forwards(&mut self, index: usize, last_seq: u64) -> Result<(), Trouble> {
        let Some(stream) = self.streams.get_mut(index) else {
            return Ok(());
        };
        let acked_seq = stream.acked_seq;
        if self.delivery == Delivery::AtLeastOnce || last_seq >= acked_seq {
            return Ok(());
        }
        let backwards = Backwards {
            stream: stream.name.clone(),
            last_seq,
            acked_seq,
        };
        if last_seq < stream.confirmed_seq {
            return Err(Trouble::Halt(Halt::LostBeyondSlot(backwards)));
        }
        // told once: the next session fills the stream again from what the slot still has
        stream.last = None;
        stream.acked_seq = stream.confirmed_seq;
        stream.settled_seq = stream.confirmed_seq;
        Err(Trouble::Backwards(backwards))
    }

    fn has_room(&self, size: usize) -> bool {
        let inflight = if self.first_token + (self.unsent as u64) < self.careful_until {
            1
        } else if self.first_token < self.named_until {
            self.limits.inflight.min(self.limits.replies as usize)
        } else {
            self.limits.inflight
        };
        self.held == 0
            || self.held < inflight && self.held_bytes + size <= self.limits.inflight_bytes
    }

    /// The event at `unsent` was handed on or found stored.
    fn hold(&mut self, size: usize) {
        self.held += 1;
        self.held_bytes += size;
        self.unsent += 1;
        self.settle();
    }

    fn set_state(&mut self, index: usize, state: State) {
        if let Some(Entry::Event(pending)) = self.window.get_mut(index) {
            pending.state = state;
        }
    }

    /// Lets go of what is settled at the front of the window.
    fn settle(&mut self) {
        loop {
            match self.window.front() {
                Some(Entry::Event(Pending {
                    event,
                    state: State::Stored { stream, seq, at },
                    ..
                })) if self.unsent > 0 => {
                    let spans = event.spans();
                    if let Some(stream) = stream.and_then(|index| self.streams.get_mut(index)) {
                        stream.settle(spans.position, *seq);
                    }
                    self.youngest = self.youngest.max(*at);
                    self.held -= 1;
                    self.held_bytes -= spans.size();
                }
                Some(Entry::Boundary(lsn)) => {
                    self.settled = self.settled.max(*lsn);
                    self.reached = self.reached.max(*lsn);
                    let acked = self.youngest.take();
                    if !self.checkpoint {
                        let sequences = self.streams.iter().map(|stream| stream.settled_seq);
                        self.confirm.boundary(*lsn, acked, sequences);
                    }
                }
                _ => return,
            }
            self.window.pop_front();
            self.first_token += 1;
            self.unsent = self.unsent.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests;
