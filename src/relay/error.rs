//! What ends a session, whether another may follow, and what a person reads.

use super::core::{Backwards, Cause, Halt, Trouble};
use crate::exit::Exit;
use crate::jetstream;
use crate::jetstream::ack::AckError;
use crate::jetstream::chain::Broken;
use crate::jetstream::resume::Conflict;
use crate::outbox::mapper::MapError;
use crate::postgres;
use crate::postgres::Lsn;
use crate::postgres::pgoutput::DecodeError;
use std::fmt;

/// A session's end that was not asked for.
#[derive(Debug)]
pub enum Error {
    /// The Postgres side.
    Postgres(postgres::Error),
    /// The NATS side.
    Nats(jetstream::Error),
    /// No stream captures the prefix, or what was to be published.
    NoStream(String),
    /// Another process holds the slot.
    SlotInUse {
        /// Its name.
        slot: String,
        /// The server process that serves the other one.
        pid: Option<i32>,
    },
    /// Slot, publication or server are not as the relay needs them: what is wrong, and what to do.
    Setup(String),
    /// Postgres 18 says only in a notice that the publication is missing, and leaves its rows out.
    PublicationSkipped(String),
    /// pgoutput sent what cannot be read.
    Decode {
        /// Why.
        error: DecodeError,
        /// The message's LSN.
        at: Lsn,
    },
    /// pgoutput sent a message where it cannot stand.
    OutOfPlace {
        /// Its name.
        message: &'static str,
        /// Its LSN.
        at: Lsn,
    },
    /// A row cannot become an event.
    Map(MapError),
    /// An event is larger than the server accepts.
    TooLarge {
        /// Table, id and position.
        event: String,
        /// Its size in bytes.
        size: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A stream will never take the event.
    Refused {
        /// Table, id and position.
        event: String,
        /// What it says.
        error: AckError,
    },
    /// No working session to NATS for `--max-outage`; the last reason.
    GaveUp(String),
    /// A stream lost what it had acknowledged; the slot still has it.
    Backwards(Backwards),
    /// A stream was written from another history of Postgres.
    Conflict {
        /// Its name.
        stream: String,
        /// How.
        conflict: Conflict,
    },
    /// It cannot be repaired.
    Halt(Halt),
    /// Postgres shuts down.
    ServerShutsDown,
    /// Postgres ended the copy stream.
    EndedByServer,
    /// A defect of this program.
    Internal(&'static str),
}

/// What follows a session's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Another session, after a pause.
    Retry,
    /// Another session once the slot is free.
    WaitForSlot,
    /// Nothing: it needs a person.
    Exit(Exit),
}

impl Error {
    /// The one place that decides whether another try can help.
    pub fn verdict(&self) -> Verdict {
        match self {
            Error::SlotInUse { .. } => Verdict::WaitForSlot,
            Error::Postgres(error) => match (error.sqlstate(), error) {
                // invalid authorization or password, no such database, no privilege, no such object,
                // object not in the state (slot lost, wal_level too low), feature not supported
                (
                    Some(
                        "28000" | "28P01" | "3D000" | "42501" | "42704" | "55000" | "0A000"
                        | "42601",
                    ),
                    _,
                ) => Verdict::Exit(Exit::Configuration),
                (None, postgres::Error::Auth(_)) => Verdict::Exit(Exit::Configuration),
                (None, postgres::Error::Protocol(_)) => Verdict::Exit(Exit::Internal),
                _ => Verdict::Retry,
            },
            Error::Nats(_) | Error::NoStream(_) => Verdict::Retry,
            Error::Backwards(_) | Error::ServerShutsDown | Error::EndedByServer => Verdict::Retry,
            Error::Setup(_) | Error::PublicationSkipped(_) | Error::Conflict { .. } => {
                Verdict::Exit(Exit::Configuration)
            }
            Error::GaveUp(_) => Verdict::Exit(Exit::Unavailable),
            Error::Map(_) | Error::TooLarge { .. } | Error::Refused { .. } | Error::Halt(_) => {
                Verdict::Exit(Exit::Data)
            }
            Error::Decode { .. } | Error::OutOfPlace { .. } | Error::Internal(_) => {
                Verdict::Exit(Exit::Internal)
            }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Postgres(error) => write!(f, "{error}{}", remedy(error)),
            Error::Nats(error) => write!(f, "{error}"),
            Error::NoStream(subject) => write!(
                f,
                "find the stream of {subject}: no stream captures it; create one with this subject (nats stream add --subjects), \
                 the relay goes on by itself"
            ),
            Error::SlotInUse { slot, pid } => {
                write!(f, "start replication: slot {slot} is in use")?;
                if let Some(pid) = pid {
                    write!(
                        f,
                        " by the server process {pid} (pg_stat_activity tells whose)"
                    )?;
                }
                Ok(())
            }
            Error::Setup(what) => f.write_str(what),
            Error::PublicationSkipped(notice) => write!(
                f,
                "read the replication stream: Postgres leaves the publication's rows out ({notice}); nothing of it is confirmed: \
                 create the publication, or name the right one with -publication"
            ),
            Error::Decode { error, at } => {
                write!(f, "decode the pgoutput message at {at}: {error}")
            }
            Error::OutOfPlace { message, at } => {
                write!(
                    f,
                    "read the replication stream: a {message} message at {at} outside of a transaction"
                )
            }
            Error::Map(error) => write!(f, "{error}"),
            Error::TooLarge { event, size, limit } => write!(
                f,
                "publish {event}: {size} bytes are more than the {limit} that NATS accepts; nothing from it on is confirmed: \
                 raise max_payload of the server (and max_msg_size of the stream), then start the relay again, or park such events \
                 with --on-poison"
            ),
            Error::Refused { event, error } => write!(
                f,
                "publish {event}: the stream will never take it: {error}; nothing from it on is confirmed: raise the stream's \
                 limit, then start the relay again, or park such events with --on-poison"
            ),
            Error::GaveUp(reason) => write!(
                f,
                "connect to NATS: no working session for --max-outage: {reason}"
            ),
            Error::Backwards(b) => write!(
                f,
                "read the stream back: {b}; what it lost is published again from the slot"
            ),
            Error::Conflict {
                stream,
                conflict: Conflict::OtherSystem(tail),
            } => write!(
                f,
                "resume stream {stream}: its last event ({tail}) was written from another Postgres system; if this database \
                 replaces that one, pass --accept-new-system once: what this slot sends is then published after it"
            ),
            Error::Conflict {
                stream,
                conflict: Conflict::OtherTimeline(tail),
            } => write!(
                f,
                "resume stream {stream}: its last event ({tail}) was written on a timeline that is not in this server's history; \
                 connect to the server that was promoted, this one is behind or abandoned"
            ),
            Error::Halt(Halt::IdMismatch {
                stream,
                position,
                id,
                stored_id,
            }) => write!(
                f,
                "resume stream {stream}: at position {position} it has the event {stored_id}, Postgres has {id}; the two do not \
                 belong together: check -db, -slot and the stream"
            ),
            Error::Halt(Halt::Recreated { stream }) => write!(
                f,
                "resume stream {stream}: it was deleted and made anew since events were stored in it; what it held can be published \
                 again only as far as the slot has it: restore it from a backup, or accept the gap and pass --resume-anyway once"
            ),
            Error::Halt(Halt::LostBeyondSlot(b)) => write!(
                f,
                "read the stream back: {b}, and the slot has been told to forget events up to later than that; restore the \
                 stream from a newer backup, or accept the gap and pass --resume-anyway once"
            ),
            Error::ServerShutsDown => f.write_str("Postgres shuts down"),
            Error::EndedByServer => f.write_str("Postgres ended the replication stream"),
            Error::Internal(what) => write!(f, "internal error: {what}; please report it"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Postgres(error) => Some(error),
            Error::Nats(error) => Some(error),
            Error::Decode { error, .. } => Some(error),
            Error::Map(error) => Some(error),
            _ => None,
        }
    }
}

/// What to do about an error of Postgres that ends the relay.
fn remedy(error: &postgres::Error) -> &'static str {
    match error.sqlstate() {
        Some("28P01") => "; check the password of -db (or PGPASSWORD, ~/.pgpass)",
        Some("28000") => "; check pg_hba.conf: the relay connects with replication=database",
        Some("3D000") => "; check the database name of -db",
        Some("42501") => "; the role needs REPLICATION (ALTER ROLE … REPLICATION)",
        _ => "",
    }
}

impl fmt::Display for Backwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Backwards {
            stream,
            last_seq,
            acked_seq,
        } = self;
        write!(
            f,
            "stream {stream} ends at sequence {last_seq}, but had acknowledged {acked_seq}"
        )
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Broken(Broken::OtherSequence { predicted, seq }) => {
                write!(
                    f,
                    "JetStream stored an event at sequence {seq} instead of {predicted}"
                )
            }
            Cause::Broken(Broken::Duplicate { seq }) => {
                write!(
                    f,
                    "JetStream takes an event for a duplicate of sequence {seq}"
                )
            }
            Cause::Refused(error) => write!(f, "JetStream refused an event: {error}"),
            Cause::AckTimeout => {
                f.write_str("JetStream has acknowledged nothing for the ack timeout")
            }
            Cause::NoStream(subject) => write!(f, "no stream captures {subject}"),
            Cause::EndsEarly(backwards) => write!(f, "{backwards}"),
        }
    }
}

impl From<postgres::Error> for Error {
    fn from(error: postgres::Error) -> Error {
        match error.sqlstate() {
            Some("55006") => Error::SlotInUse {
                slot: String::new(),
                pid: None,
            },
            _ => Error::Postgres(error),
        }
    }
}

impl From<Trouble> for Error {
    /// Trouble at connect: there is no window yet that a reconnect could save.
    fn from(trouble: Trouble) -> Error {
        match trouble {
            Trouble::Backwards(backwards) => Error::Backwards(backwards),
            Trouble::Halt(halt) => Error::Halt(halt),
            Trouble::Reconnect(_) => {
                Error::Internal("a new connection was found broken before it was used")
            }
        }
    }
}

impl From<jetstream::Error> for Error {
    fn from(error: jetstream::Error) -> Error {
        Error::Nats(error)
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Error {
        Error::Map(error)
    }
}
