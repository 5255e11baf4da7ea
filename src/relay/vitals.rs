//! What the outside may know of the relay: what it has done, how far it is, and whether each thread still moves.
//!
//! Written by the relay's threads once a loop, not once an event, and read by [`crate::observe`]. It outlives
//! sessions, so that counters only ever grow. The types are those of the metrics library, so that what is counted
//! here is served as it is; names and units are given in [`crate::observe::metrics`].

use super::core::Tally;
use crate::postgres::Lsn;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// 2000-01-01 00:00 UTC, where Postgres counts from.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// A gauge of bytes of log.
pub type Bytes = Gauge<u64, AtomicU64>;

/// Why a connection to NATS is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReconnectCause {
    /// The connection was lost.
    Connection,
    /// Nothing was acknowledged for the ack timeout.
    AckTimeout,
    /// A publish was refused.
    Refused,
    /// An acknowledgement was not the predicted one.
    OtherAck,
    /// No stream captures a subject.
    NoStream,
    /// A stream ends before what it had acknowledged.
    EndsEarly,
    /// Another relay has written the checkpoint.
    Overtaken,
}

impl EncodeLabelValue for ReconnectCause {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.write_str(match self {
            ReconnectCause::Connection => "connection",
            ReconnectCause::AckTimeout => "ack_timeout",
            ReconnectCause::Refused => "refused",
            ReconnectCause::OtherAck => "other_ack",
            ReconnectCause::NoStream => "no_stream",
            ReconnectCause::EndsEarly => "ends_early",
            ReconnectCause::Overtaken => "overtaken",
        })
    }
}

/// The label of a reconnect.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReconnectLabels {
    /// Its cause.
    pub cause: ReconnectCause,
}

/// What the relay is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It connects, or waits for a server before it tries again.
    Connecting,
    /// Another relay has the slot.
    Standby,
    /// It has the slot and reads from it.
    Relaying,
    /// It was asked to end.
    Stopping,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// The first attempt to connect has ended.
    has_begun: bool,
    /// What hinders, in the words of the log.
    hindrance: Option<String>,
}

/// The shared figures.
#[derive(Debug)]
pub struct Vitals {
    /// Events stored by this process.
    pub published: Counter,
    /// Bytes of their bodies.
    pub published_bytes: Counter,
    /// Events found in the stream on resume.
    pub skipped: Counter,
    /// Events dropped because an earlier one had used their id.
    pub dropped: Counter,
    /// Of the published, those that were parked.
    pub parked: Counter,
    /// Events given up.
    pub lost: Counter,
    /// Events published behind later ones.
    pub late: Counter,
    /// Replaced connections to NATS.
    pub reconnects: Family<ReconnectLabels, Counter>,
    /// Sessions: a copy stream that was started.
    pub sessions: Counter,
    /// Publishes that wait for their ack.
    pub in_flight: Gauge,
    /// Batches that wait for the publisher.
    pub channel_batches: Gauge,
    /// The end of the server's log, as it last said.
    pub wal_end: Bytes,
    /// With `--drain`, where it ends.
    pub drains_upto: Bytes,
    /// Up to here everything has arrived.
    pub received: Bytes,
    /// Up to here everything is stored.
    pub settled: Bytes,
    /// Up to here Postgres may forget.
    pub confirmed: Bytes,
    /// From a publish to its ack; the first publish of each burst.
    pub ack_seconds: Histogram,
    /// From a commit, by the server's clock, to the ack of its last event; the last commit of each read.
    pub commit_to_ack_seconds: Histogram,
    /// See [`Vitals::oldest_waits`]; microseconds since 2000, 0: nothing waits.
    oldest_commit_us: AtomicI64,
    nats_is_connected: AtomicBool,
    state: Mutex<State>,
    /// Of the supervisor, the reader, the publisher and the feedback thread.
    pub supervisor: Beat,
    /// See there; while it waits for Postgres or the publisher it has no limit.
    pub reader: Beat,
    /// See there.
    pub publisher: Beat,
    /// See there.
    pub feedback: Beat,
}

