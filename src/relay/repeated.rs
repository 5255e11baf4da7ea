//! Says a thing once, and again each minute while it lasts, so that an outage of hours does not fill a disk.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

const AGAIN: Duration = Duration::from_secs(60);

/// More different things than this are not said within a minute; beyond it the oldest is forgotten.
const REMEMBERED: usize = 32;

/// What was said within the last minute.
#[derive(Debug, Default)]
pub struct Repeated {
    said: VecDeque<(String, Instant)>,
}

impl Repeated {
    /// Whether to say it now.
    pub fn is_new(&mut self, text: &str, now: Instant) -> bool {
        self.said
            .retain(|(_, at)| now.saturating_duration_since(*at) < AGAIN);
        if self.said.iter().any(|(said, _)| said == text) {
            return false;
        }
        if self.said.len() == REMEMBERED {
            self.said.pop_front();
        }
        self.said.push_back((text.to_string(), now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_a_minute_and_another_at_once() {
        let start = Instant::now();
        let mut said = Repeated::default();
        let at = |seconds| start + Duration::from_secs(seconds);
        let answers = [
            ("a", 0),
            ("a", 1),
            ("b", 2),
            ("b", 61),
            ("b", 62),
            ("a", 63),
        ]
        .map(|(t, s)| said.is_new(t, at(s)));
        assert_eq!(answers, [true, false, true, false, true, true]);
    }
}
