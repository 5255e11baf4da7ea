//! What ends a session, whether another may follow, and what a person reads.

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
use crate::postgres::connection::quote_literal;
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

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Postgres(error) => write!(f, "{error}{}", remedy(error)),
            Error::Nats(error) => write!(f, "{error}"),
            Error::ReadBack(error) => {
                write!(f, "read the streams back: {}", error.while_reading())
            }
            Error::NoStream(subject) => write!(
                f,
                "find the stream of {subject}: no stream captures it; create one (jetstream-outbox setup, with the relay's flags), \
                 the relay goes on by itself"
            ),
            Error::NoCheckpoint { bucket, reason } => write!(
                f,
                "use the checkpoint: the key-value bucket {bucket} cannot be used: {reason}; exactly-once delivery needs it: allow the user what \
                 `jetstream-outbox setup -print-nats` lists, or create the bucket, or pass -delivery at-least-once"
            ),
            Error::NoRoom { bucket, refused } => write!(
                f,
                "write the checkpoint: the key-value bucket {bucket} has no room for the record: {refused}: raise its limits (nats stream edit \
                 KV_{bucket} --max-bytes=16MB, --max-msgs=-1), or make room on the server or in the account; the relay goes on by itself"
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
            Error::SlotMoved {
                slot,
                confirmed,
                told,
            } => write!(
                f,
                "check the slot: {slot} is at {confirmed}, but this relay has confirmed {told} at most: the slot was dropped and \
                 re-created, or moved by somebody else (another program, pg_replication_slot_advance), or the checkpoint is an old \
                 copy; what was committed between the two may be missing in the stream and must be published by hand; then \
                 pass -resume-anyway once"
            ),
            Error::OtherFlags { after, may_go_back } => write!(
                f,
                "resume: another -publication or -no-messages has Postgres send other rows than it sent for what is stored after {after}, \
                 so that the two cannot be compared; {}pass -resume-anyway once, which publishes what the slot still has, again too",
                match may_go_back {
                    true => "start once with the earlier flags and stop in order (-drain does); or ",
                    false => "",
                }
            ),
            Error::Unfenced { stream, at, stored } => write!(
                f,
                "read the stream back: {stream} has events up to {at} without a fence, as -delivery at-least-once or a promoted mirror has them: after \
                 {stored} an event may be missing that exactly-once would take for stored; run once with \
                 -delivery at-least-once -drain until that ends with 0 (within the stream's deduplication window nothing comes \
                 twice), then start the relay again; where none is missing, pass -resume-anyway once"
            ),
            Error::Preflight(findings) => {
                f.write_str("check Postgres: ")?;
                for (index, finding) in findings.iter().enumerate() {
                    let separator = if index == 0 { "" } else { "; also: " };
                    write!(f, "{separator}{}", finding.sentence())?;
                }
                Ok(())
            }
            Error::Setup(what) => f.write_str(what),
            Error::PublicationSkipped { notice, slot } => write!(
                f,
                "read the replication stream: Postgres leaves the publication's rows out ({notice}); nothing of it is confirmed. \
                 Name the right publication with -publication; or, if this one was dropped for a while, make it anew, publish by \
                 hand what the stream lacks, and move the slot past that time: \
                 SELECT pg_replication_slot_advance({}, pg_current_wal_lsn()); and then pass -resume-anyway once",
                quote_literal(slot)
            ),
            Error::Decode { error, at } => {
                write!(f, "decode the pgoutput message at {at}: {error}")
            }
            Error::OutOfPlace { message, at } => {
                write!(
                    f,
                    "read the replication stream: a {message} message at {at}, where none can be: see what stands between the \
                     relay and Postgres"
                )
            }
            Error::OutOfOrder(position) => write!(
                f,
                "read the replication stream: the event at {position} comes after a later one, which Postgres never sends"
            ),
            Error::Undecodable(undecodable) => write!(f, "{undecodable}"),
            Error::Map { error, slot } => {
                write!(f, "{error}")?;
                if let Some(behind) = error.behind() {
                    if matches!(**error, MapError::Value { .. }) {
                        f.write_str(
                            "; park such events (-on-poison park, also for setup, which gives them a stream)",
                        )?;
                    }
                    write!(
                        f,
                        "; or publish this transaction's events otherwise, then move the slot \
                         past it: SELECT pg_replication_slot_advance({}, '{behind}'); and then pass -resume-anyway once",
                        quote_literal(slot)
                    )?;
                }
                Ok(())
            }
            Error::TooLarge {
                event,
                too_large:
                    TooLarge {
                        size,
                        limit,
                        setting,
                    },
            } => write!(
                f,
                "publish {event}: {size} bytes are more than the {limit} that NATS accepts; nothing from it on is confirmed: \
                 raise {setting}, then start the relay again, or park such events (-on-poison park, also for setup, which gives \
                 them a stream)"
            ),
            Error::Refused { event, why } => write!(
                f,
                "publish {event}: {why}; nothing from it on is confirmed: have the stream or the server take it (a limit, a \
                 permission, a feature of the stream), then start the relay again, or park such events (-on-poison park, also \
                 for setup, which gives them a stream)"
            ),
            Error::GaveUp(reason) => write!(
                f,
                "no working session for -max-outage: {reason}; nothing is lost, start the relay again when that is mended"
            ),
            Error::Regressed(lost) => write!(
                f,
                "read the stream back: {lost}; what it lost is published again from the slot"
            ),
            Error::Lost(lost) => write!(
                f,
                "read the stream back: {lost}, and Postgres has been told to forget events up to later than that: restore the \
                 stream from a newer backup, or accept the gap and pass -resume-anyway once"
            ),
            Error::Conflict {
                of,
                conflict: Conflict::OtherSystem(at),
            } => write!(
                f,
                "resume {of}: its last event ({at}) was written from another Postgres system; if this database \
                 replaces that one (pg_upgrade, a restored dump), pass -accept-new-system once: what this slot sends is then \
                 published after it"
            ),
            Error::Conflict {
                of,
                conflict: Conflict::OtherTimeline(at),
            } => write!(
                f,
                "resume {of}: its last event ({at}) was written on a timeline that is not in this server's history; \
                 connect to the server that was promoted, this one is behind or abandoned"
            ),
            Error::Halt(halt) => write!(f, "{halt}"),
            Error::Overtaken => f.write_str(
                "read the checkpoint: another relay with this slot's name has written it; looking again who has the slot",
            ),
            Error::Stopped => f.write_str("the relay is to stop"),
            Error::ServerShutsDown => f.write_str("Postgres shuts down"),
            Error::EndedByServer => f.write_str("Postgres ended the replication stream"),
            Error::Internal(what) => write!(f, "internal error: {what}; please report it"),
        }
    }
}

