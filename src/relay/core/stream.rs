//! A stream as the core knows it: its fence, its witness, and how many publishes may be on their way to it.

use super::evidence::Message;
use super::fence::Fence;
use super::resume::facts::StreamFacts;
use super::window::Stored;
use crate::jetstream::ack::Origin;
use crate::outbox::batch::Event;
use crate::outbox::lineage::Lineage;
use crate::outbox::position::Position;
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::{StreamCut, Witness};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long after a foreign message a replicated stream gets one publish at a time: there a later publish of a pipeline can
/// take the place of a refused one.
const SHARED_FOR: Duration = Duration::from_secs(60);
/// The fewest publishes in the pipeline of an unreplicated stream.
const LEAST_PIPELINE: usize = 8;
/// So far a stream is read after a refusal that may be another stream's.
const MOST_UNVOUCHED: u64 = 1_000;
/// So far before the end the last message of ours is read again after a refusal.
const NEAR: u64 = 64;
/// So long a replicated stream may not have what it was said to end with.
const LAGS_FOR: Duration = Duration::from_secs(2);
/// So often it is read then.
const LAG_INTERVAL: Duration = Duration::from_millis(20);

/// What was read of a stream at connect, and what is known from then on.
#[derive(Debug)]
pub struct Stream {
    /// Its name, and the domain that its acks name.
    home: Arc<Origin>,
    /// When it was created.
    pub created: String,
    /// Copies in the cluster. Only an unreplicated stream can be told the expected last message's id: in a replicated one a
    /// single mismatch ends the stream for good (nats-server 2.14).
    pub is_replicated: bool,
    /// A refusal may name an end that is not there yet: the leader of a replicated stream counts what is on its way to the others. What
    /// is missing at the end was not consumed.
    pub may_lag: bool,
    /// Since when it has not been there, and when it is read again.
    lags: Option<(Instant, Instant)>,
    /// From this sequence on no message leaves by itself before an older one does, if that can be said of the stream.
    pub kept_from: Option<u64>,
    /// See [`Fence`].
    pub fence: Fence,
    /// The witness of the record, and the event of ours with the highest sequence that was resolved since.
    recorded: Option<Witness>,
    resolved: Option<(u64, Position)>,
    /// The witness of before the first publish of the connection, or the first after a refusal, until it is seen after the ack of
    /// that. This publish does not name it: the server may have lost it in between, and others have filled its place.
    unseen: Option<Witness>,
    /// Something was refused because the stream does not end as it did.
    ends_otherwise: bool,
    /// See [`Stream::share`]: of the transaction with this commit.
    share: (Lsn, Option<u64>),
    /// Something was acknowledged over this connection, so that the stream is known to be the one that the subject leads to.
    pub is_met: bool,
    /// Since the last refusal each publish has named the stream, and none is acknowledged: until one is, each does.
    pub names_it: bool,
    /// Where the stream ends by a refusal that can only be its own: a publish that names no stream is refused by another one, too,
    /// once its subject was moved there.
    vouched_end: u64,
    /// The record names it, so that events may go to it.
    pub is_recorded: bool,
    /// The event that was published last over this connection, while nothing else has come after it.
    pub previous: Option<Event>,
    /// The last event that was acknowledged or found over this connection.
    pub latest: Position,
    /// When a foreign message was last seen.
    pub foreign_at: Option<Instant>,
    pipeline: usize,
}

