//! How a session ends for the publisher: what was read is settled, then the record is written, each within its time. Pure.

use std::time::{Duration, Instant};

/// So long outstanding acks are waited for when the session ends before everything is settled.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// So long the last write of the record is tried; without it the next start reads back more. A cluster
/// that has just lost a node needs some seconds to find the bucket a leader.
const RECORD_LIMIT: Duration = Duration::from_secs(5);

/// Whether more changes come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Closing {
    /// They may.
    #[default]
    No,
    /// They do not; what is in the window has until then, and this connection.
    By(Instant),
    /// They do not; the window is settled however long it takes (`-drain`), unless the relay is to stop.
    WhenSettled,
}

/// The state of the end. See the module.
#[derive(Debug, Default)]
pub struct Ending {
    closing: Closing,
    /// The reader has ended, and all it has read was taken.
    has_read_all: bool,
    /// When the last write of the record is given up.
    record_until: Option<Instant>,
}

impl Ending {
    /// No more changes come; `drains`: what came is settled however long it takes.
    pub fn begin(&mut self, drains: bool, now: Instant) {
        self.closing = match drains {
            true => Closing::WhenSettled,
            false => Closing::By(now + SETTLE_LIMIT),
        };
    }

    /// The last of what was read was taken.
    pub fn read_all(&mut self) {
        self.has_read_all = true;
    }

    /// Nothing more can be taken.
    pub fn has_read_all(&self) -> bool {
        self.has_read_all
    }

    /// It ends at a time, settled or not, so a stop changes nothing any more.
    pub fn is_limited(&self) -> bool {
        matches!(self.closing, Closing::By(_))
    }

    /// Everything that is to be published is, or has had its time.
    pub fn is_settled(&self, window_is_settled: bool, now: Instant) -> bool {
        match self.closing {
            Closing::No => false,
            Closing::WhenSettled => window_is_settled,
            Closing::By(deadline) => self.has_read_all && window_is_settled || now >= deadline,
        }
    }

    /// All is settled, and the record is not written: whether it has had its time.
    pub fn gives_the_record_up(&mut self, now: Instant) -> bool {
        now >= *self.record_until.get_or_insert(now + RECORD_LIMIT)
    }

    /// When the next of these times is over.
    pub fn deadline(&self) -> Option<Instant> {
        let settled = match self.closing {
            Closing::By(deadline) => Some(deadline),
            Closing::No | Closing::WhenSettled => None,
        };
        settled.into_iter().chain(self.record_until).min()
    }
}
