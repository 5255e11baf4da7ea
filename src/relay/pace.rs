//! How long the reader lets pass before it reads again.
//!
//! Postgres sends each message of a transaction by itself. A reader that waits for each is woken for each,
//! and so are the threads behind it and the servers on both sides; on a machine that is busy, that work takes from
//! Postgres the time to send more at once, and the drain stays at a third of its rate. So a reader that has just
//! been served lets a little gather. How long is a matter of what the events have waited already.
//!
//! On the same machine even that leaves Postgres in a slow state: with the way to the reader free, each message is a packet
//! of its own, which costs more than to decode the row. While the socket's buffers are full, Postgres only appends to
//! what waits there. Once full they stay so, as Postgres is then faster than what follows; so in a backlog that comes in small
//! pieces, a long pause now and then fills them.

use std::time::{Duration, Instant};

/// Batches that follow each other within this time are a flow, not single events.
const FLOW: Duration = Duration::from_millis(1);
/// The pause in a flow of fresh events.
const FRESH_PAUSE: Duration = Duration::from_micros(200);
/// The pause in a flow of events that have waited for `BEHIND_US` already, the shortest and
/// the longest: while what gathers is too little, the next is twice as long. (A pause of 200 µs lets two drains on two cores fall into
/// the slow state one time in five. One of 5 ms each time costs a sixth of the rate.)
const BEHIND_PAUSES: [Duration; 2] = [Duration::from_micros(800), Duration::from_micros(3200)];
/// So long after its commit Postgres sends a transaction that waits in a backlog.
const BEHIND_US: i64 = 20_000;
/// The pause that fills the socket's buffers. (Of 20 and 30 ms, every third was not enough.)
const FILLING_PAUSE: Duration = Duration::from_millis(80);
/// What a transaction has waited for at least when such a pause is little to it.
const FAR_BEHIND_US: i64 = 400_000;
/// Such a pause comes when small batches outnumber the large ones by so many, the first time and at most: each time
/// twice as many, as with a Postgres that is busy otherwise it brings nothing.
const SMALL_BATCHES: [u32; 2] = [16, 1024];
/// A batch of this size needs no pause: more than enough was there at once.
const LARGE_BYTES: usize = 32 * 1024;

/// When batches went on, and how old their events were.
#[derive(Debug)]
pub struct Pace {
    /// When the last batch was sent, its pause included.
    last: Option<Instant>,
    /// Between the last transaction's commit and its sending.
    waited_us: i64,
    /// The next pause when behind.
    gather: Duration,
    /// Small batches, less the large ones, since the last filling pause.
    small: u32,
    /// How many of them bring the next one.
    small_limit: u32,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            last: None,
            waited_us: 0,
            gather: BEHIND_PAUSES[0],
            small: 0,
            small_limit: SMALL_BATCHES[0],
        }
    }
}

impl Pace {
    /// Postgres sent a transaction's Begin. Both times are by its clock, in microseconds since 2000.
    pub fn begun(&mut self, commit_time_us: i64, sent_time_us: i64) {
        self.waited_us = sent_time_us.saturating_sub(commit_time_us);
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
        let is_small = flows && bytes < LARGE_BYTES;
        self.count(is_small);
        let is_behind = self.waited_us > BEHIND_US;
        let pause = match (is_small, is_behind) {
            (false, _) => Duration::ZERO,
            (true, false) => FRESH_PAUSE,
            (true, true) if self.is_to_fill() => FILLING_PAUSE,
            (true, true) => self.gather,
        };
        let [shortest, longest] = BEHIND_PAUSES;
        self.gather = match is_small && is_behind {
            true => (self.gather * 2).min(longest),
            false => shortest,
        };
        self.last = Some(now + pause);
        pause
    }

    fn count(&mut self, is_small: bool) {
        if self.waited_us <= FAR_BEHIND_US {
            (self.small, self.small_limit) = (0, SMALL_BATCHES[0]);
        } else if is_small {
            self.small += 1;
        } else {
            self.small = self.small.saturating_sub(1);
        }
    }

    /// Whether it is time for the long pause.
    fn is_to_fill(&mut self) -> bool {
        if self.small < self.small_limit {
            return false;
        }
        self.small = 0;
        self.small_limit = (self.small_limit * 2).min(SMALL_BATCHES[1]);
        true
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
    fn a_backlog_in_small_pieces_is_let_fill_the_buffers_now_and_then() {
        let small_until_filled = |pace: &mut Pace| {
            let mut small = 1;
            while then(pace, Duration::ZERO, SMALL) < FILLING_PAUSE {
                small += 1;
                assert!(small < 10_000, "no such pause");
            }
            small
        };
        let mut pace = Pace::default();
        pace.begun(0, FAR_BEHIND_US + 1);
        pace.sent(Instant::now(), SMALL);
        assert_eq!(small_until_filled(&mut pace), 16);
        assert_eq!(small_until_filled(&mut pace), 32);
        // large ones between them put it off, and need none
        for _ in 0..63 {
            then(&mut pace, Duration::ZERO, SMALL);
        }
        for _ in 0..10 {
            assert_eq!(then(&mut pace, Duration::ZERO, LARGE_BYTES), Duration::ZERO);
        }
        assert_eq!(small_until_filled(&mut pace), 11);
        for expected in [128, 256, 512, 1024, 1024] {
            assert_eq!(small_until_filled(&mut pace), expected);
        }
        // what is less old does not wait for it, and the next backlog begins anew
        pace.begun(0, FAR_BEHIND_US);
        for _ in 0..10_000 {
            assert!(then(&mut pace, Duration::ZERO, SMALL) <= BEHIND_PAUSES[1]);
        }
        pace.begun(0, FAR_BEHIND_US + 1);
        assert_eq!(small_until_filled(&mut pace), 16);
    }

    #[test]
    fn times_that_no_clock_gives_are_borne() {
        let mut pace = Pace::default();
        pace.begun(i64::MAX, i64::MIN);
        assert_eq!(pace.waited_us, i64::MIN);
        pace.begun(i64::MIN, i64::MAX);
        assert_eq!(pace.waited_us, i64::MAX);
    }
}
