//! The one [`Config`]: flags, environment and defaults put together and validated once, at the start.
//!
//! A flag beats its environment variable (`-ack-timeout` is `JETSTREAM_OUTBOX_ACK_TIMEOUT`), which beats the
//! default in [`DEFAULTS`]. An empty variable counts as none. Nothing here talks to a server: what only a
//! server can refuse is the relay's to report. No message, `Debug` or summary shows a password or a token.

use crate::cli::{Cli, PROGRAM};
use crate::exit::Exit;
use crate::logging::{self, LogConfig, LogFormat, Logfmt};
use log::LevelFilter;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// What a flag is when neither it nor its variable is given; a flag that is not here is then off or absent.
const DEFAULTS: [(&str, &str); 11] = [
    ("nats", "localhost"),
    ("nats-api-prefix", "$JS.API"),
    ("prefix", "events"),
    ("slot", "jetstream_outbox"),
    ("inflight", "1024"),
    ("ack-timeout", "5s"),
    ("max-outage", "never"),
    ("delivery", "exactly-once"),
    ("hold-back", "150s"),
    ("logging", "info"),
    ("log-format", "text"),
];

/// Above this the window is larger than any server answers at once, and costs memory alone.
const INFLIGHT: RangeInclusive<usize> = 1..=65_536;
/// Shorter than a network round trip under load it would end healthy sessions; longer than an hour it hides outages.
const ACK_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(3600);
/// Shorter than a second there is no time for a single attempt to connect.
const MAX_OUTAGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::MAX;
/// Postgres keeps the WAL of the whole span: a day is as much as a disk should be asked for by a flag.
const HOLD_BACK: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(24 * 3600);
/// Postgres' NAMEDATALEN less its terminator: longer names are cut off silently there.
const MAX_NAME_BYTES: usize = 63;

/// Stands for what is not shown.
const HIDDEN: &str = "***";

/// What the relay works by.
pub struct Config {
    /// Connection string as given; empty: libpq's environment alone.
    pub db: String,
    /// How to reach NATS.
    pub nats: NatsConfig,
    /// First part of every subject; one or more legal tokens.
    pub prefix: String,
    /// The replication slot; letters, digits and underscores, so it needs no quotes.
    pub slot: String,
    /// The publication, as it is stored in `pg_publication`: quote it where it becomes SQL.
    pub publication: String,
    /// The tables to relay; empty: every table of the publication that has the columns.
    pub tables: Vec<TableName>,
    /// Publishes that may be unacknowledged at a time.
    pub inflight: usize,
    /// How long to wait for an acknowledgement before the NATS session counts as dead.
    pub ack_timeout: Duration,
    /// How long to go on without a working session; `None`: for ever.
    pub max_outage: Option<Duration>,
    /// Exit when another relay uses the slot.
    pub no_wait: bool,
    /// Publish what was committed before the start, then exit.
    pub drain: bool,
    /// What is promised about repeats.
    pub delivery: Delivery,
    /// How long after its acknowledgement a transaction is confirmed to Postgres; zero: at once.
    pub hold_back: Duration,
    /// What is logged, and how.
    pub log: LogConfig,
    /// What an operator should be told once at the start.
    pub warnings: Vec<String>,
}

/// How to reach NATS.
pub struct NatsConfig {
    /// `host`, `host:port`, `nats://…` or `tls://…`, each perhaps with credentials; never empty.
    pub servers: Vec<String>,
    /// Credentials file (JWT and nkey seed); never together with `nkey`.
    pub creds: Option<PathBuf>,
    /// Nkey seed file.
    pub nkey: Option<PathBuf>,
    /// Certificates that may sign the server's; `None`: the system's.
    pub tls_ca: Option<PathBuf>,
    /// Client certificate; given together with `tls_key`, or neither is.
    pub tls_cert: Option<PathBuf>,
    /// Key of the client certificate.
    pub tls_key: Option<PathBuf>,
    /// Subject prefix of the JetStream API, without a trailing dot.
    pub api_prefix: String,
    /// The connection's name in the server's monitoring.
    pub name: String,
}

/// What is promised about repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Each event once, in commit order: the fence.
    ExactlyOnce,
    /// No fence, for streams with other busy writers: a repeat is caught inside the deduplication window only.
    AtLeastOnce,
}

/// A table as `pg_class` and `pg_namespace` spell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    /// `None`: in any schema.
    pub schema: Option<String>,
    /// The table.
    pub name: String,
}

