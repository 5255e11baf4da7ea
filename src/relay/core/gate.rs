//! The gate: how much may be published that the record does not know of. Evidence is read from where the record ends, so this
//! bounds what a resume has to read, and what is in doubt where messages are gone.

use std::time::{Duration, Instant};

/// At most so many events.
pub const MOST_UNRECORDED: u64 = 10_000;
/// From here on the record is written at once.
const DUE_UNRECORDED: u64 = MOST_UNRECORDED / 2;
/// At most so long after the first of them.
const LONGEST_UNRECORDED: Duration = Duration::from_secs(10);

/// See the module. Counts publishes.
#[derive(Debug, Default)]
pub struct Gate {
    published: u64,
    /// What that was when the last cut was taken, and when the last record was stored.
    in_cut: u64,
    in_record: u64,
    /// Since when there are publishes that the record lacks.
    since: Option<Instant>,
    /// Something waits for a record.
    waits: bool,
}

impl Gate {
    /// Another publish may go. If not, a record is wanted.
    pub fn may_publish(&mut self, is_recorded: bool, now: Instant) -> bool {
        let few = self.published - self.in_record < MOST_UNRECORDED;
        let fresh = self
            .since
            .is_none_or(|since| now < since + LONGEST_UNRECORDED);
        self.waits = !(is_recorded && few && fresh);
        !self.waits
    }

    /// A publish went.
    pub fn on_publish(&mut self, now: Instant) {
        self.published += 1;
        self.since.get_or_insert(now);
    }

    /// A cut was taken, to be recorded.
    pub fn on_cut(&mut self) {
        self.in_cut = self.published;
    }

    /// It is in the record.
    pub fn on_recorded(&mut self, now: Instant) {
        self.in_record = self.in_cut;
        self.since = (self.published > self.in_record).then_some(now);
        self.waits = false;
    }

    /// A record is to be written at once.
    pub fn wants_record(&self) -> bool {
        self.waits || self.published - self.in_record >= DUE_UNRECORDED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_published_than_the_record_may_lack() {
        let now = Instant::now();
        let mut gate = Gate::default();
        for _ in 0..MOST_UNRECORDED {
            assert!(gate.may_publish(true, now));
            gate.on_publish(now);
        }
        assert!(!gate.may_publish(true, now) && gate.wants_record());
        gate.on_cut();
        gate.on_recorded(now);
        assert!(gate.may_publish(true, now) && !gate.wants_record());
    }

    #[test]
    fn nothing_goes_to_a_stream_that_the_record_does_not_name() {
        let now = Instant::now();
        let mut gate = Gate::default();
        assert!(!gate.may_publish(false, now) && gate.wants_record());
    }

    #[test]
    fn publishes_that_the_record_lacks_do_not_grow_old() {
        let now = Instant::now();
        let mut gate = Gate::default();
        gate.on_publish(now);
        gate.on_cut();
        gate.on_publish(now);
        let late = now + LONGEST_UNRECORDED;
        assert!(gate.may_publish(true, late - Duration::from_millis(1)));
        assert!(!gate.may_publish(true, late));
        // the second one is still not in it
        gate.on_recorded(late);
        assert!(gate.may_publish(true, late));
        assert!(!gate.may_publish(true, late + LONGEST_UNRECORDED));
    }
}
