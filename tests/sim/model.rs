//! The two servers, as far as the relay can tell them from the real ones: a slot that replays whole
//! transactions, and streams that check the expected sequence and remember message ids.

use jetstream_outbox::jetstream::ack::{AckError, ApiError, PubAck};
use jetstream_outbox::jetstream::resume::OUTBOX_POSITION;
use jetstream_outbox::jetstream::streams::StoredMessage;
use jetstream_outbox::outbox::position::{Position, Source, SourcePosition};
use jetstream_outbox::postgres::Lsn;
use jetstream_outbox::relay::checkpoint::{Value, Write};
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// A committed row.
#[derive(Clone, Debug)]
pub struct Event {
    pub position: Position,
    pub id: String,
    /// Which stream captures it, and the how-manieth of that stream it is.
    pub stream: usize,
    pub nth: usize,
    /// An earlier event had the id already: this one may be dropped.
    pub reused: bool,
    /// The log it was committed to, and whether it went with the end of that one.
    pub timeline: u32,
    pub forgotten: bool,
    /// It is parked, and meant for this stream, which it is too large for.
    pub too_large_for: Option<usize>,
}

pub struct Transaction {
    pub commit_lsn: Lsn,
    pub end_lsn: Lsn,
    pub events: Vec<Event>,
}

/// The log and the slot.
#[derive(Default)]
pub struct Postgres {
    pub transactions: Vec<Transaction>,
    pub wal_end: Lsn,
    pub confirmed: Lsn,
}

impl Postgres {
    pub fn commit(&mut self, events: Vec<Event>) {
        let commit_lsn = Lsn(self.wal_end.0 + 10);
        let events = events.into_iter().zip(1..).map(|(event, ordinal)| Event {
            position: Position {
                commit_lsn,
                ordinal,
            },
            ..event
        });
        self.transactions.push(Transaction {
            commit_lsn,
            end_lsn: Lsn(commit_lsn.0 + 5),
            events: events.collect(),
        });
        self.wal_end = Lsn(commit_lsn.0 + 5);
    }

    /// A standby takes over that has the log up to `switch_point` only. Returns the events it lacks.
    pub fn fail_over(&mut self, switch_point: Lsn) -> Vec<Event> {
        let kept = self
            .transactions
            .partition_point(|transaction| transaction.commit_lsn < switch_point);
        self.wal_end = switch_point;
        let lacking = self.transactions.split_off(kept).into_iter();
        lacking.flat_map(|transaction| transaction.events).collect()
    }

    /// The first transaction that the slot still sends.
    pub fn first_unconfirmed(&self) -> usize {
        self.transactions
            .partition_point(|transaction| transaction.commit_lsn < self.confirmed)
    }
}

/// A publish on the wire.
#[derive(Clone, Debug)]
pub struct Flight {
    pub token: u64,
    /// The name of its answer.
    pub reply: u64,
    pub event: Event,
    pub expected: Option<u64>,
    /// The id of the message that must be the last one.
    pub expected_last: Option<String>,
}

pub struct Stored {
    /// `None`: a foreign message.
    pub event: Option<Event>,
    pub time: Instant,
}

/// A stream of the server.
pub struct Stream {
    pub name: &'static str,
    pub subjects: &'static str,
    /// Replicated streams look at the id before the expected sequence.
    pub replicated: bool,
    /// No message goes before older ones do.
    pub keeps_its_end: bool,
    pub window: Duration,
    pub last_seq: u64,
    /// The id of the last message, also once it was consumed.
    last_id: Option<String>,
    /// What it holds.
    pub messages: BTreeMap<u64, Stored>,
    /// What it was given and did not lose, consumed or not: sequence, `nth`, time.
    pub history: Vec<(u64, usize, Instant)>,
    ids: HashMap<String, (u64, Instant)>,
}

pub fn refused(code: u32, err_code: u32, description: &str) -> AckError {
    AckError::Api(ApiError {
        code,
        err_code,
        description: description.to_string(),
    })
}

fn wrong_last_sequence(seq: u64) -> AckError {
    refused(400, 10071, &format!("wrong last sequence: {seq}"))
}

/// The checkpoint's key in its bucket.
#[derive(Default)]
pub struct Key {
    last_seq: u64,
    /// When it was written, at which sequence, and what with.
    values: Vec<(Instant, u64, Vec<u8>)>,
}

impl Key {
    fn revision(&self) -> u64 {
        self.values.last().map_or(0, |(_, seq, _)| *seq)
    }

