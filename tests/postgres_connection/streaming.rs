//! The copy-both stream: data one way, status updates the other way, and its end.

use crate::cluster::{Cluster, connect, primary};
use crate::support::wait::{eventually, secs};
use jetstream_outbox::postgres::replication::{
    ReplicationMessage, ReplicationReader, ReplicationWriter, StandbyStatusUpdate, identify_system,
    start_replication,
};
use jetstream_outbox::postgres::{Error, Lsn};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

/// More than anything takes on a machine that is busy with other tests.
const DEADLINE: Duration = secs(60);

/// A slot, a publication and a table of this name.
struct Feed {
    name: &'static str,
}

impl Feed {
    fn new(server: &Cluster, name: &'static str) -> Feed {
        server.sql(&format!(
            "CREATE TABLE {name} (body text); CREATE PUBLICATION {name} FOR TABLE {name}"
        ));
        server.sql(&format!(
            "SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')"
        ));
        Feed { name }
    }

    fn open(&self, text: &str) -> Result<(ReplicationReader, ReplicationWriter), Error> {
        let options = [("proto_version", "1"), ("publication_names", self.name)];
        start_replication(connect(text).unwrap(), self.name, Lsn::INVALID, &options)
    }
}

/// What a thread comes to: a reader waits without a deadline, so here is one.
#[track_caller]
fn join<T>(thread: JoinHandle<T>) -> T {
    eventually("the thread to end", DEADLINE, || thread.is_finished());
    thread.join().unwrap()
}

/// What a stream ends with that must end in an error.
fn read_to_error(reader: &mut ReplicationReader) -> Error {
    loop {
        match reader.read() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended in order"),
            Err(error) => return error,
        }
    }
}

/// Reads up to the `commits`th commit; gives the bytes of all inserts and the end of the last commit.
fn read_commits(reader: &mut ReplicationReader, commits: usize) -> (usize, Lsn) {
    let (mut bytes, mut seen, mut end) = (0, 0, Lsn::INVALID);
    while seen < commits {
        match reader.read().unwrap().expect("the stream goes on") {
            ReplicationMessage::XLogData {
                data, wal_start, ..
            } => match data[0] {
                b'I' => bytes += data.len(),
                b'C' => {
                    seen += 1;
                    end = wal_start;
                }
                _ => {}
            },
            // what comes in pieces here is an insert
            ReplicationMessage::LargeXLogData { head, .. } => assert_eq!(head[0], b'I'),
            ReplicationMessage::Piece { bytes: piece, .. } => bytes += piece.len(),
            ReplicationMessage::PrimaryKeepalive { .. } => {}
            ReplicationMessage::Notice(notice) => panic!("{notice}"),
        }
    }
    (bytes, end)
}

fn status(at: Lsn) -> StandbyStatusUpdate {
    StandbyStatusUpdate {
        write: at,
        flush: at,
        apply: at,
        reply_requested: false,
    }
}

#[test]
fn the_server_identifies_itself() {
    let server = primary();
    let identified = identify_system(&mut connect(&server.admin()).unwrap()).unwrap();
    let rows = server.sql("SELECT system_identifier::text FROM pg_control_system()");
    assert_eq!(rows[0][0], Some(identified.system_id.to_string()));
    assert_eq!(
        (identified.timeline, identified.dbname.as_str()),
        (1, "postgres")
    );
    assert!(identified.xlogpos > Lsn::INVALID);
}

#[test]
fn rows_come_and_confirmations_go_over_every_kind_of_stream() {
    let server = primary();
    for (name, text) in [
        ("over_socket", server.admin()),
        ("over_tcp", server.tcp("postgres", "sslmode=disable")),
        ("over_tls", server.tcp("postgres", "sslmode=require")),
        (
            "over_tls12",
            server.tcp(
                "postgres",
                "sslmode=require ssl_max_protocol_version=TLSv1.2",
            ),
        ),
    ] {
        let feed = Feed::new(&server, name);
        server.sql(&format!(
            "INSERT INTO {name} SELECT repeat('x', 100) FROM generate_series(1, 20000)"
        ));
        // a message far larger than the buffer
        server.sql(&format!(
            "INSERT INTO {name} VALUES (repeat('y', 20000000))"
        ));
        server.sql(&format!("INSERT INTO {name} VALUES ('z')"));
        let (mut reader, writer) = feed.open(&text).unwrap();
        let reading = spawn(move || (read_commits(&mut reader, 3), reader));
        let ((bytes, end), mut reader) = join(reading);
        assert!(bytes > 22_000_000, "{bytes}");

        writer.send_status(&status(end)).unwrap();
        writer.copy_done().unwrap();
        let reading = spawn(move || {
            while reader.read().unwrap().is_some() {}
            reader
        });
        join(reading).finish(secs(10)).unwrap();
        let slot = format!(
            "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{name}'"
        );
        assert_eq!(server.sql(&slot)[0][0], Some(end.to_string()));
        server.sql(&format!("SELECT pg_drop_replication_slot('{name}')"));
    }
}

