//! Exactly-once delivery: what to publish next, what an answer means, and the cut that is true at any moment. Pure.
//!
//! An event is *stored* when it is not after the anchor, or the evidence has its position. Otherwise it is published,
//! whatever comes after it in the stream: where it would be routed now proves nothing. The rules that are cited as R1, R2 …
//! are those of [`rules`](super::rules).

use super::capacity::Capacity;
use super::continuity::Continuity;
use super::culprit::{self, Alone, Culprit};
use super::doubt::Doubt;
use super::elsewhere::Elsewhere;
use super::evidence::{Evidence, Message, Verdict};
use super::fence::AnswerFor;
use super::gate::Gate;
use super::resume::{Resumed, StreamFacts};
use super::stream::Stream;
use super::trouble::{Cause, Halt, Refusal, Trouble};
use super::window::{Commit, Limits, Resolved, State, Window};
use super::{Next, Tally};
use crate::jetstream::ack::{AckError, AckErrorKind, Origin, PubAck};
use crate::jetstream::wire::{self, Publish};
use crate::outbox::batch::{Batch, Event, Fate};
use crate::outbox::lineage::Lineage;
use crate::outbox::position::Position;
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::{Anchor, AnchorEvent, Cut, StreamCut, Witness};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// While Postgres is told anything, each stream was seen to agree with the cuts not longer ago than this: well within the
/// default hold-back less the default sync interval of nats-server (150 s less 120 s).
const AGREED_FOR: Duration = Duration::from_secs(30);

/// A connection that was resumed over.
#[derive(Debug)]
pub struct Connection {
    /// Where to go on.
    pub resumed: Resumed,
    /// The streams, in the order of the resume.
    pub streams: Vec<StreamFacts>,
    /// Which of them each route of the capacity leads to.
    pub routed: Vec<usize>,
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
    tally: Tally,
}

/// What is known over one connection to NATS.
#[derive(Debug)]
struct Connected {
    capacity: Capacity,
    routed: Vec<usize>,
    streams: Vec<Stream>,
    missing: Vec<StreamCut>,
    evidence: Evidence,
    /// What was asked to be read, and is not answered yet.
    asked: Option<Asked>,
    /// What was published last is parked: nothing goes before it is acknowledged, as it did not go before all else was.
    is_parking: bool,
    /// When all streams were last seen to agree with what is known of them.
    agreed_at: Instant,
    /// What was asked since and is not answered, and what is expected.
    looks: Vec<(u64, Expected)>,
    looked_at: Instant,
}

/// How far everything is resolved.
#[derive(Debug)]
struct Reached {
    anchor: Anchor,
    /// The event that was resolved last in this session, and the transaction that ended last.
    event: Option<Event>,
    commit: Option<Commit>,
    stored_lsn: Lsn,
}

/// What is to be asked of JetStream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// The stream of that name.
    Stream(String),
    /// The message at a sequence of it.
    Message(String, u64),
}

/// What is expected of an answer to that.
#[derive(Clone, Debug)]
enum Expected {
    /// The stream ends at this sequence or later.
    End(u64),
    /// This message is there, or none.
    Witness(Witness),
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
    Resolved(Option<(usize, u64)>),
    /// To this stream; there is room for the headers that a publish can do without.
    Publish {
        stream: usize,
        has_room: bool,
    },
    Wait,
    Other(Next),
}

