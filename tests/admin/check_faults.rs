//! `check` on servers with faults: it names each, and the fix that it prints, applied as printed, makes it pass.
//!
//! The faults are in [`crate::faults`].

use crate::check_postgres::set_up;
use crate::command::run;
use crate::faults::{Fault, LATER, NATS, PUBLICATION, SERVER, SLOTS, TOGETHER};
use crate::rig::{DEADLINE, Rig};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::wait::eventually;
use jetstream_outbox::postgres::{ConnInfo, Connection};
use serde_json::{Value, json};
use std::any::Any;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;

/// In place of a statement: the server starts again.
pub const RESTART: &str = "restart Postgres";
/// What comes of altering the publication and passes by itself, and how full the machine's disk is.
const NOT_OURS: [&str; 2] = ["postgres.publication_age", "postgres.disk"];

/// What makes a fault, as long as it is there, and where it is seen.
#[derive(Default)]
pub struct Held {
    _while_there: Option<Box<dyn Any>>,
    /// `-db`; `None`: superuser, straight to the server.
    db: Option<String>,
    /// Where statements are run; `None`: `postgres`.
    database: Option<&'static str>,
}

impl Held {
    /// It ends with this.
    pub fn while_there(it: impl Any) -> Held {
        Held {
            _while_there: Some(Box::new(it)),
            ..Held::default()
        }
    }

    /// It is seen on this way.
    pub fn by(mut self, db: String) -> Held {
        self.db = Some(db);
        self
    }

    /// It is seen in this database, which `setup` prepares.
    #[track_caller]
    pub fn set_up_in(rig: &Rig, database: &'static str) -> Held {
        let db = rig.pg.url("postgres", database);
        run(&["setup", "-db", &db, "-nats", &rig.nats.url()], &[]).with(0);
        Held {
            database: Some(database),
            ..Held::default().by(db)
        }
    }
}

/// A server, and what is known of it.
struct Place {
    rig: Rig,
    held: Held,
    flags: Vec<String>,
    relay_ran: bool,
    /// The certificate of the server.
    ca: PathBuf,
}

impl Place {
    /// As `setup` leaves it. A commit never waits for a standby that is not there.
    fn new() -> Place {
        let names = ["127.0.0.1", "0.0.0.0"].map(str::to_string);
        let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
        let pg = Postgres::builder()
            .setting("synchronous_commit", "local")
            .setting("max_prepared_transactions", "5")
            .setting("ssl_cert_file", "server.crt")
            .setting("ssl_key_file", "server.key")
            .file("server.crt", made.cert.pem())
            .file("server.key", made.signing_key.serialize_pem());
        let rig = set_up(pg);
        Place {
            ca: rig.pg.data_dir().join("server.crt"),
            rig,
            held: Held::default(),
            flags: Vec::new(),
            relay_ran: false,
        }
    }

    fn db(&self) -> String {
        let straight = || self.rig.pg.url("postgres", "postgres");
        self.held.db.clone().unwrap_or_else(straight)
    }

    /// Runs a command with the flags of the relay.
    fn command(&self, args: &[&str]) -> crate::command::Ended {
        let (db, nats) = (self.db(), self.rig.nats.url());
        let mut all = args.to_vec();
        all.extend(self.flags.iter().map(String::as_str));
        all.extend(["-db", &db, "-nats", &nats]);
        run(&all, &[])
    }

    /// The findings that are not ok, and that `fault` is about.
    #[track_caller]
    fn bad(&self, fault: &Fault) -> Vec<Value> {
        let ended = self.command(&["check", "-json"]);
        let report: Value =
            serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
        let findings = report["findings"].as_array().expect("a list").clone();
        let is_ours = |finding: &Value| {
            let is_expected = fault.findings.iter().any(|it| finding["name"] == it.0);
            is_expected || NOT_OURS.iter().all(|name| finding["name"] != *name)
        };
        let is_bad = |finding: &Value| finding["level"] != "ok" && is_ours(finding);
        findings.into_iter().filter(is_bad).collect()
    }

    fn make(&mut self, fault: &Fault) {
        self.flags = fault.flags.iter().map(|flag| flag.to_string()).collect();
        if let Some(first) = fault.first {
            self.held = first(&self.rig);
        }
        for sql in fault.sql {
            match *sql {
                RESTART => self.rig.pg.restart(),
                sql => self.rig.pg.execute(sql),
            }
        }
    }

