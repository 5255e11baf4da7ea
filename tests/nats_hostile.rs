//! The connection to NATS against whoever may be on the wire: dripping bytes, endless lines, lengths that nobody has, silence
//! at every step. Each deadline holds, memory stays bounded, and the error says what was wrong.
//!
//! The servers are scripted, as no real one can be made to do this.

mod support;

use jetstream_outbox::jetstream;
use jetstream_outbox::jetstream::ack::AckError;
use jetstream_outbox::jetstream::client::{Answer, Api, Link, Reply};
use jetstream_outbox::nats::Error;
use jetstream_outbox::nats::options::{Options, ServerUrl};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use support::scripted_nats::{self, INFO, say};

const LONG: Duration = Duration::from_secs(30);

/// What waits for no server is done by then on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(1);

/// How much more memory than before a test may have at its peak, whatever is sent. (Buffers of 64 kB, stacks of threads.)
const MAX_GROWTH_KB: u64 = 16 * 1024;

const TLS_INFO: &str = r#"INFO {"server_id":"N","version":"2.15.1","headers":true,"max_payload":1048576,"tls_required":true}"#;

/// Memory is the process', so the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of kilobytes that `/proc` tells of this process.
fn memory_kb(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

/// Runs something, whose peak of memory has a bound.
#[track_caller]
fn within_memory<T>(run: impl FnOnce() -> T) -> T {
    // sets the peak back to what is used now
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = memory_kb("VmRSS:");
    let result = run();
    let grown = memory_kb("VmHWM:").saturating_sub(before);
    assert!(grown < MAX_GROWTH_KB, "{grown} kB more than before");
    result
}

/// What reaches a server that does this with each client.
fn server(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> Options {
    options(&scripted_nats::serve(serve))
}

fn options(address: &str) -> Options {
    Options {
        servers: vec![ServerUrl::parse(address).unwrap()],
        connect_timeout: Duration::from_millis(700),
        request_timeout: Duration::from_millis(700),
        ..Options::default()
    }
}

/// One that greets, lets the client in, waits for a request and then goes on.
fn server_after_request(go_on: impl Fn(&mut TcpStream, &str) + Clone + Send + 'static) -> Options {
    options(&scripted_nats::serve_lines(move |line, stream| {
        if line == "PING" {
            say(stream, "PONG\r\n");
        }
        if let Some(reply) = line.strip_prefix("PUB ") {
            go_on(stream, reply.split(' ').nth(1).unwrap());
        }
    }))
}

/// A byte now and then, until nobody listens.
fn drip(stream: &mut TcpStream, bytes: impl Iterator<Item = u8>) {
    for byte in bytes {
        if stream.write_all(&[byte]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// As much as is taken.
fn flood(stream: &mut TcpStream, what: &[u8]) {
    let chunk = what.repeat((1 << 20) / what.len() + 1);
    for _ in 0..200 {
        if stream.write_all(&chunk).is_err() {
            return;
        }
    }
}

/// Connecting ends in an error with these words, in time and without memory.
#[track_caller]
fn refused(options: &Options, expected: &str) -> Error {
    let started = Instant::now();
    let error = within_memory(|| Link::connect(options).err().expect("nobody is let in"));
    let elapsed = started.elapsed();
    let limit = options.connect_timeout + AT_ONCE;
    assert!(elapsed < limit, "{elapsed:?}: {error}");
    assert!(error.to_string().contains(expected), "{error}");
    error
}

#[test]
fn dripping_bytes_end_at_the_deadline_whatever_step_they_are_in() {
    let _turn = turn();
    let info = server(|mut stream| {
        drip(
            &mut stream,
            b"INFO {".iter().chain([b' '].iter().cycle()).copied(),
        )
    });
    let error = refused(&info, "sent no NATS greeting");
    assert!(matches!(error, Error::Timeout { .. }));

    // a record of 16 kB, as a ServerHello's may be
    let tls = server(|mut stream| {
        say(&mut stream, &format!("{TLS_INFO}\r\n"));
        // what comes before the ClientHello is thrown away
        let _ = stream.read_exact(&mut [0]);
        drip(
            &mut stream,
            [22, 3, 3, 64, 0].into_iter().chain(std::iter::repeat(2)),
        );
    });
    let error = refused(&tls, "did not finish the TLS handshake");
    assert!(matches!(error, Error::Timeout { .. }));

    let mut first = server(|mut stream| drip(&mut stream, std::iter::repeat(22)));
    first.tls_first = true;
    refused(&first, "secure the connection");

    let sign_in = server(|mut stream| {
        say(&mut stream, &format!("{INFO}\r\n"));
        drip(&mut stream, b"+OK\r\n".iter().cycle().copied());
    });
    let error = refused(&sign_in, "did not answer to signing in");
    assert!(matches!(error, Error::Timeout { .. }));
}

#[test]
fn silence_after_each_step_is_named() {
    let _turn = turn();
    let wait = |mut stream: TcpStream| {
        // until it goes away
        let _ = stream.read_to_end(&mut Vec::new());
    };
    let error = refused(&server(wait), "handshake_first needs -nats-tls-first");
    assert!(matches!(error, Error::Timeout { .. }));
    let mut options = server(wait);
    options.tls_first = true;
    refused(&options, "did not finish the TLS handshake");
    let after = |greeting: &'static str| {
        server(move |mut stream| {
            say(&mut stream, greeting);
            wait(stream);
        })
    };
    refused(&after("INFO {\"headers\":true"), "sent no NATS greeting");
    refused(
        &after("INFO {\"headers\":true,\"max_payload\":1,\"tls_required\":true}\r\n"),
        "did not finish the TLS handshake",
    );
    refused(
        &after("INFO {\"headers\":true,\"max_payload\":1}\r\n"),
        "did not answer to signing in",
    );

    // and of one that has let us in
    let options = server_after_request(|_, _| ());
    let link = Link::connect(&options).unwrap();
    let started = Instant::now();
    let error = link.call("INFO", &[], options.request_timeout).unwrap_err();
    assert!(
        matches!(error, jetstream::Error::ApiTimeout { .. }),
        "{error}"
    );
    assert!(started.elapsed() < options.request_timeout + AT_ONCE);
    link.request(7, "INFO", &[]);
    loop {
        let answers = link.answers().recv_timeout(LONG).unwrap();
        if let [Answer::Reply(Reply { token: 7, result })] = &answers[..] {
            let error = result.clone().map_err(AckError::from).unwrap_err();
            break assert_eq!(error, AckError::NoAnswer);
        }
    }
}

#[test]
fn what_is_no_nats_server_is_named() {
    let _turn = turn();
    for (said, expected) in [
        (
            "SSH-2.0-x\r\n",
            r#"it is no NATS server: the line "SSH-2.0-x""#,
        ),
        ("INFO {}\r\n", "missing field `max_payload`"),
        ("INFO {\"max_payload\":1}\r\n", "headers are off"),
        ("PING\r\n", "does not begin with INFO"),
        ("", "closed the connection"),
        ("INFO {", "closed the connection"),
    ] {
        refused(&server(move |mut stream| say(&mut stream, said)), expected);
    }
}

#[test]
fn an_error_that_comes_first_is_told_in_the_servers_words() {
    let _turn = turn();
    for (said, expected) in [
        (
            "-ERR 'maximum connections exceeded'\r\n".to_string(),
            "maximum connections exceeded",
        ),
        (
            format!("{INFO}\r\n-ERR 'Authorization Violation'\r\n"),
            "check user, password",
        ),
        (format!("-ERR '{}'\r\n", "x".repeat(7000)), "xxx"),
    ] {
        let error = refused(
            &server(move |mut stream| {
                say(&mut stream, &said);
                let _ = stream.read(&mut [0]);
            }),
            expected,
        );
        assert!(error.to_string().len() < 1000, "{error}");
    }
}

#[test]
fn lines_without_an_end_take_no_memory() {
    let _turn = turn();
    for start in ["", "INFO ", "-ERR ", "INFO {\"x\":\""] {
        let before = server(move |mut stream| {
            say(&mut stream, start);
            flood(&mut stream, b"x");
        });
        refused(&before, "a line of more than");
        let inside = server(move |mut stream| {
            say(&mut stream, &format!("{INFO}\r\n{start}"));
            flood(&mut stream, b"x");
        });
        refused(&inside, "a line of more than");
    }
    let options = server_after_request(|stream, _| flood(stream, b"x"));
    let link = Link::connect(&options).unwrap();
    let error = within_memory(|| {
        link.request(1, "INFO", &[]);
        link.lost().recv_timeout(LONG).unwrap()
    });
    assert!(error.to_string().contains("a line of more than"), "{error}");
}

/// The `nats` crate would make room for each of these at once.
#[test]
fn lengths_that_nobody_has_asked_for_take_no_memory() {
    let _turn = turn();
    for line in [
        "MSG x 1 4294967295",
        "MSG {reply} 1 4294967295",
        "HMSG {reply} 1 4294967295 4294967295",
        "HMSG {reply} 1 100000 100000",
        "MSG {inbox}1 1 4294967295",
        "MSG {inbox}1 1 100000",
        "MSG {inbox}r99 1 100000",
        "MSG {reply} 1 18446744073709551616",
    ] {
        let options = server_after_request(move |stream, reply| {
            let inbox = reply.rsplit_once('.').unwrap().0;
            let line = line
                .replace("{reply}", reply)
                .replace("{inbox}", &format!("{inbox}."));
            say(stream, &format!("{line}\r\n"));
            flood(stream, b"x");
        });
        let link = Link::connect(&options).unwrap();
        let error = within_memory(|| {
            link.request(1, "INFO", &[]);
            link.lost().recv_timeout(LONG).unwrap()
        });
        assert!(error.to_string().contains("not NATS"), "{line}: {error}");
    }
}

/// Whoever does not take what comes holds the server up, and takes no memory for it.
#[test]
fn a_flood_of_what_is_legal_takes_no_memory() {
    let _turn = turn();
    let info = format!(
        "INFO {{\"max_payload\":1048576,\"x\":\"{}\"}}\r\n",
        "x".repeat(60_000)
    );
    for what in [
        info,
        "PING\r\n".into(),
        "+OK\r\n".into(),
        "MSG {inbox}7 1 0\r\n\r\n".into(),
    ] {
        let options = server_after_request(move |stream, reply| {
            let inbox = reply.rsplit_once('.').unwrap().0;
            stream
                .set_write_timeout(Some(Duration::from_millis(500)))
                .unwrap();
            flood(
                stream,
                what.replace("{inbox}", &format!("{inbox}.")).as_bytes(),
            );
        });
        let link = Link::connect(&options).unwrap();
        within_memory(|| {
            link.request(1, "INFO", &[]);
            std::thread::sleep(Duration::from_secs(1));
        });
    }
}

#[test]
fn a_long_info_is_read_in_whatever_pieces_it_comes() {
    let _turn = turn();
    for len in [5_000, 60_000, 200_000] {
        let urls = r#""10.0.0.1:4222","#.repeat(len / 16);
        let info = format!(
            r#"INFO {{"headers":true,"max_payload":77,"connect_urls":[{urls}"10.0.0.2:4222"]}}"#
        );
        let options = server(move |mut stream| {
            for piece in format!("{info}\r\n").as_bytes().chunks(5000) {
                let _ = stream.write_all(piece);
            }
            let reader = BufReader::new(stream.try_clone().unwrap());
            for line in reader.lines().map_while(Result::ok) {
                if line == "PING" {
                    say(&mut stream, &format!("{info}\r\nPONG\r\n{info}\r\n"));
                }
            }
        });
        let link = Link::connect(&options).unwrap();
        let answers = link.answers().recv_timeout(LONG).unwrap();
        assert!(matches!(answers[..], [Answer::Info]), "{answers:?}");
        assert_eq!(link.max_payload(), 77);
    }
}

/// The commands' session goes through the same hands.
#[cfg(feature = "admin")]
mod over_the_crate {
    use super::*;
    use jetstream_outbox::admin::client::Client;

    #[test]
    fn the_crate_is_never_given_a_length_or_a_line_beyond_the_bounds() {
        let _turn = turn();
        for line in [
            "MSG {reply} 1 4294967295\r\n",
            "MSG x 1 4294967295\r\n",
            "INFO {\"x\":\"",
            "x",
        ] {
            let options = server_after_request(move |stream, reply| {
                say(stream, &line.replace("{reply}", reply));
                flood(stream, b"x");
            });
            let client = Client::connect(&options).unwrap();
            let started = Instant::now();
            let error = within_memory(|| client.call("INFO", &[], LONG).unwrap_err());
            assert!(
                matches!(error, jetstream::Error::Nats(Error::Lost { .. })),
                "{error}"
            );
            assert!(started.elapsed() < LONG / 2, "{error}");
        }
    }

    #[test]
    fn a_later_info_does_not_reach_the_crate() {
        let _turn = turn();
        let options = server_after_request(|stream, reply| {
            say(
                stream,
                &format!(
                    "INFO {{\"x\":\"{}\"}}\r\nMSG {reply} 1 2\r\n{{}}\r\n",
                    "x".repeat(60_000)
                ),
            );
        });
        let client = Client::connect(&options).unwrap();
        assert_eq!(client.call("INFO", &[], LONG).unwrap(), b"{}");
    }

    #[test]
    fn an_error_of_the_servers_ends_the_wait_in_its_words() {
        let _turn = turn();
        let options = server_after_request(|stream, _| {
            say(
                stream,
                "-ERR 'Permissions Violation for Publish to \"$JS.API.INFO\"'\r\n",
            );
        });
        let client = Client::connect(&options).unwrap();
        let error = client.call("INFO", &[], LONG).unwrap_err();
        assert!(
            matches!(error, jetstream::Error::Nats(Error::Permission { .. })),
            "{error}"
        );
    }

    #[test]
    fn a_server_that_falls_silent_is_not_waited_for() {
        let _turn = turn();
        let options = server_after_request(|_, _| ());
        let client = Client::connect(&options).unwrap();
        let started = Instant::now();
        let error = client
            .call("INFO", &[], options.request_timeout)
            .unwrap_err();
        assert!(
            matches!(error, jetstream::Error::ApiTimeout { .. }),
            "{error}"
        );
        drop(client);
        assert!(started.elapsed() < options.request_timeout + AT_ONCE);
    }
}
