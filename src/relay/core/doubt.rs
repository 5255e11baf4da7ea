//! Messages that are gone (consumed, expired, purged) prove nothing: which events may have been one of them.
//!
//! Such an event is asked for by publishing it alone: JetStream answers `duplicate` if it has seen the id. Where it has
//! forgotten, the event is stored again: rather twice than never.

use super::gate::MOST_UNRECORDED;
use crate::outbox::position::Position;
use crate::postgres::Lsn;

/// See the module.
#[derive(Debug)]
pub struct Doubt {
    /// No event after this was ever published.
    maybe_sent: Position,
    /// Events up to here are in doubt.
    until: Option<Position>,
    /// So many more of them at most.
    left: u64,
    /// The lowest sequence that is gone of each stream that has one.
    gone: Vec<(usize, u64)>,
}

impl Doubt {
    /// Of a copy stream that starts at `anchor`. Whoever had the slot before has published nothing beyond `wal_end`; nor
    /// beyond the anchor, if it ended in order.
    pub fn new(anchor: Position, is_quiescent: bool, wal_end: Lsn) -> Doubt {
        let wal_end = Position {
            commit_lsn: wal_end,
            ordinal: 0,
        };
        Doubt {
            maybe_sent: if is_quiescent { anchor } else { wal_end },
            until: None,
            left: 0,
            gone: Vec::new(),
        }
    }

    /// A message was found gone that may have been an event; `most`: how many events can have been published since the cut,
    /// if that is known.
    pub fn on_gone(&mut self, stream: usize, seq: u64, most: Option<u64>) {
        self.until = Some(self.maybe_sent);
        self.left = most.map_or(u64::MAX, |window| window + MOST_UNRECORDED);
        match self.gone.iter_mut().find(|(of, _)| *of == stream) {
            Some((_, lowest)) => *lowest = seq.min(*lowest),
            None => self.gone.push((stream, seq)),
        }
    }

    /// The lowest sequence of a stream that may have been an event after `anchor`: a cut that has it read would not have it
    /// asked for again.
    pub fn lowest_gone(&self, stream: usize, anchor: Position) -> Option<u64> {
        let is_over = self.left == 0 || self.until.is_none_or(|until| until <= anchor);
        let mut gone = self.gone.iter().filter(|_| !is_over);
        gone.find(|(of, _)| *of == stream).map(|(_, seq)| *seq)
    }

    /// Nothing was ever published that is not resolved, where everything up to these is.
    pub fn has_resolved_all(&self, anchor: Position, stored_lsn: Lsn) -> bool {
        self.maybe_sent <= anchor || self.maybe_sent.commit_lsn < stored_lsn
    }

    /// A new connection: what was in doubt has to be found out again.
    pub fn clear(&mut self) {
        self.until = None;
        self.gone.clear();
    }

    /// An event is published.
    pub fn on_publish(&mut self, position: Position) {
        if self.is_about(position) {
            self.left -= 1;
        }
        self.maybe_sent = self.maybe_sent.max(position);
    }

    /// Whether the event at `position` may have been one of them.
    pub fn is_about(&self, position: Position) -> bool {
        self.left > 0 && self.until.is_some_and(|until| position <= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lsn: u64, ordinal: u32) -> Position {
        Position {
            commit_lsn: Lsn(lsn),
            ordinal,
        }
    }

    #[test]
    fn what_nobody_can_have_published_is_not_in_doubt() {
        let mut doubt = Doubt::new(at(10, 1), false, Lsn(20));
        assert!(!doubt.is_about(at(15, 1)), "nothing is gone");
        doubt.on_gone(0, 7, None);
        assert!(doubt.is_about(at(15, 1)) && !doubt.is_about(at(20, 1)));
        let mut doubt = Doubt::new(at(10, 1), true, Lsn(20));
        doubt.on_gone(0, 7, None);
        assert!(!doubt.is_about(at(10, 2)), "it ended in order");
        doubt.on_publish(at(30, 1));
        assert!(!doubt.is_about(at(30, 1)), "not over an earlier connection");
        doubt.on_gone(0, 7, None);
        assert!(doubt.is_about(at(30, 1)) && !doubt.is_about(at(30, 2)));
    }

    #[test]
    fn the_lowest_that_is_gone_of_each_stream_is_kept_while_it_is_in_doubt() {
        let mut doubt = Doubt::new(at(10, 1), false, Lsn(20));
        assert_eq!(doubt.lowest_gone(0, at(10, 1)), None, "nothing is gone");
        for seq in [8, 7, 9] {
            doubt.on_gone(0, seq, None);
        }
        doubt.on_gone(1, 3, None);
        assert_eq!(doubt.lowest_gone(0, at(10, 1)), Some(7));
        assert_eq!(doubt.lowest_gone(1, at(19, 9)), Some(3));
        assert_eq!(doubt.lowest_gone(2, at(10, 1)), None);
        assert_eq!(doubt.lowest_gone(0, at(20, 0)), None, "all is resolved");
        doubt.on_gone(0, 7, Some(0));
        for lsn in 0..MOST_UNRECORDED {
            assert_eq!(doubt.lowest_gone(0, at(10, 1)), Some(7));
            doubt.on_publish(at(11, lsn as u32));
        }
        assert_eq!(doubt.lowest_gone(0, at(10, 1)), None, "no more can be");
        doubt.on_gone(0, 7, None);
        doubt.clear();
        assert!(!doubt.is_about(at(15, 1)));
        doubt.on_gone(1, 4, None);
        assert_eq!(doubt.lowest_gone(0, at(10, 1)), None, "it was cleared");
    }

    #[test]
    fn what_was_published_is_resolved_once_the_anchor_or_the_stored_lsn_is_there() {
        let doubt = Doubt::new(at(10, 1), true, Lsn(20));
        assert!(!doubt.has_resolved_all(at(10, 0), Lsn(10)));
        assert!(doubt.has_resolved_all(at(10, 1), Lsn(0)));
        assert!(doubt.has_resolved_all(at(10, 0), Lsn(11)));
    }

    #[test]
    fn no_more_are_in_doubt_than_the_record_may_lack() {
        let mut doubt = Doubt::new(at(10, 1), false, Lsn(u64::MAX));
        doubt.on_gone(0, 7, Some(2));
        for lsn in 0..MOST_UNRECORDED + 2 {
            assert!(doubt.is_about(at(20 + lsn, 1)));
            doubt.on_publish(at(20 + lsn, 1));
        }
        assert!(!doubt.is_about(at(1_000_000, 1)));
    }
}
