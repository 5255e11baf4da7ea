//! Whether the streams still are what is known of them: they are asked now and then, as one that is idle says nothing. Pure.
//! R22.

use super::evidence::Message;
use super::stream::Stream;
use super::trouble::{Cause, Trouble};
use crate::outbox::lineage::Lineage;
use crate::relay::checkpoint::record::Witness;
use std::time::{Duration, Instant};

/// While Postgres is told anything, each stream was seen to agree with the cuts not longer ago than this: well within the
/// default hold-back less the default sync interval of nats-server (150 s less 120 s).
const AGREED_FOR: Duration = Duration::from_secs(30);

/// What is to be asked of JetStream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// The stream of that name.
    Stream(String),
    /// The message at a sequence of it.
    Message(String, u64),
}

/// What is expected of an answer to that.
#[derive(Clone, Debug)]
enum Expected {
    /// The stream ends at this sequence or later.
    End(u64),
    /// This message is there, or none.
    Witness(Witness),
    /// The same, of [`Stream::unseen`].
    Unseen(Witness),
}

/// The answer of this name is to a [`Look::Message`], not to a [`Look::Stream`].
pub fn is_of_message(token: u64) -> bool {
    !token.is_multiple_of(2)
}

/// The state of the questions. See the module.
#[derive(Debug)]
pub struct Agreement {
    /// When all streams were last seen to agree.
    seen_at: Instant,
    asked_at: Instant,
    /// What was asked then and is not answered, and what is expected.
    open: Vec<(u64, Expected)>,
}

impl Agreement {
    /// The streams were just read.
    pub fn new(now: Instant) -> Agreement {
        Agreement {
            seen_at: now,
            asked_at: now,
            open: Vec::new(),
        }
    }

    /// What is to be asked now, and the names of the answers.
    pub fn ask(&mut self, streams: &[Stream], lineage: &Lineage, now: Instant) -> Vec<(u64, Look)> {
        self.asked_at = now;
        self.open.clear();
        let mut looks = Vec::new();
        for (index, stream) in streams.iter().enumerate() {
            let name = || stream.name().to_string();
            let token = 2 * index as u64;
            self.open.push((token, Expected::End(stream.fence.known())));
            looks.push((token, Look::Stream(name())));
            let unseen = stream.unseen().cloned().map(Expected::Unseen);
            let expected = unseen.or_else(|| stream.witness(lineage).map(Expected::Witness));
            if let Some(expected) = expected
                && let Expected::Witness(witness) | Expected::Unseen(witness) = &expected
            {
                looks.push((token + 1, Look::Message(name(), witness.seq)));
                self.open.push((token + 1, expected));
            }
        }
        looks
    }

    /// The answer to a [`Look::Stream`].
    pub fn on_stream(
        &mut self,
        streams: &mut [Stream],
        token: u64,
        created: &str,
        last_seq: u64,
    ) -> Result<(), Trouble> {
        self.on_answer(streams, token, |stream, expected| {
            let ends = matches!(expected, Expected::End(known) if last_seq >= *known);
            ends && stream.created == created
        })
    }

    /// The answer to a [`Look::Message`].
    pub fn on_witness(
        &mut self,
        streams: &mut [Stream],
        token: u64,
        found: Option<&Message>,
        lineage: &Lineage,
    ) -> Result<(), Trouble> {
        // to an earlier question
        let is_late = |(of, expected): &(u64, Expected)| match (found, expected) {
            (Some(found), Expected::Witness(witness) | Expected::Unseen(witness)) => {
                *of == token && found.seq != witness.seq
            }
            _ => false,
        };
        if self.open.iter().any(is_late) {
            return Ok(());
        }
        self.on_answer(streams, token, |_, expected| match (found, expected) {
            (Some(found), Expected::Witness(witness) | Expected::Unseen(witness)) => {
                found.is_at(&witness.position, lineage)
            }
            _ => true,
        })
    }

    fn on_answer(
        &mut self,
        streams: &mut [Stream],
        token: u64,
        agrees: impl Fn(&Stream, &Expected) -> bool,
    ) -> Result<(), Trouble> {
        let Some(at) = self.open.iter().position(|(of, _)| *of == token) else {
            return Ok(());
        };
        let (_, expected) = self.open.swap_remove(at);
        if let Some(stream) = streams.get_mut((token / 2) as usize) {
            if !agrees(stream, &expected) {
                let name = stream.name().to_string();
                return Err(Trouble::Reconnect(Cause::Disagrees(name)));
            }
            if let Expected::Unseen(_) = expected {
                stream.on_seen();
            }
        }
        if self.open.is_empty() {
            self.seen_at = self.asked_at;
        }
        Ok(())
    }