/// A setting is not usable. Display names the flag or variable; [`ConfigError::remedy`] says what to do.
#[derive(Debug)]
pub enum ConfigError {
    /// Neither a flag nor the environment names a database.
    NoDatabase,
    /// The value is not one of those allowed.
    Value {
        /// The flag or variable as the operator spelled it.
        setting: String,
        /// The value; `None` where it may hold a secret.
        value: Option<String>,
        /// What is wrong with it, or what would be right.
        reason: String,
    },
    /// Two settings exclude or need each other.
    Together(&'static str),
    /// The file is missing, or may not be read.
    File {
        /// The flag or variable that names it.
        setting: String,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::NoDatabase => f.write_str("read -db: no database is named"),
            ConfigError::Value {
                setting,
                value: Some(value),
                reason,
            } => write!(f, "read {setting}: {value:?} {reason}"),
            ConfigError::Value {
                setting, reason, ..
            } => write!(f, "read {setting}: {reason}"),
            ConfigError::Together(reason) => write!(f, "read flags: {reason}"),
            ConfigError::File {
                setting,
                path,
                source,
            } => write!(f, "open {} of {setting}: {source}", path.display()),
        }
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ConfigError::File { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl ConfigError {
    /// What the operator can do about it, as a sentence.
    pub fn remedy(&self) -> String {
        match self {
            ConfigError::NoDatabase => {
                "pass -db postgres://user@host/dbname, or set JETSTREAM_OUTBOX_DB, or libpq's PGHOST and PGDATABASE".to_string()
            }
            ConfigError::Value { setting, .. } => {
                format!("correct {setting}; {PROGRAM} --help lists what is allowed")
            }
            ConfigError::Together(_) => {
                format!("correct the flags or their variables; {PROGRAM} --help lists them")
            }
            ConfigError::File { setting, .. } => {
                format!("correct {setting}, or let the user who runs {PROGRAM} read the file")
            }
        }
    }

    /// The exit code it ends the program with.
    pub fn exit(&self) -> Exit {
        match self {
            ConfigError::File { .. } => Exit::Configuration,
            _ => Exit::Usage,
        }
    }
}

impl Config {
    /// Puts flags, environment and defaults together. `env` looks a variable up.
    pub fn load(cli: Cli, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let from = Sources { env };
        let mut warnings = Vec::new();

        let db = from.text("db", cli.db);
        if db.origin == Origin::Default && !libpq_names_a_database(env) {
            return Err(ConfigError::NoDatabase);
        }
        let nats = from.text("nats", cli.nats);
        for (setting, secret) in [
            (&db, conninfo_has_password(&db.value)),
            (&nats, nats.value.contains('@')),
        ] {
            if secret && setting.origin == Origin::Flag {
                warnings.push(format!(
                    "the secret in {} can be read by every user of this machine with ps: pass it as {}, or in a file",
                    setting.name(),
                    variable(setting.flag)
                ));
            }
        }

        let slot = from.text("slot", cli.slot).check(check_slot)?;
        let publication = match from.text("publication", cli.publication) {
            given if given.origin == Origin::Default => slot.clone(),
            given => given.check(check_publication)?,
        };
        let creds = from.file("creds", cli.creds)?;
        let nkey = from.file("nats-nkey", cli.nats_nkey)?;
        if creds.is_some() && nkey.is_some() {
            return Err(ConfigError::Together(
                "-creds and -nats-nkey are two ways to sign in; give one of them",
            ));
        }
        let tls_cert = from.file("nats-tls-cert", cli.nats_tls_cert)?;
        let tls_key = from.file("nats-tls-key", cli.nats_tls_key)?;
        if tls_cert.is_some() != tls_key.is_some() {
            return Err(ConfigError::Together(
                "-nats-tls-cert and -nats-tls-key are used together; one of them is missing",
            ));
        }

        Ok(Config {
            nats: NatsConfig {
                servers: nats.secret(parse_servers)?,
                creds,
                nkey,
                tls_ca: from.file("nats-tls-ca", cli.nats_tls_ca)?,
                tls_cert,
                tls_key,
                api_prefix: from
                    .text("nats-api-prefix", cli.nats_api_prefix)
                    .check(check_subject)?,
                name: format!("{PROGRAM} {slot}"),
            },
            db: db.value,
            prefix: from.text("prefix", cli.prefix).check(check_subject)?,
            tables: from
                .text("table", Some(cli.table.join(",")).filter(|t| !t.is_empty()))
                .parse(parse_tables)?,
            inflight: from.text("inflight", cli.inflight).parse(parse_inflight)?,
            ack_timeout: from
                .text("ack-timeout", cli.ack_timeout)
                .parse(|text| parse_duration_within(text, ACK_TIMEOUT))?,
            max_outage: from
                .text("max-outage", cli.max_outage)
                .parse(|text| match text {
                    "never" => Ok(None),
                    text => parse_duration_within(text, MAX_OUTAGE).map(Some),
                })?,
            no_wait: from.switch("no-wait", cli.no_wait)?,
            drain: from.switch("drain", cli.drain)?,
            delivery: from.text("delivery", cli.delivery).one_of(&[
                ("exactly-once", Delivery::ExactlyOnce),
                ("at-least-once", Delivery::AtLeastOnce),
            ])?,
            hold_back: from
                .text("hold-back", cli.hold_back)
                .parse(|text| parse_duration_within(text, HOLD_BACK))?,
            log: LogConfig {
                level: from.text("logging", cli.logging).one_of(&[
                    ("debug", LevelFilter::Debug),
                    ("info", LevelFilter::Info),
                    ("warn", LevelFilter::Warn),
                    ("error", LevelFilter::Error),
                ])?,
                format: from
                    .text("log-format", cli.log_format)
                    .one_of(&[("text", LogFormat::Text), ("json", LogFormat::Json)])?,
            },
            slot,
            publication,
            warnings,
        })
    }

    /// The settings as the start-up line shows them: names are the flags', secrets are left out.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let list = |items: Vec<String>| Some(items.join(",")).filter(|list| !list.is_empty());
        let on = |on: bool| on.then(|| "true".to_string());
        [
            ("db", Some(redact_conninfo(&self.db))),
            (
                "nats",
                list(self.nats.servers.iter().map(|s| redact_server(s)).collect()),
            ),
            ("creds", path(&self.nats.creds)),
            ("nats-nkey", path(&self.nats.nkey)),
            ("nats-tls-ca", path(&self.nats.tls_ca)),
            ("nats-tls-cert", path(&self.nats.tls_cert)),
            ("nats-tls-key", path(&self.nats.tls_key)),
            ("nats-api-prefix", Some(self.nats.api_prefix.clone())),
            ("prefix", Some(self.prefix.clone())),
            ("slot", Some(self.slot.clone())),
            ("publication", Some(self.publication.clone())),
            (
                "table",
                list(self.tables.iter().map(TableName::to_string).collect()),
            ),
            ("inflight", Some(self.inflight.to_string())),
            ("ack-timeout", Some(format!("{:?}", self.ack_timeout))),
            (
                "max-outage",
                Some(match self.max_outage {
                    Some(longest) => format!("{longest:?}"),
                    None => "never".to_string(),
                }),
            ),
            (
                "delivery",
                Some(
                    match self.delivery {
                        Delivery::ExactlyOnce => "exactly-once",
                        Delivery::AtLeastOnce => "at-least-once",
                    }
                    .to_string(),
                ),
            ),
            ("hold-back", Some(format!("{:?}", self.hold_back))),
            ("drain", on(self.drain)),
            ("no-wait", on(self.no_wait)),
            (
                "logging",
                Some(self.log.level.as_str().to_ascii_lowercase()),
            ),
            (
                "log-format",
                Some(
                    match self.log.format {
                        LogFormat::Text => "text",
                        LogFormat::Json => "json",
                    }
                    .to_string(),
                ),
            ),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }

    /// Logs the start-up line and the warnings.
    pub fn announce(&self) {
        let mut pairs = vec![("version", env!("CARGO_PKG_VERSION").to_string())];
        pairs.extend(self.settings());
        logging::info_with("starting", &pairs);
        for warning in &self.warnings {
            log::warn!("{warning}");
        }
    }

    /// [`Config::settings`] as one line of `key=value`.
    pub fn summary(&self) -> impl fmt::Display {
        let pairs = self.settings().into_iter();
        pairs
            .map(|(name, value)| format!("{name}={}", Logfmt(&value)))
            .collect::<Vec<String>>()
            .join(" ")
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Config {{ {} }}", self.summary())
    }
}

impl fmt::Debug for NatsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<String> = self.servers.iter().map(|s| redact_server(s)).collect();
        write!(
            f,
            "NatsConfig {{ servers: {servers:?}, name: {:?} }}",
            self.name
        )
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
        if let Some(schema) = &self.schema {
            write!(f, "{}.", quoted(schema))?;
        }
        f.write_str(&quoted(&self.name))
    }
}

// ---- where a setting comes from -------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    Flag,
    Environment,
    Default,
}

