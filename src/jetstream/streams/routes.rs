//! Which stream captures which subject.

use super::StreamInfo;
use crate::jetstream::ack::Origin;
use crate::jetstream::client::Link;
use crate::jetstream::error::Error;
use std::time::Duration;

/// Whether `subject`, without wildcards, is one that `pattern` stands for: `*` for one token, a last `>` for one or
/// more. See <https://docs.nats.io/nats-concepts/subjects#wildcards>.
pub fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    let mut wanted = pattern.split('.').peekable();
    while let Some(want) = wanted.next() {
        let Some(token) = tokens.next() else {
            return false;
        };
        if want == ">" && wanted.peek().is_none() {
            return true;
        }
        if want != "*" && want != token {
            return false;
        }
    }
    tokens.next().is_none()
}

/// Finds the stream that captures a subject. The server lets no two streams overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    routes: Vec<(Pattern, usize)>,
    homes: Vec<Origin>,
    /// When each was created: another time is another stream of that name.
    created: Vec<String>,
    /// The largest message of each stream that has such a limit.
    max_msg_sizes: Vec<(usize, usize)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    /// `prefix.>`, as `prefix.`: the usual one, told by its beginning alone.
    Below(String),
    Any(String),
}

impl Routes {
    /// For these streams; [`route`](Self::route) gives indices into them.
    pub fn new(streams: &[StreamInfo]) -> Routes {
        let pattern = |subject: &String| match subject.strip_suffix('>') {
            Some(below) if below.ends_with('.') && !below.contains('*') => {
                Pattern::Below(below.into())
            }
            _ => Pattern::Any(subject.clone()),
        };
        let routes = streams.iter().enumerate().flat_map(|(index, stream)| {
            let subjects = stream.config.subjects.iter();
            subjects.map(move |subject| (pattern(subject), index))
        });
        let limited = streams.iter().enumerate().filter_map(|(index, stream)| {
            let limit = usize::try_from(stream.config.max_msg_size).ok()?;
            (limit > 0).then_some((index, limit))
        });
        let home = |stream: &StreamInfo| Origin {
            stream: stream.config.name.clone(),
            domain: stream.domain.clone(),
        };
        Routes {
            routes: routes.collect(),
            homes: streams.iter().map(home).collect(),
            created: streams.iter().map(|it| it.created.clone()).collect(),
            max_msg_sizes: limited.collect(),
        }
    }

    /// The `max_msg_size` of the stream that captures `subject`, if it has one.
    pub fn max_msg_size(&self, subject: &str) -> Option<usize> {
        if self.max_msg_sizes.is_empty() {
            return None;
        }
        let stream = self.route(subject)?;
        let of_it = |(index, _): &&(usize, usize)| *index == stream;
        self.max_msg_sizes
            .iter()
            .find(of_it)
            .map(|(_, limit)| *limit)
    }

    /// The stream that captures `subject`.
    pub fn home(&self, subject: &str) -> Option<&Origin> {
        self.homes.get(self.route(subject)?)
    }

    /// The index of the stream that captures `subject`, a legal one without wildcards.
    pub fn route(&self, subject: &str) -> Option<usize> {
        let captures = |(pattern, _): &&(Pattern, usize)| match pattern {
            Pattern::Below(below) => subject.len() > below.len() && subject.starts_with(below),
            Pattern::Any(pattern) => matches(pattern, subject),
        };
        self.routes.iter().find(captures).map(|(_, index)| *index)
    }
}

/// No stream reaches this sequence, and every JSON reader and server holds it.
const NEVER: u64 = 1 << 53;

/// Publishes what every stream must refuse, as it expects `subject` to have been stored last at a sequence that is never reached.
/// Returns the answer, which tells who has it, whatever the API reports: a mapping, an import or a leaf node may lead elsewhere.
///
/// # Errors
/// [`NoResponders`](crate::jetstream::ack::AckError::NoResponders): nobody has.
pub fn probe(link: &Link, subject: &str, timeout: Duration) -> Result<Vec<u8>, Error> {
    link.put_now(subject, NEVER, &[], timeout)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::streams::{StreamConfig, StreamState};

    #[test]
    fn wildcards_stand_for_tokens() {
        for (pattern, subject, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.c", false),
            ("a.b", "a", false),
            ("a.b", "a.b.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("*", "a", true),
            ("*", "a.b", false),
            (">", "a", true),
            (">", "a.b", true),
            ("a.>", "a", false),
            ("a.>", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "ab.c", false),
            ("a.*.>", "a.b", false),
            ("a.*.>", "a.b.c", true),
            ("a.>.c", "a.b.c", false),
            ("A.b", "a.b", false),
        ] {
            assert_eq!(matches(pattern, subject), expected, "{pattern} {subject}");
            let routes = Routes::new(&[stream(&[pattern])]);
            assert_eq!(
                routes.route(subject),
                expected.then_some(0),
                "{pattern} {subject}"
            );
        }
    }

    fn stream(subjects: &[&str]) -> StreamInfo {
        StreamInfo {
            config: StreamConfig {
                subjects: subjects.iter().map(ToString::to_string).collect(),
                ..StreamConfig::default()
            },
            state: StreamState::default(),
            created: String::new(),
            ts: String::new(),
            domain: String::new(),
        }
    }

    #[test]
    fn each_subject_goes_to_the_stream_that_captures_it() {
        let routes = Routes::new(&[
            stream(&["events.account.>"]),
            stream(&[]),
            stream(&["events.order.*", "events.order.*.x"]),
        ]);
        for (subject, expected) in [
            ("events.account.1", Some(0)),
            ("events.account.1.2", Some(0)),
            ("events.account", None),
            ("events.order.7", Some(2)),
            ("events.order.7.x", Some(2)),
            ("events.order.7.y", None),
            ("events.other", None),
        ] {
            assert_eq!(routes.route(subject), expected, "{subject}");
        }
        assert_eq!(Routes::default().route("a"), None);
    }

    #[test]
    fn each_subject_has_the_size_limit_of_its_stream() {
        let limited = |subject, max_msg_size| {
            let mut stream = stream(&[subject]);
            stream.config.max_msg_size = max_msg_size;
            stream
        };
        let routes = Routes::new(&[
            limited("a.>", -1),
            limited("b.>", 100),
            limited("c.>", 0),
            limited("d.>", 50),
        ]);
        for (subject, expected) in [
            ("a.1", None),
            ("b.1", Some(100)),
            ("c.1", None),
            ("d.1", Some(50)),
            ("e.1", None),
        ] {
            assert_eq!(routes.max_msg_size(subject), expected, "{subject}");
        }
    }
}
