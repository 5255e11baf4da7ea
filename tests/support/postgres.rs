//! A private Postgres cluster: its own folder, port and processes.
//!
//! The server refuses to run as root; the tests then run it as the user `postgres`. `initdb` runs once a
//! test program and is copied after that (0.1 s instead of 0.7 s), so the clusters share a system id
//! unless [`Builder::own_system_id`] is asked for. fsync is off: a killed server loses nothing that the
//! operating system has. The superuser is `postgres`, trusted on the socket and on 127.0.0.1.

use super::files::{copy_folder, run, temp_dir};
use super::ports::{TRIES, free_port};
use super::process::{Process, Signal, lock, send};
use super::wait::{eventually, secs};
use jetstream_outbox::postgres::Lsn;
use postgres::types::FromSql;
use postgres::{Client, NoTls};
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;
use tempfile::TempDir;

/// How long a start, with crash recovery, or a stop may take on a busy machine.
const START_DEADLINE: Duration = secs(60);

/// How long a server that is no longer needed may take to end: an immediate shutdown waits for nothing.
const DROP_DEADLINE: Duration = secs(5);

/// The seed README's set-up of the database, to the letter; one statement a transaction, as psql runs them.
pub const SEED_SETUP: [&str; 4] = [
    "CREATE TABLE outbox (
    id uuid NOT NULL PRIMARY KEY,
    aggregatetype character varying(255) NOT NULL,
    aggregateid character varying(255) NOT NULL,
    payload jsonb
);",
    "AlTER TABLE outbox REPLICA IDENTITY DEFAULT;",
    "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox;",
    "SELECT pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput');",
];

/// Shared memory for parallel queries stands in the data folder: there it goes with the folder, also after
/// a kill, and nothing depends on the machine's /dev/shm.
const BASE_SETTINGS: &str = "\
dynamic_shared_memory_type = mmap
listen_addresses = '127.0.0.1'
wal_level = logical
max_replication_slots = 20
max_wal_senders = 20
fsync = off
log_min_messages = info
log_replication_commands = on
log_line_prefix = '%m [%p] %u@%d '
";

/// The user that owns the servers when the tests run as root.
#[derive(Clone, Copy)]
struct Account {
    uid: u32,
    gid: u32,
}

static ACCOUNT: LazyLock<Option<Account>> = LazyLock::new(|| {
    if !rustix::process::getuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").expect("read /etc/passwd");
    let found = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != "postgres" {
            return None;
        }
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Account { uid, gid })
    });
    Some(found.expect("as root the cluster runs as the user postgres, which does not exist: run scripts/test, it installs Debian's postgresql-15"))
});

static BIN: LazyLock<PathBuf> = LazyLock::new(|| {
    find_bin().expect("no Postgres server found (PG_BIN, /usr/lib/postgresql/*/bin, pg_config --bindir): run scripts/test, it gets one")
});

static MAJOR_VERSION: LazyLock<u32> = LazyLock::new(|| {
    let output = program("postgres").arg("--version").output();
    let output = output.expect("run postgres --version").stdout;
    let text = String::from_utf8_lossy(&output).into_owned();
    // 18.4, or 19rc1
    let number = text
        .split(' ')
        .nth(2)
        .and_then(|version| version.split(|c: char| !c.is_ascii_digit()).next());
    number
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("read the version of Postgres: {text:?}"))
});

static TEMPLATE: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = server_dir();
    initdb(&dir.path().join("data"), &[]);
    dir
});

fn find_bin() -> Option<PathBuf> {
    let has_server = |bin: &PathBuf| bin.join("postgres").exists() && bin.join("initdb").exists();
    if let Some(bin) = std::env::var_os("PG_BIN") {
        return Some(PathBuf::from(bin)).filter(has_server);
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let newest = versions
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let version: u32 = path.file_name()?.to_str()?.parse().ok()?;
            Some((version, path.join("bin"))).filter(|(_, bin)| has_server(bin))
        })
        .max();
    if let Some((_, bin)) = newest {
        return Some(bin);
    }
    let output = Command::new("pg_config").arg("--bindir").output().ok()?;
    let bin = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    Some(bin).filter(has_server)
}

/// A folder that the server's user owns.
fn server_dir() -> TempDir {
    let dir = temp_dir("pg-");
    give_to_server(dir.path());
    dir
}

fn give_to_server(path: &Path) {
    if let Some(account) = *ACCOUNT {
        chown(path, Some(account.uid), Some(account.gid)).expect("chown as root");
    }
}

