//! A command run to its end against servers of the test's.

use crate::rig::Rig;
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use serde_json::Value;

pub use crate::support::command::{Ended, command, run};

/// The flags that name the two servers, as superuser.
pub fn servers(pg: &Postgres, nats: &Nats) -> [String; 4] {
    [
        "-db".into(),
        pg.url("postgres", "postgres"),
        "-nats".into(),
        nats.url(),
    ]
}

/// Runs a command against these servers; the command's word may stand anywhere in `args`.
#[track_caller]
pub fn at(pg: &Postgres, nats: &Nats, args: &[&str]) -> Ended {
    let servers = servers(pg, nats);
    let all: Vec<&str> = args
        .iter()
        .copied()
        .chain(servers.iter().map(String::as_str))
        .collect();
    run(&all, &[])
}

/// The same for the servers of a rig.
#[track_caller]
pub fn on(rig: &Rig, args: &[&str]) -> Ended {
    at(&rig.pg, &rig.nats, args)
}

impl Ended {
    /// The output, which must have come with this exit code.
    #[track_caller]
    pub fn with(&self, code: i32) -> &str {
        assert_eq!(self.code, code, "{}\n{}", self.stdout, self.stderr);
        &self.stdout
    }

    /// The output as lines of JSON, which must have come with this exit code.
    #[track_caller]
    pub fn json_lines(&self, code: i32) -> Vec<Value> {
        let lines = self.with(code).lines();
        lines
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
            })
            .collect()
    }

    /// The output as one JSON value, which must have come with this exit code.
    #[track_caller]
    pub fn json(&self, code: i32) -> Value {
        serde_json::from_str(self.with(code)).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}
