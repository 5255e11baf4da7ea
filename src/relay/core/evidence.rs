//! Evidence: which events after the anchor are in the streams already, found by reading every message after `read_after`.
//!
//! A message is ours when it bears our slot and system id, its timeline is one of the present history up to where
//! that left it, and its `Nats-Expected-Last-Sequence` is its own sequence less one. All else is foreign: other writers,
//! other slots, copies. Where the event would be routed now proves nothing, and is not asked.

use crate::outbox::lineage::Lineage;
use crate::outbox::position::{Position, SourcePosition};
use std::hash::{DefaultHasher, Hash, Hasher};

/// What there is to know of a stored message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Its sequence.
    pub seq: u64,
    /// `Outbox-Position`.
    pub position: Option<SourcePosition>,
    /// `Nats-Msg-Id`.
    pub id: Option<String>,
    /// `Nats-Expected-Last-Sequence`.
    pub expected_last_sequence: Option<u64>,
    /// The stream it was copied from, of `Nats-Stream-Source`.
    pub copied_from: Option<String>,
    /// `Outbox-Late`: it was published after later events.
    pub is_late: bool,
    /// `Outbox-Parked`: it is a parked event.
    pub is_parked: bool,
}

impl Message {
    /// The position, if the message is ours.
    pub fn ours(&self, lineage: &Lineage) -> Option<Position> {
        let fenced = self.expected_last_sequence.map(|seq| seq + 1) == Some(self.seq);
        let at = self.position.as_ref().filter(|_| fenced)?;
        lineage.shares(at).then_some(at.position)
    }

    /// It is the message that `at` is the position of. A message that was stored before a promotion is known by either timeline.
    pub fn is_at(&self, at: &SourcePosition, lineage: &Lineage) -> bool {
        let is_shared = |own: &&SourcePosition| lineage.shares(own) && lineage.shares(at);
        let own = self.position.as_ref();
        own == Some(at)
            || own
                .filter(is_shared)
                .is_some_and(|own| own.position == at.position)
    }

    /// The position, if the message is ours but has no fence: with at-least-once delivery, or in a mirror that was promoted.
    pub fn unfenced(&self, lineage: &Lineage) -> Option<Position> {
        let at = self.position.as_ref().filter(|at| lineage.shares(at))?;
        let is_bare = self.expected_last_sequence.is_none() && self.copied_from.is_none();
        is_bare.then_some(at.position)
    }

    /// The position, and the stream that it comes from, if it is a copy of a message of ours.
    pub fn copy_of_ours(&self, lineage: &Lineage) -> Option<(Position, &str)> {
        let at = self.position.as_ref().filter(|at| lineage.shares(at))?;
        Some((at.position, self.copied_from.as_deref()?))
    }
}

/// An event that is in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    /// Its position in Postgres.
    pub position: Position,
    /// Which stream.
    pub stream: usize,
    /// Its sequence there.
    pub seq: u64,
    id_hash: u64,
    /// It is parked there.
    pub is_parked: bool,
}

/// Events in the order of their positions.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    found: Vec<Found>,
    is_sorted: bool,
}

/// What the evidence says of the next event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is there.
    Stored(Found),
    /// It is in none.
    Publish,
    /// Another event is there, at its position.
    OtherId(Found),
    /// A stream holds an event of before it that Postgres did not send.
    NotSent(Found),
}

fn hash(id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
}

impl Evidence {
    /// An event is in a stream, as this message.
    pub fn add(&mut self, position: Position, stream: usize, message: &Message) {
        self.is_sorted = false;
        self.found.push(Found {
            position,
            stream,
            seq: message.seq,
            id_hash: hash(message.id.as_deref().unwrap_or_default()),
            is_parked: message.is_parked,
        });
    }

    /// What it says of the event at `position`. Events are asked for in the order of their positions: what was found
    /// before this one was asked for, or Postgres does not have it. A WAL that was accepted in place of another one may have
    /// events at positions of that one's: both are there then.
    pub fn verdict(&mut self, position: Position, id: &str) -> Verdict {
        self.sort();
        let Some(found) = self.found.last() else {
            return Verdict::Publish;
        };
        match found.position.cmp(&position) {
            std::cmp::Ordering::Less => Verdict::NotSent(*found),
            std::cmp::Ordering::Equal => {
                let next = self.found.iter().rev();
                let mut at_it = next.take_while(|it| it.position == position);
                match at_it.find(|it| it.id_hash == hash(id)) {
                    Some(stored) => Verdict::Stored(*stored),
                    None => Verdict::OtherId(*found),
                }
            }
            std::cmp::Ordering::Greater => Verdict::Publish,
        }
    }

    /// What was found at `position` or before it is no longer needed.
    pub fn forget_upto(&mut self, position: Position) {
        self.sort();
        while self
            .found
            .pop_if(|found| found.position <= position)
            .is_some()
        {}
    }

    /// What was found after `position` proves nothing.
    pub fn forget_after(&mut self, position: Position) {
        self.found.retain(|found| found.position <= position);
    }

    /// The lowest sequence of the stream that it knows of.
    pub fn lowest_seq(&self, stream: usize) -> Option<u64> {
        let of_it = self.found.iter().filter(|found| found.stream == stream);
        of_it.map(|found| found.seq).min()
    }

    /// The last event's position.
    pub fn last(&self) -> Option<Position> {
        self.found.iter().map(|found| found.position).max()
    }

