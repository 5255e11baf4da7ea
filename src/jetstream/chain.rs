//! The fence: a chain of predicted stream sequences, one per stream. Pure.
//!
//! Every publish carries `Nats-Expected-Last-Sequence: n`, the sequence at which this publisher predicts
//! the stream to end just before it. The server stores it only there (ADR-22 and the JetStream model
//! documentation name the header). So publishes can be pipelined n, n+1, n+2 … and still: when one is not
//! stored, no later one is; a second relay, or a late copy of an old publish, cannot write in between.
//!
//! The chain is used up by the first answer it did not predict. What stands in the stream is then read
//! back and a new chain begun; it never repairs itself by guessing.

use super::ack::PubAck;

/// Predicts the sequences of publishes and checks their acks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    acked: u64,
    predicted: u64,
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
        }
    }

    /// What the next link will be.
    pub fn predicted(&self) -> u64 {
        self.predicted
    }

    /// The next link: what the publish has to carry as its expected last sequence.
    pub fn extend(&mut self) -> u64 {
        let expected = self.predicted;
        self.predicted += 1;
        expected
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
        Ok(())
    }

    /// The highest sequence known to be in the stream.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// No publish of this chain waits for its ack.
    pub fn is_settled(&self) -> bool {
        self.acked == self.predicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(seq: u64, duplicate: bool) -> PubAck {
        PubAck { seq, duplicate }
    }

    #[test]
    fn a_pipeline_is_numbered_ahead_and_acked_where_predicted() {
        let mut chain = Chain::new(41);
        let expected: Vec<u64> = (0..3).map(|_| chain.extend()).collect();
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
            let expected = chain.extend();
            assert_eq!(chain.accept(expected, &answer), Err(broken));
            assert_eq!(chain.acked(), 7, "nothing is acked by it");
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
}
