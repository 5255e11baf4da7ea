//! Exactly-once delivery: what to publish next, what an answer means, and the cut that is true at any moment. Pure.
//!
//! An event is *stored* when it is not after the anchor, or the evidence has its position. Otherwise it is published,
//! whatever comes after it in the stream: where it would be routed now proves nothing. The rules that are cited as R1, R2 …
//! are those of [`rules`](super::rules).

mod answers;
mod cuts;
mod reads;

use super::agreement::{Agreement, Look};
use super::capacity::Capacity;
use super::continuity::Continuity;
use super::culprit::{Alone, Culprit};
use super::doubt::Doubt;
use super::elsewhere::Elsewhere;
use super::evidence::{Evidence, Message, Verdict};
use super::gate::Gate;
use super::resume::Resumed;
use super::resume::facts::StreamFacts;
use super::stream::Stream;
use super::trouble::{Cause, Halt, Trouble};
use super::window::{After, Commit, Limits, Resolved, State, Stored, Window};
use super::{Next, Tally};
use crate::jetstream::wire::{self, Publish};
use crate::outbox::batch::{Batch, Event, Fate};
use crate::outbox::flags::Flags;
use crate::outbox::lineage::Lineage;
use crate::outbox::position::Position;
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::{Anchor, Cut, StreamCut};
use std::sync::Arc;
use std::time::Instant;

/// A connection that was resumed over.
#[derive(Debug)]
pub struct Connection {
    /// Where to go on.
    pub resumed: Resumed,
    /// The streams, in the order of the resume: first those that the routes of the capacity lead to, in their order.
    pub streams: Vec<StreamFacts>,
    /// What may go.
    pub capacity: Capacity,
    /// What the chosen cut says of streams that are gone: it is to be known should they come back.
    pub missing: Vec<StreamCut>,
}

/// The state machine. See the module.
#[derive(Debug)]
pub struct ExactlyOnce {
    lineage: Lineage,
    replies: u64,
    window: Window,
    continuity: Continuity,
    reached: Reached,
    connection: Option<Connected>,
    gate: Gate,
    doubt: Doubt,
    pub(super) culprit: Culprit,
    /// What was true when the connection was lost.
    cut_at_disconnect: Option<Cut>,
    elsewhere: Elsewhere,
    is_quiescent: bool,
    /// What was committed from here on no earlier relay has published by other flags.
    earlier_upto: Lsn,
    /// See [`Cut::lenient_upto`].
    lenient_upto: Lsn,
    tally: Tally,
}

/// What is known over one connection to NATS.
#[derive(Debug)]
struct Connected {
    capacity: Capacity,
    streams: Vec<Stream>,
    missing: Vec<StreamCut>,
    evidence: Evidence,
    /// The last of it when it was read, and the flags that made it.
    evidence_upto: Position,
    flags: Flags,
    /// What was asked to be read, and is not answered yet.
    asked: Option<Asked>,
    /// What was published last is parked: nothing goes before it is acknowledged, as it did not go before all else was.
    is_parking: bool,
    agreement: Agreement,
}

/// How far everything is resolved.
#[derive(Debug)]
struct Reached {
    anchor: Anchor,
    /// What is not after this was resolved before the start: the anchor's position, or the end of its transaction.
    before: Position,
    /// The event that was resolved last in this session, and the transaction that ended last.
    event: Option<Event>,
    commit: Option<Commit>,
    stored_lsn: Lsn,
    /// What was stored at the start by other flags, as long as it is not reached by these.
    passed_by_others: Option<Lsn>,
}

#[derive(Clone, Copy, Debug)]
enum Asked {
    /// What came to a stream since it was last known.
    Gap(usize),
    /// What the event under this token is called a duplicate of.
    Suspect { token: u64, stream: usize, seq: u64 },
}

/// What is to be done with the event at the cursor.
enum Judged {
    Resolved(Option<Stored>),
    /// To this stream; there is room for the headers that a publish can do without; it is the last one of its transaction there.
    Publish {
        stream: usize,
        has_room: bool,
        is_last: bool,
    },
    Wait,
    Other(Next),
}

/// What comes after the event at the cursor for its stream. One that is put aside or given up is none, if that is known.
fn after(window: &mut Window, capacity: &Capacity, index: usize) -> After {
    window.after(|pending| match pending.state {
        State::Unsent if pending.event.fate() == Fate::Publish => {
            // where no stream captures it yet, it may come to this one
            let route = capacity.routes.route(pending.event.subject());
            route.is_none_or(|route| route == index)
        }
        State::Sent { stream, .. } => stream == index,
        State::Resolved(Some(stored)) => stored.stream == index && stored.counts,
        State::Unsent | State::Resolved(None) => false,
    })
}

