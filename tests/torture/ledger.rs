//! The oracle: what was committed and in which order, by Postgres' own log, against what the stream holds.
//!
//! The truth comes from a slot of its own, that no relay knows: the order in which logical decoding emits
//! transactions is the order of their commits, over all writers. It is read now and then, so that Postgres
//! can let the log go: looked at first, and advanced once what was seen is noted, since an answer can be lost.
//!
//! 8 bytes an event are kept here, and 28 while the stream is judged.

use crate::events::EventId;
use crate::support::natsclient::StreamMessage;
use crate::support::postgres::Postgres;
use crate::support::truth::{self, Confirmed, Logged, TooEarly};
use jetstream_outbox::postgres::Lsn;
use postgres::Client;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// The slot and the publication of the truth.
const TRUTH: &str = "truth";

/// Rows and other changes of one look; it ends at a transaction's end.
const CHANGES_A_LOOK: u32 = 20_000;

/// What went wrong, by kind, with examples.
#[derive(Default)]
pub struct Violations(Vec<(&'static str, u64, Vec<String>)>);

/// How many of each kind are told.
const EXAMPLES: usize = 5;

impl Violations {
    pub fn add(&mut self, kind: &'static str, example: String) {
        let index = match self.0.iter().position(|(known, ..)| *known == kind) {
            Some(index) => index,
            None => {
                self.0.push((kind, 0, Vec::new()));
                self.0.len() - 1
            }
        };
        let (_, count, examples) = &mut self.0[index];
        *count += 1;
        if examples.len() < EXAMPLES {
            examples.push(example);
        }
    }

    /// Takes over what was found in one reading.
    pub fn extend(&mut self, found: Violations) {
        self.0.extend(found.0);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &(&'static str, u64, Vec<String>)> {
        self.0.iter()
    }
}

/// The committed events in commit order.
#[derive(Default)]
pub struct Ledger {
    ids: Vec<EventId>,
    /// The end of each transaction: its LSN, and how many events there are up to it.
    ends: Vec<(Lsn, usize)>,
    session: Option<Client>,
}

impl Ledger {
    /// Makes the slot; nothing must be committed before.
    pub fn set_up(pg: &Postgres) {
        pg.execute(&format!(
            "CREATE PUBLICATION {TRUTH} FOR TABLE outbox WITH (publish = 'insert')"
        ));
        pg.execute(&format!(
            "SELECT pg_create_logical_replication_slot('{TRUTH}', 'pgoutput')"
        ));
    }

    pub fn events(&self) -> usize {
        self.ids.len()
    }

    pub fn transactions(&self) -> usize {
        self.ends.len()
    }

    /// The place of an event among the committed ones, as far as they were read: the end of its transaction.
    fn end_of(&self, at: usize) -> Lsn {
        let index = self.ends.partition_point(|(_, count)| *count <= at);
        self.ends.get(index).map_or(Lsn::INVALID, |(end, _)| *end)
    }

    /// The message at `seq` must be the `seq`th committed event: there are no others in the stream, none twice, and
    /// none is missing. `None`: not so much was read yet. `Err`: what should be there.
    pub fn judge_tail(&self, seq: u64, id: &str) -> Option<Result<(), String>> {
        let at = usize::try_from(seq).ok()?.checked_sub(1)?;
        let expected = *self.ids.get(at)?;
        if EventId::parse(id) == Some(expected) {
            return Some(Ok(()));
        }
        let actually = EventId::parse(id).and_then(|id| self.ids.iter().position(|it| *it == id));
        let actually = actually.map_or("no committed event".to_string(), |at| {
            format!(
                "committed event {} of the transaction that ends at {}",
                at + 1,
                self.end_of(at)
            )
        });
        Some(Err(format!(
            "{id} at sequence {seq} is {actually}; committed event {seq} is {} of the one that ends at {}",
            expected.uuid(),
            self.end_of(at)
        )))
    }

    /// Reads some of what was committed since; whether there was anything.
    pub fn read_on(&mut self, pg: &Postgres) -> Result<bool, postgres::Error> {
        let mut session = match self.session.take() {
            Some(session) => session,
            None => pg.try_client()?,
        };
        let peek = format!(
            "SELECT data FROM pg_logical_slot_peek_binary_changes('{TRUTH}', NULL, {CHANGES_A_LOOK}, \
             'proto_version', '1', 'publication_names', '{TRUTH}') WHERE get_byte(data, 0) IN (67, 73)"
        );
        let rows = session.query(&peek, &[])?;
        let mut last_end = None;
        let before = self.ids.len();
        for row in &rows {
            let end_lsn = match truth::read(row.get(0)) {
                Some(Logged::Insert(id)) => {
                    let id = EventId::parse(id).expect("all rows are ours");
                    self.ids.push(id);
                    continue;
                }
                Some(Logged::Commit(end_lsn)) => end_lsn,
                None => continue,
            };
            last_end = Some(end_lsn);
            let noted = self.ends.last().copied().unwrap_or_default();
            if end_lsn <= noted.0 {
                // a crash takes the slot back
                self.ids.truncate(noted.1);
            } else if self.ids.len() > noted.1 {
                self.ends.push((end_lsn, self.ids.len()));
            }
        }
        assert_eq!(
            self.ids.len(),
            self.ends.last().map_or(0, |end| end.1),
            "a look ends with a transaction (it began at event {before})"
        );
        if let Some(end) = last_end {
            session.batch_execute(&format!(
                "SELECT pg_replication_slot_advance('{TRUTH}', '{end}')"
            ))?;
        }
        self.session = Some(session);
        Ok(!rows.is_empty())
    }

    /// The transactions whose COMMIT was answered must be there: else it is Postgres or the torture that lost them.
    pub fn judge_writers(&self, answered: &[Vec<u32>], violations: &mut Violations) {
        let committed: HashSet<(u8, u32)> = self.ids.iter().map(|id| id.transaction()).collect();
        for (writer, numbers) in answered.iter().enumerate() {
            for &number in numbers {
                if !committed.contains(&(writer as u8, number)) {
                    violations.add(
                        "committed, but not in Postgres' log",
                        format!("transaction {number} of writer {writer}"),
                    );
                }
            }
        }
        for id in self.ids.iter().filter(|id| id.is_doomed()) {
            violations.add("rolled back, but in Postgres' log", id.uuid());
        }
    }

    /// Takes the stream's messages in order.
    pub fn judge_stream(&self) -> StreamJudge<'_> {
        let index = self.ids.iter().enumerate();
        StreamJudge {
            ledger: self,
            index: index.map(|(at, id)| (*id, at as u32)).collect(),
            time_ns: vec![0; self.ids.len()],
            latest: None,
        }
    }
}

/// Compares the stream with the ledger, message by message.
pub struct StreamJudge<'a> {
    ledger: &'a Ledger,
    index: HashMap<EventId, u32>,
    /// When each event was stored; 0: not yet seen.
    time_ns: Vec<u64>,
    latest: Option<usize>,
}

impl StreamJudge<'_> {
    pub fn see(&mut self, message: &StreamMessage, violations: &mut Violations) {
        let place = format!(
            "{:?} at sequence {}, {}",
            message.id(),
            message.seq,
            message.header("Outbox-Position").unwrap_or("no position")
        );
        let Some(id) = EventId::parse(message.id()) else {
            return violations.add("never written, but in the stream", place);
        };
        let Some(&at) = self.index.get(&id) else {
            let kind = if id.is_doomed() {
                "rolled back, but in the stream"
            } else {
                "not committed, but in the stream"
            };
            return violations.add(kind, place);
        };
        let at = at as usize;
        if self.time_ns[at] != 0 {
            return violations.add("in the stream more than once", place);
        }
        self.time_ns[at] = message.time_ns;
        if let Some(latest) = self.latest.filter(|latest| *latest > at) {
            let later = self.ledger.ids[latest].uuid();
            violations.add("out of commit order", format!("{place}, behind {later}"));
        }
        self.latest = self.latest.max(Some(at));
        if message.body != id.payload().as_bytes() {
            violations.add("with another payload", place.clone());
        }
        if message.subject != id.subject() {
            violations.add("under another subject", place);
        }
    }

    /// Once all messages were seen.
    pub fn finish(
        self,
        confirmations: &[Confirmed],
        hold_back: Duration,
        violations: &mut Violations,
    ) {
        let mut before = None;
        let last_stored = self.time_ns.iter().rposition(|time| *time > 0);
        for (at, (id, time)) in self.ledger.ids.iter().zip(&self.time_ns).enumerate() {
            if *time == 0 {
                let before: Option<EventId> = before;
                let behind = before.map_or("the start".to_string(), EventId::uuid);
                let later = if Some(at) < last_stored {
                    "later ones are there"
                } else {
                    "nor is a later one"
                };
                let example = format!(
                    "{}, committed event {} of the transaction that ends at {}, due behind {behind}; {later}",
                    id.uuid(),
                    at + 1,
                    self.ledger.end_of(at)
                );
                violations.add("committed, but not in the stream", example);
            }
            before = Some(*id);
        }
        // nothing may be confirmed before it has been in the stream for the hold-back
        let ends = &self.ledger.ends;
        for TooEarly { lsn, event, age_ms } in
            truth::too_early(confirmations, ends, &self.time_ns, hold_back)
        {
            let id = self.ledger.ids[event].uuid();
            match age_ms {
                None => violations.add("confirmed, but not in the stream", format!("{lsn}, with {id}")),
                Some(age_ms) => violations.add(
                    "confirmed too early",
                    format!("{lsn}, with {id}, when the youngest event up to it was stored {age_ms} ms ago"),
                ),
            }
        }
    }
}
