//! Postgres, as far as the relay can tell it from the real one: WAL that a slot replays by whole transactions, and what
//! crashes, fail-overs, restored snapshots and promoted clones make of it.

use jetstream_outbox::nats::EndedBy;
use jetstream_outbox::outbox::batch::{Batch, Change, Fate};
use jetstream_outbox::outbox::flags::Flags;
use jetstream_outbox::outbox::lineage::Lineage;
use jetstream_outbox::outbox::position::{Position, Source};
use jetstream_outbox::postgres::Lsn;
use std::rc::Rc;
use std::time::Instant;

/// The slot's name.
pub const SLOT: &str = "slot";
/// How large the body of an event is that is too large.
pub const LARGE: usize = 3000;

/// A committed row.
#[derive(Clone, Debug)]
pub struct Event {
    /// No two have the same; it is the beginning of the body.
    pub uid: u64,
    pub id: String,
    /// Its subject: `events.<topic>.x`, or the park subject.
    pub topic: usize,
    pub fate: Fate,
    pub is_large: bool,
    /// The server ends the connection over it: with a complaint, or without a word.
    pub ends: Option<EndedBy>,
    /// Its stream refuses it each time, with an error that nobody knows.
    pub is_mystery: bool,
    /// Not all flags make an event of it.
    pub is_wide: bool,
    /// An earlier event had the id already: this one may be dropped.
    pub reuses_id: bool,
    pub position: Position,
    pub committed: Instant,
}

#[derive(Debug)]
pub struct Transaction {
    pub commit_lsn: Lsn,
    pub end_lsn: Lsn,
    pub time_us: i64,
    pub events: Vec<Rc<Event>>,
}

/// The flags of a relay that make events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Wide events are published by Postgres, and have a place.
    pub sends_wide: bool,
    /// They are events.
    pub takes_wide: bool,
    /// The id is of another column.
    pub other_ids: bool,
}

impl Setting {
    pub const WIDE: Setting = Setting {
        sends_wide: true,
        takes_wide: true,
        other_ids: false,
    };

    pub fn flags(&self) -> Flags {
        let publication = if self.sends_wide { "all" } else { "narrow" };
        let mapping = format!("{} {}", self.takes_wide, self.other_ids);
        Flags::new(publication, true, &mapping)
    }

    pub fn takes(&self, event: &Event) -> bool {
        !event.is_wide || self.sends_wide && self.takes_wide
    }

    pub fn id(&self, event: &Event) -> String {
        let prefix = if self.other_ids { OTHER_ID } else { "" };
        format!("{prefix}{}", event.id)
    }
}

/// Ids of the other column begin so.
pub const OTHER_ID: &str = "other-column-";

impl Transaction {
    /// What Postgres sends of it, with the positions that it has then.
    pub fn sent(&self, setting: Setting) -> Vec<(Rc<Event>, Position)> {
        let sent = (self.events.iter()).filter(|it| setting.sends_wide || !it.is_wide);
        let commit_lsn = self.commit_lsn;
        let sent = sent.zip(1..).map(|(event, ordinal)| {
            let position = Position {
                commit_lsn,
                ordinal,
            };
            (event.clone(), position)
        });
        sent.collect()
    }
}

/// The WAL and the slot.
#[derive(Clone, Debug)]
pub struct Postgres {
    pub timeline: u32,
    pub switch_points: Vec<(u32, Lsn)>,
    pub transactions: Vec<Rc<Transaction>>,
    pub wal_end: Lsn,
    pub confirmed: Lsn,
    /// What a crash sets the slot back to.
    pub persisted: Lsn,
}

impl Postgres {
    pub fn new() -> Postgres {
        Postgres {
            timeline: 1,
            switch_points: Vec::new(),
            transactions: Vec::new(),
            wal_end: Lsn(100),
            confirmed: Lsn(100),
            persisted: Lsn(100),
        }
    }

    pub fn lineage(&self) -> Lineage {
        Lineage {
            source: Source {
                slot: SLOT.into(),
                system_id: 1,
                timeline: self.timeline,
            },
            switch_points: self.switch_points.clone(),
        }
    }

    /// The events get their positions.
    pub fn commit(&mut self, gap: u64, time_us: i64, mut events: Vec<Event>) -> &Rc<Transaction> {
        let commit_lsn = Lsn(self.wal_end.0 + gap);
        for (event, ordinal) in events.iter_mut().zip(1..) {
            event.position = Position {
                commit_lsn,
                ordinal,
            };
        }
        let end_lsn = Lsn(commit_lsn.0 + 5);
        self.wal_end = end_lsn;
        self.transactions.push(Rc::new(Transaction {
            commit_lsn,
            end_lsn,
            time_us,
            events: events.into_iter().map(Rc::new).collect(),
        }));
        self.transactions.last().expect("just pushed")
    }

    /// Everything from `lsn` on is another server's.
    pub fn cut_off(&mut self, lsn: Lsn) {
        let kept = |transaction: &Rc<Transaction>| transaction.commit_lsn < lsn;
        self.transactions
            .truncate(self.transactions.partition_point(kept));
        self.wal_end = lsn;
    }

    /// A standby with the WAL up to `lsn` takes over.
    pub fn promote(&mut self, lsn: Lsn) {
        self.cut_off(lsn);
        self.switch_points.push((self.timeline, lsn));
        self.timeline += 1;
        self.confirmed = self.confirmed.min(lsn);
        self.persisted = self.persisted.min(self.confirmed);
    }

    /// Where the copy stream begins that was asked to start at `start`.
    pub fn first_from(&self, start: Lsn) -> usize {
        let start = start.max(self.confirmed);
        self.transactions
            .partition_point(|transaction| transaction.commit_lsn < start)
    }
}

/// Adds an event as the mapper makes it.
pub fn push(batch: &mut Batch, event: &Event, position: Position, id: &str) {
    let subject = subject(event.topic);
    let mut body = format!("{} ", event.uid).into_bytes();
    body.resize(if event.is_large { LARGE } else { 12 }, b'x');
    let append = |part: &[u8], out: &mut Vec<u8>| {
        out.extend_from_slice(part);
        Ok::<(), ()>(())
    };
    let added = batch.draft("t", position, event.fate, |draft| {
        draft.subject(|out| append(subject.as_bytes(), out))?;
        draft.id(|out| append(id.as_bytes(), out))?;
        draft.body(|out| append(&body, out))
    });
    added.expect("nothing in it fails");
}

pub fn end_of(transaction: &Transaction) -> Change {
    Change::Commit {
        commit_lsn: transaction.commit_lsn,
        end_lsn: transaction.end_lsn,
        commit_time_us: transaction.time_us,
    }
}

/// The last topic is that of parked events.
pub const TOPICS: usize = 4;
pub const PARKED: usize = TOPICS;
pub const PARK_SUBJECT: &str = "parked.x";

pub fn subject(topic: usize) -> String {
    match topic {
        PARKED => PARK_SUBJECT.into(),
        _ => format!("events.{topic}.x"),
    }
}
