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
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod world;
mod writers;

use faults::{Dealer, Fault, On};
use fleet::Fleet;
use jetstream_outbox::postgres::Lsn;
use ledger::{Ledger, Violations};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};
use streams::Stored;
use support::process::{keep_folder, lock};
use support::truth::Confirmed;
use support::wait::{pause, poll, secs};
use world::{NAME, PREFIX, PREFIX_BESIDE, Stop, World};
use writers::{Answered, Bursts, WRITERS, WRITERS_BESIDE, Written, write_until};

/// So long in the ordinary tests, where all run side by side.
const DEFAULT_SECONDS: u64 = 120;

/// What the relay may take to catch up with what was committed when all was healed, and at the end.
const CATCH_UP_LIMIT: Duration = secs(150);

/// How often is looked at the stream meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Something that was published twice late would show by then.
const SETTLE: Duration = secs(2);

/// What is tortured.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Three servers, and streams replicated over them.
    pub cluster: bool,
    /// Operators are at work, and there is a second service.
    pub operators: bool,
}

impl Setup {
    fn name(self) -> &'static str {
        match (self.cluster, self.operators) {
            (false, false) => "single server",
            (true, false) => "R3 cluster",
            (false, true) => "single server with operators",
            (true, true) => "R3 cluster with operators",
        }
    }
}

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

struct Report {
    text: String,
    clean: bool,
}

/// A service: its Postgres with writers, and its relays.
struct Side<'a> {
    world: &'a World,
    fleet: Fleet<'a>,
    written: Written,
    ledger: Mutex<Ledger>,
    hold_back: Duration,
    /// Writers, and who looks at the slot.
    writing: Stop,
    watching: Stop,
}

impl<'a> Side<'a> {
    fn new(world: &'a World, hold_back: Duration, shares_its_names: bool) -> Side<'a> {
        Side {
            world,
            fleet: Fleet::new(world, hold_back, shares_its_names),
            written: Written::default(),
            ledger: Mutex::default(),
            hold_back,
            writing: Stop::default(),
            watching: Stop::default(),
        }
    }
}

/// The threads of a service.
struct Running<'scope> {
    writers: Vec<ScopedJoinHandle<'scope, Answered>>,
    reader: ScopedJoinHandle<'scope, ()>,
    watcher: ScopedJoinHandle<'scope, Vec<Confirmed>>,
}

impl<'scope> Running<'scope> {
    fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        side: &'scope Side<'scope>,
        writers: Range<u8>,
        seed: u64,
        events_per_second: u64,
    ) -> Running<'scope> {
        let Side {
            world,
            written,
            writing,
            ..
        } = side;
        let write = |writer| {
            move || write_until(writing, &world.pg, writer, seed, events_per_second, written)
        };
        Running {
            writers: writers.map(|writer| scope.spawn(write(writer))).collect(),
            reader: scope.spawn(move || {
                while !writing.is_set() {
                    // a Postgres that is down is asked again
                    let _ = lock(&side.ledger).read_on(&world.pg);
                    writing.pause(secs(1));
                }
            }),
            watcher: scope.spawn(|| world.watch_confirmations(&side.watching)),
        }
    }

    /// Everything is committed, and read.
    fn finish_writing(&mut self, side: &Side) -> Vec<Answered> {
        side.writing.set();
        let answered = self
            .writers
            .drain(..)
            .map(|writer| writer.join().expect("a writer writes until it is stopped"));
        let answered = answered.collect();
        lock(&side.ledger).read_all(&side.world.pg);
        answered
    }

    fn finish(self, side: &Side) -> Vec<Confirmed> {
        self.reader
            .join()
            .expect("the log is read until it is stopped");
        side.fleet.check();
        side.fleet.term_all();
        side.watching.set();
        self.watcher
            .join()
            .expect("the slot is watched until the end")
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

/// What was seen of a service: what its writers know, and what was confirmed.
type Seen = (Vec<Answered>, Vec<Confirmed>);

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

/// Ends the threads also when this one panics.
struct StopAll<'a>(&'a [&'a Side<'a>]);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        for side in self.0 {
            side.writing.set();
            side.watching.set();
        }
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

/// Waits until so many events are stored as `target` said at first; of several streams, until all are that were committed by
/// then.
fn catch_up(sides: &[&Side], target: &dyn Fn() -> u64) {
    let world = sides[0].world;
    let target = target();
    if world.streams.is_some() && !world.is_broken() {
        sides
            .iter()
            .for_each(|side| lock(&side.ledger).read_all(&side.world.pg));
    }
    let goals: Vec<usize> = (sides.iter())
        .map(|side| lock(&side.ledger).events())
        .collect();
    let mut held = vec![0; sides.len()];
    let caught_up = poll(CATCH_UP_LIMIT, || {
        sides.iter().for_each(|side| side.fleet.check());
        pause(LOOK_INTERVAL);
        if sides.iter().any(|side| side.world.is_broken()) {
            world.give_up();
            return Ok(());
        }
        let Some(streams) = &world.streams else {
            return match world.stored() {
                Ok(stored) if stored >= target => Ok(()),
                Ok(stored) => Err(format!("{stored} of {target} events stored")),
                Err(error) => Err(error.to_string()),
            };
        };
        let looked = streams.look(&world.jetstream);
        looked.map_err(|error| error.to_string())?;
        for ((side, goal), held) in sides.iter().zip(&goals).zip(&mut held) {
            let ledger = lock(&side.ledger);
            while *held < *goal {
                streams.hold(&ledger.from(*held)[..1]).map_err(|id| {
                    format!(
                        "{} of {goal} events are stored, and {} is not",
                        *held,
                        id.uuid()
                    )
                })?;
                *held += 1;
            }
        }
        Ok(())
    });
    if let Err(reason) = caught_up {
        let example = format!("after {CATCH_UP_LIMIT:?}: {reason}");
        world.violation("stands still", example);
        world.give_up();
    }
}

