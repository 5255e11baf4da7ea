//! Whether a stream can carry the promises, from its configuration. Pure.

use super::Delivery;
use super::streams::{StreamConfig, StreamInfo};
use crate::nats::info::ServerInfo;

/// The first release whose replicated streams neither answer false duplicates nor poison refused ids.
const REPLICATED: (u32, u32) = (2, 12);
/// The first release that still knows its last sequence after it has refused a lifetime. 2.11 counts the refused
/// message, so the next one passes the fence (measured: 2.11.11).
const LIFETIMES: (u32, u32) = (2, 12);

/// What the streams are wanted for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// What is promised.
    pub delivery: Delivery,
    /// Events bear a `Nats-TTL` that was in the row.
    pub lifetimes: bool,
}

/// What the configuration of a stream means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preflight {
    /// It cannot carry the promises: why, and what to do.
    pub refused: Option<String>,
    /// It can, within limits an operator should know.
    pub warnings: Vec<String>,
}

/// Judges a stream on a server.
pub fn preflight(info: &StreamInfo, server: &ServerInfo, wanted: Wanted) -> Preflight {
    Preflight {
        refused: refusal(&info.config, server, wanted)
            .map(|why| format!("check the stream: {} {why}", info.config.name)),
        warnings: warnings(info, server, wanted.delivery),
    }
}

/// Why it cannot carry the promises, and what to do.
fn refusal(config: &StreamConfig, server: &ServerInfo, wanted: Wanted) -> Option<String> {
    let exactly_once = wanted.delivery == Delivery::ExactlyOnce;
    let transform = config.subject_transform.as_ref();
    if config.no_ack {
        return Some("acknowledges nothing (no_ack), so nothing can be known to be stored; set no_ack to false".into());
    }
    if config.sealed {
        return Some(
            "is sealed, so nothing can be added; name another stream's subjects with -prefix"
                .into(),
        );
    }
    if config.allow_msg_counter {
        return Some(
            "counts (allow_msg_counter), so it takes numbers and no events; name another stream's subjects with -prefix".into(),
        );
    }
    if config.persist_mode == "async" {
        return Some(
            "acknowledges before it has written (persist_mode async), so acknowledged events can be lost; use the default \
             mode"
                .into(),
        );
    }
    if exactly_once && transform.is_some_and(|transform| !transform.dest.is_empty()) {
        return Some(
            "stores events under other subjects (subject_transform), so they are not found when it is read back; take the \
             transform out, or pass -delivery at-least-once"
                .into(),
        );
    }
    if exactly_once && config.num_replicas > 1 && release(&server.version) < REPLICATED {
        return Some(format!(
            "is replicated on nats-server {}, which answers false duplicates (2.10) and blocks refused ids (2.10, 2.11); \
             upgrade the servers to 2.12, use one replica, or pass -delivery at-least-once",
            server.version
        ));
    }
    if exactly_once
        && wanted.lifetimes
        && config.allow_msg_ttl
        && release(&server.version) < LIFETIMES
    {
        return Some(format!(
            "takes lifetimes (allow_msg_ttl) on nats-server {}, which lets the next events in behind one whose Nats-TTL it \
             refuses, so that one would be lost; upgrade the server to 2.12, map no column to Nats-TTL, or pass -delivery \
             at-least-once",
            server.version
        ));
    }
    None
}

/// What an operator should know of a stream that can be used.
fn warnings(info: &StreamInfo, server: &ServerInfo, delivery: Delivery) -> Vec<String> {
    let config = &info.config;
    let mut warnings = Vec::new();
    if config.retention == "interest" && info.state.consumer_count == 0 {
        warnings.push(
            "it has interest retention and no consumer: it drops each event as soon as it is stored".into(),
        );
    }
    if config.storage == "memory" {
        warnings.push("it is kept in memory: a restart of the server loses it".into());
    }
    // one that is alone with its leaf nodes calls itself a cluster, by its own name
    let in_cluster = (server.cluster.as_ref()).is_some_and(|name| *name != server.server_name);
    if config.num_replicas == 1 && in_cluster {
        warnings.push(
            "it has one replica in a cluster: while its server is away the relay waits, and with its disk it is lost".into(),
        );
    }
    let full = config.max_msgs > 0 || config.max_bytes > 0;
    let per_subject = config.max_msgs_per_subject > 0;
    if config.discard == "new" {
        if full || per_subject && config.discard_new_per_subject {
            warnings.push("it refuses new messages at its limit (discard new): the relay then waits until there is room".into());
        }
    } else if full {
        warnings.push(
            "it drops its oldest messages at its limit (max_msgs or max_bytes, discard old), consumed or not".into(),
        );
    }
    if let Ok(limit @ 1..) = usize::try_from(config.max_msg_size)
        && limit < server.max_payload
    {
        warnings.push(format!(
            "it takes messages of up to {limit} bytes with their headers (max_msg_size), the server {}: a larger event stops the relay",
            server.max_payload
        ));
    }
    if config.duplicate_window == 0 && delivery == Delivery::AtLeastOnce {
        warnings.push(
            "it does not look for duplicates (duplicate_window 0): repeats will stand in it".into(),
        );
    }
    warnings
}

