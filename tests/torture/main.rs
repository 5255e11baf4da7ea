//! The torture: everything fails at random while writers write, and the whole stream is judged at the end.
//!
//! Writers commit and roll back transactions of 1 to 5,000 rows side by side. Meanwhile the relay, its network,
//! nats-server and Postgres are killed, frozen, cut off, and put back, by a seeded generator, see [`faults`]; and each relay
//! is started with other flags of the same meaning. Then all is healed, and the stream must hold what Postgres' log says was
//! committed: each event once, in the order of the commits, with its payload; nothing may have been confirmed before it was
//! stored for the hold-back; and no relay may have ended but by our signals.
//!
//! A third setup has operators at work too, who move subjects between streams, split, merge, fill and delete these, and put
//! Postgres back to a snapshot or to clones of one, with foreign messages and a second service beside, see [`operators`]. There
//! each event must be in one message over all streams, in order in each, but for those that are marked as late; a relay may end
//! by the halts that an act makes due.
//!
//! `TORTURE_SECONDS` (by default as long as the tests can bear), `TORTURE_SEED`, and `TORTURE_ONLY` (part of the name of
//! the only faults that are wanted); scripts/torture sets them.

mod events;
mod faults;
mod fleet;
mod ledger;
mod operators;
mod service;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod world;
mod writers;

use faults::{Dealer, Fault, On};
use service::{
    Report, Running, SETTLE, Seen, Side, StopAll, catch_up, conclude, judge, judge_tail,
};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};
use support::process::{keep_folder, lock};
use support::wait::{pause, secs};
use world::{PREFIX, PREFIX_BESIDE, Setup, World};
use writers::{Bursts, WRITERS, WRITERS_BESIDE};

/// So long in the ordinary tests, where all run side by side.
const DEFAULT_SECONDS: u64 = 120;

#[test]
fn a_single_server_under_torture() {
    torture(false, false);
}

#[test]
fn a_cluster_under_torture() {
    torture(true, false);
}

