//! The HTTP of `-listen`: paths, methods and addresses, and clients that mean no good.

use crate::observe::{address, addresses, exchange, get, try_get, wait_for_readiness};
use crate::rig::{DEADLINE, Rig};
use crate::support::wait::{eventually, secs};
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

const PAGE: &str = include_str!("../../src/observe/page/page.html");
/// Connections that are served at once.
const CONNECTIONS: usize = 32;

#[track_caller]
fn check(at: &str, request: &str, begins: &str) -> String {
    let answer = exchange(at, request).unwrap_or_else(|error| panic!("{request}: {error}"));
    assert!(answer.starts_with(begins), "{request}: {answer}");
    answer
}

#[test]
fn paths_methods_and_requests_that_are_none_are_answered() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    assert!(at.starts_with("127.0.0.1:"), "{at}");
    let (status, page) = get(&at, "/?x");
    assert_eq!((status, page.as_str()), (200, PAGE));
    assert_eq!(get(&at, "/other").0, 404);
    let ok = "HTTP/1.1 200 ";
    for target in [
        "/livez",
        "http://localhost:1/livez?x",
        "HTTP://127.0.0.1/livez",
    ] {
        let answer = check(
            &at,
            &format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            ok,
        );
        assert!(answer.ends_with("\r\n\r\nalive\n"), "{answer}");
    }
    // as a client of 1996 asks
    check(&at, "GET /livez HTTP/1.0\r\n\r\n", ok);
    let refused = check(&at, "POST / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 405 ");
    assert!(refused.contains("\r\nAllow: GET, HEAD\r\n"), "{refused}");
    check(&at, "GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 400 ");
    check(
        &at,
        "GET livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "HTTP/1.1 400 ",
    );
    check(
        &at,
        &format!("GET /{}", "x".repeat(60_000)),
        "HTTP/1.1 431 ",
    );
    // HEAD says what GET would send, and sends nothing of it
    let length = |answer: &str| {
        let line = answer
            .lines()
            .find(|line| line.starts_with("Content-Length: "));
        line.expect("a length").to_string()
    };
    let asked = |method: &str| {
        check(
            &at,
            &format!("{method} / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            ok,
        )
    };
    let (got, head) = (asked("GET"), asked("HEAD"));
    assert_eq!(length(&got), length(&head));
    assert!(head.ends_with("\r\n\r\n"), "{head}");
    let (code, log) = rig.run(&["-listen", &at]);
    let last = log.last().expect("it says why");
    assert!(
        code == 78 && last.contains("give -listen another port"),
        "{code} {last}"
    );
}

/// Under the strictest policy that a browser knows: nothing inline, nothing from elsewhere, and no markup made of text.
#[test]
fn the_page_is_a_few_small_files_of_its_own() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    let mut bytes = 0;
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let answer = check(&at, &request, "HTTP/1.1 200 ");
        let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
        assert!(
            head.contains(&format!("\r\nContent-Type: {kind}")),
            "{head}"
        );
        let policy = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Security-Policy: "))
            .expect("a policy");
        assert!(policy.starts_with("default-src 'none';"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        // a namespace is no address
        let body = body.replace("http://www.w3.org/2000/svg", "");
        for none in [
            "http:",
            "https:",
            "//cdn",
            " style=",
            " onclick",
            "<style",
            "innerHTML",
            "eval(",
        ] {
            assert!(!body.contains(none), "{path} has {none}");
        }
        bytes += body.len();
    }
    for (file, by) in [
        ("page.css", "href"),
        ("page.js", "src"),
        ("icon.svg", "href"),
    ] {
        assert!(PAGE.contains(&format!("{by}=\"{file}\"")), "{file}");
    }
    assert!(!PAGE.contains("<script>"));
    assert!(bytes < 32 * 1024, "{bytes}");
}

/// A page of another site, whose name its owner lets point to 127.0.0.1 (DNS rebinding), is told nothing.
#[test]
fn on_loopback_other_names_are_refused_and_elsewhere_they_are_not() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "localhost:0"]);
    let ask = |at: &str, target: &str, host: &str, begins: &str| {
        let request = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        check(at, &request, begins)
    };
    let (ok, misdirected) = ("HTTP/1.1 200 ", "HTTP/1.1 421 ");
    for at in addresses(&relay) {
        for host in ["localhost:9464", "127.0.0.1", "[::1]:9464"] {
            ask(&at, "/status", host, ok);
        }
        for path in ["/", "/status", "/metrics", "/livez"] {
            let answer = ask(&at, path, "rebound.example:9464", misdirected);
            assert!(answer.contains("-listen"), "{answer}");
        }
        // the target says more than the field
        ask(
            &at,
            "http://rebound.example/status",
            "localhost",
            misdirected,
        );
    }
    let everywhere = rig.relay(&["-listen", ":0"]);
    let all = addresses(&everywhere);
    assert!(all[0].starts_with("0.0.0.0:"), "{all:?}");
    let at = all[0].replace("0.0.0.0", "127.0.0.1");
    ask(&at, "/livez", "relay.example:9464", ok);
}

