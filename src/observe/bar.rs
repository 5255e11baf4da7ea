//! A progress bar where a person waits: on a terminal, while a drain or a long catch-up is on its way. Elsewhere the
//! log's progress lines do.
//!
//! What is done and what is left is measured in bytes of log: how many events are in them nobody knows before.

use crate::logging::{self, LogFormat};
use crate::relay::vitals::Vitals;
use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// Between two drawings, and between two looks whether there is something to draw.
const INTERVAL: Duration = Duration::from_millis(250);
/// A relay that is behind by more catches up; one that is behind by less has done so.
const LONG_BYTES: u64 = 16 << 20;
const SHORT_BYTES: u64 = 64 << 10;

static BAR: OnceLock<ProgressBar> = OnceLock::new();

/// Starts the thread that draws, if there is a terminal to draw on.
pub fn start(format: LogFormat, drains: bool, vitals: Arc<Vitals>) -> io::Result<()> {
    if format != LogFormat::Text || !io::stderr().is_terminal() {
        return Ok(());
    }
    let thread = thread::Builder::new().name("bar".into());
    thread.spawn(move || draw(drains, &vitals)).map(drop)
}

/// Takes the bar away for good, for the last lines.
pub fn stopping() {
    if let Some(bar) = BAR.get() {
        hide(bar);
    }
}

fn hide(bar: &ProgressBar) {
    bar.finish_and_clear();
    bar.set_draw_target(ProgressDrawTarget::hidden());
}

fn draw(drains: bool, vitals: &Vitals) {
    let style = ProgressStyle::with_template("{bar:30} {percent:>3} % of the WAL, {msg}");
    let bar = BAR.get_or_init(ProgressBar::hidden);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    // a line of the log takes the bar away for a moment
    logging::write_aside(Box::new(|write| bar.suspend(write)));
    let mut track = Track::default();
    let mut rate = Rate::default();
    let mut is_shown = false;
    loop {
        thread::sleep(INTERVAL);
        let goal = match drains {
            true => vitals.drains_upto.get(),
            false => vitals.wal_end().0,
        };
        let at = vitals.stored_lsn.get();
        let published = vitals.tally().published;
        let per_second = rate.of(published, Instant::now());
        let Some((done, all)) = track.step(goal, at, drains) else {
            if std::mem::take(&mut is_shown) {
                hide(bar);
            }
            continue;
        };
        let appears = !std::mem::replace(&mut is_shown, true);
        if appears {
            bar.reset();
        }
        bar.set_length(all);
        bar.set_position(done);
        let left = match vitals.readiness() {
            Err(hindrance) => hindrance.chars().take(60).collect(),
            Ok(_) if done < all => format!("{:.0?} left", round(bar.eta())),
            Ok(_) => "the last ones".to_string(),
        };
        let published = HumanCount(published);
        let per_second = HumanCount(per_second);
        bar.set_message(format!("{published} events, {per_second}/s, {left}"));
        if appears {
            // not before it has something to say
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.tick();
        }
    }
}

fn round(span: Duration) -> Duration {
    Duration::from_secs(span.as_secs().max(1))
}

/// Where the way began.
#[derive(Debug, Default)]
struct Track {
    begin: Option<u64>,
}

impl Track {
    /// Bytes of log that are done, and all there are; `None`: nothing is worth to be shown.
    fn step(&mut self, goal: u64, at: u64, drains: bool) -> Option<(u64, u64)> {
        // neither is known yet
        if goal == 0 || at == 0 {
            return None;
        }
        let left = goal.saturating_sub(at);
        if self.begin.is_none() && (drains || left > LONG_BYTES) {
            self.begin = Some(at);
        }
        if !drains && left < SHORT_BYTES {
            self.begin = None;
        }
        let begin = self.begin?;
        let all = goal.saturating_sub(begin);
        Some((at.saturating_sub(begin).min(all), all))
    }
}

/// Events a second, over some seconds.
#[derive(Debug, Default)]
struct Rate {
    since: Option<(Instant, u64)>,
    per_second: u64,
}

impl Rate {
    fn of(&mut self, count: u64, now: Instant) -> u64 {
        let (at, before) = *self.since.get_or_insert((now, count));
        let span = now.saturating_duration_since(at);
        if span >= Duration::from_secs(1) {
            let per_second = (count - before) as f64 / span.as_secs_f64();
            self.per_second = per_second.round() as u64;
            self.since = Some((now, count));
        }
        self.per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_is_shown_from_where_it_began_to_its_end() {
        let mut track = Track::default();
        assert_eq!(track.step(0, 0, true), None);
        assert_eq!(track.step(1_000, 0, true), None);
        assert_eq!(track.step(1_000, 400, true), Some((0, 600)));
        assert_eq!(track.step(1_000, 700, true), Some((300, 600)));
        assert_eq!(track.step(1_000, 1_200, true), Some((600, 600)));
    }

    #[test]
    fn a_catch_up_is_shown_when_it_is_long_and_until_it_is_over() {
        let mut track = Track::default();
        assert_eq!(track.step(LONG_BYTES, 1, false), None);
        assert_eq!(
            track.step(LONG_BYTES + 2, 1, false),
            Some((0, LONG_BYTES + 1))
        );
        let goal = LONG_BYTES + SHORT_BYTES;
        let all = goal - 1;
        assert_eq!(
            track.step(goal, LONG_BYTES, false),
            Some((LONG_BYTES - 1, all))
        );
        assert_eq!(track.step(goal, LONG_BYTES + 1, false), None);
        assert_eq!(track.step(goal, LONG_BYTES, false), None);
    }

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let mut rate = Rate::default();
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert_eq!(rate.of(100, start), 0);
        assert_eq!(rate.of(600, after(500)), 0);
        assert_eq!(rate.of(2_100, after(2_000)), 1_000);
        assert_eq!(rate.of(5_000, after(2_500)), 1_000);
        assert_eq!(rate.of(2_100, after(3_000)), 0);
    }
}
