//! The window: the changes that Postgres sent and that are not resolved yet, in order, and how many of them may be out.
//!
//! Entries before the cursor were handed to the connection or are resolved; the front leaves once it is resolved. The window
//! knows no stream: which one an event goes to, and what an answer means, is its owner's.

use crate::outbox::batch::{Batch, Change, Event};
use crate::outbox::position::Position;
use crate::postgres::Lsn;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The bounds of the window.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Events that wait for their ack.
    pub inflight: usize,
    /// Bytes of such events; one event may be larger.
    pub inflight_bytes: usize,
    /// The names for the answers of one stream's publishes, which they use in turn. Few, since nats-server looks up
    /// again where a name leads that it has not seen lately.
    pub replies: u64,
    /// Longest wait for the oldest unacknowledged publish.
    pub ack_timeout: Duration,
}

/// What is known of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was not published over this connection, or was refused.
    Unsent,
    /// It was published, and its answer is due.
    Sent {
        /// Which stream it was sent to.
        stream: usize,
        /// The sequence that the stream had to end at.
        expected: u64,
        /// After a later event of the stream.
        is_late: bool,
    },
    /// It is stored at this sequence of the stream; or, with `None`, it is in no stream that is known: found gone,
    /// dropped, given up.
    Resolved(Option<(usize, u64)>),
}

/// An event that is not resolved, or waits for an earlier one.
#[derive(Debug)]
pub struct Pending {
    /// The event.
    pub event: Event,
    /// What is known of it.
    pub state: State,
    /// The server called it a duplicate of the message with this sequence.
    pub suspect: Option<u64>,
}

/// An entry of the window.
#[derive(Debug)]
pub enum Entry {
    /// An event.
    Event(Pending),
    /// Everything before it ends here.
    Boundary(Boundary),
}

/// A commit's end, or a keepalive's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Everything up to here has come.
    pub lsn: Lsn,
    /// The transaction that ends here.
    pub commit: Option<Commit>,
}

/// A transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Where its commit record starts.
    pub lsn: Lsn,
    /// When it was committed, in microseconds since 2000-01-01 UTC.
    pub time_us: i64,
}

/// What left the front.
#[derive(Debug)]
pub enum Resolved {
    /// An event, and where it is stored if that is known.
    Event(Event, Option<(usize, u64)>),
    /// Everything up to here is resolved.
    Boundary(Boundary),
}

/// See the module.
#[derive(Debug)]
pub struct Window {
    limits: Limits,
    entries: VecDeque<Entry>,
    /// The token of the front; tokens count entries.
    first_token: u64,
    cursor: usize,
    /// Events before the cursor, and their bytes.
    held: usize,
    held_bytes: usize,
    /// Events whose answer is due, and since when the oldest of them has waited.
    waiting: usize,
    waiting_since: Option<Instant>,
    /// The last event that came, and the transaction that a batch ended in the middle of.
    offered: Position,
    open: Option<Commit>,
    /// Up to this token each publish that waits has a name of its own for its answer.
    named_until: u64,
}

impl Window {
    /// An empty one.
    pub fn new(limits: Limits) -> Window {
        Window {
            limits,
            entries: VecDeque::new(),
            first_token: 0,
            cursor: 0,
            held: 0,
            held_bytes: 0,
            waiting: 0,
            waiting_since: None,
            offered: Position::default(),
            open: None,
            named_until: 0,
        }
    }

    /// Takes the next changes of the copy stream. `Err`: an event at this position is not after the one before it; Postgres
    /// sends transactions in commit order.
    pub fn offer(&mut self, batch: &Arc<Batch>) -> Result<(), Position> {
        for (index, change) in batch.changes().iter().enumerate() {
            let boundary = match *change {
                Change::Event(spans) => {
                    if spans.position <= self.offered {
                        return Err(spans.position);
                    }
                    self.offered = spans.position;
                    let event = Event::new(batch, index).expect("the change is an event");
                    self.entries.push_back(Entry::Event(Pending {
                        event,
                        state: State::Unsent,
                        suspect: None,
                    }));
                    continue;
                }
                Change::Open {
                    commit_lsn: lsn,
                    commit_time_us: time_us,
                } => {
                    self.open = Some(Commit { lsn, time_us });
                    continue;
                }
                Change::Commit {
                    commit_lsn: lsn,
                    end_lsn,
                    commit_time_us: time_us,
                } => Boundary {
                    lsn: end_lsn,
                    commit: Some(Commit { lsn, time_us }),
                },
                Change::Keepalive { wal_end } => Boundary {
                    lsn: wal_end,
                    commit: None,
                },
            };
            match self.entries.back_mut() {
                // an idle outbox's keepalives must not pile up after what waits
                Some(Entry::Boundary(last)) => {
                    last.lsn = last.lsn.max(boundary.lsn);
                    last.commit = boundary.commit.or(last.commit);
                }
                _ => self.entries.push_back(Entry::Boundary(boundary)),
            }
        }
        Ok(())
    }

