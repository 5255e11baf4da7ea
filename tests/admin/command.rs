//! A command run to its end.

use crate::rig::{DEADLINE, Rig};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::process::Process;
use serde_json::Value;
use std::io::Read;
use std::process::{ChildStderr, ChildStdout, Command, Stdio};
use std::thread;

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs it with these arguments and environment alone.
#[track_caller]
pub fn run(args: &[&str], env: &[(&str, &str)]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jetstream-outbox"));
    command.args(args).env_clear().envs(env.iter().copied());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn("the command", &mut command);
    let child = process.child();
    let stdout: ChildStdout = child.stdout.take().expect("stdout is piped");
    let stderr: ChildStderr = child.stderr.take().expect("stderr is piped");
    let stdout = thread::spawn(|| text(stdout));
    let stderr = thread::spawn(|| text(stderr));
    let status = process.wait_exit(DEADLINE);
    Ended {
        code: status.code().expect("it ends by itself"),
        stdout: stdout.join().expect("its output is read"),
        stderr: stderr.join().expect("its errors are read"),
    }
}

fn text(mut from: impl Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).expect("it writes UTF-8");
    text
}

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