/// A program of the Postgres installation, run as the server's user.
fn program(name: &str) -> Command {
    let mut command = Command::new(BIN.join(name));
    command.current_dir("/").env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("LC_ALL", "C");
    if let Some(account) = *ACCOUNT {
        command.uid(account.uid).gid(account.gid);
    }
    command
}

/// Has a program that refuses to run as root run as the server's user, who may read `folder`.
pub fn as_server(command: &mut Command, folder: &Path) {
    if let Some(account) = *ACCOUNT {
        give_to_server(folder);
        command.uid(account.uid).gid(account.gid);
    }
}

fn initdb(data: &Path, options: &[&str]) {
    run(program("initdb")
        .args(["--no-sync", "--auth=trust", "--username=postgres"])
        .args(["--locale=C", "--encoding=UTF8"])
        .args(options)
        .arg("--pgdata")
        .arg(data));
}

/// What a cluster is to be; see [`Postgres::builder`].
#[derive(Default)]
pub struct Builder {
    settings: Vec<(String, String)>,
    hba: String,
    hba_alone: bool,
    files: Vec<(String, Vec<u8>)>,
    own_system_id: bool,
    on: Option<PathBuf>,
}

impl Builder {
    /// Puts the data folder under this one, on a disk that may lose power: with checksums, and fsync on.
    pub fn on_disk(mut self, folder: &Path) -> Builder {
        self.on = Some(folder.join("data"));
        self.setting("fsync", "on")
    }

    /// A line of postgresql.conf; it beats the fixture's own.
    pub fn setting(mut self, name: &str, value: &str) -> Builder {
        self.settings.push((name.to_string(), value.to_string()));
        self
    }

    /// Lines of pg_hba.conf that go before the fixture's, which trust everybody on the socket and on
    /// 127.0.0.1. Name a user in them and not `all`, or the fixture locks itself out.
    pub fn hba(mut self, lines: &str) -> Builder {
        self.hba.push_str(lines);
        self.hba.push('\n');
        self
    }

    /// Nobody is trusted over TCP: only [`Builder::hba`] lets in there.
    pub fn hba_alone(mut self) -> Builder {
        self.hba_alone = true;
        self
    }

    /// A file in the data folder, readable by the server alone: certificates and keys.
    pub fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Builder {
        self.files.push((name.to_string(), content.into()));
        self
    }

    /// Runs an `initdb` of its own, so that the system id is nobody else's.
    pub fn own_system_id(mut self) -> Builder {
        self.own_system_id = true;
        self
    }

    /// Makes and starts it, and waits until it answers.
    pub fn build(self) -> Postgres {
        let dir = server_dir();
        let data = self.data_in(&dir);
        if let Some(disk) = self.on.as_ref().and_then(|data| data.parent()) {
            give_to_server(disk);
            initdb(&data, &["--data-checksums"]);
        } else if self.own_system_id {
            initdb(&data, &[]);
        } else {
            copy_folder(&TEMPLATE.path().join("data"), &data);
        }
        self.start_in(dir)
    }

    /// Makes it a standby of `primary`, which is stopped and started again for it: the copy of a stopped server
    /// needs no pg_basebackup, which the packages of the newer versions do not have. It streams through a physical
    /// slot of its own and, from 17 on, keeps the primary's failover slots synchronized.
    pub fn build_standby_of(self, primary: &Postgres, slot: &str) -> Postgres {
        primary.add_standby_slot(slot);
        let dir = server_dir();
        let data = dir.path().join("data");
        primary.stop_fast();
        copy_folder(&primary.data_dir(), &data);
        primary.start_again();
        // the primary's slots are not the standby's
        for slot in fs::read_dir(data.join("pg_replslot")).expect("read the folder of slots") {
            let slot = slot.expect("read the folder of slots").path();
            fs::remove_dir_all(slot).expect("remove a slot");
        }
        write_private(&data.join("standby.signal"), b"");
        let mut standby = self
            .setting("primary_conninfo", &primary.conninfo())
            .setting("primary_slot_name", slot)
            .setting("hot_standby_feedback", "on")
            // or the walreceiver waits 5 s when it comes before its primary
            .setting("wal_retrieve_retry_interval", "200ms");
        if Postgres::major_version() >= 17 {
            standby = standby.setting("sync_replication_slots", "on");
        }
        standby.start_in(dir)
    }

