//! Why the core cannot go on as it is.

use super::continuity;
use super::evidence::Found;
use crate::jetstream::ack::AckError;
use crate::outbox::position::Position;
use std::fmt;

/// The connection or the whole relay cannot go on as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Throw the connection to NATS away, connect, resume.
    Reconnect(Cause),
    /// The same; and the event under this token can never be published as it is.
    Refused {
        /// Names the event.
        token: u64,
        /// Why.
        why: Refusal,
    },
    /// It cannot be repaired.
    Halt(Halt),
    /// Postgres sent what it cannot send: an event at this position, after a later one.
    OutOfOrder(Position),
}

/// Why an event can never be published as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its stream refuses it, and this error is about the event itself.
    ByStream(AckError),
    /// The server refuses it, in these words, and ends the connection or leaves it without an answer.
    ByServer(String),
    /// Its stream refuses it each time, with an error that is not known.
    Unknown(AckError),
    /// The server ends the connection at it each time, without a word.
    Silence,
}

impl Refusal {
    /// It may be no matter of this event.
    pub fn is_doubtful(&self) -> bool {
        matches!(self, Refusal::Unknown(_) | Refusal::Silence)
    }
}

/// Why a connection's window ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Refused by the stream, for a while.
    Refused(AckError),
    /// Stored, but not where it was predicted, or taken for a duplicate of a message that there is not.
    OtherAnswer {
        /// What the ack says.
        seq: u64,
    },
    /// The oldest event that waits was not acknowledged within the ack timeout.
    AckTimeout,
    /// No stream captures this subject.
    NoStream(String),
    /// Another stream has answered. The subject may have been moved since the routes were read: if it happens again, it was not.
    Elsewhere {
        /// The stream that captured the subject when the routes were read.
        stream: String,
        /// The stream that has answered, or what the stream that refused says.
        answered: String,
    },
    /// A stream seems to be another one than it was, or to end before what it had acknowledged: a closer look will tell.
    Disagrees(String),
    /// What a replicated stream has refused a publish for is not there yet.
    Lags(String),
}

/// What cannot be repaired without a person's decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// Another event is at this position of the stream: it was written from another history.
    OtherId {
        /// The stream's name.
        stream: String,
        /// The position both claim.
        position: Position,
        /// The id that Postgres has there.
        id: String,
    },
    /// A stream has an event that Postgres did not send, at this place.
    NotSent {
        /// The stream's name.
        stream: String,
        /// Where.
        found: Found,
    },
    /// This is not the WAL that the streams were written from.
    Discontinuous(continuity::Broken),
    /// A stream takes no event at all.
    Closed {
        /// The stream's name.
        stream: String,
        /// What it says.
        error: AckError,
    },
    /// What seemed to be the matter of an event is that of the next one, too, and its stream has taken nothing in between.
    EachRefused {
        /// The stream's name.
        stream: String,
        /// The event's position.
        position: Position,
        /// Its id.
        id: String,
        /// What is the matter.
        why: Refusal,
    },
    /// The subject is captured elsewhere, too, or instead: another stream answers.
    Elsewhere {
        /// The stream that captures the subject for all that the JetStream API reports.
        stream: String,
        /// The stream that has answered, and its domain, if that is another.
        answered: String,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::ByStream(error) => write!(f, "the stream will never take it: {error}"),
            Refusal::ByServer(words) => write!(f, "the server will never take it: {words}"),
            Refusal::Unknown(error) => write!(f, "the stream refuses it each time: {error}"),
            Refusal::Silence => {
                f.write_str("the server closes the connection at it each time, without a word")
            }
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Refused(error) => write!(f, "JetStream refused an event: {error}"),
            Cause::OtherAnswer { seq } => write!(
                f,
                "JetStream acknowledged an event at sequence {seq}, which is not its own"
            ),
            Cause::AckTimeout => {
                f.write_str(
                    "JetStream has acknowledged nothing for the ack timeout: the stream has no leader, or the store cannot write (a full \
                     disk: restart nats-server once there is room), which it logs, and from 2.14 on does not answer",
                )
            }
            Cause::NoStream(subject) => write!(f, "no stream captures {subject}"),
            Cause::Elsewhere { stream, answered } => write!(
                f,
                "another stream answers than {stream} ({answered}): where the subjects lead is read again"
            ),
            Cause::Lags(stream) => write!(
                f,
                "stream {stream} has not stored yet what it took before: its replicas are behind"
            ),
            Cause::Disagrees(stream) => write!(
                f,
                "stream {stream} ends before what it had acknowledged, or was created again"
            ),
        }
    }
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Halt::OtherId {
                stream,
                position,
                id,
            } => write!(
                f,
                "resume stream {stream}: at position {position} it has another event than Postgres, which has {id} there; {RESTORED}"
            ),
            Halt::NotSent { stream, found } => write!(
                f,
                "resume stream {stream}: it has an event at position {}, sequence {}, that Postgres did not send; {RESTORED}",
                found.position, found.seq
            ),
            Halt::Discontinuous(broken) => write!(f, "check the WAL: {broken}; {RESTORED}"),
            Halt::Closed { stream, error } => write!(
                f,
                "publish to stream {stream}: it takes no event: {error}: give the subjects to a stream that does, then start the \
                 relay again"
            ),
            Halt::EachRefused {
                stream,
                position,
                id,
                why,
            } => write!(
                f,
                "publish the event {id} at {position} to stream {stream}: {why}; it was the same with the event before, so it is \
                 not put aside as well: look at the stream and at the log of nats-server, then start the relay again"
            ),
            Halt::Elsewhere { stream, answered } => write!(
                f,
                "publish to stream {stream}: another stream answers ({answered}): a leaf node, an import or a mapping takes the subject \
                 elsewhere, or it is captured twice; nothing is confirmed on such an answer: see to it that each subject leads to one \
                 stream, and that -nats-api-prefix names its domain"
            ),
        }
    }
}

/// What an operator does about a WAL that is not the one that the streams were written from.
const RESTORED: &str = "this is not the WAL that the streams were written from: Postgres was restored from a snapshot or a backup, or another \
    clone was promoted; connect to the server that the events came from, or, if this one replaces it, pass -resume-anyway once: \
    what the slot sends is then published after what is there, and only what the streams have at the same position with the same id is left out";

impl fmt::Display for continuity::Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use continuity::Broken;
        match self {
            Broken::OtherTransaction(anchor) => write!(
                f,
                "another transaction is at the place of the last resolved event ({anchor})"
            ),
            Broken::OtherEvent { anchor, id } => write!(
                f,
                "another event ({id}) is at the place of the last resolved one ({anchor})"
            ),
            Broken::TooShort(anchor) => write!(
                f,
                "the transaction of the last resolved event ({anchor}) has fewer events than it had"
            ),
            Broken::NotEmpty {
                anchor,
                position,
                stored_lsn,
            } => write!(
                f,
                "Postgres sends an event at {position}, and there was none between the last resolved one ({anchor}) and {stored_lsn}"
            ),
            Broken::NotThere { anchor, at } => write!(
                f,
                "Postgres is at {at} and has not sent the last resolved event ({anchor})"
            ),
            Broken::EndsBeforeStored {
                wal_end,
                stored_lsn,
            } => write!(
                f,
                "the WAL ends at {wal_end}, and was read and stored up to {stored_lsn}"
            ),
            Broken::WalEndsBefore { anchor, wal_end } => write!(
                f,
                "the WAL ends at {wal_end}, before the last resolved event ({anchor})"
            ),
        }
    }
}
