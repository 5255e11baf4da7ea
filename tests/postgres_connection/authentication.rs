//! Every authentication method, and what is said when it fails.

use crate::cluster::{connect, connect_with, primary};
use crate::support::files::temp_dir;

/// What `text` leads to: `ok`, or what the error says.
#[track_caller]
fn check(text: &str, env: &[(&str, &str)], expected: &str) {
    let found = match connect_with(text, env) {
        Ok(mut connection) => {
            let rows = connection.simple_query("SELECT current_user").unwrap();
            let user = rows[0][0].as_deref().unwrap();
            assert!(text.contains(&format!("user={user} ")), "{user}");
            "ok".to_string()
        }
        Err(error) => error.to_string(),
    };
    let fits = match expected {
        "ok" => found == "ok",
        expected => found.contains(expected),
    };
    assert!(fits, "{text}\nexpected {expected}\nfound    {found}");
    assert!(!found.contains("pass word"), "{found}");
}

#[test]
fn each_method_lets_the_right_password_in_and_names_a_wrong_one() {
    let server = primary();
    check(&server.tcp("postgres", ""), &[], "ok");
    for user in ["by_password", "by_md5", "by_scram"] {
        for sslmode in ["disable", "allow", "prefer", "require"] {
            let tcp = |more: &str| server.tcp(user, &format!("sslmode={sslmode} {more}"));
            check(&tcp("password='pass word'"), &[], "ok");
            check(&tcp(""), &[("PGPASSWORD", "pass word")], "ok");
            check(
                &tcp("password=wrong"),
                &[],
                "FATAL 28P01: password authentication failed",
            );
            check(&tcp(""), &[], "none was given; set PGPASSWORD");
        }
        let error = connect(&server.tcp(user, "password=wrong")).unwrap_err();
        assert_eq!(error.sqlstate(), Some("28P01"));
    }
}

#[test]
fn channel_binding_is_met_or_missed_by_name() {
    let server = primary();
    let scram = |more: &str| server.tcp("by_scram", &format!("password='pass word' {more}"));
    for (more, expected) in [
        ("sslmode=require channel_binding=require", "ok"),
        (
            "sslmode=require channel_binding=require ssl_max_protocol_version=TLSv1.2",
            "ok",
        ),
        ("sslmode=require channel_binding=disable", "ok"),
        (
            "sslmode=disable channel_binding=require",
            "the session is not over TLS",
        ),
    ] {
        check(&scram(more), &[], expected);
    }
    for user in ["by_md5", "by_password"] {
        let text = server.tcp(
            user,
            "password='pass word' sslmode=require channel_binding=require",
        );
        check(&text, &[], "the server asks for a method without it");
    }
    let trust = server.tcp("postgres", "sslmode=require channel_binding=require");
    check(&trust, &[], "the server let us in without it");
}

#[test]
fn require_auth_holds() {
    let server = primary();
    for (user, allowed, expected) in [
        ("by_scram", "scram-sha-256", "ok"),
        ("by_scram", "!password,!md5", "ok"),
        (
            "by_md5",
            "scram-sha-256",
            "asks for md5, which require_auth does not allow",
        ),
        (
            "by_password",
            "!password",
            "asks for password, which require_auth",
        ),
        (
            "postgres",
            "scram-sha-256",
            "asks for none, which require_auth",
        ),
        ("postgres", "none", "ok"),
    ] {
        let more = format!("password='pass word' require_auth={allowed}");
        check(&server.tcp(user, &more), &[], expected);
    }
}

#[test]
fn an_unsupported_method_is_named() {
    let server = primary();
    check(
        &server.tcp("by_gss", ""),
        &[],
        "the server asks for GSSAPI (gss), which is not supported",
    );
}

#[test]
fn client_certificates() {
    let server = primary();
    let with = |user: &str, certificate: &str, more: &str| {
        let file = |suffix: &str| server.file(&format!("{certificate}.{suffix}"));
        let (crt, key) = (file("crt"), file("key"));
        server.tcp(
            user,
            &format!("sslmode=require sslcert={crt} sslkey={key} {more}"),
        )
    };
    check(&with("by_cert", "by_cert", ""), &[], "ok");
    check(
        &with(
            "by_both",
            "by_both",
            "password='pass word' channel_binding=require",
        ),
        &[],
        "ok",
    );
    check(
        &with("by_cert", "by_both", ""),
        &[],
        "FATAL 28000: certificate authentication failed",
    );
    check(
        &server.tcp("by_cert", ""),
        &[],
        "connection requires a valid client certificate",
    );
}

#[test]
fn the_password_file_is_read_unless_others_can_read_it() {
    use std::os::unix::fs::PermissionsExt;
    let server = primary();
    let folder = temp_dir("passwords-");
    let path = folder.path().join("passwords");
    let port = server.port;
    std::fs::write(&path, format!("127.0.0.1:{port}:*:by_scram:pass word\n")).unwrap();
    let env = [("PGPASSFILE", path.to_str().unwrap())];
    for (mode, expected) in [
        (0o600, "ok"),
        (0o640, "none was given"),
        (0o604, "none was given"),
    ] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        check(&server.tcp("by_scram", ""), &env, expected);
    }
}

#[test]
fn tls_and_plain_are_tried_as_pg_hba_conf_wants_them() {
    let server = primary();
    for (user, sslmode, expected) in [
        ("only_tls", "disable", "FATAL 28000: no pg_hba.conf entry"),
        ("only_tls", "allow", "ok"),
        ("only_tls", "prefer", "ok"),
        ("only_plain", "allow", "ok"),
        ("only_plain", "prefer", "ok"),
        ("only_plain", "require", "FATAL 28000: no pg_hba.conf entry"),
    ] {
        let text = server.tcp(user, &format!("password='pass word' sslmode={sslmode}"));
        check(&text, &[], expected);
    }
}
