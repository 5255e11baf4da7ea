//! What is read while nothing is published: what came to a stream that refused something, and what an event is called a
//! duplicate of.

use super::super::Next;
use super::super::evidence::Message;
use super::super::stream::Stream;
use super::super::trouble::{Cause, Trouble};
use super::super::window::{State, Stored};
use super::{Asked, ExactlyOnce};
use crate::outbox::batch::Event;
use crate::outbox::position::Position;
use std::time::Instant;

impl ExactlyOnce {
    /// Of a stream to which something was refused, what came since is to be read once every publish to it is answered. R7.
    pub(super) fn next_read(&mut self, now: Instant) -> Option<Next> {
        let connected = self.connection.as_mut()?;
        if connected.asked.is_some() {
            return None;
        }
        let mut streams = connected.streams.iter_mut().enumerate();
        let is_due = |stream: &Stream| stream.read_again_at().is_none_or(|at| at <= now);
        let (index, stream) = streams.find(|(_, stream)| {
            stream.fence.is_broken() && stream.fence.waiting() == 0 && is_due(stream)
        })?;
        if let Some(gap) = stream.gap(&self.lineage) {
            connected.asked = Some(Asked::Gap(index));
            return Some(Next::Read {
                stream: stream.name().to_string(),
                from: *gap.start(),
                to: *gap.end(),
            });
        }
        self.restart(index, 0);
        self.next_read(now)
    }

    fn restart(&mut self, index: usize, found: u64) {
        let stream = self
            .connection
            .as_mut()
            .and_then(|it| it.streams.get_mut(index));
        if let Some(stream) = stream {
            stream.restart(found, &self.lineage);
            self.window.on_refused(index);
        }
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
                self.on_gap(index, messages, now)?;
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
    fn on_gap(
        &mut self,
        index: usize,
        messages: Vec<(u64, Option<Message>)>,
        now: Instant,
    ) -> Result<(), Trouble> {
        let out: Vec<Position> = (self.window.events())
            .filter(|it| matches!(it.state, State::Resolved(_)))
            .map(|it| it.event.position())
            .collect();
        let resolved = self.reached.event.as_ref().map(Event::position);
        let resolved = resolved.unwrap_or_default().max(self.reached.before);
        let Some(connected) = &mut self.connection else {
            return Ok(());
        };
        let stream = connected.streams.get_mut(index);
        let known = (stream.as_ref()).map_or(0, |stream| stream.fence.known());
        if let Some(stream) = &stream
            && let Some(witness) = stream.witness(&self.lineage)
            && let Some((_, Some(found))) = messages.iter().find(|(seq, _)| *seq == witness.seq)
            && !found.is_at(&witness.position, &self.lineage)
        {
            // R22
            let cause = Cause::Disagrees(stream.name().to_string());
            return Err(Trouble::Reconnect(cause));
        }
        // R7: late copies of ours may be among what comes, so it is read again
        let may_lag = stream.as_ref().is_some_and(|stream| stream.may_lag);
        if let Some(stream) = stream
            && stream.lacks_its_end(&messages)
        {
            return match stream.on_lag(now) {
                true => Err(Trouble::Reconnect(Cause::Lags(stream.name().to_string()))),
                false => Ok(()),
            };
        }
        let is_there = |(seq, message): &(u64, Option<Message>)| message.as_ref().map(|_| *seq);
        let end = messages.iter().filter_map(is_there).max();
        let (mut foreign, mut last) = (0, 0);
        for (seq, message) in messages.into_iter().filter(|(seq, _)| *seq > known) {
            let Some(message) = message else {
                // what is missing at the end of a stream that may lag may come yet: the next publish names it, and tells
                if !may_lag || Some(seq) < end {
                    self.doubt.on_gone(index, seq, None);
                }
                continue;
            };
            last = last.max(seq);
            match message.ours(&self.lineage) {
                Some(position) => {
                    if position > resolved && !out.contains(&position) {
                        connected.evidence.add(position, index, &message);
                        if position.commit_lsn < self.earlier_upto {
                            connected.evidence_upto = connected.evidence_upto.max(position);
                        }
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
        Ok(())
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
        // in place of another WAL, or counted otherwise, its own message may have another position
        let is_lenient = self.continuity.is_lenient();
        let is_its_own = |message: &Message| {
            let at = message
                .position
                .as_ref()
                .filter(|at| self.lineage.shares(at));
            at.is_some_and(|at| is_lenient || at.position == position)
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
                self.tally.already_stored += 1;
                let at = message.position.map(|at| at.position);
                self.window.resolve_at_cursor(Some(Stored {
                    stream,
                    seq,
                    counts: !message.is_parked && at == Some(position),
                }));
                self.settle();
                Ok(None)
            }
            // R16: gone, and it may have been this very event: also one that came since the stream was read
            None if self.doubt.is_about(position) || known < seq => {
                self.tally.already_stored += 1;
                self.window.resolve_at_cursor(None);
                self.settle();
                let streams = self.connection.as_mut().map(|it| &mut it.streams);
                if let Some(stream) = streams.and_then(|it| it.get_mut(stream)) {
                    stream.on_gone(position);
                }
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
}
