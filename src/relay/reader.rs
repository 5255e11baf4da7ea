//! The reader thread: blocks on the replication stream, decodes it, and pushes batches of changes into
//! the channel.
//!
//! A batch is what one read of the socket held: it goes on when the next message would have to be waited
//! for, so that nothing waits when the outbox is idle, and a backlog travels in large pieces; in a flow,
//! [`Pace`] lets a little gather first. When the channel is full the reader stands still, the socket fills
//! up, and Postgres keeps the rest.

use super::error::Error;
use super::feedback::Ask;
use super::pace::Pace;
use super::progress::Progress;
use super::stop::Stop;
use super::vitals::Vitals;
use crate::outbox::batch::{Batch, Change};
use crate::outbox::mapper::{ColumnInfo, Mapper};
use crate::outbox::plan::{Place, Value};
use crate::outbox::position::Position;
use crate::postgres::pgoutput::{self, Message, TupleValue};
use crate::postgres::replication::{ReplicationMessage, ReplicationReader};
use crate::postgres::{self, Lsn};
use crossbeam_channel::{SendError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// A batch goes on at this size even if more is there: with the channel's bound and one event of the
/// largest size this is what the relay holds between its threads.
const BATCH_BYTES: usize = 64 * 1024;
/// The same for transactions without events and very small ones.
const BATCH_CHANGES: usize = 512;
/// A transaction that has begun may be read to its end for so long after the request to stop, so that it
/// can be confirmed.
const STOP_GRACE: Duration = Duration::from_millis(500);
/// By so much a batch goes beyond `BATCH_BYTES` when its last event is an ordinary one.
const BATCH_SLACK: usize = 4 * 1024;
/// How many batches may wait for the publisher; a large one counts for several.
pub const CHANNEL_BATCHES: usize = 4;

/// What the reader works with.
pub struct Reader<'a> {
    /// The decoded rows' way to the publisher.
    pub changes: Sender<Batch>,
    /// The feedback thread.
    pub asks: Sender<Ask>,
    /// The shared positions.
    pub progress: &'a Progress,
    /// Asks the reader to end.
    pub stop: &'a Stop,
    /// Which columns of which table make an event.
    pub mapper: &'a mut Mapper,
    /// With `--drain`: everything up to here, and no more.
    pub upto: Option<Lsn>,
    /// Learns how far the server's log goes.
    pub vitals: &'a Vitals,
    /// No transaction has come yet.
    pub is_first: bool,
}

/// Why the reader ended, when nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to, or nobody receives its batches any more.
    Stopped,
    /// Everything up to the LSN of `--drain` was read.
    Drained,
    /// Postgres ended the stream.
    ByServer,
}

/// Up to 17 Postgres ends the stream when the publication was missing at what it decodes (undefined_object);
/// from 18 on it says so in a notice, and leaves the rows out.
fn publication_missing(error: postgres::Error) -> Error {
    match error.sqlstate() {
        Some("42704") => Error::publication_skipped(&error),
        _ => Error::Postgres(error),
    }
}

/// The transaction that is being read.
struct Transaction {
    commit_lsn: Lsn,
    commit_time_us: i64,
    xid: u32,
    events: u32,
}

impl Transaction {
    /// Where its next event stands.
    fn next_place(&self) -> Place {
        Place {
            position: Position {
                commit_lsn: self.commit_lsn,
                ordinal: self.events + 1,
            },
            commit_time_us: self.commit_time_us,
            xid: self.xid,
        }
    }
}

/// With room for all it will ever hold, but for large events: one that grows is copied again and again.
fn empty() -> Batch {
    Batch::with_capacity(BATCH_BYTES + BATCH_SLACK, BATCH_CHANGES)
}

/// Takes out what a batch holds, into memory of just that size, and leaves the room for the next. (One that goes on itself and
/// gives back what it did not need leaves holes too small for the next.) Large events are not copied.
fn take(batch: &mut Batch) -> Batch {
    if batch.capacity() > BATCH_BYTES + BATCH_SLACK {
        let mut full = std::mem::replace(batch, empty());
        full.shrink();
        return full;
    }
    let full = batch.clone();
    batch.clear();
    full
}

/// A batch that ends in the middle of a transaction says of which one.
fn end_open(batch: &mut Batch, transaction: Option<&Transaction>) {
    if let Some(open) = transaction.filter(|open| open.events > 0) {
        batch.push(Change::Open {
            commit_lsn: open.commit_lsn,
            commit_time_us: open.commit_time_us,
        });
    }
}