    /// Makes it a clone of a snapshot ([`Postgres::snapshot`]), with its slots, that was promoted.
    pub fn build_promoted_clone(self, snapshot: &TempDir) -> Postgres {
        let dir = server_dir();
        let data = dir.path().join("data");
        copy_folder(&snapshot.path().join("data"), &data);
        write_private(&data.join("standby.signal"), b"");
        let clone = self.start_in(dir);
        clone.promote();
        clone
    }

    fn data_in(&self, dir: &TempDir) -> PathBuf {
        let beside = || dir.path().join("data");
        self.on.clone().unwrap_or_else(beside)
    }

    /// Configures and starts the cluster whose data folder is in `dir` already.
    fn start_in(self, dir: TempDir) -> Postgres {
        let data = self.data_in(&dir);
        let mut conf = BASE_SETTINGS.to_string();
        for (name, value) in &self.settings {
            conf += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        }
        let mut hba = self.hba + "local all,replication all trust\n";
        if !self.hba_alone {
            hba += "host all,replication all 127.0.0.1/32 trust\n";
        }
        write_private(&data.join("postgresql.conf"), conf.as_bytes());
        write_private(&data.join("pg_hba.conf"), hba.as_bytes());
        for (name, content) in &self.files {
            write_private(&data.join(name), content);
        }
        let server = Postgres {
            dir,
            data,
            port: Mutex::new(free_port()),
            server: Mutex::new(None),
        };
        for _ in 0..TRIES {
            let Err(Exited { log }) = server.try_start() else {
                return server;
            };
            // another program took the port between our look and the server's
            assert!(
                log.contains("Address already in use"),
                "start Postgres:\n{log}"
            );
            *lock(&server.port) = free_port();
        }
        panic!("start Postgres: {TRIES} ports were all taken");
    }
}

fn write_private(path: &Path, content: &[u8]) {
    fs::write(path, content).expect("write a file of the cluster");
    fs::set_permissions(path, Permissions::from_mode(0o600)).expect("set its mode");
    give_to_server(path);
}

/// The server ended instead of answering.
struct Exited {
    log: String,
}

/// A cluster of our own. All methods take `&self`: a test may poll from one thread and break from another.
pub struct Postgres {
    dir: TempDir,
    data: PathBuf,
    port: Mutex<u16>,
    server: Mutex<Option<Process>>,
}

impl Postgres {
    /// A running cluster with the settings that suit most tests.
    pub fn start() -> Postgres {
        Postgres::builder().build()
    }