/// A value with the name to blame for it.
struct Setting {
    flag: &'static str,
    origin: Origin,
    value: String,
}

struct Sources<'a> {
    env: &'a dyn Fn(&str) -> Option<String>,
}

/// The environment variable of a flag.
fn variable(flag: &str) -> String {
    format!(
        "JETSTREAM_OUTBOX_{}",
        flag.to_ascii_uppercase().replace('-', "_")
    )
}

impl Sources<'_> {
    fn from_environment(&self, flag: &'static str) -> Option<Setting> {
        let value = (self.env)(&variable(flag)).filter(|value| !value.is_empty())?;
        Some(Setting {
            flag,
            origin: Origin::Environment,
            value,
        })
    }

    fn text(&self, flag: &'static str, given: Option<String>) -> Setting {
        let given = given.map(|value| Setting {
            flag,
            origin: Origin::Flag,
            value,
        });
        given
            .or_else(|| self.from_environment(flag))
            .unwrap_or_else(|| {
                let default = DEFAULTS.iter().find(|(name, _)| *name == flag);
                Setting {
                    flag,
                    origin: Origin::Default,
                    value: default.map_or("", |(_, value)| value).to_string(),
                }
            })
    }

    fn switch(&self, flag: &'static str, given: bool) -> Result<bool, ConfigError> {
        match self.from_environment(flag) {
            Some(setting) if !given => {
                setting.parse(|text| match text.to_ascii_lowercase().as_str() {
                    "1" | "true" | "yes" | "on" => Ok(true),
                    "0" | "false" | "no" | "off" => Ok(false),
                    _ => Err("is neither true nor false".to_string()),
                })
            }
            _ => Ok(given),
        }
    }

    fn file(
        &self,
        flag: &'static str,
        given: Option<String>,
    ) -> Result<Option<PathBuf>, ConfigError> {
        let setting = self.text(flag, given);
        if setting.value.is_empty() {
            return Ok(None);
        }
        let path = PathBuf::from(&setting.value);
        match check_readable(&path) {
            Ok(()) => Ok(Some(path)),
            Err(source) => Err(ConfigError::File {
                setting: setting.name(),
                path,
                source,
            }),
        }
    }
}

impl Setting {
    /// As the operator spelled it.
    fn name(&self) -> String {
        match self.origin {
            Origin::Environment => variable(self.flag),
            Origin::Flag | Origin::Default => format!("-{}", self.flag),
        }
    }

