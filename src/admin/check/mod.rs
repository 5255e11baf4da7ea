//! `check`: a doctor for both sides, that changes nothing.
//!
//! [`postgres`] and [`nats`] each read facts, and judge them by small pure functions, one a finding. A fact that cannot
//! be read is a finding too.

pub mod finding;
pub mod nats;
pub mod postgres;

use super::{Error, say};
use crate::config::Config;
use crate::exit::Exit;
use finding::{Finding, Level, fail, ok};
use serde_json::json;

/// Looks at both sides and prints what it found.
pub fn run(config: &Config, json: bool, strict: bool) -> Result<Exit, Error> {
    let (mut findings, system_id) = postgres::findings(config);
    let (nats, tails) = nats::findings(config);
    findings.extend(nats);
    findings.extend(history(config, system_id, &tails));
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
fn history(config: &Config, system_id: Option<u64>, tails: &[nats::Tail]) -> Vec<Finding> {
    const NAME: &str = "both.history";
    let Some(system_id) = system_id else {
        return Vec::new();
    };
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
    tails.iter().filter_map(judge).collect()
}
