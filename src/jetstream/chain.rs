//! The fence: a chain of predicted stream sequences, one per stream. Pure.
//!
//! Every publish carries `Nats-Expected-Last-Sequence: n`, the sequence at which this publisher predicts
//! the stream to end just before it. The server stores it only there (ADR-22 and the JetStream model
//! documentation name the header). So publishes can be pipelined n, n+1, n+2 … and still: when one is not
//! stored, no later one is; a second relay, or a late copy of an old publish, cannot write in between.
//!
//! The chain is used up by the first answer it did not predict. What stands in the stream is then read
//! back and a new chain begun; it never repairs itself by guessing. A lone publish that was not stored needs no
//! guess: [`Chain::retract`].

use super::ack::PubAck;
use std::collections::VecDeque;

/// Predicts the sequences of publishes, finds the publish that an answer is for, and checks the acks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    acked: u64,
    predicted: u64,
    /// The tokens of the publishes before `predicted`, from the oldest that waits on; `None`: it is answered.
    waiting: VecDeque<Option<u64>>,
}

/// Which publish an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFor {
    /// The one with this token.
    One(u64),
    /// One of several; the oldest has this token.
    OneOf(u64),
}

/// The ack was not the predicted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Stored, but somewhere else than predicted.
    OtherSequence {
        /// What the chain predicted.
        predicted: u64,
        /// What the ack says.
        seq: u64,
    },
    /// The server had this message id already. `{"seq":0,"duplicate":true}` is a false answer of 2.10.
    Duplicate {
        /// Where the server says the message with this id stands.
        seq: u64,
    },
}

impl Chain {
    /// A chain for a stream whose last sequence was read as `last_sequence` (0: it is empty).
    pub fn new(last_sequence: u64) -> Chain {
        Chain {
            acked: last_sequence,
            predicted: last_sequence,
            waiting: VecDeque::new(),
        }
    }

    /// What the next link will be.
    pub fn predicted(&self) -> u64 {
        self.predicted
    }

    /// The next link, for the publish that the caller knows by `token`: what it has to carry as its expected last
    /// sequence.
    pub fn extend(&mut self, token: u64) -> u64 {
        let expected = self.predicted;
        self.predicted += 1;
        self.waiting.push_back(Some(token));
        expected
    }

    /// Which publish an answer is for that came to the name of number `reply` of the `replies` which the publishes use
    /// in turn, by their expected sequences. `None`: none that waits.
    ///
    /// The ack of a predicted sequence can only be for the publish with that prediction. Any other answer can
    /// be for each one that waits under the name: a replicated stream refuses before it acknowledges what came earlier.
    pub fn answer_for(&self, reply: u64, replies: u64, ack: Option<&PubAck>) -> Option<AnswerFor> {
        let oldest = self.oldest();
        if let Some(PubAck {
            seq,
            duplicate: false,
        }) = ack
            && let Some(expected) = seq.checked_sub(1).filter(|seq| seq % replies == reply)
            && let Some(nth) = expected.checked_sub(oldest)
            && let Some(Some(token)) = self.waiting.get(nth as usize)
        {
            return Some(AnswerFor::One(*token));
        }
        let first = (reply + replies - oldest % replies) % replies;
        let under_it = self.waiting.iter().skip(first as usize);
        let mut tokens = under_it.step_by(replies as usize).flatten();
        let token = *tokens.next()?;
        Some(match tokens.next() {
            None => AnswerFor::One(token),
            Some(_) => AnswerFor::OneOf(token),
        })
    }

    /// Nothing published before the publish with this token waits.
    pub fn is_oldest(&self, token: u64) -> bool {
        self.waiting.front() == Some(&Some(token))
    }

    /// What the first of `waiting` expects.
    fn oldest(&self) -> u64 {
        self.predicted - self.waiting.len() as u64
    }

