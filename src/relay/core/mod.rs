//! Every decision of the publishing side: what to publish next, what an answer means, where to go on after a lost
//! connection, when to halt. Pure: no socket, clock or thread; time comes in.
//!
//! [`exactly_once`] is the default delivery, [`at_least_once`] the other one. Both keep what Postgres sent in a [`window`].
//! Exactly-once has a [`fence`] for each [`stream`], and publishes what [`evidence`] does not show to be stored; [`resume`]
//! finds out where to go on, [`continuity`] proves that the WAL is the one that the streams were written from, [`doubt`] is
//! about messages that are gone, and the [`gate`] bounds what the record lacks. [`capacity`] is how large an event may be,
//! [`trouble`] why things cannot go on. [`rules`] lists the rules.

pub mod at_least_once;
pub mod capacity;
pub mod continuity;
pub mod doubt;
pub mod evidence;
pub mod exactly_once;
pub mod fence;
pub mod gate;
pub mod resume;
pub mod stream;
pub mod trouble;
pub mod window;

use crate::jetstream::wire::Publish;
use capacity::TooLarge;

/// What to do next.
#[derive(Debug)]
pub enum Next {
    /// Publish this.
    Publish(Publish),
    /// Read these sequences of the stream of that name, and hand over what is there.
    Read {
        /// The stream.
        stream: String,
        /// The first sequence.
        from: u64,
        /// The last one.
        to: u64,
    },
    /// The event is larger than may go: replace it, give it up, or halt.
    TooLarge {
        /// Names the event.
        token: u64,
        /// How large it is.
        too_large: TooLarge,
    },
    /// Nothing now: the window is full or empty, or what comes next waits for answers or for a record.
    Nothing,
}

/// Counters since the core was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Events stored by us.
    pub published: u64,
    /// Bytes of their bodies.
    pub published_bytes: u64,
    /// Events found stored on resume.
    pub skipped: u64,
    /// Events dropped because an earlier event had used their id.
    pub dropped: u64,
    /// Of the published, those that were parked.
    pub parked: u64,
    /// Events given up.
    pub lost: u64,
    /// Events published after later ones, because a foreign message had let those pass.
    pub late: u64,
    /// Foreign messages that took the place of a publish, which was then repeated.
    pub foreign: u64,
}
