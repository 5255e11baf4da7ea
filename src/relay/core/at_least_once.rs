//! At-least-once delivery: no fence, no cut, no evidence. What is acknowledged is told to Postgres; one publish per subject
//! is on its way at a time, so that order is kept within a subject. Pure.

use super::capacity::Capacity;
use super::culprit::{self, Alone, Culprit};
use super::elsewhere::Elsewhere;
use super::trouble::{Cause, Halt, Refusal, Trouble};
use super::window::{Limits, Resolved, State, Window};
use super::{Next, Tally};
use crate::jetstream::ack::{AckError, AckErrorKind, Origin, PubAck};
use crate::jetstream::wire::Publish;
use crate::outbox::batch::{Batch, Event, Fate};
use crate::postgres::Lsn;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

/// The state machine.
#[derive(Debug)]
pub struct AtLeastOnce {
    window: Window,
    capacity: Option<Capacity>,
    /// Those that a publish is on its way to.
    subjects: HashSet<Box<str>>,
    pub(super) culprit: Culprit,
    elsewhere: Elsewhere,
    stored_lsn: Lsn,
    tally: Tally,
}

impl AtLeastOnce {
    /// For one copy stream, over a connection.
    pub fn start(limits: Limits, capacity: Capacity) -> AtLeastOnce {
        AtLeastOnce {
            window: Window::new(limits),
            capacity: Some(capacity),
            subjects: HashSet::new(),
            culprit: Culprit::default(),
            elsewhere: Elsewhere::default(),
            stored_lsn: Lsn::INVALID,
            tally: Tally::default(),
        }
    }

    /// A new connection to NATS.
    pub fn resume(&mut self, capacity: Capacity) {
        self.elsewhere.on_connect(&capacity.routes);
        self.capacity = Some(capacity);
    }

    /// The connection is gone: what was not acknowledged is published again.
    pub fn on_disconnect(&mut self) {
        self.culprit.on_disconnect();
        self.capacity = None;
        self.window.on_disconnect();
        self.subjects.clear();
    }

    /// Takes the next changes of the copy stream.
    pub fn offer(&mut self, batch: &Arc<Batch>) -> Result<(), Trouble> {
        self.window.offer(batch).map_err(Trouble::OutOfOrder)?;
        self.settle();
        Ok(())
    }

    /// Another batch is wanted.
    pub fn wants_batch(&self) -> bool {
        self.capacity.is_some() && self.window.wants_batch()
    }

    /// The next thing to do; to be called until it says [`Next::Nothing`].
    pub fn next(&mut self, now: Instant) -> Result<Next, Trouble> {
        if self.culprit.pings_after(now) {
            return Ok(Next::Ping);
        }
        loop {
            let Some(capacity) = &self.capacity else {
                return Ok(Next::Nothing);
            };
            if self.culprit.is_out() {
                break;
            }
            let Some((token, pending)) = self.window.at_cursor() else {
                break;
            };
            let event = pending.event.clone();
            if !self.window.has_room(event.spans().size()) {
                break;
            }
            if event.fate() == Fate::Lose {
                self.tally.given_up += 1;
                self.window.resolve_at_cursor(None);
                self.settle();
                continue;
            }
            let subject = event.subject();
            if self.subjects.contains(subject) {
                break;
            }
            if let Err(too_large) = capacity.spare(subject, event.spans(), None, None) {
                return Ok(Next::TooLarge { token, too_large });
            }
            if capacity.routes.route(subject).is_none() {
                return Err(Trouble::Reconnect(Cause::NoStream(subject.to_string())));
            }
            if self.culprit.is_suspect(token) {
                if self.window.waiting() > 0 {
                    break;
                }
                match self.culprit.before(now) {
                    Alone::Ping => return Ok(Next::Ping),
                    Alone::Wait => break,
                    Alone::Publish => {}
                }
            }
            self.subjects.insert(subject.into());
            self.window.send_at_cursor(0, 0, false, now);
            self.culprit.on_published(token);
            return Ok(Next::Publish(Publish {
                event,
                token,
                reply: token,
                expected_last_sequence: None,
                expected_last: None,
                expected_stream: None,
                is_late: false,
                transaction_end: None,
            }));
        }
        self.settle();
        Ok(Next::Nothing)
    }