    /// Checks the ack of the publish that carried `expected`.
    pub fn accept(&mut self, expected: u64, ack: &PubAck) -> Result<(), Broken> {
        if ack.duplicate {
            return Err(Broken::Duplicate { seq: ack.seq });
        }
        if ack.seq != expected + 1 {
            return Err(Broken::OtherSequence {
                predicted: expected + 1,
                seq: ack.seq,
            });
        }
        self.acked = self.acked.max(ack.seq);
        let nth = expected.checked_sub(self.oldest());
        if let Some(waits) = nth.and_then(|nth| self.waiting.get_mut(nth as usize)) {
            *waits = None;
        }
        while let Some(None) = self.waiting.front() {
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// The only publish that waits was not stored: the next one takes its place. `false`: it is not the only one, and
    /// those behind it carry what the stream will never come to.
    pub fn retract(&mut self) -> bool {
        let is_only = self.waiting.len() == 1;
        if is_only {
            self.waiting.clear();
            self.predicted -= 1;
        }
        is_only
    }

    /// The highest sequence known to be in the stream.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// No publish of this chain waits for its ack.
    pub fn is_settled(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(seq: u64, duplicate: bool) -> PubAck {
        PubAck { seq, duplicate }
    }

    #[test]
    fn only_a_publish_that_waits_alone_is_retracted() {
        let mut chain = Chain::new(41);
        assert!(!chain.retract());
        assert_eq!([chain.extend(1), chain.extend(2)], [41, 42]);
        assert!(!chain.retract());
        chain.accept(41, &ack(42, false)).unwrap();
        assert!(chain.retract() && chain.is_settled());
        assert_eq!(chain.extend(3), 42);
        assert_eq!(chain.accept(42, &ack(43, false)), Ok(()));
    }

    #[test]
    fn a_pipeline_is_numbered_ahead_and_acked_where_predicted() {
        let mut chain = Chain::new(41);
        let expected: Vec<u64> = (0..3).map(|token| chain.extend(token)).collect();
        assert_eq!(expected, [41, 42, 43]);
        assert!(!chain.is_settled());
        for seq in 42..=44 {
            assert_eq!(chain.accept(seq - 1, &ack(seq, false)), Ok(()));
        }
        assert_eq!((chain.acked(), chain.is_settled()), (44, true));
    }

    #[test]
    fn any_other_answer_breaks_the_chain() {
        let check = |answer: PubAck, broken: Broken| {
            let mut chain = Chain::new(7);
            let expected = chain.extend(0);
            assert_eq!(chain.accept(expected, &answer), Err(broken));
            assert_eq!(chain.acked(), 7, "nothing is acked by it");
            assert!(!chain.is_settled());
        };
        check(
            ack(9, false),
            Broken::OtherSequence {
                predicted: 8,
                seq: 9,
            },
        );
        check(
            ack(7, false),
            Broken::OtherSequence {
                predicted: 8,
                seq: 7,
            },
        );
        check(
            ack(0, false),
            Broken::OtherSequence {
                predicted: 8,
                seq: 0,
            },
        );
        check(ack(8, true), Broken::Duplicate { seq: 8 });
        check(ack(0, true), Broken::Duplicate { seq: 0 });
    }

    #[test]
    fn an_ack_finds_its_publish_and_what_can_be_for_several_says_so() {
        let mut chain = Chain::new(40);
        for token in 0..8 {
            chain.extend(100 + token);
        }
        // the names 1, 2, 0, 1, 2, 0, 1, 2
        let find = |chain: &Chain, reply: u64, seq: u64, duplicate: bool| {
            chain.answer_for(reply, 3, Some(&PubAck { seq, duplicate }))
        };
        for (reply, seq, token) in [(1, 41, 100), (1, 44, 103), (2, 48, 107), (0, 46, 105)] {
            let found = find(&chain, reply, seq, false);
            assert_eq!(found, Some(AnswerFor::One(token)), "{reply} {seq}");
        }
        let one_of = |token: u64| Some(AnswerFor::OneOf(token));
        assert_eq!(chain.answer_for(2, 3, None), one_of(101));
        assert_eq!(
            find(&chain, 1, 44, true),
            one_of(100),
            "a duplicate of what stands there"
        );
        assert_eq!(
            find(&chain, 1, 45, false),
            one_of(100),
            "predicted under another name"
        );
        assert_eq!(find(&chain, 0, 3, false), one_of(102));
        assert_eq!(find(&chain, 0, 0, false), one_of(102));
        assert_eq!(find(&chain, 0, u64::MAX, false), one_of(102));

        // out of order, as it does not matter
        for seq in [44, 41, 42] {
            assert_eq!(chain.accept(seq - 1, &ack(seq, false)), Ok(()));
        }
        let one = |token: u64| Some(AnswerFor::One(token));
        assert_eq!(chain.answer_for(1, 3, None), one(106), "it waits alone");
        assert_eq!(find(&chain, 1, 41, false), one(106), "answered before");
        for seq in [43, 47, 48, 46, 45] {
            assert!(!chain.is_settled());
            assert_eq!(chain.accept(seq - 1, &ack(seq, false)), Ok(()));
        }
        assert!(chain.is_settled());
        assert_eq!(chain.answer_for(0, 3, None), None, "nothing waits");
        assert_eq!(find(&chain, 0, 46, false), None);
    }
}