impl Stream {
    /// As it was read. Until the first ack of the connection one publish goes at a time.
    ///
    /// `anchor`: the commit of the anchor's transaction.
    pub fn new(cut: StreamCut, facts: StreamFacts, names: u64, anchor: Lsn) -> Stream {
        Stream {
            home: Arc::new(Origin {
                stream: cut.name,
                domain: facts.domain,
            }),
            created: cut.created,
            is_replicated: facts.is_replicated,
            may_lag: facts.is_replicated && facts.is_log,
            lags: None,
            kept_from: facts.keeps_its_end.then_some(facts.first_seq),
            fence: Fence::new(facts.last_seq, names),
            unseen: cut.witness.clone(),
            recorded: cut.witness,
            resolved: None,
            ends_otherwise: false,
            share: (anchor, cut.share),
            is_met: false,
            names_it: true,
            vouched_end: 0,
            is_recorded: false,
            previous: None,
            latest: Position::default(),
            foreign_at: None,
            pipeline: usize::MAX,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.home.stream
    }

    /// An ack is this stream's. Nearly all of them bear one [`Origin`]: they are told by its address.
    pub fn is_home(&mut self, origin: &Arc<Origin>) -> bool {
        if Arc::ptr_eq(&self.home, origin) {
            return true;
        }
        let is_home = self.home == *origin;
        if is_home {
            self.home = origin.clone();
        }
        is_home
    }

    /// Another publish may go.
    pub fn has_room(&self, now: Instant) -> bool {
        let shares = self.foreign_at.is_some_and(|at| now < at + SHARED_FOR);
        let most = match self.is_met {
            false => 1,
            true if self.is_replicated && shares => 1,
            true => self.pipeline,
        };
        !self.fence.is_broken() && self.fence.waiting() < most
    }

    /// A publish is stored.
    pub fn on_ack(&mut self, expected: u64, position: Position) {
        self.is_met = true;
        self.names_it = false;
        self.latest = self.latest.max(position);
        self.fence.on_ack(expected);
        self.pipeline = self.pipeline.saturating_add(1);
    }

    /// A publish is refused; `end`: the stream that has refused it ends there, for all that it says.
    pub fn on_refusal(&mut self, end: Option<u64>) {
        self.fence.on_refusal(end);
        if let Some(end) = end.filter(|_| self.names_it) {
            self.vouched_end = self.vouched_end.max(end);
        }
    }

    /// It does not end as it did: by its sequence, or by the id of its last message.
    pub fn on_other_end(&mut self, end: Option<u64>) {
        self.ends_otherwise = true;
        self.on_refusal(end);
    }

    /// Something was refused, and every publish is answered: what is to be read before the fence can restart.
    pub fn gap(&self, lineage: &Lineage) -> Option<RangeInclusive<u64>> {
        let (known, end) = (self.fence.known(), self.fence.end());
        let end = end.min(self.vouched_end.max(known.saturating_add(MOST_UNVOUCHED)));
        // the last of ours is read again, if it is near: the server may have lost it, and others have filled its place
        let witness = self.witness(lineage).filter(|_| self.ends_otherwise);
        let witness = witness.map(|it| it.seq);
        let near = witness.filter(|seq| (*seq..seq.saturating_add(NEAR)).contains(&known));
        let first = near.unwrap_or(known.saturating_add(1));
        (first <= end).then_some(first..=end)
    }

    /// What the stream itself was said to end with is among what was read, and not there.
    pub fn lacks_its_end(&self, read: &[(u64, Option<Message>)]) -> bool {
        let (known, end) = (self.fence.known(), self.vouched_end);
        let mut read = read.iter().filter(|(seq, _)| *seq == end && end > known);
        self.may_lag && read.any(|(_, message)| message.is_none())
    }

    /// So it is; `true`: as it was for a long time.
    pub fn on_lag(&mut self, now: Instant) -> bool {
        let since = self.lags.map_or(now, |(since, _)| since);
        self.lags = Some((since, now + LAG_INTERVAL));
        now >= since + LAGS_FOR
    }

    /// When it is read again, if it lags.
    pub fn read_again_at(&self) -> Option<Instant> {
        self.lags.map(|(_, at)| at)
    }

    /// The gap was read; `found`: the last message that was there.
    pub fn restart(&mut self, found: u64, lineage: &Lineage) {
        (self.ends_otherwise, self.lags) = (false, None);
        // the next publish does not name what is before it, as the first of a connection
        if self.unseen.is_none() {
            self.unseen = self.witness(lineage);
        }
        let end = found.max(self.vouched_end).max(self.fence.known());
        self.fence.restart(end);
        self.previous = None;
        self.names_it = true;
    }

    /// Foreign messages came after ours: on an unreplicated stream, what is on its way after a refused publish is sent in vain, so
    /// the pipeline is halved.
    pub fn on_foreign(&mut self, now: Instant, on_their_way: usize) {
        self.foreign_at = Some(now);
        self.pipeline = (self.pipeline.min(on_their_way) / 2).max(LEAST_PIPELINE);
    }

    /// A publish was taken for a duplicate: where one id is used twice, more often are, and what is on its way after each
    /// is sent in vain.
    pub fn on_duplicate(&mut self) {
        self.is_met = true;
        self.pipeline = 1;
    }

    /// An event of ours is resolved, as all before it are.
    pub fn on_resolved(&mut self, stored: Stored, position: Position) {
        let known = self.resolved.map(|(seq, _)| seq);
        let known = known.max(self.recorded.as_ref().map(|witness| witness.seq));
        if known < Some(stored.seq) {
            self.resolved = Some((stored.seq, position));
        }
        if stored.counts {
            let share = self.share(position.commit_lsn);
            self.share = (position.commit_lsn, share.map(|events| events + 1));
        }
    }

    /// An event may have been in it, and is gone, as all before it are resolved.
    pub fn on_gone(&mut self, position: Position) {
        self.share = (position.commit_lsn, None);
    }

    /// How many events of the transaction with this commit are in it, of those that are resolved as all before them are; `None`:
    /// that is not known.
    pub fn share(&self, commit_lsn: Lsn) -> Option<u64> {
        match self.share {
            (of, events) if of == commit_lsn => events,
            _ => Some(0),
        }
    }

    /// See [`StreamCut`].
    pub fn unseen(&self) -> Option<&Witness> {
        self.unseen.as_ref().filter(|_| !self.names_it)
    }

    /// [`Stream::unseen`] was seen, or is gone.
    pub fn on_seen(&mut self) {
        self.unseen = None;
    }

    /// See [`StreamCut`].
    pub fn witness(&self, lineage: &Lineage) -> Option<Witness> {
        match self.resolved {
            Some((seq, position)) => Some(Witness {
                seq,
                position: lineage.at(position),
            }),
            None => self.recorded.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Replicated, and ends at 5.
    fn stream() -> Stream {
        let facts = StreamFacts {
            name: "A".into(),
            last_seq: 5,
            is_replicated: true,
            is_log: true,
            ..StreamFacts::default()
        };
        let cut = StreamCut {
            name: "A".into(),
            created: "then".into(),
            read_after: 5,
            witness: None,
            unseen: None,
            share: None,
        };
        Stream::new(cut, facts, 100, Lsn(1))
    }

    #[test]
    fn what_the_stream_itself_has_named_as_its_end_may_come_yet() {
        let read = |there: &[u64], upto: u64| -> Vec<(u64, Option<Message>)> {
            let message = |seq| there.contains(&seq).then(Message::default);
            (6..=upto).map(|seq| (seq, message(seq))).collect()
        };
        let mut stream = stream();
        stream.on_refusal(Some(8));
        for (there, lacks) in [
            (&[6, 7, 8][..], false),
            (&[6, 8], false),
            (&[6, 7], true),
            (&[], true),
        ] {
            assert_eq!(stream.lacks_its_end(&read(there, 8)), lacks, "{there:?}");
        }
        assert!(!stream.lacks_its_end(&read(&[], 7)), "it is not among them");
        // of what another stream may have named, nothing is known
        stream.names_it = false;
        stream.vouched_end = 0;
        stream.on_refusal(Some(9));
        assert!(!stream.lacks_its_end(&read(&[], 9)));
    }

    #[test]
    fn what_lags_is_read_again_for_a_while() {
        let (mut stream, now) = (stream(), Instant::now());
        assert!(!stream.on_lag(now));
        assert_eq!(stream.read_again_at(), Some(now + LAG_INTERVAL));
        assert!(!stream.on_lag(now + LAGS_FOR - LAG_INTERVAL));
        assert!(stream.on_lag(now + LAGS_FOR));
        let lineage = Lineage {
            source: crate::outbox::position::Source {
                slot: "s".into(),
                system_id: 1,
                timeline: 1,
            },
            switch_points: Vec::new(),
        };
        stream.restart(8, &lineage);
        assert_eq!(stream.read_again_at(), None);
    }
}
