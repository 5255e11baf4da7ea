//! The torture: everything fails at random while writers write, and the whole stream is judged at the end.
//!
//! Writers commit and roll back transactions of 1 to 5,000 rows side by side. Meanwhile the relay, its network,
//! nats-server and Postgres are killed, frozen, cut off, and put back, by a seeded generator, see [`faults`]. Then
//! all is healed, and the stream must hold what Postgres' log says was committed: each event once, in the order of
//! the commits, with its payload; nothing may have been confirmed before it was stored for the hold-back;
//! and no relay may have ended but by our signals.
//!
//! `TORTURE_SECONDS` (by default as long as the tests can bear), `TORTURE_SEED`, and `TORTURE_ONLY` (part of the name of
//! the only faults that are wanted); scripts/torture sets them.

mod events;
mod faults;
mod fleet;
mod ledger;
#[path = "../support/mod.rs"]
mod support;
mod world;
mod writers;

use faults::{Dealer, Fault, On};
use fleet::Fleet;
use ledger::{Ledger, Violations};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use support::process::{keep_folder, lock};
use support::truth::Confirmed;
use support::wait::{pause, poll, secs};
use world::{NAME, Stop, World};
use writers::{Bursts, WRITERS, Written, write_until};

/// So long in the ordinary tests, where both run side by side.
const DEFAULT_SECONDS: u64 = 120;

/// What the relay may take to catch up with what was committed when all was healed, and at the end.
const CATCH_UP_LIMIT: Duration = secs(150);

/// How often is looked at the stream meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Something that was published twice late would show by then.
const SETTLE: Duration = secs(2);

#[test]
fn a_single_server_under_torture() {
    torture(false);
}

#[test]
fn a_cluster_under_torture() {
    torture(true);
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[track_caller]
fn torture(cluster: bool) {
    let length = secs(number("TORTURE_SECONDS").unwrap_or(DEFAULT_SECONDS));
    let seed = number("TORTURE_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let only = std::env::var("TORTURE_ONLY").unwrap_or_default();
    // the servers are gone, and their logs not printed, before anything is said
    let (report, folder) = run(length, seed, cluster, &only);
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

struct Report {
    text: String,
    clean: bool,
}

fn run(length: Duration, seed: u64, cluster: bool, only: &str) -> (Report, std::path::PathBuf) {
    let setup = if cluster {
        "R3 cluster"
    } else {
        "single server"
    };
    println!("torture of {length:?} on a {setup}, seed {seed}");
    let world = World::start(cluster);
    println!("logs in {}", world.folder.display());
    if number("TORTURE_KEEP").is_some() {
        keep_folder(&world.folder);
    }
    // a copy of the store is never so old that its repair needs what was confirmed; a cluster keeps what it
    // acknowledged, so that confirming at once must be safe
    let hold_back = match cluster {
        false if length < secs(600) || seed.is_multiple_of(2) => secs(20),
        false => secs(150),
        true if seed.is_multiple_of(2) => Duration::ZERO,
        true => secs(2),
    };
    // of an hour, a million events are left
    let events_per_second = (1_000_000 / length.as_secs().max(1)).clamp(300, 800);
    let (writing, watching) = (Stop::default(), Stop::default());
    let written = Written::default();
    let ledger = Mutex::new(Ledger::default());
    let mut injected: BTreeMap<String, u64> = BTreeMap::new();
    let mut rounds = 0_u32;
    let fleet = Fleet::new(&world, hold_back);
    let (answered, confirmations) = thread::scope(|scope| {
        let stop_all = StopAll([&writing, &watching]);
        let watcher = scope.spawn(|| world.watch_confirmations(&watching));
        let (world, written, writing) = (&world, &written, &writing);
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                scope.spawn(move || {
                    write_until(writing, &world.pg, writer, seed, events_per_second, written)
                })
            })
            .collect();
        let reader = scope.spawn(|| {
            while !writing.is_set() {
                // a Postgres that is down is asked again
                let _ = lock(&ledger).read_on(&world.pg);
                writing.pause(secs(1));
            }
        });
        let mut dealer = Dealer::new(seed, cluster, only);
        fleet.start(dealer.settings());
        let bursts = Bursts::new(&world.pg, written);
        let on = On {
            world,
            fleet: &fleet,
            bursts: &bursts,
            oldest_copy: hold_back / 3,
        };
        let start = Instant::now();
        catch_up(&on, &|| written.committed.load(Ordering::Relaxed) + 1);
        while start.elapsed() < length && !world.is_broken() {
            rounds += 1;
            let faults = dealer.round();
            for (fault, _) in &faults {
                *injected.entry(fault.name()).or_default() += 1;
            }
            round(&on, faults, dealer.burst());
            match dealer.pause() {
                Some(span) => pause(span),
                None => {
                    catch_up(&on, &|| written.committed.load(Ordering::Relaxed));
                    judge_tail(world, &ledger);
                }
            }
        }
        world.note("the faults are over");
        writing.set();
        let mut answered: Vec<_> = writers
            .into_iter()
            .map(|writer| writer.join().expect("a writer writes until it is stopped"))
            .collect();
        answered.push(bursts.answered());
        reader.join().expect("the log is read until it is stopped");
        read_all(&mut lock(&ledger), world);
        let target = lock(&ledger).events() as u64;
        catch_up(&on, &|| target);
        pause(SETTLE);
        fleet.check();
        fleet.term_all();
        watching.set();
        drop(stop_all);
        let confirmations = watcher.join().expect("the slot is watched until the end");
        (answered, confirmations)
    });
    let ledger = ledger.into_inner().unwrap_or_else(PoisonError::into_inner);
    if rounds == 0 {
        world.violation("nothing was tested", "no round of faults".into());
    }
    let stored = judge(&world, &ledger, &answered, &confirmations, hold_back);
    let mut text =
        format!("torture of {length:?} on a {setup}, seed {seed}, hold-back {hold_back:?}\n");
    for (fault, count) in &injected {
        let _ = writeln!(text, "{count:8}  {fault}");
    }
    let counter = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    for (count, what) in [
        (u64::from(rounds), "rounds of faults"),
        (u64::from(fleet.started()), "relays started"),
        (confirmations.len() as u64, "confirmations seen"),
        (ledger.transactions() as u64, "transactions committed"),
        (counter(&written.uncertain), "commits without an answer"),
        (
            counter(&written.rolled_back_transactions),
            "transactions rolled back",
        ),
        (counter(&written.rolled_back_rows), "rows rolled back"),
        (ledger.events() as u64, "events committed"),
        (stored, "events in the stream"),
    ] {
        let _ = writeln!(text, "{count:8}  {what}");
    }
    let violations = lock(&world.violations);
    for (kind, count, examples) in violations.iter() {
        let _ = writeln!(text, "VIOLATION {count:8}  {kind}");
        for example in examples {
            let _ = writeln!(text, "          {}", example.replace('\n', "\n          "));
        }
    }
    let clean = violations.is_empty();
    text += if clean { "no violations\n" } else { "" };
    drop(violations);
    drop(fleet);
    let report = Report { text, clean };
    world.note(&report.text);
    (report, world.folder.clone())
}

/// Ends the threads also when this one panics.
struct StopAll<'a>([&'a Stop; 2]);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|stop| stop.set());
    }
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

