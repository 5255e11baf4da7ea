//! The streaming replication protocol: IDENTIFY_SYSTEM, START_REPLICATION, and the copy-both stream behind it.
//!
//! What the stream carries is `pgoutput`'s business.
//! Source: <https://www.postgresql.org/docs/current/protocol-replication.html>.

use super::connection::{Connection, Deadline, quote_identifier};
use super::error::{Error, ServerError};
use super::frames::{self, CopyData, Frame};
use super::limits::{REQUEST_TIMEOUT, WRITE_TIMEOUT};
use super::lsn::Lsn;
use super::stream::Stream;
use bytes::{BufMut, BytesMut};
use postgres_protocol::message::frontend;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// 2000-01-01 00:00 UTC, where Postgres counts from.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// IDENTIFY_SYSTEM's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentifySystem {
    /// Made once by initdb, the same on a standby.
    pub system_id: u64,
    /// Counted up by each promotion of a standby.
    pub timeline: u32,
    /// How far the log is flushed.
    pub xlogpos: Lsn,
    /// The database of the session.
    pub dbname: String,
}

/// Asks the server who it is.
pub fn identify_system(connection: &mut Connection) -> Result<IdentifySystem, Error> {
    let rows = connection.simple_query("IDENTIFY_SYSTEM")?;
    let field = |i: usize| rows.first()?.get(i)?.as_deref();
    let identified = || {
        Some(IdentifySystem {
            system_id: field(0)?.parse().ok()?,
            timeline: field(1)?.parse().ok()?,
            xlogpos: field(2)?.parse().ok()?,
            dbname: field(3)?.to_string(),
        })
    };
    identified().ok_or_else(|| Error::Protocol("an answer to IDENTIFY_SYSTEM that is none".into()))
}

/// Starts logical replication from `slot` at `start`; [`Lsn::INVALID`] is the slot's own position.
///
/// `options` are the output plugin's, for instance `("proto_version", "1")`; they are quoted here.
///
/// # Errors
/// [`Error::Server`] with 55006 if the slot is in use, 42704 if there is none, 55000 if it was lost.
pub fn start_replication(
    mut connection: Connection,
    slot: &str,
    start: Lsn,
    options: &[(&str, &str)],
) -> Result<(ReplicationReader, ReplicationWriter), Error> {
    let deadline = Deadline::after("start replication", REQUEST_TIMEOUT);
    let options: Vec<String> = options
        .iter()
        .map(|(name, value)| format!("{} {}", quote_identifier(name), quote_option(value)))
        .collect();
    let options = match options.is_empty() {
        true => String::new(),
        false => format!(" ({})", options.join(", ")),
    };
    let quoted = quote_identifier(slot);
    connection.send_query(
        &format!("START_REPLICATION SLOT {quoted} LOGICAL {start}{options}"),
        &deadline,
    )?;
    loop {
        let frame = connection.read_frame(&deadline)?;
        match frame.tag {
            b'W' => break,
            b'E' => return Err(connection.server_error(frame)),
            _ if connection.take_asynchronous(frame) => {}
            tag => return Err(out_of_turn(tag)),
        }
    }
    connection
        .stream
        .wait_for_ever()
        .map_err(|source| deadline.error(source))?;
    connection.frames.set_copy_data(CopyData::Pieces);
    let writer = ReplicationWriter {
        stream: connection.stream.clone(),
    };
    let reader = ReplicationReader {
        connection,
        slot: slot.to_string(),
        ended: false,
    };
    Ok((reader, writer))
}

/// A literal of the replication grammar, where a backslash is an ordinary character and `E''` is unknown.
fn quote_option(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}

