//! The record: what a slot's key in the checkpoint bucket holds. Values and their JSON, no decisions.
//!
//! A [`Cut`] is a statement about Postgres and the streams at once, and stays true: everything up to its anchor is
//! resolved (stored, parked, dropped, given up), and in each stream no event after the anchor has the sequence
//! `read_after` or a lower one. All LSNs of a record are on its one timeline; [`Record::rebase`] reads them on a server
//! whose history left that timeline.

use crate::outbox::flags::Flags;
use crate::outbox::lineage::{Conflict, Lineage, NotInHistory};
use crate::outbox::position::{Position, Source, SourcePosition};
use crate::postgres::Lsn;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// The place in Postgres up to which a cut has everything resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// An event's position; with ordinal 0 a bare LSN: everything that was committed before it.
    #[serde(with = "as_text")]
    pub position: Position,
    /// The event, unless the anchor is a bare LSN: Postgres must send the same one again.
    #[serde(default, skip_serializing_if = "Option::is_none", flatten)]
    pub event: Option<AnchorEvent>,
}

/// What tells an event from another one at the same position of another history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnchorEvent {
    /// Its message id.
    pub id: String,
    /// When its transaction was committed, in microseconds since 2000-01-01 UTC: a restored server that repeats the same
    /// writes gives the same LSNs, but another time.
    pub commit_time_us: i64,
    /// Those that made it an event.
    #[serde(default)]
    pub flags: Flags,
}

impl fmt::Display for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.event {
            Some(event) => write!(f, "{} at {}", event.id, self.position),
            None => self.position.commit_lsn.fmt(f),
        }
    }
}

impl Anchor {
    /// Everything that was committed before `lsn`.
    pub fn bare(lsn: Lsn) -> Anchor {
        Anchor {
            position: Position {
                commit_lsn: lsn,
                ordinal: 0,
            },
            event: None,
        }
    }
}

/// A message of ours, and where it is in its stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// Its sequence.
    pub seq: u64,
    /// Its `Outbox-Position`, as the header has it.
    #[serde(with = "as_text")]
    pub position: SourcePosition,
}

/// What a cut says of one stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamCut {
    /// Its name.
    pub name: String,
    /// When it was created, RFC 3339, as the server reports it.
    pub created: String,
    /// No event of ours after the anchor has this sequence or a lower one.
    pub read_after: u64,
    /// The message of ours with the highest sequence at or before the anchor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<Witness>,
    /// An earlier one, which must be there, too: it was not seen again since the publish after it, which did not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unseen: Option<Witness>,
    /// So many events of the anchor's transaction, the anchor and those before it, are in it; `None`: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<u64>,
}

impl StreamCut {
    /// The messages of ours by which the stream is known.
    pub fn witnesses(&self) -> impl Iterator<Item = &Witness> {
        self.witness.iter().chain(&self.unseen)
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Up to here everything is resolved.
    pub anchor: Anchor,
    /// The last commit's end, or a keepalive's position, with nothing unresolved before it.
    #[serde(with = "as_text")]
    pub stored_lsn: Lsn,
    /// The streams that events may be in.
    pub streams: Vec<StreamCut>,
    /// Nothing was on its way when this was written, and nothing was published since by the one who wrote it.
    #[serde(default)]
    pub quiescent: bool,
    /// What the streams have after the anchor need not come from Postgres again: it may have been written from another WAL, which
    /// went up to here, and in place of which this one was accepted. 0/0: there was none, or this one is beyond it.
    #[serde(default, with = "as_text", skip_serializing_if = "is_invalid")]
    pub lenient_upto: Lsn,
    /// What the streams have after the anchor was made by these.
    #[serde(default)]
    pub flags: Flags,
    /// By these, too, no event was committed between the anchor and `stored_lsn`.
    #[serde(default)]
    pub is_empty: bool,
}

impl Cut {
    /// What it says of the stream of that name.
    pub fn stream(&self, name: &str) -> Option<&StreamCut> {
        self.streams.iter().find(|stream| stream.name == name)
    }

    /// What was committed before `lsn` is resolved, whatever became of it: the slot does not send it any more.
    fn move_to(&mut self, lsn: Lsn) {
        if self.anchor.position.commit_lsn < lsn {
            self.anchor = Anchor::bare(lsn);
            self.stored_lsn = self.stored_lsn.max(lsn);
        }
    }