impl ExactlyOnce {
    /// For one copy stream, which starts at the commit of [`ExactlyOnce::resolved_before`]. Whoever had the slot before has published
    /// nothing beyond `wal_end`.
    pub fn start(
        lineage: Lineage,
        limits: Limits,
        continuity: Continuity,
        connection: Connection,
        wal_end: Lsn,
        now: Instant,
    ) -> ExactlyOnce {
        let resumed = &connection.resumed;
        let mut before = resumed.anchor.position;
        if resumed.anchor.event.is_some() && resumed.stored_lsn > before.commit_lsn {
            before.ordinal = u32::MAX;
        }
        // the anchor itself may be a row that is none of our events
        let earlier_upto = match resumed.flags == *continuity.flags() {
            true => Lsn(before.commit_lsn.0.saturating_add(1)),
            false => wal_end,
        };
        let is_others = !resumed.is_empty(continuity.flags());
        let passed_by_others = is_others.then_some(resumed.stored_lsn);
        let lenient_upto = match (continuity.lenient_until(), resumed.cut) {
            // every stream was read
            (Some(wal_end), None) => {
                let last = resumed.evidence.last().unwrap_or_default();
                last.commit_lsn.max(wal_end).max(resumed.lenient_upto)
            }
            _ => resumed.lenient_upto,
        };
        let mut core = ExactlyOnce {
            lineage,
            replies: limits.replies,
            window: Window::new(limits),
            continuity,
            reached: Reached {
                anchor: resumed.anchor.clone(),
                before,
                event: None,
                commit: None,
                stored_lsn: resumed.stored_lsn,
                passed_by_others,
            },
            connection: None,
            gate: Gate::default(),
            doubt: Doubt::new(resumed.anchor.position, resumed.quiescent, wal_end),
            culprit: Culprit::default(),
            cut_at_disconnect: None,
            elsewhere: Elsewhere::default(),
            is_quiescent: false,
            earlier_upto,
            lenient_upto,
            tally: Tally::default(),
        };
        core.resume(connection, now);
        core
    }

    /// A new connection to NATS within the copy stream, resumed with [`ExactlyOnce::on_disconnect`]'s cut.
    pub fn resume(&mut self, connection: Connection, now: Instant) {
        let Connection {
            resumed,
            streams: facts,
            capacity,
            mut missing,
        } = connection;
        // the next cut has another anchor
        missing.iter_mut().for_each(|stream| stream.share = None);
        let anchor = resumed.anchor.position.commit_lsn;
        self.elsewhere.on_connect(&capacity.routes);
        let mut evidence = resumed.evidence;
        if let Some(commit_lsn) = self.continuity.lenient_until() {
            let ordinal = u32::MAX;
            let wal_end = Position {
                commit_lsn,
                ordinal,
            };
            evidence.forget_after(wal_end.max(self.window.offered()));
        }
        self.doubt.clear();
        let window = self.window.limits().inflight as u64;
        let most = (resumed.cut == Some(0)).then_some(window);
        for (index, seq) in resumed.gone.iter().enumerate() {
            if let Some(seq) = seq {
                self.doubt.on_gone(index, *seq, most);
            }
        }
        let foreign = resumed.foreign.into_iter();
        let streams = resumed.streams.into_iter().zip(facts).zip(foreign);
        let streams = streams.map(|((cut, facts), foreign)| {
            let mut stream = Stream::new(cut, facts, self.replies, anchor);
            if foreign > 0 {
                stream.foreign_at = Some(now);
            }
            stream
        });
        self.connection = Some(Connected {
            capacity,
            streams: streams.collect(),
            missing,
            evidence_upto: evidence.last().unwrap_or_default(),
            evidence,
            flags: resumed.flags,
            asked: None,
            is_parking: false,
            agreement: Agreement::new(now),
        });
        self.cut_at_disconnect = None;
    }

    /// Everything up to here was resolved before the start: the copy stream starts at its commit.
    pub fn resolved_before(&self) -> Position {
        self.reached.before
    }

    /// A row or message that was committed before this may be an event of earlier flags, or the anchor, without being one of ours.
    pub fn earlier_upto(&self) -> Lsn {
        self.earlier_upto
    }

    /// The connection is gone. Returns the cut to resume with.
    pub fn on_disconnect(&mut self) -> Cut {
        let cut = match self.cut_at_disconnect.take() {
            Some(cut) => cut,
            None => self.cut(),
        };
        self.culprit.on_disconnect();
        self.connection = None;
        self.window.on_disconnect();
        self.cut_at_disconnect.insert(cut).clone()
    }

