//! The last warnings and errors, for the status page: few, each of bounded length, and whatever level is shown on
//! standard error.
//!
//! A burst of one kind (a thousand events parked) must not push out what else was logged, so only some lines of the
//! same message are kept; lines that are the same to the letter count as one.

use super::{Pairs, cut_to};
use log::{Level, Record};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// Lines that are kept.
const MAX_LINES: usize = 32;
/// Lines with the same message, whatever its values.
const MAX_OF_A_MESSAGE: usize = 4;
const MAX_MESSAGE_CHARS: usize = 800;
const MAX_VALUES_CHARS: usize = 400;

static RECENT: Mutex<Recent> = Mutex::new(Recent::new());

/// A warning or an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When it was first logged, of those times that are counted.
    pub first: SystemTime,
    /// When it was last logged.
    pub at: SystemTime,
    /// How often the same line was.
    pub times: u64,
    /// [`Level::Warn`] or [`Level::Error`].
    pub level: Level,
    /// What happened.
    pub message: String,
    /// Its values, as logfmt.
    pub values: String,
}

/// What was logged of late.
#[derive(Clone, Debug)]
pub struct Recent {
    /// All since the process began, also those that are not kept.
    pub total: u64,
    /// The oldest first.
    pub lines: VecDeque<Line>,
}

impl Recent {
    const fn new() -> Recent {
        Recent {
            total: 0,
            lines: VecDeque::new(),
        }
    }

    fn add(&mut self, line: Line) {
        self.total += 1;
        let is_same = |it: &Line| (&it.message, &it.values) == (&line.message, &line.values);
        if let Some(mut same) = self
            .lines
            .iter()
            .position(is_same)
            .and_then(|index| self.lines.remove(index))
        {
            same.at = line.at;
            same.times += 1;
            self.lines.push_back(same);
            return;
        }
        let is_alike = |it: &&Line| it.message == line.message;
        let oldest = match self.lines.iter().filter(is_alike).count() {
            MAX_OF_A_MESSAGE.. => self.lines.iter().position(|it| is_alike(&it)),
            _ => (self.lines.len() >= MAX_LINES).then_some(0),
        };
        if let Some(index) = oldest {
            self.lines.remove(index);
        }
        self.lines.push_back(line);
    }
}

fn lock() -> MutexGuard<'static, Recent> {
    RECENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a record, if it is a warning or an error.
pub(super) fn note(record: &Record<'_>) {
    if record.level() > Level::Warn {
        return;
    }
    let mut values = String::new();
    // writing to a String cannot fail
    let _ = Pairs::text(&mut values).all(record);
    let message = record.args().to_string();
    let now = SystemTime::now();
    let line = Line {
        first: now,
        at: now,
        times: 1,
        level: record.level(),
        message: cut_to(&message, MAX_MESSAGE_CHARS).to_string(),
        values: cut_to(values.trim_start(), MAX_VALUES_CHARS).to_string(),
    };
    lock().add(line);
}

/// What is kept.
pub fn recent() -> Recent {
    lock().clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn line(second: u64, message: &str, values: &str) -> Line {
        let at = UNIX_EPOCH + Duration::from_secs(second);
        Line {
            first: at,
            at,
            times: 1,
            level: Level::Warn,
            message: message.to_string(),
            values: values.to_string(),
        }
    }

    #[test]
    fn a_burst_of_one_message_pushes_no_other_out() {
        let mut recent = Recent::new();
        recent.add(line(0, "other", ""));
        for second in 1..=1_000 {
            recent.add(line(second, "parked", &format!("id={second}")));
        }
        let kept: Vec<&str> = recent.lines.iter().map(|it| it.values.as_str()).collect();
        assert_eq!(kept, ["", "id=997", "id=998", "id=999", "id=1000"]);
        assert_eq!(recent.total, 1_001);
    }

    #[test]
    fn the_same_line_is_kept_once_with_its_last_time() {
        let mut recent = Recent::new();
        recent.add(line(1, "a", "k=1"));
        recent.add(line(2, "b", ""));
        recent.add(line(3, "a", "k=1"));
        let kept: Vec<(&str, u64)> = recent
            .lines
            .iter()
            .map(|it| (it.message.as_str(), it.times))
            .collect();
        assert_eq!(kept, [("b", 1), ("a", 2)]);
        let after = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(recent.lines[1].first, after(1));
        assert_eq!(recent.lines[1].at, after(3));
    }

    #[test]
    fn the_oldest_goes_when_there_are_too_many() {
        let mut recent = Recent::new();
        for second in 0..100 {
            recent.add(line(second, &format!("message {second}"), ""));
        }
        assert_eq!(recent.lines.len(), MAX_LINES);
        assert_eq!(recent.lines[0].message, "message 68");
    }
}
