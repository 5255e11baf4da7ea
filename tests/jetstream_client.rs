//! The link against a real nats-server, and against scripted ones.

mod support;

use crossbeam_channel::unbounded;
use jetstream_outbox::jetstream::ack::{AckError, AckErrorKind, PubAck};
use jetstream_outbox::jetstream::client::{Ack, Answer, Api, Link, Reply};
use jetstream_outbox::jetstream::streams::{self, Routes};
use jetstream_outbox::jetstream::wire::{self, Publish};
use jetstream_outbox::nats::Error;
use jetstream_outbox::nats::options::{Options, ServerUrl};
use jetstream_outbox::outbox::batch::{Batch, Event};
use jetstream_outbox::outbox::position::Position;
use jetstream_outbox::postgres::Lsn;
use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use support::files::temp_dir;
use support::nats::{Builder, Nats};
use support::operator::{self, Operator};
use support::process::lock;
use support::scripted_nats;
use support::wait::{eventually, pause};

const LONG: Duration = Duration::from_secs(30);

/// What waits for no server is done by then on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The tests count the process' threads, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

struct Server {
    nats: Nats,
    _turn: MutexGuard<'static, ()>,
}

impl Server {
    fn start() -> Server {
        Server::with(Nats::builder())
    }

    fn without_jetstream(config: &str) -> Server {
        Server::with(Nats::builder().without_jetstream().config(config))
    }

    fn with(builder: Builder) -> Server {
        Server {
            _turn: lock(&TURN),
            nats: builder.build(),
        }
    }

    fn options(&self) -> Options {
        self.options_for("nats://127.0.0.1")
    }

    /// `url` lacks the port.
    fn options_for(&self, url: &str) -> Options {
        let url = format!("{url}:{}", self.nats.port());
        Options {
            servers: vec![ServerUrl::parse(&url).unwrap()],
            ..Options::default()
        }
    }

    fn connect(&self) -> Link {
        Link::connect(&self.options()).unwrap()
    }
}

fn create_stream(link: &Link, extra: &str) {
    let body = format!(r#"{{"name":"EVENTS","subjects":["events.>"]{extra}}}"#);
    let answer = link
        .call("STREAM.CREATE.EVENTS", body.as_bytes(), LONG)
        .unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.contains("did_create"), "{answer}");
}

/// What begins the position header.
const SOURCE: &str = "slot 7312345678901234567 1";

fn publish(link: &Link, burst: Vec<Publish>) {
    link.publish(burst, &SOURCE.into());
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
    let publish = |(number, index): (u64, usize)| Publish {
        event: Event::new(&batch, index).unwrap(),
        token: number,
        reply: number,
        expected_last_sequence: Some(number - 1),
        expected_last: None,
        expected_stream: None,
        is_late: false,
        transaction_end: None,
    };
    let indexes = 0..batch.changes().len();
    (first..).zip(indexes).map(publish).collect()
}

fn next_answers(link: &Link) -> Vec<Answer> {
    match link.answers().recv_timeout(LONG) {
        Ok(answers) => answers,
        Err(_) => panic!("no answer: {:?}", link.lost().try_recv()),
    }
}

fn next_acks(link: &Link) -> Vec<Ack> {
    let ack = |answer| match answer {
        Answer::Ack(ack) => ack,
        other => panic!("{other:?}"),
    };
    next_answers(link).into_iter().map(ack).collect()
}

fn next_ack(link: &Link) -> Ack {
    let mut acks = next_acks(link);
    assert_eq!(acks.len(), 1, "{acks:?}");
    acks.remove(0)
}

fn next_reply(link: &Link) -> Reply {
    match next_answers(link).remove(0) {
        Answer::Reply(reply) => reply,
        other => panic!("{other:?}"),
    }
}

