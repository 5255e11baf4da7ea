//! How far each thread has come: the atomic positions the three threads share, and nothing else.
//!
//! The meaning of each LSN is that of a standby (`pg_stat_replication`): received = write,
//! confirmable = flush and apply.

use crate::postgres::Lsn;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The shared positions of one session. They only ever grow.
#[derive(Debug)]
pub struct Progress {
    start: Instant,
    received: AtomicU64,
    confirmable: AtomicU64,
    /// Since when the reader waits for Postgres, in milliseconds after `start`, plus one; 0: it does not.
    reading_since: AtomicU64,
    /// The same for the publisher.
    sending_since: AtomicU64,
    /// Nothing more is confirmed.
    held: AtomicBool,
    /// See [`Progress::max_payload`].
    max_payload: AtomicUsize,
}

impl Default for Progress {
    fn default() -> Progress {
        Progress {
            start: Instant::now(),
            received: AtomicU64::new(0),
            confirmable: AtomicU64::new(0),
            reading_since: AtomicU64::new(0),
            sending_since: AtomicU64::new(0),
            held: AtomicBool::new(false),
            max_payload: AtomicUsize::new(0),
        }
    }
}

impl Progress {
    /// Reader: everything up to `lsn` has arrived here.
    pub fn received(&self, lsn: Lsn) {
        self.received.fetch_max(lsn.0, Ordering::Release);
    }

    /// Publisher: everything up to `lsn` is stored, and old enough.
    pub fn confirmable(&self, lsn: Lsn) {
        if !self.held.load(Ordering::Acquire) {
            self.confirmable.fetch_max(lsn.0, Ordering::Release);
        }
    }

    /// From here on nothing more is confirmed, whatever becomes confirmable.
    pub fn hold(&self) {
        self.held.store(true, Ordering::Release);
    }

    /// Everything up to here has arrived.
    pub fn received_lsn(&self) -> Lsn {
        Lsn(self.received.load(Ordering::Acquire))
    }

    /// Feedback: (write, flush) of a standby status update.
    ///
    /// Postgres accepts a flush position beyond its own end and moves the slot there, which would
    /// lose everything up to it. So one that was never received is a bug of ours, and ends the process.
    pub fn status(&self) -> (Lsn, Lsn) {
        let flush = Lsn(self.confirmable.load(Ordering::Acquire));
        let write = Lsn(self.received.load(Ordering::Acquire));
        assert!(
            flush <= write,
            "confirm {flush}, but only {write} was received"
        );
        (write, flush)
    }

    /// Reader: from here it waits for Postgres, or no longer does.
    pub fn reading(&self, waiting: bool) {
        self.mark(&self.reading_since, waiting);
    }

    /// Reader: from here it waits for the publisher to take a batch, or no longer does.
    pub fn sending(&self, waiting: bool) {
        self.mark(&self.sending_since, waiting);
    }

    /// What the NATS server takes at most, as it said last; zero: it has not. It bounds what the reader holds of a row.
    pub fn max_payload(&self) -> usize {
        self.max_payload.load(Ordering::Relaxed)
    }

    /// Publisher: a connection whose server takes so much.
    pub fn set_max_payload(&self, max_payload: usize) {
        self.max_payload.store(max_payload, Ordering::Relaxed);
    }

    /// So long Postgres has sent no whole message although the reader waits for one.
    pub fn silence(&self) -> Duration {
        self.since(&self.reading_since)
    }

    /// So long the publisher has taken nothing although the reader waits for it.
    pub fn back_pressure(&self) -> Duration {
        self.since(&self.sending_since)
    }

    fn mark(&self, since: &AtomicU64, waiting: bool) {
        let now = if waiting {
            self.start.elapsed().as_millis() as u64 + 1
        } else {
            0
        };
        since.store(now, Ordering::Relaxed);
    }

    fn since(&self, since: &AtomicU64) -> Duration {
        match since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => self
                .start
                .elapsed()
                .saturating_sub(Duration::from_millis(since)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_never_move_back() {
        let progress = Progress::default();
        progress.received(Lsn(10));
        progress.received(Lsn(5));
        progress.confirmable(Lsn(7));
        progress.confirmable(Lsn(3));
        assert_eq!(progress.status(), (Lsn(10), Lsn(7)));
    }

    #[test]
    fn nothing_is_confirmed_after_hold() {
        let progress = Progress::default();
        progress.received(Lsn(10));
        progress.confirmable(Lsn(3));
        progress.hold();
        progress.confirmable(Lsn(7));
        assert_eq!(progress.status(), (Lsn(10), Lsn(3)));
    }

    #[test]
    #[should_panic(expected = "only 0/5 was received")]
    fn what_was_not_received_is_never_confirmed() {
        let progress = Progress::default();
        progress.received(Lsn(5));
        progress.confirmable(Lsn(6));
        progress.status();
    }
}
