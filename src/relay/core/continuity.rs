//! Continuity: the proof that this is the WAL which the streams were written from. Pure.
//!
//! The copy stream starts at the anchor's commit, and Postgres then sends that transaction first, whatever has happened
//! since to publication or table. Another transaction at that place, an older one, one too short, or a position beyond
//! it while it has not come, means a restored snapshot or another clone promoted to the same timeline number. A later one
//! first is legal only if the slot was confirmed beyond the anchor's commit: then Postgres leaves that transaction out. Nor can
//! there be an event between the anchor and the LSN up to which the record says that everything was stored: what a snapshot
//! had not yet, or a clone promoted at the same place, may have committed one there.
//!
//! Until continuity is proven nothing may be told to Postgres, and nothing is published that comes after the anchor.

use crate::outbox::batch::{Batch, Change, Fate};
use crate::outbox::flags::Flags;
use crate::outbox::position::Position;
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::Anchor;
use crate::relay::core::resume::Resumed;

/// What is known of the copy stream so far.
#[derive(Debug)]
pub struct Continuity {
    expected: Option<Expected>,
    /// After the anchor no event was committed up to this LSN, which Postgres has not come to yet.
    empty: Option<(Anchor, Lsn)>,
    /// Where the WAL ended at the start, if what is in the streams need not come from Postgres again.
    lenient_until: Option<Lsn>,
    /// Those of this relay.
    flags: Flags,
}

#[derive(Debug)]
struct Expected {
    anchor: Anchor,
    /// The slot was confirmed beyond the anchor's commit, or other flags may have Postgres leave it out.
    may_skip: bool,
    /// The flags count positions as they did: otherwise the transaction is compared, and what is in it cannot be.
    is_counted: bool,
    /// They make the same event of it.
    is_mapped: bool,
    /// Its transaction has begun, and is the right one.
    begun: bool,
}

/// Why this is not the WAL that the streams were written from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// At the anchor's place is another transaction: it was committed at another time.
    OtherTransaction(Anchor),
    /// At the anchor's place is another event.
    OtherEvent {
        /// The anchor.
        anchor: Anchor,
        /// The id that Postgres has there.
        id: String,
    },
    /// The anchor's transaction has fewer events.
    TooShort(Anchor),
    /// An event was committed where there was none.
    NotEmpty {
        /// The anchor.
        anchor: Anchor,
        /// The event.
        position: Position,
        /// Up to here everything was stored.
        stored_lsn: Lsn,
    },
    /// Postgres has come to this position, and has not sent the anchor's transaction.
    NotThere {
        /// The anchor.
        anchor: Anchor,
        /// Where Postgres is.
        at: Lsn,
    },
    /// The WAL ends before what was stored, events or not.
    EndsBeforeStored {
        /// Its end.
        wal_end: Lsn,
        /// Up to here everything was stored.
        stored_lsn: Lsn,
    },
    /// The WAL ends here, before the anchor.
    WalEndsBefore {
        /// The anchor.
        anchor: Anchor,
        /// Its end.
        wal_end: Lsn,
    },
}

impl Continuity {
    /// Before the copy stream starts at the anchor of a cut, up to whose `stored_lsn` everything was stored. `confirmed_lsn` is the
    /// slot's, `wal_end` that of the server; an error says that the server cannot have what the cut speaks of.
    pub fn new(
        anchor: &Anchor,
        stored_lsn: Lsn,
        confirmed_lsn: Lsn,
        wal_end: Lsn,
        flags: Flags,
    ) -> Result<Continuity, Broken> {
        let commit_lsn = anchor.position.commit_lsn;
        let has_it = match anchor.event {
            Some(_) => commit_lsn < wal_end,
            None => commit_lsn <= wal_end,
        };
        if !has_it {
            return Err(Broken::WalEndsBefore {
                anchor: anchor.clone(),
                wal_end,
            });
        }
        if stored_lsn > wal_end {
            return Err(Broken::EndsBeforeStored {
                wal_end,
                stored_lsn,
            });
        }
        let expected = anchor.event.as_ref().map(|event| Expected {
            anchor: anchor.clone(),
            may_skip: confirmed_lsn > commit_lsn || !flags.counts_as(&event.flags),
            is_counted: flags.counts_as(&event.flags),
            is_mapped: flags.maps_as(&event.flags),
            begun: false,
        });
        Ok(Continuity {
            expected,
            empty: None,
            lenient_until: None,
            flags,
        })
    }

