//! The feedback thread: standby status updates, so that Postgres keeps the session and lets go of its log.
//!
//! A position is reported as flushed once, when it has become confirmable, and taken back at once: Postgres keeps the slot's
//! `confirmed_flush_lsn` ([`ProcessStandbyReplyMessage`]), and a walsender without a flush position is neither a synchronous
//! standby, which every commit would wait for as long as confirming is held back, nor waited for by a fast shutdown beyond what
//! it has received (`SyncRepGetCandidateStandbys` and `WalSndDone`, in all versions since 12). `replay_lsn` of
//! `pg_stat_replication` shows what is confirmed; `flush_lsn` is NULL.
//!
//! [`ProcessStandbyReplyMessage`]: <https://github.com/postgres/postgres/blob/master/src/backend/replication/walsender.c>
//!
//! It only reads the shared positions, so nothing that publishing waits for can hold it up: without a
//! status update for `wal_sender_timeout` Postgres ends the session. It is also the one that notices a
//! Postgres that has gone silent, because the reader does nothing but wait for it.

use super::progress::Progress;
use super::vitals::Vitals;
use crate::postgres;
use crate::postgres::Lsn;
use crate::postgres::replication::{ReplicationWriter, StandbyStatusUpdate};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// pg_recvlogical's and the replaced program's interval; a sixth of the default `wal_sender_timeout`.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// No server wants it more often.
const SHORTEST_STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// The default of `wal_receiver_timeout`.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// A status update is sent or has failed by then, once it is due.
const SEND_LIMIT: Duration = Duration::from_secs(60);

/// What the other threads ask of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Postgres wants a status update now.
    Reply,
    /// Send one that asks Postgres to reply: it wakes a reader that waits for Postgres.
    Ping,
}

/// How often to send a status update, so that Postgres never waits for one longer than its timeout.
///
/// Under back pressure the keepalives that ask for a reply wait unread behind the data, so nothing reminds
/// us: three times within the timeout leaves room for one that is late.
fn status_interval(wal_sender_timeout: Duration) -> Duration {
    match wal_sender_timeout {
        // 0 turns the timeout off
        Duration::ZERO => STATUS_INTERVAL,
        timeout => (timeout / 3).clamp(SHORTEST_STATUS_INTERVAL, STATUS_INTERVAL),
    }
}

/// So long Postgres may send nothing. While it decodes what sends nothing it gives a sign of life within its own timeout, and
/// answers no question.
fn silence_limit(wal_sender_timeout: Duration) -> Duration {
    SILENCE_LIMIT.max(wal_sender_timeout)
}

/// Runs until every sender of `asks` is gone; for a server of this `wal_sender_timeout`.
pub fn run(
    writer: &ReplicationWriter,
    progress: &Progress,
    asks: &Receiver<Ask>,
    wal_sender_timeout: Duration,
    vitals: &Vitals,
) -> Result<(), postgres::Error> {
    let ended = work(writer, progress, asks, wal_sender_timeout, vitals);
    vitals.feedback.ended();
    ended
}

fn work(
    writer: &ReplicationWriter,
    progress: &Progress,
    asks: &Receiver<Ask>,
    wal_sender_timeout: Duration,
    vitals: &Vitals,
) -> Result<(), postgres::Error> {
    let interval = status_interval(wal_sender_timeout);
    let silence_limit = silence_limit(wal_sender_timeout);
    let mut told = Lsn::INVALID;
    let mut next_status = Instant::now() + interval;
    loop {
        vitals.feedback.within(interval + SEND_LIMIT);
        let wait = next_status.saturating_duration_since(Instant::now());
        let ask = match asks.recv_timeout(wait) {
            Ok(ask) => Some(ask),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        // a large message may take its time
        let silence = progress.silence().min(writer.silence());
        if silence > silence_limit {
            return Err(postgres::Error::Timeout {
                doing: "wait for Postgres to send anything",
                after: silence_limit,
            });
        }
        // as a walreceiver does it
        let reply_requested = ask == Some(Ask::Ping) || silence > silence_limit / 2;
        tell(writer, progress, &mut told, reply_requested)?;
        next_status = Instant::now() + interval;
    }
}

/// The last status update of a session, and CopyDone.
pub fn last(writer: &ReplicationWriter, progress: &Progress) -> Result<(), postgres::Error> {
    // once more, whatever was told: the session may have ended before it arrived
    tell(writer, progress, &mut Lsn::default(), false)?;
    writer.copy_done()
}

/// Reports what is confirmable as flushed if Postgres was not `told` so yet, and takes it back.
fn tell(
    writer: &ReplicationWriter,
    progress: &Progress,
    told: &mut Lsn,
    reply_requested: bool,
) -> Result<(), postgres::Error> {
    let (write, flush) = progress.status();
    if flush > *told {
        send(writer, (write, flush, flush), false)?;
        *told = flush;
    }
    send(writer, (write, Lsn::INVALID, flush), reply_requested)
}

fn send(
    writer: &ReplicationWriter,
    (write, flush, apply): (Lsn, Lsn, Lsn),
    reply_requested: bool,
) -> Result<(), postgres::Error> {
    writer.send_status(&StandbyStatusUpdate {
        write,
        flush,
        apply,
        reply_requested,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_update_comes_three_times_within_the_servers_timeout() {
        for (timeout_ms, interval_ms) in
            [(0, 10_000), (60_000, 10_000), (10_000, 3_333), (100, 100)]
        {
            let found = status_interval(Duration::from_millis(timeout_ms));
            assert_eq!(found.as_millis(), interval_ms, "{timeout_ms}");
        }
    }

    #[test]
    fn a_server_may_be_silent_for_its_own_timeout() {
        for (timeout_s, limit_s) in [(0, 60), (1, 60), (60, 60), (61, 61), (1200, 1200)] {
            let found = silence_limit(Duration::from_secs(timeout_s));
            assert_eq!(found, Duration::from_secs(limit_s), "{timeout_s} s");
        }
    }
}
