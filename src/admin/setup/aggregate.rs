//! The aggregate: `setup` creates it, and adds the relay's stream to the sources of one that a `setup` created.
//!
//! nats-server changes a stream's configuration as a whole, and on no condition: of two setups that have read the same one
//! and change it, the later undoes what the earlier has done. So each sends its change at once after it has read, or reads
//! again, and then looks for longer than that whether its source is still there.

use super::{Outcome, Report, create};
use crate::admin::Error;
use crate::admin::bus::Bus;
use crate::admin::statements::create_aggregate;
use crate::config::Config;
use crate::config::operation::Setup;
use crate::exit::Exit;
use crate::jetstream::sources::{Aggregate, source};
use crate::jetstream::streams::{StreamConfig, StreamInfo};
use serde_json::Value;
use std::thread;
use std::time::{Duration, Instant};

/// A change is sent no later than this after what it changes was read.
const FRESH: Duration = Duration::from_millis(500);
/// For so long a change must have stood: longer than another that was read before it can take to be made.
const STANDS: Duration = Duration::from_secs(2);
/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(100);
/// Others may change it so often for so long.
const LIMIT: Duration = Duration::from_secs(60);
/// nats-server's code for a stream that is there, configured otherwise.
const IN_USE: u32 = 10058;

/// What has become of it so far.
struct Made {
    /// It was not there.
    is_new: bool,
    /// The sources that were added.
    sources: Vec<String>,
    /// When the last change was made.
    changed: Option<Instant>,
}

/// Has the aggregate, if one is asked for, copy from the streams of the prefix.
pub fn extend(
    bus: &mut Bus<'_>,
    config: &Config,
    how: &Setup,
    report: &mut Report,
) -> Result<(), Error> {
    let Some((name, other_prefix)) = &how.aggregate else {
        return Ok(());
    };
    let what = format!("aggregate {name}");
    let wanted = format!("{}.>", config.prefix);
    let origins = bus.streams(&wanted)?;
    if let Some(own) = origins.iter().find(|it| it.config.name == *name) {
        let subjects = own.config.subjects.join(", ");
        let difference = format!(
            "it captures {subjects} itself, so events are published to it; an aggregate only copies: name another stream"
        );
        return report.tell(&what, Outcome::Found(vec![difference]));
    }
    if origins.is_empty() {
        let why = format!("no stream captures {wanted}, so there is nothing to copy");
        return report.tell(&what, Outcome::Missing(why));
    }
    let sources: Vec<(&StreamInfo, Value)> = origins
        .iter()
        .map(|origin| {
            let StreamConfig { name, subjects, .. } = &origin.config;
            let source = source(name, subjects, &config.prefix, other_prefix.as_deref());
            (origin, source)
        })
        .collect();
    let mut made = Made {
        is_new: false,
        sources: Vec::new(),
        changed: None,
    };
    let mut found = settle(bus, config, how, name, &sources, &mut made)?;
    // a limit that was asked for is none to warn of
    if found.info.config.max_bytes == how.max_bytes {
        found.info.config.max_bytes = -1;
    }
    let mut differences = differences(&found, &origins, &wanted, &bus.info.version);
    if let Some(prefix) = other_prefix {
        differences.extend(other_subjects(&found, &origins, &wanted, prefix));
    }
    report.tell(
        &what,
        match made.is_new && differences.is_empty() {
            true => Outcome::Created,
            false => Outcome::Found(differences),
        },
    )?;
    made.sources.iter().try_for_each(|source| {
        report.tell(
            &format!("source {source} of aggregate {name}"),
            Outcome::Created,
        )
    })
}

/// Creates it, or adds what it lacks, until that has stood; one that no setup made is left as it is.
fn settle(
    bus: &mut Bus<'_>,
    config: &Config,
    how: &Setup,
    name: &str,
    sources: &[(&StreamInfo, Value)],
    made: &mut Made,
) -> Result<Aggregate, Error> {
    let wanted = format!("{}.>", config.prefix);
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        let read = Instant::now();
        let Some(found) = bus.aggregate(name)? else {
            let each: Vec<Value> = sources.iter().map(|(_, source)| source.clone()).collect();
            let request = create_aggregate(how, name, &each, &bus.info.version);
            match create(bus, name, request) {
                Ok(()) => made.is_new = true,
                // another setup was faster
                Err(Error::Nats(error))
                    if error.api_error().is_some_and(|it| it.err_code == IN_USE) => {}
                Err(error) => return Err(error),
            }
            made.changed = Some(Instant::now());
            continue;
        };
        let lacks = |(origin, _): &&(&StreamInfo, Value)| {
            found.sources_of(&origin.config.name, &wanted).is_empty()
        };
        let lacking = sources.iter().find(lacks);
        let stood = made.changed.is_none_or(|at| at.elapsed() >= STANDS);
        match lacking {
            None if stood => return Ok(found),
            Some(_) if !found.is_ours => return Ok(found),
            Some((origin, source)) if read.elapsed() < FRESH => {
                bus.create(found.extend_request(source.clone()))?;
                made.changed = Some(Instant::now());
                if !made.sources.contains(&origin.config.name) {
                    made.sources.push(origin.config.name.clone());
                }
            }
            _ => thread::sleep(INTERVAL),
        }
    }
    Err(Error::Wrong {
        what: format!(
            "extend the aggregate: its sources were changed by others for {} s",
            LIMIT.as_secs()
        ),
        remedy: "run setup again when nobody else changes it".into(),
        exit: Exit::Unavailable,
    })
}

fn differences(
    found: &Aggregate,
    origins: &[StreamInfo],
    wanted: &str,
    server_version: &str,
) -> Vec<String> {
    let name = &found.info.config.name;
    let mut differences: Vec<String> = Vec::new();
    for origin in origins {
        let lacks = found.sources_of(&origin.config.name, wanted).is_empty();
        if lacks && !found.is_ours {
            differences.push(format!(
                "it does not copy from {}, and setup did not make it, so it is left as it is; to have setup extend it: \
                 nats stream edit {name} --metadata=jetstream_outbox:aggregate; then run setup again",
                origin.config.name
            ));
            continue;
        }
        for fault in found.faults(origin, wanted, server_version) {
            let text = format!("{}: {}; fix: {}", fault.what, fault.why, fault.fix);
            if !differences.contains(&text) {
                differences.push(text);
            }
        }
    }
    differences
}

/// The sources that were there before, and do not change the prefix as it is wished.
fn other_subjects(
    found: &Aggregate,
    origins: &[StreamInfo],
    wanted: &str,
    prefix: &str,
) -> Vec<String> {
    let wished = format!("{prefix}.>");
    let mut others = Vec::new();
    for origin in origins {
        let name = &origin.config.name;
        for source in found.sources_of(name, wanted) {
            let under = source.stored_under(wanted);
            if under != wished {
                others.push(format!(
                    "events of {name} are in it under {under}, not {wished}; a source that is changed copies all again"
                ));
            }
        }
    }
    others
}
