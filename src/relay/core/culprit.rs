//! Which event can never be published, where no answer names it: the server ends the connection over it, or its stream refuses
//! it again and again with an error that is not known. Pure.
//!
//! A connection also ends when a server dies or the network fails, and then no event is to blame. So:
//!
//! 1. What was on its way when a connection ended goes alone after that: at once, if the server has complained of a message; if
//!    it said nothing, only when two connections in a row have ended at the same first event.
//! 2. An event that goes alone is sent between two PINGs, and nothing else is. Once the first is answered the connection is
//!    well, and the server has taken all that came before.
//! 3. What ends the connection from there until the event or the second PING is answered is counted against the event, if the
//!    server has ended it: a complaint counts at once; silence only three times in a row. A timeout counts nothing. While a
//!    server is away the first PING has no answer; so an outage counts only if it comes within that one round trip, three times
//!    in a row, at the same event.
//! 4. On silence, and on an unknown error, one event may be put aside. If its stream then takes none before the next is to go,
//!    that is no matter of one event: the relay halts.

use crate::jetstream::ack::AckErrorKind;
use crate::nats::EndedBy;
use std::time::Instant;

/// So many connections in a row are ended at an event, without a word, before it is to blame.
const MOST_SILENT: u32 = 3;
/// So often an event is refused with an unknown error before that lasts: with the pauses of `outage`, half a minute.
const MOST_UNKNOWN: u32 = 10;
/// So often a stream takes no event at all: what the streams are is read again between the two.
const MOST_CLOSED: u32 = 2;

/// See the module. Events are named by their tokens.
#[derive(Debug, Default)]
pub struct Culprit {
    /// Events before this one go alone.
    alone_before: u64,
    probe: Probe,
    /// The first event that was on its way when the last connection ended without a word.
    silent_at: Option<u64>,
    strikes: Option<Strikes>,
    /// An event was put aside on silence or an unknown error, and this stream has taken none since.
    doubtful: Option<String>,
}

/// Of the event that goes alone next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Probe {
    #[default]
    None,
    /// The PING before it is on its way, since then.
    Pinged(Instant),
    /// That is answered, and nothing was sent since.
    Well,
    /// The event is on its way, and the PING after it is to be sent.
    Sent(u64),
    /// That is sent.
    Out(u64, Instant),
}

/// What is counted against an event.
#[derive(Clone, Copy, Debug)]
struct Strikes {
    token: u64,
    of: Strike,
    times: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strike {
    Silence,
    Refusal(AckErrorKind),
}

/// What is to be done about an event that should go alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alone {
    /// Send a PING, and wait for its answer.
    Ping,
    /// Wait for an answer.
    Wait,
    /// Publish it.
    Publish,
}

/// What follows a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It may go better: the event is tried again.
    Retry,
    /// It will not.
    Never,
}

impl Culprit {
    /// The event is to go alone.
    pub fn is_suspect(&self, token: u64) -> bool {
        token < self.alone_before
    }

    /// Nothing else may be sent, whatever it is.
    pub fn is_probing(&self) -> bool {
        self.probe != Probe::None
    }

    /// A PING is to be sent now, behind the event that was published.
    pub fn pings_after(&mut self, now: Instant) -> bool {
        let Probe::Sent(token) = self.probe else {
            return false;
        };
        self.probe = Probe::Out(token, now);
        true
    }

    /// An event that is to go alone could go now, as nothing is on its way.
    pub fn before(&mut self, now: Instant) -> Alone {
        match self.probe {
            Probe::None => {
                self.probe = Probe::Pinged(now);
                Alone::Ping
            }
            Probe::Well => Alone::Publish,
            Probe::Pinged(_) | Probe::Sent(_) | Probe::Out(..) => Alone::Wait,
        }
    }

    /// It cannot go after all: something else is to be done first.
    pub fn postpone(&mut self) {
        if self.probe == Probe::Well {
            self.probe = Probe::None;
        }
    }

    /// An event is published.
    pub fn on_published(&mut self, token: u64) {
        if self.is_suspect(token) {
            self.probe = Probe::Sent(token);
        }
    }

    /// An event that goes alone is on its way, for all that is known.
    pub fn is_out(&self) -> bool {
        matches!(self.probe, Probe::Sent(_) | Probe::Out(..))
    }

