//! The progress line: once a minute while events flow, and once at the end.

use super::core::{Core, Tally};
use super::progress::Progress;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(60);

/// When the last line was written, and of what.
#[derive(Debug)]
pub struct Report {
    at: Instant,
    told: Tally,
}

impl Report {
    /// Begins to count.
    pub fn new(now: Instant) -> Report {
        Report {
            at: now,
            told: Tally::default(),
        }
    }

    /// Writes the line if it is due and there is something to tell.
    pub fn tick(&mut self, now: Instant, core: &Core, progress: &Progress) {
        if now.saturating_duration_since(self.at) >= INTERVAL {
            self.write(now, "progress", core, progress);
        }
    }

    /// Writes the last line.
    pub fn finish(&mut self, core: &Core, progress: &Progress) {
        self.write(Instant::now(), "stopped publishing", core, progress);
    }

    fn write(&mut self, now: Instant, what: &str, core: &Core, progress: &Progress) {
        let tally = core.tally();
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        let published = tally.published - self.told.published;
        let skipped = tally.skipped - self.told.skipped;
        if tally != self.told {
            let (received, confirmable) = progress.status();
            let per_second = if seconds > 0.0 {
                (published as f64 / seconds).round() as u64
            } else {
                published
            };
            log::info!(
                published, per_second, skipped, dropped = tally.dropped, parked = tally.parked, lost = tally.lost, waiting = core.window().waiting(),
                received:% = received, confirmable:% = confirmable; "{what}"
            );
        }
        self.at = now;
        self.told = tally;
    }
}
