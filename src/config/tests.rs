use super::*;
use crate::cli::{self, Invocation};
use argh::FlagInfoKind;
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
    Config::load(&cli, &|name| {
        let (_, value) = pairs.iter().find(|(key, _)| *key == name)?;
        Some(value.to_string())
    })
}

/// Loads with a database and these arguments.
fn with(args: &[&str]) -> Result<Config, ConfigError> {
    load(&[&["-db", "host=h"], args].concat(), &[])
}

fn setting(config: &Config, name: &str) -> Option<String> {
    let mut settings = config.settings.iter();
    let (_, value) = settings.find(|(key, _)| *key == name)?;
    Some(value.clone())
}

#[test]
fn defaults_are_what_the_help_says() {
    let config = load(&[], &["PGHOST=h", "PGUSER=u"]).unwrap();
    let shown: Vec<&str> = config.settings.iter().map(|(name, _)| *name).collect();
    let mut in_the_help: Vec<&str> = Vec::new();
    for flag in Cli::get_args_info().flags {
        let name = flag.long.trim_start_matches("--");
        // argh doubles braces, and prints them as they were
        let help = flag.description.replace("{{", "{").replace("}}", "}");
        let default = help
            .rsplit_once("(default ")
            .map(|(_, default)| default.trim_end_matches(')'));
        let found = setting(&config, name);
        match default {
            Some("off" | "none") => assert_eq!(found, None, "{name}"),
            Some("localhost") => assert_eq!(found.as_deref(), Some("nats://localhost:4222")),
            Some(default) => assert_eq!(found.as_deref(), Some(default), "{name}"),
            // it depends on others, or there is none
            None => {}
        }
        in_the_help.extend(shown.iter().filter(|shown| **shown == name));
    }
    assert_eq!(shown, in_the_help);
    for (name, of_the_slot) in [
        ("publication", "x"),
        ("message-prefix", "x"),
        ("park-subject", "x.parked"),
    ] {
        let found = setting(&with(&["-slot=x"]).unwrap(), name);
        assert_eq!(found.as_deref(), Some(of_the_slot), "{name}");
    }
    assert!(
        config
            .summary()
            .starts_with("db=\"u@h:5432/u sslmode=prefer\" nats=nats://localhost:4222 ")
    );
}

#[test]
fn every_flag_beats_its_variable_which_beats_the_default() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let file = file.path().to_str().unwrap();
    let table = [
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
    ];
    // the rest are switches, files with rules of their own, and what is no setting
    let others = ["db-file", "nats-tls-cert", "nats-tls-key", "help"];
    for flag in Cli::get_args_info().flags {
        let name = flag.long.trim_start_matches('-');
        let covered = matches!(flag.kind, FlagInfoKind::Switch)
            || others.contains(&name)
            || table.iter().any(|(flag, ..)| *flag == name);
        assert!(covered, "{name} is a new flag: add it to the table above");
    }
    for (flag, variable, first, second) in table {
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
            let config = load(&[&["-yes-lose-events"], args].concat(), env).unwrap();
            assert_eq!(setting(&config, flag), Some(shown(expect)), "{args:?}");
        };
        let env = [variable.as_str(), "PGHOST=h"];
        check(&[], &env, first);
        check(&[&format!("-{flag}={}", given(second))], &env, second);
    }
}

#[test]
fn a_variable_that_is_of_no_flag_is_warned_of() {
    let names = ["JETSTREAM_OUTBOX_DB", "JETSTREAM_OUTBOX_DARIN", "PATH"];
    let warnings = unknown_variables(names.into_iter().map(String::from));
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].starts_with("JETSTREAM_OUTBOX_DARIN is"));
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
        ("message-prefix", "", "is empty"),
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
        &["-transaction-headers", "-delivery=at-least-once"],
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
        &["-transaction-headers"],
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