    /// The last PING is answered.
    pub fn on_pong(&mut self) {
        self.probe = match self.probe {
            Probe::Pinged(_) => Probe::Well,
            // the server has taken the event: what becomes of the connection now is not its doing
            Probe::Out(..) => {
                self.forget_silence();
                Probe::None
            }
            other => other,
        };
    }

    /// A publish is answered: the server has taken it.
    pub fn on_answer(&mut self) {
        if self.is_out() {
            self.forget_silence();
            self.probe = Probe::None;
        }
    }

    fn forget_silence(&mut self) {
        self.strikes.take_if(|it| it.of == Strike::Silence);
    }

    /// An event is stored in this stream, not put aside before.
    pub fn on_stored(&mut self, token: u64, stream: &str) {
        self.strikes.take_if(|it| it.token == token);
        self.doubtful.take_if(|it| it == stream);
    }

    /// Since when the answer to a PING has been due.
    pub fn pinged_at(&self) -> Option<Instant> {
        match self.probe {
            Probe::Pinged(at) | Probe::Out(_, at) => Some(at),
            Probe::None | Probe::Well | Probe::Sent(_) => None,
        }
    }

    /// The connection is over. `out`: the first and the last event that were on their way. Returns the event that is to blame.
    pub fn on_end(&mut self, by: EndedBy, out: Option<(u64, u64)>) -> Option<u64> {
        let alone = match std::mem::take(&mut self.probe) {
            Probe::Sent(token) | Probe::Out(token, _) => Some(token),
            Probe::None | Probe::Pinged(_) | Probe::Well => None,
        };
        let silent_at = self.silent_at.take();
        match (by, alone, out) {
            (EndedBy::Complaint, Some(token), _) => return Some(token),
            (EndedBy::Silence, Some(token), _) => {
                if self.strike(token, Strike::Silence) >= MOST_SILENT {
                    self.strikes = None;
                    return Some(token);
                }
            }
            (EndedBy::Complaint, None, Some((_, last))) => {
                self.alone_before = self.alone_before.max(last + 1);
            }
            (EndedBy::Silence, None, Some((first, last))) => {
                if silent_at == Some(first) {
                    self.alone_before = self.alone_before.max(last + 1);
                }
                self.silent_at = Some(first);
                self.forget_silence();
            }
            (EndedBy::Other, ..) | (_, None, None) => self.forget_silence(),
        }
        None
    }

    /// The connection is gone; that it has ended by itself was said before.
    pub fn on_disconnect(&mut self) {
        if self.is_probing() {
            self.forget_silence();
            self.probe = Probe::None;
        }
    }

    /// An event is refused in a way that may last.
    pub fn on_refusal(&mut self, token: u64, kind: AckErrorKind) -> Next {
        let most = match kind {
            AckErrorKind::Closed => MOST_CLOSED,
            _ => MOST_UNKNOWN,
        };
        match self.strike(token, Strike::Refusal(kind)) >= most {
            true => Next::Never,
            false => Next::Retry,
        }
    }

    /// An event for this stream is to blame by silence or an unknown error. False: the stream has taken nothing since the last
    /// such one was put aside.
    pub fn may_put_aside(&mut self, stream: &str) -> bool {
        let may = self.doubtful.as_deref() != Some(stream);
        self.doubtful = Some(stream.into());
        may
    }

