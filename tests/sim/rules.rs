//! The rules of DESIGN.md section 4 that can be switched off, to see that the simulator notices.

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A publish carries the expected last sequence.
    Fence,
    /// An ack counts at its predicted sequence only.
    AckSequence,
    /// A duplicate is no ack.
    DuplicateFlag,
    /// A refusal ends the window.
    Refusal,
    /// An ack that does not come ends the window.
    AckTimeout,
    /// The tail is read at each connect.
    TailRead,
    /// An event whose id was used before is dropped, and does not restart for ever.
    Lookup,
    /// An event is confirmed the hold-back after its ack.
    HoldBack,
    /// What is found stored on resume is confirmed by its age in the stream.
    Age,
    /// A stream that went backwards is filled again from the slot.
    Replay,
    /// What is gone from the end of a stream that keeps it was lost, not consumed.
    LostEnd,
    /// An idle stream is looked at.
    Look,
    /// On a replicated stream that others write to, what stands before the tail is read back.
    Between,
    /// What is too large for its stream is parked before that one's tail is asked.
    Limits,
    /// The copy stream starts at the oldest of the tails.
    OldestTail,
    /// Positions of an older timeline count up to where the two parted.
    SwitchPoint,
    /// A slot beyond what was ever settled halts the relay.
    Reached,
    /// What is known of the streams outlives a session.
    Memory,
    /// It outlives the process.
    Checkpoint,
    /// An answer to a write of the checkpoint says nothing of a later write.
    LateAnswer,
    /// A position that an earlier process has settled is old enough the hold-back after the checkpoint has it.
    Ripening,
    /// What waits to be confirmed waits anew once the checkpoint has lost what it rests on.
    CheckpointBack,
    /// Nothing grows old enough to be confirmed without a connection.
    Disconnected,
    /// What nobody can have published yet is not what is gone from a stream.
    Sent,
    /// Nor is what is published after a stop in order.
    Rest,
    /// What another relay has published meanwhile is learned from the checkpoint.
    Company,
}

pub const ALL: [Rule; 26] = [
    Rule::Fence,
    Rule::AckSequence,
    Rule::DuplicateFlag,
    Rule::Refusal,
    Rule::AckTimeout,
    Rule::TailRead,
    Rule::Lookup,
    Rule::HoldBack,
    Rule::Age,
    Rule::Replay,
    Rule::LostEnd,
    Rule::Look,
    Rule::Between,
    Rule::Limits,
    Rule::OldestTail,
    Rule::SwitchPoint,
    Rule::Reached,
    Rule::Memory,
    Rule::Checkpoint,
    Rule::LateAnswer,
    Rule::Ripening,
    Rule::CheckpointBack,
    Rule::Disconnected,
    Rule::Sent,
    Rule::Rest,
    Rule::Company,
];