    /// The same, with all that the cut says.
    pub fn resumed(
        resumed: &Resumed,
        confirmed_lsn: Lsn,
        wal_end: Lsn,
        flags: Flags,
    ) -> Result<Continuity, Broken> {
        let (anchor, stored_lsn) = (&resumed.anchor, resumed.stored_lsn);
        let continuity = Continuity::new(anchor, stored_lsn, confirmed_lsn, wal_end, flags)?;
        let is_empty = resumed.is_empty(&continuity.flags) && !resumed.is_lenient();
        Ok(Continuity {
            empty: is_empty.then(|| (anchor.clone(), stored_lsn)),
            lenient_until: resumed.is_lenient().then_some(wal_end),
            ..continuity
        })
    }

    /// It is accepted unproven (`-resume-anyway`).
    pub fn accepted(wal_end: Lsn, flags: Flags) -> Continuity {
        Continuity {
            expected: None,
            empty: None,
            lenient_until: Some(wal_end),
            flags,
        }
    }

    /// The flags that make events.
    pub fn flags(&self) -> &Flags {
        &self.flags
    }

    /// What is in the streams need not come from Postgres again: that was accepted.
    pub fn is_lenient(&self) -> bool {
        self.lenient_until.is_some()
    }

    /// What is in the streams after this end of the WAL, and has not come from Postgres since, will not come.
    pub fn lenient_until(&self) -> Option<Lsn> {
        self.lenient_until
    }

    /// This is the WAL that the streams were written from.
    pub fn is_proven(&self) -> bool {
        self.expected.is_none() && self.empty.is_none()
    }

    /// The first transaction that Postgres has at the anchor's commit or after it.
    pub fn on_first(&mut self, commit_lsn: Lsn, commit_time_us: i64) -> Result<(), Broken> {
        let Some(expected) = &mut self.expected else {
            return Ok(());
        };
        if !expected.on_first(commit_lsn, commit_time_us)? {
            self.expected = None;
        }
        Ok(())
    }

    /// Postgres is at `lsn`, and has sent no transaction.
    pub fn on_position(&mut self, lsn: Lsn) -> Result<(), Broken> {
        let Some(expected) = &mut self.expected else {
            return Ok(());
        };
        if expected.on_position(lsn)? {
            self.expected = None;
        }
        Ok(())
    }

    /// Looks at the next changes of the copy stream.
    pub fn on_batch(&mut self, batch: &Batch) -> Result<(), Broken> {
        self.expect_none(batch)?;
        let Some(expected) = &mut self.expected else {
            return Ok(());
        };
        if !expected.begun {
            match begin(batch) {
                None => {}
                Some(Begin::Transaction(commit_lsn, commit_time_us)) => {
                    self.on_first(commit_lsn, commit_time_us)?;
                }
                Some(Begin::Position(lsn)) => return self.on_position(lsn),
            }
        }
        let Some(expected) = &mut self.expected else {
            return Ok(());
        };
        for change in batch.changes() {
            match *change {
                Change::Event(spans) if expected.is_at(spans.position) => {
                    let event = batch.event(&spans);
                    expected.on_event(event.id)?;
                    self.expected = None;
                    return Ok(());
                }
                Change::Commit { .. } if expected.is_counted => {
                    return Err(Broken::TooShort(expected.anchor.clone()));
                }
                Change::Commit { .. } => {
                    self.expected = None;
                    return Ok(());
                }
                Change::Event(_) | Change::Open { .. } | Change::Keepalive { .. } => {}
            }
        }
        Ok(())
    }
}

