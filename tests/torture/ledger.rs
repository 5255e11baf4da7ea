//! The oracle: what was committed and in which order, by Postgres' own log, against what the streams hold.
//!
//! The truth comes from a slot of its own, that no relay knows: the order in which logical decoding emits
//! transactions is the order of their commits, over all writers. It is read now and then, so that Postgres
//! can let the log go: looked at first, and advanced once what was seen is noted, since an answer can be lost.
//!
//! When Postgres is put back to a snapshot, what was committed since is undone: such an event may be in a stream, once.
//!
//! 8 bytes an event are kept here, and some 40 while the streams are judged.

use crate::events::EventId;
use crate::streams::Stored;
use crate::support::postgres::Postgres;
use crate::support::truth::{self, Confirmed, Logged, TooEarly};
use crate::support::wait::{poll, secs};
use crate::writers::Answered;
use jetstream_outbox::postgres::Lsn;
use postgres::Client;
use std::collections::{BTreeSet, HashMap, HashSet};
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
    /// In the order in which they were undone.
    undone: Vec<Undone>,
    session: Option<Client>,
}

/// What was committed after a snapshot that Postgres was put back to.
struct Undone {
    /// How many events the snapshot had.
    kept: usize,
    ids: Vec<EventId>,
    ends: Vec<(Lsn, usize)>,
    /// When that was; what was confirmed until then was of this history.
    at: Confirmed,
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

    pub fn undone_events(&self) -> usize {
        self.undone.iter().map(|undone| undone.ids.len()).sum()
    }

    /// The events from one on, by their place in the order of commits.
    pub fn from(&self, at: usize) -> &[EventId] {
        self.ids.get(at..).unwrap_or_default()
    }

    /// Postgres is put back to where it had so many events: what was confirmed so far is of the history that ends here.
    pub fn put_back(&mut self, kept: usize) {
        let of_snapshot = self.ends.partition_point(|(_, count)| *count <= kept);
        self.undone.push(Undone {
            kept,
            ids: self.ids.split_off(kept),
            ends: self.ends.split_off(of_snapshot),
            at: Confirmed::now(Lsn::INVALID),
        });
    }

    /// Where it was put back to, its slot is here.
    pub fn is_put_back_at(&mut self, confirmed: Lsn) {
        if let Some(undone) = self.undone.last_mut() {
            undone.at.lsn = confirmed;
        }
    }

    pub fn transactions(&self) -> usize {
        self.ends.len()
    }

    /// The place of an event among the committed ones, as far as they were read: the end of its transaction.
    fn end_of(&self, at: usize) -> Lsn {
        end_of(&self.ends, at)
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

    /// The end of the last transaction.
    pub fn end(&self) -> Lsn {
        self.ends.last().map_or(Lsn::INVALID, |(end, _)| *end)
    }

    /// Reads all that was committed by now.
    pub fn read_all(&mut self, pg: &Postgres) {
        let read = poll(secs(60), || match self.read_on(pg) {
            Ok(false) => Ok(()),
            Ok(true) => Err("there is more".to_string()),
            Err(error) => Err(error.to_string()),
        });
        if let Err(reason) = read {
            panic!("read the log to its end: {reason}");
        }
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
    pub fn judge_writers(&self, answered: &[Answered], violations: &mut Violations) {
        let undone = self.undone.iter().flat_map(|undone| &undone.ids);
        let ids = || self.ids.iter().chain(undone.clone());
        let committed: HashSet<(u8, u32)> = ids().map(|id| id.transaction()).collect();
        for (writer, numbers) in answered {
            for &number in numbers {
                if !committed.contains(&(*writer, number)) {
                    violations.add(
                        "committed, but not in Postgres' log",
                        format!("transaction {number} of writer {writer}"),
                    );
                }
            }
        }
        for id in ids().filter(|id| id.is_doomed()) {
            violations.add("rolled back, but in Postgres' log", id.uuid());
        }
    }

    /// Takes what the streams hold, stream by stream.
    pub fn judge_streams(&self) -> StreamJudge<'_> {
        let order = self.order();
        StreamJudge {
            ledger: self,
            index: (order.iter().enumerate())
                .map(|(at, (id, _))| (*id, at as u32))
                .collect(),
            time_ns: vec![0; order.len()],
            order,
            may_repeat: BTreeSet::new(),
            latest: None,
            late: 0,
            repeated: 0,
        }
    }

    /// All events, also those that were undone, in the order of their commits, with the end of each one's transaction.
    fn order(&self) -> Vec<(EventId, Lsn)> {
        let mut order = Vec::new();
        let mut at = 0;
        for undone in &self.undone {
            order.extend((at..undone.kept).map(|at| (self.ids[at], self.end_of(at))));
            at = at.max(undone.kept);
            for (index, id) in undone.ids.iter().enumerate() {
                order.push((*id, end_of(&undone.ends, undone.kept + index)));
            }
        }
        order.extend((at..self.ids.len()).map(|at| (self.ids[at], self.end_of(at))));
        order
    }

    /// What Postgres had committed, up to each time at which it was put back, and in the end: events, ends of transactions, and
    /// which of the confirmations came then.
    fn histories<'a>(&self, confirmations: &'a [Confirmed]) -> Vec<History<'a>> {
        let mut rest = confirmations;
        let mut histories = Vec::new();
        for undone in &self.undone {
            let count = rest.partition_point(|it| it.time_ns < undone.at.time_ns);
            let (of_it, later) = rest.split_at(count);
            rest = later;
            let of_snapshot = self
                .ends
                .partition_point(|(_, count)| *count <= undone.kept);
            histories.push(History {
                ids: [&self.ids[..undone.kept], &undone.ids].concat(),
                ends: [&self.ends[..of_snapshot], &undone.ends].concat(),
                confirmations: of_it,
            });
        }
        histories.push(History {
            ids: self.ids.clone(),
            ends: self.ends.clone(),
            confirmations: rest,
        });
        histories
    }
}

