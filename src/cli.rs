//! The flags as they are typed. What they mean, their defaults and their environment are `config.rs`'s.
//!
//! A flag is one field of [`Cli`] here and one line of `Config::load` there. Both spellings of Go's
//! [flag package](https://pkg.go.dev/flag#hdr-Command_line_flag_syntax) work (`-db X`, `--db X`, `-db=X`,
//! `--db=X`), because scripts written for the Go program pass them; argh knows `--db X` alone, so the
//! arguments are rewritten before it sees them. The word of an operator's command may stand before, between or
//! behind the flags; [`commands`] has their own flags.

use argh::{ArgsInfo, EarlyExit, FlagInfo, FlagInfoKind, FromArgs, Optionality};
use commands::Word;
use std::ffi::OsString;
use std::fmt;

pub mod commands;
#[cfg(feature = "admin")]
mod completions;
#[cfg(feature = "admin")]
mod man;

/// The program's name, as help and errors print it.
pub const PROGRAM: &str = env!("CARGO_PKG_NAME");

// No Debug: fields hold passwords.
/// Relays the rows of a Postgres outbox table to NATS JetStream: each committed row once, in commit order.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[command] [flags]",
    note = "Commands: setup, teardown, check, status, tail, compare, unpark, completions, man. Without one, the relay runs. COMMAND --help lists more.",
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
    /// file with the connection, in place of --db (default: the file db of $CREDENTIALS_DIRECTORY, if there is one)
    #[argh(option)]
    pub db_file: Option<String>,
    /// NATS servers, separated by commas: host, nats://host:port or tls://host:port (default localhost)
    #[argh(option)]
    pub nats: Option<String>,
    /// NATS credentials file with a JWT and its key (default: the file creds of $CREDENTIALS_DIRECTORY, if there is one)
    #[argh(option)]
    pub creds: Option<String>,
    /// NATS nkey seed file (default: the file nkey of $CREDENTIALS_DIRECTORY, if there is one)
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
    /// make the TLS handshake with NATS before it says anything, for servers with handshake_first (default off)
    #[argh(switch)]
    pub nats_tls_first: bool,
    /// longest time to connect and sign in to one NATS server, 100ms to 2m (default 5s)
    #[argh(option)]
    pub nats_connect_timeout: Option<String>,
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
    /// mark the last event of each transaction in each stream with how many of its events are there (default off)
    #[argh(switch)]
    pub transaction_headers: bool,
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
    /// publishes that may be unacknowledged at a time, 1 to 65536 (default 3072)
    #[argh(option)]
    pub inflight: Option<String>,
    /// how long to wait for an acknowledgement before connecting again, 100ms to 1h (default 5s)
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
    /// key-value bucket that remembers how far the relay is (default jetstream_outbox)
    #[argh(option)]
    pub checkpoint: Option<String>,
    /// go on although events are missing (lost by a stream, left out by a changed publication or by at-least-once) or the slot was moved; to be given once (default off)
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
    /// serve metrics, health and a status page over HTTP: a port of localhost, :port for every address of this machine, or address:port (default off)
    #[argh(option)]
    pub listen: Option<String>,
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
    /// Run an operator's command, with these flags of the relay.
    #[cfg(feature = "admin")]
    Command(Box<Cli>, commands::Command),
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
    /// The flag is one of commands, and not of the one that was given, if one was.
    NotHere {
        /// The flag.
        flag: String,
        /// The command; `None` for the relay.
        of: Option<&'static str>,
    },
    /// The command is not in this build.
    NoCommands(&'static str),
    /// The flag was the last argument, or what follows it is a flag as well.
    NoValue(String),
    /// The flag is on or off, and was given a value.
    UnwantedValue(String),
    /// There are no completions for this shell.
    UnknownShell,
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
                "argument {place} is neither a command ({}, completions, man) nor a flag nor the value of one; a connection \
                 string needs -db or -nats before it",
                Word::ALL.map(Word::name).join(", ")
            ),
            UsageError::NotHere { flag, of: None } => {
                write!(f, "{flag} needs its command: {PROGRAM} COMMAND {flag}")
            }
            UsageError::NotHere {
                flag,
                of: Some(word),
            } => {
                write!(f, "there is no flag {flag} of {word}")
            }
            UsageError::NoCommands(word) => write!(
                f,
                "{word} is not in this build, which is the relay alone; build it with the feature admin"
            ),
            UsageError::UnknownFlag(flag) => write!(f, "there is no flag {flag}"),
            UsageError::NoValue(flag) => write!(
                f,
                "{flag} needs a value (one that is spelled like a flag is passed as {flag}=VALUE)"
            ),
            UsageError::UnwantedValue(flag) => {
                write!(f, "{flag} takes no value: leave it out, or give it alone")
            }
            UsageError::UnknownShell => write!(
                f,
                "completions are for one of bash, zsh and fish: {PROGRAM} completions bash"
            ),
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
    #[cfg(feature = "admin")]
    if let Some(text) = completions::asked_for(&args).or_else(|| man::asked_for(&args)) {
        return Ok(Invocation::Print(text?));
    }
    let typed = read(&args)?;
    if typed.help {
        return Ok(Invocation::Print(help(typed.word)));
    }
    let (others, relay): (Vec<_>, Vec<_>) =
        (typed.flags.into_iter()).partition(|given| given.commands);
    let cli = Cli::from_args(&[PROGRAM], &words(&relay)).map_err(refused)?;
    if cli.version {
        let version = env!("CARGO_PKG_VERSION");
        return Ok(Invocation::Print(format!("{PROGRAM} {version}\n")));
    }
    let stray = others.iter().find(|given| {
        !typed
            .word
            .is_some_and(|word| has(word.info().flags, given.flag.long))
    });
    if let Some(given) = stray {
        return Err(UsageError::NotHere {
            flag: given.flag.long.to_string(),
            of: typed.word.map(Word::name),
        });
    }
    match typed.word {
        None => Ok(Invocation::Relay(Box::new(cli))),
        #[cfg(feature = "admin")]
        Some(word) => {
            let command = word.read(&[PROGRAM, word.name()], &words(&others));
            Ok(Invocation::Command(
                Box::new(cli),
                command.map_err(refused)?,
            ))
        }
        #[cfg(not(feature = "admin"))]
        Some(word) => Err(UsageError::NoCommands(word.name())),
    }
}

