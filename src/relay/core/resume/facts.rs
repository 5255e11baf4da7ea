//! What a resume begins with: what was known before, by the record or by the core, and the streams as they are found. Pure.

use crate::outbox::lineage::Lineage;
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::{Cut, StreamCut};
use crate::relay::checkpoint::store::{ANYTHING, Store};
use std::time::Instant;

/// A stream as the server describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamFacts {
    /// Its name.
    pub name: String,
    /// The JetStream domain that it is in; empty without one.
    pub domain: String,
    /// When it was created.
    pub created: String,
    /// It has more than one replica.
    pub is_replicated: bool,
    /// The lowest sequence still there.
    pub first_seq: u64,
    /// The highest sequence given so far.
    pub last_seq: u64,
    /// Nothing is consumed from it, or lives shorter than what is older.
    pub is_log: bool,
    /// It captures something of the prefix, or the park subject.
    pub is_routed: bool,
    /// Its last message stays while an older one does; see
    /// [`keeps_its_end`](crate::jetstream::streams::StreamConfig::keeps_its_end). What is gone from there was lost or deleted,
    /// and not consumed.
    pub keeps_its_end: bool,
    /// The same of each message.
    pub keeps_its_order: bool,
}

/// What was known before the streams are looked at.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The cuts to resume with, the youngest first.
    pub cuts: Vec<Cut>,
    /// The copy stream goes on where it is: no other cut will do than the youngest.
    pub goes_on: bool,
    /// Postgres was told of the oldest of them: what a stream has lost of it, the slot cannot send again.
    pub oldest_is_matured: bool,
    /// Where to begin without a cut: the slot's position.
    pub confirmed_lsn: Lsn,
    /// Nothing rules out that the streams were written with at-least-once delivery last: messages of ours without a fence
    /// are told from copies.
    pub maybe_unfenced: bool,
    /// Streams to be read beside those that the cuts name.
    pub also: Vec<String>,
    /// See [`Store::distrust`].
    pub distrusted: Vec<String>,
}

impl Known {
    /// The copy stream goes on: what the core knew when it lost the connection.
    pub fn of_core(cut: Cut) -> Known {
        Known {
            cuts: vec![cut],
            goes_on: true,
            ..Known::default()
        }
    }

    /// A session starts: what the record says. A slot at `confirmed_lsn` that was moved by somebody else is taken as it is:
    /// whoever cannot accept that has halted before (R20).
    pub fn of_record(store: &Store, confirmed_lsn: Lsn, now: Instant) -> Known {
        let (cuts, oldest_is_matured) = store.cuts(now);
        let held = store.held();
        Known {
            cuts,
            goes_on: false,
            oldest_is_matured,
            confirmed_lsn,
            maybe_unfenced: confirmed_lsn > Lsn::INVALID
                && held.is_none_or(|record| record.told_lsn == ANYTHING),
            also: Vec::new(),
            distrusted: store.distrusted().to_vec(),
        }
    }

    /// The streams that are to be read beside those that capture something of ours, each with what the youngest cut that
    /// names it says of it.
    pub fn named(&self) -> Vec<(String, Option<StreamCut>)> {
        let also = self.also.iter().map(|name| (name.clone(), None));
        let mut named: Vec<(String, Option<StreamCut>)> = also.collect();
        for cut in self.cuts.iter().flat_map(|cut| &cut.streams) {
            if named.iter().all(|(name, _)| *name != cut.name) {
                named.push((cut.name.clone(), Some(cut.clone())));
            }
        }
        named
    }
}

/// What a resume begins with.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The server that the copy stream comes from.
    pub lineage: Lineage,
    /// What was known before.
    pub known: Known,
    /// Every stream under the prefix or named in a cut.
    pub streams: Vec<StreamFacts>,
    /// What is lost is lost (`-resume-anyway`).
    pub accept_loss: bool,
}

impl Facts {
    /// A stream that captures nothing of ours any more is forgotten once what it holds of ours has matured: all of it was read
    /// before the matured cut, and nothing has come since. `missing`: the streams that are gone. The cut of a core that goes on
    /// is no matured one.
    pub fn forget_left(&mut self, missing: &mut Vec<StreamCut>) {
        let is_matured = self.known.oldest_is_matured && !self.known.goes_on;
        let Some(matured) = self.known.cuts.last().filter(|_| is_matured) else {
            return;
        };
        let is_over = |it: &&StreamCut| {
            let stream = self.streams.iter().find(|stream| stream.name == it.name);
            stream.is_none_or(|stream| !stream.is_routed && stream.last_seq <= it.read_after)
                && self
                    .known
                    .cuts
                    .iter()
                    .all(|cut| cut.stream(&it.name) == Some(it))
        };
        let left = matured.streams.iter().filter(is_over);
        let left: Vec<String> = left.map(|it| it.name.clone()).collect();
        for cut in &mut self.known.cuts {
            cut.streams.retain(|it| !left.contains(&it.name));
        }
        self.streams.retain(|it| !left.contains(&it.name));
        missing.retain(|it| !left.contains(&it.name));
    }
}
