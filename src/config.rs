//! The one [`Config`]: flags, environment and defaults put together and validated once, at the start.
//!
//! A flag is a field of [`Cli`], which has its help, and a line of [`Config::load`] or of one of its parts, which has its default
//! and what it may be. A flag beats its environment variable (`-ack-timeout` is `JETSTREAM_OUTBOX_ACK_TIMEOUT`), which beats the
//! default. Nothing here talks to a server: what only a server can refuse is the relay's to report. No message,
//! `Debug` or summary shows a password or a token.

use crate::cli::{Cli, PROGRAM};
use crate::exit::Exit;
use crate::jetstream::Delivery;
use crate::jetstream::preflight::Wanted;
use crate::logging::{self, LogConfig, LogFormat, Logfmt};
use crate::nats::options::{OWN_API, Options, parse_servers};
use crate::outbox::flags::Flags;
use crate::outbox::header::is_schedule;
use crate::outbox::mapping::{Mapping, TableMapping};
use crate::outbox::park::{OnBad, OnPoison, Policy};
use crate::outbox::subject::validate_prefix;
use crate::outbox::template::{self, TemplateError};
use crate::postgres::ConnInfo;
use argh::ArgsInfo;
use log::LevelFilter;
use source::{Origin, Setting, Sources, read_secret, variable};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use value::{
    ACK_TIMEOUT, CONNECT_TIMEOUT, HOLD_BACK, MAX_OUTAGE, check_column, check_publication,
    check_slot, check_source, check_subject, parse_bucket, parse_duration_within, parse_headers,
    parse_inflight, parse_listen, parse_tables,
};

#[cfg(feature = "admin")]
pub mod operation;
mod source;
mod value;

