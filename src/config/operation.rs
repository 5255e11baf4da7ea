//! The operator's commands, validated: what [`crate::cli::commands`] has as it was typed. They are read from flags alone,
//! not from the environment, which is the relay's.

use super::source::{Origin, Setting};
use super::value::{check_publication, parse_duration, parse_duration_within};
use super::{Config, ConfigError};
use crate::cli::commands::{self, Command};
use crate::outbox::subject::validate_prefix;
use jiff::Timestamp;
use std::ops::RangeInclusive;
use std::time::Duration;

/// nats-server's own bound for the copies of a stream.
const REPLICAS: RangeInclusive<u32> = 1..=5;
/// nats-server's least `duplicate_window`.
const WINDOW: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::MAX;
/// nats-server's own default.
const DEFAULT_WINDOW: Duration = Duration::from_secs(120);

/// What an operator wants done.
#[derive(Debug, PartialEq)]
pub enum Operation {
    /// Create what the relay needs.
    Setup(Setup),
    /// Only print what [`Operation::Setup`] would do.
    Print(Setup, Side),
    /// Remove slot and publication.
    Teardown {
        /// It was confirmed.
        yes: bool,
    },
    /// Find what is wrong.
    Check {
        /// Print JSON.
        json: bool,
        /// Warnings count.
        strict: bool,
        /// A stream that copies from the relay's.
        aggregate: Option<String>,
    },
    /// Tell where things stand.
    Status(Status),
    /// Print events.
    Tail(Tail),
    /// Find what is missing.
    Compare(Compare),
    /// Publish what was parked.
    Unpark(Unpark),
}

/// Whose administrator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The database's.
    Postgres,
    /// The message system's.
    Nats,
}

/// How things are to be created.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// The slot is to be taken over by standbys.
    pub failover: bool,
    /// The stream's name.
    pub stream: String,
    /// The stream's copies; `None`: one, and any number is right where the stream is there already.
    pub replicas: Option<u32>,
    /// The age at which the stream drops a message; `None`: never, and any is right.
    pub max_age: Option<Duration>,
    /// How much the stream may hold; −1: no limit.
    pub max_bytes: i64,
    /// How long the stream remembers message ids; `None`: two minutes, and any is right.
    pub duplicate_window: Option<Duration>,
    /// The stream that copies from the relay's, and the prefix of the copies, if it is to be another.
    pub aggregate: Option<(String, Option<String>)>,
    /// The relay's role.
    pub role: String,
}

/// What is to be told, and what is too much.
#[derive(Debug, PartialEq)]
pub struct Status {
    /// Print JSON.
    pub json: bool,
    /// Each second anew.
    pub watch: bool,
    /// More bytes of lag than this are too many.
    pub max_lag_bytes: Option<u64>,
    /// More seconds of lag than this are too many.
    pub max_lag_seconds: Option<u64>,
}

/// Which events to print.
#[derive(Debug, PartialEq)]
pub struct Tail {
    /// Where to begin.
    pub from: From,
    /// Only of these subjects.
    pub subject: String,
    /// Wait for more.
    pub follow: bool,
    /// At most so many.
    pub count: Option<u64>,
    /// Print JSON.
    pub json: bool,
}

/// What to compare, and what to do about it.
#[derive(Debug, PartialEq)]
pub struct Compare {
    /// Print JSON.
    pub json: bool,
    /// Only rows for which this SQL condition holds, and which the streams must still have.
    pub rows: Option<String>,
    /// Publish what is missing.
    pub publish: bool,
}

/// Which parked events to publish.
#[derive(Debug, PartialEq)]
pub struct Unpark {
    /// Those.
    pub which: Which,
    /// Only print the statements.
    pub print_sql: bool,
}

/// A choice of parked events.
#[derive(Debug, PartialEq)]
pub enum Which {
    /// The one with this id.
    Id(String),
    /// Those in whose cause this is.
    Cause(String),
    /// All.
    All,
}

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum From {
    /// With the first event there is.
    Start,
    /// With the first one that is not there yet.
    End,
    /// With this sequence.
    Sequence(u64),
    /// With the first one that was stored then or later.
    Time(Timestamp),
    /// With the first one that is not older.
    Age(Duration),
}

