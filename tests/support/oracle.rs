//! What was committed, against what the stream holds.
//!
//! Events are expected in *lanes*: within a lane the order of [`Expected::commit`] is the order of commits,
//! and the stream must show the same. One writer is one lane, and a test with one writer therefore
//! checks the whole order; what two writers committed side by side has no order that a client knows.

use super::natsclient::StreamMessage;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

/// How many of each kind of finding a report prints.
const PRINTED: usize = 5;

/// An event as the stream is to hold it. Of the body a hash is kept, so that millions can be expected.
#[derive(Debug, Clone)]
pub struct Event {
    /// The `Nats-Msg-Id`.
    pub id: String,
    /// The subject.
    pub subject: String,
    body_hash: u64,
}

impl Event {
    /// An event with the body it is to arrive with.
    pub fn new(id: impl Into<String>, subject: impl Into<String>, body: &[u8]) -> Event {
        Event {
            id: id.into(),
            subject: subject.into(),
            body_hash: hash(body),
        }
    }
}

fn hash(body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    hasher.finish()
}

/// What a transaction's COMMIT came back with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Committed,
    /// The server went away before it answered: all of it or nothing.
    Unknown,
}

struct Entry {
    event: Event,
    lane: u32,
    transaction: usize,
    fate: Fate,
}

/// What the stream must hold.
#[derive(Default)]
pub struct Expected {
    entries: Vec<Entry>,
    by_id: HashMap<String, usize>,
    transactions: usize,
}

impl Expected {
    /// Nothing yet.
    pub fn new() -> Expected {
        Expected::default()
    }

    /// Adds the events of a committed transaction, in the order of its inserts.
    pub fn commit(&mut self, lane: u32, events: impl IntoIterator<Item = Event>) {
        self.add(lane, events, Fate::Committed);
    }

    /// Adds the events of a transaction whose COMMIT got no answer: the stream holds all or none of them.
    pub fn uncertain(&mut self, lane: u32, events: impl IntoIterator<Item = Event>) {
        self.add(lane, events, Fate::Unknown);
    }

    fn add(&mut self, lane: u32, events: impl IntoIterator<Item = Event>, fate: Fate) {
        self.transactions += 1;
        for event in events {
            let before = self.by_id.insert(event.id.clone(), self.entries.len());
            assert!(before.is_none(), "the id {} is expected twice", event.id);
            self.entries.push(Entry {
                event,
                lane,
                transaction: self.transactions,
                fate,
            });
        }
    }

    /// How many events are known to be committed: what a test waits for.
    pub fn committed(&self) -> usize {
        let entries = self.entries.iter();
        entries
            .filter(|entry| entry.fate == Fate::Committed)
            .count()
    }

    /// Compares with all messages of the stream, in the stream's order.
    pub fn check(&self, messages: &[StreamMessage]) -> Report {
        let mut report = Report::default();
        let mut seen = HashSet::new();
        let mut last_in_lane: HashMap<u32, usize> = HashMap::new();
        for message in messages {
            let id = message.id();
            let at =
                |what: &str| format!("{what} at sequence {} on {}", message.seq, message.subject);
            let Some(&index) = self.by_id.get(id) else {
                report.unknown.push(at(&format!("id {id:?}")));
                continue;
            };
            if !seen.insert(index) {
                report.duplicates.push(at(id));
                continue;
            }
            let Entry { event, lane, .. } = &self.entries[index];
            if event.subject != message.subject {
                let wrong = at(&format!("{id}, expected on {},", event.subject));
                report.subject_mismatch.push(wrong);
            }
            if event.body_hash != hash(&message.body) {
                report.payload_mismatch.push(at(id));
            }
            let last = last_in_lane.entry(*lane).or_insert(index);
            if index < *last {
                let later = &self.entries[*last].event.id;
                report
                    .order_violations
                    .push(at(&format!("{id}, behind {later},")));
            }
            *last = index.max(*last);
        }
        let present: HashSet<usize> = seen
            .iter()
            .map(|&index| self.entries[index].transaction)
            .collect();
        for (index, entry) in self.entries.iter().enumerate() {
            // of an uncertain transaction nothing is missing unless a part of it is there
            let due = entry.fate == Fate::Committed || present.contains(&entry.transaction);
            if due && !seen.contains(&index) {
                report.missing.push(entry.event.id.clone());
            }
        }
        report
    }
}

/// What is wrong, as texts that name ids, sequences and subjects.
#[derive(Default, PartialEq, Eq)]
pub struct Report {
    /// Committed, and not in the stream; or a part of an uncertain transaction of which the rest is there.
    pub missing: Vec<String>,
    /// In the stream, and never committed.
    pub unknown: Vec<String>,
    /// In the stream more than once; each repetition counts.
    pub duplicates: Vec<String>,
    /// In the stream behind an event of its lane that was committed later.
    pub order_violations: Vec<String>,
    /// In the stream with another body.
    pub payload_mismatch: Vec<String>,
    /// In the stream under another subject.
    pub subject_mismatch: Vec<String>,
}

impl Report {
    /// Panics unless the stream holds what was committed, once each and in order.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(*self == Report::default(), "{self:?}");
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, findings) in [
            ("missing", &self.missing),
            ("unknown", &self.unknown),
            ("duplicates", &self.duplicates),
            ("order violations", &self.order_violations),
            ("payload mismatch", &self.payload_mismatch),
            ("subject mismatch", &self.subject_mismatch),
        ] {
            write!(f, "{}: {kind}", findings.len())?;
            for finding in findings.iter().take(PRINTED) {
                write!(f, "\n    {finding}")?;
            }
            f.write_str("\n")?;
        }
        Ok(())
    }
}
