//! What the publisher tells [`Vitals`] once a loop: how far it is, what it has counted, and how long things took.

use super::core::{Core, Tally};
use super::progress::Progress;
use super::vitals::{StreamEnd, Vitals, since_commit};
use crate::jetstream::wire::Publish;
use crate::outbox::batch::{Batch, Change};
use crate::postgres::Lsn;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How often the streams are told, which takes a list of names.
const STREAMS_INTERVAL: Duration = Duration::from_secs(1);

/// What is not told yet.
pub struct Pulse<'a> {
    vitals: &'a Vitals,
    told: Tally,
    /// Transactions that arrived and are not stored yet: as many batches as the window and the channel hold.
    commits: VecDeque<Commits>,
    /// A publish whose ack is timed.
    timed: Option<(u64, Instant)>,
    streams_told: Option<Instant>,
}

/// The transactions with events that ended in one batch.
struct Commits {
    /// The end of the last one.
    end_lsn: Lsn,
    /// When the first and the last one were committed, in microseconds since 2000.
    first_us: i64,
    last_us: i64,
}

impl<'a> Pulse<'a> {
    /// For one session.
    pub fn new(vitals: &'a Vitals) -> Pulse<'a> {
        Pulse {
            vitals,
            told: Tally::default(),
            commits: VecDeque::new(),
            timed: None,
            streams_told: None,
        }
    }

    /// A batch arrived: the age of its transactions counts until they are stored.
    pub fn arrived(&mut self, batch: &Batch) {
        let mut commits: Option<Commits> = None;
        for change in batch.changes() {
            let Change::Commit {
                end_lsn,
                commit_time_us,
                ..
            } = *change
            else {
                continue;
            };
            let commits = commits.get_or_insert(Commits {
                end_lsn,
                first_us: commit_time_us,
                last_us: commit_time_us,
            });
            (commits.end_lsn, commits.last_us) = (end_lsn, commit_time_us);
        }
        self.commits.extend(commits);
    }

    /// A burst leaves: its first publish is timed, unless another still is.
    pub fn published(&mut self, burst: &[Publish], now: Instant) {
        if let Some(first) = burst.first() {
            self.timed.get_or_insert((first.token, now));
        }
    }

    /// An ack came.
    pub fn acked(&mut self, token: u64, now: Instant) {
        if let Some((_, at)) = self.timed.take_if(|(timed, _)| *timed == token) {
            let waited = now.saturating_duration_since(at);
            self.vitals.ack_seconds.observe(waited);
        }
    }

    /// No publish waits for its ack any more.
    pub fn nothing_waits(&mut self) {
        self.vitals.in_flight.set(0);
        self.timed = None;
    }

    /// How things stand.
    pub fn tell(&mut self, core: &Core, progress: &Progress, channel_batches: usize) {
        let settled = core.stored_lsn();
        while let Some(commits) = self.commits.front().filter(|c| c.end_lsn <= settled) {
            let age = since_commit(commits.last_us);
            self.vitals.commit_to_ack_seconds.observe(age);
            self.commits.pop_front();
        }
        let oldest = self.commits.front();
        self.vitals
            .oldest_waits(oldest.map(|commits| commits.first_us));
        let tally = core.tally();
        if tally != self.told {
            self.vitals.tell(self.told, tally);
            self.told = tally;
        }
        let (received, confirmable) = progress.status();
        self.vitals.received_lsn.raise(received.0);
        self.vitals.flush_lsn.raise(confirmable.0);
        self.vitals.stored_lsn.raise(settled.0);
        self.vitals.in_flight.set(core.window().waiting() as u64);
        self.vitals.channel_batches.set(channel_batches as u64);
        self.tell_streams(core);
    }

    fn tell_streams(&mut self, core: &Core) {
        let now = Instant::now();
        let is_recent = |at| now.saturating_duration_since(at) < STREAMS_INTERVAL;
        if self.streams_told.is_some_and(is_recent) {
            return;
        }
        self.streams_told = Some(now);
        let ends = core.stream_ends().into_iter();
        let ends = ends.map(|(name, last_seq)| StreamEnd { name, last_seq });
        self.vitals.set_streams(ends.collect());
    }
}

impl Drop for Pulse<'_> {
    fn drop(&mut self) {
        self.vitals.in_flight.set(0);
        self.vitals.channel_batches.set(0);
    }
}