    /// Cuts it to where the present history left its timeline: what that one has beyond is not in this WAL.
    fn cut_to(&mut self, lsn: Lsn) {
        if self.anchor.position.commit_lsn >= lsn {
            self.anchor = Anchor::bare(lsn);
        }
        self.stored_lsn = self.stored_lsn.min(lsn);
    }
}

/// A cut on its way to being matured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ripening {
    /// The cut.
    pub cut: Cut,
    /// Since when the key has held it, by the NATS server's clock in milliseconds since 1970. `None`: since this very
    /// value was stored; when that would be was not known when it was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<i64>,
}

/// The key's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The timeline of all LSNs below.
    pub timeline: u32,
    /// The newest cut.
    pub young: Cut,
    /// A cut that the key has held for less than the hold-back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ripening: Option<Ripening>,
    /// A cut that it has held for the hold-back: Postgres may be told its `stored_lsn`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matured: Option<Cut>,
    /// The most that Postgres may have been told.
    #[serde(with = "as_text")]
    pub told_lsn: Lsn,
    /// What the publication published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publication: Option<String>,
    /// The process that wrote it.
    pub writer: String,
    /// How many writes of that process there were.
    pub writes: u64,
}

impl Record {
    /// The same seen from a server whose history may have left the record's timeline.
    pub fn rebase(mut self, lineage: &Lineage) -> Result<Record, Conflict> {
        let lsn = match lineage.left_at(self.timeline) {
            Ok(None) => return Ok(self),
            Ok(Some(lsn)) => lsn,
            Err(NotInHistory) => {
                return Err(Conflict::OtherTimeline(SourcePosition {
                    source: Source {
                        timeline: self.timeline,
                        ..lineage.source.clone()
                    },
                    position: self.young.anchor.position,
                }));
            }
        };
        self.timeline = lineage.source.timeline;
        self.young.cut_to(lsn);
        if let Some(ripening) = &mut self.ripening {
            ripening.cut.cut_to(lsn);
        }
        if let Some(matured) = &mut self.matured {
            matured.cut_to(lsn);
        }
        self.told_lsn = self.told_lsn.min(lsn);
        Ok(self)
    }

    /// A slot at `confirmed_lsn` was moved or re-created by somebody else: Postgres was not told that much.
    pub fn is_exceeded(&self, confirmed_lsn: Lsn) -> bool {
        confirmed_lsn > self.told_lsn
    }

    /// The slot was moved to `confirmed_lsn`, which is accepted: whichever cut is resumed with, now or later, the slot sends
    /// nothing before that.
    pub fn move_to(&mut self, confirmed_lsn: Lsn) {
        let ripening = self.ripening.iter_mut().map(|ripening| &mut ripening.cut);
        let older = ripening.chain(&mut self.matured);
        older
            .chain([&mut self.young])
            .for_each(|cut| cut.move_to(confirmed_lsn));
        self.told_lsn = self.told_lsn.max(confirmed_lsn);
    }

    /// Its cuts, the youngest first.
    pub fn cuts(&self) -> impl Iterator<Item = &Cut> {
        let ripening = self.ripening.iter().map(|ripening| &ripening.cut);
        std::iter::once(&self.young)
            .chain(ripening)
            .chain(&self.matured)
    }

    /// The value to write.
    pub fn body(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers have a JSON form")
    }
}

/// What has a textual form of its own is written in it.
fn is_invalid(lsn: &Lsn) -> bool {
    *lsn == Lsn::INVALID
}

mod as_text {
    use super::*;