    /// Takes the next changes of the copy stream.
    pub fn offer(&mut self, batch: &Arc<Batch>) -> Result<(), Trouble> {
        let broken = |broken| Trouble::Halt(Halt::Discontinuous(broken));
        self.continuity.on_batch(batch).map_err(broken)?;
        self.window.offer(batch).map_err(Trouble::OutOfOrder)?;
        self.settle();
        Ok(())
    }

    /// Another batch is wanted.
    pub fn wants_batch(&self) -> bool {
        self.connection.is_some() && self.window.wants_batch()
    }

    /// The next thing to do; to be called until it says [`Next::Nothing`].
    pub fn next(&mut self, now: Instant) -> Result<Next, Trouble> {
        if self.culprit.pings_after(now) {
            return Ok(Next::Ping);
        }
        loop {
            if let Some(read) = self.next_read(now) {
                return Ok(read);
            }
            let judged = self.judge(now)?;
            match self.alone(judged, now) {
                Judged::Resolved(stored) => self.window.resolve_at_cursor(stored),
                Judged::Publish {
                    stream,
                    has_room,
                    is_last,
                } => {
                    let publish = self.publish(stream, has_room, is_last, now);
                    return Ok(publish.map_or(Next::Nothing, Next::Publish));
                }
                Judged::Other(next) => return Ok(next),
                Judged::Wait => {
                    self.settle();
                    return Ok(Next::Nothing);
                }
            }
            self.settle();
        }
    }

    /// A suspect goes only over a connection that is seen to be well.
    fn alone(&mut self, judged: Judged, now: Instant) -> Judged {
        let Judged::Publish { .. } = judged else {
            self.culprit.postpone();
            return judged;
        };
        let token = self.window.at_cursor().map(|(token, _)| token);
        if !token.is_some_and(|token| self.culprit.is_suspect(token)) {
            return judged;
        }
        match self.culprit.before(now) {
            Alone::Ping => Judged::Other(Next::Ping),
            Alone::Wait => Judged::Wait,
            Alone::Publish => judged,
        }
    }

    /// The event at the cursor.
    fn judge(&mut self, now: Instant) -> Result<Judged, Trouble> {
        let Some(connected) = &mut self.connection else {
            return Ok(Judged::Wait);
        };
        let is_parking = connected.is_parking && self.window.waiting() > 0;
        if connected.asked.is_some() || is_parking || self.culprit.is_out() {
            return Ok(Judged::Wait);
        }
        connected.is_parking = false;
        let waiting = self.window.waiting();
        let Some((token, pending)) = self.window.at_cursor() else {
            return Ok(Judged::Wait);
        };
        let (event, suspect) = (pending.event.clone(), pending.suspect);
        let position = event.position();
        if !self.window.has_room(event.spans().size()) {
            return Ok(Judged::Wait);
        }
        if position <= self.reached.before {
            // R1: not after the anchor, so resolved
            self.tally.already_stored += u64::from(event.fate() != Fate::Ignore);
            return Ok(Judged::Resolved(None));
        }
        if let Some(stored) = self.find(&event)? {
            self.tally.already_stored += u64::from(event.fate() != Fate::Ignore);
            return Ok(Judged::Resolved(Some(stored)));
        }
        if matches!(event.fate(), Fate::Lose | Fate::Ignore) {
            self.tally.given_up += u64::from(event.fate() == Fate::Lose);
            return Ok(Judged::Resolved(None));
        }
        let must_be_alone = event.fate() == Fate::Park
            || suspect.is_some()
            || self.doubt.is_about(position)
            || self.culprit.is_suspect(token);
        if must_be_alone && waiting > 0 {
            return Ok(Judged::Wait);
        }
        self.route(token, &event, suspect, now)
    }