    /// Makes the fault, expects it alone to be found, and fixes one finding after the other until nothing is left.
    #[track_caller]
    fn is_found_and_fixed(&mut self, fault: &Fault) {
        self.make(fault);
        // a setting is read some time after the reload
        eventually(&format!("{:?}", fault.findings), DEADLINE, || {
            let found = self.bad(fault);
            let is = |(finding, (name, level, part)): (&Value, &(&str, &str, &str))| {
                finding["name"] == *name
                    && finding["level"] == *level
                    && text(finding, "found").contains(part)
            };
            let all =
                found.len() == fault.findings.len() && found.iter().zip(fault.findings).all(is);
            all.then_some(()).ok_or(found)
        });
        // a fix may bring another to light
        for _ in 0..=fault.findings.len() + 1 {
            let left = self.bad(fault);
            let Some(first) = left.first() else {
                return;
            };
            self.apply(first);
            let same = |it: &Value| it["name"] == first["name"] && it["found"] == first["found"];
            eventually(&format!("{first} to be fixed"), DEADLINE, || {
                let left = self.bad(fault);
                (!left.iter().any(same)).then_some(()).ok_or(left)
            });
        }
        panic!("left of {:?}: {:#?}", fault.findings, self.bad(fault));
    }

    /// Does what the fix says, as an operator would.
    #[track_caller]
    fn apply(&mut self, finding: &Value) {
        let fix = text(finding, "fix");
        let (first, comment) = fix.split_once(" -- ").unwrap_or((fix, ""));
        match first.ends_with(';') {
            true => {
                let database = self.held.database.unwrap_or("postgres");
                apply(&self.rig, database, first);
            }
            false => self.follow(fix),
        }
        if comment.contains("then restart Postgres") {
            self.rig.pg.restart();
        }
        if comment.contains("add sslmode=verify-full to -db") {
            let (db, ca) = (self.db(), self.ca.display());
            self.held.db = Some(format!("{db}?sslmode=verify-full&sslrootcert={ca}"));
        }
    }

    /// What is no statement.
    #[track_caller]
    fn follow(&mut self, fix: &str) {
        let after = |part: &str| Some(fix.split_once(part)?.1.split(';').next()?.to_string());
        if let Some(tables) = fix.strip_prefix("-table ") {
            self.flags = vec!["-table".into(), tables.into()];
        } else if let Some(statement) = after("if its rows are no events (") {
            self.rig.pg.execute(statement.trim_end_matches(')'));
        } else if let Some(table) = after("add to -table: ") {
            self.flags[1] += &format!(",{table}");
        } else if let Some(slot) = after("jetstream-outbox setup -slot ") {
            self.flags.extend(["-slot".into(), slot]);
            self.set_up();
        } else if fix.starts_with("run the statement that jetstream-outbox setup prints") {
            self.set_up();
        } else if fix.starts_with("jetstream-outbox setup") {
            self.command(&["setup"]);
        } else if fix.contains("pass -no-messages") {
            self.flags.push("-no-messages".into());
        } else if let Some(encoding) = after("to a database created with ") {
            self.rig.pg.execute(&format!(
                "CREATE DATABASE new {encoding} LOCALE 'C' TEMPLATE template0"
            ));
            self.drop_slots();
            self.held = Held::set_up_in(&self.rig, "new");
        } else if fix.contains("name the host and port of Postgres itself") {
            self.held = Held::default();
        } else if let Some(edit) = after("nats stream edit ")
            && let Some((stream, _)) = edit.split_once(", or a new stream")
        {
            let mut nats = self.rig.nats.client();
            nats.api(&format!("STREAM.DELETE.{stream}"), &Value::Null);
            self.command(&["setup"]);
        } else if let Some(edit) = after("nats stream edit ") {
            let (stream, window) = edit.split_once(" --dupe-window=").expect("a setting");
            assert_eq!(window, "2m");
            let mut nats = self.rig.nats.client();
            let mut config = nats.stream_info(stream)["config"].clone();
            config["duplicate_window"] = json!(120_000_000_000_u64);
            nats.api(&format!("STREAM.UPDATE.{stream}"), &config);
        } else if let Some(bucket) = after("nats kv del ") {
            let mut nats = self.rig.nats.client();
            nats.api(&format!("STREAM.DELETE.KV_{bucket}"), &Value::Null);
            self.command(&["setup"]);
        } else {
            assert!(fix.contains("start the relay"), "{fix}");
            let once = ["-resume-anyway", "-accept-new-system"];
            let once = once.into_iter().filter(|flag| fix.contains(flag));
            let relay = ["-drain", "-hold-back", "0"].into_iter();
            let relay: Vec<&str> = relay.chain(once).collect();
            // WAL is let go at a checkpoint that the slot has passed
            for _ in 0..2 {
                self.command(&relay).with(0);
                self.rig.pg.execute("CHECKPOINT");
            }
            self.command(&["-drain", "-hold-back", "0"]).with(0);
            self.relay_ran = true;
        }
    }