    /// Turns the text into what it means. The error completes a sentence that begins with the value.
    fn parse<T>(self, read: impl FnOnce(&str) -> Result<T, String>) -> Result<T, ConfigError> {
        read(&self.value).map_err(|reason| ConfigError::Value {
            setting: self.name(),
            value: Some(self.value),
            reason,
        })
    }

    /// As [`Setting::parse`], for a value that the error must not show.
    fn secret<T>(self, read: impl FnOnce(&str) -> Result<T, String>) -> Result<T, ConfigError> {
        read(&self.value).map_err(|reason| ConfigError::Value {
            setting: self.name(),
            value: None,
            reason,
        })
    }

    /// Keeps the text as it is when `check` has nothing against it.
    fn check(self, check: fn(&str) -> Result<(), String>) -> Result<String, ConfigError> {
        self.parse(|text| check(text).map(|()| text.to_string()))
    }

    fn one_of<T: Copy>(self, choices: &[(&str, T)]) -> Result<T, ConfigError> {
        self.parse(
            |text| match choices.iter().find(|(name, _)| *name == text) {
                Some((_, choice)) => Ok(*choice),
                None => {
                    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                    Err(format!("is not one of {}", names.join(", ")))
                }
            },
        )
    }
}

// ---- what a value must look like ------------------------------------------------------------------

fn check_readable(path: &PathBuf) -> io::Result<()> {
    match fs::metadata(path)? {
        about if about.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        // a pipe is not opened: that may wait for its writer, and takes the bytes away from the one who reads it
        about if about.is_file() => File::open(path).map(drop),
        _ => Ok(()),
    }
}

/// Source: `ReplicationSlotValidateName` in Postgres.
fn check_slot(name: &str) -> Result<(), String> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(legal) {
        Ok(())
    } else {
        Err("is not a slot's name: 1 to 63 lower-case letters, digits and underscores".to_string())
    }
}

fn check_publication(name: &str) -> Result<(), String> {
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains('\0') {
        Ok(())
    } else {
        Err("is not a publication's name: 1 to 63 bytes".to_string())
    }
}

/// The subject of `-prefix` and `-nats-api-prefix`: tokens between dots, none of them empty or a wildcard.
fn check_subject(subject: &str) -> Result<(), String> {
    let legal = |c: char| !c.is_whitespace() && !c.is_control() && c != '*' && c != '>';
    if subject.split('.').any(str::is_empty) {
        Err("has an empty part: it is one or more words with a dot between them".to_string())
    } else if !subject.chars().all(legal) {
        Err("holds white space, a control character or a wildcard".to_string())
    } else {
        Ok(())
    }
}

fn parse_inflight(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| INFLIGHT.contains(n));
    number.ok_or_else(|| {
        let (least, most) = INFLIGHT.into_inner();
        format!("is not a whole number from {least} to {most}")
    })
}

/// Splits the comma list and checks each server's form. Errors count servers, since a server may hold a password.
fn parse_servers(list: &str) -> Result<Vec<String>, String> {
    let check = |(index, server): (usize, &str)| {
        let server = server.trim();
        let fail = |reason: &str| Err(format!("server {} {reason}", index + 1));
        let rest = match server.split_once("://") {
            Some(("nats" | "tls", rest)) => rest,
            Some(_) => return fail("has a scheme that is neither nats nor tls"),
            None => server,
        };
        let authority = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (host, port) = match authority
            .strip_prefix('[')
            .and_then(|v6| v6.split_once(']'))
        {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, port.strip_prefix(':').or(Some(""))),
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let strange = |c: char| c.is_whitespace() || c.is_control() || "/?#@[]".contains(c);
        if host.is_empty() || host.contains(strange) {
            return fail(
                "has no legal host name (in a password, write / as %2F, ? as %3F, # as %23)",
            );
        }
        if port.is_some_and(|port| !port.parse().is_ok_and(|port: u16| port > 0)) {
            return fail(
                "has a port that is not a number from 1 to 65535 (an IPv6 address is written [::1], a comma in a password %2C)",
            );
        }
        Ok(server.to_string())
    };
    list.split(',').enumerate().map(check).collect()
}

/// Go's duration syntax (`1h30m`, `1.5s`, `500ms`), and a plain number for seconds. Never negative.
fn parse_duration(text: &str) -> Option<Duration> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return parse_duration(&format!("{text}s"));
    }
    let mut total: u128 = 0;
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at_checked(number_end)?;
        let unit_end = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(unit_end)?;
        rest = tail;
        let unit_ns: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let digits = |text: &str| match text {
            "" => Some(0),
            text => text.parse::<u64>().ok().map(u128::from),
        };
        total += digits(whole)? * unit_ns;
        total += digits(fraction)? * unit_ns / 10u128.checked_pow(fraction.len() as u32)?;
    }
    u64::try_from(total).ok().map(Duration::from_nanos)
}

fn parse_duration_within(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    let Some(duration) = parse_duration(text) else {
        return Err("is not a duration like 500ms, 10s, 1h30m or a number of seconds".to_string());
    };
    if range.contains(&duration) {
        Ok(duration)
    } else if duration < *range.start() {
        Err(format!("is less than {:?}", range.start()))
    } else {
        Err(format!("is more than {:?}", range.end()))
    }
}

