//! Whether the account has room for what comes, and for what is still to be created.
//!
//! Its limits are one set, or, where its token says so (`tiered_limits`), one for each number of replicas, `R1`,
//! `R3`. What a tier holds counts all replicas, its limit one of them, as nats-server itself compares the two.

use super::{Bucket, Facts, Park};
use crate::admin::bytes;
use crate::admin::check::finding::{Finding, fail, ok, warn};
use crate::config::Config;
use serde::Deserialize;
use std::collections::BTreeMap;

/// What the account holds, and may hold: `$JS.API.INFO`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Account {
    /// Without the meaning of its limits, if there are tiers.
    #[serde(flatten)]
    pub whole: Usage,
    /// By `R1`, `R3`; empty when one set of limits is for all.
    pub tiers: BTreeMap<String, Usage>,
}

/// Of the account, or of its streams of so many replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Bytes in files.
    pub storage: u64,
    /// How many there are.
    pub streams: i64,
    /// What there may be.
    pub limits: Limits,
}

/// −1: no limit.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Bytes in files.
    pub max_storage: i64,
    /// How many there may be.
    pub max_streams: i64,
    /// A stream without `max_bytes` is refused.
    pub max_bytes_required: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_storage: -1,
            max_streams: -1,
            max_bytes_required: false,
        }
    }
}

const NAME: &str = "nats.account";

/// Warns before it is full, and fails when it is too full for what is missing.
pub fn judge(facts: &Facts, _: &Config) -> Vec<Finding> {
    let account = match &facts.account {
        None => return Vec::new(),
        // the relay does without, so it is no reason to ask for the permission
        Some(Err(error)) => {
            return vec![ok(
                NAME,
                format!("its limits are not told to this user: {error}"),
            )];
        }
        Some(Ok(account)) => account,
    };
    let parts = account.parts();
    let wanted = i64::from(facts.streams.as_ref().is_ok_and(Vec::is_empty))
        + i64::from(facts.park == Some(Park::Missing));
    let missing = wanted + i64::from(facts.bucket == Bucket::Missing);
    // without the bucket the relay goes on
    let judge = |found: String, why: &str, fix: &str| match wanted {
        0 => warn(NAME, found, why, fix),
        _ => fail(NAME, found, why, fix),
    };
    let each = |told: &dyn Fn(&Part<'_>) -> String| {
        let parts: Vec<String> = parts.iter().map(told).collect();
        parts.join("; ")
    };
    let mut findings = Vec::new();
    // which tier they will be of is not known: one that takes them is enough
    if missing > 0 && parts.iter().all(|part| !part.takes(missing)) {
        let taken = each(&|part| {
            let Usage {
                streams, limits, ..
            } = part.usage;
            format!("{}{streams} of {} streams", part.name, limits.max_streams)
        });
        findings.push(judge(
            format!("{taken} are taken, and {missing} more must be created (a bucket is a stream)"),
            "JetStream refuses to create them",
            "raise max_streams of the account, or delete a stream that nobody needs",
        ));
    }
    if missing > 0 && (parts.iter()).all(|part| part.usage.limits.max_bytes_required) {
        findings.push(judge(
            "the account asks for max_bytes of each stream (max_bytes_required)".to_string(),
            "JetStream refuses a stream without it",
            "jetstream-outbox setup -max-bytes 10GB, or as much as the streams are to hold",
        ));
    }
    findings.extend(parts.iter().filter_map(nearly_full));
    if findings.is_empty() {
        let found = each(&|part| {
            let Usage {
                storage,
                streams,
                limits,
            } = part.usage;
            let most = part.most().map_or("no limit".into(), bytes);
            let most_streams = match limits.max_streams {
                most @ 0.. => most.to_string(),
                _ => "no limit".into(),
            };
            format!(
                "{}{} in files of {most}, {streams} streams of {most_streams}",
                part.name,
                bytes(*storage)
            )
        });
        findings.push(ok(NAME, found));
    }
    findings
}

fn nearly_full(part: &Part<'_>) -> Option<Finding> {
    let storage = part.usage.storage;
    let most = part.most().filter(|most| storage > most / 10 * 8)?;
    Some(warn(
        NAME,
        format!(
            "{}its files take {} of {}",
            part.name,
            bytes(storage),
            bytes(most)
        ),
        "at the limit JetStream refuses events, and the relay waits while Postgres keeps the log",
        "raise max_file of the account (in its token: disk_storage), or let its streams drop what is old: \
         nats stream edit ... --max-age=...",
    ))
}

/// What one set of limits is for.
struct Part<'a> {
    /// `tier R3: `; nothing for the whole account.
    name: String,
    /// How often the limit of its files is there.
    replicas: u64,
    usage: &'a Usage,
}

impl Account {
    fn parts(&self) -> Vec<Part<'_>> {
        if self.tiers.is_empty() {
            return vec![Part {
                name: String::new(),
                replicas: 1,
                usage: &self.whole,
            }];
        }
        let tiers = self.tiers.iter().map(|(tier, usage)| Part {
            name: format!("tier {tier}: "),
            replicas: tier.trim_start_matches('R').parse().unwrap_or(1),
            usage,
        });
        tiers.collect()
    }
}

impl Part<'_> {
    /// Bytes in files; `None`: no limit.
    fn most(&self) -> Option<u64> {
        let most = u64::try_from(self.usage.limits.max_storage).ok()?;
        Some(most.saturating_mul(self.replicas))
    }

    fn takes(&self, more: i64) -> bool {
        let most = self.usage.limits.max_streams;
        most < 0 || self.usage.streams.saturating_add(more) <= most
    }
}
