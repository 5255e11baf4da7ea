//! The cut that is true at any moment, and what of it is recorded.

use super::super::window::State;
use super::{Connected, ExactlyOnce};
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::{Anchor, AnchorEvent, Cut, StreamCut};
use std::time::Instant;

impl ExactlyOnce {
    /// The cut that is true now.
    pub fn cut(&self) -> Cut {
        if let Some(cut) = &self.cut_at_disconnect {
            return cut.clone();
        }
        let connected = self.connection.as_ref();
        let anchor = self.anchor();
        let commit_lsn = anchor.position.commit_lsn;
        let streams = connected.into_iter().flat_map(|connected| {
            let marks_ends = connected.capacity.marks_ends;
            let of_streams = connected.streams.iter().enumerate();
            let of_streams = of_streams.map(move |(index, stream)| StreamCut {
                name: stream.name().to_string(),
                created: stream.created.clone(),
                read_after: self.read_after(connected, index),
                witness: stream.witness(&self.lineage),
                unseen: stream.unseen().cloned(),
                share: stream.share(commit_lsn).filter(|_| marks_ends),
            });
            of_streams.chain(connected.missing.iter().cloned())
        });
        let behind = connected.filter(|it| anchor.position < it.evidence_upto);
        Cut {
            stored_lsn: self.reached.stored_lsn,
            streams: streams.collect(),
            quiescent: self.is_quiescent,
            lenient_upto: match anchor.position.commit_lsn <= self.lenient_upto {
                true => self.lenient_upto,
                false => Lsn::INVALID,
            },
            flags: match behind {
                Some(connected) => connected.flags.and(self.continuity.flags()),
                None => self.continuity.flags().clone(),
            },
            is_empty: self.reached.passed_by_others.is_none(),
            anchor,
        }
    }

    /// The same, to be recorded.
    pub fn cut_to_record(&mut self) -> Cut {
        self.gate.on_cut();
        self.cut()
    }

    /// No event after the anchor has this sequence or a lower one.
    fn read_after(&self, connected: &Connected, index: usize) -> u64 {
        let out = self
            .window
            .events()
            .filter_map(|pending| match pending.state {
                State::Sent {
                    stream, expected, ..
                } if stream == index => Some(expected),
                State::Resolved(Some(stored)) if stored.stream == index => {
                    Some(stored.seq.saturating_sub(1))
                }
                _ => None,
            });
        let evidence = connected
            .evidence
            .lowest_seq(index)
            .map(|seq| seq.saturating_sub(1));
        let anchor = self.anchor().position;
        let gone = self.doubt.lowest_gone(index, anchor);
        let gone = gone.map(|seq| seq.saturating_sub(1));
        let stream = connected.streams.get(index);
        let known = stream.map_or(0, |stream| stream.fence.known());
        out.chain(evidence)
            .chain(gone)
            .min()
            .unwrap_or(known)
            .min(known)
    }

    fn anchor(&self) -> Anchor {
        let Some(event) = &self.reached.event else {
            return self.reached.anchor.clone();
        };
        let position = event.position();
        let ended = self
            .reached
            .commit
            .filter(|commit| commit.lsn == position.commit_lsn);
        let time_us = ended.map(|commit| commit.time_us);
        let time_us = time_us.or_else(|| self.window.commit_time_us(position.commit_lsn));
        Anchor {
            position,
            event: Some(AnchorEvent {
                id: event.id().to_string(),
                commit_time_us: time_us
                    .expect("a batch tells the time of each transaction that it has events of"),
                flags: self.continuity.flags().clone(),
            }),
        }
    }

    /// The record holds the cut that was taken last.
    pub fn on_recorded(&mut self, now: Instant) {
        self.gate.on_recorded(now);
        for stream in self.connection.iter_mut().flat_map(|it| &mut it.streams) {
            stream.is_recorded = true;
        }
    }

    /// The record holds the cut that is true now, so it need not be written.
    pub fn on_recorded_again(&mut self, now: Instant) {
        self.gate.on_cut();
        self.on_recorded(now);
    }

    /// A record is to be written at once.
    pub fn wants_record(&self) -> bool {
        self.connection.is_some() && self.gate.wants_record()
    }

    /// Nothing more is published: whether everything that was, also by others before, is resolved, the next cut says.
    pub fn mark_quiescent(&mut self) {
        let (anchor, stored_lsn) = (self.anchor().position, self.reached.stored_lsn);
        self.is_quiescent = self.connection.is_some()
            && self.window.waiting() == 0
            && self.doubt.has_resolved_all(anchor, stored_lsn);
    }
}
