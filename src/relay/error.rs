//! What ends a session, and whether another may follow. What a person reads of it is in `words`.

mod words;

use super::core::capacity::TooLarge;
use super::core::resume::Lost;
use super::core::trouble::{Halt, Refusal};
use super::preflight::Finding;
use crate::exit::Exit;
use crate::jetstream;
use crate::jetstream::ack::ApiError;
use crate::nats;
use crate::outbox::lineage::Conflict;
use crate::outbox::position::Position;
use crate::outbox::problem::MapError;
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
    /// The streams could not be read back.
    ReadBack(jetstream::Error),
    /// No stream captures the prefix, or what was to be published.
    NoStream(String),
    /// The checkpoint cannot be used, and exactly-once needs it.
    NoCheckpoint {
        /// The bucket.
        bucket: String,
        /// Why.
        reason: String,
    },
    /// The checkpoint has no room for the record.
    NoRoom {
        /// The bucket.
        bucket: String,
        /// What JetStream says.
        refused: ApiError,
    },
    /// Another process holds the slot.
    SlotInUse {
        /// Its name.
        slot: String,
        /// The server process that serves the other one.
        pid: Option<i32>,
    },
    /// The slot was moved or made anew by somebody else.
    SlotMoved {
        /// Its name.
        slot: String,
        /// Where it stands.
        confirmed: Lsn,
        /// What the relay may have told Postgres at most.
        told: Lsn,
    },
    /// Postgres sends other rows than it did for what is stored after this.
    OtherFlags {
        /// The anchor.
        after: Position,
        /// Starting with the earlier flags helps: there were no others before these.
        may_go_back: bool,
    },
    /// Server, slot or publication are not as the relay needs them: the rules that failed.
    Preflight(Vec<Finding>),
    /// A stream is not as the relay needs it, or the publication: what is wrong, and what to do.
    Setup(String),
    /// What Postgres says of the log that comes next: the publication was missing when it was written.
    PublicationSkipped {
        /// Its words.
        notice: String,
        /// The slot; empty until it is known.
        slot: String,
    },
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
    /// Postgres sent an event at this position after a later one.
    OutOfOrder(Position),
    /// Postgres cannot decode what is in its WAL.
    Undecodable(Box<Undecodable>),
    /// A row cannot become an event.
    Map {
        /// Why.
        error: Box<MapError>,
        /// The slot that it came from; empty until it is known.
        slot: String,
    },
    /// An event is larger than the server accepts.
    TooLarge {
        /// Table, id and position.
        event: String,
        /// How large it is.
        too_large: TooLarge,
    },
    /// An event can never be published as it is.
    Refused {
        /// Table, id and position.
        event: String,
        /// Why.
        why: Refusal,
    },
    /// No working session for `-max-outage`; the last reason.
    GaveUp(String),
    /// A stream lost what it had acknowledged; the slot still has it.
    Regressed(Lost),
    /// The same, and Postgres was told of it.
    Lost(Lost),
    /// A stream, or the checkpoint, was written from another history of Postgres.
    Conflict {
        /// Which it is.
        of: String,
        /// How.
        conflict: Conflict,
    },
    /// A stream has events without a fence that are not known to be complete.
    Unfenced {
        /// Its name.
        stream: String,
        /// The last of them.
        at: Position,
        /// All before this is known to be stored.
        stored: Position,
    },
    /// It cannot be repaired.
    Halt(Halt),
    /// The relay is to stop.
    Stopped,
    /// Postgres shuts down.
    ServerShutsDown,
    /// Postgres ended the copy stream.
    EndedByServer,
    /// A defect of this program.
    Internal(&'static str),
    /// Another relay has written the checkpoint meanwhile.
    Overtaken,
}

/// What Postgres cannot decode, and where it is.
#[derive(Debug)]
pub struct Undecodable {
    /// What it says.
    pub error: postgres::Error,
    /// Where the change is that it was at, if it says so.
    pub at: Option<Lsn>,
    /// The commit of the transaction that it was sending.
    pub commit_lsn: Option<Lsn>,
    /// Everything up to here had arrived.
    pub reached: Lsn,
    /// No other session can pass it either.
    pub is_for_good: bool,
    /// The slot that it came from; empty until it is known.
    pub slot: String,
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
    /// With what Postgres says of it, before the slot is known.
    pub fn publication_skipped(notice: &impl fmt::Display) -> Error {
        Error::PublicationSkipped {
            notice: notice.to_string(),
            slot: String::new(),
        }
    }

