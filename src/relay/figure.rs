//! Counters that threads share: a figure, and a histogram of durations. Plain atomics: the relay never waits for one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A counter or a gauge.
#[derive(Debug, Default)]
pub struct Figure(AtomicU64);

impl Figure {
    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// From now on this value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// One more.
    pub fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// This value, unless it is greater already.
    pub fn raise(&self, value: u64) {
        self.0.fetch_max(value, Ordering::Relaxed);
    }
}

/// How many observations of a duration were no longer than each of some bounds.
#[derive(Debug)]
pub struct Histogram {
    /// Seconds, ascending.
    bounds: &'static [f64],
    /// Observations up to each bound and beyond the one before it; the last one counts those beyond every bound.
    buckets: Vec<Figure>,
    nanoseconds: AtomicU64,
}

impl Histogram {
    /// Without observations.
    pub fn new(bounds: &'static [f64]) -> Histogram {
        let buckets = bounds.iter().map(|_| Figure::default());
        Histogram {
            bounds,
            buckets: buckets.chain([Figure::default()]).collect(),
            nanoseconds: AtomicU64::new(0),
        }
    }

    /// One more observation.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.inc();
        }
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Each bound in seconds, with the observations up to it; the last bound is infinite, and its count that of all.
    pub fn cumulative(&self) -> Vec<(f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let mut count = 0;
        let up_to = |(bound, bucket): (f64, &Figure)| {
            count += bucket.get();
            (bound, count)
        };
        bounds.zip(&self.buckets).map(up_to).collect()
    }

    /// How many observations there were, and their sum in seconds.
    pub fn totals(&self) -> (u64, f64) {
        let count = self.buckets.iter().map(Figure::get).sum();
        let nanoseconds = self.nanoseconds.load(Ordering::Relaxed);
        (count, Duration::from_nanos(nanoseconds).as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_counts_what_is_no_longer_than_its_bound() {
        let histogram = Histogram::new(&[0.5, 1.0]);
        for millis in [1, 500, 501, 1_000, 1_001, 90_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        assert_eq!(
            histogram.cumulative(),
            [(0.5, 2), (1.0, 4), (f64::INFINITY, 6)]
        );
        let (count, seconds) = histogram.totals();
        assert_eq!(count, 6);
        assert!((seconds - 93.003).abs() < 1e-9, "{seconds}");
    }

    #[test]
    fn a_figure_is_raised_and_never_lowered_by_that() {
        let figure = Figure::default();
        figure.raise(5);
        figure.raise(3);
        assert_eq!(figure.get(), 5);
        figure.set(1);
        figure.inc();
        assert_eq!(figure.get(), 2);
    }
}