/// Table names as SQL spells them, separated by commas: `outbox, shop."Outbox"`.
fn parse_tables(list: &str) -> Result<Vec<TableName>, String> {
    let mut tables = Vec::new();
    let mut rest = list.trim_start();
    while !rest.is_empty() {
        let (first, tail) = identifier(rest)?;
        let (table, tail) = match tail.strip_prefix('.') {
            None => (
                TableName {
                    schema: None,
                    name: first,
                },
                tail,
            ),
            Some(tail) => {
                let (name, tail) = identifier(tail.trim_start())?;
                (
                    TableName {
                        schema: Some(first),
                        name,
                    },
                    tail,
                )
            }
        };
        tables.push(table);
        rest = match tail.strip_prefix(',') {
            Some(tail) if !tail.trim_start().is_empty() => tail.trim_start(),
            None if tail.is_empty() => tail,
            _ => {
                return Err(
                    "is not a list of tables like outbox, shop.outbox or \"My Schema\".\"Outbox\""
                        .to_string(),
                );
            }
        };
    }
    Ok(tables)
}

/// Takes one SQL identifier and the blanks behind it off the front. Unquoted ones fold to lower case.
///
/// Source: <https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS>.
fn identifier(text: &str) -> Result<(String, &str), String> {
    let (name, rest) = match text.strip_prefix('"') {
        Some(quoted) => {
            let mut name = String::new();
            let mut rest = quoted;
            loop {
                let (part, tail) = rest
                    .split_once('"')
                    .ok_or("has a double quote that is not closed")?;
                name.push_str(part);
                match tail.strip_prefix('"') {
                    Some(tail) => {
                        name.push('"');
                        rest = tail;
                    }
                    None => break (name, tail),
                }
            }
        }
        None => {
            let legal =
                |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
            let end = text.find(|c| !legal(c)).unwrap_or(text.len());
            let (name, rest) = text.split_at_checked(end).unwrap_or((text, ""));
            if name.starts_with(|c: char| c.is_ascii_digit() || c == '$') {
                return Err(format!("has the name {name}, which needs double quotes"));
            }
            (name.to_ascii_lowercase(), rest)
        }
    };
    if name.is_empty() {
        return Err("has an empty name, or a character that needs double quotes".to_string());
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(format!("has a name of over {MAX_NAME_BYTES} bytes"));
    }
    Ok((name, rest.trim_start()))
}

// ---- what may be shown ----------------------------------------------------------------------------

fn libpq_names_a_database(env: &dyn Fn(&str) -> Option<String>) -> bool {
    [
        "PGHOST",
        "PGHOSTADDR",
        "PGPORT",
        "PGDATABASE",
        "PGUSER",
        "PGSERVICE",
    ]
    .iter()
    .any(|name| env(name).is_some_and(|value| !value.is_empty()))
}

/// Whether a password, or the key to one, stands in the connection string. In doubt it does.
fn conninfo_has_password(conninfo: &str) -> bool {
    let userinfo = conninfo
        .split_once("://")
        .and_then(|(_, rest)| rest.rsplit_once('@'))
        .map_or("", |(userinfo, _)| userinfo);
    userinfo.contains(':') || conninfo.to_ascii_lowercase().contains("password")
}

/// `user@host/dbname`; [`HIDDEN`] where it cannot be told for certain what is a password.
fn redact_conninfo(conninfo: &str) -> String {
    if conninfo.is_empty() {
        return "environment".to_string();
    }
    let (user, host, dbname) = match conninfo.split_once("://") {
        Some((_, rest)) => {
            let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
            if tail.contains('@') {
                return HIDDEN.to_string();
            }
            let (userinfo, host) = authority.rsplit_once('@').unwrap_or(("", authority));
            let path = tail.split('?').next().unwrap_or_default();
            (
                userinfo.split(':').next().unwrap_or_default(),
                host,
                path.trim_start_matches('/'),
            )
        }
        None => {
            let words = || conninfo.split_ascii_whitespace();
            if conninfo.contains(['\'', '\\']) || !words().all(|word| word.contains('=')) {
                return HIDDEN.to_string();
            }
            let value = |name: &str| {
                words()
                    .filter_map(|word| word.split_once('='))
                    .find(|(key, _)| *key == name)
                    .map_or("", |(_, value)| value)
            };
            (value("user"), value("host"), value("dbname"))
        }
    };
    let at = if user.is_empty() { "" } else { "@" };
    format!("{user}{at}{host}/{dbname}")
}

