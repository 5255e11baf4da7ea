//! What the outside may know of the relay: what it has done, how far it is, whom it is connected to, and whether each
//! thread still moves.
//!
//! Written by the relay's threads once a loop, not once an event, and read by [`crate::observe`] and the progress
//! line. It outlives sessions, so that counters only ever grow. Names, units and meanings are given once, in
//! [`crate::observe::metrics`].

use super::core::Tally;
use super::figure::{Figure, Histogram};
use super::slot_wal::SlotWalSeen;
use crate::postgres::Lsn;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// 2000-01-01 00:00 UTC, where Postgres counts from.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);
/// A quick server answers in 0.1 ms; beyond the last bound the ack timeout has its say.
const ACK_BOUNDS: &[f64] = &[
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];
/// From the floor of a quick pair of servers to a backlog of a quarter of an hour.
const COMMIT_TO_ACK_BOUNDS: &[f64] = &[
    0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0, 300.0, 900.0,
];

/// Why a connection to NATS is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReconnectCause {
    /// The connection was lost.
    Connection,
    /// Nothing was acknowledged for the ack timeout.
    AckTimeout,
    /// A publish was refused.
    Refused,
    /// An acknowledgement was not the predicted one.
    UnexpectedAck,
    /// No stream captures a subject.
    NoStream,
    /// A stream ends before what it had acknowledged.
    Regressed,
    /// Another relay has written the checkpoint.
    Overtaken,
    /// An event is larger than was allowed at the last connect.
    Limits,
    /// The server is about to shut down.
    LameDuck,
}

impl ReconnectCause {
    /// Each of them, with its name in the metrics.
    pub const ALL: [(ReconnectCause, &'static str); 9] = [
        (ReconnectCause::Connection, "connection"),
        (ReconnectCause::AckTimeout, "ack_timeout"),
        (ReconnectCause::Refused, "refused"),
        (ReconnectCause::UnexpectedAck, "unexpected_ack"),
        (ReconnectCause::NoStream, "no_stream"),
        (ReconnectCause::Regressed, "regressed"),
        (ReconnectCause::Overtaken, "overtaken"),
        (ReconnectCause::Limits, "limits"),
        (ReconnectCause::LameDuck, "lame_duck"),
    ];
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
    nats_is_connected: bool,
    /// Since when it is this phase with, or without, a connection to NATS.
    since: SystemTime,
    /// The first attempt to connect has ended.
    has_begun: bool,
    /// What hinders, in the words of the log.
    hindrance: Option<String>,
}

/// A server that the relay is, or was last, connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// `host:port`; empty: there was no connection yet.
    pub address: String,
    /// As it says itself.
    pub version: String,
}

/// How far a stream is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamEnd {
    /// The stream's name.
    pub name: String,
    /// The highest sequence that was acknowledged or read.
    pub last_seq: u64,
}