    /// The last event that came.
    pub fn offered(&self) -> Position {
        self.offered
    }

    /// The entry at the cursor and its token, past boundaries and what is resolved.
    pub fn at_cursor(&mut self) -> Option<(u64, &mut Pending)> {
        loop {
            match self.entries.get(self.cursor)? {
                Entry::Boundary(_) => self.cursor += 1,
                Entry::Event(pending) => match pending.state {
                    State::Unsent => break,
                    State::Sent { .. } | State::Resolved(_) => self.pass(),
                },
            }
        }
        let token = self.first_token + self.cursor as u64;
        match self.entries.get_mut(self.cursor) {
            Some(Entry::Event(pending)) => Some((token, pending)),
            _ => None,
        }
    }

    /// The event at the cursor is resolved without a publish.
    pub fn resolve_at_cursor(&mut self, stored: Option<(usize, u64)>) {
        if let Some((_, pending)) = self.at_cursor() {
            pending.state = State::Resolved(stored);
            self.pass();
        }
    }

    /// The event at the cursor is published.
    pub fn send_at_cursor(&mut self, stream: usize, expected: u64, is_late: bool, now: Instant) {
        if let Some((_, pending)) = self.at_cursor() {
            pending.state = State::Sent {
                stream,
                expected,
                is_late,
            };
            self.pass();
            self.waiting += 1;
            self.waiting_since.get_or_insert(now);
        }
    }

    fn pass(&mut self) {
        if let Some(Entry::Event(pending)) = self.entries.get(self.cursor) {
            self.held += 1;
            self.held_bytes += pending.event.spans().size();
        }
        self.cursor += 1;
    }

    /// The publishes up to the cursor are to be published again, each under a name of its own: no more are held at a time than
    /// there are names.
    pub fn name_each(&mut self) {
        self.named_until = self.first_token + self.cursor as u64;
    }

    /// The bounds.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Another event of `size` bytes may be held.
    pub fn has_room(&self, size: usize) -> bool {
        let inflight = match self.first_token < self.named_until {
            true => self.limits.inflight.min(self.limits.replies as usize),
            false => self.limits.inflight,
        };
        self.held == 0
            || self.held < inflight && self.held_bytes + size <= self.limits.inflight_bytes
    }

    /// Everything that came so far was handed on, and there is room for more.
    pub fn wants_batch(&self) -> bool {
        self.cursor == self.entries.len() && self.has_room(0)
    }

    /// The event under this token.
    pub fn get(&self, token: u64) -> Option<&Pending> {
        let index = token.checked_sub(self.first_token)?;
        match self.entries.get(usize::try_from(index).ok()?)? {
            Entry::Event(pending) => Some(pending),
            Entry::Boundary(_) => None,
        }
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, token: u64) -> Option<&mut Pending> {
        let index = token.checked_sub(self.first_token)?;
        match self.entries.get_mut(usize::try_from(index).ok()?)? {
            Entry::Event(pending) => Some(pending),
            Entry::Boundary(_) => None,
        }
    }

    /// Another form of the event under this token, at its position, is to be published in its place. Only of one
    /// that is not on its way: its answer would count for another.
    pub fn replace(&mut self, token: u64, event: Event) {
        if let Some(pending) = self.get_mut(token) {
            assert_eq!(event.position(), pending.event.position());
            assert_eq!(
                pending.state,
                State::Unsent,
                "its answer would count for another"
            );
            pending.event = event;
        }
    }

