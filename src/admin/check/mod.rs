//! `check`: a doctor for both sides, that changes nothing.
//!
//! [`postgres`] and [`nats`] each read facts, and judge them by small pure functions, one a finding. A fact that cannot
//! be read is a finding too.

pub mod nats;
pub mod postgres;

/// The findings are the relay's own.
pub use crate::relay::preflight as finding;

use super::{Error, say};
use crate::config::Config;
use crate::exit::Exit;
use crate::jetstream::Delivery;
use crate::outbox::position::SourcePosition;
use finding::{Finding, Level, fail, ok};
use nats::Past;
use postgres::Log;
use serde_json::json;

/// Looks at both sides and prints what it found.
pub fn run(config: &Config, json: bool, strict: bool) -> Result<Exit, Error> {
    let (mut findings, log) = postgres::findings(config);
    let (nats, past) = nats::findings(config);
    findings.extend(nats);
    if let Some(log) = log {
        findings.extend(history(config, log, &past));
        findings.extend(slot_position(config, log, &past));
        findings.extend(left_off(config, log, &past));
    }
    let worst = findings.iter().map(|finding| finding.level).max();
    if json {
        let findings: Vec<_> = findings.iter().map(Finding::json).collect();
        let level = worst.unwrap_or(Level::Ok).name();
        say(&format!(
            "{:#}\n",
            json!({ "level": level, "findings": findings })
        ))?;
    } else {
        for finding in &findings {
            say(&format!("{finding}\n"))?;
        }
    }
    Ok(match worst {
        Some(Level::Fail) => Exit::Failure,
        Some(Level::Warn) if strict => Exit::Warning,
        _ => Exit::Done,
    })
}

/// Whether the streams were written from this Postgres. One finding a stream that holds an event of the slot.
fn history(config: &Config, log: Log, past: &Past) -> Vec<Finding> {
    const NAME: &str = "both.history";
    let system_id = log.system_id;
    let judge = |tail: &nats::Tail| {
        let (stream, at) = (&tail.stream, &tail.position);
        if at.source.slot != config.slot {
            return None;
        }
        Some(match at.source.system_id == system_id {
            true => ok(
                NAME,
                format!(
                    "stream {stream} was last written from this Postgres, at {}",
                    at.position
                ),
            ),
            false => fail(
                NAME,
                format!(
                    "the last event of stream {stream} ({at}) was written from another Postgres system, this one is {system_id}"
                ),
                "the relay halts rather than mix the histories of two databases",
                "correct -db, or, if this database replaces the other, start the relay once with -accept-new-system",
            ),
        })
    };
    past.tails.iter().filter_map(judge).collect()
}

/// Whether the slot wrote this, in the log that is read now: positions of another timeline are comparable as far as the branch
/// alone.
fn is_of(config: &Config, log: Log, at: &SourcePosition) -> bool {
    let source = &at.source;
    (source.slot.as_str(), source.system_id, source.timeline)
        == (config.slot.as_str(), log.system_id, log.timeline)
}

/// Whether the slot stands where the relay has left it, as the relay itself looks at each start.
fn slot_position(config: &Config, log: Log, past: &Past) -> Option<Finding> {
    const NAME: &str = "both.slot_position";
    let reached = past.reached.as_ref()?;
    let confirmed = log.confirmed?;
    if !is_of(config, log, reached) {
        return None;
    }
    let (slot, left) = (&config.slot, reached.position.commit_lsn);
    Some(match confirmed <= left {
        true => ok(
            NAME,
            format!("slot {slot} stands at {confirmed}, no further than a relay has confirmed"),
        ),
        false => fail(
            NAME,
            format!(
                "slot {slot} stands at {confirmed}, but a relay has confirmed {left} at most: it was made anew, or moved by somebody else"
            ),
            "what was committed between the two may be missing in the stream, so the relay halts",
            "publish by hand what is missing, then start the relay once with -resume-anyway",
        ),
    })
}

/// Whether a relay with at-least-once delivery left off in the middle, as the relay itself looks at each start. One finding a
/// stream.
fn left_off(config: &Config, log: Log, past: &Past) -> Vec<Finding> {
    if config.delivery != Delivery::ExactlyOnce {
        return Vec::new();
    }
    let reached = past.reached.as_ref().filter(|at| is_of(config, log, at));
    let reached = reached.map(|at| at.position.commit_lsn);
    let judge = |tail: &nats::Tail| {
        let settled = log.confirmed.max(reached)?;
        let is_settled = tail.position.position.commit_lsn < settled;
        (is_of(config, log, &tail.position) && !tail.fenced && !is_settled).then(|| {
            fail(
                "both.delivery",
                format!(
                    "the last event of stream {} was published with at-least-once, by a relay that left off in the middle",
                    tail.stream
                ),
                format!(
                    "behind {settled} one may be missing that exactly-once would take for stored, so the relay halts"
                ),
                "run once with -delivery at-least-once -drain until that ends with 0",
            )
        })
    };
    past.tails.iter().filter_map(judge).collect()
}
