//! The flags as they are typed. What they mean, their defaults and their environment are `config.rs`'s.
//!
//! A flag is one field of [`Cli`] here and one line of `Config::load` there. Both spellings of Go's
//! [flag package](https://pkg.go.dev/flag#hdr-Command_line_flag_syntax) work (`-db X`, `--db X`, `-db=X`,
//! `--db=X`), because scripts written for the Go program pass them; argh knows `--db X` alone, so the
//! arguments are rewritten before it sees them.

use argh::{ArgsInfo, FlagInfo, FlagInfoKind, FromArgs, Optionality};
use std::ffi::OsString;
use std::fmt;

/// The program's name, as help and errors print it.
pub const PROGRAM: &str = env!("CARGO_PKG_NAME");

// No Debug: fields hold passwords.
/// Relays the rows of a Postgres outbox table to NATS JetStream: each committed row once, in commit order.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[flags]",
    note = "Flags may also be spelled -flag VALUE and -flag=VALUE.",
    note = "Each can come from the environment: --ack-timeout from JETSTREAM_OUTBOX_ACK_TIMEOUT.",
    note = "A flag beats the environment, the environment beats the default.",
    note = "Durations are written 500ms, 10s, 1h30m; a plain number counts seconds.",
    example = "{command_name} --db postgres://relay@db.example.com/shop --nats nats://nats.example.com\n{command_name} --drain",
    error_code(0, "stopped on request, or drained"),
    error_code(64, "a flag or its environment variable is wrong"),
    error_code(65, "an event cannot be published and must not be skipped"),
    error_code(69, "a server could not be reached within --max-outage"),
    error_code(70, "a defect of this program"),
    error_code(75, "the slot is in use by another relay (with --no-wait)"),
    error_code(
        78,
        "a slot, publication, stream, privilege or file is missing or wrong"
    )
)]
pub struct Cli {
    /// postgres connection: URL or key=value pairs (default: libpq's PGHOST, PGDATABASE, ...)
    #[argh(option)]
    pub db: Option<String>,
    /// NATS servers, separated by commas: host, nats://host:port or tls://host:port (default localhost)
    #[argh(option)]
    pub nats: Option<String>,
    /// NATS credentials file with a JWT and its key (default none)
    #[argh(option)]
    pub creds: Option<String>,
    /// NATS nkey seed file (default none)
    #[argh(option)]
    pub nats_nkey: Option<String>,
    /// file with the certificates that may sign the NATS server's (default: the system's)
    #[argh(option)]
    pub nats_tls_ca: Option<String>,
    /// client certificate file for NATS (default none)
    #[argh(option)]
    pub nats_tls_cert: Option<String>,
    /// key file of the client certificate for NATS (default none)
    #[argh(option)]
    pub nats_tls_key: Option<String>,
    /// subject prefix of the JetStream API, for domains and imported accounts (default $JS.API)
    #[argh(option)]
    pub nats_api_prefix: Option<String>,
    /// first part of every event's subject (default events)
    #[argh(option)]
    pub prefix: Option<String>,
    /// replication slot (default jetstream_outbox)
    #[argh(option)]
    pub slot: Option<String>,
    /// publication (default: the slot's name)
    #[argh(option)]
    pub publication: Option<String>,
    /// relay this table only, name or name:key=value,...; repeatable, or separated by commas (default: every table of the publication that has the columns)
    #[argh(option)]
    pub table: Vec<String>,
    /// column of the message id (default id)
    #[argh(option)]
    pub id_column: Option<String>,
    /// column behind {aggregatetype} (default aggregatetype)
    #[argh(option)]
    pub aggregatetype_column: Option<String>,
    /// column behind {aggregateid} (default aggregateid)
    #[argh(option)]
    pub aggregateid_column: Option<String>,
    /// column of the body (default payload)
    #[argh(option)]
    pub payload_column: Option<String>,
    /// template of the subject (default {prefix}.{aggregatetype}.{aggregateid})
    #[argh(option)]
    pub subject: Option<String>,
    /// what cannot stand in a subject as it is: encode, park or stop (default encode)
    #[argh(option)]
    pub on_bad_subject: Option<String>,
    /// a column that becomes a header, column or column=Name; repeatable, or separated by commas (default none)
    #[argh(option)]
    pub header: Vec<String>,
    /// json or jsonb column whose members become headers (default: headers, if there is one)
    #[argh(option)]
    pub headers_column: Option<String>,
    /// what cannot stand in a header as it is: encode, park or stop (default encode)
    #[argh(option)]
    pub on_bad_header: Option<String>,
    /// send each event as a CloudEvent in binary mode, with this source (default none)
    #[argh(option)]
    pub cloudevents: Option<String>,
    /// add the commit time and the transaction id to each event (default off)
    #[argh(switch)]
    pub position_headers: bool,
    /// prefix of the transactional messages that are events, Postgres 14 and later (default: the slot's name)
    #[argh(option)]
    pub message_prefix: Option<String>,
    /// take no messages, only rows (default off)
    #[argh(switch)]
    pub no_messages: bool,
    /// an event that can never be published: stop, park or skip (default stop)
    #[argh(option)]
    pub on_poison: Option<String>,
    /// subject of the events that are parked (default: the slot's name and .parked)
    #[argh(option)]
    pub park_subject: Option<String>,
    /// needed by --on-poison skip (default off)
    #[argh(switch)]
    pub yes_lose_events: bool,
    /// publishes that may be unacknowledged at a time, 1 to 65536 (default 1024)
    #[argh(option)]
    pub inflight: Option<String>,
    /// how long to wait for an acknowledgement before connecting anew, 100ms to 1h (default 5s)
    #[argh(option)]
    pub ack_timeout: Option<String>,
    /// give up after this long without a working session, from 1s on (default never)
    #[argh(option)]
    pub max_outage: Option<String>,
    /// exactly-once, or at-least-once for streams with other busy writers (default exactly-once)
    #[argh(option)]
    pub delivery: Option<String>,
    /// keep WAL this long after its events were acknowledged, up to 24h (default 150s)
    #[argh(option)]
    pub hold_back: Option<String>,
    /// key-value bucket that remembers how far each stream was, or none (default jetstream_outbox)
    #[argh(option)]
    pub checkpoint: Option<String>,
    /// go on although events are missing (lost by a stream, left out by a changed publication) or the slot was moved; to be given once (default off)
    #[argh(switch)]
    pub resume_anyway: bool,
    /// go on after events of another Postgres system; to be given once (default off)
    #[argh(switch)]
    pub accept_new_system: bool,
    /// publish what was committed before the start, then exit (default off)
    #[argh(switch)]
    pub drain: bool,
    /// exit when another relay uses the slot, instead of waiting for it (default off)
    #[argh(switch)]
    pub no_wait: bool,
    /// least level that is logged: debug, info, warn or error (default info)
    #[argh(option)]
    pub logging: Option<String>,
    /// log lines as text (key=value) or json (default text)
    #[argh(option)]
    pub log_format: Option<String>,
    /// print the version
    #[argh(switch)]
    pub version: bool,
}