/// Waits until so many events are stored as `target` said at first.
fn catch_up(on: &On, target: &dyn Fn() -> u64) {
    let target = target();
    let caught_up = poll(CATCH_UP_LIMIT, || {
        on.fleet.check();
        pause(LOOK_INTERVAL);
        if on.world.is_broken() {
            return Ok(());
        }
        match on.world.stored() {
            Ok(stored) if stored >= target => Ok(()),
            Ok(stored) => Err(format!("{stored} of {target} events stored")),
            Err(error) => Err(error.to_string()),
        }
    });
    if let Err(reason) = caught_up {
        let example = format!("after {CATCH_UP_LIMIT:?}: {reason}");
        on.world.violation("stands still", example);
        on.world.give_up();
    }
}

/// Finds a hole soon after it came to be, while the logs of its cause are short: the last message must be the event
/// that is due at its sequence.
fn judge_tail(world: &World, ledger: &Mutex<Ledger>) {
    let judged = poll(secs(60), || {
        let (seq, id) = world.last_message().map_err(|error| error.to_string())?;
        let mut ledger = lock(ledger);
        loop {
            match (ledger.judge_tail(seq, &id), ledger.read_on(&world.pg)) {
                (Some(judged), _) => return Ok(judged),
                (None, Ok(true)) => {}
                (None, Ok(false)) => {
                    return Err(format!("{seq} events are stored, but not committed"));
                }
                (None, Err(error)) => return Err(error.to_string()),
            }
        }
    });
    if let Err(reason) = judged.and_then(|judged| judged) {
        world.violation("the last message is not the one that is due", reason);
        world.give_up();
    }
}

/// What the writers have committed last.
fn read_all(ledger: &mut Ledger, world: &World) {
    let read = poll(secs(60), || match ledger.read_on(&world.pg) {
        Ok(false) => Ok(()),
        Ok(true) => Err("there is more".to_string()),
        Err(error) => Err(error.to_string()),
    });
    if let Err(reason) = read {
        panic!("read the log to its end: {reason}");
    }
}

/// How many events are in the stream.
fn judge(
    world: &World,
    ledger: &Ledger,
    answered: &[Vec<u32>],
    confirmations: &[Confirmed],
    hold_back: Duration,
) -> u64 {
    let mut violations = lock(&world.violations);
    ledger.judge_writers(answered, &mut violations);
    if ledger.events() == 0 || confirmations.is_empty() {
        violations.add("nothing was tested", format!("{} events", ledger.events()));
    }
    // a cluster may have no leader for a moment: then from the start again
    let read = poll(secs(60), || {
        let (mut judge, mut found, mut seen) = (ledger.judge_stream(), Violations::default(), 0);
        let mut client = world.jetstream.client()?;
        client.try_visit_from(NAME, 1, |message| {
            seen += 1;
            judge.see(&message, &mut found);
        })?;
        Ok::<_, std::io::Error>((judge, found, seen))
    });
    let (judge, found, seen) = read.expect("read the stream");
    violations.extend(found);
    judge.finish(confirmations, hold_back, &mut violations);
    seen
}