impl Continuity {
    /// Between the anchor and what was stored there was no event.
    fn expect_none(&mut self, batch: &Batch) -> Result<(), Broken> {
        let Some((anchor, stored_lsn)) = &self.empty else {
            return Ok(());
        };
        for change in batch.changes() {
            let at = match *change {
                Change::Event(spans) => {
                    let position = spans.position;
                    let commit_lsn = anchor.position.commit_lsn;
                    let is_after = match anchor.event {
                        Some(_) => position.commit_lsn > commit_lsn,
                        None => position.commit_lsn >= commit_lsn,
                    };
                    let is_between = is_after && position.commit_lsn < *stored_lsn;
                    if is_between && spans.fate != Fate::Ignore {
                        return Err(Broken::NotEmpty {
                            anchor: anchor.clone(),
                            position,
                            stored_lsn: *stored_lsn,
                        });
                    }
                    position.commit_lsn
                }
                Change::Open { commit_lsn, .. } => commit_lsn,
                Change::Commit { end_lsn, .. } => end_lsn,
                Change::Keepalive { wal_end } => wal_end,
            };
            if at >= *stored_lsn {
                self.empty = None;
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What comes first in a copy stream.
enum Begin {
    /// A transaction: its commit, and when that was.
    Transaction(Lsn, i64),
    /// Postgres is at this position.
    Position(Lsn),
}

/// A batch that has events of a transaction says which one it is, at its end at the latest. A keepalive before
/// it tells nothing that it does not tell itself, but where Postgres was.
fn begin(batch: &Batch) -> Option<Begin> {
    let mut position = None;
    for change in batch.changes() {
        match *change {
            Change::Commit {
                commit_lsn,
                commit_time_us,
                ..
            }
            | Change::Open {
                commit_lsn,
                commit_time_us,
            } => return Some(Begin::Transaction(commit_lsn, commit_time_us)),
            Change::Keepalive { wal_end } => position = Some(wal_end),
            Change::Event(_) => {}
        }
    }
    position.map(Begin::Position)
}

impl Expected {
    /// The first transaction; `false`: the anchor's is legally left out.
    fn on_first(&mut self, commit_lsn: Lsn, commit_time_us: i64) -> Result<bool, Broken> {
        let Position {
            commit_lsn: expected_lsn,
            ..
        } = self.anchor.position;
        let is_it = self.anchor.event.as_ref().is_some_and(|event| {
            commit_lsn == expected_lsn && commit_time_us == event.commit_time_us
        });
        if is_it {
            self.begun = true;
            return Ok(true);
        }
        if commit_lsn > expected_lsn {
            return match self.may_skip {
                true => Ok(false),
                false => Err(Broken::NotThere {
                    anchor: self.anchor.clone(),
                    at: commit_lsn,
                }),
            };
        }
        Err(Broken::OtherTransaction(self.anchor.clone()))
    }

    /// Postgres is at `lsn` without having sent a transaction; `true`: it will not send the anchor's, legally.
    fn on_position(&self, lsn: Lsn) -> Result<bool, Broken> {
        if lsn <= self.anchor.position.commit_lsn {
            return Ok(false);
        }
        match self.may_skip {
            true => Ok(true),
            false => Err(Broken::NotThere {
                anchor: self.anchor.clone(),
                at: lsn,
            }),
        }
    }

    /// The anchor is there.
    fn is_at(&self, position: Position) -> bool {
        self.is_counted && position == self.anchor.position
    }

    fn on_event(&self, id: &str) -> Result<(), Broken> {
        let expected = self.anchor.event.as_ref();
        // earlier versions gave no id to an event that was given up
        let is_it = expected.is_none_or(|event| event.id.is_empty() || event.id == id);
        if !self.is_mapped || is_it {
            return Ok(());
        }
        Err(Broken::OtherEvent {
            anchor: self.anchor.clone(),
            id: id.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::checkpoint::record::AnchorEvent;
    use std::convert::Infallible;

    /// The anchor: the second event of the transaction at 0/64, committed at 8.
    fn anchor() -> Anchor {
        Anchor {
            position: Position {
                commit_lsn: Lsn(100),
                ordinal: 2,
            },
            event: Some(AnchorEvent {
                id: "b".into(),
                commit_time_us: 8,
                flags: own(),
            }),
        }
    }

    fn own() -> Flags {
        Flags::new("p", true, "m")
    }

    fn of_other_tables() -> Flags {
        Flags::new("p", true, "n")
    }

    /// Events of the transaction at `lsn` with these ids, from `first` on, and what ends the batch.
    fn batch(lsn: u64, first: u32, ids: &[&str], end: Option<Change>) -> Batch {
        let mut batch = Batch::default();
        for (id, ordinal) in ids.iter().zip(first..) {
            let position = Position {
                commit_lsn: Lsn(lsn),
                ordinal,
            };
            let append = |text: &str| {
                let text = text.as_bytes().to_vec();
                move |out: &mut Vec<u8>| {
                    out.extend_from_slice(&text);
                    Ok::<(), Infallible>(())
                }
            };
            let Ok(()) = batch.push_event("t", position, append("s"), append(id), append("{}"));
        }
        if let Some(end) = end {
            batch.push(end);
        }
        batch
    }

    fn commit(lsn: u64, commit_time_us: i64) -> Option<Change> {
        Some(Change::Commit {
            commit_lsn: Lsn(lsn),
            end_lsn: Lsn(lsn + 5),
            commit_time_us,
        })
    }

    fn open(lsn: u64, commit_time_us: i64) -> Option<Change> {
        Some(Change::Open {
            commit_lsn: Lsn(lsn),
            commit_time_us,
        })
    }

    fn keepalive(lsn: u64) -> Option<Change> {
        let wal_end = Lsn(lsn);
        Some(Change::Keepalive { wal_end })
    }

    /// What becomes of these batches in turn: whether continuity is proven, or why not.
    fn judge(confirmed: u64, batches: &[Batch]) -> Result<bool, Broken> {
        judge_with(confirmed, own(), batches)
    }

    fn judge_with(confirmed: u64, flags: Flags, batches: &[Batch]) -> Result<bool, Broken> {
        let mut continuity = Continuity::new(&anchor(), Lsn(0), Lsn(confirmed), Lsn(900), flags)?;
        for batch in batches {
            continuity.on_batch(batch)?;
        }
        Ok(continuity.is_proven())
    }

    #[test]
    fn the_anchors_transaction_with_its_time_and_event_proves_it() {
        let whole = batch(100, 1, &["a", "b"], commit(100, 8));
        assert_eq!(judge(50, &[whole]), Ok(true));
        let halves = [
            batch(100, 1, &["a"], open(100, 8)),
            batch(100, 2, &["b"], commit(100, 8)),
        ];
        assert_eq!(judge(50, &halves[..1]), Ok(false));
        assert_eq!(judge(50, &halves), Ok(true));
        // a keepalive from before it says nothing
        let early = [
            batch(0, 1, &[], keepalive(100)),
            batch(100, 1, &["a", "b"], commit(100, 8)),
        ];
        assert_eq!(judge(50, &early), Ok(true));
    }

    #[test]
    fn another_transaction_at_its_place_breaks_it() {
        let repeated = batch(100, 1, &["a", "b"], commit(100, 9));
        assert!(matches!(
            judge(50, &[repeated]),
            Err(Broken::OtherTransaction(_))
        ));
        let older = batch(90, 1, &["a", "b"], commit(90, 8));
        assert!(matches!(
            judge(50, &[older]),
            Err(Broken::OtherTransaction(_))
        ));
        let other = batch(100, 1, &["a", "x"], commit(100, 8));
        assert!(matches!(
            judge(50, &[other]),
            Err(Broken::OtherEvent { .. })
        ));
        let short = batch(100, 1, &["a"], commit(100, 8));
        assert!(matches!(judge(50, &[short]), Err(Broken::TooShort(_))));
    }

    #[test]
    fn what_is_later_breaks_it_unless_the_slot_was_confirmed_beyond() {
        for later in [
            batch(120, 1, &["c"], commit(120, 9)),
            batch(0, 1, &[], keepalive(101)),
        ] {
            let legal = judge(101, std::slice::from_ref(&later));
            assert_eq!(legal, Ok(true));
            // confirming the commit's own LSN repeats the transaction
            assert!(matches!(judge(100, &[later]), Err(Broken::NotThere { .. })));
        }
    }

    #[test]
    fn a_wal_that_ends_before_the_anchor_cannot_have_it() {
        for (wal_end, has_it) in [(99, false), (100, false), (101, true)] {
            let continuity = Continuity::new(&anchor(), Lsn(0), Lsn(50), Lsn(wal_end), own());
            assert_eq!(continuity.is_ok(), has_it, "{wal_end}");
        }
        for (wal_end, has_it) in [(99, false), (100, true)] {
            let bare = Anchor::bare(Lsn(100));
            let continuity = Continuity::new(&bare, Lsn(0), Lsn(50), Lsn(wal_end), own());
            assert_eq!(continuity.is_ok(), has_it, "{wal_end}");
        }
        for (stored, has_it) in [(200, true), (201, false)] {
            let continuity = Continuity::new(&anchor(), Lsn(stored), Lsn(50), Lsn(200), own());
            assert_eq!(continuity.is_ok(), has_it, "{stored}");
        }
    }

    #[test]
    fn an_event_where_the_record_has_none_breaks_it() {
        let empty_until = |stored_lsn| {
            let new = Continuity::new(&anchor(), Lsn(0), Lsn(50), Lsn(900), own()).unwrap();
            Continuity {
                empty: Some((anchor(), Lsn(stored_lsn))),
                ..new
            }
        };
        let own_transaction = || batch(100, 1, &["a", "b"], commit(100, 8));
        let mut continuity = empty_until(140);
        continuity.on_batch(&own_transaction()).unwrap();
        assert!(!continuity.is_proven(), "the stretch after it is not seen");
        let between = batch(120, 1, &["c"], commit(120, 9));
        let broken = continuity.on_batch(&between);
        assert!(matches!(broken, Err(Broken::NotEmpty { .. })), "{broken:?}");

        // of the anchor's own transaction other flags may have made more
        let longer = batch(100, 1, &["a", "b", "c"], commit(100, 8));
        assert_eq!(empty_until(101).on_batch(&longer), Ok(()));
        let mut ignored = Batch::default();
        ignored.push_ignored(Position {
            commit_lsn: Lsn(120),
            ordinal: 1,
        });
        ignored.push(commit(120, 9).unwrap());
        let mut continuity = empty_until(140);
        continuity.on_batch(&own_transaction()).unwrap();
        assert_eq!(continuity.on_batch(&ignored), Ok(()));
        let mut bare = empty_until(140);
        bare.empty = Some((Anchor::bare(Lsn(100)), Lsn(140)));
        let broken = bare.on_batch(&own_transaction());
        assert!(matches!(broken, Err(Broken::NotEmpty { .. })), "{broken:?}");

        for later in [
            batch(140, 1, &["c"], commit(140, 9)),
            batch(0, 1, &[], keepalive(140)),
        ] {
            let mut continuity = empty_until(140);
            continuity.on_batch(&own_transaction()).unwrap();
            continuity.on_batch(&later).unwrap();
            assert!(continuity.is_proven(), "{later:?}");
        }
        let mut continuity = empty_until(140);
        continuity.on_batch(&own_transaction()).unwrap();
        let early = batch(0, 1, &[], keepalive(139));
        continuity.on_batch(&early).unwrap();
        assert!(!continuity.is_proven());
    }

    #[test]
    fn other_flags_may_make_another_event_of_the_same_row_or_none() {
        let judge = |batch| judge_with(50, of_other_tables(), &[batch]);
        let other = || batch(100, 1, &["x", "y"], commit(100, 8));
        assert_eq!(judge(other()), Ok(true));
        let mut none = Batch::default();
        none.push_ignored(anchor().position);
        none.push(commit(100, 8).unwrap());
        assert_eq!(judge(none), Ok(true));
        let repeated = batch(100, 1, &["x", "y"], commit(100, 9));
        assert!(judge(repeated).is_err());
        let short = batch(100, 1, &["x"], commit(100, 8));
        assert!(matches!(judge(short), Err(Broken::TooShort(_))));
        assert!(judge(batch(120, 1, &["c"], commit(120, 9))).is_err());
    }

    #[test]
    fn what_another_publication_sends_need_not_have_the_anchor() {
        for flags in [Flags::new("q", true, "m"), Flags::new("p", false, "m")] {
            let judge = |batch| judge_with(50, flags.clone(), &[batch]);
            assert_eq!(judge(batch(120, 1, &["c"], commit(120, 9))), Ok(true));
            assert_eq!(judge(batch(0, 1, &[], keepalive(101))), Ok(true));
            assert_eq!(judge(batch(100, 1, &["x"], commit(100, 8))), Ok(true));
            let repeated = batch(100, 1, &["x", "b"], commit(100, 9));
            assert!(judge(repeated).is_err(), "what is sent is compared");
        }
    }
}
