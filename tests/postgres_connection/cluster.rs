//! A Postgres with certificates and a user for every authentication method.

use crate::support::postgres::Postgres;
use jetstream_outbox::postgres::{ConnInfo, Connection, Error};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError, Weak};

const SETTINGS: [(&str, &str); 6] = [
    ("listen_addresses", "127.0.0.1,::1"),
    ("password_encryption", "scram-sha-256"),
    ("ssl", "on"),
    ("ssl_cert_file", "server.crt"),
    ("ssl_key_file", "server.key"),
    ("ssl_ca_file", "ca.crt"),
];

const HBA: &str = "\
host      all         postgres     all trust
host      all         by_password  all password
host      all         by_md5       all md5
host      all         by_scram     all scram-sha-256
host      all         by_gss       all gss
hostssl   all         by_cert      all cert
hostssl   all         by_both      all scram-sha-256 clientcert=verify-full
hostssl   all         only_tls     all scram-sha-256
hostnossl all         only_plain   all scram-sha-256
";

const USERS: &str = "
CREATE ROLE by_password LOGIN REPLICATION PASSWORD 'pass word';
CREATE ROLE by_scram LOGIN REPLICATION PASSWORD 'pass word';
CREATE ROLE by_gss LOGIN REPLICATION;
CREATE ROLE by_cert LOGIN REPLICATION;
CREATE ROLE by_both LOGIN REPLICATION PASSWORD 'pass word';
CREATE ROLE only_tls LOGIN REPLICATION PASSWORD 'pass word';
CREATE ROLE only_plain LOGIN REPLICATION PASSWORD 'pass word';
SET password_encryption = 'md5';
CREATE ROLE by_md5 LOGIN REPLICATION PASSWORD 'pass word';
";

/// A running server.
pub struct Cluster {
    pg: Postgres,
    pub port: u16,
}

/// The server that the tests share while at least one of them holds it.
pub fn primary() -> Arc<Cluster> {
    static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let cluster = Arc::new(Cluster::start(certificates()));
        *shared = Arc::downgrade(&cluster);
        cluster
    })
}

impl Cluster {
    /// With these files in its data folder: it shows `server.crt`, and trusts clients with certificates of `ca.crt`.
    pub fn start(files: Vec<(String, String)>) -> Cluster {
        let mut builder = Postgres::builder().hba(HBA).hba_alone();
        for (name, value) in SETTINGS {
            builder = builder.setting(name, value);
        }
        for (name, content) in files {
            builder = builder.file(&name, content);
        }
        let pg = builder.build();
        pg.execute(USERS);
        Cluster {
            port: pg.port(),
            pg,
        }
    }

    /// The folder of the Unix socket.
    pub fn socket(&self) -> String {
        self.pg.socket_dir().display().to_string()
    }

    /// A connection string for the superuser over the Unix socket.
    pub fn admin(&self) -> String {
        let (folder, port) = (self.socket(), self.port);
        format!("host={folder} port={port} user=postgres dbname=postgres")
    }

    /// A connection string over TCP to 127.0.0.1, with `more` parameters.
    pub fn tcp(&self, user: &str, more: &str) -> String {
        let port = self.port;
        format!("host=127.0.0.1 port={port} user={user} dbname=postgres {more}")
    }

    /// One of its files, for its clients.
    pub fn file(&self, name: &str) -> String {
        self.pg.data_dir().join(name).display().to_string()
    }

    pub fn sql(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        connect(&self.admin()).unwrap().simple_query(sql).unwrap()
    }
}

/// Whether a connection to `address` can be tested: not to ::1 on a machine without IPv6, of which it tells.
pub fn reachable(address: &str) -> bool {
    let reachable = !address.contains("::1") || TcpListener::bind("[::1]:0").is_ok();
    if !reachable {
        eprintln!("skipped, there is no IPv6 here: {address}");
    }
    reachable
}

/// Connects with an environment that holds a home without files, and nothing else.
pub fn connect(text: &str) -> Result<Connection, Error> {
    connect_with(text, &[])
}

pub fn connect_with(text: &str, env: &[(&str, &str)]) -> Result<Connection, Error> {
    let find = |name: &str| {
        let found = env.iter().find(|(key, _)| *key == name);
        match (found, name) {
            (Some((_, value)), _) => Some(value.to_string()),
            (None, "HOME") => Some("/nonexistent".into()),
            _ => None,
        }
    };
    Connection::connect(&ConnInfo::parse(text, &find).expect(text))
}

/// Names and contents: `ca.crt` signs `server.crt` (for 127.0.0.1 and localhost), `by_cert.crt` and `by_both.crt`;
/// `other_ca.crt` signs nothing.
fn certificates() -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut authority = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).unwrap();
        files.push((format!("{name}.crt"), certificate.pem()));
        Issuer::new(params, key)
    };
    authority("other_ca");
    let ca = authority("ca");
    let server: &[&str] = &["127.0.0.1", "localhost"];
    for (name, alternatives, usage) in [
        ("server", server, ExtendedKeyUsagePurpose::ServerAuth),
        ("by_cert", &[], ExtendedKeyUsagePurpose::ClientAuth),
        ("by_both", &[], ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate().unwrap();
        let alternatives: Vec<String> = alternatives.iter().map(|name| name.to_string()).collect();
        let mut params = CertificateParams::new(alternatives).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages.push(usage);
        let certificate = params.signed_by(&key, &ca).unwrap();
        files.push((format!("{name}.crt"), certificate.pem()));
        files.push((format!("{name}.key"), key.serialize_pem()));
    }
    files
}
