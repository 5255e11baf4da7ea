//! What the answer to a publish means: an ack, a refusal, a duplicate.

use super::super::culprit;
use super::super::fence::AnswerFor;
use super::super::trouble::{Cause, Halt, Refusal, Trouble};
use super::super::window::{State, Stored};
use super::ExactlyOnce;
use crate::jetstream::ack::{AckError, AckErrorKind, Origin, PubAck};
use crate::outbox::batch::Fate;
use std::sync::Arc;
use std::time::Instant;

impl ExactlyOnce {
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
        let State::Sent {
            expected, is_late, ..
        } = pending.state
        else {
            return Ok(None);
        };
        // R6
        if ack.seq != expected + 1 {
            return Err(Trouble::Reconnect(Cause::OtherAnswer { seq: ack.seq }));
        }
        stream.on_ack(expected, pending.event.position());
        let is_parked = pending.event.fate() == Fate::Park;
        if !is_parked {
            self.culprit.on_stored(token, stream.name());
        }
        // not before: it may be a duplicate
        self.tally.late += u64::from(is_late);
        let stored = Stored {
            stream: index,
            seq: ack.seq,
            counts: !is_parked,
        };
        self.window.on_stored(token, Some(stored), now);
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
                stream.on_other_end(end);
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
    pub(in crate::relay::core) fn refused(&mut self, token: u64, why: Refusal) -> Trouble {
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
}