/// A message of the copy-both stream. Times are microseconds since 2000-01-01 00:00 UTC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicationMessage<'a> {
    /// A piece of the log, as the output plugin has decoded it.
    XLogData {
        /// Where the piece starts; not all messages have a position, and some repeat it.
        wal_start: Lsn,
        /// The end of the log on the server.
        wal_end: Lsn,
        /// The server's clock.
        server_time_us: i64,
        /// The plugin's message.
        data: &'a [u8],
    },
    /// The beginning of XLogData that is too large to be held: it follows in [`ReplicationMessage::Piece`]s.
    LargeXLogData {
        /// As in XLogData.
        wal_start: Lsn,
        /// As in XLogData.
        wal_end: Lsn,
        /// As in XLogData.
        server_time_us: i64,
        /// What is there of the plugin's message, thousands of bytes at least. The first pieces repeat it.
        head: &'a [u8],
    },
    /// More of the plugin's message, as it comes in.
    Piece {
        /// Some bytes of it.
        bytes: &'a [u8],
        /// With them it is whole.
        is_last: bool,
    },
    /// The server is alive.
    PrimaryKeepalive {
        /// Everything that the slot has to send was sent up to here.
        wal_end: Lsn,
        /// The server's clock.
        server_time_us: i64,
        /// The server wants a status update at once.
        reply_requested: bool,
    },
    /// A NoticeResponse. Postgres 18 says in one only (55000) that it skips a publication that is missing.
    Notice(Box<ServerError>),
}

/// The receiving half of the copy-both stream. The connection lasts until this and all writers are dropped,
/// or until one of them ends it.
#[derive(Debug)]
pub struct ReplicationReader {
    connection: Connection,
    slot: String,
    /// The server has ended its side of the copy.
    ended: bool,
}

impl ReplicationReader {
    /// The slot's name.
    pub fn slot(&self) -> &str {
        &self.slot
    }

    /// The next message; waits for it without a deadline of its own. Who owns the writer keeps watch, and
    /// wakes this with [`ReplicationWriter::shutdown`]. `None`: the server has ended the copy.
    ///
    /// Nothing that the server sends is held whole beyond the receive buffer: of a large message each call gives what one
    /// read of the socket held, so that its receiver can look up in between.
    pub fn read(&mut self) -> Result<Option<ReplicationMessage<'_>>, Error> {
        match self.next()? {
            None => Ok(None),
            Some(Next::Data(frame)) => decode(self.connection.frames.body(frame)).map(Some),
            Some(Next::Notice(frame)) => {
                let notice = ServerError::from_body(self.connection.frames.body(frame))?;
                Ok(Some(ReplicationMessage::Notice(Box::new(notice))))
            }
            Some(Next::Large) => {
                let ReplicationMessage::XLogData {
                    wal_start,
                    wal_end,
                    server_time_us,
                    ..
                } = decode(self.connection.frames.peek())?
                else {
                    return Err(Error::Protocol(
                        "a replication message of a kind that is never so large".into(),
                    ));
                };
                self.connection.frames.advance(XLOG_HEADER_BYTES);
                Ok(Some(ReplicationMessage::LargeXLogData {
                    wal_start,
                    wal_end,
                    server_time_us,
                    head: self.connection.frames.peek(),
                }))
            }
            Some(Next::Piece(range, is_last)) => Ok(Some(ReplicationMessage::Piece {
                bytes: self.connection.frames.bytes(range),
                is_last,
            })),
        }
    }

    /// A message, or a piece of one, was received already, so that `read` will not wait. (Over TLS there may be one
    /// although this says no.)
    pub fn has_buffered(&self) -> bool {
        self.connection.frames.has_frame()
    }

    /// To be called after [`ReplicationWriter::copy_done`]: reads, and drops, what the server still sends, until
    /// it has ended the copy and is ready, or until `timeout`; then takes leave.
    pub fn finish(mut self, timeout: Duration) -> Result<(), Error> {
        let result = self.drain(&Deadline::after("end replication", timeout));
        let stream = self.connection.stream.clone();
        ReplicationWriter { stream }.terminate();
        result
    }

    fn drain(&mut self, deadline: &Deadline) -> Result<(), Error> {
        self.connection.frames.set_copy_data(CopyData::Cut);
        loop {
            while self.connection.frames.piece().is_some() {}
            if self.connection.frames.is_in_large() {
                self.connection.receive(Some(deadline))?;
                continue;
            }
            let frame = match self.connection.read_frame(deadline) {
                // a server that shuts down ends the copy and is gone
                Err(Error::Closed { .. }) if self.ended => return Ok(()),
                frame => frame?,
            };
            match frame.tag {
                b'Z' => return Ok(()),
                b'c' | b'C' => self.ended = true,
                b'd' | b'N' | b'S' => {}
                b'E' => return Err(self.connection.server_error(frame)),
                tag => return Err(out_of_turn(tag)),
            }
        }
    }

    /// What there is to be read next; `None` once the copy has ended.
    fn next(&mut self) -> Result<Option<Next>, Error> {
        while !self.ended {
            let connection = &mut self.connection;
            if connection.frames.is_in_large() {
                match connection.frames.piece() {
                    Some((range, is_last)) => return Ok(Some(Next::Piece(range, is_last))),
                    None => connection.receive(None)?,
                }
                continue;
            }
            let Some(frame) = connection.frames.take()? else {
                match connection.frames.begin_large()? {
                    Some(_) => return Ok(Some(Next::Large)),
                    None => connection.receive(None)?,
                }
                continue;
            };
            match frame.tag {
                b'd' => return Ok(Some(Next::Data(frame))),
                b'N' => return Ok(Some(Next::Notice(frame))),
                // a server that shuts down completes the command without CopyDone
                b'c' | b'C' => self.ended = true,
                b'E' => return Err(self.connection.server_error(frame)),
                // a setting changed
                b'S' => {}
                tag => return Err(out_of_turn(tag)),
            }
        }
        Ok(None)
    }
}

