//! The flags that make events, as far as a relay that resumes where one with other flags left off must know them. Pure.
//!
//! A position counts the rows and messages that Postgres sends, whatever becomes of them: it depends on the publication and on
//! whether messages are asked for, and on nothing else. Which of them are events, and which ids these have, depends on the rest.

use serde::{Deserialize, Serialize};

/// In place of a digest: several.
const SEVERAL: &str = "*";

/// Two digests with a dot between them: of what Postgres sends, and of the rest. Those of the default are not known, and count as
/// any others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flags(String);

impl Flags {
    /// `mapping`: all that decides what is an event, and its id.
    pub fn new(publication: &str, takes_messages: bool, mapping: &str) -> Flags {
        let digest = |text: &str| -> String {
            let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
            let digest = digest.as_ref().iter().take(6);
            digest.map(|byte| format!("{byte:02x}")).collect()
        };
        let sent = digest(&format!("{publication} {takes_messages}"));
        Flags(format!("{sent}.{}", digest(mapping)))
    }

    fn parts(&self) -> (&str, &str) {
        self.0.split_once('.').unwrap_or_default()
    }

    /// By both, a row or message has the same position.
    pub fn counts_as(&self, other: &Flags) -> bool {
        same(self.parts().0, other.parts().0)
    }

    /// By both, it is the same event.
    pub fn maps_as(&self, other: &Flags) -> bool {
        self.counts_as(other) && same(self.parts().1, other.parts().1)
    }

    /// Positions were counted in several ways.
    pub fn are_several(&self) -> bool {
        self.parts().0 == SEVERAL
    }

    /// Those of a time in which the relay had these and then the others.
    pub fn and(&self, other: &Flags) -> Flags {
        let both = |own: &str, other: &str| match (own, other) {
            ("", _) | (_, "") => String::new(),
            _ if own == other => own.to_string(),
            _ => SEVERAL.into(),
        };
        let ((sent, mapped), (their_sent, their_mapped)) = (self.parts(), other.parts());
        Flags(format!(
            "{}.{}",
            both(sent, their_sent),
            both(mapped, their_mapped)
        ))
    }
}

fn same(one: &str, other: &str) -> bool {
    one.is_empty() || other.is_empty() || one == other && one != SEVERAL
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_depends_on_the_publication_and_on_messages() {
        let own = Flags::new("p", true, "a");
        assert!(own.counts_as(&own) && own.maps_as(&own));
        let mapped = Flags::new("p", true, "b");
        assert!(own.counts_as(&mapped) && !own.maps_as(&mapped));
        for other in [Flags::new("q", true, "a"), Flags::new("p", false, "a")] {
            assert!(!own.counts_as(&other) && !own.maps_as(&other));
        }
        let unknown = Flags::default();
        assert!(own.maps_as(&unknown) && unknown.maps_as(&own));
    }

    #[test]
    fn several_flags_are_none_of_them() {
        let (a, b) = (Flags::new("p", true, "a"), Flags::new("p", true, "b"));
        let both = a.and(&b);
        assert!(both.counts_as(&a) && !both.maps_as(&a) && !both.maps_as(&both));
        assert_eq!(a.and(&a), a);
        assert!(a.and(&Flags::default()).maps_as(&b), "not known");
    }
}
