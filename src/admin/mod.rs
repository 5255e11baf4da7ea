//! The operator's commands: `setup`, `teardown`, `check`, `status`, `tail`, `compare`, `unpark`.
//!
//! They stand beside the relay and share its connections and its knowledge, not its threads. [`database`] is SQL over the
//! `postgres` crate, [`bus`] is JetStream over the `nats` crate, and over the relay's own connection for `check`; what each command finds is put together by pure functions, and printed.

pub mod bus;
pub mod check;
pub mod client;
pub mod compare;
pub mod database;
pub mod error;
pub mod print;
pub mod reissue;
mod remedy;
pub mod setup;
pub mod sides;
pub mod slot_copy;
pub mod statements;
pub mod status;
pub mod tail;
pub mod teardown;
pub mod unpark;

use crate::config::Config;
use crate::config::operation::Operation;
use crate::exit::Exit;
pub use error::Error;
use std::io::Write;

/// Runs a command to its end.
pub fn run(config: &Config, operation: Operation) -> Result<Exit, Error> {
    match operation {
        Operation::Setup(how) => setup::run(config, &how),
        Operation::Print(how, side) => {
            say(&print::text(config, &how, side))?;
            Ok(Exit::Done)
        }
        Operation::Teardown { yes } => teardown::run(config, yes),
        Operation::Check {
            json,
            strict,
            aggregate,
        } => check::run(config, json, strict, aggregate.as_deref()),
        Operation::Status(how) => status::run(config, &how),
        Operation::Tail(how) => tail::run(config, &how),
        Operation::Compare(how) => compare::run(config, &how),
        Operation::Unpark(how) => unpark::run(config, &how),
    }
}

/// Prints on standard output, at once.
fn say(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Error::Output)
}

/// `12 bytes`, `3.4 MB`: for a person.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if count < 1000 {
        return format!("{count} bytes");
    }
    let mut value = count as f64;
    let mut unit = "";
    for next in UNITS {
        if value < 999.95 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// `5s`, `3m20s`, `2h5m`, `4d3h`: for a person.
fn span(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_read_well() {
        for (count, text) in [
            (0, "0 bytes"),
            (999, "999 bytes"),
            (1000, "1.0 kB"),
            (999_949, "999.9 kB"),
            (999_951, "1.0 MB"),
            (16_777_216, "16.8 MB"),
            (u64::MAX, "18446.7 PB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (200, "3m20s"),
            (7500, "2h5m"),
            (356_400, "4d3h"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }
}
