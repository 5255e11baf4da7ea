//! `unpark`: publishes parked events once more, by way of Postgres ([`Reissue`]), or prints the statements that do.
//!
//! Nothing is marked or deleted where they are parked. An event whose id is in a stream, or in the WAL after the parked one, was
//! unparked before, or is on its way: it is left. Where the streams do not have all that they have stored since it was parked, nobody
//! knows, and it is left as well.

use super::compare::digest;
use super::reissue::{Carried, Carrier, Reissue};
use super::sides::{Sides, is_resolved};
use super::{Error, say};
use crate::config::Config;
use crate::config::operation::{self, Which};
use crate::exit::Exit;
use crate::jetstream::streams::{StoredMessage, StreamInfo, matches};
use crate::jetstream::{MSG_ID, OUTBOX_POSITION};
use crate::outbox::batch::Change;
use crate::outbox::park::{BODY_CUT, HEADERS_CUT, ORIGINAL_SUBJECT, PARKED};
use crate::outbox::percent;
use crate::outbox::position::{Position, SourcePosition};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::time::Duration;

/// So many are unparked at a time.
const AT_ONCE: usize = 1_000_000;

/// A parked event: of one that was parked again, the last message.
struct Parked {
    stream: usize,
    seq: u64,
    /// Where it is in Postgres; `None`: in another Postgres, or of another slot.
    position: Option<Position>,
    /// What it was written from.
    source: Option<Source>,
    /// The hash of its body.
    body: u64,
    time: Timestamp,
    /// Why there is nothing to do.
    done: Option<&'static str>,
}

/// Slot and system: which relay wrote a message. (Timelines come and go.)
#[derive(Clone, PartialEq, Eq)]
struct Source {
    slot: String,
    system_id: u64,
}

impl Source {
    fn of(at: &SourcePosition) -> Source {
        Source {
            slot: at.source.slot.to_string(),
            system_id: at.source.system_id,
        }
    }
}

/// Where the message says that its event is in Postgres.
fn position(message: &StoredMessage) -> Option<SourcePosition> {
    message.header(OUTBOX_POSITION)?.parse().ok()
}

/// What became of those that were chosen.
#[derive(Default)]
struct Count {
    unparked: u64,
    done: u64,
    left: u64,
}

/// Unparks what was chosen.
pub fn run(config: &Config, how: &operation::Unpark) -> Result<Exit, Error> {
    let mut reissue = match how.print_sql {
        true => None,
        false => Some(Reissue::open(config)?),
    };
    let carrier = Carrier::new(config)?;
    let mut sides = Sides::open(config, || Ok(()))?;
    if !sides.has_slot() && !how.print_sql {
        return Err(Error::Wrong {
            what: "unpark events: there is no slot that would send them to a relay".into(),
            remedy: "run setup and start the relay, or pass -print-sql".into(),
            exit: Exit::Configuration,
        });
    }
    let mut parked = find(&mut sides, config, &how.which)?;
    mark_stored(&mut sides, config, &mut parked)?;
    mark_waiting(&mut sides, config, &mut parked)?;
    let mut chosen: Vec<(String, Parked)> = parked.into_iter().collect();
    chosen.sort_by_key(|(_, it)| (it.position, it.stream, it.seq));
    let mut count = Count::default();
    if let (true, Which::Id(id)) = (chosen.is_empty(), &how.which) {
        count.left += 1;
        told(
            how,
            &format!("left        {id}: no parked event has this id"),
        )?;
    }
    for (id, it) in chosen {
        if let Some(done) = it.done {
            count.done += 1;
            told(how, &format!("done        {id}: {done}"))?;
            continue;
        }
        if let (None, false) = (it.position, matches!(how.which, Which::Id(_))) {
            count.left += 1;
            let by = it.source.map_or("no position".into(), |by| {
                format!("slot {} of system {}", by.slot, by.system_id)
            });
            let why = "parked by another relay";
            told(
                how,
                &format!(
                    "left        {id}: {why} ({by}); choose it by -id if it is to be published here"
                ),
            )?;
            continue;
        }
        match event(&mut sides, config, (&carrier, how.print_sql), &id, &it)? {
            Err(why) => {
                count.left += 1;
                told(how, &format!("left        {id}: {why}"))?;
            }
            Ok(event) => match &mut reissue {
                Some(reissue) => reissue.add(event, |it| unparked(it, &mut count))?,
                None => {
                    count.unparked += 1;
                    say(&format!("{}\n", carrier.sql(&event.content)))?;
                }
            },
        }
    }
    if let Some(reissue) = &mut reissue {
        reissue.flush(|it| unparked(it, &mut count))?;
    }
    let Count {
        unparked,
        done,
        left,
    } = count;
    told(
        how,
        &format!("found       {unparked} unparked, {done} done before, {left} left"),
    )?;
    Ok(match left {
        0 => Exit::Done,
        _ => Exit::Warning,
    })
}