/// What the command line asks for.
pub enum Invocation {
    /// Run the relay.
    Relay(Box<Cli>),
    /// Print this on standard output and exit 0.
    Print(String),
}

/// The arguments are not flags of this program. Never holds a flag's value, which may be a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageError {
    /// The argument at this place (from 1) is not UTF-8.
    NotUtf8(usize),
    /// The argument at this place (from 1) stands where a flag should. It may be a connection string that lacks its flag.
    NotAFlag(usize),
    /// There is no such flag.
    UnknownFlag(String),
    /// The flag was the last argument, or what follows it is a flag as well.
    NoValue(String),
    /// The flag is on or off, and was given a value.
    UnwantedValue(String),
    /// Anything else that argh does not take.
    Refused(String),
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("read command line: ")?;
        match self {
            UsageError::NotUtf8(place) => write!(f, "argument {place} is not UTF-8"),
            UsageError::NotAFlag(place) => write!(
                f,
                "argument {place} is neither a flag nor the value of one; a connection string needs -db or -nats before it"
            ),
            UsageError::UnknownFlag(flag) => write!(f, "there is no flag {flag}"),
            UsageError::NoValue(flag) => write!(
                f,
                "{flag} needs a value (one that is spelled like a flag is passed as {flag}=VALUE)"
            ),
            UsageError::UnwantedValue(flag) => {
                write!(f, "{flag} takes no value: leave it out, or give it alone")
            }
            UsageError::Refused(message) => f.write_str(message.trim_end()),
        }
    }
}

