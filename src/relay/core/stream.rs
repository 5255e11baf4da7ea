//! A stream as the [`core`](super) knows it over one connection: what may go to it, and what is known to stand in it.

use super::StreamAtConnect;
use super::memory::{Mark, Remembered};
use crate::jetstream::Delivery;
use crate::jetstream::chain::Chain;
use crate::jetstream::resume::{Checkpoint, Tail};
use crate::outbox::batch::Event;
use crate::outbox::position::{Position, Source, SourcePosition};
use std::time::{Duration, Instant};

/// So long after a message of somebody else a replicated stream gets one publish at a time.
const SHARED_FOR: Duration = Duration::from_secs(600);

/// Until it is read, at connect, nothing is known of its end.
#[derive(Debug)]
pub struct Stream {
    pub name: String,
    pub created: String,
    pub replicas: u32,
    /// What was published last over this connection.
    pub previous: Option<Event>,
    pub chain: Chain,
    pub tail: Tail,
    pub aged: Option<Position>,
    pub has_young: bool,
    pub keeps_from: Option<u64>,
    /// Everything up to this event stands at or before its sequence, and nothing behind it does.
    pub last: Option<Checkpoint>,
    /// The highest sequence that was acknowledged or read.
    pub acked_seq: u64,
    /// What that was when the stream was asked where it ends; the answer may come behind later acks.
    pub asked_at: Option<u64>,
    /// Others write to the stream.
    pub shared: bool,
    /// Somebody else has, whom the next connection may show to be another relay with our slot.
    pub met_others: bool,
    /// When that was last seen.
    pub others_at: Option<Instant>,
    /// Nothing was published behind `last`: what is gone from there was somebody else's, or may have been.
    pub at_rest: bool,
    /// Where it ended when that was seen last.
    pub read_to: u64,
    /// The sequence of the last settled event: what a confirmation may rest on.
    pub settled_seq: u64,
    /// What the confirmed LSN rests on.
    pub confirmed_seq: u64,
}

impl Stream {
    /// One of which this is known.
    pub fn new(known: Remembered) -> Stream {
        Stream {
            name: known.name,
            created: known.created,
            replicas: 0,
            previous: None,
            chain: Chain::new(0),
            tail: Tail::default(),
            aged: None,
            has_young: false,
            keeps_from: None,
            last: known.last,
            acked_seq: known.acked_seq,
            asked_at: None,
            shared: known.shared,
            met_others: known.met_others,
            others_at: known.others_at,
            at_rest: known.at_rest,
            read_to: 0,
            settled_seq: known.confirmed_seq,
            confirmed_seq: known.confirmed_seq,
        }
    }

    /// What the next session has to know.
    pub fn remember(self) -> Remembered {
        Remembered {
            name: self.name,
            created: self.created,
            last: self.last,
            acked_seq: self.acked_seq,
            shared: self.shared,
            met_others: self.met_others,
            at_rest: self.at_rest,
            others_at: self.others_at,
            confirmed_seq: self.confirmed_seq,
        }
    }

    /// What is worth keeping over a restart; `at_rest`: nothing is on its way.
    pub fn mark(&self, source: &Source, at_rest: bool) -> Mark {
        let at = |last: &Checkpoint| SourcePosition {
            source: source.clone(),
            position: last.position,
        };
        Mark {
            name: self.name.clone(),
            created: self.created.clone(),
            last: self.last.as_ref().map(|last| (last.seq, at(last))),
            shared: self.shared || self.met_others,
            at_rest,
            settled_seq: self.settled_seq,
            confirmed_seq: self.confirmed_seq,
        }
    }

    /// It was read at connect.
    pub fn is_read(&mut self, found: StreamAtConnect, delivery: Delivery, now: Instant) {
        let mut tail = found.tail;
        if self.last.is_some() && tail.has_others() {
            self.has_met_others(now);
        }
        self.shared |= std::mem::take(&mut self.met_others);
        let mut is_theirs = false;
        if self.shared {
            // what is gone may have been theirs: rather twice than never
            tail.consumed = 0;
        } else {
            // where we are alone nothing can be missing
            tail.between = None;
            is_theirs = self.at_rest && tail.consumed > 0;
        }
        if let Some(stored) = &tail.stored {
            self.acked_seq = self.acked_seq.max(stored.seq);
            if tail.between.is_none() {
                self.last = Some(stored.clone());
            }
        } else if self.last.is_none() && delivery == Delivery::ExactlyOnce {
            // nothing of ours up to here: what the checkpoint has to say before the first ack, or what
            // is published and consumed away until it is next written would come again
            self.last = Some(Checkpoint {
                seq: found.last_seq,
                position: Position::default(),
                id: None,
            });
        }
        self.chain = Chain::new(found.last_seq);
        self.read_to = found.last_seq;
        self.asked_at = None;
        self.replicas = found.replicas;
        self.previous = None;
        self.tail = tail;
        if is_theirs {
            self.leave_out_what_is_gone();
        }
        // an event that was published late is younger than its position tells
        self.aged = found.aged.filter(|_| !self.shared || found.replicas <= 1);
        self.has_young = found.has_young;
        self.keeps_from = found.keeps_from;
    }

    /// Whether another publish may go. On a replicated stream that others write to, a pipeline is no fence: see
    /// [`Between`](crate::jetstream::resume::Between).
    pub fn has_room(&self, now: Instant) -> bool {
        let others = self.others_at.is_some_and(|at| now < at + SHARED_FOR);
        self.replicas <= 1 || !others || self.chain.is_settled()
    }

    /// A message that was gone from there was deleted or lost, and not consumed.
    pub fn keeps(&self, seq: u64) -> bool {
        self.keeps_from.is_some_and(|from| seq >= from)
    }

    /// What is gone from the stream's end, as it was read, was none of ours, and is not counted from here on either.
    pub fn leave_out_what_is_gone(&mut self) {
        self.tail.consumed = 0;
        if let Some(last) = &mut self.last {
            last.seq = last.seq.max(self.read_to);
            self.acked_seq = self.acked_seq.max(last.seq);
        }
    }

    /// Somebody else's message has come behind ours, whether it is still there or not.
    pub fn has_met_others(&mut self, now: Instant) {
        self.met_others = true;
        self.others_at = Some(now);
    }

    /// The length of the id that the next publish names, where it names one.
    pub fn last_id_len(&self) -> Option<usize> {
        let previous = self.previous.as_ref().filter(|_| self.replicas == 1);
        previous.map(|last| last.spans().id_len())
    }

    /// The event at `position`, and all before it, stand in the stream, this one at `seq` (0: not known). While
    /// one that was published late settles, later ones stand before it: only once these are settled too, nothing
    /// behind the position stands at or before the sequence. And one that was published late may have been confirmed
    /// since, so that Postgres does not send it again: it stands at the tail at the latest.
    pub fn settle(&mut self, position: Position, seq: u64) {
        self.settled_seq = self.settled_seq.max(seq);
        let tail_seq = self.tail.stored.as_ref().map_or(0, |stored| stored.seq);
        if let Some(last) = &mut self.last
            && seq > 0
            && position > last.position
            && !self.tail.is_before_end(position)
        {
            *last = Checkpoint {
                seq: last.seq.max(self.settled_seq).max(tail_seq),
                position,
                id: None,
            };
        }
    }
}