    /// Where the event is, by the evidence. R4.
    fn find(&mut self, event: &Event) -> Result<Option<Stored>, Trouble> {
        let Some(connected) = &mut self.connection else {
            return Ok(None);
        };
        if connected.evidence.is_empty() {
            return Ok(None);
        }
        let position = event.position();
        // the same row, of which other flags have made another event
        let (own, made_by) = (self.continuity.flags(), &connected.flags);
        let is_other = position.commit_lsn < self.earlier_upto
            && made_by.counts_as(own)
            && !made_by.maps_as(own);
        let name = |streams: &[Stream], index: usize| {
            let stream = streams.get(index);
            stream
                .map(|stream| stream.name().to_string())
                .unwrap_or_default()
        };
        loop {
            match connected.evidence.verdict(position, event.id()) {
                Verdict::Publish => return Ok(None),
                Verdict::OtherId(_) if self.continuity.is_lenient() => {
                    connected.evidence.forget_upto(position);
                    return Ok(None);
                }
                Verdict::OtherId(found) if !is_other => {
                    return Err(Trouble::Halt(Halt::OtherId {
                        stream: name(&connected.streams, found.stream),
                        position,
                        id: event.id().to_string(),
                    }));
                }
                Verdict::Stored(found) | Verdict::OtherId(found) => {
                    if let Some(stream) = connected.streams.get_mut(found.stream) {
                        stream.latest = stream.latest.max(position);
                    }
                    return Ok(Some(Stored {
                        stream: found.stream,
                        seq: found.seq,
                        counts: !found.is_parked,
                    }));
                }
                Verdict::NotSent(found) => {
                    let mut events = self.window.events();
                    let has_come = events.any(|it| it.event.position() == found.position);
                    if !has_come && !self.continuity.is_lenient() {
                        return Err(Trouble::Halt(Halt::NotSent {
                            stream: name(&connected.streams, found.stream),
                            found,
                        }));
                    }
                    connected.evidence.forget_upto(found.position);
                }
            }
        }
    }

    /// What becomes of an event that is not known to be stored.
    fn route(
        &mut self,
        token: u64,
        event: &Event,
        suspect: Option<u64>,
        now: Instant,
    ) -> Result<Judged, Trouble> {
        let Some(connected) = &mut self.connection else {
            return Ok(Judged::Wait);
        };
        let subject = event.subject();
        let spare = |expected: Option<u64>, last_id_len: Option<usize>| {
            let capacity = &connected.capacity;
            let spare = capacity.spare(subject, event.spans(), expected, last_id_len);
            spare.map_err(|too_large| Judged::Other(Next::TooLarge { token, too_large }))
        };
        // what is parked is of another subject
        if connected.capacity.puts_aside
            && let Err(too_large) = spare(Some(0), None)
        {
            return Ok(too_large);
        }
        let route = connected.capacity.routes.route(subject);
        let Some((index, stream)) =
            route.and_then(|index| Some((index, connected.streams.get(index)?)))
        else {
            return Err(Trouble::Reconnect(Cause::NoStream(subject.to_string())));
        };
        if let Some(seq) = suspect {
            let name = stream.name().to_string();
            connected.asked = Some(Asked::Suspect {
                token,
                stream: index,
                seq,
            });
            return Ok(Judged::Other(Next::Read {
                stream: name,
                from: seq,
                to: seq,
            }));
        }
        let is_last = connected.capacity.marks_ends && event.fate() == Fate::Publish;
        let is_last = match is_last.then(|| after(&mut self.window, &connected.capacity, index)) {
            Some(After::Unknown) => return Ok(Judged::Wait),
            Some(After::End) => true,
            Some(After::More) | None => false,
        };
        // R25: in a replicated stream it could pass one that is refused
        if is_last && stream.is_replicated && self.window.is_on_its_way(index) {
            return Ok(Judged::Wait);
        }
        // R14
        if !self.gate.may_publish(stream.is_recorded, now) || !stream.has_room(now) {
            return Ok(Judged::Wait);
        }
        let last_id_len = stream.previous.as_ref().map(|last| last.spans().id_len());
        let extra_len = wire::extra_len(stream.name());
        Ok(match spare(Some(stream.fence.predicted()), last_id_len) {
            Ok(spare) => Judged::Publish {
                stream: index,
                has_room: spare >= extra_len,
                is_last: is_last && spare >= extra_len + wire::TRANSACTION_END_LEN,
            },
            Err(too_large) => too_large,
        })
    }

    fn publish(
        &mut self,
        index: usize,
        has_room: bool,
        is_last: bool,
        now: Instant,
    ) -> Option<Publish> {
        let (token, pending) = self.window.at_cursor()?;
        let event = pending.event.clone();
        let connected = self.connection.as_mut()?;
        let stream = connected.streams.get_mut(index)?;
        // R9, R10, R11
        let expected = stream.fence.extend(token);
        let expected_last = match stream.is_replicated {
            true => None,
            false => stream.previous.replace(event.named()),
        };
        // R17: whoever reads the stream back stops at what is not late
        let position = event.position();
        let is_late = position < stream.latest || connected.evidence.has_after(position, index);
        // R25: of a late one others have passed, of this transaction or of later ones
        let share = stream.share(position.commit_lsn);
        let share = share.filter(|_| is_last && !is_late);
        let transaction_end = share.map(|before| before + self.window.share(index) + 1);
        stream.names_it &= has_room;
        let expected_stream = stream.names_it.then(|| stream.name().into());
        connected.is_parking = event.fate() == Fate::Park;
        self.window.send_at_cursor(index, expected, is_late, now);
        self.culprit.on_published(token);
        self.gate.on_publish(now);
        self.doubt.on_publish(event.position());
        Some(Publish {
            event,
            token,
            reply: index as u64 * self.replies + expected % self.replies,
            expected_last_sequence: Some(expected),
            expected_last,
            expected_stream,
            is_late: is_late && has_room,
            transaction_end,
        })
    }

