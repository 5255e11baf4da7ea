//! The reader thread: blocks on the replication stream, decodes it, and pushes batches of changes into
//! the channel.
//!
//! A batch is what one read of the socket held: it goes on when the next message would have to be waited
//! for, so that nothing waits when the outbox is idle, and a backlog travels in large pieces; in a flow,
//! [`Pace`] lets a little gather first. When the channel is full the reader stands still, the socket fills
//! up, and Postgres keeps the rest.

mod batches;

use super::error::{Error, Undecodable};
use super::feedback::Ask;
use super::pace::Pace;
use super::progress::Progress;
use super::stop::Stop;
use super::vitals::Vitals;
use crate::outbox::batch::{Batch, Change};
use crate::outbox::large::{LargeContent, LargeRow};
use crate::outbox::mapper::Mapper;
use crate::outbox::plan::{Place, Value};
use crate::outbox::position::Position;
use crate::postgres::error::ServerError;
use crate::postgres::pgoutput::{self, DecodeError, Message};
use crate::postgres::pieces::{self, Head};
use crate::postgres::replication::{ReplicationMessage, ReplicationReader};
use crate::postgres::sqlstate::Meaning;
use crate::postgres::{self, Lsn};
pub use batches::CHANNEL_BATCHES;
use batches::{BATCH_BYTES, BATCH_CHANGES, Lease, empty, send, take};
use crossbeam_channel::Sender;
use std::thread;
use std::time::{Duration, Instant};

/// A transaction that has begun may be read to its end for so long after the request to stop, so that it
/// can be confirmed.
const STOP_GRACE: Duration = Duration::from_millis(500);

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
    /// With `-drain`: everything up to here, and no more.
    pub upto: Option<Lsn>,
    /// Learns how far the server's log goes.
    pub vitals: &'a Vitals,
    /// No transaction has come yet.
    pub is_first: bool,
    /// Everything up to here is resolved: the anchor.
    pub resolved: Position,
    /// What is no event is shown if it was committed before this: earlier flags may have made one of it.
    pub earlier_upto: Lsn,
    /// The publisher may hold the last event of a batch back until more of its transaction comes.
    pub holds_last: bool,
}

/// Why the reader ended, when nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to, or nobody receives its batches any more.
    Stopped,
    /// Everything up to the LSN of `-drain` was read.
    Drained,
    /// Postgres ended the stream.
    ByServer,
}

/// What comes of an error while Postgres decodes.
///
/// Up to 17 it ends the stream when the publication was missing at what it decodes (undefined_object); from 18 on it says so in a
/// notice, and leaves the rows out. What a row is to blame for, or returns at the same place, no other session can pass.
fn while_decoding(
    error: postgres::Error,
    transaction: Option<&Transaction>,
    reached: Lsn,
) -> Error {
    if error.sqlstate() == Some("42704") {
        return Error::publication_skipped(&error);
    }
    match error.meaning() {
        Some(meaning @ (Meaning::Data | Meaning::Unclear)) => {
            Error::Undecodable(Box::new(Undecodable {
                at: error.server().and_then(ServerError::associated_lsn),
                error,
                commit_lsn: transaction.map(|transaction| transaction.commit_lsn),
                reached,
                is_for_good: meaning == Meaning::Data,
                slot: String::new(),
            }))
        }
        Some(Meaning::Outage | Meaning::Configuration) | None => Error::Postgres(error),
    }
}

/// The transaction that is being read.
struct Transaction {
    commit_lsn: Lsn,
    commit_time_us: i64,
    xid: u32,
    /// So many rows and messages of it have come.
    rows: u64,
    /// The batches have something of it.
    is_shown: bool,
}

impl Transaction {
    /// Where the next row or message of it stands, whatever becomes of that.
    fn next_place(&mut self, resolved: Position) -> Place {
        self.rows += 1;
        let position = Position {
            commit_lsn: self.commit_lsn,
            ordinal: self.rows.try_into().unwrap_or(u32::MAX),
        };
        Place {
            position,
            commit_time_us: self.commit_time_us,
            xid: self.xid,
            is_resolved: position <= resolved,
        }
    }

    /// An event was added: the batches have something of it.
    fn show(&mut self) -> Result<(), Error> {
        self.is_shown = true;
        match self.rows < u32::MAX.into() {
            true => Ok(()),
            false => Err(Error::Internal(
                "an event behind 2^32 rows of its transaction",
            )),
        }
    }
}

/// A message that comes in pieces.
struct Large {
    at: Lsn,
    what: LargePart,
}

/// What is kept of it.
enum LargePart {
    /// Nothing: it is not for us.
    PassedOver,
    /// All: a table has at most 1,600 columns.
    Relation(Vec<u8>),
    /// The columns that take part in an event.
    Row(u32, pieces::Row, LargeRow),
    Content(LargeContent),
}

