//! What connection strings mean, as tables.

use super::{ConnInfo, ConnInfoError};

/// An environment of `variables`, a home and a user.
fn parse(text: &str, variables: &[(&str, &str)]) -> Result<ConnInfo, ConnInfoError> {
    let find = |name: &str| {
        let found = variables.iter().find(|(key, _)| *key == name);
        let value = found.map(|(_, value)| value.to_string());
        match name {
            "PGUSER" => value.or(Some("env_user".into())),
            "HOME" => value.or(Some("/home/of_env".into())),
            _ => value,
        }
    };
    ConnInfo::parse(text, &find)
}

#[track_caller]
fn check(text: &str, variables: &[(&str, &str)], expected: &str) {
    let info = parse(text, variables).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(info.to_string(), expected, "{text}");
}

#[test]
fn where_and_who() {
    for (text, expected) in [
        (
            "",
            "env_user@/var/run/postgresql:5432/env_user sslmode=prefer",
        ),
        (
            "postgres://",
            "env_user@/var/run/postgresql:5432/env_user sslmode=prefer",
        ),
        ("postgresql://h", "env_user@h:5432/env_user sslmode=prefer"),
        ("postgres://u@h", "u@h:5432/u sslmode=prefer"),
        ("postgres://u:p@h:1/d", "u@h:1/d sslmode=prefer"),
        (
            "postgres://u:p@h:1/d?sslmode=require&replication=database",
            "u@h:1/d sslmode=require",
        ),
        ("postgres://u@h/d?ssl=true", "u@h:5432/d sslmode=require"),
        ("postgres://u@[::1]:1/d", "u@[::1]:1/d sslmode=prefer"),
        (
            "postgres://u@[fe80::1]/",
            "u@[fe80::1]:5432/u sslmode=prefer",
        ),
        (
            "postgres://u@a:1,b,[::1]:3/d",
            "u@a:1,b:5432,[::1]:3/d sslmode=prefer",
        ),
        ("postgres://u@%2Ftmp%2Fs:1/d", "u@/tmp/s:1/d sslmode=prefer"),
        (
            "postgres:///d?host=/tmp/s&port=1&user=u",
            "u@/tmp/s:1/d sslmode=prefer",
        ),
        (
            "postgres://u%40x:p%2F%3A@h/d%20e",
            "u@x@h:5432/d e sslmode=prefer",
        ),
        (
            "postgres://u@h/a%40b?user=c@d",
            "c@d@h:5432/a@b sslmode=prefer",
        ),
        (
            "postgres://u@first/d?host=second",
            "u@second:5432/d sslmode=prefer",
        ),
        ("host=h", "env_user@h:5432/env_user sslmode=prefer"),
        (
            "  host = h   user= u dbname =d ",
            "u@h:5432/d sslmode=prefer",
        ),
        (
            r"host=h user='it\'s \\' dbname=a\ b",
            r"it's \@h:5432/a b sslmode=prefer",
        ),
        (
            "host='' user=u",
            "u@/var/run/postgresql:5432/u sslmode=prefer",
        ),
        ("host=a,b port=1 user=u", "u@a:1,b:1/u sslmode=prefer"),
        (
            "host=a,,/s port=1,2, user=u",
            "u@a:1,/var/run/postgresql:2,/s:5432/u sslmode=prefer",
        ),
        (
            "hostaddr=127.0.0.1,::1 user=u",
            "u@127.0.0.1:5432,[::1]:5432/u sslmode=prefer",
        ),
        (
            "host=name hostaddr=10.0.0.1 user=u",
            "u@name:5432/u sslmode=prefer",
        ),
        ("host=@abstract user=u", "u@@abstract:5432/u sslmode=prefer"),
        ("host=first host=h user=u", "u@h:5432/u sslmode=prefer"),
        (
            "sslrootcert=system host=h user=u",
            "u@h:5432/u sslmode=verify-full",
        ),
    ] {
        check(text, &[], expected);
    }
}

#[test]
fn the_environment_stands_in_for_what_the_string_leaves_out() {
    let env = [
        ("PGHOST", "eh"),
        ("PGPORT", "7"),
        ("PGUSER", "eu"),
        ("PGDATABASE", "ed"),
        ("PGSSLMODE", "verify-ca"),
    ];
    check("", &env, "eu@eh:7/ed sslmode=verify-ca");
    check("postgres://", &env, "eu@eh:7/ed sslmode=verify-ca");
    check(
        "postgres://u@h:1/d?sslmode=disable",
        &env,
        "u@h:1/d sslmode=disable",
    );
    check(
        "host='' port=''",
        &env,
        "eu@/var/run/postgresql:5432/ed sslmode=verify-ca",
    );
    check(
        "",
        &[("PGHOST", ""), ("PGHOSTADDR", "10.0.0.1")],
        "env_user@10.0.0.1:5432/env_user sslmode=prefer",
    );
}

