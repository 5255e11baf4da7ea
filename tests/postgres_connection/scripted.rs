//! What no real server does: a script of bytes plays one that is broken, or that means harm.

use crate::cluster::connect;
use jetstream_outbox::postgres::Connection;
use std::io::{Read, Write};
use std::net::TcpListener;

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn authentication(code: u32, body: &[u8]) -> Vec<u8> {
    message(b'R', &[&code.to_be_bytes(), body].concat())
}

/// Takes one client; sends a line of `script` for each message from it, then hangs up when it does.
fn serve(script: Vec<Vec<u8>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut buffer = [0; 4096];
        for answer in script {
            // our messages are small and sent whole
            if client.read(&mut buffer).unwrap_or(0) == 0 {
                return;
            }
            // it may have seen enough of it
            if client.write_all(&answer).is_err() {
                return;
            }
        }
        let _ = client.read(&mut buffer);
    });
    port
}

fn try_connect(script: Vec<Vec<u8>>, more: &str) -> Result<Connection, String> {
    let port = serve(script);
    let text = format!(
        "host=127.0.0.1 port={port} user=u password=secret sslmode=disable connect_timeout=5 {more}"
    );
    connect(&text).map_err(|error| error.to_string())
}

#[track_caller]
fn check(script: Vec<Vec<u8>>, expected: &str) {
    let error = try_connect(script, "").unwrap_err();
    assert!(
        error.contains(expected),
        "expected {expected}\nfound    {error}"
    );
    assert!(!error.contains("secret"), "{error}");
}

#[test]
fn methods_that_are_not_supported_are_named() {
    for (code, body, name) in [
        (2, &b""[..], "Kerberos V5"),
        (6, b"", "SCM credentials (scm)"),
        (7, b"", "GSSAPI (gss)"),
        (9, b"", "SSPI (sspi)"),
        (10, b"OAUTHBEARER\0\0", "SASL OAUTHBEARER"),
    ] {
        check(vec![authentication(code, body)], name);
    }
    check(
        vec![authentication(99, b"")],
        "unknown authentication tag `99`",
    );
}

#[test]
fn a_server_that_cannot_prove_itself_is_left() {
    let offer = || authentication(10, b"SCRAM-SHA-256\0\0");
    let end = || [authentication(0, b""), message(b'Z', b"I")].concat();
    let unproven = "without proving that it knows the password";
    check(vec![offer(), end()], unproven);
    // an invented nonce, a proof before the challenge, a second offer
    let challenge = authentication(11, b"r=invented,s=c2FsdA==,i=4096");
    check(vec![offer(), challenge], "SCRAM exchange: invalid nonce");
    check(
        vec![offer(), authentication(12, b"v=AAAA")],
        "SCRAM exchange: invalid SCRAM state",
    );
    check(
        vec![offer(), offer()],
        "an authentication request out of turn",
    );
    check(
        vec![authentication(11, b"r=x")],
        "an authentication request out of turn",
    );
    // asking for the password in clear once SCRAM has begun
    check(
        vec![offer(), authentication(3, b"")],
        "an authentication request out of turn",
    );
}

#[test]
fn lengths_that_cannot_be_are_refused() {
    for length in [0_u32, 3, 1 << 20, 1 << 31, u32::MAX] {
        let header = [&b"R"[..], &length.to_be_bytes()].concat();
        check(
            vec![header],
            &format!("message 'R' (0x52) claims {length} bytes"),
        );
    }
}

#[test]
fn what_may_not_come_before_authentication_is_refused() {
    check(
        vec![message(b'S', b"server_version\x0015\0")],
        "a message before authentication",
    );
    check(vec![message(b'Z', b"I")], "a message before authentication");
    check(vec![message(b'W', b"\0\0\0")], "unknown message tag");
    check(vec![Vec::new()], "no answer within 5 s");
}

#[test]
fn the_servers_refusal_is_told_with_its_hint() {
    let fields = b"SFATAL\0VFATAL\0C53300\0Mtoo \xff many\0Dthe detail\0Hthe hint\0\0";
    check(
        vec![message(b'E', fields)],
        "FATAL 53300: too \u{fffd} many (the detail) (hint: the hint)",
    );
}

fn error(tag: u8, text: &[u8]) -> Vec<u8> {
    message(
        tag,
        &[b"SERROR\0VERROR\0CXX000\0M", text, b"\0Dthe detail\0\0"].concat(),
    )
}

