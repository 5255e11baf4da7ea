//! The program run to its end.

use super::process::Process;
use super::wait::secs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// More than anything takes that ends by itself, on a machine that is busy with other tests.
pub const DEADLINE: Duration = secs(60);

/// What it said, and how it ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// The program with these arguments and environment alone.
pub fn command(args: &[&str], env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jetstream-outbox"));
    command.args(args).env_clear().envs(env.iter().copied());
    command
}

/// Runs it with these arguments and environment alone.
#[track_caller]
pub fn run(args: &[&str], env: &[(&str, &str)]) -> Ended {
    let mut command = command(args, env);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn("the program", &mut command);
    let child = process.child();
    let stdout = child.stdout.take().expect("stdout is piped");
    let stderr = child.stderr.take().expect("stderr is piped");
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
