//! The link against a real nats-server: `NATS_SERVER_BIN`, or `nats-server` on the PATH.

use crossbeam_channel::select;
use jetstream_outbox::jetstream::ack::{AckErrorKind, PubAck};
use jetstream_outbox::jetstream::client::{Incoming, Link, Publish};
use jetstream_outbox::jetstream::error::Error;
use jetstream_outbox::jetstream::options::{Options, ServerUrl};
use jetstream_outbox::outbox::batch::{Batch, Change};
use jetstream_outbox::outbox::position::Position;
use jetstream_outbox::postgres::Lsn;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(30);

/// The tests count the process' threads, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

struct Server {
    child: Child,
    port: u16,
    folder: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Server {
    fn start() -> Server {
        Server::with_config("jetstream { store_dir: \"DIR/js\" }")
    }

    /// `DIR` in the configuration stands for a folder of the server's own.
    fn with_config(config: &str) -> Server {
        let folder = tempfile::tempdir().unwrap();
        Server::in_folder(folder, config)
    }

    fn in_folder(folder: tempfile::TempDir, config: &str) -> Server {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let config = config.replace("DIR", folder.path().to_str().unwrap());
        std::fs::write(folder.path().join("server.conf"), config).unwrap();
        let binary = std::env::var("NATS_SERVER_BIN").unwrap_or_else(|_| "nats-server".into());
        let child = Command::new(binary)
            .args(["-a", "127.0.0.1", "-p", &port.to_string(), "-c"])
            .arg(folder.path().join("server.conf"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
            .spawn()
            .expect("nats-server starts: set NATS_SERVER_BIN");
        let mut server = Server {
            child,
            port,
            folder,
            _turn: turn,
        };
        let deadline = Instant::now() + LONG;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = std::fs::read_to_string(server.folder.path().join("log")).unwrap();
            assert!(server.child.try_wait().unwrap().is_none(), "{log}");
            assert!(Instant::now() < deadline, "{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn options(&self) -> Options {
        self.options_for("nats://127.0.0.1")
    }

    /// `url` lacks the port.
    fn options_for(&self, url: &str) -> Options {
        Options {
            servers: vec![ServerUrl::parse(&format!("{url}:{}", self.port)).unwrap()],
            ..Options::default()
        }
    }

    fn connect(&self) -> Link {
        Link::connect(&self.options()).unwrap()
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn create_stream(link: &Link, extra: &str) {
    let body = format!(r#"{{"name":"EVENTS","subjects":["events.>"]{extra}}}"#);
    let answer = link
        .call("STREAM.CREATE.EVENTS", body.into(), LONG)
        .unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.contains("did_create"), "{answer}");
}

/// Events `first..first + count` with `body_len` bytes each; the token is the number, the fence number − 1.
fn events(first: u64, count: u64, body_len: usize) -> Vec<Publish> {
    let mut batch = Batch::default();
    for number in first..first + count {
        let text = |text: String| {
            move |bytes: &mut Vec<u8>| {
                bytes.extend_from_slice(text.as_bytes());
                Ok::<(), ()>(())
            }
        };
        let position = Position {
            commit_lsn: Lsn(number),
            ordinal: 1,
        };
        let (subject, id) = (format!("events.order.{number}"), format!("id-{number}"));
        let body = "x".repeat(body_len);
        batch
            .push_event(
                "public.outbox",
                position,
                text(subject),
                text(id),
                text(body),
            )
            .unwrap();
    }
    let batch = Arc::new(batch);
    let source: Arc<str> = "slot 7312345678901234567 1".into();
    let publish = |(number, change): (u64, &Change)| match change {
        Change::Event(event) => Publish {
            batch: batch.clone(),
            event: *event,
            token: number,
            expected_last_sequence: Some(number - 1),
            position_source: source.clone(),
        },
        _ => unreachable!("only events were pushed"),
    };
    (first..).zip(batch.changes()).map(publish).collect()
}

fn next(link: &Link) -> Incoming {
    select! {
        recv(link.messages()) -> message => link.decode(message.unwrap()).unwrap(),
        recv(link.lost()) -> error => panic!("{}", error.unwrap()),
        default(LONG) => panic!("no answer"),
    }
}

/// Publishes `count` events with at most `window` unanswered and checks that each has the sequence it should.
fn pipeline(link: &Link, count: u64, window: u64, burst: u64, body_len: usize) {
    let (mut first, mut acked) = (1, 0);
    while acked < count {
        while first <= count && first + burst - 1 - acked <= window {
            let n = burst.min(count - first + 1);
            link.publish(events(first, n, body_len));
            first += n;
        }
        acked += 1;
        let stored = Ok(PubAck {
            seq: acked,
            duplicate: false,
        });
        match next(link) {
            Incoming::Ack { token, result } => assert_eq!((token, result), (acked, stored)),
            other => panic!("{other:?}"),
        }
    }
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// The link's threads end, whatever they were doing.
fn threads_return_to(before: usize) {
    let deadline = Instant::now() + LONG;
    while threads() > before {
        let names = || {
            let names = std::fs::read_dir("/proc/self/task").unwrap();
            let name = |task: std::io::Result<std::fs::DirEntry>| {
                std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
            };
            names.filter_map(name).collect::<Vec<_>>()
        };
        assert!(
            Instant::now() < deadline,
            "{before} threads, now {:?}",
            names()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn refused(options: &Options) -> Error {
    let started = Instant::now();
    let error = Link::connect(options).err().expect("the link is refused");
    let limit = options.connect_timeout + Duration::from_millis(500);
    assert!(
        started.elapsed() < limit,
        "{:?}: {error}",
        started.elapsed()
    );
    error
}

#[test]
fn events_are_stored_in_order_and_acknowledged() {
    let server = Server::start();
    let before = threads();
    let link = server.connect();
    create_stream(&link, "");
    pipeline(&link, 20_000, 1024, 64, 100);
    assert!(link.lost().is_empty());
    assert!(link.server_info().jetstream && link.max_payload() == 1 << 20);
    drop(link);
    threads_return_to(before);
}

#[test]
fn a_server_killed_while_publishing_is_noticed_and_leaves_nothing_behind() {
    for round in 0..10 {
        let server = Server::start();
        let before = threads();
        let link = server.connect();
        create_stream(&link, "");
        pipeline(&link, 1000, 256, 16, 100);
        for burst in 0..50 {
            link.publish(events(1001 + 10 * burst, 10, 1000));
        }
        std::thread::sleep(Duration::from_millis(round));
        server.signal("KILL");
        let killed = Instant::now();
        let error = link.lost().recv_timeout(LONG).unwrap();
        let elapsed = killed.elapsed();
        assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
        assert!(matches!(error, Error::Lost { .. }), "{error}");
        // more is taken, and goes nowhere
        link.publish(events(2001, 1000, 1000));
        let dropped = Instant::now();
        drop(link);
        assert!(dropped.elapsed() < Duration::from_millis(100));
        threads_return_to(before);
        let error = refused(&server.options());
        assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    }
}

#[test]
fn a_frozen_server_blocks_nobody() {
    let server = Server::start();
    let before = threads();
    let link = server.connect();
    create_stream(&link, "");
    pipeline(&link, 1000, 256, 16, 100);
    server.signal("STOP");
    let started = Instant::now();
    for burst in 0..64 {
        link.publish(events(1001 + burst, 1, 1_000_000));
        link.request(1, "INFO", Vec::new());
    }
    let mut options = server.options();
    options.connect_timeout = Duration::from_millis(200);
    let with_link = threads();
    for _ in 0..20 {
        let error = refused(&options);
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        assert!(
            error.to_string().contains("sent no NATS greeting"),
            "{error}"
        );
    }
    assert!(
        threads() <= with_link + 1,
        "{} threads, {with_link} before",
        threads()
    );
    let dropped = Instant::now();
    drop(link);
    assert!(dropped.elapsed() < Duration::from_millis(100));
    assert!(
        started.elapsed() < Duration::from_secs(6),
        "{:?}",
        started.elapsed()
    );
    server.signal("CONT");
    threads_return_to(before);
    // and the server is usable again
    server.connect();
    threads_return_to(before);
}

#[test]
fn a_frozen_server_that_is_killed_frees_every_thread() {
    let server = Server::start();
    let before = threads();
    let link = server.connect();
    create_stream(&link, "");
    server.signal("STOP");
    link.publish(events(1, 64, 500_000));
    drop(link);
    server.signal("KILL");
    threads_return_to(before);
}

#[test]
fn refusals_are_named() {
    let server = Server::start();
    let link = server.connect();
    create_stream(&link, r#","max_msg_size":1000"#);
    let ask = |first, body_len| {
        link.publish(events(first, 1, body_len));
        match next(&link) {
            Incoming::Ack { token, result } => {
                assert_eq!(token, first);
                result.map(|ack| ack.seq).map_err(|error| error.kind())
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ask(1, 1), Ok(1));
    assert_eq!(ask(9, 1), Err(AckErrorKind::WrongLastSequence(Some(1))));
    assert_eq!(ask(2, 2000), Err(AckErrorKind::MessageTooLarge));
    let error = link
        .call("STREAM.INFO.NONE", Vec::new(), LONG)
        .map(|body| String::from_utf8(body).unwrap());
    assert!(error.unwrap().contains("stream not found"));
    // asynchronously
    link.request(7, "STREAM.INFO.EVENTS", Vec::new());
    match next(&link) {
        Incoming::Reply { token: 7, result } => {
            assert!(
                String::from_utf8(result.unwrap())
                    .unwrap()
                    .contains("events.")
            )
        }
        other => panic!("{other:?}"),
    }
    link.call("STREAM.DELETE.EVENTS", Vec::new(), LONG).unwrap();
    link.publish(events(1, 1, 1));
    match next(&link) {
        Incoming::Ack { token: 1, result } => {
            assert_eq!(result.unwrap_err().kind(), AckErrorKind::NoResponders)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_server_without_jetstream_is_named() {
    let server = Server::with_config("");
    let link = server.connect();
    assert!(!link.server_info().jetstream);
    let error = link.call("STREAM.NAMES", Vec::new(), LONG).unwrap_err();
    assert!(error.to_string().contains("enable JetStream"), "{error}");
    link.publish(events(1, 1, 1));
    match next(&link) {
        Incoming::Ack { token: 1, result } => {
            assert_eq!(result.unwrap_err().kind(), AckErrorKind::NoResponders)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn servers_are_tried_in_turn() {
    let server = Server::start();
    let dead = ServerUrl::parse("127.0.0.1:1").unwrap();
    let mut options = server.options();
    options.servers.insert(0, dead.clone());
    assert_eq!(
        Link::connect(&options).unwrap().server(),
        options.servers[1].to_string()
    );
    options.servers = vec![dead.clone(), dead];
    let error = refused(&options).to_string();
    assert!(
        error.contains("none of 2 servers") && error.contains("127.0.0.1:1"),
        "{error}"
    );
}