#[test]
fn whoever_raises_an_error_or_a_notice_does_not_choose_how_much_is_held() {
    let long = vec![b'x'; 5 << 20];
    // of a notice before the session nothing is kept
    let script = vec![[error(b'N', &long), error(b'E', &long)].concat()];
    let told = try_connect(script, "").unwrap_err();
    assert!(
        told.contains("ERROR XX000: xxx") && told.len() < 5_000,
        "{}",
        told.len()
    );
    // and the session goes on after one
    let start = [
        authentication(0, b""),
        error(b'N', &long),
        message(b'Z', b"I"),
    ]
    .concat();
    assert!(try_connect(vec![start], "").is_ok());
    let start = [authentication(0, b""), message(b'Z', b"I")].concat();
    let answer = [error(b'E', &long), message(b'Z', b"I"), message(b'Z', b"I")].concat();
    let mut connection = try_connect(vec![start, answer], "").unwrap();
    let told = connection.simple_query("SELECT 1").unwrap_err().to_string();
    assert!(
        told.contains("ERROR XX000: xxx") && told.len() < 5_000,
        "{}",
        told.len()
    );
    // what follows the long one is found: the second answer is there already
    assert!(connection.simple_query("SELECT 1").unwrap().is_empty());
}

#[test]
fn a_server_that_reports_settings_without_end_fills_no_memory() {
    let mut start = authentication(0, b"");
    let setting = |name: &str, value: &str| message(b'S', format!("{name}\0{value}\0").as_bytes());
    start.extend(setting("server_version", "15.18"));
    start.extend(setting("search_path", &"x".repeat(3_000_000)));
    for number in 0..100_000 {
        start.extend(setting(&format!("setting_{number}"), "value"));
    }
    start.extend(setting("server_version", "16.2"));
    start.extend(message(b'Z', b"I"));
    let connection = try_connect(vec![start], "").unwrap();
    // there is always room for one that was there before
    assert_eq!(connection.parameter("setting_7"), Some("value"));
    assert_eq!(connection.parameter("setting_99999"), None);
    assert_eq!(connection.parameter("search_path"), None);
    assert_eq!(connection.parameter("server_version"), Some("16.2"));
}

#[test]
fn a_server_does_not_choose_how_long_a_password_is_hashed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut buffer = [0; 4096];
        let _ = client.read(&mut buffer).unwrap();
        client
            .write_all(&authentication(10, b"SCRAM-SHA-256\0\0"))
            .unwrap();
        let count = client.read(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
        let nonce = text.split("r=").nth(1).unwrap().to_string();
        let challenge = format!("r={nonce}x,s=c2FsdA==,i=4000000000");
        client
            .write_all(&authentication(11, challenge.as_bytes()))
            .unwrap();
        let _ = client.read(&mut buffer);
    });
    let text = format!(
        "host=127.0.0.1 port={port} user=u password=secret sslmode=disable connect_timeout=60"
    );
    let begun = std::time::Instant::now();
    let error = connect(&text).unwrap_err().to_string();
    assert!(
        error.contains("asks for 4000000000 iterations of SCRAM"),
        "{error}"
    );
    assert!(begun.elapsed() < std::time::Duration::from_secs(30));
    server.join().unwrap();
}

#[test]
fn a_server_that_is_starting_up_is_passed_over() {
    let fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0";
    let starting = serve(vec![message(b'E', fields)]);
    let ready = serve(vec![[authentication(0, b""), message(b'Z', b"I")].concat()]);
    let text = format!("host=127.0.0.1,127.0.0.1 port={starting},{ready} user=u sslmode=disable");
    assert_eq!(connect(&text).unwrap().peer(), format!("127.0.0.1:{ready}"));
}

#[test]
fn older_servers_are_asked_what_they_are() {
    let some = |text: &[u8]| {
        let row = [&[0, 1, 0, 0, 0, text.len() as u8][..], text].concat();
        [
            message(b'D', &row),
            message(b'C', b"SELECT 1\0"),
            message(b'Z', b"I"),
        ]
        .concat()
    };
    for (attrs, answer, fits) in [
        ("read-write", "off", true),
        ("read-write", "on", false),
        ("standby", "t", true),
        ("primary", "t", false),
    ] {
        let start = [authentication(0, b""), message(b'Z', b"I")].concat();
        let script = vec![start, some(answer.as_bytes())];
        let found = try_connect(script, &format!("target_session_attrs={attrs}"));
        assert_eq!(found.is_ok(), fits, "{attrs} {answer}: {found:?}");
    }
}