    /// Times are since `begun`.
    pub fn read(&self, begun: Instant, now: Instant) -> Value {
        let since = |time: Instant| (time - begun).as_millis() as i64;
        Value {
            stored_ms: self.values.last().map(|(time, ..)| since(*time)),
            time_ms: Some(since(now)),
            seq: self.revision(),
            revision: self.revision(),
            body: self
                .values
                .last()
                .map_or(Vec::new(), |(.., body)| body.clone()),
        }
    }

    pub fn put(&mut self, write: &Write, now: Instant) -> Result<PubAck, AckError> {
        if write.revision != self.revision() {
            return Err(wrong_last_sequence(self.revision()));
        }
        self.last_seq += 1;
        self.values.push((now, self.last_seq, write.body.clone()));
        Ok(PubAck {
            seq: self.last_seq,
            duplicate: false,
        })
    }

    /// The server comes back without what was written after `since`; it may count on.
    pub fn roll_back(&mut self, since: Instant, counts_on: bool) {
        self.values.retain(|(time, ..)| *time <= since);
        if !counts_on {
            self.last_seq = self.revision();
        }
    }
}

impl Stream {
    pub fn new(
        name: &'static str,
        subjects: &'static str,
        replicated: bool,
        keeps_its_end: bool,
        window: Duration,
    ) -> Stream {
        Stream {
            name,
            subjects,
            replicated,
            keeps_its_end,
            window,
            last_seq: 0,
            last_id: None,
            messages: BTreeMap::new(),
            history: Vec::new(),
            ids: HashMap::new(),
        }
    }

    /// A publish arrives.
    pub fn publish(&mut self, flight: &Flight, now: Instant) -> Result<PubAck, AckError> {
        let other = |id: &String| self.last_id.as_ref() != Some(id);
        let wrong = flight.expected.is_some_and(|seq| seq != self.last_seq)
            || flight.expected_last.as_ref().is_some_and(other);
        if wrong && !self.replicated {
            return Err(wrong_last_sequence(self.last_seq));
        }
        let known = self.ids.get(&flight.event.id);
        if let Some((seq, _)) = known.filter(|(_, time)| now - *time < self.window) {
            return Ok(PubAck {
                seq: *seq,
                duplicate: true,
            });
        }
        if wrong {
            return Err(wrong_last_sequence(self.last_seq));
        }
        self.store(Some(flight.event.clone()), now);
        self.ids
            .insert(flight.event.id.clone(), (self.last_seq, now));
        self.history.push((self.last_seq, flight.event.nth, now));
        Ok(PubAck {
            seq: self.last_seq,
            duplicate: false,
        })
    }

    pub fn store(&mut self, event: Option<Event>, time: Instant) {
        self.last_seq += 1;
        self.last_id = event.as_ref().map(|event| event.id.clone());
        self.messages.insert(self.last_seq, Stored { event, time });
    }

    /// The server comes back with an older copy of its store.
    pub fn roll_back(&mut self, last_seq: u64) {
        self.lose_end(last_seq);
        self.last_seq = last_seq;
        let last = self.messages.get(&last_seq);
        self.last_id = last.and_then(|last| Some(last.event.as_ref()?.id.clone()));
    }

    /// The server comes back without its last messages, but still counts them.
    pub fn lose_end(&mut self, last_seq: u64) {
        self.messages.split_off(&(last_seq + 1));
        self.history.retain(|(seq, ..)| *seq <= last_seq);
        self.ids.retain(|_, (seq, _)| *seq <= last_seq);
        self.last_id = None;
    }

    pub fn first_seq(&self) -> u64 {
        let first = self.messages.keys().next();
        first.copied().unwrap_or(self.last_seq + 1)
    }

    pub fn read(&self, source: &Source, seq: u64) -> Option<StoredMessage> {
        let stored = self.messages.get(&seq)?;
        let mut headers = Vec::new();
        if let Some(event) = &stored.event {
            let position = SourcePosition {
                source: Source {
                    timeline: event.timeline,
                    ..source.clone()
                },
                position: event.position,
            };
            headers.push((OUTBOX_POSITION.to_string(), position.to_string()));
            headers.push(("Nats-Msg-Id".to_string(), event.id.clone()));
        }
        Some(StoredMessage {
            subject: String::new(),
            seq,
            time: String::new(),
            headers,
            data: Vec::new(),
        })
    }
}
