//! JetStream, as far as the relay can tell it from the real one: streams that check what a publish expects and remember
//! message ids, and the checkpoint's key.

use crate::postgres::{PARK_SUBJECT, PARKED, TOPICS};
use jetstream_outbox::jetstream::ack::{AckError, ApiError, Origin, PubAck};
use jetstream_outbox::jetstream::streams::{StreamConfig, StreamInfo, StreamState};
use jetstream_outbox::outbox::position::SourcePosition;
use jetstream_outbox::relay::checkpoint::record::Record;
use jetstream_outbox::relay::checkpoint::store::{Value, Write};
use jetstream_outbox::relay::core::evidence::Message;
use jetstream_outbox::relay::core::resume::facts::StreamFacts;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a crash of a server may lose: nats-server's default `sync_interval`.
pub const SYNC_INTERVAL: Duration = Duration::from_secs(120);

pub type Answer = Result<(PubAck, Arc<Origin>), AckError>;

/// A publish on the wire.
#[derive(Clone, Debug)]
pub struct Flight {
    pub uid: u64,
    pub topic: usize,
    /// The name of its answer.
    pub reply: u64,
    pub id: String,
    pub position: SourcePosition,
    pub expected: Option<u64>,
    pub expected_last: Option<String>,
    pub expected_stream: Option<String>,
    pub is_late: bool,
    pub transaction_end: Option<u64>,
    pub sent: Instant,
    /// When its relay was told where the topics lead.
    pub routed: Instant,
}

#[derive(Clone, Debug)]
pub struct Stored {
    /// `None`: a foreign message.
    pub uid: Option<u64>,
    pub message: Message,
    pub time: Instant,
}

/// A stream of the server.
#[derive(Clone, Debug)]
pub struct Stream {
    /// No two have the same, whatever their names.
    pub serial: u64,
    pub name: String,
    pub created: String,
    pub topics: BTreeSet<usize>,
    pub born: Instant,
    pub is_replicated: bool,
    /// Messages go once they are consumed.
    pub is_queue: bool,
    pub is_full: bool,
    /// Its server has crashed, and is not back.
    pub down_until: Instant,
    pub window: Duration,
    pub first_seq: u64,
    pub last_seq: u64,
    pub messages: BTreeMap<u64, Stored>,
    last_id: Option<String>,
    ids: HashMap<String, (u64, Instant)>,
}

pub fn refused(code: u32, err_code: u32, description: &str) -> AckError {
    AckError::Api(ApiError {
        code,
        err_code,
        description: description.into(),
    })
}

impl Stream {
    pub fn new(
        serial: u64,
        name: &str,
        is_replicated: bool,
        is_queue: bool,
        window: Duration,
        born: Instant,
    ) -> Stream {
        Stream {
            serial,
            name: name.into(),
            created: format!("created-{serial}"),
            topics: BTreeSet::new(),
            born,
            is_replicated,
            is_queue,
            is_full: false,
            down_until: born,
            window,
            first_seq: 1,
            last_seq: 0,
            messages: BTreeMap::new(),
            last_id: None,
            ids: HashMap::new(),
        }
    }

    /// A publish arrives; `Ok` of a sequence: it is stored there.
    pub fn publish(
        &mut self,
        flight: &Flight,
        is_fenced: bool,
        now: Instant,
    ) -> Result<PubAck, AckError> {
        if flight
            .expected_stream
            .as_ref()
            .is_some_and(|name| *name != self.name)
        {
            return Err(refused(400, 10060, "expected stream does not match"));
        }
        let known = self.ids.get(&flight.id);
        let known = known
            .filter(|(_, time)| now - *time < self.window)
            .map(|(seq, _)| *seq);
        let duplicate = known.map(|seq| PubAck {
            seq,
            duplicate: true,
        });
        if let (true, Some(duplicate)) = (self.is_replicated, duplicate) {
            return Ok(duplicate);
        }
        if is_fenced && flight.expected.is_some_and(|seq| seq != self.last_seq) {
            let text = format!("wrong last sequence: {}", self.last_seq);
            return Err(refused(400, 10071, &text));
        }
        if is_fenced
            && let Some(id) = &flight.expected_last
            && self.last_id.as_ref() != Some(id)
        {
            let text = format!(
                "wrong last msg ID: {}",
                self.last_id.as_deref().unwrap_or_default()
            );
            return Err(refused(400, 10070, &text));
        }
        if let Some(duplicate) = duplicate {
            return Ok(duplicate);
        }
        if self.is_full {
            return Err(refused(503, 10077, "maximum messages exceeded"));
        }
        self.store(
            Some(flight.uid),
            Message {
                seq: 0,
                position: Some(flight.position.clone()),
                id: Some(flight.id.clone()),
                // what is stored without a fence bears one all the same, so that it is known again
                expected_last_sequence: Some(self.last_seq),
                copied_from: None,
                is_late: flight.is_late,
                is_parked: flight.topic == PARKED,
            },
            now,
            true,
        );
        Ok(PubAck {
            seq: self.last_seq,
            duplicate: false,
        })
    }