/// The server without its user, password or token.
fn redact_server(server: &str) -> String {
    match (server.split_once("://"), server.rsplit_once('@')) {
        (_, None) => server.to_string(),
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{HIDDEN}@{host}"),
        (None, Some((_, host))) => format!("{HIDDEN}@{host}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Invocation};
    use argh::ArgsInfo;
    use std::ffi::OsString;

    /// Loads from arguments and from `NAME=value` variables.
    fn load(args: &[&str], env: &[&str]) -> Result<Config, ConfigError> {
        let Ok(Invocation::Relay(cli)) = cli::parse(args.iter().map(OsString::from)) else {
            panic!("{args:?} do not parse");
        };
        let pairs: Vec<(&str, &str)> = env.iter().filter_map(|v| v.split_once('=')).collect();
        assert_eq!(pairs.len(), env.len());
        Config::load(*cli, &|name| {
            let (_, value) = pairs.iter().find(|(key, _)| *key == name)?;
            Some(value.to_string())
        })
    }

    /// Loads with a database and these arguments.
    fn with(args: &[&str]) -> Result<Config, ConfigError> {
        load(&[&["-db", "host=h"], args].concat(), &[])
    }

    fn setting(config: &Config, name: &str) -> Option<String> {
        let mut settings = config.settings().into_iter();
        settings.find(|(key, _)| *key == name).map(|(_, v)| v)
    }

    #[test]
    fn defaults_are_what_the_help_says() {
        for (name, default) in DEFAULTS {
            let flags = Cli::get_args_info().flags.iter();
            let help: Vec<&str> = flags
                .filter(|flag| flag.long == format!("--{name}"))
                .map(|flag| flag.description)
                .collect();
            assert_eq!(help.len(), 1, "{name}");
            assert!(help[0].ends_with(&format!("(default {default})")), "{name}");
        }
        assert_eq!(
            with(&[]).unwrap().summary().to_string(),
            "db=h/ nats=localhost nats-api-prefix=$JS.API prefix=events slot=jetstream_outbox \
             publication=jetstream_outbox inflight=1024 ack-timeout=5s max-outage=never \
             delivery=exactly-once hold-back=150s logging=info log-format=text"
        );
    }

    #[test]
    fn every_flag_beats_its_variable_which_beats_the_default() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = file.path().to_str().unwrap();
        for (flag, variable, first, second) in [
            ("db", "DB", "host=a", "host=b"),
            ("nats", "NATS", "a", "b:4222"),
            ("creds", "CREDS", file, "/dev/null"),
            ("nats-nkey", "NATS_NKEY", file, "/dev/null"),
            ("nats-tls-ca", "NATS_TLS_CA", file, "/dev/null"),
            ("nats-api-prefix", "NATS_API_PREFIX", "$JS.a.API", "x"),
            ("prefix", "PREFIX", "a", "b.c"),
            ("slot", "SLOT", "a", "b"),
            ("publication", "PUBLICATION", "a", "b"),
            ("table", "TABLE", "\"a\"", "\"b\""),
            ("inflight", "INFLIGHT", "1", "65536"),
            ("ack-timeout", "ACK_TIMEOUT", "1s", "2s"),
            ("max-outage", "MAX_OUTAGE", "60s", "never"),
            ("delivery", "DELIVERY", "at-least-once", "exactly-once"),
            ("hold-back", "HOLD_BACK", "0ns", "60s"),
            ("logging", "LOGGING", "debug", "error"),
            ("log-format", "LOG_FORMAT", "json", "text"),
        ] {
            let variable = format!("JETSTREAM_OUTBOX_{variable}={first}");
            let shown = |value: &str| match flag {
                "db" => value.replace("host=", "") + "/",
                _ => value.to_string(),
            };
            let check = |args: &[&str], env: &[&str], expect: &str| {
                let config = load(args, env).unwrap();
                assert_eq!(setting(&config, flag), Some(shown(expect)), "{args:?}");
            };
            let env = [variable.as_str(), "PGHOST=h"];
            check(&[], &env, first);
            check(&[&format!("-{flag}={second}")], &env, second);
        }
        for flag in Cli::get_args_info().flags {
            let name = flag.long.trim_start_matches('-');
            let covered = DEFAULTS.iter().any(|(known, _)| *known == name)
                || ["db", "creds", "nats-nkey", "publication", "table"].contains(&name)
                || name.starts_with("nats-tls-")
                || ["drain", "no-wait", "version", "help"].contains(&name);
            assert!(covered, "{name} is a new flag: add it to the table above");
        }
    }

    #[test]
    fn a_pair_of_files_can_come_from_both_sides() {
        let config = load(
            &["-nats-tls-cert=/dev/null", "-creds="],
            &[
                "PGSERVICE=s",
                "JETSTREAM_OUTBOX_NATS_TLS_KEY=/dev/null",
                "JETSTREAM_OUTBOX_NATS_NKEY=",
            ],
        )
        .unwrap();
        assert!(config.nats.tls_cert.is_some() && config.nats.tls_key.is_some());
        assert!(config.nats.creds.is_none() && config.nats.nkey.is_none());
    }

    #[test]
    fn switches_from_the_environment() {
        for (value, expect) in [
            ("1", Some(true)),
            ("true", Some(true)),
            ("YES", Some(true)),
            ("on", Some(true)),
            ("0", Some(false)),
            ("False", Some(false)),
            ("no", Some(false)),
            ("off", Some(false)),
            ("", Some(false)),
            ("2", None),
            ("y", None),
        ] {
            let variable = format!("JETSTREAM_OUTBOX_DRAIN={value}");
            let env = ["PGHOST=h", &variable];
            assert_eq!(load(&[], &env).ok().map(|c| c.drain), expect, "{value:?}");
            assert!(load(&["-drain"], &env).unwrap().drain, "{value:?}");
        }
        assert!(with(&["-no-wait"]).unwrap().no_wait);
    }

    #[test]
    fn a_database_must_be_named_somewhere() {
        for (args, env, expect) in [
            (&[][..], &[][..], None),
            (&[], &["PGHOST="], None),
            (&[], &["PGPASSWORD=x"], None),
            (&[], &["JETSTREAM_OUTBOX_DB="], None),
            (&["-db="], &[], Some("")),
            (&[], &["PGHOST=h"], Some("")),
            (&[], &["PGSERVICE=s"], Some("")),
            (&[], &["JETSTREAM_OUTBOX_DB=host=x"], Some("host=x")),
        ] {
            let db = load(args, env).ok().map(|config| config.db);
            assert_eq!(db.as_deref(), expect, "{args:?} {env:?}");
        }
        let error = load(&[], &[]).unwrap_err();
        assert!(error.remedy().contains("-db") && error.exit() == Exit::Usage);
    }

    #[test]
    fn wrong_values_are_named_with_their_flag() {
        let long = "x".repeat(64);
        for (flag, value, reason) in [
            ("slot", "", "lower-case letters"),
            ("slot", "Outbox", "lower-case letters"),
            ("slot", "a-b", "lower-case letters"),
            ("slot", &long, "lower-case letters"),
            ("publication", "", "63 bytes"),
            ("publication", &long, "63 bytes"),
            ("prefix", "", "empty part"),
            ("prefix", "a..b", "empty part"),
            ("prefix", "a.", "empty part"),
            ("prefix", "a b", "white space"),
            ("prefix", "a.>", "wildcard"),
            ("prefix", "*", "wildcard"),
            ("nats-api-prefix", "$JS.API.", "empty part"),
            ("nats-api-prefix", "$JS.*.API", "wildcard"),
            ("inflight", "0", "from 1 to 65536"),
            ("inflight", "65537", "from 1 to 65536"),
            ("inflight", "-1", "from 1 to 65536"),
            ("inflight", "1k", "from 1 to 65536"),
            ("ack-timeout", "99ms", "less than 100ms"),
            ("ack-timeout", "61m", "more than 3600s"),
            ("ack-timeout", "5 s", "not a duration"),
            ("max-outage", "0", "less than 1s"),
            ("max-outage", "always", "not a duration"),
            ("hold-back", "25h", "more than 86400s"),
            ("hold-back", "-1s", "not a duration"),
            ("delivery", "at-most-once", "exactly-once, at-least-once"),
            ("logging", "trace", "debug, info, warn, error"),
            ("log-format", "xml", "text, json"),
            ("table", "a..b", "empty name"),
            ("table", "a b", "list of tables"),
            ("table", "a,", "list of tables"),
            ("table", "a.b.c", "list of tables"),
            ("table", "1a", "double quotes"),
            ("table", "a-b", "list of tables"),
            ("table", "\"a", "not closed"),
            ("table", "\"\"", "empty name"),
            ("table", &long, "63 bytes"),
        ] {
            let argument = format!("-{flag}={value}");
            let Err(error) = with(&[&argument]) else {
                panic!("{argument} must be refused");
            };
            let message = error.to_string();
            let begin = format!("read -{flag}: {value:?} ");
            assert!(message.starts_with(&begin), "{message}");
            assert!(message.contains(reason), "{argument}: {message}");
            assert_eq!(error.exit(), Exit::Usage);

            let variable = variable(flag);
            let given = format!("{variable}={value}");
            if let Err(error) = load(&[], &["PGHOST=h", &given]) {
                assert!(error.to_string().contains(&variable), "{error}");
            } else {
                assert_eq!(value, "", "{given} must be refused");
            }
        }
    }

    #[test]
    fn files_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        for flag in ["creds", "nats-nkey", "nats-tls-ca", "nats-tls-cert"] {
            for path in ["/nonexistent/file", folder.path().to_str().unwrap()] {
                let error = with(&[&format!("-{flag}"), path]).unwrap_err();
                let message = error.to_string();
                assert!(message.contains(path) && message.contains(flag), "{error}");
                assert_eq!(error.exit(), Exit::Configuration);
            }
        }
    }

    #[test]
    fn what_excludes_or_needs_another_is_refused() {
        for args in [
            &["-creds=/dev/null", "-nats-nkey=/dev/null"][..],
            &["-nats-tls-cert=/dev/null"],
            &["-nats-tls-key=/dev/null"],
        ] {
            let error = with(args).unwrap_err();
            assert!(matches!(error, ConfigError::Together(_)), "{error}");
        }
    }

    #[test]
    fn durations() {
        let ms = |ms| Some(Duration::from_millis(ms));
        for (text, expect) in [
            ("10s", ms(10_000)),
            ("2m", ms(120_000)),
            ("500ms", ms(500)),
            ("1h30m", ms(5_400_000)),
            ("1.5h", ms(5_400_000)),
            ("1h15m30.918s", ms(4_530_918)),
            (".5s", ms(500)),
            ("1.s", ms(1000)),
            ("+5s", ms(5000)),
            ("0", ms(0)),
            ("7", ms(7000)),
            ("2.5", ms(2500)),
            ("1us", Some(Duration::from_micros(1))),
            ("1µs", Some(Duration::from_micros(1))),
            ("1μs", Some(Duration::from_micros(1))),
            ("1ns", Some(Duration::from_nanos(1))),
            ("", None),
            ("s", None),
            (".", None),
            (".s", None),
            ("1.2.3s", None),
            ("-1s", None),
            ("+", None),
            ("1d", None),
            ("1s ", None),
            ("1S", None),
            ("1h30", None),
            ("99999999999999999999s", None),
            ("9999999999h", None),
            (
                "0.00000000000000000000000000000000000000000000000001s",
                None,
            ),
        ] {
            assert_eq!(parse_duration(text), expect, "{text:?}");
        }
    }

    #[test]
    fn tables_are_read_as_sql_reads_them() {
        let name = |schema: Option<&str>, name: &str| TableName {
            schema: schema.map(str::to_string),
            name: name.to_string(),
        };
        for (list, expect) in [
            ("", vec![]),
            ("outbox", vec![name(None, "outbox")]),
            ("Shop.OutBox", vec![name(Some("shop"), "outbox")]),
            (" a , b . c ", vec![name(None, "a"), name(Some("b"), "c")]),
            (
                "\"My Schema\".\"t,\"\".x\"",
                vec![name(Some("My Schema"), "t,\".x")],
            ),
            ("Ärger$1", vec![name(None, "Ärger$1")]),
        ] {
            let found = parse_tables(list).unwrap();
            assert_eq!(found, expect, "{list:?}");
            let shown: Vec<String> = found.iter().map(TableName::to_string).collect();
            assert_eq!(parse_tables(&shown.join(",")).unwrap(), expect, "{list:?}");
        }
        let config = with(&["-table", "a,b", "-table", "c.\"D\""]).unwrap();
        assert_eq!(setting(&config, "table").unwrap(), r#""a","b","c"."D""#);
    }

    #[test]
    fn nats_servers() {
        for (list, expect) in [
            ("localhost", Some("localhost")),
            ("h:4222,nats://h2", Some("h:4222,nats://h2")),
            (" a , tls://b:1/ ", Some("a,tls://b:1/")),
            ("[::1]", Some("[::1]")),
            ("nats://[::1]:4222", Some("nats://[::1]:4222")),
            ("nats://u:sekret@h:1", Some("nats://***@h:1")),
            ("sekret@h", Some("***@h")),
            ("nats://u:se@kret@h", Some("nats://***@h")),
            ("", None),
            ("a,,b", None),
            ("http://h", None),
            ("h:", None),
            ("h:0", None),
            ("h:65536", None),
            ("::1", None),
            ("[::1", None),
            ("[::1]4222", None),
            ("nats://", None),
            ("nats://sekret@", None),
            ("nats://u:se,kret@h", None),
            ("nats://u:se/kret", None),
            ("h/sekret", None),
            ("a b", None),
        ] {
            let loaded = with(&["-nats", list]);
            let shown = match &loaded {
                Ok(config) => config.summary().to_string() + &format!("{:?}", config.nats),
                Err(error) => format!("{error} {error:?} {}", error.remedy()),
            };
            assert!(!shown.contains("kret"), "{list:?}: {shown}");
            let found = loaded.ok().and_then(|config| setting(&config, "nats"));
            assert_eq!(found.as_deref(), expect, "{list:?}");
        }
    }

    #[test]
    fn connection_strings_are_shown_without_secrets() {
        for (conninfo, expect) in [
            ("", "environment"),
            ("postgres://u:sekret@h/d?replication=database", "u@h/d"),
            ("postgresql://u@h:5433/d", "u@h:5433/d"),
            ("postgres://h1,h2:2/d", "h1,h2:2/d"),
            ("postgres:///d?password=sekret&host=h", "/d"),
            ("postgres://u:se@kret@h/d", "u@h/d"),
            ("postgres://u:se/kret@h/d", HIDDEN),
            ("postgres://h/d?password=se@kret", HIDDEN),
            ("postgres://u:p?sekret@h/d", HIDDEN),
            ("host=h user=u dbname=d password=sekret", "u@h/d"),
            ("host=h password='se kret user=sekret'", HIDDEN),
            ("host=h password = sekret", HIDDEN),
            ("host=h password=a\\ user=sekret", HIDDEN),
            ("sekret", HIDDEN),
        ] {
            let config = load(&["-db", conninfo], &[]).unwrap();
            assert_eq!(setting(&config, "db").unwrap(), expect, "{conninfo:?}");
            assert!(!format!("{config:?}").contains("kret"), "{conninfo:?}");
            assert_eq!(config.db, conninfo);
        }
    }

    #[test]
    fn a_secret_among_the_arguments_is_warned_of_once() {
        let db = "postgres://u:sekret@h/d";
        for (args, env, variables) in [
            (&["-db", db][..], &[][..], &["_DB"][..]),
            (&["-db", "host=h password=x"], &[], &["_DB"]),
            (&["-db", "postgres://h/d?sslpassword=x"], &[], &["_DB"]),
            (&["-db", db, "-nats", "t@h"], &[], &["_DB", "_NATS"]),
            (&["-db", "postgres://u@h/d", "-nats=h"], &[], &[]),
            (
                &[],
                &[
                    "JETSTREAM_OUTBOX_DB=postgres://u:sekret@h/d",
                    "JETSTREAM_OUTBOX_NATS=t@h",
                ],
                &[],
            ),
        ] {
            let warnings = load(args, env).unwrap().warnings;
            assert_eq!(warnings.len(), variables.len(), "{args:?}");
            for (warning, variable) in warnings.iter().zip(variables) {
                let variable = format!("JETSTREAM_OUTBOX{variable},");
                assert!(warning.contains(&variable), "{warning}");
                assert!(!warning.contains("sekret"), "{warning}");
            }
        }
    }
}
