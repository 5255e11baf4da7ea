//! The progress line: once a minute while events flow, and once at the end. Its figures are those of the metrics.

use super::core::Tally;
use super::vitals::{Vitals, since};
use crate::postgres::Lsn;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(60);

/// When the last line was written, and of what.
#[derive(Debug)]
pub struct Report {
    at: Instant,
    told: Tally,
}

impl Report {
    /// Begins to count, for one session.
    pub fn new(now: Instant, vitals: &Vitals) -> Report {
        Report {
            at: now,
            told: vitals.tally(),
        }
    }

    /// Writes the line if it is due and there is something to tell.
    pub fn tick(&mut self, now: Instant, vitals: &Vitals) {
        if now.saturating_duration_since(self.at) >= INTERVAL {
            self.write(now, "progress", vitals);
        }
    }

    /// Writes the last line.
    pub fn finish(&mut self, vitals: &Vitals) {
        self.write(Instant::now(), "progress until the session ended", vitals);
    }

    fn write(&mut self, now: Instant, what: &str, vitals: &Vitals) {
        let total = vitals.tally();
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        if total != self.told {
            let new = since(self.told, total);
            let per_second = if seconds > 0.0 {
                (new.published as f64 / seconds).round() as u64
            } else {
                new.published
            };
            log::info!(
                published = new.published, per_second, already_stored = new.already_stored, dropped = new.dropped,
                parked = new.parked, given_up = new.given_up, late = new.late, in_flight = vitals.in_flight.get(),
                received_lsn:% = Lsn(vitals.received_lsn.get()), stored_lsn:% = Lsn(vitals.stored_lsn.get()),
                flush_lsn:% = Lsn(vitals.flush_lsn.get()); "{what}"
            );
        }
        self.at = now;
        self.told = total;
    }
}
