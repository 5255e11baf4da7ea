//! Says a thing once, and again each minute while it lasts, so that an outage of hours does not fill a disk.

use std::time::{Duration, Instant};

const AGAIN: Duration = Duration::from_secs(60);

/// What was said last, and when.
#[derive(Debug, Default)]
pub struct Repeated {
    last: Option<(String, Instant)>,
}

impl Repeated {
    /// Whether to say it now.
    pub fn is_new(&mut self, text: &str, now: Instant) -> bool {
        let old = self
            .last
            .as_ref()
            .is_some_and(|(last, at)| last == text && now.saturating_duration_since(*at) < AGAIN);
        if !old {
            self.last = Some((text.to_string(), now));
        }
        !old
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