/// A large batch takes several places in the channel, so that what waits there is bounded in bytes.
fn send(changes: &Sender<Batch>, batch: Batch) -> Result<(), SendError<Batch>> {
    let places = (batch.len_bytes() / BATCH_BYTES).min(CHANNEL_BATCHES);
    for _ in 1..places {
        changes.send(Batch::default())?;
    }
    changes.send(batch)
}

impl Reader<'_> {
    /// Reads until the end, which drops the channel to the publisher.
    pub fn run(self, stream: &mut ReplicationReader) -> Result<Ended, Error> {
        let slot = stream.slot().to_string();
        self.read(stream).map_err(|error| error.of_slot(slot))
    }

    fn read(mut self, stream: &mut ReplicationReader) -> Result<Ended, Error> {
        let mut batch = empty();
        let mut transaction: Option<Transaction> = None;
        let mut reached = Lsn::INVALID;
        let mut server_wal_end = Lsn::INVALID;
        let mut pace = Pace::default();
        let mut stopping: Option<Instant> = None;
        loop {
            if !stream.has_buffered()
                || batch.len_bytes() >= BATCH_BYTES
                || batch.changes().len() >= BATCH_CHANGES
            {
                if !batch.is_empty() {
                    end_open(&mut batch, transaction.as_ref());
                    let unfinished = transaction.as_ref().filter(|it| it.events > 0);
                    let unfinished = unfinished.map(|it| it.commit_time_us);
                    self.vitals
                        .hands_over(reached, self.changes.len(), unfinished);
                    self.progress.sending(true);
                    let bytes = batch.len_bytes();
                    let sent = send(&self.changes, take(&mut batch));
                    self.progress.sending(false);
                    if sent.is_err() {
                        return Ok(Ended::Stopped);
                    }
                    let pause = pace.sent(Instant::now(), bytes);
                    if !pause.is_zero() && !stream.has_buffered() {
                        thread::sleep(pause);
                    }
                }
                if transaction.is_none() && self.upto.is_some_and(|upto| reached >= upto) {
                    return Ok(Ended::Drained);
                }
            }
            if self.stop.is_stopping() {
                let since = *stopping.get_or_insert_with(Instant::now);
                if transaction.is_none() || since.elapsed() > STOP_GRACE {
                    end_open(&mut batch, transaction.as_ref());
                    // nobody may be there to take it
                    let _ = self.changes.send(batch);
                    return Ok(Ended::Stopped);
                }
            }
            if !stream.has_buffered() {
                self.vitals.server_is_at(server_wal_end);
            }
            self.progress.reading(!stream.has_buffered());
            let message = stream.read();
            self.progress.reading(false);
            match message.map_err(publication_missing)? {
                None => return Ok(Ended::ByServer),
                Some(ReplicationMessage::Notice(notice)) => {
                    if notice.message.contains("skipped loading publication") {
                        return Err(Error::publication_skipped(&notice));
                    }
                    log::info!(notice:% = notice; "postgres says");
                }
                Some(ReplicationMessage::PrimaryKeepalive {
                    wal_end,
                    reply_requested,
                    ..
                }) => {
                    server_wal_end = server_wal_end.max(wal_end);
                    self.progress.received(wal_end);
                    batch.push_boundary(wal_end);
                    reached = reached.max(wal_end);
                    if reply_requested {
                        // a full channel means that a status update is about to be sent anyway
                        let _ = self.asks.try_send(Ask::Reply);
                    }
                }
                Some(ReplicationMessage::XLogData {
                    data,
                    wal_start,
                    wal_end,
                    server_time_us,
                }) => {
                    server_wal_end = server_wal_end.max(wal_end);
                    let message = pgoutput::decode(data).map_err(|error| Error::Decode {
                        error,
                        at: wal_start,
                    })?;
                    if let Message::Begin { commit_time_us, .. } = message {
                        pace.begun(commit_time_us, server_time_us);
                    }
                    let taken = self.take(message, wal_start, &mut transaction, &mut batch);
                    if taken.is_err() {
                        // what is whole goes out before the relay stops
                        batch.truncate_to_boundary();
                        let _ = self.changes.send(std::mem::take(&mut batch));
                    }
                    if let Some(end_lsn) = taken? {
                        self.progress.received(end_lsn);
                        reached = reached.max(end_lsn);
                    }
                }
            }
        }
    }

    /// One pgoutput message. Returns the end of a transaction.
    fn take(
        &mut self,
        message: Message<'_>,
        at: Lsn,
        transaction: &mut Option<Transaction>,
        batch: &mut Batch,
    ) -> Result<Option<Lsn>, Error> {
        match message {
            Message::Begin {
                final_lsn,
                commit_time_us,
                xid,
            } => {
                *transaction = Some(Transaction {
                    commit_lsn: final_lsn,
                    commit_time_us,
                    xid,
                    events: 0,
                });
            }
            Message::Commit {
                commit_lsn,
                end_lsn,
                commit_time_us,
            } => {
                let Some(ended) = transaction.take() else {
                    return Err(Error::OutOfPlace {
                        message: "Commit",
                        at,
                    });
                };
                // the first one proves which WAL this is, also without events
                if ended.events > 0 || std::mem::take(&mut self.is_first) {
                    self.is_first = false;
                    self.vitals.waits_too(commit_time_us);
                    batch.push(Change::Commit {
                        commit_lsn,
                        end_lsn,
                        commit_time_us,
                    });
                } else {
                    batch.push_boundary(end_lsn);
                }
                return Ok(Some(end_lsn));
            }
            Message::Relation(relation) => {
                let columns = relation.columns().map(|c| ColumnInfo {
                    name: c.name,
                    type_id: c.type_id,
                });
                self.mapper.relation(
                    relation.id,
                    relation.namespace,
                    relation.name,
                    columns,
                    at,
                )?;
            }
            Message::Insert { relation_id, tuple } => {
                let Some(transaction) = transaction else {
                    return Err(Error::OutOfPlace {
                        message: "Insert",
                        at,
                    });
                };
                let place = transaction.next_place();
                let values = tuple.iter().map(|value| match value {
                    TupleValue::Null => Value::Null,
                    TupleValue::UnchangedToast => Value::UnchangedToast,
                    TupleValue::Text(text) => Value::Text(text),
                    TupleValue::Binary(bytes) => Value::Binary(bytes),
                });
                if self.mapper.insert(relation_id, values, place, batch)? {
                    transaction.events += 1;
                }
            }
            Message::Update { relation_id, .. } => log::debug!(relation_id; "ignored an update"),
            Message::Delete { relation_id, .. } => log::trace!(relation_id; "ignored a delete"),
            Message::Truncate { .. } => log::debug!("ignored a truncate"),
            Message::Message {
                transactional: true,
                prefix,
                content,
                ..
            } => {
                let Some(transaction) = transaction else {
                    return Err(Error::OutOfPlace {
                        message: "Message",
                        at,
                    });
                };
                let place = transaction.next_place();
                if self.mapper.message(prefix, content.0, place, batch)? {
                    transaction.events += 1;
                }
            }
            // one that is not transactional may come from a transaction that rolled back
            Message::Message { .. } | Message::Origin { .. } | Message::Type { .. } => {}
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::convert::Infallible;

    fn batch(bytes: usize) -> Batch {
        let mut batch = empty();
        let body = |out: &mut Vec<u8>| {
            out.resize(out.len() + bytes, b'x');
            Ok::<(), Infallible>(())
        };
        let Ok(()) = batch.push_event("", Position::default(), |_| Ok(()), |_| Ok(()), body);
        batch
    }

    #[test]
    fn what_waits_for_the_publisher_is_bounded_in_bytes() {
        for bytes in [100, BATCH_BYTES + 100, 2 * BATCH_BYTES, 14 * BATCH_BYTES] {
            let (sender, receiver) = bounded(CHANNEL_BATCHES);
            while CHANNEL_BATCHES - sender.len() >= (bytes / BATCH_BYTES).clamp(1, CHANNEL_BATCHES)
            {
                send(&sender, batch(bytes)).unwrap();
            }
            assert!(sender.is_full());
            let waiting: usize = receiver.try_iter().map(|batch| batch.len_bytes()).sum();
            let most = CHANNEL_BATCHES * (BATCH_BYTES + BATCH_SLACK);
            assert!(
                waiting <= most.max(bytes),
                "{waiting} bytes of {bytes} each"
            );
        }
    }

    #[test]
    fn a_batch_keeps_no_more_than_it_holds() {
        for bytes in [100, BATCH_BYTES, 10 * BATCH_BYTES] {
            let mut filled = batch(bytes);
            let full = take(&mut filled);
            assert_eq!((full.changes().len(), full.len_bytes()), (1, bytes));
            assert!(full.room() < bytes + 1024, "{} bytes", full.room());
            assert!(filled.is_empty() && filled.len_bytes() == 0);
            assert_eq!(filled.room(), empty().room());
        }
        // one that had grown while its events were made
        let mut filled = batch(10 * BATCH_BYTES);
        filled.clear();
        take(&mut filled);
        assert_eq!(filled.room(), empty().room());
    }
}