/// Publishes `count` events with at most `window` unanswered and checks that each has the sequence it should.
fn pipeline(link: &Link, count: u64, window: u64, burst: u64, body_len: usize) {
    let (mut first, mut acked) = (1, 0);
    while acked < count {
        while first <= count && first + burst - 1 - acked <= window {
            let n = burst.min(count - first + 1);
            publish(link, events(first, n, body_len));
            first += n;
        }
        for Ack { reply, result, .. } in next_acks(link) {
            acked += 1;
            let stored = Ok(PubAck {
                seq: acked,
                duplicate: false,
            });
            assert_eq!((reply, result.map(|(ack, _)| ack)), (acked, stored));
        }
    }
}

/// Those of links. (All threads are not to be counted: the test harness starts one when it likes.)
fn threads() -> usize {
    let names = thread_names();
    names
        .iter()
        .filter(|name| name.starts_with("nats-"))
        .count()
}

/// The link's threads end, whatever they were doing.
#[track_caller]
fn threads_return_to(before: usize) {
    eventually(&format!("{before} threads"), LONG, || {
        if threads() <= before {
            return Ok(());
        }
        Err(thread_names())
    });
}

fn thread_names() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
    };
    tasks.filter_map(name).collect()
}

fn refused(options: &Options) -> Error {
    let started = Instant::now();
    let error = Link::connect(options).err().expect("the link is refused");
    let limit = options.connect_timeout + AT_ONCE;
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
    let server = Server::start();
    let before = threads();
    const ROUNDS: usize = 10;
    for round in 0..ROUNDS {
        let link = server.connect();
        if round == 0 {
            create_stream(&link, "");
        }
        for burst in 0..50 {
            publish(&link, events(1 + 10 * burst, 10, 1000));
        }
        pause(Duration::from_millis(round as u64));
        server.nats.kill();
        let killed = Instant::now();
        let error = link.lost().recv_timeout(LONG).unwrap();
        let elapsed = killed.elapsed();
        assert!(elapsed < AT_ONCE, "{elapsed:?}");
        assert!(matches!(error, Error::Lost { .. }), "{error}");
        // more is taken, and goes nowhere
        publish(&link, events(2001, 1000, 1000));
        let dropped = Instant::now();
        drop(link);
        assert!(dropped.elapsed() < AT_ONCE);
        let error = refused(&server.options());
        assert!(matches!(error, Error::Unreachable { .. }), "{error}");
        server.nats.start_again();
    }
    threads_return_to(before);
}

#[test]
fn a_frozen_server_blocks_nobody() {
    let server = Server::start();
    let before = threads();
    let link = server.connect();
    create_stream(&link, "");
    pipeline(&link, 1000, 256, 16, 100);
    server.nats.freeze();
    let started = Instant::now();
    for burst in 0..64 {
        publish(&link, events(1001 + burst, 1, 1_000_000));
        link.request(1, "INFO", &[]);
    }
    assert!(started.elapsed() < 2 * AT_ONCE, "{:?}", started.elapsed());
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
    assert!(dropped.elapsed() < AT_ONCE);
    server.nats.thaw();
    threads_return_to(before);
    // and the server is usable again
    server.connect();
    threads_return_to(before);
}

#[test]
fn a_frozen_server_that_is_killed_frees_its_threads() {
    let server = Server::start();
    let before = threads();
    let link = server.connect();
    create_stream(&link, "");
    server.nats.freeze();
    publish(&link, events(1, 64, 500_000));
    drop(link);
    server.nats.kill();
    server.nats.start_again();
    threads_return_to(before);
}