    /// The event under this token, whose answer was due, is stored.
    pub fn on_stored(&mut self, token: u64, stored: Option<(usize, u64)>, now: Instant) {
        let is_front = token == self.first_token;
        if let Some(pending) = self.get_mut(token) {
            assert!(
                matches!(pending.state, State::Sent { .. }),
                "no answer is due"
            );
            pending.state = State::Resolved(stored);
            self.waiting -= 1;
            if self.waiting == 0 {
                self.waiting_since = None;
            } else if is_front {
                // the oldest: what another stream acknowledges says nothing of this one
                self.waiting_since = Some(now);
            }
        }
    }

    /// The publishes to `stream` whose answers were due were refused: they are to be published again, and so the
    /// cursor goes back to the first of them.
    pub fn on_refused(&mut self, stream: usize) {
        self.unsend(|of| of == stream);
    }

    /// The connection is gone: what was published over it is to be published or found again, also what was
    /// acknowledged, since the stream may have lost it since.
    pub fn on_disconnect(&mut self) {
        // also after the cursor: it went back to what one stream has refused, and other streams have later events
        for entry in &mut self.entries {
            if let Entry::Event(pending) = entry
                && matches!(pending.state, State::Resolved(Some(_)))
            {
                pending.state = State::Unsent;
            }
        }
        self.unsend(|_| true);
        (self.cursor, self.held, self.held_bytes) = (0, 0, 0);
        (self.waiting, self.waiting_since) = (0, None);
    }

    fn unsend(&mut self, of: impl Fn(usize) -> bool) {
        let mut first = None;
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if let Entry::Event(pending) = entry
                && let State::Sent { stream, .. } = pending.state
                && of(stream)
            {
                pending.state = State::Unsent;
                self.waiting -= 1;
                first.get_or_insert(index);
            }
        }
        if self.waiting == 0 {
            self.waiting_since = None;
        }
        if let Some(first) = first.filter(|first| *first < self.cursor) {
            self.rewind(first);
        }
    }

    fn rewind(&mut self, to: usize) {
        for entry in self.entries.range(to..self.cursor) {
            if let Entry::Event(pending) = entry {
                self.held -= 1;
                self.held_bytes -= pending.event.spans().size();
            }
        }
        self.cursor = to;
    }

    /// Takes what is resolved off the front.
    pub fn pop(&mut self) -> Option<Resolved> {
        let resolved = match self.entries.front()? {
            Entry::Event(pending) => match pending.state {
                State::Resolved(stored) if self.cursor > 0 => {
                    self.held -= 1;
                    self.held_bytes -= pending.event.spans().size();
                    Resolved::Event(pending.event.clone(), stored)
                }
                _ => return None,
            },
            Entry::Boundary(boundary) => Resolved::Boundary(*boundary),
        };
        self.entries.pop_front();
        self.first_token += 1;
        self.cursor = self.cursor.saturating_sub(1);
        Some(resolved)
    }

    /// When the transaction was committed that the front belongs to, if it is the one with this commit.
    pub fn commit_time_us(&self, commit_lsn: Lsn) -> Option<i64> {
        let mut commits = self.entries.iter().filter_map(|entry| match entry {
            Entry::Boundary(boundary) => boundary.commit,
            Entry::Event(_) => None,
        });
        let commit = commits.next().or(self.open);
        commit
            .filter(|it| it.lsn == commit_lsn)
            .map(|it| it.time_us)
    }

    /// The events.
    pub fn events(&self) -> impl Iterator<Item = &Pending> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Event(pending) => Some(pending),
            Entry::Boundary(_) => None,
        })
    }

    /// The first and the last of the publishes whose answers are due.
    pub fn sent(&self) -> Option<(u64, u64)> {
        let is_sent = |entry: &Entry| match entry {
            Entry::Event(pending) => matches!(pending.state, State::Sent { .. }),
            Entry::Boundary(_) => false,
        };
        let first = self.entries.iter().position(is_sent)?;
        let last = self.entries.iter().rposition(is_sent)?;
        Some((
            self.first_token + first as u64,
            self.first_token + last as u64,
        ))
    }

    /// Publishes whose answers are due.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// When the oldest of them will have waited for too long.
    pub fn deadline(&self) -> Option<Instant> {
        let since = self.waiting_since?;
        Some(since + self.limits.ack_timeout)
    }

    /// Nothing is left that is not resolved.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