    /// The same, knowing the slot that is to be moved.
    pub fn of_slot(mut self, name: String) -> Error {
        match &mut self {
            Error::Map { slot, .. } | Error::PublicationSkipped { slot, .. } => *slot = name,
            Error::Undecodable(undecodable) => undecodable.slot = name,
            _ => {}
        }
        self
    }

    /// The one place that decides whether another try can help.
    pub fn verdict(&self) -> Verdict {
        match self {
            Error::SlotInUse { .. } => Verdict::WaitForSlot,
            Error::Postgres(postgres::Error::Protocol(_)) => Verdict::Exit(Exit::Internal),
            Error::Postgres(error) if error.is_lasting() => Verdict::Exit(Exit::Configuration),
            Error::Postgres(_) => Verdict::Retry,
            Error::Nats(_) | Error::ReadBack(_) | Error::NoStream(_) => Verdict::Retry,
            Error::Regressed(_)
            | Error::NoRoom { .. }
            | Error::Overtaken
            | Error::Stopped
            | Error::ServerShutsDown
            | Error::EndedByServer => Verdict::Retry,
            Error::Preflight(_)
            | Error::Setup(_)
            | Error::SlotMoved { .. }
            | Error::OtherFlags { .. }
            | Error::Halt(Halt::Closed { .. })
            | Error::NoCheckpoint { .. }
            | Error::Unfenced { .. }
            | Error::PublicationSkipped { .. }
            | Error::Conflict { .. } => Verdict::Exit(Exit::Configuration),
            Error::GaveUp(_) => Verdict::Exit(Exit::Unavailable),
            Error::Undecodable(undecodable) => match undecodable.is_for_good {
                true => Verdict::Exit(Exit::Data),
                false => Verdict::Retry,
            },
            Error::Map { .. }
            | Error::TooLarge { .. }
            | Error::Refused { .. }
            | Error::Halt(_)
            | Error::Lost(_) => Verdict::Exit(Exit::Data),
            Error::Decode { .. }
            | Error::OutOfPlace { .. }
            | Error::OutOfOrder(_)
            | Error::Internal(_) => Verdict::Exit(Exit::Internal),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Postgres(error) => Some(error),
            Error::Undecodable(undecodable) => Some(&undecodable.error),
            Error::Nats(error) => Some(error),
            Error::ReadBack(error) => Some(error),
            Error::Decode { error, .. } => Some(error),
            Error::Map { error, .. } => Some(error),
            _ => None,
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

impl From<nats::Error> for Error {
    fn from(error: nats::Error) -> Error {
        Error::Nats(error.into())
    }
}

impl From<jetstream::Error> for Error {
    fn from(error: jetstream::Error) -> Error {
        Error::Nats(error)
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Error {
        Error::Map {
            error: Box::new(error),
            slot: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::error::{AuthError, ServerError};
    use std::io;

    fn refused() -> postgres::Error {
        postgres::Error::Io {
            doing: "open the connection",
            source: io::ErrorKind::ConnectionRefused.into(),
        }
    }

    fn server(code: &str) -> postgres::Error {
        postgres::Error::Server(Box::new(ServerError {
            code: code.to_string(),
            ..ServerError::default()
        }))
    }

    fn tls(lasting: bool) -> postgres::Error {
        postgres::Error::Tls {
            doing: "agree on TLS".into(),
            source: "because".into(),
            lasting,
        }
    }

    fn no_password() -> postgres::Error {
        postgres::Error::Auth(AuthError::NoPassword)
    }

    #[test]
    fn only_what_no_host_can_mend_ends_the_relay() {
        let garbage = || postgres::Error::Protocol("garbage".into());
        for (hosts, ends) in [
            (vec![no_password()], true),
            (vec![tls(true)], true),
            (vec![server("28P01")], true),
            (vec![tls(false)], false),
            (vec![refused()], false),
            (vec![server("57P03")], false),
            // a proxy without a server behind it says anything
            (vec![garbage()], false),
            (vec![refused(), no_password()], false),
            (vec![tls(true), refused()], false),
            (vec![tls(true), server("28P01")], true),
            (vec![], false),
        ] {
            let hosts = hosts.into_iter().map(|error| ("h:1".to_string(), error));
            let error = Error::Postgres(postgres::Error::Connect(hosts.collect()));
            let expected = match ends {
                true => Verdict::Exit(Exit::Configuration),
                false => Verdict::Retry,
            };
            assert_eq!(error.verdict(), expected, "{error}");
        }
    }
}
