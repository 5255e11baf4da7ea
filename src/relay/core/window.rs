//! The window: the changes that Postgres sent and that are not resolved yet, in order, and how many of them may be out.
//!
//! Entries before the cursor were handed to the connection or are resolved; the front leaves once it is resolved. The window
//! knows no stream: which one an event goes to, and what an answer means, is its owner's.

use crate::outbox::batch::{Batch, Change, Event, Fate};
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

/// So much of a transaction is held behind an event that waits to learn whether it is the last one of its stream; the rest of
/// it then goes to other streams.
const MOST_AHEAD: usize = 1 << 20;
/// What an entry is counted as at least.
const ENTRY_BYTES: usize = 64;

/// Where an event is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Which stream.
    pub stream: usize,
    /// Its sequence there.
    pub seq: u64,
    /// It is an event of its transaction there: it is not parked, and has its own position.
    pub counts: bool,
}

/// What comes after an event in its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Another event for the stream, for all that is known.
    More,
    /// None.
    End,
    /// That has not come yet.
    Unknown,
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
    /// It is stored there; or, with `None`, it is in no stream that is known: found gone, dropped, given up.
    Resolved(Option<Stored>),
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
    Event(Event, Option<Stored>),
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
    ahead: Ahead,
}

/// What was looked at behind the event at the cursor, which the event itself waits for.
#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    token: u64,
    /// Up to this token nothing goes to its stream, and so many bytes go elsewhere.
    upto: u64,
    bytes: usize,
    /// It waits for what has not come.
    is_held: bool,
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
            ahead: Ahead::default(),
        }
    }

    /// Takes the next changes of the copy stream. `Err`: an event at this position is not after the one before it; Postgres
    /// sends transactions in commit order.
    pub fn offer(&mut self, batch: &Arc<Batch>) -> Result<(), Position> {
        self.ahead.is_held = false;
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
    pub fn resolve_at_cursor(&mut self, stored: Option<Stored>) {
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

    /// Everything that came so far was handed on, but for what waits for more, and there is room for that.
    pub fn wants_batch(&self) -> bool {
        (self.cursor == self.entries.len() || self.is_held()) && self.has_room(0)
    }

    /// The event at the cursor waits for what comes after it.
    fn is_held(&self) -> bool {
        self.ahead.is_held && self.ahead.token == self.first_token + self.cursor as u64
    }

    /// What comes after the event at the cursor in its transaction, of what `goes_along` with it to its stream. Until that is
    /// known the event is to wait, and another batch is wanted.
    pub fn after(&mut self, goes_along: impl Fn(&Pending) -> bool) -> After {
        let Some((token, pending)) = self.at_cursor() else {
            return After::End;
        };
        let commit_lsn = pending.event.position().commit_lsn;
        if self.ahead.token != token || self.ahead.upto <= token {
            self.ahead = Ahead {
                token,
                upto: token + 1,
                ..Ahead::default()
            };
        }
        self.ahead.is_held = false;
        let seen = (self.ahead.upto - self.first_token) as usize;
        for (entry, next) in self.entries.iter().skip(seen).zip(self.ahead.upto + 1..) {
            match entry {
                Entry::Boundary(boundary) if boundary.commit.is_some() => return After::End,
                Entry::Event(it) if it.event.position().commit_lsn != commit_lsn => {
                    return After::End;
                }
                Entry::Event(it) if goes_along(it) => return After::More,
                Entry::Event(it) => {
                    self.ahead.bytes += it.event.spans().size().max(ENTRY_BYTES);
                    self.ahead.upto = next;
                }
                // a keepalive's, which may become the commit's
                Entry::Boundary(_) => {}
            }
        }
        if self.ahead.bytes > MOST_AHEAD {
            return After::More;
        }
        self.ahead.is_held = true;
        After::Unknown
    }

    /// The events before the cursor that are of its event's transaction, the last one first.
    fn of_transaction(&self) -> impl Iterator<Item = &Pending> {
        let at = |entry: &Entry| match entry {
            Entry::Event(pending) => Some(pending.event.position().commit_lsn),
            Entry::Boundary(_) => None,
        };
        let commit_lsn = self.entries.get(self.cursor).and_then(at);
        let before = self.entries.range(..self.cursor).rev();
        let before = before.take_while(move |entry| match entry {
            Entry::Event(_) => at(entry) == commit_lsn,
            Entry::Boundary(boundary) => boundary.commit.is_none(),
        });
        before.filter_map(|entry| match entry {
            Entry::Event(pending) => Some(pending),
            Entry::Boundary(_) => None,
        })
    }

    /// How many events of the transaction at the cursor are before it in `stream` or on their way there; those that have left the
    /// front are not counted.
    pub fn share(&self, stream: usize) -> u64 {
        let counts = |pending: &&Pending| match pending.state {
            State::Sent { stream: of, .. } => of == stream && pending.event.fate() != Fate::Park,
            State::Resolved(Some(stored)) => stored.stream == stream && stored.counts,
            State::Unsent | State::Resolved(None) => false,
        };
        self.of_transaction().filter(counts).count() as u64
    }

    /// An event of the transaction at the cursor is on its way to `stream`.
    pub fn is_on_its_way(&self, stream: usize) -> bool {
        let is_sent =
            |it: &Pending| matches!(it.state, State::Sent { stream: of, .. } if of == stream);
        self.of_transaction().any(is_sent)
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
    pub fn on_stored(&mut self, token: u64, stored: Option<Stored>, now: Instant) {
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
        // another connection may have other routes
        self.ahead = Ahead::default();
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

    /// Nothing is left that is not resolved, but for what waits for the rest of its transaction.
    pub fn is_settled(&self) -> bool {
        self.entries.is_empty() || self.cursor == 0 && self.is_held()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn limits() -> Limits {
        Limits {
            inflight: 10,
            inflight_bytes: 1 << 20,
            replies: 10,
            ack_timeout: Duration::from_secs(5),
        }
    }

    fn event(batch: &mut Batch, lsn: u64, ordinal: u32, bytes: usize) {
        let position = Position {
            commit_lsn: Lsn(lsn),
            ordinal,
        };
        let body = |out: &mut Vec<u8>| {
            out.resize(out.len() + bytes, b'x');
            Ok::<(), Infallible>(())
        };
        let Ok(()) = batch.push_event("t", position, |_| Ok(()), |_| Ok(()), body);
    }

    fn commit(lsn: u64) -> Change {
        Change::Commit {
            commit_lsn: Lsn(lsn),
            end_lsn: Lsn(lsn + 5),
            commit_time_us: 0,
        }
    }

    fn offer(window: &mut Window, fill: impl FnOnce(&mut Batch)) {
        let mut batch = Batch::default();
        fill(&mut batch);
        window.offer(&Arc::new(batch)).unwrap();
    }

    #[test]
    fn the_last_event_of_a_stream_waits_for_the_next_or_for_the_commit() {
        let mut window = Window::new(limits());
        offer(&mut window, |batch| event(batch, 10, 1, 1));
        assert!(!window.wants_batch() && !window.is_settled());
        assert_eq!(window.after(|_| true), After::Unknown);
        assert!(window.wants_batch() && window.is_settled());
        // a keepalive in the middle of the transaction, and then an event of another stream
        offer(&mut window, |batch| batch.push_boundary(Lsn(8)));
        assert!(!window.wants_batch());
        assert_eq!(window.after(|_| true), After::Unknown);
        offer(&mut window, |batch| event(batch, 10, 2, 1));
        assert_eq!(
            window.after(|it| it.event.position().ordinal > 2),
            After::Unknown
        );
        assert_eq!(
            window.after(|it| it.event.position().ordinal > 2),
            After::Unknown
        );
        // which the commit becomes one with
        offer(&mut window, |batch| batch.push_boundary(Lsn(9)));
        assert_eq!(
            window.after(|it| it.event.position().ordinal > 2),
            After::Unknown
        );
        offer(&mut window, |batch| batch.push(commit(10)));
        assert_eq!(
            window.after(|it| it.event.position().ordinal > 2),
            After::End
        );
        assert!(!window.is_settled());
        // the next transaction ends it, too
        window.resolve_at_cursor(None);
        offer(&mut window, |batch| event(batch, 20, 1, 1));
        assert_eq!(window.after(|_| true), After::End);
        window.resolve_at_cursor(None);
        offer(&mut window, |batch| event(batch, 20, 2, 1));
        assert_eq!(window.after(|_| true), After::More);
    }

    #[test]
    fn no_more_is_held_behind_it_than_a_bound() {
        let mut window = Window::new(limits());
        offer(&mut window, |batch| event(batch, 10, 1, 1));
        let mut ahead = 0;
        while window.after(|_| false) == After::Unknown {
            offer(&mut window, |batch| event(batch, 10, 2 + ahead, 100_000));
            ahead += 1;
        }
        assert_eq!(ahead, 11);
        // other routes may lead there
        window.on_disconnect();
        assert_eq!(
            window.after(|it| it.event.position().ordinal == 2),
            After::More
        );
    }

    #[test]
    fn the_share_of_a_transaction_is_what_is_stored_or_on_its_way_in_the_stream() {
        let now = Instant::now();
        let mut window = Window::new(limits());
        let at = |stream, counts| {
            Some(Stored {
                stream,
                seq: 1,
                counts,
            })
        };
        offer(&mut window, |batch| {
            event(batch, 10, 1, 1);
            batch.push(commit(10));
            (1..8).for_each(|ordinal| event(batch, 20, ordinal, 1));
        });
        // another transaction, another stream, what is parked, dropped or has another position
        window.send_at_cursor(0, 0, false, now);
        window.send_at_cursor(0, 1, false, now);
        window.send_at_cursor(1, 0, false, now);
        window.resolve_at_cursor(at(0, true));
        window.resolve_at_cursor(at(0, false));
        window.resolve_at_cursor(None);
        assert_eq!(
            (window.share(0), window.share(1), window.share(2)),
            (2, 1, 0)
        );
        assert!(window.is_on_its_way(0) && window.is_on_its_way(1));
        window.on_stored(2, at(0, true), now);
        assert_eq!(window.share(0), 2);
        assert!(!window.is_on_its_way(0));
    }
}