    /// A cluster with settings of the test's own.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Where Postgres' own programs are: `pg_recvlogical`, `pg_basebackup`, `psql`.
    pub fn bin() -> &'static Path {
        &BIN
    }

    /// Reads every page of a stopped server: each must have the checksum that it says.
    pub fn check_pages(&self) {
        self.assert_stopped();
        run(program("pg_checksums")
            .arg("--check")
            .arg("--pgdata")
            .arg(self.data_dir()));
    }

    /// The first number of its version.
    pub fn major_version() -> u32 {
        *MAJOR_VERSION
    }

    /// The TCP port on 127.0.0.1; it stays the same over restarts.
    pub fn port(&self) -> u16 {
        *lock(&self.port)
    }

    /// The folder that holds the Unix socket.
    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    /// The data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.data.clone()
    }

    /// A connection URL over TCP.
    pub fn url(&self, user: &str, db: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{db}", self.port())
    }

    /// A session as superuser in the database `postgres`, over the Unix socket.
    #[track_caller]
    pub fn client(&self) -> Client {
        self.try_client()
            .unwrap_or_else(|error| panic!("connect to Postgres: {error:?}"))
    }

    /// The same, for a server that may be down.
    pub fn try_client(&self) -> Result<Client, postgres::Error> {
        self.client_of("postgres")
    }

    /// A session as superuser in another database.
    pub fn client_of(&self, db: &str) -> Result<Client, postgres::Error> {
        postgres::Config::new()
            .host_path(self.socket_dir())
            .port(self.port())
            .user("postgres")
            .dbname(db)
            .connect_timeout(secs(10))
            .connect(NoTls)
    }

    /// Runs statements in a session of their own.
    #[track_caller]
    pub fn execute(&self, sql: &str) {
        if let Err(error) = self.client().batch_execute(sql) {
            panic!("execute {sql}: {error:?}");
        }
    }

    /// The first column of the one row that a query answers; `None` when it answers no row.
    #[track_caller]
    pub fn scalar<T: for<'a> FromSql<'a>>(&self, sql: &str) -> Option<T> {
        match self.client().query_opt(sql, &[]) {
            Ok(row) => row.map(|row| row.get(0)),
            Err(error) => panic!("query {sql}: {error:?}"),
        }
    }

    /// The seed README's table, publication and slot.
    pub fn seed_setup(&self) {
        SEED_SETUP.iter().for_each(|sql| self.execute(sql));
    }

    /// What the slot's consumer has confirmed.
    #[track_caller]
    pub fn confirmed_flush_lsn(&self, slot: &str) -> Lsn {
        let text: String = self.slot(slot, "confirmed_flush_lsn::text");
        text.parse().expect("Postgres prints LSNs")
    }

    /// Whether somebody is consuming the slot.
    #[track_caller]
    pub fn slot_active(&self, slot: &str) -> bool {
        self.slot(slot, "active")
    }

    #[track_caller]
    fn slot<T: for<'a> FromSql<'a>>(&self, slot: &str, column: &str) -> T {
        let sql = format!("SELECT {column} FROM pg_replication_slots WHERE slot_name = '{slot}'");
        self.scalar(&sql)
            .unwrap_or_else(|| panic!("no slot {slot}"))
    }

    /// The end of the log as of now.
    #[track_caller]
    pub fn current_wal_lsn(&self) -> Lsn {
        let text: Option<String> = self.scalar("SELECT pg_current_wal_lsn()::text");
        text.expect("one row")
            .parse()
            .expect("Postgres prints LSNs")
    }

    /// Waits until the standby has replayed all that this primary has written.
    #[track_caller]
    pub fn wait_for_standby(&self, standby: &Postgres) {
        let target = self.current_wal_lsn();
        let replayed = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{target}', false)");
        eventually("the standby to catch up", START_DEADLINE, || {
            standby.scalar::<bool>(&replayed) == Some(true)
        });
    }

    /// A physical slot, which holds the log for a standby.
    pub fn add_standby_slot(&self, slot: &str) {
        self.execute(&format!(
            "SELECT pg_create_physical_replication_slot('{slot}', true)"
        ));
    }

    /// Has this standby follow another server.
    pub fn follow(&self, primary: &Postgres) {
        self.execute(&format!(
            "ALTER SYSTEM SET primary_conninfo = '{}'",
            primary.conninfo()
        ));
        self.execute("SELECT pg_reload_conf()");
    }

    /// How a standby reaches it.
    fn conninfo(&self) -> String {
        format!(
            "host={} port={} user=postgres dbname=postgres",
            self.socket_dir().display(),
            self.port()
        )
    }

    /// Makes this standby a primary on a new timeline.
    #[track_caller]
    pub fn promote(&self) {
        let promoted = self.scalar::<bool>("SELECT pg_promote(true, 60)");
        assert_eq!(promoted, Some(true), "promote the standby");
    }

    /// Ends every replication session from the server's side, and says how many there were.
    #[track_caller]
    pub fn terminate_walsender(&self) -> i64 {
        self.scalar("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_replication")
            .expect("one row")
    }

    /// What the server has logged, all starts together.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Stop (fast) and start.
    pub fn restart(&self) {
        self.stop_fast();
        self.start_again();
    }

    /// Sessions are ended, walsenders are waited for, a checkpoint is written.
    pub fn stop_fast(&self) {
        self.stop(Signal::INT);
    }

    /// Sessions are ended at once; the next start recovers.
    pub fn stop_immediate(&self) {
        self.stop(Signal::QUIT);
    }

    /// It ends when its last session does, and lets nobody in until then.
    pub fn let_run_out(&self) {
        self.signal(Signal::TERM);
    }

    /// Copies the data folder of a stopped server: a snapshot of its disk.
    pub fn snapshot(&self) -> TempDir {
        self.assert_stopped();
        let snapshot = server_dir();
        copy_folder(&self.data_dir(), &snapshot.path().join("data"));
        snapshot
    }

    /// Puts the disk of a stopped server back to a snapshot.
    pub fn restore(&self, snapshot: &TempDir) {
        self.assert_stopped();
        copy_folder(&snapshot.path().join("data"), &self.data_dir());
    }

    /// Puts the disk of a stopped server back to a snapshot, starts it as a standby, and promotes it: a clone of that snapshot in
    /// this server's place.
    pub fn restore_promoted(&self, snapshot: &TempDir) {
        self.restore(snapshot);
        write_private(&self.data_dir().join("standby.signal"), b"");
        self.start_again();
        self.promote();
    }

    /// What initdb has called this system.
    #[track_caller]
    pub fn system_id(&self) -> u64 {
        let id: Option<String> =
            self.scalar("SELECT system_identifier::text FROM pg_control_system()");
        id.expect("one row").parse().expect("it is a number")
    }

    fn assert_stopped(&self) {
        assert!(lock(&self.server).is_none(), "stop the server first");
    }

    /// SIGSTOP to every process of the cluster: the connections stay open, the system still takes new ones, and
    /// nothing moves.
    pub fn freeze(&self) {
        let postmaster = self.signal(Signal::STOP); // first, so that it forks no more while we look
        for child in children_of(postmaster) {
            send(child, Signal::STOP);
        }
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        let postmaster = lock(&self.server).as_ref().map(Process::id);
        for child in children_of(postmaster.expect("the server is running")) {
            send(child, Signal::CONT);
        }
        self.signal(Signal::CONT);
    }

    /// To the postmaster, whose process id it tells.
    fn signal(&self, signal: Signal) -> u32 {
        let mut server = lock(&self.server);
        let process = server.as_mut().expect("the server is running");
        process.signal(signal);
        process.id()
    }

    fn stop(&self, signal: Signal) {
        let mut server = lock(&self.server);
        if let Some(process) = server.as_mut() {
            process.signal(signal);
            process.wait_exit(START_DEADLINE);
        }
        *server = None;
    }

    /// SIGKILL to every process of the cluster, as a machine that loses power kills them; waits until they
    /// are gone, because the next start needs their shared memory released.
    pub fn kill(&self) {
        let mut server = lock(&self.server);
        let Some(mut process) = server.take() else {
            return;
        };
        process.signal(Signal::STOP); // so that it forks no more while we look
        let children = children_of(process.id());
        process.kill();
        for &child in &children {
            send(child, Signal::KILL);
        }
        eventually(
            "the children of Postgres to be gone",
            START_DEADLINE,
            || children.iter().all(|&child| !is_running(child)),
        );
    }

    /// Starts it where it was stopped or killed, on the same port.
    #[track_caller]
    pub fn start_again(&self) {
        eventually("Postgres to start again", START_DEADLINE, || {
            match self.try_start() {
                Ok(()) => true,
                Err(Exited { log }) if log.contains("Address already in use") => false,
                Err(Exited { log }) => panic!("start Postgres again:\n{log}"),
            }
        });
    }

    fn try_start(&self) -> Result<(), Exited> {
        let mut server = lock(&self.server);
        assert!(server.is_none(), "Postgres is running already");
        let log_before = self.log().len();
        let log = open_log(&self.log_path());
        let mut process = Process::spawn(
            "Postgres",
            program("postgres")
                .arg("-D")
                .arg(self.data_dir())
                .arg("-k")
                .arg(self.socket_dir())
                .arg("-p")
                .arg(self.port().to_string())
                .stdout(log.try_clone().expect("duplicate a file handle"))
                .stderr(log),
        );
        let ready = eventually("Postgres to answer", START_DEADLINE, || {
            if process.try_exit().is_some() {
                return Some(false);
            }
            self.try_client().ok().map(|_| true)
        });
        if !ready {
            let log = self.log().split_off(log_before);
            return Err(Exited { log });
        }
        *server = Some(process);
        Ok(())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- log of Postgres ----\n{}", self.log());
        }
        // in order, so that it gives its shared memory back; what does not end soon is killed
        if let Some(process) = lock(&self.server).as_mut() {
            process.signal(Signal::QUIT);
            process.ends_within(DROP_DEADLINE);
        }
        self.kill();
    }
}

fn open_log(path: &Path) -> File {
    let log = OpenOptions::new().create(true).append(true).open(path);
    log.expect("open the log of Postgres")
}

/// The processes whose parent is `parent`, from /proc.
fn children_of(parent: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("read /proc").flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&pid| stat_field(pid, 1) == Some(parent.to_string()))
        .collect()
}

/// Whether the process exists and is no zombie.
fn is_running(pid: u32) -> bool {
    stat_field(pid, 0).is_some_and(|state| state != "Z")
}

/// A field of /proc/PID/stat, counted from the one behind the command name (which may hold spaces).
fn stat_field(pid: u32, index: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(index).map(str::to_string)
}
