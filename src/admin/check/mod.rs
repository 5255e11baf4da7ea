//! `check`: a doctor for both sides, that changes nothing.
//!
//! [`postgres`] and [`nats`] each read facts, and judge them by small pure functions, one a finding. A fact that cannot
//! be read is a finding too. [`past`] compares the two as the relay does when it starts.

pub mod nats;
pub mod past;
pub mod postgres;

/// The findings are the relay's own.
pub use crate::relay::preflight as finding;

use super::{Error, say};
use crate::config::Config;
use crate::exit::Exit;
use crate::relay::preflight::publication_state::PublicationState;
use finding::{Finding, Level};
use serde_json::json;

/// Looks at both sides and prints what it found.
pub fn run(
    config: &Config,
    json: bool,
    strict: bool,
    aggregate: Option<&str>,
) -> Result<Exit, Error> {
    let (nats, past) = nats::findings(config, postgres::system_id(config), aggregate);
    let seen = past
        .record
        .as_ref()
        .and_then(|record| record.publication.as_deref());
    let seen = seen.and_then(PublicationState::from_text);
    let (mut findings, log) = postgres::findings(config, seen.as_ref());
    findings.extend(nats);
    if let Some(log) = log {
        findings.extend(past::findings(config, log, &past));
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
