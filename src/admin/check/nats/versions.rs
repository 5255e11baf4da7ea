//! Versions of nats-server with known faults that can cost a stream.

use super::{Facts, Finding, ok, warn};
use crate::config::Config;

/// Exactly these: the fault came with the minor, and the next repaired it.
///
/// Source: <https://github.com/nats-io/nats-server/pull/8449>.
const DELETES_AFTER_CREATE: [&str; 2] = ["2.14.4", "2.12.14"];

/// Warns of a version with a known fault.
pub fn judge(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "nats.version";
    let version = facts.info.version.as_str();
    let core = version.split('-').next().unwrap_or(version);
    if DELETES_AFTER_CREATE.contains(&core) {
        return vec![warn(
            NAME,
            format!("nats-server {version} has a known fault"),
            "in a cluster a STREAM.CREATE of a stream that is there, which changes nothing, can have a server that was down \
             delete it later",
            format!("update nats-server to a later version than {core}"),
        )];
    }
    vec![ok(NAME, format!("no fault of {version} is known"))]
}

#[cfg(test)]
mod tests {
    use super::super::tests::{config, good};
    use super::*;
    use crate::relay::preflight::Level;

    #[test]
    fn a_version_with_a_known_fault_is_warned_of() {
        for (version, part) in [
            ("2.10.25", ""),
            ("2.12.13", ""),
            ("2.12.14", "later version than 2.12.14"),
            ("2.12.15", ""),
            ("2.14.3", ""),
            ("2.14.4", "delete"),
            ("2.14.5", ""),
            ("2.14.6", ""),
            ("2.15.1", ""),
            ("2.14.4-RC.1", "delete"),
            ("nightly", ""),
        ] {
            let mut facts = good();
            facts.info.version = version.into();
            let finding = judge(&facts, &config(&[])).remove(0);
            assert_eq!(finding.level == Level::Ok, part.is_empty(), "{finding}");
            assert!(finding.to_string().contains(part), "{part}: {finding}");
        }
    }
}