/// Beside statements that are to be run it is a comment.
fn told(how: &operation::Unpark, line: &str) -> Result<(), Error> {
    match how.print_sql {
        true => say_line(&format!("-- {line}")),
        false => say_line(line),
    }
}

fn unparked(event: &Carried, count: &mut Count) -> Result<(), Error> {
    count.unparked += 1;
    say_line(&format!("unparked    {} {}", event.id, event.subject))
}

/// Anybody may write to the park subject, so the line must stay one: what follows would be run as a statement.
fn say_line(line: &str) -> Result<(), Error> {
    say(&format!("{}\n", one_line(line)))
}

/// The text with its control characters escaped.
fn one_line(line: &str) -> String {
    let mut escaped = String::with_capacity(line.len());
    for c in line.chars() {
        match c.is_control() {
            true => escaped.extend(c.escape_default()),
            false => escaped.push(c),
        }
    }
    escaped
}

/// The parked events that were chosen, by their ids. Of one id this relay's goes before another one's.
fn find(
    sides: &mut Sides<'_>,
    config: &Config,
    which: &Which,
) -> Result<BTreeMap<String, Parked>, Error> {
    let park = &config.mapping.policy.park_subject;
    let own = own_source(sides);
    let mut parked: BTreeMap<String, Parked> = BTreeMap::new();
    for stream in 0..sides.streams.len() {
        let read = |message: StoredMessage| {
            let cause = message.header(PARKED)?;
            let id = message.header(MSG_ID)?;
            let is_chosen = match which {
                Which::All => true,
                // as it is printed, or as it was written
                Which::Id(wanted) => {
                    wanted == id || percent::decode(id).is_some_and(|id| id == *wanted)
                }
                // it is written as a header can carry it
                Which::Cause(part) => {
                    let decoded = percent::decode(cause);
                    cause.contains(part.as_str())
                        || decoded.is_some_and(|it| it.contains(part.as_str()))
                }
            };
            if !is_chosen || !matches(park, &message.subject) {
                return None;
            }
            let at = position(&message);
            let source = at.as_ref().map(Source::of);
            let is_own = source.as_ref() == Some(&own);
            let found = Parked {
                stream,
                seq: message.seq,
                position: at.filter(|_| is_own).map(|at| at.position),
                source,
                body: digest(&message.data),
                time: message.time.parse().unwrap_or(Timestamp::MIN),
                done: None,
            };
            Some((id.to_string(), found))
        };
        sides.scan(stream, read, |(id, found)| {
            let before = parked.get(&id);
            if found.position.is_some() || before.is_none_or(|it| it.position.is_none()) {
                parked.insert(id, found);
            }
            match parked.len() > AT_ONCE {
                false => Ok(()),
                true => Err(Error::Wrong {
                    what: format!("unpark events: more than {AT_ONCE} are parked"),
                    remedy: "choose some with -cause".into(),
                    exit: Exit::Usage,
                }),
            }
        })?;
    }
    Ok(parked)
}

fn own_source(sides: &Sides<'_>) -> Source {
    let source = &sides.lineage.source;
    Source {
        slot: source.slot.to_string(),
        system_id: source.system_id,
    }
}

