//! Whether the aggregate has what the relay's streams have, and gets what comes.

use super::{Facts, Finding, Stream, fail, ok, warn};
use crate::admin::bus::Bus;
use crate::config::Config;
use crate::jetstream::Error;
use crate::jetstream::STREAM_SOURCE;
use crate::jetstream::client::Link;
use crate::jetstream::sources::{Aggregate, Fault, copied_seq};
use crate::jetstream::streams::{StreamInfo, last_message_request, next_message_request};
use std::thread;
use std::time::{Duration, Instant};

const NAME: &str = "nats.aggregate";
/// For so long the next event may wait to be copied. nats-server tries again each second or two.
const PATIENCE: Duration = Duration::from_secs(5);
const INTERVAL: Duration = Duration::from_millis(200);

/// What was read of the aggregate.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// It, and each stream of the prefix; `Err`: what the API said, nothing if there is no such stream.
    pub found: Result<(Aggregate, Vec<Origin>), Option<String>>,
}

/// A stream that is copied from.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Read after the aggregate.
    pub info: StreamInfo,
    /// What of it is still to be copied.
    pub left: Left,
}

/// What is still to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It could not be found out.
    Unknown,
    Nothing,
    /// So many messages at most.
    Some(u64),
    /// The message at this sequence, and all after it, for as long as was looked.
    From(u64),
}

/// Reads it, and looks whether it goes on.
pub fn read(bus: &mut Bus<'_, Link>, config: &Config, name: &str, streams: &[Stream]) -> Seen {
    let found = bus.aggregate(name).and_then(|found| {
        let Some(found) = found else {
            return Ok(None);
        };
        let mut origins = Vec::new();
        for stream in streams {
            let origin = &stream.info.config.name;
            let left = match origin == name {
                true => Left::Unknown,
                false => left(bus, config, &found, origin)?,
            };
            if let Some(info) = bus.stream(origin)? {
                origins.push(Origin { info, left });
            }
        }
        Ok(Some((found, origins)))
    });
    Seen {
        name: name.into(),
        found: match found {
            Ok(found) => found.ok_or(None),
            Err(error) => Err(Some(error.to_string())),
        },
    }
}

/// Looks for the first event that is not copied, and waits until it is.
fn left(
    bus: &mut Bus<'_, Link>,
    config: &Config,
    aggregate: &Aggregate,
    origin: &str,
) -> Result<Left, Error> {
    let name = &aggregate.info.config.name;
    let wanted = format!("{}.>", config.prefix);
    let [source] = aggregate.sources_of(origin, &wanted)[..] else {
        return Ok(Left::Unknown);
    };
    let start = Instant::now();
    let mut first = None;
    loop {
        let Some(now) = bus.aggregate(name)? else {
            return Ok(Left::Unknown);
        };
        let copied = match now.copied(origin, &bus.info.version) {
            Some(seq) => Some(seq),
            None => {
                let last = last_message_request(name, &source.stored_under(&wanted));
                let last = bus.message(last)?;
                let header = last.as_ref().and_then(|it| it.header(STREAM_SOURCE));
                header.and_then(|header| copied_seq(header, origin))
            }
        };
        let Some(copied) = copied else {
            return Ok(Left::Unknown);
        };
        let next = bus.message(next_message_request(origin, copied + 1, &wanted))?;
        match next {
            None => return Ok(Left::Nothing),
            Some(next) if *first.get_or_insert(next.seq) != next.seq => {
                let last_seq = bus.stream(origin)?.map_or(0, |it| it.state.last_seq);
                return Ok(Left::Some(last_seq.saturating_sub(copied)));
            }
            Some(next) if start.elapsed() >= PATIENCE => return Ok(Left::From(next.seq)),
            Some(_) => thread::sleep(INTERVAL),
        }
    }
}

/// Each fault is a finding; how much is left to copy is told where there is none.
pub fn judge(facts: &Facts, config: &Config) -> Vec<Finding> {
    let Some(Seen { name, found }) = &facts.aggregate else {
        return Vec::new();
    };
    let (aggregate, origins) = match found {
        Ok(found) => found,
        Err(None) => {
            return vec![fail(
                NAME,
                format!("stream {name} does not exist"),
                "nothing is copied into it",
                format!("jetstream-outbox setup -aggregate {name}"),
            )];
        }
        Err(Some(error)) => {
            let api = &config.nats.api_prefix;
            return vec![fail(
                NAME,
                format!("stream {name}: {error}"),
                "whether events get into it is not known",
                format!(
                    "let the user publish to {api}.STREAM.INFO.{name} and {api}.STREAM.MSG.GET.{name}"
                ),
            )];
        }
    };
    let wanted = format!("{}.>", config.prefix);
    let mut findings: Vec<Finding> = Vec::new();
    let mut fine = Vec::new();
    for Origin { info, left } in origins {
        let origin = &info.config.name;
        if origin == name {
            findings.push(fail(
                NAME,
                format!("stream {name} captures {} itself", info.config.subjects.join(", ")),
                "events are published to it, and each copy that comes in between has an event refused and sent again",
                format!("take subjects under {} from it, or name another stream with -aggregate", config.prefix),
            ));
            continue;
        }
        let mut faults = aggregate.faults(info, &wanted, &facts.info.version);
        let copying = aggregate.copying_from(origin);
        faults.extend(copying.and_then(|it| it.fault(info.state.last_seq)));
        let fails = faults.iter().any(|fault| fault.fails);
        match left {
            Left::From(seq) if !fails => faults.push(held_up(name, origin, *seq)),
            Left::Some(many) => fine.push(format!("{origin} (up to {many} messages left)")),
            Left::Nothing | Left::From(_) => fine.push(origin.clone()),
            Left::Unknown => fine.push(format!("{origin} (how far is not known)")),
        }
        findings.extend(faults.into_iter().map(|fault| finding(name, fault)));
    }
    // what is wrong with the aggregate itself is said once
    findings.dedup();
    if findings.is_empty() {
        findings.push(ok(
            NAME,
            format!("stream {name} copies from {}", fine.join(", ")),
        ));
    }
    findings
}

fn held_up(name: &str, origin: &str, seq: u64) -> Fault {
    Fault {
        fails: true,
        what: format!(
            "the copying from {origin} stands before its sequence {seq} for {} s",
            PATIENCE.as_secs()
        ),
        why: "the aggregate takes no more: it is full with discard new, or the message is too large for it, or its store cannot \
              write; what the origin drops meanwhile never gets into it",
        fix: format!(
            "raise the limit of {name} (nats stream edit {name}), or see the log of nats-server"
        ),
    }
}

fn finding(name: &str, fault: Fault) -> Finding {
    let found = format!("stream {name}: {}", fault.what);
    match fault.fails {
        true => fail(NAME, found, fault.why, fault.fix),
        false => warn(NAME, found, fault.why, fault.fix),
    }
}
