//! How long to wait before the next attempt, and when to give up. Pure.
//!
//! The one policy for both sides. It starts over when work was done, not when a connection was made:
//! a server that accepts and then fails would otherwise be tried without a pause.

use std::time::{Duration, Instant};

/// The first pause: an immediate restart of a server is caught without a noticeable delay.
const SHORTEST: Duration = Duration::from_millis(50);
/// The longest: an operator who mends something sees the effect while watching.
const LONGEST: Duration = Duration::from_secs(5);

/// What lasted so long, a session or a connection, has worked, also when there was nothing to do.
pub const WORKING: Duration = Duration::from_secs(10);

/// The time since something last worked.
#[derive(Debug)]
pub struct Outage {
    longest: Option<Duration>,
    since: Option<Instant>,
    pause: Duration,
}

impl Outage {
    /// Gives up after `max_outage`; `None`: never.
    pub fn new(max_outage: Option<Duration>) -> Outage {
        Outage {
            longest: max_outage,
            since: None,
            pause: SHORTEST,
        }
    }

    /// An attempt failed. How long to wait before the next; `None`: give up.
    pub fn failed(&mut self, now: Instant) -> Option<Duration> {
        let since = *self.since.get_or_insert(now);
        if self
            .longest
            .is_some_and(|longest| now.saturating_duration_since(since) >= longest)
        {
            return None;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST);
        Some(pause)
    }

    /// Work was done.
    pub fn worked(&mut self) {
        self.since = None;
        self.pause = SHORTEST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_start_over_when_work_was_done() {
        let now = Instant::now();
        let mut outage = Outage::new(None);
        let pauses: Vec<_> = (0..9)
            .map(|_| outage.failed(now).unwrap().as_millis())
            .collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        outage.worked();
        assert_eq!(outage.failed(now), Some(SHORTEST));
    }

    #[test]
    fn it_gives_up_after_the_longest_outage_and_not_before() {
        let start = Instant::now();
        let mut outage = Outage::new(Some(Duration::from_secs(60)));
        assert!(outage.failed(start).is_some());
        assert!(outage.failed(start + Duration::from_secs(59)).is_some());
        assert_eq!(outage.failed(start + Duration::from_secs(60)), None);
        outage.worked();
        assert!(outage.failed(start + Duration::from_secs(61)).is_some());
    }
}