impl Operation {
    /// Whether it connects to Postgres.
    pub fn needs_database(&self) -> bool {
        match self {
            Operation::Print(..) | Operation::Tail(_) => false,
            Operation::Setup(_)
            | Operation::Teardown { .. }
            | Operation::Check { .. }
            | Operation::Status(_)
            | Operation::Compare(_)
            | Operation::Unpark(_) => true,
        }
    }

    /// Validates a command's flags; what was not given may depend on the relay's.
    pub fn load(command: Command, config: &Config) -> Result<Operation, ConfigError> {
        match command {
            Command::Setup(flags) => setup(flags, config),
            Command::Teardown(flags) => Ok(Operation::Teardown { yes: flags.yes }),
            Command::Check(flags) => Ok(Operation::Check {
                json: flags.json,
                strict: flags.strict,
                aggregate: optional("aggregate", flags.aggregate, parse_stream)?,
            }),
            Command::Status(flags) => Ok(Operation::Status(Status {
                json: flags.json,
                watch: flags.watch,
                max_lag_bytes: optional("max-lag-bytes", flags.max_lag_bytes, parse_number)?,
                max_lag_seconds: optional("max-lag-seconds", flags.max_lag_seconds, parse_number)?,
            })),
            Command::Tail(flags) => Ok(Operation::Tail(Tail {
                from: optional("from", flags.from, parse_from)?.unwrap_or(From::Start),
                subject: optional("subject", flags.subject, parse_pattern)?
                    .unwrap_or_else(|| format!("{}.>", config.prefix)),
                follow: flags.follow,
                count: optional("count", flags.count, parse_number)?,
                json: flags.json,
            })),
            Command::Compare(flags) => Ok(Operation::Compare(Compare {
                json: flags.json,
                rows: optional("where", flags.rows, parse_condition)?,
                publish: flags.publish,
            })),
            Command::Unpark(flags) => Ok(Operation::Unpark(Unpark {
                print_sql: flags.print_sql,
                which: which(flags)?,
            })),
        }
    }
}

fn which(flags: commands::Unpark) -> Result<Which, ConfigError> {
    match (flags.id, flags.cause, flags.all) {
        (Some(id), None, false) => Ok(Which::Id(id)),
        (None, Some(cause), false) => Ok(Which::Cause(cause)),
        (None, None, true) => Ok(Which::All),
        _ => Err(ConfigError::Together(
            "unpark needs one of -id, -cause and -all: which parked events are to be published",
        )),
    }
}

fn setup(flags: commands::Setup, config: &Config) -> Result<Operation, ConfigError> {
    let side = match (flags.print_sql, flags.print_nats) {
        (true, true) => {
            return Err(ConfigError::Together(
                "-print-sql and -print-nats are for two people; give one of them",
            ));
        }
        (true, false) => Some(Side::Postgres),
        (false, true) => Some(Side::Nats),
        (false, false) => None,
    };
    let setup = Setup {
        failover: flags.failover,
        stream: optional("stream", flags.stream, parse_stream)?
            .unwrap_or_else(|| config.slot.clone()),
        replicas: optional("replicas", flags.replicas, parse_replicas)?,
        max_age: optional("max-age", flags.max_age, |text| {
            parse_duration_within(text, WINDOW)
        })?,
        max_bytes: optional("max-bytes", flags.max_bytes, parse_bytes)?.unwrap_or(-1),
        duplicate_window: optional("duplicate-window", flags.duplicate_window, |text| {
            parse_duration_within(text, WINDOW)
        })?,
        aggregate: aggregate(flags.aggregate, flags.aggregate_prefix)?,
        role: optional("role", flags.role, |text| {
            check_publication(text)
                .map(|()| text.to_string())
                .map_err(|_| "is not a role's name: 1 to 63 bytes".to_string())
        })?
        .unwrap_or_else(|| "relay".to_string()),
    };
    let window = setup.duplicate_window.unwrap_or(DEFAULT_WINDOW);
    if setup.max_age.is_some_and(|age| age < window) {
        return Err(ConfigError::Together(
            "-duplicate-window is longer than -max-age, which nats-server does not allow",
        ));
    }
    if (setup.aggregate.as_ref()).is_some_and(|(name, _)| *name == setup.stream) {
        return Err(ConfigError::Together(
            "-aggregate has the name of the relay's own stream, from which it copies; give it another",
        ));
    }
    Ok(match side {
        Some(side) => Operation::Print(setup, side),
        None => Operation::Setup(setup),
    })
}