/// The shared figures.
#[derive(Debug)]
pub struct Vitals {
    /// When the process began.
    pub started: SystemTime,
    tally: Mutex<Tally>,
    reconnects: [Figure; ReconnectCause::ALL.len()],
    /// Sessions: a copy stream that was started.
    pub sessions: Figure,
    /// Publishes that wait for their ack.
    pub in_flight: Figure,
    /// Batches that wait for the publisher.
    pub channel_batches: Figure,
    /// The end of the server's WAL, as the copy stream last said.
    wal_end: Figure,
    /// With `-drain`, where it ends.
    pub drains_upto: Figure,
    /// Everything up to here has arrived.
    pub received_lsn: Figure,
    /// Every event up to here is resolved.
    pub stored_lsn: Figure,
    /// The `stored_lsn` that the checkpoint holds.
    pub checkpointed_lsn: Figure,
    /// What Postgres is told: up to here it may forget.
    pub flush_lsn: Figure,
    /// From a publish to its ack; the first publish of each burst.
    pub ack_seconds: Histogram,
    /// From a commit, by the server's clock, to the ack of its last event; the last commit of each read.
    pub commit_to_ack_seconds: Histogram,
    /// See [`Vitals::oldest_waits`]; microseconds since 2000, 0: nothing waits.
    oldest_commit_us: AtomicI64,
    /// The same of a transaction of which the reader has handed over only a part.
    arriving_commit_us: AtomicI64,
    state: Mutex<State>,
    postgres: Mutex<Peer>,
    nats: Mutex<Peer>,
    streams: Mutex<Vec<StreamEnd>>,
    /// The WAL that Postgres keeps for the slot.
    pub slot_wal: SlotWalSeen,
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
        let now = SystemTime::now();
        Vitals {
            started: now,
            tally: Mutex::default(),
            reconnects: Default::default(),
            sessions: Figure::default(),
            in_flight: Figure::default(),
            channel_batches: Figure::default(),
            wal_end: Figure::default(),
            drains_upto: Figure::default(),
            received_lsn: Figure::default(),
            stored_lsn: Figure::default(),
            checkpointed_lsn: Figure::default(),
            flush_lsn: Figure::default(),
            ack_seconds: Histogram::new(ACK_BOUNDS),
            commit_to_ack_seconds: Histogram::new(COMMIT_TO_ACK_BOUNDS),
            oldest_commit_us: AtomicI64::new(0),
            arriving_commit_us: AtomicI64::new(0),
            state: Mutex::new(State {
                phase: Phase::Connecting,
                nats_is_connected: false,
                since: now,
                has_begun: false,
                hindrance: None,
            }),
            postgres: Mutex::default(),
            nats: Mutex::default(),
            streams: Mutex::default(),
            slot_wal: SlotWalSeen::default(),
            supervisor: Beat::default(),
            reader: Beat::default(),
            publisher: Beat::default(),
            feedback: Beat::default(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Field by field: whoever adds one must say here that it is counted.
fn each(a: Tally, b: Tally, of: fn(u64, u64) -> u64) -> Tally {
    Tally {
        published: of(a.published, b.published),
        published_bytes: of(a.published_bytes, b.published_bytes),
        already_stored: of(a.already_stored, b.already_stored),
        dropped: of(a.dropped, b.dropped),
        parked: of(a.parked, b.parked),
        given_up: of(a.given_up, b.given_up),
        late: of(a.late, b.late),
        foreign: of(a.foreign, b.foreign),
    }
}

/// What was counted between two moments.
pub fn since(before: Tally, now: Tally) -> Tally {
    each(now, before, u64::saturating_sub)
}

impl Vitals {
    /// Publisher: what a session's tally has grown by since `before`.
    pub fn tell(&self, before: Tally, now: Tally) {
        let mut tally = lock(&self.tally);
        *tally = each(*tally, since(before, now), u64::saturating_add);
    }

    /// What this process has counted, over all its sessions.
    pub fn tally(&self) -> Tally {
        *lock(&self.tally)
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

    /// Reader: it is about to wait for room in the channel, which holds so many batches, with everything up to `received`
    /// and the beginning of a transaction of this commit time, if there is one. While there is no connection to
    /// NATS the wait is as long, and the publisher says nothing.
    pub fn hands_over(
        &self,
        received: Lsn,
        channel_batches: usize,
        unfinished_commit_us: Option<i64>,
    ) {
        self.received_lsn.raise(received.0);
        self.channel_batches.set(channel_batches as u64);
        let arriving = unfinished_commit_us.unwrap_or(0);
        self.arriving_commit_us.store(arriving, Ordering::Relaxed);
    }

    /// So long ago the oldest transaction that arrived and is not stored yet was committed, by the server's clock. An
    /// origin's commit time can be any; one in the future is now.
    pub fn lag(&self) -> Duration {
        let commits = [&self.oldest_commit_us, &self.arriving_commit_us];
        let commits = commits.map(|commit| commit.load(Ordering::Relaxed));
        let oldest = commits.into_iter().filter(|commit| *commit != 0).min();
        oldest.map_or(Duration::ZERO, since_commit)
    }

    /// The end of the server's WAL, as far as it is known.
    pub fn wal_end(&self) -> Lsn {
        let looked_at = self.slot_wal.get().map(|wal| wal.wal_end);
        Lsn(self.wal_end.get()).max(looked_at.unwrap_or_default())
    }

    /// Bytes of WAL that the server has and that are not known to be stored.
    pub fn lag_bytes(&self) -> u64 {
        self.wal_end().0.saturating_sub(self.stored_lsn.get())
    }

    /// Session: a copy stream has started. Positions begin with what is true of the slot, on whatever server it now is.
    pub fn session_starts(&self, confirmed_flush_lsn: Lsn, wal_end: Lsn) {
        self.sessions.inc();
        self.wal_end.set(wal_end.0.max(confirmed_flush_lsn.0));
        self.arriving_commit_us.store(0, Ordering::Relaxed);
        for position in [
            &self.received_lsn,
            &self.stored_lsn,
            &self.checkpointed_lsn,
            &self.flush_lsn,
        ] {
            position.set(confirmed_flush_lsn.0);
        }
        self.enter(Phase::Relaying, None);
    }

    /// Reader: how far the server's WAL goes.
    pub fn server_is_at(&self, wal_end: Lsn) {
        self.wal_end.raise(wal_end.0);
    }

    /// A connection to NATS is lost or replaced.
    pub fn reconnects(&self, cause: ReconnectCause) {
        if let Some(count) = self.reconnects.get(cause as usize) {
            count.inc();
        }
    }

    /// How often that was, by the cause's name.
    pub fn reconnect_counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let causes = ReconnectCause::ALL.iter();
        causes
            .zip(&self.reconnects)
            .map(|((_, name), count)| (*name, count.get()))
    }

    /// Publisher: whether there is a connection to NATS.
    pub fn nats_is_connected(&self, connected: bool) {
        self.change(|state| state.nats_is_connected = connected);
    }

    /// A state, once an attempt to connect has ended, and what hinders in it, in the words of the log.
    pub fn enter(&self, phase: Phase, hindrance: Option<String>) {
        self.change(|state| {
            (state.phase, state.hindrance) = (phase, hindrance);
            state.has_begun = true;
        });
    }

    /// What hinders now, in the same state.
    pub fn hindered(&self, hindrance: Option<String>) {
        self.change(|state| state.hindrance = hindrance);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        let before = (state.phase, state.nats_is_connected);
        change(&mut state);
        if before != (state.phase, state.nats_is_connected) {
            state.since = SystemTime::now();
        }
    }

    /// The first attempt to connect has ended, well or not.
    pub fn has_begun(&self) -> bool {
        lock(&self.state).has_begun
    }

    /// Since when [`Vitals::readiness`] has been what it is, but for the words.
    pub fn state_since(&self) -> SystemTime {
        lock(&self.state).since
    }

    /// Both sides are connected and the slot is held. Or what the relay is doing instead.
    pub fn readiness(&self) -> Result<String, String> {
        let state = lock(&self.state);
        let doing = match state.phase {
            Phase::Relaying if state.nats_is_connected => return Ok("relaying".to_string()),
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

    /// Session: the Postgres server that it is connected to.
    pub fn set_postgres(&self, address: &str, version: &str) {
        *lock(&self.postgres) = peer(address, version);
    }

    /// Session or publisher: the NATS server that it is connected to.
    pub fn set_nats(&self, address: &str, version: &str) {
        *lock(&self.nats) = peer(address, version);
    }

    /// The Postgres server of the last session.
    pub fn postgres(&self) -> Peer {
        lock(&self.postgres).clone()
    }

    /// The NATS server of the last connection.
    pub fn nats(&self) -> Peer {
        lock(&self.nats).clone()
    }

    /// Publisher: where the streams end.
    pub fn set_streams(&self, streams: Vec<StreamEnd>) {
        *lock(&self.streams) = streams;
    }

    /// Where the streams ended when that was last looked at.
    pub fn streams(&self) -> Vec<StreamEnd> {
        lock(&self.streams).clone()
    }
}

fn peer(address: &str, version: &str) -> Peer {
    Peer {
        address: address.to_string(),
        version: version.to_string(),
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
    fn a_new_session_begins_where_its_slot_is_also_on_a_server_that_is_behind() {
        let vitals = Vitals::default();
        vitals.session_starts(Lsn(100), Lsn(900));
        vitals.server_is_at(Lsn(1_000));
        vitals.stored_lsn.set(1_000);
        assert_eq!(vitals.lag_bytes(), 0);
        // a standby that was promoted, and had not received all
        vitals.session_starts(Lsn(100), Lsn(700));
        assert_eq!(vitals.lag_bytes(), 600);
        assert_eq!(vitals.received_lsn.get(), 100);
        assert_eq!(vitals.sessions.get(), 2);
    }

    #[test]
    fn each_cause_is_counted_under_its_name() {
        let vitals = Vitals::default();
        for (index, (cause, _)) in ReconnectCause::ALL.into_iter().enumerate() {
            (0..=index).for_each(|_| vitals.reconnects(cause));
        }
        let counts: Vec<u64> = vitals.reconnect_counts().map(|(_, count)| count).collect();
        assert_eq!(
            counts,
            (1..=ReconnectCause::ALL.len() as u64).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_state_lasts_until_the_phase_or_the_connection_changes() {
        let vitals = Vitals::default();
        vitals.enter(Phase::Connecting, Some("a".to_string()));
        assert_eq!(vitals.state_since(), vitals.started);
        vitals.hindered(Some("b".to_string()));
        assert_eq!(vitals.state_since(), vitals.started);
        vitals.enter(Phase::Relaying, None);
        let relaying = vitals.state_since();
        assert!(relaying > vitals.started);
        vitals.nats_is_connected(true);
        assert!(vitals.state_since() > relaying);
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
        // nor is one that arrives in parts left out until its end has come
        vitals.hands_over(Lsn(7), 2, Some(366 * 86_400 * 1_000_000));
        assert!(vitals.lag() > Duration::from_secs(20 * 365 * 86_400));
        assert_eq!(vitals.received_lsn.get(), 7);
        vitals.hands_over(Lsn(8), 0, None);
        assert_eq!(vitals.lag(), Duration::ZERO);
    }
}
