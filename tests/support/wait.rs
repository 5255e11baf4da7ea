//! Waiting for a condition, with a deadline: the only place of the tests that sleeps.

use std::fmt::Debug;
use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at: short against what a server does, long against a query.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// What a condition may answer: `bool`, `Option<T>` or `Result<T, E>`.
pub trait Outcome {
    /// What is known once the condition holds.
    type Value;
    /// The value, or why there is none yet.
    fn outcome(self) -> Result<Self::Value, String>;
}

impl Outcome for bool {
    type Value = ();
    fn outcome(self) -> Result<(), String> {
        self.then_some(()).ok_or_else(|| "still false".into())
    }
}

impl<T> Outcome for Option<T> {
    type Value = T;
    fn outcome(self) -> Result<T, String> {
        self.ok_or_else(|| "still none".into())
    }
}

impl<T, E: Debug> Outcome for Result<T, E> {
    type Value = T;
    fn outcome(self) -> Result<T, String> {
        self.map_err(|error| format!("{error:?}"))
    }
}

/// Polls `condition` until it holds and returns what it found; panics after `deadline`, naming `what`
/// was waited for and what the last look said.
#[track_caller]
pub fn eventually<O: Outcome>(
    what: &str,
    deadline: Duration,
    condition: impl FnMut() -> O,
) -> O::Value {
    match poll(deadline, condition) {
        Ok(value) => value,
        Err(reason) => panic!("waited {deadline:?} for {what}: {reason}"),
    }
}

/// The same without the panic: what was found, or what the last look said.
pub fn poll<O: Outcome>(
    deadline: Duration,
    mut condition: impl FnMut() -> O,
) -> Result<O::Value, String> {
    let start = Instant::now();
    loop {
        match condition().outcome() {
            Err(_) if start.elapsed() < deadline => thread::sleep(POLL_INTERVAL),
            outcome => return outcome,
        }
    }
}

/// Sees to it that `condition` holds for the whole of `span`: for "nothing more arrives" and "the lag
/// stays below". Panics at once when it does not.
#[track_caller]
pub fn throughout<O: Outcome>(what: &str, span: Duration, mut condition: impl FnMut() -> O) {
    let start = Instant::now();
    while start.elapsed() < span {
        if let Err(reason) = condition().outcome() {
            panic!("{what} ended after {:?}: {reason}", start.elapsed());
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Lets time pass where that is the point: how long a fault lasts, how fast a writer writes. Never for a condition.
pub fn pause(span: Duration) {
    thread::sleep(span);
}

/// Shorthand for deadlines.
pub const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
