//! The simulator: the production machines between a model Postgres and a model JetStream, with faults and the acts of
//! operators, by seed. `relay.rs` is the relay, as thin as can be around the machines; `postgres.rs` and `nats.rs` are the
//! servers, `operator.rs` what happens to them, `world.rs` the promises.
//!
//! At each step: no event is in two places (but where it was deleted or lost before), in each unreplicated stream events
//! come in order, what comes after a later event is marked late, nothing at or before the record's anchor is published, nothing
//! is dropped whose id is its own, nothing is put aside that neither server nor stream refuses; nothing is confirmed that was not received, is not stored, or that the record does not tell.
//! In most seeds the relays mark the end of a transaction: no mark has a wrong count, and no event of the transaction comes after it, but
//! where its topic was moved, its flags were changed, its message was gone or its id was another's; and each transaction has its
//! marks, if nothing has come between.
//! Once the faults are over everything committed is stored and confirmed within a bounded time. A run halts only if that is
//! due: Postgres was restored or cloned, the slot was moved, another stream answers. In a quarter of the seeds the operator then
//! passes `-resume-anyway`, as he is told, and all of it holds on, but for what he has accepted.
//!
//! What is beyond the proof, and left out: a replicated stream loses something only with all its servers, and then the
//! connection too; a crashed server answers nothing for two seconds; publishes arrive at most 50 s late, within the
//! deduplication window; a topic with such publishes on their way is not moved back; Postgres is not restored or promoted once more
//! before the relay has seen it; without a record, a stream that has left the prefix is not found; a stream that has left the
//! prefix does not lose its end; where `created` of a stream changes by itself, and something was deleted or lost, a halt is no
//! fault; flags are changed while nothing is on its way, and not with a bucket that was lost or put back; and
//! who has changed what Postgres sends halts where a stream has lost something since, and does not put Postgres back.
//!
//! `SIM_SEEDS=n` and `SIM_FIRST=n` choose other seeds, `SIM_SEED=n` one alone, with its trace; `SIM_RULE=n` one rule.

mod at_least_once;
mod nats;
mod operator;
mod postgres;
mod relay;
mod world;

use jetstream_outbox::relay::core::rules::{self, Rule};

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::Ended;

/// Seeds that once failed, beyond the first ten thousand.
const REGRESSIONS: &[u64] = &[
    10082, 10771, 11809, 13888, 15063, 15609, 15812, 18640, 19271, 19481, 19554, 19881, 20229,
    20231, 20920, 22080, 24514, 25963, 27337, 27370, 28603, 29488, 36741, 17890, 407969, 413920,
    3103527, 910035762, 920003938, 920021757,
];

/// Those that notice a rule which none of the first three thousand needs.
const NOTICES: &[u64] = &[11841, 3589];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn run(seed: u64, off: Option<Rule>) -> Result<Ended, String> {
    match catch_unwind(AssertUnwindSafe(|| world::run(seed, off, false))) {
        Ok((outcome, _)) => outcome,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|it| it.to_string()));
            Err(format!("panicked: {}", text.unwrap_or_default()))
        }
    }
}

/// The beginning of what happened, so that equal failures are counted together.
fn kind(why: &str) -> String {
    let words = why.split_whitespace();
    let words = words.map(|word| match word.contains(|c: char| c.is_ascii_digit()) {
        true => "#",
        false => word,
    });
    words.take(9).collect::<Vec<_>>().join(" ")
}

#[test]
fn every_event_once_and_in_order_whatever_fails() {
    if let Some(seed) = number("SIM_SEED") {
        println!(
            "{:?}",
            catch_unwind(|| {
                let (outcome, trace) = world::run(seed, None, true);
                println!("{}\n{outcome:?}", trace.join("\n"));
            })
            .is_ok()
        );
        return;
    }
    let first = number("SIM_FIRST").unwrap_or(0);
    let seeds = first..first + number("SIM_SEEDS").unwrap_or(10_000);
    let seeds = REGRESSIONS.iter().copied().chain(seeds);
    let mut failures: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut ended: BTreeMap<String, u64> = BTreeMap::new();
    for seed in seeds {
        match run(seed, None) {
            Ok(Ended::AllStored) => *ended.entry("all stored".into()).or_default() += 1,
            Ok(Ended::Halted(why)) => {
                *ended.entry(format!("halted: {}", kind(&why))).or_default() += 1
            }
            Err(why) => failures.entry(kind(&why)).or_default().push(seed),
        }
    }
    println!("{ended:#?}");
    for (why, seeds) in &failures {
        println!(
            "{:>6} {why}: {:?}",
            seeds.len(),
            seeds.iter().take(6).collect::<Vec<_>>()
        );
    }
    assert!(failures.is_empty());
}

#[test]
fn at_least_once_loses_nothing() {
    for seed in 0..2_000 {
        let outcome = at_least_once::run(seed);
        assert_eq!(outcome, Ok(()), "seed {seed}");
    }
}

#[test]
fn every_rule_is_needed() {
    let mut unnoticed = Vec::new();
    let only = number("SIM_RULE");
    let chosen = |rule: &Rule| only.is_none_or(|only| only == *rule as u64);
    let first = number("SIM_FIRST").unwrap_or(0);
    let seeds = first..first + number("SIM_SEEDS").unwrap_or(3_000);
    let seeds = NOTICES.iter().copied().chain(seeds);
    for rule in rules::ALL.into_iter().filter(chosen) {
        let found = seeds
            .clone()
            .find_map(|seed| Some((seed, run(seed, Some(rule)).err()?)));
        match found {
            Some((seed, why)) => println!("R{:<2} {rule:?}: seed {seed}: {why}", rule as u8),
            None => unnoticed.push(rule),
        }
    }
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}
