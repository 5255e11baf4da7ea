//! The log: one line an event on standard error, as [logfmt](https://brandur.org/logfmt) or as JSON.
//!
//! Call sites pass values as key-values, `info!(slot = slot, lsn:% = lsn; "connected")`, which become
//! `ts=… level=info msg="connected" slot=jetstream_outbox lsn=0/16B3748`. `RUST_LOG` is not read: the
//! `-logging` flag decides. Of other crates only warnings and errors are shown, with their `target`.
//!
//! A reader of standard error that stands still (a stopped terminal, a stuck log collector) must not stop
//! the relay, or Postgres would end the session: lines pass through a bounded queue to a thread that
//! writes them, and what finds the queue full is dropped and counted.

pub mod recent;

use crossbeam_channel::{Receiver, Sender, bounded};
use log::{Level, LevelFilter, Log, Metadata, Record, kv};
use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{panic, thread};

/// Lines that may wait for standard error: more than any burst of the relay's.
const QUEUE_LINES: usize = 512;
/// How long a full queue may hold a thread up before its line is dropped; the next ones are dropped at once.
const QUEUE_PATIENCE: Duration = Duration::from_millis(50);
/// How long the end of the program may wait for the last lines to be written.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);
/// Longer texts (a server's error can be any length) are cut, so that the queue's memory is bounded too.
const MAX_TEXT_CHARS: usize = 4096;

/// What is logged, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// The least severe level that is shown.
    pub level: LevelFilter,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `key=value`, separated by spaces.
    Text,
    /// One JSON object.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        })
    }
}

enum ToWriter {
    Line(Vec<u8>),
    Flush(Sender<()>),
}

static WRITER: OnceLock<Sender<ToWriter>> = OnceLock::new();

/// Runs what it is given while something else that stands on the terminal is out of the way.
pub type Aside = Box<dyn Fn(&mut dyn FnMut()) + Send + Sync>;

static ASIDE: OnceLock<Aside> = OnceLock::new();

/// From now on lines are written so. The first who says this keeps it.
pub fn write_aside(aside: Aside) {
    ASIDE.get_or_init(|| aside);
}

/// Starts the log, and sends panics of every thread to it. Called once, first thing after the configuration
/// is read. Fails when the system grants no thread, or when the process has a logger already.
pub fn init(config: &LogConfig) -> io::Result<()> {
    let (sender, lines) = bounded(QUEUE_LINES);
    let queue = Queue {
        lines: sender.clone(),
        backlog: Arc::default(),
    };
    let backlog = queue.backlog.clone();
    let direct = Noting(builder(config).build());
    thread::Builder::new()
        .name("log".to_string())
        .spawn(move || write_lines(&lines, &backlog, &direct))?;
    let logger = builder(config)
        .target(env_logger::Target::Pipe(Box::new(queue)))
        .build();
    log::set_max_level(logger.filter().max(LevelFilter::Warn));
    log::set_boxed_logger(Box::new(Noting(logger))).map_err(io::Error::other)?;
    WRITER.get_or_init(|| sender);
    panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// Keeps warnings and errors for the status page, also those that are not shown.
struct Noting(env_logger::Logger);

impl Log for Noting {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn || self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        recent::note(record);
        self.0.log(record);
    }

    fn flush(&self) {
        self.0.flush();
    }
}

/// A logger in the configured form, straight to standard error.
fn builder(config: &LogConfig) -> env_logger::Builder {
    let format = config.format;
    let mut builder = env_logger::Builder::new();
    builder
        .filter_level(config.level.min(LevelFilter::Warn))
        .filter_module("jetstream_outbox", config.level)
        .format(move |out, record| {
            let time = out.timestamp_micros();
            write_record(out, format, &time, record)
        });
    builder
}

/// Waits, up to a deadline, until what was logged so far is written: for the end of the program.
pub fn flush() {
    let Some(writer) = WRITER.get() else { return };
    let (done, written) = bounded(1);
    let asked = writer.send_timeout(ToWriter::Flush(done), FLUSH_DEADLINE);
    if asked.is_ok() {
        // a disconnect or the deadline: there is nothing more to do about the lines either way
        let _ = written.recv_timeout(FLUSH_DEADLINE);
    }
}