    /// The answer to a publish of this connection, by its name. Returns the token of the event that is stored by it.
    pub fn answer(
        &mut self,
        token: u64,
        answer: Result<(PubAck, Arc<Origin>), AckError>,
        now: Instant,
    ) -> Result<Option<u64>, Trouble> {
        let sent = |state| matches!(state, State::Sent { .. });
        let Some(pending) = self.window.get(token).filter(|it| sent(it.state)) else {
            return Ok(None);
        };
        let is_parked = pending.event.fate() == Fate::Park;
        let subject: Box<str> = pending.event.subject().into();
        let bytes = pending.event.spans().body_len() as u64;
        self.culprit.on_answer();
        let (ack, origin) = match answer {
            Ok(ack) => ack,
            Err(error) => return Err(self.on_refusal(token, error)),
        };
        // R5: a leaf node's or a mapping's stream is not the one that the events are for
        let routes = self.capacity.as_ref().map(|it| &it.routes);
        if let Some(routes) = routes
            && let Some(home) = routes.home(&subject)
            && *home != *origin
        {
            let (stream, answered) = (home.stream.clone(), origin.to_string());
            return Err(self.elsewhere.on_answer(stream, answered, routes, now));
        }
        // a duplicate is stored too, unless it is the false answer of nats-server 2.10, which names no sequence
        if ack.seq == 0 {
            return Err(Trouble::Reconnect(Cause::OtherAnswer { seq: 0 }));
        }
        self.subjects.remove(&subject);
        self.tally.published += 1;
        self.tally.published_bytes += bytes;
        self.tally.parked += u64::from(is_parked);
        if !is_parked {
            self.culprit.on_stored(token, &origin.stream);
        }
        // what is acknowledged stays so: nothing is read back
        self.window.on_stored(token, None, now);
        self.settle();
        Ok(Some(token))
    }

    fn on_refusal(&mut self, token: u64, error: AckError) -> Trouble {
        let kind = error.kind();
        match kind {
            AckErrorKind::Poison => self.refused(token, Refusal::ByStream(error)),
            AckErrorKind::Closed | AckErrorKind::Unknown
                if self.culprit.on_refusal(token, kind) == culprit::Next::Never =>
            {
                let stream = self.stream_of(token);
                match kind {
                    AckErrorKind::Closed => Trouble::Halt(Halt::Closed { stream, error }),
                    _ => self.refused(token, Refusal::Unknown(error)),
                }
            }
            _ => Trouble::Reconnect(Cause::Refused(error)),
        }
    }

    /// The event under this token can never be published as it is.
    pub(super) fn refused(&mut self, token: u64, why: Refusal) -> Trouble {
        let stream = self.stream_of(token);
        match self.window.get(token) {
            Some(pending) if why.is_doubtful() && !self.culprit.may_put_aside(&stream) => {
                Trouble::Halt(Halt::EachRefused {
                    stream,
                    position: pending.event.position(),
                    id: pending.event.id().to_string(),
                    why,
                })
            }
            _ => Trouble::Refused { token, why },
        }
    }

    /// The name of the stream that the event under this token goes to.
    fn stream_of(&self, token: u64) -> String {
        let pending = self.window.get(token);
        let routes = self.capacity.as_ref().map(|it| &it.routes);
        let home = pending.and_then(|it| routes?.home(it.event.subject()));
        home.map(|it| it.stream.clone()).unwrap_or_default()
    }

    fn settle(&mut self) {
        while let Some(resolved) = self.window.pop() {
            if let Resolved::Boundary(boundary) = resolved {
                self.stored_lsn = self.stored_lsn.max(boundary.lsn);
            }
        }
    }

    /// Another form of the event under this token is to be published in its place. Only of one that is not on its way.
    pub fn replace(&mut self, token: u64, event: Event) {
        self.window.replace(token, event);
    }

    /// How many bytes of id, headers and body may go to `subject`.
    pub fn room(&self, subject: &str) -> usize {
        self.capacity.as_ref().map_or(0, |it| it.room(subject))
    }

    /// The limits of the server or the account have changed.
    pub fn set_max_payload(&mut self, max_payload: usize) {
        if let Some(capacity) = &mut self.capacity {
            capacity.max_payload = max_payload;
        }
    }

    /// The window.
    pub fn window(&self) -> &Window {
        &self.window
    }

    /// Everything up to here is acknowledged.
    pub fn stored_lsn(&self) -> Lsn {
        self.stored_lsn
    }

    /// The counters.
    pub fn tally(&self) -> Tally {
        self.tally
    }
}
