//! Every decision of the publishing side: what to publish next, what an answer means, where to go on after a lost
//! connection, when to halt. Pure: no socket, clock or thread; time comes in.
//!
//! [`exactly_once`] is the default delivery, [`at_least_once`] the other one. Both keep what Postgres sent in a [`window`].
//! Exactly-once has a [`fence`] for each [`stream`], and publishes what [`evidence`] does not show to be stored; [`resume`]
//! finds out where to go on, [`continuity`] proves that the WAL is the one that the streams were written from, [`doubt`] is
//! about messages that are gone, the [`gate`] bounds what the record lacks, and [`agreement`] asks whether all still is so. [`capacity`] is how large an event may be,
//! [`culprit`] which one the server ends the connection over, [`trouble`] why things cannot go on. [`rules`] lists the rules that are cited as R1, R2 …

pub mod agreement;
pub mod at_least_once;
pub mod capacity;
pub mod continuity;
pub mod culprit;
pub mod doubt;
pub mod elsewhere;
pub mod evidence;
pub mod exactly_once;
pub mod fence;
pub mod gate;
pub mod resume;
pub mod rules;
pub mod stream;
pub mod trouble;
pub mod window;

use crate::jetstream::ack::{AckError, Origin, PubAck};
use crate::jetstream::wire::Publish;
use crate::nats::EndedBy;
use crate::outbox::batch::{Batch, Event, OutboxEvent};
use crate::postgres::Lsn;
use at_least_once::AtLeastOnce;
use capacity::TooLarge;
use exactly_once::ExactlyOnce;
use std::sync::Arc;
use std::time::Instant;
use trouble::{Cause, Refusal, Trouble};
use window::Window;

/// What to do next.
#[derive(Debug)]
pub enum Next {
    /// Publish this.
    Publish(Publish),
    /// Send a PING behind what was published, and report its answer.
    Ping,
    /// Read these sequences of the stream of that name, and hand over what is there.
    Read {
        /// The stream.
        stream: String,
        /// The first sequence.
        from: u64,
        /// The last one.
        to: u64,
    },
    /// The event is larger than may go: replace it, give it up, or halt.
    TooLarge {
        /// Names the event.
        token: u64,
        /// How large it is.
        too_large: TooLarge,
    },
    /// Nothing now: the window is full or empty, or what comes next waits for answers or for a record.
    Nothing,
}

/// Counters since the core was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Events stored by us.
    pub published: u64,
    /// Bytes of their bodies.
    pub published_bytes: u64,
    /// Events found stored on resume.
    pub already_stored: u64,
    /// Events dropped because an earlier event had used their id.
    pub dropped: u64,
    /// Of the published, those that were parked.
    pub parked: u64,
    /// Events given up.
    pub given_up: u64,
    /// Events published after later ones of their stream: those had passed while the subject was moved, while the event was
    /// refused, or behind a foreign message.
    pub late: u64,
    /// Foreign messages that took the place of a publish, which was then repeated.
    pub foreign: u64,
}

/// The publishing side, whichever the delivery.
#[derive(Debug)]
pub enum Core {
    /// The default.
    ExactlyOnce(Box<ExactlyOnce>),
    /// Without a fence.
    AtLeastOnce(Box<AtLeastOnce>),
}

macro_rules! either {
    ($core:expr, $it:ident => $call:expr) => {
        match $core {
            Core::ExactlyOnce($it) => $call,
            Core::AtLeastOnce($it) => $call,
        }
    };
}

impl Core {
    /// Takes the next changes of the copy stream.
    pub fn offer(&mut self, batch: &Arc<Batch>) -> Result<(), Trouble> {
        either!(self, it => it.offer(batch))
    }

    /// Another batch is wanted.
    pub fn wants_batch(&self) -> bool {
        either!(self, it => it.wants_batch())
    }

    /// The next thing to do; to be called until it says [`Next::Nothing`].
    pub fn next(&mut self, now: Instant) -> Result<Next, Trouble> {
        either!(self, it => it.next(now))
    }

