//! A PostgreSQL of the tests' own: certificates, users for every authentication method, free ports.

use jetstream_outbox::postgres::{ConnInfo, Connection, Error};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const SETTINGS: &str = "
fsync = off
wal_level = logical
max_wal_senders = 30
max_replication_slots = 30
max_connections = 60
listen_addresses = '127.0.0.1,::1'
password_encryption = 'scram-sha-256'
ssl = on
ssl_cert_file = 'server.crt'
ssl_key_file = 'server.key'
ssl_ca_file = 'root.crt'
";

const HBA: &str = "
local     all         all          trust
local     replication all          trust
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

/// A running server and the folder with its data, socket and certificates; both go when it is dropped.
pub struct Cluster {
    folder: TempDir,
    data: PathBuf,
    pub port: u16,
    server: Child,
}

/// The primary that the tests share while at least one of them holds it.
pub fn primary() -> Arc<Cluster> {
    static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
    let mut shared = SHARED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    shared.upgrade().unwrap_or_else(|| {
        let cluster = Arc::new(Cluster::primary());
        *shared = Arc::downgrade(&cluster);
        cluster
    })
}

impl Cluster {
    fn primary() -> Cluster {
        let certificates = tempfile::tempdir().unwrap();
        make_certificates(certificates.path());
        let file = |name: &str| certificates.path().join(name);
        let (certificate, key) = (file("server.crt"), file("server.key"));
        let cluster = Cluster::with_certificate(&certificate, &key, &file("ca.crt"));
        for entry in certificates.path().read_dir().unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), cluster.folder.path().join(entry.file_name())).unwrap();
        }
        cluster
    }

    /// A server that shows this certificate, and trusts clients with certificates of `authority`.
    pub fn with_certificate(certificate: &Path, key: &Path, authority: &Path) -> Cluster {
        let folder = folder();
        let data = folder.path().join("data");
        run(command("initdb")
            .args([
                "--username=postgres",
                "--auth=trust",
                "--no-sync",
                "-E",
                "UTF8",
                "-D",
            ])
            .arg(&data));
        for (from, name) in [
            (certificate, "server.crt"),
            (key, "server.key"),
            (authority, "root.crt"),
        ] {
            let to = data.join(name);
            std::fs::copy(from, &to).unwrap();
            std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o600)).unwrap();
            give_to_server(&to);
        }
        append(&data.join("postgresql.conf"), SETTINGS);
        std::fs::write(data.join("pg_hba.conf"), HBA).unwrap();
        let cluster = Cluster::start(folder, data);
        cluster.sql(USERS);
        cluster
    }

    /// A hot standby of this one.
    pub fn standby(&self) -> Cluster {
        let folder = folder();
        let data = folder.path().join("data");
        run(command("pg_basebackup")
            .args([
                "--write-recovery-conf",
                "--no-sync",
                "--checkpoint=fast",
                "-U",
                "postgres",
            ])
            .args(["-p", &self.port.to_string()])
            .arg("-h")
            .arg(self.folder.path())
            .arg("-D")
            .arg(&data));
        Cluster::start(folder, data)
    }

    fn start(folder: TempDir, data: PathBuf) -> Cluster {
        let port = free_port();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let server = command("postgres")
            .args(["-p", &port.to_string()])
            .arg("-k")
            .arg(folder.path())
            .arg("-D")
            .arg(&data)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let cluster = Cluster {
            folder,
            data,
            port,
            server,
        };
        let end = Instant::now() + Duration::from_secs(60);
        while let Err(error) = connect(&cluster.admin()) {
            assert!(Instant::now() < end, "{error}\n{}", cluster.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        cluster
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// A connection string for the superuser over the Unix socket.
    pub fn admin(&self) -> String {
        let (folder, port) = (self.folder.path().display(), self.port);
        format!("host={folder} port={port} user=postgres dbname=postgres")
    }

    /// A connection string over TCP to 127.0.0.1, with `more` parameters.
    pub fn tcp(&self, user: &str, more: &str) -> String {
        let port = self.port;
        format!("host=127.0.0.1 port={port} user={user} dbname=postgres {more}")
    }

    /// One of the files that `make_certificates` made.
    pub fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    pub fn sql(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        connect(&self.admin()).unwrap().simple_query(sql).unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let stopped = command("pg_ctl")
            .args(["stop", "-m", "immediate", "-D"])
            .arg(&self.data)
            .stdout(Stdio::null())
            .status();
        if !stopped.is_ok_and(|status| status.success()) {
            let _ = self.server.kill();
        }
        let _ = self.server.wait();
    }
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

/// A port on which nobody listens now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("pgconn").tempdir().unwrap();
    give_to_server(folder.path());
    folder
}

/// initdb refuses root, so that root runs the server as the user `postgres`.
fn server_account() -> Option<(u32, u32)> {
    if Path::new("/proc/self").metadata().unwrap().uid() != 0 {
        return None;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd
        .lines()
        .find(|line| line.starts_with("postgres:"))
        .expect("as root the tests run the server as the user postgres");
    let mut numbers = line.split(':').skip(2).map(|n| n.parse().unwrap());
    Some((numbers.next().unwrap(), numbers.next().unwrap()))
}

fn give_to_server(path: &Path) {
    if let Some((uid, gid)) = server_account() {
        chown(path, Some(uid), Some(gid)).unwrap();
    }
}

fn command(program: &str) -> Command {
    let debian = Path::new("/usr/lib/postgresql/15/bin").join(program);
    let mut command = match debian.exists() {
        true => Command::new(debian),
        false => Command::new(program),
    };
    if let Some((uid, gid)) = server_account() {
        command.uid(uid).gid(gid);
    }
    command.current_dir("/").env_remove("PGHOST");
    command
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {message}");
}

fn append(path: &Path, text: &str) {
    let before = std::fs::read_to_string(path).unwrap();
    std::fs::write(path, before + text).unwrap();
}

/// `ca.crt` signs `server.crt` (for 127.0.0.1 and localhost), `by_cert.crt` and `by_both.crt`; `other_ca.crt`
/// signs nothing.
fn make_certificates(folder: &Path) {
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    let authority = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        write(
            &format!("{name}.crt"),
            &params.self_signed(&key).unwrap().pem(),
        );
        Issuer::new(params, key)
    };
    authority("other_ca");
    let ca = authority("ca");
    let leaf = |name: &str, alternatives: &[&str], usage: ExtendedKeyUsagePurpose| {
        let key = KeyPair::generate().unwrap();
        let alternatives: Vec<String> = alternatives.iter().map(|name| name.to_string()).collect();
        let mut params = CertificateParams::new(alternatives).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages.push(usage);
        let certificate = params.signed_by(&key, &ca).unwrap();
        write(&format!("{name}.crt"), &certificate.pem());
        write(&format!("{name}.key"), &key.serialize_pem());
    };
    leaf(
        "server",
        &["127.0.0.1", "localhost"],
        ExtendedKeyUsagePurpose::ServerAuth,
    );
    leaf("by_cert", &[], ExtendedKeyUsagePurpose::ClientAuth);
    leaf("by_both", &[], ExtendedKeyUsagePurpose::ClientAuth);
}
