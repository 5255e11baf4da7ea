//! Minor versions with known faults of logical decoding, that a later one has repaired.
//!
//! Source: the release notes of 17.5 and 17.6 (May and August 2025), whose entries name the commits of all branches:
//! <https://www.postgresql.org/docs/release/17.5/>, <https://www.postgresql.org/docs/release/17.6/>.

use super::{Facts, Finding, ok, warn};
use crate::config::Config;

/// A fault of the minors from `since` on and before `repaired`, of one major version.
struct Fault {
    /// The first with the fault, as `server_version_num`.
    since: u32,
    /// The first without it.
    repaired: u32,
    what: &'static str,
}

const STALE_CATALOG: &str = "rows may be lost when ALTER PUBLICATION or ALTER TABLE runs beside an open transaction that has \
                             written to the table";
const MULTIPLIED: &str = "statements like ALTER PUBLICATION beside open transactions may end decoding for good with \"invalid \
                          memory alloc request size\"";
const PARTIAL_RECORD: &str = "after a crash of the server decoding may wait for ever at a WAL record that was written in part";

/// Of each branch the minors of May 2025, which repaired the first fault and brought the second, and of August, which
/// repaired the other two.
const BRANCHES: [(u32, u32, u32); 5] = [
    (13, 21, 22),
    (14, 18, 19),
    (15, 13, 14),
    (16, 9, 10),
    (17, 5, 6),
];

/// The faults of one branch.
fn faults((major, may, august): (u32, u32, u32)) -> [Fault; 3] {
    let first = major * 10_000;
    let fault = |since, repaired, what| Fault {
        since,
        repaired,
        what,
    };
    [
        fault(first, first + may, STALE_CATALOG),
        fault(first + may, first + august, MULTIPLIED),
        fault(first, first + august, PARTIAL_RECORD),
    ]
}

/// Warns of a minor version with a known fault.
pub fn rule(facts: &Facts, _: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.version";
    let version = facts.version;
    let text = &facts.version_text;
    if version < 130_000 {
        return vec![warn(
            NAME,
            format!("Postgres {text} gets no repairs any more"),
            STALE_CATALOG,
            "upgrade to a supported major version",
        )];
    }
    let known = BRANCHES.into_iter().flat_map(faults);
    let known = known.filter(|fault| (fault.since..fault.repaired).contains(&version));
    let known: Vec<Fault> = known.collect();
    let Some(repaired) = known.iter().map(|fault| fault.repaired).max() else {
        return vec![ok(
            NAME,
            format!("no fault of logical decoding is known of {text}"),
        )];
    };
    let whats: Vec<&str> = known.iter().map(|fault| fault.what).collect();
    vec![warn(
        NAME,
        format!("Postgres {text} has known faults of logical decoding"),
        whats.join("; "),
        format!(
            "update to {}.{} or later",
            repaired / 10_000,
            repaired % 10_000
        ),
    )]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::preflight::{Level, tests::config};

    #[test]
    fn a_minor_with_a_known_fault_is_warned_of() {
        for (version, parts) in [
            (120_022, &["gets no repairs"][..]),
            (150_012, &["rows may be lost", "wait for ever", "15.14"]),
            (150_013, &["memory alloc", "wait for ever", "15.14"]),
            (150_014, &[]),
            (150_018, &[]),
            (170_004, &["rows may be lost", "17.6"]),
            (170_010, &[]),
            (180_000, &[]),
            (190_000, &[]),
        ] {
            let facts = Facts {
                version,
                ..Facts::default()
            };
            let finding = rule(&facts, &config(&[])).remove(0);
            assert_eq!(finding.level == Level::Ok, parts.is_empty(), "{finding}");
            for part in parts {
                assert!(finding.to_string().contains(part), "{part}: {finding}");
            }
        }
    }
}