impl Default for Vitals {
    fn default() -> Vitals {
        Vitals {
            published: Counter::default(),
            published_bytes: Counter::default(),
            skipped: Counter::default(),
            dropped: Counter::default(),
            parked: Counter::default(),
            lost: Counter::default(),
            late: Counter::default(),
            reconnects: Family::default(),
            sessions: Counter::default(),
            in_flight: Gauge::default(),
            channel_batches: Gauge::default(),
            wal_end: Bytes::default(),
            drains_upto: Bytes::default(),
            received: Bytes::default(),
            settled: Bytes::default(),
            confirmed: Bytes::default(),
            // a quick server answers in 0.1 ms; beyond the last bucket the ack timeout has its say
            ack_seconds: Histogram::new(exponential_buckets(0.000_1, 2.5, 12)),
            // from the floor of a quick pair of servers to a backlog of a quarter of an hour
            commit_to_ack_seconds: Histogram::new(exponential_buckets(0.000_25, 3.0, 15)),
            oldest_commit_us: AtomicI64::new(0),
            nats_is_connected: AtomicBool::new(false),
            state: Mutex::new(State {
                phase: Phase::Connecting,
                has_begun: false,
                hindrance: None,
            }),
            supervisor: Beat::default(),
            reader: Beat::default(),
            publisher: Beat::default(),
            feedback: Beat::default(),
        }
    }
}

impl Vitals {
    /// Publisher: what a session's tally has grown by since `before`.
    pub fn tell(&self, before: Tally, now: Tally) {
        for (counter, now, before) in [
            (&self.published, now.published, before.published),
            (
                &self.published_bytes,
                now.published_bytes,
                before.published_bytes,
            ),
            (&self.skipped, now.skipped, before.skipped),
            (&self.dropped, now.dropped, before.dropped),
            (&self.parked, now.parked, before.parked),
            (&self.lost, now.lost, before.lost),
            (&self.late, now.late, before.late),
        ] {
            counter.inc_by(now - before);
        }
    }

    /// Publisher: the commit, in microseconds since 2000, of the oldest transaction that is not stored yet.
    pub fn oldest_waits(&self, commit_time_us: Option<i64>) {
        let oldest = commit_time_us.unwrap_or(0);
        self.oldest_commit_us.store(oldest, Ordering::Relaxed);
    }

