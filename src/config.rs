//! The one [`Config`]: flags, environment and defaults put together and validated once, at the start.
//!
//! A flag beats its environment variable (`-ack-timeout` is `JETSTREAM_OUTBOX_ACK_TIMEOUT`), which beats the
//! default. Nothing here talks to a server: what only a server can refuse is the relay's to report. No message,
//! `Debug` or summary shows a password or a token.

use crate::cli::{Cli, PROGRAM};
use crate::exit::Exit;
use crate::jetstream::Delivery;
use crate::jetstream::preflight::Wanted;
use crate::logging::{self, LogConfig, LogFormat, Logfmt};
use crate::nats::options::{Options, parse_servers};
use crate::outbox::header::is_schedule;
use crate::outbox::mapping::{Mapping, TableMapping};
use crate::outbox::park::{OnBad, OnPoison, Policy};
use crate::outbox::subject::validate_prefix;
use crate::outbox::template::TemplateError;
use crate::postgres::ConnInfo;
use log::LevelFilter;
use source::{DEFAULTS, Origin, Setting, Sources, read_secret, variable};
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
    pub fn load(cli: Cli, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let from = Sources { env };
        let mut warnings = Vec::new();

        let (db, open) = database(&from, cli.db, cli.db_file)?;
        warnings.extend(open);
        let database_is_named = db.origin != Origin::Default || libpq_names_a_database(env);
        let on_command_line = |origin| origin == Origin::Flag;
        let mut expose = |flag: &'static str| {
            warnings.push(format!(
                "the secret in -{flag} can be read by every user of this machine with ps: pass it as {}, or in a file",
                variable(flag)
            ));
        };
        let db_exposed = on_command_line(db.origin);
        let db = match database_is_named {
            true => {
                db.secret(|text| ConnInfo::parse(text, env).map_err(|error| error.to_string()))?
            }
            // nobody connects to it
            false => ConnInfo::parse("user=nobody", &|_| None).expect("it is one"),
        };
        if db_exposed && db.has_password_inline() {
            expose("db");
        }
        let nats = from.text("nats", cli.nats);
        let nats_exposed = on_command_line(nats.origin);
        let servers = nats.secret(|text| parse_servers(text).map_err(|error| error.to_string()))?;
        if nats_exposed && servers.iter().any(|server| server.auth.is_some()) {
            expose("nats");
        }

        let slot = from.text("slot", cli.slot).check(check_slot)?;
        let publication = match from.text("publication", cli.publication) {
            given if given.origin == Origin::Default => slot.clone(),
            given => given.check(check_publication)?,
        };
        let creds = from.credential("creds", cli.creds, "creds")?;
        let nkey = from.credential("nats-nkey", cli.nats_nkey, "nkey")?;
        if creds.is_some() && nkey.is_some() {
            return Err(ConfigError::Together(
                "-creds and -nats-nkey are two ways to sign in; give one of them",
            ));
        }
        if (creds.is_some() || nkey.is_some()) && servers.iter().any(|server| server.auth.is_some())
        {
            return Err(ConfigError::Together(
                "a user or token in the URL of -nats, and -creds or -nats-nkey, are two ways to sign in; give one of them",
            ));
        }
        let tls_cert = from.file("nats-tls-cert", cli.nats_tls_cert)?;
        let tls_key = from.file("nats-tls-key", cli.nats_tls_key)?;
        if tls_cert.is_some() != tls_key.is_some() {
            return Err(ConfigError::Together(
                "-nats-tls-cert and -nats-tls-key are used together; one of them is missing",
            ));
        }

        let prefix = from
            .text("prefix", cli.prefix)
            .check(|prefix| validate_prefix(prefix).map_err(|error| error.to_string()))?;
        let delivery = from
            .text("delivery", cli.delivery)
            .one_of(&[Delivery::ExactlyOnce, Delivery::AtLeastOnce])?;
        let list = |values: Vec<String>| Some(values.join(",")).filter(|list| !list.is_empty());
        let columns = TableMapping {
            id: from.text("id-column", cli.id_column).check(check_column)?,
            aggregatetype: from
                .text("aggregatetype-column", cli.aggregatetype_column)
                .check(check_column)?,
            aggregateid: from
                .text("aggregateid-column", cli.aggregateid_column)
                .check(check_column)?,
            payload: from
                .text("payload-column", cli.payload_column)
                .check(check_column)?,
            subject: from.text("subject", cli.subject).parse(|text| {
                text.parse()
                    .map_err(|error: TemplateError| error.to_string())
            })?,
            headers: from.text("header", list(cli.header)).parse(parse_headers)?,
            headers_column: from
                .text("headers-column", cli.headers_column)
                .optional(check_column)?,
        };
        let on_bad = [OnBad::Encode, OnBad::Park, OnBad::Stop];
        let policy = Policy {
            on_poison: from.text("on-poison", cli.on_poison).one_of(&[
                OnPoison::Stop,
                OnPoison::Park,
                OnPoison::Skip,
            ])?,
            on_bad_subject: from
                .text("on-bad-subject", cli.on_bad_subject)
                .one_of(&on_bad)?,
            on_bad_header: from
                .text("on-bad-header", cli.on_bad_header)
                .one_of(&on_bad)?,
            park_subject: from
                .text("park-subject", cli.park_subject)
                .optional(|subject| validate_prefix(subject).map_err(|error| error.to_string()))?
                .unwrap_or_else(|| format!("{slot}.parked")),
        };
        if policy.on_poison == OnPoison::Skip
            && !from.switch("yes-lose-events", cli.yes_lose_events)?
        {
            return Err(ConfigError::Together(
                "-on-poison skip gives events up for good; say -yes-lose-events as well, or park them",
            ));
        }
        let message_prefix = from
            .text("message-prefix", cli.message_prefix)
            .optional(|_| Ok(()))?
            .unwrap_or_else(|| slot.clone());
        let messages = !from.switch("no-messages", cli.no_messages)?;
        let mapping = Mapping {
            prefix: prefix.clone(),
            tables: from
                .text("table", list(cli.table))
                .parse(|text| parse_tables(text, &columns))?,
            default: columns,
            message_prefix: messages.then_some(message_prefix),
            cloudevents: from
                .text("cloudevents", cli.cloudevents)
                .optional(check_source)?,
            position_headers: from.switch("position-headers", cli.position_headers)?,
            policy,
        };
        let mut headers = mapping
            .tables
            .iter()
            .flat_map(|named| &named.mapping.headers)
            .chain(&mapping.default.headers);
        if delivery == Delivery::ExactlyOnce && headers.any(|header| is_schedule(&header.name)) {
            return Err(ConfigError::Together(
                "a header Nats-Schedule… makes the server store copies that bear the event's position, by which -delivery \
                 exactly-once resumes; use -delivery at-least-once for them",
            ));
        }

        Ok(Config {
            nats: Options {
                servers,
                creds,
                nkey,
                tls_ca: from.file("nats-tls-ca", cli.nats_tls_ca)?,
                tls_cert,
                tls_key,
                tls_first: from.switch("nats-tls-first", cli.nats_tls_first)?,
                connect_timeout: from
                    .text("nats-connect-timeout", cli.nats_connect_timeout)
                    .parse(|text| parse_duration_within(text, CONNECT_TIMEOUT))?,
                api_prefix: from
                    .text("nats-api-prefix", cli.nats_api_prefix)
                    .check(check_subject)?,
                name: format!("{PROGRAM} {slot}"),
                ..Options::default()
            },
            db,
            database_is_named,
            prefix,
            mapping,
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
            delivery,
            hold_back: from
                .text("hold-back", cli.hold_back)
                .parse(|text| parse_duration_within(text, HOLD_BACK))?,
            checkpoint: from
                .text("checkpoint", cli.checkpoint)
                .parse(parse_bucket)?,
            resume_anyway: from.switch("resume-anyway", cli.resume_anyway)?,
            accept_new_system: from.switch("accept-new-system", cli.accept_new_system)?,
            listen: match from.text("listen", cli.listen) {
                given if given.value.is_empty() => Vec::new(),
                given => given.parse(parse_listen)?,
            },
            log: LogConfig {
                level: from.text("logging", cli.logging).one_of(&[
                    LevelFilter::Debug,
                    LevelFilter::Info,
                    LevelFilter::Warn,
                    LevelFilter::Error,
                ])?,
                format: from
                    .text("log-format", cli.log_format)
                    .one_of(&[LogFormat::Text, LogFormat::Json])?,
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
            ("db", Some(self.db.to_string())),
            (
                "nats",
                list(self.nats.servers.iter().map(|s| format!("{s:?}")).collect()),
            ),
            ("creds", path(&self.nats.creds)),
            ("nats-nkey", path(&self.nats.nkey)),
            ("nats-tls-ca", path(&self.nats.tls_ca)),
            ("nats-tls-cert", path(&self.nats.tls_cert)),
            ("nats-tls-key", path(&self.nats.tls_key)),
            ("nats-tls-first", on(self.nats.tls_first)),
            (
                "nats-connect-timeout",
                Some(format!("{:?}", self.nats.connect_timeout)),
            ),
            ("nats-api-prefix", Some(self.nats.api_prefix.clone())),
            ("prefix", Some(self.prefix.clone())),
            ("slot", Some(self.slot.clone())),
            ("publication", Some(self.publication.clone())),
            ("table", list(self.shown_tables())),
            ("inflight", Some(self.inflight.to_string())),
            ("ack-timeout", Some(format!("{:?}", self.ack_timeout))),
            (
                "max-outage",
                Some(match self.max_outage {
                    Some(longest) => format!("{longest:?}"),
                    None => "never".to_string(),
                }),
            ),
            ("delivery", Some(self.delivery.to_string())),
            ("hold-back", Some(format!("{:?}", self.hold_back))),
            ("checkpoint", Some(self.checkpoint.clone())),
            ("resume-anyway", on(self.resume_anyway)),
            ("accept-new-system", on(self.accept_new_system)),
            ("drain", on(self.drain)),
            ("no-wait", on(self.no_wait)),
            (
                "listen",
                list(self.listen.iter().map(ToString::to_string).collect()),
            ),
            (
                "logging",
                Some(self.log.level.as_str().to_ascii_lowercase()),
            ),
            ("log-format", Some(self.log.format.to_string())),
        ]
        .into_iter()
        .chain(self.shown_mapping())
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }

    fn shown_tables(&self) -> Vec<String> {
        let default = &self.mapping.default;
        let tables = self.mapping.tables.iter();
        tables
            .map(|named| match named.mapping.differences(default).as_str() {
                "" => named.table.to_string(),
                settings => format!("{}:{settings}", named.table),
            })
            .collect()
    }

    /// What of the mapping is not the default.
    fn shown_mapping(&self) -> Vec<(&'static str, Option<String>)> {
        let Mapping {
            default: columns,
            policy,
            ..
        } = &self.mapping;
        let differs = |flag: &'static str, value: String| {
            let default = DEFAULTS.iter().find(|(name, _)| *name == flag);
            let is_default = default.is_some_and(|(_, default)| *default == value);
            (flag, (!is_default).then_some(value))
        };
        let headers = columns.headers.iter().map(ToString::to_string);
        let headers = headers.collect::<Vec<_>>().join(",");
        let prefix = self.mapping.message_prefix.as_ref();
        let on = |on: bool| on.then(|| "true".to_string());
        vec![
            differs("id-column", columns.id.clone()),
            differs("aggregatetype-column", columns.aggregatetype.clone()),
            differs("aggregateid-column", columns.aggregateid.clone()),
            differs("payload-column", columns.payload.clone()),
            differs("subject", columns.subject.to_string()),
            differs("on-bad-subject", policy.on_bad_subject.to_string()),
            ("header", Some(headers).filter(|list| !list.is_empty())),
            ("headers-column", columns.headers_column.clone()),
            differs("on-bad-header", policy.on_bad_header.to_string()),
            ("cloudevents", self.mapping.cloudevents.clone()),
            ("position-headers", on(self.mapping.position_headers)),
            (
                "message-prefix",
                prefix.filter(|prefix| **prefix != self.slot).cloned(),
            ),
            ("no-messages", on(prefix.is_none())),
            differs("on-poison", policy.on_poison.to_string()),
            (
                "park-subject",
                policy.parks().then(|| policy.park_subject.clone()),
            ),
        ]
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

/// The connection: `-db`, or what stands in the file of `-db-file`, and a warning of that file.
fn database(
    from: &Sources<'_>,
    db: Option<String>,
    db_file: Option<String>,
) -> Result<(Setting, Option<String>), ConfigError> {
    if db.is_some() && db_file.is_some() {
        return Err(ConfigError::Together(
            "-db and -db-file are two ways to name the database; give one of them",
        ));
    }
    let beats_the_file = db.is_some() || db_file.is_none() && from.environment("db").is_some();
    let file = match beats_the_file {
        true => None,
        false => from.credential("db-file", db_file, "db")?,
    };
    let Some(path) = file else {
        return Ok((from.text("db", db), None));
    };
    let (value, open) = read_secret(&path).map_err(|source| ConfigError::File {
        setting: "-db-file".to_string(),
        path: path.clone(),
        source,
    })?;
    let setting = Setting {
        flag: "db-file",
        origin: Origin::File,
        value,
    };
    if setting.value.is_empty() {
        return setting.secret(|_| Err(format!("{} is empty", path.display())));
    }
    Ok((setting, open))
}

fn libpq_names_a_database(env: &dyn Fn(&str) -> Option<String>) -> bool {
    ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER"]
        .iter()
        .any(|name| env(name).is_some_and(|value| !value.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Invocation};
    use argh::ArgsInfo;
    use std::ffi::OsString;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

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
            // argh doubles braces, and prints them as they were
            let help = help[0].replace("{{", "{").replace("}}", "}");
            assert!(help.ends_with(&format!("(default {default})")), "{name}");
        }
        assert_eq!(
            load(&[], &["PGHOST=h", "PGUSER=u"])
                .unwrap()
                .summary()
                .to_string(),
            "db=\"u@h:5432/u sslmode=prefer\" nats=nats://localhost:4222 nats-connect-timeout=5s nats-api-prefix=$JS.API prefix=events slot=jetstream_outbox \
             publication=jetstream_outbox inflight=3072 ack-timeout=5s max-outage=never \
             delivery=exactly-once hold-back=150s checkpoint=jetstream_outbox logging=info log-format=text"
        );
    }

    #[test]
    fn every_flag_beats_its_variable_which_beats_the_default() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = file.path().to_str().unwrap();
        for (flag, variable, first, second) in [
            ("db", "DB", "a", "b"),
            ("nats", "NATS", "a", "b"),
            ("creds", "CREDS", file, "/dev/null"),
            ("nats-nkey", "NATS_NKEY", file, "/dev/null"),
            ("nats-tls-ca", "NATS_TLS_CA", file, "/dev/null"),
            ("nats-connect-timeout", "NATS_CONNECT_TIMEOUT", "1s", "2s"),
            ("nats-api-prefix", "NATS_API_PREFIX", "$JS.a.API", "x"),
            ("prefix", "PREFIX", "a", "b.c"),
            ("slot", "SLOT", "a", "b"),
            ("publication", "PUBLICATION", "a", "b"),
            ("table", "TABLE", "\"a\"", "\"b\":id=x,header=y=Z"),
            ("id-column", "ID_COLUMN", "a", "B"),
            ("aggregatetype-column", "AGGREGATETYPE_COLUMN", "a", "B"),
            ("aggregateid-column", "AGGREGATEID_COLUMN", "a", "B"),
            ("payload-column", "PAYLOAD_COLUMN", "a", "B"),
            ("subject", "SUBJECT", "{prefix}.{a}", "{prefix}.b.{c:lower}"),
            ("on-bad-subject", "ON_BAD_SUBJECT", "park", "stop"),
            ("header", "HEADER", "a=b", "c=D,e=f"),
            ("headers-column", "HEADERS_COLUMN", "a", "b"),
            ("on-bad-header", "ON_BAD_HEADER", "park", "stop"),
            ("cloudevents", "CLOUDEVENTS", "/a", "https://b"),
            ("message-prefix", "MESSAGE_PREFIX", "a", "b"),
            ("on-poison", "ON_POISON", "skip", "park"),
            ("park-subject", "PARK_SUBJECT", "a.b", "c"),
            ("inflight", "INFLIGHT", "1", "65536"),
            ("ack-timeout", "ACK_TIMEOUT", "1s", "2s"),
            ("max-outage", "MAX_OUTAGE", "60s", "never"),
            ("delivery", "DELIVERY", "at-least-once", "exactly-once"),
            ("hold-back", "HOLD_BACK", "0ns", "60s"),
            ("checkpoint", "CHECKPOINT", "a", "b"),
            ("listen", "LISTEN", "127.0.0.1:1", "0.0.0.0:9464"),
            ("logging", "LOGGING", "debug", "error"),
            ("log-format", "LOG_FORMAT", "json", "text"),
        ] {
            let given = |value: &str| match flag {
                "db" => format!("postgres://u@{value}/d"),
                _ => value.to_string(),
            };
            let shown = |value: &str| match flag {
                "db" => format!("u@{value}:5432/d sslmode=prefer"),
                "nats" => format!("nats://{value}:4222"),
                _ => value.to_string(),
            };
            let variable = format!("JETSTREAM_OUTBOX_{variable}={}", given(first));
            let check = |args: &[&str], env: &[&str], expect: &str| {
                // a subject to park under matters where events may be parked
                let also = ["-yes-lose-events", "-on-bad-header=park"];
                let also = if flag == "on-bad-header" {
                    &also[..1]
                } else {
                    &also
                };
                let config = load(&[also, args].concat(), env).unwrap();
                assert_eq!(setting(&config, flag), Some(shown(expect)), "{args:?}");
            };
            let env = [variable.as_str(), "PGHOST=h"];
            check(&[], &env, first);
            check(&[&format!("-{flag}={}", given(second))], &env, second);
        }
        for flag in Cli::get_args_info().flags {
            let name = flag.long.trim_start_matches('-');
            let covered = DEFAULTS.iter().any(|(known, _)| *known == name)
                || [
                    "db",
                    "db-file",
                    "creds",
                    "nats-nkey",
                    "publication",
                    "table",
                    "listen",
                ]
                .contains(&name)
                || ["header", "headers-column", "cloudevents"].contains(&name)
                || ["message-prefix", "park-subject"].contains(&name)
                || name.starts_with("nats-tls-")
                || [
                    "drain",
                    "no-wait",
                    "resume-anyway",
                    "accept-new-system",
                    "position-headers",
                    "no-messages",
                    "yes-lose-events",
                    "version",
                    "help",
                ]
                .contains(&name);
            assert!(covered, "{name} is a new flag: add it to the table above");
        }
    }

    #[test]
    fn a_pair_of_files_can_come_from_both_sides() {
        let config = load(
            &["-nats-tls-cert=/dev/null", "-creds="],
            &[
                "PGHOST=h",
                "JETSTREAM_OUTBOX_NATS_TLS_KEY=/dev/null",
                "JETSTREAM_OUTBOX_NATS_NKEY=",
            ],
        )
        .unwrap();
        assert!(config.nats.tls_cert.is_some() && config.nats.tls_key.is_some());
        assert!(config.nats.creds.is_none() && config.nats.nkey.is_none());
    }

    #[test]
    fn secrets_can_stand_in_files_and_systemd_may_bring_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str, mode: u32| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path.display().to_string()
        };
        let own = file("own", "postgres://u:secret@own/d\n", 0o600);
        let open = file("open", "postgres://u:secret@open/d", 0o644);
        let empty = file("empty", "\n", 0o600);
        file("db", "host=systemd user=u dbname=d", 0o400);
        file("creds", "", 0o400);
        let folder = format!("CREDENTIALS_DIRECTORY={}", folder.path().display());
        let by_env = "JETSTREAM_OUTBOX_DB=postgres://u@env/d";
        for (args, env, expect) in [
            (
                &[&*format!("-db-file={own}")][..],
                &[by_env][..],
                "u@own:5432/d",
            ),
            (
                &[],
                &[by_env, &format!("JETSTREAM_OUTBOX_DB_FILE={own}")],
                "u@env:5432/d",
            ),
            (
                &[],
                &[&format!("JETSTREAM_OUTBOX_DB_FILE={own}")],
                "u@own:5432/d",
            ),
            (&[], &[&folder, "PGHOST=h"], "u@systemd:5432/d"),
            (&[], &[&folder, by_env], "u@env:5432/d"),
            (&["-db=postgres://u@flag/d"], &[&folder], "u@flag:5432/d"),
        ] {
            let config = load(args, env).unwrap();
            let db = config.db.to_string();
            assert!(db.starts_with(expect), "{args:?} {env:?}: {db}");
            assert_eq!(config.warnings, [""; 0], "{args:?} {env:?}");
            assert_eq!(config.nats.creds.is_some(), env.contains(&folder.as_str()));
        }
        let config = load(&[&format!("-db-file={open}")], &[]).unwrap();
        assert!(
            config.warnings[0].contains("chmod 0600"),
            "{:?}",
            config.warnings
        );
        for (args, reason) in [
            (&[&*format!("-db-file={empty}")][..], "is empty"),
            (&["-db-file=/nonexistent"], "/nonexistent"),
            (&["-db-file=/dev/null", "-db=host=h"], "give one of them"),
        ] {
            let error = load(args, &[]).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("-db"), "{error}");
        }
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
        for (args, env, named) in [
            (&[][..], &[][..], false),
            (&[], &["PGHOST="], false),
            (&[], &["PGPASSWORD=x"], false),
            (&[], &["PGSSLMODE=wrong"], false),
            (&[], &["JETSTREAM_OUTBOX_DB="], false),
            (&["-db="], &["USER=u"], true),
            (&[], &["PGHOST=h", "USER=u"], true),
            (&[], &["JETSTREAM_OUTBOX_DB=host=x user=u"], true),
        ] {
            // by those who connect to it; the others may go on
            let config = load(args, env).unwrap();
            let required = config.require_database();
            assert_eq!(required.is_ok(), named, "{args:?} {env:?}");
        }
        let error = load(&[], &[]).unwrap().require_database().unwrap_err();
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
            ("prefix", "", "empty token"),
            ("prefix", "a..b", "empty token"),
            ("prefix", "a.", "empty token"),
            ("prefix", "a b", "cannot stand in a subject"),
            ("prefix", "a.>", "cannot stand in a subject"),
            ("prefix", "*", "cannot stand in a subject"),
            ("nats-api-prefix", "$JS.API.", "empty part"),
            ("nats-api-prefix", "$JS.*.API", "wildcard"),
            ("inflight", "0", "from 1 to 65536"),
            ("inflight", "65537", "from 1 to 65536"),
            ("inflight", "-1", "from 1 to 65536"),
            ("inflight", "1k", "from 1 to 65536"),
            ("nats-connect-timeout", "0s", "less than 100ms"),
            ("nats-connect-timeout", "3m", "more than 120s"),
            ("ack-timeout", "99ms", "less than 100ms"),
            ("ack-timeout", "61m", "more than 3600s"),
            ("ack-timeout", "5 s", "not a duration"),
            ("max-outage", "0", "less than 1s"),
            ("max-outage", "always", "not a duration"),
            ("hold-back", "25h", "more than 86400s"),
            ("hold-back", "-1s", "not a duration"),
            ("checkpoint", "a b", "bucket's name"),
            ("checkpoint", "none", "-delivery at-least-once"),
            ("checkpoint", "a.b", "bucket's name"),
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
            ("table", "a:id", "key=value"),
            ("table", "a:x=y", "the key"),
            ("id-column", "", "63 bytes"),
            ("payload-column", &long, "63 bytes"),
            ("subject", "", "begin with {prefix}."),
            ("subject", "events.{a}", "begin with {prefix}."),
            ("subject", "{prefix}.{a", "brace"),
            ("on-bad-subject", "skip", "encode, park, stop"),
            ("on-bad-header", "drop", "encode, park, stop"),
            ("header", "a=Nats-Msg-Id", "NATS acts on"),
            ("header", "a=Outbox-X", "relay's own"),
            ("header", "a=b c", "header's name"),
            ("header", "a,", "names no column"),
            ("cloudevents", "a b", "not a URI"),
            ("on-poison", "ignore", "stop, park, skip"),
            ("park-subject", "a..b", "empty token"),
            ("park-subject", "$JS.x", "belong to NATS"),
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
            &["-creds=/dev/null", "-nats=nats://u:p@h"],
            &["-creds=/dev/null", "-nats=a,token@b"],
            &["-nats-nkey=/dev/null", "-nats=token@h"],
            &["-nats-tls-cert=/dev/null"],
            &["-nats-tls-key=/dev/null"],
            &["-on-poison=skip"],
            &["-header=a=Nats-Schedule"],
            &["-table=t:header=a=nats-schedule-ttl"],
        ] {
            let error = with(args).unwrap_err();
            assert!(matches!(error, ConfigError::Together(_)), "{error}");
        }
        for args in [
            &["-on-poison=skip", "-yes-lose-events"][..],
            &["-header=a=Nats-Schedule", "-delivery=at-least-once"],
            &["-header=a=Nats-TTL"],
        ] {
            assert!(with(args).is_ok(), "{args:?}");
        }
    }

    #[test]
    fn nats_servers() {
        for (list, expect) in [
            ("localhost", Some("nats://localhost:4222")),
            ("h:4222,nats://h2", Some("nats://h:4222,nats://h2:4222")),
            (" a , tls://b:1/ ", Some("nats://a:4222,tls://b:1")),
            ("[::1]", Some("nats://[::1]:4222")),
            ("nats://[::1]:4222", Some("nats://[::1]:4222")),
            ("nats://u:sekret@h:1", Some("nats://***@h:1")),
            ("sekret@h", Some("nats://***@h:4222")),
            ("nats://u:se@kret@h", Some("nats://***@h:4222")),
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
            (
                "postgres://u:sekret@h/d?replication=database",
                Some("u@h:5432/d sslmode=prefer"),
            ),
            ("postgresql://u@h:5433/d", Some("u@h:5433/d sslmode=prefer")),
            (
                "postgres://u@h1,h2:2/d",
                Some("u@h1:5432,h2:2/d sslmode=prefer"),
            ),
            (
                "host=h user=u dbname=d password=sekret",
                Some("u@h:5432/d sslmode=prefer"),
            ),
            (
                "host=h user=u password='se kret user=sekret'",
                Some("u@h:5432/u sslmode=prefer"),
            ),
            ("postgres://u:se/kret@h/d", None),
            ("mysql://u:sekret@h/d", None),
            ("sekret", None),
        ] {
            let loaded = load(&["-db", conninfo], &[]);
            let shown = match &loaded {
                Ok(config) => format!("{} {config:?}", config.summary()),
                Err(error) => format!("{error} {error:?} {}", error.remedy()),
            };
            assert!(!shown.contains("kret"), "{conninfo:?}: {shown}");
            let found = loaded.ok().and_then(|config| setting(&config, "db"));
            assert_eq!(found.as_deref(), expect, "{conninfo:?}");
        }
    }

    #[test]
    fn a_secret_among_the_arguments_is_warned_of_once() {
        let db = "postgres://u:sekret@h/d";
        for (args, env, variables) in [
            (&["-db", db][..], &[][..], &["_DB"][..]),
            (&["-db", "host=h user=u password=x"], &[], &["_DB"]),
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