impl fmt::Display for Undecodable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Undecodable {
            error,
            at,
            commit_lsn,
            reached,
            is_for_good,
            slot,
        } = self;
        let place = commit_lsn.or(at.filter(|_| error.is_of_message()));
        match (commit_lsn, at) {
            (Some(commit_lsn), _) => write!(
                f,
                "decode the transaction that was committed at {commit_lsn}"
            ),
            (None, Some(at)) => write!(f, "decode the WAL at {at}"),
            (None, None) => write!(f, "decode the WAL after {reached}"),
        }?;
        write!(f, ": Postgres cannot: {error}")?;
        if !is_for_good {
            return Ok(());
        }
        f.write_str("; nothing from there on is confirmed, and it will be the same each time: publish this transaction's events otherwise, ")?;
        let advance = format!(
            "SELECT pg_replication_slot_advance({}, ",
            quote_literal(slot)
        );
        match place {
            // what begins before the slot's position is skipped
            Some(place) => write!(
                f,
                "then move the slot past it: {advance}'{}')",
                Lsn(place.0.saturating_add(1))
            ),
            None => write!(
                f,
                "then move the slot past its commit, which pg_waldump shows: {advance}'<its LSN>'). Where the WAL itself is damaged \
                 that fails as well: then drop the slot and create it again"
            ),
        }?;
        f.write_str("; and then pass -resume-anyway once")
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

/// What to do about an error of Postgres that ends the relay, where the error itself does not say it.
fn remedy(error: &postgres::Error) -> String {
    let remedy = match error.sqlstate() {
        Some("28000") => Some(
            "check the user of -db, and pg_hba.conf: for the relay the lines of the database count, not those of replication",
        ),
        Some("42501") => Some(
            "the role needs REPLICATION (ALTER ROLE … REPLICATION), and CONNECT on the database",
        ),
        _ => error.remedy(),
    };
    remedy.map_or_else(String::new, |remedy| format!("; {remedy}"))
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