fn end_of(ends: &[(Lsn, usize)], at: usize) -> Lsn {
    let index = ends.partition_point(|(_, count)| *count <= at);
    ends.get(index).map_or(Lsn::INVALID, |(end, _)| *end)
}

struct History<'a> {
    ids: Vec<EventId>,
    ends: Vec<(Lsn, usize)>,
    confirmations: &'a [Confirmed],
}

/// Compares the streams with the ledger, message by message.
pub struct StreamJudge<'a> {
    ledger: &'a Ledger,
    order: Vec<(EventId, Lsn)>,
    index: HashMap<EventId, u32>,
    /// When each event was stored first; 0: not yet seen.
    time_ns: Vec<u64>,
    /// Events of streams that are gone or forgotten, which Postgres may have sent again.
    may_repeat: BTreeSet<u32>,
    /// In the stream that is looked at.
    latest: Option<usize>,
    /// Events that come after later ones, and are marked so.
    pub late: u64,
    /// Events of such streams that came again.
    pub repeated: u64,
}

impl StreamJudge<'_> {
    /// What comes now is of another stream than what came before.
    pub fn begin_stream(&mut self) {
        self.latest = None;
    }

    /// A stream that held these was deleted, when Postgres had been told of `confirmed`: what is after it comes again, where the
    /// slot still has it.
    pub fn deleted(&mut self, held: &[Stored], deleted_ns: u64, confirmed: Lsn) {
        // a snapshot of Postgres has a slot that is further back
        let put_back = self.ledger.undone.iter().map(|undone| &undone.at);
        let put_back = put_back.filter(|at| at.time_ns > deleted_ns);
        let confirmed = put_back.map(|at| at.lsn).fold(confirmed, Lsn::min);
        for stored in held {
            let Some(&at) = self.index.get(&stored.id) else {
                continue;
            };
            if self.order[at as usize].1 > confirmed {
                self.may_repeat.insert(at);
            }
        }
    }

    /// Such events may come once more.
    pub fn forgotten(&mut self, ids: &[EventId]) {
        let known = ids.iter().filter_map(|id| self.index.get(id));
        self.may_repeat.extend(known);
    }

    /// The next message of the stream.
    pub fn see(&mut self, stored: &Stored, violations: &mut Violations) {
        let id = stored.id;
        let place = || format!("{} at {}", id.uuid(), stored.place());
        let Some(&index) = self.index.get(&id) else {
            let kind = if id.is_doomed() {
                "rolled back, but in the stream"
            } else {
                "not committed, but in the stream"
            };
            return violations.add(kind, place());
        };
        let at = index as usize;
        if self.time_ns[at] == 0 {
            self.time_ns[at] = stored.time_ns;
        } else if self.may_repeat.remove(&index) {
            self.time_ns[at] = stored.time_ns.min(self.time_ns[at]);
            self.repeated += 1;
        } else {
            return violations.add("in the stream more than once", place());
        }
        if let Some(latest) = self.latest.filter(|latest| *latest > at) {
            if stored.is_late {
                self.late += 1;
                return;
            }
            let later = self.order[latest].0.uuid();
            let example = format!("{}, behind {later}", place());
            violations.add("out of commit order", example);
        }
        self.latest = self.latest.max(Some(at));
    }

    fn time_of(&self, id: EventId) -> u64 {
        let at = self.index.get(&id).copied();
        at.map_or(0, |at| self.time_ns[at as usize])
    }

    /// Once all messages were seen.
    pub fn finish(
        self,
        confirmations: &[Confirmed],
        hold_back: Duration,
        violations: &mut Violations,
    ) {
        let mut before = None;
        let ids = &self.ledger.ids;
        let last_stored = ids.iter().rposition(|id| self.time_of(*id) > 0);
        for (at, id) in ids.iter().enumerate() {
            if self.time_of(*id) == 0 {
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
        for history in self.ledger.histories(confirmations) {
            self.judge_confirmations(&history, hold_back, violations);
        }
    }

    /// Nothing may be confirmed before it has been in the stream for the hold-back.
    fn judge_confirmations(
        &self,
        history: &History,
        hold_back: Duration,
        violations: &mut Violations,
    ) {
        let History {
            ids,
            ends,
            confirmations,
        } = history;
        let time_ns: Vec<u64> = ids.iter().map(|id| self.time_of(*id)).collect();
        for TooEarly { lsn, event, age_ms } in
            truth::too_early(confirmations, ends, &time_ns, hold_back)
        {
            let id = ids[event].uuid();
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