    pub fn serialize<T: ToString, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&value.to_string())
    }

    pub fn deserialize<'de, T: FromStr, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        let text = String::deserialize(from)?;
        text.parse()
            .map_err(|_| serde::de::Error::custom("not of the form that it is written in"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn event_anchor(lsn: u64, ordinal: u32, id: &str) -> Anchor {
        Anchor {
            position: Position {
                commit_lsn: Lsn(lsn),
                ordinal,
            },
            event: Some(AnchorEvent {
                id: id.into(),
                commit_time_us: 8_000,
                flags: flags(),
            }),
        }
    }

    pub(crate) fn cut(lsn: u64) -> Cut {
        Cut {
            anchor: event_anchor(lsn, 1, "id"),
            stored_lsn: Lsn(lsn + 5),
            streams: vec![StreamCut {
                name: "EV".into(),
                created: "2026-11-23T09:26:06Z".into(),
                read_after: lsn,
                witness: Some(Witness {
                    seq: lsn,
                    position: format!("s 1 2 {} 1", Lsn(lsn)).parse().unwrap(),
                }),
                unseen: None,
                share: None,
            }],
            quiescent: false,
            lenient_upto: Lsn::INVALID,
            flags: flags(),
            is_empty: true,
        }
    }

    pub(crate) fn flags() -> Flags {
        Flags::new("p", true, "m")
    }

    pub(crate) fn record(young: u64, ripening: u64, matured: u64) -> Record {
        Record {
            timeline: 2,
            young: cut(young),
            ripening: Some(Ripening {
                cut: cut(ripening),
                since_ms: Some(4_000),
            }),
            matured: Some(cut(matured)),
            told_lsn: Lsn(young + 5),
            publication: Some("all".into()),
            writer: "we".into(),
            writes: 3,
        }
    }

    #[test]
    fn a_cut_is_moved_forward_and_cut_back_to_a_place_in_the_wal() {
        let moved = |lsn| {
            let mut moved = cut(0x20);
            moved.move_to(Lsn(lsn));
            (moved.anchor, moved.stored_lsn)
        };
        let as_it_was = (cut(0x20).anchor, Lsn(0x25));
        assert_eq!(moved(0x20), as_it_was, "the slot sends that transaction");
        assert_eq!(moved(0x21), (Anchor::bare(Lsn(0x21)), Lsn(0x25)));
        assert_eq!(moved(0x30), (Anchor::bare(Lsn(0x30)), Lsn(0x30)));
        let back = |lsn| {
            let mut back = cut(0x20);
            back.cut_to(Lsn(lsn));
            (back.anchor, back.stored_lsn)
        };
        assert_eq!(back(0x30), as_it_was);
        assert_eq!(back(0x21), (cut(0x20).anchor, Lsn(0x21)));
        assert_eq!(back(0x20), (Anchor::bare(Lsn(0x20)), Lsn(0x20)));
    }

    #[test]
    fn a_record_reads_back() {
        let record = record(0x300, 0x200, 0x100);
        let body = record.body();
        assert_eq!(serde_json::from_slice::<Record>(&body).unwrap(), record);
        let bare = Record {
            young: Cut {
                anchor: Anchor::bare(Lsn(7)),
                ..cut(1)
            },
            ripening: None,
            matured: None,
            ..record
        };
        assert_eq!(
            serde_json::from_slice::<Record>(&bare.body()).unwrap(),
            bare
        );
    }

    #[test]
    fn each_lsn_is_cut_to_where_the_history_left_its_timeline() {
        let lineage = |timeline, switch_points| Lineage {
            source: Source {
                slot: "s".into(),
                system_id: 1,
                timeline,
            },
            switch_points,
        };
        let written = record(0x300, 0x200, 0x100);
        let same = written.clone().rebase(&lineage(2, Vec::new())).unwrap();
        assert_eq!(same, written);
        let promoted = lineage(3, vec![(2, Lsn(0x203))]);
        let rebased = written.clone().rebase(&promoted).unwrap();
        assert_eq!(rebased.timeline, 3);
        assert_eq!(rebased.young.anchor, Anchor::bare(Lsn(0x203)));
        assert_eq!(rebased.young.stored_lsn, Lsn(0x203));
        // the anchor is in both histories, the end of its transaction is not
        let ripening = rebased.ripening.unwrap().cut;
        assert_eq!(ripening.anchor, event_anchor(0x200, 1, "id"));
        assert_eq!(ripening.stored_lsn, Lsn(0x203));
        assert_eq!(rebased.matured, written.matured);
        assert_eq!(rebased.told_lsn, Lsn(0x203));
        assert!(matches!(
            written.rebase(&lineage(1, Vec::new())),
            Err(Conflict::OtherTimeline(_))
        ));
    }
}