#[test]
fn the_rest_of_the_parameters() {
    let text = "user=u password='p w' connect_timeout=3 keepalives_idle=4 keepalives_count=2 tcp_user_timeout=1500 \
                application_name=app options='-c a=b' require_auth=!md5,!gss load_balance_hosts=random \
                client_encoding=UTF8 gssencmode=disable sslsni=0 ssl_min_protocol_version=TLSv1.3 \
                fallback_application_name=fallback passfile=/p";
    let info = parse(text, &[("PGPASSWORD", "env"), ("PGAPPNAME", "env")]).unwrap();
    let found = format!(
        "{:?} {} {:?} {:?} {:?} {} {:?} {:?} {} {:?} {:?}",
        info.password,
        info.has_password_inline(),
        info.connect_timeout,
        info.keepalives,
        info.tcp_user_timeout,
        info.application_name,
        info.options,
        info.require_auth,
        info.load_balance,
        info.tls.min_version,
        info.passfile,
    );
    assert_eq!(
        found,
        "Some(\"p w\") true Some(3s) Some(Keepalives { idle: Some(4s), interval: None, count: Some(2) }) Some(1.5s) \
         app Some(\"-c a=b\") Some([Password, Scram, None]) true Tls13 Some(\"/p\")"
    );
    let info = parse(
        "fallback_application_name=fallback keepalives=0",
        &[("PGPASSWORD", "env")],
    )
    .unwrap();
    assert_eq!(info.password.as_deref(), Some("env"));
    assert!(!info.has_password_inline());
    assert_eq!(info.application_name, "fallback");
    assert_eq!(info.keepalives, None);
    assert_eq!(
        parse("connect_timeout=0", &[]).unwrap().connect_timeout,
        None
    );
    let expected = concat!("jetstream-outbox ", env!("CARGO_PKG_VERSION"));
    assert_eq!(parse("", &[]).unwrap().application_name, expected);
    assert!(
        parse("", &[])
            .unwrap()
            .passfile
            .unwrap()
            .ends_with("of_env/.pgpass")
    );
}

#[test]
fn what_is_wrong_is_named_and_no_password_is_told() {
    for (text, expected) in [
        ("hots=h", "unknown parameter \"hots\""),
        ("postgres://h?sslmod=x", "unknown parameter \"sslmod\""),
        (
            "sslcrl=/x",
            "the parameter sslcrl is not supported by this program",
        ),
        ("secret", "a keyword without `=` and a value, at byte 0"),
        (
            "host=h secret",
            "a keyword without `=` and a value, at byte 7",
        ),
        (
            "host=h password='secret",
            "a quoted value that does not end, at byte 7",
        ),
        (
            "u:secret@h/d?sslmode=require",
            "neither a postgres:// URL nor key=value pairs",
        ),
        ("postgres://u:secret%@h", "the password has a `%` without"),
        ("postgres://u:secret%00@h", "the password has a `%` without"),
        ("postgres://u:secret%ff@h", "the password has a `%` without"),
        ("postgres://u:a@secret@h", "a second `@`"),
        (
            "postgres://u:secret/x@h",
            "write a slash in the user or the password as %2F",
        ),
        (
            "postgres://relay:/secret@db/shop",
            "an `@` after the first slash",
        ),
        (
            "postgres://u:123/secret@h/d",
            "an `@` after the first slash",
        ),
        (
            "postgres://us/er:secret@h/d",
            "an `@` after the first slash",
        ),
        (
            "postgres://u:p@h/secret@d",
            "an @ in the database's name as %40",
        ),
        ("postgres://h:0", "a port must be a number from 1 to 65535"),
        (
            "postgres://h:65536",
            "a port must be a number from 1 to 65535",
        ),
        ("postgres://[::1", "without its closing bracket"),
        ("postgres://[]", "an empty IPv6 address"),
        (
            "postgres://[::1]x",
            "something other than a port after an IPv6 address",
        ),
        ("postgres://h?a", "is not key=value"),
        ("postgres://h?user=a=b", "is not key=value"),
        (
            "port=1,2 host=a",
            "port lists neither one port nor one for each host",
        ),
        (
            "hostaddr=1.1.1.1 host=a,b",
            "host and hostaddr list different numbers",
        ),
        ("hostaddr=h", "hostaddr is \"h\", but must be an IP address"),
        (
            "sslmode=on",
            "sslmode is \"on\", but must be disable, allow, prefer",
        ),
        (
            "sslmode=require sslrootcert=system",
            "sslrootcert=system needs sslmode=verify-full",
        ),
        (
            "connect_timeout=soon",
            "connect_timeout is \"soon\", but must be a whole number",
        ),
        ("client_encoding=latin1", "must be UTF8 or auto"),
        ("gssencmode=require", "because this program has no GSS"),
        ("require_auth=md5,!none", "must be a list of password"),
        ("target_session_attrs=master", "must be any, read-write"),
        (
            "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2",
            "is above",
        ),
        ("user=a\0b", "a zero byte"),
    ] {
        let error = parse(text, &[]).expect_err(text).to_string();
        assert!(error.contains(expected), "{text:?}\n{error}");
        assert!(!error.contains("secret"), "{text:?}\n{error}");
    }
}

/// To ignore them would weaken what was asked for.
#[test]
fn what_the_environment_asks_for_and_nobody_can_do_is_refused() {
    for (variable, value, default) in [
        ("PGSSLCRL", "/crl.pem", None),
        ("PGSSLCRLDIR", "/crls", None),
        ("PGREQUIREPEER", "postgres", None),
        ("PGSSLCERTMODE", "require", Some("allow")),
        ("PGSSLNEGOTIATION", "direct", Some("postgres")),
        ("PGSERVICE", "shop", None),
        ("PGREQUIRESSL", "1", Some("0")),
    ] {
        let error = parse("host=h", &[(variable, value)]).expect_err(variable);
        assert_eq!(error, ConnInfoError::UnsupportedParameter(variable));
        for nothing in [Some(""), default].into_iter().flatten() {
            check(
                "host=h user=u",
                &[(variable, nothing)],
                "u@h:5432/u sslmode=prefer",
            );
        }
    }
}

#[test]
fn neither_display_nor_debug_shows_the_password() {
    let info = parse("postgres://u:secret@h/d", &[]).unwrap();
    assert_eq!(format!("{info} {info:?}").matches("secret").count(), 0);
    assert_eq!(info.password.as_deref(), Some("secret"));
}