    /// Runs `setup`, and the statement that it prints where it may not change what there is. Other differences may stay.
    #[track_caller]
    fn set_up(&self) {
        let ended = self.command(&["setup"]);
        if let Some((_, function)) = ended.stdout.split_once("stay:\n") {
            let (function, _) = function.split_once("$$;").expect("its end");
            self.rig.pg.execute(&format!("{function}$$;"));
        }
        self.command(&["setup"]);
    }

    fn drop_slots(&self) {
        eventually("the slots to be free", DEADLINE, || {
            let sql = "SELECT count(pg_terminate_backend(active_pid)) FROM pg_replication_slots WHERE active";
            self.rig.pg.scalar::<i64>(sql) == Some(0)
        });
        for slot in self.names("SELECT slot_name::text FROM pg_replication_slots") {
            let db = format!(
                "SELECT database::text FROM pg_replication_slots WHERE slot_name = '{slot}'"
            );
            let db: Option<String> = self.rig.pg.scalar::<Option<String>>(&db).flatten();
            let mut client = self.rig.pg.client_of(db.as_deref().unwrap_or("postgres"));
            let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
            let client = client.as_mut().expect("the database");
            client.batch_execute(&drop).expect("drop the slot");
        }
    }

    fn names(&self, sql: &str) -> Vec<String> {
        let rows = self.rig.pg.client().query(sql, &[]).expect("names");
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// As `setup` leaves it, again.
    fn reset(&mut self, fault: &Fault) {
        self.held = Held::default();
        self.flags = Vec::new();
        self.drop_slots();
        for gid in self.names("SELECT gid FROM pg_prepared_xacts") {
            let gid = gid.replace('\'', "''");
            self.rig.pg.execute(&format!("ROLLBACK PREPARED '{gid}'"));
        }
        for sql in [
            "ALTER SYSTEM RESET ALL",
            "SELECT pg_reload_conf()",
            "DROP DATABASE IF EXISTS old",
            "DROP DATABASE IF EXISTS new",
            "DROP DATABASE IF EXISTS elsewhere",
            "DROP ROLE IF EXISTS svc",
            "DROP PUBLICATION IF EXISTS jetstream_outbox; DROP SCHEMA IF EXISTS a, b CASCADE; DROP SCHEMA public CASCADE; \
             CREATE SCHEMA public; DROP SERVER IF EXISTS away CASCADE; DROP FOREIGN DATA WRAPPER IF EXISTS none",
        ] {
            self.rig.pg.execute(sql);
        }
        // what a relay remembers would count
        if fault.first.is_some() || self.relay_ran {
            self.relay_ran = false;
            self.rig.nats = Nats::start();
        }
        self.command(&["setup"]).with(0);
    }
}

fn text<'a>(finding: &'a Value, key: &str) -> &'a str {
    finding[key]
        .as_str()
        .unwrap_or_else(|| panic!("no {key} in {finding}"))
}

/// Runs the statements of a fix as psql does: one at a time, in one session.
#[track_caller]
pub fn apply(rig: &Rig, database: &str, fix: &str) {
    let mut client = rig.pg.client_of(database).expect("the database");
    let mut statement = String::new();
    for part in fix.split_inclusive(';') {
        statement += part;
        let is_open = |mark: &str| statement.matches(mark).count() % 2 == 1;
        if is_open("'") || is_open("$outbox$") {
            continue;
        }
        let whole = std::mem::take(&mut statement);
        let whole = whole.trim();
        assert!(whole.ends_with(';'), "{whole:?} of {fix}");
        match whole.starts_with("ALTER_REPLICATION_SLOT") {
            true => replication_command(rig, whole),
            false => client
                .batch_execute(whole)
                .unwrap_or_else(|error| panic!("{whole}: {error:?}")),
        }
    }
}