#[cfg(feature = "admin")]
fn is_help(arg: &str) -> bool {
    matches!(arg, "-h" | "-help" | "--help")
}

fn refused(exit: EarlyExit) -> UsageError {
    UsageError::Refused(exit.output)
}

fn has(flags: &[FlagInfo<'_>], long: &str) -> bool {
    flags.iter().any(|flag| flag.long == long)
}

/// The flags of the relay that say where things are: the ones that every command reads.
const CONNECTION_FLAGS: [&str; 15] = [
    "--db",
    "--db-file",
    "--nats",
    "--creds",
    "--nats-nkey",
    "--nats-tls-ca",
    "--nats-tls-cert",
    "--nats-tls-key",
    "--nats-tls-first",
    "--nats-connect-timeout",
    "--nats-api-prefix",
    "--prefix",
    "--slot",
    "--publication",
    "--table",
];

/// Flags of the relay that commands [follow](follows) besides: what makes an event, and where it goes.
const MAPPING_FLAGS: [&str; 16] = [
    "--id-column",
    "--aggregatetype-column",
    "--aggregateid-column",
    "--payload-column",
    "--subject",
    "--on-bad-subject",
    "--header",
    "--headers-column",
    "--on-bad-header",
    "--cloudevents",
    "--message-prefix",
    "--no-messages",
    "--on-poison",
    "--park-subject",
    "--delivery",
    "--checkpoint",
];

/// The flags of the relay that a command's `--help` lists.
fn is_listed(word: Word, flag: &str) -> bool {
    CONNECTION_FLAGS.contains(&flag) || follows(word) && MAPPING_FLAGS.contains(&flag)
}

/// Whether the command asks what makes an event.
fn follows(word: Word) -> bool {
    matches!(
        word,
        Word::Setup | Word::Check | Word::Compare | Word::Unpark
    )
}

/// What `--help` prints. A command lists its own flags and, as argh lays them out for the relay, those of connections.
fn help(word: Option<Word>) -> String {
    let output = |read: Result<(), EarlyExit>| read.err().map_or(String::new(), |exit| exit.output);
    let relay = output(Cli::from_args(&[PROGRAM], &["--help"]).map(drop));
    let Some(word) = word else {
        return relay;
    };
    let mut text = output(word.read(&[PROGRAM, word.name()], &["--help"]).map(drop));
    text += match follows(word) {
        true => {
            "\nConnections and events (all flags of the relay are taken, and those that do not matter ignored):\n"
        }
        false => {
            "\nConnections (all flags of the relay are taken, and those that do not matter ignored):\n"
        }
    };
    let mut listed = false;
    for line in relay.lines() {
        match line
            .strip_prefix("  ")
            .and_then(|line| line.split(' ').next())
        {
            Some(flag) if flag.starts_with("--") => listed = is_listed(word, flag),
            // the rest of a description
            Some("") => {}
            _ => listed = false,
        }
        if listed {
            text += line;
            text.push('\n');
        }
    }
    text
}

/// A flag, and its value unless it is a switch.
struct Given {
    flag: &'static FlagInfo<'static>,
    value: Option<String>,
    /// It is the command's; the relay may have one of the same name.
    commands: bool,
}

/// What was typed.
#[derive(Default)]
struct Typed {
    word: Option<Word>,
    /// Each flag once unless it is repeatable.
    flags: Vec<Given>,
    help: bool,
}

/// The flags as argh reads them: `--flag value` and `--switch`.
fn words(flags: &[Given]) -> Vec<&str> {
    let words = flags
        .iter()
        .flat_map(|given| std::iter::once(given.flag.long).chain(given.value.as_deref()));
    words.collect()
}

/// Reads command and flags.
///
/// As in Go, the last of several values counts, and what follows a flag is its value even when it begins
/// with a dash. Other than in Go, a flag's own spelling is not taken for a value: `-prefix -drain` is a
/// forgotten value, and would publish under a subject that nobody reads. A flag that both the relay and the
/// command have is the command's behind its word, and the relay's before it.
fn read(args: &[String]) -> Result<Typed, UsageError> {
    let find = |long: &str, word: Option<Word>| {
        let of = |word: Word| word.info().flags.iter().map(|flag| (flag, true));
        let relay = Cli::get_args_info().flags.iter().map(|flag| (flag, false));
        let behind = word.into_iter().flat_map(of);
        let mut known = behind
            .chain(relay)
            .chain(Word::ALL.into_iter().flat_map(of));
        known.find(|(flag, _)| flag.long == long)
    };
    let mut typed = Typed::default();
    let mut rest = args.iter().enumerate().peekable();
    while let Some((index, arg)) = rest.next() {
        if !arg.starts_with('-') || arg == "-" {
            match Word::find(arg) {
                Some(word) if typed.word.is_none() => typed.word = Some(word),
                _ => return Err(UsageError::NotAFlag(index + 1)),
            }
            continue;
        }
        if arg == "--" {
            match rest.next() {
                None => break,
                Some((index, _)) => return Err(UsageError::NotAFlag(index + 1)),
            }
        }
        let (long, inline) = split(arg);
        if matches!(long.as_str(), "--help" | "-h") {
            let follows = rest.peek().and_then(|(_, next)| Word::find(next));
            typed.word = typed.word.or(follows);
            typed.help = true;
            return Ok(typed);
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let (flag, commands) = match find(&long, typed.word) {
            Some(found) => found,
            None if long.chars().all(is_name) => return Err(UsageError::UnknownFlag(long)),
            None => return Err(UsageError::NotAFlag(index + 1)),
        };
        let value = match (&flag.kind, inline) {
            (FlagInfoKind::Switch, None) => None,
            (FlagInfoKind::Switch, Some(_)) => return Err(UsageError::UnwantedValue(long)),
            (FlagInfoKind::Option { .. }, Some(value)) => Some(value.to_string()),
            (FlagInfoKind::Option { .. }, None) => match rest.next() {
                Some((_, value)) if find(&split(value).0, None).is_none() => Some(value.clone()),
                _ => return Err(UsageError::NoValue(long)),
            },
        };
        if !matches!(flag.optionality, Optionality::Repeating) {
            typed
                .flags
                .retain(|earlier| earlier.flag.long != flag.long || earlier.commands != commands);
        }
        typed.flags.push(Given {
            flag,
            value,
            commands,
        });
    }
    Ok(typed)
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

    fn invoke(args: &[&str]) -> Result<Invocation, UsageError> {
        parse(args.iter().map(OsString::from))
    }

    fn cli(args: &[&str]) -> Cli {
        match invoke(args) {
            Ok(Invocation::Relay(cli)) => *cli,
            Ok(_) => panic!("{args:?} does not start the relay"),
            Err(error) => panic!("{args:?}: {error}"),
        }
    }

    /// The command's flags and the relay's, of a `check`.
    #[cfg(feature = "admin")]
    fn check(args: &[&str]) -> (commands::Check, Cli) {
        match invoke(args) {
            Ok(Invocation::Command(cli, commands::Command::Check(check))) => (check, *cli),
            Ok(_) => panic!("{args:?} is no check"),
            Err(error) => panic!("{args:?}: {error}"),
        }
    }

    #[cfg(feature = "admin")]
    #[test]
    fn a_command_stands_before_between_or_behind_the_flags() {
        for args in [
            &["check", "-db", "X", "-json"][..],
            &["-db", "X", "check", "--json"],
            &["-json", "--db=X", "check"],
            &["--json", "check", "-db=X", "--"],
        ] {
            let (check, cli) = check(args);
            assert_eq!(cli.db.as_deref(), Some("X"), "{args:?}");
            assert!(check.json && !check.strict, "{args:?}");
        }
        // a relay's command line, with the word put behind it
        let (_, cli) = check(&["-db", "check", "-drain", "-inflight", "7", "check"]);
        assert_eq!(cli.db.as_deref(), Some("check"));
        assert!(cli.drain);
    }

    #[cfg(not(feature = "admin"))]
    #[test]
    fn a_build_without_commands_says_so() {
        for word in Word::ALL {
            let error = invoke(&["-db", "X", word.name()]).err();
            assert_eq!(error, Some(UsageError::NoCommands(word.name())));
        }
    }

    /// Flags are read before the command is known.
    #[test]
    fn a_flag_is_of_the_same_kind_everywhere() {
        let all: Vec<&FlagInfo<'_>> = Word::ALL
            .iter()
            .flat_map(|word| word.info().flags)
            .chain(Cli::get_args_info().flags)
            .collect();
        for flag in &all {
            for other in all.iter().filter(|other| other.long == flag.long) {
                assert_eq!(flag.kind, other.kind, "{}", flag.long);
            }
        }
    }

    #[cfg(feature = "admin")]
    #[test]
    fn a_flag_that_both_have_is_the_commands_behind_its_word() {
        let args = ["-subject", "{prefix}.x", "tail", "-subject", "events.a"];
        let Ok(Invocation::Command(cli, commands::Command::Tail(tail))) = invoke(&args) else {
            panic!("it is a command");
        };
        assert_eq!(cli.subject.as_deref(), Some("{prefix}.x"));
        assert_eq!(tail.subject.as_deref(), Some("events.a"));
    }

    #[test]
    fn the_help_of_a_command_lists_its_flags_and_those_of_connections() {
        for word in Word::ALL {
            for args in [[word.name(), "--help"], ["-h", word.name()]] {
                let Ok(Invocation::Print(text)) = invoke(&args) else {
                    panic!("{args:?} must print");
                };
                assert!(
                    text.starts_with(&format!("Usage: {PROGRAM} {} [flags]", word.name())),
                    "{text}"
                );
                let listed = |flag: &str| {
                    text.lines().any(|line| {
                        line.starts_with(&format!("  {flag} ")) || line == format!("  {flag}")
                    })
                };
                let own = || word.info().flags.iter().map(|flag| flag.long);
                for flag in own()
                    .filter(|flag| *flag != "--help")
                    .chain(CONNECTION_FLAGS)
                {
                    assert!(listed(flag), "{args:?} does not list {flag}:\n{text}");
                }
                let follows = follows(word);
                for flag in MAPPING_FLAGS {
                    let expected = follows || own().any(|name| name == flag);
                    assert_eq!(listed(flag), expected, "{args:?} {flag}:\n{text}");
                }
                assert!(!listed("--inflight") && !listed("--drain"), "{text}");
                assert!(listed("--db-file"), "{text}");
                assert!(text.contains("libpq's PGHOST, PGDATABASE"), "{text}");
            }
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
            (&["chekc"], UsageError::NotAFlag(1)),
            (&["check", "status"], UsageError::NotAFlag(2)),
            (
                &["-json"],
                UsageError::NotHere {
                    flag: flag("--json"),
                    of: None,
                },
            ),
            (
                &["check", "-yes"],
                UsageError::NotHere {
                    flag: flag("--yes"),
                    of: Some("check"),
                },
            ),
        ] {
            assert_eq!(invoke(args).err().as_ref(), Some(&error), "{args:?}");
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
            (
                &["-drain", "-version"],
                concat!("jetstream-outbox ", env!("CARGO_PKG_VERSION"), "\n"),
            ),
        ] {
            match invoke(args) {
                Ok(Invocation::Print(text)) => assert!(text.starts_with(begin), "{text}"),
                _ => panic!("{args:?} must print"),
            }
        }
    }
}