impl ExactlyOnce {
    /// For one copy stream, which starts at [`ExactlyOnce::start_lsn`]. Whoever had the slot before has published
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
        let mut core = ExactlyOnce {
            lineage,
            replies: limits.replies,
            window: Window::new(limits),
            continuity,
            reached: Reached {
                anchor: resumed.anchor.clone(),
                event: None,
                commit: None,
                stored_lsn: resumed.stored_lsn,
            },
            connection: None,
            gate: Gate::default(),
            doubt: Doubt::new(resumed.anchor.position, resumed.quiescent, wal_end),
            culprit: Culprit::default(),
            cut_at_disconnect: None,
            elsewhere: Elsewhere::default(),
            is_quiescent: false,
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
            routed,
            capacity,
            missing,
        } = connection;
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
            let mut stream = Stream::new(cut, facts, self.replies);
            if foreign > 0 {
                stream.foreign_at = Some(now);
            }
            stream
        });
        self.connection = Some(Connected {
            capacity,
            routed,
            streams: streams.collect(),
            missing,
            evidence,
            asked: None,
            is_parking: false,
            agreed_at: now,
            looks: Vec::new(),
            looked_at: now,
        });
        self.cut_at_disconnect = None;
    }

    /// Where the copy stream starts.
    pub fn start_lsn(&self) -> Lsn {
        self.reached.anchor.position.commit_lsn
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
            if let Some(read) = self.next_read() {
                return Ok(read);
            }
            let judged = self.judge(now)?;
            match self.alone(judged, now) {
                Judged::Resolved(stored) => self.window.resolve_at_cursor(stored),
                Judged::Publish { stream, has_room } => {
                    let publish = self.publish(stream, has_room, now);
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

    /// Of a stream to which something was refused, what came since is to be read once every publish to it is answered. R7.
    fn next_read(&mut self) -> Option<Next> {
        let connected = self.connection.as_mut()?;
        if connected.asked.is_some() {
            return None;
        }
        let mut streams = connected.streams.iter_mut().enumerate();
        let (index, stream) =
            streams.find(|(_, stream)| stream.fence.is_broken() && stream.fence.waiting() == 0)?;
        let (known, end) = (stream.fence.known(), stream.gap_end());
        if end > known {
            connected.asked = Some(Asked::Gap(index));
            return Some(Next::Read {
                stream: stream.name().to_string(),
                from: known + 1,
                to: end,
            });
        }
        self.restart(index, 0);
        self.next_read()
    }

    fn restart(&mut self, index: usize, found: u64) {
        let stream = self
            .connection
            .as_mut()
            .and_then(|it| it.streams.get_mut(index));
        if let Some(stream) = stream {
            stream.restart(found);
            self.window.on_refused(index);
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
        if position <= self.reached.anchor.position {
            // R1: not after the anchor, so resolved
            self.tally.skipped += 1;
            return Ok(Judged::Resolved(None));
        }
        if let Some(stored) = self.find(&event)? {
            self.tally.skipped += 1;
            return Ok(Judged::Resolved(Some(stored)));
        }
        if event.fate() == Fate::Lose {
            self.tally.lost += 1;
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
    fn find(&mut self, event: &Event) -> Result<Option<(usize, u64)>, Trouble> {
        let Some(connected) = &mut self.connection else {
            return Ok(None);
        };
        if connected.evidence.is_empty() {
            return Ok(None);
        }
        let position = event.position();
        let name = |streams: &[Stream], index: usize| {
            let stream = streams.get(index);
            stream
                .map(|stream| stream.name().to_string())
                .unwrap_or_default()
        };
        loop {
            match connected.evidence.verdict(position, event.id()) {
                Verdict::Publish => return Ok(None),
                Verdict::Stored(stream, seq) => {
                    if let Some(stream) = connected.streams.get_mut(stream) {
                        stream.latest = stream.latest.max(position);
                    }
                    return Ok(Some((stream, seq)));
                }
                Verdict::OtherId(stream, seq) if self.continuity.has_other_flags() => {
                    return Ok(Some((stream, seq)));
                }
                Verdict::OtherId(..) if self.continuity.is_lenient() => {
                    connected.evidence.forget_upto(position);
                    return Ok(None);
                }
                Verdict::OtherId(stream, _) => {
                    return Err(Trouble::Halt(Halt::OtherId {
                        stream: name(&connected.streams, stream),
                        position,
                        id: event.id().to_string(),
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
        let routed = route.and_then(|route| connected.routed.get(route).copied());
        let Some((index, stream)) =
            routed.and_then(|index| Some((index, connected.streams.get(index)?)))
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
            },
            Err(too_large) => too_large,
        })
    }

    fn publish(&mut self, index: usize, has_room: bool, now: Instant) -> Option<Publish> {
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
        stream.names_it &= has_room;
        let expected_stream = stream.names_it.then(|| stream.name().into());
        self.tally.late += u64::from(is_late);
        connected.is_parking = event.fate() == Fate::Park;
        self.window.send_at_cursor(index, expected, now);
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
        })
    }

    /// The answer to a publish of this connection, by its name. Returns the token of the event that is stored by it.
    pub fn answer(
        &mut self,
        reply: u64,
        answer: Result<(PubAck, Arc<Origin>), AckError>,
        now: Instant,
    ) -> Result<Option<u64>, Trouble> {
        self.culprit.on_answer();
        let (index, name) = ((reply / self.replies) as usize, reply % self.replies);
        let Some(connected) = &mut self.connection else {
            return Ok(None);
        };
        let Some(stream) = connected.streams.get_mut(index) else {
            return Ok(None);
        };
        let (ack, origin) = match answer {
            Ok(ack) => ack,
            Err(error) => return self.on_refusal(index, name, error, now).map(|()| None),
        };
        // R5: an ack counts from the routed stream and domain, and once
        let found = stream
            .fence
            .answer_for(name, (!ack.duplicate).then_some(ack.seq));
        let is_home = stream.is_home(&origin);
        if !is_home || found == AnswerFor::None {
            let (stream, answered) = (stream.name().to_string(), origin.to_string());
            return Err(match found {
                // it is answered already
                AnswerFor::None => Trouble::Halt(Halt::Elsewhere { stream, answered }),
                _ => {
                    let routes = &connected.capacity.routes;
                    self.elsewhere.on_answer(stream, answered, routes, now)
                }
            });
        }
        if ack.duplicate {
            return self.on_duplicate(index, found, ack.seq).map(|()| None);
        }
        let AnswerFor::One(token) = found else {
            return Err(Trouble::Reconnect(Cause::OtherAnswer { seq: ack.seq }));
        };
        let Some(pending) = self.window.get(token) else {
            return Ok(None);
        };
        let State::Sent { expected, .. } = pending.state else {
            return Ok(None);
        };
        // R6
        if ack.seq != expected + 1 {
            return Err(Trouble::Reconnect(Cause::OtherAnswer { seq: ack.seq }));
        }
        stream.on_ack(expected, pending.event.position());
        if pending.event.fate() != Fate::Park {
            self.culprit.on_stored(token, stream.name());
        }
        self.window.on_stored(token, Some((index, ack.seq)), now);
        self.count(token);
        self.settle();
        Ok(Some(token))
    }

    fn count(&mut self, token: u64) {
        let Some(pending) = self.window.get(token) else {
            return;
        };
        self.tally.published += 1;
        self.tally.published_bytes += pending.event.spans().body_len() as u64;
        self.tally.parked += u64::from(pending.event.fate() == Fate::Park);
    }

    /// A publish is not stored. R7.
    fn on_refusal(
        &mut self,
        index: usize,
        name: u64,
        error: AckError,
        now: Instant,
    ) -> Result<(), Trouble> {
        let Some(connected) = &mut self.connection else {
            return Ok(());
        };
        let Some(stream) = connected.streams.get_mut(index) else {
            return Ok(());
        };
        let found = stream.fence.answer_for(name, None);
        match error.kind() {
            AckErrorKind::WrongLastSequence(end) => {
                if end.is_some_and(|end| end < stream.fence.known()) {
                    let name = stream.name().to_string();
                    if stream.names_it {
                        return Err(Trouble::Reconnect(Cause::Disagrees(name)));
                    }
                    // if the stream is found to be as it was, another one has answered
                    let (answered, routes) = (error.to_string(), &connected.capacity.routes);
                    let stream = name.clone();
                    return Err(
                        match self.elsewhere.on_answer(stream, answered, routes, now) {
                            Trouble::Reconnect(_) => Trouble::Reconnect(Cause::Disagrees(name)),
                            halt => halt,
                        },
                    );
                }
                stream.on_refusal(end);
            }
            AckErrorKind::OtherStream => {
                let (name, routes) = (stream.name().to_string(), &connected.capacity.routes);
                let answered = error.to_string();
                return Err(self.elsewhere.on_answer(name, answered, routes, now));
            }
            AckErrorKind::Poison => match found {
                AnswerFor::One(token) => {
                    return Err(self.refused(token, Refusal::ByStream(error)));
                }
                // it is published again, under a name of its own
                _ => {
                    stream.on_refusal(None);
                    self.window.name_each();
                }
            },
            kind @ (AckErrorKind::Closed | AckErrorKind::Unknown) => {
                // the next connection begins with one publish to each stream
                if let AnswerFor::One(token) = found
                    && self.culprit.on_refusal(token, kind) == culprit::Next::Never
                {
                    let stream = stream.name().to_string();
                    return Err(match kind {
                        AckErrorKind::Closed => Trouble::Halt(Halt::Closed { stream, error }),
                        _ => self.refused(token, Refusal::Unknown(error)),
                    });
                }
                return Err(Trouble::Reconnect(Cause::Refused(error)));
            }
            AckErrorKind::Busy | AckErrorKind::NoRoom => {
                return Err(Trouble::Reconnect(Cause::Refused(error)));
            }
        }
        Ok(())
    }

    /// The event under this token can never be published as it is.
    pub(super) fn refused(&mut self, token: u64, why: Refusal) -> Trouble {
        let Some(pending) = self.window.get(token) else {
            return Trouble::Refused { token, why };
        };
        let (event, state) = (&pending.event, pending.state);
        let stream = match state {
            State::Sent { stream, .. } => Some(stream),
            State::Unsent | State::Resolved(_) => None,
        };
        let streams = self.connection.as_ref().map(|it| &it.streams);
        let stream = stream.and_then(|index| streams?.get(index));
        let stream = stream.map(|it| it.name().to_string()).unwrap_or_default();
        match why.is_doubtful() && !self.culprit.may_put_aside(&stream) {
            true => Trouble::Halt(Halt::EachRefused {
                stream,
                position: event.position(),
                id: event.id().to_string(),
                why,
            }),
            false => Trouble::Refused { token, why },
        }
    }

    /// The server has the id already, as that of the message at `seq`; the publish is not stored.
    fn on_duplicate(&mut self, index: usize, found: AnswerFor, seq: u64) -> Result<(), Trouble> {
        if seq == 0 {
            // a false answer of nats-server 2.10
            return Err(Trouble::Reconnect(Cause::OtherAnswer { seq }));
        }
        match found {
            AnswerFor::One(token) => {
                if let Some(pending) = self.window.get_mut(token) {
                    pending.suspect = Some(seq);
                }
            }
            _ => self.window.name_each(),
        }
        let connected = self.connection.as_mut();
        if let Some(stream) = connected.and_then(|it| it.streams.get_mut(index)) {
            stream.on_duplicate();
            stream.on_refusal(None);
        }
        Ok(())
    }

    /// What a [`Next::Read`] found: each sequence of it, with what is there. Returns the id of an event that is dropped, and
    /// the message that had used it.
    pub fn on_read(
        &mut self,
        messages: Vec<(u64, Option<Message>)>,
        now: Instant,
    ) -> Result<Option<(String, Message)>, Trouble> {
        let asked = self.connection.as_mut().and_then(|it| it.asked.take());
        match asked {
            Some(Asked::Gap(index)) => {
                self.on_gap(index, messages, now);
                Ok(None)
            }
            Some(Asked::Suspect { token, stream, seq }) => {
                let found = messages.into_iter().find(|(at, _)| *at == seq);
                self.on_suspect(token, stream, seq, found.and_then(|(_, message)| message))
            }
            None => Ok(None),
        }
    }

    /// What came to a stream that refused something: late copies of our own publishes, and foreign messages.
    fn on_gap(&mut self, index: usize, messages: Vec<(u64, Option<Message>)>, now: Instant) {
        let out: Vec<Position> = (self.window.events())
            .filter(|it| matches!(it.state, State::Resolved(_)))
            .map(|it| it.event.position())
            .collect();
        let resolved = self.reached.event.as_ref().map(Event::position);
        let resolved = resolved
            .unwrap_or_default()
            .max(self.reached.anchor.position);
        let Some(connected) = &mut self.connection else {
            return;
        };
        let (mut foreign, mut last) = (0, 0);
        for (seq, message) in messages {
            let Some(message) = message else {
                self.doubt.on_gone(index, seq, None);
                continue;
            };
            last = last.max(seq);
            match message.ours(&self.lineage) {
                Some(position) => {
                    if position > resolved && !out.contains(&position) {
                        let id = message.id.as_deref().unwrap_or_default();
                        connected.evidence.add(position, index, seq, id);
                    }
                }
                None => foreign += 1,
            }
        }
        if let Some(stream) = connected.streams.get_mut(index)
            && foreign > 0
        {
            stream.on_foreign(now, stream.fence.unacknowledged());
            self.tally.foreign += foreign;
        }
        self.restart(index, last);
    }

    /// What the event under `token` is called a duplicate of. R8.
    fn on_suspect(
        &mut self,
        token: u64,
        stream: usize,
        seq: u64,
        found: Option<Message>,
    ) -> Result<Option<(String, Message)>, Trouble> {
        let Some(pending) = self.window.get_mut(token) else {
            return Ok(None);
        };
        pending.suspect = None;
        let (id, position) = (pending.event.id().to_string(), pending.event.position());
        let is_its_own = |message: &Message| {
            let at = message
                .position
                .as_ref()
                .filter(|at| self.lineage.shares(at));
            at.is_some_and(|at| at.position == position)
        };
        let streams = self.connection.as_ref().map(|it| &it.streams);
        let known = streams.and_then(|it| it.get(stream));
        let known = known.map_or(0, |it| it.fence.known());
        let kept_from = streams.and_then(|it| it.get(stream)?.kept_from);
        // what is gone from before the first message was purged, if it was read so
        let is_purged =
            kept_from.is_some_and(|first_seq| seq < first_seq) && self.doubt.is_about(position);
        match found {
            // deleted or lost, this event or another with its id: it goes again until JetStream has forgotten the id
            None if kept_from.is_some() && !is_purged => {
                Err(Trouble::Reconnect(Cause::OtherAnswer { seq }))
            }
            Some(message) if message.id.as_deref() != Some(&id) => {
                // no duplicate of that
                Err(Trouble::Reconnect(Cause::OtherAnswer { seq }))
            }
            Some(message) if is_its_own(&message) => {
                self.tally.skipped += 1;
                self.window.resolve_at_cursor(Some((stream, seq)));
                self.settle();
                Ok(None)
            }
            // R16: gone, and it may have been this very event: also one that came since the stream was read
            None if self.doubt.is_about(position) || known < seq => {
                self.tally.skipped += 1;
                self.window.resolve_at_cursor(None);
                self.settle();
                Ok(None)
            }
            found => {
                self.tally.dropped += 1;
                self.window.resolve_at_cursor(None);
                self.settle();
                Ok(Some((id, found.unwrap_or_default())))
            }
        }
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
                        if let Some((index, seq)) = stored
                            && let Some(stream) = connected.streams.get_mut(index)
                        {
                            stream.on_resolved(seq, position);
                        }
                    }
                    if position > self.reached.anchor.position {
                        self.reached.event = Some(event);
                    }
                }
                Resolved::Boundary(boundary) => {
                    self.reached.stored_lsn = self.reached.stored_lsn.max(boundary.lsn);
                    self.reached.commit = boundary.commit.or(self.reached.commit);
                }
            }
        }
    }

    /// Where a stream ends for all that is known.
    pub fn end_of(&self, name: &str) -> Option<u64> {
        let mut streams = self.connection.iter().flat_map(|it| &it.streams);
        let stream = streams.find(|stream| stream.name() == name)?;
        Some(stream.fence.known())
    }

    /// The cut that is true now.
    pub fn cut(&self) -> Cut {
        if let Some(cut) = &self.cut_at_disconnect {
            return cut.clone();
        }
        let connected = self.connection.as_ref();
        let streams = connected.into_iter().flat_map(|connected| {
            let of_streams = connected.streams.iter().enumerate();
            let of_streams = of_streams.map(|(index, stream)| StreamCut {
                name: stream.name().to_string(),
                created: stream.created.clone(),
                read_after: self.read_after(connected, index),
                witness: stream.witness(&self.lineage),
            });
            of_streams.chain(connected.missing.iter().cloned())
        });
        Cut {
            anchor: self.anchor(),
            stored_lsn: self.reached.stored_lsn,
            streams: streams.collect(),
            quiescent: self.is_quiescent,
            lenient: self.continuity.is_lenient()
                && connected.is_some_and(|it| !it.evidence.is_empty()),
        }
    }

    /// The same, to be recorded.
    pub fn cut_to_record(&mut self) -> Cut {
        self.gate.on_cut();
        self.cut()
    }

    /// No event after the anchor has this sequence or a lower one.
    fn read_after(&self, connected: &Connected, index: usize) -> u64 {
        let out = self
            .window
            .events()
            .filter_map(|pending| match pending.state {
                State::Sent { stream, expected } if stream == index => Some(expected),
                State::Resolved(Some((stream, seq))) if stream == index => {
                    Some(seq.saturating_sub(1))
                }
                _ => None,
            });
        let evidence = connected
            .evidence
            .lowest_seq(index)
            .map(|seq| seq.saturating_sub(1));
        let anchor = self.anchor().position;
        let gone = self.doubt.lowest_gone(index, anchor);
        let gone = gone.map(|seq| seq.saturating_sub(1));
        let stream = connected.streams.get(index);
        let known = stream.map_or(0, |stream| stream.fence.known());
        out.chain(evidence)
            .chain(gone)
            .min()
            .unwrap_or(known)
            .min(known)
    }

    fn anchor(&self) -> Anchor {
        let Some(event) = &self.reached.event else {
            return self.reached.anchor.clone();
        };
        let position = event.position();
        let ended = self
            .reached
            .commit
            .filter(|commit| commit.lsn == position.commit_lsn);
        let time_us = ended.map(|commit| commit.time_us);
        let time_us = time_us.or_else(|| self.window.commit_time_us(position.commit_lsn));
        Anchor {
            position,
            event: Some(AnchorEvent {
                id: event.id().to_string(),
                commit_time_us: time_us
                    .expect("a batch tells the time of each transaction that it has events of"),
            }),
        }
    }

    /// The record holds the cut that was taken last.
    pub fn on_recorded(&mut self, now: Instant) {
        self.gate.on_recorded(now);
        for stream in self.connection.iter_mut().flat_map(|it| &mut it.streams) {
            stream.is_recorded = true;
        }
    }

    /// The record holds the cut that is true now, so it need not be written.
    pub fn on_recorded_again(&mut self, now: Instant) {
        self.gate.on_cut();
        self.on_recorded(now);
    }

    /// A record is to be written at once.
    pub fn wants_record(&self) -> bool {
        self.connection.is_some() && self.gate.wants_record()
    }

    /// Nothing more is published: whether everything that was, also by others before, is resolved, the next cut says.
    pub fn mark_quiescent(&mut self) {
        let (anchor, stored_lsn) = (self.anchor().position, self.reached.stored_lsn);
        self.is_quiescent = self.connection.is_some()
            && self.window.waiting() == 0
            && self.doubt.has_resolved_all(anchor, stored_lsn);
    }

    /// What is to be asked now, and the names of the answers: whether the streams still agree.
    pub fn looks(&mut self, now: Instant) -> Vec<(u64, Look)> {
        let Some(connected) = &mut self.connection else {
            return Vec::new();
        };
        connected.looked_at = now;
        connected.looks.clear();
        let mut looks = Vec::new();
        for (index, stream) in connected.streams.iter().enumerate() {
            let name = || stream.name().to_string();
            let token = 2 * index as u64;
            connected
                .looks
                .push((token, Expected::End(stream.fence.known())));
            looks.push((token, Look::Stream(name())));
            if let Some(witness) = stream.witness(&self.lineage) {
                looks.push((token + 1, Look::Message(name(), witness.seq)));
                connected
                    .looks
                    .push((token + 1, Expected::Witness(witness)));
            }
        }
        looks
    }

    /// The answer to a [`Look::Stream`]. R22.
    pub fn on_look(&mut self, token: u64, created: &str, last_seq: u64) -> Result<(), Trouble> {
        self.on_looked(token, |stream, expected| {
            let ends = matches!(expected, Expected::End(known) if last_seq >= *known);
            ends && stream.created == created
        })
    }

    /// The answer to a [`Look::Message`]. R22.
    pub fn on_witness(&mut self, token: u64, found: Option<&Message>) -> Result<(), Trouble> {
        let lineage = self.lineage.clone();
        self.on_looked(token, |_, expected| match (found, expected) {
            (Some(found), Expected::Witness(witness)) => found.is_at(&witness.position, &lineage),
            _ => true,
        })
    }

    fn on_looked(
        &mut self,
        token: u64,
        agrees: impl Fn(&Stream, &Expected) -> bool,
    ) -> Result<(), Trouble> {
        let Some(connected) = &mut self.connection else {
            return Ok(());
        };
        let Some(at) = connected.looks.iter().position(|(of, _)| *of == token) else {
            return Ok(());
        };
        let (_, expected) = connected.looks.swap_remove(at);
        if let Some(stream) = connected.streams.get((token / 2) as usize)
            && !agrees(stream, &expected)
        {
            return Err(Trouble::Reconnect(Cause::Disagrees(
                stream.name().to_string(),
            )));
        }
        if connected.looks.is_empty() {
            connected.agreed_at = connected.looked_at;
        }
        Ok(())
    }

    /// Postgres may be told what has matured. R19, R22.
    pub fn may_confirm(&self, now: Instant) -> bool {
        let connected = self.connection.as_ref();
        self.continuity.is_proven()
            && connected.is_some_and(|it| now.saturating_duration_since(it.agreed_at) <= AGREED_FOR)
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