/// Those of the replication protocol need a connection of its kind.
fn replication_command(rig: &Rig, statement: &str) {
    let url = rig.pg.url("postgres", "postgres");
    let info = ConnInfo::parse(&url, &|_| None).expect("a connection string");
    let mut connection = Connection::connect(&info).expect("a replication connection");
    connection.simple_query(statement).expect("the command");
}

/// Passes sessions on to a Postgres but those that ask for replication, and refuses these in PgBouncer's words.
pub struct Pooler {
    port: u16,
}

impl Pooler {
    /// It ends with the test.
    pub fn start(postgres: u16) -> Pooler {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                thread::spawn(move || pool(client, postgres));
            }
        });
        Pooler { port }
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }
}

fn pool(mut client: TcpStream, postgres: u16) -> Option<()> {
    const SSL_REQUEST: [u8; 4] = 80_877_103_u32.to_be_bytes();
    let startup = loop {
        let mut head = [0; 4];
        client.read_exact(&mut head).ok()?;
        let mut rest = vec![0; u32::from_be_bytes(head).checked_sub(4)? as usize];
        client.read_exact(&mut rest).ok()?;
        if rest != SSL_REQUEST {
            break [&head[..], &rest].concat();
        }
        client.write_all(b"N").ok()?;
    };
    let asks = b"\0replication\0";
    if startup.windows(asks.len()).any(|part| part == asks) {
        let fields = b"SFATAL\0C08P01\0Munsupported startup parameter: replication\0\0";
        let length = u32::try_from(fields.len() + 4).ok()?;
        let refusal = [b"E", &length.to_be_bytes()[..], fields].concat();
        return client.write_all(&refusal).ok();
    }
    let mut server = TcpStream::connect(("127.0.0.1", postgres)).ok()?;
    server.write_all(&startup).ok()?;
    let (mut to, mut from) = (server.try_clone().ok()?, client.try_clone().ok()?);
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    std::io::copy(&mut server, &mut client).ok()?;
    client.shutdown(Shutdown::Both).ok()
}

fn applies(fault: &&Fault) -> bool {
    let (since, until) = fault.versions;
    (since..=until).contains(&Postgres::major_version())
}

#[track_caller]
fn each(faults: &[Fault]) {
    let mut place = Place::new();
    for fault in faults.iter().filter(applies) {
        place.is_found_and_fixed(fault);
        place.reset(fault);
    }
}

#[test]
fn faults_of_the_server_are_found_and_fixed() {
    each(SERVER);
}

#[test]
fn faults_of_the_slot_are_found_and_fixed() {
    each(SLOTS);
}

#[test]
fn faults_of_the_publication_are_found_and_fixed() {
    each(PUBLICATION);
}

#[test]
fn faults_that_surprise_later_are_found_and_fixed() {
    each(LATER);
}

#[test]
fn faults_of_nats_are_found_and_fixed() {
    each(NATS);
}

/// Forty, each another one.
#[test]
fn there_are_forty_faults() {
    let all = [SERVER, SLOTS, PUBLICATION, LATER, NATS].concat();
    let mut makes = BTreeSet::new();
    for fault in all.iter().filter(applies) {
        let made = format!("{:?} {:?} {:?}", fault.sql, fault.flags, fault.findings);
        assert!(makes.insert(made), "twice: {:?}", fault.findings);
    }
    assert!(makes.len() >= 40, "{}", makes.len());
}

#[test]
fn faults_together_are_all_found_and_fixed() {
    if !applies(&&TOGETHER) {
        eprintln!("skipped: not all of them are there in this version");
        return;
    }
    let mut place = Place::new();
    place.is_found_and_fixed(&TOGETHER);
    place.rig.commit_event(1, "a");
    place.command(&["-drain"]).with(0);
    assert_eq!(place.rig.messages().len(), 1);
}