impl std::error::Error for UsageError {}

/// Reads the arguments, which do not include the program's name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, UsageError> {
    let args = args
        .into_iter()
        .enumerate()
        .map(|(index, arg)| {
            arg.into_string()
                .map_err(|_| UsageError::NotUtf8(index + 1))
        })
        .collect::<Result<Vec<String>, UsageError>>()?;
    let args = normalise(&args, Cli::get_args_info().flags)?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match Cli::from_args(&[PROGRAM], &args) {
        Ok(cli) if cli.version => Ok(Invocation::Print(format!(
            "{PROGRAM} {}\n",
            env!("CARGO_PKG_VERSION")
        ))),
        Ok(cli) => Ok(Invocation::Relay(Box::new(cli))),
        Err(exit) if exit.status.is_ok() => Ok(Invocation::Print(exit.output)),
        Err(exit) => Err(UsageError::Refused(exit.output)),
    }
}

/// Rewrites the arguments into `--flag value` and `--switch`, each flag once unless it is repeatable.
///
/// As in Go, the last of several values counts, and what follows a flag is its value even when it begins
/// with a dash. Other than in Go, a flag's own spelling is not taken for a value: `-prefix -drain` is a
/// forgotten value, and would publish under a subject that nobody reads.
fn normalise(args: &[String], flags: &[FlagInfo<'_>]) -> Result<Vec<String>, UsageError> {
    let find = |long: &str| flags.iter().find(|flag| flag.long == long);
    let mut found: Vec<(&FlagInfo<'_>, Option<String>)> = Vec::new();
    let mut rest = args.iter().enumerate();
    while let Some((index, arg)) = rest.next() {
        if !arg.starts_with('-') || arg == "-" {
            return Err(UsageError::NotAFlag(index + 1));
        }
        if arg == "--" {
            match rest.next() {
                None => break,
                Some((index, _)) => return Err(UsageError::NotAFlag(index + 1)),
            }
        }
        let (long, inline) = split(arg);
        if matches!(long.as_str(), "--help" | "-h") {
            return Ok(vec!["--help".to_string()]);
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let flag = match find(&long) {
            Some(flag) => flag,
            None if long.chars().all(is_name) => return Err(UsageError::UnknownFlag(long)),
            None => return Err(UsageError::NotAFlag(index + 1)),
        };
        let value = match (&flag.kind, inline) {
            (FlagInfoKind::Switch, None) => None,
            (FlagInfoKind::Switch, Some(_)) => return Err(UsageError::UnwantedValue(long)),
            (FlagInfoKind::Option { .. }, Some(value)) => Some(value.to_string()),
            (FlagInfoKind::Option { .. }, None) => match rest.next() {
                Some((_, value)) if find(&split(value).0).is_none() => Some(value.clone()),
                _ => return Err(UsageError::NoValue(long)),
            },
        };
        if !matches!(flag.optionality, Optionality::Repeating) {
            found.retain(|(earlier, _)| earlier.long != flag.long);
        }
        found.push((flag, value));
    }
    Ok(found
        .into_iter()
        .flat_map(|(flag, value)| std::iter::once(flag.long.to_string()).chain(value))
        .collect())
}

/// Takes `-name=value` apart, and gives a name of two or more letters its second dash.
fn split(arg: &str) -> (String, Option<&str>) {
    let (name, value) = match arg.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (arg, None),
    };
    match name.strip_prefix('-') {
        Some(bare) if bare.len() >= 2 && !bare.starts_with('-') => (format!("--{bare}"), value),
        _ => (name.to_string(), value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str]) -> Result<Invocation, UsageError> {
        parse(args.iter().map(OsString::from))
    }

    fn cli(args: &[&str]) -> Cli {
        match read(args) {
            Ok(Invocation::Relay(cli)) => *cli,
            Ok(Invocation::Print(text)) => panic!("{args:?} printed {text}"),
            Err(error) => panic!("{args:?}: {error}"),
        }
    }

    #[test]
    fn every_spelling_of_a_flag_reads_the_same() {
        for args in [
            &["-db", "X", "-ack-timeout", "1s", "-drain"][..],
            &["--db", "X", "--ack-timeout", "1s", "--drain"],
            &["-db=X", "-drain", "-ack-timeout=1s"],
            &["--db=X", "--drain", "--ack-timeout=1s", "--"],
        ] {
            let cli = cli(args);
            assert_eq!(cli.db.as_deref(), Some("X"), "{args:?}");
            assert_eq!(cli.ack_timeout.as_deref(), Some("1s"), "{args:?}");
            assert!(cli.drain && !cli.no_wait, "{args:?}");
        }
    }

    #[test]
    fn a_value_arrives_as_it_was_typed() {
        for (args, value) in [
            (&["-prefix", "-x"][..], "-x"),
            (&["-prefix", "-xyz"], "-xyz"),
            (&["-prefix", "--"], "--"),
            (&["-prefix", "help"], "help"),
            (&["-prefix", "a=b"], "a=b"),
            (&["-prefix=a=b"], "a=b"),
            (&["-prefix=-drain"], "-drain"),
            (&["-prefix="], ""),
            (&["-prefix", ""], ""),
            (&["-prefix", "first", "--prefix=last"], "last"),
        ] {
            assert_eq!(cli(args).prefix.as_deref(), Some(value), "{args:?}");
        }
    }

    #[test]
    fn tables_add_up() {
        assert_eq!(cli(&["-table", "a,b", "--table=c"]).table, ["a,b", "c"]);
    }

    #[test]
    fn what_is_not_a_flag_is_refused_without_its_text() {
        let flag = |name: &str| name.to_string();
        for (args, error) in [
            (&["postgres://u:secret@h/d"][..], UsageError::NotAFlag(1)),
            (&["-drain", "true"], UsageError::NotAFlag(2)),
            (&["--", "-drain"], UsageError::NotAFlag(2)),
            (&["-"], UsageError::NotAFlag(1)),
            (&["-dbpostgres://u:secret@h/d"], UsageError::NotAFlag(1)),
            (&["-d"], UsageError::UnknownFlag(flag("-d"))),
            (&["-db2=secret"], UsageError::UnknownFlag(flag("--db2"))),
            (&["---db", "x"], UsageError::UnknownFlag(flag("---db"))),
            (&["-db"], UsageError::NoValue(flag("--db"))),
            (&["-db", "-drain"], UsageError::NoValue(flag("--db"))),
            (&["-db", "--nats=x"], UsageError::NoValue(flag("--db"))),
            (&["-drain=true"], UsageError::UnwantedValue(flag("--drain"))),
        ] {
            assert_eq!(read(args).err().as_ref(), Some(&error), "{args:?}");
            assert!(!error.to_string().contains("secret"), "{args:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn bytes_that_are_not_utf8_are_refused() {
        use std::os::unix::ffi::OsStringExt;
        let args = ["-db".into(), OsString::from_vec(vec![0xff])];
        assert_eq!(parse(args).err(), Some(UsageError::NotUtf8(2)));
    }

    #[test]
    fn help_and_version_are_printed_whatever_else_is_given() {
        for (args, begin) in [
            (&["-h"][..], "Usage: jetstream-outbox"),
            (&["-help"], "Usage: jetstream-outbox"),
            (&["-db", "x", "--help", "-db"], "Usage: jetstream-outbox"),
            (&["-drain", "-version"], "jetstream-outbox 0.1.0\n"),
        ] {
            match read(args) {
                Ok(Invocation::Print(text)) => assert!(text.starts_with(begin), "{text}"),
                _ => panic!("{args:?} must print"),
            }
        }
    }
}