#[test]
fn a_writer_is_never_held_up_by_a_reader_that_waits() {
    let server = primary();
    for (name, sslmode) in [("idle_tls", "require"), ("idle_plain", "disable")] {
        let feed = Feed::new(&server, name);
        let (mut reader, writer) = feed
            .open(&server.tcp("postgres", &format!("sslmode={sslmode}")))
            .unwrap();
        let reading = spawn(move || (read_commits(&mut reader, 101), reader));
        let writing = spawn({
            let writer = writer.clone();
            move || {
                for _ in 0..1000 {
                    let update = StandbyStatusUpdate {
                        reply_requested: true,
                        ..status(Lsn::INVALID)
                    };
                    writer.send_status(&update).unwrap();
                }
            }
        });
        let mut loader = connect(&server.admin()).unwrap();
        for _ in 0..100 {
            loader
                .simple_query(&format!(
                    "INSERT INTO {name} SELECT repeat('x', 1000) FROM generate_series(1, 300)"
                ))
                .unwrap();
        }
        join(writing);
        // nothing comes any more, the reader waits: a status still goes out at once, and so does the last commit
        writer.send_status(&status(Lsn::INVALID)).unwrap();
        loader
            .simple_query(&format!("INSERT INTO {name} VALUES ('end')"))
            .unwrap();
        let ((bytes, _), reader) = join(reading);
        assert!(bytes > 30_000_000, "{bytes}");
        drop((reader, writer));
        drop_slot(&server, name);
    }
}

/// The server notices that its client is gone a moment later.
fn drop_slot(server: &Cluster, name: &str) {
    let active = format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{name}'");
    eventually("the slot to be free", DEADLINE, || {
        server.sql(&active)[0][0].as_deref() == Some("f")
    });
    server.sql(&format!("SELECT pg_drop_replication_slot('{name}')"));
}

#[test]
fn shutdown_wakes_a_reader_that_waits() {
    let server = primary();
    for (name, sslmode) in [("wake_tls", "require"), ("wake_plain", "disable")] {
        let feed = Feed::new(&server, name);
        let (mut reader, writer) = feed
            .open(&server.tcp("postgres", &format!("sslmode={sslmode}")))
            .unwrap();
        let reading = spawn(move || read_to_error(&mut reader));
        writer.shutdown();
        let error = join(reading);
        assert!(matches!(error, Error::Closed { .. }), "{error}");
        assert!(writer.send_status(&status(Lsn::INVALID)).is_err());
        drop_slot(&server, name);
    }
}

#[test]
fn a_slot_in_use_or_missing_is_told_by_its_sqlstate() {
    let server = primary();
    let feed = Feed::new(&server, "in_use");
    let first = feed.open(&server.admin()).unwrap();
    let error = feed.open(&server.admin()).unwrap_err();
    assert_eq!(error.sqlstate(), Some("55006"), "{error}");
    drop(first);
    drop_slot(&server, "in_use");
    let error = feed.open(&server.admin()).unwrap_err();
    assert_eq!(error.sqlstate(), Some("42704"), "{error}");
}

#[test]
fn a_terminated_walsender_is_an_error_of_the_server() {
    let server = primary();
    let feed = Feed::new(&server, "terminated");
    let (mut reader, _writer) = feed.open(&server.tcp("postgres", "")).unwrap();
    server.sql("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'terminated'");
    let error = join(spawn(move || read_to_error(&mut reader)));
    assert_eq!(error.sqlstate(), Some("57P01"), "{error}");
    drop_slot(&server, "terminated");
}

#[test]
fn a_missing_publication_is_an_error_while_streaming() {
    let server = primary();
    let feed = Feed::new(&server, "no_publication");
    server.sql("DROP PUBLICATION no_publication; INSERT INTO no_publication VALUES ('x')");
    let (mut reader, _writer) = feed.open(&server.admin()).unwrap();
    let error = join(spawn(move || read_to_error(&mut reader)));
    assert_eq!(error.sqlstate(), Some("42704"), "{error}");
    drop_slot(&server, "no_publication");
}