/// Logs a message whose key-values are known at run time only.
pub fn info_with(message: &str, pairs: &[(&'static str, String)]) {
    log::logger().log(
        &Record::builder()
            .level(Level::Info)
            .target(module_path!())
            .key_values(&pairs)
            .args(format_args!("{message}"))
            .build(),
    );
}

fn log_panic(panic: &panic::PanicHookInfo<'_>) {
    let payload = panic.payload();
    let message = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    let location = panic.location().map_or(String::new(), |l| l.to_string());
    let thread = thread::current();
    log::error!(thread = thread.name().unwrap_or("unnamed"), location; "panic: {message}");
    flush();
}

// ---- the queue ------------------------------------------------------------------------------------

#[derive(Default)]
struct Backlog {
    /// The last line found no place in time, and none was written since.
    stalled: AtomicBool,
    dropped: AtomicU64,
}

/// The end that env_logger writes into: one call a line, and never an error.
struct Queue {
    lines: Sender<ToWriter>,
    backlog: Arc<Backlog>,
}

impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let patience = if self.backlog.stalled.load(Ordering::Relaxed) {
            Duration::ZERO
        } else {
            QUEUE_PATIENCE
        };
        let line_bytes = line.len();
        let sent = self
            .lines
            .send_timeout(ToWriter::Line(line.to_vec()), patience);
        if sent.is_err() {
            self.backlog.stalled.store(true, Ordering::Relaxed);
            self.backlog.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line_bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The writing thread. `direct` does not pass through the queue that this thread alone empties.
fn write_lines(lines: &Receiver<ToWriter>, backlog: &Backlog, direct: &dyn Log) {
    for order in lines {
        let flushed = match order {
            ToWriter::Line(line) => {
                // nobody reads standard error any more: the relay's work matters, not its log
                let mut write = || drop(io::stderr().write_all(&line));
                match ASIDE.get() {
                    Some(aside) => aside(&mut write),
                    None => write(),
                }
                backlog.stalled.store(false, Ordering::Relaxed);
                None
            }
            ToWriter::Flush(done) => Some(done),
        };
        // not before the queue is empty: the dropped lines came after those in it
        if lines.is_empty() {
            report_dropped(backlog.dropped.swap(0, Ordering::Relaxed), direct);
        }
        if let Some(done) = flushed {
            // whoever asked has stopped waiting
            let _ = done.send(());
        }
    }
}

fn report_dropped(count: u64, direct: &dyn Log) {
    if count > 0 {
        direct.log(
            &Record::builder()
                .level(Level::Warn)
                .target(module_path!())
                .key_values(&("lines", count))
                .args(format_args!(
                    "standard error was blocked: log lines are missing"
                ))
                .build(),
        );
    }
}

// ---- the lines ------------------------------------------------------------------------------------

fn write_record(
    out: &mut dyn Write,
    format: LogFormat,
    time: &dyn fmt::Display,
    record: &Record<'_>,
) -> io::Result<()> {
    let level = record.level().as_str().to_ascii_lowercase();
    let message = record.args().to_string();
    let mut line = match format {
        LogFormat::Text => format!("ts={time} level={level} msg={}", Quoted(cut(&message))),
        LogFormat::Json => format!(
            "{{\"time\":\"{time}\",\"level\":\"{level}\",\"msg\":{}",
            serde_json::Value::from(cut(&message))
        ),
    };
    let pairs = Pairs {
        line: &mut line,
        format,
    };
    pairs.all(record).map_err(io::Error::other)?;
    line.push_str(match format {
        LogFormat::Text => "\n",
        LogFormat::Json => "}\n",
    });
    out.write_all(line.as_bytes())
}

struct Pairs<'a> {
    line: &'a mut String,
    format: LogFormat,
}

impl<'a> Pairs<'a> {
    fn text(line: &'a mut String) -> Pairs<'a> {
        let format = LogFormat::Text;
        Pairs { line, format }
    }

    /// Whose line it is, unless it is ours, and its values.
    fn all(mut self, record: &Record<'_>) -> Result<(), kv::Error> {
        if !record.target().starts_with("jetstream_outbox") {
            self.push("target", &kv::Value::from(record.target()));
        }
        record.key_values().visit(&mut self)
    }

    fn push(&mut self, key: &str, value: &kv::Value<'_>) {
        let pair = match self.format {
            LogFormat::Text => format!(" {key}={}", Logfmt(cut(&value.to_string()))),
            LogFormat::Json => format!(",{}:{}", serde_json::Value::from(key), json(value)),
        };
        self.line.push_str(&pair);
    }
}

impl<'kvs> kv::VisitSource<'kvs> for Pairs<'_> {
    fn visit_pair(&mut self, key: kv::Key<'kvs>, value: kv::Value<'kvs>) -> Result<(), kv::Error> {
        self.push(key.as_str(), &value);
        Ok(())
    }
}

/// Numbers and booleans as such, everything else as text.
fn json(value: &kv::Value<'_>) -> serde_json::Value {
    let boolean = value.to_bool().map(serde_json::Value::from);
    let number = || {
        let whole = value.to_u64().map(serde_json::Value::from);
        whole.or_else(|| value.to_i64().map(serde_json::Value::from))
    };
    let float = || value.to_f64().map(serde_json::Value::from);
    boolean
        .or_else(number)
        .or_else(float)
        .unwrap_or_else(|| cut(&value.to_string()).into())
}

fn cut(text: &str) -> &str {
    cut_to(text, MAX_TEXT_CHARS)
}

fn cut_to(text: &str, max_chars: usize) -> &str {
    let end = text.char_indices().nth(max_chars);
    end.and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

/// A logfmt value: bare where that is unambiguous, else in double quotes, never with a line break in it.
pub struct Logfmt<'a>(pub &'a str);

impl fmt::Display for Logfmt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let needs_quotes =
            |c: char| c.is_whitespace() || c.is_control() || matches!(c, '"' | '\\' | '=');
        if self.0.is_empty() || self.0.contains(needs_quotes) {
            Quoted(self.0).fmt(f)
        } else {
            f.write_str(self.0)
        }
    }
}