/// Where there is IPv6; everywhere else the one address is all there is.
#[test]
fn a_port_is_served_by_ipv4_and_ipv6() {
    let rig = Rig::start();
    let has_ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    for (listen, expected) in [
        ("0", ["127.0.0.1", "[::1]"]),
        ("localhost:0", ["127.0.0.1", "[::1]"]),
        (":0", ["0.0.0.0", "[::]"]),
    ] {
        let relay = rig.relay(&["-listen", listen]);
        let found = addresses(&relay);
        let port = found[0].rsplit(':').next().expect("a port");
        let expected = expected.map(|ip| format!("{ip}:{port}"));
        let expected = if has_ipv6 {
            &expected[..]
        } else {
            &expected[..1]
        };
        assert_eq!(found, expected, "{listen}");
        let loopback = [format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
        for at in loopback.iter().take(found.len()) {
            assert_eq!(get(at, "/livez").0, 200, "{listen} {at}");
        }
    }
}

/// They fill every place; a probe still gets its answer, and at once.
#[test]
fn clients_that_send_half_a_request_do_not_keep_a_probe_out() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    wait_for_readiness(&at, 200, "relaying");
    let mut held = Vec::new();
    let half = |held: &mut Vec<TcpStream>| {
        let mut stream = TcpStream::connect(&at).expect("connect");
        let _ = stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: local");
        held.push(stream);
    };
    for round in 0..20 {
        (0..CONNECTIONS * 2).for_each(|_| half(&mut held));
        let begun = Instant::now();
        let (status, text) = get(&at, "/readyz");
        assert_eq!((status, text.as_str()), (200, "relaying\n"), "{round}");
        let took = begun.elapsed();
        // none of them has come to its deadline
        assert!(took < secs(2), "{round}: {took:?}");
    }
    // one of them that is not the oldest may still finish
    half(&mut held);
    let mut last = held.pop().expect("it was pushed");
    last.write_all(b"host\r\n\r\n").expect("send the rest");
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut last, &mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// Hundreds of clients that never finish, drip, or send too much: events flow, and files stay few, and threads are not even one more.
#[test]
fn hostile_clients_disturb_nothing() {
    let rig = Rig::start();
    let relay = rig.relay(&["-listen", "0"]);
    let at = address(&relay);
    wait_for_readiness(&at, 200, "relaying");
    let of_relay = |what: &str| format!("/proc/{}/{what}", relay.id());
    let count = |what: &str| fs::read_dir(of_relay(what)).expect("it runs").count();
    let before = (count("task"), count("fd"));
    let mut idle = Vec::new();
    let mut refused = 0;
    let mut most = before;
    for number in 0..300_u64 {
        match TcpStream::connect(&at) {
            Ok(mut stream) => {
                // one that was closed already takes nothing
                let _ = match number % 3 {
                    0 => Ok(()),
                    1 => stream.write_all(b"G"),
                    _ => stream.write_all(&[b'x'; 20_000]),
                };
                idle.push(stream);
            }
            Err(_) => refused += 1,
        }
        if number % 10 == 0 {
            rig.commit_event(number + 1, "a");
        }
        most = (most.0.max(count("task")), most.1.max(count("fd")));
    }
    rig.wait_for_messages(30);
    assert!(refused < 300, "some got through");
    assert!(
        most.0 <= before.0 && most.1 <= before.1 + CONNECTIONS + 2,
        "{before:?} {most:?}"
    );
    // dripping clients do not live longer than the deadline: somebody else is served then
    let dripping = thread::spawn(move || {
        let begun = Instant::now();
        while begun.elapsed() < secs(5) {
            for stream in &mut idle {
                let _ = stream.write_all(b"a");
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
    eventually("an honest client to be served", DEADLINE, || {
        try_get(&at, "/metrics")
    });
    dripping.join().expect("it only writes");
    rig.commit_event(1_000, "a");
    rig.wait_for_messages(31);
    eventually("the files to be closed", DEADLINE, || {
        count("fd") <= before.1
    });
}