fn aggregate(
    name: Option<String>,
    prefix: Option<String>,
) -> Result<Option<(String, Option<String>)>, ConfigError> {
    let name = optional("aggregate", name, parse_stream)?;
    let prefix = optional("aggregate-prefix", prefix, |text| {
        let prefix = text.to_string();
        (validate_prefix(text).map(|()| prefix)).map_err(|error| error.to_string())
    })?;
    match (name, prefix) {
        (None, Some(_)) => Err(ConfigError::Together(
            "-aggregate-prefix is for the stream that -aggregate names; give that as well",
        )),
        (name, prefix) => Ok(name.map(|name| (name, prefix))),
    }
}

fn optional<T>(
    flag: &'static str,
    given: Option<String>,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Option<T>, ConfigError> {
    given
        .map(|value| {
            let origin = Origin::Flag;
            Setting {
                flag,
                origin,
                value,
            }
            .parse(parse)
        })
        .transpose()
}

fn parse_number(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| "is not a whole number".to_string())
}

/// A number, or one of kB, MB, GB, TB, powers of 1000.
fn parse_bytes(text: &str) -> Result<i64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let (number, unit) = text.split_at(digits.len());
    let unit = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" | "KB" => 1000,
        "M" | "MB" => 1_000_000,
        "G" | "GB" => 1_000_000_000,
        "T" | "TB" => 1_000_000_000_000,
        _ => 0,
    };
    let bytes = number.parse().ok().and_then(|it: i64| it.checked_mul(unit));
    let bytes = bytes.filter(|it| *it > 0 && !number.starts_with('+'));
    bytes.ok_or_else(|| "is not a size like 500MB or 10GB".to_string())
}

fn parse_condition(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("is no condition".to_string()),
        _ => Ok(text.to_string()),
    }
}

fn parse_replicas(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|n| REPLICAS.contains(n));
    number.ok_or_else(|| "is not a whole number from 1 to 5".to_string())
}

/// Source: nats-server's `isValidName` and the clients' check of stream names.
fn parse_stream(text: &str) -> Result<String, String> {
    let legal = |c: char| !c.is_whitespace() && !c.is_control() && !r".*>/\".contains(c);
    match !text.is_empty() && text.chars().all(legal) {
        true => Ok(text.to_string()),
        false => Err("is not a stream's name: no white space and none of . * > / \\".to_string()),
    }
}

fn parse_pattern(text: &str) -> Result<String, String> {
    let legal = |c: char| !c.is_whitespace() && !c.is_control();
    match !text.split('.').any(str::is_empty) && text.chars().all(legal) {
        true => Ok(text.to_string()),
        false => Err("is not a subject: words with a dot between them".to_string()),
    }
}

