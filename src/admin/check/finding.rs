//! What the doctor says: one line, with a reason and a remedy when something is wrong.

use serde_json::{Value, json};
use std::fmt;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Ok,
    /// The relay works; a promise, a disk or somebody's sleep is at risk.
    Warn,
    /// The relay does not work, or breaks its promises.
    Fail,
}

impl Level {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// `side.subject`; the same in every release, for scripts.
    pub name: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// Why it matters, and the statement or command that mends it. None when all is well.
    pub advice: Option<Advice>,
}

/// What to do, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// Why it matters.
    pub why: String,
    /// The statement or command that mends it.
    pub fix: String,
}

/// All is well.
pub fn ok(name: &'static str, found: impl Into<String>) -> Finding {
    Finding {
        name,
        level: Level::Ok,
        found: found.into(),
        advice: None,
    }
}

/// Something is at risk.
pub fn warn(
    name: &'static str,
    found: impl Into<String>,
    why: impl Into<String>,
    fix: impl Into<String>,
) -> Finding {
    Finding {
        level: Level::Warn,
        ..fail(name, found, why, fix)
    }
}

/// It does not work.
pub fn fail(
    name: &'static str,
    found: impl Into<String>,
    why: impl Into<String>,
    fix: impl Into<String>,
) -> Finding {
    Finding {
        name,
        level: Level::Fail,
        found: found.into(),
        advice: Some(Advice {
            why: why.into(),
            fix: fix.into(),
        }),
    }
}

impl Finding {
    /// As `--json` prints it.
    pub fn json(&self) -> Value {
        let advice = self.advice.as_ref();
        json!({
            "name": self.name, "level": self.level.name(), "found": self.found,
            "why": advice.map(|advice| &advice.why), "fix": advice.map(|advice| &advice.fix),
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // one line, whatever a server has said
        let line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        write!(
            f,
            "{:<4}  {:<27}  {}",
            self.level.name(),
            self.name,
            line(&self.found)
        )?;
        match &self.advice {
            Some(advice) => write!(f, ": {}; mend it: {}", line(&advice.why), line(&advice.fix)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line() {
        let finding = warn("a.b", "it\nis  so", "it hurts", "SELECT\n1;");
        assert_eq!(
            finding.to_string(),
            "warn  a.b                          it is so: it hurts; mend it: SELECT 1;"
        );
        assert_eq!(
            ok("a.b", "fine").to_string(),
            "ok    a.b                          fine"
        );
        assert!(Level::Fail > Level::Warn && Level::Warn > Level::Ok);
    }
}
