//! Whether a stream can carry the promises, from its configuration. Pure.

use super::Delivery;
use super::streams::StreamInfo;

/// The first release whose replicated streams neither answer false duplicates nor poison refused ids.
const REPLICATED: (u32, u32) = (2, 12);

/// What the configuration of a stream means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preflight {
    /// It cannot carry the promises: why, and what to do.
    pub refused: Option<String>,
    /// It can, within limits an operator should know.
    pub warnings: Vec<String>,
}

/// Judges a stream on a server of `version` (such as `2.12.3`).
pub fn preflight(info: &StreamInfo, version: &str, delivery: Delivery) -> Preflight {
    let config = &info.config;
    let name = &config.name;
    let refused = if config.no_ack {
        Some("acknowledges nothing (no_ack), so nothing can be known to be stored; set no_ack to false".to_string())
    } else if config.sealed {
        Some(
            "is sealed, so nothing can be added; name another stream's subjects with -prefix"
                .to_string(),
        )
    } else if config.persist_mode == "async" {
        Some(
            "acknowledges before it has written (persist_mode async), so acknowledged events can be lost; use the default \
             mode"
                .to_string(),
        )
    } else if delivery == Delivery::ExactlyOnce
        && config.num_replicas > 1
        && release(version) < REPLICATED
    {
        Some(format!(
            "is replicated on nats-server {version}, which answers false duplicates (2.10) and blocks refused ids (2.10, 2.11); \
             upgrade the servers to 2.12, use one replica, or pass -delivery at-least-once"
        ))
    } else {
        None
    };
    let mut warnings = Vec::new();
    if config.storage == "memory" {
        warnings.push("it is kept in memory: a restart of the server loses it".to_string());
    }
    if config.discard == "new" && (config.max_msgs > 0 || config.max_bytes > 0) {
        warnings.push("it refuses new messages at its limit (discard new): the relay then waits until there is room".to_string());
    }
    if config.duplicate_window == 0 && delivery == Delivery::AtLeastOnce {
        warnings.push(
            "it does not look for duplicates (duplicate_window 0): repeats will stand in it"
                .to_string(),
        );
    }
    Preflight {
        refused: refused.map(|why| format!("check the stream: {name} {why}")),
        warnings,
    }
}

/// Major and minor; 0 where the text has none.
fn release(version: &str) -> (u32, u32) {
    let mut numbers = version.split('.').map(|word| word.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::streams::{StreamConfig, StreamState};

    fn check(
        config: StreamConfig,
        version: &str,
        delivery: Delivery,
        refused: Option<&str>,
        warnings: usize,
    ) {
        let config = StreamConfig {
            name: "EV".into(),
            ..config
        };
        let info = StreamInfo {
            config,
            state: StreamState::default(),
            created: String::new(),
            ts: String::new(),
        };
        let found = preflight(&info, version, delivery);
        assert_eq!(found.warnings.len(), warnings, "{found:?}");
        match (refused, &found.refused) {
            (None, None) => {}
            (Some(word), Some(why)) => assert!(why.contains(word) && why.contains("EV"), "{why}"),
            _ => panic!("{found:?}"),
        }
    }

    #[test]
    fn what_cannot_carry_the_promise_is_refused() {
        use Delivery::*;
        let base = || StreamConfig {
            storage: "file".into(),
            num_replicas: 1,
            duplicate_window: 1,
            ..StreamConfig::default()
        };
        check(base(), "2.10.1", ExactlyOnce, None, 0);
        check(
            StreamConfig {
                no_ack: true,
                ..base()
            },
            "2.15.1",
            AtLeastOnce,
            Some("no_ack"),
            0,
        );
        check(
            StreamConfig {
                sealed: true,
                ..base()
            },
            "2.15.1",
            AtLeastOnce,
            Some("sealed"),
            0,
        );
        check(
            StreamConfig {
                persist_mode: "async".into(),
                ..base()
            },
            "2.15.1",
            ExactlyOnce,
            Some("async"),
            0,
        );
        for (version, refused) in [
            ("2.10.25", Some("2.12")),
            ("2.11.0", Some("2.12")),
            ("2.12.0", None),
            ("2.15.1", None),
            ("3.0", None),
        ] {
            check(
                StreamConfig {
                    num_replicas: 3,
                    ..base()
                },
                version,
                ExactlyOnce,
                refused,
                0,
            );
            check(
                StreamConfig {
                    num_replicas: 3,
                    ..base()
                },
                version,
                AtLeastOnce,
                None,
                0,
            );
        }
        check(
            StreamConfig {
                storage: "memory".into(),
                ..base()
            },
            "2.15.1",
            ExactlyOnce,
            None,
            1,
        );
        check(
            StreamConfig {
                discard: "new".into(),
                max_msgs: 5,
                ..base()
            },
            "2.15.1",
            ExactlyOnce,
            None,
            1,
        );
        check(
            StreamConfig {
                discard: "new".into(),
                max_msgs: -1,
                ..base()
            },
            "2.15.1",
            ExactlyOnce,
            None,
            0,
        );
        check(
            StreamConfig {
                duplicate_window: 0,
                ..base()
            },
            "2.15.1",
            AtLeastOnce,
            None,
            1,
        );
    }
}
