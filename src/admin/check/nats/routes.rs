//! Whether each subject leads to the stream that captures it: mappings, imports and leaf nodes may lead elsewhere. It is found
//! out by what answers there.

use super::{Facts, Stream};
use crate::admin::bus::Bus;
use crate::admin::check::finding::{Finding, fail};
use crate::config::Config;
use crate::jetstream::Error;
use crate::jetstream::ack::parse_refusal;
use crate::jetstream::client::Link;
use crate::jetstream::streams::{self, StreamInfo};
use crate::nats::options::OWN_API;
use crate::nats::{self, EndedBy};
use crate::outbox::subject::MAX_SUBJECT_LEN;

/// So often a subject is tried: a weighted mapping leads to several places.
const PROBES: usize = 12;
const NAME: &str = "nats.streams";
const CHANGED: &str = "a mapping of the account or an import changes the subject on its way";

/// What leads elsewhere.
pub(super) fn findings(facts: &Facts, config: &Config) -> Vec<Finding> {
    let Ok(streams) = &facts.streams else {
        return Vec::new();
    };
    let wanted = format!("{}.>", config.prefix);
    if let Some(answers) = &facts.answers {
        return vec![fail(
            NAME,
            format!("no stream captures {wanted}, but {answers} stores what is published there"),
            format!(
                "{CHANGED}, so the relay cannot tell which stream an event goes to, and does not start"
            ),
            format!(
                "take the mapping out, have {answers} capture {wanted}, or name with -prefix what it captures"
            ),
        )];
    }
    if let [own, ..] = facts.own.as_slice() {
        return vec![fail(
            NAME,
            format!(
                "stream {own} of the domain that the server itself is in captures {wanted} as well"
            ),
            "each event is stored in both, both answer, and the relay halts",
            format!(
                "take the subjects from one of them: nats stream edit {own} --subjects=..., or, if it is the one that is wanted, \
                 -nats-api-prefix '{OWN_API}'"
            ),
        )];
    }
    let found = streams.iter().filter_map(|stream| {
        let (other, subject) = stream.elsewhere.as_ref()?;
        let name = &stream.info.config.name;
        Some(fail(
            NAME,
            format!("what is published to {subject}, which {name} captures, reaches stream {other}"),
            format!(
                "{CHANGED}, or a leaf node takes it; the relay halts, as nothing is confirmed on the word of another stream"
            ),
            "see to it that each subject leads to the stream that captures it, and that -nats-api-prefix names its domain",
        ))
    });
    found.collect()
}

/// Publishes to as long a subject as the mapping makes of any row, which must be refused. Returns the server's words if it ends the
/// connection over that: `max_control_line` is in no INFO.
pub(super) fn long_subject(
    bus: &mut Bus<'_, Link>,
    config: &Config,
    streams: &[Stream],
) -> Option<String> {
    let mut subject = format!("{}.outbox-check.", config.prefix);
    subject.extend(std::iter::repeat_n(
        'x',
        MAX_SUBJECT_LEN.saturating_sub(subject.len()),
    ));
    let captures = |it: &Stream| {
        let mut patterns = it.info.config.subjects.iter();
        it.publish == Some(Ok(())) && patterns.any(|pattern| streams::matches(pattern, &subject))
    };
    streams.iter().find(|it| captures(it))?;
    let answer = bus.ask(|link, timeout| streams::probe(link, &subject, timeout));
    match answer {
        Err(Error::Nats(nats::Error::Lost {
            by: EndedBy::Complaint,
            reason,
            ..
        })) => Some(reason),
        _ => None,
    }
}

/// The stream that what is published to `subject` reaches.
pub(super) fn refuser(bus: &mut Bus<'_, Link>, subject: &str) -> Option<String> {
    let answer = bus.ask(|link, timeout| streams::probe(link, subject, timeout));
    let (stream, _) = parse_refusal(&answer.ok()?)?;
    Some(stream)
}

/// A stream that `subject` leads to at times, other than this.
pub(super) fn other(bus: &mut Bus<'_, Link>, subject: &str, stream: &str) -> Option<String> {
    let mut found = (0..PROBES).filter_map(|_| refuser(bus, subject));
    found.find(|found| found != stream)
}

/// The streams of the prefix in the domain that the server itself is in, where the API of another is asked. What the user may
/// not ask is not found out.
pub(super) fn own(config: &Config, streams: &[Stream]) -> Vec<String> {
    if config.nats.api_prefix == OWN_API {
        return Vec::new();
    }
    let mut options = config.nats.clone();
    options.api_prefix = OWN_API.into();
    let Ok(mut bus) = Bus::<Link>::connect(&options) else {
        return Vec::new();
    };
    let found = bus.streams(&format!("{}.>", config.prefix));
    let is_one_of = |own: &StreamInfo| {
        let is_it =
            |it: &Stream| it.info.config.name == own.config.name && it.info.created == own.created;
        streams.iter().any(is_it)
    };
    let found = found.unwrap_or_default().into_iter();
    found
        .filter(|own| !is_one_of(own))
        .map(|own| own.config.name)
        .collect()
}