#[test]
fn refusals_are_named() {
    let server = Server::start();
    let link = server.connect();
    create_stream(&link, r#","max_msg_size":1000"#);
    let ask = |first, body_len| {
        publish(&link, events(first, 1, body_len));
        let Ack { reply, result, .. } = next_ack(&link);
        assert_eq!(reply, first);
        result.map(|(ack, _)| ack.seq).map_err(|error| error.kind())
    };
    assert_eq!(ask(1, 1), Ok(1));
    assert_eq!(ask(9, 1), Err(AckErrorKind::WrongLastSequence(Some(1))));
    assert_eq!(ask(2, 2000), Err(AckErrorKind::Poison));
    let error = link
        .call("STREAM.INFO.NONE", &[], LONG)
        .map(|body| String::from_utf8(body).unwrap());
    assert!(error.unwrap().contains("stream not found"));
    // asynchronously
    link.request(7, "STREAM.INFO.EVENTS", &[]);
    let Reply { token, result } = next_reply(&link);
    assert_eq!(token, 7);
    let answer = String::from_utf8(result.unwrap()).unwrap();
    assert!(answer.contains("events."), "{answer}");
    link.call("STREAM.DELETE.EVENTS", &[], LONG).unwrap();
    publish(&link, events(1, 1, 1));
    let Ack { reply, result, .. } = next_ack(&link);
    assert_eq!((reply, result.unwrap_err()), (1, AckError::NoResponders));
}

#[test]
fn a_server_without_jetstream_is_named() {
    let server = Server::without_jetstream("");
    let link = server.connect();
    assert!(!link.server_info().jetstream);
    let error = link.call("STREAM.NAMES", &[], LONG).unwrap_err();
    assert!(error.to_string().contains("enable JetStream"), "{error}");
    publish(&link, events(1, 1, 1));
    let Ack { reply, result, .. } = next_ack(&link);
    assert_eq!((reply, result.unwrap_err()), (1, AckError::NoResponders));
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

#[test]
fn what_a_stream_holds_is_read_back() {
    let server = Server::start();
    let link = server.connect();
    assert_eq!(streams::list(&link, "events.>", LONG).unwrap(), []);
    create_stream(&link, r#","max_msg_size":5000"#);
    pipeline(&link, 10, 10, 5, 100);

    let found = streams::list(&link, "events.>", LONG).unwrap();
    let [stream] = found.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!(stream.config.subjects, ["events.>"]);
    assert_eq!(
        (stream.config.max_msg_size, stream.config.num_replicas),
        (5000, 1)
    );
    assert_eq!((stream.state.first_seq, stream.state.last_seq), (1, 10));
    assert_eq!(Routes::new(&found).route("events.order.1"), Some(0));
    assert_eq!(streams::info(&link, "NONE", LONG).unwrap(), None);

    let last = streams::last_message_request("EVENTS", "events.>");
    let last = streams::message(&link, last, LONG).unwrap().unwrap();
    assert_eq!((last.seq, last.data.len()), (10, 100));
    assert_eq!(last.subject, "events.order.10");
    let header = |name: &str, value: &str| (name.to_string(), value.to_string());
    assert_eq!(
        last.headers,
        [
            header("Nats-Expected-Last-Sequence", "9"),
            header("Nats-Msg-Id", "id-10"),
            header("Outbox-Position", "slot 7312345678901234567 1 0/A 1"),
        ]
    );
    for (request, expected) in [
        (streams::message_request("EVENTS", 3), Some(3)),
        (streams::message_request("EVENTS", 11), None),
        (
            streams::last_message_request("EVENTS", "events.other.>"),
            None,
        ),
    ] {
        let found = streams::message(&link, request, LONG).unwrap();
        assert_eq!(found.map(|message| message.seq), expected);
    }
    let error = streams::message(&link, streams::message_request("NONE", 1), LONG).unwrap_err();
    assert_eq!(error.api_error().unwrap().err_code, 10059);
}

#[test]
fn more_streams_than_fit_a_page_are_listed() {
    let server = Server::start();
    let link = server.connect();
    let count = 1030;
    for n in 0..count {
        let body = format!(r#"{{"name":"S{n}","subjects":["events.{n}.>"],"storage":"memory"}}"#);
        let api = format!("STREAM.CREATE.S{n}");
        link.call(&api, body.as_bytes(), LONG).unwrap();
    }
    let found = streams::list(&link, "events.>", LONG).unwrap();
    assert_eq!(found.len(), count);
    let routed = Routes::new(&found).route("events.77.x").unwrap();
    assert_eq!(found[routed].config.name, "S77");
}

/// Whether `url`, completed by `change`, may sign in; if not, what it is told.
fn check_sign_in(
    server: &Server,
    url: &str,
    change: impl FnOnce(&mut Options),
    expected: Result<(), &str>,
) {
    let mut options = server.options_for(url);
    change(&mut options);
    match (Link::connect(&options), expected) {
        (Ok(_), Ok(())) => {}
        (Err(error), Err(words)) if error.to_string().contains(words) => {}
        (result, _) => panic!("{url}: {:?}, not {expected:?}", result.map(|_| ())),
    }
}

#[test]
fn user_password_and_token_sign_in() {
    const WRONG: Result<(), &str> = Err("Authorization Violation: check user");
    let server = Server::without_jetstream(r#"authorization { user: u, password: "p@:%" }"#);
    check_sign_in(&server, "nats://u:p%40%3A%25@127.0.0.1", |_| {}, Ok(()));
    check_sign_in(&server, "nats://u:p@127.0.0.1", |_| {}, WRONG);
    check_sign_in(&server, "nats://127.0.0.1", |_| {}, WRONG);
    drop(server);
    let server = Server::without_jetstream(r#"authorization { token: "s3cr/t" }"#);
    check_sign_in(&server, "nats://s3cr%2Ft@127.0.0.1", |_| {}, Ok(()));
    check_sign_in(&server, "nats://secret@127.0.0.1", |_| {}, WRONG);
}

#[test]
fn an_nkey_signs_in() {
    let folder = temp_dir("client-");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (user, other) = (nkeys::KeyPair::new_user(), nkeys::KeyPair::new_user());
    let config = format!(
        "authorization {{ users: [ {{ nkey: {} }} ] }}",
        user.public_key()
    );
    let server = Server::without_jetstream(&config);
    for (file, expected) in [
        (
            write("right", &format!("{}\n", user.seed().unwrap())),
            Ok(()),
        ),
        (
            write("wrong", &other.seed().unwrap()),
            Err("Authorization Violation"),
        ),
        (
            write("malformed", "SUAB"),
            Err("expected a seed that begins with SU"),
        ),
        (folder.path().join("missing"), Err("No such file")),
    ] {
        let change = |options: &mut Options| options.nkey = Some(file);
        check_sign_in(&server, "nats://127.0.0.1", change, expected);
    }
}

#[test]
fn credentials_sign_in() {
    let operator = Operator::new("");
    let server = Server::without_jetstream(&operator.config());
    let folder = temp_dir("client-");
    let creds = |name: &str, claims: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, operator.credentials(claims)).unwrap();
        path
    };
    let malformed = folder.path().join("malformed");
    std::fs::write(&malformed, "hello").unwrap();
    for (file, expected) in [
        (creds("right", ""), Ok(())),
        (
            creds("expired", r#""exp":1600000001,"#),
            Err("sign in to NATS"),
        ),
        (malformed, Err("read credentials file")),
        (folder.path().join("missing"), Err("No such file")),
    ] {
        let change = |options: &mut Options| options.creds = Some(file);
        check_sign_in(&server, "nats://127.0.0.1", change, expected);
    }

    // expiry while connected
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let soon = now.unwrap().as_secs() + 2;
    let mut options = server.options();
    options.creds = Some(creds("soon", &format!(r#""exp":{soon},"#)));
    let link = Link::connect(&options).unwrap();
    let error = link.lost().recv_timeout(LONG).unwrap();
    assert!(matches!(error, Error::Authorization { .. }), "{error}");
}

#[test]
fn a_message_has_the_size_that_the_server_counts() {
    let server = Server::start();
    let link = server.connect();
    let mut publishes = events(1, 1, 100);
    let Publish {
        event,
        expected_last_sequence,
        ..
    } = &publishes[0];
    let size = wire::size(event.spans(), *expected_last_sequence, None, SOURCE.len());
    let limit = |call: &str, limit: usize| {
        let body = format!(r#"{{"name":"EVENTS","subjects":["events.>"],"max_msg_size":{limit}}}"#);
        link.call(&format!("STREAM.{call}.EVENTS"), body.as_bytes(), LONG)
            .unwrap()
    };
    limit("CREATE", size - 1);
    publish(&link, publishes.clone());
    let error = next_ack(&link).result.unwrap_err();
    assert_eq!(error.kind(), AckErrorKind::Poison);
    limit("UPDATE", size);
    publishes[0].reply = 2;
    publish(&link, publishes);
    let Ack { reply, result, .. } = next_ack(&link);
    assert_eq!((reply, result.is_ok()), (2, true));
}

#[test]
fn a_missing_permission_is_named() {
    let server = Server::without_jetstream(
        r#"authorization { users: [
            { user: a, password: p, permissions { publish { deny: "events.>" } } }
            { user: b, password: p, permissions { subscribe { deny: "_INBOX.>" } } }
        ] }"#,
    );
    let link = Link::connect(&server.options_for("nats://a:p@127.0.0.1")).unwrap();
    publish(&link, events(1, 1, 1));
    let error = link.lost().recv_timeout(LONG).unwrap();
    assert!(matches!(error, Error::Permission { .. }), "{error}");
    assert!(error.to_string().contains("events.order.1"), "{error}");
    let error = refused(&server.options_for("nats://b:p@127.0.0.1"));
    assert!(matches!(error, Error::Permission { .. }), "{error}");
}

#[test]
fn tls_is_checked_and_carries_events() {
    let folder = temp_dir("client-");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let authority = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new([]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        let cert = params.self_signed(&key).unwrap();
        (cert.pem(), rcgen::Issuer::new(params, key))
    };
    let (ca_pem, issuer) = authority("test authority");
    let issue = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new([name.to_string()]).unwrap();
        let cert = params.signed_by(&key, &issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    };
    let ca = write("ca.pem", &ca_pem);
    let other_ca = write("other.pem", &authority("other").0);
    let (server_cert, server_key) = issue("localhost");
    let (cert, key) = issue("relay");
    let (cert, key) = (write("client.pem", &cert), write("client.key", &key));
    let plain = write("plain", "hello");

    let config = r#"tls { cert_file: "{dir}/server.pem", key_file: "{dir}/server.key", ca_file: "{dir}/ca.pem", verify: true }"#;
    let builder = Nats::builder()
        .file("ca.pem", ca_pem)
        .file("server.pem", server_cert)
        .file("server.key", server_key)
        .config(config);
    let server = Server::with(builder);
    let with = |ca: &std::path::Path, client: bool| {
        let (ca, cert, key) = (ca.to_path_buf(), cert.clone(), key.clone());
        move |options: &mut Options| {
            options.tls_ca = Some(ca);
            options.tls_cert = client.then_some(cert);
            options.tls_key = client.then_some(key);
        }
    };
    let good = with(&ca, true);
    check_sign_in(&server, "tls://localhost", good.clone(), Ok(()));
    // the server insists, so the scheme may stay away
    check_sign_in(&server, "localhost", good.clone(), Ok(()));
    for (url, change, expected) in [
        (
            "tls://localhost",
            with(&other_ca, true),
            "invalid peer certificate",
        ),
        (
            "tls://127.0.0.1",
            with(&ca, true),
            "invalid peer certificate",
        ),
        ("tls://localhost", with(&ca, false), "secure the connection"),
        (
            "tls://localhost",
            with(&plain, true),
            "it holds no such PEM section",
        ),
        (
            "tls://localhost",
            with(&folder.path().join("none"), true),
            "No such file",
        ),
    ] {
        check_sign_in(&server, url, change, Err(expected));
    }
    let mut options = server.options_for("tls://localhost");
    good(&mut options);
    let link = Link::connect(&options).unwrap();
    create_stream(&link, "");
    pipeline(&link, 2000, 1024, 64, 100);
    drop((link, server));

    let server = Server::start();
    check_sign_in(
        &server,
        "tls://localhost",
        with(&ca, true),
        Err("does not offer TLS"),
    );
}

/// The server says nothing before the TLS handshake.
#[test]
fn a_server_with_handshake_first_needs_tls_first() {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
    let config = |first: &str| {
        Nats::builder()
            .file("cert.pem", cert.pem())
            .file("key.pem", signing_key.serialize_pem())
            .config(&format!(
                r#"tls {{ cert_file: "{{dir}}/cert.pem", key_file: "{{dir}}/key.pem", handshake_first: {first} }}"#
            ))
    };
    let server = Server::with(config("true"));
    let ca = server.nats.dir().join("cert.pem");
    let with = |tls_first: bool| {
        let ca = ca.clone();
        move |options: &mut Options| {
            (options.tls_ca, options.tls_first) = (Some(ca), tls_first);
            options.connect_timeout = Duration::from_secs(2);
        }
    };
    check_sign_in(&server, "tls://localhost", with(true), Ok(()));
    let hint = "a server with handshake_first needs -nats-tls-first";
    check_sign_in(&server, "tls://localhost", with(false), Err(hint));
    let mut options = server.options_for("tls://localhost");
    with(true)(&mut options);
    let link = Link::connect(&options).unwrap();
    create_stream(&link, "");
    pipeline(&link, 2000, 1024, 64, 100);
    drop((link, server));

    // one that waits a moment for either, and one that knows only the other
    let server = Server::with(config("\"300ms\""));
    let ca = server.nats.dir().join("cert.pem");
    for tls_first in [true, false] {
        let change = |options: &mut Options| {
            (options.tls_ca, options.tls_first) = (Some(ca.clone()), tls_first);
        };
        check_sign_in(&server, "tls://localhost", change, Ok(()));
    }
    drop(server);
    let server = Server::with(config("false"));
    let ca = server.nats.dir().join("cert.pem");
    let change = |options: &mut Options| (options.tls_ca, options.tls_first) = (Some(ca), true);
    let hint = "-nats-tls-first is for servers with handshake_first";
    check_sign_in(&server, "tls://localhost", change, Err(hint));
}

/// The certificate is the user.
#[test]
fn a_client_certificate_signs_in_where_it_is_mapped_to_a_user() {
    let folder = temp_dir("client-");
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new([]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = params.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(params, key);
    let issue = |names: &[&str], email: Option<&str>| {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        let email = email.map(|email| rcgen::SanType::Rfc822Name(email.try_into().unwrap()));
        params.subject_alt_names.extend(email);
        let cert = params.signed_by(&key, &issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    };
    let (cert, key) = issue(&["localhost"], None);
    let config = r#"
        tls { cert_file: "{dir}/cert.pem", key_file: "{dir}/key.pem", ca_file: "{dir}/ca.pem", verify_and_map: true }
        authorization { users: [ { user: "relay@example.com" } ] }"#;
    let builder = Nats::builder()
        .without_jetstream()
        .file("ca.pem", authority.pem())
        .file("cert.pem", cert)
        .file("key.pem", key)
        .config(config);
    let server = Server::with(builder);
    for (email, expected) in [
        ("relay@example.com", Ok(())),
        ("other@example.com", Err("sign in to NATS")),
    ] {
        let (cert, key) = issue(&[], Some(email));
        let write = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (cert, key) = (write("cert", cert), write("key", key));
        let change = |options: &mut Options| {
            options.tls_ca = Some(server.nats.dir().join("ca.pem"));
            (options.tls_cert, options.tls_key) = (Some(cert), Some(key));
        };
        // no tls:// is needed
        check_sign_in(&server, "localhost", change, expected);
    }
}

/// Whoever has an authority's certificate wants no word in clear: not even to a server that would take the password.
#[test]
fn nothing_is_said_in_clear_where_tls_is_asked_for() {
    let _turn = lock(&TURN);
    let folder = temp_dir("client-");
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
    let file = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    };
    let (cert, key) = (
        file("cert", cert.pem()),
        file("key", signing_key.serialize_pem()),
    );
    let (heard, lines) = unbounded();
    let plain = fake_server(move |line, _| heard.send(line.to_string()).unwrap());
    for (url, ca, client) in [
        ("nats", true, false),
        ("nats", false, true),
        ("tls", false, false),
    ] {
        let mut options = plain.clone();
        let server = format!("{url}://u:s3cret@{}", plain.servers[0]);
        options.servers = vec![ServerUrl::parse(&server).unwrap()];
        options.tls_ca = cert.clone().filter(|_| ca);
        (options.tls_cert, options.tls_key) = match client {
            true => (cert.clone(), key.clone()),
            false => (None, None),
        };
        let error = refused(&options);
        assert!(error.to_string().contains("does not offer TLS"), "{error}");
    }
    assert!(lines.recv_timeout(Duration::from_millis(100)).is_err());
}

/// A limit of the account's comes after signing in, to a client that says it understands a later INFO.
#[test]
fn the_accounts_own_max_payload_is_the_one() {
    let operator = Operator::new(r#","payload":2000"#);
    let server = Server::without_jetstream(&operator.config());
    let creds = server.nats.dir().join("creds");
    std::fs::write(&creds, operator.credentials("")).unwrap();
    let mut options = server.options();
    options.creds = Some(creds);
    let link = Link::connect(&options).unwrap();
    // nats-server sends it together with the first PONG, but behind it
    eventually("the limit of the account", LONG, || {
        link.max_payload() == 2000
    });
}

/// Who asks somebody else whether to let a client in takes as long as that takes.
#[test]
fn an_auth_callout_may_take_as_long_as_the_timeout_allows() {
    let issuer = nkeys::KeyPair::new_account();
    let config = format!(
        r#"accounts {{ AUTH {{ users: [ {{ user: auth, password: auth }} ] }}, APP {{}} }}
        authorization {{
            timeout: 20
            auth_callout {{ issuer: {}, auth_users: [ auth ], account: AUTH }}
        }}"#,
        issuer.public_key()
    );
    let builder = Nats::builder()
        .without_jetstream()
        .config(&config)
        .client_options(serde_json::json!({ "user": "auth", "pass": "auth" }));
    let server = Server::with(builder);
    let mut responder = server.nats.client();
    responder.try_subscribe("$SYS.REQ.USER.AUTH", 2).unwrap();
    std::thread::spawn(move || {
        while let Ok(request) = responder.try_next() {
            let claims = operator::claims(&String::from_utf8(request.body).unwrap());
            let user = claims["nats"]["user_nkey"].as_str().unwrap();
            let server = claims["nats"]["server_id"]["id"].as_str().unwrap();
            let permissions = r#""pub":{},"sub":{},"subs":-1,"data":-1,"payload":-1"#;
            let jwt = operator::token(&issuer, user, "user", r#""aud":"APP","#, permissions);
            let answer = operator::token(
                &issuer,
                user,
                "authorization_response",
                &format!(r#""aud":"{server}","#),
                &format!(r#""jwt":"{jwt}""#),
            );
            pause(Duration::from_secs(3));
            let reply = request.reply.unwrap();
            responder
                .try_send(&reply, "none", &[], answer.as_bytes())
                .unwrap();
        }
    });
    let within = |seconds| {
        move |options: &mut Options| options.connect_timeout = Duration::from_secs(seconds)
    };
    let url = "nats://relay:secret@127.0.0.1";
    check_sign_in(&server, url, within(10), Ok(()));
    check_sign_in(
        &server,
        url,
        within(2),
        Err("did not answer to signing in within 2.0 s"),
    );
}

/// A server whose socket takes less than the client sends.
#[test]
fn large_events_arrive_whole_and_in_order() {
    let server = Server::start();
    let link = server.connect();
    create_stream(&link, "");
    pipeline(&link, 64, 64, 64, 900_000);
}

#[test]
fn large_events_go_through_tls() {
    let folder = temp_dir("client-");
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, cert.pem()).unwrap();
    let builder = Nats::builder()
        .file("cert.pem", cert.pem())
        .file("key.pem", signing_key.serialize_pem())
        .config(r#"tls { cert_file: "{dir}/cert.pem", key_file: "{dir}/key.pem" }"#);
    let server = Server::with(builder);
    let mut options = server.options_for("tls://localhost");
    options.tls_ca = Some(ca);
    let link = Link::connect(&options).unwrap();
    create_stream(&link, "");
    pipeline(&link, 64, 64, 64, 900_000);
}

/// What reaches a scripted server.
fn fake_server(hear: impl FnMut(&str, &mut TcpStream) + Clone + Send + 'static) -> Options {
    Options {
        servers: vec![ServerUrl::parse(&scripted_nats::serve_lines(hear)).unwrap()],
        connect_timeout: Duration::from_secs(1),
        ..Options::default()
    }
}

#[test]
fn a_server_that_lets_nobody_in_is_a_timeout_and_leaves_nothing_behind() {
    let _turn = lock(&TURN);
    let options = fake_server(|_, _| {});
    let before = threads();
    for _ in 0..5 {
        let error = refused(&options);
        assert!(
            error.to_string().contains("did not answer to signing in"),
            "{error}"
        );
    }
    threads_return_to(before);
}

/// What a server may say between two acks, and in how many pieces, is no trouble for the connection of the events.
#[test]
fn a_server_that_talks_a_lot_is_understood() {
    let _turn = lock(&TURN);
    let (heard, lines) = unbounded();
    let options = fake_server(move |line, stream| {
        if line == "PING" {
            let _ = stream.write_all(b"PONG\r\n");
        }
        if let Some(line) = line.strip_prefix("HPUB ") {
            let reply = line.split(' ').nth(1).unwrap();
            let ack = r#"{"stream":"EVENTS","seq":7}"#;
            let info = "x".repeat(20_000);
            let said = format!(
                "INFO {{\"x\":\"{info}\"}}\r\nPING\r\n+OK\r\nMSG {reply} 1 {}\r\n{ack}\r\n",
                ack.len()
            );
            for piece in said.as_bytes().chunks(7000) {
                stream.write_all(piece).unwrap();
                pause(Duration::from_millis(5));
            }
        }
        if line == "PONG" {
            heard.send(()).unwrap();
        }
    });
    let link = Link::connect(&options).unwrap();
    for number in 1..=3 {
        publish(&link, events(number, 1, 1));
        let Ack { reply, result, .. } = next_ack(&link);
        assert_eq!((reply, result.map(|(ack, _)| ack.seq)), (number, Ok(7)));
        lines.recv_timeout(LONG).expect("the PING is answered");
    }
    assert!(link.lost().is_empty());
}

#[test]
fn what_is_not_nats_ends_the_link() {
    let _turn = lock(&TURN);
    let options = fake_server(move |line, stream| {
        let said = match line {
            "PING" => &b"PONG\r\n"[..],
            line if line.starts_with("HPUB ") => b"HTTP/1.1 400 Bad Request\r\n",
            _ => return,
        };
        let _ = stream.write_all(said);
    });
    let link = Link::connect(&options).unwrap();
    publish(&link, events(1, 1, 1));
    assert!(
        link.answers().recv_timeout(LONG).is_err(),
        "nothing follows"
    );
    let error = link.lost().try_recv().expect("told before");
    assert!(error.to_string().contains("HTTP/1.1 400"), "{error}");
}