/// What was taken off the stream.
enum Next {
    Data(Frame),
    Notice(Frame),
    /// A large message begins.
    Large,
    Piece(Range<usize>, bool),
}

fn out_of_turn(tag: u8) -> Error {
    Error::Protocol(format!(
        "message {} in the replication stream",
        frames::name(tag)
    ))
}

/// What precedes the plugin's message in XLogData: its kind, two LSNs and a time.
const XLOG_HEADER_BYTES: usize = 25;

/// The inside of a CopyData message.
fn decode(body: &[u8]) -> Result<ReplicationMessage<'_>, Error> {
    let truncated = || Error::Protocol("a replication message that is cut short".into());
    let (kind, rest) = body.split_first().ok_or_else(truncated)?;
    match kind {
        b'w' => {
            let (wal_start, rest) = rest.split_first_chunk().ok_or_else(truncated)?;
            let (wal_end, rest) = rest.split_first_chunk().ok_or_else(truncated)?;
            let (time, data) = rest.split_first_chunk().ok_or_else(truncated)?;
            Ok(ReplicationMessage::XLogData {
                wal_start: Lsn(u64::from_be_bytes(*wal_start)),
                wal_end: Lsn(u64::from_be_bytes(*wal_end)),
                server_time_us: i64::from_be_bytes(*time),
                data,
            })
        }
        b'k' => {
            let (wal_end, rest) = rest.split_first_chunk().ok_or_else(truncated)?;
            let (time, rest) = rest.split_first_chunk().ok_or_else(truncated)?;
            let reply = rest.first().ok_or_else(truncated)?;
            Ok(ReplicationMessage::PrimaryKeepalive {
                wal_end: Lsn(u64::from_be_bytes(*wal_end)),
                server_time_us: i64::from_be_bytes(*time),
                reply_requested: *reply != 0,
            })
        }
        other => Err(Error::Protocol(format!(
            "a replication message of the unknown kind {}",
            frames::name(*other)
        ))),
    }
}

/// What we tell the server about our progress: each the last position + 1 that was so treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandbyStatusUpdate {
    /// Received.
    pub write: Lsn,
    /// Safe with us; the slot's `confirmed_flush_lsn` becomes this.
    pub flush: Lsn,
    /// Applied.
    pub apply: Lsn,
    /// The server shall answer with a keepalive.
    pub reply_requested: bool,
}

