//! What a person reads of what ended a session: in the order of the variants, the long ones each in a function below.

use super::{Error, Undecodable};
use crate::jetstream::ack::ApiError;
use crate::outbox::lineage::Conflict;
use crate::outbox::position::Position;
use crate::outbox::problem::MapError;
use crate::postgres;
use crate::postgres::Lsn;
use crate::postgres::connection::quote_literal;
use crate::relay::core::capacity::TooLarge;
use crate::relay::core::resume::Lost;
use crate::relay::core::trouble::Refusal;
use crate::relay::preflight::Finding;
use std::fmt::{Display, Formatter, Result};

/// The way past an event that no stream can have.
const PARK: &str = "park such events (-on-poison park, also for setup, which gives them a stream)";
/// The relay does not know any more what is stored up to where.
const ACCEPT: &str = "pass -resume-anyway once";

impl Display for Error {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Error::Postgres(error) => write!(f, "{error}{}", remedy(error)),
            Error::Nats(error) => write!(f, "{error}"),
            Error::ReadBack(error) => write!(f, "read the streams back: {}", error.while_reading()),
            Error::NoStream(subject) => no_stream(f, subject),
            Error::NoCheckpoint { bucket, reason } => no_checkpoint(f, bucket, reason),
            Error::NoRoom { bucket, refused } => no_room(f, bucket, refused),
            Error::SlotInUse { slot, pid } => slot_in_use(f, slot, *pid),
            Error::SlotMoved { slot, confirmed, told } => slot_moved(f, slot, *confirmed, *told),
            Error::OtherFlags { after, may_go_back } => other_flags(f, after, *may_go_back),
            Error::Preflight(findings) => preflight(f, findings),
            Error::Setup(what) => f.write_str(what),
            Error::PublicationSkipped { notice, slot } => publication_skipped(f, notice, slot),
            Error::Decode { error, at } => write!(f, "decode the pgoutput message at {at}: {error}"),
            Error::OutOfPlace { message, at } => out_of_place(f, message, *at),
            Error::OutOfOrder(position) => out_of_order(f, position),
            Error::Undecodable(undecodable) => undecodable.fmt(f),
            Error::Map { error, slot } => map(f, error, slot),
            Error::TooLarge { event, too_large } => too_large_to_publish(f, event, too_large),
            Error::Refused { event, why } => refused(f, event, why),
            Error::GaveUp(reason) => gave_up(f, reason),
            Error::Regressed(lost) => regressed(f, lost),
            Error::Lost(lost) => lost_and_told(f, lost),
            Error::Conflict { of, conflict } => conflict_of(f, of, conflict),
            Error::Unfenced { stream, at, stored } => unfenced(f, stream, at, stored),
            Error::Halt(halt) => write!(f, "{halt}"),
            Error::Stopped => f.write_str("the relay is to stop"),
            Error::ServerShutsDown => f.write_str("Postgres shuts down"),
            Error::EndedByServer => f.write_str("Postgres ended the replication stream"),
            Error::Internal(what) => write!(f, "internal error: {what}; please report it"),
            Error::Overtaken => f.write_str(
                "read the checkpoint: another relay with this slot's name has written it; looking again who has the slot",
            ),
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

fn no_stream(f: &mut Formatter<'_>, subject: &str) -> Result {
    write!(
        f,
        "find the stream of {subject}: no stream captures it; create one (jetstream-outbox setup, with the relay's flags), \
         the relay goes on by itself"
    )
}

fn no_checkpoint(f: &mut Formatter<'_>, bucket: &str, reason: &str) -> Result {
    write!(
        f,
        "use the checkpoint: the key-value bucket {bucket} cannot be used: {reason}; exactly-once delivery needs it: allow the user what \
         `jetstream-outbox setup -print-nats` lists, or create the bucket, or pass -delivery at-least-once"
    )
}

fn no_room(f: &mut Formatter<'_>, bucket: &str, refused: &ApiError) -> Result {
    write!(
        f,
        "write the checkpoint: the key-value bucket {bucket} has no room for the record: {refused}: raise its limits (nats stream edit \
         KV_{bucket}, with a larger --max-bytes, and --max-msgs=-1), or make room on the server or in the account; the relay goes on by itself"
    )
}

fn slot_in_use(f: &mut Formatter<'_>, slot: &str, pid: Option<i32>) -> Result {
    write!(f, "start replication: slot {slot} is in use")?;
    match pid {
        Some(pid) => write!(
            f,
            " by the server process {pid} (pg_stat_activity tells whose)"
        ),
        None => Ok(()),
    }
}

fn slot_moved(f: &mut Formatter<'_>, slot: &str, confirmed: Lsn, told: Lsn) -> Result {
    write!(
        f,
        "check the slot: {slot} is at {confirmed}, but this relay has confirmed {told} at most: the slot was dropped and \
         re-created, or moved by somebody else (another program, pg_replication_slot_advance), or the checkpoint is an old \
         copy; what was committed between the two may be missing in the stream and must be published by hand; then {ACCEPT}"
    )
}

fn other_flags(f: &mut Formatter<'_>, after: &Position, may_go_back: bool) -> Result {
    let go_back = match may_go_back {
        true => "start once with the earlier flags and stop in order (-drain does); or ",
        false => "",
    };
    write!(
        f,
        "resume: another -publication or -no-messages has Postgres send other rows than it sent for what is stored after {after}, \
         so that the two cannot be compared; {go_back}{ACCEPT}, which publishes what the slot still has, again too"
    )
}

fn preflight(f: &mut Formatter<'_>, findings: &[Finding]) -> Result {
    f.write_str("check Postgres: ")?;
    for (index, finding) in findings.iter().enumerate() {
        let separator = if index == 0 { "" } else { "; also: " };
        write!(f, "{separator}{}", finding.sentence())?;
    }
    Ok(())
}

fn publication_skipped(f: &mut Formatter<'_>, notice: &str, slot: &str) -> Result {
    let advance = advance(slot, "pg_current_wal_lsn()");
    write!(
        f,
        "read the replication stream: Postgres leaves the publication's rows out ({notice}); nothing of it is confirmed. \
         Name the right publication with -publication; or, if this one was dropped for a while, make it anew, publish by \
         hand what the stream lacks, and move the slot past that time: {advance}; and then {ACCEPT}"
    )
}

fn out_of_place(f: &mut Formatter<'_>, message: &str, at: Lsn) -> Result {
    write!(
        f,
        "read the replication stream: a {message} message at {at}, where none can be: see what stands between the relay and Postgres"
    )
}

fn out_of_order(f: &mut Formatter<'_>, position: &Position) -> Result {
    write!(
        f,
        "read the replication stream: the event at {position} comes after a later one, which Postgres never sends"
    )
}

fn map(f: &mut Formatter<'_>, error: &MapError, slot: &str) -> Result {
    write!(f, "{error}")?;
    let Some(behind) = error.behind() else {
        return Ok(());
    };
    if matches!(error, MapError::Value { .. }) {
        write!(f, "; {PARK}")?;
    }
    let advance = advance(slot, &format!("'{behind}'"));
    write!(
        f,
        "; or publish this transaction's events otherwise, then move the slot past it: {advance}; and then {ACCEPT}"
    )
}

fn too_large_to_publish(f: &mut Formatter<'_>, event: &str, found: &TooLarge) -> Result {
    let TooLarge {
        size,
        limit,
        setting,
    } = found;
    write!(
        f,
        "publish {event}: {size} bytes are more than the {limit} that NATS accepts; nothing from it on is confirmed: \
         raise {setting}, then start the relay again, or {PARK}"
    )
}

fn refused(f: &mut Formatter<'_>, event: &str, why: &Refusal) -> Result {
    write!(
        f,
        "publish {event}: {why}; nothing from it on is confirmed: have the stream or the server take it (a limit, a \
         permission, a feature of the stream), then start the relay again, or {PARK}"
    )
}

fn gave_up(f: &mut Formatter<'_>, reason: &str) -> Result {
    write!(
        f,
        "no working session for -max-outage: {reason}; nothing is lost, start the relay again when that is mended"
    )
}

fn regressed(f: &mut Formatter<'_>, lost: &Lost) -> Result {
    write!(
        f,
        "read the stream back: {lost}; what it lost is published again from the slot"
    )
}

fn lost_and_told(f: &mut Formatter<'_>, lost: &Lost) -> Result {
    write!(
        f,
        "read the stream back: {lost}, and Postgres has been told to forget events up to later than that: restore the \
         stream from a newer backup, or accept the gap and {ACCEPT}"
    )
}

fn conflict_of(f: &mut Formatter<'_>, of: &str, conflict: &Conflict) -> Result {
    match conflict {
        Conflict::OtherSystem(at) => write!(
            f,
            "resume {of}: its last event ({at}) was written from another Postgres system; if this database \
             replaces that one (pg_upgrade, a restored dump), pass -accept-new-system once: what this slot sends is then \
             published after it"
        ),
        Conflict::OtherTimeline(at) => write!(
            f,
            "resume {of}: its last event ({at}) was written on a timeline that is not in this server's history; \
             connect to the server that was promoted, this one is behind or abandoned"
        ),
    }
}

fn unfenced(f: &mut Formatter<'_>, stream: &str, at: &Position, stored: &Position) -> Result {
    write!(
        f,
        "read the stream back: {stream} has events up to {at} without a fence, as -delivery at-least-once or a promoted mirror has them: after \
         {stored} an event may be missing that exactly-once would take for stored; run once with \
         -delivery at-least-once -drain until that ends with 0 (within the stream's deduplication window nothing comes \
         twice), then start the relay again; where none is missing, {ACCEPT}"
    )
}

impl Display for Undecodable {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
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
        let advance = |to: &str| advance(slot, to);
        match place {
            // what begins before the slot's position is skipped
            Some(place) => {
                let past = Lsn(place.0.saturating_add(1));
                write!(
                    f,
                    "then move the slot past it: {}",
                    advance(&format!("'{past}'"))
                )
            }
            None => write!(
                f,
                "then move the slot past its commit, which pg_waldump shows: {}. Where the WAL itself is damaged \
                 that fails as well: then drop the slot and create it again",
                advance("'<its LSN>'")
            ),
        }?;
        write!(f, "; and then {ACCEPT}")
    }
}

fn advance(slot: &str, to: &str) -> String {
    let slot = quote_literal(slot);
    format!("SELECT pg_replication_slot_advance({slot}, {to})")
}
