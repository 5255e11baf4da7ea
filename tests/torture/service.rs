//! A service under torture: its writers, its relays, and the judgement of what became of its events.

use crate::fleet::Fleet;
use crate::ledger::{Ledger, Violations};
use crate::streams::Stored;
use crate::support::process::lock;
use crate::support::truth::Confirmed;
use crate::support::wait::{pause, poll, secs};
use crate::world::{NAME, Stop, World};
use crate::writers::{Answered, Written, write_until};
use jetstream_outbox::postgres::Lsn;
use std::fmt::Write;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

/// What the relay may take to catch up with what was committed when all was healed, and at the end.
const CATCH_UP_LIMIT: Duration = secs(150);

/// How often is looked at the stream meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Something that was published twice late would show by then.
pub const SETTLE: Duration = secs(2);

pub struct Report {
    pub text: String,
    pub clean: bool,
}

/// A service: its Postgres with writers, and its relays.
pub struct Side<'a> {
    pub world: &'a World,
    pub fleet: Fleet<'a>,
    pub written: Written,
    pub ledger: Mutex<Ledger>,
    pub hold_back: Duration,
    /// Writers, and who looks at the slot.
    writing: Stop,
    watching: Stop,
}

impl<'a> Side<'a> {
    pub fn new(world: &'a World, hold_back: Duration, shares_its_names: bool) -> Side<'a> {
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
pub struct Running<'scope> {
    writers: Vec<ScopedJoinHandle<'scope, Answered>>,
    reader: ScopedJoinHandle<'scope, ()>,
    watcher: ScopedJoinHandle<'scope, Vec<Confirmed>>,
}

impl<'scope> Running<'scope> {
    pub fn start<'env>(
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
    pub fn finish_writing(&mut self, side: &Side) -> Vec<Answered> {
        side.writing.set();
        let answered = self
            .writers
            .drain(..)
            .map(|writer| writer.join().expect("a writer writes until it is stopped"));
        let answered = answered.collect();
        lock(&side.ledger).read_all(&side.world.pg);
        answered
    }

    pub fn finish(self, side: &Side) -> Vec<Confirmed> {
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

/// What was seen of a service: what its writers know, and what was confirmed.
pub type Seen = (Vec<Answered>, Vec<Confirmed>);

/// Ends the threads also when this one panics.
pub struct StopAll<'a>(pub &'a [&'a Side<'a>]);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        for side in self.0 {
            side.writing.set();
            side.watching.set();
        }
    }
}

/// Waits until so many events are stored as `target` said at first; of several streams, until all are that were committed by
/// then.
pub fn catch_up(sides: &[&Side], target: &dyn Fn() -> u64) {
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
pub fn judge_tail(side: &Side) {
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
pub fn judge(side: &Side, (answered, confirmations): &Seen, text: &mut String) {
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
pub fn conclude(mut text: String, worlds: &[&World]) -> Report {
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
