//! How long the reader lets pass before it reads again.
//!
//! Postgres sends each message of a transaction by itself. A reader that waits for each is woken for each,
//! and so are the threads behind it and the servers on both sides; on a machine that is busy, that work takes from
//! Postgres the time to send more at once, and the drain stays at a third of its rate. So a reader that has just
//! been served lets a little gather. How long is a matter of what the events have waited already.

use std::time::{Duration, Instant};

/// Batches that follow each other within this time are a flow, not single events.
const FLOW: Duration = Duration::from_millis(1);
/// The pause in a flow of fresh events.
const FRESH_PAUSE: Duration = Duration::from_micros(200);
/// The pause in a flow of events that have waited for `BEHIND_US` already, the shortest and
/// the longest: while what gathers is too little, the next is twice as long. (A pause of 200 µs lets two drains on two cores fall into
/// the slow state one time in five. One of 5 ms costs a sixth of the rate: the socket's buffer does not last.)
const BEHIND_PAUSES: [Duration; 2] = [Duration::from_micros(800), Duration::from_micros(3200)];
/// So long after its commit Postgres sends a transaction that waits in a backlog.
const BEHIND_US: i64 = 20_000;
/// A batch of this size needs no pause: more than enough was there at once.
const LARGE_BYTES: usize = 32 * 1024;

/// When batches went on, and how old their events were.
#[derive(Debug, Default)]
pub struct Pace {
    /// When the last batch was sent, its pause included.
    last: Option<Instant>,
    behind: bool,
    /// The next pause when behind.
    gather: Duration,
}

impl Pace {
    /// Postgres sent a transaction's Begin. Both times are by its clock, in microseconds since 2000.
    pub fn begun(&mut self, commit_time_us: i64, sent_time_us: i64) {
        self.behind = sent_time_us.saturating_sub(commit_time_us) > BEHIND_US;
    }

    /// A batch of so many bytes goes on. Returns how long to wait before the next is read.
    pub fn sent(&mut self, now: Instant, bytes: usize) -> Duration {
        // a keepalive, which Postgres sends before what has woken it, or the end of what has gone on already
        if bytes == 0 {
            return Duration::ZERO;
        }
        let flows = self
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < FLOW);
        let [shortest, longest] = BEHIND_PAUSES;
        let mut gather = shortest;
        let pause = match self.behind {
            _ if !flows || bytes >= LARGE_BYTES => Duration::ZERO,
            false => FRESH_PAUSE,
            true => {
                let pause = self.gather.max(shortest);
                gather = (pause * 2).min(longest);
                pause
            }
        };
        self.gather = gather;
        self.last = Some(now + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: usize = 3_000;

    /// What follows `gap` after a batch and its pause.
    fn then(pace: &mut Pace, gap: Duration, bytes: usize) -> Duration {
        let at = pace.last.unwrap() + gap;
        pace.sent(at, bytes)
    }

    #[test]
    fn a_single_batch_is_never_followed_by_a_pause() {
        let mut pace = Pace::default();
        assert_eq!(pace.sent(Instant::now(), SMALL), Duration::ZERO);
        assert_eq!(then(&mut pace, FLOW, SMALL), Duration::ZERO);
        // not even in a backlog
        pace.begun(0, i64::MAX);
        assert_eq!(then(&mut pace, FLOW, SMALL), Duration::ZERO);
    }

    #[test]
    fn a_keepalive_is_no_part_of_a_flow() {
        let mut pace = Pace::default();
        let now = Instant::now();
        assert_eq!(pace.sent(now, 0), Duration::ZERO);
        assert_eq!(pace.sent(now, SMALL), Duration::ZERO);
        assert_eq!(pace.sent(now, 0), Duration::ZERO);
        assert_eq!(pace.sent(now, SMALL), FRESH_PAUSE);
    }

    #[test]
    fn in_a_flow_fresh_events_wait_a_moment_and_old_ones_until_they_are_many() {
        let mut pace = Pace::default();
        pace.sent(Instant::now(), SMALL);
        pace.begun(0, BEHIND_US);
        // a pause does not end the flow
        let gap = FLOW - Duration::from_micros(1);
        let pauses = |pace: &mut Pace, bytes| [0; 4].map(|_| then(pace, gap, bytes).as_micros());
        assert_eq!(pauses(&mut pace, SMALL), [200; 4]);
        pace.begun(0, BEHIND_US + 1);
        assert_eq!(pauses(&mut pace, LARGE_BYTES - 1), [800, 1600, 3200, 3200]);
        assert_eq!(pauses(&mut pace, LARGE_BYTES), [0; 4]);
        assert_eq!(pauses(&mut pace, SMALL), [800, 1600, 3200, 3200]);
        pace.begun(1_000_000, 1_000_000);
        assert_eq!(pauses(&mut pace, SMALL), [200; 4]);
    }

    #[test]
    fn times_that_no_clock_gives_are_borne() {
        let mut pace = Pace::default();
        pace.begun(i64::MAX, i64::MIN);
        assert!(!pace.behind);
        pace.begun(i64::MIN, i64::MAX);
        assert!(pace.behind);
    }
}
