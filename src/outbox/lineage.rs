//! The WAL that this server has, and where it branched off its ancestors: what a position of another timeline is worth here.
//!
//! Follows the chapter "Timelines" of the Postgres manual and the replication command `TIMELINE_HISTORY`. Pure.

use super::position::{Position, Source, SourcePosition};
use crate::postgres::Lsn;

/// The slot and the history of the server that we are connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// The slot, system and timeline of the server we are connected to.
    pub source: Source,
    /// Each older timeline of its history, and the LSN at which the next one began (`TIMELINE_HISTORY`).
    pub switch_points: Vec<(u32, Lsn)>,
}

/// A position that this server cannot have written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// Another system id: another initdb, so LSNs of the two have nothing to do with each other.
    OtherSystem(SourcePosition),
    /// A timeline that is not in this server's history: it was written after a promotion that this
    /// server knows nothing of, so this server is behind or abandoned.
    OtherTimeline(SourcePosition),
}

impl Lineage {
    /// Where the present history left a timeline: `None` for the present one, which it has not left; an error for one that is
    /// not in the history.
    pub fn left_at(&self, timeline: u32) -> Result<Option<Lsn>, NotInHistory> {
        if timeline == self.source.timeline {
            return Ok(None);
        }
        let mut points = self.switch_points.iter();
        let found = points.find(|(of, _)| *of == timeline);
        found.map(|(_, lsn)| Some(*lsn)).ok_or(NotInHistory)
    }

    /// Whether a position lies in the part of the WAL that this server has too, written for this slot. R18.
    pub fn shares(&self, at: &SourcePosition) -> bool {
        at.source.slot == self.source.slot
            && at.source.system_id == self.source.system_id
            && match self.left_at(at.source.timeline) {
                Ok(None) => true,
                Ok(Some(lsn)) => at.position.commit_lsn < lsn,
                Err(NotInHistory) => false,
            }
    }

    /// A position of this server.
    pub fn at(&self, position: Position) -> SourcePosition {
        SourcePosition {
            source: self.source.clone(),
            position,
        }
    }
}

/// The timeline is not one of this server's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotInHistory;

/// Reads a timeline history file: lines of `timeline <tab> switch point <tab> reason`, `#` begins a comment.
/// Lines of another form are passed over, as Postgres' own reader does with what follows the two fields.
pub fn parse_timeline_history(text: &str) -> Vec<(u32, Lsn)> {
    let line = |line: &str| {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lineage() -> Lineage {
        Lineage {
            source: Source {
                slot: "slot".to_string(),
                system_id: 7,
                timeline: 3,
            },
            switch_points: parse_timeline_history("1\t0/100\tno reason\n2\t0/200\t# another\n"),
        }
    }

    #[track_caller]
    fn check(at: &str, shared: bool) {
        let position: SourcePosition = at.parse().expect("a position");
        assert_eq!(lineage().shares(&position), shared, "{at}");
    }

    #[test]
    fn a_position_is_shared_up_to_where_its_timeline_was_left() {
        check("slot 7 3 0/900 1", true);
        check("slot 7 2 0/1FF 1", true);
        check("slot 7 2 0/200 1", false);
        check("slot 7 1 0/FF 9", true);
        check("slot 7 1 0/100 1", false);
        check("slot 7 4 0/1 1", false);
        check("slot 8 3 0/1 1", false);
        check("other 7 3 0/1 1", false);
    }

    #[test]
    fn a_history_reads_its_lines_and_passes_over_others() {
        assert_eq!(lineage().switch_points, [(1, Lsn(0x100)), (2, Lsn(0x200))]);
        assert_eq!(parse_timeline_history("x\n\n# 1\t0/1\n1\n"), []);
        assert_eq!(lineage().left_at(3), Ok(None));
        assert_eq!(lineage().left_at(9), Err(NotInHistory));
    }
}