/// `TORTURE_CLUSTER`: on a cluster.
#[test]
fn an_operator_under_torture() {
    torture(number("TORTURE_CLUSTER").is_some(), true);
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[track_caller]
fn torture(cluster: bool, operators: bool) {
    let setup = Setup { cluster, operators };
    let length = secs(number("TORTURE_SECONDS").unwrap_or(DEFAULT_SECONDS));
    let seed = number("TORTURE_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let only = std::env::var("TORTURE_ONLY").unwrap_or_default();
    // the servers are gone, and their logs not printed, before anything is said
    let (report, folder) = run(length, seed, setup, &only);
    print!("{}", report.text);
    if !report.clean {
        keep_folder(&folder);
        panic!(
            "seed {seed} broke a promise; the logs are in {}",
            folder.display()
        );
    }
    if number("TORTURE_KEEP").is_none() {
        std::fs::remove_dir_all(&folder).expect("remove the logs");
    }
}

/// A copy of the store is never so old that its repair needs what was confirmed; a cluster keeps what it acknowledged, so that
/// confirming at once must be safe.
fn hold_back(setup: Setup, length: Duration, seed: u64) -> Duration {
    match setup.cluster {
        false if length < secs(600) || seed.is_multiple_of(2) => secs(20),
        false => secs(150),
        true if seed.is_multiple_of(2) => Duration::ZERO,
        true => secs(2),
    }
}

fn run(length: Duration, seed: u64, setup: Setup, only: &str) -> (Report, std::path::PathBuf) {
    println!("torture of {length:?} on a {}, seed {seed}", setup.name());
    let world = World::start(setup);
    println!("logs in {}", world.folder.display());
    if number("TORTURE_KEEP").is_some() {
        keep_folder(&world.folder);
    }
    let hold_back = hold_back(setup, length, seed);
    let prefix = match seed % 4 {
        0..2 => PREFIX_BESIDE,
        _ => PREFIX,
    };
    let beside = setup.operators.then(|| world.beside(prefix));
    let worlds: Vec<&World> = std::iter::once(&world).chain(&beside).collect();
    // dropped with its relays before the report is read
    let text = {
        let is_shared = setup.operators && prefix == PREFIX;
        let sides = worlds
            .iter()
            .map(|world| Side::new(world, hold_back, is_shared));
        let sides: Vec<Side> = sides.collect();
        let sides: Vec<&Side> = sides.iter().collect();
        let mut text = format!(
            "torture of {length:?} on a {}, seed {seed}, hold-back {hold_back:?}\n",
            setup.name()
        );
        let (injected, seen) = run_rounds(&sides, Dealer::new(seed, setup, only), length, seed);
        for (fault, count) in &injected.faults {
            let _ = writeln!(text, "{count:8}  {fault}");
        }
        let _ = writeln!(text, "{:8}  rounds of faults", injected.rounds);
        for (side, seen) in sides.iter().zip(&seen) {
            judge(side, seen, &mut text);
        }
        if let Some(streams) = &world.streams {
            let _ = writeln!(text, "{:8}  foreign messages", streams.foreign());
        }
        text
    };
    let report = conclude(text, &worlds);
    world.note(&report.text);
    (report, world.folder.clone())
}

/// What was injected so far.
#[derive(Default)]
struct Injected {
    faults: BTreeMap<String, u64>,
    rounds: u64,
}

/// Rounds of faults until the time is over, then everything catches up; of each service what was seen.
fn run_rounds(
    sides: &[&Side],
    mut dealer: Dealer,
    length: Duration,
    seed: u64,
) -> (Injected, Vec<Seen>) {
    // of an hour, a million events are left
    let mut events_per_second = (1_000_000 / length.as_secs().max(1)).clamp(300, 800);
    let side = sides[0];
    let world = side.world;
    if world.streams.is_some() && world.jetstream.nodes().len() > 1 {
        // where others write to a replicated stream the relay publishes one event at a time
        events_per_second /= 4;
    }
    thread::scope(|scope| {
        let stop_all = StopAll(sides);
        let mut running = vec![Running::start(
            scope,
            side,
            0..WRITERS,
            seed,
            events_per_second,
        )];
        side.fleet.start(dealer.settings());
        if let Some(beside) = sides.get(1) {
            let rate = events_per_second / 8;
            running.push(Running::start(scope, beside, WRITERS_BESIDE, seed, rate));
            beside.fleet.start(dealer.settings());
        }
        let bursts = Bursts::new(&world.pg, &side.written);
        let on = On {
            world,
            fleet: &side.fleet,
            bursts: &bursts,
            written: &side.written,
            ledger: &side.ledger,
            beside: sides.get(1).map(|beside| &beside.fleet),
            hold_back: side.hold_back,
        };
        let injected = deal_rounds(sides, &on, &mut dealer, length);
        world.note("the faults are over");
        let mut answered: Vec<_> = (running.iter_mut().zip(sides))
            .map(|(running, side)| running.finish_writing(side))
            .collect();
        answered[0].push(bursts.answered());
        let target = lock(&side.ledger).events() as u64;
        catch_up(sides, &|| target);
        pause(SETTLE);
        let seen = (running.into_iter().zip(sides).zip(answered))
            .map(|((running, side), answered)| (answered, running.finish(side)))
            .collect();
        drop(stop_all);
        (injected, seen)
    })
}

/// Rounds until the time is over.
fn deal_rounds(sides: &[&Side], on: &On, dealer: &mut Dealer, length: Duration) -> Injected {
    let Side { world, written, .. } = sides[0];
    let committed = || written.committed.load(Ordering::Relaxed);
    let mut injected = Injected::default();
    let start = Instant::now();
    catch_up(sides, &|| committed() + 1);
    while start.elapsed() < length && !world.is_broken() {
        injected.rounds += 1;
        let faults = dealer.round();
        for (fault, _) in &faults {
            *injected.faults.entry(fault.name()).or_default() += 1;
        }
        round(on, faults, dealer.burst());
        match dealer.pause() {
            Some(span) => pause(span),
            None => {
                catch_up(sides, &committed);
                judge_tail(sides[0]);
            }
        }
    }
    if injected.rounds == 0 {
        world.violation("nothing was tested", "no round of faults".into());
    }
    injected
}

/// Faults side by side, until all are healed.
fn round(on: &On, faults: Vec<(Fault, fastrand::Rng)>, burst: Option<u16>) {
    thread::scope(|scope| {
        for (fault, mut random) in faults {
            scope.spawn(move || fault.inject(on, &mut random));
        }
        burst.into_iter().for_each(|rows| on.bursts.commit(rows));
    });
    on.fleet.check();
}
