//! The relay as a child process, with its log at hand.

use super::nats::Nats;
use super::postgres::Postgres;
use super::process::{Process, Signal, lock};
use super::wait::{eventually, secs};
use std::borrow::BorrowMut;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A running relay, killed on drop. Its log is printed when the test that holds it panics.
pub struct Relay {
    process: Mutex<Process>,
    log: Arc<Mutex<Vec<String>>>,
    collector: Option<JoinHandle<()>>,
}

impl Relay {
    /// Runs it from the one server to the other, as superuser, with these arguments besides.
    pub fn start(pg: &Postgres, nats: &Nats, extra: &[&str]) -> Relay {
        Relay::start_at(pg.port(), nats.port(), extra)
    }

    /// The same by the ports on 127.0.0.1, which may be those of proxies.
    pub fn start_at(pg_port: u16, nats_port: u16, extra: &[&str]) -> Relay {
        let db = format!("postgres://postgres@127.0.0.1:{pg_port}/postgres");
        let nats = format!("nats://127.0.0.1:{nats_port}");
        let mut args = vec!["-db", &db, "-nats", &nats];
        args.extend(extra);
        Relay::run(&args, &[])
    }

    /// Runs it with these arguments and environment alone: neither libpq's nor the relay's own variables are
    /// inherited.
    pub fn run(args: &[&str], env: &[(&str, &str)]) -> Relay {
        let mut command = Command::new(env!("CARGO_BIN_EXE_jetstream-outbox"));
        command.args(args).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.envs(env.iter().copied());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = Process::spawn("the relay", &mut command);
        let stderr = process.child().stderr.take().expect("stderr is piped");
        let log = Arc::new(Mutex::new(Vec::new()));
        let collector = thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in BufReader::new(stderr).split(b'\n') {
                    let Ok(line) = line else { return };
                    lock(&log).push(String::from_utf8_lossy(&line).into_owned());
                }
            }
        });
        Relay {
            process: Mutex::new(process),
            log,
            collector: Some(collector),
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        lock(&self.process).id()
    }

    /// The lines on stderr so far.
    pub fn log(&self) -> Vec<String> {
        lock(&self.log).clone()
    }

    /// Waits for a line that contains `text`, from the start of the log, and returns it.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str, deadline: Duration) -> String {
        self.wait_for_log_after(0, text, deadline)
    }

    /// The same behind the first `mark` lines: `let mark = relay.log().len()` before what causes it.
    #[track_caller]
    pub fn wait_for_log_after(&self, mark: usize, text: &str, deadline: Duration) -> String {
        eventually(&format!("the log to say {text:?}"), deadline, || {
            let log = lock(&self.log);
            log.iter()
                .skip(mark)
                .find(|line| line.contains(text))
                .cloned()
        })
    }

    /// SIGTERM.
    pub fn term(&self) {
        self.signal(Signal::TERM);
    }

    /// SIGSTOP.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Any signal; one to a relay that has ended goes nowhere.
    pub fn signal(&self, signal: Signal) {
        lock(&self.process).signal(signal);
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&self) {
        lock(&self.process).kill();
    }

    /// Whether it has not ended.
    pub fn is_running(&self) -> bool {
        lock(&self.process).try_exit().is_none()
    }

    /// Waits until it ends by itself: the exit code, or the negative number of the signal that ended it.
    /// The log is complete then.
    #[track_caller]
    pub fn wait_exit(&mut self, deadline: Duration) -> i32 {
        let status = lock(&self.process).wait_exit(deadline);
        if let Some(collector) = self.collector.take() {
            let _ = collector.join();
        }
        let signal = || -status.signal().expect("ended by a code or a signal");
        status.code().unwrap_or_else(signal)
    }

    /// Whether it ends by itself within `deadline`.
    pub fn ends_within(&self, deadline: Duration) -> bool {
        lock(&self.process).ends_within(deadline)
    }

    /// The largest resident set so far, in KiB: VmHWM. `None` once it has ended.
    pub fn rss_peak_kb(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("---- log of the relay ----\n{}", self.log().join("\n"));
        }
    }
}

/// The relay ends by itself, with this code; its last line, which has all these parts.
#[track_caller]
pub fn halts(mut relay: impl BorrowMut<Relay>, code: i32, parts: &[&str]) -> String {
    let relay = relay.borrow_mut();
    let found = relay.wait_exit(secs(60));
    let last = relay.log().last().cloned().expect("it says why");
    assert_eq!(found, code, "{last}");
    for part in parts {
        assert!(last.contains(part), "{part:?} is not in {last}");
    }
    last
}