/// Major and minor; 0 where the text has none.
pub(super) fn release(version: &str) -> (u32, u32) {
    let mut numbers = version.split('.').map(|word| word.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::streams::{StreamState, SubjectTransform};
    use Delivery::*;

    fn stream() -> StreamConfig {
        StreamConfig {
            name: "EV".into(),
            storage: "file".into(),
            discard: "old".into(),
            num_replicas: 1,
            max_msgs: -1,
            max_bytes: -1,
            max_msg_size: -1,
            max_msgs_per_subject: -1,
            duplicate_window: 1,
            ..StreamConfig::default()
        }
    }

    fn judge(config: StreamConfig, version: &str, cluster: &str, delivery: Delivery) -> Preflight {
        // a test's way to ask for a consumer
        let consumer_count = u64::from(config.max_msgs_per_subject == 7);
        let info = StreamInfo {
            config,
            state: StreamState {
                consumer_count,
                ..StreamState::default()
            },
            created: String::new(),
            ts: String::new(),
            domain: String::new(),
        };
        let server = format!(
            r#"{{"version": "{version}", "max_payload": 1000, "cluster": {}}}"#,
            if cluster.is_empty() { "null" } else { cluster }
        );
        let wanted = Wanted {
            delivery,
            lifetimes: true,
        };
        preflight(&info, &serde_json::from_str(&server).unwrap(), wanted)
    }

    #[track_caller]
    fn refuses(config: StreamConfig, version: &str, delivery: Delivery, refused: Option<&str>) {
        let found = judge(config, version, "", delivery);
        assert_eq!(found.warnings, [""; 0]);
        match (refused, &found.refused) {
            (None, None) => {}
            (Some(word), Some(why)) => assert!(why.contains(word) && why.contains("EV"), "{why}"),
            _ => panic!("{found:?}"),
        }
    }

    #[test]
    fn what_cannot_carry_the_promise_is_refused() {
        refuses(stream(), "2.10.1", ExactlyOnce, None);
        for delivery in [ExactlyOnce, AtLeastOnce] {
            let no_ack = StreamConfig {
                no_ack: true,
                ..stream()
            };
            refuses(no_ack, "2.15.1", delivery, Some("no_ack"));
            let sealed = StreamConfig {
                sealed: true,
                ..stream()
            };
            refuses(sealed, "2.15.1", delivery, Some("sealed"));
            let counts = StreamConfig {
                allow_msg_counter: true,
                ..stream()
            };
            refuses(counts, "2.15.1", delivery, Some("allow_msg_counter"));
            let fast = StreamConfig {
                persist_mode: "async".into(),
                ..stream()
            };
            refuses(fast, "2.15.1", delivery, Some("async"));
        }
        let transformed = |dest: &str| StreamConfig {
            subject_transform: Some(SubjectTransform {
                dest: dest.into(),
                ..SubjectTransform::default()
            }),
            ..stream()
        };
        refuses(transformed("x.>"), "2.15.1", ExactlyOnce, Some("transform"));
        refuses(transformed("x.>"), "2.15.1", AtLeastOnce, None);
        refuses(transformed(""), "2.15.1", ExactlyOnce, None);
        for (version, refused) in [
            ("2.10.25", Some("2.12")),
            ("2.11.0", Some("2.12")),
            ("2.12.0", None),
            ("2.15.1", None),
            ("3.0", None),
        ] {
            let replicated = || StreamConfig {
                num_replicas: 3,
                ..stream()
            };
            refuses(replicated(), version, ExactlyOnce, refused);
            refuses(replicated(), version, AtLeastOnce, None);
            let with_lifetimes = || StreamConfig {
                allow_msg_ttl: true,
                ..stream()
            };
            refuses(with_lifetimes(), version, ExactlyOnce, refused);
            refuses(with_lifetimes(), version, AtLeastOnce, None);
        }
    }

    #[track_caller]
    fn warns(config: StreamConfig, cluster: &str, delivery: Delivery, word: Option<&str>) {
        let found = judge(config, "2.15.1", cluster, delivery);
        assert_eq!(found.refused, None);
        match (word, &found.warnings[..]) {
            (None, []) => {}
            (Some(word), [warning]) => assert!(warning.contains(word), "{warning}"),
            _ => panic!("{word:?} {found:?}"),
        }
    }

    #[test]
    fn what_has_limits_is_warned_of() {
        let limit = |discard: &str, max_msgs, max_bytes, max_msgs_per_subject| StreamConfig {
            discard: discard.into(),
            max_msgs,
            max_bytes,
            max_msgs_per_subject,
            ..stream()
        };
        let refuses_per_subject = StreamConfig {
            discard_new_per_subject: true,
            ..limit("new", -1, -1, 5)
        };
        let of_size = |max_msg_size| StreamConfig {
            max_msg_size,
            ..stream()
        };
        let in_memory = StreamConfig {
            storage: "memory".into(),
            ..stream()
        };
        let interest = |max_msgs_per_subject| StreamConfig {
            retention: "interest".into(),
            max_msgs_per_subject,
            ..stream()
        };
        for (config, word) in [
            (stream(), None),
            (in_memory, Some("memory")),
            (interest(-1), Some("no consumer")),
            // see `judge`
            (interest(7), None),
            (limit("new", 5, -1, -1), Some("discard new")),
            (limit("new", -1, 5, -1), Some("discard new")),
            (limit("new", -1, -1, 5), None),
            (refuses_per_subject, Some("discard new")),
            (limit("new", -1, -1, -1), None),
            (limit("old", 5, -1, -1), Some("discard old")),
            (limit("old", -1, 5, -1), Some("discard old")),
            (limit("old", -1, -1, 5), None),
            (of_size(999), Some("up to 999 bytes")),
            (of_size(1000), None),
            (of_size(0), None),
        ] {
            warns(config, "", ExactlyOnce, word);
        }
        warns(stream(), r#""C""#, ExactlyOnce, Some("one replica"));
        let replicated = StreamConfig {
            num_replicas: 3,
            ..stream()
        };
        warns(replicated, r#""C""#, ExactlyOnce, None);
        let forgetful = || StreamConfig {
            duplicate_window: 0,
            ..stream()
        };
        warns(forgetful(), "", AtLeastOnce, Some("duplicate_window"));
        warns(forgetful(), "", ExactlyOnce, None);
    }
}