    /// The answer to a publish of this connection, by its name. Returns the token of the event that is stored by it.
    pub fn answer(
        &mut self,
        reply: u64,
        answer: Result<(PubAck, Arc<Origin>), AckError>,
        now: Instant,
    ) -> Result<Option<u64>, Trouble> {
        either!(self, it => it.answer(reply, answer, now))
    }

    /// The last [`Next::Ping`] is answered.
    pub fn on_pong(&mut self) {
        either!(self, it => it.culprit.on_pong());
    }

    /// Only what [`Core::next`] says may be sent now.
    pub fn is_probing(&self) -> bool {
        either!(self, it => it.culprit.is_probing())
    }

    /// The connection is over; `words`: what is said of it. To be followed by [`Core::on_disconnect`].
    pub fn on_end(&mut self, by: EndedBy, words: &str) -> Result<(), Trouble> {
        let out = self.window().sent();
        let Some(token) = either!(self, it => it.culprit.on_end(by, out)) else {
            return Ok(());
        };
        let why = match by {
            EndedBy::Complaint => Refusal::ByServer(words.into()),
            EndedBy::Silence | EndedBy::Other => Refusal::Silence,
        };
        Err(either!(self, it => it.refused(token, why)))
    }

    /// When what lags behind is read again.
    pub fn read_again_at(&self) -> Option<Instant> {
        match self {
            Core::ExactlyOnce(core) => core.read_again_at(),
            Core::AtLeastOnce(_) => None,
        }
    }

    /// When something that is due has not come in time.
    pub fn deadline(&self) -> Option<Instant> {
        let ack_timeout = self.window().limits().ack_timeout;
        let pinged_at = either!(self, it => it.culprit.pinged_at());
        let pong = pinged_at.map(|at| at + ack_timeout);
        self.window().deadline().into_iter().chain(pong).min()
    }

    /// Time has passed. R12.
    pub fn tick(&self, now: Instant) -> Result<(), Trouble> {
        match self.deadline() {
            Some(deadline) if now >= deadline => Err(Trouble::Reconnect(Cause::AckTimeout)),
            _ => Ok(()),
        }
    }

    /// The event that waits under this token.
    pub fn event(&self, token: u64) -> Option<OutboxEvent<'_>> {
        Some(self.window().get(token)?.event.view())
    }

    /// Another form of the event under this token, at its position, is to be published in its place. Only of one
    /// that is not on its way.
    pub fn replace(&mut self, token: u64, event: Event) {
        either!(self, it => it.replace(token, event));
    }

    /// The event under this token is not published at all. Only of one that is not on its way.
    pub fn give_up(&mut self, token: u64) {
        if let Some(pending) = self.window().get(token) {
            let mut event = pending.event.clone();
            event.give_up();
            self.replace(token, event);
        }
    }

    /// How many bytes of id, headers and body may go to `subject`.
    pub fn room(&self, subject: &str) -> usize {
        either!(self, it => it.room(subject))
    }

    /// The limits of the server or the account have changed.
    pub fn set_max_payload(&mut self, max_payload: usize) {
        either!(self, it => it.set_max_payload(max_payload));
    }

    /// The connection is gone.
    pub fn on_disconnect(&mut self) {
        match self {
            Core::ExactlyOnce(core) => {
                core.on_disconnect();
            }
            Core::AtLeastOnce(core) => core.on_disconnect(),
        }
    }

    /// What Postgres sent and is not resolved.
    pub fn window(&self) -> &Window {
        either!(self, it => it.window())
    }

    /// Everything up to here is resolved.
    pub fn stored_lsn(&self) -> Lsn {
        either!(self, it => it.stored_lsn())
    }

    /// The streams of the events, and where each ends for all that is known.
    pub fn stream_ends(&self) -> Vec<(String, u64)> {
        match self {
            Core::ExactlyOnce(core) => core.stream_ends(),
            Core::AtLeastOnce(_) => Vec::new(),
        }
    }

    /// The counters.
    pub fn tally(&self) -> Tally {
        either!(self, it => it.tally())
    }
}
