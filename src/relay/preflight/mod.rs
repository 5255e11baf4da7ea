//! What must hold in Postgres: facts are read once, and pure rules turn them into findings.
//!
//! `check` prints every [`Finding`], `setup` reports those that are not ok, and the relay halts at its start on those that
//! are failures: all three read the same facts ([`read`]) and judge by the same rules, so that they never disagree.
//! [`server`] is about the server and the role, [`minors`] about its version, [`slot`] about the replication slot, and
//! [`probe`] tries what the relay does. Nothing here changes anything.
//!
//! Facts come as JSON that the server makes of its own catalogs, so that a column which a version lacks is simply absent.

pub mod column_types;
pub mod minors;
pub mod moved_rows;
pub mod outbox_sql;
pub mod outboxes;
pub mod probe;
pub mod publication;
pub mod publication_state;
pub mod server;
pub mod slot;
pub mod watch;

use crate::config::Config;
use crate::postgres::connection::Rows;
use crate::postgres::{self, Connection};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt;

/// A session that takes plain SQL. The relay's own connection is one, and so is that of the operator's commands.
pub trait Query {
    /// What it fails with.
    type Error: From<postgres::Error>;

    /// The rows of one statement, as text.
    fn text_rows(&mut self, doing: &'static str, sql: &str) -> Result<Rows, Self::Error>;

    /// The server's version as a number, 150018 for 15.18, and as it prints it.
    fn server_version(&self) -> (u32, String);

    /// `host:port`, or a socket's folder and port.
    fn peer(&self) -> String;
}

impl Query for Connection {
    type Error = postgres::Error;

    fn text_rows(&mut self, _: &'static str, sql: &str) -> Result<Rows, postgres::Error> {
        self.simple_query(sql)
    }

    fn server_version(&self) -> (u32, String) {
        let text = self.parameter("server_version").unwrap_or("unknown");
        (self.server_version_num(), text.to_string())
    }

    fn peer(&self) -> String {
        Connection::peer(self).to_string()
    }
}

/// The value that a statement answers in its first column, as JSON; `None` if it answers no row, or NULL.
pub fn query_json<Q: Query, T: DeserializeOwned>(
    session: &mut Q,
    doing: &'static str,
    sql: &str,
) -> Result<Option<T>, Q::Error> {
    let rows = session.text_rows(doing, sql)?;
    let text = (rows.into_iter().next()).and_then(|row| row.into_iter().next().flatten());
    let parse = |text: String| {
        serde_json::from_str(&text)
            .map_err(|error| postgres::Error::Protocol(format!("{doing}: {error}")).into())
    };
    text.map(parse).transpose()
}

/// What the rules judge.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// 150018 for 15.18.
    pub version: u32,
    /// As the server prints it.
    pub version_text: String,
    /// Where the server was reached.
    pub peer: String,
    /// The server and the role.
    pub server: server::Server,
    /// `None`: there is no slot of that name.
    pub slot: Option<slot::Slot>,
    /// The publication, and the tables that it is to have.
    pub outboxes: outboxes::Outboxes,
    /// `None`: not tried.
    pub probe: Option<probe::Probe>,
    /// `None`: not tried.
    pub start: Option<probe::Start>,
}

/// A rule: the findings that it has, good ones included.
pub type Rule = fn(&Facts, &Config) -> Vec<Finding>;

/// The rules by which the relay starts: those about slot and publication, and those about the server that no connection has
/// proven by then.
const START: [&[Rule]; 3] = [&server::START, &slot::START, &publication::START];

/// Reads the facts but the outboxes, which are not for a replication session: see [`outboxes::read`]. Of a server that is too
/// old only its version.
pub fn read<Q: Query>(session: &mut Q, config: &Config) -> Result<Facts, Q::Error> {
    let (version, version_text) = session.server_version();
    let mut facts = Facts {
        version,
        version_text,
        peer: session.peer(),
        ..Facts::default()
    };
    if version >= server::OLDEST {
        facts.server = server::read(session)?;
        facts.slot = slot::read(session, &config.slot)?;
    }
    Ok(facts)
}

/// What keeps the relay from starting.
pub fn failures(facts: &Facts, config: &Config) -> Vec<Finding> {
    failures_of(&START, facts, config)
}

/// What fails of these rules.
pub fn failures_of(rules: &[&[Rule]], facts: &Facts, config: &Config) -> Vec<Finding> {
    let rules = rules.iter().flat_map(|rules| rules.iter());
    rules
        .flat_map(|rule| rule(facts, config))
        .filter(|finding| finding.level == Level::Fail)
        .collect()
}

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
    /// Why it matters, and the statement or command that fixes it. None when all is well.
    pub advice: Option<Advice>,
}

/// What to do, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// Why it matters.
    pub why: String,
    /// The statement or command that fixes it.
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
    /// As `-json` prints it.
    pub fn json(&self) -> Value {
        let advice = self.advice.as_ref();
        json!({
            "name": self.name, "level": self.level.name(), "found": self.found,
            "why": advice.map(|advice| &advice.why), "fix": advice.map(|advice| &advice.fix),
        })
    }
}

impl Finding {
    /// What was found, why it matters, and what fixes it, on one line whatever a server has said.
    pub fn sentence(&self) -> String {
        let line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let found = line(&self.found);
        match &self.advice {
            Some(advice) => format!("{found}: {}; fix: {}", line(&advice.why), line(&advice.fix)),
            None => found,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (level, name) = (self.level.name(), self.name);
        write!(f, "{level:<4}  {name:<27}  {}", self.sentence())
    }
}

#[cfg(test)]
pub(crate) mod tests;