/// The longest description of a table: 1,600 names of at most 63 bytes, which the server may have converted.
const MAX_RELATION_BYTES: usize = 1 << 20;
/// How long the reader works on one message at most, or on what one read of the socket held. All of it takes time in
/// proportion to its length.
const WORK_LIMIT: Duration = Duration::from_secs(20);

/// A batch that ends in the middle of a transaction says of which one.
fn end_open(batch: &mut Batch, transaction: Option<&Transaction>) {
    if let Some(open) = transaction.filter(|open| open.is_shown) {
        batch.push(Change::Open {
            commit_lsn: open.commit_lsn,
            commit_time_us: open.commit_time_us,
        });
    }
}

/// It has no event: it says how far Postgres is.
fn is_boundary(batch: &Batch) -> bool {
    matches!(batch.changes(), [Change::Keepalive { .. }])
}

/// What has been read so far.
struct State {
    batch: Batch,
    transaction: Option<Transaction>,
    large: Option<Large>,
    /// The commit of the last transaction that began.
    last_commit: Lsn,
    /// Everything up to here has arrived.
    reached: Lsn,
    server_wal_end: Lsn,
    pace: Pace,
    stopping: Option<Instant>,
    /// Of the large batch that was sent last.
    lease: Option<Lease>,
}

impl Reader<'_> {
    /// Reads until the end, which drops the channel to the publisher.
    pub fn run(self, stream: &mut ReplicationReader) -> Result<Ended, Error> {
        let slot = stream.slot().to_string();
        let vitals = self.vitals;
        let ended = self.read(stream);
        vitals.reader.ended();
        ended.map_err(|error| error.of_slot(slot))
    }

    fn read(mut self, stream: &mut ReplicationReader) -> Result<Ended, Error> {
        let mut state = State {
            batch: empty(),
            transaction: None,
            large: None,
            last_commit: Lsn::INVALID,
            reached: Lsn::INVALID,
            server_wal_end: Lsn::INVALID,
            pace: Pace::default(),
            stopping: None,
            lease: None,
        };
        loop {
            if let Some(ended) = self.hand_on(stream, &mut state) {
                return Ok(ended);
            }
            match self.read_one(stream, &mut state) {
                Ok(None) => {}
                Ok(Some(ended)) => return Ok(ended),
                Err(error) => {
                    // what is whole goes out before the relay stops
                    state.batch.truncate_to_boundary();
                    self.vitals.reader.ended();
                    let _ = self.changes.send(state.batch);
                    return Err(error);
                }
            }
        }
    }

    /// Sends the batch on when it is time, and says whether that was the end.
    fn hand_on(&self, stream: &ReplicationReader, state: &mut State) -> Option<Ended> {
        let batch = &mut state.batch;
        if !stream.has_buffered()
            || batch.len_bytes() >= BATCH_BYTES
            || batch.changes().len() >= BATCH_CHANGES
        {
            // while NATS is away it would keep out the events behind it; the next keepalive stands for this one too
            if is_boundary(batch) && self.changes.is_full() {
                return self.stops(state);
            }
            if !batch.is_empty() {
                end_open(batch, state.transaction.as_ref());
                let unfinished = state.transaction.as_ref().filter(|it| it.is_shown);
                let unfinished = unfinished.map(|it| it.commit_time_us);
                self.vitals
                    .hands_over(state.reached, self.changes.len(), unfinished);
                self.progress.sending(true);
                self.vitals.reader.ended();
                let bytes = batch.len_bytes();
                let before = self.holds_last.then_some(&mut state.lease);
                let sent = send(&self.changes, take(batch), before);
                self.vitals.reader.within(WORK_LIMIT);
                self.progress.sending(false);
                if sent.is_err() {
                    return Some(Ended::Stopped);
                }
                let pause = state.pace.sent(Instant::now(), bytes);
                if !pause.is_zero() && !stream.has_buffered() {
                    thread::sleep(pause);
                }
            }
            if state.transaction.is_none() && self.upto.is_some_and(|upto| state.reached >= upto) {
                return Some(Ended::Drained);
            }
        }
        self.stops(state)
    }

    /// Sends what there is when the relay is to stop, and says whether that was the end.
    fn stops(&self, state: &mut State) -> Option<Ended> {
        if self.stop.is_stopping() {
            let since = *state.stopping.get_or_insert_with(Instant::now);
            if state.transaction.is_none() || since.elapsed() > STOP_GRACE {
                self.vitals.reader.ended();
                end_open(&mut state.batch, state.transaction.as_ref());
                // nobody may be there to take it
                let _ = self.changes.send(std::mem::take(&mut state.batch));
                return Some(Ended::Stopped);
            }
        }
        None
    }

    /// Waits for the next message, or the next piece of one, and takes it.
    fn read_one(
        &mut self,
        stream: &mut ReplicationReader,
        state: &mut State,
    ) -> Result<Option<Ended>, Error> {
        let waits = !stream.has_buffered();
        if waits {
            self.vitals.server_is_at(state.server_wal_end);
            self.vitals.reader.ended();
        }
        self.progress.reading(waits);
        let message = stream.read();
        self.progress.reading(false);
        if waits {
            self.vitals.reader.within(WORK_LIMIT);
        }
        let message = message
            .map_err(|error| while_decoding(error, state.transaction.as_ref(), state.reached))?;
        match message {
            None => return Ok(Some(Ended::ByServer)),
            Some(ReplicationMessage::Notice(notice)) => {
                // "skipped loading publication", in whatever language
                if notice.routine.as_deref() == Some("LoadPublications") {
                    return Err(Error::publication_skipped(&*notice));
                }
                log::info!(notice:% = notice; "postgres says");
            }
            Some(ReplicationMessage::PrimaryKeepalive {
                wal_end,
                reply_requested,
                ..
            }) => {
                state.server_wal_end = state.server_wal_end.max(wal_end);
                self.progress.received(wal_end);
                state.batch.push_boundary(wal_end);
                state.reached = state.reached.max(wal_end);
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
                state.server_wal_end = state.server_wal_end.max(wal_end);
                let message = decoded(pgoutput::decode(data), wal_start)?;
                if let Message::Begin { commit_time_us, .. } = message {
                    state.pace.begun(commit_time_us, server_time_us);
                }
                self.take(message, wal_start, state)?;
            }
            Some(ReplicationMessage::LargeXLogData {
                wal_start,
                wal_end,
                head,
                ..
            }) => {
                state.server_wal_end = state.server_wal_end.max(wal_end);
                let at = wal_start;
                let what = self.begin_large(decoded(pieces::head(head), at)?, at, state)?;
                state.large = Some(Large { at, what });
            }
            Some(ReplicationMessage::Piece { bytes, is_last }) => {
                self.take_piece(bytes, is_last, state)?;
            }
        }
        Ok(None)
    }

    /// What is to be kept of a large message.
    fn begin_large(&self, head: Head<'_>, at: Lsn, state: &mut State) -> Result<LargePart, Error> {
        let max_payload = self.progress.max_payload();
        Ok(match head {
            Head::Insert { relation_id } => {
                match self.mapper.large_row(relation_id, max_payload)? {
                    Some(row) => LargePart::Row(relation_id, pieces::Row::default(), row),
                    None => self.pass_over("Insert", at, state)?,
                }
            }
            Head::Message {
                transactional: true,
                prefix: Some(prefix),
                content_at,
                content_len,
            } if self.mapper.is_event_prefix(prefix.0) => {
                LargePart::Content(LargeContent::new(content_at, content_len, max_payload))
            }
            Head::Relation => LargePart::Relation(Vec::new()),
            Head::Message {
                transactional: true,
                ..
            } => self.pass_over("Message", at, state)?,
            Head::Message { .. } | Head::Other => {
                log::debug!(at:% = at; "passing over a large message that is not for us");
                LargePart::PassedOver
            }
        })
    }

    /// A large row or message of a transaction that is no event.
    fn pass_over(
        &self,
        message: &'static str,
        at: Lsn,
        state: &mut State,
    ) -> Result<LargePart, Error> {
        let transaction = inside(&mut state.transaction, message, at)?;
        let place = transaction.next_place(self.resolved);
        transaction.is_shown |= self.ignore(place, &mut state.batch);
        Ok(LargePart::PassedOver)
    }

    /// A row or message that is no event: shown to the publisher where an earlier relay, by other flags, may have made one of it.
    fn ignore(&self, place: Place, batch: &mut Batch) -> bool {
        let Position {
            commit_lsn,
            ordinal,
        } = place.position;
        let is_shown = commit_lsn < self.earlier_upto && ordinal < u32::MAX;
        if is_shown {
            batch.push_ignored(place.position);
        }
        is_shown
    }

    /// More of a large message; with the last of it, it is taken as any other.
    fn take_piece(&mut self, bytes: &[u8], is_last: bool, state: &mut State) -> Result<(), Error> {
        let Some(large) = &mut state.large else {
            return Err(Error::Internal("a piece of no message"));
        };
        let at = large.at;
        match &mut large.what {
            LargePart::PassedOver => {}
            LargePart::Relation(whole) if whole.len() + bytes.len() > MAX_RELATION_BYTES => {
                let message = "Relation of more than 1 MiB";
                return Err(Error::OutOfPlace { message, at });
            }
            LargePart::Relation(whole) => whole.extend_from_slice(bytes),
            LargePart::Row(_, pieces, row) => {
                decoded(pieces.feed(bytes, |piece| row.take(piece)), at)?;
            }
            LargePart::Content(content) => content.take(bytes),
        }
        if !is_last {
            return Ok(());
        }
        match state.large.take().map(|large| large.what) {
            None | Some(LargePart::PassedOver) => {}
            Some(LargePart::Relation(whole)) => {
                let message = decoded(pgoutput::decode(&whole), at)?;
                self.take(message, at, state)?;
            }
            Some(LargePart::Row(relation_id, pieces, row)) => {
                decoded(pieces.finish(), at)?;
                let batch = &mut state.batch;
                let transaction = inside(&mut state.transaction, "Insert", at)?;
                let place = transaction.next_place(self.resolved);
                (self.mapper).insert(relation_id, row.values(), place, batch)?;
                transaction.show()?;
            }
            Some(LargePart::Content(content)) => {
                let transaction = inside(&mut state.transaction, "Message", at)?;
                let place = transaction.next_place(self.resolved);
                (self.mapper).message(content.value(), place, &mut state.batch)?;
                transaction.show()?;
            }
        }
        Ok(())
    }

    /// The end of a transaction.
    fn commit(
        &mut self,
        ended: &Transaction,
        end_lsn: Lsn,
        commit_time_us: i64,
        state: &mut State,
    ) {
        // the first one proves which WAL this is, also without events
        if ended.is_shown || std::mem::take(&mut self.is_first) {
            self.is_first = false;
            self.vitals.waits_too(commit_time_us);
            state.batch.push(Change::Commit {
                commit_lsn: ended.commit_lsn,
                end_lsn,
                commit_time_us,
            });
        } else {
            state.batch.push_boundary(end_lsn);
        }
        self.progress.received(end_lsn);
        state.reached = state.reached.max(end_lsn);
    }

    /// One pgoutput message.
    fn take(&mut self, message: Message<'_>, at: Lsn, state: &mut State) -> Result<(), Error> {
        match message {
            Message::Begin {
                final_lsn,
                commit_time_us,
                xid,
            } => {
                // transactions come one at a time, in the order of their commits
                if state.transaction.is_some() || final_lsn <= state.last_commit {
                    let message = "Begin";
                    return Err(Error::OutOfPlace { message, at });
                }
                state.last_commit = final_lsn;
                state.transaction = Some(Transaction {
                    commit_lsn: final_lsn,
                    commit_time_us,
                    xid,
                    rows: 0,
                    is_shown: false,
                });
            }
            Message::Commit {
                commit_lsn,
                end_lsn,
                commit_time_us,
            } => {
                let ended = state.transaction.take();
                let ended = ended.filter(|begun| begun.commit_lsn == commit_lsn);
                let Some(ended) = ended.filter(|_| end_lsn > commit_lsn) else {
                    let message = "Commit";
                    return Err(Error::OutOfPlace { message, at });
                };
                self.commit(&ended, end_lsn, commit_time_us, state);
            }
            Message::Relation(relation) => {
                // its own LSN is none
                let at =
                    (state.transaction.as_ref()).map_or(at, |transaction| transaction.commit_lsn);
                self.mapper.describe(&relation, at)?;
            }
            Message::Insert { relation_id, tuple } => {
                let transaction = inside(&mut state.transaction, "Insert", at)?;
                let place = transaction.next_place(self.resolved);
                let values = tuple.iter().map(Value::from);
                let batch = &mut state.batch;
                match (self.mapper).insert(relation_id, values, place, batch)? {
                    true => transaction.show()?,
                    false => transaction.is_shown |= self.ignore(place, batch),
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
                let transaction = inside(&mut state.transaction, "Message", at)?;
                let place = transaction.next_place(self.resolved);
                if self.mapper.is_event_prefix(prefix.0) {
                    let content = Value::Text(content.0);
                    self.mapper.message(content, place, &mut state.batch)?;
                    transaction.show()?;
                } else {
                    transaction.is_shown |= self.ignore(place, &mut state.batch);
                }
            }
            // one that is not transactional may come from a transaction that rolled back
            Message::Message { .. } | Message::Origin { .. } | Message::Type { .. } => {}
        }
        Ok(())
    }
}

fn decoded<T>(result: Result<T, DecodeError>, at: Lsn) -> Result<T, Error> {
    result.map_err(|error| Error::Decode { error, at })
}

/// The transaction that a message is part of.
fn inside<'a>(
    transaction: &'a mut Option<Transaction>,
    message: &'static str,
    at: Lsn,
) -> Result<&'a mut Transaction, Error> {
    transaction
        .as_mut()
        .ok_or(Error::OutOfPlace { message, at })
}