    /// An event after `position` is in the stream.
    pub fn has_after(&self, position: Position, stream: usize) -> bool {
        let of_it = self.found.iter().filter(|found| found.stream == stream);
        of_it.map(|found| found.position).any(|at| at > position)
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The next event last; of one event that is there twice, the first message.
    fn sort(&mut self) {
        if !std::mem::replace(&mut self.is_sorted, true) {
            self.found.sort_unstable();
            self.found.reverse();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::position::Source;
    use crate::postgres::Lsn;

    fn lineage() -> Lineage {
        Lineage {
            source: Source {
                slot: "s".into(),
                system_id: 7,
                timeline: 2,
            },
            switch_points: vec![(1, Lsn(0x100))],
        }
    }

    fn at(lsn: u64, ordinal: u32) -> Position {
        Position {
            commit_lsn: Lsn(lsn),
            ordinal,
        }
    }

    #[track_caller]
    fn check(position: &str, expected: Option<u64>, copied_from: Option<&str>, ours: bool) {
        let message = Message {
            seq: 5,
            position: position.parse().ok(),
            expected_last_sequence: expected,
            copied_from: copied_from.map(String::from),
            ..Message::default()
        };
        assert_eq!(message.ours(&lineage()).is_some(), ours, "{position}");
    }

    #[test]
    fn a_message_is_ours_by_slot_system_history_and_fence() {
        check("s 7 2 0/900 1", Some(4), None, true);
        check("s 7 1 0/FF 1", Some(4), None, true);
        // after its timeline was left
        check("s 7 1 0/100 1", Some(4), None, false);
        // of another slot, system, or history
        check("t 7 2 0/900 1", Some(4), None, false);
        check("s 8 2 0/900 1", Some(4), None, false);
        check("s 7 3 0/900 1", Some(4), None, false);
        // not at its place, or without a fence: a copy, or at-least-once
        check("s 7 2 0/900 1", Some(3), None, false);
        check("s 7 2 0/900 1", None, None, false);
        check("nonsense", Some(4), None, false);
    }

    #[test]
    fn a_message_without_a_fence_is_told_from_a_copy_by_its_source() {
        let message = |copied_from: Option<&str>| Message {
            seq: 5,
            position: "s 7 2 0/900 1".parse().ok(),
            copied_from: copied_from.map(String::from),
            ..Message::default()
        };
        assert_eq!(message(None).unfenced(&lineage()), Some(at(0x900, 1)));
        assert_eq!(message(Some("A")).unfenced(&lineage()), None);
        let copy = message(Some("A"));
        assert_eq!(copy.copy_of_ours(&lineage()), Some((at(0x900, 1), "A")));
    }

    fn add(evidence: &mut Evidence, position: Position, stream: usize, seq: u64, id: &str) {
        let message = Message {
            seq,
            id: Some(id.into()),
            ..Message::default()
        };
        evidence.add(position, stream, &message);
    }

    /// Whether the event is stored there, or another one is.
    fn verdict(
        evidence: &mut Evidence,
        position: Position,
        id: &str,
    ) -> Option<(bool, usize, u64)> {
        match evidence.verdict(position, id) {
            Verdict::Stored(it) => Some((true, it.stream, it.seq)),
            Verdict::OtherId(it) => Some((false, it.stream, it.seq)),
            Verdict::Publish => None,
            Verdict::NotSent(found) => panic!("{found:?} was not asked for"),
        }
    }

    #[test]
    fn each_event_is_found_by_its_position_in_whatever_stream() {
        let mut evidence = Evidence::default();
        add(&mut evidence, at(30, 1), 1, 9, "c");
        add(&mut evidence, at(10, 2), 0, 4, "a");
        // there twice: the first message counts
        add(&mut evidence, at(10, 2), 0, 3, "a");
        add(&mut evidence, at(20, 1), 1, 8, "b");
        assert_eq!(evidence.lowest_seq(1), Some(8));
        assert_eq!(verdict(&mut evidence, at(10, 1), "x"), None);
        assert_eq!(verdict(&mut evidence, at(10, 2), "a"), Some((true, 0, 3)));
        assert_eq!(verdict(&mut evidence, at(10, 2), "z"), Some((false, 0, 3)));
        evidence.forget_upto(at(10, 2));
        assert_eq!(verdict(&mut evidence, at(20, 1), "b"), Some((true, 1, 8)));
        // Postgres has not sent what the stream has
        let Verdict::NotSent(found) = evidence.verdict(at(25, 1), "d") else {
            panic!("an event of the stream was passed over");
        };
        assert_eq!((found.position, found.seq), (at(20, 1), 8));
        evidence.forget_upto(at(30, 1));
        assert!(evidence.is_empty());
        assert_eq!(verdict(&mut evidence, at(40, 1), "e"), None);
    }

    #[test]
    fn an_event_is_stored_also_where_one_of_another_wal_has_its_position() {
        let mut evidence = Evidence::default();
        add(&mut evidence, at(10, 1), 0, 1, "undone");
        add(&mut evidence, at(10, 1), 0, 5, "a");
        assert_eq!(verdict(&mut evidence, at(10, 1), "a"), Some((true, 0, 5)));
        assert_eq!(
            verdict(&mut evidence, at(10, 1), "undone"),
            Some((true, 0, 1))
        );
        assert_eq!(verdict(&mut evidence, at(10, 1), "b"), Some((false, 0, 1)));
        evidence.forget_upto(at(10, 1));
        assert!(evidence.is_empty());
    }
}
