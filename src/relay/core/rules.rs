//! The rules that nothing is lost, repeated or put out of order by: each has a number, which stands where it is enforced, and
//! is switched off once in the simulator (`tests/sim`), around the code that follows it, to see that it is noticed.

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// R1: An event at or before the anchor is resolved; the copy stream starts at the anchor's commit.
    Anchor = 1,
    /// R2: A resume begins with the youngest cut that all streams agree with: each has its witness, and ends where it had.
    Agreement = 2,
    /// R3: An older cut will do, down to the matured one; what is lost of that one halts.
    FallBack = 3,
    /// R4: What is stored after the anchor is known by evidence: every message after what the cut has read, by its position.
    Evidence = 4,
    /// R5: An ack counts from the stream and domain that the subject leads to, and from no other.
    Origin = 5,
    /// R6: An ack counts at the predicted sequence.
    AckSequence = 6,
    /// R7: A refused publish is not stored: once all are answered, the stream is read and the window goes on after it.
    Refusal = 7,
    /// R8: A duplicate is no ack: the message that it names tells whether the event is stored, or its id another's.
    Duplicate = 8,
    /// R9: Every publish names the sequence that the stream must end at.
    Fence = 9,
    /// R10: On an unreplicated stream it also names the id of the message before it.
    LastId = 10,
    /// R11: The first publish of a connection, and each after a refusal, names the stream.
    StreamName = 11,
    /// R12: An ack that does not come ends the connection.
    AckTimeout = 12,
    /// R13: The record is claimed before anything is published.
    Claim = 13,
    /// R14: Nothing goes to a stream that the record does not name.
    Gate = 14,
    /// R15: A write of the record expects the revision that was seen last.
    Revision = 15,
    /// R16: Messages that are gone may have been events after the anchor: those are in doubt until they are resolved.
    Doubt = 16,
    /// R17: What is published after a later event of its stream is marked late.
    Late = 17,
    /// R18: Positions of an older timeline count up to where the present history left it.
    SwitchPoint = 18,
    /// R19: Nothing is told to Postgres before its WAL is proven to be that of the streams: with the anchor, and empty where it was.
    Continuity = 19,
    /// R20: A slot that is confirmed beyond what the record tells was moved, and halts.
    Told = 20,
    /// R21: Postgres is told the stored LSN of a cut that the key has held for the hold-back.
    HoldBack = 21,
    /// R22: It is told while each stream was seen to agree not long ago.
    Looks = 22,
    /// R23: It is told nothing that this session did not receive.
    Received = 23,
    /// R24: What was published while Postgres sent other rows is not compared with what it sends now.
    Flags = 24,
    /// R25: The mark of a transaction's end goes with the last of its events in a stream, and counts them: none comes after it.
    TransactionEnd = 25,
}

/// All of them.
pub const ALL: [Rule; 25] = [
    Rule::Anchor,
    Rule::Agreement,
    Rule::FallBack,
    Rule::Evidence,
    Rule::Origin,
    Rule::AckSequence,
    Rule::Refusal,
    Rule::Duplicate,
    Rule::Fence,
    Rule::LastId,
    Rule::StreamName,
    Rule::AckTimeout,
    Rule::Claim,
    Rule::Gate,
    Rule::Revision,
    Rule::Doubt,
    Rule::Late,
    Rule::SwitchPoint,
    Rule::Continuity,
    Rule::Told,
    Rule::HoldBack,
    Rule::Looks,
    Rule::Received,
    Rule::Flags,
    Rule::TransactionEnd,
];