    /// Reader: a transaction of this commit time arrives. Counts where none waits: while there is no connection to NATS the
    /// publisher takes nothing.
    pub fn waits_too(&self, commit_time_us: i64) {
        let oldest = &self.oldest_commit_us;
        if oldest.load(Ordering::Relaxed) != 0 {
            return;
        }
        let _ = oldest.compare_exchange(0, commit_time_us, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// So long ago the oldest transaction that arrived and is not stored yet was committed, by the server's clock. An
    /// origin's commit time can be any; one in the future is now.
    pub fn lag(&self) -> Duration {
        match self.oldest_commit_us.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            commit_time_us => since_commit(commit_time_us),
        }
    }

    /// Bytes of log that the server has and the streams do not need or do not have yet.
    pub fn lag_bytes(&self) -> u64 {
        self.wal_end.get().saturating_sub(self.settled.get())
    }

    /// Reader: how far the server's log goes.
    pub fn server_is_at(&self, wal_end: Lsn) {
        self.wal_end.set(self.wal_end.get().max(wal_end.0));
    }

    /// A connection to NATS is lost or replaced.
    pub fn reconnects(&self, cause: ReconnectCause) {
        let labels = ReconnectLabels { cause };
        self.reconnects.get_or_create(&labels).inc();
    }

    /// Publisher: whether there is a connection to NATS.
    pub fn nats_is_connected(&self, connected: bool) {
        self.nats_is_connected.store(connected, Ordering::Relaxed);
    }

    /// A state, once an attempt to connect has ended, and what hinders in it, in the words of the log.
    pub fn enter(&self, phase: Phase, hindrance: Option<String>) {
        *self.state() = State {
            phase,
            has_begun: true,
            hindrance,
        };
    }

    /// What hinders now, in the same state.
    pub fn hindered(&self, hindrance: Option<String>) {
        self.state().hindrance = hindrance;
    }

    /// The first attempt to connect has ended, well or not.
    pub fn has_begun(&self) -> bool {
        self.state().has_begun
    }

    /// Both sides are connected and the slot is held. Or what the relay is doing instead.
    pub fn readiness(&self) -> Result<String, String> {
        let state = self.state();
        let connected = self.nats_is_connected.load(Ordering::Relaxed);
        let doing = match state.phase {
            Phase::Relaying if connected => return Ok("relaying".to_string()),
            Phase::Relaying => "relaying, but connecting to NATS again",
            Phase::Connecting => "connecting",
            Phase::Standby => "waiting for the slot as a standby",
            Phase::Stopping => "stopping",
        };
        Err(match &state.hindrance {
            Some(hindrance) => format!("{doing}: {hindrance}"),
            None => doing.to_string(),
        })
    }

    /// Every thread has come back to its loop in time. Or which has not: nothing but a new start will help.
    pub fn liveness(&self, now: Instant) -> Result<(), String> {
        for (name, beat) in [
            ("supervisor", &self.supervisor),
            ("reader", &self.reader),
            ("publisher", &self.publisher),
            ("feedback", &self.feedback),
        ] {
            if let Some(late) = beat.late(now) {
                return Err(format!(
                    "the {name} thread should have been back {late:.0?} ago"
                ));
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time since a commit, by its time in microseconds since 2000; none if that is to come.
pub fn since_commit(commit_time_us: i64) -> Duration {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = since_1970
        .unwrap_or_default()
        .saturating_sub(POSTGRES_EPOCH);
    let commit = Duration::from_micros(u64::try_from(commit_time_us).unwrap_or(0));
    now.saturating_sub(commit)
}

/// When a thread has to be back in its loop.
#[derive(Debug)]
pub struct Beat {
    start: Instant,
    /// Milliseconds after `start`; 0: the thread does not run.
    due_ms: AtomicU64,
}

impl Default for Beat {
    fn default() -> Beat {
        Beat {
            start: Instant::now(),
            due_ms: AtomicU64::new(0),
        }
    }
}

impl Beat {
    /// The thread will be back within this time.
    pub fn within(&self, limit: Duration) {
        let due = self.start.elapsed() + limit;
        let due_ms = u64::try_from(due.as_millis()).unwrap_or(u64::MAX);
        self.due_ms.store(due_ms.max(1), Ordering::Relaxed);
    }

    /// The thread has ended, or waits for somebody who keeps watch himself.
    pub fn ended(&self) {
        self.due_ms.store(0, Ordering::Relaxed);
    }

    /// How long ago it should have been back.
    fn late(&self, now: Instant) -> Option<Duration> {
        let due = match self.due_ms.load(Ordering::Relaxed) {
            0 => return None,
            due_ms => self.start + Duration::from_millis(due_ms),
        };
        now.checked_duration_since(due)
            .filter(|late| !late.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_not_back_in_time_is_no_longer_alive() {
        let vitals = Vitals::default();
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(vitals.liveness(after(1_000)), Ok(()));
        vitals.supervisor.within(Duration::from_secs(600));
        vitals.publisher.within(Duration::from_secs(60));
        assert_eq!(vitals.liveness(after(50)), Ok(()));
        let late = vitals.liveness(after(100)).unwrap_err();
        assert!(late.contains("the publisher thread"), "{late}");
        vitals.publisher.ended();
        assert_eq!(vitals.liveness(after(100)), Ok(()));
        vitals.reader.within(Duration::from_secs(20));
        let late = vitals.liveness(after(100)).unwrap_err();
        assert!(late.contains("the reader thread"), "{late}");
        // it waits for a server
        vitals.reader.ended();
        assert_eq!(vitals.liveness(after(100)), Ok(()));
    }

    #[test]
    fn it_is_ready_with_the_slot_and_both_connections_alone() {
        let vitals = Vitals::default();
        let hindered = |phase, hindrance: &str| {
            vitals.enter(phase, Some(hindrance.to_string()));
            vitals.readiness().unwrap_err()
        };
        assert_eq!(vitals.readiness(), Err("connecting".to_string()));
        let standby = hindered(Phase::Standby, "in use");
        assert_eq!(standby, "waiting for the slot as a standby: in use");
        vitals.enter(Phase::Relaying, None);
        let without_nats = "relaying, but connecting to NATS again";
        assert_eq!(vitals.readiness(), Err(without_nats.to_string()));
        vitals.nats_is_connected(true);
        assert_eq!(vitals.readiness(), Ok("relaying".to_string()));
        assert_eq!(hindered(Phase::Stopping, "a signal"), "stopping: a signal");
    }

    #[test]
    fn a_commit_of_the_future_is_no_lag() {
        let vitals = Vitals::default();
        assert_eq!(vitals.lag(), Duration::ZERO);
        vitals.oldest_waits(Some(i64::MAX));
        assert_eq!(vitals.lag(), Duration::ZERO);
        // the first second of 2001
        vitals.oldest_waits(Some(366 * 86_400 * 1_000_000));
        assert!(vitals.lag() > Duration::from_secs(20 * 365 * 86_400));
        vitals.oldest_waits(None);
        assert_eq!(vitals.lag(), Duration::ZERO);
    }
}