fn parse_from(text: &str) -> Result<From, String> {
    let not_a_place = || {
        "is neither start, end, a sequence, a time like 2026-11-23T11:00:00Z nor an age like 10m"
            .to_string()
    };
    match text {
        "start" => Ok(From::Start),
        "end" => Ok(From::End),
        _ if text.bytes().all(|b| b.is_ascii_digit()) => {
            text.parse().map(From::Sequence).map_err(|_| not_a_place())
        }
        _ => match (text.parse(), parse_duration(text)) {
            (Ok(time), _) => Ok(From::Time(time)),
            (_, Some(age)) => Ok(From::Age(age)),
            _ => Err(not_a_place()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Invocation};
    use std::ffi::OsString;

    fn load(args: &[&str]) -> Result<Operation, ConfigError> {
        let args = [&["-db", "host=h", "-prefix", "shop", "-slot", "s"], args].concat();
        match cli::parse(args.iter().map(OsString::from)) {
            Ok(Invocation::Command(cli, command)) => {
                Operation::load(command, &Config::load(&cli, &|_| None).unwrap())
            }
            _ => panic!("{args:?} is no command"),
        }
    }

    fn tail(from: From) -> Operation {
        Operation::Tail(Tail {
            from,
            subject: "shop.>".into(),
            follow: false,
            count: None,
            json: false,
        })
    }

    #[test]
    fn a_size_is_read() {
        for (text, bytes) in [
            ("1", 1),
            ("5kB", 5_000),
            ("500MB", 500_000_000),
            ("10g", 10_000_000_000),
            ("2TB", 2_000_000_000_000),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_given_depends_on_the_relays_flags() {
        let setup = Setup {
            failover: false,
            stream: "s".into(),
            replicas: None,
            max_age: None,
            max_bytes: -1,
            duplicate_window: None,
            aggregate: None,
            role: "relay".into(),
        };
        assert_eq!(load(&["setup"]).unwrap(), Operation::Setup(setup));
        assert_eq!(load(&["tail"]).unwrap(), tail(From::Start));
    }

    #[test]
    fn a_place_to_begin_is_read() {
        let time = "2026-11-23T11:00:00Z".parse().unwrap();
        for (text, from) in [
            ("start", From::Start),
            ("end", From::End),
            ("0", From::Sequence(0)),
            ("17", From::Sequence(17)),
            ("2026-11-23T11:00:00Z", From::Time(time)),
            ("2026-11-23T12:00:00+01:00", From::Time(time)),
            ("10m", From::Age(Duration::from_secs(600))),
        ] {
            let found = load(&["tail", "-from", text]).unwrap();
            assert_eq!(found, tail(from), "{text}");
        }
    }

    #[test]
    fn what_connects_to_postgres_needs_a_database() {
        for (args, needs) in [
            (&["setup"][..], true),
            (&["teardown"], true),
            (&["check"], true),
            (&["status"], true),
            (&["setup", "-print-sql"], false),
            (&["setup", "-print-nats"], false),
            (&["tail"], false),
            (&["compare"], true),
            (&["unpark", "-all"], true),
        ] {
            assert_eq!(load(args).unwrap().needs_database(), needs, "{args:?}");
        }
    }

    #[test]
    fn what_is_not_allowed_is_refused_by_name() {
        for args in [
            &["tail", "-from", "yesterday"][..],
            &["tail", "-from", "99999999999999999999"],
            &["tail", "-count", "-1"],
            &["tail", "-subject", "a..b"],
            &["status", "-max-lag-bytes", "1M"],
            &["status", "-max-lag-seconds", "x"],
            &["setup", "-replicas", "0"],
            &["setup", "-replicas", "6"],
            &["setup", "-stream", "a.b"],
            &["setup", "-role", ""],
            &["setup", "-max-age", "1d"],
            &["setup", "-max-bytes", "0"],
            &["setup", "-max-bytes", "10 GB"],
            &["setup", "-max-bytes", "10XB"],
            &["setup", "-max-bytes", "99999999TB"],
            &["setup", "-duplicate-window", "1ms"],
            &["setup", "-max-age", "1m"],
            &["setup", "-print-sql", "-print-nats"],
            &["setup", "-aggregate", "a.b"],
            &["setup", "-aggregate", "s"],
            &["setup", "-aggregate-prefix", "all"],
            &["setup", "-aggregate-prefix", "a..b", "-aggregate", "ALL"],
            &["check", "-aggregate", "a.b"],
            &["compare", "-where", " "],
            &["unpark", "-all", "-id", "x"],
            &["unpark", "-cause", "x", "-all"],
        ] {
            let error = load(args).expect_err(&args.join(" ")).to_string();
            let flag = args[1];
            assert!(error.contains(flag), "{args:?}: {error}");
        }
    }
}