/// What the relay works by.
pub struct Config {
    /// How to reach Postgres.
    pub db: ConnInfo,
    /// Somebody has said where Postgres is; if not, `db` leads nowhere.
    pub database_is_named: bool,
    /// How to reach NATS.
    pub nats: Options,
    /// First part of every subject; one or more legal tokens.
    pub prefix: String,
    /// The replication slot; letters, digits and underscores, so it needs no quotes.
    pub slot: String,
    /// The publication, as it is stored in `pg_publication`: quote it where it becomes SQL.
    pub publication: String,
    /// Which rows and messages become events, and how.
    pub mapping: Mapping,
    /// The last event of a transaction in each stream says so.
    pub transaction_headers: bool,
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
    /// The key-value bucket of the checkpoint.
    pub checkpoint: String,
    /// Events that were lost, here or there, are accepted as lost.
    pub resume_anyway: bool,
    /// A tail of another Postgres system is no reason to halt.
    pub accept_new_system: bool,
    /// Where metrics, health and the status page are served, all under one port; none: nowhere.
    pub listen: Vec<SocketAddr>,
    /// What is logged, and how.
    pub log: LogConfig,
    /// What an operator should be told once at the start.
    pub warnings: Vec<String>,
    /// What was given and what is the default, by flag, in the order of the help; secrets are left out.
    pub settings: Vec<(&'static str, String)>,
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
    /// The flags that make events.
    pub fn flags(&self) -> Flags {
        self.mapping.flags(&self.publication)
    }

    /// What the streams have to be fit for.
    pub fn wanted(&self) -> Wanted {
        Wanted {
            delivery: self.delivery,
            lifetimes: self.mapping.has_header("Nats-TTL"),
        }
    }

    /// For everybody who connects to Postgres: `db` is the operator's.
    ///
    /// # Errors
    /// [`ConfigError::NoDatabase`].
    pub fn require_database(&self) -> Result<(), ConfigError> {
        match self.database_is_named {
            true => Ok(()),
            false => Err(ConfigError::NoDatabase),
        }
    }

    /// Puts flags, environment and defaults together. `env` looks a variable up.
    pub fn load(cli: &Cli, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let from = Sources::new(env);
        let mut warnings = Vec::new();
        let (db, database_is_named) = database(&from, cli, &mut warnings)?;
        let slot = from
            .text("slot", &cli.slot, "jetstream_outbox")
            .check(check_slot)?;
        let nats = nats(&from, cli, &slot, &mut warnings)?;
        let prefix = from
            .text("prefix", &cli.prefix, "events")
            .check(|prefix| validate_prefix(prefix).map_err(|error| error.to_string()))?;
        let delivery = from
            .text("delivery", &cli.delivery, "exactly-once")
            .one_of(&[Delivery::ExactlyOnce, Delivery::AtLeastOnce])?;
        let transaction_headers = from.switch("transaction-headers", cli.transaction_headers)?;
        if transaction_headers && delivery == Delivery::AtLeastOnce {
            return Err(ConfigError::Together(
                "-transaction-headers needs -delivery exactly-once: without it an event can come again after the mark",
            ));
        }
        Ok(Config {
            publication: from
                .text("publication", &cli.publication, &slot)
                .check(check_publication)?,
            mapping: mapping(&from, cli, &prefix, &slot, delivery)?,
            transaction_headers,
            inflight: from
                .text("inflight", &cli.inflight, "3072")
                .parse(parse_inflight)?,
            ack_timeout: from
                .text("ack-timeout", &cli.ack_timeout, "5s")
                .parse(|text| parse_duration_within(text, ACK_TIMEOUT))?,
            max_outage: from.text("max-outage", &cli.max_outage, "never").parse(
                |text| match text {
                    "never" => Ok(None),
                    text => parse_duration_within(text, MAX_OUTAGE).map(Some),
                },
            )?,
            no_wait: from.switch("no-wait", cli.no_wait)?,
            drain: from.switch("drain", cli.drain)?,
            hold_back: from
                .text("hold-back", &cli.hold_back, "150s")
                .parse(|text| parse_duration_within(text, HOLD_BACK))?,
            checkpoint: from
                .text("checkpoint", &cli.checkpoint, "jetstream_outbox")
                .parse(parse_bucket)?,
            resume_anyway: from.switch("resume-anyway", cli.resume_anyway)?,
            accept_new_system: from.switch("accept-new-system", cli.accept_new_system)?,
            listen: match from.text("listen", &cli.listen, "") {
                given if given.value.is_empty() => Vec::new(),
                given => given.parse(parse_listen)?,
            },
            log: log_config(&from, cli)?,
            db,
            database_is_named,
            nats,
            prefix,
            slot,
            delivery,
            warnings,
            settings: in_order_of_the_help(from.into_shown()),
        })
    }

    /// Logs the start-up line and the warnings.
    pub fn announce(&self) {
        let mut pairs = vec![("version", env!("CARGO_PKG_VERSION").to_string())];
        pairs.extend(self.settings.iter().cloned());
        logging::info_with("starting", &pairs);
        for warning in &self.warnings {
            log::warn!("{warning}");
        }
    }

    /// [`Config::settings`] as one line of `key=value`.
    fn summary(&self) -> String {
        let pairs = self.settings.iter();
        pairs
            .map(|(name, value)| format!("{name}={}", Logfmt(value)))
            .collect::<Vec<String>>()
            .join(" ")
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Config {{ {} }}", self.summary())
    }
}

/// A warning of each of these names that looks like the variable of a flag and is none.
pub fn unknown_variables(names: impl Iterator<Item = String>) -> Vec<String> {
    let flags = Cli::get_args_info().flags.iter();
    let known: Vec<String> = flags
        .map(|flag| variable(flag.long.trim_start_matches('-')))
        .collect();
    let is_unknown = |name: &String| name.starts_with(&variable("")) && !known.contains(name);
    names
        .filter(is_unknown)
        .map(|name| format!("{name} is the variable of no flag, and ignored"))
        .collect()
}

fn in_order_of_the_help(mut shown: Vec<(&'static str, String)>) -> Vec<(&'static str, String)> {
    let flags = Cli::get_args_info().flags;
    let place = |name: &str| {
        let name = format!("--{name}");
        flags.iter().position(|flag| flag.long == name)
    };
    shown.sort_by_key(|(name, _)| place(name));
    shown
}

fn exposed(flag: &'static str) -> String {
    format!(
        "the secret in -{flag} can be read by every user of this machine with ps: pass it as {}, or in a file",
        variable(flag)
    )
}

/// How to reach Postgres, and whether anybody has said so; if not, it leads nowhere.
fn database(
    from: &Sources<'_>,
    cli: &Cli,
    warnings: &mut Vec<String>,
) -> Result<(ConnInfo, bool), ConfigError> {
    let (given, file) = connection_string(from, cli, warnings)?;
    let is_on_command_line = given.origin == Origin::Flag;
    if given.origin == Origin::Default && !libpq_names_a_database(from) {
        // nobody connects to it
        let nobody = ConnInfo::parse("user=nobody", &|_| None).expect("it is one");
        return Ok((nobody, false));
    }
    let env = |name: &str| from.variable(name);
    let db = given.secret(|text| ConnInfo::parse(text, &env).map_err(|error| error.to_string()))?;
    if is_on_command_line && db.has_password_inline() {
        warnings.push(exposed("db"));
    }
    from.show("db", &db.to_string());
    Ok((file.into_iter().fold(db, ConnInfo::from_file), true))
}

/// `-db`, or what stands in the file of `-db-file`, with a warning of that file, and its path.
fn connection_string(
    from: &Sources<'_>,
    cli: &Cli,
    warnings: &mut Vec<String>,
) -> Result<(Setting, Option<PathBuf>), ConfigError> {
    if cli.db.is_some() && cli.db_file.is_some() {
        return Err(ConfigError::Together(
            "-db and -db-file are two ways to name the database; give one of them",
        ));
    }
    let beats_the_file =
        cli.db.is_some() || cli.db_file.is_none() && from.environment("db").is_some();
    let file = match beats_the_file {
        true => None,
        false => from.credential("db-file", &cli.db_file, "db")?,
    };
    let Some(path) = file else {
        return Ok((from.secret("db", cli.db.as_ref(), ""), None));
    };
    let (value, open) = read_secret(&path).map_err(|source| ConfigError::File {
        setting: "-db-file".to_string(),
        path: path.clone(),
        source,
    })?;
    warnings.extend(open);
    let setting = Setting {
        flag: "db-file",
        origin: Origin::File,
        value,
    };
    if setting.value.is_empty() {
        return setting.secret(|_| Err(format!("{} is empty", path.display())));
    }
    Ok((setting, Some(path)))
}

/// How to reach NATS.
fn nats(
    from: &Sources<'_>,
    cli: &Cli,
    slot: &str,
    warnings: &mut Vec<String>,
) -> Result<Options, ConfigError> {
    let given = from.secret("nats", cli.nats.as_ref(), "localhost");
    let is_on_command_line = given.origin == Origin::Flag;
    let servers = given.secret(|text| parse_servers(text).map_err(|error| error.to_string()))?;
    let shown: Vec<String> = servers.iter().map(|server| format!("{server:?}")).collect();
    from.show("nats", &shown.join(","));
    let signs_in = servers.iter().any(|server| server.auth.is_some());
    if is_on_command_line && signs_in {
        warnings.push(exposed("nats"));
    }
    let creds = from.credential("creds", &cli.creds, "creds")?;
    let nkey = from.credential("nats-nkey", &cli.nats_nkey, "nkey")?;
    if creds.is_some() && nkey.is_some() {
        return Err(ConfigError::Together(
            "-creds and -nats-nkey are two ways to sign in; give one of them",
        ));
    }
    if (creds.is_some() || nkey.is_some()) && signs_in {
        return Err(ConfigError::Together(
            "a user or token in the URL of -nats, and -creds or -nats-nkey, are two ways to sign in; give one of them",
        ));
    }
    let tls_cert = from.file("nats-tls-cert", &cli.nats_tls_cert)?;
    let tls_key = from.file("nats-tls-key", &cli.nats_tls_key)?;
    if tls_cert.is_some() != tls_key.is_some() {
        return Err(ConfigError::Together(
            "-nats-tls-cert and -nats-tls-key are used together; one of them is missing",
        ));
    }
    Ok(Options {
        servers,
        creds,
        nkey,
        tls_ca: from.file("nats-tls-ca", &cli.nats_tls_ca)?,
        tls_cert,
        tls_key,
        tls_first: from.switch("nats-tls-first", cli.nats_tls_first)?,
        connect_timeout: from
            .text("nats-connect-timeout", &cli.nats_connect_timeout, "5s")
            .parse(|text| parse_duration_within(text, CONNECT_TIMEOUT))?,
        api_prefix: from
            .text("nats-api-prefix", &cli.nats_api_prefix, OWN_API)
            .check(check_subject)?,
        name: format!("{PROGRAM} {slot}"),
        ..Options::default()
    })
}

/// Which rows and messages become events, and how.
fn mapping(
    from: &Sources<'_>,
    cli: &Cli,
    prefix: &str,
    slot: &str,
    delivery: Delivery,
) -> Result<Mapping, ConfigError> {
    let columns = columns(from, cli)?;
    let messages = !from.switch("no-messages", cli.no_messages)?;
    let message_prefix = from
        .text("message-prefix", &cli.message_prefix, slot)
        .check(|prefix| match prefix {
            "" => Err("is empty".to_string()),
            _ => Ok(()),
        })?;
    let mapping = Mapping {
        prefix: prefix.to_string(),
        tables: from
            .list("table", &cli.table)
            .parse(|text| parse_tables(text, &columns))?,
        default: columns,
        message_prefix: messages.then_some(message_prefix),
        cloudevents: from
            .text("cloudevents", &cli.cloudevents, "")
            .optional(check_source)?,
        position_headers: from.switch("position-headers", cli.position_headers)?,
        policy: policy(from, cli, slot)?,
    };
    if delivery == Delivery::ExactlyOnce && mapping.header_names().any(is_schedule) {
        return Err(ConfigError::Together(
            "a header Nats-Schedule… makes the server store copies that bear the event's position, by which -delivery \
             exactly-once resumes; use -delivery at-least-once for them",
        ));
    }
    Ok(mapping)
}

/// Which columns of a table make an event.
fn columns(from: &Sources<'_>, cli: &Cli) -> Result<TableMapping, ConfigError> {
    Ok(TableMapping {
        id: from
            .text("id-column", &cli.id_column, "id")
            .check(check_column)?,
        aggregatetype: from
            .text(
                "aggregatetype-column",
                &cli.aggregatetype_column,
                "aggregatetype",
            )
            .check(check_column)?,
        aggregateid: from
            .text("aggregateid-column", &cli.aggregateid_column, "aggregateid")
            .check(check_column)?,
        payload: from
            .text("payload-column", &cli.payload_column, "payload")
            .check(check_column)?,
        subject: from
            .text("subject", &cli.subject, template::DEFAULT)
            .parse(|text| {
                text.parse()
                    .map_err(|error: TemplateError| error.to_string())
            })?,
        headers: from.list("header", &cli.header).parse(parse_headers)?,
        headers_column: from
            .text("headers-column", &cli.headers_column, "")
            .optional(check_column)?,
    })
}

/// What is done with what cannot be published as it is.
fn policy(from: &Sources<'_>, cli: &Cli, slot: &str) -> Result<Policy, ConfigError> {
    let on_bad = [OnBad::Encode, OnBad::Park, OnBad::Stop];
    let policy = Policy {
        on_poison: from.text("on-poison", &cli.on_poison, "stop").one_of(&[
            OnPoison::Stop,
            OnPoison::Park,
            OnPoison::Skip,
        ])?,
        on_bad_subject: from
            .text("on-bad-subject", &cli.on_bad_subject, "encode")
            .one_of(&on_bad)?,
        on_bad_header: from
            .text("on-bad-header", &cli.on_bad_header, "encode")
            .one_of(&on_bad)?,
        park_subject: from
            .text("park-subject", &cli.park_subject, &format!("{slot}.parked"))
            .check(|subject| validate_prefix(subject).map_err(|error| error.to_string()))?,
    };
    let loses = policy.on_poison == OnPoison::Skip;
    if loses && !from.switch("yes-lose-events", cli.yes_lose_events)? {
        return Err(ConfigError::Together(
            "-on-poison skip gives events up for good; say -yes-lose-events as well, or park them",
        ));
    }
    Ok(policy)
}

/// What is logged, and how.
fn log_config(from: &Sources<'_>, cli: &Cli) -> Result<LogConfig, ConfigError> {
    Ok(LogConfig {
        level: from.text("logging", &cli.logging, "info").one_of(&[
            LevelFilter::Debug,
            LevelFilter::Info,
            LevelFilter::Warn,
            LevelFilter::Error,
        ])?,
        format: from
            .text("log-format", &cli.log_format, "text")
            .one_of(&[LogFormat::Text, LogFormat::Json])?,
    })
}

fn libpq_names_a_database(from: &Sources<'_>) -> bool {
    ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER"]
        .iter()
        .any(|name| from.variable(name).is_some_and(|value| !value.is_empty()))
}

#[cfg(test)]
mod tests;