/// What is in a stream needs nothing more: written by this relay or by the one that parked it, or, by hand, with the same body.
/// (Another service may have the same id.)
fn mark_stored(
    sides: &mut Sides<'_>,
    config: &Config,
    parked: &mut BTreeMap<String, Parked>,
) -> Result<(), Error> {
    let filter = format!("{}.>", config.prefix);
    let own = own_source(sides);
    for stream in 0..sides.streams.len() {
        let read = |message: StoredMessage| {
            let is_event = message.header(PARKED).is_none() && matches(&filter, &message.subject);
            let id = message.header(MSG_ID).filter(|_| is_event)?;
            let source = position(&message).map(|at| Source::of(&at));
            Some((id.to_string(), source, digest(&message.data)))
        };
        sides.scan(stream, read, |(id, source, body)| {
            if let Some(found) = parked.get_mut(&id)
                && (found.body == body
                    || source.is_some_and(|it| it == own || found.source.as_ref() == Some(&it)))
            {
                found.done = Some("it is in a stream");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What was written after it was parked, and that the relay has not resolved, is on its way. (What it has resolved is in a stream, or
/// was parked again.)
fn mark_waiting(
    sides: &mut Sides<'_>,
    config: &Config,
    parked: &mut BTreeMap<String, Parked>,
) -> Result<(), Error> {
    let resolved = sides.resolved;
    sides.decode(config, |mapped| {
        let at = mapped.place.position;
        let Some(Ok(batch)) = mapped.event else {
            return Ok(());
        };
        if let [Change::Event(spans)] = batch.changes()
            && let Some(found) = parked.get_mut(batch.event(spans).id)
            && found.position.is_none_or(|parked| at > parked)
            && !is_resolved(at, resolved)
        {
            found.done = Some("it is on its way to a stream");
        }
        Ok(())
    })
}

/// The event as it was before it was parked, or why it cannot be had.
fn event(
    sides: &mut Sides<'_>,
    config: &Config,
    (carrier, is_printed): (&Carrier, bool),
    id: &str,
    parked: &Parked,
) -> Result<Result<Carried, String>, Error> {
    let found = sides.message(parked.stream, parked.seq)?;
    let Some(message) = found else {
        return Ok(Err("it is not parked any more".into()));
    };
    Ok(carried(carrier, id, &message).and_then(|event| {
        if let Some(stream) = may_be_gone(&sides.streams, config, parked.time) {
            return Err(format!(
                "it may have been unparked before: {stream} does not have all that it has stored since; if it was not, run {}",
                match is_printed {
                    true => carrier.sql(&event.content),
                    // a payload is for nobody's log
                    false => "the statement that -print-sql prints here".into(),
                }
            ));
        }
        match remembers(&sides.streams, parked, &event.subject) {
            None => Ok(event),
            Some(stream) => Err(format!(
                "{stream}, where it is parked, would take it for the same message within its duplicate_window; unpark it later"
            )),
        }
    }))
}

/// The stream where it is parked also captures its subject, and still remembers its id.
fn remembers<'a>(streams: &'a [StreamInfo], parked: &Parked, subject: &str) -> Option<&'a str> {
    let info = streams.get(parked.stream)?;
    let mut subjects = info.config.subjects.iter();
    if !subjects.any(|pattern| matches(pattern, subject)) {
        return None;
    }
    let now = info.ts.parse().unwrap_or_else(|_| Timestamp::now());
    let window = Duration::from_nanos(u64::try_from(info.config.duplicate_window).unwrap_or(0));
    let until = parked.time.checked_add(window).unwrap_or(Timestamp::MAX);
    (now <= until).then_some(info.config.name.as_str())
}

fn carried(carrier: &Carrier, id: &str, message: &StoredMessage) -> Result<Carried, String> {
    if let Some(len) = message.header(BODY_CUT) {
        return Err(format!(
            "its body of {len} bytes was cut; publish it by hand"
        ));
    }
    if message.header(HEADERS_CUT).is_some() {
        return Err("its headers were left out; publish it by hand".into());
    }
    if id.starts_with("parked-") {
        return Err("it has no id of its own; publish it by hand".into());
    }
    let Some(home) = message.header(ORIGINAL_SUBJECT) else {
        return Err("it has no subject; publish it by hand".into());
    };
    let mut headers = String::new();
    for (name, value) in &message.headers {
        let is_own = name == "Outbox-Encoded"
            || !["nats-", "outbox-"].iter().any(|begin| {
                (name.get(..begin.len())).is_some_and(|it| it.eq_ignore_ascii_case(begin))
            });
        if is_own {
            headers += &format!("\r\n{name}: {value}");
        }
    }
    let content = carrier.content(home, id, &headers, &message.data)?;
    Ok(Carried {
        id: id.to_string(),
        subject: home.to_string(),
        content,
    })
}

/// A stream that may have dropped what it stored after that time.
fn may_be_gone<'a>(
    streams: &'a [StreamInfo],
    config: &Config,
    since: Timestamp,
) -> Option<&'a str> {
    let filter = format!("{}.>", config.prefix);
    let captures = |info: &&StreamInfo| {
        let mut subjects = info.config.subjects.iter();
        subjects.any(|subject| crate::jetstream::sources::overlap(subject, &filter))
    };
    let drops = |info: &&StreamInfo| {
        let state = &info.state;
        let has_no_holes =
            state.first_seq.checked_add(state.messages) == state.last_seq.checked_add(1);
        let first: Option<Timestamp> = state.first_ts.parse().ok();
        let is_older = state.messages > 0 && first.is_some_and(|first| first <= since);
        let keeps = has_no_holes && info.config.retention == "limits" && is_older;
        state.messages != state.last_seq && !keeps
    };
    let found = streams.iter().filter(captures).find(drops);
    found.map(|info| info.config.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_one_line() {
        for (line, expected) in [
            ("-- left        é 1: x", "-- left        é 1: x"),
            ("-- 1\nDROP TABLE t;", "-- 1\\nDROP TABLE t;"),
            (
                "-- 1\rDROP TABLE t;\u{1b}[1m",
                "-- 1\\rDROP TABLE t;\\u{1b}[1m",
            ),
        ] {
            assert_eq!(one_line(line), expected);
        }
    }
}
