//! Continuity: the proof that this is the WAL which the streams were written from. Pure.
//!
//! The copy stream starts at the anchor's commit, and Postgres then sends that transaction first, whatever has happened
//! since to publication or table. Another transaction at that place, an older one, one too short, or a position beyond
//! it while it has not come, means a restored snapshot or another clone promoted to the same timeline number. A later one
//! first is legal only if the slot was confirmed beyond the anchor's commit: then Postgres leaves that transaction out.
//!
//! Until continuity is proven nothing may be told to Postgres, and nothing is published that comes after the anchor.

use crate::outbox::batch::{Batch, Change};
use crate::outbox::position::Position;
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::Anchor;

/// What is known of the copy stream so far.
#[derive(Debug)]
pub struct Continuity {
    expected: Option<Expected>,
    /// Where the WAL ended at the start, if what is in the streams need not come from Postgres again.
    lenient_until: Option<Lsn>,
}

#[derive(Debug)]
struct Expected {
    anchor: Anchor,
    /// The slot was confirmed beyond the anchor's commit.
    may_skip: bool,
    /// The flags that make events have changed: the transaction is compared, its events cannot be.
    has_other_flags: bool,
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
    /// Postgres has come to this position, and has not sent the anchor's transaction.
    NotThere {
        /// The anchor.
        anchor: Anchor,
        /// Where Postgres is.
        at: Lsn,
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
    /// Before the copy stream starts at the anchor. `confirmed_lsn` is the slot's, `wal_end` that of the server; an error
    /// says that the server cannot have the anchor. `is_lenient`: it was when the anchor's cut was written, and there was
    /// evidence left.
    pub fn new(
        anchor: &Anchor,
        confirmed_lsn: Lsn,
        wal_end: Lsn,
        has_other_flags: bool,
        is_lenient: bool,
    ) -> Result<Continuity, Broken> {
        let commit_lsn = anchor.position.commit_lsn;
        let lenient_until = (is_lenient || has_other_flags).then_some(wal_end);
        if anchor.event.is_none() {
            return Ok(Continuity {
                expected: None,
                lenient_until,
            });
        }
        if wal_end <= commit_lsn {
            return Err(Broken::WalEndsBefore {
                anchor: anchor.clone(),
                wal_end,
            });
        }
        Ok(Continuity {
            expected: Some(Expected {
                anchor: anchor.clone(),
                may_skip: confirmed_lsn > commit_lsn,
                has_other_flags,
                begun: false,
            }),
            lenient_until,
        })
    }

    /// It is accepted unproven (`-resume-anyway`).
    pub fn accepted(wal_end: Lsn) -> Continuity {
        Continuity {
            expected: None,
            lenient_until: Some(wal_end),
        }
    }

    /// What is in the streams need not come from Postgres again: other flags may make no event of it, or it is accepted.
    pub fn is_lenient(&self) -> bool {
        self.lenient_until.is_some()
    }

    /// What is in the streams after this end of the WAL, and has not come from Postgres since, will not come.
    pub fn lenient_until(&self) -> Option<Lsn> {
        self.lenient_until
    }

    /// This is the WAL that the streams were written from.
    pub fn is_proven(&self) -> bool {
        self.expected.is_none()
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
                Change::Event(spans) if spans.position == expected.anchor.position => {
                    let event = batch.event(&spans);
                    expected.on_event(event.id)?;
                    self.expected = None;
                    return Ok(());
                }
                Change::Commit { .. } if !expected.has_other_flags => {
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

    fn on_event(&self, id: &str) -> Result<(), Broken> {
        let expected = self.anchor.event.as_ref();
        if self.has_other_flags || expected.is_none_or(|event| event.id == id) {
            return Ok(());
        }
        Err(Broken::OtherEvent {
            anchor: self.anchor.clone(),
            id: id.to_string(),
        })
    }
}