    /// All streams were seen to agree not long ago.
    pub fn is_recent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.seen_at) <= AGREED_FOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::position::{Position, Source, SourcePosition};
    use crate::postgres::Lsn;
    use crate::relay::checkpoint::record::StreamCut;
    use crate::relay::core::resume::facts::StreamFacts;
    use crate::relay::core::window::Stored;

    fn source() -> Source {
        Source {
            slot: "s".into(),
            system_id: 1,
            timeline: 1,
        }
    }

    fn lineage() -> Lineage {
        Lineage {
            source: source(),
            switch_points: Vec::new(),
        }
    }

    fn at(ordinal: u32) -> SourcePosition {
        let commit_lsn = Lsn(10);
        SourcePosition {
            source: source(),
            position: Position {
                commit_lsn,
                ordinal,
            },
        }
    }

    /// Two streams that end at sequence 7, the second with a witness there.
    fn streams() -> Vec<Stream> {
        let stream = |name: &str, witness: Option<Witness>| {
            let cut = StreamCut {
                name: name.into(),
                created: "then".into(),
                read_after: 7,
                witness,
                unseen: None,
                share: None,
            };
            let facts = StreamFacts {
                last_seq: 7,
                ..StreamFacts::default()
            };
            Stream::new(cut, facts, 100, Lsn::INVALID)
        };
        let witness = Witness {
            seq: 7,
            position: at(1),
        };
        vec![stream("A", None), stream("B", Some(witness))]
    }

    #[test]
    fn a_stream_that_ends_earlier_or_was_created_again_disagrees() {
        let (now, mut streams) = (Instant::now(), streams());
        for (created, last_seq, agrees) in [
            ("then", 7, true),
            ("then", 8, true),
            ("then", 6, false),
            ("later", 7, false),
            ("later", 6, false),
        ] {
            let mut agreement = Agreement::new(now);
            let looks = agreement.ask(&streams, &lineage(), now);
            let tokens: Vec<u64> = looks.iter().map(|(token, _)| *token).collect();
            assert_eq!(tokens, [0, 2, 3]);
            for (token, look) in &looks {
                let asks_for_message = matches!(look, Look::Message(..));
                assert_eq!(is_of_message(*token), asks_for_message);
            }
            let answer = agreement.on_stream(&mut streams, 2, created, last_seq);
            let said = match answer {
                Ok(()) => None,
                Err(Trouble::Reconnect(Cause::Disagrees(name))) => Some(name),
                Err(other) => panic!("{other:?}"),
            };
            let expected = (!agrees).then(|| "B".to_string());
            assert_eq!(said, expected, "{created} {last_seq}");
        }
    }

    #[test]
    fn another_message_in_the_witness_s_place_disagrees_and_none_does_not() {
        let (now, mut streams) = (Instant::now(), streams());
        let message = |position| Message {
            seq: 7,
            position: Some(position),
            ..Message::default()
        };
        for (found, agrees) in [
            (None, true),
            (Some(message(at(1))), true),
            (Some(message(at(2))), false),
            (
                Some(Message {
                    seq: 7,
                    ..Message::default()
                }),
                false,
            ),
            // the answer to an earlier question
            (Some(Message::default()), true),
        ] {
            let mut agreement = Agreement::new(now);
            agreement.ask(&streams, &lineage(), now);
            let answer = agreement.on_witness(&mut streams, 3, found.as_ref(), &lineage());
            assert_eq!(answer.is_ok(), agrees, "{found:?}");
        }
    }

    /// The server may lose it before the first publish, and others fill its place.
    #[test]
    fn what_was_the_last_is_seen_again_after_the_first_ack() {
        let (now, mut streams) = (Instant::now(), streams());
        let later = Position {
            commit_lsn: Lsn(10),
            ordinal: 2,
        };
        let unseen = |streams: &[Stream]| streams[1].unseen().map(|it| it.seq);
        let mut agreement = Agreement::new(now);
        assert_eq!(unseen(&streams), None);
        // asked before
        agreement.ask(&streams, &lineage(), now);
        streams[1].fence.extend(0);
        streams[1].on_ack(7, later);
        let stored = Stored {
            stream: 1,
            seq: 8,
            counts: true,
        };
        streams[1].on_resolved(stored, later);
        let found = Message {
            seq: 7,
            position: Some(at(1)),
            ..Message::default()
        };
        let (token, found) = (3, Some(&found));
        (agreement.on_witness(&mut streams, token, found, &lineage())).unwrap();
        assert_eq!(unseen(&streams), Some(7));

        let looks = agreement.ask(&streams, &lineage(), now);
        assert!(looks.contains(&(token, Look::Message("B".into(), 7))));
        let other = Message {
            seq: 7,
            ..Message::default()
        };
        let mut lost = Agreement::new(now);
        lost.ask(&streams, &lineage(), now);
        assert!(
            (lost.on_witness(&mut streams, token, Some(&other), &lineage())).is_err(),
            "another is in its place"
        );
        (agreement.on_witness(&mut streams, token, found, &lineage())).unwrap();
        assert_eq!(unseen(&streams), None);
        let looks = agreement.ask(&streams, &lineage(), now);
        assert!(looks.contains(&(token, Look::Message("B".into(), 8))));
    }

    #[test]
    fn all_have_agreed_not_long_ago_once_each_has_answered() {
        let (start, mut streams) = (Instant::now(), streams());
        let mut agreement = Agreement::new(start);
        let later = start + AGREED_FOR;
        assert!(agreement.is_recent(later));
        assert!(!agreement.is_recent(later + Duration::from_millis(1)));
        agreement.ask(&streams, &lineage(), later);
        for token in [0, 2] {
            agreement.on_stream(&mut streams, token, "then", 7).unwrap();
            assert!(!agreement.is_recent(later + AGREED_FOR));
        }
        agreement
            .on_witness(&mut streams, 3, None, &lineage())
            .unwrap();
        assert!(agreement.is_recent(later + AGREED_FOR));
    }
}
