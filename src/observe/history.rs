//! What happened in the last ten minutes, a sample every two seconds, so that a page that is opened after an outage
//! still shows it. A few hundred samples of a few numbers: some ten kilobytes, whatever happens.

use crate::relay::vitals::Vitals;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between two samples.
const INTERVAL: Duration = Duration::from_secs(2);
/// Ten minutes of them.
const MAX_SAMPLES: usize = 300;

/// How things stood at one moment, and what was done since the sample before.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    at: SystemTime,
    is_ready: bool,
    events_per_second: f64,
    lag_bytes: u64,
    lag_seconds: f64,
    /// The mean; `None`: nothing was timed.
    commit_to_ack_seconds: Option<f64>,
    /// `None`: not known yet.
    slot_wal_bytes: Option<u64>,
}

/// The samples, the oldest first.
#[derive(Default)]
pub struct History(Mutex<VecDeque<Sample>>);

impl History {
    /// Starts the thread that samples.
    pub fn start(vitals: Arc<Vitals>) -> io::Result<Arc<History>> {
        let history = Arc::new(History::default());
        let kept = history.clone();
        let mut sampler = Sampler::new(&vitals, Instant::now());
        let work = move || {
            loop {
                thread::sleep(INTERVAL);
                kept.push(sampler.sample(&vitals, Instant::now()));
            }
        };
        let thread = thread::Builder::new().name("history".into());
        thread.spawn(work)?;
        Ok(history)
    }

    fn push(&self, sample: Sample) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() >= MAX_SAMPLES {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    /// A list for each figure, all of the same length; times in milliseconds since 1970.
    pub fn to_json(&self) -> Value {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let list = |of: fn(&Sample) -> Value| samples.iter().map(of).collect::<Value>();
        json!({
            "interval_ms": INTERVAL.as_millis() as u64,
            "span_ms": INTERVAL.as_millis() as u64 * MAX_SAMPLES as u64,
            "at": list(|it| unix_ms(it.at).into()),
            "ready": list(|it| u8::from(it.is_ready).into()),
            "events_per_second": list(|it| rounded(it.events_per_second)),
            "lag_bytes": list(|it| it.lag_bytes.into()),
            "lag_seconds": list(|it| rounded(it.lag_seconds)),
            "commit_to_ack_seconds": list(|it| it.commit_to_ack_seconds.map_or(Value::Null, rounded)),
            "slot_wal_bytes": list(|it| it.slot_wal_bytes.into()),
        })
    }
}

/// Milliseconds since 1970, as a browser counts.
pub fn unix_ms(at: SystemTime) -> u64 {
    let since_1970 = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}

/// To microseconds, or millionths of an event: the rest is noise, and makes the answer twice as long.
fn rounded(value: f64) -> Value {
    ((value * 1e6).round() / 1e6).into()
}

/// What the last sample saw.
struct Sampler {
    at: Instant,
    published: u64,
    timed: (u64, f64),
}

impl Sampler {
    fn new(vitals: &Vitals, now: Instant) -> Sampler {
        Sampler {
            at: now,
            published: vitals.tally().published,
            timed: vitals.commit_to_ack_seconds.totals(),
        }
    }

    fn sample(&mut self, vitals: &Vitals, now: Instant) -> Sample {
        let seen = Sampler::new(vitals, now);
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        let published = seen.published.saturating_sub(self.published);
        let acked = seen.timed.0.saturating_sub(self.timed.0);
        let waited = (seen.timed.1 - self.timed.1).max(0.0);
        let sample = Sample {
            at: SystemTime::now(),
            is_ready: vitals.readiness().is_ok(),
            events_per_second: published as f64 / seconds.max(0.001),
            lag_bytes: vitals.lag_bytes(),
            lag_seconds: vitals.lag().as_secs_f64(),
            commit_to_ack_seconds: (acked > 0).then(|| waited / acked as f64),
            slot_wal_bytes: vitals.slot_wal.get().map(|wal| wal.bytes),
        };
        *self = seen;
        sample
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::core::Tally;

    #[test]
    fn a_sample_is_of_the_time_since_the_one_before() {
        let vitals = Vitals::default();
        let start = Instant::now();
        let mut sampler = Sampler::new(&vitals, start);
        let publish = |count| {
            let published = Tally {
                published: count,
                ..Tally::default()
            };
            vitals.tell(Tally::default(), published);
        };
        publish(100);
        for ms in [10, 30] {
            let commit_to_ack = Duration::from_millis(ms);
            vitals.commit_to_ack_seconds.observe(commit_to_ack);
        }
        let after = |seconds| start + Duration::from_secs(seconds);
        let first = sampler.sample(&vitals, after(2));
        assert_eq!(first.events_per_second, 50.0);
        let mean = first.commit_to_ack_seconds.unwrap();
        assert!((mean - 0.02).abs() < 1e-9, "{mean}");
        publish(6);
        let second = sampler.sample(&vitals, after(5));
        assert_eq!(second.events_per_second, 2.0);
        assert_eq!(second.commit_to_ack_seconds, None);
    }

    #[test]
    fn ten_minutes_are_kept_and_no_more() {
        let vitals = Vitals::default();
        let mut sampler = Sampler::new(&vitals, Instant::now());
        let history = History::default();
        for _ in 0..MAX_SAMPLES + 50 {
            history.push(sampler.sample(&vitals, Instant::now()));
        }
        let json = history.to_json();
        let lists = json
            .as_object()
            .unwrap()
            .values()
            .filter_map(Value::as_array);
        let lengths: Vec<usize> = lists.map(Vec::len).collect();
        assert_eq!(lengths, [MAX_SAMPLES; 7]);
        assert!(json.to_string().len() < 64 * 1024);
    }
}