    pub fn store(
        &mut self,
        uid: Option<u64>,
        mut message: Message,
        time: Instant,
        remembers: bool,
    ) {
        self.last_seq += 1;
        message.seq = self.last_seq;
        self.last_id = message.id.clone();
        if let Some(id) = message.id.as_ref().filter(|_| remembers) {
            self.ids.insert(id.clone(), (self.last_seq, time));
        }
        self.messages
            .insert(self.last_seq, Stored { uid, message, time });
    }

    /// A message goes.
    pub fn remove(&mut self, seq: u64) -> Option<Stored> {
        let removed = self.messages.remove(&seq);
        let first = self.messages.keys().next();
        self.first_seq = first.copied().unwrap_or(self.last_seq + 1);
        removed
    }

    /// The server comes back with what it had synced. Returns what is lost.
    pub fn regress(&mut self, last_seq: u64) -> Vec<Stored> {
        let lost = self.messages.split_off(&(last_seq + 1));
        self.last_seq = last_seq;
        self.first_seq = self.messages.keys().next().copied().unwrap_or(last_seq + 1);
        self.restart();
        lost.into_values().collect()
    }

    /// The server remembers the ids of what it stores.
    pub fn restart(&mut self) {
        let last = self.messages.get(&self.last_seq);
        self.last_id = last.and_then(|last| last.message.id.clone());
        let ids = self.messages.values();
        let ids = ids.filter_map(|it| Some((it.message.id.clone()?, (it.message.seq, it.time))));
        self.ids = ids.collect();
    }

    pub fn facts(&self) -> StreamFacts {
        StreamFacts {
            name: self.name.clone(),
            domain: String::new(),
            created: self.created.clone(),
            is_replicated: self.is_replicated,
            is_log: !self.is_queue,
            first_seq: self.first_seq,
            last_seq: self.last_seq,
            is_routed: !self.topics.is_empty(),
            keeps_its_end: !self.is_replicated && !self.is_queue,
            keeps_its_order: !self.is_replicated && !self.is_queue,
        }
    }

    pub fn info(&self) -> StreamInfo {
        let subject = |topic: &usize| match *topic < TOPICS {
            true => format!("events.{topic}.>"),
            false => PARK_SUBJECT.into(),
        };
        StreamInfo {
            config: StreamConfig {
                name: self.name.clone(),
                subjects: self.topics.iter().map(subject).collect(),
                num_replicas: if self.is_replicated { 3 } else { 1 },
                ..Default::default()
            },
            state: StreamState::default(),
            created: self.created.clone(),
            ts: String::new(),
            domain: String::new(),
        }
    }
}

/// The checkpoint's key in its bucket.
#[derive(Debug, Default)]
pub struct Key {
    /// Revision, value, and when it was written.
    value: Option<(u64, Vec<u8>, Instant)>,
    last_revision: u64,
    history: Vec<(u64, Vec<u8>, Instant)>,
}

impl Key {
    fn revision(&self) -> u64 {
        self.value.as_ref().map_or(0, |(revision, ..)| *revision)
    }

    pub fn record(&self) -> Option<Record> {
        let (_, body, _) = self.value.as_ref()?;
        Some(serde_json::from_slice(body).expect("it was written as JSON"))
    }

    pub fn read(&self, begun: Instant, now: Instant) -> Value {
        let since = |time: Instant| (time - begun).as_millis() as i64;
        Value {
            revision: self.revision(),
            record: self.record(),
            stored_ms: self.value.as_ref().map_or(0, |(.., time)| since(*time)),
            time_ms: since(now),
        }
    }

    pub fn put(
        &mut self,
        write: &Write,
        is_strict: bool,
        now: Instant,
    ) -> Result<PubAck, AckError> {
        if is_strict && write.revision != self.revision() {
            let text = format!("wrong last sequence: {}", self.revision());
            return Err(refused(400, 10071, &text));
        }
        self.last_revision += 1;
        let value = (self.last_revision, write.body.clone(), now);
        self.history.push(value.clone());
        self.value = Some(value);
        Ok(PubAck {
            seq: self.last_revision,
            duplicate: false,
        })
    }

    /// The bucket is deleted, and created again.
    pub fn lose(&mut self) {
        *self = Key::default();
    }

    /// An older copy of the bucket is put back, which the key had at `time`.
    pub fn put_back(&mut self, time: Instant) {
        let older = self
            .history
            .iter()
            .rposition(|(.., written)| *written <= time);
        let Some(index) = older else {
            return;
        };
        self.history.truncate(index + 1);
        self.value = self.history.last().cloned();
        self.last_revision = self.revision();
    }
}