/// Finds a hole soon after it came to be, while the logs of its cause are short: the last message must be the event
/// that is due at its sequence. Of several streams, what was read of them so far is as it should be.
fn judge_tail(side: &Side) {
    let Side { world, ledger, .. } = side;
    if let Some(streams) = &world.streams {
        if !streams.is_sound() {
            world.give_up();
        }
        return;
    }
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

/// Compares what a service has committed with the streams, and tells how much there was.
fn judge(side: &Side, (answered, confirmations): &Seen, text: &mut String) {
    let Side {
        world,
        written,
        hold_back,
        ..
    } = side;
    let ledger = lock(&side.ledger);
    let mut violations = lock(&world.violations);
    ledger.judge_writers(answered, &mut violations);
    if ledger.events() == 0 || confirmations.is_empty() {
        violations.add("nothing was tested", format!("{} events", ledger.events()));
    }
    let mut judge = ledger.judge_streams();
    if let Some(streams) = &world.streams {
        judge.forgotten(&streams.forgotten());
    }
    let mut stored = 0;
    for (held, deleted) in held(world, &mut violations) {
        judge.begin_stream();
        held.iter().for_each(|it| judge.see(it, &mut violations));
        stored += held.len();
        if let Some((time_ns, confirmed)) = deleted {
            judge.deleted(&held, time_ns, confirmed);
        }
    }
    let (late, repeated) = (judge.late, judge.repeated);
    judge.finish(confirmations, *hold_back, &mut violations);
    let counter = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    for (count, what) in [
        (u64::from(side.fleet.started()), "relays started"),
        (confirmations.len() as u64, "confirmations seen"),
        (ledger.transactions() as u64, "transactions committed"),
        (counter(&written.uncertain), "commits without an answer"),
        (
            counter(&written.rolled_back_transactions),
            "transactions rolled back",
        ),
        (counter(&written.rolled_back_rows), "rows rolled back"),
        (ledger.events() as u64, "events committed"),
        (stored as u64, "events in the stream"),
    ] {
        let _ = writeln!(text, "{count:8}  {what}");
    }
    if world.streams.is_some() {
        for (count, what) in [
            (ledger.undone_events() as u64, "events undone by a snapshot"),
            (late, "events after later ones, marked as late"),
            (
                repeated,
                "events of deleted or forgotten streams that came again",
            ),
        ] {
            let _ = writeln!(text, "{count:8}  {what}");
        }
    }
}

/// What each stream held of a service's; of one that was deleted, when that was, and what Postgres had been told.
type Held = (Vec<Stored>, Option<(u64, Lsn)>);

fn held(world: &World, violations: &mut Violations) -> Vec<Held> {
    if let Some(streams) = &world.streams {
        let looked = poll(secs(60), || streams.look(&world.jetstream));
        looked.expect("read the streams");
        let mut all = Vec::new();
        streams.visit(world.system_id, |held, deleted| all.push((held, deleted)));
        return all;
    }
    // a cluster may have no leader for a moment: then from the start again
    let read = poll(secs(60), || {
        let (mut held, mut found) = (Vec::new(), Violations::default());
        let mut client = world.jetstream.client()?;
        client.try_visit_from(NAME, 1, |message| {
            // nobody else writes there, so none may be late
            let stored = Stored::read(&message, world.prefix, &mut found);
            held.extend(stored.map(|it| Stored {
                is_late: false,
                ..it
            }));
        })?;
        Ok::<_, std::io::Error>((held, found))
    });
    let (held, found) = read.expect("read the stream");
    violations.extend(found);
    vec![(held, None)]
}

/// Adds what went wrong.
fn conclude(mut text: String, worlds: &[&World]) -> Report {
    let mut violations = Violations::default();
    for world in worlds {
        violations.extend(std::mem::take(&mut lock(&world.violations)));
    }
    if let Some(streams) = &worlds[0].streams {
        streams.judge_whole(&worlds[0].jetstream, &mut violations);
        violations.extend(streams.take_violations());
    }
    for (kind, count, examples) in violations.iter() {
        let _ = writeln!(text, "VIOLATION {count:8}  {kind}");
        for example in examples {
            let _ = writeln!(text, "          {}", example.replace('\n', "\n          "));
        }
    }
    let clean = violations.is_empty();
    text += if clean { "no violations\n" } else { "" };
    Report { text, clean }
}