    /// Lets go of what is resolved at the front of the window.
    fn settle(&mut self) {
        while let Some(resolved) = self.window.pop() {
            match resolved {
                Resolved::Event(event, stored) => {
                    let position = event.position();
                    if let Some(connected) = &mut self.connection {
                        if !connected.evidence.is_empty() {
                            connected.evidence.forget_upto(position);
                        }
                        if let Some(stored) = stored
                            && let Some(stream) = connected.streams.get_mut(stored.stream)
                        {
                            stream.on_resolved(stored, position);
                        }
                    }
                    if position > self.reached.before {
                        self.reached.event = Some(event.into_named());
                    }
                }
                Resolved::Boundary(boundary) => {
                    let reached = &mut self.reached;
                    reached.stored_lsn = reached.stored_lsn.max(boundary.lsn);
                    reached.passed_by_others.take_if(|lsn| *lsn <= boundary.lsn);
                    self.reached.commit = boundary.commit.or(self.reached.commit);
                }
            }
        }
    }

    /// When a stream that lags behind is read again.
    pub fn read_again_at(&self) -> Option<Instant> {
        let streams = self.connection.iter().flat_map(|it| &it.streams);
        streams.filter_map(Stream::read_again_at).min()
    }

    /// Where a stream ends for all that is known.
    pub fn end_of(&self, name: &str) -> Option<u64> {
        let mut streams = self.connection.iter().flat_map(|it| &it.streams);
        let stream = streams.find(|stream| stream.name() == name)?;
        Some(stream.fence.known())
    }

    /// What is to be asked now, and the names of the answers: whether the streams still agree.
    pub fn looks(&mut self, now: Instant) -> Vec<(u64, Look)> {
        match &mut self.connection {
            Some(it) => it.agreement.ask(&it.streams, &self.lineage, now),
            None => Vec::new(),
        }
    }

    /// The answer to a [`Look::Stream`]. R22.
    pub fn on_look(&mut self, token: u64, created: &str, last_seq: u64) -> Result<(), Trouble> {
        match &mut self.connection {
            Some(it) => it
                .agreement
                .on_stream(&mut it.streams, token, created, last_seq),
            None => Ok(()),
        }
    }

    /// The answer to a [`Look::Message`]. R22.
    pub fn on_witness(&mut self, token: u64, found: Option<&Message>) -> Result<(), Trouble> {
        match &mut self.connection {
            Some(it) => (it.agreement).on_witness(&mut it.streams, token, found, &self.lineage),
            None => Ok(()),
        }
    }

    /// Postgres may be told what has matured. R19, R22.
    pub fn may_confirm(&self, now: Instant) -> bool {
        let connected = self.connection.as_ref();
        self.continuity.is_proven() && connected.is_some_and(|it| it.agreement.is_recent(now))
    }

    /// Another form of the event under this token, at its position, is to be published in its place. Only of one
    /// that is not on its way.
    pub fn replace(&mut self, token: u64, event: Event) {
        self.window.replace(token, event);
    }

    /// How many bytes of id, headers and body may go to `subject`.
    pub fn room(&self, subject: &str) -> usize {
        let connected = self.connection.as_ref();
        connected.map_or(0, |it| it.capacity.room(subject))
    }

    /// The limits of the server or the account have changed.
    pub fn set_max_payload(&mut self, max_payload: usize) {
        if let Some(connected) = &mut self.connection {
            connected.capacity.max_payload = max_payload;
        }
    }

    /// The streams, and where each ends for all that is known.
    pub fn stream_ends(&self) -> Vec<(String, u64)> {
        let connected = self.connection.iter();
        let streams = connected.flat_map(|connected| &connected.streams);
        streams
            .map(|it| (it.name().to_string(), it.fence.known()))
            .collect()
    }

    /// The window.
    pub fn window(&self) -> &Window {
        &self.window
    }

    /// Everything up to here is resolved.
    pub fn stored_lsn(&self) -> Lsn {
        self.reached.stored_lsn
    }

    /// The counters.
    pub fn tally(&self) -> Tally {
        self.tally
    }
}
