//! The log of a whole process: each test runs itself again as a child that logs, and reads its standard error.

use jetstream_outbox::logging::{self, LogConfig, LogFormat};
use log::{LevelFilter, debug, error, info, warn};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Marks the process that logs.
const CHILD: &str = "LOGGING_TEST_CHILD";
/// More than the slowest machine needs for a few lines.
const DEADLINE: Duration = Duration::from_secs(30);
/// More than the queue holds.
const FLOOD: usize = 2000;

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// This test program, to run nothing but the test of that name.
fn child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .env("RUST_LOG", "trace")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

fn init(level: LevelFilter, format: LogFormat) {
    logging::init(&LogConfig { level, format }).unwrap();
}

/// The lines without their time stamp.
fn stamped(text: &str) -> Vec<&str> {
    text.lines()
        .map(|line| {
            let (time, rest) = line.split_once(' ').unwrap();
            assert!(time.starts_with("ts=2") && time.ends_with('Z'), "{line}");
            rest
        })
        .collect()
}

#[test]
fn levels_targets_values_and_panics() {
    if is_child() {
        init(LevelFilter::Info, LogFormat::Text);
        info!(target: "jetstream_outbox::relay", slot = "outbox", lsn:% = "0/1"; "connected");
        debug!(target: "jetstream_outbox::relay", "below the level");
        logging::info_with("starting", &[("db", "u@h/d".to_string())]);
        info!(target: "nats::client", "not ours");
        warn!(target: "nats::client", "not ours");
        let thread = thread::Builder::new().name("reader".to_string());
        let panicked = thread.spawn(|| panic!("two\nlines")).unwrap().join();
        assert!(panicked.is_err());
        return;
    }
    let output = child("levels_targets_values_and_panics").output().unwrap();
    assert!(output.status.success());
    let stderr = String::from_utf8(output.stderr).unwrap();
    let lines = stamped(&stderr);
    let (panicked, lines) = lines.split_last().unwrap();
    assert_eq!(
        lines,
        [
            r#"level=info msg="connected" slot=outbox lsn=0/1"#,
            r#"level=info msg="starting" db=u@h/d"#,
            r#"level=warn msg="not ours" target=nats::client"#,
        ]
    );
    let expect = r#"level=error msg="panic: two\nlines" thread=reader location=tests/logging.rs:"#;
    assert!(panicked.starts_with(expect), "{panicked}");
}

#[test]
fn lines_that_found_no_place_are_counted() {
    if is_child() {
        init(LevelFilter::Info, LogFormat::Json);
        for number in 0..FLOOD {
            error!(number; "line");
        }
        println!("logged");
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let (mut stderr, reader) = UnixStream::pair().unwrap();
    stderr.set_nonblocking(true).unwrap();
    while stderr.write(b"full\n").is_ok_and(|written| written == 5) {}
    stderr.set_nonblocking(false).unwrap();
    let mut command = child("lines_that_found_no_place_are_counted");
    let mut running = command.stderr(OwnedFd::from(stderr)).spawn().unwrap();
    drop(command);

    // with what the test program says itself in front of it
    let (has_logged, logged) = mpsc::channel();
    let out = BufReader::new(running.stdout.take().unwrap());
    thread::spawn(move || {
        for line in out.lines().map_while(Result::ok) {
            if line.ends_with("logged") {
                has_logged.send(()).unwrap();
            }
        }
    });
    logged.recv_timeout(DEADLINE).unwrap();
    // the report must come while the process runs on, not at its end
    reader.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut objects: Vec<serde_json::Value> = Vec::new();
    for line in BufReader::new(reader).lines() {
        // the filling may have been cut in mid-word, in front of the first line
        let line = line.unwrap();
        if let Some(start) = line.find('{') {
            objects.push(serde_json::from_str(&line[start..]).unwrap());
        }
        if line.contains("log lines are missing") {
            break;
        }
    }
    drop(running.stdin.take());
    // its end closes its output
    let nothing_more = logged.recv_timeout(DEADLINE);
    assert_eq!(nothing_more, Err(mpsc::RecvTimeoutError::Disconnected));
    assert!(running.wait().unwrap().success());

    let (last, written) = objects.split_last().unwrap();
    for (number, object) in written.iter().enumerate() {
        assert_eq!(object["number"], number);
    }
    let missing = last["lines"].as_u64().unwrap();
    assert!(missing > 0);
    assert_eq!(written.len() as u64 + missing, FLOOD as u64);
}