    fn strike(&mut self, token: u64, of: Strike) -> u32 {
        let before = self.strikes.filter(|it| it.token == token && it.of == of);
        let times = before.map_or(0, |it| it.times) + 1;
        self.strikes = Some(Strikes { token, of, times });
        times
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use EndedBy::{Complaint, Other, Silence};

    /// Sends the event alone, over a connection that is well.
    fn probe(culprit: &mut Culprit, token: u64) {
        let now = Instant::now();
        assert_eq!(culprit.before(now), Alone::Ping);
        assert_eq!(culprit.before(now), Alone::Wait);
        culprit.on_pong();
        assert_eq!(culprit.before(now), Alone::Publish);
        culprit.on_published(token);
        assert!(culprit.pings_after(now) && !culprit.pings_after(now));
        assert!(culprit.is_probing() && culprit.pinged_at().is_some());
    }

    fn suspect(by: EndedBy, times: u32) -> Culprit {
        let mut culprit = Culprit::default();
        for _ in 0..times {
            assert!(!culprit.is_suspect(5));
            assert_eq!(culprit.on_end(by, Some((5, 7))), None);
        }
        assert!(culprit.is_suspect(5) && culprit.is_suspect(7) && !culprit.is_suspect(8));
        culprit
    }

    #[test]
    fn a_complaint_is_about_the_event_that_went_alone() {
        let mut culprit = suspect(Complaint, 1);
        probe(&mut culprit, 5);
        culprit.on_answer();
        probe(&mut culprit, 6);
        assert_eq!(culprit.on_end(Complaint, Some((6, 6))), Some(6));
        assert!(!culprit.is_probing());
    }

    #[test]
    fn silence_blames_an_event_after_three_times_alone() {
        let mut culprit = suspect(Silence, 2);
        for blamed in [None, None, Some(5)] {
            probe(&mut culprit, 5);
            assert_eq!(culprit.on_end(Silence, Some((5, 5))), blamed);
        }
    }

    /// Each of these comes between the second silence and the third.
    #[test]
    fn what_an_outage_looks_like_blames_no_event() {
        type Between = fn(&mut Culprit);
        let between: [Between; 7] = [
            // the server is away before the event is sent
            |culprit| assert_eq!(culprit.on_end(Silence, None), None),
            |culprit| {
                assert_eq!(culprit.before(Instant::now()), Alone::Ping);
                assert_eq!(culprit.on_end(Silence, None), None);
            },
            // it has taken the event, and ends later
            |culprit| {
                probe(culprit, 5);
                culprit.on_pong();
                assert_eq!(culprit.on_end(Silence, Some((5, 5))), None);
            },
            // it does not answer
            |culprit| {
                probe(culprit, 5);
                assert_eq!(culprit.on_end(Other, Some((5, 5))), None);
            },
            |culprit| assert_eq!(culprit.on_end(Other, None), None),
            // another event
            |culprit| {
                probe(culprit, 6);
                assert_eq!(culprit.on_end(Silence, Some((6, 6))), None);
            },
            // it is stored
            |culprit| {
                probe(culprit, 5);
                culprit.on_answer();
                culprit.on_stored(5, "A");
            },
        ];
        for (nth, between) in between.into_iter().enumerate() {
            let mut culprit = suspect(Silence, 2);
            for round in 0..10 {
                for _ in 0..2 {
                    probe(&mut culprit, 5);
                    let blamed = culprit.on_end(Silence, Some((5, 5)));
                    assert_eq!(blamed, None, "{nth}, round {round}");
                }
                between(&mut culprit);
            }
        }
    }

    #[test]
    fn a_connection_that_ends_for_another_reason_makes_no_suspects() {
        let mut culprit = Culprit::default();
        for by in [Other, Silence, Other, Silence] {
            assert_eq!(culprit.on_end(by, Some((5, 7))), None);
        }
        // without a word, but at another event each time: the stream takes them
        for first in 0..100 {
            assert_eq!(culprit.on_end(Silence, Some((first, first + 9))), None);
        }
        assert!(!culprit.is_suspect(0));
    }

    #[test]
    fn an_unknown_error_lasts_after_ten_times_whatever_else_is_stored() {
        let mut culprit = Culprit::default();
        for _ in 1..MOST_UNKNOWN {
            assert_eq!(culprit.on_refusal(5, AckErrorKind::Unknown), Next::Retry);
            culprit.on_stored(6, "B");
            assert_eq!(culprit.on_end(Other, None), None);
        }
        assert_eq!(culprit.on_refusal(5, AckErrorKind::Unknown), Next::Never);
        let mut culprit = Culprit::default();
        for _ in 0..100 {
            assert_eq!(culprit.on_refusal(5, AckErrorKind::Unknown), Next::Retry);
            assert_eq!(culprit.on_refusal(6, AckErrorKind::Unknown), Next::Retry);
        }
        assert_eq!(culprit.on_refusal(6, AckErrorKind::Closed), Next::Retry);
        assert_eq!(culprit.on_refusal(6, AckErrorKind::Closed), Next::Never);
    }

    #[test]
    fn in_doubt_one_event_is_put_aside_until_its_stream_takes_another() {
        let mut culprit = Culprit::default();
        assert!(culprit.may_put_aside("A"));
        culprit.on_stored(9, "B");
        assert!(!culprit.may_put_aside("A"));
        culprit.on_stored(9, "A");
        assert!(culprit.may_put_aside("A"));
    }
}
