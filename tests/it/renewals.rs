//! Certificates, authorities and passwords are renewed on both sides while the relay runs: it reads them again at each connect, and
//! waits where the servers' come first. ([`credentials`](crate::credentials) has NATS' own.)

use crate::operators::{insert, stop, wait_for_confirmation};
use crate::rig::{DEADLINE, Rig, uuid};
use crate::support::files::temp_dir;
use crate::support::nats::Nats;
use crate::support::postgres::{self, Postgres};
use crate::support::relay::{Relay, halts};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tempfile::TempDir;

/// What an authority has issued: names of files, and what is in them.
struct Issued([(&'static str, String); 5]);

impl Issued {
    /// By an authority that nobody has heard of before.
    fn new() -> Issued {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "ours");
        let authority = params.self_signed(&key).expect("a certificate");
        let issuer = Issuer::new(params, key);
        let issue = |name: &str, usage| {
            let key = KeyPair::generate().expect("a key");
            let names = ["localhost".to_string(), "127.0.0.1".to_string()];
            let mut params = CertificateParams::new(names).expect("names");
            params.distinguished_name.push(DnType::CommonName, name);
            params.extended_key_usages.push(usage);
            let certificate = params.signed_by(&key, &issuer).expect("a certificate");
            (certificate.pem(), key.serialize_pem())
        };
        let (server, server_key) = issue("server", ExtendedKeyUsagePurpose::ServerAuth);
        let (client, client_key) = issue("relay", ExtendedKeyUsagePurpose::ClientAuth);
        Issued([
            ("ca.crt", authority.pem()),
            ("server.crt", server),
            ("server.key", server_key),
            ("client.crt", client),
            ("client.key", client_key),
        ])
    }

    /// Into the files of a server, whose owner and mode stay.
    fn write(&self, folder: &Path, prefix: &str) {
        for (name, text) in &self.0 {
            if name.starts_with(prefix) || *name == "ca.crt" {
                write(folder, name, text);
            }
        }
    }
}

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    fs::write(&path, text).expect("write a file");
    if name.starts_with("client") || name == "secret" {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("set its mode");
    }
}

fn path(folder: &TempDir, name: &str) -> String {
    let path = folder.path().join(name);
    path.to_str().expect("a path of ours").to_string()
}

/// By another authority: the server's and the clients' at once.
#[test]
fn certificates_of_nats_that_another_authority_has_issued_are_found_at_the_next_connect() {
    let (old, new) = (Issued::new(), Issued::new());
    // the test's own client goes without
    let config = r#"tls { cert_file: "{dir}/server.crt", key_file: "{dir}/server.key", ca_file: "{dir}/ca.crt", verify: true }
        allow_non_tls: true"#;
    let nats = (old.0.iter())
        .fold(Nats::builder(), |nats, (name, text)| {
            nats.file(name, text.as_str())
        })
        .config(config)
        .build();
    let pg = Postgres::start();
    pg.seed_setup();
    nats.client().add_seed_stream();
    let rig = Rig { pg, nats };
    let files = temp_dir("renewed-");
    old.write(files.path(), "client");
    let (ca, cert, key) = (
        path(&files, "ca.crt"),
        path(&files, "client.crt"),
        path(&files, "client.key"),
    );
    let db = rig.pg.url("postgres", "postgres");
    let servers = format!("tls://localhost:{}", rig.nats.port());
    let args = ["-db", &db, "-nats", &servers, "-hold-back", "0"];
    let tls = [
        "-nats-tls-ca",
        &ca,
        "-nats-tls-cert",
        &cert,
        "-nats-tls-key",
        &key,
    ];
    let relay = Relay::run(&[&args[..], &tls].concat(), &[]);
    rig.pg.execute(&insert(1, "account"));
    wait_for_confirmation(&rig);

    // the connection stays
    new.write(rig.nats.dir(), "server");
    rig.nats.reload();
    rig.pg.execute(&insert(2, "account"));
    wait_for_confirmation(&rig);
    // the next one is not made before the files are there
    rig.nats.restart();
    relay.wait_for_log("secure the connection to NATS", DEADLINE);
    rig.pg.execute(&insert(3, "account"));
    new.write(files.path(), "client");
    wait_for_confirmation(&rig);
    stop(relay);
    assert_eq!(rig.ids(), [1, 2, 3].map(uuid));
}

/// What gets a relay into Postgres, and is renewed there first.
fn is_found(
    rig: &Rig,
    args: &[&str],
    env: &[(&str, &str)],
    renew: impl FnOnce(),
    refusal: &str,
    write: impl FnOnce(),
) {
    let servers = rig.nats.url();
    let more = ["-nats", &servers, "-hold-back", "0"];
    let relay = Relay::run(&[args, &more].concat(), env);
    rig.pg.execute(&insert(1, "account"));
    wait_for_confirmation(rig);
    // the session stays
    renew();
    rig.pg.execute(&insert(2, "account"));
    wait_for_confirmation(rig);
    // the next one does not come about before the file is there
    let mark = relay.log().len();
    rig.pg.restart();
    relay.wait_for_log_after(mark, refusal, DEADLINE);
    rig.pg.execute(&insert(3, "account"));
    write();
    wait_for_confirmation(rig);
    stop(relay);
    assert_eq!(rig.ids(), [1, 2, 3].map(uuid));
}

fn rig(pg: postgres::Builder) -> Rig {
    let rig = Rig::start_with(pg);
    rig.pg
        .execute("CREATE ROLE relay LOGIN REPLICATION PASSWORD 'first'");
    rig
}

fn by_password() -> Rig {
    rig(Postgres::builder().hba("host all,replication relay,other 127.0.0.1/32 scram-sha-256"))
}

fn url(rig: &Rig, user: &str) -> String {
    format!("postgres://{user}@127.0.0.1:{}/postgres", rig.pg.port())
}

#[test]
fn a_password_that_is_renewed_in_the_password_file_is_found_at_the_next_connect() {
    let rig = by_password();
    let files = temp_dir("renewed-");
    let line = |password: &str| write(files.path(), "secret", &format!("*:*:*:relay:{password}\n"));
    line("first");
    is_found(
        &rig,
        &["-db", &url(&rig, "relay")],
        &[("PGPASSFILE", &path(&files, "secret"))],
        || rig.pg.execute("ALTER ROLE relay PASSWORD 'second'"),
        "password authentication failed",
        || line("second"),
    );
}

/// With another user, as those have it who give out a role for a while.
#[test]
fn a_user_that_is_renewed_in_the_file_of_db_file_is_found_at_the_next_connect() {
    let rig = by_password();
    let files = temp_dir("renewed-");
    let line = |user: &str| write(files.path(), "secret", &(url(&rig, user) + "\n"));
    line("relay:first");
    is_found(
        &rig,
        &["-db-file", &path(&files, "secret")],
        &[],
        || {
            rig.pg.execute(
                "CREATE ROLE other LOGIN REPLICATION PASSWORD 'second'; ALTER ROLE relay NOLOGIN",
            );
        },
        "not permitted to log in",
        || line("other:second"),
    );
}

#[test]
fn certificates_of_postgres_that_another_authority_has_issued_are_found_at_the_next_connect() {
    let (old, new) = (Issued::new(), Issued::new());
    let pg = Postgres::builder()
        .hba("hostssl all,replication relay 127.0.0.1/32 cert")
        .setting("ssl", "on")
        .setting("ssl_cert_file", "server.crt")
        .setting("ssl_key_file", "server.key")
        .setting("ssl_ca_file", "ca.crt");
    let pg = (old.0.iter()).fold(pg, |pg, (name, text)| pg.file(name, text.as_str()));
    let rig = rig(pg);
    let files = temp_dir("renewed-");
    old.write(files.path(), "client");
    let (ca, cert, key) = (
        path(&files, "ca.crt"),
        path(&files, "client.crt"),
        path(&files, "client.key"),
    );
    let db = format!(
        "{}?sslmode=verify-full&sslrootcert={ca}&sslcert={cert}&sslkey={key}",
        url(&rig, "relay")
    );
    is_found(
        &rig,
        &["-db", &db],
        &[],
        || new.write(&rig.pg.data_dir(), "server"),
        "invalid peer certificate",
        || new.write(files.path(), "client"),
    );
}

/// At the first start there is nothing to wait for.
#[test]
fn a_password_that_was_never_right_ends_the_relay() {
    let rig = by_password();
    halts(
        Relay::run(
            &["-db", &url(&rig, "relay:wrong"), "-nats", &rig.nats.url()],
            &[],
        ),
        78,
        &["28P01", "check the password"],
    );
}

/// Nobody has let it in again.
#[test]
fn a_relay_that_is_kept_out_for_longer_than_the_longest_outage_ends_by_name() {
    let rig = Rig::start();
    rig.pg.execute("CREATE ROLE svc LOGIN REPLICATION");
    let db = rig.pg.url("svc", "postgres");
    let relay = rig.relay(&["-db", &db, "-max-outage", "2s"]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    rig.pg.execute("ALTER ROLE svc NOLOGIN");
    rig.pg.terminate_walsender();
    halts(relay, 78, &["not permitted to log in"]);
}
