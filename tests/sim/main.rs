//! The simulator: the real core between a model Postgres and a model JetStream, with faults, by seed.
//!
//! After each step: every event stands in its stream once, in commit order and without holes; nothing is confirmed
//! that was not received, is not stored, or is younger than the hold-back. Once the faults are over, everything is stored
//! and confirmed within a bounded time, and nothing has halted.
//!
//! What excludes each other in one run is not promised together, see `world::Kind`: in a replicated stream that others write
//! to, order is not kept where their messages fall into the middle of a window (but nothing is missing or twice);
//! roll-backs do not meet consumed or foreign messages, the checkpoint's bucket goes back alone or as the streams do,
//! messages of others that come and go unseen do so while nothing of ours is on its way;
//! no copy of a publish arrives that is late by a roll-back, ids are not reused where late copies arrive, and on a replicated
//! stream no copy of a publish arrives that is late by a whole failover. A run whose slot was moved by somebody else may
//! end in the halt that is due then; no other run may halt.
//!
//! `SIM_SEEDS=n` and `SIM_FIRST=n` choose other seeds, `SIM_SEED=n` one alone, with its trace.

mod model;
mod rules;
mod world;

use rules::Rule;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Seeds that once failed.
const REGRESSIONS: &[u64] = &[
    9, 13, 25, 131, 538, 1063, 1529, 2315, 3355, 6108, 24345, 33733, 37929, 170135, 5027497,
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What broke, and the trace up to there. A panic of the core has no trace.
fn failure(seed: u64, off: Option<Rule>) -> Option<(String, Vec<String>)> {
    match catch_unwind(AssertUnwindSafe(|| world::run(seed, off))) {
        Ok((Ok(()), _)) => None,
        Ok((Err(why), trace)) => Some((why, trace)),
        Err(_) => Some(("panicked".to_string(), Vec::new())),
    }
}

/// Fails with the shortest trace of those seeds that fail.
fn check(seeds: impl Iterator<Item = u64>) {
    let failures = seeds.filter_map(|seed| Some((seed, failure(seed, None)?)));
    let failures: Vec<_> = failures.take(20).collect();
    let shortest = failures.iter().min_by_key(|(_, (_, trace))| trace.len());
    if let Some((seed, (why, trace))) = shortest {
        for (seed, (why, _)) in &failures {
            println!("SIM_SEED={seed}: {why}");
        }
        panic!("{}\nSIM_SEED={seed}: {why}", trace.join("\n"));
    }
}

#[test]
fn every_event_once_and_in_order_whatever_fails() {
    if let Some(seed) = number("SIM_SEED") {
        let (outcome, trace) = world::run(seed, None);
        println!("{}\n{outcome:?}", trace.join("\n"));
        return check(std::iter::once(seed));
    }
    let first = number("SIM_FIRST").unwrap_or(0);
    let seeds = first..first + number("SIM_SEEDS").unwrap_or(10_000);
    check(REGRESSIONS.iter().copied().chain(seeds));
}

#[test]
fn every_rule_is_needed() {
    let mut unnoticed = Vec::new();
    for rule in rules::ALL {
        let found = (0..10_000).find_map(|seed| Some((seed, failure(seed, Some(rule))?.0)));
        match found {
            Some((seed, why)) => {
                println!("{:>14} {:>5} seeds: {why}", format!("{rule:?}"), seed + 1)
            }
            None => unnoticed.push(rule),
        }
    }
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}
