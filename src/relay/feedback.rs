//! The feedback thread: standby status updates, so that Postgres keeps the session and lets go of its log.
//!
//! It only reads the shared positions, so nothing that publishing waits for can hold it up: without a
//! status update for `wal_sender_timeout` Postgres ends the session. It is also the one that notices a
//! Postgres that has gone silent, because the reader does nothing but wait for it.

use super::progress::Progress;
use super::vitals::Vitals;
use crate::postgres;
use crate::postgres::replication::{ReplicationWriter, StandbyStatusUpdate};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// pg_recvlogical's and the replaced program's interval; a sixth of the default `wal_sender_timeout`.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// No server wants it more often.
const SHORTEST_STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// Half of `SILENCE_LIMIT`, as a walreceiver does it: from then on each status asks for a reply.
const SILENCE_PING: Duration = Duration::from_secs(30);
/// The default of `wal_receiver_timeout`.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// A Postgres that shuts down waits until everything is confirmed, and asks again upon each reply. So
/// many requests within a second are that, and nothing else: see [`Ended::ServerShutsDown`].
const REQUESTS_A_SECOND: u32 = 8;
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

/// Why the thread ended, when nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The others have finished.
    Finished,
    /// Postgres shuts down and waits for us to confirm what is held back, or cannot be stored now. The
    /// session has to end, or the shutdown never does; what is not confirmed comes again.
    ServerShutsDown,
}

/// How often to send a status update, so that Postgres never waits for one longer than its timeout.
///
/// Under back pressure the keepalives that ask for a reply wait unread behind the data, so nothing reminds
/// us: three times within the timeout leaves room for one that is late.
pub fn status_interval(wal_sender_timeout: Duration) -> Duration {
    match wal_sender_timeout {
        // 0 turns the timeout off
        Duration::ZERO => STATUS_INTERVAL,
        timeout => (timeout / 3).clamp(SHORTEST_STATUS_INTERVAL, STATUS_INTERVAL),
    }
}

/// Runs until every sender of `asks` is gone.
pub fn run(
    writer: &ReplicationWriter,
    progress: &Progress,
    asks: &Receiver<Ask>,
    interval: Duration,
    vitals: &Vitals,
) -> Result<Ended, postgres::Error> {
    let ended = work(writer, progress, asks, interval, vitals);
    vitals.feedback.ended();
    ended
}

fn work(
    writer: &ReplicationWriter,
    progress: &Progress,
    asks: &Receiver<Ask>,
    interval: Duration,
    vitals: &Vitals,
) -> Result<Ended, postgres::Error> {
    let mut requests = Requests::default();
    let mut next_status = Instant::now() + interval;
    loop {
        vitals.feedback.within(interval + SEND_LIMIT);
        let wait = next_status.saturating_duration_since(Instant::now());
        let ask = match asks.recv_timeout(wait) {
            Ok(ask) => Some(ask),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return Ok(Ended::Finished),
        };
        // a large message may take its time
        let silence = progress.silence().min(writer.silence());
        if silence > SILENCE_LIMIT {
            return Err(postgres::Error::Timeout {
                doing: "wait for Postgres to send anything",
                after: SILENCE_LIMIT,
            });
        }
        send(
            writer,
            progress,
            ask == Some(Ask::Ping) || silence > SILENCE_PING,
        )?;
        next_status = Instant::now() + interval;
        if ask == Some(Ask::Reply) && requests.too_many(Instant::now(), progress) {
            return Ok(Ended::ServerShutsDown);
        }
    }
}

/// The last status update of a session, and CopyDone.
pub fn last(writer: &ReplicationWriter, progress: &Progress) -> Result<(), postgres::Error> {
    send(writer, progress, false)?;
    writer.copy_done()
}

fn send(
    writer: &ReplicationWriter,
    progress: &Progress,
    reply_requested: bool,
) -> Result<(), postgres::Error> {
    let (write, flush) = progress.status();
    writer.send_status(&StandbyStatusUpdate {
        write,
        flush,
        apply: flush,
        reply_requested,
    })
}

/// Counts requests for a reply that come while everything was sent and not everything is confirmed.
#[derive(Debug, Default)]
struct Requests {
    since: Option<Instant>,
    count: u32,
}

impl Requests {
    fn too_many(&mut self, now: Instant, progress: &Progress) -> bool {
        let (write, flush) = progress.status();
        let fresh = self
            .since
            .is_some_and(|since| now.saturating_duration_since(since) < Duration::from_secs(1));
        if !fresh || flush == write {
            *self = Requests {
                since: Some(now),
                count: 0,
            };
        }
        self.count += 1;
        self.count >= REQUESTS_A_SECOND
    }
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
}