/// The sending half of the copy-both stream; a write waits 30 s at most.
#[derive(Clone)]
pub struct ReplicationWriter {
    stream: Arc<Stream>,
}

impl std::fmt::Debug for ReplicationWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicationWriter").finish_non_exhaustive()
    }
}

impl ReplicationWriter {
    /// Sends a status update with the present time.
    pub fn send_status(&self, status: &StandbyStatusUpdate) -> Result<(), Error> {
        let doing = "send a status update";
        let mut body = BytesMut::with_capacity(34);
        body.put_u8(b'r');
        for position in [status.write, status.flush, status.apply] {
            body.put_u64(position.0);
        }
        body.put_i64(now_us());
        body.put_u8(status.reply_requested.into());
        let mut message = BytesMut::with_capacity(body.len() + 5);
        frontend::CopyData::new(body)
            .expect("34 bytes are a legal length")
            .write(&mut message);
        self.send(doing, &message)
    }

    /// Ends our side of the copy; the server answers by ending its own.
    pub fn copy_done(&self) -> Result<(), Error> {
        let mut message = BytesMut::new();
        frontend::copy_done(&mut message);
        self.send("end replication", &message)
    }

    /// So long ago bytes came from the server last, be it a part of a message.
    pub fn silence(&self) -> Duration {
        self.stream.silence()
    }

    /// Takes leave of the server, if it still listens.
    pub fn terminate(&self) {
        let mut message = BytesMut::new();
        frontend::terminate(&mut message);
        // whoever leaves does not care whether the other side is gone already
        let _ = self.send("take leave", &message);
    }

    /// Closes the connection, whatever is under way; a reader that waits wakes with [`Error::Closed`].
    pub fn shutdown(&self) {
        self.stream.shutdown();
    }

    fn send(&self, doing: &'static str, message: &[u8]) -> Result<(), Error> {
        let deadline = Deadline::after(doing, WRITE_TIMEOUT);
        self.stream
            .write_all(message, deadline.end)
            .map_err(|source| deadline.error(source))
    }
}

/// Microseconds since 2000-01-01 00:00 UTC; a clock before that counts as that.
fn now_us() -> i64 {
    let since_1970 = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_1970.saturating_sub(POSTGRES_EPOCH).as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_decode_and_no_prefix_passes_for_one() {
        let mut xlog = vec![b'w'];
        xlog.extend_from_slice(&1_u64.to_be_bytes());
        xlog.extend_from_slice(&2_u64.to_be_bytes());
        xlog.extend_from_slice(&(-3_i64).to_be_bytes());
        let mut keepalive = vec![b'k'];
        keepalive.extend_from_slice(&2_u64.to_be_bytes());
        keepalive.extend_from_slice(&4_i64.to_be_bytes());
        keepalive.push(1);
        for (message, expected) in [
            (
                &xlog,
                ReplicationMessage::XLogData {
                    wal_start: Lsn(1),
                    wal_end: Lsn(2),
                    server_time_us: -3,
                    data: b"",
                },
            ),
            (
                &keepalive,
                ReplicationMessage::PrimaryKeepalive {
                    wal_end: Lsn(2),
                    server_time_us: 4,
                    reply_requested: true,
                },
            ),
        ] {
            assert_eq!(decode(message).unwrap(), expected);
            for cut in 0..message.len() {
                assert!(decode(&message[..cut]).is_err(), "{cut}");
            }
        }
        xlog.extend_from_slice(b"row");
        assert!(matches!(
            decode(&xlog),
            Ok(ReplicationMessage::XLogData { data: b"row", .. })
        ));
        assert!(decode(b"x").unwrap_err().to_string().contains("'x' (0x78)"));
    }

    #[test]
    fn options_are_literals_of_the_replication_grammar() {
        assert_eq!(quote_option(r#""it's" \"#), r#"'"it''s" \'"#);
    }
}