/// Text in double quotes, with escapes as in JSON for whatever could end the line or steer a terminal.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') => {
                    write!(f, "\\u{:04x}", c as u32)?
                }
                c => f.write_char(c)?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn line(format: LogFormat, target: &str, message: &str, pairs: &[(&str, kv::Value)]) -> String {
        let mut out = Vec::new();
        let mut builder = Record::builder();
        builder.level(Level::Info).target(target).key_values(&pairs);
        let mut write = |record: Record| write_record(&mut out, format, &"T", &record).unwrap();
        write(builder.args(format_args!("{message}")).build());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_text_line_is_logfmt() {
        for (message, value, expect) in [
            ("connected", kv::Value::from("x"), r#"msg="connected" k=x"#),
            ("", kv::Value::from(""), r#"msg="" k="""#),
            (
                "a \"b\"",
                kv::Value::from("a b"),
                r#"msg="a \"b\"" k="a b""#,
            ),
            (
                "1\n2\r\t",
                kv::Value::from("a\nlevel=error"),
                r#"msg="1\n2\r\t" k="a\nlevel=error""#,
            ),
            (
                "\u{1b}[2J",
                kv::Value::from("\u{2028}\u{9b}"),
                r#"msg="\u001b[2J" k="\u2028\u009b""#,
            ),
            ("é", kv::Value::from("é"), r#"msg="é" k=é"#),
            ("n", kv::Value::from(-3), r#"msg="n" k=-3"#),
            ("b", kv::Value::from(true), r#"msg="b" k=true"#),
            ("q", kv::Value::from(r"a\b=c"), r#"msg="q" k="a\\b=c""#),
        ] {
            let found = line(
                LogFormat::Text,
                "jetstream_outbox::x",
                message,
                &[("k", value)],
            );
            assert_eq!(found, format!("ts=T level=info {expect}\n"));
        }
    }

    #[test]
    fn a_json_line_reads_back() {
        let values = [
            ("text", kv::Value::from("a\n\"b\"\u{2028}")),
            ("whole", kv::Value::from(u64::MAX)),
            ("negative", kv::Value::from(-1)),
            ("fraction", kv::Value::from(1.5)),
            ("on", kv::Value::from(true)),
            ("shown", kv::Value::from_display(&"0/16B3748")),
        ];
        let found = line(LogFormat::Json, "nats::client", "say \"x\"\r\n", &values);
        assert_eq!(found.matches(['\n', '\r']).count(), 1, "{found}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&found).unwrap(),
            serde_json::json!({
                "time": "T", "level": "info", "msg": "say \"x\"\r\n", "target": "nats::client",
                "text": "a\n\"b\"\u{2028}", "whole": u64::MAX, "negative": -1, "fraction": 1.5, "on": true,
                "shown": "0/16B3748",
            })
        );
    }

    #[test]
    fn an_endless_text_is_cut() {
        let long = "é".repeat(MAX_TEXT_CHARS + 1);
        for format in [LogFormat::Text, LogFormat::Json] {
            let found = line(format, "t", &long, &[("k", kv::Value::from(long.as_str()))]);
            assert_eq!(found.matches('é').count(), 2 * MAX_TEXT_CHARS);
        }
    }

    #[test]
    fn a_blocked_standard_error_costs_lines_and_not_time() {
        let (lines, nobody_reads) = bounded(1);
        let backlog = Arc::new(Backlog::default());
        let mut queue = Queue {
            lines,
            backlog: backlog.clone(),
        };
        let start = Instant::now();
        for _ in 0..1001 {
            queue.write_all(b"line\n").unwrap();
        }
        assert!(start.elapsed() < Duration::from_secs(5), "waited each time");
        assert_eq!(backlog.dropped.load(Ordering::Relaxed), 1000);
        assert_eq!(nobody_reads.len(), 1);
    }
}
